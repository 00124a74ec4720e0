"""Tests the BTT-MoE and low-rank-MoE kernels in Triton's interpreter against float64; compiles them for Hopper."""

import inspect

import pytest
import torch

from conftest import run_interpreted
from kernels import common
from kernels import moe as moe_kernels
from kernels import routing as route_kernels
from kernels.btt import BTTSizes
from kernels.moe import btt_mixture, kernels_fit, mixture_method, routed_btt_mixture, router_fits
from kernels.routing import make_plan, route, set_tables
from moe import Router, pick

triton = pytest.importorskip("triton")

from hopper import Compiler, layer_sizes, on_gpu, spilled_bytes  # noqa: E402


def random_inputs(sizes, n, num_experts, k, dtype, device="cpu", seed=0):
    """Random x, A, B, index, gate, dy; `sizes` are those of one expert."""
    g, a, f, e, r = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    A, B = normal(g, a, num_experts * r * f, std=a**-0.5), normal(f, g * num_experts * r, e, std=(g * r) ** -0.5)
    scores = torch.rand(n, num_experts, generator=generator, device=device)
    gate = torch.rand(n, k, generator=generator, device=device)
    return normal(n, g * a), A, B, scores.topk(k, dim=1).indices, gate, normal(n, f * e)


def outputs_and_gradients(x, A, B, index, gate, dy, num_experts):
    """y, dx, dA, dB, dgate"""
    x, A, B, gate = (tensor.detach().requires_grad_() for tensor in (x, A, B, gate))
    y = btt_mixture(x, A, B, index, gate, num_experts)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B, gate), dy)]


def exact_outputs_and_gradients(x, A, B, index, gate, dy, num_experts):
    """The same in float64, by a loop over experts."""
    x, A, B, gate = (tensor.double().requires_grad_() for tensor in (x, A, B, gate))
    y = mix_by_loop(x, A, B, index, gate, num_experts)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B, gate), dy.double())]


def mix_by_loop(x, A, B, index, gate, num_experts):
    """Σ over all experts of the expert's output times its gate, which is zero if it was not picked."""
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
    return y


def relative_errors(*inputs):
    return [
        (a.double() - b).norm().item() / (b.norm().item() or 1)
        for a, b in zip(outputs_and_gradients(*inputs), exact_outputs_and_gradients(*inputs))
    ]


def routed_outputs_and_gradients(x, W, bias, A, B, k, dy, dlogits, after_gelu=False):
    """[y, dx, dW, dA, dB] of a layer with its router, and the experts and gates that the router picked"""
    tensors = [tensor.detach().requires_grad_() for tensor in (x, W, A, B)]
    x, W, A, B = tensors
    y, index, gate, logits = routed_btt_mixture(x, W, bias, A, B, k, after_gelu)
    outputs, grads = ((y, logits), (dy, dlogits)) if dlogits is not None else (y, dy)
    return [y.detach(), *torch.autograd.grad(outputs, tensors, grads)], index, gate


def routed_relative_errors(sizes, n, num_experts, k, dtype, device="cpu", more=True, after_gelu=False):
    x, A, B, _, _, dy = random_inputs(sizes, n, num_experts, k, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    W = torch.randn(num_experts, x.shape[1], generator=generator, device=device) / x.shape[1] ** 0.5
    bias = 0.1 * torch.randn(num_experts, generator=generator, device=device)
    dlogits = torch.randn(n, num_experts, generator=generator, device=device) if more else None
    found, index, _ = routed_outputs_and_gradients(x, W, bias, A, B, k, dy, dlogits, after_gelu)
    x, W, A, B = tensors = [tensor.double().requires_grad_() for tensor in (x, W, A, B)]
    if after_gelu:
        exact_gelu = torch.nn.functional.gelu(x, approximate="tanh")
        x = exact_gelu + (exact_gelu.to(dtype) - exact_gelu).detach()  # the kernels route by x rounded to 16 bits
    logits = x @ W.t()
    assert torch.equal(index, pick(logits.detach().float() + bias, k).sort(dim=1).values)
    y = mix_by_loop(x, A, B, index, logits.gather(1, index).softmax(dim=1), num_experts)
    total = (y * dy.double()).sum() + ((logits * dlogits.double()).sum() if more else 0)
    true = [y.detach(), *torch.autograd.grad(total, tensors)]
    return [(a.double() - b).norm().item() / (b.norm().item() or 1) for a, b in zip(found, true)]


def check_router(n, d, num_experts, k, dtype):
    """route equals the plain Router, takes experts in turn if all tie, and keeps NaN within its row."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    router, bias = Router(d, num_experts, k).double(), torch.linspace(-0.5, 0.5, num_experts)
    W = router.weight.detach().float()
    router.bias += bias
    index, gate, logits = router.route(x.double())
    order = index.argsort(dim=1)
    ours = route(x, W, bias, k)
    assert torch.equal(ours[1], index.gather(1, order))
    torch.testing.assert_close(ours[0].double(), logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2].double(), gate.detach().gather(1, order), rtol=1e-5, atol=1e-5)
    in_turn = (torch.arange(n)[:, None] + torch.arange(k)) % num_experts
    assert torch.equal(route(x, 0 * W, 0 * bias, k)[1], in_turn.sort(dim=1).values)
    x[: n // 2] = float("nan")
    _, index, gate = route(x, W, bias, k)
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < num_experts for row in index.tolist())
    assert torch.equal(index[n // 2 :], ours[1][n // 2 :]) and torch.equal(gate[n // 2 :], ours[2][n // 2 :])


def check_plan(n, num_experts, k, tokens):
    """Every token is in exactly one tile of its set of experts, in order."""
    index = torch.rand(n, num_experts).topk(k, dim=1).indices.sort(dim=1).values
    gate = torch.rand(n, k)
    plan, sets = make_plan(index, gate, num_experts, tokens), set_tables(num_experts, k, index.device).sets
    assert len(plan.token) == len(plan.tile_set) * tokens == plan.gate.shape[1]
    seen = []
    for place, token in enumerate(plan.token.tolist()):
        if token < 0:
            assert not plan.gate[:, place].any()
            continue
        assert index[token].tolist() == sets[plan.tile_set[place // tokens]].tolist()
        assert torch.equal(plan.gate[:, place], gate[token]) and plan.place[token] == place
        seen.append(token)
    assert sorted(seen) == list(range(n))
    for of_set, (start, stop) in enumerate(zip(plan.set_tiles[:-1], plan.set_tiles[1:])):
        assert (plan.tile_set[start:stop] == of_set).all()
        mine = plan.token[start * tokens : stop * tokens]
        assert (mine.sort().values[-(mine >= 0).sum() :] == mine[mine >= 0]).all()  # in order
    assert (plan.token[plan.set_tiles[-1] * tokens :] == -1).all()


def test_mixture_method_chooses_how_a_mixture_is_computed(monkeypatch):
    sizes, low_rank = layer_sizes(1024, 1024, 1), BTTSizes(1, 1024, 1, 1024, 128)
    half = torch.empty(4, 1024, dtype=torch.bfloat16)
    assert mixture_method(half, sizes, 8, 2, own_router=True) == "grouped"  # on a CPU
    monkeypatch.setattr(common, "runs_triton", lambda x: True)  # as on a GPU
    assert mixture_method(half, sizes, 8, 2, own_router=True) == "routed"
    assert mixture_method(half, sizes, 8, 2, own_router=False) == "picked"
    assert (
        mixture_method(half, low_rank, 8, 2, own_router=True) == "picked"
    )  # the low-rank kernels have no room for the router
    assert mixture_method(half, sizes, 17, 1, own_router=True) == "picked"
    assert mixture_method(half, sizes, 64, 4, own_router=True) == "grouped"
    assert mixture_method(half.float(), sizes, 8, 2, own_router=True) == "grouped"


def test_kernels_fit_knows_which_layers_the_kernels_take():
    assert kernels_fit(layer_sizes(1024, 1024, 1), 8, 2) and kernels_fit(layer_sizes(4096, 4096, 1), 16, 2)
    assert not kernels_fit(layer_sizes(1024, 1024, 1), 64, 4)  # too many sets of experts
    assert not kernels_fit(layer_sizes(4096, 4096, 4), 8, 2)  # too many rows of z
    assert not kernels_fit(BTTSizes(4, 4096, 4, 256, 8), 8, 2)  # a program's part of a core is too large
    assert not kernels_fit(BTTSizes(2, 1024, 2, 1024, 1), 8, 2)  # tiles of x and dy are too wide
    assert kernels_fit(BTTSizes(1, 4096, 1, 4096, 512), 8, 2)  # low rank is computed in parts


def test_kernels_are_right_in_the_interpreter():
    done = run_interpreted("tests/kernels/test_mixtures.py", timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr


def check_in_interpreter():
    """What the test above runs. Memory that no kernel writes holds NaN here."""
    torch.use_deterministic_algorithms(True)
    btts = [
        (BTTSizes(8, 16, 4, 16, 1), 60, 4, 2),
        (BTTSizes(3, 12, 5, 20, 2), 37, 5, 2),
        (BTTSizes(3, 5, 7, 4, 3), 30, 4, 1),
        (BTTSizes(4, 8, 6, 10, 1), 33, 4, 4),  # k = E
        (BTTSizes(4, 16, 3, 16, 1), 60, 5, 3),
        (BTTSizes(8, 16, 8, 16, 1), 1, 4, 2),  # one token
        (BTTSizes(4, 16, 4, 16, 1), 0, 3, 2),  # no token
        (BTTSizes(10, 4, 3, 6, 4), 20, 3, 2),  # rows of z in two blocks
        (BTTSizes(4, 16, 4, 16, 1), 200, 3, 2),  # larger tiles
    ]
    low_ranks = [
        (BTTSizes(1, 70, 1, 150, 9), 90, 4, 2),
        (BTTSizes(1, 150, 1, 33, 80), 40, 3, 2),  # in several parts
        (BTTSizes(1, 16, 1, 20, 4), 33, 4, 4),
        (BTTSizes(1, 16, 1, 20, 4), 20, 4, 1),
        (BTTSizes(1, 16, 1, 20, 4), 1, 4, 3),
        (BTTSizes(1, 16, 1, 20, 4), 0, 4, 2),
    ]
    kinds = [(torch.float32, 1e-5), (torch.float16, 4e-3)]
    for number, (sizes, n, num_experts, k) in enumerate(btts):
        dtype, most = kinds[number % 2]
        found = relative_errors(*random_inputs(sizes, n, num_experts, k, dtype), num_experts)
        assert max(found) < most, (sizes, n, num_experts, k, found)
        (dtype, most), after_gelu = kinds[1 - number % 2], number % 3 > 0
        found = routed_relative_errors(sizes, n, num_experts, k, dtype, more=n != 37, after_gelu=after_gelu)
        assert max(found) < most, (sizes, n, num_experts, k, after_gelu, found)
    for sizes, n, num_experts, k in low_ranks:
        for dtype, most in kinds:
            found = relative_errors(*random_inputs(sizes, n, num_experts, k, dtype), num_experts)
            assert max(found) < most, (sizes, n, num_experts, k, found)
    check_routing()
    check_compiled(BTTSizes(4, 16, 3, 16, 1))
    check_lonely_experts()
    print("passed")


def check_routing():
    """Check plans and routers of several sizes."""
    for case in [
        (100, 4, 2, 16),
        (7, 5, 1, 4),
        (300, 4, 4, 32),
        (50, 7, 3, 8),
        (1, 3, 2, 8),
        (0, 3, 2, 8),
        (700, 16, 2, 16),
    ]:
        check_plan(*case)
    for case in [(100, 40, 8, 2), (33, 70, 5, 1), (20, 16, 4, 4), (70, 130, 20, 3)]:
        check_router(*case, torch.float16)


def check_compiled(sizes):
    """Check a layer with its router under torch.compile, and the gradients of the router alone."""
    x, A, B, _, _, dy = random_inputs(sizes, 100, 4, 2, torch.float32)
    d_in = x.shape[1]
    W, dlogits = torch.randn(4, d_in) / d_in**0.5, torch.randn(100, 4)
    whole, _, _ = routed_outputs_and_gradients(x, W, torch.zeros(4), A, B, 2, dy, dlogits)
    y, index, gate, logits = (fast := torch.compile(routed_btt_mixture, fullgraph=True, backend="aot_eager"))(
        x, W, torch.zeros(4), A, B, 2
    )
    torch.testing.assert_close(y, whole[0], rtol=0, atol=0)
    W.requires_grad_()  # first from the router's loss alone, then of a shared router
    (alone,) = torch.autograd.grad(fast(x, W, torch.zeros(4), A, B, 2)[3], W, dlogits)
    torch.testing.assert_close(alone, dlogits.t() @ x)
    logits, index, gate = route(x, W, torch.zeros(4), 2)
    (ours,) = torch.autograd.grad((logits, gate), W, (dlogits, dy[:, :2]))
    logits = x @ W.t()
    gate = logits.gather(1, index).softmax(dim=1)
    (true,) = torch.autograd.grad((logits, gate), W, (dlogits, dy[:, :2]))
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


def check_lonely_experts():
    """Check experts without a token, that equal calls give equal bits, and that torch.compile makes one graph."""
    for sizes in (BTTSizes(4, 16, 4, 16, 1), BTTSizes(1, 24, 1, 40, 10)):
        g, a, f, e, r = sizes
        x, A, B, index, gate, dy = random_inputs(sizes, 70, 4, 2, torch.float32)
        lonely = torch.tensor([[2, 0]]).expand(70, 2)  # all tokens take one set, two experts get none
        assert max(relative_errors(x, A, B, lonely, gate, dy, 4)) < 1e-5
        dA = outputs_and_gradients(x, A, B, lonely, gate, dy, 4)[2].view(g, a, 4, r * f)
        assert not dA[:, :, [1, 3]].any() and dA[:, :, [0, 2]].any()
        inputs = (x[:20], A, B, index[:20], gate[:20], dy[:20], 4)
        assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(*inputs), outputs_and_gradients(*inputs)))
        # fullgraph: no graph break
        fast = torch.compile(btt_mixture, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(x, A, B, index, gate, 4), btt_mixture(x, A, B, index, gate, 4), rtol=0, atol=0)


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
def test_kernels_compile_for_hopper_within_its_limits(monkeypatch, sizes, num_experts, k):
    compiled = {}
    for module in (moe_kernels, route_kernels):
        for name, kernel in inspect.getmembers(
            module, lambda member: isinstance(member, triton.runtime.jit.JITFunction)
        ):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Compiler(kernel, compiled))
    monkeypatch.setattr(moe_kernels, "multiprocessors", lambda tensor: 132)
    monkeypatch.setattr(
        moe_kernels, "_gate_gradient", lambda shares, plan: plan.gate[:, :2000].t().clone()
    )  # no place is computed, as nothing runs
    x, A, B, index, gate, dy = random_inputs(sizes, 2000, num_experts, k, torch.bfloat16)
    if sizes is LOW_RANK:
        outputs_and_gradients(x, A, B, index, gate, dy, num_experts)
    else:
        W, bias, dlogits = (torch.zeros(size) for size in ((num_experts, x.shape[1]), num_experts, (2000, num_experts)))
        routed_outputs_and_gradients(x, W, bias, A, B, k, dy, dlogits, after_gelu=k == 2)
    assert len(compiled) == (7 if sizes is LOW_RANK else 10)
    for name, result in compiled.items():
        assert result.metadata.shared <= 232_448 and spilled_bytes(result) <= 128, name
        assert sizes.g * sizes.a < 1024 or not name.startswith("_mixture") or "wgmma" in result.asm["ptx"], name


@on_gpu
@pytest.mark.parametrize(
    "sizes, num_experts, k, n",
    [
        (layer_sizes(1024, 1024, 1), 8, 2, 5000),
        (layer_sizes(512, 512, 1), 16, 2, 3000),
        (layer_sizes(2048, 2048, 1), 8, 1, 77),
        (layer_sizes(4096, 4096, 1), 8, 2, 1000),
        (layer_sizes(768, 768, 1), 4, 4, 1000),
        (LOW_RANK, 8, 2, 3000),
        (BTTSizes(1, 600, 1, 1000, 100), 4, 2, 77),
    ],
)
def test_errors_on_a_gpu_are_small(sizes, num_experts, k, n):
    inputs = (*random_inputs(sizes, n, num_experts, k, torch.bfloat16, "cuda"), num_experts)
    assert max(relative_errors(*inputs)) <= 5e-3
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(*inputs), outputs_and_gradients(*inputs)))
    if kernels_fit(sizes, num_experts, k) and router_fits(sizes, num_experts):
        for after_gelu in (False, True):
            found = routed_relative_errors(sizes, n, num_experts, k, torch.bfloat16, "cuda", after_gelu=after_gelu)
            assert max(found) <= 5e-3


if __name__ == "__main__":
    check_in_interpreter()
