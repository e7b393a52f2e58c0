# learn more from every token: put this file after any recipe (and after laptop.py)
# python train.py config/train_shakespeare_char.py config/laptop.py config/modern.py
# it reads the width, the batch and the length of the recipe before it; what you give as --n_embd=... comes too late
# measured in short runs of 64 to 512 channels with 768 tokens an iteration (BENCHMARKS.md, learning per token); beyond
# that it follows published rules

arch = 'qwen3'  # the block of Qwen3: RMSNorm, rotary positions, normalized queries and keys, SwiGLU
optimizer = 'muon'  # for the matrices of the blocks; AdamW for the rest
bias = False
# by character, an output layer of its own learns more and costs next to nothing (measured); for GPT-2's 50,257 tokens
# it is 39M parameters at 768 channels, and did not help in short runs
tied = not dataset.endswith('_char')

# the rate falls with the width: the power was measured from 64 to 512 channels. 768 channels get 2.1e-3, and
# modded-nanogpt had 1.8e-3. The embedding's rate is twice as high, as there: measured, it does no harm for characters
# and helps with GPT-2's tokens
learning_rate = 8e-3 * (128 / n_embd)**0.75
embd_lr_scale = 2.0
decay_lr = True
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = warmup_iters // 3
# batches of few tokens want a short memory (measured at 768 and 16,384 tokens); of many, the published 0.95
beta1 = 0.85 if gradient_accumulation_steps * batch_size * block_size < 2**16 else 0.95
beta2 = 0.99
# rate times decay times iterations stays the same, so that long runs have a weak one (published: nanochat)
weight_decay = 0.1 * min(1, 16 / (learning_rate * max(max_iters, 1)))
grad_clip = 1.0
