"""Tests that nominal 90% intervals contain the truth in about 90% of synthetic sweeps, whose law is known.

`python -m lab.coverage` is the long version.
"""

import json

import numpy as np
import pytest

from conftest import ROOT
from lab import coverage, frontiers
from lab.coverage import DESIGNS, Design

FINAL = [design for design in DESIGNS if design.points == "final" and design.ahead < 1][:3]


@pytest.mark.parametrize("design", FINAL, ids=lambda design: f"{design.sizes}x{design.seeds}_shared{design.shared}")
def test_intervals_of_multipliers_contain_the_truth(design, monkeypatch):
    """In 90% of 40 sweeps, within three standard errors of 5%. Curves take ten times as long: see the long version."""
    monkeypatch.setattr(frontiers, "_law_figures", lambda *_: {"law": None, "intervals": None})
    found = coverage.measure_coverage(design, sweeps=40, samples=64)
    assert found["multiplier"] >= 0.76 and found["none"] <= 0.1
    assert (
        found["width"] < {0.002: 4, 0.005: 10}[design.noise]
    )  # the intervals are not so wide that they contain everything


def test_bands_of_curves_contain_the_truth_between_sizes(monkeypatch):
    """With three seeds there is little noise: without the error between sizes, intervals at single losses are too narrow."""
    design = next(each for each in DESIGNS if (each.points, each.sizes, each.seeds) == ("curve", 4, 3))
    monkeypatch.setattr(frontiers, "_law_figures", lambda *_: {"law": None, "intervals": None})
    calibrated = coverage.measure_coverage(design, sweeps=20, samples=64)
    monkeypatch.setattr(frontiers, "variance_between_sizes", lambda *_: 0.0)
    of_seeds_only = coverage.measure_coverage(design, sweeps=20, samples=64)
    assert calibrated["multiplier"] == of_seeds_only["multiplier"]
    assert of_seeds_only["band"] < 0.79 < 0.82 < calibrated["band"]


@pytest.mark.parametrize("points", ["final", "curve"])
def test_without_noise_the_multiplier_equals_the_laws(points):
    runs = coverage.synthetic_sweep(Design(points, 8, 1, 0.0), np.random.default_rng(0))
    assert frontiers.analyse(runs, "dense", "flops", 2)["btt"]["multiplier"] == pytest.approx(4, rel=0.05)


def test_the_long_versions_results_cover_these_designs_and_are_calibrated():
    with open(f"{ROOT}/results/scaling/coverage.json") as file:
        kept = json.load(file)
    rows = [(Design(**each["design"]), each["held"]) for each in kept["designs"]]
    assert [design for design, _ in rows] == list(DESIGNS)
    assert all(0.85 <= held["multiplier"] <= 0.97 for _, held in rows)
    assert all(0.85 <= held["band"] <= 0.95 for _, held in rows)
    with open(f"{ROOT}/results/scaling/coverage.md") as file:
        assert "\n".join(coverage.table_of_coverage(rows)) in file.read()
