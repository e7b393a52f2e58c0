"""
Your own text files as a dataset, character by character, in GPT-2's byte pair encoding, or in the tokens of a model:

    python data/text/prepare.py notes.txt more/*.md                          # into data/text
    python data/text/prepare.py books/*.txt --tokenizer=gpt2 --name=books    # into data/books
    python data/text/prepare.py notes.txt --tokenizer=DIR                    # a model's folder, or Qwen/Qwen3-0.6B

Then train with

    python train.py config/train_shakespeare_char.py --dataset=text --out_dir=out-text

Writes train.bin and val.bin (ids in two bytes, or in four if there are more than 65,536; val is the last tenth of the
text) and meta.json. The end-of-text token follows each file; where a file spells it, as in <|endoftext|>, that stays
text, though it is the token in sample.py's --start. With char, the files are joined without a separator. The script
reads a megabyte at a time, so its memory use does not grow with your files.
"""
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

data = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(data))
from common import char_tokenizer, find_tokenizer, new_dataset, on_all_cores, options, read_options
from dataset import gpt2_encoding, hf_tokenizer

parser = options(__doc__)
parser.add_argument('--tokenizer', default='char',
                    help="what a token is: 'char', 'gpt2', or the folder of a model, or its name on the Hub (char)")
args, out = read_options(parser, 'text')


def can_cut(text, cut):
    """Whether the text around a cut gets the ids of its two parts."""
    a, b = text[max(0, cut - 100):cut], text[cut:cut + 100]
    return [*encode('', a + b)] == [*encode('', a), *encode('\n', b)]


def pieces_of(path, bar, check=True, size=2**20):
    """Yields the text of a file in pieces of about `size` characters, each with the newline before it, or ''.

    A cut is always after a newline between two visible characters, where the tokenizer makes a cut, too. So the pieces
    get the same ids as the whole text."""
    before, rest = '', ''
    with open(path, encoding='utf-8-sig') as f:
        try:
            while block := f.read(size):
                bar.update(len(block.encode()))
                rest += block
                newlines = [m.end() for m in re.finditer(r'\S\n(?=\S)', rest)][:-100:-1]
                cut = next((cut for cut in newlines if not check or can_cut(rest, cut)), 0)
                if cut or len(rest) > 16 * size:  # no such newline in 16 blocks: cut anyway, to save memory
                    cut = cut or len(rest)
                    yield before, rest[:cut]
                    before, rest = '\n' if cut < len(rest) else '', rest[cut:]
        except UnicodeDecodeError as e:
            parser.error(f'{path}: not UTF-8 text ({e.reason} near byte {f.buffer.tell():,})')
    if rest:
        yield before, rest


def all_files(label, check=True):
    """Yields an iterator over the pieces of each file, with a progress bar that counts bytes."""
    total = sum(path.stat().st_size for path in args.files)
    with tqdm(desc=label, total=total, unit='B', unit_scale=True, disable=None) as bar:
        for path in args.files:
            yield pieces_of(path, bar, check)


# the tokenizer: `encode` turns a piece of text, and the newline before it, into ids; the ids in `end` follow each file
if args.tokenizer == 'char':
    seen = set()
    for pieces in all_files('finding characters', check=False):
        for _, piece in pieces:
            seen.update(piece)
    if len(seen) > 2**16:
        parser.error(f'{len(seen):,} different characters do not fit uint16 ids; use --tokenizer=gpt2')
    encode_piece, meta = char_tokenizer(seen)
    encode, end = lambda before, piece: encode_piece(piece), []
elif (meta := find_tokenizer(args.tokenizer))['tokenizer']['kind'] == 'tiktoken':
    enc = gpt2_encoding()
    encode, end = lambda before, piece: enc.encode_ordinary(piece), [enc.eot_token]
elif meta['tokenizer']['kind'] == 'hf':
    hf = hf_tokenizer(meta['tokenizer']['file'])
    hf.encode_special_tokens = True  # a text that spells <|im_end|> is no end
    ids_of = lambda text: hf.encode_batch_fast([text], add_special_tokens=False)[0].ids
    # some tokenizers add a space where a text begins: let it be before the newline
    newline = len(ids_of('\n'))
    encode = lambda before, piece: ids_of(before + piece)[newline if before else 0:]
    end = [hf.token_to_id(meta['tokenizer']['eos'])] if 'eos' in meta['tokenizer'] else []
else:
    parser.error(f'--tokenizer={args.tokenizer} has a token for each character: leave it out')
if meta['vocab_size'] > 2**16:
    meta = meta | {'dtype': 'uint32'}
dtype = np.dtype(meta.get('dtype', 'uint16')).newbyteorder('<')

with new_dataset(out, meta) as (train, val):
    for pieces in all_files('encoding'):
        for ids in on_all_cores(encode, pieces):
            train.write(np.asarray(ids, dtype))
        train.write(np.array(end, dtype))
    # all tokens are in train; move the last ones to val
    n = train.tell() // dtype.itemsize
    n_val = int(n * args.val_fraction)
    if min(n_val, n - n_val) < 2:
        parser.error(f'{n:,} tokens are too few to split into train and val')
    train.seek(dtype.itemsize * (n - n_val))
    shutil.copyfileobj(train, val)
    train.truncate(dtype.itemsize * (n - n_val))
