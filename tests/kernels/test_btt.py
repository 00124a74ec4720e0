"""Tests the BTT kernels in Triton's interpreter and on a GPU, against float64, and compiles them for Hopper."""

import inspect
import re

import pytest
import torch

from conftest import run_interpreted
from hopper import Compiler, layer_sizes, on_gpu, spilled_bytes
from kernels import btt as btt_kernels
from kernels import common
from kernels.btt import BTTSizes, btt, btt_joined, btt_matrix, fastest_method, fused_blocks, fuses, gelu, joins

triton = pytest.importorskip("triton")


def random_inputs(sizes, shape, dtype, device="cpu", seed=0):
    """Random x of shape (*shape, g·a), cores that make y of unit size, and a gradient of y."""
    g, a, f, e, r = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    A, B = normal(g, a, r * f, std=a**-0.5), normal(f, g * r, e, std=(g * r) ** -0.5)
    return normal(*shape, g * a), A, B, normal(*shape, f * e)


def outputs_and_gradients(method, x, A, B, dy, after_gelu=False):
    """y, dx, dA, dB"""
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    y = btt(x, A, B, method, gelu if after_gelu else None)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def exact_outputs_and_gradients(x, A, B, dy, after_gelu=False):
    """The same in float64, by the whole matrix and torch's GELU."""
    x, A, B = (tensor.double().requires_grad_() for tensor in (x, A, B))
    y = (torch.nn.functional.gelu(x, approximate="tanh") if after_gelu else x) @ btt_matrix(A, B).T
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy.double())]


def relative_errors(method, *inputs, after_gelu=False):
    pairs = zip(outputs_and_gradients(method, *inputs, after_gelu), exact_outputs_and_gradients(*inputs, after_gelu))
    return [(a.double() - b).norm().item() / (b.norm().item() or 1) for a, b in pairs]


# ---------------------------------------------------------------------------------------
# Plain torch


def test_btt_matrix_equals_the_definition_as_two_einsums():
    sizes = g, a, f, e, r = BTTSizes(3, 4, 5, 2, 2)
    x, A, B, _ = random_inputs(sizes, (7,), torch.float64)
    z = torch.einsum("nga,garf->ngrf", x.view(7, g, a), A.view(g, a, r, f))
    y = torch.einsum("ngrf,fgre->nfe", z, B.view(f, g, r, e)).reshape(7, f * e)
    torch.testing.assert_close(x @ btt_matrix(A, B).T, y)


@pytest.mark.parametrize("after_gelu", [False, True])
@pytest.mark.parametrize("method", ["torch", "dense", None])
def test_plain_torch_methods_equal_the_matrix_in_float64(method, after_gelu):
    assert (
        max(
            relative_errors(
                method, *random_inputs(BTTSizes(3, 4, 5, 2, 2), (2, 7), torch.float64), after_gelu=after_gelu
            )
        )
        < 1e-14
    )


def test_compiled_gelu_equals_the_plain_one():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(btt_kernels.gelu, backend="eager")
    for function in (lambda y: y, lambda y: torch.autograd.grad(y.sum(), x)[0]):
        torch.testing.assert_close(function(compiled(x)), function(btt_kernels.gelu(x)), rtol=1e-12, atol=1e-12)
    assert "sigmoid" in str(
        torch._dynamo.explain(btt_kernels.gelu)(x).graphs[0].graph
    )  # the compiled form is the other formula


def test_cores_and_inputs_that_do_not_fit_are_refused():
    x, A, B, _ = random_inputs(BTTSizes(3, 4, 5, 2, 2), (7,), torch.float32)
    with pytest.raises(ValueError, match="do not fit together"):
        btt(x, A, B[:, 1:])
    with pytest.raises(ValueError, match="do not fit together"):
        btt(x[:, 1:], A, B)


def test_the_fastest_method_follows_from_the_sizes():
    """Small cores stay on a multiprocessor, large ones are streamed, and at ranks that save nothing the matrix is used."""
    assert fastest_method(32_768, layer_sizes(1024, 1024, 1)) == "fused"
    assert (
        fastest_method(32_768, layer_sizes(4096, 4096, 1))
        == fastest_method(32_768, layer_sizes(4096, 4096, 4))
        == "staged"
    )
    assert (
        fastest_method(32_768, BTTSizes(1, 512, 1, 512, 22))
        == fastest_method(32_768, BTTSizes(4, 1024, 4, 256, 1))
        == "torch"
    )
    assert (
        fastest_method(32_768, layer_sizes(1024, 1024, 16))
        == fastest_method(32_768, layer_sizes(1024, 1024, 4))
        == "dense"
    )
    assert fused_blocks(layer_sizes(4096, 4096, 1)) is None


@pytest.mark.parametrize("memory, wanted", [(232_448, True), (166_912, False), (101_376, False)])
def test_a_gpu_without_room_for_the_blocks_takes_plain_torch(monkeypatch, memory, wanted):
    """An A100 has 163 KiB of shared memory per block, an RTX 4090 99 KiB: the kernels would not start there."""
    from types import SimpleNamespace

    gpu = SimpleNamespace(major=8, shared_memory_per_block_optin=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert btt_kernels.runs_triton(tensor) is wanted
    old = SimpleNamespace(major=9)  # a version of torch that does not report it
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    assert btt_kernels.runs_triton(tensor) is True


# ---------------------------------------------------------------------------------------
# The kernels in the interpreter


def test_kernels_are_right_in_the_interpreter():
    done = run_interpreted("tests/kernels/test_btt.py")
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout + done.stderr


def equal_but_for_order(a, b):
    """Whether float16 results can be the same sums in another order: only a few are rounded differently."""
    return a.shape == b.shape and (a - b).norm() < 2e-4 * b.norm()


def check_in_interpreter():
    """What the test above runs. Memory that no kernel writes holds NaN here."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    sizes = st.builds(BTTSizes, *(st.integers(1, most) for most in (20, 20, 20, 20, 5)))
    methods = {"fused": 0, "staged": 0, "dense": 0}

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(sizes, st.integers(0, 70), st.sampled_from([torch.float32, torch.float16]), st.booleans())
    def odd_sizes(sizes, n, dtype, after_gelu):
        inputs = random_inputs(sizes, (n,), dtype)
        few = (
            sizes.g * sizes.f * sizes.r <= 60
        )  # the dense kernel has one program per block, and the interpreter is slow
        for method, takes in {"fused": fused_blocks(sizes) is not None, "staged": True, "dense": few}.items():
            if takes:
                methods[method] += 1
                found = max(relative_errors(method, *inputs, after_gelu=after_gelu))
                assert found < (1e-5 if dtype == torch.float32 else 4e-3), (method, sizes, n, after_gelu)

    odd_sizes()
    assert (
        max(relative_errors("staged", *random_inputs(BTTSizes(68, 2, 3, 2, 5), (70,), torch.float32))) < 1e-5
    )  # 340 rows of z
    assert min(methods.values()) >= 10, methods  # all methods were tested

    for method, sizes in (("fused", BTTSizes(16, 16, 16, 12, 1)), ("staged", BTTSizes(16, 16, 16, 12, 3))):
        x, A, B, dy = random_inputs(sizes, (5, 9), torch.float32)
        # x with gaps between its rows, transposed, and with a third axis
        wide = torch.randn(5, 9, 300)
        wide[..., :256] = x
        across = x.flatten(0, 1).t().contiguous().t()
        assert max(relative_errors(method, wide[..., :256], A, B, dy)) < 1e-5
        assert max(relative_errors(method, across, A, B, dy.flatten(0, 1))) < 1e-5
        assert all(
            torch.equal(a, b)
            for a, b in zip(outputs_and_gradients(method, x, A, B, dy), outputs_and_gradients(method, x, A, B, dy))
        )
        op = {"fused": torch.ops.nanoeinsum.btt_fused, "staged": torch.ops.nanoeinsum.btt_staged}[method]
        inputs = [tensor.detach().requires_grad_() for tensor in (x.flatten(0, 1), A, B)]
        torch.library.opcheck(
            op.default, (*inputs, True), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
        x, A, B, dy = random_inputs(sizes, (5, 9), torch.float32)  # a function that no kernel fuses
        assert torch.equal(btt(x, A, B, method, torch.relu), btt(torch.relu(x), A, B, method))

        # under autocast and torch.compile, without a graph break
        fast = torch.compile(btt, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.float16):
            y = fast(*inputs, method, gelu)
        assert y.dtype == torch.float16
        got = torch.autograd.grad(y, inputs, dy.flatten(0, 1).half())
        want = outputs_and_gradients(method, x.flatten(0, 1).half(), A.half(), B.half(), dy.flatten(0, 1).half(), True)
        assert [grad.dtype for grad in got] == [torch.float32] * 3
        assert all(torch.equal(a.half(), b) for a, b in zip(got, want[1:]))

    # q, k and v as one BTT equal three BTTs; for products of other shapes numpy may add in another order
    sizes = BTTSizes(6, 12, 5, 10, 2)
    x, *_, dy = random_inputs(sizes, (40,), torch.float16)
    leaves = [
        tensor.requires_grad_()
        for seed in range(3)
        for tensor in random_inputs(sizes, (1,), torch.float16, seed=seed)[1:3]
    ]
    x.requires_grad_()
    cores = list(zip(leaves[::2], leaves[1::2]))
    btt_kernels.fastest_method = lambda n, sizes: "staged"
    one_by_one, joined = [btt(x, A, B) for A, B in cores], btt_joined(x, cores)
    assert all(equal_but_for_order(a, b) for a, b in zip(joined, one_by_one))
    dys = [dy, 2 * dy, dy.flip(0)]
    want, *same = torch.autograd.grad(one_by_one, [x, *leaves], dys)
    got, *others = torch.autograd.grad(joined, [x, *leaves], dys)
    assert all(equal_but_for_order(a, b) for a, b in zip(others, same))
    assert (got - want).norm() < 2e-3 * want.norm()  # summed in float32, not by rounding twice
    assert joins(x, [sizes] * 3) and not joins(x, [sizes, None]) and not joins(x, [sizes, sizes._replace(r=1)])
    btt_kernels.fastest_method = lambda n, sizes: "fused" if sizes.f == 5 else "staged"
    assert not joins(x, [sizes] * 3)
    print("passed")


# ---------------------------------------------------------------------------------------
# The kernels compiled for Hopper, which needs no GPU


@pytest.mark.parametrize(
    "d_in, d_out, rank, after_gelu",
    [
        (1024, 1024, 1, False),
        (1024, 1024, 1, True),
        (768, 768, 1, True),
        (512, 512, 2, False),
        (768, 3072, 1, True),
        (4096, 4096, 4, False),
        (4096, 4096, 4, True),
        (1024, 1024, 4, True),
        (8192, 2048, 4, False),
    ],
)
def test_kernels_compile_for_hopper_within_its_limits(monkeypatch, d_in, d_out, rank, after_gelu):
    """They fit into shared memory and spill few registers; the kernels of large layers use wgmma."""
    sizes = layer_sizes(d_in, d_out, rank)
    monkeypatch.setattr(btt_kernels, "gluon_btt", None)
    method = fastest_method(4096, sizes)
    for name, result in compile_method(monkeypatch, method, sizes, after_gelu).items():
        assert result.metadata.shared <= btt_kernels.SHARED_MEMORY, name
        assert spilled_bytes(result) <= 128, name
        assert not name.startswith("_staged_") or d_in < 4096 or "wgmma" in result.asm["ptx"], name


@pytest.mark.parametrize("sizes", [(1, 256, 8, 256, 4), (2, 128, 16, 256, 16)])
def test_the_widest_blocks_that_the_staged_kernels_take_fit_on_hopper(monkeypatch, sizes):
    sizes = BTTSizes(*sizes)
    assert btt_kernels.staged_fits(sizes) and not btt_kernels.staged_fits(sizes._replace(a=2 * sizes.a))
    for name, result in compile_method(monkeypatch, "staged", sizes, False).items():
        assert result.metadata.shared <= btt_kernels.SHARED_MEMORY, name


def compile_method(monkeypatch, method, sizes, after_gelu):
    """Compile all kernels of a method, forward and backward -> {name: compiled kernel}."""
    compiled = {}
    for name, kernel in inspect.getmembers(
        btt_kernels, lambda member: isinstance(member, triton.runtime.jit.JITFunction)
    ):
        if re.match("_(fused|staged|dense)_", name):
            monkeypatch.setattr(btt_kernels, name, Compiler(kernel, compiled))
    monkeypatch.setattr(common, "_sum_parts_kernel", Compiler(common._sum_parts_kernel, compiled))
    monkeypatch.setattr(btt_kernels, "multiprocessors", lambda tensor: 132)
    monkeypatch.setattr(btt_kernels, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(btt_kernels, "gluon_btt", None)  # these are compiled in test_gluon_btt.py
    outputs_and_gradients(method, *random_inputs(sizes, (4096,), torch.bfloat16), after_gelu)
    kernels = {name for name in vars(btt_kernels) if isinstance(getattr(btt_kernels, name), Compiler)}
    sums = set() if method == "dense" else {"_sum_parts_kernel"}
    assert set(compiled) == {name for name in kernels if name.startswith(f"_{method}_")} | sums
    return compiled


# ---------------------------------------------------------------------------------------
# On a GPU


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 77, 5000])
@pytest.mark.parametrize(
    "d_in, d_out, rank",
    [
        (1024, 1024, 1),
        (2048, 2048, 1),
        (1024, 4096, 1),
        (4096, 1024, 1),
        (1024, 1024, 2),
        (768, 768, 1),
        (512, 512, 2),
        (768, 3072, 3),
        (4096, 4096, 4),
        (8192, 2048, 4),
        (600, 480, 5),
    ],
)
def test_errors_on_a_gpu_are_small(d_in, d_out, rank, n, dtype):
    sizes = layer_sizes(d_in, d_out, rank)
    inputs = random_inputs(sizes, (n,), dtype, "cuda")
    plain = relative_errors("torch", *inputs)
    for method in ("fused", "staged", "dense"):
        if method == "fused" and not fuses(sizes):
            continue
        found = relative_errors(method, *inputs)
        assert max(found) <= 5e-3 and max(relative_errors(method, *inputs, after_gelu=True)) <= 6e-3
        assert all(ours <= 1.5 * theirs + 1e-4 for ours, theirs in zip(found, plain)), (method, found, plain)
        assert all(
            torch.equal(a, b)
            for a, b in zip(outputs_and_gradients(method, *inputs), outputs_and_gradients(method, *inputs))
        )


@on_gpu
@pytest.mark.parametrize("method", ["fused", "staged"])
def test_tensors_of_more_than_2_to_the_31_elements_work(method):
    """The rows at the far end of x and y need offsets of more than 32 bits."""
    sizes = BTTSizes(16, 16, 16, 16, 1)
    n = 2**31 // 256 + 1000
    x, A, B, _ = random_inputs(sizes, (64,), torch.bfloat16, "cuda")
    far = torch.zeros(n, 256, dtype=torch.bfloat16, device="cuda")
    far[-64:] = x
    y = btt(far, A, B, method)
    torch.testing.assert_close(y[-64:], btt(x, A, B, method), rtol=0, atol=0)
    assert not y[:-64].any()


if __name__ == "__main__":
    check_in_interpreter()
