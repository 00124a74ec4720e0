"""Speed and correctness on the GPUs of one host: the rows of results/multi_gpu.md.

    python -m results.multi_gpu.measure --out=OUT                          # all parts, on all GPUs of this machine
    python -m results.multi_gpu.measure --out=OUT speed                    # some parts: speed equal resume kill large
    python -m results.multi_gpu.measure --out=OUT speed --only=MoE         # of models whose name contains MoE
    python -m results.multi_gpu.measure --out=OUT --device=cpu             # a smoke test: 2 processes, tiny models
    python -m results.multi_gpu.measure --report OUT/multi_gpu.json …      # tables, and multi_gpu.png beside the first

speed   an update on 1, 2, 4, … GPUs, with copies and shards: weak scaling (constant tokens per GPU) and strong (constant in all)
equal   one run on 1 GPU and on all: the largest relative difference of the losses
resume  a run saved sharded on all GPUs and resumed on half of them and on one, against the uninterrupted run; their common
        first half runs twice, which shows how far equal commands differ
kill    a run whose last rank gets SIGKILL and which torchrun restarts, against the uninterrupted run
large   a model whose parameters, gradients and optimizer state do not fit on one GPU: 1 GPU runs out of memory, all train it

All parts run the project's own commands. OUT/multi_gpu.json is rewritten with each new row; rows of other parts are kept.
If a part fails, its row has the end of the command's output. On four H100s, speed takes about 12 minutes,
equal, resume and kill together 2, large 1. NVLink multicast stays off. Linux only: processes are found in /proc.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.chdir(ROOT)

from engine.device import choose_device, write_rows  # noqa: E402
from engine.runlog import median_of, read_log, save_figure, short  # noqa: E402
from lab.sweep import gpus_to_use  # noqa: E402
from model import GPT  # noqa: E402
from options import GPTConfig  # noqa: E402
from prepare_owt import prepare_default  # noqa: E402

TEXT = "--data_dir=data/stdlib_char96"  # made when it is missing; text, so that losses fall

# Modes of an update on one GPU or several: their options.
HOW = {
    "CUDA graph": "",
    "no graph": "--cuda_graphs=False",
    "CUDA graphs": "",  # two, with the exchange of gradients between them
    "DDP, one bucket": "--bucket_mb=1000",
    "DDP, buckets of 25 MB": "--bucket_mb=25",
    "FSDP2": "--shard=fsdp",
}
STYLES = {"CUDA graphs": "C0o", "DDP, one bucket": "C3s", "DDP, buckets of 25 MB": "C2^", "FSDP2": "C1v"}


def models(world, on_gpu):
    """{name: (options, tokens per update over all GPUs)}; add a line to measure another model."""
    if on_gpu:
        wide = "config/char_btt.py --d_model=1024 --n_head=16 --micro_batch=512"
        return {
            "GPT-2 124M": ("config/gpt2_dense.py --micro_batch=32", 2**19),
            "BTT, 6 layers, d=1024": (wide, 2**16 * world),
            "BTT-MoE, 6 layers, d=1024": (f"{wide} --moe=linear --num_experts=8 --top_k=2", 2**16 * world),
        }
    tiny = "--n_layer=2 --d_model=64 --n_head=2 --block_size=32 --vocab_size=96 --micro_batch=4 --device=cpu"
    return {
        "dense, tiny": (f"--structure=dense {tiny}", 512 * world),
        "BTT, tiny": (f"--structure=btt {tiny}", 128 * world),
        "BTT-MoE, tiny": (f"--structure=btt --moe=linear --num_experts=4 --top_k=2 {tiny}", 128 * world),
    }


# ---------------------------------------------------------------------------------------
# Running commands


class Bench:
    """The machine, and a folder for the output of its commands."""

    def __init__(self, device, world, folder, only=""):
        self.device, self.world, self.folder, self.only = device, world, folder, only
        self.on_gpu, self.commands, self.ended = device.type == "cuda", [], False
        self.references, self.lock = {}, threading.Lock()

    def end(self):
        """Handle a signal to stop: kill all commands, so that none outlives this process."""
        self.ended = True
        for command in self.commands:
            command.kill()
        sys.exit(1)

    def path(self, name):
        """A new path that ends with `name`."""
        return os.path.join(tempfile.mkdtemp(dir=self.folder), name)

    def start(self, script, options, processes, gpu=0, restarts=0, env=None):
        """Start a command in the background, with one GPU for each process, beginning with number `gpu`."""
        if self.ended:
            raise RuntimeError("asked to stop")
        words = [*([] if script.endswith(".py") else ["-m"]), script, *shlex.split(options)]
        if processes > 1:
            words = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}", *words]
        fixed = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
        # A command that compiles must leave some cores to those beside it.
        fixed["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, min(16, os.cpu_count() // 4)))
        if self.on_gpu:
            fixed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_to_use()[gpu : gpu + processes])
        command = Command(words, processes > 1, {**os.environ, **fixed, **(env or {})}, self.path("output.txt"))
        self.commands.append(command)
        return command

    def train(self, options, processes, out_dir=None, **how):
        """Start train.py, in a new out_dir if none is given."""
        out_dir = out_dir or self.path("run")
        command = self.start("train.py", f"{options} --out_dir={out_dir}", processes, **how)
        command.out_dir, command.text = out_dir, command.text.replace(f" --out_dir={out_dir}", "")
        return command

    def reference(self, options, processes, **how):
        """A run to compare others with; all parts that ask for it share it."""
        with self.lock:
            key = (options, processes)
            if key not in self.references:
                self.references[key] = self.train(options, processes, **how)
                if not self.on_gpu:
                    self.references[key].finish()
            return self.references[key]


class Command:
    """A command of python or torchrun that runs in the background."""

    def __init__(self, words, torchrun, env, path):
        self.text = ("torchrun " if torchrun else "python ") + shlex.join(words)
        launcher = [sys.executable, *["-m", "torch.distributed.run"] * torchrun]
        self.path, self.begun, self.done = path, time.monotonic(), None
        with open(path, "w") as output:
            self.popen = subprocess.Popen(
                launcher + words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def finish(self, limit=110):
        """Wait for it -> figures that all rows have, its output. It is killed `limit` seconds after its start."""
        if self.done is None:
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(max(1, self.begun + limit - time.monotonic()))
            status, seconds = self.popen.poll(), round(time.monotonic() - self.begun, 1)
            self.kill()
            with open(self.path, errors="replace") as file:
                text = file.read()
            figures = {"command": self.text, "status": status, "seconds": seconds}
            if status is None:
                figures["output"] = f"killed after {limit} s: …{text[-3000:]}"
            elif status:
                figures["output"] = text[-6000:]
            self.done = figures, text
        return self.done

    def kill(self):
        """Send SIGKILL to it and to all its descendants, if it still runs: torchrun's workers have their own sessions."""
        pids = [self.popen.pid] if self.popen.poll() is None else []
        for pid in pids:
            pids += children(pid)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


def children(pid):
    """Ids of a process's children."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def rank_of(pid):
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for variable in file.read().split(b"\0"):
            if variable.startswith(b"RANK="):
                return int(variable[5:])
    return None


# ---------------------------------------------------------------------------------------
# Speed


def cases(count, world, tokens):
    """[(scaling, tokens per update, how)] for `count` GPUs."""
    weak = tokens * count // world
    if count == 1:
        return [("weak", weak, "CUDA graph"), ("weak", weak, "no graph"), ("strong", tokens, "CUDA graph")]
    if count == world:  # weak and strong scaling coincide
        return [("both", tokens, how) for how in ("CUDA graphs", "DDP, one bucket", "DDP, buckets of 25 MB", "FSDP2")]
    return [("weak", weak, "CUDA graphs"), ("weak", weak, "FSDP2"), ("strong", tokens, "CUDA graphs")]


def speed(bench):
    """Run commands side by side if there are enough GPUs and cores for all of them."""
    chosen = [
        (name, *model) for name, model in models(bench.world, bench.on_gpu).items() if re.search(bench.only, name)
    ]
    for count in [count for count in (1, 2, 4, 8, 16) if count <= bench.world]:
        at_once = bench.world // count if bench.on_gpu else 1
        for first in range(0, len(chosen), at_once):
            started = [
                start_timing(bench, count, place * count, *model)
                for place, model in enumerate(chosen[first : first + at_once])
            ]
            for name, todo, commands, path, command in started:
                figures, _ = command.finish(limit=400)
                measured = []
                with suppress(OSError), open(path) as file:
                    measured = json.load(file)
                for (scaling, _, how), words, row in zip(todo, commands, measured):
                    launcher = "python" if count == 1 else f"torchrun --standalone --nproc_per_node={count}"
                    row["command"] = f"{launcher} -m lab.bench step {words} --parts=False"
                    yield {"part": "speed", "model": name, "gpus": count, "scaling": scaling, "how": how, **row}
                if len(measured) < len(todo):
                    yield {"part": "speed", "model": name, "gpus": count, "failed": True, **figures}
                print(f"speed: {name} on {count}: {figures['seconds']} s, status {figures['status']}", flush=True)


def start_timing(bench, count, gpu, name, options, tokens):
    """Start a command that measures all cases of a model on `count` GPUs, beginning with number `gpu`."""
    todo, commands = cases(count, bench.world, tokens), []
    for _, batch, how in todo:
        steps = max(10, min(40, 5_500_000 // (batch // count))) if bench.on_gpu else 3
        commands.append(" ".join(f"{options} --batch_tokens={batch} {HOW[how]} --steps={steps}".split()))
    first, *others = commands
    path = bench.path("step.json")
    words = f"step {first} --parts=False --json={path} --against={shlex.quote('; '.join(others))}"
    return name, todo, commands, path, bench.start("lab.bench", words, count, gpu=gpu)


# ---------------------------------------------------------------------------------------
# The same run on any number of processes


STEPS = 40  # of the small run, which writes a checkpoint halfway


def small(bench):
    """Options of a run for any number of processes up to 8, so stable that runs which differ by rounding stay close."""
    shape = "--n_head=8 --micro_batch=64" if bench.on_gpu else "--n_layer=2 --d_model=64 --n_head=2 --micro_batch=4"
    batch = 2 * 64 * 128 * bench.world if bench.on_gpu else 4 * 128 * 8
    return (
        f"config/char_btt.py {TEXT} {shape} --batch_tokens={batch} --max_steps={STEPS} --lr=3e-4 --warmup_steps=20 "
        f"--schedule=constant --eval_interval={STEPS // 2} --eval_tokens={batch} --log_interval=1 --dtype=float32 "
        f"--compile=False --device={bench.device.type}"
    )


EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # products in float32, not TF32


def compare(out_dir, reference, first=1):
    """Compare the losses of two runs from step `first` on -> figures; *_equal_at_first counts the steps before they differ."""
    figures = {}
    for key in ("loss", "val_loss"):
        ours, theirs = (
            {row["step"]: row[key] for row in read_log(f"{run}/log.jsonl") if key in row}
            for run in (out_dir, reference)
        )
        steps = [step for step in theirs if step >= first]
        apart = [abs(ours[step] / theirs[step] - 1) for step in steps if step in ours]
        figures |= {
            f"{key}_rows": len(apart), f"{key}_rows_missing": len(steps) - len(apart), f"{key}_equal": apart.count(0.0),
            f"{key}_equal_at_first": next((i for i, difference in enumerate(apart) if difference), len(apart)),
            f"{key}_largest_difference": max(apart, default=None),
            f"{key}_largest_difference_of_10": max(apart[:10], default=None),
            f"{key}_last": ours.get(max(steps, default=0)),
        }  # fmt: skip
    return figures


def equal(bench):
    """The small runs side by side, since nothing is timed here; then GPT-2, in micro-batches small enough for three on a GPU."""
    runs = {"BTT, float32, not compiled": (small(bench), EXACT)}
    if bench.on_gpu:
        runs["GPT-2 124M, bfloat16, compiled"] = (
            f"config/gpt2_dense.py {TEXT} --micro_batch=8 --batch_tokens={2 * 8 * 1024 * bench.world} --max_steps=30 "
            f"--lr=3e-4 --warmup_steps=20 --schedule=constant --eval_interval=30 --eval_tokens={8 * 1024 * bench.world} "
            "--log_interval=1 --save=False",
            None,
        )
    for name, (options, env) in runs.items():
        one = bench.reference(options, 1, gpu=bench.world - 1, env=env)
        hows = ("CUDA graphs", "FSDP2") if env is None else ("CUDA graphs", "DDP, one bucket", "FSDP2")
        several = {how: bench.reference(f"{options} {HOW[how]}", bench.world, env=env) for how in hows}
        for command in (one, *several.values()):
            command.finish()
        for how, command in several.items():
            what = f"{name}: {how} on {bench.world} against 1"
            yield {"part": "equal", "what": what, **command.finish()[0], **compare(command.out_dir, one.out_dir)}


def resume(bench):
    options, half = small(bench), STEPS // 2
    whole = bench.reference(f"{options} {HOW['FSDP2']}", bench.world, env=EXACT)
    first = bench.train(f"{options} {HOW['FSDP2']} --max_steps={half}", bench.world, env=EXACT)
    whole.finish()
    figures, _ = first.finish()
    figures |= compare(first.out_dir, whole.out_dir)
    figures["loss_rows_missing"] = figures["val_loss_rows_missing"] = 0  # it ends halfway
    what = f"the first half on {bench.world}, against the unbroken run on {bench.world}: the same command twice"
    yield {"part": "resume", "what": what, **figures}
    if figures["status"] != 0:
        return
    started = []
    for count in sorted({bench.world // 2, 1}, reverse=True):
        out_dir = shutil.copytree(first.out_dir, bench.path("run"))
        shard = f" {HOW['FSDP2']}" * (count > 1)
        started.append((count, bench.train(f"{options} --resume{shard}", count, out_dir=out_dir, env=EXACT)))
    for count, command in started:
        figures, text = command.finish(limit=80)
        figures["went_on"] = f"resuming from step {half}" in text
        figures |= compare(command.out_dir, whole.out_dir, first=half + 1)
        what = f"saved on {bench.world} at step {half}, resumed on {count}, against the unbroken run on {bench.world}"
        yield {"part": "resume", "what": what, **figures}


def kill(bench):
    def one(how):
        options = f"{small(bench)} {HOW[how]}"
        whole = bench.reference(options, bench.world, env=EXACT)
        killed = bench.train(options, bench.world, restarts=1, env=EXACT)
        step = kill_last_rank(bench, killed, step=STEPS // 2 + 5)
        figures, text = killed.finish()
        whole.finish()
        what = f"{how} on {bench.world}: rank {bench.world - 1} killed, against the unbroken run"
        figures |= {"failed": step is None, "killed_at_step": step, "went_on": "resuming from step" in text}
        return {"part": "kill", "what": what, **figures, **compare(killed.out_dir, whole.out_dir)}

    with ThreadPoolExecutor(2 if bench.on_gpu else 1) as threads:
        return list(threads.map(one, ("CUDA graphs", "FSDP2")))


def kill_last_rank(bench, command, step):
    """Send SIGKILL once the log has that step -> the last step in the log; None if the run ended before."""
    while command.popen.poll() is None and time.monotonic() < command.begun + 100:
        rows = read_log(f"{command.out_dir}/log.jsonl")
        if rows and rows[-1]["step"] >= step:
            for pid in children(command.popen.pid):
                if rank_of(pid) == bench.world - 1:
                    os.kill(pid, signal.SIGKILL)
                    return rows[-1]["step"]
        time.sleep(0.01)
    return None


# ---------------------------------------------------------------------------------------
# A model too large for one GPU


def large(bench):
    """A dense GPT whose state, 16 bytes per parameter (float32: itself, gradient, two moments), exceeds a GPU's memory 1.1 times."""
    if bench.on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        shape, micro_batch = dict(d_model=4096, n_head=32, block_size=1024, vocab_size=50304), 2
    else:
        memory, shape, micro_batch = 5e6, dict(d_model=64, n_head=2, block_size=32, vocab_size=96), 4
    n_layer, parameters = 0, 0
    while 16 * parameters < 1.1 * memory:
        n_layer += 1
        with torch.device("meta"):
            model = GPT(GPTConfig(structure="dense", n_layer=n_layer, **shape))
        parameters = sum(p.numel() for p in model.parameters())
    words = " ".join(f"--{key}={value}" for key, value in shape.items())
    options = (
        f"--structure=dense --n_layer={n_layer} {words} {TEXT} --activation_checkpointing --save=False --max_steps=50 "
        f"--warmup_steps=10 --lr=1e-3 --eval_interval=50 --log_interval=1 --micro_batch={micro_batch} "
        f"--device={bench.device.type}"
    )
    tokens = micro_batch * shape["block_size"]
    size = {"part": "large", "parameters": parameters, "n_layer": n_layer, "gib_of_state": 16 * parameters / 2**30}
    for count, more in ((1, "--compile=False"), (bench.world, "--shard=fsdp")):
        batch = tokens * count
        command = bench.train(f"{options} --batch_tokens={batch} --eval_tokens={2 * batch} {more}", count)
        figures, text = command.finish(limit=200)
        log = read_log(f"{command.out_dir}/log.jsonl")
        lines = text.splitlines()
        yield {
            **size, "gpus": count, "gib_of_a_gpu": memory / 2**30, "tokens_an_update": batch, **figures,
            "errors": [line for line in lines if line.startswith("error: ")], "traceback": "Traceback" in text,
            "memory": next((line for line in lines if line.startswith("memory")), None),
            "steps": log[-1]["step"] if log else None,
            "val_losses": [row["val_loss"] for row in log if "val_loss" in row],
            "losses": [row["loss"] for row in log if "loss" in row][::7],
            **{key: median_of(log, key) for key in ("tokens_per_second", "mfu")},
        }  # fmt: skip
        print(f"large: {short(parameters)} parameters on {count}: {figures['seconds']} s", flush=True)


# ---------------------------------------------------------------------------------------
# Tables and picture


def efficiency(row, rows):
    """Tokens/s ÷ those of as many single GPUs, with the same scaling -> {"CUDA graph": …, "no graph": …}"""
    result = {}
    for one in rows:
        same = all(one[key] == row[key] for key in ("model", "device"))
        if same and one["gpus"] == 1 and row["scaling"] in (one["scaling"], "both"):
            key = one["how"] + (", all tokens" if one["scaling"] == "strong" else "")
            result[key] = row["tokens_per_second"] / row["gpus"] / one["tokens_per_second"]
    return result


def report(paths):
    """Print Markdown tables of all rows, and draw the picture beside the first file."""
    rows = []
    for path in paths:
        with open(path) as file:
            rows += json.load(file)
    speeds = [row for row in rows if row["part"] == "speed" and not row.get("failed")]
    if speeds:
        references = list(dict.fromkeys(key for row in speeds for key in efficiency(row, speeds)))
        head = ["model", "device", "GPUs", "how", "scaling", "tokens an update", "ms", "tokens/s", "MFU", "GiB"]
        table(
            head + [f"to 1 GPU, {key}" for key in references],
            [
                [
                    row["model"], row["device"], row["gpus"], row["how"], row["scaling"], f"{row['tokens_an_update']:,}",
                    f"{row['ms_median']:.1f}", f"{row['tokens_per_second']:,.0f}", percent(row["mfu"]),
                    "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}",
                    *(percent(efficiency(row, speeds).get(key)) for key in references),
                ]
                for row in speeds
            ],
        )  # fmt: skip
        draw(speeds, os.path.splitext(paths[0])[0] + ".png")
    runs = [row for row in rows if row["part"] in ("equal", "resume", "kill") and "loss_rows" in row]
    if runs:
        head = ["part", "run", "status", "s", "losses", "bit-equal", "before any difference"]
        head += ["largest difference of the first 10", "of all", "of validation", "notes"]
        table(
            head,
            [
                [
                    row["part"], row["what"], row["status"], row["seconds"],
                    f"{row['loss_rows']}" + f", {row['loss_rows_missing']} missing" * (row["loss_rows_missing"] > 0),
                    row["loss_equal"], row.get("loss_equal_at_first"), number(row.get("loss_largest_difference_of_10")),
                    number(row["loss_largest_difference"]), number(row["val_loss_largest_difference"]),
                    "; ".join(f"{key.replace('_', ' ')}: {row[key]}" for key in ("killed_at_step", "went_on") if key in row),
                ]
                for row in runs
            ],
        )  # fmt: skip
    larges = [row for row in rows if row["part"] == "large"]
    if larges:
        head = ["parameters", "layers", "GPUs", "GiB of state", "GiB a GPU", "status", "steps", "tokens/s", "MFU", ""]
        table(
            head,
            [
                [
                    short(row["parameters"]), row["n_layer"], row["gpus"], f"{row['gib_of_state']:.1f}",
                    f"{row['gib_of_a_gpu']:.1f}", row["status"], row["steps"],
                    "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}", percent(row["mfu"]),
                    "; ".join([*row["errors"], *filter(None, [row["memory"]])]),
                ]
                for row in larges
            ],
        )  # fmt: skip
    for row in rows:
        if row.get("failed") or (row.get("status", 0) != 0 and row["part"] != "large"):
            print(f"FAILED: {row['part']}: {row.get('what') or row.get('model')}\n{row.get('output', '')}\n")


def table(head, rows):
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    print()


def percent(value):
    return "" if value is None else f"{value:.1%}"


def number(value):
    return "" if value is None else f"{value:.2g}"


def draw(rows, png):
    """Draw tokens/s against GPUs, a panel for each model; legends give the efficiency of weak scaling on the most GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys((row["model"], row["device"]) for row in rows if row["gpus"] == 1))
    figure, panels = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), layout="constrained", squeeze=False)
    for axes, (name, device) in zip(panels[0], names):
        ours = [row for row in rows if (row["model"], row["device"]) == (name, device)]
        ours.sort(key=lambda row: row["gpus"])
        counts = sorted({row["gpus"] for row in ours})
        one = next((row["tokens_per_second"] for row in ours if row["how"] == "CUDA graph"), None)
        if one:
            axes.plot([0, counts[-1]], [0, one * counts[-1] / 1e6], "k--", lw=1, label="as many single GPUs")
            axes.plot(1, one / 1e6, "ko", zorder=3, label="1 GPU, CUDA graph")
        for how, style in STYLES.items():
            for scaling, line in (("weak", "-"), ("strong", ":")):
                points = [row for row in ours if row["scaling"] in (scaling, "both")]
                several = [row for row in points if row["how"] == how]
                points = [row for row in points if row["how"] == "CUDA graph"] + several
                if scaling not in {row["scaling"] for row in several} and (scaling == "strong" or not several):
                    continue  # not measured: weak and strong coincide
                label = f"{how}, {scaling}" if scaling == "strong" else how
                if one and scaling == "weak":
                    last = several[-1]
                    label += f": {last['tokens_per_second'] / one / last['gpus']:.1%} on {last['gpus']}"
                x = [row["gpus"] for row in points]
                y = [row["tokens_per_second"] / 1e6 for row in points]
                axes.plot(x, y, style + line, mfc=None if scaling == "weak" else "none", label=label)
        axes.set(title=f"{name}\n{device}", xlabel="GPUs", ylabel="million tokens/s", xticks=counts)
        axes.set(xlim=(0, 1.08 * counts[-1]), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper left")
    figure.suptitle(f"torch {rows[0]['torch']}", fontsize=9)
    save_figure(figure, png)
    print(f"written: {png}\n")


# ---------------------------------------------------------------------------------------

PARTS = {"speed": speed, "equal": equal, "resume": resume, "kill": kill, "large": large}
LOCK = threading.Lock()  # for multi_gpu.json
TOGETHER = [
    ["speed"],
    ["equal", "resume", "kill"],
    ["large"],
]  # parts of one line run side by side, since they are not timed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{' '.join(PARTS)}; none: all")
    parser.add_argument("--out", default="out/multi_gpu", help="folder for multi_gpu.json")
    parser.add_argument("--device", default="auto", help="cpu for a smoke test")
    parser.add_argument("--processes", type=int, help="GPUs to use, all by default; on the CPU 2")
    parser.add_argument(
        "--only",
        default="",
        help="speed: only models whose name matches this regular expression; rows of other models are kept",
    )
    parser.add_argument(
        "--report", nargs="+", metavar="JSON", help="run nothing; print tables of these rows and draw their picture"
    )
    arguments = parser.parse_args()
    if arguments.report:
        return report(arguments.report)
    if set(arguments.parts) - set(PARTS):
        parser.error(f"parts are {' '.join(PARTS)}")
    device = choose_device(arguments.device)
    world = arguments.processes or (torch.cuda.device_count() if device.type == "cuda" else 2)
    if world < 2:
        parser.error("needs two or more GPUs, or processes on the CPU (--processes=2)")
    os.makedirs(arguments.out, exist_ok=True)
    path = os.path.join(arguments.out, "multi_gpu.json")
    prepare_default(TEXT.partition("=")[2])
    with tempfile.TemporaryDirectory(prefix="multi_gpu") as folder:
        bench = Bench(device, world, folder, arguments.only)
        signal.signal(signal.SIGTERM, lambda *_: bench.end())
        for line in TOGETHER:
            chosen = [part for part in line if part in (arguments.parts or PARTS)]
            with ThreadPoolExecutor(len(line) if bench.on_gpu else 1) as threads:
                list(threads.map(lambda part: measure(part, bench, path), chosen))


def measure(part, bench, path):
    """Run a part and write its rows as they arrive; they replace the rows that the file had for this part."""
    begun, rows = time.monotonic(), []
    try:
        for row in PARTS[part](bench):
            rows.append({**row, **versions()})
            write(part, rows, path, bench)
    except Exception:  # the other parts continue
        rows.append({"part": part, "failed": True, "output": traceback.format_exc()})
        write(part, rows, path, bench)
    print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)


def write(part, rows, path, bench):
    with LOCK:
        others = []
        if os.path.exists(path):
            with open(path) as file:
                others = [
                    row
                    for row in json.load(file)
                    if row["part"] != part or not re.search(bench.only, row.get("model", ""))
                ]
        write_rows(path, others + rows, bench.device)


def versions():
    if not torch.cuda.is_available():
        return {}
    import triton

    return {"triton": triton.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


if __name__ == "__main__":
    main()
