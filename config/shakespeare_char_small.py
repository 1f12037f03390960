# tinyshakespeare on a slow laptop: a small model, a short context, about a minute.
#
#     python train.py config/shakespeare_char_small.py
#
# Expected: final val loss 1.615 (full val split, context 64, seed 1337) in 38 s of training on 2 cores of an AMD EPYC
# without AMX (bfloat16, uncompiled, 63 ms a step).

dataset = "shakespeare_char"

max_iters = 600
eval_interval = 150

n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
batch_size = 48
dropout = 0.0

learning_rate = 0.03
weight_decay = 0.0
