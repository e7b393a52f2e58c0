"""
One training step on any mesh: optimizer, state, LoRA, sharding, gradient, train_step, eval_step.

Letters: G micro-batches of B sequences in a step, T tokens in a sequence.
"""
import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

from devices import compile_for, no_flash, peak_flops
from model import build, flops_per_token, init_params
from ops import transpose

# -----------------------------------------------------------------------------
# optimizer and state


def make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer='adamw', dtype='float32'):
    """AdamW with gradients clipped at a global norm (0: not clipped). Only matrices decay, biases
    and norms do not. The learning rate is missing: train_step multiplies it in. The optimizer
    'muon' is Muon for the matrices of the blocks, multiplied in `dtype`, and AdamW for the rest."""
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f"optimizer = {optimizer!r}: must be 'adamw' or 'muon'")
    adam = optax.scale_by_adam(beta1, beta2)
    is_matrix = lambda path, x: path[-1].key != 'bias' and x.ndim >= 2
    matrices = lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)
    return optax.chain(
        clip_by_norm(grad_clip) if grad_clip else optax.identity(),
        adam if optimizer == 'adamw' else optax.partition(
            {'adamw': adam, 'muon': muon(beta1, beta2, dtype)}, which_optimizer),
        optax.add_decayed_weights(weight_decay, matrices))


def clip_by_norm(max_norm):
    """Scales gradients down to this global norm. Like optax.clip_by_global_norm, but train_step
    tells the norm: to compute it again would read all gradients once more."""
    def update(grads, state, params=None, *, norm, **more):
        return jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def which_optimizer(params):
    """A tree like params: 'muon' for the matrices of the blocks. LoRA's adapters stay with AdamW."""
    def choose(path, x):
        return 'muon' if path[0].key == 'h' and path[-1].key == 'weight' and x.ndim >= 2 else 'adamw'
    return jax.tree_util.tree_map_with_path(choose, params)


@functools.partial(jax.jit, static_argnames='dtype')  # JAX traces it once for all matrices of a shape
def orthogonalize(x, dtype):
    """x (m, n) with its singular values moved near 1, to between about 0.7 and 1.2, by four steps of
    Newton-Schulz, X <- a X + b (X X') X + c (X X')^2 X, in bfloat16 where the model multiplies in it."""
    dtype = 'bfloat16' if dtype == 'bfloat16' else 'float32'
    # CPUs multiply in bfloat16 only what lies row by row in memory, the rest in float32 (0.63)
    T = (lambda x: transpose(x, one_cpu=False)) if dtype == 'bfloat16' else jnp.transpose
    if len(x) > x.shape[1]:
        return orthogonalize(T(x), dtype).T
    product = lambda x, y: jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
    gram = lambda x: product(x, T(x.astype(dtype)))
    a, b, c = 3.4445, -4.7750, 2.0315  # https://kellerjordan.github.io/posts/muon
    xx = gram(x)
    # All singular values are at most sqrt(|X X'|). This bound is closer than |X|, which saves a step
    norm = jnp.sqrt(jnp.linalg.norm(xx)) + 1e-7
    x, xx = x / norm, xx / norm**2
    for _ in range(4):
        x = a * x + product(b * xx + c * product(xx, xx), x)
        xx = gram(x)  # XLA leaves out the last one
    return x


def muon(beta1, beta2, dtype):
    """Muon: momentum beta1, orthogonalized, so that an update moves each direction as far. Query, key
    and value are three matrices to it, and gate and up are two. Then each column, which makes one
    output, is divided by its root mean square, averaged over the updates with beta2 as in Adam (NorMuon,
    https://arxiv.org/abs/2510.05491). The matrix ends with one of 0.2, which is about AdamW's."""
    momentum = optax.trace(beta1, nesterov=True)
    init = lambda params: (momentum.init(params), jax.tree.map(lambda p: jnp.zeros(p.shape[1:]), params))

    def direction(u):
        matrices = [u] if u.ndim == 2 else [u[:, i] for i in range(u.shape[1])]
        return jnp.stack([orthogonalize(x, dtype) for x in matrices], 1).reshape(u.shape)

    def update(grads, state, params=None):
        u, trace = momentum.update(grads, state[0])
        u = jax.tree.map(direction, u)
        v = jax.tree.map(lambda v, u: beta2 * v + (1 - beta2) * (u * u).mean(0), state[1], u)
        u = jax.tree.map(lambda u, v: u / (jnp.sqrt(v) + 1e-8), u, v)
        return jax.tree.map(lambda u: 0.2 * u / (jnp.sqrt((u * u).mean()) + 1e-8), u), (trace, v)

    return optax.GradientTransformation(init, update)


def get_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr, schedule='cosine'):
    """The learning rate of iteration `it`: linear warm-up, then down to min_lr, along a cosine
    (nanoGPT's formula) or with the schedule 'linear' along a straight line."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / max(lr_decay_iters - warmup_iters, 1)
    left = 1 - decay_ratio if schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * decay_ratio))
    return min_lr + left * (learning_rate - min_lr)


def init_state(config, tx, seed):
    """What a checkpoint holds: parameters, optimizer state, counters of steps and of skipped
    updates, and the loss scale, which only float16 needs. `base` holds the parameters that LoRA
    freezes, {} without LoRA."""
    params, base = split_lora(init_params(config, seed), config)
    counters = 'step', 'skipped', 'skipped_in_a_row', 'scale_age'
    return {'params': params, 'base': base, 'opt_state': tx.init(params),
            'loss_scale': jnp.float32(2**15 if config.dtype == 'float16' else 1),
            **{name: jnp.zeros((), jnp.int32) for name in counters}}


def all_params(state):
    return join_lora(state['params'], state['base'])


def estimate_mfu(config, n_params, n_frozen, tokens_per_second, devices):
    """Model FLOPs utilization, the share of the devices' peak; None where the peak is unknown."""
    peak = peak_flops(devices)
    return peak and flops_per_token(config, n_params, n_frozen) * tokens_per_second / peak


# -----------------------------------------------------------------------------
# LoRA: state['params'] are the adapters, which are trained, and state['base'] is the frozen rest


def split_lora(params, config):
    """(trained, frozen): with LoRA the adapters and the rest, without it everything and {}."""
    trained, frozen = {}, {}
    for path, x in flatten_mapping(params).items():
        is_trained = path[-1] in ('lora_A', 'lora_B') or not config.lora_rank
        (trained if is_trained else frozen)[path] = x
    return unflatten_mapping(trained), unflatten_mapping(frozen)


def join_lora(trained, frozen):
    """What split_lora() took apart."""
    if not frozen:
        return trained
    return unflatten_mapping(flatten_mapping(trained) | flatten_mapping(frozen))


def merge_lora(params, config):
    """Adds the adapters to the weights: the parameters of a model without LoRA that computes the
    same."""
    flat, merged = flatten_mapping(params), {}
    for path, x in flat.items():
        if path[-1] in ('lora_A', 'lora_B'):
            continue
        A, B = (flat.get((*path[:-1], name)) for name in ('lora_A', 'lora_B'))
        if path[-1] == 'weight' and A is not None:
            x += config.lora_alpha / config.lora_rank * jnp.tensordot(A, B, 1, precision='highest')
        merged[path] = x
    return unflatten_mapping(merged)


# -----------------------------------------------------------------------------
# sharding

# The dimension of each matrix that the tensor axis splits (Megatron-LM): the first matrix of
# attention and MLP by column and the second by row, so that each needs a single all-reduce, and the
# embedding by token. LoRA's A goes with a matrix that is split by row, its B with one that is split
# by column. All else is on every device.
TENSOR_SPLIT = {'wte': 0, 'attn.c_attn': -1, 'mlp.c_fc': -1, 'attn.c_proj': 0, 'mlp.c_proj': 0}


def shardings(state, mesh, fsdp=False):
    """The sharding of every array in a state, which may be abstract: Adam's moments like their
    parameters. fsdp splits the largest dimension that is left over the data axis, too."""
    n_data, n_tensor = mesh.shape['data'], mesh.shape['tensor']

    def sharding(path, x):
        names = [str(getattr(p, 'key', '')) for p in path]
        layer, spec = '.'.join(names[:-1]), [None] * x.ndim
        dim = next((d for suffix, d in TENSOR_SPLIT.items() if layer.endswith(suffix)), None)
        if dim is not None and names[-1] in (('weight', 'lora_A') if dim == 0 else ('weight', 'lora_B', 'bias')):
            if n_tensor > 1 and x.shape[dim] % n_tensor == 0:
                spec[dim] = 'tensor'
        free = [d for d in range(x.ndim) if spec[d] is None and x.shape[d] % n_data == 0]
        if fsdp and n_data > 1 and free:
            spec[max(free, key=lambda d: x.shape[d])] = 'data'
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(sharding, state)


def place(abstract, where):
    """Abstract arrays with these shardings."""
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, abstract, where)


def place_on(mesh, fsdp=False):
    """A function that gives abstract arrays their shardings on a mesh."""
    return lambda abstract: place(abstract, shardings(abstract, mesh, fsdp))


def place_on_one_device(abstract):
    """Abstract arrays on the first device."""
    return place(abstract, jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[0]), abstract))


def abstract_state(config, tx, mesh, fsdp=False):
    """The shapes and shardings of a state on a mesh."""
    return place_on(mesh, fsdp)(jax.eval_shape(lambda: init_state(config, tx, 0)))


def state_creator(config, tx, seed, abstract, leave_out=None):
    """A jitted function that creates a new state with the shardings of `abstract`: no device ever
    holds all of it. `leave_out` names an entry that will be read from a file."""
    only = lambda state: {name: x for name, x in state.items() if name != leave_out}
    where = jax.tree.map(lambda x: x.sharding, only(abstract))
    return jax.jit(lambda: only(init_state(config, tx, seed)), out_shardings=where)


def batch_sharding(mesh):
    """Of tokens (G, B, T + 1): each data-parallel group of devices has some of the B sequences."""
    return NamedSharding(mesh, P(None, 'data'))


# -----------------------------------------------------------------------------
# the gradient


def batch_loss(params, base, tokens, key, config):
    """The mean loss of tokens (B, T + 1). One CPU computes the batch as two independent halves:
    while one runs something serial, the other uses the idle core (0.92 and 0.85 of the time on two
    cores)."""
    halves = 2 if config.one_cpu and len(tokens) > 1 else 1
    return build(config, join_lora(params, base)).loss(tokens, key, halves)


def accumulate(loss_fn, params, base, tokens, key):
    """Loss and gradient by params, summed over the micro-batches tokens (G, B, T + 1)."""
    def micro_step(total, batch):
        i, tokens = batch
        micro_key = jax.random.fold_in(key, i)
        loss_and_grads = jax.value_and_grad(loss_fn)(params, base, tokens, micro_key)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(micro_step, zero, (jnp.arange(len(tokens)), tokens))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x, dim, dtype):
    """The whole of an array whose dimension `dim` is split over the data axis. It is sent in
    `dtype`."""
    return jax.lax.all_gather(x.astype(dtype), 'data', axis=dim, tiled=True).astype(x.dtype)


def all_gather_backward(dim, dtype, _, dy):
    """A reduce-scatter: it sums over the axis and splits again, in the type of the gradient."""
    return jax.lax.psum_scatter(dy, 'data', scatter_dimension=dim, tiled=True),


all_gather.defvjp(lambda x, dim, dtype: (all_gather(x, dim, dtype), None), all_gather_backward)


def gather_params(params, data_specs, tensor_specs, dtype):
    """Whole parameters from those that fsdp has split over the data axis. Matrices are sent in
    `dtype`, to which a matmul rounds them anyway. The nested shard_map keeps the split over the
    tensor axis."""
    def gather(x, data_spec, tensor_spec):
        if 'data' not in data_spec:
            return x
        sent = dtype if x.ndim > 1 else x.dtype
        whole = lambda x: all_gather(x, data_spec.index('data'), sent)
        return jax.shard_map(whole, in_specs=tensor_spec, out_specs=tensor_spec,
                             axis_names={'tensor'}, check_vma=False)(x)

    return jax.tree.map(gather, params, data_specs, tensor_specs)


def sharded_grads(loss_fn, params, base, tokens, key, dtype, mesh, fsdp):
    """accumulate() where the data axis has several groups of devices. Each group sums up the
    gradients of its own sequences, and only the result is summed over the groups: one all-reduce in
    an iteration, where GSPMD alone makes one in every micro-step. The tensor axis stays with
    GSPMD."""
    where = shardings((params, base), mesh, fsdp)
    only = lambda axis: lambda s: P(*(a if a == axis else None for a in s.spec))
    data_specs, tensor_specs = (jax.tree.map(only(axis), where) for axis in ('data', 'tensor'))

    def gathered_loss(params, base, tokens, key):
        # without the barrier, XLA gathers once for all micro-steps and keeps the whole parameters
        params, base, tokens = jax.lax.optimization_barrier((params, base, tokens))
        params, base = gather_params((params, base), data_specs, tensor_specs, dtype)
        return loss_fn(params, base, tokens, key)

    def group_grads(params, base, tokens, key):
        key = jax.random.fold_in(key, jax.lax.axis_index('data'))
        loss, grads = accumulate(gathered_loss if fsdp else loss_fn, params, base, tokens, key)
        add_up = lambda grad, spec: grad if 'data' in spec else jax.lax.psum(grad, 'data')
        return jax.lax.psum(loss, 'data'), jax.tree.map(add_up, grads, data_specs[0])

    over_groups = jax.shard_map(
        group_grads, mesh=mesh, in_specs=(*data_specs, P(None, 'data'), P()),
        out_specs=(P(), data_specs[0]), axis_names={'data'}, check_vma=False)
    return over_groups(params, base, tokens, key)


def mean_grads(params, base, tokens, scale, key, config, mesh=None, fsdp=False):
    """(loss, gradient by params) of the mean loss over tokens (G, B, T + 1). In float16 the loss is
    multiplied by `scale` in between, so that small gradients do not become zero."""
    n_groups = 1 if mesh is None else mesh.shape['data']
    n = len(tokens) * n_groups  # losses are added up over micro-batches and groups of devices
    # divide each loss, and not the sum of the gradients: that would read them all once more
    before, after = (scale, n * scale) if config.dtype == 'float16' else (1 / n, None)
    loss_fn = lambda *args: before * batch_loss(*args, config)
    if n_groups == 1:
        totals = accumulate(loss_fn, params, base, tokens, key)
    else:
        totals = sharded_grads(loss_fn, params, base, tokens, key, config.dtype, mesh, fsdp)
    return totals if after is None else jax.tree.map(lambda x: x / after, totals)


# -----------------------------------------------------------------------------
# the steps


def next_loss_scale(scale, age, finite):
    """float16's loss scale, as large as it can be: halved when a gradient overflows, doubled after
    every 2000 good steps."""
    grown = jnp.where(age % 2000 == 0, 2 * scale, scale)
    return jnp.where(finite, grown, jnp.maximum(scale / 2, 1))


def update_if(finite, updated, old, config):
    """updated(*old) if the gradient is finite, else the old values. CPUs take one of two branches:
    to choose between values would keep both, 0.4 GB more for 124M parameters. Elsewhere choosing is
    better: TPUs copy the arrays of a branch from one layout to another (0.86 of the cycles)."""
    if config.cpus:
        return jax.lax.cond(finite, updated, lambda *old: old, *old)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated(*old), old)


@functools.partial(jax.jit, static_argnames=('config', 'tx', 'mesh', 'fsdp'),
                   donate_argnames='state')
def train_step(state, tokens, lr, key, config, tx, mesh=None, fsdp=False):
    """One update from G micro-batches, tokens (G, B, T + 1). Returns the new state, in the memory
    of the old one, and metrics: loss, grad_norm before clipping, and the counters skipped and
    skipped_in_a_row. Where the gradient is not finite, parameters and optimizer stay as they
    are."""
    params, base, opt_state = state['params'], state['base'], state['opt_state']
    scale = state['loss_scale']
    key = jax.random.fold_in(key, state['step'])  # every step has dropout of its own
    loss, grads = mean_grads(params, base, tokens, scale, key, config, mesh, fsdp)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def updated(params, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params, norm=grad_norm)  # clips, too
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), opt_state

    params, opt_state = update_if(finite, updated, (params, opt_state), config)

    age = jnp.where(finite, state['scale_age'] + 1, 0)
    if config.dtype == 'float16':
        scale = next_loss_scale(scale, age, finite)
    skipped = {'skipped': state['skipped'] + ~finite,
               'skipped_in_a_row': jnp.where(finite, 0, state['skipped_in_a_row'] + 1)}
    state = {'params': params, 'base': base, 'opt_state': opt_state, 'step': state['step'] + 1,
             'loss_scale': scale, 'scale_age': age, **skipped}
    if mesh is not None:  # else XLA may return it whole on each device, in other memory
        state = jax.lax.with_sharding_constraint(state, shardings(state, mesh, fsdp))
    return state, {'loss': loss, 'grad_norm': grad_norm, **skipped}


@functools.partial(jax.jit, static_argnames='config')
def eval_step(params, tokens, config):
    """The mean loss of tokens (G, B, T + 1), without dropout."""
    model = build(config, params)
    return jax.lax.map(model.loss, tokens).mean()


def abstract_tokens(shape, mesh, config):
    """What load_batch() gives for `shape` = (G, B)."""
    shape = *shape, config.block_size + 1
    return jax.ShapeDtypeStruct(shape, np.uint16, sharding=batch_sharding(mesh))


def lower_step(state, shape, mesh, config, tx, fsdp=False):
    """train_step for a state, abstract or not, and batches of `shape` = (G, B), ready to be
    compiled."""
    tokens, key = abstract_tokens(shape, mesh, config), jax.random.key(0)
    return train_step.lower(state, tokens, 0.0, key, config=config, tx=tx, mesh=mesh, fsdp=fsdp)


def with_flash(config, devices, wanted=True):
    """(config, text): the config with FlashAttention if that is wanted and the model and the devices
    allow it. The text, for the log, says so, or why not; it is '' where there are no GPUs."""
    why_not = '' if wanted else 'flash = False'
    why_not = why_not or no_flash(devices) or config.no_flash
    text = f', no FlashAttention ({why_not})' if why_not else ", cuDNN's FlashAttention"
    return replace(config, flash=not why_not), text if devices[0].platform == 'gpu' else ''


def compile_step(state, shape, mesh, config, tx, fsdp=False):
    """train_step compiled: a function of (state, tokens, lr, key)."""
    step = compile_for(mesh, lower_step(state, shape, mesh, config, tx, fsdp))
    if config.flash and '__cudnn$fmha' not in step.as_text():
        raise ValueError('flash = True: the compiled step has no FlashAttention in it')
    return step


def compile_eval(params, shape, mesh, config):
    """eval_step compiled: a function of (params, tokens)."""
    tokens = abstract_tokens(shape, mesh, config)
    return compile_for(mesh, eval_step.lower(params, tokens, config=config))
