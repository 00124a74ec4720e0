"""BTT-MoE and low-rank-MoE on a GPU: Triton kernels that compute only the picked experts.

Expert e is slice e of the rank index of a BTT. For a token with the set S of experts, the layer is a BTT of rank |S|,
made of the slices in S, with the gates between its two cores:

    z[n, g, j, f] = Σ_a x[n, g, a] · A[g, a, e_j, f]        y[n, f, e] = Σ_{g j} gate[n, j] · z[n, g, j, f] · B[f, g, e_j, e]

Tokens with the same set share all weights, so tokens are sorted by set; E = 8 experts have 28 sets of 2. For a tile of
one set the layer is a plain BTT of rank 2. Every token is in one tile, and no sums over experts go through memory. The
four kernels are those of btt.py's staged method, with gathered and scattered rows. Shapes do not depend on data: every
set has room for one partly filled tile. The gradient of a gate is computed from z before the gate, without a division.
Sums are float32 in a fixed order. A low-rank matrix is a BTT of one block (g = f = 1), too large for one program: it has
kernels of its own, which process it in parts.
"""

import functools
import math

import torch

from kernels.common import MAX_ROWS, multiprocessors, pow2, row_stride_of_z, takes_kernels, whole_rows
from kernels.routing import MOST_SETS, Plan, make_plan, route_rows, set_tables, tile_tokens

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_WIDTH = 512  # largest α and ε, for which tiles of x and dy fit in shared memory
MOST_SUMS = 32_768  # most float32 entries of a core's gradient that a program can hold
MOST_REGISTERS = {4: 128, 3: 168, 2: None}  # per thread, by the number of programs of 4 warps on a multiprocessor


def mixture_method(x, sizes, num_experts, k, own_router):
    """The method that computes a mixture of BTTs, top k of num_experts, for x (..., g·a):

    "routed"   routed_btt_mixture, whose kernels include the router, if no other layer shares it
    "picked"   btt_mixture, with index and gate from a router outside
    "grouped"  grouped.btt_moe, expert by expert, on any device

    sizes: kernels.btt.BTTSizes, r being the rank of one expert. own_router: whether the layer has a router of its own.
    """
    if not (takes_kernels(x) and kernels_fit(sizes, num_experts, k)):
        return "grouped"
    return "routed" if own_router and router_fits(sizes, num_experts) else "picked"


def kernels_fit(sizes, num_experts, k):
    """Whether the kernels have room for a layer: for all sets of k experts, and for its cores, or parts of them if low-rank."""
    g, a, f, e, r = sizes
    rows = pow2(k * r) * max(pow2(g), pow2(f))
    in_one_program = rows <= MAX_ROWS and rows * pow2(max(a, e)) <= MOST_SUMS and max(a, e) <= MOST_WIDTH
    return math.comb(num_experts, k) <= MOST_SETS and (in_one_program or g == f == 1)


def btt_mixture(x, A, B, index, gate, num_experts):
    """y of the experts that each token picked, weighed by their gates.

    x (n, g·a), A (g, a, E·r·f) with columns (expert, rank, f), B (f, g·E·r, e) with rows (g, expert, rank), all of one
    16-bit dtype; index (n, k) int64, no expert twice in a row; gate (n, k) -> y (n, f·e). The layer's mixture_method must be "picked".
    """
    index, ascending = index.sort(dim=1)
    gate = gate.gather(1, ascending).float()
    tokens = tile_tokens(len(x), math.comb(num_experts, index.shape[1]))
    plan = make_plan(index, gate, num_experts, tokens)
    low_rank = len(A) == len(B) == 1
    op = torch.ops.nanoeinsum.low_rank_mixture if low_rank else torch.ops.nanoeinsum.btt_mixture
    y, _ = op(x, A, B, gate, *plan, num_experts, tokens)
    return y


def routed_btt_mixture(x, W, bias, A, B, k, after_gelu=False):
    """btt_mixture of the k experts that the layer's own router picks -> y, and the router's index, gate and logits.

    The input is x, or with after_gelu gelu(x), which the kernels compute as they read x.
    W (E, g·a) float32, bias (E,) as in routing.route. The kernel for the gradient of x adds the router's part, so that it is
    written once. `gate` gets no gradient: a loss of the router must use its logits. The layer's mixture_method must be
    "routed".
    """
    y, logits, index, gate, *_ = torch.ops.nanoeinsum.routed_btt_mixture(x, W, bias, A, B, k, after_gelu)
    return y, index, gate, logits


def router_fits(sizes, num_experts):
    """Whether kernels that have room for a layer also have room for a block of the router's matrix."""
    return num_experts <= 16 and not sizes.g == sizes.f == 1


if triton is not None:
    from kernels.common import gelu_of_tile, gelu_slope_of_tile

    @triton.jit
    def _expert_ranks(sets, of_set, j, r, K: tl.constexpr, R: tl.constexpr):
        """Rank index in the core of rank r of slot j's expert."""
        return tl.load(sets + of_set * K + j, j < K, 0) * R + r

    @triton.jit
    def _a_columns(sets, of_set, c, F: tl.constexpr, FB: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
        """Columns of core A for rows c = (slot rank f) of z, where f < FB runs fastest, and a mask of rows that exist."""
        jr, f = c // FB, c % FB
        rank = _expert_ranks(sets, of_set, jr // R, jr % R, K, R)
        return rank * F + f, (jr < K * R) & (f < F)

    @triton.jit
    def _mixture_first_kernel(
        x, A, z, token, set_tiles, tile_set, sets, z_stride, x_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr, SETS: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        """z_g (slot·rank·f, place) = A_gᵀ x_gᵀ of one tile"""
        g, tile = tl.program_id(0) % G, tl.program_id(0) // G
        if tile < tl.load(set_tiles + SETS):
            a, c, column = tl.arange(0, AP), tl.arange(0, CB), tile * BM + tl.arange(0, BM)
            tokens = tl.load(token + column)
            columns, there = _a_columns(sets, tl.load(tile_set + tile), c, F, FB, K, R)
            mask_A = there[:, None] & (a[None, :] < AL)
            A_g = tl.load(A + (g * AL + a)[None, :] * (E * R * F) + columns[:, None], mask_A, 0.0)  # (CB, AP)
            mask_x = (tokens >= 0)[:, None] & (a[None, :] < AL)
            x_t = tl.load(x + tokens[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
            if GELU:
                x_t = gelu_of_tile(x_t)
            z_t = tl.dot(A_g, x_t.T).to(z.dtype.element_ty)  # (CB, BM)
            rows = z + (g * (K * R * F) + c // FB * F + c % FB)[:, None].to(tl.int64) * z_stride
            # Empty places, whose x is 0, get zeros, so that padding is never uninitialised.
            tl.store(rows + column[None, :], z_t, there[:, None])

    @triton.jit
    def _b_rows(sets, of_set, k, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KB: tl.constexpr):
        """Rows of core B for rows k = (g slot rank) of z, where slot·rank < KB runs fastest, and a mask of rows that exist."""
        g, jr = k // KB, k % KB
        rank = _expert_ranks(sets, of_set, jr // R, jr % R, K, R)
        return g * (E * R) + rank, (g < G) & (jr < K * R)

    @triton.jit
    def _by_row(gates, column, places, slot, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr):
        """Gates of a tile for each row of z, (KP, BM), with one load per slot instead of one per element."""
        result = tl.zeros((KP, BM), tl.float32)
        for j in tl.static_range(K):
            result = tl.where((slot == j)[:, None], tl.load(gates + j * places + column)[None, :], result)
        return result

    @triton.jit
    def _mixture_second_kernel(
        z, B, y, gates, token, set_tiles, tile_set, sets, z_stride, places,
        G: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        EP: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, SETS: tl.constexpr,
    ):  # fmt: skip
        """y_f (n, e) = (gate z_f)ᵀ B_f of one tile"""
        f, tile = tl.program_id(0) % F, tl.program_id(0) // F
        if tile < tl.load(set_tiles + SETS):
            k, e, column = tl.arange(0, KP), tl.arange(0, EP), tile * BM + tl.arange(0, BM)
            tokens = tl.load(token + column)
            rows, there = _b_rows(sets, tl.load(tile_set + tile), k, G, E, K, R, KB)
            mask_B = there[:, None] & (e[None, :] < EL)
            B_f = tl.load(B + (f * (G * E * R) + rows)[:, None] * EL + e[None, :], mask_B, 0.0)
            at = ((k // KB * (K * R) + k % KB) * F + f)[:, None].to(tl.int64) * z_stride
            z_t = tl.load(z + at + column[None, :], there[:, None], 0.0)
            z_t = (z_t * _by_row(gates, column, places, k % KB // R, K, KP, BM)).to(B.dtype.element_ty)  # (KP, BM)
            y_t = tl.dot(z_t.T, B_f).to(y.dtype.element_ty)  # (BM, EP)
            to = y + tokens[:, None].to(tl.int64) * (F * EL) + f * EL + e[None, :]
            tl.store(to, y_t, (tokens >= 0)[:, None] & (e[None, :] < EL))

    @triton.jit
    def _share(set_tiles, tile_set, part, SETS: tl.constexpr, PARTS: tl.constexpr):
        """The tiles of program `part` of PARTS, and their sets: (first tile, last tile + 1, first set, last set + 1)."""
        tiles = tl.load(set_tiles + SETS)
        size = tl.maximum(1, tl.cdiv(tiles, PARTS))
        start, stop = part * size, tl.minimum((part + 1) * size, tiles)
        first_set, last_set = tl.load(tile_set + start, start < stop, 0), tl.load(tile_set + stop - 1, start < stop, -1)
        return start, stop, first_set, last_set + 1

    @triton.jit
    def _mixture_second_backward_kernel(
        z, dy, B, dz, dB, shares, gates, token, set_tiles, tile_set, sets, z_stride, dy_stride, places,
        G: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        EP: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, JP: tl.constexpr, BM: tl.constexpr,
        BLOCKS: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """dz_f = gate B_f dy_fᵀ and dB_f = (gate z_f) dy_f for KP rows of z, set by set, and their share of the gates' gradients."""
        pid = tl.program_id(0)
        block, f, part = pid % BLOCKS, pid // BLOCKS % F, pid // (BLOCKS * F)
        k, e, j = block * KP + tl.arange(0, KP), tl.arange(0, EP), tl.arange(0, JP)
        slot = k % KB // R
        own = (slot[:, None] == j[None, :])[:, :, None]
        at = z + ((k // KB * (K * R) + k % KB) * F + f).to(tl.int64) * z_stride
        to = dz + ((k // KB * (K * R) + k % KB) * F + f).to(tl.int64) * z_stride
        start, stop, set_0, set_1 = _share(set_tiles, tile_set, part, SETS, PARTS)
        for of_set in tl.range(set_0, set_1):
            rows, there = _b_rows(sets, of_set, k, G, E, K, R, KB)
            mask_B = there[:, None] & (e[None, :] < EL)
            B_f = tl.load(B + (f * (G * E * R) + rows)[:, None] * EL + e[None, :], mask_B, 0.0)
            dB_f = tl.zeros((KP, JP * EP), tl.float32)
            first, end = tl.load(set_tiles + of_set), tl.load(set_tiles + of_set + 1)
            for tile in tl.range(tl.maximum(first, start), tl.minimum(end, stop)):
                column = tile * BM + tl.arange(0, BM)
                tokens = tl.load(token + column)
                mask_y = (tokens >= 0)[:, None] & (e[None, :] < EL)
                dy_t = tl.load(dy + tokens[:, None].to(tl.int64) * dy_stride + f * EL + e[None, :], mask_y, 0.0)
                z_t = tl.load(at[:, None] + column[None, :], there[:, None], 0.0)  # (KP, BM)
                gate = tl.load(gates + j[None, :] * places + column[:, None], (j < K)[None, :], 0.0)  # (BM, JP)
                # z goes from memory to the tensor cores unchanged. Instead, dy is multiplied by the gate of each slot;
                # each row of z is multiplied by all these products and keeps that of its own slot.
                gated = (dy_t[:, None, :] * gate[:, :, None]).to(dy_t.dtype).reshape(BM, JP * EP)
                dB_f = tl.dot(z_t, gated, dB_f)
                d_gated = tl.dot(dy_t, B_f.T)  # (BM, KP), tokens first, so that sums over rows of z stay within a warp
                share, of_row = d_gated * z_t.T, tl.zeros((BM, KP), tl.float32)
                for i in tl.static_range(K):
                    mine = (slot == i)[None, :]
                    of_slot = tl.sum(tl.where(mine, share, 0.0), 1)
                    tl.store(shares + ((f * BLOCKS + block) * K + i).to(tl.int64) * places + column, of_slot)
                    of_row = tl.where(mine, tl.load(gates + i * places + column)[:, None], of_row)
                tl.store(to[None, :] + column[:, None], (d_gated * of_row).to(dz.dtype.element_ty), there[None, :])
            dB_own = tl.sum(tl.where(own, dB_f.reshape(KP, JP, EP), 0.0), 1)
            # (part + set, f, slot, g, rank, e)
            to_B = ((part + of_set) * F + f) * (K * G * R) + slot * (G * R) + k // KB * R + k % KB % R
            tl.store(dB + to_B[:, None].to(tl.int64) * EL + e[None, :], dB_own, mask_B)

    @triton.jit
    def _router_gradient_kernel(
        shares, gates, dlogits, out, token, set_tiles, tile_set, sets, places,
        F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr,
        SETS: tl.constexpr, MORE: tl.constexpr,
    ):  # fmt: skip
        """out (n, QP): gradient of the logits from that of the gates, plus dlogits if MORE: rounded to 16 bits, and the rounding error."""
        tile, q, f = tl.program_id(0), tl.arange(0, QP), tl.arange(0, FP)
        if tile < tl.load(set_tiles + SETS):
            of_set, column = tl.load(tile_set + tile), tile * BM + tl.arange(0, BM)
            tokens = tl.load(token + column)
            mean = tl.zeros((BM,), tl.float32)
            of_expert, gate = tl.zeros((BM, QP), tl.float32), tl.zeros((BM, QP), tl.float32)
            for j in tl.static_range(K):
                at = (f * K + j)[:, None].to(tl.int64) * places + column[None, :]
                of_slot = tl.sum(tl.load(shares + at, (f < F)[:, None], 0.0), 0)
                gate_j = tl.load(gates + j * places + column)
                mine = (q % E == tl.load(sets + of_set * K + j))[None, :]
                of_expert = tl.where(mine, of_slot[:, None], of_expert)
                gate = tl.where(mine, gate_j[:, None], gate)
                mean += gate_j * of_slot
            d = gate * (of_expert - mean[:, None])
            there = (tokens >= 0)[:, None] & (q < 2 * E)[None, :]
            if MORE:
                d += tl.load(dlogits + tokens[:, None].to(tl.int64) * E + (q % E)[None, :], there, 0.0)
            high = d.to(out.dtype.element_ty)
            d = tl.where((q < E)[None, :], high, (d - high.to(tl.float32)).to(high.dtype))
            d = tl.where((q < 2 * E)[None, :], d, tl.zeros_like(d))
            tl.store(out + tokens[:, None].to(tl.int64) * QP + q[None, :], d, (tokens >= 0)[:, None])

    @triton.jit
    def _mixture_first_backward_kernel(
        dz, x, A, dx, dA, d, W, dW, token, set_tiles, tile_set, sets, z_stride, x_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr,
        SETS: tl.constexpr, PARTS: tl.constexpr, ROUTER: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        """dx_g (n, a) = dz_gᵀ A_gᵀ and dA_gᵀ = dz_g x_g, set by set. If ROUTER, also dx_g += d W_g and dW_g = dᵀ x_g."""
        pid = tl.program_id(0)
        g, part = pid % G, pid // G
        a, c, q = tl.arange(0, AP), tl.arange(0, CB), tl.arange(0, QP)
        at = dz + (g * (K * R * F) + c // FB * F + c % FB).to(tl.int64) * z_stride
        at_W = q[:, None] * (G * AL) + g * AL + a[None, :]
        dW_g = tl.zeros((QP, AP), tl.float32)
        if ROUTER:  # once for the logits' gradient in 16 bits, once for its rounding error
            W_g = tl.load(W + (q % E)[:, None] * (G * AL) + g * AL + a[None, :], (a < AL)[None, :], 0.0)
            W_g = W_g.to(x.dtype.element_ty)  # (QP, AP)
        start, stop, set_0, set_1 = _share(set_tiles, tile_set, part, SETS, PARTS)
        for of_set in tl.range(set_0, set_1):
            columns, there = _a_columns(sets, of_set, c, F, FB, K, R)
            mask_A = there[:, None] & (a[None, :] < AL)
            A_g = tl.load(A + (g * AL + a)[None, :] * (E * R * F) + columns[:, None], mask_A, 0.0)  # (CB, AP)
            dA_g = tl.zeros((CB, AP), tl.float32)
            first, end = tl.load(set_tiles + of_set), tl.load(set_tiles + of_set + 1)
            for tile in tl.range(tl.maximum(first, start), tl.minimum(end, stop)):
                column = tile * BM + tl.arange(0, BM)
                tokens = tl.load(token + column)
                dz_t = tl.load(at[:, None] + column[None, :], there[:, None], 0.0)
                mask_x = (tokens >= 0)[:, None] & (a[None, :] < AL)
                before = tl.load(x + tokens[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
                x_t = gelu_of_tile(before) if GELU else before
                dx_t = tl.dot(dz_t.T, A_g)  # (BM, AP)
                dA_g = tl.dot(dz_t, x_t, dA_g)
                if ROUTER:
                    d_t = tl.load(d + tokens[:, None].to(tl.int64) * QP + q[None, :], (tokens >= 0)[:, None], 0.0)
                    dx_t = tl.dot(d_t, W_g, dx_t)
                    dW_g = tl.dot(d_t.T, x_t, dW_g)
                if GELU:
                    dx_t *= gelu_slope_of_tile(before)
                to = dx + tokens[:, None].to(tl.int64) * (G * AL) + g * AL + a[None, :]
                tl.store(to, dx_t.to(dx.dtype.element_ty), mask_x)
            # (part + set, g, slot, a, rank, f)
            slot, r = c // FB // R, c // FB % R
            to_A = (((part + of_set) * G + g) * K + slot).to(tl.int64) * (AL * R * F) + r * F + c % FB
            tl.store(dA + to_A[:, None] + a[None, :] * (R * F), dA_g, mask_A)
        if ROUTER:
            tl.store(dW + part.to(tl.int64) * (QP * G * AL) + at_W, dW_g, (a < AL)[None, :])

    @triton.jit
    def _sum_experts_kernel(
        sums, set_tiles, members, out, BLOCKS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
        E: tl.constexpr, K: tl.constexpr, MEMBERS: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr, BS: tl.constexpr,
    ):  # fmt: skip
        """out (block, outer, expert, inner): sums (part + set, block, slot, outer, inner) of all sets with this expert, in order."""
        expert, i = tl.program_id(0) % E, tl.program_id(0) // E * BS + tl.arange(0, BS)
        block, rest = i // (OUTER * INNER), i % (OUTER * INNER)
        size = tl.maximum(1, tl.cdiv(tl.load(set_tiles + SETS), PARTS))  # tiles of a part, as in _share
        total = tl.zeros((BS,), tl.float32)
        for m in tl.range(0, MEMBERS):
            member = tl.load(members + expert * MEMBERS + m)
            of_set = member // K
            first, end = tl.load(set_tiles + of_set), tl.load(set_tiles + of_set + 1)
            for part in tl.range(first // size, tl.where(first < end, (end - 1) // size + 1, first // size)):
                row = ((part + of_set).to(tl.int64) * BLOCKS + block) * K + member % K
                total += tl.load(sums + row * (OUTER * INNER) + rest, block < BLOCKS, 0.0)
        to = (block * OUTER + rest // INNER) * (E * INNER) + expert * INNER + rest % INNER
        tl.store(out + to, total.to(out.dtype.element_ty), block < BLOCKS)


def _sizes(x, A, B, num_experts):
    (g, a, _), (f, _, e) = A.shape, B.shape
    return g, a, f, e, A.shape[2] // (num_experts * f)


def _row_sizes(g, f, slots):
    """Rows of z in a program, padded: (g slot·rank) of one f, and (slot·rank f) of one g."""
    return max(16, pow2(g) * pow2(slots)), max(16, pow2(slots) * pow2(f))


def _outputs(x, A, B, plan, num_experts):
    """Uninitialised y, and z (g·slot·rank·f, places) for backward."""
    g, _, f, e, r = _sizes(x, A, B, num_experts)
    return x.new_empty(x.shape[0], f * e), x.new_empty(g * len(plan.gate) * r * f, row_stride_of_z(len(plan.token)))


def _forward(x, A, B, plan, num_experts, tokens, after_gelu=False):
    """-> y, z"""
    y, z = _outputs(x, A, B, plan, num_experts)
    if len(x) == 0:
        return y, z
    g, a, f, e, r = _sizes(x, A, B, num_experts)
    (k, places), tiles = plan.gate.shape, len(plan.tile_set)
    rows, columns = _row_sizes(g, f, k * r)
    sets = set_tables(num_experts, k, x.device).sets
    shape = dict(E=num_experts, K=k, R=r, BM=tokens, SETS=len(sets), num_warps=4 if max(rows, columns) <= 128 else 8)
    tables = plan.token, plan.set_tiles, plan.tile_set, sets, z.stride(0)
    _mixture_first_kernel[(g * tiles,)](
        x, A, z, *tables, x.stride(0), G=g, AL=a, F=f, AP=pow2(a, 16), FB=pow2(f), CB=columns, GELU=after_gelu, **shape
    )  # fmt: skip
    _mixture_second_kernel[(f * tiles,)](
        z, B, y, plan.gate, *tables, places, G=g, F=f, EL=e, EP=pow2(e, 16), KB=pow2(k * r), KP=rows, **shape
    )
    return y, z


def _backward(x, dy, z, A, B, plan, num_experts, tokens, W=None, dlogits=None, after_gelu=False):
    """-> dx, dA, dB, dgate (n, k). For a layer with router W: dx including the router's part, dA, dB, dW.

    dlogits (n, E) or None: gradient of the router's logits from other losses.
    """
    (g, a, f, e, r), E = _sizes(x, A, B, num_experts), num_experts
    (k, places), tiles = plan.gate.shape, len(plan.tile_set)
    sets, members, _ = set_tables(E, k, x.device)
    dx, n_sets = x.new_empty(len(x), g * a), len(sets)
    if len(x) == 0:
        of_router = plan.gate.new_empty(0, k) if W is None else torch.zeros_like(W)
        return dx, torch.zeros_like(A), torch.zeros_like(B), of_router
    rows, columns = _row_sizes(g, f, k * r)
    shape = dict(G=g, F=f, E=E, K=k, R=r, BM=tokens, SETS=n_sets)
    tables = plan.token, plan.set_tiles, plan.tile_set, sets

    def empty(*size):
        return torch.empty(size, dtype=torch.float32, device=x.device)

    blocks, width = max(1, rows // 64), pow2(k) * pow2(e, 16)  # width: sums per row of z, over all slots
    resident = 4 if width <= 64 else 3 if width <= 128 else 2
    parts = _parts(f * blocks, tiles, resident, x)
    dz, shares, sums_B = torch.empty_like(z), empty(f * blocks, k, places), empty(parts + n_sets, f, k, g * r * e)
    _mixture_second_backward_kernel[(blocks * f * parts,)](
        z, dy, B, dz, sums_B, shares, plan.gate, *tables, z.stride(0), dy.stride(0), places,
        EL=e, EP=pow2(e, 16), KB=pow2(k * r), KP=rows // blocks, JP=pow2(k), BLOCKS=blocks, PARTS=parts, **shape,
        num_warps=4 if width <= 256 else 8, maxnreg=MOST_REGISTERS[resident],
    )  # fmt: skip
    dB = _sum_experts(sums_B, plan.set_tiles, members, torch.empty_like(B), (f, g, r * e), parts)

    routed, width, sums = W is not None, pow2(2 * E, 16), columns * pow2(a, 16)
    resident = 4 if sums <= 2048 else 3 if sums <= 4096 else 2
    parts = _parts(g, tiles, resident, x)
    sums_A = empty(parts + n_sets, g, k, a * r * f)
    if not routed:
        d = W = sums_W = x
    else:
        d, W, sums_W = x.new_empty(len(x), width), W.contiguous(), empty(parts, width, g * a)
        _router_gradient_kernel[(tiles,)](
            shares, plan.gate, shares if dlogits is None else dlogits, d, *tables, places, F=f * blocks, K=k, E=E,
            FP=pow2(f * blocks), QP=width, BM=tokens, SETS=n_sets, MORE=dlogits is not None,
        )  # fmt: skip
    _mixture_first_backward_kernel[(g * parts,)](
        dz, x, A, dx, sums_A, d, W, sums_W, *tables, z.stride(0), x.stride(0),
        AL=a, AP=pow2(a, 16), FB=pow2(f), CB=columns, QP=width, PARTS=parts, ROUTER=routed, GELU=after_gelu,
        **shape, num_warps=4 if columns <= 128 else 8, maxnreg=MOST_REGISTERS[resident],
    )  # fmt: skip
    dA = _sum_experts(sums_A, plan.set_tiles, members, torch.empty_like(A), (g, a, r * f), parts)
    if not routed:
        return dx, dA, dB, _gate_gradient(shares.sum(0), plan)
    high, low = sums_W.sum(0)[: 2 * E].chunk(2)
    return dx, dA, dB, (high + low).to(W.dtype)


def _gate_gradient(shares, plan):
    """Gradients of the gates by slot and place, (k, places) -> by token, (n, k)."""
    return shares[:, plan.place.long()].t().contiguous()


def _parts(blocks, tiles, resident, tensor):
    """Number of programs that share the tiles: all run at once, `resident` on a multiprocessor, with equally many tiles each.

    Tiles are distributed regardless of their sets, because a few sets may have most of the tokens.
    """
    return max(1, min(tiles, resident * multiprocessors(tensor) // blocks))


def _sum_experts(sums, set_tiles, members, out, sizes, parts):
    """Fill `out`, whose axes are (block, outer, expert, inner), from sums (part + set, block, slot, outer · inner).

    Along the tiles neither part nor set decreases, so that part + set differs for all pairs that occur.
    """
    (blocks, outer, inner), size = sizes, 512
    E, count = members.shape
    _sum_experts_kernel[(E * triton.cdiv(blocks * outer * inner, size),)](
        sums, set_tiles, members, out, BLOCKS=blocks, OUTER=outer, INNER=inner, E=E, K=sums.shape[2], MEMBERS=count,
        SETS=len(set_tiles) - 1, PARTS=parts, BS=size,
    )  # fmt: skip
    return out


@torch.library.custom_op("nanoeinsum::btt_mixture", mutates_args=())
def _btt(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, token: torch.Tensor, gates: torch.Tensor,
    place: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> y, z. The argument `gate` only receives the gradient; its values are in `gates`."""
    plan = Plan(token, gates, place, set_tiles, tile_set)
    return _forward(whole_rows(x), A.contiguous(), B.contiguous(), plan, num_experts, tokens)


@_btt.register_fake
def _forward_shapes(x, A, B, gate, token, gates, place, set_tiles, tile_set, num_experts, tokens):
    return _outputs(x, A, B, Plan(token, gates, place, set_tiles, tile_set), num_experts)


@torch.library.custom_op("nanoeinsum::btt_mixture_backward", mutates_args=())
def _btt_backward(
    x: torch.Tensor, dy: torch.Tensor, z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, token: torch.Tensor,
    gates: torch.Tensor, place: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, dA, dB, dgate"""
    plan = Plan(token, gates, place, set_tiles, tile_set)
    return _backward(whole_rows(x), whole_rows(dy), z, A.contiguous(), B.contiguous(), plan, num_experts, tokens)


@_btt_backward.register_fake
def _gradient_shapes(x, dy, z, A, B, token, gates, place, *_):
    dgate = gates.new_empty(place.shape[0], gates.shape[0])
    return *(tensor.new_empty(tensor.shape) for tensor in (x, A, B)), dgate


def _setup(ctx, inputs, output):
    x, A, B, _, *plan, ctx.num_experts, ctx.tokens = inputs
    ctx.save_for_backward(x, output[1], A, B, *plan)
    ctx.set_materialize_grads(False)


def _gradients(op, ctx, dy, _):
    x, *saved = ctx.saved_tensors
    return *op(x, dy, *saved, ctx.num_experts, ctx.tokens), *[None] * 7


_btt.register_autograd(functools.partial(_gradients, _btt_backward), setup_context=_setup)


@torch.library.custom_op("nanoeinsum::routed_btt_mixture", mutates_args=())
def _routed(
    x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, A: torch.Tensor, B: torch.Tensor, k: int, after_gelu: bool
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """-> y, logits, index, gate, and for backward z and the plan"""
    x, E = whole_rows(x), len(W)
    logits, index, gate = route_rows(x, W, bias, k, after_gelu)
    tokens = tile_tokens(len(x), math.comb(E, k))
    plan = make_plan(index, gate, E, tokens)
    y, z = _forward(x, A.contiguous(), B.contiguous(), plan, E, tokens, after_gelu)
    return y, logits, index, gate, z, *plan


@_routed.register_fake
def _(x, W, bias, A, B, k, after_gelu):
    E = len(W)
    logits, index, gate = torch.ops.nanoeinsum.route(x, W, bias, k)
    plan = make_plan(index, gate, E, tile_tokens(x.shape[0], math.comb(E, k)))
    y, z = _outputs(x, A, B, plan, E)
    return y, logits, index, gate, z, *plan


@torch.library.custom_op("nanoeinsum::routed_btt_mixture_backward", mutates_args=())
def _routed_backward(
    x: torch.Tensor, dy: torch.Tensor, dlogits: torch.Tensor | None, z: torch.Tensor, W: torch.Tensor, A: torch.Tensor,
    B: torch.Tensor, token: torch.Tensor, gates: torch.Tensor, place: torch.Tensor, set_tiles: torch.Tensor,
    tile_set: torch.Tensor, after_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, dA, dB, dW"""
    plan, E = Plan(token, gates, place, set_tiles, tile_set), len(W)
    tokens = tile_tokens(len(x), math.comb(E, len(gates)))
    dlogits = None if dlogits is None else dlogits.contiguous()
    return _backward(
        whole_rows(x), whole_rows(dy), z, A.contiguous(), B.contiguous(), plan, E, tokens, W, dlogits, after_gelu
    )


@_routed_backward.register_fake
def _(x, dy, dlogits, z, W, A, B, *plan):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, A, B, W))


def _routed_setup(ctx, inputs, output):
    x, W, _, A, B, _, ctx.after_gelu = inputs
    _, _, _, _, z, *plan = output
    ctx.save_for_backward(x, z, W, A, B, *plan)
    ctx.set_materialize_grads(False)


def _routed_gradients(ctx, dy, dlogits, *_):
    x, z, *saved = ctx.saved_tensors
    if dy is None:  # the loss depends on the router alone
        dy = x.new_zeros(x.shape[0], saved[2].shape[0] * saved[2].shape[2])
    dx, dA, dB, dW = torch.ops.nanoeinsum.routed_btt_mixture_backward(x, dy, dlogits, z, *saved, ctx.after_gelu)
    return dx, dW, None, dA, dB, None, None


_routed.register_autograd(_routed_gradients, setup_context=_routed_setup)


# ---------------------------------------------------------------------------------------
# Low-rank mixtures: x (n, a), A (a, E·r), B (E·r, e), without the block axes of size 1. Three kernels, each used twice:
#
#     _to_ranks_kernel        z = A_Sᵀ xᵀ                   dz = gate B_S dyᵀ, and the gates' gradients
#     _from_ranks_kernel      y = (gate z)ᵀ B_S             dx = dzᵀ A_Sᵀ
#     _core_gradient_kernel   dA_Sᵀ = dz x                  dB_S = (gate z) dy

if triton is not None:

    @triton.jit
    def _to_ranks_kernel(
        rows, core, out, z, gates, shares, token, set_tiles, tile_set, sets, row_stride, rank_stride, width_stride,
        z_stride, places, SETS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """out (slot·rank, place) = core_S rowsᵀ, for one tile of tokens and CB ranks of one slot. core: (ranks, D) with any strides."""
        C_BLOCKS: tl.constexpr = (R + CB - 1) // CB
        block, tile = tl.program_id(0) % (K * C_BLOCKS), tl.program_id(0) // (K * C_BLOCKS)
        j, c = block // C_BLOCKS, block % C_BLOCKS * CB + tl.arange(0, CB)
        if tile < tl.load(set_tiles + SETS):
            column = tile * BM + tl.arange(0, BM)
            tokens = tl.load(token + column)
            inside = tokens >= 0
            expert = tl.load(sets + tl.load(tile_set + tile) * K + j)
            sums = tl.zeros((CB, BM), tl.float32)
            for start in tl.range(0, D, DB):
                d = start + tl.arange(0, DB)
                at_core = (expert * R + c)[:, None] * rank_stride + d[None, :] * width_stride
                core_t = tl.load(core + at_core, (c < R)[:, None] & (d < D)[None, :], 0.0)  # (CB, DB)
                at_rows = tokens[:, None].to(tl.int64) * row_stride + d[None, :]
                rows_t = tl.load(rows + at_rows, inside[:, None] & (d < D)[None, :], 0.0)  # (BM, DB)
                sums = tl.dot(core_t, rows_t.T, sums)
            at = (j * R + c)[:, None].to(tl.int64) * z_stride + column[None, :]
            if BACKWARD:
                z_t = tl.load(z + at, (c < R)[:, None], 0.0)
                tl.store(shares + block * places + column, tl.sum(sums * z_t, 0))
                sums *= tl.load(gates + j * places + column)[None, :]
            tl.store(out + at, sums.to(out.dtype.element_ty), (c < R)[:, None])

    @triton.jit
    def _from_ranks_kernel(
        z, core, out, gates, token, set_tiles, tile_set, sets, rank_stride, width_stride, z_stride, places,
        SETS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """out (n, d) = zᵀ core_S, for one tile of tokens and DB of the D columns; each slot times its gate if GATED."""
        D_BLOCKS: tl.constexpr = (D + DB - 1) // DB
        tile, d = tl.program_id(0) // D_BLOCKS, tl.program_id(0) % D_BLOCKS * DB + tl.arange(0, DB)
        if tile < tl.load(set_tiles + SETS):
            column = tile * BM + tl.arange(0, BM)
            tokens = tl.load(token + column)
            sums = tl.zeros((BM, DB), tl.float32)
            for j in tl.static_range(K):
                expert = tl.load(sets + tl.load(tile_set + tile) * K + j)
                of_slot = tl.zeros((BM, DB), tl.float32)
                for start in tl.range(0, R, CB):
                    c = start + tl.arange(0, CB)
                    at = (j * R + c)[:, None].to(tl.int64) * z_stride + column[None, :]
                    z_t = tl.load(z + at, (c < R)[:, None], 0.0)  # (CB, BM)
                    at_core = (expert * R + c)[:, None] * rank_stride + d[None, :] * width_stride
                    core_t = tl.load(core + at_core, (c < R)[:, None] & (d < D)[None, :], 0.0)  # (CB, DB)
                    of_slot = tl.dot(z_t.T, core_t, of_slot)
                if GATED:
                    of_slot *= tl.load(gates + j * places + column)[:, None]
                sums += of_slot
            to = out + tokens[:, None].to(tl.int64) * D + d[None, :]
            tl.store(to, sums.to(out.dtype.element_ty), (tokens >= 0)[:, None] & (d < D)[None, :])

    @triton.jit
    def _core_gradient_kernel(
        z, rows, sums, gates, token, set_tiles, tile_set, row_stride, z_stride, places,
        D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """sums (part + set, slot·rank, d) = z rows, set by set; z times the gate if GATED."""
        D_BLOCKS: tl.constexpr = (D + DB - 1) // DB
        C_BLOCKS: tl.constexpr = (R + CB - 1) // CB
        pid = tl.program_id(0)
        d = pid % D_BLOCKS * DB + tl.arange(0, DB)
        j = pid // (D_BLOCKS * C_BLOCKS) % K
        c = pid // D_BLOCKS % C_BLOCKS * CB + tl.arange(0, CB)
        part = pid // (D_BLOCKS * C_BLOCKS * K)
        start, stop, set_0, set_1 = _share(set_tiles, tile_set, part, SETS, PARTS)
        for of_set in tl.range(set_0, set_1):
            total = tl.zeros((CB, DB), tl.float32)
            first, end = tl.load(set_tiles + of_set), tl.load(set_tiles + of_set + 1)
            for tile in tl.range(tl.maximum(first, start), tl.minimum(end, stop)):
                column = tile * BM + tl.arange(0, BM)
                tokens = tl.load(token + column)
                at = (j * R + c)[:, None].to(tl.int64) * z_stride + column[None, :]
                z_t = tl.load(z + at, (c < R)[:, None], 0.0)  # (CB, BM)
                if GATED:
                    z_t = (z_t * tl.load(gates + j * places + column)[None, :]).to(z_t.dtype)
                at_rows = tokens[:, None].to(tl.int64) * row_stride + d[None, :]
                rows_t = tl.load(rows + at_rows, (tokens >= 0)[:, None] & (d < D)[None, :], 0.0)  # (BM, DB)
                total = tl.dot(z_t, rows_t, total)
            to = ((part + of_set) * (K * R) + j * R + c)[:, None].to(tl.int64) * D + d[None, :]
            tl.store(sums + to, total, (c < R)[:, None] & (d < D)[None, :])


def _rank_block(r):
    """CB: number of ranks of one expert that a program processes at a time."""
    return min(64, pow2(r, 16))


@torch.library.custom_op("nanoeinsum::low_rank_mixture", mutates_args=())
def _low_rank(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, token: torch.Tensor, gates: torch.Tensor,
    place: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> y, and z (slot·rank, places) for backward"""
    x, A, B, plan = whole_rows(x), A.contiguous(), B.contiguous(), Plan(token, gates, place, set_tiles, tile_set)
    y, z = _outputs(x, A, B, plan, num_experts)
    if len(x) == 0:
        return y, z
    _, a, _, e, r = _sizes(x, A, B, num_experts)
    (k, places), tiles, block = gates.shape, len(tile_set), _rank_block(r)
    sets = set_tables(num_experts, k, x.device).sets
    shape = dict(K=k, R=r, CB=block, BM=tokens, SETS=len(sets), num_warps=4)
    _to_ranks_kernel[(k * triton.cdiv(r, block) * tiles,)](
        x, A, z, z, gates, z, token, set_tiles, tile_set, sets, x.stride(0), 1, num_experts * r, z.stride(0), places,
        D=a, DB=64, BACKWARD=False, **shape,
    )  # fmt: skip
    _from_ranks_kernel[(triton.cdiv(e, 128) * tiles,)](
        z, B, y, gates, token, set_tiles, tile_set, sets, e, 1, z.stride(0), places, D=e, DB=128, GATED=True, **shape
    )
    return y, z


_low_rank.register_fake(_forward_shapes)


@torch.library.custom_op("nanoeinsum::low_rank_mixture_backward", mutates_args=())
def _low_rank_backward(
    x: torch.Tensor, dy: torch.Tensor, z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, token: torch.Tensor,
    gates: torch.Tensor, place: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, dA, dB, dgate"""
    x, dy, A, B = whole_rows(x), whole_rows(dy), A.contiguous(), B.contiguous()
    _, a, _, e, r = _sizes(x, A, B, num_experts)
    (k, places), tiles, block = gates.shape, len(tile_set), _rank_block(r)
    sets, members, _ = set_tables(num_experts, k, x.device)
    dx = x.new_empty(len(x), a)
    if len(x) == 0:
        return dx, torch.zeros_like(A), torch.zeros_like(B), gates.new_empty(0, k)
    dz, blocks, n_sets = torch.empty_like(z), triton.cdiv(r, block), len(sets)
    shares = torch.empty(k, blocks, places, dtype=torch.float32, device=x.device)
    shape = dict(K=k, R=r, CB=block, BM=tokens, SETS=n_sets, num_warps=4)
    _to_ranks_kernel[(k * blocks * tiles,)](
        dy, B, dz, z, gates, shares, token, set_tiles, tile_set, sets, dy.stride(0), e, 1, z.stride(0), places,
        D=e, DB=64, BACKWARD=True, **shape,
    )  # fmt: skip
    _from_ranks_kernel[(triton.cdiv(a, 128) * tiles,)](
        dz, A, dx, gates, token, set_tiles, tile_set, sets, 1, num_experts * r, z.stride(0), places,
        D=a, DB=128, GATED=False, **shape,
    )  # fmt: skip

    def core_gradient(z, rows, gated):
        """-> (E, r, width)"""
        width = rows.shape[1]
        programs = triton.cdiv(width, 128) * blocks * k
        parts = _parts(programs, tiles, 3, x)
        sums = torch.empty(parts + n_sets, 1, k, r * width, dtype=torch.float32, device=x.device)
        _core_gradient_kernel[(programs * parts,)](
            z, rows, sums, gates, token, set_tiles, tile_set, rows.stride(0), z.stride(0), places,
            D=width, DB=128, PARTS=parts, GATED=gated, **shape,
        )  # fmt: skip
        return _sum_experts(sums, set_tiles, members, x.new_empty(num_experts, r, width), (1, 1, r * width), parts)

    dA = core_gradient(dz, x, False).permute(2, 0, 1).reshape(A.shape)
    dB = core_gradient(z, dy, True).view(B.shape)
    return dx, dA.contiguous(), dB, _gate_gradient(shares.sum(1), Plan(token, gates, place, set_tiles, tile_set))


_low_rank_backward.register_fake(_gradient_shapes)
_low_rank.register_autograd(functools.partial(_gradients, _low_rank_backward), setup_context=_setup)
