"""
What a run directory holds, and how it is kept whole whatever happens to the process that writes it:

config.json    all config values, the model's arguments, the tokenizer, versions
checkpoints/   N/ is the state after N iterations, written by Orbax: the latest two, and the best by validation loss
best.json      which one is the best
log.csv        a row for each logged iteration and each evaluation
loss.png       the same as a picture
lock           held by the process that trains
"""
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from model import GPTConfig, build, init_params, read_json


def write(path, text):
    """Replaces a file at once, or not at all."""
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(f'{path}.tmp', path)


def take(out_dir):
    """Makes out_dir this process's own: returns an open file that holds its lock, which ends with the process, however
    that ends. Raises ValueError where another process has it, OSError where it cannot be written."""
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, 'lock'), 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'out_dir = {out_dir!r} is in use by another training process') from None
    return lock


def clear(out_dir):
    """Removes the run that out_dir holds, and nothing else."""
    for name in ('config.json', 'best.json', 'log.csv', 'loss.png'):
        Path(out_dir, name).unlink(missing_ok=True)
    shutil.rmtree(Path(out_dir, 'checkpoints'), ignore_errors=True)


# -----------------------------------------------------------------------------
# checkpoints


class Checkpoints:
    """Those of a run: a state and a dict, `progress`, for each of some numbers of iterations. They are written while
    training goes on, and seen by nobody before they are whole."""

    def __init__(self, out_dir, read_only=False):
        logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax raises its errors, and also logs each in every thread
        self.folder, self.best, self.read_only = Path(out_dir, 'checkpoints').absolute(), None, read_only
        self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=self, create=not read_only, cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=lambda: seal(self.folder))))

    def should_preserve(self, checkpoints, *, context):
        """Orbax asks which checkpoints stay: the latest two, and the best."""
        return [c.step in (*sorted(c.step for c in checkpoints)[-2:], self.best) for c in checkpoints]

    def save(self, n, state, progress):
        """Copies the state and leaves the writing to threads. Raises OSError if the disk is too full for it, and whatever
        went wrong with the save before."""
        if n in self.manager.all_steps():
            return
        if shutil.disk_usage(self.folder).free < sum(x.nbytes for x in jax.tree.leaves(state)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = {k: v for k, v in state.items() if k != 'params'}  # apart, because sampling wants the parameters alone
        self.manager.save(n, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state['params']), rest=ocp.args.StandardSave(rest), progress=ocp.args.JsonSave(progress)))

    def restore(self, abstract):
        """(state, progress) of the latest checkpoint, sharded as `abstract` is; None if there is none yet. A damaged one is
        named and moved aside, and the one before it taken. Raises ValueError if all are damaged."""
        steps = sorted(self.manager.all_steps())
        if not steps:
            return None
        while steps and (name := damage(self.folder / str(steps[-1]))):
            n = steps.pop()
            print(f'warning: checkpoint {n} is damaged ({name})' + (f', going on from {steps[-1]}' if steps else ''))
            if not self.read_only:
                (self.folder / str(n)).rename(self.folder.parent / f'damaged-{n}-{time.time():.0f}')
                self.manager.reload()
        if not steps:
            raise ValueError(f'no checkpoint in {self.folder} can be read')
        rest = {k: v for k, v in abstract.items() if k != 'params'}
        found = self.manager.restore(steps[-1], args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract['params']), rest=ocp.args.StandardRestore(rest), progress=ocp.args.JsonRestore()))
        return {'params': found['params'], **found['rest']}, found['progress']


def file_sums(checkpoint):
    """SHA-256 of every file of a checkpoint's items, by name."""
    return {path.relative_to(checkpoint).as_posix(): hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()
            for path in sorted(checkpoint.glob('*/**/*')) if path.is_file()}


def seal(checkpoints):
    """Notes the sums of checkpoints that have none: Orbax does not notice every damage, a flipped bit for one. Called
    when Orbax has written all files of a checkpoint and not yet given it its name."""
    for folder in Path(checkpoints).iterdir():
        if folder.is_dir() and not (folder / 'sha256.json').exists():
            (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))


def damage(checkpoint):
    """The name of a file that is not what it was when the checkpoint was sealed, or None."""
    try:
        noted, there = read_json(checkpoint / 'sha256.json'), file_sums(checkpoint)
    except (ValueError, OSError):
        return 'sha256.json'
    return next((name for name in noted if there.get(name) != noted[name]), None)


def load_run(out_dir, checkpoint='best', **changes):
    """The model of a run directory, from its best or its latest checkpoint; `changes` to its GPTConfig, such as dtype.
    Raises ValueError where there is none that can be read."""
    out_dir = Path(out_dir).absolute()
    config = GPTConfig(**read_json(out_dir / 'config.json')['model_args'] | changes)
    steps = ocp.utils.checkpoint_steps(out_dir / 'checkpoints') if (out_dir / 'checkpoints').exists() else []
    if not steps:
        raise ValueError(f'{out_dir} holds no checkpoint yet')
    step = max(steps)
    if checkpoint == 'best' and (out_dir / 'best.json').exists():
        best = read_json(out_dir / 'best.json')['iter']
        step = best if best in steps else step
    folder = out_dir / 'checkpoints' / str(step)
    if name := damage(folder):
        raise ValueError(f'{folder} is damaged ({name}); there are checkpoints {steps}, and the keys --checkpoint=best and =latest')
    params = jax.eval_shape(lambda: init_params(config, 0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    return build(config, ocp.StandardCheckpointer().restore(folder / 'params', params))


# -----------------------------------------------------------------------------
# log and picture


class Log:
    """log.csv and loss.png of a run that is at iteration iter_num. The log goes on in place: rows that the run is about to
    make again are dropped, and so is one that was cut off."""
    columns = ['iter', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'skipped', 'time_ms', 'tokens_per_s']

    def __init__(self, out_dir, iter_num):
        self.title, self.path = out_dir, Path(out_dir, 'log.csv')
        lines = [','.join(self.columns) + '\n']
        if iter_num > 0 and self.path.exists():
            for line in self.path.read_text(encoding='utf-8').splitlines(keepends=True):
                if line.endswith('\n') and line[0].isdigit() and int(line.split(',')[0]) < iter_num:
                    lines.append(line)
        write(self.path, ''.join(lines))
        self.file = open(self.path, 'a', buffering=1, encoding='utf-8')

    def row(self, **row):
        self.file.write(','.join(f'{row[c]:.7g}' if c in row else '' for c in self.columns) + '\n')

    def plot(self):
        from matplotlib.figure import Figure  # without pyplot there is no window system to look for
        log = np.genfromtxt(self.path, delimiter=',', names=True, ndmin=1)
        figure = Figure(figsize=(8, 5), layout='constrained')
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[4, 1])
        for name, style in (('loss', dict(color='tab:blue', alpha=0.3, label='batch')),
                            ('train_loss', dict(color='tab:blue', marker='.', label='train')),
                            ('val_loss', dict(color='tab:orange', marker='.', label='val'))):
            there = ~np.isnan(log[name])
            top.plot(log['iter'][there], log[name][there], **style)
        bottom.plot(log['iter'], log['lr'], color='tab:gray')
        top.set(ylabel='loss', title=self.title)
        top.legend()
        top.grid(alpha=0.3)
        bottom.set(xlabel='iteration', ylabel='learning rate')
        png = self.path.with_name('loss.png')
        figure.savefig(f'{png}.tmp', format='png', dpi=100)
        os.replace(f'{png}.tmp', png)


# -----------------------------------------------------------------------------
# text


def tokenizer(meta):
    """encode(text) -> ids, decode(ids) -> text, and the id of <|endoftext|> or None, for the tokenizer that a
    meta.json describes. encode raises ValueError naming the characters that it does not know; so does
    a vocabulary that cannot be downloaded."""
    if meta['kind'] == 'char':
        chars = meta['chars']
        id_of = {c: i for i, c in enumerate(chars)}

        def encode(text):
            if unknown := ''.join(sorted(set(text) - set(chars))):
                raise ValueError(f'the tokenizer does not know {unknown!r}; it knows {chars!r}')
            return [id_of[c] for c in text]

        return encode, lambda ids: ''.join(chars[i] for i in ids), None
    import tiktoken
    try:
        enc = tiktoken.get_encoding(meta['name'])
    except Exception as e:  # requests' errors, or a damaged cache
        raise ValueError(f'no {meta["name"]} vocabulary ({type(e).__name__}): README.md, troubleshooting, has what to do') from None
    return functools.partial(enc.encode, allowed_special={'<|endoftext|>'}), enc.decode, enc.eot_token
