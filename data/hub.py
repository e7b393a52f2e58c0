"""
Turns a dataset of the Hugging Face Hub, or parquet files of your own, into train.bin and val.bin:
each document in GPT-2's byte pair encoding, followed by <|endoftext|>. openwebtext/prepare.py and
tinystories/prepare.py call `prepare`, at the end of this file.
"""
import argparse
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm


def remove_tmp(out):
    for tmp in out.glob('*.tmp'):
        tmp.unlink()


def load(args, download_bytes, text_bytes, out):
    """Returns the documents of train and val. They stay on the disk, in the cache of the library
    `datasets`, and are mapped into memory from there."""
    import datasets  # takes a second, so a mistake on the command line is reported first
    from pyarrow.dataset import ParquetFragmentScanOptions
    for name in ('datasets', 'huggingface_hub'):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they also raise what they log
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not args.files:
        source = {'path': args.repo, 'revision': args.revision}
    elif len(args.files) == 1 and os.path.isdir(args.files[0]):
        # the folder may hold both splits, as on the Hub
        source = {'path': args.files[0]}
    else:
        source = {'path': 'parquet', 'data_files': args.files}
    options = ParquetFragmentScanOptions(pre_buffer=False)  # True reads each file into memory whole
    builder = datasets.load_dataset_builder(**source, fragment_scan_options=options)
    if args.files:
        files = [file for files in builder.config.data_files.values() for file in files]
        download_bytes = 0
        text_bytes = 2 * sum(map(os.path.getsize, files))  # a text is half as large in parquet
    cache = datasets.config.HF_DATASETS_CACHE
    in_cache = os.path.exists(builder.cache_dir)  # an earlier run left it there
    cache_bytes = 0 if in_cache else download_bytes + text_bytes
    check_space(cache, cache_bytes, out, text_bytes, args.num_proc)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as e:
        raise e.__cause__ or e  # e only says that there was an error, its cause says which
    data = builder.as_dataset()
    features = data['train'].features
    if getattr(features.get(args.column), 'dtype', None) not in ('string', 'large_string'):
        raise ValueError(f'no text in a column {args.column!r}, but {features}: choose one with --column')
    data = data.select_columns(args.column)
    if 'validation' in data:
        return {'train': data['train'], 'val': data['validation']}
    # nanoGPT's split: the same documents, in the same order
    data = data['train'].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return {'train': data['train'], 'val': data['test']}


def check_space(cache, cache_bytes, out, text_bytes, num_proc):
    """Prints the space and the time that this takes, and raises OSError if a disk is too small."""
    cache.mkdir(parents=True, exist_ok=True)
    needed = {cache: cache_bytes, out: text_bytes / 2}  # a token: 2 bytes for about 4 of text
    gb_of_memory = 1.3 + 0.02 * num_proc
    minutes = text_bytes / 8e6 / num_proc / 60  # each process tokenizes about 8 MB a second
    print(f'this needs about {needed[cache] / 1e9:.1f} GB in {cache.parent}, {needed[out] / 1e9:.1f} GB in {out}, '
          f'up to {gb_of_memory:.1f} GB of memory, and {minutes:.1f} minutes to tokenize', flush=True)
    for path in needed:  # the two may be on one disk
        disk = path.stat().st_dev
        total = sum(size for other, size in needed.items() if other.stat().st_dev == disk)
        if (free := shutil.disk_usage(path).free) < total:
            raise OSError(f'{path} has {free / 1e9:.1f} GB free, and this needs {total / 1e9:.1f} GB')


def start_worker(*args):
    """Runs first in each tokenizing process. The process ignores Ctrl-C, which the main process
    handles, and exits when the main process is gone, even after kill -9."""
    global splits, column, enc

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    splits, column = args
    enc = tiktoken.get_encoding('gpt2')


def encode(split, start, n):
    """Runs in a tokenizing process: returns the tokens of `n` documents, as bytes for the file."""
    texts = splits[split][start:start + n][column]
    documents = (enc.encode_to_numpy(text or '', disallowed_special=()) for text in texts)
    return b''.join(np.append(ids, enc.eot_token).astype('<u2').tobytes() for ids in documents)


def encoded(pool, split, starts, n, window):
    """Yields the tokens of the `n` documents at each of `starts`, in order. The pool holds only
    `window` such jobs at a time, so that memory use does not grow with the dataset."""
    for i in range(0, len(starts), window):
        yield from pool.map(encode, repeat(split), starts[i:i + window], repeat(n))


def write(splits, args, out):
    """Tokenizes the documents and writes the dataset. It writes every file under a temporary name
    and renames val.bin last, so that a run that is interrupted never leaves half a dataset that
    looks complete."""
    began = time.time()
    data = splits['train'].data
    n = max(1, 2**18 * len(data) // max(1, data.nbytes))  # documents in a job: about 256 KB of text
    # a forked process starts with all that this one has imported, but only on Linux is that safe
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with ProcessPoolExecutor(args.num_proc, context, start_worker, (splits, args.column)) as pool:
        for split, documents in splits.items():
            starts = range(0, len(documents), n)
            jobs = encoded(pool, split, starts, n, 64 * args.num_proc)
            with open(out / f'{split}.bin.tmp', 'wb') as f:
                for ids in tqdm(jobs, split, len(starts), disable=None):
                    f.write(ids)
    vocab_size = tiktoken.get_encoding('gpt2').n_vocab
    meta = {'vocab_size': vocab_size, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
    (out / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
    n_train, n_val = ((out / f'{split}.bin.tmp').stat().st_size // 2 for split in ('train', 'val'))
    (out / 'val.bin').unlink(missing_ok=True)
    for name in ('meta.json', 'train.bin', 'val.bin'):
        os.replace(out / f'{name}.tmp', out / name)
    speed = (n_train + n_val) / (time.time() - began)
    print(f'train has {n_train:,} tokens\nval has {n_val:,} tokens')
    print(f'wrote them to {out}, {speed:,.0f} tokens/s; train with --dataset={out.name}')


def prepare(script, doc, repo, revision, download_bytes, text_bytes):
    """Reads the command line, runs `load` and `write`, and reports every error in one line.
    `download_bytes` is the size of the files on the Hub, `text_bytes` that of the text in them."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repo', default=repo, help=f'a dataset on the Hugging Face Hub ({repo})')
    parser.add_argument('--revision', default=revision,
                        help=f'a branch, tag or commit of that dataset ({revision})')
    parser.add_argument('--files', nargs='+', metavar='PATH',
                        help='read parquet files of your own, or one folder of them, instead')
    parser.add_argument('--column', default='text', help='the column that holds the text (text)')
    cpus = getattr(os, 'process_cpu_count', os.cpu_count)()  # process_cpu_count is Python 3.13's
    parser.add_argument('--num_proc', type=int, default=cpus,
                        help=f'the number of processes that tokenize ({cpus})')
    args = parser.parse_args()
    out = Path(script).resolve().parent

    def fail(message, code=1):
        remove_tmp(out)
        print(f'prepare.py: {message}', file=sys.stderr, flush=True)
        os._exit(code)  # sys.exit would wait for the libraries' threads, perhaps forever

    def on_ctrl_c(*_):
        if multiprocessing.parent_process() is None:  # not in a process forked a moment ago
            fail('interrupted: run the same command to start again; what is downloaded is kept', 130)

    signal.signal(signal.SIGINT, on_ctrl_c)
    if args.num_proc < 1:
        fail(f'error: --num_proc={args.num_proc}: at least 1 process must tokenize')
    try:
        tiktoken.get_encoding('gpt2')
    except Exception as e:  # an error of the network, or a damaged cache
        fail(f"error: could not load GPT-2's vocabulary ({type(e).__name__}): on a machine with a network, "
             'run this with TIKTOKEN_CACHE_DIR=DIR, then copy DIR here and set TIKTOKEN_CACHE_DIR to it')
    remove_tmp(out)  # a run that was killed leaves such files, and `check_space` needs their space
    try:
        write(load(args, download_bytes, text_bytes, out), args, out)
    except BrokenExecutor:
        fail('error: a tokenizing process was killed, perhaps because memory ran out: try a lower --num_proc')
    except ConnectionError as e:
        fail(f'error: {e}; where there is a network, type hf download {args.repo} --repo-type=dataset '
             f'--revision={args.revision} --include="*.parquet" --local-dir=DIR, '
             'then copy DIR here and add --files DIR')
    except Exception as e:  # such as a full disk or a damaged file
        fail(f'error: {" ".join(args.files or [args.repo])}: {type(e).__name__}: {e}'.partition('\n')[0])
