# GPT scaling over θ: dense layers against points of the space of structured matrices, on OpenWebText as 96 characters
# ("Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 4).
# The learning rate is constant, so that every validation of a run is a point of its own.
#   python prepare_owt.py --tokenizer=char96
#   python -m lab.sweep config/sweeps/gpt_theta.py           # published sizes and length: 284 runs of 6.6B tokens, 1,600 H100 hours
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96    # your own text
#   python -m lab.sweep config/sweeps/gpt_theta.py --small   # 37 runs of 33M tokens, 16 minutes on an H100 with --jobs=5
# Times are estimates. The small version writes table.md, fit.json and pictures to out/sweeps/gpt_theta_small/fit. For other
# text of 96 characters: --common="--data_dir=data/mine".
config = "config/char_btt.py"  # 65,536 tokens per batch, context 128
common = dict(
    structured_layers=("attn", "ffn"), max_steps=100_000, warmup_steps=2000, schedule="constant", lr=3e-3,
    weight_decay=0.0, micro_batch=128, eval_interval=2500, log_interval=100,
)  # fmt: skip


def gpt(d_model, **options):
    return dict(**options, d_model=d_model, n_head=d_model // 64)


thetas = (
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0),  # full-rank BTT
    (0.33, 0, 0.67, 0, 0.67, 0.33, 0),
    (0.25, 0, 0.75, 0, 0.75, 0.25, 0),
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0),
    (0.75, 0, 0.25, 0, 0.25, 0.75, 0),
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0),  # low-rank BTT, and its mirror images, whose rank is full
    (0.33, 0, 0.67, 0, 0.33, 0.67, 0),
    (0.75, 0, 0.25, 0, 0.75, 0.25, 0),
    (0.25, 0, 0.75, 0, 0.25, 0.75, 0),
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25),  # BTT of higher rank
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0.33),
    (0.33, 0, 0.67, 0, 0.67, 0.33, 0.25),
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0.25),
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0.25),
    (0.33, 0, 0.67, 0, 0.33, 0.67, 0.25),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0),  # Kronecker and TT
    (0.33, 0.67, 0, 0.33, 0.67, 0, 0),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25),
    (0.33, 0.67, 0, 0.33, 0.67, 0, 0.25),
    (1, 0, 0, 0, 1, 0, 0.75),  # low-rank
    (1, 0, 0, 0, 1, 0, 0.5),
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0),  # generic
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25),
)
runs = [gpt(d, structure="dense", n_layer=n) for n in (3, 6) for d in (256, 512, 768, 1024)]
runs += [
    gpt(d, structure="einsum", theta=theta, n_layer=n)
    for theta in thetas
    for n in (3, 6)
    for d in (256, 512, 768, 1024, 2048, 4096)
]
fit = "--reference=dense"

# At these widths all groups have 0.4 to 12 million forward FLOPs per token; dense and BTT have two larger widths, to compare
# seconds. A run takes 20 to 30 s to start and compile, and 1 to 40 s for its 33M tokens.
# Each size has the best rate of the nearer of the two widths in gpt_rates.py.
sizes = {  # θ: {rate: widths}
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0): {1.2e-2: (256, 512, 1024, 1536, 2048, 3072)},  # full-rank BTT, ν = 1/2
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0): {1.2e-2: (192, 384, 768, 1024)},  # full-rank BTT, ν = 2/3
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0): {2.4e-2: (384, 768, 1536, 3072)},  # low-rank BTT, ψ = 2/3
    (1, 0, 0, 0, 1, 0, 0.5): {1.2e-2: (256, 512), 6e-3: (1024, 1536)},  # low-rank, ψ = 1/2
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0): {4.8e-2: (256, 512, 768, 1024)},  # Kronecker, ω = 1/2
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25): {4.8e-2: (128, 256), 2.4e-2: (512, 768)},  # TT, ω = 1/2
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0): {4.8e-2: (256, 512, 768, 1024)},  # generic, ω = 1/4
}
small = dict(
    common=dict(
        data_dir="data/linux_char96", n_layer=3, max_steps=1000, warmup_steps=100, batch_tokens=32_768, micro_batch=256,
        eval_interval=50, eval_tokens=262_144, log_interval=50, save=False,
    ),
    runs=[gpt(d, structure="dense", lr=3e-3) for d in (64, 128, 192, 256, 384, 768, 1024)]
    + [gpt(d, structure="einsum", theta=theta, lr=lr) for theta, rates in sizes.items() for lr, widths in rates.items() for d in widths],
)  # fmt: skip
