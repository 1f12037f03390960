# tinyshakespeare, one token per character, with the fast recipe. nanoGPT's best on this text is 1.4697.
#
#     python train.py config/shakespeare_char.py
#
# Expected: final val loss 1.4447-1.4487 (full val split, context 256; seeds 1337, 1, 2: 1.4487, 1.4460, 1.4447) in
# 6m15s of training on 2 cores of a Xeon with AMX (bfloat16, compiled, 500 ms a step; compiling takes 15-40 s more).
# 600 steps, 5 minutes: 1.4593, 1.4699, 1.4648.

dataset = "shakespeare_char"

max_iters = 750
eval_interval = 125

n_layer = 6
n_head = 2
n_embd = 256
dropout = 0.15

learning_rate = 0.01
weight_decay = 1.2
