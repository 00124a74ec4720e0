"""BTT-MoE and low-rank-MoE on a GPU: Triton kernels that compute only the experts that were picked.

Expert e is slice e of the rank index of a BTT. A token whose experts are the set S passes a BTT of rank |S|, made of
the slices in S, with its gates between the two cores:

    z[n, g, j, f] = Σ_a x[n, g, a] · A[g, a, e_j, f]        y[n, f, e] = Σ_{g j} gate[n, j] · z[n, g, j, f] · B[f, g, e_j, e]

Tokens with the same set share all weights. So tokens are sorted by set: of E = 8 experts there are 28 sets of 2. A tile
of them is a plain BTT of rank 2, every token is in one tile, and nothing is added up between experts in memory. The
four kernels are those of kernels.py's staged way, with rows gathered and scattered. Shapes depend on no data: there is
room for a partly filled tile a set. Gradients of the gates come from the z before the gate, nothing is divided by it.
Sums are float32 in a fixed order. A low-rank matrix is a BTT of one block (g = f = 1), too large for one program: it has
kernels of its own, which go through it in parts. Imports from kernels.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch

from kernels import MAX_ROWS, _multiprocessors, _pow2, _rows, _z_stride

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_SETS = 128  # of experts: with more of them tiles stay nearly empty
MOST_SUMS = 32_768  # of a core's gradient, float32, that a program can hold


class Plan(NamedTuple):
    """Tokens sorted by their set of experts, in tiles of one set each. T tiles of BM tokens, some of them empty."""

    order: torch.Tensor  # (n,) int32: token at each place of the sorted list
    first: torch.Tensor  # (T,) int32: place of the tile's first token
    end: torch.Tensor  # (T,) int32: place behind the last token of the tile's set
    set_tiles: torch.Tensor  # (sets + 1,) int32: number of each set's first tile
    tile_set: torch.Tensor  # (T,) int32
    sets: torch.Tensor  # (sets, k) int32: experts of a set, ascending


@functools.cache
def _sets(num_experts, k, device):
    """All sets of k experts in the order of their number, (sets, k), and addends (k, num_experts) whose sum is that number."""
    sets = sorted(itertools.combinations(range(num_experts), k), key=lambda s: s[::-1])
    # The number of {e_0 < e_1 < …} is C(e_0, 1) + C(e_1, 2) + …, the combinatorial number system.
    addends = [[math.comb(e, i + 1) for e in range(num_experts)] for i in range(k)]
    return torch.tensor(sets, dtype=torch.int32, device=device), torch.tensor(addends, device=device)


def fits(sizes, num_experts, k):
    """Whether the kernels take a layer of kernels.BTTSizes, r being the rank of one expert."""
    g, a, f, e, r = sizes
    rows = _pow2(k * r) * max(_pow2(g), _pow2(f))
    in_one_program = rows <= MAX_ROWS and rows * _pow2(max(a, e)) <= MOST_SUMS
    return math.comb(num_experts, k) <= MOST_SETS and (in_one_program or g == f == 1)


def make_plan(index, num_experts, tokens):
    """Plan for index (n, k), each row ascending, in tiles of so many tokens. No host synchronisation."""
    return Plan(*torch.ops.nanoeinsum.btt_mixture_plan(index, num_experts, tokens))


# An operator, so that the tables of sets are made once and not by every replay of a compiled or recorded step.
@torch.library.custom_op("nanoeinsum::btt_mixture_plan", mutates_args=())
def _plan(
    index: torch.Tensor, num_experts: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, k = index.shape
    sets, addends = _sets(num_experts, k, index.device)
    number = addends[0][index[:, 0]]
    for i in range(1, k):
        number = number + addends[i][index[:, i]]  # (n,)
    number, order = torch.sort(number, stable=True)
    bounds = torch.searchsorted(number, torch.arange(len(sets) + 1, device=index.device))  # (sets + 1,)
    tiles = (bounds.diff() + tokens - 1) // tokens
    set_tiles = torch.cat((tiles.new_zeros(1), tiles.cumsum(0)))  # (sets + 1,)
    every = torch.arange(-(-n // tokens) + len(sets), device=index.device)  # (T,)
    tile_set = (torch.searchsorted(set_tiles, every, right=True) - 1).clamp(max=len(sets) - 1)
    first = bounds[tile_set] + (every - set_tiles[tile_set]) * tokens
    end = bounds[tile_set + 1]
    first = torch.minimum(first, end)  # tiles behind the last one are empty
    return order.int(), first.int(), end.int(), set_tiles.int(), tile_set.int(), sets.clone()


@_plan.register_fake
def _(index, num_experts, tokens):
    (n, k), n_sets = index.shape, math.comb(num_experts, index.shape[1])
    tiles = -(-n // tokens) + n_sets
    sizes = [(n,), (tiles,), (tiles,), (n_sets + 1,), (tiles,), (n_sets, k)]
    return tuple(index.new_empty(size, dtype=torch.int32) for size in sizes)


def btt_mixture(x, A, B, index, gate, num_experts):
    """y of the experts that each token picked, weighed by their gates.

    x (n, g·a), A (g, a, E·r·f) with columns (expert, rank, f), B (f, g·E·r, e) with rows (g, expert, rank), all of one
    16-bit dtype; index (n, k) int64, no expert twice in a row; gate (n, k) -> y (n, f·e). See `fits`.
    """
    index, ascending = index.sort(dim=1)
    gate = gate.gather(1, ascending).float()
    tokens = 64 if len(x) >= 64 * math.comb(num_experts, index.shape[1]) else 32
    plan = make_plan(index, num_experts, tokens)
    low_rank = len(A) == len(B) == 1
    op = torch.ops.nanoeinsum.low_rank_mixture if low_rank else torch.ops.nanoeinsum.btt_mixture
    y, _ = op(x, A, B, gate, *plan, num_experts, tokens)
    return y


if triton is not None:

    @triton.jit
    def _tile_tokens(order, first, end, tile, BM: tl.constexpr):
        """Tokens of a tile, (BM,), and which of them there are."""
        place = tl.load(first + tile) + tl.arange(0, BM)
        inside = place < tl.load(end + tile)
        return tl.load(order + place, inside, 0), inside

    @triton.jit
    def _expert_ranks(sets, of_set, j, r, K: tl.constexpr, R: tl.constexpr):
        """Rank index of slot j's expert and its rank r."""
        return tl.load(sets + of_set * K + j, j < K, 0) * R + r

    @triton.jit
    def _a_columns(sets, of_set, c, F: tl.constexpr, FB: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
        """Columns of core A for rows c = (slot rank f) of z, where f < FB runs fastest, and which there are."""
        jr, f = c // FB, c % FB
        rank = _expert_ranks(sets, of_set, jr // R, jr % R, K, R)
        return rank * F + f, (jr < K * R) & (f < F)

    @triton.jit
    def _mixture_first_kernel(
        x, A, z, order, first, end, tile_set, sets, z_stride, x_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """z_g (slot·rank·f, n) = A_gᵀ x_gᵀ of one tile"""
        g, tile = tl.program_id(0) % G, tl.program_id(0) // G
        tokens, inside = _tile_tokens(order, first, end, tile, BM)
        if tl.load(first + tile) < tl.load(end + tile):
            a, c = tl.arange(0, AP), tl.arange(0, CB)
            columns, there = _a_columns(sets, tl.load(tile_set + tile), c, F, FB, K, R)
            mask_A = there[:, None] & (a[None, :] < AL)
            A_g = tl.load(A + (g * AL + a)[None, :] * (E * R * F) + columns[:, None], mask_A, 0.0)  # (CB, AP)
            mask_x = inside[:, None] & (a[None, :] < AL)
            x_t = tl.load(x + tokens[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
            z_t = tl.dot(A_g, x_t.T).to(z.dtype.element_ty)  # (CB, BM)
            rows = z + (g * (K * R * F) + c // FB * F + c % FB)[:, None].to(tl.int64) * z_stride
            # Places without a token get the zeros that no x gives: what is padding is never uninitialised.
            tl.store(rows + (tile * BM + tl.arange(0, BM))[None, :], z_t, there[:, None])

    @triton.jit
    def _b_rows(sets, of_set, k, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KB: tl.constexpr):
        """Rows of core B for rows k = (g slot rank) of z, where slot·rank < KB runs fastest, and which there are."""
        g, jr = k // KB, k % KB
        rank = _expert_ranks(sets, of_set, jr // R, jr % R, K, R)
        return g * (E * R) + rank, (g < G) & (jr < K * R)

    @triton.jit
    def _gates(gate, tokens, inside, k, K: tl.constexpr, R: tl.constexpr, KB: tl.constexpr):
        """Gates of a tile, (rows of z, BM)."""
        j = (k % KB) // R
        return tl.load(gate + tokens[None, :] * K + j[:, None], inside[None, :] & (j < K)[:, None], 0.0)

    @triton.jit
    def _mixture_second_kernel(
        z, B, y, gate, order, first, end, tile_set, sets, z_stride,
        G: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        EP: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """y_f (n, e) = (gate z_f)ᵀ B_f of one tile"""
        f, tile = tl.program_id(0) % F, tl.program_id(0) // F
        tokens, inside = _tile_tokens(order, first, end, tile, BM)
        if tl.load(first + tile) < tl.load(end + tile):
            k, e = tl.arange(0, KP), tl.arange(0, EP)
            rows, there = _b_rows(sets, tl.load(tile_set + tile), k, G, E, K, R, KB)
            mask_B = there[:, None] & (e[None, :] < EL)
            B_f = tl.load(B + (f * (G * E * R) + rows)[:, None] * EL + e[None, :], mask_B, 0.0)
            at = ((k // KB * (K * R) + k % KB) * F + f)[:, None].to(tl.int64) * z_stride
            z_t = tl.load(z + at + (tile * BM + tl.arange(0, BM))[None, :], there[:, None] & inside[None, :], 0.0)
            z_t = (z_t * _gates(gate, tokens, inside, k, K, R, KB)).to(B.dtype.element_ty)  # (KP, BM)
            y_t = tl.dot(z_t.T, B_f).to(y.dtype.element_ty)  # (BM, EP)
            to = y + tokens[:, None].to(tl.int64) * (F * EL) + f * EL + e[None, :]
            tl.store(to, y_t, inside[:, None] & (e[None, :] < EL))

    @triton.jit
    def _mixture_second_backward_kernel(
        z, dy, B, gate, dz, dB, dgate, order, first, end, set_tiles, sets, z_stride, dy_stride, places,
        G: tl.constexpr, F: tl.constexpr, EL: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        EP: tl.constexpr, KB: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """dz_f = gate B_f dy_fᵀ, dB_f = (gate z_f) dy_f of one set, and f's share of the gates' gradients."""
        pid = tl.program_id(0)
        f, part, of_set = pid % F, (pid // F) % PARTS, pid // (F * PARTS)
        k, e = tl.arange(0, KP), tl.arange(0, EP)
        rows, there = _b_rows(sets, of_set, k, G, E, K, R, KB)
        mask_B = there[:, None] & (e[None, :] < EL)
        B_f = tl.load(B + (f * (G * E * R) + rows)[:, None] * EL + e[None, :], mask_B, 0.0)
        at = ((k // KB * (K * R) + k % KB) * F + f)[:, None].to(tl.int64) * z_stride
        dB_f = tl.zeros((KP, EP), tl.float32)
        for tile in tl.range(tl.load(set_tiles + of_set) + part, tl.load(set_tiles + of_set + 1), PARTS):
            tokens, inside = _tile_tokens(order, first, end, tile, BM)
            mask_y = inside[:, None] & (e[None, :] < EL)
            dy_t = tl.load(dy + tokens[:, None].to(tl.int64) * dy_stride + f * EL + e[None, :], mask_y, 0.0)
            column = tile * BM + tl.arange(0, BM)
            mask_z = there[:, None] & inside[None, :]
            z_t = tl.load(z + at + column[None, :], mask_z, 0.0)
            gates = _gates(gate, tokens, inside, k, K, R, KB)
            d_gated = tl.dot(B_f, dy_t.T)  # (KP, BM)
            tl.store(dz + at + column[None, :], (d_gated * gates).to(dz.dtype.element_ty), there[:, None])
            dB_f = tl.dot((z_t * gates).to(dy_t.dtype), dy_t, dB_f)
            share = d_gated * z_t
            for j in tl.static_range(K):
                mine = tl.sum(tl.where(((k % KB) // R == j)[:, None], share, 0.0), 0)  # (BM,)
                tl.store(dgate + (f * K + j) * places + column, mine)
        # (set, part, f, slot·rank·g, e): what _sum_sets reads
        to = ((of_set * PARTS + part) * F + f) * (K * R * G) + k % KB * G + k // KB
        tl.store(dB + to[:, None].to(tl.int64) * EL + e[None, :], dB_f, mask_B)

    @triton.jit
    def _mixture_first_backward_kernel(
        dz, x, A, dx, dA, order, first, end, set_tiles, sets, z_stride, x_stride,
        G: tl.constexpr, AL: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
        AP: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """dx_g (n, a) = dz_gᵀ A_gᵀ and dA_gᵀ = dz_g x_g of one set"""
        pid = tl.program_id(0)
        g, part, of_set = pid % G, (pid // G) % PARTS, pid // (G * PARTS)
        a, c = tl.arange(0, AP), tl.arange(0, CB)
        columns, there = _a_columns(sets, of_set, c, F, FB, K, R)
        mask_A = there[:, None] & (a[None, :] < AL)
        A_g = tl.load(A + (g * AL + a)[None, :] * (E * R * F) + columns[:, None], mask_A, 0.0)  # (CB, AP)
        at = (g * (K * R * F) + c // FB * F + c % FB)[:, None].to(tl.int64) * z_stride
        dA_g = tl.zeros((CB, AP), tl.float32)
        for tile in tl.range(tl.load(set_tiles + of_set) + part, tl.load(set_tiles + of_set + 1), PARTS):
            tokens, inside = _tile_tokens(order, first, end, tile, BM)
            dz_t = tl.load(dz + at + (tile * BM + tl.arange(0, BM))[None, :], there[:, None] & inside[None, :], 0.0)
            mask_x = inside[:, None] & (a[None, :] < AL)
            x_t = tl.load(x + tokens[:, None].to(tl.int64) * x_stride + g * AL + a[None, :], mask_x, 0.0)
            dx_t = tl.dot(dz_t.T, A_g).to(dx.dtype.element_ty)  # (BM, AP)
            tl.store(dx + tokens[:, None].to(tl.int64) * (G * AL) + g * AL + a[None, :], dx_t, mask_x)
            dA_g = tl.dot(dz_t, x_t, dA_g)
        # (set, part, g, slot·rank·f, a)
        to = ((of_set * PARTS + part) * G + g) * (K * R * F) + c // FB * F + c % FB
        tl.store(dA + to[:, None].to(tl.int64) * AL + a[None, :], dA_g, mask_A)


def _sizes(x, A, B, num_experts):
    (g, a, _), (f, _, e) = A.shape, B.shape
    return g, a, f, e, A.shape[2] // (num_experts * f)


@torch.library.custom_op("nanoeinsum::btt_mixture", mutates_args=())
def _forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, order: torch.Tensor, first: torch.Tensor,
    end: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, sets: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> y, and z (g·slot·rank·f, places) for backward"""
    x, A, B, gate = _rows(x), A.contiguous(), B.contiguous(), gate.contiguous()
    g, a, f, e, r = _sizes(x, A, B, num_experts)
    k, tiles = gate.shape[1], len(first)
    z, y = x.new_empty(g * k * r * f, _z_stride(tiles * tokens)), x.new_empty(len(x), f * e)
    if len(x) == 0:
        return y, z
    rows, columns = _row_sizes(g, f, k * r)
    warps = 4 if max(rows, columns) <= 128 else 8
    _mixture_first_kernel[(g * tiles,)](
        x, A, z, order, first, end, tile_set, sets, z.stride(0), x.stride(0),
        G=g, AL=a, F=f, E=num_experts, K=k, R=r, AP=_pow2(a, 16), FB=_pow2(f), CB=columns, BM=tokens, num_warps=warps,
    )  # fmt: skip
    _mixture_second_kernel[(f * tiles,)](
        z, B, y, gate, order, first, end, tile_set, sets, z.stride(0),
        G=g, F=f, EL=e, E=num_experts, K=k, R=r, EP=_pow2(e, 16), KB=_pow2(k * r), KP=rows, BM=tokens, num_warps=warps,
    )  # fmt: skip
    return y, z


def _row_sizes(g, f, slots):
    """Rows of z that a program holds, padded: (g slot·rank) of one f, (slot·rank f) of one g."""
    return max(16, _pow2(g) * _pow2(slots)), max(16, _pow2(slots) * _pow2(f))


@_forward.register_fake
def _forward_shapes(x, A, B, gate, order, first, end, set_tiles, tile_set, sets, num_experts, tokens):
    g, a, f, e, r = _sizes(x, A, B, num_experts)
    z = x.new_empty(g * gate.shape[1] * r * f, _z_stride(len(first) * tokens))
    return x.new_empty(x.shape[0], f * e), z


@torch.library.custom_op("nanoeinsum::btt_mixture_backward", mutates_args=())
def _backward(
    x: torch.Tensor, dy: torch.Tensor, z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor,
    order: torch.Tensor, first: torch.Tensor, end: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor,
    sets: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, dA, dB, dgate. It goes through the tiles set by set, so that tile_set is not needed."""
    x, dy, A, B, gate = _rows(x), _rows(dy), A.contiguous(), B.contiguous(), gate.contiguous()
    g, a, f, e, r = _sizes(x, A, B, num_experts)
    k, places, n_sets = gate.shape[1], len(first) * tokens, len(sets)
    dx = x.new_empty(len(x), g * a)
    if len(x) == 0:
        return dx, torch.zeros_like(A), torch.zeros_like(B), torch.empty_like(gate)
    rows, columns = _row_sizes(g, f, k * r)
    warps = 4 if max(rows, columns) <= 64 else 8
    parts_B, parts_A = (_parts(blocks, n_sets, len(x), tokens, x) for blocks in (f, g))
    dz = torch.empty_like(z)
    sums_B = torch.empty(n_sets, parts_B, f, k * r * g * e, dtype=torch.float32, device=x.device)
    sums_A = torch.empty(n_sets, parts_A, g, k * r * f * a, dtype=torch.float32, device=x.device)
    shares = torch.empty(f, k, places, dtype=torch.float32, device=x.device)
    _mixture_second_backward_kernel[(f * parts_B * n_sets,)](
        z, dy, B, gate, dz, sums_B, shares, order, first, end, set_tiles, sets, z.stride(0), dy.stride(0), places,
        G=g, F=f, EL=e, E=num_experts, K=k, R=r, EP=_pow2(e, 16), KB=_pow2(k * r), KP=rows, BM=tokens, PARTS=parts_B,
        num_warps=warps,
    )  # fmt: skip
    _mixture_first_backward_kernel[(g * parts_A * n_sets,)](
        dz, x, A, dx, sums_A, order, first, end, set_tiles, sets, z.stride(0), x.stride(0),
        G=g, AL=a, F=f, E=num_experts, K=k, R=r, AP=_pow2(a, 16), FB=_pow2(f), CB=columns, BM=tokens, PARTS=parts_A,
        num_warps=warps,
    )  # fmt: skip
    dA = _sum_sets(sums_A.sum(1).view(n_sets, g, k, r * f, a), sets, num_experts)  # (E, g, r·f, a)
    dB = _sum_sets(sums_B.sum(1).view(n_sets, f, k, r * g, e), sets, num_experts)  # (E, f, r·g, e)
    dA = dA.permute(1, 3, 0, 2).reshape(A.shape)
    dB = dB.view(num_experts, f, r, g, e).permute(1, 3, 0, 2, 4).reshape(B.shape)
    return dx, dA.to(A.dtype), dB.to(B.dtype), _gate_gradient(shares.sum(0), order, first, tokens, gate)


def _gate_gradient(shares, order, first, tokens, gate):
    """Gradients by slot and place in the tiles, (k, places) -> by token, (n, k)."""
    place = torch.arange(len(order), device=order.device)  # in the sorted list
    tile = torch.searchsorted(first, place.int(), right=True) - 1  # empty tiles are behind all others
    column = tile * tokens + place - first[tile]
    return torch.empty_like(gate).index_copy(0, order.long(), shares[:, column].t().to(gate.dtype))


def _parts(blocks, n_sets, n, tokens, tensor):
    """So many programs share the tiles of one set."""
    tiles = max(1, n // (n_sets * tokens))
    return max(1, min(tiles, round(4 * _multiprocessors(tensor) / (blocks * n_sets))))


def _sum_sets(sums, sets, num_experts):
    """(sets, blocks, k, …) -> (num_experts, blocks, …): over the sets that an expert is in, in order."""
    n_sets, k = sets.shape
    slots = sums.transpose(1, 2).reshape(n_sets * k, *sums.shape[1:2], *sums.shape[3:])
    of_expert = torch.argsort(sets.flatten(), stable=True).view(num_experts, -1)  # every expert is in as many sets
    return slots[of_expert].sum(1)


@_backward.register_fake
def _gradient_shapes(x, dy, z, A, B, gate, *plan):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, A, B, gate))


def _setup(ctx, inputs, output):
    x, A, B, gate, *plan, ctx.num_experts, ctx.tokens = inputs
    ctx.save_for_backward(x, output[1], A, B, gate, *plan)
    ctx.set_materialize_grads(False)


def _gradients(op, ctx, dy, _):
    x, *saved = ctx.saved_tensors
    return *op(x, dy, *saved, ctx.num_experts, ctx.tokens), *[None] * 8


_forward.register_autograd(functools.partial(_gradients, _backward), setup_context=_setup)


# ---------------------------------------------------------------------------------------
# Low-rank mixtures: x (n, a), A (a, E·r), B (E·r, e), without the axes of one block. Three kernels, each used twice:
#
#     _to_ranks_kernel        z = A_Sᵀ xᵀ                   dz = gate B_S dyᵀ, and the gates' gradients
#     _from_ranks_kernel      y = (gate z)ᵀ B_S             dx = dzᵀ A_Sᵀ
#     _core_gradient_kernel   dA_Sᵀ = dz x                  dB_S = (gate z) dy

if triton is not None:

    @triton.jit
    def _to_ranks_kernel(
        rows, core, out, z, gate, shares, order, first, end, tile_set, sets, row_stride, rank_stride, width_stride,
        z_stride, places, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """out (slot·rank, place) = core_S rowsᵀ, for one tile of tokens and CB ranks of one slot. core: (ranks, D) by its strides."""
        C_BLOCKS: tl.constexpr = (R + CB - 1) // CB
        block, tile = tl.program_id(0) % (K * C_BLOCKS), tl.program_id(0) // (K * C_BLOCKS)
        j, c = block // C_BLOCKS, block % C_BLOCKS * CB + tl.arange(0, CB)
        tokens, inside = _tile_tokens(order, first, end, tile, BM)
        if tl.load(first + tile) < tl.load(end + tile):
            expert = tl.load(sets + tl.load(tile_set + tile) * K + j)
            sums = tl.zeros((CB, BM), tl.float32)
            for start in tl.range(0, D, DB):
                d = start + tl.arange(0, DB)
                at_core = (expert * R + c)[:, None] * rank_stride + d[None, :] * width_stride
                core_t = tl.load(core + at_core, (c < R)[:, None] & (d < D)[None, :], 0.0)  # (CB, DB)
                at_rows = tokens[:, None].to(tl.int64) * row_stride + d[None, :]
                rows_t = tl.load(rows + at_rows, inside[:, None] & (d < D)[None, :], 0.0)  # (BM, DB)
                sums = tl.dot(core_t, rows_t.T, sums)
            column = tile * BM + tl.arange(0, BM)
            at = (j * R + c)[:, None].to(tl.int64) * z_stride + column[None, :]
            if BACKWARD:
                z_t = tl.load(z + at, (c < R)[:, None] & inside[None, :], 0.0)
                tl.store(shares + block * places + column, tl.sum(sums * z_t, 0))
                sums *= tl.load(gate + tokens * K + j, inside, 0.0)[None, :]
            tl.store(out + at, sums.to(out.dtype.element_ty), (c < R)[:, None])

    @triton.jit
    def _from_ranks_kernel(
        z, core, out, gate, order, first, end, tile_set, sets, rank_stride, width_stride, z_stride,
        D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """out (n, d) = zᵀ core_S, for one tile of tokens and DB of the D columns; every slot times its gate where GATED."""
        D_BLOCKS: tl.constexpr = (D + DB - 1) // DB
        tile, d = tl.program_id(0) // D_BLOCKS, tl.program_id(0) % D_BLOCKS * DB + tl.arange(0, DB)
        tokens, inside = _tile_tokens(order, first, end, tile, BM)
        if tl.load(first + tile) < tl.load(end + tile):
            sums = tl.zeros((BM, DB), tl.float32)
            for j in tl.static_range(K):
                expert = tl.load(sets + tl.load(tile_set + tile) * K + j)
                of_slot = tl.zeros((BM, DB), tl.float32)
                for start in tl.range(0, R, CB):
                    c = start + tl.arange(0, CB)
                    at = (j * R + c)[:, None].to(tl.int64) * z_stride + (tile * BM + tl.arange(0, BM))[None, :]
                    z_t = tl.load(z + at, (c < R)[:, None] & inside[None, :], 0.0)  # (CB, BM)
                    at_core = (expert * R + c)[:, None] * rank_stride + d[None, :] * width_stride
                    core_t = tl.load(core + at_core, (c < R)[:, None] & (d < D)[None, :], 0.0)  # (CB, DB)
                    of_slot = tl.dot(z_t.T, core_t, of_slot)
                if GATED:
                    of_slot *= tl.load(gate + tokens * K + j, inside, 0.0)[:, None]
                sums += of_slot
            to = out + tokens[:, None].to(tl.int64) * D + d[None, :]
            tl.store(to, sums.to(out.dtype.element_ty), inside[:, None] & (d < D)[None, :])

    @triton.jit
    def _core_gradient_kernel(
        z, rows, sums, gate, order, first, end, set_tiles, row_stride, z_stride,
        D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
        BM: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """sums (set, part, slot·rank, d) = z rows, over the tiles of a set; z times the gate where GATED."""
        D_BLOCKS: tl.constexpr = (D + DB - 1) // DB
        C_BLOCKS: tl.constexpr = (R + CB - 1) // CB
        pid = tl.program_id(0)
        d = pid % D_BLOCKS * DB + tl.arange(0, DB)
        j = pid // (D_BLOCKS * C_BLOCKS) % K
        c = pid // D_BLOCKS % C_BLOCKS * CB + tl.arange(0, CB)
        part = pid // (D_BLOCKS * C_BLOCKS * K) % PARTS
        of_set = pid // (D_BLOCKS * C_BLOCKS * K * PARTS)
        total = tl.zeros((CB, DB), tl.float32)
        for tile in tl.range(tl.load(set_tiles + of_set) + part, tl.load(set_tiles + of_set + 1), PARTS):
            tokens, inside = _tile_tokens(order, first, end, tile, BM)
            at = (j * R + c)[:, None].to(tl.int64) * z_stride + (tile * BM + tl.arange(0, BM))[None, :]
            z_t = tl.load(z + at, (c < R)[:, None] & inside[None, :], 0.0)  # (CB, BM)
            if GATED:
                z_t = (z_t * tl.load(gate + tokens * K + j, inside, 0.0)[None, :]).to(z_t.dtype)
            at_rows = tokens[:, None].to(tl.int64) * row_stride + d[None, :]
            rows_t = tl.load(rows + at_rows, inside[:, None] & (d < D)[None, :], 0.0)  # (BM, DB)
            total = tl.dot(z_t, rows_t, total)
        to = ((of_set * PARTS + part) * (K * R) + j * R + c)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(sums + to, total, (c < R)[:, None] & (d < D)[None, :])


def _rank_block(r):
    """CB: ranks that a program takes at a time, of one expert."""
    return min(64, _pow2(r, 16))


@torch.library.custom_op("nanoeinsum::low_rank_mixture", mutates_args=())
def _low_rank(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, order: torch.Tensor, first: torch.Tensor,
    end: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor, sets: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> y, and z (slot·rank, places) for backward"""
    x, A, B, gate = _rows(x), A.contiguous(), B.contiguous(), gate.contiguous()
    _, a, _, e, r = _sizes(x, A, B, num_experts)
    k, tiles, block = gate.shape[1], len(first), _rank_block(r)
    z, y = x.new_empty(k * r, _z_stride(tiles * tokens)), x.new_empty(len(x), e)
    if len(x) == 0:
        return y, z
    shape = dict(K=k, R=r, CB=block, BM=tokens, num_warps=4)
    _to_ranks_kernel[(k * triton.cdiv(r, block) * tiles,)](
        x, A, z, z, gate, z, order, first, end, tile_set, sets, x.stride(0), 1, num_experts * r,
        z.stride(0), tiles * tokens, D=a, DB=64, BACKWARD=False, **shape,
    )  # fmt: skip
    _from_ranks_kernel[(triton.cdiv(e, 128) * tiles,)](
        z, B, y, gate, order, first, end, tile_set, sets, e, 1, z.stride(0), D=e, DB=128, GATED=True, **shape
    )  # fmt: skip
    return y, z


_low_rank.register_fake(_forward_shapes)


@torch.library.custom_op("nanoeinsum::low_rank_mixture_backward", mutates_args=())
def _low_rank_backward(
    x: torch.Tensor, dy: torch.Tensor, z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor,
    order: torch.Tensor, first: torch.Tensor, end: torch.Tensor, set_tiles: torch.Tensor, tile_set: torch.Tensor,
    sets: torch.Tensor, num_experts: int, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, dA, dB, dgate"""
    x, dy, A, B, gate = _rows(x), _rows(dy), A.contiguous(), B.contiguous(), gate.contiguous()
    _, a, _, e, r = _sizes(x, A, B, num_experts)
    k, tiles, block, n_sets = gate.shape[1], len(first), _rank_block(r), len(sets)
    dx = x.new_empty(len(x), a)
    if len(x) == 0:
        return dx, torch.zeros_like(A), torch.zeros_like(B), torch.empty_like(gate)
    dz, blocks = torch.empty_like(z), triton.cdiv(r, block)
    shares = torch.empty(k, blocks, tiles * tokens, dtype=torch.float32, device=x.device)
    shape = dict(K=k, R=r, CB=block, BM=tokens, num_warps=4)
    _to_ranks_kernel[(k * blocks * tiles,)](
        dy, B, dz, z, gate, shares, order, first, end, tile_set, sets, dy.stride(0), e, 1,
        z.stride(0), tiles * tokens, D=e, DB=64, BACKWARD=True, **shape,
    )  # fmt: skip
    _from_ranks_kernel[(triton.cdiv(a, 128) * tiles,)](
        dz, A, dx, gate, order, first, end, tile_set, sets, 1, num_experts * r, z.stride(0),
        D=a, DB=128, GATED=False, **shape,
    )  # fmt: skip

    def core_gradient(z, rows, gated):
        """-> (E, r, width)"""
        width = rows.shape[1]
        programs = triton.cdiv(width, 128) * blocks * k
        parts = _parts(programs, n_sets, len(x), tokens, x)
        sums = torch.empty(n_sets, parts, k * r, width, dtype=torch.float32, device=x.device)
        _core_gradient_kernel[(programs * parts * n_sets,)](
            z, rows, sums, gate, order, first, end, set_tiles, rows.stride(0), z.stride(0),
            D=width, DB=128, PARTS=parts, GATED=gated, **shape,
        )  # fmt: skip
        return _sum_sets(sums.sum(1).view(n_sets, 1, k, r, width), sets, num_experts)[:, 0]

    dA = core_gradient(dz, x, False).permute(2, 0, 1).reshape(A.shape)
    dB = core_gradient(z, dy, True).reshape(B.shape)
    return dx, dA.to(A.dtype), dB.to(B.dtype), _gate_gradient(shares.sum(1), order, first, tokens, gate)


_low_rank_backward.register_fake(_gradient_shapes)
_low_rank.register_autograd(functools.partial(_gradients, _low_rank_backward), setup_context=_setup)
