# Next-pixel prediction by a GPT, images of 8 x 8 x 3 as 192 tokens (the CIFAR-5M experiment of "Searching for Efficient
# Linear Layers", NeurIPS 2024, section 4).
#   python -m vision.data --dataset=cifar10                                        # or --dataset=cifar5m --data_dir=NPZ_FOLDER
#   python train.py vision/config/pixels.py --structure=btt --d_model=256          # and --data_dir=data/cifar5m_pixels
out_dir = "out/pixels"
data_dir = "data/cifar10_pixels"

structure = "btt"
rank = 1
structured_layers = ("attn", "ffn")
n_layer = 3
n_head = 8
d_model = 64 * 4
vocab_size = 256
block_size = 192

micro_batch = 64
batch_tokens = 64 * 192
max_steps = 2 * 5_000_000 // 64  # two epochs of CIFAR-5M
warmup_steps = 0
lr = 3e-3  # of a dense layer of width 64, and of norms and embeddings
base_width = 64
base_ffn_expansion = 4
min_lr_ratio = 0.0
weight_decay = 0.0
grad_clip = 0.0
eval_interval = 800
eval_tokens = 1024 * 192
