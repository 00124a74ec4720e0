"""BTT-MoE and low-rank-MoE kernels: interpreted, against a loop over experts in float64; compiled for Hopper without a GPU."""

import inspect

import pytest
import torch

import moe_kernels
from conftest import ROOT, run_script
from kernels import BTTSizes
from moe_kernels import btt_mixture, fits, make_plan

triton = pytest.importorskip("triton")

from test_kernels import Compiler, layer_sizes, on_gpu, spilled  # noqa: E402


def example(sizes, n, num_experts, k, dtype, device="cpu", seed=0):
    """x, A, B, index, gate, dy; `sizes` is of one expert."""
    g, a, f, e, r = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    A, B = normal(g, a, num_experts * r * f, std=a**-0.5), normal(f, g * num_experts * r, e, std=(g * r) ** -0.5)
    scores = torch.rand(n, num_experts, generator=generator, device=device)
    gate = torch.rand(n, k, generator=generator, device=device)
    return normal(n, g * a), A, B, scores.topk(k, dim=1).indices, gate, normal(n, f * e)


def results(x, A, B, index, gate, dy, num_experts):
    """y, dx, dA, dB, dgate"""
    x, A, B, gate = (tensor.detach().requires_grad_() for tensor in (x, A, B, gate))
    y = btt_mixture(x, A, B, index, gate, num_experts)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B, gate), dy)]


def exact(x, A, B, index, gate, dy, num_experts):
    """The same in float64: every expert for every token, times its gate, or zero."""
    x, A, B, gate = (tensor.double().requires_grad_() for tensor in (x, A, B, gate))
    g, a, _ = A.shape
    f, _, e = B.shape
    r = A.shape[2] // (num_experts * f)
    y = 0
    for expert in range(num_experts):
        z = torch.einsum("nga,garf->ngrf", x.view(-1, g, a), A.view(g, a, num_experts, r, f)[:, :, expert])
        of_expert = torch.einsum("ngrf,fgre->nfe", z, B.view(f, g, num_experts, r, e)[:, :, expert]).reshape(
            len(x), f * e
        )
        y = y + of_expert * ((index == expert) * gate).sum(1, keepdim=True)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B, gate), dy.double())]


def errors(*inputs):
    return [(a.double() - b).norm().item() / (b.norm().item() or 1) for a, b in zip(results(*inputs), exact(*inputs))]


@pytest.mark.parametrize(
    "n, num_experts, k, tokens", [(100, 4, 2, 16), (7, 5, 1, 4), (300, 4, 4, 32), (50, 7, 3, 8), (1, 3, 2, 8)]
)
def test_every_token_is_in_one_tile_of_its_set(n, num_experts, k, tokens):
    index = torch.rand(n, num_experts).topk(k, dim=1).indices.sort(dim=1).values
    plan = make_plan(index, num_experts, tokens)
    seen = []
    for first, end, of_set in zip(plan.first.tolist(), plan.end.tolist(), plan.tile_set.tolist()):
        mine = plan.order[first : min(end, first + tokens)].tolist()
        assert all(index[token].tolist() == plan.sets[of_set].tolist() for token in mine)
        seen += mine
    assert sorted(seen) == list(range(n))
    for of_set, (start, stop) in enumerate(zip(plan.set_tiles[:-1], plan.set_tiles[1:])):
        assert (plan.tile_set[start:stop] == of_set).all()


def test_which_layers_fit():
    assert fits(layer_sizes(1024, 1024, 1), 8, 2) and fits(layer_sizes(4096, 4096, 1), 16, 2)
    assert not fits(layer_sizes(1024, 1024, 1), 64, 4)  # too many sets of experts
    assert not fits(layer_sizes(4096, 4096, 4), 8, 2)  # too many rows of z
    assert not fits(BTTSizes(4, 4096, 4, 256, 8), 8, 2)  # too much of a core for a program
    assert fits(BTTSizes(1, 4096, 1, 4096, 512), 8, 2)  # low rank goes through it in parts


def test_kernels_in_the_interpreter():
    path = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = run_script("tests/test_moe_kernels.py", env=path)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr


def interpreted():
    """What the test above runs. Memory that a kernel does not write is NaN here."""
    torch.use_deterministic_algorithms(True)
    cases = [
        (BTTSizes(8, 16, 8, 16, 1), 100, 4, 2),
        (BTTSizes(6, 12, 10, 20, 2), 37, 5, 2),
        (BTTSizes(3, 5, 7, 4, 3), 30, 4, 1),
        (BTTSizes(4, 8, 6, 10, 1), 33, 4, 4),  # k = E
        (BTTSizes(4, 16, 4, 16, 1), 60, 5, 3),
        (BTTSizes(8, 16, 8, 16, 1), 1, 4, 2),  # one token
        (BTTSizes(4, 16, 4, 16, 1), 0, 3, 2),  # none
        (BTTSizes(4, 16, 4, 16, 1), 400, 3, 2),  # larger tiles
        (BTTSizes(1, 70, 1, 150, 9), 90, 4, 2),  # low rank
        (BTTSizes(1, 150, 1, 33, 80), 40, 3, 2),  # in several parts
        (BTTSizes(1, 16, 1, 20, 4), 33, 4, 4),
        (BTTSizes(1, 16, 1, 20, 4), 20, 4, 1),
        (BTTSizes(1, 16, 1, 20, 4), 1, 4, 3),
        (BTTSizes(1, 16, 1, 20, 4), 0, 4, 2),
    ]
    for sizes, n, num_experts, k in cases:
        for dtype, most in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
            inputs = example(sizes, n, num_experts, k, dtype)
            found = errors(*inputs, num_experts)
            assert max(found) < most, (sizes, n, num_experts, k, found)
    for sizes in (BTTSizes(8, 16, 8, 16, 1), BTTSizes(1, 24, 1, 40, 10)):
        g, a, f, e, r = sizes
        x, A, B, index, gate, dy = example(sizes, 70, 4, 2, torch.float32)
        lonely = torch.tensor([[2, 0]]).expand(70, 2)  # all tokens to one set, two experts with none
        assert max(errors(x, A, B, lonely, gate, dy, 4)) < 1e-5
        dA = results(x, A, B, lonely, gate, dy, 4)[2].view(g, a, 4, r * f)
        assert not dA[:, :, [1, 3]].any() and dA[:, :, [0, 2]].any()
        inputs = (x, A, B, index, gate, dy, 4)
        assert all(torch.equal(a, b) for a, b in zip(results(*inputs), results(*inputs)))
        # without a break of the graph
        fast = torch.compile(btt_mixture, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(x, A, B, index, gate, 4), btt_mixture(x, A, B, index, gate, 4), rtol=0, atol=0)
    print("passed")


LOW_RANK = BTTSizes(1, 1024, 1, 1024, 128)


@pytest.mark.parametrize(
    "sizes, num_experts, k",
    [
        (layer_sizes(1024, 1024, 1), 8, 2),
        (layer_sizes(512, 512, 1), 16, 2),
        (layer_sizes(4096, 4096, 1), 8, 2),
        (LOW_RANK, 8, 2),
    ],
)
def test_compiles_for_hopper(monkeypatch, sizes, num_experts, k):
    compiled = {}
    for name, kernel in inspect.getmembers(
        moe_kernels, lambda member: isinstance(member, triton.runtime.jit.JITFunction)
    ):
        if name.endswith("_kernel"):
            monkeypatch.setattr(moe_kernels, name, Compiler(kernel, compiled))
    monkeypatch.setattr(moe_kernels, "_multiprocessors", lambda tensor: 132)
    x, A, B, index, gate, dy = example(sizes, 2000, num_experts, k, torch.bfloat16)
    results(x, A, B, index, gate, dy, num_experts)
    assert len(compiled) == (3 if sizes is LOW_RANK else 4)
    for name, result in compiled.items():
        assert result.metadata.shared <= 232_448 and spilled(result) <= 128, name
        assert sizes.g * sizes.a < 1024 or "wgmma" in result.asm["ptx"], name


@on_gpu
@pytest.mark.parametrize(
    "sizes, num_experts, k, n",
    [
        (layer_sizes(1024, 1024, 1), 8, 2, 5000),
        (layer_sizes(512, 512, 1), 16, 2, 3000),
        (layer_sizes(2048, 2048, 1), 8, 1, 77),
        (layer_sizes(768, 768, 1), 4, 4, 1000),
        (LOW_RANK, 8, 2, 3000),
        (BTTSizes(1, 600, 1, 1000, 100), 4, 2, 77),
    ],
)
def test_errors_on_a_gpu(sizes, num_experts, k, n):
    inputs = (*example(sizes, n, num_experts, k, torch.bfloat16, "cuda"), num_experts)
    assert max(errors(*inputs)) <= 5e-3
    assert all(torch.equal(a, b) for a, b in zip(results(*inputs), results(*inputs)))


if __name__ == "__main__":
    interpreted()
