# A small BTT GPT on OpenWebText as 96 characters, as in the scaling-law runs: minutes on one GPU.
#   python prepare_owt.py --tokenizer=char96
#   python train.py config/char_btt.py
out_dir = "out/char_btt"
data_dir = "data/owt_char96"

structure = "btt"
rank = 1
n_layer = 6
n_head = 8
d_model = 512
block_size = 128
vocab_size = 96

micro_batch = 512
batch_tokens = 512 * 128
max_steps = 10_000
warmup_steps = 200
lr = 2e-3
eval_interval = 500
eval_tokens = 1024 * 1024
