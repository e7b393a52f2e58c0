"""
A dataset of the Hugging Face hub, or parquet files of your own, to train.bin and val.bin in GPT-2's byte pair encoding, each
document followed by <|endoftext|>. What openwebtext/prepare.py and tinystories/prepare.py share.
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


def load(args, download, text, out):
    """The documents of train and of val, mapped into memory from the files in which `datasets` keeps them."""
    import datasets  # not above: it takes a second, and a mistake on the command line is said before
    from pyarrow.dataset import ParquetFragmentScanOptions
    for name in ('datasets', 'huggingface_hub'):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log as an error they raise as well
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not args.files:
        where = {'path': args.repo, 'revision': args.revision}
    elif len(args.files) == 1 and os.path.isdir(args.files[0]):  # both splits may be in it, as on the hub
        where = {'path': args.files[0]}
    else:
        where = {'path': 'parquet', 'data_files': args.files}
    # with pre_buffer each file would be in memory as a whole
    builder = datasets.load_dataset_builder(**where, fragment_scan_options=ParquetFragmentScanOptions(pre_buffer=False))
    if args.files:  # text is usually twice as large uncompressed
        download, text = 0, 2 * sum(os.path.getsize(file) for files in builder.config.data_files.values() for file in files)
    cache = datasets.config.HF_DATASETS_CACHE
    cache.mkdir(parents=True, exist_ok=True)
    need = {cache: 0 if os.path.exists(builder.cache_dir) else download + text, out: text / 2}
    print(f'takes about {need[cache] / 1e9:.1f} GB in {cache.parent}, {need[out] / 1e9:.1f} GB in {out}, '
          f'{1.3 + 0.02 * args.num_proc:.1f} GB of memory at most, {text / 48e7 / args.num_proc:.1f} minutes', flush=True)
    for path in need:
        total = sum(need[other] for other in need if other.stat().st_dev == path.stat().st_dev)
        if (free := shutil.disk_usage(path).free) < total:
            raise OSError(f'{path} has {free / 1e9:.1f} GB free, and this needs {total / 1e9:.1f} GB')
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as e:  # which only says that there was an error
        raise e.__cause__ or e
    data = builder.as_dataset()
    if getattr(data['train'].features.get(args.column), 'dtype', None) not in ('string', 'large_string'):
        raise ValueError(f'no text in a column {args.column!r}, but {data["train"].features}')
    data = data.select_columns(args.column)
    if 'validation' in data:
        return {'train': data['train'], 'val': data['validation']}
    data = data['train'].train_test_split(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's documents, in its order
    return {'train': data['train'], 'val': data['test']}


def start_worker(*args):
    """A tokenizing process leaves Ctrl-C to the first process, and ends when that one is gone, be it by kill -9."""
    global splits, column, enc
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    (splits, column), enc = args, tiktoken.get_encoding('gpt2')


def encode(split, start, n):
    documents = (np.append(enc.encode_to_numpy(text or '', disallowed_special=()), enc.eot_token)
                 for text in splits[split][start:start + n][column])
    return b''.join(ids.astype('<u2').tobytes() for ids in documents)


def encoded(pool, split, starts, n, window):
    """The tokens of each `n` documents, in order. Only `window` such ranges are on their way, so memory stays flat."""
    for i in range(0, len(starts), window):
        yield from pool.map(encode, repeat(split), starts[i:i + window], repeat(n))


def write(splits, args, out):
    """Writes under other names first, and val.bin last: a run that breaks off leaves no half dataset that looks whole."""
    began, data = time.time(), splits['train'].data
    n = max(1, 2**18 * len(data) // max(1, data.nbytes))  # documents of a quarter of a megabyte together
    # a forked process shares what this one has imported; elsewhere than on Linux forking is not safe
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with ProcessPoolExecutor(args.num_proc, context, start_worker, (splits, args.column)) as pool:
        for split, documents in splits.items():
            starts = range(0, len(documents), n)
            with open(out / f'{split}.bin.tmp', 'wb') as f:
                for ids in tqdm(encoded(pool, split, starts, n, 64 * args.num_proc), split, len(starts), disable=None):
                    f.write(ids)
    meta = {'vocab_size': tiktoken.get_encoding('gpt2').n_vocab, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
    (out / 'meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
    n_train, n_val = ((out / f'{split}.bin.tmp').stat().st_size // 2 for split in ('train', 'val'))
    (out / 'val.bin').unlink(missing_ok=True)
    for name in ('meta.json', 'train.bin', 'val.bin'):
        os.replace(out / f'{name}.tmp', out / name)
    print(f'train has {n_train:,} tokens\nval has {n_val:,} tokens\nnow in {out} '
          f'({(n_train + n_val) / (time.time() - began):,.0f} tokens/s); train with --dataset={out.name}')


def prepare(script, doc, repo, revision, download, text):
    """The command line and how it ends. `download`, `text`: bytes of the files on the hub, and of the text in them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repo', default=repo, help=f'a dataset on the Hugging Face hub ({repo})')
    parser.add_argument('--revision', default=revision, help=f'a branch, tag or commit of {repo} ({revision})')
    parser.add_argument('--files', nargs='+', metavar='PATH', help="parquet files or a folder of them, not the hub's")
    parser.add_argument('--column', default='text', help='which one holds the text')
    parser.add_argument('--num_proc', type=int, default=getattr(os, 'process_cpu_count', os.cpu_count)(),
                        help='how many processes tokenize')
    args = parser.parse_args()
    out = Path(script).resolve().parent

    def end(message, code=1):
        remove_tmp(out)
        print(f'prepare.py: {message}', file=sys.stderr, flush=True)
        os._exit(code)  # threads of the libraries may have a file to finish, or wait for ever

    def interrupted(*_):
        if multiprocessing.parent_process() is None:  # not in a process that was forked just now
            end('interrupted; the same command starts again, with what is downloaded', 130)

    signal.signal(signal.SIGINT, interrupted)
    if args.num_proc < 1:
        end(f'error: --num_proc={args.num_proc}: at least 1')
    try:
        tiktoken.get_encoding('gpt2')
    except Exception as e:  # requests' errors, or a damaged cache
        end(f'error: no GPT-2 vocabulary ({type(e).__name__}): where there is a network, run this with '
            'TIKTOKEN_CACHE_DIR=DIR, then copy DIR here and set TIKTOKEN_CACHE_DIR to it')
    remove_tmp(out)  # of a preparation that was killed: the check of the disk counts on that space
    try:
        write(load(args, download, text, out), args, out)
    except BrokenExecutor:
        end('error: a tokenizing process was killed, perhaps for want of memory: try a lower --num_proc')
    except ConnectionError as e:
        end(f'error: {e}; where there is a network, type hf download {args.repo} --repo-type=dataset --revision={args.revision} '
            '--include="*.parquet" --local-dir=DIR, then copy DIR here and add --files DIR')
    except Exception as e:  # a full disk, a damaged file
        end(f'error: {" ".join(args.files or [args.repo])}: {type(e).__name__}: {e}'.partition('\n')[0])
