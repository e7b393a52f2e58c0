# nanoGPT's GPU figure on a laptop's CPU: baby GPT's loss on Shakespeare, 1.4697, with 0.8M parameters
# python train.py config/train_shakespeare_char_cpu.py

out_dir = 'out-shakespeare-char-cpu'
log_interval = 10
always_save_checkpoint = False

# 55 batches of 16 * 128 characters are all of the validation text, each position about once
eval_interval = 500
eval_iters = 55

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # nanoGPT's context is 256

arch = 'qwen3'
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

optimizer = 'muon'
learning_rate = 6e-3
max_iters = 1500  # 3.1M characters, about three epochs
lr_decay_iters = 1500
min_lr = 0.0
beta2 = 0.99
warmup_iters = 50
weight_decay = 0.1
