"""
The whole GPT in plain JAX: its config, its functions, its layers, its loss, and a loop that writes text.

What you change here is what runs, in training, in evaluation and in sampling, on every device and on every mesh. A
function that is marked @fast may have a faster twin in kernels.py, a kernel. It was made for the function as it stands
here, so once you edit the function, your lines run instead, and the log says so. `--kernels=plain` uses no kernel.

Letters for dimensions, as in nanoGPT: B batch, T time (T <= block_size), C = n_embd, nh = n_head, hs = head_size,
V = vocab_size; S is the length of the key-value cache.

References: nanoGPT's model.py, https://github.com/karpathy/nanoGPT; OpenAI's GPT-2, https://github.com/openai/gpt-2;
the Qwen3 technical report, https://arxiv.org/abs/2505.09388
"""
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

# An architecture is a row. Add a row, and `--arch=yours` trains it. qkv_bias: queries, keys and values have biases.
ARCHS = {
    'gpt2': dict(norm='layer', positions='learned', mlp='gelu', qkv_bias=False, qk_norm=False),
    'qwen3': dict(norm='rms', positions='rotary', mlp='swiglu', qkv_bias=False, qk_norm=True),
    'qwen2': dict(norm='rms', positions='rotary', mlp='swiglu', qkv_bias=True, qk_norm=False),
    'llama': dict(norm='rms', positions='rotary', mlp='swiglu', qkv_bias=False, qk_norm=False),
}


@dataclass(frozen=True)
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    arch: str = 'gpt2'  # a row of ARCHS: 'gpt2'; 'qwen3', which learns more from every token; 'qwen2'; 'llama'
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd with GELU, about 8/3 n_embd with SwiGLU
    n_kv_head: int = 0  # heads of keys and values, each for a group of n_head / n_kv_head queries; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    norm_eps: float = 0.0  # norms add it to the variance; 0: 1e-5 in LayerNorm, 1e-6 in RMSNorm
    tied: bool = True  # the output layer is the token embedding; False: a matrix of its own
    rope_theta: float = 10000.0  # rotary positions: a higher one turns them more slowly
    rope_factor: float = 1.0  # Llama 3's longer contexts: slow rotary positions turn so many times slower; 1: all alike
    rope_context: int = 8192  # those that turn less than once in so many tokens are slow
    dropout: float = 0.0
    bias: bool = False  # biases in Linears and LayerNorms, like GPT-2; False: a bit better and faster
    dtype: str = 'float32'  # matrices are multiplied in it; parameters, norms and loss are float32
    remat: bool = False  # compute activations again in the backward pass instead of storing them
    loss_chunks: int = 1  # compute the logits of so many parts of the batch one after the other
    lora_rank: int = 0  # above 0, train only a product A B of this rank beside each matrix (LoRA)
    lora_alpha: float = 16.0  # A B is multiplied by lora_alpha / lora_rank
    kernels: str = 'plain'  # 'plain': none; else the set of kernels.py's functions to use, as devices.py chooses it

    @property
    def row(self):
        return ARCHS[self.arch]

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self):
        swiglu = -(-8 * self.n_embd // 96) * 32  # 8/3 n_embd, rounded up to a multiple of 32
        return self.n_inner or {'gelu': 4 * self.n_embd, 'swiglu': swiglu}[self.row['mlp']]

    @property
    def activation_dtype(self):
        """The type of activations between matrices. On a CPU, only matmuls are fast in bfloat16."""
        return 'float32' if self.kernels in ('cpu', 'cpus') and self.dtype == 'bfloat16' else self.dtype

    def __post_init__(self):
        lowest = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_inner=0, n_kv_head=0, head_dim=0,
                      norm_eps=0, rope_theta=1, rope_factor=1, rope_context=1, loss_chunks=1)
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f'{name} = {getattr(self, name)}: must be at least {low}')
        if self.arch not in ARCHS:
            raise ValueError(f'arch = {self.arch!r}: must be {" or ".join(map(repr, ARCHS))}')
        rms, rotary = self.row['norm'] == 'rms', self.row['positions'] == 'rotary'
        for fine, name, must in (
                (self.n_layer <= 1000, 'n_layer', 'must be at most 1000'),  # each is compiled: nobody waits for more
                (self.head_dim or not self.n_embd % self.n_head, 'n_embd', f'n_head = {self.n_head} must divide it'),
                (self.n_head % (self.n_kv_head or 1) == 0, 'n_kv_head', f'must divide n_head = {self.n_head}'),
                (not (self.bias and rms), 'bias', f'arch = {self.arch!r} has RMSNorm, which goes without biases'),
                (self.head_size % 2 == 0 or not rotary, 'head_size', f'arch = {self.arch!r} turns channels in pairs'),
                (0 <= self.dropout < 1, 'dropout', 'must be at least 0 and below 1'),
                (self.dtype in ('float32', 'bfloat16', 'float16'), 'dtype', 'must be float32, bfloat16 or float16'),
                (self.block_size % self.loss_chunks == 0, 'loss_chunks', f'must divide block_size = {self.block_size}'),
                (0 <= self.lora_rank <= self.n_embd, 'lora_rank', f'must be from 0 to n_embd = {self.n_embd}'),
                (self.lora_alpha > 0, 'lora_alpha', 'must be above 0')):
            if not fine:
                raise ValueError(f'{name} = {getattr(self, name)!r}: {must}')


# -----------------------------------------------------------------------------
# functions


def fast(plain):
    """Marks a function that may have a kernel. f(..., kernels='gpu') runs the kernel that pays on a GPU, if there is
    one and if it can do what is asked; f(...) always runs the function as it stands here."""
    @functools.wraps(plain)
    def choose(*args, kernels='plain', **more):
        if kernels != 'plain':
            from kernels import kernel_for  # here, because a plain model needs no kernels.py
            result = kernel_for(plain, kernels)(*args, **more)
            if result is not NotImplemented:
                return result
        return plain(*args, **more)

    return choose


@fast
def linear(x, weight, bias=None, dtype='float32'):
    """x @ weight + bias, multiplied in dtype: x (..., in), weight (in, *out), bias (*out,), result (..., *out)."""
    y = jnp.tensordot(x.astype(dtype), weight.astype(dtype), 1, preferred_element_type=x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)


@fast
def unembed(x, weight, dtype='float32'):
    """The logits x @ weight.T (..., V), multiplied in dtype, for features x (..., C) and the embedding (V, C)."""
    return jnp.einsum('...c,vc->...v', x.astype(dtype), weight.astype(dtype), preferred_element_type=x.dtype)


@fast
def layer_norm(x, weight, bias, eps):
    """weight * (x - mean) / sqrt(var + eps) + bias over the last dimension, in float32: x (..., C)."""
    centered = x.astype(jnp.float32)
    centered = centered - centered.mean(-1, keepdims=True)
    y = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + eps) * weight
    return (y if bias is None else y + bias).astype(x.dtype)


@fast
def rms_norm(x, weight, eps):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32: x (..., C)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32**2).mean(-1, keepdims=True) + eps) * weight).astype(x.dtype)


@fast
def gelu(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), GPT-2's form (https://arxiv.org/abs/1606.08415)."""
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@fast
def swiglu(x):
    """silu(gate) * up for gate and up in x (..., 2, F); silu(x) = x sigmoid(x). https://arxiv.org/abs/2002.05202"""
    gate, up = x[..., 0, :], x[..., 1, :]
    return jax.nn.silu(gate) * up


@fast
def dropout(x, rate, key):
    """x / (1 - rate) where it is kept, which has the probability 1 - rate, else 0. Without a key, x."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def rotary_speeds(hs, theta, factor=1.0, context=8192):
    """How far each pair of channels, i and i + hs / 2, turns from one position to the next: theta^(-2 i / hs), an array
    (hs / 2,). With Llama 3's factor, pairs that turn less than once in `context` tokens turn so many times slower, and
    those that turn more than 4 times as before."""
    speeds = theta ** (-jnp.arange(0, hs, 2, dtype=jnp.float32) / hs)
    if factor != 1:
        fast = jnp.clip((speeds * context / (2 * math.pi) - 1) / (4 - 1), 0, 1)
        speeds *= fast + (1 - fast) / factor
    return speeds


def rotary_angles(pos, T, hs, theta, factor=1.0, context=8192):
    """Cosines and sines, (T, hs) each, of the angles at T positions from pos on (RoPE,
    https://arxiv.org/abs/2104.09864)."""
    angles = (pos + jnp.arange(T, dtype=jnp.float32))[:, None] * rotary_speeds(hs, theta, factor, context)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


@fast
def rotate(x, angles):
    """x (..., T, hs) with each pair (a, b) turned to (a cos - b sin, b cos + a sin), in float32. So the product of a
    query and a key depends on the distance of their positions. The roll by half the channels swaps a and b."""
    cos, sin = angles
    x32 = x.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, x.shape[-1] // 2, -1) * sin).astype(x.dtype)


@fast
def attention(q, k, v, pos=0, rate=0.0, key=None, dtype='float32'):
    """dropout(softmax(q k' / sqrt(hs))) v, where no query sees a later key. The queries q (B, nh, T, hs) stand at
    positions pos, pos + 1, ..., the keys k and values v (B, nh, S, hs) at 0, 1, ...: in training S = T and pos = 0, and
    with a cache T = 1. The result is (B, nh, T, hs). What you change here is also what reads the cache. Where k and v
    have fewer heads, each is for a group of neighbors in q (grouped queries, https://arxiv.org/abs/2305.13245)."""
    q, k, v, result = q.astype(dtype), k.astype(dtype), v.astype(dtype), q.dtype
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))  # as many heads as q has
    t = pos + jnp.arange(q.shape[2])[:, None]  # where the queries stand
    s = jnp.arange(k.shape[2])  # where the keys stand
    scores = jnp.einsum('bhtd,bhsd->bhts', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(s <= t, scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(scores), rate, key)
    return jnp.einsum('bhts,bhsd->bhtd', probs.astype(dtype), v, preferred_element_type=result)


@fast
def attention_with_cache(q, k, v, cache, pos, dtype='float32'):
    """attention() of one token at position pos, for q, k, v (B, nh, 1, hs). Puts its key and value beside those of the
    tokens before it, in the cache, a pair of (B, nh, S, hs). Returns the result and the new cache."""
    k, v = (jax.lax.dynamic_update_slice(old, new, (0, 0, pos, 0)) for old, new in zip(cache, (k, v)))
    return attention(q, k, v, pos, dtype=dtype), (k, v)


@fast
def cross_entropy(logits, targets, learned=None):
    """The mean of -log softmax(logits)[target], in float32: logits (..., V), targets (...). Where `learned` (...) is
    False, a target counts as 0."""
    logits = logits.astype(jnp.float32)
    # compare, do not look up: the gradient of a lookup is a scatter, which chips are slow at
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logits = jnp.where(is_target, logits, 0).sum(-1)
    losses = jax.nn.logsumexp(logits, -1) - target_logits
    return (losses if learned is None else losses * learned).mean()


def split_key(key, n):
    """n random keys from one, or n times None where there is no key."""
    return [None] * n if key is None else jax.random.split(key, n)


# -----------------------------------------------------------------------------
# layers


def init_table(config):
    """The initial value of every parameter: a standard deviation of 0.02, as in GPT-2, and for projections into the
    residual stream 0.02 / sqrt(2 n_layer). LoRA's B is zero, so the adapters add nothing at first."""
    return {'weight': nnx.initializers.normal(0.02),
            'residual': nnx.initializers.normal(0.02 / math.sqrt(2 * config.n_layer)),
            'scale': nnx.initializers.ones,
            'bias': nnx.initializers.zeros,
            'lora_A': nnx.initializers.lecun_normal(),
            'lora_B': nnx.initializers.zeros}


class Norm(nnx.Module):
    """LayerNorm with an optional bias, or RMSNorm without one, over n channels."""

    def __init__(self, kind, n, config, rngs):
        init = init_table(config)
        self.kind, self.config = kind, config
        self.eps = config.norm_eps or {'layer': 1e-5, 'rms': 1e-6}[kind]
        self.weight = nnx.Param(init['scale'](rngs.params(), (n,)))
        self.bias = nnx.Param(init['bias'](rngs.params(), (n,))) if config.bias and kind == 'layer' else None

    def __call__(self, x):
        if self.kind == 'rms':
            return rms_norm(x, self.weight[...], self.eps, kernels=self.config.kernels)
        bias = None if self.bias is None else self.bias[...]
        return layer_norm(x, self.weight[...], bias, self.eps, kernels=self.config.kernels)


class Linear(nnx.Module):
    """x @ weight + bias, (..., in) to (..., *out). The weight is (in, *out), as in GPT-2's own files. With LoRA, x @ A
    @ B is added, where A is (in, rank) and B is (rank, *out): https://arxiv.org/abs/2106.09685."""

    def __init__(self, shape, config, rngs, kind='weight', bias=False):
        init = init_table(config)
        self.config = config
        self.weight = nnx.Param(init[kind](rngs.params(), shape))
        self.bias = nnx.Param(init['bias'](rngs.params(), shape[1:])) if config.bias or bias else None
        if rank := config.lora_rank:
            self.lora_A = nnx.Param(init['lora_A'](rngs.params(), (shape[0], rank)))
            self.lora_B = nnx.Param(init['lora_B'](rngs.params(), (rank, *shape[1:])))

    def __call__(self, x):
        config = self.config
        bias = None if self.bias is None else self.bias[...]
        y = linear(x, self.weight[...], bias, config.dtype, kernels=config.kernels)
        if config.lora_rank:
            A, B = self.lora_A[...].astype(x.dtype), self.lora_B[...].astype(x.dtype)
            y += config.lora_alpha / config.lora_rank * jnp.tensordot(x @ A, B, 1)
        return y


class CausalSelfAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        C, q, bias = config.n_embd, config.n_head * config.head_size, config.row['qkv_bias']
        kv = config.n_kv_head * config.head_size or q
        self.grouped = kv < q
        if self.grouped:
            self.c_q = Linear((C, q), config, rngs, bias=bias)
            self.c_kv = Linear((C, 2, kv), config, rngs, bias=bias)
        else:
            self.c_attn = Linear((C, 3, q), config, rngs, bias=bias)  # query, key and value for all heads
        self.c_proj = Linear((q, C), config, rngs, 'residual')
        if config.row['qk_norm']:
            self.q_norm = Norm('rms', config.head_size, config, rngs)
            self.k_norm = Norm('rms', config.head_size, config, rngs)

    def __call__(self, x, key=None, cache=None, pos=0, angles=None):
        config, (B, T, _) = self.config, x.shape
        attn_key, resid_key = split_key(key, 2)
        if self.grouped:
            q, (k, v) = self.c_q(x), jnp.split(self.c_kv(x), 2, 2)
        else:
            q, k, v = jnp.split(self.c_attn(x), 3, 2)
        q, k, v = (a.reshape(B, T, -1, config.head_size).swapaxes(1, 2) for a in (q, k, v))  # (B, nh, T, hs) each
        if config.row['qk_norm']:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = (rotate(a, angles, kernels=config.kernels) for a in (q, k))
        if cache is None:
            rate = 0.0 if key is None else config.dropout
            y = attention(q, k, v, 0, rate, attn_key, config.dtype, kernels=config.kernels)
        else:
            y, (k, v) = attention_with_cache(q, k, v, cache, pos, config.dtype, kernels=config.kernels)
        y = y.transpose(0, 2, 1, 3).reshape(B, T, -1)  # all heads side by side again
        return dropout(self.c_proj(y), config.dropout, resid_key, kernels=config.kernels), (k, v)


class MLP(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        C, gated = config.n_embd, config.row['mlp'] == 'swiglu'
        # SwiGLU has two matrices side by side, of which one is a gate for the other
        self.c_fc = Linear((C, 2, config.mlp_width) if gated else (C, config.mlp_width), config, rngs)
        self.c_proj = Linear((config.mlp_width, C), config, rngs, 'residual')

    def __call__(self, x, key=None):
        config = self.config
        act = swiglu if config.row['mlp'] == 'swiglu' else gelu
        x = self.c_proj(act(self.c_fc(x), kernels=config.kernels))
        return dropout(x, config.dropout, key, kernels=config.kernels)


class Block(nnx.Module):
    def __init__(self, config, rngs):
        self.ln_1 = Norm(config.row['norm'], config.n_embd, config, rngs)
        self.attn = CausalSelfAttention(config, rngs)
        self.ln_2 = Norm(config.row['norm'], config.n_embd, config, rngs)
        self.mlp = MLP(config, rngs)

    @jax.jit  # JAX traces it once for all layers; `self` can be an argument, since a module is a pytree of parameters
    def __call__(self, x, key=None, cache=None, pos=0, angles=None):
        attn_key, mlp_key = split_key(key, 2)
        y, cache = self.attn(self.ln_1(x), attn_key, cache, pos, angles)
        x = x + y
        x = x + self.mlp(self.ln_2(x), mlp_key)
        return x, cache


class Embedding(nnx.Module):
    def __init__(self, n, config, rngs):
        self.weight = nnx.Param(init_table(config)['weight'](rngs.params(), (n, config.n_embd)))


class GPT(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.wte = Embedding(config.vocab_size, config, rngs)  # tokens; if tied, also the output layer
        if config.row['positions'] == 'learned':
            self.wpe = Embedding(config.block_size, config, rngs)
        self.h = nnx.List([Block(config, rngs) for _ in range(config.n_layer)])
        self.ln_f = Norm(config.row['norm'], config.n_embd, config, rngs)
        if not config.tied:
            self.lm_head = Embedding(config.vocab_size, config, rngs)

    def features(self, idx, key=None, cache=None, pos=0):
        """Final features (B, T, C) of the tokens idx (B, T), and each layer's keys and values, a list of pairs (B, nh,
        T, hs). A key turns dropout on. With such a list for S positions as the cache, idx is one token (B, 1) at
        position pos, which sees the tokens before it; the list that is returned includes it."""
        config, T = self.config, idx.shape[1]
        keys = split_key(key, 1 + config.n_layer)
        x, angles = self.wte.weight[...][idx].astype(jnp.float32), None
        if config.row['positions'] == 'learned':
            x += jax.lax.dynamic_slice_in_dim(self.wpe.weight[...], pos, T)
        else:
            angles = rotary_angles(pos, T, config.head_size, config.rope_theta, config.rope_factor, config.rope_context)
        x = dropout(x.astype(config.activation_dtype), config.dropout, keys[0], kernels=config.kernels)
        new_cache = []
        for i, block in enumerate(self.h):
            if config.remat and cache is None:
                block = jax.checkpoint(block)
            x, layer_cache = block(x, keys[1 + i], None if cache is None else cache[i], pos, angles)
            new_cache.append(layer_cache)
        return self.ln_f(x), new_cache

    def head(self, x):
        """Logits (..., V) of features x (..., C)."""
        output = self.wte if self.config.tied else self.lm_head
        return unembed(x, output.weight[...], self.config.dtype, kernels=self.config.kernels)

    def __call__(self, idx, key=None):
        """Logits (B, T, V) for tokens idx (B, T). A key turns dropout on."""
        return self.head(self.features(idx, key)[0])

    def loss(self, tokens, key=None, parts=1):
        """The mean loss of predicting tokens[:, 1:] from tokens[:, :-1], for tokens (B, T + 1). A negative token, ~id,
        is read, and to predict it counts as 0. The blocks see the batch in so many independent parts, each with dropout
        of its own (step.py's batch_loss says why)."""
        learned = None
        if jnp.issubdtype(tokens.dtype, jnp.signedinteger):
            learned, tokens = tokens[:, 1:] >= 0, jnp.maximum(tokens, ~tokens)
        tokens = tokens.astype(jnp.int32)
        keys = [key if key is None else jax.random.fold_in(key, i) for i in range(parts)]
        idx, targets = jnp.array_split(tokens[:, :-1], parts), tokens[:, 1:]
        x = jnp.concatenate([self.features(part, key)[0] for part, key in zip(idx, keys)])
        loss = functools.partial(cross_entropy, kernels=self.config.kernels)
        n = self.config.loss_chunks
        if n == 1:
            return loss(self.head(x), targets, learned)
        # one chunk's logits exist at a time; the backward pass computes them again
        chunk_loss = jax.checkpoint(lambda chunk: loss(self.head(chunk[0]), *chunk[1:]))
        chunks = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[2:]), (x, targets, learned))
        return jax.lax.map(chunk_loss, chunks).mean()

    @jax.jit
    def next_logits(self, window, n):
        """Logits (B, V) of the token after the first n of the window (B, T)."""
        return self.head(self.features(window)[0][:, n - 1])

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, *, seed=0, n_vocab=None):
        """The prompts idx (B, T) with max_new_tokens more tokens each, of which all are below n_vocab. Computes the
        whole context anew for every token, as nanoGPT does; engine.py writes the same much faster."""
        idx, T = jnp.asarray(idx, jnp.int32), self.config.block_size
        for i in range(max_new_tokens):
            n = min(idx.shape[1], T)
            window = jnp.pad(idx[:, -T:], ((0, 0), (0, T - n)))  # always as long, so that it compiles once
            key = jax.random.fold_in(jax.random.key(seed), i)
            token = sample_token(self.next_logits(window, n)[:, :n_vocab], key, temperature, top_k, top_p)
            idx = jnp.concatenate([idx, token[:, None]], 1)
        return idx


def sample_token(logits, key, temperature, top_k, top_p):
    """One token for each row of logits (B, V). Keeps the top_k likeliest, then the fewest of these that reach
    probability top_p together."""
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    V, ids = logits.shape[-1], None
    logits = logits.astype(jnp.float32) / temperature
    if top_p < 1 or (top_k and top_k < V):
        logits, ids = jax.lax.top_k(logits, min(top_k or V, V))  # sorted, the likeliest first
    if top_p < 1:
        probs = jax.nn.softmax(logits, -1)
        logits = jnp.where(jnp.cumsum(probs, -1) - probs < top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits, -1)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], -1)[:, 0]


# -----------------------------------------------------------------------------
# A model is a GPTConfig and a nested dict of arrays, named as in GPT-2: params['h'][0]['attn']['c_attn']...


def init_params(config, seed):
    """New parameters, float32."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed)), nnx.Param))


@functools.cache
def graphdef(config):
    """The model without its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


def build(config, params):
    """The model with these parameters."""
    return nnx.merge(graphdef(config), params)


def params_of(model):
    """The parameters of a model, as a nested dict."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
