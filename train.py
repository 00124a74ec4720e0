"""Train a structured GPT, on a laptop's CPU, one GPU or many.

    python train.py config/quickstart.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --batch_tokens=524288
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_btt.py --resume

Writes config.json, log.jsonl, loss.png and ckpt.pt to out_dir, and experts.png if there are mixtures. Under torchrun each
process drives one GPU (NCCL), or all share the CPU (gloo); batch_tokens counts the batch of all processes together.
"""

import math
import os
from collections import deque
from dataclasses import asdict, fields
from functools import partial

from configurator import ConfigError, as_script, load_config
from options import GPTConfig, TrainConfig

if __name__ == "__main__":  # report mistakes before torch is imported, which takes seconds
    as_script(partial(load_config, TrainConfig))

import torch
import torch.distributed as dist

from data import TokenData, tokenizer_of
from engine import checkpoint, runlog
from engine.agreement import check_data_of_ranks
from engine.compiling import choose_compiling, choose_cuda_graphs, order_loops
from engine.device import Numbers, Turn, choose_device, choose_dtype, device_name, peak_flops, to_device
from engine.failures import not_finite, run_with_progress
from engine.heartbeat import Watchdog, init_distributed
from engine.parallel import (
    DropoutSeeds,
    check_gradients,
    clip_gradients,
    exchange_gradients,
    parallelize,
    ranks,
    split_batch,
    sum_over_ranks,
)
from engine.recorder import Recorder
from engine.resuming import load_start, own_out_dir
from engine.signals import StopSignal
from kernels.cuda_graph import Graphed
from model import GPT
from moe import auxiliary_loss, set_top_k
from optim import make_optimizers
from prepare_owt import prepare_default
from sample import SampleConfig, load_model, sample

MOST_SKIPPED = 25  # updates with overflown float16 gradients in a row: each halves GradScaler's factor, 65,536 at first


def lr_at(step, config):
    """Learning rate of update number `step`, which depends on the step alone. 0 is the first; the log calls it step 1."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = config.max_steps - step  # remaining updates, including this one
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":
        fraction = min(1.0, left / max(1, config.decay_fraction * config.max_steps))
    else:
        return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fraction)


class Trainer:
    """One run on all processes: a model, its optimizers and the loop that trains it. vision/ uses it, too.

        trainer = Trainer(config, TokenTask(config, device, data), device)
        stopped = trainer.run()

    config    a RunConfig
    task      the model, its data and its units: a TokenTask, or another object with the same attributes and methods
    watchdog  from init_distributed; None: no watchdog, for a single process
    progress  runlog.Progress; None: prints nothing
    """

    def __init__(self, config, task, device, watchdog=None, progress=None):
        self.config, self.task, self.device = config, task, device
        self.watchdog, self.progress = watchdog or Watchdog(), progress or runlog.Silent()
        self.say = self.progress.say
        self.rank, _, self.world = ranks()
        self.dtype = choose_dtype(config.dtype, device)
        self.state = dict(step=0, seconds=0.0, best_val_loss=math.inf, wandb_id=None)  # checkpoints add tensors
        self.setup()

    # -- before the loop

    def setup(self):
        """Make the model, the optimizers and the update: compiled, sharded or copied, and recorded, as the config demands."""
        config, device = self.config, self.device
        as_graph = choose_cuda_graphs(config, device, self.dtype, self.world)
        compiling = choose_compiling(config, device)
        if compiling:
            order_loops(device)
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        with device:
            self.model = self.task.make_model()  # uncompiled; shares its parameters with the next two
        self.dropout = DropoutSeeds(config, as_graph)
        models = parallelize(self.model, config, device, compiling, self.task.micro_steps)
        self.compiled_model, self.parallel_model, self.flat_gradients = models  # to evaluate; to train; to exchange
        self.optimizers = self.task.make_optimizers(self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.routers = self.model.routers
        if self.routers is not None:  # sums of the routers' reports: since the last log of them, and of one update
            self.reports, self.update_reports = self.routers.no_reports(device), self.routers.no_reports(device)
        if as_graph and self.world == 1:
            self.update = Graphed(self.update)
        elif as_graph:  # exchanges stay outside: NCCL cannot shut down while a graph contains one
            self.run_passes, self.step_optimizers = Graphed(self.run_passes), Graphed(self.step_optimizers)

    def start(self):
        """Load the initial state, open the log, print the plan, and evaluate if that has not been done yet."""
        config, say = self.config, self.say
        forward = self.task.flops(self.model)
        peak = peak_flops(device_name(self.device)) if self.dtype != torch.float32 else None
        peak_of_all = None if peak is None else peak * self.world
        self.recorder = Recorder(config, self.task, 3 * forward, peak_of_all, self.progress)  # backward 2, forward 1
        resume_step = self.load_state()
        if self.rank == 0:
            self.state["wandb_id"] = self.recorder.open(self.watchdog.run, resume_step, self.state["wandb_id"])
        units = dict(unit=self.task.unit, flops=forward)
        table = runlog.model_table(
            self.model,
            self.optimizers.multipliers,
            config.lr,
            **units,
            layer_uses=partial(self.task.layer_uses, self.model),
        )
        say(*table, sep="\n")
        where = (self.world, self.task.micro_steps, device_name(self.device), self.dtype, peak)
        plan = runlog.plan(config, self.model, *where, self.state["step"], **units, batch=self.task.units)
        say(*plan, sep="\n")
        self.saves = checkpoint.Saves(config, say, self.watchdog)
        self.stop, self.turn = StopSignal(say, config.save), Turn()
        self.skipped = 0  # updates in a row that GradScaler has skipped
        self.launched = deque()  # updates given to the device that the host has not waited for
        self.ahead = 1 if self.device.type == "cuda" else 0  # number of these: the device never waits for the host
        self.turn_step = self.state["step"] + 5  # by then the update is compiled, and recorded as a CUDA graph
        if math.isinf(self.state["best_val_loss"]):  # not evaluated yet
            self.evaluate(self.recorder.totals(self.state["step"]))
        self.recorder.start_clock()

    def load_state(self):
        """Load the checkpoint that the run starts from -> its step, or None for a new run."""
        with self.watchdog.paused():  # an earlier attempt of the same run may need time to end
            again = own_out_dir(self.config, self.watchdog.run, self.say) or self.config.resume
        saved = load_start(self.config, self.task, self.model, self.optimizers, self.scaler, again, self.say)
        if saved is None:
            return None
        self.state = {key: saved[key] for key in self.state}
        self.recorder.seconds = self.state["seconds"]
        return self.state["step"]

    # -- the loop

    def run(self):
        """Train to max_steps, with log, evaluations and checkpoints -> whether a signal stopped it before the end."""
        self.start()
        config, state, stopping = self.config, self.state, False
        while state["step"] < config.max_steps and not stopping:
            self.wait_for_turn()
            self.launch_step()
            evaluating = state["step"] % config.eval_interval == 0 or state["step"] == config.max_steps
            saving = self.saves.due(state["step"])
            while self.launched and (evaluating or stopping or saving or len(self.launched) > self.ahead):
                row, stop_asked, save_asked = self.finish_step()
                stopping, saving = stopping or stop_asked, saving or save_asked
                latest = not self.launched  # the weights are those after this row's update
                if latest and (evaluating or stopping):
                    self.evaluate(row)
                    continue
                if row["step"] % config.log_interval == 0:
                    self.recorder.write(row)
                if latest and saving:
                    self.save()
        self.finish(stopping)
        return stopping

    def launch_step(self):
        """Give the next update to the device: learning rate, batch, update. The host does not wait for it to finish."""
        step = self.state["step"]
        lr = lr_at(step, self.config)
        self.optimizers.set_lr(lr)
        self.dropout.seed_update(step, self.rank * self.task.micro_steps)
        batch = self.task.batch(step)
        self.watchdog.beat(step)
        loss, aux, norm = self.update(*batch).unbind()
        asked = (torch.full_like(loss, asked) for asked in (self.stop.asked, self.saves.asked()))
        agreed = torch.stack((loss / self.world, aux / self.world, *asked))
        self.watchdog.beat()
        if self.world > 1:
            dist.all_reduce(agreed)
        self.launched.append((step + 1, lr, Numbers(torch.cat((agreed, norm.view(1))))))
        self.state["step"] = step + 1

    def update(self, *batch):
        """Update on this process's share of a batch -> (3,) float32: its loss, its auxiliary loss, norm of the whole gradient.

        It never waits for the device, so that it can be a CUDA graph.
        """
        losses = self.run_passes(*batch)
        if self.flat_gradients is not None:
            self.flat_gradients.exchange()
        if self.routers is not None and self.world > 1:
            dist.all_reduce(self.update_reports)
        return torch.cat((losses, self.step_optimizers()))

    def run_passes(self, *batch):
        """Forward and backward passes on this process's share of a batch (task.batch).

        -> (2,) float32: means of the loss and of the auxiliary loss.
        """
        with torch.no_grad():
            x, y = self.task.prepare(*batch)  # (micro_steps, micro_batch, …)
        total, total_aux = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        if self.routers is not None:
            self.update_reports.zero_()
        for i in range(len(x)):
            loss, aux = self.micro_step(i, x[i], y[i], len(x))
            total += loss / len(x)
            if aux is not None:
                total_aux += aux / len(x)
        if self.world > 1 and self.config.shard != "fsdp":
            check_gradients(self.model)
        if self.flat_gradients is not None:
            self.flat_gradients.collect()
        return torch.stack((total, total_aux))

    def micro_step(self, i, x, y, micro_steps):
        """Passes on micro-batch i of micro_steps, x, y (micro_batch, …) -> its loss, its auxiliary loss or None."""
        with exchange_gradients(self.parallel_model, wanted=i == micro_steps - 1):
            self.watchdog.beat()  # a rank that hangs between two beats falls behind the others
            self.dropout.seed_micro_batch(self.rank * micro_steps + i)
            with self.autocast:
                _, loss = self.parallel_model(x, y)
            self.watchdog.beat()
            self.scaler.scale(loss / micro_steps).backward()
        if self.routers is None:
            return loss.detach(), None
        self.update_reports.add_(self.routers.reports)
        return self.routers.cross_entropy, auxiliary_loss(self.routers.reports)

    def step_optimizers(self):
        """Clip the gradients of all processes, step, balance the routers -> (1,) float32: the norm before clipping."""
        if self.flat_gradients is not None:
            self.flat_gradients.hand_out()
        self.scaler.unscale_(self.optimizers)
        norm = clip_gradients(self.model.parameters(), self.config.grad_clip or math.inf)
        self.scaler.step(self.optimizers)
        self.scaler.update()
        self.optimizers.zero_grad(set_to_none=True)
        if self.routers is not None:
            self.routers.balance(self.update_reports, self.config.router_balance)
            self.reports.add_(self.update_reports)
        return norm.view(1)

    def finish_step(self):
        """Wait for the oldest launched update -> its row of the log, and whether any process was asked to stop, and to save."""
        step, lr, numbers = self.launched.popleft()
        loss, aux, stop_asked, save_asked, norm = numbers.wait()
        # GradScaler skips updates whose float16 gradients overflowed; any other non-finite number ends the run.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise not_finite(self.config, f"step {step}: loss {loss}, gradient norm {norm}")
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            what = f"step {step}: the gradients of {MOST_SKIPPED} updates in a row were not finite in float16"
            raise not_finite(self.config, what, "--dtype=float32, ")
        self.recorder.finish_step(step)
        row = {**self.recorder.totals(step), "loss": loss, "lr": lr}
        if math.isfinite(norm):
            row["grad_norm"] = norm
        if self.config.moe != "none":
            row["aux_loss"] = aux
        return row, stop_asked > 0, save_asked > 0

    def evaluate(self, row):
        """Add figures of validation and routing to the row, log it, and write a checkpoint if config.save."""
        config, state = self.config, self.state
        if config.eval_top_k:
            set_top_k(self.model, config.eval_top_k)
        row.update(self.task.evaluate(self))
        if not math.isfinite(row["val_loss"]):
            raise not_finite(config, f"step {row['step']}: val_loss {row['val_loss']}")
        if config.eval_top_k:
            set_top_k(self.model, config.top_k)
        if self.routers is not None and "loss" in row:
            row["moe"] = self.routers.figures(self.reports)
            self.reports.zero_()
        best = row["val_loss"] < state["best_val_loss"]
        state["best_val_loss"] = min(state["best_val_loss"], row["val_loss"])
        self.recorder.write(row)
        if config.save:
            self.save(best)
        self.recorder.start_clock()

    def save(self, best=False):
        """Write a checkpoint. best: it has the lowest validation loss so far."""
        self.state["seconds"] = self.recorder.seconds
        state = {
            **self.state, "config": asdict(self.config), "meta": self.task.meta, "model": self.model.state_dict(),
            "optimizer": self.optimizers.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        bad = checkpoint.first_non_finite(state)
        if bad:
            raise not_finite(self.config, f"step {self.state['step']}: {bad} holds inf or NaN")
        self.saves.save(state, best)
        self.recorder.start_clock()

    def wait_for_turn(self):
        """Runs that start side by side on one GPU compile together, then train one by one (device.Turn)."""
        if self.turn.path and self.state["step"] == self.turn_step:
            with self.watchdog.paused():
                self.turn.take()
            self.recorder.start_clock()

    # -- after the loop

    def finish(self, stopped):
        """Leave the process group, write the pictures, and tell how to resume if the run was stopped."""
        self.turn.give()
        self.watchdog.stop()
        if self.world > 1:
            dist.destroy_process_group()
        if stopped:
            out_dir = self.config.out_dir
            saved = f"saved in {out_dir}: continue with --resume" if self.config.save else "not saved (save=False)"
            self.say(f"stopped at step {self.state['step']}, {saved}")
        self.recorder.close()

    def say_summary(self):
        """Print the run's main figures and where its files are."""
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None
        log = os.path.join(self.config.out_dir, "log.jsonl")
        self.say(*runlog.summary_of_run(log, self.config, memory), sep="\n")


class TokenTask:
    """The part of a run that depends on what is learned: model, data and units. Here a GPT, and tokens.

    unit, units   the unit of a batch, and how many an update takes on all processes together
    loss_unit     unit of the loss, for its picture
    shape         names of the options that define the model, which a resumed run must not change
    meta          plain values that describe the data, for the checkpoint
    micro_steps   number of micro-batches in a process's share of a batch
    """

    unit, loss_unit = "token", "nats per token"
    shape = {field.name for field in fields(GPTConfig)} - {"fused_loss"}

    def __init__(self, config, device, data):
        """data: TokenData. ConfigError if the batch does not divide into micro-batches."""
        self.config, self.device, self.data = config, device, data
        self.meta, self.units = data.meta, config.batch_tokens
        self.rank, _, self.world = ranks()
        self.rows, self.micro_steps = split_batch(config, self.world)  # rows: sequences of an update

    def make_model(self):
        """-> a model: model(x, y) returns (…, loss); `mixtures` may be None; `blocks` are sharded one by one."""
        return GPT(self.config)

    def make_optimizers(self, model):
        """-> optim.Optimizers for all parameters of the model."""
        return make_optimizers(model, self.config)

    def flops(self, model):
        """FLOPs of a forward pass on one unit."""
        return model.flops_per_token()

    def layer_uses(self, model, role):
        """How often one unit passes through the layer that plays `role`."""
        return 1

    def batch(self, step):
        """This process's share, on the device: inputs and targets, (micro_steps, micro_batch, block_size) int64."""
        share = self.rows // self.world
        place = (self.rows, self.rank * share, (self.rank + 1) * share)
        tensors = self.data.train_batch(self.config.seed, step, *place)
        shape = (self.micro_steps, self.config.micro_batch, self.config.block_size)
        return [to_device(tensor.reshape(shape), self.device) for tensor in tensors]

    def prepare(self, x, y):
        """A batch -> x and y, both (micro_steps, micro_batch, …). Runs inside the update, and so inside its CUDA graph."""
        return x, y

    @torch.no_grad()
    def evaluate(self, trainer):
        """-> {"val_loss": mean over the validation tokens, in nats per token}, for the log.

        Every rank evaluates its share; sums and counts are added up.
        """
        model, micro_batch = trainer.compiled_model, self.config.micro_batch
        model.eval()
        rows = self.data.val_rows(self.config.eval_tokens)
        offsets = rows[self.rank :: self.world]
        sums = []  # sums of losses, and numbers of tokens
        # Every rank runs the same number of passes, because under FSDP a pass involves all ranks, and all have one shape,
        # so that nothing is compiled again: rows that do not count fill the last ones.
        for start in range(0, -(-len(rows) // self.world), micro_batch):
            trainer.watchdog.beat()
            chosen = offsets[start : start + micro_batch]
            x, y = self.data.val_batch([*chosen, *rows[:1].repeat(micro_batch - len(chosen))])
            y = y.clone()
            y[len(chosen) :] = -1
            with trainer.autocast:
                _, loss = model(to_device(x, self.device), to_device(y, self.device))
            count = len(chosen) * self.config.block_size
            of_these = torch.stack((loss * count, torch.full_like(loss, count)))
            sums.append(of_these if count else torch.zeros(2, device=self.device))
        total, count = sum_over_ranks(sums, self.device)
        model.train()
        return {"val_loss": total / count}


def main(argv):
    """Train as the command line demands. Errors are a OneLineExit."""
    config = load_config(TrainConfig, argv)
    what = f"micro_batch={config.micro_batch} sequences of {config.block_size} tokens"
    run_with_progress(train_gpt, config, f"{what}: lower micro_batch (batch_tokens stays)")


def train_gpt(config, progress):
    """Train a GPT. Every process calls it. progress: runlog.Progress, or runlog.Silent on ranks that print nothing."""
    rank, local_rank, world = ranks()
    if not os.path.isdir(config.data_dir):
        split_batch(config, world)  # report mistakes before data are prepared
    if rank == 0:
        prepare_default(config.data_dir)
    device = choose_device(config.device, local_rank)
    with init_distributed(device, config.timeout, asdict(config)) as watchdog:
        data = TokenData(config.data_dir, config.block_size)
        check_data_of_ranks(data.meta)
        check_vocabulary(config, data.meta, progress.say)
        trainer = Trainer(config, TokenTask(config, device, data), device, watchdog, progress)
        stopped = trainer.run()
    if rank == 0:
        if config.sample_tokens and not stopped:
            print_sample(config, device)
        trainer.say_summary()


def check_vocabulary(config, meta, say):
    """ConfigError if the data's vocabulary (meta.json) is larger than the model's; a note if it is far smaller."""
    have, need = config.vocab_size, meta["vocab_size"]
    # The smallest for which the head's structure has sizes.
    takes = next(iter(config.nearest("vocab_size", at_least=need)), need)
    if need > have:
        raise ConfigError(
            f"vocab_size={have} is smaller than the {need} of {config.data_dir}: take --vocab_size={takes}"
        )
    if need < have // 2 and takes < have:
        say(f"note: vocab_size={have}, but {config.data_dir} has {need} tokens: --vocab_size={takes} saves work")


def print_sample(config, device):
    """Print text sampled from the newest checkpoint."""
    try:
        model, meta = load_model(config.out_dir)
        tokenizer = tokenizer_of(meta)
        options = SampleConfig(max_new_tokens=config.sample_tokens, seed=config.seed)
        (text,) = sample(model.to(device), tokenizer, tokenizer.document_start, options, device)
        print(f"{'-' * 30} sample {'-' * 30}\n{text}\n{'-' * 68}")
    except Exception as error:  # no network for GPT-2's merges, a full GPU: the run itself is complete
        print(f"no sample ({type(error).__name__}): {error}")


if __name__ == "__main__":
    as_script(main)
