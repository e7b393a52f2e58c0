"""
TinyStories in GPT-2's byte pair encoding: 2.1 million stories for children aged three or four, about 0.5B tokens.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --files DIR     # a folder of parquet files, instead of the Hugging Face hub's

Downloads 1 GB, which the library `datasets` unpacks to 2 GB, both in ~/.cache/huggingface, and writes 1 GB here. Takes
up to 1.3 GB of memory, and about 2 minutes with two processes, downloading aside. Writes train.bin, val.bin (uint16 ids) and
meta.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hub import prepare

if __name__ == '__main__':  # the tokenizing processes import this file too
    prepare(__file__, __doc__, 'roneneldan/TinyStories', 'main', download=1e9, text=2e9)
