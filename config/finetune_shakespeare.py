# finetune GPT-2 on Shakespeare, with nanoGPT's values
# python train.py config/finetune_shakespeare.py --init_from=gpt2
# python train.py config/finetune_shakespeare.py --init_from=gpt2 --lora_rank=8 --learning_rate=3e-4

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'  # this is the largest GPT-2 model
always_save_checkpoint = False  # we soon overfit this small dataset, so only save when val improves

# 1 batch_size * 32 gradient_accumulation_steps * 1024 tokens = 32,768 tokens per iteration
# Shakespeare has 301,966 training tokens, so one epoch is about 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# finetune at a constant learning rate
learning_rate = 3e-5
decay_lr = False
