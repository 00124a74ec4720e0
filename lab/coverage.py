"""How often the 90% intervals of lab.frontiers hold the truth: synthetic sweeps of the designs in results/.

    python -m lab.coverage                                # results/scaling/coverage.md and .json, minutes of a CPU
    python -m lab.coverage --sweeps=50 --out=out/coverage

Two groups follow one power law, but that one pays `multiplier` times less for every loss; a run's loss is off by a
normal error, a share of it that its seed has in part in common with all runs of that seed. A calibrated interval holds
the truth in 90% of the sweeps, give or take √(0.09 / sweeps).
"""

import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from typing import NamedTuple

import numpy as np
import scipy

from configurator import ConfigError, as_script, load_config
from lab import frontiers
from lab.frontiers import Fit, Run


@dataclass
class CoverageConfig:
    out: str = "results/scaling"  # folder for coverage.md and coverage.json
    sweeps: int = 200  # synthetic sweeps a design
    samples: int = 256  # draws of seeds behind every interval, as in lab.scaling_laws
    processes: int = 2  # sweeps at a time

    def __post_init__(self):
        for name in ("sweeps", "samples", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")


class Design(NamedTuple):
    points: str  # of a run: "final", or "curve"
    sizes: int
    seeds: int
    noise: float  # standard deviation of a run's log loss
    shared: float = 0.0  # share of its variance that all runs of a seed have in common
    multiplier: float = 4.0
    ahead: float = 0.6  # how much lower the group's sizes end than the reference's: log of the cost that it would take


DESIGNS = (
    Design("final", 4, 3, 0.005),  # MLPs on CIFAR-10: results/vision/mlp_seeds
    Design("final", 4, 3, 0.005, ahead=2.0),  # the same, few losses in common
    Design("final", 4, 3, 0.005, shared=0.9),  # the same, seeds that change all losses alike
    Design("final", 4, 1, 0.002),
    Design("final", 4, 1, 0.005),
    Design("final", 6, 1, 0.005),
    Design("curve", 4, 1, 0.003),  # GPTs on text: results/scaling
    Design("curve", 4, 1, 0.01),
    Design("curve", 6, 1, 0.003),
    Design("curve", 4, 3, 0.003),
)

# The laws of dense layers in results/vision/mlp_seeds_fit and results/scaling/gpt_theta_fit, and their range of FLOPs.
LAWS = {
    "final": (Fit(1.772, 4.3e13 * 0.136 ** (1 / 0.195), 0.195), 4.3e13, 1.9e15),
    "curve": (Fit(1.046, 3e13 * 0.45 ** (1 / 0.624), 0.624), 3e13, 3e15),
}
CURVATURE = 0.02  # how far a size's curve lies above the law: this × its squared distance in log cost from its best


def law_of(design, group):
    law = LAWS[design.points][0]
    return law if group == "dense" else law._replace(scale=law.scale / design.multiplier)


def sweep(design, random):
    """Runs of the groups "btt" and "dense"."""
    _, low, high = LAWS[design.points]
    of_seed = math.sqrt(design.shared) * design.noise * random.standard_normal(design.seeds)
    runs = []
    for group in ("dense", "btt"):
        law, moved = law_of(design, group), 1.0 if group == "dense" else math.exp(design.ahead) / design.multiplier
        for size, best in enumerate(np.geomspace(low, high, design.sizes) * moved):
            cost = best * (np.geomspace(0.1, 6, 20) if design.points == "curve" else np.ones(1))
            curve = law.loss(cost) * (1 + CURVATURE * np.log(cost / best) ** 2)
            for seed, shared in enumerate(of_seed):
                own = math.sqrt(1 - design.shared) * design.noise * random.standard_normal()
                loss = curve * math.exp(shared + own)
                runs.append(Run(f"{group}{size}_{seed}", group, {"flops": cost}, loss, f"{group}{size}", None, seed))
    return runs


def held(design, seed, samples):
    """{figure: [whether an interval of it held the truth, …]} of one synthetic sweep, and how wide the multiplier's is."""
    figures = frontiers.analyse(sweep(design, np.random.default_rng(seed)), "dense", "flops", samples)
    entry, found = figures["btt"], {}
    if entry["multiplier"] and entry["multiplier_interval"]:
        low, high = entry["multiplier_interval"]
        found = {"multiplier": [low <= design.multiplier <= high], "width": [high / low]}
        found["band"] = [low <= design.multiplier <= high for low, high in entry["multiplier_spread"]]
    for name, each in figures.items():
        if each["intervals"]:
            for field in ("exponent", "loss_at_infinity"):
                low, high = each["intervals"][field]
                found.setdefault(field, []).append(low <= getattr(law_of(design, name), field) <= high)
    return found


def coverage(design, sweeps, samples, apply=map):
    """{figure: share of its intervals that hold the truth}, with "none", the share of sweeps without a multiplier's."""
    found = list(apply(_held, [(design, seed, samples) for seed in range(sweeps)]))
    result = {}
    for figure in ("multiplier", "band", "exponent", "loss_at_infinity"):
        every = [each for one in found for each in one.get(figure, [])]
        result[figure] = float(np.mean(every)) if every else None
    widths = [one["width"][0] for one in found if "width" in one]
    result["width"] = float(np.median(widths)) if widths else None
    result["none"] = 1 - len(widths) / sweeps
    return result


def _held(words):
    return held(*words)


def table(rows):
    """Lines of a Markdown table of [(design, coverage), …]."""
    heads = (
        "points of a run",
        "sizes × seeds",
        "noise",
        "of it shared",
        "multiplier",
        "its width",
        "pointwise band",
        "a",
    )
    yield f"| {' | '.join((*heads, 'L∞', 'no interval'))} |"
    yield "|---" * 10 + "|"
    for design, found in rows:
        apart = ", few losses in common" if design.ahead > 1 else ""
        shares = (
            "–" if found[key] is None else f"{found[key]:.2f}" for key in ("band", "exponent", "loss_at_infinity")
        )
        yield (
            f"| {design.points}{apart} | {design.sizes} × {design.seeds} | {design.noise:.1%} | {design.shared:.0%} | "
            f"**{found['multiplier']:.2f}** | × {found['width']:.2f} | {' | '.join(shares)} | {found['none']:.0%} |"
        )


def main(argv):
    config, began, rows = load_config(CoverageConfig, argv), time.monotonic(), []
    with Pool(config.processes) as pool:
        for design in DESIGNS:
            rows.append((design, coverage(design, config.sweeps, config.samples, pool.imap)))
            print(*list(table(rows[-1:]))[2:], flush=True)
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    what = (
        f"Share of nominal 90% intervals that hold the truth, in {config.sweeps} synthetic sweeps a design, "
        f"{config.samples} draws an interval: `python -m lab.coverage`, {time.monotonic() - began:.0f} s on "
        f"{config.processes} cores of a CPU, {versions}. The width is the median of the multiplier's upper end ÷ its lower; "
        f"bands are intervals at single losses."
    )
    os.makedirs(config.out, exist_ok=True)
    with open(os.path.join(config.out, "coverage.md"), "w") as file:
        file.write("\n".join([what, "", *table(rows), ""]))
    with open(os.path.join(config.out, "coverage.json"), "w") as file:
        json.dump(
            {**asdict(config), "versions": versions, "designs": [{"design": d._asdict(), "held": f} for d, f in rows]},
            file,
            indent=1,
        )
        file.write("\n")
    print(f"written: {config.out}/coverage.md, coverage.json")


if __name__ == "__main__":
    as_script(main)
