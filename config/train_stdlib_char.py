# train a small character-level model of Python source code, in a few minutes on two CPU cores
# python train.py config/train_stdlib_char.py

out_dir = 'out-stdlib-char'
eval_interval = 425
eval_iters = 40
log_interval = 10
sample_tokens = 300  # watch it learn to write Python
wandb_project = 'stdlib-char'
wandb_run_name = 'mini-gpt'

dataset = 'stdlib_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128

# what config/modern.py has: the block of Qwen3 and Muon learn more from every token
arch = 'qwen3'
optimizer = 'muon'
tied = False
n_layer = 4
n_head = 4
n_kv_head = 2  # two heads of queries share one of keys and values: the time that it saves goes into a wider MLP
n_embd = 128
n_inner = 448
dropout = 0.0  # we draw fewer tokens than the dataset has, so we won't overfit

learning_rate = 8e-3
embd_lr_scale = 2.0
max_iters = 1700
lr_decay_iters = 1700
min_lr = 0.0
lr_schedule = 'linear'
beta1 = 0.85
beta2 = 0.99
warmup_iters = 30
