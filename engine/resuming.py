"""Where a run starts from: its newest checkpoint, another run's weights, or nothing; and the folder it writes to."""

import json
import os
import shlex
from dataclasses import asdict

from configurator import ConfigError, RunFailed
from data import LANGUAGE, changed_values, check_same_data
from engine import checkpoint, runlog

# Options of a model that a resumed run may change: the parameters are the same ones.
MAY_CHANGE = {"dropout", "activation_checkpointing"}
# Options that checkpoints of earlier versions lack, and what they were trained with.
BEFORE = {"base_ffn_expansion": 1}


def load_start(config, task, model, optimizers, scaler, again, say):
    """Put what the run starts from into model, optimizers and scaler -> the checkpoint's plain values; None: a new run.

    config  a RunConfig
    task    with `meta`, what its data are, and `shape`, the names of options that make another model
    again   whether the run resumes: asked for, or restarted by torchrun
    Every rank calls it. ConfigError where the checkpoint is of another model, or of other data.
    """
    shape = task.shape - MAY_CHANGE
    saved = checkpoint.load(config.out_dir, say) if again else None
    if saved is None:
        if config.resume:
            say(f"{config.out_dir}: no checkpoint to go on from, starting at step 0")
        if config.init_from:
            load_weights_of_another(config, model, shape, task.meta, say)
        return None
    check_same_model(config, saved["config"], shape, say)
    check_same_data(task.meta, saved["meta"], say)
    checkpoint.restore(saved, model, optimizers)
    if saved["scaler"]:  # empty where the checkpoint is of lab.convert, or of a run without float16
        scaler.load_state_dict(saved["scaler"])
    done = f", nothing is left of max_steps={config.max_steps}" if saved["step"] >= config.max_steps else ""
    say(f"{config.out_dir}: going on from step {saved['step']}{done}")
    return saved


def check_same_model(config, saved, shape, say):
    """A resumed run has the model it had, options of `shape`; others may change, and the change is said."""
    earlier = {key: value for key, value in BEFORE.items() if key not in saved}
    for key, (value, was) in differing_options(config, {**earlier, **saved}, shape | earlier.keys()).items():
        raise ConfigError(
            f"{key}={value!r}, but the checkpoint in {config.out_dir} has {was!r}: give that, or another out_dir"
        )
    for key, (value, was) in differing_options(config, saved, saved.keys()).items():
        if key not in ("resume", "out_dir", "init_from"):
            say(f"resumed with {key}={value!r}, it was {was!r}")


def differing_options(config, saved, keys):
    """{option: (value here, value in a checkpoint's config)} of those `keys` that differ and both have."""
    here = asdict(config)
    keys = [key for key in here if key in keys and key in saved]
    return {key: (here[key], saved[key]) for key in keys if here[key] != saved[key]}


def load_weights_of_another(config, model, shape, meta, say):
    """The weights of config.init_from, of a model with the same options of `shape`, into the model.

    meta  plain values about the data: where its ids stand for other tokens than the weights learned, a note says so
    """
    saved = checkpoint.load(config.init_from, say)
    if saved is None:
        raise ConfigError(
            f"init_from={config.init_from} holds no checkpoint: give the out_dir of a run, a checkpoint in it, "
            "or nanoGPT's ckpt.pt"
        )
    others = differing_options(config, saved["config"], shape)
    if others:
        words = shlex.join(f"--{key}={theirs}" for key, (_, theirs) in others.items())
        raise ConfigError(f"init_from={config.init_from} is of another model: give {words}")
    foreign = [key for key in LANGUAGE if key in changed_values(meta, saved["meta"])]
    if foreign:
        say(
            f"note: the data's {' and '.join(foreign)} differ from what {config.init_from} learned: ids stand for other tokens"
        )
    checkpoint.restore(saved, model)
    say(f"weights of step {saved['step']} of {saved['path']}; this run starts at step 0")


def open_out_dir(config, resume_step, say):
    """Make out_dir, write config.json, open the log -> RunLog. On rank 0.

    resume_step: that of the checkpoint; None: a new run, before which an earlier run's files are set aside.
    ConfigError where out_dir cannot be one, RunFailed where the disk is full.
    """
    try:
        if resume_step is None:
            checkpoint.set_aside(config.out_dir, say)
        os.makedirs(config.out_dir, exist_ok=True)
        path = os.path.join(config.out_dir, "config.json")
        with open(path + ".part", "w") as file:
            json.dump(asdict(config), file, indent=1)
        os.replace(path + ".part", path)
    except OSError as error:
        kind = RunFailed if error.errno in runlog.DISK_ERRORS else ConfigError
        raise kind(f"out_dir={config.out_dir} cannot be written ({error.strerror}): take another") from None
    return runlog.RunLog(config.out_dir, resume_step)
