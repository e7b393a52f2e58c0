# evaluate OpenAI's GPT-2 as it is: a baseline for the models that you train
# python train.py config/eval_gpt2.py --init_from=gpt2-medium
# python train.py config/eval_gpt2.py --dataset=shakespeare --eval_iters=20

init_from = 'gpt2'  # 124M parameters
eval_only = True
eval_iters = 500  # enough batches for a good estimate
batch_size = 8
