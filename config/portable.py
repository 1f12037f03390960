# The default recipe within the switches of Qwen3, so that the model can leave: no n-grams, no cap on the logits, no
# norm of the embedding, no shortcuts; SwiGLU and full rotation.
#
#     python train.py config/portable.py
#     python convert.py export out/portable/ckpt.pt --out=fables_hf
#
# Expected on the bundled fables: final val loss 1.3298, 1.3209 and 1.3266 on the full val split at context 256 (seeds
# 1337, 1, 2; mean 1.3258); `python train.py`, with n-grams and all else of the default model, has 1.2363, the mean of
# the same seeds. 71-76 s of training on 2 cores of an AMD EPYC with AVX2 alone (float32, uncompiled, 2026-11-26). 8
# windows and 450 steps instead of 12 and 300 were chosen on the last tenth of the train split: 1.3213 there instead of
# 1.3448.

dataset = "fables"

max_iters = 450
batch_size = 8

ngrams = 0
embed_norm = False
logit_cap = 0.0
shortcuts = False
rope_fraction = 1.0
mlp = "swiglu"
