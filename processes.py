"""
Many processes, one for each host or each GPU: how they find each other, agree, and stop together.
"""
import atexit
import contextlib
import functools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather, sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

from devices import one_line


def find_others(coordinator, num_processes, process_id):
    """(coordinator, num_processes, process_id, numbers of the GPUs that are this process's, None for all): as given, or
    without a coordinator as JAX learns them from Slurm, Open MPI, Kubernetes or a TPU pod. num_processes is 1 where
    nobody tells of others. Raises RuntimeError where somebody does, but process 0 is not to be found."""
    env = os.environ
    given = (coordinator, num_processes, process_id) if coordinator else ('later', None, None)
    try:
        from jax._src.clusters import ClusterEnv  # jax.distributed.initialize() uses it, too late for us
        detect = lambda *known: ClusterEnv.auto_detect_unset_distributed_params(*known, None, None, 300)
        if 'SLURM_STEP_NUM_TASKS' in env and 'OMPI_COMM_WORLD_SIZE' not in env:
            # JAX would wait for all tasks of a job in the shell of salloc, and give all steps of a job the same port
            env['SLURM_NTASKS'] = env['SLURM_STEP_NUM_TASKS']
            port = 61440 + (int(env['SLURM_JOB_ID']) + 61 * int(env['SLURM_STEP_ID'])) % 4096
            env.setdefault('JAX_COORDINATOR_PORT', str(port))
        with warnings.catch_warnings(action='ignore'):
            _, num_processes, process_id, gpus = detect(*given)
    except Exception as e:
        if not coordinator:
            print('warning: this process trains alone, because JAX does not understand the cluster here: '
                  f'{one_line(e)}', file=sys.stderr)
        return coordinator, num_processes, process_id, None
    if num_processes in (None, 1):
        return '', 1, 0, None
    # JAX means one GPU for each process. But a process may have all of a host's, or see none but its own.
    processes_here = env.get('OMPI_COMM_WORLD_LOCAL_SIZE') or env.get('SLURM_STEP_TASKS_PER_NODE', '')
    if re.fullmatch(r'1(\(x\d+\))?', processes_here) or re.fullmatch('[^,]+', env.get('CUDA_VISIBLE_DEVICES', '')):
        gpus = None
    if not coordinator:
        try:
            coordinator = env.get('JAX_COORDINATOR_ADDRESS') or detect(None, num_processes, process_id)[0]
        except Exception as e:
            raise RuntimeError(f'process {process_id} does not find process 0: {one_line(e)}') from None
    return coordinator, num_processes, process_id, gpus


def join_processes(coordinator='', num_processes=1, process_id=0, patience=300):
    """Joins the processes that train together: process `process_id` of `num_processes`, with the address of process 0,
    HOST:PORT, as the `coordinator`. Without one, a cluster may tell. One process alone does nothing here. Must run
    before JAX does anything else. Raises ValueError, or RuntimeError if the others do not come within `patience`
    seconds."""
    if not re.fullmatch(r'.+:\d+' if num_processes > 1 else r'(.+:\d+)?', coordinator):
        raise ValueError(f'coordinator = {coordinator!r}: num_processes = {num_processes} needs '
                         '--coordinator=HOST:PORT, the address of process 0')
    if jax.distributed.is_initialized():  # as when a notebook runs train.py once more
        return
    coordinator, num_processes, process_id, gpus = find_others(coordinator, num_processes, process_id)
    if num_processes == 1:
        return
    host, _, port = coordinator.rpartition(':')
    if process_id == 0:
        try:
            socket.create_server(('', int(port))).close()
        except (OSError, OverflowError) as e:  # JAX would share the port with the other program, and harm both
            raise ValueError(f'coordinator = {coordinator!r}: process 0 cannot have this port ({e})') from None
    who = f'process {process_id} of {num_processes}'
    print(f'{who} waits for the others at {coordinator}', flush=True)

    # JAX waits in C++, where it does not hear Ctrl-C, and aborts when it has waited too long. So it gets a thread, and
    # may wait forever.
    joined = Future()

    def join():
        try:
            jax.distributed.initialize(coordinator, num_processes, process_id, gpus, 'deactivate', 10**6,
                                       heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60)
            joined.set_result(True)
        except Exception as e:
            joined.set_exception(e)

    threading.Thread(target=join, daemon=True).start()
    for second in range(1, patience + 1):
        with contextlib.suppress(TimeoutError):
            return joined.result(timeout=1)
        if second % 30 == 0:
            print(f'{who} has waited for the others at {coordinator} for {second} s', flush=True)
    atexit.register(os._exit, 2)  # JAX, which still waits, would have something to say at the end
    why = 'not all the others came'
    if process_id > 0:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        except OSError as e:
            why = f'process 0 is not there ({e})'
    raise RuntimeError(f'{who} has waited for {patience} s at {coordinator}, but {why}')


# settings in which processes that train together may differ; out_dir is compared by what is in it
OF_THE_PROCESS = {'process_id', 'coordinator', 'device', 'out_dir', 'compile_cache', 'profile', 'wandb_log',
                  'wandb_project', 'wandb_run_name'}


def check_alike(settings, *files):
    """Raises ValueError in all processes if they differ in a setting, in JAX's version, or in one of the `files`, which
    are pairs of a folder and a pattern, by its size or its first MiB. They would train on, with wrong numbers."""
    if jax.process_count() == 1:
        return
    facts = {key: value for key, value in settings.items() if key not in OF_THE_PROCESS} | {'jax': jax.__version__}
    for folder, pattern in files:
        for path in sorted(Path(folder).glob(pattern)):
            with open(path, 'rb') as f:
                content = f'{path.stat().st_size:,} bytes, CRC {zlib.crc32(f.read(2**20)):08x}'
            facts[path.relative_to(folder).as_posix()] = content
    lines = '\n'.join(f'{name} = {fact!r}' for name, fact in facts.items()).encode()
    everyones = process_allgather(np.frombuffer(lines.ljust(2**14)[:2**14], np.uint8))
    first, *others = (bytes(lines).decode(errors='replace').strip().splitlines() for lines in everyones)
    for i, lines in enumerate(others, 1):
        if lines != first:
            here = ', '.join(line for line in first if line not in lines)
            there = ', '.join(line for line in lines if line not in first)
            raise ValueError(f'process 0 has {here or "less"}, and process {i} has {there or "less"}: processes that '
                             'train together need the same settings and files')


def check_shared(out_dir):
    """Raises ValueError in all processes if they do not see the same out_dir, into which all of them write checkpoints.
    Process 0 makes a file for a moment, and the others look for it."""
    if jax.process_count() == 1 or '://' in out_dir:  # such as gs://, which is the same everywhere
        return
    folder = Path(out_dir).absolute()
    folders = [folder, *folder.parents]  # out_dir may be about to be created
    here = next(i for i, folder in enumerate(folders) if folder.is_dir())
    here, number = broadcast_one_to_all(np.array([here, int.from_bytes(os.urandom(3))]))
    file = folders[min(here, len(folders) - 1)] / f'.nanogpt-{number}'
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # then nobody sees it
            file.touch()
    sync_global_devices('out_dir')
    for _ in range(20):  # some disks take a moment
        seen = file.exists()
        if seen:
            break
        time.sleep(0.1)
    blind = np.flatnonzero(~process_allgather(np.array(seen)))
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    if len(blind):
        raise ValueError(f'out_dir = {out_dir!r}: process {blind[0]} does not see what process 0 writes there: put it '
                         'on a disk that all of them share')


def only_process_0_prints():
    """Silences the other processes: each of them would print the same."""
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, 'w')
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def max_over_processes(number, mesh):
    """The highest `number`, an int, of all processes. With many of them it is an array, so that you
    can read it later and do not wait for the others now."""
    if jax.process_count() == 1:
        return number
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    mine = lambda index: np.full(1, number, np.int32)
    return array_max(jax.make_array_from_callback((mesh.size,), sharding, mine))


@jax.jit
def array_max(numbers):
    return numbers.max()


TIME_IS_UP = 14  # the number of SIGALRM, which Windows has not


class StopSignal:
    """Inside of a `with`, catches Ctrl-C (SIGINT), SIGTERM and, where they exist, the SIGHUP of a terminal that is
    closed and the SIGUSR1, SIGUSR2 and SIGXCPU of job queues, so that the loop can finish its iteration and save. A
    second SIGINT or SIGTERM ends the process at once. It also stops when the time, in seconds of time.monotonic(), is
    up."""

    def __init__(self, mesh, deadline=math.inf):
        self.mesh, self.number, self.asked = mesh, 0, 0
        self.deadline = deadline
        self.why = ''  # what is broken, if that is the reason to stop
        self.before = {}

    def __enter__(self):
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'):
            number = getattr(signal, name, None)
            # `nohup` starts a process that ignores SIGHUP, and so it stays
            if number and not (name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN):
                with contextlib.suppress(ValueError):  # a thread of a notebook hears no signals
                    self.before[number] = signal.signal(number, self.catch) or signal.SIG_DFL
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def output_closed(self):
        """Nobody reads the output any more. Not every system has a signal for that."""
        self.catch(getattr(signal, 'SIGPIPE', signal.SIGTERM))

    def because(self, why):
        """Something is broken: stop and save as for a signal."""
        self.number = self.number or signal.SIGTERM
        self.why = self.why or why

    def catch(self, number, frame=None):
        self.number = self.number or number
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @property
    def name(self):
        return 'max_minutes' if self.number == TIME_IS_UP else signal.Signals(self.number).name

    def received(self):
        """The signal that some process has caught, 0 if none. All processes must call this equally
        often: they get what all of them knew one call ago, so nobody waits and all stop at the same
        iteration."""
        if time.monotonic() > self.deadline:
            self.number = self.number or TIME_IS_UP
        if jax.process_count() > 1:
            known, self.asked = int(self.asked), max_over_processes(self.number, self.mesh)
            if not known:
                return 0
            self.number = known
        return self.number
