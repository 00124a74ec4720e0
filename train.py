"""Train a structured GPT, on a laptop's CPU, one GPU or many.

    python train.py config/quickstart.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --batch_tokens=524288
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --resume

Writes config.json, log.jsonl, loss.png and ckpt.pt to out_dir. Under torchrun each process
drives one GPU (NCCL), or shares the CPU (gloo); batch_tokens is the batch of all of them together.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import runlog
from configurator import ConfigError, load_config
from data import TokenData, make_tokenizer
from device import choose_device, choose_dtype, device_name, peak_flops
from model import GPT, GPTConfig
from mup import make_optimizer, set_lr
from prepare_owt import prepare_default
from sample import Config as SampleConfig
from sample import sample


@dataclass
class Config(GPTConfig):
    data_dir: str = "data/owt_gpt2"  # of prepare_owt.py's files; data/stdlib_char96 prepares itself
    out_dir: str = "out/run"  # where log, picture and checkpoints go
    seed: int = 1337  # of weights, batches and dropout
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # matrix products; auto: 16 bits on GPUs
    compile: bool | None = None  # torch.compile; None: on a GPU only
    max_steps: int = 10_000  # updates in all
    batch_tokens: int = 524_288  # tokens an update, all processes together
    micro_batch: int = 16  # sequences a process takes at a time; the rest of its batch is accumulated
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2_097_152  # validation tokens, the same ones every time
    log_interval: int = 10  # steps between lines on the screen and in log.jsonl
    lr: float = 2e-3  # peak rate, of a dense layer of width 768 under mup
    warmup_steps: int = 200  # of linear warm-up
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # after the warm-up; wsd: warm-up, stable, linear decay
    min_lr_ratio: float = 0.1  # last rate / peak rate, for cosine and wsd
    decay_fraction: float = 0.2  # of max_steps, for the decay of wsd
    weight_decay: float = 0.1  # of matrices; a step takes lr * weight_decay off them
    beta2: float = 0.95  # Adam's
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    resume: bool = False  # go on from out_dir's newest checkpoint, if there is one; torchrun's restarts always do
    wandb: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: str = "nanoeinsum"  # its project there
    sample_tokens: int = 0  # tokens of text to print at the end

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "batch_tokens", "micro_batch", "eval_interval", "eval_tokens", "log_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")
        for name in ("seed", "lr", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 0")
        for name in ("decay_fraction", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it more than 0 and less than 1")
        with torch.device("meta"):
            GPT(self)  # sizes that do not factor are found here, before any memory is taken


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

    # -- processes and device
    rank, local_rank, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    say = print if rank == 0 else lambda *args, **kwargs: None
    rows, micro_steps = split_batch(config, world)  # sequences an update; passes that each process takes for its share
    if rank == 0:
        prepare_default(config.data_dir)
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    data = TokenData(config.data_dir, config.block_size)
    check_vocabulary(config, data.meta, say)

    # -- model and optimizer
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    with device:
        model = GPT(config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, betas=(0.9, config.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # -- a run that goes on, or a new one
    state = dict(step=0, seconds=0.0, best_val_loss=math.inf, wandb_id=None)
    saved = None
    if config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        saved = checkpoint.load(config.out_dir, say)
    if saved is not None:
        check_same_model(config, saved["config"], say)
        model.load_state_dict(saved["model"])
        checkpoint.load_optimizer_state(model, optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty where the checkpoint is of convert.py, or of a run without float16
            scaler.load_state_dict(saved["scaler"])
        state = {key: saved[key] for key in state}
        say(f"{config.out_dir}: going on from step {state['step']}")
    elif config.resume:
        say(f"{config.out_dir}: no checkpoint to go on from, starting at step 0")
    log = wandb_run = None
    if rank == 0:
        if saved is None:
            checkpoint.set_aside(config.out_dir, say)
        os.makedirs(config.out_dir, exist_ok=True)
        with open(os.path.join(config.out_dir, "config.json"), "w") as file:
            json.dump(asdict(config), file, indent=1)
        log = runlog.RunLog(config.out_dir, resume_step=None if saved is None else state["step"])
        if config.wandb:
            wandb_run = runlog.start_wandb(config.wandb_project, asdict(config), state["wandb_id"])
            state["wandb_id"] = wandb_run.id
    del saved
    compiled = torch.compile(model) if (device.type == "cuda" if config.compile is None else config.compile) else model
    parallel = (
        DistributedDataParallel(compiled, device_ids=[local_rank] if device.type == "cuda" else None)
        if world > 1
        else compiled
    )

    flops_per_token = 3 * model.flops_per_token()  # forward 1, backward 2
    peak = peak_flops(device_name(device)) if dtype != torch.float32 else None
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {flops_per_token / 1e6:.1f} MFLOPs a token (training) | "
        f"{config.max_steps:,} steps x {config.batch_tokens:,} tokens = {micro_steps} micro-steps x {world} processes x "
        f"{config.micro_batch} sequences | {device_name(device)}, {str(dtype).removeprefix('torch.')}"
    )

    # -- the loop
    stop = StopSignal(say)
    started, first_step = time.perf_counter(), state["step"]
    lap_steps, lap_seconds = 0, 0.0  # since the last row of the log

    def evaluate_log_save(row):
        """Validation loss into the row; the row to the log; then a checkpoint."""
        row["val_loss"] = evaluate(compiled, data, config, device, autocast, rank, world)
        state["best_val_loss"] = min(state["best_val_loss"], row["val_loss"])
        write_row(row)
        if rank == 0:
            checkpoint.save(
                config.out_dir,
                {
                    **state, "config": asdict(config), "meta": data.meta, "model": model.state_dict(),
                    "optimizer": checkpoint.optimizer_state(model, optimizer), "scaler": scaler.state_dict(),
                },
            )  # fmt: skip

    def write_row(row):
        if rank == 0:
            done = state["step"] - first_step
            seconds_left = (time.perf_counter() - started) / done * (config.max_steps - state["step"]) if done else None
            say(runlog.format_row(row, config.max_steps, seconds_left), flush=True)
            log.write(row)
            if wandb_run is not None:
                wandb_run.log(row, step=row["step"])

    def new_row():
        tokens = state["step"] * config.batch_tokens
        return {
            "step": state["step"],
            "tokens": tokens,
            "flops": tokens * flops_per_token,
            "seconds": round(state["seconds"], 3),
        }

    if state["step"] == 0:
        evaluate_log_save(new_row())
    while state["step"] < config.max_steps:
        mark = time.perf_counter()
        step = state["step"]
        lr = lr_at(step, config)
        set_lr(optimizer, lr)
        if config.dropout:
            torch.manual_seed(hash((config.seed, step, rank)))  # dropout too is a function of the step
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            first = (micro_step * world + rank) * config.micro_batch
            x, y = to_device(data.train_batch(config.seed, step, rows, first, first + config.micro_batch), device)
            last = micro_step == micro_steps - 1
            with nullcontext() if last or world == 1 else parallel.no_sync():
                with autocast:
                    _, loss = parallel(x, y)
                scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach() / micro_steps
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        # One exchange between processes, one wait for the device: what all must agree on.
        agreed = torch.stack((loss_sum / world, torch.full_like(loss_sum, stop.asked)))
        if world > 1:
            dist.all_reduce(agreed)
        train_loss, stop_asked, norm = torch.cat((agreed, grad_norm.view(1))).tolist()
        # GradScaler itself skips updates with overflown float16 gradients; anything else non-finite is an end.
        if not math.isfinite(train_loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise ConfigError(
                f"step {step + 1}: loss {train_loss}, gradient norm {norm}; stopped before the update. "
                f"{checkpoint.describe(config.out_dir)}; resume with a lower lr (it is {config.lr:g}) or more warmup_steps"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        state["step"] += 1
        elapsed = time.perf_counter() - mark
        state["seconds"] += elapsed
        lap_steps, lap_seconds = lap_steps + 1, lap_seconds + elapsed

        due = state["step"] % config.eval_interval == 0 or state["step"] == config.max_steps or stop_asked > 0
        if due or state["step"] % config.log_interval == 0:
            speed = config.batch_tokens * lap_steps / lap_seconds
            row = {**new_row(), "loss": train_loss, "lr": lr, "tokens_per_second": round(speed, 1)}
            if math.isfinite(norm):
                row["grad_norm"] = norm
            if peak is not None:
                row["mfu"] = speed * flops_per_token / (peak * world)
            evaluate_log_save(row) if due else write_row(row)
            lap_steps, lap_seconds = 0, 0.0
        if stop_asked:
            say(f"stopped at step {state['step']}, saved in {config.out_dir}: go on with --resume")
            break

    # -- what is left behind
    if rank == 0:
        runlog.plot_loss(log.path, os.path.join(config.out_dir, "loss.png"))
        if wandb_run is not None:
            wandb_run.finish()
        if config.sample_tokens and not stop.asked:
            print_sample(model, data.meta, config, device, autocast)
        say(
            f"best validation loss {state['best_val_loss']:.4f} | {state['seconds']:.0f} s of training | see {config.out_dir}"
        )
    if world > 1:
        dist.destroy_process_group()


def split_batch(config, world):
    """-> sequences an update, micro-steps; ConfigError where batch_tokens does not divide."""
    unit = config.block_size * config.micro_batch * world
    if config.batch_tokens % unit:
        near = max(1, round(config.batch_tokens / unit)) * unit
        raise ConfigError(
            f"batch_tokens={config.batch_tokens} is not divisible by block_size {config.block_size} x micro_batch "
            f"{config.micro_batch} x {world} processes = {unit}: take batch_tokens={near}, or another micro_batch"
        )
    return config.batch_tokens // config.block_size, config.batch_tokens // unit


def check_vocabulary(config, meta, say):
    if meta["vocab_size"] > config.vocab_size:
        raise ConfigError(
            f"vocab_size={config.vocab_size} is smaller than the {meta['vocab_size']} of {config.data_dir}: "
            f"take --vocab_size={meta['vocab_size']} or more"
        )
    if meta["vocab_size"] < config.vocab_size // 2:
        have, need = config.vocab_size, meta["vocab_size"]
        say(f"note: vocab_size={have}, but {config.data_dir} has {need} tokens: --vocab_size={need} saves work")


def check_same_model(config, saved, say):
    """A resumed run has the model it had; other options may change, and the change is said."""
    shape = {field.name for field in fields(GPTConfig)} - {"dropout"}
    for key, value in asdict(config).items():
        if key in ("resume", "out_dir") or key not in saved or value == saved[key]:
            continue
        if key in shape:
            raise ConfigError(
                f"{key}={value!r}, but the checkpoint in {config.out_dir} has {saved[key]!r}: give that, or another out_dir"
            )
        say(f"resumed with {key}={value!r}, it was {saved[key]!r}")


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to save and end after the step in progress."""

    def __init__(self, say):
        self.asked, self.say = False, say
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask)

    def ask(self, *_):
        if not self.asked:
            self.say("\nasked to stop: saving after this step", flush=True)
        self.asked = True


def to_device(batch, device):
    if device.type != "cuda":
        return [tensor.to(device) for tensor in batch]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]


@torch.no_grad()
def evaluate(model, data, config, device, autocast, rank, world):
    """Mean validation loss in nats a token: every rank takes its share, sums and counts are added up."""
    model.eval()
    offsets = data.val_rows(config.eval_tokens)[rank::world]
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of tokens
    for start in range(0, len(offsets), config.micro_batch):
        chosen = offsets[start : start + config.micro_batch]
        missing = config.micro_batch - len(chosen)
        # A last batch of the same shape, so that nothing is compiled anew: rows that do not count fill it.
        x, y = data.val_batch([*chosen, *chosen[:1].repeat(missing)])
        y = y.clone()
        y[len(chosen) :] = -1
        x, y = to_device((x, y), device)
        with autocast:
            _, loss = model(x, y)
        count = len(chosen) * config.block_size
        total += torch.stack((loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)))
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def print_sample(model, meta, config, device, autocast):
    try:
        tokenizer = make_tokenizer(meta["tokenizer"])
    except ConfigError as error:  # no network for GPT-2's merges: the run is whole all the same
        print(f"no sample: {error}")
        return
    options = SampleConfig(max_new_tokens=config.sample_tokens, seed=config.seed)
    with autocast:
        (text,) = sample(model, tokenizer, tokenizer.document_start, options, device)
    print(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")


if __name__ == "__main__":
    main(sys.argv[1:])
