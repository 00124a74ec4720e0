# What "Compute Better Spent" (ICML 2024) does otherwise in its MLPs and vision transformers; docs/deviations.md lists it.
#   python -m vision.train vision/config/mlp_cifar10.py vision/config/published.py
#   python -m lab.sweep config/sweeps/vit_cifar.py --config=vision/config/published.py
#   python -m vision.train vision/config/vit_s32_imagenet.py vision/config/published.py --normalize    # caps on ImageNet
# Options that a model does not read, such as those of q, k and v in an MLP, are left out with a note.
normalize = False  # no RMS caps on CIFAR
input_norm = False
qkv_bias = False
zero_init_q = True

crop_padding = 0
resized_crop = True
mixup_mode = "batch"
scale_decay = True
