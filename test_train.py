"""
Claims about whole runs. The tests start the scripts as a user does, in a copy of the repository with data of its own.

    python -m pytest -q -n 2 test_train.py

conftest.py starts the runs, and explains why a run starts quickly here.
"""
import contextlib
import csv
import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tokenizers

import chat
import hf
from checkpoints import Checkpoints, RunError, check_arrays, damaged_file, find_step, read_progress, reread, write
from conftest import run, start
from dataset import (GPT2_META, bytes_per_token, cut_chats, eval_starts, gpt2_encoding, hf_meta, open_dataset,
                     read_meta, sequences, token_bytes, token_ids, tokenizer)
from processes import StopSignal
from log import Log
from model import GPTConfig, init_params
from rundir import check_out_dir, clear_run, commit, load_model, lock_out_dir, open_model, open_run, resume_config
from test_model import bpe_files, numpy_gpt, numpy_rotary

HERE = Path(__file__).resolve().parent
TINY = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
        '--gradient_accumulation_steps=2', '--eval_iters=4', '--eval_interval=5', '--max_iters=12',
        '--lr_decay_iters=12', '--warmup_iters=2', '--learning_rate=1e-2', '--log_interval=1', '--dropout=0.1',
        '--dataset=tiny']
ENDLESS = [*TINY, '--max_iters=100000', '--eval_interval=100000']
unix = pytest.mark.skipif(os.name != 'posix', reason='pipes, terminals and signals as Unix has them')
ROMEO = 'But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n'


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    """A copy of the repository with a prepared dataset, `tiny`."""
    repo = tmp_path_factory.mktemp('repo')
    for path in HERE.glob('*.py'):
        if path.name != 'conftest.py' and not path.name.startswith('test_'):
            shutil.copy(path, repo)
    shutil.copytree(HERE / 'config', repo / 'config')
    shutil.copytree(HERE / 'data', repo / 'data',
                    ignore=lambda _, names: [name for name in names if Path(name).suffix not in ('', '.py')])
    (repo / 'verse.txt').write_text(ROMEO * 40, encoding='utf-8')
    run(repo, 'data/text/prepare.py', 'verse.txt', '--name=tiny')
    return repo


@pytest.fixture(scope='module')
def whole(repo):
    """The directory of a run of TINY that nothing disturbed."""
    run(repo, 'train.py', *TINY, '--out_dir=whole')
    return repo / 'whole'


def resume(repo, out_dir, *args, **how):
    """Goes on with a run, and returns what that prints."""
    return run(repo, 'train.py', '--init_from=resume', f'--out_dir={out_dir}', '--device=cpu', *args, **how)


def sample(repo, *args):
    """Thirty likeliest characters after 'But', as text."""
    return run(repo, 'sample.py', '--start=But', '--temperature=0', '--num_samples=1', '--max_new_tokens=30',
               '--device=cpu', *args)


@pytest.fixture
def refused(repo, monkeypatch, capsys):
    """A function that runs a script which is to refuse its arguments: with code 2, in one line, which it returns, and
    before any file is touched. That takes no process of its own."""
    monkeypatch.chdir(repo)
    monkeypatch.setattr('rundir.lock_out_dir', lambda *args, **how: pytest.fail('this was not refused'))
    state = lambda: {path: path.stat().st_mtime_ns for path in repo.rglob('*') if '__pycache__' not in path.parts}

    def refused(script, *args):
        source, before = (repo / script).read_text(encoding='utf-8'), state()
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            exec(compile(source, script, 'exec'), {'__file__': str(repo / script), '__name__': 'refused'})
        error = capsys.readouterr().err
        assert end.value.code == 2 and len(error.splitlines()) == 1 and error.startswith(f'{script}: error: '), error
        assert state() == before
        return error

    return refused


def read_until(process, beginning):
    """Reads what a process prints until a line has this beginning, and returns it."""
    text = ''
    for line in process.stdout:
        text += line
        if line.startswith(beginning):
            return text
    raise AssertionError(f'the process never printed {beginning!r}: {process.stderr.read()}')


def steps_in(out_dir):
    """The numbers of the checkpoints in a run directory, in order."""
    return sorted(int(path.name) for path in (out_dir / 'checkpoints').iterdir() if path.name.isdigit())


def log_of(out_dir, name='log.csv'):
    """The rows of log.csv, without what depends on the speed of the machine."""
    with open(out_dir / name, newline='', encoding='utf-8') as f:
        return [{k: v for k, v in row.items() if k not in ('time_ms', 'tokens_per_s')} for row in csv.DictReader(f)]


def assert_close_losses(a, b):
    """The losses in two logs are the same, to 1e-4."""
    a, b = ([[float(row[name] or 0) for name in ('iter', 'loss', 'train_loss', 'val_loss')] for row in rows]
            for rows in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def losses_in(out, name):
    """The losses of this name, 'train' or 'val', in the lines about evaluations."""
    return [float(x) for x in re.findall(rf'^step \d+: .*\b{name} loss (\d+\.\d+)', out, re.MULTILINE)]


def arrays_in(item):
    """The arrays in one item of a checkpoint, whatever devices it was written on."""
    import jax
    import orbax.checkpoint as ocp
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(item).item_metadata.tree
    return reader.restore(item, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))


def params_of(model):
    from flax import nnx
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def same(a, b):
    """Whether two trees are equal bit for bit. Orbax has text where NNX has a number."""
    import jax
    a, b = ([(jax.tree_util.keystr(path).replace("'", ''), np.asarray(x))
             for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]] for tree in (a, b))
    return len(a) == len(b) and all(p == q and x.dtype == y.dtype and np.array_equal(x, y)
                                    for (p, x), (q, y) in zip(a, b))


def assert_same_run(a, b):
    """The same losses, and bit for bit the same parameters and optimizer state in the latest checkpoint."""
    assert log_of(a) == log_of(b)
    last = steps_in(a)[-1]
    for item in (f'checkpoints/{last}/params', f'checkpoints/{last}/rest'):
        assert same(arrays_in(a / item), arrays_in(b / item))


# -----------------------------------------------------------------------------
# the main job


@pytest.mark.quick
def test_prepare_train_resume_and_sample(repo):
    """Every command has an interpreter of its own here, as when you type it."""
    out = run(repo, 'train.py', *TINY, '--out_dir=out', '--sample_tokens=20', fresh=True,
              MPLBACKEND='unknown')  # a notebook sets one that only its own Python may have
    steps = re.findall(r'^step (\d+): train loss (\d\.\d{4}), val loss (\d\.\d{4}), (\d\.\d{3}) bits/byte$', out,
                       re.MULTILINE)
    assert [int(step[0]) for step in steps] == [0, 5, 10] and float(steps[-1][1]) < float(steps[0][1]) - 0.3
    assert float(steps[-1][3]) == pytest.approx(float(steps[-1][2]) / np.log(2), abs=1e-3)  # ROMEO is ASCII
    iters = re.findall(r'^iter (\d+): loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a, tok/s [\d,]+$', out, re.MULTILINE)
    assert [int(n) for n in iters] == list(range(13))
    assert 'best validation loss' in out and 'tokens per iteration will be: 128' in out
    assert '--- a sample at step 10' in out
    saved = json.loads((repo / 'out/config.json').read_text(encoding='utf-8'))
    assert saved['config']['n_embd'] == 16 and saved['tokenizer']['chars'] == ''.join(sorted(set(ROMEO)))
    assert saved['command'].startswith('train.py --device=cpu --n_layer=1 ') and 'commit' in saved
    assert (repo / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    rows = log_of(repo / 'out')
    assert [r['iter'] for r in rows if r['val_loss']] == ['0', '5', '10'] and sum(bool(r['loss']) for r in rows) == 13

    assert 'step 15' in resume(repo, 'out', '--max_iters=16', '--gradient_accumulation_steps=1', fresh=True)
    assert log_of(repo / 'out')[-1]['tokens'] == str(13 * 128 + 4 * 64)
    (repo / 'data/tiny').rename(repo / 'data/elsewhere')  # a run directory is complete in itself
    text = run(repo, 'sample.py', '--out_dir=out', '--start=But', '--num_samples=3', '--max_new_tokens=40',
               '--device=cpu', fresh=True, PYTHONSAFEPATH='1')  # without the script's folder in sys.path
    samples = text.split('\n---------------\n')
    assert len(samples) == 4 and samples[3] == ''
    assert all(s.startswith('But') and len(s) == 43 for s in samples[:3])
    (repo / 'data/elsewhere').rename(repo / 'data/tiny')


@pytest.mark.quick
def test_resuming_changes_nothing(repo, whole):
    run(repo, 'train.py', *TINY, '--out_dir=parts', '--max_iters=3')  # ends between two evaluations
    for first, last in ((4, 9), (10, 12)):  # ends before an evaluation, and begins with one
        out = resume(repo, 'parts', f'--max_iters={last}')
        assert [int(n) for n in re.findall(r'^iter (\d+)', out, re.MULTILINE)] == list(range(first, last + 1))
    assert_same_run(whole, repo / 'parts')


@pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')
def test_a_run_knows_the_commit_of_its_code_and_whether_files_have_changed_since(tmp_path, monkeypatch):
    git = lambda *args: subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x', *args], cwd=tmp_path,
                                       check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr('rundir.__file__', str(tmp_path / 'rundir.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert commit() == ''
    (tmp_path / 'rundir.py').write_text('1')
    git('init')
    git('add', '.')
    git('commit', '-m', 'one')
    git('tag', 'v3')
    assert commit() == git('rev-parse', 'HEAD')
    (tmp_path / 'rundir.py').write_text('2')
    assert commit() == git('rev-parse', 'HEAD') + '+'
    monkeypatch.setenv('PATH', str(tmp_path))  # no git at all
    assert commit() == ''


def test_eval_only_writes_nothing_and_ends_with_a_line_for_other_programs(repo):
    shutil.copytree(repo / 'data/tiny', repo / 'elsewhere/small')
    before = files_in(repo)
    out = run(repo, 'train.py', *TINY, '--out_dir=nowhere', '--eval_only', '--data_dir=elsewhere', '--dataset=small')
    result = json.loads(out.splitlines()[-1])
    assert losses_in(out, 'val') == [pytest.approx(result['val_loss'], abs=1e-4)] and result['dataset'] == 'small'
    assert result['bits_per_byte'] == pytest.approx(result['val_loss'] / np.log(2)) and result['iter'] == 0
    out, _ = start(repo, 'train.py', *TINY, '--out_dir=nowhere', '--eval_only', '--max_minutes=1e-9').communicate()
    assert out.endswith('\nstopped by max_minutes\n')  # there is nothing to go on with
    assert files_in(repo) == before


def test_the_best_the_latest_and_every_nth_checkpoint_are_kept_and_a_run_can_go_back_to_each(repo, whole):
    """After a good start, a far too high learning rate destroys the model. So the best checkpoint is not the last."""
    run(repo, 'train.py', *TINY, '--out_dir=worse', '--max_iters=5', '--keep_interval=4')
    resume(repo, 'worse', '--max_iters=40', '--learning_rate=10.0', '--decay_lr=False')
    best = json.loads((repo / 'worse/best.json').read_text(encoding='utf-8'))
    rows = [row for row in log_of(repo / 'worse') if row['val_loss'] and row['iter'] != '0']
    losses = {int(row['iter']): float(row['val_loss']) for row in rows}
    assert best['iter'] == min(losses, key=losses.get) < max(losses)
    steps, log = steps_in(repo / 'worse'), log_of(repo / 'worse')
    assert steps == sorted({*range(4, 41, 4), best['iter'], 41})
    a, b, c = (load_model(repo / 'worse', which).wte.weight[...] for which in ('best', 'latest', 8))
    assert (a != b).any() and (c != a).any() and (c != b).any()

    resume(repo, 'worse', '--checkpoint=4', '--max_iters=12', '--learning_rate=0.01', '--decay_lr=True')
    assert_same_run(repo / 'worse', whole)
    aside, = (repo / 'worse').glob('later-than-4-*')  # nothing is lost: this is a run, too
    assert steps_in(repo / 'worse') == [4, 8, 10, 12, 13] and steps_in(aside) == steps[1:] and log_of(aside) == log
    assert (load_model(aside).wte.weight[...] == a).all()


def test_another_dataset_has_another_best_loss(repo, whole):
    shutil.copytree(whole, repo / 'moved')
    shutil.copytree(repo / 'data/tiny', repo / 'data/harder', dirs_exist_ok=True)
    np.random.default_rng(0).integers(20, size=5000).astype('<u2').tofile(repo / 'data/harder/val.bin')
    out = resume(repo, 'moved', '--dataset=data/harder/', '--max_iters=21')  # a path, as a shell completes it
    assert "the best validation loss was on dataset = 'tiny'" in out
    best, before = (json.loads((out_dir / 'best.json').read_text()) for out_dir in (repo / 'moved', whole))
    assert best['iter'] in (15, 20) and best['val_loss'] > before['val_loss'] + 0.3
    out = resume(repo, 'moved')
    assert 'starts anew' not in out and 'the run was finished' in out and 'compiling' not in out


def test_best_json_never_names_a_checkpoint_that_is_not_whole(repo):
    process = start(repo, 'train.py', *TINY, '--out_dir=named', '--n_embd=64', '--max_iters=40',
                    '--always_save_checkpoint=False')
    named = set()
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            best = json.loads((repo / 'named/best.json').read_text())['iter']
            assert (repo / f'named/checkpoints/{best}').exists()
            named.add(best)
        time.sleep(0.001)
    assert process.communicate()[1] == '' and len(named) > 1


def test_a_run_without_its_checkpoints_is_refused(repo, whole):
    shutil.copytree(whole, repo / 'incomplete')
    shutil.rmtree(repo / 'incomplete/checkpoints')
    assert 'best.json names checkpoint 10, which is not there' in resume(repo, 'incomplete', code=2)
    assert log_of(repo / 'incomplete') == log_of(whole)


def test_the_log_forgets_damaged_rows_and_what_a_resumed_run_does_again_and_no_picture_ends_a_run(repo, whole):
    shutil.copytree(whole, repo / 'again')
    shutil.rmtree(repo / 'again/checkpoints/13')
    lines = (whole / 'log.csv').read_bytes().splitlines(keepends=True)
    lines[3:3] = [b'\xff\xfe,1\n', b'7,1.5\n', '²,1,,,,,,,\n'.encode()]
    (repo / 'again/log.csv').write_bytes(b''.join(lines) + b'13,2.')  # a crash cut the last row off
    (repo / 'again/loss.png').unlink()
    (repo / 'again/loss.png').mkdir()
    assert 'warning: loss.png: IsADirectoryError' in resume(repo, 'again')
    assert_same_run(repo / 'again', whole)


def test_no_clock_bar_disk_or_service_ends_a_run_and_each_is_reported_once(tmp_path, monkeypatch, capsys):
    seen = {}

    def broken(*args, **how):
        seen.update(args[0] if isinstance(args[0], dict) else {})
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('time.perf_counter', lambda: 0.0)  # Windows had a clock that moved 64 times a second
    monkeypatch.setattr('log.tqdm.update', broken)
    service = SimpleNamespace(log=broken, finish=broken)
    with Log(tmp_path, 0, 9, 1, 128, lambda speed: speed, 2, None, service) as log:
        log.file = SimpleNamespace(write=broken, close=broken)
        for n in range(6):
            log.iteration(n, 1e-3, dict(loss=1e300 * 10**n, grad_norm=np.nan, skipped=n, skipped_in_a_row=n // 5))
            log.evaluation(n, dict(train=np.inf, val=np.nan), 1e-3)
        with pytest.raises(RunError, match='were skipped. What was saved before is good. Try'):
            log.iteration(6, 1e-3, dict(loss=np.nan, grad_norm=np.nan, skipped=6, skipped_in_a_row=2))
            log.flush()
    log.summary(6)
    out = capsys.readouterr().out
    assert out.count('\niter ') == 7 and '6 iterations in' in out
    assert [out.count(f'warning: {what}: ') for what in ('the progress bar', 'wandb', 'log.csv')] == [1, 1, 1]
    assert seen.keys() == {'iter', 'batch/loss', 'grad_norm', 'train/loss', 'val/loss', 'lr', 'mfu'}


def test_a_new_run_replaces_an_old_one_only_where_that_is_said(repo, whole, refused):
    shutil.copytree(whole, repo / 'mine')
    args = ['train.py', *TINY, '--out_dir=mine', '--max_iters=2']
    assert '--overwrite=True' in refused(*args)
    run(repo, *args, '--overwrite=True')
    assert steps_in(repo / 'mine') == [3] and len(log_of(repo / 'mine')) == 4


@pytest.mark.parametrize('names', [['checkpoints/5/theirs', 'base/theirs', 'log.csv'], ['best.json'], ['loss.png'],
                                   ['config.json', 'model.safetensors']])
def test_a_new_run_never_writes_over_what_may_not_be_a_runs(repo, refused, names):
    theirs = repo / 'theirs'
    shutil.rmtree(theirs, ignore_errors=True)
    for name in names:
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text('{}')
    error = refused('train.py', *TINY, '--out_dir=theirs', '--overwrite=True')
    assert f"theirs holds {names[0].split('/')[0]}" in error or 'theirs holds log.csv, checkpoints, base' in error


@unix
def test_to_clear_a_run_spares_what_a_link_leads_to_and_files_of_other_names(whole, tmp_path):
    run_dir, other = tmp_path / 'run', tmp_path / 'other'
    shutil.copytree(whole, run_dir)
    shutil.copytree(whole / 'checkpoints', other)
    (other / '10-good').mkdir()
    (other / 'notes.txt').write_text('5 was odd')
    before = files_in(other)
    for name in 'checkpoints/10', 'base', 'log.csv.tmp':
        shutil.rmtree(run_dir / name, ignore_errors=True)
        (run_dir / name).symlink_to(other / ('notes.txt' if name == 'log.csv.tmp' else '10'))
    write(run_dir / 'log.csv', 'iter\n')
    clear_run(run_dir)
    assert files_in(other) == before and files_in(run_dir) == {}
    (run_dir / 'checkpoints').rmdir()
    (run_dir / 'checkpoints').symlink_to(other)  # as on another disk
    clear_run(run_dir)
    assert sorted(path.name for path in (run_dir / 'checkpoints').iterdir()) == ['10-good', 'notes.txt']


def test_a_run_is_kept_until_nothing_that_a_new_one_needs_can_be_refused(repo, whole, refused, monkeypatch):
    def fails(*args, **how):
        raise MemoryError('no memory')
    args = 'train.py', *TINY, '--out_dir=whole', '--debug_nans=True'  # which compiles nothing ahead
    monkeypatch.setattr('rundir.lock_out_dir', lambda *args, **how: None)
    monkeypatch.setattr('rundir.clear_run', lambda out_dir: pytest.fail('this came too early'))
    monkeypatch.setattr('step.state_creator', lambda *args, **how: fails)
    assert 'no memory' in refused(*args, '--overwrite=True')
    looks = iter([lambda *args: None, check_out_dir])  # at the first look the other run has not begun
    monkeypatch.setattr('rundir.check_out_dir', lambda *args: next(looks)(*args))
    assert 'whole holds a run' in refused(*args)


@unix
def test_a_signal_ends_a_run_after_saving_it_and_it_goes_on_as_if_there_had_been_none(repo):
    process = start(repo, 'train.py', *TINY, '--out_dir=signals', '--eval_iters=1000000')
    while not (repo / 'signals/log.csv').exists():
        time.sleep(0.01)
    time.sleep(1)  # now the first evaluation is under way, and would take long
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and 'step 0' not in out, out + err
    for number, line in (signal.SIGUSR1, 'iter 7:'), (signal.SIGUSR2, 'iter 22:'):  # SIGTERM and SIGHUP: see below
        process = start(repo, 'train.py', '--init_from=resume', '--out_dir=signals', '--device=cpu', '--eval_iters=4',
                        '--max_iters=100000')
        read_until(process, line)
        process.send_signal(number)
        assert '--init_from=resume --out_dir=signals' in process.stdout.read()
        assert process.wait(timeout=60) == 128 + number
        assert steps_in(repo / 'signals')[-1] == int(log_of(repo / 'signals')[-1]['iter']) + 1
    done = steps_in(repo / 'signals')[-1]
    resume(repo, 'signals', '--max_iters=100000', '--max_minutes=1e-9', code=142)
    # the time was up at once: in the middle of an evaluation, or after an iteration
    assert steps_in(repo / 'signals')[-1] == done + (done % 5 > 0)
    run(repo, 'train.py', *TINY, '--out_dir=no-signals', f"--max_iters={steps_in(repo / 'signals')[-1] - 1}")
    assert_same_run(repo / 'signals', repo / 'no-signals')


def test_a_notebook_can_run_train_py_again_and_again_and_stays_as_it_was(repo):
    """As %run does: in a process that somebody else started, and that goes on."""
    (repo / 'notebook.py').write_text(f'''
import atexit, gc, os, runpy, signal, sys
os.environ.pop('GLIBC_TUNABLES', None)
process = lambda: (sys.excepthook, sys.path[1:], gc.get_threshold(), atexit._ncallbacks(), sys.stdout.encoding,
                   [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
sys.excepthook, before = sys.__excepthook__, None
for i in range(2):
    sys.argv = ['train.py', *{TINY}, '--out_dir=notebook', '--max_iters=2', '--overwrite=True']
    kept = runpy.run_path('train.py', run_name='__main__')
    before = before or process()  # libraries register functions, the first time
    assert process() == before and kept['log'].file.closed
    with open('model.py', 'a') as f:
        f.write('print("edited")\\n')
''', encoding='utf-8')
    source = (repo / 'model.py').read_bytes()
    out = run(repo, 'notebook.py')
    (repo / 'model.py').write_bytes(source)
    assert out.count('edited\n') == 1 and out.count('best validation') == 0 and out.count('iter 2:') == 2


def test_the_lines_that_the_readme_tells_people_to_write_work(repo):
    """A soft cap, an architecture, an optimizer and a tokenizer, all in one run."""
    block = (HERE / 'README.md').read_text(encoding='utf-8').partition('## hacking')[2].split('```')[1]
    cap, arch, lion, fits, kind = [line[2:] for line in block.splitlines() if line.startswith('      ')]
    before = {name: (repo / name).read_bytes() for name in ('model.py', 'optim.py', 'dataset.py')}

    def write_in(name, line, after):
        text = (repo / name).read_text(encoding='utf-8')
        assert text.count(after) == 1, after
        (repo / name).write_text(text.replace(after, f'{after}\n{line}\n'), encoding='utf-8')

    write_in('model.py', cap, 'preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])')
    write_in('model.py', arch, 'ARCHS = {')
    write_in('optim.py', lion, 'OPTIMIZERS = {')
    write_in('dataset.py', fits, 'fits = {')
    write_in('dataset.py', kind, 'Raises ValueError if its vocabulary cannot be had. encode raises it for unknown '
             'characters."""')
    folder = repo / 'data/as-bytes'
    folder.mkdir()
    (folder / 'meta.json').write_text('{"vocab_size": 256, "tokenizer": {"kind": "bytes"}}')
    for split in ('train', 'val'):
        np.frombuffer(ROMEO.encode() * 40, np.uint8).astype('<u2').tofile(folder / f'{split}.bin')
    out = run(repo, 'train.py', *TINY, '--dataset=as-bytes', '--arch=mine', '--optimizer=lion', '--kernels=',
              '--out_dir=hacked')
    text = sample(repo, '--out_dir=hacked')
    for name, content in before.items():
        (repo / name).write_bytes(content)
    assert 'edited in model.py' in out and 'warning: bits per byte: ValueError: the tokens' in out
    assert losses_in(out, 'val')[-1] < losses_in(out, 'val')[0] - 1 and text.startswith('But')


@unix
def test_the_notebook_runs_from_top_to_bottom(repo, tmp_path, monkeypatch):
    """It trains and finetunes a tiny model. Its commands are forks like those of the other tests: the `python` that it
    finds hands them over to this process."""
    import nbclient
    import nbformat
    notebook = nbformat.read(HERE / 'notebook.ipynb', 4)
    assert not any(cell.get('outputs') for cell in notebook.cells)
    tiny = [arg for arg in TINY if not arg.startswith('--n_')]
    parameters = dict(REPOSITORY='', DATASET='tiny', OPTIONS=' '.join(TINY), BASE='out-notebook', TEXT='tiny',
                      DEVICES=' '.join([*tiny, '--max_iters=6']))
    assert set(re.findall(r'\b[A-Z]+\b(?=.* = )', notebook.cells[1].source)) == parameters.keys()
    notebook.cells[1].source = f'globals().update({parameters})'
    (repo / 'config/train_tiny.py').touch()
    (repo / 'data/tiny/prepare.py').touch()
    (repo / 'requirements.txt').write_text('jax>=1\nflax>=2\n')
    python = f'cd {tmp_path}; echo "$@" > asked; cat answer'
    for name, script in ('pip', 'cat others.tmp; echo "$@"'), ('python', python):
        (tmp_path / name).write_text(f'#!/bin/sh\n{script}\n')
        (tmp_path / name).chmod(0o755)
    for name in ('asked', 'answer'):
        os.mkfifo(tmp_path / name)

    def answer():
        while args := (tmp_path / 'asked').read_text().split():
            (tmp_path / 'answer').write_text(''.join(start(repo, *args).communicate(timeout=100)))

    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(repo)}}).execute()
    (tmp_path / 'asked').write_text('')
    install, _, train, picture, sample, tune = [cell.outputs for cell in notebook.cells if cell.cell_type == 'code'][2:]
    assert re.fullmatch(r'flax>=2\s+install -q -r others.tmp jax==\S+ jaxlib==\S+\s+', install[0].text)
    assert 'best validation loss' in train[0].text
    assert 'image/png' in picture[0].data and sample[0].text.count('---------------') == 2
    assert 'Initializing from out-notebook' in tune[0].text and 'a sample at step 5' in tune[0].text


@unix
def test_a_second_ctrl_c_does_not_wait(repo):
    process = start(repo, 'train.py', *TINY, '--out_dir=impatient', '--sample_tokens=1000000')
    read_until(process, 'step 0:')
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # the sample would take long
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


@unix
def test_a_script_ends_without_a_word_when_nobody_reads_its_output_any_more_and_saves_its_run(repo, whole):
    """As in `python sample.py | head`, or in `python train.py | tee log.txt`, where Ctrl-C ends both."""
    train = ['train.py', *ENDLESS]
    long = ['sample.py', '--out_dir=whole', '--device=cpu', '--max_new_tokens=250', '--num_samples=400', '--start=\n']
    for args, line, number in ((train, 'iter 7:', signal.SIGINT), (train, 'iter 7:', None), (train, 'devices:', None),
                               (long, '', None)):
        out_dir = [f'--out_dir=pipe{number}', '--overwrite=True'] if args == train else []
        process = start(repo, *args, *out_dir)
        read_until(process, line)
        if number:
            process.send_signal(number)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + (number or signal.SIGPIPE) and process.stderr.read() == ''
        if line == 'iter 7:':
            assert steps_in(repo / f'pipe{number}')[0] >= 8
    closed = subprocess.run(['sh', '-c', 'exec "$@" >&-', 'sh', sys.executable, 'train.py', *TINY, '--out_dir=closed'],
                            cwd=repo, stderr=subprocess.PIPE, timeout=300)
    assert closed.returncode == 0 and closed.stderr == b'' and steps_in(repo / 'closed')[-1] == 13


def test_data_that_turns_out_to_be_damaged_ends_a_run_after_saving_it(repo, whole):
    """A token outside the vocabulary is found before the run in the first 100 million, later ones then."""
    shutil.copytree(repo / 'data/tiny', repo / 'data/worn')
    path = repo / 'data/worn/train.bin'
    good = path.read_bytes()
    overwrite = lambda: path.open('r+b').write(b'\xff' * len(good))
    damages = (overwrite, 'holds token 65535'), (lambda: os.truncate(path, 2), 'has lost its end')
    for args, (damage, message) in zip(([], ['--init_from=resume']), damages):
        path.write_bytes(good)
        process = start(repo, 'train.py', *ENDLESS, '--dataset=worn', '--out_dir=worn', *args)
        out = read_until(process, 'iter')
        damage()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and len(err.splitlines()) == 1 and message in err, out + err
        assert steps_in(repo / 'worn')[-1] == int(log_of(repo / 'worn')[-1]['iter']) + 1
    path.write_bytes(good)
    resume(repo, 'worn', f'--max_iters={steps_in(repo / "worn")[-1]}')


@unix
def test_a_terminal_that_is_closed_ends_a_run_after_saving_it_unless_nohup_started_it(repo):
    import pty
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where `nohup` started the tests
        os.chdir(repo)
        os.execv(sys.executable, [sys.executable, 'train.py', *ENDLESS, '--out_dir=hung-up'])
    seen = b''
    while b'iter 7:' not in seen:
        seen += os.read(terminal, 10000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert steps_in(repo / 'hung-up')[0] >= 8

    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(repo, 'train.py', *ENDLESS, '--out_dir=nohup', fresh=True)
    signal.signal(signal.SIGHUP, old)
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGHUP)
    read_until(process, 'iter 50:')
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_ctrl_c_at_any_moment_is_one_line_and_keeps_the_run_that_is_there(repo, whole):
    """More: CTRL_C=80 python -m pytest -q test_train.py -k any_moment_is_one_line"""
    kept = repo / 'kept'
    for delay in np.random.default_rng(0).uniform(0, 2.5, int(os.environ.get('CTRL_C', 3))):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(whole, kept, ignore=shutil.ignore_patterns('lock'))
        process = start(repo, 'train.py', *ENDLESS, '--out_dir=kept', '--overwrite=True', fresh=True)
        while b'GLIBC_TUNABLES' not in Path(f'/proc/{process.pid}/environ').read_bytes():
            time.sleep(0.001)  # until the script has restarted itself: Python's own start takes as long as it takes
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        begun = (kept / 'lock').exists()  # and the run in its place is a new one
        assert process.returncode == 130 and (begun or err == 'train.py: interrupted\n'), (delay, out, err)
        assert begun or files_in(kept) == files_in(whole)


def test_wandb_without_a_login_is_one_line_before_anything_is_done(repo):
    error = run(repo, 'train.py', *TINY, '--out_dir=no-login', '--wandb_log=True', code=2, WANDB_MODE='online',
                WANDB_API_KEY='', HOME=str(repo))
    assert 'wandb_log = True' in error and len(error.splitlines()) == 1 and not (repo / 'no-login').exists()


def test_wandb_logs_without_a_network(repo):
    run(repo, 'train.py', *TINY, '--out_dir=with-wandb', '--max_iters=1', '--wandb_log=True', WANDB_DIR=str(repo))
    assert list((repo / 'wandb').glob('offline-run-*'))


def test_a_run_in_the_cloud_is_what_it_would_be_on_a_disk(repo, whole):
    """A folder plays the part of Google's storage: a module stands for gcsfs, and Orbax writes into the folder, too."""
    (repo / 'cloud').mkdir()
    (repo / 'cloud/sitecustomize.py').write_text(f"""import sys, types, fsspec
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
at = lambda path: str(path) if str(path)[0] == '/' else {str(repo)!r} + '/cloud/' + str(path).removeprefix('gs://')
class Cloud(LocalFileSystem):
    __init__ = lambda self, **how: LocalFileSystem.__init__(self, auto_mkdir=True)
    mkdir = lambda self, path, **how: self.makedirs(path, exist_ok=True)
    glob = lambda self, path, **how: [x.removeprefix(at('gs://')) for x in LocalFileSystem.glob(self, path)]
    _strip_protocol = staticmethod(at)
fsspec.register_implementation('gcs', Cloud, clobber=True)
sys.modules['gcsfs'] = types.SimpleNamespace(GCSFileSystem=Cloud)
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
tensorstore_utils._use_gcs_driver = lambda path: False
tensorstore_utils._normalize_path = at
""")
    (repo / 'cloud/bucket').mkdir()
    cloud = dict(PYTHONPATH=str(repo / 'cloud'))
    for max_iters, line in (7, 'Initializing'), (12, 'Resuming'):
        args = *TINY, '--out_dir=gs://bucket/run', '--init_from=auto', f'--max_iters={max_iters}'
        assert line in run(repo, 'train.py', *args, **cloud)
    assert_same_run(repo / 'cloud/bucket/run', whole)
    assert not (repo / 'gs:').exists()
    args = '--start=But', '--temperature=0', '--num_samples=1', '--max_new_tokens=30', '--device=cpu'
    text = run(repo, 'sample.py', '--out_dir=gs://bucket/run', *args, **cloud)
    assert text == sample(repo, '--out_dir=whole')


def test_nothing_that_only_unix_has_is_needed(repo):
    """An interpreter without fcntl, resource, os.sysconf, SIGHUP and SIGPIPE, as on Windows."""
    (repo / 'no-unix').mkdir()
    (repo / 'no-unix/sitecustomize.py').write_text("import asyncio, os, psutil, signal, sys\n"  # which know Windows
                                                   "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
                                                   "del os.sysconf, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1\n")
    path = str(repo / 'no-unix')
    run(repo, 'train.py', *TINY, '--out_dir=portable', '--max_iters=5', fresh=True, PYTHONPATH=path)
    assert 'iter 7:' in resume(repo, 'portable', '--max_iters=7', PYTHONPATH=path)
    run(repo, 'sample.py', '--out_dir=portable', '--device=cpu', '--max_new_tokens=5', PYTHONPATH=path)
    run(repo, 'bench.py', *TINY, '--seconds=0', PYTHONPATH=path)


# -----------------------------------------------------------------------------
# many processes


MANY = [*TINY, '--dtype=float32', '--n_embd=32', '--dropout=0.0', '--batch_size=2', '--gradient_accumulation_steps=8']


def start_two(repo, *args, own=('', '')):
    """Two processes of two simulated devices each. Each may have an option of its own."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    return [start(repo, 'train.py', *args, f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}',
                  *own[i].split(), XLA_FLAGS='--xla_force_host_platform_device_count=2') for i in (0, 1)]


def ends_of(processes, code=0):
    """What processes printed, once they have ended with this code; with None, because another one died."""
    ends = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, ends):
        assert process.returncode == code if code is not None else 'another task died' in err, (out, err)
    return [out for out, _ in ends]


def test_two_processes_do_what_one_does_stop_together_and_resume_exactly_after_either_is_killed(repo):
    first = start_two(repo, *MANY, '--out_dir=first', '--max_iters=100000')
    read_until(first[0], 'iter 7:')
    first[1].kill()
    # process 0 needs half a minute to notice, and must not need a whole one
    noticed = ThreadPoolExecutor(1).submit(first[0].communicate, timeout=60)

    # meanwhile two processes train until one of them is told to stop, and one process alone trains
    told = start_two(repo, *MANY, '--out_dir=both', '--max_iters=100000', '--sample_tokens=5')
    out = read_until(told[0], 'iter 22:')
    assert '4 x cpu' in out and 'iter 12: ' in out and 'a sample at step 10' in out
    told[1].send_signal(signal.SIGTERM)
    out, silent = ends_of(told, code=128 + signal.SIGTERM)
    assert 'stopped by SIGTERM' in out and 'iter' not in silent
    done = steps_in(repo / 'both')[-1]
    run(repo, 'train.py', *MANY, '--out_dir=alone', f'--max_iters={done + 3}')

    # the first run goes on, as a copy, because process 0 still holds it; process 0 is killed, and it goes on again
    shutil.copytree(repo / 'first', repo / 'two')
    two = '--init_from=resume', '--out_dir=two', '--device=cpu'
    second = start_two(repo, *two, '--max_iters=100000')
    read_until(second[0], 'iter 12:')
    second[0].kill()
    ends_of(second[1:], code=None)
    ends_of(start_two(repo, *two, f'--max_iters={done - 1}'))
    assert_same_run(repo / 'two', repo / 'both')
    ends_of(start_two(repo, *two, '--fsdp=True', f'--max_iters={done + 1}'))
    resume(repo, 'two', f'--max_iters={done + 3}')  # one process alone, from what two saved
    assert_close_losses(log_of(repo / 'two'), log_of(repo / 'alone'))
    noticed.result()
    ends_of(first[:1], code=None)


def test_two_processes_that_do_not_share_out_dir_are_refused_together_and_nothing_is_written(repo, whole):
    for name in 'host0', 'host1':
        (repo / name).mkdir()
    shutil.copytree(whole, repo / 'host1/out')  # an old run is in the way on one of them
    before = files_in(repo / 'host1')
    for process in start_two(repo, *MANY, '--overwrite=True', own=('--out_dir=host0/out', '--out_dir=host1/out')):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and err.startswith('train.py: error: out_dir = ') and len(err.splitlines()) == 1
    assert files_in(repo / 'host1') == before and not list((repo / 'host0').iterdir())


# -----------------------------------------------------------------------------
# random command lines and damaged runs


def random_option(rng, keys):
    """An option that may or may not make sense. Mostly its key is one of `keys`."""
    key = rng.choice([*keys, *keys, *keys, 'compile', 'backend', 'zzz', 'config', '', 'n_layers'])
    value = rng.choice(['0', '1', '-1', '2', '3.0', '1e1', '1e-3', 'nan', '1e999', 'True', 'false', '', "''", 'None',
                        '[1]', '{[]: 1}', '(' * 300, '9' * 5000, '../x', 'data/tiny/', 'tiny', 'resume', 'scratch',
                        'gpt5', 'cpu', 'cuda:0', 'mps', 'float16', 'bfloat16', 'best', 'Grüße', '$x_$', 'a b',
                        '\udcff', 'verse.txt', 'verse.txt/x', 'precious'])
    return rng.choice([f'--{key}={value}'] * 8 + [f'--{key}', f'-{key}={value}', f'{key}={value}', f'--{key} {value}',
                                                   'config/laptop.py', 'config', 'none.py', 'verse.txt', '--'])


def damage_one_file(rng, out_dir):
    """Does something to one random file of a run. Returns which and what."""
    path = rng.choice(sorted(p for p in out_dir.rglob('*') if p.is_file() and p.name != 'lock'))
    if rng.random() < 0.6:  # else nearly all are files of checkpoints
        path = out_dir / rng.choice(['config.json', 'best.json', 'log.csv', 'loss.png', 'lock'])
    content = path.read_bytes() if path.exists() else b''
    at = rng.randrange(len(content) + 1)
    damage = {'empty': b'', 'cut': content[:at], 'flip': content[:at] + rng.randbytes(1) + content[at + 1:],
              'text': b'\xff,x\n', 'object': b'{}', 'array': b'[]'}
    how = rng.choice([*damage, 'delete', 'folder', 'parents'])
    if how == 'parents':
        shutil.rmtree(path.parent if path.parent != out_dir else out_dir / 'checkpoints')
    elif how in damage:
        path.write_bytes(damage[how])
    else:
        path.unlink()
        if how == 'folder':
            path.mkdir()
    return path.relative_to(out_dir), how


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.name != 'lock'}


def test_no_command_line_and_no_damage_ends_in_a_traceback_or_loses_anything(repo, whole):
    """Random command lines, and random damage to a run before a sensible one. A command that fails changes no file,
    except that it puts a damaged checkpoint aside. One that succeeds leaves all intact checkpoints but older ones.
    More: FUZZ=2000 python -m pytest -q test_train.py -k no_command_line"""
    import random
    precious = repo / 'precious'
    (repo / 'precious.py').write_text('for i in range(2):\n    max_iters = 12 + i\n')
    keys = {script: list(load_config(script)) for script in ('train.py', 'sample.py', 'export.py')}
    going_on = ['--init_from=resume', '--max_iters=14']
    for i in range(int(os.environ.get('FUZZ', 16))):
        rng = random.Random(f"{os.environ.get('FUZZ_SEED', 0)} {i}")
        shutil.rmtree(precious, ignore_errors=True)
        shutil.copytree(whole, precious)
        script = rng.choice(['train.py', 'train.py', 'sample.py', 'export.py'])
        hurt = damage_one_file(rng, precious) if i % 2 else None
        args = {'train.py': going_on if hurt else rng.choice([going_on, [*TINY, '--max_iters=1']]),
                'sample.py': ['--max_new_tokens=3', '--num_samples=1', '--start=But'],
                'export.py': ['--hf_dir=precious-hf']}[script] + ['--out_dir=precious']
        args += [] if hurt else [random_option(rng, keys[script]) for _ in range(rng.choice([1, 1, 2, 3]))]
        args += [] if script == 'export.py' else ['--device=cpu']
        before = files_in(precious)
        process = start(repo, script, *args)
        out, err = process.communicate(timeout=300)
        what = f'case {i}: {script} {args} {hurt}: exit code {process.returncode}\n{out}{err}'
        assert process.returncode in (0, 1, 2, 142) and 'Traceback' not in err and 'Error:' not in err, what
        assert process.returncode in (0, 142) or 1 <= len(err.splitlines()) <= 4, what
        old_name = lambda name: re.sub(r'^damaged-(\d+)-\d+', r'checkpoints/\1', re.sub(r'^later-.*?/', '', name))
        after = {old_name(name): x for name, x in files_in(precious).items()}
        if process.returncode or script != 'train.py' or '--eval_only' in ' '.join(args):
            assert {name: after.get(name) for name in before} == before, what
        elif not any('overwrite' in arg for arg in args):
            step_of = {name: int(name.split('/')[1]) for name in before if re.match(r'checkpoints/\d+/', name)}
            assert all(step_of[name] < max(step_of.values()) for name in step_of.keys() - after.keys()), what
        shutil.rmtree(repo / 'precious-hf', ignore_errors=True)


# -----------------------------------------------------------------------------
# data


def bins_of(folder):
    """The token ids of train and val."""
    return [np.fromfile(folder / f'{split}.bin', '<u2') for split in ('train', 'val')]


def test_the_embedded_dataset_needs_nothing_but_python(repo):
    run(repo, 'data/stdlib_char/prepare.py')
    meta = json.loads((repo / 'data/stdlib_char/meta.json').read_text())
    train, val = bins_of(repo / 'data/stdlib_char')
    assert len(train) > 4_000_000 and 0.05 < len(val) / len(train) < 0.2
    assert max(train.max(), val.max()) < meta['vocab_size'] == len(meta['tokenizer']['chars'])
    text = ''.join(meta['tokenizer']['chars'][i] for i in val)
    assert text.isascii() and 'import ' in text and '\n\tdef ' in text


def test_prepared_text_reads_back_as_it_was(repo):
    text = 'Grüße, 世界! \r\n\n  ' + ROMEO * 30
    (repo / 'a.txt').write_bytes(text.encode())
    (repo / 'b.txt').write_bytes(b'\xef\xbb\xbf' + ROMEO.encode())  # with a byte order mark
    run(repo, 'data/text/prepare.py', 'a.txt', 'b.txt', '--name=own', '--data_dir=made/here')
    chars = json.loads((repo / 'made/here/own/meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    back = ''.join(chars[i] for i in np.concatenate(bins_of(repo / 'made/here/own')))
    assert back == text.replace('\r\n', '\n') + ROMEO and chars == ''.join(sorted(set(back)))


def test_bpe_of_a_file_in_pieces_equals_bpe_of_the_whole(repo):
    enc = gpt2_encoding()
    text = ''.join(f'{i} {ROMEO}\n\n  \t{i}' for i in range(25_000)) + '\n<|endoftext|>one\n'  # 3 MB: three pieces
    (repo / 'long.txt').write_text(text, encoding='utf-8')
    run(repo, 'data/text/prepare.py', 'long.txt', 'verse.txt', '--name=bpe', '--tokenizer=gpt2')
    want = enc.encode_ordinary(text) + [enc.eot_token] + enc.encode_ordinary(ROMEO * 40) + [enc.eot_token]
    assert np.concatenate(bins_of(repo / 'data/bpe')).tolist() == want


def test_a_text_in_a_models_tokens_has_the_ids_of_the_whole_also_in_pieces_and_beyond_16_bits(repo):
    text = ''.join(f'{i} {ROMEO}\n\n  \t<|end|>{i}' for i in range(10_000))  # 1.2 MB: two pieces
    bpe_files(repo / 'bpe')
    bpe_files(repo / 'prefix', metaspace=True)  # begins a text with a space, as SentencePiece does
    wide = json.loads((repo / 'bpe/tokenizer.json').read_text(encoding='utf-8'))
    wide['model']['vocab'][wide['model']['merges'][0][0] + wide['model']['merges'][0][1]] = 70_000
    (repo / 'wide').mkdir()
    (repo / 'wide/tokenizer.json').write_text(json.dumps(wide), encoding='utf-8')
    for name, text, dtype in ('prefix', text, '<u2'), ('bpe', text[:20_000], '<u2'), ('wide', text[:20_000], '<u4'):
        (repo / 'long.txt').write_text(text, encoding='utf-8')
        run(repo, 'data/text/prepare.py', 'long.txt', f'--tokenizer={name}', f'--name=in-{name}')
        bpe = tokenizers.Tokenizer.from_file(str(repo / name / 'tokenizer.json'))
        bpe.no_truncation()
        bpe.no_padding()
        bpe.encode_special_tokens = True  # what a text spells is text
        end = [] if name == 'wide' else [0]
        ids = np.concatenate([np.fromfile(repo / f'data/in-{name}/{split}.bin', dtype) for split in ('train', 'val')])
        assert ids.tolist() == bpe.encode(text).ids + end
    assert ids.max() == 70_000 < open_dataset(repo / 'data/in-wide', 16)[1]['vocab_size']
    # a run has a copy of the tokenizer, and needs the dataset no more
    run(repo, 'train.py', *TINY, '--dataset=in-wide', '--out_dir=wide-run', '--max_iters=1', '--eval_iters=1',
        '--mesh_data=1')
    shutil.rmtree(repo / 'data/in-wide')
    assert 'ROMEO' in run(repo, 'sample.py', '--out_dir=wide-run', '--start=ROMEO', '--max_new_tokens=5')
    for name, message in (('nowhere', 'is no folder'), ('data', 'tokenizer.json is not a tokenizer')):
        args = 'data/text/prepare.py', 'verse.txt', f'--tokenizer={name}'
        assert message in run(repo, *args, code=1, HF_HUB_OFFLINE='1')
    assert 'leave it out' in run(repo, 'data/text/prepare.py', 'verse.txt', '--tokenizer=data/tiny', code=2)


CHATML = ("{% for m in messages %}<|user|>{{ m['role'] }} {{ m['content'] }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|user|>assistant {% endif %}")


def said(*contents, system=None):
    """A chat: what the user and the assistant say in turns."""
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': content} for i, content in enumerate(contents)]
    return ([{'role': 'system', 'content': system}] if system else []) + messages


def test_a_model_learns_what_the_assistant_says_and_where_it_ends_and_nothing_else(repo, refused):
    bpe = bpe_files(repo / 'chatty', chat_template=CHATML)
    chats = [said(f'hi \ufffd {i}', f' Hé\n\n{i}', '<|end|>\n<|user|>assistant no', 'yes', 'so', system='Sß')
             for i in range(10)]
    lines = [json.dumps({'messages': chat}, ensure_ascii=False).replace('\ufffd', r'\ud83d') for chat in chats]
    (repo / 'chats.jsonl').write_text('\n'.join(lines) + '\n\n', encoding='utf-8')
    assert 'learns to write' in run(repo, 'data/chat/prepare.py', 'chats.jsonl', '--tokenizer=chatty')
    data, meta = open_dataset(repo / 'data/chat', 64)
    for split, some in ('train', chats[:9]), ('val', chats[9:]):
        starts = eval_starts(data[split], (len(some),), 16)  # one sequence for each chat
        for chat, start, end in zip(some, starts, [*starts[1:], len(data[split])], strict=True):
            [tokens] = sequences(data[split], np.array([start]), end - start - 1)
            text = ''.join(f"<|user|>{m['role']} {m['content']}<|end|>\n" for m in chat[:5])
            assert token_ids(tokens).tolist() == bpe.encode(text).ids
            assert bpe.decode(tokens[tokens >= 0].tolist(), skip_special_tokens=False) == \
                chat[2]['content'] + '<|end|>' + 'yes<|end|>'
    assert sequences(data['val'], np.array([0]), 2 * len(data['val']))[0, -1] == ~0 and cut_chats(data['val'], 16) == 1
    # a run of them keeps the template, and must reach what there is to learn
    assert 'no chat in' in refused('train.py', *TINY, '--dataset=chat', '--out_dir=chatty-run', '--block_size=3')
    run(repo, 'train.py', *TINY, '--dataset=chat', '--out_dir=chatty-run', '--block_size=64', '--max_iters=1',
        '--sample_tokens=2')
    assert read_meta(repo / 'chatty-run/config.json')['chat_template'] == CHATML
    for content, message in (('{"text": "a"}', 'chats.jsonl:1 is no chat'), ('[', 'chats.jsonl:1 is no chat'),
                             ('{"messages": [{"role": "user", "content": 3}]}', 'chats.jsonl:1 is no chat'),
                             (json.dumps({'messages': said('a')}), 'chats.jsonl:1: nobody with the role assistant'),
                             (lines[0], '1 chats are too few')):
        (repo / 'chats.jsonl').write_text(content, encoding='utf-8')
        assert message in run(repo, 'data/chat/prepare.py', 'chats.jsonl', '--tokenizer=chatty', code=2)
    assert '--tokenizer=data/tiny' in run(repo, 'data/chat/prepare.py', 'chats.jsonl', '--tokenizer=data/tiny', code=2)


def test_a_template_that_moves_the_question_or_leaves_out_thoughts_or_is_missing(monkeypatch):
    meta = lambda template: {'tokenizer': {'kind': 'hf', 'bos': '<s>', 'eos': '</s>'}, 'chat_template': template}
    chats = [said('U1', 'A1', 'U2', 'A2', system='S')]
    [[(text, spans)]] = chat.learned(meta(chat.PLAIN), chats)
    assert text == '<s>System: S\nUser: U1\nAssistant: A1</s>\nUser: U2\nAssistant: A2</s>\n'
    assert [text[slice(*span)] for span in spans] == [' A1</s>', ' A2</s>']
    thinks = ("{% for m in messages %}{{ m.role[0] }}{% if loop.last and m.role != 'user' %}(thinks){% endif %}"
              "{{ m.content }};{% endfor %}{% if add_generation_prompt %}a{% endif %}")
    [parts] = chat.learned(meta(thinks), chats)
    assert [[text[slice(*span)] for span in spans] for text, spans in parts] == [['(thinks)A1;'], ['(thinks)A2;']]
    moves = "{% if messages[-1].role == 'user' %}{{ messages[0].content }}{% endif %}{{ messages[-1].content }}"
    assert 'anew' in chat.learned(meta(moves), chats)[0]
    # somebody else's program: it executes nothing, and hangs nothing
    for template, message in (("{{ ''.__class__.__mro__ }}", 'unsafe'), ("{% include '/etc/passwd' %}", 'no loader'),
                              ("{% import 'os' as os %}", 'no loader'), ('{{ raise_exception("no!") }}', 'says: no!'),
                              ("{{ 'a' * 10**10 }}", 'MemoryError')):
        assert message in chat.learned(meta(template), chats)[0]
    monkeypatch.setattr(chat, 'SECONDS', 1)
    loop = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
    for template, message in ('{% if %}', 'fails: .*Expected an expression'), (loop, 'takes too long'):
        with pytest.raises(ValueError, match=message):
            chat.learned(meta(template), chats)


def test_a_talk_has_several_turns_forgets_the_oldest_and_ends_an_answer_at_ctrl_c(tmp_path, monkeypatch):
    bpe = bpe_files(tmp_path, chat_template=CHATML)
    typed, read, shown = iter(['one', 'two', 'three']), [], []

    def write(ids, ends):
        assert ends == [0, 0]  # what the template writes after an answer, and the end of a text
        read.append(bpe.decode(ids, skip_special_tokens=False))
        yield bpe.encode('é').ids[:1]
        yield bpe.encode('é').ids[1:] + bpe.encode(' yes').ids
        if len(read) == 2:
            signal.raise_signal(signal.SIGINT)
        yield bpe.encode(' no').ids

    def type_in(prompt):
        if (text := next(typed, None)) is None:
            signal.raise_signal(signal.SIGINT)
        return text

    monkeypatch.setattr('builtins.input', type_in)
    before = signal.getsignal(signal.SIGINT)
    chat.talk(hf_meta(tmp_path), write, shown.append, room=60, system='Be.')
    signal.signal(signal.SIGINT, before)
    begin, turn = '<|user|>system Be.<|end|>\n', '<|user|>user {}<|end|>\n<|user|>assistant {}<|end|>\n'.format
    ask = '<|user|>user {}<|end|>\n<|user|>assistant '.format
    assert ''.join(shown) == 'é yes no\né yes no\né yes no\n' and '\ufffd' not in shown
    assert read[:2] == [begin + ask('one'), begin + turn('one', 'é yes no') + ask('two')]
    assert read[2] == begin + turn('two', 'é yes no') + ask('three')


def test_a_dataset_is_not_replaced_without_a_word(repo):
    run(repo, 'data/text/prepare.py', 'verse.txt', '--name=kept')
    before = (repo / 'data/kept/train.bin').read_bytes()
    (repo / 'other.txt').write_text(ROMEO.upper() * 10)
    for name in ('kept', 'openwebtext'):
        assert '--overwrite' in run(repo, 'data/text/prepare.py', 'other.txt', f'--name={name}', code=2)
    assert (repo / 'data/kept/train.bin').read_bytes() == before and not (repo / 'data/openwebtext/meta.json').exists()
    run(repo, 'data/text/prepare.py', 'other.txt', '--name=kept', '--overwrite', '--data_dir=~/data', HOME=str(repo),
        USERPROFILE=str(repo))  # the ~, which a shell leaves as it is, is no folder's name
    assert (repo / 'data/kept/train.bin').read_bytes() != before and not (repo / '~').exists()


def test_help_prepares_nothing(repo):
    for name in ('shakespeare_char', 'shakespeare', 'stdlib_char'):
        before = sorted((repo / 'data' / name).iterdir())
        assert f'python data/{name}/prepare.py' in run(repo, f'data/{name}/prepare.py', '--help')
        assert sorted((repo / 'data' / name).iterdir()) == before


def test_what_nanogpt_wrote_is_answered_with_the_command_that_brings_it_over(tmp_path):
    (tmp_path / 'verses').mkdir()
    (tmp_path / 'verses/meta.pkl').touch()
    with pytest.raises(ValueError, match='run python data/text/prepare.py input.txt --name=verses'):
        open_dataset(tmp_path / 'verses', 16)
    (tmp_path / 'ckpt.pt').touch()
    for open_it, source in (open_run, tmp_path), (open_model, tmp_path), (open_model, tmp_path / 'ckpt.pt'):
        with pytest.raises(ValueError, match=f'run python data/from_nanogpt.py {tmp_path}/ckpt.pt'):
            open_it(source)
    (tmp_path / 'torch.py').write_text("load = lambda *args, **how: {'model': {}, 'model_args': {'vocab_size': 65}}")
    error = run(HERE, 'data/from_nanogpt.py', tmp_path / 'ckpt.pt', code=1, PYTHONPATH=str(tmp_path))
    assert 'add the meta.json of its dataset' in error  # else sample.py would miss a tokenizer


def test_bytes_per_token_are_those_of_the_text_that_is_evaluated():
    text = 'Grüße, 世界 ' * 50
    chars = ''.join(sorted(set(text)))
    starts = np.array([[0, 3], [7, 200]])
    want = np.mean([len(text[i + 1:i + 17].encode()) for i in starts.ravel()]) / 16
    ids = np.array([chars.index(c) for c in text], np.uint16)
    assert bytes_per_token(ids, starts, 16, {'kind': 'char', 'chars': chars}) == pytest.approx(want)
    enc = gpt2_encoding()
    ids = np.array([*enc.encode(text), enc.eot_token])  # that is no text
    assert token_bytes({'kind': 'tiktoken', 'name': 'gpt2'})[ids].sum() == len(text.encode())


@pytest.mark.parametrize('runs, message', [
    ([], 'required: RUN'), (['none'], 'none/log.csv: No such file'), (['empty'], 'is not the log of a run'),
    (['noise'], 'is not the log of a run'), (['young'], '-'), (['damaged', 'young'], '4.0000   -'),
    (['whole', 'damaged'], 'n_layer                         1       3'),
])
def test_curves_are_drawn_of_what_there_is_and_the_settings_that_differ_are_named(repo, whole, monkeypatch, capsys,
                                                                                  runs, message):
    header = 'iter,loss,train_loss,val_loss,lr,grad_norm,skipped,time_ms,tokens_per_s\n'  # version 2's
    for name, content in (('empty', ''), ('noise', '\x00,"\n' * 9), ('young', header),
                          ('damaged', header + '0,4,,,,,,9,\n²,1\n1,,4,4,,,,,\n2,')):
        (repo / name).mkdir(exist_ok=True)
        (repo / name / 'log.csv').write_text(content)
    (repo / 'damaged/config.json').write_text('{"config": {"n_layer": 3}}')
    (repo / 'young/config.json').write_text('[')
    monkeypatch.chdir(repo)
    monkeypatch.setattr(sys, 'argv', ['curves.py', *runs])
    Path('curves.png').unlink(missing_ok=True)
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(HERE / 'assets/curves.py'), run_name='__main__')
    out, err = capsys.readouterr()
    assert message in (err or out) and Path('curves.png').exists() == (not err)


@pytest.mark.parametrize('args, message', [
    ([], 'required: csv'), (['new.csv', '--n_embed=64'], 'unrecognized arguments: --n_embed=64'),
    (['new.csv', '--n_embd=64,a'], "argument --n_embd: invalid int value: '64,a'"),
    (['new.csv', '--dataset=none'], "dataset = 'none' is not prepared"),
    (['other.csv'], 'other.csv is not the table of a sweep'),
])
def test_a_mistake_in_a_sweep_is_named_and_nothing_written(tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['sweep.py', *args])
    with pytest.raises(SystemExit):
        runpy.run_path(str(HERE / 'assets/sweep.py'), run_name='__main__')
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ['other.csv']


def test_a_bad_text_is_refused_and_leaves_nothing(repo):
    (repo / 'latin1.txt').write_bytes('Grüße'.encode('latin-1') * 100)
    (repo / 'short.txt').write_text('abc')
    many = ''.join(map(chr, [*range(0x20, 0xd800), *range(0xe000, 0x1d000)]))
    (repo / 'chinese.txt').write_text(many, encoding='utf-8')
    for name, message in (('latin1.txt', 'not UTF-8'), ('short.txt', 'too few'), ('none.txt', 'no such file'),
                          ('chinese.txt', 'do not fit uint16'), ('data', 'is a folder')):
        assert message in run(repo, 'data/text/prepare.py', name, '--name=bad', code=2)
        assert not (repo / 'data/bad').exists()


def test_without_a_network_a_script_says_what_to_put_where(repo):
    nowhere = 'http://127.0.0.1:9'
    for name in 'shakespeare_char', 'shakespeare':
        error = run(repo, f'data/{name}/prepare.py', code=1, https_proxy=nowhere, HTTPS_PROXY=nowhere)
        assert len(error.splitlines()) == 1 and 'input.txt' in error
    (repo / 'data/shakespeare_char/input.txt').write_text('not Shakespeare')
    assert 'is not the text' in run(repo, 'data/shakespeare_char/prepare.py', code=1)
    assert not list((repo / 'data').glob('shakespeare*/*.bin'))


@pytest.fixture(scope='module')
def offline(repo):
    """The environment of a machine without a network, where GPT-2's vocabulary is just the 256 bytes and
    <|endoftext|>, and where a file can have FULL bytes."""
    (repo / 'bytes').mkdir()
    (repo / 'bytes/sitecustomize.py').write_text('''import os, resource, tiktoken
enc = tiktoken.Encoding('gpt2', pat_str=r'[\\s\\S]', mergeable_ranks={bytes([i]): i for i in range(256)},
                        special_tokens={'<|endoftext|>': 50256})
tiktoken.Encoding = lambda *args, **more: enc
if 'FULL' in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['FULL']),) * 2)
''')
    return dict(PYTHONPATH=str(repo / 'bytes'), HF_HUB_OFFLINE='1', HF_HOME=str(repo / 'hub'),
                HF_DATASETS_CACHE=str(repo / 'hub/d'))


def parquet(path, texts, row_group_size=1000, column='text'):
    import pyarrow as pa
    import pyarrow.parquet as pq
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({column: texts, 'n': list(range(len(texts)))}), path, row_group_size=row_group_size)


def documents_of(folder):
    """The documents in train and in val, whose tokens are bytes."""
    result = []
    for ids in bins_of(folder):
        *documents, rest = np.split(ids, np.flatnonzero(ids == 50256) + 1)
        assert not len(rest)
        result.append([document[:-1].astype(np.uint8).tobytes().decode() for document in documents])
    return result


STORIES = [f'{i} Grüße, 世界 <|endoftext|>\r\n' * (i % 7) for i in range(2500)] + ['long ' * 10**6, '', None]


def test_documents_read_back_as_they_were(repo, offline):
    parquet(repo / 'stories/train-0.parquet', STORIES[:1500])
    parquet(repo / 'stories/train-1.parquet', STORIES[1500:])
    parquet(repo / 'stories/validation-0.parquet', STORIES[:30])
    stories = [text or '' for text in STORIES]
    run(repo, 'data/tinystories/prepare.py', '--files', 'stories', **offline)
    assert documents_of(repo / 'data/tinystories') == [stories, stories[:30]]
    both = ['stories/train-0.parquet', 'stories/train-1.parquet']
    run(repo, 'data/openwebtext/prepare.py', '--files', *both, **offline)
    order = np.random.default_rng(2357).permutation(len(stories))  # nanoGPT's
    shuffled = [stories[i] for i in order]
    assert documents_of(repo / 'data/openwebtext') == [shuffled[2:], shuffled[:2]]
    meta = json.loads((repo / 'data/openwebtext/meta.json').read_text())
    assert meta == {'vocab_size': 50257, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}


def test_a_broken_off_preparation_keeps_the_dataset_that_is_there_and_starts_again(repo, offline):
    here, tmp = repo / 'data/tinystories', repo / 'data/tinystories/train.bin.tmp'
    bins = lambda folder: [(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')]
    parquet(repo / 'few/stories.parquet', STORIES[:400])
    parquet(repo / 'many/stories.parquet', STORIES[:2500] * 6)
    run(repo, 'data/tinystories/prepare.py', '--files', 'few', **offline)
    whole = bins(here)

    def break_off(number):
        """Sends a signal when a part is written. The pipes close in time only if all its processes end."""
        process = subprocess.Popen([sys.executable, 'data/tinystories/prepare.py', '--files', 'many'], cwd=repo,
                                   env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        while process.poll() is None and not (tmp.exists() and tmp.stat().st_size > 2**19):
            time.sleep(0.01)
        send = os.killpg if number == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to all of them
        send(process.pid, number)
        _, err = process.communicate(timeout=30)
        assert bins(here) == whole
        return process.returncode, err

    code, err = break_off(signal.SIGINT)
    assert code == 130 and 'interrupted' in err and len(err.splitlines()) == 1, err
    assert not list(here.glob('*.tmp'))
    assert break_off(signal.SIGKILL)[0] == -signal.SIGKILL and tmp.exists()
    run(repo, 'data/tinystories/prepare.py', '--files', 'many', **offline)
    run(repo, 'data/openwebtext/prepare.py', '--files', 'many', '--num_proc=3', **offline)  # this one ran through
    assert bins(here) == bins(repo / 'data/openwebtext') and sum(map(len, documents_of(here))) == 15000


def test_documents_stay_on_the_disk_and_few_are_on_their_way_to_be_tokenized(repo, offline):
    parquet(repo / 'large.parquet', [os.urandom(8192).hex() for _ in range(2000)], row_group_size=100)
    code = '''import sys; sys.path.insert(0, 'data')
import argparse, hub, pyarrow
splits = hub.load(argparse.Namespace(files=['large.parquet'], column='text'))
class Pool:
    def map(self, f, *args):
        self.sent = list(zip(*args))
        return iter(self.sent)
next(hub.encoded(pool := Pool(), 'train', range(0, 10**6, 10), 10, 8))
print(splits['train'].data.nbytes, pyarrow.total_allocated_bytes(), len(pool.sent))'''
    size, held, sent = map(int, run(repo, '-c', code, **offline).splitlines()[-1].split())
    assert size > 2000 * 16384 and held < size / 100 and sent == 8, held


@pytest.mark.parametrize('args, message', [
    (['--repo=some/dataset'], 'where there is a network, type hf download some/dataset '),
    (['--files', 'none'], 'none: '), (['--files', 'verse.txt'], 'verse.txt: '),
    (['--files', 'damaged.parquet'], 'damaged.parquet: OSError: '),
    (['--files', 'one.parquet', 'story.parquet'], 'one.parquet story.parquet: CastError: '),
    (['--files', 'two.parquet', '--column=story'], 'Column name'),
    (['--files', 'two.parquet', '--column=n'], 'TypeError: '),
])
def test_a_mistake_in_preparing_documents_is_one_line_and_leaves_nothing(repo, offline, args, message):
    parquet(repo / 'one.parquet', ['one'])
    parquet(repo / 'two.parquet', ['one', 'two'])
    parquet(repo / 'story.parquet', ['two'], column='story')
    parquet(repo / 'damaged.parquet', STORIES)
    content = (repo / 'damaged.parquet').read_bytes()
    (repo / 'damaged.parquet').write_bytes(content[:2000] + bytes(2000) + content[4000:])
    for path in (repo / 'data/openwebtext').glob('*.bin'):
        path.unlink()
    error = run(repo, 'data/openwebtext/prepare.py', *args, code=1, **offline)
    assert len(error.splitlines()) == 1 and error.startswith('prepare.py: error: ') and message in error, error
    assert not list((repo / 'data/openwebtext').glob('*.bin*'))


def test_new_files_are_no_links_to_old_ones_and_a_full_disk_says_where(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / 'data')
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # common.py changes it
    from common import check_room, new_files
    with pytest.raises(SystemExit, match='has room for .* GB, and this takes 1000000.0'):
        check_room(tmp_path / 'not/yet/there', 1e15)
    (tmp_path / 'mine').write_text('do not write here')
    (tmp_path / 'train.bin.tmp').symlink_to(tmp_path / 'mine')
    with new_files(tmp_path, 'train.bin') as [f]:
        f.write(b'tokens')
    assert (tmp_path / 'mine').read_text() == 'do not write here' and not (tmp_path / 'train.bin').is_symlink()
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        with new_files(tmp_path, 'train.bin'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert {path.name for path in tmp_path.iterdir()} == {'mine', 'train.bin'}
    assert (tmp_path / 'train.bin').read_bytes() == b'tokens'


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(repo, offline):
    parquet(repo / 'full.parquet', [os.urandom(4096).hex() for _ in range(5000)], row_group_size=500)
    for script, file, full in (('tinystories', '--files=full.parquet', 2**23),  # not enough for the text
                               ('tinystories', '--files=full.parquet', 2**26),  # enough for it, not for its tokens
                               ('text', 'verse.txt', 100)):
        error = run(repo, f'data/{script}/prepare.py', file, code=1, FULL=str(full), **offline)
        assert len(error.splitlines()) == 1 and '[Errno 27] ' in error, error
        assert not [*(repo / 'data' / script).glob('*.tmp'), *(repo / 'hub').rglob('*.incomplete')]


def fineweb_file(path, tokens, *header):
    """Writes a file as FineWeb's tokens come. The header says what it should, or what is given."""
    header = np.array([*(header or (20240520, 1, len(tokens))), *[0] * 253], '<i4')
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, '<u2').tobytes())


def test_an_evaluation_of_fineweb_is_the_one_that_others_do(repo):
    n = 10 * 2**20
    val, *train = np.random.default_rng(0).integers(50257, size=(3, n + 5), dtype=np.uint16)
    fineweb_file(repo / 'web/fineweb_val_000000.bin', val)
    for i, tokens in enumerate(train, 1):
        fineweb_file(repo / f'web/fineweb_train_00000{i}.bin', tokens)
    run(repo, 'data/fineweb/prepare.py', '--files', 'web')
    there = bins_of(repo / 'data/fineweb')
    assert np.array_equal(there[0], np.concatenate(train)) and np.array_equal(there[1], val[:n + 1])
    starts = eval_starts(there[1], (10, 1024), 1024)
    assert starts.ravel().tolist() == [*range(0, n, 1024)]


@pytest.mark.parametrize('tokens, header, message', [
    ([1, 2], (), 'lacks fineweb_val_000000.bin'), ([50257], (), 'token 50257'),
    ([1, 2], (20240520, 1, 3), 'is cut off'), ([1, 2], (20240520, 2, 2), 'does not begin with'),
    ([], (), 'holds 0 tokens')])
def test_a_damaged_file_of_fineweb_is_one_line_and_leaves_nothing(repo, tmp_path, tokens, header, message):
    fineweb_file(tmp_path / 'fineweb_train_000001.bin', tokens, *header)
    if 'lacks' not in message:
        fineweb_file(tmp_path / 'fineweb_val_000000.bin', [1, 2, 3])
    before = files_in(repo / 'data/fineweb')
    error = run(repo, 'data/fineweb/prepare.py', '--files', tmp_path, code=1)
    assert len(error.splitlines()) == 1 and message in error and files_in(repo / 'data/fineweb') == before


# -----------------------------------------------------------------------------
# finetuning, LoRA, and export to Hugging Face's format


@pytest.fixture(scope='module')
def base(repo):
    """A run to start from, without biases and with dropout. Returns the model that it ended with."""
    run(repo, 'train.py', *TINY, '--out_dir=base', '--max_iters=30', '--lr_decay_iters=30', '--eval_interval=10')
    return load_model(repo / 'base')


LORA = [*(arg for arg in TINY if not arg.startswith('--n_')), '--init_from=base', '--lora_rank=2']


@pytest.fixture(scope='module')
def adapted(repo, base):
    """The directory of a run of LoRA that nothing disturbed."""
    run(repo, 'train.py', *LORA, '--out_dir=adapted', '--max_iters=60', '--lr_decay_iters=100', '--sample_tokens=5')
    return repo / 'adapted'


def test_finetuning_begins_with_the_best_model_of_a_run(repo, base):
    best = json.loads((repo / 'base/best.json').read_text())['val_loss']
    # a recipe gives way to the model, an option doesn't
    (repo / 'wider.py').write_text('n_embd = 64\nblock_size = 1024\n')
    auto = [*LORA, 'wider.py', '--lora_rank=0', '--out_dir=tuned', '--block_size=16', '--max_iters=20',
            '--init_from=auto']  # to the right of --init_from=base, with which it starts
    out = run(repo, 'train.py', *auto)
    losses = losses_in(out, 'val')
    assert 'Initializing from base' in out and losses[0] == pytest.approx(best, abs=1e-4) and min(losses) < best - 0.05
    assert json.loads((repo / 'tuned/config.json').read_text(encoding='utf-8'))['model_args']['n_embd'] == 16
    assert 'the run was finished' in run(repo, 'train.py', *auto)


def test_lora_changes_no_bit_of_its_base_and_saves_only_adapters(repo, base, adapted):
    import jax
    losses = [float(row['val_loss']) for row in log_of(adapted) if row['val_loss']]
    assert min(losses) < losses[0] - 0.05 and same(arrays_in(adapted / 'base/params'), params_of(base))
    last = adapted / 'checkpoints/61'
    assert not (last / 'base').exists() and set(arrays_in(last / 'params')) == {'h'}
    stored = sum(x.nbytes for item in ('params', 'rest') for x in jax.tree.leaves(arrays_in(last / item)))
    n = 2 * (3 * 16 + 4 * 16 + 3 * 16 + 6 * 16)
    assert 3 * 4 * n <= stored < 3 * 4 * n + 100  # they and Adam's two means, and some counters
    (repo / 'base').rename(repo / 'base-elsewhere')  # a run directory is complete in itself
    assert sample(repo, '--out_dir=adapted').startswith('But')
    (repo / 'base-elsewhere').rename(repo / 'base')


def test_lora_on_random_weights_trains_a_little(repo):
    losses = losses_in(run(repo, 'train.py', *TINY, '--lora_rank=2', '--learning_rate=1e-1', '--decay_lr=False',
                           '--max_iters=40', '--out_dir=random-base'), 'train')
    assert losses[-1] < losses[0] - 0.05 and (repo / 'random-base/base').exists()


def test_a_run_of_lora_that_was_stopped_before_its_first_checkpoint_starts_again_from_its_base(repo, base, adapted):
    parts = repo / 'lora-parts'
    shutil.copytree(adapted, parts)
    shutil.rmtree(parts / 'checkpoints')
    (parts / 'best.json').unlink()
    assert 'stopped before its first checkpoint' in resume(repo, 'lora-parts')
    assert_same_run(adapted, parts)
    assert same(arrays_in(parts / 'base/params'), params_of(base))
    victim = max((parts / 'base').rglob('d/*'), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b'x')
    assert 'base is damaged' in resume(repo, 'lora-parts', code=2)


@pytest.mark.parametrize('kind', ['gpt2', 'qwen3', 'lora'])
def test_a_run_of_version_2_goes_on_and_its_export_is_what_numpy_makes_of_it(repo, tmp_path, kind):
    """The archive has runs that version 2 saved after 60 iterations: GPT-2's block with biases; Qwen3's with Muon; and
    LoRA with dropout, whose best checkpoint is not the latest. Beside them are the text that version 2 wrote with the
    latest, greedy.txt, and the log of ten more iterations, went-on.csv."""
    from flax.nnx.traversals import unflatten_mapping
    from safetensors.numpy import load_file
    with tarfile.open(HERE / 'assets/version2.tar.xz') as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith(kind)], filter='data')
    out_dir, hf = tmp_path / kind, tmp_path / 'hf'
    text = (out_dir / 'greedy.txt').read_text(encoding='utf-8')
    assert sample(repo, f'--out_dir={out_dir}', '--checkpoint=latest') == text
    if kind == 'lora':
        assert sample(repo, f'--out_dir={out_dir}') != text

    # an export has the loss that version 2 saw with the adapters beside the weights, and NumPy can read it
    run(repo, 'export.py', f'--out_dir={out_dir}', f'--hf_dir={hf}', '--checkpoint=latest')
    assert sample(repo, f'--init_from={hf}') == text
    went_on = log_of(out_dir, 'went-on.csv')
    args = [arg for arg in TINY if not arg.startswith('--n_')]  # whatever the defaults of other keys are
    out = run(repo, 'train.py', *args, f'--init_from={hf}', '--dtype=float32', '--eval_only=True')
    assert losses_in(out, 'val') == pytest.approx([float(row['val_loss']) for row in went_on if row['iter'] == '60'
                                                   and row['val_loss']], abs=1e-4)
    exported, tensors = load_model(hf), load_file(hf / 'model.safetensors')
    idx = np.random.default_rng(0).integers(27, size=(3, 16))
    if kind == 'qwen3':
        logits = numpy_rotary(tensors, json.loads((hf / 'config.json').read_text()), idx)
    else:
        key = lambda name: tuple(int(part) if part.isdigit() else part for part in name.split('.')[1:])
        logits = numpy_gpt(unflatten_mapping({key(name): x for name, x in tensors.items()}), idx, 2)
    np.testing.assert_allclose(exported(idx), logits, atol=1e-4)
    assert same(params_of(exported), params_of(load_model(out_dir, 'latest')))
    assert exported.config.bias == (kind == 'gpt2')

    resume(repo, out_dir, '--max_iters=69', '--log_interval=1')
    rows = log_of(out_dir)
    assert_close_losses(rows, went_on)
    assert [row['tokens'] for row in rows[-2:]] == [str(69 * 128), str(70 * 128)]  # the column is new


def test_a_model_of_hugging_faces_goes_back_as_it_came(repo, tmp_path):
    """With its config.json, its tokenizer and all rows of its vocabulary, which has room for more tokens. LoRA holds
    its matrices in bfloat16, as the file does."""
    config = GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=4, n_kv_head=2, head_dim=8, n_embd=16,
                       n_inner=32, arch='qwen2', tied=False)
    theirs = hf.export_config(config, {'pad_token_id': 7}, 320, 'bfloat16')
    hf.write_directory(tmp_path / 'qwen', {'config.json': theirs, 'generation_config.json': {'eos_token_id': [0, 1]}},
                       hf.file_tensors(init_params(config, 0), config, 320, 'bfloat16'))
    bpe_files(tmp_path / 'qwen', chat_template='{{ messages }}')  # with 300 tokens
    run(repo, 'data/text/prepare.py', 'verse.txt', f"--tokenizer={tmp_path / 'qwen'}", '--name=verse-hf')
    args = [arg for arg in LORA if not arg.startswith('--init_from')]
    run(repo, 'train.py', *args, f"--init_from={tmp_path / 'qwen'}", '--dataset=verse-hf', '--out_dir=qwen-lora',
        '--max_iters=3')
    resume(repo, 'qwen-lora', '--max_iters=6')
    base = open_model(tmp_path / 'qwen')[2](dtype='bfloat16')
    assert base['wte']['weight'].dtype == 'bfloat16' and same(arrays_in(repo / 'qwen-lora/base/params'), base)
    run(repo, 'export.py', '--out_dir=qwen-lora', f"--hf_dir={tmp_path / 'back'}", '--checkpoint=latest',
        '--dtype=bfloat16')
    run(repo, 'export.py', '--out_dir=qwen-lora', f"--hf_dir={tmp_path / 'back'}", '--format=gguf')
    assert gguf.GGUFReader(tmp_path / 'back.gguf').get_field('qwen2.context_length').contents() == 64
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix == '.json'}
             for name in ('qwen', 'back')]
    configs = [json.loads(each.pop('config.json')) for each in files]
    assert files[0] == files[1] and configs[0] == configs[1] and configs[0]['max_position_embeddings'] == 64
    back, run_of_it = load_model(tmp_path / 'back'), load_model(repo / 'qwen-lora', 'latest')
    np.testing.assert_allclose(params_of(back)['lm_head']['weight'], base['lm_head']['weight'])
    np.testing.assert_allclose(back(np.arange(16)[None]), run_of_it(np.arange(16)[None]), atol=0.02)


@pytest.mark.parametrize('terminal', [True, False])
def test_a_sample_ends_before_the_end_of_text(monkeypatch, capsys, terminal):
    monkeypatch.setattr('engine.stream', lambda *args, **how: iter([np.array([[15496]]), np.array([[995, 50256]])]))
    monkeypatch.setattr('rundir.open_model', lambda *args: (GPTConfig(16, 64, 1, 1, 2), GPT2_META, lambda T: None))
    monkeypatch.setattr('model.build', lambda *args: None)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--init_from=x', '--start=A', '--num_samples=1', '--device=cpu'])
    exec((HERE / 'sample.py').read_text(encoding='utf-8'), {'__file__': str(HERE / 'sample.py'), '__name__': 'sample'})
    assert capsys.readouterr().out == 'AHello world\n---------------\n'


def test_an_export_replaces_an_export_and_nothing_else(repo, base, refused):
    args = ['export.py', '--out_dir=base', '--hf_dir=hf-again']
    assert 'parameters in float32' in run(repo, *args)
    assert '--overwrite=True' in refused(*args)
    run(repo, *args, '--overwrite=True', '--dtype=bfloat16')
    half, full = (params_of(model)['wte']['weight'] for model in (load_model(repo / 'hf-again'), base))
    np.testing.assert_allclose(half, full, rtol=2**-8)
    (repo / 'hf-again/mine.txt').write_text('do not delete')
    assert 'other files' in refused(*args, '--overwrite=True') and not list(repo.glob('hf-again*.tmp'))


def test_an_exported_character_tokenizer_returns_what_it_was_given(repo):
    text = 'a\n\n\tb  c \r é世界😀\u2028\u00a0 n\u0303"\\'
    (repo / 'odd.txt').write_text(text * 20, encoding='utf-8', newline='')
    run(repo, 'data/text/prepare.py', 'odd.txt', '--name=odd-characters')
    run(repo, 'train.py', *TINY, '--dataset=odd-characters', '--out_dir=odd-run', '--max_iters=1')
    run(repo, 'export.py', '--out_dir=odd-run', '--hf_dir=odd-hf')
    chars = json.loads((repo / 'odd-run/config.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    tokenizer = tokenizers.Tokenizer.from_file(str(repo / 'odd-hf/tokenizer.json'))
    known = ''.join(c for c in text if c in chars)
    ids = tokenizer.encode(known).ids
    assert ids == [chars.index(c) for c in known] and tokenizer.decode(ids) == known
    assert tokenizer.encode('b#b').ids == [chars.index(c) for c in 'b b']  # there is no token for it
    settings = json.loads((repo / 'odd-hf/tokenizer_config.json').read_text(encoding='utf-8'))
    assert settings['model_input_names'] == ['input_ids', 'attention_mask']
    assert not settings['clean_up_tokenization_spaces']


def test_an_exported_bpe_tokenizer_gives_tiktokens_ids(repo):
    enc = gpt2_encoding()
    run(repo, 'data/text/prepare.py', 'verse.txt', '--name=verse-bpe', '--tokenizer=gpt2')
    run(repo, 'train.py', *TINY, '--dataset=verse-bpe', '--out_dir=bpe-run', '--max_iters=1')
    run(repo, 'export.py', '--out_dir=bpe-run', '--hf_dir=bpe-hf')
    exported, trained = load_model(repo / 'bpe-hf'), load_model(repo / 'bpe-run')
    assert exported.config.vocab_size == 50257 < trained.config.vocab_size
    tokenizer = tokenizers.Tokenizer.from_file(str(repo / 'bpe-hf/tokenizer.json'))
    for text in (ROMEO, "don't I'LL  3.14\n\n\n x \t", 'Grüße, 世界 😀👩‍👧 n\u0303\u2028\u00a0\x00',
                 'a<|endoftext|> b', (HERE / 'model.py').read_text(encoding='utf-8')):
        ids = enc.encode(text, allowed_special='all')
        assert tokenizer.encode(text).ids == ids and tokenizer.decode(ids, skip_special_tokens=False) == text


# -----------------------------------------------------------------------------
# faults


def test_kill_9_at_any_moment_loses_nothing(repo):
    """Killed again and again, also while it writes checkpoints, and started again by the same command, the run ends as
    one that was never stopped.
    More rounds: KILL_ROUNDS=100 python -m pytest -q -s test_train.py -k kill_9"""
    rng, out_dir, rounds = np.random.default_rng(0), repo / 'killed', int(os.environ.get('KILL_ROUNDS', 2))
    args = ['config/modern.py', *TINY, '--eval_iters=1', '--lr_decay_iters=1000']  # Muon has a state of its own
    killed_while_saving = 0
    for n in range(rounds):
        process = start(repo, 'train.py', *args, f'--out_dir={out_dir}', '--max_iters=1000000', '--init_from=auto')
        if n == 0:
            read_until(process, 'iter 12:')  # the first time, on any machine, it gets as far as some checkpoints
        try:
            out, err = process.communicate(timeout=rng.uniform(0.5, 3))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, out + err
        killed_while_saving += any('tmp' in path.name for path in out_dir.glob('checkpoints/*'))
    last = max(steps_in(out_dir), default=0)
    resume(repo, out_dir, f'--max_iters={last + 7}')
    run(repo, 'train.py', *args, f'--out_dir={out_dir}-not', f'--max_iters={last + 7}')
    assert_same_run(out_dir, Path(f'{out_dir}-not'))
    print(f'{rounds} kills, {killed_while_saving} of them while a checkpoint was written, {last + 8} iterations')


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(repo, whole, refused):
    hurt = repo / 'hurt'
    shutil.copytree(whole, hurt)
    last, before = steps_in(hurt)[:-3:-1]
    victim = max((hurt / f'checkpoints/{last}/params').rglob('d/*'), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    victim.write_bytes(content)
    assert 'is damaged' in refused('sample.py', '--out_dir=hurt', '--checkpoint=latest', '--device=cpu')
    name = victim.relative_to(hurt / f'checkpoints/{last}')
    assert f'checkpoint {last} is damaged ({name}), going on from {before}' in resume(repo, 'hurt')
    assert_same_run(hurt, whole)
    assert list(hurt.glob(f'damaged-{last}-*'))  # moved aside, not deleted
    for path in (hurt / 'checkpoints').glob('*/params/manifest.ocdbt'):
        path.unlink()
    assert 'can be read' in resume(repo, 'hurt', code=2)


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(repo):
    disk = repo / 'small-disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk]
    if sys.platform != 'linux' or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    try:
        error = run(repo, 'train.py', *TINY, '--n_embd=64', '--out_dir=small-disk/run', '--max_iters=1000', code=1)
        assert 'no space left' in error and 'intact (5' in error and 'Traceback' not in error
        for path in (disk / 'run').glob('checkpoints/*tmp*'):
            shutil.rmtree(path)
        subprocess.run(['mount', '-o', 'remount,size=20m', disk], check=True)
        assert 'Resuming training' in resume(repo, 'small-disk/run', '--max_iters=12')
    finally:
        subprocess.run(['umount', disk], check=True)


@pytest.fixture
def small_run(tmp_path):
    """The Checkpoints of a run whose state is one array, with one checkpoint."""
    (tmp_path / 'run').mkdir()
    checkpoints = Checkpoints(str(tmp_path / 'run'))
    save_small(checkpoints, 5)
    return checkpoints


def save_small(checkpoints, n):
    state = {name: {'x': np.ones(3, np.float32)} for name in ('params', 'opt_state')}
    checkpoints.save(n, state, dict(iter_num=n, wandb_id=None, best_val_loss=2.5, best_iter=n, best_dataset='tiny',
                                    tokens_seen=None))
    checkpoints.wait()


def test_errors_of_the_disk_are_one_line_about_the_checkpoints_that_are_there(small_run):
    for error, message in ((ValueError('UNKNOWN: write failed [OS error 122: EDQUOT Disk quota exceeded]'),
                            r'no space left \(Disk quota exceeded\) on the disk of .*run; .* intact \(5\). Make room'),
                           (OSError(errno.ESTALE, 'Stale file handle'), r'Stale file handle on .* intact \(5\). Mend'),
                           (RuntimeError('[OS error 5: EIO Input/output error]'), 'Input/output error on the disk')):
        with pytest.raises(RunError, match=message), small_run.disk_errors():
            raise error
    with pytest.raises(ZeroDivisionError), small_run.disk_errors():
        1 / 0


def test_a_run_that_was_moved_while_it_trained_ends_and_writes_nothing_where_it_was(small_run, tmp_path):
    (tmp_path / 'run').rename(tmp_path / 'moved')
    (tmp_path / 'run/checkpoints').mkdir(parents=True)  # another run, which has begun there since
    for action in lambda: save_small(small_run, 6), lambda: 1 / 0:  # Orbax raises what it likes
        with pytest.raises(RunError, match='moved or removed'), small_run.disk_errors():
            action()
    assert files_in(tmp_path / 'run') == {} and steps_in(tmp_path / 'moved') == [5]


@pytest.mark.parametrize('change', [{'iter_num': 6}, {'iter_num': '5'}, {'wandb_id': {}}, {'best_val_loss': math.nan},
                                    {'best_val_loss': '1'}, {'best_iter': [5]}, {'best_dataset': 7}, {'kept': ['x']}])
def test_a_checkpoints_progress_is_taken_only_with_values_of_its_types(small_run, change):
    path = small_run.folder / '5/progress/metadata'
    progress = json.loads(path.read_text())
    path.write_text(json.dumps(progress | {'out_dir': '/'}))
    assert read_progress(path.parent.parent) == progress
    path.write_text(json.dumps(progress | change))
    with pytest.raises(ValueError, match=f'is damaged: {next(iter(change))} = '):
        read_progress(path.parent.parent)


def test_a_file_system_without_locks_has_a_file_that_names_the_process(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')

    def no_locks(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with lock_out_dir(tmp_path):
        mine = (tmp_path / 'lock.pid').read_text()
        assert str(os.getpid()) in mine
    assert not (tmp_path / 'lock.pid').exists()
    (tmp_path / 'lock.pid').write_text(mine.replace(socket.gethostname(), 'elsewhere'))  # alive or not, who knows
    with pytest.raises(ValueError, match=r'in use by another training process. If there is none.*delete .*lock\.pid'):
        lock_out_dir(tmp_path)


@pytest.mark.parametrize('part, key, value', [
    ('config', 'learning_rate', math.nan), ('config', 'max_iters', '7'), ('config', 'init_from', ['x']),
    ('model_args', 'rope_theta', math.inf), ('model_args', 'n_head', 3), ('model_args', 'vocab_size', 5)])
def test_a_runs_settings_are_taken_only_with_values_of_their_types(whole, tmp_path, part, key, value):
    saved, config = json.loads((whole / 'config.json').read_text(encoding='utf-8')), load_config('train.py')
    saved['config'] |= {'out_dir': '/', 'coordinator': 'evil:1', 'overwrite': True, 'n_layer': 77, 'print': 'x'}
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    new = resume_config(tmp_path, config, set(), set())[0]
    kept = ('out_dir', 'coordinator', 'overwrite')
    assert new.keys() == config.keys() and all(new[k] == config[k] for k in kept) and new['n_layer'] == 1
    saved[part][key] = value
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='config.json is damaged: '):
        resume_config(tmp_path, config, set(), set())


def test_what_was_edited_in_the_model_since_a_run_is_named(small_run, whole, tmp_path):
    import jax
    item, wanted = small_run.folder / '5/params', {'x': jax.ShapeDtypeStruct((3,), np.float32)}
    check_arrays(item, wanted)
    with pytest.raises(ValueError, match=r'x is \(3,\) there and \(4,\) in the code'):
        check_arrays(item, {'x': jax.ShapeDtypeStruct((4,), np.float32)})
    with pytest.raises(ValueError, match='x is only there, y is only in the code'):
        check_arrays(item, {'y': wanted['x']})
    saved = json.loads((whole / 'config.json').read_text(encoding='utf-8'))
    saved['model_args']['window'] = 16
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='has window = 16, which GPTConfig in model.py does not know'):
        open_run(tmp_path)


def test_a_run_that_goes_on_to_other_checkpoints_while_it_is_read_is_read_again(small_run):
    tries = []

    def read():  # like a reader that comes just before the run removes checkpoint 5
        tries.append(find_step(small_run.out_dir, 'latest'))
        if len(tries) == 1:
            save_small(small_run, 6)
            shutil.rmtree(small_run.folder / '5')
        return damaged_file(small_run.folder / str(tries[-1]))

    assert reread(small_run.out_dir, read) is None and tries == [5, 6]
    with pytest.raises(ZeroDivisionError):
        reread(small_run.out_dir, lambda: 1 / 0)


def test_a_second_process_is_refused_or_waits_for_the_end_of_the_first_and_goes_on(repo):
    auto = [*TINY, '--out_dir=shared', '--init_from=auto', '--eval_interval=1']
    first = start(repo, 'train.py', *auto, '--max_iters=100000')
    read_until(first, 'iter 3:')
    assert 'in use by another' in run(repo, 'train.py', *TINY, '--out_dir=shared', '--overwrite=True', code=2)
    second = start(repo, 'train.py', *auto, '--max_iters=1000')
    read_until(second, 'shared is in use by another training process: waiting')
    for process, line in (first, 'iter'), (second, 'Resuming training from shared'):
        read_until(process, line)
        process.kill()
        process.communicate()


EXPLODES = [*TINY, '--dtype=float16', '--learning_rate=1000.0', '--warmup_iters=0', '--decay_lr=False',
            '--max_skipped=7', '--max_iters=1000']


def test_gradients_that_are_not_finite_end_the_run_and_spare_the_parameters(repo):
    error = run(repo, 'train.py', *EXPLODES, '--out_dir=exploded', code=1)
    assert 'gradients of 7 iterations in a row' in error and len(error.splitlines()) == 1
    assert log_of(repo / 'exploded')[-1]['skipped'] == '7'


def test_debug_nans_names_the_operation_that_makes_the_first_nan(repo):
    """This computes one operation after the other, so it is slow. The model is as small as can be. The NaN comes in
    the second iteration, when JAX has seen every operation before."""
    small = ['--n_head=1', '--n_embd=4', '--block_size=4', '--batch_size=1',
             '--gradient_accumulation_steps=1', '--eval_iters=1', '--dropout=0.0']
    error = run(repo, 'train.py', *EXPLODES, *small, '--out_dir=debugged', '--debug_nans=True', code=1)
    assert 'FloatingPointError' in error and 'model.py' in error


def test_float16_trains_like_other_types(repo, whole):
    run(repo, 'train.py', *TINY, '--dtype=float16', '--out_dir=half')
    a, b = ([float(row['loss']) for row in log_of(out_dir) if row['loss']] for out_dir in (repo / 'half', whole))
    assert 0 < np.abs(np.subtract(a, b)).max() < 0.02
    rest = arrays_in(repo / 'half/checkpoints/13/rest'), arrays_in(whole / 'checkpoints/13/rest')
    assert rest[0]['loss_scale'] == rest[1]['loss_scale'] == 2**15  # a run of another type can go on in it


# -----------------------------------------------------------------------------
# configuration


def load_config(script, *args, name='config'):
    """The config that a script would run with, or another name that configurator.py gives it, without running it."""
    source = (HERE / script).read_text(encoding='utf-8')
    head, _, _ = source.partition('exec(open(')
    names = {'__file__': str(HERE / script), '__name__': 'config'}
    exec(head, names)
    argv, sys.argv = sys.argv, [script, *map(str, args)]
    try:
        exec((HERE / 'configurator.py').read_text(encoding='utf-8'), names)
    finally:
        sys.argv = argv
    return names[name]


@pytest.mark.parametrize('recipe', sorted((HERE / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    config = load_config('train.py', recipe)
    keys = {field.name for field in fields(GPTConfig)} & config.keys() - {'dtype', 'flash', 'kernels'}
    GPTConfig(vocab_size=50304, **{key: config[key] for key in keys})
    assert (HERE / 'data' / config['dataset'] / 'prepare.py').exists()


def test_the_modern_recipe_suits_the_width_the_batch_and_the_length_of_the_recipe_before_it():
    laptop = load_config('train.py', 'config/train_shakespeare_char.py', 'config/laptop.py', 'config/modern.py')
    gpt2 = load_config('train.py', 'config/train_gpt2.py', 'config/modern.py')
    assert laptop['learning_rate'] / gpt2['learning_rate'] == pytest.approx((768 / 128)**0.75)
    assert [(config['beta1'], config['tied']) for config in (laptop, gpt2)] == [(0.85, False), (0.95, True)]
    for config in laptop, gpt2:
        assert config['learning_rate'] * config['weight_decay'] * config['max_iters'] == pytest.approx(1.6)


def test_every_key_is_read():
    models = {field.name for field in fields(GPTConfig)}
    for script in ('train.py', 'sample.py', 'export.py'):
        used = (HERE / script).read_text(encoding='utf-8').partition('configurator.py')[2]
        for key in load_config(script):
            found = re.search(rf"(?<![\w'.]){key}(?![\w'])", used)
            assert found or (script == 'train.py' and key in models), key


def test_the_models_defaults_are_the_scripts():
    config = load_config('train.py')
    for field in fields(GPTConfig):
        if field.name in config and field.name not in ('dtype', 'flash') and isinstance(field.default, (int, float)):
            assert field.default == config[field.name], field.name


def test_files_go_left_to_right_and_options_win(tmp_path):
    (tmp_path / 'a.py').write_text('import math\nbatch_size = 3\nlearning_rate = 1\n_half = 2\n'
                                   'max_iters = lr_decay_iters // _half\n')
    (tmp_path / 'b.py').write_text('batch_size = 4\nblock_size = batch_size * 2\n')
    config = load_config('train.py', '--dropout=0', tmp_path / 'a.py', '--batch_size=5', tmp_path / 'b.py',
                         '--out_dir=~/x=1', '--data_dir=~/d', '--dataset=7')
    wanted = dict(batch_size=5, block_size=8, max_iters=300000, out_dir=os.path.expanduser('~/x=1'), dataset='7',
                  data_dir=os.path.expanduser('~/d'), learning_rate=1.0, dropout=0.0)
    assert {key: (config[key], type(config[key])) for key in wanted} == {k: (v, type(v)) for k, v in wanted.items()}
    (tmp_path / 'default.py').write_text('n_layer = 12\n')  # is given, too
    assert load_config('train.py', tmp_path / 'default.py', '--seed=1337', name='given') == {'n_layer', 'seed'}


@pytest.mark.parametrize('args, message', [
    ('--batchsize=3', 'unknown key batchsize, did you mean batch_size?'), ('--zzz=3', 'unknown key zzz, see --help'),
    ('--batch_size=3.5', 'batch_size is an int'), ('--batch_size=True', 'batch_size is an int'),
    ('--batch_size=many', "not 'many'"), ('--bias=1', 'bias is a bool'),
    ('--learning_rate=nan', 'learning_rate is a float'), ('--learning_rate=1e999', 'learning_rate is a float'),
    ('--seed={[]: 1}', 'seed is an int'), ('--seed=' + '(' * 300, 'seed is an int'),
    ('--max_iters', '--key=value'), (['--max_iters', '10'], 'so --max_iters=10'), ('-seed=3', '--key=value'),
    ('batch_size=3', 'No such file'), ('config/none.py', 'config file config/none.py: No such file'),
    ('n_layer = 2\nn_head = = 3', 'file.py:2: '), ('n_layer = "2"', 'file.py:1: n_layer is an int'),
    ('\n\nn_layers = 2', 'file.py:3: unknown key n_layers, did you mean n_layer?'),
    ('exec("n_layers = 2")', 'file.py: unknown key n_layers'), ('\n1 / 0', 'file.py:2: ZeroDivisionError'),
    ('for i in range(3):\n    n_layer = i', 'file.py:1: unknown key i, if it is a variable of its own, write _i'),
])
def test_a_mistake_in_the_config_is_named(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    if 'file.py' in message:
        (tmp_path / 'file.py').write_text(args)
        args = 'file.py'
    with pytest.raises(SystemExit) as e:
        load_config('train.py', *([args] if isinstance(args, str) else args))
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith('train.py: error: ')
    assert message in error and len(error.splitlines()) == 1


def test_what_nanogpts_users_type_does_what_they_mean(tmp_path, capsys):
    (tmp_path / 'old.py').write_text("compile = False\ndevice = 'cuda'\n")
    config = load_config('train.py', tmp_path / 'old.py', '--backend=nccl', '--fsdp', '--decay_lr=false',
                         '--max_iters=1e4', '--batch_size=8.0')
    found = [config[key] for key in ('device', 'fsdp', 'decay_lr', 'max_iters', 'batch_size')]
    assert found == ['cuda', True, False, 10000, 8]
    assert type(config['max_iters']) is type(config['batch_size']) is int
    of_compile, of_backend = capsys.readouterr().err.splitlines()
    assert 'old.py:1: compile has no meaning here' in of_compile and 'backend has no meaning here' in of_backend


def test_a_recipe_may_take_in_another_and_have_variables_of_its_own(tmp_path, monkeypatch):
    (tmp_path / 'inner.py').write_text('import time\nbatch_size = 12\nmax_iters = 5\n')
    monkeypatch.chdir(tmp_path)
    for text in 'from inner import *', 'exec(open("inner.py").read())':
        (tmp_path / 'outer.py').write_text(f'{text}\nfor _i in range(3):\n    seed = batch_size + max_iters + _i\n')
        config = load_config('train.py', 'outer.py')
        assert (config['max_iters'], config['seed']) == (5, 19), text
    config = load_config('train.py', 'config/laptop.py', 'config/eval_gpt2_xl.py')  # they are found from any folder
    assert [config[key] for key in ('n_embd', 'init_from', 'eval_only')] == [128, 'gpt2-xl', True]


def test_sampling_takes_a_recipes_out_dir_device_dtype_and_seed_and_what_an_eval_only_one_starts_from(tmp_path):
    (tmp_path / 'mine.py').write_text("n_layer = 2\nseed = 3\ndtype = 'float32'\ndevice = 'cpu'\n"
                                      'compile_cache = False\n')
    defaults = load_config('sample.py')
    config = load_config('sample.py', 'config/finetune_shakespeare.py', tmp_path / 'mine.py')
    assert config == defaults | {'out_dir': 'out-shakespeare', 'seed': 3, 'dtype': 'float32', 'device': 'cpu'}
    assert load_config('sample.py', 'config/eval_gpt2_large.py') == defaults | {'init_from': 'gpt2-large'}
    (tmp_path / 'own.py').write_text("init_from = 'gpt2'\ntop_k = 5\n")  # for sample.py alone
    assert load_config('sample.py', tmp_path / 'own.py') == defaults | {'init_from': 'gpt2', 'top_k': 5}
    with pytest.raises(SystemExit):
        load_config('sample.py', '--batch_size=3')


def test_nothing_that_a_file_holds_changes_a_terminal(monkeypatch, capsys):
    strange = 'ü\x1b]0;title\x07\x9b2J \u202e\r\ud800'
    for_terminal = load_config('sample.py', name='for_terminal')
    assert for_terminal(strange) == strange.replace('\ud800', '\\ud800')  # a file or a pipe gets the text as it is
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    assert for_terminal(f'a\n\t{strange}') == 'a\n\tü\\x1b]0;title\\x07\\x9b2J \\u202e\\r\\ud800'
    with pytest.raises(SystemExit):
        load_config('sample.py', name='fail')(f'{strange}\n' * 1000)
    error = capsys.readouterr().err
    assert error.startswith('sample.py: error: ü\\x1b]0;title') and error[:-1].isprintable() and len(error) < 1100


def test_a_full_disk_under_the_output_is_said_and_a_closed_pipe_is_not(tmp_path, monkeypatch, capsys):
    """As in `python sample.py > samples.txt` and in `python train.py > log.txt`, which also saves."""
    def fails(error):
        def print_or_flush(*args):
            raise error
        return print_or_flush

    monkeypatch.setattr(os, '_exit', sys.exit)
    monkeypatch.setattr(os, 'dup2', lambda *args: None)
    flush = load_config('sample.py', name='_flush')
    for error, code, line in ((OSError(errno.ENOSPC, 'No space left on device'), 1, 'No space left on device\n'),
                              (BrokenPipeError(), 141, '')):
        monkeypatch.setattr(sys, 'stdout', SimpleNamespace(flush=fails(error), fileno=lambda: 1))
        with pytest.raises(SystemExit) as end:
            flush()
        assert end.value.code == code and capsys.readouterr().err.endswith(line)
        monkeypatch.setattr('tqdm.tqdm.write', fails(error))
        stop = StopSignal(None)
        Log(tmp_path, 0, 9, 1, 128, None, 2, stop, writes=False).say('iter 0: loss 0.0000')
        assert stop.received() and bool(stop.why) == (code == 1)


def test_help_lists_every_key_with_its_default_and_comment(capsys):
    for script in ('train.py', 'export.py', 'sample.py'):
        with pytest.raises(SystemExit) as e:
            load_config(script, '--help')
        out = capsys.readouterr().out
        docstring = (HERE / script).read_text(encoding='utf-8').split('"""')[1].strip()
        assert e.value.code == 0 and out.startswith(docstring)
        assert set(re.findall(r'^  --(\w+)=\S', out, re.MULTILINE)) == load_config(script).keys()
    assert re.search(r'--top_k=200 +keep only the top_k', out)


# -----------------------------------------------------------------------------
# mistakes


def test_a_mistake_ends_a_script_with_one_line_and_code_2_and_nothing_written(repo, whole):
    for script, *args, message in (('train.py', *TINY, '--device=gpu', "device = 'gpu'"),
                                   ('train.py', *TINY, '--block_size=200', '--batch_size=1000000', '--dropout=0.0',
                                    'out of memory (needs'),
                                   ('sample.py', '--device=gpu', "device = 'gpu'"),
                                   ('export.py', '--hf_dir=data', "hf_dir = 'data'")):
        before = sorted(repo.rglob('*'))
        error = run(repo, script, *args, f"--out_dir={'untouched' if script == 'train.py' else 'whole'}", code=2)
        assert message in error and len(error.splitlines()) == 1 and error.startswith(f'{script}: error: '), error
        assert sorted(repo.rglob('*')) == before


@pytest.fixture(scope='module')
def mistaken(repo, whole, base):
    """The repository with runs to go on with or to sample from, and datasets and runs with one thing wrong in each."""
    good = repo / 'data/tiny'
    meta = json.loads((good / 'meta.json').read_text(encoding='utf-8'))
    more = {'kind': 'char', 'chars': meta['tokenizer']['chars'] + '~'}
    for name, file, content in (('odd', 'train.bin', b'123'), ('empty', 'val.bin', b''),
                                ('short', 'val.bin', bytes(32)),
                                ('outside', 'val.bin', (good / 'val.bin').read_bytes() + b'\xff\xff'),
                                ('not-json', 'meta.json', b'{'),
                                ('no-vocab', 'meta.json', {'tokenizer': meta['tokenizer']}),
                                ('no-tokenizer', 'meta.json', {'vocab_size': meta['vocab_size']}),
                                ('other', 'meta.json', {'vocab_size': meta['vocab_size'] + 1, 'tokenizer': more})):
        shutil.copytree(good, repo / 'data' / name)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (repo / 'data' / name / file).write_bytes(content)
    for name, what in ('no-settings', 'config.json'), ('no-checkpoints', 'checkpoints'):
        shutil.copytree(whole, repo / name, ignore=shutil.ignore_patterns(what))
    (repo / 'latin1.txt').write_bytes('Grüße'.encode('latin-1'))


TRAIN, RESUME = ['train.py', *TINY, '--out_dir=untouched'], ['train.py', '--init_from=resume', '--out_dir=whole']
TUNE = ['train.py', *(arg for arg in TINY if not arg.startswith('--n_')), '--out_dir=untouched', '--init_from=base']
SAMPLE, EXPORT = ['sample.py', '--out_dir=whole', '--device=cpu'], ['export.py', '--out_dir=base', '--hf_dir=hf-not']


def bad(begin, **values):
    """Mistakes whose messages begin with the key and its value."""
    return [(begin, f'--{key}={value}', f'{key} = {value!r}') for key, value in values.items()]


@pytest.mark.parametrize('begin, arg, message', [
    *bad(TRAIN, n_embd=-16, n_layer=10**6, block_size=0, batch_size=0, gradient_accumulation_steps=0, max_iters=-1,
         eval_interval=0, log_interval=-5, eval_iters=0, learning_rate=-1.0, beta1=1.0, seed=-1, mesh_tensor=3,
         mesh_data=2, optimizer='sgd', lr_schedule='none', init_from='gpt5'),  # test_model.py has more about models
    (TRAIN, '--batch_size=10000000', 'batch_size = 10000000: must be from 1 to 1,000,000'),
    (TRAIN, '--n_head=3', 'n_embd = 16: n_head = 3 must divide it'),
    (TRAIN, '--dataset=none',
     "dataset = 'none' is not prepared: run python data/text/prepare.py YOUR_FILES --name=none"),
    (TRAIN, '--dataset=shakespeare', 'run python data/shakespeare/prepare.py'),
    (TRAIN, '--data_dir=none', 'run python data/text/prepare.py YOUR_FILES --name=tiny --data_dir=none'),
    (TRAIN, '--dataset=odd', 'train.bin holds 3 bytes'), (TRAIN, '--dataset=empty', 'val.bin holds 0 bytes'),
    (TRAIN, '--dataset=short', 'more than block_size = 16'),
    (TRAIN, '--dataset=outside', 'val.bin holds token 65535'),
    (TRAIN, '--dataset=not-json', 'meta.json is not a JSON object'),
    (TRAIN, '--dataset=no-vocab', 'meta.json lacks'), (TRAIN, '--dataset=no-tokenizer', 'meta.json lacks'),
    (TRAIN, '--num_processes=2', 'needs --coordinator=HOST:PORT'), (TRAIN, '--coordinator=host', 'HOST:PORT'),
    ([*TRAIN, '--coordinator=host:1', '--num_processes=2'], '--process_id=2', 'process_id = 2: must be from 0 to 1'),
    (TRAIN, '--init_from=resume', 'there is nothing to resume'), (TRAIN, '--out_dir=verse.txt/run', 'verse.txt/run'),
    (RESUME, '--out_dir=no-settings', 'there is nothing to resume'),
    ([*RESUME, '--init_from=auto'], '--overwrite=True', 'leave one out'),
    (TRAIN, '--out_dir=s3://bucket/run', 's3://bucket/run: a run is in a folder of this machine'),
    ([*TRAIN, '--profile=True'], '--out_dir=gs://bucket/run', 'profile = True'),
    (EXPORT, '--hf_dir=gs://bucket/hf', "hf_dir = 'gs://bucket/hf'"),
    (TRAIN, '--checkpoint=5', "checkpoint = '5': only --init_from=resume"),
    *((begin, '--checkpoint=7', "checkpoint = '7': must be latest, best, or one of 10, 13")
      for begin in (RESUME, SAMPLE)),
    *((RESUME, f'--{key}={new}', f'{key} = {new}: the run in whole has {key} = {old}, which cannot change')
      for key, new, old in (('n_layer', 3, 1), ('bias', True, False), ('arch', 'qwen3', 'gpt2'),
                            ('optimizer', 'muon', 'adamw'), ('lora_rank', 4, 0))),
    (RESUME, '--dataset=other', "dataset = 'other' has another vocabulary than the run in whole"),
    (TUNE, '--n_layer=3', 'n_layer = 3: base has n_layer = 1'),
    (TUNE, '--block_size=17', 'block_size = 17: base has block_size = 16'),
    (TUNE, '--dataset=other', "dataset = 'other' has another vocabulary than base"),
    ([*TUNE, '--overwrite=True'], '--out_dir=base', "init_from = 'base' is out_dir, too"),
    *bad(SAMPLE, top_k=-1, top_p=0.0, temperature=-1.0, num_samples=0, checkpoint='third', init_from='data'),
    (SAMPLE, '--top_p=1.5', 'top_p = 1.5'), (SAMPLE, '--out_dir=nowhere', "out_dir = 'nowhere' holds no run"),
    (SAMPLE, '--start=§', "does not know '§'"), (SAMPLE, '--start=', 'start is empty'),
    *([(SAMPLE, '--start=FILE:/dev/zero', 'more than 100 million characters')] if os.name == 'posix' else []),
    (SAMPLE, '--start=FILE:none.txt', 'No such file'), (SAMPLE, '--start=FILE:latin1.txt', 'not UTF-8'),
    *bad(EXPORT, dtype='int8', checkpoint='third', out_dir='data'),
    *((begin, '--out_dir=no-checkpoints', 'best.json names checkpoint 10, which is not there')
      for begin in (SAMPLE, EXPORT)),
])
def test_a_mistake_is_named_before_anything_is_done(mistaken, refused, begin, arg, message):
    assert message in refused(*begin, arg)


def test_a_model_without_newlines_starts_with_another_character_and_its_vocabulary_is_not_printed(repo, whole):
    shutil.copytree(whole, repo / 'no-newline')
    run_of = json.loads((repo / 'no-newline/config.json').read_text(encoding='utf-8'))
    run_of['tokenizer']['chars'] = run_of['tokenizer']['chars'].replace('\n', '§')
    (repo / 'no-newline/config.json').write_text(json.dumps(run_of))
    process = start(repo, 'sample.py', '--out_dir=no-newline', '--device=cpu', '--max_new_tokens=5', '--num_samples=12')
    out, err = process.communicate(timeout=100)
    assert "start = '§'" in err and out.count('---------------') == 12 and out.startswith('§')
    with pytest.raises(ValueError, match="does not know 'a'; it knows '.{80}...'$"):
        tokenizer({'kind': 'char', 'chars': ''.join(map(chr, range(0x4e00, 0x9000)))})[0]('a')


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(repo, whole):
    (repo / 'prompt.txt').write_text(ROMEO, encoding='utf-8')
    process = start(repo, 'sample.py', '--out_dir=whole', '--start=FILE:prompt.txt', '--num_samples=1',
                    '--max_new_tokens=5')
    out, err = process.communicate(timeout=100)
    assert f'the prompt has {len(ROMEO)} tokens, of which the model sees the last 16' in err
    assert out.startswith(ROMEO)
