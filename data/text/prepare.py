"""
Your own text files, by character or in GPT-2's byte pair encoding:

    python data/text/prepare.py notes.txt more/*.md                               # into data/text
    python data/text/prepare.py books/*.txt --tokenizer=gpt2 --name=books         # into data/books

Then train with `python train.py config/train_shakespeare_char.py --dataset=text --out_dir=out-text`. Writes train.bin
and val.bin (uint16 ids; the last tenth of the text is val) and meta.json. Files are read a megabyte at a time, so memory
stays flat. With gpt2 each file ends with <|endoftext|>, with char each file is one after the other.
"""
import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('files', nargs='+', type=Path, help='UTF-8 text files, in this order')
parser.add_argument('--tokenizer', choices=['char', 'gpt2'], default='char')
parser.add_argument('--name', default='text', help='the dataset: what is written goes to data/NAME')
parser.add_argument('--val_fraction', type=float, default=0.1, help='how much of the end is held out')
args = parser.parse_args()
if not re.fullmatch(r'[\w.-]*\w', args.name):
    parser.error(f'--name={args.name}: a plain folder name, such as my_notes')
if not 0 < args.val_fraction < 1:
    parser.error(f'--val_fraction={args.val_fraction}: a share between 0 and 1, such as 0.1')
for path in args.files:
    if not path.is_file():
        parser.error(f'{path}: no such file')


def chunks(path, size=2**20):
    """The text of a file in pieces of about `size` characters that end where a line does. BPE never merges across a
    newline between two visible characters, so encoding piece by piece gives the very ids of the whole text."""
    rest = ''
    with open(path, encoding='utf-8-sig') as f:
        try:
            while piece := f.read(size):
                rest += piece
                if (cut := max((m.end() for m in re.finditer(r'\S\n(?=\S)', rest)), default=0)) or len(rest) > 16 * size:
                    yield rest[:cut or len(rest)]
                    rest = rest[cut or len(rest):]
        except UnicodeDecodeError as e:
            parser.error(f'{path}: not UTF-8 text ({e.reason} near byte {f.buffer.tell():,})')
    if rest:
        yield rest


def progress(label):
    """Every piece of every file, under a bar that counts bytes."""
    with tqdm(desc=label, total=sum(p.stat().st_size for p in args.files), unit='B', unit_scale=True, disable=None) as bar:
        for path in args.files:
            for piece in chunks(path):
                yield path, piece
                bar.update(len(piece.encode()))


# The tokenizer: encode(piece) gives the ids of a piece of text, `end` closes each file.
if args.tokenizer == 'char':
    chars = ''.join(sorted(set().union(*(set(piece) for _, piece in progress('finding characters')))))
    id_of = np.zeros(0x110000, np.uint32)
    id_of[[ord(c) for c in chars]] = np.arange(len(chars))
    meta = {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}
    end = []
    encode = lambda text: id_of[np.frombuffer(text.encode('utf-32-le'), '<u4')]
else:
    import tiktoken
    try:
        enc = tiktoken.get_encoding('gpt2')
    except Exception as e:  # requests' errors, or a damaged cache
        parser.error(f'no GPT-2 vocabulary ({type(e).__name__}): where there is a network, run this with '
                     'TIKTOKEN_CACHE_DIR=DIR, then copy DIR here and set TIKTOKEN_CACHE_DIR to it')
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
    end = [enc.eot_token]
    encode = enc.encode_ordinary
if meta['vocab_size'] > 2**16:
    parser.error(f'{meta["vocab_size"]:,} different characters do not fit uint16 ids; use --tokenizer=gpt2')

# Written under other names first, and val.bin last: a run that breaks off leaves no half dataset that looks whole.
out = Path(__file__).resolve().parent.parent / args.name
out.mkdir(exist_ok=True)
previous = None
with open(out / 'train.bin.tmp', 'wb') as f:
    for path, piece in progress('encoding'):
        if previous not in (None, path):
            np.array(end, '<u2').tofile(f)
        np.asarray(encode(piece)).astype('<u2').tofile(f)
        previous = path
    np.array(end if previous else [], '<u2').tofile(f)
n = (out / 'train.bin.tmp').stat().st_size // 2
n_val = int(n * args.val_fraction)
if min(n_val, n - n_val) < 2:
    (out / 'train.bin.tmp').unlink()
    parser.error(f'{n:,} tokens are too few to split into train and val')
with open(out / 'train.bin.tmp', 'r+b') as train, open(out / 'val.bin.tmp', 'wb') as val:
    train.seek(2 * (n - n_val))
    shutil.copyfileobj(train, val)
    train.truncate(2 * (n - n_val))
(out / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
(out / 'val.bin').unlink(missing_ok=True)
for name in ('meta.json', 'train.bin', 'val.bin'):
    os.replace(out / f'{name}.tmp', out / name)
print(f'vocab size: {meta["vocab_size"]:,}\ntrain has {n - n_val:,} tokens\nval has {n_val:,} tokens')
print(f'now in {out}; train with --dataset={args.name}')
