# A ViT with patches of 4 on CIFAR-10, from scratch: the highest accuracy in five minutes of one H100 (results/vision.md).
#   python -m vision.train vision/config/vit_cifar10.py
#   python -m vision.train vision/config/vit_cifar10.py --data_dir=FOLDER_OF_PARQUET
# On a CPU this takes days, a small model minutes:
#   python -m vision.train vision/config/vit_cifar10.py --d_model=64 --n_layer=2 --batch_size=128 --micro_batch=128 \
#     --max_steps=200 --warmup_steps=20
out_dir = "out/vit_cifar10"
dataset = "cifar10"
n_classes = 10

model = "vit"
patch_size = 4  # 64 tokens
pool = "mean"
n_layer = 8
n_head = 4
d_model = 256
structure = "dense"

crop_padding = 4
flip = True
rand_augment = 2
mixup = 0.8
cutmix = 1.0
label_smoothing = 0.1
batch_size = 512
micro_batch = 512
max_steps = 21_057  # 216 epochs, 275 s with decoding and compilation
warmup_steps = 1000
lr = 2e-3  # of a dense layer of width 256, and of biases, norms and embeddings
base_width = 256
weight_decay = 0.05
grad_clip = 1.0
eval_interval = 1000
log_interval = 100
compile = "blocks"  # on a GPU: starts sooner
