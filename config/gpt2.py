# OpenAI's gpt2 as it is: its loss on Shakespeare in GPT-2's tokens, and a sample. Nothing is trained.
#
#     python train.py config/gpt2.py
#     python sample.py --init_from=gpt2 --start="What is the answer to life, the universe, and everything?" \
#         --num_samples=5 --max_new_tokens=100
#
# 124,439,808 parameters (a test counts them): 12 layers, 12 heads, 768 wide, context 1024, vocabulary 50,257. The
# weights come from the local Hugging Face cache, or are downloaded to it once: 0.5 GB, as much as they take in memory,
# and twice that while they are read. nanoGPT reports a val loss of 3.12 on OpenWebText (its config/eval_gpt2.py, after
# which this file is made). The loss on Shakespeare (val: 35 windows of 1024 tokens, all of them read) is not measured:
# the weights could not be downloaded where this was written.

dataset = "shakespeare"

init_from = "gpt2"
eval_only = True
eval_iters = 0
sample_tokens = 50
