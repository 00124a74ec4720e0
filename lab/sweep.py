"""Many runs of train.py, or of another script, from a list in a plain Python file.

    python -m lab.sweep config/sweeps/quickstart.py                       # those that are not finished, one after the other
    python -m lab.sweep config/sweeps/gpt_theta.py --small                # the file's small version: minutes, not days
    python -m lab.sweep config/sweeps/gpt_theta.py --small --common="--data_dir=data/mine"      # options for all runs
    python -m lab.sweep config/sweeps/moe.py --config=config/published.py     # config files that follow the file's
    python -m lab.sweep config/sweeps/quickstart.py --jobs=4              # on every GPU one trains while three start
    python -m lab.sweep config/sweeps/quickstart.py --commands            # only print them, one a line

A sweep file defines `runs`, a list of dicts of options, and may define `common`, options of all of them; `config`,
files that come first; `script`, "vision/train.py" say; `fit`, options of `lab.scaling_laws fit`, which follows when all
runs are finished; and `small`, a dict of these names: its `common` is laid over the other, the rest stands instead.

Runs go in the order of the list. A run's folder is out/sweeps/NAME/ (NAME_small/ of the small version) and what tells
it apart. A run is finished when its log has its last step; one that was interrupted resumes from its checkpoint. So the
same command again does what is left. Small runs take longer to start and compile than to train: with --jobs several do
so side by side on a GPU, and train one after the other, so that their seconds are their own. On a CPU they train side
by side, and the fit leaves seconds out.
"""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

from configurator import ConfigError, as_script, load_config, split_options, split_words
from engine.runlog import read_log


@dataclass
class SweepConfig:
    small: bool = False  # the sweep file's small version
    common: str = ""  # options for all runs, laid over the file's: --common="--data_dir=data/mine --max_steps=500"
    config: str = ""  # config files that follow the sweep file's own; options of `common` and of a run still win
    jobs: int = 1  # runs at a time on every GPU, of which one trains and the others start; or on the CPU
    gpus: int | None = None  # GPUs to use; None: all there are, or that CUDA_VISIBLE_DEVICES names
    commands: bool = False  # print the commands of the runs that are not finished, and do nothing
    out: str | None = None  # folder of all runs; None: out/sweeps/ and the names of the sweep file and of `config`
    only: str = ""  # runs whose name contains this

    def __post_init__(self):
        if self.jobs < 1 or (self.gpus is not None and self.gpus < 0):
            raise ConfigError(f"jobs={self.jobs}, gpus={self.gpus}: make jobs at least 1 and gpus at least 0")


class Sweep(NamedTuple):
    runs: dict  # {name of a run: its options, out_dir included}
    script: str  # what they are runs of
    configs: list  # its config files
    fit: str | None  # options of lab.scaling_laws fit


SMALL = ("runs", "common", "config", "fit")  # names that a file's `small` may have
SHARED = "shared.txt"  # in the folder of a sweep: some of its runs shared the CPU


def module_of(script):
    """How `python -m` calls a script, from the repository's root: "vision/train.py" -> "vision.train"."""
    return os.path.splitext(script)[0].replace(os.sep, ".")


def read_sweep(path, small=False, common="", out=None, config=""):
    """-> Sweep; ConfigError for what is none. config: config files that follow those of the sweep file."""
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
            raise ConfigError(f"common: {key} is made run by run: {remedy}")
    out = out or os.path.join("out", "sweeps", name)
    named = {}
    for run, name in zip(runs, run_names(runs)):
        if name in named:
            raise ConfigError(f"{path}: two runs are the same, {name}: leave one out, or give them different seeds")
        named[name] = {**values.get("common", {}), **run, **added, "out_dir": os.path.join(out, name)}
    configs = split_words(f"{path}: config", values.get("config", "")) + files
    return Sweep(named, script, configs, values.get("fit"))


def small_version(path, values):
    """A sweep file's names, with those of its `small` in their place."""
    small = values.get("small")
    if not isinstance(small, dict):
        raise ConfigError(f"{path} has no small version: leave --small out, or define small = dict(runs=[…])")
    for key in small:
        if key not in SMALL:
            raise ConfigError(f"{path}: small has {key!r}, which is unknown: it may have {', '.join(SMALL)}")
    return {**values, **small, "common": {**values.get("common", {}), **small.get("common", {})}}


def run_names(runs):
    """Such as "btt_rank4_d_model256": the structure, and every option that is not the same in all runs."""
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
    """The words that start a run of the sweep, or resume it."""
    words = [f"--{key}={value}" for key, value in sweep.runs[name].items()]
    return [sys.executable, "-m", module_of(sweep.script), *sweep.configs, *words, "--resume"]


def is_finished(options):
    """Whether the run's log has its last step: that of the options, else that of the config.json it wrote."""
    rows = read_log(os.path.join(options["out_dir"], "log.jsonl"))
    last = options.get("max_steps") or options_written(options).get("max_steps")
    return bool(rows) and isinstance(last, (int, float)) and rows[-1]["step"] >= last


def options_written(options):
    """The options that the run in this folder had, {} where it did not say."""
    try:
        with open(os.path.join(options["out_dir"], "config.json")) as file:
            options = json.load(file)
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, dict) else {}


def say_what_differs(runs):
    """Finished runs stay as they are: say so of those that had other options than they would have now."""
    others = []
    for name, options in runs.items():
        had, wants = options_written(options), json.loads(json.dumps(options))
        had = {key: had.get(key, wants[key]) for key in wants if key != "out_dir"}
        keys = [key for key in had if had[key] != wants[key] and str(had[key]) != str(wants[key])]  # --data_dir=2024
        others += [f"{name} {keys[0]}={had[keys[0]]!r}, not {wants[keys[0]]!r}"] if keys else []
    if others:
        print(f"note: {len(others)} of these had other options, {others[0]}: another --out trains them again")


def gpus_to_use(most=None):
    """Numbers of the GPUs that CUDA_VISIBLE_DEVICES names, else of all that are here; the first `most` of them."""
    if most == 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [name.strip() for name in named.split(",") if name.strip()] if named is not None else all_gpus()
    if most is not None and most > len(found):
        raise ConfigError(
            f"gpus={most}, but {len(found)} are here or named by CUDA_VISIBLE_DEVICES: make it at most that"
        )
    return found[:most]


def all_gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i in range(listed.stdout.count("GPU "))] if listed.returncode == 0 else []


def run_all(todo, sweep, slots):
    """Run those in `todo`, as many at a time as there are slots (numbers of GPUs, or None) -> names that failed."""
    waiting, running, failed = list(todo), {}, []
    threads = str(max(1, (os.cpu_count() or 1) // len(slots)))  # that compile, of each
    began, done = time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and slots:
                name, slot = waiting.pop(0), slots.pop(0)
                folder = sweep.runs[name]["out_dir"]
                os.makedirs(folder, exist_ok=True)
                env = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
                if slot is not None:
                    turn = os.path.join(os.path.dirname(folder), f"gpu{slot}.turn")
                    env |= {"CUDA_VISIBLE_DEVICES": slot, "GPU_TURN": turn}
                with open(os.path.join(folder, "train.log"), "a") as log:
                    process = subprocess.Popen(command_of(sweep, name), stdout=log, stderr=subprocess.STDOUT, env=env)
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
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave them running
        for process, _, _ in running.values():
            process.send_signal(signal.SIGINT)  # each saves and ends
        for process, _, _ in running.values():
            process.wait()
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
        raise ConfigError(f"only={config.only!r} is in no run's name, such as {next(iter(sweep.runs))}")
    todo = [name for name in chosen if not is_finished(sweep.runs[name])]
    if config.commands:
        print(*(shlex.join(command_of(sweep, name)) for name in todo), sep="\n")
        return
    gpus = gpus_to_use(config.gpus)
    slots = (gpus or [None]) * config.jobs
    print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them finished; {len(slots)} at a time", flush=True)
    say_what_differs({name: sweep.runs[name] for name in chosen if name not in todo})
    folder = os.path.dirname(sweep.runs[chosen[0]]["out_dir"])
    if config.jobs > 1 and not gpus and todo:  # a word for the fit, which a later command may do
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, SHARED), "w") as file:
            file.write(f"{config.jobs} runs at a time shared the CPU: their seconds compare with no others\n")
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
    """lab.scaling_laws fit of all runs -> its exit status. The config files may define the runs' structures."""
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
