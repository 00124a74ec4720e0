"""Tests the head and cross-entropy in chunks, and the Triton kernel in its interpreter, against torch on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from conftest import run_interpreted
from einsum_linear import make_linear
from kernels import loss
from kernels.loss import cross_entropy, linear_cross_entropy


def random_inputs(structure="dense", n=37, d=24, vocab=96, dtype=torch.float64, **options):
    torch.manual_seed(0)
    head = make_linear(d, vocab, structure, **options).to(dtype)
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (n,))
    targets[[3, 20, 36]] = -1
    return head, x, targets


def gradients(value, head, x):
    return torch.autograd.grad(value, (x, *head.parameters()))


@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
@pytest.mark.parametrize("structure, options", [("dense", {"bias": True}), ("btt", {"rank": 2})])
def test_the_chunked_loss_equals_cross_entropy_of_whole_logits(structure, options, chunk):
    head, x, targets = random_inputs(structure, **options)
    want = F.cross_entropy(head(x), targets, ignore_index=-1)
    got = linear_cross_entropy(head, x, targets, chunk)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(gradients(3 * got, head, x), gradients(3 * want, head, x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_the_chunked_loss_equals_torchs_linear_cross_entropy():
    head, x, targets = random_inputs(dtype=torch.float32)
    want = F.linear_cross_entropy(x, head.weight, targets, ignore_index=-1)
    got = linear_cross_entropy(head, x, targets, 8)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(gradients(got, head, x), gradients(want, head, x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_chunked_loss_works_without_gradients_and_with_a_frozen_head():
    head, x, targets = random_inputs()
    want = F.cross_entropy(head(x), targets, ignore_index=-1).item()
    with torch.no_grad():
        assert linear_cross_entropy(head, x, targets, 8).item() == pytest.approx(want, rel=1e-6)
    head.weight.requires_grad_(False)
    value = linear_cross_entropy(head, x, targets, 8)
    (dx,) = torch.autograd.grad(value, x)
    (want,) = torch.autograd.grad(F.cross_entropy(head(x), targets, ignore_index=-1), x)
    torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_evaluation_computes_no_gradient(context, structure, monkeypatch):
    """The head's parameters require gradients, but no graph is made and nothing is differentiated."""
    head, x, targets = random_inputs(structure)
    want = F.cross_entropy(head(x), targets, ignore_index=-1).item()
    made = []
    head.register_forward_hook(lambda module, inputs, logits: made.append(logits.grad_fn))
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: pytest.fail("a gradient is computed"))
    with context():
        got = linear_cross_entropy(head, x, targets, 8)
    assert got.item() == pytest.approx(want, rel=1e-6) and got.grad_fn is None
    assert made == [None] * 5


def test_float16_gradients_of_many_tokens_do_not_vanish():
    """The mean over 32,768 tokens makes gradients as small as 1e-5, below float16's normal numbers."""
    torch.manual_seed(0)
    head, x = make_linear(8, 16, "dense"), torch.randn(2**15, 8, requires_grad=True)
    targets = torch.randint(16, (2**15,))
    with torch.autocast("cpu", torch.float16):
        got = gradients(linear_cross_entropy(head, x, targets, 2**13), head, x)
    want = gradients(F.cross_entropy(head(x), targets), head, x)
    for a, b in zip(got, want):
        assert (a - b).norm() < 5e-3 * b.norm()


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch):
    head, x, targets = random_inputs(n=64)
    seen = []
    monkeypatch.setattr(
        loss, "cross_entropy", lambda logits, *a, **k: (seen.append(len(logits)), cross_entropy(logits, *a, **k))[1]
    )
    linear_cross_entropy(head, x, targets, 16).backward()
    assert seen == [16] * 4


def test_triton_kernel_equals_torch_on_a_row_of_several_blocks():
    """The vocabularies are smaller than, equal to and larger than a block, and no multiple of one."""
    done = run_interpreted("tests/kernels/test_loss.py")
    assert done.returncode == 0 and done.stdout.strip() == "12 cases", done.stdout + done.stderr


def check_kernel():
    """What the test above runs."""
    cases = 0
    for vocab in (96, 8192, 8197, 20000):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.manual_seed(vocab)
            logits = (3 * torch.randn(5, vocab)).to(dtype)
            logits[1] += 50  # exp would overflow if the row's maximum were not subtracted
            targets = torch.tensor([0, vocab - 1, -1, 17, vocab // 2])
            exact = logits.double().requires_grad_()
            want = F.cross_entropy(exact, targets, ignore_index=-1, reduction="sum")
            want.backward()
            torch.testing.assert_close(cross_entropy(logits, targets, gradient=False)[0], want.float())
            got, dlogits = cross_entropy(logits, targets, gradient=True)
            torch.testing.assert_close(got, want.float())
            assert dlogits.data_ptr() == logits.data_ptr() and dlogits.dtype == dtype
            torch.testing.assert_close(
                dlogits.double(), exact.grad, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2
            )
            cases += 1
    print(cases, "cases")


if __name__ == "__main__":
    check_kernel()
