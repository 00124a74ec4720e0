# Residual MLPs on CIFAR-10 with shuffled pixels: dense, low-rank, Monarch, Kronecker, TT and BTT layers, each at several
# widths ("Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024, section 5), and BTT behind a
# dense input layer. The claim: BTT reaches a lower training loss for the same compute. Error and training loss, against
# FLOPs and against seconds, are in one picture: out/sweeps/mlp_cifar_small/fit/reached.png.
#   python -m lab.sweep config/sweeps/mlp_cifar.py           # 500 epochs as published, 57 runs, 3 hours on an H100
#   python -m lab.sweep config/sweeps/mlp_cifar.py --small   # 31 runs of 60 epochs, 6 minutes on an H100 with --jobs=6
# Times are estimates. CIFAR-10 is downloaded; for a local copy: --common="--data_dir=FOLDER_OF_PARQUET".
import math

script = "vision/train.py"
config = "vision/config/mlp_cifar10.py"  # 3 blocks, batch 1024, lr 3e-3 for a dense layer of width 64, cosine

structures = {
    "dense": lambda d: dict(structure="dense"),
    "btt": lambda d: dict(structure="btt"),
    "btt_dense_input": lambda d: dict(structure="btt", overrides={"input": "dense"}),  # the input layer is dense
    "tt": lambda d: dict(structure="tt", rank=16),
    "monarch": lambda d: dict(structure="monarch", num_blocks=4),
    "low_rank": lambda d: dict(structure="low_rank", rank=math.isqrt(d)),
    "kronecker": lambda d: dict(structure="kronecker"),
}


def mlps(widths):
    return [dict(**structures[name](d), d_model=d) for name in structures for d in widths[name]]


wide = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # published: 64 times these factors, Monarch's made to divide
runs = mlps({
    "dense": (32, 64, 128, 256, 512, 1024, 2048, 4096), "kronecker": wide, "low_rank": wide, "btt": wide, "btt_dense_input": wide,
    "monarch": (48, 96, 176, 352, 704, 1408, 2880, 5760), "tt": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
})  # fmt: skip
fit = "--by=structure,overrides --loss=loss --points=final"  # the rate decays

# At these widths all groups have 0.4 to 20 million forward FLOPs per image; dense and BTT also have larger widths, at
# which layers dominate the time. The rate is the best of four for dense and BTT layers of two widths (results/vision.md).
# A run takes 30 to 40 s to read the images and compile, and 3 to 10 s for its 2,929 updates.
small = dict(
    common=dict(max_steps=60 * 50_000 // 1024, eval_interval=1000, log_interval=50, save=False, lr=6e-3),
    runs=mlps({
        "dense": (64, 128, 256, 512, 1024, 2048), "kronecker": (256, 1024, 2048, 4096), "low_rank": (256, 1024, 2048, 4096),
        "btt": (256, 1024, 2048, 4096, 8192), "btt_dense_input": (256, 1024, 2048, 4096), "monarch": (128, 256, 512, 1024),
        "tt": (32, 128, 256, 512),
    }),
)  # fmt: skip
