# At which width does BTT need no more seconds than dense? Wider versions of the GPTs of 3 layers in gpt_theta.py's small
# version, and BTT of higher rank. At these widths blocks are powers of two, to which kernels pad other sizes. Each run has 33M
# tokens, far too few for such models.
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96    # your own text
#   python -m lab.sweep config/sweeps/gpt_wide.py --jobs=2       # 14 runs, 12 minutes on an H100
# The time is an estimate.
config = "config/char_btt.py"
common = dict(
    structured_layers=("attn", "ffn"), data_dir="data/linux_char96", n_layer=3, max_steps=1000, warmup_steps=100,
    schedule="constant", weight_decay=0.0, batch_tokens=32_768, micro_batch=256, eval_interval=50, eval_tokens=262_144,
    log_interval=50, save=False,
)  # fmt: skip


def gpt(d_model, **options):
    return dict(**options, d_model=d_model, n_head=d_model // 64)


runs = [gpt(d, structure="dense", lr=1.5e-3) for d in (256, 384, 768, 1024, 1536, 2048)]
runs += [gpt(d, structure="btt", rank=1, lr=6e-3) for d in (1024, 2048, 4096)]
runs += [gpt(d, structure="btt", rank=2, lr=4e-3) for d in (2048, 4096)]
runs += [gpt(d, structure="btt", rank=4, lr=4e-3) for d in (512, 1024, 2048)]
fit = "--reference=dense"
