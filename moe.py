"""Mixtures of experts: of the matrices of every linear layer, or of whole FFNs.

moe="linear" makes every linear layer a mixture (Potapczynski, Qiu et al., "Searching for Efficient Linear Layers over
a Continuous Space of Structured Matrices", NeurIPS 2024, section 5): a router picks top_k of num_experts matrices for
each token, and the softmax over their logits weighs them. A BTT of rank num_experts · rank is such a mixture already:
expert e is slice e of its rank index, and the gates scale z, what passes between its two products,

    z[n, g, E r f] = Σ_a x[n, g, a] · A[g, a, (E r f)]     y[n, f, e] = Σ_{g E r} gate[n, E] · z[n, g, E r, f] · B[f, (g E r), e]

of which only the picked slices are computed. A low-rank matrix is the BTT of one block (g = f = 1), a Monarch one of
rank 1: "low_rank" and "monarch" are mixtures in the same way, and "dense" is one of whole matrices.
moe="ffn" is the standard MoE: each block has num_experts FFNs, their layers of whatever structure, and one router.

Time and memory follow top_k: the n · k pairs of a token and its expert are sorted by expert, and each expert
multiplies its own rows (grouped_products); BTT-MoE and low-rank-MoE on a GPU have kernels of their own (moe_kernels).
No token is dropped. Nothing waits for the device, no shape depends on values. Gradients of the gates come from what they scale.

Shapes: n tokens, k = top_k, m = n · k rows of a token and an expert, E experts; g a f e r as in einsum_linear.
Imports from configurator, options, theta, kernels, moe_kernels and einsum_linear.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from configurator import ConfigError
from einsum_linear import CoreLinear, Dense, EinsumLinear, apply_all, init_std, make_linear
from kernels import BTTSizes, compute_dtype, gelu, takes_kernels
from moe_kernels import btt_mixture, fits, routed_btt_mixture, router_fits
from options import check_top_k
from theta import check_mixture

AUXILIARY, Z = 0.01, 0.1  # loss = cross-entropy + AUXILIARY · mean over routers of (load balance + Z · z-loss)
BALANCE = 0.1  # step of the routers' biases, in standard deviations of their logits

# ---------------------------------------------------------------------------------------
# Routers


class Router(nn.Module):
    """Picks top_k experts for each token: x (n, d_in) -> index (n, k) int64, gate (n, k) of rows that sum to 1, logits (n, E).

    Logits are float32, also under autocast: of 16 bits, many would tie. The rows of the matrix start at one length
    and with mean 0, so that no expert is ahead at first: neither by chance, nor by the mean that inputs from a GELU
    have. With top_k = 1 the only gate is 1, and the router learns from the auxiliary loss alone.

    `bias` (E,) is added to the logits that experts are picked by, not to those that the gates are made of. It has no
    gradient: `balance` moves it after every update.
    """

    def __init__(self, d_in, num_experts, top_k):
        super().__init__()
        self.in_features, self.out_features, self.top_k, self.zero_init = d_in, num_experts, top_k, False
        self.init_std = [init_std(d_in, num_experts)]
        self.weight = nn.Parameter(torch.empty(num_experts, d_in))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        if self.weight.is_meta:  # as einsum_linear.draw
            return
        nn.init.normal_(self.weight)
        self.weight -= self.weight.mean(dim=1, keepdim=True)
        self.weight *= self.init_std[0] * math.sqrt(self.in_features) / self.weight.norm(dim=1, keepdim=True)

    @property
    def cores(self):
        return [self.weight]

    @property
    def flops_per_token(self):
        return 2 * self.in_features * self.out_features

    def forward(self, x):
        if takes_kernels(x) and self.out_features <= 128:
            logits, index, gate = torch.ops.nanoeinsum.route(
                x.to(compute_dtype(x)), self.weight.float(), self.bias, self.top_k
            )
            return index, gate, logits
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        index = pick(logits.detach() + self.bias, self.top_k)
        return index, logits.gather(1, index).softmax(dim=1), logits


def pick(logits, k):
    """The k largest of each row of (n, E) logits -> (n, k) int64.

    Ties are broken fairly: row i looks at the experts in the order i, i + 1, … (mod E), so that equal logits,
    among which topk would always find the same ones, go to all experts in turn.
    """
    n, E = logits.shape
    turn = (torch.arange(n, device=logits.device)[:, None] + torch.arange(E, device=logits.device)) % E
    return turn.gather(1, logits.gather(1, turn).topk(k).indices)


# A routing is what a router made of one batch: index, gate (n, k) without gradient, logits (n, E). Layers add theirs to a list.
# A report is what is known of one router and one batch: (4 + 2 E,) float32, whose sums over batches and processes,
# divided by those of the first column, are the means. Only the auxiliary loss has a gradient. Its columns: 1; the
# auxiliary loss; entropy of a token's gates; standard deviation of logits; E shares of the rows; E mean gates.
AUX, ENTROPY, SPREAD, LOADS = 1, 2, 3, 4


def report_size(num_experts):
    return LOADS + 2 * num_experts


def report(routings):
    """A list of R routings of n tokens -> (R, 4 + 2 E), as said above. All at once: a router has 20 small kernels else.

    The load balance (Fedus et al., "Switch Transformers", JMLR 2022, eq. 4) is E · Σ_e load_e · p_e with the mean
    probability p_e under the softmax of all logits, 1 where both are even. The z-loss (Zoph et al., "ST-MoE", 2022,
    eq. 5) is the mean of logsumexp², which keeps logits small. Their means are over the tokens of this
    batch: with several micro-batches or processes each has an auxiliary loss of its own, and the mean of these counts.
    """
    index, gate, logits = (torch.stack(tensors) for tensors in zip(*routings))  # (R, n, k), (R, n, k), (R, n, E)
    zeros = torch.zeros_like(logits)
    load = zeros.scatter(2, index, 1 / index.shape[2]).mean(dim=1)  # (R, E)
    balance = logits.shape[2] * (load * logits.softmax(dim=2).mean(dim=1)).sum(dim=1)
    aux = balance + Z * logits.logsumexp(dim=2).square().mean(dim=1)
    entropy = torch.special.entr(gate).sum(dim=2).mean(dim=1)
    spread = logits.detach().std(dim=1, correction=0).mean(dim=1)
    single = torch.stack((torch.ones_like(aux), aux, entropy, spread), dim=1)
    return torch.cat((single, load, zeros.scatter(2, index, gate).mean(dim=1)), dim=1)


def auxiliary_loss(reports):
    """What the routers add to the cross-entropy. reports (routers, 4 + 2 E) of one batch."""
    return AUXILIARY * reports[:, AUX].mean()


@torch.no_grad()
def balance(model, reports):
    """After an update: experts with few rows are picked more easily from now on, those with many less.

    reports (routers, 4 + 2 E), summed over the whole batch, all processes: their biases stay equal.
    The auxiliary loss alone, shared by all routers, does not keep experts alive at high rates and small batches:
    its gradient drowns in that of the cross-entropy, which Adam scales it with. A bias balances by itself (Wang et
    al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024), here by steps in proportion to
    what is amiss and to the size of the logits, whatever these grow to.
    """
    means = reports / reports[:, :1]
    load = means[:, LOADS:].chunk(2, dim=1)[0]
    steps = BALANCE * means[:, SPREAD, None] * (1 - load.shape[1] * load).clamp(-1, 1)
    for router, step in zip((module for module in model.modules() if isinstance(module, Router)), steps):
        router.bias += step


def router_names(model):
    """Names of the model's routers, in the order of its reports, by the layer that each serves: "blocks.0.attn.q"."""
    return [name.removesuffix(".router") for name, module in model.named_modules() if isinstance(module, Router)]


def figures(names, sums):
    """Summed reports, (routers, 4 + 2 E) on any device, as {name: plain numbers}: what a row of the log has.

    load            share of the rows that each expert got, 1/E where they are even
    token_entropy   of the gates of a token, in nats, mean over tokens: 0 where one expert has all the weight, at most log k
    mean_entropy    of the mean of the gates: at most log E, where all experts have the same weight
    """
    sums = sums.cpu().double()  # there: Apple's GPUs have no float64
    means = sums / sums[:, :1]
    load, gate = means[:, LOADS:].chunk(2, dim=1)
    mean_entropy = torch.special.entr(gate).sum(dim=1)

    def rounded(values):
        return [round(value, 4) for value in values.tolist()]

    columns = zip(names, load, rounded(means[:, ENTROPY]), rounded(mean_entropy))
    return {
        name: {"load": rounded(of_experts), "token_entropy": of_token, "mean_entropy": of_mean}
        for name, of_experts, of_token, of_mean in columns
    }


def set_top_k(model, top_k, option="top_k"):
    """From now on pick so many experts a token, in all mixtures of the model: another number than in training, say.

    option: what a ConfigError calls it.
    """
    mixtures = [module for module in model.modules() if hasattr(module, "top_k")]
    if not mixtures:
        raise ConfigError(f"{option}={top_k}: the model has no mixtures, leave it out")
    check_top_k(option, top_k, model.config.num_experts)
    for module in mixtures:
        module.top_k = top_k


# ---------------------------------------------------------------------------------------
# Rows sorted by expert


def sort_by_expert(index, num_experts):
    """index (n, k) -> order (m,), inverse (m,), ends (E,), all int64.

    Row i of the sorted ones is row order[i] of the unsorted, which is of token order[i] // k; unsorted row j is in
    place inverse[j]; the rows of expert e end before ends[e].
    """
    experts, order = index.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True)
    return order, inverse, ends


class _Spread(torch.autograd.Function):
    """Tokens (n, d) -> sorted rows (m, d). Backward sums a token's rows in a fixed order, as index_add would not."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        ctx.n = len(x)
        return x[order // (len(order) // len(x))]

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return dy[inverse].view(ctx.n, -1, dy.shape[1]).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
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
    if not x.is_cuda:
        return products_by_loop(x, W, ends)
    return products_by_library(x, W, ends) if library_takes(x, W) else products_by_tiles(x, W, ends)


@torch.library.custom_op("nanoeinsum::grouped_gradients", mutates_args=())
def grouped_gradients(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of W: dW[b, e] = Σ over e's rows of x[b, i]ᵀ dy[b, i], 0 where it has none. -> (b, E, p, q)"""
    if not x.is_cuda:
        return gradients_by_loop(x, dy, ends)
    return gradients_by_library(x, dy, ends) if library_takes(x, dy) else gradients_by_tiles(x, dy, ends)


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
    """On a CPU, which may look at the ends."""
    y, start = x.new_empty(x.shape[0], x.shape[1], W.shape[3]), 0
    for e, end in enumerate(ends.tolist()):
        y[:, start:end] = x[:, start:end] @ W[:, e]
        start = end
    return y


def gradients_by_loop(x, dy, ends):
    dW, start = x.new_empty(x.shape[0], len(ends), x.shape[2], dy.shape[2]), 0
    for e, end in enumerate(ends.tolist()):
        dW[:, e] = x[:, start:end].transpose(1, 2) @ dy[:, start:end]
        start = end
    return dW


def library_takes(*operands):
    """Whether torch's grouped GEMM does without a look at the ends: bfloat16 from Hopper on, widths of 16 bytes."""
    return (
        hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(operands[0].device) >= (9, 0)
        and all(tensor.dtype == torch.bfloat16 and tensor.shape[-1] % 8 == 0 for tensor in operands)
    )


def _offsets(ends, b, m):
    """Ends of the b · E groups of rows where the b batches follow each other."""
    return (torch.arange(b, device=ends.device)[:, None] * m + ends).flatten().int()


def products_by_library(x, W, ends):
    b, m, p = x.shape
    y = F.grouped_mm(x.reshape(b * m, p).contiguous(), W.flatten(0, 1), offs=_offsets(ends, b, m))
    return y.view(b, m, -1)


def gradients_by_library(x, dy, ends):
    b, m, p = x.shape
    rows = dy.reshape(b * m, -1).contiguous()
    dW = F.grouped_mm(x.reshape(b * m, p).contiguous().t(), rows, offs=_offsets(ends, b, m))
    return dW.view(b, len(ends), p, -1)


TILE = 64  # rows of one expert that are multiplied at a time


def tiles(m, ends):
    """Rows in tiles of one expert each -> expert of every tile (T,), place of every row (m,) in the T · TILE rows of all.

    An expert's last tile may not be full: of m rows there are never more than m / TILE + E tiles, and so many are taken.
    """
    E, T = len(ends), m // TILE + len(ends)
    counts = ends.diff(prepend=ends.new_zeros(1))
    tile_ends = (-(-counts // TILE)).cumsum(0)
    first_row = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1])) * TILE  # of each expert, in tiles
    expert_of_tile = torch.searchsorted(tile_ends, torch.arange(T, device=ends.device), right=True).clamp(max=E - 1)
    row = torch.arange(m, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    return expert_of_tile, first_row[expert] + row - (ends - counts)[expert]


def _tiled(x, T, place):
    """(b, m, p) -> (b, T, TILE, p), 0 where no row is."""
    return x.new_zeros(x.shape[0], T * TILE, x.shape[2]).index_copy(1, place, x).view(x.shape[0], T, TILE, -1)


def products_by_tiles(x, W, ends):
    """Without a look at the ends: a matrix is copied for every tile that it multiplies."""
    expert, place = tiles(x.shape[1], ends)
    y = _tiled(x, len(expert), place) @ W[:, expert]  # (b, T, TILE, q)
    return y.flatten(1, 2)[:, place]


def gradients_by_tiles(x, dy, ends):
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
    (g, a, _), (f, gEr, e), dtype = A.shape, B.shape, compute_dtype(x)
    sizes = BTTSizes(g, a, f, e, gEr // (g * num_experts))
    if takes_kernels(x) and fits(sizes, num_experts, index.shape[1]):
        return btt_mixture(x.to(dtype), A.to(dtype), B.to(dtype), index, gate, num_experts)
    order, inverse, ends = sort_by_expert(index, num_experts)
    rows = _Spread.apply(x.to(dtype), order, inverse)
    return _Collect.apply(btt_experts(rows, A, B, ends, gate.flatten()[order]), order, inverse, len(x))


def btt_experts(x, A, B, ends, gate=None):
    """Sorted rows x (m, g·a), each through its expert's slice of the BTT, times gate (m,) -> (m, f·e)."""
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
    rows = _Spread.apply(x.to(compute_dtype(x)), order, inverse)
    return _Collect.apply(dense_experts(rows, W, ends, gate.flatten()[order]), order, inverse, len(x))


def dense_experts(x, W, ends, gate=None):
    """Sorted rows x (m, d_in), each times its expert's matrix and its gate (m,) -> (m, d_out)."""
    dtype = compute_dtype(x)
    y = grouped_products(x.to(dtype)[None], W.to(dtype)[None], ends)[0]
    return y if gate is None else (y * gate[:, None]).to(dtype)


class Mixture(CoreLinear):
    """A linear layer of num_experts matrices, of which each token has top_k. The experts share bias, RMS cap and gains.

    What an expert's share in the layer means for initialisation and learning rates (structure-aware µP, einsum_linear
    and mup). A token sees the k picked experts side by side: one layer of k · r ranks for a BTT, whose second core is
    scaled by gates that sum to 1, about 1/k each. That layer starts and learns as it would without gates if

    - the first core has the std of its shape in it, fan-in a and fan-out k·r·f, and the rate of fan-in a;
    - the second, of fan-in k·g·r, has k times the std and k times the rate that such a core has: the gates' 1/k is
      undone. Its rate, lr · 768 / (k·g·r · 2) times k, is that of one expert alone, whatever k: the experts' updates
      have one direction, and the gates average them. Its std is up to √k above that of one expert alone: at first the
      experts are independent, and their average would be √k smaller.

    For whole matrices likewise: std √k · init_std(d_in, d_out), rate lr · 768 / d_in. The layers inside an FFN that is
    an expert are mixed by nobody, and start as one expert alone (active=1).

    x (..., d_in), index (n, k) int64, gate (n, k) -> (..., d_out). router: its own, or None where it is given index and gate.
    """

    def __init__(self, d_in, d_out, num_experts, top_k, routed, shapes, **kwargs):
        super().__init__(d_in, d_out, shapes, **kwargs)
        self.num_experts, self.top_k = num_experts, top_k
        self.router = Router(d_in, num_experts, top_k) if routed else None

    def extra_repr(self):
        return f"{self.in_features} -> {self.out_features}, {self.top_k} of {self.num_experts} experts"


class BTTMixture(Mixture):
    """Experts are rank slices of a BTT: cores A (g, a, E·r·f) and B (f, g·E·r, e), as of kernels.btt with rank E·r."""

    def __init__(self, sizes, num_experts, top_k, active, routed, **kwargs):
        a, _, g, _, e, f, r = sizes
        E = num_experts
        super().__init__(
            g * a, f * e, E, top_k, routed, [(g, a, E * r * f), (f, g * E * r, e)], fan_ins=[a, g * r],
            stds=[init_std(a, active * r * f), active * init_std(active * g * r, e)], **kwargs,
        )  # fmt: skip
        self.sizes = sizes

    @property
    def flops_per_token(self):
        a, _, g, _, e, f, r = self.sizes
        return 2 * self.top_k * g * r * f * (a + e)

    def forward(self, x, index, gate):
        y = btt_moe(x.reshape(-1, self.in_features), *self.effective_cores(), index, gate, self.num_experts)
        return self.finish(y, x)

    def experts(self, x, ends, gate=None):
        """Sorted rows (m, d_in) -> (m, d_out), without bias."""
        return btt_experts(x, *self.effective_cores(), ends, gate)

    def materialize(self, gate):
        """The matrix (d_out, d_in) of a token whose gates are these, (E,)."""
        a, _, g, _, e, f, r = self.sizes
        A, B = self.effective_cores()
        A, B = A.view(g, a, self.num_experts, r, f), B.view(f, g, self.num_experts, r, e)
        return torch.einsum("k,gakrf,fgkre->fega", gate, A, B).reshape(self.out_features, self.in_features)


class DenseMixture(Mixture):
    """Experts are whole matrices: one core (E, d_in, d_out), without a cap, as dense layers are."""

    def __init__(self, d_in, d_out, num_experts, top_k, active, routed, **kwargs):
        std = math.sqrt(active) * init_std(d_in, d_out)
        super().__init__(
            d_in, d_out, num_experts, top_k, routed, [(num_experts, d_in, d_out)], stds=[std], normalize=False, **kwargs
        )

    @property
    def flops_per_token(self):
        return 2 * self.top_k * self.in_features * self.out_features

    def forward(self, x, index, gate):
        return self.finish(dense_moe(x.reshape(-1, self.in_features), self.cores[0], index, gate), x)

    def experts(self, x, ends, gate=None):
        """Sorted rows (m, d_in) -> (m, d_out), without bias."""
        return dense_experts(x, self.cores[0], ends, gate)

    def materialize(self, gate):
        """The matrix (d_out, d_in) of a token whose gates are these, (E,)."""
        return torch.einsum("k,kio->oi", gate, self.cores[0])


def make_mixture(d_in, d_out, num_experts, top_k, routed=True, mixed=True, **options):
    """A d_in -> d_out mixture whose experts are what make_linear makes of `options`: `rank` is the rank of one expert.

    routed  with a router of its own, else index and gate are given to it
    mixed   gates mix its outputs; False inside an FFN that is itself an expert
    """
    with torch.device("meta"):
        expert = make_linear(d_in, d_out, **options)
    kwargs = {name: options[name] for name in ("bias", "normalize", "gain", "zero_init") if name in options}
    active = top_k if mixed else 1
    if isinstance(expert, Dense):
        kwargs = {name: value for name, value in kwargs.items() if name in ("bias", "zero_init")}
        return DenseMixture(d_in, d_out, num_experts, top_k, active, routed, **kwargs)
    check_mixture(options.get("structure"), getattr(expert, "sizes", expert))
    return BTTMixture(expert.sizes, num_experts, top_k, active, routed, **kwargs)


# ---------------------------------------------------------------------------------------
# In the model. `routings` is a list that routers add theirs to, or None.


def apply(layer, x, routings, after_gelu=False):
    """layer(x), or layer(gelu(x)), where the layer may be a mixture with a router of its own."""
    if isinstance(layer, EinsumLinear):
        return layer(x, after_gelu)
    if isinstance(layer, BTTMixture) and takes_kernels(x):
        a, _, g, _, e, f, r = layer.sizes
        if router_fits(BTTSizes(g, a, f, e, r), layer.num_experts, layer.top_k):
            return apply_by_kernels(layer, x, routings, after_gelu)
    x = gelu(x) if after_gelu else x
    return layer(x, *route(layer.router, x, routings)) if isinstance(layer, Mixture) else layer(x)


def apply_by_kernels(layer, x, routings, after_gelu):
    """The same of a BTTMixture: the kernels that make its gradients make the router's and the GELU's, too."""
    dtype, router = compute_dtype(x), layer.router
    A, B = (core.to(dtype) for core in layer.effective_cores())
    rows = x.reshape(-1, layer.in_features).to(dtype)
    y, *routed = routed_btt_mixture(rows, router.weight.float(), router.bias, A, B, layer.top_k, after_gelu)
    if routings is not None:
        routings.append(routed)
    return layer.finish(y, x)


def apply_layers(layers, x, routings, router=None):
    """[layer(x) for layer in layers], some of which may be mixtures; with a router, one for all of them."""
    if router is not None:
        index, gate = route(router, x, routings)
        return [layer(x, index, gate) for layer in layers]
    if any(isinstance(layer, Mixture) for layer in layers):
        return [apply(layer, x, routings) for layer in layers]
    return apply_all(layers, x)


def apply_ffns(up, down, activation, x, routings, router):
    """Σ_k gate · down_e(activation(up_e(x))): a mixture of FFNs, of which `up` and `down` hold the layers."""
    index, gate = route(router, x, routings)
    order, inverse, ends = sort_by_expert(index, up.num_experts)
    rows = _Spread.apply(x.reshape(-1, x.shape[-1]).to(compute_dtype(x)), order, inverse)
    hidden = activation(up.finish(up.experts(rows, ends), rows))  # (m, d_ff)
    y = down.experts(hidden, ends, gate.flatten()[order])
    return down.finish(_Collect.apply(y, order, inverse, len(index)), x)


def route(router, x, routings):
    """x (..., d_in) -> index, gate (n, k)"""
    index, gate, logits = router(x.reshape(-1, x.shape[-1]))
    if routings is not None:
        routings.append((index, gate.detach(), logits))
    return index, gate
