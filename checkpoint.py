"""Checkpoints that survive: written beside, flushed, renamed; the one before is kept.

    out_dir/ckpt.pt          newest            out_dir/ckpt_prev.pt     the one before

A checkpoint holds tensors and plain values only and is read with weights_only=True, so that
reading one never runs code. Imports from configurator.
"""

import itertools
import os

import torch

from configurator import ConfigError

NEWEST, PREVIOUS = "ckpt.pt", "ckpt_prev.pt"


def save(out_dir, checkpoint):
    """Write `checkpoint` (a dict) as out_dir/ckpt.pt; a kill at any moment leaves a whole one behind."""
    newest, previous = os.path.join(out_dir, NEWEST), os.path.join(out_dir, PREVIOUS)
    partial = newest + ".part"
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(newest):
        os.replace(newest, previous)
    os.replace(partial, newest)


def load(out_dir, say=print):
    """The newest whole checkpoint in out_dir, on the CPU, with its "path", or None where there is none.

    A torn one is passed over with a message; where all that are there are torn, ConfigError.
    """
    torn = []
    for name in (NEWEST, PREVIOUS):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["step"], checkpoint["model"], checkpoint["config"]
            return {**checkpoint, "path": path}
        except Exception as error:  # torch raises many kinds for a torn file
            say(f"{path} is not a whole checkpoint ({type(error).__name__}): passed over")
            torn.append(path)
    if torn:
        raise ConfigError(
            f"out_dir={out_dir}: no whole checkpoint ({', '.join(torn)} torn): start anew in another out_dir"
        )
    return None


def set_aside(out_dir, say=print):
    """Rename an earlier run's out_dir to out_dir.1, .2, …, so that a new run in its place destroys nothing."""
    if not any(os.path.exists(os.path.join(out_dir, name)) for name in (NEWEST, PREVIOUS)):
        return
    out_dir = os.path.normpath(out_dir)
    number = next(n for n in itertools.count(1) if not os.path.exists(f"{out_dir}.{n}"))
    os.replace(out_dir, f"{out_dir}.{number}")
    say(f"{out_dir} held an earlier run: moved to {out_dir}.{number}")


def describe(out_dir):
    """Which checkpoint a run would go on from, in words."""
    checkpoint = load(out_dir, say=lambda message: None)
    return (
        f"last checkpoint: {checkpoint['path']} of step {checkpoint['step']}"
        if checkpoint
        else "there is no checkpoint"
    )


def optimizer_state(model, optimizer):
    """{parameter name: Adam's state}: by name, and without rates, which belong to the schedule."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state(model, optimizer, state):
    """Put back what optimizer_state gave, on the parameters' devices."""
    for name, parameter in model.named_parameters():
        if name in state:
            # Adam's step counter lives with its parameter when the kernel is fused.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state[name].items()}
