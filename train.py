"""Train a structured GPT, on a laptop's CPU, one GPU or many.

    python train.py config/quickstart.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --batch_tokens=524288
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --resume

Writes config.json, log.jsonl, loss.png and ckpt.pt to out_dir, and experts.png of mixtures. Under torchrun each process
drives one GPU (NCCL), or shares the CPU (gloo); batch_tokens is the batch of all of them together.
"""

import json
import math
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

from configurator import ConfigError, as_script, load_config
from options import GPTConfig, RunConfig, at_least


@dataclass
class Config(RunConfig, GPTConfig):
    data_dir: str = "data/owt_gpt2"  # of prepare_owt.py's files; data/stdlib_char96 prepares itself
    batch_tokens: int = 524_288  # tokens an update, all processes together
    eval_tokens: int = 2_097_152  # validation tokens, the same ones every time
    sample_tokens: int = 0  # tokens of text to print at the end

    def __post_init__(self):
        GPTConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        at_least(1, self, "batch_tokens", "eval_tokens")
        at_least(0, self, "sample_tokens")
        if self.sample_tokens and not self.save:
            raise ConfigError(
                f"sample_tokens={self.sample_tokens}: the text is the checkpoint's, so not with save=False"
            )
        self.check_layers()


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, Config))

import torch
import torch.distributed as dist

from data import TokenData, check_same_data, tokenizer_of
from engine import checkpoint, runlog
from engine.compiling import missing_compiler, order_loops
from engine.device import Numbers, Turn, choose_device, choose_dtype, device_name, peak_flops, to_device
from engine.heartbeat import init_distributed
from engine.parallel import (
    DropoutSeeds,
    FlatGradients,
    check_gradients,
    clip_gradients,
    exchange_gradients,
    ranks,
    replicate,
    shard,
    speak_for_this_rank,
    sum_over_ranks,
)
from kernels.cuda_graph import Graphed
from model import GPT
from moe import auxiliary_loss, set_top_k
from optim import lr_multipliers, make_optimizer, set_lr
from prepare_owt import prepare_default
from sample import Config as SampleConfig
from sample import load_model, sample


def lr_at(step, config):
    """Learning rate of update number `step` (0 is the first): a function of the step alone."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = config.max_steps - step  # updates from here on, this one counted
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":
        fraction = min(1.0, left / max(1, config.decay_fraction * config.max_steps))
    else:
        return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fraction)


def main(argv):
    config = load_config(Config, argv)
    what = f"micro_batch={config.micro_batch} sequences of {config.block_size} tokens"
    in_one_line(train, config, f"{what}: lower micro_batch (batch_tokens stays)")


def in_one_line(train, config, memory):
    """train(config, progress), with one line where it fails; `memory` is that of a full GPU."""
    progress = runlog.Silent() if ranks()[0] else runlog.Progress(config.max_steps)
    try:
        train(config, progress)
    except ConfigError as error:
        speak_for_this_rank(error)
        raise
    except torch.OutOfMemoryError:
        shards = "" if config.shard == "fsdp" else ", --shard=fsdp on several GPUs"
        checkpoints = "" if config.activation_checkpointing else ", --activation_checkpointing"
        error = ConfigError(
            f"GPU out of memory with {memory}{checkpoints}{shards}. {checkpoint.describe(config.out_dir)}"
        )
        speak_for_this_rank(error)
        raise error from None
    except Exception as error:
        missing = missing_compiler(error)
        if missing is None:
            raise
        error = ConfigError(missing)
        speak_for_this_rank(error)
        raise error from None
    except KeyboardInterrupt:  # in training the loop itself ends, and saves
        progress.say("stopped, outside of training")
        raise SystemExit(130) from None
    finally:
        progress.close()


def train(config, progress):
    # -- processes and device
    rank, local_rank, world = ranks()
    rows, micro_steps = split_batch(config, world)  # sequences an update; passes that each process takes for its share
    if rank == 0:
        prepare_default(config.data_dir)
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    watchdog = init_distributed(device, config.timeout)
    data = TokenData(config.data_dir, config.block_size)
    check_vocabulary(config, data.meta, progress.say)
    rates = partial(lr_multipliers, base_width=config.base_width, base_ffn_expansion=config.base_ffn_expansion)
    run = build(config, device, dtype, world, watchdog.beat, multipliers_of=rates)

    def batch(step):
        """This process's share: inputs and targets, (micro_steps, micro_batch, block_size) int64."""
        share = rows // world
        tensors = data.train_batch(config.seed, step, rows, rank * share, (rank + 1) * share)
        shape = (micro_steps, config.micro_batch, config.block_size)
        return [to_device(tensor.reshape(shape), device) for tensor in tensors]

    def validate():
        return {"val_loss": evaluate(run.fast, data, config, device, run.autocast, rank, world, watchdog.beat)}

    task = Task(
        batch, validate, data.meta, unit="token", units=config.batch_tokens, flops=run.model.flops_per_token(),
        shape={field.name for field in fields(GPTConfig)} - {"fused_loss"},
    )  # fmt: skip
    stopped = fit(config, progress, run, task, device, dtype, watchdog, micro_steps)
    if rank == 0:
        if config.sample_tokens and not stopped:
            print_sample(config, device)
        say_summary(config, progress, device)


class Task(NamedTuple):
    """What `fit` does not know of a run: its data, and what they are counted in."""

    batch: Callable  # step -> this process's share: x, y, or the tensors that build's `prepare` makes x, y of
    validate: Callable  # () -> figures of the row of an evaluation, "val_loss" among them
    meta: dict  # plain values about the data, for the checkpoint
    unit: str  # "token", "image"
    units: int  # that many an update, all processes together
    flops: int  # of a forward pass on one
    shape: set  # options that make another model, which a resumed run must not change
    passes: Callable = lambda role: 1  # of runlog.model_table
    loss: str = "nats per token"  # what the loss is, for its picture


def fit(config, progress, run, task, device, dtype, watchdog, micro_steps):
    """Train to max_steps with log, evaluations and checkpoints; all processes together -> whether it was stopped before."""
    rank, _, world = ranks()
    say = progress.say
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    flops = 3 * task.flops  # forward 1, backward 2
    peak = peak_flops(device_name(device)) if dtype != torch.float32 else None
    shape = task.shape - {"dropout", "activation_checkpointing"}  # which may change

    # -- a run that goes on, or a new one
    state = dict(step=0, seconds=0.0, best_val_loss=math.inf, wandb_id=None)
    saved = None
    if config.resume or watchdog.restarts > 0:
        saved = checkpoint.load(config.out_dir, say)
    if saved is not None:
        check_same_model(config, saved["config"], shape, say)
        check_same_data(task.meta, saved["meta"], say)
        checkpoint.restore(saved, model, optimizer)
        if saved["scaler"]:  # empty where the checkpoint is of lab.convert, or of a run without float16
            scaler.load_state_dict(saved["scaler"])
        state = {key: saved[key] for key in state}
        done = f", nothing is left of max_steps={config.max_steps}" if state["step"] >= config.max_steps else ""
        say(f"{config.out_dir}: going on from step {state['step']}{done}")
    elif config.resume:
        say(f"{config.out_dir}: no checkpoint to go on from, starting at step 0")
    if saved is None and config.init_from:
        start_from(config, model, shape, say)
    log = wandb_run = None
    if rank == 0:
        if config.wandb:
            wandb_run = runlog.start_wandb(config.wandb_project, asdict(config), state["wandb_id"])
            state["wandb_id"] = wandb_run.id
        log = open_log(config, None if saved is None else state["step"], say)
    del saved
    units = dict(unit=task.unit, flops=task.flops)
    say(*runlog.model_table(model, run.multipliers, config.lr, **units, passes=task.passes), sep="\n")
    where = (world, micro_steps, device_name(device), dtype, peak)
    say(*runlog.plan(config, model, *where, state["step"], **units, batch=task.units), sep="\n")

    # -- the loop
    stop, saves, turn = StopSignal(say, config.save), checkpoint.Saves(config, say), Turn()
    sent = deque()  # updates that the device was given and the host has not waited for
    ahead = 1 if device.type == "cuda" else 0  # so many of them, that the device never waits for the host
    lap = Lap()
    stopping = False

    def send():
        """Give the next update to the device."""
        step = state["step"]
        lr = lr_at(step, config)
        set_lr(optimizer, lr)
        run.dropout.update(step, rank * micro_steps)
        batch = task.batch(step)
        watchdog.beat(step)
        loss, aux, norm = run.update(*batch).unbind()
        asked = (torch.full_like(loss, asked) for asked in (stop.asked, saves.asked()))
        agreed = torch.stack((loss / world, aux / world, *asked))
        watchdog.beat()
        if world > 1:
            dist.all_reduce(agreed)
        sent.append((step + 1, lr, Numbers(torch.cat((agreed, norm.view(1))))))
        state["step"] = step + 1

    def receive():
        """Wait for the oldest update that was sent -> its row; whether any process asked to stop, and to save."""
        step, lr, numbers = sent.popleft()
        loss, aux, stop_asked, save_asked, norm = numbers.wait()
        # GradScaler itself skips updates with overflown float16 gradients; anything else non-finite is an end.
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise ConfigError(
                f"step {step}: loss {loss}, gradient norm {norm}; stopped, nothing of it is saved. "
                f"{checkpoint.describe(config.out_dir)}; resume with a lower lr (it is {config.lr:g}) or more warmup_steps"
            )
        state["seconds"] += lap.step()
        progress.step(step)
        row = {**totals(step), "loss": loss, "lr": lr}
        if math.isfinite(norm):
            row["grad_norm"] = norm
        if config.moe != "none":
            row["aux_loss"] = aux
        return row, stop_asked > 0, save_asked > 0

    def totals(step):
        return {
            "step": step,
            f"{task.unit}s": step * task.units,
            "flops": step * task.units * flops,
            "seconds": round(state["seconds"], 3),
        }

    def write(row):
        if lap.steps:
            speed = task.units * lap.steps / lap.seconds
            row[f"{task.unit}s_per_second"] = round(speed, 1)
            if peak is not None:
                row["mfu"] = speed * flops / (peak * world)
            lap.steps, lap.seconds = 0, 0.0
        if rank == 0:
            progress.row(row)
            log.write(row)
            if wandb_run is not None:
                wandb_run.log(row, step=row["step"])

    def evaluate_log_save(row):
        """Figures of validation and of routing into the row; the row to the log; then a checkpoint, where one is wanted."""
        if config.eval_top_k:
            set_top_k(model, config.eval_top_k)
        row.update(task.validate())
        if config.eval_top_k:
            set_top_k(model, config.top_k)
        if run.reports is not None and "loss" in row:
            row["moe"] = model.mixtures.figures(run.reports)
            run.reports.zero_()
        best = row["val_loss"] < state["best_val_loss"]
        state["best_val_loss"] = min(state["best_val_loss"], row["val_loss"])
        write(row)
        if config.save:
            save(best)
        lap.start()

    def save(best=False):
        with watchdog.paused():
            saves.save(
                {
                    **state, "config": asdict(config), "meta": task.meta, "model": model.state_dict(),
                    "optimizer": checkpoint.optimizer_state(model, optimizer), "scaler": scaler.state_dict(),
                },
                best,
            )  # fmt: skip
        lap.start()

    if math.isinf(state["best_val_loss"]):  # not evaluated yet
        evaluate_log_save(totals(state["step"]))
    lap.start()
    compiled = state["step"] + 5  # and recorded as a CUDA graph, by then
    while state["step"] < config.max_steps and not stopping:
        if turn.path and state["step"] == compiled:
            with watchdog.paused():
                turn.take()
            lap.start()
        send()
        due = state["step"] % config.eval_interval == 0 or state["step"] == config.max_steps
        saving = saves.due(state["step"])
        while sent and (due or stopping or saving or len(sent) > ahead):
            row, stop_asked, save_asked = receive()
            stopping, saving = stopping or stop_asked, saving or save_asked
            if not sent and (due or stopping):
                evaluate_log_save(row)
                continue
            if row["step"] % config.log_interval == 0:
                write(row)
            if not sent and saving:
                save()

    # -- what is left behind
    turn.give()
    watchdog.stop()
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        saved = f"saved in {config.out_dir}: go on with --resume" if config.save else "not saved (save=False)"
        say(f"stopped at step {state['step']}, {saved}")
    if rank == 0:
        progress.close()
        runlog.plot_loss(log.path, os.path.join(config.out_dir, "loss.png"), task.loss)
        if config.moe != "none":
            runlog.plot_experts(log.path, os.path.join(config.out_dir, "experts.png"))
        if wandb_run is not None:
            wandb_run.finish()
    return stopping


def say_summary(config, progress, device):
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    progress.say(*runlog.summary(os.path.join(config.out_dir, "log.jsonl"), config, memory), sep="\n")


class Run(NamedTuple):
    """What an update needs."""

    model: torch.nn.Module  # as written; its parameters are those of `fast`
    fast: torch.nn.Module  # compiled or sharded, where asked for: for evaluation
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    update: Callable  # (*batch) -> loss, auxiliary loss, norm of the gradient
    prepare: Callable  # (*batch) -> x, y, what an update does first
    dropout: DropoutSeeds  # to be told of every update before it
    multipliers: dict  # of the learning rate, by parameter name
    reports: torch.Tensor | None  # of mixtures: the routers' reports of all processes, summed until they are read


def build(
    config, device, dtype, world, beat=lambda: None, Model=GPT, multipliers_of=lr_multipliers, micro_steps=None,
    prepare=lambda x, y: (x, y),
):  # fmt: skip
    """Model, optimizer and the update that they make: compiled, sharded, replicated, as a CUDA graph, as config says.

    Model(config)(x, y) -> (_, loss); it has `blocks`, which are sharded one by one. prepare(*batch) -> x, y is
    done first in an update, as a part of its graph.
    """
    as_graph = choose_cuda_graphs(config, device, dtype, world)
    compiling = device.type == "cuda" if config.compile is None else config.compile
    if compiling and config.activation_checkpointing and config.moe != "none":
        compiling = "blocks"  # torch.compile does not take a checkpointed block that leaves routings behind
    if compiling:
        order_loops(device)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    with device:
        model = Model(config)
    flat, (rank, _, _), dropout = None, ranks(), DropoutSeeds(config, as_graph)
    if config.shard == "fsdp" and world > 1:
        shard(model, device, compiling)
        fast = parallel = model
    else:
        if compiling == "blocks":
            for block in model.blocks:
                block.compile()
        fast = parallel = torch.compile(model) if compiling is True else model
        if world > 1 and config.bucket_mb:
            parallel = replicate(fast, device, micro_steps or split_batch(config, world)[1], config.bucket_mb)
        elif world > 1:
            flat = FlatGradients(model)
    multipliers = multipliers_of(model)
    betas = (0.9, config.beta2)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, betas, multipliers)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    mixtures, reports = model.mixtures, None
    if mixtures is not None:
        reports, here = mixtures.no_reports(device), mixtures.no_reports(device)  # summed until read; of one update

    def passes(*batch):
        """Forward and backward passes on this process's share of a batch: x, y, or what `prepare` makes them of.

        x, y (micro_steps, micro_batch, …), of a GPT int64 tokens -> (2,) float32: means of the loss and of the auxiliary one.
        """
        with torch.no_grad():
            x, y = prepare(*batch)
        micro_steps, total, total_aux = len(x), torch.zeros((), device=device), torch.zeros((), device=device)
        if reports is not None:
            here.zero_()
        for i in range(micro_steps):
            with exchange_gradients(parallel, wanted=i == micro_steps - 1):
                beat()  # whoever hangs between two of these is behind the others
                dropout.micro_batch(rank * micro_steps + i)
                with autocast:
                    _, loss = parallel(x[i], y[i])
                beat()
                scaler.scale(loss / micro_steps).backward()
            if mixtures is None:
                total += loss.detach() / micro_steps
            else:
                here.add_(mixtures.reports)
                total += mixtures.cross_entropy / micro_steps
                total_aux += auxiliary_loss(mixtures.reports) / micro_steps
        if world > 1 and config.shard != "fsdp":
            check_gradients(model)
        if flat is not None:
            flat.collect()
        return torch.stack((total, total_aux))

    def step():
        """The optimizer's, on the gradients of all processes -> (1,) float32: their norm."""
        if flat is not None:
            flat.hand_out()
        scaler.unscale_(optimizer)
        norm = clip_gradients(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if reports is not None:
            mixtures.balance(here)
            reports.add_(here)
        return norm.view(1)

    def update(*batch):
        """A batch's -> (3,) float32: loss and auxiliary loss of this process's share, norm of the whole gradient.

        It never waits for the device, so that it can be a CUDA graph.
        """
        losses = passes(*batch)
        if flat is not None:
            flat.exchange()
        if reports is not None and world > 1:
            dist.all_reduce(here)
        return torch.cat((losses, step()))

    if as_graph and world == 1:
        update = Graphed(update)
    elif as_graph:  # exchanges stay outside: NCCL would not end before the graphs that hold one
        passes, step = Graphed(passes), Graphed(step)
    return Run(model, fast, optimizer, scaler, autocast, update, prepare, dropout, multipliers, reports)


def choose_cuda_graphs(config, device, dtype, world):
    """Whether an update runs as a CUDA graph, on several GPUs as two: by default where it can."""
    reasons = [
        (device.type != "cuda", f"device {device.type}"),
        (world > 1 and config.shard == "fsdp", "shard=fsdp"),
        (world > 1 and config.bucket_mb > 0, f"bucket_mb={config.bucket_mb}, whose exchange is within the passes"),
        (dtype == torch.float16, "float16, whose scaler reads the gradients"),
        (config.activation_checkpointing and config.dropout > 0, "activation_checkpointing with dropout"),
    ]
    against = [reason for holds, reason in reasons if holds]
    if config.cuda_graphs and against:
        raise ConfigError(f"cuda_graphs=True does not go with {against[0]}: leave it out")
    return not against if config.cuda_graphs is None else config.cuda_graphs


def open_log(config, resume_step, say):
    """out_dir with config.json and the log in it; an earlier run's is set aside where a new one starts."""
    try:
        if resume_step is None:
            checkpoint.set_aside(config.out_dir, say)
        os.makedirs(config.out_dir, exist_ok=True)
        path = os.path.join(config.out_dir, "config.json")
        with open(path + ".part", "w") as file:
            json.dump(asdict(config), file, indent=1)
        os.replace(path + ".part", path)
    except OSError as error:
        raise ConfigError(f"out_dir={config.out_dir} cannot be written ({error.strerror}): take another") from None
    return runlog.RunLog(config.out_dir, resume_step)


class Lap:
    """Training's clock: steps and seconds since the last row of the log. It stands still for evaluation and saving."""

    def __init__(self):
        self.steps, self.seconds, self.mark = 0, 0.0, None

    def start(self):
        self.mark = time.perf_counter()

    def step(self):
        """-> seconds since the step before, or since the start."""
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.steps, self.seconds = self.steps + 1, self.seconds + elapsed
        return elapsed


def split_batch(config, world):
    """-> sequences an update, micro-steps; ConfigError where batch_tokens does not divide."""
    unit = config.block_size * config.micro_batch * world
    if config.batch_tokens % unit:
        near = max(1, round(config.batch_tokens / unit)) * unit
        remedies = [f"batch_tokens={near}"]
        share, rest = divmod(config.batch_tokens, config.block_size * world)  # sequences of a process
        if rest == 0:
            remedies.insert(0, f"micro_batch={math.gcd(share, config.micro_batch)}")
        raise ConfigError(
            f"batch_tokens={config.batch_tokens} is not divisible by block_size {config.block_size} x micro_batch "
            f"{config.micro_batch} x {world} processes = {unit}: take {', or '.join(remedies)}"
        )
    return config.batch_tokens // config.block_size, config.batch_tokens // unit


def check_vocabulary(config, meta, say):
    have, need = config.vocab_size, meta["vocab_size"]
    takes = next(
        iter(config.nearest("vocab_size", at_least=need)), need
    )  # the first that the head's structure has sizes for
    if need > have:
        raise ConfigError(
            f"vocab_size={have} is smaller than the {need} of {config.data_dir}: take --vocab_size={takes}"
        )
    if need < have // 2 and takes < have:
        say(f"note: vocab_size={have}, but {config.data_dir} has {need} tokens: --vocab_size={takes} saves work")


def check_same_model(config, saved, shape, say):
    """A resumed run has the model it had, options of `shape`; others may change, and the change is said."""
    for key, (value, was) in differences(config, saved, shape).items():
        raise ConfigError(
            f"{key}={value!r}, but the checkpoint in {config.out_dir} has {was!r}: give that, or another out_dir"
        )
    for key, (value, was) in differences(config, saved, saved.keys()).items():
        if key not in ("resume", "out_dir", "init_from"):
            say(f"resumed with {key}={value!r}, it was {was!r}")


def differences(config, saved, keys):
    """{option: (value here, value in a checkpoint's config)} of those `keys` that differ and both have."""
    here = asdict(config)
    keys = [key for key in here if key in keys and key in saved]
    return {key: (here[key], saved[key]) for key in keys if here[key] != saved[key]}


def start_from(config, model, shape, say):
    """The weights of config.init_from, of a model with the same options of `shape`, into the model."""
    saved = checkpoint.load(config.init_from, say)
    if saved is None:
        raise ConfigError(
            f"init_from={config.init_from} holds no checkpoint: give the out_dir of a run, a checkpoint in it, "
            "or nanoGPT's ckpt.pt"
        )
    others = differences(config, saved["config"], shape)
    if others:
        words = shlex.join(f"--{key}={theirs}" for key, (_, theirs) in others.items())
        raise ConfigError(f"init_from={config.init_from} is of another model: give {words}")
    checkpoint.restore(saved, model)
    say(f"weights of step {saved['step']} of {saved['path']}; this run starts at step 0")


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to end, and to save where it does, after the step in progress."""

    def __init__(self, say, saving=True):
        self.asked, self.say, self.what = False, say, "saving" if saving else "ending"
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask)

    def ask(self, *_):
        if not self.asked:
            self.say(f"\nasked to stop: {self.what} after this step", flush=True)
        self.asked = True


@torch.no_grad()
def evaluate(model, data, config, device, autocast, rank, world, beat=lambda: None):
    """Mean validation loss in nats a token: every rank takes its share, sums and counts are added up."""
    model.eval()
    rows = data.val_rows(config.eval_tokens)
    offsets = rows[rank::world]
    sums = []  # of the losses, and numbers of tokens
    # As many passes on every rank, for under FSDP a pass takes all of them; of one shape, so that nothing is
    # compiled anew: rows that do not count fill up.
    for start in range(0, -(-len(rows) // world), config.micro_batch):
        beat()
        chosen = offsets[start : start + config.micro_batch]
        x, y = data.val_batch([*chosen, *rows[:1].repeat(config.micro_batch - len(chosen))])
        y = y.clone()
        y[len(chosen) :] = -1
        with autocast:
            _, loss = model(to_device(x, device), to_device(y, device))
        count = len(chosen) * config.block_size
        sums.append(
            torch.stack((loss * count, torch.full_like(loss, count))) if count else torch.zeros(2, device=device)
        )
    total, count = sum_over_ranks(sums, device)
    model.train()
    return total / count


def print_sample(config, device):
    """Text from the checkpoint just saved."""
    try:
        model, meta = load_model(config.out_dir)
        tokenizer = tokenizer_of(meta)
        options = SampleConfig(max_new_tokens=config.sample_tokens, seed=config.seed)
        (text,) = sample(model.to(device), tokenizer, tokenizer.document_start, options, device)
        print(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")
    except Exception as error:  # no network for GPT-2's merges, a full GPU: the run is whole all the same
        print(f"no sample ({type(error).__name__}): {error}")


if __name__ == "__main__":
    as_script(main)
