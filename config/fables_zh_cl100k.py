# Chinese with OpenAI's cl100k_base: 100 fables written for this project. Ids go up to 100,276, so they are uint32.
#
#     python prepare.py fables_zh_cl100k              # bundled; tiktoken downloads cl100k_base once
#     python train.py config/fables_zh_cl100k.py
#     python sample.py --start="从前"
#
# The same settings for a table of your own:
#
#     python prepare.py poems.csv --name=poems --tokenizer=cl100k_base
#     python train.py config/fables_zh_cl100k.py --dataset=poems --out_dir=out/poems
#
# Measured on 2 cores of an AMD EPYC, PyTorch 2.13, 2026-11-21: 21,859 train and 2,351 val tokens, 767 different ones of
# the 100,277; val loss 11.54 before training, 5.71 after 200 steps, 4.97 after 400 (nats per token; 2.27 bytes each);
# 275 s of training. On an Intel Xeon with AMX, 2026-11-27: 5.89 and 5.19 in bfloat16, and 5.56 after 200 steps in
# float32; from step 50 to 150 the loss hardly falls, and when it falls again depends on the last digits. So few fables
# teach the model which bytes follow each other, but not what a fable is: up to a third of a sample's characters are
# U+FFFD, which stands for bytes that form no character. The output itself is valid UTF-8 throughout.

dataset = "fables_zh_cl100k"

max_iters = 400
eval_interval = 50
sample_start = "一"

batch_size = 4
block_size = 128
sampling = "random"

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.2
tie_weights = True
ngrams = 0
init = "gpt2"

optimizer = "adamw"
learning_rate = 2e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
grad_clip = 1.0
warmup_iters = 20
