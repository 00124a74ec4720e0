"""Search for structures: which θ, rank and number of experts train best for the same FLOPs.

    python -m lab.search config/quickstart.py --n_layer=2 --d_model=64 --max_steps=600 --trials=60   # into out/search
    python -m lab.search                                                           # on a CPU: a small search, of minutes
    python -m lab.search config/quickstart.py --storage=postgresql://me@host/db …                    # on several machines
    python -m lab.search --report                                                  # table and picture of the trials so far
    python -m lab.search my_structures.py config/quickstart.py --choices="{'structure': 'banded', 'bands': (1, 2, 4)}"

The search space is that of "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices" (NeurIPS
2024, arXiv 2410.02117, section 3); with `choices` it is options of named structures instead. The budget of a trial is
what the dense model of width d_model costs in max_steps. A trial draws a point, takes the width at which its model costs
as many FLOPs per token, and trains by train.py for as many steps as use up the budget; it ends early if its validation
loss lags behind (successive halving). What is searched (structure, theta, rank, …) overrides config files. All other
options are those of train.py; `seed` is also the seed of the search. A file that adds structures of your own
(theta.Structure) must set no options. On a CPU, without a config file, the options are those of SMALL below. The search
first prints how long it will take, from the speed of the dense model, and corrects that after every trial.

The storage holds everything about a trial except its log, which is in out/trial_N. The same command resumes, until
`trials` trials have ended; a trial that was interrupted or killed resumes from its checkpoint. Commands with the same
storage search together, on any number of machines; SQLite serves one. Ending a search, even with SIGKILL, ends its trials.
"""

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import socket
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from configurator import ConfigError, as_script, load_config, read_config_file
from options import STRUCTURE_FIELDS, TrainConfig, at_least, check_top_k
from theta import ALIGNMENT, all_options, find_structure

# Options of train.py that each trial sets, and their values before that.
OWNED = {
    **STRUCTURE_FIELDS, "structure": "dense", "align_heads": False, "moe": "none", "num_experts": 8,
    "out_dir": "out/run", "resume": False, "sample_tokens": 0,
}  # fmt: skip


def as_choices(values):
    """Values to choose from, as a tuple; one value alone may be given without."""
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


@dataclass
class SearchConfig(TrainConfig):
    trials: int = 60  # trials in total, on all machines; those that end early count, failed ones do not
    out: str = "out/search"  # folder of the trials, table.md, search.json and search.png
    storage: str | None = None  # URL of a database that several machines share; None: sqlite:///OUT/search.db
    study: str = "search"  # the search's name in the storage
    sampler: Literal["tpe", "cmaes", "random"] = "tpe"  # the algorithm that draws the points
    prune: int = 3  # at evaluations 1, 3, 9, … one in this many trials continues; 0: all train to the end
    max_width: int | None = None  # largest width of a trial's model; None: 8 times d_model
    max_rank: float = 1.0  # largest exponent of the rank index
    choices: dict | None = None  # search these options instead of theta: {"structure": "btt", "rank": (1, 2, 4)}
    experts: tuple | int = 1  # numbers of experts to choose from: 1,4,8; 1: no mixture; others have beta = delta = 0
    jobs: int = 1  # trials at a time on each GPU, or on the CPU
    gpus: int | None = None  # GPUs to use; None: all that are here, or that CUDA_VISIBLE_DEVICES names
    report: bool = False  # run no trials, only make the table and picture of those in the storage

    hidden = tuple(OWNED)  # from the help: search_options refuses them

    def __post_init__(self):
        for name, value in OWNED.items():
            setattr(self, name, value)
        self.experts = self.experts if isinstance(self.experts, tuple) else (self.experts,)
        if not self.experts or not all(type(number) is int and number >= 1 for number in self.experts):
            raise ConfigError(f"experts={self.experts}: give whole numbers of 1 or more, such as 1,4,8")
        for number in self.experts:
            if number > 1:
                check_top_k("top_k", self.top_k, number)
                self.moe, self.num_experts = "linear", number  # so that the options of mixtures may be given
        super().__post_init__()
        self.max_width = 8 * self.d_model if self.max_width is None else self.max_width
        at_least(1, self, "trials", "jobs")
        at_least(0, self, "max_rank", *(["gpus"] if self.gpus is not None else []))
        if self.max_rank > 1:
            raise ConfigError(f"max_rank={self.max_rank}: make it at most 1, the exponent of full rank")
        if self.choices is not None:
            known = ("structure", *all_options().keys() - ALIGNMENT)
            for name, values in self.choices.items():
                if name not in known:
                    raise ConfigError(f"choices: {name!r} is no option of a structure, choose from {', '.join(known)}")
                if values in ((), []):
                    raise ConfigError(f"choices: {name} has no values: give some")
            for name in as_choices(self.choices.get("structure", ())):
                find_structure(name)
            if "structure" not in self.choices:
                raise ConfigError(f"choices={self.choices}: name the structure, {{'structure': 'btt', …}}")
        if self.prune < 0 or self.prune == 1:
            raise ConfigError(f"prune={self.prune}: make it 2 or more, or 0 for none")
        if self.max_width < self.d_model:
            raise ConfigError(f"max_width={self.max_width}: make it at least d_model={self.d_model}, the dense model's")
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError("sampler='cmaes' needs a package: pip install cmaes, or take tpe")
        if self.storage is not None and "://" not in self.storage:
            raise ConfigError(
                f"storage={self.storage}: give a URL, such as sqlite:///search.db or postgresql://me@host/db"
            )


def search_options(argv):
    """Words of the command line -> SearchConfig. ConfigError for options that each trial sets."""
    for word in argv:
        option = word[2:].partition("=")[0]
        if word.startswith("--") and option in OWNED:
            raise ConfigError(f"--{option} is set by each trial: leave it out (a search has --out and --experts)")
    return load_config(SearchConfig, argv)


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(search_options)

import torch

import train
from data import TokenData
from engine.checkpoint import PLACES
from engine.device import choose_device, choose_dtype, device_name
from engine.ownership import is_alive
from engine.runlog import duration, is_number, read_log, writing
from lab.children import start_child, stop_as_by_ctrl_c, stop_children
from lab.search_report import dotted, write_report
from lab.sweep import gpus_to_use
from model import GPT
from optim import make_optimizers
from options import GPTConfig, as_fields
from prepare_owt import prepare_default
from theta import BTT, Sizes, canonical, factor_sizes, layer_sizes, taxonomy

try:
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    raise ConfigError("lab.search needs optuna: pip install optuna cmaes") from None

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

WITHOUT_EXPERTS = {"top_k": 2, "share_router": False, "eval_top_k": None}  # what train.py requires without a mixture
# Options that may differ when a search resumes, or between machines: losses do not depend on them.
FREE = (
    "trials", "out", "storage", "study", "sampler", "prune", "jobs", "gpus", "report", "data_dir", "device", "compile",
    "cuda_graphs", "timeout", "bucket_mb", "micro_batch", "save", "save_minutes", "keep_every", "keep_best", "log_interval",
    "wandb", "wandb_project", "fused_loss", "activation_checkpointing",
)  # fmt: skip

# Options of a search without a config file on a CPU, where train.py's defaults would take weeks.
SMALL = ["config/quickstart.py", "--n_layer=2", "--n_head=2", "--d_model=32", "--max_steps=800", "--eval_interval=133"]

START = 6  # seconds until a trial's first step, for an estimate: to start Python and torch, without compiling
STALE = 300  # seconds without a sign of life after which another machine's trial is tried again
FAILURES = 5  # failed runs in a row after which the search gives up
MISFITS = 50  # points in a row with nothing to train after which the search gives up
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


# ---------------------------------------------------------------------------------------
# The space


class Point(NamedTuple):
    theta: (
        tuple | None
    )  # seven exponents, of three decimals: what the table shows is what was trained; None with choices
    experts: int  # 1: no mixture
    chosen: dict = {}  # with choices, a structure and its options

    def layer_options(self):
        """The structure and its options, as arguments of theta.layer_sizes."""
        return self.chosen or {"structure": "einsum", "theta": self.theta}

    def label(self):
        """The point in words."""
        return chosen_label(self.chosen) if self.chosen else f"theta={self.theta}"


def chosen_label(chosen):
    """{"structure": "banded", "bands": 4} -> "banded, bands=4"."""
    others = (f"{name}={value}" for name, value in chosen.items() if name != "structure")
    return ", ".join([chosen["structure"], *others])


class Space(NamedTuple):
    """The space as five or six continuous numbers between 0 and 1.

    The exponents of the input are a point in a triangle, as are those of the output: uniformly distributed if the numbers
    are. To swap (α δ) with (β ε) only renames the cores, hence α ≥ β: every structure is met once. θρ is a share of
    the largest exponent with which a layer costs no more than a dense one (ν ≤ 1).
    """

    max_rank: float = 1.0
    experts: tuple = (1,)
    choices: dict = {}  # {option of a structure: values to choose from}, in place of θ

    def draw(self, trial):
        """Draw the Point of an optuna trial."""
        if self.choices:
            options = {key: self.draw_one(trial, key, as_choices(values)) for key, values in self.choices.items()}
            heeded = find_structure(options["structure"]).options
            chosen = {key: value for key, value in options.items() if key == "structure" or key in heeded}
            return Point(None, self.draw_one(trial, "experts", self.experts), chosen)
        u = {key: trial.suggest_float(key, 0, 1) for key in ("input", "input_split", "output", "output_split", "rank")}
        experts = self.draw_one(trial, "experts", self.experts)
        if experts > 1:  # they are rank slices of a BTT
            u["input_split"] = u["output_split"] = 0
        s, t = math.sqrt(u["input"]), math.sqrt(u["output"])
        b, d = round(s * u["input_split"] / 2, 3), round(t * u["output_split"], 3)
        a, e = round(s - b, 3), round(t - d, 3)
        r = u["rank"] * min(self.max_rank, max(min(a, e), min(b, d)))
        return Point((a, b, abs(round(1 - a - b, 3)), d, e, abs(round(1 - d - e, 3)), round(r, 3)), experts)

    def draw_one(self, trial, name, values):
        """Draw one of the values; neighbours in the list are neighbours for the sampler."""
        which = trial.suggest_float(name, 0, 1) if len(values) > 1 else 0
        return values[min(int(which * len(values)), len(values) - 1)]


def make_sampler(kind, seed):
    """The optuna sampler that SearchConfig.sampler names."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


# ---------------------------------------------------------------------------------------
# The search


class TrialFailed(Exception):
    """A trial whose run failed."""


class Misfit(Exception):
    """A point with nothing to train: no model fits the budget, or the model was trained before. Another point is drawn."""


def search(study, space, objective, trials, sampler="tpe", seed=0, slots=(None,), say=lambda trial: None):
    """Draw points and run the objective on them until `trials` trials of the study have ended, on any machine.

    objective(trial, point, slot)  a generator, so that one thread can run several: it yields (evaluation, loss), with
        evaluations counted from 1, or None while there is nothing new, and returns the final loss. It may raise
        TrialFailed and Misfit. When it is closed or thrown an optuna.TrialPruned, it ends what it runs.
    slots                          as many trials run at a time; each tells its objective where to run
    say(frozen trial)              is called for each trial that ends
    Raises ConfigError after too many failures in a row. If interrupted, it leaves its running trials to be tried again.
    """
    running, free, beaten, failures, misfits = {}, list(slots), time.monotonic(), 0, 0
    try:
        while True:
            if free:
                recover_trials(study, running)
                left = trials - len(study.get_trials(deepcopy=False, states=ENDED))
                if left <= 0 and not running:
                    return
                left -= len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
                for _ in range(min(left, len(free))):
                    trial = study.ask()
                    sign_of_life(trial)
                    # Optuna draws when the space asks it to. Seeds by trial number never draw the same twice, even after
                    # a restart. A sampler that keeps returning to known models is replaced by chance for a while.
                    kind = sampler if misfits < 5 else "random"
                    study.sampler = make_sampler(kind, (10_007 * seed + trial.number) % 2**32)
                    slot = free.pop(0)
                    running[trial.number] = trial, objective(trial, space.draw(trial), slot), slot
            if time.monotonic() - beaten > STALE / 5:
                beaten = time.monotonic()
                for trial, _, _ in running.values():
                    sign_of_life(trial)
            idle = True
            for number, (trial, run, slot) in list(running.items()):
                news, ended, error = advance_trial(study, trial, run)
                idle = idle and not news
                if ended is None:
                    continue
                del running[number]
                free.append(slot)
                say(ended)
                misfits = misfits + 1 if isinstance(error, Misfit) else 0
                failures = failures + isinstance(error, TrialFailed) if error else 0
                if misfits == MISFITS:
                    raise ConfigError(f"{misfits} points in a row have no new model of this budget, the last: {error}")
                if failures == FAILURES:
                    raise ConfigError(f"{failures} trials in a row failed, the last: {error}")
            if idle:
                time.sleep(0.2 if running else 2)
    finally:
        for trial, run, _ in running.values():
            run.close()
            put_back_trial(study, trial)


def advance_trial(study, trial, run):
    """Advance a trial to its next evaluation, if that is due -> whether it was, the frozen trial if it ended, its error."""
    try:
        news = next(run)
        if news is not None:
            evaluation, loss = news
            trial.report(loss, evaluation)
            if trial.should_prune():
                run.throw(optuna.TrialPruned())
        return news is not None, None, None
    except StopIteration as done:
        return True, study.tell(trial, done.value, skip_if_finished=True), None
    except optuna.TrialPruned:
        return True, study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True), None
    except (TrialFailed, Misfit) as error:
        trial.set_user_attr("reason", str(error))
        return True, study.tell(trial, state=TrialState.FAIL, skip_if_finished=True), error
    except optuna.exceptions.UpdateFinishedTrialError:  # another machine heard nothing of this one and took it
        run.close()
        return True, study.trials[trial.number], None


def sign_of_life(trial):
    """Note in the storage that this process runs the trial now."""
    trial.set_user_attr("owner", {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})


def recover_trials(study, running):
    """Put back running trials whose search is gone: its process does not exist here, or gave no sign of life for long."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner") or {"host": None, "time": trial.datetime_start.timestamp()}
        gone = time.time() - owner["time"] > STALE
        if owner["host"] == socket.gethostname():
            gone = trial.number not in running if owner["pid"] == os.getpid() else not is_alive(owner["pid"])
        if gone:
            put_back_trial(study, trial)


def put_back_trial(study, trial):
    """Mark a trial that did not end as failed, without a reason, and queue its point and folder again."""
    with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another machine did it first
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs.get("folder")})


# ---------------------------------------------------------------------------------------
# The model of a point


def fit_model(config, point, budget):
    """The model of this point for `budget` FLOPs per token -> its options of train.py, its figures.

    Among the widths that are multiples of n_head, have small prime factors and fit the budget, it has the costliest. What
    is left of the budget, since widths are discrete, makes more steps. Misfit if half of the budget or more is left:
    the structure is so cheap that even max_width does not use it up, or θ has no sizes near it at the widths that would.
    """
    options = as_fields(point.layer_options())
    if point.experts > 1:
        options.update(moe="linear", num_experts=point.experts)
    best, most, may_fit, why = None, budget / 2, config.max_width, ""
    for width in range(config.max_width // config.n_head * config.n_head, 0, -config.n_head):
        if width > may_fit or 210**20 % (width // config.n_head):  # the latter: a prime factor above 7
            continue
        try:
            sizes = layer_sizes(width, width, **point.layer_options())
            model = meta_model(config, **options, d_model=width)
        except ConfigError as error:
            why = f"; {error}"
            continue
        flops = model.flops_per_token()
        if most < flops <= budget:
            best, most = (width, sizes, model), flops
        # FLOPs fall with the square of the width or more slowly, apart from a factor of 2 from rounding sizes.
        may_fit = width * math.sqrt(2 * budget / flops)
        if flops < budget / 4:
            break
    if best is None:
        raise Misfit(
            f"{point.label()}: no width up to max_width={config.max_width} uses half to all of the budget{why}"
        )
    width, sizes, model = best
    steps = round(config.max_steps * budget / most)
    options.update(d_model=width, max_steps=steps, eval_interval=math.ceil(steps / evaluations(config)))
    shapes = [tuple(core.shape) for module in model.modules() if hasattr(module, "cores") for core in module.cores]
    omega, psi, nu = taxonomy_of_sizes(sizes)
    figures = {
        "theta": point.theta, "experts": point.experts, "sizes": sizes if isinstance(sizes, Sizes) else None,
        "structure": chosen_label(point.chosen) if point.chosen else name_of_sizes(sizes), "omega": omega, "psi": psi, "nu": nu,
        "d_model": width, "parameters": sum(each.numel() for each in model.parameters()),
        "steps": steps, "flops": 3 * most * steps * config.batch_tokens,
        # What tells models apart: different θ may give the same sizes.
        "key": hashlib.sha256(repr((width, point.experts, shapes, *point.chosen.items())).encode()).hexdigest()[:16],
    }  # fmt: skip
    return options, figures


def meta_model(config, **options):
    """A GPT on the meta device, dense unless the options name another structure."""
    with torch.device("meta"):
        return GPT(dense_config(config, **options))


def dense_config(config, **options):
    """The GPTConfig of a search's models, dense unless the options name another structure."""
    names = {field.name for field in fields(GPTConfig)}
    options = {**{name: getattr(config, name) for name in names}, **OWNED, **options}
    if options["moe"] == "none":
        options.update(WITHOUT_EXPERTS)
    return GPTConfig(**{name: options[name] for name in names})


def evaluations(config):
    """The number of evaluations of every trial; the last is at its end."""
    return max(1, round(config.max_steps / config.eval_interval))


def taxonomy_of_sizes(sizes):
    """(ω, ψ, ν) of a d -> d layer by its actual sizes, not by θ, whose small exponents round to sizes of 1.

    Three times None for structures without seven sizes: those of three cores or more, and those of your own.
    """
    if sizes is None:  # dense
        return 0.0, 1.0, 1.0
    if not isinstance(sizes, Sizes):
        return None, None, None
    d = math.prod(sizes[:3])
    return tuple(abs(round(value, 4)) for value in taxonomy([math.log(size, max(2, d)) for size in sizes]))


def name_of_sizes(sizes):
    """The name of a d -> d layer of these sizes, "" if it has none."""
    a, b, g, d, e, f, r = canonical(sizes)
    if r == min(a * d, b * e):
        return "dense"  # each of its blocks has full rank
    if g == f == 1:
        kind = "low-rank" if b == d == 1 else "TT" if r > 1 else "Kronecker"
    elif b == d == 1:
        kind = "BTT" if (a, g, e, f) == factor_sizes(a * g, a * g, BTT)[0:5:2] + (f,) else "BTT family"
    else:
        return ""
    return kind if kind == "Kronecker" else f"{kind}, rank {r}"


# ---------------------------------------------------------------------------------------
# A trial, by train.py


def make_objective(study, config, files=()):
    """The objective of `search`, which trains by train.py; a slot is the number of a GPU, or None.

    files: config files that add structures
    """
    budget = meta_model(config).flops_per_token()
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    where = {"device": device_name(torch.device("cuda" if on_gpu else "cpu")), "torch": torch.__version__}

    def objective(trial, point, slot):
        options, figures = fit_model(config, point, budget)
        for twin in study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING)):
            if twin.user_attrs.get("model", {}).get("key") == figures["key"] and twin.number != trial.number:
                raise Misfit(f"{point.label()} makes the model of trial {twin.number}")
        before = trial.user_attrs.get("folder")
        folder = before or os.path.join(config.out, f"trial_{trial.number}")
        options = train_options(config, options)
        again = shlex.join(["python", "train.py", *files, *changed_words(options)])
        trial.set_user_attr("folder", folder)
        trial.set_user_attr("model", {**figures, **where, "command": again})
        options.update(out_dir=folder, resume=before is not None)
        return (yield from run_training(options, folder, slot, evaluations(config), files))

    return objective


def train_options(config, options):
    """All options of train.py for a trial."""
    ours = {field.name: getattr(config, field.name) for field in fields(train.TrainConfig)}
    return ours | OWNED | ({} if "moe" in options else WITHOUT_EXPERTS) | options


def changed_words(options):
    """The options that differ from train.py's defaults, as words of its command line."""
    defaults = {field.name: field.default for field in fields(train.TrainConfig)}
    return [f"--{key}={value}" for key, value in options.items() if value != defaults[key]]


def run_training(options, folder, slot, evaluations, files=()):
    """Train in a process of its own -> its final loss; yields (evaluation, loss) from its log, None while nothing is new."""
    env = {**os.environ, **({} if slot is None else {"CUDA_VISIBLE_DEVICES": slot})}
    with writing(folder, "give another --out"):
        os.makedirs(folder, exist_ok=True)
        output = open(os.path.join(folder, "train.log"), "a")
    with output:
        while not lock_file(output):  # a killed search's run may still be saving
            yield None
        process = start_child([sys.executable, "-m", "train", *files, *changed_words(options)], output, env)
    steps, every, seen, interrupted = options["max_steps"], options["eval_interval"], 0, True
    try:
        while True:
            over = process.poll() is not None  # asked before the log is read, which is then complete
            log = read_log(os.path.join(folder, "log.jsonl"))
            # Rows between evaluations come from a run that was stopped there.
            rows = [row for row in log if "val_loss" in row and (row["step"] % every == 0 or row["step"] == steps)]
            for row in rows[seen:]:
                seen += 1
                if 0 < row["step"] < steps:
                    yield max(1, round(evaluations * row["step"] / steps)), row["val_loss"]
            if over:
                break
            yield None
        interrupted = False
        if process.returncode != 0 or not rows or rows[-1]["step"] < steps:
            with open(output.name, errors="replace") as file:
                last = ([line.strip() for line in file if line.strip()] or ["it printed nothing"])[-1]
            raise TrialFailed(f"{last.removeprefix('error: ')[:300]} ({output.name})")
        if not math.isfinite(rows[-1]["val_loss"]):
            raise TrialFailed(f"validation loss {rows[-1]['val_loss']} ({output.name})")
        return rows[-1]["val_loss"]
    except optuna.TrialPruned:
        interrupted = False
        raise
    finally:
        stop_children([process])
        if not interrupted:  # only an interrupted trial will be resumed
            for place in PLACES:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, place))


def lock_file(file):
    """Try to lock the file for this process and the children that inherit it, until the last of them ends -> whether it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------
# The study


def open_study(config):
    """The optuna study of the search: a new one, or the one in the storage, if its settings are the same.

    ConfigError if they are not, or the storage cannot be used or holds what no search wrote.
    """
    file = os.path.join(os.path.abspath(config.out), "search.db")
    if config.storage is None and os.path.exists(file) and not os.path.isfile(file):
        raise ConfigError(f"{file} is no regular file: give another --out")
    if config.report and config.storage is None and not os.path.exists(file):
        raise ConfigError(f"{file} does not exist: give the --out or --storage of a search")
    with writing(config.out, "give another --out"):
        os.makedirs(config.out, exist_ok=True)
    url = config.storage or f"sqlite:///{file}"
    with one_at_a_time(config.out):  # of searches that start together one makes the study, the others find it
        return make_study(config, url)


@contextmanager
def one_at_a_time(folder):
    """Wait until no other process of this machine is in this block with the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_study(config, url):
    """open_study, of a storage with this URL."""
    shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:…@", url)  # without a password
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=max(2, config.prune))
    pruner = halving if config.prune else optuna.pruners.NopPruner()
    try:
        storage = open_storage(url)
        if config.report:
            study = optuna.load_study(study_name=config.study, storage=storage)
            check_study(study)
            return study
        study = optuna.create_study(study_name=config.study, storage=storage, pruner=pruner, load_if_exists=True)
        if "settings" in study.user_attrs or study.get_trials(
            deepcopy=False
        ):  # otherwise another process is just making it
            check_study(study)
    except KeyError:
        raise ConfigError(
            f"study={config.study!r} is not in {shown}: give the --out or --storage of a search"
        ) from None
    except Exception as error:  # of many kinds: each database has its own
        raise ConfigError(f"storage={shown} cannot be used, {error_in_one_line(error)}: give another") from None
    owned = (*FREE, *OWNED)
    settings = {field.name: getattr(config, field.name) for field in fields(SearchConfig) if field.name not in owned}
    settings = json.loads(json.dumps(settings))  # tuples are lists there
    before = study.user_attrs.get("settings")
    if before is None:
        if any(entry.startswith("trial_") for entry in os.listdir(config.out)):
            raise ConfigError(f"out={config.out} holds trials of another study: give another --out, or remove them")
        budget = 3 * meta_model(config).flops_per_token() * config.batch_tokens * config.max_steps
        study.set_user_attr("budget", {"flops": budget, "evaluations": evaluations(config)})
        study.set_user_attr("settings", settings)  # last: a study that has them is complete
    other = "--out" if config.storage is None else "--study and another --out"  # a folder holds trials of one study
    for option, value in settings.items():
        if before is not None and before.get(option, value) != value:
            raise ConfigError(
                f"{option}={value}, but study {config.study!r} in {shown} has {option}={before[option]}: "
                f"make it that, or give another {other}"
            )
    return study


def check_study(study):
    """ValueError that names the attribute, if the study or one of its trials has one that no search writes."""
    about = study.user_attrs
    budget = fits_fields(about.get("budget"), {"flops": is_positive, "evaluations": is_count})
    if not (budget and isinstance(about.get("settings"), dict)):
        raise ValueError(f"study {study.study_name!r} has no settings and budget that a search wrote")
    for trial in study.get_trials(deepcopy=False):
        for name, fits in FIELDS_OF_TRIAL.items():
            if name in trial.user_attrs and not fits(trial.user_attrs[name]):
                raise ValueError(f"{name} of trial {trial.number} is not what a search writes")


def fits_fields(value, checks):
    """Whether the value is a dict in which every one of these fields passes its check."""
    return isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())


def is_count(value):
    """Whether a value of JSON is a whole number above 0."""
    return type(value) is int and is_positive(value)


def is_positive(value):
    """Whether a value of JSON is a finite number above 0."""
    return is_number(value) and 0 < value < math.inf


def is_text(value):
    """Whether a value of JSON is text."""
    return isinstance(value, str)


def is_none_or(check):
    """-> whether a value is None, or passes the check."""
    return lambda value: value is None or check(value)


def is_seven(value):
    """Whether a value of JSON is seven numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 7 and all(map(is_number, value))


# What a search writes of its trials, as user attributes.
FIELDS_OF_MODEL = {
    "theta": is_none_or(is_seven), "sizes": is_none_or(is_seven), "experts": is_count, "structure": is_text,
    "omega": is_none_or(is_number), "psi": is_none_or(is_number), "nu": is_none_or(is_number), "d_model": is_count,
    "parameters": is_count, "steps": is_count, "command": is_text,
}  # fmt: skip


def is_model(value):
    """Whether a value of JSON is the figures of fit_model. ω ψ ν are all known, or none is."""
    if not fits_fields(value, FIELDS_OF_MODEL):
        return False
    return len({value.get(name) is None for name in ("omega", "psi", "nu")}) == 1


FIELDS_OF_TRIAL = {
    "owner": lambda owner: fits_fields(owner, {"host": is_text, "pid": is_count, "time": is_number}),
    "folder": is_none_or(is_text), "reason": is_text, "model": is_model,
}  # fmt: skip


def open_storage(url, tries=5):
    """Open optuna's storage. Tries again if another machine is making its tables at this moment."""
    for left in reversed(range(tries)):
        try:
            return optuna.storages.RDBStorage(url)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            others = any(word in str(error).lower() for word in ("already exists", "unique", "locked"))
            if not (left and others):
                raise
            time.sleep(random.uniform(0.2, 1))


def error_in_one_line(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def estimate_seconds(config, slots):
    """Seconds that all trials will take, from a few updates of the dense model on this device, without compiling.

    Successive halving is taken into account (share_trained).
    """
    device = choose_device(config.device)
    gpus = max(1, len({slot for slot in slots if slot is not None}))
    torch.manual_seed(0)
    with device:
        model = GPT(dense_config(config))
        idx = torch.randint(config.vocab_size, (config.micro_batch, config.block_size))
    optimizer = make_optimizers(model, config)

    def update():
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        float(idx[0, 0])  # waits for the device

    with torch.autocast(device.type, (dtype := choose_dtype(config.dtype, device)), enabled=dtype != torch.float32):
        update()
        began = time.perf_counter()
        for _ in range(3):
            update()
        a_micro_step = (time.perf_counter() - began) / 3
    steps = config.max_steps * config.batch_tokens / (config.micro_batch * config.block_size)
    return START * config.trials / len(slots) + a_micro_step * steps * share_trained(config) * config.trials / gpus


def share_trained(config):
    """The share of all steps of all trials that successive halving lets train, about.

    All trials train to the first evaluation, one in `prune` to the third, and so on.
    """
    last, share, alive, at = evaluations(config), 0.0, 1.0, 0
    rung = 1 if config.prune else last
    while at < last:
        share, at, rung = share + alive * (min(rung, last) - at) / last, min(rung, last), rung * max(2, config.prune)
        alive /= max(1, config.prune)
    return share


def trial_reporter(study, trials):
    """-> a function that prints a line about a trial that has ended."""
    began, first = time.monotonic(), len(study.get_trials(deepcopy=False, states=ENDED))

    def say(trial):
        if "model" not in trial.user_attrs:  # a Misfit: another point is drawn
            return
        model, curve = trial.user_attrs["model"], trial.intermediate_values
        ended = study.get_trials(deepcopy=False, states=ENDED)
        what = f"FAILED: {trial.user_attrs.get('reason', 'another machine took it')}"
        if trial.state == TrialState.COMPLETE:
            what = f"loss {trial.value:.4f}"
        elif trial.state == TrialState.PRUNED:
            what = f"ended early, at evaluation {max(curve)} with {curve[max(curve)]:.4f}"
        experts = f", {model['experts']} experts" if model["experts"] > 1 else ""
        where = "ω {omega:.2f} ψ {psi:.2f} ν {nu:.2f}, ".format(**model) if model["nu"] is not None else ""
        which = f"θ {dotted(model['theta'])}" if model["theta"] else model["structure"]
        words = [
            f"{len(ended)}/{trials} trial {trial.number}: {what}",
            f"{which}{experts}, {where}width {model['d_model']}",
        ]
        whole = [(each.value, each.number) for each in ended if each.state == TrialState.COMPLETE]
        if whole:
            words.append("best {:.4f} of trial {}".format(*min(whole)))
        if first < len(ended) < trials:
            left = (time.monotonic() - began) / (len(ended) - first) * (trials - len(ended))
            words.append(f"about {duration(left)} left")
        print(*words, sep="; ", flush=True)

    return say


def make_rows(study):
    """A dict for each trial that was trained and has ended; "losses" are by evaluation, "loss" is the last one or None."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        about, losses = trial.user_attrs, dict(sorted(trial.intermediate_values.items()))
        if "model" not in about or (trial.state not in ENDED and "reason" not in about):
            continue  # nothing was trained, it still runs, or it was interrupted
        loss = trial.value if trial.state == TrialState.COMPLETE else None  # for others Optuna gives the latest
        if loss is not None:
            losses[study.user_attrs["budget"]["evaluations"]] = loss
        row = {"trial": trial.number, "state": trial.state.name.lower(), "loss": loss, "losses": losses}
        rows.append({**row, "reason": about.get("reason"), **about["model"]})
    return rows


def config_files(argv):
    return [word for word in argv if word.endswith(".py") and not word.startswith("--")]


def main(argv):
    config = search_options(argv)
    if not config.report:
        on_cpu = choose_device(config.device).type == "cpu"  # reports a missing device once, before the trials
        if on_cpu and not config_files(argv):
            print("on a CPU, without a config file: python -m lab.search", *SMALL, *argv, flush=True)
            config = load_config(SearchConfig, [*SMALL, *argv])
    study = open_study(config)
    if not config.report:
        prepare_default(config.data_dir)
        TokenData(config.data_dir, config.block_size)  # reports bad data once, before the trials
        slots = (gpus_to_use(0 if config.device == "cpu" else config.gpus) or [None]) * config.jobs
        stop_as_by_ctrl_c()
        try:
            space = Space(config.max_rank, config.experts, config.choices or {})
            say, files = (
                trial_reporter(study, config.trials),
                [file for file in config_files(argv) if not read_config_file(file)],
            )
            left = config.trials - len(study.get_trials(deepcopy=False, states=ENDED))
            if left > 0:
                took = duration(estimate_seconds(config, slots) * left / config.trials)
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # the trials need the memory
                print(
                    f"{left} trials of at most {study.user_attrs['budget']['flops']:.3g} FLOPs: about {took}",
                    flush=True,
                )
            search(
                study,
                space,
                make_objective(study, config, files),
                config.trials,
                config.sampler,
                config.seed,
                slots,
                say,
            )
        except KeyboardInterrupt:
            raise SystemExit("stopped: the same command resumes; with --report it shows the trials so far") from None
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise ConfigError(
                f"the storage failed: {error_in_one_line(error)}; the same command resumes the search"
            ) from None
    write_report(make_rows(study), study.user_attrs["budget"], config.out)


if __name__ == "__main__":
    as_script(main)
