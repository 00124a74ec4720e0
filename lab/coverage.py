"""How often the 90% intervals of lab.frontiers hold the truth: synthetic sweeps of the designs in results/.

    python -m lab.coverage                                # results/scaling/coverage.md and .json, 6 minutes of a core
    python -m lab.coverage --sweeps=50 --out=out/coverage

Two groups follow the same power law, but one pays `multiplier` times less for every loss. A run's log loss has a normal
error; part of its variance is shared by all runs of the same seed. A calibrated interval holds the truth in 90% of the
sweeps, with a standard error of √(0.09 / sweeps).
"""

import json
import math
import os
import platform
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
    samples: int = 256  # draws of other seeds behind every interval, as in lab.scaling_laws
    processes: int = 2  # sweeps analysed at the same time

    def __post_init__(self):
        for name in ("sweeps", "samples", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")


class Design(NamedTuple):
    points: str  # of a run: "final", or "curve"
    sizes: int
    seeds: int
    noise: float  # standard deviation of the error of a run's log loss
    shared: float = 0.0  # share of the variance that all runs of a seed have in common
    multiplier: float = 4.0
    ahead: float = 0.6  # how far the group's losses reach beyond the reference's: log of the cost ratio that takes


DESIGNS = (
    Design("final", 4, 3, 0.005),  # MLPs on CIFAR-10: results/vision/mlp_seeds
    Design("final", 4, 3, 0.005, ahead=2.0),  # the same with few losses in common
    Design("final", 4, 3, 0.005, shared=0.9),  # the same with seeds that change all losses alike
    Design("final", 4, 1, 0.002),
    Design("final", 4, 1, 0.005),
    Design("final", 6, 1, 0.005),
    Design("curve", 4, 1, 0.003),  # GPTs on text: results/scaling
    Design("curve", 4, 1, 0.01),
    Design("curve", 6, 1, 0.003),
    Design("curve", 4, 3, 0.003),
)

# The laws of dense models in results/vision/mlp_seeds_fit and results/scaling/gpt_theta_fit, and their ranges of FLOPs.
LAWS = {
    "final": (Fit(1.772, 4.3e13 * 0.136 ** (1 / 0.195), 0.195), 4.3e13, 1.9e15),
    "curve": (Fit(1.046, 3e13 * 0.45 ** (1 / 0.624), 0.624), 3e13, 3e15),
}
CURVATURE = 0.02  # of a size's curve: it is this × (log of the cost ÷ the best cost of the size)² above the law


def true_law(design, group):
    law = LAWS[design.points][0]
    return law if group == "dense" else law._replace(scale=law.scale / design.multiplier)


def synthetic_sweep(design, random):
    """Runs of one synthetic sweep, of the groups "btt" and "dense"."""
    _, low, high = LAWS[design.points]
    of_seed = math.sqrt(design.shared) * design.noise * random.standard_normal(design.seeds)
    runs = []
    for group in ("dense", "btt"):
        law, moved = true_law(design, group), 1.0 if group == "dense" else math.exp(design.ahead) / design.multiplier
        for size, best in enumerate(np.geomspace(low, high, design.sizes) * moved):
            cost = best * (np.geomspace(0.1, 6, 20) if design.points == "curve" else np.ones(1))
            curve = law.loss(cost) * (1 + CURVATURE * np.log(cost / best) ** 2)
            for seed, shared in enumerate(of_seed):
                own = math.sqrt(1 - design.shared) * design.noise * random.standard_normal()
                loss = curve * math.exp(shared + own)
                runs.append(Run(f"{group}{size}_{seed}", group, {"flops": cost}, loss, f"{group}{size}", None, seed))
    return runs


def intervals_that_hold(design, seed, samples):
    """{figure: [whether each of its intervals holds the truth]} of one synthetic sweep; "width": upper ÷ lower end of the multiplier's."""
    figures = frontiers.analyse(synthetic_sweep(design, np.random.default_rng(seed)), "dense", "flops", samples)
    entry, found = figures["btt"], {}
    if entry["multiplier"] and entry["multiplier_interval"]:
        low, high = entry["multiplier_interval"]
        found = {"multiplier": [low <= design.multiplier <= high], "width": [high / low]}
        found["band"] = [low <= design.multiplier <= high for low, high in entry["multiplier_spread"]]
    for name, each in figures.items():
        if each["intervals"]:
            for field in ("exponent", "loss_at_infinity"):
                low, high = each["intervals"][field]
                found.setdefault(field, []).append(low <= getattr(true_law(design, name), field) <= high)
    return found


def measure_coverage(design, sweeps, samples, apply=map):
    """{figure: share of its intervals that hold the truth}; "none": share of sweeps in which the multiplier has no interval."""
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
    return intervals_that_hold(*words)


def table_of_coverage(rows):
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
    config, rows = load_config(CoverageConfig, argv), []
    with Pool(config.processes) as pool:
        for design in DESIGNS:
            rows.append((design, measure_coverage(design, config.sweeps, config.samples, pool.imap)))
            print(*list(table_of_coverage(rows[-1:]))[2:], flush=True)
        pool.close()
        pool.join()
    seconds = sum(os.times()[:4])  # of this process and its children
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    what = (
        f"Share of nominal 90% intervals that hold the truth, in {config.sweeps} synthetic sweeps of each design with "
        f"{config.samples} draws for an interval. `python -m lab.coverage`: {seconds:.0f} s of a CPU core, {versions}. The "
        "width is the median of the upper ÷ the lower end of the multiplier's interval; a band is the intervals of the "
        "multiplier at single losses; a and L∞ are of the power law."
    )
    os.makedirs(config.out, exist_ok=True)
    with open(os.path.join(config.out, "coverage.md"), "w") as file:
        file.write("\n".join([what, "", *table_of_coverage(rows), ""]))
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
