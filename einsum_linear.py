"""Linear layers whose matrix is a small einsum of small cores.

The index of the input is written as three indices (α β γ), that of the output as
three (δ ε φ), and two cores joined by a rank index ρ do the work of d_out × d_in weights:

    y[δ ε φ] = Σ_{α β γ ρ}  B[β γ ε φ ρ] · A[α γ δ φ ρ] · x[α β γ]

Seven exponents θ = (θα θβ θγ θδ θε θφ θρ) give the sizes, d_α = d_in^θα … d_δ = d_out^θδ …
d_ρ = min(d_in, d_out)^θρ, and every θ is a structure: low-rank, Kronecker, Tensor-Train,
Monarch, Block Tensor-Train (BTT) and all between (Potapczynski, Qiu et al., "Searching for
Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 3).
Tensor-Trains and BTTs of three and more cores belong to the family as ChainLinear.

    python einsum_linear.py --d_in=1024 --d_out=4096                            # all named structures
    python einsum_linear.py --d_in=1024 --d_out=4096 --theta=.5,0,.5,0,.5,.5,0  # one point of the space
    python einsum_linear.py --plot=taxonomy.png                                 # where each lies in (ω ψ ν)

To add a structure, write a function that returns its layer and name it in STRUCTURES.
In code a b g = α β γ, d e f = δ ε φ, r = ρ and n is the number of tokens.
Imports from configurator and kernels.
"""

import difflib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

import kernels
from configurator import ConfigError, as_script, load_config

# ---------------------------------------------------------------------------------------
# θ and its taxonomy


def check_theta(theta):
    """θ as a tuple of seven floats, or ConfigError."""
    if not isinstance(theta, (tuple, list)) or not all(isinstance(t, (int, float)) for t in theta):
        raise ConfigError(f"theta={theta!r} is no structure: give seven numbers, such as (.5, 0, .5, 0, .5, .5, 0)")
    theta = tuple(float(t) for t in theta)
    if len(theta) != 7:
        raise ConfigError(
            f"theta={_show(theta)} has {len(theta)} values: give seven (alpha beta gamma delta epsilon phi rho)"
        )
    if not all(map(math.isfinite, theta)):
        raise ConfigError(f"theta={_show(theta)}: give numbers between 0 and 1")
    if min(theta) < 0 or theta[6] > 1:
        near = tuple(min(1.0, max(0.0, t)) for t in theta)
        raise ConfigError(f"theta={_show(theta)}: exponents lie between 0 and 1, as in {_show(near)}")
    for name, at in (("alpha + beta + gamma", 0), ("delta + epsilon + phi", 3)):
        total = sum(theta[at : at + 3])
        if abs(total - 1) > 1e-6:
            near = [t / total for t in theta[at : at + 3]] if total else [1.0, 0.0, 0.0]
            remedy = _show((*theta[:at], *near, *theta[at + 3 :]))
            raise ConfigError(f"theta={_show(theta)}: {name} = {total:g}, make it 1, as in {remedy}")
    return theta


def _show(theta):
    return "(" + " ".join(f"{t:g}" for t in theta) + ")"


def canonical(seven):
    """Exponents or sizes (α β γ δ ε φ ρ), with the two cores named so that A first is the cheaper order."""
    a, b, g, d, e, f, r = seven
    return (b, a, g, e, d, f, r) if min(a, e) < min(b, d) else (a, b, g, d, e, f, r)


def taxonomy(theta):
    """θ -> (ω, ψ, ν) of a square layer of width d, as d grows (the paper's section 4):

    ω  parameter sharing: parameters per FLOP scale as d^-ω, 0 is best
    ψ  rank: rank(W) scales as d^ψ, 1 is full rank
    ν  compute: FLOPs scale as d^(1 + ν), dense has 1
    """
    a, b, _, d, e, _, r = canonical(check_theta(theta))
    omega = min(a + d, b + e) - min(a, e)
    psi = min(1.0, 2 + r - a - e)
    nu = 1 + r - min(a, e)
    return omega, psi, nu


# ---------------------------------------------------------------------------------------
# Sizes


class Sizes(NamedTuple):
    """Sizes of the seven indices; α·β·γ = d_in and δ·ε·φ = d_out exactly."""

    alpha: int
    beta: int
    gamma: int
    delta: int
    epsilon: int
    phi: int
    rho: int


def factor_sizes(d_in, d_out, theta, rank=None):
    """The seven sizes of θ for a d_in → d_out layer.

    Of all exact factorisations of d_in into (α β γ) and of d_out into (δ ε φ), the one
    nearest to θ in log space. Equally near ones: the input takes the larger γ and the output
    the smaller φ, which keeps a BTT of width 2^odd at full rank. `rank`, where given, is d_ρ
    instead of min(d_in, d_out)^θρ.
    Raises ConfigError where θ is not a structure, where the nearest factorisation is off by
    more than a factor 2 in some index, and where ρ is larger than the blocks' own rank.
    """
    theta = check_theta(theta)
    alpha, beta, gamma = factor("d_in", d_in, theta[0:3])
    delta, epsilon, phi = factor("d_out", d_out, theta[3:6], last_first=True)
    rho = max(1, round(min(d_in, d_out) ** theta[6])) if rank is None else rank
    # For fixed (γ φ) the matrix between (δ ε) and (α β), rearranged to (αδ) × (βε), has rank ρ.
    most = min(alpha * delta, beta * epsilon)
    if rho > most:
        what = f"theta={_show(theta)} of a {d_in} -> {d_out} layer"
        raise ConfigError(f"rank {rho} is beyond the blocks of {what}: take rank <= {most}")
    return Sizes(alpha, beta, gamma, delta, epsilon, phi, rho)


def factor(name, d, exponents, last_first=False):
    """The exact factorisation of d nearest to (d^e for e in exponents), or ConfigError.

    Ties go to the smaller first factor, or the smaller last one.
    """
    exponents = tuple(reversed(exponents)) if last_first else tuple(exponents)
    sizes, worst = _nearest_factors(d, exponents)
    if worst <= 2:
        return tuple(reversed(sizes)) if last_first else sizes
    near = []
    for step in (-1, 1):
        width = d + step
        while width > 0 and _nearest_factors(width, exponents)[1] > 2:
            width += step
        near.append(width)
    shown = " x ".join(f"{d**e:.3g}" for e in (reversed(exponents) if last_first else exponents) if e)
    raise ConfigError(
        f"{name}={d} has no factorisation near {shown}; "
        f"the nearest widths that work are {' and '.join(str(width) for width in near if width)}"
    )


@cache
def _nearest_factors(d, exponents):
    """-> the factorisation of d nearest to d^exponents in log space, and its largest ratio to them.

    An index of exponent 0 is absent: its size is 1. (No exact factorisation within a factor 2
    is nearer with a larger one.)
    """

    def deviations(sizes):
        return [abs(math.log(s) - e * math.log(d)) for s, e in zip(sizes, exponents)]

    candidates = list(_factorisations(d, exponents))
    if not candidates:
        return None, math.inf
    best = min(candidates, key=lambda sizes: (round(sum(x * x for x in deviations(sizes)), 9), sizes))
    return best, math.exp(max(deviations(best))) - 1e-9


def _factorisations(d, exponents):
    """All ways to write d as a product of as many factors as there are exponents; a factor is 1 where that is 0."""
    if len(exponents) == 1:
        if d == 1 or exponents[0] > 0:
            yield (d,)
        return
    for size in _divisors(d) if exponents[0] > 0 else (1,):
        for rest in _factorisations(d // size, exponents[1:]):
            yield (size, *rest)


@cache
def _divisors(n):
    divisors, prime = [1], 2
    while n > 1:
        if prime * prime > n:
            prime = n
        powers = [1]
        while n % prime == 0:
            n //= prime
            powers.append(powers[-1] * prime)
        divisors = [k * power for k in divisors for power in powers]
        prime += 1
    return sorted(divisors)


# ---------------------------------------------------------------------------------------
# Layers. All of them have: in_features, out_features, cores, init_std (one float a core), flops_per_token,
# materialize() -> (d_out, d_in), and load_dense(W), which sets the cores to the best approximation of W.


class Dense(nn.Linear):
    """A plain matrix, with the interface of the structured layers."""

    def __init__(self, d_in, d_out, bias=False, zero_init=False):
        self.zero_init = zero_init
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self):
        self.init_std = [init_std(self.in_features, self.out_features)]
        draw(self.weight, 0.0 if self.zero_init else self.init_std[0])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def cores(self):
        return [self.weight]

    @property
    def flops_per_token(self):
        return 2 * self.in_features * self.out_features

    def materialize(self):
        return self.weight

    @torch.no_grad()
    def load_dense(self, W):
        self.weight.copy_(W)


def apply_all(layers, x):
    """[layer(x) for layer in layers]; in training as one layer where a GPU does that faster: dense ones, some BTTs."""
    if torch.is_grad_enabled() and kernels.joins(x, [getattr(layer, "btt_sizes", None) for layer in layers]):
        ys = kernels.btt_joined(x, [layer.effective_cores() for layer in layers])
        return [layer.finish(y, x) for layer, y in zip(layers, ys)]
    if not all(type(layer) is Dense for layer in layers) or not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        return [layer(x) for layer in layers]
    bias = torch.cat(biases) if biases else None
    y = nn.functional.linear(x, torch.cat([layer.weight for layer in layers]), bias)
    return y.split([layer.out_features for layer in layers], dim=-1)


class CoreLinear(nn.Module):
    """What layers made of cores share: the cores, their RMS cap, their gains, the bias.

    A core is a batched matrix, a parameter of shape (batch, fan_in, fan_out); `shapes` lists them.
    `normalize` caps each core's RMS at its initial value and gives it a learnable scale
    ("Compute Better Spent", ICML 2024, section 4); `gain=False` leaves the scale out, for a
    layer whose output is normalised anyway. `zero_init` zeroes the last core. `fan_ins` sets the
    learning rates (mup.py), `stds` the initial sizes, where those of the shapes are not the ones.
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
        self.matrix = None  # what forward uses inside multiplied_out
        self.reset_parameters()

    def reset_parameters(self):
        for core, std in zip(self.cores, self.init_std):
            draw(core, std)
        if self.zero_init:
            nn.init.zeros_(self.cores[-1])

    def effective_cores(self):
        """The cores as used: under the RMS cap and with their gains. No host synchronisation."""
        cores = list(self.cores)
        if self.normalize:
            for i, std in enumerate(self.init_std):
                scale = 1 if self.gains is None else self.gains[i]
                cores[i] = cores[i] * (scale / _excess(cores[i], std))
        return cores

    @torch.no_grad()
    def load_cores(self, cores):
        """Set the cores so that the effective ones are these; without gains under the cap, so up to a scale."""
        for i, (core, std) in enumerate(zip(cores, self.init_std)):
            self.cores[i].copy_(core.reshape(self.cores[i].shape))
            if self.gains is not None:
                self.gains[i] = _excess(self.cores[i], std)

    def finish(self, y, x):
        """(n, …) outputs -> (..., d_out) as x's leading axes say, plus bias."""
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextmanager
def multiplied_out(model):
    """In this block the structured layers of a model are dense matrices, multiplied out once: for a few tokens at a time.

    A GPU that decodes waits for launches and for weights, not for FLOPs. Parameters must stay as they are meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, (EinsumLinear, ChainLinear))]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.matrix = layer.materialize().contiguous()  # as a dense layer's lies: the same kernels
        yield
    finally:
        for layer in layers:
            layer.matrix = None


def _excess(core, std):
    """By what factor the RMS of a core is above its initial value; 1 where it is not."""
    return (torch.linalg.vector_norm(core) / (std * math.sqrt(core.numel()))).clamp(min=1)


class EinsumLinear(CoreLinear):
    """y = W x with W[δ ε φ, α β γ] = Σ_ρ B[β γ ε φ ρ] · A[α γ δ φ ρ].

    The core used first contracts its input index for every γ, the one used second contracts
    what is left for every φ. Either may come first, with the same result: `order` is "AB" or
    "BA", whichever costs fewer multiplications. Cores, in the order of use:

        order   cores[0]              cores[1]
        "AB"    A (γ, α, ρ·φ·δ)       B (φ, β·γ·ρ, ε)
        "BA"    B (γ, β, ρ·φ·ε)       A (φ, α·γ·ρ, δ)

    In memory x is (γ β α) and y is (φ ε δ), last index fastest: a Kronecker product (γ = φ = 1) is then
    B ⊗ A, and a BTT (β = δ = 1) reads x and passes z between its two products without a copy.

    x: (..., d_in) -> (..., d_out), in x's dtype or autocast's. after_gelu: of gelu(x), which a BTT's kernels make of what
    they read: cheaper than a GELU before the layer.
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
        """Sizes for kernels.btt, if that computes it: β = δ = 1, and not multiplied out. Else None."""
        a, b, g, d, e, f, r = self.sizes
        return kernels.BTTSizes(g, a, f, e, r) if b == d == 1 and self.matrix is None else None

    def forward(self, x, after_gelu=False):
        a, b, g, d, e, f, r = self.sizes
        if self.btt_sizes is not None:
            return self.finish(kernels.btt(x, *self.effective_cores(), after_gelu=after_gelu), x)
        x = kernels.gelu(x) if after_gelu else x
        if self.matrix is not None:
            return nn.functional.linear(x, self.matrix, self.bias)
        n = x.numel() // self.in_features
        x_4d = x.reshape(n, g, b, a)
        # The first core contracts α (or β) for every γ, the second makes ε (or δ) for every φ.
        if self.order == "AB":
            y = kernels.two_products(x_4d.permute(1, 3, 0, 2), *self.effective_cores())  # (γ, α, n, β) -> (φ, δ, n, ε)
            y = y.permute(2, 0, 3, 1)
        else:
            y = kernels.two_products(x_4d.permute(1, 2, 0, 3), *self.effective_cores())  # (γ, β, n, α) -> (φ, ε, n, δ)
            y = y.permute(2, 0, 1, 3)
        return self.finish(y, x)  # from (n, φ, ε, δ)

    def materialize(self):
        """The matrix W, (d_out, d_in), from the definition in one step (not through forward)."""
        a, b, g, d, e, f, r = self.sizes
        first, second = self.effective_cores()
        if self.order == "AB":
            W = torch.einsum("garfd, fbgre -> fedgba", first.view(g, a, r, f, d), second.view(f, b, g, r, e))
        else:
            W = torch.einsum("gbrfe, fagrd -> fedgba", first.view(g, b, r, f, e), second.view(f, a, g, r, d))
        return W.reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def load_dense(self, W):
        """The best approximation of W (d_out, d_in) in Frobenius norm, exactly.

        For every (γ φ) the slice of W between (δ ε) and (α β), rearranged to (αδ) × (βε), is a
        matrix of rank ρ, and no two slices share a parameter: a truncated SVD each. For low-rank
        that is the SVD of W, for BTT and Monarch one of each block, for Kronecker and
        Tensor-Train that of the rearrangement (Van Loan and Pitsianis, 1993).
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
    j_k, passing rank indices r_1 … r_{c-1} on (r_0 = r_c = 1):

        W[j_1 … j_c, i_1 … i_c] = Σ_{r_1 … r_{c-1}} Π_k G_k[r_{k-1} i_k, j_k r_k]

    In a Tensor-Train (`blocks=False`) that is all. In a Block Tensor-Train core k is another
    matrix for every value of the other indices it meets, j_1 … j_{k-1} and i_{k+1} … i_c.

        cores[k]    (batch, i_k·r_{k-1}, j_k·r_k),  batch = j_1 ⋯ j_{k-1} · i_{k+1} ⋯ i_c for BTT, 1 for TT
    """

    def __init__(self, in_sizes, out_sizes, rank, blocks, **kwargs):
        ranks = [1] + [rank] * (len(in_sizes) - 1) + [1]
        shapes, mults = [], 0
        for k, (i, j) in enumerate(zip(in_sizes, out_sizes)):
            others = math.prod(out_sizes[:k]) * math.prod(
                in_sizes[k + 1 :]
            )  # values of the indices core k leaves alone
            shapes.append((others if blocks else 1, i * ranks[k], j * ranks[k + 1]))
            mults += others * i * ranks[k] * j * ranks[k + 1]
        super().__init__(math.prod(in_sizes), math.prod(out_sizes), shapes, **kwargs)
        self.in_sizes, self.out_sizes, self.ranks, self.blocks = tuple(in_sizes), tuple(out_sizes), ranks, blocks
        self.flops_per_token = 2 * mults

    def forward(self, x):
        if self.matrix is not None:
            return nn.functional.linear(x, self.matrix, self.bias)
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
        return self.finish(z, x)

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
        """The matrix W, (d_out, d_in), as one einsum of all cores (not through forward)."""
        c = len(self.in_sizes)
        W = self._contract(self.effective_cores(), range(c), [*range(c, 2 * c), *range(c)])
        return W.reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def load_dense(self, W, sweeps=10):
        """A good approximation of W (d_out, d_in): core by core by SVD, then alternating least squares.

        Given the others, the best core k solves W = L · G_k · R for every value of (i_k, j_k), and
        of the batch in a BTT, where L joins the cores before it and R those behind: G_k = L⁺ W R⁺.
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
        """Cores ks joined, as matrices: (*shared, rows, columns), size 1 in shared axes that they do not have."""
        has = {label for k in ks for label in self._ids(k)}
        part = self._contract(cores, ks, [label for label in shared if label in has] + out)
        for axis, label in enumerate(shared):
            if label not in has:
                part = part.unsqueeze(axis)
        lead = part.shape[: len(shared)]
        return part.reshape(*lead, math.prod(part.shape[len(shared) :][:rows]), -1)

    def _by_svd(self, W):
        """Peel off one core after the other: what is left is the remainder of a truncated SVD."""
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
                U, V = matrices, torch.ones(())  # nothing lies behind: what is left is the core
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
    """Cores of the same product and equal RMS."""
    sizes = [core.square().mean().sqrt() for core in cores]
    mean = math.prod(sizes) ** (1 / len(cores))
    return [core * (mean / size) if size > 0 else core for core, size in zip(cores, sizes)]


def multiplications(sizes):
    """Multiplications a token in either order: {"AB": A first, "BA": B first}."""
    a, b, g, d, e, f, r = sizes
    size_A, size_B = a * g * d * f * r, b * g * e * f * r
    return {"AB": size_A * b + size_B * d, "BA": size_B * a + size_A * e}


def num_parameters(sizes):
    """Entries of both cores."""
    a, b, g, d, e, f, r = sizes
    return a * g * d * f * r + b * g * e * f * r


def draw(tensor, std):
    """Fill a tensor with normal numbers of that standard deviation.

    Not on the meta device: there only sizes are asked for, and torch takes a millisecond to draw nothing.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def init_std(fan_in, fan_out):
    """Standard deviation that gives a fan_in -> fan_out matrix a spectral norm near sqrt(fan_out / fan_in)."""
    return math.sqrt(min(fan_in, fan_out)) / fan_in


# ---------------------------------------------------------------------------------------
# Named structures: functions (d_in, d_out, options, kwargs) -> layer. options are make_linear's that say what the
# structure is (theta, rank, …), kwargs those that every layer takes (bias, normalize, gain, zero_init).

LOW_RANK = (1, 0, 0, 0, 1, 0, 0)
KRONECKER = TENSOR_TRAIN = (0.5, 0.5, 0, 0.5, 0.5, 0, 0)
BTT = (0.5, 0, 0.5, 0, 0.5, 0.5, 0)


def dense(d_in, d_out, options, kwargs):
    return Dense(d_in, d_out, bias=kwargs["bias"], zero_init=kwargs["zero_init"])


def low_rank(d_in, d_out, options, kwargs):
    return EinsumLinear(factor_sizes(d_in, d_out, LOW_RANK, options["rank"]), **kwargs)


def kronecker(d_in, d_out, options, kwargs):
    return EinsumLinear(factor_sizes(d_in, d_out, KRONECKER, 1), **kwargs)


def tt(d_in, d_out, options, kwargs):
    if options["num_cores"] > 2:
        return chain(d_in, d_out, options, kwargs, blocks=False)
    return EinsumLinear(factor_sizes(d_in, d_out, TENSOR_TRAIN, options["rank"]), **kwargs)


def btt(d_in, d_out, options, kwargs):
    if options["num_cores"] > 2:
        return chain(d_in, d_out, options, kwargs, blocks=True)
    return EinsumLinear(factor_sizes(d_in, d_out, btt_theta(d_in, d_out, options), options["rank"]), **kwargs)


def monarch(d_in, d_out, options, kwargs):
    """Block-diagonal, permute, block-diagonal (Dao et al., "Monarch", ICML 2022): BTT of rank 1, or `num_blocks` blocks.

    With b blocks either block-diagonal factor has b of them and min(d_in, d_out) values pass
    between, every block sending as many to every other: γ = φ = b and ρ = min(d_in, d_out) / b².
    """
    b, narrow = options["num_blocks"], min(d_in, d_out)
    if b is None:
        return EinsumLinear(factor_sizes(d_in, d_out, btt_theta(d_in, d_out, options), 1), **kwargs)
    works = [k for k in range(1, math.isqrt(narrow) + 1) if d_in % k == 0 and d_out % k == 0 and narrow % (k * k) == 0]
    if b not in works:
        raise ConfigError(
            f"num_blocks={b} does not divide a {d_in} -> {d_out} layer: its square must divide {narrow}; "
            f"take {min(works, key=lambda k: abs(k - b))}, of {', '.join(map(str, works))}"
        )
    return EinsumLinear(Sizes(d_in // b, 1, b, 1, d_out // b, b, narrow // (b * b)), **kwargs)


def einsum(d_in, d_out, options, kwargs):
    return EinsumLinear(factor_sizes(d_in, d_out, options["theta"]), **kwargs)


def btt_theta(d_in, d_out, options):
    """θ of a BTT: half and half, or, with aligned heads, the full-rank BTT (a 0 1-a 0 1-a a) whose blocks are heads.

    heads_out: output block φ is a head and ε runs through it; heads_in: the same for γ and α of the input.
    """
    if options["heads_out"]:
        a = math.log(options["heads_out"]) / math.log(d_out)
    elif options["heads_in"]:
        a = 1 - math.log(options["heads_in"]) / math.log(d_in)
    else:
        a = 0.5
    return (a, 0, 1 - a, 0, 1 - a, a, 0)


def chain(d_in, d_out, options, kwargs, blocks):
    exponents = (1 / options["num_cores"],) * options["num_cores"]
    in_sizes, out_sizes = factor("d_in", d_in, exponents), factor("d_out", d_out, exponents)
    # What passes between two cores has no more than this rank: (i_1; j_c) in a BTT, (i_1 j_1; i_c j_c) in a TT.
    most = min(in_sizes[0], out_sizes[-1]) if blocks else min(in_sizes[0] * out_sizes[0], in_sizes[-1] * out_sizes[-1])
    if options["rank"] > most:
        kind = f"{'btt' if blocks else 'tt'} of {options['num_cores']} cores"
        raise ConfigError(f"rank {options['rank']} is beyond a {d_in} -> {d_out} {kind}: take rank <= {most}")
    return ChainLinear(in_sizes, out_sizes, options["rank"], blocks, **kwargs)


# name: (function, the options of make_linear that it heeds)
STRUCTURES = {
    "dense": (dense, ()),
    "low_rank": (low_rank, ("rank",)),
    "kronecker": (kronecker, ()),
    "tt": (tt, ("rank", "num_cores")),
    "monarch": (monarch, ("num_blocks", "heads_in", "heads_out")),
    "btt": (btt, ("rank", "num_cores", "heads_in", "heads_out")),
    "einsum": (einsum, ("theta",)),
}
DEFAULTS = {"theta": None, "rank": 1, "num_blocks": None, "num_cores": 2, "heads_in": None, "heads_out": None}


def make_linear(
    d_in, d_out, structure="btt", theta=None, rank=1, num_blocks=None, bias=False, num_cores=2,
    heads_in=None, heads_out=None, normalize=True, gain=True, zero_init=False,
):  # fmt: skip
    """A d_in -> d_out linear layer of the named structure.

    structure  "dense"
               "low_rank"   W = B A through `rank` features
               "kronecker"  W = A ⊗ B, both near √d × √d
               "tt"         Tensor-Train of `num_cores` cores and the given `rank`
               "monarch"    block-diagonal, permute, block-diagonal; `num_blocks`, or None for near √d
               "btt"        Block Tensor-Train of `num_cores` cores: every √d_out × √d_in block has the given `rank`
               "einsum"     any `theta`; its ρ sets the rank
    heads_out  number of heads that the output is made of, heads_in the input: blocks of a BTT or Monarch then are heads
    normalize, gain and zero_init are as in CoreLinear.
    Raises ConfigError, also for an option that the structure does not heed.
    """
    if structure not in STRUCTURES:
        near = difflib.get_close_matches(str(structure), STRUCTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"structure={structure!r} is unknown: {hint}choose one of {', '.join(STRUCTURES)}")
    function, heeded = STRUCTURES[structure]
    options = dict(
        theta=theta, rank=rank, num_blocks=num_blocks, num_cores=num_cores, heads_in=heads_in, heads_out=heads_out
    )
    for name, value in options.items():
        if value != DEFAULTS[name] and name not in heeded:
            others = ", ".join(key for key, (_, names) in STRUCTURES.items() if name in names)
            raise ConfigError(
                f"{name}={value} with structure={structure!r}, which has none: make it {DEFAULTS[name]}, or take {others}"
            )
    if structure == "einsum" and theta is None:
        raise ConfigError("structure='einsum' needs theta: seven numbers, such as (.5, 0, .5, 0, .5, .5, 0)")
    for name, least in (("rank", 1), ("num_cores", 2), ("d_in", 1), ("d_out", 1)):
        value = {**options, "d_in": d_in, "d_out": d_out}[name]
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: make it a whole number, {least} or more")
    most = max(2, min(d_in, d_out).bit_length() - 1)
    if num_cores > most:
        raise ConfigError(f"num_cores={num_cores}: {d_in} and {d_out} have no factors for so many, take {most} at most")
    for name, width in (("heads_out", d_out), ("heads_in", d_in)):
        if options[name] and (num_cores > 2 or num_blocks or width % options[name] or width == 1):
            raise ConfigError(
                f"{name}={options[name]}: heads align with two cores, no num_blocks and a width that they divide, not {width}"
            )
    return function(d_in, d_out, options, dict(bias=bias, normalize=normalize, gain=gain, zero_init=zero_init))


# ---------------------------------------------------------------------------------------
# The command: what a structure is, in figures


@dataclass
class Config:
    d_in: int = 1024  # width of the input
    d_out: int = 1024  # width of the output
    theta: tuple | None = None  # seven exponents (alpha beta gamma delta epsilon phi rho); None: the named structures
    plot: bool | str = False  # draw every named structure at its (omega, psi, nu); --plot=FILE, or taxonomy.png

    def __post_init__(self):
        for name in ("d_in", "d_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")


# Points of the space by name, for the table's taxonomy and the picture: square layers, ranks as d^ρ.
NAMED_THETAS = {
    "low-rank, r = d^0.5": (1, 0, 0, 0, 1, 0, 0.5),
    "low-rank, r = d^0.75": (1, 0, 0, 0, 1, 0, 0.75),
    "Kronecker": KRONECKER,
    "TT, r = d^0.25": (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25),
    "Monarch = BTT rank 1": BTT,
    "BTT, r = d^0.25": (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25),
    "full-rank BTT, a = 1/4": (0.25, 0, 0.75, 0, 0.75, 0.25, 0),
    "low-rank BTT, a = 2/3": (2 / 3, 0, 1 / 3, 0, 2 / 3, 1 / 3, 0),
    "generic": (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0),
    "dense": (0, 0, 1, 0, 1, 0, 0),  # α = δ = φ = 1: A is a scalar for every γ, B is the matrix
}


def measured_rank(layer):
    """Numerical rank of the layer's matrix as initialised, in float64 from the cores on."""
    return int(torch.linalg.matrix_rank(layer.double().materialize()))


def describe_theta(d_in, d_out, theta):
    """Lines about one point of the space."""
    sizes = factor_sizes(d_in, d_out, theta)
    torch.manual_seed(0)
    layer = EinsumLinear(sizes, normalize=False)
    mults, parameters, whole = multiplications(sizes), num_parameters(sizes), d_in * d_out
    omega, psi, nu = taxonomy(theta)
    yield f"theta {_show(check_theta(theta))}, {d_in} -> {d_out}"
    yield "sizes        " + "  ".join(f"{name} {size}" for name, size in sizes._asdict().items())
    yield "cores        " + ", ".join(str(tuple(core.shape)) for core in layer.cores) + "  (batch, fan_in, fan_out)"
    for order, name in (("AB", "A first"), ("BA", "B first")):
        taken = "  <- taken" if order == layer.order else ""
        yield f"{name:<12} {2 * mults[order]:,} FLOPs a token, {mults[order] / whole:.4f} of dense{taken}"
    yield f"parameters   {parameters:,}, {parameters / whole:.4f} of dense"
    yield f"params/FLOP  {parameters / mults[layer.order]:.4f} of dense's"
    yield f"taxonomy     omega {omega:.4g} (sharing)  psi {psi:.4g} (rank)  nu {nu:.4g} (compute)"
    yield f"rank         {measured_rank(layer)} measured, of {min(d_in, d_out)}"


def table_of_structures(d_in, d_out):
    """Lines of a table: every named structure at this width."""
    root = math.isqrt(math.isqrt(min(d_in, d_out)))
    rows = [
        ("dense", {}),
        ("low_rank", {"rank": math.isqrt(min(d_in, d_out))}),
        ("kronecker", {}),
        ("tt", {"rank": root}),
        ("tt", {"rank": 2, "num_cores": 3}),
        ("monarch", {}),
        ("monarch", {"num_blocks": 4}),
        ("btt", {}),
        ("btt", {"rank": root}),
        ("btt", {"num_cores": 3}),
        ("btt", {"rank": 2, "num_cores": 3}),
    ]
    yield f"{d_in} -> {d_out}; parameters and FLOPs as shares of dense ({d_in * d_out:,} and twice that)"
    yield f"{'structure':<30} {'cores (batch, fan_in, fan_out)':<54} {'parameters':>10} {'FLOPs':>8} {'params/FLOP':>11} {'rank':>6}"
    for name, options in rows:
        label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        torch.manual_seed(0)
        try:
            layer = make_linear(d_in, d_out, name, normalize=False, **options)
        except ConfigError as error:
            yield f"{label:<30} {error}"
            continue
        cores = [core.unsqueeze(0) if core.dim() == 2 else core for core in layer.cores]
        shapes = " ".join(str(tuple(core.shape)).replace(" ", "") for core in cores)
        parameters = sum(core.numel() for core in cores) / (d_in * d_out)
        flops = layer.flops_per_token / (2 * d_in * d_out)
        yield f"{label:<30} {shapes:<54} {parameters:>10.4f} {flops:>8.4f} {parameters / flops:>11.4f} {measured_rank(layer):>6}"


def plot_taxonomy(png):
    """Every named structure at its (ω, ψ, ν)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 7))
    axes = figure.add_subplot(projection="3d")
    places = {}
    for name, theta in NAMED_THETAS.items():
        places.setdefault(tuple(round(value, 3) for value in taxonomy(theta)), []).append(name)
    for (omega, psi, nu), names in places.items():
        best = omega == 0 and psi == 1
        axes.plot([omega, omega], [psi, psi], [0.25, nu], color="0.7", lw=0.8)  # a stem, to read the place on the floor
        axes.scatter(omega, psi, nu, s=50, color="tab:green" if best else "tab:red")
        axes.text(omega, psi, nu + 0.03, "\n".join(names), fontsize=8, ha="left", va="bottom")
    axes.set(
        xlabel="ω  parameter sharing",
        ylabel="ψ  rank",
        zlabel="ν  compute",
        zlim=(0.25, 1.1),
        xlim=(0, 0.6),
        ylim=(0.4, 1.05),
    )
    axes.set_title(
        "How parameters per FLOP (d^-ω), rank (d^ψ) and FLOPs (d^(1+ν)) scale with width d\n"
        "green: no sharing (ω = 0) and full rank (ψ = 1)",
        fontsize=10,
        y=0.93,
    )
    axes.view_init(elev=18, azim=-55)
    figure.savefig(png, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv):
    config = load_config(Config, argv)
    if config.plot:
        path = "taxonomy.png" if config.plot is True else config.plot
        try:
            plot_taxonomy(path)
        except (OSError, ValueError) as error:  # no such folder, or no such format
            raise ConfigError(
                f"plot={path} cannot be written ({error}): give a .png in a folder that is there"
            ) from None
        print(f"drawn: {path}")
    elif config.theta is None:
        print("\n".join(table_of_structures(config.d_in, config.d_out)))
    if config.theta is not None:
        print("\n".join(describe_theta(config.d_in, config.d_out, config.theta)))


if __name__ == "__main__":
    as_script(main)
