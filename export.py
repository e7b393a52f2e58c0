"""
Writes a model that train.py has trained as a Hugging Face directory, which transformers, vLLM and lm-eval load: a
GPT-2, a Qwen3, a Qwen2 or a Llama, as its arch says.

    python export.py --out_dir=out-shakespeare --hf_dir=hf-shakespeare

LoRA's adapters are merged into the weights, and rows that only pad the vocabulary are left out. What a run that began
with a model of Hugging Face's does not change, such as the tokenizer, comes out as it came in.
`--init_from=hf-shakespeare` brings the model back, bit for bit.
"""
import os

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run directory that train.py wrote
checkpoint = 'best'  # 'best' by validation loss, 'latest', or the number of one
hf_dir = 'hf'  # the directory to write
dtype = 'float32'  # of the file: 'float32' as trained, or 'bfloat16' or 'float16', which take half the space
overwrite = False  # replace an export that is in hf_dir
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
# -----------------------------------------------------------------------------

import hf

check(dtype=('float32', 'bfloat16', 'float16'))
if not checkpoint.isdecimal():
    check(checkpoint=('best', 'latest'))
if '://' in hf_dir:
    fail(f'hf_dir = {hf_dir!r}: it takes a folder of this machine')
if os.path.lexists(hf_dir):
    if not overwrite:
        fail(f'hf_dir = {hf_dir!r} is there already; --overwrite=True replaces an export')
    if not (os.path.isdir(hf_dir) and set(os.listdir(hf_dir)) <= hf.EXPORT):
        fail(f'hf_dir = {hf_dir!r} is there already and holds other files than an export')

from devices import find_devices
from rundir import open_run

with refuse(ValueError, OSError):
    find_devices('cpu')
    config, meta, read = open_run(out_dir, checkpoint)
    files = hf.export_files(config, meta, dtype)
    vocab_size = files['config.json']['vocab_size']
    tensors = hf.file_tensors(read(), config, vocab_size, dtype)
with refuse(OSError, code=1):
    hf.write_directory(hf_dir, files, tensors)
print(f'{hf_dir}: {sum(x.size for x in tensors.values()):,} parameters in {dtype}, '
      f'{sum(x.nbytes for x in tensors.values()) / 1e6:.1f} MB, {vocab_size:,} tokens')
