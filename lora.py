"""
LoRA (https://arxiv.org/abs/2106.09685): beside each matrix of the blocks, a product A B of low rank is trained, and the
matrix itself is frozen. The layer that adds the product is Linear in model.py.
"""
import jax
import jax.numpy as jnp
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

ADAPTERS = ('lora_A', 'lora_B')


def split(params, config):
    """(trained, frozen): with LoRA the adapters and the rest, without it everything and {}."""
    flat = flatten_mapping(params)
    trained = {path: x for path, x in flat.items() if path[-1] in ADAPTERS or not config.lora_rank}
    frozen = {path: x for path, x in flat.items() if path not in trained}
    return unflatten_mapping(trained), unflatten_mapping(frozen)


def join(trained, frozen):
    """What split() took apart."""
    if not frozen:
        return trained
    return unflatten_mapping(flatten_mapping(trained) | flatten_mapping(frozen))


def held_in(frozen, dtype):
    """Frozen parameters with their matrices in another type, such as that of the file that they came from."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, frozen)


def merge(params, config):
    """Adds the adapters to the weights: the parameters, float32, of a model without LoRA that computes the same."""
    flat, merged = flatten_mapping(params), {}
    for path, x in flat.items():
        if path[-1] in ADAPTERS:
            continue
        x = x.astype(jnp.float32)
        A, B = (flat.get((*path[:-1], name)) for name in ADAPTERS)
        if path[-1] == 'weight' and A is not None:
            x += config.lora_alpha / config.lora_rank * jnp.tensordot(A, B, 1, precision='highest')
        merged[path] = x
    return unflatten_mapping(merged)


def table(trained, frozen, config):
    """How many parameters LoRA trains, as text."""
    sizes = {path: x.size for path, x in flatten_mapping(trained).items()}
    n, n_frozen = sum(sizes.values()), sum(x.size for x in jax.tree.leaves(frozen))
    n_A = sum(size for path, size in sizes.items() if path[-1] == 'lora_A')
    lines = [f'LoRA of rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {len(sizes) // 2} matrices']
    for name, size, note in (('trainable', n, f'A {n_A:,}, B {n - n_A:,}'), ('frozen', n_frozen, ''),
                             ('total', n + n_frozen, '')):
        lines.append(f'  {name:10} {size:>15,} {100 * size / (n + n_frozen):6.2f}%  {note}'.rstrip())
    return '\n'.join(lines)
