# Next-pixel prediction on CIFAR-5M, images of 8 x 8 x 3 as 192 tokens, by GPTs of several structures ("Searching for
# Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 4). Two epochs.
#   python -m vision.data --dataset=cifar5m --data_dir=NPZ_FOLDER --out_dir=data/cifar5m_pixels
#   python -m lab.sweep config/sweeps/next_pixel.py           # published sizes and length: 41 runs of 1.9B tokens, 6 hours on an H100
#   python -m vision.data --dataset=cifar10
#   python -m lab.sweep config/sweeps/next_pixel.py --small   # CIFAR-10, 28 runs of 37M tokens, 17 minutes on an H100
# Times are estimates.
config = "vision/config/pixels.py"  # 3 layers, 8 heads, 64 images per batch, lr 3e-3 for a dense layer of width 64
common = dict(data_dir="data/cifar5m_pixels", log_interval=100)

thetas = (
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0),  # BTT
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25),  # BTT of higher rank
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0),  # low-rank BTT
    (1, 0, 0, 0, 1, 0, 0.5),  # low-rank
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0),  # Kronecker, two shapes
    (0.33, 0.67, 0, 0.33, 0.67, 0, 0),
)
runs = [dict(structure="dense", d_model=d) for d in (32, 64, 128, 256, 512)]
runs += [dict(structure="einsum", theta=theta, d_model=d) for theta in thetas for d in (32, 64, 128, 256, 512, 1024)]
fit = "--points=final"  # the rate decays

# Four epochs of CIFAR-10. The learning rate is constant, which makes every validation a point, and higher, because there are far
# fewer updates. At these widths all groups have 0.4 to 12 million forward FLOPs per token. A run takes 20 to 25 s to start and
# compile, and 4 to 45 s for its 3,000 updates: in all 11 minutes to start and 6 to train.
usual = (128, 256, 512, 1024)
widths = dict(zip(thetas, (usual, (64, 128, 256, 512), (192, 384, 768, 1536), usual, usual, usual)))
small = dict(
    common=dict(
        data_dir="data/cifar10_pixels", max_steps=3000, warmup_steps=100, schedule="constant", lr=12e-3, grad_clip=1.0,
        eval_interval=150, eval_tokens=2048 * 192, log_interval=50, save=False,
    ),
    runs=[dict(structure="dense", d_model=d) for d in (64, 128, 256, 384)]
    + [dict(structure="einsum", theta=theta, d_model=d) for theta, sizes in widths.items() for d in sizes],
    fit="--points=all",
)  # fmt: skip
