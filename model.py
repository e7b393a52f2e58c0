"""
The GPT: its layers, its loss, and how it writes text. Everything else is in another room.

Letters for dimensions, as in nanoGPT: B batch, T time (T <= block_size), C = n_embd, nh = n_head,
hs = C // nh, V = vocab_size; S is the length of the key-value cache.

References:
1) nanoGPT's model.py: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) OpenAI's GPT-2: https://github.com/openai/gpt-2/blob/master/src/model.py
3) the Qwen3 technical report: https://arxiv.org/abs/2505.09388
"""
import functools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

import ops


@dataclass(frozen=True)
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    arch: str = 'gpt2'  # the block: 'gpt2', or 'qwen3', which learns more from every token
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd in gpt2, about 8/3 n_embd in qwen3
    rope_theta: float = 10000.0  # qwen3: a higher one turns rotary positions more slowly
    dropout: float = 0.0
    bias: bool = False  # biases in Linears and LayerNorms, like GPT-2; False: a bit better and faster
    dtype: str = 'float32'  # matrices are multiplied in it; parameters, norms and loss are float32
    flash: bool = False  # cuDNN's FlashAttention, on NVIDIA GPUs
    remat: bool = False  # compute activations again in the backward pass instead of storing them
    loss_chunks: int = 1  # compute the logits of so many parts of the batch one after the other
    lora_rank: int = 0  # above 0, train only a product A B of this rank beside each matrix (LoRA)
    lora_alpha: float = 16.0  # A B is multiplied by lora_alpha / lora_rank
    cpus: int = 0  # how many CPU devices run this, 0 on GPUs and TPUs; no property of the model

    @property
    def one_cpu(self):
        return self.cpus == 1

    @property
    def mlp_width(self):
        swiglu = -(-8 * self.n_embd // 96) * 32  # 8/3 n_embd, rounded up to a multiple of 32
        return self.n_inner or {'gpt2': 4 * self.n_embd, 'qwen3': swiglu}[self.arch]

    @property
    def activation_dtype(self):
        """The type between matrices: on a CPU, XLA's bfloat16 code is fast only at matmul."""
        return 'float32' if self.cpus and self.dtype == 'bfloat16' else self.dtype

    @property
    def no_flash(self):
        """Why cuDNN's FlashAttention cannot compute this model, '' if it can."""
        head_size = self.n_embd // self.n_head
        can = self.dtype != 'float32' and not self.dropout and head_size in range(8, 129, 8)
        return '' if can else (f'dtype = {self.dtype}, dropout = {self.dropout}, n_embd / n_head = '
                               f'{head_size}: it wants 16 bits, 0, and a multiple of 8 up to 128')

    def __post_init__(self):
        lowest = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_inner=0, rope_theta=1,
                      loss_chunks=1)
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f'{name} = {getattr(self, name)}: must be at least {low}')
        if self.n_layer > 1000:  # each layer is compiled: nobody waits for so many
            raise ValueError(f'n_layer = {self.n_layer}: must be at most 1000')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}')
        if self.arch not in ('gpt2', 'qwen3'):
            raise ValueError(f"arch = {self.arch!r}: must be 'gpt2' or 'qwen3'")
        head_size = self.n_embd // self.n_head
        if self.arch == 'qwen3' and (self.bias or head_size % 2):
            raise ValueError(f"bias = {self.bias}, n_embd / n_head = {head_size}: arch = 'qwen3' has no "
                             'biases, and turns the channels of a head in pairs')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout}: must be at least 0 and below 1')
        if self.dtype not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f'dtype = {self.dtype!r}: must be float32, bfloat16 or float16')
        if self.block_size % self.loss_chunks:
            raise ValueError(f'loss_chunks = {self.loss_chunks}: must divide block_size = {self.block_size}')
        if self.flash and self.no_flash:
            raise ValueError(f'flash = True: cuDNN has no FlashAttention for {self.no_flash}')
        if not 0 <= self.lora_rank <= self.n_embd:
            raise ValueError(f'lora_rank = {self.lora_rank}: must be from 0 to n_embd = {self.n_embd}')
        if self.lora_alpha <= 0:
            raise ValueError(f'lora_alpha = {self.lora_alpha}: must be above 0')


def init_table(config):
    """The initial value of every parameter, as in GPT-2: projections into the residual stream start
    smaller, by the square root of their number. LoRA starts with B = 0, so that it changes nothing
    at first."""
    return {'weight': nnx.initializers.normal(0.02),
            'residual': nnx.initializers.normal(0.02 / math.sqrt(2 * config.n_layer)),
            'scale': nnx.initializers.ones,
            'bias': nnx.initializers.zeros,
            'lora_A': nnx.initializers.lecun_normal(),
            'lora_B': nnx.initializers.zeros}


class LayerNorm(nnx.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, config, rngs):
        init, shape = init_table(config), (config.n_embd,)
        self.weight = nnx.Param(init['scale'](rngs.params(), shape))
        self.bias = nnx.Param(init['bias'](rngs.params(), shape)) if config.bias else None

    def __call__(self, x):
        return ops.layer_norm(x, self.weight[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """LayerNorm without mean and bias, over n channels: qwen3's."""

    def __init__(self, config, rngs, n=None):
        self.weight = nnx.Param(init_table(config)['scale'](rngs.params(), (n or config.n_embd,)))

    def __call__(self, x):
        return ops.rms_norm(x, self.weight[...])


class Linear(nnx.Module):
    """x @ weight + bias, (..., in) to (..., *out). The weight is (in, *out), as in GPT-2's own
    files. With LoRA, x @ A @ B is added, where A is (in, rank) and B is (rank, *out)."""

    def __init__(self, shape, config, rngs, kind='weight'):
        init = init_table(config)
        self.config = config
        self.weight = nnx.Param(init[kind](rngs.params(), shape))
        self.bias = nnx.Param(init['bias'](rngs.params(), shape[1:])) if config.bias else None
        if rank := config.lora_rank:
            self.lora_A = nnx.Param(init['lora_A'](rngs.params(), (shape[0], rank)))
            self.lora_B = nnx.Param(init['lora_B'](rngs.params(), (rank, *shape[1:])))

    def __call__(self, x):
        config, bias = self.config, None if self.bias is None else self.bias[...]
        y = ops.linear(x, self.weight[...], bias, config.dtype, config.one_cpu)
        if config.lora_rank:
            A, B = self.lora_A[...].astype(x.dtype), self.lora_B[...].astype(x.dtype)
            y += config.lora_alpha / config.lora_rank * jnp.tensordot(x @ A, B, 1)
        return y


class CausalSelfAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        C = config.n_embd
        self.c_attn = Linear((C, 3, C), config, rngs)  # query, key and value for all heads
        self.c_proj = Linear((C, C), config, rngs, 'residual')
        if config.arch == 'qwen3':
            self.q_norm = RMSNorm(config, rngs, C // config.n_head)
            self.k_norm = RMSNorm(config, rngs, C // config.n_head)

    def __call__(self, x, key=None, cache=None, pos=0, angles=None):
        config, (B, T, C) = self.config, x.shape
        attn_key, resid_key = ops.split_key(key, 2)
        qkv = self.c_attn(x).reshape(B, T, 3, config.n_head, C // config.n_head)
        q, k, v = (a[:, :, 0].swapaxes(1, 2) for a in jnp.split(qkv, 3, 2))  # (B, nh, T, hs) each
        if config.arch == 'qwen3':
            q, k = ops.rotate(self.q_norm(q), angles), ops.rotate(self.k_norm(k), angles)
        if cache is not None:
            y, (k, v) = ops.attention_to_cache(q, k, v, cache, pos)
        elif config.flash:
            y = ops.flash_attention(q, k, v)
        else:
            rate = 0.0 if key is None else config.dropout
            y = ops.attention(q, k, v, rate, attn_key, config.dtype, config.one_cpu)
        y = y.transpose(0, 2, 1, 3).reshape(B, T, C)  # all heads side by side again
        return ops.dropout(self.c_proj(y), config.dropout, resid_key), (k, v)


class MLP(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        C = config.n_embd
        self.c_fc = Linear((C, config.mlp_width), config, rngs)
        self.c_proj = Linear((config.mlp_width, C), config, rngs, 'residual')

    def __call__(self, x, key=None):
        x = ops.gelu(self.c_fc(x))
        return ops.dropout(self.c_proj(x), self.config.dropout, key)


class SwiGLU(nnx.Module):
    """qwen3's MLP: two matrices side by side, of which one is a gate for the other."""

    def __init__(self, config, rngs):
        self.config = config
        C = config.n_embd
        self.c_fc = Linear((C, 2, config.mlp_width), config, rngs)  # gate and up
        self.c_proj = Linear((config.mlp_width, C), config, rngs, 'residual')

    def __call__(self, x, key=None):
        x = ops.swiglu(self.c_fc(x))
        return ops.dropout(self.c_proj(x), self.config.dropout, key)


NORM, FEED_FORWARD = {'gpt2': LayerNorm, 'qwen3': RMSNorm}, {'gpt2': MLP, 'qwen3': SwiGLU}


class Block(nnx.Module):
    def __init__(self, config, rngs):
        self.ln_1 = NORM[config.arch](config, rngs)
        self.attn = CausalSelfAttention(config, rngs)
        self.ln_2 = NORM[config.arch](config, rngs)
        self.mlp = FEED_FORWARD[config.arch](config, rngs)

    @jax.jit  # JAX traces it once for all layers
    def __call__(self, x, key=None, cache=None, pos=0, angles=None):
        attn_key, mlp_key = ops.split_key(key, 2)
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
        self.wte = Embedding(config.vocab_size, config, rngs)  # tokens; tied: also the output layer
        if config.arch == 'gpt2':
            self.wpe = Embedding(config.block_size, config, rngs)  # positions
        self.h = nnx.List([Block(config, rngs) for _ in range(config.n_layer)])
        self.ln_f = NORM[config.arch](config, rngs)

    def features(self, idx, key=None, cache=None, pos=0):
        """What the last block computes for the tokens idx (B, T), normalized: (B, T, C). And the
        keys and values of each layer, a list of pairs (B, nh, T, hs). A key turns dropout on.

        With such a list as the cache, for S positions, idx is a single token (B, 1) at position
        pos, which sees the pos tokens before it. The cache that is returned has this token in it,
        too."""
        config, T = self.config, idx.shape[1]
        keys = ops.split_key(key, 1 + config.n_layer)
        x, angles = self.wte.weight[...][idx], None
        if config.arch == 'gpt2':
            x += jax.lax.dynamic_slice_in_dim(self.wpe.weight[...], pos, T)
        else:
            angles = ops.rotary_angles(pos, T, config.n_embd // config.n_head, config.rope_theta)
        x = ops.dropout(x.astype(config.activation_dtype), config.dropout, keys[0])
        new_cache = []
        for i, block in enumerate(self.h):
            block = jax.checkpoint(block) if config.remat and cache is None else block
            x, layer_cache = block(x, keys[1 + i], cache and cache[i], pos, angles)
            new_cache.append(layer_cache)
        return self.ln_f(x), new_cache

    def head(self, x):
        """Logits (..., V) of features x (..., C)."""
        return ops.logits(x, self.wte.weight[...], self.config.dtype, self.config.one_cpu)

    def __call__(self, idx, key=None):
        """Logits (B, T, V) for tokens idx (B, T). A key turns dropout on."""
        return self.head(self.features(idx, key)[0])

    def loss(self, tokens, key=None, parts=1):
        """The mean loss of predicting tokens[:, 1:] from tokens[:, :-1], for tokens (B, T + 1). The
        blocks see the batch in so many independent parts, each with dropout of its own."""
        tokens = tokens.astype(jnp.int32)
        keys = [key if key is None else jax.random.fold_in(key, i) for i in range(parts)]
        idx, targets = jnp.array_split(tokens[:, :-1], parts), tokens[:, 1:]
        x = jnp.concatenate([self.features(part, key)[0] for part, key in zip(idx, keys)])
        n, C = self.config.loss_chunks, self.config.n_embd
        if n == 1:
            return ops.cross_entropy(self.head(x), targets)
        # one chunk's logits exist at a time; the backward pass computes them again
        chunk_loss = jax.checkpoint(lambda chunk: ops.cross_entropy(self.head(chunk[0]), chunk[1]))
        return jax.lax.map(chunk_loss, (x.reshape(n, -1, C), targets.reshape(n, -1))).mean()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, *, seed=0, **how):
        """generate(), below, as nanoGPT calls it. A seed takes the place of PyTorch's global one."""
        return generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k,
                        key=jax.random.key(seed), **how)

    @classmethod
    def from_pretrained(cls, name_or_directory, **changes):
        """'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a directory with a GPT-2 or a Qwen3, as
        Hugging Face has them. `changes` go into its GPTConfig: dropout, dtype, or a smaller
        block_size. Raises ValueError. For a run directory there is load_model() in rundir.py."""
        import hf
        fields, tensors = hf.open_pretrained(name_or_directory)
        hf.check_tensors(tensors, abstract_params(GPTConfig(**fields)), fields, name_or_directory)
        config = GPTConfig(**fields | changes)
        return build(config, hf.read_params(tensors, abstract_params(config), config.arch))


# -----------------------------------------------------------------------------
# A model is a GPTConfig and a nested dict of arrays, named as in GPT-2:
# params['h'][0]['attn']['c_attn']...


def init_params(config, seed):
    """New parameters, float32."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed)), nnx.Param))


def abstract_params(config):
    """The shapes of the parameters, without computing any."""
    return jax.eval_shape(lambda: init_params(config, 0))


@functools.cache
def graphdef(config):
    """The model without its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


def build(config, params):
    """The model with these parameters."""
    return nnx.merge(graphdef(config), params)


def num_params(params):
    """The number of parameters without position embeddings, as nanoGPT counts them."""
    positions = params['wpe']['weight'].size if 'wpe' in params else 0
    return sum(x.size for x in jax.tree.leaves(params)) - positions


def flops_per_token(config, n_params, n_frozen=0):
    """The FLOPs of a training step for each token (PaLM, appendix B): 6 for each parameter and 12 L
    C T for attention. Frozen parameters have no gradient of their own: 4."""
    return 6 * n_params - 2 * n_frozen + 12 * config.n_layer * config.n_embd * config.block_size


# -----------------------------------------------------------------------------
# writing text


def sample_token(logits, key, temperature, top_k, top_p):
    """One token for each row of logits (B, V). Keeps the top_k likeliest, then the fewest of these
    that reach probability top_p together."""
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


def decoding_params(params, config):
    """Parameters as decoding reads them: matrices in the model's dtype, as each token reads all."""
    return jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > 1 else x, params)


@functools.partial(jax.jit, static_argnames='config')
def prefill(params, window, config):
    """Each layer's key-value cache, a pair of (B, nh, S, hs), for the tokens window (B, S)."""
    return build(config, params).features(window)[1]


@functools.partial(jax.jit, static_argnames=('config', 'eot', 'n_vocab', 'how'),
                   donate_argnames=('window', 'cache'))
def decode(params, window, cache, done, pos, end, made, key, config, eot, n_vocab, how):
    """Writes window[:, pos:end], token by token, and fills the cache. Rows that are `done` (B,)
    have met the token `eot` and repeat it. `made` counts the tokens since the prompt: each has a
    random key of its own."""
    model = build(config, params)

    def write_token(carry):
        window, cache, done, pos, made = carry
        last = jax.lax.dynamic_slice_in_dim(window, pos - 1, 1, axis=1)
        x, cache = model.features(last, cache=cache, pos=pos - 1)
        logits = model.head(x[:, 0])[:, :n_vocab]
        token = sample_token(logits, jax.random.fold_in(key, made), *how).astype(window.dtype)
        if eot is not None:
            token = jnp.where(done, eot, token)
            done = done | (token == eot)
        window = jax.lax.dynamic_update_slice(window, token[:, None], (0, pos))
        return window, cache, done, pos + 1, made + 1

    not_yet = lambda carry: (carry[3] < end) & ~carry[2].all()
    return jax.lax.while_loop(not_yet, write_token, (window, cache, done, pos, made))


def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=1.0, key, eot=None,
           n_vocab=None, chunk=None):
    """Continues the prompts idx (B, T) and yields the new tokens as they are made, in arrays (B, <=
    chunk).

    A prompt longer than block_size is cut to its end. When the context is full, its last half
    becomes the new prompt. Stops early when every row has met the token `eot`. Only the first
    n_vocab tokens are used: the vocabulary may be padded."""
    # CPUs decode in float32: bfloat16 is slow for a single token
    config = replace(model.config, dtype=model.config.activation_dtype)
    params = decoding_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), config)
    B = idx.shape[0]
    idx = jnp.asarray(idx, jnp.int32)[:, -config.block_size:]
    done, made, n = jnp.zeros(B, bool), 0, idx.shape[1]
    # the cache is as long as needed, in steps of 64, so that similar prompts share a compilation
    S = min(config.block_size, -(-(n + max_new_tokens) // 64) * 64)
    while made < max_new_tokens:
        # the window holds S tokens of context and one more, which they lead to
        window = jnp.zeros((B, S + 1), jnp.int32).at[:, :n].set(idx)
        cache = prefill(params, window[:, :S], config)
        end = min(S + 1, n + max_new_tokens - made)
        while n < end:
            stop = min(n + (chunk or end), end)
            window, cache, done, pos, _ = decode(
                params, window, cache, done, n, stop, made, key, config, eot,
                n_vocab or config.vocab_size, (temperature, top_k, top_p))
            finished, pos = bool(done.all()), int(pos)
            yield window[:, n:pos]
            made, n = made + pos - n, pos
            if finished:
                return
        n = max(config.block_size // 2, 1)
        idx = window[:, S + 1 - n:]


def generate(model, idx, max_new_tokens, **how):
    """The prompts idx (B, T) with up to max_new_tokens more tokens; `how` as in stream()."""
    idx = jnp.asarray(idx, jnp.int32)
    return jnp.concatenate([idx, *stream(model, idx, max_new_tokens, **how)], axis=1)
