# Vision transformers on CIFAR-100: dense, low-rank, Monarch, Kronecker, TT and BTT layers, each at several widths
# ("Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024, section 5). The claim: BTT
# reaches a lower training loss for the same compute. Error and training loss, against FLOPs and against seconds, are in
# one picture: out/sweeps/vit_cifar_small/fit/reached.png.
#   python -m lab.sweep config/sweeps/vit_cifar.py           # published sizes and length: 41 runs of 200 epochs, 3 hours on an H100
#   python -m lab.sweep config/sweeps/vit_cifar.py --small   # CIFAR-10, 27 runs of 20 epochs, 9 minutes on an H100 with --jobs=6
# Times are estimates. The images are downloaded; for a local copy: --common="--data_dir=FOLDER_OF_PARQUET".
script = "vision/train.py"
config = "vision/config/vit_cifar100.py"  # 3 blocks, 8 heads, batch 256, lr 1e-3 for a dense layer of width 64, cosine

structures = {
    "dense": lambda d: dict(structure="dense"),
    "btt": lambda d: dict(structure="btt"),
    "tt": lambda d: dict(structure="tt", rank=8),
    "monarch": lambda d: dict(structure="monarch", num_blocks=4),
    "low_rank": lambda d: dict(structure="low_rank", rank=d // 10, structured_layers=("attn", "ffn")),
    "kronecker": lambda d: dict(structure="kronecker"),
}


def vits(widths):
    return [dict(**structures[name](d), d_model=d) for name in structures for d in widths[name]]


wide = (64, 128, 256, 512, 1024, 2048, 4096)  # published: 64 times these factors
runs = vits({
    "dense": (32, 64, 128, 256, 384, 512, 640, 768), "kronecker": wide, "low_rank": wide[:6], "btt": wide,
    "monarch": (32, 96, 256, 512, 768, 1024), "tt": (32, 64, 128, 256, 512, 1024, 2048),
})  # fmt: skip
fit = "--by=structure --loss=loss --points=final"  # the rate decays

# CIFAR-10, so that one download serves this sweep and mlp_cifar.py. At these widths all groups have 1 to 80 million forward
# FLOPs per image; dense and BTT also have larger widths. results/vision.md has lr=4e-3, too, and takes
# the better rate. A run takes 30 to 40 s to read the images and compile, and 4 to 21 s for its 3,906 updates.
small = dict(
    common=dict(
        dataset="cifar10", n_classes=10, max_steps=20 * 50_000 // 256, eval_interval=1000, log_interval=50, save=False,
        lr=2e-3,
    ),
    runs=vits({
        "dense": (32, 64, 128, 256, 512, 1024), "kronecker": (64, 256, 512, 1024), "low_rank": (64, 128, 256, 512),
        "btt": (64, 256, 512, 1024, 2048), "monarch": (64, 128, 256, 384), "tt": (32, 64, 128, 256),
    }),
)  # fmt: skip
