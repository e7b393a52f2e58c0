"""
Writes text with a model that train.py has trained, or with GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1    # streams on a terminal
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=3
    python sample.py --init_from=DIR --chat     # a talk with a model that can chat; Ctrl-C ends an answer, or the talk
"""
import os
import sys

# -----------------------------------------------------------------------------
init_from = 'resume'  # 'resume': the run in out_dir; 'gpt2', ..., 'Qwen/Qwen3-0.6B', ..., or a path: a run or a model
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, 'latest', or the number of one
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file; may hold '<|endoftext|>' if the tokenizer has it
chat = False  # talk with the model in the terminal; its chat template writes what it reads
system = ''  # chat: what the model is told before the talk, such as 'You are a pirate.'
num_samples = 10  # number of samples to draw
max_new_tokens = 500  # number of tokens generated in each sample
temperature = 0.8  # 1.0: as trained; below: less random; above: more random; 0.0: always the likeliest token
top_k = 200  # keep only the top_k likeliest tokens; 0: all
top_p = 1.0  # then keep only the likeliest tokens that together reach this probability
block_size = 0  # how much of the text the model sees; 0: as much as it came with. Rotary positions may take more
seed = 1337
device = ''  # 'cpu', 'gpu', 'gpu:1' or 'tpu'; '': the best that JAX finds
dtype = ''  # 'float32' or 'bfloat16'; '': as trained, but always float32 on a CPU
kernels = ''  # 'plain': model.py alone, which is slow; '': a key-value cache and the fast functions of kernels.py
compile_cache = True  # keep compiled programs in ~/.cache/nanogpt-jax: the next start is faster
_recipes_of = 'train.py'  # a recipe for it gives out_dir, device, dtype and seed
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

check(num_samples=(1, 10**6), max_new_tokens=(1, 10**9), temperature=(0, 10**6), top_k=(0, 10**9),
      block_size=(0, 10**9), seed=(0, 2**32 - 1), kernels=('', 'plain'))
if not checkpoint.isdecimal():
    check(checkpoint=('best', 'latest'))
if not 0 < top_p <= 1:
    fail(f'top_p = {top_p}: must be above 0 and at most 1')

for key in given & ({'start', 'num_samples'} if chat else {'system'}):
    fail(f'{key} = {config[key]!r}: {"a talk has none" if chat else "it begins a talk, so add --chat"}')

from dataclasses import replace

import jax
import numpy as np
from tqdm import tqdm

from dataset import tokenizer
from devices import choose_kernels, find_devices, free_memory, keep_compiled
from engine import rows_that_fit, stream
from model import build
from rundir import check_context, open_model, open_run

with refuse(ValueError, OSError):
    devices = find_devices(device)[:1]
    if compile_cache:
        keep_compiled()
    config, meta, read = open_run(out_dir, checkpoint) if init_from == 'resume' else open_model(init_from, checkpoint)
    check_context(block_size, config, init_from if init_from != 'resume' else out_dir)
    config = replace(config, dtype=dtype or config.dtype, block_size=block_size or config.block_size)
    config = choose_kernels(config, devices, flash=False, kernels=kernels)[0]
    encode, decode, eot = tokenizer(meta['tokenizer'])

# a talk: each answer goes on from all that was said
if chat:
    from chat import talk
    with refuse(ValueError, OSError):
        model = build(config, read(config.block_size))

    def write(ids, ends):
        ids = ids[-config.block_size:]
        n = 2**(len(ids) + max_new_tokens - 1).bit_length() - len(ids)  # few lengths, so that few programs are compiled
        made = 0
        for part in stream(model, np.array([ids]), n, temperature=temperature, top_k=top_k, top_p=top_p,
                           key=jax.random.fold_in(jax.random.key(seed), len(ids)), eot=next(iter(ends), None),
                           n_vocab=meta['vocab_size'], chunk=8):
            part = np.asarray(part)[0, :max_new_tokens - made].tolist()
            made += len(part)
            last = next((i for i, id in enumerate(part) if id in ends), None)
            yield part[:last]
            if last is not None or made == max_new_tokens:
                return

    say = lambda text: print(for_terminal(text), end='', flush=True)
    with refuse(ValueError):
        talk(meta, write, say, max(config.block_size - max_new_tokens, config.block_size // 2), system)
    sys.exit()

# encode the beginning of the prompt
if start.startswith('FILE:'):
    try:
        with refuse(OSError), open(start[5:], encoding='utf-8-sig') as f:
            text = f.read(10**8)
            if f.read(1):
                fail(f'{start[5:]} holds more than 100 million characters: the model sees the last '
                     f'{config.block_size} tokens')
    except UnicodeDecodeError:
        fail(f'{start[5:]}: not UTF-8 text')
    start = text
chars = meta['tokenizer'].get('chars', start)  # a tokenizer of characters may have no newline
if start not in chars and 'start' not in given:
    start = chars[0]
    warn(f'the model knows no newline to start from, so start = {start!r}')
with refuse(ValueError):
    prompt = encode(start)
if not prompt:
    fail('start is empty: give at least one character to go on from')
if len(prompt) > config.block_size:
    warn(f'the prompt has {len(prompt)} tokens, of which the model sees the last {config.block_size}')

# run generation: as many samples at a time as fit into the memory, and a single one is printed as it is made
with refuse(ValueError, OSError):
    model = build(config, read(config.block_size))
rows = 10
if config.kernels != 'plain':
    rows = rows_that_fit(config, len(prompt), max_new_tokens, 0.8 * free_memory(devices[0]))
rows = min(rows, num_samples)
live = rows == num_samples == 1 and sys.stdout.isatty()
idx = np.array([prompt[-config.block_size:]] * rows)
text_of = lambda ids: decode(prompt + (ids[:ids.index(eot)] if eot in ids else ids))
total = max_new_tokens * -(-num_samples // rows)
with tqdm(total=total, unit='tok', leave=False, disable=True if live else None) as bar:
    for first in range(0, num_samples, rows):
        parts = []
        shown = ''
        for part in stream(model, idx[:num_samples - first], max_new_tokens, first=first, temperature=temperature,
                           top_k=top_k, top_p=top_p, key=jax.random.key(seed), eot=eot, n_vocab=meta['vocab_size'],
                           chunk=8 if live else 50):
            parts.append(np.asarray(part))
            bar.update(part.shape[1])
            text = text_of(np.concatenate(parts, axis=1)[0].tolist()) if live else ''
            if live and not text.endswith('\ufffd'):  # half a character: the other half is in the next part
                print(for_terminal(text[len(shown):]), end='', flush=True)
                shown = text
        for ids in np.concatenate(parts, axis=1).tolist():
            tqdm.write(for_terminal(text_of(ids)[len(shown):]))
            tqdm.write('---------------')
