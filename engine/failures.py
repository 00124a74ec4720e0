"""A run that fails ends with one line that says what to do, whichever process fails."""

import torch

from configurator import ConfigError, OneLineExit, RunFailed, is_out_of_memory, print_for_rank
from engine import checkpoint, runlog
from engine.compiling import missing_compiler
from engine.ownership import release_folder
from engine.parallel import ranks
from engine.screen import losable_output


def run_with_progress(train, config, memory):
    """Call train(config, progress). Where it fails, OneLineExit with one line; after Ctrl-C, SystemExit(130).

    config  a RunConfig
    memory  words for a GPU that is full: what its use of memory depends on, and how to need less
    """
    with losable_output():  # before Progress, which asks what stdout is
        progress = runlog.Silent() if ranks()[0] else runlog.Progress(config.max_steps)
        run_and_explain(train, config, memory, progress)


def run_and_explain(train, config, memory, progress):
    """As run_with_progress, with the runlog.Progress or Silent that it made."""
    try:
        train(config, progress)
    except OneLineExit as error:
        speak_for_this_rank(error)
        raise
    except Exception as error:
        known = explain(error, config, memory)
        if known is None:
            raise
        speak_for_this_rank(known)
        raise known from None
    except KeyboardInterrupt:  # in training the loop itself ends, and saves
        progress.say("stopped, outside of training")
        raise SystemExit(130) from None
    finally:
        release_folder(config.out_dir)
        progress.close()


def explain(error, config, memory):
    """The OneLineExit for an exception whose cause lies outside the code: memory, compilers; None for any other."""
    full = None
    if isinstance(error, torch.OutOfMemoryError):
        full = "GPU"
    elif is_out_of_memory(error):
        full = "CPU"
    if full is None:
        missing = missing_compiler(error)
        return None if missing is None else ConfigError(missing)
    shards = "" if config.shard == "fsdp" else f", --shard=fsdp on several {full}s"
    checkpoints = "" if config.activation_checkpointing else ", --activation_checkpointing"
    saved = checkpoint.describe_newest(config.out_dir)
    return RunFailed(f"{full} out of memory with {memory}{checkpoints}{shards}. {saved}")


def speak_for_this_rank(error):
    """Print an error that this rank alone may have met, after a wait in which rank 0 can read its last checkpoint and end."""
    rank = ranks()[0]
    if rank:
        print_for_rank(error, rank, seconds=15)


def not_finite(config, what, options=""):
    """-> RunFailed of a run whose numbers are not finite, with the checkpoint to resume from and what to change.

    what     where the number was found, in words
    options  further options that may help: "--dtype=float32, "
    """
    saved, remedy = checkpoint.describe_newest(config.out_dir), f"{options}a lower lr (it is {config.lr:g})"
    return RunFailed(f"{what}; stopped, this step is not saved. {saved}; resume with {remedy} or more warmup_steps")
