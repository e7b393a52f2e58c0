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
# compile: needs requirements-chips.txt
topology = ''  # the chips: 'h100:8', 'v5e:2x4', 'v5p:4x4x4', ...
largest_batch = False  # also find the largest batch_size that fits: some more compilations
exec(open(os.path.join(_here, 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

check(mesh_data=(-1, 10**5), mesh_tensor=(1, 10**5), batch_size=(1, 10**6), gradient_accumulation_steps=(1, 10**6),
      seconds=(0, 10**5), vocab_size=(0, 2**24), large_batch=(1, 10**5), mode=('train', 'sample', 'data', 'compile'),
      kernels=('', 'plain'))

import tempfile
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import psutil

try:
    import resource
except ImportError:  # on Windows
    resource = None

from chips import CHIPS, COLLECTIVES, REACHED, Module, UnknownText, add_up, open_topology
from dataset import dataset_name, load_batch, micro_batches, open_dataset, padded, train_starts
from devices import best_dtype, choose_kernels, find_devices, make_mesh, memory_errors, memory_use, peak_flops
from engine import generate
from model import GPTConfig, build, flops_per_token, init_params, num_params
from optim import make_optimizer
from step import Setup, abstract_state, batch_sharding, compile_step, estimate_mfu, lower_step, state_creator


def dataset_or_none():
    try:
        return open_dataset(os.path.join(_here, 'data', dataset_name(dataset)), block_size)
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


def mesh_and_shape(devices, data, tensor):
    """The mesh, and the (G, B) of an iteration's sequences on it."""
    with refuse(ValueError):
        mesh = make_mesh(devices, data, tensor)
        n = gradient_accumulation_steps * batch_size
        return mesh, micro_batches(n, batch_size, mesh.shape['data'])


def make_setup(devices):
    """The Setup of the keys on these devices, and the (G, B) of an iteration's sequences."""
    mesh, shape = mesh_and_shape(devices, mesh_data, mesh_tensor)
    with refuse(ValueError):
        tx = make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer)
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
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def train():
    """An iteration, from the loader's arrays to the updated state."""
    devices = find_devices(device)
    setup, shape = make_setup(devices)
    config = setup.config
    abstract = abstract_state(setup)
    compile_times = []
    folder = tempfile.TemporaryDirectory()  # a compilation cache of its own: at first it is empty
    jax.config.update('jax_compilation_cache_dir', folder.name)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    for _ in range(2):
        jax.clear_caches()
        t = time.perf_counter()
        step = compile_step(setup, abstract, shape)
        compile_times.append(time.perf_counter() - t)
    state = state_creator(setup, 0, abstract)()
    text = np.random.default_rng(0).integers(config.vocab_size, size=10**6).astype(np.uint16)
    key = jax.random.key(0)
    n = 0
    metrics = None

    def run():
        nonlocal state, n, metrics
        starts = train_starts(text, shape, block_size, 0, n)
        tokens = load_batch(text, starts, block_size, config.vocab_size, batch_sharding(setup.mesh))
        before = metrics
        state, metrics = step(state, tokens, 1e-4, key)
        n += 1
        return before  # as train.py, wait for the iteration before while the devices work on this one

    [times] = measure(run)
    n_params = num_params(abstract['params'])
    tokens = shape[0] * shape[1] * block_size
    low, median, high = np.quantile(times, (0.1, 0.5, 0.9))
    flops = flops_per_token(config, n_params) * tokens / median
    peak_gb = peak_memory(devices[0]) / 1e9  # before gemm_flops() needs memory, too
    return dict(parameters=n_params, devices=f'{len(devices)} x {devices[0].device_kind}', dtype=config.dtype,
                tokens_per_iteration=tokens, ms=1e3 * median, ms_10_percent=1e3 * low, ms_90_percent=1e3 * high,
                iterations=len(times), tokens_per_s=tokens / median, tflops=flops / 1e12,
                share_of_peak=estimate_mfu(config, n_params, 0, tokens / median, devices),
                share_of_gemm=flops / (gemm_flops(config.dtype) * len(devices)), compile_s=compile_times[0],
                compile_from_cache_s=compile_times[1], peak_memory_gb=peak_gb)


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
    mesh, shape = mesh_and_shape(find_devices(device), -1, 1)
    text = tokens['train']
    steps = iter(range(10**12))
    starts = lambda: train_starts(text, shape, block_size, 0, next(steps))
    [times] = measure(lambda: load_batch(text, starts(), block_size, meta['vocab_size'], batch_sharding(mesh)))
    sequences_per_s = shape[0] * shape[1] / np.median(times)
    return dict(dataset=dataset, batch=list(shape), block_size=block_size, ms=1e3 * np.median(times),
                sequences_per_s=sequences_per_s, tokens_per_s=sequences_per_s * block_size)


def compile_for_chips():
    """Whether a step fits the chips of a topology, and what it will cost there: the real compiler compiles it, nothing
    runs."""
    with refuse(ValueError):
        devices = open_topology(topology)
    chip = CHIPS[topology.partition(':')[0]]
    setup, shape = make_setup(devices)
    mesh = setup.mesh
    state = abstract_state(setup)

    def compile(batch):
        """(program or None, GiB it needs or why it does not fit) for micro-batches of batch sequences a device."""
        print(f'compiling for {topology} with {batch} sequences a device: this takes from 10 s to 10 minutes',
              file=sys.stderr, flush=True)
        try:
            with memory_errors():
                program = lower_step(setup, state, (shape[0], batch * mesh.shape['data'])).compile()
        except MemoryError as e:  # TPUs' compiler refuses; the CUDA one does not
            return None, str(e)
        parts = memory_use(program) | {'program': program.memory_analysis().generated_code_size_in_bytes}
        return program, {name: size / 2**30 for name, size in parts.items()}

    def fits(batch):
        program, parts = compile(batch)
        return program is not None and sum(parts.values()) <= chip.usable_gib

    t = time.perf_counter()
    batch = shape[1] // mesh.shape['data']
    program, parts = compile(batch)
    result = dict(fits=program is not None and sum(parts.values()) <= chip.usable_gib, topology=topology,
                  device=devices[0].device_kind, mesh=dict(mesh.shape), fsdp=fsdp, dtype=setup.config.dtype,
                  kernels=setup.config.kernels, parameters=num_params(state['params']), micro_steps=shape[0],
                  batch=batch, compile_s=time.perf_counter() - t, gib_there_are=chip.usable_gib)
    if program is None:
        return result | dict(reason=parts)
    with refuse(UnknownText):
        found = Module(program.as_text()).kernels(mesh.size)
    peak = peak_flops(devices[:1]) / (2 if setup.config.dtype == 'float32' else 1)  # float32 runs as TF32
    kinds = add_up(found, chip, peak, lambda kernel: kernel.kind)
    sending = [row['ms'] for kind, row in kinds.items() if kind in COLLECTIVES]
    result |= dict(gib=sum(parts.values()), gib_of=parts, kinds=kinds, peak_tflops=peak / 1e12,
                   bandwidth_gb_per_s=chip.bandwidth, ghz=chip.ghz, sending_ms=sum(sending),
                   computing_ms=sum(row['ms'] for row in kinds.values()) - sum(sending),
                   largest=add_up(found, chip, peak, lambda kernel: f'{kernel.kind} {kernel.what:.80}', 10))
    if largest_batch:
        low, high = (batch, 2 * batch) if result['fits'] else (0, batch)
        while result['fits'] and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        result['largest_batch'] = low
    return result


def print_compiled(r):
    print(f"{'fits' if r['fits'] else 'does not fit'}: {r['parameters'] / 1e6:.0f}M parameters on {topology}, mesh "
          f"{r['mesh']}, fsdp={fsdp}, {r['dtype']}, kernels={r['kernels']!r}: {r['micro_steps']} micro-steps of "
          f"{r['batch']} sequences of {block_size} tokens a device, compiled in {r['compile_s']:.0f} s")
    if 'largest_batch' in r:
        print(f"the largest batch_size that fits: {r['largest_batch']}")
    if 'gib' not in r:
        print(f"the compiler says: {r['reason']}")
        return
    parts = ', '.join(f"{name.replace('_', ' ')} {gib:.2f}" for name, gib in r['gib_of'].items())
    print(f"memory: {r['gib']:.2f} of {r['gib_there_are']:.4g} GiB a device ({parts})")
    is_gpu = r['bandwidth_gb_per_s'] > 0
    for title, rows in (('an iteration', r['kinds']), ('its largest instructions', r['largest'])):
        print(f"\n{'kernels':>8} {'GB':>8} {'TFLOP' if is_gpu else 'Mcycles':>8} {'ms':>8}  {title}")
        for name, row in rows.items():
            work = row['tflop' if is_gpu else 'mcycles']
            print(f"{row['kernels']:8} {row['gb']:8.2f} {work:8.2f} {row['ms']:8.2f}  {name}")
    mcycles = sum(row['mcycles'] for row in r['kinds'].values())
    how = f"{mcycles:,.1f}M cycles at {r['ghz'] or 'an unknown number of'} GHz"
    if is_gpu:
        matmul, attention, other = (f'{share:.0%}' for share in REACHED.values())
        how = (f"matmuls at {matmul}, attention at {attention} of {r['peak_tflops']:.0f} TFLOP/s, the rest at {other} "
               f"of {r['bandwidth_gb_per_s']} GB/s")
    print(f"\npredicted, not measured: {r['computing_ms']:,.1f} ms of computing ({how})\n"
          f"and {r['sending_ms']:,.1f} ms of sending, some of it meanwhile")


result = {'train': train, 'sample': sample, 'data': data, 'compile': compile_for_chips}[mode]()
if json:
    print(json_module.dumps(result))
elif mode == 'compile':
    print_compiled(result)
else:
    for key, value in result.items():
        if key != 'rows':
            print(f'{key:22} {value:,.4g}' if isinstance(value, float) else f'{key:22} {value}')
    for row in result.get('rows', []):
        print('  '.join(f'{key} {value:,.4g}' for key, value in row.items()))
