"""
How the tests start a script, and why that is quick.

`start` runs a script in a copy of the repository, as you would in a terminal. A short run would spend most of its time
importing JAX and the other libraries. On Linux, Python's fork server imports them once, and each run is a fork of it:
a process of its own, with its own pid, its own JAX devices and its own exit code, which you can interrupt and kill.
The server has one thread and has not asked JAX for any device, so it is safe to fork.
"""
import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import forkserver
from multiprocessing.connection import Connection

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
os.environ.pop('MPLBACKEND', None)  # of a notebook that starts them

# Scripts that the tests start hear Ctrl-C, also where the tests run in the background of a shell that ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Each of pytest-xdist's workers gets few tests at a time, so that all are busy until the end. The tests simulate
    eight devices on the CPU, for meshes."""
    import jax  # not above: the processes that start scripts must set nothing
    jax.config.update('jax_num_cpu_devices', 8)
    config.addinivalue_line('markers', 'quick: the maths, and a run that is resumed; for every further Python')
    config.option.maxschedchunk = 2


def pytest_sessionfinish():
    for process in multiprocessing.active_children():  # of tests that failed
        process.kill()


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
    return Fork(str(repo), args, env)


def run(repo, script, *args, code=0, **how):
    """Runs a script to its end and returns what it printed: stdout, or stderr if the script is meant to fail."""
    process = start(repo, script, *args, **how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return err if code else out


# -----------------------------------------------------------------------------
# forks


class Fork:
    """A script that runs in a fork. It has the methods of subprocess.Popen that the tests use."""

    def __init__(self, *request):
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        self.stdout, self.stderr, self.texts = open(out, encoding='utf-8'), open(err, encoding='utf-8'), None
        with Connection(its_out, readable=False) as its_out, Connection(its_err, readable=False) as its_err:
            self.process = server().Process(target=run_script, args=(*request, its_out, its_err), daemon=True)
            self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
        return self.returncode

    def communicate(self, timeout=None):
        if not self.texts:  # a thread for each pipe, because the script waits when one of them is full
            threads = ThreadPoolExecutor(2)
            self.texts = [threads.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            threads.shutdown(wait=False)
        self.wait(timeout)
        return [text.result() for text in self.texts]

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


@functools.cache
def server():
    """Python's fork server. It ends when we do."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.path.dirname(__file__))  # where the server finds this file
        # the scripts would start themselves a second time to set the first; NumPy must not start threads
        patch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:'
                     'glibc.malloc.trim_threshold=2147483647')
        patch.setenv('OPENBLAS_NUM_THREADS', '1')
        patch.setenv('TESTS_FORK_SERVER', 'True')
        forkserver.ensure_running()
    return context


if 'TESTS_FORK_SERVER' in os.environ and __name__ == 'conftest':  # the server has just started, and imports this file
    for name in ('jax', 'jax.experimental.multihost_utils', 'flax.nnx', 'matplotlib.backends.backend_agg',
                 'matplotlib.figure', 'numpy', 'optax', 'orbax.checkpoint', 'safetensors.numpy', 'tiktoken', 'tqdm'):
        importlib.import_module(name)
    figure = sys.modules['matplotlib.figure'].Figure()  # the first picture takes longer than later ones
    figure.subplots()
    figure.savefig(os.devnull, format='png')
    import gc
    gc.freeze()  # all this stays: no run need look for garbage in it


def run_script(repo, args, env, out, err):
    """What a fork does: it runs the script as Python runs it, and ends."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where `nohup` started the tests
    os.chdir(repo)
    os.environ.update(env)
    sys.argv, sys.path[0] = args, repo
    sys.orig_argv = [sys.executable, *args]
    if 'PYTHONPATH' in env:  # as when Python starts
        sys.path.insert(1, env['PYTHONPATH'])
        sys.modules.pop('sitecustomize', None)  # some systems have one of their own
        importlib.import_module('sitecustomize')
    code = 0
    try:
        runpy.run_path(args[0], run_name='__main__')
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # End as a script ends, but do not let Python give back all that the libraries hold: to write to memory that the
    # server and its forks share is to copy it, and takes 0.1 s.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
