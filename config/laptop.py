# dial any recipe down to about a minute on a laptop's CPU: put this file after the recipe
# the line below is the CPU run of nanoGPT's README
# python train.py config/train_shakespeare_char.py config/laptop.py

eval_iters = 20
log_interval = 1
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

max_iters = 2000
lr_decay_iters = 2000
warmup_iters = min(warmup_iters, 100)
wandb_log = False
