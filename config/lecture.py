# The character-level GPT of Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out".
#
#     python train.py config/lecture.py
#     python sample.py --out_dir=out/lecture --temperature=1 --top_k=0 --max_new_tokens=2000
#
# 209,729 parameters. Expected: val loss from 4.4 to 1.82 (1.79-1.85 on the full val split at context 32). One thing
# differs: attention scores are scaled by head_dim^-0.5, as everywhere in Inkling; the lecture uses n_embd^-0.5.
#
# Measured on 2 cores of an AMD EPYC, PyTorch 2.13, 2026-11-21: val loss 4.377 before training (a little above
# ln 65 = 4.174, because of PyTorch's own initial weights), 1.8178 after 5,000 updates, 1.8187 on the full split;
# 144 s of training, three and a half minutes in all.

dataset = "shakespeare_char"

max_iters = 5000
eval_interval = 100
eval_iters = 200
log_interval = 100
sample_interval = 1000

batch_size = 16
block_size = 32
sampling = "random"

n_layer = 4
n_head = 4
n_embd = 64
dropout = 0.0
positions = "learned"
norm = "layernorm"
norm_gain = True
norm_eps = 1e-5
embed_norm = False
mlp = "relu"
bias = True
qkv_bias = False
head_bias = True
qk_norm = False
logit_cap = 0.0
shortcuts = False
ngrams = 0
init = "torch"

optimizer = "adamw"
learning_rate = 1e-3
weight_decay = 0.01
decay_all = True
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
schedule = "constant"
