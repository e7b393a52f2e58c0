"""
Brings files over that nanoGPT wrote.

    python data/from_nanogpt.py data/shakespeare_char/meta.pkl        # writes meta.json beside it
    python data/from_nanogpt.py out-shakespeare-char/ckpt.pt          # writes a folder for --init_from, needs PyTorch

A pickle can run any code when it is loaded, so this loads none. It reads the characters of meta.pkl
from the list of the pickle's opcodes. PyTorch's own reader for weights alone reads ckpt.pt; the folder
hf-nanogpt beside it then has GPT-2's format. For a model of characters, give the meta.json of its
dataset, too: python data/from_nanogpt.py ckpt.pt data/shakespeare_char/meta.json
"""
import argparse
import json
import os
import pickletools
import sys
from pathlib import Path


def plain(path):
    """The dicts, strings and numbers in a pickle. Raises ValueError for anything else."""
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(path.read_bytes()):
        name = opcode.name
        if name in ('PROTO', 'FRAME', 'STOP'):
            continue
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name in ('BININT', 'BININT1', 'BININT2', 'BINUNICODE', 'SHORT_BINUNICODE'):
            stack.append(arg)
        elif name == 'MARK':
            marks.append(len(stack))
        elif name in ('SETITEM', 'SETITEMS'):
            start = marks.pop() if name == 'SETITEMS' else len(stack) - 2
            items, stack[start:] = stack[start:], []
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name in ('MEMOIZE', 'BINPUT', 'LONG_BINPUT'):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[arg])
        else:
            raise ValueError(f'it holds more than text and numbers ({name})')
    return stack.pop()


def characters(path):
    """The meta.json for a meta.pkl of characters. Raises ValueError if it is none."""
    try:
        itos = plain(path)['itos']
        chars = ''.join(itos[i] for i in range(len(itos)))
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f'it is no meta.pkl of characters ({type(e).__name__})') from None
    if len(chars) != len(itos):
        raise ValueError('its tokens are not single characters')
    return {'vocab_size': len(chars), 'tokenizer': {'kind': 'char', 'chars': chars}}


def weights(path):
    """(config.json, tensors) in GPT-2's format for a ckpt.pt. Its matrices are the other way round."""
    try:
        import torch
    except ImportError:
        raise ValueError('PyTorch reads it: run this where PyTorch is (pip install torch)') from None
    saved = torch.load(path, map_location='cpu', weights_only=True)
    args, tensors = saved['model_args'], {}
    for name, x in saved['model'].items():
        name = name.removeprefix('_orig_mod.')  # torch.compile adds it
        if name != 'lm_head.weight' and not name.endswith('.attn.bias'):  # the tied output layer, the causal mask
            turned = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            tensors[name] = (x.t() if turned else x).float().contiguous().numpy()
    config = {'model_type': 'gpt2', 'n_positions': args['block_size'], 'activation_function': 'gelu_new'}
    return config | {key: args[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')}, tensors


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('file', type=Path, help='a meta.pkl or a ckpt.pt of nanoGPT')
parser.add_argument('meta', type=Path, nargs='?', help='the meta.json for a ckpt.pt')
args = parser.parse_args()
try:
    if args.file.suffix == '.pt':
        config, tensors = weights(args.file)
        from safetensors.numpy import save_file
        out = args.file.parent / 'hf-nanogpt'
        out.mkdir()
        (out / 'config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')
        if args.meta:
            (out / 'meta.json').write_bytes(args.meta.read_bytes())
        save_file(tensors, out / 'model.safetensors')
        print(f'wrote {out}: python sample.py --init_from={out}')
    else:
        meta, out = characters(args.file), args.file.with_name('meta.json')
        out.with_name('meta.json.tmp').write_text(json.dumps(meta), encoding='utf-8')
        os.replace(out.with_name('meta.json.tmp'), out)
        print(f'wrote {out}: {meta["vocab_size"]} characters')
except Exception as e:  # the file may be anything
    sys.exit(f'from_nanogpt.py: error: {args.file}: {e}')
