"""Scaling laws of groups of runs: compute-optimal frontiers, power laws, and how much compute a structure saves.

    python -m lab.scaling_laws fit out/sweep/* --out=out/sweep_fit          # runs of several structures and sizes

A group is all runs of one structure, at all sizes; runs that differ only in their seed count as one, their mean. Its
frontier is the lower convex hull of (cost, loss) in log-log, the least loss for the compute ("Compute Better Spent",
ICML 2024, section 5). It follows a power law

    L = L∞ + (C / C0)^-a

in which C is FLOPs, seconds or parameters. The compute multiplier of a group at a loss is the cost of that loss for the
reference group (dense) ÷ its cost for the group.

90% intervals estimate how much figures would change with other seeds: see "What other seeds would have given" below, and
`python -m lab.coverage` for how often they hold the truth. Nothing here depends on the order of the runs.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from configurator import ConfigError

# what C can be: {key in Run.cost: title}
COSTS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "parameters": "parameters",
}


class Run(NamedTuple):
    """The points of a run: its cost and its loss at several steps, arrays of one length."""

    name: str
    group: str
    cost: dict  # {"flops": array, "seconds": array, "parameters": array}
    loss: np.ndarray  # such as validation loss, in nats per token
    setting: str = ""  # equal for runs that differ only in their seed; "": no other run is like it
    step: np.ndarray | None = None  # of the points; None: 0, 1, 2, …
    seed: int | None = None  # runs with the same seed are paired across settings and groups; None: not paired


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


def in_order(runs):
    """The runs in a canonical order, so that results do not depend on the caller's, to the last bit."""
    return sorted(runs, key=lambda run: (run.group, run.setting or run.name, str(run.seed), run.name))


def by_setting(runs):
    """[[runs that differ only in their seed], …]"""
    alike = {}
    for run in in_order(runs):
        alike.setdefault(run.setting or run.name, []).append(run)
    return list(alike.values())


def mean_over_seeds(runs):
    """One Run for each setting: the mean of its runs, step by step."""
    return [_mean(alike) if len(alike) > 1 else alike[0] for alike in by_setting(runs)]


def _mean(runs):
    aligned = _aligned(runs)
    cost = {name: np.mean([run.cost[name] for run in aligned], axis=0) for name in runs[0].cost}
    return aligned[0]._replace(cost=cost, loss=np.mean([run.loss for run in aligned], axis=0))


def _aligned(runs):
    """The runs at the steps that all have, since some may have been cut short; if there are none, the longest runs at their last."""
    steps = [np.arange(len(run.loss)) if run.step is None else run.step for run in runs]
    common = functools.reduce(np.intersect1d, steps)
    if not len(common):
        common = np.array([max(step[-1] for step in steps)])
    aligned = []
    for run, step in zip(runs, steps):
        at = np.isin(step, common)
        if at.sum() == len(common):
            cost = {name: values[at] for name, values in run.cost.items()}
            aligned.append(run._replace(cost=cost, loss=run.loss[at], step=common))
    return aligned


def spread_of_seeds(runs):
    """-> number of settings with several seeds; median over them of the last loss's standard deviation ÷ its mean."""
    last = [[run.loss[-1] for run in alike] for alike in by_setting(runs) if len(alike) > 1]
    return len(last), float(np.median([np.std(x, ddof=1) / np.mean(x) for x in last])) if last else math.nan


# ---------------------------------------------------------------------------------------
# Frontiers


def frontier(cost, loss):
    """Indices of the lower convex hull of (log cost, log loss), from the cheapest point to the one of least loss.

    A point is on it if no mixture of two others, on a straight line in log-log, is cheaper at its loss.
    """
    x, y = np.log(cost), np.log(loss)
    order = np.lexsort((y, x)).tolist()
    x, y, hull = x.tolist(), y.tolist(), []
    for i in order:
        if hull and x[i] == x[hull[-1]]:
            continue  # costs the same as the one before, and is no better
        while len(hull) >= 2 and _turns_up(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    best = min(range(len(hull)), key=lambda j: y[hull[j]])
    return hull[: best + 1]


def optimal(runs, cost):
    """-> costs and losses on the frontier of the runs, as far as several sizes compete for it.

    At its cheap end the hull follows the smallest model before it is trained enough, at its expensive end the largest
    one, trained ever longer: they are best only because no other size was run. Of both, only the point where the next size
    takes over counts.
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
    """-> the runs without outliers, which lie far below the frontier of all others; names of the outliers.

    A run above the frontier is no outlier: most are. One far *below* it measures something else, or belongs to another
    study. Far is more than 6 times the spread of the frontier around its power law, and more than 10%: among few sizes
    one may well be a few percent better than the others predict.
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
    """Least-squares Fit of log loss to at least 3 points.

    Given L∞, log(L - L∞) is linear in log C, so it searches over L∞ only, from 0 to just below the least loss.
    """
    x, log_loss = np.log(cost), np.log(loss)
    centred = x - x.mean()
    low, high = 0.0, float(loss.min()) * (1 - 1e-6)
    for _ in range(5):  # ever finer grids around the best
        floors = np.linspace(low, high, 33)  # (33,)
        y = np.log(loss - floors[:, None])  # (33, points)
        slopes = (y * centred).sum(1) / (centred**2).sum()
        fitted = y.mean(1)[:, None] + slopes[:, None] * centred
        errors = ((np.log(floors[:, None] + np.exp(fitted)) - log_loss) ** 2).sum(1)
        best = int(np.argmin(errors))
        low, high = floors[max(0, best - 1)], floors[min(32, best + 1)]
    slope, intercept = slopes[best], y[best].mean() - slopes[best] * x.mean()
    if slope >= 0 or -intercept / slope > 700:  # it does not fall, or so slowly that its scale overflows
        return Fit(float(np.exp(log_loss.mean())), math.inf, 0.0)
    return Fit(float(floors[best]), math.exp(-intercept / slope), -float(slope))


# ---------------------------------------------------------------------------------------
# Multipliers


def cost_of_loss(cost, loss, wanted, beyond=False):
    """The cost of each wanted loss on a frontier (cost, loss), by straight lines in log-log.

    Beyond its ends it is NaN, or with `beyond` that of the lines at its ends, continued.
    """
    order = np.argsort(loss)
    x, y, wanted = np.log(loss[order]), np.log(cost[order]), np.log(wanted)
    log = np.interp(wanted, x, y, left=np.nan, right=np.nan)
    if beyond and len(x) > 1:
        for out, i, j in ((wanted < x[0], 0, 1), (wanted > x[-1], -1, -2)):
            log[out] = np.clip(y[i] + (wanted[out] - x[i]) * (y[i] - y[j]) / (x[i] - x[j]), -300, 300)
    return np.exp(log)


def multipliers(frontier, reference, at=None):
    """-> losses, and for each its cost on the reference's frontier ÷ its cost on the group's; both as of `optimal`.

    at: the losses, for which frontiers are continued; None: the losses of all points of both frontiers, with NaN where one
    frontier does not reach.
    """
    beyond = at is not None
    wanted = np.asarray(at) if beyond else np.union1d(frontier[1], reference[1])
    return wanted, cost_of_loss(*reference, wanted, beyond) / cost_of_loss(*frontier, wanted, beyond)


# ---------------------------------------------------------------------------------------
# What other seeds would have given


class Shifts(NamedTuple):
    """How much other seeds would change log losses: a parametric bootstrap with normal errors."""

    groups: (
        list  # for each group a list of arrays (samples, points or 1), one for each setting in the order of by_setting
    )
    freedom: int  # degrees of freedom of the estimated error: intervals are widened as Student's t

    def redraw(self, group, means, sample):
        """The means over seeds of a group, given by its number, as another draw of seeds might have given them."""
        return [
            run._replace(loss=run.loss * np.exp(shift[sample])) for run, shift in zip(means, self.groups[group])
        ]  # fmt: skip


def draw_shifts(groups, cost, samples):
    """The Shifts of groups, each a list of runs; None where nothing shows how much seeds matter.

    If all settings have the same seeds, each seed is one measurement of everything, and a draw shifts all runs of a seed
    together, so that an effect of the seed on all runs cancels in a multiplier. Otherwise settings have independent errors
    of the same relative size: the spread over seeds or, with one seed each, the spread of sizes around the group's law.
    """
    settings = [by_setting(runs) for runs in groups]
    seeds = {tuple(run.seed for run in alike) for mine in settings for alike in mine}
    several = [[_deviations(alike) for alike in mine] for mine in settings]
    n = len(next(iter(seeds)))
    paired = len(seeds) == 1 and n > 1 and not any(None in each for each in seeds)
    if paired and all(len(each) == n for mine in several for each in mine):  # no run was dropped by _aligned
        z = _normal(samples, n) / math.sqrt(n * (n - 1))
        return Shifts([[z @ each for each in mine] for mine in several], n - 1)
    spread = [(float((each[:, -1] ** 2).sum()), len(each) - 1) for mine in several for each in mine]
    if not sum(freedom for _, freedom in spread):
        spread = [_around_the_law(mean_over_seeds(runs), cost) for runs in groups]
    squares, freedom = (sum(each) for each in zip(*spread))
    if not freedom:
        return None
    sigma = math.sqrt(squares / freedom)
    z = iter(_normal(samples, sum(map(len, several))).T[:, :, None])
    return Shifts([[next(z) * sigma / math.sqrt(len(each)) for each in mine] for mine in several], freedom)


def _normal(samples, dimensions):
    """Independent standard normal numbers (samples, dimensions), quasi-random: quantiles need fewer of them."""
    draw = stats.qmc.MultivariateNormalQMC(np.zeros(dimensions), rng=np.random.default_rng(0))
    return draw.random(2 ** math.ceil(math.log2(samples)))[:samples]  # evenly spread only in powers of 2


def _deviations(alike):
    """Log losses of a setting's runs minus that of their mean: (seeds, points)."""
    aligned = _aligned(alike)
    return np.log([run.loss for run in aligned]) - np.log(np.mean([run.loss for run in aligned], axis=0))


def _around_the_law(means, cost):
    """-> sum of squares and degrees of freedom of log losses around the law, one for each size, at its point nearest the law."""
    c, loss = optimal(means, cost)
    if len(c) < 3 or len(means) < 4:  # a law has three parameters
        return 0.0, 0
    law, nearest = fit_power_law(c, loss), []
    for run in means:
        above = np.log(run.loss / law.loss(run.cost[cost]))
        inside = (run.cost[cost] >= c.min()) & (run.cost[cost] <= c.max())
        i = int(np.argmin(np.where(inside, above, np.inf) if inside.any() else above))
        nearest.append((run.cost[cost][i], run.loss[i]))
    c, loss = np.array(nearest).T
    return float((np.log(loss / fit_power_law(c, loss).loss(c)) ** 2).sum()), len(c) - 3


def variance_between_sizes(frontier, redrawn, sizes):
    """Variance of a frontier's log losses around its power law, less what seeds contribute.

    Where curves of few sizes make a frontier, it bulges up between the points at which each size is best: an error that
    more seeds do not reduce. A redrawn frontier has the seeds' noise twice, the frontier itself once, so the difference is
    the seeds' part. 0 where each size has one point: there is nothing between.
    """
    if len(frontier[0]) <= max(3, sizes):
        return 0.0
    own = _variance_around_law(*frontier)
    again = [_variance_around_law(*each) for each in redrawn[:32] if len(each[0]) > 3]
    return max(0.0, 2 * own - float(np.mean(again))) if again else 0.0


def _variance_around_law(cost, loss):
    return float((np.log(loss / fit_power_law(cost, loss).loss(cost)) ** 2).sum() / (len(cost) - 3))


def steepness(frontier, at):
    """How much more log cost a frontier pays for a lower log loss, on the straight line around each of the losses `at`."""
    order = np.argsort(frontier[1])
    x, y = np.log(frontier[1][order]), np.log(frontier[0][order])
    i = np.clip(np.searchsorted(x, np.log(at)), 1, len(x) - 1)
    return np.abs((y[i] - y[i - 1]) / (x[i] - x[i - 1]))


def interval(value, drawn, freedom, share=0.9):
    """(low, high) around the value: the middle share of the draws, widened as Student's t; None if there are too few draws.

    drawn: the figure for each sample of Shifts, NaN where it has none
    """
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return None
    ends = (1 - share) / 2, (1 + share) / 2
    wider = stats.t.ppf(ends[1], freedom) / stats.norm.ppf(ends[1])
    return tuple(float(end) for end in value + wider * (np.quantile(drawn, ends) - value))


def analyse(runs, reference, cost, samples=200):
    """{group: figures} by one cost, the reference first: frontier, law and multiplier, with 90% intervals from `samples` draws."""
    groups = {}
    for run in in_order(runs):
        groups.setdefault(run.group, []).append(run)
    if reference not in groups:
        raise ConfigError(f"reference={reference!r} is no group of these runs: take one of {', '.join(groups)}")
    groups = {reference: groups.pop(reference), **groups}
    kept = {name: without_outliers(mine, cost) for name, mine in groups.items()}
    figures = {}
    for name, (mine, dropped) in kept.items():
        means, others = mean_over_seeds(mine), [] if name == reference else [kept[reference][0]]
        shifts = draw_shifts([mine, *others], cost, samples) if len(means) > 1 else None
        own = _frontiers(means, cost, shifts, 0, samples)
        c, loss = own.points
        figures[name] = {
            "runs": len(mine), "sizes": len(means), "rising": sizes_that_rise(means, cost), "outliers": dropped,
            "frontier_cost": c.tolist(), "frontier_loss": loss.tolist(),
            **_law_figures(own),
            **_multiplier_figures(own, *(_frontiers(mean_over_seeds(runs), cost, shifts, 1, samples) for runs in others)),
        }  # fmt: skip
    return figures


class Frontiers(NamedTuple):
    """A group's frontier, and what it would be with other seeds."""

    points: tuple  # costs and losses, as of `optimal`
    redrawn: list  # the same of each sample; empty where nothing shows how much seeds matter
    freedom: int  # degrees of freedom behind them
    sizes: int
    exists: bool  # has_frontier


def _frontiers(means, cost, shifts, number, samples):
    redrawn = [optimal(shifts.redraw(number, means, i), cost) for i in range(samples)] if shifts else []
    freedom = shifts.freedom if shifts else 0
    return Frontiers(optimal(means, cost), redrawn, freedom, len(means), has_frontier(means, cost))


def sizes_that_rise(means, cost):
    """Number of sizes that end above a cheaper one: the difference is noise, or they are too large for their training."""
    ends = [run.loss.min() for run in sorted(means, key=lambda run: (run.cost[cost][-1], run.loss.min()))]
    return int(sum(loss > least for loss, least in zip(ends[1:], np.minimum.accumulate(ends))))


def has_frontier(means, cost):
    """Whether several sizes make a frontier: one size alone does not, nor do sizes of which the cheapest is the best."""
    return len(means) > 1 and sizes_that_rise(means, cost) < len(means) - 1


def _law_figures(group):
    c, loss = group.points
    law = fit_power_law(c, loss) if group.exists and len(c) >= 3 else None
    if law is None or law.exponent == 0:
        return {"law": None, "intervals": None}
    drawn = [fit_power_law(*each) for each in group.redrawn if len(each[0]) >= 3]
    drawn = np.array([each for each in drawn if each.exponent > 0])
    if len(drawn) < len(group.redrawn) / 2 or not len(drawn):  # most samples have too few points for a law
        return {"law": law._asdict(), "intervals": None}
    floor = interval(law.loss_at_infinity, drawn[:, 0], group.freedom)
    intervals = {"loss_at_infinity": tuple(np.clip(floor, 0, loss.min()).tolist())}
    for i, field in ((1, "scale"), (2, "exponent")):
        intervals[field] = _exp(interval(math.log(law[i]), np.log(drawn[:, i]), group.freedom))
    return {"law": law._asdict(), "intervals": intervals}


def _multiplier_figures(group, reference=None):
    """Without a reference the group is the reference itself."""
    at, ratio = multipliers(group.points, (reference or group).points)
    both = np.isfinite(ratio)
    if not both.any() or not (group.exists and (reference or group).exists):
        return {"multiplier": None}
    at, log = at[both], np.log(ratio[both])
    bands, around = [None] * len(at), None
    if group.redrawn and reference:
        drawn = np.log(
            [multipliers(*pair, at)[1] for pair in zip(group.redrawn, reference.redrawn)]
        )  # (samples, losses)
        drawn = drawn[np.isfinite(drawn).all(1)]
        if len(drawn) >= len(group.redrawn) / 2:  # else most samples have a frontier of one point
            around = _exp(interval(log.mean(), drawn.mean(1), group.freedom))
            between = np.hypot(*(_error_between_sizes(each, at) for each in (group, reference)))
            bands = [
                _exp(_widened(value, interval(value, column, group.freedom), NORMAL * error))
                for value, column, error in zip(log, drawn.T, between)
            ]
    return {
        "multiplier": math.exp(log.mean()), "multiplier_interval": around, "multiplier_window": [at.min(), at.max()],
        "multiplier_loss": at.tolist(), "multiplier_cost": cost_of_loss(*group.points, at).tolist(),
        "multiplier_at": np.exp(log).tolist(), "multiplier_spread": bands,
    }  # fmt: skip


def _error_between_sizes(group, at):
    """Standard deviation of the frontier's log costs at the losses `at`, of variance_between_sizes: an array like at."""
    variance = variance_between_sizes(group.points, group.redrawn, group.sizes)
    return math.sqrt(variance) * steepness(group.points, at) if variance else np.zeros(len(at))


NORMAL = float(stats.norm.ppf(0.95))  # half the width of a 90% interval, in standard deviations


def _widened(value, ends, more):
    """The interval around the value with an independent error of half width `more` added to it."""
    return ends and (value - math.hypot(value - ends[0], more), value + math.hypot(ends[1] - value, more))


def _exp(ends):
    """The interval whose logarithms these are, clipped to 10^±99; None stays None."""
    return ends and tuple(math.exp(min(max(end, -228), 228)) for end in ends)


# ---------------------------------------------------------------------------------------
# What is written


def table_of_frontiers(figures, cost, reference):
    """Lines of a Markdown table by one cost, and a note on sizes that are on no frontier."""
    yield f"| by {COSTS[cost]} | runs | points | a | L∞ | least loss | multiplier against {reference} | losses in common |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, entry in figures.items():
        law, ranges = entry["law"], entry["intervals"]
        a, floor = without_frontier(entry) or "too few points", ""
        if law:
            a, floor = (
                with_interval(law[field], ranges and ranges[field], "{:.3f}")
                for field in ("exponent", "loss_at_infinity")
            )
        note = f" ({len(entry['outliers'])} left out)" if entry["outliers"] else ""
        points = len(entry["frontier_cost"])
        least = f"{min(entry['frontier_loss']):.4f}"
        ratio, window = multiplier_cells(entry, name == reference)
        yield f"| {name} | {entry['runs']}{note} | {points} | {a} | {floor} | {least} | {ratio} | {window} |"
    rising = [f"{name} ({entry['rising']} of {entry['sizes']})" for name, entry in figures.items() if entry["rising"]]
    if rising:
        yield ""
        yield f"Sizes that end above one that costs less are not on a frontier: {', '.join(rising)}."


def without_frontier(entry):
    """Why a group has no frontier; "" if it has one."""
    if entry["sizes"] == 1:
        return "one size"
    return "losses rise" if entry["rising"] == entry["sizes"] - 1 else ""


def multiplier_cells(entry, is_reference):
    """-> multiplier with its interval, and the range of losses that both frontiers reach."""
    if is_reference:
        return "1", ""
    if entry["multiplier"] is None:
        return without_frontier(entry) or "no loss in common", ""
    low, high = entry["multiplier_window"]
    return with_interval(entry["multiplier"], entry["multiplier_interval"], "{:.2f}"), f"{low:.3f} to {high:.3f}"


def with_interval(value, ends, form):
    if not ends:
        return f"{form.format(value)} (too few runs for an interval)"
    return f"{form.format(value)} [{', '.join(short_end(end, form) for end in ends)}]"


def short_end(end, form):
    """An end of an interval in this format; with one digit and an exponent where that would show none, or too many."""
    return form.format(end) if end == 0 or 0.005 <= end < 1000 else f"{end:.0e}"


def draw_frontiers(runs, figures, cost, measure, colour, title, label=None):
    """Draw all points, the frontiers and their laws.

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
    """Draw the final loss of each run against its cost: a row of panels for each measure, a column for each cost.

    by_measure: {what the loss is: runs}, the runs with their last point only
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
    figure.suptitle("final loss of each run against its cost")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _label_log_axis(axis):
    """Label an axis without overlap: powers of ten or, where it has at most one, a few plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def draw_multipliers(by_cost, reference, colour):
    """Draw multipliers against the group's cost, with bands of 90% intervals: a panel for each cost."""
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
            if entry["multiplier_interval"]:
                low, high = np.array(entry["multiplier_spread"]).T
                panel.fill_between(c, low, high, color=colour[name], alpha=0.15, lw=0)
            panel.plot(c, ratio, "o-", color=colour[name], ms=4, lw=1.2, label=name)
        panel.set(xscale="log", yscale="log", xlabel=COSTS[cost], title=f"by {COSTS[cost]}")
        low, high = panel.dataLim.intervaly
        every = [ratio for entry in figures.values() if entry["multiplier"] for ratio in entry["multiplier_at"]]
        if every:  # cut off bands wider than tenfold
            panel.set_ylim(max(low, min(every) / 10) / 1.1, min(high, max(every) * 10) * 1.1)
        _label_log_axis(panel.xaxis)
        _label_log_axis(panel.yaxis)
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel(f"what {reference} pays ÷ what it pays, at equal loss")
    figure.suptitle(f"above 1 it is cheaper than {reference}; bands are 90% intervals")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure
