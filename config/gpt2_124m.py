# A GPT of GPT-2's smallest size with the fast recipe, for web text: tens of millions to billions of tokens.
#
#     python prepare.py "web/*.parquet" --name=web --tokenizer=gpt2       # any text of yours; --text_column=text
#     python train.py config/gpt2_124m.py                                 # one GPU
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
#
# 524,288 tokens a step, whatever the number of GPUs: 16 micro-batches of 32 windows are shared by the processes.
# Memory: 162M parameters, since the output layer is not the embedding (124M as in GPT-2 but for that): 0.65 GB each for
# weights and gradients, 1.0 GB for the optimizers. Activations and logits grow with batch_size: --batch_size=8
# --gradient_accumulation_steps=64 is the same training in a quarter of theirs, --activation_checkpointing less still.
# `--dry_run` estimates it for the machine at hand.
#
# Not trained whole here, for want of a GPU: the rates are those of public speedruns at this size (modded-nanogpt).

dataset = "web"

max_iters = 5000                    # 2.6 billion tokens
batch_size = 32
gradient_accumulation_steps = 16
block_size = 1024
eval_interval = 1000                # a save takes 5 s (bench/checkpoint.py); on one GPU add --save_interval=250
eval_iters = 40

n_layer = 12
n_head = 6
n_embd = 768
dropout = 0.0
pad_vocab_to = 64
ngrams = 0

learning_rate = 0.025
weight_decay = 0.05
embed_lr = 0.7
head_lr = 0.004
scalar_lr = 0.015
cooldown = 0.7
