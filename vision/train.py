"""Train a structured MLP or vision transformer on images: digits, CIFAR, ImageNet, or a folder of class folders.

    python -m vision.train vision/config/quickstart.py
    python -m vision.train vision/config/vit_cifar100.py --d_model=256 --structure=btt --rank=2
    torchrun --standalone --nproc_per_node=8 -m vision.train vision/config/vit_s32_imagenet.py --resume

The run, its log, checkpoints and options are those of the root's train.py. Its Trainer trains an ImageTask, which this
file defines: what a batch is, and what an evaluation is. batch_size is that of all processes together.
"""

import time
from dataclasses import asdict, dataclass, fields
from functools import partial

from configurator import ConfigError, as_script, load_config
from options import RunConfig, at_least
from vision.options import AugmentConfig, DataConfig, ImageConfig, refuse


@dataclass
class ImageTrainConfig(RunConfig, AugmentConfig, DataConfig, ImageConfig):
    out_dir: str = "out/vision"  # where log, picture and checkpoints go
    batch_size: int = 256  # images an update, all processes together
    micro_batch: int = 256  # images a process takes at a time; the rest of its batch is accumulated
    stream: bool | None = None  # decode images as needed; False: all at first, and hold them; None: above 64 pixels
    workers: int | None = None  # processes that decode images; None: one per core
    gpu_decode: bool = False  # streaming: decode JPEGs on the GPU, by torchvision
    eval_resize: int | None = None  # streaming: shorter side before the central crop; None: image_size · 256 / 224
    lr: float = 1e-3  # peak rate, of a dense layer of width base_width; of biases, norms and embeddings
    input_lr: float = 1.0  # rate of the input layer, whose fan-in is the same at all widths, as a share of `lr`
    ema: float = 0.0  # decay of a running mean of the weights, which evaluations use instead of them; 0: none
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
        refuse(self, "images that are streamed have min_crop", self.stream, crop_padding=0, resized_crop=False)
        held = "images that are held are decoded once, before"
        refuse(self, held, not self.stream, gpu_decode=False, eval_resize=None)
        refuse(self, f"{held}; or take resized_crop=True", not (self.stream or self.resized_crop), min_crop=0.08)
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ConfigError(
                f"eval_resize={self.eval_resize} is less than image_size={self.image_size}: take that or more"
            )
        if (self.mixup or self.cutmix) and self.micro_batch % 2:
            raise ConfigError(f"micro_batch={self.micro_batch}: mixup and cutmix mix pairs, so make it even")
        self.check_layers()


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, ImageTrainConfig))

import torch
import torch.nn.functional as F

from engine.agreement import check_data_of_ranks
from engine.device import choose_device
from engine.failures import run_with_progress
from engine.heartbeat import init_distributed
from engine.parallel import ranks, split_batch, sum_over_ranks
from engine.runlog import duration
from optim import lr_multipliers, make_optimizers
from train import Trainer
from vision.augment import Augment
from vision.data import Held, Streamed, workers_watched
from vision.mlp import MLP
from vision.sources import check_labels, open_splits
from vision.vit import ViT

MODELS = {"mlp": MLP, "vit": ViT}


class ImageTask:
    """What a Trainer does not know about a run on images; train.TokenTask documents each attribute and method."""

    unit, loss_unit = "image", "nats per image"
    shape = {field.name for field in fields(ImageConfig)}

    def __init__(self, config, device, data, classes=None, say=lambda text: None):
        """data, classes: from load_images. ConfigError if the batch cannot be divided among the processes."""
        self.config, self.device, self.data, self.say = config, device, data, say
        self.augment = Augment(config, data.mean, data.std, device)
        self.meta = dict(dataset=config.dataset, classes=classes, mean=data.mean, std=data.std, **data.fingerprints)
        self.units = config.batch_size
        self.rank, _, self.world = ranks()
        _, self.micro_steps = split_batch(config, self.world)

    def make_model(self):
        return MODELS[self.config.model](self.config)

    def make_optimizers(self, model):
        optimizers = make_optimizers(model, self.config, image_lr_multipliers(self.config, model))
        if self.config.ema:
            optimizers.keep_average(self.config.ema)
        return optimizers

    def flops(self, model):
        return model.flops()

    def layer_uses(self, model, role):
        return model.layer_uses(role)

    def batch(self, step):
        """This process's share of a batch, from which `prepare` makes x and y: images or their numbers, random numbers."""
        share = self.config.batch_size // self.world
        place = (self.config.batch_size, self.rank * share, (self.rank + 1) * share)
        return *self.data.draw(step, *place), self.augment.draw(step, *place)

    def prepare(self, *batch):
        """What `batch` drew -> images (micro_steps, micro_batch, C, S, S), targets (micro_steps, micro_batch, …).

        This is part of the update, and of its CUDA graph: no shape depends on values, and nothing comes from the host.
        """
        *drawn, numbers = batch
        x, y = self.augment(*self.data.images(*drawn), numbers)
        shape = (self.micro_steps, self.config.micro_batch)
        return x.unflatten(0, shape), y.unflatten(0, shape)

    def evaluate(self, trainer):
        """-> figures on all validation images: val_loss, top1, top5; with `ema`, of the running mean of the weights"""
        with trainer.optimizers.averaged():
            figures = self.validate(trainer.compiled_model, trainer.autocast, trainer.watchdog.beat)
        if self.config.stream and "broken" in figures:
            last = self.data.last_broken or "none"
            self.say(f"{figures['broken']} broken images passed over so far, the last on this rank: {last}")
        return figures

    @torch.no_grad()
    def validate(self, model, autocast, beat):
        """Every rank takes its share of the images; sums and counts are added up."""
        config = self.config
        model.eval()
        sums = []  # of losses, hits, hits among the first 5, images
        for x, y in self.data.val_batches(self.rank, self.world, config.micro_batch):
            beat()
            with autocast:
                logits, _ = model(self.augment.normalise(x))
            logits, counted = logits.float(), y >= 0
            losses = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
            right = y.clamp(min=0)[:, None]
            own, classes = logits.gather(1, right), torch.arange(logits.shape[1], device=self.device)
            better = ((logits > own) | ((logits == own) & (classes < right))).sum(
                dim=1
            )  # number of classes ranked before the right one
            sums.append(torch.stack((losses, *((better < k)[counted].sum() for k in (1, 5)), counted.sum())))
        broken = self.data.broken if config.stream or self.rank == 0 else 0  # every rank reads all held images
        loss, top1, top5, count = sum_over_ranks(sums or [torch.zeros(4)], self.device)
        (broken,) = sum_over_ranks([torch.tensor([float(broken)])], self.device)
        model.train()
        if not count:
            raise ConfigError(f"dataset={config.dataset}: no validation image can be decoded")
        figures = {"val_loss": loss / count, "top1": top1 / count}
        if config.n_classes > 5:
            figures["top5"] = top5 / count
        if broken:
            figures["broken"] = int(broken)
        return figures


def main(argv):
    config = load_config(ImageTrainConfig, argv)
    what = f"micro_batch={config.micro_batch} images of {config.image_size} x {config.image_size}"
    run_with_progress(train_on_images, config, f"{what}: lower micro_batch (batch_size stays)")


def train_on_images(config, progress):
    """Train a model as config says; every process calls it. progress: runlog.Progress, or Silent."""
    rank, local_rank, world = ranks()
    split_batch(config, world)  # a mistake is answered before images are decoded
    device = choose_device(config.device, local_rank)
    with init_distributed(device, config.timeout, asdict(config)) as watchdog:
        if device.type == "cpu" and config.compile == "blocks":
            config.compile = False
            progress.say(
                "compile=blocks is for a GPU: on a CPU compiling delays the first step (--compile=True compiles)"
            )
        with watchdog.paused(), workers_watched():  # decoding may take minutes
            data, classes = load_images(config, device, progress.say)
        task = ImageTask(config, device, data, classes, progress.say)
        trainer = Trainer(config, task, device, watchdog, progress)
        epochs = config.max_steps * config.batch_size / data.n
        progress.say(f"{config.dataset}: {data.n:,} training images, of which the run sees {epochs:,.1f} epochs")
        if device.type == "cpu":
            say_if_long(3 * trainer.model.flops() * config.max_steps * config.batch_size / world, progress.say)
        with workers_watched():
            trainer.run()
    if rank == 0:
        trainer.say_summary()


def load_images(config, device, say):
    """-> images and labels (Held or Streamed), names of the classes or None. ConfigError if the data set does not fit config."""
    splits, classes = open_splits(config, say)
    check_labels(config, splits, classes, say)
    check_data_of_ranks({"classes": classes}, {f"{name} labels": split.labels for name, split in splits.items()})
    data = Streamed(config, splits, device, say) if config.stream else Held(config, splits, device, say)
    return data, classes


def image_lr_multipliers(config, model):
    """As optim.lr_multipliers, except for the input layer, whose fan-in does not grow with width: its rate does not fall."""
    of_name = lr_multipliers(model, config.base_width, config.base_ffn_expansion)
    for name, parameter in model.input.named_parameters(prefix="input"):
        if parameter.dim() >= 2:
            of_name[name] *= model.input.in_features / config.base_width
        of_name[name] *= config.input_lr
    return of_name


def say_if_long(flops, say, hours=1):
    """Report how long at least a run of `flops` FLOPs per process takes on this CPU, if that is more than `hours`."""
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


if __name__ == "__main__":
    as_script(main)
