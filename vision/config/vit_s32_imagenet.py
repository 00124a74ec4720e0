# ViT-S/32 on ImageNet ("Compute Better Spent", ICML 2024, section 5.3): 300 epochs of batches of 3072.
#   torchrun --standalone --nproc_per_node=8 -m vision.train vision/config/vit_s32_imagenet.py --data_dir=imagenet
# Published widths: dense 80, 192, 384 (--structure=dense); BTT of rank 1 256, 784, 1936; of rank 2 144, 484, 1296.
out_dir = "out/vit_s32_imagenet"
dataset = "imagenet"  # from the hub, which needs a login; --data_dir: train/CLASS/*.JPEG and val/CLASS/*.JPEG
n_classes = 1000
image_size = 224  # for evaluation: shorter side 256, central crop of 224

model = "vit"
patch_size = 32  # --patch_size=16 for ViT-S/16
n_layer = 12
n_head = 4
d_model = 784
depth_exponent = 0.0  # as published: branches are not scaled by the depth
structure = "btt"
rank = 1

flip = True
mixup = 0.2
label_smoothing = 0.1
batch_size = 3072  # 8 GPUs x 384 images
micro_batch = 384
max_steps = 300 * 1_281_167 // 3072  # 300 epochs
warmup_steps = 5 * 1_281_167 // 3072
lr = 2e-3  # of a dense layer of width 256, and of biases, norms and embeddings
base_width = 256
weight_decay = 0.05
beta2 = 0.95
grad_clip = 1.0
eval_interval = 2000
log_interval = 50
