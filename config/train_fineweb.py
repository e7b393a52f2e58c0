# train GPT (124M) on FineWeb to a validation loss of 3.28, the mark on which the speed of training is compared
# nobody has run this yet: the rates are config/modern.py's; modded-nanogpt needed 5100 iterations with similar ones
# python data/fineweb/prepare.py --shards=27
# python train.py config/train_fineweb.py
# and the baseline, GPT-2's block and AdamW, on the same tokens:
# python train.py config/train_fineweb.py --arch=gpt2 --optimizer=adamw --n_head=12 --learning_rate=1.8e-3 \
#     --embd_lr_scale=1.0 --beta1=0.9 --beta2=0.95 --out_dir=out-fineweb-adamw

out_dir = 'out-fineweb'
eval_interval = 250
eval_iters = 640  # 640 batches of 16 * 1024 tokens are the 10,485,760 of val.bin, once
log_interval = 10
wandb_project = 'fineweb'
wandb_run_name = 'gpt-124M'

dataset = 'fineweb'
# 16 sequences * 32 * 1024 tokens = 524,288 tokens an iteration, whatever the number of devices
batch_size = 16
gradient_accumulation_steps = 32
block_size = 1024

arch = 'qwen3'
optimizer = 'muon'
n_layer = 12
n_head = 6
n_embd = 768

learning_rate = 8e-3 * (128 / n_embd)**0.75
embd_lr_scale = 2.0
max_iters = 5100  # 2.7 billion tokens
lr_decay_iters = 5100
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 100
beta1 = 0.95
beta2 = 0.99
weight_decay = 0.1
