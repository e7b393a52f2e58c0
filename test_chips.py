"""
Claims about chips.py: what a compiled module's text says, and what the compilers of chips make of a step.

    python -m pytest -q test_chips.py
"""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from chips import CHIPS, Kernel, Module, UnknownText, add_up, milliseconds
from devices import make_mesh
from model import GPTConfig
from optim import make_optimizer
from step import Setup, abstract_state, lower_step

jax.config.update('jax_num_cpu_devices', 8)  # simulated ones, for meshes

# -----------------------------------------------------------------------------
# a compiled module's text

COUNTED = '''
FileNames
1 "/home/me/model.py"
2 "/lib/site-packages/optax/update.py"
3 "/home/me/train.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=9}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=1 end_column=9}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}

%slices (p.0: bf16[8,100], p.1: f32[4,100]) -> f32[4,100] {
  %p.1 = f32[4,100]{1,0} parameter(1)
  %p.0 = bf16[8,100]{1,0} parameter(0)
  %wide = f32[8,100]{1,0} convert(%p.0)
  %slice = f32[4,100]{1,0} slice(%wide), slice={[0:4], [0:100]}
  ROOT %add.1 = f32[4,100]{1,0} add(%slice, %p.1)
}

%writes (q.0: f32[50,100], q.1: f32[1,100], q.2: s32[]) -> (f32[50,100], f32[1,100]) {
  %q.0 = f32[50,100]{1,0} parameter(0)
  %q.1 = f32[1,100]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %twice = f32[1,100]{1,0} add(%q.1, %q.1)
  %written = f32[50,100]{1,0} dynamic-update-slice(%q.0, %twice, %q.2, %q.2)
  ROOT %both = (f32[50,100]{1,0}, f32[1,100]{1,0}) tuple(%written, %twice)
}

%product (r.0: bf16[64,32], r.1: bf16[32,16]) -> bf16[64,16] {
  %r.0 = bf16[64,32]{1,0} parameter(0)
  %r.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%r.0, %r.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %t = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  %a = bf16[64,32]{1,0} get-tuple-element(%t), index=1
  %b = bf16[32,16]{1,0} get-tuple-element(%t), index=2
  %gemm = bf16[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  ROOT %next = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%i, %a, %b)
}

%condition (t: (s32[], bf16[64,32], bf16[32,16])) -> pred[] {
  %c.0 = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
}

ENTRY %main (x: bf16[8,100], y: f32[4,100], z: f32[50,100], row: f32[1,100], i: s32[]) -> f32[4,100] {
  %x = bf16[8,100]{1,0} parameter(0)
  %y = f32[4,100]{1,0} parameter(1)
  %z = f32[50,100]{1,0} parameter(2)
  %row = f32[1,100]{1,0} parameter(3)
  %i = s32[] parameter(4)
  %sliced = f32[4,100]{1,0} fusion(%x, %y), kind=kLoop, calls=%slices, metadata={op_name="jit(f)/add" stack_frame_id=2}
  %there = (f32[50,100]{1,0}, f32[1,100]{1,0}) fusion(%z, %row, %i), calls=%writes, metadata={stack_frame_id=3}
  %while = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
  %q = bf16[2,8,4,16]{3,2,1,0} constant({...})
  %cublas = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%w, %v), custom_call_target="__cublas$gemm", GEMM
  %w = bf16[32,64]{1,0} constant({...})
  %v = bf16[32,16]{1,0} constant({...})
  %flash = (bf16[2,8,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), TARGET, FLASH
  %move = (f32[1,100]{1,0:T(8,128)S(1)}, f32[1,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%row)
  %moved = f32[1,100]{1,0:T(8,128)S(1)} copy-done(%move)
  %take = ((f32[50,100]{1,0:T(8,128)}), f32[4,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%z), slice={[0:4]}
  ROOT %copy = f32[4,100]{1,0} copy(%sliced)
}
'''
COUNTED = COUNTED.replace('TARGET', 'custom_call_target="__cudnn$fmhaSoftmaxBackward"')
for _name, _config in dict(
        TRIPS={'known_trip_count': {'n': '3'}},
        GEMM={'gemm_backend_config': {'dot_dimension_numbers': {'lhs_contracting_dimensions': ['0']}}},
        FLASH={'cudnn_fmha_backend_config': {'intermediate_tensor_shape': {'dimensions': ['2', '4', '8', '8']},
                                             'mask_type': 'CAUSAL', 'sliding_window_length': 0}}).items():
    COUNTED = COUNTED.replace(_name, f'backend_config={json.dumps(_config)}')


def test_a_kernel_reads_and_writes_what_it_needs_and_no_more():
    found = Module(COUNTED).kernels(1)
    assert [(k.kind, k.times, k.bytes, k.flops) for k in found] == [
        ('other', 1, 4 * 100 * (2 + 4 + 4), 0),  # half of x, in bfloat16; y; and the result
        ('other', 1, 4 * (100 + 1 + 100 + 100), 0),  # the row and its number; the row in z, and by itself
        ('matmul', 3, 2 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16),
        ('matmul', 1, 2 * (64 * 32 + 32 * 16 + 64 * 16) + 4096, 2 * 64 * 32 * 16),
        ('attention', 1, 2 * 4 * 2 * 8 * 4 * 16, 5 * 2 * 2 * 4 * 8 * 8 * 16 / 2),
        ('other', 1, 4 * 100, 0), ('other', 1, 4 * 400, 0),  # from a TPU's memory into the chip: read, not written
        ('other', 1, 2 * 4 * 400, 0)]
    assert [k.what for k in found[:2]] == ['model.py:60 add f32[4,100]', 'model.py:60 fusion (f32[50,100], f32[1,100])']


@pytest.mark.parametrize('old, new', [
    ('known_trip_count', 'trips'), ('%x = bf16', '%other = bf16'), ('%there = (f32[50', '%there = (huge[50'),
    ('"CAUSAL"', '"PADDING"'), ('"sliding_window_length": 0', '"sliding_window_length": 4'),
    ('lhs_contracting_dimensions', 'contracting'), ('copy(%sliced)', 'somehow')])
def test_a_module_that_says_something_unknown_is_refused(old, new):
    assert old in COUNTED
    with pytest.raises(UnknownText):
        Module(COUNTED.replace(old, new)).kernels(1)


SENT = '''
%body (p: (s32[], f32[64,4], bf16[512,4])) -> (s32[], f32[64,4], bf16[512,4]) {
  %all-gather-start = ((f32[64,4]{1,0}), (f32[256,4]{1,0})) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %all-gather-done = (f32[256,4]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter.1 = bf16[256,4]{1,0:T(8,128)(2,1)S(1)} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %lonely = f32[256,4]{1,0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
}

%limit (p: (s32[], f32[64,4], bf16[512,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
}

ENTRY %main (g: f32[256,4]) -> f32[256,4] {
  %g = f32[256,4]{1,0} parameter(0)
  %while.1 = (s32[], f32[64,4]{1,0}, bf16[512,4]{1,0}) while(%t), condition=%limit, body=%body
  %all-reduce-start = f32[256,4]{1,0} all-reduce-start(%g), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %all-reduce-done = f32[256,4]{1,0} all-reduce-done(%all-reduce-start)
  %first = f32[256,4]{1,0} fusion(%g), kind=kCustom, calls=%begins
  %second = f32[256,4]{1,0} fusion(%first), kind=kCustom, calls=%goes_on, backend_config={"estimated_cycles":"70"}
}

%begins (p: f32[256,4]) -> f32[256,4] {
  %p = f32[256,4]{1,0} parameter(0)
  %all-reduce.2 = f32[256,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add, chain_id=1
  ROOT %start = f32[256,4]{1,0} custom-call(%all-reduce.2), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: f32[256,4]) -> f32[256,4] {
  %p = f32[256,4]{1,0} parameter(0)
  ROOT %all-reduce.3 = f32[256,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add, chain_id=1
}
'''


def test_what_a_module_sends_is_read_or_refused():
    found = Module(SENT).kernels(8)
    assert [(k.kind, k.times, k.bytes, k.group) for k in found if k.kind != 'other'] == [
        ('all-gather', 3, 4096 * 3 / 4, 4), ('reduce-scatter', 3, 4096 / 2, 2), ('all-reduce', 3, 0, 1),
        ('all-reduce', 1, 4096 * 2 * 3 / 4, 4), ('all-reduce', 1, 4096, 2)]
    assert sum(k.cycles for k in found) == 70
    for old, new in (("mesh['a'=4,'b'=2] {'a'}", 'somehow'), ("{'a'}", "{'c'}"), ('constant(3)', 'parameter(0)'),
                     ('f32[256,4]{1,0} all-reduce-start', 'huge[256,4] all-reduce-start')):
        with pytest.raises(UnknownText):
            Module(SENT.replace(old, new)).kernels(8)


def test_the_prediction_is_what_an_h200_measured():
    """124M with 12 x 1024 tokens, as its compiled module counts it and as BENCHMARKS.md has it."""
    counted = [Kernel('matmul', 147, 0, 9.11e12 / 147, 0, 1, ''), Kernel('attention', 24, 0, 0.812e12 / 24, 0, 1, ''),
               Kernel('other', 492, 25.46e9 / 492, 0, 0, 1, '')]
    rows = add_up(counted, CHIPS['h200'], 989e12, lambda kernel: kernel.kind)
    for kind, ms in (('matmul', 11.8), ('attention', 3.4), ('other', 9.0)):
        assert rows[kind]['ms'] == pytest.approx(ms, abs=0.05)
    # a TPU's compiler says cycles; what is sent takes its time on any chip, and more between hosts of GPUs
    [row] = add_up([Kernel('matmul', 2, 0, 0, 3_000_000, 1, '')], CHIPS['v5e'], 1, lambda kernel: kernel.kind).values()
    assert row['ms'] == 4
    sent = lambda chip, group: milliseconds(Kernel('all-reduce', 1, 9e8, 0, 0, group, ''), CHIPS[chip], 1)
    assert (sent('v5e', 64), sent('h100', 8), sent('h100', 16)) == (10, 2.25, 18)


# -----------------------------------------------------------------------------
# the step, compiled


CONFIG = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=8, n_embd=64)


def collectives_of(data, tensor, fsdp=False):
    """(collectives of four micro-steps on simulated devices that send a kilobyte or more, bytes of the gradients)"""
    mesh = make_mesh(jax.devices()[:data * tensor], data, tensor)
    setup = Setup(CONFIG, make_optimizer(0.9, 0.95, 0.1, 1.0), mesh, fsdp)
    state = abstract_state(setup)
    found = Module(lower_step(setup, state, (4, 8)).compile().as_text()).kernels(mesh.size)
    size = sum(4 * x.size for x in jax.tree.leaves(state['params']))
    return [k for k in found if k.kind not in ('matmul', 'attention', 'other') and k.bytes >= 1024], size


def test_the_gradients_are_reduced_once_an_iteration():
    found, size = collectives_of(8, 1)
    assert {(k.kind, k.times) for k in found} == {('all-reduce', 1)}
    assert size <= sum(k.bytes for k in found) / (2 * 7 / 8) < size + 100  # gradients and the loss, in a ring of 8
    found, _ = collectives_of(8, 1, fsdp=True)
    assert {(k.kind, k.times) for k in found} >= {('all-gather', 4), ('reduce-scatter', 4)}
    assert not [k for k in found if k.kind == 'all-reduce']
    found, _ = collectives_of(4, 2)
    assert {k.kind for k in found} == {'all-reduce'}  # the tensor axis gathers nothing
    assert len([k for k in found if k.times == 1]) == 1


COMPILE = '''
import json, sys
import jax
import chips, devices, optim, step
from model import GPTConfig
there = chips.open_topology(sys.argv[1])
for case in json.loads(sys.argv[2]):
    data, tensor, fsdp = case.pop('mesh')
    mesh = devices.make_mesh(there[:data * tensor], data, tensor)
    config = GPTConfig(block_size=256, vocab_size=512, n_layer=1, n_head=4, n_embd=256, dtype='bfloat16', **case)
    setup = step.Setup(devices.choose_kernels(config, there)[0], optim.make_optimizer(0.9, 0.95, 0.1, 1.0), mesh, fsdp)
    state = step.abstract_state(setup)
    lowered = step.lower_step(setup, state, (2, 4 * data))
    program = lowered.compile()
    use, arrays = program.memory_analysis(), jax.tree.leaves(state)
    returned = jax.tree.leaves(program.output_shardings[0])
    kernels = chips.Module(program.as_text()).kernels(mesh.size)
    print(json.dumps(dict(
        layouts='LayoutConstraint' in lowered.as_text(), donated=use.alias_size_in_bytes / use.output_size_in_bytes,
        moved=sum(not new.is_equivalent_to(old.sharding, old.ndim) for new, old in zip(returned, arrays, strict=True)),
        attention=sum(k.times for k in kernels if k.kind == 'attention'), cycles=sum(k.cycles for k in kernels),
        params=sum(x.size for x in jax.tree.leaves(state['params'])), lines=[k.what for k in kernels],
        sent=[(k.kind, k.times, k.group, k.bytes) for k in kernels if k.kind in chips.COLLECTIVES and k.bytes > 1024])))
'''


def run_for_chips(topology, *args):
    """The JSON that a script prints, which compiles for chips; skips the test where their compiler is not installed."""
    package = 'libtpu' if topology.startswith('v') else 'jax_plugins.xla_cuda13'
    try:
        importlib.import_module(package)
    except ImportError:
        pytest.skip(f'{package} is not installed: see requirements-chips.txt')
    env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    here = Path(__file__).parent
    process = subprocess.run([sys.executable, *args], cwd=here, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{')]


def compile_for_chips(topology, *cases):
    return run_for_chips(topology, '-c', COMPILE, topology, json.dumps(cases))


@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100:4'])
def test_a_step_for_chips_keeps_its_state_in_place_and_sums_gradients_once(topology):
    plain, both = compile_for_chips(topology, dict(mesh=(4, 1, False)), dict(mesh=(2, 2, True)))
    for result in (plain, both):
        assert result['donated'] > 0.99 and result['moved'] == 0 and not result['layouts']
        assert bool(result['cycles']) == topology.startswith('v5e')
        assert result['attention'] == (4 if topology.startswith('h100') else 0)  # two micro-steps, there and back
        assert any(line.startswith('model.py:') for line in result['lines'])
    assert {tuple(c) for *c, _ in plain['sent']} == {('all-reduce', 1, 4)}
    each_gradient_once = plain['params'] * 4 * 2 * 3 / 4  # in float32
    assert sum(c[-1] for c in plain['sent']) == pytest.approx(each_gradient_once, rel=0.01)
    kinds = {kind for kind, *_ in both['sent']}
    assert 'all-gather' in kinds and kinds & {'reduce-scatter', 'all-reduce'}


def test_flash_attention_of_chips_goes_with_every_mesh():
    cases = [dict(mesh=mesh, **more) for mesh in ((1, 1, False), (2, 1, True), (1, 2, False))
             for more in (dict(), dict(remat=True, loss_chunks=2))]
    for result in compile_for_chips('h100:2', *cases):
        assert result['attention'] >= 4 and result['donated'] > 0.99 and result['moved'] == 0


@pytest.mark.parametrize('chip', ['a100', 'h200', 'b200'])
def test_bench_predicts_the_time_on_chips(chip):
    [r] = run_for_chips(chip, 'bench.py', '--mode=compile', f'--topology={chip}:1', '--json', '--n_layer=1',
                        '--n_head=4', '--n_embd=256', '--block_size=256', '--vocab_size=512', '--batch_size=4',
                        '--gradient_accumulation_steps=8')
    kinds = r['kinds']
    assert r['fits'] and {*kinds} == {'matmul', 'attention', 'other'} and kinds['attention']['kernels'] == 16
    weights = 12 * 256**2 + 512 * 256
    assert kinds['matmul']['tflop'] == pytest.approx(6 * weights * 8 * 4 * 256 / 1e12)
    assert r['computing_ms'] == pytest.approx(sum(row['ms'] for row in kinds.values())) and r['sending_ms'] == 0
    assert len(r['largest']) == 10
