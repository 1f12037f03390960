# Fine-tune OpenAI's GPT-2 on Shakespeare, after nanoGPT's config/finetune_shakespeare.py.
#
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out/finetune_shakespeare --start="ROMEO:"
#
# nanoGPT starts from gpt2-xl and suggests a smaller model when memory is short. This file starts from gpt2 (124M),
# whose weights, gradients and AdamW moments take 2 GB in addition to the activations; gpt2-xl (1.6B) takes 25 GB:
#
#     python train.py config/finetune_shakespeare.py --init_from=gpt2-xl
#
# On a CPU or a small card, a quarter of the context needs less memory and a quarter of the time:
#
#     python train.py config/finetune_shakespeare.py --block_size=256
#
# A step is 32 sequences of 1024 tokens; an epoch is 9.2 steps. Loss and time are not measured: OpenAI's weights could
# not be downloaded to the machine on which this was written.

dataset = "shakespeare"

init_from = "gpt2"
max_iters = 20
eval_interval = 5
log_interval = 1

batch_size = 1
gradient_accumulation_steps = 32
sampling = "random"
dropout = 0.0

optimizer = "adamw"
learning_rate = 3e-5
decay_lr = False
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
grad_clip = 1.0
