"""
Chips that you don't have: compiles a step for them, and reads what their compilers say about it.

JAX's compilers for TPUs (libtpu) and NVIDIA GPUs (the CUDA plugin) are Python packages and run on any Linux machine.
Given the description of a chip, they make the very program that it would run.
`python bench.py --mode=compile --topology=v5e:2x4` is how you use this file.
"""
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
from jax.experimental.topologies import get_topology_desc


class Chip(NamedTuple):
    """A device, from its maker's data sheets. A device of a TPU v2, v3 or 7x is half a chip."""
    gib: float  # of memory. JAX takes three quarters of a GPU's (XLA_PYTHON_CLIENT_MEM_FRACTION)
    link: int  # GB/s that it can send along a ring
    ghz: float | None  # the clock, of a TPU's matrix units
    # for GPUs alone
    bandwidth: int = 0  # GB/s of the memory
    capability: int = 0  # NVIDIA's compute capability
    cores: int = 0  # streaming multiprocessors
    float32_units: int = 128  # in each of them
    shared_kib: int = 228  # of shared memory in each
    l2_mib: float = 50

    @property
    def usable_gib(self):
        return 0.75 * self.gib if self.bandwidth else self.gib


CHIPS = {'v2': Chip(8, 60, 0.7), 'v3': Chip(16, 80, 0.94), 'v4': Chip(32, 90, 1.05), 'v5e': Chip(15.75, 90, 1.5),
         'v5p': Chip(95, 180, 1.75), 'v6e': Chip(31.25, 180, None), 'tpu7x': Chip(96, 200, None),
         'a100': Chip(79.3, 270, 1.41, 2039, 8, 108, float32_units=64, shared_kib=164, l2_mib=40),
         'h100': Chip(79.1, 400, 1.98, 3352, 9, 132),
         'h200': Chip(141, 400, 1.98, 4800, 9, 132),
         'b200': Chip(178.4, 800, 1.965, 7700, 10, 148, l2_mib=126.5)}
BETWEEN_HOSTS = 50  # GB/s that a GPU sends to another host: InfiniBand NDR

# What a GPU reaches: shares of its peak FLOP/s in matmuls and in attention, and of its memory's bandwidth in all else.
# One H200 took 11.8 + 3.4 + 9.0 ms for a step of 124M with 12 x 1024 tokens (BENCHMARKS.md), as these shares say.
REACHED = {'matmul': 0.78, 'attention': 0.24, 'other': 0.59}


def target(name, chip):
    """What the CUDA compiler has to know of a GPU, a GpuTargetConfigProto."""
    return f'''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: {chip.cores} fpus_per_core: {chip.float32_units} clock_rate_ghz: {chip.ghz}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {(chip.shared_kib - 1) * 2**10}
  shared_memory_per_core: {chip.shared_kib * 2**10} l2_cache_size: {int(chip.l2_mib * 2**20)}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth * 10**9} device_memory_size: {int(chip.gib * 2**30)}
  cuda_compute_capability {{ major: {chip.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name.upper()}"
'''


def open_topology(name):
    """The devices of a topology such as 'v5e:2x4', 'v5p:4x4x4' or 'h100:8', to compile for. Call it before JAX does
    anything else. Raises ValueError."""
    chip, _, shape = name.partition(':')
    if chip not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
        raise ValueError(f"topology = {name!r}: must be a chip and its number, such as 'h100:8', 'v5e:2x4' or "
                         f"'v5p:4x4x4'; the chips are {', '.join(CHIPS)}")
    is_gpu = CHIPS[chip].bandwidth > 0
    # ask for no device but the CPU, and let libtpu neither look for a TPU nor talk about it
    jax.config.update('jax_platforms', 'cpu')
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
                   'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost',
                   'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    try:
        if not is_gpu:
            more = {'chip_config_name': 'megacore'} if chip == 'v4' else {}
            return get_topology_desc(platform='tpu', topology_name=name, **more).devices
        n = math.prod(int(d) for d in shape.split('x'))
        hosts = max(1, n // 8)  # eight GPUs in each
        return get_topology_desc(platform='cuda', topology_name='', target_config=target(chip, CHIPS[chip]),
                                 topology=f'1x{hosts}x{n // hosts}').devices
    except Exception as e:  # the plugins raise all kinds
        package = 'jax-cuda13-plugin nvidia-cudnn-cu13' if is_gpu else 'libtpu'
        reason = str(e).splitlines()[0][:200]
        raise ValueError(f'topology = {name!r}: {reason}. The compilers for chips are in requirements-chips.txt '
                         f'(this one is {package})') from None



# ----------------------------------------------------------------------------------------------------------------------
# a compiled module's text

COLLECTIVES = {'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'collective-broadcast', 'ragged-all-to-all'}
# what names the computations that an instruction runs
CALLS = {'while': 'body', 'call': 'to_apply', 'fusion': 'calls', 'async-start': 'calls',
         'conditional': 'true_computation|false_computation|branch_computations'}
# what runs no kernel of its own; nor does what waits for another one to be done
NO_KERNEL = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id',
             'replica-id', 'opt-barrier', *CALLS} - {'fusion'}
VIEWS = {'bitcast', 'reshape', 'convert', 'copy', 'transpose'}  # whoever slices one needs a slice of its operand
SLICES = {'slice', 'dynamic-slice', 'gather'}
UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is written into the first


class UnknownText(ValueError):
    """A compiled module says something that this file does not understand: better no count than a wrong one."""


class Array(NamedTuple):
    elements: int
    bytes: int
    hbm_bytes: int  # what of it lies in HBM, the memory beside the chip: nothing of a TPU's S(1)


@dataclass
class Instruction:
    name: str
    shape: str
    op: str
    operands: list[str]
    line: str
    is_root: bool  # whether it is the result of its computation

    @cached_property
    def arrays(self):
        """The Arrays in its shape, such as '(f32[2,3]{1,0}, bf16[4]{0})'."""
        found = []
        for kind, dims, layout in re.findall(r'([\w<=]+)\[([^]]*)\](\{[^}]*\})?', self.shape):
            bits = re.fullmatch(r'pred|[a-z]+(\d+)\w*', kind)
            if not bits or not re.fullmatch(r'[\d,]*', dims):
                raise UnknownText(f'the type {kind}[{dims}] in {self.line.strip()[:100]}')
            n = math.prod(int(d) for d in dims.split(',') if d)
            size = n * max(int(bits[1] or 8) // 8, 1)
            found.append(Array(n, size, 0 if 'S(' in layout else size))
        return found

    @property
    def elements(self):
        return sum(array.elements for array in self.arrays)

    @property
    def hbm_bytes(self):
        return sum(array.hbm_bytes for array in self.arrays)

    @property
    def called(self):
        """The names of the computations that it runs."""
        how = CALLS.get(self.op, 'nothing')
        found = re.findall(rf'\b(?:{how})=(%?[\w.-]+|\{{[^}}]*\}})', self.line)
        return re.findall(r'[\w.-]+', ' '.join(found))

    @property
    def target(self):
        """What a custom call calls."""
        m = re.search(r'custom_call_target="([^"]*)"', self.line)
        return m[1] if m else ''


@dataclass
class Kernel:
    kind: str  # 'matmul', 'attention', 'other' or one of COLLECTIVES
    times: int  # how often the loops around it run it
    bytes: float  # that it reads and writes each time; of a collective, that a device sends
    flops: float  # of matmuls and attention, each time
    cycles: int  # the TPU compiler's estimate for each time
    group: int  # how many devices take part
    what: str  # the line of source that it comes from, the operation, and its shape


class Module:
    """A compiled module, from its text."""

    def __init__(self, text):
        self.computations = {}  # {name: {name: Instruction}}, in the order in which they run
        self.tables = {}  # of file names, lines and stack frames: {table: {id: entry}}
        computation = table = None
        for line in text.splitlines():
            if m := re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line):
                computation = self.computations[m[2]] = {}
                if m[1]:
                    self.entry = computation
            elif computation is not None and ' = ' in line:
                m = re.match(r'\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$', line)
                if not m:
                    raise UnknownText(f'the instruction {line.strip()[:100]}')
                operands = re.findall(r'%([\w.-]+)', re.split(r'\), [\w-]+=', m[5])[0])
                computation[m[2]] = Instruction(m[2], m[3], m[4], operands, line, bool(m[1]))
            elif re.fullmatch(r'[A-Z]\w+', line):
                table = self.tables[line] = {}
            elif table is not None and (m := re.match(r'(\d+) (.*)', line)):
                fields = re.findall(r'(\w+)=(\d+)', m[2])
                table[int(m[1])] = {key: int(value) for key, value in fields} or m[2].strip('"')

    def executed(self, computation, times=1, fused=False):
        """(instruction, its computation, times, fused) of all that a device executes. `times` counts the loops around
        it, and is None where that is unknown; `fused` says whether it is a part of another instruction."""
        for i in computation.values():
            yield i, computation, times, fused
            trips = self.trips(i) if i.op == 'while' else 1
            below = times * trips if times and trips else None
            for callee in i.called:
                yield from self.executed(self.computations[callee], below, fused or i.op == 'fusion')

    def trips(self, loop):
        """How often a loop runs, None if that is unknown."""
        if m := re.search(r'"known_trip_count": ?\{"n": ?"(\d+)"', loop.line):
            return int(m[1])
        # a TPU's loop, as lax.scan makes it: while i < n
        condition = self.computations[re.search(r'condition=%?([\w.-]+)', loop.line)[1]]
        limits = [i.line for i in condition.values() if i.op == 'constant' and i.shape.startswith('s32[]')]
        return int(re.search(r'constant\((\d+)\)', limits[0])[1]) if len(limits) == 1 else None

    def kernels(self, n_devices):
        """The Kernels that a device runs. Raises UnknownText."""
        found = []
        for i, computation, times, fused in self.executed(self.entry):
            kind = i.op.removesuffix('-start')
            is_collective = kind in COLLECTIVES
            if i.op in NO_KERNEL or i.op.endswith('-done') or (fused and not is_collective):
                continue
            if 'chain_id=' in i.line and 'AsyncCollectiveStart' not in [other.target for other in computation.values()]:
                continue  # a TPU goes on with a collective that another instruction began
            if times is None:
                raise UnknownText(f'how often a loop runs this: {i.line.strip()[:100]}')
            group, flops = 1, 0
            if is_collective:
                group = group_size(i.line, n_devices)
                n_bytes = sent_bytes(i, group)
            else:
                n_bytes = self.traffic(i, computation)
                flops = sum(product_flops(*product) for product in self.products(i, computation))
                kind = 'matmul' if any(self.products(i, computation)) else 'other'
            if i.target.startswith('__cudnn$fmha'):
                kind = 'attention'
                flops = attention_flops(i, computation)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.line)
            operation = re.search(r'op_name="(?:[^"]*/)?([^"]*)"', i.line)
            what = f"{self.source(i)} {operation[1] if operation else i.op} {re.sub('{.*?}', '', i.shape)}"
            found.append(Kernel(kind, times, n_bytes, flops, int(cycles[1]) if cycles else 0, group, what.strip()))
        return found

    def products(self, i, computation):
        """(instruction, its computation) of the matmuls in an instruction."""
        if i.op in ('dot', 'convolution') or i.target.startswith('__cublas'):
            yield i, computation
        if i.op == 'fusion':
            inside = self.computations[i.called[0]]
            for part in inside.values():
                yield from self.products(part, inside)

    def traffic(self, i, computation):
        """Bytes that a kernel reads and writes: its operands and results, but of what it slices only the slices, and of
        what it updates in place only the update."""
        if i.op.endswith('-start') and i.op != 'all-reduce-start':  # its result holds its operands, too
            share = i.arrays[1].elements / i.arrays[0].elements if i.op == 'slice-start' else 1
            return sum(array.hbm_bytes * (1 if k else share) for k, array in enumerate(i.arrays))
        scope, parts, names, results = computation, [i], i.operands, [i]
        if i.op == 'fusion':
            scope = self.computations[i.called[0]]
            parts = list(scope.values())
            parameters = [part for part in parts if part.op == 'parameter']
            names = [p.name for p in sorted(parameters, key=lambda p: int(re.search(r'parameter\((\d+)', p.line)[1]))]
            [root] = [part for part in parts if part.is_root]
            results = [scope[name] for name in root.operands] if root.op == 'tuple' else [root]
        updated = {}  # how much is written of a result that lies where an operand was
        for result in results:
            update = result
            while update.op == 'bitcast':
                update = operand(scope, update, 0)
            if update.op in UPDATES:
                written = operand(scope, update, UPDATES[update.op])
                updated[update.name] = updated[result.name] = written.elements / update.elements
        arrays = zip(results, i.arrays) if len(results) > 1 else [(results[0], i)]
        total = sum(array.hbm_bytes * updated.get(result.name, 1) for result, array in arrays)
        for k, name in enumerate(names):
            share = share_read(name, parts, scope, results, updated)
            total += operand(computation, i, k).hbm_bytes * share
        return total

    def source(self, i):
        """The line of source that an instruction comes from, outside of libraries; '' where the module does not say."""
        frame = re.search(r'stack_frame_id=(\d+)', i.line)
        place, file, parent = '', 'site-packages', int(frame[1]) if frame else 0
        while parent and 'site-packages' in file:
            frame = self.tables['StackFrames'][parent]
            location = self.tables['FileLocations'][frame['file_location_id']]
            file = self.tables['FileNames'][location['file_name_id']]
            place = f"{os.path.basename(file)}:{location['line']}"
            parent = frame['parent_frame_id'] - 1  # 1 stands for none
        return place


def milliseconds(kernel, chip, peak):
    """How long a kernel will take on a Chip with a peak of so many FLOP/s. On a TPU its compiler's cycles tell; without
    a clock that is 0."""
    if kernel.kind in COLLECTIVES:
        gb_per_s = BETWEEN_HOSTS if chip.bandwidth and kernel.group > 8 else chip.link
        return kernel.bytes / gb_per_s / 1e6
    if not chip.bandwidth:
        return kernel.cycles / chip.ghz / 1e6 if chip.ghz else 0
    if kernel.kind == 'other':
        return kernel.bytes / (REACHED['other'] * chip.bandwidth) / 1e6
    return kernel.flops / (REACHED[kernel.kind] * peak) * 1e3


def add_up(kernels, chip, peak, name_of, n=None):
    """{name: row} of the n kinds of kernels that take longest, where name_of(kernel) says which belong together."""
    rows = {}
    for k in kernels:
        row = rows.setdefault(name_of(k), dict(kernels=0, gb=0, tflop=0, mcycles=0, ms=0))
        each = dict(kernels=1, gb=k.bytes / 1e9, tflop=k.flops / 1e12, mcycles=k.cycles / 1e6,
                    ms=milliseconds(k, chip, peak))
        for column, number in each.items():
            row[column] += k.times * number
    longest = sorted(rows, key=lambda name: (rows[name]['ms'], rows[name]['mcycles']), reverse=True)
    return {name: rows[name] for name in longest[:n]}


def operand(computation, i, k):
    """Operand k of an instruction."""
    if i.operands[k] not in computation:
        raise UnknownText(f'{i.operands[k]} in {i.line.strip()[:100]}')
    return computation[i.operands[k]]


def share_read(name, parts, scope, results, updated):
    """How much of the array `name` the parts of a kernel read."""
    names, share = {name}, 0
    for part in parts:
        where = [k for k, operand_name in enumerate(part.operands) if operand_name in names]
        if where and part.op in VIEWS:
            names.add(part.name)
        elif where == [0] and part.op in SLICES:
            share += part.elements / operand(scope, part, 0).elements
        elif where == [0] and part.name in updated:
            share += updated[part.name] if part.op == 'scatter' else 0  # a scatter adds to what is there
        elif where:
            return 1
    return 1 if any(result.name in names for result in results) else min(share, 1)


def product_flops(i, computation):
    """FLOPs of a matmul; 0 of a TPU's, which are convolutions: its compiler says cycles."""
    if i.op == 'convolution':
        return 0
    m = re.search(r'lhs_contracting_dim(?:s=\{|ensions": ?\[)([^]}]*)', i.line)
    if not m:
        raise UnknownText(f'what a matmul sums over: {i.line.strip()[:100]}')
    dims = re.search(r'\[(.*?)\]', operand(computation, i, 0).shape)[1].split(',')
    return 2 * i.arrays[0].elements * math.prod(int(dims[int(d)]) for d in re.findall(r'\d+', m[1]))


def attention_flops(i, computation):
    """FLOPs of cuDNN's FlashAttention: two matmuls forward and five backward, half of each if the future is masked."""
    scores = re.search(r'"intermediate_tensor_shape": ?\{[^[]*"dimensions": ?\[([^]]*)\]', i.line)
    mask = re.search(r'"mask_type": ?"(CAUSAL|NO_MASK)"', i.line)
    if not scores or not mask or re.search(r'"sliding_window_length": ?[1-9]', i.line):
        raise UnknownText(f'an attention: {i.line.strip()[:100]}')
    B, nh, T, S = map(int, re.findall(r'\d+', scores[1]))
    n_matmuls = 5 if 'Backward' in i.target else 2
    flops = n_matmuls * 2 * operand(computation, i, 0).elements * S  # q is (B, T, nh, hs)
    return flops / 2 if mask[1] == 'CAUSAL' else flops


def sent_bytes(i, n):
    """What a device sends for a collective among n, by the ring algorithms: (n - 1) / n of the whole, twice that for an
    all-reduce."""
    kind = i.op.removesuffix('-start')
    arrays = i.arrays
    if i.op != kind and kind != 'all-reduce':  # (what goes in, what comes out, ...)
        arrays = arrays[len(i.operands):2 * len(i.operands)]
    size = sum(array.bytes for array in arrays)
    if kind in ('collective-permute', 'collective-broadcast'):
        return size
    whole = size * n if kind == 'reduce-scatter' else size  # its result is a device's part
    return whole * (n - 1) / n * (2 if kind == 'all-reduce' else 1)


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
            return math.prod(int(sizes[axis]) for axis in axes)
    if text.startswith('{}'):
        return n_devices
    if 'source_target_pairs=' in line:
        return 2
    raise UnknownText(f'the groups of a collective: {text[:100]}')
