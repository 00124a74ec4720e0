"""Learn a random teacher network: the synthetic experiment of "Searching for Efficient Linear Layers over a Continuous
Space of Structured Matrices" (NeurIPS 2024, section 4).

    python -m vision.regression vision/config/regression.py --structure=btt --rank=2 --d_model=1024

Inputs are 8 normal numbers, the teacher is a ReLU network of 6 layers of width 1024 whose output has mean 0 and variance
1, and the student is the residual MLP of mlp.py. No input is used twice. The loss is the mean squared error.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import partial

from configurator import as_script, load_config
from options import RunConfig, at_least, check_seed
from vision.options import ATTENTION, MLPConfig, refuse


@dataclass
class RegressionConfig(RunConfig, MLPConfig):
    out_dir: str = "out/regression"  # where log, picture and checkpoints go
    d_in: int = 8  # numbers in an input
    teacher_layers: int = 6  # hidden layers of the teacher
    teacher_width: int = 1024  # their width
    teacher_seed: int = 42  # of its weights
    batch_size: int = 4096  # inputs an update, all processes together
    micro_batch: int = 4096  # inputs a process takes at a time; the rest of its batch is accumulated
    eval_inputs: int = 65_536  # inputs of an evaluation, the same ones each time
    lr: float = 1e-3  # peak rate, of a dense layer of width base_width; of biases and norms
    input_lr: float = 1.0  # rate of the input layer, as a share of `lr`
    grad_clip: float = 0.0  # largest norm of the gradient; 0: no limit
    weight_decay: float = 0.0  # of matrices; a step takes lr * weight_decay off them
    beta2: float = 0.999  # Adam's
    min_lr_ratio: float = 0.0  # last rate / peak rate, for cosine and wsd
    structured_layers: tuple = ("ffn",)  # or input, ffn.up .down, head

    d_out = 1

    def __post_init__(self):
        refuse(self, "the MLP has none", True, **ATTENTION)
        MLPConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        at_least(1, self, "d_in", "teacher_layers", "teacher_width", "batch_size", "eval_inputs")
        at_least(0, self, "input_lr")
        check_seed("teacher_seed", self.teacher_seed)
        self.check_layers()


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, RegressionConfig))

import torch
import torch.nn.functional as F

from engine.device import choose_device, to_device
from engine.failures import run_with_progress
from engine.heartbeat import init_distributed
from engine.parallel import ranks, split_batch, sum_over_ranks
from optim import make_optimizers
from train import Trainer
from vision.data import rng
from vision.mlp import MLP
from vision.train import image_lr_multipliers

INPUTS, VALIDATION = 0, 1  # what random numbers are for


class Teacher:
    """x (B, d_in) -> y (B,): ReLU times sqrt(2) after each hidden layer, weights of variance 1 / fan-in, no biases."""

    def __init__(self, config, device):
        draw = torch.Generator().manual_seed(config.teacher_seed)
        widths = [config.d_in] + [config.teacher_width] * config.teacher_layers + [1]
        self.weights = [torch.randn(b, a, generator=draw) / math.sqrt(a) for a, b in zip(widths, widths[1:])]
        self.mean, self.std = 0.0, 1.0
        y = self(torch.randn(8192, config.d_in, generator=draw))
        self.mean, self.std = y.mean().item(), y.std().item()
        self.weights = [weight.to(device) for weight in self.weights]

    @torch.no_grad()
    def __call__(self, x):
        *hidden, last = self.weights
        for weight in hidden:
            x = F.relu(x @ weight.T) * math.sqrt(2)
        return ((x @ last.T)[:, 0] - self.mean) / self.std


def squared_error(y, targets):
    """Mean squared error of y (B, 1) against targets (B,)."""
    return F.mse_loss(y[:, 0], targets)


class TeacherTask:
    """What a Trainer does not know about a run that learns a teacher; train.TokenTask documents each attribute and method."""

    unit, loss_unit = "sample", "squared error, 1 for a constant"
    shape = {field.name for field in fields(MLPConfig)} | {"d_in"}

    def __init__(self, config, device):
        """ConfigError if the batch cannot be divided among the processes."""
        self.config, self.device, self.teacher = config, device, Teacher(config, device)
        self.meta = {"teacher": [config.d_in, config.teacher_layers, config.teacher_width, config.teacher_seed]}
        self.units = config.batch_size
        self.rank, _, self.world = ranks()
        _, self.micro_steps = split_batch(config, self.world)

    def make_model(self):
        return MLP(self.config, loss=squared_error)

    def make_optimizers(self, model):
        return make_optimizers(model, self.config, image_lr_multipliers(self.config, model))

    def flops(self, model):
        return model.flops()

    def layer_uses(self, model, role):
        return model.layer_uses(role)

    def inputs(self, purpose, number, rows, start, stop):
        """Rows start … stop of the `rows` inputs that seed, purpose and number determine -> (stop - start, d_in) on the device"""
        x = rng(self.config.seed, purpose, number).standard_normal((rows, self.config.d_in), dtype="float32")
        return to_device(torch.from_numpy(x[start:stop]), self.device)

    def batch(self, step):
        """This process's share: x (micro_steps, micro_batch, d_in), y (micro_steps, micro_batch)."""
        rows = self.config.batch_size
        share = rows // self.world
        x = self.inputs(INPUTS, step, rows, self.rank * share, (self.rank + 1) * share)
        return [tensor.unflatten(0, (self.micro_steps, self.config.micro_batch)) for tensor in (x, self.teacher(x))]

    def prepare(self, x, y):
        return x, y

    @torch.no_grad()
    def evaluate(self, trainer):
        """-> {"val_loss": mean squared error}"""
        trainer.compiled_model.eval()
        size = self.config.micro_batch
        count = -(-self.config.eval_inputs // (size * self.world))  # as many on every rank
        errors = []
        for number in range(self.rank * count, (self.rank + 1) * count):
            trainer.watchdog.beat()
            x = self.inputs(VALIDATION, number, size, 0, size)
            with trainer.autocast:
                y, _ = trainer.compiled_model(x)
            errors.append(squared_error(y.float(), self.teacher(x)).view(1))
        (total,) = sum_over_ranks(errors, self.device)
        trainer.compiled_model.train()
        return {"val_loss": total / (count * self.world)}


def main(argv):
    config = load_config(RegressionConfig, argv)
    memory = f"micro_batch={config.micro_batch} inputs: lower micro_batch (batch_size stays)"
    run_with_progress(train_student, config, memory)


def train_student(config, progress):
    """Train an MLP as config says; every process calls it. progress: runlog.Progress, or Silent."""
    rank, local_rank, world = ranks()
    split_batch(config, world)
    device = choose_device(config.device, local_rank)
    with init_distributed(device, config.timeout, asdict(config)) as watchdog:
        trainer = Trainer(config, TeacherTask(config, device), device, watchdog, progress)
        trainer.run()
    if rank == 0:
        trainer.say_summary()


if __name__ == "__main__":
    as_script(main)
