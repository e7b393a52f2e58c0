"""
Claims about whole runs: the scripts as a user starts them, in a copy of the repository with its own data.

    python -m pytest -q
"""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from model import GPTConfig
from rundir import load_run

HERE = Path(__file__).resolve().parent
TINY = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
        '--gradient_accumulation_steps=2', '--eval_iters=4', '--eval_interval=5', '--max_iters=12', '--lr_decay_iters=12',
        '--warmup_iters=2', '--learning_rate=1e-2', '--log_interval=1', '--dropout=0.1', '--dataset=tiny']
ROMEO = 'But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n'


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    """A copy of the repository with a prepared dataset, `tiny`."""
    repo = tmp_path_factory.mktemp('repo')
    for name in ('train.py', 'model.py', 'rundir.py', 'sample.py', 'configurator.py'):
        shutil.copy(HERE / name, repo)
    shutil.copytree(HERE / 'config', repo / 'config')
    for prepare in (HERE / 'data').glob('*/prepare.py'):
        (repo / 'data' / prepare.parent.name).mkdir(parents=True)
        shutil.copy(prepare, repo / 'data' / prepare.parent.name)
    (repo / 'verse.txt').write_text(ROMEO * 40, encoding='utf-8')
    run(repo, 'data/text/prepare.py', 'verse.txt', '--name=tiny')
    return repo


def start(repo, script, *args, **env):
    return subprocess.Popen([sys.executable, script, *map(str, args)], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, encoding='utf-8', env=os.environ | {'WANDB_MODE': 'offline'} | env)


def run(repo, script, *args, code=0, **env):
    """Runs a script to its end and returns what it printed: stdout, and stderr where it was to fail."""
    process = start(repo, script, *args, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return err if code else out


def log_of(out_dir):
    with open(out_dir / 'log.csv', newline='', encoding='utf-8') as f:
        return [{k: v for k, v in row.items() if k not in ('time_ms', 'tokens_per_s')} for row in csv.DictReader(f)]


def assert_same_run(a, b):
    """The same losses, and bit for bit the same parameters and optimizer state in the latest checkpoint."""
    import jax
    import orbax.checkpoint as ocp
    assert log_of(a) == log_of(b)
    restored = []
    for out_dir in (a, b):
        step = max(ocp.utils.checkpoint_steps(out_dir / 'checkpoints'))
        restored.append([step] + [ocp.StandardCheckpointer().restore(out_dir / 'checkpoints' / str(step) / item)
                                  for item in ('params', 'rest')])
    assert jax.tree.all(jax.tree.map(np.array_equal, *restored))


# -----------------------------------------------------------------------------
# the main job


def test_prepare_train_resume_and_sample(repo):
    out = run(repo, 'train.py', *TINY, '--out_dir=out', '--sample_tokens=20')
    steps = re.findall(r'^step (\d+): train loss (\d\.\d{4}), val loss \d\.\d{4}$', out, re.MULTILINE)
    assert [int(n) for n, _ in steps] == [0, 5, 10] and float(steps[-1][1]) < float(steps[0][1]) - 0.3
    iters = re.findall(r'^iter (\d+): loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a, tok/s [\d,]+$', out, re.MULTILINE)
    assert [int(n) for n in iters] == list(range(13))
    assert 'best validation loss' in out and 'tokens per iteration will be: 128' in out and '--- a sample at step 10' in out
    saved = json.loads((repo / 'out/config.json').read_text(encoding='utf-8'))
    assert saved['config']['n_embd'] == 16 and saved['tokenizer']['chars'] == ''.join(sorted(set(ROMEO)))
    assert (repo / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    rows = log_of(repo / 'out')
    assert [r['iter'] for r in rows if r['val_loss']] == ['0', '5', '10'] and sum(bool(r['loss']) for r in rows) == 13

    assert 'step 15' in run(repo, 'train.py', '--init_from=resume', '--out_dir=out', '--max_iters=16', '--device=cpu')
    shutil.rmtree(repo / 'data/tiny')  # a run directory is complete in itself
    text = run(repo, 'sample.py', '--out_dir=out', '--start=But', '--num_samples=3', '--max_new_tokens=40', '--device=cpu')
    samples = text.split('\n---------------\n')
    assert len(samples) == 4 and all(s.startswith('But') and len(s) == 43 for s in samples[:3]) and samples[3] == ''
    run(repo, 'data/text/prepare.py', 'verse.txt', '--name=tiny')


def test_resuming_changes_nothing(repo):
    run(repo, 'train.py', *TINY, '--out_dir=whole')
    run(repo, 'train.py', *TINY, '--out_dir=parts', '--max_iters=3')  # ends between two evaluations
    for first, last in ((4, 9), (10, 12)):  # ends before an evaluation, and begins with one
        out = run(repo, 'train.py', '--init_from=resume', '--out_dir=parts', f'--max_iters={last}', '--device=cpu')
        assert [int(n) for n in re.findall(r'^iter (\d+)', out, re.MULTILINE)] == list(range(first, last + 1))
    assert_same_run(repo / 'whole', repo / 'parts')


def test_eval_only_writes_nothing(repo):
    assert 'step 0: train loss' in run(repo, 'train.py', *TINY, '--out_dir=nowhere', '--eval_only=True')
    assert not (repo / 'nowhere').exists()


def test_the_best_and_the_latest_checkpoint_are_kept(repo):
    """Learning at a rate that destroys the model after a good start: the best is not the last."""
    run(repo, 'train.py', *TINY, '--out_dir=worse', '--max_iters=5')
    run(repo, 'train.py', '--init_from=resume', '--out_dir=worse', '--max_iters=40', '--learning_rate=10.0', '--decay_lr=False',
        '--device=cpu')
    best = json.loads((repo / 'worse/best.json').read_text(encoding='utf-8'))
    losses = {int(row['iter']): float(row['val_loss']) for row in log_of(repo / 'worse') if row['val_loss'] and row['iter'] != '0'}
    assert best['iter'] == min(losses, key=losses.get) < max(losses)
    assert {int(p.name) for p in (repo / 'worse/checkpoints').iterdir()} == {best['iter'], 40, 41}
    a, b = (load_run(repo / 'worse', which).wte.weight[...] for which in ('best', 'latest'))
    assert (a != b).any()


def test_a_new_run_does_not_replace_an_old_one(repo):
    run(repo, 'train.py', *TINY, '--out_dir=mine', '--max_iters=1')
    before = (repo / 'mine/log.csv').read_text()
    assert '--overwrite=True' in run(repo, 'train.py', *TINY, '--out_dir=mine', code=2)
    assert (repo / 'mine/log.csv').read_text() == before
    run(repo, 'train.py', *TINY, '--out_dir=mine', '--overwrite=True', '--max_iters=2')
    assert (repo / 'mine/log.csv').read_text() != before


def test_the_log_forgets_what_a_resumed_run_does_again(repo):
    run(repo, 'train.py', *TINY, '--out_dir=again')
    shutil.rmtree(repo / 'again/checkpoints/13')
    with open(repo / 'again/log.csv', 'a') as f:
        f.write('13,2.')  # cut off by a crash
    run(repo, 'train.py', '--init_from=resume', '--out_dir=again', '--device=cpu')
    assert [row['iter'] for row in log_of(repo / 'again')] == [str(n) for n in sorted([*range(13), 0, 5, 10])]


def test_ctrl_c_does_not_wait_for_an_evaluation(repo):
    process = start(repo, 'train.py', *TINY, '--out_dir=long-evaluation', '--eval_iters=1000000', '--max_iters=3')
    for line in process.stdout:
        if line.startswith('Initializing'):
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'step 0' not in out, out + err
    run(repo, 'train.py', '--init_from=resume', '--out_dir=long-evaluation', '--eval_iters=4', '--device=cpu')
    run(repo, 'train.py', *TINY, '--out_dir=short-evaluation', '--max_iters=3')
    assert_same_run(repo / 'long-evaluation', repo / 'short-evaluation')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_saving_it(repo, number):
    out_dir = repo / f'signal{number}'
    process = start(repo, 'train.py', *TINY, f'--out_dir={out_dir}', '--max_iters=100000', '--lr_decay_iters=12')
    for line in process.stdout:
        if line.startswith('iter 7:'):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 128 + number
    assert f'--init_from=resume --out_dir={out_dir}' in rest
    done = max(int(p.name) for p in (out_dir / 'checkpoints').iterdir())
    run(repo, 'train.py', '--init_from=resume', f'--out_dir={out_dir}', f'--max_iters={done + 3}', '--device=cpu')
    run(repo, 'train.py', *TINY, f'--out_dir={out_dir}-whole', f'--max_iters={done + 3}')
    assert_same_run(out_dir, Path(f'{out_dir}-whole'))


def test_wandb_logs_without_a_network(repo):
    run(repo, 'train.py', *TINY, '--out_dir=with-wandb', '--max_iters=1', '--wandb_log=True', WANDB_DIR=str(repo))
    assert list((repo / 'wandb').glob('offline-run-*'))


# -----------------------------------------------------------------------------
# faults


def test_kill_9_at_any_moment_loses_nothing(repo):
    """Killed again and again, in the middle of checkpoints too, the run ends as one that was never stopped. More rounds:
    KILL_ROUNDS=100 python -m pytest -q test_train.py -k kill_9"""
    rng, out_dir, rounds = np.random.default_rng(0), repo / 'killed', int(os.environ.get('KILL_ROUNDS', 3))
    args = [*TINY, '--n_embd=64', '--eval_iters=1', '--lr_decay_iters=1000']
    killed_while_saving = 0
    for n in range(rounds):
        begun = (out_dir / 'config.json').exists()  # a run that was killed before it began begins again
        process = start(repo, 'train.py', *(['--init_from=resume'] if begun else args), f'--out_dir={out_dir}', '--max_iters=1000000', '--device=cpu')
        while n == 0 and not process.stdout.readline().startswith('iter 12:'):
            pass  # the first time, wherever this runs, it gets as far as some checkpoints
        try:
            out, err = process.communicate(timeout=rng.uniform(1, 8))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, out + err
        killed_while_saving += any('tmp' in path.name for path in out_dir.glob('checkpoints/*'))
    last = max([int(path.name) for path in out_dir.glob('checkpoints/*') if path.name.isdigit()], default=0)
    run(repo, 'train.py', '--init_from=resume', f'--out_dir={out_dir}', f'--max_iters={last + 7}', '--device=cpu')
    run(repo, 'train.py', *args, f'--out_dir={out_dir}-not', f'--max_iters={last + 7}')
    assert_same_run(out_dir, Path(f'{out_dir}-not'))
    print(f'{rounds} kills, {killed_while_saving} of them while a checkpoint was written, {last + 8} iterations')


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(repo):
    run(repo, 'train.py', *TINY, '--out_dir=whole-one')
    run(repo, 'train.py', *TINY, '--out_dir=hurt', '--max_iters=11')
    victim = max((repo / 'hurt/checkpoints/12/params').rglob('d/*'), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    victim.write_bytes(content)
    assert 'is damaged' in run(repo, 'sample.py', '--out_dir=hurt', '--checkpoint=latest', '--device=cpu', code=2)
    out = run(repo, 'train.py', '--init_from=resume', '--out_dir=hurt', '--max_iters=12', '--device=cpu')
    assert f'checkpoint 12 is damaged ({victim.relative_to(repo / "hurt/checkpoints/12")}), going on from 10' in out
    assert_same_run(repo / 'hurt', repo / 'whole-one')
    assert list((repo / 'hurt').glob('damaged-12-*'))  # moved aside, not deleted
    for path in (repo / 'hurt/checkpoints').glob('*/params/manifest.ocdbt'):
        path.unlink()
    assert 'can be read' in run(repo, 'train.py', '--init_from=resume', '--out_dir=hurt', '--device=cpu', code=2)


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(repo):
    disk = repo / 'small-disk'
    disk.mkdir()
    if sys.platform != 'linux' or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    try:
        error = run(repo, 'train.py', *TINY, '--n_embd=64', '--out_dir=small-disk/run', '--max_iters=1000', code=1)
        assert 'no space left' in error and 'intact (5' in error and 'Traceback' not in error
        for path in (disk / 'run').glob('checkpoints/*tmp*'):
            shutil.rmtree(path)
        subprocess.run(['mount', '-o', 'remount,size=20m', disk], check=True)
        run(repo, 'train.py', '--init_from=resume', '--out_dir=small-disk/run', '--max_iters=12', '--device=cpu')
        run(repo, 'train.py', *TINY, '--n_embd=64', '--out_dir=large-disk')
        assert_same_run(disk / 'run', repo / 'large-disk')
    finally:
        subprocess.run(['umount', disk], check=True)


def test_a_second_process_is_refused(repo):
    process = start(repo, 'train.py', *TINY, '--out_dir=shared', '--max_iters=1000000')
    for line in process.stdout:
        if line.startswith('iter 3:'):
            break
    assert 'in use by another' in run(repo, 'train.py', '--init_from=resume', '--out_dir=shared', '--device=cpu', code=2)
    process.kill()
    process.communicate()


def test_gradients_that_are_not_finite_end_the_run_and_spare_the_parameters(repo):
    args = [*TINY, '--dtype=float16', '--learning_rate=1000.0', '--grad_clip=0.0', '--warmup_iters=0', '--decay_lr=False', '--max_skipped=7']
    error = run(repo, 'train.py', *args, '--out_dir=exploded', '--max_iters=1000', code=1)
    assert 'gradients of 7 iterations in a row' in error and len(error.splitlines()) == 1
    assert log_of(repo / 'exploded')[-1]['skipped'] == '7'
    error = run(repo, 'train.py', *args, '--out_dir=debugged', '--debug_nans=True', '--max_iters=1000', code=1)
    assert 'FloatingPointError' in error and 'model.py' in error


def test_float16_trains(repo):
    out = run(repo, 'train.py', *TINY, '--dtype=float16', '--out_dir=half', '--max_iters=40', '--lr_decay_iters=40')
    losses = [float(x) for x in re.findall(r'^step \d+: train loss (\S+),', out, re.MULTILINE)]
    assert losses[-1] < losses[0] - 0.5


# -----------------------------------------------------------------------------
# data


def test_the_embedded_dataset_needs_nothing_but_python(repo):
    run(repo, 'data/stdlib_char/prepare.py')
    here = repo / 'data/stdlib_char'
    meta = json.loads((here / 'meta.json').read_text())
    train, val = (np.fromfile(here / f'{split}.bin', '<u2') for split in ('train', 'val'))
    assert len(train) > 4_000_000 and 0.05 < len(val) / len(train) < 0.2
    assert max(train.max(), val.max()) < meta['vocab_size'] == len(meta['tokenizer']['chars'])
    text = ''.join(meta['tokenizer']['chars'][i] for i in val)
    assert text.isascii() and 'import ' in text and '\n\tdef ' in text


def test_prepared_text_reads_back_as_it_was(repo):
    text = 'Grüße, 世界! \r\n\n  ' + ROMEO * 30
    (repo / 'a.txt').write_bytes(text.encode())
    (repo / 'b.txt').write_bytes(b'\xef\xbb\xbf' + ROMEO.encode())  # with a byte order mark
    run(repo, 'data/text/prepare.py', 'a.txt', 'b.txt', '--name=own')
    chars = json.loads((repo / 'data/own/meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    back = ''.join(chars[i] for split in ('train', 'val') for i in np.fromfile(repo / f'data/own/{split}.bin', '<u2'))
    assert back == text.replace('\r\n', '\n') + ROMEO


def test_bpe_of_a_file_in_pieces_equals_bpe_of_the_whole(repo):
    tiktoken = pytest.importorskip('tiktoken')
    try:
        enc = tiktoken.get_encoding('gpt2')
    except Exception:
        pytest.skip("GPT-2's vocabulary is neither cached nor to be had")
    text = ''.join(f'{i} {ROMEO}\n\n  \t{i}' for i in range(25_000))  # 3 MB: three pieces
    (repo / 'long.txt').write_text(text, encoding='utf-8')
    run(repo, 'data/text/prepare.py', 'long.txt', 'verse.txt', '--name=bpe', '--tokenizer=gpt2')
    ids = np.concatenate([np.fromfile(repo / f'data/bpe/{split}.bin', '<u2') for split in ('train', 'val')])
    want = enc.encode_ordinary(text) + [enc.eot_token] + enc.encode_ordinary(ROMEO * 40) + [enc.eot_token]
    assert ids.tolist() == want


def test_a_bad_text_is_refused_and_leaves_no_half_dataset(repo):
    (repo / 'latin1.txt').write_bytes('Grüße'.encode('latin-1') * 100)
    (repo / 'short.txt').write_text('abc')
    (repo / 'empty.txt').write_text('')
    (repo / 'chinese.txt').write_text(''.join(map(chr, [*range(0x20, 0xd800), *range(0xe000, 0x1d000)])), encoding='utf-8')
    for name, message in (('latin1.txt', 'not UTF-8'), ('short.txt', 'too few'), ('empty.txt', 'too few'), ('none.txt', 'no such file'),
                          ('chinese.txt', 'do not fit uint16')):
        assert message in run(repo, 'data/text/prepare.py', name, '--name=bad', code=2)
        assert not list((repo / 'data').glob('bad/*.bin'))
        assert 'data/text/prepare.py' in run(repo, 'train.py', *TINY, '--dataset=bad', '--out_dir=bad', code=2)


def test_without_a_network_shakespeare_says_what_to_put_where(repo):
    offline = dict(https_proxy='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9', TIKTOKEN_CACHE_DIR=str(repo / 'no-cache'))
    error = run(repo, 'data/shakespeare_char/prepare.py', code=1, **offline)
    assert len(error.splitlines()) == 1 and 'input.txt' in error
    error = run(repo, 'data/shakespeare/prepare.py', code=1, **offline)
    assert len(error.splitlines()) == 1 and 'TIKTOKEN_CACHE_DIR' in error
    (repo / 'data/shakespeare_char/input.txt').write_text('not Shakespeare')
    assert 'is not the text' in run(repo, 'data/shakespeare_char/prepare.py', code=1)
    assert not list((repo / 'data').glob('shakespeare*/*.bin'))


# -----------------------------------------------------------------------------
# configuration


def load_config(script, *args):
    """The config that a script would run with, found without running it."""
    source = (HERE / script).read_text(encoding='utf-8')
    head, _, _ = source.partition('exec(open(')
    names = {'__file__': str(HERE / script), '__name__': 'config'}
    exec(head, names)
    argv, sys.argv = sys.argv, [script, *map(str, args)]
    try:
        exec((HERE / 'configurator.py').read_text(encoding='utf-8'), names)
    finally:
        sys.argv = argv
    return names['config']


@pytest.mark.parametrize('recipe', sorted((HERE / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    config = load_config('train.py', recipe)
    GPTConfig(vocab_size=50304, **{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config and f.name != 'dtype'})
    assert (HERE / 'data' / config['dataset'] / 'prepare.py').exists() or config['dataset'] == 'openwebtext'


def test_every_key_is_read():
    for script in ('train.py', 'sample.py'):
        used = (HERE / script).read_text(encoding='utf-8').partition('configurator.py')[2]
        for key in load_config(script):
            assert re.search(rf"(?<![\w'.]){key}(?![\w'])", used) or (script == 'train.py' and key in {f.name for f in fields(GPTConfig)}), key


def test_the_models_defaults_are_the_scripts():
    config = load_config('train.py')
    for field in fields(GPTConfig):
        if field.name in config and field.name != 'dtype' and isinstance(field.default, (int, float)):
            assert field.default == config[field.name], field.name


def test_files_go_left_to_right_and_options_win(tmp_path):
    (tmp_path / 'a.py').write_text('import math\nbatch_size = 3\nlearning_rate = 1\n_half = 2\nmax_iters = lr_decay_iters // _half\n')
    (tmp_path / 'b.py').write_text('batch_size = 4\nblock_size = batch_size * 2\n')
    config = load_config('train.py', '--dropout=0', tmp_path / 'a.py', '--batch_size=5', tmp_path / 'b.py', '--out_dir=x=1', '--dataset=7')
    assert (config['batch_size'], config['block_size'], config['max_iters']) == (5, 8, 300000)
    assert (config['out_dir'], config['dataset']) == ('x=1', '7')
    assert type(config['learning_rate']) is float and type(config['dropout']) is float


@pytest.mark.parametrize('args, message', [
    (['--batchsize=3'], 'unknown key batchsize, did you mean batch_size?'),
    (['--zzz=3'], 'unknown key zzz'),
    (['--compile=False'], 'nanoGPT\'s compile has no meaning here'),
    (['--backend=nccl'], 'nanoGPT\'s backend has no meaning here'),
    (['--batch_size=3.5'], 'batch_size is an int'),
    (['--batch_size=True'], 'batch_size is an int'),
    (['--batch_size=many'], "'many'"),
    (['--bias=1'], 'bias is a bool'),
    (['--learning_rate=nan'], 'learning_rate is a float'),
    (['--learning_rate=1e999'], 'learning_rate is a float'),
    (['--eval_only'], '--key=value'),
    (['-batch_size=3'], '--key=value'),
    (['batch_size=3'], 'No such file'),
    (['config/none.py'], 'config file config/none.py: No such file'),
    (['bad_syntax.py'], 'bad_syntax.py:2: '),
    (['bad_key.py'], 'bad_key.py:3: unknown key n_layers, did you mean n_layer?'),
    (['bad_type.py'], 'bad_type.py:1: n_layer is an int'),
    (['bad_run.py'], 'bad_run.py:2: ZeroDivisionError'),
])
def test_a_mistake_in_the_config_is_named(tmp_path, monkeypatch, capsys, args, message):
    for name, text in dict(bad_syntax='n_layer = 2\nn_head = = 3\n', bad_key='\n\nn_layers = 2\n', bad_type='n_layer = "2"\n',
                           bad_run='n_layer = 2\nn_head = 1 / 0\n').items():
        (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        load_config('train.py', *args)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith('train.py: error: ') and message in error and len(error.splitlines()) == 1


def test_help_lists_every_key_with_its_default_and_comment(capsys):
    for script in ('train.py', 'sample.py'):
        with pytest.raises(SystemExit) as e:
            load_config(script, '--help')
        out = capsys.readouterr().out
        assert e.value.code == 0 and out.startswith((HERE / script).read_text(encoding='utf-8').split('"""')[1].strip()[:40])
        for key in load_config(script):
            assert re.search(rf'^  --{key}=\S', out, re.MULTILINE), key
    assert 'top_k=200' in out and 'keep only the top_k' in out


@pytest.mark.parametrize('args, message', [
    (['--start=§'], "does not know '§'"), (['--start='], 'start is empty'), (['--start=FILE:none.txt'], 'No such file'),
    (['--start=FILE:latin1.txt'], 'not UTF-8'), (['--top_k=-1'], 'top_k'), (['--top_p=0.0'], 'top_p'), (['--top_p=1.5'], 'top_p'),
    (['--temperature=-1'], 'temperature'), (['--num_samples=0'], 'num_samples'), (['--out_dir=nowhere'], 'nowhere'),
    (['--device=gpu'], "device = 'gpu'"), (['--checkpoint=third'], 'checkpoint'),
])
def test_a_mistake_in_sampling_is_named(repo, args, message):
    if not (repo / 'to-sample').exists():
        run(repo, 'train.py', *TINY, '--out_dir=to-sample', '--max_iters=1')
    (repo / 'latin1.txt').write_bytes('Grüße'.encode('latin-1'))
    error = run(repo, 'sample.py', '--out_dir=to-sample', '--device=cpu', *args, code=2)
    assert message in error.splitlines()[-1] and 'Traceback' not in error


@pytest.fixture(scope='module')
def finished(repo):
    """A run of the tiny dataset, and datasets with one thing wrong in each."""
    run(repo, 'train.py', *TINY, '--out_dir=finished', '--max_iters=5')
    good = repo / 'data/tiny'
    def broken(name, file, content):
        shutil.copytree(good, repo / 'data' / name)
        (repo / 'data' / name / file).write_bytes(content)
    meta = json.loads((good / 'meta.json').read_text(encoding='utf-8'))
    broken('odd', 'train.bin', b'123')
    broken('empty', 'val.bin', b'')
    broken('short', 'val.bin', bytes(32))
    broken('outside', 'val.bin', (good / 'val.bin').read_bytes() + b'\xff\xff')
    broken('not-json', 'meta.json', b'{')
    broken('no-vocab', 'meta.json', json.dumps({'tokenizer': meta['tokenizer']}).encode())
    broken('no-tokenizer', 'meta.json', json.dumps({'vocab_size': meta['vocab_size']}).encode())
    broken('other', 'meta.json', json.dumps({'vocab_size': meta['vocab_size'] + 1, 'tokenizer': {
        'kind': 'char', 'chars': meta['tokenizer']['chars'] + '~'}}).encode())
    shutil.copytree(repo / 'finished', repo / 'no-checkpoint')
    (repo / 'no-checkpoint/config.json').unlink()
    return repo


RESUME = ['--init_from=resume', '--out_dir=finished']


@pytest.mark.parametrize('args, message', [
    (['--dataset=none'], "dataset = 'none' is not prepared: run python data/text/prepare.py YOUR_FILES --name=none"),
    (['--dataset=shakespeare'], 'run python data/shakespeare/prepare.py'),
    (['--dataset=odd'], 'train.bin holds 3 bytes'), (['--dataset=empty'], 'val.bin holds 0 bytes'),
    (['--dataset=short'], 'more than block_size = 16'), (['--dataset=outside'], 'val.bin holds token 65535'),
    (['--dataset=not-json'], 'meta.json is not a JSON object'), (['--dataset=no-vocab'], 'meta.json lacks'),
    (['--dataset=no-tokenizer'], 'meta.json lacks'),
    (['--n_head=3'], 'n_embd = 16 is not divisible by n_head = 3'), (['--n_layer=0'], 'n_layer = 0'), (['--n_layer=1000000'], 'n_layer'),
    (['--n_embd=-16'], 'n_embd = -16'), (['--block_size=0'], 'block_size = 0'), (['--dropout=1.0'], 'dropout = 1.0'),
    (['--dropout=-0.1'], 'dropout = -0.1'), (['--batch_size=0'], 'batch_size = 0'), (['--batch_size=10000000'], 'batch_size'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps'), (['--max_iters=-1'], 'max_iters = -1'),
    (['--eval_interval=0'], 'eval_interval = 0'), (['--log_interval=-5'], 'log_interval = -5'), (['--eval_iters=0'], 'eval_iters = 0'),
    (['--learning_rate=-1.0'], 'learning_rate = -1.0'), (['--beta1=1.0'], 'beta1 = 1.0'), (['--seed=-1'], 'seed = -1'),
    (['--dtype=float64'], "dtype = 'float64'"), (['--device=gpu'], "device = 'gpu'"), (['--mesh_tensor=3'], 'mesh_tensor = 3'),
    (['--mesh_data=2'], 'mesh_data = 2'), (['--init_from=gpt5'], "init_from = 'gpt5'"), (['--init_from=resume'], 'nothing to resume'),
    (['--init_from=resume', '--out_dir=no-checkpoint'], 'nothing to resume'), (['--out_dir=verse.txt/run'], 'verse.txt/run'),
    ([*RESUME, '--n_layer=3'], 'n_layer = 3: the run in finished has n_layer = 2'), ([*RESUME, '--bias=True'], 'bias = True'),
    ([*RESUME, '--dataset=other'], "dataset = 'other' has another vocabulary"), (['--out_dir=finished'], 'finished holds a run'),
    (['--batch_size=1000000', '--block_size=200'], 'out of memory (a step needs'),
])
def test_a_mistake_in_training_is_named_before_anything_is_done(finished, args, message):
    before = log_of(finished / 'finished')
    resumes = '--out_dir=finished' in args and '--init_from=resume' in args
    error = run(finished, 'train.py', *([] if resumes else TINY), '--out_dir=untouched', *args, code=2)
    assert message in error and len(error.splitlines()) <= 2 and error.startswith('train.py: error: '), error
    assert not (finished / 'untouched').exists() and log_of(finished / 'finished') == before


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(finished):
    (finished / 'prompt.txt').write_text(ROMEO, encoding='utf-8')
    process = start(finished, 'sample.py', '--out_dir=finished', '--start=FILE:prompt.txt', '--num_samples=1', '--max_new_tokens=5')
    out, err = process.communicate(timeout=100)
    assert out.startswith(ROMEO) and f'the prompt has {len(ROMEO)} tokens, of which the model sees the last 16' in err
