# A very small Llama on TinyStories (arXiv 2305.07759), after a published "super-mini Llama 3".
#
#     python prepare.py tinystories                   # 2.2 GB to download; trains a 32,000-token BPE on them
#     python train.py config/tinystories_llama.py
#     python sample.py --start="Once upon a time" --top_k=40 --top_p=0.95
#
# This reads all of TinyStories for two epochs. The published run used the first tenth:
#
#     python prepare.py tinystories --limit=220000000
#
# Without a network, on any stories of your own (one document per file, or --separator between stories; 100 kB or more,
# because the tenth for validation must fill the context; a small text yields a smaller vocabulary than 32,000):
#
#     python prepare.py stories.txt --name=stories --tokenizer=bpe:32000
#     python train.py config/tinystories_llama.py --dataset=stories --out_dir=out/stories
#
# 19,532,032 parameters with a vocabulary of 32,000. Published: train loss about 1.6 after two epochs of a tenth of the
# data, with Llama 2's tokenizer and one padded story per row, so compare in bits per byte.
#
# Measured on 2 cores of an AMD EPYC, PyTorch 2.13, 2026-11-21, on the bundled fables (260 kB, which yield 6,296
# tokens) with --batch_size=1 --max_iters=300: val loss 9.75 before training (above ln 6,296 = 8.748, because of
# init=kaiming), 6.106 nats per token or 2.266 bits per byte after 300 steps of 4,096 tokens; 411 s of training. The
# whole of TinyStories was not run here.

dataset = "tinystories"

seed = 3407
max_epochs = 2
eval_interval = 1000
eval_iters = 20
sample_start = "Once upon a time"

batch_size = 4
gradient_accumulation_steps = 2         # two devices of 4 in the published run
block_size = 2048

n_layer = 4
n_head = 16
n_kv_head = 8
n_embd = 256
ffn_dim = 768
dropout = 0.0
rope_theta = 10000.0
rope_fraction = 1.0
norm_gain = True
embed_norm = False
mlp = "swiglu"
qk_norm = False
logit_cap = 0.0
shortcuts = False
ngrams = 0
init = "kaiming"

optimizer = "adamw"
learning_rate = 1e-4
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0
schedule = "cosine"
