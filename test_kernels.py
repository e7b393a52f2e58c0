"""
Claims about kernels.py: each kernel computes what its function in model.py computes, and what somebody edits there is
what runs.
"""
import dataclasses
import functools
import importlib.util
import inspect
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import engine
import kernels
import model
from conftest import run
from devices import make_mesh
from kernels import KERNELS
from model import GPTConfig, build, init_params
from optim import make_optimizer
from step import Setup, state_creator, abstract_state, train_step

HERE = Path(__file__).parent
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def values_and_gradients(f, args):
    """f and its derivative by every float array in args, for some gradient of the result."""
    floats = [i for i, x in enumerate(args) if getattr(x, 'dtype', None) == np.float32]
    fill = lambda given: [given[floats.index(i)] if i in floats else x for i, x in enumerate(args)]

    @jax.jit
    def both(*given):
        y, pull = jax.vjp(lambda *given: f(*fill(given)), *given)
        some = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return y, pull(jax.tree.map(some, y))

    return jax.tree.leaves(both(*(args[i] for i in floats)))


QKV = [normal(2, 3, 300, 8, seed=seed) for seed in range(3)]  # more than one block of queries
CASES = {  # arguments of the functions of model.py
    'linear': [normal(2, 3, 4), normal(4, 3, 5), normal(3, 5)],
    'linear of one row': [normal(1, 1, 128), normal(128, 5), normal(5)],
    'unembed': [normal(2, 3, 4), normal(7, 4)],
    'unembed of one row': [normal(1, 1, 4), normal(7, 4)],
    'layer_norm': [normal(2, 3, 8), normal(8), normal(8, seed=1), 0.1],
    'rms_norm': [normal(2, 3, 8), normal(8), 0.1],
    'gelu': [3 * normal(6, 4)],
    'swiglu': [3 * normal(6, 2, 4)],
    'rotate': [normal(2, 3, 7, 8), model.rotary_angles(5, 7, 8, 100.0)],
    'attention': QKV,
    'attention of one block': [x[:, :, :20] for x in QKV],
    'attention of groups': [normal(2, 6, 20, 8), *(x[:, :, :20] for x in QKV[1:])],
    'attention_with_cache': [*(x[:, :, 7:8] for x in QKV), tuple(x[:, :, :10] for x in QKV[1:]), jnp.int32(7)],
    'attention_with_cache of groups': [normal(2, 6, 1, 8), *(x[:, :, 7:8] for x in QKV[1:]),
                                       tuple(x[:, :, :10] for x in QKV[1:]), jnp.int32(7)],
    'cross_entropy': [normal(2, 3, 40), np.array([[0, 3, 39], [1, 2, 0]])],
    'cross_entropy of some': [normal(2, 3, 40), np.array([[0, 3, 39], [1, 2, 0]]), np.eye(2, 3) > 0],
}
TAKE_DTYPE = 'linear', 'unembed', 'unembed of one row', 'attention', 'attention of one block', 'attention of groups'
PAIRS = [(platform, case) for platform in KERNELS for case in CASES
         if case.split(' of ')[0] in KERNELS[platform] and platform not in ('cudnn', 'splash')]


def plain_of(case):
    return inspect.unwrap(getattr(model, case.split(' of ')[0]))


@functools.cache
def exact(case):
    return values_and_gradients(plain_of(case), CASES[case])


@pytest.mark.quick
@pytest.mark.parametrize('platform, case', PAIRS)
def test_a_kernel_and_its_derivative_are_those_of_the_plain_function(platform, case):
    kernel, plain, args = KERNELS[platform][case.split(' of ')[0]], plain_of(case), CASES[case]
    assert kernels.kernel_for(plain, platform) is kernel
    for x, y in zip(values_and_gradients(kernel, args), exact(case), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    if case not in TAKE_DTYPE:
        return
    rounded = values_and_gradients(functools.partial(kernel, dtype='bfloat16'), args)
    assert np.abs(rounded[0] - exact(case)[0]).max() > 1e-4
    for x, y in zip(rounded, exact(case)):
        assert np.abs(x - y).max() < 0.02 * np.abs(y).max()


def test_every_kernel_is_compared_with_its_function():
    names = {name for platform in KERNELS.values() for name in platform}
    assert names - {case.split(' of ')[0] for case in CASES} <= {'dropout'}


@pytest.mark.parametrize('platform', [platform for platform in KERNELS if 'dropout' in KERNELS[platform]])
def test_a_kernels_dropout_drops_its_share_and_keeps_the_mean(platform):
    y = KERNELS[platform]['dropout'](jnp.ones((400, 401)), 0.2, KEY)
    assert abs((y == 0).mean() - 0.2) < 0.01 and abs(y.mean() - 1) < 0.01
    assert KERNELS[platform]['dropout'](y, 0.2, None) is y


@pytest.mark.parametrize('T', [50, 300])
def test_dropout_of_attention_in_blocks_multiplies_probabilities_as_dropout_does(T):
    """The plain function with the numbers that each block of queries draws anew."""
    q, k, v = (x[:, :, :T] for x in QKV)
    attend = functools.partial(KERNELS['cpu']['attention'], rate=0.3, key=KEY)
    kept = np.zeros((2, 3, T, T))
    for t in range(0, T, 256):
        end = min(t + 256, T)
        mask = kernels.keep_mask(jax.random.fold_in(KEY, t), 0.3, (2, 3, end, end - t))
        kept[:, :, t:end, :end] = mask.swapaxes(2, 3) / 0.7

    def plain(q, k, v):
        scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])
        return (jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)) * kept) @ v

    for x, y in zip(values_and_gradients(attend, [q, k, v]), values_and_gradients(plain, [q, k, v])):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    causal = np.tri(T, dtype=bool)
    assert abs((kept > 0)[..., causal].mean() - 0.7) < 0.01


def test_splash_attention_is_the_plain_one_with_and_without_a_mesh():
    """Pallas computes it on a CPU, step by step."""
    splash = functools.partial(kernels.splash_attention, interpret=True)
    q, weight = jax.random.normal(KEY, (2, 2, 4, 384, 64))  # in groups of two heads
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 2, 384, 64))

    def value_and_gradients(attention):
        loss = lambda q, k, v: (attention(q, k, v) * weight).sum()
        return attention(q, k, v), *jax.grad(loss, (0, 1, 2))(q, k, v)

    expected = value_and_gradients(model.attention)
    with jax.set_mesh(make_mesh(jax.devices()[:4], 2, 2)):
        on_mesh = jax.jit(lambda: value_and_gradients(splash))()
    for results in value_and_gradients(splash), on_mesh:
        for x, y in zip(results, expected):
            np.testing.assert_allclose(x, y, atol=2e-5)
    assert splash(q, k, v, rate=0.1, key=KEY) is NotImplemented
    assert splash(q[:, :, :1], k, v, pos=5) is NotImplemented
    assert splash(q[:, :, :100], k[:, :, :100], v[:, :, :100]) is NotImplemented


def test_one_cpu_multiplies_one_token_in_parts_of_64_rows():
    for platform, rows, shape, in_parts in (('cpu', 1, (128, 3, 5), True), ('cpus', 1, (128, 3, 5), False),
                                            ('cpu', 2, (128, 3, 5), False), ('cpu', 1, (100, 7), False)):
        code = jax.make_jaxpr(KERNELS[platform]['linear'])(normal(rows, shape[0]), normal(*shape))
        assert ('[2,64]' in str(code)) == in_parts


def test_one_cpu_computes_the_logits_of_one_token_as_the_embedding_times_a_vector():
    for platform, rows, a_vector in ('cpu', 1, True), ('cpus', 1, False), ('cpu', 2, False):
        code = jax.make_jaxpr(KERNELS[platform]['unembed'])(normal(rows, 4), normal(7, 4))
        assert (':f32[7] = dot_general' in str(code)) == a_vector


# -----------------------------------------------------------------------------
# what somebody edits is what runs


def fingerprint_in(module, name):
    return kernels.fingerprint(inspect.unwrap(getattr(module, name)))


@pytest.mark.quick
def test_no_function_was_edited_without_its_kernel():
    """`python kernels.py` prints what MADE_FOR should hold, once the kernels of an edited function are right again."""
    assert {name: fingerprint_in(model, name) for name in kernels.MADE_FOR} == kernels.MADE_FOR
    assert all(name in kernels.MADE_FOR for platform in KERNELS.values() for name in platform)


SCORES = "scores = jnp.where(s <= t, scores, -jnp.inf)"
EDITS = {
    'soft cap': (SCORES, "scores = jnp.where(s <= t, 5 * jnp.tanh(scores / 5), -jnp.inf)"),
    'ALiBi': (SCORES, "scores -= 2.0 ** -jnp.arange(1, q.shape[1] + 1)[:, None, None] * (t - s)\n    " + SCORES),
    'window': ('s <= t', '(s <= t) & (t - s < 3)'),
    'half': ("v, preferred_element_type=result)", "v, preferred_element_type=result) * 0.5"),
}
CONFIG = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=32)


def edited_model(folder, *edit):
    """model.py with one line changed, as a module of another name."""
    source = (HERE / 'model.py').read_text(encoding='utf-8')
    assert source.count(edit[0]) == 1
    (folder / 'model_edited.py').write_text(source.replace(*edit), encoding='utf-8')
    spec = importlib.util.spec_from_file_location('model_edited', folder / 'model_edited.py')
    module = sys.modules['model_edited'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', EDITS)
def test_an_edited_attention_trains_samples_from_the_cache_and_runs_on_a_mesh(name, tmp_path, monkeypatch):
    edited = edited_model(tmp_path, *EDITS[name])
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.4 * noise.standard_normal(x.shape, np.float32), init_params(CONFIG, 0))
    batch = np.random.default_rng(0).integers(37, size=(1, 8, 17))

    def gradient(module, platform):
        config = module.GPTConfig(**dataclasses.asdict(CONFIG) | {'kernels': platform})
        return jax.jit(jax.value_and_grad(lambda params: module.build(config, params).loss(batch[0])))(params)

    plain, before = gradient(edited, 'plain'), gradient(model, 'plain')
    assert abs(plain[0] - before[0]) > 1e-4
    everywhere = name == 'window'  # one edit is enough to see that all platforms and meshes take it
    for platform in ('cpu', 'gpu', 'tpu', 'cudnn') if everywhere else ['cpu']:
        for x, y in zip(*(jax.tree.leaves(g) for g in (gradient(edited, platform), plain))):
            np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)

    # the cache of the engine has no attention of its own
    monkeypatch.setattr(engine, 'build', edited.build)
    jax.clear_caches()
    fast, slow = (edited.build(edited.GPTConfig(**dataclasses.asdict(CONFIG) | {'kernels': platform}), params)
                  for platform in ('cpu', 'plain'))
    text = engine.generate(fast, batch[0, :, :3], 12, temperature=0, key=KEY)
    assert (text == slow.generate(batch[0, :, :3], 12, temperature=0)).all()
    assert (text != build(CONFIG, params).generate(batch[0, :, :3], 12, temperature=0)).any()

    if everywhere:  # a step on a mesh
        monkeypatch.setattr('step.build', edited.build)
        config = edited.GPTConfig(**dataclasses.asdict(CONFIG) | {'kernels': 'cpus'})
        setup = Setup(config, make_optimizer(0.9, 0.99, 0.1, 1.0), make_mesh(jax.devices()[:4], 2, 2))
        state = state_creator(setup, 0, abstract_state(setup))() | {'params': params}
        assert abs(train_step(state, batch, 1e-3, KEY, setup)[1]['loss'] - plain[0]) < 1e-4
    jax.clear_caches()


def test_an_edited_generate_writes_the_text_instead_of_the_engine(tmp_path):
    append = 'idx = jnp.concatenate([idx, {}token[:, None]], 1)'
    zeros = edited_model(tmp_path, append.format(''), append.format('0 * '))
    fast = zeros.build(zeros.GPTConfig(**dataclasses.asdict(CONFIG) | {'kernels': 'cpu'}), init_params(CONFIG, 0))
    text = engine.generate(fast, [[1, 2, 3]], 5, key=KEY)
    assert text.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]
    # the engine draws with sample_token, too: where that is edited, it goes on
    assert not kernels.edited_generate(edited_model(tmp_path, 'logits.argmax(-1)', 'logits.argmin(-1)').GPT)


def test_a_comment_is_no_edit_and_a_change_in_what_a_function_calls_is_one(tmp_path):
    same = edited_model(tmp_path, SCORES, SCORES + '  # the future is hidden')
    assert all(fingerprint_in(same, name) == made for name, made in kernels.MADE_FOR.items())
    other = edited_model(tmp_path, 'jax.random.bernoulli(key, 1 - rate, x.shape)', 'x > 0')
    changed = {name for name, made in kernels.MADE_FOR.items() if fingerprint_in(other, name) != made}
    assert changed == {'dropout', 'attention', 'attention_with_cache'}  # attention calls dropout


def test_the_log_names_what_was_edited_and_a_plain_run_needs_no_kernels(tmp_path):
    repo = tmp_path / 'repo'
    shutil.copytree(HERE, repo, ignore=shutil.ignore_patterns('.git', '.venv', 'out*', '*.bin', '__pycache__', 'wandb'))
    (tmp_path / 'text.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    run(repo, 'data/text/prepare.py', tmp_path / 'text.txt')
    small = ['config/train_shakespeare_char.py', 'config/laptop.py', '--dataset=text', '--eval_iters=1', '--n_layer=1',
             '--block_size=16', '--max_iters=1', '--dtype=float32', '--overwrite=True', '--eval_interval=1']
    first = lambda out: float(out.split('step 0: train loss ')[1].split(',')[0])
    kernel = run(repo, 'train.py', *small)
    assert 'edited' not in kernel
    model_py = repo / 'model.py'
    whole = model_py.read_text(encoding='utf-8')
    model_py.write_text(whole.replace(*EDITS['half']), encoding='utf-8')
    halved = run(repo, 'train.py', *small, '--n_embd=64')
    assert 'edited in model.py, so without their kernels: attention, attention_with_cache' in halved
    row = "    'qwen3': dict("
    mine = "    'mine': dict(norm='layer', positions='rotary', mlp='gelu', qkv_bias=True, qk_norm=True),\n"
    model_py.write_text(whole.replace(row, mine + row), encoding='utf-8')
    assert first(run(repo, 'train.py', *small, '--arch=mine')) != first(kernel)
    model_py.write_text(whole, encoding='utf-8')
    plain = run(repo, 'train.py', *small, '--kernels=plain', '--sample_tokens=5')
    (repo / 'kernels.py').unlink()
    alone = run(repo, 'train.py', *small, '--kernels=plain', '--sample_tokens=5')
    assert first(plain) == first(alone) == pytest.approx(first(kernel), abs=1e-3)
    run(repo, 'sample.py', '--out_dir=out-shakespeare-char', '--kernels=plain', '--max_new_tokens=5')
    assert 'there is no kernels.py' in run(repo, 'train.py', *small)
