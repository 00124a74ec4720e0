"""Structure-aware muP: multipliers by hand, and a coordinate check over four widths."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lab.mup_check import CoordsConfig, coordinate_check, largest_spread, parse_structure
from model import GPT
from optim import lr_multipliers, make_optimizers
from options import GPTConfig, RunConfig

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
    ["dense", "low_rank:rank=width/4,structured_layers=attn ffn", "btt:rank=2"],
    ids=["dense", "low_rank", "btt"],
)
def test_coordinate_check(structure):
    """Activations keep their size over the widths; with one rate for all widths, the narrowest's, they do not."""
    sizes = coordinate_check(parse_structure(structure), CoordsConfig(widths=(64, 128, 256, 512), steps=5, seeds=1))
    assert {"blocks.0", "blocks.1.attn.k", "blocks.1.ffn.down", "lm_head"} < set(sizes["with"])
    assert largest_spread(sizes["with"]) < 2
    assert largest_spread(sizes["without"]) > 3


def test_rates_are_tensors_only_where_a_graph_reads_them():
    """On a GPU, that is; of sharded parameters they are numbers. Pretended tensors: neither GPU nor memory is needed."""
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
