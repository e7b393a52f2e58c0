"""
Tiny Shakespeare in GPT-2's byte pair encoding, to finetune GPT-2 on.

    python data/shakespeare/prepare.py

Reads input.txt in this folder or in data/shakespeare_char, and downloads it first (1 MB) if it is
in neither. tiktoken downloads GPT-2's vocabulary once. Writes train.bin (uint16 ids of the first
90% of the text), val.bin (the rest) and meta.json.
"""
import argparse
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np
import tiktoken

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

here = Path(__file__).resolve().parent
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

try:
    enc = tiktoken.get_encoding('gpt2')
except Exception as e:  # an error of the network, or a damaged cache
    sys.exit(f"prepare.py: error: could not load GPT-2's vocabulary ({type(e).__name__}): on a machine with a network, "
             'run this with TIKTOKEN_CACHE_DIR=DIR, then copy DIR here and set TIKTOKEN_CACHE_DIR to it')
candidates = [here / 'input.txt', here.parent / 'shakespeare_char' / 'input.txt']
source = next((path for path in candidates if path.exists()), candidates[0])
if not source.exists():
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except OSError as e:
        sys.exit(f'prepare.py: error: could not download {url} ({e}): '
                 f'save it as {source} and run this again')
    (here / 'input.txt.tmp').write_bytes(content)
    os.replace(here / 'input.txt.tmp', source)
if hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
    sys.exit(f'prepare.py: error: {source} is not the text at {url}: delete it and run this again to '
             'download it (for a text of your own, use data/text/prepare.py)')
text = source.read_text(encoding='utf-8')

n = int(0.9 * len(text))
splits = {'train': enc.encode_ordinary(text[:n]), 'val': enc.encode_ordinary(text[n:])}
assert [len(ids) for ids in splits.values()] == [301_966, 36_059]

# Write every file under a temporary name and rename val.bin last: a run that is interrupted never
# leaves half a dataset that looks complete.
(here / 'val.bin').unlink(missing_ok=True)
for split, ids in splits.items():
    np.array(ids, '<u2').tofile(here / f'{split}.bin.tmp')
    print(f'{split} has {len(ids):,} tokens')
meta = {'vocab_size': enc.n_vocab, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
(here / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
for name in ('meta.json', 'train.bin', 'val.bin'):
    os.replace(here / f'{name}.tmp', here / name)
