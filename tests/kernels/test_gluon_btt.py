"""Tests the Gluon kernels of BTT layers against float64: an emulator runs their PTX for Hopper on the CPU."""

import re

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("kernels.gluon_btt")

from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from hopper import Compiler, layer_sizes, spilled_bytes
from kernels import btt as btt_kernels
from kernels import common
from kernels.btt import BTTSizes, btt_method, fastest_method, fuses, joins
from ptx_emulator import FORMATS, Memory, run_grid

NAN = 0xFFFF  # is NaN in both 16-bit formats


def compile_kernel(kernel, constants, dtype="bf16", arch=90):
    """Compile a kernel without a GPU, for pointers and strides that are multiples of 16."""
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    integers = ("N", "x_stride", "dy_stride", "u_stride")
    types = {name: "i32" if name in integers else "*fp32" if name == "sums" else f"*{dtype}" for name in names}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name != "N"}
    source = GluonASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": constants["W"]})


class Example:
    """Random inputs for a layer of sizes (g, a, f, e, r), and its outputs and gradients in float64."""

    def __init__(self, sizes, n, dtype="bf16", after_gelu=False):
        self.sizes, self.n = (g, a, f, e, r), _ = sizes, n
        self.dtype = dtype
        self.to_bits, self.to_float = FORMATS[dtype.replace("fp16", "f16")]
        generator = np.random.default_rng(0)
        shapes = {"x": (n, g * a), "dy": (n, f * e), "A": (g, a, r * f), "B": (f, g * r, e)}
        std = {"x": 1, "dy": 1, "A": a**-0.5, "B": (g * r) ** -0.5}
        self.bits = {k: self.to_bits(std[k] * generator.standard_normal(s, np.float32)) for k, s in shapes.items()}
        x, dy, A, B = (self.to_float(self.bits[name]).astype(float) for name in shapes)
        x, dy, A, B = x.reshape(n, g, a), dy.reshape(n, f, e), A.reshape(g, a, r, f), B.reshape(f, g, r, e)
        slope = 1
        if after_gelu:
            c, u = np.sqrt(2 / np.pi), x
            t = np.tanh(c * (u + 0.044715 * u**3))
            x, slope = u / 2 * (1 + t), (1 + t) / 2 + u / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * u * u)
        z = np.einsum("nga,garf->ngrf", x, A)
        dz = np.einsum("nfe,fgre->ngrf", dy, B)
        self.y = np.einsum("ngrf,fgre->nfe", z, B).reshape(n, f * e)
        self.dx = (np.einsum("ngrf,garf->nga", dz, A) * slope).reshape(n, g * a)
        self.dA = np.einsum("nga,ngrf->garf", x, dz).reshape(shapes["A"])
        self.dB = np.einsum("ngrf,nfe->fgre", z, dy).reshape(shapes["B"])

    def memory(self, gap=16):
        """-> memory that holds the inputs, with gaps of NaNs between the rows of x and dy, and {name: address}"""
        memory, at = Memory(), {}
        for name, bits in self.bits.items():
            if name in ("x", "dy"):
                bits = np.pad(bits, ((0, 0), (0, gap)), constant_values=NAN)
            at[name] = memory.put(bits)
        return memory, at

    def product(self, backward=False, gap=16, change=lambda ptx: ptx, **shape):
        """Run the product kernel -> y, or dx if backward, and the blocks of the emulator."""
        (g, a, f, e, r), (memory, at) = self.sizes, self.memory(gap)
        if backward:
            g, a, f, e = f, e, g, a
        constants = dict(
            G=g,
            AL=a,
            F=f,
            EL=e,
            R=r,
            BM=16,
            BACKWARD=backward,
            **{"GELU": False, "SLOPE": False, "CHUNKS": 1, "STAGES": 0, **shape},
        )
        ptx = change(compile_kernel(kernels.product_kernel, constants, self.dtype).asm["ptx"])
        to = memory.put(np.full((self.n + 16, f * e), NAN, np.uint16))
        inputs = [at[name] for name in (("dy", "B", "A") if backward else ("x", "A", "B"))]
        params = [*inputs, to, at["x"], self.n, g * a + gap, f * e + gap, 0, 0]
        blocks = run_grid(ptx, memory, params, constants["W"], 2 * -(-f // shape["FB"]))
        y = self.to_float(memory.get(to, np.uint16, (self.n + 16, f * e)))
        assert np.isnan(y[self.n :]).all()  # nothing is written after the last token
        return y[: self.n], blocks

    def gradients(self, gap=16, **shape):
        """Run the gradients kernel -> [dx, dA, dB] or [dA, dB], and the blocks of the emulator."""
        (g, a, f, e, r), (memory, at) = self.sizes, self.memory(gap)
        constants = dict(G=g, AL=a, F=f, EL=e, R=r, BM=16, **{"GELU": False, "B_SHARED": False, "STAGES": 3, **shape})
        ptx = compile_kernel(kernels.gradients_kernel, constants, self.dtype).asm["ptx"]
        dx_at = memory.put(np.full((self.n + 16, g * a), NAN, np.uint16))
        parts, size_A, size_B = 2, self.dA.size, self.dB.size
        sums_at = memory.put(np.full((parts, size_A + size_B), np.nan, np.float32))
        inputs = [at[name] for name in ("x", "dy", "A", "B")]
        count = parts * -(-g // shape["GB"]) * -(-f // shape["FB"])
        params = [*inputs, dx_at, sums_at, self.n, g * a + gap, f * e + gap, 0, 0]
        blocks = run_grid(ptx, memory, params, constants["W"], count)
        sums = memory.get(sums_at, np.float32, (parts, size_A + size_B)).sum(0)
        dx = self.to_float(memory.get(dx_at, np.uint16, (self.n + 16, g * a)))
        assert np.isnan(dx[self.n if shape["DX"] else 0 :]).all()
        cores = [sums[:size_A].reshape(self.dA.shape), sums[size_A:].reshape(self.dB.shape)]
        return ([dx[: self.n]] if shape["DX"] else []) + cores, blocks


def check_results(results, expected, blocks, most=4e-3):
    """Small errors, no races and no bank conflicts."""
    for result, true in zip(results, expected, strict=True):
        assert np.linalg.norm(result - true) < most * np.linalg.norm(true)
    assert not any(block.races for block in blocks)
    for kind, factor in blocks[0].conflicts().items():
        assert factor == 1, f"bank conflicts of {kind}: {factor}"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "sizes, n, shape",
    [
        ((32, 32, 32, 32, 1), 40, dict(FB=32, SECOND_SHARED=True, W=16)),
        ((32, 32, 16, 32, 1), 90, dict(FB=16, SECOND_SHARED=False, STAGES=3, W=16)),
        ((32, 24, 24, 32, 1), 20, dict(FB=16, SECOND_SHARED=True, W=16)),
        ((24, 48, 40, 24, 2), 33, dict(FB=8, CHUNKS=2, SECOND_SHARED=False, STAGES=3, W=8)),
        ((32, 32, 32, 32, 1), 1, dict(FB=16, SECOND_SHARED=False, W=8)),
        ((16, 64, 16, 64, 2), 17, dict(FB=8, CHUNKS=2, SECOND_SHARED=True, STAGES=4, W=8)),
    ],
)
def test_the_product_kernel_equals_float64(sizes, n, shape, backward):
    example = Example(sizes, n)
    result, blocks = example.product(backward, **shape)
    check_results([result], [example.dx if backward else example.y], blocks)


def test_the_product_kernel_applies_a_gelu_first():
    example = Example((16, 64, 16, 32, 1), 33, after_gelu=True)
    result, blocks = example.product(FB=16, SECOND_SHARED=True, GELU=True, W=8)
    check_results([result], [example.y], blocks)


def test_the_gradient_of_x_includes_the_slope_of_the_gelu():
    example = Example((16, 32, 16, 64, 1), 33, after_gelu=True)
    result, blocks = example.product(backward=True, FB=16, SECOND_SHARED=False, SLOPE=True, W=8)
    check_results([result], [example.dx], blocks)


@pytest.mark.parametrize(
    "sizes, n, shape",
    [
        ((16, 32, 32, 32, 1), 40, dict(GB=16, FB=32, DX=True, W=16)),
        ((16, 64, 16, 32, 1), 21, dict(GB=8, FB=16, DX=True, GELU=True, STAGES=2, W=8)),
        ((32, 24, 24, 32, 1), 20, dict(GB=16, FB=32, DX=True, W=8)),
        ((24, 48, 40, 24, 2), 33, dict(GB=8, FB=16, DX=False, W=8)),
        ((16, 32, 32, 64, 2), 56, dict(GB=8, FB=16, DX=False, B_SHARED=True, W=8)),
    ],
)
def test_the_gradients_kernel_equals_float64(sizes, n, shape):
    example = Example(sizes, n, after_gelu=shape.get("GELU", False))
    results, blocks = example.gradients(**shape)
    check_results(results, [example.dx, example.dA, example.dB][0 if shape["DX"] else 1 :], blocks)


def test_the_kernels_work_in_float16():
    example = Example((16, 32, 16, 32, 1), 20, "fp16")
    result, blocks = example.product(FB=16, SECOND_SHARED=True, W=8)
    check_results([result], [example.y], blocks, most=5e-4)
    results, blocks = example.gradients(GB=16, FB=16, DX=True, W=8)
    check_results(results, [example.dx, example.dA, example.dB], blocks, most=5e-4)


def test_the_emulator_detects_a_missing_barrier():
    """A tile needs two barriers: z is written before it is read, and read before the next tile overwrites it."""
    example = Example((16, 32, 16, 32, 1), 40)
    races = []
    for removed in range(20):
        count = iter(range(100))

        def change(ptx, removed=removed, count=count):
            return re.sub(r"bar\.sync", lambda found: "// " if next(count) == removed else found[0], ptx)

        _, blocks = example.product(FB=16, SECOND_SHARED=True, W=8, change=change)
        if next(count) <= removed:
            break  # all barriers have been tried
        races.append(any(block.races for block in blocks))
    assert sum(races) >= 2, races


# ---------------------------------------------------------------------------------------
# The launches that layers take


@pytest.mark.parametrize(
    "d_in, d_out, after_gelu", [(1024, 1024, False), (1024, 4096, True), (4096, 1024, True), (2048, 2048, False)]
)
def test_launches_fit_on_hopper(monkeypatch, d_in, d_out, after_gelu):
    """They fit into shared memory and spill few registers; all results have the right shapes."""
    sizes = layer_sizes(d_in, d_out, 1)
    g, a, f, e, r = sizes
    assert fastest_method(32_768, sizes) == ("fused" if kernels.timed(sizes) else "staged")
    compiled = {}
    for module, name in ((kernels, "product_kernel"), (kernels, "gradients_kernel"), (common, "_sum_parts_kernel")):
        monkeypatch.setattr(module, name, Compiler(getattr(module, name), compiled))
    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 132)
    x, dy = torch.zeros(100, d_in, dtype=torch.bfloat16), torch.zeros(100, d_out, dtype=torch.bfloat16)
    A, B = x.new_zeros(g, a, r * f), x.new_zeros(f, g * r, e)
    results = {"y": kernels.forward(x, A, B, sizes, after_gelu)}
    made = dict(compiled)
    results |= dict(zip(("dx", "dA", "dB"), kernels.backward(x, dy, A, B, sizes, after_gelu)))
    for name, like in {"y": dy, "dx": x, "dA": A, "dB": B}.items():
        assert results[name].shape == like.shape and results[name].dtype == like.dtype
    for name, result in [*made.items(), *compiled.items()]:
        assert result.metadata.shared <= common.SHARED_MEMORY, name
        assert spilled_bytes(result) <= 256, name


def test_layers_whose_core_slices_fit_on_a_multiprocessor_take_gluon_kernels():
    """Block sizes must be multiples of 8. Sizes that were not timed fit too, but take these kernels only on request."""
    assert all(kernels.timed(layer_sizes(*shape, 1)) for shape in ((1024, 1024), (1024, 4096), (4096, 1024)))
    for shape in ((2048, 2048, 1), (2048, 2048, 2), (3072, 768, 1)):
        assert fuses(layer_sizes(*shape)) and fastest_method(32_768, layer_sizes(*shape)) == "staged"
    assert fastest_method(32_768, layer_sizes(4096, 4096, 1)) == "staged"  # fused it would read x and dy four times
    assert kernels.launches(BTTSizes(64, 128, 64, 128, 1)) is None
    assert kernels.launches(BTTSizes(32, 20, 24, 32, 1)) is None  # copies of 16 bytes do not fit rows of 40


def test_layers_join_where_reading_x_once_saves_more_than_keeping_z_on_chip(monkeypatch):
    """q, k and v of width 2048 become one staged BTT, of width 1024 three fused ones, also when torch.compile traces."""
    monkeypatch.setattr(btt_kernels, "takes_kernels", lambda x: True)
    wide, narrow = (torch.empty(32_768, width, device="meta") for width in (2048, 1024))

    def choices(x, sizes):
        return x.new_empty(1 + joins(x, [sizes] * 3), 1 + (btt_method(x, sizes) == "fused"))

    traced = torch.compile(choices, backend="eager", fullgraph=True)
    for run in (choices, traced):
        assert run(wide, layer_sizes(2048, 2048, 1)).shape == (2, 1)
        assert run(narrow, layer_sizes(1024, 1024, 1)).shape == (1, 2)


@pytest.mark.parametrize("arch", [80, 100])
def test_kernels_compile_for_other_gpus(arch):
    product = dict(G=32, AL=32, F=32, EL=32, R=1, BM=16, FB=16, CHUNKS=1, SECOND_SHARED=False, STAGES=0, W=16)
    compile_kernel(kernels.product_kernel, {**product, "BACKWARD": False, "GELU": True, "SLOPE": False}, arch=arch)
    gradients = dict(G=32, AL=32, F=32, EL=32, R=1, BM=16, GB=16, FB=32, STAGES=3, W=8)
    compile_kernel(kernels.gradients_kernel, {**gradients, "DX": True, "GELU": True, "B_SHARED": False}, arch=arch)
