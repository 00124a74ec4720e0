# A BTT GPT on the source code of Python's standard library: two to five minutes on 2 CPU cores, less on a GPU.
out_dir = "out/quickstart"
data_dir = "data/stdlib_char96"  # made if it is missing
compile = False  # starts at once

structure = "btt"
rank = 2
n_layer = 4
n_head = 4
d_model = 144
block_size = 64
vocab_size = 96

micro_batch = 8
batch_tokens = 8 * 64  # small: on a CPU, more updates help more than larger batches
max_steps = 2600
warmup_steps = 100
lr = 4e-3
min_lr_ratio = 0.05
eval_interval = 400
eval_tokens = 32 * 1024
log_interval = 100
sample_tokens = 600
