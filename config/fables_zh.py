# Chinese, one token per character: 100 fables written for this project.
#
#     python train.py config/fables_zh.py             # bundled; nothing to download
#     python sample.py --start="从前"
#
# Measured on 2 cores of an AMD EPYC (Zen 5), PyTorch 2.13, 2026-11-27: 16,189 train and 1,799 val tokens, 1,650
# different ones; val loss 7.41 before training, 5.494 after 40 steps, 5.491 after 60 (nats per token; 2.669 bits per
# byte); 7 s of training. So few fables teach the model words and punctuation, but not what a fable is.

dataset = "fables_zh"

max_iters = 60
eval_interval = 20
sample_start = "从前"

batch_size = 4
dropout = 0.2
