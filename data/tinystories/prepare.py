"""
TinyStories in GPT-2's byte pair encoding: 2.1 million short stories that a child of three or four understands, about
0.5B tokens.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --files DIR     # read a folder of parquet files of your own

The library `datasets` downloads 1 GB and unpacks it to 2 GB, both in ~/.cache/huggingface. The script then writes 1 GB
here: train.bin and val.bin (uint16 ids) and meta.json. It needs up to 1.3 GB of memory and, after the download, about
2 minutes with two processes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hub import prepare

if __name__ == '__main__':  # the tokenizing processes import this file too
    prepare(__file__, __doc__, 'roneneldan/TinyStories', 'main', cached=3e9, written=1e9)
