"""Train a structured MLP or vision transformer on images: digits, CIFAR, ImageNet, or a folder of class folders.

    python -m vision.train vision/config/quickstart.py
    python -m vision.train vision/config/vit_cifar100.py --d_model=256 --structure=btt --rank=2
    torchrun --standalone --nproc_per_node=8 -m vision.train vision/config/vit_s32_imagenet.py --resume

The run, its log, checkpoints and options are those of the root's train.py; this file says what a batch and an
evaluation are. batch_size is that of all processes together.
"""

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial

from configurator import ConfigError, as_script, load_config
from options import RunConfig, at_least
from vision.options import AugmentConfig, DataConfig, ImageConfig, refuse


@dataclass
class Config(RunConfig, AugmentConfig, DataConfig, ImageConfig):
    out_dir: str = "out/vision"  # where log, picture and checkpoints go
    batch_size: int = 256  # images an update, all processes together
    micro_batch: int = 256  # images a process takes at a time; the rest of its batch is accumulated
    stream: bool | None = None  # decode images as needed; False: all at first, and hold them; None: above 64 pixels
    workers: int | None = None  # processes that decode images; None: one a core
    gpu_decode: bool = False  # streaming: JPEGs decoded on the GPU, by torchvision
    eval_resize: int | None = None  # streaming: shorter side before the central crop; None: image_size · 256 / 224
    lr: float = 1e-3  # peak rate, of a dense layer of width base_width; of biases, norms and embeddings
    input_lr: float = 1.0  # rate of the input layer, whose fan-in is the same at all widths, as a share of `lr`
    ema: float = 0.0  # decay of a running mean of the weights, which is evaluated in their place; 0: none
    grad_clip: float = 0.0  # largest norm of the gradient; 0: no limit
    weight_decay: float = 0.0  # of matrices; a step takes lr * weight_decay off them
    beta2: float = 0.999  # Adam's
    min_lr_ratio: float = 0.0  # last rate / peak rate, for cosine and wsd

    def __post_init__(self):
        ImageConfig.__post_init__(self)
        AugmentConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        at_least(1, self, "batch_size")
        at_least(0, self, "input_lr")
        if self.workers is not None:
            at_least(0, self, "workers")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema={self.ema}: make it at least 0 and less than 1, 0.9999 say")
        if self.stream is None:
            self.stream = self.image_size > 64
        refuse(self, "images that are streamed have min_crop", self.stream, crop_padding=0)
        refuse(
            self, "images that are held are decoded once, before", not self.stream, gpu_decode=False, eval_resize=None,
            min_crop=0.08,
        )  # fmt: skip
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ConfigError(
                f"eval_resize={self.eval_resize} is less than image_size={self.image_size}: take that or more"
            )
        if (self.mixup or self.cutmix) and self.micro_batch % 2:
            raise ConfigError(f"micro_batch={self.micro_batch}: mixup and cutmix mix pairs, so make it even")
        self.check_layers()


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, Config))

import torch
import torch.nn.functional as F

from engine.device import choose_device, choose_dtype
from engine.heartbeat import init_distributed
from engine.parallel import ranks, sum_over_ranks
from engine.runlog import duration
from optim import lr_multipliers
from train import Task, build, fit, in_one_line, say_summary
from vision.augment import Augment
from vision.data import Held, Streamed, check_labels, open_splits, workers_watched
from vision.mlp import MLP
from vision.vit import ViT

MODELS = {"mlp": MLP, "vit": ViT}


def main(argv):
    config = load_config(Config, argv)
    what = f"micro_batch={config.micro_batch} images of {config.image_size} x {config.image_size}"
    in_one_line(train, config, f"{what}: lower micro_batch (batch_size stays)")


def train(config, progress):
    rank, local_rank, world = ranks()
    micro_steps = split_batch(config, world)
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    watchdog = init_distributed(device, config.timeout)
    if device.type == "cpu" and config.compile == "blocks":
        config.compile = False
        progress.say("compile=blocks is for a GPU: on a CPU compiling delays the first step (--compile=True compiles)")
    with watchdog.paused(), workers_watched():  # decoding may take minutes
        data, classes = load_images(config, device, progress.say)
    augment, batch, run = start(config, data, device, dtype, micro_steps, watchdog.beat)

    def validate():
        with averaged(run.optimizer) if config.ema else nullcontext():
            figures = evaluate(run, data, augment, config, device, rank, world, watchdog.beat)
        if config.stream and "broken" in figures:
            progress.say(
                f"{figures['broken']} broken images passed over so far, the last here {data.last_broken or 'none'}"
            )
        return figures

    task = Task(
        batch, validate, dict(dataset=config.dataset, classes=classes, mean=data.mean, std=data.std), unit="image",
        units=config.batch_size, flops=run.model.flops(), shape={field.name for field in fields(ImageConfig)},
        passes=run.model.passes, loss="nats per image",
    )  # fmt: skip
    epochs = config.max_steps * config.batch_size / data.n
    progress.say(f"{config.dataset}: {data.n:,} training images, of which the run sees {epochs:,.1f} epochs")
    if device.type == "cpu":
        say_if_long(3 * run.model.flops() * config.max_steps * config.batch_size / world, progress.say)
    with workers_watched():
        fit(config, progress, run, task, device, dtype, watchdog, micro_steps)
    if rank == 0:
        say_summary(config, progress, device)


def say_if_long(flops, say, hours=1):
    """On a CPU: how long a run of so many FLOPs a process takes at least, if that is more than so many hours."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    a @ b
    begin, products = time.perf_counter(), 20
    for _ in range(products):
        a @ b
    speed = products * 2 * 512**3 / (time.perf_counter() - begin)
    if flops / speed > 3600 * hours:
        say(
            f"note: on this CPU the run takes at least {duration(flops / speed)} ({flops:.1e} FLOPs at {speed / 1e9:.0f} GFLOP/s): "
            "lower d_model, n_layer or max_steps, or take a GPU"
        )


def start(config, data, device, dtype, micro_steps, beat=lambda: None):
    """What an update takes -> augment, batch(step): the arguments of run.update, run."""
    rank, _, world = ranks()
    augment = Augment(config, data.mean, data.std, device)
    share, shape = config.batch_size // world, (micro_steps, config.micro_batch)

    def batch(step):
        """This process's share: which images, or their pixels, and random numbers; `prepare` makes x and y of them."""
        place = (config.batch_size, rank * share, (rank + 1) * share)
        return *data.draw(step, *place), augment.draw(step, *place)

    run = build(
        config, device, dtype, world, beat, MODELS[config.model], partial(multipliers, config), micro_steps,
        partial(prepare, data, augment, shape),
    )  # fmt: skip
    if config.ema:
        keep_average(run.optimizer, config.ema)
    return augment, batch, run


def load_images(config, device, say):
    """-> images and labels (Held or Streamed), names of the classes or None"""
    splits, classes = open_splits(config, say)
    check_labels(config, splits, classes, say)
    data = Streamed(config, splits, device) if config.stream else Held(config, splits, device, say)
    return data, classes


def prepare(data, augment, shape, *batch):
    """What was drawn for a batch -> images (*shape, C, S, S), targets (*shape, …); shape: (micro_steps, micro_batch).

    It is a part of the update, and of its CUDA graph: no shape depends on values, and nothing comes from the host.
    """
    *drawn, numbers = batch
    x, y = augment(*data.images(*drawn), numbers)
    return x.unflatten(0, shape), y.unflatten(0, shape)


def split_batch(config, world):
    """-> micro-steps; ConfigError where batch_size does not divide."""
    unit = config.micro_batch * world
    if config.batch_size % unit:
        remedies = [f"batch_size={max(1, round(config.batch_size / unit)) * unit}"]
        share, rest = divmod(config.batch_size, world)
        micro_batch = math.gcd(share, config.micro_batch)
        pairs = getattr(config, "mixup", 0) or getattr(config, "cutmix", 0)  # of which a micro-batch has whole ones
        if not (rest or (pairs and micro_batch % 2)):
            remedies.insert(0, f"micro_batch={micro_batch}")
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by micro_batch {config.micro_batch} x {world} processes = "
            f"{unit}: take {', or '.join(remedies)}"
        )
    return config.batch_size // unit


def multipliers(config, model):
    """optim.lr_multipliers, but for the input layer: its fan-in does not grow with the width, so its rate does not fall."""
    of_name = lr_multipliers(model, config.base_width, config.base_ffn_expansion)
    for name, parameter in model.input.named_parameters(prefix="input"):
        if parameter.dim() >= 2:
            of_name[name] *= model.input.in_features / config.base_width
        of_name[name] *= config.input_lr
    return of_name


def keep_average(optimizer, decay):
    """Have every step of the optimizer update a running mean of the weights, kept with Adam's state, and so in checkpoints."""

    def update(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if "ema" not in optimizer.state[p]:
                optimizer.state[p]["ema"] = p.detach().clone()
        means = [optimizer.state[p]["ema"] for p in parameters]
        torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - decay)

    optimizer.register_step_post_hook(update)


@contextmanager
@torch.no_grad()
def averaged(optimizer):
    """In this block the weights are their running means."""
    parameters = [p for p, state in optimizer.state.items() if "ema" in state]
    now = [p.clone() for p in parameters]
    try:
        for p in parameters:
            p.copy_(optimizer.state[p]["ema"])
        yield
    finally:
        for p, weight in zip(parameters, now):
            p.copy_(weight)


@torch.no_grad()
def evaluate(run, data, augment, config, device, rank, world, beat=lambda: None):
    """Figures of all validation images: val_loss, top1, top5; every rank takes its share, sums and counts are added up."""
    run.fast.eval()
    sums = []  # of the losses, right ones, right among 5, number
    for x, y in data.val_batches(rank, world, config.micro_batch):
        beat()
        with run.autocast:
            logits, _ = run.fast(augment.normalise(x))
        logits, counted = logits.float(), y >= 0
        losses = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
        right = y.clamp(min=0)[:, None]
        own, classes = logits.gather(1, right), torch.arange(logits.shape[1], device=device)
        better = ((logits > own) | ((logits == own) & (classes < right))).sum(dim=1)  # classes before the right one
        sums.append(torch.stack((losses, *((better < k)[counted].sum() for k in (1, 5)), counted.sum())))
    broken = data.broken if config.stream or rank == 0 else 0  # held ones are read by every rank
    loss, top1, top5, count = sum_over_ranks(sums or [torch.zeros(4)], device)
    (broken,) = sum_over_ranks([torch.tensor([float(broken)])], device)
    run.fast.train()
    if not count:
        raise ConfigError(f"dataset={config.dataset}: no validation image can be decoded")
    figures = {"val_loss": loss / count, "top1": top1 / count}
    if config.n_classes > 5:
        figures["top5"] = top5 / count
    if broken:
        figures["broken"] = int(broken)
    return figures


if __name__ == "__main__":
    as_script(main)
