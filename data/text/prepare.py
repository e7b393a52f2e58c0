"""
Your own text files as a dataset, character by character or in GPT-2's byte pair encoding:

    python data/text/prepare.py notes.txt more/*.md                          # into data/text
    python data/text/prepare.py books/*.txt --tokenizer=gpt2 --name=books    # into data/books

Then train with

    python train.py config/train_shakespeare_char.py --dataset=text --out_dir=out-text

Writes train.bin and val.bin (uint16 ids; val is the last tenth of the text) and meta.json. With
gpt2, <|endoftext|> follows each file; with char, the files are simply joined. The script reads a
megabyte at a time, so its memory use does not grow with your files.
"""
import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('files', nargs='+', type=Path, help='UTF-8 text files, read in this order')
parser.add_argument('--tokenizer', choices=['char', 'gpt2'], default='char',
                    help="what a token is: a character, or a piece of GPT-2's byte pair encoding (char)")
parser.add_argument('--name', default='text', help='write the dataset to data/NAME (text)')
parser.add_argument('--val_fraction', type=float, default=0.1,
                    help='the share of the tokens, from the end, that goes to val (0.1)')
parser.add_argument('--overwrite', action='store_true', help='replace a dataset that is in data/NAME')
args = parser.parse_args()
if not re.fullmatch(r'[\w.-]*\w', args.name):
    parser.error(f'--name={args.name}: use a plain folder name, such as my_notes')
if not 0 < args.val_fraction < 1:
    parser.error(f'--val_fraction={args.val_fraction}: use a number between 0 and 1, such as 0.1')
for path in args.files:
    if path.is_dir():
        parser.error(f'{path} is a folder: give its files, such as {path / "*.txt"}')
    if not path.is_file():
        parser.error(f'{path}: no such file')
out = Path(__file__).resolve().parent.parent / args.name
if args.name != 'text' and not args.overwrite:  # data/text is this script's own
    if (out / 'prepare.py').exists():
        parser.error(f'--name={args.name}: {out} has a prepare.py of its own; choose another name, or add --overwrite')
    if (out / 'val.bin').exists():
        parser.error(f'--name={args.name}: {out} holds a dataset; choose another name, or add --overwrite')


def pieces_of(path, size=2**20):
    """Yields the text of a file in pieces of about `size` characters.

    A cut is always after a newline between two visible characters. GPT-2's byte pair encoding never
    merges across such a newline, so the pieces get the same ids as the whole text."""
    rest = ''
    with open(path, encoding='utf-8-sig') as f:
        try:
            while block := f.read(size):
                rest += block
                cut = max((m.end() for m in re.finditer(r'\S\n(?=\S)', rest)), default=0)
                if cut == 0 and len(rest) > 16 * size:
                    cut = len(rest)  # no such newline in 16 blocks: cut anyway, to save memory
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
        except UnicodeDecodeError as e:
            parser.error(f'{path}: not UTF-8 text ({e.reason} near byte {f.buffer.tell():,})')
    if rest:
        yield rest


def all_pieces(label):
    """Yields (path, piece) for every piece of every file, with a progress bar that counts bytes."""
    total = sum(path.stat().st_size for path in args.files)
    with tqdm(desc=label, total=total, unit='B', unit_scale=True, disable=None) as bar:
        for path in args.files:
            for piece in pieces_of(path):
                yield path, piece
                bar.update(len(piece.encode()))


# the tokenizer: `encode` turns a piece of text into ids, and the ids in `end` follow each file
if args.tokenizer == 'char':
    seen = set()
    for _, piece in all_pieces('finding characters'):
        seen.update(piece)
    if len(seen) > 2**16:
        parser.error(f'{len(seen):,} different characters do not fit uint16 ids; use --tokenizer=gpt2')
    chars = ''.join(sorted(seen))
    id_of = np.zeros(0x110000, '<u2')  # indexed by Unicode code point
    id_of[[ord(c) for c in chars]] = np.arange(len(chars))
    meta = {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}
    end = []
    encode = lambda text: id_of[np.frombuffer(text.encode('utf-32-le'), '<u4')]
else:
    import tiktoken
    try:
        enc = tiktoken.get_encoding('gpt2')
    except Exception as e:  # an error of the network, or a damaged cache
        parser.error(f"could not load GPT-2's vocabulary ({type(e).__name__}): on a machine with a network, "
                     'run this with TIKTOKEN_CACHE_DIR=DIR, then copy DIR here and set TIKTOKEN_CACHE_DIR to it')
    meta = {'vocab_size': enc.n_vocab, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
    end = [enc.eot_token]
    encode = enc.encode_ordinary

# Write every file under a temporary name and rename val.bin last: a run that is interrupted never
# leaves half a dataset that looks complete.
out.mkdir(exist_ok=True)
previous = None
with open(out / 'train.bin.tmp', 'wb') as f:
    for path, piece in all_pieces('encoding'):
        if previous not in (None, path):  # a new file begins
            np.array(end, '<u2').tofile(f)
        np.asarray(encode(piece), '<u2').tofile(f)
        previous = path
    if previous:
        np.array(end, '<u2').tofile(f)

# Move the last tokens from train.bin.tmp to val.bin.tmp.
n = (out / 'train.bin.tmp').stat().st_size // 2
n_val = int(n * args.val_fraction)
n_train = n - n_val
if min(n_train, n_val) < 2:
    (out / 'train.bin.tmp').unlink()
    parser.error(f'{n:,} tokens are too few to split into train and val')
with open(out / 'train.bin.tmp', 'r+b') as train, open(out / 'val.bin.tmp', 'wb') as val:
    train.seek(2 * n_train)
    shutil.copyfileobj(train, val)
    train.truncate(2 * n_train)
(out / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
(out / 'val.bin').unlink(missing_ok=True)
for name in ('meta.json', 'train.bin', 'val.bin'):
    os.replace(out / f'{name}.tmp', out / name)
print(f'vocab size: {meta["vocab_size"]:,}\ntrain has {n_train:,} tokens\nval has {n_val:,} tokens')
print(f'wrote them to {out}; train with --dataset={args.name}')
