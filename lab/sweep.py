"""Many runs of train.py, or of another script, from a list in a plain Python file.

    python -m lab.sweep config/sweeps/quickstart.py                       # all unfinished runs, one after the other
    python -m lab.sweep config/sweeps/gpt_theta.py --small                # the file's small version: minutes, not days
    python -m lab.sweep config/sweeps/gpt_theta.py --small --common="--data_dir=data/mine"      # options for all runs
    python -m lab.sweep config/sweeps/moe.py --config=config/published.py     # config files that follow the file's
    python -m lab.sweep config/sweeps/quickstart.py --jobs=4              # on each GPU one run trains while three start
    python -m lab.sweep config/sweeps/quickstart.py --commands            # only print them, one a line

A sweep file defines `runs`, a list of dicts of options. It may define `common`, options of all runs; `config`, config
files that every run reads first; `script`, such as "vision/train.py"; `fit`, options of `lab.scaling_laws fit`, which
follows when all runs are finished; and `small`, a dict of these names: its `common` adds to the file's and overrides it,
its other values replace the file's.

Runs start in the order of the list. Each has a folder in out/sweeps/NAME/ (NAME_small/, NAME_published/ with --small, --config), named
after the options that tell it apart. A run is finished when its log has its last step; one that was interrupted resumes
from its checkpoint. So the same command does what is left. Ending the sweep, even with SIGKILL, ends its runs, and a
second sweep in the same folder is refused.

Small runs take longer to start and compile than to train: with --jobs several start side by side on a GPU, but train
one at a time, so that their times compare. On a CPU they train side by side, and the fit leaves seconds out.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

from configurator import ConfigError, as_script, load_config, split_options, split_words
from engine.ownership import owning, wait_until_free
from engine.runlog import read_config_json, read_log, writing
from lab.children import ignore_signals, start_child, stop_as_by_ctrl_c, stop_children


@dataclass
class SweepConfig:
    small: bool = False  # the sweep file's small version
    common: str = ""  # options for all runs, which override the file's: --common="--data_dir=data/mine --max_steps=500"
    config: str = ""  # config files that follow the sweep file's own; options of `common` and of a run override them
    jobs: int = 1  # runs at a time on each GPU, of which one trains while the others start; or on the CPU
    gpus: int | None = None  # GPUs to use; None: all that are here, or that CUDA_VISIBLE_DEVICES names
    commands: bool = False  # only print the commands of unfinished runs
    out: str | None = None  # folder of all runs; None: out/sweeps/ and the names of the sweep file and of `config`
    only: str = ""  # do only the runs whose names contain this

    def __post_init__(self):
        if self.jobs < 1 or (self.gpus is not None and self.gpus < 0):
            raise ConfigError(f"jobs={self.jobs}, gpus={self.gpus}: make jobs at least 1 and gpus at least 0")


class Sweep(NamedTuple):
    runs: dict  # {name of a run: its options, including out_dir}
    script: str  # that every run calls
    configs: list  # config files of every run
    fit: str | None  # options of lab.scaling_laws fit


SMALL = ("runs", "common", "config", "fit")  # names that a file's `small` may define
SHARED = "shared.txt"  # a file in a sweep's folder that tells that some of its runs shared the CPU


def module_of(script):
    """The name by which `python -m` calls a script: "vision/train.py" -> "vision.train"."""
    return os.path.splitext(script)[0].replace(os.sep, ".")


def read_sweep(path, small=False, common="", out=None, config=""):
    """Run a sweep file -> Sweep; arguments as the options of SweepConfig. ConfigError if the file defines no sweep."""
    try:
        values = runpy.run_path(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file of config/sweeps/") from None
    except Exception as error:
        raise ConfigError(f"{path} is no sweep file, {type(error).__name__}: {error}") from None
    name = os.path.splitext(os.path.basename(path))[0]
    if small:
        name, values = f"{name}_small", small_version(path, values)
    files = split_words("config", config)
    name = "_".join([name, *(os.path.splitext(os.path.basename(file))[0] for file in files)])
    runs = values.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{path} has no list `runs` of dicts of options")
    script = values.get("script", "train.py")
    if not os.path.isfile(script):
        raise ConfigError(f"{path}: script={script!r} is no file here: give train.py, vision/train.py or another")
    added = split_options("common", common)
    for key in added:
        if key == "out_dir" or any(key in run for run in runs):
            remedy = "give --out" if key == "out_dir" else f"change it in {path}"
            raise ConfigError(f"common: {key} differs from run to run: {remedy}")
    out = out or os.path.join("out", "sweeps", name)
    named = {}
    for run, name in zip(runs, run_names(runs)):
        if name in named:
            raise ConfigError(f"{path}: two runs are the same, {name}: leave one out, or give them different seeds")
        named[name] = {**values.get("common", {}), **run, **added, "out_dir": os.path.join(out, name)}
    configs = split_words(f"{path}: config", values.get("config", "")) + files
    return Sweep(named, script, configs, values.get("fit"))


def small_version(path, values):
    """The values of a sweep file, replaced by those of its `small`. ConfigError if it has none."""
    small = values.get("small")
    if not isinstance(small, dict):
        raise ConfigError(f"{path} has no small version: leave --small out, or define small = dict(runs=[…])")
    for key in small:
        if key not in SMALL:
            raise ConfigError(f"{path}: small defines {key!r}, which is unknown: it may define {', '.join(SMALL)}")
    return {**values, **small, "common": {**values.get("common", {}), **small.get("common", {})}}


def run_names(runs):
    """Names of runs such as "btt_rank4_d_model256": the structure, and each option that differs between runs."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    varying = [key for key in keys if len({repr(run.get(key)) for run in runs}) > 1] or keys[:1]
    return ["_".join(_word(key, run[key]) for key in varying if key in run) for run in runs]


def _word(key, value):
    if isinstance(value, dict):
        value = "-".join(f"{k}.{_word('structure', v)}" for k, v in value.items())
    if isinstance(value, (tuple, list)):
        value = "-".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    text = str(value) if key == "structure" else f"{key}{value}"
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in text)


def command_of(sweep, name):
    """The command, as a list of words, that starts a run of the sweep or resumes it."""
    words = [f"--{key}={value}" for key, value in sweep.runs[name].items()]
    return [sys.executable, "-m", module_of(sweep.script), *sweep.configs, *words, "--resume"]


def is_finished(options):
    """Whether the run's log has its last step, which its options give, or else the config.json that it wrote."""
    rows = read_log(os.path.join(options["out_dir"], "log.jsonl"))
    last = options.get("max_steps") or options_written(options).get("max_steps")
    return bool(rows) and isinstance(last, (int, float)) and rows[-1]["step"] >= last


def options_written(options):
    """The options that a run has written to its folder; {} if none has. ConfigError if they cannot be read."""
    path = os.path.join(options["out_dir"], "config.json")
    return read_config_json(path) if os.path.exists(path) else {}


def say_what_differs(runs):
    """Print a note if finished runs, which stay as they are, had other options than they would have now."""
    others = []
    for name, options in runs.items():
        had, wants = options_written(options), json.loads(json.dumps(options))
        had = {key: had.get(key, wants[key]) for key in wants if key != "out_dir"}
        keys = [key for key in had if had[key] != wants[key] and str(had[key]) != str(wants[key])]  # --data_dir=2024
        others += [f"{name} {keys[0]}={had[keys[0]]!r}, not {wants[keys[0]]!r}"] if keys else []
    if others:
        print(f"note: {len(others)} of these had other options: {others[0]}; give another --out to train them again")


def gpus_to_use(most=None):
    """The GPUs that CUDA_VISIBLE_DEVICES names, otherwise all that are here, as strings; at most `most` of them.

    ConfigError if there are fewer.
    """
    if most == 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [name.strip() for name in named.split(",") if name.strip()] if named is not None else all_gpus()
    if most is not None and most > len(found):
        raise ConfigError(
            f"gpus={most}, but CUDA_VISIBLE_DEVICES or this machine has {len(found)}: give at most that many"
        )
    return found[:most]


def all_gpus():
    """The numbers of this machine's GPUs, as strings."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i in range(listed.stdout.count("GPU "))] if listed.returncode == 0 else []


def run_all(todo, sweep, slots):
    """Run those named in `todo`, one at a time in each slot (the number of a GPU, or None) -> names of those that failed."""
    waiting, running, failed = list(todo), {}, []
    threads = str(max(1, (os.cpu_count() or 1) // len(slots)))  # of each run, for compiling
    began, done = time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and slots:
                name, slot = waiting.pop(0), slots.pop(0)
                folder = sweep.runs[name]["out_dir"]
                env = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
                if slot is not None:
                    turn = os.path.join(os.path.dirname(folder), f"gpu{slot}.turn")
                    env |= {"CUDA_VISIBLE_DEVICES": slot, "GPU_TURN": turn}
                with writing(folder, "give another --out"):
                    wait_until_free(folder, seconds=60)  # a killed sweep's run may still be saving
                    log = open(os.path.join(folder, "train.log"), "a")
                with log:
                    process = start_child(command_of(sweep, name), log, env)
                running[name] = process, slot, time.monotonic()
            time.sleep(0.1)
            for name, (process, slot, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                slots.append(slot)
                done += 1
                elapsed = time.monotonic() - began
                left = elapsed / done * (len(waiting) + len(running))
                how = "" if process.returncode == 0 else f", FAILED with status {process.returncode}, see its train.log"
                took = f"{done}/{len(todo)} {name}: {time.monotonic() - start:.0f} s"
                print(f"{took}{how}; about {left:.0f} s left", flush=True)
                if process.returncode:
                    failed.append(name)
    except KeyboardInterrupt:  # Ctrl-C, SIGTERM or SIGHUP
        ignore_signals()
        stop_children([process for process, _, _ in running.values()], seconds=600)
        raise SystemExit("stopped: the same command resumes") from None
    return failed


def main(argv):
    files = [word for word in argv if word.endswith(".py") and not word.startswith("--")]
    config = load_config(SweepConfig, [word for word in argv if word not in files])
    if len(files) != 1:
        raise ConfigError("lab.sweep: give one sweep file, such as config/sweeps/quickstart.py")
    sweep = read_sweep(files[0], config.small, config.common, config.out, config.config)
    chosen = [name for name in sweep.runs if config.only in name]
    if not chosen:
        raise ConfigError(f"only={config.only!r} is part of no run's name; one is {next(iter(sweep.runs))}")
    todo = [name for name in chosen if not is_finished(sweep.runs[name])]
    if config.commands:
        print(*(shlex.join(command_of(sweep, name)) for name in todo), sep="\n")
        return
    gpus = gpus_to_use(config.gpus)
    slots = (gpus or [None]) * config.jobs
    print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them finished; {len(slots)} at a time", flush=True)
    say_what_differs({name: sweep.runs[name] for name in chosen if name not in todo})
    folder = os.path.dirname(sweep.runs[chosen[0]]["out_dir"])
    stop_as_by_ctrl_c()
    with owning(folder, "give another --out"):
        run_and_fit(sweep, todo, slots, folder, shared=config.jobs > 1 and not gpus)


def run_and_fit(sweep, todo, slots, folder, shared):
    """Run those named in `todo`, then fit all runs if all are finished. SystemExit if a run or the fit fails.

    shared: whether several runs at a time share the CPU
    """
    if shared and todo:  # for the fit, which a later command may do
        with open(os.path.join(folder, SHARED), "w") as file:
            file.write(
                f"{len(slots)} runs at a time shared the CPU: do not compare their seconds with those of others\n"
            )
    failed = run_all(todo, sweep, slots)
    if failed:
        which = f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}"
        raise SystemExit(f"error: {which}; the same command tries them again")
    left = sum(not is_finished(options) for options in sweep.runs.values())
    if sweep.fit is not None and left:
        print(f"{left} of the sweep's {len(sweep.runs)} runs are left: the fit follows when all are finished")
    elif sweep.fit is not None:
        raise SystemExit(fit_runs(sweep, folder))


def fit_runs(sweep, folder):
    """Call `lab.scaling_laws fit` for all runs -> its exit status. It reads the config files, which may define structures."""
    words = [*sweep.configs, *(options["out_dir"] for options in sweep.runs.values())]
    words.append(f"--out={os.path.join(folder, 'fit')}")
    if os.path.exists(os.path.join(folder, SHARED)):
        print(f"note: runs shared the CPU ({folder}/{SHARED}): no fit of their seconds", flush=True)
        words.append("--costs=flops,parameters")
    return subprocess.run(
        [sys.executable, "-m", "lab.scaling_laws", "fit", *words, *split_words("fit", sweep.fit)]
    ).returncode


if __name__ == "__main__":
    as_script(main)
