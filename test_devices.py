"""
Claims about what a run finds on a machine: memory, a cluster, other processes.

    python -m pytest -q test_devices.py
"""
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest

import devices
import processes
from conftest import start

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize('cgroup, files, limit', [
    ('0::/\n', {'memory.max': '1000\n'}, 1000),  # as a container sees itself
    ('0::/pods/one/main\n', {'pods/memory.max': '1000\n', 'pods/one/main/memory.max': 'max\n'}, 1000),
    ('0::/pods/one\n', {'pods/memory.max': '2000\n', 'pods/one/memory.max': '1000\n'}, 1000),
    ('0::/elsewhere\n', {'memory.max': '1000\n'}, 1000),  # a name of the host's
    ('9:name=systemd:/\n4:memory:/job/step\n0::/\n', {'memory/job/memory.limit_in_bytes': '1000\n',
                                                      'memory/memory.limit_in_bytes': '9223372036854771712\n'}, 1000),
    ('0::/\n', {'memory.max': 'max\n'}, None), ('0::/\n', {}, None), (None, {}, None),
])
def test_the_memory_of_a_container_is_what_its_cgroups_leave_of_the_machines(tmp_path, cgroup, files, limit):
    contents = {f'sys/fs/cgroup/{name}': text for name, text in files.items()}
    if cgroup:
        contents['proc/self/cgroup'] = cgroup
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.memory_limit(tmp_path) == (limit or psutil.virtual_memory().total)


def test_ulimit_v_limits_the_memory_of_a_process_too(monkeypatch):
    memory = psutil.Process().memory_info()
    monkeypatch.setattr(psutil.Process, 'rlimit', lambda self, which: (memory.vms + 1000,) * 2, raising=False)
    assert abs(devices.memory_limit() - memory.rss - 1000) < 2**25


def test_what_needs_more_memory_than_a_process_may_use_is_refused_and_not_killed(monkeypatch):
    mesh = devices.make_mesh(jax.devices()[:2])
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**28,), 'float32'))
    devices.compile_for(mesh, program)
    rss = psutil.Process().memory_info().rss
    monkeypatch.setattr(devices, 'memory_limit', lambda: rss + 2**31)
    with pytest.raises(MemoryError, match=r'needs 4.00 GiB, a device has 1.\d'):
        devices.compile_for(mesh, program)
    monkeypatch.setattr(devices, 'memory_limit', lambda: rss)
    with pytest.raises(ValueError, match='JAX itself takes all'):  # before XLA aborts
        devices.find_devices()


def test_where_jax_finds_no_device_its_words_are_passed_on(monkeypatch):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'nonsense'")

    monkeypatch.setattr('jax.devices', no_devices)
    with pytest.raises(ValueError, match="JAX_PLATFORMS = '.*' in the environment: .*Unable to initialize backend"):
        devices.find_devices()


def test_settings_of_jax_in_the_environment_that_would_break_a_script_are_ignored_with_a_warning(capsys):
    jax.config.update('jax_enable_x64', True)
    jax.config.update('jax_numpy_dtype_promotion', 'strict')
    devices.find_devices()
    assert jax.numpy.ones(1).dtype == 'float32' and jax.numpy.ones(1, 'bfloat16') + jax.numpy.ones(1) == 2
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ['JAX_ENABLE_X64',
                                                                                 'JAX_NUMPY_DTYPE_PROMOTION']


def test_a_damaged_program_in_the_cache_is_replaced_without_a_word(monkeypatch, tmp_path, recwarn):
    from jax.experimental.compilation_cache import compilation_cache
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def compile():
        jax.clear_caches()
        jax.jit(lambda x: x + 1).lower(1.0).compile()
        return {path: path.stat().st_size for path in tmp_path.rglob('*-cache')}

    try:
        compilation_cache.reset_cache()
        devices.keep_compiled()
        monkeypatch.setattr('warnings.showwarning', devices.show_warning)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
        whole = compile()
        for path in whole:
            path.write_bytes(path.read_bytes()[:100])
        compile()
        assert len(whole) == 1 and min(compile().values()) > 100 and not recwarn.list
    finally:
        jax.config.update('jax_compilation_cache_dir', before[0])
        jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])
        compilation_cache.reset_cache()


def test_a_short_run_is_profiled_too(monkeypatch):
    for n_steps, first, last in (30, 10, 15), (13, 6, 11), (3, 0, 2):
        traced, on = [], []
        monkeypatch.setattr('jax.profiler.start_trace', on.append)
        monkeypatch.setattr('jax.profiler.stop_trace', on.clear)
        for n in range(n_steps):
            with devices.profiled(n, n_steps, 'profile'):
                traced += [n] if on else []
        assert traced == [*range(first, last + 1)] and not on


# -----------------------------------------------------------------------------
# many processes

STEP = dict(SLURM_JOB_ID='5000', SLURM_STEP_ID='2', SLURM_STEP_NODELIST='n[3-4]', SLURM_NTASKS='2',
            SLURM_STEP_NUM_TASKS='2', SLURM_STEP_TASKS_PER_NODE='1(x2)', SLURM_PROCID='1', SLURM_LOCALID='0')
MPI = dict(OMPI_MCA_orte_hnp_uri='1314521088.0;tcp://10.96.0.1:34911', OMPI_COMM_WORLD_SIZE='2',
           OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_LOCAL_RANK='1', OMPI_COMM_WORLD_LOCAL_SIZE='2')
ALONE = '', 1, 0, None


@pytest.mark.parametrize('env, found', [
    ({}, ALONE), ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, ALONE),
    (STEP | {'SLURM_STEP_NUM_TASKS': '1'}, ALONE),  # a step of one task, or the shell that salloc opens
    (STEP, ('n3:62466', 2, 1, None)),
    (STEP | {'SLURM_STEP_ID': '3'}, ('n3:62527', 2, 1, None)),  # beside it, in the same job
    (STEP | {'SLURM_STEP_TASKS_PER_NODE': '2', 'SLURM_LOCALID': '1'}, ('n3:62466', 2, 1, [1])),
    (STEP | {'SLURM_STEP_TASKS_PER_NODE': '2', 'SLURM_LOCALID': '1', 'CUDA_VISIBLE_DEVICES': '0'},
     ('n3:62466', 2, 1, None)),
    (MPI, ('10.96.0.1:62880', 2, 1, [1])),
    (STEP | MPI | {'SLURM_STEP_NUM_TASKS': '1'}, ('10.96.0.1:62880', 2, 1, [1])),  # mpirun's own step
    (MPI | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'}, ALONE),
])
def test_a_cluster_tells_of_other_processes_and_one_alone_joins_nothing(monkeypatch, env, found):
    monkeypatch.setattr('os.environ', dict(env))
    assert processes.find_others('', 1, 0) == found
    assert processes.find_others('host:9', 3, 2)[:3] == ('host:9', 3, 2)
    if found == ALONE:
        processes.join_processes()  # also where JAX has begun to compute, as when a notebook runs train.py once more


def test_where_a_cluster_cannot_be_understood_a_process_trains_alone_after_a_warning(monkeypatch, capsys):
    def load_incluster_config():
        raise RuntimeError('Service host/port is not set.\nNo token')

    monkeypatch.setitem(sys.modules, 'kubernetes', SimpleNamespace(config=SimpleNamespace(**locals())))
    monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
    processes.join_processes()
    warning = capsys.readouterr().err
    assert 'trains alone' in warning and 'RuntimeError: Service host' in warning and len(warning.splitlines()) == 1


def test_a_process_whose_others_do_not_come_says_so_and_ends(tmp_path):
    for name in ('devices.py', 'processes.py'):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / 'wait.py').write_text("""import processes, sys
try:
    processes.join_processes(sys.argv[1], 2, int(sys.argv[2]), patience=1)
except (ValueError, RuntimeError) as e:
    print(e, file=sys.stderr)
    sys.exit(2)""")
    with socket.create_server(('', 0)) as taken, socket.create_server(('', 0)) as s, socket.create_server(('', 0)) as t:
        ports = [server.getsockname()[1] for server in (taken, s, t)]
        s.close()
        t.close()
        started = [start(tmp_path, 'wait.py', f'localhost:{port}', i) for port, i in zip(ports, (0, 0, 1))]
        ends = [process.communicate(timeout=60)[1] for process in started]
    for err, message in zip(ends, ('process 0 cannot have this port', 'process 0 of 2 has waited for 1 s',
                                   'but process 0 is not there')):
        assert message in err and len(err.splitlines()) == 1, err
    assert [process.returncode for process in started] == [2, 2, 2]


def test_processes_with_other_settings_or_files_are_refused_and_the_differences_named(monkeypatch, tmp_path):
    settings = dict(batch_size=4, learning_rate=0.1, out_dir='out', process_id=0)
    monkeypatch.setattr('jax.process_count', lambda: 2)
    sent = []

    def check(**changes):
        monkeypatch.setattr(processes, 'process_allgather', lambda mine: sent.append(mine) or np.stack([sent[0], mine]))
        processes.check_alike(settings | changes, (tmp_path, '*.bin'))

    (tmp_path / 'train.bin').write_bytes(b'1234')
    check()
    check(process_id=1, out_dir='/home/out')
    for changes, content, here, there in (({'batch_size': 2}, b'1234', 'batch_size = 4', 'batch_size = 2'),
                                          ({}, b'1235', "train.bin = '4 bytes", "train.bin = '4 bytes"),
                                          ({}, b'12345', "train.bin = '4 bytes", "train.bin = '5 bytes")):
        (tmp_path / 'train.bin').write_bytes(content)
        with pytest.raises(ValueError, match=f'process 0 has {here}.*, and process 1 has {there}') as e:
            check(**changes)
        assert 'learning_rate' not in str(e.value)
