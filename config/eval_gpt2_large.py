# evaluate GPT-2 (774M parameters) as it is
# python train.py config/eval_gpt2_large.py

from eval_gpt2 import *

init_from = 'gpt2-large'
