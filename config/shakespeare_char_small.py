# tinyshakespeare on a slow laptop: a small model and a short context, less than a minute.
#
#     python train.py config/shakespeare_char_small.py
#
# Expected: final val loss 1.542 (full val split, context 64, seed 1337) after 41 s of training on 2 cores of an AMD
# EPYC with avx512_bf16 (bfloat16, uncompiled, 100 ms per step). 30 steps, 3.6 s, are enough for 1.855.

dataset = "shakespeare_char"

max_iters = 400
eval_interval = 100

n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
batch_size = 48
dropout = 0.0
ngram_rows = 32768

learning_rate = 0.03
weight_decay = 0.0
ngram_decay = 1.0
