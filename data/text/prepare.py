"""
Your own text files as a dataset, character by character or in GPT-2's byte pair encoding:

    python data/text/prepare.py notes.txt more/*.md                          # into data/text
    python data/text/prepare.py books/*.txt --tokenizer=gpt2 --name=books    # into data/books

Then train with

    python train.py config/train_shakespeare_char.py --dataset=text --out_dir=out-text

Writes train.bin and val.bin (uint16 ids; val is the last tenth of the text) and meta.json. With gpt2, <|endoftext|>
follows each file. With char, the files are joined without a separator. The script reads a megabyte at a time, so its
memory use does not grow with your files.
"""
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

data = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(data))
from common import GPT2_META, char_tokenizer, gpt2_encoding, new_dataset, options

parser = options(__doc__)
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
out = data / args.name
if args.name != 'text' and not args.overwrite:  # data/text is this script's own
    for name, what in ('prepare.py', 'a prepare.py of its own'), ('val.bin', 'a dataset'):
        if (out / name).exists():
            parser.error(f'--name={args.name}: {out} has {what}; choose another name, or add --overwrite')


def pieces_of(path, bar, size=2**20):
    """Yields the text of a file in pieces of about `size` characters.

    A cut is always after a newline between two visible characters. GPT-2's byte pair encoding never merges across such
    a newline, so the pieces get the same ids as the whole text."""
    rest = ''
    with open(path, encoding='utf-8-sig') as f:
        try:
            while block := f.read(size):
                bar.update(len(block.encode()))
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


def all_files(label):
    """Yields an iterator over the pieces of each file, with a progress bar that counts bytes."""
    total = sum(path.stat().st_size for path in args.files)
    with tqdm(desc=label, total=total, unit='B', unit_scale=True, disable=None) as bar:
        for path in args.files:
            yield pieces_of(path, bar)


# the tokenizer: `encode` turns a piece of text into ids, and the ids in `end` follow each file
if args.tokenizer == 'char':
    seen = set()
    for pieces in all_files('finding characters'):
        for piece in pieces:
            seen.update(piece)
    if len(seen) > 2**16:
        parser.error(f'{len(seen):,} different characters do not fit uint16 ids; use --tokenizer=gpt2')
    encode, meta = char_tokenizer(seen)
    end = []
else:
    enc = gpt2_encoding()
    encode, meta = enc.encode_ordinary, GPT2_META
    end = [enc.eot_token]

with new_dataset(out, meta) as (train, val):
    for pieces in all_files('encoding'):
        for piece in pieces:
            train.write(np.asarray(encode(piece), '<u2'))
        train.write(np.array(end, '<u2'))
    # all tokens are in train; move the last ones to val
    n = train.tell() // 2
    n_val = int(n * args.val_fraction)
    if min(n_val, n - n_val) < 2:
        parser.error(f'{n:,} tokens are too few to split into train and val')
    train.seek(2 * (n - n_val))
    shutil.copyfileobj(train, val)
    train.truncate(2 * (n - n_val))
