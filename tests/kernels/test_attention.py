"""Tests the attention of short contexts in Triton's interpreter and on a GPU, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from conftest import run_interpreted
from hopper import on_gpu
from kernels import attention
from kernels.attention import fits_attention, short_attention

pytest.importorskip("triton")


def random_inputs(B, T, heads, H, dtype, device="cpu", joined=False, seed=0):
    """Random q, k, v, dy (B, T, heads, H) and the norms' weights (H,). joined: q, k and v are slices of one tensor."""
    draw = torch.Generator(device).manual_seed(seed)
    q, k, v, dy = torch.randn(4, B, T, heads, H, generator=draw, device=device).to(dtype).unbind()
    if joined:
        q, k, v = (
            part.view(B, T, heads, H) for part in torch.stack((q, k, v), dim=2).flatten(2).split(heads * H, dim=-1)
        )
    q_weight, k_weight = 1 + 0.3 * torch.randn(2, H, generator=draw, device=device)
    return q, k, v, dy, q_weight, k_weight


def by_torch(q, k, v, q_weight, k_weight, scale, causal):
    """The same as model.Attention computes it in plain torch."""
    if q_weight is not None:
        q, k = (F.layer_norm(x.to(w.dtype), x.shape[-1:], w).to(v.dtype) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def outputs_and_gradients(function, q, k, v, dy, q_weight, k_weight, causal, norms):
    """y and the gradients of q, k, v and, with norms, of their weights."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *((q_weight, k_weight) if norms else ()))]
    y = function(*leaves, *([] if norms else [None, None]), 8 / q.shape[-1], causal)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def relative_errors(*shape, dtype, causal=True, norms=True, device="cpu", **how):
    inputs = random_inputs(*shape, dtype, device, **how)
    got, want = (
        outputs_and_gradients(short_attention, *inputs, causal, norms),
        outputs_and_gradients(by_torch, *(x.double() for x in inputs), causal, norms),
    )
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]


def test_only_layer_norms_without_bias_are_fused(monkeypatch):
    """Another norm, such as an RMSNorm, must not silently be computed as a LayerNorm."""
    monkeypatch.setattr(attention, "takes_kernels", lambda x: True)
    q, norms = torch.empty(2, 16, 3, 32), torch.nn
    layer_norm = norms.LayerNorm(32, bias=False)
    assert fits_attention(q, layer_norm, layer_norm) and fits_attention(q, norms.Identity(), norms.Identity())
    for other in (norms.RMSNorm(32), norms.LayerNorm(32), norms.LayerNorm(32, eps=1e-6, bias=False), norms.Identity()):
        assert not fits_attention(q, other, layer_norm) and not fits_attention(q, layer_norm, other)
    assert not fits_attention(torch.empty(2, 129, 3, 32), layer_norm, layer_norm)
    wide = norms.LayerNorm(65, bias=False)
    assert not fits_attention(torch.empty(2, 16, 3, 65), wide, wide)


def test_kernels_are_right_in_the_interpreter():
    done = run_interpreted("tests/kernels/test_attention.py")
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr


def check_in_interpreter():
    """What the test above runs."""
    cases = [(2, 32, 2, 16), (1, 70, 1, 40), (3, 1, 2, 8), (1, 33, 3, 64), (2, 17, 1, 24)]
    for number, shape in enumerate(cases):
        for causal in (True, False):
            norms, joined = number != 1 or causal, number % 2 == 0
            found = relative_errors(*shape, dtype=torch.float32, causal=causal, norms=norms, joined=joined)
            assert max(found) < 1e-5, (shape, causal, norms, found)
    assert max(relative_errors(2, 40, 2, 32, dtype=torch.float16)) < 3e-3
    inputs = random_inputs(2, 20, 2, 16, torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(outputs_and_gradients(short_attention, *inputs, True, True) for _ in range(2)))
    )
    compiled = torch.compile(short_attention, fullgraph=True, backend="aot_eager")
    pairs = zip(
        outputs_and_gradients(compiled, *inputs, True, True),
        outputs_and_gradients(short_attention, *inputs, True, True),
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    q, k, v, _, *weights = (x.requires_grad_() for x in inputs)
    torch.library.opcheck(
        torch.ops.nanoeinsum.short_attention.default, (q, k, v, *weights, 0.5, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    print("passed")


@on_gpu
@pytest.mark.parametrize("shape", [(8, 128, 16, 64), (4, 64, 4, 64), (3, 100, 5, 48), (2, 65, 3, 64), (5, 16, 2, 16)])
def test_errors_on_a_gpu_are_small(shape):
    for causal in (True, False):
        for norms in (True, False):
            found = relative_errors(
                *shape, dtype=torch.bfloat16, causal=causal, norms=norms, device="cuda", joined=True
            )
            inputs = random_inputs(*shape, torch.bfloat16, "cuda", joined=True)
            theirs = zip(
                outputs_and_gradients(by_torch, *inputs, causal, norms),
                outputs_and_gradients(by_torch, *(x.double() for x in inputs), causal, norms),
            )
            most = max(((a.double() - b).norm() / b.norm()).item() for a, b in theirs)
            assert max(found) <= max(5e-3, 1.2 * most), (causal, norms, found, most)
    again = [outputs_and_gradients(short_attention, *inputs, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again))


if __name__ == "__main__":
    check_in_interpreter()
