"""Start a run: from its newest checkpoint, from another run's weights, or from random weights; and open its folder."""

import json
import os
import shlex
from dataclasses import asdict

from configurator import ConfigError, OneLineExit
from data import LANGUAGE, changed_values, check_same_data
from engine import checkpoint, ownership, runlog

# Options of a model that a resumed run may change, since they leave the parameters as they are.
MAY_CHANGE = {"dropout", "activation_checkpointing"}
# Options that checkpoints of earlier versions lack, and what they were trained with.
BEFORE = {"base_ffn_expansion": 1}


def own_out_dir(config, run, say):
    """Lock out_dir on rank 0 -> whether it holds this very run, which torchrun has restarted: the same on all ranks.

    run: the run's id. Every rank calls it. ConfigError where another process owns out_dir or it cannot be written,
    RunFailed where the disk is full.
    """
    restarted = error = None
    if checkpoint.group_rank()[0] == 0:
        try:
            with writing_to(config.out_dir):
                restarted = ownership.own_folder(config.out_dir, "give another out_dir", say, run) == run
        except OneLineExit as refusal:
            error = refusal
    restarted, refused = checkpoint.gather_from_ranks((restarted, error and error.message))[0]
    if refused:
        raise error or ConfigError(refused)
    return restarted


def writing_to(out_dir):
    """Within this context, a failure to write to out_dir is one line (runlog.writing)."""
    return runlog.writing(f"out_dir={out_dir}", "take another")


def load_start(config, task, model, optimizers, scaler, again, say):
    """Load the state that the run starts from into model, optimizers and scaler -> the checkpoint's plain values, or None.

    config  a RunConfig
    task    has `meta`, a description of its data, and `shape`, the names of the options that define the model
    again   whether the run resumes, on request or because torchrun restarted it
    Every rank calls it. ConfigError if the checkpoint belongs to another model or to other data.
    """
    shape = task.shape - MAY_CHANGE
    saved = checkpoint.load(config.out_dir, say) if again else None
    if saved is None:
        if config.resume:
            say(f"{config.out_dir}: no checkpoint to resume from, starting at step 0")
        if config.init_from:
            load_weights_of_another(config, model, shape, task.meta, say)
        return None
    check_same_model(config, saved["config"], shape, say)
    check_same_data(task.meta, saved["meta"], say)
    checkpoint.restore(saved, model, optimizers)
    if saved["scaler"]:  # empty where lab.convert or a run without float16 made the checkpoint
        scaler.load_state_dict(saved["scaler"])
    done = f"; max_steps={config.max_steps} is already reached" if saved["step"] >= config.max_steps else ""
    say(f"{config.out_dir}: resuming from step {saved['step']}{done}")
    return saved


def check_same_model(config, saved, shape, say):
    """ConfigError where one of the options that define the model has changed. Print changes of other options.

    saved: the checkpoint's options, {name: value}. shape: names of those that must not change.
    """
    earlier = {key: value for key, value in BEFORE.items() if key not in saved}
    for key, (value, was) in differing_options(config, {**earlier, **saved}, shape | earlier.keys()).items():
        raise ConfigError(
            f"{key}={value!r}, but the checkpoint in {config.out_dir} has {was!r}: give that value, or another out_dir"
        )
    for key, (value, was) in differing_options(config, saved, saved.keys()).items():
        if key not in ("resume", "out_dir", "init_from"):
            say(f"resumed with {key}={value!r}, it was {was!r}")


def differing_options(config, saved, keys):
    """{option: (value here, value in the checkpoint)} of those options in `keys` that both have, with different values."""
    here = asdict(config)
    keys = [key for key in here if key in keys and key in saved]
    return {key: (here[key], saved[key]) for key in keys if here[key] != saved[key]}


def load_weights_of_another(config, model, shape, meta, say):
    """Load the weights of the checkpoint config.init_from into the model.

    shape  names of the options that must be the same in both
    meta   plain values that describe the data: a note is printed if ids stand for other tokens than the weights have learned
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
        raise ConfigError(f"init_from={config.init_from} holds another model: give {words}")
    foreign = [key for key in LANGUAGE if key in changed_values(meta, saved["meta"])]
    if foreign:
        say(
            f"note: the data's {' and '.join(foreign)} differ from what {config.init_from} learned: ids stand for other tokens"
        )
    checkpoint.restore(saved, model)
    say(f"weights of step {saved['step']} of {saved['path']}; this run starts at step 0")


def open_out_dir(config, run, resume_step, say):
    """Write config.json, open the log, name the run in out_dir, which this process owns -> RunLog. On rank 0.

    run: the run's id, written only here: a restart before this point finds another run's id, and starts as this run did.
    resume_step: the checkpoint's; None for a new run: then an earlier run's files are set aside first.
    ConfigError if out_dir cannot be written, RunFailed if the disk is full.
    """
    with writing_to(config.out_dir):
        if resume_step is None:
            checkpoint.set_aside(config.out_dir, say)
        with runlog.whole_file(os.path.join(config.out_dir, "config.json")) as part, open(part, "w") as file:
            json.dump(asdict(config), file, indent=1)
    log = runlog.RunLog(config.out_dir, resume_step)
    with writing_to(config.out_dir):
        ownership.name_run(config.out_dir, run)
    return log
