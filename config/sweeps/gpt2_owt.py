# GPT-2 with its full vocabulary: BTT of rank 4 in every layer, the LM head too, against dense layers, on OpenWebText
# ("Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024, section 5).
#   python prepare_owt.py
#   python -m lab.sweep config/sweeps/gpt2_owt.py           # published sizes and length: 7 runs of 147B tokens, 1,500 hours on an H100
#   python -m lab.sweep config/sweeps/gpt2_owt.py --commands | sed "s/^[^ ]*/torchrun --standalone --nproc_per_node=8/" | sh
#   python prepare_owt.py --source=linux_source --out_dir=data/linux_gpt2                         # your own text
#   python -m lab.sweep config/sweeps/gpt2_owt.py --small   # 8 runs of 33M tokens, 12 minutes on an H100
# Times are estimates. The command with sed uses all 8 GPUs of a host for each run.
common = dict(
    data_dir="data/owt_gpt2", n_layer=12, d_head=64, block_size=512, batch_tokens=480 * 512, micro_batch=30,
    max_steps=600_000, warmup_steps=2000, lr=2e-3, weight_decay=0.0, depth_exponent=0.0, eval_interval=2500, log_interval=100,
)  # fmt: skip

runs = [dict(structure="dense", d_model=d, n_head=d // 64) for d in (384, 512, 768)]
runs += [dict(structure="btt", rank=4, d_model=d, n_head=6) for d in (1024, 1536, 2048)]  # attention of width 384
runs += [dict(structure="btt", rank=4, d_model=2560, n_head=12)]
fit = "--points=final"  # the rate decays

# A constant learning rate makes every validation a point. At these widths both have 22 to 96 million forward FLOPs per token.
# A run takes 30 to 35 s to start and compile, and 20 to 120 s for its 33M tokens: in all 5 minutes to start and 7 to train.
small = dict(
    common=dict(
        data_dir="data/linux_gpt2", n_layer=6, batch_tokens=32_768, micro_batch=64, max_steps=1000, warmup_steps=100,
        schedule="constant", eval_interval=50, eval_tokens=262_144, log_interval=50, save=False,
    ),
    runs=[dict(structure="dense", d_model=d, n_head=d // 64) for d in (192, 256, 384, 512)]
    + [dict(structure="btt", rank=4, d_model=d, n_head=6) for d in (384, 768, 1024, 1536)],
    fit="--points=all",
)  # fmt: skip
