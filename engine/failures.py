"""A run that fails ends with one line that says what to do, whichever process fails."""

import signal
import sys
import time

import torch

from configurator import ConfigError, OneLineExit, RunFailed
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
    progress = runlog.Silent() if ranks()[0] else runlog.Progress(config.max_steps)
    try:
        with losable_output():
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
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        full = "CPU"
    if full is None:
        missing = missing_compiler(error)
        return None if missing is None else ConfigError(missing)
    shards = "" if config.shard == "fsdp" else f", --shard=fsdp on several {full}s"
    checkpoints = "" if config.activation_checkpointing else ", --activation_checkpointing"
    saved = checkpoint.describe_newest(config.out_dir)
    return RunFailed(f"{full} out of memory with {memory}{checkpoints}{shards}. {saved}")


def speak_for_this_rank(error):
    """Print an error that this rank alone may have met; Python prints a OneLineExit's line on rank 0 only.

    Where rank 0 met it too, torchrun ends this process during the wait, so that the line appears once. The wait is
    long enough for a rank 0 that reads its last checkpoint before it ends.
    """
    rank = ranks()[0]
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(15)
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        error.spoken = True


def not_finite(config, what, options=""):
    """-> RunFailed of a run whose numbers are not finite, with the checkpoint to resume from and what to change.

    what     where the number was found, in words
    options  further options that may help: "--dtype=float32, "
    """
    saved, remedy = checkpoint.describe_newest(config.out_dir), f"{options}a lower lr (it is {config.lr:g})"
    return RunFailed(f"{what}; stopped, this step is not saved. {saved}; resume with {remedy} or more warmup_steps")
