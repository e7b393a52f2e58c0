"""
Claims about what a run finds on a machine: memory, a cluster, other processes.

    python -m pytest -q test_devices.py
"""
import psutil
import pytest

import devices


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
