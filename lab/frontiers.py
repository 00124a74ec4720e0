"""Scaling laws of groups of runs: compute-optimal frontiers, power laws, and how much compute a structure saves.

    python -m lab.scaling_laws fit out/sweep/* --out=out/sweep_fit          # runs of several structures and sizes

A group is the runs of one structure at all sizes; runs that differ in nothing but their seed count as one, their mean.
Its frontier is the lower convex hull, in log-log, of what its runs cost and reached ("Compute Better Spent", ICML 2024,
section 5): the least loss for the compute. It follows a power law

    L = L∞ + (C / C0)^-a

whose parameters come with the range of a bootstrap over runs. The compute multiplier of a group at a loss is what the
reference group (dense) pays for that loss ÷ what the group pays. C is FLOPs, seconds or parameters.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from configurator import ConfigError

# what C can be: key of a point, title, unit in tables
COSTS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "parameters": "parameters",
}


class Run(NamedTuple):
    """A run's points, all arrays of one length: what it had cost when its loss was that."""

    name: str
    group: str
    cost: dict  # {"flops": array, "seconds": array, "parameters": array}
    loss: np.ndarray  # of validation, say, in nats per token
    setting: str = ""  # the same for runs that differ in nothing but their seed; "": no other is like it
    step: np.ndarray | None = None  # of the points; None: 0, 1, 2, …


class Fit(NamedTuple):
    """L = loss_at_infinity + (C / scale)^-exponent"""

    loss_at_infinity: float
    scale: float
    exponent: float

    def loss(self, cost):
        if self.exponent == 0:
            return np.full_like(np.asarray(cost, dtype=float), self.loss_at_infinity)
        return self.loss_at_infinity + (np.asarray(cost) / self.scale) ** -self.exponent


# ---------------------------------------------------------------------------------------
# Seeds


def by_setting(runs):
    """[[runs that differ in nothing but their seed], …]"""
    alike = {}
    for run in runs:
        alike.setdefault(run.setting or run.name, []).append(run)
    return list(alike.values())


def mean_over_seeds(runs):
    """One Run a setting: the means of its runs, step by step. Of runs without others like them, themselves."""
    return [_mean(alike) if len(alike) > 1 else alike[0] for alike in by_setting(runs)]


def _mean(runs):
    """At the steps that all have, since one may have been cut short; of none such, the mean of those that got furthest."""
    steps = [np.arange(len(run.loss)) if run.step is None else run.step for run in runs]
    common = functools.reduce(np.intersect1d, steps)
    if not len(common):
        common = np.array([max(step[-1] for step in steps)])
    having = [(run, np.isin(step, common)) for run, step in zip(runs, steps) if np.isin(common, step).all()]
    cost = {name: np.mean([run.cost[name][at] for run, at in having], axis=0) for name in runs[0].cost}
    return runs[0]._replace(cost=cost, loss=np.mean([run.loss[at] for run, at in having], axis=0), step=common)


def resample(runs, random):
    """As many runs, drawn with replacement: where there are several seeds, of each setting; else of all runs."""
    settings = by_setting(runs)
    if all(len(alike) == 1 for alike in settings):
        settings = [runs]
    return [alike[i] for alike in settings for i in random.integers(len(alike), size=len(alike))]


def spread_of_seeds(runs):
    """-> settings with several seeds; median over them of the last loss's standard deviation, as a share of it."""
    last = [[run.loss[-1] for run in alike] for alike in by_setting(runs) if len(alike) > 1]
    return len(last), float(np.median([np.std(x, ddof=1) / np.mean(x) for x in last])) if last else math.nan


# ---------------------------------------------------------------------------------------
# Frontiers


def frontier(cost, loss):
    """Indices of the lower convex hull of (log cost, log loss), from the cheapest point to the one of least loss.

    A point is on it if no mixture of two others, on a straight line in log-log, is cheaper at its loss.
    """
    x, y = np.log(cost), np.log(loss)
    hull = []
    for i in np.lexsort((y, x)):
        if hull and x[i] == x[hull[-1]]:
            continue  # as dear as the one before, and no better
        while len(hull) >= 2 and _turns_up(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(int(i))
    best = int(np.argmin(y[hull]))
    return hull[: best + 1]


def optimal(runs, cost):
    """-> costs and losses on the frontier of the runs, as far as several sizes compete for it.

    At its cheap end the frontier is the smallest model before it is trained enough, at its dear end the largest one
    trained on and on; no size was best there, there was no other. Of both only the point where the next size takes over counts.
    """
    c, loss = _points(runs, cost)
    of_run = np.repeat(np.arange(len(runs)), [len(run.loss) for run in runs])
    on = frontier(c, loss)
    while len(on) > 2 and of_run[on[0]] == of_run[on[1]]:
        on.pop(0)
    while len(on) > 2 and of_run[on[-1]] == of_run[on[-2]]:
        on.pop()
    return c[on], loss[on]


def _turns_up(x, y, i, j, k):
    """Whether point j is on or above the line from i to k."""
    return (y[j] - y[i]) * (x[k] - x[i]) >= (y[k] - y[i]) * (x[j] - x[i])


def without_outliers(runs, cost):
    """The runs without those that lie far off the frontier of all others, and the names of those.

    A run that is dearer than the frontier is no outlier, most are. One far *below* what the others allow is: a loss by
    another measure, a log of something else. Far is 6 times the spread of the frontier around its power law, and 10%:
    among few sizes one may well be a few percent below what the others allow.
    """
    left = list(runs)
    for run in runs:
        others = [other for other in left if other is not run]
        if sum(len(other.loss) for other in others) < 6 or len(others) < 4:
            continue
        c, loss = optimal(others, cost)
        if len(c) < 4:
            continue
        law = fit_power_law(c, loss)
        residual = np.abs(np.log(loss / law.loss(c)))
        inside = (run.cost[cost] >= c.min()) & (run.cost[cost] <= c.max())
        below = np.log(law.loss(run.cost[cost][inside]) / run.loss[inside])
        if inside.any() and below.max() > max(0.1, 6 * 1.48 * np.median(residual)):
            left.remove(run)
    return left, [run.name for run in runs if run not in left]


def _points(runs, cost):
    return np.concatenate([run.cost[cost] for run in runs]), np.concatenate([run.loss for run in runs])


# ---------------------------------------------------------------------------------------
# Power laws


def fit_power_law(cost, loss):
    """The Fit with the least squares of log loss; at least 3 points.

    For a given L∞, log(L - L∞) is linear in log C: so one search, over L∞ from 0 to just below the least loss.
    """
    x, log_loss = np.log(cost), np.log(loss)
    centred = x - x.mean()
    low, high = 0.0, float(loss.min()) * (1 - 1e-6)
    for _ in range(8):  # finer and finer grids around the best, all of a grid at once
        floors = np.linspace(low, high, 33)  # (33,)
        y = np.log(loss - floors[:, None])  # (33, points)
        slopes = (y * centred).sum(1) / (centred**2).sum()
        fitted = y.mean(1)[:, None] + slopes[:, None] * centred
        errors = ((np.log(floors[:, None] + np.exp(fitted)) - log_loss) ** 2).sum(1)
        best = int(np.argmin(errors))
        low, high = floors[max(0, best - 1)], floors[min(32, best + 1)]
    slope, intercept = slopes[best], y[best].mean() - slopes[best] * x.mean()
    if slope >= 0 or -intercept / slope > 700:  # it does not fall, or so slowly that its scale is no number
        return Fit(float(np.exp(log_loss.mean())), math.inf, 0.0)
    return Fit(float(floors[best]), math.exp(-intercept / slope), -float(slope))


def _drawn(runs, random):
    return mean_over_seeds(resample(runs, random))


def bootstrap(runs, function, samples=200, seed=0):
    """function(resampled runs, means over seeds), as a list; samples that it cannot use (None) left out."""
    random = np.random.default_rng(seed)
    results = []
    for _ in range(samples):
        value = function(_drawn(runs, random))
        if value is not None:
            results.append(value)
    return results


def fit_group(runs, cost):
    """Fit of the group's frontier, or None where it has fewer than 3 points."""
    c, loss = optimal(runs, cost)
    return fit_power_law(c, loss) if len(c) >= 3 else None


# ---------------------------------------------------------------------------------------
# Multipliers


def cost_of_loss(cost, loss, wanted):
    """What a frontier (cost, loss) pays for each of the wanted losses, on straight lines in log-log; NaN beyond its ends."""
    order = np.argsort(loss)
    log = np.interp(np.log(wanted), np.log(loss[order]), np.log(cost[order]), left=np.nan, right=np.nan)
    return np.exp(log)


def multipliers(runs, reference, cost, at=None):
    """-> losses, and what the reference's frontier pays for each ÷ what the group's pays; NaN where one does not reach.

    at: the losses; None: those of the points of both frontiers.
    """
    c, loss = optimal(runs, cost)
    c_ref, loss_ref = optimal(reference, cost)
    wanted = np.union1d(loss, loss_ref) if at is None else np.asarray(at)
    return wanted, cost_of_loss(c_ref, loss_ref, wanted) / cost_of_loss(c, loss, wanted)


def interval(values, share=0.9):
    """The middle share of the values, as (low, high); NaN of none."""
    values = np.asarray([value for value in values if np.isfinite(value)])
    if not len(values):
        return math.nan, math.nan
    return tuple(float(value) for value in np.quantile(values, [(1 - share) / 2, (1 + share) / 2]))


def analyse(runs, reference, cost, samples=200):
    """{group: figures} for one cost: frontier, law, multiplier, each with its 90% interval over resampled runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    if reference not in groups:
        raise ConfigError(f"reference={reference!r} is no group of these runs: take one of {', '.join(groups)}")
    kept = {name: without_outliers(mine, cost) for name, mine in groups.items()}
    figures = {}
    for name, (mine, dropped) in kept.items():
        means = mean_over_seeds(mine)
        c, loss = optimal(means, cost)
        law = fit_group(means, cost)
        laws = bootstrap(mine, lambda drawn: fit_group(drawn, cost), samples) if law else []
        enough = len(laws) >= samples / 2  # of few runs most samples have too few different ones for a law
        entry = {
            "runs": len(mine), "outliers": dropped, "frontier_cost": c.tolist(), "frontier_loss": loss.tolist(),
            "law": law and law._asdict(),
            "intervals": {field: interval([getattr(each, field) for each in laws]) for field in Fit._fields} if enough and law else None,
        }  # fmt: skip
        entry.update(_multiplier_figures(mine, kept[reference][0], cost, samples))
        figures[name] = entry
    return figures


def _multiplier_figures(mine, reference, cost, samples):
    means = mean_over_seeds(mine)
    at, ratio = multipliers(means, mean_over_seeds(reference), cost)
    both = np.isfinite(ratio)
    if not both.any():
        return {"multiplier": None}
    at, ratio = at[both], ratio[both]
    random = np.random.default_rng(1)
    drawn = [multipliers(_drawn(mine, random), _drawn(reference, random), cost, at)[1] for _ in range(samples)]
    drawn = np.array(drawn)
    spread = [interval(column) for column in drawn.T]
    middle = float(np.exp(np.mean(np.log(ratio))))
    # of each sample, the mean over the losses that it reaches
    of_samples = [np.exp(np.mean(np.log(row[np.isfinite(row)]))) for row in drawn if np.isfinite(row).any()]
    c, loss = optimal(means, cost)
    return {
        "multiplier": middle, "multiplier_interval": interval(of_samples), "multiplier_loss": at.tolist(),
        "multiplier_cost": cost_of_loss(c, loss, at).tolist(),
        "multiplier_at": ratio.tolist(), "multiplier_spread": spread,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------
# What is written


def table(figures, cost, reference):
    """Lines of a Markdown table."""
    yield f"| by {COSTS[cost]} | runs | points | a | L∞ | least loss | multiplier against {reference} |"
    yield "|---|---|---|---|---|---|---|"
    for name, entry in figures.items():
        law, ranges = entry["law"], entry["intervals"]
        a, floor = "too few points", ""
        if law:
            a, floor = (
                _with_range(law[field], ranges[field] if ranges else None, "{:.3f}")
                for field in ("exponent", "loss_at_infinity")
            )
        ratio = "no loss in common"
        if entry["multiplier"] is not None:
            ratio = _with_range(entry["multiplier"], entry["multiplier_interval"], "{:.2f}")
        note = f" ({len(entry['outliers'])} left out)" if entry["outliers"] else ""
        points = len(entry["frontier_cost"])
        yield f"| {name} | {entry['runs']}{note} | {points} | {a} | {floor} | {min(entry['frontier_loss']):.4f} | {ratio} |"


def _with_range(value, ends, form):
    if ends is None:
        return f"{form.format(value)} (too few runs for an interval)"
    return f"{form.format(value)} [{form.format(ends[0])}, {form.format(ends[1])}]"


def draw_frontiers(runs, figures, cost, measure, colour, title, label=None):
    """All points, the frontiers and their laws.

    measure: what the loss is, for its axis; colour: {group: colour}; label: a colour bar's (mappable, text)
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for run in runs:
        axes.plot(run.cost[cost], run.loss, color=colour[run.group], lw=0.5, alpha=0.35, marker=".", ms=2, gid="run")
    for name, entry in figures.items():
        c, loss = np.array(entry["frontier_cost"]), np.array(entry["frontier_loss"])
        axes.plot(c, loss, "o", color=colour[name], ms=5, mec="white", mew=0.6, label=name, gid="frontier")
        if entry["law"]:
            law = Fit(**entry["law"])
            along = np.geomspace(c.min(), c.max(), 100)
            axes.plot(along, law.loss(along), color=colour[name], lw=1.4, gid="law")
        else:
            axes.plot(c, loss, color=colour[name], lw=1.4, gid="law")
    axes.set(xscale="log", yscale="log", xlabel=COSTS[cost], ylabel=measure, title=title)
    everything = np.concatenate([np.array(entry["frontier_loss"]) for entry in figures.values()])
    axes.set_ylim(everything.min() / 1.02, min(everything.max(), everything.min() * 3) * 1.02)
    _label_log_axis(axes.xaxis)
    _label_log_axis(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    if label is None:
        axes.legend(fontsize=8)
    else:
        figure.colorbar(label[0], ax=axes, label=label[1])
    return figure


def draw_reached(by_measure, costs, colour):
    """What each run had cost and reached at its end: a row of panels a measure, a column a cost, a line a group.

    by_measure: {what the loss is: runs}, each run with its last point only
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = len(by_measure), len(costs)
    figure, panels = plt.subplots(
        *shape, figsize=(5.5 * shape[1], 4 * shape[0]), layout="constrained", squeeze=False, sharex="col", sharey="row"
    )
    for row, (measure, runs) in zip(panels, by_measure.items()):
        for panel, cost in zip(row, costs):
            for group, shade in colour.items():
                ends = sorted((run.cost[cost][-1], run.loss[-1]) for run in mean_over_seeds(runs) if run.group == group)
                panel.plot(*zip(*ends), "o-", color=shade, ms=4, lw=1.2, label=group, gid="reached")
            panel.set(xscale="log", yscale="log")
            panel.grid(alpha=0.3, which="both")
        row[0].set_ylabel(measure)
        _label_log_axis(row[0].yaxis)
    for panel, cost in zip(panels[-1], costs):
        panel.set_xlabel(COSTS[cost])
        _label_log_axis(panel.xaxis)
    figure.suptitle("what each run reached at its end, and what it had cost")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _label_log_axis(axis):
    """Labels that do not run into each other: powers of ten, or, where the axis has none or one, some plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def draw_multipliers(by_cost, reference, colour):
    """One panel a cost: multiplier against the cost, with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(by_cost), figsize=(5.5 * len(by_cost), 4.5), layout="constrained", squeeze=False
    )
    for panel, (cost, figures) in zip(panels[0], by_cost.items()):
        panel.axhline(1, color="k", lw=0.8)
        for name, entry in figures.items():
            if name == reference or entry["multiplier"] is None:
                continue
            c, ratio = np.array(entry["multiplier_cost"]), np.array(entry["multiplier_at"])
            low, high = np.array(entry["multiplier_spread"]).T
            panel.fill_between(c, low, high, color=colour[name], alpha=0.15, lw=0)
            panel.plot(c, ratio, "o-", color=colour[name], ms=4, lw=1.2, label=name)
        panel.set(xscale="log", yscale="log", xlabel=COSTS[cost], title=f"by {COSTS[cost]}")
        _label_log_axis(panel.xaxis)
        _label_log_axis(panel.yaxis)
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel(f"what {reference} pays ÷ what it pays, at equal loss")
    figure.suptitle(f"above 1 it is cheaper than {reference}; bands are 90% intervals")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure
