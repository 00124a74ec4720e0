"""Loss against learning rate, over widths and seeds: the best rate of every group, and how well it is known.

    python -m lab.scaling_laws rates out/sweeps/tune/* --out=results/scaling/rates     # rates.json and rates.md

A curve is the final loss of one group at one width, after one number of steps, at every rate that was tried. A file
holds the curves' measurements; all that follows from them (means, the best rate, the optimum) is computed from there.
"""

import json
import math
from typing import NamedTuple

import numpy as np

from configurator import ConfigError


class Curve(NamedTuple):
    """Final losses of the runs that differ in rate and seed only."""

    group: str  # such as "btt, rank=4"
    width: int  # d_model
    steps: int
    losses: dict  # {rate: {seed: final loss, None of a run that did not reach its last step}}
    about: dict  # what else a file holds of it, such as "note", a remark below the table, or "command"


def mean_losses(curve):
    """-> rates, ascending, and the mean over seeds at each: NaN where a run did not reach its last step."""
    rates = sorted(curve.losses)
    means = [np.mean([math.nan if loss is None else loss for loss in curve.losses[rate].values()]) for rate in rates]
    return np.array(rates), np.array(means)


def standard_deviation(losses):
    """That of {seed: loss}, or None: of one seed, or where a run did not reach its last step."""
    values = list(losses.values())
    return float(np.std(values, ddof=1)) if len(values) > 1 and None not in values else None


def best_rate(curve):
    """The rate of the least mean loss, or None where no rate has one."""
    rates, means = mean_losses(curve)
    return float(rates[np.nanargmin(means)]) if np.isfinite(means).any() else None


def optimal_rate(rates, losses):
    """The vertex of the parabola in log rate through the best rate and its two neighbours; None if it lacks one.

    rates  ascending;  losses  NaN where there is none, which is no neighbour
    """
    known = np.isfinite(losses)
    x, y = np.log(np.asarray(rates)[known]), np.asarray(losses)[known]
    best = int(np.argmin(y)) if len(y) else 0
    if not 0 < best < len(y) - 1:
        return None
    left, right = x[best - 1] - x[best], x[best + 1] - x[best]
    down, up = (y[best - 1] - y[best]) / left, (y[best + 1] - y[best]) / right  # slopes of the two chords
    return math.exp(x[best] + (left * up - right * down) / (2 * (up - down)) if up > down else x[best])


def optimum(curve):
    """-> the optimal rate by the mean over seeds, and the least and the largest by single seeds; None where unknown."""
    rates, means = mean_losses(curve)
    seeds = set.intersection(*(set(losses) for losses in curve.losses.values()))
    single = []
    for seed in seeds if len(seeds) > 1 else ():
        losses = [curve.losses[rate][seed] for rate in rates]
        single.append(optimal_rate(rates, [math.nan if loss is None else loss for loss in losses]))
    return optimal_rate(rates, means), (min(single), max(single)) if single and None not in single else None


def merged(curves):
    """The curves, those of one group, width and number of steps as one; of a rate and seed given twice the later."""
    whole = {}
    for curve in curves:
        key = curve.group, curve.width, curve.steps
        if key not in whole:
            whole[key] = curve._replace(losses={})
        for rate, losses in curve.losses.items():
            whole[key].losses.setdefault(rate, {}).update(losses)
    return list(whole.values())


# ---------------------------------------------------------------------------------------
# Files


def read_curves(path):
    """-> the Curves of a file that write_curves wrote, and what their loss is."""
    try:
        with open(path) as file:
            saved = json.load(file)
        curves = [
            Curve(
                each.pop("group"),
                each.pop("width"),
                each.pop("steps"),
                {at["lr"]: dict(zip(at["seeds"], at["losses"], strict=True)) for at in each.pop("rates")},
                {key: value for key, value in each.items() if key not in ("best", "optimum", "optima_of_seeds")},
            )
            for each in saved["curves"]
        ]
        return curves, saved["loss"]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is no file of lab.scaling_laws rates: leave it out") from None


def write_curves(path, curves, loss):
    """The curves as JSON, with what follows from them; loss: what it is, with its unit."""
    whole = []
    for curve in curves:
        rates, means = mean_losses(curve)
        best, of_seeds = optimum(curve)
        whole.append(
            {
                "group": curve.group, "width": curve.width, "steps": curve.steps, **curve.about, "best": best_rate(curve),
                "optimum": best, "optima_of_seeds": of_seeds,
                "rates": [
                    {
                        "lr": rate, "seeds": list(curve.losses[rate]), "losses": list(curve.losses[rate].values()),
                        "mean": float(mean) if math.isfinite(mean) else None,
                        "standard_deviation": standard_deviation(curve.losses[rate]),
                    }
                    for rate, mean in zip(rates.tolist(), means)
                ],
            }
        )  # fmt: skip
    with open(path, "w") as file:
        json.dump({"loss": loss, "curves": whole}, file, indent=1, ensure_ascii=False)
        file.write("\n")


# ---------------------------------------------------------------------------------------
# The table


def table_of_rates(curves, loss):
    """Lines of a Markdown table: a row a curve, a column a rate; then what its signs mean."""
    rates = sorted({rate for curve in curves for rate in curve.losses})
    yield f"| group | d_model | steps | seeds | {' | '.join(map(show_rate, rates))} | optimum |"
    yield "|---" * (len(rates) + 5) + "|"
    for curve in curves:
        best = best_rate(curve)
        cells = (_cell(curve.losses[rate], rate == best) if rate in curve.losses else "" for rate in rates)
        seeds = sorted({len(losses) for losses in curve.losses.values()})
        name = f"{curve.group} †" if curve.about.get("note") else curve.group
        yield (
            f"| {name} | {curve.width} | {curve.steps:,} | {' or '.join(map(str, seeds))} | {' | '.join(cells)} | "
            f"{_show_optimum(curve)} |"
        )
    yield ""
    several = any(len(losses) > 1 for curve in curves for losses in curve.losses.values())
    yield (
        f"Final {loss}{', mean ± standard deviation over seeds' if several else ''}; the best in bold. The optimum is the "
        "lowest point of a parabola in log rate through the best rate and its neighbours"
        f"{' (in brackets, of single seeds: the least and the largest)' if several else ''}; where the best rate is the "
        "lowest or the highest tried, only a bound (≤ or ≥) is known."
    )
    if any(None in losses.values() for curve in curves for losses in curve.losses.values()):
        yield ""
        yield "–: a run did not reach its last step, as one that diverges."
    for note in dict.fromkeys(curve.about["note"] for curve in curves if curve.about.get("note")):
        yield ""
        yield f"† {', '.join(c.group for c in curves if c.about.get('note') == note)}: {note}."


def _cell(losses, best):
    if None in losses.values():
        missing = sum(loss is None for loss in losses.values())
        return "–" if missing == len(losses) else f"– ({missing} of {len(losses)})"
    mean, deviation = f"{np.mean(list(losses.values())):.3f}", standard_deviation(losses)
    return (f"**{mean}**" if best else mean) + (f" ± {deviation:.3f}" if deviation is not None else "")


def _show_optimum(curve):
    best, (value, of_seeds) = best_rate(curve), optimum(curve)
    if best is None:
        return "none"
    if value is None:
        rates, means = mean_losses(curve)
        at = int(np.flatnonzero(rates == best)[0])
        if len(rates) == 1:
            return "one rate tried"
        if at in (0, len(rates) - 1):
            return f"{'≤' if at == 0 else '≥'} {show_rate(best)}"
        beyond = rates[at + 1] if math.isnan(means[at + 1]) else rates[at - 1]  # a neighbour that diverged
        return " to ".join(map(show_rate, sorted((best, beyond))))
    return show_rate(value) + (f" [{', '.join(map(show_rate, of_seeds))}]" if of_seeds else "")


def show_rate(rate):
    """Two digits and a power of ten: 1.5e-3."""
    digits, _, power = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
