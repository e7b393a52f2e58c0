"""
The dataset that you already have: the source code of Python's standard library, character by
character.

    python data/stdlib_char/prepare.py

Reads the standard library of the Python that runs this script, so it needs no network. It skips
tests, site-packages and files with characters outside ASCII, and indents the code with tabs. Writes
train.bin and val.bin (uint16 ids) and meta.json in this folder. One file in ten, chosen by the hash
of its name, goes to val.
"""
import argparse
import json
import os
import re
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

here = Path(__file__).resolve().parent
stdlib = Path(sysconfig.get_paths()['stdlib'])
skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}

sources = {'train': [], 'val': []}
paths = sorted(p for p in stdlib.rglob('*.py') if not skip & set(p.relative_to(stdlib).parts))
for path in tqdm(paths, desc='reading', disable=None):
    name = path.relative_to(stdlib).as_posix()
    try:
        source = path.read_text(encoding='ascii')
    except UnicodeDecodeError:
        continue
    # Turn every four spaces of indentation into a tab: a fifth of the text was such spaces, and the
    # context of a small model is short.
    source = re.sub(r'^(?: {4})+', lambda m: '\t' * (len(m[0]) // 4), source, flags=re.MULTILINE)
    sources['val' if zlib.crc32(name.encode()) % 10 == 0 else 'train'].append(source)
text = {split: ''.join(sources[split]) for split in sources}
if min(map(len, text.values())) < 100_000:
    sys.exit(f'prepare.py: error: {stdlib} holds too little Python source; '
             'run this with a full Python installation')

chars = ''.join(sorted(set(text['train'] + text['val'])))
id_of = np.zeros(128, '<u2')  # indexed by ASCII code
id_of[[ord(c) for c in chars]] = np.arange(len(chars))

# Write every file under a temporary name and rename val.bin last: a run that is interrupted never
# leaves half a dataset that looks complete.
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
