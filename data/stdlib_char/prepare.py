"""
The embedded dataset: the source code of Python's standard library, character by character.

    python data/stdlib_char/prepare.py

It is read from the interpreter that runs this script, so it needs no network. Tests, site-packages and files with
characters outside ASCII are left out, and code is indented with tabs. Writes train.bin, val.bin (uint16 ids) and meta.json beside this script; one file
in ten, chosen by the hash of its name, goes to val.
"""
import json
import os
import re
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

here = Path(__file__).resolve().parent
stdlib = Path(sysconfig.get_paths()['stdlib'])
skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}

text = {'train': [], 'val': []}
files = sorted(p for p in stdlib.rglob('*.py') if not skip & set(p.relative_to(stdlib).parts))
for path in tqdm(files, desc='reading', disable=None):
    name = path.relative_to(stdlib).as_posix()
    try:
        source = path.read_text(encoding='ascii')
    except UnicodeDecodeError:
        continue
    # every four spaces of indentation become a tab: a small model's context is short, and a fifth of it was spaces
    source = re.sub(r'^(?: {4})+', lambda m: '\t' * (len(m[0]) // 4), source, flags=re.MULTILINE)
    text['val' if zlib.crc32(name.encode()) % 10 == 0 else 'train'].append(source)
text = {split: ''.join(sources) for split, sources in text.items()}
if min(map(len, text.values())) < 100_000:
    sys.exit(f'prepare.py: error: {stdlib} holds too little Python source; run this with a full Python installation')

chars = ''.join(sorted(set(text['train'] + text['val'])))
id_of = np.zeros(128, '<u2')
id_of[[ord(c) for c in chars]] = np.arange(len(chars))

# Written under other names first, and val.bin last: a run that breaks off leaves no half dataset that looks whole.
(here / 'val.bin').unlink(missing_ok=True)
for split in ('train', 'val'):
    ids = id_of[np.frombuffer(text[split].encode('ascii'), np.uint8)]
    ids.tofile(here / f'{split}.bin.tmp')
    print(f'{split} has {len(ids):,} tokens')
meta = {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}
(here / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
for name in ('meta.json', 'train.bin', 'val.bin'):
    os.replace(here / f'{name}.tmp', here / name)
print(f'vocab size: {len(chars)}')
