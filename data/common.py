"""
What the prepare.py scripts share. Who imports this reports an error of the disk in one line.
"""
import argparse
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from dataset import GPT2_META, TOKENIZER_FILES, gpt2_encoding, hf_meta, read_meta

CPUS = getattr(os, 'process_cpu_count', os.cpu_count)()  # process_cpu_count is Python 3.13's


def fail(message):
    sys.exit(f'prepare.py: error: {message}')


def report(kind, error, traceback):
    """Shows an error that nobody caught: a full disk and Ctrl-C are not this script's fault."""
    if isinstance(error, (OSError, KeyboardInterrupt)):
        print(f'prepare.py: error: {str(error) or "interrupted"}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report


def home_path(text):
    """The path in a text; a shell leaves the ~ of --data_dir=~/data as it is."""
    return Path(os.path.expanduser(text))


def options(doc):
    """A parser of the command line that shows a script's docstring at --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=home_path, default=DATA, metavar='DIR',
                        help='write to a folder in DIR, for train.py --data_dir=DIR, and not to one in data/')
    return parser


def read_options(parser, own):
    """(args, folder) of a command line with files of one's own, where `own` is the script's own folder. Ends the script
    where one of them cannot be."""
    parser.add_argument('files', nargs='+', type=Path, help='UTF-8 files, read in this order')
    parser.add_argument('--name', default=own, help=f'write the dataset to data/NAME ({own})')
    parser.add_argument('--val_fraction', type=float, default=0.1,
                        help='the share, from the end, that goes to val (0.1)')
    parser.add_argument('--overwrite', action='store_true', help='replace a dataset that is in data/NAME')
    args = parser.parse_args()
    if not re.fullmatch(r'[\w.-]*\w', args.name):
        parser.error(f'--name={args.name}: use a plain folder name, such as my_notes')
    if not 0 < args.val_fraction < 1:
        parser.error(f'--val_fraction={args.val_fraction}: use a number between 0 and 1, such as 0.1')
    for path in args.files:
        if path.is_dir():
            parser.error(f'{path} is a folder: give its files, such as {path / "*.txt"}')
        if not path.is_file():
            parser.error(f'{path}: no such file')
    out = args.data_dir / args.name
    if args.name != own and not args.overwrite:
        for name, what in ('prepare.py', 'a prepare.py of its own'), ('val.bin', 'a dataset'):
            if (out / name).exists():
                parser.error(f'--name={args.name}: {out} has {what}; choose another name, or add --overwrite')
    return args, out


def check_room(folder, size):
    """Ends the script where the disk that a folder is on, or will be, has room for less than `size` bytes."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < size:
        fail(f'{folder} has room for {free / 1e9:.1f} GB, and this takes {size / 1e9:.1f}')


@contextlib.contextmanager
def new_files(folder, *names):
    """Yields open files, which get these names when all of them are written. The last name comes last, so that whoever
    waits for it never sees half of them. If something goes wrong, nothing of them stays, and older files do."""
    tmps = [folder / f'{name}.tmp' for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for tmp in tmps:  # one that is left over may be a link to another file
            tmp.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open(tmp, 'x+b')) for tmp in tmps]
        (folder / names[-1]).unlink(missing_ok=True)
        for tmp in tmps:
            os.replace(tmp, tmp.with_suffix(''))
    except OSError as e:
        e.filename = e.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        for tmp in tmps:
            tmp.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


@contextlib.contextmanager
def new_dataset(folder, meta):
    """Yields two open files for the token ids of train and val, and in the end prints how many there are. A copy of the
    tokenizer's file, if it has one, goes with them."""
    tokenizer = meta['tokenizer']
    copies = {'tokenizer.json': Path(tokenizer['file']).read_bytes()} if 'file' in tokenizer else {}
    meta = meta | {'tokenizer': tokenizer | {'file': name for name in copies}}
    copies['meta.json'] = json.dumps(meta).encode()
    with new_files(folder, *copies, 'train.bin', 'val.bin') as (*files, train, val):
        for f, content in zip(files, copies.values()):
            f.write(content)
        yield train, val
    print(f'vocab size: {meta["vocab_size"]:,}')
    for split in ('train', 'val'):
        size = (folder / f'{split}.bin').stat().st_size
        print(f'{split} has {size // np.dtype(meta.get("dtype", "uint16")).itemsize:,} tokens')
    elsewhere = '' if folder.parent == DATA else f' --data_dir={folder.parent}'
    print(f'wrote them to {folder}; train with --dataset={folder.name}{elsewhere}')


def char_tokenizer(chars):
    """(encode, meta) of a tokenizer that numbers these characters in the order of Unicode."""
    chars = ''.join(sorted(chars))
    id_of = np.zeros(0x110000, '<u2')  # indexed by code point
    id_of[[ord(c) for c in chars]] = np.arange(len(chars))
    encode = lambda text: id_of[np.frombuffer(text.encode('utf-32-le'), '<u4')]
    return encode, {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}


def find_tokenizer(name):
    """What meta.json says about --tokenizer=NAME: 'gpt2', a folder of a model, a dataset or a run, or the name of a
    model on the Hugging Face Hub. Ends the script if it has none."""
    if name == 'gpt2':
        return GPT2_META
    path = home_path(name)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
        except Exception as e:  # of the hub, of its HTTP library, or of the disk
            fail(f'--tokenizer={name} is no folder, and cannot be downloaded ({type(e).__name__}): put the files '
                 f'tokenizer* and chat_template* of https://huggingface.co/{name} into a folder and give its path')
    try:
        for named in 'meta.json', 'config.json':  # of a dataset or of a run
            with contextlib.suppress(ValueError, FileNotFoundError):
                meta = read_meta(folder / named)
                return {key: meta[key] for key in ('vocab_size', 'tokenizer', 'chat_template') if key in meta}
        return hf_meta(folder)
    except ValueError as e:
        fail(e)


def on_all_cores(encode, pieces):
    """Yields encode(*piece) for each piece, in order. Few pieces are in memory at a time."""
    jobs = deque()
    with ThreadPoolExecutor(CPUS) as pool:  # threads do: tokenizers are no Python code
        for piece in pieces:
            jobs.append(pool.submit(encode, *piece))
            if len(jobs) > 2 * CPUS:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()


def tiny_shakespeare(*folders):
    """The text, from input.txt in the first of these folders that has it. If none does, downloads it into the first."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    folder = next((folder for folder in folders if (folder / 'input.txt').exists()), folders[0])
    path = folder / 'input.txt'
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as e:
            fail(f'could not download {url} ({e}): save it as {path} and run this again')
        with new_files(folder, 'input.txt') as [f]:
            f.write(content)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed':
        fail(f'{path} is not the text at {url}: delete it and run this again to download it (for a text of your own, '
             'use data/text/prepare.py)')
    return content.decode()
