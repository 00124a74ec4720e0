"""Tests mixtures of experts against float64 loops over experts, and real runs against unbroken ones on one process."""

import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moe
import sample
import train
from configurator import ConfigError
from conftest import losses, read_rows, run_forked
from data import CharTokenizer
from einsum_linear import make_linear
from engine import checkpoint, runlog
from generate import KVCache, generate
from kernels import btt as btt_kernels
from kernels import grouped
from kernels.common import gelu
from lab import convert
from lab.mup_check import CoordsConfig, coordinate_check, largest_spread, parse_structure
from model import GPT
from moe import Router, make_mixture
from optim import lr_multipliers, make_optimizers
from options import GPTConfig, RunConfig, TrainConfig
from prepare_owt import stdlib_files

E = 4
LAYERS = {
    "btt": dict(structure="btt", rank=2),
    "low_rank": dict(structure="low_rank", rank=3),
    "monarch": dict(structure="monarch", num_blocks=3),
    "einsum": dict(structure="einsum", theta=(0.7, 0, 0.3, 0, 0.7, 0.3, 0)),
    "dense": dict(structure="dense", bias=True),
}
SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, d_model=36)
MODELS = {
    "btt": dict(moe="linear", rank=2),
    "shared router": dict(moe="linear", rank=1, share_router=True, num_experts=4, top_k=3),
    "some layers": dict(moe="linear", structure="low_rank", rank=4, structured_layers=("attn.q", "ffn.down"), top_k=1),
    "ffn": dict(moe="ffn", structure="dense", bias=True),
    "ffn of btt": dict(moe="ffn", rank=2, parametrization="standard"),
}


def make_layer(name, top_k=2, d_in=36, d_out=18):
    """A mixture in float64 with random gains and bias, and weights large enough for the cap on their norm to act."""
    torch.manual_seed(0)
    layer = make_mixture(d_in, d_out, E, top_k, **LAYERS[name]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
    return layer


def make_random_model(name, **more):
    """A GPT with noise added to every parameter, so that none stays at its initial zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **MODELS[name], **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mix_by_loop(layer, x, index, gate):
    """The definition of a mixture: Σ_k gate · W[index] x + bias, token by token, from the materialised matrices."""
    matrices = [layer.materialize(row) for row in torch.eye(E, dtype=x.dtype)]
    y = torch.stack(
        [sum(g * (matrices[e] @ row) for e, g in zip(es.tolist(), gs)) for row, es, gs in zip(x, index, gate)]
    )
    return y if layer.bias is None else y + layer.bias


def routings(n, k):
    """Pairs of a name and indices (n, k): random experts, the same experts for all tokens, no token for expert 1."""
    yield "random", torch.rand(n, E).topk(k).indices
    yield "the same experts for all", torch.arange(k).flip(0).expand(n, k).contiguous()
    if k < E:
        yield "no token for expert 1", torch.tensor([0, 2, 3])[torch.rand(n, E - 1).topk(k).indices]


# -- layers


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_equal_a_loop_in_float64(name, k):
    layer = make_layer(name, k)
    for what, index in (routing for n in (1, 7, 64) for routing in routings(n, k)):
        n = len(index)
        x = torch.randn(n, 36, dtype=torch.float64, requires_grad=True)
        gate = torch.rand(n, k, dtype=torch.float64)
        gate[0, 0] = 0.0  # its gradient must stay finite: nothing may be divided by a gate
        gate.requires_grad_()
        dy = torch.randn(n, 18, dtype=torch.float64)
        wanted = [x, gate, *(p for p in layer.parameters() if p is not layer.router.weight)]
        got, want = layer.mix(x, index, gate), mix_by_loop(layer, x, index, gate)
        torch.testing.assert_close(got, want, msg=lambda text, where=f"{what}, {n} tokens": f"{where}: {text}")
        for a, b in zip(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy)):
            torch.testing.assert_close(a, b, msg=lambda text, where=f"{what}, {n} tokens": f"{where}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_outputs_are_close_to_float64(name):
    layer = make_layer(name).float()
    x = torch.randn(512, 36)
    index, gate = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.mix(x.bfloat16(), index, gate)
    assert got.dtype == torch.bfloat16
    want = mix_by_loop(layer.double(), x.bfloat16().double(), index, gate.double())
    assert (got.double() - want).norm() <= 5e-3 * want.norm()


def test_a_mixture_of_all_slices_with_equal_gates_is_the_btt_of_all_ranks():
    layer = make_layer("btt", E)
    x = torch.randn(5, 36, dtype=torch.float64)
    got = layer.mix(x, torch.arange(E).expand(5, E), torch.ones(5, E, dtype=torch.float64))
    torch.testing.assert_close(got, btt_kernels.btt(x, *layer.effective_cores(), method="torch"))


def test_nothing_is_computed_for_experts_that_are_not_picked():
    """NaN in their weights changes nothing, and the FLOPs are those of n · k rows."""
    for name in ("btt", "dense"):
        layer = make_layer(name)
        with torch.no_grad():
            if name == "dense":
                layer.cores[0][1] = math.nan
            else:
                layer.normalize = False  # the cap on norms reads all weights
                g, a, _ = layer.cores[0].shape
                layer.cores[0].view(g, a, E, -1)[:, :, 1] = math.nan
        x = torch.randn(9, 36, dtype=torch.float64, requires_grad=True)
        index = torch.tensor([0, 2]).expand(9, 2)
        y = layer.mix(x, index, torch.rand(9, 2, dtype=torch.float64))
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(core.grad.isfinite().all() for core in layer.cores)
    for E_ in (4, 64):
        x, W, ends = torch.randn(3, 50, 8), torch.randn(3, E_, 8, 5), torch.randint(51, (E_,)).sort().values
        ends[-1] = 50
        with FlopCounterMode(display=False) as counter:
            grouped.products_by_loop(x, W, ends)
        assert counter.get_total_flops() == 2 * 3 * 50 * 8 * 5
        assert grouped.tiles(50, ends)[0].shape == (50 // grouped.TILE + E_,)


@pytest.mark.parametrize("counts", [(70, 0, 64, 1), (0, 0, 0, 3), (1, 0, 0, 0), (128, 64, 0, 65)], ids=str)
def test_products_by_tiles_equal_the_loop(counts):
    """GPUs without a grouped GEMM for these shapes take this method. Its sizes depend on the number of rows alone."""
    m, ends = sum(counts), torch.tensor(counts).cumsum(0)
    x, dy, W = torch.randn(3, m, 5).double(), torch.randn(3, m, 6).double(), torch.randn(3, E, 5, 6).double()
    torch.testing.assert_close(grouped.products_by_tiles(x, W, ends), grouped.products_by_loop(x, W, ends))
    torch.testing.assert_close(grouped.gradients_by_tiles(x, dy, ends), grouped.gradients_by_loop(x, dy, ends))
    expert, place = grouped.tiles(m, ends)
    assert (
        len(expert) == m // grouped.TILE + E and len(place.unique()) == m and place.max() < len(expert) * grouped.TILE
    )
    assert (expert[place // grouped.TILE] == torch.repeat_interleave(torch.tensor(counts))).all()


def test_rows_are_sorted_by_expert():
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])
    order, inverse, ends = moe.sort_by_expert(index, 5)
    assert order.tolist() == [1, 2, 0, 4, 3, 5] and ends.tolist() == [2, 2, 4, 6, 6]
    assert order[inverse].tolist() == list(range(6))


def test_a_mixture_of_ffns_equals_a_loop_over_ffns():
    model = make_random_model("ffn").double()
    ffn, x = model.blocks[0].ffn, torch.randn(2, 9, 36, dtype=torch.float64)
    index, gate = ffn.router(x)
    up, down = ([layer.materialize(row) for row in torch.eye(8).double()] for layer in (ffn.up, ffn.down))
    want = []
    for row, es, gs in zip(x.flatten(0, 1), index.tolist(), gate):
        want.append(sum(g * (down[e] @ gelu(up[e] @ row + ffn.up.bias)) for e, g in zip(es, gs)) + ffn.down.bias)
    torch.testing.assert_close(ffn(x), torch.stack(want).view(2, 9, 36))


# -- routers


@pytest.mark.parametrize("d_in, num_experts, k", [(64, 8, 2), (256, 4, 1), (768, 16, 4)])
def test_new_routers_load_their_experts_evenly(d_in, num_experts, k):
    """Inputs with a mean other than zero, as after a GELU, are among those tested."""
    torch.manual_seed(0)
    for input_ in (torch.randn(4096, d_in), F.gelu(torch.randn(4096, d_in))):
        index, gate, logits = Router(d_in, num_experts, k).route(input_)
        load = torch.bincount(index.flatten(), minlength=num_experts) * num_experts / index.numel()
        assert load.min() > 0.75 and load.max() < 1.25, load
        assert all(len(set(row)) == k for row in index.tolist())
        torch.testing.assert_close(gate.sum(dim=1), torch.ones(len(gate)))
        torch.testing.assert_close(gate, logits.gather(1, index).softmax(dim=1))


@pytest.mark.parametrize("kind", [dict(moe="linear"), dict(moe="linear", share_router=True), dict(moe="ffn")], ids=str)
def test_routers_that_start_at_zero_send_all_tokens_to_the_first_experts(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **kind, num_experts=8, top_k=2, router_init="zero"))
    idx = torch.randint(96, (4, 32))
    model(idx, idx)
    loads = [report[4:12].tolist() for report in model.routers.reports]
    assert loads == [[0.5, 0.5, 0, 0, 0, 0, 0, 0]] * len(model.routers.names)
    (row,) = {line.split()[-1] for line in runlog.model_table(model, lr_multipliers(model), 1e-3) if "router" in line}
    assert row == "0"
    for router in model.routers.all:  # once logits differ, the larger ones are picked
        torch.nn.init.normal_(router.weight)
        index, _, logits = router.route(torch.randn(64, router.in_features))
        assert torch.equal(index, logits.topk(2).indices)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_biases_move_by_their_rate(rate):
    """The reference is computed by hand: 3 experts with loads 1/2, 1/2 and 0, and logits of standard deviation 2."""
    router = Router(4, 3, 1)
    report = torch.tensor([[1.0, 0, 0, 2, 1 / 2, 1 / 2, 0, 0, 0, 0]])
    moe.Routers({"a": router}).balance(10 * report, rate)
    torch.testing.assert_close(router.bias, torch.tensor([-0.5, -0.5, 1.0]) * 2 * rate)


def test_a_run_balances_its_routers_at_the_rate_of_its_option(monkeypatch):
    rates = []
    monkeypatch.setattr(moe.Routers, "balance", lambda self, reports, rate: rates.append(rate))
    config = TrainConfig(
        **SMALL, moe="linear", router_balance=0.25, micro_batch=2, batch_tokens=64, device="cpu", compile=False
    )
    task = train.TokenTask(config, torch.device("cpu"), RandomTokens(96))
    train.Trainer(config, task, torch.device("cpu")).update(*task.batch(0))
    assert rates == [0.25]


class RandomTokens:
    """Random ids in place of data.TokenData."""

    def __init__(self, vocab_size):
        self.vocab_size, self.meta = vocab_size, {}

    def train_batch(self, seed, step, rows, start, stop):
        return [torch.randint(self.vocab_size, (stop - start, SMALL["block_size"])) for _ in range(2)]


def test_expert_init_single_initialises_experts_like_layers_of_their_own():
    """The sizes are computed by hand, for a BTT 256 -> 1024 = 16 x 16 -> 32 x 32 of rank 1 and for a dense matrix."""
    torch.manual_seed(0)
    for single in (False, True):
        options = dict(SMALL, d_model=256, n_layer=1, moe="linear", expert_init="single" if single else "mixed")
        up = GPT(GPTConfig(**options)).blocks[0].ffn.up
        want = [1 / 4, 1 / 4 if single else 2 * math.sqrt(32) / 32]  # sqrt(min(fan_in, fan_out)) / fan_in
        assert [core.std().item() for core in up.cores] == pytest.approx(want, rel=0.02)
        assert up.init_std == pytest.approx(want)  # the cap
        up = GPT(GPTConfig(**options, structure="dense")).blocks[0].ffn.up
        assert up.cores[0].std().item() == pytest.approx((1 if single else math.sqrt(2)) / 16, rel=0.02)


def test_the_largest_logits_are_picked_and_ties_go_to_all_experts_in_turn():
    logits = torch.randn(100, 7)
    assert torch.equal(moe.pick(logits, 3), logits.topk(3).indices)
    for k in (1, 2, 7):
        index = moe.pick(torch.zeros(70, 7), k)
        assert torch.bincount(index.flatten(), minlength=7).tolist() == [10 * k] * 7
        assert all(len(set(row)) == k for row in index.tolist())
    one_ahead = torch.zeros(60, 7)
    one_ahead[:, 4] = 1
    assert torch.bincount(moe.pick(one_ahead, 2).flatten(), minlength=7)[4] == 60


def test_logits_are_float32_under_autocast():
    router = Router(36, 8, 2)
    x = torch.randn(50, 36).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, gate, logits = router.route(x)
    assert gate.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.T)


def test_reports_equal_values_computed_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [1, 0]])
    gate = logits.gather(1, index).softmax(dim=1)
    other = (index.flip(1), gate.flip(1).detach(), 2 * logits)  # a second router must not change the first one's report
    row = moe.router_reports([(index, gate.detach(), logits), other])[0]
    p, g = logits.detach().softmax(dim=1), gate.detach()
    load = [2 / 4, 1 / 4, 1 / 4]
    balance = 3 * sum(f * mean for f, mean in zip(load, p.mean(dim=0).tolist()))
    z = sum(math.log(sum(math.exp(v) for v in values)) ** 2 for values in logits.tolist()) / 2
    mean_gate = [(g[0, 0] + g[1, 1]).item() / 2, g[1, 0].item() / 2, g[0, 1].item() / 2]
    entropy = -(g * g.log()).sum().item() / 2
    assert row.tolist() == pytest.approx([1, balance + 0.1 * z, entropy, row[3].item(), *load, *mean_gate])
    assert moe.auxiliary_loss(torch.stack((row, 3 * row))).item() == pytest.approx(0.01 * 2 * (balance + 0.1 * z))
    figures = moe.Routers({"a": Router(1, 3, 2)}).figures(5 * row[None])["a"]
    assert figures["load"] == load and figures["token_entropy"] == pytest.approx(entropy, abs=1e-4)
    assert figures["mean_entropy"] == pytest.approx(-sum(v * math.log(v) for v in mean_gate), abs=1e-4)


def test_the_loss_includes_the_auxiliary_loss_in_training_only():
    for name in MODELS:
        model = make_random_model(name)
        idx = torch.randint(96, (2, 3, 32))
        logits, want = model(*idx)
        torch.testing.assert_close(want, F.cross_entropy(logits.flatten(0, 1), idx[1].flatten()))
        model.train()
        _, loss = model(*idx)
        routers, reports = model.routers, model.routers.reports
        assert len(reports) == len(routers.names)
        torch.testing.assert_close(routers.cross_entropy, want)
        torch.testing.assert_close(loss, want + 0.01 * reports[:, routers.AUX].mean())
        of_all = reports[:, routers.LOADS :].sum(dim=1)
        torch.testing.assert_close(of_all, torch.full((len(reports),), 2.0))  # no token is dropped
        assert all(router.routing is None for router in routers.all)  # nothing keeps the batch's graph alive


@pytest.mark.parametrize("name", MODELS)
def test_reports_are_in_the_order_of_the_names(name):
    """Each router in turn sends all tokens to its last experts: the one row that shows it must be the router's."""
    model = make_random_model(name).train()
    idx = torch.randint(96, (2, 32))
    for at, layer in enumerate(model.routers.names):
        router = model.get_submodule(f"{layer}.router")
        router.bias[-router.top_k :] = 1e6
        model(idx, idx)
        loads = model.routers.reports[:, model.routers.LOADS :].chunk(2, dim=1)[0]
        assert loads[at, -router.top_k :].sum() == pytest.approx(1)
        assert [i for i, load in enumerate(loads) if load[-router.top_k :].sum() > 0.99] == [at]
        router.bias.zero_()


def test_q_k_and_v_may_share_a_router():
    model = make_random_model("shared router")
    names = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn", "attn.proj", "ffn.up", "ffn.down")]
    assert model.routers.names == names
    attn, x = model.blocks[0].attn, torch.randn(1, 6, 36)
    index, gate = attn.router(x[0])
    got = moe.mix_together(attn.router, (attn.q, attn.k, attn.v), x)
    for layer, y in zip((attn.q, attn.k, attn.v), got):
        torch.testing.assert_close(y[0], mix_by_loop(layer, x[0], index, gate))


# -- in the model


@pytest.mark.parametrize("name", MODELS)
def test_compiles_as_one_graph_with_the_same_loss_and_gradients(name):
    layers = {"some layers": ("attn.q", "ffn.down"), "ffn": (), "ffn of btt": ("ffn",)}.get(name, ("attn", "ffn"))
    model = make_random_model(name, structured_layers=layers, n_layer=1).train()
    idx = torch.randint(96, (2, 2, 32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        loss = function(*idx)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_executed_graph(name):
    def products(x_shape, W_shape, *_, **__):
        return 2 * x_shape[0] * x_shape[1] * x_shape[2] * W_shape[3]

    model = make_random_model(name)
    counted = {torch.ops.nanoeinsum.grouped_products: products}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(torch.zeros(3, 32, dtype=torch.long))
    assert counter.get_total_flops() == 3 * 32 * model.flops_per_token()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_tables_totals_equal_the_models_parameters_and_flops(name):
    model = make_random_model(name)
    *_, total = runlog.model_table(model, lr_multipliers(model), 1e-3)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in total and f"{model.flops_per_token():,}" in total


def test_cached_logits_equal_recomputed_ones_and_generation_runs_past_the_block():
    model = make_random_model("btt").double()
    idx = torch.randint(96, (3, 32))
    cache = KVCache(model.config, idx.device)
    got = [model.lm_head(model.trunk(idx[:, a:b], cache)) for a, b in [(0, 7), (7, 8), (8, 20), (20, 32)]]
    torch.testing.assert_close(torch.cat(got, dim=1), model(idx)[0])
    assert generate(model, idx, 5).shape == (3, 37)


def test_every_parameter_gets_a_gradient_and_idle_experts_get_zeros():
    for name in MODELS:
        model = make_random_model(name).train()
        for layer in model.routers.names:
            model.get_submodule(f"{layer}.router").bias[0] = -1e6
        idx = torch.randint(96, (2, 32))
        model(idx, idx)[1].backward()
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith("attn.k.bias"):  # a shift of all keys leaves the softmax as it is
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
        if name == "ffn":
            grad = model.blocks[0].ffn.up.cores[0].grad
            assert not grad[0].any() and grad[1].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_changes_no_gradient_and_keeps_no_graph(compiled):
    model, other = make_random_model("btt").train(), make_random_model("btt", activation_checkpointing=True).train()
    if compiled:  # block by block, as train.py compiles mixtures
        for block in other.blocks:
            block.compile(backend="aot_eager")
    idx = torch.randint(96, (2, 4, 32))
    for m in (model, other):
        m(*idx)[1].backward()
    assert all(router.routing is None for router in other.routers.all)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_learning_rate_multipliers_are_those_of_one_expert():
    multipliers = lr_multipliers(GPT(GPTConfig(**{**SMALL, "d_model": 64}, moe="linear", rank=3)))
    # 64 = 8 x 8 -> 256 = 16 x 16: A contracts 8 of the input, B the other 8 and the 3 ranks of an expert
    assert multipliers["blocks.0.ffn.up.cores.0"] == 768 / (8 * 2)
    assert multipliers["blocks.0.ffn.up.cores.1"] == 768 / (8 * 3 * 2)
    assert multipliers["blocks.0.ffn.up.router.weight"] == 768 / 64
    assert multipliers["blocks.0.ffn.down.router.weight"] == 768 / 256
    dense = lr_multipliers(GPT(GPTConfig(**{**SMALL, "d_model": 64}, moe="ffn", structure="dense")))
    assert dense["blocks.0.ffn.up.cores.0"] == 768 / 64 and dense["blocks.0.ffn.router.weight"] == 768 / 64


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_new_mixtures_outputs_are_as_large_as_those_of_one_layer_with_the_same_active_rank(k):
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    for options, plain in (
        (dict(structure="btt", rank=2), dict(structure="btt", rank=2 * k)),
        (dict(structure="low_rank", rank=8), dict(structure="low_rank", rank=8 * k)),
        (dict(structure="dense"), dict(structure="dense")),
    ):
        want = make_linear(256, 256, **plain)(x).square().mean().sqrt()
        layer = make_mixture(256, 256, 8, k, **options)
        got = layer(x).square().mean().sqrt()
        assert got.item() == pytest.approx(want.item(), rel=0.12), options


def test_standard_parametrization_initialises_dense_experts_like_gpt2_and_routers_as_usual():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "d_model": 64}, moe="ffn", structure="dense", parametrization="standard"))
    ffn = model.blocks[0].ffn
    assert ffn.up.cores[0].std().item() == pytest.approx(0.02, rel=0.03)
    assert ffn.down.cores[0].std().item() == pytest.approx(0.02 / 2, rel=0.03)
    torch.testing.assert_close(ffn.router.weight.norm(dim=1), torch.full((8,), math.sqrt(8 / 64)))


@pytest.mark.parametrize("structure", ["btt --rank=2 --moe=linear --num_experts=4", "dense --moe=ffn --num_experts=4"])
def test_outputs_keep_their_size_over_widths(structure):
    """Checks the outputs of layers and blocks; the initial size of attention and router logits depends on the width."""
    measured = coordinate_check(parse_structure(structure), CoordsConfig(widths=(64, 144, 256), steps=3, seeds=1))
    sizes = {name: rms for name, rms in measured["rms"]["with"].items() if not name.endswith(("logits", "router"))}
    assert len(sizes) > 12 and largest_spread(sizes) < 2


# -- training


@pytest.fixture(scope="module")
def real_text():
    """(tokens,) Token ids of source files from Python's standard library."""
    texts = [open(path, encoding="utf-8", errors="replace").read() for path in sorted(stdlib_files())[:150]]
    ids = b"".join(filter(None, map(CharTokenizer().encode_document, texts)))
    return torch.frombuffer(bytearray(ids), dtype=torch.uint8).long()


@pytest.mark.parametrize("kind", [dict(moe="linear", rank=1), dict(moe="ffn", structure="dense")], ids=str)
def test_no_expert_starves_on_real_text(kind, real_text):
    """150 steps of 512 characters at a high rate: without the routers' biases some experts' load falls below 0.15 / E."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=96, n_layer=1, n_head=2, d_model=64, **kind))
    optimizer = make_optimizers(model, RunConfig(lr=4e-3, weight_decay=0.0))
    seen = model.routers.no_reports("cpu")
    first = last = None
    for step in range(150):
        optimizer.set_lr(4e-3 * min(1, (step + 1) / 30))
        starts = torch.randint(len(real_text) - 65, (8,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([real_text[start : start + 65] for start in starts])
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        last = model.routers.cross_entropy
        first = last.item() if first is None else first
        optimizer.step()
        optimizer.zero_grad()
        model.routers.balance(model.routers.reports, rate=0.1)
        if step >= 100:
            seen += model.routers.reports
    assert last.item() < 0.7 * first
    for name, layer in model.routers.figures(seen).items():
        assert min(layer["load"]) > 0.2 / 8, (name, layer)


MOE = ["--moe=linear", "--num_experts=4", "--warmup_steps=2"]


@pytest.fixture(scope="module")
def run(char_data, tmp_path_factory):
    """An unbroken run of 20 steps with two micro-steps each -> its out_dir and arguments."""
    folder = str(tmp_path_factory.mktemp("moe") / "run")
    options = dict(
        data_dir=char_data, out_dir=folder, vocab_size=96, n_layer=2, n_head=2, d_model=36, block_size=32, micro_batch=4,
        batch_tokens=256, max_steps=20, eval_interval=10, eval_tokens=1000, log_interval=1, lr=5e-3, device="cpu",
        compile=False,
    )  # fmt: skip
    arguments = [*(f"--{key}={value}" for key, value in options.items()), *MOE]
    train.main(arguments)
    return folder, arguments


def test_a_run_logs_the_load_of_its_experts(run):
    folder, _ = run
    rows = read_rows(folder)
    assert [row["step"] for row in rows if "moe" in row] == [10, 20]
    roles = ("attn.q", "attn.k", "attn.v", "attn.proj", "ffn.up", "ffn.down")
    layers = [f"blocks.{i}.{role}" for i in (0, 1) for role in roles]
    figures = rows[-1]["moe"]
    assert list(figures) == layers
    for layer in figures.values():
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3) and min(layer["load"]) > 0
        assert 0 < layer["token_entropy"] <= math.log(2) + 1e-4 and layer["mean_entropy"] <= math.log(4) + 1e-4
    # At first loads are nearly even and logits small: the balance loss is 1, the z-loss (log 4)², and the weight 0.01.
    aux = losses(folder, "aux_loss")
    assert list(aux) == list(range(1, 21)) and aux[1] == pytest.approx(0.01 * (1 + 0.1 * math.log(4) ** 2), rel=0.1)
    loss = losses(folder)
    assert loss[1] == pytest.approx(math.log(96), abs=1e-4)  # the cross-entropy alone
    assert losses(folder, "val_loss")[20] < 3.3
    model, _ = sample.load_model(folder)
    assert any(module.bias.any() for module in model.modules() if isinstance(module, Router))
    with open(f"{folder}/experts.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_heat_map_has_one_row_per_expert_and_one_column_per_layer(run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(runlog, "save_figure", lambda figure, path: figures.append(figure))
    runlog.plot_experts(f"{run[0]}/log.jsonl", "unused.png")
    image = figures[0].axes[0].images[0].get_array()
    want = [[4 * load for load in layer["load"]] for layer in read_rows(run[0])[-1]["moe"].values()]
    assert image.T.tolist() == want


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run, tmp_path):
    folder, arguments = run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "ckpt_prev.pt").replace(tmp_path / "run" / "ckpt.pt")
    assert checkpoint.load(tmp_path / "run")["step"] == 10
    train.main([*arguments, f"--out_dir={tmp_path}/run", "--resume"])
    for key in ("loss", "val_loss", "grad_norm", "aux_loss", "moe"):
        assert losses(tmp_path / "run", key) == losses(folder, key)
    states = [checkpoint.load(path)["model"] for path in (folder, tmp_path / "run")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("words", [[], ["--shard=fsdp"]], ids=["copies", "sharded"])
def test_two_processes_equal_one(run, tmp_path, words):
    """The micro-batches and the auxiliary loss are those of one process; the biases follow the load of the whole batch."""
    folder, arguments = run
    done = run_forked("train.py", *arguments, *words, f"--out_dir={tmp_path}/two", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for key in ("loss", "val_loss", "grad_norm", "aux_loss"):
        one, two = losses(folder, key), losses(tmp_path / "two", key)
        assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one), key
    one, two = losses(folder, "moe")[10], losses(tmp_path / "two", "moe")[10]
    for name in one:
        assert two[name]["load"] == pytest.approx(one[name]["load"], abs=0.01)
    if not words:
        return
    train.main(
        [*arguments, "--resume", "--max_steps=22", f"--out_dir={tmp_path}/two"]
    )  # one process resumes, unsharded
    assert max(losses(tmp_path / "two")) == 22


def test_evaluation_and_sampling_may_use_another_number_of_experts(run, tmp_path, capsys):
    folder, arguments = run
    for name, words in (("two", []), ("four", ["--eval_top_k=4"])):
        train.main([*arguments, "--max_steps=5", "--save=False", f"--out_dir={tmp_path}/{name}", *words])
    assert losses(tmp_path / "two") == losses(tmp_path / "four")
    assert losses(tmp_path / "two", "val_loss")[5] != losses(tmp_path / "four", "val_loss")[5]
    model, _ = sample.load_model(folder)
    idx = torch.randint(96, (2, 32))
    two = model(idx)[0]
    moe.set_top_k(model, 4)
    layer, x = model.blocks[0].ffn.up, torch.randn(7, 36)
    index, gate, logits = layer.router.route(x)
    assert index.shape == (7, 4) and (model(idx)[0] - two).abs().max() > 1e-4
    torch.testing.assert_close(mix_by_loop(layer, x, index, gate), layer.mix(x, index, gate), rtol=1e-4, atol=1e-5)
    assert model.flops_per_token() > sample.load_model(folder)[0].flops_per_token()
    moe.set_top_k(model, 2)
    assert torch.equal(model(idx)[0], two)
    capsys.readouterr()
    texts = []
    for words in ([], ["--experts_top_k=1"]):
        sample.main([f"--out_dir={folder}", "--start=1 + ", "--max_new_tokens=60", "--temperature=0", *words])
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    with pytest.raises(ConfigError, match="experts_top_k=5 of num_experts=4"):
        sample.main([f"--out_dir={folder}", "--experts_top_k=5"])
    with pytest.raises(ConfigError, match="has no mixtures"):
        moe.set_top_k(GPT(GPTConfig(**SMALL)), 2)


# -- options


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(moe="linear", num_experts=4, top_k=5), ["top_k=5", "num_experts=4", "at most 4"]),
        (dict(moe="linear", top_k=0), ["top_k=0", "at least 1"]),
        (dict(moe="ffn", num_experts=1, top_k=1), ["num_experts=1", "at least 2"]),
        (dict(num_experts=4), ["num_experts=4", "moe='none'", "moe='linear'"]),
        (dict(share_router=True), ["share_router=True", "moe='none'"]),
        (dict(moe="ffn", share_router=True), ["share_router=True", "moe='linear'"]),
        (dict(moe="linear", share_router=True, structured_layers=("ffn",)), ["share_router=True", "attn"]),
        (dict(moe="linear", structured_layers=("lm_head",)), ["structured_layers", "attn or ffn"]),
        (dict(moe="linear", structure="kronecker"), ["attn.q", "kronecker", "low_rank, dense"]),
        (dict(moe="linear", num_cores=3, d_model=64), ["attn.q", "btt of two cores"]),
        (dict(moe="ffn", overrides={"ffn.up": "kronecker"}), ["ffn.up", "kronecker", "dense"]),
        (dict(moe="linear", rank=7), ["attn.q", "rank 7", "rank <= 6"]),
    ],
)  # fmt: skip
def test_impossible_options_are_one_clear_line(kwargs, words):
    with pytest.raises(ConfigError) as caught:
        GPT(GPTConfig(**{**SMALL, **kwargs}))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_options_that_do_not_fit_a_run_are_refused(run, tmp_path):
    folder, arguments = run
    with pytest.raises(ConfigError, match="eval_top_k=9 of num_experts=4"):
        train.main([*arguments, "--eval_top_k=9"])
    with pytest.raises(ConfigError, match="eval_top_k=2 with moe='none'"):
        train.TrainConfig(**SMALL, eval_top_k=2)
    with pytest.raises(ConfigError, match="top_k=1, but the checkpoint"):
        train.main([*arguments, "--resume", "--top_k=1"])
    with pytest.raises(ConfigError, match=f"source={folder} has moe='linear'"):
        convert.main([f"--source={folder}", f"--out_dir={tmp_path}/converted"])
    with pytest.raises(ConfigError, match="moe='ffn': a matrix cannot be converted to experts"):
        convert.main(["--source=gpt2", f"--out_dir={tmp_path}/converted", "--moe=ffn"])


@pytest.mark.parametrize("kind", ["none", "linear", "ffn"])
def test_structured_layers_become_mixtures(kind):
    """All combinations of structure, structured_layers and an override of one role, against the rule written out here."""
    names = [
        None,
        "dense",
        "btt",
        {"structure": "dense", "bias": True},
        {"structure": "low_rank", "rank": 2},
        {"bias": True},
    ]
    for structure, layers, override in itertools.product(("dense", "btt"), (("attn", "ffn"), ("ffn",)), names):
        overrides = {"attn": "dense", "attn.q": override} if override else None
        config = GPTConfig(**SMALL, structure=structure, structured_layers=layers, overrides=overrides, moe=kind)
        named = override.get("structure") if isinstance(override, dict) else override
        if named:
            expected = named != "dense"
        elif override:  # it changes options only and leaves the structure as it is
            expected = "attn" in layers or structure != "dense"
        else:
            expected = "attn" in layers
        case = (structure, layers, override)
        assert config.is_mixture("attn.q") == (expected and kind == "linear"), case
        assert config.is_mixture("attn.k") == ("attn" in layers and not override and kind == "linear"), case
        assert config.is_mixture("ffn.up") == config.is_mixture("ffn.down") == (kind != "none"), case
        assert not config.is_mixture("lm_head")
        with torch.device("meta"):
            model = GPT(config)
        assert isinstance(model.blocks[0].attn.q, moe.Mixture) == config.is_mixture("attn.q"), case


def test_overrides_alone_can_make_a_layer_a_mixture():
    config = GPTConfig(**SMALL, moe="linear", structured_layers=("lm_head",), overrides={"attn.q": "btt"})
    assert [role for role in config.layer_widths() if config.is_mixture(role)] == ["attn.q"]


def test_head_and_embedding_are_never_mixtures():
    model = GPT(GPTConfig(**SMALL, d_embed=18, moe="linear", structured_layers=("attn", "ffn", "lm_head", "embed")))
    assert not isinstance(model.lm_head, moe.Mixture) and not isinstance(model.embed, moe.Mixture)
    assert sum(isinstance(module, moe.Mixture) for module in model.modules()) == 12
