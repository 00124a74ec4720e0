"""Fixtures shared by the tests. Run them all with `pytest`, from the repository's root.

Scripts are called as users call them: train.py by its file, lab.sweep as `python -m lab.sweep`.
"""

import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT}/tests"  # for the processes that tests start; pyproject.toml sets it for pytest
FILES_OF_A_RUN = ["ckpt.pt", "ckpt_prev.pt", "config.json", "log.jsonl", "loss.png", "run.lock"]
torch.set_num_threads(1)  # as in the processes that tests start, so that sums are rounded alike
# The fork server imports these once (6 s of CPU time) for all processes that run_forked and test_checkpoint start.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "triton", "matplotlib.pyplot"]
)


@pytest.fixture(scope="session")
def char_data(tmp_path_factory):
    """A data folder with a vocabulary of 96 characters and something to learn: lines such as `3 + 4 = 7`."""
    folder = tmp_path_factory.mktemp("chars")
    text = "".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40))
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    ids = np.where(ids == 10, 0, ids - 31).astype(np.uint8)
    ids[:-4000].tofile(folder / "train.bin")
    ids[-4000:].tofile(folder / "val.bin")
    meta = dict(tokenizer="char96", vocab_size=96, dtype="uint8", train_tokens=len(ids) - 4000, val_tokens=4000)
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture
def tiny(char_data, tmp_path):
    """Arguments for a run that takes seconds; its out_dir is tmp_path/run."""
    options = dict(
        data_dir=char_data, out_dir=tmp_path / "run", vocab_size=96, n_layer=2, n_head=2, d_model=36, block_size=32,
        micro_batch=4, batch_tokens=256, max_steps=20, eval_interval=10, eval_tokens=1000, log_interval=1,
        warmup_steps=5, lr=5e-3, device="cpu", compile=False,
    )  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


HANDLERS = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """Undo the handlers that a run in this process installs: with them, SIGTERM would not end a later test's pools."""
    restore_signal_handlers()
    yield
    restore_signal_handlers()


def restore_signal_handlers():
    for name, handler in HANDLERS.items():
        signal.signal(name, handler)


@contextmanager
def small_disk(size):
    """Limit each file of this process to `size` bytes: a longer write fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_rows(out_dir):
    """The rows of a run's log, in order."""
    with open(os.path.join(out_dir, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def losses(out_dir, key="loss"):
    """{step: row[key]} for the rows of a run's log that hold the key."""
    return {row["step"]: row[key] for row in read_rows(out_dir) if key in row}


def run_script(*words, env=None, processes=None, timeout=240):
    """Run a script of the project as a user would -> CompletedProcess with text output."""
    return subprocess.run(
        command(words, processes), cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment(env)
    )


def run_interpreted(script, timeout=240):
    """Run a script with Triton's interpreter, which must be chosen before Triton is imported: hence the new process."""
    return run_script(script, env={"TRITON_INTERPRET": "1"}, timeout=timeout)


def run_forked(script, *words, processes=None, timeout=240):
    """Like run_script, but faster: no torchrun, and torch is already imported.

    It tests what a script does, not how its processes start and end.
    """
    context, world, ranks = multiprocessing.get_context("forkserver"), processes or 1, []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[os.path.join(folder, f"{rank}.{name}") for name in ("out", "err")] for rank in range(world)]
        for rank in range(world):
            env = dict(MASTER_ADDR="localhost", MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
            env = environment({name: str(value) for name, value in env.items()} if processes else None)
            ranks.append(
                context.Process(target=run_as_main, args=(str(script), [*map(str, words)], env, outputs[rank]))
            )
            ranks[-1].start()
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(deadline - time.monotonic())
                assert process.exitcode is not None, f"{script} takes more than {timeout} s"
        finally:
            for process in ranks:
                process.kill()
        said = ["".join(open(path).read() for path in paths) for paths in zip(*outputs)]
    return subprocess.CompletedProcess(words, max(abs(process.exitcode) for process in ranks), *said)


def run_as_main(script, words, env, outputs):
    """Do what `python script words` does; standard output and error go to the two files `outputs`."""
    os.environ.clear()
    os.environ.update(env)
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(ROOT)
    sys.argv = [os.path.join(ROOT, script), *words]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def start_script(*words, env=None, processes=None):
    """Start a script in the background -> Popen; standard error is merged into standard output."""
    return subprocess.Popen(
        command(words, processes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(env),
    )


def command(words, processes):
    """The words that start a script, or a module, on its own or on several processes by torchrun."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script, *words = map(str, words)
    is_module = not script.endswith(".py") and not script.startswith("-")
    return [*launcher, *(["-m"] if is_module else []), script, *words]


def environment(extra):
    """The environment of a process that a test starts, with these variables added."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **(extra or {})}
