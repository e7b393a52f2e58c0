"""
Turns a dataset of the Hugging Face Hub, or parquet files of your own, into train.bin and val.bin: each document in
GPT-2's byte pair encoding, followed by <|endoftext|>. Where a document spells that itself, it stays text.
openwebtext/prepare.py and tinystories/prepare.py call `prepare`.
"""
import logging
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import CPUS, GPT2_META, check_room, gpt2_encoding, new_dataset, options


def load(args):
    """The documents of train and val. They stay on the disk, in the cache of the library `datasets`, and are mapped
    into memory from there."""
    import datasets  # takes a second, so a mistake on the command line is reported first
    from pyarrow.dataset import ParquetFragmentScanOptions
    for name in ('datasets', 'huggingface_hub'):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they also raise what they log
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not args.files:
        source = {'path': args.repo, 'revision': args.revision}
    elif len(args.files) == 1 and os.path.isdir(args.files[0]):
        source = {'path': args.files[0]}  # the folder may hold both splits, as on the Hub
    else:
        source = {'path': 'parquet', 'data_files': args.files}
    in_parts = ParquetFragmentScanOptions(pre_buffer=False)  # True reads each file into memory whole
    try:
        data = datasets.load_dataset(**source, fragment_scan_options=in_parts).select_columns(args.column)
    except datasets.exceptions.DatasetGenerationError as e:
        raise e.__cause__ or e  # e only says that there was an error, its cause says which
    if 'validation' in data:
        return {'train': data['train'], 'val': data['validation']}
    # nanoGPT's split: the same documents, in the same order
    data = data['train'].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return {'train': data['train'], 'val': data['test']}


def start_worker(*args):
    """Runs first in each tokenizing process. The process leaves Ctrl-C to the main process, and exits when that is
    gone, even after kill -9."""
    global splits, column, enc

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    splits, column = args
    enc = gpt2_encoding()


def encode(split, start, n):
    """Runs in a tokenizing process: returns the tokens of `n` documents, as bytes for the file."""
    texts = splits[split][start:start + n][column]
    documents = (enc.encode_to_numpy(text or '', disallowed_special=()) for text in texts)
    return b''.join(np.append(ids, enc.eot_token).astype('<u2').tobytes() for ids in documents)


def encoded(pool, split, starts, n, window):
    """Yields the tokens of the `n` documents at each of `starts`, in order. The pool holds only `window` such jobs at
    a time, so that memory use does not grow with the dataset."""
    for i in range(0, len(starts), window):
        yield from pool.map(encode, repeat(split), starts[i:i + window], repeat(n))


def write(splits, args, out):
    """Tokenizes the documents and writes the dataset."""
    data = splits['train'].data
    n = max(1, 2**18 * len(data) // max(1, data.nbytes))  # documents in a job: about 256 KB of text
    # a forked process starts with all that this one has imported, but only on Linux is that safe
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    workers = ProcessPoolExecutor(args.num_proc, context, start_worker, (splits, args.column))
    with new_dataset(out, GPT2_META) as files, workers as pool:
        for f, split in zip(files, ('train', 'val')):
            starts = range(0, len(splits[split]), n)
            jobs = encoded(pool, split, starts, n, 64 * args.num_proc)
            for ids in tqdm(jobs, split, len(starts), disable=None):
                f.write(ids)


def prepare(script, doc, repo, revision, cached, written):
    """Reads the command line, runs `load` and `write`, and reports every error in one line. The dataset `repo` takes
    `cached` bytes in the libraries' cache, and `written` bytes here."""
    parser = options(doc)
    parser.add_argument('--repo', default=repo, help=f'a dataset on the Hugging Face Hub ({repo})')
    parser.add_argument('--revision', default=revision, help=f'a branch, tag or commit of that dataset ({revision})')
    parser.add_argument('--files', nargs='+', metavar='PATH',
                        help='read parquet files of your own, or one folder of them, instead')
    parser.add_argument('--column', default='text', help='the column that holds the text (text)')
    parser.add_argument('--num_proc', type=int, default=CPUS, help=f'the number of processes that tokenize ({CPUS})')
    args = parser.parse_args()
    out = args.data_dir / Path(script).resolve().parent.name
    if not 1 <= args.num_proc <= 4 * CPUS:
        parser.error(f'--num_proc={args.num_proc}: from 1 to four times the {CPUS} processors that are here')

    def fail(message, code=1):
        for tmp in out.glob('*.tmp'):
            tmp.unlink()
        print(f'prepare.py: error: {message}', file=sys.stderr, flush=True)
        os._exit(code)  # sys.exit would wait for the libraries' threads, perhaps forever

    def on_ctrl_c(*_):
        if multiprocessing.parent_process() is None:  # not in a process forked a moment ago
            fail('interrupted: run the same command to start again; what is downloaded is kept', 130)

    signal.signal(signal.SIGINT, on_ctrl_c)
    if args.repo == repo and not args.files:
        from huggingface_hub.constants import HF_HUB_CACHE
        check_room(out, written)
        cache = Path(HF_HUB_CACHE, 'datasets--' + repo.replace('/', '--'))
        if not cache.exists():  # else some or all of it is here already
            check_room(cache, cached)
    try:
        write(load(args), args, out)
    except BrokenExecutor:
        fail('a tokenizing process was killed, perhaps because memory ran out: try a lower --num_proc')
    except ConnectionError as e:
        fail(f'{e}; where there is a network, type hf download {args.repo} --repo-type=dataset --revision='
             f'{args.revision} --include="*.parquet" --local-dir=DIR, then copy DIR here and add --files DIR')
    except Exception as e:  # such as a full disk or a damaged file
        fail(f'{" ".join(args.files or [args.repo])}: {type(e).__name__}: {e}'.partition('\n')[0])
