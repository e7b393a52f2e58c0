# train a small model that tells stories, after the JAX miniGPT tutorial
# python train.py config/train_tinystories.py

out_dir = 'out-tinystories'
eval_interval = 1000
eval_iters = 40
log_interval = 10
sample_tokens = 200  # about one story
wandb_project = 'tinystories'
wandb_run_name = 'mini-gpt'

dataset = 'tinystories'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
bias = True

# plain Adam at a constant learning rate: no weight decay, no clipping
learning_rate = 1e-3
decay_lr = False
beta2 = 0.999
weight_decay = 0.0
grad_clip = 0.0
max_iters = 66000  # 32 sequences each, so about one sequence for each of 2.1 million stories
lr_decay_iters = 66000
