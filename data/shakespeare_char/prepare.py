"""
Tiny Shakespeare, character by character: nanoGPT's first dataset.

    python data/shakespeare_char/prepare.py

Reads input.txt in this folder, and downloads it first (1 MB) if it is not there. Writes train.bin
(uint16 ids of the first 90% of the text), val.bin (the rest) and meta.json.
"""
import argparse
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

here = Path(__file__).resolve().parent
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

source = here / 'input.txt'
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

chars = ''.join(sorted(set(text)))
id_of = {c: i for i, c in enumerate(chars)}
ids = np.array([id_of[c] for c in text], '<u2')
n = int(0.9 * len(ids))
assert (len(chars), n, len(ids) - n) == (65, 1_003_854, 111_540)

# Write every file under a temporary name and rename val.bin last: a run that is interrupted never
# leaves half a dataset that looks complete.
(here / 'val.bin').unlink(missing_ok=True)
ids[:n].tofile(here / 'train.bin.tmp')
ids[n:].tofile(here / 'val.bin.tmp')
meta = {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}
(here / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
for name in ('meta.json', 'train.bin', 'val.bin'):
    os.replace(here / f'{name}.tmp', here / name)
print(f'vocab size: {len(chars)}\ntrain has {n:,} tokens\nval has {len(ids) - n:,} tokens')
