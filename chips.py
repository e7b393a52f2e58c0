"""
Chips that you don't have: compiles a step for them, and reads what their compilers say about it.

JAX's compilers for TPUs (libtpu) and NVIDIA GPUs (the CUDA plugin) are Python packages and run on
any Linux machine. Given the description of a chip, they make the very program that it would run.
`python bench.py --mode=compile --topology=v5e:2x4` is how you use this file.
"""
import os
import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc

# Of each chip: GiB of memory that a program can have, the clock of its matrix units in GHz, and GB/s
# that a device can send along a ring, from the makers' data sheets. A device of a v2, v3 or tpu7x is
# half a chip. JAX takes three quarters of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS = {'v2': (8, 0.7, 60), 'v3': (16, 0.94, 80), 'v4': (32, 1.05, 90), 'v5e': (15.75, 1.5, 90),
         'v5p': (95, 1.75, 180), 'v6e': (31.25, None, 180), 'tpu7x': (96, None, 200),
         'h100': (59.3, None, 400)}
BETWEEN_HOSTS = 50  # GB/s that a GPU sends to another host: InfiniBand NDR

# What the CUDA compiler has to know of a GPU, a GpuTargetConfigProto: an H100 with 80 GB
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def open_topology(name):
    """The devices of a topology such as 'v5e:2x4', 'v5p:4x4x4' or 'h100:8', to compile for. Call it
    before JAX does anything else. Raises ValueError."""
    chip, _, shape = name.partition(':')
    if chip not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
        raise ValueError(f"topology = {name!r}: must be a chip and its number, such as 'h100:8', 'v5e:2x4' "
                         f"or 'v5p:4x4x4'; the chips are {', '.join(CHIPS)}")
    # ask for no device but the CPU, and let libtpu neither look for a TPU nor talk about it
    jax.config.update('jax_platforms', 'cpu')
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
                   'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost',
                   'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    package = 'jax-cuda13-plugin nvidia-cudnn-cu13' if chip == 'h100' else 'libtpu'
    try:
        if chip != 'h100':
            how = {'chip_config_name': 'megacore'} if chip == 'v4' else {}
            return get_topology_desc(platform='tpu', topology_name=name, **how).devices
        n = int(np.prod([int(d) for d in shape.split('x')]))
        hosts = max(1, n // 8)  # eight GPUs in each
        return get_topology_desc(platform='cuda', topology_name='', target_config=H100,
                                 topology=f'1x{hosts}x{n // hosts}').devices
    except Exception as e:  # the plugins raise all kinds
        reason = str(e).splitlines()[0][:200]
        raise ValueError(f'topology = {name!r}: {reason}. The compilers for chips are in '
                         f'requirements-chips.txt (this one is {package})') from None


# -----------------------------------------------------------------------------
# a compiled module's text


class UnknownText(ValueError):
    """A compiled module says something that this file does not understand: better no count than a
    wrong one."""


def executed(hlo):
    """(computation, line, times, fused) of every instruction that a module executes. `times` counts
    the loops around it; `fused` says whether it is a part of another instruction."""
    lines, entry, name = {}, None, None
    for line in hlo.splitlines():
        if m := re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line):
            name = m[2]
            lines[name] = []
            entry = name if m[1] else entry
        elif name:
            lines[name].append(line)
    callees = r'(body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)'

    def walk(name, times, fused):
        for line in lines[name]:
            yield name, line, times, fused
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if not trips and (m := re.search(r' while\(.*condition=%?([\w.-]+)', line)):
                # a TPU's loop, as lax.scan makes it: while i < n
                limits = re.findall(r' = s32\[\]\S* constant\((\d+)\)', '\n'.join(lines[m[1]]))
                trips = [None, *limits] if len(limits) == 1 else None
            called = re.findall(callees, line)
            if m := re.search(r'branch_computations=\{([^}]*)\}', line):
                called += [('branch', branch.strip(' %')) for branch in m[1].split(',')]
            for how, callee in called:
                n = int(trips[1]) if trips else 1
                if how == 'body' and not trips:
                    n = None  # who counts something in there must not guess
                below = times * n if times and n else None
                yield from walk(callee, below, fused or (how == 'calls' and 'async' not in line))

    return list(walk(entry, 1, False))


def estimated_cycles(hlo):
    """The cycles that the TPU compiler expects a module to take, 0 where it says none."""
    found = ((re.search(r'"estimated_cycles":"(\d+)"', line), times)
             for _, line, times, fused in executed(hlo) if not fused)
    return sum(int(m[1]) * (times or 1) for m, times in found if m)


KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
         'collective-broadcast', 'ragged-all-to-all')


@dataclass
class Collective:
    kind: str
    times: int  # how often the loops around it run it
    bytes: float  # what a device sends for one of them
    group: int  # how many devices take part
    overlapped: bool  # whether other work is done meanwhile


def parts_of(shape):
    """The elements of a tuple's shape as they are written; a list of the shape itself for an array."""
    if shape[0] != '(':
        return [shape]
    parts, depth, begin = [], 0, 1
    for i, c in enumerate(shape):
        depth += (c in '([{') - (c in ')]}')
        if (c == ',' and depth == 1) or depth == 0:
            parts.append(shape[begin:i].strip())
            begin = i + 1
    return parts


def shape_bytes(shape):
    """Bytes of all arrays in a shape, such as '(f32[2,3]{1,0}, bf16[4]{0})'."""
    total = 0
    for kind, dims in re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shape):
        bits = re.search(r'\d+', kind)
        if not bits and kind != 'pred':
            raise UnknownText(f'the type {kind} in {shape[:100]}')
        n = int(np.prod([int(d) for d in dims.split(',') if d]))
        total += n * (max(int(bits[0]) // 8, 1) if bits else 1)
    return total


def group_size(line, n_devices):
    """How many devices take part in a collective together."""
    text = line.partition('replica_groups=')[2]
    if m := re.match(r'\[\d+,(\d+)\]', text):  # [groups,size]<=[...]
        return int(m[1])
    if m := re.match(r'\{\{([\d,]*)\}', text):  # {{0,1},{2,3}}
        return m[1].count(',') + 1
    if m := re.match(r"mesh\[([^]]*)\][^{]*\{([^}]*)\}", text):  # mesh['data'=4,'tensor'=2] {'data'}
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", m[1]))
        axes = re.findall(r"'([^']*)'", m[2])
        if axes and set(axes) <= sizes.keys() and ':(' not in m[2]:
            return int(np.prod([int(sizes[axis]) for axis in axes]))
    if text.startswith('{}'):
        return n_devices
    if 'source_target_pairs=' in line:
        return 2
    raise UnknownText(f'the groups of a collective: {text[:100]}')


def collectives(hlo, n_devices):
    """The Collectives of a compiled module. Bytes are those of the ring algorithms: (n - 1) / n of the
    whole among n devices, twice that for an all-reduce. Those among one device are left out, and
    those of less than a kilobyte, such as a loss. Raises UnknownText."""
    instructions, found, chains = executed(hlo), [], set()
    kinds = '|'.join(KINDS)
    starts = {c for c, line, *_ in instructions if 'custom_call_target="AsyncCollectiveStart"' in line}
    for i, (computation, line, times, _) in enumerate(instructions):
        if not (op := re.search(rf'\b({kinds})(-start)?\(', line.partition(', metadata=')[0])):
            continue
        m = re.match(rf'\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({kinds})(-start)?\(', line)
        if not m:
            raise UnknownText(f'a collective: {line.strip()[:200]}')
        if 'chain_id=' in line and computation not in starts:
            continue  # TPU: the same collective once more, in the instructions that go on with it
        kind, start = m[2], bool(m[3])
        shape = m[1]
        if start and kind != 'all-reduce':  # (what goes in, what comes out, ...)
            shape = parts_of(shape)[1]
        n, size = group_size(line, n_devices), shape_bytes(shape)
        if kind == 'reduce-scatter':  # its result is a device's part
            size *= n
        if n == 1 or size < 1024:
            continue
        if times is None:
            raise UnknownText(f'how often a loop runs this: {line.strip()[:100]}')
        sent = size if 'permute' in kind or 'broadcast' in kind else size * (n - 1) / n
        found.append(Collective(kind, times, sent * (2 if kind == 'all-reduce' else 1), n,
                                computation in starts or (start and works_meanwhile(instructions, i))))
    return found


def works_meanwhile(instructions, i):
    """Whether something is computed between the start of a collective, instruction i, and its end."""
    name = re.match(r'\s*(?:ROOT )?(%?[\w.-]+) =', instructions[i][1])[1]
    for _, line, _, fused in instructions[i + 1:]:
        if re.search(rf'-done\({re.escape(name)}\)', line):
            return False
        if not fused and re.search(r' (fusion|dot|convolution|custom-call|while)\(', line):
            return True
    return False
