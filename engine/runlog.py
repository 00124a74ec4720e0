"""What a run prints and writes: its layers and plan, its progress, log.jsonl, loss.png, a summary; on request to wandb.

Each row of log.jsonl is an object with the keys step (updates done), tokens (or images, samples), flops, seconds (of
training: the clock stops for evaluations and checkpoints), loss, val_loss, lr, grad_norm, tokens_per_second and mfu;
a key without a figure is left out. Mixtures add aux_loss, which loss does not include, and at each evaluation
moe: the figures of each router (moe.Routers.figures), averaged since the evaluation before.
"""

import errno
import json
import math
import os
import re
import shlex
import socket
import stat
import statistics
import sys
from contextlib import contextmanager, suppress

from configurator import ConfigError, RunFailed
from text_files import first_line
from theta import ChainSizes, Sizes, rank_of

# ---------------------------------------------------------------------------------------
# The log


class RunLog:
    """Writes one run's log, on rank 0. Its methods raise what `writing` raises."""

    def __init__(self, out_dir, resume_step=None):
        """resume_step: where the run resumes, up to which rows are kept; None starts an empty log."""
        self.path = os.path.join(out_dir, "log.jsonl")
        rows = [] if resume_step is None else [row for row in read_log(self.path) if row["step"] <= resume_step]
        with writing(self.path):
            with open(self.path + ".part", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            os.replace(self.path + ".part", self.path)

    def write(self, row):
        """Append a row, a dict of plain values."""
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def writing(path, remedy="make room or give another out_dir"):
    """Turns an OSError in its block into one line about `path`: RunFailed if a disk is full or broken, otherwise ConfigError."""
    try:
        yield
    except OSError as error:
        kind = RunFailed if error.errno in DISK_ERRORS else ConfigError
        raise kind(f"{path} cannot be written ({error.strerror or error}): {remedy}") from None


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE}


def read_log(path):
    """The rows of a log.jsonl, [] if there is no such file. A line that is no row, such as one that a kill cut short, is skipped.

    ConfigError if the file cannot be read, or a row has figures that no run writes.
    """
    rows = []
    if os.path.exists(path):
        for number, line in enumerate(lines_of(path), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                check_row(row, f"{path}: line {number}")
                rows.append(row)
    return rows


def lines_of(path):
    """The lines of a text file. ConfigError if it cannot be read, or is a pipe, which could block for ever."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path} is not a regular file: remove it, or give another out_dir")
        with open(path, errors="replace") as file:
            return file.readlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from None


# Figures of a row that are NaN or infinite if the run diverged.
MAY_DIVERGE = {"loss", "val_loss", "aux_loss", "grad_norm"}
# Figures of a row that are finite and not negative.
COUNTS = {"step", "tokens", "images", "samples", "flops", "seconds", "lr", "mfu", "top1", "top5"}


def check_row(row, where):
    """ConfigError, which begins with `where`, unless all figures that this module's docstring names have the right type."""
    for key, value in row.items():
        if key in MAY_DIVERGE:
            fits = is_number(value)
        elif key in COUNTS or key.endswith("_per_second"):
            fits = is_number(value) and 0 <= value < math.inf
        elif key == "moe":
            fits = isinstance(value, dict) and value and all(map(is_figures_of_router, value.values()))
        else:
            continue  # a figure of the user's own
        if not fits:
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "…"
            raise ConfigError(f"{where} has {key}={shown}, which no run writes: remove the line, or take another log")


def is_figures_of_router(figures):
    """Whether these are moe.figures of one router."""
    if not isinstance(figures, dict) or not isinstance(figures.get("load"), list) or not figures["load"]:
        return False
    return all(map(is_number, (*figures["load"], figures.get("mean_entropy"), figures.get("token_entropy"))))


def is_number(value):
    """Whether a value of JSON is a number that a float can hold, NaN and infinity included."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def read_config_json(path):
    """The options in a run's config.json, {name: value}. ConfigError where there are none that can be read."""
    try:
        options = json.loads("".join(lines_of(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read, it holds no options: remove it, or take another run") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path} cannot be read, it holds no options: remove it, or take another run")
    return options


def start_wandb(project, config, run_id):
    """Start a Weights & Biases run, or resume the one with the id `run_id`. ConfigError without the package or a login."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb=True, but the package wandb is not installed: pip install wandb") from None
    try:
        return wandb.init(project=project, config=config, id=run_id, resume="allow")
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb=True: {first_line(error)} Or set WANDB_MODE=offline, which needs no login") from None


# ---------------------------------------------------------------------------------------
# Before the run


def model_table(model, multipliers, lr, unit="token", flops=None, layer_uses=lambda role: 1):
    """The lines of a table of the model: one row per kind of layer, for all blocks together, and the totals.

    multipliers  {parameter name: learning-rate multiplier}, from optim.lr_multipliers
    lr           the base learning rate
    unit, flops  what the model reads, and the FLOPs of a forward pass on one of them; None: model.flops_per_token()
    layer_uses   role of a layer -> how often one unit passes through it: for an image, its number of patches

    The column `rank` is that of the matrix by its sizes (theta.rank_of), empty where it is full. A tied head's parameters
    count as embeddings. A note follows the table for each structure with layers that cost more than dense ones.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}  # a shared one under its first name
    rates = {parameter: lr * multipliers[name] for parameter, name in names.items()}
    roles = _layers_by_role(model)
    tied = {role for role, alike in roles.items() if _kind(names[alike[0].cores[0]]) == "embeddings"}
    layers = [_layer_row(model.config, role, alike, role in tied, rates, layer_uses) for role, alike in roles.items()]
    cores = {core for role in roles.keys() - tied for layer in roles[role] for core in layer.cores}
    others = {kind: [] for kind in KINDS}
    for parameter, name in names.items():
        if parameter not in cores:
            others[_kind(name)].append(parameter)
    rest = [_other_row(model.config, *item, rates) for item in others.items() if item[1]]
    embeddings = [rest.pop(0)] if others["embeddings"] else []

    attention = (flops or model.flops_per_token()) - sum(row["FLOPs"] for row in layers)
    behind = max((i for i, row in enumerate(layers) if "attn." in row["layer"]), default=None)
    if behind is not None:
        what = f"q k' and p v at {model.config.block_size:,} tokens"
        layers.insert(behind + 1, _table_row(f"{model.config.n_layer} x attention", "", [what], "", 0, attention))

    rows = [*embeddings, *layers, *rest]
    parameters = sum(row["parameters"] for row in rows if row["parameters"] != "tied")
    rows.append(_table_row("total", "", [], "", parameters, sum(row["FLOPs"] for row in rows)))
    names = {"FLOPs": f"FLOPs {with_article(unit)}"}
    if not any(row["rank"] for row in rows):
        for row in rows:
            del row["rank"]
    table = _as_table([{names.get(key, key): value for key, value in row.items()} for row in rows])
    return table + _notes_on_costly_structures(model.config, roles)


def _notes_on_costly_structures(config, roles):
    """A line for each structure with layers that cost more FLOPs than dense ones of the same widths, about the costliest."""
    costliest = {}
    for role, (layer, *_) in roles.items():
        matrices = getattr(layer, "top_k", 1)  # that process each token of a mixture
        share = layer.flops_per_token / (2 * layer.in_features * layer.out_features * matrices)
        if not _is_dense(layer) and share > costliest.get(_structure(config, role, layer), (1.0,))[0]:
            costliest[_structure(config, role, layer)] = share, role
    return [
        f"note: {structure}: {role} costs {share:.2f} times the FLOPs of a dense layer: a smaller rank costs less"
        for structure, (share, role) in costliest.items()
    ]


def _layers_by_role(model):
    """{role: the layers with that role, one per block}, in the order of the model."""
    roles = {}
    for name, module in model.named_modules():
        if hasattr(module, "cores"):
            roles.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(module)
    return roles


def _layer_row(config, role, alike, tied, rates, layer_uses):
    layer = alike[0]
    return _table_row(
        f"{len(alike)} x {role}" if len(alike) > 1 else role,
        _structure(config, role, layer),
        [(layer.in_features, layer.out_features)] if _is_dense(layer) else [core.shape for core in layer.cores],
        _rank(layer),
        "tied" if tied else sum(core.numel() for layer in alike for core in layer.cores),
        sum(layer.flops_per_token for layer in alike) * layer_uses(role),
        [rates[core] for core in layer.cores],
        _init_stds(config, role, layer),
    )


def _other_row(config, kind, parameters, rates):
    embeddings = kind == "embeddings"
    return _table_row(
        kind,
        "",
        [parameter.shape for parameter in parameters] if embeddings else [],
        "",
        sum(parameter.numel() for parameter in parameters),
        0,
        sorted({rates[parameter] for parameter in parameters}),
        [_embedding_std(config)] if embeddings else [],
    )


def _is_dense(layer):
    return layer.cores[0].dim() == 2


def _rank(layer):
    """Such as "64 of 512"; "" if the rank is full or unknown. For a mixture, the joint rank of the experts of one token."""
    sizes, full = getattr(layer, "sizes", None), min(layer.in_features, layer.out_features)
    if isinstance(sizes, Sizes):
        sizes = sizes._replace(rho=sizes.rho * getattr(layer, "top_k", 1))
    rank = rank_of(sizes) if isinstance(sizes, (Sizes, ChainSizes)) else full
    return "" if rank == full else f"{rank:,} of {full:,}"


def _structure(config, role, layer):
    name = "dense" if _is_dense(layer) else config.layer_options(role).get("structure", "btt")
    return f"{name}, {layer.top_k} of {layer.num_experts}" if hasattr(layer, "num_experts") else name


# {kind of a parameter that is no core: part of its name}; the first that matches counts.
KINDS = {"embeddings": "embedding", "norms": "norm", "gains": ".gains", "biases": ".bias", "others": ""}

GPT2_STD = 0.02  # with parametrization="standard", of dense layers and embeddings (GPT._init_as_gpt2)


def _kind(name):
    return next(kind for kind, part in KINDS.items() if part in name)


def _embedding_std(config):
    return GPT2_STD if config.parametrization == "standard" else getattr(config, "embedding_std", 1.0)  # a ViT's: 1


def _init_stds(config, role, layer):
    """The standard deviation at initialisation of each core of the layer; 0 for a core that starts at zero."""
    if config.parametrization == "standard" and _structure(config, role, layer).startswith("dense"):
        if role.endswith("router"):
            return layer.init_std
        return [GPT2_STD / (2 * config.n_layer) ** 0.5 if role in ("attn.proj", "ffn.down") else GPT2_STD]
    return [*layer.init_std[:-1], 0.0 if layer.zero_init else layer.init_std[-1]]


def _table_row(layer, structure, sizes, rank, parameters, flops, rates=(), stds=()):
    return {
        "layer": layer,
        "structure": structure,
        "sizes": " ".join(size if isinstance(size, str) else f"({','.join(map(str, size))})" for size in sizes),
        "rank": rank,
        "parameters": parameters,
        "FLOPs": flops,
        "learning rate": " ".join(f"{rate:.3g}" for rate in rates),
        "init std": " ".join(f"{std:.3g}" for std in stds),
    }


def _as_table(rows):
    """The table's lines: numbers are aligned right, words left, columns are as wide as their content, and 0 is left blank."""
    texts = [{key: _cell(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(text[key]) for text in texts)) for key in rows[0]}
    right = {key for key in widths if any(isinstance(row[key], int) for row in rows)}

    def line(cells):
        return "  ".join(
            cell.rjust(widths[key]) if key in right else cell.ljust(widths[key]) for key, cell in cells.items()
        ).rstrip()

    rule = "-" * sum(widths.values(), 2 * len(widths) - 2)
    head, *body = [line({key: key for key in widths}), *map(line, texts)]
    return [head, rule, *body[:-1], rule, body[-1]]


def _cell(value):
    return (f"{value:,}" if value else "") if isinstance(value, int) else value


def plan(
    config, model, world, micro_steps, device_name, dtype, peak, first_step=0, unit="token", flops=None, batch=None
):
    """Lines that state what the run will do and, on a GPU with a known peak FLOP/s, about how long it will take.

    unit   what the model reads: "token", "image", …
    flops  of a forward pass on one unit; None: model.flops_per_token()
    batch  units per update; None: config.batch_tokens
    """
    parameters, flops = sum(p.numel() for p in model.parameters()), 3 * (flops or model.flops_per_token())
    batch = batch or config.batch_tokens
    tokens = (config.max_steps - first_step) * batch
    sizes = f"{_count(config.micro_batch, unit)}"
    if unit == "token":
        sizes = f"{_count(config.micro_batch, 'sequence')} of {config.block_size:,} tokens"
    steps = f"{config.max_steps:,} steps" if not first_step else f"steps {first_step:,} to {config.max_steps:,}"
    lines = [
        f"{short(parameters)} parameters, {short(flops)} FLOPs {with_article(unit)} in training (3 x forward)",
        f"{steps} x {batch:,} {unit}s = {short(tokens)} {unit}s, {tokens * flops:.3g} FLOPs in all",
        f"{_count(world, 'process', 'processes')} x {_count(micro_steps, 'micro-step')} x "
        f"{sizes}, {device_name}, {str(dtype).removeprefix('torch.')}",
    ]
    if peak:
        speed = 0.4 * peak * world / flops
        lines.append(f"at 40% MFU about {duration(tokens / speed)}, {short(speed)} {unit}s/s")
    if config.shard == "fsdp" and world == 1:
        lines.append("note: shard=fsdp does nothing with one process: there is no other to share with")
    if config.warmup_steps >= config.max_steps:
        share = config.max_steps / max(1, config.warmup_steps)
        lines.append(
            f"note: warmup_steps={config.warmup_steps} of max_steps={config.max_steps}: the rate rises to the end, to "
            f"{share * config.lr:.3g} of lr={config.lr:g}"
        )
    return lines


def with_article(unit):
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def _count(number, one, many=None):
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short(number):
    """A number as three digits and a letter: 5.24B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + letter
    return f"{number:.3g}"


def duration(seconds):
    """Seconds in words: 3 h 12 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


# ---------------------------------------------------------------------------------------
# During the run


class Progress:
    """Shows a run's progress: as a bar on a terminal, otherwise as one line per logged row.

    While the bar is open, print through `say` only, which leaves it whole.
    """

    def __init__(self, max_steps, first_step=None):
        """first_step: where the bar begins; None: at the first step or row."""
        self.max_steps, self.first_step = max_steps, first_step
        self.on_terminal, self.bar = sys.stdout.isatty(), None
        self.latest, self.seconds_a_step = {}, None  # the last row with a loss, and its speed

    def say(self, *text, **how):
        """Print, above the bar; arguments as of print."""
        how = {"flush": True, **how}
        if self.bar is None:
            print(*text, **how)
        else:
            with self.bar.external_write_mode(file=sys.stdout):
                print(*text, **how)

    def row(self, row, seconds_left=None):
        """Show a logged row; seconds_left=None estimates them from the row's speed."""
        left = self.max_steps - row["step"]
        unit, speed = speed_of(row)
        if seconds_left is None and row["step"] and unit in row and speed:
            seconds_left = left * row[unit] / row["step"] / speed
        if not self.on_terminal:
            return self.say(progress_line(row, self.max_steps, seconds_left))
        if "loss" in row:
            self.latest, self.seconds_a_step = row, seconds_left / left if seconds_left and left else None
        self.open_bar(row["step"])
        self.step(row["step"])
        if "val_loss" in row:
            self.say(progress_line(row, self.max_steps, seconds_left))

    def step(self, step):
        """Show how many steps are done. Cheap: the bar is drawn at most ten times a second."""
        if self.on_terminal:
            self.open_bar(step - 1)
            left = None if self.seconds_a_step is None else self.seconds_a_step * (self.max_steps - step)
            self.bar.set_postfix_str(" | ".join(_figures(self.latest, left)), refresh=False)
            self.bar.update(step - self.bar.n)

    def open_bar(self, step):
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.max_steps,
                initial=step if self.first_step is None else self.first_step,
                file=sys.stdout,
                dynamic_ncols=True,
                miniters=1,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {percentage:.0f}%{postfix}",
            )

    def close(self):
        """Leave the bar as it is; from now on `say` prints plain lines."""
        if self.bar is not None:
            self.bar.close()
        self.on_terminal, self.bar = False, None


class Silent:
    """Stands in for Progress on ranks that print nothing."""

    def say(self, *text, **how):
        pass

    def row(self, row, seconds_left=None):
        pass

    def step(self, step):
        pass

    def close(self):
        pass


def progress_line(row, max_steps, seconds_left):
    """A logged row as one line for the screen."""
    parts = [f"step {row['step']:>{len(str(max_steps))}}/{max_steps}", *_figures(row, seconds_left)]
    if "val_loss" in row:
        parts.append(f"val loss {row['val_loss']:.4f}")
    if "top1" in row:
        parts.append(f"top-1 {row['top1']:.2%}")
    return " | ".join(parts)


def speed_of(row):
    """-> what the run counts ("tokens", "images"), how many per second; "", None if the row has no speed."""
    for key, value in row.items():
        if key.endswith("_per_second"):
            return key.removesuffix("_per_second"), value
    return "", None


def _figures(row, seconds_left):
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    unit, speed = speed_of(row)
    if unit:
        parts.append(f"{speed / 1e3:.1f}k {unit}/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if seconds_left is not None:
        parts.append(f"ETA {_clock(seconds_left)}")
    return parts


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)  # hours may exceed 24
    return f"{hours:02}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


# ---------------------------------------------------------------------------------------
# After the run


FILES = {
    "ckpt.pt": "checkpoint", "ckpt.dcp": "checkpoint", "ckpt_best.pt": "best", "ckpt_best.dcp": "best",
    "log.jsonl": "log", "loss.png": "picture", "experts.png": "experts",
}  # fmt: skip


def summary_of_run(log, config, memory=None):
    """Lines about a run that has ended: its main figures and its files.

    log     the path of its log.jsonl, or its rows
    memory  peak memory of the device in GiB; None: unknown
    """
    rows = log if isinstance(log, list) else read_log(log)
    if not rows:
        return [f"{config.out_dir}: nothing logged"]
    last, have = rows[-1], {key: [row for row in rows if key in row] for key in ("loss", "val_loss")}
    unit = next(filter(None, (speed_of(row)[0] for row in rows)), "tokens")
    speed, mfu = median_of(rows, f"{unit}_per_second"), median_of(rows, "mfu")
    seconds = last.get("seconds", 0)
    items = {
        "steps": f"{last['step']:,} of {config.max_steps:,}",
        unit: f"{last.get(unit, 0):,}",
        "FLOPs": f"{last.get('flops', 0):.3g}",
        "training": f"{seconds:,.1f} s" + (f", which are {duration(seconds)}" if seconds >= 60 else ""),
    }
    if speed is not None:
        items["speed"] = f"{short(speed)} {unit}/s{'' if mfu is None else f', MFU {mfu:.1%}'} (medians)"
    if have["val_loss"]:
        best = min(have["val_loss"], key=lambda row: row["val_loss"])
        ends = [have["val_loss"][i]["val_loss"] for i in (0, -1)]
        items["val loss"] = (
            f"{ends[0]:.4f} first, {ends[1]:.4f} last, {best['val_loss']:.4f} best at step {best['step']:,}"
        )
    accurate = [row for row in rows if "top1" in row]
    if accurate:
        best = max(accurate, key=lambda row: row["top1"])
        items["top-1"] = f"{accurate[-1]['top1']:.2%} last, {best['top1']:.2%} best at step {best['step']:,}"
    if have["loss"]:
        items["loss"] = f"{have['loss'][-1]['loss']:.4f} last"
    if memory is not None:
        items["memory"] = f"{memory:.1f} GiB at most"
    for file, name in FILES.items():
        path = os.path.join(config.out_dir, file)
        if os.path.exists(path):
            items[name] = path
    if last["step"] < config.max_steps and "checkpoint" in items:
        items["resume"] = resume_command()
    if "checkpoint" in items and unit == "tokens":
        items["sample"] = shlex.join(["python", "sample.py", f"--out_dir={config.out_dir}"])
    return [f"{name:<12}{text}" for name, text in items.items()]


def median_of(rows, key):
    """The median of a figure over the rows that have it; None if none has."""
    values = [row[key] for row in rows if key in row]
    return statistics.median(values) if values else None


def resume_command():
    """The command that resumes this run: the one that started it, with --resume."""
    script, *options = sys.argv
    script = os.path.relpath(script)
    if os.path.basename(script) != "train.py" or script.startswith(os.pardir):
        return "the same command with --resume"
    called = [script] if script == "train.py" else ["-m", script.removesuffix(".py").replace(os.sep, ".")]
    world, here = (os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world is None:
        launcher = ["python"]
    elif world == here:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={here}"]
    else:
        return "on every machine the same command with --resume"
    return shlex.join([*launcher, *called, *(word for word in options if word != "--resume"), "--resume"])


def plot_loss(log_path, png_path, what="nats per token"):
    """Draw training and validation loss against step. what: the unit of the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log_path)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, style in (
        ("loss", "training", {"alpha": 0.6}),
        ("val_loss", "validation", {"marker": "o", "ms": 3}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    run = os.path.basename(os.path.dirname(os.path.abspath(log_path)))
    last = next((row for row in reversed(rows) if "val_loss" in row), None)
    end = f": validation loss {last['val_loss']:.4f} at step {last['step']:,}" if last else ""
    axes.set(xlabel="step", ylabel=f"loss ({what})", title=run + end)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, png_path)


def plot_experts(log_path, png_path):
    """Draw how evenly routers load their experts, by the last row that has moe: loads as experts x layers, and entropies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_log(log_path) if "moe" in row]
    if not rows:
        return
    names, layers = list(rows[-1]["moe"]), list(rows[-1]["moe"].values())
    loads = list(zip(*(layer["load"] for layer in layers)))  # a row an expert
    experts = len(loads)
    figure, (map_axes, line_axes) = plt.subplots(
        2, 1, figsize=(max(6, 1.5 + 0.16 * len(names)), 4 + 0.1 * experts), height_ratios=(2, 1), sharex=True,
        layout="constrained",
    )  # fmt: skip
    shares = [[experts * load for load in row] for row in loads]
    image = map_axes.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(image, ax=map_axes, label="rows / fair share", extend="max")
    map_axes.set(ylabel="expert", title=f"step {rows[-1]['step']}: load of the experts", yticks=range(experts))
    for key, label in (("mean_entropy", "of the mean of the gates"), ("token_entropy", "of a token's gates")):
        line_axes.plot([layer[key] for layer in layers], marker="o", ms=3, lw=1, label=label)
    line_axes.set(ylabel="entropy (nats)", ylim=(0, None))
    line_axes.set_xticks(range(len(names)), [name.removeprefix("blocks.") for name in names], rotation=90, fontsize=6)
    line_axes.grid(alpha=0.3)
    line_axes.legend(fontsize=7)
    save_figure(figure, png_path)


def save_figure(figure, png_path, remedy="make room or give another out_dir"):
    """Write a matplotlib figure as a PNG, whole or not at all, and close it. Raises what `writing` raises."""
    import matplotlib.pyplot as plt

    with writing(png_path, remedy), whole_file(png_path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)


@contextmanager
def whole_file(path):
    """A path beside `path`, of this process alone, to write to; after the block, if it raises nothing, that file replaces `path`."""
    part = f"{path}.{socket.gethostname()}.{os.getpid()}.part"
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            os.remove(part)
