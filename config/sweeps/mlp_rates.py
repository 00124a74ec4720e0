# Find the best learning rates of dense and BTT MLPs on CIFAR-10 with shuffled pixels, at two widths each: five rates, each twice
# the one before, one seed, 60 epochs. mlp_seeds.py and mlp_cifar.py use the results.
#   python -m lab.sweep config/sweeps/mlp_rates.py --jobs=5      # 20 runs, 4 minutes on an H100
script = "vision/train.py"
config = "vision/config/mlp_cifar10.py"
common = dict(max_steps=60 * 50_000 // 1024, eval_interval=1000, log_interval=50, save=False)
widths = {"dense": (512, 2048), "btt": (1024, 4096)}
runs = [
    dict(structure=structure, d_model=d, lr=lr)
    for structure, chosen in widths.items()
    for d in chosen
    for lr in (1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3)
]
