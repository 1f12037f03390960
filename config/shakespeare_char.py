dataset = "shakespeare_char"
max_iters = 500
