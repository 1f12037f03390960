# tinyshakespeare, one token per character, with the default recipe. nanoGPT's best on this text is 1.4697.
#
#     python train.py config/shakespeare_char.py
#
# Expected: final val loss 1.4300-1.4360 on the full val split at context 256 (seeds 1337, 1, 2: 1.4300, 1.4309,
# 1.4360); with python sample.py --score --ngram=0.3, 1.3987, 1.3981, 1.4019. 153 s of training on 2 cores of an AMD
# EPYC with avx512_bf16 (bfloat16, compiled, 380 ms per step), 259 s on 2 cores with AVX2 alone (float32), 5 min 49 s in
# all; both times are from before the n-gram vectors had an optimizer of their own, which takes no longer.
#
# In three times the time 1.4107, and 1.3614 with --ngram=0.3 (means of the same seeds):
#
#     python train.py config/shakespeare_char.py --max_iters=900 --batch_size=32 --ngram_rows=96000 \
#         --weight_decay=1.5 --ngram_decay=auto

dataset = "shakespeare_char"

max_iters = 400
eval_interval = 100

batch_size = 24
block_size = 256
n_layer = 3
n_head = 2
n_embd = 192
dropout = 0.0

learning_rate = 0.02
weight_decay = 0.4
ngram_decay = 1.0
