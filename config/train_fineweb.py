# train GPT (124M) on FineWeb to a validation loss of 3.28, the mark on which GPT-2's training speed is compared
# python data/fineweb/prepare.py --shards=27
# python train.py config/train_fineweb.py
# the baseline, GPT-2's block and AdamW, with the published rate and about twice the iterations
# python train.py config/train_fineweb.py --arch=gpt2 --optimizer=adamw --n_head=12 --beta1=0.9 --embd_lr_scale=1.0 \
#     --learning_rate=1.8e-3 --weight_decay=0.1 --max_iters=9500 --lr_decay_iters=9500

out_dir = 'out-fineweb'
eval_interval = 250
log_interval = 10
wandb_project = 'fineweb'
wandb_run_name = 'gpt-124M'

dataset = 'fineweb'
# 16 sequences * 32 micro-batches * 1024 tokens = 524,288 tokens an iteration, whatever the number of devices
batch_size = 16
gradient_accumulation_steps = 32
block_size = 1024
eval_iters = 640  # 640 batches of 16 * 1024 tokens are the 10,485,760 of val.bin, once

arch = 'qwen3'
optimizer = 'muon'
n_layer = 12
n_head = 6
n_embd = 768

learning_rate = 2.4e-3
embd_lr_scale = 2.0
max_iters = 5100
lr_decay_iters = 5100
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 100
beta1 = 0.95
beta2 = 0.95
weight_decay = 0.1
