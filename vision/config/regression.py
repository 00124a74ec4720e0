# Learn a random ReLU network in one pass over the data ("Searching for Efficient Linear Layers", NeurIPS 2024, section 4).
#   python -m vision.regression vision/config/regression.py --structure=einsum --theta .5 0 .5 0 .5 .5 .25 --d_model=512
out_dir = "out/regression"
d_in = 8
teacher_layers = 6
teacher_width = 1024

n_layer = 3
d_model = 64 * 8  # 64 x 1, 2, 8, 16, 32 or 64
structure = "btt"
rank = 1

batch_size = 4096
micro_batch = 4096
max_steps = 1_000_000
dtype = "float32"  # 16 bits do not reach the published errors
warmup_steps = 0
lr = 1e-3  # of a dense layer of width 64
base_width = 64
base_ffn_expansion = 4
eval_interval = 1000
log_interval = 1000
