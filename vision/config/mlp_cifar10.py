# Residual MLP on CIFAR-10 ("Compute Better Spent", ICML 2024, section 5): width 64 x factor, 500 epochs.
#   python -m vision.train vision/config/mlp_cifar10.py --d_model=1024 --structure=btt
#   python -m vision.train vision/config/mlp_cifar10.py --data_dir=FOLDER_OF_PARQUET --structure=dense --d_model=256
out_dir = "out/mlp_cifar10"
dataset = "cifar10"
n_classes = 10

model = "mlp"
n_layer = 3
d_model = 64 * 16
structure = "btt"
rank = 1

crop_padding = 4
flip = True
mixup = 0.8
label_smoothing = 0.3
batch_size = 1024
micro_batch = 1024
max_steps = 500 * 50_000 // 1024  # 500 epochs
warmup_steps = 0
lr = 3e-3  # of a dense layer of width 64, and of biases and norms
base_width = 64
base_ffn_expansion = 4
input_lr = 0.1
eval_interval = 1000
log_interval = 100
