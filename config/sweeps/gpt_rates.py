# The best learning rate of every group of gpt_theta.py's small version: two widths, four rates that double, three seeds,
# the full length of 33M tokens. gpt_theta.py takes what comes out.
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96    # text of yours
#   python -m lab.sweep config/sweeps/gpt_rates.py --jobs=6      # 192 runs, 6 minutes of three H100s
config = "config/char_btt.py"
common = dict(
    structured_layers=("attn", "ffn"), data_dir="data/linux_char96", n_layer=3, max_steps=1000, warmup_steps=100,
    schedule="constant", weight_decay=0.0, batch_tokens=32_768, micro_batch=256, eval_interval=50, eval_tokens=262_144,
    log_interval=50, save=False,
)  # fmt: skip

groups = (  # options, widths, least rate
    (dict(structure="dense"), (128, 384), 7.5e-4),
    (dict(structure="einsum", theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0)), (512, 1536), 1.5e-3),  # full-rank BTT, ν = 1/2
    (dict(structure="einsum", theta=(0.67, 0, 0.33, 0, 0.33, 0.67, 0)), (384, 1024), 1.5e-3),  # full-rank BTT, ν = 2/3
    (dict(structure="einsum", theta=(0.67, 0, 0.33, 0, 0.67, 0.33, 0)), (384, 1536), 6e-3),  # low-rank BTT, ψ = 2/3
    (dict(structure="einsum", theta=(1, 0, 0, 0, 1, 0, 0.5)), (256, 1024), 3e-3),  # low-rank, ψ = 1/2
    (dict(structure="einsum", theta=(0.5, 0.5, 0, 0.5, 0.5, 0, 0)), (256, 768), 1.2e-2),  # Kronecker, ω = 1/2
    (dict(structure="einsum", theta=(0.5, 0.5, 0, 0.5, 0.5, 0, 0.25)), (128, 512), 1.2e-2),  # TT, ω = 1/2
    (dict(structure="einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0)), (256, 768), 1.2e-2),  # generic, ω = 1/4
)
runs = [
    dict(**group, d_model=d, n_head=d // 64, lr=2**doubling * least, seed=seed)
    for seed in (1337, 2, 3)
    for group, widths, least in groups
    for d in widths
    for doubling in range(4)
]
