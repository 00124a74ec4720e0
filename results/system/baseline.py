"""Milliseconds of a training step of an earlier checkout: the baseline of results/system.md.

    git worktree add ../base 824e733 && PYTHONPATH=../base python results/system/baseline.py baseline.json

Dense GPT-2 124M and a small dense GPT, bfloat16, torch.compile, random tokens; a step is forward, backward,
clipping, AdamW and reading the loss. 5 steps of warm-up, then the median of 20.
"""

import json
import sys

import torch
from mup import make_optimizer

# The files of that checkout, with the names they had.
from model import GPT, GPTConfig

CASES = {
    "GPT-2 124M, 32 x 1024": (GPTConfig(structure="dense", parametrization="standard", bias=True), 32, True),
    "6 layers, d=512, 512 x 128": (
        GPTConfig(structure="dense", n_layer=6, n_head=8, d_model=512, block_size=128, vocab_size=96), 512, True,
    ),
    "6 layers, d=512, 512 x 128, eager": (
        GPTConfig(structure="dense", n_layer=6, n_head=8, d_model=512, block_size=128, vocab_size=96), 512, False,
    ),
}  # fmt: skip
torch.set_float32_matmul_precision("high")
rows = []
for name, (config, batch, compiled) in CASES.items():
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(config)
        x, y = torch.randint(config.vocab_size, (2, batch, config.block_size))
    optimizer = make_optimizer(model, 1e-3, 0.1)
    fast = torch.compile(model) if compiled else model
    events = [torch.cuda.Event(enable_timing=True) for _ in range(26)]
    for event in events:
        event.record()
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = fast(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in zip(events[5:], events[6:]))[10]
    speed = batch * config.block_size / ms * 1e3
    rows.append(
        {
            "what": f"baseline: {name}", "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "ms_median": ms, "tokens_per_second": speed, "mfu": speed * 3 * model.flops_per_token() / 989e12,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    )  # fmt: skip
    print(rows[-1], flush=True)
    del model, optimizer, fast, loss
with open(sys.argv[1], "w") as file:
    json.dump(rows, file, indent=1)
