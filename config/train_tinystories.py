# train a small model that tells stories, on the data and in the size of the JAX miniGPT tutorial
# python train.py config/train_tinystories.py
# the tutorial's own recipe, GPT-2's block and Adam at a constant rate:
# python train.py config/train_tinystories.py --arch=gpt2 --bias=True --optimizer=adamw --learning_rate=1e-3 \
#     --decay_lr=False --embd_lr_scale=1.0 --beta1=0.9 --beta2=0.999 --weight_decay=0.0 --grad_clip=0.0

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

# the block of Qwen3 and Muon, as in config/modern.py
arch = 'qwen3'
optimizer = 'muon'
n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 8e-3
embd_lr_scale = 2.0
max_iters = 66000  # 32 sequences each, so about one sequence for each of 2.1 million stories
lr_decay_iters = 66000
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 100
beta1 = 0.85
beta2 = 0.99
weight_decay = 0.003  # rate times decay times iterations is 1.6, as config/modern.py has it
