"""
OpenWebText in GPT-2's byte pair encoding, to train GPT-2 on: 8 million web pages. train.bin gets 9.0B tokens, val.bin
4.4M.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files DIR     # read a folder of parquet files of your own

The library `datasets` downloads 24 GB and unpacks them to 40 GB, both in ~/.cache/huggingface. The script then writes
18 GB here: train.bin and val.bin (uint16 ids) and meta.json. It needs up to 1.3 GB of memory and, after the download,
about 40 minutes with two processes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hub import prepare

if __name__ == '__main__':  # the tokenizing processes import this file too
    # Take the revision that the Hub converted to parquet: `main` is a loading script, which the library `datasets` no
    # longer runs.
    prepare(__file__, __doc__, 'Skylion007/openwebtext', 'refs/convert/parquet', cached=64e9, written=18e9)
