"""Compare the gradients of a compiled model with those of the same model in eager mode, pass by pass: rows of gradients.json.

python -m results.compiling.gradients --moe=ffn --compile=blocks --barrier=False          # on a GPU
TORCH_LOGS=output_code python -m results.compiling.gradients … 2>&1 | grep -c "\\.run("    # number of kernel launches
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import as_script, load_config  # noqa: E402
from engine.compiling import order_loops  # noqa: E402
from engine.device import choose_device  # noqa: E402
from model import GPT  # noqa: E402
from options import GPTConfig  # noqa: E402


@dataclass
class Config:
    d_model: int = 256  # of 2 layers, with heads of 64
    rows: int = 256  # sequences of 128 tokens
    structure: str = "dense"  # or another
    moe: Literal["none", "linear", "ffn"] = "none"  # mixtures of 8 experts, 2 for each token
    compile: Literal["none", "full", "blocks"] = "blocks"  # none: the difference between two passes of one model
    barrier: bool = True  # add that of engine.compiling.order_loops
    passes: int = 5  # backward passes of the compiled model
    device: str = "auto"


def main(argv):
    config = load_config(Config, argv)
    device = choose_device(config.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=128, vocab_size=96, n_layer=2, n_head=config.d_model // 64, d_model=config.d_model,
            structure=config.structure, structured_layers=("attn", "ffn"), moe=config.moe, num_experts=8, top_k=2,
        )
    ).to(device)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a matrix of zeros would pass no gradient on to the layers below
                parameter.normal_(std=0.5 / parameter.shape[-2] ** 0.5 if parameter.dim() > 1 else 0.1)
    other = copy.deepcopy(model)
    if config.barrier:
        order_loops(device)
    run = torch.compile(other) if config.compile == "full" else other
    for block in other.blocks if config.compile == "blocks" else ():
        block.compile()
    x, y = torch.randint(96, (2, config.rows, 128), device=device)
    expected = gradients(model, model, x, y)
    for _ in range(config.passes):
        got = gradients(run, other, x, y)
        apart = {name: ((got[name] - one).norm() / one.norm()).item() for name, one in expected.items()}
        worst = sorted(apart, key=lambda name: (math.isnan(apart[name]), apart[name]), reverse=True)[:5]
        print("  ".join(f"{name} {apart[name]:.2g}" for name in worst), flush=True)


def gradients(run, model, x, y):
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        _, loss = run(x, y)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    as_script(main)
