"""
Tiny Shakespeare in GPT-2's byte pair encoding, to finetune GPT-2 on.

    python data/shakespeare/prepare.py

Reads input.txt in this folder or in data/shakespeare_char, and downloads it first (1 MB) if it is in neither. Writes
train.bin (uint16 ids of the first 90% of the text), val.bin (the rest) and meta.json.
"""
import sys
from pathlib import Path

import numpy as np

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from common import GPT2_META, gpt2_encoding, new_dataset, options, tiny_shakespeare

out = options(__doc__).parse_args().data_dir / here.name
enc = gpt2_encoding()
text = tiny_shakespeare(out, here, here.parent / 'shakespeare_char')
n = int(0.9 * len(text))
train_ids, val_ids = (np.array(enc.encode_ordinary(part), '<u2') for part in (text[:n], text[n:]))
assert (len(train_ids), len(val_ids)) == (301_966, 36_059)
with new_dataset(out, GPT2_META) as (train, val):
    train.write(train_ids)
    val.write(val_ids)
