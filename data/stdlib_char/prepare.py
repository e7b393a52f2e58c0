"""
The dataset that you already have: the source code of Python's standard library, character by character.

    python data/stdlib_char/prepare.py

Reads the standard library of the Python that runs this script, so it needs no network. It skips tests, site-packages
and files with characters outside ASCII, and indents the code with tabs. Writes train.bin and val.bin (uint16 ids) and
meta.json in this folder. One file in ten, chosen by the hash of its name, goes to val.
"""
import re
import sys
import sysconfig
import zlib
from pathlib import Path

from tqdm import tqdm

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from common import char_tokenizer, fail, new_dataset, options

out = options(__doc__).parse_args().data_dir / here.name
stdlib = Path(sysconfig.get_paths()['stdlib'])
skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
train_text, val_text = [], []
paths = sorted(p for p in stdlib.rglob('*.py') if not skip & set(p.relative_to(stdlib).parts))
for path in tqdm(paths, desc='reading', disable=None):
    try:
        source = path.read_text(encoding='ascii')
    except UnicodeDecodeError:
        continue
    # a tab for every four spaces of indentation: they were a fifth of the text, and a small model's context is short
    source = re.sub(r'^(?: {4})+', lambda m: '\t' * (len(m[0]) // 4), source, flags=re.MULTILINE)
    name = path.relative_to(stdlib).as_posix()
    (val_text if zlib.crc32(name.encode()) % 10 == 0 else train_text).append(source)
train_text, val_text = ''.join(train_text), ''.join(val_text)
if min(len(train_text), len(val_text)) < 100_000:
    fail(f'{stdlib} holds too little Python source; run this with a full Python installation')

encode, meta = char_tokenizer(set(train_text + val_text))
with new_dataset(out, meta) as (train, val):
    train.write(encode(train_text))
    val.write(encode(val_text))
