# ViT on CIFAR-100, patches of 8 ("Compute Better Spent", ICML 2024, section 5): width 64 x factor, 200 epochs.
#   python -m vision.train vision/config/vit_cifar100.py --d_model=512 --structure=btt --rank=1
#   python -m vision.train vision/config/vit_cifar100.py --d_model=128 --structure=dense
out_dir = "out/vit_cifar100"
dataset = "cifar100"
n_classes = 100

model = "vit"
patch_size = 8
n_layer = 3
n_head = 8
d_model = 64 * 4
structure = "btt"
rank = 1

crop_padding = 4
flip = True
mixup = 0.8
label_smoothing = 0.3
batch_size = 256
micro_batch = 256
max_steps = 200 * 50_000 // 256  # 200 epochs
warmup_steps = 0
lr = 1e-3  # of a dense layer of width 64, and of biases, norms and embeddings
base_width = 64
base_ffn_expansion = 4
eval_interval = 1000
log_interval = 100
