"""
Claims about the model and its maths. Each can fail: break the property and see.

    python -m pytest -q
"""
import ast
import dataclasses
import fnmatch
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import hf
import lora
import model
import optim
import step
from checkpoints import NO_BEST, Checkpoints
from dataset import (GPT2_META, eval_starts, hf_meta, hf_tokenizer, load_batch, micro_batches, token_bytes, tokenizer,
                     train_starts, vocabulary)
from devices import make_mesh, side_by_side
from engine import generate, rows_that_fit, stream
from model import GPT, GPTConfig, build, dropout, params_of, sample_token
from optim import get_lr
from rundir import abstract_params, load_model, open_model
from step import (Setup, abstract_state, batch_sharding, compile_eval, compile_step, estimate_mfu, eval_step,
                  learned_share, loss_and_grads, lower_step, num_params, on_mesh, shardings, state_creator, train_step)
from to_gguf import write_gguf

# a compiled function is quicker than hundreds of operations one by one
init_params = jax.jit(model.init_params, static_argnames=('config', 'seed'))
init_state = jax.jit(step.init_state, static_argnames=('config', 'tx', 'seed'))
make_optimizer = functools.cache(optim.make_optimizer)  # the same one needs no other compiled step

TINY = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=32, bias=True)
MODERN = dataclasses.replace(TINY, arch='qwen3', bias=False)
# groups of heads that are wider than n_embd / n_head, and all else that models of today have, in a row of our own
model.ARCHS['mixed'] = dict(norm='rms', positions='rotary', mlp='swiglu', qkv_bias=True, qk_norm=True)
GROUPED = dataclasses.replace(MODERN, arch='mixed', n_head=4, n_kv_head=2, head_dim=12, norm_eps=1e-3, tied=False,
                              rope_factor=4.0, rope_context=64)
SMALL = dataclasses.replace(TINY, n_layer=1)  # for what concerns the step
KEY = jax.random.key(0)


def tokens(*shape, V=TINY.vocab_size, seed=0):
    return np.random.default_rng(seed).integers(V, size=shape)


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@functools.cache
def tiny_model(config=TINY):
    """TINY with parameters large enough that attention and biases matter."""
    params = init_params(config, 0)
    noise = np.random.default_rng(1)
    return build(config, jax.tree.map(lambda x: np.asarray(x) + 0.4 * noise.standard_normal(x.shape, np.float32),
                                      params))


def train(config, batch_of, steps, lr=1e-2, weight_decay=0.0):
    """Trains from scratch on batch_of(step), (G, B, T + 1); returns the last state and all losses."""
    tx = make_optimizer(0.9, 0.99, weight_decay, 1.0)
    state, losses = init_state(config, tx, 0), []
    for step in range(steps):
        state, metrics = train_step(state, batch_of(step), get_lr(step, lr, 10, steps, lr / 10), KEY,
                                    Setup(config, tx))
        losses.append(metrics['loss'])
    return state, [float(x) for x in losses]


# -----------------------------------------------------------------------------
# the house

# What each room may import, from the bottom up: nothing that stands below it here. The scripts may import all of them.
ROOMS = {'kernels': set(), 'chips': set(), 'devices': set(), 'dataset': set(), 'hf': {'dataset'}, 'model': set(),
         'optim': set(), 'lora': set(), 'engine': {'model'}, 'step': {'model', 'devices', 'lora'},
         'processes': {'devices'}, 'checkpoints': {'dataset'}, 'log': {'checkpoints', 'dataset'},
         'rundir': {'checkpoints', 'step', 'model', 'hf', 'dataset', 'devices', 'lora'}}


@pytest.mark.parametrize('room', [*ROOMS, 'train', 'sample', 'export', 'bench'])
def test_every_room_imports_only_rooms_below_it(room):
    source = (Path(__file__).parent / f'{room}.py').read_text(encoding='utf-8')
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names & {*ROOMS, 'train', 'sample', 'export', 'bench'} <= ROOMS.get(room, {*ROOMS})


# -----------------------------------------------------------------------------
# the model


def numpy_gpt(p, idx, n_head):
    """GPT-2's forward pass in NumPy, written from the paper, one sequence at a time."""
    def norm(x, ln):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * ln['weight']
        return y + ln.get('bias', 0)

    def linear(x, layer):
        return x @ layer['weight'].reshape(len(layer['weight']), -1) + layer.get('bias', np.zeros(1)).reshape(-1)

    out = []
    for row in np.asarray(idx):
        x = p['wte']['weight'][row] + p['wpe']['weight'][:len(row)]
        for i in range(len(p['h'])):
            block = p['h'][i]
            q, k, v = np.split(linear(norm(x, block['ln_1']), block['attn']['c_attn']), 3, axis=-1)
            heads = []
            for a, b, c in zip(*(np.split(m, n_head, axis=-1) for m in (q, k, v))):
                scores = np.where(np.tri(len(row), dtype=bool), a @ b.T / math.sqrt(a.shape[-1]), -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights / weights.sum(-1, keepdims=True) @ c)
            x = x + linear(np.concatenate(heads, -1), block['attn']['c_proj'])
            h = linear(norm(x, block['ln_2']), block['mlp']['c_fc'])
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + linear(h, block['mlp']['c_proj'])
        out.append(norm(x, p['ln_f']) @ p['wte']['weight'].T)
    return np.stack(out)


def numpy_rotary(tensors, hf_config, idx):
    """The forward pass of a Qwen3, a Qwen2 or a Llama in NumPy, one sequence at a time, from its own files: its papers'
    formulas, its names of tensors, matrices as (out, in)."""
    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + hf_config['rms_norm_eps']) * weight

    rope = hf_config['rope_parameters']
    speeds = rope['rope_theta'] ** -np.linspace(0, 1, hf_config['head_dim'] // 2, endpoint=False)
    if rope['rope_type'] == 'llama3':
        turns = rope['original_max_position_embeddings'] * speeds / (2 * math.pi)
        low, high = rope['low_freq_factor'], rope['high_freq_factor']
        smooth = (turns - low) / (high - low)
        slow = speeds / rope['factor']
        speeds = np.where(turns < low, slow, np.where(turns > high, speeds, (1 - smooth) * slow + smooth * speeds))
        assert (turns < low).any() and (turns > high).any() and ((turns > low) & (turns < high)).any()

    def turn(x):
        pairs = x[..., :x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2:]  # complex numbers, (T, hs / 2)
        pairs = pairs * np.exp(1j * np.outer(np.arange(len(x)), speeds))
        return np.concatenate([pairs.real, pairs.imag], -1)

    out, w = [], {name.removeprefix('model.').removesuffix('.weight'): x for name, x in tensors.items()}
    n_head, n_kv_head = hf_config['num_attention_heads'], hf_config['num_key_value_heads']
    for row in np.asarray(idx):
        x = w['embed_tokens'][row]
        for i in range(hf_config['num_hidden_layers']):
            layer = {name.removeprefix(f'layers.{i}.'): x for name, x in w.items() if name.startswith(f'layers.{i}.')}
            h, heads = norm(x, layer['input_layernorm']), []
            q, k, v = (h @ layer[f'self_attn.{name}_proj'].T + layer.get(f'self_attn.{name}_proj.bias', 0)
                       for name in 'qkv')
            keys, values = (np.split(a, n_kv_head, -1) for a in (k, v))
            for j, a in enumerate(np.split(q, n_head, -1)):
                b, c = keys[j * n_kv_head // n_head], values[j * n_kv_head // n_head]
                if hf_config['model_type'] == 'qwen3':
                    a, b = norm(a, layer['self_attn.q_norm']), norm(b, layer['self_attn.k_norm'])
                a, b = turn(a), turn(b)
                scores = np.where(np.tri(len(row), dtype=bool), a @ b.T / math.sqrt(a.shape[-1]), -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights / weights.sum(-1, keepdims=True) @ c)
            x = x + np.concatenate(heads, -1) @ layer['self_attn.o_proj'].T
            h = norm(x, layer['post_attention_layernorm'])
            gate, up = h @ layer['mlp.gate_proj'].T, h @ layer['mlp.up_proj'].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer['mlp.down_proj'].T
        out.append(norm(x, w['norm']) @ w['embed_tokens' if hf_config['tie_word_embeddings'] else 'lm_head'].T)
    return np.stack(out)


ARCHES = pytest.mark.parametrize('config', [TINY, GROUPED], ids=lambda config: config.arch)


@pytest.mark.quick
@ARCHES
def test_a_token_never_sees_the_future(config):
    idx, model = tokens(1, 16), tiny_model(config)
    for t in (1, 7, 15):
        changed = idx.copy()
        changed[0, t:] = (changed[0, t:] + 1) % TINY.vocab_size
        before, after = model(idx), model(changed)
        close(before[:, :t], after[:, :t], 1e-6)
        assert np.abs(before[:, t] - after[:, t]).max() > 1e-3


@pytest.mark.quick
def test_a_new_model_guesses_uniformly():
    for V in (65, 50304):
        config = dataclasses.replace(TINY, vocab_size=V)
        loss = eval_step(init_params(config, 0), tokens(1, 8, 17, V=V), config)
        assert abs(loss - math.log(V)) < 0.05


@pytest.mark.quick
@ARCHES
def test_initial_values_have_the_standard_deviations_of_gpt2(config):
    config = dataclasses.replace(config, block_size=128, vocab_size=500, n_layer=3, n_head=4, n_embd=128)
    for path, x in jax.tree_util.tree_flatten_with_path(init_params(config, 0))[0]:
        name = '.'.join(str(p.key) for p in path)
        if name.endswith('bias'):
            assert not x.any(), name
        elif '.ln_' in name or name.startswith('ln_f') or '_norm' in name:
            assert (x == 1).all(), name
        else:
            want = 0.02 / math.sqrt(2 * 3) if 'c_proj' in name else 0.02
            assert abs(x.std() / want - 1) < 0.03, name
            assert abs(x.mean()) < want * 0.05, name


def test_input_and_output_embedding_are_one_matrix_and_stay_one():
    params = init_params(TINY, 0)
    assert sum(x.shape == (37, 32) for x in jax.tree.leaves(params)) == 1
    assert num_params(params) == 37 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    state, _ = train(TINY, lambda step: tokens(1, 4, 17, seed=step), steps=3)
    assert jax.tree.structure(state['params']) == jax.tree.structure(params)
    # both ends read it: as input it moves the features, as output the logits of the same features
    x = jnp.ones((1, 32))
    model, other = tiny_model(), build(TINY, params_of(tiny_model()) | {'wte': {'weight': jnp.ones((37, 32))}})
    assert np.abs(model.head(x) - other.head(x)).max() > 1e-3
    assert np.abs(model.features(tokens(1, 4))[0] - other.features(tokens(1, 4))[0]).max() > 1e-3


@pytest.mark.parametrize('config', [GROUPED, dataclasses.replace(TINY, n_head=4, n_kv_head=1)],
                         ids=lambda config: config.arch)
def test_a_group_of_heads_shares_a_key_and_a_value(config):
    """It computes what a model computes that has them once for each head."""
    params, idx = params_of(tiny_model(config)), tokens(3, 16)
    for block in params['h'].values():
        both = {}
        q, kv = block['attn'].pop('c_q'), block['attn'].pop('c_kv')
        for name in q:
            heads = kv[name].reshape(*kv[name].shape[:-1], config.n_kv_head, -1)
            heads = heads.repeat(4 // config.n_kv_head, -2).reshape(*kv[name].shape[:-1], -1)
            both[name] = np.concatenate([np.expand_dims(q[name], -2), heads], -2)
        block['attn']['c_attn'] = both
    ungrouped = build(dataclasses.replace(config, n_kv_head=0), params)
    assert np.abs(ungrouped(idx)).max() > 1
    close(tiny_model(config)(idx), ungrouped(idx), 1e-4)


def test_dropout_depends_on_the_key_alone_and_keeps_the_mean():
    config = dataclasses.replace(TINY, dropout=0.5)
    model, idx = build(config, params_of(tiny_model())), tokens(2, 16)
    assert (model(idx, KEY) == model(idx, KEY)).all()
    assert (model(idx, KEY) != model(idx, jax.random.key(1))).any()
    assert (model(idx) == tiny_model()(idx)).all()
    y = dropout(jnp.ones((400, 400)), 0.2, KEY)
    assert abs((y == 0).mean() - 0.2) < 0.01 and abs(y.mean() - 1) < 0.01


def test_dropout_is_another_one_at_each_step_and_micro_batch():
    config, tx = dataclasses.replace(SMALL, dropout=0.5), make_optimizer(0.9, 0.99, 0.0, 1.0)
    row = tokens(1, 1, 17)

    def loss(step, batch):
        state = init_state(config, tx, 0) | {'step': jnp.int32(step)}
        return float(train_step(state, batch, 0.0, KEY, Setup(config, tx))[1]['loss'])

    assert loss(3, row) == loss(3, row) != loss(4, row)
    assert loss(3, row) != loss(3, row.repeat(2, axis=0))


@pytest.mark.quick
def test_a_bad_config_is_refused():
    for bad in (dict(arch='bert'), dict(n_inner=-1), dict(rope_theta=0.0), dict(n_layer=0), dict(n_embd=33),
                dict(n_kv_head=4), dict(head_dim=-1), dict(norm_eps=-1.0), dict(rope_factor=0.5), dict(dropout=1.0),
                dict(dropout=-0.1), dict(dtype='float64'), dict(lora_rank=-1), dict(lora_rank=33),
                dict(lora_alpha=0.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dataclasses.replace(TINY, **bad)
    for bad, message in ((dict(bias=True), "bias = True: arch = 'qwen3'"),
                         (dict(n_embd=30), "head_size = 15: arch = 'qwen3'")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(MODERN, **bad)


# -----------------------------------------------------------------------------
# GPT-2's weights


def char_meta(n):
    return {'vocab_size': n, 'tokenizer': {'kind': 'char', 'chars': ''.join(map(chr, range(65, 65 + n)))}}


def gpt2_files(folder, config, prefix='transformer.', parts=1, dtype=np.float32, without=(), extra=(),
               old_names=True, **changes):
    """Writes random weights as Hugging Face has GPT-2's, and returns them nested, as numpy_gpt wants them."""
    C, L, rng = config.n_embd, range(config.n_layer), np.random.default_rng(0)
    shapes = {'wte.weight': (config.vocab_size, C), 'wpe.weight': (config.block_size, C), 'ln_f.weight': (C,),
              'ln_f.bias': (C,)}
    for name, *shape in (('ln_1', C), ('attn.c_attn', C, 3 * C), ('attn.c_proj', C, C), ('ln_2', C),
                         ('mlp.c_fc', C, 4 * C), ('mlp.c_proj', 4 * C, C)):
        shapes |= {f'h.{i}.{name}.weight': shape for i in L} | {f'h.{i}.{name}.bias': shape[-1:] for i in L}
    weights = {name: (0.2 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    if not config.bias:
        weights = {name: np.zeros_like(x) if name.endswith('bias') else x for name, x in weights.items()}
    tensors = {prefix + name: x for name, x in weights.items() if name not in without} | dict(extra)
    if old_names:  # what old files hold too: the causal mask, and the output layer, which is the embedding
        tensors |= {f'{prefix}h.{i}.attn.bias': np.tri(8, dtype=dtype)[None, None] for i in L}
        tensors |= {f'{prefix}h.{i}.attn.masked_bias': np.array(-1e4, dtype) for i in L}
        tensors['lm_head.weight'] = weights['wte.weight']
    folder.mkdir(exist_ok=True)
    files = [f'model-{n + 1}-of-{parts}.safetensors' for n in range(parts)] if parts > 1 else ['model.safetensors']
    where = {name: files[n % parts] for n, name in enumerate(tensors)}
    for file in files:
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    if parts > 1:
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    hf = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
          'n_positions': config.block_size, 'n_embd': C, 'n_layer': config.n_layer, 'n_head': config.n_head,
          'vocab_size': config.vocab_size, 'attn_pdrop': 0.1} | changes
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
    (folder / 'meta.json').write_text(json.dumps(char_meta(config.vocab_size)))
    key = lambda name: tuple(int(part) if part.isdigit() else part for part in name.split('.'))
    return unflatten_mapping({key(name): x.astype(np.float32) for name, x in weights.items()})


@pytest.mark.quick
@pytest.mark.parametrize('shape, files', [
    (dict(), dict()),
    (dict(n_layer=3, n_head=4, n_embd=48, vocab_size=101, block_size=24), dict(prefix='', old_names=False)),
    (dict(n_layer=1, n_head=1, n_embd=8), dict(parts=3)),
    (dict(bias=False, n_head=8), dict(bias=False, old_names=False)),
    (dict(bias=False), dict(parts=2, prefix='', dtype=jnp.bfloat16)),
    (dict(), dict(bias=False, old_names=False)),  # what export.py wrote without biases, and somebody has trained since
    (dict(), dict(dtype=np.float16)),
], ids=str)
def test_weights_in_gpt2s_files_give_the_logits_of_a_numpy_forward_pass(tmp_path, shape, files):
    config = dataclasses.replace(TINY, **shape)
    weights, idx = gpt2_files(tmp_path, config, **files), tokens(3, 11)
    model = load_model(tmp_path)
    # GPT-2 has biases; export.py says where there are none
    bias = config.bias or files.get('bias', True)
    assert model.config == dataclasses.replace(config, bias=bias, norm_eps=1e-5, kernels='cpu')
    close(model(idx), numpy_gpt(weights, idx, config.n_head), 1e-4)


def test_a_context_can_be_cropped_and_only_that_of_rotary_positions_stretched(tmp_path, capsys):
    weights, idx = gpt2_files(tmp_path, TINY), tokens(2, 8)
    model = load_model(tmp_path, block_size=8, dropout=0.1)
    assert model.wpe.weight.shape == (8, 32) and model.config.dropout == 0.1
    close(model(idx), numpy_gpt(weights, idx, TINY.n_head), 1e-4)
    with pytest.raises(ValueError, match='block_size = 17'):
        load_model(tmp_path, block_size=17)
    # rotary positions go on
    hf_config, idx = rotary_files(tmp_path / 'hf', MODERN), tokens(1, 40)
    longer = load_model(tmp_path / 'hf', block_size=40)
    assert 'warning: block_size = 40: ' in capsys.readouterr().err
    close(longer(idx), numpy_rotary(load_file(tmp_path / 'hf/model.safetensors'), hf_config, idx), 1e-4)


@pytest.mark.parametrize('files, message', [
    (dict(without=['h.1.mlp.c_fc.bias']), 'lacks the tensor h.1.mlp.c_fc.bias'),
    (dict(extra={'transformer.h.2.ln_1.weight': np.ones(32)}), 'not of this model: h.2.ln_1.weight'),
    (dict(extra={'transformer.h.0.attn.c_attn.weight': np.ones((96, 32))}),
     r'h.0.attn.c_attn.weight is \[96, 32\], .* \[32, 96\]'),
    (dict(extra={'lm_head.weight': np.ones((37, 32))}, old_names=False), 'lm_head.weight is not wte.weight'),
    (dict(vocab_size=38), r'wte.weight is \[37, 32\]'), (dict(n_positions=8), r'wpe.weight is \[16, 32\]'),
    (dict(activation_function='relu'), "activation_function = 'relu'"),
    (dict(layer_norm_epsilon='tiny'), "layer_norm_epsilon = 'tiny' is not a number"),
    (dict(layer_norm_epsilon=math.nan), 'layer_norm_epsilon = nan is not a number'),
    (dict(n_positions=2**70), 'n_positions = .* is not a number below'),
    (dict(extra={'transformer.wte.weight': np.ones((37, 32), np.int8)}), 'wte.weight holds I8'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx = True'),
    (dict(n_inner=64), r'h.0.mlp.c_fc.* is .*128.*64'), (dict(model_type='mamba'), "model_type = 'mamba'"),
    (dict(n_head=None), "lacks 'n_head'"), (dict(n_head=5), 'n_head = 5'),
    (dict(n_layer='2'), 'config.json'), (dict(tie_word_embeddings=False, old_names=False), 'lacks the tensor lm_head'),
], ids=lambda x: str(x)[:40])
def test_what_is_wrong_with_gpt2s_files_is_named(tmp_path, files, message):
    gpt2_files(tmp_path, TINY, **files)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_pickle_is_refused_and_a_damaged_file_named(tmp_path):
    gpt2_files(tmp_path, TINY)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='model.safetensors is damaged'):
        load_model(tmp_path)
    file.rename(tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='a pickle, which is never loaded; convert it .*save_pretrained'):
        load_model(tmp_path)
    (tmp_path / 'pytorch_model.bin').unlink()
    with pytest.raises(ValueError, match='lacks model.safetensors'):
        load_model(tmp_path)


def test_a_vocabulary_that_nobody_describes_is_refused(tmp_path):
    gpt2_files(tmp_path, TINY)
    (tmp_path / 'meta.json').unlink()
    os.mkfifo(tmp_path / 'meta.json')  # nobody ever writes into this pipe
    with pytest.raises(ValueError, match='has no tokenizer.json'):
        open_model(tmp_path)
    (tmp_path / 'meta.json').unlink()
    (tmp_path / 'meta.json').write_text(json.dumps(char_meta(38)))
    with pytest.raises(ValueError, match='vocabulary of 37, .*meta.json'):
        open_model(tmp_path)
    (tmp_path / 'meta.json').write_text(json.dumps(char_meta(37)))
    assert vocabulary(open_model(tmp_path)[1]) == vocabulary(char_meta(37))


def bpe_files(folder, vocab_size=300, metaspace=False, **config):
    """Writes a tokenizer.json with a byte pair encoding of its own, and a tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    bpe.enable_truncation(8)  # as files have it that were saved after training on texts of one length
    bpe.enable_padding(length=8)
    bpe.train_from_iterator([Path(__file__).read_text(encoding='utf-8')], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<|end|>', '<|user|>'], initial_alphabet=bytes_, show_progress=False))
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / 'tokenizer.json'))
    bpe.no_truncation()
    bpe.no_padding()
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '<|end|>'}} | config))
    return bpe


def test_a_model_is_read_with_the_tokenizer_in_its_folder_and_never_with_another_one(tmp_path):
    gpt2_files(tmp_path, dataclasses.replace(TINY, vocab_size=320))
    (tmp_path / 'meta.json').unlink()
    bpe = bpe_files(tmp_path)
    meta = open_model(tmp_path)[1]
    encode, decode, eot = tokenizer(meta['tokenizer'])
    text = 'def é(世界):<|end|>\n'
    assert meta['vocab_size'] == 300 and encode(text) == bpe.encode(text).ids and eot == 0 in encode(text)
    assert decode(encode(text)) == text and decode(encode('a\ud800')) == 'a\ufffd'
    assert token_bytes(meta['tokenizer'])[encode(text)].sum() == len(text.encode()) - len('<|end|>')
    # a meta.json names it; another one in its place is noticed
    named = meta | {'tokenizer': meta['tokenizer'] | {'file': 'tokenizer.json'}}
    (tmp_path / 'meta.json').write_text(json.dumps(named))
    assert open_model(tmp_path)[1] == meta
    bpe_files(tmp_path, 299)
    with pytest.raises(ValueError, match='tokenizer.json is not the tokenizer that'):
        open_model(tmp_path)
    for file in '../tokenizer.json', '/etc/passwd', None:
        (tmp_path / 'meta.json').write_text(json.dumps(meta | {'tokenizer': meta['tokenizer'] | {'file': file}}))
        with pytest.raises(ValueError, match='meta.json lacks vocab_size or a tokenizer'):
            open_model(tmp_path)
    # files that we do not read, and one that is none
    (tmp_path / 'meta.json').unlink()
    (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "Magic"}}')
    with pytest.raises(ValueError, match='tokenizer.json is not a tokenizer'):
        open_model(tmp_path)
    (tmp_path / 'tokenizer.json').rename(tmp_path / 'tokenizer.model')
    gpt2_files(tmp_path, dataclasses.replace(TINY, vocab_size=50257))
    (tmp_path / 'meta.json').unlink()
    with pytest.raises(ValueError, match='has no tokenizer.json'):
        open_model(tmp_path)
    # GPT-2's own, as the files of many models have it
    (tmp_path / 'tokenizer.json').write_text(json.dumps(hf.tokenizer_json('tiktoken', name='gpt2')[0]))
    assert vocabulary(open_model(tmp_path)[1]) == vocabulary(GPT2_META)


def gguf_of(path):
    """The fields and the tensors of a GGUF file, as float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in reader.tensors}


def test_a_gguf_file_holds_the_weights_the_tokenizer_and_the_template(tmp_path):
    path, meta = tmp_path / 'x.gguf', char_meta(37)
    meta['tokenizer']['chars'] = ' é' + meta['tokenizer']['chars'][2:]
    config = dataclasses.replace(TINY, bias=False, block_size=8)
    weights = params_of(tiny_model(config))
    write_gguf(path, config, meta, hf.file_tensors(weights, config, 37, 'float32'), 'float32')
    fields, tensors = gguf_of(path)
    assert fields['tokenizer.ggml.tokens'] == ['\u2581', *meta['tokenizer']['chars'][1:]]
    assert not fields['tokenizer.ggml.add_space_prefix'] and fields['gpt2.feed_forward_length'] == 128
    close(tensors['blk.1.attn_qkv.weight'], weights['h'][1]['attn']['c_attn']['weight'].reshape(32, 96).T, 0)
    assert not tensors['blk.0.ffn_up.bias'].any() and list(tmp_path.iterdir()) == [path]
    # grouped heads, and a model's own tokenizer with rows that it has no token for; Llama's pairs stand side by side
    config = dataclasses.replace(MODERN, arch='llama', n_head=4, n_kv_head=2, tied=False, vocab_size=304,
                                 rope_factor=8.0)
    weights = params_of(tiny_model(config))
    bpe_files(tmp_path / 'bpe', chat_template='{{ messages }}')
    meta = hf_meta(tmp_path / 'bpe')
    q = weights['h'][0]['attn']['c_q']['weight'].T.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
    for dtype, tolerance in ('float32', 0), ('float16', 2e-3), ('bfloat16', 2e-2), ('q8_0', 2e-2):
        write_gguf(path, config, meta, hf.file_tensors(weights, config, 304, 'float32'), dtype)
        fields, tensors = gguf_of(path)
        close(tensors['blk.0.attn_q.weight'], q, tolerance)
        close(tensors['output.weight'], weights['lm_head']['weight'], tolerance)
        close(tensors['output_norm.weight'], weights['ln_f']['weight'], 0)
    assert fields['tokenizer.chat_template'] == '{{ messages }}' and fields['tokenizer.ggml.pre'] == 'gpt-2'
    assert fields['tokenizer.ggml.tokens'][299:] == [hf_tokenizer(tmp_path / 'bpe/tokenizer.json').id_to_token(299),
                                                     *(f'[PAD{i}]' for i in range(300, 304))]
    assert fields['tokenizer.ggml.eos_token_id'] == 0 and fields['llama.attention.head_count_kv'] == 2
    turn = lambda factor: np.arcsin(model.rotary_angles(1, 1, 8, config.rope_theta, factor, 8192)[1][0, 4:])
    close(tensors['rope_freqs.weight'], turn(1.0) / turn(8.0), 1e-4)
    bpe_files(tmp_path / 'bpe', metaspace=True)
    (tmp_path / 'unigram').mkdir()
    unigram = tokenizers.models.Unigram([('<unk>', 0.0), ('a', -1.0)], 0, True)  # whose pieces come without merges
    tokenizers.Tokenizer(unigram).save(str(tmp_path / 'unigram/tokenizer.json'))
    for name in 'bpe', 'unigram':
        with pytest.raises(ValueError, match='convert_hf_to_gguf.py'):
            write_gguf(path, config, hf_meta(tmp_path / name), hf.file_tensors(weights, config, 304, 'float32'), 'q8_0')


@pytest.mark.parametrize('file, content, message', [
    ('config.json', '{"a":' * 200_000, 'config.json is not a JSON object'),
    ('config.json', '{"n_layer": 1' + '0' * 5000 + '}', 'config.json is not a JSON object'),
    ('config.json', '{"model_type": {}}', 'model_type = {}'),
    ('config.json', '{"model_type": "qwen3", "rope_scaling": 3}', 'rope_parameters = 3'),
    ('meta.json', '[' * 200_000, 'meta.json is not a JSON object'), ('meta.json', '{}', 'meta.json lacks vocab_size'),
    ('meta.json', '{"vocab_size": "37", "tokenizer": {"kind": "tiktoken", "name": "gpt2"}}', 'lacks vocab_size'),
    ('meta.json', '{"vocab_size": 37, "tokenizer": 3}', 'meta.json lacks'),
    *(('model.safetensors.index.json', f'{{"weight_map": {x}}}', 'weight_map')
      for x in ('3', '[]', 'null', '{"wte.weight": 3}', '{"wte.weight": "../model.safetensors"}')),
], ids=lambda x: x[:40])
def test_json_files_may_hold_anything(tmp_path, file, content, message):
    gpt2_files(tmp_path, TINY)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path)


def test_a_model_of_the_hub_is_downloaded_once_the_weights_last(tmp_path, monkeypatch):
    rotary_files(tmp_path / 'there', MODERN)
    cache, calls = tmp_path / 'cache', []

    def snapshot_download(repo, allow_patterns, local_files_only):
        if not local_files_only:
            calls.append(allow_patterns)
            shutil.copytree(tmp_path / 'there', cache, dirs_exist_ok=True, ignore=lambda _, names: [
                name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)])
        return str(cache)

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    monkeypatch.setattr('huggingface_hub.get_hf_file_metadata', lambda url: url)
    for _ in range(2):
        config, meta, _ = open_model('Qwen/Qwen3-0.6B')
        assert config.arch == 'qwen3' and vocabulary(meta) == vocabulary(char_meta(37))
        assert len(calls) == 2 and 'config.json' in calls[0] and 'model.safetensors' in calls[1]
    assert not (cache / 'meta.json').exists()
    with pytest.raises(ValueError, match='Qwen/Qwen3-0.6B/config.json.*none of gpt2'):
        open_model('./Qwen/Qwen3-0.6B')


def test_without_a_network_gpt2_says_what_to_put_where(tmp_path):
    code = "from rundir import load_model\ntry: load_model('gpt2-medium')\nexcept ValueError as e: print(e)"
    env = os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    out = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, env=env, capture_output=True,
                         text=True)
    assert 'config.json and model.safetensors of https://huggingface.co/openai-community/gpt2-medium' in out.stdout, out
    assert len(out.stdout.splitlines()) == 1 and not out.stderr


# -----------------------------------------------------------------------------
# the weights of Qwen3, Qwen2 and Llama


def rotary_files(folder, config, **changes):
    """Writes tiny_model(config) as Hugging Face has it, and returns its config.json."""
    files = hf.export_files(config, char_meta(37) | {'folder': 'none'}, 'float32')
    files['config.json'] = {k: v for k, v in (files['config.json'] | changes).items() if v != 'left out'}
    hf.write_directory(folder, files, hf.file_tensors(params_of(tiny_model(config)), config, 37, 'float32'))
    return files['config.json']


@pytest.mark.quick
@pytest.mark.parametrize('shape', [
    dict(), dict(n_layer=3, n_head=4, n_kv_head=2, head_dim=24, n_inner=40, rope_theta=50.0, norm_eps=1e-3),
    dict(arch='qwen2', n_head=4, n_kv_head=2),
    dict(arch='llama', n_head=4, n_kv_head=1, tied=False, rope_theta=20.0, rope_factor=8.0, rope_context=40)], ids=str)
def test_their_files_give_the_logits_of_a_numpy_forward_pass_and_come_back_bit_for_bit(tmp_path, shape):
    config, idx = dataclasses.replace(MODERN, **shape), tokens(3, 11)
    hf_config = rotary_files(tmp_path / 'hf', config)
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    close(tiny_model(config)(idx), numpy_rotary(tensors, hf_config, idx), 1e-4)
    model = load_model(tmp_path / 'hf')
    explicit = dict(n_inner=config.mlp_width, n_kv_head=config.n_kv_head or config.n_head, head_dim=config.head_size,
                    norm_eps=config.norm_eps or 1e-6)
    assert model.config == dataclasses.replace(config, **explicit, kernels='cpu')
    close(params_of(model), params_of(tiny_model(config)), 0)
    # on a mesh, each device reads its own part
    mesh = make_mesh(jax.devices()[:4], 2, 2)
    params = open_model(tmp_path / 'hf')[2](8, on_mesh(mesh, fsdp=True))
    close(params, params_of(model), 0)
    # older versions of transformers have rope's theta beside the other fields
    rotary_files(tmp_path / 'hf', config, rope_parameters='left out')
    assert load_model(tmp_path / 'hf').config == model.config


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/text').write_text('do not delete')
    for name in 'hf.new.tmp', 'hf.old.tmp':
        (tmp_path / name).symlink_to(tmp_path / 'mine')
    hf.write_directory(tmp_path / 'hf', {'config.json': 1}, {})
    hf.write_directory(tmp_path / 'hf', {'config.json': 2}, {})

    def full(*args, **how):
        raise SafetensorError('No space left on device')

    monkeypatch.setattr('safetensors.numpy.save_file', full)
    with pytest.raises(OSError, match='hf: No space left'):
        hf.write_directory(tmp_path / 'hf', {'config.json': 3}, {})
    assert {path.name for path in tmp_path.iterdir()} == {'hf', 'mine'} and (tmp_path / 'mine/text').exists()
    assert (tmp_path / 'hf/config.json').read_text() == '2'


@pytest.mark.parametrize('changes, message', [
    (dict(num_key_value_heads=1), r'self_attn.k_proj.weight is \[32, 32\], .* \[16, 32\]'),
    (dict(num_key_value_heads='left out'), 'config.json: n_kv_head = 32: must divide n_head = 2'),  # Qwen3's
    (dict(head_dim=32), r'self_attn.q_proj.weight is \[32, 32\], .* \[64, 32\]'),
    (dict(tie_word_embeddings='left out'), 'lacks the tensor lm_head.weight'),
    (dict(tie_word_embeddings=1), 'tie_word_embeddings = 1 is not true or false'),
    (dict(attention_bias=True), 'attention_bias = True: this GPT has False only'),
    (dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4}), "rope_type = 'yarn': .* 'default' or 'llama3'"),
    (dict(rope_parameters={'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 8.0, 'low_freq_factor': 2.0,
                           'original_max_position_embeddings': 64}), 'low_freq_factor = 2.0: this GPT has 1 only'),
    (dict(hidden_act='gelu'), "hidden_act = 'gelu'"), (dict(use_sliding_window=True), 'use_sliding_window = True'),
    (dict(intermediate_size=64), r'layers.0.mlp.gate_proj.weight is \[96, 32\], .* \[64, 32\]'),
    (dict(num_hidden_layers=3), 'lacks the tensor layers.2.'),
    (dict(hidden_size='left out'), "lacks 'hidden_size', which qwen3 has"),
], ids=str)
def test_what_is_wrong_with_their_files_is_named(tmp_path, changes, message):
    rotary_files(tmp_path / 'hf', MODERN, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / 'hf')


# -----------------------------------------------------------------------------
# LoRA

LORA = dataclasses.replace(TINY, lora_rank=4, lora_alpha=8.0)


@functools.cache
def lora_base():
    """tiny_model() at half its size: rounding errors stay below 1e-5."""
    return build(TINY, jax.tree.map(lambda x: x / 2, params_of(tiny_model())))


@functools.cache
def lora_trained():
    """The first and the last state of some steps of LoRA on lora_base(), and their losses."""
    tx, losses = make_optimizer(0.9, 0.99, 0.1, 1.0), []
    first = init_state(LORA, tx, 0) | {'base': params_of(lora_base())}
    state = jax.tree.map(jnp.copy, first)
    for _ in range(30):
        state, metrics = train_step(state, tokens(2, 4, 17), 1e-2, KEY, Setup(LORA, tx))
        losses.append(float(metrics['loss']))
    return first, state, losses


def test_lora_begins_where_its_base_is():
    first, idx = lora_trained()[0], tokens(3, 16)
    assert (build(LORA, lora.join(first['params'], first['base']))(idx) == lora_base()(idx)).all()
    for path, x in flatten_mapping(first['params']).items():
        if path[-1] == 'lora_A':  # as large as its input
            assert abs(x.std() * math.sqrt(x.shape[0]) - 1) < 0.25, path
        else:
            assert path[-1] == 'lora_B' and not x.any(), path


def test_lora_trains_its_adapters_and_nothing_else():
    first, last, losses = lora_trained()
    assert losses[-1] < 0.9 * losses[0]
    close(last['base'], first['base'], 0)
    names = {'.'.join(map(str, path[2:])) for path in flatten_mapping(last['params'])}
    layers = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'
    assert names == {f'{layer}.lora_{m}' for layer in layers for m in 'AB'}
    for path, x in flatten_mapping(last['params']).items():
        assert (x != flatten_mapping(first['params'])[path]).any(), path
    assert jax.tree.structure(last['opt_state'][1].mu) == jax.tree.structure(last['params'])
    tx = make_optimizer(0.9, 0.99, 0.1, 1.0)

    def flops(config, state):
        step = train_step.lower(state, tokens(1, 4, 17), 0.0, KEY, Setup(config, tx)).compile()
        return step.cost_analysis()['flops']

    assert flops(LORA, first) < flops(TINY, init_state(TINY, tx, 0))  # no gradient of the base is made


@pytest.mark.quick
def test_merged_adapters_give_the_logits_of_the_adapters():
    _, last, _ = lora_trained()
    params, idx = lora.join(last['params'], last['base']), tokens(3, 16)
    merged = lora.merge(params, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(last['base'])
    close(build(TINY, merged)(idx), build(LORA, params)(idx), 1e-5)
    assert np.abs(build(TINY, merged)(idx) - lora_base()(idx)).max() > 0.1


def test_lora_counts_what_it_trains():
    params, base = lora.split(init_params(LORA, 0), LORA)
    lines = [line.split() for line in lora.table(params, base, LORA).splitlines()]
    A, B = 2 * 4 * (3 * 32 + 128), 2 * 4 * (96 + 32 + 128 + 32)
    assert lines[1][:2] == ['trainable', f'{A + B:,}'] and lines[1][3:] == ['A', f'{A:,},', 'B', f'{B:,}']
    n = sum(x.size for x in jax.tree.leaves(init_params(TINY, 0)))
    assert lines[2][:2] == ['frozen', f'{n:,}'] and lines[3][:2] == ['total', f'{n + A + B:,}']
    assert lora.split(init_params(TINY, 0), TINY)[1] == {}


# -----------------------------------------------------------------------------
# the step


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def test_one_cpu_computes_a_batch_as_two_halves_with_dropout_of_their_own(monkeypatch):
    params, features, calls = params_of(tiny_model(SMALL)), GPT.features, []
    monkeypatch.setattr(GPT, 'features', lambda self, idx, key: calls.append(len(idx)) or features(self, idx, key))

    def grads(batch, **changes):
        config = dataclasses.replace(SMALL, **changes)
        return jax.jit(lambda: loss_and_grads(params, {}, batch[None], 1.0, KEY, Setup(config, None)))()

    for B, halves in ((1, [1]), (3, [2, 1]), (4, [2, 2])):
        batch = tokens(B, 17)
        whole = grads(batch)
        assert calls == [B]
        calls.clear()
        close(grads(batch, kernels='cpu'), whole)
        assert calls == halves
        calls.clear()
    once, twice = (grads(np.tile(tokens(1, 17), (n, 1)), kernels='cpu', dropout=0.3)[0] for n in (1, 2))
    assert abs(once - twice) > 1e-4  # twice the same, with the same dropout, would have the same loss


@pytest.mark.parametrize('config, less', [
    (SMALL, dict(remat=True)), (SMALL, dict(loss_chunks=4)), (SMALL, dict(remat=True, loss_chunks=16)),
    (dataclasses.replace(GROUPED, n_layer=1), dict(remat=True, loss_chunks=4))], ids=str)
def test_less_memory_is_the_same_gradient(config, less):
    batch, params = tokens(4, 17), params_of(tiny_model(config))
    grad = lambda config: jax.jit(jax.value_and_grad(lambda params: build(config, params).loss(batch, KEY)))(params)
    close(grad(dataclasses.replace(config, dropout=0.1, **less)), grad(dataclasses.replace(config, dropout=0.1)))


def test_chunks_of_the_loss_take_less_memory():
    config, batch = dataclasses.replace(SMALL, vocab_size=5000), tokens(64, 17)

    def scratch(chunks):
        loss = lambda params: build(dataclasses.replace(config, loss_chunks=chunks), params).loss(batch)
        step = jax.jit(jax.grad(loss)).lower(abstract_params(config)).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert scratch(8) < 0.5 * scratch(1)


def test_micro_batches_give_the_gradient_of_one_big_batch():
    tx = make_optimizer(0.9, 0.99, 0.1, 1.0)
    batch = tokens(8, 17)
    states = [train_step(init_state(SMALL, tx, 0), batch.reshape(G, 8 // G, 17), 1e-3, KEY, Setup(SMALL, tx))
              for G in (1, 4, 8)]
    for state, metrics in states[1:]:
        close(metrics, states[0][1])
        close(state['opt_state'], states[0][0]['opt_state'], 1e-6)


@pytest.mark.parametrize('chunks, mesh', [(1, (1, 1)), (4, (1, 1)), (1, (2, 2))])
def test_the_loss_is_the_mean_over_what_is_learned_whatever_the_micro_batches_and_devices(chunks, mesh):
    config, tx = dataclasses.replace(SMALL, loss_chunks=chunks), make_optimizer(0.9, 0.99, 0.1, 1.0)
    ids, marks = tokens(8, 17), np.random.default_rng(1).random((8, 17)) < np.linspace(0, 1, 8)[:, None]
    params = init_params(config, 0)

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        losses = -jax.nn.log_softmax(build(config, params)(ids[:, :-1]))
        losses = jnp.take_along_axis(losses, ids[:, 1:, None], -1)[..., 0]
        return jnp.where(marks[:, 1:], losses, 0).sum() / marks[:, 1:].sum()

    loss, grads = expected(params)
    batch = np.where(marks, ids, ~ids).astype(np.int32).reshape(4, 2, 17)  # the first sequence teaches nothing
    close(eval_step(params, batch, config) / learned_share(batch), loss)
    mesh = make_mesh(jax.devices()[:math.prod(mesh)], *mesh)
    state = init_state(config, tx, 0)
    state = jax.device_put(state, shardings(state, mesh, fsdp=True))
    batch = jax.device_put(batch, batch_sharding(mesh))
    _, metrics = train_step(state, batch, 1e-3, KEY, Setup(config, tx, mesh, fsdp=True))
    close((metrics['loss'], metrics['grad_norm']), (loss, optax.tree.norm(grads)))
    assert learned_share(batch.astype(np.uint16)) == 1 and learned_share(np.full((2, 3), -1)) > 0


def test_a_markov_source_is_learned_to_its_entropy():
    V, config = 8, dataclasses.replace(SMALL, vocab_size=8)
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.full(V, 0.5), size=V)
    def chain(step, B=64):
        rng, x = np.random.default_rng(step), np.zeros((B, 17), int)
        x[:, 0] = rng.integers(V, size=B)
        for t in range(16):
            x[:, t + 1] = (rng.random((B, 1)) > P[x[:, t]].cumsum(1)).sum(1).clip(max=V - 1)
        return x[None]
    state, _ = train(config, chain, 200)
    held_out = np.concatenate([chain(10**6 + i) for i in range(20)])
    entropy = -np.log(P[held_out[:, :, :-1], held_out[:, :, 1:]]).mean()  # of this very sample under the true source
    assert entropy - 1e-3 < eval_step(state['params'], held_out, config) < 1.02 * entropy


def test_the_step_compiles_once():
    tx = make_optimizer(0.9, 0.99, 0.1, 1.0)
    state, before = init_state(SMALL, tx, 0), train_step._cache_size()
    for step in range(4):
        state, _ = train_step(state, tokens(2, 4, 17, seed=step).astype(np.uint16), 1e-3 * step, KEY, Setup(SMALL, tx))
    assert train_step._cache_size() == before + 1


def test_what_is_compiled_ahead_and_with_less_effort_computes_the_same(monkeypatch):
    monkeypatch.delenv('XLA_FLAGS')  # as for users, who have none
    mesh = make_mesh(jax.devices()[:1])
    tx, batch = make_optimizer(0.9, 0.99, 0.1, 1.0), tokens(2, 4, 17).astype(np.uint16)
    setup = Setup(SMALL, tx, mesh)
    state, abstract = init_state(SMALL, tx, 0), abstract_state(setup)
    step, evaluate = side_by_side(lambda: compile_step(setup, abstract, (2, 4)),
                                  lambda: compile_eval(setup, abstract['params'], (2, 4)))
    state = jax.device_put(state, shardings(state, mesh))
    np.testing.assert_allclose(evaluate(state['params'], batch), eval_step(state['params'], batch, SMALL), rtol=1e-6)
    new, metrics = step(jax.tree.map(jnp.copy, state), batch, 1e-3, KEY)
    expected, expected_metrics = train_step(state, batch, 1e-3, KEY, Setup(SMALL, tx))
    np.testing.assert_allclose(metrics['loss'], expected_metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(metrics['grad_norm'], expected_metrics['grad_norm'], rtol=1e-5)
    # Adam's first step is about as large for every gradient, but for those next to 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), new['params'], expected['params'])


@pytest.mark.quick
def test_gradients_are_clipped_by_their_global_norm_and_only_matrices_decay():
    params = jax.tree.map(np.ones_like, init_params(TINY, 0))
    tx = make_optimizer(0.9, 0.99, 0.1, 1.0)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(params), params, norm=optax.tree.norm(grads),
                                             setup=Setup(TINY, tx)))
    decayed = update(jax.tree.map(np.zeros_like, params))[0]
    for path, x in jax.tree_util.tree_flatten_with_path(decayed)[0]:
        name = '.'.join(str(p.key) for p in path)
        assert x.any() == (name.endswith('weight') and 'ln_' not in name), name
    first_moment = update(jax.tree.map(lambda x: 1e3 * x, params))[1][1].mu
    norm = jax.jit(optax.tree.norm)(first_moment)
    assert abs(norm - 0.1) < 1e-3  # (1 - beta1) times a gradient of norm 1


@pytest.mark.quick
def test_muon_moves_every_direction_and_every_output_alike_and_as_far_as_adamw_does():
    params = params_of(tiny_model(MODERN))
    grads = jax.tree.map(lambda x: normal(*x.shape) * np.linspace(0.1, 1, len(x)).reshape(-1, *[1] * (x.ndim - 1)),
                         params)
    tx, adamw = make_optimizer(0.9, 0.99, 0.0, 1.0, 'muon', embd_lr_scale=3.0), make_optimizer(0.9, 0.99, 0.0, 1.0)
    update = lambda tx, grads: tx.update(grads, tx.init(params), params, norm=optax.tree.norm(grads),
                                         setup=Setup(TINY, tx))[0]
    updates, its, still = jax.jit(lambda: (update(tx, grads), update(adamw, grads),
                                           update(tx, jax.tree.map(jnp.zeros_like, grads))))()
    matrices = lambda x: [x] if x.ndim == 2 else np.swapaxes(x, 0, 1)
    for (path, x), y, grad in zip(flatten_mapping(updates).items(), jax.tree.leaves(its), jax.tree.leaves(grads)):
        if path[0] != 'h' or x.ndim == 1:  # the embedding, which has a rate of its own, and norms
            close(x, (3 if path[0] == 'wte' else 1) * y, 1e-6)
            continue
        for matrix, grad in zip(matrices(x), matrices(grad)):
            direction = np.asarray(optim.orthogonalize(grad, 'float32'))
            sizes = np.linalg.svd(direction, compute_uv=False)
            assert 0.6 < np.quantile(sizes, 0.1) and sizes.max() < 1.3, path  # before, they differ tenfold and more
            close(matrix, 0.2 * direction / np.sqrt((direction**2).mean(0)), 1e-4)  # each column is as long
            assert 0.1 < np.sqrt((matrix**2).mean()) < 0.3  # AdamW's, once it is under way
    assert not any(x.any() for x in jax.tree.leaves(still))  # a gradient of zeros moves nothing
    state = tx.init(lora.split(init_params(LORA, 0), LORA)[0])  # adapters stay with AdamW
    assert not jax.tree.leaves(state[1].inner_states['muon'])
    with pytest.raises(ValueError, match="optimizer = 'sgd'"):
        make_optimizer(0.9, 0.99, 0.0, 1.0, 'sgd')


@pytest.mark.parametrize('kernels', ['plain', 'cpu'])  # to choose between values, or to branch
def test_an_update_that_is_not_finite_is_skipped_and_counted(kernels):
    config, tx = dataclasses.replace(SMALL, dtype='float16', kernels=kernels), make_optimizer(0.9, 0.99, 0.1, 1.0)
    batch = tokens(1, 4, 17)
    step = lambda state: train_step(jax.tree.map(jnp.copy, state), batch, 1e-3, KEY, Setup(config, tx))
    good, metrics = step(init_state(config, tx, 0) | {'loss_scale': jnp.float32(1)})
    assert metrics['skipped'] == 0 and (good['params']['wpe']['weight'] != init_params(SMALL, 0)['wpe']['weight']).any()
    bad, metrics = step(step(good | {'loss_scale': jnp.float32(np.inf)})[0])
    close([bad['params'], bad['opt_state']], [good['params'], good['opt_state']], 0)
    assert metrics['skipped'] == metrics['skipped_in_a_row'] == 2 and bad['step'] == 3
    after, metrics = step(bad | {'loss_scale': jnp.float32(1)})
    assert metrics['skipped'] == 2 and metrics['skipped_in_a_row'] == 0
    assert (after['params']['wpe']['weight'] != bad['params']['wpe']['weight']).any()


@pytest.mark.quick
def test_the_loss_scale_of_float16_finds_its_height():
    config, tx = dataclasses.replace(SMALL, dtype='float16'), make_optimizer(0.9, 0.99, 0.1, 1.0)
    state, batch = init_state(config, tx, 0) | {'loss_scale': jnp.float32(2**30)}, tokens(1, 4, 17)
    for _ in range(30):
        state, metrics = train_step(state, batch, 1e-3, KEY, Setup(config, tx))
    assert 1 < state['loss_scale'] < 2**30 and metrics['skipped'] > 0 and metrics['skipped_in_a_row'] == 0
    scale = float(state['loss_scale'])
    state, metrics = train_step(state | {'scale_age': jnp.int32(1999)}, batch, 1e-3, KEY, Setup(config, tx))
    assert state['loss_scale'] == 2 * scale
    exact, _ = train_step(init_state(SMALL, tx, 0), batch, 1e-3, KEY, Setup(SMALL, tx))
    half, _ = train_step(init_state(config, tx, 0), batch, 1e-3, KEY, Setup(config, tx))
    # the scale is divided out again
    close(half['opt_state'][1].mu, exact['opt_state'][1].mu, 1e-3)


@pytest.mark.quick
def test_the_learning_rate_follows_nanogpt_at_its_corners():
    at = lambda it: get_lr(it, learning_rate=1e-3, warmup_iters=100, lr_decay_iters=1000, min_lr=1e-4)
    assert at(0) == pytest.approx(1e-3 / 101) and at(99) == pytest.approx(1e-3 * 100 / 101)
    assert at(100) == pytest.approx(1e-3) and at(550) == pytest.approx(5.5e-4)
    assert at(1000) == pytest.approx(1e-4) and at(5000) == 1e-4
    straight = lambda it: get_lr(it, 1e-3, 100, 1000, 1e-4, 'linear')
    assert [straight(it) for it in (0, 100, 325, 775, 1000, 5000)] == pytest.approx(
        [1e-3 / 101, 1e-3, 7.75e-4, 3.25e-4, 1e-4, 1e-4])
    # without warm-up and with nothing to decay over, it does not divide by zero
    assert get_lr(0, 1e-3, 0, 0, 1e-4) == pytest.approx(1e-3)


# -----------------------------------------------------------------------------
# batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    at = lambda seed, step: train_starts(data, (2, 3), 8, seed, step)
    assert (at(1, 5) == at(1, 5)).all() and (at(1, 5) != at(1, 6)).any() and (at(1, 5) != at(2, 5)).any()
    batch = load_batch(data, at(1, 5), 8, 1000, batch_sharding(make_mesh(jax.devices()[:1])))
    assert batch.shape == (2, 3, 9) and (np.diff(batch) == 1).all() and (batch[..., 0] == at(1, 5)).all()


@pytest.mark.quick
def test_an_epoch_sees_every_part_of_the_data():
    data, T = np.zeros(100_000), 100
    starts = np.concatenate([train_starts(data, (1, 10), T, seed=3, step=step) for step in range(100)]).ravel()
    assert starts.min() >= 0 and starts.max() < len(data) - T
    seen = np.zeros(len(data), bool)
    for s in starts:
        seen[s:s + T] = True
    assert seen.mean() > 0.8  # 1000 independent draws of 1/1000 of the data see 1 - 1/e = 63%
    for step in (0, 10**6, 10**9):  # the last position is never overstepped
        assert train_starts(data, (1, 10**5), T, 0, step).max() <= len(data) - T - 1


@pytest.mark.quick
def test_an_evaluation_looks_at_the_whole_split():
    starts = eval_starts(np.zeros(1000), (2, 5), 9)
    assert starts.ravel()[0] == 0 and starts.ravel()[-1] == 990 and (np.diff(starts.ravel()) == 110).all()


@pytest.mark.quick
def test_micro_batches_hold_what_a_device_can_take():
    assert micro_batches(40 * 12, 12, 1) == (40, 12)
    assert micro_batches(40 * 12, 12, 8) == (5, 96)
    assert micro_batches(64, 64, 8) == (1, 64)
    with pytest.raises(ValueError, match='12 sequences cannot be divided among 5 devices'):
        micro_batches(12, 12, 5)


# -----------------------------------------------------------------------------
# many devices: (data, tensor, fsdp)

MESHES = [(1, 1, False), (8, 1, False), (4, 2, False), (1, 8, False), (8, 1, True), (4, 2, True)]
WIDE = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=8, n_embd=64)


def mesh_of(data, tensor):
    return make_mesh(jax.devices()[:data * tensor], data, tensor)


def start_on(mesh, config=WIDE, optimizer='adamw'):
    """The state of `config` as it is created on a mesh, its abstract form, and a function that trains it from
    one iteration to another and returns the losses."""
    (data, _, fsdp), mesh = mesh, mesh_of(*mesh[:2])
    config = dataclasses.replace(config, kernels='cpu' if mesh.size == 1 else 'cpus')
    setup = Setup(config, make_optimizer(0.9, 0.99, 0.1, 1.0, optimizer), mesh, fsdp)
    abstract = abstract_state(setup)
    text = np.random.default_rng(0).integers(64, size=1000).cumsum().astype(np.uint16) % 64

    def go_on(state, first, last):
        losses, shape = [], micro_batches(32, 2, data)  # at most 2 on a device at a time, so from 2 to 16 micro-steps
        assert shape[0] > 1
        for step in range(first, last):
            tokens = load_batch(text, train_starts(text, shape, 16, 0, step), 16, 64, batch_sharding(mesh))
            state, metrics = train_step(state, tokens, 3e-3, KEY, setup)
            losses.append(float(metrics['loss']))
        return state, losses

    return state_creator(setup, 0, abstract)(), abstract, go_on


def assert_each_device_holds_its_part(state, mesh):
    data, tensor, fsdp = mesh
    for part in ('params', 'opt_state'):
        whole = sum(x.nbytes for x in jax.tree.leaves(state[part]))
        for device in jax.devices('cpu')[:data * tensor]:
            shards = [s for x in jax.tree.leaves(state[part]) for s in x.addressable_shards]
            held = sum(s.data.nbytes for s in shards if s.device == device)
            share = whole / tensor / (data if fsdp or part == 'opt_state' else 1)
            # norms, wpe and some biases are on all of the tensor axis
            assert share <= held <= 1.001 * share + 0.06 * share * (tensor - 1)
    block = state['params']['h'][0]
    for name, layer in [*block['attn'].items(), *block['mlp'].items()]:  # both have a c_proj
        if name.startswith('c_'):
            weight = layer['weight']
            assert weight.addressable_shards[0].data.size == weight.size // tensor // (data if fsdp else 1)


def test_the_loss_is_the_same_on_every_mesh_and_every_mesh_goes_on_with_the_checkpoints_of_others(tmp_path):
    runs, curves, saved = {}, {}, {}
    for mesh in MESHES:
        state, abstract, go_on = start_on(mesh)
        assert_each_device_holds_its_part(state, mesh)  # as it is created, and as the step returns it
        state, curve = go_on(state, 0, 6)
        assert_each_device_holds_its_part(state, mesh)
        checkpoints = Checkpoints(tmp_path / str(mesh))
        checkpoints.save(6, state, dict(iter_num=6, wandb_id=None, **NO_BEST))
        checkpoints.wait()
        saved[mesh] = jax.tree.map(np.asarray, state)
        curves[mesh] = curve + go_on(state, 6, 10)[1]
        runs[mesh] = checkpoints, abstract, go_on
    one = curves[MESHES[0]]
    assert one[-1] < one[0] - 0.1
    for i, mesh in enumerate(MESHES):
        np.testing.assert_allclose(curves[mesh], one, atol=1e-4, err_msg=str(mesh))
        for other in (MESHES[i - 1], MESHES[i - 3]):
            state, _ = runs[other][0].restore(runs[mesh][1])
            assert jax.tree.all(jax.tree.map(np.array_equal, state, saved[other])), (mesh, other)
        np.testing.assert_allclose(runs[mesh][2](state, 6, 8)[1], one[6:8], atol=1e-4)


@pytest.mark.parametrize('changes, optimizer', [
    (dict(arch='mixed', n_kv_head=4, head_dim=16, tied=False), 'muon'), (dict(bias=True), 'adamw')], ids=str)
def test_other_models_train_alike_on_meshes_too_and_in_bfloat16_and_go_on_on_any(changes, optimizer, tmp_path):
    config, one, checkpoints = dataclasses.replace(WIDE, **changes), None, Checkpoints(tmp_path)
    for mesh in (MESHES[0], MESHES[3], MESHES[5]):
        state, abstract, go_on = start_on(mesh, config, optimizer)
        state, curve = go_on(state, 0, 6)
        if one is None:
            saved = jax.tree.map(np.asarray, state)
            checkpoints.save(6, state, dict(iter_num=6, wandb_id=None, **NO_BEST))
            checkpoints.wait()
            one = curve + go_on(state, 6, 10)[1]
        np.testing.assert_allclose(curve, one[:6], atol=1e-4, err_msg=str(mesh))
        state, _ = checkpoints.restore(abstract)
        assert jax.tree.all(jax.tree.map(np.array_equal, state, saved)), mesh
        assert_each_device_holds_its_part(state, mesh)
        np.testing.assert_allclose(go_on(state, 6, 10)[1], one[6:], atol=1e-4, err_msg=str(mesh))

    state, _, go_on = start_on(mesh, dataclasses.replace(config, dtype='bfloat16'), optimizer)  # on the last of them
    state, half = go_on(state, 0, 10)
    assert 0 < np.abs(np.subtract(one, half)).max() < 2e-2
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def results_of(collective, program):
    """How many numbers all collectives of a kind have as results, on one device."""
    shapes = re.findall(r'\w\[([\d,]+)\]', ' '.join(re.findall(rf'= (.*) {collective}\(', program.as_text())))
    return sum(math.prod(map(int, shape.split(','))) for shape in shapes)


@pytest.mark.parametrize('fsdp', [False, True])
def test_muon_gathers_no_more_than_adamw(fsdp):
    gathered, config = [], dataclasses.replace(WIDE, n_layer=2, arch='qwen3', kernels='cpus')
    for optimizer in 'adamw', 'muon':
        setup = Setup(config, make_optimizer(0.9, 0.99, 0.1, 1.0, optimizer), mesh_of(8, 1), fsdp)
        gathered.append(results_of('all-gather', lower_step(setup, abstract_state(setup), (1, 8)).compile()))
    assert 0 < gathered[1] < 1.02 * gathered[0]  # norms of columns, but no matrices


def test_lora_is_the_same_on_every_mesh_and_with_its_base_in_bfloat16_as_it_came(tmp_path):
    gpt2_files(tmp_path, TINY, dtype=jnp.bfloat16, old_names=False)
    config, tx, batch = dataclasses.replace(LORA, lora_rank=8), make_optimizer(0.9, 0.99, 0.1, 1.0), tokens(2, 8, 17)
    adapters = sum(x.size for x in jax.tree.leaves(lora.split(init_params(config, 0), config)[0]))
    alone = None
    for data, tensor, fsdp in ((1, 1, False), (8, 1, False), (4, 2, True)):
        mesh = mesh_of(data, tensor)
        _, meta, read = open_model(tmp_path)
        dtype = meta['base_dtype'] if alone else 'float32'
        state = init_state(config, tx, 0) | {'base': read(16, on_mesh(mesh, fsdp), dtype)}
        assert state['base']['wte']['weight'].dtype == ('bfloat16' if alone else 'float32')
        where = shardings(state, mesh, fsdp)
        # the base was read to where it belongs
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state['base'], where['base']))
        state = jax.tree.map(lambda x, s: jax.device_put(x, s) if x.sharding != s else x, state, where)
        base = jax.tree.map(np.asarray, state['base'])
        step = train_step.lower(state, batch, 1e-2, KEY, setup=Setup(config, tx, mesh, fsdp)).compile()
        if (data, tensor, fsdp) == (8, 1, False):
            summed = 8 * results_of('reduce-scatter', step) + results_of('all-reduce', step)
            assert adapters <= summed < 1.1 * adapters  # the base takes no part
        for _ in range(3):
            state, metrics = step(state, batch, 1e-2, KEY)
        close(base, state['base'], 0)
        losses = metrics['loss'], eval_step(lora.join(state['params'], state['base']), batch, config)
        alone = alone or (losses, state['params'])
        close(losses, alone[0], 1e-5)
        close(state['params'], alone[1], 2e-5)  # after three steps of 1e-2: Adam makes much of a gradient next to zero


# -----------------------------------------------------------------------------
# sampling


def writer(config=TINY):
    """tiny_model() with a cache and the kernels of one CPU."""
    return tiny_model(dataclasses.replace(config, kernels='cpu'))


def greedy_without_cache(model, idx, n):
    """What the plain model writes, by itself."""
    plain = dataclasses.replace(model.config, kernels='plain')
    return np.asarray(build(plain, params_of(model)).generate(idx, n, temperature=0))


@pytest.mark.quick
@ARCHES
@pytest.mark.parametrize('prompt', [1, 5, 16])
def test_greedy_text_is_the_same_with_and_without_the_cache(prompt, config):
    idx = tokens(3, prompt)
    n = 16 - prompt + 1  # the last of them sees the full context
    cached = generate(writer(config), idx, n, temperature=0, key=KEY)
    assert (cached == greedy_without_cache(writer(config), idx, n)).all()


@pytest.mark.quick
@ARCHES
def test_text_goes_on_beyond_the_context(config):
    """When the window of 16 is full, its last 8 tokens are read again as a prompt."""
    idx, model = tokens(2, 4), writer(config)
    out = np.asarray(generate(model, idx, 40, temperature=0, key=KEY))
    assert out.shape == (2, 44)
    want = greedy_without_cache(model, idx, 13)
    while want.shape[1] < 44:
        want = np.concatenate([want, greedy_without_cache(model, want[:, -8:], 9)[:, 8:]], axis=1)
    assert (out == want[:, :44]).all() and len(np.unique(out[0, 4:])) > 4


def test_every_token_is_drawn_with_a_key_of_its_own():
    """A model that knows nothing draws from noise alone: the noise of one window must not come again in the next."""
    blank = build(TINY, jax.tree.map(jnp.zeros_like, params_of(writer())))
    out = np.asarray(generate(blank, tokens(1, 8), 36, key=KEY))[0, 8:]
    windows = out[:9], out[9:18], out[18:27], out[27:36]  # each is made from position 8 on
    assert all((a != b).mean() > 0.5 for i, a in enumerate(windows) for b in windows[:i])


def test_a_long_prompt_is_cut_to_its_end():
    idx = tokens(1, 50)
    out = generate(writer(), idx, 1, temperature=0, key=KEY)
    assert (out[:, :50] == idx).all() and out[0, 50] == writer()(idx[:, -16:])[0, -1].argmax()


def test_text_depends_on_the_key_and_not_on_how_it_is_chunked():
    idx = tokens(2, 3)
    whole = generate(writer(), idx, 30, key=KEY)
    assert (whole == generate(writer(), idx, 30, key=KEY, chunk=7)).all()
    assert (whole != generate(writer(), idx, 30, key=jax.random.key(1))).any()


def test_the_text_of_a_row_is_the_same_however_many_are_written_at_a_time():
    idx = np.ones((15, 3), int)
    text = lambda first, rows: generate(writer(), idx[first:first + rows], 12, key=KEY, top_k=20, first=first)
    whole = text(0, 15)
    assert len(np.unique(whole, axis=0)) == 15
    for rows in 10, 5:
        assert (jnp.concatenate([text(first, rows) for first in range(0, 15, rows)]) == whole).all()


def test_as_many_rows_are_written_at_a_time_as_fit_into_the_memory():
    gpt2 = GPTConfig(1024, 50304, 12, 12, 768)
    fit = [rows_that_fit(gpt2, 1, 500, memory) for memory in (0, 4e8, 1e9, 4e9, 6e10, math.inf)]
    assert fit[0] == 1 and 10 <= fit[3] < 40 and fit[4] > 200 and all(n in (1, 2, 5) or n % 10 == 0 for n in fit)
    assert fit == sorted(fit) and rows_that_fit(gpt2, 1, 10**9, 4e9) < fit[3]


@pytest.mark.quick
def test_a_plain_model_writes_by_itself_what_nanogpts_loop_writes():
    """Without a cache; when the context is full, it moves on by one token at a time."""
    model, idx = tiny_model(), tokens(2, 4)
    out = np.asarray(model.generate(idx, 20, temperature=0))
    for n in range(4, 24):
        assert (out[:, n] == model(out[:, :n][:, -16:])[:, -1].argmax(-1)).all()
    drawn = model.generate(idx, 20, 0.8, 5, seed=7, n_vocab=30)
    assert (drawn == model.generate(idx, 20, 0.8, 5, seed=7, n_vocab=30)).all() and drawn[:, 4:].max() < 30
    assert (drawn != model.generate(idx, 20, 0.8, 5, seed=8, n_vocab=30)).any()
    assert (generate(model, idx, 12, temperature=0, key=KEY) == out[:, :16]).all()  # engine.py leaves it to the model
    ends = int(out[0, 6])
    first = 4 + list(out[0, 4:]).index(ends)
    assert generate(model, idx[:1], 12, temperature=0, key=KEY, eot=ends).shape == (1, first + 1)


@pytest.mark.quick
def test_text_stops_at_the_end_of_text():
    idx = tokens(4, 3)
    free = np.asarray(generate(writer(), idx, 12, key=KEY))
    eot = int(free[0, 6])
    out = np.asarray(generate(writer(), idx, 12, key=KEY, eot=eot))
    ends = []
    for row, unstopped in zip(out, free):
        met = np.flatnonzero(unstopped[3:] == eot)
        end = 3 + met[0] if len(met) else len(unstopped)
        assert (row[:end] == unstopped[:end][:len(row)]).all() and (row[end:] == eot).all()
        ends.append(end)
    eot = int(greedy_without_cache(writer(), idx[:1], 1)[0, -1])
    with pytest.raises(ValueError, match='the prompt is empty'):
        generate(writer(), [[]], 12, key=KEY)
    one = list(stream(writer(), idx[:1], 12, key=jax.random.key(5), temperature=0, eot=eot))
    assert sum(part.shape[1] for part in one) == 1  # nothing is made after every row has ended


@pytest.mark.quick
def test_top_k_and_top_p_leave_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]).repeat(4000, axis=0))
    share = lambda *how: np.bincount(sample_token(logits, KEY, *how), minlength=5) / 4000
    np.testing.assert_allclose(share(1.0, None, 1.0), [0.1, 0.4, 0.05, 0.25, 0.2], atol=0.03)
    np.testing.assert_allclose(share(1.0, 2, 1.0), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.03)
    np.testing.assert_allclose(share(1.0, None, 0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.03)
    np.testing.assert_allclose(share(1.0, 3, 0.1), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(share(0, 200, 1.0), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(share(0.5, 200, 1.0), np.array([0.01, 0.16, 0.0025, 0.0625, 0.04]) / 0.275, atol=0.03)


@pytest.mark.quick
def test_padded_rows_of_the_vocabulary_are_never_written():
    idx = tokens(8, 3, V=5)
    assert generate(writer(), idx, 20, key=KEY, temperature=5.0, n_vocab=5).max() < 5


# -----------------------------------------------------------------------------
# text, and counting FLOPs


@pytest.mark.quick
def test_the_character_tokenizer_returns_what_it_was_given():
    encode, decode, eot = tokenizer({'kind': 'char', 'chars': '\nabé'})
    assert encode('é\nab') == [3, 0, 1, 2] and decode([3, 0, 1, 2]) == 'é\nab' and eot is None
    with pytest.raises(ValueError, match='zß'):
        encode('zaßa')


def test_mfu_counts_palms_flops():
    class Device:
        device_kind = 'NVIDIA H100 80GB HBM3'
    config = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    flops = 1e5 * (6 * 124e6 + 12 * 12 * 768 * 1024)
    assert estimate_mfu(config, 124e6, 0, 1e5, [Device] * 2) == pytest.approx(flops / (2 * 989e12))
    frozen = estimate_mfu(config, 124e6, 100e6, 1e5, [Device] * 2)  # their gradient is not computed
    assert frozen == pytest.approx((flops - 1e5 * 2 * 100e6) / (2 * 989e12))
    # heads that are twice as wide, and an input layer that is only looked up
    wide = dataclasses.replace(config, n_kv_head=2, head_dim=128, tied=False)
    flops = 1e5 * (6 * (124e6 - 50304 * 768) + 12 * 12 * 12 * 128 * 1024)
    assert estimate_mfu(wide, 124e6, 0, 1e5, [Device] * 2) == pytest.approx(flops / (2 * 989e12))
    Device.device_kind = 'cpu'
    assert estimate_mfu(config, 124e6, 0, 1e5, [Device]) is None
