"""
FineWeb in GPT-2's byte pair encoding, as it is used to compare how fast GPT-2 (124M) reaches a validation loss of 3.28.

    python data/fineweb/prepare.py                 # 1 billion tokens
    python data/fineweb/prepare.py --shards=34     # 3.4 billion
    python data/fineweb/prepare.py --files DIR     # read a folder of such files of your own

The tokens come from https://huggingface.co/datasets/kjj0/fineweb10B-gpt2: up to 103 files of 100 million tokens each,
200 MB a file, kept in ~/.cache/huggingface. The script then writes as much again here: train.bin, val.bin (uint16 ids)
and meta.json. <|endoftext|> stands before each document. val.bin holds 10,485,761 tokens, so that 10,240 sequences of
1024 are the evaluation that others do. If you interrupt the script, start it again.
"""
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from common import GPT2_META, check_room, fail, new_dataset, options

REPO = 'kjj0/fineweb10B-gpt2'
VAL_TOKENS = 10 * 2**20 + 1  # one more than there are targets
HEADER = 256  # int32: a magic number, a version, the number of tokens, and zeros


def tokens_of(path):
    """The tokens in a file, memory-mapped. Ends the script if the file is not what its header says."""
    header = np.fromfile(path, '<i4', HEADER)
    if len(header) < HEADER or header[0] != 20240520 or header[1] != 1:
        fail(f'{path} does not begin with 20240520 and 1, as a file of GPT-2 tokens does')
    there = (path.stat().st_size - 4 * HEADER) // 2
    if there != header[2] or there == 0:
        fail(f'{path} holds {there:,} tokens, and its header says {header[2]:,}: it is cut off or damaged, so get it '
             'again')
    tokens = np.memmap(path, '<u2', 'r', 4 * HEADER)
    if (highest := tokens.max()) >= GPT2_META['vocab_size']:
        fail(f'{path} holds token {highest}, and GPT-2 has {GPT2_META["vocab_size"]:,}')
    return tokens


def download(n):
    """The paths of the validation file and of n training files. What is here already is not downloaded again."""
    from huggingface_hub import hf_hub_download
    names = ['fineweb_val_000000.bin'] + [f'fineweb_train_{i:06}.bin' for i in range(1, n + 1)]
    paths = []
    for name in tqdm(names, 'downloading', unit='file', disable=None):
        try:
            paths.append(Path(hf_hub_download(REPO, name, repo_type='dataset')))
        except Exception as e:  # of the hub, of its HTTP library, or of the disk
            fail(f'{name} could not be downloaded ({type(e).__name__}): start the script again, or download the files '
                 f'of https://huggingface.co/datasets/{REPO} into DIR and add --files DIR')
    return paths


parser = options(__doc__)
parser.add_argument('--shards', type=int, default=10, help='the number of training files, 1 to 103 (10)')
parser.add_argument('--files', type=Path, metavar='DIR', help='read the fineweb_*.bin in a folder of your own instead')
args = parser.parse_args()
out = args.data_dir / here.name
if not 1 <= args.shards <= 103:
    parser.error(f'--shards={args.shards}: there are 1 to 103')
if args.files:
    paths = [*sorted(args.files.glob('fineweb_val_*.bin'))[:1], *sorted(args.files.glob('fineweb_train_*.bin'))]
    if len(paths) < 2 or 'val' not in paths[0].name:
        fail(f'{args.files} lacks fineweb_val_000000.bin or fineweb_train_000001.bin')
    size = sum(path.stat().st_size for path in paths)
else:
    size = 2e8 * (args.shards + 1)
    print(f'{args.shards + 1} files to download, {size / 1e9:.1f} GB: {size / 1e7 / 60:.0f} minutes at 10 MB/s. The '
          f'dataset takes {size / 1e9:.1f} GB more')
check_room(out, size)
if not args.files:
    paths = download(args.shards)
shards = [tokens_of(path) for path in tqdm(paths, 'checking', unit='file', disable=None)]
if len(shards[0]) < VAL_TOKENS:
    print(f'warning: {paths[0]} holds only {len(shards[0]):,} tokens: an evaluation is not the one that others do')
with new_dataset(out, GPT2_META) as (train, val):
    val.write(shards[0][:VAL_TOKENS])
    for shard in tqdm(shards[1:], 'writing', unit='file', disable=None):
        train.write(shard)
