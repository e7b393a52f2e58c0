"""
What a run directory holds, and how it is kept whole whatever happens to the process that writes it:

config.json    all config values, the model's arguments, the tokenizer, versions
checkpoints/   N/ is the state after N iterations, written by Orbax: the latest two, and the best by validation loss
best.json      which one is the best
base/          with LoRA, the parameters that it leaves as they are, written once; then checkpoints hold the adapters alone
log.csv        a row for each logged iteration and each evaluation
loss.png       the same as a picture
lock           held by the process that trains

Where many processes train together, all of them write the checkpoints and process 0 alone the rest.
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
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices

from model import (GPT2, GPT2_META, GPTConfig, build, divide, init_params, join, merge_lora, on_one_device, open_gpt2,
                   place, read_json)


def write(path, text):
    """Replaces a file at once, or not at all."""
    if jax.process_index() > 0:
        return
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(f'{path}.tmp', path)


def take(out_dir):
    """Makes out_dir this process's own: returns an open file that holds its lock, which ends with the process, however
    that ends. Raises ValueError where another process has it, OSError where it cannot be written."""
    if jax.process_index() > 0:
        return None
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, 'lock'), 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'out_dir = {out_dir!r} is in use by another training process') from None
    return lock


def clear(out_dir):
    """Removes the run that out_dir holds, and nothing else, once all processes have come this far."""
    sync_global_devices('about to clear')
    if jax.process_index() == 0:
        for name in ('config.json', 'best.json', 'log.csv', 'loss.png'):
            Path(out_dir, name).unlink(missing_ok=True)
        for name in ('checkpoints', 'base'):
            shutil.rmtree(Path(out_dir, name), ignore_errors=True)
    sync_global_devices('cleared')


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
        state = {k: v for k, v in state.items() if k != 'base'}
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
        while steps and jax.process_index() == 0 and (name := damage(self.folder / str(steps[-1]))):
            n = steps.pop()
            print(f'warning: checkpoint {n} is damaged ({name})' + (f', going on from {steps[-1]}' if steps else ''))
            if not self.read_only:
                (self.folder / str(n)).rename(self.folder.parent / f'damaged-{n}-{time.time():.0f}')
        step = int(broadcast_one_to_all(np.int32(steps[-1] if steps else -1)))
        self.manager.reload()
        if step < 0:
            raise ValueError(f'no checkpoint in {self.folder} can be read')
        rest = {k: v for k, v in abstract.items() if k not in ('params', 'base')}
        found = self.manager.restore(step, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract['params']), rest=ocp.args.StandardRestore(rest), progress=ocp.args.JsonRestore()))
        base = load_base(self.folder.parent, abstract['base'])
        return {'params': found['params'], 'base': base, **found['rest']}, found['progress']


def file_sums(checkpoint):
    """SHA-256 of every file of a checkpoint's items, by name."""
    return {path.relative_to(checkpoint).as_posix(): hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()
            for path in sorted(checkpoint.glob('*/**/*')) if path.is_file()}


def seal(checkpoints):
    """Notes the sums of checkpoints that have none: Orbax does not notice every damage, a flipped bit for one. Called
    when Orbax has written all files of a checkpoint and not yet given it its name."""
    for folder in Path(checkpoints).iterdir() if jax.process_index() == 0 else []:
        if folder.is_dir() and not (folder / 'sha256.json').exists():
            (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))


def damage(checkpoint):
    """The name of a file that is not what it was when the checkpoint was sealed, or None."""
    try:
        noted, there = read_json(checkpoint / 'sha256.json'), file_sums(checkpoint)
    except (ValueError, OSError):
        return 'sha256.json'
    return next((name for name in noted if there.get(name) != noted[name]), None)


def save_base(out_dir, base):
    """Writes out_dir/base, sealed as a checkpoint is, in place of an earlier one."""
    folder = Path(out_dir, 'base').absolute()
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / 'params', base, force=True)
    if jax.process_index() == 0:
        (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))
    sync_global_devices('base')


def load_base(out_dir, abstract):
    """The parameters in out_dir/base, sharded as `abstract` is; {} for {}. Raises ValueError if they are damaged."""
    folder = Path(out_dir, 'base').absolute()
    if abstract and (name := damage(folder)):
        raise ValueError(f'{folder} is damaged ({name}), and its adapters are of no use without it')
    return ocp.StandardCheckpointer().restore(folder / 'params', abstract) if abstract else {}


def open_run(out_dir, checkpoint='best'):
    """(config, meta, read) of the best or the latest checkpoint of a run directory, as open_model gives them. Adapters are
    merged. Raises ValueError where there is no checkpoint that can be read."""
    out_dir = Path(out_dir).absolute()
    meta = read_json(out_dir / 'config.json')
    config = GPTConfig(**meta['model_args'])
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

    def read(block_size=None, where=on_one_device):
        abstract = jax.eval_shape(lambda: init_params(config, 0))
        abstract = place(abstract, where(abstract))
        trained, frozen = divide(abstract, config)
        params = join(ocp.StandardCheckpointer().restore(folder / 'params', trained), load_base(out_dir, frozen))
        if not config.lora_rank and block_size in (None, config.block_size):
            return params

        def merge_and_crop(params):
            params = merge_lora(params, config)
            return params | {'wpe': {'weight': params['wpe']['weight'][:block_size]}}
        return jax.jit(merge_and_crop, out_shardings=where(jax.eval_shape(merge_and_crop, abstract)))(params)

    return replace(config, lora_rank=0), meta, read


def load_run(out_dir, checkpoint='best', **changes):
    """The model of a run directory; `changes` to its GPTConfig, such as dtype. Raises ValueError as open_run does."""
    config, _, read = open_run(out_dir, checkpoint)
    return build(replace(config, **changes), read())


def open_model(source, checkpoint='best'):
    """(config, meta, read) of a run directory, of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or of a directory in their
    format: the model's arguments, a dict with its vocab_size and tokenizer, and what reads the parameters, as open_gpt2 has
    it. A directory says in a meta.json, such as a dataset has, if its tokenizer is not GPT-2's. Raises ValueError."""
    folder = Path(source)
    if source in GPT2:
        config, read = open_gpt2(source)
        return config, GPT2_META, read
    if not (folder / 'config.json').is_file():
        raise ValueError(f"init_from = {source!r}: there is no {folder / 'config.json'}, and it is none of {', '.join(GPT2)}")
    if 'model_args' in read_json(folder / 'config.json'):
        return open_run(source, checkpoint)
    config, read = open_gpt2(folder)
    meta = read_json(folder / 'meta.json') if (folder / 'meta.json').exists() else GPT2_META
    if meta['vocab_size'] > config.vocab_size:
        raise ValueError(f'{source} has a vocabulary of {config.vocab_size}, which is not the {meta["vocab_size"]} of its tokenizer: '
                         'a meta.json, such as a dataset has, must say which one it is')
    return config, meta, read


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
        self.file = open(self.path, 'a', buffering=1, encoding='utf-8') if jax.process_index() == 0 else None

    def row(self, **row):
        if self.file:
            self.file.write(','.join(f'{row[c]:.7g}' if c in row else '' for c in self.columns) + '\n')

    def plot(self):
        if not self.file:
            return
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
