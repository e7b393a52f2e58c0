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

from model import GPTConfig, load_run

HERE = Path(__file__).resolve().parent
TINY = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
        '--gradient_accumulation_steps=2', '--eval_iters=4', '--eval_interval=5', '--max_iters=12', '--lr_decay_iters=12',
        '--warmup_iters=2', '--learning_rate=1e-2', '--log_interval=1', '--dropout=0.1', '--dataset=tiny']
ROMEO = 'But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n'


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    """A copy of the repository with a prepared dataset, `tiny`."""
    repo = tmp_path_factory.mktemp('repo')
    for name in ('train.py', 'model.py', 'sample.py', 'configurator.py'):
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
    run(repo, 'train.py', '--init_from=resume', '--out_dir=parts', '--max_iters=9', '--device=cpu')  # ends before one
    run(repo, 'train.py', '--init_from=resume', '--out_dir=parts', '--max_iters=12', '--device=cpu')
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
