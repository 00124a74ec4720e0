# GPT-2 small, but every linear layer of its blocks is a mixture of Block Tensor-Trains. Each token uses 2 of 8 experts of rank 2,
# which costs the FLOPs of config/gpt2_btt.py (rank 4) plus those of routers, with four times the parameters in the blocks.
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt_moe.py
out_dir = "out/gpt2_btt_moe"
data_dir = "data/owt_gpt2"

structure = "btt"
rank = 2  # of one expert
moe = "linear"
num_experts = 8
top_k = 2
overrides = {"lm_head": {"structure": "btt", "rank": 4}}  # not a mixture: as in gpt2_btt.py
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
