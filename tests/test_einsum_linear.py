"""Tests structured layers against their matrices and definitions, and their sizes against brute force."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import ConfigError
from einsum_linear import ChainLinear, EinsumLinear, apply_together, init_std, make_linear, multiplied_out
from lab.structures import main
from theta import Sizes, factor_sizes, multiplications, num_parameters, taxonomy

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
    {"structure": "kronecker"},
    {"structure": "tt", "rank": 3},
    {"structure": "tt", "rank": 2, "num_cores": 3},
    {"structure": "btt", "rank": 2, "num_cores": 3},
    {"structure": "monarch"},
]  # fmt: skip
SHAPES = [(60, 60), (24, 210), (105, 64), (72, 16)]


def short_text(value):
    return str(value).replace(" ", "")


@pytest.mark.parametrize("shape", SHAPES, ids=short_text)
@pytest.mark.parametrize("kwargs", LAYERS, ids=short_text)
def test_a_layer_equals_its_matrix_forward_and_backward(kwargs, shape):
    torch.manual_seed(0)
    layer = make_linear(*shape, bias=True, **kwargs).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))  # far above the RMS cap, with random gains and bias
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
def test_the_matrix_equals_the_definition_written_as_a_loop(order):
    # These sizes make the wanted order the cheaper one.
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
        W[(if_ * e + ie) * d + id_, (ig * b + ib) * a + ia] += entry  # in memory y is (φ, ε, δ) and x is (γ, β, α)
    torch.testing.assert_close(layer.materialize(), W)


@pytest.mark.parametrize("d_in, d_out", [(768, 3072), (512, 512), (60, 96), (1024, 50304)])
@pytest.mark.parametrize(
    "theta", THETAS + [(1, 0, 0, 0, 1, 0, 0.5), (1 / 3, 0, 2 / 3, 0, 2 / 3, 1 / 3, 0)], ids=short_text
)
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
def test_btt_has_full_rank_even_if_the_width_is_no_square(d):
    layer = make_linear(d, d, "btt", normalize=False).double()
    assert torch.linalg.matrix_rank(layer.materialize()) == d


def test_a_monarch_is_two_block_diagonal_matrices_and_a_permutation():
    """The definition of Dao et al. for d_in -> d_out with b blocks, built from block_diag and a permutation."""
    d_in, d_out, b = 32, 64, 4
    layer = make_linear(d_in, d_out, "monarch", num_blocks=b, normalize=False).double()
    first, second = layer.cores  # (b, d_in / b, ρ·b), (b, b·ρ, d_out / b)
    r = d_in // b**2
    one = torch.block_diag(*(core.T for core in first))  # values in order (γ, ρ, φ)
    two = torch.block_diag(*(core.T for core in second))  # takes them in order (φ, γ, ρ)
    order = torch.arange(b * r * b).view(b, r, b).permute(2, 0, 1).flatten()
    torch.testing.assert_close(layer.materialize(), two @ one[order])
    assert sum(core.numel() for core in layer.cores) == d_in * d_in // b + d_in * d_out // b
    assert torch.linalg.matrix_rank(layer.materialize()) == d_in


def test_kronecker_is_a_kronecker_product():
    layer = make_linear(36, 36, "kronecker", normalize=False).double()
    A, B = (core[0].T for core in layer.cores)
    W = layer.materialize()
    assert any(torch.allclose(W, torch.kron(P, Q)) for P, Q in ((A, B), (B, A)))


def test_chains_of_three_cores_equal_their_sums_written_out():
    """A Tensor-Train and a BTT, entry by entry."""
    for structure in ("tt", "btt"):
        layer = make_linear(12, 18, structure, rank=2, num_cores=3, normalize=False).double()
        (i1, i2, i3), (j1, j2, j3) = layer.in_sizes, layer.out_sizes
        G1, G2, G3 = (core.detach() for core in layer.cores)
        W = torch.zeros(18, 12, dtype=torch.float64)
        for x1, x2, x3, y1, y2, y3, r1, r2 in itertools.product(*map(range, (i1, i2, i3, j1, j2, j3, 2, 2))):
            b1, b2, b3 = (x2 * i3 + x3, y1 * i3 + x3, y1 * j2 + y2) if structure == "btt" else (0, 0, 0)
            entry = G1[b1, x1, y1 * 2 + r1] * G2[b2, x2 * 2 + r1, y2 * 2 + r2] * G3[b3, x3 * 2 + r2, y3]
            W[(y1 * j2 + y2) * j3 + y3, (x1 * i2 + x2) * i3 + x3] += entry
        torch.testing.assert_close(layer.materialize(), W)


def test_a_chain_of_two_cores_is_the_einsum_of_two_cores():
    """ChainLinear with c = 2 has the sizes, parameters and FLOPs of EinsumLinear's BTT and TT."""
    for structure, blocks in (("btt", True), ("tt", False)):
        two = make_linear(64, 36, structure, rank=2)
        s = two.sizes
        i, j = ((s.alpha, s.gamma), (s.phi, s.epsilon)) if blocks else ((s.alpha, s.beta), (s.delta, s.epsilon))
        chain = ChainLinear(i, j, 2, blocks)
        assert sum(c.numel() for c in chain.cores) == sum(c.numel() for c in two.cores)
        assert chain.flops_per_token in (2 * m for m in multiplications(s).values())


def test_heads_align_with_blocks():
    """Zeroing head 2's block of q's last core zeroes the output of that head alone; likewise for the input of proj."""
    heads, d = 6, 48
    q = make_linear(d, d, "btt", heads_out=heads, normalize=False)
    assert q.sizes.phi == heads and q.sizes.epsilon == d // heads and q.sizes.gamma == d // heads
    with torch.no_grad():
        q.cores[1][2] = 0
    out = q(torch.randn(5, d)).view(5, heads, d // heads)
    assert [head for head in range(heads) if out[:, head].abs().max() == 0] == [2]
    proj = make_linear(d, d, "btt", heads_in=heads, normalize=False)
    assert proj.sizes.gamma == heads and proj.sizes.alpha == d // heads
    with torch.no_grad():
        proj.cores[0][2] = 0
    W = proj.materialize().view(d, heads, d // heads)
    assert [head for head in range(heads) if W[:, head].abs().max() == 0] == [2]
    for layer in (q, proj):
        layer.reset_parameters()
        assert torch.linalg.matrix_rank(layer.double().materialize()) == d  # aligned blocks keep full rank


# -- the 23 structures of the published GPT sweep: (exponents, taxonomy)

SWEEP = [
    # full-rank BTT
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0), (0.33, 0, 0.67, 0, 0.67, 0.33, 0), (0.25, 0, 0.75, 0, 0.75, 0.25, 0),
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0), (0.75, 0, 0.25, 0, 0.25, 0.75, 0),
    # low-rank and other BTT
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0), (0.33, 0, 0.67, 0, 0.33, 0.67, 0), (0.75, 0, 0.25, 0, 0.75, 0.25, 0),
    (0.25, 0, 0.75, 0, 0.25, 0.75, 0),
    # rank above 1
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25), (0.5, 0, 0.5, 0, 0.5, 0.5, 0.33), (0.33, 0, 0.67, 0, 0.67, 0.33, 0.25),
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0.25), (0.67, 0, 0.33, 0, 0.67, 0.33, 0.25), (0.33, 0, 0.67, 0, 0.33, 0.67, 0.25),
    # Kronecker and Tensor-Train
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0), (0.33, 0.67, 0, 0.33, 0.67, 0, 0),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25), (0.33, 0.67, 0, 0.33, 0.67, 0, 0.25),
    # low rank
    (1, 0, 0, 0, 1, 0, 0.75), (1, 0, 0, 0, 1, 0, 0.5),
    # generic
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25),
]  # fmt: skip


def thirds(theta):
    """theta with 1/3 and 2/3 in place of 0.33 and 0.67."""
    return tuple({0.33: 1 / 3, 0.67: 2 / 3}.get(t, t) for t in theta)


def slope(widths, values):
    """Exponent fitted to values over widths, least squares in log space."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (widths, values))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


@pytest.mark.parametrize("theta", SWEEP, ids=short_text)
def test_taxonomy_equals_fitted_exponents(theta):
    omega, psi, nu = taxonomy(thirds(theta))
    widths = [2**24, 2**36, 2**48, 2**60]  # only counted by formula: no layer of this width is made
    sizes = [factor_sizes(d, d, thirds(theta)) for d in widths]
    flops = [2 * min(multiplications(s).values()) for s in sizes]
    parameters = [num_parameters(s) for s in sizes]
    assert slope(widths, flops) == pytest.approx(1 + nu, abs=0.02)
    assert slope(widths, [p / f for p, f in zip(parameters, flops)]) == pytest.approx(-omega, abs=0.02)
    # Ranks are measured, at widths whose sizes are near θ and small enough to decompose.
    widths = [64, 216, 512] if 0.33 in theta[:6] else [81, 256, 625]
    ranks = []
    for d in widths:
        torch.manual_seed(0)
        layer = EinsumLinear(factor_sizes(d, d, theta), normalize=False).double()
        ranks.append(torch.linalg.matrix_rank(layer.materialize()).item())
        # the formula equals the number of parameters that exist
        assert num_parameters(layer.sizes) == sum(core.numel() for core in layer.cores)
    assert slope(widths, ranks) == pytest.approx(psi, abs=0.04), ranks


def test_taxonomy_does_not_depend_on_which_core_is_called_A():
    for a, b, g, d, e, f, r in SWEEP:
        assert taxonomy((a, b, g, d, e, f, r)) == pytest.approx(taxonomy((b, a, g, e, d, f, r)))


def test_taxonomy_of_well_known_structures():
    assert taxonomy((0.5, 0, 0.5, 0, 0.5, 0.5, 0)) == pytest.approx((0, 1, 0.5))  # BTT, Monarch
    assert taxonomy((0.5, 0.5, 0, 0.5, 0.5, 0, 0)) == pytest.approx((0.5, 1, 0.5))  # Kronecker: shared, full rank
    assert taxonomy((1, 0, 0, 0, 1, 0, 0.5)) == pytest.approx((0, 0.5, 0.5))  # low rank
    assert taxonomy((0, 0, 1, 0, 1, 0, 0)) == pytest.approx((0, 1, 1))  # dense


# -- approximation of a dense matrix


def truncation_error(M, rank):
    """Squared Frobenius error of the best approximation of rank `rank` (Eckart and Young)."""
    return torch.linalg.svdvals(M)[rank:].square().sum().item()


def approximation_error(layer, W):
    """Squared Frobenius error of the layer's approximation of W."""
    layer.load_dense(W)
    return (layer.materialize() - W).square().sum().item()


def test_low_rank_and_btt_approximations_are_truncated_svds():
    torch.manual_seed(0)
    W = torch.randn(36, 48, dtype=torch.float64)
    low_rank = make_linear(48, 36, "low_rank", rank=7).double()
    assert approximation_error(low_rank, W) == pytest.approx(truncation_error(W, 7))
    btt = make_linear(48, 36, "btt", rank=2).double()
    a, _, g, _, e, f, _ = btt.sizes
    blocks = [W[i * e : (i + 1) * e, j * a : (j + 1) * a] for i in range(f) for j in range(g)]
    assert approximation_error(btt, W) == pytest.approx(sum(truncation_error(block, 2) for block in blocks))
    monarch = make_linear(48, 36, "monarch", num_blocks=2).double()
    assert approximation_error(monarch, W) == pytest.approx(
        sum(truncation_error(block, 9) for half in W.chunk(2) for block in half.chunk(2, dim=1))
    )


def test_kronecker_and_tt_approximations_are_svds_of_the_rearrangement():
    torch.manual_seed(0)
    W = torch.randn(36, 36, dtype=torch.float64)
    rearranged = torch.stack([block.flatten() for row in W.chunk(6) for block in row.chunk(6, dim=1)])  # 36 blocks × 36
    assert approximation_error(make_linear(36, 36, "kronecker").double(), W) == pytest.approx(
        truncation_error(rearranged, 1)
    )
    assert approximation_error(make_linear(36, 36, "tt", rank=5).double(), W) == pytest.approx(
        truncation_error(rearranged, 5)
    )


@pytest.mark.parametrize("kwargs", LAYERS, ids=short_text)
def test_a_matrix_of_the_structure_is_recovered(kwargs):
    torch.manual_seed(0)
    with torch.no_grad():
        W = 30 * make_linear(60, 96, **kwargs).double().materialize()  # far above the RMS cap: the gains compensate
    layer = make_linear(60, 96, **kwargs).double()
    assert approximation_error(layer, W) <= 1e-16 * W.square().sum().item()


def test_alternating_least_squares_beats_random_search_and_svd_alone():
    torch.manual_seed(0)
    W = torch.randn(60, 48, dtype=torch.float64)
    for kwargs in (dict(structure="tt", rank=3, num_cores=3), dict(structure="btt", rank=1, num_cores=3)):
        layer = make_linear(48, 60, **kwargs).double()
        found = approximation_error(layer, W)
        layer.load_dense(W, sweeps=0)
        assert found < (layer.materialize() - W).square().sum().item()
        # It has reached a stationary point: the gradient with respect to each core is almost zero.
        layer.load_dense(W, sweeps=200)
        loss = (layer.materialize() - W).square().sum()
        for gradient, core in zip(torch.autograd.grad(loss, list(layer.cores)), layer.cores):
            assert gradient.norm() * core.norm() < 1e-3 * loss


def test_from_dense_makes_a_layer_that_approximates_the_matrix():
    W = torch.randn(36, 48)
    layer = EinsumLinear.from_dense(W, rank=6)
    torch.testing.assert_close(layer.materialize(), W, atol=1e-5, rtol=0)  # rank 6 fills the 6 × 6 blocks


# -- the command


def test_command_prints_the_figures_of_a_theta(capsys):
    main(["--d_in", "256", "--d_out=1024", "--theta", ".5", "0", ".5", "0", ".5", ".5", "0"])
    out = capsys.readouterr().out
    sizes = factor_sizes(256, 1024, BTT)
    mults = multiplications(sizes)
    for text in (
        "alpha 16",
        "epsilon 32",
        f"{2 * mults['AB']:,} FLOPs",
        f"{2 * mults['BA']:,} FLOPs",
        f"{num_parameters(sizes):,}",
    ):
        assert text in out, out
    assert "omega 0 (sharing)  psi 1 (rank)  nu 0.5" in out and "256 measured, of 256" in out
    assert [line for line in out.splitlines() if "<- taken" in line][0].startswith("A first")


def test_command_prints_a_table_and_draws_the_picture(capsys, tmp_path):
    main(["--d_in=64", "--d_out=64"])
    out = capsys.readouterr().out
    for structure in ("dense", "low_rank", "kronecker", "tt", "monarch", "btt"):
        row = next(line for line in out.splitlines() if line.startswith(structure + " "))
        assert row.split()[-1].isdigit(), row
    main([f"--plot={tmp_path}/taxonomy.png"])
    assert (tmp_path / "taxonomy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kwargs", LAYERS, ids=short_text)
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


def test_the_rms_cap_acts_only_above_the_initial_size():
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


def capped(W, gain, std):
    """The capped matrix of a dense layer, by the definition of the cap."""
    rms = W.square().mean().sqrt()
    return gain * W * min(1.0, (std / rms).item())


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("gain", [True, False])
def test_dense_layers_can_be_capped_too(scale, gain):
    layer = make_linear(48, 96, "dense", normalize=True, gain=gain, bias=True).double()
    with torch.no_grad():
        layer.weight *= scale  # relative to the initial size
        layer.bias += torch.randn(96)
        if gain:
            layer.gains.fill_(1.7)
    x = torch.randn(5, 48, dtype=torch.double)
    want = x @ capped(layer.weight, 1.7 if gain else 1.0, init_std(48, 96)).T + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.materialize(), capped(layer.weight, 1.7 if gain else 1.0, init_std(48, 96)))
    direction = torch.randn_like(
        layer.weight
    )  # a numerical derivative in one direction includes the derivative of the cap
    loss, h = lambda: layer(x).square().sum(), 1e-6
    (of_weight,) = torch.autograd.grad(loss(), layer.weight)
    with torch.no_grad():
        layer.weight += h * direction
        above = loss()
        layer.weight -= 2 * h * direction
        numeric = (above - loss()) / (2 * h)
    torch.testing.assert_close((of_weight * direction).sum(), numeric, rtol=1e-6, atol=1e-6)


def test_capped_dense_layers_load_a_matrix_join_and_cost_like_plain_ones():
    layers = [make_linear(16, 24, "dense", normalize=True, gain=gain) for gain in (True, False, True)]
    W = 5 * torch.randn(24, 16)
    for layer in layers:
        layer.load_dense(W)
        scale = 1 if layer.gains is not None else init_std(16, 24) / W.square().mean().sqrt()
        torch.testing.assert_close(layer.materialize(), scale * W)
    x = torch.randn(7, 16)
    for one, alone in zip(apply_together(layers, x), layers):
        torch.testing.assert_close(one, alone(x))
    with multiplied_out(torch.nn.ModuleList(layers)):
        torch.testing.assert_close(layers[0](x), x @ W.T)
    plain = make_linear(16, 24, "dense")
    assert list(plain.state_dict()) == ["weight"] and plain.flops_per_token == layers[0].flops_per_token
    assert torch.equal(plain(x), torch.nn.functional.linear(x, plain.weight))


def test_zero_init_gives_zero_output_and_finite_gradients():
    layer = make_linear(64, 64, "btt", zero_init=True)
    y = layer(torch.randn(5, 64))
    y.sum().backward()
    assert y.abs().max() == 0
    assert layer.cores[1].grad.abs().max() > 0 and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("d_in, d_out", [(97, 64), (64, 50257)])
def test_a_width_without_a_factorisation_is_refused_with_the_nearest_widths_that_work(d_in, d_out):
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
        (dict(structure="kronecker", rank=2), ["rank=2", "kronecker", "tt, btt"]),
        (dict(structure="monarch", num_blocks=3), ["num_blocks=3", "take 2", "1, 2, 4, 8"]),
        (dict(structure="btt", num_blocks=2), ["num_blocks=2", "monarch"]),
        (dict(structure="low_rank", num_cores=3), ["num_cores=3", "tt, btt"]),
        (dict(structure="btt", num_cores=1), ["num_cores=1", "2 or more"]),
        (dict(structure="tt", num_cores=16), ["num_cores=16", "take 6 at most"]),
        (dict(structure="btt", rank=2.5), ["rank=2.5", "whole number"]),
        (dict(structure="einsum", theta=(float("nan"),) * 7), ["theta", "between 0 and 1"]),
        (dict(structure="btt", num_cores=3, rank=5), ["rank 5", "rank <= 4"]),
        (dict(structure="tt", num_cores=3, rank=17), ["rank 17", "rank <= 16"]),
        (dict(structure="btt", heads_out=3), ["heads_out=3", "64"]),
        (dict(structure="tt", heads_out=4), ["heads_out=4", "monarch, btt"]),
        (dict(structure="btt", theta=BTT), ["theta", "einsum"]),
        (dict(structure="einsum", theta=(0.5, 0.5)), ["theta", "2 values", "seven"]),
        (
            dict(structure="einsum", theta=(0.5, 0, 0.6, 0, 0.5, 0.5, 0)),
            ["alpha + beta + gamma", "1.1", "(0.4545 0 0.5455"],
        ),
        (dict(structure="einsum", theta=(0.5, 0, 0.5, -0.5, 1, 0.5, 0)), ["between 0 and 1"]),
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


@pytest.mark.parametrize(
    "kwargs", [{"structure": "btt", "rank": 3}, {"structure": "tt", "rank": 2, "num_cores": 3}], ids=short_text
)
def test_multiplied_out_keeps_the_matrix_within_its_block_only(kwargs):
    """Inside the block a layer uses its matrix; after it, even after an exception, it uses its parameters again."""
    layer = make_linear(24, 60, bias=True, **kwargs).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    want = layer(x)
    with pytest.raises(KeyboardInterrupt), multiplied_out(torch.nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            layer.cores[0].zero_()
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
        raise KeyboardInterrupt
    torch.testing.assert_close(layer(x), layer.bias.expand(2, 3, 60))


@pytest.mark.parametrize("second", ["btt", "low_rank", "dense"])
def test_layers_applied_together_equal_layers_applied_alone(second):
    torch.manual_seed(0)
    layers = [
        make_linear(24, 36, structure=structure, rank=2 if structure != "dense" else 1, bias=True)
        for structure in ("btt", second)
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 24)
    for y, layer in zip(apply_together(layers, x), layers):
        torch.testing.assert_close(y, x @ layer.materialize().T + layer.bias)
    with multiplied_out(torch.nn.ModuleList(layers)):
        for y, layer in zip(apply_together(layers, x), layers):
            torch.testing.assert_close(y, layer(x))
