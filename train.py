"""
Trains a GPT, on whatever devices JAX finds: a laptop's CPU, one GPU, eight, or a TPU pod.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py --batch_size=32      # config files, then --key=value
    python train.py config/train_shakespeare_char.py config/laptop.py     # the same, dialled down for a CPU
    python train.py --init_from=resume --out_dir=out-shakespeare-char     # go on where a run stopped
    python train.py config/finetune_shakespeare.py --init_from=gpt2 --lora_rank=8      # finetune GPT-2
    python sample.py --out_dir=out-shakespeare-char
"""
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, fields
from functools import partial, partialmethod
from importlib.metadata import version

# -----------------------------------------------------------------------------
# config: the values here train GPT-2 (124M) on OpenWebText
# I/O
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200  # batches in an evaluation, of each split; the same ones every time
eval_only = False  # exit right after the first evaluation
always_save_checkpoint = True  # save at every evaluation; if False, only when the validation loss improves
init_from = 'scratch'  # 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a path: a run directory or GPT-2's files
sample_tokens = 0  # print a text of so many tokens at every evaluation
# wandb logging
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/
gradient_accumulation_steps = 5 * 8  # an iteration sees this many times batch_size sequences, whatever the mesh
batch_size = 12  # sequences that a device handles at a time
block_size = 1024
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # do we use biases in LayerNorms and Linears?
lora_rank = 0  # with init_from: train only adapters of this rank, LoRA; 0: train everything
lora_alpha = 16.0  # the adapters count lora_alpha / lora_rank
# adamw optimizer
learning_rate = 6e-4  # max learning rate
max_iters = 600000
max_skipped = 20  # stop after so many updates in a row whose gradients are not finite; each one is skipped
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip gradients at this global norm; 0.0: don't
# learning rate decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000  # should be about max_iters (Chinchilla)
min_lr = 6e-5  # should be about learning_rate / 10 (Chinchilla)
# system
overwrite = False  # start from scratch even where out_dir holds a run
seed = 1337
device = ''  # 'cpu', 'gpu' or 'tpu'; '': the best that JAX finds
debug_nans = False  # stop at the operation that makes the first NaN, with a traceback; slow
dtype = ''  # of products: 'float32', 'bfloat16', or 'float16' with a dynamic loss scale; '': bfloat16, but float32 on CPUs that are not made for it
flash = False  # cuDNN's FlashAttention, on NVIDIA GPUs; wants dropout = 0.0
remat = False  # less memory on GPU and TPU, a third more computing: activations are computed again in the backward pass
loss_chunks = 1  # less memory: the logits of so many parts of the tokens are computed one after the other
compile_cache = True  # keep what is compiled in ~/.cache/nanogpt-jax, so that it starts faster the next time
profile = False  # write a trace of five iterations to out_dir/profile, for XProf or Perfetto
mesh_data = -1  # devices along the data axis; -1: all that are left
mesh_tensor = 1  # devices that share each layer's matrices
fsdp = False  # split parameters and optimizer state over the data axis too
coordinator = ''  # HOST:PORT of process 0, where there are several; '': what Slurm, Open MPI or a TPU pod says, or a single process
num_processes = 1
process_id = 0
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
# -----------------------------------------------------------------------------
# the rest of the imports: they take a second, and a typo is answered before that

import jax
import numpy as np
from jax.sharding import AxisType
from tqdm import tqdm

from model import (GPTConfig, best_dtype, build, compile_eval, compile_step, compiled, estimate_mfu, eval_starts, eval_step, find_devices,
                   generate, get_lr, init_state, join, keep_compiled, load, lora_table, make_optimizer, meet, micro_batches, num_params,
                   open_dataset, over_processes, padded, place, read_json, shardings, side_by_side, train_starts, train_step)
from rundir import Checkpoints, Log, clear, open_model, save_base, take, tokenizer, write

# -----------------------------------------------------------------------------
# can this run be done?

check(eval_interval=(1, 10**9), log_interval=(1, 10**9), eval_iters=(1, 10**6), sample_tokens=(0, 10**6), max_skipped=(1, 10**9),
      gradient_accumulation_steps=(1, 10**6), batch_size=(1, 10**6), max_iters=(0, 10**12), warmup_iters=(0, 10**12),
      lr_decay_iters=(0, 10**12), learning_rate=(0, 10**3), min_lr=(0, 10**3), weight_decay=(0, 10**3), beta1=(0, 0.999999),
      beta2=(0, 0.999999), grad_clip=(0, 10**6), seed=(0, 2**32 - 1), mesh_data=(-1, 10**6), mesh_tensor=(1, 10**6),
      num_processes=(1, 10**6), process_id=(0, num_processes - 1))
if not re.fullmatch(r'.+:\d+' if num_processes > 1 else r'(.+:\d+)?', coordinator):
    fail(f'coordinator = {coordinator!r}: {num_processes} processes meet at --coordinator=HOST:PORT, of process 0')

run_file, best_file = os.path.join(out_dir, 'config.json'), os.path.join(out_dir, 'best.json')
if init_from == 'resume':
    if not os.path.exists(run_file):
        fail(f'nothing to resume: {out_dir} holds no run')
    with refuse(ValueError):
        saved = read_json(run_file)
    # the run keeps its settings, but for those that are given now and those that belong to the machine
    own = given | {'out_dir', 'init_from', 'eval_only', 'overwrite', 'device', 'mesh_data', 'mesh_tensor', 'fsdp', 'coordinator',
                   'num_processes', 'process_id', 'compile_cache', 'profile', 'debug_nans'}
    config |= {k: v for k, v in saved['config'].items() if k in config and k not in own}
    globals().update(config)
    for key in given & set(saved['model_args']) - {'dropout', 'dtype', 'flash', 'remat', 'loss_chunks'}:
        if config[key] != saved['model_args'][key]:
            fail(f'{key} = {config[key]}: the run in {out_dir} has {key} = {saved["model_args"][key]}, which cannot change')
elif os.path.exists(run_file) and not (overwrite or eval_only):
    fail(f'{out_dir} holds a run: go on with it (--init_from=resume), replace it (--overwrite=True), or name another --out_dir')

origin = saved['config']['init_from'] if init_from == 'resume' else init_from
if lora_rank and origin == 'scratch':
    fail(f'lora_rank = {lora_rank}: adapters need a model to adapt, such as --init_from=gpt2')
if os.path.realpath(init_from) == os.path.realpath(out_dir):
    fail(f'init_from = {init_from!r}: that is out_dir too, and a run cannot replace the one that it starts from')


def explain(e):
    """What to do about an error that is not the program's, in one line; None if it is."""
    if 'No space left' in str(e) or 'Disk quota' in str(e):
        kept = ', '.join(map(str, sorted(checkpoints.manager.all_steps())))
        return (f'no space left on the disk of {out_dir}; its earlier checkpoints are intact ({kept or "none yet"}). '
                f'Make room, then python train.py --init_from=resume --out_dir={out_dir}')
    if isinstance(e, MemoryError) or 'RESOURCE_EXHAUSTED' in str(e):
        return (f'out of memory ({str(e).splitlines()[0]}): lower batch_size = {batch_size} (and raise gradient_accumulation_steps = '
                f'{gradient_accumulation_steps} as much), block_size = {block_size} or the model; with several devices, --fsdp=True')


# -----------------------------------------------------------------------------
# devices: one mesh, whatever there is

with refuse(ValueError, RuntimeError):
    meet(coordinator, num_processes, process_id)
    devices = find_devices(device)
if flash and devices[0].platform != 'gpu':
    fail('flash = True: cuDNN is for NVIDIA GPUs')
if compile_cache:
    keep_compiled()
if jax.process_index() > 0:  # process 0 alone prints, logs and plots; all of them compute and write the checkpoints
    sys.stdout = open(os.devnull, 'w')
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
mesh_data = len(devices) // mesh_tensor if mesh_data == -1 else mesh_data
if mesh_data * mesh_tensor != len(devices):
    fail(f'mesh_data = {mesh_data} times mesh_tensor = {mesh_tensor} is not {len(devices)}, the number of devices')
mesh = jax.make_mesh((mesh_data, mesh_tensor), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
dtype = dtype or best_dtype(devices)

# -----------------------------------------------------------------------------
# weights that somebody trained: the model is as it was, but for what finetuning may change

source = None
if init_from not in ('scratch', 'resume'):
    with refuse(ValueError, OSError):
        source, source_meta, read = open_model(init_from)
    for key in ('n_layer', 'n_head', 'n_embd', 'bias', 'block_size'):
        own, its = config[key], getattr(source, key)
        if key in typed and own != its and not (key == 'block_size' and own < its):
            fail(f'{key} = {own}: {init_from} has {key} = {its}')
        globals()[key] = config[key] = min(own, its) if key == 'block_size' else its  # fewer positions will do

# -----------------------------------------------------------------------------
# data: a batch is a pure function of (seed, step), and the same on every mesh

data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', dataset)
with refuse(ValueError, OSError):
    data, meta = open_dataset(os.path.relpath(data_dir), block_size)
known = saved if init_from == 'resume' else source_meta if source else meta
if any(meta[k] != known[k] for k in ('vocab_size', 'tokenizer')):
    fail(f'dataset = {dataset!r} has another vocabulary than ' + (init_from if source else f'the run in {out_dir}'))
vocab_size = padded(meta['vocab_size'])
if source or init_from == 'resume':  # these have what they have: a row of zeros would be the likeliest token of GPT-2
    vocab_size = source.vocab_size if source else saved['model_args']['vocab_size']
batch_shape = micro_batches(gradient_accumulation_steps * batch_size, batch_size, mesh_data)
eval_batches = micro_batches(eval_iters * batch_size, batch_size, mesh_data)
if not (batch_shape and eval_batches):
    fail(f'batch_size = {batch_size} times gradient_accumulation_steps = {gradient_accumulation_steps}, and times eval_iters = {eval_iters}, must be '
         f'divisible by the {mesh_data} devices of the data axis: let both be multiples of {mesh_data // math.gcd(batch_size, mesh_data)}')
eval_shape = math.gcd(eval_batches[0], 20), eval_batches[1]  # 20 micro-batches are enough for one call

# -----------------------------------------------------------------------------
# model and optimizer: from scratch, from the latest checkpoint, or from weights that somebody trained

with refuse(ValueError):
    model_config = GPTConfig(**{field.name: globals()[field.name] for field in fields(GPTConfig)})
tx = make_optimizer(beta1, beta2, weight_decay, grad_clip)
init = lambda: init_state(model_config, tx, seed)
abstract = jax.eval_shape(init)
where = shardings(abstract, mesh, fsdp)
abstract = place(abstract, where)

# what no file holds is created where it stays: no device ever holds all of it
read_later = None if origin == 'scratch' else 'base' if lora_rank else 'params'
rest = lambda state: {k: v for k, v in state.items() if k != read_later}
create = jax.jit(lambda: rest(init()), out_shardings=rest(where))

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
n_params = num_params(join(abstract['params'], abstract['base']))
print(f'devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), mesh data={mesh_data} tensor={mesh_tensor}')
print(f'number of parameters: {n_params / 1e6:.2f}M, products in {dtype}')
print(f'tokens per iteration will be: {tokens_per_iter:,}')
if lora_rank:
    print(lora_table(abstract['params'], abstract['base'], model_config))
    n_params -= sum(x.size for x in jax.tree.leaves(abstract['base'])) / 3  # for mfu: 4 FLOPs a token instead of 6, no gradient
if debug_nans:  # operation by operation, so that the traceback ends at the one
    jax.config.update('jax_debug_nans', True)
    jax.config.update('jax_disable_jit', True)
    step, evaluate = partial(train_step, config=model_config, tx=tx, mesh=mesh, fsdp=fsdp), partial(eval_step, config=model_config)
else:
    print('compiling...', flush=True)
    try:
        create, step, evaluate = side_by_side(
            lambda: create if init_from == 'resume' else compiled(create.lower(), mesh),
            lambda: None if eval_only else compile_step(abstract, batch_shape, mesh, model_config, tx, fsdp),
            lambda: compile_eval(join(abstract['params'], abstract['base']), eval_shape, mesh, model_config))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        fail(explain(e) or e)

if not eval_only:  # everything is as it should be: from here on out_dir is this process's own
    with refuse(ValueError, OSError):
        lock = take(out_dir)
    if init_from != 'resume':
        clear(out_dir)
checkpoints = Checkpoints(out_dir, read_only=eval_only)
with refuse(ValueError):
    found = checkpoints.restore(abstract) if init_from == 'resume' else None
if found:
    print(f'Resuming training from {out_dir}', flush=True)
    state, progress = found
else:
    print('Initializing ' + ('a new model from scratch' if origin == 'scratch' else f'from {origin}')
          + ' (the run was stopped before its first checkpoint)' * (init_from == 'resume'), flush=True)
    state = create()
    if read_later:
        with refuse(ValueError, OSError):
            read = read if source else open_model(origin)[2]
            state[read_later] = read(block_size, lambda params: shardings(params, mesh, fsdp))
    if lora_rank and not eval_only:
        save_base(out_dir, state['base'])
    progress = dict(iter_num=0, best_val_loss=1e9, best_iter=None, wandb_id=None)
iter_num, best_val_loss, best_iter, wandb_id = (progress[k] for k in ('iter_num', 'best_val_loss', 'best_iter', 'wandb_id'))
checkpoints.best = best_iter


def save():
    progress = dict(iter_num=iter_num, best_val_loss=best_val_loss, best_iter=best_iter, wandb_id=wandb_id)
    checkpoints.save(iter_num, state, progress)


# -----------------------------------------------------------------------------
# logging: terminal, log.csv, loss.png, wandb

if not eval_only:
    versions = {name: version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')}
    run = {'config': config | {'init_from': origin}, 'model_args': asdict(model_config), **meta, 'versions': versions}
    write(run_file, json.dumps(run, indent=1))
    log = Log(out_dir, iter_num)
if wandb_log := wandb_log and jax.process_index() == 0:
    import wandb
    wandb_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id, resume='allow').id


def say(text):
    try:
        tqdm.write(text)  # to stdout, without tearing the bar on stderr
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as when a Ctrl-C has ended the `| tee log.txt` behind, too: save and stop
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not caught:
            caught.append(signal.SIGPIPE)


# -----------------------------------------------------------------------------
# the loop


def estimate_loss():
    """Mean loss of each split over eval_iters batches, the same ones every time; None if asked to stop meanwhile."""
    global stop
    means = {}
    for split in ('train', 'val'):
        parts = eval_starts(data[split], eval_batches, block_size).reshape(-1, *eval_shape)
        losses = []
        for part in tqdm(parts, f'evaluating on {split}', leave=False, disable=None):
            if stop := int(asked()):  # on resuming, the evaluation is made anew
                return None
            tokens = load(data[split], part, block_size, vocab_size, mesh)
            losses.append(float(evaluate(join(state['params'], state['base']), tokens)))
        means[split] = np.mean(losses)
    return means


def show_sample():
    """Prints the first tokens of the validation data and how the model goes on, for sample_tokens tokens."""
    _, decode, eot = tokenizer(meta['tokenizer'])
    prompt = data['val'][None, :min(16, block_size)]
    ids = generate(build(model_config, join(state['params'], state['base'])), prompt, sample_tokens, temperature=0.8, top_k=200, key=key,
                   eot=eot, n_vocab=meta['vocab_size'])
    say(f'--- a sample at step {iter_num}\n{decode(ids[0].tolist())}\n---')


def report(n, lr, metrics):
    """Logs iteration n. It waits for its result, so it is called when the next iteration is already under way."""
    global last_time, running_mfu, stop
    stop = int(metrics.pop('stop'))
    metrics = {k: float(v) for k, v in metrics.items()}
    dt, last_time = time.time() - last_time, time.time()
    mfu = estimate_mfu(model_config, n_params, tokens_per_iter / dt, devices)
    if mfu and n - first_iter >= 5:  # let the training loop settle a bit
        running_mfu = 0.9 * running_mfu + 0.1 * mfu if running_mfu else mfu
    bar.update(1)
    if n % log_interval == 0:
        mfu, skipped = f'{100 * running_mfu:.2f}%' if running_mfu else 'n/a', int(metrics['skipped'])
        say(f"iter {n}: loss {metrics['loss']:.4f}, time {dt * 1000:.2f}ms, mfu {mfu}, tok/s {tokens_per_iter / dt:,.0f}"
            + f', skipped {skipped}' * (skipped > 0))
        row = {k: v for k, v in metrics.items() if k in log.columns}
        log.row(iter=n, lr=lr, time_ms=dt * 1000, tokens_per_s=tokens_per_iter / dt, **row)
    if metrics['skipped_in_a_row'] >= max_skipped:
        fail(f'the gradients of {max_skipped} iterations in a row, up to {n}, were not finite, and their updates were skipped. The '
             f'checkpoints are good. Try a lower learning_rate, more warmup_iters, --dtype=float32, or --debug_nans=True to see where', code=1)


caught, stop = [], 0  # a signal asks to stop: the iteration is finished, the state saved. A second one ends the process at once.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: (caught.append(n), signal.signal(n, signal.SIG_DFL)))


def asked():
    """The signal that this or another process has caught; 0 if none."""
    return over_processes(max(caught, default=0), mesh)


key = jax.random.key(seed)
first_iter, running_mfu, pending = iter_num, None, None
start_time = last_time = last_plot = time.time()
bar = tqdm(total=max_iters + 1, initial=iter_num, unit='it', disable=None, dynamic_ncols=True)
try:
    while iter_num <= max_iters or eval_only:

        # determine the learning rate for this iteration
        lr = get_lr(iter_num, learning_rate, warmup_iters, lr_decay_iters, min_lr) if decay_lr else learning_rate

        # once in a while: save, evaluate the loss on train and val, and show what was learned
        if iter_num % eval_interval == 0 or eval_only:
            if pending:
                report(*pending)
                pending = None
            if always_save_checkpoint and iter_num > first_iter and not eval_only:
                save()
            losses = estimate_loss()
            if losses is None:
                break
            say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if wandb_log:
                wandb.log({'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'], 'lr': lr,
                           'mfu': 100 * (running_mfu or 0)}, step=iter_num)
            if sample_tokens:
                show_sample()
            if eval_only:
                break
            log.row(iter=iter_num, train_loss=losses['train'], val_loss=losses['val'], lr=lr)
            if time.time() - last_plot > 30:  # a picture takes as long as some iterations
                log.plot()
                last_plot = time.time()
            if losses['val'] < best_val_loss and iter_num > 0:
                best_val_loss, best_iter = losses['val'], iter_num
                checkpoints.best = best_iter
                save()
                write(best_file, json.dumps({'iter': best_iter, 'val_loss': best_val_loss}))
            last_time = time.time()

        # every step: forward, backward, update; then, while the devices work on it, report on the step before
        starts = train_starts(data['train'], batch_shape, block_size, seed, iter_num)
        tokens = load(data['train'], starts, block_size, vocab_size, mesh)
        if profile and iter_num == first_iter + 10:
            jax.profiler.start_trace(os.path.join(out_dir, 'profile'))
        with jax.profiler.StepTraceAnnotation('train', step_num=iter_num):
            state, metrics = step(state, tokens, lr, key)
        if pending:
            report(*pending)
        pending = iter_num, lr, metrics | {'stop': asked()}
        iter_num += 1
        if profile and iter_num == first_iter + 15:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()

        # many processes stop together, at what all of them had caught an iteration ago
        if stop or caught and jax.process_count() == 1:
            break

    # the end, or the end for now
    if pending:
        report(*pending)
    bar.close()
    if not eval_only:
        say(f'saving checkpoint to {out_dir}')
        save()
        checkpoints.manager.wait_until_finished()
        log.plot()
except Exception as e:
    bar.close()
    if reason := explain(e):
        fail(reason, code=1)
    raise

seconds, done = time.time() - start_time, iter_num - first_iter
say(f'{done:,} iterations in {seconds:.1f}s, {done * tokens_per_iter:,} tokens, {done * tokens_per_iter / seconds:,.0f} tokens/s')
if best_iter:
    say(f'best validation loss {best_val_loss:.4f} at step {best_iter}; python sample.py --out_dir={out_dir}')
if stop := stop or max(caught, default=0):
    say(f'stopped by {signal.Signals(stop).name}; go on with python train.py --init_from=resume --out_dir={out_dir}')
    sys.exit(128 + stop)
