"""
Some functions of model.py again, under the same names and with the same arguments, but faster or with less memory.

KERNELS, at the end, says which platform uses which: those that pay there, by BENCHMARKS.md's table. A kernel may return
NotImplemented for arguments that it was not made for, and then the plain function runs. It was made for the function
as it stands in model.py. Where somebody has edited that, or anything that it calls there, the kernel is not used.

A number such as (0.93) is what a trick brought: the time of a step with it, where 1.00 is without it. BENCHMARKS.md has
all of them. Letters for dimensions are model.py's; N is any leading dimensions, flattened.
"""
import ast
import functools
import hashlib
import inspect
import math
import textwrap

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

# The identity, but XLA does not mix the code before it with the code after it.
barrier = jax.lax.optimization_barrier

# -----------------------------------------------------------------------------
# CPUs: XLA's bfloat16 matmul wants rows that are contiguous in memory, and what is not a matmul should be read once


def row_major(x, one_cpu):
    """x, in bfloat16 laid out row by row on one CPU: XLA's matmul there takes nothing else (0.9). In float32 the copies
    cost more than they bring (1.05). On several CPUs XLA would gather x to constrain its layout: a barrier will do."""
    if x.dtype != jnp.bfloat16:
        return x
    if not one_cpu:
        return barrier(x)
    return jax.jit(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))))(x)  # works only inside a jit


def transpose(x, one_cpu):
    """x (..., m, n) as (..., n, m), in row-major order."""
    return row_major(x.swapaxes(-1, -2), one_cpu)


def multiply(x, w, dtype, one_cpu, transposed=False):
    """x @ w, for x (N, in) and w (in, *out); or x @ w.T, for w (out, in), if it is `transposed`."""
    if dtype != 'float32':
        return matmul(x, w, dtype, one_cpu, transposed)
    if transposed:
        return x @ w.T
    return (x @ w.reshape(len(w), -1)).reshape(-1, *w.shape[1:])  # with its own derivative XLA takes 0.8 of the time


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x, w, dtype, one_cpu, transposed):
    return matmul_forward(x, w, dtype, one_cpu, transposed)[0]


def matmul_forward(x, w, dtype, one_cpu, transposed):
    out_dtype, x, w = x.dtype, x.astype(dtype), w.astype(dtype)
    return jnp.tensordot(x, w, (1, int(transposed)), preferred_element_type=out_dtype), (x, w)


def matmul_backward(dtype, one_cpu, transposed, saved, dy):
    """dx = dy w', dw = x' dy. XLA multiplies a transposed view slowly, so x' is copied (0.93). The barrier keeps XLA
    from computing x once more for that copy."""
    out_dtype = dy.dtype
    (x, w), dy = barrier((saved, dy.astype(dtype)))
    dy_dims, w_dims = [*range(1, dy.ndim)], [0] if transposed else [*range(1, w.ndim)]
    dx = jnp.tensordot(dy, w, (dy_dims, w_dims), preferred_element_type=out_dtype)
    left, right = (dy, x) if transposed else (x, dy)
    return dx, jnp.tensordot(transpose(left, one_cpu), right, 1, preferred_element_type=jnp.float32)


matmul.defvjp(matmul_forward, matmul_backward)


def one_row_matmul(x, w, dtype):
    """x @ w for a single row, x (1, in), 64 rows of w at a time: a CPU then reads w 1.2 times as fast."""
    out_dtype = x.dtype
    x, w_parts = x.astype(dtype).reshape(-1, 64), w.astype(dtype).reshape(-1, 64, w[0].size)
    parts = jnp.einsum('gk,gkn->gn', x, w_parts, preferred_element_type=out_dtype)
    return parts.sum(0).reshape(1, *w.shape[1:])


def linear(x, weight, bias=None, dtype='float32', *, one_cpu):
    rows = x.reshape(-1, len(weight))  # XLA's CPU code multiplies 3-D arrays up to three times slower
    if one_cpu and len(rows) == 1 and len(weight) % 64 == 0:
        y = one_row_matmul(rows, weight, dtype)
    else:
        y = multiply(rows, weight, dtype, one_cpu)
    y = y.reshape(*x.shape[:-1], *weight.shape[1:])
    return y if bias is None else y + bias.astype(y.dtype)


def unembed(x, weight, dtype='float32', *, one_cpu):
    rows = x.reshape(-1, x.shape[-1])
    if one_cpu and len(rows) == 1:  # XLA's CPU code computes this on all cores, and x @ weight.T on one (0.9)
        y = jnp.dot(weight.astype(dtype), rows[0].astype(dtype), preferred_element_type=x.dtype)
    else:
        y = multiply(rows, weight, dtype, one_cpu, True)
    return y.reshape(*x.shape[:-1], len(weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize(x, w, eps):
    """w * (x - mean) / sqrt(var + eps): x (N, C), w (C,)."""
    return normalize_forward(x, w, eps)[0]


def normalize_forward(x, w, eps):
    x = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * rstd * w, (x * rstd, rstd, w)


def normalize_backward(eps, saved, dy):
    """With y = x * rstd: dx = rstd * (dy w - mean(dy w) - y mean(dy w y)) and dw = sum(dy y). The means are products
    with w, which are faster than sums, and the barrier keeps dy y for both of its uses (0.93 together)."""
    y, rstd, w = saved
    dy_y = barrier(dy * y)
    mean_w = lambda a: (jnp.dot(a, w, precision='highest') / len(w))[:, None]  # the mean of a * w
    return rstd * (dy * w - mean_w(dy) - y * mean_w(dy_y)), dy_y.sum(0)


normalize.defvjp(normalize_forward, normalize_backward)


def layer_norm(x, weight, bias, eps):
    y = normalize(x.astype(jnp.float32).reshape(-1, len(weight)), weight, eps).reshape(x.shape)
    return (y if bias is None else y + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, weight, eps):
    """Does not flatten x as layer_norm() does: on a mesh that would gather the heads."""
    return rms_norm_forward(x, weight, eps)[0]


def rms_norm_forward(x, w, eps):
    out_dtype, x = x.dtype, x.astype(jnp.float32)
    rstd = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    return (x * rstd * w).astype(out_dtype), (x * rstd, rstd, w)


def rms_norm_backward(eps, saved, dy):
    """As normalize_backward(), but nothing comes from the mean of x (0.64)."""
    y, rstd, w = saved
    out_dtype, dy = dy.dtype, dy.astype(jnp.float32)
    dy_y = barrier(dy * y)
    mean = (jnp.dot(dy_y, w, precision='highest') / len(w))[..., None]
    return (rstd * (dy * w - y * mean)).astype(out_dtype), dy_y.sum([*range(dy.ndim - 1)])


rms_norm.defvjp(rms_norm_forward, rms_norm_backward)


@jax.checkpoint  # compute tanh again in the backward pass: a step needs 0.88 of the memory
def gelu(x):
    return jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def swiglu(x):
    """Multiplies, then divides: XLA keeps a quotient for its two readers, but computes a product again (0.95)."""
    return swiglu_forward(x)[0]


def swiglu_forward(x):
    gate, up = x[..., 0, :], x[..., 1, :]
    return gate * up / (1 + jnp.exp(-gate)), x


def swiglu_backward(x, dy):
    """Computes the sigmoid again. Without the barrier, XLA computes both halves for each element of the stacked result
    (0.85)."""
    gate, up = x[..., 0, :], x[..., 1, :]
    s = jax.nn.sigmoid(gate)
    halves = barrier((dy * up * s * (1 + gate * (1 - s)), dy * gate * s))
    return (jnp.stack(halves, -2),)


swiglu.defvjp(swiglu_forward, swiglu_backward)


def keep_mask(key, rate, shape):
    """True where dropout keeps a value, with probability 1 - rate. Random numbers are what dropout costs, so each of 32
    bits decides for two values (0.83)."""
    bits = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*shape[:-1], -1)[..., :shape[-1]]
    return bits >= round(rate * 2**16)


def dropout(x, rate, key):
    if key is None or rate == 0:
        return x
    return jnp.where(keep_mask(key, rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


# -----------------------------------------------------------------------------
# GPUs: what is not a matmul takes as long as its bytes take to be read and written


def one_pass_layer_norm(x, weight, bias, eps):
    """The variance as mean(x^2) - mean(x)^2, which is Flax's default: XLA makes both sums where it adds to the residual
    stream, and does not write the normalized x in float32 for the gradient by weight (1.9 of 24.7 GB for 124M with
    12 x 1024 tokens)."""
    x32 = x.astype(jnp.float32)
    mean, square = x32.mean(-1, keepdims=True), (x32 * x32).mean(-1, keepdims=True)
    y = (x32 - mean) * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps) * weight
    return (y if bias is None else y + bias).astype(x.dtype)


@jax.custom_jvp
def logsumexp(x):
    """log(sum(exp(x))) over the last dimension, with the highest x and the sum in one pass."""
    def merge(a, b):
        (m, s), (n, t) = a, b  # of two parts: the highest x, and the sum of exp(x - highest)
        less = jnp.exp(-jnp.abs(m - n))
        return jnp.maximum(m, n), jnp.where(m > n, s + t * less, s * less + t)

    start = jnp.float32(-1e30), jnp.float32(0)
    highest, total = jax.lax.reduce((jnp.maximum(x, -1e30), jnp.ones_like(x)), start, merge, [x.ndim - 1])
    return highest + jnp.log(total)


@logsumexp.defjvp
def logsumexp_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = logsumexp(x)
    return y, (jnp.exp(x - y[..., None]) * dx).sum(-1)


def cross_entropy(logits, targets, learned=None):
    """Reads the logits once for logsumexp (1.2 of 24.7 GB)."""
    logits = logits.astype(jnp.float32)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = logsumexp(logits) - jnp.where(is_target, logits, 0).sum(-1)
    return (losses if learned is None else losses * learned).mean()


# -----------------------------------------------------------------------------
# attention in blocks of queries, by cuDNN, and by Pallas on TPUs


def after(x, y):
    """x, computed after y. XLA ignores a barrier here, but it may not drop 0 * y, since y could be NaN."""
    return x + (0 * y).astype(x.dtype)


def causal_scores(q, k, first):
    """Scores (B, nh, keys, queries) in float32, keys first, see blocks(): queries q (B, nh, T, hs) at positions first,
    first + 1, ..., keys k (B, nh, S, hs) at 0, 1, ...; -1e30 where the key comes after the query."""
    scores = jnp.einsum('bhsd,bhtd->bhst', k, q, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2])[:, None] <= first + jnp.arange(q.shape[2])
    return jnp.where(visible, scores / math.sqrt(q.shape[-1]), -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5, 6, 7))
def blocks(q, k, v, rate, key, dtype, layout, block=256):
    """Attention that goes through the queries a block at a time and leaves out the keys that come after the block: for
    1024 tokens that saves 3/8 of the work (0.8). Probabilities are stored as (B, nh, keys, queries), so that only k and
    v, which are small, have to be transposed (0.94). `layout(x)` is row_major() on CPUs."""
    return blocks_forward(q, k, v, rate, key, dtype, layout, block)[0]


def stores_probs(T, rate, block):
    """Whether the probabilities are stored for the backward pass, which is faster where they are few (one block) or
    hold dropout's random choices. Otherwise they are computed again from their maxima, as in FlashAttention
    (https://arxiv.org/abs/2205.14135)."""
    return rate > 0 or T <= block


def blocks_forward(q, k, v, rate, key, dtype, layout, block):
    out_dtype, T = q.dtype, q.shape[2]
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    vT, ys, sums, saved = layout(v.swapaxes(2, 3)), [], [], []
    for t in range(0, T, block):
        scores = causal_scores(q[:, :, t:t + block], k[:, :, :t + block], t)
        highest = scores.max(-2, keepdims=True)
        # p is the softmax times its sum. Divide y by the sum instead, which has fewer elements (0.96)
        p = jnp.exp(scores - highest).astype(dtype)
        sums.append(p.astype(jnp.float32).sum(-2))
        if rate:  # a dropped entry keeps its size and gets a minus sign: one array is both probability and mask
            p = jnp.where(keep_mask(jax.random.fold_in(key, t), rate, p.shape), p, -p)
        saved.append(p if stores_probs(T, rate, block) else highest)
        kept = jnp.maximum(p, 0) if rate else p
        y = jnp.einsum('bhds,bhst->bhdt', vT[..., :t + block], kept, preferred_element_type=jnp.float32)
        ys.append(y)
    total = jnp.concatenate(sums, axis=-1) * (1 - rate)
    y = (jnp.concatenate(ys, axis=-1) / total[:, :, None]).astype(out_dtype)
    return barrier(y).swapaxes(2, 3), (q, k, v, total, saved)


def blocks_backward(rate, dtype, layout, block, saved, dy):
    """With p the probabilities and s the scores: dv = p' dy, dp = dy v', ds = p (dp - sum(p dp)), dq = ds k,
    dk = ds' q."""
    (q, k, v, total, saved), dy = barrier((saved, dy))
    out_dtype, T = dy.dtype, q.shape[2]
    if not stores_probs(T, rate, block):  # make q depend on dy: else XLA computes p early and keeps it until here
        q = after(q, dy[..., :1])
    dy = layout((dy / total[..., None]).astype(dtype))
    kT, total, dq, dk, dv = layout(k.swapaxes(2, 3)), total[:, :, None], [], None, None
    for i, part in reversed(list(enumerate(saved))):
        t, end = i * block, (i + 1) * block
        qt, kt, vt, dyt = q[:, :, t:end], k[:, :, :end], v[:, :, :end], dy[:, :, t:end]
        p = part if stores_probs(T, rate, block) else jnp.exp(causal_scores(qt, kt, t) - part)
        kept = jnp.maximum(p, 0) if rate else p
        ds = kept * jnp.einsum('bhsd,bhtd->bhst', vt, dyt, preferred_element_type=jnp.float32)
        ds -= jnp.abs(p) * (ds.sum(-2, keepdims=True) * (1 - rate) / total[..., t:end])
        kept, ds = kept.astype(dtype), (ds / math.sqrt(q.shape[-1])).astype(dtype)
        dq.append(jnp.einsum('bhds,bhst->bhdt', kT[..., :end], ds, preferred_element_type=out_dtype))
        dkt = jnp.einsum('bhst,bhtd->bhsd', ds, qt, preferred_element_type=out_dtype)
        dvt = jnp.einsum('bhst,bhtd->bhsd', kept, dyt, preferred_element_type=out_dtype)
        # the last block comes first and has all keys; the others add to the first of them
        dk = dkt if dk is None else dk.at[:, :, :end].add(dkt)
        dv = dvt if dv is None else dv.at[:, :, :end].add(dvt)
    return barrier(jnp.concatenate(dq[::-1], axis=-1)).swapaxes(2, 3), dk, dv, None


blocks.defvjp(blocks_forward, blocks_backward)


def block_attention(q, k, v, pos=0, rate=0.0, key=None, dtype='float32', *, layout):
    if q.shape[2] != k.shape[2]:  # with a cache
        return NotImplemented
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    return blocks(q, k, v, rate, key, dtype, layout)


def attention_with_cache(q, k, v, cache, pos, dtype='float32'):
    """Reads the cache first and writes it last: then XLA's CPU code updates it in place, and does not copy it (2.1
    times as fast). The heads of q that share a key stand side by side in the place of T = 1, so it is read once."""
    (keys, values), shape = cache, q.shape
    q = q.reshape(*k.shape[:2], -1, shape[-1])
    past = jnp.einsum('bhtd,bhsd->bhts', q, keys)
    past = jnp.where(jnp.arange(keys.shape[2]) < pos, past, -1e30)
    scores = jnp.concatenate([past, jnp.einsum('bhtd,bhsd->bhts', q, k)], axis=-1)
    probs = jax.nn.softmax(scores.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    y = jnp.einsum('bhts,bhsd->bhtd', probs[..., :-1], values) + probs[..., -1:] * v
    write = lambda old, new: jax.lax.dynamic_update_slice(old, after(new, y[:, :, :1]), (0, 0, pos, 0))
    return y.reshape(shape), (write(keys, k), write(values, v))


def over_mesh(attend, q, k, v):
    """attend(q, k, v) by each device for its own sequences and heads. XLA does not divide what it cannot look into, so
    a shard_map has to, over those axes of the mesh over which none has yet."""
    mesh = jax.sharding.get_abstract_mesh()
    if axes := {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}:
        divided = lambda axis, n: axis if n % axes.get(axis, n + 1) == 0 else None
        parts = P(divided('data', q.shape[0]), divided('tensor', k.shape[1]))  # each group of heads stays together
        attend = jax.shard_map(attend, in_specs=parts, out_specs=parts, axis_names=set(axes), check_vma=False)
    return attend(q, k, v)


def cudnn_attention(q, k, v, pos=0, rate=0.0, key=None, dtype='float32'):
    """FlashAttention as cuDNN has it, on an NVIDIA GPU."""
    if q.shape[2] != k.shape[2] or rate or dtype == 'float32':
        return NotImplemented

    def attend(*qkv):
        q, k, v = (a.swapaxes(1, 2).astype(dtype) for a in qkv)  # cuDNN wants (B, T, nh, hs)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
        return y.swapaxes(1, 2)

    return over_mesh(attend, q, k, v).astype(q.dtype)


def splash_attention(q, k, v, pos=0, rate=0.0, key=None, dtype='float32', *, interpret=False):
    """FlashAttention as JAX has it for TPUs. With blocks(), a step of 4096 tokens needs 1.6 times the memory."""
    if q.shape[2] != k.shape[2] or rate or q.shape[2] % 128:
        return NotImplemented
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and mesh.shape['tensor'] > 1:  # libtpu aborts where XLA has divided only one of two axes
        return without_layout(q, k, v, pos, rate, key, dtype)
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a while, and only TPUs have it

    def attend(q, k, v):
        T, n = q.shape[2], math.gcd(q.shape[2], 512)  # the rows of a block of queries, and of a block of keys
        blocks = splash.BlockSizes(block_q=n, block_kv=n, block_q_dkv=n, block_kv_dkv=n, block_q_dq=n, block_kv_dq=n)
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * q.shape[1])
        attend_one = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                            interpret=interpret)
        return jax.vmap(attend_one)((q / math.sqrt(q.shape[-1])).astype(dtype), k.astype(dtype), v.astype(dtype))

    return over_mesh(attend, q, k, v).astype(q.dtype)


# -----------------------------------------------------------------------------
# which platform uses which


def of_cpus(one_cpu):
    layout = functools.partial(row_major, one_cpu=one_cpu)
    return {'linear': functools.partial(linear, one_cpu=one_cpu),
            'unembed': functools.partial(unembed, one_cpu=one_cpu),
            'layer_norm': layer_norm, 'rms_norm': rms_norm, 'gelu': gelu, 'swiglu': swiglu, 'dropout': dropout,
            'attention': functools.partial(block_attention, layout=layout),
            'attention_with_cache': attention_with_cache}


without_layout = functools.partial(block_attention, layout=lambda x: x)
GPU = {'layer_norm': one_pass_layer_norm, 'gelu': gelu, 'cross_entropy': cross_entropy, 'attention': without_layout}
TPU = {'attention': without_layout}
KERNELS = {'plain': {}, 'cpu': of_cpus(one_cpu=True), 'cpus': of_cpus(one_cpu=False), 'gpu': GPU,
           'cudnn': GPU | {'attention': cudnn_attention},
           'tpu': TPU, 'splash': TPU | {'attention': splash_attention}}

# What the kernels were made for: the fingerprint of each function in model.py. `python kernels.py` prints it. Change a
# line here only together with the kernels of that name.
MADE_FOR = {'linear': '773fbda027800a45',
            'unembed': '6c6fe1187e22cce2',
            'layer_norm': '9966ec7a577386df',
            'rms_norm': '3769a4a8e401bbc8',
            'gelu': '7ebe822ee050d2c4',
            'swiglu': '940ba8266f6688b1',
            'dropout': 'a60f7e5f51df0a4a',
            'attention': 'd20bcb1abc4ce613',
            'attention_with_cache': '5f3eefe911c2dd5c',
            'cross_entropy': '08483651a077bcb2'}
GENERATE = '2b498cdc0682b033'  # the same of GPT.generate, whose text engine.py writes faster


@functools.cache
def fingerprint(plain, follow=True):
    """A hash of what a function computes: of its code without comments and docstrings, and, if told to follow, of all
    that it calls in the same file. '' where Python has no source for it."""
    functions, parts = [plain], []
    try:
        for function in functions:  # grows meanwhile
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            if ast.get_docstring(tree) is not None:
                tree.body = tree.body[1:]
            tree.decorator_list = [d for d in tree.decorator_list if ast.unparse(d) != 'fast']
            parts.append(ast.unparse(tree))
            names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
            called = [inspect.unwrap(function.__globals__.get(name)) for name in names]
            functions += [f for f in called if follow and inspect.isfunction(f) and f not in functions
                          and f.__module__ == plain.__module__]
    except (OSError, TypeError, SyntaxError):
        return ''
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def kernel_for(plain, kernels):
    """The kernel for a function of model.py in a set of KERNELS; the function itself where there is none, or where the
    function was edited."""
    kernel = KERNELS[kernels].get(plain.__name__)
    return kernel if kernel and fingerprint(plain) == MADE_FOR[plain.__name__] else plain


def edited(kernels):
    """The names of the functions whose kernels, in a set of KERNELS, are not used, because they were edited."""
    import model
    plain = lambda name: inspect.unwrap(getattr(model, name, None))
    return [name for name in KERNELS[kernels] if fingerprint(plain(name)) != MADE_FOR[name]]


def edited_generate(GPT):
    """Whether somebody has edited a model's generate(). Then it writes the text, and engine.py does not."""
    return fingerprint(GPT.generate, follow=False) != GENERATE


if __name__ == '__main__':
    import model
    for name in dict.fromkeys(name for names in KERNELS.values() for name in names):
        print(f"            '{name}': '{fingerprint(inspect.unwrap(getattr(model, name)))}',")
    print(f"GENERATE = '{fingerprint(model.GPT.generate, follow=False)}'")
