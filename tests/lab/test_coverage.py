"""Nominal 90% intervals hold the truth in about 90% of synthetic sweeps. The long version: python -m lab.coverage"""

import json

import numpy as np
import pytest

from conftest import ROOT
from lab import coverage, frontiers
from lab.coverage import DESIGNS, Design

FINAL = [design for design in DESIGNS if design.points == "final" and design.ahead < 1][:3]


@pytest.mark.parametrize("design", FINAL, ids=lambda design: f"{design.sizes}x{design.seeds}_shared{design.shared}")
def test_intervals_of_multipliers_hold_the_truth(design, monkeypatch):
    """Of 40 sweeps, 90% give or take three times 5%; curves take ten times as long, and are left to the long version."""
    monkeypatch.setattr(frontiers, "_law_figures", lambda *_: {"law": None, "intervals": None})
    found = coverage.coverage(design, sweeps=40, samples=64)
    assert found["multiplier"] >= 0.76 and found["none"] <= 0.1
    assert found["width"] < {0.002: 4, 0.005: 10}[design.noise]  # none that hold everything


@pytest.mark.parametrize("points", ["final", "curve"])
def test_without_noise_the_multiplier_is_the_law_s(points):
    runs = coverage.sweep(Design(points, 8, 1, 0.0), np.random.default_rng(0))
    assert frontiers.analyse(runs, "dense", "flops", 2)["btt"]["multiplier"] == pytest.approx(4, rel=0.05)


def test_the_long_version_s_table_is_of_these_designs_and_calibrated():
    with open(f"{ROOT}/results/scaling/coverage.json") as file:
        kept = json.load(file)
    rows = [(Design(**each["design"]), each["held"]) for each in kept["designs"]]
    assert [design for design, _ in rows] == list(DESIGNS)
    assert all(0.85 <= held["multiplier"] <= 0.97 for _, held in rows)
    with open(f"{ROOT}/results/scaling/coverage.md") as file:
        assert "\n".join(coverage.table(rows)) in file.read()
