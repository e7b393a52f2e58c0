"""
How the tests start a script, and why that is quick.

`start` runs a script in a copy of the repository, as you would in a terminal. A short run would spend most of its time
importing JAX and the other libraries. On Linux, a helper process imports them once, and each run is a fork of it:
a process of its own, with its own pid, its own JAX devices and its own exit code, which you can interrupt and kill.
The helper has one thread and has not asked JAX for any device, so it is safe to fork.
"""
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

# The tests compile many small programs and run each of them a few times, so let XLA optimize less, and not cut them
# into parts. The scripts go by that, too.
FLAGS = ('--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
         '--xla_cpu_parallel_codegen_split_count=1')
if version('jaxlib').startswith('0.10.'):  # halves the time of compiling; later ones don't know the flag
    FLAGS += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', FLAGS)
# The tests simulate many devices on the CPU, also where there is a GPU or a TPU.
os.environ |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}

# Scripts that the tests start hear Ctrl-C, also where the tests run in the background of a shell that ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# With this variable set, the scripts don't start themselves a second time to set it.
TUNABLES = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647'


def pytest_configure(config):
    """Each of pytest-xdist's workers gets few tests at a time, so that both have something to do until the end. The
    tests simulate eight devices on the CPU, for meshes."""
    import jax  # not above: the helper must set nothing
    jax.config.update('jax_num_cpu_devices', 8)
    config.option.maxschedchunk = 2


@pytest.fixture(scope='session', autouse=True)
def shared_cache(tmp_path_factory):
    """What one run or test has compiled, every later one of the session takes from the cache, in whatever worker."""
    from devices import keep_compiled
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
    os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
    keep_compiled()


def start(repo, script, *args, fresh=False, **env):
    """Starts `python script *args` in the folder `repo`, with some more environment variables. `fresh` asks for a new
    interpreter. So do most variables, because the libraries may have read them when they were imported."""
    args = [script, *map(str, args)]
    if 'XLA_FLAGS' in env:  # in addition to those above; of two that contradict each other, the last one counts
        env['XLA_FLAGS'] = f"{os.environ['XLA_FLAGS']} {env['XLA_FLAGS']}"
    fork = sys.platform == 'linux' and not fresh and not script.startswith(('-', 'data/'))
    if not fork or env.keys() - {'XLA_FLAGS', 'PYTHONPATH'}:
        return subprocess.Popen([sys.executable, *args], cwd=repo, text=True, encoding='utf-8', stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=os.environ | {'WANDB_MODE': 'offline'} | env)
    return Fork(json.dumps([str(repo), args, env]).encode())


def run(repo, script, *args, code=0, **how):
    """Runs a script to its end and returns what it printed: stdout, or stderr if the script is meant to fail."""
    process = start(repo, script, *args, **how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return err if code else out


@functools.cache
def helper():
    """The helper process and our end of the socket that it listens to. It ends when we do, and the socket closes."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = os.environ | {'GLIBC_TUNABLES': TUNABLES, 'OPENBLAS_NUM_THREADS': '1'}  # NumPy must not start threads, either
    command = [sys.executable, __file__, str(its.fileno())]
    return ours, subprocess.Popen(command, pass_fds=[its.fileno()], stdout=subprocess.DEVNULL, env=env)


class Fork:
    """A script that runs in a fork of the helper. It has the methods of subprocess.Popen that the tests use."""

    def __init__(self, request):
        (out, its_out), (err, its_err), (self.news, its_news) = os.pipe(), os.pipe(), os.pipe()
        socket.send_fds(helper()[0], [request], [its_out, its_err, its_news])
        for fd in (its_out, its_err, its_news):
            os.close(fd)
        self.stdout, self.stderr = open(out, encoding='utf-8'), open(err, encoding='utf-8')
        self.pid, self.returncode, self.texts = self.next_number(), None, None

    def next_number(self):
        return int.from_bytes(os.read(self.news, 4), 'little', signed=True)

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
            self.returncode = self.next_number()
            os.close(self.news)
        return self.returncode

    def communicate(self, timeout=None):
        if not self.texts:  # a thread for each pipe, because the script waits when one of them is full
            threads = ThreadPoolExecutor(2)
            self.texts = [threads.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            threads.shutdown(wait=False)
        self.wait(timeout)
        return [text.result() for text in self.texts]

    def poll(self):
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# -----------------------------------------------------------------------------
# the helper process


def wait_for_request(requests):
    """Forks twice for each request: a process to run the script and, above it, one that waits for its end and
    tells us. Returns only in the first, with the request. The helper itself never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the terminal ends the helper without a word
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for those that wait
    while True:
        request, fds, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    requests.close()
    out, err, news = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(news, pid.to_bytes(4, 'little'))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(news, code.to_bytes(4, 'little', signed=True))
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in fds:
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as when Python starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where `nohup` started the tests
    return json.loads(request)


if __name__ == '__main__':
    import atexit
    import gc
    import importlib
    import threading
    import types

    for name in ('jax', 'jax.experimental.multihost_utils', 'flax.nnx', 'matplotlib.backends.backend_agg',
                 'matplotlib.figure', 'numpy', 'optax', 'orbax.checkpoint', 'safetensors.numpy', 'tiktoken', 'tqdm'):
        importlib.import_module(name)
    from matplotlib.figure import Figure
    figure = Figure()  # the first picture takes longer than later ones
    figure.subplots()
    figure.savefig(os.devnull, format='png')
    gc.freeze()  # all this stays: no run need look for garbage in it

    repo, sys.argv, env = wait_for_request(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(repo)
    os.environ.update(env)
    sys.path[0] = repo
    if 'PYTHONPATH' in env:  # as when Python starts
        sys.path.insert(1, env['PYTHONPATH'])
        sys.modules.pop('sitecustomize', None)  # some systems have one of their own
        importlib.import_module('sitecustomize')
    with open(sys.argv[0], encoding='utf-8') as f:
        program = compile(f.read(), sys.argv[0], 'exec')
    script = sys.modules['__main__'] = types.ModuleType('__main__')
    script.__file__ = sys.argv[0]
    code = 0
    try:
        exec(program, vars(script))
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    # End as a script ends, but do not let Python give back all that the libraries hold: to write to memory that the
    # helper and its forks share is to copy it, and takes 0.1 s.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
