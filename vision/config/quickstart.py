# A BTT MLP on scikit-learn's 8 x 8 digits, no download: under a minute on 2 CPU cores.
#   python -m vision.train vision/config/quickstart.py
out_dir = "out/vision_quickstart"
dataset = "digits"
compile = False  # starts at once

model = "mlp"
image_size = 8
channels = 1
n_classes = 10
structure = "btt"
rank = 2
n_layer = 3
d_model = 144

crop_padding = 1
mixup = 0.2
batch_size = 128
micro_batch = 128
max_steps = 60 * 1438 // 128  # 60 epochs
warmup_steps = 50
lr = 1e-3
weight_decay = 0.05
eval_interval = 200
log_interval = 50
