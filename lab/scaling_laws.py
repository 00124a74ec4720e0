"""Plot the losses of runs against their cost, fit scaling laws, and tabulate learning rates, from logs.

    python -m lab.scaling_laws plot out/gpt2_btt out/gpt2_dense            # folders of runs, or their log.jsonl
    python -m lab.scaling_laws plot out/*/log.jsonl --key=val_loss --png=validation.png
    python -m lab.scaling_laws plot out/a out/b --labels="rank 1,rank 4"
    python -m lab.scaling_laws fit out/sweep/* --out=out/sweep_fit         # several structures, each at several sizes
    python -m lab.scaling_laws fit my_structures.py out/sweep/*            # with structures of your own
    python -m lab.scaling_laws rates out/tune/* --out=out/rates            # several structures, each at several rates

plot    loss against steps, tokens, FLOPs and seconds of training in one picture, and a table
fit     frontiers and power laws of every structure, and its compute multipliers over dense: table, pictures, JSON
rates   final losses of every structure and width at every learning rate, and the best rate: table, JSON

Logs of vision/ work too: they count images or samples instead of tokens. A fit computes seconds from a run's median
speed, since the seconds in a log include compilation, which may be half of a short run.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from configurator import ConfigError, as_script, choose_command, load_config, read_config_file
from engine import runlog
from engine.runlog import median_of, read_log, save_figure, short, writing
from lab import frontiers, rates
from lab.frontiers import Run
from options import STRUCTURE_FIELDS, BlockConfig, GPTConfig
from theta import canonical, find_structure, taxonomy


@dataclass
class PlotConfig:
    png: str = "runs.png"  # the picture
    key: Literal["both", "loss", "val_loss"] = "both"  # loss of training, of validation, or both
    labels: str = ""  # names of the runs, comma-separated; by default what tells their folders apart


def plot_logs(argv):
    """The command `plot`: a picture and a table of the runs in `argv`."""
    words = [word for word in argv if not word.startswith("--")]
    config = load_config(PlotConfig, [word for word in argv if word.startswith("--")])
    paths = list(dict.fromkeys(log_path(word) for word in words))  # a run given twice counts once
    if not paths:
        raise ConfigError("plot: which runs? give their folders or logs, such as out/*/log.jsonl")
    wanted = LOSSES if config.key == "both" else (config.key,)
    runs = dict(zip(run_labels(paths, config.labels), [read_run(path, wanted, LOSSES, "key") for path in paths]))
    figure = draw_runs(runs, config.key)
    save_figure(figure, config.png, remedy="give another --png")
    print(*table_of_runs(runs), f"drawn: {config.png}", sep="\n")


def log_path(word):
    """The absolute path of a run's log, from the path of the log or of its folder."""
    return os.path.abspath(os.path.join(word, "log.jsonl") if os.path.isdir(word) else word)


def read_run(path, wanted, known, option):
    """The rows of a log, reduced to numbers; ConfigError where no row has one of the `wanted` keys.

    known: what the option may name instead, {value of the option: key of a row}, or the keys alone
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
    """The row without values that cannot be drawn: null, text, lists and tables."""
    return {key: value for key, value in row.items() if type(value) in (int, float)}


def run_labels(paths, given=""):
    """A name for each run: the given ones, or the shortest parts of the folders' names that differ."""
    if given:
        labels = [label.strip() for label in given.split(",")]
        if len(labels) != len(paths) or len(set(labels)) != len(paths):
            raise ConfigError(f"labels={given!r}: give {len(paths)}, one for each run, all different")
        return labels
    names = [path.removesuffix("/log.jsonl").split("/") for path in paths]
    depth = next(
        k for k in range(1, max(map(len, names)) + 1) if len({tuple(name[-k:]) for name in names}) == len(names)
    )
    names = ["/".join(name[-depth:]) for name in names]
    if len(names) == 1:
        return names
    ahead = length_in_common(names)
    names = [name[ahead:] for name in names]
    behind = length_in_common([name[::-1] for name in names])
    return [name[: len(name) - behind] for name in names]


def length_in_common(names):
    """Length of the beginning that all names share, in whole words: up to a "/" or "_" at which none of them ends."""
    shared = os.path.commonprefix(names)
    shared = shared[: min(len(name) for name in names) - 1]
    return max(shared.rfind("/"), shared.rfind("_")) + 1


# ---------------------------------------------------------------------------------------
# The picture

LOSSES = ("loss", "val_loss")

# {key of a row: (title of the axis, scale)}; "units" are what the run counts
COSTS = {
    "step": ("steps", "linear"),
    "units": ("", "log"),
    "flops": ("FLOPs", "log"),
    "seconds": ("seconds of training", "linear"),
}

# {what a run counts: unit of its loss}
UNITS = {"tokens": "nats per token", "images": "nats per image", "samples": "squared error"}


def unit_of(rows):
    """What the run counts, a key of UNITS; tokens if its rows have none of them."""
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
        set_limits(panel, runs.values(), cost, scale, key)
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
        x, y = costs_and_losses(rows, cost, "loss")
        panel.plot(x, y, gid="loss", label=label, color=colour, lw=0.5, alpha=0.35)
        panel.plot(x, running_mean(y), gid="smooth", label=label, color=colour, lw=1.2)
    if key != "loss":
        x, y = costs_and_losses(rows, cost, "val_loss")
        line = {"lw": 0} if key == "both" else {"lw": 1}
        panel.plot(x, y, gid="val_loss", label=label, color=colour, marker="o", ms=4.5, mec="white", mew=0.5, **line)


def set_limits(panel, runs, cost, scale, key):
    """Set scales, and limits that leave out the first hundredth of every run, whose steep fall would flatten the rest."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    wanted = LOSSES if key == "both" else (key,)
    late = [row for rows in runs for row in rows if row["step"] >= rows[-1]["step"] / 100]
    late = [row for row in late if any(name in row for name in wanted)]
    losses = [row[name] for row in late for name in wanted if name in row]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if losses and min(losses) > 0:  # so that ends that differ by a hundredth stay distinguishable
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


def costs_and_losses(rows, cost, key):
    """-> costs and losses of the rows that have both."""
    pairs = [(row[cost], row[key]) for row in rows if cost in row and key in row]
    return [x for x, _ in pairs], [y for _, y in pairs]


def running_mean(values):
    """Means over a symmetric window of a fiftieth of the values, narrower at both ends."""
    half, n = len(values) // 100, len(values)
    means = []
    for i in range(n):
        reach = min(half, i // 10, n - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def colours(number):
    """That many colours that can be told apart."""
    import matplotlib

    if number <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(number)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (number - 1)) for i in range(number)]


# ---------------------------------------------------------------------------------------
# The table


def table_of_runs(runs):
    """Lines of a table: cost and losses of each run, {label: rows}."""
    units = ", ".join(dict.fromkeys(map(unit_of, runs.values())))
    head = ("run", "steps", units, "FLOPs", "seconds", "final loss", "final val loss", "best val loss")
    table = [head] + [(label, *run_figures(rows)) for label, rows in runs.items()]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for first, *others in table:
        yield "  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))])


def run_figures(rows):
    """Cells of a run's line: steps, units, FLOPs, seconds, losses."""
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

# what can be fitted: {measure: (its name, the key that rows need)}
MEASURES = {
    "val_loss": ("validation loss", "val_loss"),
    "loss": ("training loss", "loss"),
    "error": ("error, 1 - top-1", "top1"),
}


# options of a run that make its group, where they are not the default
GROUP_OPTIONS = (*STRUCTURE_FIELDS, "align_heads", "overrides", "moe", "num_experts", "top_k")


@dataclass
class FitConfig:
    out: str = "out/fit"  # folder for table.md, multipliers.md, fit.json and the pictures
    reference: str = "dense"  # group that the others are compared with
    by: tuple = GROUP_OPTIONS  # options that name the group of a run, where they are not the default
    loss: Literal["val_loss", "loss", "error"] = "val_loss"  # of validation, of training, or 1 - top-1 of images
    points: Literal["all", "final"] = "all"  # of a run: all validations after the warm-up, or only the last
    costs: tuple = ("flops", "seconds", "parameters")  # costs to compare by
    samples: int = 256  # draws of other seeds for an interval; a power of 2 is spread most evenly

    def __post_init__(self):
        for cost in self.costs:
            if cost not in frontiers.COSTS:
                raise ConfigError(f"costs: {cost!r} is unknown, choose from {', '.join(frontiers.COSTS)}")
        if not self.costs:
            raise ConfigError(f"costs is empty: give some of {', '.join(frontiers.COSTS)}")
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: make it at least 1")


class Log(NamedTuple):
    """A run as its folder records it."""

    path: str  # of log.jsonl
    rows: list
    options: dict  # of config.json
    group: str
    parameters: int | None = None
    place: tuple | None = None  # (ω, ψ, ν); None if the structure has none


def fit_logs(argv):
    """The command `fit`: frontiers, laws and multipliers of the runs in `argv`, into one folder."""
    config, paths = read_words(FitConfig, argv)
    if not paths:
        raise ConfigError("fit: which runs? give their folders or logs, such as out/sweep/*")
    logs = without_shorter_attempts([read_run_and_options(path, config) for path in paths])
    unit = common_unit(logs)
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
    places = {log.group: log.place for log in logs}  # that of the largest size, if it depends on the width
    figures = {cost: frontiers.analyse(runs, config.reference, cost, config.samples) for cost in config.costs}
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={config.out} cannot be written ({error.strerror}): take another") from None
    lines = [
        *summary_of_fit(logs, runs, config, measure_and_unit(config.loss, unit)),
        "",
        *table_of_groups(logs, places),
        "",
    ]
    for cost in config.costs:
        lines += [*frontiers.table_of_frontiers(figures[cost], cost, config.reference), ""]
    with open(os.path.join(config.out, "table.md"), "w") as file:
        file.write("\n".join(lines))
    with open(os.path.join(config.out, "multipliers.md"), "w") as file:
        file.write("\n".join([*table_of_multipliers(logs, places, figures, config.reference), ""]))
    with open(os.path.join(config.out, "fit.json"), "w") as file:
        json.dump({"groups": places, "runs": [figures_at_end(log) for log in logs], **figures}, file, indent=1)
    drawn = draw_fit(logs, runs, places, figures, config, unit)
    print(*lines, f"written: {config.out}/table.md, multipliers.md, fit.json, {', '.join(drawn)}", sep="\n")


def read_words(Config, argv):
    """-> the options among the words of a command line, and the logs; config files are run, for the structures they define."""
    words = [word for word in argv if not word.startswith("--")]
    for file in [word for word in words if word.endswith(".py")]:
        words.remove(file)
        read_config_file(file)
    words = [word for word in words if not os.path.exists(os.path.join(word, "fit.json"))]  # an earlier fit's folder
    config = load_config(Config, [word for word in argv if word.startswith("--")])
    return config, sorted({log_path(word) for word in words})  # nothing depends on their order


def common_unit(logs):
    """What all runs count, a key of UNITS."""
    units = {unit_of(log.rows): log.path for log in logs}
    if len(units) > 1:
        (one, a), (other, b) = list(units.items())[:2]
        raise ConfigError(f"{a} counts {one} and {b} {other}: their losses do not compare, take them apart")
    return next(iter(units))


def what_it_learns(options, *without):
    """A run's options as one text, without those that do not affect what it learns and those in `without`."""
    left = {key: value for key, value in options.items() if key not in ("out_dir", "resume", *without)}
    return json.dumps(left, sort_keys=True)


def without_shorter_attempts(logs):
    """The logs without all but the longest attempt at each run; a new run renames the folder of an old one to NAME.1."""
    kept = {}
    for log in logs:
        run = what_it_learns(log.options)
        if run in kept:
            shorter, longer = sorted((log, kept[run]), key=lambda log: log.rows[-1]["step"])
            print(
                f"{shorter.path}: left out, since {longer.path} is an attempt at the same run that is as long or longer"
            )
            log = longer
        kept[run] = log
    return list(kept.values())


def read_run_and_options(path, config, sized=True):
    """-> the Log of a run; sized: with its number of parameters and its place, which take torch and a model."""
    known = {measure: key for measure, (_, key) in MEASURES.items()}
    rows, options = read_run(path, [known[config.loss]], known, "loss"), read_options(path)
    try:
        log = Log(path, rows, options, group_name(options, config.by))
        return log._replace(parameters=num_parameters(options), place=place_in_taxonomy(options)) if sized else log
    except ImportError:
        raise
    except Exception as error:  # of any kind: a run of other code may have any option, of any type
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
    """A name such as "btt, rank=4": the structure, and the options in `by` that are not the default.

    A θ is preceded by the name of its family; a mixture is named by its experts: "btt, linear MoE, 2 of 8".
    """
    defaults = json.loads(json.dumps({field.name: field.default for field in fields(BlockConfig)}))  # as in config.json
    for name in by:
        if name not in options and name not in defaults:
            raise ConfigError(f"by: {name!r} is no option of these runs")
    value = {name: options.get(name, defaults.get(name)) for name in {**defaults, **dict.fromkeys(by)}}
    parts = [str(value["structure"])] if "structure" in by else []
    shown = {"structure", "theta", "structure_options", "moe", "num_experts", "top_k"}  # worded differently
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
    """The name of the family that θ belongs to, by the indices that it lacks (README, "The structures")."""
    _, b, c, d, _, f, rho = canonical(theta)
    if b == d == 0:
        if c == f == 0:
            return "low-rank"
        return "full-rank BTT" if taxonomy(theta)[1] > 0.999 else "low-rank BTT"
    if c == f == 0:
        return "TT" if rho else "Kronecker"
    return "generic"


def make_run(log, measure, points="all"):
    """The Run of a log: cost and measure at each validation after the warm-up, in which the rate is not yet comparable."""
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
    loss = np.array([measured_at(log.rows, row, measure) for row in rows])
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


def measured_at(rows, at, measure):
    """The measure at row `at`; the training loss, which rows have for single batches, is a mean over the last tenth of the steps."""
    if measure == "error":
        return 1 - at["top1"]
    if measure == "val_loss":
        return at["val_loss"]
    last = at["step"]
    return float(np.mean([row["loss"] for row in rows if "loss" in row and 0.9 * last <= row["step"] <= last]))


def num_parameters(options):
    """Number of parameters of the model that a run's config.json describes."""
    import torch  # here, since its import takes seconds and plot does not need it

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


def place_in_taxonomy(options):
    """(ω, ψ, ν) of a run's structure; a fixed rank or number of blocks counts as the power of d_model that it equals there.

    None for a mixture, for three or more cores, and for a structure without θ.
    """
    if options.get("moe", "none") != "none" or (options.get("num_cores") or 2) > 2:
        return None
    if options["structure"] == "einsum":
        return taxonomy(options["theta"])
    structure = find_structure(options["structure"])
    if structure.theta is None:
        return None
    if options.get("num_blocks"):  # Monarch: each block passes d / b² values to every other
        b = math.log(options["num_blocks"]) / math.log(options["d_model"])
        return taxonomy((1 - b, 0, b, 0, 1 - b, b, 1 - 2 * b))
    rank = options.get("rank") or 1 if "rank" in structure.options else 1
    return taxonomy((*structure.theta[:6], min(1.0, math.log(rank) / math.log(options["d_model"]))))


def measure_and_unit(measure, unit):
    """The name of the measure, with its unit."""
    return MEASURES[measure][0] if measure == "error" else f"{MEASURES[measure][0]} ({UNITS[unit]})"


def summary_of_fit(logs, runs, config, measure):
    """Lines that state what was fitted."""
    groups = len({log.group for log in logs})
    what = "every validation after the warm-up" if config.points == "all" else "the last validation"
    yield f"{len(logs)} runs of {groups} groups, {measure} at {what} of each."
    yield (
        "90% intervals estimate how much figures would change with other seeds: from the seeds of each size or, with one seed, "
        "from the scatter of sizes around their power law."
    )
    settings, spread = frontiers.spread_of_seeds(runs)
    if settings:
        yield f"{settings} settings have several seeds; the standard deviation of their last losses is {spread:.2%}."


def table_of_groups(logs, places):
    """Lines of a Markdown table: place of each group in the taxonomy, and its sizes."""
    yield "| group | ω | ψ | ν | d_model | parameters |"
    yield "|---|---|---|---|---|---|"
    for group, place in places.items():
        mine = [log for log in logs if log.group == group]
        lies = [f"{value:.2f}" for value in place] if place is not None else ["", "", ""]
        widths = ", ".join(map(str, sorted({log.options.get("d_model", 0) for log in mine} - {0})))
        sizes = [short(size(log.parameters for log in mine)) for size in (min, max)]
        yield f"| {group} | {' | '.join(lies)} | {widths} | {' to '.join(dict.fromkeys(sizes))} |"


def table_of_multipliers(logs, places, figures, reference):
    """Lines of a Markdown table: each group's multiplier by every cost, and the range of losses that it is a mean over."""
    heads = [f"{frontiers.COSTS[cost]}: {reference} ÷ it | losses in common" for cost in figures]
    yield f"| group | ω | ψ | ν | rate | {' | '.join(heads)} | least loss |"
    yield "|---" * (6 + 2 * len(figures)) + "|"
    for group, place in places.items():
        if group == reference:
            continue
        lies = [f"{value:.2f}" for value in place] if place is not None else ["", "", ""]
        taken = sorted({log.options["lr"] for log in logs if log.group == group and log.options.get("lr")})
        cells = [" | ".join(frontiers.multiplier_cells(entries[group], False)) for entries in figures.values()]
        least = min(min(entries[group]["frontier_loss"]) for entries in figures.values())
        yield f"| {group} | {' | '.join(lies)} | {', '.join(map('{:g}'.format, taken))} | {' | '.join(cells)} | {least:.4f} |"


def all_measured(logs, measure):
    """Whether all logs have the measure."""
    return all(any(MEASURES[measure][1] in row for row in log.rows) for log in logs)


def figures_at_end(log):
    """Cost and measures of a run at its end, a dict."""
    figures = {"name": os.path.basename(os.path.dirname(log.path)), "group": log.group}
    for measure in MEASURES:
        if all_measured([log], measure):
            run = make_run(log, measure, "final")
            figures[measure] = float(run.loss[-1])
    return {**figures, **{cost: float(values[-1]) for cost, values in run.cost.items()}}


def draw_fit(logs, runs, places, figures, config, unit):
    """Draw and write the pictures -> their file names."""
    colour = dict(zip(places, colours(len(places))))
    drawn = []

    def save(figure, name):
        save_figure(figure, os.path.join(config.out, name), remedy="give another --out")
        drawn.append(name)

    what = measure_and_unit(config.loss, unit)
    for cost, entries in figures.items():
        title = "the least loss for what it costs" + title_of_laws(entries)
        save(frontiers.draw_frontiers(runs, entries, cost, what, colour, title), f"frontiers_{cost}.png")
    save(frontiers.draw_multipliers(figures, config.reference, colour), "multipliers.png")
    measures = ["error" if all_measured(logs, "error") else "val_loss"] + ["loss"] * all_measured(logs, "loss")
    last = {measure_and_unit(measure, unit): [make_run(log, measure, "final") for log in logs] for measure in measures}
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
            if values and max(values) - min(values) > 0.01:  # otherwise there is nothing to see
                shade, scale = shades({group: places[group][place] for group in some})
                entries = {group: figures["flops"][group] for group in some}
                mine = [run for run in runs if run.group in some]
                heading = f"the least loss for what it costs{title_of_laws(entries)}, by {title.partition(',')[0]}"
                picture = frontiers.draw_frontiers(mine, entries, "flops", what, shade, heading, (scale, title))
                save(picture, f"frontiers_{name}.png")
    return drawn


def title_of_laws(entries):
    """The part of a title about power laws: all groups have one, some, or none, since a law needs three points."""
    laws = [entry["law"] is not None for entry in entries.values()]
    return (
        (", and its power law" if all(laws) else ", and its power law where it has three points") if any(laws) else ""
    )


def shades(values):
    """-> {group: colour} by {group: value}, and the scale for a colour bar."""
    import matplotlib

    low, high = min(values.values()), max(values.values())
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high if high > low else low + 1), "turbo")
    return {group: scale.to_rgba(value) for group, value in values.items()}, scale


# ---------------------------------------------------------------------------------------
# Learning rates


@dataclass
class RatesConfig:
    out: str = "out/rates"  # path without suffix: the table goes to OUT.md, the losses to OUT.json
    by: tuple = GROUP_OPTIONS  # options that name the group of a run, where they are not the default
    loss: Literal["val_loss", "loss", "error"] = "val_loss"  # of validation, of training, or 1 - top-1 of images

    def __post_init__(self):
        self.out = self.out.removesuffix(".json").removesuffix(".md")


def tabulate_rates(argv):
    """The command `rates`: final losses of the runs in `argv` by group, width and rate; earlier .json files add theirs."""
    files = [word for word in argv if word.endswith(".json") and not word.startswith("--")]
    config, paths = read_words(RatesConfig, [word for word in argv if word not in files])
    if not paths and not files:
        raise ConfigError("rates: which runs? give their folders or logs, such as out/tune/*")
    curves, losses = [], {}
    for file in files:
        earlier, losses[file] = rates.read_curves(file)
        curves += earlier
    if paths:
        logs = without_shorter_attempts([read_run_and_options(path, config, sized=False) for path in paths])
        losses[paths[0]] = measure_and_unit(config.loss, common_unit(logs))
        curves += curves_of(logs, config.loss)
    (first, loss), *others = losses.items()
    for file, other in others:
        if other != loss:
            raise ConfigError(f"{first} has {loss}, {file} {other}: take another --loss, or leave one out")
    curves = sorted(rates.merged(curves), key=lambda curve: (curve.group != "dense", curve[:3]))
    lines = list(rates.table_of_rates(curves, loss))
    with writing(config.out, "give another --out"):
        os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
        rates.write_curves(f"{config.out}.json", curves, loss)
        with open(f"{config.out}.md", "w") as file:
            file.write("\n".join([*lines, ""]))
    print(*lines, f"written: {config.out}.md, {config.out}.json", sep="\n")


def curves_of(logs, measure):
    """The logs' final losses as Curves, each of runs that differ only in rate and seed.

    Where several have the same group, width and steps, their names list the options in which they differ.
    """
    alike = {}
    for log in logs:
        named = log.group, log.options.get("d_model"), log.options.get("max_steps")
        if None in (*named, log.options.get("lr")):
            raise ConfigError(f"{log.path}: its config.json has no d_model, max_steps or lr: leave the run out")
        alike.setdefault(named, {}).setdefault(what_it_learns(log.options, "seed", "lr"), []).append(log)
    curves = []
    for (group, width, steps), settings in alike.items():
        options = [json.loads(setting) for setting in settings]
        keys = dict.fromkeys(key for each in options for key in each)
        differ = [key for key in keys if any(each.get(key) != options[0].get(key) for each in options)]
        for mine, which in zip(settings.values(), options):
            losses = {}
            for log in mine:
                losses.setdefault(log.options["lr"], {})[log.options.get("seed")] = final_loss(log, measure)
            name = ", ".join([group, *(f"{key}={which.get(key)}" for key in differ)])
            curves.append(rates.Curve(name, width, steps, losses, {}))
    return curves


def final_loss(log, measure):
    """The measure at the run's last step; None, and a note, of a run that did not reach it."""
    last, steps = log.rows[-1], log.options["max_steps"]
    if last["step"] < steps:
        print(f"note: {log.path} ends at step {last['step']} of {steps}: it diverged, or is not finished")
        return None
    key = MEASURES[measure][1]
    if measure != "loss" and key not in last:
        raise ConfigError(f"{log.path} has no {key} at its last step: leave the run out, or take another --loss")
    value = measured_at(log.rows, last, measure)
    return value if math.isfinite(value) else None


def main(argv):
    commands = {"plot": plot_logs, "fit": fit_logs, "rates": tabulate_rates}
    choose_command(argv, commands, "lab.scaling_laws", "say what to do", __doc__)(argv[1:])


if __name__ == "__main__":
    as_script(main)
