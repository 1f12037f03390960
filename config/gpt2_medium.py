# OpenAI's gpt2-medium as it is: its loss on Shakespeare in GPT-2's tokens, and a sample. Nothing is trained.
#
#     python train.py config/gpt2_medium.py
#     python sample.py --init_from=gpt2-medium --start="What is the answer to life, the universe, and everything?" \
#         --num_samples=5 --max_new_tokens=100
#
# 354,823,168 parameters (a test counts them): 24 layers, 16 heads, 1024 wide, context 1024, vocabulary 50,257. The
# weights come from the local Hugging Face cache, or are downloaded to it once: 1.4 GB, as much as they take in memory,
# and twice that while they are read. nanoGPT reports a val loss of 2.84 on OpenWebText (its
# config/eval_gpt2_medium.py, after which this file is made). The loss on Shakespeare (val: 35 windows of 1024 tokens,
# all of them read) is not measured: the weights could not be downloaded where this was written.

dataset = "shakespeare"

init_from = "gpt2-medium"
eval_only = True
eval_iters = 0
sample_tokens = 50
