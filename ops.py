"""
The functions that the model is made of: our torch.nn.functional.

Each docstring states the plain maths, and test_model.py has it as plain code to compare with. The
bodies compute the same, faster or with less memory. A number such as (0.93) is what a trick brought:
the time of a step with it, where 1.00 is without it. BENCHMARKS.md has all of them.

Letters for dimensions, as in nanoGPT: B batch, T time (tokens), C = n_embd, nh = n_head,
hs = C // nh (head size), V = vocab_size, N = any leading dimensions, flattened. In decoding, S is the
length of the key-value cache.

Two arguments come up again and again:
dtype   the type in which matrices are multiplied; sums are float32, and the result has the type of x
one_cpu True where a single CPU runs this: some code is only for XLA's CPU compiler, or for one device
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

# The identity, but XLA does not mix the code before it with the code after it.
barrier = jax.lax.optimization_barrier


@functools.partial(jax.jit, static_argnames='one_cpu')  # a layout can only be set inside of jit
def row_major(x, one_cpu):
    """x. On a CPU its last dimension is contiguous in memory afterwards: XLA's fast matmul needs that,
    and its bfloat16 matmul takes nothing else (0.9)."""
    if one_cpu:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    # with several devices, XLA would gather x to constrain its layout: a barrier will do, a bit slower
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


def transpose(x, one_cpu):
    """x (..., m, n) as (..., n, m). On a CPU this is a copy in row-major order."""
    return row_major(x.swapaxes(-1, -2), one_cpu)


def after(x, y):
    """x, but not before y has been computed: adding 0 * y makes XLA wait, where it ignores a
    barrier."""
    return x + (0 * y).astype(x.dtype)


def split_key(key, n):
    """n random keys from one, or n times None where there is no key."""
    return [None] * n if key is None else jax.random.split(key, n)


# -----------------------------------------------------------------------------
# matrices


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x, w, dtype, one_cpu=False, transposed=False):
    """x @ w, for x (N, in) and w (in, *out); or x @ w.T, for w (out, in), if it is `transposed`."""
    return matmul_forward(x, w, dtype, one_cpu, transposed)[0]


def matmul_forward(x, w, dtype, one_cpu, transposed):
    result, x, w = x.dtype, x.astype(dtype), w.astype(dtype)
    return jnp.tensordot(x, w, (1, int(transposed)), preferred_element_type=result), (x, w)


def matmul_backward(dtype, one_cpu, transposed, saved, dy):
    """dx = dy @ w.T and dw = x.T @ dy. The transpose of x is a copy of its own, because XLA
    multiplies a matrix that lies transposed in memory slowly (0.93). The barrier keeps XLA from
    computing x once more for that."""
    result, ((x, w), dy) = dy.dtype, barrier((saved, dy.astype(dtype)))
    dy_dims, w_dims = [*range(1, dy.ndim)], [0] if transposed else [*range(1, w.ndim)]
    dx = jnp.tensordot(dy, w, (dy_dims, w_dims), preferred_element_type=result)
    left, right = (dy, x) if transposed else (x, dy)
    return dx, jnp.tensordot(transpose(left, one_cpu), right, 1, preferred_element_type=jnp.float32)


matmul.defvjp(matmul_forward, matmul_backward)


def one_row_matmul(x, w, dtype):
    """x @ w for a single row, x (1, in), 64 rows of w at a time: a CPU then reads w 1.2 times as
    fast."""
    x, w, result = x.astype(dtype), w.astype(dtype), x.dtype
    x, w_parts = x.reshape(-1, 64), w.reshape(-1, 64, w[0].size)
    parts = jnp.einsum('gk,gkn->gn', x, w_parts, preferred_element_type=result)
    return parts.sum(0).reshape(1, *w.shape[1:])


def linear(x, w, b=None, dtype='float32', one_cpu=False):
    """x @ w + b, for x (..., in), w (in, *out) and b (*out,): the result is (..., *out)."""
    rows = x.reshape(-1, len(w))  # XLA's CPU code multiplies 3-D arrays up to three times slower
    if one_cpu and len(rows) == 1 and len(w) % 64 == 0:
        y = one_row_matmul(rows, w, dtype)
    else:
        y = matmul(rows, w, dtype, one_cpu)
    y = y.reshape(*x.shape[:-1], *w.shape[1:])
    return y if b is None else y + b.astype(y.dtype)


def logits(x, w, dtype='float32', one_cpu=False):
    """x @ w.T, for x (..., C) and w (V, C): the result is (..., V)."""
    y = matmul(x.reshape(-1, x.shape[-1]), w, dtype, one_cpu, transposed=True)
    return y.reshape(*x.shape[:-1], len(w))


# -----------------------------------------------------------------------------
# between the matrices


@jax.custom_vjp
def normalize(x, w):
    """w * (x - mean) / sqrt(var + 1e-5), mean and variance over the last dimension: x (N, C), w
    (C,)."""
    return normalize_forward(x, w)[0]


def normalize_forward(x, w):
    x = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * rstd * w, (x * rstd, rstd, w)


def normalize_backward(saved, dy):
    """With y = x * rstd: dx = rstd * (dy w - mean(dy w) - y mean(dy w y)) and dw = sum(dy y). The
    means are products with w, which are faster than sums, and the barrier keeps dy y for both of
    its uses (0.93 together)."""
    y, rstd, w = saved
    dy_y = barrier(dy * y)
    mean_w = lambda a: (jnp.dot(a, w, precision='highest') / len(w))[:, None]  # the mean of a * w
    return rstd * (dy * w - mean_w(dy) - y * mean_w(dy_y)), dy_y.sum(0)


normalize.defvjp(normalize_forward, normalize_backward)


def layer_norm(x, w, b=None):
    """w * (x - mean) / sqrt(var + 1e-5) + b in float32, over the last dimension: x (..., C), w and
    b (C,)."""
    y = normalize(x.astype(jnp.float32).reshape(-1, len(w)), w).reshape(x.shape)
    return (y if b is None else y + b).astype(x.dtype)


@jax.custom_vjp
def rms_norm(x, w):
    """w * x / sqrt(mean(x^2) + 1e-6) in float32, over the last dimension: x (..., C), w (C,). Unlike
    layer_norm(), it does not flatten x: where heads are on several devices, that would gather them."""
    return rms_norm_forward(x, w)[0]


def rms_norm_forward(x, w):
    x, result = x.astype(jnp.float32), x.dtype
    rstd = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return (x * rstd * w).astype(result), (x * rstd, rstd, w)


def rms_norm_backward(saved, dy):
    """As normalize_backward(), but nothing comes from the mean of x."""
    y, rstd, w = saved
    dy, result = dy.astype(jnp.float32), dy.dtype
    dy_y = barrier(dy * y)
    mean = (jnp.dot(dy_y, w, precision='highest') / len(w))[..., None]
    return (rstd * (dy * w - y * mean)).astype(result), dy_y.sum([*range(dy.ndim - 1)])


rms_norm.defvjp(rms_norm_forward, rms_norm_backward)


@jax.checkpoint  # compute tanh again in the backward pass: a step needs 0.88 of the memory
def gelu(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), GPT-2's form."""
    return jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def swiglu(x):
    """silu(gate) * up, where silu(x) = x sigmoid(x) and x (..., 2, F) is the gate and up."""
    return swiglu_forward(x)[0]


def swiglu_forward(x):
    """Divides last. The next matrix needs the result twice, and XLA stores a quotient for that. A
    product it would compute again, inside a transposed copy, which is slow (0.95)."""
    gate, up = x[..., 0, :], x[..., 1, :]
    return gate * up / (1 + jnp.exp(-gate)), x


def swiglu_backward(x, dy):
    """Computes the sigmoid again. The barrier keeps XLA from computing both halves for each element
    that it puts beside each other (0.85)."""
    gate, up = x[..., 0, :], x[..., 1, :]
    s = jax.nn.sigmoid(gate)
    halves = barrier((dy * up * s * (1 + gate * (1 - s)), dy * gate * s))
    return (jnp.stack(halves, -2),)


swiglu.defvjp(swiglu_forward, swiglu_backward)


def keep_mask(key, rate, shape):
    """True where dropout keeps a value, with probability 1 - rate. Random numbers are what dropout
    costs, so each one of 32 bits decides for two values (0.83)."""
    bits = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*shape[:-1], -1)[..., :shape[-1]]
    return bits >= round(rate * 2**16)


def dropout(x, rate, key):
    """x / (1 - rate) where it is kept, else 0. Without a key, x."""
    if key is None or rate == 0:
        return x
    return jnp.where(keep_mask(key, rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def cross_entropy(logits, targets):
    """The mean of -log softmax(logits)[target], in float32: logits (..., V), targets (...)."""
    logits = logits.astype(jnp.float32)
    # to look the target up would scatter its gradient: on an H100, a step of 124M then needs 1.2
    # times the memory
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logits = jnp.where(is_target, logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - target_logits).mean()


# -----------------------------------------------------------------------------
# attention


def rotary_angles(pos, T, hs, theta):
    """The angles of T positions from pos on, as their cosines and sines, (T, hs) each: channels i
    and i + hs / 2 are a pair, which turns by theta^(-2 i / hs) from one position to the next."""
    speeds = theta ** (-jnp.arange(0, hs, 2, dtype=jnp.float32) / hs)
    angles = (pos + jnp.arange(T, dtype=jnp.float32))[:, None] * speeds
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return barrier((jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)))


def rotate(x, angles):
    """x (..., T, hs) with each pair (a, b) turned by its angle to (a cos - b sin, b cos + a sin), in
    float32: so q k' depends on the distance of their positions. The roll by half the channels
    brings b to a and a to b; it is faster than halves (0.88)."""
    cos, sin = angles
    x32 = x.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, x.shape[-1] // 2, -1) * sin).astype(x.dtype)


def causal_scores(q, k, first):
    """k q' / sqrt(hs), (B, nh, S, T) in float32, for queries q (B, nh, T, hs) at positions first,
    first + 1, ... and keys k (B, nh, S, hs) at positions 0, 1, ...: -1e30 where the key comes after
    the query."""
    scores = jnp.einsum('bhsd,bhtd->bhst', k, q, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2])[:, None] <= first + jnp.arange(q.shape[2])
    return jnp.where(visible, scores / math.sqrt(q.shape[-1]), -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5, 6, 7))
def attention(q, k, v, rate=0.0, key=None, dtype='float32', one_cpu=False, block=256):
    """dropout(softmax(q k' / sqrt(hs))) v, where no query sees a later key: q, k, v and the result
    are (B, nh, T, hs).

    It goes through the queries a block at a time and leaves out the keys that come after the block:
    for 1024 tokens that saves 3/8 of the work (0.8). Probabilities are stored as (B, nh, keys,
    queries), so that only k and v, which are small, have to be transposed (0.94)."""
    return attention_forward(q, k, v, rate, key, dtype, one_cpu, block)[0]


def stores_probs(T, rate, block):
    """Whether the probabilities are stored for the backward pass, which is faster where they are
    few (one block) or hold dropout's random choices. Otherwise they are computed again from their
    maxima, as in FlashAttention."""
    return rate > 0 or T <= block


def attention_forward(q, k, v, rate, key, dtype, one_cpu, block):
    result, T = q.dtype, q.shape[2]
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    vT, ys, sums, saved = transpose(v, one_cpu), [], [], []
    for t in range(0, T, block):
        scores = causal_scores(q[:, :, t:t + block], k[:, :, :t + block], t)
        highest = scores.max(-2, keepdims=True)
        # p is the softmax times its sum. We divide y by the sum instead, which has fewer elements
        # (0.96).
        p = jnp.exp(scores - highest).astype(dtype)
        sums.append(p.astype(jnp.float32).sum(-2))
        if rate:  # mark dropped entries with a minus sign: the backward pass still needs their size
            p = jnp.where(keep_mask(jax.random.fold_in(key, t), rate, p.shape), p, -p)
        saved.append(p if stores_probs(T, rate, block) else highest)
        kept = jnp.maximum(p, 0) if rate else p
        y = jnp.einsum('bhds,bhst->bhdt', vT[..., :t + block], kept, preferred_element_type=jnp.float32)
        ys.append(y)
    total = jnp.concatenate(sums, axis=-1) * (1 - rate)
    y = (jnp.concatenate(ys, axis=-1) / total[:, :, None]).astype(result)
    return barrier(y).swapaxes(2, 3), (q, k, v, total, saved)


def attention_backward(rate, dtype, one_cpu, block, saved, dy):
    """With p the probabilities and s the scores: dv = p' dy, dp = dy v', ds = p (dp - sum(p dp)),
    dq = ds k, dk = ds' q."""
    (q, k, v, total, saved), dy = barrier((saved, dy))
    result, T = dy.dtype, q.shape[2]
    if not stores_probs(T, rate, block):
        # otherwise XLA recomputes p already in the forward pass and keeps it until here
        q = after(q, dy[..., :1])
    dy = row_major((dy / total[..., None]).astype(dtype), one_cpu)
    kT, total, dq, dk, dv = transpose(k, one_cpu), total[:, :, None], [], None, None
    for i, part in reversed(list(enumerate(saved))):
        t, end = i * block, (i + 1) * block
        qt, kt, vt, dyt = q[:, :, t:end], k[:, :, :end], v[:, :, :end], dy[:, :, t:end]
        p = part if stores_probs(T, rate, block) else jnp.exp(causal_scores(qt, kt, t) - part)
        kept = jnp.maximum(p, 0) if rate else p
        ds = kept * jnp.einsum('bhsd,bhtd->bhst', vt, dyt, preferred_element_type=jnp.float32)
        ds -= jnp.abs(p) * (ds.sum(-2, keepdims=True) * (1 - rate) / total[..., t:end])
        kept, ds = kept.astype(dtype), (ds / math.sqrt(q.shape[-1])).astype(dtype)
        dq.append(jnp.einsum('bhds,bhst->bhdt', kT[..., :end], ds, preferred_element_type=result))
        dkt = jnp.einsum('bhst,bhtd->bhsd', ds, qt, preferred_element_type=result)
        dvt = jnp.einsum('bhst,bhtd->bhsd', kept, dyt, preferred_element_type=result)
        # the last block comes first and has all keys; the others add to the first of them
        dk = dkt if dk is None else dk.at[:, :, :end].add(dkt)
        dv = dvt if dv is None else dv.at[:, :, :end].add(dvt)
    return barrier(jnp.concatenate(dq[::-1], axis=-1)).swapaxes(2, 3), dk, dv, None


attention.defvjp(attention_forward, attention_backward)


def flash_attention(q, k, v):
    """The same without dropout, by cuDNN on an NVIDIA GPU."""
    def attend(*qkv):
        q, k, v = (a.swapaxes(1, 2) for a in qkv)  # cuDNN wants (B, T, nh, hs)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
        return y.swapaxes(1, 2)

    n = jax.sharding.get_abstract_mesh().shape.get('tensor')
    if n:  # inside a shard_map over the data axis, XLA cannot divide this call over another axis
        heads = P(None, 'tensor') if q.shape[1] % n == 0 else P()
        attend = jax.shard_map(attend, in_specs=heads, out_specs=heads, axis_names={'tensor'},
                               check_vma=False)
    return attend(q, k, v)


def attention_to_cache(q, k, v, cache, pos):
    """Attention of a single token at position pos, q, k and v (B, nh, 1, hs), to itself and to the
    pos tokens before it. Their keys and values are in the cache, a pair of (B, nh, S, hs). Returns
    the result, and the cache with the token in."""
    keys, values = cache
    past = jnp.einsum('bhtd,bhsd->bhts', q, keys)
    past = jnp.where(jnp.arange(keys.shape[2]) < pos, past, -1e30)
    scores = jnp.concatenate([past, jnp.einsum('bhtd,bhsd->bhts', q, k)], axis=-1)
    scores = scores.astype(jnp.float32) / math.sqrt(q.shape[-1])
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y = jnp.einsum('bhts,bhsd->bhtd', probs[..., :-1], values) + probs[..., -1:] * v
    # write after all reading is done: then XLA updates the cache in place, and does not copy it
    # (2.1 times as fast)
    write = lambda old, new: jax.lax.dynamic_update_slice(old, after(new, y), (0, 0, pos, 0))
    return y, (write(keys, k), write(values, v))
