# Find the best learning rate of every group of gpt_theta.py's small version, at two widths, in runs of the same length (33M tokens).
# Each rate is twice the one before. The three highest have three seeds, the others one. gpt_theta.py uses the best rates.
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96    # your own text
#   python -m lab.sweep config/sweeps/gpt_rates.py --jobs=6      # 164 runs, 16 minutes on two H200s
config = "config/char_btt.py"
common = dict(
    structured_layers=("attn", "ffn"), data_dir="data/linux_char96", n_layer=3, max_steps=1000, warmup_steps=100,
    schedule="constant", weight_decay=0.0, batch_tokens=32_768, micro_batch=256, eval_interval=50, eval_tokens=262_144,
    log_interval=50, save=False,
)  # fmt: skip

FULL, SHARED = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2), (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)
groups = (  # θ (None: dense), widths, rates
    (None, (128, 384), (7.5e-4, 1.5e-3, 3e-3, 6e-3)),
    ((0.5, 0, 0.5, 0, 0.5, 0.5, 0), (512, 1536), FULL),  # full-rank BTT, ν = 1/2
    ((0.67, 0, 0.33, 0, 0.33, 0.67, 0), (384, 1024), FULL),  # full-rank BTT, ν = 2/3
    ((0.67, 0, 0.33, 0, 0.67, 0.33, 0), (384, 1536), (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)),  # low-rank BTT, ψ = 2/3
    ((1, 0, 0, 0, 1, 0, 0.5), (256, 1024), (3e-3, 6e-3, 1.2e-2, 2.4e-2)),  # low-rank, ψ = 1/2
    ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), (256, 768), SHARED),  # Kronecker, ω = 1/2
    ((0.5, 0.5, 0, 0.5, 0.5, 0, 0.25), (128, 512), SHARED),  # TT, ω = 1/2
    ((0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), (256, 768), SHARED),  # generic, ω = 1/4
)
runs = [
    dict(
        **(dict(structure="einsum", theta=theta) if theta else dict(structure="dense")),
        d_model=d,
        n_head=d // 64,
        lr=lr,
        seed=seed,
    )
    for seed in (1337, 2, 3)
    for theta, widths, rates in groups
    for d in widths
    for lr in (rates if seed == 1337 else rates[-3:])
]
