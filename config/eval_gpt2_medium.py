# evaluate GPT-2 (350M parameters) as it is
# python train.py config/eval_gpt2_medium.py

from eval_gpt2 import *

init_from = 'gpt2-medium'
