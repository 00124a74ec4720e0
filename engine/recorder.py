"""The record that a run keeps: rows for the screen, log.jsonl and Weights & Biases, and the clock of training."""

import os
import time
from dataclasses import asdict

from engine import runlog
from engine.resuming import open_out_dir


class Recorder:
    """Makes the rows of one run, with the same figures on all ranks; rank 0 writes them.

        recorder.open(…); recorder.start_clock()
        recorder.finish_step(step); recorder.write(recorder.totals(step) | figures)

    task    has unit ("token"), units (number of them in an update, over all processes) and loss_unit
    flops   FLOPs of training on one unit
    peak    FLOP/s of all devices together; None: unknown, so rows have no MFU
    The clock counts training only: evaluations and checkpoints end with start_clock, which discards their time.
    """

    def __init__(self, config, task, flops, peak, progress):
        self.config, self.task, self.flops, self.peak, self.progress = config, task, flops, peak, progress
        self.log = self.wandb = None
        self.seconds = 0.0  # of training since step 0
        self.lap_steps, self.lap_seconds, self.mark = 0, 0.0, None  # since the last row

    def open(self, run, resume_step, wandb_id):
        """Open the log, on rank 0, and wandb where asked for -> its run's id or None.

        run: our own id of the run, in out_dir. resume_step, wandb_id: the checkpoint's, or None.
        """
        if self.config.wandb:
            self.wandb = runlog.start_wandb(self.config.wandb_project, asdict(self.config), wandb_id)
            wandb_id = self.wandb.id
        self.log = open_out_dir(self.config, run, resume_step, self.progress.say)
        return wandb_id

    def start_clock(self):
        """Start the clock: training begins, or continues after an evaluation or a checkpoint."""
        self.mark = time.perf_counter()

    def finish_step(self, step):
        """Count the seconds of the step just finished, which makes `step` steps in all."""
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds += elapsed
        self.lap_steps, self.lap_seconds = self.lap_steps + 1, self.lap_seconds + elapsed
        self.progress.step(step)

    def totals(self, step):
        """-> the beginning of a row: units, FLOPs and seconds of the first `step` steps."""
        units = step * self.task.units
        return {
            "step": step,
            f"{self.task.unit}s": units,
            "flops": units * self.flops,
            "seconds": round(self.seconds, 3),
        }

    def write(self, row):
        """Add the speed since the last row to the row, and write it. RunFailed if the disk is full."""
        if self.lap_steps:
            speed = self.task.units * self.lap_steps / self.lap_seconds
            row[f"{self.task.unit}s_per_second"] = round(speed, 1)
            if self.peak is not None:
                row["mfu"] = speed * self.flops / self.peak
            self.lap_steps, self.lap_seconds = 0, 0.0
        if self.log is not None:
            self.progress.row(row)
            self.log.write(row)
        if self.wandb is not None:
            self.wandb.log(row, step=row["step"])

    def close(self):
        """Draw the pictures, on rank 0, and close wandb."""
        if self.log is None:
            return
        self.progress.close()
        runlog.plot_loss(self.log.path, os.path.join(self.config.out_dir, "loss.png"), self.task.loss_unit)
        if self.config.moe != "none":
            runlog.plot_experts(self.log.path, os.path.join(self.config.out_dir, "experts.png"))
        if self.wandb is not None:
            self.wandb.finish()
