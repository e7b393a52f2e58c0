"""
A GPT in JAX (Flax NNX): the model, its initial values and shardings, the training and evaluation steps, and sampling.
Everything that is jitted lives here; importing this file has no side effects.

Letters for dimensions, as in nanoGPT:
B batch, T time (T <= block_size), C = n_embd, nh = n_head, hs = C // nh, V = vocab_size, N = B * T,
S = length of the key-value cache, G = micro-batches in one step.

References:
1) nanoGPT's model.py: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) OpenAI's GPT-2: https://github.com/openai/gpt-2/blob/master/src/model.py
"""
import contextlib
import functools
import json
import math
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

# -----------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = False  # biases in Linears and LayerNorms: GPT-2 has them; without them it is a bit better and faster
    dtype: str = 'float32'  # of activations, on CPUs of the factors of products only; parameters, norms, softmax and loss are float32
    flash: bool = False  # cuDNN's FlashAttention instead of attend()'s own, on NVIDIA GPUs
    remat: bool = False  # compute each block's activations again in the backward pass instead of keeping them (XLA's CPU compiler keeps them)
    loss_chunks: int = 1  # compute the logits of so many parts of the tokens one after the other, and again in the backward pass
    lora_rank: int = 0  # above 0, every Linear is frozen and trained through a product A B of this rank (LoRA)
    lora_alpha: float = 16.0  # A B counts lora_alpha / lora_rank

    @property
    def stream_dtype(self):
        """Of activations on their way between products. XLA's CPU code is fast at products of bfloat16, and slow at all else."""
        return 'float32' if jax.default_backend() == 'cpu' and self.dtype == 'bfloat16' else self.dtype

    def __post_init__(self):
        for name, high in dict(block_size=2**24, vocab_size=2**24, n_layer=1000, n_head=10**4, n_embd=10**6).items():
            if not 1 <= getattr(self, name) <= high:
                raise ValueError(f'{name} = {getattr(self, name)}: must be from 1 to {high:,}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout}: must be at least 0 and below 1')
        if self.dtype not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f'dtype = {self.dtype!r}: must be float32, bfloat16 or float16')
        if self.loss_chunks < 1 or self.block_size % self.loss_chunks:
            raise ValueError(f'loss_chunks = {self.loss_chunks}: must divide block_size = {self.block_size}')
        if self.flash and (self.dtype == 'float32' or self.dropout or self.n_embd // self.n_head % 8):
            raise ValueError('flash = True: cuDNN wants bfloat16 or float16, no dropout, and n_embd / n_head a multiple of 8')
        if not (0 <= self.lora_rank <= self.n_embd and self.lora_alpha > 0):
            raise ValueError(f'lora_rank = {self.lora_rank}, lora_alpha = {self.lora_alpha}: '
                             f'must be from 0 to n_embd = {self.n_embd}, and above 0')


def init_table(config):
    """How every parameter starts: 0.02, but projections into the residual stream are scaled down by the square root of
    their number (GPT-2 paper, 2.3). LoRA's x A is about as large as x, and its B is zero: it begins where its base is."""
    return {'weight': nnx.initializers.normal(0.02),
            'residual': nnx.initializers.normal(0.02 / math.sqrt(2 * config.n_layer)),
            'scale': nnx.initializers.ones, 'bias': nnx.initializers.zeros,
            'lora_A': nnx.initializers.lecun_normal(), 'lora_B': nnx.initializers.zeros}


# The functions with a backward pass of their own compute what automatic differentiation would, and keep and move less memory:
# for GPT-2 (124M) at B = 1 on a CPU, a step takes 0.84 of the time and 0.6 of the scratch memory, and with factors of bfloat16
# 0.45 of the time (BENCHMARKS.md has the parts).
# optimization_barrier() is the identity: what comes out of it is computed there, and not merged with an earlier computation.


def lone_cpu():
    """Whether a CPU is the only device: some things are done in another way there."""
    return jax.default_backend() == 'cpu' and jax.device_count() == 1


@jax.jit  # outside of it, a layout is for jax.Arrays only
def contiguous(x):
    """x laid out in the order of its dimensions, on a CPU: XLA does products of other factors slowly, and none of bfloat16."""
    if lone_cpu():
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    # with several devices XLA would gather an array before it constrains its layout
    return jax.lax.optimization_barrier(x) if jax.default_backend() == 'cpu' else x


def transposed(x):
    """x (..., m, n) as (..., n, m), contiguous: a copy on a CPU."""
    return contiguous(x.swapaxes(-1, -2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, w, dtype, axis=0):
    """x (N, in) times w (in, *out), in the type of x: the sum of products of factors in `dtype`. With axis = 1, w is (out, in)."""
    return product_forward(x, w, dtype, axis)[0]


def product_forward(x, w, dtype, axis):
    out, x, w = x.dtype, x.astype(dtype), w.astype(dtype)
    if len(x) == 1 and axis == 0 and len(w) % 64 == 0 and lone_cpu():  # a token: 64 rows at a time its weights are read 1.2 times as fast
        parts = jnp.einsum('gk,gkn->gn', x.reshape(-1, 64), w.reshape(-1, 64, w[0].size), preferred_element_type=out)
        return parts.sum(0).reshape(1, *w.shape[1:]), (x, w)
    return jnp.tensordot(x, w, (1, axis), preferred_element_type=out), (x, w)


def product_backward(dtype, axis, saved, dy):
    # without the barrier what made x would be computed again, element by element, to transpose it
    (x, w), factor = jax.lax.optimization_barrier((saved, dy.astype(dtype)))
    dx = jnp.tensordot(factor, w, ([*range(1, dy.ndim)], [a for a in range(w.ndim) if a != axis]), preferred_element_type=dy.dtype)
    rows, columns = (factor, x) if axis else (x, factor)
    return dx, jnp.tensordot(transposed(rows), columns, 1, preferred_element_type=jnp.float32)


product.defvjp(product_forward, product_backward)


class Linear(nnx.Module):
    """x (N, in) -> (N, *out). The weight is (in, *out), as in GPT-2's own files; LoRA's A is (in, rank), B (rank, *out)."""

    def __init__(self, shape, config, rngs, kind='weight'):
        init = init_table(config)
        self.weight = nnx.Param(init[kind](rngs.params(), shape))
        self.bias = nnx.Param(init['bias'](rngs.params(), shape[1:])) if config.bias else None
        if rank := config.lora_rank:
            self.lora_A = nnx.Param(init['lora_A'](rngs.params(), (shape[0], rank)))
            self.lora_B = nnx.Param(init['lora_B'](rngs.params(), (rank, *shape[1:])))
        self.lora_scale = config.lora_alpha / rank if rank else 0
        self.dtype = config.dtype

    def __call__(self, x):
        y = product(x, self.weight[...], self.dtype)
        if self.lora_scale:
            y += self.lora_scale * jnp.tensordot(x @ self.lora_A[...].astype(x.dtype), self.lora_B[...].astype(x.dtype), 1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def norm(x, w):
    """x (N, C) with mean 0 and variance 1 in each row, times w (C,)."""
    return norm_forward(x, w)[0]


def norm_forward(x, w):
    x = x - x.mean(-1, keepdims=True)
    r = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * r * w, (x * r, r, w)


def norm_backward(saved, dy):
    y, r, w = saved
    z = jax.lax.optimization_barrier(dy * y)  # once, and not anew in each of the sums below
    mean = lambda a: (jnp.dot(a, w, precision='highest') / len(w))[:, None]  # of a * w over C
    return r * (dy * w - mean(dy) - y * mean(z)), z.sum(0)


norm.defvjp(norm_forward, norm_backward)


class LayerNorm(nnx.Module):
    def __init__(self, config, rngs):
        init = init_table(config)
        self.weight = nnx.Param(init['scale'](rngs.params(), (config.n_embd,)))
        self.bias = nnx.Param(init['bias'](rngs.params(), (config.n_embd,))) if config.bias else None

    def __call__(self, x):
        z = norm(x.astype(jnp.float32), self.weight[...])
        return (z if self.bias is None else z + self.bias[...]).astype(x.dtype)


def kept(key, rate, shape):
    """Where dropout keeps a value. 16 bits decide, two from each random number: making these is what dropout costs."""
    numbers = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint16).reshape(*shape[:-1], -1)[..., :shape[-1]]
    return bits >= round(rate * 2**16)


def dropout(x, rate, key):
    if key is None or rate == 0:
        return x
    return jnp.where(kept(key, rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def scores(q, k, pos):
    """(B, nh, S, T) in float32, for q (B, nh, T, hs) at positions pos, pos + 1, ... and k (B, nh, S, hs): none for what comes later."""
    s = jnp.einsum('bhsd,bhtd->bhst', k, q, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return jnp.where(jnp.arange(k.shape[2])[:, None] <= pos + jnp.arange(q.shape[2]), s, -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5, 6))
def attend(q, k, v, rate, key, dtype, block=256):
    """Causal attention of a sequence to itself: q, k, v and the result are (B, nh, T, hs), the factors of products in dtype.
    A block of queries needs no keys that come after it: for 1024 tokens that is 3/8 less to compute. With a rate of 0 there
    is no dropout, and no need of a key. Keys come before queries, so that only v and k, which are small, are transposed."""
    return attend_forward(q, k, v, rate, key, dtype, block)[0]


def keeps(q, rate, block):
    """Whether attend() keeps the probabilities for its backward pass; else it computes them again, as FlashAttention does."""
    return rate > 0 or q.shape[2] <= block


def attend_forward(q, k, v, rate, key, dtype, block):
    out, (q, k, v) = q.dtype, (a.astype(dtype) for a in (q, k, v))
    ys, sums, saved, vT = [], [], [], transposed(v)
    for t in range(0, q.shape[2], block):
        s = scores(q[:, :, t:t + block], k[:, :, :t + block], t)
        high = s.max(-2, keepdims=True)
        p = jnp.exp(s - high).astype(dtype)  # the probabilities times their sum: y and dy, which are smaller, are divided by it
        sums.append(p.astype(jnp.float32).sum(-2))
        if rate:  # what is dropped is kept with a minus: the backward pass needs it, too
            p = jnp.where(kept(jax.random.fold_in(key, t), rate, p.shape), p, -p)
        saved.append(p if keeps(q, rate, block) else high)
        ys.append(jnp.einsum('bhds,bhst->bhdt', vT[..., :t + block], jnp.maximum(p, 0) if rate else p, preferred_element_type=jnp.float32))
    total = jnp.concatenate(sums, axis=-1) * (1 - rate)
    y = jax.lax.optimization_barrier((jnp.concatenate(ys, axis=-1) / total[:, :, None]).astype(out)).swapaxes(2, 3)
    return y, (q, k, v, total, saved)


def attend_backward(rate, dtype, block, saved, dy):
    (q, k, v, total, saved), dy = jax.lax.optimization_barrier((saved, dy))
    if not keeps(q, rate, block):  # XLA computes as soon as it can: a p that needs no dy it would make, and keep, in the forward pass
        q = q + (0 * dy[..., :1]).astype(dtype)
    out, dy = dy.dtype, contiguous((dy / total[..., None]).astype(dtype))
    dq, dk, dv, kT, total = [], None, None, transposed(k), total[:, :, None]
    for i, part in reversed(list(enumerate(saved))):
        t, end = i * block, (i + 1) * block
        qt, kt, vt, dyt = q[:, :, t:end], k[:, :, :end], v[:, :, :end], dy[:, :, t:end]
        p = part if keeps(q, rate, block) else jnp.exp(scores(qt, kt, t) - part)
        used = jnp.maximum(p, 0) if rate else p
        ds = used * jnp.einsum('bhsd,bhtd->bhst', vt, dyt, preferred_element_type=jnp.float32)
        ds -= jnp.abs(p) * (ds.sum(-2, keepdims=True) * (1 - rate) / total[..., t:end])
        used, ds = used.astype(dtype), (ds / math.sqrt(q.shape[-1])).astype(dtype)
        dq.append(jnp.einsum('bhds,bhst->bhdt', kT[..., :end], ds, preferred_element_type=out))
        dkt = jnp.einsum('bhst,bhtd->bhsd', ds, qt, preferred_element_type=out)
        dvt = jnp.einsum('bhst,bhtd->bhsd', used, dyt, preferred_element_type=out)
        dk, dv = (dkt, dvt) if dk is None else (dk.at[:, :, :end].add(dkt), dv.at[:, :, :end].add(dvt))
    return jax.lax.optimization_barrier(jnp.concatenate(dq[::-1], axis=-1)).swapaxes(2, 3), dk, dv, None


attend.defvjp(attend_forward, attend_backward)


def attend_to_cache(q, k, v, cache, pos):
    """Attention of one token, q, k and v (B, nh, 1, hs), to itself and to the first pos tokens in the cache, a pair of
    (B, nh, S, hs). The cache is read before it is updated: the other way round XLA's CPU code copies it twice."""
    s = jnp.concatenate([jnp.where(jnp.arange(cache[0].shape[2]) < pos, jnp.einsum('bhtd,bhsd->bhts', q, cache[0]), -1e30),
                         jnp.einsum('bhtd,bhsd->bhts', q, k)], axis=-1).astype(jnp.float32) / math.sqrt(q.shape[-1])
    probs = jax.nn.softmax(s, axis=-1).astype(q.dtype)
    return jnp.einsum('bhts,bhsd->bhtd', probs[..., :-1], cache[1]) + probs[..., -1:] * v


class Attention(nnx.Module):
    def __init__(self, config, rngs):
        C = config.n_embd
        self.n_head, self.rate, self.dtype, self.flash = config.n_head, config.dropout, config.dtype, config.flash
        self.c_attn = Linear((C, 3, C), config, rngs)
        self.c_proj = Linear((C, C), config, rngs, 'residual')

    def __call__(self, x, B, key, cache, pos):
        N, C = x.shape
        keys = (None, None) if key is None else jax.random.split(key)
        qkv = self.c_attn(x).reshape(B, N // B, 3, self.n_head, C // self.n_head)
        # (B, nh, T, hs) each; split, because the gradient of an index is a sum of three arrays that are mostly zeros
        q, k, v = (a[0] for a in jnp.split(qkv.transpose(2, 0, 3, 1, 4), 3))
        if cache is not None:
            y = attend_to_cache(q, k, v, cache, pos)
            # + 0 * y: after all of the cache has been read, so that XLA updates it where it is and does not copy it
            k, v = (jax.lax.dynamic_update_slice(old, new + 0 * y, (0, 0, pos, 0)) for old, new in zip(cache, (k, v)))
        elif self.flash:  # cuDNN wants (B, T, nh, hs)
            y = jax.nn.dot_product_attention(*(a.transpose(0, 2, 1, 3) for a in (q, k, v)), is_causal=True, implementation='cudnn')
            y = y.transpose(0, 2, 1, 3)
        else:
            y = attend(q, k, v, 0 if key is None else self.rate, keys[0], self.dtype)
        y = y.transpose(0, 2, 1, 3).reshape(N, C)
        return dropout(self.c_proj(y), self.rate, keys[1]), (k, v)


@jax.custom_vjp
def gelu(x):
    return jax.nn.gelu(x, approximate=True)


def gelu_backward(x, dy):
    x, dy = jax.lax.optimization_barrier((x, dy))
    return jax.vjp(functools.partial(jax.nn.gelu, approximate=True), x)[1](dy)


gelu.defvjp(lambda x: (gelu(x), x), gelu_backward)


class MLP(nnx.Module):
    def __init__(self, config, rngs):
        C = config.n_embd
        self.rate = config.dropout
        self.c_fc = Linear((C, 4 * C), config, rngs)
        self.c_proj = Linear((4 * C, C), config, rngs, 'residual')

    def __call__(self, x, key):
        return dropout(self.c_proj(gelu(self.c_fc(x))), self.rate, key)


class Block(nnx.Module):
    def __init__(self, config, rngs):
        self.ln_1 = LayerNorm(config, rngs)
        self.attn = Attention(config, rngs)
        self.ln_2 = LayerNorm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, B, key, cache, pos):
        keys = (None, None) if key is None else jax.random.split(key)
        y, cache = self.attn(self.ln_1(x), B, keys[0], cache, pos)
        x = x + y
        return x + self.mlp(self.ln_2(x), keys[1]), cache


class Embed(nnx.Module):
    def __init__(self, n, config, rngs):
        self.weight = nnx.Param(init_table(config)['weight'](rngs.params(), (n, config.n_embd)))


class GPT(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.wte = Embed(config.vocab_size, config, rngs)  # also the output layer: one V x C matrix, tied
        self.wpe = Embed(config.block_size, config, rngs)
        self.h = nnx.List([Block(config, rngs) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config, rngs)

    def features(self, idx, key=None, cache=None, pos=0):
        """The last layer's normed output (N, C) for tokens idx (B, T), and the keys and values of each layer, a pair of
        (B, nh, T, hs). With a key, dropout is on. With a cache, such pairs of S tokens, idx is one token at position pos,
        which sees all before it, and the cache with that one filled in is returned."""
        B, T = idx.shape
        keys = [None] * (1 + len(self.h)) if key is None else jax.random.split(key, 1 + len(self.h))
        wpe = jax.lax.dynamic_slice_in_dim(self.wpe.weight[...], pos, T)
        x = (self.wte.weight[...][idx] + wpe).astype(self.config.stream_dtype)
        # Tokens are flattened to (N, C) outside attention: XLA's CPU code for 3-D products is up to three times slower.
        x = dropout(x, self.config.dropout, keys[0]).reshape(B * T, -1)
        new_cache = []
        for i, block in enumerate(self.h):
            run = jax.checkpoint(block, static_argnums=1) if self.config.remat and cache is None else block
            x, layer_cache = run(x, B, keys[1 + i], cache and cache[i], pos)
            new_cache.append(layer_cache)
        return self.ln_f(x), new_cache

    def head(self, x):
        """Logits (N, V) of features (N, C)."""
        return product(x, self.wte.weight[...], self.config.dtype, 1)

    def __call__(self, idx, key=None):
        """Logits (B, T, V) for tokens idx (B, T); dropout only where a key is given."""
        return self.head(self.features(idx, key)[0]).reshape(*idx.shape, -1)

    @classmethod
    def from_pretrained(cls, name_or_directory, **changes):
        """GPT-2's weights, as open_gpt2() finds them; `changes` to its GPTConfig: dropout, dtype, or a smaller block_size."""
        config, read = open_gpt2(name_or_directory)
        config = replace(config, **changes)
        return build(config, read(config.block_size))


@functools.cache
def graphdef(config):
    """The model without its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


def build(config, params):
    """The model with these parameters, a nested dict of arrays named as in GPT-2: params['h'][0]['attn']..."""
    return nnx.merge(graphdef(config), params)


def num_params(params):
    """How many parameters there are, without the position embedding (nanoGPT's count)."""
    return sum(x.size for x in jax.tree.leaves(params)) - params['wpe']['weight'].size


# -----------------------------------------------------------------------------
# LoRA: state['params'] are the adapters, which are trained, and state['base'] is the rest, which stays as it is


def divide(params, config):
    """(trained, frozen): with LoRA the adapters and the rest, else everything and nothing."""
    flat = flatten_mapping(params)
    trained = {path for path in flat if path[-1] in ('lora_A', 'lora_B') or not config.lora_rank}
    return tuple(unflatten_mapping({path: x for path, x in flat.items() if (path in trained) == part}) for part in (True, False))


def join(trained, frozen):
    """The parameters that divide() took apart."""
    return unflatten_mapping(flatten_mapping(trained) | flatten_mapping(frozen)) if frozen else trained


def merge_lora(params, config):
    """The parameters of a model without adapters that computes the same: they are added to the weights."""
    flat = flatten_mapping(params)
    delta = lambda a, b: jnp.tensordot(a, b, 1, precision='highest') * (config.lora_alpha / config.lora_rank)
    merged = {path: x + delta(flat[*path[:-1], 'lora_A'], flat[*path[:-1], 'lora_B'])
              if path[-1] == 'weight' and (*path[:-1], 'lora_A') in flat else x
              for path, x in flat.items() if path[-1] not in ('lora_A', 'lora_B')}
    return unflatten_mapping(merged)


def lora_table(trained, frozen, config):
    """How many parameters LoRA trains, as text."""
    sizes = {path: x.size for path, x in flatten_mapping(trained).items()}
    n, rest = sum(sizes.values()), sum(x.size for x in jax.tree.leaves(frozen))
    a = sum(size for path, size in sizes.items() if path[-1] == 'lora_A')
    rows = [('trainable', n, f'A {a:,}, B {n - a:,}'), ('frozen', rest, ''), ('total', n + rest, '')]
    return f'LoRA of rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {len(sizes) // 2} matrices\n' + '\n'.join(
        f'  {name:10} {size:>15,} {100 * size / (n + rest):6.2f}%  {note}'.rstrip() for name, size, note in rows)


# bfloat16 matrix FLOP/s of a device, without sparsity, by jax.Device.device_kind (the makers' data sheets)
PEAK_FLOPS = {'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA L4': 121e12,
              'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12}


def flops_per_token(config, n_params):
    """Of a training step (PaLM's appendix B): 6 a parameter, and 12 L C T for attention."""
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size


def estimate_mfu(config, n_params, tokens_per_second, devices):
    """Model FLOPs utilisation: the share of the devices' peak, or None where that is unknown."""
    peak = next((flops for kind, flops in PEAK_FLOPS.items() if devices[0].device_kind.startswith(kind)), None)
    return peak and flops_per_token(config, n_params) * tokens_per_second / (peak * len(devices))


# -----------------------------------------------------------------------------
# devices, the training state, and its sharding


def meet(coordinator='', num_processes=1, process_id=0):
    """Joins the processes that train together: as process_id of num_processes, which meet at process 0's `coordinator`
    (HOST:PORT); with no coordinator, as Slurm, Open MPI or a TPU pod tells, and where none of them does, this process is alone.
    Comes before anything else that JAX does. Raises RuntimeError if the others do not come within five minutes."""
    if coordinator:
        print(f'process {process_id} of {num_processes}, meeting the others at {coordinator}', flush=True)
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60)
    else:
        with contextlib.suppress(ValueError):  # nobody tells
            jax.distributed.initialize(heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60)


def over_processes(number, mesh):
    """The highest `number`, an int, of all processes: with many of them an array, which need not be waited for at once."""
    if jax.process_count() == 1:
        return number
    where = NamedSharding(mesh, P(mesh.axis_names))
    numbers = jax.make_array_from_callback((mesh.size,), where, lambda index: np.full(1, number, np.int32))
    return highest(numbers)


@jax.jit
def highest(numbers):
    return numbers.max()


def keep_compiled():
    """Keeps what JAX compiles from now on in the user's cache directory, and takes it from there when it is needed again."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    # by host, because code for the CPU of one need not run on that of another
    jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'nanogpt-jax', platform.node()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def find_devices(kind=''):
    """All devices of a kind, 'cpu', 'gpu' or 'tpu', or of the best kind that JAX finds. Raises ValueError if there are
    none. Only meet() comes before it."""
    if kind:
        jax.config.update('jax_platforms', {'gpu': 'cuda'}.get(kind, kind))
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device = {kind!r}: JAX finds none here; README.md says what to install for a GPU or a TPU") from None


def best_dtype(devices):
    """The dtype to train in: bfloat16, but float32 on CPUs that have no instructions for products of it."""
    try:
        return 'bfloat16' if devices[0].platform != 'cpu' or ' avx512_bf16 ' in Path('/proc/cpuinfo').read_text() else 'float32'
    except OSError:
        return 'float32'


def make_optimizer(beta1, beta2, weight_decay, grad_clip):
    """AdamW after clipping by the global norm (0: no clipping), up to the learning rate, which train_step multiplies in.
    Matrices decay; biases and norms do not."""
    is_matrix = lambda path, x: path[-1].key != 'bias' and x.ndim >= 2
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2),
        optax.add_decayed_weights(weight_decay, functools.partial(jax.tree_util.tree_map_with_path, is_matrix)))


def get_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """The learning rate at iteration `it`: linear warm-up, then a cosine down to min_lr (nanoGPT's formula)."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / max(lr_decay_iters - warmup_iters, 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def init_params(config, seed):
    """Parameters from scratch: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed)), nnx.Param))


def init_state(config, tx, seed):
    """What a checkpoint holds: parameters, optimizer state, the number of steps so far, how many of them had gradients
    that were not finite, in all and since the last good one, and for float16 the loss scale and the good steps under it.
    And `base`, the parameters that LoRA leaves as they are; {} without it."""
    params, base = divide(init_params(config, seed), config)
    counters = {name: jnp.zeros((), jnp.int32) for name in ('step', 'skipped', 'skipped_in_a_row', 'scale_age')}
    scale = jnp.float32(2**15 if config.dtype == 'float16' else 1)
    return {'params': params, 'base': base, 'opt_state': tx.init(params), 'loss_scale': scale, **counters}


def shardings(state, mesh, fsdp=False):
    """The sharding of each array of a (possibly abstract) state. Parameters and both of Adam's moments alike:
    the products that open a block's halves are split by column, those that close them by row (Megatron-LM), so each
    half needs one all-reduce; the token embedding is split over the vocabulary; the rest is replicated. LoRA's A is split
    where its matrix is split by row, B where it is split by column. fsdp splits over `data` too."""
    split = {'wte': 0, 'c_attn': -1, 'c_fc': -1, 'attn.c_proj': 0, 'mlp.c_proj': 0}

    def one(path, x):
        names = [str(getattr(p, 'key', '')) for p in path]
        spec = [None] * x.ndim
        dim = next((d for name, d in split.items() if '.'.join(names[:-1]).endswith(name)), None)
        splits = ('weight', 'lora_A') if dim == 0 else ('weight', 'lora_B', 'bias')
        if mesh.shape['tensor'] > 1 and dim is not None and names[-1] in splits and x.shape[dim] % mesh.shape['tensor'] == 0:
            spec[dim] = 'tensor'
        if fsdp and mesh.shape['data'] > 1:
            free = [d for d in range(x.ndim) if spec[d] is None and x.shape[d] % mesh.shape['data'] == 0]
            if free:
                spec[max(free, key=lambda d: x.shape[d])] = 'data'
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(one, state)


def place(state, where):
    """An abstract state with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def on_one_device(state):
    """The shardings that put each array on the first device."""
    return jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[0]), state)


# -----------------------------------------------------------------------------
# GPT-2's weights, in Hugging Face's format: config.json, and model.safetensors in one file or several

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_META = {'vocab_size': 50257, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}  # where no meta.json says otherwise


def fetch_gpt2(name):
    """The folder of one of GPT2, downloaded the first time. Raises ValueError where it cannot be."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo, files = f'openai-community/{name}', ('config.json', 'model.safetensors')
    for only_here in (True, False):
        try:
            if not only_here:  # fails at once without a network, where hf_hub_download tries for half a minute
                get_hf_file_metadata(hf_hub_url(repo, files[0]))
            return Path([hf_hub_download(repo, file, local_files_only=only_here) for file in files][0]).parent
        except Exception as e:  # the hub's own, its HTTP library's, the disk's
            reason = type(e).__name__
    raise ValueError(f'no download of {name} ({reason}): put {" and ".join(files)} of https://huggingface.co/{repo}/tree/main '
                     'into a folder and give its path instead')


def gpt2_config(folder):
    """The GPTConfig for a folder's config.json. Raises ValueError naming what GPT does not do."""
    hf = read_json(folder / 'config.json')
    try:
        config = GPTConfig(block_size=hf['n_positions'], bias=hf.get('bias', True),
                           **{key: hf[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')})
    except KeyError as e:
        raise ValueError(f'{folder}/config.json lacks {e}; GPT-2\'s has it') from None
    except (ValueError, TypeError) as e:
        raise ValueError(f'{folder}/config.json: {e}') from None
    does = {'model_type': ['gpt2'], 'activation_function': ['gelu_new', 'gelu_pytorch_tanh'], 'layer_norm_epsilon': [1e-5],
            'n_inner': [None, 4 * config.n_embd], 'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
            'add_cross_attention': [False], 'tie_word_embeddings': [True], 'quantization_config': [None]}
    for key, values in does.items():
        if (value := hf.get(key, values[0])) not in values:
            raise ValueError(f'{folder}/config.json: {key} = {value!r}: this GPT does {values[0]!r} only')
    return config


def open_gpt2(name_or_directory):
    """(config, read) of one of GPT2 or of a directory in its format. read(block_size, where) gives the parameters with the
    first block_size positions, each array read slice by slice to where it belongs: where(abstract parameters) are the
    shardings, by default the first device. Raises ValueError naming a tensor that is missing, unexpected or of another shape."""
    from safetensors import SafetensorError, safe_open
    folder = fetch_gpt2(name_or_directory) if name_or_directory in GPT2 else Path(name_or_directory)
    config, index = gpt2_config(folder), folder / 'model.safetensors.index.json'
    files = sorted(set(read_json(index).get('weight_map', {}).values())) if index.exists() else ['model.safetensors']
    if missing := next((file for file in files if not (folder / file).is_file()), None):
        if list(folder.glob('pytorch_model*.bin')):
            raise ValueError(f'{folder} has its weights in a pickle, which is never loaded; convert it where transformers is: python -c '
                             f'"from transformers import *; GPT2LMHeadModel.from_pretrained(\'{folder}\').save_pretrained(\'{folder}\')"')
        raise ValueError(f'{folder} lacks {missing}')
    tensors = {}
    for file in files:
        try:
            opened = safe_open(folder / file, framework='numpy')
        except SafetensorError as e:
            raise ValueError(f'{folder / file} is damaged ({e})') from None
        tensors |= {key.removeprefix('transformer.'): opened.get_slice(key) for key in opened.keys()}

    wanted = {'.'.join(map(str, path)): x for path, x in flatten_mapping(jax.eval_shape(lambda: init_params(config, 0))).items()}
    for name, x in wanted.items():
        shape = [*x.shape[:-2], 3 * x.shape[-1]] if '.c_attn.' in name else [*x.shape]
        if name not in tensors:
            raise ValueError(f'{folder} lacks the tensor {name}')
        if tensors[name].get_shape() != shape:
            raise ValueError(f'{folder}: the tensor {name} is {tensors[name].get_shape()}, and with its config.json should be {shape}')
    for name in sorted(tensors.keys() - wanted.keys()):  # old files hold the causal mask, and some the output layer, which is tied
        zero = name.endswith('.bias') and not config.bias and not np.any(tensors[name][:])  # export.py writes these
        if not (zero or name == 'lm_head.weight' or name.endswith(('.attn.bias', '.attn.masked_bias'))):
            raise ValueError(f'{folder} has a tensor that is not of this model: {name}')

    def read(block_size=None, where=on_one_device):
        if block_size and block_size > config.block_size:
            raise ValueError(f'block_size = {block_size}: {name_or_directory} has {config.block_size} positions')
        abstract = jax.eval_shape(lambda: init_params(replace(config, block_size=block_size or config.block_size), 0))

        def one(path, x, sharding):
            tensor = tensors['.'.join(str(p.key) for p in path)]

            def part(index):
                index = tuple(slice(*s.indices(n)) for s, n in zip(index, x.shape))
                whole = len(tensor.get_shape()) != x.ndim  # c_attn: (C, 3C) there, (C, 3, C) here
                return np.asarray(tensor[:].reshape(x.shape)[index] if whole else tensor[index], np.float32)
            return jax.make_array_from_callback(x.shape, sharding, part)

        return jax.tree_util.tree_map_with_path(one, abstract, where(abstract))
    return config, read


# -----------------------------------------------------------------------------
# data, and batches: pure functions of (seed, step), the same sequences on every mesh


def read_json(path):
    """What a JSON file holds, a dict. Raises ValueError if it is not that."""
    try:
        value = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{path} is not a JSON object')
    return value


def open_dataset(folder, block_size):
    """({'train': tokens, 'val': tokens}, meta) of a dataset's folder, memory-mapped. Raises ValueError saying what is
    wrong with it: files that are missing, cut off or too short, or tokens outside the vocabulary."""
    folder, data = Path(folder), {}
    meta = GPT2_META
    if (folder / 'meta.json').exists():
        meta = read_json(folder / 'meta.json')
        kind, chars = meta.get('tokenizer', {}).get('kind'), meta.get('tokenizer', {}).get('chars', '')
        if type(meta.get('vocab_size')) is not int or not (kind == 'char' and len(chars) == meta['vocab_size'] or
                                                           kind == 'tiktoken' and 'name' in meta['tokenizer']):
            raise ValueError(f'{folder}/meta.json lacks vocab_size or a tokenizer that fits it; prepare the dataset again')
    for split in ('train', 'val'):
        path = folder / f'{split}.bin'
        if not path.exists():
            script = folder / 'prepare.py' if (folder / 'prepare.py').exists() else f'data/text/prepare.py YOUR_FILES --name={folder.name}'
            raise ValueError(f'dataset = {folder.name!r} is not prepared: run python {script}')
        size = path.stat().st_size
        if size % 2 or size // 2 <= block_size:
            raise ValueError(f'{path} holds {size:,} bytes: two a token, and more than block_size = {block_size} tokens, are needed')
        data[split] = np.memmap(path, '<u2', 'r')
        if (highest := int(data[split][:10**8].max())) >= meta['vocab_size']:  # more of it would take a while; load() looks too
            raise ValueError(f'{path} holds token {highest}, but the vocabulary has {meta["vocab_size"]}; prepare the dataset again')
    return data, meta


def padded(vocab_size):
    """GPT-2's 50257 becomes 50304, a multiple of 64, for faster products: the rows that are too many are never a target."""
    return -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size


def micro_batches(n, batch_size, n_devices):
    """(G, B): n sequences as G micro-batches of B, at most batch_size of them on each of n_devices at a time. None where
    n_devices do not divide n."""
    for G in range(1, n + 1):
        if n % (G * n_devices) == 0 and n // (G * n_devices) <= batch_size:
            return G, n // G


def train_starts(data, shape, block_size, seed, step):
    """Where the sequences of a training step begin in data: `shape` = (G, B) positions. Multiples of the golden ratio
    modulo 1 fill the data evenly (a Weyl sequence): every part is seen equally often, where independent draws leave
    out a third of the data in what should be an epoch."""
    n = math.prod(shape)
    index = np.arange(step * n, (step + 1) * n, dtype=np.uint64)
    offset = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    share = (index * np.uint64(0x9E3779B97F4A7C15) + offset >> np.uint64(11)) / 2**53  # overflow is the modulo
    return (share * (len(data) - block_size)).astype(np.int64).reshape(shape)


def eval_starts(data, shape, block_size):
    """Where the sequences of an evaluation begin: evenly over the data, so that every run is judged on the same."""
    return np.linspace(0, len(data) - block_size - 1, math.prod(shape)).astype(np.int64).reshape(shape)


def load(data, starts, block_size, vocab_size, mesh):
    """The tokens (G, B, block_size + 1) that begin at `starts` (G, B), B split over the data axis of the mesh. A process
    reads only its own devices' part. Raises ValueError for a token outside the vocabulary, which JAX would clip in silence."""
    def rows(index):
        tokens = data[starts[index[:2]][..., None] + np.arange(block_size + 1)]
        if tokens.max() >= vocab_size:
            raise ValueError(f'{data.filename} holds token {tokens.max()}, but the vocabulary has {vocab_size}')
        return tokens
    return jax.make_array_from_callback((*starts.shape, block_size + 1), NamedSharding(mesh, P(None, 'data')), rows)


# -----------------------------------------------------------------------------
# loss and steps


@jax.custom_vjp
def cross_entropy(logits, targets):
    """Mean over N of the negative log likelihood, in float32: logits (N, V), targets (N,)."""
    return cross_entropy_forward(logits, targets)[0]


def cross_entropy_forward(logits, targets):
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), -1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return (lse - target_logits.astype(jnp.float32)).mean(), (logits, targets, lse)


def cross_entropy_backward(saved, dy):
    logits, targets, lse = saved
    p = jnp.exp(logits.astype(jnp.float32) - lse[:, None])
    hit = jnp.arange(logits.shape[1]) == targets[:, None]
    return ((p - hit) * (dy / len(targets))).astype(logits.dtype), None


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)


def loss_fn(params, tokens, config, key=None, parts=1):
    """Mean loss of predicting tokens[:, 1:] from tokens[:, :-1]; tokens (B, T + 1) of any integer type. The features of so
    many `parts` of the batch are computed apart from each other."""
    tokens = tokens.astype(jnp.int32)
    model, targets = build(config, params), tokens[:, 1:].reshape(-1)
    x = jnp.concatenate([model.features(part, key if key is None else jax.random.fold_in(key, i))[0]
                         for i, part in enumerate(jnp.array_split(tokens[:, :-1], parts))])
    if config.loss_chunks == 1:
        return cross_entropy(model.head(x), targets)
    chunk = jax.checkpoint(lambda part: cross_entropy(model.head(part[0]), part[1]))
    return jax.lax.map(chunk, (x.reshape(config.loss_chunks, -1, config.n_embd), targets.reshape(config.loss_chunks, -1))).mean()


def mean_grads(params, base, tokens, scale, key, config, mesh=None, fsdp=False):
    """(loss, gradient by params) of `scale` times the mean loss over the G micro-batches of tokens (G, B, T + 1); `base` is
    the rest of the parameters."""
    G, B, _ = tokens.shape
    # a CPU alone computes the halves of a batch side by side: its cores work on one where the other has nothing for all of them
    parts = 2 if B > 1 and lone_cpu() else 1

    def sum_grads(params, base, tokens, key, gather=lambda both: both):
        """Loss and gradient summed over the micro-batches."""
        loss = lambda params, base, tokens, key: scale * loss_fn(join(*gather((params, base))), tokens, config, key, parts)
        if fsdp:
            loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_anything_except_these_names('gathered'))

        def micro_step(total, batch):
            i, tokens = batch
            # without the barrier, XLA would gather fsdp's parameters once for all micro-steps, and keep them
            here, tokens = jax.lax.optimization_barrier(((params, base), tokens)) if fsdp else ((params, base), tokens)
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(*here, tokens, jax.random.fold_in(key, i))), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(micro_step, zero, (jnp.arange(G), tokens))[0]

    if mesh is None or mesh.shape['data'] == 1:
        return jax.tree.map(lambda x: x / G, sum_grads(params, base, tokens, key))

    # Each part of the data axis sums the gradients of its own rows, and only then they are summed over the axis: one
    # all-reduce an iteration, where GSPMD by itself makes one in every micro-step. What fsdp has split over the axis is
    # gathered for use (which transposes to a reduce-scatter of its gradient). The tensor axis stays with GSPMD.
    where = shardings((params, base), mesh, fsdp)
    along = lambda axis: jax.tree.map(lambda s: P(*(a if a == axis else None for a in s.spec)), where)

    def gather(x, data, tensor):
        if 'data' not in data:
            return x
        whole = lambda x: jax.lax.all_gather(x, 'data', axis=data.index('data'), tiled=True)
        whole = jax.shard_map(whole, in_specs=tensor, out_specs=tensor, axis_names={'tensor'}, check_vma=False)
        return checkpoint_name(whole(x), 'gathered')

    def part(params, base, tokens, key):
        key = jax.random.fold_in(key, jax.lax.axis_index('data'))
        gather_all = lambda both: jax.tree.map(gather, both, along('data'), along('tensor'))
        loss, grads = sum_grads(params, base, tokens, key, gather_all)
        grads = jax.tree.map(lambda g, data: g if 'data' in data else jax.lax.psum(g, 'data'), grads, along('data')[0])
        return jax.tree.map(lambda x: x / (G * mesh.shape['data']), (jax.lax.psum(loss, 'data'), grads))

    return jax.shard_map(part, mesh=mesh, in_specs=(*along('data'), P(None, 'data'), P()), out_specs=(P(), along('data')[0]),
                         axis_names={'data'}, check_vma=False)(params, base, tokens, key)


@functools.partial(jax.jit, static_argnames=('config', 'tx', 'mesh', 'fsdp'), donate_argnames='state')
def train_step(state, tokens, lr, key, config, tx, mesh=None, fsdp=False):
    """One update from the mean gradient of G micro-batches: tokens (G, B, T + 1). Dropout depends on (key, step, mesh, kind
    of device) alone. If the gradient is not finite, parameters and optimizer stay as they were. Returns the new state (the
    old one's memory is reused) and metrics: loss, grad_norm (before clipping), skipped and skipped_in_a_row."""
    params, base, opt_state, scale = state['params'], state['base'], state['opt_state'], state['loss_scale']
    key = jax.random.fold_in(key, state['step'])
    loss, grads = mean_grads(params, base, tokens, scale, key, config, mesh, fsdp)
    if config.dtype == 'float16':  # else it is 1
        loss, grads = jax.tree.map(lambda x: x / scale, (loss, grads))
    grad_norm = optax.tree.norm(grads)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def update(params, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), opt_state

    # a branch, because selecting between old and new keeps both: 0.4 GB more for 124M parameters
    params, opt_state = jax.lax.cond(finite, update, lambda *old: old, params, opt_state)

    skipped, in_a_row = state['skipped'] + ~finite, jnp.where(finite, 0, state['skipped_in_a_row'] + 1)
    age = jnp.where(finite, state['scale_age'] + 1, 0)
    if config.dtype == 'float16':  # as large as goes without overflow: halved after one, doubled after 2000 good steps
        scale = jnp.where(finite, jnp.where(age % 2000 == 0, 2 * scale, scale), jnp.maximum(scale / 2, 1))
    return ({'params': params, 'base': base, 'opt_state': opt_state, 'step': state['step'] + 1, 'skipped': skipped,
             'skipped_in_a_row': in_a_row, 'loss_scale': scale, 'scale_age': age},
            {'loss': loss, 'grad_norm': grad_norm, 'skipped': skipped, 'skipped_in_a_row': in_a_row})


def abstract_tokens(shape, mesh, config):
    """What load() gives for starts of `shape` = (G, B)."""
    return jax.ShapeDtypeStruct((*shape, config.block_size + 1), np.uint16, sharding=NamedSharding(mesh, P(None, 'data')))


def lower_step(state, shape, mesh, config, tx, fsdp=False):
    """train_step for a (possibly abstract) state and batches of `shape` = (G, B), to be compiled."""
    return train_step.lower(state, abstract_tokens(shape, mesh, config), 0.0, jax.random.key(0), config=config, tx=tx, mesh=mesh, fsdp=fsdp)


def side_by_side(*functions):
    """The results of calls that trace and compile. On a CPU two at a time: XLA's compiler has work for a core and a half.
    Elsewhere in turn, because it chooses some algorithms by their time on the device."""
    with ThreadPoolExecutor(2 if jax.default_backend() == 'cpu' else 1) as threads:
        return list(threads.map(lambda function: function(), functions))


def compiled(lowered, mesh):
    """A lowered program, compiled. Raises MemoryError where it would not fit a device: on a CPU the system would end the
    process without a word."""
    device = mesh.devices.flat[0]
    # code for a CPU becomes as fast with less effort, which takes 0.75 of the time
    effort = {'xla_backend_optimization_level': 1, 'xla_llvm_disable_expensive_passes': True} if device.platform == 'cpu' else None
    program = lowered.compile(compiler_options=effort)
    use = program.memory_analysis()
    needed = use.argument_size_in_bytes + use.temp_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    if device.platform == 'cpu':
        limit, needed = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'), needed * mesh.size
    else:
        limit = (device.memory_stats() or {}).get('bytes_limit', math.inf)
    if needed > limit:
        raise MemoryError(f'needs {needed / 2**30:.1f} GiB, a device has {limit / 2**30:.1f}')
    return program


def compile_step(state, shape, mesh, config, tx, fsdp=False):
    """train_step compiled for a state and batches of `shape` = (G, B): a function of (state, tokens, lr, key)."""
    step = compiled(lower_step(state, shape, mesh, config, tx, fsdp), mesh)
    if config.flash and '__cudnn$fmha' not in step.as_text():
        raise ValueError('flash = True: the compiled step has no FlashAttention in it')
    return step


@functools.partial(jax.jit, static_argnames='config')
def eval_step(params, tokens, config):
    """Mean loss, without dropout, over all of tokens (G, B, T + 1)."""
    return jax.lax.map(lambda batch: loss_fn(params, batch, config), tokens).mean()


def compile_eval(params, shape, mesh, config):
    """eval_step compiled for parameters and tokens of `shape` = (G, B): a function of (params, tokens)."""
    return compiled(eval_step.lower(params, abstract_tokens(shape, mesh, config), config=config), mesh)


# -----------------------------------------------------------------------------
# sampling


def pick(logits, key, temperature, top_k, top_p):
    """One token for each row of logits (B, V). top_k keeps the likeliest k, then top_p the fewest that reach mass p."""
    if temperature == 0:
        return logits.argmax(-1)
    V, ids = logits.shape[-1], None
    logits = logits.astype(jnp.float32) / temperature
    if top_p < 1 or (top_k and top_k < V):
        logits, ids = jax.lax.top_k(logits, min(top_k or V, V))  # sorted, the likeliest first
    if top_p < 1:
        probs = jax.nn.softmax(logits, -1)
        logits = jnp.where(jnp.cumsum(probs, -1) - probs < top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits, -1)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], -1)[:, 0]


def cast(params, config):
    """The matrices in the type that the model computes in: every token reads all of them."""
    return jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > 1 else x, params)


@functools.partial(jax.jit, static_argnames='config')
def prefill(params, window, config):
    """The cache of keys and values (B, nh, S, hs) of each layer for the tokens in window (B, S)."""
    return build(config, params).features(window)[1]


@functools.partial(jax.jit, static_argnames=('config', 'eot', 'n_vocab', 'how'), donate_argnames=('window', 'cache'))
def decode(params, window, cache, done, pos, stop, made, key, config, eot, n_vocab, how):
    """Fills window[:, pos:stop], token by token, and the cache with it. Rows in done (B,) have met `eot` and repeat it.
    The key is folded with the number of tokens made so far, so it does not matter in how many calls they are made."""
    model = build(config, params)

    def body(carry):
        window, cache, done, pos, made = carry
        last = jax.lax.dynamic_slice_in_dim(window, pos - 1, 1, axis=1)
        x, cache = model.features(last, cache=cache, pos=pos - 1)
        token = pick(model.head(x)[:, :n_vocab], jax.random.fold_in(key, made), *how).astype(window.dtype)
        if eot is not None:
            token = jnp.where(done, eot, token)
            done = done | (token == eot)
        return jax.lax.dynamic_update_slice(window, token[:, None], (0, pos)), cache, done, pos + 1, made + 1

    more = lambda carry: (carry[3] < stop) & ~carry[2].all()
    return jax.lax.while_loop(more, body, (window, cache, done, pos, made))


def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=1.0, key, eot=None, n_vocab=None, chunk=None):
    """Yields the new tokens for the prompts idx (B, T) as they are made, in arrays (B, <= chunk).

    A prompt longer than block_size is cut to its end. When the context is full, its last half is kept and read again.
    Ends early once every row has met the token `eot`; n_vocab keeps padded rows of the vocabulary out of the text."""
    # on a CPU in float32: a single token's products are slow in bfloat16, and text does not depend on the dtype of training
    config = replace(model.config, dtype=model.config.stream_dtype)
    params = cast(nnx.to_pure_dict(nnx.state(model, nnx.Param)), config)
    B = idx.shape[0]
    idx = jnp.asarray(idx, jnp.int32)[:, -config.block_size:]
    done, made, n = jnp.zeros(B, bool), 0, idx.shape[1]
    # The cache is as long as needed, in steps of 64 so that prompts of different lengths share a compilation.
    S = min(config.block_size, -(-(n + max_new_tokens) // 64) * 64)
    while made < max_new_tokens:
        # the window holds S tokens to look at, and one more that they make
        window = jnp.zeros((B, S + 1), jnp.int32).at[:, :n].set(idx)
        cache = prefill(params, window[:, :S], config)
        end = min(S + 1, n + max_new_tokens - made)
        while n < end:
            stop = min(n + (chunk or end), end)
            window, cache, done, pos, _ = decode(params, window, cache, done, n, stop, made, key, config, eot,
                                                 n_vocab or config.vocab_size, (temperature, top_k, top_p))
            finished = bool(done.all())
            pos = int(pos)
            yield window[:, n:pos]
            made, n = made + pos - n, pos
            if finished:
                return
        n = max(config.block_size // 2, 1)
        idx = window[:, S + 1 - n:]


def generate(model, idx, max_new_tokens, **how):
    """The prompts idx (B, T) with up to max_new_tokens more, (B, T + new); `how` as in stream(). Rows that met `eot`
    early repeat it until the last row is done."""
    idx = jnp.asarray(idx, jnp.int32)
    return jnp.concatenate([idx, *stream(model, idx, max_new_tokens, **how)], axis=1)
