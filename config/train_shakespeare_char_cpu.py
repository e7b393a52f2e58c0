# baby GPT's loss on Shakespeare without a GPU: nanoGPT's README has 1.4697 for 10.7M parameters on an A100,
# and this has 0.8M parameters, with the same context of 256 characters
# python train.py config/train_shakespeare_char_cpu.py

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 700
eval_iters = 55  # 55 batches of 8 * 256 characters are all of the validation text, once
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'cpu'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

# the block of Qwen3 and Muon, as in config/modern.py
arch = 'qwen3'
optimizer = 'muon'
tied = False
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # so small a model hardly overfits in three epochs

learning_rate = 8e-3
embd_lr_scale = 2.0
max_iters = 1400
lr_decay_iters = 1400
min_lr = 0.0
lr_schedule = 'linear'
beta1 = 0.85
beta2 = 0.99
warmup_iters = 50
weight_decay = 0.3
