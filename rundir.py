"""
What a run directory holds, and how it stays whole whatever happens to the process that writes it:

config.json    all config values, the model's arguments, the tokenizer, versions
checkpoints/   N/ is the state after N iterations, written by Orbax: the latest two, and the best
best.json      which checkpoint has the best validation loss
base/          with LoRA, the frozen parameters, written once; the checkpoints hold only the adapters
log.csv        a row for each logged iteration and each evaluation
loss.png       the same as a picture
lock           held by the process that trains

When many processes train together, all of them write the checkpoints. Process 0 writes the rest.
"""
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices

import hf
import lora
from dataset import GPT2_META, check_meta, read_json
from devices import choose_kernels
from model import GPTConfig, abstract_params, build
from step import on_one_device


class RunError(Exception):
    """Why a run cannot go on, and what its user can do about it."""


def write(path, text):
    """Replaces a file whole, or not at all."""
    if jax.process_index() > 0:
        return
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(f'{path}.tmp', path)


def lock_out_dir(out_dir):
    """Makes out_dir this process's own. The object that is returned holds the lock, which ends with the process. Raises
    ValueError if another process has it, OSError if it cannot be written."""
    if jax.process_index() > 0:
        return None
    os.makedirs(out_dir, exist_ok=True)
    lock = filelock.FileLock(os.path.join(out_dir, 'lock'))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f'out_dir = {out_dir!r} is in use by another training process') from None
    return lock


def clear_run(out_dir):
    """Removes the run that out_dir holds, and nothing else. All processes wait here for each other."""
    sync_global_devices('about to clear')
    if jax.process_index() == 0:
        for name in ('config.json', 'best.json', 'log.csv', 'loss.png'):
            Path(out_dir, name).unlink(missing_ok=True)
        for name in ('checkpoints', 'base'):
            shutil.rmtree(Path(out_dir, name), ignore_errors=True)
    sync_global_devices('cleared')


# -----------------------------------------------------------------------------
# settings

# settings of the machine and of one command, which a resumed run takes from the command line
OF_THE_MACHINE = {'out_dir', 'init_from', 'eval_only', 'overwrite', 'device', 'mesh_data', 'mesh_tensor', 'fsdp',
                  'coordinator', 'num_processes', 'process_id', 'compile_cache', 'profile', 'debug_nans'}
# the model's arguments that may change when a run is resumed
MAY_CHANGE = {'dropout', 'dtype', 'kernels', 'remat', 'loss_chunks'}
# the model's arguments that pretrained weights decide
SHAPE = ('arch', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'rope_theta', 'bias', 'block_size')


def check_out_dir(out_dir, init_from, overwrite=False, eval_only=False):
    """Raises ValueError where out_dir holds a run that a new one would replace or would start from; ValueError or
    OSError where it can be no folder of this user's."""
    if not out_dir or '\0' in out_dir or out_dir != out_dir.encode(errors='ignore').decode():
        raise ValueError(f'out_dir = {out_dir!r}: it takes the path of a folder')
    folder = Path(out_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    for wrong, number in (not there.is_dir(), errno.ENOTDIR), (not os.access(there, os.W_OK), errno.EACCES):
        if wrong and not eval_only:
            raise OSError(number, os.strerror(number), out_dir)
    holds_run = os.path.exists(os.path.join(out_dir, 'config.json'))
    if holds_run and init_from != 'resume' and not (overwrite or eval_only):
        raise ValueError(f'{out_dir} holds a run: go on with it (--init_from=resume), replace it (--overwrite=True), '
                         'or name another --out_dir')
    if os.path.realpath(init_from) == os.path.realpath(out_dir):
        raise ValueError(f'init_from = {init_from!r} is out_dir, too: a run cannot replace the one that it starts from')


def check_not_nanogpts(path):
    """Raises ValueError where nanoGPT has left a checkpoint, or if `path` is one."""
    checkpoint = Path(path) if str(path).endswith('.pt') else Path(path, 'ckpt.pt')
    if checkpoint.exists():
        raise ValueError(f'{checkpoint} is a checkpoint of nanoGPT: where PyTorch is, run python data/from_nanogpt.py '
                         f'{checkpoint}')


def read_run(out_dir):
    """The config.json of a run. Raises ValueError if there is none, or if it is damaged."""
    path = Path(out_dir, 'config.json')
    if not path.exists():
        check_not_nanogpts(out_dir)
        raise ValueError(f'out_dir = {str(out_dir)!r} holds no run: there is nothing to resume or to read')
    saved = read_json(path)
    check_meta(saved, path)
    args = saved.get('model_args')
    if isinstance(args, dict):
        args.pop('flash', None)  # version 2 saved it, though the machine decides it
    types = {field.name: field.type for field in fields(GPTConfig)}
    if not isinstance(args, dict) or any(type(value) is not types.get(key) for key, value in args.items()):
        raise ValueError(f'{path} is damaged: its model_args are not those of a model')
    if not isinstance(saved.get('config'), dict):
        raise ValueError(f'{path} is damaged: it lacks the settings of the run')
    try:
        GPTConfig(**args)
    except (TypeError, ValueError) as e:
        raise ValueError(f'{path} is damaged: {e}') from None
    return saved


def resume_config(out_dir, config, given):
    """(config, saved): the settings with which a run goes on, and its config.json. They are the run's own, except for
    the keys that are `given` now. Raises ValueError if there is no run, or if the model would change."""
    saved = read_run(out_dir)
    for key, value in saved['config'].items():
        if key in config and type(value) is not type(config[key]):
            raise ValueError(f"{os.path.join(out_dir, 'config.json')} is damaged: {key} = {value!r}")
    kept = config.keys() - given - OF_THE_MACHINE
    config = config | {key: value for key, value in saved['config'].items() if key in kept}
    fixed = asdict(GPTConfig(**saved['model_args']))  # with defaults for what an older run did not know
    fixed['optimizer'] = saved['config'].get('optimizer', 'adamw')
    for key in sorted(given & fixed.keys() - MAY_CHANGE):
        if config[key] != fixed[key]:
            raise ValueError(f'{key} = {config[key]}: the run in {out_dir} has {key} = {fixed[key]}, which cannot '
                             'change')
    return config, saved


def adopt_shape(config, shape, typed, source):
    """The settings with the shape of a pretrained model, whose GPTConfig is the dict `shape`. block_size may be
    smaller. Raises ValueError where one of the options in `typed` asks for something else."""
    for key in SHAPE:
        crop = key == 'block_size' and config[key] < shape[key]  # a shorter context will do
        if key in typed and config[key] != shape[key] and not crop:
            raise ValueError(f'{key} = {config[key]}: {source} has {key} = {shape[key]}')
    block_size = min(config['block_size'], shape['block_size'])
    return config | {key: shape[key] for key in SHAPE} | {'block_size': block_size}


def save_config(out_dir, config, model_args, meta):
    versions = {name: version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')}
    run = {'config': config, 'model_args': model_args, **meta, 'versions': versions}
    write(os.path.join(out_dir, 'config.json'), json.dumps(run, indent=1))


def read_best(out_dir, steps):
    """The iteration that best.json names; None if there is no such file. Raises ValueError if it is damaged, or names a
    later checkpoint than all `steps` that are there: then files of the run are missing. Where it names an earlier one,
    going on with the latest loses nothing more."""
    path = Path(out_dir, 'best.json')
    if not path.exists():
        return None
    best = read_json(path).get('iter')
    if type(best) is not int:
        raise ValueError(f'{path} is damaged: it names no checkpoint. Without it, the latest checkpoint is used')
    if best not in steps and not list(path.parent.glob(f'damaged-{best}-*')):
        rest = f'checkpoint {max(steps)} is used' if steps else 'the run starts again from the beginning'
        if best > max(steps, default=-1):
            raise ValueError(f'{path} names checkpoint {best}, which is not there: copy the run again, whole. If it is '
                             f'lost, delete {path}: then {rest}')
        print(f'warning: {path} names checkpoint {best}, which is not there: {rest}', file=sys.stderr)
    return best


# -----------------------------------------------------------------------------
# checkpoints

NO_BEST = {'best_val_loss': 1e9, 'best_iter': None}  # of a run's progress, before there is a best checkpoint


class Checkpoints:
    """The checkpoints of a run: a state and a dict, `progress`, for some numbers of iterations. Threads write them
    while training goes on, and nobody sees one before it is whole. `best` is the checkpoint with the best loss, and
    `written_best` is what best.json says, which comes a bit later."""

    def __init__(self, out_dir, read_only=False):
        logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax logs what it raises, too
        self.out_dir, self.folder = out_dir, Path(out_dir, 'checkpoints').absolute()
        self.best = self.best_loss = self.written_best = None
        self.read_only = read_only
        self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=self, create=not read_only, cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=lambda: seal(self.folder))))

    def should_preserve(self, checkpoints, *, context):
        """Orbax asks which checkpoints stay: the latest two, and the best."""
        steps = [c.step for c in checkpoints]
        return [step in (*sorted(steps)[-2:], self.best, self.written_best) for step in steps]

    def save(self, n, state, progress):
        """Copies the state and leaves the writing to threads. Raises OSError if the disk is too full, and whatever went
        wrong with the save before."""
        is_saved = n in self.manager.all_steps()
        if not is_saved:
            self.wait()  # for the save before: Orbax would wait, too
        self.best, self.best_loss = progress['best_iter'], progress['best_val_loss']
        if is_saved:
            return
        state = {k: v for k, v in state.items() if k != 'base'}
        if shutil.disk_usage(self.folder).free < sum(x.nbytes for x in jax.tree.leaves(state)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # the rest is an item of its own, because sampling reads the parameters alone
        rest = {k: v for k, v in state.items() if k != 'params'}
        self.manager.save(n, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state['params']), rest=ocp.args.StandardSave(rest),
            progress=ocp.args.JsonSave(progress)))

    def wait(self):
        self.manager.wait_until_finished()
        self.note_best()

    def note_best(self):
        """Writes best.json once the checkpoint that it names is complete."""
        if self.read_only or self.best == self.written_best:
            return
        path = Path(self.out_dir, 'best.json')
        if self.best is None:
            path.unlink(missing_ok=True)
        elif (self.folder / str(self.best)).exists():
            write(path, json.dumps({'iter': self.best, 'val_loss': float(self.best_loss)}))
        else:
            return
        self.written_best = self.best

    def restore(self, abstract, dataset=''):
        """(state, progress) of the latest checkpoint, with the shardings of `abstract`; None if there is none yet. A
        damaged one is moved aside, and the one before it is taken. On another dataset the best loss starts anew. Raises
        ValueError if all are damaged, or the best is missing."""
        steps = sorted(self.manager.all_steps())
        self.written_best = read_best(self.out_dir, steps)
        if not steps:
            return None
        while steps and jax.process_index() == 0 and (name := damaged_file(self.folder / str(steps[-1]))):
            n = steps.pop()
            going_on = f', going on from {steps[-1]}' if steps else ''
            print(f'warning: checkpoint {n} is damaged ({name}){going_on}')
            if not self.read_only:
                (self.folder / str(n)).rename(self.folder.parent / f'damaged-{n}-{time.time():.0f}')
        latest = int(broadcast_one_to_all(np.int32(steps[-1] if steps else -1)))
        self.manager.reload()
        if latest < 0:
            raise ValueError(f'no checkpoint in {self.folder} can be read')
        rest = {k: v for k, v in abstract.items() if k not in ('params', 'base')}
        found = self.manager.restore(latest, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract['params']), rest=ocp.args.StandardRestore(rest),
            progress=ocp.args.JsonRestore()))
        progress = found['progress']
        best_dataset = progress.setdefault('best_dataset', dataset)  # version 1 did not note it
        if dataset and best_dataset != dataset:
            print(f'warning: the best validation loss was on dataset = {best_dataset!r}; it starts anew')
            progress |= NO_BEST | {'best_dataset': dataset}
        if progress['best_iter'] not in steps:  # somebody deleted it, or it was damaged
            progress |= NO_BEST
        self.best, self.best_loss = progress['best_iter'], progress['best_val_loss']
        base = load_base(self.folder.parent, abstract['base'])
        return {'params': found['params'], 'base': base, **found['rest']}, progress

    @contextlib.contextmanager
    def disk_errors(self):
        """Turns errors about a full disk, which come in many types, into a RunError that says what to do. A RunError
        waits for the save that is under way."""
        hook = sys.unraisablehook
        # Orbax's threads outlive its event loop after a failed write; silence what they print
        sys.unraisablehook = lambda e: 'Event loop is closed' in str(e.exc_value) or hook(e)
        try:
            yield
        except Exception as e:
            disk_is_full = 'No space left' in str(e) or 'Disk quota' in str(e)
            if disk_is_full or isinstance(e, RunError):
                with contextlib.suppress(Exception):
                    self.wait()
            if not disk_is_full:
                raise
            intact = ', '.join(map(str, sorted(ocp.utils.checkpoint_steps(self.folder)))) or 'none yet'
            raise RunError(f'no space left on the disk of {self.out_dir}; its earlier checkpoints are intact '
                           f'({intact}). Make room, then python train.py --init_from=resume '
                           f'--out_dir={self.out_dir}') from None


def file_sums(checkpoint):
    """SHA-256 of every file of a checkpoint's items, by name."""
    files = [path for path in sorted(checkpoint.glob('*/**/*')) if path.is_file()]
    digest = lambda path: hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()
    return {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}


def seal(checkpoints):
    """Writes the sums of checkpoints that have none: Orbax does not notice all damage, such as a flipped bit. Orbax
    calls this when a checkpoint's files are written and before the checkpoint gets its name."""
    if jax.process_index() > 0:
        return
    for folder in Path(checkpoints).iterdir():
        if folder.is_dir() and not (folder / 'sha256.json').exists():
            (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))


def damaged_file(checkpoint):
    """The name of a file that has changed since the checkpoint was sealed, or None."""
    try:
        sealed, found = read_json(checkpoint / 'sha256.json'), file_sums(checkpoint)
    except (ValueError, OSError):
        return 'sha256.json'
    return next((name for name in sealed if found.get(name) != sealed[name]), None) if sealed else 'sha256.json'


def save_base(out_dir, base):
    """Writes out_dir/base with its sums, in place of an earlier one."""
    folder = Path(out_dir, 'base').absolute()
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / 'params', base, force=True)
    if jax.process_index() == 0:
        (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))
    sync_global_devices('base')


def load_base(out_dir, abstract):
    """The parameters in out_dir/base with the shardings of `abstract`; {} for {}. Raises ValueError if damaged."""
    if not abstract:
        return {}
    folder = Path(out_dir, 'base').absolute()
    if name := damaged_file(folder):
        raise ValueError(f'{folder} is damaged ({name}), and the adapters are of no use without it')
    return ocp.StandardCheckpointer().restore(folder / 'params', abstract)


# -----------------------------------------------------------------------------
# models


def open_model(source, checkpoint='best'):
    """(config, meta, read) of a run directory, of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or of a folder in
    their format: the GPTConfig, a dict with vocab_size and tokenizer, and a function that reads the parameters.
    read(block_size, place) can take fewer positions, and place() gives abstract parameters their shardings. A folder
    needs a meta.json, such as a dataset has, if its tokenizer is not GPT-2's. Raises ValueError."""
    folder = Path(source)
    if source not in hf.GPT2:
        check_not_nanogpts(folder)
        if not (folder / 'config.json').is_file():
            raise ValueError(f"init_from = {str(source)!r}: there is no {folder / 'config.json'}, and it is none of "
                             f"{', '.join(hf.GPT2)}")
        if 'model_args' in read_json(folder / 'config.json'):
            return open_run(source, checkpoint)
    fields, tensors = hf.open_pretrained(source)
    config = GPTConfig(**fields)
    hf.check_tensors(tensors, abstract_params(config), fields, source)
    meta = read_json(folder / 'meta.json') if (folder / 'meta.json').exists() else GPT2_META
    if meta['vocab_size'] > config.vocab_size:
        raise ValueError(f'{source} has a vocabulary of {config.vocab_size}, which is not the {meta["vocab_size"]} of '
                         'its tokenizer: put a meta.json there, such as a dataset has, that names its own')

    def read(block_size=None, place=on_one_device):
        wanted = replace(config, block_size=block_size or config.block_size)
        return hf.read_params(tensors, place(abstract_params(wanted)), config.arch)

    return config, meta, read


def open_run(out_dir, checkpoint='best'):
    """open_model() for a run directory and its best or latest checkpoint. Adapters are merged into the weights. Raises
    ValueError if there is no checkpoint that can be read."""
    saved = read_run(out_dir)
    config = GPTConfig(**saved['model_args'])
    out_dir = Path(out_dir).absolute()
    checkpoints = out_dir / 'checkpoints'
    steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.exists() else []
    best = read_best(out_dir, steps) if checkpoint == 'best' else None
    if not steps:
        raise ValueError(f'{out_dir} holds no checkpoint yet')
    folder = checkpoints / str(best if best in steps else max(steps))
    if name := damaged_file(folder):
        raise ValueError(f'{folder} is damaged ({name}); there are checkpoints {steps}, and --checkpoint=best or '
                         '=latest')

    def read(block_size=None, place=on_one_device):
        abstract = place(abstract_params(config))
        trained, frozen = lora.split(abstract, config)
        params = ocp.StandardCheckpointer().restore(folder / 'params', trained)
        params = lora.join(params, load_base(out_dir, frozen))
        if not config.lora_rank and block_size in (None, config.block_size):
            return params

        def merge_and_crop(params):
            params = lora.merge(params, config)
            if 'wpe' in params:  # no rotary positions
                params = params | {'wpe': {'weight': params['wpe']['weight'][:block_size]}}
            return params

        result = place(jax.eval_shape(merge_and_crop, abstract))
        where = jax.tree.map(lambda x: x.sharding, result)
        return jax.jit(merge_and_crop, out_shardings=where)(params)

    return replace(config, lora_rank=0), saved, read


def load_model(source, checkpoint='best', **changes):
    """The model of anything that open_model() opens. `changes` go into its GPTConfig: dtype, dropout, or a smaller
    block_size. Raises ValueError."""
    config, _, read = open_model(source, checkpoint)
    config = choose_kernels(replace(config, **changes), jax.devices()[:1], flash=False)[0]
    return build(config, read(config.block_size))
