# GPT-2's architecture on one short story: what overfitting looks like.
# After "Build a Large Language Model (From Scratch)", chapter 5 (github.com/rasbt/LLMs-from-scratch).
#
#     python prepare.py verdict
#     python train.py config/verdict.py --eval_only   # the untrained model: its loss and a sample; writes nothing
#     python train.py config/verdict.py
#
# 162,419,712 parameters for 4,612 training tokens (534 for validation): 18 windows of 256, 9 updates per epoch, 90 in
# all. Expected: first loss about 10.98; train loss below 1 at the end (the book: 0.569); val loss lowest, about 6.12
# (6.0-6.4), near update 50, then rising. A greedy sample after every epoch: commas at first, then the story.
# The book evaluates after its first update (9.817 / 9.924); step 0 here is before it.
#
# Measured on 2 cores of an AMD EPYC, PyTorch 2.13, 2026-11-21: train / val 10.99 / 10.98 before training, 8.05 / 8.57
# after 5 updates, best val 6.132 at update 55, 0.559 / 6.335 at the end; 4 minutes of training, 8 in all with
# evaluations, samples and checkpoints of 2 GB. At this learning rate without warm-up the loss occasionally jumps for a
# step or two: here at update 25; with seed=1337 at update 20, and that run ended at 1.08 / 6.36, its best val 6.134,
# also at 55.

dataset = "verdict"
seed = 123

max_epochs = 10
eval_interval = 5
eval_iters = 0                          # all of val: its two windows
log_interval = 1
sample_interval = 9
sample_start = "Every effort moves you"
sample_tokens = 50
sample_temperature = 0.0

batch_size = 2
block_size = 256
sampling = "fixed"                      # the same windows in every epoch, as in the book: overfits sooner

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
attn_dropout = True
positions = "learned"
norm = "layernorm"
norm_gain = True
norm_eps = 1e-5
embed_norm = False
mlp = "gelu_tanh"
bias = True
qkv_bias = False
qk_norm = False
logit_cap = 0.0
shortcuts = False
ngrams = 0
init = "torch"

optimizer = "adamw"
learning_rate = 4e-4
weight_decay = 0.1
decay_all = True
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
schedule = "constant"
