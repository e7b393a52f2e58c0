"""
Times the very train_step and generate that the scripts run, or counts what they would send on many devices.

    python bench.py config/train_shakespeare_char.py config/laptop.py              # --mode=train: an iteration
    python bench.py --batch_size=1 --gradient_accumulation_steps=1                  # the same for GPT-2 (124M)
    python bench.py --mode=sample                                                   # reading a prompt, and writing
    python bench.py --mode=data --dataset=shakespeare_char                          # the loader alone
    python bench.py --mode=comm --mesh_data=64                                      # collectives, on simulated devices

Every key of train.py and its config files are understood, too.
"""
import json as json_module
import os
import re
import time

here = os.path.dirname(os.path.abspath(__file__))
# -----------------------------------------------------------------------------
with open(os.path.join(here, 'train.py'), encoding='utf-8') as f:
    exec(f.read().partition('\n# I/O')[2].partition('\nexec(')[0])  # train.py's keys
mode = 'train'  # 'train', 'sample', 'data' or 'comm'
json = False  # one line of JSON instead of a table
seconds = 10.0  # how long to measure each thing, once it is warm
vocab_size = 0  # 0: the dataset's if it is prepared, else GPT-2's
large_batch = 64  # sample: the batch beside 1
# comm: a chip and its links, to predict an iteration
chip_tflops = 400.0  # TFLOP/s that a device reaches in training; 400 is 40% of an H100's bfloat16 peak
link_gb = 400.0  # GB/s that each device sends to its neighbours; 400 is NVLink on an H100, 50 InfiniBand NDR
exec(open(os.path.join(here, 'configurator.py')).read())
# -----------------------------------------------------------------------------

check(chip_tflops=(1e-6, 1e9), link_gb=(1e-6, 1e9), mesh_data=(-1, 10**5), mesh_tensor=(1, 10**5), batch_size=(1, 10**6),
      gradient_accumulation_steps=(1, 10**6), seconds=(0, 10**5), vocab_size=(0, 2**24), large_batch=(1, 10**5))
if mode not in ('train', 'sample', 'data', 'comm'):
    fail(f"mode = {mode!r}: must be 'train', 'sample', 'data' or 'comm'")

import resource
import tempfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from model import (GPTConfig, best_dtype, cast, compile_step, decode, estimate_mfu, find_devices, flops_per_token, init_params, init_state, load, lower_step,
                   make_optimizer, micro_batches, num_params, open_dataset, padded, place, prefill, shardings, train_starts)

tx = make_optimizer(beta1, beta2, weight_decay, grad_clip)


def dataset_or_none():
    try:
        return open_dataset(os.path.join(here, 'data', dataset), block_size)
    except ValueError:
        return None, None


def model_config(**changes):
    vocab = vocab_size or (dataset_or_none()[1] or {}).get('vocab_size', 50257)
    with refuse(ValueError):
        return GPTConfig(**dict(block_size=block_size, vocab_size=padded(vocab), n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout,
                                bias=bias, flash=flash, remat=remat, loss_chunks=loss_chunks) | changes)


def mesh_and_shape(data, tensor):
    """The mesh, and the (G, B) of an iteration's sequences on it."""
    if not (shape := micro_batches(gradient_accumulation_steps * batch_size, batch_size, data)):
        fail(f'gradient_accumulation_steps * batch_size = {gradient_accumulation_steps * batch_size} must be divisible by mesh_data = {data}')
    return jax.make_mesh((data, tensor), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2), shape


def measure(*runs):
    """Seconds that each of these calls takes, an array (len(runs), n): in turns, because a shared machine changes its speed, again
    and again for `seconds`, at least five times, after two to warm up. They are to return what they computed, and that is waited for."""
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
    n = 2048 if jax.default_backend() == 'cpu' else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / measure(lambda: product(a)).min()


def peak_memory(device):
    return (device.memory_stats() or {}).get('peak_bytes_in_use') or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train():
    """An iteration, from the loader's arrays to the updated state."""
    devices = find_devices(device)
    config = model_config(dtype=dtype or best_dtype(devices))
    mesh, shape = mesh_and_shape(len(devices) // mesh_tensor if mesh_data == -1 else mesh_data, mesh_tensor)
    init = lambda: init_state(config, tx, 0)
    abstract = jax.eval_shape(init)
    where = shardings(abstract, mesh, fsdp)
    abstract = place(abstract, where)
    compile_times = []
    folder = tempfile.TemporaryDirectory()  # a compilation cache of its own: at first it is empty
    jax.config.update('jax_compilation_cache_dir', folder.name)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    for _ in range(2):
        jax.clear_caches()
        t = time.perf_counter()
        step = compile_step(abstract, shape, mesh, config, tx, fsdp)
        compile_times.append(time.perf_counter() - t)
    state = jax.jit(init, out_shardings=where)()
    text = np.random.default_rng(0).integers(config.vocab_size, size=10**6).astype(np.uint16)
    key, n = jax.random.key(0), 0

    def run():
        nonlocal state, n
        tokens = load(text, train_starts(text, shape, block_size, 0, n), block_size, config.vocab_size, mesh)
        state, metrics = step(state, tokens, 1e-4, key)
        n += 1
        return state, metrics

    [times] = measure(run)
    memory = peak_memory(devices[0])
    n_params, tokens = num_params(abstract['params']), shape[0] * shape[1] * block_size
    flops = flops_per_token(config, n_params) * tokens / np.median(times)
    return dict(parameters=n_params, devices=f'{len(devices)} x {devices[0].device_kind}', dtype=config.dtype, tokens_per_iteration=tokens,
                ms=1e3 * np.median(times), ms_10_percent=1e3 * np.quantile(times, 0.1), ms_90_percent=1e3 * np.quantile(times, 0.9),
                iterations=len(times), tokens_per_s=tokens / np.median(times), tflops=flops / 1e12,
                share_of_peak=estimate_mfu(config, n_params, tokens / np.median(times), devices),
                share_of_gemm=flops / (gemm_flops(config.dtype) * len(devices)),
                compile_s=compile_times[0], compile_from_cache_s=compile_times[1], peak_memory_gb=memory / 1e9)


def sample():
    """Prefill of half a context and decode of up to 100 tokens after it, at batch 1 and at a large one, greedily."""
    devices = find_devices(device)
    config = model_config(dtype=dtype or best_dtype(devices), dropout=0.0, flash=False)
    config = replace(config, dtype=config.stream_dtype)  # as stream() does
    params = cast(jax.jit(lambda: init_params(config, 0))(), config)
    held, rows = sum(x.nbytes for x in jax.tree.leaves(params)), []
    ones, total = jnp.ones(2**28, jnp.float32), jax.jit(jnp.sum)  # 1 GB to read, ten times
    n = max(block_size // 2, 1)
    new = min(100, block_size - n)
    for B in (1, large_batch):
        window = jnp.ones((B, block_size + 1), jnp.int32)
        cache = jax.block_until_ready(prefill(params, window[:, :n], config))
        prefill_s = np.median(measure(lambda: prefill(params, window[:, :n], config)))
        S = -(-(n + new) // 64) * 64  # the length that stream() would take
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, S - n), (0, 0))), cache)
        copies = lambda: (window + 0, jax.tree.map(jnp.copy, cache))  # decode() reuses the memory of what it is given
        run = lambda: decode(params, *copies(), jnp.zeros(B, bool), n, n + new, 0, jax.random.key(0), config, None,
                             config.vocab_size, (0.0, None, 1.0))[0]
        read_s, copy_s, decode_s = np.median(measure(lambda: [total(ones) for _ in range(10)], copies, run), axis=1)
        speed, decode_s = 10 * ones.nbytes / read_s, decode_s - copy_s
        cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
        rows.append(dict(batch=B, prefill_tokens_per_s=B * n / prefill_s, decode_tokens_per_s=B * new / decode_s, ms_per_token=1e3 * decode_s / new,
                         bandwidth_gb_per_s=speed / 1e9, share_of_bandwidth=(held + cache_bytes) * new / decode_s / speed))
    return dict(parameters=num_params(params), devices=f'1 x {devices[0].device_kind}', dtype=config.dtype, rows=rows)


def data():
    """Sequences of the training split a second, as arrays on the devices."""
    tokens, meta = dataset_or_none()
    if tokens is None:
        fail(f'dataset = {dataset!r} is not prepared')
    devices = find_devices(device)
    mesh, shape = mesh_and_shape(len(devices), 1)
    n = iter(range(10**12))
    [times] = measure(lambda: load(tokens['train'], train_starts(tokens['train'], shape, block_size, 0, next(n)), block_size, meta['vocab_size'], mesh))
    return dict(dataset=dataset, batch=list(shape), block_size=block_size, ms=1e3 * np.median(times),
                sequences_per_s=shape[0] * shape[1] / np.median(times), tokens_per_s=shape[0] * shape[1] * block_size / np.median(times))


KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'


def collectives(hlo):
    """The collectives of a compiled module: (kind, times, bytes) for each, where `times` is how often the loops around it run
    it and `bytes` what a device sends for one, in the ring algorithms: (n - 1) / n of the whole among n devices, twice that for
    all-reduce. Those among one device, and of single numbers, are left out."""
    found, calls, entry, name = {}, {}, None, None
    for line in hlo.splitlines():
        if m := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
            name = m[2]
            found[name], calls[name] = [], []
            entry = name if m[1] else entry
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for callee in re.findall(r'(?:body|to_apply|calls)=%?([\w.-]+)', line):
            calls[name].append((callee, int(trips[1]) if trips else 1))
        if m := re.search(rf'= (.*?) ({KINDS})(?:-start)?\(.*?replica_groups=(\S+)', line):
            # {{0,1},{2,3}}, or [groups,size]<=[...]
            n = int(re.match(r'\[\d+,(\d+)\]', m[3])[1]) if m[3][0] == '[' else m[3].partition('}')[0].count(',') + 1
            shapes = [(int(re.search(r'\d+', kind)[0]) // 8, [int(d) for d in dims.split(',') if d])
                      for kind, dims in re.findall(r'([a-z]+\d+)\[([\d,]*)\]', m[1])]
            size = sum(width * int(np.prod(dims)) for width, dims in shapes)
            whole = size * n if m[2] == 'reduce-scatter' else size  # its shape is a device's part
            if n > 1 and any(dims for _, dims in shapes):
                found[name].append((m[2], whole * (n - 1) / n * (2 if m[2] == 'all-reduce' else 1)))

    def walk(name, times):
        for kind, sent in found[name]:
            yield kind, times, sent
        for callee, trips in calls[name]:
            yield from walk(callee, times * trips)

    return list(walk(entry, 1))


def comm():
    """What an iteration would send, hold and take on mesh_data * mesh_tensor devices. They are simulated: computed, not measured."""
    D = max(mesh_data, 1)
    jax.config.update('jax_num_cpu_devices', D * mesh_tensor)
    devices = find_devices('cpu')
    mesh, shape = mesh_and_shape(D, mesh_tensor)
    config = model_config(flash=False)  # float32, as activations are on any CPU: in bfloat16 the tensor axis sends half
    abstract = jax.eval_shape(lambda: init_state(config, tx, 0))
    abstract = place(abstract, shardings(abstract, mesh, fsdp))
    step = lower_step(abstract, shape, mesh, config, tx, fsdp).compile()

    rows = {}
    for kind, times, sent in collectives(step.as_text()):
        row = rows.setdefault((kind, times > 1), dict(kind=kind, inside_loop=times > 1, count=0, bytes=0))
        row['count'] += times
        row['bytes'] += times * sent
    held = lambda tree: sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree))
    n_params, n_tokens = num_params(abstract['params']), gradient_accumulation_steps * batch_size * block_size
    flops = n_tokens * flops_per_token(config, n_params) / (D * mesh_tensor)
    compute, send = flops / (chip_tflops * 1e12), sum(row['bytes'] for row in rows.values()) / (link_gb * 1e9)
    return dict(parameters=n_params, devices=D * mesh_tensor, mesh_data=D, mesh_tensor=mesh_tensor, fsdp=fsdp, micro_steps=shape[0],
                sequences=shape[0] * shape[1], collectives=list(rows.values()), flops_per_device=flops,
                parameter_bytes_per_device=held(abstract['params']), optimizer_bytes_per_device=held(abstract['opt_state']),
                compute_s=compute, send_s=send, predicted_s=[max(compute, send), compute + send])


def print_comm(r):
    print(f"{r['parameters'] / 1e6:.0f}M parameters on {r['devices']} simulated devices, mesh data={r['mesh_data']} tensor={r['mesh_tensor']} "
          f"fsdp={r['fsdp']}: {r['sequences']} sequences an iteration in {r['micro_steps']} micro-steps")
    print(f"{'collective':20} {'in the loop':12} {'an iteration':>12} {'MB sent by a device':>20}")
    for row in r['collectives']:
        print(f"{row['kind']:20} {'yes' if row['inside_loop'] else 'no':12} {row['count']:12} {row['bytes'] / 1e6:20,.1f}")
    print(f"a device holds {r['parameter_bytes_per_device'] / 1e6:,.1f} MB of parameters and {r['optimizer_bytes_per_device'] / 1e6:,.1f} MB of "
          f"optimizer state, and computes {r['flops_per_device'] / 1e12:,.1f} TFLOP an iteration")
    print(f"computed, not measured: at {chip_tflops:g} TFLOP/s and {link_gb:g} GB/s that is {r['compute_s'] * 1000:,.1f} ms of computing and "
          f"{r['send_s'] * 1000:,.1f} ms of sending, so {r['predicted_s'][0] * 1000:,.1f} (overlapped) to {r['predicted_s'][1] * 1000:,.1f} ms an iteration")


result = {'train': train, 'sample': sample, 'data': data, 'comm': comm}[mode]()
if json:
    print(json_module.dumps(result))
elif mode == 'comm':
    print_comm(result)
else:
    for key, value in result.items():
        if key != 'rows':
            print(f'{key:22} {value:,.4g}' if isinstance(value, float) else f'{key:22} {value}')
    for row in result.get('rows', []):
        print('  '.join(f'{key} {value:,.4g}' for key, value in row.items()))
