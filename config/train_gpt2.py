# train GPT-2 (124M) on OpenWebText, with nanoGPT's values
# nanoGPT reaches a loss of ~2.85 with them, in about 4 days on 8 A100 GPUs
# python train.py config/train_gpt2.py

out_dir = 'out-gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# these make the total batch size be ~0.5M
# 12 batch size * 1024 block size * 40 gradient accumulation steps = 491,520 tokens,
# whatever the number of devices
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# this makes the total number of tokens be 300B
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
