# GPT-2 small on OpenWebText, but every linear layer is a Block Tensor-Train.
#   python prepare_owt.py
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py
# One GPU takes 8 times as many micro-steps for the same batch.
out_dir = "out/gpt2_btt"
data_dir = "data/owt_gpt2"

structure = "btt"
rank = 4
n_layer = 12
n_head = 12
d_model = 768
block_size = 1024
vocab_size = 50304  # 192 x 262: GPT-2's 50257 rounded up to a width that factors

micro_batch = 16
batch_tokens = 512 * 1024  # 8 GPUs x 16 sequences x 1024 tokens x 4 micro-steps
max_steps = 20_000  # 10.5 billion tokens
warmup_steps = 500
lr = 2e-3
eval_interval = 500
eval_tokens = 2 * 1024 * 1024
