"""
The optimizers and the schedule of the learning rate. To add one, write an optax.GradientTransformation and name it in
OPTIMIZERS: `optax.scale_by_lion(beta1, beta2)` is all that Lion needs.

Updates come without the learning rate, which train_step multiplies in.
"""
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P


def make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer='adamw', embd_lr_scale=1.0):
    """Clips gradients at a global norm (0: not), then optimizes, then adds weight decay, to matrices alone. The token
    embedding's update is embd_lr_scale times as large. The update of the result takes two more arguments: norm, of the
    gradients, and setup, a Setup of step.py. Raises ValueError."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f'optimizer = {optimizer!r}: must be {" or ".join(map(repr, OPTIMIZERS))}')
    is_matrix = lambda path, x: path[-1].key != 'bias' and x.ndim >= 2
    matrices = lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)
    scaled = lambda path, update: embd_lr_scale * update if path[0].key == 'wte' else update
    decay = optax.add_decayed_weights(weight_decay, matrices)

    def decay_and_scale(updates, state, params):
        updates, state = decay.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.chain(
        clip_by_norm(grad_clip) if grad_clip else optax.identity(),
        OPTIMIZERS[optimizer](beta1, beta2),
        optax.GradientTransformation(decay.init, decay_and_scale))


def clip_by_norm(max_norm):
    """Scales gradients down to this global norm. Like optax.clip_by_global_norm, but train_step tells the norm: to
    compute it again would read all gradients once more."""
    def update(grads, state, params=None, *, norm, **more):
        return jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def get_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr, schedule='cosine'):
    """The learning rate of iteration `it`: linear warm-up, then down to min_lr, along a cosine (nanoGPT's formula) or
    with the schedule 'linear' along a straight line."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / max(lr_decay_iters - warmup_iters, 1)
    left = 1 - decay_ratio if schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * decay_ratio))
    return min_lr + left * (learning_rate - min_lr)


# -----------------------------------------------------------------------------
# Muon: https://kellerjordan.github.io/posts/muon


def muon_and_adamw(beta1, beta2):
    """Muon for the matrices of the blocks, AdamW for the rest: embeddings, norms, biases and LoRA's adapters."""
    def choose(path, x):
        return 'muon' if path[0].key == 'h' and path[-1].key == 'weight' and x.ndim >= 2 else 'adamw'

    return optax.partition({'adamw': optax.scale_by_adam(beta1, beta2), 'muon': muon(beta1, beta2)},
                           lambda params: jax.tree_util.tree_map_with_path(choose, params))


@functools.partial(jax.jit, static_argnames=('dtype', 'on_cpu'))  # JAX traces it once for all matrices of a shape
def orthogonalize(x, dtype, on_cpu=False):
    """x (m, n) with its singular values moved near 1, to between about 0.7 and 1.2, by four steps of Newton-Schulz,
    X <- (a + b S + c S^2) X for S = X X', in bfloat16 where the model multiplies in it. Where m > n, S = X' X is
    smaller and stands on the right."""
    dtype = 'bfloat16' if dtype == 'bfloat16' else 'float32'
    m, n = x.shape
    # CPUs multiply in bfloat16 only what lies row by row in memory, the rest in float32 (0.63). Without a jit around
    # the barrier, XLA casts some matrices twice (0.85)
    flip = lambda x: jax.jit(jax.lax.optimization_barrier)(x.T) if on_cpu and dtype == 'bfloat16' else x.T
    if on_cpu and m > n:
        return orthogonalize(flip(x), dtype, on_cpu).T
    out_dtype = 'float32' if on_cpu else dtype  # chips write and read half as much between the products
    product = lambda x, y: jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=out_dtype)
    times = lambda s, x: product(s, x) if m <= n else product(x, s)
    square = lambda x: times(x, flip(x.astype(dtype)))  # X X', or X' X
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.astype(out_dtype)
    s = square(x)
    # no singular value is larger than sqrt(|S|); the looser bound |X| would cost a step
    norm = jnp.sqrt(jnp.linalg.norm(s.astype('float32'))) + 1e-7
    x, s = (x / norm).astype(out_dtype), (s / norm**2).astype(out_dtype)
    for i in range(4):
        if i > 0:
            s = square(x)
        s = b * s + c * product(s, s)
        if on_cpu:
            x = a * x + times(s, x)
        else:  # S is at most as large as X, so chips add a to it, and X is written once
            x = times(a * jnp.eye(min(m, n), dtype=dtype) + s, x)
    return x


def muon(beta1, beta2):
    """1. Momentum beta1. 2. Orthogonalize each matrix, so that an update moves each direction as far; q, k, v are three
    matrices, gate and up are two. 3. Divide each column, which makes one output, by its root mean square, averaged over
    the updates with beta2 as in Adam (NorMuon, https://arxiv.org/abs/2510.05491). 4. Scale to a root mean square of
    0.2, which is about that of AdamW's update."""
    momentum = optax.trace(beta1, nesterov=True)
    init = lambda params: (momentum.init(params), jax.tree.map(lambda p: jnp.zeros(p.shape[1:]), params))
    matrices_of = lambda u: [u] if u.ndim == 2 else [u[:, i] for i in range(u.shape[1])]

    def scale(x, v):
        """Steps 3 and 4, for a weight (m, n) or (m, k, n) and its average v (n,) or (k, n)."""
        v = beta2 * v + (1 - beta2) * (x * x).mean(0)
        x = x / (jnp.sqrt(v) + 1e-8)
        return 0.2 * x / (jnp.sqrt((x * x).mean()) + 1e-8), v

    def update(grads, state, params=None, *, setup, **more):
        u, trace = momentum.update(grads, state[0])
        us, tree = jax.tree.flatten(u)
        vs = jax.tree.leaves(state[1])
        if setup.config.kernels == 'cpu':  # one matrix after the other is faster there
            for i, u in enumerate(us):
                x = jnp.stack([orthogonalize(matrix, setup.config.dtype, True) for matrix in matrices_of(u)], 1)
                us[i], vs[i] = scale(x.reshape(u.shape), vs[i])
            return tree.unflatten(us), (trace, tree.unflatten(vs))
        for shape in {u.shape: None for u in us}:  # elsewhere, all weights of a shape at once
            indices = [i for i, u in enumerate(us) if u.shape == shape]
            x = jnp.stack([matrix for i in indices for matrix in matrices_of(us[i])])
            x = orthogonalize_stack(x, setup).reshape(len(indices), -1, shape[0], shape[-1])
            x = x.swapaxes(1, 2).reshape(-1, *shape).astype('float32')
            for i, new_u, new_v in zip(indices, *jax.vmap(scale)(x, jnp.stack([vs[i] for i in indices]))):
                us[i], vs[i] = new_u, new_v
        return tree.unflatten(us), (trace, tree.unflatten(vs))

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalize_stack(x, setup):
    """orthogonalize() for a stack of matrices (N, m, n). On a mesh, each device does its part of the stack and sends
    the others what they need of the result."""
    turn = functools.partial(orthogonalize, dtype=setup.config.dtype, on_cpu=setup.config.kernels == 'cpus')
    if setup.mesh is None:
        return jax.vmap(turn)(x)
    divide = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(setup.mesh, P(*spec)))
    axes = setup.mesh.axis_names
    x = jax.vmap(turn)(divide(x, axes))
    # back to how step.py divides the optimizer's state, along the longer side
    return divide(x, None, axes) if x.shape[1] >= x.shape[2] else divide(x, None, None, axes)


OPTIMIZERS = {'adamw': optax.scale_by_adam, 'muon': muon_and_adamw}
