"""Claims about chips.py: what a compiled module's text says, and what the compilers of chips make of a step."""
import json
import math
import os
import subprocess
import sys

import jax
import pytest

from chips import CHIPS, COLLECTIVES, Kernel, add_up, milliseconds, read_kernels
from devices import choose_kernels, make_mesh
from model import GPTConfig
from optim import make_optimizer
from step import Setup, abstract_state, lower_step

# -----------------------------------------------------------------------------
# a compiled module's text

MODULE = '''
1 "/home/me/model.py"
2 "/lib/site-packages/optax/update.py"
1 {file_name_id=1 function_name_id=1 line=60 end_line=61 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=8 column=1 end_column=9}
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
%writes (p.0: bf16[8,100], p.1: f32[50,100], p.2: f32[1,100]) -> (f32[50,100], f32[4,100], f32[50,100]) {
  %p.1 = f32[50,100]{1,0} parameter(1)
  %p.0 = bf16[8,100]{1,0} parameter(0)
  %p.2 = f32[1,100]{1,0} parameter(2)
  %wide = f32[8,100]{1,0} convert(%p.0)
  %slice = f32[4,100]{1,0} slice(%wide), slice={[0:4], [0:100]}
  %written = f32[50,100]{1,0} dynamic-update-slice(%p.1, %p.2, %zero, %zero)
  %added = f32[50,100]{1,0} scatter(%p.1, %index, %p.2), to_apply=%add
  ROOT %all = (f32[50,100]{1,0}, f32[4,100]{1,0}, f32[50,100]{1,0}) tuple(%written, %slice, %added)
}
%product (r.0: bf16[8,100], r.1: bf16[8,100]) -> bf16[8,8] {
  %r.0 = bf16[8,100]{1,0} parameter(0)
  %r.1 = bf16[8,100]{1,0} parameter(1)
  ROOT %dot = bf16[8,8]{1,0} dot(%r.0, %r.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
%begins (p: f32[256,4]) -> f32[256,4] {
  %sum.1 = f32[256,4]{1,0:T(8,128)S(1)} all-reduce(%p), replica_groups={{0,1}}, chain_id=1
  ROOT %first = f32[256,4]{1,0} custom-call(%sum.1), custom_call_target="AsyncCollectiveStart"
}
%body (t: s32[]) -> s32[] {
  %start = ((f32[64,4]{1,0}), (f32[256,4]{1,0})) all-gather-start(%g), replica_groups=[2,4]<=[8]
  %done = (f32[256,4]{1,0}) all-gather-done(%start)
  %sum.2 = f32[256,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, chain_id=1
}
%limit (t: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
}
ENTRY %main (x: bf16[8,100], z: f32[50,100], row: f32[1,100]) -> f32[1,100] {
  %x = bf16[8,100]{1,0} parameter(0)
  %z = f32[50,100]{1,0} parameter(1)
  %row = f32[1,100]{1,0} parameter(2)
  %q = bf16[2,8,4,16]{3,2,1,0} constant({...})
  %made = (f32[50,100]{1,0}) fusion(%x, %z, %row), calls=%writes, metadata={op_name="jit(f)/add" stack_frame_id=2}
  %gemm = bf16[8,8]{1,0} fusion(%x, %x), kind=kCustom, calls=%product
  %cublas = (bf16[100,100]{1,0}, s8[64]{0}) custom-call(%x, %x), "__cublas$gemm", "lhs_contracting_dimensions":["0"]
  %flash = (bf16[2,8,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), "__cudnn$fmhaSoftmaxBackward"
  %while.1 = s32[] while(%t), condition=%limit, body=%body, "known_trip_count":{"n":"5"}
  %while.2 = s32[] while(%t), condition=%limit, body=%body
  %chained = f32[256,4]{1,0} fusion(%row), calls=%begins
  %scattered = bf16[256,4]{1,0} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %reduced = f32[256,4]{1,0} all-reduce(%g), replica_groups=mesh['a'=4,'b'=2], ids=([2,4]T(1,0)) {'a'}, to_apply=%add
  %permuted = f32[256,4]{1,0} collective-permute(%g), source_target_pairs={{0,1},{1,2}}
  ROOT %copy = f32[1,100]{1,0} copy(%row)
}
'''


def test_kernels_are_read_with_their_bytes_flops_loops_and_lines():
    found = read_kernels(MODULE)
    assert [(k.kind, k.times, k.bytes, k.flops) for k in found if k.kind not in COLLECTIVES] == [
        ('other', 1, 2 * 400 + 4 * (400 + 100 + 100 + 200), 0),  # a slice, there and back; a row; written; and added
        ('matmul', 1, 2 * (2 * 800 + 8 * 8), 2 * 8 * 100 * 8),
        ('matmul', 1, 2 * (2 * 800 + 100 * 100) + 64, 2 * 100 * 8 * 100),
        ('attention', 1, 2 * 4 * 2 * 8 * 4 * 16, 5 * 2 * 2 * 4 * 8 * 8 * 16 / 2),
        ('other', 1, 4 * 1024, 0), ('other', 1, 2 * 4 * 100, 0)]
    assert [(k.kind, k.times, k.bytes, k.group) for k in found if k.kind in COLLECTIVES] == [
        ('all-gather', 5, 4096 * 3 / 4, 4), ('all-gather', 3, 4096 * 3 / 4, 4),
        ('all-reduce', 1, 4096, 2),  # begins in one instruction and goes on in another
        ('reduce-scatter', 1, 2048, 2), ('all-reduce', 1, 4096 * 2 * 3 / 4, 4), ('collective-permute', 1, 4096, 2)]
    assert found[0].what == 'model.py:60 add (f32[50,100])'
    on_tpu = read_kernels(MODULE.replace('kind=kCustom', '"estimated_cycles":"70"'))
    assert [(k.kind, k.bytes, k.cycles) for k in on_tpu[:2]] == [('other', 0, 0), ('matmul', 0, 70)]


@pytest.mark.parametrize('old, new', [
    ('constant(3)', 'constant(?)'), ('%row = f32', '%other = f32'), ('%x = bf16', '%x = huge'), ('s8[64]', 's8[<=9]'),
    ('lhs_contracting_dimensions', 'contracting'), ('copy(%row)', 'somehow'), ('mesh[', 'grid['), ("{'a'}", "{'c'}"),
    ('copy(%row)', 'conditional(%row), branch_computations={%body}')])
def test_a_module_that_says_something_unknown_is_refused(old, new):
    assert old in MODULE
    with pytest.raises(ValueError, match='cannot read this line'):
        read_kernels(MODULE.replace(old, new))


def test_the_prediction_is_what_an_h200_measured():
    # 124M with 12 x 1024 tokens, as its compiled module counts it and as BENCHMARKS.md has it
    counted = [Kernel('matmul', '', 147, 0, flops=9.11e12 / 147), Kernel('attention', '', 24, 0, flops=0.812e12 / 24),
               Kernel('other', '', 492, 25.46e9 / 492)]
    rows = add_up(counted, CHIPS['h200'], 989e12, lambda kernel: kernel.kind)
    assert {row['what']: round(row['ms'], 1) for row in rows} == {'matmul': 11.8, 'attention': 3.4, 'other': 9.0}
    # a TPU's compiler says cycles; what is sent takes its time on any chip, and more between hosts of GPUs
    assert milliseconds(Kernel('matmul', '', 1, 0, cycles=3_000_000), CHIPS['v5e'], 1) == 2
    sent = lambda chip, group: milliseconds(Kernel('all-reduce', '', 1, 9e8, group), CHIPS[chip], 1)
    assert (sent('v5e', 64), sent('h100', 8), sent('h100', 16)) == (10, 2.25, 18)


# -----------------------------------------------------------------------------
# the step, compiled


def compiled(devices, mesh, fsdp=False, kernels='', **more):
    """What a compiler makes of a step of two micro-batches on a mesh of (data, tensor)."""
    mesh = make_mesh(devices[:mesh[0] * mesh[1]], *mesh)
    config = GPTConfig(block_size=256, vocab_size=512, n_layer=1, n_head=4, n_embd=256, dtype='bfloat16', **more)
    config = choose_kernels(config, devices, kernels=kernels)[0]
    setup = Setup(config, make_optimizer(0.9, 0.95, 0.1, 1.0), mesh, fsdp)
    state = abstract_state(setup)
    lowered = lower_step(setup, state, (2, 4 * mesh.shape['data']))
    program = lowered.compile()
    use = program.memory_analysis()
    arrays = zip(jax.tree.leaves(program.output_shardings[0]), jax.tree.leaves(state), strict=True)
    found = read_kernels(program.as_text())
    return dict(
        layouts='LayoutConstraint' in lowered.as_text(), donated=use.alias_size_in_bytes / use.output_size_in_bytes,
        moved=sum(not new.is_equivalent_to(old.sharding, old.ndim) for new, old in arrays),
        attention=sum(k.times for k in found if k.kind == 'attention'), cycles=sum(k.cycles for k in found),
        gradients=sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state['params'])),
        lines=[k.what for k in found],
        sent=[(k.kind, k.times, k.group, k.bytes) for k in found if k.kind in COLLECTIVES and k.bytes > 100])


def test_the_gradients_are_reduced_once_an_iteration():
    plain, fsdp, both = (compiled(jax.devices()[:8], *case, kernels='plain') for case in (
        [(8, 1)], [(8, 1), True], [(4, 2)]))
    assert {tuple(c) for *c, _ in plain['sent']} == {('reduce-scatter', 1, 8), ('all-gather', 1, 8)}
    assert sum(c[-1] for c in plain['sent']) == pytest.approx(2 * 7 / 8 * plain['gradients'], rel=1e-4)
    assert {tuple(c) for *c, _ in fsdp['sent']} == {('all-gather', 2, 8), ('reduce-scatter', 2, 8)}
    on_data_axis = [c for c in both['sent'] if c[2] == 4]
    assert {tuple(c) for *c, _ in on_data_axis} == {('reduce-scatter', 1, 4), ('all-gather', 1, 4)}
    assert sum(c[-1] for c in on_data_axis) == pytest.approx(2 * 3 / 4 * both['gradients'], rel=1e-4)
    assert {kind for kind, _, group, _ in both['sent'] if group == 2} == {'all-reduce'}  # the tensor axis gathers none


def run_for_chips(topology, *args):
    """The JSON that a script prints, which compiles for chips. Skips the test where their compiler is not installed."""
    pytest.importorskip('libtpu' if topology.startswith('v') else 'jax_plugins.xla_cuda13', exc_type=ImportError)
    process = subprocess.run([sys.executable, *args], cwd=os.path.dirname(os.path.abspath(__file__)),
                             env=os.environ | {'XLA_FLAGS': ''}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{')]


@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100:4'])
def test_a_step_for_chips_keeps_its_state_in_place_and_sums_gradients_once(topology):
    on_gpu = topology == 'h100:4'
    cases = [dict(mesh=(4, 1)), dict(mesh=(2, 2), fsdp=True)]  # on GPUs, FlashAttention goes with all meshes
    cases += [dict(mesh=(1, 1)), dict(mesh=(1, 2)), dict(mesh=(2, 1), fsdp=True, remat=True, loss_chunks=2)] * on_gpu
    results = run_for_chips(topology, '-c', f'''import chips, json, test_chips
devices = chips.open_topology({topology!r})
for case in {cases}:
    print(json.dumps(test_chips.compiled(devices, **case)))''')
    for result in results:
        assert result['donated'] > 0.99 and result['moved'] == 0 and not result['layouts']
        assert (result['cycles'] > 0, result['attention'] >= 4) == (not on_gpu, on_gpu)  # there and back, twice
        assert any(line.startswith('model.py:') for line in result['lines'])
    plain, both = results[:2]
    kinds = {'reduce-scatter', 'all-gather'} | ({'all-reduce'} if not on_gpu else set())  # for norms, on a TPU
    assert {tuple(c) for *c, _ in plain['sent']} == {(kind, 1, 4) for kind in kinds}
    assert sum(c[-1] for c in plain['sent']) == pytest.approx(2 * 3 / 4 * plain['gradients'], rel=0.01)
    assert {kind for kind, *_ in both['sent']} > {'all-gather'}


@pytest.mark.parametrize('chip', ['a100', 'h200', 'b200'])
def test_bench_predicts_the_time_on_chips(chip):
    small = '--n_layer=1 --n_head=4 --n_embd=256 --vocab_size=512 --batch_size=4 --gradient_accumulation_steps=8'
    [r] = run_for_chips(chip, 'bench.py', '--mode=compile', '--json', f'--topology={chip}:1', *small.split())
    kinds = {row['what']: row['kernels'] for row in r['kinds']}
    assert r['fits'] and {*kinds} == {'matmul', 'attention', 'other'} and kinds['attention'] == 16
    assert r['computing_ms'] == pytest.approx(sum(row['ms'] for row in r['kinds'])) and len(r['largest']) == 10
