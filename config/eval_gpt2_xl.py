# evaluate GPT-2 (1558M parameters) as it is
# python train.py config/eval_gpt2_xl.py

from eval_gpt2 import *

init_from = 'gpt2-xl'
