# the loss of GPT-2 as it is: a baseline for what is trained here
# python train.py config/eval_gpt2.py --init_from=gpt2-medium
# python train.py config/eval_gpt2.py --dataset=shakespeare --eval_iters=20

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # enough for a good estimate
batch_size = 8
