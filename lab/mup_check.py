"""Check structure-aware µP by experiment: each check prints a table and writes rows of JSON; two also draw a picture.

    python -m lab.mup_check coords --structures="dense; low_rank; btt" --widths=64,128,256,512 --png=coords.png
    python -m lab.mup_check depth --structures="dense; dense --depth_exponent=1" --n_layers=3,6,12,24
    python -m lab.mup_check lr_landscape --structure=btt --rank=2 --widths=64,128,256 --lrs=2**-12..2**-5

coords         the coordinate check ("Tensor Programs V", arXiv 2203.03466, appendix D): sizes of activations after a
               few Adam steps, and of their change Δh; µP keeps both the same at every width
depth          Δh of the last block and of the logits, for models of one width and several depths
lr_landscape   loss against learning rate, one curve for each width; µP keeps the minimum in one place
               ("Compute Better Spent", ICML 2024, figure 2b)

Checks over widths run twice: with the learning-rate multipliers that belong to each width (optim.py), and without,
that is, with the narrowest model's at all widths, which is one rate for all, tuned at one of them. With a single width
(--widths=256,) the two are the same, and lr_landscape finds the best rate of a structure.

A structure is its name and options of GPTConfig, as on a command line: "btt --rank=2 --normalize=False". ";" separates
structures, quotes hold an option with spaces together ("einsum --theta='.5 .25 .25 .25 .5 .25 0'"), and a number may be
a fraction of the width (--rank=width/4) or its root (--rank=sqrt(width)). Without sizes lr_landscape takes small ones on
a CPU. It first estimates its duration from a step at each width; rows of --json are written after each run, the picture
after each width.
"""

import math
import os
import re
import shlex
import time
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from configurator import ConfigError, as_script, choose_command, load_config, split_configs, split_options, split_words
from options import GPTConfig, RunConfig, check_seed

# ---------------------------------------------------------------------------------------
# Structures and options from the command line


class StructureSpec(NamedTuple):
    """A structure's name and its options, of which some depend on the width: {"rank": "width/4"}."""

    name: str
    options: dict

    def __str__(self):
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def config(self, width, **shape):
        """The GPTConfig of this structure at d_model = width; `shape` holds fields that the check sets itself."""
        values = {"structure": self.name, "d_model": width, **shape}
        for key, value in self.options.items():
            if key in values:
                raise ConfigError(f"structure {self}: {key} is an option of the check, not of a structure: --{key}")
            values[key] = at_width(value, width)
        try:
            return load_config(GPTConfig, [f"--{key}={value}" for key, value in values.items()])
        except ConfigError as error:
            raise ConfigError(f"structure {self} at width {width}: {error}") from None


# What a structure without options means. At rank 1 the size of a low-rank layer's output is that of a single random
# number; and a head of few tokens has no room for a rank that grows with the width.
BARE = {"low_rank": "low_rank --rank=width/4 --structured_layers=attn,ffn", "btt": "btt --rank=2"}


def parse_structures(text):
    """Text of the form in the module's docstring -> [StructureSpec]; bare names as in BARE."""
    specs = [parse_structure(shlex.join(words)) for words in split_configs("structures", text)]
    if not specs:
        raise ConfigError(f"structures={text!r} names none: give some, such as 'dense; btt --rank=2'")
    return [parse_structure(BARE[spec.name]) if spec.name in BARE and not spec.options else spec for spec in specs]


def parse_structure(text):
    """ "btt --rank=width/4 --normalize=False" -> StructureSpec("btt", {"rank": "width/4", "normalize": False})."""
    name, *words = split_words("structure", text) or [""]
    if not name or name.startswith("--"):
        raise ConfigError(f"structure={text!r}: begin with its name, as in 'btt --rank=2'")
    return StructureSpec(name, split_options(f"structure {name}", shlex.join(words)))


def at_width(value, width):
    """A structure's option at this width: "width/4" is 16 at 64; any other value is returned as it is."""
    if value == "sqrt(width)":
        return math.isqrt(width)
    if not isinstance(value, str) or not value.startswith("width"):
        return value
    match = re.fullmatch(r"width(?:\s*//?\s*([1-9]\d*))?", value)
    if not match:
        raise ConfigError(f"{value!r} is no fraction of the width: write width/4, for example")
    return width // int(match[1] or 1)


def parse_lrs(words):
    """Numbers, powers "2**-9" and ranges "2**-12..2**-5", doubling from end to end -> sorted tuple of floats."""
    rates = set()
    for word in words:
        first, *last = (_number(part) for part in str(word).split(".."))
        if not last:
            rates.add(first)
        elif len(last) > 1 or last[0] < first:
            raise ConfigError(f"lrs: {word!r} is no range, write 2**-12..2**-5, the smaller first")
        else:
            rates.update(first * 2**k for k in range(math.floor(math.log2(last[0] / first) + 1e-6) + 1))
    if len(rates) < 2:
        raise ConfigError(f"lrs={words!r}: give two rates or more, 2**-12..2**-5, say")
    return tuple(sorted(rates))


def _number(text):
    match = re.fullmatch(r"\s*2\*\*(-?\d+)\s*", text)
    try:
        value = 2.0 ** int(match[1]) if match else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"lrs: {text!r} is no learning rate, write 1e-3 or 2**-10, say")
    return value


@dataclass
class CheckConfig:
    """Options that all checks share."""

    least_widths: ClassVar[int] = 2
    widths: tuple = (64, 128, 256, 512)  # d_model of the models to compare
    n_layer: int = 2  # transformer blocks
    n_head: int = 2  # attention heads, the same at every width
    block_size: int = 32  # context length, tokens
    batch_rows: int = 8  # sequences in a batch
    steps: int = 5  # Adam steps
    seed: int = 0  # of weights and batches
    seeds: int = 2  # number of runs to average over, with seeds seed, seed + 1, ...
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU where there is one
    png: str | None = None  # file for the picture
    json: str | None = None  # file for the rows

    def __post_init__(self):
        for name in ("n_layer", "n_head", "block_size", "batch_rows", "steps", "seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")
        check_seed("seed", self.seed)
        if self.widths is None:
            return
        few = len(set(self.widths)) < self.least_widths
        if few or not all(isinstance(width, int) and width > 0 for width in self.widths):
            least = {1: "a whole number", 2: "two whole numbers"}[self.least_widths]
            raise ConfigError(f"widths={self.widths}: give {least} or more, such as 64,128,256")
        self.widths = tuple(sorted(set(self.widths)))

    def models(self, structure, vocab_size):
        """{width: GPTConfig}; ConfigError here, before any work, where sizes do not factor."""
        configs = {}
        for width in self.widths:
            shape = dict(n_layer=self.n_layer, n_head=self.n_head, block_size=self.block_size, vocab_size=vocab_size)
            configs[width] = structure.config(width, **shape)
            try:
                configs[width].check_layers()
            except ConfigError as error:
                raise ConfigError(f"structure {structure} at width {width}: {error}") from None
        return configs


@dataclass
class CoordsConfig(CheckConfig):
    structures: str = "dense; low_rank; btt"  # rows of the picture; without options low_rank has rank width/4, btt 2
    lr: float = 5e-4  # base learning rate
    vocab_size: int = 96  # of the random tokens

    def __post_init__(self):
        super().__post_init__()
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: make it more than 0")


@dataclass
class DepthConfig(CheckConfig):
    n_layer: ClassVar[int] = 1  # replaced by n_layers
    widths: ClassVar[tuple] = (64,)
    least_widths: ClassVar[int] = 1
    structures: str = "dense; dense --depth_exponent=1"  # structures with their options
    n_layers: tuple = (3, 6, 12, 24)  # depths of the models to compare
    width: int = 64  # d_model of all models
    lr: float = 5e-4  # base learning rate
    vocab_size: int = 96  # of the random tokens
    png: ClassVar[None] = None

    def __post_init__(self):
        self.widths = (self.width,)
        super().__post_init__()
        if len(set(self.n_layers)) < 2 or not all(isinstance(n, int) and n > 0 for n in self.n_layers):
            raise ConfigError(f"n_layers={self.n_layers}: give two whole numbers or more, such as 3,6,12")
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: make it more than 0")
        self.n_layers = tuple(sorted(set(self.n_layers)))


@dataclass
class LandscapeConfig(CheckConfig):
    least_widths: ClassVar[int] = 1
    structure: str = "btt"  # the structure, with options if any: btt, "btt --rank=2", ...
    rank: int | str | None = None  # the structure's option `rank`: a number, or one such as width/4
    lrs: tuple = ("2**-12..2**-5",)  # base learning rates: numbers, or a range that doubles
    data_dir: str = "data/stdlib_char96"  # folder with prepare_owt.py's files; the default one is prepared when missing
    vocab_size: int | None = None  # at least that of the data; None: that of the data
    widths: tuple | None = None  # d_model of the models to compare; None: 64,128,256,512, on a CPU 64,128,256
    n_layer: int | None = None  # transformer blocks; None: 3, on a CPU 2
    n_head: int = 4  # attention heads, the same at every width
    block_size: int | None = None  # context length, tokens; None: 256, on a CPU 64
    batch_rows: int | None = None  # sequences in a batch; None: 128, on a CPU 8
    steps: int | None = None  # Adam steps; None: 300, on a CPU 100
    warmup_steps: int | None = None  # of linear warm-up, after which the rate is constant; None: a tenth of the steps
    seeds: int = 1  # number of runs to average over, with seeds seed, seed + 1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on GPUs that have it
    without: bool = True  # also use the narrowest model's multipliers at all widths; False: half the runs
    compile: bool = False  # torch.compile: half a minute for each width, then steps take a half to a third of the time

    on_gpu: ClassVar[dict] = dict(widths=(64, 128, 256, 512), n_layer=3, block_size=256, batch_rows=128, steps=300)
    on_cpu: ClassVar[dict] = dict(widths=(64, 128, 256), n_layer=2, block_size=64, batch_rows=8, steps=100)

    def __post_init__(self):
        super().__post_init__()  # checks what is given: mistakes are answered before torch is imported
        self.lrs = parse_lrs(self.lrs)
        from engine.device import choose_device

        sizes = self.on_cpu if choose_device(self.device).type == "cpu" else self.on_gpu
        for name, value in sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.warmup_steps is None:
            self.warmup_steps = self.steps // 10
        if self.warmup_steps < 0 or self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps}: make it at least 0 and less than steps={self.steps}")

    @property
    def kinds(self):
        """Multipliers to compare: with µP and without; with a single width the two are the same."""
        return ("with", "without") if self.without and len(self.widths) > 1 else ("with",)


CONFIGS = {"coords": CoordsConfig, "depth": DepthConfig, "lr_landscape": LandscapeConfig}


def read_options(argv):
    """-> name of the check, its options"""
    choose_command(argv, CONFIGS, "lab.mup_check", "say which check", __doc__)
    return argv[0], load_config(CONFIGS[argv[0]], argv[1:])


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(read_options)

import torch

from data import TokenData
from engine.compiling import order_loops
from engine.device import choose_device, choose_dtype, device_name
from engine.runlog import duration, save_figure, writing
from lab.bench_layers import save_rows
from model import GPT, Attention, Block
from moe import Router
from optim import lr_multipliers, make_optimizers
from prepare_owt import prepare_default


def build_gpt(config, seed, device):
    """A GPT with the weights of `seed`."""
    torch.manual_seed(seed)
    with device:
        return GPT(config)


# ---------------------------------------------------------------------------------------
# Coordinate check


# Kinds of layers with a line in the picture; the spreads cover everything that is measured.
KINDS = ("embedding", "attn.q", "attn.logits", "attn.v", "ffn.up", "ffn.down", "router", "block", "lm_head")


@torch.no_grad()
def coordinates(model, idx):
    """{name: output} for a batch idx (B, T): of embeddings, linear layers and blocks, and the logits of routers and attention."""
    values, hooks = {}, []

    def record(name):
        def hook(module, args, kwargs, output):
            if isinstance(module, Attention):
                q, k = (values.pop(f"{name}.{norm}").double().transpose(1, 2) for norm in ("q_norm", "k_norm"))
                logits = module.scale * q @ k.transpose(-1, -2)  # (B, nh, T, T)
                past = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
                values[f"{name}.logits"] = logits[..., past]
            elif isinstance(module, Router):
                values[name] = args[0] @ module.weight.T
            else:
                values[name] = output.detach()
                if getattr(module, "router", None) is not None:  # some kernels compute its logits themselves
                    x, input_fn = args[0], kwargs.get("input_fn")
                    values[f"{name}.router"] = (x if input_fn is None else input_fn(x)) @ module.router.weight.T

        return hook

    for name, module in model.named_modules():
        norms = name.endswith(("q_norm", "k_norm"))
        if isinstance(module, (Block, Attention, torch.nn.Embedding)) or hasattr(module, "cores") or norms:
            hooks.append(module.register_forward_hook(record(name), with_kwargs=True))
    model(idx)
    for hook in hooks:
        hook.remove()
    return values


def coordinates_after(model, multipliers, lr=5e-4, steps=5, batch_rows=8, seed=0):
    """Outputs as of `coordinates` after `steps` Adam steps on one random batch -> {name: (RMS, RMS of its change since step 0)}.

    multipliers  {parameter name: its learning rate / lr}, as optim.lr_multipliers makes them
    """
    optimizer = make_optimizers(model, RunConfig(lr=lr, weight_decay=0.0), multipliers)
    shape = (batch_rows, model.config.block_size + 1)
    idx = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed + 1))
    idx = idx.to(next(model.parameters()).device)
    first = coordinates(model, idx[:, :-1])
    for _ in range(steps):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def rms(tensor):
        return tensor.square().mean().sqrt().item()

    return {name: (rms(h), rms(h - first[name])) for name, h in coordinates(model, idx[:, :-1]).items()}


MEASURED = ("rms", "change")  # the two figures of coordinates_after


def coordinate_check(structure, config):
    """Sizes of a model's outputs, and of their change in training, at each width; averages over the seeds.

    structure  a StructureSpec;  config  CoordsConfig
    -> {"rms" | "change": {"with": {name: [RMS at each of config.widths]}, "without": the same with the multipliers of the
    narrowest model at all widths}}
    """
    device, models = choose_device(config.device), config.models(structure, config.vocab_size)
    narrow = lr_multipliers(build_gpt(models[config.widths[0]], config.seed, device))
    measured = {what: {"with": {}, "without": {}} for what in MEASURED}
    for kind in ("with", "without"):
        for width in config.widths:
            runs = []
            for seed in range(config.seed, config.seed + config.seeds):
                model = build_gpt(models[width], seed, device)
                multipliers = lr_multipliers(model) if kind == "with" else narrow
                runs.append(coordinates_after(model, multipliers, config.lr, config.steps, config.batch_rows, seed))
            for name in runs[0]:
                for what, values in zip(MEASURED, zip(*(run[name] for run in runs))):
                    measured[what][kind].setdefault(name, []).append(sum(values) / len(values))
    return measured


def largest_spread(sizes):
    """{name: [RMS a width]} -> the largest ratio, over the layers, of the largest RMS to the smallest.

    For sizes the caller leaves attention's logits out: under µP they begin at 8 / √d_head, and only their change keeps its size.
    """

    def spread(values):
        if not all(map(math.isfinite, values)):
            return math.inf
        return 1.0 if max(values) == min(values) else max(values) / max(min(values), 1e-30)

    return max(map(spread, sizes.values()))


def kind_of(name):
    """The kind of a layer or block by its name in the model: "blocks.1.ffn.up" -> "ffn.up", "blocks.1" -> "block"."""
    kind = re.sub(r"^blocks\.\d+\.?", "", name) or "block"
    return "router" if kind.endswith("router") else "embedding" if kind == "token_embedding" else kind


def spreads_of(measured):
    """{"rms" | "change": {"with" | "without": largest spread}} of a coordinate_check."""
    return {
        what: {
            kind: largest_spread({n: v for n, v in of.items() if what == "change" or not n.endswith("logits")})
            for kind, of in kinds.items()
        }
        for what, kinds in measured.items()
    }


def check_coords(config):
    """The command `coords`."""
    device, results = choose_device(config.device), {}
    structures = parse_structures(config.structures)
    for structure in structures:
        config.models(structure, config.vocab_size)
    column = max(len(str(structure)) for structure in structures)
    print(f"largest spread over widths {', '.join(map(str, config.widths))} after {config.steps} steps:")
    print(f"{'':<{column}}  of activations     of their change")
    print(f"{'structure':<{column}}  with muP  without  with muP  without")
    for structure in structures:
        measured = results[str(structure)] = coordinate_check(structure, config)
        spreads = [spreads_of(measured)[what][kind] for what in MEASURED for kind in ("with", "without")]
        print(f"{structure!s:<{column}}", *(f"{spread:8.2f}" for spread in spreads), flush=True)
    if config.png:
        draw_coords({label: measured["change"] for label, measured in results.items()}, config.widths, config.png)
    if config.json:
        settings = ("steps", "lr", "seed", "seeds", "n_layer", "n_head", "block_size", "batch_rows", "vocab_size")
        rows = [
            {
                "what": f"coordinate check: {what}", "structure": label, "multipliers": kind, "widths": config.widths,
                **{name: getattr(config, name) for name in settings},
                "largest_spread": _finite(spreads_of(measured)[what][kind]),
                "rms": {name: list(map(_finite, values)) for name, values in measured[what][kind].items()},
            }
            for label, measured in results.items()
            for what in MEASURED
            for kind in ("with", "without")
        ]  # fmt: skip
        save_rows(config.json, rows, device)


def draw_coords(results, widths, path):
    """Draw the RMS of changes against width, a row of two panels for each structure. results: {label: changes of coordinate_check}"""
    plt = _pyplot()
    figure, grid = plt.subplots(
        len(results), 2, figsize=(8.5, 2.7 * len(results) + 0.7), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    titles = {"with": "µP", "without": f"rates of width {widths[0]} for all"}
    for (label, sizes), axes_of_row in zip(results.items(), grid):
        for kind, axes in zip(("with", "without"), axes_of_row):
            for at, layer_kind in enumerate(KINDS):
                layers = [values for name, values in sizes[kind].items() if kind_of(name) == layer_kind]
                if not layers:  # the model has no router
                    continue
                mean = [sum(values) / len(values) for values in zip(*layers)]  # over depth
                axes.plot(widths, mean, marker="o", ms=3.5, lw=1.5, color=f"C{at}", label=layer_kind)
            spread = largest_spread(sizes[kind])
            axes.set_title(f"{label}\n{titles[kind]}: largest spread ×{spread:.3g}", fontsize=9)
            axes.set_yscale("log")
            _width_axis(axes, widths)
            axes.grid(alpha=0.3)
        axes_of_row[0].set_ylabel("RMS of the change")
    for axes in grid[-1]:
        axes.set_xlabel("width")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS), fontsize=9, frameon=False)
    _save(figure, path)


# ---------------------------------------------------------------------------------------
# Depth


def depth_check(structure, config):
    """{"block" | "lm_head" | …: [RMS of the change at each of config.n_layers]}, averages over the seeds.

    "block" is the last block; layers that every block has are means over depth.
    """
    device, changes = choose_device(config.device), {}
    for n_layer in config.n_layers:
        shape = dict(n_layer=n_layer, n_head=config.n_head, block_size=config.block_size, vocab_size=config.vocab_size)
        at_depth = {}
        for seed in range(config.seed, config.seed + config.seeds):
            model = build_gpt(structure.config(config.width, **shape), seed, device)
            run = coordinates_after(model, lr_multipliers(model), config.lr, config.steps, config.batch_rows, seed)
            for name, (_, change) in run.items():
                if kind_of(name) != "block" or name == f"blocks.{n_layer - 1}":
                    at_depth.setdefault(kind_of(name), []).append(change)
        for kind, values in at_depth.items():
            changes.setdefault(kind, []).append(sum(values) / len(values))
    return changes


def check_depth(config):
    """The command `depth`."""
    rows, device = [], choose_device(config.device)
    structures = parse_structures(config.structures)
    column = max(len(str(structure)) for structure in structures)
    print(
        f"change after {config.steps} steps at {', '.join(map(str, config.n_layers))} layers of width {config.width}:"
    )
    for structure in structures:
        changes = depth_check(structure, config)
        for kind in ("block", "lm_head"):
            name = {"block": "last block"}.get(kind, kind)
            print(f"{structure!s:<{column}}  {name:<10}", *(f"{value:8.3f}" for value in changes[kind]), flush=True)
        settings = ("steps", "lr", "seed", "seeds", "width", "n_head", "block_size", "batch_rows", "vocab_size")
        rows.append(
            {
                "what": "change over depths", "structure": str(structure), "n_layers": config.n_layers,
                **{name: getattr(config, name) for name in settings},
                "change": {kind: list(map(_finite, values)) for kind, values in changes.items()},
            }
        )  # fmt: skip
    if config.json:
        save_rows(config.json, rows, device)


# ---------------------------------------------------------------------------------------
# Loss against learning rate


class Landscape(NamedTuple):
    """Final losses of the finished runs, each the mean over the seeds that are finished."""

    losses: dict  # {"with": {width: [loss at each rate, None if none is finished]}, "without": …}
    initial: float  # loss before the first step, mean over runs
    whole: tuple  # widths whose runs are all finished


def lr_landscape(config, say=print, save=lambda landscape: None):
    """Final training loss of every width at every rate, with each width's own multipliers and without.

    config  LandscapeConfig
    save    called with a Landscape after every run
    -> {"with": {width: [loss at each of config.lrs]}, "without": the same}, for config.kinds; initial loss.
    Losses are nats per token, means over the last tenth of the steps and over the seeds, nan where a run's loss is not
    finite; the initial loss is the mean over widths and seeds before the first step. All runs of a seed see the same
    batches, and those of a seed and width start from the same weights.
    """
    structure = parse_structure(config.structure)
    if config.rank is not None:
        if "rank" in structure.options:
            raise ConfigError(f"rank={config.rank} with structure={config.structure!r}: give the rank once")
        structure.options["rank"] = config.rank
    prepare_default(config.data_dir)
    data = TokenData(config.data_dir, config.block_size)
    vocab_size = config.vocab_size or data.meta["vocab_size"]
    if vocab_size < data.meta["vocab_size"]:
        raise ConfigError(
            f"vocab_size={vocab_size}: {config.data_dir} has {data.meta['vocab_size']}, give at least that"
        )
    models = config.models(structure, vocab_size)
    device = choose_device(config.device)
    dtype = matmul_dtype(config, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.set_float32_matmul_precision("high")

    seeds = range(config.seed, config.seed + config.seeds)
    narrow = lr_multipliers(build_gpt(models[config.widths[0]], config.seed, device))
    kinds = config.kinds
    runs = {kind: {width: [[] for _ in config.lrs] for width in config.widths} for kind in kinds}
    initial, done, whole = [], 0, ()
    total = sum(runs_at(width, config) for width in config.widths)
    seconds = {width: seconds_of_run(models[width], data, config, device, autocast) for width in config.widths}
    planned = [seconds[width] for width in config.widths for _ in range(runs_at(width, config))]
    less = ", less where torch.compile helps" if config.compile else ""
    say(
        f"{total} runs of {config.steps} steps on {device_name(device)}: about {duration(sum(planned))}{less}",
        flush=True,
    )
    started = time.perf_counter()

    def landscape():
        losses = {
            kind: {
                width: [sum(seen) / len(seen) if seen else None for seen in of_rates] for width, of_rates in of.items()
            }
            for kind, of in runs.items()
        }
        for kind in kinds[1:]:  # the same runs as "with" at the narrowest width
            losses[kind][config.widths[0]] = list(losses["with"][config.widths[0]])
        return Landscape(losses, sum(initial) / len(initial), whole)

    for width in config.widths:
        model = build_gpt(models[width], config.seed, device)
        choices = {"with": lr_multipliers(model), "without": narrow}  # the same at the narrowest width
        choices = {kind: choices[kind] for kind in (kinds[:1] if width == config.widths[0] else kinds)}
        compiled = model
        if config.compile:
            order_loops(device)
            torch.compiler.reset()  # compile each width anew, not as another width with dynamic shapes
            compiled = torch.compile(model, dynamic=False)
        for seed in seeds:
            weights = {
                name: tensor.clone() for name, tensor in build_gpt(models[width], seed, device).state_dict().items()
            }
            batches = stage_batches(data, seed, config, device)
            for kind, multipliers in choices.items():
                for at, lr in enumerate(config.lrs):
                    model.load_state_dict(weights)
                    optimizer = make_optimizers(model, RunConfig(lr=lr, weight_decay=0.0), multipliers)
                    first, last = train_model(compiled, optimizer, lr, config.warmup_steps, batches, autocast)
                    runs[kind][width][at].append(last)
                    initial.append(first)
                    done += 1
                    elapsed = time.perf_counter() - started
                    left = elapsed * sum(planned[done:]) / sum(planned[:done])
                    say(
                        f"{done}/{total} | width {width} | {kind} muP | lr {_rate(lr)} | loss {last:.4f} | "
                        f"{elapsed:.1f} s" + (f", about {duration(left)} left" if done < total else ""),
                        flush=True,
                    )
                    if done == sum(runs_at(each, config) for each in config.widths if each <= width):
                        whole = (*whole, width)
                    save(landscape())
    return landscape()[:2]


def runs_at(width, config):
    """Number of runs at this width."""
    return (1 if width == config.widths[0] else len(config.kinds)) * len(config.lrs) * config.seeds


def seconds_of_run(shape, data, config, device, autocast):
    """Estimated seconds of a run of this GPTConfig, from its second step, not compiled."""
    model = build_gpt(shape, config.seed, device)
    optimizer = make_optimizers(model, RunConfig(lr=1e-3, weight_decay=0.0))
    batches = stage_batches(data, config.seed, config, device, steps=1)
    train_model(model, optimizer, 1e-3, 0, batches, autocast)
    began = time.perf_counter()
    train_model(model, optimizer, 1e-3, 0, batches, autocast)
    return config.steps * (time.perf_counter() - began)


def matmul_dtype(config, device):
    """The dtype of matrix products; float32 where choose_dtype returns float16, which would need a scaled loss."""
    dtype = choose_dtype(config.dtype, device)
    return torch.float32 if dtype == torch.float16 else dtype


def stage_batches(data, seed, config, device, steps=None):
    """Training batches on the device, int32 (steps, batch_rows, block_size + 1), shared by many runs; steps None: config's."""
    batches = torch.empty(steps or config.steps, config.batch_rows, config.block_size + 1, dtype=torch.int32)
    for step in range(len(batches)):
        x, y = data.train_batch(seed, step, config.batch_rows, 0, config.batch_rows)
        batches[step] = torch.cat((x, y[:, -1:]), dim=1)
    return batches.to(device)


def train_model(model, optimizer, lr, warmup_steps, batches, autocast):
    """Train on `batches` -> loss before the first step, mean loss over the last tenth; nan where it is not finite."""
    steps, losses = len(batches), []
    for step in range(steps):
        optimizer.set_lr(lr * min(1.0, (step + 1) / max(1, warmup_steps)))
        tokens = batches[step].long()  # (batch_rows, block_size + 1)
        with autocast:
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        # Reading a loss waits for the device, so check only every 50 steps.
        if step % 50 == 49 and not math.isfinite(loss.item()):
            return losses[0].item(), math.nan
    tail = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
    return losses[0].item(), tail if math.isfinite(tail) else math.nan


def best_lrs(losses, lrs):
    """{width: [loss at each rate]} -> {width: (best rate, its loss)}; (None, nan) where no loss is finite."""
    best = {}
    for width, values in losses.items():
        finite = [(loss, lr) for loss, lr in zip(values, lrs) if loss is not None and math.isfinite(loss)]
        loss, lr = min(finite, default=(math.nan, None))
        best[width] = lr, loss
    return best


def check_landscape(config):
    """The command `lr_landscape`."""
    label = str(parse_structure(config.structure)) + ("" if config.rank is None else f", rank={config.rank}")
    drawn = []

    def save(landscape):
        if config.json:
            write_landscape(landscape.losses, landscape.initial, label, config)
        if config.png and len(landscape.whole) > len(drawn):
            drawn.append(landscape.whole[-1])
            losses = {kind: {width: of[width] for width in landscape.whole} for kind, of in landscape.losses.items()}
            draw_landscape(losses, config.lrs, landscape.initial, label, config.png)

    losses, initial = lr_landscape(config, save=save)
    best = {kind: best_lrs(losses[kind], config.lrs) for kind in losses}
    print(f"\n{label}: best learning rate and its loss (initial loss {initial:.3f})")
    print(f"{'width':>6}", *(f"{kind + ' muP':>19}" for kind in best))
    for width in config.widths:
        cells = [
            f"{'none' if lr is None else _rate(lr):>10} {loss:7.4f}" for lr, loss in (best[k][width] for k in best)
        ]
        print(f"{width:>6}", *(f"{cell:>19}" for cell in cells))


def write_landscape(losses, initial, label, config):
    """Write a row of JSON for each rate with a finished run."""
    device = choose_device(config.device)
    settings = (
        "steps", "warmup_steps", "seed", "seeds", "n_layer", "n_head", "block_size", "batch_rows", "data_dir",
    )  # fmt: skip
    common = {
        "what": "loss against learning rate", "structure": label,
        "dtype": str(matmul_dtype(config, device)).removeprefix("torch."), "compile": config.compile,
        **{name: getattr(config, name) for name in settings}, "initial_loss": _finite(initial),
    }  # fmt: skip
    best = {kind: best_lrs(of, config.lrs) for kind, of in losses.items()}
    rows = [
        {
            **common, "multipliers": kind, "width": width, "lr": lr, "loss": _finite(loss),
            "best": lr == best[kind][width][0],
        }
        for kind in losses
        for width in config.widths
        for lr, loss in zip(config.lrs, losses[kind][width])
        if loss is not None
    ]  # fmt: skip
    save_rows(config.json, rows, device)


def draw_landscape(losses, lrs, initial, label, path):
    """Draw `losses`, as of lr_landscape. Runs that diverged, or end above the initial loss, are drawn at the initial loss."""
    plt = _pyplot()
    figure, grid = plt.subplots(
        1, len(losses), figsize=(4.5 * len(losses), 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    panels, widths = grid[0], list(losses["with"])
    titles = {"with": "µP", "without": f"rates of width {widths[0]} for all"}
    for kind, axes in zip(losses, panels):
        for at, (width, values) in enumerate(losses[kind].items()):
            color = plt.get_cmap("viridis")(0.9 - 0.9 * at / max(1, len(widths) - 1))
            shown = [min(loss, initial) if math.isfinite(loss) else initial for loss in values]
            axes.plot(lrs, shown, marker="o", ms=3.5, lw=1.6, color=color, label=f"width {width}")
            lowest = min(range(len(shown)), key=shown.__getitem__)
            axes.plot(lrs[lowest], shown[lowest], marker="*", ms=14, color=color, mec="black", mew=0.8, zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_title(f"{label}\n{titles[kind]}", fontsize=10)
        axes.set_xlabel("base learning rate")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("final training loss (nats a token)")
    if panels[0].get_ylim()[1] > initial:  # some run is drawn there
        for axes in panels:
            axes.axhline(initial, color="gray", ls=":", lw=1)
        panels[0].text(lrs[0], initial, "initial loss", fontsize=8, color="gray", va="bottom")
    panels[0].legend(fontsize=9, title="star: the minimum", title_fontsize=8)
    _save(figure, path)


# ---------------------------------------------------------------------------------------
# Files


def _finite(value):
    """The value, or None where it is not finite: JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def _rate(lr):
    """A learning rate as text: "2**-9" if it is a power of two, "0.003" otherwise."""
    exponent = math.log2(lr)
    return f"2**{exponent:.0f}" if exponent.is_integer() else f"{lr:.3g}"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _width_axis(axes, widths):
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, map(str, widths))
    axes.minorticks_off()


def _save(figure, path):
    save_figure(figure, path, remedy="give another --png")


def main(argv):
    name, config = read_options(argv)
    for option in ("png", "json"):  # find out now whether they can be written, not after the work
        path = getattr(config, option)
        if path:
            with writing(path, f"give another --{option}"):
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                new = not os.path.exists(path)
                open(path, "a").close()
            if new:
                os.remove(path)
    {"coords": check_coords, "depth": check_depth, "lr_landscape": check_landscape}[name](config)


if __name__ == "__main__":
    as_script(main)
