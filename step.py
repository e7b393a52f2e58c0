"""
One training step on any mesh: state, sharding, gradient, train_step, eval_step.

Letters: G micro-batches of B sequences in a step, T tokens in a sequence.
"""
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

import lora
from devices import compile_for, peak_flops
from model import GPTConfig, build, init_params


@dataclass(frozen=True)
class Setup:
    """What does not change during a run: the model's shape, the optimizer, and how both lie on the devices."""
    config: GPTConfig
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh | None = None  # None: one device
    fsdp: bool = False  # parameters are split over the data axis, too, as the optimizer's state always is
    base_dtype: str = 'float32'  # what the matrices that LoRA freezes are held in


# -----------------------------------------------------------------------------
# the state


def init_state(config, tx, seed, base_dtype='float32'):
    """What a checkpoint holds: parameters, optimizer state, counters of steps and of skipped updates, and the loss
    scale, which only float16 uses, but any run may go on in float16. `base` holds the parameters that LoRA freezes, {}
    without LoRA."""
    params, base = lora.split(init_params(config, seed), config)
    base = lora.held_in(base, base_dtype)
    counters = 'step', 'skipped', 'skipped_in_a_row', 'scale_age'
    return {'params': params, 'base': base, 'opt_state': tx.init(params),
            'loss_scale': jnp.float32(2**15), **{name: jnp.zeros((), jnp.int32) for name in counters}}


def all_params(state):
    return lora.join(state['params'], state['base'])


def num_params(params):
    """The number of parameters without position embeddings, as nanoGPT counts them."""
    positions = params['wpe']['weight'].size if 'wpe' in params else 0
    return sum(x.size for x in jax.tree.leaves(params)) - positions


def flops_per_token(config, n_params, n_frozen=0):
    """The FLOPs of a training step for each token: 6 for each parameter and 12 L nh hs T for attention (PaLM, appendix
    B, https://arxiv.org/abs/2204.02311). Frozen parameters have no gradient of their own: 4. An embedding that is not
    the output layer, too, is only looked up: 0."""
    looked_up = 0 if config.tied else config.vocab_size * config.n_embd
    n_params, n_frozen = n_params - looked_up, max(n_frozen - looked_up, 0)
    attention = 12 * config.n_layer * config.n_head * config.head_size * config.block_size
    return 6 * n_params - 2 * n_frozen + attention


def estimate_mfu(config, n_params, n_frozen, tokens_per_second, devices):
    """Model FLOPs utilization, the share of the devices' peak; None where the peak is unknown."""
    peak = peak_flops(devices)
    return peak and flops_per_token(config, n_params, n_frozen) * tokens_per_second / peak


# -----------------------------------------------------------------------------
# sharding

# The dimension of each matrix that the tensor axis splits (Megatron-LM, https://arxiv.org/abs/1909.08053): the first
# matrix of attention and MLP by column and the second by row, so that each pair needs a single all-reduce, and the
# embedding and the output layer by token. With LoRA, c_attn's B is split like c_attn, by column, and c_proj's A like
# c_proj, by row. All else is on every device.
TENSOR_SPLIT = {'wte': 0, 'lm_head': 0, 'attn.c_attn': -1, 'attn.c_q': -1, 'attn.c_kv': -1, 'mlp.c_fc': -1,
                'attn.c_proj': 0, 'mlp.c_proj': 0}


def shardings(state, mesh, fsdp=False):
    """The sharding of every array in a state, which may be abstract: Adam's moments like their parameters. The data
    axis splits the largest dimension that is left, of the optimizer's state always and of parameters with fsdp."""
    n_data, n_tensor = mesh.shape['data'], mesh.shape['tensor']

    def sharding(path, x):
        names = [str(getattr(p, 'key', '')) for p in path]
        layer, spec = '.'.join(names[:-1]), [None] * x.ndim
        dim = next((d for suffix, d in TENSOR_SPLIT.items() if layer.endswith(suffix)), None)
        if dim is not None and names[-1] in (('weight', 'lora_A') if dim == 0 else ('weight', 'lora_B', 'bias')):
            if n_tensor > 1 and x.shape[dim] % n_tensor == 0:
                spec[dim] = 'tensor'
        free = [d for d in range(x.ndim) if spec[d] is None and x.shape[d] % n_data == 0]
        if (fsdp or names[0] == 'opt_state') and n_data > 1 and free:
            spec[max(free, key=lambda d: x.shape[d])] = 'data'
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(sharding, state)


def with_shardings(abstract, where):
    """Abstract arrays with these shardings."""
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, abstract, where)


def on_mesh(mesh, fsdp=False):
    """A function that gives abstract arrays their shardings on a mesh."""
    return lambda abstract: with_shardings(abstract, shardings(abstract, mesh, fsdp))


def on_one_device(abstract):
    """Abstract arrays on the first device."""
    return with_shardings(abstract, jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[0]), abstract))


def abstract_state(setup):
    """The shapes and shardings of a state on a mesh."""
    state = jax.eval_shape(lambda: init_state(setup.config, setup.tx, 0, setup.base_dtype))
    return on_mesh(setup.mesh, setup.fsdp)(state)


def state_creator(setup, seed, abstract, leave_out=None):
    """A jitted function that creates a new state with the shardings of `abstract`: no device ever holds all of it.
    `leave_out` names an entry that will be read from a file."""
    only = lambda state: {name: x for name, x in state.items() if name != leave_out}
    where = jax.tree.map(lambda x: x.sharding, only(abstract))
    return jax.jit(lambda: only(init_state(setup.config, setup.tx, seed, setup.base_dtype)), out_shardings=where)


def batch_sharding(mesh):
    """Of tokens (G, B, T + 1): each data-parallel group of devices has some of the B sequences."""
    return NamedSharding(mesh, P(None, 'data'))


# -----------------------------------------------------------------------------
# the gradient


def batch_loss(params, base, tokens, key, config):
    """The mean loss of tokens (B, T + 1). One CPU runs the batch as two halves: one fills the cores while the other is
    serial (0.92 and 0.85 of the time on two cores)."""
    halves = 2 if config.kernels == 'cpu' and len(tokens) > 1 else 1
    return build(config, lora.join(params, base)).loss(tokens, key, halves)


def learned_share(tokens):
    """The share of the targets in tokens (..., T + 1) that count (GPT.loss says how), over all micro-batches and
    devices. It is 1 where no token can be marked."""
    return share_of(tokens) if jnp.issubdtype(tokens.dtype, jnp.signedinteger) else 1


@jax.jit
def share_of(tokens):
    return jnp.maximum((tokens[..., 1:] >= 0).mean(), 1e-9)  # where none counts, the loss is 0


def accumulate(loss_fn, params, base, tokens, key):
    """Loss and gradient by params, summed over the micro-batches tokens (G, B, T + 1)."""
    def micro_step(total, batch):
        i, tokens = batch
        micro_key = jax.random.fold_in(key, i)
        loss_and_grads = jax.value_and_grad(loss_fn)(params, base, tokens, micro_key)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(micro_step, zero, (jnp.arange(len(tokens)), tokens))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x, dim, dtype):
    """The whole of an array whose dimension `dim` is split over the data axis. It is sent in `dtype`."""
    return jax.lax.all_gather(x.astype(dtype), 'data', axis=dim, tiled=True).astype(x.dtype)


def sum_scatter(x, dim):
    """A reduce-scatter: the sum over the data axis, which splits its dimension `dim`."""
    return jax.lax.psum_scatter(x, 'data', scatter_dimension=dim, tiled=True)


# the gradient is summed in its own type
all_gather.defvjp(lambda x, dim, dtype: (all_gather(x, dim, dtype), None),
                  lambda dim, dtype, _, dy: (sum_scatter(dy, dim),))


def on_tensor_axis(f, spec):
    """A function of one array that `spec` splits over the tensor axis. It calls f with a device's own part, where GSPMD
    would bring the parts together first. For use inside a shard_map over the data axis."""
    return jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names={'tensor'}, check_vma=False)


def gather_params(params, data_specs, tensor_specs, dtype):
    """Whole parameters from those that fsdp has split over the data axis. Matrices are sent in `dtype`, to which a
    matmul rounds them anyway."""
    def gather(x, data_spec, tensor_spec):
        if 'data' not in data_spec:
            return x
        sent = dtype if x.ndim > 1 and x.dtype == jnp.float32 else x.dtype
        whole = lambda x: all_gather(x, data_spec.index('data'), sent)
        return on_tensor_axis(whole, tensor_spec)(x)

    return jax.tree.map(gather, params, data_specs, tensor_specs)


def sharded_grads(loss_fn, params, base, tokens, key, setup):
    """accumulate() where the data axis has several groups of devices. Each group sums up the gradients of its own
    sequences, and only the result is summed over the groups, once in an iteration, where GSPMD alone does it in every
    micro-step. Each group gets its part of the sum, as its optimizer has a part of the state (ZeRO,
    https://arxiv.org/abs/1910.02054). The tensor axis stays with GSPMD."""
    where = shardings((params, base), setup.mesh, setup.fsdp)
    only = lambda axis: lambda s: P(*(a if a == axis else None for a in s.spec))
    data_specs = jax.tree.map(only('data'), where)
    tensor_specs = jax.tree.map(only('tensor'), where)
    grad_specs = jax.tree.map(only('data'), shardings(params, setup.mesh, fsdp=True))

    def gathered_loss(params, base, tokens, key):
        if setup.fsdp:
            # without the barrier, XLA gathers once for all micro-steps and keeps the whole parameters
            params, base, tokens = jax.lax.optimization_barrier((params, base, tokens))
            params, base = gather_params((params, base), data_specs, tensor_specs, setup.config.dtype)
        return loss_fn(params, base, tokens, key)

    def add_up(grad, param_spec, grad_spec, tensor_spec):
        if 'data' in param_spec:
            return grad  # it was added up on the way back through all_gather()
        if 'data' not in grad_spec:
            return jax.lax.psum(grad, 'data')
        return on_tensor_axis(lambda x: sum_scatter(x, grad_spec.index('data')), tensor_spec)(grad)

    def group_grads(params, base, tokens, key):
        key = jax.random.fold_in(key, jax.lax.axis_index('data'))
        loss, grads = accumulate(gathered_loss, params, base, tokens, key)
        grads = jax.tree.map(add_up, grads, data_specs[0], grad_specs, tensor_specs[0])
        return jax.lax.psum(loss, 'data'), grads

    over_groups = jax.shard_map(group_grads, mesh=setup.mesh, in_specs=(*data_specs, P(None, 'data'), P()),
                                out_specs=(P(), grad_specs), axis_names={'data'}, check_vma=False)
    return over_groups(params, base, tokens, key)


def loss_and_grads(params, base, tokens, scale, key, setup):
    """(loss, gradient by params) of the mean loss over tokens (G, B, T + 1). In float16 the loss is multiplied by
    `scale` in between, so that small gradients do not become zero."""
    config, mesh = setup.config, setup.mesh
    n_groups = 1 if mesh is None else mesh.shape['data']
    # losses are added up over micro-batches and groups of devices, and are means over all targets
    n = len(tokens) * n_groups * learned_share(tokens)
    factor = scale / n if config.dtype == 'float16' else 1 / n
    # to scale each loss is free; to scale the sum of the gradients would read them all once more
    loss_fn = lambda *args: factor * batch_loss(*args, config)
    if n_groups == 1:
        totals = accumulate(loss_fn, params, base, tokens, key)
    else:
        totals = sharded_grads(loss_fn, params, base, tokens, key, setup)
    return jax.tree.map(lambda x: x / scale, totals) if config.dtype == 'float16' else totals


# -----------------------------------------------------------------------------
# the steps


def next_loss_scale(scale, age, finite):
    """float16's loss scale, as large as it can be: halved when a gradient overflows, doubled after every 2000 good
    steps."""
    grown = jnp.where(age % 2000 == 0, 2 * scale, scale)
    return jnp.where(finite, grown, jnp.maximum(scale / 2, 1))


def norm_of(grads, config):
    """The norm of all gradients together. A GPU sums up an array in two kernels and its rows in one, so there the norms
    of rows come first: 72 kernels less of 490 in a step of 124M."""
    if config.kernels not in ('gpu', 'cudnn'):
        return optax.tree.norm(grads)
    norms = [jnp.linalg.norm(grad, axis=-1).ravel() if grad.ndim > 1 else grad for grad in jax.tree.leaves(grads)]
    return jnp.linalg.norm(jnp.concatenate(norms))


def update_if(finite, updated, old, config):
    """updated(*old) if the gradient is finite, else the old values. CPUs branch, because a select keeps both in memory
    (0.4 GB for 124M). Elsewhere select, because TPUs copy the arrays of a branch to another layout (0.86)."""
    if config.kernels in ('cpu', 'cpus'):
        return jax.lax.cond(finite, updated, lambda *old: old, *old)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated(*old), old)


@functools.partial(jax.jit, static_argnames='setup', donate_argnames='state')
def train_step(state, tokens, lr, key, setup):
    """One update from G micro-batches, tokens (G, B, T + 1). Returns the new state, in the memory of the old one, and
    metrics: loss, grad_norm before clipping, and the counters skipped and skipped_in_a_row. Where the gradient is not
    finite, parameters and optimizer stay as they are."""
    params, base, opt_state, scale = (state[name] for name in ('params', 'base', 'opt_state', 'loss_scale'))
    key = jax.random.fold_in(key, state['step'])  # every step has dropout of its own
    loss, grads = loss_and_grads(params, base, tokens, scale, key, setup)
    grad_norm = norm_of(grads, setup.config)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def updated(params, opt_state):
        updates, opt_state = setup.tx.update(grads, opt_state, params, norm=grad_norm, setup=setup)  # clips, too
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), opt_state

    params, opt_state = update_if(finite, updated, (params, opt_state), setup.config)

    age = jnp.where(finite, state['scale_age'] + 1, 0)
    if setup.config.dtype == 'float16':
        scale = next_loss_scale(scale, age, finite)
    skipped = {'skipped': state['skipped'] + ~finite,
               'skipped_in_a_row': jnp.where(finite, 0, state['skipped_in_a_row'] + 1)}
    state = {'params': params, 'base': base, 'opt_state': opt_state, 'step': state['step'] + 1,
             'loss_scale': scale, 'scale_age': age, **skipped}
    if setup.mesh is not None:  # else XLA may return it whole on each device, and then nothing is donated
        state = jax.lax.with_sharding_constraint(state, shardings(state, setup.mesh, setup.fsdp))
    return state, {'loss': loss, 'grad_norm': grad_norm, **skipped}


@functools.partial(jax.jit, static_argnames='config')
def eval_step(params, tokens, config):
    """The mean loss of tokens (G, B, T + 1), without dropout, over all targets: divide by learned_share()."""
    model = build(config, params)
    return jax.lax.map(model.loss, tokens).mean()


def abstract_tokens(setup, shape, dtype):
    """What load_batch() gives for `shape` = (G, B) and a file of this type."""
    shape = *shape, setup.config.block_size + 1
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(setup.mesh))


def lower_step(setup, state, shape, dtype=np.uint16):
    """train_step for a state, abstract or not, and batches of `shape` = (G, B), ready to be compiled."""
    tokens, key = abstract_tokens(setup, shape, dtype), jax.random.key(0)
    with jax.set_mesh(setup.mesh):  # kernels.over_mesh() asks for it
        return train_step.lower(state, tokens, 0.0, key, setup=setup)


def compile_step(setup, state, shape, dtype=np.uint16):
    """train_step compiled: a function of (state, tokens, lr, key)."""
    return compile_for(setup.mesh, lower_step(setup, state, shape, dtype))


def compile_eval(setup, params, shape, dtype=np.uint16):
    """eval_step compiled: a function of (params, tokens)."""
    tokens = abstract_tokens(setup, shape, dtype)
    with jax.set_mesh(setup.mesh):
        lowered = eval_step.lower(params, tokens, config=setup.config)
    return compile_for(setup.mesh, lowered)
