"""The products inside a structured layer: Triton kernels for BTT, plain torch for all other structures.

A BTT consists of two block-diagonal products with a permutation between them (rows n are tokens):

    z[n, g, r, f] = Σ_a x[n, g, a] · A[g, a, (r f)]        y[n, f, e] = Σ_{g r} z[n, g, r, f] · B[f, (g r), e]

It needs few FLOPs, so its time is that of moving bytes. Written as two calls of torch.bmm it can be slower than a
dense product, because z and permuted copies of it go through memory. btt() has four methods and uses the one that a
cost model expects to be the fastest (results/kernels.md):

    fused   z never leaves the chip. One kernel forward, one backward, if both cores fit on a multiprocessor; larger
            cores are sliced, and slices read x or dy again from L2 (gluon_btt.py)
    staged  one kernel for each product; z goes through device memory once, transposed, so that both kernels access
            whole rows of it
    dense   multiply out the matrix, then cuBLAS. Fastest if the cores need nearly as many FLOPs as the matrix
    torch   two calls of torch.bmm (of a low-rank layer, two cuBLAS products), if blocks are too wide for the kernels

Sums are float32 and in a fixed order: the same inputs give the same bits. CPUs, float32 and systems without Triton use
plain torch, `two_products`, as does every other θ.
"""

from typing import NamedTuple

import torch

from kernels.common import (
    INTERPRETED,
    MAX_ROWS,
    SHARED_MEMORY,
    compute_dtype,
    gelu,
    multiprocessors,
    pow2,
    row_stride_of_z,
    runs_triton,
    sum_parts,
    takes_kernels,
    whole_rows,
)

try:
    import triton
    import triton.language as tl

    from kernels.common import gelu_of_tile, gelu_slope_of_tile
except ImportError:  # no GPU: plain torch
    triton = None

try:
    from kernels import gluon_btt
except ImportError:  # a Triton without Gluon
    gluon_btt = None


# ---------------------------------------------------------------------------------------
# Plain torch


class TwoProducts(torch.autograd.Function):
    """y[f s n t] = Σ_{q g r} second[f, q g r, t] · Σ_p first[g, p, r f s] · x[g p n q]

    n is the number of tokens; the other letters are sizes of a layer (EinsumLinear.product).
    x (g, p, n, q), first (g, p, r·f·s), second (f, q·g·r, t), all of one dtype -> y (f, s, n, t).
    Autograd would turn the permutations into copies, forward and backward. Written out here, each product is
    oriented so that its operands are views and the next product can read its result directly. For a BTT
    (q = s = 1) this leaves one copy of the output, one of the input gradient and one of z's gradient.
    """

    @staticmethod
    def forward(ctx, x, first, second):
        g, p, n, q = x.shape
        f, qgr, t = second.shape
        r = qgr // (q * g)
        s = first.shape[2] // (r * f)
        ctx.sizes = (g, p, n, q, f, t, r, s)
        z = first.transpose(1, 2) @ x.reshape(g, p, n * q)  # (g, r·f·s, n·q)
        y = TwoProducts.turn(z, ctx.sizes) @ second  # (f, s·n, t)
        ctx.save_for_backward(x, first, second, z)
        return y.view(f, s, n, t)

    @staticmethod
    def turn(z, sizes):
        """z permuted for the second product: (g, r·f·s, n·q) -> (f, s·n, q·g·r), a view if q = 1."""
        g, p, n, q, f, t, r, s = sizes
        return z.view(g, r, f, s, n, q).permute(2, 3, 4, 5, 0, 1).reshape(f, s * n, q * g * r)

    @staticmethod
    def backward(ctx, dy):
        x, first, second, z = ctx.saved_tensors
        g, p, n, q, f, t, r, s = ctx.sizes
        dy = dy.reshape(f, s * n, t)
        d_second = TwoProducts.turn(z, ctx.sizes).transpose(1, 2) @ dy  # (f, q·g·r, t)
        dz = second @ dy.transpose(1, 2)  # (f, q·g·r, s·n)
        dz = dz.view(f, q, g, r, s, n).permute(2, 3, 0, 4, 5, 1).reshape(g, r * f * s, n * q).transpose(1, 2)
        d_first = x.reshape(g, p, n * q) @ dz  # (g, p, r·f·s)
        dx = dz @ first.transpose(1, 2)  # (g, n·q, p)
        return dx.view(g, n, q, p).permute(0, 3, 1, 2), d_first, d_second


def two_products(x, first, second):
    """TwoProducts in the compute dtype of x."""
    dtype = compute_dtype(x)
    return TwoProducts.apply(x.to(dtype), first.to(dtype), second.to(dtype))


def btt_matrix(A, B):
    """The matrix of a BTT, (f·e, g·a): each of its g × f blocks is a product of rank r."""
    g, a, rf = A.shape
    f, gr, e = B.shape
    r = gr // g
    W = torch.einsum("garf,fgre->fega", A.view(g, a, r, f), B.view(f, g, r, e))
    return W.reshape(f * e, g * a)


# ---------------------------------------------------------------------------------------
# BTT


def btt(x, A, B, method=None, input_fn=None):
    """y = W x for a Block Tensor-Train W of two cores, or y = W input_fn(x).

    x (..., g·a), A (g, a, r·f), B (f, g·r, e) -> y (..., f·e), in x's dtype or autocast's.
    method: "fused", "staged", "dense" or "torch"; None: the one that should be the fastest (btt_method).
    input_fn: an elementwise function. The kernels apply `gelu` to x as they read it, forward and backward, which saves a
    copy of x in memory and two passes over it. ValueError if the shapes do not fit together.
    """
    sizes = g, a, f, e, r = _sizes(A, B)
    if x.shape[-1] != g * a or B.shape[1] != g * r or A.shape[2] != r * f:
        raise ValueError(f"btt: x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} do not fit together")
    dtype = compute_dtype(x)
    x_2d, A, B = x.to(dtype).reshape(-1, g * a), A.to(dtype), B.to(dtype)
    n = x_2d.shape[0]
    if method is None:
        method = btt_method(x, sizes)
    after_gelu = input_fn is gelu and method in ("fused", "staged")
    if input_fn is not None and not after_gelu:
        x_2d = input_fn(x_2d)
    if method == "fused":
        y = torch.ops.nanoeinsum.btt_fused(x_2d, A, B, after_gelu)
    elif method == "staged":
        y, _ = torch.ops.nanoeinsum.btt_staged(x_2d, A, B, after_gelu)
    elif method == "dense":
        by_kernel = runs_triton(x_2d) and pow2(a) * pow2(e) <= MOST_ENTRIES
        W = torch.ops.nanoeinsum.btt_multiplied_out(A, B) if by_kernel else btt_matrix(A, B)
        y = torch.nn.functional.linear(x_2d, W)
    else:
        x_4d = x_2d.view(n, g, 1, a).permute(1, 3, 0, 2)
        y = TwoProducts.apply(x_4d, A, B).permute(2, 0, 1, 3)  # (f, 1, n, e) -> (n, f, 1, e)
    return y.reshape(*x.shape[:-1], f * e)


def joins(x, sizes):
    """Whether layers with these sizes (BTTSizes, or None if not a BTT) should run faster on one input if joined into one BTT.

    Joined, they are a BTT that has the output blocks of all of them. The first staged kernel then reads x once for all
    layers, and so does the last one of the backward pass, which also sums the gradients of x.
    """
    if sizes[0] is None or any(other != sizes[0] for other in sizes):
        return False
    joined, n = sizes[0]._replace(f=len(sizes) * sizes[0].f), x.numel() // x.shape[-1]
    apart, seconds = btt_method(x, sizes[0]), expected_seconds(n, sizes[0])
    if btt_method(x, joined) != "staged" or apart not in ("staged", "fused") or apart not in seconds:
        return False
    sums = 2 * (len(sizes) + 1) * x.numel() / BANDWIDTH  # of the gradients of x
    return expected_seconds(n, joined)["staged"] < len(sizes) * seconds[apart] + sums


def btt_joined(x, cores):
    """[btt(x, A, B) for A, B in cores], for cores of equal sizes, computed as one BTT."""
    g, a, f, e, r = _sizes(*cores[0])
    A = torch.cat([A.view(g, a, r, f) for A, _ in cores], dim=3).flatten(2)
    B = torch.cat([B for _, B in cores])
    return btt(x, A, B).split(f * e, dim=-1)


class BTTSizes(NamedTuple):
    """Sizes of a BTT of two cores, A (g, a, r·f) and B (f, g·r, e)."""

    g: int  # γ, blocks of the input
    a: int  # α, width of an input block
    f: int  # φ, blocks of the output
    e: int  # ε, width of an output block
    r: int  # ρ, rank


# Measured on an H100 (results/kernels.md): bytes/s of streaming kernels, FLOP/s of large cuBLAS products. Only their
# ratio matters, and it is similar on related GPUs.
BANDWIDTH, FLOP_RATE = 2.6e12, 650e12


def btt_method(x, sizes):
    """The method that btt uses for x (..., g·a): "fused", "staged", "dense" or "torch"."""
    if takes_kernels(x):
        return fastest_method(x.numel() // (sizes.g * sizes.a), sizes)
    return "torch"


def fastest_method(n, sizes):
    """The method with the least expected time, forward and backward, for n tokens."""
    if n == 0:
        return "torch"
    if fused_blocks(sizes) is not None and n >= 16 * 64:
        return "fused"  # moves little more than x, y, dx and dy
    seconds = expected_seconds(n, sizes)
    if "fused" in seconds and not (gluon_btt.timed(sizes) and n >= 16 * 64):
        del seconds["fused"]
    if not staged_fits(sizes):
        del seconds["staged"]
    best = "dense"
    for method in seconds:
        if seconds[method] < seconds[best]:  # torch.compile cannot trace min(key=...) of symbolic sizes
            best = method
    return best


def expected_seconds(n, sizes):
    """{method: expected seconds of forward and backward for n tokens}, from bytes and FLOPs; of fused kernels those in Gluon."""
    g, a, f, e, r = sizes
    d_in, d_out, z = g * a, f * e, g * r * f
    dense = 3 * 2 * n * d_in * d_out / FLOP_RATE + 12 * d_in * d_out / BANDWIDTH
    # Tensors moved, 2 bytes a number: x z | z y | dy z dz | dz x dx.
    staged = 2 * n * (3 * d_in + 2 * d_out + 6 * z) / BANDWIDTH + 5e-6
    # torch also copies z, dz, y, dy and dx, except in a low-rank layer.
    copied = 0 if g == f == 1 else 2 * d_in + 4 * d_out + 4 * z
    products = 3 * 2 * n * r * (d_in * f + g * d_out)
    seconds = {"dense": dense, "staged": staged, "torch": staged + 2 * n * copied / BANDWIDTH + products / FLOP_RATE}
    return {**seconds, "fused": gluon_btt.expected_seconds(n, sizes)} if _by_gluon(sizes) else seconds


# ---------------------------------------------------------------------------------------
# Fused: a tile of tokens, both cores and z stay on one multiprocessor


def fuses(sizes):
    """Whether fused kernels fit a layer: those of gluon_btt.py or those below."""
    return _by_gluon(sizes) or fused_blocks(sizes) is not None


def _by_gluon(sizes):
    """Whether "fused" means the Gluon kernels: where the kernels below do not fit, or are known to be slower.

    Triton's interpreter cannot run Gluon.
    """
    if gluon_btt is None or INTERPRETED or gluon_btt.launches(sizes) is None:
        return False
    return gluon_btt.timed(sizes) or fused_blocks(sizes) is None


class FusedBlocks(NamedTuple):
    tokens: int  # BM: tokens in a tile
    g_block: int  # GB: number of blocks γ whose gradients a program of the backward kernel computes
    warps: int  # of the forward kernel
    backward_warps: int


def fused_blocks(sizes):
    """Block sizes of the fused kernels for a layer, or None if it does not fit on a multiprocessor."""
    g, a, f, e, r = sizes
    G, AP, F, EP, R = pow2(g), pow2(a, 16), pow2(f), pow2(e, 16), pow2(r)
    tokens = 16
    if G * R < 16 or F * R < 16 or F < 8 or G < 8:
        return None
    cores = 2 * (G * AP * R * F + F * G * R * EP)
    forward = cores + 2 * tokens * (2 * G * AP + max(G * R * F, F * EP))
    g_block = G
    while g_block * F * R * (AP + EP) > 32_768 and g_block * R > 16:
        g_block //= 2  # the accumulators of both gradients stay in registers
    share = g_block / G
    backward = share * cores + 2 * tokens * (2 * (g_block * AP + F * EP) + 2 * g_block * R * F)
    fits = max(forward, backward) <= SHARED_MEMORY and g_block * F * R * (AP + EP) <= 32_768
    largest = max(G * R * F, F * EP, G * AP) * tokens
    warps = 16 if largest > 8192 else 8
    return FusedBlocks(tokens, g_block, min(warps, G, F), min(8, g_block, F)) if fits else None


if triton is not None:

    @triton.jit
    def _load_tokens(base, n, stride, blocks, k, N, BLOCKS: tl.constexpr, K: tl.constexpr):
        """(blocks, n, k) tile of a matrix (N, BLOCKS·K)."""
        pointers = base + n[None, :, None].to(tl.int64) * stride + blocks[:, None, None] * K + k[None, None, :]
        mask = (n[None, :, None] < N) & (blocks[:, None, None] < BLOCKS) & (k[None, None, :] < K)
        return tl.load(pointers, mask, 0.0)

    @triton.jit
    def _store_tokens(base, n, stride, blocks, k, N, BLOCKS: tl.constexpr, K: tl.constexpr, tile):
        pointers = base + n[None, :, None].to(tl.int64) * stride + blocks[:, None, None] * K + k[None, None, :]
        mask = (n[None, :, None] < N) & (blocks[:, None, None] < BLOCKS) & (k[None, None, :] < K)
        tl.store(pointers, tile.to(base.dtype.element_ty), mask)

    @triton.jit
    def _core_a(g, a, rf, G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, R: tl.constexpr, FB: tl.constexpr):
        """Addresses of the tile (g, (r f), a) of core A, transposed, and its mask; f < FB runs faster than r."""
        r, f = rf // FB, rf % FB
        offsets = (g[:, None, None] * AL + a[None, None, :]) * (R * F) + (r * F + f)[None, :, None]
        return offsets, (g[:, None, None] < G) & (a[None, None, :] < AL) & ((r < R) & (f < F))[None, :, None]

    @triton.jit
    def _core_b(f, gr, e, G: tl.constexpr, EL: tl.constexpr, F: tl.constexpr, R: tl.constexpr, RB: tl.constexpr):
        """Addresses of the tile (f, (g r), e) of core B, and its mask; r < RB runs faster than g."""
        g, r = gr // RB, gr % RB
        offsets = (f[:, None, None] * (G * R) + (g * R + r)[None, :, None]) * EL + e[None, None, :]
        return offsets, (f[:, None, None] < F) & ((g < G) & (r < R))[None, :, None] & (e[None, None, :] < EL)

    @triton.jit
    def _fused_forward_kernel(
        x, A, B, y, N, x_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
        GB: tl.constexpr, AP: tl.constexpr, FB: tl.constexpr, EP: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr,
        GELU: tl.constexpr,
    ):  # fmt: skip
        """Computes y, one tile of tokens after the other; reads the cores once. Sizes …B and …P are rounded up to powers of 2."""
        g, a, f, e = tl.arange(0, GB), tl.arange(0, AP), tl.arange(0, FB), tl.arange(0, EP)
        offsets, mask = _core_a(g, a, tl.arange(0, RB * FB), G, AL, F, R, FB)
        A_t = tl.load(A + offsets, mask, 0.0)  # (GB, RB·FB, AP)
        offsets, mask = _core_b(f, tl.arange(0, GB * RB), e, G, EL, F, R, RB)
        B_t = tl.load(B + offsets, mask, 0.0)  # (FB, GB·RB, EP)
        for tile in tl.range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0), num_stages=3):
            n = tile * BM + tl.arange(0, BM)
            x_t = _load_tokens(x, n, x_stride, g, a, N, G, AL)  # (GB, BM, AP)
            if GELU:
                x_t = gelu_of_tile(x_t)
            # Tokens are the last index of z, so that warps exchange rows of at least 16 bytes.
            z = tl.dot(A_t, x_t.permute(0, 2, 1)).to(x_t.dtype)  # (GB, RB·FB, BM)
            z = z.reshape(GB, RB, FB, BM).permute(2, 0, 1, 3).reshape(FB, GB * RB, BM)
            y_t = tl.dot(z.permute(0, 2, 1), B_t)  # (FB, BM, EP)
            _store_tokens(y, n, F * EL, f, e, N, F, EL, y_t)

    @triton.jit
    def _fused_backward_kernel(
        x, dy, A, B, dx, dA, dB, N, x_stride, dy_stride, part_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
        GB: tl.constexpr, AP: tl.constexpr, FB: tl.constexpr, EP: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr,
        G_BLOCKS: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        """Computes all three gradients. Each program has one block of γ, for which x, dx, dA and rows of dB are local; all read dy.

        It has every n-th tile of tokens, n being the number of parts, and writes its sums dA and dB to its own part.
        """
        part = tl.program_id(0) // G_BLOCKS
        g0 = (tl.program_id(0) % G_BLOCKS) * GB
        g, a, f, e = g0 + tl.arange(0, GB), tl.arange(0, AP), tl.arange(0, FB), tl.arange(0, EP)
        offsets_A, mask_A = _core_a(g, a, tl.arange(0, RB * FB), G, AL, F, R, FB)
        offsets_B, mask_B = _core_b(f, g0 * RB + tl.arange(0, GB * RB), e, G, EL, F, R, RB)
        A_t = tl.load(A + offsets_A, mask_A, 0.0)  # (GB, RB·FB, AP)
        B_t = tl.load(B + offsets_B, mask_B, 0.0)  # (FB, GB·RB, EP)
        dA_t = tl.zeros((GB, RB * FB, AP), tl.float32)
        dB_t = tl.zeros((FB, GB * RB, EP), tl.float32)
        for tile in tl.range(part, tl.cdiv(N, BM), tl.num_programs(0) // G_BLOCKS, num_stages=3):
            n = tile * BM + tl.arange(0, BM)
            x_t = _load_tokens(x, n, x_stride, g, a, N, G, AL)  # (GB, BM, AP)
            if GELU:
                slope = gelu_slope_of_tile(x_t)
                x_t = gelu_of_tile(x_t)
            dy_t = _load_tokens(dy, n, dy_stride, f, e, N, F, EL)  # (FB, BM, EP)
            z = tl.dot(A_t, x_t.permute(0, 2, 1)).to(x_t.dtype)  # (GB, RB·FB, BM)
            z = z.reshape(GB, RB, FB, BM).permute(2, 0, 1, 3).reshape(FB, GB * RB, BM)
            dB_t = tl.dot(z, dy_t, dB_t)
            dz = tl.dot(B_t, dy_t.permute(0, 2, 1)).to(x_t.dtype)  # (FB, GB·RB, BM)
            dz = dz.reshape(FB, GB, RB, BM).permute(1, 2, 0, 3).reshape(GB, RB * FB, BM)
            dA_t = tl.dot(dz, x_t, dA_t)
            dx_t = tl.dot(dz.permute(0, 2, 1), A_t)  # (GB, BM, AP)
            if GELU:
                dx_t *= slope
            _store_tokens(dx, n, G * AL, g, a, N, G, AL, dx_t)
        tl.store(dA + part * part_stride + offsets_A, dA_t, mask_A)
        tl.store(dB + part * part_stride + offsets_B, dB_t, mask_B)


def _constants(sizes, g_block):
    g, a, f, e, r = sizes
    return dict(
        G=g, AL=a, F=f, EL=e, R=r, GB=g_block, AP=pow2(a, 16), FB=pow2(f), EP=pow2(e, 16), RB=pow2(r)
    )  # fmt: skip


def _sizes(A, B):
    (g, a, _), (f, gr, e) = A.shape, B.shape
    return BTTSizes(g, a, f, e, gr // g)


@torch.library.custom_op("nanoeinsum::btt_fused", mutates_args=())
def btt_fused(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, after_gelu: bool) -> torch.Tensor:
    x, A, B, sizes = whole_rows(x), A.contiguous(), B.contiguous(), _sizes(A, B)
    if _by_gluon(sizes):
        return gluon_btt.forward(x, A, B, sizes, after_gelu)
    blocks, n = fused_blocks(sizes), len(x)
    y = x.new_empty(n, sizes.f * sizes.e)
    programs = min(triton.cdiv(n, blocks.tokens), multiprocessors(x))
    _fused_forward_kernel[(programs,)](
        x, A, B, y, n, x.stride(0), **_constants(sizes, pow2(sizes.g)), BM=blocks.tokens, GELU=after_gelu,
        num_warps=blocks.warps,
    )  # fmt: skip
    return y


@btt_fused.register_fake
def _(x, A, B, after_gelu):
    return x.new_empty(x.shape[0], B.shape[0] * B.shape[2])


@torch.library.custom_op("nanoeinsum::btt_fused_backward", mutates_args=())
def btt_fused_backward(
    x: torch.Tensor, dy: torch.Tensor, A: torch.Tensor, B: torch.Tensor, after_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, dy, A, B, sizes = whole_rows(x), whole_rows(dy), A.contiguous(), B.contiguous(), _sizes(A, B)
    if _by_gluon(sizes):
        return gluon_btt.backward(x, dy, A, B, sizes, after_gelu)
    blocks, n = fused_blocks(sizes), len(x)
    g_blocks = triton.cdiv(sizes.g, blocks.g_block)
    parts = max(1, min(triton.cdiv(n, blocks.tokens), multiprocessors(x) // g_blocks))
    dx = x.new_empty(n, sizes.g * sizes.a)
    sums = torch.empty(parts, A.numel() + B.numel(), dtype=torch.float32, device=x.device)
    _fused_backward_kernel[(g_blocks * parts,)](
        x, dy, A, B, dx, sums, sums[:, A.numel() :], n, x.stride(0), dy.stride(0), sums.stride(0),
        **_constants(sizes, blocks.g_block), BM=blocks.tokens, G_BLOCKS=g_blocks, GELU=after_gelu,
        num_warps=blocks.backward_warps,
    )  # fmt: skip
    return dx, *sum_parts(sums, sums[:, A.numel() :], A, B)


@btt_fused_backward.register_fake
def _(x, dy, A, B, after_gelu):
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


def _fused_setup(ctx, inputs, output):
    *tensors, ctx.after_gelu = inputs
    ctx.save_for_backward(*tensors)


def _fused_gradients(ctx, dy):
    x, A, B = ctx.saved_tensors
    return *torch.ops.nanoeinsum.btt_fused_backward(x, dy, A, B, ctx.after_gelu), None


btt_fused.register_autograd(_fused_gradients, setup_context=_fused_setup)


# ---------------------------------------------------------------------------------------
# Staged: z is in device memory as (g, r, f, n), tokens last. The first product writes whole rows of it and the second
# reads them, and every operand has the layout that Hopper's matrix units need. A program has one block of a core and
# every n-th tile of tokens, n being the number of parts.

MAX_WIDTH = 256  # largest α and ε, for which the sums of a tile stay in registers


class Tile(NamedTuple):
    rows: int  # rows of a core's block, and of z, in a program
    width: int  # α or ε, padded
    tokens: int  # tokens in a tile
    stages: int  # tiles in flight: one is multiplied while the others are loaded
    warps: int
    held: int  # 16-bit numbers in shared memory


def _staged_tiles(sizes):
    """A Tile for each kernel: first product, second product, backward of the second, backward of the first."""
    g, a, f, e, r = sizes
    AP, EP, GR, RF = (pow2(size, 16) for size in (a, e, g * r, r * f))

    def tile(rows, width, tokens, stages, warps, loaded, stored):
        return Tile(rows, width, tokens, stages, warps, rows * width + tokens * (stages * loaded + stored))

    few = RF <= 64
    some, part = min(RF, 128), min(GR, 128)
    return (
        tile(some, AP, 128, 3 if few else 2, 8 if few else 4, AP, some),
        tile(GR, EP, 128 if GR <= 64 else 64, 3 if GR <= MAX_ROWS else 2, 4, GR, EP),
        tile(part, EP, 128 if part <= 64 and e <= 64 else 64, 3, 8, part + EP, part),
        tile(RF, AP, 128 if few and a <= 64 else 64, 3, 8 if few else 4, RF + AP, AP),
    )


def staged_fits(sizes):
    """Whether the staged kernels support a layer of these sizes."""
    g, a, f, e, r = sizes
    rows_fit = r * f <= MAX_ROWS and g * r <= 2 * MAX_ROWS
    return rows_fit and max(a, e) <= MAX_WIDTH and all(2 * t.held <= SHARED_MEMORY for t in _staged_tiles(sizes))


if triton is not None:

    @triton.jit
    def _staged_first_kernel(
        x, A, z, N, z_stride, x_stride, G: tl.constexpr, AL: tl.constexpr, RF: tl.constexpr, AP: tl.constexpr,
        CB: tl.constexpr, BM: tl.constexpr, PARTS, STAGES: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        """z_g (r·f, n) = A_gᵀ x_gᵀ"""
        C_BLOCKS: tl.constexpr = (RF + CB - 1) // CB
        pid = tl.program_id(0)
        g = pid % G
        c = (pid // G) % C_BLOCKS * CB + tl.arange(0, CB)
        a = tl.arange(0, AP)
        mask_A = (a[:, None] < AL) & (c[None, :] < RF)
        A_g = tl.load(A + g * (AL * RF) + a[:, None] * RF + c[None, :], mask_A, 0.0)
        for tile in tl.range(pid // (G * C_BLOCKS), tl.cdiv(N, BM), PARTS, num_stages=STAGES):
            n = tile * BM + tl.arange(0, BM)
            mask_x = (n[:, None] < N) & (a[None, :] < AL)
            x_t = tl.load(x + n[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
            if GELU:
                x_t = gelu_of_tile(x_t)
            z_t = tl.dot(A_g.T, x_t.T).to(z.dtype.element_ty)  # (CB, BM)
            rows = z + (g * RF + c)[:, None].to(tl.int64) * z_stride
            tl.store(rows + n[None, :], z_t, (c[:, None] < RF) & (n[None, :] < N))

    @triton.jit
    def _staged_second_kernel(
        z, B, y, N, z_stride, F: tl.constexpr, EL: tl.constexpr, GR: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
        BM: tl.constexpr, PARTS, STAGES: tl.constexpr,
    ):  # fmt: skip
        """y_f (n, e) = z_fᵀ B_f"""
        pid = tl.program_id(0)
        f = pid % F
        k, e = tl.arange(0, KP), tl.arange(0, EP)
        mask_B = (k[:, None] < GR) & (e[None, :] < EL)
        B_f = tl.load(B + f * (GR * EL) + k[:, None] * EL + e[None, :], mask_B, 0.0)
        for tile in tl.range(pid // F, tl.cdiv(N, BM), PARTS, num_stages=STAGES):
            n = tile * BM + tl.arange(0, BM)
            rows = z + (k * F + f)[:, None].to(tl.int64) * z_stride
            z_t = tl.load(rows + n[None, :], (k[:, None] < GR) & (n[None, :] < N), 0.0)
            y_t = tl.dot(z_t.T, B_f).to(y.dtype.element_ty)  # (BM, EP)
            to = y + n[:, None].to(tl.int64) * (F * EL) + f * EL + e[None, :]
            tl.store(to, y_t, (n[:, None] < N) & (e[None, :] < EL))

    @triton.jit
    def _staged_second_backward_kernel(
        z, dy, B, dz, dB, N, z_stride, dy_stride, part_stride,
        F: tl.constexpr, EL: tl.constexpr, GR: tl.constexpr, EP: tl.constexpr, KB: tl.constexpr,
        BM: tl.constexpr, PARTS, STAGES: tl.constexpr,
    ):  # fmt: skip
        """dz_f (g·r, n) = B_f dy_fᵀ and dB_f = z_f dy_f, for KB of the g·r rows"""
        K_BLOCKS: tl.constexpr = (GR + KB - 1) // KB
        pid = tl.program_id(0)
        f = pid % F
        k = (pid // F) % K_BLOCKS * KB + tl.arange(0, KB)
        part = pid // (F * K_BLOCKS)
        e = tl.arange(0, EP)
        offsets = f * (GR * EL) + k[:, None] * EL + e[None, :]
        mask_B = (k[:, None] < GR) & (e[None, :] < EL)
        B_f = tl.load(B + offsets, mask_B, 0.0)
        dB_f = tl.zeros((KB, EP), tl.float32)
        for tile in tl.range(part, tl.cdiv(N, BM), PARTS, num_stages=STAGES):
            n = tile * BM + tl.arange(0, BM)
            mask_y = (n[:, None] < N) & (e[None, :] < EL)
            dy_t = tl.load(dy + n[:, None].to(tl.int64) * dy_stride + f * EL + e[None, :], mask_y, 0.0)
            at = (k * F + f)[:, None].to(tl.int64) * z_stride + n[None, :]
            mask_z = (k[:, None] < GR) & (n[None, :] < N)
            z_t = tl.load(z + at, mask_z, 0.0)
            dz_t = tl.dot(B_f, dy_t.T).to(dz.dtype.element_ty)  # (KB, BM)
            tl.store(dz + at, dz_t, mask_z)
            dB_f = tl.dot(z_t, dy_t, dB_f)
        tl.store(dB + part * part_stride + offsets, dB_f, mask_B)

    @triton.jit
    def _staged_first_backward_kernel(
        dz, x, A, dx, dA, N, z_stride, x_stride, part_stride,
        G: tl.constexpr, AL: tl.constexpr, RF: tl.constexpr, AP: tl.constexpr, CP: tl.constexpr,
        BM: tl.constexpr, PARTS, STAGES: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        """dx_g (n, a) = dz_gᵀ A_gᵀ and dA_gᵀ (r·f, a) = dz_g x_g"""
        pid = tl.program_id(0)
        g = pid % G
        part = pid // G
        a, c = tl.arange(0, AP), tl.arange(0, CP)
        offsets = g * (AL * RF) + a[None, :] * RF + c[:, None]
        mask_A = (a[None, :] < AL) & (c[:, None] < RF)
        A_g = tl.load(A + offsets, mask_A, 0.0)  # (r·f, a)
        dA_g = tl.zeros((CP, AP), tl.float32)
        for tile in tl.range(part, tl.cdiv(N, BM), PARTS, num_stages=STAGES):
            n = tile * BM + tl.arange(0, BM)
            rows = dz + (g * RF + c)[:, None].to(tl.int64) * z_stride
            dz_t = tl.load(rows + n[None, :], (c[:, None] < RF) & (n[None, :] < N), 0.0)
            mask_x = (n[:, None] < N) & (a[None, :] < AL)
            x_t = tl.load(x + n[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
            dx_t = tl.dot(dz_t.T, A_g)  # (BM, AP)
            if GELU:
                dx_t *= gelu_slope_of_tile(x_t)
                x_t = gelu_of_tile(x_t)
            to = dx + n[:, None].to(tl.int64) * (G * AL) + g * AL + a[None, :]
            tl.store(to, dx_t.to(dx.dtype.element_ty), mask_x)
            dA_g = tl.dot(dz_t, x_t, dA_g)
        tl.store(dA + part * part_stride + offsets, dA_g, mask_A)


def _parts(blocks, n, tokens, tensor):
    """Number of programs that share the tokens of one block: about 4 programs per multiprocessor in all."""
    return max(1, min(triton.cdiv(n, tokens), round(4 * multiprocessors(tensor) / blocks)))


@torch.library.custom_op("nanoeinsum::btt_staged", mutates_args=())
def btt_staged(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, after_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    x, A, B, (g, a, f, e, r) = whole_rows(x), A.contiguous(), B.contiguous(), _sizes(A, B)
    n = len(x)
    z, y = x.new_empty(g * r * f, row_stride_of_z(n)), x.new_empty(n, f * e)
    first, second, *_ = _staged_tiles(_sizes(A, B))
    blocks = g * triton.cdiv(r * f, first.rows)
    parts = _parts(blocks, n, first.tokens, x)
    _staged_first_kernel[(blocks * parts,)](
        x, A, z, n, z.stride(0), x.stride(0), G=g, AL=a, RF=r * f, AP=first.width, CB=first.rows,
        BM=first.tokens, PARTS=parts, STAGES=first.stages, GELU=after_gelu, num_warps=first.warps,
    )  # fmt: skip
    parts = _parts(f, n, second.tokens, x)
    _staged_second_kernel[(f * parts,)](
        z, B, y, n, z.stride(0), F=f, EL=e, GR=g * r, EP=second.width, KP=second.rows,
        BM=second.tokens, PARTS=parts, STAGES=second.stages, num_warps=second.warps,
    )  # fmt: skip
    return y, z


@btt_staged.register_fake
def _(x, A, B, after_gelu):
    n, (f, gr, e) = x.shape[0], B.shape
    return x.new_empty(n, f * e), x.new_empty(gr * f, row_stride_of_z(n))


@torch.library.custom_op("nanoeinsum::btt_staged_backward", mutates_args=())
def btt_staged_backward(
    x: torch.Tensor, dy: torch.Tensor, A: torch.Tensor, B: torch.Tensor, z: torch.Tensor, after_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, dy, A, B, (g, a, f, e, r) = whole_rows(x), whole_rows(dy), A.contiguous(), B.contiguous(), _sizes(A, B)
    n = len(x)
    dz, dx = torch.empty_like(z), x.new_empty(n, g * a)
    *_, second, first = _staged_tiles(_sizes(A, B))
    blocks = f * triton.cdiv(g * r, second.rows)
    parts_B, parts_A = _parts(blocks, n, second.tokens, x), _parts(g, n, 128, x)
    sums_A = torch.empty(parts_A, A.numel(), dtype=torch.float32, device=x.device)
    sums_B = torch.empty(parts_B, B.numel(), dtype=torch.float32, device=x.device)
    _staged_second_backward_kernel[(blocks * parts_B,)](
        z, dy, B, dz, sums_B, n, z.stride(0), dy.stride(0), B.numel(), F=f, EL=e, GR=g * r, EP=second.width,
        KB=second.rows, BM=second.tokens, PARTS=parts_B, STAGES=second.stages, num_warps=second.warps,
    )  # fmt: skip
    _staged_first_backward_kernel[(g * parts_A,)](
        dz, x, A, dx, sums_A, n, z.stride(0), x.stride(0), A.numel(), G=g, AL=a, RF=r * f, AP=first.width,
        CP=first.rows, BM=first.tokens, PARTS=parts_A, STAGES=first.stages, GELU=after_gelu, num_warps=first.warps,
    )  # fmt: skip
    return dx, *sum_parts(sums_A, sums_B, A, B)


@btt_staged_backward.register_fake
def _(x, dy, A, B, z, after_gelu):
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


def _staged_setup(ctx, inputs, output):
    *tensors, ctx.after_gelu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _staged_gradients(ctx, dy, _):
    x, A, B, z = ctx.saved_tensors
    return *torch.ops.nanoeinsum.btt_staged_backward(x, dy, A, B, z, ctx.after_gelu), None


btt_staged.register_autograd(_staged_gradients, setup_context=_staged_setup)


# ---------------------------------------------------------------------------------------
# Dense: the matrix is multiplied out. A program computes one block (φ γ) as a sum of a few outer products. torch would
# use batched products of tiny matrices and copy their results.

MOST_ENTRIES = 16_384  # most entries of a block of W that a program can hold

if triton is not None:

    @triton.jit
    def _dense_matrix_kernel(
        A, B, W, G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, EP: tl.constexpr,
    ):  # fmt: skip
        """W_fg (e, a) = B_fgᵀ A_gfᵀ"""
        g, f = tl.program_id(0) % G, tl.program_id(0) // G
        a, e = tl.arange(0, AP), tl.arange(0, EP)
        W_fg = tl.zeros((EP, AP), tl.float32)
        for r in tl.range(0, R):
            A_r = tl.load(A + (g * AL + a) * (R * F) + r * F + f, a < AL, 0.0).to(tl.float32)
            B_r = tl.load(B + (f * (G * R) + g * R + r) * EL + e, e < EL, 0.0).to(tl.float32)
            W_fg += B_r[:, None] * A_r[None, :]
        to = W + (f * EL + e)[:, None] * (G * AL) + g * AL + a[None, :]
        tl.store(to, W_fg.to(W.dtype.element_ty), (e[:, None] < EL) & (a[None, :] < AL))

    @triton.jit
    def _dense_matrix_backward_kernel(
        dW, A, B, dA, dB, G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, EP: tl.constexpr,
    ):  # fmt: skip
        """dA_gf (a, r) = dW_fgᵀ B_fgᵀ and dB_fg (r, e) = A_gfᵀ dW_fgᵀ"""
        g, f = tl.program_id(0) % G, tl.program_id(0) // G
        a, e = tl.arange(0, AP), tl.arange(0, EP)
        at = dW + (f * EL + e)[:, None] * (G * AL) + g * AL + a[None, :]
        dW_fg = tl.load(at, (e[:, None] < EL) & (a[None, :] < AL), 0.0).to(tl.float32)
        for r in tl.range(0, R):
            at_A, at_B = (g * AL + a) * (R * F) + r * F + f, (f * (G * R) + g * R + r) * EL + e
            A_r = tl.load(A + at_A, a < AL, 0.0).to(tl.float32)
            B_r = tl.load(B + at_B, e < EL, 0.0).to(tl.float32)
            tl.store(dA + at_A, tl.sum(dW_fg * B_r[:, None], 0).to(dA.dtype.element_ty), a < AL)
            tl.store(dB + at_B, tl.sum(dW_fg * A_r[None, :], 1).to(dB.dtype.element_ty), e < EL)


def _block_constants(sizes):
    g, a, f, e, r = sizes
    entries = pow2(a) * pow2(e)
    return dict(G=g, AL=a, F=f, EL=e, R=r, AP=pow2(a), EP=pow2(e), num_warps=1 if entries <= 1024 else 4)


@torch.library.custom_op("nanoeinsum::btt_multiplied_out", mutates_args=())
def btt_multiplied_out(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """btt_matrix, computed by a kernel."""
    A, B, sizes = A.contiguous(), B.contiguous(), _sizes(A, B)
    W = A.new_empty(sizes.f * sizes.e, sizes.g * sizes.a)
    _dense_matrix_kernel[(sizes.g * sizes.f,)](A, B, W, **_block_constants(sizes))
    return W


@btt_multiplied_out.register_fake
def _(A, B):
    return A.new_empty(B.shape[0] * B.shape[2], A.shape[0] * A.shape[1])


@torch.library.custom_op("nanoeinsum::btt_multiplied_out_backward", mutates_args=())
def btt_multiplied_out_backward(
    dW: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dW, A, B, sizes = dW.contiguous(), A.contiguous(), B.contiguous(), _sizes(A, B)
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    _dense_matrix_backward_kernel[(sizes.g * sizes.f,)](dW, A, B, dA, dB, **_block_constants(sizes))
    return dA, dB


@btt_multiplied_out_backward.register_fake
def _(dW, A, B):
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _multiplied_out_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _multiplied_out_gradients(ctx, dW):
    return torch.ops.nanoeinsum.btt_multiplied_out_backward(dW, *ctx.saved_tensors)


btt_multiplied_out.register_autograd(_multiplied_out_gradients, setup_context=_multiplied_out_setup)
