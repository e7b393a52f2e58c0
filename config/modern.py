# learn more from every token: put this file after any recipe (and after laptop.py)
# python train.py config/train_shakespeare_char.py config/laptop.py config/modern.py
# tried with models of 0.8M parameters, 128 wide, on characters. For other widths the learning rate is a guess: it
# was never tried with baby GPT, nor with GPT-2's sizes, tokens and batches

arch = 'qwen3'  # the block of Qwen3: RMSNorm, rotary positions, normalized queries and keys, SwiGLU
optimizer = 'muon'  # for the matrices of the blocks; AdamW for the rest
bias = False

# one learning rate for both; wider models want a lower one
learning_rate = 6e-3 * (128 / n_embd)
decay_lr = True
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = warmup_iters // 3
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
