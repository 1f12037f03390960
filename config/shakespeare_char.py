dataset = "shakespeare_char"

max_iters = 600
eval_interval = 150

n_layer = 6
n_head = 2
n_embd = 256
dropout = 0.15

learning_rate = 0.01
weight_decay = 1.2
