"""Time layers, mixtures, updates, sampling and data loading.

    python -m lab.bench layers --json=out/layers.json --png=out/layers.png                 # structured layers beside dense ones
    python -m lab.bench mixtures --json=out/mixtures.json                                  # mixtures beside a dense layer
    python -m lab.bench step config/gpt2_dense.py --micro_batch=32 --batch_tokens=32768    # an update, on random tokens
    python -m lab.bench step config/gpt2_btt.py --against="config/gpt2_dense.py"           # two configs side by side
    python -m lab.bench step config/gpt2_btt.py --profile=out/profile                      # where the time goes
    torchrun --standalone --nproc_per_node=8 -m lab.bench step config/gpt2_btt.py --parts=False    # on eight GPUs
    python -m lab.bench image_step vision/config/mlp_cifar10.py --against="vision/config/mlp_cifar10.py --structure=dense"
    python -m lab.bench sample --structure=btt --rank=4     # tokens a second, with and without a KV cache
    python -m lab.bench data                                # the character encoder, and batches from a memory-mapped file
    python -m lab.bench images vision/config/mlp_cifar10.py # images loaded and augmented a second, without a model

`--json=FILE` also writes the figures, as rows.
"""

import gc
import json
import os
import tempfile
import time
from dataclasses import dataclass

from configurator import as_script, choose_command, load_config, split_configs
from lab.bench_options import DataBenchConfig, LayersConfig, MixturesConfig, SampleBenchConfig, StepConfig, TimingConfig

# Options of the commands; None: they extend options of vision/, which need torch.
CONFIGS = {
    "layers": LayersConfig, "mixtures": MixturesConfig, "step": StepConfig, "image_step": None, "sample": SampleBenchConfig,
    "data": DataBenchConfig, "images": None,
}  # fmt: skip


def answer_mistakes(argv):
    """Parse the command line, so that --help and mistakes are answered before torch is imported."""
    Config = choose_command(argv, CONFIGS, "lab.bench", "say what to time", __doc__)
    if Config is not None:
        load_config(Config, argv[1:])


if __name__ == "__main__":  # before torch is imported, which takes seconds
    as_script(answer_mistakes)

import numpy as np
import torch
import torch.distributed as dist

import train
from data import CharTokenizer, TokenData
from engine.device import choose_device, choose_dtype, device_name, peak_flops
from engine.heartbeat import init_distributed
from engine.parallel import ranks
from engine.runlog import duration, short
from generate import generate
from kernels.cuda_graph import Graphed
from lab.bench_layers import Clock, bench_layers, bench_mixtures, save_rows
from model import GPT
from prepare_owt import PrepareConfig, prepare, stdlib_files

# ---------------------------------------------------------------------------------------
# An update


class Bench:
    """The update of a run on its device. units: tokens or images in an update; flops: of one of them, forward."""

    def __init__(self, config):
        self.rank, local_rank, self.world = ranks()
        self.config, self.device = config, choose_device(config.device, local_rank)

    def prepare_run(self, task):
        """Build the update of a task, such as train.TokenTask, and read its units and FLOPs."""
        self.run, self.batch = train.Trainer(self.config, task, self.device), task.batch
        self.unit, self.units, self.flops = task.unit, task.units, task.flops(self.run.model)

    def close(self):
        """Remove the files it wrote."""

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function, repeats):
        """Times of `repeats` successive calls, by the GPU's clock where there is one; the caller warms up."""
        if self.device.type != "cuda":
            return [1e3 * elapsed for elapsed in host_seconds(function, repeats)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


class TokenBench(Bench):
    """The update of a GPT on random tokens, read from a memory-mapped file as in training."""

    def __init__(self, config):
        super().__init__(config)
        self.folder = tempfile.TemporaryDirectory()
        ids = np.random.default_rng(0).integers(config.vocab_size, size=2**22, dtype=np.uint16)
        for split in ("train", "val"):
            ids.tofile(os.path.join(self.folder.name, f"{split}.bin"))
        meta = dict(dtype="uint16", vocab_size=config.vocab_size, train_tokens=len(ids), val_tokens=len(ids))
        with open(os.path.join(self.folder.name, "meta.json"), "w") as file:
            json.dump(meta, file)
        data = TokenData(self.folder.name, config.block_size)
        self.prepare_run(train.TokenTask(config, self.device, data))

    def close(self):
        self.folder.cleanup()


class ImageBench(Bench):
    """The update of an MLP or ViT on the images of its data set."""

    def __init__(self, config):
        from vision.train import ImageTask, load_images

        super().__init__(config)
        data, _ = load_images(config, self.device, print)
        self.prepare_run(ImageTask(config, self.device, data))


def bench_step(argv, Config=StepConfig, make_bench=TokenBench):
    """The command `lab.bench step`: time the updates of one config or several, side by side."""
    config = load_config(Config, argv)
    configs = [(argv, config)]
    for words in split_configs("against", config.against):
        configs.append((words, load_config(Config, [f"--steps={config.steps}", f"--parts={config.parts}", *words])))
    rank, local_rank, world = ranks()
    device = choose_device(config.device, local_rank)
    watchdog = init_distributed(device, config.timeout)
    rows = []
    with watchdog.paused():  # no heartbeats here: the watchdog would end the processes
        for number, (words, one) in enumerate(configs, 1):
            if rank == 0:
                print(f"{number}: {' '.join(words)}", flush=True)
            rows.append({"what": "step", "command": " ".join(words), **time_step(one, make_bench)})
            if rank == 0:
                print("   " + main_figures(rows[-1]), flush=True)
            if config.json and rank == 0:  # what is measured so far, in case a later one fails
                save_rows(config.json, rows, device)
        if config.profile:
            os.makedirs(config.profile, exist_ok=True)
            profile_step(config, make_bench)
    watchdog.stop()
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    for key in [key for key in rows[0] if key not in ("what", "command")]:
        cells = [f"{row[key]:,.4g}" if isinstance(row[key], float) else str(row[key]) for row in rows]
        ratio = f"x {rows[0][key] / rows[1][key]:.3f}" if len(rows) == 2 and isinstance(rows[0][key], float) else ""
        print(f"{key:<26}" + "".join(f"{cell:>14}" for cell in cells), ratio)


def main_figures(row):
    """The main figures of a config in one line."""
    speed = next(key for key in row if key.endswith("s_per_second"))
    words = [f"{row['ms_median']:,.1f} ms an update", f"{short(row[speed])} {speed.removesuffix('_per_second')}/s"]
    words += [f"MFU {row['mfu']:.1%}"] if row["mfu"] else []
    words += [f"{row['peak_memory_gib']:.1f} GiB"] if row["peak_memory_gib"] else []
    return ", ".join(words)


def bench_image_step(argv):
    """The command `lab.bench image_step`."""
    from vision.train import ImageTrainConfig

    @dataclass
    class ImageStepConfig(ImageTrainConfig, TimingConfig):
        pass

    bench_step(argv, ImageStepConfig, ImageBench)


def time_step(config, make_bench):
    """Figures of one config, a dict: floats were measured or computed, the rest states what was timed. All are rank 0's."""
    gc.collect()
    torch._dynamo.reset()
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench, steps = make_bench(config), config.steps
    run, count = bench.run, iter(range(10**9))

    def update():
        run.update(*bench.batch(next(count)))

    marks = [time.perf_counter()]
    for _ in range(5):
        update()
        bench.synchronize()
        marks.append(time.perf_counter())
    first = marks[-1] - marks[0]
    parts = 2 * (5 + max(3, steps // 2)) * config.parts
    if bench.rank == 0:  # the first may compile, the fifth is as fast as those that follow
        print(
            f"   five updates: {first:.1f} s, the rest: about {duration((marks[5] - marks[4]) * (steps + parts))}",
            flush=True,
        )
    start = time.perf_counter()
    times = bench.milliseconds(update, steps)
    whole = (time.perf_counter() - start) / steps * 1e3
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None

    # Time forward alone, then forward and backward; as CUDA graphs if the update is one. DDP exchanges only in the update.
    def forward(*batch):
        x, y = run.task.prepare(*batch)
        with run.autocast:
            return sum(run.compiled_model(x[i], y[i])[1] for i in range(len(x)))

    def forward_backward(*batch):
        x, y = run.task.prepare(*batch)
        for i in range(len(x)):
            with run.autocast:
                _, loss = run.compiled_model(x[i], y[i])
            loss.backward()
        run.optimizers.zero_grad(set_to_none=True)
        return loss.detach()

    batch = bench.batch(0)
    data = 1e3 * seconds(lambda: bench.batch(0), repeats=10)
    parts = []
    for function in (forward, forward_backward) * config.parts:
        timed = Graphed(function) if isinstance(run.update, Graphed) else function
        for _ in range(5):
            timed(*batch)
        parts.append(float(np.median(bench.milliseconds(lambda timed=timed: timed(*batch), max(3, steps // 2)))))
        del timed
        gc.collect()
    median = float(np.median(times))
    name, unit, units = device_name(bench.device), bench.unit, bench.units
    peak = peak_flops(name) if run.dtype != torch.float32 else None
    flops = 3 * bench.flops
    figures = {
        "processes": bench.world,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        f"{unit}s_an_update": units,
        f"training_mflops_a{'n' * (unit == 'image')}_{unit}": flops / 1e6,
        "ms_median": median,
        "ms_mean_of_all": whole,
        f"{unit}s_per_second": units / median * 1e3,
        "mfu": units / median * 1e3 * flops / (peak * bench.world) if peak else None,
        "peak_memory_gib": memory,
        "first_five_updates_s": first,
        "data_ms_of_the_host": data,
        "data_share_not_hidden": max(0.0, whole - median) / whole if bench.device.type == "cuda" else data / whole,
    }
    if parts:
        figures["forward_share"] = parts[0] / median
        figures["backward_share"] = (parts[1] - parts[0]) / median
        figures["optimizer_share"] = (median - parts[1]) / median
    bench.close()
    return figures


# Groups of the table: a kernel belongs to the first group that has a word of its name.
KERNEL_GROUPS = {
    "exchange between GPUs": ("nccl",),
    "attention": ("flash", "sdpa", "fmha", "attention", "dot_do_o", "convert_dq"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "mm_", "cublas", "_mkl", "addmm", "bmm"),
    "structured layers": ("_fused_forward_kernel", "_fused_backward_kernel", "_staged_", "_dense_matrix"),
    "mixtures": ("_mixture_", "_sum_experts", "_ranks_kernel", "_core_gradient"),
    "routing": ("_route_kernel", "_router_gradient", "_count_kernel", "_scan_kernel", "_place_kernel"),
    "loss": ("cross_entropy", "softmax", "nll_loss"),
    "optimizer": ("adam", "optimizer", "lpnorm", "multi_tensor", "foreach"),
    "norms, activations, sums": ("triton", "layer_norm", "gelu", "reduce", "elementwise"),
    "copies": ("memcpy", "memset", "copy"),
}


def profile_step(config, make_bench):
    """Write rank 0's profile.txt, kernels by their share of three updates, and trace.json to config.profile."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # frees the timed run, whose trainer and graphs refer to each other
    bench, folder = make_bench(config), config.profile
    for step in range(5):
        bench.run.update(*bench.batch(step))
    bench.synchronize()
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for step in range(3):
            bench.run.update(*bench.batch(step))
        bench.synchronize()
    if bench.rank:
        return
    kernels = {}  # name: [ms, calls] of an update
    for event in profiler.events():
        device = event.device_type == torch.autograd.DeviceType.CUDA
        time_us = event.device_time if on_gpu else event.self_cpu_time_total
        if device == on_gpu and time_us and not event.name.startswith(("Optimizer.", "ProfilerStep", "nccl:")):
            kernel = kernels.setdefault(event.name, [0.0, 0.0])
            kernel[0] += time_us / 3e3
            kernel[1] += 1 / 3
    groups = {}
    for name, (ms, _) in kernels.items():
        fits = (group for group, words in KERNEL_GROUPS.items() if any(word in name.lower() for word in words))
        group = next(fits, "other")
        groups[group] = groups.get(group, 0.0) + ms
    busy = sum(groups.values())
    lines = [f"{device_name(bench.device)}, torch {torch.__version__}: {busy:.2f} ms of kernels an update", ""]
    lines += [f"{ms:9.3f} ms {ms / busy:6.1%}  {group}" for group, ms in sorted(groups.items(), key=lambda kv: -kv[1])]
    lines += [""]
    for name, (ms, calls) in sorted(kernels.items(), key=lambda kv: -kv[1][0])[:50]:
        lines.append(f"{ms:9.3f} ms {ms / busy:6.1%} {calls:7.1f} x  {name[:110]}")
    with open(os.path.join(folder, "profile.txt"), "w") as file:
        file.write("\n".join(lines) + "\n")
    profiler.export_chrome_trace(os.path.join(folder, "trace.json"))
    print("\n".join(lines[: len(groups) + 13]))
    print(f"written: {folder}/profile.txt, {folder}/trace.json")


# ---------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def bench_sample(argv):
    """The command `lab.bench sample`: tokens a second after `context` tokens, with the KV cache and without it."""
    config = load_config(SampleBenchConfig, argv)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    torch.manual_seed(0)
    with device:
        model = GPT(config).to(dtype).eval()
    rows = []
    if config.batches is None:
        config.batches = (1, 16, 64) if device.type == "cuda" else (1,)
    clock = Clock(config.batches)
    for batch in config.batches:
        idx = torch.randint(config.vocab_size, (batch, config.context), device=device)

        def cached(idx=idx):
            return generate(model, idx, config.tokens)

        def recomputed(idx=idx):
            for _ in range(config.tokens // 10):
                logits = model.lm_head(model.trunk(idx)[:, -1]).float()
                torch.multinomial(logits.softmax(dim=-1), 1)
            if device.type == "cuda":
                torch.cuda.synchronize()

        def prompt(idx=idx):
            return generate(model, idx, 5).tolist()  # reading the prompt, recording the graph

        with clock:
            seconds_of = {f.__name__: seconds(f, repeats=3) for f in (cached, recomputed, prompt)}
        with_cache = batch * (config.tokens - 5) / (seconds_of["cached"] - seconds_of["prompt"])
        without = batch * (config.tokens // 10) / seconds_of["recomputed"]
        row = {"what": "sample", "texts": batch, "context": config.context, "dtype": str(dtype)}
        rows.append({**row, "tokens_per_second": with_cache, "recomputed": without, "ratio": with_cache / without})
        print(
            f"{batch:>4} texts: {with_cache:>9,.0f} tokens/s with the cache, {without:>9,.0f} recomputed, x {with_cache / without:.1f}",
            flush=True,
        )
        if config.json:
            save_rows(config.json, rows, device)


# ---------------------------------------------------------------------------------------
# Data


def seconds(function, repeats=5):
    """Median seconds of a call, after one to warm up."""
    function()
    return float(np.median(host_seconds(function, repeats)))


def host_seconds(function, repeats):
    """Seconds of each of `repeats` successive calls."""
    marks = [time.perf_counter()]
    for _ in range(repeats):
        function()
        marks.append(time.perf_counter())
    return [b - a for a, b in zip(marks, marks[1:])]


def bench_data(argv):
    """The command `lab.bench data`."""
    config = load_config(DataBenchConfig, argv)
    tokenizer, rows = CharTokenizer(), []

    def add_row(what, amount, unit, elapsed):
        rows.append(
            {"what": what, "amount": amount, "unit": unit, "seconds": elapsed, f"{unit}_per_second": amount / elapsed}
        )
        print(f"{what}: {amount:,.0f} {unit} in {elapsed:.4f} s, {amount / elapsed:,.0f} {unit}/s")

    texts = [open(path, encoding="utf-8", errors="replace").read() for path in stdlib_files()]
    texts = texts * max(1, config.megabytes * 10**6 // sum(map(len, texts)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    add_row(
        "character encoder, one process",
        size,
        "MB",
        seconds(lambda: [tokenizer.encode_document(text) for text in texts]),
    )
    with tempfile.TemporaryDirectory() as folder:
        path, out = os.path.join(folder, "text.txt"), os.path.join(folder, "out")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(text for text in texts if tokenizer.encode_document(text) is not None)
        start = time.perf_counter()
        prepare(PrepareConfig(source=path, tokenizer="char96", out_dir=out))
        add_row(
            "prepare_owt.py, disk to disk, one process", os.path.getsize(path) / 1e6, "MB", time.perf_counter() - start
        )
        data, count = TokenData(out, config.block_size), config.batch_tokens // config.block_size
        batch = seconds(lambda: [data.train_batch(0, step, count, 0, count) for step in range(20)]) / 20
        add_row(f"training batch, {count} x {config.block_size}", count * config.block_size, "tokens", batch)
    if config.json:
        save_rows(config.json, rows, torch.device("cpu"))


def bench_images(argv):
    """The command `lab.bench images`: images a second as vision/train.py gets them, after five batches, which start workers."""
    from vision.train import ImageTask, ImageTrainConfig, load_images

    @dataclass
    class ImagesConfig(ImageTrainConfig):
        steps: int = 50  # timed batches, after five that do not count
        json: str | None = None  # file for the rows

    config = load_config(ImagesConfig, argv)
    device, rows = choose_device(config.device), []
    data, _ = load_images(config, device, print)
    task = ImageTask(config, device, data)

    def which(step):
        return data.draw(step, config.batch_size, 0, config.batch_size)

    ways = {
        "loaded": (which, lambda *drawn: data.images(*drawn)[0]),
        "loaded and augmented": (task.batch, lambda *drawn: task.prepare(*drawn)[0]),
    }
    for what, (draw, function) in ways.items():
        timed = Graphed(function) if device.type == "cuda" else function  # in training it is part of the update's graph

        def batch(step, draw=draw, timed=timed):
            return timed(*draw(step))

        for step in range(5):
            batch(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for step in range(5, 5 + config.steps):
            batch(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        speed = config.steps * config.batch_size / (time.perf_counter() - start)
        rows.append(
            {"what": what, "command": " ".join(argv), "batch_size": config.batch_size, "images_per_second": speed}
        )
        print(f"{config.dataset}, {config.image_size} x {config.image_size}, {what}: {speed:,.0f} images/s")
    if config.json:
        save_rows(config.json, rows, device)


BENCHES = {
    "layers": bench_layers,
    "mixtures": bench_mixtures,
    "step": bench_step,
    "image_step": bench_image_step,
    "sample": bench_sample,
    "data": bench_data,
    "images": bench_images,
}


def main(argv):
    choose_command(argv, BENCHES, "lab.bench", "say what to time", __doc__)(argv[1:])


if __name__ == "__main__":
    as_script(main)
