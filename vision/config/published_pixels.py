# What the next-pixel experiment of "Searching for Efficient Linear Layers" (NeurIPS 2024) does otherwise; docs/deviations.md
# lists it, and what no option can restore.
#   python train.py vision/config/pixels.py vision/config/published_pixels.py
#   python -m lab.sweep config/sweeps/next_pixel.py --config=vision/config/published_pixels.py
embedding_std = 0.02
zero_init_q = True
gains = False
bias = True
qkv_bias = False
overrides = {"lm_head": {"structure": "dense", "bias": True}}
