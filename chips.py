"""
Chips that you don't have: `python bench.py --mode=compile --topology=v5e:2x4` says what a step will cost on them. JAX's
compilers for TPUs (libtpu) and NVIDIA GPUs (the CUDA plugin) run on any Linux machine and make a chip's own program.
"""
import math
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.experimental.topologies import get_topology_desc


class Chip(NamedTuple):
    """A device, from its maker's data sheets. A device of a TPU v2, v3 or 7x is half a chip."""
    gib: float  # of memory
    link: int  # GB/s that it can send along a ring
    ghz: float | None  # the clock, of a TPU's matrix units
    bandwidth: int = 0  # GB/s of the memory; this and what follows is for GPUs alone
    capability: int = 0  # NVIDIA's compute capability
    cores: int = 0  # streaming multiprocessors
    shared_kib: int = 228  # of shared memory in each


CHIPS = {'v2': Chip(8, 60, 0.7), 'v3': Chip(16, 80, 0.94), 'v4': Chip(32, 90, 1.05), 'v5e': Chip(15.75, 90, 1.5),
         'v5p': Chip(95, 180, 1.75), 'v6e': Chip(31.25, 180, None), 'tpu7x': Chip(96, 200, None),
         'a100': Chip(79.3, 270, 1.41, 2039, 8, 108, shared_kib=164), 'h100': Chip(79.1, 400, 1.98, 3352, 9, 132),
         'h200': Chip(141, 400, 1.98, 4800, 9, 132), 'b200': Chip(178.4, 800, 1.965, 7700, 10, 148)}
BETWEEN_HOSTS = 50  # GB/s that a GPU sends to another host: InfiniBand NDR

# What a GPU reaches: shares of its peak FLOP/s in matmuls and in attention, and of its memory's bandwidth in all else.
# One H200 took 11.8 + 3.4 + 9.0 ms for a step of 124M with 12 x 1024 tokens (BENCHMARKS.md), as these shares say.
REACHED = {'matmul': 0.78, 'attention': 0.24, 'other': 0.59}


def target(name, chip):
    """What the CUDA compiler has to know of a GPU, a GpuTargetConfigProto."""
    return f'''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 l2_cache_size: {50 * 2**20}
  core_count: {chip.cores} fpus_per_core: 128 clock_rate_ghz: {chip.ghz}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {(chip.shared_kib - 1) * 2**10}
  shared_memory_per_core: {chip.shared_kib * 2**10} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth * 10**9} device_memory_size: {int(chip.gib * 2**30)}
  cuda_compute_capability {{ major: {chip.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name.upper()}"
'''


def open_topology(name):
    """The devices of a topology such as 'v5e:2x4' or 'h100:8'. Call it before JAX does anything. Raises ValueError."""
    chip, _, shape = name.partition(':')
    if chip not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
        raise ValueError(f"topology = {name!r}: must be a chip and its number, such as 'h100:8', 'v5e:2x4' or "
                         f"'v5p:4x4x4'; the chips are {', '.join(CHIPS)}")
    # ask for no device but the CPU, and let libtpu neither look for a TPU nor talk about it
    jax.config.update('jax_platforms', 'cpu')
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
                   'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost',
                   'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    try:
        if not CHIPS[chip].bandwidth:
            more = {'chip_config_name': 'megacore'} if chip == 'v4' else {}
            return get_topology_desc(platform='tpu', topology_name=name, **more).devices
        n = math.prod(int(d) for d in shape.split('x'))
        hosts = max(1, n // 8)  # eight GPUs in each
        return get_topology_desc(platform='cuda', topology_name='', target_config=target(chip, CHIPS[chip]),
                                 topology=f'1x{hosts}x{n // hosts}').devices
    except Exception as e:  # the plugins raise all kinds
        reason = str(e).splitlines()[0][:200]
        raise ValueError(f'topology = {name!r}: {reason}. The compilers are in requirements-chips.txt') from None


# ----------------------------------------------------------------------------------------------------------------------
# a compiled module's text

# What each of n devices sends for a collective, in a ring: this many times the bytes of its result
COLLECTIVES = {'all-reduce': lambda n: 2 * (n - 1) / n, 'reduce-scatter': lambda n: n - 1,
               'all-gather': lambda n: (n - 1) / n, 'all-to-all': lambda n: (n - 1) / n,
               'collective-permute': lambda n: 1, 'collective-broadcast': lambda n: 1}
# what names the computation that an instruction runs; which one a conditional runs, nobody knows
CALLS = {'while': 'body', 'call': 'to_apply', 'fusion': 'calls', 'async-start': 'calls', 'conditional': 'unknown'}
NO_KERNEL = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id',
             'replica-id', 'opt-barrier', 'async-done', 'while', 'call'}
VIEWS = {'bitcast', 'reshape', 'convert', 'copy', 'transpose'}  # whoever slices one needs a slice of its operand
SLICES = {'slice', 'dynamic-slice', 'gather'}
UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is written into the first


@dataclass
class Kernel:
    kind: str  # 'matmul', 'attention', 'other' or one of COLLECTIVES
    what: str  # the line of source that it comes from, the operation, and its shape
    times: int  # how often the loops around it run it; what follows is for each time
    bytes: float  # that it reads and writes, not counted on TPUs; of a collective, that a device sends
    group: int = 1  # how many devices take part
    flops: float = 0  # of matmuls and attention on GPUs
    cycles: int = 0  # that a TPU's compiler expects


@dataclass
class Instruction:
    """A line such as '%sum = f32[2,3]{1,0} add(%a, %b), metadata={...}'."""
    shape: str
    op: str
    operands: list[str]
    line: str

    @property
    def arrays(self):
        """(type, dimensions) of each array in its shape, which may be a tuple."""
        found = re.findall(r'(\w+)\[(.*?)\]', self.shape)
        return [(kind, [int(d) for d in dims.split(',') if d]) for kind, dims in found]

    @property
    def bytes(self):
        bits = lambda kind: 8 if kind == 'pred' else int(re.search(r'\d+', kind)[0])
        return sum(bits(kind) * math.prod(dims) for kind, dims in self.arrays) // 8

    def find(self, pattern, default=None):
        """What a pattern finds in its line."""
        found = re.search(pattern, self.line)
        return found[1] if found else default


def read_kernels(text):
    """The Kernels that a device runs, from the text of a compiled module. Raises ValueError where the text says what
    this file does not understand: better no count than a wrong one."""
    module = Module()
    try:
        module.parse(text)
        return list(module.kernels(module.entry))
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f'chips.py cannot read this line of the compiled module: {module.line[:200]}') from e


class Module:
    def parse(self, text):
        self.computations = {}  # {name: {name: Instruction}}, in the order in which they run
        for self.line in text.splitlines():
            if m := re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', self.line):
                computation = self.computations[m[2]] = {}
                if m[1]:
                    self.entry = computation
            elif self.computations and ' = ' in self.line:
                m = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$', self.line)
                operands = re.findall(r'%([\w.-]+)', re.split(r'\), [\w-]+=', m[4])[0])
                computation[m[1]] = Instruction(m[2], m[3], operands, self.line)
        self.on_tpu = '"estimated_cycles"' in text
        # {stack frame: the line of source that it comes from, outside of libraries}; callers come first
        self.sources = {}
        files = dict(re.findall(r'^(\d+) "(.*\.py)"$', text, re.M))
        places = re.findall(r'^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)', text, re.M)
        places = {place: (files.get(file, ''), line) for place, file, line in places}
        for frame, place, caller in re.findall(r'^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)', text, re.M):
            file, line = places[place]
            caller = self.sources.get(int(caller) - 1, '')
            self.sources[int(frame)] = caller if 'site-packages' in file else f'{os.path.basename(file)}:{line}'

    def trips(self, loop):
        """How often a loop runs."""
        n = loop.find(r'"known_trip_count": ?\{"n": ?"(\d+)"')
        if not n:  # a TPU's loop, as lax.scan makes it: while i < n
            condition = self.computations[loop.find(r'condition=%([\w.-]+)')]
            [n] = [i.find(r's32\[\].* constant\((\d+)\)') for i in condition.values() if i.op == 'constant']
        return int(n)

    def kernels(self, computation, times=1, whole=None):
        """Yields those of a computation that runs so many times. It may be a part of a kernel, the `whole`."""
        for i in computation.values():
            self.line = i.line
            kernel = whole
            kind = i.op.removesuffix('-done')
            if kind in COLLECTIVES:
                # where a TPU goes on with a collective that another instruction began, it does not count again
                if 'chain_id=' not in i.line or any('AsyncCollectiveStart' in o.line for o in computation.values()):
                    group = group_size(i if i.op == kind else computation[i.operands[0]])
                    yield Kernel(kind, self.what(i), times, i.bytes * COLLECTIVES[kind](group), group)
            elif not whole and i.op not in NO_KERNEL and not i.op.endswith('-start'):
                kernel = Kernel('other', self.what(i), times, 0 if self.on_tpu else self.traffic(i, computation))
                kernel.cycles = int(i.find(r'"estimated_cycles":"(\d+)"', 0))
                yield kernel
            is_attention = '"__cudnn$fmha' in i.line
            if is_attention or '"__cublas' in i.line or i.op in ('dot', 'convolution'):
                kernel.kind = 'attention' if is_attention else 'matmul'
                kernel.flops += 0 if self.on_tpu else flops(i, computation)
            if i.op in CALLS:
                callee = self.computations[i.find(rf'\b{CALLS[i.op]}=%([\w.-]+)')]
                below = times * self.trips(i) if i.op == 'while' else times
                yield from self.kernels(callee, below, kernel)

    def what(self, i):
        source = self.sources.get(int(i.find(r'stack_frame_id=(\d+)', 0)), '')
        operation = i.find(r'op_name="(?:[^"]*/)?([^"]*)"', i.op)
        return f"{source} {operation} {re.sub('{.*?}', '', i.shape)}".strip()

    def traffic(self, i, scope):
        """Bytes that a kernel reads and writes. Of what a fusion only slices or updates in place, it is that part."""
        if i.op != 'fusion':
            return i.bytes + sum(scope[name].bytes for name in i.operands)
        inside = self.computations[i.find(r'calls=%([\w.-]+)')]
        total = 0
        for name, part in inside.items():
            if part.op == 'parameter':
                operand = i.operands[int(part.find(r'parameter\((\d+)'))]
                total += scope[operand].bytes * share_read(name, inside)
        [root] = [part for part in inside.values() if 'ROOT %' in part.line]
        for result in [inside[name] for name in root.operands] if root.op == 'tuple' else [root]:
            if result.op in UPDATES:
                result = inside[result.operands[UPDATES[result.op]]]
            total += result.bytes
        return total


def share_read(name, inside):
    """How much of the array `name` the computation of a fusion reads."""
    users = {key: user for key, user in inside.items() if name in user.operands}
    share = 0 if users else 1  # nobody uses what is the result
    for key, user in users.items():
        if user.op in VIEWS:
            share += share_read(key, inside)
        elif user.operands[0] != name or user.op not in SLICES | UPDATES.keys():
            share = 1
        elif user.op != 'dynamic-update-slice':
            part = inside[user.operands[2]] if user.op == 'scatter' else user  # a scatter adds to what is there
            share += part.bytes / inside[name].bytes
    return min(share, 1)


def flops(i, scope):
    """Of a matmul, or of cuDNN's FlashAttention: two matmuls forward, five backward, half of each masked."""
    dims = scope[i.operands[0]].arrays[0][1]
    if '"__cudnn$fmha' in i.line:
        B, T, nh, hs = dims
        return (5 if 'Backward' in i.line else 2) * B * nh * T * T * hs
    summed = i.find(r'lhs_contracting_dim(?:s=\{|ensions": ?\[)([^]}]*)')
    return 2 * math.prod(i.arrays[0][1]) * math.prod(dims[int(d)] for d in re.findall(r'\d+', summed))


def group_size(i):
    """How many devices take part in a collective together."""
    if size := i.find(r'replica_groups=\[\d+,(\d+)\]'):  # [groups,size]<=[...]
        return int(size)
    if group := i.find(r'(?:replica_groups|source_target_pairs)=\{\{(.*?)\}'):  # {{0,1},{2,3}}
        return len(group.split(','))
    axes = i.find(r'replica_groups=mesh\[.*?\{(.*?)\}').split(',')  # mesh['data'=4,'tensor'=2] {'data'}
    return math.prod(int(i.find(rf'{axis}=(\d+)')) for axis in axes)


def milliseconds(kernel, chip, peak):
    """How long a kernel will take on a Chip with a peak of so many FLOP/s; 0 on a TPU whose clock is unknown."""
    if kernel.kind in COLLECTIVES:
        return kernel.bytes / (BETWEEN_HOSTS if chip.bandwidth and kernel.group > 8 else chip.link) / 1e6
    if not chip.bandwidth:
        return kernel.cycles / chip.ghz / 1e6 if chip.ghz else 0
    if kernel.kind == 'other':
        return kernel.bytes / (REACHED['other'] * chip.bandwidth) / 1e6
    return kernel.flops / (REACHED[kernel.kind] * peak) * 1e3


def add_up(kernels, chip, peak, name_of):
    """A row for all kernels with the same name_of(kernel), without zeros; the rows that take longest come first."""
    rows = {}
    for k in kernels:
        row = rows.setdefault(name_of(k), dict(ms=0.0, gb=0.0, mcycles=0.0, kernels=0, what=name_of(k)))
        row['ms'] += k.times * milliseconds(k, chip, peak)
        row['gb'] += k.times * k.bytes / 1e9
        row['mcycles'] += k.times * k.cycles / 1e6
        row['kernels'] += k.times
    longest = sorted(rows.values(), key=lambda row: (row['ms'], row['mcycles']), reverse=True)
    return [{name: x for name, x in row.items() if x or name == 'ms'} for row in longest]
