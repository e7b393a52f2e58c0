"""
Hugging Face's files, in and out: config.json, model.safetensors, tokenizer.json. This file turns them into dicts of
config fields and named tensors. The caller says which arrays it wants.
"""
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.nnx.traversals import flatten_mapping

from dataset import as_path, gpt2_vocabulary, read_json, remove

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# what a run that starts from a model keeps beside the tokenizer.json, so that its export can give it back as it came
SMALL_FILES = ('config.json', 'generation_config.json', 'tokenizer_config.json', 'special_tokens_map.json',
               'added_tokens.json', 'chat_template.jinja', 'vocab.json', 'merges.txt', 'tokenizer.model')
WEIGHTS = ('model.safetensors', 'model-*.safetensors', 'model.safetensors.index.json')

# -----------------------------------------------------------------------------
# in


def is_name(source):
    """Whether a model is named as on the hub, rather than by its path."""
    return source in GPT2 or bool(re.fullmatch(r'[\w.-]+/[\w.-]+', str(source))) and not os.path.exists(source)


def download(name):
    """The folder of a model of the hub, one of GPT2 or such as 'Qwen/Qwen3-0.6B', downloaded the first time. Raises
    ValueError if that fails."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    repo = f'openai-community/{name}' if name in GPT2 else name
    for cached in (True, False):
        try:
            if not cached:  # without a network this fails at once; snapshot_download tries longer
                get_hf_file_metadata(hf_hub_url(repo, 'config.json'))
            for files in (('tokenizer.json', *SMALL_FILES), WEIGHTS):  # the weights come last: where they are, all is
                folder = Path(snapshot_download(repo, allow_patterns=[*files], local_files_only=cached))
            weight_files(folder)
            return folder
        except Exception as e:  # an error of the hub, of its HTTP library, or of the disk; or weights are missing
            reason = str(e) if type(e) is ValueError else type(e).__name__
    raise ValueError(f"{name} cannot be downloaded ({reason}): put config.json and model.safetensors of "
                     f'https://huggingface.co/{repo}/tree/main, and its tokenizer, into a folder and give its path '
                     'instead')


# how Hugging Face's files call the fields of a GPTConfig
ROTARY = {'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
          'n_head': 'num_attention_heads', 'n_embd': 'hidden_size', 'n_inner': 'intermediate_size',
          'n_kv_head': 'num_key_value_heads', 'head_dim': 'head_dim', 'norm_eps': 'rms_norm_eps',
          'tied': 'tie_word_embeddings', 'rope_theta': 'rope_theta'}
NAMES = {'gpt2': {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
                  'n_embd': 'n_embd', 'n_inner': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
                  'tied': 'tie_word_embeddings', 'bias': 'bias'},
         'qwen3': ROTARY, 'qwen2': ROTARY, 'llama': ROTARY}
LLAMA3 = {'rope_factor': 'factor', 'rope_context': 'original_max_position_embeddings'}
TYPES = {'norm_eps': float, 'tied': bool, 'rope_theta': float, 'rope_factor': float, 'bias': bool}  # the rest: int
# what a file that leaves it out means; None is our 0
LEFT_OUT = {'gpt2': {'n_inner': None, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'bias': True},
            'llama': {'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False,
                      'rope_theta': 1e4}}
LEFT_OUT['qwen2'] = LEFT_OUT['llama'] | {'num_key_value_heads': 32}
LEFT_OUT['qwen3'] = LEFT_OUT['qwen2'] | {'head_dim': 128}


def read_config(folder):
    """The fields of a GPTConfig, a dict, from a folder's config.json. Raises ValueError if it describes something that
    our GPT does not do."""
    path = folder / 'config.json'
    theirs = read_json(path)
    arch = theirs.get('model_type', 'gpt2')
    if arch not in [*NAMES]:  # it may be anything
        raise ValueError(f'{path}: model_type = {arch!r}: this GPT has {", ".join(NAMES)} only')
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}  # a newer and an older name
    if not isinstance(rope, dict):
        raise ValueError(f'{path}: rope_parameters = {rope!r} is not an object')
    theirs = LEFT_OUT[arch] | theirs | rope
    is_llama3 = 'llama3' in (theirs.get('rope_type'), theirs.get('type'))
    fields = {'arch': arch}
    for key, name in (NAMES[arch] | (LLAMA3 if is_llama3 else {})).items():
        if name not in theirs:
            raise ValueError(f'{path} lacks {name!r}, which {arch} has')
        value, kind = theirs[name], TYPES.get(key, int)
        if value is None and name in LEFT_OUT[arch]:
            value = 0
        fits = type(value) is kind or kind is float and type(value) is int
        if not fits or not abs(value) < 2**40:  # JSON in Python may hold a NaN
            what = 'true or false' if kind is bool else 'a number below 2^40'
            raise ValueError(f'{path}: {name} = {value!r} is not {what}')
        fields[key] = kind(value)
    ours = {'quantization_config': [None]}
    if arch == 'gpt2':
        ours |= {'activation_function': ['gelu_new', 'gelu_pytorch_tanh'], 'scale_attn_weights': [True],
                 'scale_attn_by_inverse_layer_idx': [False], 'add_cross_attention': [False]}
    else:
        ours |= {'hidden_act': ['silu'], 'attention_bias': [False], 'mlp_bias': [False], 'use_sliding_window': [False],
                 'rope_type': ['default', 'llama3'], 'type': ['default', 'llama3'], 'low_freq_factor': [1],
                 'high_freq_factor': [4], 'partial_rotary_factor': [1], 'rope_interleaved': [False]}
    for key, values in ours.items():
        value = theirs.get(key, values[0])
        if value not in values:
            raise ValueError(f'{path}: {key} = {value!r}: this GPT has {" or ".join(map(repr, values))} only')
    return fields


def weight_files(folder):
    """The names of a folder's safetensors. Raises ValueError if one of them is missing."""
    files = ['model.safetensors']
    if (index := folder / 'model.safetensors.index.json').is_file():
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
    return files


def open_pretrained(folder):
    """(fields, tensors) of a folder with one of NAMES: the fields of its GPTConfig, and tensors by name, which are read
    only where they are sliced. Raises ValueError if files are missing or damaged."""
    from safetensors import SafetensorError, safe_open
    fields, tensors = read_config(folder), {}
    for file in weight_files(folder):
        try:
            opened = safe_open(folder / file, framework='numpy')
        except SafetensorError as e:
            raise ValueError(f'{folder / file} is damaged ({e})') from None
        for key in opened.keys():
            tensors[key.removeprefix('transformer.').removeprefix('model.')] = opened.get_slice(key)
    # export.py writes zeros where our model has no biases, and says so. Trained with transformers, they are some
    if not fields.get('bias', True):
        fields['bias'] = any(name.endswith('.bias') and len(x.get_shape()) == 1 and np.any(x[:])
                             for name, x in tensors.items())
    return fields, tensors


def dtype_of(tensors):
    """'bfloat16' or 'float16' where all matrices of a file are, else 'float32'."""
    dtypes = {x.get_dtype() for x in tensors.values() if len(x.get_shape()) > 1}
    return {'BF16': 'bfloat16', 'F16': 'float16'}.get(dtypes.pop() if len(dtypes) == 1 else '', 'float32')


# which tensors of a Qwen3, a Qwen2 or a Llama a parameter of ours is
PARTS = {'wte': ['embed_tokens'], 'lm_head': ['lm_head'], 'ln_f': ['norm'], 'ln_1': ['input_layernorm'],
         'ln_2': ['post_attention_layernorm'], 'attn.q_norm': ['self_attn.q_norm'],
         'attn.k_norm': ['self_attn.k_norm'], 'attn.c_proj': ['self_attn.o_proj'],
         'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
         'attn.c_q': ['self_attn.q_proj'], 'attn.c_kv': ['self_attn.k_proj', 'self_attn.v_proj'],
         'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}


def in_file(path, shape, arch):
    """Where a file has the parameter at `path`, such as ('h', 0, 'attn', 'c_attn', 'weight'): names and shapes. GPT-2
    has c_attn (C, 3, C) as (C, 3C). The others have it as three tensors, and matrices (in, out) as (out, in)."""
    name = '.'.join(map(str, path))
    if arch == 'gpt2':
        return {name: [*shape[:-2], shape[-2] * shape[-1]] if '.c_attn.' in name else [*shape]}
    layer = f'layers.{path[1]}.' if path[0] == 'h' else ''
    names = PARTS['.'.join(path[2:-1] if layer else path[:-1])]
    if path[-1] == 'bias':
        shape = shape[-1:]
    elif layer and len(shape) > 1:
        shape = shape[-1], shape[0]
    return {f'{layer}{name}.{path[-1]}': [*shape] for name in names}


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
        if (dtype := tensors[name].get_dtype()) not in ('F64', 'F32', 'BF16', 'F16'):
            raise ValueError(f'{source}: the tensor {name} holds {dtype}: save the model unquantized')
    [embedding] = in_file(('wte', 'weight'), (0, 0), fields['arch'])
    for name in sorted(tensors.keys() - wanted.keys()):
        if name == 'lm_head.weight' and not np.array_equal(tensors[name][:], tensors[embedding][:]):
            raise ValueError(f'{source}: lm_head.weight is not {embedding}, but its config.json says '
                             'tie_word_embeddings = True')
        # allowed leftovers: masks, tied heads and rotary speeds of old files; zero biases that export.py wrote
        zero = name.endswith('.bias') and not fields.get('bias') and not np.any(tensors[name][:])
        old = name == 'lm_head.weight' or name.endswith(('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'))
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
            if len(parts) > 1 and path[-1] == 'bias':
                part = np.stack([bias[index[1]] for bias in parts[index[0]]])
            elif len(parts) > 1:
                part = np.stack([matrix[index[2], index[0]].T for matrix in parts[index[1]]], 1)
            elif arch != 'gpt2' and path[0] == 'h' and x.ndim == 2:
                part = parts[0][index[::-1]].T
            elif len(shape) == x.ndim:
                part = parts[0][index]
            else:
                part = parts[0][:].reshape(x.shape)[index]
            return np.asarray(part, x.dtype)

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
    """Parameters as the tensors of Hugging Face's class for config.arch: without the rows that pad the vocabulary.
    GPT-2 gets biases of zero where our model has none."""
    tensors = {}
    arch = config.arch
    for path, x in flatten_mapping(params).items():
        rows = vocab_size if path[0] in ('wte', 'lm_head') else None
        x = np.asarray(x)[:rows].astype(jax.numpy.dtype(dtype), copy=False)
        names = in_file(path, x.shape, arch)
        for i, (name, shape) in enumerate(names.items()):
            part = x[..., i, :] if len(names) > 1 else x
            transposed = arch != 'gpt2' and path[0] == 'h' and part.ndim == 2
            tensors[name] = np.ascontiguousarray(part.T if transposed else part.reshape(shape))
        if arch == 'gpt2' and not config.bias and path[0] not in ('wte', 'wpe', 'lm_head'):
            tensors[name.replace('weight', 'bias')] = np.zeros(shape[-1:], x.dtype)
    prefix = 'transformer.' if arch == 'gpt2' else 'model.'
    return {name if name == 'lm_head.weight' else prefix + name: x for name, x in tensors.items()}


def gpt2_config(config):
    """What the config.json of a GPT2LMHeadModel says about a GPTConfig."""
    return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_positions': config.block_size,
            'n_ctx': config.block_size, 'n_embd': config.n_embd, 'n_layer': config.n_layer, 'n_head': config.n_head,
            'n_inner': config.n_inner or None, 'activation_function': 'gelu_new',
            'layer_norm_epsilon': config.norm_eps or 1e-5, 'resid_pdrop': config.dropout,
            'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout, 'bias': config.bias}  # for read_config()


def rotary_config(config):
    """The same for a Qwen3ForCausalLM, a Qwen2ForCausalLM or a LlamaForCausalLM. Their own defaults are other ones, so
    all fields are there, and those of rope in their newer and in their older places."""
    rope = {'rope_type': 'default'}
    if config.rope_factor != 1:
        rope = {'rope_type': 'llama3', 'factor': config.rope_factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                'original_max_position_embeddings': config.rope_context}
    return {'architectures': [f'{config.arch.capitalize()}ForCausalLM'], 'model_type': config.arch,
            'max_position_embeddings': config.block_size, 'hidden_size': config.n_embd,
            'num_hidden_layers': config.n_layer, 'num_attention_heads': config.n_head,
            'num_key_value_heads': config.n_kv_head or config.n_head, 'head_dim': config.head_size,
            'intermediate_size': config.mlp_width, 'hidden_act': 'silu', 'rms_norm_eps': config.norm_eps or 1e-6,
            'rope_parameters': rope | {'rope_theta': config.rope_theta}, 'rope_theta': config.rope_theta,
            'rope_scaling': rope if config.rope_factor != 1 else None, 'attention_bias': False, 'mlp_bias': False,
            'attention_dropout': 0.0, 'use_sliding_window': False, 'sliding_window': None,
            'max_window_layers': config.n_layer, 'layer_types': ['full_attention'] * config.n_layer,
            'initializer_range': 0.02, 'use_cache': True}


def export_config(config, theirs, vocab_size, dtype):
    """The config.json of an export. `theirs` is that of the model that a run started from, {} for none: what training
    does not change stays as it was. Raises ValueError if transformers has no such model."""
    if config.arch not in NAMES:
        raise ValueError(f'arch = {config.arch!r}: transformers has no class for it, only for {", ".join(NAMES)}')
    if config.arch == 'gpt2' and (config.n_kv_head or config.head_dim):
        raise ValueError(f'n_kv_head = {config.n_kv_head}, head_dim = {config.head_dim}: transformers has neither in '
                         "its GPT-2; it has them in its class for arch = 'llama'")
    ours = (gpt2_config if config.arch == 'gpt2' else rotary_config)(config)
    if config.arch == 'gpt2':
        changed = {key: ours[key] for key in ('n_positions', 'n_ctx', 'bias')}
    else:  # it still is a model for as many positions, even if it saw fewer
        length = 'max_position_embeddings'
        changed = {length: max(ours[length], theirs.get(length, 0))}
    changed |= {'torch_dtype': dtype, 'dtype': dtype}
    return ours | {'vocab_size': vocab_size, 'tie_word_embeddings': config.tied} | theirs | changed


def export_files(config, meta, dtype):
    """The small files of an export, by name, for a GPTConfig and the meta that open_model() gives: bytes, or what a
    JSON file says. Raises ValueError where transformers has no such model or tokenizer."""
    folder, tokenizer = as_path(meta['folder']), meta['tokenizer']
    kept = {name: (folder / name).read_bytes() for name in SMALL_FILES if (folder / name).is_file()}
    theirs = read_json(folder / 'config.json') if 'config.json' in kept else {}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
                # else transformers 4 adds token types, i.e. rows of wte, to the text
                'model_input_names': ['input_ids', 'attention_mask'], 'clean_up_tokenization_spaces': False}
    if tokenizer['kind'] == 'hf':  # as it came
        special = {f'{name}_token': tokenizer[name] for name in ('bos', 'eos') if name in tokenizer}
        files = {'tokenizer_config.json': settings | special} | kept
        files['tokenizer.json'] = as_path(tokenizer['file']).read_bytes()
    else:
        tokens, end = tokenizer_json(**tokenizer)
        eot = tokens['model']['vocab'].get(end)
        files = {'generation_config.json': {'bos_token_id': eot, 'eos_token_id': eot}, 'tokenizer.json': tokens,
                 'tokenizer_config.json': settings | ({'bos_token': end, 'eos_token': end} if end else {}),
                 'meta.json': {key: meta[key] for key in ('vocab_size', 'tokenizer', 'chat_template') if key in meta}}
        theirs |= files['generation_config.json']
    if 'chat_template' in meta:  # with which the chats were written that the run learned from
        files['chat_template.jinja'] = meta['chat_template'].encode()
    return files | {'config.json': export_config(config, theirs, meta['vocab_size'], dtype)}


EXPORT = {*SMALL_FILES, 'tokenizer.json', 'meta.json', 'model.safetensors'}


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
            if not isinstance(content, bytes):
                content = json.dumps(content, indent=1, ensure_ascii=False).encode()
            (new / name).write_bytes(content)
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
