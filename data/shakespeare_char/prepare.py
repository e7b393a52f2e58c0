"""
Tiny Shakespeare, character by character: nanoGPT's first dataset.

    python data/shakespeare_char/prepare.py

Reads input.txt in this folder, and downloads it first (1 MB) if it is not there. Writes train.bin (uint16 ids of the
first 90% of the text), val.bin (the rest) and meta.json.
"""
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from common import char_tokenizer, new_dataset, options, tiny_shakespeare

out = options(__doc__).parse_args().data_dir / here.name
text = tiny_shakespeare(out, here)
encode, meta = char_tokenizer(set(text))
n = int(0.9 * len(text))
assert (meta['vocab_size'], n, len(text) - n) == (65, 1_003_854, 111_540)
with new_dataset(out, meta) as (train, val):
    train.write(encode(text[:n]))
    val.write(encode(text[n:]))
