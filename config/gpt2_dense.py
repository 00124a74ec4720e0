# GPT-2 small as published: dense layers, standard parametrisation. The baseline; engine/huggingface.py loads GPT-2's weights into it.
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_dense.py
out_dir = "out/gpt2_dense"
data_dir = "data/owt_gpt2"

structure = "dense"
parametrization = "standard"
bias = True
n_layer = 12
n_head = 12
d_model = 768
block_size = 1024
vocab_size = 50304

micro_batch = 16
batch_tokens = 512 * 1024
max_steps = 20_000
warmup_steps = 500
lr = 6e-4
eval_interval = 500
eval_tokens = 2 * 1024 * 1024
