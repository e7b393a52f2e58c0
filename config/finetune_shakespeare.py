# GPT-2 finetuned on Shakespeare, with nanoGPT's values
# python train.py config/finetune_shakespeare.py --init_from=gpt2
# python train.py config/finetune_shakespeare.py --init_from=gpt2 --lora_rank=8 --learning_rate=3e-4

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest
always_save_checkpoint = False  # a small dataset is soon learned by heart: save when the validation loss improves

# 1 sequence * 32 gradient accumulation steps * 1024 tokens = 32,768 tokens an iteration,
# of 301,966 in all: an epoch is about nine iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # constant
decay_lr = False
