"""
Times the very train_step and generate that the scripts run, or compiles the step for chips that you don't have.

    python bench.py config/train_shakespeare_char.py config/laptop.py     # an iteration (--mode=train)
    python bench.py --batch_size=1 --gradient_accumulation_steps=1         # the same for GPT-2 (124M)
    python bench.py --mode=sample                                          # reading a prompt, and writing
    python bench.py --mode=data --dataset=shakespeare_char                 # the loader alone
    python bench.py --mode=compile --topology=v5e:2x4                      # will it fit there, what will it cost
    python bench.py --mode=comm --mesh_data=8                              # what 8 devices send, by a CPU's compiler

Every key of train.py and its config files are understood, too.
"""
import json as json_module
import os
import sys
import time

_here = os.path.dirname(os.path.abspath(__file__))
# -----------------------------------------------------------------------------
_more_keys = 'train.py'  # configurator.py reads its keys, too
mode = 'train'  # 'train', 'sample', 'data', 'compile' or 'comm'
json = False  # one line of JSON instead of a table
seconds = 10.0  # how long to measure each thing, once it is warm
vocab_size = 0  # 0: the dataset's if it is prepared, else GPT-2's
large_batch = 64  # sample: the batch beside 1
# compile: needs requirements-chips.txt
topology = ''  # the chips: 'h100:8', 'v5e:2x4', 'v5p:4x4x4', ...
largest_batch = False  # also find the largest batch_size that fits: some more compilations
# compile, comm: to predict an iteration
chip_tflops = 400.0  # TFLOP/s that a device reaches in training; 400: 40% of an H100's bfloat16 peak
link_gb = 400.0  # comm: GB/s that a device sends to its neighbors; 400: NVLink on an H100, 50: InfiniBand NDR
exec(open(os.path.join(_here, 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

check(chip_tflops=(1e-6, 1e9), link_gb=(1e-6, 1e9), mesh_data=(-1, 10**5), mesh_tensor=(1, 10**5),
      batch_size=(1, 10**6), gradient_accumulation_steps=(1, 10**6), seconds=(0, 10**5),
      vocab_size=(0, 2**24), large_batch=(1, 10**5), mode=('train', 'sample', 'data', 'compile', 'comm'))

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

from chips import (BETWEEN_HOSTS, CHIPS, UnknownText, collectives, estimated_cycles,
                   open_topology)
from dataset import dataset_name, load_batch, micro_batches, open_dataset, padded, train_starts
from devices import best_dtype, count_cpus, find_devices, make_mesh, memory_errors, memory_use
from model import (GPTConfig, decode, decoding_params, flops_per_token, init_params, num_params,
                   prefill)
from step import (abstract_state, batch_sharding, compile_step, estimate_mfu, lower_step,
                  make_optimizer, state_creator, with_flash)


def optimizer_for(config):
    with refuse(ValueError):
        return make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer, config.dtype)


def dataset_or_none():
    try:
        return open_dataset(os.path.join(_here, 'data', dataset_name(dataset)), block_size)
    except ValueError:
        return None, None


def model_config(devices, **changes):
    """The GPTConfig of the keys for these devices."""
    vocab = vocab_size or (dataset_or_none()[1] or {}).get('vocab_size', 50257)
    keys = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    keys |= {'vocab_size': padded(vocab), 'lora_rank': 0, 'flash': False, 'cpus': count_cpus(devices),
             'dtype': dtype or best_dtype(devices)}
    with refuse(ValueError):
        return with_flash(GPTConfig(**keys | changes), devices, flash)[0]


def mesh_and_shape(devices, data, tensor):
    """The mesh, and the (G, B) of an iteration's sequences on it."""
    with refuse(ValueError):
        mesh, n = make_mesh(devices, data, tensor), gradient_accumulation_steps * batch_size
        return mesh, micro_batches(n, batch_size, mesh.shape['data'])


def measure(*runs):
    """Seconds that each call takes, an array (len(runs), n). The calls alternate, because a shared
    machine changes its speed, for `seconds` and at least five times after two to warm up. What they
    return is waited for."""
    times, begun = [], None
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
    n = 2048 if count_cpus(jax.devices()) else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / measure(lambda: product(a)).min()


def peak_memory(device):
    """Bytes of a GPU or a TPU; on a CPU, of the process."""
    peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
    if peak or not resource:
        return peak or getattr(memory := psutil.Process().memory_info(), 'peak_wset', memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def train():
    """An iteration, from the loader's arrays to the updated state."""
    devices = find_devices(device)
    config = model_config(devices)
    mesh, shape = mesh_and_shape(devices, mesh_data, mesh_tensor)
    tx = optimizer_for(config)
    abstract = abstract_state(config, tx, mesh, fsdp)
    compile_times = []
    folder = tempfile.TemporaryDirectory()  # a compilation cache of its own: at first it is empty
    jax.config.update('jax_compilation_cache_dir', folder.name)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    for _ in range(2):
        jax.clear_caches()
        t = time.perf_counter()
        step = compile_step(abstract, shape, mesh, config, tx, fsdp)
        compile_times.append(time.perf_counter() - t)
    state = state_creator(config, tx, 0, abstract)()
    text = np.random.default_rng(0).integers(config.vocab_size, size=10**6).astype(np.uint16)
    key, n, metrics = jax.random.key(0), 0, None

    def run():
        nonlocal state, n, metrics
        starts = train_starts(text, shape, block_size, 0, n)
        tokens = load_batch(text, starts, block_size, config.vocab_size, batch_sharding(mesh))
        before, (state, metrics) = metrics, step(state, tokens, 1e-4, key)
        n += 1
        return before  # as train.py, wait for the iteration before while the devices work on this one

    [times] = measure(run)
    memory = peak_memory(devices[0])
    n_params, tokens = num_params(abstract['params']), shape[0] * shape[1] * block_size
    low, median, high = np.quantile(times, (0.1, 0.5, 0.9))
    flops = flops_per_token(config, n_params) * tokens / median
    return dict(parameters=n_params, devices=f'{len(devices)} x {devices[0].device_kind}',
                dtype=config.dtype, tokens_per_iteration=tokens, ms=1e3 * median,
                ms_10_percent=1e3 * low, ms_90_percent=1e3 * high, iterations=len(times),
                tokens_per_s=tokens / median, tflops=flops / 1e12,
                share_of_peak=estimate_mfu(config, n_params, 0, tokens / median, devices),
                share_of_gemm=flops / (gemm_flops(config.dtype) * len(devices)),
                compile_s=compile_times[0], compile_from_cache_s=compile_times[1],
                peak_memory_gb=memory / 1e9)


def sample():
    """Prefill of half a context and decode of up to 100 tokens after it, at batch 1 and at a large
    one, greedily."""
    devices = find_devices(device)
    config = model_config(devices, dropout=0.0)
    config = replace(config, dtype=config.activation_dtype, flash=False)  # as stream() does
    params = decoding_params(jax.jit(lambda: init_params(config, 0))(), config)
    size_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    ones, total, rows = jnp.ones(2**28, jnp.float32), jax.jit(jnp.sum), []  # 1 GB to read, ten times
    n = max(block_size // 2, 1)
    new = min(100, block_size - n)
    for B in (1, large_batch):
        window = jnp.ones((B, block_size + 1), jnp.int32)
        cache = jax.block_until_ready(prefill(params, window[:, :n], config))
        prefill_s = np.median(measure(lambda: prefill(params, window[:, :n], config)))
        S = -(-(n + new) // 64) * 64  # the length that stream() would take
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, S - n), (0, 0))), cache)
        read = lambda: [total(ones) for _ in range(10)]
        copy = lambda: (window + 0, jax.tree.map(jnp.copy, cache))  # decode() overwrites what it gets
        write = lambda: decode(params, *copy(), jnp.zeros(B, bool), n, n + new, 0, jax.random.key(0),
                               config, None, config.vocab_size, (0.0, None, 1.0))[0]
        read_s, copy_s, decode_s = np.median(measure(read, copy, write), axis=1)
        speed, decode_s = 10 * ones.nbytes / read_s, decode_s - copy_s
        needed = (size_of(params) + size_of(cache)) * new / decode_s
        rows.append(dict(batch=B, prefill_tokens_per_s=B * n / prefill_s,
                         decode_tokens_per_s=B * new / decode_s, ms_per_token=1e3 * decode_s / new,
                         bandwidth_gb_per_s=speed / 1e9, share_of_bandwidth=needed / speed))
    return dict(parameters=num_params(params), devices=f'1 x {devices[0].device_kind}',
                dtype=config.dtype, rows=rows)


def data():
    """Sequences of the training split a second, as arrays on the devices."""
    tokens, meta = dataset_or_none()
    if tokens is None:
        fail(f'dataset = {dataset!r} is not prepared')
    devices = find_devices(device)
    mesh, shape = mesh_and_shape(devices, -1, 1)
    text, steps = tokens['train'], iter(range(10**12))
    starts = lambda: train_starts(text, shape, block_size, 0, next(steps))
    [times] = measure(lambda: load_batch(text, starts(), block_size, meta['vocab_size'],
                                         batch_sharding(mesh)))
    sequences_per_s = shape[0] * shape[1] / np.median(times)
    return dict(dataset=dataset, batch=list(shape), block_size=block_size, ms=1e3 * np.median(times),
                sequences_per_s=sequences_per_s, tokens_per_s=sequences_per_s * block_size)


def collective_rows(found):
    """What is sent, summed by kind, as dicts."""
    rows = {}
    for c in found:
        key = c.kind, c.times > 1, c.overlapped
        row = rows.setdefault(key, dict(kind=c.kind, inside_loop=c.times > 1, overlapped=c.overlapped,
                                        count=0, bytes=0))
        row['count'] += c.times
        row['bytes'] += c.times * c.bytes
    return list(rows.values())


def describe(config, abstract, mesh, shape):
    """What compile() and comm() say alike."""
    n_params, n_sequences = num_params(abstract['params']), shape[0] * shape[1]
    flops = n_sequences * block_size * flops_per_token(config, n_params) / mesh.size
    return dict(parameters=n_params, devices=mesh.size, mesh_data=mesh.shape['data'],
                mesh_tensor=mesh.shape['tensor'], fsdp=fsdp, micro_steps=shape[0], sequences=n_sequences,
                flops_per_device=flops)


def comm():
    """What an iteration would send, hold and take on mesh_data * mesh_tensor devices: computed with
    simulated devices, not measured."""
    D = max(mesh_data, 1)
    jax.config.update('jax_num_cpu_devices', D * mesh_tensor)
    devices = find_devices('cpu')
    mesh, shape = mesh_and_shape(devices, D, mesh_tensor)
    config = model_config(devices, dtype=dtype or 'bfloat16')
    tx = optimizer_for(config)
    abstract = abstract_state(config, tx, mesh, fsdp)
    step = lower_step(abstract, shape, mesh, config, tx, fsdp).compile()
    with refuse(UnknownText):
        found = collectives(step.as_text(), mesh.size)
    for c in found:  # the CPU's compiler sends float32 where it is told to send bfloat16
        c.bytes *= jnp.dtype(config.dtype).itemsize / 4 if c.kind == 'all-gather' else 1
    rows, result = collective_rows(found), describe(config, abstract, mesh, shape)
    part = lambda x: x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape)))
    held = lambda tree: sum(map(part, jax.tree.leaves(tree)))
    compute = result['flops_per_device'] / (chip_tflops * 1e12)
    send = sum(row['bytes'] for row in rows) / (link_gb * 1e9)
    return result | dict(collectives=rows, parameter_bytes_per_device=held(abstract['params']),
                         optimizer_bytes_per_device=held(abstract['opt_state']), compute_s=compute,
                         send_s=send, predicted_s=[max(compute, send), compute + send])


def compile_for_chips():
    """Whether a step fits the chips of a topology, and what it will cost there: the real compiler
    compiles it, nothing runs."""
    with refuse(ValueError):
        devices = open_topology(topology)
    chip = topology.partition(':')[0]
    memory, clock, link = CHIPS[chip]
    mesh, shape = mesh_and_shape(devices, mesh_data, mesh_tensor)
    config = model_config(devices)
    tx = optimizer_for(config)
    abstract = abstract_state(config, tx, mesh, fsdp)

    def compile(batch):
        """(program or None, GiB it needs or why it does not fit) for micro-batches of batch sequences
        a device."""
        wait = f'compiling for {topology} with {batch} sequences a device: this takes from 10 s to 10 minutes'
        print(wait, file=sys.stderr, flush=True)
        lowered = lower_step(abstract, (shape[0], batch * mesh.shape['data']), mesh, config, tx, fsdp)
        try:
            with memory_errors():
                program = lowered.compile()
        except MemoryError as e:
            return None, str(e)
        parts = memory_use(program) | {'program': program.memory_analysis().generated_code_size_in_bytes}
        return program, {name: size / 2**30 for name, size in parts.items()}

    def fits(batch):
        program, parts = compile(batch)
        return program is not None and sum(parts.values()) <= memory

    t, batch = time.perf_counter(), shape[1] // mesh.shape['data']
    program, parts = compile(batch)
    result = describe(config, abstract, mesh, shape) | dict(
        topology=topology, device=devices[0].device_kind, dtype=config.dtype, flash=config.flash, batch=batch,
        gib_there_are=memory, clock_ghz=clock, compile_s=time.perf_counter() - t)
    if program is None:
        return result | dict(fits=False, reason=parts)  # TPUs' compiler refuses; the CUDA one does not
    hlo = program.as_text()
    with refuse(UnknownText):
        found = collectives(hlo, mesh.size)
    cycles = estimated_cycles(hlo)
    compute = cycles / (clock * 1e9) if cycles and clock else result['flops_per_device'] / (chip_tflops * 1e12)
    seconds_of = lambda c: c.times * c.bytes / 1e9 / (BETWEEN_HOSTS if chip == 'h100' and c.group > 8 else link)
    result |= dict(fits=sum(parts.values()) <= memory, gib=sum(parts.values()), gib_of=parts,
                   flash_calls=hlo.count('custom_call_target="__cudnn$fmha'), cycles=cycles or None,
                   compute_s=compute, collectives=collective_rows(found),
                   send_s=sum(map(seconds_of, found)),
                   send_overlapped_s=sum(seconds_of(c) for c in found if c.overlapped))
    if largest_batch:
        low, high = (batch, 2 * batch) if result['fits'] else (0, batch)
        while result['fits'] and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        result['largest_batch'] = low
    return result


def print_described(r):
    where = f"{r['devices']} x {r['device']} ({topology})" if mode == 'compile' else f"{r['devices']} simulated devices"
    print(f"{r['parameters'] / 1e6:.0f}M parameters on {where}, mesh data={r['mesh_data']} "
          f"tensor={r['mesh_tensor']} fsdp={r['fsdp']}: {r['sequences']} sequences an iteration in "
          f"{r['micro_steps']} micro-steps")


def print_collectives(r):
    print(f"{'collective':20} {'in the loop':12} {'overlapped':12} {'an iteration':>12} {'MB sent by a device':>20}")
    for row in r['collectives']:
        yes = lambda key: 'yes' if row[key] else 'no'
        print(f"{row['kind']:20} {yes('inside_loop'):12} {yes('overlapped'):12} {row['count']:12} "
              f"{row['bytes'] / 1e6:20,.1f}")


def print_comm(r):
    print_described(r)
    print_collectives(r)
    print(f"a device holds {r['parameter_bytes_per_device'] / 1e6:,.1f} MB of parameters and "
          f"{r['optimizer_bytes_per_device'] / 1e6:,.1f} MB of optimizer state, and computes "
          f"{r['flops_per_device'] / 1e12:,.1f} TFLOP an iteration")
    overlapped, in_turn = (1000 * s for s in r['predicted_s'])
    print(f"computed, not measured: at {chip_tflops:g} TFLOP/s and {link_gb:g} GB/s that is "
          f"{r['compute_s'] * 1000:,.1f} ms of computing and {r['send_s'] * 1000:,.1f} ms of sending, so "
          f"{overlapped:,.1f} (overlapped) to {in_turn:,.1f} ms an iteration")
    print("this is how a CPU's compiler divides the work; --mode=compile asks the compiler of a chip")


def print_compile(r):
    print('fits' if r['fits'] else 'does not fit')
    print_described(r)
    if 'largest_batch' in r:
        print(f"the largest batch_size that fits: {r['largest_batch']}")
    if 'gib' not in r:
        print(f"the compiler says: {r['reason']}")
        return
    parts = ', '.join(f"{name.replace('_', ' ')} {gib:.2f}" for name, gib in r['gib_of'].items())
    print(f"memory: {r['gib']:.2f} of {r['gib_there_are']:g} GiB a device ({parts}), with {r['batch']} sequences "
          f"of {block_size} tokens at a time")
    print_collectives(r)
    how = f"the compiler's estimate, {r['cycles'] / 1e6:,.0f}M cycles" if r['cycles'] else 'no estimate'
    if not (r['cycles'] and r['clock_ghz']):
        how += f'; this is at {chip_tflops:g} TFLOP/s (--chip_tflops)'
    print(f"computed, not measured: {r['compute_s'] * 1e3:,.1f} ms of computing ({how}) and "
          f"{r['send_s'] * 1e3:,.1f} ms of sending, of which {r['send_overlapped_s'] * 1e3:,.1f} ms meanwhile; "
          f"compiled in {r['compile_s']:.0f} s")


modes = {'train': train, 'sample': sample, 'data': data, 'compile': compile_for_chips, 'comm': comm}
result = modes[mode]()
if json:
    print(json_module.dumps(result))
elif mode in ('compile', 'comm'):
    {'compile': print_compile, 'comm': print_comm}[mode](result)
else:
    for key, value in result.items():
        if key != 'rows':
            print(f'{key:22} {value:,.4g}' if isinstance(value, float) else f'{key:22} {value}')
    for row in result.get('rows', []):
        print('  '.join(f'{key} {value:,.4g}' for key, value in row.items()))
