# Mixtures of experts: BTT-MoE, in which every linear layer is a mixture, against the standard MoE of whole FFNs and against
# dense layers; 8 and 16 experts, 2 of them for each token ("Searching for Efficient Linear Layers over a Continuous Space of
# Structured Matrices", NeurIPS 2024, section 5). On OpenWebText as 96 characters, at a constant learning rate.
#   python prepare_owt.py --tokenizer=char96
#   python -m lab.sweep config/sweeps/moe.py                   # published sizes and length: 60 runs of 6.6B tokens, 160 H100 hours
#   python prepare_owt.py --source=linux_source --tokenizer=char96 --out_dir=data/linux_char96      # your own text
#   python -m lab.sweep config/sweeps/moe.py --small           # 21 runs of 33M tokens, 12 minutes on an H100
# Times are estimates.
config = "config/char_btt.py"  # 65,536 tokens per batch, context 128
common = dict(
    structured_layers=("attn", "ffn"), max_steps=100_000, warmup_steps=2000, schedule="constant", lr=3e-3,
    weight_decay=0.0, micro_batch=64, eval_interval=2500, log_interval=100,
)  # fmt: skip


def gpt(d_model, **options):
    return dict(**options, d_model=d_model, n_head=d_model // 64)


def experts(number):
    return dict(num_experts=number, top_k=2)


# The paper compares with the dense models of gpt_theta.py; here dense models have the widths of the standard MoE.
runs = [gpt(d, structure="dense", n_layer=n) for n in (3, 6, 9) for d in (128, 256, 512, 1024)]
for number in (8, 16):
    for n in (3, 6, 9):
        for d in (128, 256, 512, 1024):
            runs.append(gpt(d, structure="dense", n_layer=n, moe="ffn", **experts(number)))
        for d in (256, 512, 1024, 2048):
            runs.append(gpt(d, structure="btt", n_layer=n, moe="linear", **experts(number)))
fit = "--reference=dense"

# At these widths all groups have 0.4 to 11 million forward FLOPs per token. Each has the best of several rates in runs of 400
# steps at one of its widths (results/scaling/moe_rates.json). A run takes 20 to 30 s to start and compile, and for its
# 33M tokens 2 to 5 s (dense), 2 to 9 s (MoE of FFNs) or 5 to 40 s (BTT-MoE, 0.9 to 7M tokens/s): in all 8 minutes to start and
# 5 to train.
small = dict(
    common=dict(
        data_dir="data/linux_char96", n_layer=3, max_steps=1000, warmup_steps=100, batch_tokens=32_768, micro_batch=256,
        eval_interval=50, eval_tokens=262_144, log_interval=50, save=False,
    ),
    runs=[gpt(d, structure="dense", lr=1.5e-3) for d in (64, 128, 192, 256, 384)]
    + [
        gpt(d, structure=structure, moe=moe, lr=lr, **experts(number))
        for structure, moe, lr, widths in (
            ("dense", "ffn", 3e-3, (64, 128, 192, 256)),
            ("btt", "linear", 1.5e-3, (128, 256, 512, 1024)),
        )
        for number in (8, 16)
        for d in widths
    ],
)  # fmt: skip
