"""BTT products that keep z on chip, in Gluon, for Hopper GPUs and blocks of 24 to 64 numbers.

    z[n, g, r, f] = Σ_a x[n, g, a] · A[g, a, (r f)]        y[n, f, e] = Σ_{g r} z[n, g, r, f] · B[f, (g r), e]

A program holds a slice of both cores and processes tiles of 16 tokens. Programs with different slices read the same x;
all but the first of them find it in L2. Two kernels serve forward and backward:

    product    y from x, or dx from dy: the same two products, with the cores exchanged and transposed
    gradients  dA and dB of a slice of the blocks γ and φ, and also dx if the slice has all blocks φ

Bank conflicts. z and dz pass between warps as (g, f, n), tokens last, in 16-byte rows of 8 tokens. Row (g, f) is stored
in bank group (g xor f) mod 8. A warp that holds one f and eight g, and a warp that holds one g and eight f, both access
eight different bank groups, so neither side has conflicts. Triton's own layout of this tile causes 9-way conflicts.

Places. In a matrix product, lane q of four holds elements 2q, 2q + 1, 2q + 8, 2q + 9, ... of the axis that is summed. The
order of that axis is free as long as both operands agree. If place 16t + 8h + 2q + b stands for element 8q + 4t + 2h + b,
each lane holds 8 neighbouring elements, which it accesses with one 16-byte instruction. `to_places` and `from_places`
rename an axis accordingly; they move no data.

Sizes are padded in registers and shared memory to powers of 2, never in device memory. In the kernels, names are
G, AL, F, EL, R for the sizes g, a, f, e, r; AP and EP for padded sizes; BM for tokens, GB and FB for slices; W for warps.
"""

import functools
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kernels.common import SHARED_MEMORY, multiprocessors, pow2, sum_parts

# Triton 3.9 renamed it.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# ---------------------------------------------------------------------------------------
# Layouts. The bases of a linear layout are the coordinates that each bit of an offset (or register, lane, warp) adds.


@gluon.constexpr_function
def _bits(size):
    return size.bit_length() - 1


@gluon.constexpr_function
def padded(size, least=16):
    """The smallest power of 2 that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


@gluon.constexpr_function
def exchange_layout(G, F, BM):
    """Layout of z (g, f, n) in shared memory. Bits of an offset: n0 n1 n2 | g0^f0 g1^f1 g2^f2 | n3.. f0.. g3.."""
    bases = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    bases += [[0, 0, 1 << i] for i in range(3, _bits(BM))]
    bases += [[(1 << i) if i < 3 else 0, 1 << i, 0] for i in range(_bits(F))]
    bases += [[1 << i, 0, 0] for i in range(3, _bits(G))]
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def rows_layout(blocks, rows, K):
    """Layout of (block, row, k) in shared memory: rows of K elements in 16-byte chunks.

    Three kinds of access touch eight different bank groups: one chunk of eight rows (ldmatrix), eight neighbouring chunks
    (copies), and four chunks of two rows (one chunk for each lane).
    """
    chunks = _bits(K // 8)
    bases = [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + [[0, 0, 8 << i] for i in range(chunks)]
    if chunks == 1:  # bank group = n1 n0 c0^n2
        first = [[0, 1, 0], [0, 2, 0], [0, 4, 8]]
    elif chunks == 2:  # (n0 ^ b0) c1^n2 c0^n1
        first = [[0, 1, 0], [0, 2, 8], [0, 4, 16]]
    else:  # c2^n0 c1^n1 c0^n2
        first = [[0, 1, 32], [0, 2, 16], [0, 4, 8]]
    bases += first + [[0, 1 << i, 0] for i in range(3, _bits(rows))]
    blocks_bits = _bits(blocks)
    more = [[1 << i, 0, 0] for i in range(blocks_bits)]
    if chunks == 2 and blocks_bits:
        more[0] = [1, 1, 0]
    return gl.SharedLinearLayout(bases + more)


@gluon.constexpr_function
def copy_layout(blocks, rows, K, W):
    """Layout of a copy of (block, row, k): each lane copies 16 bytes; a warp covers whole rows of neighbouring blocks."""
    chunks = K // 8
    near = max(1, min(blocks, 8 // chunks))
    return gl.BlockedLayout([1, 1, 8], [near, 32 // chunks // near, chunks], [W, 1, 1], [2, 0, 1])


@gluon.constexpr_function
def token_rows_layout(blocks, BM, K, W, K_LAST):
    """Layout of (block, n, k), or of (block, k, n) if not K_LAST, in registers: lanes hold 8 neighbouring k of a token."""
    assert blocks >= W, "every warp needs a block"
    regs = [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
    rows = [[0, 1 << i, 0] for i in range(3, _bits(BM))]
    wide = [[0, 0, 1 << i] for i in range(5, _bits(K))]
    more = [[W << i, 0, 0] for i in range(_bits(blocks // W))]
    regs += rows + wide + more
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[1 << i, 0, 0] for i in range(_bits(W))]
    shape = [blocks, BM, K]
    if not K_LAST:
        regs = [[b, k, n] for b, n, k in regs[:3] + wide + rows + more]
        lanes = [[b, k, n] for b, n, k in lanes]
        shape = [blocks, K, BM]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], shape)


@gluon.jit
def to_places(t):
    """Reorders axis 1 of (block, k, column) from elements to places."""
    B: gl.constexpr = t.shape[0]
    K: gl.constexpr = t.shape[1]
    C: gl.constexpr = t.shape[2]
    return t.reshape([B, K // 32, 4, 2, 2, 2, C]).permute([0, 1, 3, 4, 2, 5, 6]).reshape([B, K, C])


@gluon.jit
def from_places(t):
    """Reorders axis 2 of (block, row, k) from places to elements."""
    B: gl.constexpr = t.shape[0]
    R: gl.constexpr = t.shape[1]
    K: gl.constexpr = t.shape[2]
    return t.reshape([B, R, K // 32, 4, 4, 2]).permute([0, 1, 2, 4, 3, 5]).reshape([B, R, K])


@gluon.jit
def _tanh(u):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gelu_of(x):
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), in the dtype of x."""
    u = x.to(gl.float32)
    h = 0.5 * u
    return (h + h * _tanh(u * (0.7978845608 + 0.0356774081 * u * u))).to(x.dtype)


@gluon.jit
def gelu_and_slope_of(x):
    """gelu(x) in the dtype of x, and its derivative in float32."""
    u = x.to(gl.float32)
    s = u * u
    t = _tanh(u * (0.7978845608 + 0.0356774081 * s))
    h = 0.5 * u
    slope = 0.5 + 0.5 * t + h * (1 - t * t) * (0.7978845608 + 0.1070322243 * s)
    return (h + h * t).to(x.dtype), slope


@gluon.jit
def load_core(
    base, blocks, rows, run, B: gl.constexpr, R: gl.constexpr, K: gl.constexpr, SB: gl.constexpr, SR: gl.constexpr,
    RUN: gl.constexpr, SK: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """(block, row, k) of a core, where k consists of runs of RUN contiguous elements.

    SB, SR and SK are the distances between blocks, rows and runs. Zero outside the first `blocks` blocks, `rows` rows and
    `run` elements of each run.
    """
    C: gl.constexpr = copy_layout(B, R, K, W)
    b = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, C)))[:, None, None]
    r = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, C)))[None, :, None]
    k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(1, C)))[None, None, :]
    mask = (b < blocks) & (r < rows) & (k % RUN < run)
    return gl.load(base + b * SB + r * SR + k // RUN * SK + k % RUN, mask=mask, other=0.0)


@gluon.jit
def copy_tile(
    to, base, tile, stride, N, blocks, B: gl.constexpr, BM: gl.constexpr, KP: gl.constexpr, K: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Starts to copy (block, n, k) of a matrix with K columns for each block. Zero outside its blocks, rows and columns."""
    C: gl.constexpr = copy_layout(B, BM, KP, W)
    b = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, C)))[:, None, None]
    n = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, C)))[None, :, None]
    k = gl.arange(0, KP, gl.SliceLayout(0, gl.SliceLayout(1, C)))[None, None, :]
    at = base + tile.to(gl.int64) * BM * stride + (b * K + k + n * stride)
    copy_async(to, at, mask=(tile * BM + n < N) & (b < blocks) & (k < K))


# ---------------------------------------------------------------------------------------
# Product


@gluon.jit
def to_shared(t):
    """(block, row, k) -> the same in shared memory"""
    layout: gl.constexpr = rows_layout(t.shape[0], t.shape[1], t.shape[2])
    return gl.allocate_shared_memory(t.dtype, t.shape, layout, t)


@gluon.jit
def load_first(
    core, f0, g0, G: gl.constexpr, AL: gl.constexpr, F: gl.constexpr, R: gl.constexpr, GC: gl.constexpr,
    FB: gl.constexpr, BACKWARD: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Core of the first product: A -> (g, a, r f); backward B, stored as (g, (f r), a) -> (g, a, f r)."""
    AP: gl.constexpr = padded(AL, 32)
    if BACKWARD:
        at = core + (g0 * F + f0) * R * AL
        return load_core(at, G - g0, (F - f0) * R, AL, GC, FB * R, AP, F * R * AL, AL, AP, 0, W).permute([0, 2, 1])
    else:
        return load_core(core + g0 * AL * R * F + f0, G - g0, AL, F - f0, GC, AP, R * FB, AL * R * F, R * F, FB, F, W)


@gluon.jit
def load_second(
    core, f0, g0, G: gl.constexpr, F: gl.constexpr, EL: gl.constexpr, R: gl.constexpr, GC: gl.constexpr,
    FB: gl.constexpr, BACKWARD: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Core of the second product: B -> (f, e, g r); backward A, stored as (f, e, (r g)) -> (f, e, r g)."""
    EP: gl.constexpr = padded(EL, 32)
    if BACKWARD:
        return load_core(core + f0 * EL * R * G + g0, F - f0, EL, G - g0, FB, EP, R * GC, EL * R * G, R * G, GC, G, W)
    else:
        at = core + (f0 * G + g0) * R * EL
        return load_core(at, F - f0, (G - g0) * R, EL, FB, GC * R, EP, G * R * EL, EL, EP, 0, W).permute([0, 2, 1])


@gluon.jit(do_not_specialize=["N"])
def product_kernel(
    x, first, second, y, u, N, x_stride, u_stride,
    G: gl.constexpr, AL: gl.constexpr, F: gl.constexpr, EL: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, FB: gl.constexpr,
    CHUNKS: gl.constexpr, SECOND_SHARED: gl.constexpr, BACKWARD: gl.constexpr, GELU: gl.constexpr, SLOPE: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """FB of the blocks φ of y[n, f, e] = Σ_{g r} Σ_a x[n, g, a] first[g, a, (r f)] second[f, (g r), e].

    The first core stays in registers, the second one in registers or in shared memory. A tile of x is read in CHUNKS
    groups of blocks γ, each loaded while the one before it is processed: into registers, or, if STAGES > 0, into a ring of
    STAGES chunks in shared memory. BACKWARD computes dx from dy: `first` is B, which is (g, (f r), a) in the names used
    here, and `second` is A, (f, e, (r g)). GELU applies gelu to x. SLOPE multiplies y by gelu'(u), u (n, f, e).
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    a_op: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_op: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    GC: gl.constexpr = padded(G) // CHUNKS
    AP: gl.constexpr = padded(AL, 32)
    EP: gl.constexpr = padded(EL, 32)
    X: gl.constexpr = token_rows_layout(GC, BM, AP, W, False)
    Y: gl.constexpr = token_rows_layout(FB, BM, EP, W, True)
    Z: gl.constexpr = exchange_layout(GC, FB * R, BM) if BACKWARD else exchange_layout(GC * R, FB, BM)
    dtype: gl.constexpr = x.dtype.element_ty
    SLICES: gl.constexpr = (F + FB - 1) // FB
    f0 = (gl.program_id(0) % SLICES) * FB
    tiles = (N + BM - 1) // BM
    tile = gl.program_id(0) // SLICES
    step = gl.num_programs(0) // SLICES

    gx = gl.arange(0, GC, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    ax = gl.arange(0, AP, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    nx = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
    if STAGES:
        x_s = gl.allocate_shared_memory(dtype, [STAGES, GC, BM, AP], rows_layout(GC, BM, AP))
        for i in gl.static_range(STAGES - 1):
            g0 = i % CHUNKS * GC
            copy_tile(x_s.index(i), x + g0 * AL, tile + i // CHUNKS * step, x_stride, N, G - g0, GC, BM, AP, AL, W)
            async_copy.commit_group()
    else:
        x_at = x + gx * AL + ax + nx * x_stride
        mask_x = (gx < G) & (ax < AL) & (tile * BM + nx < N)
        x_next = gl.load(x_at + tile.to(gl.int64) * BM * x_stride, mask=mask_x, other=0.0)

    first_t = ()
    second_t = ()
    z_s = ()
    for c in gl.static_range(CHUNKS):
        first_c = load_first(first, f0, c * GC, G, AL, F, R, GC, FB, BACKWARD, W)  # (g, a, r f)
        first_t = first_t + (gl.convert_layout(to_places(first_c).permute([0, 2, 1]), a_op),)
        second_c = to_places(load_second(second, f0, c * GC, G, F, EL, R, GC, FB, BACKWARD, W))  # (f, e, g r)
        if not SECOND_SHARED:
            second_t = second_t + (gl.convert_layout(second_c.permute([0, 2, 1]), b_op),)
        else:
            second_c = second_c if BACKWARD else second_c.permute([0, 2, 1])  # in the order in which it is stored
            second_t = second_t + (to_shared(second_c),)
        z_s = z_s + (gl.allocate_shared_memory(dtype, [GC, FB * R, BM] if BACKWARD else [GC * R, FB, BM], Z),)

    fy = f0 + gl.arange(0, FB, gl.SliceLayout(1, gl.SliceLayout(2, Y)))[:, None, None]
    ny = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, Y)))[None, :, None]
    ey = gl.arange(0, EP, gl.SliceLayout(0, gl.SliceLayout(1, Y)))[None, None, :]
    y_at = y + fy * EL + ey + ny * (F * EL)
    u_at = u + fy * EL + ey + ny * u_stride
    slot = 0
    while tile < tiles:
        for c in gl.static_range(CHUNKS):
            if STAGES:
                async_copy.wait_group(STAGES - 2)
                x_t = x_s.index(slot).permute([0, 2, 1]).load(X)
                into = gl.where(slot == 0, STAGES - 1, slot - 1)
                ahead = tile + (c + STAGES - 1) // CHUNKS * step
                g0 = (c + STAGES - 1) % CHUNKS * GC
                copy_tile(x_s.index(into), x + g0 * AL, ahead, x_stride, N, G - g0, GC, BM, AP, AL, W)
                async_copy.commit_group()
                slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
            else:
                x_t = x_next
                ahead = tile if c + 1 < CHUNKS else tile + step
                g0 = (c + 1) % CHUNKS * GC
                mask_x = (gx < G - g0) & (ax < AL) & (ahead * BM + nx < N)
                x_next = gl.load(x_at + (ahead.to(gl.int64) * BM * x_stride + g0 * AL), mask=mask_x, other=0.0)
            if GELU:
                x_t = gelu_of(x_t)
            x_t = gl.convert_layout(to_places(x_t), b_op)
            z = mma_v2(first_t[c], x_t, gl.zeros([GC, R * FB, BM], gl.float32, mma)).to(dtype)
            z_s[c].reshape([GC, R * FB, BM]).store(z)
        y_t = gl.zeros([FB, BM, EP], gl.float32, mma)
        for c in gl.static_range(CHUNKS):
            B_t = second_t[c]
            if SECOND_SHARED:
                B_t = (B_t.permute([0, 2, 1]) if BACKWARD else B_t).load(b_op)
            z_t = z_s[c].permute([1, 2, 0])  # (f, n, g r)
            if BACKWARD:  # (g, f r, n) -> (f, n, r g)
                z_t = z_s[c].reshape([GC, FB, R, BM]).permute([1, 3, 2, 0]).reshape([FB, BM, R * GC])
            y_t = mma_v2(z_t.load(a_op), B_t, y_t)
        mask_y = (fy < F) & (ey < EL) & (tile * BM + ny < N)
        if SLOPE:
            y_t = gl.convert_layout(from_places(y_t), Y)
            u_t = gl.load(u_at + tile.to(gl.int64) * BM * u_stride, mask=mask_y, other=0.0)
            y_t = (y_t * gelu_and_slope_of(u_t)[1]).to(dtype)
        else:
            y_t = gl.convert_layout(from_places(y_t.to(dtype)), Y)
        gl.store(y_at + tile.to(gl.int64) * (BM * F * EL), y_t, mask=mask_y)
        tile += step


# ---------------------------------------------------------------------------------------
# Gradients


@gluon.jit(do_not_specialize=["N"])
def gradients_kernel(
    x, dy, A, B, dx, sums, N, x_stride, dy_stride,
    G: gl.constexpr, AL: gl.constexpr, F: gl.constexpr, EL: gl.constexpr, R: gl.constexpr, BM: gl.constexpr,
    GB: gl.constexpr, FB: gl.constexpr, DX: gl.constexpr, GELU: gl.constexpr, B_SHARED: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """dA and dB of GB blocks γ and FB blocks φ; DX (only if FB >= F): also dx of the blocks γ.

    Programs with the same slice share out the tiles. Each writes its sums to row `part` of sums (parts, A and B), float32.
    GELU: the layer's input is gelu(x).
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    a_op: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_op: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    dtype: gl.constexpr = x.dtype.element_ty
    AP: gl.constexpr = padded(AL, 32)
    EP: gl.constexpr = padded(EL, 32)
    X: gl.constexpr = token_rows_layout(GB, BM, AP, W, True)
    Z: gl.constexpr = exchange_layout(GB * R, FB, BM)
    F_BLOCKS: gl.constexpr = (F + FB - 1) // FB
    BLOCKS: gl.constexpr = (G + GB - 1) // GB * F_BLOCKS
    pid = gl.program_id(0)
    part = pid // BLOCKS
    f0 = (pid % F_BLOCKS) * FB
    g0 = (pid % BLOCKS) // F_BLOCKS * GB
    step = gl.num_programs(0) // BLOCKS
    tiles = (N + BM - 1) // BM

    x_s = gl.allocate_shared_memory(dtype, [STAGES, GB, BM, AP], rows_layout(GB, BM, AP))
    dy_s = gl.allocate_shared_memory(dtype, [STAGES, FB, BM, EP], rows_layout(FB, BM, EP))
    x_g = x + g0 * AL
    dy_f = dy + f0 * EL
    tile = part
    for i in gl.static_range(STAGES - 1):
        copy_tile(x_s.index(i), x_g, tile + i * step, x_stride, N, G - g0, GB, BM, AP, AL, W)
        copy_tile(dy_s.index(i), dy_f, tile + i * step, dy_stride, N, F - f0, FB, BM, EP, EL, W)
        async_copy.commit_group()
    A_s = to_shared(to_places(load_first(A, f0, g0, G, AL, F, R, GB, FB, False, W)))
    B_t = load_second(B, f0, g0, G, F, EL, R, GB, FB, False, W)
    if B_SHARED:
        B_s = to_shared(B_t.permute([0, 2, 1]))
    else:
        B_r = gl.convert_layout(B_t, b_op)
    z_s = gl.allocate_shared_memory(dtype, [GB * R, FB, BM], Z)
    dz_s = gl.allocate_shared_memory(dtype, [GB * R, FB, BM], Z)
    dA = gl.zeros([GB, AP, R * FB], gl.float32, mma)
    dB = gl.zeros([FB, EP, GB * R], gl.float32, mma)
    gx = g0 + gl.arange(0, GB, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    nx = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    ax = gl.arange(0, AP, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
    dx_at = dx + gx * AL + ax + nx * (G * AL)
    slot = 0
    while tile < tiles:
        async_copy.wait_group(STAGES - 2)
        x_t = x_s.index(slot)
        dy_t = dy_s.index(slot)
        x_r = x_t.load(X)
        if GELU:
            x_r, slope = gelu_and_slope_of(x_r)
            slope = slope.to(dtype)
            x_t.store(x_r)
        x_r = gl.convert_layout(to_places(x_r.permute([0, 2, 1])).permute([0, 2, 1]), a_op)
        z = mma_v2(x_r, A_s.load(b_op), gl.zeros([GB, BM, R * FB], gl.float32, mma))
        z_s.reshape([GB, R * FB, BM]).permute([0, 2, 1]).store(z.to(dtype))
        if B_SHARED:
            B_r = B_s.permute([0, 2, 1]).load(b_op)
        dz = mma_v2(dy_t.load(a_op), B_r, gl.zeros([FB, BM, GB * R], gl.float32, mma))
        dz_s.permute([1, 2, 0]).store(dz.to(dtype))
        ahead = tile + (STAGES - 1) * step
        into = slot + (STAGES - 1)
        into = gl.where(into >= STAGES, into - STAGES, into)
        copy_tile(x_s.index(into), x_g, ahead, x_stride, N, G - g0, GB, BM, AP, AL, W)
        copy_tile(dy_s.index(into), dy_f, ahead, dy_stride, N, F - f0, FB, BM, EP, EL, W)
        async_copy.commit_group()
        dB = mma_v2(dy_t.permute([0, 2, 1]).load(a_op), z_s.permute([1, 2, 0]).load(b_op), dB)
        dz_g = dz_s.reshape([GB, R * FB, BM]).permute([0, 2, 1])
        dA = mma_v2(x_t.permute([0, 2, 1]).load(a_op), dz_g.load(b_op), dA)
        if DX:
            A_r = A_s.permute([0, 2, 1]).load(b_op)
            dx_t = mma_v2(dz_g.load(a_op), A_r, gl.zeros([GB, BM, AP], gl.float32, mma))
            dx_t = gl.convert_layout(from_places(dx_t), X)
            if GELU:
                dx_t = dx_t * slope.to(gl.float32)
            mask_x = (gx < G) & (ax < AL) & (tile * BM + nx < N)
            gl.store(dx_at + tile.to(gl.int64) * (BM * G * AL), dx_t.to(dtype), mask=mask_x)
        tile += step
        slot = gl.where(slot + 1 >= STAGES, 0, slot + 1)
    async_copy.wait_group(0)
    SIZE: gl.constexpr = R * (G * AL * F + F * G * EL)
    to = sums + part.to(gl.int64) * SIZE
    g = g0 + gl.arange(0, GB, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    a = gl.arange(0, AP, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
    rf = gl.arange(0, R * FB, gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    f = f0 + rf % FB
    gl.store(to + (g * AL + a) * (R * F) + rf // FB * F + f, dA, mask=(g < G) & (a < AL) & (f < F))
    f = f0 + gl.arange(0, FB, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    e = gl.arange(0, EP, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
    gr = g0 * R + gl.arange(0, GB * R, gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    gl.store(to + R * G * AL * F + (f * (G * R) + gr) * EL + e, dB, mask=(f < F) & (e < EL) & (gr < G * R))


# ---------------------------------------------------------------------------------------
# Launches

TOKENS = 16  # in a tile
BANDWIDTH, L2_BANDWIDTH = 2.3e12, 4.0e12  # bytes/s, reached on an H100 (results/kernels.md)


class Product(NamedTuple):
    """Launch shape of the product kernel."""

    slice: int  # FB, output blocks of a program
    chunks: int
    second_shared: bool
    stages: int  # chunks of x in shared memory; 0: the next chunk is kept in registers
    warps: int
    bytes: int  # that each token moves through L2


class Gradients(NamedTuple):
    """Launch shape of the gradient kernel."""

    g_slice: int  # GB
    f_slice: int  # FB
    with_dx: bool
    stages: int
    warps: int
    bytes: int  # that each token moves through L2

    def programs(self, sizes):
        """Number of slices of the cores."""
        return -(-sizes[0] // self.g_slice) * -(-sizes[2] // self.f_slice)


class Launches(NamedTuple):
    y: Product
    gradients: Gradients
    dx: Product | None  # None: the gradient kernel computes dx


def _pad(g, a, f, e):
    return pow2(g, 16), pow2(a, 32), pow2(f, 16), pow2(e, 32)


def _product(g, a, f, e, r):
    """Launch shape of a product kernel, or None if none fits."""
    G, A, F, E = _pad(g, a, f, e)
    for size in (16, 8):
        first, second = 2 * G * A * r * size, 2 * size * G * r * E
        z = 2 * G * r * size * TOKENS
        warps = 16 if size == 16 and first <= 65_536 else 8
        chunks = min(max(1, G * A * r // 1024), G // warps)  # of 32 KiB of x, less for higher ranks
        if F % size == 0 and chunks and first <= 131_072 and second + z <= SHARED_MEMORY and r * size >= 16:
            moved = 2 * (-(-f // size) * g * a + f * e)
            return Product(size, chunks, first + second > 98_304, 0, warps, moved)
    return None


def _gradients(g, a, f, e, r):
    """All launch shapes of the gradient kernel that fit."""
    G, A, F, E = _pad(g, a, f, e)
    for g_slice in (8, 16, 32):
        for f_slice in (8, 16, 32, 64):
            with_dx = f_slice == F
            warps = min(8 if with_dx else 16, g_slice, f_slice)
            sums = r * g_slice * f_slice * (A + E)
            core = 2 * r * g_slice * f_slice * A  # A; B is in registers
            tile = 2 * TOKENS * (g_slice * A + f_slice * E)
            z = 2 * 2 * TOKENS * g_slice * r * f_slice
            stages = min(3, (SHARED_MEMORY - core - z) // tile)
            fits = g_slice <= G and f_slice <= F and r * f_slice >= 16 and stages >= 2
            if fits and sums <= 4096 * min(warps, 8):  # which takes half of the registers
                moved = 2 * (-(-f // f_slice) * g * a + -(-g // g_slice) * f * e + (g * a if with_dx else 0))
                yield Gradients(g_slice, f_slice, with_dx, stages, warps, moved)


def launches(sizes):
    """The launches for a BTT of sizes (g, a, f, e, r) that move the fewest bytes through L2, or None if none fit."""
    # Every call of a layer asks. torch.compile traces the search, and not the cache.
    return _find_launches(sizes) if torch.compiler.is_compiling() else _known_launches(sizes)


def _find_launches(sizes):
    g, a, f, e, r = sizes
    if (
        max(g, a, f, e) > 64
        or min(g, f) < 16
        or min(a, e) < 24
        or any(size % 8 for size in (g, a, f, e))
        or r not in (1, 2, 4)
    ):
        return None
    y, dx = _product(g, a, f, e, r), _product(f, e, g, a, r)
    if y is None or dx is None:
        return None
    best, fewest = None, float("inf")
    for shape in _gradients(g, a, f, e, r):
        moved = shape.bytes + (0 if shape.with_dx else dx.bytes)
        if moved < fewest:  # torch.compile cannot trace min(key=...) of symbolic sizes
            best, fewest = Launches(y, shape, None if shape.with_dx else dx), moved
    return best


_known_launches = functools.cache(_find_launches)


def timed(sizes):
    """Whether all kernels of a layer of these sizes have been timed on a GPU (results/kernels.md), and were the fastest."""
    g, a, f, e, r = sizes
    return r == 1 and min(g * a, f * e) <= 1024 and all(size in (32, 64) for size in (g, a, f, e))


def expected_seconds(n, sizes):
    """Expected seconds of forward and backward for n tokens, from bytes. A padded layer counts as one of the padded sizes."""
    G, A, F, E = _pad(*sizes[:4])
    shapes, d_in, d_out = launches((G, A, F, E, sizes[4])), G * A, F * E
    moved = [(d_in + d_out, shapes.y), ((2 if shapes.gradients.with_dx else 1) * d_in + d_out, shapes.gradients)]
    if shapes.dx:
        moved.append((d_in + d_out, shapes.dx))
    return 6e-6 + sum(n * max(2 * memory / BANDWIDTH, shape.bytes / L2_BANDWIDTH) for memory, shape in moved)


def _aligned(x):
    """x (n, d), copied unless 16-byte accesses can read its rows."""
    fits = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _launch_product(x, first, second, sizes, shape, backward=False, after_gelu=False, u=None):
    g, a, f, e, r = sizes
    n, slices = len(x), -(-f // shape.slice)
    y = x.new_empty(n, f * e)
    programs = slices * max(1, min(triton.cdiv(n, TOKENS), multiprocessors(x) // slices))
    slope = u is not None
    u = u if slope else x
    product_kernel[(programs,)](
        x, first, second, y, u, n, x.stride(0), u.stride(0), G=g, AL=a, F=f, EL=e, R=r, BM=TOKENS, FB=shape.slice,
        CHUNKS=shape.chunks, SECOND_SHARED=shape.second_shared, BACKWARD=backward, GELU=after_gelu, SLOPE=slope,
        STAGES=shape.stages, W=shape.warps, num_warps=shape.warps,
    )  # fmt: skip
    return y


def forward(x, A, B, sizes, after_gelu):
    """x (n, g·a), cores A and B, contiguous, all of one 16-bit dtype -> W x or W gelu(x), (n, f·e). See `launches`."""
    return _launch_product(_aligned(x), A, B, sizes, launches(sizes).y, after_gelu=after_gelu)


def _launch_gradients(x, dy, A, B, dx, sizes, shape, parts, after_gelu, second_shared=False):
    """-> dA, dB. Also writes dx if shape.with_dx."""
    g, a, f, e, r = sizes
    sums = torch.empty(parts, A.numel() + B.numel(), dtype=torch.float32, device=x.device)
    gradients_kernel[(parts * shape.programs(sizes),)](
        x, dy, A, B, dx, sums, len(x), x.stride(0), dy.stride(0), G=g, AL=a, F=f, EL=e, R=r, BM=TOKENS, GB=shape.g_slice,
        FB=shape.f_slice, DX=shape.with_dx, GELU=after_gelu, B_SHARED=second_shared, STAGES=shape.stages, W=shape.warps,
        num_warps=shape.warps,
    )  # fmt: skip
    return sum_parts(sums, sums[:, A.numel() :], A, B)


def backward(x, dy, A, B, sizes, after_gelu):
    """Gradients of `forward`, given dy (n, f·e) -> dx, dA, dB"""
    x, dy, (g, a, f, e, r), (_, shape, product) = _aligned(x), _aligned(dy), sizes, launches(sizes)
    parts = max(1, min(triton.cdiv(len(x), TOKENS), multiprocessors(x) // shape.programs(sizes)))
    if product is None:
        dx = x.new_empty(len(x), g * a)
    else:
        dx = _launch_product(dy, B, A, (f, e, g, a, r), product, True, u=x if after_gelu else None)
    return dx, *_launch_gradients(x, dy, A, B, dx, sizes, shape, parts, after_gelu)
