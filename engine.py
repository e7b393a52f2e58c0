"""
Writes text fast: a prompt is read once, and then each token reads the keys and values of those before it from a cache.

It has no maths of its own: the layers of model.py compute everything. The window is the context as an array of fixed
length, (B, S + 1), so that a whole text needs few compiled programs.
"""
import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model import build, params_of, sample_token


class Sampling(NamedTuple):
    """How the next token is drawn from the logits."""
    temperature: float
    top_k: int | None
    top_p: float
    eot: int | None  # the token that ends a row
    n_vocab: int  # tokens from here on are padding of the vocabulary, and are never drawn


class Text(NamedTuple):
    """A text as it is being written."""
    window: jax.Array  # (B, S + 1): the context, of which the first `pos` tokens are there, and the token it leads to
    cache: list  # each layer's keys and values, a pair of (B, nh, S, hs)
    done: jax.Array  # (B,): whether a row has met the end of text
    pos: int
    made: int  # how many tokens were written since the prompt: each has a random key of its own


@functools.partial(jax.jit, static_argnames='config')
def prefill(params, window, config):
    """Each layer's key-value cache for the tokens window (B, S)."""
    return build(config, params).features(window)[1]


def draw(logits, key, group, front, sampling):
    """The next token of each row, from its logits (B, V). Ten rows at a time, a group, share a key, so the text of a
    row is the same whatever other rows are written with it. The first row here is row `front` of a `group`."""
    B, V = logits.shape
    how = sampling.temperature, sampling.top_k, sampling.top_p
    key_of = lambda group: jnp.where(group == 0, key, jax.random.fold_in(key, group))
    if front + B <= 10:
        return sample_token(jnp.pad(logits, ((front, 0), (0, 0))), key_of(group), *how)[front:]
    n = -(-(front + B) // 10)
    groups = jnp.pad(logits, ((front, 10 * n - front - B), (0, 0))).reshape(n, 10, V)
    tokens = jax.vmap(lambda logits, i: sample_token(logits, key_of(group + i), *how))(groups, jnp.arange(n))
    return tokens.reshape(-1)[front:front + B]


@functools.partial(jax.jit, static_argnames=('front', 'config', 'sampling'), donate_argnames='text')
def decode(params, text, end, key, group, front, config, sampling):
    """Writes the text up to position `end`, or until all rows are done. A row that is done repeats the end of text."""
    model, eot = build(config, params), sampling.eot

    def write_token(text):
        last = jax.lax.dynamic_slice_in_dim(text.window, text.pos - 1, 1, axis=1)
        x, cache = model.features(last, cache=text.cache, pos=text.pos - 1)
        logits = model.head(x[:, 0])[:, :sampling.n_vocab]
        token = draw(logits, jax.random.fold_in(key, text.made), group, front, sampling).astype(text.window.dtype)
        done = text.done
        if eot is not None:
            token = jnp.where(done, eot, token)
            done = done | (token == eot)
        window = jax.lax.dynamic_update_slice(text.window, token[:, None], (0, text.pos))
        return Text(window, cache, done, text.pos + 1, text.made + 1)

    return jax.lax.while_loop(lambda text: (text.pos < end) & ~text.done.all(), write_token, text)


def cache_length(config, n, max_new_tokens):
    """How many positions the cache has for a prompt of n tokens: as many as needed, in steps of 64, so that similar
    prompts share a compilation."""
    return min(config.block_size, -(-(n + max_new_tokens) // 64) * 64)


def rows_that_fit(config, n, max_new_tokens, memory):
    """How many rows stream() can write at a time in so many bytes of memory, about: 1, 2, 5, or a multiple of 10."""
    S, C = cache_length(config, n, max_new_tokens), config.n_head * config.head_size
    kv = (config.n_kv_head or config.n_head) * config.head_size
    # a new cache is made beside the old one, and copied; a layer's activations and scores while it reads the prompt
    row = 4 * (3 * 2 * config.n_layer * S * kv + 16 * S * C + config.n_head * S * S + 3 * config.vocab_size)
    fit = int(min(memory / row, 10**6))
    return fit - fit % 10 if fit >= 10 else 5 if fit >= 5 else 2 if fit >= 2 else 1


def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=1.0, key, eot=None, n_vocab=None,
           chunk=None, first=0):
    """Continues the prompts idx (B, T) and yields the new tokens as they are made, in arrays (B, <= chunk).

    A prompt longer than block_size is cut to its end. When the context is full, its last half becomes the new prompt.
    Stops early when every row has met the token `eot`. Only the first n_vocab tokens are used. Where the rows are a
    part of many, `first` is the number of the first one, and their text does not depend on how many are here. With
    kernels='plain', or where somebody has edited it, model.generate() writes the text alone, much slower. Raises
    ValueError where a prompt is empty."""
    config, B = model.config, idx.shape[0]
    done = jnp.zeros(B, bool)
    idx = jnp.asarray(idx, jnp.int32)[:, -config.block_size:]
    if not idx.size:
        raise ValueError('the prompt is empty: give at least one token to go on from')
    plain = config.kernels == 'plain'
    if not plain:
        from kernels import edited_generate  # here, because a plain model needs no kernels.py
        plain = edited_generate(type(model))
    if plain:
        seeds = jax.random.bits(jax.random.fold_in(key, first) if first else key, min(max_new_tokens, 10**6))
        for i in range(max_new_tokens):
            seed = seeds[i % len(seeds)]
            idx = model.generate(idx, 1, temperature, top_k, top_p, seed=seed, n_vocab=n_vocab)[:, -config.block_size:]
            yield idx[:, -1:]
            done = done | (idx[:, -1] == eot)
            if done.all():
                break
        return
    config = replace(config, dtype=config.activation_dtype)  # CPUs are slow at a single token in bfloat16
    # every token reads all matrices: keep them in the type in which they are multiplied
    params = jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > 1 else x, params_of(model))
    sampling = Sampling(temperature, top_k, top_p, eot, n_vocab or config.vocab_size)
    made, n = 0, idx.shape[1]
    S = cache_length(config, n, max_new_tokens)
    group, front = divmod(first, 10)
    while made < max_new_tokens:
        window = jnp.zeros((B, S + 1), jnp.int32).at[:, :n].set(idx)
        text = Text(window, prefill(params, window[:, :S], config), done, jnp.int32(n), jnp.int32(made))
        end = min(S + 1, n + max_new_tokens - made)
        while n < end:
            text = decode(params, text, min(n + (chunk or end), end), key, group, front, config, sampling)
            pos, made, done = int(text.pos), int(text.made), text.done
            yield text.window[:, n:pos]
            n = pos
            if done.all():
                return
        n = max(config.block_size // 2, 1)  # the context is full: its last half becomes the prompt of a new cache
        idx = text.window[:, S + 1 - n:]


def generate(model, idx, max_new_tokens, **how):
    """The prompts idx (B, T) with up to max_new_tokens more tokens; `how` as in stream()."""
    idx = jnp.asarray(idx, jnp.int32)
    return jnp.concatenate([idx, *stream(model, idx, max_new_tokens, **how)], axis=1)
