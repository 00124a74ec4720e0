# Do structured layers save seconds? The wide MLPs of mlp_cifar.py's small version, with three seeds each: dense layers,
# BTT, and BTT behind a dense input layer.
#   python -m lab.sweep config/sweeps/mlp_seeds.py --jobs=6      # 36 runs of 60 epochs, 5 minutes on two GPUs
# Nothing else should use the GPU or the CPU: updates of narrow models take 1 ms, and the GPU waits for the host.
script = "vision/train.py"
config = "vision/config/mlp_cifar10.py"
common = dict(max_steps=60 * 50_000 // 1024, eval_interval=1000, log_interval=50, save=False, lr=6e-3)
groups = (
    (dict(structure="dense"), (256, 512, 1024, 2048)),
    (dict(structure="btt"), (1024, 2048, 4096, 8192)),
    (dict(structure="btt", overrides={"input": "dense"}), (1024, 2048, 4096, 8192)),
)
runs = [dict(**group, d_model=d, seed=seed) for seed in (1337, 2, 3) for group, widths in groups for d in widths]
fit = "--by=structure,overrides --loss=loss --points=final"
