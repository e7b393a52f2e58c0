"""
OpenWebText in GPT-2's byte pair encoding, for training GPT-2: 9.0B tokens of 8 million web pages, and 4.4M for validation.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files DIR     # a folder of parquet files, instead of the Hugging Face hub's

Downloads 24 GB, which the library `datasets` unpacks to 40 GB, both in ~/.cache/huggingface, and writes 18 GB here. Takes
up to 1.3 GB of memory, and about 40 minutes with two processes, downloading aside. Writes train.bin, val.bin (uint16 ids) and
meta.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hub import prepare

if __name__ == '__main__':  # the tokenizing processes import this file too
    # the revision is the hub's own conversion to parquet: `main` was a script, which Hugging Face's libraries run no more
    prepare(__file__, __doc__, 'Skylion007/openwebtext', 'refs/convert/parquet', download=24e9, text=40e9)
