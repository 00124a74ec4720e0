"""θ and what follows from it without tensors: the taxonomy, the sizes of a layer, the named structures.

The index of the input is written as three indices (α β γ), that of the output as three (δ ε φ), and two cores
joined by a rank index ρ take the place of the d_out × d_in matrix:

    y[δ ε φ] = Σ_{α β γ ρ}  B[β γ ε φ ρ] · A[α γ δ φ ρ] · x[α β γ]

Seven exponents θ = (θα θβ θγ θδ θε θφ θρ) give the sizes, d_α = d_in^θα … d_δ = d_out^θδ … d_ρ = min(d_in, d_out)^θρ
(Potapczynski, Qiu et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices",
NeurIPS 2024, section 3). einsum_linear.py makes layers of these sizes. This file does not import torch, so that options
are checked before that slow import.

To add a structure, write a function (d_in, d_out, options) that returns its sizes, and enter it in STRUCTURES with the
options that it reads, here or in a file of your own named before the config files (see Structure).
In code a b g = α β γ, d e f = δ ε φ, r = ρ.
"""

import difflib
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from configurator import ConfigError, UnusedOption

# ---------------------------------------------------------------------------------------
# θ and its taxonomy


def check_theta(theta):
    """θ as a tuple of seven floats, or ConfigError."""
    if not isinstance(theta, (tuple, list)) or not all(isinstance(t, (int, float)) for t in theta):
        raise ConfigError(f"theta={theta!r} is not a structure: give seven numbers, such as (.5, 0, .5, 0, .5, .5, 0)")
    theta = tuple(float(t) for t in theta)
    if len(theta) != 7:
        raise ConfigError(
            f"theta={show_theta(theta)} has {len(theta)} values: give seven (alpha beta gamma delta epsilon phi rho)"
        )
    if not all(map(math.isfinite, theta)):
        raise ConfigError(f"theta={show_theta(theta)}: give numbers between 0 and 1")
    if min(theta) < 0 or theta[6] > 1:
        raise ConfigError(f"theta={show_theta(theta)}: exponents lie between 0 and 1, as in {_near_theta(theta)}")
    for name, at in (("alpha + beta + gamma", 0), ("delta + epsilon + phi", 3)):
        total = sum(theta[at : at + 3])
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"theta={show_theta(theta)}: {name} = {total:g}, make it 1, as in {_near_theta(theta)}")
    return theta


def show_theta(theta):
    """θ as messages show it."""
    return "(" + " ".join(f"{t:g}" for t in theta) + ")"


def _near_theta(theta):
    """A valid θ near these seven numbers, as messages show it: exponents of four digits whose sums are 1."""
    clamped = [min(1.0, max(0.0, t)) for t in theta]
    near = []
    for group in (clamped[:3], clamped[3:6]):
        total = sum(group)
        group = [round(t / total, 4) for t in group] if total else [1.0, 0.0, 0.0]
        largest = group.index(max(group))
        group[largest] = round(1 - sum(group) + group[largest], 4)
        near += group
    return show_theta((*near, round(clamped[6], 4)))


def canonical(seven):
    """Exponents or sizes (α β γ δ ε φ ρ), with the cores named so that applying A first is cheaper."""
    a, b, g, d, e, f, r = seven
    return (b, a, g, e, d, f, r) if min(a, e) < min(b, d) else (a, b, g, d, e, f, r)


def taxonomy(theta):
    """θ -> (ω, ψ, ν) of a square layer of width d, as d grows (the paper's section 4):

    ω  parameter sharing: parameters per FLOP scale as d^-ω; 0 means that none are shared
    ψ  rank: rank(W) scales as d^ψ; 1 is full rank
    ν  compute: FLOPs scale as d^(1 + ν); 1 for a dense matrix
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


class ChainSizes(NamedTuple):
    """Sizes of a chain of any number of cores: core k turns in_sizes[k] into out_sizes[k] (einsum_linear.ChainLinear)."""

    in_sizes: tuple
    out_sizes: tuple
    rank: int  # of the index between two cores
    blocks: bool  # True: a Block Tensor-Train, False: a Tensor-Train


class SizeError(ConfigError):
    """A value of an option, or a width, with which no layer can be made, and values that work for this layer, best first.

    options.BlockConfig.check_layers offers a value that works for the whole model instead.
    """

    def __init__(self, option, problem, values, remedy):
        """remedy: what to take, in words; `values`: the same as numbers."""
        super().__init__(f"{problem}: {remedy}")
        self.option, self.problem, self.values, self.remedy = option, problem, values, remedy

    def about(self, what):
        return SizeError(self.option, f"{what}: {self.problem}", self.values, self.remedy)


def factor_sizes(d_in, d_out, theta, rank=None):
    """The seven sizes of θ for a d_in → d_out layer.

    Candidates are the exact factorisations of d_in into (α β γ) and of d_out into (δ ε φ) that are within a
    factor 2 of θ in every index. First come those that fall least short of the rank that θ promises
    (promised_rank): a Kronecker product of width 512 is (16 × 32 and 16 × 32), not (16 × 32 and 32 × 16),
    whose rank is 256. Among them the one nearest to θ in log space is taken. On a tie the
    input takes the smaller α, then the smaller β, and the output the smaller φ, then the smaller ε.
    `rank`, if given, is d_ρ instead of min(d_in, d_out)^θρ.
    Raises ConfigError if θ is not a structure, if no factorisation is within that factor 2,
    and if ρ is larger than the rank of the blocks.
    """
    return _best_sizes(d_in, d_out, check_theta(theta), rank)


def blocks_rank(sizes):
    """The largest useful ρ: for fixed (γ φ) the matrix between (δ ε) and (α β), rearranged to (αδ) × (βε), has rank ρ."""
    return min(sizes.alpha * sizes.delta, sizes.beta * sizes.epsilon)


@cache
def _best_sizes(d_in, d_out, theta, rank):
    narrow = min(d_in, d_out)
    rho = max(1, round(narrow ** theta[6])) if rank is None else rank
    pairs = []  # (distance, tie-breakers), sizes
    inputs, outputs = _both_near_factors(d_in, d_out, theta[0:3], theta[3:6])
    for far_in, (a, b, g) in inputs:
        for far_out, (d, e, f) in outputs:
            pairs.append(((round(far_in + far_out, 9), (a, b, g), (f, e, d)), Sizes(a, b, g, d, e, f, rho)))
    most = blocks_rank(min(pairs)[1])
    if rho > most:
        problem = f"rank {rho} is too large for the blocks of theta={show_theta(theta)} in a {d_in} -> {d_out} layer"
        if rank is not None:
            raise SizeError("rank", problem, range(most, 0, -1), f"take rank <= {most}")
        largest = next(k / 100 for k in range(100, -1, -1) if round(narrow ** (k / 100)) <= most)
        raise ConfigError(f"{problem}: take rho <= {largest:g}, theta={show_theta((*theta[:6], largest))}")
    promised = promised_rank(d_in, d_out, theta, rank)
    candidates = [
        (max(0, promised - rank_of(sizes)), near, sizes) for near, sizes in pairs if rho <= blocks_rank(sizes)
    ]
    return min(candidates)[2]


def promised_rank(d_in, d_out, theta, rank=None):
    """The least rank that a matrix of θ should have: full rank if ψ = 1, otherwise 0.9 d^ψ, because sizes are rounded.

    d = min(d_in, d_out). `rank`, if given, takes the place of d^θρ.
    """
    a, b, _, d, e, _, r = theta
    narrow = min(d_in, d_out)
    promised = (narrow**r if rank is None else rank) * narrow ** (2 - max(a + e, b + d))  # d^ψ, or beyond d
    return narrow if promised > 0.999 * narrow else math.ceil(0.9 * promised)


def rank_of(sizes):
    """The rank of a matrix of these Sizes or ChainSizes with random cores, computed from the sizes alone.

    It is the smallest cut through x, the cores and y, an upper bound for every matrix. Random cores reach it except for
    rare sizes: of named structures and the published θ, 3 of 3,514 measured layers had 2 to 3% less, all of them
    Tensor-Trains of uneven factors; of sizes drawn at random, 3 of 3,443 had 6 to 13% less.
    """
    if isinstance(sizes, Sizes):
        a, b, g, d, e, f, r = sizes
        return min(a * b * g, d * e * f, g * f * r * min(b * d, a * e))  # x, y, between the cores in either order
    ins, outs, r, c = *sizes[:3], len(sizes.in_sizes)
    if sizes.blocks:  # the output of core k: j_1 … j_k, i_{k+1} … i_c and the rank index
        return min(math.prod(outs[:k]) * math.prod(ins[k:]) * (r if 0 < k < c else 1) for k in range(c + 1))
    before, behind = 1, 1  # smallest cut so far, with the last core before or behind it
    for k, (i, j) in enumerate(zip(ins, outs)):
        across = r if k else 1
        before, behind = min(before, behind * across) * j, min(behind, before * across) * i
    return min(before, behind)


def near_factors(name, d, exponents):
    """[(squared distance to d^exponents in log space, factors)], all within a factor 2, nearest first, or SizeError."""
    exponents = tuple(exponents)
    if near := _near_factors(d, exponents):
        return near
    widths = []
    for step in (-1, 1):
        width = d + step
        while width > 0 and not _near_factors(width, exponents):
            width += step
        widths.append(width)
    widths = [width for width in widths if width]
    shown = " x ".join(f"{d**e:.3g}" for e in exponents if e)
    problem = f"{name}={d} has no factorisation near {shown}"
    remedy = f"the nearest widths that work are {' and '.join(map(str, widths))}"
    raise SizeError(name, problem, widths, remedy)


def _both_near_factors(d_in, d_out, in_exponents, out_exponents):
    """near_factors of both widths, or one error for both."""
    try:
        inputs = near_factors("d_in", d_in, in_exponents)
    except SizeError as error:
        try:
            near_factors("d_out", d_out, out_exponents)
        except SizeError as other:
            remedy = f"{error.remedy} for d_in, {' and '.join(map(str, other.values))} for d_out"
            raise SizeError("d_in", f"{error.problem}; {other.problem}", error.values, remedy) from None
        raise
    return inputs, near_factors("d_out", d_out, out_exponents)


@cache
def _near_factors(d, exponents):
    """near_factors, [] where there are none. An index of exponent 0 is absent: its size is 1."""
    ideals = [d**e for e in exponents]
    near = []
    for sizes in _factorisations(d, tuple(ideals)):
        far = sum(math.log(size / ideal) ** 2 for size, ideal in zip(sizes, ideals))
        near.append((round(far, 9), sizes))
    return sorted(near)


def _factorisations(d, ideals):
    """All factorisations of d with one factor for each ideal, within a factor 2 of it; an ideal of 1 gives 1."""
    ideal, *rest = ideals
    for size in (d,) if not rest else _divisors(d) if ideal > 1 else (1,):
        if ideal / (2 + 1e-9) <= size <= ideal * (2 + 1e-9) and (ideal > 1 or size == 1):
            for sizes in _factorisations(d // size, rest) if rest else ((),):
                yield (size, *sizes)


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


def multiplications(sizes):
    """Multiplications per token in both orders: {"AB": A first, "BA": B first}."""
    a, b, g, d, e, f, r = sizes
    size_A, size_B = a * g * d * f * r, b * g * e * f * r
    return {"AB": size_A * b + size_B * d, "BA": size_B * a + size_A * e}


def num_parameters(sizes):
    """Number of entries of both cores."""
    a, b, g, d, e, f, r = sizes
    return a * g * d * f * r + b * g * e * f * r


# ---------------------------------------------------------------------------------------
# Named structures


class Structure(NamedTuple):
    """A named structure: everything that the rest of the project needs to know about it.

    function  (d_in, d_out, options) -> Sizes, ChainSizes, or None for a plain matrix. It may also return a function
              (bias, normalize, gain, zero_init) -> layer, usually a CoreLinear (einsum_linear.py).
              options: {name: value}, of all structures' options
    options   {name: default} of those that it reads. An option that several structures read has one default
    theta     θ of a square layer of rank 1, which places it in the taxonomy; None if it has no place there

    `overrides` may give any of these options. Those that are fields of options.BlockConfig, such as `rank`, are also
    command-line options; `structure_options` gives the others. For example, write in my_structures.py:

        import theta

        def banded(d_in, d_out, options):
            return theta.Sizes(…)  # of options["bands"]

        theta.STRUCTURES["banded"] = theta.Structure(banded, options={"bands": 4})

    and name that file before the config files:

        python train.py my_structures.py config/quickstart.py --structure=banded --structure_options="{'bands': 8}"
    """

    function: Callable
    options: dict = {}
    theta: tuple | None = None


LOW_RANK = (1, 0, 0, 0, 1, 0, 0)
KRONECKER = TENSOR_TRAIN = (0.5, 0.5, 0, 0.5, 0.5, 0, 0)
BTT = (0.5, 0, 0.5, 0, 0.5, 0.5, 0)

# Points of the space by name: square layers of rank d^ρ.
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


def dense(d_in, d_out, options):
    """A plain matrix."""
    return None


def low_rank(d_in, d_out, options):
    return factor_sizes(d_in, d_out, LOW_RANK, options["rank"])


def kronecker(d_in, d_out, options):
    return factor_sizes(d_in, d_out, KRONECKER, 1)


def tt(d_in, d_out, options):
    if options["num_cores"] > 2:
        return chain_sizes(d_in, d_out, options, blocks=False)
    return factor_sizes(d_in, d_out, TENSOR_TRAIN, options["rank"])


def btt(d_in, d_out, options):
    if options["num_cores"] > 2:
        return chain_sizes(d_in, d_out, options, blocks=True)
    return factor_sizes(d_in, d_out, btt_theta(d_in, d_out, options), options["rank"])


def monarch(d_in, d_out, options):
    """Block-diagonal, permute, block-diagonal (Dao et al., "Monarch", ICML 2022): BTT of rank 1, or `num_blocks` blocks.

    Each of the two block-diagonal factors has b blocks, and min(d_in, d_out) values pass between
    them, the same number from every block to every other: γ = φ = b and ρ = min(d_in, d_out) / b².
    """
    b, narrow = options["num_blocks"], min(d_in, d_out)
    if b is None:
        return factor_sizes(d_in, d_out, btt_theta(d_in, d_out, options), 1)
    works = [k for k in range(1, math.isqrt(narrow) + 1) if d_in % k == 0 and d_out % k == 0 and narrow % (k * k) == 0]
    if b not in works:
        problem = f"num_blocks={b} does not divide a {d_in} -> {d_out} layer: its square must divide {narrow}"
        near = sorted(works, key=lambda k: abs(k - b))
        raise SizeError("num_blocks", problem, near, f"take {near[0]}, of {', '.join(map(str, works))}")
    return Sizes(d_in // b, 1, b, 1, d_out // b, b, narrow // (b * b))


def einsum(d_in, d_out, options):
    if options["theta"] is None:
        raise ConfigError("structure='einsum' needs theta: seven numbers, such as (.5, 0, .5, 0, .5, .5, 0)")
    return factor_sizes(d_in, d_out, options["theta"])


def btt_theta(d_in, d_out, options):
    """θ of a BTT: a = 1/2, or with aligned heads the full-rank BTT (a 0 1-a 0 1-a a) whose blocks are heads.

    heads_out: each output block φ is a head, of width ε. heads_in: each input block γ is a head, of width α.
    """
    if options["heads_out"]:
        a = math.log(options["heads_out"]) / math.log(d_out)
    elif options["heads_in"]:
        a = 1 - math.log(options["heads_in"]) / math.log(d_in)
    else:
        a = 0.5
    return (a, 0, 1 - a, 0, 1 - a, a, 0)


def chain_sizes(d_in, d_out, options, blocks):
    """ChainSizes of nearly equal factors. As in factor_sizes, those of the output are chosen for the highest rank."""
    cores, rank = options["num_cores"], options["rank"]
    exponents = (1 / cores,) * cores
    inputs, outputs = _both_near_factors(d_in, d_out, exponents, exponents)
    in_sizes = inputs[0][1]

    def most(out_sizes):
        """The largest useful rank between two cores: (i_1; j_c) in a BTT, (i_1 j_1; i_c j_c) in a TT."""
        if blocks:
            return min(in_sizes[0], out_sizes[-1])
        return min(in_sizes[0] * out_sizes[0], in_sizes[-1] * out_sizes[-1])

    if rank > (limit := most(outputs[0][1])):
        problem = f"rank {rank} is too large for a {d_in} -> {d_out} {'btt' if blocks else 'tt'} of {cores} cores"
        raise SizeError("rank", problem, range(limit, 0, -1), f"take rank <= {limit}")
    possible = [(far, sizes) for far, sizes in outputs if rank <= most(sizes)]
    lost = [-rank_of(ChainSizes(in_sizes, sizes, rank, blocks)) for _, sizes in possible]
    _, _, out_sizes = min((less, far, sizes) for less, (far, sizes) in zip(lost, possible))
    return ChainSizes(in_sizes, out_sizes, rank, blocks)


def _makes(function, *arguments):
    """Whether function(*arguments) raises no ConfigError."""
    try:
        function(*arguments)
    except ConfigError:
        return False
    return True


ALIGNMENT = {"heads_in": None, "heads_out": None}  # options.BlockConfig.align_heads sets them, users do not

STRUCTURES = {
    "dense": Structure(dense, theta=NAMED_THETAS["dense"]),
    "low_rank": Structure(low_rank, {"rank": 1}, LOW_RANK),
    "kronecker": Structure(kronecker, theta=KRONECKER),
    "tt": Structure(tt, {"rank": 1, "num_cores": 2}, TENSOR_TRAIN),
    "monarch": Structure(monarch, {"num_blocks": None, **ALIGNMENT}, BTT),
    "btt": Structure(btt, {"rank": 1, "num_cores": 2, **ALIGNMENT}, BTT),
    "einsum": Structure(einsum, {"theta": None}),
}


def all_options():
    """{option: default} of all structures."""
    defaults = {}
    for structure, (_, options, _) in STRUCTURES.items():
        for name, default in options.items():
            if defaults.setdefault(name, default) != default:
                raise ConfigError(
                    f"structure {structure!r} has the default {name}={default!r}, another has {defaults[name]!r}: "
                    "make them equal, or rename one"
                )
    return defaults


def find_structure(name):
    """The Structure of this name, or ConfigError."""
    if name not in STRUCTURES:
        near = difflib.get_close_matches(str(name), STRUCTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"structure={name!r} is unknown: {hint}choose one of {', '.join(STRUCTURES)}, "
            "or name the file that adds it, such as my_structures.py, among the config files"
        )
    return STRUCTURES[name]


def layer_sizes(d_in, d_out, structure="btt", **options):
    """Sizes of a d_in -> d_out layer: Sizes, ChainSizes, None if it is dense, or what a structure of your own returns.

    options: those of any structure; the others have their defaults. Raises ConfigError if no layer can be made of them,
    and UnusedOption for one that the structure does not read.
    """
    function, heeded, _ = find_structure(structure)
    defaults = all_options()
    options = {**defaults, **options}
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(f"{name}={value!r}: no structure has this option, leave it out")
        if value != defaults[name] and name not in heeded:
            others = ", ".join(key for key, other in STRUCTURES.items() if name in other.options)
            remedy = f"make it {defaults[name]}, or take {others}"
            raise UnusedOption(name, value, f" with structure={structure!r}, which has none", remedy)
    for name, least in (("rank", 1), ("num_cores", 2), ("d_in", 1), ("d_out", 1)):
        value = {**options, "d_in": d_in, "d_out": d_out}[name]
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: make it a whole number, {least} or more")
    most = max(2, min(d_in, d_out).bit_length() - 1)
    if options["num_cores"] > most:
        works = [c for c in range(most, 1, -1) if _makes(function, d_in, d_out, {**options, "num_cores": c})]
        problem = f"num_cores={options['num_cores']}: {d_in} and {d_out} cannot be split into that many factors"
        raise SizeError("num_cores", problem, works, f"take {works[0]} at most" if works else "take other widths")
    for name, width in (("heads_out", d_out), ("heads_in", d_in)):
        if options[name] and (options["num_cores"] > 2 or options["num_blocks"] or width % options[name] or width == 1):
            raise ConfigError(
                f"{name}={options[name]}: heads align with two cores, no num_blocks and a width that they divide, not {width}"
            )
    return function(d_in, d_out, options)


def check_mixture(structure, sizes):
    """ConfigError if a mixture cannot have such layers: its experts are rank slices of a BTT, or whole matrices."""
    if sizes is not None and not (isinstance(sizes, Sizes) and sizes.beta == sizes.delta == 1):
        raise ConfigError(
            f"structure={structure!r} cannot be a mixture, whose experts are rank slices of a BTT, or matrices: "
            "take btt of two cores, monarch, low_rank, dense, or an einsum with beta = delta = 0"
        )
