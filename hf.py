"""
Hugging Face's files, in and out: config.json, model.safetensors, tokenizer.json. This file turns them into dicts of
config fields and named tensors. The caller says which arrays it wants.
"""
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.nnx.traversals import flatten_mapping

from dataset import gpt2_vocabulary, read_json

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


# how Hugging Face's files call the fields of a GPTConfig
NAMES = {
    'gpt2': {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
             'n_embd': 'n_embd', 'n_inner': 'n_inner', 'bias': 'bias'},
    'qwen3': {'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
              'n_head': 'num_attention_heads', 'n_embd': 'hidden_size', 'n_inner': 'intermediate_size',
              'rope_theta': 'rope_theta'}}


def read_config(folder):
    """The fields of a GPTConfig, a dict, from a folder's config.json. Raises ValueError if it describes something that
    our GPT does not do."""
    path = folder / 'config.json'
    theirs = read_json(path)
    arch = theirs.get('model_type', 'gpt2')
    if arch not in [*NAMES]:  # it may be anything
        raise ValueError(f'{path}: model_type = {arch!r}: this GPT has {" and ".join(NAMES)} only')
    if arch == 'gpt2':
        theirs = {'bias': True} | theirs | {'n_inner': theirs.get('n_inner') or 0}
    else:  # rope_theta has a newer and an older place
        rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
        if not isinstance(rope, dict):
            raise ValueError(f'{path}: rope_parameters = {rope!r} is not an object')
        theirs |= rope
    fields = {}
    for key, name in NAMES[arch].items():
        if name not in theirs:
            raise ValueError(f'{path} lacks {name!r}, which {arch} has')
        if type(theirs[name]) not in {'bias': [bool], 'rope_theta': [int, float]}.get(key, [int]):
            raise ValueError(f'{path}: {name} = {theirs[name]!r} is not a number')
        fields[key] = theirs[name]
    ours = {'tie_word_embeddings': [True], 'quantization_config': [None]}
    if arch == 'gpt2':
        ours |= {'activation_function': ['gelu_new', 'gelu_pytorch_tanh'], 'layer_norm_epsilon': [1e-5],
                 'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
                 'add_cross_attention': [False]}
    else:  # what a file leaves out has Qwen3's own default
        theirs = {'tie_word_embeddings': False, 'num_key_value_heads': 32, 'head_dim': 128} | theirs
        ours |= {'hidden_act': ['silu'], 'rms_norm_eps': [1e-6], 'attention_bias': [False],
                 'num_key_value_heads': [fields['n_head']], 'use_sliding_window': [False],
                 'head_dim': [fields['n_embd'] // max(fields['n_head'], 1)],
                 'rope_type': ['default'], 'type': ['default']}
        fields['rope_theta'] = float(fields['rope_theta'])
    for key, values in ours.items():
        value = theirs.get(key, values[0])
        if value not in values:
            raise ValueError(f'{path}: {key} = {value!r}: this GPT has {values[0]!r} only')
    return {'arch': arch} | fields


def open_pretrained(name_or_directory):
    """(fields, tensors) of one of GPT2 or of a directory with a GPT-2 or a Qwen3: the fields of its GPTConfig, and
    tensors by name, which are read only where they are sliced. Raises ValueError if files are missing or damaged."""
    from safetensors import SafetensorError, safe_open
    is_name = name_or_directory in GPT2
    folder = download_gpt2(name_or_directory) if is_name else Path(name_or_directory)
    fields = read_config(folder)
    files = ['model.safetensors']
    if (index := folder / 'model.safetensors.index.json').exists():
        where = read_json(index).get('weight_map')
        if not isinstance(where, dict) or not all(isinstance(x, str) and Path(x).name == x for x in where.values()):
            raise ValueError(f'{index}: its weight_map does not map names of tensors to names of files in this folder')
        files = sorted(set(where.values()))
    if missing := next((file for file in files if not (folder / file).is_file()), None):
        if list(folder.glob('pytorch_model*.bin')):
            raise ValueError(
                f'{folder} has its weights in a pickle, which is never loaded; convert it where transformers '
                'is: python -c "from transformers import *; '
                f'AutoModelForCausalLM.from_pretrained(\'{folder}\').save_pretrained(\'{folder}\')"')
        raise ValueError(f'{folder} lacks {missing}')
    tensors = {}
    for file in files:
        try:
            opened = safe_open(folder / file, framework='numpy')
        except SafetensorError as e:
            raise ValueError(f'{folder / file} is damaged ({e})') from None
        for key in opened.keys():
            tensors[key.removeprefix('transformer.').removeprefix('model.')] = opened.get_slice(key)
    return fields, tensors


# which tensors of a Qwen3 a parameter of ours is
QWEN3 = {'wte': ['embed_tokens'], 'ln_f': ['norm'], 'ln_1': ['input_layernorm'],
         'ln_2': ['post_attention_layernorm'], 'attn.q_norm': ['self_attn.q_norm'],
         'attn.k_norm': ['self_attn.k_norm'], 'attn.c_proj': ['self_attn.o_proj'],
         'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
         'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}


def in_file(path, shape, arch):
    """Where a file has the parameter at `path`, such as ('h', 0, 'attn', 'c_attn', 'weight'): names and shapes. GPT-2
    has c_attn (C, 3, C) as (C, 3C). Qwen3 has it as three tensors, and matrices (in, out) as (out, in)."""
    name = '.'.join(map(str, path))
    if arch == 'gpt2':
        return {name: [*shape[:-2], shape[-2] * shape[-1]] if '.c_attn.' in name else [*shape]}
    layer = f'layers.{path[1]}.' if path[0] == 'h' else ''
    names = QWEN3['.'.join(path[2:-1] if layer else path[:-1])]
    shape = [shape[-1], shape[0]] if layer and len(shape) > 1 else [*shape]
    return {f'{layer}{name}.weight': shape for name in names}


def check_tensors(tensors, wanted, fields, source):
    """Raises ValueError unless `tensors` are just the abstract parameters `wanted`."""
    wanted = [in_file(path, x.shape, fields['arch']) for path, x in flatten_mapping(wanted).items()]
    wanted = {name: shape for names in wanted for name, shape in names.items()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f'{source} lacks the tensor {name}')
        if tensors[name].get_shape() != shape:
            raise ValueError(f'{source}: the tensor {name} is {tensors[name].get_shape()}, and with its config.json '
                             f'should be {shape}')
    [embedding] = in_file(('wte', 'weight'), (0, 0), fields['arch'])
    for name in sorted(tensors.keys() - wanted.keys()):
        if name == 'lm_head.weight' and not np.array_equal(tensors[name][:], tensors[embedding][:]):
            raise ValueError(f'{source}: lm_head.weight is not {embedding}: this GPT has one matrix for both')
        # allowed leftovers: the causal mask and the tied head of old files; zero biases that export.py wrote
        zero = name.endswith('.bias') and not fields.get('bias') and not np.any(tensors[name][:])
        old = name == 'lm_head.weight' or name.endswith(('.attn.bias', '.attn.masked_bias'))
        if not (zero or old):
            raise ValueError(f'{source} has a tensor that is not of this model: {name}')


def read_params(tensors, wanted, arch='gpt2'):
    """The abstract parameters `wanted`, filled from tensors slice by slice: each device reads its own part. They may
    want fewer positions than there are. Raises ValueError if they want more."""
    def read(path, x):
        path = [p.key for p in path]
        parts = [tensors[name] for name in in_file(path, x.shape, arch)]
        shape = parts[0].get_shape()
        if path[0] == 'wpe' and len(x) > shape[0]:
            raise ValueError(f'block_size = {len(x)}: the pretrained model has {shape[0]} positions')

        def part(index):
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, x.shape))
            if arch == 'qwen3' and x.ndim == 3:
                part = np.stack([matrix[index[2], index[0]].T for matrix in parts[index[1]]], 1)
            elif arch == 'qwen3' and path[0] == 'h' and x.ndim == 2:
                part = parts[0][index[::-1]].T
            elif len(shape) == x.ndim:
                part = parts[0][index]
            else:
                part = parts[0][:].reshape(x.shape)[index]
            return np.asarray(part, np.float32)

        sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(x.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(read, wanted)


# -----------------------------------------------------------------------------
# out


def tokenizer_json(kind, chars='', name=''):
    """The contents of tokenizer.json for the tokenizer of a meta.json, and the text of its end-of-text token or None.
    Raises ValueError for a tokenizer that cannot be exported."""
    result = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
              'post_processor': None}
    if kind == 'char':  # each character is a word, and words follow each other without spaces
        split = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
        unknown = next((c for c in ' \n' if c in chars), chars[0])  # there is no id for other characters
        words = {'type': 'WordLevel', 'vocab': {c: i for i, c in enumerate(chars)}, 'unk_token': unknown}
        return result | {'pre_tokenizer': split, 'decoder': {'type': 'Fuse'}, 'model': words}, None
    if name != 'gpt2':
        raise ValueError(f'the tokenizer {name} cannot be exported, only gpt2 and characters can')
    vocab, merges = gpt2_vocabulary()
    end = '<|endoftext|>'
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    added = {'id': vocab[end], 'content': end, 'special': True, 'normalized': False, 'single_word': False,
             'lstrip': False, 'rstrip': False}
    bpe = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
           'fuse_unk': False, 'vocab': vocab, 'merges': merges}
    result |= dict.fromkeys(('pre_tokenizer', 'post_processor', 'decoder'), byte_level)
    return result | {'added_tokens': [added], 'model': bpe}, end


def file_tensors(params, config, vocab_size, dtype):
    """Parameters as the tensors of a GPT2LMHeadModel or a Qwen3ForCausalLM: without the rows that pad the vocabulary.
    GPT-2 gets biases of zero where our model has none."""
    tensors = {}
    arch = config.arch
    for path, x in flatten_mapping(params).items():
        x = np.asarray(x)[:vocab_size if path[0] == 'wte' else None].astype(jax.numpy.dtype(dtype), copy=False)
        names = in_file(path, x.shape, arch)
        for i, (name, shape) in enumerate(names.items()):
            part = x[:, i] if len(names) > 1 else x
            transposed = arch == 'qwen3' and path[0] == 'h' and part.ndim == 2
            tensors[name] = np.ascontiguousarray(part.T if transposed else part.reshape(shape))
        if arch == 'gpt2' and not config.bias and path[0] not in ('wte', 'wpe'):
            tensors[name.replace('weight', 'bias')] = np.zeros(shape[-1:], x.dtype)
    prefix = {'gpt2': 'transformer', 'qwen3': 'model'}[arch]
    return {f'{prefix}.{name}': x for name, x in tensors.items()}


def gpt2_config(config):
    """What the config.json of a GPT2LMHeadModel says about a GPTConfig."""
    return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_positions': config.block_size,
            'n_ctx': config.block_size, 'n_embd': config.n_embd, 'n_layer': config.n_layer, 'n_head': config.n_head,
            'n_inner': config.n_inner or None, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
            'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
            'bias': config.bias}  # for read_config()


def qwen3_config(config):
    """The same for a Qwen3ForCausalLM. Its own defaults are other ones, so all fields are there, and rope's theta is in
    its newer and its older place."""
    return {'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3',
            'max_position_embeddings': config.block_size, 'hidden_size': config.n_embd,
            'num_hidden_layers': config.n_layer, 'num_attention_heads': config.n_head,
            'num_key_value_heads': config.n_head, 'head_dim': config.n_embd // config.n_head,
            'intermediate_size': config.mlp_width, 'hidden_act': 'silu', 'rms_norm_eps': 1e-6,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_theta},
            'rope_theta': config.rope_theta, 'rope_scaling': None, 'attention_bias': False, 'attention_dropout': 0.0,
            'use_sliding_window': False, 'sliding_window': None, 'max_window_layers': config.n_layer,
            'layer_types': ['full_attention'] * config.n_layer, 'initializer_range': 0.02, 'use_cache': True}


def export_files(config, meta, dtype):
    """The JSON files of an export, by name, for a GPTConfig and the meta of its dataset."""
    tokens, end = tokenizer_json(**meta['tokenizer'])
    eot = tokens['model']['vocab'].get(end)
    special = {'bos_token_id': eot, 'eos_token_id': eot}
    of_model = {'gpt2': gpt2_config, 'qwen3': qwen3_config}[config.arch](config)
    tokenizer = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
                 # else transformers 4 adds token types, i.e. rows of wte, to the text
                 'model_input_names': ['input_ids', 'attention_mask'], 'clean_up_tokenization_spaces': False}
    return {'config.json': of_model | {'vocab_size': meta['vocab_size'], 'tie_word_embeddings': True,
                                       'torch_dtype': dtype, **special},
            'generation_config.json': special, 'tokenizer.json': tokens,
            'tokenizer_config.json': tokenizer | ({'bos_token': end, 'eos_token': end} if end else {}),
            'meta.json': {key: meta[key] for key in ('vocab_size', 'tokenizer')}}


EXPORT = {'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'meta.json',
          'model.safetensors'}


def write_directory(folder, files, tensors):
    """Writes an export, in place of an earlier one. It gets its name when it is whole. Raises OSError, and then an
    earlier one is as it was."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    new, old = (Path(f'{os.path.abspath(folder)}.{name}.tmp') for name in ('new', 'old'))
    remove(new)
    try:
        new.mkdir(parents=True)
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding='utf-8')
        save_file(tensors, new / 'model.safetensors', metadata={'format': 'pt'})
        # save_file() makes a file that only its owner may read
        shutil.copymode(new / 'config.json', new / 'model.safetensors')
        if os.path.exists(folder):
            remove(old)
            os.replace(folder, old)
        os.replace(new, folder)
        remove(old)
    except (OSError, SafetensorError) as e:  # such as a full disk, which comes as either
        raise OSError(f'{folder}: {e}') from None
    finally:
        remove(new)


def remove(path):
    """Removes what an earlier export may have left over: a folder, a file, or a link, but not what that leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
