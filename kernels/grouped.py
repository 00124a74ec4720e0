"""Mixtures computed expert by expert: rows are sorted by expert, and each expert's rows are multiplied by its matrices.

On a GPU the host never waits for the device, no shape depends on values, and the products use torch's grouped GEMM if it
supports them (product_method). BTT-MoE and low-rank-MoE have GPU kernels of their own (moe.py).

Shapes: n tokens, k experts per token, m = n · k rows, one for each token and expert of it, E experts; g a f e r as in btt.py.
"""

import torch
import torch.nn.functional as F

from kernels.common import compute_dtype


def sort_by_expert(index, num_experts):
    """index (n, k) -> order (m,), inverse (m,), ends (E,), all int64.

    Sorted row i is unsorted row order[i], which belongs to token order[i] // k. Unsorted row j becomes sorted row
    inverse[j]. The sorted rows of expert e end before ends[e].
    """
    experts, order = index.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True)
    return order, inverse, ends


class Spread(torch.autograd.Function):
    """Tokens (n, d) -> sorted rows (m, d). Backward sums a token's rows in a fixed order, which index_add would not."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        ctx.n = len(x)
        return x[order // (len(order) // len(x))]

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return dy[inverse].view(ctx.n, -1, dy.shape[1]).sum(dim=1), None, None


class Collect(torch.autograd.Function):
    """Sorted rows (m, d) -> the sums over each token's rows (n, d)."""

    @staticmethod
    def forward(ctx, y, order, inverse, n):
        ctx.save_for_backward(order)
        ctx.k = len(order) // n
        return y[inverse].view(n, ctx.k, y.shape[1]).sum(dim=1)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy[order // ctx.k], None, None, None


@torch.library.custom_op("nanoeinsum::grouped_products", mutates_args=())
def grouped_products(x: torch.Tensor, W: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Every expert's rows times its matrices: y[b, i] = x[b, i] @ W[b, expert of row i].

    x (b, m, p) with rows sorted by expert, W (b, E, p, q), of one dtype; ends (E,) int64 -> (b, m, q)
    """
    products = {"loop": products_by_loop, "library": products_by_library, "tiles": products_by_tiles}
    return products[product_method(x, W)](x, W, ends)


@torch.library.custom_op("nanoeinsum::grouped_gradients", mutates_args=())
def grouped_gradients(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of W, (b, E, p, q): dW[b, e] = Σ over e's rows i of x[b, i]ᵀ dy[b, i]; 0 for an expert without rows."""
    gradients = {"loop": gradients_by_loop, "library": gradients_by_library, "tiles": gradients_by_tiles}
    return gradients[product_method(x, dy)](x, dy, ends)


@grouped_products.register_fake
def _(x, W, ends):
    return x.new_empty(x.shape[0], x.shape[1], W.shape[3])


@grouped_gradients.register_fake
def _(x, dy, ends):
    return x.new_empty(x.shape[0], len(ends), x.shape[2], dy.shape[2])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, W, ends = ctx.saved_tensors
    dx = torch.ops.nanoeinsum.grouped_products(dy, W.transpose(2, 3), ends) if ctx.needs_input_grad[0] else None
    dW = torch.ops.nanoeinsum.grouped_gradients(x, dy, ends) if ctx.needs_input_grad[1] else None
    return dx, dW, None


grouped_products.register_autograd(_backward, setup_context=_setup)


def products_by_loop(x, W, ends):
    """grouped_products on a CPU, where reading `ends` costs nothing."""
    y, start = x.new_empty(x.shape[0], x.shape[1], W.shape[3]), 0
    for e, end in enumerate(ends.tolist()):
        y[:, start:end] = x[:, start:end] @ W[:, e]
        start = end
    return y


def gradients_by_loop(x, dy, ends):
    """grouped_gradients on a CPU."""
    dW, start = x.new_empty(x.shape[0], len(ends), x.shape[2], dy.shape[2]), 0
    for e, end in enumerate(ends.tolist()):
        dW[:, e] = x[:, start:end].transpose(1, 2) @ dy[:, start:end]
        start = end
    return dW


def product_method(*operands):
    """The method of products with these operands:

    "loop"     expert by expert, on a CPU
    "library"  torch's grouped GEMM, where it does not make the host read the ends: bfloat16 on Hopper and newer GPUs,
               rows of a multiple of 16 bytes
    "tiles"    batched products of tiles, on all other GPUs
    """
    if not operands[0].is_cuda:
        return "loop"
    by_library = (
        hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(operands[0].device) >= (9, 0)
        and all(tensor.dtype == torch.bfloat16 and tensor.shape[-1] % 8 == 0 for tensor in operands)
    )
    return "library" if by_library else "tiles"


def _offsets(ends, b, m):
    """Ends of the b · E groups of rows when the b batches are concatenated."""
    return (torch.arange(b, device=ends.device)[:, None] * m + ends).flatten().int()


def products_by_library(x, W, ends):
    """grouped_products by torch's grouped GEMM."""
    b, m, p = x.shape
    y = F.grouped_mm(x.reshape(b * m, p).contiguous(), W.flatten(0, 1), offs=_offsets(ends, b, m))
    return y.view(b, m, -1)


def gradients_by_library(x, dy, ends):
    """grouped_gradients by torch's grouped GEMM."""
    b, m, p = x.shape
    rows = dy.reshape(b * m, -1).contiguous()
    dW = F.grouped_mm(x.reshape(b * m, p).contiguous().t(), rows, offs=_offsets(ends, b, m))
    return dW.view(b, len(ends), p, -1)


TILE = 64  # rows of one expert in a tile


def tiles(m, ends):
    """Put rows into tiles of one expert each -> expert of each tile (T,), place of each row (m,) among the T · TILE places.

    The last tile of an expert may be partly empty: T = m // TILE + E tiles are always enough.
    """
    E, T = len(ends), m // TILE + len(ends)
    counts = ends.diff(prepend=ends.new_zeros(1))
    tile_ends = (-(-counts // TILE)).cumsum(0)
    first_row = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1])) * TILE  # place of each expert's first row
    expert_of_tile = torch.searchsorted(tile_ends, torch.arange(T, device=ends.device), right=True).clamp(max=E - 1)
    row = torch.arange(m, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    return expert_of_tile, first_row[expert] + row - (ends - counts)[expert]


def _tiled(x, T, place):
    """(b, m, p) -> (b, T, TILE, p), 0 at places without a row."""
    return x.new_zeros(x.shape[0], T * TILE, x.shape[2]).index_copy(1, place, x).view(x.shape[0], T, TILE, -1)


def products_by_tiles(x, W, ends):
    """grouped_products without reading the ends: each tile gets a copy of its expert's matrix."""
    expert, place = tiles(x.shape[1], ends)
    y = _tiled(x, len(expert), place) @ W[:, expert]  # (b, T, TILE, q)
    return y.flatten(1, 2)[:, place]


def gradients_by_tiles(x, dy, ends):
    """grouped_gradients without reading the ends."""
    expert, place = tiles(x.shape[1], ends)
    of_tiles = _tiled(x, len(expert), place).transpose(2, 3) @ _tiled(dy, len(expert), place)  # (b, T, p, q)
    owner = expert == torch.arange(len(ends), device=ends.device)[:, None]  # (E, T)
    return (owner.to(x.dtype) @ of_tiles.flatten(2)).view(x.shape[0], len(ends), x.shape[2], dy.shape[2])


# ---------------------------------------------------------------------------------------
# Mixtures of matrices


def btt_moe(x, A, B, index, gate, num_experts):
    """y = Σ_k gate · (BTT of expert index) x.

    x (n, g·a), A (g, a, E·r·f), B (f, g·E·r, e), index (n, k) int64, gate (n, k) -> (n, f·e), in x's dtype or autocast's.
    """
    order, inverse, ends = sort_by_expert(index, num_experts)
    rows = Spread.apply(x.to(compute_dtype(x)), order, inverse)
    return Collect.apply(btt_experts(rows, A, B, ends, gate.flatten()[order]), order, inverse, len(x))


def btt_experts(x, A, B, ends, gate=None):
    """Sorted rows x (m, g·a), each through its expert's slice of the BTT and times its gate (m,), if any -> (m, f·e)."""
    (g, a, _), (f, gEr, e), E, m = A.shape, B.shape, len(ends), len(x)
    r, dtype = gEr // (g * E), compute_dtype(x)
    A = A.to(dtype).view(g, a, E, r * f).transpose(1, 2)  # (g, E, a, r·f)
    B = B.to(dtype).view(f, g, E, r, e).transpose(1, 2).reshape(f, E, g * r, e)
    z = grouped_products(x.to(dtype).reshape(m, g, a).transpose(0, 1), A, ends)  # (g, m, r·f)
    z = z.view(g, m, r, f).permute(3, 1, 0, 2).reshape(f, m, g * r)
    if gate is not None:
        z = (z * gate[:, None]).to(dtype)
    y = grouped_products(z, B, ends)  # (f, m, e)
    return y.transpose(0, 1).reshape(m, f * e)


def dense_moe(x, W, index, gate):
    """y = Σ_k gate · W[index] x. x (n, d_in), W (E, d_in, d_out), index (n, k) int64, gate (n, k) -> (n, d_out)."""
    order, inverse, ends = sort_by_expert(index, len(W))
    rows = Spread.apply(x.to(compute_dtype(x)), order, inverse)
    return Collect.apply(dense_experts(rows, W, ends, gate.flatten()[order]), order, inverse, len(x))


def dense_experts(x, W, ends, gate=None):
    """Sorted rows x (m, d_in), each times its expert's matrix and its gate (m,), if any -> (m, d_out)."""
    dtype = compute_dtype(x)
    y = grouped_products(x.to(dtype)[None], W.to(dtype)[None], ends)[0]
    return y if gate is None else (y * gate[:, None]).to(dtype)
