"""Milliseconds of the Gluon kernels of kernels/gluon_btt.py in several launch shapes, beside btt() and dense layers, on a GPU.

python -m results.kernels.gluon 1024-1024:1 4096-1024:1:gelu 2048-2048:2     # d_in-d_out:rank
python -m results.kernels.gluon all 1024-1024:1                              # slices of all sizes too

Every result is first checked against float64.
"""

import itertools
import sys

import torch
import triton

from kernels import btt as btt_kernels
from kernels import gluon_btt as kernels
from kernels.common import SHARED_MEMORY, gelu, multiprocessors
from lab.bench_layers import milliseconds
from theta import BTT, factor_sizes

TOKENS = 32_768
CUDA = torch.device("cuda")


def products(g, a, f, e, r):
    """Launch shapes of the product kernel that fit."""
    g, a, f, e = kernels._pad(g, a, f, e)
    for size, warps, x in itertools.product((8, 16, 32), (8, 16), (16_384, 32_768)):
        first, second = 2 * g * a * r * size, 2 * size * g * r * e
        shared, chunks = first + second > 98_304, max(1, 2 * kernels.TOKENS * g * a // x)
        room = SHARED_MEMORY - 2 * g * r * size * kernels.TOKENS - shared * second
        stages = min(4, room // x)
        too_large = max(first, second) > 131_072 or room < 0
        if f % size or g // chunks < max(warps, 16 // r) or size < warps or too_large:
            continue
        if r * size >= 16 and (size > 8 or max(first, second) > 65_536):  # 8 only where 16 do not fit
            for each in (0, stages) if stages > 1 else (0,):
                yield kernels.Product(size, chunks, shared, each, warps, 0)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def time_layer(text, every):
    layer, rank, *rest = text.split(":")
    d_in, d_out = map(int, layer.split("-"))
    a, _, g, _, e, f, r = factor_sizes(d_in, d_out, BTT, int(rank))
    sizes, after_gelu = btt_kernels.BTTSizes(g, a, f, e, r), rest == ["gelu"]
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator, device=CUDA)).bfloat16()

    x, dy = normal(TOKENS, d_in), normal(TOKENS, d_out)
    A, B = normal(g, a, r * f, std=a**-0.5), normal(f, g * r, e, std=(g * r) ** -0.5)
    few = TOKENS - 7  # the last tile is not whole
    leaves = [tensor.double().requires_grad_() for tensor in (x[:few], A, B)]
    x_64 = torch.nn.functional.gelu(leaves[0], approximate="tanh") if after_gelu else leaves[0]
    y = x_64 @ btt_kernels.btt_matrix(*leaves[1:]).T
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy[:few].double())]
    del y, x_64, leaves
    print(f"{text} {tuple(sizes)}", flush=True)

    def report(name, shape, run, truth):
        """run(number of tokens) -> results"""
        try:
            torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
            try:
                results = run(few), run(few)
            finally:
                torch.use_deterministic_algorithms(False)
            errors = [error(found, true) for found, true in zip(results[0], truth)]
            again = all(torch.equal(one, other) for one, other in zip(*results))
            ms = milliseconds(lambda: run(TOKENS), CUDA)
            worst = f"{max(errors):.1e}" if errors else "-"
            print(f"  {name:4} {ms:.4f} ms  error {worst} {'' if again else 'BITS DIFFER'} {shape}", flush=True)
        except Exception as problem:
            print(f"  {name:4} {shape} {type(problem).__name__}: {str(problem)[:200]}", flush=True)

    for shape in products(g, a, f, e, r):
        if not every and shape.slice != kernels._product(*sizes).slice:
            continue
        report(
            "y", shape, lambda n, s=shape: [kernels._launch_product(x[:n], A, B, sizes, s, False, after_gelu)], exact
        )
    back, u = (f, e, g, a, r), x if after_gelu else None
    for shape in products(*back):
        if not every and shape.slice != kernels._product(*back).slice:
            continue

        def run(n, s=shape):
            return [kernels._launch_product(dy[:n], B, A, back, s, True, u=None if u is None else u[:n])]

        report("dx", shape, run, exact[1:2])
    for shape in kernels._gradients(g, a, f, e, r):
        for warps, shared in itertools.product((8, 16), (False, True)):
            held = 2 * r * shape.g_slice * shape.f_slice * (a + shared * e + 2 * kernels.TOKENS)
            stages = min(4, (SHARED_MEMORY - held) // (2 * kernels.TOKENS * (shape.g_slice * a + shape.f_slice * e)))
            if warps > min(shape.g_slice, shape.f_slice) or stages < 2 or (shared and not every):
                continue
            one = shape._replace(warps=warps, stages=stages)

            def run(n, s=one, shared=shared):
                parts = max(1, min(triton.cdiv(n, kernels.TOKENS), multiprocessors(x) // s.programs(sizes)))
                dx = x.new_empty(n, d_in)
                found = kernels._launch_gradients(x[:n], dy[:n], A, B, dx, sizes, s, parts, after_gelu, shared)
                return [dx, *found] if s.with_dx else found

            report("grad", (one, f"B shared: {shared}"), run, exact[1:] if one.with_dx else exact[2:])

    leaves = [tensor.detach().requires_grad_() for tensor in (x, A, B)]
    W = normal(d_out, d_in, std=d_in**-0.5).requires_grad_()
    runs = {"dense layer": (lambda: torch.nn.functional.linear(leaves[0], W), [leaves[0], W])}
    function = gelu if after_gelu else None
    for method in ("fused", "staged", "dense"):
        fits = {"fused": btt_kernels.fuses(sizes), "staged": btt_kernels.staged_fits(sizes), "dense": True}[method]
        if fits:
            runs[f"btt, {method}"] = (lambda method=method: btt_kernels.btt(*leaves, method, function), leaves)
    for name, (forward, inputs) in runs.items():
        both = milliseconds(lambda f=forward, i=inputs: torch.autograd.grad(f(), i, dy), CUDA)
        with torch.no_grad():
            print(f"  {name}: forward {milliseconds(forward, CUDA):.4f}, with backward {both:.4f} ms", flush=True)
    print(f"  chosen: {btt_kernels.fastest_method(TOKENS, sizes)}", flush=True)


def main():
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    a = torch.empty(2**28, dtype=torch.bfloat16, device=CUDA)
    b = torch.empty_like(a)
    print(f"a large copy: {4 * a.numel() / milliseconds(lambda: b.copy_(a), CUDA) / 1e9:.2f} TB/s", flush=True)
    words = sys.argv[1:]
    for text in [word for word in words if word != "all"] or ["1024-1024:1"]:
        time_layer(text, "all" in words)


if __name__ == "__main__":
    main()
