# GPT-2 small as a standard mixture of experts: every block has 8 dense FFNs, of which each token uses 2. Structure-aware muP.
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_moe.py
out_dir = "out/gpt2_moe"
data_dir = "data/owt_gpt2"

structure = "dense"
moe = "ffn"
num_experts = 8
top_k = 2
n_layer = 12
n_head = 12
d_model = 768
block_size = 1024
vocab_size = 50304

micro_batch = 16
batch_tokens = 512 * 1024  # 8 GPUs x 16 sequences x 1024 tokens x 4 micro-steps
max_steps = 20_000  # 10.5 billion tokens
warmup_steps = 500
lr = 2e-3
eval_interval = 500
eval_tokens = 2 * 1024 * 1024
