"""Linear layers whose matrix is a small einsum of small cores.

The index of the input is written as three indices (α β γ), that of the output as
three (δ ε φ), and two cores joined by a rank index ρ do the work of d_out × d_in weights:

    y[δ ε φ] = Σ_{α β γ ρ}  B[β γ ε φ ρ] · A[α γ δ φ ρ] · x[α β γ]

Seven exponents θ = (θα θβ θγ θδ θε θφ θρ) give the sizes, d_α = d_in^θα … d_δ = d_out^θδ …
d_ρ = min(d_in, d_out)^θρ, and every θ is a structure: low-rank, Kronecker, Tensor-Train,
Monarch, Block Tensor-Train (BTT) and all between (Potapczynski, Qiu et al., "Searching for
Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 3).

To add a structure, write a function that returns its sizes and name it in `make_linear`.
In code a b g = α β γ, d e f = δ ε φ, r = ρ and n is the number of tokens.
Imports from configurator and kernels.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from configurator import ConfigError
from kernels import two_products

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
    alpha, beta, gamma = _factor("d_in", d_in, theta[0:3])
    delta, epsilon, phi = _factor("d_out", d_out, tuple(reversed(theta[3:6])))[::-1]
    rho = max(1, round(min(d_in, d_out) ** theta[6])) if rank is None else rank
    # For fixed (γ φ) the matrix between (δ ε) and (α β), rearranged to (αδ) × (βε), has rank ρ.
    most = min(alpha * delta, beta * epsilon)
    if rho > most:
        raise ConfigError(
            f"rank {rho} is beyond what a {d_in} -> {d_out} layer of theta={_show(theta)} can use: take rank <= {most}"
        )
    return Sizes(alpha, beta, gamma, delta, epsilon, phi, rho)


def check_theta(theta):
    """θ as a tuple of seven floats, or ConfigError."""
    if not isinstance(theta, (tuple, list)) or not all(isinstance(t, (int, float)) for t in theta):
        raise ConfigError(f"theta={theta!r} is no structure: give seven numbers, such as (.5, 0, .5, 0, .5, .5, 0)")
    theta = tuple(float(t) for t in theta)
    if len(theta) != 7:
        raise ConfigError(
            f"theta={_show(theta)} has {len(theta)} values: give seven (alpha beta gamma delta epsilon phi rho)"
        )
    for name, group in (("alpha + beta + gamma", theta[0:3]), ("delta + epsilon + phi", theta[3:6])):
        if abs(sum(group) - 1) > 1e-6:
            raise ConfigError(f"theta={_show(theta)}: {name} = {sum(group):g}, make it 1")
    if min(theta) < 0 or theta[6] > 1:
        raise ConfigError(f"theta={_show(theta)}: make every exponent at least 0 and rho at most 1")
    return theta


def _show(theta):
    return "(" + " ".join(f"{t:g}" for t in theta) + ")"


def _factor(name, d, exponents):
    """The exact factorisation of d nearest to (d^e for e in exponents), or ConfigError."""
    sizes, worst = _nearest_factors(d, exponents)
    if worst <= 2:
        return sizes
    near = []
    for step in (-1, 1):
        width = d + step
        while width > 0 and _nearest_factors(width, exponents)[1] > 2:
            width += step
        near.append(width)
    raise ConfigError(
        f"{name}={d} has no factorisation into sizes near {d}^({' '.join(f'{e:g}' for e in exponents)}); "
        f"the nearest widths that work are {' and '.join(str(width) for width in near if width)}"
    )


@cache
def _nearest_factors(d, exponents):
    """-> the factorisation of d into three, and its largest ratio to d^exponents.

    An index of exponent 0 is absent: its size is 1. (No exact factorisation within a factor 2
    is nearer with a larger one.) Ties go to the smaller first factor.
    """

    def divisors(n, exponent):
        return [1] if exponent == 0 else [k for k in range(1, n + 1) if n % k == 0]

    def deviations(sizes):
        return [abs(math.log(s) - e * math.log(d)) for s, e in zip(sizes, exponents)]

    candidates = [
        (first, second, third)
        for first in divisors(d, exponents[0])
        for second in divisors(d // first, exponents[1])
        for third in divisors(d // (first * second), exponents[2])
        if first * second * third == d
    ]
    if not candidates:
        return None, math.inf
    best = min(candidates, key=lambda sizes: (round(sum(x * x for x in deviations(sizes)), 9), sizes))
    return best, math.exp(max(deviations(best))) - 1e-9


# ---------------------------------------------------------------------------------------
# Layers. All of them have: d_in, d_out, .cores, .init_std (one float a core), .flops_per_token,
# .materialize() -> (d_out, d_in), and describe themselves in extra_repr.


class Dense(nn.Linear):
    """A plain matrix, with the interface of the structured layers."""

    def __init__(self, d_in, d_out, bias=False, zero_init=False):
        self.zero_init = zero_init
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self):
        self.init_std = [init_std(self.in_features, self.out_features)]
        nn.init.normal_(self.weight, std=0.0 if self.zero_init else self.init_std[0])
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


class EinsumLinear(nn.Module):
    """y = W x with W[δ ε φ, α β γ] = Σ_ρ B[β γ ε φ ρ] · A[α γ δ φ ρ].

    The core used first contracts its input index for every γ, the one used second contracts
    what is left for every φ. Either may come first, with the same result: `order` is "AB" or
    "BA", whichever costs fewer multiplications. Cores are kept as batched matrices (batch, fan_in,
    fan_out), in the order of use:

        order   cores[0]              cores[1]
        "AB"    A (γ, α, ρ·φ·δ)       B (φ, β·γ·ρ, ε)
        "BA"    B (γ, β, ρ·φ·ε)       A (φ, α·γ·ρ, δ)

    In memory x is (β γ α) and y is (δ φ ε), last index fastest: a BTT (β = δ = 1) then reads x
    and passes z between its two products without a copy.

    x: (..., d_in) -> (..., d_out), in x's dtype or autocast's.
    `normalize` caps each core's RMS at its initial value and gives it a learnable scale
    ("Compute Better Spent", ICML 2024, section 4); `gain=False` leaves the scale out, for a
    layer whose output is normalised anyway. `zero_init` zeroes the last core.
    """

    def __init__(self, sizes, bias=False, normalize=True, gain=True, zero_init=False):
        super().__init__()
        self.sizes = sizes
        a, b, g, d, e, f, r = sizes
        self.in_features, self.out_features = a * b * g, d * e * f
        mults = multiplications(sizes)
        self.order = min(mults, key=mults.get)
        self.flops_per_token = 2 * mults[self.order]
        shapes = (
            [(g, a, r * f * d), (f, b * g * r, e)] if self.order == "AB" else [(g, b, r * f * e), (f, a * g * r, d)]
        )
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.init_std = [init_std(fan_in, fan_out) for _, fan_in, fan_out in shapes]
        self.normalize = normalize
        self.gains = nn.Parameter(torch.ones(len(shapes))) if normalize and gain else None
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.zero_init = zero_init
        self.reset_parameters()

    def reset_parameters(self):
        for core, std in zip(self.cores, self.init_std):
            nn.init.normal_(core, std=std)
        if self.zero_init:
            nn.init.zeros_(self.cores[-1])

    def effective_cores(self):
        """The two cores as used: under the RMS cap and with their gains. No host synchronisation."""
        cores = list(self.cores)
        if self.normalize:
            for i, std in enumerate(self.init_std):
                excess = torch.linalg.vector_norm(cores[i]) / (std * math.sqrt(cores[i].numel()))  # RMS / init_std
                scale = 1 if self.gains is None else self.gains[i]
                cores[i] = cores[i] * (scale / excess.clamp(min=1))
        return cores

    def forward(self, x):
        a, b, g, d, e, f, r = self.sizes
        x_4d = x.reshape(-1, b, g, a) if x.numel() else x.reshape(0, b, g, a)
        # The first core contracts α (or β) for every γ, the second makes ε (or δ) for every φ.
        if self.order == "AB":
            y = two_products(x_4d.permute(2, 3, 0, 1), *self.effective_cores())  # (γ, α, n, β) -> (φ, δ, n, ε)
            y = y.permute(2, 1, 0, 3)
        else:
            y = two_products(x_4d.permute(2, 1, 0, 3), *self.effective_cores())  # (γ, β, n, α) -> (φ, ε, n, δ)
            y = y.permute(2, 3, 0, 1)
        y = y.reshape(*x.shape[:-1], self.out_features)  # from (n, δ, φ, ε)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def materialize(self):
        """The matrix W, (d_out, d_in), from the definition in one step (not through forward)."""
        a, b, g, d, e, f, r = self.sizes
        first, second = self.effective_cores()
        if self.order == "AB":
            W = torch.einsum("garfd, fbgre -> dfebga", first.view(g, a, r, f, d), second.view(f, b, g, r, e))
        else:
            W = torch.einsum("gbrfe, fagrd -> dfebga", first.view(g, b, r, f, e), second.view(f, a, g, r, d))
        return W.reshape(self.out_features, self.in_features)

    def extra_repr(self):
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes._asdict().items())
        return f"{self.in_features} -> {self.out_features}, {sizes}, order={self.order}, bias={self.bias is not None}"


def multiplications(sizes):
    """Multiplications a token in either order: {"AB": A first, "BA": B first}."""
    a, b, g, d, e, f, r = sizes
    size_A, size_B = a * g * d * f * r, b * g * e * f * r
    return {"AB": size_A * b + size_B * d, "BA": size_B * a + size_A * e}


def init_std(fan_in, fan_out):
    """Standard deviation that gives a fan_in -> fan_out matrix a spectral norm near sqrt(fan_out / fan_in)."""
    return math.sqrt(min(fan_in, fan_out)) / fan_in


# ---------------------------------------------------------------------------------------
# Named structures

STRUCTURES = ("dense", "low_rank", "btt", "einsum")


def make_linear(
    d_in, d_out, structure="btt", theta=None, rank=1, bias=False, normalize=True, gain=True, zero_init=False
):
    """A d_in -> d_out linear layer of the named structure.

    structure  "dense"
               "low_rank"  W = B A through `rank` features
               "btt"       Block Tensor-Train: every √d_out × √d_in block has the given `rank`
               "einsum"    any `theta`; its ρ sets the rank
    normalize, gain and zero_init are as in EinsumLinear. Raises ConfigError.
    """
    if structure not in STRUCTURES:
        raise ConfigError(f"structure={structure!r} is unknown: choose one of {', '.join(STRUCTURES)}")
    if (structure == "einsum") != (theta is not None):
        raise ConfigError(
            f"theta={theta} with structure={structure!r}: give theta with structure='einsum', and only there"
        )
    if rank < 1 or (rank > 1 and structure in ("dense", "einsum")):
        remedy = {"dense": "a dense layer has none", "einsum": "theta's last exponent sets it"}
        raise ConfigError(f"rank={rank} with structure={structure!r}: {remedy.get(structure, 'make it 1 or more')}")
    if structure == "dense":
        return Dense(d_in, d_out, bias=bias, zero_init=zero_init)
    if structure == "low_rank":
        sizes = factor_sizes(d_in, d_out, (1, 0, 0, 0, 1, 0, 0), rank)
    elif structure == "btt":
        sizes = factor_sizes(d_in, d_out, (0.5, 0, 0.5, 0, 0.5, 0.5, 0), rank)
    else:
        sizes = factor_sizes(d_in, d_out, theta)
    return EinsumLinear(sizes, bias=bias, normalize=normalize, gain=gain, zero_init=zero_init)
