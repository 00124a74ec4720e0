"""Structure-aware muP: multipliers by hand, and a coordinate check over four widths."""

import pytest
import torch

from einsum_linear import Dense, EinsumLinear
from model import GPT, Block, GPTConfig
from mup import lr_multipliers, make_optimizer, set_lr

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2)


def test_multipliers_by_hand():
    multipliers = lr_multipliers(GPT(GPTConfig(**SMALL, d_model=64, rank=2, structured_layers=("ffn",))))
    assert (
        multipliers["token_embedding.weight"]
        == multipliers["final_norm.weight"]
        == multipliers["blocks.0.ffn.up.gains"]
        == 1
    )
    assert multipliers["blocks.0.attn.q.weight"] == multipliers["lm_head.weight"] == 768 / 64
    # 64 = 8 x 8 -> 256 = 16 x 16, rank 2: A contracts 8 of the input, B the other 8 and the rank; two cores
    assert multipliers["blocks.0.ffn.up.cores.0"] == 768 / (8 * 2)
    assert multipliers["blocks.0.ffn.up.cores.1"] == 768 / (8 * 2 * 2)
    assert multipliers["blocks.1.ffn.down.cores.1"] == 768 / (16 * 2 * 2)


def test_standard_has_no_multipliers():
    model = GPT(GPTConfig(**SMALL, d_model=64, parametrization="standard"))
    assert set(lr_multipliers(model).values()) == {1.0}


def test_optimizer_groups_hold_every_parameter_once_with_its_rate_and_decay():
    model = GPT(GPTConfig(**SMALL, d_model=64, rank=2, bias=True))
    multipliers = lr_multipliers(model)
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1)
    set_lr(optimizer, 2e-3)
    set_lr(optimizer, 2e-3)  # assigned, not multiplied
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(multipliers)
    assert len(optimizer.param_groups) < len(multipliers) / 2  # equal hyper-parameters share a group
    for name, parameter in model.named_parameters():
        group = groups[parameter]
        assert group["lr"] == pytest.approx(2e-3 * multipliers[name])
        expected = 2e-3 * 0.1 if parameter.dim() >= 2 else 0
        assert group["lr"] * group["weight_decay"] == pytest.approx(expected)


def test_weight_decay_takes_lr_times_decay_off_every_matrix():
    model = GPT(GPTConfig(**SMALL, d_model=64, rank=2))
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 1e-3 if parameter.dim() >= 2 else 1
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


WIDTHS = (64, 128, 256, 512)


def build(width, rank=1, **kwargs):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL, d_model=width, rank=rank(width) if callable(rank) else rank, **kwargs))


def activation_sizes(model, multipliers, steps=5, lr=5e-4):
    """{name: RMS of its output} of every linear layer and block, after some Adam steps."""
    optimizer = make_optimizer(model, lr, multipliers=multipliers)
    idx = torch.randint(96, (8, 33), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = {}

    def record(name):
        return lambda module, args, output: sizes.update({name: output.detach().square().mean().sqrt().item()})

    for name, module in model.named_modules():
        if isinstance(module, (Dense, EinsumLinear, Block)):
            module.register_forward_hook(record(name))
    model(idx[:, :-1])
    return sizes


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(structure="dense"),
        dict(structure="low_rank", rank=lambda width: width // 4, structured_layers=("attn", "ffn")),
        dict(structure="btt", rank=2),
    ],
    ids=lambda kwargs: kwargs["structure"],
)
def test_coordinate_check(kwargs):
    """Activations keep their size over the widths; with one rate for all widths, the narrowest's, they do not."""

    def largest_spread(multipliers_of):
        sizes = [activation_sizes(model := build(width, **kwargs), multipliers_of(model)) for width in WIDTHS]
        return max(max(size[name] for size in sizes) / min(size[name] for size in sizes) for name in sizes[0])

    narrow = lr_multipliers(build(WIDTHS[0], **kwargs))
    assert largest_spread(lr_multipliers) < 2
    assert largest_spread(lambda model: narrow) > 3
