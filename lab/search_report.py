"""The results of a search: a table of the best structures, and a picture of all that were tried."""

import math
import os

import numpy as np
import torch

from engine.device import write_rows
from engine.runlog import save_figure, short, whole_file, writing


def write_report(rows, budget, out):
    """Print the best structures; write table.md, search.json and search.png to the folder `out`.

    rows    a dict for each trial, from search.make_rows
    budget  of each trial, {"flops": in training, "evaluations": their number}
    ConfigError or RunFailed if the folder cannot be written.
    """
    if not any(row["losses"] for row in rows):
        print("no trial has a loss yet: there is nothing to report")
        return
    lines = list(table_of_trials(rows, budget))
    with writing(out, "give another --out"):
        with whole_file(os.path.join(out, "table.md")) as part, open(part, "w") as file:
            file.write("\n".join(lines) + "\n")
        with whole_file(os.path.join(out, "search.json")) as part:
            write_rows(part, rows, torch.device("cpu"))  # each row names its own device
    save_figure(draw_search(rows, budget), os.path.join(out, "search.png"), "give another --out")
    print("", *lines, "", f"written: {out}/table.md, search.json, search.png", sep="\n")


def dotted(seven):
    """Seven numbers as in "0.5 0 0.5 · 0 0.5 0.5 · 0"; "" for None."""
    if seven is None:
        return ""
    shown = [f"{each:g}" for each in seven]
    return " · ".join((" ".join(shown[:3]), " ".join(shown[3:6]), shown[6]))


def rows_by_loss(rows):
    """The rows of trials that trained to their end, the best first."""
    return sorted((row for row in rows if row["state"] == "complete"), key=lambda row: row["loss"])


def comparable(rows, budget):
    """-> the last evaluation that all trials have reached, at which losses compare, and the rows that have it."""
    at = 1 if any(row["state"] == "pruned" for row in rows) else budget["evaluations"]
    return at, [row for row in rows if at in row["losses"]]


AXES = {"omega": "ω  parameter sharing", "psi": "ψ  rank", "nu": "ν  compute"}
COLUMNS = {
    "val loss": lambda row: f"{row['loss']:.4f}", "trial": lambda row: row["trial"],
    "θ = α β γ · δ ε φ · ρ": lambda row: dotted(row["theta"]), "sizes of d → d": lambda row: dotted(row["sizes"]),
    "structure": lambda row: row["structure"], "experts": lambda row: row["experts"] if row["experts"] > 1 else "",
    "ω": lambda row: two_digits(row["omega"]), "ψ": lambda row: two_digits(row["psi"]), "ν": lambda row: two_digits(row["nu"]),
    "d": lambda row: row["d_model"], "parameters": lambda row: short(row["parameters"]),
    "steps": lambda row: row["steps"],
}  # fmt: skip


def two_digits(value):
    return "" if value is None else f"{value:.2f}"


def rows_in_taxonomy(rows):
    """The rows with a place in the taxonomy, which structures of three cores or more and a user's own lack."""
    return [row for row in rows if row["nu"] is not None]


def table_of_trials(rows, budget, most=15):
    """Lines of Markdown: a summary, the `most` best trials, and how the loss correlates with ω, ψ and ν."""
    best, (at, scored) = rows_by_loss(rows), comparable(rows, budget)
    early, failed = (sum(row["state"] == state for row in rows) for state in ("pruned", "fail"))
    yield (
        f"{len(rows)} trials: {len(best)} trained to their end, {budget['flops']:.3g} FLOPs each; "
        f"{early} ended early; {failed} failed."
    )
    yield from ("", f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (1 + len(COLUMNS)))
    for i, row in enumerate(best[:most], 1):
        yield f"| {' | '.join(str(cell) for cell in (i, *(column(row) for column in COLUMNS.values())))} |"
    scored = rows_in_taxonomy(scored)
    losses = [row["losses"][at] for row in scored]
    correlations = {name[0]: rank_correlation([row[key] for row in scored], losses) for key, name in AXES.items()}
    shown = (f"{name} {'constant' if math.isnan(value) else f'{value:+.2f}'}" for name, value in correlations.items())
    at_of = f"evaluation {at} of {budget['evaluations']}"
    yield from ("", f"Rank correlation with the loss at {at_of}, {len(scored)} trials: {', '.join(shown)}.")
    if best:
        yield from ("", f"The best again: `{best[0]['command']}`")


def rank_correlation(x, y):
    """Spearman's correlation, in which equal values share their mean rank; NaN if x or y is constant."""
    ranks = []
    for values in (x, y):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
    return math.nan if len(x) == 0 or any(np.ptp(each) == 0 for each in ranks) else float(np.corrcoef(*ranks)[0, 1])


def cluster_rows(rows, axes):
    """Lists of rows within 0.02 of the list's first on these axes, mixtures apart; the longest list first, to be drawn below."""

    def near(a, b):
        return (a["experts"] > 1) == (b["experts"] > 1) and all(abs(a[key] - b[key]) <= 0.02 for key in axes)

    places = []
    for row in rows:
        here = next((place for place in places if near(place[0], row)), None)
        if here is None:
            places.append(here := [])
        here.append(row)
    return sorted(places, key=len, reverse=True)


def draw_search(rows, budget):
    """A figure of all trials in (ω, ψ, ν), coloured by loss, and of the best loss so far."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best, (at, scored) = rows_by_loss(rows), comparable(rows, budget)
    losses = np.array([row["losses"][at] for row in scored])
    colour = {"cmap": "viridis", "vmin": losses.min(), "vmax": np.quantile(losses, 0.9)}
    scored = rows_in_taxonomy(scored)
    figure, panels = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    for panel, axes in zip(panels.flat, (("omega", "psi"), ("omega", "nu"), ("psi", "nu"))):
        best_here = {row["trial"]: str(number) for number, row in enumerate(best[:3], 1)}
        for here in cluster_rows(scored, axes):
            whole, mixture = any(row["state"] == "complete" for row in here), here[0]["experts"] > 1
            place = [sum(row[key] for row in here) / len(here) for key in axes]
            points = panel.scatter(
                *place, c=[min(row["losses"][at] for row in here)], s=40 * math.sqrt(len(here)), marker="s" if mixture else "o",
                ec="k" if whole else "w", lw=1.4 if whole else 0.4, **colour, gid=f"{len(here)} trials",
            )  # fmt: skip
            numbers = sorted(best_here[row["trial"]] for row in here if row["trial"] in best_here)
            how = {"xytext": (9, 9), "textcoords": "offset points", "weight": "bold", "fontsize": 9}
            panel.annotate(" ".join(numbers), place, **how)  # beside the point, since its colour may be any
        panel.set(xlabel=AXES[axes[0]], ylabel=AXES[axes[1]])
        panel.margins(0.08)
    label = f"validation loss at evaluation {at} of {budget['evaluations']} (nats a token)"
    if scored:
        figure.colorbar(points, ax=panels, label=label, extend="max", aspect=40)
    panel, whole = panels[1, 1], sorted(best, key=lambda row: row["trial"])
    if whole:
        trials, ends = [row["trial"] for row in whole], [row["loss"] for row in whole]
        panel.plot(trials, ends, "o", color="0.3", label="trained to their end")
        trials, ends = [*trials, max(row["trial"] for row in rows)], np.minimum.accumulate([*ends, ends[-1]])
        panel.step(trials, ends, where="post", color="tab:red", label="best so far")
    early = [row["trial"] for row in rows if row["state"] == "pruned"]
    top = panel.get_xaxis_transform()
    panel.plot(early, [0.98] * len(early), "|", color="0.6", transform=top, label="ended early")
    panel.set(xlabel="trial", ylabel="validation loss at the end (nats a token)")
    panel.legend(loc="upper right", bbox_to_anchor=(1, 0.95))
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"{len(rows)} structures, {budget['flops']:.3g} training FLOPs each to the end; ω ψ ν of d → d layers\n"
        "a point stands for all trials within 0.02: it is larger for more trials, and has the colour of their lowest loss\n"
        "ringed: one was trained to the end; squares: mixtures; 1 2 3: the best, as in the table",
        fontsize=11,
    )
    return figure
