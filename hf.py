"""
Hugging Face's files, in and out: config.json, model.safetensors, tokenizer.json. This file deals in
dicts of config fields and in named tensors, and knows no model: the caller says which arrays it wants.
"""
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.nnx.traversals import flatten_mapping

from dataset import read_json

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# -----------------------------------------------------------------------------
# in


def download_gpt2(name):
    """The folder of one of GPT2, downloaded the first time. Raises ValueError if that fails."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo, files = f'openai-community/{name}', ('config.json', 'model.safetensors')
    for cached in (True, False):
        try:
            if not cached:  # without a network this fails at once; hf_hub_download tries longer
                get_hf_file_metadata(hf_hub_url(repo, files[0]))
            paths = [hf_hub_download(repo, file, local_files_only=cached) for file in files]
            return Path(paths[0]).parent
        except Exception as e:  # an error of the hub, of its HTTP library, or of the disk
            reason = type(e).__name__
    raise ValueError(f'{name} cannot be downloaded ({reason}): put {" and ".join(files)} of '
                     f'https://huggingface.co/{repo}/tree/main into a folder and give its path instead')


def read_config(folder):
    """The fields of a GPTConfig, a dict, from a folder's config.json. Raises ValueError if it
    describes something that our GPT does not do."""
    path = folder / 'config.json'
    hf = read_json(path)
    try:
        fields = {'block_size': hf['n_positions'], 'bias': hf.get('bias', True)}
        fields |= {key: hf[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    except KeyError as e:
        raise ValueError(f'{path} lacks {e}, which GPT-2 has') from None
    for key, value in fields.items():
        if type(value) is not (bool if key == 'bias' else int):
            raise ValueError(f'{path}: {key} = {value!r} is not a number')
    ours = {'model_type': ['gpt2'], 'activation_function': ['gelu_new', 'gelu_pytorch_tanh'],
            'layer_norm_epsilon': [1e-5], 'n_inner': [None, 4 * fields['n_embd']],
            'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
            'add_cross_attention': [False], 'tie_word_embeddings': [True], 'quantization_config': [None]}
    for key, values in ours.items():
        if (value := hf.get(key, values[0])) not in values:
            raise ValueError(f'{path}: {key} = {value!r}: this GPT has {values[0]!r} only')
    return fields


def open_gpt2(name_or_directory):
    """(fields, tensors) of one of GPT2 or of a directory in its format: the fields of its
    GPTConfig, and tensors by name, which are read only where they are sliced. Raises ValueError if
    files are missing or damaged."""
    from safetensors import SafetensorError, safe_open
    is_name = name_or_directory in GPT2
    folder = download_gpt2(name_or_directory) if is_name else Path(name_or_directory)
    if not (folder / 'config.json').is_file():
        raise ValueError(f'{name_or_directory} is no folder with a config.json, and none of {", ".join(GPT2)}')
    if 'model_args' in read_json(folder / 'config.json'):
        raise ValueError(f'{folder} is a run directory: load_model() in rundir.py reads it')
    fields, files = read_config(folder), ['model.safetensors']
    if (index := folder / 'model.safetensors.index.json').exists():
        files = sorted(set(read_json(index).get('weight_map', {}).values()))
    if missing := next((file for file in files if not (folder / file).is_file()), None):
        if list(folder.glob('pytorch_model*.bin')):
            raise ValueError(
                f'{folder} has its weights in a pickle, which is never loaded; convert it where transformers '
                'is: python -c "from transformers import *; '
                f'GPT2LMHeadModel.from_pretrained(\'{folder}\').save_pretrained(\'{folder}\')"')
        raise ValueError(f'{folder} lacks {missing}')
    tensors = {}
    for file in files:
        try:
            opened = safe_open(folder / file, framework='numpy')
        except SafetensorError as e:
            raise ValueError(f'{folder / file} is damaged ({e})') from None
        for key in opened.keys():
            tensors[key.removeprefix('transformer.')] = opened.get_slice(key)
    return fields, tensors


def tensor_name(path):
    """'h.0.attn.c_attn.weight' for ('h', 0, 'attn', 'c_attn', 'weight')."""
    return '.'.join(map(str, path))


def file_shape(name, shape):
    """The shape of an array in GPT-2's files: c_attn is (C, 3C) there and (C, 3, C) here."""
    return [*shape[:-2], shape[-2] * shape[-1]] if '.c_attn.' in name else [*shape]


def check_tensors(tensors, wanted, fields, source):
    """Raises ValueError unless `tensors` are just the abstract parameters `wanted`."""
    wanted = {tensor_name(path): x for path, x in flatten_mapping(wanted).items()}
    for name, x in wanted.items():
        if name not in tensors:
            raise ValueError(f'{source} lacks the tensor {name}')
        if (found := tensors[name].get_shape()) != (shape := file_shape(name, x.shape)):
            raise ValueError(f'{source}: the tensor {name} is {found}, and with its config.json should '
                             f'be {shape}')
    for name in sorted(tensors.keys() - wanted.keys()):
        # old files also hold the causal mask and the output layer, which is tied; export.py writes
        # zero biases
        zero = name.endswith('.bias') and not fields['bias'] and not np.any(tensors[name][:])
        old = name == 'lm_head.weight' or name.endswith(('.attn.bias', '.attn.masked_bias'))
        if not (zero or old):
            raise ValueError(f'{source} has a tensor that is not of this model: {name}')


def read_params(tensors, wanted):
    """The abstract parameters `wanted`, filled from tensors slice by slice: each device reads its
    own part. They may want fewer positions than there are. Raises ValueError if they want more."""
    def read(path, x):
        tensor = tensors[name := tensor_name(p.key for p in path)]
        shape = tensor.get_shape()
        if name == 'wpe.weight' and len(x) > shape[0]:
            raise ValueError(f'block_size = {len(x)}: the pretrained model has {shape[0]} positions')

        def part(index):
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, x.shape))
            part = tensor[index] if len(shape) == x.ndim else tensor[:].reshape(x.shape)[index]
            return np.asarray(part, np.float32)

        sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(x.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(read, wanted)


# -----------------------------------------------------------------------------
# out


def tokenizer_json(kind, chars='', name=''):
    """The contents of tokenizer.json for the tokenizer of a meta.json, and the text of its
    end-of-text token or None. Raises ValueError for a tokenizer that cannot be exported."""
    result = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
              'normalizer': None, 'post_processor': None}
    if kind == 'char':  # each character is a word, and words follow each other without spaces
        split = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated',
                 'invert': False}
        unknown = next((c for c in ' \n' if c in chars), chars[0])  # there is no id for other characters
        words = {'type': 'WordLevel', 'vocab': {c: i for i, c in enumerate(chars)}, 'unk_token': unknown}
        return result | {'pre_tokenizer': split, 'decoder': {'type': 'Fuse'}, 'model': words}, None
    if name != 'gpt2':
        raise ValueError(f'the tokenizer {name} cannot be exported, only gpt2 and characters can')
    import tiktoken
    enc = tiktoken.get_encoding(name)
    rank = {enc.decode_single_token_bytes(i): i for i in range(enc.eot_token)}
    # GPT-2 writes each byte as a visible character: bytes that are none are moved to 256 and on
    visible = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    char = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    show = lambda token: ''.join(char[b] for b in token)
    merges = []
    for token in rank:  # its merge joins what all earlier merges make of its bytes
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            order = lambda i: rank.get(parts[i] + parts[i + 1], len(rank))
            i = min(range(len(parts) - 1), key=order)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([show(part) for part in parts])
    end = '<|endoftext|>'
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': True}
    added = {'id': enc.eot_token, 'content': end, 'special': True, 'normalized': False,
             'single_word': False, 'lstrip': False, 'rstrip': False}
    bpe = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
           'end_of_word_suffix': '', 'fuse_unk': False, 'merges': merges,
           'vocab': {show(token): i for token, i in rank.items()} | {end: enc.eot_token}}
    result |= dict.fromkeys(('pre_tokenizer', 'post_processor', 'decoder'), byte_level)
    return result | {'added_tokens': [added], 'model': bpe}, end


def gpt2_tensors(params, vocab_size, bias, dtype):
    """Parameters as the tensors of a GPT2LMHeadModel: without the rows that pad the vocabulary, and
    with biases of zero where our model has none."""
    tensors = {}
    for path, x in flatten_mapping(params).items():
        name = tensor_name(path)
        x = np.asarray(x)[:vocab_size if name == 'wte.weight' else None]
        x = x.reshape(file_shape(name, x.shape)).astype(jax.numpy.dtype(dtype), copy=False)
        tensors[name] = x
        if not bias and name not in ('wte.weight', 'wpe.weight'):
            tensors[name.replace('weight', 'bias')] = np.zeros(x.shape[-1:], x.dtype)
    return {f'transformer.{name}': x for name, x in tensors.items()}


def export_files(config, meta, dtype):
    """The JSON files of an export, by name, for a GPTConfig and the meta of its dataset."""
    tokens, end = tokenizer_json(**meta['tokenizer'])
    special = {'bos_token_id': (eos := tokens['model']['vocab'].get(end)), 'eos_token_id': eos}
    hf = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': meta['vocab_size'],
          'n_positions': config.block_size, 'n_ctx': config.block_size, 'n_embd': config.n_embd,
          'n_layer': config.n_layer, 'n_head': config.n_head, 'activation_function': 'gelu_new',
          'layer_norm_epsilon': 1e-5, 'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout,
          'attn_pdrop': config.dropout, 'tie_word_embeddings': True, 'torch_dtype': dtype,
          'bias': config.bias, **special}  # `bias` is for read_config()
    # without model_input_names, transformers 4 also makes token types, whose embeddings GPT-2 adds
    # to the text's
    tokenizer = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
                 'model_input_names': ['input_ids', 'attention_mask'],
                 'clean_up_tokenization_spaces': False}
    return {'config.json': hf, 'generation_config.json': special, 'tokenizer.json': tokens,
            'tokenizer_config.json': tokenizer | ({'bos_token': end, 'eos_token': end} if end else {}),
            'meta.json': {key: meta[key] for key in ('vocab_size', 'tokenizer')}}


EXPORT = {'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
          'meta.json', 'model.safetensors'}


def write_directory(folder, files, tensors):
    """Writes an export, in place of an earlier one. It gets its name when it is whole."""
    from safetensors.numpy import save_file
    new, old = (f'{os.path.abspath(folder)}.{name}.tmp' for name in ('new', 'old'))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(new)
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        Path(new, name).write_text(text, encoding='utf-8')
    save_file(tensors, Path(new, 'model.safetensors'), metadata={'format': 'pt'})
    # save_file() makes a file that only its owner may read
    shutil.copymode(Path(new, 'config.json'), Path(new, 'model.safetensors'))
    if os.path.exists(folder):
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
