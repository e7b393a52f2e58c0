"""
Writes a model that train.py has trained as a Hugging Face directory, which transformers, vLLM and lm-eval load as it is.

    python export.py --out_dir=out-shakespeare --hf_dir=hf-shakespeare

LoRA's adapters are merged into the weights, and rows of the vocabulary that are only there to fill it up are left out.
`--init_from=hf-shakespeare` brings it back, bit for bit.
"""
import json
import os
import shutil

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, or 'latest'
hf_dir = 'hf'  # the directory to write
dtype = 'float32'  # of the file: 'float32' as trained, or 'bfloat16' or 'float16', half as large
overwrite = False  # replace an export that is in hf_dir
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
# -----------------------------------------------------------------------------

written = {'config.json', 'generation_config.json', 'meta.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
if checkpoint not in ('best', 'latest'):
    fail(f"checkpoint = {checkpoint!r}: must be 'best' or 'latest'")
if dtype not in ('float32', 'bfloat16', 'float16'):
    fail(f"dtype = {dtype!r}: must be 'float32', 'bfloat16' or 'float16'")
if not os.path.exists(os.path.join(out_dir, 'config.json')):
    fail(f'out_dir = {out_dir!r} holds no run; train one with train.py')
if os.path.lexists(hf_dir) and not (overwrite and os.path.isdir(hf_dir) and set(os.listdir(hf_dir)) <= written):
    fail(f'hf_dir = {hf_dir!r} is there already' + (' and holds other files than an export' if overwrite else '; --overwrite=True replaces an export'))

import jax
import numpy as np
from flax.nnx.traversals import flatten_mapping
from safetensors.numpy import save_file

from model import find_devices
from rundir import open_model


def tokenizer_json(kind, chars='', name=''):
    """What the tokenizers library reads, and the text that ends a text or None, for the tokenizer of a meta.json."""
    everything = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None, 'post_processor': None}
    if kind == 'char':  # each character is a word, and words follow each other without spaces
        split = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
        words = {'type': 'WordLevel', 'vocab': {c: i for i, c in enumerate(chars)}, 'unk_token': ''}
        return everything | {'pre_tokenizer': split, 'decoder': {'type': 'Fuse'}, 'model': words}, None
    if name != 'gpt2':
        raise ValueError(f'the tokenizer {name} cannot be exported, only gpt2 and characters can')
    import tiktoken
    enc = tiktoken.get_encoding(name)
    rank = {enc.decode_single_token_bytes(i): i for i in range(enc.eot_token)}
    # GPT-2 writes each byte as a character that can be seen: those that cannot are moved to 256 and on
    seen = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    char = {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(seen)))}
    show = lambda token: ''.join(char[b] for b in token)
    merges = []
    for token in rank:  # the merge that makes a token joins what all earlier merges make of its bytes
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([show(part) for part in parts])
    end, byte_level = '<|endoftext|>', {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    added = {'id': enc.eot_token, 'content': end, 'special': True} | dict.fromkeys(('normalized', 'single_word', 'lstrip', 'rstrip'), False)
    vocab = {show(token): i for token, i in rank.items()} | {end: enc.eot_token}
    bpe = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '', 'fuse_unk': False,
           'vocab': vocab, 'merges': merges}
    parts = dict.fromkeys(('pre_tokenizer', 'post_processor', 'decoder'), byte_level)
    return everything | parts | {'added_tokens': [added], 'model': bpe}, end


with refuse(ValueError, OSError):
    find_devices('cpu')
    config, meta, read = open_model(out_dir, checkpoint)
    tokens, end = tokenizer_json(**meta['tokenizer'])
    params = read()
eos = tokens['model']['vocab'].get(end)

tensors = {}
for path, x in flatten_mapping(params).items():
    x = np.asarray(x)[:meta['vocab_size'] if path[0] == 'wte' else None]
    x = x.reshape(*x.shape[:-2], -1) if 'c_attn' in path else x  # (C, 3, C) -> (C, 3C)
    tensors['.'.join(map(str, ('transformer', *path)))] = x.astype(jax.numpy.dtype(dtype), copy=False)
if not config.bias:  # Hugging Face's model has biases in any case
    tensors |= {name.replace('weight', 'bias'): np.zeros(x.shape[-1:], x.dtype) for name, x in tensors.items()
                if not name.endswith(('wte.weight', 'wpe.weight'))}

hf = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': meta['vocab_size'], 'n_positions': config.block_size,
      'n_ctx': config.block_size, 'n_embd': config.n_embd, 'n_layer': config.n_layer, 'n_head': config.n_head,
      'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout,
      'attn_pdrop': config.dropout, 'tie_word_embeddings': True, 'bos_token_id': eos, 'eos_token_id': eos, 'torch_dtype': dtype,
      'bias': config.bias}  # the last is for --init_from
files = {'config.json': hf, 'generation_config.json': {'bos_token_id': eos, 'eos_token_id': eos}, 'tokenizer.json': tokens,
         # without model_input_names transformers 4 makes token types too, whose embeddings GPT-2 adds to those of the text
         'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
                                   'model_input_names': ['input_ids', 'attention_mask'], 'clean_up_tokenization_spaces': False} | ({'bos_token': end, 'eos_token': end} if end else {}),
         'meta.json': {key: meta[key] for key in ('vocab_size', 'tokenizer')}}

# all of it under another name first: no half export looks whole
half, old = (f'{os.path.abspath(hf_dir)}.{name}.tmp' for name in ('new', 'old'))
with refuse(OSError):
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    os.makedirs(half)
    for name, content in files.items():
        with open(os.path.join(half, name), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=1, ensure_ascii=False)
    save_file(tensors, os.path.join(half, 'model.safetensors'), metadata={'format': 'pt'})
    shutil.copymode(os.path.join(half, 'config.json'), os.path.join(half, 'model.safetensors'))  # it was for its owner's eyes only
    if os.path.exists(hf_dir):
        os.replace(hf_dir, old)
    os.replace(half, hf_dir)
    shutil.rmtree(old, ignore_errors=True)
size = sum(x.nbytes for x in tensors.values())
print(f'{hf_dir}: {sum(x.size for x in tensors.values()):,} parameters in {dtype}, {size / 1e6:.1f} MB, {meta["vocab_size"]:,} tokens')
