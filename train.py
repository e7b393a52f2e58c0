"""
Trains a GPT on whatever devices JAX finds: a laptop's CPU, one GPU, eight, or a TPU pod.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py --batch_size=32      # config files, then --key=value
    python train.py config/train_shakespeare_char.py config/laptop.py     # the same, small enough for a CPU
    python train.py --init_from=resume --out_dir=out-shakespeare-char     # go on where a run stopped
    python train.py config/train_gpt2.py --init_from=auto     # go on if there is a run, else start: for job queues
    python train.py config/finetune_shakespeare.py --init_from=gpt2 --lora_rank=8      # finetune GPT-2
    python sample.py --out_dir=out-shakespeare-char
"""
import os
import sys
import time

_started = time.monotonic()
_here = os.path.dirname(os.path.abspath(__file__))
# -----------------------------------------------------------------------------
# config: these values train GPT-2 (124M) on OpenWebText
# I/O
out_dir = 'out'  # or gs://BUCKET/FOLDER, with pip install gcsfs
eval_interval = 2000
log_interval = 1
eval_iters = 200  # batches of each split in an evaluation; the same ones every time
eval_only = False  # stop right after the first evaluation; its result is printed last, as a line of JSON
always_save_checkpoint = True  # save at every evaluation; if False, only when the validation loss improves
keep_interval = 0  # keep a checkpoint after every so many iterations for good; 0: keep the latest two and the best
init_from = 'scratch'  # 'scratch', 'resume', 'auto', 'gpt2', 'Qwen/Qwen3-0.6B', or a path of a run or a model: README
checkpoint = 'latest'  # from where to resume: or 'best', or the number of one; later ones are put aside
sample_tokens = 0  # print a text of so many tokens at every evaluation
# wandb logging
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/
data_dir = ''  # where datasets are, if not in the folder data/ beside this file; prepare.py has the option, too
gradient_accumulation_steps = 40  # an iteration sees this many times batch_size sequences, on any mesh
batch_size = 12  # sequences that a device handles at a time
block_size = 1024
# model
arch = 'gpt2'  # the block: 'gpt2'; 'qwen3', which learns more from every token; 'qwen2' or 'llama'
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # use biases in LayerNorms and Linears?
n_inner = 0  # width of the MLP; 0: 4 n_embd in gpt2, about 8/3 n_embd in the others
n_kv_head = 0  # heads of keys and values, each for a group of n_head / n_kv_head queries; 0: n_head
head_dim = 0  # channels of a head; 0: n_embd / n_head
norm_eps = 0.0  # what norms add to the variance; 0: 1e-5 in gpt2, 1e-6 in the others
tied = True  # the output layer is the token embedding; False: a matrix of its own
rope_theta = 10000.0  # the base of rotary positions; gpt2 has none
rope_factor = 1.0  # Llama 3's longer contexts: slow rotary positions turn so many times slower
rope_context = 8192  # and those are slow that turn less than once in so many tokens
lora_rank = 0  # with init_from: train only adapters of this rank (LoRA); 0: train everything
lora_alpha = 16.0  # the adapters are multiplied by lora_alpha / lora_rank
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon': Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # max learning rate
embd_lr_scale = 1.0  # the token embedding's learning rate, in multiples of learning_rate
max_iters = 600000
max_minutes = 0.0  # save and end, with exit code 142, after so many minutes; 0.0: don't
max_skipped = 20  # an update whose gradients are not finite is skipped; stop after so many in a row
weight_decay = 1e-1
beta1 = 0.9  # Muon's momentum, too
beta2 = 0.95
grad_clip = 1.0  # clip gradients at this global norm; 0.0: don't
# learning rate decay
decay_lr = True
lr_schedule = 'cosine'  # how it decays: 'cosine', or 'linear', which learns more in short runs
warmup_iters = 2000
lr_decay_iters = 600000  # should be about max_iters (Chinchilla)
min_lr = 6e-5  # should be about learning_rate / 10 (Chinchilla)
# system
overwrite = False  # start from scratch even if out_dir holds a run
seed = 1337
device = ''  # 'cpu', 'gpu', 'gpu:1' or 'tpu'; '': the best that JAX finds
debug_nans = False  # stop at the operation that makes the first NaN, with a traceback; slow
dtype = ''  # of matmuls: 'float32', 'bfloat16' or 'float16'; '': bfloat16, but float32 on older CPUs
kernels = ''  # 'plain': model.py alone; '': also the fast functions of kernels.py that pay on the device
flash = True  # cuDNN's FlashAttention where it can be: on NVIDIA GPUs, in bfloat16, with dropout = 0.0
remat = False  # less memory on GPU and TPU: compute activations again in the backward pass
loss_chunks = 1  # less memory: compute the logits of so many parts of the tokens one after the other
compile_cache = True  # keep compiled programs in ~/.cache/nanogpt-jax: the next start is faster
profile = False  # write a trace of five iterations to out_dir/profile, for XProf or Perfetto
mesh_data = -1  # devices along the data axis; -1: all that are left
mesh_tensor = 1  # devices that share each layer's matrices
fsdp = False  # split parameters over the data axis, too, as the optimizer's state always is
coordinator = ''  # HOST:PORT of process 0, if there are several; '': Slurm, Open MPI or a TPU pod knows
num_processes = 1
process_id = 0
exec(open(os.path.join(_here, 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------
# the rest of the imports: they take a second, and a typo is answered before that

import json
import math
from contextlib import nullcontext
from dataclasses import fields
from functools import partial

import jax
import numpy as np

import lora
from checkpoints import NO_BEST, Checkpoints, RunError, is_finished, save_base
from dataset import (bytes_per_token, cut_chats, eval_starts, load_batch, micro_batches, open_dataset, padded,
                     sequences, token_ids, tokenizer, train_starts, vocabulary)
from devices import (best_dtype, choose_kernels, compile_for, find_devices, keep_compiled, make_mesh, memory_errors,
                     profiled, side_by_side)
from engine import generate
from log import Log, log_in_to_wandb, start_wandb
from model import GPTConfig, build
from optim import get_lr, make_optimizer
from processes import StopSignal, check_alike, check_shared, join_processes, only_process_0_prints
from rundir import (adopt_shape, check_out_dir, clear_run, keep_small_files, lock_out_dir, open_model, run_settings,
                    save_config)
from step import (Setup, abstract_state, all_params, batch_sharding, compile_eval, compile_step, estimate_mfu,
                  eval_step, learned_share, num_params, on_mesh, state_creator, train_step)

# a resumed run keeps its own settings, except for those that are given now
with refuse(ValueError, OSError):
    patience = 120 if init_from == 'auto' else 0  # seconds to wait for a process that is just ending
    config, saved = run_settings(config, given, typed, replaced)
    globals().update(config)
    if wandb_log:
        log_in_to_wandb()
check(eval_interval=(1, 10**9), log_interval=(1, 10**9), eval_iters=(1, 10**6), keep_interval=(0, 10**12),
      sample_tokens=(0, 10**6), gradient_accumulation_steps=(1, 10**6), batch_size=(1, 10**6),
      learning_rate=(0, 10**3), embd_lr_scale=(0, 10**3), max_iters=(0, 10**12), max_minutes=(0, 10**9),
      max_skipped=(1, 10**9), weight_decay=(0, 10**3), beta1=(0, 0.999999), beta2=(0, 0.999999), grad_clip=(0, 10**6),
      warmup_iters=(0, 10**12), lr_decay_iters=(0, 10**12), min_lr=(0, 10**3), seed=(0, 2**32 - 1),
      mesh_data=(-1, 10**6), mesh_tensor=(1, 10**6), num_processes=(1, 10**6), process_id=(0, num_processes - 1),
      lr_schedule=('cosine', 'linear'), kernels=('', 'plain'))
origin = saved['config'].get('init_from', 'scratch') if init_from == 'resume' else init_from
if lora_rank and origin == 'scratch':
    warn(f'lora_rank = {lora_rank} on random weights shows how LoRA works, but adapters alone learn little')
if decay_lr and (min_lr > learning_rate or warmup_iters > lr_decay_iters):
    warn(f'the learning rate will not decay: min_lr = {min_lr}, learning_rate = {learning_rate}, '
         f'warmup_iters = {warmup_iters}, lr_decay_iters = {lr_decay_iters}')

# -----------------------------------------------------------------------------
# devices: one mesh, whatever there is

with refuse(ValueError, RuntimeError, OSError):
    join_processes(coordinator, num_processes, process_id)
    devices = find_devices(device)
    mesh = make_mesh(devices, mesh_data, mesh_tensor)
    run = out_dir if init_from == 'resume' else init_from
    data_folder = os.path.join(data_dir or os.path.join(_here, 'data'), dataset)
    check_alike(config | {'dtype': dtype or best_dtype(devices, kernels)}, (_here, '*.py'), (data_folder, '*.bin'),
                (data_folder, '*.json'), (run, '*.json'), (run, 'checkpoints/*/*.json'))
    if not eval_only:
        check_shared(out_dir)
if compile_cache:
    keep_compiled()
only_process_0_prints()

# -----------------------------------------------------------------------------
# data; and pretrained weights, which bring their model's arguments and vocabulary along

pretrained = None
with refuse(ValueError, OSError):
    if init_from not in ('scratch', 'resume'):
        pretrained, pretrained_meta, read_pretrained = open_model(init_from)
        config = adopt_shape(config, pretrained, typed, init_from)
        globals().update(config)
    data, meta = open_dataset(data_folder, block_size)
    if sample_tokens:
        tokenizer(meta['tokenizer'])  # is its vocabulary there?
    # (G, B): an iteration has G micro-batches of B sequences; and the same for an evaluation
    n_data = mesh.shape['data']
    batch_shape = micro_batches(gradient_accumulation_steps * batch_size, batch_size, n_data)
    eval_shape = micro_batches(eval_iters * batch_size, batch_size, n_data)
    eval_call = math.gcd(eval_shape[0], 20), eval_shape[1]  # 20 micro-batches are enough for one call

vocab_size, known, source = padded(meta['vocab_size']), meta, None
if pretrained:  # keeps its vocabulary size: a new row of zeros would be GPT-2's likeliest token
    vocab_size, known, source = pretrained.vocab_size, pretrained_meta, init_from
elif init_from == 'resume':
    vocab_size, known, source = saved['model_args']['vocab_size'], saved, f'the run in {out_dir}'
if vocabulary(meta) != vocabulary(known):
    fail(f'dataset = {dataset!r} has another vocabulary than {source}')
# LoRA holds the frozen matrices in the type in which they came
base_dtype = known.get('base_dtype', 'float32') if lora_rank else 'float32'
for split in data:
    if n := cut_chats(data[split], block_size):
        warn(f'{n:,} of the chats in {split} are longer than block_size = {block_size}: their ends are not seen')


def get_batch(split, starts):
    """None where the data turns out to be damaged. The run then saves and stops."""
    try:
        return load_batch(data[split], starts, block_size, meta['vocab_size'], batch_sharding(mesh))
    except ValueError as e:
        if jax.process_count() > 1:  # the others know nothing of it, and only all together can save
            raise RunError(e) from None
        stop.because(e)


# -----------------------------------------------------------------------------
# model and optimizer: everything is compiled before anything is written

dtype = dtype or best_dtype(devices, kernels)
model_args = {field.name: globals()[field.name] for field in fields(GPTConfig) if field.name != 'kernels'}
with refuse(ValueError):
    model_config, functions = choose_kernels(GPTConfig(**model_args), devices, flash, kernels)
    tx = make_optimizer(beta1, beta2, weight_decay, grad_clip, optimizer, embd_lr_scale)
setup = Setup(model_config, tx, mesh, fsdp, base_dtype)
abstract = abstract_state(setup)  # shapes and shardings, no values yet
from_file = None  # what a new run reads from a file, and does not create
if origin != 'scratch':
    from_file = 'base' if lora_rank else 'params'
create = state_creator(setup, seed, abstract, leave_out=from_file)

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
n_params = num_params(all_params(abstract))
n_frozen = sum(x.size for x in jax.tree.leaves(abstract['base']))
print(f'devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), '
      f"mesh data={mesh.shape['data']} tensor={mesh.shape['tensor']}")
print(f'number of parameters: {n_params / 1e6:.2f}M, matmuls in {dtype}{functions}')
print(f'tokens per iteration will be: {tokens_per_iter:,}')
if lora_rank:
    print(lora.table(abstract['params'], abstract['base'], model_config))
step = partial(train_step, setup=setup)
evaluate = partial(eval_step, config=model_config)
finished = init_from == 'resume' and not eval_only and is_finished(out_dir, checkpoint, max_iters)
if not (debug_nans or finished):  # else JAX compiles what is called
    print('compiling...', flush=True)
    with refuse(MemoryError, ValueError):
        create, step, evaluate = side_by_side(
            lambda: compile_for(mesh, create.lower()),
            lambda: step if eval_only else compile_step(setup, abstract, batch_shape, data['train'].dtype),
            lambda: compile_eval(setup, all_params(abstract), eval_call, data['train'].dtype))

# -----------------------------------------------------------------------------
# the state: the run's latest checkpoint, or a new one, perhaps with pretrained weights

found, lock = None, nullcontext()
with refuse(ValueError, OSError, MemoryError), memory_errors():
    if not eval_only:  # from here on out_dir is this process's own
        lock = lock_out_dir(out_dir, patience)
        check_out_dir(out_dir, init_from, overwrite)  # another process may have begun a run meanwhile
    if init_from == 'resume':
        checkpoints = Checkpoints(out_dir, keep_interval, read_only=eval_only)
        found = checkpoints.restore(abstract, dataset, checkpoint)
    if found:
        print(f'Resuming training from {out_dir}', flush=True)
        state, progress = found
    else:
        why = ' (the run was stopped before its first checkpoint)' if init_from == 'resume' else ''
        what = 'a new model from scratch' if origin == 'scratch' else f'from {origin}'
        print(f'Initializing {what}{why}', flush=True)
        state, progress = create(), dict(iter_num=0, wandb_id=None, **NO_BEST, best_dataset=dataset, tokens_seen=0)
        if from_file:
            read_pretrained = read_pretrained if pretrained else open_model(origin)[2]
            state[from_file] = read_pretrained(block_size, on_mesh(mesh, fsdp), base_dtype)

iter_num, wandb_id = progress['iter_num'], progress['wandb_id']
best_val_loss, best_iter = progress['best_val_loss'], progress['best_iter']


def save():
    checkpoints.save(iter_num, state, dict(iter_num=iter_num, wandb_id=wandb_id, best_val_loss=best_val_loss,
                                           best_iter=best_iter, best_dataset=progress['best_dataset'],
                                           tokens_seen=log.tokens_before(iter_num)))


# -----------------------------------------------------------------------------
# logging: terminal, log.csv, loss.png, wandb

wandb_run = None
if wandb_log and jax.process_index() == 0:
    with refuse(ValueError):
        wandb_run = start_wandb(wandb_project, wandb_run_name, config, wandb_id)
    wandb_id = wandb_run.id
stop = StopSignal(mesh, deadline=_started + 60 * (max_minutes or math.inf))
mfu = lambda tokens_per_s: estimate_mfu(model_config, n_params, n_frozen, tokens_per_s, devices)

# -----------------------------------------------------------------------------
# out_dir: all that could be refused has been, so now a new run takes the place of an old one

with refuse(ValueError, OSError):
    if init_from != 'resume' and not eval_only:
        clear_run(out_dir)
    if init_from != 'resume':
        checkpoints = Checkpoints(out_dir, keep_interval, read_only=eval_only)
    if not eval_only:
        if pretrained:
            keep_small_files(out_dir, pretrained_meta['folder'])
        save_config(out_dir, config | {'init_from': origin}, model_args, meta | {'base_dtype': base_dtype})
        if lora_rank and not found:
            save_base(out_dir, state['base'])
    log = Log(out_dir, iter_num, max_iters, log_interval, tokens_per_iter, mfu, max_skipped, stop, wandb_run,
              writes=not eval_only, tokens_seen=progress['tokens_seen'])
with log.harmless('bits per byte'):
    starts = eval_starts(data['val'], eval_shape, block_size).reshape(-1, *eval_call)
    log.bytes_per_token = bytes_per_token(data['val'], starts, block_size, meta['tokenizer'])


def estimate_loss():
    """The mean loss of each split over eval_iters batches; None if asked to stop meanwhile."""
    means = {}
    for split in 'train', 'val':
        losses, shares = [], []
        starts = eval_starts(data[split], eval_shape, block_size).reshape(-1, *eval_call)
        for i, part in enumerate(starts):
            log.progress(f'evaluating on {split}, {i} of {len(starts)}')
            tokens = get_batch(split, part)
            if stop.received():  # a resumed run evaluates again
                return None
            losses.append(float(evaluate(all_params(state), tokens)))
            shares.append(float(learned_share(tokens)))
        means[split] = np.mean(losses) / np.mean(shares)
    log.progress('')
    return means


def show_sample():
    """Prints the beginning of the validation data and how the model goes on."""
    _, decode, eot = tokenizer(meta['tokenizer'])
    prompt = token_ids(sequences(data['val'], np.zeros(1, int), min(16, block_size) - 1))
    model = build(model_config, all_params(state))
    ids = generate(model, prompt, sample_tokens, temperature=0.8, top_k=200, key=key, eot=eot,
                   n_vocab=meta['vocab_size'])
    log.say(f'--- a sample at step {iter_num}\n{for_terminal(decode(ids[0].tolist()))}\n---')


# -----------------------------------------------------------------------------
# the loop

key, first_iter = jax.random.key(seed), iter_num
# debug_nans: run operation by operation, so that the traceback ends at the one that made the NaN. Set it for this
# thread: some operations suspend it for a moment, and JAX then forgets a global setting for what it has compiled.
with (refuse(RunError, MemoryError, code=1), lock, stop, memory_errors(), checkpoints.disk_errors(), log,
      jax.debug_nans(debug_nans or jax.config.jax_debug_nans), jax.disable_jit(debug_nans)):
    while iter_num <= max_iters or eval_only:

        # the learning rate of this iteration
        lr = learning_rate
        if decay_lr:
            lr = get_lr(iter_num, learning_rate, warmup_iters, lr_decay_iters, min_lr, lr_schedule)

        # once in a long while: a checkpoint that stays for good
        if keep_interval and iter_num % keep_interval == 0 and iter_num > first_iter and not eval_only:
            with log.paused():
                save()

        # once in a while: save, evaluate the loss on train and val, and show what was learned
        if iter_num % eval_interval == 0 or eval_only:
            with log.paused():
                if always_save_checkpoint and iter_num > first_iter and not eval_only:
                    save()
                losses = estimate_loss()
                if losses is None:
                    break
                log.evaluation(iter_num, losses, lr)
                if sample_tokens:
                    show_sample()
                if eval_only:
                    break
                if losses['val'] < best_val_loss and iter_num > 0:
                    best_val_loss, best_iter = losses['val'], iter_num
                    save()

        # every step: forward, backward, update; while the devices work, log the step before
        starts = train_starts(data['train'], batch_shape, block_size, seed, iter_num)
        tokens = get_batch('train', starts)
        if tokens is None:
            break
        with profiled(iter_num - first_iter, max_iters + 1 - first_iter, profile and os.path.join(out_dir, 'profile')):
            state, metrics = step(state, tokens, lr, key)
        log.iteration(iter_num, lr, metrics)
        checkpoints.note_best()
        iter_num += 1
        if stop.received():
            break

    # the end, or the end for now
    log.store()
    if not eval_only:
        log.say(f'saving checkpoint to {out_dir}')
        save()
        checkpoints.wait()
        log.plot()

log.summary(iter_num)
if best_iter:
    log.say(f'best validation loss {best_val_loss:.4f} at step {best_iter}; python sample.py --out_dir={out_dir}')
go_on = '' if eval_only else f'; go on with python train.py --init_from=resume --out_dir={out_dir}'
if stop.why:
    fail(f'{stop.why}{go_on}', code=1)
if eval_only and losses:  # the last line is for other programs
    bits = losses['val'] / math.log(2) / log.bytes_per_token if log.bytes_per_token else None
    log.say(json.dumps(dict(iter=iter_num, dataset=dataset, train_loss=losses['train'], val_loss=losses['val'],
                            bits_per_byte=bits)))
if stop.number:
    log.say(f'stopped by {stop.name}{go_on}')
    sys.exit(128 + stop.number)
