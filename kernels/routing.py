"""Routing on a GPU, as Triton kernels: the experts of each token, and tokens sorted by them.

    route       logits, the k largest and their gates in one pass over x; moe.Router does the same in plain torch
    make_plan   sorts tokens by their sets of experts (counting sort) into tiles of one set each

The host never waits for the device and no shape depends on data. Sums are in a fixed order.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch

from kernels.common import pow2, takes_kernels, whole_rows

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---------------------------------------------------------------------------------------
# The router

if triton is not None:
    from kernels.common import gelu_of_tile

    @triton.jit
    def _route_kernel(
        x, W, bias, logits, index, gate, N, x_stride,
        D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, DB: tl.constexpr,
        GELU: tl.constexpr,
    ):  # fmt: skip
        """logits (n, E) = x Wᵀ, or gelu(x) Wᵀ; index and gate (n, K) of the K largest logits + bias, sorted by expert."""
        n, e = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EP)
        sums = tl.zeros((BM, EP), tl.float32)
        for start in tl.range(0, D, DB):
            d = start + tl.arange(0, DB)
            at_x = n[:, None].to(tl.int64) * x_stride + d[None, :]
            x_t = tl.load(x + at_x, (n < N)[:, None] & (d < D)[None, :], 0.0)
            if GELU:
                x_t = gelu_of_tile(x_t)
            W_t = tl.load(W + e[None, :] * D + d[:, None], (e < E)[None, :] & (d < D)[:, None], 0.0)  # (DB, EP)
            sums = tl.dot(x_t.to(tl.float32), W_t, sums, input_precision="tf32x3")
        real = (e < E)[None, :]
        tl.store(logits + n[:, None].to(tl.int64) * E + e[None, :], sums, (n < N)[:, None] & real)
        # Ties go to the first in the order n, n + 1, … (mod E), as in moe.pick. NaN counts as -inf.
        key = sums + tl.load(bias + e, e < E, 0.0)[None, :]
        key = tl.where(key == key, key, float("-inf"))
        turn = tl.where(real, (e[None, :] + E - n[:, None] % E) % E, 2 * EP)
        picked = turn < 0
        for _ in tl.static_range(K):
            best = tl.max(tl.where(picked | (turn >= E), float("-inf"), key), 1)
            left = (picked == 0) & (turn < E) & (key >= best[:, None])
            picked = picked | (turn == tl.min(tl.where(left, turn, EP), 1)[:, None])
        chosen = picked.to(tl.int32)
        slot = tl.cumsum(chosen, 1) - chosen
        weight = tl.where(picked, sums, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
        for j in tl.static_range(K):
            mine = picked & (slot == j)
            tl.store(index + n * K + j, tl.sum(tl.where(mine, e[None, :], 0), 1).to(tl.int64), n < N)
            tl.store(gate + n * K + j, tl.sum(tl.where(mine, weight, 0.0), 1), n < N)


def router_method(x, num_experts):
    """The method that computes a router for x (..., d): "kernel" (the op `route`) or "torch"."""
    return "kernel" if takes_kernels(x) and num_experts <= 128 else "torch"


@torch.library.custom_op("nanoeinsum::route", mutates_args=())
def route(
    x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, d), W (E, d) float32, bias (E,) float32 -> logits (n, E) float32, index (n, k) int64, gate (n, k) float32.

    The k experts with the largest logits + bias are picked, in ascending order; gates are the softmax of their logits.
    """
    return route_rows(whole_rows(x), W, bias, k)


def route_rows(x, W, bias, k, after_gelu=False):
    """The work of `route`: on x, or on gelu(x) if after_gelu."""
    W, bias = W.contiguous(), bias.contiguous()
    (n, d), E = x.shape, len(W)
    logits, gate = (x.new_empty(n, width, dtype=torch.float32) for width in (E, k))
    index = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n:
        tokens = 64
        _route_kernel[(triton.cdiv(n, tokens),)](
            x, W, bias, logits, index, gate, n, x.stride(0), D=d, E=E, K=k, EP=pow2(E, 16), BM=tokens, DB=64,
            GELU=after_gelu, num_warps=4, num_stages=4,
        )  # fmt: skip
    return logits, index, gate


@route.register_fake
def _(x, W, bias, k):
    n, E = x.shape[0], W.shape[0]
    logits, gate = (x.new_empty(n, width, dtype=torch.float32) for width in (E, k))
    return logits, x.new_empty(n, k, dtype=torch.int64), gate


def _route_setup(ctx, inputs, output):
    x, W, _, _ = inputs
    _, index, gate = output
    ctx.save_for_backward(x, W, index, gate)
    ctx.mark_non_differentiable(index)


def _route_backward(ctx, dlogits, _, dgate):
    x, W, index, gate = ctx.saved_tensors
    of_picked = gate * (dgate - (gate * dgate).sum(1, keepdim=True))  # backward through the softmax
    d = dlogits.scatter_add(1, index, of_picked).to(x.dtype)
    return d @ W.to(x.dtype), (d.t() @ x).to(W.dtype), None, None


route.register_autograd(_route_backward, setup_context=_route_setup)


# ---------------------------------------------------------------------------------------
# Places

MOST_SETS = 128  # sets of experts: with more, most tiles would be nearly empty


class Plan(NamedTuple):
    """Places for n tokens in T tiles, each for one set of experts. Tiles are sorted by set; unused ones come last."""

    token: torch.Tensor  # (places,) int32: token at each place, -1 if the place is empty
    gate: torch.Tensor  # (k, places) float32: gates of that token, 0 if the place is empty
    place: torch.Tensor  # (n,) int32: place of each token
    set_tiles: torch.Tensor  # (sets + 1,) int32: index of each set's first tile; last, the number of tiles in use
    tile_set: torch.Tensor  # (T,) int32: set of each tile


class Tables(NamedTuple):
    """Constant tables of the sets of experts, int32."""

    sets: torch.Tensor  # (sets, k): experts of a set, ascending
    members: torch.Tensor  # (E, sets of an expert): set · k + slot of the expert in the set
    addends: torch.Tensor  # (k, E): a set's number is the sum of addends[slot, expert] over its experts


@functools.cache
def set_tables(num_experts, k, device):
    """Tables of all sets of k experts, on the device."""
    sets = sorted(itertools.combinations(range(num_experts), k), key=lambda s: s[::-1])
    # The number of {e_0 < e_1 < …} is C(e_0, 1) + C(e_1, 2) + …, the combinatorial number system.
    addends = [[math.comb(e, i + 1) for e in range(num_experts)] for i in range(k)]
    slots = list(itertools.chain.from_iterable(sets))
    members = [[i for i, expert in enumerate(slots) if expert == e] for e in range(num_experts)]
    return Tables(*(torch.tensor(table, dtype=torch.int32, device=device) for table in (sets, members, addends)))


if triton is not None:

    @triton.jit
    def _count_kernel(
        index, addends, number, counts, N, E: tl.constexpr, K: tl.constexpr, SP: tl.constexpr, BN: tl.constexpr
    ):
        """The number of each token's set, and how many tokens of this block have each set."""
        n, s = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, SP)
        of_token = tl.where(n < N, 0, SP)
        for j in tl.static_range(K):
            expert = tl.load(index + n * K + j, n < N, 0)
            of_token += tl.load(addends + j * E + expert, n < N, 0)
        tl.store(number + n, of_token, n < N)
        tl.store(counts + tl.program_id(0) * SP + s, tl.sum((of_token[:, None] == s[None, :]).to(tl.int32), 0))

    @triton.jit
    def _scan_kernel(counts, before, totals, BLOCKS, SP: tl.constexpr, CHUNK: tl.constexpr):
        """For one set: tokens in all blocks before each block, and in all blocks."""
        s, total = tl.program_id(0), 0
        for start in tl.range(0, BLOCKS, CHUNK):
            b = start + tl.arange(0, CHUNK)
            count = tl.load(counts + b * SP + s, b < BLOCKS, 0)
            tl.store(before + b * SP + s, total + tl.cumsum(count, 0) - count, b < BLOCKS)
            total += tl.sum(count, 0)
        tl.store(totals + s, total)

    @triton.jit
    def _place_kernel(
        number, gate, before, totals, token, gates, place, set_tiles, tile_set, N, places, T,
        SETS: tl.constexpr, K: tl.constexpr, SP: tl.constexpr, BN: tl.constexpr, TOKENS: tl.constexpr,
        TP: tl.constexpr,
    ):  # fmt: skip
        """Fills the places of a block's tokens, and TP entries of the table of tiles."""
        pid = tl.program_id(0)
        n, s = pid * BN + tl.arange(0, BN), tl.arange(0, SP)
        tiles = (tl.load(totals + s, s < SETS, 0) + TOKENS - 1) // TOKENS
        last = tl.cumsum(tiles, 0)  # end of each set's tiles
        start = (last - tiles) * TOKENS + tl.load(before + pid * SP + s, s < SETS, 0)
        of_token = tl.load(number + n, n < N, SP)
        same = (of_token[:, None] == s[None, :]).to(tl.int32)  # (BN, SP)
        to = tl.sum(same * (tl.cumsum(same, 0) - same + start[None, :]), 1)
        tl.store(place + n, to, n < N)
        tl.store(token + to, n, n < N)
        for j in tl.static_range(K):
            tl.store(gates + j * places + to, tl.load(gate + n * K + j, n < N, 0.0), n < N)
        tile = pid * TP + tl.arange(0, TP)
        of_tile = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
        tl.store(tile_set + tile, tl.minimum(of_tile, SETS - 1), tile < T)
        if pid == 0:
            tl.store(set_tiles + s, last - tiles, s < SETS)
            tl.store(set_tiles + SETS, tl.sum(tiles, 0))


def make_plan(index, gate, num_experts, tokens):
    """The Plan for index (n, k), each row ascending, and gates (n, k), with tiles of `tokens` tokens."""
    return Plan(*torch.ops.nanoeinsum.mixture_plan(index, gate.detach(), num_experts, tokens))


def tile_tokens(n, n_sets):
    """Number of tokens in a tile: smaller if sets have few tokens."""
    return 64 if n >= 64 * n_sets else 32


# An operator, so that its tables are made once and not in every replay of a compiled or recorded step.
@torch.library.custom_op("nanoeinsum::mixture_plan", mutates_args=())
def _plan(
    index: torch.Tensor, gate: torch.Tensor, num_experts: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    index, gate, (n, k), device = index.contiguous(), gate.contiguous(), index.shape, index.device
    tables, n_sets, block = set_tables(num_experts, k, device), math.comb(num_experts, k), 128
    blocks, padded, tiles = max(1, -(-n // block)), pow2(n_sets), -(-n // tokens) + n_sets
    number, place, totals, tile_set, set_tiles = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (n, n, padded, tiles, n_sets + 1)
    )
    counts, before = torch.empty(2, blocks, padded, dtype=torch.int32, device=device)
    token = torch.full((tiles * tokens,), -1, dtype=torch.int32, device=device)
    gates = torch.zeros(k, tiles * tokens, dtype=torch.float32, device=device)
    _count_kernel[(blocks,)](index, tables.addends, number, counts, n, E=num_experts, K=k, SP=padded, BN=block)
    _scan_kernel[(padded,)](counts, before, totals, blocks, SP=padded, CHUNK=1024)
    _place_kernel[(blocks,)](
        number, gate, before, totals, token, gates, place, set_tiles, tile_set, n, tiles * tokens, tiles,
        SETS=n_sets, K=k, SP=padded, BN=block, TOKENS=tokens, TP=pow2(-(-tiles // blocks)),
    )  # fmt: skip
    return token, gates, place, set_tiles, tile_set


@_plan.register_fake
def _(index, gate, num_experts, tokens):
    (n, k), n_sets = index.shape, math.comb(num_experts, index.shape[1])
    tiles = -(-n // tokens) + n_sets
    sizes = [(tiles * tokens,), (n,), (n_sets + 1,), (tiles,)]
    token, *others = (index.new_empty(size, dtype=torch.int32) for size in sizes)
    return token, gate.new_empty(k, tiles * tokens, dtype=torch.float32), *others
