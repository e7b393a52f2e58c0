"""
What there is to compute with: devices, the mesh, which kernels pay there, memory, and compiling for it.
"""
import contextlib
import ctypes
import math
import os
import platform
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import psutil
from jax.sharding import AxisType

# Peak bfloat16 matmul FLOP/s of a device, without sparsity, from the makers' data sheets. The keys
# are how jax.Device.device_kind begins.
PEAK_FLOPS = {'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12,
              'NVIDIA B200': 2250e12, 'NVIDIA L4': 121e12, 'TPU v2': 22.5e12, 'TPU v3': 61.5e12,
              'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12,  # v5e before v5p
              'TPU v6 lite': 918e12, 'TPU7x': 1153.5e12}


# JAX reads its settings from the environment, too, and these must be as they are
RELIED_ON = {'jax_enable_x64': False, 'jax_numpy_rank_promotion': 'allow', 'jax_numpy_dtype_promotion': 'standard',
             'jax_transfer_guard': None}


def find_devices(kind=''):
    """All devices of a kind, 'cpu', 'gpu' or 'tpu'; of the best kind that JAX finds for ''; the only
    GPU with this number for 'gpu:1'. 'cuda' is another name of 'gpu', as in PyTorch. Only
    join_processes() may run before. Raises ValueError if there are none."""
    for name, value in RELIED_ON.items():
        here = getattr(jax.config, name)
        if getattr(here, 'value', here) != value:
            print(f'warning: {name.upper()} in the environment is ignored', file=sys.stderr)
            jax.config.update(name, value)
    platform, _, number = kind.partition(':')
    platform = platform if number.isdecimal() else kind
    if platform == 'mps':  # PyTorch's name of a Mac's GPU
        print("warning: device = 'mps': JAX has no such device, so this takes the best that it finds",
              file=sys.stderr)
    elif platform:
        jax.config.update('jax_platforms', {'gpu': 'cuda'}.get(platform, platform))
    if number and platform in ('gpu', 'cuda'):
        jax.config.update('jax_cuda_visible_devices', number)
    asked = f'device = {kind!r}' if kind else f'JAX_PLATFORMS = {jax.config.jax_platforms!r} in the environment'
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'{asked}: JAX finds no such device here ({one_line(e)}). README.md says what to install for '
                         'a GPU or a TPU') from None
    if devices[0].platform == 'cpu' and memory_left() < 0:  # XLA would abort
        raise ValueError(f'JAX itself takes all of the {memory_limit() / 2**30:.1f} GiB of memory that this process '
                         'may use')
    return devices


def peak_flops(devices):
    """Peak FLOP/s of these devices together, or None where it is unknown."""
    for kind, flops in PEAK_FLOPS.items():
        if devices[0].device_kind.startswith(kind):
            return len(devices) * flops


def best_dtype(devices, kernels=''):
    """What to train in: bfloat16, but float32 on a CPU that has no bfloat16 instructions, or no kernels, without which
    XLA's bfloat16 is slow there."""
    if devices[0].platform != 'cpu':
        return 'bfloat16'
    try:
        fast = kernels != 'plain' and ' avx512_bf16 ' in Path('/proc/cpuinfo').read_text()
    except OSError:
        fast = False
    return 'bfloat16' if fast else 'float32'


def choose_kernels(config, devices, flash=True, kernels=''):
    """(config, text): a GPTConfig with the kernels of kernels.py that pay on these devices, or with none for 'plain'.
    `flash` allows FlashAttention, where the model and the devices can have it. The text is for the log."""
    if kernels == 'plain':
        return replace(config, kernels='plain'), ', plain functions'
    platform, text = devices[0].platform, ''
    if platform == 'cpu':
        kernels = 'cpu' if len(devices) == 1 else 'cpus'
    elif platform == 'tpu':
        kernels = 'splash' if flash and splash_pays(config) else 'tpu'
        text = ", JAX's splash attention" if kernels == 'splash' else ''
    else:
        why_not = '' if flash else 'flash = False'
        why_not = why_not or no_cudnn(config, devices[0])
        kernels = 'gpu' if why_not else 'cudnn'
        text = f', no FlashAttention ({why_not})' if why_not else ", cuDNN's FlashAttention"
    try:
        from kernels import edited  # here, because a plain model needs no kernels.py
    except ImportError:
        return replace(config, kernels='plain'), ', plain functions (there is no kernels.py)'
    if names := edited(kernels):
        text = '' if 'attention' in names else text  # then it is not FlashAttention that runs
        text += f'; edited in model.py, so without their kernels: {", ".join(names)}'
    return replace(config, kernels=kernels), text


def splash_pays(config):
    """Whether splash attention, JAX's FlashAttention for TPUs, is better there than attention in blocks, which needs
    far more memory for long sequences."""
    return config.block_size > 2048 and config.block_size % 128 == 0 and not config.dropout


def no_cudnn(config, device):
    """Why cuDNN's FlashAttention cannot compute a model on a device, '' if it can."""
    capability = str(getattr(device, 'compute_capability', ''))  # such as 9.0; AMD's are gfx...
    if not re.fullmatch(r'\d+\.\d+', capability) or float(capability) < 8:
        return f'{device.device_kind} is not an NVIDIA GPU of the A100 or later'
    if config.dtype == 'float32' or config.dropout or config.head_size not in range(8, 129, 8):
        return (f'dtype = {config.dtype}, dropout = {config.dropout}, head_size = {config.head_size}: it wants '
                '16 bits, 0, and a multiple of 8 up to 128')
    return ''


def make_mesh(devices, data=-1, tensor=1):
    """A mesh of devices with the axes `data` and `tensor`; data = -1 takes all that are left.
    Raises ValueError if the numbers do not fit."""
    data = len(devices) // tensor if data == -1 else data
    if data * tensor != len(devices):
        raise ValueError(f'mesh_data = {data} times mesh_tensor = {tensor} is not {len(devices)}, '
                         'the number of devices')
    return jax.make_mesh((data, tensor), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2,
                         devices=devices)


def one_line(error):
    """The type of an error and the first line of its text."""
    return f'{type(error).__name__}: {error}'.splitlines()[0].rstrip(': ')


# -----------------------------------------------------------------------------
# compiling


def keep_compiled():
    """Keeps compiled programs in the user's cache directory, so that the next start is faster."""
    cache = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(cache):  # a relative path means nothing there, says XDG
        cache = os.path.expanduser('~/.cache')
    # one folder for each host: code for one CPU may not run on another
    folder = os.path.join(cache, 'nanogpt-jax', platform.node())
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    warnings.showwarning = show_warning


def show_warning(message, *more, _show=warnings.showwarning, **how):
    """Shows a warning. But where JAX says that a program it kept cannot be read, it compiles, and would warn at each
    start: so the program is forgotten, without a word."""
    damaged = re.match(r"Error reading persistent compilation cache entry for '(.+?)'", str(message))
    if not damaged:
        return _show(message, *more, **how)
    for path in Path(jax.config.jax_compilation_cache_dir).glob(f'{damaged[1]}-*'):
        path.unlink(missing_ok=True)


def side_by_side(*functions):
    """Calls functions that compile and returns their results. On a CPU two run at a time. GPUs and
    TPUs do one after the other, because their compilers choose code by its speed on the device."""
    with ThreadPoolExecutor(2 if jax.default_backend() == 'cpu' else 1) as threads:
        results = list(threads.map(lambda function: function(), functions))
    if sys.platform == 'linux':  # the compiler leaves up to a gigabyte that the C library would keep
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
    return results


def memory_use(program):
    """Bytes that a compiled program needs on a device: for its arguments, between them and its
    results, and for results that are not in the memory of an argument."""
    use = program.memory_analysis()
    return dict(state=use.argument_size_in_bytes, activations=use.temp_size_in_bytes,
                new_state=use.output_size_in_bytes - use.alias_size_in_bytes)


def memory_limit(root='/'):
    """Bytes of memory that this process may use: the machine's, or what a container's cgroup or `ulimit -v` leaves of
    it. A process that uses more is killed without a word. Tests give another `root`."""
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):  # not Linux
        # a line is 0::/a/b, or 4:memory:/a/b in the older version of cgroups; the limits of a and of / count, too
        for line in Path(root, 'proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            folder, name = Path(root, 'sys/fs/cgroup'), 'memory.max'
            if controllers:
                folder, name = folder / controllers, 'memory.limit_in_bytes'
            folder /= path.lstrip('/')
            files = [parent / name for parent in (folder, *folder.parents)]
            texts = [file.read_text().strip() for file in files if file.exists()]
            limits += [int(text) for text in texts if text.isdecimal()]  # not 'max'
    process = psutil.Process()
    if hasattr(process, 'rlimit'):  # of `ulimit -v`, addresses that have no memory take a part
        addresses, memory = process.rlimit(psutil.RLIMIT_AS)[0], process.memory_info()
        limits += [addresses - memory.vms + memory.rss] if addresses != psutil.RLIM_INFINITY else []
    return min(limits)


def memory_left():
    """Bytes of memory_limit() that are left for arrays. To compile and to save takes 0.25 GiB of it."""
    return memory_limit() - psutil.Process().memory_info().rss - 2**28


def free_memory(device):
    """Bytes that a device has left; infinity where it does not tell."""
    if device.platform == 'cpu':
        return min(memory_left(), psutil.virtual_memory().available)
    stats = device.memory_stats() or {}
    return stats.get('bytes_limit', math.inf) - stats.get('bytes_in_use', 0)


def compile_for(mesh, lowered):
    """Compiles a lowered program for a mesh. Raises MemoryError if it needs more than a device has, or a process on a
    CPU may use."""
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    effort = {}
    if on_cpu and 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
        # less effort makes the same speed on a CPU, in three quarters of the compile time
        effort = {'xla_backend_optimization_level': 1, 'xla_llvm_disable_expensive_passes': True}
    if on_cpu:
        limit = memory_left()
    else:
        limit = (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit', math.inf)
    with memory_errors():
        program = lowered.compile(compiler_options=effort)
    # simulated devices share the memory
    needed = sum(memory_use(program).values()) * (len(mesh.local_devices) if on_cpu else 1)
    if needed > limit:
        raise out_of_memory(f'needs {needed / 2**30:.2f} GiB, a device has {limit / 2**30:.2f}')
    return program


def out_of_memory(reason):
    return MemoryError(f'out of memory ({reason}): lower batch_size and raise gradient_accumulation_steps '
                       'as much, or lower block_size or the size of the model; with several devices, try '
                       '--fsdp=True')


@contextlib.contextmanager
def memory_errors():
    """Turns XLA's errors about memory into a MemoryError that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        raise out_of_memory(str(e).splitlines()[0]) from None


@contextlib.contextmanager
def profiled(n, n_steps, folder):
    """Around step n of the n_steps of a run: writes a trace of five steps to the folder, if there is one, of the steps
    10 to 14 or the last ones of a shorter run."""
    first = max(min(10, n_steps - 7), 0)
    if folder and n == first:
        jax.profiler.start_trace(folder)
    if folder and n == first + 6:  # by now the step before last has been waited for
        jax.profiler.stop_trace()
    with jax.profiler.StepTraceAnnotation('train', step_num=n):
        yield
    if folder and n == n_steps - 1 < first + 6:
        jax.profiler.stop_trace()
