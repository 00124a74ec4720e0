"""Tests structure-aware muP: multipliers against values by hand, updates and activations over a range of widths."""

import math

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from einsum_linear import make_linear
from lab.mup_check import CoordsConfig, coordinate_check, coordinates_after, parse_structure, spreads_of
from model import GPT
from optim import lr_multipliers, make_optimizers
from options import GPTConfig, RunConfig

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2)


def test_multipliers_equal_values_by_hand():
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


@pytest.mark.parametrize("moe", ["none", "linear", "ffn"])
def test_base_ffn_expansion_scales_the_multipliers_of_ffn_down_alone(moe):
    model = GPT(GPTConfig(**SMALL, d_model=64, moe=moe, structured_layers=("ffn",)))
    one, four = (lr_multipliers(model, 64, expansion) for expansion in (1, 4))
    scaled = {name for name in one if four[name] == 4 * one[name] and one[name] != four[name]}
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert scaled == {name for name in matrices if ".ffn.down." in name} and len(scaled) >= 4
    assert all(four[name] == one[name] for name in one.keys() - scaled)


STRUCTURES = [
    dict(structure="dense"),
    dict(structure="btt", rank=2),
    dict(structure="monarch", num_blocks=4),
    dict(structure="low_rank", rank="root"),
    dict(structure="kronecker"),
    dict(structure="tt", rank=4),
    dict(structure="einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0)),
]


@pytest.mark.parametrize("options", STRUCTURES, ids=lambda options: options["structure"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)], ids=["square", "up", "down"])
def test_an_update_of_a_core_changes_the_matrix_by_the_same_share_at_every_width(options, shape):
    """The spectral condition on the product: ‖ΔW‖ = lr · 768 · sqrt(d_out/d_in), up to a constant per structure."""
    torch.manual_seed(0)
    norms = []  # ‖ΔW‖ / sqrt(d_out/d_in) for each width and core
    for d in (64, 256, 512):
        d_in, d_out = (d // 4 * 4 * side // max(shape) for side in shape)
        rank = {"rank": math.isqrt(d_in)} if options.get("rank") == "root" else {}
        layer = make_linear(d_in, d_out, normalize=False, **{**options, **rank})
        at_width = []
        for core, fan_in in zip(layer.cores, getattr(layer, "fan_ins", [d_in])):
            before, (fan_out, batch) = core.detach().clone(), (core.shape[-1], core.shape[:-2])
            if core.dim() == 2:  # (d_out, d_in)
                fan_out = d_out
            signs = torch.randn(*batch, fan_in, 1).sign() * torch.randn(*batch, 1, fan_out).sign()
            with torch.no_grad():
                core.copy_((signs if core.dim() == 3 else signs.T) / (fan_in * len(layer.cores)))
                at_width.append(torch.linalg.matrix_norm(layer.materialize(), 2).item() * math.sqrt(d_in / d_out))
                core.copy_(before)
        norms.append(at_width)
    for of_core in zip(*norms):
        assert max(of_core) < 1.8 * min(of_core)  # the widths differ by a factor of 8
        assert min(of_core) > 0.2 and max(of_core) < 1.3


def test_only_the_first_steps_of_low_rank_layers_shrink_with_the_width():
    """With rank sqrt(d), the branches of the wide model change less in 5 steps, but have caught up after 25."""
    ratios = []
    for steps in (5, 25):
        changes = []
        for width in (32, 256):
            options = dict(structure="low_rank", rank=math.isqrt(width), structured_layers=("attn", "ffn"))
            torch.manual_seed(0)
            model = GPT(GPTConfig(**{**SMALL, "block_size": 16}, d_model=width, **options))
            run = coordinates_after(model, lr_multipliers(model), steps=steps)
            changes.append(sum(run[f"blocks.{layer}.ffn.down"][1] for layer in (0, 1)))
        ratios.append(changes[1] / changes[0])
    assert ratios[0] < 0.55 and ratios[1] > 0.75


def test_standard_has_no_multipliers():
    model = GPT(GPTConfig(**SMALL, d_model=64, parametrization="standard"))
    assert set(lr_multipliers(model).values()) == {1.0}


def test_optimizer_groups_hold_every_parameter_once_with_its_rate_and_decay():
    model = GPT(GPTConfig(**SMALL, d_model=64, rank=2, bias=True))
    multipliers = lr_multipliers(model)
    optimizer = make_optimizers(model, RunConfig(lr=1e-3, weight_decay=0.1))
    optimizer.set_lr(2e-3)
    optimizer.set_lr(2e-3)  # assigned, not multiplied
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
    optimizer = make_optimizers(model, RunConfig(lr=1e-2, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 1e-3 if parameter.dim() >= 2 else 1
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


@pytest.mark.parametrize(
    "structure",
    ["dense", "low_rank --rank=width/4 --structured_layers=attn,ffn", "btt --rank=2"],
    ids=["dense", "low_rank", "btt"],
)
def test_activations_keep_their_size_over_widths(structure):
    """Without multipliers, at the narrowest model's rate for all widths, they do not."""
    measured = coordinate_check(parse_structure(structure), CoordsConfig(widths=(64, 128, 256, 512), steps=5, seeds=1))
    assert {"blocks.0", "blocks.1.attn.k", "blocks.1.ffn.down", "lm_head"} < set(measured["rms"]["with"])
    spreads = spreads_of(measured)
    assert spreads["rms"]["with"] < 2 and spreads["change"]["with"] < 2.8  # the change of the logits is the largest
    assert spreads["rms"]["without"] > 3 and spreads["change"]["without"] > 3.3


def test_learning_rates_are_tensors_only_where_a_cuda_graph_reads_them():
    """That is on a GPU, unless parameters are sharded. Fake tensors stand in for a GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            layer = torch.nn.Linear(8, 4, bias=False)
            optimizer = make_optimizers(layer, RunConfig(lr=1e-3), {"weight": 2.0})
            assert torch.is_tensor(optimizer.param_groups[0]["lr"]) and optimizer.parts[0].defaults["capturable"]
            mesh = DeviceMesh("cuda", [0], _init_backend=False)
            sharded = DTensor.from_local(layer.weight.detach(), mesh, [Shard(0)], run_check=False)
            layer.weight = torch.nn.Parameter(sharded)
            optimizer = make_optimizers(layer, RunConfig(lr=1e-3), {"weight": 2.0})
            assert optimizer.param_groups[0]["lr"] == 2e-3 and not optimizer.parts[0].defaults["capturable"]
    finally:
        dist.destroy_process_group()


def test_scaled_decay_takes_lr_times_multiplier_times_decay_off_every_matrix():
    """The published code decays like this: torch's AdamW multiplies the decay by the rate of each group."""
    model = GPT(GPTConfig(**SMALL, d_model=64, rank=2))
    multipliers = lr_multipliers(model)
    optimizer = make_optimizers(model, RunConfig(lr=1e-2, weight_decay=0.1, scale_decay=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert multipliers["blocks.0.ffn.up.cores.0"] == 48  # 768 / (8 · 2)
    for name, parameter in model.named_parameters():
        factor = 1 - 1e-2 * multipliers[name] * 0.1 if parameter.dim() >= 2 else 1
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)
