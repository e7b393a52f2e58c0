"""
A model as a GGUF file, which llama.cpp, Ollama and LM Studio run:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import json
import os
from pathlib import Path

import gguf
import numpy as np

from dataset import subword_tokenizer
from model import rotary_speeds

FILE_TYPES = {'float32': 'ALL_F32', 'float16': 'MOSTLY_F16', 'bfloat16': 'MOSTLY_BF16', 'q8_0': 'MOSTLY_Q8_0'}
TYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}

# llama.cpp knows by name how a byte-level tokenizer cuts a text into words
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
NAMES = {('ByteLevel',): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm', (WORDS % '',): 'qwen2',
         (WORDS % '{1,3}',): 'llama-bpe'}


def words(cut):
    """How a pre_tokenizer of a tokenizer.json cuts a text into words: regular expressions, or names."""
    if cut.get('type') == 'Sequence':
        return tuple(word for each in cut['pretokenizers'] for word in words(each))
    if cut.get('type') == 'ByteLevel' and not cut.get('use_regex', True):
        return ()
    regex = cut.get('pattern', {}).get('Regex', cut.get('type', ''))
    return regex.replace('\r', r'\r').replace('\n', r'\n'),


def add_tokenizer(writer, meta, n):
    """Writes the tokenizer of a meta.json, with names for all n rows of the embedding. Raises ValueError where it is
    not known whether llama.cpp has it."""
    kind = gguf.TokenType
    if chars := meta['tokenizer'].get('chars'):  # a SentencePiece-like vocabulary with a piece for each character
        tokens = [c.replace(' ', '\u2581') for c in chars]
        writer.add_tokenizer_model('llama')
        writer.add_token_scores([0.0] * n)
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(max(chars.find(' '), 0))
        types = [kind.NORMAL] * n
        bos = False
    else:
        tokenizer = subword_tokenizer(meta['tokenizer'])
        id_of = tokenizer.get_vocab()
        special = {id: token.special for id, token in tokenizer.get_added_tokens_decoder().items()}
        tokens = [f'[PAD{i}]' for i in range(n)]
        types = [kind.UNUSED] * n
        for token, id in id_of.items():
            tokens[id] = token
            types[id] = {True: kind.CONTROL, False: kind.USER_DEFINED}.get(special.get(id), kind.NORMAL)
        bos = tokenizer.encode('').ids[:1] == [id_of.get(meta['tokenizer'].get('bos'))]
        described = json.loads(tokenizer.to_str())
        bpe, cuts = described['model'], words(described['pre_tokenizer'] or {})
        if bpe['type'] != 'BPE' or not bpe['byte_fallback'] and cuts not in NAMES:
            raise ValueError('this tokenizer cuts text in a way that is not known by name here: export a Hugging Face '
                             "directory and run llama.cpp's convert_hf_to_gguf.py on it")
        merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in bpe['merges']]
        if bpe['byte_fallback']:
            scores = [0.0] * n
            for i, merge in enumerate(merges):
                scores[id_of[merge.replace(' ', '', 1)]] = -float(i)
            for b in range(256):
                types[id_of[f'<0x{b:02X}>']] = kind.BYTE
            writer.add_tokenizer_model('llama')
            writer.add_token_scores(scores)
            writer.add_add_space_prefix('Prepend' in str(described['normalizer']))
        else:
            writer.add_tokenizer_model('gpt2')
            writer.add_tokenizer_pre(NAMES[cuts])
            writer.add_token_merges(merges)
        for name, add in ('bos', writer.add_bos_token_id), ('eos', writer.add_eos_token_id):
            token = meta['tokenizer'].get(name, '<|endoftext|>' if meta['tokenizer']['kind'] == 'tiktoken' else None)
            if token in id_of:
                add(id_of[token])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(False)
    if 'chat_template' in meta:
        writer.add_chat_template(meta['chat_template'])


def write_gguf(path, config, meta, tensors, dtype):
    """Writes tensors, as hf.file_tensors() gives them in float32, in one of TYPES. Vectors stay float32, and with q8_0
    so do matrices whose rows are no multiple of 32. Returns how many bytes the weights have. Raises ValueError."""
    new = Path(f'{path}.tmp')
    new.unlink(missing_ok=True)  # it may be a link to another file
    writer = gguf.GGUFWriter(new, config.arch)
    writer.add_name(os.path.basename(path).removesuffix('.gguf'))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_feed_forward_length(config.mlp_width)
    if config.arch == 'gpt2':
        writer.add_layer_norm_eps(config.norm_eps or 1e-5)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps or 1e-6)
        writer.add_head_count_kv(config.n_kv_head or config.n_head)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(config.rope_theta)
    rows = next(x.shape[0] for name, x in tensors.items() if name.endswith(('wte.weight', 'embed_tokens.weight')))
    writer.add_vocab_size(rows)
    add_tokenizer(writer, meta, rows)

    kind, size = gguf.GGMLQuantizationType[TYPES[dtype]], 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.arch.upper()], config.n_layer)
    if config.arch != 'gpt2' and config.rope_factor != 1:  # how much slower each pair of channels turns
        usual = rotary_speeds(config.head_size, config.rope_theta)
        slower = rotary_speeds(config.head_size, config.rope_theta, config.rope_factor, config.rope_context)
        writer.add_tensor('rope_freqs.weight', np.asarray(usual / slower))
    for name, x in tensors.items():
        name = names.get_name(name, try_suffixes=('.weight', '.bias'))
        if config.arch == 'gpt2' and x.ndim == 2 and name.startswith('blk'):  # (in, out), and here it is (out, in)
            x = np.ascontiguousarray(x.T)
        if config.arch == 'llama' and name.endswith(('attn_q.weight', 'attn_k.weight')):  # pairs stand side by side
            x = x.reshape(-1, 2, config.head_size // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        plain = x.ndim == 1 or name == 'position_embd.weight' or (dtype == 'q8_0' and x.shape[1] % 32)
        if not plain and dtype != 'float32':
            x = gguf.quants.quantize(x, kind)
        writer.add_tensor(name, x, raw_dtype=None if plain or dtype == 'float32' else kind)
        size += x.nbytes
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return size
