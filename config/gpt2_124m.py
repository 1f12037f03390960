# A GPT the size of GPT-2 small with the default recipe, for web text: tens of millions to billions of tokens.
#
#     python prepare.py "web/*.parquet" --name=web --tokenizer=gpt2       # your own text; --text_column=text
#     python train.py config/gpt2_124m.py                                 # one GPU
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
#
# 524,288 tokens per step, whatever the number of GPUs: the processes share 16 micro-batches of 32 windows. Memory:
# 162M parameters, because the output layer does not share the embedding's weights (otherwise 124M, as in GPT-2): 0.65
# GB each for weights and gradients, 1.0 GB for the optimizers. Activations and logits grow with batch_size:
# --batch_size=8 --gradient_accumulation_steps=64 is the same training with a quarter of them, and
# --activation_checkpointing needs still less. `--dry_run` estimates the memory for your machine.
#
# Not trained to the end here, for want of a GPU: the rates are those of public speedruns at this size (modded-nanogpt).

dataset = "web"

max_iters = 5000                    # 2.6 billion tokens
batch_size = 32
gradient_accumulation_steps = 16
block_size = 1024
eval_interval = 1000                # a save takes 5 s (bench/checkpoint.py); on one GPU add --save_interval=250
eval_iters = 40

n_layer = 12
n_head = 6
n_embd = 768
dropout = 0.0
pad_vocab_to = 64
ngrams = 0

learning_rate = 0.025
weight_decay = 0.05
embed_lr = 0.7
head_lr = 0.004
scalar_lr = 0.015
cooldown = 0.7
