# teach a model to chat, with LoRA, from chats of your own
# python data/chat/prepare.py chats.jsonl --tokenizer=DIR
# python train.py config/finetune_chat.py --init_from=DIR
# python sample.py --out_dir=out-chat --chat

out_dir = 'out-chat'
eval_interval = 10
eval_iters = 10
log_interval = 1
dataset = 'chat'
always_save_checkpoint = False  # a few dozen chats are soon known by heart, so only save when val improves

# 8 sequences of 512 tokens an iteration, each of them as many chats as fit
block_size = 512
batch_size = 2
gradient_accumulation_steps = 4
max_iters = 40

# only adapters, at a constant learning rate
lora_rank = 8
learning_rate = 1e-3
weight_decay = 0.0
decay_lr = False
