"""
Writes a model that train.py has trained as a Hugging Face directory, which transformers, vLLM and lm-eval load: a
GPT-2, a Qwen3, a Qwen2 or a Llama, as its arch says.

    python export.py --out_dir=out-shakespeare --hf_dir=hf-shakespeare
    python export.py --out_dir=out-shakespeare --hf_dir=shakespeare --format=gguf --dtype=q8_0    # shakespeare.gguf

LoRA's adapters are merged into the weights, and rows that only pad the vocabulary are left out. What a run that began
with a model of Hugging Face's does not change, such as the tokenizer, comes out as it came in.
`--init_from=hf-shakespeare` brings the model back, bit for bit.
"""
import os

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, 'latest', or the number of one
format = 'hf'  # 'hf': a directory as Hugging Face's; 'gguf': a file for llama.cpp, Ollama and LM Studio
hf_dir = 'hf'  # the directory to write; with format = 'gguf', the file is this with .gguf behind it
dtype = 'float32'  # of the file: 'float32' as trained; half the space: 'bfloat16', 'float16'; a quarter: 'q8_0' (gguf)
overwrite = False  # replace an export that is in hf_dir
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

from dataclasses import replace

import hf

check(format=('hf', 'gguf'), dtype=('float32', 'bfloat16', 'float16', *(['q8_0'] if format == 'gguf' else [])))
if format == 'gguf':
    hf_dir = hf_dir.removesuffix('.gguf') + '.gguf'
if not checkpoint.isdecimal():
    check(checkpoint=('best', 'latest'))
if '://' in hf_dir:
    fail(f'hf_dir = {hf_dir!r}: it takes a folder of this machine')
if os.path.lexists(hf_dir):
    if not overwrite:
        fail(f'hf_dir = {hf_dir!r} is there already; --overwrite=True replaces an export')
    if format == 'gguf' and not os.path.isfile(hf_dir):
        fail(f'hf_dir = {hf_dir!r} is there already and is no file')
    if format == 'hf' and not (os.path.isdir(hf_dir) and set(os.listdir(hf_dir)) <= hf.EXPORT):
        fail(f'hf_dir = {hf_dir!r} is there already and holds other files than an export')

from devices import find_devices
from rundir import open_run

with refuse(ValueError, OSError):
    find_devices('cpu')
    config, meta, read = open_run(out_dir, checkpoint)
    files = hf.export_files(config, meta, dtype)
    theirs = files['config.json']
    vocab_size = theirs['vocab_size']
    tensors = hf.file_tensors(read(), config, vocab_size, 'float32' if format == 'gguf' else dtype)
with refuse(OSError, ValueError, code=1):
    if format == 'gguf':
        from to_gguf import write_gguf
        positions = theirs.get('max_position_embeddings', config.block_size)  # the run may have seen fewer
        size = write_gguf(hf_dir, replace(config, block_size=positions), meta, tensors, dtype)
    else:
        size = sum(x.nbytes for x in tensors.values())
        hf.write_directory(hf_dir, files, tensors)
print(f'{for_terminal(hf_dir)}: {sum(x.size for x in tensors.values()):,} parameters in {dtype}, {size / 1e6:.1f} MB, '
      f'{vocab_size:,} tokens')
