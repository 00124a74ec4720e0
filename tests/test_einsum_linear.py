"""Structured layers against their matrices, sizes against brute force."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import ConfigError
from einsum_linear import EinsumLinear, Sizes, factor_sizes, init_std, make_linear, multiplications

BTT = (0.5, 0, 0.5, 0, 0.5, 0.5, 0)
THETAS = [
    BTT,
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25),
    (0, 0.5, 0.5, 0.5, 0, 0.5, 0.2),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25),
    (0.25, 0.5, 0.25, 0.5, 0.25, 0.25, 0.2),
]
LAYERS = [
    *({"structure": "einsum", "theta": theta} for theta in THETAS),
    {"structure": "dense"},
    {"structure": "low_rank", "rank": 5},
    {"structure": "btt", "rank": 1},
    {"structure": "btt", "rank": 3},
]  # fmt: skip
SHAPES = [(60, 60), (24, 210), (105, 64), (81, 15)]


def name(value):
    return str(value).replace(" ", "")


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("kwargs", LAYERS, ids=name)
def test_equals_its_own_matrix_forward_and_backward(kwargs, shape):
    torch.manual_seed(0)
    layer = make_linear(*shape, bias=True, **kwargs).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))  # far above the RMS cap, gains and bias not trivial
    x = torch.randn(3, 7, shape[0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 7, shape[1], dtype=torch.float64)
    parameters = [x, *layer.parameters()]

    y = layer(x)
    expected = x @ layer.materialize().T + layer.bias
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y, parameters, weights), torch.autograd.grad(expected, parameters, weights)
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_matrix_is_the_definition_written_as_a_loop(order):
    # Sizes that make the wanted order the cheaper one.
    sizes = Sizes(3, 2, 2, 2, 3, 2, 2) if order == "AB" else Sizes(2, 3, 2, 3, 2, 2, 2)
    layer = EinsumLinear(sizes, normalize=False).double()
    assert layer.order == order
    a, b, g, d, e, f, r = sizes
    first, second = (core.detach() for core in layer.cores)
    A, B = (first, second) if order == "AB" else (second, first)
    W = torch.zeros(d * e * f, a * b * g, dtype=torch.float64)
    for ia, ib, ig, id_, ie, if_, ir in itertools.product(*map(range, sizes)):
        if order == "AB":
            entry = A[ig, ia, (ir * f + if_) * d + id_] * B[if_, (ib * g + ig) * r + ir, ie]
        else:
            entry = B[ig, ib, (ir * f + if_) * e + ie] * A[if_, (ia * g + ig) * r + ir, id_]
        W[(id_ * f + if_) * e + ie, (ib * g + ig) * a + ia] += entry  # memory: y is (δ φ ε), x is (β γ α)
    torch.testing.assert_close(layer.materialize(), W)


@pytest.mark.parametrize("d_in, d_out", [(768, 3072), (512, 512), (60, 96), (1024, 50304)])
@pytest.mark.parametrize("theta", THETAS + [(1, 0, 0, 0, 1, 0, 0.5), (1 / 3, 0, 2 / 3, 0, 2 / 3, 1 / 3, 0)], ids=name)
def test_sizes_are_the_nearest_exact_factorisation(d_in, d_out, theta):
    def distance(d, sizes, exponents):
        return sum((math.log(s) - e * math.log(d)) ** 2 for s, e in zip(sizes, exponents))

    def nearest(d, exponents):
        divisors = [k for k in range(1, d + 1) if d % k == 0]
        triples = ((i, j, d // (i * j)) for i in divisors for j in divisors if d % (i * j) == 0)
        return min(distance(d, triple, exponents) for triple in triples)

    sizes = factor_sizes(d_in, d_out, theta)
    assert sizes.alpha * sizes.beta * sizes.gamma == d_in and sizes.delta * sizes.epsilon * sizes.phi == d_out
    assert distance(d_in, sizes[0:3], theta[0:3]) == pytest.approx(nearest(d_in, theta[0:3]))
    assert distance(d_out, sizes[3:6], theta[3:6]) == pytest.approx(nearest(d_out, theta[3:6]))
    assert sizes.rho == max(1, round(min(d_in, d_out) ** theta[6]))


@pytest.mark.parametrize("d", [36, 64, 128, 512])
def test_btt_has_full_rank_also_where_the_width_is_no_square(d):
    layer = make_linear(d, d, "btt", normalize=False).double()
    assert torch.linalg.matrix_rank(layer.materialize()) == d


def test_low_rank_has_its_rank():
    layer = make_linear(40, 30, "low_rank", rank=7).double()
    assert torch.linalg.matrix_rank(layer.materialize()) == 7


@pytest.mark.parametrize("kwargs", LAYERS, ids=name)
def test_flops_are_those_of_the_executed_graph(kwargs):
    layer = make_linear(60, 96, **kwargs)
    x = torch.randn(11, 60)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 11 * layer.flops_per_token


def test_the_cheaper_order_is_taken():
    for sizes in (Sizes(8, 2, 4, 2, 8, 4, 2), Sizes(2, 8, 4, 8, 2, 4, 2)):
        mults = multiplications(sizes)
        assert mults["AB"] != mults["BA"]
        assert EinsumLinear(sizes).flops_per_token == 2 * min(mults.values())


def test_initial_cores_and_outputs_have_the_stated_size():
    torch.manual_seed(0)
    for kwargs in LAYERS:
        layer = make_linear(900, 900, **kwargs)
        for core, std in zip(layer.cores, layer.init_std):
            assert core.std().item() == pytest.approx(std, rel=0.1)
    assert init_std(100, 25) == 0.05
    W = make_linear(900, 400, "dense").weight
    assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(2 * math.sqrt(400 / 900), rel=0.35)


def test_rms_cap_holds_and_only_above_the_initial_size():
    layer = make_linear(64, 64, "btt", rank=2)
    used = [core.detach().clone() for core in layer.effective_cores()]
    with torch.no_grad():
        for core in layer.cores:
            core.mul_(10)
        layer.gains.mul_(3)
    for core, before, std in zip(layer.effective_cores(), used, layer.init_std):
        assert core.square().mean().sqrt().item() == pytest.approx(3 * std, rel=1e-5)
        assert before.square().mean().sqrt().item() <= std * 1.0001
    assert make_linear(64, 64, "btt", gain=False).gains is None


def test_zero_init_gives_zero_output_and_finite_gradients():
    layer = make_linear(64, 64, "btt", zero_init=True)
    y = layer(torch.randn(5, 64))
    y.sum().backward()
    assert y.abs().max() == 0
    assert layer.cores[1].grad.abs().max() > 0 and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("d_in, d_out", [(97, 64), (64, 50257)])
def test_a_width_that_does_not_factor_is_refused_with_the_nearest_that_do(d_in, d_out):
    with pytest.raises(ConfigError) as caught:
        factor_sizes(d_in, d_out, BTT)
    numbers = [int(word) for word in str(caught.value).replace(",", "").split() if word.isdigit()]
    bad = d_in if d_in == 97 else d_out
    below, above = numbers[-2:]
    assert below < bad < above
    for width in range(below, above + 1):
        if width in (below, above):
            assert factor_sizes(width, width, BTT)
        else:
            with pytest.raises(ConfigError):
                factor_sizes(width, width, BTT)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(structure="butterfly"), ["butterfly", "btt"]),
        (dict(structure="einsum"), ["theta", "einsum"]),
        (dict(structure="btt", theta=BTT), ["theta", "einsum"]),
        (dict(structure="einsum", theta=(0.5, 0.5)), ["theta", "2 values", "seven"]),
        (dict(structure="einsum", theta=(0.5, 0, 0.6, 0, 0.5, 0.5, 0)), ["alpha + beta + gamma", "1.1"]),
        (dict(structure="einsum", theta=(0.5, 0, 0.5, -0.5, 1, 0.5, 0)), ["at least 0"]),
        (dict(structure="einsum", theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0), rank=2), ["rank=2"]),
        (dict(structure="einsum", theta="abc"), ["theta", "seven"]),
        (dict(structure="btt", rank=0), ["rank=0", "1 or more"]),
        (dict(structure="btt", rank=9), ["rank 9", "rank <= 8"]),
        (dict(structure="dense", rank=2), ["rank=2", "dense"]),
        (dict(structure="low_rank", rank=65), ["rank 65", "rank <= 64"]),
    ],
)
def test_mistakes_are_one_clear_line(kwargs, words):
    with pytest.raises(ConfigError) as caught:
        make_linear(64, 64, **kwargs)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
