"""Inflicts faults on real runs: kills, hangs, full disks, damaged files, NaN. What does the user see, what is lost?

The reference is a run that nothing disturbs: after a fault and --resume, logs and checkpoints must equal its own.

    python -m tests.faults             all of them: 18 minutes on 2 cores
    python -m tests.faults --short     fewer kills and steps
    python -m tests.faults --only=disk_full --json=faults.json

It runs train.py on the CPU as a user would, with tiny data in a temporary folder, and prints one line per fault; the
exit status is 0 only if all passed. test_faults.py runs some of them under pytest. It needs Linux's /proc.
"""

import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data import TokenData
from engine import checkpoint

LIMIT = 300  # seconds that a command may take
OPTIONS = dict(
    vocab_size=96, n_layer=2, n_head=2, d_model=36, block_size=32, micro_batch=4, batch_tokens=256, eval_tokens=1000,
    max_steps=30, eval_interval=10, log_interval=1, warmup_steps=5, lr=5e-3, dropout=0.1, device="cpu", compile=False,
)  # fmt: skip
DDP, FSDP = dict(processes=2, shard="none"), dict(processes=2, shard="fsdp")

# A script that harms train.py from within: {what} names the harm, {rank} the rank that suffers it. `step` is the number
# of the update in progress, from 1.
HARM = """
import errno, math, os, sys, time
import torch
import data, train
from engine import checkpoint, recorder

step = 0
mine, first = int(os.environ.get("RANK", 0)) == {rank}, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
train_batch, val_batch = data.TokenData.train_batch, data.TokenData.val_batch
forward, load = train.GPT.forward, checkpoint.load
fsync, save, run_passes, failed_reads = os.fsync, checkpoint.save, train.Trainer.run_passes, 0

def harmed_batch(self, seed, number, *rest):
    global step
    step = number + 1
    if "hang" == {what!r} and mine and first and step == 7:
        time.sleep(1000)
    return train_batch(self, seed, number, *rest)

def harmed_val_batch(self, *args):
    if "hang_evaluation" == {what!r} and mine and step >= 10:
        time.sleep(1000)
    return val_batch(self, *args)

def harmed_forward(self, *args, **kwargs):
    if self.training and mine and step == 13:
        if "nan" == {what!r}:  # spoils the gradient of one parameter; the loss stays finite
            next(self.parameters()).register_hook(lambda gradient: gradient * math.nan)
        if "memory" == {what!r}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total …")
    return forward(self, *args, **kwargs)

def slow_load(*args, **kwargs):  # as a large checkpoint takes, which rank 0 reads to name its step
    time.sleep(4)
    return load(*args, **kwargs)

def harmed_passes(self, *batch):
    losses = run_passes(self, *batch)
    if "all_nan" == {what!r} and step > 10:
        next(self.model.parameters()).grad[0] = math.nan
    return losses

def harmed_open(path, *args, **kwargs):
    global failed_reads
    if str(path).endswith("/ckpt.pt") and failed_reads < dict(read_error=99, read_errors=2).get({what!r}, 0):
        failed_reads += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
    return open(path, *args, **kwargs)

def harmed_fsync(descriptor):
    if "hang_writing" == {what!r} and mine and step == 10:
        time.sleep(1000)
    return fsync(descriptor)

def save_apart(out_dir, *args, **kwargs):  # as on a node with a disk of its own
    return save(out_dir + ".other" * mine, *args, **kwargs)

data.TokenData.train_batch, data.TokenData.val_batch = harmed_batch, harmed_val_batch
train.GPT.forward = harmed_forward
train.Trainer.run_passes, checkpoint.open, os.fsync = harmed_passes, harmed_open, harmed_fsync
if "apart" == {what!r}:
    checkpoint.save = save_apart
if "options" == {what!r} and mine:
    sys.argv.append("--lr=1e-5")
if "nan" == {what!r}:
    checkpoint.load = slow_load
if "early" == {what!r} and mine and first:  # the folder is locked, but the earlier run in it is not yet set aside
    recorder.open_out_dir = lambda *args: os._exit(1)
train.main(sys.argv[1:])
"""

# ---------------------------------------------------------------------------------------
# Running commands


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    left: bool  # whether any of its processes outlived it

    @property
    def message(self):
        """The last line that begins with "error: ", or the last line of all if none does."""
        lines = self.err.strip().splitlines() or [""]
        return ([line for line in lines if line.startswith("error: ")] or lines)[-1]


class Command:
    """A command in the background. A tag in the environment identifies all of its processes, orphans included."""

    def __init__(self, words, folder, limit=None, stdout=None, **variables):
        tag = uuid.uuid4().hex
        self.tag = f"FAULTS_TAG={tag}".encode()
        self.paths = [os.path.join(folder, f"{tag}.{name}") for name in ("out", "err")]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, "FAULTS_TAG": tag}
        env |= variables
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            self.popen = subprocess.Popen(
                words, cwd=ROOT, stdout=stdout or out, stderr=err, env=env, start_new_session=True,
                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
            )  # fmt: skip

    def pids(self, variable=b""):
        """Process ids of all its processes but zombies, or of those with this b"NAME=value" in their environment."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):  # it has just ended
                environment = read(f"/proc/{pid}/environ").split(b"\0")
                if self.tag in environment and (not variable or variable in environment):
                    found.append(int(pid))
        return found

    def out(self):
        return read(self.paths[0]).decode(errors="replace")

    def wait_until(self, condition):
        """True as soon as condition() holds, False if the command ends first."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.popen.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the command did not do what was awaited within {LIMIT} s")
            time.sleep(0.0002)
        return True

    def kill(self, pids=None):
        """Send SIGKILL to all its processes at once. Pass pids collected earlier where finding them now takes too long."""
        for pid in pids or self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        while self.pids():
            time.sleep(0.01)

    def wait(self):
        try:
            self.popen.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the command did not end within {LIMIT} s") from None
        patience = time.monotonic() + 2
        while (left := bool(self.pids())) and time.monotonic() < patience:
            time.sleep(0.05)
        self.kill()
        return Done(self.popen.returncode, self.out(), read(self.paths[1]).decode(errors="replace"), left)


class Lab:
    """A temporary folder with data and runs, and the commands started in it."""

    def __init__(self, folder):
        self.folder, self.numbers, self.random = str(folder), itertools.count(), random.Random(1)
        self.whole, self.commands = {}, []
        self.data = self.path("data")
        os.mkdir(self.data)
        text = "".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40))
        ids = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = np.where(ids == 10, 0, ids - 31).astype(np.uint8)
        ids[:-4000].tofile(os.path.join(self.data, "train.bin"))
        ids[-4000:].tofile(os.path.join(self.data, "val.bin"))
        meta = dict(tokenizer="char96", vocab_size=96, dtype="uint8", train_tokens=len(ids) - 4000, val_tokens=4000)
        write(os.path.join(self.data, "meta.json"), json.dumps(meta))

    def path(self, name):
        """A path in a new folder, whose last part is `name`."""
        folder = os.path.join(self.folder, str(next(self.numbers)))
        os.mkdir(folder)
        return os.path.join(folder, name)

    def start(self, out_dir, processes=1, restarts=0, harm=None, rank=0, how=None, **options):
        """Start train.py on `processes` processes. harm: what goes wrong on `rank`; how: further arguments for Command."""
        script, launcher = "train.py", [sys.executable]
        if harm:
            script = self.path("harm.py")
            write(script, HARM.format(what=harm, rank=rank))
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        options = {"data_dir": self.data, "out_dir": out_dir, **OPTIONS, **options}
        words = [*launcher, script, *(f"--{key}={value}" for key, value in options.items())]
        self.commands.append(Command(words, self.folder, **(how or {})))
        return self.commands[-1]

    def kill_all(self):
        """Kill every process that a fault started, so that none outlives it."""
        while self.commands:
            self.commands.pop().kill()

    def run(self, out_dir, **options):
        return self.start(out_dir, **options).wait()

    def unbroken(self, **options):
        """The out_dir of a run with these options that nothing disturbs. It is made once: do not write to it."""
        key = tuple(sorted(options.items()))
        if key not in self.whole:
            out_dir = self.path("unbroken")
            done = self.run(out_dir, **options)
            if done.status or done.left or done.err and "processes" not in options:
                raise RuntimeError(f"the undisturbed run failed: {done.err}")
            self.whole[key] = out_dir
        return self.whole[key]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, text, content=b""):
    """Write a file that holds this text, followed by these bytes."""
    with open(path, "wb") as file:
        file.write(text.encode() + content)


# ---------------------------------------------------------------------------------------
# Judging


class Verdict(NamedTuple):
    message: str  # the last one that the user saw
    passed: bool
    detail: str
    status: int | None
    stderr: str = ""  # the end of it, if a claim does not hold


def judge(done, claims, figures=""):
    """claims: {what must hold: whether it does}"""
    broken = [f"NOT TRUE: {claim}" for claim, holds in claims.items() if not holds]
    detail = "; ".join(filter(None, [*broken, figures]))
    return Verdict(done.message, not broken, detail, done.status, done.err[-10_000:] if broken else "")


def ended_well(done):
    return {"exit status 0": done.status == 0, "no process left": not done.left}


def ended_clearly(done, *words, processes=1):
    """Claims that the command ended with one line of error that contains these words. torchrun adds its own report."""
    ours = [line for line in done.err.splitlines() if line.startswith("error: ")]
    return {
        "exit status not 0": done.status != 0,
        "one line of error, which begins with error:": len(ours) == 1 and (processes > 1 or done.err.count("\n") == 1),
        "no traceback": processes > 1 or "Traceback" not in done.out + done.err,
        **{f"the message contains {word!r}": word in done.message for word in words},
        "no process left": not done.left,
    }


def rows_of(out_dir):
    """Rows of the log, without a last line that a kill has cut short."""
    lines = read(os.path.join(out_dir, "log.jsonl")).splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def last_step(out_dir):
    """The last step in the log, -1 if there is none. It reads only the end of the log: it is called often."""
    with suppress(FileNotFoundError), open(os.path.join(out_dir, "log.jsonl"), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
        return max(map(int, re.findall(rb'\{"step": (\d+).*\}\n', file.read())), default=-1)
    return -1


def saved_in(out_dir):
    """The checkpoint that a run would resume from, and its tensors."""
    saved = checkpoint.load(out_dir, say=lambda text: None, alone=True)
    return saved, checkpoint.flatten_checkpoint({key: saved[key] for key in ("model", "optimizer")})


def equal_runs(out_dir, unbroken):
    """Claims that two runs are equal bit for bit."""
    keys = ("step", "loss", "val_loss", "grad_norm", "lr")
    ours, theirs = ([[row.get(key) for key in keys] for row in rows_of(path)] for path in (out_dir, unbroken))
    (left, mine), (right, other) = saved_in(out_dir), saved_in(unbroken)
    same = left["step"] == right["step"] and mine.keys() == other.keys() and len(mine) > 20
    return {
        "the log equals the unbroken run's": len(theirs) > 10 and ours == theirs,
        "the last checkpoint equals the unbroken run's": same
        and all(torch.equal(mine[name], other[name]) for name in mine),
    }


def unfinished(out_dir):
    """{name: (inode, time, size)} of the files that exist only while a checkpoint is written."""
    found = {}
    for name in os.listdir(out_dir):
        if name.startswith("ckpt") and (name.endswith(".part") or "aside" in name):
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(out_dir, name))
                found[name] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


# ---------------------------------------------------------------------------------------
# Kills, hangs and signals


def kills(lab, count, **options):
    """SIGKILL to the whole run, `count` times. Half of the kills aim at the writing of a checkpoint or its two renames."""
    options = {"max_steps": 30 * count + 30, **options}
    out_dir, unbroken = lab.path("run"), lab.unbroken(**options)
    hits, troubles, newest = dict(writing=0, renaming=0, training=0, resuming=0), [], 0
    writing = 0.1 if options.get("shard") == "fsdp" else 0.006  # seconds
    for number in range(count):
        command, aim = lab.start(out_dir, resume=number > 0, **options), AIMS[number % len(AIMS)]
        check_resumed(command, number, newest, troubles)
        target, pids = max(0, last_step(out_dir)) + lab.random.randint(1, 15), None
        if aim != "resuming":
            command.wait_until(lambda target=target: last_step(out_dir) >= target)
            pids = command.pids()
        before = unfinished(out_dir)  # left by an earlier kill
        if aim == "writing":
            command.wait_until(lambda before=before: unfinished(out_dir) not in ({}, before))
        elif aim == "renaming":
            command.wait_until(lambda before=before: "aside" in str(unfinished(out_dir).keys() - before.keys()))
        time.sleep(dict(writing=writing, renaming=0, training=0.05, resuming=0.02)[aim] * lab.random.random())
        if command.popen.poll() is not None:
            return judge(command.wait(), {f"kill {number + 1} came before the end": False}, "; ".join(troubles))
        command.kill(pids)
        new = [name for name, what in unfinished(out_dir).items() if before.get(name) != what]
        hits["renaming" if "aside" in str(new) else "writing" if new else "resuming" if not pids else "training"] += 1
        # Once a later step is in the log, the checkpoint of an evaluation is saved.
        rows = rows_of(out_dir)
        newest = max([newest, *(row["step"] for row in rows[:-1] if "val_loss" in row)])
    command = lab.start(out_dir, resume=True, **options)
    check_resumed(command, count, newest, troubles)
    done = command.wait()
    claims = {
        **ended_well(done),
        "every restart resumes from the newest whole checkpoint": not troubles,
        "at least a fifth of the kills hit a save": hits["writing"] + hits["renaming"] >= count // 5,
        "at least a fifth of the kills hit training": hits["training"] >= count // 5,
        "nothing unfinished is left": not unfinished(out_dir),
        **equal_runs(out_dir, unbroken),
    }
    figures = ", ".join(f"{number} in {where}" for where, number in hits.items())
    return judge(done, claims, "; ".join([*troubles, f"{count} kills: {figures}; {options['max_steps']} steps"]))


AIMS = ["writing", "training", "renaming", "training", "writing", "training", "resuming", "writing"]


def check_resumed(command, number, newest, troubles):
    """Wait until a restart has found its checkpoint; add to troubles if it is older than `newest`, which was saved."""
    if number and command.wait_until(lambda: "resuming from step" in command.out()):
        step = int(re.search(r"resuming from step (\d+)", command.out())[1])
        if step < newest or "not a whole" in command.out():
            troubles.append(f"restart {number} resumed from step {step}, though step {newest} was saved")
    elif number:
        troubles.append(f"restart {number} found no checkpoint: {command.wait().message}")


def rank_killed(lab, writing=False, **options):
    """SIGKILL to rank 1, in training or while a checkpoint is written; torchrun restarts the group."""
    out_dir, unbroken, at = lab.path("run"), lab.unbroken(**options), lab.random.randint(12, 30)
    command = lab.start(out_dir, restarts=1, **options)
    reached = command.wait_until(lambda: last_step(out_dir) >= at)
    (pid,) = command.pids(b"RANK=1")
    if writing:
        reached = command.wait_until(lambda: unfinished(out_dir))
    os.kill(pid, signal.SIGKILL)
    done = command.wait()
    resumed = re.findall(r"resuming from step (\d+)", done.out)
    claims = {"rank 1 was killed": reached, **ended_well(done), "the group was restarted once": len(resumed) == 1}
    return judge(
        done, {**claims, **equal_runs(out_dir, unbroken)}, f"killed after step {at}, resumed from step {resumed}"
    )


def asked_to_save(lab, **options):
    """SIGUSR1 to one process, far from any evaluation; then SIGKILL to all, and --resume from the checkpoint."""
    options = {"max_steps": 200, "eval_interval": 200, **options}
    out_dir, unbroken = lab.path("run"), lab.unbroken(**options)
    command = lab.start(out_dir, **options)
    command.wait_until(lambda: last_step(out_dir) >= 6)
    (pid,) = command.pids(b"RANK=1") if "processes" in options else [command.popen.pid]
    asked_at = last_step(out_dir)
    os.kill(pid, signal.SIGUSR1)
    saved = command.wait_until(lambda: saved_in(out_dir)[0]["step"] > 0 and not unfinished(out_dir))
    command.kill()
    step = saved_in(out_dir)[0]["step"]
    done = lab.run(out_dir, resume=True, **options)
    claims = {
        "it saved while it ran": saved,
        "it saved within five steps": asked_at < step <= asked_at + 5,
        "it resumed from there": f"resuming from step {step}" in done.out,
        **ended_well(done),
        **equal_runs(out_dir, unbroken),
    }
    return judge(done, claims, f"asked after step {asked_at}, saved at step {step}")


def hang(lab, restarts, timeout, **options):
    """Rank 1 hangs in step 7 of the first attempt."""
    out_dir = lab.path("run")
    command = lab.start(out_dir, restarts=restarts, harm="hang", rank=1, timeout=timeout, **options)
    command.wait_until(lambda: last_step(out_dir) >= 6)
    begun = time.monotonic()
    done = command.wait()
    seconds = time.monotonic() - begun
    if restarts:
        named = "rank 1" in done.message and "no progress" in done.message
        return judge(
            done, {**ended_well(done), "rank 1 is named": named, **equal_runs(out_dir, lab.unbroken(**options))}
        )
    claims = {
        **ended_clearly(done, "rank 1", "no progress", "--timeout", **options),
        "it ends soon": seconds < timeout + 15,
        "the log ends with step 6": last_step(out_dir) == 6,
        "the checkpoint of step 0 is whole": saved_in(out_dir)[0]["step"] == 0,
    }
    return judge(done, claims, f"ended {seconds:.0f} s after step 6")


def hang_alone(lab, harm, words, timeout):
    """A run on one process hangs: in step 7, or while it writes a checkpoint."""
    out_dir = lab.path("run")
    begun = time.monotonic()
    done = lab.run(out_dir, harm=harm, timeout=timeout)
    claims = {**ended_clearly(done, "no progress", "--timeout", *words), "it ends soon": time.monotonic() - begun < 60}
    return judge(done, claims, f"{time.monotonic() - begun:.0f} s, start included")


def ranks_differ(lab, **options):
    """Rank 1 gets another learning rate than rank 0."""
    out_dir = lab.path("run")
    done = lab.run(out_dir, harm="options", rank=1, **options)
    claims = {
        **ended_clearly(done, "rank 1 has --lr=1e-05", "rank 0 has --lr=0.005", processes=2),
        "no run begins": not os.path.exists(out_dir),
    }
    return judge(done, claims)


def told_to_end(lab, name, whom, **options):
    """A signal to the run or to its launcher, far from any evaluation: the run saves and ends. Then --resume."""
    options = {"max_steps": 200, "eval_interval": 200, **options}
    out_dir, unbroken = lab.path("run"), lab.unbroken(**options)
    command = lab.start(out_dir, **options)
    command.wait_until(lambda: last_step(out_dir) >= 6)
    command.popen.send_signal(name)
    begun = time.monotonic()
    while command.pids() and time.monotonic() < begun + 20:
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    first = command.wait()
    step = saved_in(out_dir)[0]["step"]
    done = lab.run(out_dir, resume=True, **options)
    claims = {
        "all processes ended by themselves": seconds < 20,
        "the exit status is as it should be": first.status == (0 if whom == "run" else -name),
        "it saved its last step": 6 <= step < 200 and f"stopped at step {step}, saved" in first.out,
        "no traceback": "Traceback" not in first.out + first.err,
        "it resumed from there": f"from step {step}" in done.out,
        **ended_well(done),
        "it ended like the unbroken run": equal_runs(out_dir, unbroken)[
            "the last checkpoint equals the unbroken run's"
        ],
    }
    return judge(done, claims, f"all ended {seconds:.1f} s after the signal, saved at step {step}")


def interrupted_twice(lab):
    """Ctrl-C twice in an evaluation that hangs."""
    out_dir = lab.path("run")
    command = lab.start(out_dir, harm="hang_evaluation")
    command.wait_until(lambda: last_step(out_dir) >= 9)
    time.sleep(1)
    command.popen.send_signal(signal.SIGINT)
    asked = command.wait_until(lambda: "asked to stop" in command.out())
    time.sleep(0.5)
    begun = time.monotonic()
    command.popen.send_signal(signal.SIGINT)
    done = command.wait()
    claims = {
        "it answers the first Ctrl-C": asked,
        "the second Ctrl-C ends it": time.monotonic() - begun < 5,
        "the status is 130": done.status == 130,
        "no traceback": "Traceback" not in done.out + done.err,
        "it names the last checkpoint": "last checkpoint" in done.out,
        "the checkpoint of step 0 is whole": saved_in(out_dir)[0]["step"] == 0,
    }
    return judge(done, claims)


def output_lost(lab, kind):
    """Standard output is full, a pipe without a reader, or takes ASCII only: the run still equals the unbroken one."""
    name, how = "run", {}
    if kind == "full":
        how["stdout"] = open("/dev/full", "wb")
    elif kind == "unread":
        reader, writer = os.pipe()
        os.close(reader)
        how["stdout"] = writer
    elif kind == "ascii":
        name, how["PYTHONIOENCODING"] = "läuft", "ascii"
    out_dir = lab.path(name)
    done = lab.run(out_dir, how=how, **(dict(resume=True) if kind == "ascii" else {}))
    said = dict(full="No space left on device", unread="Broken pipe").get(kind, "")
    claims = {**ended_well(done), "no traceback": "Traceback" not in done.err, "it states the cause": said in done.err}
    claims["in one line at most"] = done.err.count("\n") == (1 if said else 0)
    return judge(done, {**claims, **equal_runs(out_dir, lab.unbroken())})


def hang_writing(lab, rank, timeout, **options):
    """The disk of one rank hangs while the rank writes the checkpoint of step 10."""
    out_dir = lab.path("run")
    command = lab.start(out_dir, harm="hang_writing", rank=rank, timeout=timeout, **options)
    command.wait_until(lambda: last_step(out_dir) >= 10)
    begun = time.monotonic()
    done = command.wait()
    seconds = time.monotonic() - begun
    claims = {
        **ended_clearly(done, f"rank {rank} made no progress", "checkpoint.py", "--timeout", processes=2),
        "torchrun blames it too": bool(re.search(rf"Root Cause.*?rank +: {rank} ", done.err, re.S)),
        "it ends soon": seconds < timeout + 15,
        "the checkpoint of step 0 is whole": saved_in(out_dir)[0]["step"] == 0,
    }
    return judge(done, claims, f"ended {seconds:.0f} s after step 10")


# ---------------------------------------------------------------------------------------
# Several runs and one folder


def restarted_early(lab, **options):
    """Rank 0 dies before the old run in out_dir is set aside: the restart must start the new run, not resume the old."""
    out_dir = shutil.copytree(lab.unbroken(), lab.path("run"))
    done = lab.run(out_dir, restarts=1, harm="early", rank=0, seed=7, **options)
    claims = {
        **ended_well(done),
        "it resumed nothing": "resuming from" not in done.out and "resumed with" not in done.out,
        "the old run is set aside whole": all(equal_runs(f"{out_dir}.1", lab.unbroken()).values()),
        **equal_runs(out_dir, lab.unbroken(seed=7, **options)),
    }
    return judge(done, claims)


def together(lab, count):
    """`count` runs at once in one out_dir, half of them with --resume: one trains, the others are refused."""
    out_dir, options = lab.path("run"), dict(max_steps=100_000, eval_interval=50_000, log_interval=1)
    commands = [lab.start(out_dir, resume=number % 2 > 0, **options) for number in range(count)]

    def training():
        return [command for command in commands if command.popen.poll() is None]

    for command in commands:  # wait until all have ended but one
        command.wait_until(lambda: len(training()) <= 1)
    (owner,) = training()
    refused = [command.wait() for command in commands if command is not owner]
    owner.wait_until(lambda: last_step(out_dir) >= 3)
    os.kill(owner.popen.pid, signal.SIGTERM)
    done = owner.wait()
    steps = [row["step"] for row in rows_of(out_dir)]
    words = ("is in use by process", str(owner.popen.pid), "give another out_dir")
    claims = {
        **ended_well(done),
        "its log holds every step once": steps == list(range(len(steps))) and len(steps) > 3,
        "its checkpoint holds the last step": saved_in(out_dir)[0]["step"] == steps[-1],
    }
    for number, each in enumerate(refused):
        claims |= {f"{claim}, refused run {number}": so for claim, so in ended_clearly(each, *words).items()}
    return judge(refused[0], claims, f"{len(refused)} refused")


def folder_above(lab):
    """A new run starts in a folder that holds an old run, the data, and the folder of a run that is training."""
    above = shutil.copytree(lab.unbroken(), lab.path("out"))
    data_dir, inside = shutil.copytree(lab.data, os.path.join(above, "data")), os.path.join(above, "run")
    living = lab.start(inside, data_dir=data_dir, max_steps=100_000, eval_interval=50_000)
    living.wait_until(lambda: last_step(inside) >= 3)
    done = lab.run(above, data_dir=data_dir)
    os.kill(living.popen.pid, signal.SIGTERM)
    stopped = living.wait()
    steps = [row["step"] for row in rows_of(inside)]
    claims = {
        **ended_well(done),
        **equal_runs(above, lab.unbroken()),
        "the old run is set aside whole": all(equal_runs(f"{above}.1", lab.unbroken()).values()),
        "nothing else is set aside": not {"data", "run"} & set(os.listdir(f"{above}.1")),
        "the other run trained on undisturbed": all(ended_well(stopped).values()) and steps == list(range(len(steps))),
    }
    return judge(done, claims)


def children_end(lab, module, name):
    """A sweep or a search gets this signal while one of its runs trains: none of its processes outlives it."""
    out = lab.path("runs")
    options = {**OPTIONS, "data_dir": lab.data, "max_steps": 100_000, "eval_interval": 50_000}
    if module == "lab.sweep":
        file, run = lab.path("sweep.py"), os.path.join(out, "seed1")
        write(file, f"runs = [dict(seed=1)]\ncommon = {options!r}\n")
        words = [file, "--gpus=0"]
    else:
        run, left_out = os.path.join(out, "trial_0"), ("micro_batch", "dropout")
        words = [f"--{key}={value}" for key, value in options.items() if key not in left_out]
        words += ["config/quickstart.py", "--micro_batch=4", "--trials=1"]
    command = Command([sys.executable, "-m", module, *words, f"--out={out}"], lab.folder)
    lab.commands.append(command)
    reached = command.wait_until(lambda: last_step(run) >= 3)
    command.popen.send_signal(getattr(signal, name))
    begun = time.monotonic()
    while command.pids() and time.monotonic() < begun + 60:
        time.sleep(0.05)
    done = command.wait()
    claims = {
        "a run was training": reached,
        "no process is left": not done.left and time.monotonic() < begun + 60,
        "its run saved": saved_in(run)[0]["step"] == last_step(run) > 0,
        "exit status not 0": done.status != 0,
        "it ends with one line": name == "SIGKILL" or done.message.startswith("stopped: the same command resumes"),
    }
    return judge(done, claims, f"all ended after {time.monotonic() - begun:.1f} s")


# ---------------------------------------------------------------------------------------
# Disks and checkpoints


def disk_full(lab, mounted, **options):
    """There is no room for a checkpoint; once there is, the run resumes and ends like the unbroken one."""
    options["max_steps"] = 40
    unbroken, folder, limit = lab.unbroken(**options), lab.path("disk"), None
    path, out_dir = saved_in(unbroken)[0]["path"], os.path.join(folder, "run")
    files = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
    size = sum(map(os.path.getsize, files))  # of a checkpoint; without optimizer state, as at step 0, it takes a third
    os.mkdir(folder)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.55 * size) + 50_000}", "faults", folder]
    mounted = mounted and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        limit = 6 * size // len(files) // 10
    try:
        done = lab.run(out_dir, how=dict(limit=limit), **options)
        step, saved = last_step(out_dir), saved_in(out_dir)[0]["step"]
        words = "No space left on device" if mounted else "File too large", f"of step {saved}", "intact", "make room"
        claims = {
            **ended_clearly(done, *words, processes=options.get("processes", 1)),
            "the previous checkpoint is whole": saved == step - 10,
            "nothing unfinished is left": not unfinished(out_dir),
            "no row of the log is lost": [row["step"] for row in rows_of(out_dir)] == list(range(step + 1)),
        }
        if mounted:
            claims |= resumed_while_full(lab, folder, out_dir, options)
            subprocess.run(["mount", "-o", f"remount,size={10 * size}", folder], check=True)
        again = lab.run(out_dir, resume=True, **options)
        resumed = again.status == 0 and f"resuming from step {saved}" in again.out
        claims |= {"with room again it resumes from there": resumed, **equal_runs(out_dir, unbroken)}
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
    return judge(done, claims, f"{'tmpfs' if mounted else 'RLIMIT_FSIZE'}, full at step {step}")


def resumed_while_full(lab, folder, out_dir, options):
    """Claims about --resume when not one byte is free."""
    paths = [os.path.join(out_dir, name) for name in ("config.json", "log.jsonl")]
    before, filler = [read(path) for path in paths], os.path.join(folder, "filler")
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    full = lab.run(out_dir, resume=True, **options)
    os.remove(filler)
    changed = [path for path, content in zip(paths, before) if read(path) != content]
    claims = ended_clearly(full, "No space left", processes=options.get("processes", 1))
    claims[f"no file is changed: {changed}"] = not changed
    return {f"{claim}, resumed while full": holds for claim, holds in claims.items()}


def nodes_apart(lab, **options):
    """Each of two ranks writes to a folder of its own, as on two nodes without a shared file system."""
    out_dir = lab.path("run")
    done = lab.run(out_dir, harm="apart", rank=1, **options)
    words = f"out_dir={out_dir}", "which rank 1 has written", "all nodes share"
    left = [name for path in (out_dir, f"{out_dir}.other") for name in os.listdir(path) if name.startswith("ckpt")]
    return judge(done, {**ended_clearly(done, *words, processes=2), f"no checkpoint is left: {left}": not left})


def read_error(lab, harm):
    """Reading the newest checkpoint fails, twice or always. No checkpoint may be taken for damaged."""
    out_dir = shutil.copytree(lab.unbroken(), lab.path("run"))
    before = {name: read(os.path.join(out_dir, name)) for name in os.listdir(out_dir) if name.startswith("ckpt")}
    done = lab.run(out_dir, harm=harm, resume=True)
    after = {name: read(os.path.join(out_dir, name)) for name in os.listdir(out_dir) if name.startswith("ckpt")}
    claims = {"the checkpoints are unchanged": before == after, "none is skipped": "skipped" not in done.out}
    if harm == "read_errors":
        claims |= {**ended_well(done), "it resumed from the newest": "from step 30" in done.out}
    else:
        claims |= ended_clearly(done, f"{out_dir}/ckpt.pt cannot be read", "Input/output error", "may be whole")
    return judge(done, claims)


def no_folder(lab):
    """out_dir lies below a regular file, where no folder can be made."""
    file = lab.path("file")
    write(file, "")
    done = lab.run(os.path.join(file, "run"))
    return judge(done, ended_clearly(done, f"out_dir={file}/run", "cannot be written", "take another"))


def damaged(lab, spoil, words=None, **options):
    """Spoil a run's checkpoints, of steps 30 and 20, and resume it on one process.

    spoil(newest, previous, marker)  spoils the files at these paths; if code in them is run, it creates `marker`
    words  what the message that ends the run contains; None: the run must resume from step 20 and end like the
           unbroken one
    """
    out_dir, marker = shutil.copytree(lab.unbroken(**options), lab.path("run")), lab.path("marker")
    newest = saved_in(out_dir)[0]["path"]
    spoil(newest, newest.replace("ckpt", "ckpt_prev"), marker)
    log = rows_of(out_dir)
    done = lab.run(out_dir, resume=True)
    claims = {"no code in it was run": not os.path.exists(marker)}
    if words is not None:
        claims |= {**ended_clearly(done, *words), "the log is unchanged": rows_of(out_dir) == log}
        return judge(done, claims)
    said = next((line for line in done.out.splitlines() if "not a whole checkpoint" in line), "")
    fell_back = said.startswith(newest) and "resuming from step 20" in done.out
    claims |= {**ended_well(done), "it names the damaged one and resumes from the previous": fell_back}
    if not options:  # the run was on one process before, so sums are rounded alike
        claims |= equal_runs(out_dir, lab.unbroken())
    return judge(done._replace(err=said), claims)


def truncated(newest, *_):
    os.truncate(newest, os.path.getsize(newest) // 2)


def both_truncated(newest, previous, _):
    os.truncate(newest, os.path.getsize(newest) // 2)
    os.truncate(previous, 10)


def bit_flipped(newest, *_):
    """Flip a bit in the middle of the largest tensor, which PyTorch alone would not notice."""
    if os.path.isdir(newest):
        path = os.path.join(newest, "__0_0.distcp")
        at = os.path.getsize(path) // 2
    else:
        path = newest
        with zipfile.ZipFile(path) as archive:
            tensors = [part for part in archive.infolist() if "/data/" in part.filename]
        largest = max(tensors, key=lambda part: part.file_size)
        at = largest.header_offset + largest.file_size // 2
    content = bytearray(read(path))
    content[at] ^= 1
    with open(path, "wb") as file:
        file.write(content)


class Evil:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def evil(newest, previous, marker):
    """Put code into the newest checkpoint: in a file by torch.save, or in a directory's metadata, its checksums mended."""
    path = os.path.join(newest, ".metadata") if os.path.isdir(newest) else newest
    with open(path, "wb") as file:
        (pickle.dump if os.path.isdir(newest) else torch.save)({"step": 30, "config": Evil(marker)}, file)
    with open(path, "rb") as file:
        pickle.load(file) if os.path.isdir(newest) else torch.load(file, weights_only=False)
    os.rmdir(marker)  # raises an error if the code does not work when it is run
    if os.path.isdir(newest):
        manifest = os.path.join(newest, "manifest.json")
        write(manifest, json.dumps({**json.loads(read(manifest)), ".metadata": checkpoint.checksum_of(path)}))


def both_evil(newest, previous, marker):
    evil(newest, previous, marker)
    with open(previous, "wb") as file:
        pickle.dump({"step": 20, "config": Evil(marker)}, file)  # a bare pickle, as old versions of PyTorch write


def a_folder(newest, *_):
    os.remove(newest)
    os.mkdir(newest)


def a_fifo(newest, *_):
    os.remove(newest)
    os.mkfifo(newest)


def a_text(newest, *_):
    write(newest, "This is not a checkpoint.\n")


def packed(newest, *_):
    """Compress the members, as unzip and zip would: their checksums are right, but the bytes of the file differ."""
    with zipfile.ZipFile(newest) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(newest, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def step_nan(newest, *_):
    torch.save({**torch.load(newest, weights_only=True), "step": float("nan")}, newest)


def without_scaler(newest, *_):
    saved = torch.load(newest, weights_only=True)
    del saved["scaler"]
    torch.save(saved, newest)


def with_nan(newest, *_):
    saved = torch.load(newest, weights_only=True)
    saved["model"]["final_norm.weight"][0] = float("nan")
    torch.save(saved, newest)


def without_chunk(newest, *_):
    """Remove one chunk of a tensor: DCP would leave whatever the memory held in its place."""
    path, manifest = (os.path.join(newest, name) for name in (".metadata", "manifest.json"))
    metadata = pickle.loads(read(path))
    del metadata.state_dict_metadata["model.token_embedding.weight"].chunks[1]
    with open(path, "wb") as file:
        pickle.dump(metadata, file)
    write(manifest, json.dumps({**json.loads(read(manifest)), ".metadata": checkpoint.checksum_of(path)}))


def other_model(newest, previous, _):
    """Make the tensors of both checkpoints narrower and leave their options as they are."""
    for path in (newest, previous):
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "model": {name: tensor[..., :-1] for name, tensor in saved["model"].items()}}, path)


# ---------------------------------------------------------------------------------------
# Data, options, numbers, memory


def bad_data(lab, spoil, words, **options):
    """A run on data that spoil(folder) has damaged ends with an error that contains these words."""
    folder = shutil.copytree(lab.data, lab.path("spoilt"))
    spoil(folder)
    done = lab.run(lab.path("run"), data_dir=folder, **options)
    return judge(done, ended_clearly(done, folder, *words, processes=options.get("processes", 1)))


def cut_data(train_bytes=None, meta_bytes=None, **changes):
    """A function that cuts train.bin and meta.json to these sizes and changes keys of meta.json, or removes them (None)."""

    def spoil(folder):
        path = os.path.join(folder, "meta.json")
        meta = {**json.loads(read(path)), **changes}
        write(path, json.dumps({key: value for key, value in meta.items() if value is not None})[:meta_bytes])
        if train_bytes is not None:
            os.truncate(os.path.join(folder, "train.bin"), train_bytes)

    return spoil


def no_meta(folder):
    os.remove(os.path.join(folder, "meta.json"))


def bad_token(row):
    """A function that writes a token outside the vocabulary where the fifth update reads this row of its batch."""

    def spoil(folder):
        tokens = TokenData(folder, OPTIONS["block_size"])
        with open(os.path.join(folder, "train.bin"), "r+b") as file:
            file.seek(int(tokens.train_offsets(1337, 4, 8)[row]) + 5)
            file.write(bytes([200]))

    return spoil


def data_cut_while_running(lab, **options):
    """train.bin is truncated after a run's sixth step; with the data restored the run resumes and ends as if unbroken."""
    options = {"max_steps": 200, **options}
    folder, out_dir, unbroken = shutil.copytree(lab.data, lab.path("cut")), lab.path("run"), lab.unbroken(**options)
    command, path = lab.start(out_dir, data_dir=folder, **options), os.path.join(folder, "train.bin")
    command.wait_until(lambda: last_step(out_dir) >= 6)
    os.truncate(path, 10)
    done = command.wait()
    claims = ended_clearly(done, path, "10 bytes", "15945", "--resume", processes=options.get("processes", 1))
    shutil.copy(os.path.join(lab.data, "train.bin"), path)
    again = lab.run(out_dir, data_dir=folder, resume=True, **options)
    claims |= {"with the data restored it resumes": again.status == 0, **equal_runs(out_dir, unbroken)}
    return judge(done, claims)


def shared_memory_full(lab):
    """A /dev/shm of 1 MB, as some containers have, is too small for the images of workers: they come through pipes."""
    folder, draw = lab.path("images"), np.random.default_rng(0)
    for number in range(160):
        path = os.path.join(folder, "val" if number % 8 == 7 else "train", "ab"[number % 2])
        os.makedirs(path, exist_ok=True)
        pixels = draw.integers(256, size=(128, 128, 3), dtype=np.uint8)
        write(os.path.join(path, f"{number}.ppm"), "P6 128 128 255\n", pixels.tobytes())
    options = dict(
        data_dir=folder, image_size=128, stream=True, n_classes=2, d_model=16, n_layer=1, structure="dense", batch_size=64,
        micro_batch=64, max_steps=2, device="cpu", compile=False,
    )  # fmt: skip

    def run():
        words = [f"--{key}={value}" for key, value in options.items()]
        words += [f"--out_dir={lab.path('run')}", "--workers=2"]
        small = 'mount -t tmpfs -o size=1m faults /dev/shm && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-m", "vision.train", *words]
        lab.commands.append(Command(command, lab.folder))
        return lab.commands[-1].wait()

    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "faults", "/dev/shm"], capture_output=True).returncode:
        return Verdict("", True, "not tested: mounting is not permitted here", None)
    done = run()
    said = next((line for line in done.out.splitlines() if "come through pipes" in line), "")
    return judge(done._replace(err=said), {**ended_well(done), "it says so": "/dev/shm has" in said})


def data_replaced(lab):
    """train.bin is replaced by other tokens of the same size: a resumed run notes it."""
    out_dir, folder = shutil.copytree(lab.unbroken(), lab.path("run")), shutil.copytree(lab.data, lab.path("other"))
    path = os.path.join(folder, "train.bin")
    np.fromfile(path, np.uint8)[::-1].tofile(path)
    done = lab.run(out_dir, data_dir=folder, resume=True, max_steps=34)
    said = next((line for line in done.out.splitlines() if "the data changed" in line), "")
    return judge(done._replace(err=said), {**ended_well(done), "it notes the change": "train_fingerprint" in said})


def other_shape(lab):
    """--resume with options of another model is refused."""
    out_dir, claims = shutil.copytree(lab.unbroken(), lab.path("run")), {}
    log = rows_of(out_dir)
    for key, value, was in (("d_model", 64, 36), ("n_layer", 3, 2), ("structure", "dense", "btt")):
        done = lab.run(out_dir, resume=True, **{key: value})
        claims |= {f"{key}: {claim}": so for claim, so in ended_clearly(done, f"{key}={value!r}", repr(was)).items()}
    unchanged = rows_of(out_dir) == log and saved_in(out_dir)[0]["step"] == 30
    return judge(done, {**claims, "log and checkpoint are unchanged": unchanged})


def other_options(lab):
    """--resume with other options of training works, and prints each change."""
    out_dir, was = shutil.copytree(lab.unbroken(), lab.path("run")), {**OPTIONS, "seed": 1337, "weight_decay": 0.1}
    changes = dict(lr=1e-3, max_steps=34, seed=7, batch_tokens=128, weight_decay=0.2)
    done = lab.run(out_dir, resume=True, **changes)
    said = [line for line in done.out.splitlines() if line.startswith("resumed with")]
    claims = {
        f"it prints the new {k}": f"resumed with {k}={new!r}, it was {was[k]!r}" in said for k, new in changes.items()
    }
    last = rows_of(out_dir)[-1]
    claims |= {**ended_well(done), "it trained to step 34 at the new rate": last["step"] == 34 and last["lr"] < 1e-3}
    return judge(done._replace(err="; ".join(said)), claims)


def in_step_13(lab, harm, words, rank=0, **options):
    """In step 13, on one rank, a gradient is NaN or memory runs out."""
    out_dir = lab.path("run")
    done = lab.run(out_dir, harm=harm, rank=rank, **options)
    saved, tensors = saved_in(out_dir)
    claims = {
        **ended_clearly(done, *words, processes=options.get("processes", 1)),
        "the loss is finite": harm != "nan" or bool(re.search(r"loss \d+\.\d+", done.message)),
        "the checkpoint holds step 10": saved["step"] == 10,
        "the checkpoint is finite": all(tensor.isfinite().all() for tensor in tensors.values()),
        "the log ends with step 12": last_step(out_dir) == 12,
    }
    return judge(done, claims)


def not_finite(lab, words, step, harm=None, **options):
    """Numbers become non-finite while the losses of the steps do not show it. The saved checkpoint is finite and resumes."""
    out_dir = lab.path("run")
    done = lab.run(out_dir, harm=harm, **options)
    saved, tensors = saved_in(out_dir)
    again = lab.run(out_dir, resume=True, **{**options, "dtype": "float32", "lr": 1e-6, "max_steps": saved["step"] + 2})
    claims = {
        **ended_clearly(done, f"of step {saved['step']}", "lower lr", *words),
        f"the checkpoint holds step {step}": saved["step"] == step,
        "the checkpoint is finite": all(tensor.isfinite().all() for tensor in tensors.values()),
        "the log holds no NaN": "NaN" not in read(os.path.join(out_dir, "log.jsonl")).decode(),
        "the remedy helps": again.status == 0,
    }
    return judge(done, claims)


def leak(lab, steps):
    """Memory, open files and threads, as the system reports them, do not grow after the run's first quarter."""
    out_dir, samples = lab.path("run"), []
    command = lab.start(out_dir, max_steps=steps)
    process = f"/proc/{command.popen.pid}"

    def sample():
        step = last_step(out_dir)
        if steps // 4 <= step < steps:
            numbers = dict(re.findall(rb"^(VmRSS|Threads):\s+(\d+)", read(f"{process}/status"), re.M))
            files = len(os.listdir(f"{process}/fd"))
            samples.append((step, int(numbers[b"VmRSS"]) / 1024, files, int(numbers[b"Threads"])))
        time.sleep(0.02)
        return step >= steps  # then the run draws loss.png, which takes memory

    command.wait_until(sample)
    done = command.wait()
    early, late = ([s for s in samples if low <= s[0] < low + steps // 4] for low in (steps // 4, steps - steps // 4))
    memory = [statistics.median(s[1] for s in part) for part in (early, late)]
    files = [
        min(s[2] for s in part) for part in (early, late)
    ]  # the minimum: when neither the log nor a checkpoint is open
    threads = [max(s[3] for s in part) for part in (early, late)]
    claims = {
        **ended_well(done),
        "sampled often enough": min(len(early), len(late)) >= 20,
        "memory grows by less than 3 % or 8 MB": memory[1] - memory[0] < max(0.03 * memory[0], 8),
        "open files and threads stay": files[0] == files[1] and threads[0] == threads[1],
    }
    figures = f"RSS {memory[0]:.1f} -> {memory[1]:.1f} MiB, files {files}, threads {threads}"
    return judge(done, claims, f"{figures}, {len(samples)} samples, {steps} steps")


# ---------------------------------------------------------------------------------------
# All of them


def table(short):
    """{name: (what happens, function of a Lab, its arguments)}"""
    count, few, steps, timeout = (5, 2, 300, 5) if short else (25, 5, 2000, 10)
    ddp, fsdp = (
        {**processes, "max_steps": 30 * few + 30} for processes in (DDP, FSDP)
    )  # these faults share one unbroken run
    again, gone, memory = "prepare_owt.py", ["no whole checkpoint"], ["micro_batch=4", "lower micro_batch"]
    nan = ["step 13", "gradient norm nan", "of step 10", "lower lr"]
    val_nan = dict(words=["val_loss nan"], step=1, lr=1e30, warmup_steps=0, eval_interval=1)
    all_nan = dict(
        words=["step 35", "float16", "--dtype=float32"], step=30, harm="all_nan", dtype="float16", max_steps=60
    )
    odd = dict(dtype="uint16", train_tokens=4500, train_bytes=9001)
    halved = dict(dtype="uint16", train_tokens=7900, train_bytes=15800, val_tokens=2000)
    rows = [
        ("kills", f"{count} x SIGKILL, then --resume", kills, dict(count=count, eval_interval=5)),
        ("kills_fsdp", f"{few} x SIGKILL to the whole group", kills, dict(count=few, **fsdp)),
        ("rank_killed_ddp", "SIGKILL to rank 1 of 2, --max-restarts=1", rank_killed, ddp),
        ("rank_killed_fsdp", "the same, --shard=fsdp", rank_killed, fsdp),
        ("rank_killed_writing", "the same while a checkpoint is written", rank_killed, dict(writing=True, **fsdp)),
        ("asked_to_save", "SIGUSR1, then SIGKILL", asked_to_save, {}),
        ("asked_to_save_ddp", "the same, SIGUSR1 to rank 1 of 2", asked_to_save, DDP),
        ("hang", "rank 1 of 2 sleeps in step 7", hang, dict(restarts=0, timeout=timeout, processes=2)),
        ("hang_restart", "the same, --max-restarts=1", hang, dict(restarts=1, timeout=timeout, **ddp)),
        (
            "hang_alone",
            "one process sleeps in step 7",
            hang_alone,
            dict(harm="hang", words=["in harmed_batch"], timeout=3),
        ),
        ("ranks_differ", "rank 1 of 2 gets another lr", ranks_differ, DDP),
        ("hangup", "SIGHUP", told_to_end, dict(name=signal.SIGHUP, whom="run")),
        ("launcher_killed", "SIGKILL to torchrun", told_to_end, dict(name=signal.SIGKILL, whom="launcher", **DDP)),
        ("interrupted_twice", "Ctrl-C twice in an evaluation", interrupted_twice, {}),
        ("stdout_full", "stdout is /dev/full", output_lost, dict(kind="full")),
        ("stdout_unread", "stdout is a pipe without a reader", output_lost, dict(kind="unread")),
        ("stdout_ascii", "stdout takes ASCII only", output_lost, dict(kind="ascii")),
        ("hang_writing", "rank 0 of 2 hangs as it saves", hang_writing, dict(rank=0, timeout=timeout, **DDP)),
        ("hang_writing_fsdp", "rank 1, --shard=fsdp", hang_writing, dict(rank=1, timeout=timeout, **FSDP)),
        ("disk_full", "file system with room for 2.5 checkpoints", disk_full, dict(mounted=True)),
        ("disk_full_fsdp", "the same, 2 processes", disk_full, dict(mounted=True, **FSDP)),
        ("file_limit", "RLIMIT_FSIZE below a checkpoint's size", disk_full, dict(mounted=False)),
        ("no_folder", "out_dir below a regular file", no_folder, {}),
        ("nodes_apart", "two nodes that do not share out_dir", nodes_apart, FSDP),
        ("read_errors", "EIO from the newest checkpoint, twice", read_error, dict(harm="read_errors")),
        ("read_error", "EIO from the newest checkpoint for good", read_error, dict(harm="read_error")),
        ("ckpt_truncated", "newest truncated", damaged, dict(spoil=truncated)),
        ("ckpt_bit", "one bit of a tensor flipped", damaged, dict(spoil=bit_flipped)),
        ("ckpt_bit_fsdp", "the same in a directory", damaged, dict(spoil=bit_flipped, **FSDP)),
        ("ckpt_both", "both checkpoints truncated", damaged, dict(spoil=both_truncated, words=gone)),
        ("ckpt_other", "both from another model", damaged, dict(spoil=other_model, words=["ckpt.pt", "another model"])),
        ("ckpt_evil", "newest a malicious pickle", damaged, dict(spoil=evil)),
        ("ckpt_evil_fsdp", "the same in a directory", damaged, dict(spoil=evil, **FSDP)),
        ("ckpt_evil_both", "both malicious pickles", damaged, dict(spoil=both_evil, words=gone)),
        ("ckpt_folder", "ckpt.pt a directory", damaged, dict(spoil=a_folder)),
        ("ckpt_fifo", "ckpt.pt a FIFO", damaged, dict(spoil=a_fifo)),
        ("ckpt_text", "ckpt.pt a text file", damaged, dict(spoil=a_text)),
        ("ckpt_packed", "newest compressed again", damaged, dict(spoil=packed)),
        ("ckpt_nan", "a weight of the newest is NaN", damaged, dict(spoil=with_nan)),
        ("ckpt_step", "its step is NaN", damaged, dict(spoil=step_nan)),
        ("ckpt_key", "it has no scaler", damaged, dict(spoil=without_scaler)),
        ("ckpt_chunk", "a chunk is missing, --shard=fsdp", damaged, dict(spoil=without_chunk, **FSDP)),
        ("data_truncated", "train.bin cut", bad_data, dict(spoil=cut_data(9000), words=["9000 bytes", "15945", again])),
        (
            "data_odd",
            "uint16, odd length",
            bad_data,
            dict(spoil=cut_data(**odd), words=["9001 bytes", "4500", again]),
        ),
        ("data_dtype", "uint8 read as uint16", bad_data, dict(spoil=cut_data(**halved), words=["holds token", again])),
        (
            "data_token",
            "a token outside the vocabulary",
            bad_data,
            dict(spoil=bad_token(0), words=["token 200", "96", again]),
        ),
        ("data_token_1", "rank 1 reads it", bad_data, dict(spoil=bad_token(5), words=["token 200", again], **DDP)),
        (
            "data_short",
            "train.bin of 20 tokens",
            bad_data,
            dict(spoil=cut_data(20, train_tokens=20), words=["block_size"]),
        ),
        ("data_cut", "train.bin truncated while the run reads it", data_cut_while_running, {}),
        ("data_cut_ddp", "the same, 2 processes", data_cut_while_running, DDP),
        ("shm_full", "streamed images and a /dev/shm of 1 MB", shared_memory_full, {}),
        ("data_replaced", "resumed with other data of the same size", data_replaced, {}),
        ("meta_missing", "no meta.json", bad_data, dict(spoil=no_meta, words=["meta.json is missing", again])),
        ("meta_broken", "meta.json cut", bad_data, dict(spoil=cut_data(meta_bytes=50), words=["meta.json", again])),
        (
            "meta_key",
            "no train_tokens in it",
            bad_data,
            dict(spoil=cut_data(train_tokens=None), words=["train_tokens"]),
        ),
        ("resume_shape", "resumed with another d_model, n_layer, structure", other_shape, {}),
        ("resume_options", "resumed with another lr, max_steps, seed, …", other_options, {}),
        ("nan", "a gradient is NaN in step 13", in_step_13, dict(harm="nan", words=nan)),
        ("nan_ddp", "on rank 1 of 2 only", in_step_13, dict(harm="nan", words=nan, rank=1, **DDP)),
        ("nan_fsdp", "the same, --shard=fsdp", in_step_13, dict(harm="nan", words=nan, rank=1, **FSDP)),
        ("val_nan", "--lr=1e30: a validation loss that is NaN", not_finite, val_nan),
        ("all_nan", "float16 gradients that are always NaN", not_finite, all_nan),
        ("memory", "torch.OutOfMemoryError in step 13", in_step_13, dict(harm="memory", words=memory)),
        ("memory_1", "on rank 1 of 2 only", in_step_13, dict(harm="memory", words=memory, rank=1, **DDP)),
        ("restarted_early", "rank 0 dies before an old run is set aside, --max-restarts=1", restarted_early, DDP),
        ("together", f"{3 if short else 8} runs at once in one out_dir", together, dict(count=3 if short else 8)),
        ("folder_above", "out_dir holds an old run, the data and a run that trains", folder_above, {}),
        *(
            (f"{module}_{name}", f"{name} to lab.{module}", children_end, dict(module=f"lab.{module}", name=name))
            for module in ("sweep", "search")
            for name in ("SIGTERM", "SIGHUP", "SIGKILL")
        ),
        ("leak", f"{steps} steps", leak, dict(steps=steps)),
    ]
    return {name: (what, function, arguments) for name, what, function, arguments in rows}


def inflict(lab, name, what, function, arguments):
    """Run one fault -> a row: what was done, what the user saw, and whether that is right."""
    begun = time.monotonic()
    try:
        verdict = function(lab, **arguments)
    except Exception as error:  # for example a command that takes too long, or a missing file
        verdict = Verdict("", False, f"{type(error).__name__}: {error}", None)
    finally:
        lab.kill_all()
    return {"name": name, "what": what, "seconds": round(time.monotonic() - begun, 1), **verdict._asdict()}


def main(argv):
    options = dict(word.removeprefix("--").partition("=")[::2] for word in argv)
    faults, rows = table("short" in options), []
    only = options.get("only")
    if options.keys() - {"short", "only", "json"} or (only and only not in faults):
        raise SystemExit(f"error: give --short, --json=FILE, --only=NAME of {', '.join(faults)}")
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        lab = Lab(folder)
        for name in [only] if only else faults:
            row = inflict(lab, name, *faults[name])
            rows.append(row)
            head = f"{'pass' if row['passed'] else 'FAIL'} {name}: {row['what']} ({row['seconds']} s)"
            print(head, row["message"], f"status {row['status']}", row["detail"], sep=" | ", flush=True)
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} passed")
    if "json" in options:
        text = json.dumps(rows, indent=1).replace(sys.executable, "python").replace(ROOT, ".")
        write(options["json"], re.sub(re.escape(folder) + r"/\d+", "FOLDER", text))
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
