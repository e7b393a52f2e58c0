"""
Times the very train_step and generate that the scripts run, or compiles the step for chips that you don't have.

    python bench.py config/train_shakespeare_char.py config/laptop.py     # an iteration (--mode=train)
    python bench.py --batch_size=1 --gradient_accumulation_steps=1         # the same for GPT-2 (124M)
    python bench.py --mode=sample                                          # reading a prompt, and writing
    python bench.py --mode=data --dataset=shakespeare_char                 # the loader alone
    python bench.py --mode=compile --topology=v5e:2x4                      # will it fit there, what will it cost

Every key of train.py and its config files are understood, too.
"""
import json as json_module
import os
import sys
import time

_here = os.path.dirname(os.path.abspath(__file__))
# -----------------------------------------------------------------------------
_more_keys = 'train.py'  # configurator.py reads its keys, too
mode = 'train'  # 'train', 'sample', 'data' or 'compile'
json = False  # one line of JSON instead of a table
seconds = 10.0  # how long to measure each thing, once it is warm
vocab_size = 0  # 0: the dataset's if it is prepared, else GPT-2's
large_batch = 64  # sample: the batch beside 1
topology = ''  # compile: the chips, 'h100:8', 'v5e:2x4', 'v5p:4x4x4', ... Needs requirements-chips.txt
largest_batch = False  # compile: also find the largest batch_size that fits, by some more compilations
exec(open(os.path.join(_here, 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

check(mesh_data=(-1, 10**5), mesh_tensor=(1, 10**5), batch_size=(1, 10**6), gradient_accumulation_steps=(1, 10**6),
      seconds=(0, 10**5), vocab_size=(0, 2**24), large_batch=(1, 10**5), mode=('train', 'sample', 'data', 'compile'),
      kernels=('', 'plain'))

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import psutil

try:
    import resource
except ImportError:  # on Windows
    resource = None

from chips import CHIPS, COLLECTIVES, REACHED, add_up, open_topology, read_kernels
from dataset import dataset_name, load_batch, micro_batches, open_dataset, padded, train_starts
from devices import best_dtype, choose_kernels, find_devices, make_mesh, memory_errors, memory_use, peak_flops
from engine import generate
from model import GPTConfig, build, init_params
from optim import make_optimizer
from step import (Setup, abstract_state, batch_sharding, compile_step, estimate_mfu, flops_per_token, lower_step,
                  num_params, state_creator)


def dataset_or_none():
    try:
        return open_dataset(os.path.join(data_dir or os.path.join(_here, 'data'), dataset_name(dataset)), block_size)
    except ValueError:
        return None, None


def model_config(devices):
    """The GPTConfig of the keys, with the kernels for these devices."""
    names = {field.name for field in fields(GPTConfig)} & config.keys() - {'kernels'}
    vocab = vocab_size or (dataset_or_none()[1] or {}).get('vocab_size', 50257)
    args = {name: config[name] for name in names} | dict(
        vocab_size=padded(vocab), lora_rank=0, dtype=dtype or best_dtype(devices, kernels))
    with refuse(ValueError):
        return choose_kernels(GPTConfig(**args), devices, flash, kernels)[0]


def make_setup(devices):
    """The Setup of the keys on these devices, and the (G, B) of an iteration's sequences."""
    with refuse(ValueError):
        mesh = make_mesh(devices, mesh_data, mesh_tensor)
        shape = micro_batches(gradient_accumulation_steps * batch_size, batch_size, mesh.shape['data'])
        tx = make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer, embd_lr_scale)
    return Setup(model_config(devices), tx, mesh, fsdp), shape


def measure(*runs):
    """Seconds that each call takes, an array (len(runs), n). The calls alternate, because a shared machine changes its
    speed, for `seconds` and at least five times after two to warm up. What they return is waited for."""
    times = []
    begun = None
    while len(times) < 7 or time.perf_counter() - begun < seconds:
        begun = begun or time.perf_counter()
        times.append([])
        for run in runs:
            t = time.perf_counter()
            jax.block_until_ready(run())
            times[-1].append(time.perf_counter() - t)
    return np.array(times[2:]).T


def gemm_flops(dtype):
    """FLOP/s of a square matrix product, the best of some."""
    n = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / measure(lambda: product(a)).min()


def peak_memory(device):
    """Bytes of a GPU or a TPU; on a CPU, of the process."""
    peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
    if peak:
        return peak
    if not resource:
        memory = psutil.Process().memory_info()
        return getattr(memory, 'peak_wset', memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def train():
    """An iteration, from the loader's arrays to the updated state."""
    devices = find_devices(device)
    setup, shape = make_setup(devices)
    config = setup.config
    abstract = abstract_state(setup)
    t = time.perf_counter()
    step = compile_step(setup, abstract, shape)
    compile_s = time.perf_counter() - t
    state = state_creator(setup, 0, abstract)()
    text = np.random.default_rng(0).integers(config.vocab_size, size=10**6).astype(np.uint16)
    key = jax.random.key(0)
    steps = iter(range(10**12))
    metrics = None

    def run():
        nonlocal state, metrics
        starts = train_starts(text, shape, block_size, 0, next(steps))
        tokens = load_batch(text, starts, block_size, config.vocab_size, batch_sharding(setup.mesh))
        before = metrics
        state, metrics = step(state, tokens, 1e-4, key)
        return before  # as train.py, wait for the iteration before while the devices work on this one

    [times] = measure(run)
    n_params = num_params(abstract['params'])
    tokens = shape[0] * shape[1] * block_size
    low, median, high = np.quantile(times, (0.1, 0.5, 0.9))
    flops = flops_per_token(config, n_params) * tokens / median
    peak_gb = peak_memory(devices[0]) / 1e9  # before gemm_flops() needs memory, too
    return dict(parameters=n_params, devices=f'{len(devices)} x {devices[0].device_kind}', dtype=config.dtype,
                tokens_per_iteration=tokens, ms=1e3 * median, ms_10_percent=1e3 * low, ms_90_percent=1e3 * high,
                iterations=len(times), tokens_per_s=tokens / median, tflops=flops / 1e12, compile_s=compile_s,
                share_of_peak=estimate_mfu(config, n_params, 0, tokens / median, devices),
                share_of_gemm=flops / (gemm_flops(config.dtype) * len(devices)), peak_memory_gb=peak_gb)


def sample():
    """Reading half a context, and writing up to 60 tokens after it, at batch 1 and at a large one, greedily."""
    devices = find_devices(device)[:1]
    config = replace(model_config(devices), dropout=0.0)
    params = jax.jit(lambda: init_params(config, 0))()
    model = build(config, params)
    ones = jnp.ones(2**28, jnp.float32)  # 1 GB to read
    total = jax.jit(jnp.sum)
    n = max(block_size // 2, 1)
    new = min(60, block_size - n)
    rows = []
    for B in (1, large_batch):
        prompt = jnp.ones((B, n), jnp.int32)
        write = lambda n_tokens: generate(model, prompt, n_tokens, temperature=0.0, key=jax.random.key(0))
        runs = measure(lambda: total(ones), lambda: write(1), lambda: write(1 + new))
        read_s, first_s, all_s = np.median(runs, axis=1)
        decode_s = all_s - first_s
        speed = ones.nbytes / read_s
        needed = num_params(params) * jnp.dtype(config.activation_dtype).itemsize * new / decode_s
        rows.append(dict(batch=B, prefill_tokens_per_s=B * n / first_s, decode_tokens_per_s=B * new / decode_s,
                         ms_per_token=1e3 * decode_s / new, bandwidth_gb_per_s=speed / 1e9,
                         parameters_share_of_bandwidth=needed / speed))
    return dict(parameters=num_params(params), devices=f'1 x {devices[0].device_kind}', dtype=config.dtype, rows=rows)


def data():
    """Sequences of the training split a second, as arrays on the devices."""
    tokens, meta = dataset_or_none()
    if tokens is None:
        fail(f'dataset = {dataset!r} is not prepared')
    setup, shape = make_setup(find_devices(device))
    text = tokens['train']
    steps = iter(range(10**12))
    starts = lambda: train_starts(text, shape, block_size, 0, next(steps))
    [times] = measure(lambda: load_batch(text, starts(), block_size, meta['vocab_size'], batch_sharding(setup.mesh)))
    sequences_per_s = shape[0] * shape[1] / np.median(times)
    return dict(dataset=dataset, batch=shape, block_size=block_size, ms=1e3 * np.median(times),
                sequences_per_s=sequences_per_s, tokens_per_s=sequences_per_s * block_size)


def compile_for_chips():
    """Whether a step fits the chips of a topology, and what it costs there: their compiler says so, nothing runs."""
    with refuse(ValueError):
        devices = open_topology(topology)
    setup, shape = make_setup(devices)
    state = abstract_state(setup)
    chip = CHIPS[topology.partition(':')[0]]
    usable = chip.gib * (0.75 if chip.bandwidth else 1)  # JAX takes that of a GPU (XLA_PYTHON_CLIENT_MEM_FRACTION)

    def compile(batch):
        """(program, what it needs) for micro-batches of `batch` sequences a device."""
        print(f'compiling for {topology}, {batch} sequences a device: 10 s to 10 minutes', file=sys.stderr, flush=True)
        try:
            with memory_errors():
                program = lower_step(setup, state, (shape[0], batch * setup.mesh.shape['data'])).compile()
        except MemoryError as e:  # TPUs' compiler refuses; the CUDA one does not
            return None, dict(fits=False, reason=str(e))
        parts = {f'gib_{name}': size / 2**30 for name, size in memory_use(program).items()}
        gib = sum(parts.values())
        return program, dict(fits=gib <= usable, gib_there_are=usable, gib=gib, **parts)

    t = time.perf_counter()
    batch = shape[1] // setup.mesh.shape['data']
    program, needs = compile(batch)
    result = needs | dict(parameters=num_params(state['params']), mesh=dict(setup.mesh.shape),
                          dtype=setup.config.dtype, kernels=setup.config.kernels, micro_steps=shape[0],
                          sequences_a_device=batch, compile_s=time.perf_counter() - t)
    if largest_batch:
        low, high = (batch, 2 * batch) if needs['fits'] else (0, batch)
        while needs['fits'] and compile(high)[1]['fits']:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if compile(middle)[1]['fits'] else (low, middle)
        result['largest_batch'] = low
    if program is not None:
        with refuse(ValueError):
            found = read_kernels(program.as_text())
        peak = peak_flops(devices[:1]) / (2 if setup.config.dtype == 'float32' else 1)  # float32 runs as TF32
        kinds = add_up(found, chip, peak, lambda kernel: kernel.kind)
        result |= dict(predicted_from=f'{REACHED} of the peak' if chip.bandwidth else f'cycles at {chip.ghz} GHz',
                       computing_ms=sum(row['ms'] for row in kinds if row['what'] not in COLLECTIVES), kinds=kinds,
                       largest=add_up(found, chip, peak, lambda kernel: f'{kernel.kind} {kernel.what:.80}')[:10])
    return result


result = {'train': train, 'sample': sample, 'data': data, 'compile': compile_for_chips}[mode]()
if json:
    print(json_module.dumps(result))
else:
    for key, value in result.items():
        rows = value if isinstance(value, list) else [{f'{key:22}': value}]
        for row in rows:
            print('  '.join(f'{name} {x:<6,.4g}' if isinstance(x, float) else f'{name} {x}' for name, x in row.items()))
