"""
Writes text with a model that train.py has trained.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1    # streams on a terminal
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
"""
import os
import sys

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, or 'latest'
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file, '<|endoftext|>' is understood where the tokenizer has it
num_samples = 10  # number of samples to draw
max_new_tokens = 500  # number of tokens generated in each sample
temperature = 0.8  # 1.0: as trained; below: less random; above: more random; 0.0: always the likeliest token
top_k = 200  # keep only the top_k likeliest tokens; 0: all
top_p = 1.0  # then keep only the likeliest tokens that together reach this probability
seed = 1337
device = ''  # 'cpu', 'gpu' or 'tpu'; '': the best that JAX finds
dtype = ''  # of activations, 'float32' or 'bfloat16'; '': as trained
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
# -----------------------------------------------------------------------------

check(num_samples=(1, 10**6), max_new_tokens=(1, 10**9), temperature=(0, 10**6), top_k=(0, 10**9), seed=(0, 2**32 - 1))
if not 0 < top_p <= 1:
    fail(f'top_p = {top_p}: must be above 0 and at most 1')
if checkpoint not in ('best', 'latest'):
    fail(f"checkpoint = {checkpoint!r}: must be 'best' or 'latest'")
if not os.path.exists(os.path.join(out_dir, 'config.json')):
    fail(f'out_dir = {out_dir!r} holds no run; train one with train.py')

import jax
import numpy as np
from tqdm import tqdm

from model import find_devices, read_json, stream
from rundir import load_run, tokenizer

with refuse(ValueError):
    find_devices(device)

# encode the beginning of the prompt
with refuse(ValueError):
    run = read_json(os.path.join(out_dir, 'config.json'))
    encode, decode, eot = tokenizer(run['tokenizer'])
if start.startswith('FILE:'):
    with refuse(OSError), open(start[5:], encoding='utf-8') as f:
        try:
            start = f.read()
        except UnicodeDecodeError:
            fail(f'{start[5:]}: not UTF-8 text')
with refuse(ValueError):
    prompt = encode(start)
if not prompt:
    fail('start is empty: give at least one character to go on from')
block_size = run['model_args']['block_size']
if len(prompt) > block_size:
    print(f'warning: the prompt has {len(prompt)} tokens, of which the model sees the last {block_size}', file=sys.stderr)

# run generation: all samples at once, or a single one as it is made
with refuse(ValueError):
    model = load_run(out_dir, checkpoint, **({'dtype': dtype} if dtype else {}))
live = num_samples == 1 and sys.stdout.isatty()
parts, shown = [np.array([prompt] * num_samples)], ''
with tqdm(total=max_new_tokens, unit='tok', leave=False, disable=True if live else None) as bar:
    for part in stream(model, parts[0], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                       key=jax.random.key(seed), eot=eot, n_vocab=run['vocab_size'], chunk=8 if live else 50):
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
