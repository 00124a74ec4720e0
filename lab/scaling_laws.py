"""Loss of several runs, by their logs, against what they cost.

    python -m lab.scaling_laws plot out/gpt2_btt out/gpt2_dense            # folders of runs, or their log.jsonl
    python -m lab.scaling_laws plot out/*/log.jsonl --key=val_loss --png=validation.png
    python -m lab.scaling_laws plot out/a out/b --labels="rank 1,rank 4"
    python -m lab.scaling_laws fit out/sweep/* --out=out/sweep_fit         # runs of several structures, each at several sizes
    python -m lab.scaling_laws fit my_structures.py out/sweep/*            # of structures that a file of your own defines

plot    loss against steps, tokens, FLOPs and seconds of training in one picture, and a table
fit     frontiers and power laws of every structure, and the compute multipliers against dense: table, pictures, JSON

Runs of vision/ as well, whose logs count images, or samples, in place of tokens. The seconds of a fit are those at a
run's median speed: a log's own have the compilation in them, which may be half of a short run.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from configurator import ConfigError, as_script, choose_command, load_config, read_config_file
from engine import runlog
from engine.runlog import median_of, read_log, save_figure, short
from lab import frontiers
from lab.frontiers import Run
from options import STRUCTURE_FIELDS, BlockConfig, GPTConfig
from theta import canonical, find_structure, taxonomy


@dataclass
class PlotConfig:
    png: str = "runs.png"  # the picture
    key: Literal["both", "loss", "val_loss"] = "both"  # which loss: of training, of validation
    labels: str = ""  # the runs' names, comma-separated; else what tells their folders apart


def plot(argv):
    """The command: a picture and a table of the runs in `argv`."""
    words = [word for word in argv if not word.startswith("--")]
    config = load_config(PlotConfig, [word for word in argv if word.startswith("--")])
    paths = list(dict.fromkeys(log_path(word) for word in words))  # one named twice is one run
    if not paths:
        raise ConfigError("plot: which runs? give their folders or logs, such as out/*/log.jsonl")
    wanted = LOSSES if config.key == "both" else (config.key,)
    runs = dict(zip(run_labels(paths, config.labels), [read_run(path, wanted, LOSSES, "key") for path in paths]))
    figure = draw_runs(runs, config.key)
    save_figure(figure, config.png, remedy="give another --png")
    print(*table_of_runs(runs), f"drawn: {config.png}", sep="\n")


def log_path(word):
    """A run's log, of a path to it or of its folder: absolute, for a run may be the current folder."""
    return os.path.abspath(os.path.join(word, "log.jsonl") if os.path.isdir(word) else word)


def read_run(path, wanted, known, option):
    """The rows of a log that has figures of a `wanted` key: the numbers in them, since others may log more than that.

    known: what the option may name instead, {its value: key of a row}, or the keys alone
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{path} does not exist: give the folder of a run, or its log.jsonl")
    try:
        rows = [only_numbers(row) for row in read_log(path)]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    if not rows:
        raise ConfigError(f"{path} has no rows: leave it out, or wait for the run's first")
    has = set().union(*rows)
    if has.isdisjoint(wanted):
        others = [value for value in known if (known[value] if isinstance(known, dict) else value) in has]
        remedy = f"leave it out, or take --{option}={others[0]}" if others else "leave it out"
        raise ConfigError(f"{path} has no {' or '.join(wanted)}: {remedy}")
    return rows


def only_numbers(row):
    """The row without what cannot be drawn: null, text, lists and tables."""
    return {key: value for key, value in row.items() if type(value) in (int, float)}


def run_labels(paths, given=""):
    """A name for each run: those given, or the shortest part of the folders' names that tells them apart."""
    if given:
        labels = [label.strip() for label in given.split(",")]
        if len(labels) != len(paths) or len(set(labels)) != len(paths):
            raise ConfigError(f"labels={given!r}: give {len(paths)}, one a run, all different")
        return labels
    names = [path.removesuffix("/log.jsonl").split("/") for path in paths]
    depth = next(
        k for k in range(1, max(map(len, names)) + 1) if len({tuple(name[-k:]) for name in names}) == len(names)
    )
    names = ["/".join(name[-depth:]) for name in names]
    if len(names) == 1:
        return names
    ahead = common(names)
    names = [name[ahead:] for name in names]
    behind = common([name[::-1] for name in names])
    return [name[: len(name) - behind] for name in names]


def common(names):
    """Length of the beginning that all names share, in whole words: up to a "/" or "_" that none of them ends with."""
    shared = os.path.commonprefix(names)
    shared = shared[: min(len(name) for name in names) - 1]
    return max(shared.rfind("/"), shared.rfind("_")) + 1


# ---------------------------------------------------------------------------------------
# The picture

LOSSES = ("loss", "val_loss")

# key of a row: (title of the axis, its scale); units is what the run counts
COSTS = {
    "step": ("steps", "linear"),
    "units": ("", "log"),
    "flops": ("FLOPs", "log"),
    "seconds": ("seconds of training", "linear"),
}

# what a run counts: what its loss is
UNITS = {"tokens": "nats per token", "images": "nats per image", "samples": "squared error"}


def unit_of(rows):
    """What the run counts: a key of UNITS; tokens where its rows do not say."""
    return next((unit for row in rows for unit in UNITS if unit in row), "tokens")


def with_units(rows):
    """The rows, each with its tokens, images or samples as "units"."""
    unit = unit_of(rows)
    return [{**row, "units": row[unit]} if unit in row else row for row in rows]


def draw_runs(runs, key="both"):
    """A matplotlib figure of runs, {label: rows}: one panel for each cost, one colour for each run.

    A line's gid is what it shows: "loss" as logged, thin; "smooth", its running mean; "val_loss", with dots.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {label: with_units(rows) for label, rows in runs.items()}
    units = list(dict.fromkeys(map(unit_of, runs.values())))
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharey=True, layout="constrained")
    for panel, (cost, (title, scale)) in zip(panels.flat, COSTS.items()):
        for (label, rows), colour in zip(runs.items(), colours(len(runs))):
            draw_run(panel, rows, cost, key, label, colour)
        frame(panel, runs.values(), cost, scale, key)
        panel.set_xlabel(title or ", ".join(units))
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"loss ({', '.join(map(UNITS.get, units))})")
    handles = [plt.Line2D([], [], color=colour, lw=2, label=label) for label, colour in zip(runs, colours(len(runs)))]
    columns = max(1, min(len(runs), 6, 150 // (6 + max(map(len, runs)))))  # as many as their names leave room for
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(TITLES[key], fontsize=11)
    return figure


TITLES = {
    "both": "training loss (lines: running mean, thin: as logged) and validation loss (dots)",
    "loss": "training loss (running mean, thin: as logged)",
    "val_loss": "validation loss",
}


def draw_run(panel, rows, cost, key, label, colour):
    if key != "val_loss":
        x, y = points(rows, cost, "loss")
        panel.plot(x, y, gid="loss", label=label, color=colour, lw=0.5, alpha=0.35)
        panel.plot(x, running_mean(y), gid="smooth", label=label, color=colour, lw=1.2)
    if key != "loss":
        x, y = points(rows, cost, "val_loss")
        line = {"lw": 0} if key == "both" else {"lw": 1}
        panel.plot(x, y, gid="val_loss", label=label, color=colour, marker="o", ms=4.5, mec="white", mew=0.5, **line)


def frame(panel, runs, cost, scale, key):
    """Scales, and limits that leave out the first hundredth of every run, whose fall would press all the rest together."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    wanted = LOSSES if key == "both" else (key,)
    late = [row for rows in runs for row in rows if row["step"] >= rows[-1]["step"] / 100]
    late = [row for row in late if any(name in row for name in wanted)]
    losses = [row[name] for row in late for name in wanted if name in row]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if losses and min(losses) > 0:  # ends that differ by a hundredth stay apart
        margin = (max(losses) / min(losses)) ** 0.04 if max(losses) > min(losses) else 1.1
        panel.set_yscale("log")
        panel.set_ylim(min(losses) / margin, max(losses) * margin)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    costs = [row[cost] for row in late if row.get(cost, 0) > 0]
    if costs and scale == "log":
        panel.set_xscale("log", nonpositive="mask")  # step 0 has cost nothing
        panel.set_xlim(min(costs) / 1.1, max(costs) * 1.1)


def points(rows, cost, key):
    """-> costs, losses, of the rows that have both."""
    pairs = [(row[cost], row[key]) for row in rows if cost in row and key in row]
    return [x for x, _ in pairs], [y for _, y in pairs]


def running_mean(values):
    """Means over a symmetric window: a fiftieth of the values, less at the end and at the beginning, where they fall."""
    half, n = len(values) // 100, len(values)
    means = []
    for i in range(n):
        reach = min(half, i // 10, n - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def colours(number):
    import matplotlib

    if number <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(number)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (number - 1)) for i in range(number)]


# ---------------------------------------------------------------------------------------
# The table


def table_of_runs(runs):
    """Lines: what each run, {label: rows}, has cost and reached."""
    units = ", ".join(dict.fromkeys(map(unit_of, runs.values())))
    head = ("run", "steps", units, "FLOPs", "seconds", "final loss", "final val loss", "best val loss")
    table = [head] + [(label, *run_figures(rows)) for label, rows in runs.items()]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for first, *others in table:
        yield "  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))])


def run_figures(rows):
    last, unit = rows[-1], unit_of(rows)
    training, validation = ([row[key] for row in rows if key in row] for key in LOSSES)
    return (
        f"{last['step']:,}",
        f"{last[unit]:,}" if unit in last else "",
        f"{last['flops']:.3g}" if "flops" in last else "",
        f"{last['seconds']:,.1f}" if "seconds" in last else "",
        *(f"{values[-1]:.4f}" if values else "" for values in (training, validation)),
        f"{min(filter(math.isfinite, validation), default=math.nan):.4f}" if validation else "",
    )


# ---------------------------------------------------------------------------------------
# Scaling laws

# what can be fitted: (what it is, the key that rows need for it)
MEASURES = {
    "val_loss": ("validation loss", "val_loss"),
    "loss": ("training loss", "loss"),
    "error": ("error, 1 - top-1", "top1"),
}


@dataclass
class FitConfig:
    out: str = "out/fit"  # folder for table.md, multipliers.md, fit.json and the pictures
    reference: str = "dense"  # the group that the others are compared with
    by: tuple = (  # options of a run that make its group, where they are not the default
        *STRUCTURE_FIELDS, "align_heads", "overrides", "moe", "num_experts", "top_k",
    )  # fmt: skip
    loss: Literal["val_loss", "loss", "error"] = "val_loss"  # of validation, of training, or 1 - top-1 of images
    points: Literal["all", "final"] = "all"  # of a run: validations after the warm-up, or, for a decayed rate, the last
    costs: tuple = ("flops", "seconds", "parameters")  # what is paid
    samples: int = 256  # draws of other seeds behind every interval; powers of 2 are spread most evenly

    def __post_init__(self):
        for cost in self.costs:
            if cost not in frontiers.COSTS:
                raise ConfigError(f"costs: {cost!r} is unknown, choose from {', '.join(frontiers.COSTS)}")
        if not self.costs:
            raise ConfigError(f"costs is empty: give some of {', '.join(frontiers.COSTS)}")
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: make it at least 1")


class Log(NamedTuple):
    """What a run left behind."""

    path: str  # of its log.jsonl
    rows: list
    options: dict  # its config.json
    group: str
    parameters: int
    place: tuple | None = None  # (ω, ψ, ν), where it has one


def fit(argv):
    """The command: everything about the runs in `argv`, in one folder."""
    words = [word for word in argv if not word.startswith("--")]
    for file in [word for word in words if word.endswith(".py")]:  # which may define the runs' structures
        words.remove(file)
        read_config_file(file)
    words = [word for word in words if not os.path.exists(os.path.join(word, "fit.json"))]  # an earlier fit's
    config = load_config(FitConfig, [word for word in argv if word.startswith("--")])
    paths = sorted({log_path(word) for word in words})  # nothing depends on their order
    if not paths:
        raise ConfigError("fit: which runs? give their folders or logs, such as out/sweep/*")
    logs = furthest([read_run_and_options(path, config) for path in paths])
    units = {unit_of(log.rows): log.path for log in logs}
    if len(units) > 1:
        (one, a), (other, b) = list(units.items())[:2]
        raise ConfigError(f"{a} counts {one} and {b} {other}: their losses do not compare, fit them apart")
    unit = next(iter(units))
    logs.sort(key=lambda log: (log.group != config.reference, log.group, log.parameters, what_it_learns(log.options)))
    runs = [make_run(log, config.loss, config.points) for log in logs]
    for log, run in zip(logs, runs):
        for cost in config.costs:
            if not (run.cost[cost] > 0).all():
                others = ",".join(each for each in config.costs if each != cost)
                remedy = f", or take --costs={others}" if others else ""
                raise ConfigError(f"{log.path} has validations without {cost}: leave the run out{remedy}")
        if (run.loss <= 0).any():
            raise ConfigError(f"{run.name}: {MEASURES[config.loss][0]} of 0 has no logarithm: take another --loss")
    places = {log.group: log.place for log in logs}  # that of its largest size, where it depends on the width
    figures = {cost: frontiers.analyse(runs, config.reference, cost, config.samples) for cost in config.costs}
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={config.out} cannot be written ({error.strerror}): take another") from None
    lines = [*summary(logs, runs, config, axis(config.loss, unit)), "", *table_of_groups(logs, places), ""]
    for cost in config.costs:
        lines += [*frontiers.table(figures[cost], cost, config.reference), ""]
    with open(os.path.join(config.out, "table.md"), "w") as file:
        file.write("\n".join(lines))
    with open(os.path.join(config.out, "multipliers.md"), "w") as file:
        file.write("\n".join([*table_of_multipliers(logs, places, figures, config.reference), ""]))
    with open(os.path.join(config.out, "fit.json"), "w") as file:
        json.dump({"groups": places, "runs": [ends(log) for log in logs], **figures}, file, indent=1)
    drawn = draw_fit(logs, runs, places, figures, config, unit)
    print(*lines, f"written: {config.out}/table.md, multipliers.md, fit.json, {', '.join(drawn)}", sep="\n")


def what_it_learns(options, *without):
    """A run's options as one text, but for those that change nothing of what it learns, and those named."""
    left = {key: value for key, value in options.items() if key not in ("out_dir", "resume", *without)}
    return json.dumps(left, sort_keys=True)


def furthest(logs):
    """Of attempts at one run, seed and all, the one that got furthest; a new run sets an old one aside as NAME.1."""
    kept = {}
    for log in logs:
        run = what_it_learns(log.options)
        if run in kept:
            shorter, longer = sorted((log, kept[run]), key=lambda log: log.rows[-1]["step"])
            print(f"{shorter.path}: another attempt at {longer.path}, which got as far or further: left out")
            log = longer
        kept[run] = log
    return list(kept.values())


def read_run_and_options(path, config):
    known = {measure: key for measure, (_, key) in MEASURES.items()}
    rows, options = read_run(path, [known[config.loss]], known, "loss"), read_options(path)
    try:
        return Log(path, rows, options, group_name(options, config.by), num_parameters(options), place_of(options))
    except ImportError:
        raise
    except Exception as error:  # of many kinds: a run of other code may have any option, of any type
        said = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        said = said.partition("\n")[0]
        raise ConfigError(f"{path}: its config.json makes no model here ({said}): leave the run out") from None


def read_options(path):
    """A run's config.json, a dict."""
    beside = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.exists(beside):
        raise ConfigError(f"{beside} does not exist: fit needs it beside log.jsonl, to know the structure")
    return runlog.read_config_json(beside)


def group_name(options, by):
    """Such as "btt, rank=4": the structure, and the options in `by` that are not the default.

    A structure by its θ has the name of its family before it, a mixture its experts: "btt, linear MoE, 2 of 8".
    """
    defaults = json.loads(json.dumps({field.name: field.default for field in fields(BlockConfig)}))  # as in config.json
    for name in by:
        if name not in options and name not in defaults:
            raise ConfigError(f"by: {name!r} is no option of these runs")
    value = {name: options.get(name, defaults.get(name)) for name in {**defaults, **dict.fromkeys(by)}}
    parts = [str(value["structure"])] if "structure" in by else []
    shown = {"structure", "theta", "structure_options", "moe", "num_experts", "top_k"}  # in words of their own
    if "theta" in by and value["theta"]:
        parts = [f"{family(value['theta'])} ({' '.join(f'{each:g}' for each in value['theta'])})"]
    if "moe" in by and value["moe"] != "none":
        parts.append(f"{value['moe']} MoE, {value['top_k']} of {value['num_experts']}")
    if "structure_options" in by and value["structure_options"]:
        parts += [f"{name}={each}" for name, each in value["structure_options"].items()]
    for name in by:
        if name not in shown and value[name] != defaults.get(name):
            parts.append(name if value[name] is True else f"{name}={value[name]}")
    return ", ".join(parts) or "all"


def family(theta):
    """The name of the structures that θ is one of, by the indices that it has not (README, "The structures")."""
    _, b, c, d, _, f, rho = canonical(theta)
    if b == d == 0:
        if c == f == 0:
            return "low-rank"
        return "full-rank BTT" if taxonomy(theta)[1] > 0.999 else "low-rank BTT"
    if c == f == 0:
        return "TT" if rho else "Kronecker"
    return "generic"


def make_run(log, measure, points="all"):
    """A Run: what it had cost at each validation after the warm-up, whose rate is none to compare at, and the measure then."""
    unit, key, warmup = unit_of(log.rows), MEASURES[measure][1], log.options.get("warmup_steps") or 0
    rows = [row for row in log.rows if math.isfinite(row.get("val_loss", math.nan)) and row["step"] > warmup]
    rows = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    if points == "final":
        rows = rows[-1:]
    if not rows:
        raise ConfigError(
            f"{log.path} has no validation after its {warmup} steps of warm-up: leave it out, or wait for one"
        )
    speed = median_of(log.rows, f"{unit}_per_second")
    cost = {
        "flops": [row.get("flops", 0) for row in rows],
        "seconds": [row[unit] / speed if speed and unit in row else max(row.get("seconds", 0), 1e-3) for row in rows],
        "parameters": [log.parameters] * len(rows),
    }
    cost = {name: np.array(values, dtype=float) for name, values in cost.items()}
    loss = np.array([measured(log.rows, row, measure) for row in rows])
    steps = np.array([row["step"] for row in rows])
    return Run(
        os.path.dirname(log.path),
        log.group,
        cost,
        loss,
        what_it_learns(log.options, "seed"),
        steps,
        log.options.get("seed"),
    )


def measured(rows, at, measure):
    """The measure at row `at`; of the training loss, each of one batch, the mean over the last tenth of the steps."""
    if measure == "error":
        return 1 - at["top1"]
    if measure == "val_loss":
        return at["val_loss"]
    last = at["step"]
    return float(np.mean([row["loss"] for row in rows if "loss" in row and 0.9 * last <= row["step"] <= last]))


def num_parameters(options):
    """Of the run's model, by what its config.json holds."""
    import torch  # here, since it takes seconds to import and plot does without

    from model import GPT

    if "vocab_size" in options:
        Model, Config = GPT, GPTConfig
    elif "teacher_width" in options:
        from vision.mlp import MLP as Model
        from vision.regression import RegressionConfig as Config
    else:
        from vision.options import ImageConfig as Config
        from vision.train import MODELS

        Model = MODELS[options["model"]]
    names = {field.name for field in fields(Config)}
    with torch.device("meta"):
        model = Model(Config(**{key: value for key, value in options.items() if key in names}))
    return sum(parameter.numel() for parameter in model.parameters())


def place_of(options):
    """(ω, ψ, ν) of a run's structure, a fixed rank or number of blocks as the power of d_model that it is there.

    None of a mixture, of three cores and more, and of a structure that has no θ.
    """
    if options.get("moe", "none") != "none" or (options.get("num_cores") or 2) > 2:
        return None
    if options["structure"] == "einsum":
        return taxonomy(options["theta"])
    structure = find_structure(options["structure"])
    if structure.theta is None:
        return None
    if options.get("num_blocks"):  # of Monarch: each block passes d / b² values to every other
        b = math.log(options["num_blocks"]) / math.log(options["d_model"])
        return taxonomy((1 - b, 0, b, 0, 1 - b, b, 1 - 2 * b))
    rank = options.get("rank") or 1 if "rank" in structure.options else 1
    return taxonomy((*structure.theta[:6], min(1.0, math.log(rank) / math.log(options["d_model"]))))


def axis(measure, unit):
    """What the measure is, with its unit."""
    return MEASURES[measure][0] if measure == "error" else f"{MEASURES[measure][0]} ({UNITS[unit]})"


def summary(logs, runs, config, measure):
    """Lines on what was fitted."""
    groups = len({log.group for log in logs})
    what = "every validation after the warm-up" if config.points == "all" else "the last validation"
    yield f"{len(logs)} runs of {groups} groups, {measure} at {what} of each."
    yield (
        "Intervals say how far figures would lie off with other seeds (nominally 90%): by their seeds, where sizes have "
        "several, else by how far sizes scatter around their power law."
    )
    settings, spread = frontiers.spread_of_seeds(runs)
    if settings:
        yield f"{settings} settings have several seeds, whose last losses differ by {spread:.2%} (standard deviation)."


def table_of_groups(logs, places):
    """Lines of a Markdown table: where each group lies, and its sizes."""
    yield "| group | ω | ψ | ν | d_model | parameters |"
    yield "|---|---|---|---|---|---|"
    for group, place in places.items():
        mine = [log for log in logs if log.group == group]
        lies = [f"{value:.2f}" for value in place] if place is not None else ["", "", ""]
        widths = ", ".join(map(str, sorted({log.options.get("d_model", 0) for log in mine} - {0})))
        sizes = [short(size(log.parameters for log in mine)) for size in (min, max)]
        yield f"| {group} | {' | '.join(lies)} | {widths} | {' to '.join(dict.fromkeys(sizes))} |"


def table_of_multipliers(logs, places, figures, reference):
    """Lines of a Markdown table: each group's multiplier by every cost, and the losses that it is the mean over."""
    heads = [f"{frontiers.COSTS[cost]}: {reference} ÷ it | losses in common" for cost in figures]
    yield f"| group | ω | ψ | ν | rate | {' | '.join(heads)} | least loss |"
    yield "|---" * (6 + 2 * len(figures)) + "|"
    for group, place in places.items():
        if group == reference:
            continue
        lies = [f"{value:.2f}" for value in place] if place is not None else ["", "", ""]
        rates = sorted({log.options["lr"] for log in logs if log.group == group and log.options.get("lr")})
        cells = [" | ".join(frontiers.multiplier_cells(entries[group], False)) for entries in figures.values()]
        least = min(min(entries[group]["frontier_loss"]) for entries in figures.values())
        yield f"| {group} | {' | '.join(lies)} | {', '.join(map('{:g}'.format, rates))} | {' | '.join(cells)} | {least:.4f} |"


def have(logs, measure):
    """Whether all logs have figures of it."""
    return all(any(MEASURES[measure][1] in row for row in log.rows) for log in logs)


def ends(log):
    """What a run had cost and reached at its end, a dict."""
    figures = {"name": os.path.basename(os.path.dirname(log.path)), "group": log.group}
    for measure in MEASURES:
        if have([log], measure):
            run = make_run(log, measure, "final")
            figures[measure] = float(run.loss[-1])
    return {**figures, **{cost: float(values[-1]) for cost, values in run.cost.items()}}


def draw_fit(logs, runs, places, figures, config, unit):
    """Write the pictures -> their names."""
    colour = dict(zip(places, colours(len(places))))
    drawn = []

    def save(figure, name):
        save_figure(figure, os.path.join(config.out, name), remedy="give another --out")
        drawn.append(name)

    what = axis(config.loss, unit)
    for cost, entries in figures.items():
        title = "the least loss for what it costs" + law_of(entries)
        save(frontiers.draw_frontiers(runs, entries, cost, what, colour, title), f"frontiers_{cost}.png")
    save(frontiers.draw_multipliers(figures, config.reference, colour), "multipliers.png")
    measures = ["error" if have(logs, "error") else "val_loss"] + ["loss"] * have(logs, "loss")
    last = {axis(measure, unit): [make_run(log, measure, "final") for log in logs] for measure in measures}
    paid = [cost for cost in figures if cost != "parameters"] or list(figures)
    save(frontiers.draw_reached(last, paid, colour), "reached.png")
    if "flops" in figures:
        for name, place, title, chosen in (
            ("omega", 0, "ω, parameter sharing", lambda place: True),
            ("psi", 1, "ψ, rank, of those with ω = 0", lambda place: place[0] < 0.05),
            ("nu", 2, "ν, compute, of those with ω = 0 and ψ = 1", lambda place: place[0] < 0.05 and place[1] > 0.95),
        ):
            some = [group for group, lies in places.items() if lies is not None and chosen(lies)]
            values = [places[group][place] for group in some]
            if values and max(values) - min(values) > 0.01:  # else there is nothing to see
                shade, scale = shades({group: places[group][place] for group in some})
                entries = {group: figures["flops"][group] for group in some}
                mine = [run for run in runs if run.group in some]
                heading = f"the least loss for what it costs{law_of(entries)}, by {title.partition(',')[0]}"
                picture = frontiers.draw_frontiers(mine, entries, "flops", what, shade, heading, (scale, title))
                save(picture, f"frontiers_{name}.png")
    return drawn


def law_of(entries):
    """What a title says of power laws: all groups have one, some have, or none, for want of points."""
    laws = [entry["law"] is not None for entry in entries.values()]
    return (
        (", and its power law" if all(laws) else ", and its power law where it has three points") if any(laws) else ""
    )


def shades(values):
    """{group: colour} by a value each, and what a colour bar needs."""
    import matplotlib

    low, high = min(values.values()), max(values.values())
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high if high > low else low + 1), "turbo")
    return {group: scale.to_rgba(value) for group, value in values.items()}, scale


def main(argv):
    choose_command(argv, {"plot": plot, "fit": fit}, "lab.scaling_laws", "say what to do", __doc__)(argv[1:])


if __name__ == "__main__":
    as_script(main)
