"""Linear layers whose matrix is an einsum of small cores.

The index of the input is written as three indices (α β γ), that of the output as
three (δ ε φ), and two cores joined by a rank index ρ take the place of the d_out × d_in matrix:

    y[δ ε φ] = Σ_{α β γ ρ}  B[β γ ε φ ρ] · A[α γ δ φ ρ] · x[α β γ]

Seven exponents θ = (θα θβ θγ θδ θε θφ θρ) give the sizes, d_α = d_in^θα … d_δ = d_out^θδ …
d_ρ = min(d_in, d_out)^θρ, and every θ is a structure: low-rank, Kronecker, Tensor-Train,
Monarch, Block Tensor-Train (BTT) and everything between (Potapczynski, Qiu et al., "Searching for
Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 3).
Tensor-Trains and BTTs of three or more cores are ChainLinear.

    python einsum_linear.py --d_in=1024 --d_out=4096                            # all named structures
    python einsum_linear.py --d_in=1024 --d_out=4096 --theta=.5,0,.5,0,.5,.5,0  # one point of the space
    python einsum_linear.py --plot=taxonomy.png                                 # their places in (ω ψ ν)

θ, sizes and the named structures need no tensors and are in theta.py: to add a structure, write a function there.
In code a b g = α β γ, d e f = δ ε φ, r = ρ and n is the number of tokens.
"""

if __name__ == "__main__":  # lab/structures.py is the command; it reports mistakes before torch is imported
    from lab import structures

    raise SystemExit(structures.run_command())

import inspect
import math
from contextlib import contextmanager

import torch
from torch import nn

from configurator import ConfigError
from kernels.btt import BTTSizes, btt, btt_joined, joins, two_products
from theta import ChainSizes, Sizes, factor_sizes, layer_sizes, multiplications, taxonomy  # noqa: F401


class Dense(nn.Linear):
    """A plain matrix, with the interface of CoreLinear except `product`: its forward is torch's.

    `normalize` caps its RMS and gives it a gain, as CoreLinear does for a core.
    """

    def __init__(self, d_in, d_out, bias=False, zero_init=False, normalize=False, gain=True):
        self.zero_init = zero_init
        super().__init__(d_in, d_out, bias=bias)
        self.normalize = normalize
        self.gains = nn.Parameter(torch.ones(1)) if normalize and gain else None
        self.matrix = None  # the effective matrix, inside multiplied_out

    def reset_parameters(self):
        self.fan_ins, self.init_std = [self.in_features], [init_std(self.in_features, self.out_features)]
        draw(self.weight, 0.0 if self.zero_init else self.init_std[0])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def cores(self):
        return [self.weight]

    @property
    def flops_per_token(self):
        return 2 * self.in_features * self.out_features

    def forward(self, x, input_fn=None):
        """x (..., d_in) -> W input_fn(x) + bias, (..., d_out). input_fn: an elementwise function, or None."""
        W = self.materialize() if self.matrix is None else self.matrix
        return nn.functional.linear(x if input_fn is None else input_fn(x), W, self.bias)

    def materialize(self):
        """The matrix W, (d_out, d_in)."""
        if not self.normalize:
            return self.weight
        return self.weight * ((1 if self.gains is None else self.gains) / _excess(self.weight, self.init_std[0]))

    @torch.no_grad()
    def load_dense(self, W):
        """Copy W (d_out, d_in)."""
        self.weight.copy_(W)
        if self.gains is not None:
            self.gains.fill_(_excess(self.weight, self.init_std[0]))


def apply_together(layers, x):
    """[layer(x) for layer in layers]. In training, dense layers and BTTs that gain from it on a GPU run as one layer."""
    if torch.is_grad_enabled() and joins(x, [getattr(layer, "btt_sizes", None) for layer in layers]):
        ys = btt_joined(x, [layer.effective_cores() for layer in layers])
        return [layer.finish(y, x) for layer, y in zip(layers, ys)]
    if not all(type(layer) is Dense for layer in layers) or not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        return [layer(x) for layer in layers]
    bias = torch.cat(biases) if biases else None
    y = nn.functional.linear(x, torch.cat([layer.materialize() for layer in layers]), bias)
    return y.split([layer.out_features for layer in layers], dim=-1)


class CoreLinear(nn.Module):
    """A linear layer made of cores. This class holds the cores, their RMS caps, their gains and the bias. A structure adds

        product(x)        (..., d_in) -> W x, (n, …), n being the product of the leading axes; without bias
        flops_per_token   2 × multiplications
        materialize()     W, (d_out, d_in)
        load_dense(W)     sets the cores to the best approximation of W (d_out, d_in)

    A core is a batched matrix, a parameter of shape (batch, fan_in, fan_out); `shapes` lists them. Its learning rate
    follows from `fan_ins` (optim.py) and its initial values from `init_std`, one number for each core. Both follow from
    the shapes unless the arguments `fan_ins` and `stds` override them. `zero_init` sets the last core to zero.
    `normalize` caps each core's RMS at its initial value and gives it a learnable scale ("Compute Better Spent",
    ICML 2024, section 4); `gain=False` leaves the scale out, for a layer whose output is normalised anyway.
    """

    def __init__(
        self, d_in, d_out, shapes, bias=False, normalize=True, gain=True, zero_init=False, fan_ins=None, stds=None
    ):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.fan_ins = fan_ins or [fan_in for _, fan_in, _ in shapes]
        self.init_std = stds or [init_std(fan_in, fan_out) for _, fan_in, fan_out in shapes]
        self.normalize = normalize
        self.gains = nn.Parameter(torch.ones(len(shapes))) if normalize and gain else None
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.zero_init = zero_init
        self.matrix = None  # the effective matrix, inside multiplied_out
        self.reset_parameters()

    def reset_parameters(self):
        for core, std in zip(self.cores, self.init_std):
            draw(core, std)
        if self.zero_init:
            nn.init.zeros_(self.cores[-1])

    def effective_cores(self):
        """The cores as forward uses them: under the RMS cap and times their gains. The host does not wait for the device."""
        cores = list(self.cores)
        if self.normalize:
            for i, std in enumerate(self.init_std):
                scale = 1 if self.gains is None else self.gains[i]
                cores[i] = cores[i] * (scale / _excess(cores[i], std))
        return cores

    @torch.no_grad()
    def load_cores(self, cores):
        """Set the cores so that the effective cores are these. Under a cap without gains, this holds up to a scale."""
        for i, (core, std) in enumerate(zip(cores, self.init_std)):
            self.cores[i].copy_(core.reshape(self.cores[i].shape))
            if self.gains is not None:
                self.gains[i] = _excess(self.cores[i], std)

    def forward(self, x, input_fn=None):
        """x (..., d_in) -> W input_fn(x), (..., d_out), in x's dtype or autocast's. input_fn: an elementwise function, or None."""
        x = x if input_fn is None else input_fn(x)
        if self.matrix is not None:
            return nn.functional.linear(x, self.matrix, self.bias)
        return self.finish(self.product(x), x)

    def finish(self, y, x):
        """Outputs (n, …) -> (..., d_out) with the leading axes of x, plus bias."""
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextmanager
def multiplied_out(model):
    """Within this context the structured layers of a model use their matrices, multiplied out once: for few tokens at a time.

    So do dense layers under an RMS cap. While it decodes, a GPU waits for launches and for weights, not for FLOPs.
    Parameters must not change within the context.
    """
    layers = [module for module in model.modules() if isinstance(module, (EinsumLinear, ChainLinear))]
    layers += [module for module in model.modules() if isinstance(module, Dense) and module.normalize]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.matrix = layer.materialize().contiguous()  # stored like a dense weight, for the same kernels
        yield
    finally:
        for layer in layers:
            layer.matrix = None


def _excess(core, std):
    """The factor by which the RMS of a core exceeds its initial value, at least 1."""
    return (torch.linalg.vector_norm(core) / (std * math.sqrt(core.numel()))).clamp(min=1)


class EinsumLinear(CoreLinear):
    """y = W x with W[δ ε φ, α β γ] = Σ_ρ B[β γ ε φ ρ] · A[α γ δ φ ρ].

    The core used first contracts its input index for every γ, the one used second contracts
    what is left for every φ. Both orders give the same result; `order` is "AB" or "BA",
    whichever costs fewer multiplications. Cores, in the order of use:

        order   cores[0]              cores[1]
        "AB"    A (γ, α, ρ·φ·δ)       B (φ, β·γ·ρ, ε)
        "BA"    B (γ, β, ρ·φ·ε)       A (φ, α·γ·ρ, δ)

    In memory x is (γ β α) and y is (φ ε δ), last index fastest: a Kronecker product (γ = φ = 1) is then
    B ⊗ A, and a BTT (β = δ = 1) needs no copy of x, nor of z between its two products.
    """

    def __init__(self, sizes, **kwargs):
        a, b, g, d, e, f, r = sizes
        mults = multiplications(sizes)
        order = min(mults, key=mults.get)
        shapes = {
            "AB": [(g, a, r * f * d), (f, b * g * r, e)],
            "BA": [(g, b, r * f * e), (f, a * g * r, d)],
        }
        super().__init__(a * b * g, d * e * f, shapes[order], **kwargs)
        self.sizes, self.order, self.flops_per_token = sizes, order, 2 * mults[order]

    @property
    def btt_sizes(self):
        """BTTSizes if kernels.btt computes this layer (β = δ = 1, not multiplied out), otherwise None."""
        a, b, g, d, e, f, r = self.sizes
        return BTTSizes(g, a, f, e, r) if b == d == 1 and self.matrix is None else None

    def forward(self, x, input_fn=None):
        if self.btt_sizes is not None:
            return self.finish(btt(x, *self.effective_cores(), input_fn=input_fn), x)
        return super().forward(x, input_fn)

    def product(self, x):
        a, b, g, d, e, f, r = self.sizes
        n = x.numel() // self.in_features
        x_4d = x.reshape(n, g, b, a)
        # The first core contracts α (or β) for every γ, the second makes ε (or δ) for every φ.
        if self.order == "AB":
            y = two_products(x_4d.permute(1, 3, 0, 2), *self.effective_cores())  # (γ, α, n, β) -> (φ, δ, n, ε)
            y = y.permute(2, 0, 3, 1)
        else:
            y = two_products(x_4d.permute(1, 2, 0, 3), *self.effective_cores())  # (γ, β, n, α) -> (φ, ε, n, δ)
            y = y.permute(2, 0, 1, 3)
        return y  # (n, φ, ε, δ)

    def materialize(self):
        """The matrix W, (d_out, d_in), by the definition in one einsum, independent of forward."""
        a, b, g, d, e, f, r = self.sizes
        first, second = self.effective_cores()
        if self.order == "AB":
            W = torch.einsum("garfd, fbgre -> fedgba", first.view(g, a, r, f, d), second.view(f, b, g, r, e))
        else:
            W = torch.einsum("gbrfe, fagrd -> fedgba", first.view(g, b, r, f, e), second.view(f, a, g, r, d))
        return W.reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def load_dense(self, W):
        """Set the cores to the best approximation of W (d_out, d_in) in the Frobenius norm, which is exact.

        For every (γ φ) the slice of W between (δ ε) and (α β), rearranged to (αδ) × (βε), is a
        matrix of rank ρ, and no two slices share a parameter: each is a truncated SVD. For low-rank
        it is the SVD of W, for BTT and Monarch an SVD of each block, for Kronecker and
        Tensor-Train the SVD of the rearranged W (Van Loan and Pitsianis, 1993).
        """
        a, b, g, d, e, f, r = self.sizes
        slices = W.double().reshape(f, e, d, g, b, a).permute(3, 0, 5, 2, 4, 1)  # (γ, φ, α, δ, β, ε)
        U, S, V = torch.linalg.svd(slices.reshape(g, f, a * d, b * e), full_matrices=False)
        root = S[..., :r].sqrt()
        A = (U[..., :r] * root[..., None, :]).view(g, f, a, d, r)
        B = (root[..., None] * V[..., :r, :]).view(g, f, r, b, e)
        if self.order == "AB":
            self.load_cores([A.permute(0, 2, 4, 1, 3), B.permute(1, 3, 0, 2, 4)])  # (γ α ρ φ δ), (φ β γ ρ ε)
        else:
            self.load_cores([B.permute(0, 3, 2, 1, 4), A.permute(1, 2, 0, 4, 3)])  # (γ β ρ φ ε), (φ α γ ρ δ)

    @classmethod
    def from_dense(cls, W, theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0), rank=None, **kwargs):
        """The layer of structure θ nearest to W (d_out, d_in)."""
        layer = cls(factor_sizes(W.shape[1], W.shape[0], theta, rank), **kwargs)
        layer.load_dense(W)
        return layer

    def extra_repr(self):
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes._asdict().items())
        return f"{self.in_features} -> {self.out_features}, {sizes}, order={self.order}, bias={self.bias is not None}"


class ChainLinear(CoreLinear):
    """A Tensor-Train or Block Tensor-Train of any number of cores.

    The input is (i_1 … i_c) and the output (j_1 … j_c), last index fastest. Core k turns i_k into
    j_k and r_{k-1} into r_k (the ranks r_0 and r_c are 1):

        W[j_1 … j_c, i_1 … i_c] = Σ_{r_1 … r_{c-1}} Π_k G_k[r_{k-1} i_k, j_k r_k]

    This is a Tensor-Train (`blocks=False`). In a Block Tensor-Train core k has another matrix
    for every value of the other indices present at that step, j_1 … j_{k-1} and i_{k+1} … i_c.

        cores[k]    (batch, i_k·r_{k-1}, j_k·r_k),  batch = j_1 ⋯ j_{k-1} · i_{k+1} ⋯ i_c for BTT, 1 for TT
    """

    def __init__(self, in_sizes, out_sizes, rank, blocks, **kwargs):
        ranks = [1] + [rank] * (len(in_sizes) - 1) + [1]
        shapes, mults = [], 0
        for k, (i, j) in enumerate(zip(in_sizes, out_sizes)):
            others = math.prod(out_sizes[:k]) * math.prod(in_sizes[k + 1 :])  # of the indices that core k leaves alone
            shapes.append((others if blocks else 1, i * ranks[k], j * ranks[k + 1]))
            mults += others * i * ranks[k] * j * ranks[k + 1]
        super().__init__(math.prod(in_sizes), math.prod(out_sizes), shapes, **kwargs)
        self.in_sizes, self.out_sizes, self.ranks, self.blocks = tuple(in_sizes), tuple(out_sizes), ranks, blocks
        self.sizes = ChainSizes(self.in_sizes, self.out_sizes, rank, blocks)
        self.flops_per_token = 2 * mults

    def product(self, x):
        n = x.numel() // self.in_features
        z, done, left = x, 1, self.in_features  # z: (n, j_1 ⋯ j_{k-1}, i_k, i_{k+1} ⋯ i_c, r_{k-1})
        for k, core in enumerate(self.effective_cores()):
            i, j, r, r_next = self.in_sizes[k], self.out_sizes[k], self.ranks[k], self.ranks[k + 1]
            left //= i
            z = z.reshape(n, done, i, left, r)
            if self.blocks:
                z = z.permute(1, 3, 0, 2, 4).reshape(done * left, n, i * r) @ core.to(z.dtype)
                z = z.view(done, left, n, j, r_next).permute(2, 0, 3, 1, 4)
            else:
                z = z.permute(0, 1, 3, 2, 4).reshape(n * done * left, i * r) @ core[0].to(z.dtype)
                z = z.view(n, done, left, j, r_next).permute(0, 1, 3, 2, 4)
            done *= j  # z: (n, done, j, left, r_next)
        return z

    def _ids(self, k):
        """einsum's labels of core k's axes: i_k is k, j_k is c + k, r_k is 2c + k."""
        c = len(self.in_sizes)
        return self._batch_ids(k) + [k, 2 * c + k, c + k, 2 * c + k + 1]

    def _batch_ids(self, k):
        c = len(self.in_sizes)
        return [c + m for m in range(k)] + list(range(k + 1, c)) if self.blocks else []

    def _view(self, k, core):
        """Core k with an axis for each of its labels."""
        batch = [*self.out_sizes[:k], *self.in_sizes[k + 1 :]] if self.blocks else []
        return core.reshape(*batch, self.in_sizes[k], self.ranks[k], self.out_sizes[k], self.ranks[k + 1])

    def _contract(self, cores, ks, out):
        """einsum of cores ks -> axes `out`."""
        return torch.einsum(*(argument for k in ks for argument in (self._view(k, cores[k]), self._ids(k))), out)

    def materialize(self):
        """The matrix W, (d_out, d_in), by one einsum of all cores, independent of forward."""
        c = len(self.in_sizes)
        W = self._contract(self.effective_cores(), range(c), [*range(c, 2 * c), *range(c)])
        return W.reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def load_dense(self, W, sweeps=10):
        """Set the cores to a good approximation of W (d_out, d_in): SVDs core by core, then alternating least squares.

        Given the others, the best core k solves W = L · G_k · R for every value of (i_k, j_k), and
        in a BTT of its batch axes, where L joins the cores before it and R those after it: G_k = L⁺ W R⁺.
        """
        c = len(self.in_sizes)
        i_ids, j_ids, r_ids = list(range(c)), list(range(c, 2 * c)), list(range(2 * c, 3 * c + 1))
        W = W.double().reshape(*self.out_sizes, *self.in_sizes)
        cores = self._by_svd(W)
        for _ in range(sweeps):
            for k in range(c):
                shared = [*self._batch_ids(k), i_ids[k], j_ids[k]]  # one small problem for each value of these
                before = i_ids[:k] + ([] if self.blocks else j_ids[:k])  # rows of the problem
                behind = j_ids[k + 1 :] + ([] if self.blocks else i_ids[k + 1 :])  # columns
                one = torch.ones([1] * (len(shared)), dtype=W.dtype, device=W.device)
                L = R = one[..., None, None]
                if k > 0:
                    L = self._part(cores, range(k), shared, [*before, r_ids[k]], len(before))
                if k < c - 1:
                    R = self._part(cores, range(k + 1, c), shared, [r_ids[k + 1], *behind], 1)
                target = torch.einsum(W, j_ids + i_ids, [*shared, *before, *behind])
                target = target.reshape(
                    *target.shape[: len(shared)], math.prod(target.shape[len(shared) :][: len(before)]), -1
                )
                G = torch.linalg.pinv(L) @ target @ torch.linalg.pinv(R)  # (*shared, r_{k-1}, r_k)
                cores[k] = G.movedim(-2, -3)  # (*batch, i_k, r_{k-1}, j_k, r_k)
        self.load_cores(_balanced(cores))

    def _part(self, cores, ks, shared, out, rows):
        """The product of cores ks as matrices (*shared, rows, columns), of size 1 in shared axes that they do not have."""
        has = {label for k in ks for label in self._ids(k)}
        part = self._contract(cores, ks, [label for label in shared if label in has] + out)
        for axis, label in enumerate(shared):
            if label not in has:
                part = part.unsqueeze(axis)
        lead = part.shape[: len(shared)]
        return part.reshape(*lead, math.prod(part.shape[len(shared) :][:rows]), -1)

    def _by_svd(self, W):
        """Split off one core after the other by truncated SVDs; the last core is the remainder."""
        c = len(self.in_sizes)
        rest, cores = W.reshape(self.out_features, self.in_features).T, []
        done, r = 1, 1  # outputs made and batched so far (in a BTT), rank to the left
        for k in range(c):
            i, j, r_next = self.in_sizes[k], self.out_sizes[k], self.ranks[k + 1]
            I, J = math.prod(self.in_sizes[k + 1 :]), math.prod(self.out_sizes[k + 1 :])
            rest = rest.reshape(done, i, I, r, j, J)
            if self.blocks:
                matrices = rest.permute(0, 2, 4, 1, 3, 5).reshape(done, I, j, i * r, J)
            else:
                matrices = rest.permute(0, 1, 3, 4, 2, 5).reshape(done, i * r * j, I * J)
            if k == c - 1:
                U, V = matrices, torch.ones(())  # no core is left after this one: it is the remainder
            else:
                U, S, V = torch.linalg.svd(matrices, full_matrices=False)
                U, V = U[..., :r_next], S[..., :r_next, None] * V[..., :r_next, :]
            if self.blocks:
                cores.append(U.reshape(done, I, j, i, r, r_next).permute(0, 1, 3, 4, 2, 5))
                rest = (
                    V.reshape(done, I, j, r_next, J).permute(0, 2, 1, 3, 4) if k < c - 1 else None
                )  # (done, j, I, r_next, J)
                done *= j
            else:
                cores.append(U.reshape(1, 1, i, r, j, r_next))
                rest = V.reshape(1, r_next, I, J).permute(0, 2, 1, 3) if k < c - 1 else None  # (1, I, r_next, J)
            r = r_next
        return [self._view(k, core) for k, core in enumerate(cores)]

    def extra_repr(self):
        kind, sizes = (
            ("BTT" if self.blocks else "TT"),
            " ".join(f"{i}->{j}" for i, j in zip(self.in_sizes, self.out_sizes)),
        )
        return f"{self.in_features} -> {self.out_features}, {kind} {sizes}, ranks={self.ranks}, bias={self.bias is not None}"


def _balanced(cores):
    """The cores rescaled to equal RMS, with the same product."""
    sizes = [core.square().mean().sqrt() for core in cores]
    mean = math.prod(sizes) ** (1 / len(cores))
    return [core * (mean / size) if size > 0 else core for core, size in zip(cores, sizes)]


def draw(tensor, std):
    """Fill a tensor with normal numbers of this standard deviation.

    On the meta device there is nothing to fill, and torch would spend a millisecond on it.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def init_std(fan_in, fan_out):
    """Standard deviation that gives a fan_in -> fan_out matrix a spectral norm near sqrt(fan_out / fan_in)."""
    return math.sqrt(min(fan_in, fan_out)) / fan_in


def make_linear(
    d_in, d_out, structure="btt", theta=None, bias=False, normalize=None, gain=True, zero_init=False, **options
):
    """A d_in -> d_out linear layer of the named structure.

    structure  "dense"
               "low_rank"   W = B A through `rank` features
               "kronecker"  W = A ⊗ B, both near √d × √d
               "tt"         Tensor-Train of `num_cores` cores and the given `rank`
               "monarch"    block-diagonal, permute, block-diagonal; `num_blocks`, or None for near √d
               "btt"        Block Tensor-Train of `num_cores` cores: every √d_out × √d_in block has the given `rank`
               "einsum"     any `theta`; its ρ sets the rank
               or any other in theta.STRUCTURES
    options    of the structure: rank, num_blocks, num_cores, … (theta.STRUCTURES). heads_out is the number of heads in the
               output, heads_in in the input: the blocks of a BTT or Monarch then are heads
    normalize, gain, zero_init  as in CoreLinear; normalize=None caps all but dense matrices
    Raises ConfigError if no layer can be made, and for an option that the structure does not read.
    """
    sizes = layer_sizes(d_in, d_out, structure, theta=theta, **options)
    normalize = sizes is not None if normalize is None else normalize
    if sizes is None:
        return Dense(d_in, d_out, bias=bias, zero_init=zero_init, normalize=normalize, gain=gain)
    kwargs = dict(bias=bias, normalize=normalize, gain=gain, zero_init=zero_init)
    if isinstance(sizes, Sizes):
        return EinsumLinear(sizes, **kwargs)
    if isinstance(sizes, ChainSizes):
        return ChainLinear(*sizes, **kwargs)
    layer = sizes(**kwargs)
    check_layer(layer, structure)
    return layer


def check_layer(layer, structure):
    """ConfigError if a model cannot use this layer of a user's structure. (lab.convert also needs load_dense.)"""
    kind = type(layer).__name__
    if not isinstance(layer, (CoreLinear, Dense)):
        raise ConfigError(
            f"structure={structure!r}: {kind} is not a CoreLinear: derive it from einsum_linear.CoreLinear, "
            "whose docstring lists what a structure adds"
        )
    if not hasattr(layer, "flops_per_token"):
        raise ConfigError(
            f"structure={structure!r}: {kind} has no flops_per_token: set it to twice its multiplications"
        )
    if "input_fn" not in inspect.signature(layer.forward).parameters:
        raise ConfigError(
            f"structure={structure!r}: {kind}.forward takes no `input_fn`, the function that an FFN applies to its input: "
            "write forward(self, x, input_fn=None), or leave forward out and write product(self, x)"
        )
