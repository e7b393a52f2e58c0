"""
Writes text with a model that train.py has trained, or with GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1    # streams on a terminal
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=3
"""
import os
import sys

# -----------------------------------------------------------------------------
init_from = 'resume'  # 'resume': the run in out_dir; 'gpt2', 'gpt2-medium', ..., or a path: a run or GPT-2's files
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, 'latest', or the number of one
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file; may hold '<|endoftext|>' if the tokenizer has it
num_samples = 10  # number of samples to draw
max_new_tokens = 500  # number of tokens generated in each sample
temperature = 0.8  # 1.0: as trained; below: less random; above: more random; 0.0: always the likeliest token
top_k = 200  # keep only the top_k likeliest tokens; 0: all
top_p = 1.0  # then keep only the likeliest tokens that together reach this probability
seed = 1337
device = ''  # 'cpu', 'gpu', 'gpu:1' or 'tpu'; '': the best that JAX finds
dtype = ''  # 'float32' or 'bfloat16'; '': as trained, but always float32 on a CPU
kernels = ''  # 'plain': model.py alone, which is slow; '': a key-value cache and the fast functions of kernels.py
compile_cache = True  # keep compiled programs in ~/.cache/nanogpt-jax: the next start is faster
_recipes_of = 'train.py'  # a recipe for it gives out_dir, device, dtype and seed
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

check(num_samples=(1, 10**6), max_new_tokens=(1, 10**9), temperature=(0, 10**6), top_k=(0, 10**9),
      seed=(0, 2**32 - 1), kernels=('', 'plain'))
if not checkpoint.isdecimal():
    check(checkpoint=('best', 'latest'))
if not 0 < top_p <= 1:
    fail(f'top_p = {top_p}: must be above 0 and at most 1')

from dataclasses import replace

import jax
import numpy as np
from tqdm import tqdm

from dataset import tokenizer
from devices import choose_kernels, find_devices, keep_compiled
from engine import stream
from model import build
from rundir import open_model, open_run

with refuse(ValueError, OSError):
    devices = find_devices(device)[:1]
    if compile_cache:
        keep_compiled()
    config, meta, read = open_run(out_dir, checkpoint) if init_from == 'resume' else open_model(init_from, checkpoint)
    config = replace(config, dtype=dtype or config.dtype)
    config = choose_kernels(config, devices, flash=False, kernels=kernels)[0]
    encode, decode, eot = tokenizer(meta['tokenizer'])

# encode the beginning of the prompt
if start.startswith('FILE:'):
    try:
        with refuse(OSError), open(start[5:], encoding='utf-8-sig') as f:
            start = f.read()
    except UnicodeDecodeError:
        fail(f'{start[5:]}: not UTF-8 text')
with refuse(ValueError):
    prompt = encode(start)
if not prompt:
    fail('start is empty: give at least one character to go on from')
if len(prompt) > config.block_size:
    warn(f'the prompt has {len(prompt)} tokens, of which the model sees the last {config.block_size}')

# run generation: all samples at once, and a single one is printed as it is made
with refuse(ValueError, OSError):
    model = build(config, read())
live = num_samples == 1 and sys.stdout.isatty()
parts, shown = [np.array([prompt] * num_samples)], ''
with tqdm(total=max_new_tokens, unit='tok', leave=False, disable=True if live else None) as bar:
    for part in stream(model, parts[0], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                       key=jax.random.key(seed), eot=eot, n_vocab=meta['vocab_size'], chunk=8 if live else 50):
        parts.append(np.asarray(part))
        bar.update(part.shape[1])
        text = decode(np.concatenate(parts, axis=1)[0].tolist()) if live else ''
        if live and not text.endswith('\ufffd'):  # half a character: the other half is in the next part
            print(text[len(shown):], end='', flush=True)
            shown = text
for ids in np.concatenate(parts, axis=1).tolist():
    if eot in ids[len(prompt):]:
        ids = ids[:ids.index(eot, len(prompt))]
    print(decode(ids)[len(shown):])
    print('---------------')
