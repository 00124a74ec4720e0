# A ViT with patches of 4 on CIFAR-10, from scratch: the highest accuracy in five minutes of one H100 (results/vision.md).
#   python vision/train.py vision/config/vit_cifar10.py
#   python vision/train.py vision/config/vit_cifar10.py --data_dir=FOLDER_OF_PARQUET
out_dir = "out/vit_cifar10"
dataset = "cifar10"
n_classes = 10

model = "vit"
patch_size = 4  # 64 tokens
pool = "mean"
n_layer = 8
n_head = 6
d_model = 384
structure = "dense"

crop_padding = 4
flip = True
rand_augment = 2
mixup = 0.8
cutmix = 1.0
label_smoothing = 0.1
batch_size = 1024
micro_batch = 1024
max_steps = 300 * 50_000 // 1024
warmup_steps = 500
lr = 1e-3  # of a dense layer of width 384, and of biases, norms and embeddings
base_width = 384
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 1000
log_interval = 100
