"""Tests that sizes have the rank that θ promises, against decompositions and brute force, and that remedies work.

pytest tests/test_theta.py         # a sample of widths
python tests/test_theta.py 1024    # every width from 64 to 1024 by the formula, and by decomposition as time allows
"""

import itertools
import math
import random
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

from configurator import ConfigError
from einsum_linear import make_linear
from lab.structures import measured_rank
from theta import (
    BTT,
    ChainSizes,
    Sizes,
    blocks_rank,
    check_theta,
    factor_sizes,
    layer_sizes,
    multiplications,
    near_factors,
    rank_of,
    taxonomy,
)  # fmt: skip

PUBLISHED = runpy.run_path(str(Path(__file__).parent.parent / "config/sweeps/gpt_theta.py"))["thetas"]
NAMED = [
    dict(structure="low_rank", rank=16),
    dict(structure="kronecker"),
    dict(structure="tt", rank=1),
    dict(structure="tt", rank=3),
    dict(structure="tt", num_cores=3),
    dict(structure="tt", num_cores=3, rank=3),
    dict(structure="monarch"),
    dict(structure="monarch", num_blocks=4),
    dict(structure="btt", rank=1),
    dict(structure="btt", rank=2),
    dict(structure="btt", num_cores=3),
    dict(structure="btt", num_cores=3, rank=2),
]
LAYERS = [dict(structure="einsum", theta=theta) for theta in PUBLISHED] + NAMED


def sizes_or_none(d_in, d_out, options):
    """layer_sizes, or None if it refuses the width."""
    try:
        return layer_sizes(d_in, d_out, **options)
    except ConfigError:
        return None


def promised_rank(d_in, d_out, options):
    """0.9 d^ψ by the taxonomy for an einsum; `rank` for low_rank; full rank for the other named structures."""
    d = min(d_in, d_out)
    if options["structure"] == "einsum":
        return 0.9 * d ** taxonomy(options["theta"])[1]
    return options["rank"] if options["structure"] == "low_rank" else d


def best_rank(d_in, d_out, theta):
    """The largest rank of all factorisations whose sizes are within a factor 2 of θ, by brute force."""
    rho = max(1, round(min(d_in, d_out) ** theta[6]))

    def near(d, exponents):
        triples = itertools.product(*([k for k in range(1, d + 1) if d % k == 0] if e else [1] for e in exponents))
        return [
            t for t in triples if math.prod(t) == d and all(0.4999 < s / d**e < 2.0001 for s, e in zip(t, exponents))
        ]

    return max(
        min(d_in, d_out, g * f * rho * min(b * d, a * e))
        for (a, b, g), (d, e, f) in itertools.product(near(d_in, theta[:3]), near(d_out, theta[3:6]))
    )


def shapes(widths):
    return [shape for d in widths for shape in ((d, d), (d, 4 * d), (4 * d, d))]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_every_accepted_width_has_the_promised_rank(options):
    accepted = 0
    for shape in shapes(range(64, 1025, 7)):
        if (sizes := sizes_or_none(*shape, options)) is None:
            continue
        accepted += 1
        if rank_of(sizes) < promised_rank(
            *shape, options
        ):  # then no sizes near θ have the promised rank, and the model table shows the actual one
            assert options["structure"] == "einsum" and rank_of(sizes) == best_rank(*shape, options["theta"]), shape
    assert accepted > 10


def test_widths_that_once_lost_rank():
    for d in (192, 384, 512, 768, 1000):
        assert measured_rank(make_linear(d, d, "kronecker", normalize=False)) == d
    for d in (192, 512):
        assert measured_rank(make_linear(d, d, "tt", rank=1, normalize=False)) == d
    assert measured_rank(make_linear(512, 512, "einsum", (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), normalize=False)) == 512


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_rank_of_equals_the_rank_that_a_decomposition_measures(options):
    checked = 0
    for shape in shapes(range(64, 150, 12)):
        if (sizes := sizes_or_none(*shape, options)) is not None:
            torch.manual_seed(0)
            assert measured_rank(make_linear(*shape, normalize=False, **options)) == rank_of(sizes), shape
            checked += 1
    assert checked


def test_for_arbitrary_sizes_rank_of_is_a_bound_that_random_cores_nearly_always_reach():
    from einsum_linear import ChainLinear, EinsumLinear

    draw, missed = random.Random(0), 0
    for _ in range(300):
        sizes = Sizes(*(draw.choice((1, 1, 2, 3, 4, 5)) for _ in range(6)), draw.choice((1, 1, 2, 3)))
        if sizes.rho > blocks_rank(sizes) or max(math.prod(sizes[:3]), math.prod(sizes[3:6])) > 120:
            continue
        measured, bound = measured_rank(EinsumLinear(sizes, normalize=False)), rank_of(sizes)
        assert 0.8 * bound <= measured <= bound, sizes
        missed += measured < bound
    assert missed <= 3
    for _ in range(60):
        ins, outs = ([draw.choice((1, 2, 3, 4)) for _ in range(3)] for _ in range(2))
        sizes = ChainSizes(tuple(ins), tuple(outs), draw.choice((1, 2)), draw.choice((True, False)))
        assert measured_rank(ChainLinear(*sizes, normalize=False)) <= rank_of(sizes), sizes


def test_blocks_are_large_enough_for_rho():
    theta = (0.911, 0.011, 0.078, 0.173, 0.725, 0.102, 0.686)
    sizes = factor_sizes(32, 32, theta)
    assert sizes.rho == 11 <= blocks_rank(sizes)


def test_of_equally_near_sizes_the_cheapest_are_taken_and_btt_keeps_its_known_ones():
    assert layer_sizes(512, 512, "btt") == (16, 1, 32, 1, 32, 16, 1)
    assert layer_sizes(512, 2048, "btt", rank=4) == (16, 1, 32, 1, 64, 32, 4)
    assert layer_sizes(2048, 512, "monarch") == (32, 1, 64, 1, 32, 16, 1)
    assert factor_sizes(384, 1536, PUBLISHED[3]) == (48, 1, 8, 1, 12, 128, 1)
    for d_in, d_out in (
        (512, 2048),
        (2048, 512),
        (1000, 1000),
        (96, 384),
    ):  # Kronecker: no other pair of full rank costs less
        roots = [near_factors("d", d, (0.5, 0.5)) for d in (d_in, d_out)]
        full = [
            Sizes(*x, 1, *y, 1, 1)
            for (far_x, x), (far_y, y) in itertools.product(*roots)
            if (far_x, far_y) == (roots[0][0][0], roots[1][0][0])
            and min(x[0], y[0]) * min(x[1], y[1]) == min(d_in, d_out)
        ]
        ours = layer_sizes(d_in, d_out, "kronecker")
        assert min(multiplications(ours).values()) == min(min(multiplications(sizes).values()) for sizes in full)


# ---------------------------------------------------------------------------------------
# Remedies are read from the message and tried


def message_of_refusal(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    "options", [dict(structure="btt"), dict(structure="kronecker"), dict(structure="tt", num_cores=3)]
)
def test_the_widths_that_a_message_offers_work(options):
    tried = 0
    for d_in, d_out in itertools.product((97, 64, 106, 512, 254), (64, 50257, 113, 512)):
        if sizes_or_none(d_in, d_out, options) is None:
            message = message_of_refusal(layer_sizes, d_in, d_out, **options)
            bad = re.findall(r"(d_in|d_out)=\d+ has no factorisation", message)
            offered = [map(int, re.findall(r"\d+", text)) for text in message.split("work are")[1].split(",")]
            assert 0 < len(bad) == len(offered), message
            for choice in itertools.product(*offered):
                taken = {"d_in": d_in, "d_out": d_out, **dict(zip(bad, choice))}
                assert sizes_or_none(**taken, options=options), (message, taken)
                tried += 1
    assert tried


def test_the_ranks_blocks_and_cores_that_a_message_offers_work():
    draw, seen = random.Random(1), {"rank": 0, "num_blocks": 0, "num_cores": 0}
    for _ in range(400):
        d_in, d_out = (draw.choice((48, 60, 64, 96, 128, 200, 210, 256, 384, 512, 768)) for _ in range(2))
        options = draw.choice(
            (
                dict(structure="btt", rank=draw.randint(2, 40)),
                dict(structure="tt", rank=draw.randint(2, 400)),
                dict(structure="low_rank", rank=draw.randint(2, 900)),
                dict(structure="btt", rank=draw.randint(2, 12), num_cores=3),
                dict(structure="tt", rank=draw.randint(2, 40), num_cores=3),
                dict(structure="monarch", num_blocks=draw.randint(2, 40)),
                dict(structure="tt", num_cores=draw.randint(7, 20)),
            )
        )
        if sizes_or_none(d_in, d_out, options) is not None:
            continue
        message = message_of_refusal(layer_sizes, d_in, d_out, **options)
        if taken := re.search(r"take (?:rank <= )?(\d+)(?: at most|, of|$)", message):
            option = re.search(r"rank|num_blocks|num_cores", message)[0]
            assert sizes_or_none(d_in, d_out, {**options, option: int(taken[1])}) is not None, message
            seen[option] += 1
        else:
            assert "widths that work" in message or "other widths" in message, message
    assert min(seen.values()) > 5, seen


def test_the_thetas_that_a_message_offers_work():
    draw, tried = random.Random(2), 0
    for _ in range(300):
        theta = tuple(round(draw.uniform(-0.2, 1.2), draw.randint(0, 9)) for _ in range(7))
        message = message_of_refusal(check_theta, theta)
        near = re.search(r"as in \((.*)\)", message)[1]
        check_theta(tuple(map(float, near.split())))
        tried += 1
    for rho in (0.6, 0.75, 0.9, 1.0):
        for base in (BTT, (0.5, 0.5, 0, 0.5, 0.5, 0, 0), (0.25, 0, 0.75, 0, 0.75, 0.25, 0)):
            for shape in ((256, 256), (512, 128), (768, 3072)):
                if sizes_or_none(*shape, dict(structure="einsum", theta=(*base[:6], rho))) is None:
                    message = message_of_refusal(factor_sizes, *shape, (*base[:6], rho))
                    factor_sizes(*shape, tuple(map(float, re.search(r", theta=\((.*?)\)$", message)[1].split())))
                    tried += 1
    assert tried > 310


# ---------------------------------------------------------------------------------------
# All widths


def main(most, seconds=300):
    """Print how many sizes fall short of the promised rank at every width, and check a random sample by decomposition."""
    todo = []
    for options in LAYERS:
        accepted = short = 0
        for shape in shapes(range(64, most + 1)):
            if (sizes := sizes_or_none(*shape, options)) is not None:
                accepted += 1
                short += rank_of(sizes) < promised_rank(*shape, options)
                todo.append((shape, options, sizes))
        print(f"{options}: {accepted} accepted, {short} without sizes that have the promised rank", flush=True)
    random.Random(0).shuffle(todo)
    start, differ, measured = time.time(), 0, 0
    for shape, options, sizes in todo:
        if time.time() - start > seconds:
            break
        torch.manual_seed(0)
        rank = measured_rank(make_linear(*shape, normalize=False, **options))
        measured += 1
        if rank != rank_of(sizes):
            differ += 1
            print(shape, options, f"measured {rank}, by the formula {rank_of(sizes)}")
    print(f"{measured} of {len(todo)} decomposed, {differ} differ from the formula")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
