"""
Chats as a dataset, on which a model learns to write what the assistant says:

    python data/chat/prepare.py chats.jsonl --tokenizer=DIR      # a model's folder, or Qwen/Qwen3-0.6B; into data/chat
    python data/chat/prepare.py chats.jsonl --tokenizer=gpt2

Then train with

    python train.py config/finetune_chat.py --init_from=DIR

A line of a file is a chat: {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": ...}]}.
The model's own chat template writes it as text, or a plain one, if it has none. Writes train.bin and val.bin (four
bytes for each token, signed: ~id for a token that is only read), and meta.json. val is the last tenth of the chats.
"""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fail, find_tokenizer, new_dataset, on_all_cores, options, read_options
from chat import PLAIN, chat_tokenizer, learned
from dataset import FIRST

parser = options(__doc__)
parser.add_argument('--tokenizer', required=True, help="'gpt2', or the folder of a model, or its name on the Hub")
args, out = read_options(parser, 'chat')
meta = find_tokenizer(args.tokenizer)
if meta['tokenizer']['kind'] != 'tiktoken' and not {'eos', 'chat_template'} & {*meta, *meta['tokenizer']}:
    parser.error(f'--tokenizer={args.tokenizer} has no token that ends an answer: take the one of a model')
meta = {'chat_template': PLAIN} | meta | {'dtype': 'int32'}
tokenizer = chat_tokenizer(meta)


def chats():
    """Yields where each chat is, and its messages."""
    for path in args.files:
        with open(path, encoding='utf-8-sig') as f:
            try:
                for n, line in enumerate(f, 1):
                    if line.strip():
                        yield f'{path}:{n}', messages_in(line, f'{path}:{n}')
            except UnicodeDecodeError as e:
                parser.error(f'{path}: not UTF-8 text ({e.reason} near byte {f.buffer.tell():,})')


def messages_in(line, where):
    try:
        messages = json.loads(line)['messages']
        roles = [message['role'] for message in messages if isinstance(message['content'], str)]
    except (ValueError, TypeError, KeyError, RecursionError):
        roles = None
    if roles is None or len(roles) < len(messages):
        parser.error(f'{where} is no chat: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    if 'assistant' not in roles:
        parser.error(f'{where}: nobody with the role assistant says anything')
    return messages


def encode(*batch):
    """The tokens of some chats, an array for each."""
    result = []
    for (where, _), parts in zip(batch, learned(meta, [messages for _, messages in batch])):
        if isinstance(parts, str):
            raise ValueError(f'{where}: {parts}')
        result.append(np.concatenate([mark(*part) for part in parts]))
    return result


def mark(text, spans):
    """The tokens of a text: ~id for those that are not in one of the spans, and a mark at the first."""
    encoding = tokenizer.encode(text)
    ids, (begin, end) = np.array(encoding.ids), np.array(encoding.offsets).T
    is_learned = np.any([(begin >= a) & (end <= b) for a, b in spans], 0)
    tokens = np.where(is_learned, ids, ~ids)
    tokens[0] = ~(ids[0] + FIRST)
    return tokens.astype('<i4')


n = sum(1 for _ in chats())
n_val = max(1, int(n * args.val_fraction))
if n < 2:
    parser.error(f'{n} chats are too few to split into train and val')
source = chats()
batches = iter(lambda: [*itertools.islice(source, 256)], [])
lengths, n_learned = [], 0
try:
    with new_dataset(out, meta) as (train, val):
        for batch in tqdm(on_all_cores(encode, batches), 'encoding', -(-n // 256), unit=' x 256 chats', disable=None):
            for tokens in batch:
                (val if len(lengths) >= n - n_val else train).write(tokens)
                lengths.append(len(tokens))
                n_learned += int((tokens >= 0).sum())
except ValueError as e:
    fail(e)
print(f'{n:,} chats, the longest of {max(lengths):,} tokens; the model learns to write {n_learned:,} of all '
      f'{sum(lengths):,} tokens')
