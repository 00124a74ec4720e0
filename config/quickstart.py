# A BTT GPT on the source text of Python's standard library: two to three minutes on 2 CPU cores, less on a GPU.
out_dir = "out/quickstart"
data_dir = "data/stdlib_char96"  # prepares itself where it is missing
vocab_size = 96
compile = False  # starts at once

structure = "btt"
rank = 2
n_layer = 4
n_head = 4
d_model = 256
block_size = 128

micro_batch = 16
batch_tokens = 16 * 128
max_steps = 600
warmup_steps = 50
lr = 3e-3
eval_interval = 100
eval_tokens = 65_536
log_interval = 20
sample_tokens = 500
