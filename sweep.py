"""Many runs of train.py, from a list in a plain Python file.

    python sweep.py config/sweeps/quickstart.py                       # those that are not finished, one after the other
    python sweep.py config/sweeps/quickstart.py --jobs=4              # four at a time on every GPU
    python sweep.py config/sweeps/quickstart.py --commands            # only print them, one a line:
    python sweep.py config/sweeps/quickstart.py --commands | xargs -P4 -I{} sh -c "{}"

A sweep file defines `runs`, a list of dicts of train.py's options, and may define `common`, options of all of them;
`config`, files that come first; `fit`, options of `scaling_laws.py fit`, which follows when all runs are finished. A run's
folder is out/sweeps/NAME/ and what tells it apart. A run is finished when its log has its last step; one that was interrupted goes
on from its checkpoint. So the same command again does what is left. Imports from configurator and runlog.
"""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from configurator import ConfigError, load_config
from runlog import read_log


@dataclass
class Config:
    jobs: int = 1  # runs at a time on every GPU, or on the CPU
    gpus: int | None = None  # GPUs to use; None: all there are
    commands: bool = False  # print the commands of the runs that are not finished, and do nothing
    out: str | None = None  # folder of all runs; None: out/sweeps/ and the sweep file's name
    only: str = ""  # runs whose name contains this

    def __post_init__(self):
        if self.jobs < 1 or (self.gpus is not None and self.gpus < 0):
            raise ConfigError(f"jobs={self.jobs}, gpus={self.gpus}: make jobs at least 1 and gpus at least 0")


def read_sweep(path, out=None):
    """-> ({name of a run: its options, out_dir included}, config files, options of fit or None)"""
    try:
        values = runpy.run_path(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): give a sweep file, such as config/sweeps/quickstart.py"
        ) from None
    except Exception as error:
        raise ConfigError(f"{path} is no sweep file, {type(error).__name__}: {error}") from None
    runs = values.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{path} has no list `runs` of dicts of options")
    out = out or os.path.join("out", "sweeps", os.path.splitext(os.path.basename(path))[0])
    named = {}
    for run, name in zip(runs, run_names(runs)):
        if name in named:
            raise ConfigError(f"{path}: two runs are the same, {name}: leave one out, or give them different seeds")
        named[name] = {**values.get("common", {}), **run, "out_dir": os.path.join(out, name)}
    return named, shlex.split(values.get("config", "")), values.get("fit")


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


def command(options, configs):
    words = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, "train.py", *configs, *words, "--resume"]


def is_finished(options, max_steps_default=10_000):
    """Whether the run's log has its last step."""
    rows = read_log(os.path.join(options["out_dir"], "log.jsonl"))
    return bool(rows) and rows[-1]["step"] >= options.get("max_steps", max_steps_default)


def count_gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def run_all(todo, configs, slots):
    """Run them, as many at a time as there are slots (numbers of GPUs, or None) -> names of those that failed."""
    waiting, running, failed = list(todo.items()), {}, []
    began, done = time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and slots:
                name, options = waiting.pop(0)
                slot = slots.pop(0)
                os.makedirs(options["out_dir"], exist_ok=True)
                env = {**os.environ, **({} if slot is None else {"CUDA_VISIBLE_DEVICES": str(slot)})}
                with open(os.path.join(options["out_dir"], "train.log"), "a") as log:
                    process = subprocess.Popen(command(options, configs), stdout=log, stderr=subprocess.STDOUT, env=env)
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
                print(
                    f"{done}/{len(todo)} {name}: {time.monotonic() - start:.0f} s{how}; about {left:.0f} s left",
                    flush=True,
                )
                if process.returncode:
                    failed.append(name)
    except KeyboardInterrupt:
        for process, _, _ in running.values():
            process.send_signal(signal.SIGINT)  # each saves and ends
        for process, _, _ in running.values():
            process.wait()
        raise SystemExit("stopped: the same command goes on") from None
    return failed


def main(argv):
    files = [word for word in argv if word.endswith(".py") and not word.startswith("--")]
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__.strip() + "\n")
    config = load_config(Config, [word for word in argv if word not in files])
    if len(files) != 1:
        raise ConfigError("sweep.py: give one sweep file, such as config/sweeps/quickstart.py")
    runs, configs, fit = read_sweep(files[0], config.out)
    chosen = {name: options for name, options in runs.items() if config.only in name}
    if not chosen:
        raise ConfigError(f"only={config.only!r} is in no run's name, such as {next(iter(runs))}")
    todo = {name: options for name, options in chosen.items() if not is_finished(options)}
    if config.commands:
        print(*(shlex.join(command(options, configs)) for options in todo.values()), sep="\n")
        return
    gpus = count_gpus() if config.gpus is None else config.gpus
    slots = (list(range(gpus)) or [None]) * config.jobs
    print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them finished; {len(slots)} at a time", flush=True)
    failed = run_all(todo, configs, slots)
    if failed:
        raise SystemExit(
            f"error: {len(failed)} of {len(todo)} runs failed: {', '.join(failed)}; the same command tries them again"
        )
    if fit is not None:
        folders = [options["out_dir"] for options in runs.values() if is_finished(options)]
        words = [*folders, f"--out={os.path.join(os.path.dirname(folders[0]), 'fit')}", *shlex.split(fit)]
        raise SystemExit(subprocess.run([sys.executable, "scaling_laws.py", "fit", *words]).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
