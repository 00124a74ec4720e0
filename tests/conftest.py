"""Fixtures shared by the tests. Run them all with `pytest`, from the repository's root."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(1)  # as in the processes the tests start: sums in another order round otherwise


@pytest.fixture(scope="session")
def char_data(tmp_path_factory):
    """A data folder of 96-character ids with structure to learn: arithmetic written out."""
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
    """Arguments of a run of seconds; its out_dir is tmp_path/run."""
    options = dict(
        data_dir=char_data, out_dir=tmp_path / "run", vocab_size=96, n_layer=2, n_head=2, d_model=36, block_size=32,
        micro_batch=4, batch_tokens=256, max_steps=20, eval_interval=10, eval_tokens=1000, log_interval=1,
        warmup_steps=5, lr=5e-3, device="cpu", compile=False,
    )  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run in this process replaces them: put pytest's back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def read_rows(out_dir):
    with open(os.path.join(out_dir, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def losses(out_dir, key="loss"):
    return {row["step"]: row[key] for row in read_rows(out_dir) if key in row}


def run_script(*words, env=None, processes=None, timeout=240):
    """Run a script of the project as a user would -> CompletedProcess with text output."""
    return subprocess.run(
        command(words, processes), cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment(env)
    )


def start_script(*words, env=None, processes=None):
    return subprocess.Popen(
        command(words, processes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(env),
    )


def command(words, processes):
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *map(str, words)]


def environment(extra):
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(extra or {})}
