# nanoGPT's `train_shakespeare_char`: its architecture and hyperparameters, as a reference for comparison.
# Source: github.com/karpathy/nanoGPT, config/train_shakespeare_char.py and the defaults of its train.py.
#
#     python train.py config/shakespeare_char_nanogpt.py
#
# 10.65M parameters without the position embeddings. nanoGPT publishes a best val loss of 1.4697, after about 3 minutes
# on an A100. Not run here: 2 CPU cores would need hours. This is nanoGPT's own command for such machines (0.80M):
#
#     python train.py config/shakespeare_char_nanogpt.py --device=cpu --compile=False --eval_iters=20 \
#         --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \
#         --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
#
# Expected with --dtype=float32, which nanoGPT uses on a CPU: full val loss 1.895 at context 64 (nanoGPT's own
# checkpoints from that command, evaluated in the same way: 1.898 and 1.892), about a minute on 2 cores.

dataset = "shakespeare_char"

eval_interval = 250
eval_iters = 200
log_interval = 10

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
sampling = "random"

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
attn_dropout = True
positions = "learned"
norm = "layernorm"
norm_gain = True
norm_eps = 1e-5
embed_norm = False
mlp = "gelu"
bias = False
tie_weights = True
qk_norm = False
logit_cap = 0.0
shortcuts = False
ngrams = 0
init = "gpt2"

optimizer = "adamw"
learning_rate = 1e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
adam_eps = 1e-8
grad_clip = 1.0

schedule = "cosine"
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
