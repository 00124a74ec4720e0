# BTT whose blocks are the attention heads (align_heads) against BTT of √d blocks, which cut across heads. The published claim:
# aligned BTT needs 17% less compute for the same loss ("Searching for Efficient Linear Layers over a Continuous Space of Structured
# Matrices", NeurIPS 2024). OpenWebText as 96 characters, a constant learning rate, heads of width 64.
#   python prepare_owt.py --tokenizer=char96
#   python -m lab.sweep config/sweeps/head_alignment.py           # 16 runs of 6.6B tokens, 18 hours on an H100
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96    # your own text
#   python -m lab.sweep config/sweeps/head_alignment.py --small   # 24 runs of 49M tokens, 14 minutes on an H100
# Times are estimates. The multiplier of "btt, align_heads" is the compute of BTT ÷ that of aligned BTT; published: 1.20.
config = "config/char_btt.py"  # 65,536 tokens per batch, context 128
common = dict(
    structure="btt", structured_layers=("attn", "ffn"), max_steps=100_000, warmup_steps=2000, schedule="constant",
    lr=3e-3, weight_decay=0.0, micro_batch=128, eval_interval=2500, log_interval=100,
)  # fmt: skip


def gpt(d_model, **options):
    return dict(**options, d_model=d_model, n_head=d_model // 64)


# Width 4096 is left out: with 64 heads both are the same.
runs = [
    gpt(d, align_heads=aligned, n_layer=n)
    for n in (3, 6)
    for d in (256, 512, 1024, 2048)
    for aligned in (False, True)
]  # fmt: skip
fit = "--reference=btt"

# The effect is small, so means over 3 seeds are compared, at the rate that was best for BTT in shorter runs. A run takes 25 s to
# start and compile, and 2 to 21 s for its 49M tokens (20 to 2.4M tokens/s): in all 10 minutes to start and 4 to train.
small = dict(
    common=dict(
        data_dir="data/linux_char96", n_layer=3, max_steps=1500, warmup_steps=100, batch_tokens=32_768, micro_batch=256,
        lr=6e-3, eval_interval=50, eval_tokens=262_144, log_interval=50, save=False,
    ),
    runs=[
        gpt(d, align_heads=aligned, seed=seed)
        for d in (128, 256, 512, 1024)
        for aligned in (False, True)
        for seed in (1, 2, 3)
    ],
)  # fmt: skip
