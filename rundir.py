"""
What a run directory holds, and how it stays whole whatever happens to the process that writes it:

config.json    all config values, the model's arguments, the tokenizer, versions, the commit and the command
tokenizer.json a copy of the tokenizer, if it is a Hugging Face one
checkpoints/   N/ is the state after N iterations, written by Orbax: the latest two, the best, every keep_interval-th
best.json      which checkpoint has the best validation loss
base/          with LoRA, the frozen parameters, written once; the checkpoints hold only the adapters
hf/            of a model that came from Hugging Face: its config.json and the small files of its tokenizer
log.csv        a row for each logged iteration and each evaluation
loss.png       the same as a picture
lock           held by the process that trains

When many processes train together, all of them write the checkpoints. Process 0 writes the rest.
"""
import contextlib
import errno
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import filelock
import jax
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices

import hf
import lora
from checkpoints import check_arrays, damaged_file, find_step, load_base, reread, saved_steps, write
from dataset import GPT2_META, as_path, dataset_name, gpt2_vocabulary, hf_meta, in_cloud, read_json, read_meta, remove
from devices import choose_kernels
from model import GPTConfig, build, init_params
from step import on_one_device


def lock_out_dir(out_dir, wait=0):
    """Makes out_dir this process's own until the end of a `with` around what is returned. Raises ValueError if another
    process has it and does not end within `wait` seconds, OSError if it cannot be written."""
    if jax.process_index() > 0 or in_cloud(out_dir):  # there is no lock that would end with a process of any machine
        return contextlib.nullcontext()
    os.makedirs(out_dir, exist_ok=True)
    lock, advice = filelock.FileLock(os.path.abspath(Path(out_dir, 'lock')), is_singleton=True), ''
    for seconds in (0, wait):
        with contextlib.suppress(filelock.Timeout):
            try:
                return lock.acquire(timeout=seconds)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
            # Some file systems of clusters have no locks. There a file that names the process has to do: a process of
            # this machine sees whether that one is alive, but one of another machine cannot know, and asks the user.
            lock = filelock.SoftFileLock(f'{lock.lock_file}.pid', is_singleton=True)
            advice = f'. If there is none any more, on any machine, delete {lock.lock_file}'
            return lock.acquire(timeout=seconds)
        if seconds < wait:
            print(f'{out_dir} is in use by another training process: waiting up to {wait} s for its end', flush=True)
    raise ValueError(f'out_dir = {out_dir!r} is in use by another training process{advice}')


# what a run leaves in out_dir beside its config.json, which tells whose these are, and its lock
OF_A_RUN = ('best.json', 'log.csv', 'loss.png', 'checkpoints', 'base', 'tokenizer.json', 'hf')


def clear_run(out_dir):
    """Removes the run that out_dir holds, and nothing else: in checkpoints/ only what has a checkpoint's name, and of a
    symbolic link only the link. config.json goes last: while it is there, it tells whose the other files are. All
    processes wait here for each other."""
    sync_global_devices('about to clear')
    if jax.process_index() == 0:
        folder = as_path(out_dir)
        if (folder / 'checkpoints').exists():
            for path in (folder / 'checkpoints').iterdir():
                if re.match(r'\d+($|\.orbax-)', path.name):
                    remove(path)
        for name in (*OF_A_RUN, 'config.json'):
            if name != 'checkpoints':
                remove(folder / name)
    sync_global_devices('cleared')


# -----------------------------------------------------------------------------
# settings

# settings of the machine and of one command, which a resumed run takes from the command line
OF_THE_MACHINE = {'out_dir', 'init_from', 'checkpoint', 'eval_only', 'overwrite', 'max_minutes', 'device', 'mesh_data',
                  'mesh_tensor', 'fsdp', 'coordinator', 'num_processes', 'process_id', 'compile_cache', 'profile',
                  'debug_nans'}
# the model's arguments that may change when a run is resumed
MAY_CHANGE = {'dropout', 'dtype', 'kernels', 'remat', 'loss_chunks'}
# the model's arguments that pretrained weights decide
SHAPE = ('arch', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'n_kv_head', 'head_dim', 'norm_eps', 'tied', 'rope_theta',
         'rope_factor', 'rope_context', 'bias', 'block_size')


def check_out_dir(out_dir, init_from, overwrite=False, eval_only=False):
    """Raises ValueError where a new run would replace or start from the one in out_dir, or would write over files that
    may not be a run's; ValueError or OSError where out_dir can be no folder of this user's."""
    if out_dir[:1] in ('', '~') or '\0' in out_dir or out_dir != out_dir.encode(errors='ignore').decode():
        raise ValueError(f'out_dir = {out_dir!r}: it takes the path of a folder')
    folder = as_path(out_dir)
    there = Path('/') if in_cloud(out_dir) else next(x for x in (folder, *folder.parents) if os.path.lexists(x))
    for wrong, number in (not there.is_dir(), errno.ENOTDIR), (not os.access(there, os.W_OK), errno.EACCES):
        if wrong and not eval_only:
            raise OSError(number, os.strerror(number), out_dir)
    if (folder / 'log.csv').is_dir() and not eval_only:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), os.path.join(out_dir, 'log.csv'))
    exists = lambda path: os.path.lexists(path) or path.exists()
    names = 'config.json', *OF_A_RUN
    found = [name for name in names if exists(folder / name) and not is_empty_folder(folder / name)]
    if found and init_from != 'resume' and not eval_only:
        if not is_run(folder):
            raise ValueError(f'{out_dir} holds {", ".join(found)}, and no config.json of a run that this could belong '
                             'to. A new run would write over it: move it away, or name another --out_dir')
        if not overwrite:
            raise ValueError(f'{out_dir} holds a run: go on with it (--init_from=resume), replace it '
                             '(--overwrite=True), or name another --out_dir')
    is_path = init_from not in ('scratch', 'resume') and not hf.is_name(init_from)
    if is_path and os.path.realpath(init_from) == os.path.realpath(out_dir):
        raise ValueError(f'init_from = {init_from!r} is out_dir, too: a run cannot replace the one that it starts from')


def is_empty_folder(path):
    return path.is_dir() and not any(path.iterdir())


def is_run(folder):
    """Whether a folder has the config.json of a run."""
    try:
        return {'config', 'model_args'} <= read_json(folder / 'config.json').keys()
    except (ValueError, FileNotFoundError):
        return False


def check_not_nanogpts(path):
    """Raises ValueError where nanoGPT has left a checkpoint, or if `path` is one."""
    checkpoint = as_path(path) if str(path).endswith('.pt') else as_path(path) / 'ckpt.pt'
    if checkpoint.exists():
        raise ValueError(f'{checkpoint} is a checkpoint of nanoGPT: where PyTorch is, run python data/from_nanogpt.py '
                         f'{checkpoint}')


def is_finite(value):
    """Whether this is no NaN and no infinity, which JSON in Python may hold."""
    return type(value) is not float or math.isfinite(value)


def read_run(out_dir):
    """The config.json of a run. Raises ValueError if there is none, or if it is damaged."""
    path = as_path(out_dir) / 'config.json'
    if not path.exists():
        check_not_nanogpts(out_dir)
        raise ValueError(f'out_dir = {str(out_dir)!r} holds no run: there is nothing to resume or to read')
    saved = read_meta(path)
    args = saved.get('model_args')
    if isinstance(args, dict):
        args.pop('flash', None)  # version 2 saved it, though the machine decides it
    types = {field.name: field.type for field in fields(GPTConfig)}
    if not isinstance(args, dict) or not isinstance(saved.get('config'), dict):
        raise ValueError(f'{path} is damaged: it lacks the settings of the run')
    for key, value in args.items():
        if key not in types:
            raise ValueError(f'{path} has {key} = {value!r}, which GPTConfig in model.py does not know: the run was '
                             'made with another model.py')
        if type(value) is not types[key] or not is_finite(value):
            raise ValueError(f'{path} is damaged: {key} = {value!r}')
    try:
        vocab_size = GPTConfig(**args).vocab_size
    except (TypeError, ValueError) as e:
        raise ValueError(f'{path} is damaged: {e}') from None
    if vocab_size < saved['vocab_size']:
        raise ValueError(f'{path} is damaged: its model has fewer tokens than its tokenizer')
    return saved


def run_settings(config, given, typed, replaced):
    """(config, saved): the settings of a run, and the config.json of the run with which it goes on, or None. With
    init_from = 'auto' it goes on if out_dir holds a run, and else starts as init_from was before, as in a recipe.
    Raises ValueError or OSError for what can be refused before anything is computed."""
    out_dir, checkpoint, auto = config['out_dir'], config['checkpoint'], config['init_from'] == 'auto'
    if config['profile'] and in_cloud(out_dir):
        raise ValueError(f'profile = True: a trace cannot be written to {out_dir}: name a folder of this machine as '
                         '--out_dir')
    if auto:
        if config['overwrite']:
            raise ValueError("init_from = 'auto' goes on with a run, overwrite = True replaces it: leave one out")
        there = (as_path(out_dir) / 'config.json').exists()
        config = config | {'init_from': 'resume' if there else replaced.get('init_from', 'scratch')}
    check_out_dir(out_dir, config['init_from'], config['overwrite'], config['eval_only'])
    resumes = config['init_from'] == 'resume'
    if checkpoint != 'latest':
        if auto or not resumes:
            raise ValueError(f'checkpoint = {checkpoint!r}: only --init_from=resume goes back to a checkpoint')
        find_step(out_dir, checkpoint)
    saved = None
    if resumes:
        config, saved = resume_config(out_dir, config, given, typed)
    return config | {'dataset': dataset_name(config['dataset'])}, saved


def resume_config(out_dir, config, given, typed):
    """(config, saved): the settings with which a run goes on, and its config.json. They are the run's own, except for
    the keys that are `given` now, of which some were `typed`. Raises ValueError if there is no run, or if the model
    would change."""
    saved = read_run(out_dir)
    if saved['config'].get('init_from', 'scratch') != 'scratch':  # a recipe gives way to the weights, as at the start
        given = given - set(SHAPE) | typed
    for key, value in saved['config'].items():
        if key in config and (type(value) is not type(config[key]) or not is_finite(value)):
            raise ValueError(f"{os.path.join(out_dir, 'config.json')} is damaged: {key} = {value!r}")
    kept = config.keys() - given - OF_THE_MACHINE
    config = config | {key: value for key, value in saved['config'].items() if key in kept}
    fixed = asdict(GPTConfig(**saved['model_args']))  # with defaults for what an older run did not know
    fixed['optimizer'] = saved['config'].get('optimizer', 'adamw')
    for key in sorted(given & fixed.keys() - MAY_CHANGE):
        if config[key] != fixed[key]:
            raise ValueError(f'{key} = {config[key]}: the run in {out_dir} has {key} = {fixed[key]}, which cannot '
                             'change')
    return config | {key: fixed[key] for key in config.keys() & fixed.keys() - MAY_CHANGE}, saved


def adopt_shape(config, pretrained, typed, source):
    """The settings with the shape of a pretrained model, a GPTConfig. block_size may be another one. Raises ValueError
    where one of the options in `typed` asks for something else."""
    shape = {key: getattr(pretrained, key) for key in SHAPE}
    for key in sorted(typed & shape.keys() - {'block_size'}):
        if config[key] != shape[key]:
            raise ValueError(f'{key} = {config[key]}: {source} has {key} = {shape[key]}')
    block_size = config['block_size']
    if 'block_size' in typed:
        check_context(block_size, pretrained, source)
    else:  # a recipe gives way
        block_size = min(block_size, pretrained.block_size)
    return config | shape | {'block_size': block_size}


def check_context(block_size, pretrained, source):
    """Warns where a pretrained model gets a longer context than it came with. Raises ValueError if it cannot have it:
    learned positions come to an end, rotary ones do not."""
    if block_size > pretrained.block_size:
        if pretrained.row['positions'] == 'learned':
            raise ValueError(f'block_size = {block_size}: {source} has block_size = {pretrained.block_size}')
        print(f'warning: block_size = {block_size}: {source} came with {pretrained.block_size}, and never saw what is '
              'further apart', file=sys.stderr)


def commit():
    """The commit of this code, with a + where files have changed since; '' where git does not know."""
    git = 'git', '-C', str(Path(__file__).parent), 'describe', '--always', '--exclude=*', '--abbrev=40', '--dirty=+'
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    return ''


def save_config(out_dir, config, model_args, meta):
    versions = {name: version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')}
    run = {'config': config, 'model_args': model_args, **meta, 'versions': versions, 'commit': commit(),
           'command': shlex.join(sys.argv)}
    if meta['tokenizer']['kind'] == 'hf':  # a run has a copy, and is complete in itself
        write(os.path.join(out_dir, 'tokenizer.json'), as_path(meta['tokenizer']['file']).read_bytes())
        run['tokenizer'] = meta['tokenizer'] | {'file': 'tokenizer.json'}
    write(os.path.join(out_dir, 'config.json'), json.dumps(run, indent=1))


def keep_small_files(out_dir, folder):
    """Copies what a model's folder has beside its weights and tokenizer.json to out_dir/hf."""
    for name in hf.SMALL_FILES:
        if (as_path(folder) / name).is_file():
            (as_path(out_dir) / 'hf').mkdir(exist_ok=True)
            write(os.path.join(out_dir, 'hf', name), (as_path(folder) / name).read_bytes())


# -----------------------------------------------------------------------------
# models


def read_tokenizer(folder, config):
    """The vocab_size and the tokenizer of a model's folder: its meta.json's, its tokenizer.json's, or GPT-2's, if the
    model can be a GPT-2. Raises ValueError where it has another one, which we do not read."""
    if (folder / 'meta.json').is_file():
        return read_meta(folder / 'meta.json')
    if (folder / 'tokenizer.json').is_file():
        return hf_meta(folder)
    names = 'vocab.json', 'tokenizer.model', '*.tiktoken', 'vocab.txt'
    others = [file for name in names for file in folder.glob(name)]
    is_gpt2 = [file.name for file in others] == ['vocab.json'] and read_json(others[0]) == gpt2_vocabulary()[0]
    if is_gpt2 or not others and config.arch == 'gpt2' and 0 <= config.vocab_size - GPT2_META['vocab_size'] < 64:
        return GPT2_META
    raise ValueError(f'{folder} has no tokenizer.json; where transformers is, make one: python -c "from transformers '
                     f'import *; AutoTokenizer.from_pretrained(\'{folder}\').save_pretrained(\'{folder}\')"')


def abstract_params(config):
    """The shapes of a model's parameters, without computing any."""
    return jax.eval_shape(partial(init_params, config, 0))


def open_model(source, checkpoint='best'):
    """(config, meta, read) of a run directory, of a model of the hub, such as 'gpt2' or 'Qwen/Qwen3-0.6B', or of a
    folder in their format: the GPTConfig, a dict with vocab_size, tokenizer and the folder of the model's small files,
    and a function that reads the parameters. read(block_size, place, dtype) can take fewer positions, and matrices in
    another type than float32; place() gives abstract parameters their shardings. Raises ValueError."""
    folder = hf.download(source) if hf.is_name(source) else as_path(source)
    check_not_nanogpts(folder)
    if not (folder / 'config.json').is_file():
        why = f"and it is none of {', '.join(hf.GPT2)} and no name such as Qwen/Qwen3-0.6B"
        if (folder / 'adapter_config.json').exists():
            why = 'only adapters of PEFT: save what its merge_and_unload() returns'
        raise ValueError(f"init_from = {str(source)!r}: there is no {folder / 'config.json'}, {why}")
    if 'model_args' in read_json(folder / 'config.json'):
        return open_run(source, checkpoint)
    fields, tensors = hf.open_pretrained(folder)
    try:
        config = GPTConfig(**fields)
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from None
    hf.check_tensors(tensors, abstract_params(config), fields, source)
    meta = GPT2_META if source in hf.GPT2 else read_tokenizer(folder, config)
    if meta['vocab_size'] > config.vocab_size:
        raise ValueError(f'{source} has a vocabulary of {config.vocab_size}, which is not the {meta["vocab_size"]} of '
                         'its tokenizer: put a meta.json there, such as a dataset has, that names its own')

    def read(block_size=None, place=on_one_device, dtype='float32'):
        wanted = abstract_params(replace(config, block_size=block_size or config.block_size))
        wanted = jax.eval_shape(partial(lora.held_in, dtype=dtype), wanted)
        return hf.read_params(tensors, place(wanted), config.arch)

    return config, meta | {'folder': str(folder), 'base_dtype': hf.dtype_of(tensors)}, read


def open_run(out_dir, checkpoint='best'):
    """open_model() for a run directory and its checkpoint 'best', 'latest', or with this number. Adapters are merged
    into the weights. Raises ValueError if there is no checkpoint that can be read."""
    saved = read_run(out_dir)
    config = GPTConfig(**saved['model_args'])
    out_dir = as_path(out_dir)

    def find():
        folder = out_dir / f'checkpoints/{find_step(out_dir, str(checkpoint))}'
        if name := damaged_file(folder):
            steps = ', '.join(map(str, saved_steps(out_dir)))
            raise ValueError(f'{folder} is damaged ({name}); there are the checkpoints {steps}: --checkpoint=N takes '
                             'one')
        return folder

    found = reread(out_dir, find)

    def read(block_size=None, place=on_one_device, dtype='float32'):
        trained, frozen = lora.split(abstract_params(config), config)
        frozen = jax.eval_shape(partial(lora.held_in, dtype=saved.get('base_dtype', 'float32')), frozen)
        trained, frozen = place(trained), place(frozen)

        def read_params():
            folder = found if found.exists() else find()  # a run that still trains may have removed it
            check_arrays(folder / 'params', trained)
            return ocp.StandardCheckpointer().restore(folder / 'params', trained)

        params = lora.join(reread(out_dir, read_params), load_base(out_dir, frozen))
        if not config.lora_rank and block_size in (None, config.block_size):
            return params

        def merge_and_crop(params):
            params = lora.merge(params, config)
            if 'wpe' in params:  # no rotary positions
                params = params | {'wpe': {'weight': params['wpe']['weight'][:block_size]}}
            return params

        result = place(jax.eval_shape(merge_and_crop, lora.join(trained, frozen)))
        where = jax.tree.map(lambda x: x.sharding, result)
        return jax.jit(merge_and_crop, out_shardings=where)(params)

    return replace(config, lora_rank=0), saved | {'folder': str(out_dir / 'hf'), 'base_dtype': 'float32'}, read


def load_model(source, checkpoint='best', **changes):
    """The model of anything that open_model() opens. `changes` go into its GPTConfig: dtype, dropout, or another
    block_size. Raises ValueError."""
    pretrained, _, read = open_model(source, checkpoint)
    config = choose_kernels(replace(pretrained, **changes), jax.devices()[:1], flash=False)[0]
    check_context(config.block_size, pretrained, source)
    return build(config, read(config.block_size))
