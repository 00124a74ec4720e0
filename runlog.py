"""What a run leaves to look at: lines on the screen, log.jsonl, loss.png, and wandb when asked.

A row of log.jsonl is one object: step (updates done), tokens, flops, seconds (of training, the
clock stops for evaluation and checkpoints), loss, val_loss, lr, grad_norm, tokens_per_second, mfu;
a key is left out where there is no figure. Imports from configurator.
"""

import json
import os
import time

from configurator import ConfigError


class RunLog:
    """Writer of one run's log, on rank 0."""

    def __init__(self, out_dir, resume_step=None):
        """resume_step: keep the rows up to it, for a run that goes on from there; None starts anew."""
        self.path = os.path.join(out_dir, "log.jsonl")
        rows = [] if resume_step is None else [row for row in read_log(self.path) if row["step"] <= resume_step]
        with open(self.path + ".part", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(self.path + ".part", self.path)

    def write(self, row):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path):
    """The rows of a log.jsonl; a last line that a kill cut short is left out."""
    rows = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
    return rows


def start_wandb(project, config, run_id):
    """A Weights & Biases run, or the one with `run_id` going on."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb=True, but the package wandb is not installed: pip install wandb") from None
    return wandb.init(project=project, config=config, id=run_id, resume="allow")


def format_row(row, max_steps, seconds_left):
    """One line of progress for the screen."""
    parts = [f"step {row['step']:>{len(str(max_steps))}}/{max_steps}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second'] / 1e3:.1f}k tokens/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if seconds_left is not None:
        parts.append(f"ETA {time.strftime('%H:%M:%S' if seconds_left >= 3600 else '%M:%S', time.gmtime(seconds_left))}")
    if "val_loss" in row:
        parts.append(f"val loss {row['val_loss']:.4f}")
    return " | ".join(parts)


def plot_loss(log_path, png_path):
    """Training and validation loss against step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log_path)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, style in (
        ("loss", "training", {"alpha": 0.6}),
        ("val_loss", "validation", {"marker": "o", "ms": 3}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png_path + ".part", format="png", dpi=120)
    plt.close(figure)
    os.replace(png_path + ".part", png_path)
