"""
Turns a checkpoint of nanoGPT into a folder for --init_from. Run it where PyTorch is.

    python data/from_nanogpt.py out-shakespeare-char/ckpt.pt          # writes out-shakespeare-char/hf-nanogpt

The folder has GPT-2's format. A model of characters also needs the meta.json of its dataset, such as the one that
data/shakespeare_char/prepare.py writes:

    python data/from_nanogpt.py out-shakespeare-char/ckpt.pt data/shakespeare_char/meta.json

A pickle can run any code when it is loaded. PyTorch's reader for weights alone does not let it.
"""
import argparse
import json
import pickle
import shutil
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('file', type=Path, help='a ckpt.pt of nanoGPT')
parser.add_argument('meta', type=Path, nargs='?', help='the meta.json of its dataset')
args = parser.parse_args()
out = args.file.parent / 'hf-nanogpt'
new = out.with_name('hf-nanogpt.tmp')  # gets its name when it is whole
try:
    if out.exists():
        raise OSError(f'{out} is there already')
    import torch
    from safetensors.numpy import save_file
    saved = torch.load(args.file, map_location='cpu', weights_only=True)
    tensors = {}
    for name, x in saved['model'].items():
        name = name.removeprefix('_orig_mod.')  # torch.compile adds it
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            x = x.t()  # GPT-2 has its matrices the other way round
        if name != 'lm_head.weight' and not name.endswith('.attn.bias'):  # the tied output layer, the causal mask
            tensors[name] = x.float().contiguous().numpy()
    shape = saved['model_args']
    if not args.meta and shape['vocab_size'] not in range(50257, 50321):  # GPT-2's, and what pads it
        raise ValueError(f"its vocabulary of {shape['vocab_size']} is not GPT-2's: add the meta.json of its dataset")
    config = {'model_type': 'gpt2', 'n_positions': shape['block_size'], 'activation_function': 'gelu_new'}
    config |= {key: shape[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')}
    meta = args.meta.read_bytes() if args.meta else None
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    (new / 'config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')
    if meta:
        (new / 'meta.json').write_bytes(meta)
    save_file(tensors, new / 'model.safetensors')
    new.rename(out)
except ImportError as e:
    sys.exit(f'from_nanogpt.py: error: {e}: run this where PyTorch is (pip install torch safetensors)')
except (KeyError, pickle.UnpicklingError):  # whose own message says how to run what is in the file
    sys.exit(f'from_nanogpt.py: error: {args.file} is damaged, or is not a checkpoint of nanoGPT')
except Exception as e:  # the file may be anything
    sys.exit(f'from_nanogpt.py: error: {args.file}: {e}'.partition('\n')[0])
finally:
    shutil.rmtree(new, ignore_errors=True)
print(f'wrote {out}: python sample.py --init_from={out}')
