"""Relative error of the whole gradient under bfloat16 autocast, with the residual stream in float32 and in bfloat16.

    python -m results.system.residual data/linux_char96        # a folder that prepare_owt.py wrote, of characters

The reference is the float32 gradient for the same weights and batch, at steps 0, 100 and 200 of training, on a CPU.
"""

import sys

import torch

from data import TokenData
from model import GPT
from optim import make_optimizers
from options import GPTConfig, RunConfig


def trunk_in_float32(self, idx):
    x = self.embed(self.token_embedding(idx)) + self.position_embedding(torch.arange(idx.size(1)))
    for block in self.blocks:
        x = block(x)
    return self.final_norm(x)


def gradient(model, batch, autocast, float32_stream):
    if float32_stream:
        model.trunk = trunk_in_float32.__get__(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, loss = model(*batch)
    model.__dict__.pop("trunk", None)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


data = TokenData(sys.argv[1], 64)
for parametrization, structure, n_layer, lr in (
    ("standard", "dense", 12, 2e-3),
    ("mup", "dense", 12, 1e-3),
    ("mup", "btt", 6, 1e-3),
):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=96, n_layer=n_layer, n_head=2, d_model=144, block_size=64, parametrization=parametrization,
            structure=structure, bias=parametrization == "standard",
        )
    )  # fmt: skip
    optimizer = make_optimizers(model, RunConfig(lr=lr, weight_decay=0.1))
    for step in range(201):
        if step % 100 == 0:
            batch = data.train_batch(1, step, 16, 0, 16)
            exact = gradient(model, batch, False, False)
            errors = [(gradient(model, batch, True, wide) - exact).norm() / exact.norm() for wide in (True, False)]
            print(
                f"{parametrization} {structure} {n_layer} layers, step {step}: {errors[0]:.2%} float32, {errors[1]:.2%} bfloat16"
            )
        optimizer.set_lr(lr * min(1, (step + 1) / 50))
        model(*data.train_batch(0, step, 8, 0, 8))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
