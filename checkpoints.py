"""
The checkpoints of a run: written while training goes on, sealed with their sums, and restored on any mesh.
"""
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices

from dataset import as_path, in_cloud, read_json, remove


# Orbax logs what it raises, too, and its threads outlive its event loop after a failed read or write
for name in 'absl', 'asyncio':
    logging.getLogger(name).setLevel(logging.CRITICAL)
sys.unraisablehook = lambda e, hook=sys.unraisablehook: (
    any(text in str(e.exc_value) for text in ('Event loop is closed', 'TensorStore')) or hook(e))


class RunError(Exception):
    """Why a run cannot go on, and what its user can do about it."""


def write(path, content):
    """Replaces a file whole, or not at all, by a text or by bytes."""
    if jax.process_index() > 0:
        return
    content = content.encode() if isinstance(content, str) else content
    if in_cloud(path):  # there, a file is always replaced whole
        as_path(path).write_bytes(content)
        return
    new = Path(f'{path}.tmp')
    new.unlink(missing_ok=True)
    with open(new, 'xb') as f:  # `w` would go through a symbolic link, and write over another file
        f.write(content)
    os.replace(new, path)


def saved_steps(out_dir):
    """The numbers of iterations after which a run has saved a checkpoint, in order."""
    folder = as_path(out_dir) / 'checkpoints'
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    return sorted(n for n in steps if (folder / str(n)).exists())  # Orbax takes a copy_of_5 for a checkpoint, too


def reread(out_dir, read):
    """read(), and again each time that it fails because a run that still trains has gone on to other checkpoints."""
    def state():
        best = as_path(out_dir) / 'best.json'
        return saved_steps(out_dir), list(os.walk(best.parent / 'checkpoints')), best.exists() and best.read_bytes()

    while True:
        before = state()
        try:
            return read()
        except Exception:
            time.sleep(0.1)  # to remove a checkpoint takes some time
            if state() == before or jax.process_count() > 1:  # many processes must all do the same
                raise


def find_step(out_dir, checkpoint):
    """The number of iterations of a run's checkpoint 'latest' or 'best', or of the one whose number this is, as text.
    Raises ValueError if there is none."""
    steps = saved_steps(out_dir)
    best = read_best(out_dir, steps) if checkpoint == 'best' else None
    if not steps:
        raise ValueError(f'{out_dir} holds no checkpoint yet')
    if checkpoint in ('latest', 'best'):
        return best if best in steps else steps[-1]
    if checkpoint not in map(str, steps):
        raise ValueError(f"checkpoint = {checkpoint!r}: must be latest, best, or one of {', '.join(map(str, steps))}")
    return int(checkpoint)


def is_finished(out_dir, checkpoint, max_iters):
    """Whether a run that goes on from this checkpoint has nothing left to do."""
    if not saved_steps(out_dir):
        return False
    step = find_step(out_dir, checkpoint)
    return step > max_iters and not damaged_file(as_path(out_dir) / f'checkpoints/{step}')


def read_best(out_dir, steps):
    """The iteration that best.json names; None if there is no such file. Raises ValueError if it is damaged, or names a
    later checkpoint than all `steps` that are there: then files of the run are missing. Where it names an earlier one,
    going on with the latest loses nothing more."""
    path = as_path(out_dir) / 'best.json'
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


NO_BEST = {'best_val_loss': 1e9, 'best_iter': None}  # of a run's progress, before there is a best checkpoint


class Checkpoints:
    """The checkpoints of a run: a state and a dict, `progress`, for some numbers of iterations. Threads write them
    while training goes on, and nobody sees one before it is whole. `best` is the checkpoint with the best loss, and
    `written_best` is what best.json says, which comes a bit later. `kept` are those that stay for good: the multiples
    of keep_interval."""

    def __init__(self, out_dir, keep_interval=0, read_only=False):
        self.out_dir, self.folder = out_dir, as_path(out_dir) / 'checkpoints'
        self.best = self.best_loss = self.written_best = None
        self.kept, self.keep_interval = set(), keep_interval
        self.read_only = read_only
        self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=self, create=not read_only, cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=lambda: seal(self.folder))))
        self.place = None
        if os.name == 'posix' and not (read_only or in_cloud(self.folder)):
            self.place = os.open(self.folder, os.O_RDONLY)  # while it is open, no network file system renumbers it

    def check_place(self):
        """Raises RunError where out_dir was moved or removed while the run trains. Orbax would make the folders again,
        perhaps in a run that has begun there since, and nobody would look for a checkpoint there."""
        if self.place is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.place), os.stat(self.folder)):
                return
        raise RunError(f'{self.folder} is gone: it was moved or removed while the run trained, or its disk was. To go '
                       'on, put it back or give its new place as --out_dir, with --init_from=resume')

    def should_preserve(self, checkpoints, *, context):
        """Orbax asks which checkpoints stay: the latest two, the best, and the kept ones."""
        steps = [c.step for c in checkpoints]
        return [step in {*sorted(steps)[-2:], self.best, self.written_best, *self.kept} for step in steps]

    def save(self, n, state, progress):
        """Copies the state and leaves the writing to threads. Raises OSError if the disk is too full, RunError if
        out_dir is elsewhere, and whatever went wrong with the save before."""
        self.check_place()
        is_saved = n in self.manager.all_steps()
        if not is_saved:
            self.wait()  # for the save before: Orbax would wait, too
        self.best, self.best_loss = progress['best_iter'], progress['best_val_loss']
        if is_saved:
            return
        state = {k: v for k, v in state.items() if k != 'base'}
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        if not in_cloud(self.folder) and shutil.disk_usage(self.folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # the rest is an item of its own, because sampling reads the parameters alone
        rest = {k: v for k, v in state.items() if k != 'params'}
        if self.keep_interval and n > 0 and n % self.keep_interval == 0:
            self.kept.add(n)
        self.manager.save(n, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state['params']), rest=ocp.args.StandardSave(rest),
            progress=ocp.args.JsonSave(progress | {'kept': sorted(self.kept)})))

    def wait(self):
        self.manager.wait_until_finished()
        self.note_best()

    def note_best(self):
        """Writes best.json once the checkpoint that it names is complete."""
        if self.read_only or self.best == self.written_best:
            return
        self.check_place()
        path = as_path(self.out_dir) / 'best.json'
        if self.best is None:
            path.unlink(missing_ok=True)
        elif ocp.utils.is_checkpoint_finalized(self.folder / str(self.best)):
            write(path, json.dumps({'iter': self.best, 'val_loss': float(self.best_loss)}))
        else:
            return
        self.written_best = self.best

    def restore(self, abstract, dataset='', checkpoint='latest'):
        """(state, progress) of a checkpoint, with the shardings of `abstract`; None if there is none yet. A damaged one
        is moved aside, and the one before it is taken; later ones are moved aside, too. On another dataset the best
        loss starts anew. Raises ValueError if all are damaged, if the best is missing, or if the code has changed."""
        read = partial(self.read, abstract, dataset, checkpoint)
        return reread(self.out_dir, read) if self.read_only else read()

    def read(self, abstract, dataset, checkpoint):
        steps = saved_steps(self.out_dir)
        self.written_best = read_best(self.out_dir, steps)
        if not steps:
            return None
        first = find_step(self.out_dir, checkpoint)
        later = [n for n in steps if n > first]
        steps = [n for n in steps if n <= first]
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
        progress = read_progress(self.folder / str(latest), dataset)
        rest = {k: v for k, v in abstract.items() if k not in ('params', 'base')}
        for name, item in ('params', abstract['params']), ('rest', rest):
            check_arrays(self.folder / str(latest) / name, item)
        base = load_base(self.folder.parent, abstract['base'])
        found = self.manager.restore(latest, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract['params']), rest=ocp.args.StandardRestore(rest)))
        if later and not self.read_only:
            if jax.process_index() == 0:
                set_aside(self.folder.parent, steps[-1], later, self.written_best)
            sync_global_devices('set aside')
            self.manager.reload()
        self.written_best = None if self.written_best in later else self.written_best
        if dataset and progress['best_dataset'] != dataset:
            print(f"warning: the best validation loss was on dataset = {progress['best_dataset']!r}; it starts anew")
            progress |= NO_BEST | {'best_dataset': dataset}
        if progress['best_iter'] not in steps:  # somebody deleted it, or it was damaged
            progress |= NO_BEST
        self.best, self.best_loss = progress['best_iter'], progress['best_val_loss']
        self.kept = set(progress['kept'])
        return {'params': found['params'], 'base': base, **found['rest']}, progress

    @contextlib.contextmanager
    def disk_errors(self):
        """Turns errors of the disk, which come in many types, into a RunError that says what to do. A RunError waits
        for the save that is under way."""
        try:
            yield
        except Exception as e:
            reason = disk_error(e)
            if reason or isinstance(e, RunError):
                with contextlib.suppress(Exception):
                    self.wait()
            if isinstance(e, RunError):
                raise
            self.check_place()  # Orbax raises errors of any type where a folder has vanished
            if not reason:
                raise
            try:
                saved = ', '.join(map(str, saved_steps(self.out_dir))) or 'none yet'
            except OSError:
                saved = 'they cannot be listed now'
            raise RunError(f'{reason} on the disk of {self.out_dir}; its earlier checkpoints are intact ({saved}). '
                           f'{"Make room" if "space" in reason else "Mend that"}, then python train.py '
                           f'--init_from=resume --out_dir={self.out_dir}') from None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EPERM)


def disk_error(error):
    """What an error says about a disk; '' if it is another one. Orbax's libraries raise errors of other types than
    OSError with the system's words in them."""
    for number in (*FULL, *BROKEN):
        if os.strerror(number) in str(error):
            return f'no space left ({os.strerror(number)})' if number in FULL else os.strerror(number)
    return str(error.strerror or error) if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) else ''


def set_aside(out_dir, step, later, best):
    """Makes a run of its own, in a folder in out_dir, of the checkpoints that are `later` than a step. Whenever this is
    interrupted, out_dir still holds a run."""
    aside = out_dir / f'later-than-{step}-{time.time():.0f}'
    (aside / 'checkpoints').mkdir(parents=True)
    (aside / 'checkpoints/.keep').write_text('')  # in the cloud, a folder is what has a file in it
    for name in ('config.json', 'log.csv', 'tokenizer.json', 'base', 'hf'):
        copy(out_dir / name, aside / name)
    if best in later:
        (out_dir / 'best.json').rename(aside / 'best.json')
    for n in reversed(later):
        (out_dir / f'checkpoints/{n}').rename(aside / f'checkpoints/{n}')
    print(f'later checkpoints ({", ".join(map(str, later))}) are now a run of their own: {aside}')


def copy(source, target):
    """Copies a file, or a folder with all that it holds, if it is there."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            copy(path, target / path.name)
    elif source.exists():
        target.write_bytes(source.read_bytes())


def read_progress(checkpoint, dataset=''):
    """The progress of a run in one of its checkpoints: known keys, with values of known types. Raises ValueError."""
    path = checkpoint / 'progress/metadata'  # Orbax's name for the JSON
    progress = {'best_dataset': dataset, 'kept': [], 'tokens_seen': None} | read_json(path)  # older runs lack these
    is_good = {'iter_num': lambda x: type(x) is int and x == int(checkpoint.name),
               'wandb_id': lambda x: x is None or type(x) is str,
               'best_val_loss': lambda x: type(x) is float and math.isfinite(x),
               'best_iter': lambda x: x is None or type(x) is int,
               'best_dataset': lambda x: type(x) is str,
               'kept': lambda x: type(x) is list and all(type(n) is int for n in x),
               'tokens_seen': lambda x: x is None or type(x) is int and x >= 0}
    for key, good in is_good.items():
        if not good(progress.get(key, ...)):
            raise ValueError(f'{path} is damaged: {key} = {progress.get(key)!r}')
    return {key: progress[key] for key in is_good}


def file_sums(checkpoint):
    """SHA-256 of every file of a checkpoint's items, by name."""
    files = [path for path in sorted(checkpoint.glob('*/**/*')) if path.is_file()]
    digest = lambda path: hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()
    return {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}


def seal(checkpoints):
    """Writes the sums of checkpoints that have none: Orbax does not notice all damage, such as a flipped bit. Orbax
    calls this when a checkpoint's files are written and before the checkpoint gets its name."""
    if jax.process_index() > 0 or in_cloud(checkpoints):  # the cloud has sums of its own
        return
    for folder in checkpoints.iterdir():
        if folder.is_dir() and not (folder / 'sha256.json').exists():
            (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))


def damaged_file(checkpoint):
    """The name of a file that has changed since the checkpoint was sealed, or None. Raises FileNotFoundError where a
    run that still trains removes the checkpoint meanwhile."""
    if in_cloud(checkpoint):
        return None
    try:
        sealed, found = read_json(checkpoint / 'sha256.json'), file_sums(checkpoint)
        name = next((name for name in sealed if found.get(name) != sealed[name]), None) if sealed else 'sha256.json'
    except (ValueError, OSError):
        name = 'sha256.json'
    if name and not checkpoint.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(checkpoint))
    return name


def check_arrays(item, abstract):
    """Raises ValueError where an item of a checkpoint has not the names and shapes of the arrays in `abstract`, as when
    model.py was edited since."""
    shapes = [{jax.tree_util.keystr(path, simple=True, separator='.'): x.shape
               for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
              for tree in (ocp.PyTreeCheckpointer().metadata(item).item_metadata.tree, abstract)]
    saved, wanted = shapes
    unlike = [f'{name} is {saved[name]} there and {wanted[name]} in the code'
              for name in sorted(saved.keys() & wanted.keys()) if saved[name] != wanted[name]]
    unlike += [f'{name} is only there' for name in sorted(saved.keys() - wanted.keys())]
    unlike += [f'{name} is only in the code' for name in sorted(wanted.keys() - saved.keys())]
    if unlike:
        more = f', and {len(unlike) - 4} more' if len(unlike) > 4 else ''
        raise ValueError(f'{item} was saved by other code: {", ".join(unlike[:4])}{more}')


def save_base(out_dir, base):
    """Writes out_dir/base with its sums, in place of an earlier one."""
    folder = as_path(out_dir) / 'base'
    if jax.process_index() == 0:
        remove(folder)  # a link may lead to the base of another run
    sync_global_devices('no base')
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / 'params', base)
    if jax.process_index() == 0 and not in_cloud(folder):
        (folder / 'sha256.json').write_text(json.dumps(file_sums(folder)))
    sync_global_devices('base')


def load_base(out_dir, abstract):
    """The parameters in out_dir/base with the shardings of `abstract`; {} for {}. Raises ValueError if damaged."""
    if not abstract:
        return {}
    folder = as_path(out_dir) / 'base'
    if name := damaged_file(folder):
        raise ValueError(f'{folder} is damaged ({name}), and the adapters are of no use without it')
    check_arrays(folder / 'params', abstract)
    return ocp.StandardCheckpointer().restore(folder / 'params', abstract)
