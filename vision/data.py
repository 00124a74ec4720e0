"""Images and labels: scikit-learn's digits, the Hugging Face hub, parquet files, or a folder of class folders.

Small images are decoded once and held on the device as uint8; large ones are decoded in worker processes as they are
needed. Which images a step sees, and how each is cropped, is a function of (seed, step), whatever the number of processes:
epochs are permutations, one behind the other, and a batch is a stretch of them, of which each process takes its share.

As a command it makes images into token files for next-pixel prediction, which the GPT of the root's train.py learns:

    python vision/data.py --dataset=cifar10                          # 8x8x3 pixels -> data/cifar10_pixels
    python train.py vision/config/pixels.py

Shapes: n images, B of a batch, S = image_size, C channels. Imports from the root's configurator and device.
"""

import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

if __name__ == "__main__":  # `vision` and the root's modules are found from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from configurator import ConfigError, as_script, load_config
from device import to_device
from vision.options import DataConfig

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
IMAGE_FIELDS, LABEL_FIELDS = ("img", "image"), ("label", "fine_label")
VAL_NAMES = ("val", "validation", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")

# What a random number is for: with the seed and a number, all that its generator is made of.
ORDER, CROP, FLIP, MIX, ERASE, OPERATIONS = range(6)


def rng(seed, purpose, number):
    return np.random.default_rng([seed, purpose, number])


# ---------------------------------------------------------------------------------------
# Where images lie


class Split(NamedTuple):
    """The images of one split, not yet decoded."""

    labels: np.ndarray  # (n,) int64
    read: Callable  # i -> bytes of a JPEG or PNG file, or uint8 (H, W)
    name: Callable  # i -> what to call it in a message


def open_splits(config):
    """-> {"train": Split, "val": Split}, names of the classes or None"""
    if config.dataset == "digits" and config.data_dir is None:
        return digits()
    if config.data_dir is None:
        return hub(config)
    if not os.path.isdir(config.data_dir):
        raise ConfigError(f"data_dir={config.data_dir} is no folder: give one, or leave it out to use the hub")
    if os.path.isdir(os.path.join(config.data_dir, "train")) and not parquet_files(config)["train"]:
        return class_folders(config.data_dir)
    return parquet(config)


def digits():
    """1797 grey images of 8 x 8, 17 levels; every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "dataset=digits comes with scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 4
    splits = {}
    for split, chosen in (("train", ~held_out), ("val", held_out)):
        pixels = images[chosen]
        splits[split] = Split(labels[chosen].astype(np.int64), pixels.__getitem__, lambda i: f"digit {i}")
    return splits, [str(digit) for digit in range(10)]


def class_folders(root):
    """root/train/CLASS/* and root/val/CLASS/*: a class is a folder, its label that of its name in alphabetical order."""
    val = next((name for name in VAL_NAMES if os.path.isdir(os.path.join(root, name))), None)
    if val is None:
        raise ConfigError(f"data_dir={root} has train/ but no val/: put the validation images in val/CLASS/")
    splits, classes = {}, None
    for split, folder in (("train", os.path.join(root, "train")), ("val", os.path.join(root, val))):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        names = [entry.name for entry in entries if entry.is_dir()]
        if not names:
            loose = sum(entry.name.lower().endswith(ENDINGS) for entry in entries)
            raise ConfigError(f"{folder} has {loose} images and no folder a class: put them in {folder}/CLASS/")
        classes = classes or names
        if names != classes:
            one = min(set(names) ^ set(classes))
            other = "train" if one in names else val
            raise ConfigError(f"class {one!r} is missing in {root}/{other}: each needs a folder a class, the same ones")
        files, labels = [], []
        for label, name in enumerate(names):
            found = sorted(e.path for e in os.scandir(os.path.join(folder, name)) if e.name.lower().endswith(ENDINGS))
            if not found:
                raise ConfigError(f"{folder}/{name} holds no image ({' '.join(ENDINGS)}): fill it, or remove the class")
            files += found
            labels += [label] * len(found)
        splits[split] = Split(np.array(labels), Files(files), files.__getitem__)
    return splits, classes


class Files(list):
    def __call__(self, i):
        with open(self[i], "rb") as file:
            return file.read()


def hub(config):
    import datasets

    name = HUB.get(config.dataset, config.dataset)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the network layer raises
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"dataset={config.dataset}: {name} could not be loaded from the hub ({type(error).__name__}: {reason}): see to "
            "name, network and login, or give --data_dir with a local copy"
        ) from None
    return columns(config, found, name)


def parquet_files(config):
    """{"train": paths, "val": paths} under data_dir; where some carry the data set's name, these only."""
    paths = [os.path.join(top, name) for top, _, names in os.walk(config.data_dir) for name in sorted(names)]
    paths = [path for path in sorted(paths) if path.endswith(".parquet")]
    paths = [path for path in paths if config.dataset in os.path.basename(path)] or paths
    inside = {path: os.path.relpath(path, config.data_dir) for path in paths}
    return {
        "train": [path for path in paths if "train" in inside[path]],
        "val": [path for path in paths if "train" not in inside[path] and any(n in inside[path] for n in VAL_NAMES)],
    }


def parquet(config):
    import datasets

    files = parquet_files(config)
    for split, wanted in (("train", "*train*.parquet"), ("val", "*test*.parquet")):
        if not files[split]:
            raise ConfigError(
                f"data_dir={config.data_dir} holds neither train/ and val/ with a folder a class, nor {wanted}: see README"
            )
    try:
        found = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ConfigError(f"data_dir={config.data_dir}: its parquet files cannot be read ({reason})") from None
    return columns(config, found, config.data_dir)


def columns(config, found, where):
    """Splits of a datasets.DatasetDict."""
    import datasets

    if "train" not in found or not any(name in found for name in VAL_NAMES):
        raise ConfigError(
            f"{where} has the splits {', '.join(found)}: train, and one of {', '.join(VAL_NAMES)}, are needed"
        )
    splits, classes = {}, None
    for split in ("train", "val"):
        data = found["train"] if split == "train" else next(found[name] for name in VAL_NAMES if name in found)
        image = field("image_field", config.image_field, IMAGE_FIELDS, data.column_names, where)
        label = field("label_field", config.label_field, LABEL_FIELDS, data.column_names, where)
        classes = getattr(data.features[label], "names", None) or classes
        try:
            labels = np.array(data.with_format("numpy")[label][:]).astype(np.int64, casting="safe")
        except (TypeError, ValueError):
            raise ConfigError(f"label_field={label}: {where} has no whole numbers there: give another column") from None
        images = data.select_columns(image)
        try:
            images = images.cast_column(image, datasets.Image(decode=False))
        except Exception:
            raise ConfigError(f"image_field={image}: {where} has no images there: give another column") from None

        def read(i, images=images, image=image):
            cell = images[int(i)][image]
            return cell["bytes"] or open(cell["path"], "rb").read()

        splits[split] = Split(labels, read, lambda i, split=split: f"image {i} of {where}, {split}")
    return splits, classes


def field(option, given, known, names, where):
    found = given or next((name for name in known if name in names), None)
    if found not in names:
        raise ConfigError(f"{option}={given}: {where} has the columns {', '.join(names)}: give one of these")
    return found


def check_labels(config, splits, classes, say=lambda text: None):
    """ConfigError where labels do not fit n_classes, or validation lacks a class."""
    for split, data in splits.items():
        if not len(data.labels):
            raise ConfigError(f"dataset={config.dataset}: no images in its {split} split")
        if data.labels.min() < 0:
            raise ConfigError(
                f"dataset={config.dataset}: label {data.labels.min()} in {split} is out of range: from 0 on"
            )
    count = max(1 + int(splits["train"].labels.max()), 1 + int(splits["val"].labels.max()), len(classes or ()))
    if count > config.n_classes:
        raise ConfigError(
            f"n_classes={config.n_classes}, but {config.dataset} has labels up to {count - 1}: take {count}"
        )
    if count < config.n_classes:
        say(f"note: n_classes={config.n_classes}, but {config.dataset} has labels up to {count - 1}")
    missing = sorted(set(splits["train"].labels.tolist()) - set(splits["val"].labels.tolist()))
    if missing:
        names = ", ".join(str(classes[label] if classes else label) for label in missing[:5])
        raise ConfigError(f"dataset={config.dataset}: {len(missing)} classes are missing in validation: {names}")


# ---------------------------------------------------------------------------------------
# One image


def decode(raw, channels):
    """A file's bytes, or a uint8 array -> PIL image, RGB or grey whatever it was. Exceptions of many kinds."""
    image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(io.BytesIO(raw))
    return image.convert("L" if channels == 1 else "RGB")


def to_square(image, resize, size):
    """Shorter side to `resize` pixels, then the central size x size of it."""
    if min(image.size) != resize:
        scale = resize / min(image.size)
        image = image.resize([max(resize, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def random_box(draw, width, height, min_crop):
    """left, top, right, bottom of a crop of min_crop to all of the area, and of ratio 3/4 to 4/3 (Szegedy et al., 2015)."""
    for _ in range(10):
        area = width * height * draw.uniform(min_crop, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def pixels(image):
    """PIL image -> uint8 (C, H, W)"""
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


# ---------------------------------------------------------------------------------------
# Batches


class Order:
    """Epochs one behind the other: position in training -> image."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epochs = n, seed, {}

    def stretch(self, first, count):
        """Images at positions first … first + count."""
        parts = []
        while count > 0:
            epoch, begin = divmod(first, self.n)
            parts.append(self.epoch(epoch)[begin : begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, number):
        if number not in self.epochs:
            self.epochs = {key: value for key, value in self.epochs.items() if key == number - 1}  # no more than two
            self.epochs[number] = rng(self.seed, ORDER, number).permutation(self.n)
        return self.epochs[number]


PIECE = 64  # images that a worker decodes at a time: a whole share would be late at first, and take much memory ahead

WORTH_A_WORKER = 2048  # held images, below which decoding them takes no longer than starting one


def decoders(config):
    """Processes that decode images for this one: config.workers, or its share of the cores.

    They are forked, for a Split cannot be sent to a new process. Where forking is not safe (macOS) there are none by default.
    """
    if config.workers is not None:
        return config.workers
    if sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Held:
    """All images on the device, uint8; the training images in a black frame, so that a random crop is one lookup."""

    def __init__(self, config, splits, device, say=lambda text: None):
        self.config, self.device, self.broken, self.last_broken = config, device, 0, ""
        (train, labels), (val, val_labels) = (self.load(splits[split], say) for split in ("train", "val"))
        self.n = len(train)
        self.order = Order(self.n, config.seed)
        of_channel = train.float().flatten(2).transpose(0, 1).flatten(1) / 255  # (C, n S²)
        self.mean, self.std = of_channel.mean(dim=1).tolist(), of_channel.std(dim=1).clamp(min=1e-3).tolist()
        self.train = F.pad(train, [config.crop_padding] * 4).to(device)
        self.val, self.val_labels, self.labels = val.to(device), val_labels.to(device), labels.to(device)
        C, S = config.channels, config.image_size
        self.channel = torch.arange(C, device=device).view(1, C, 1, 1)
        self.along = torch.arange(S, device=device)

    def load(self, split, say):
        """Decode a whole split -> uint8 (n, C, S, S), labels (n,) int64. Broken images are left out, with a count."""
        S, n, images, kept, sizes = self.config.image_size, len(split.labels), [], [], {}
        workers = min(decoders(self.config), n // WORTH_A_WORKER)
        pieces = data_loader(Decoded(self.config, split), workers, batch_size=PIECE, collate_fn=list)
        for i, (size, image) in enumerate(itertools.chain.from_iterable(pieces)):
            if image is None:
                self.broken, self.last_broken = self.broken + 1, split.name(i)
                continue
            sizes[size] = sizes.get(size, 0) + 1
            images.append(image)
            kept.append(i)
        if not kept:
            raise ConfigError(f"dataset={self.config.dataset}: no image of {n} can be decoded")
        if len(kept) < n:
            say(f"{n - len(kept)} broken images left out, the last: {self.last_broken}")
        others = len(kept) - sizes.get((S, S), 0)
        if others:
            say(f"{others:,} images of other sizes ({max(sizes, key=sizes.get)}, …) made {S} x {S}")
        return torch.from_numpy(np.stack(images)), torch.from_numpy(split.labels[kept])

    def draw(self, step, rows, start, stop):
        """Images start … stop of the batch of `step`, which has `rows` in all -> what `images` makes them of, a tuple.

        It is one tensor (B, 4) int64 on the device: image, top and left of the crop, 1 where it is flipped.
        """
        seed, config = self.config.seed, self.config
        shifts = rng(seed, CROP, step).integers(2 * config.crop_padding + 1, size=(rows, 2))
        flips = rng(seed, FLIP, step).integers(2, size=(rows, 1)) * config.flip
        chosen = self.order.stretch(step * rows, rows)
        table = torch.from_numpy(np.concatenate((chosen[:, None], shifts, flips), axis=1)[start:stop])
        return (to_device(table, self.device),)

    def images(self, table):
        """What was drawn -> float (B, C, S, S) of 0 … 255, labels (B,), all on the device. It never waits for it."""
        i, top, left, flip = table.unbind(1)  # (B,) each
        y = top[:, None] + self.along  # (B, S)
        x = left[:, None] + torch.where(flip[:, None] == 1, self.along.flip(0), self.along)
        images = self.train[i[:, None, None, None], self.channel, y[:, None, :, None], x[:, None, None, :]]
        return images.float(), self.labels[i]

    def val_batches(self, rank, world, size):
        """This rank's share of validation, in batches of `size`, equally many on every rank; filled up with label -1."""
        n = len(self.val)
        for first in range(0, -(-n // world), size):
            rows = torch.arange(rank + first * world, rank + (first + size) * world, world, device=self.device)
            inside = rows < n
            rows = rows.clamp(max=n - 1)
            yield self.val[rows].float(), torch.where(inside, self.val_labels[rows], -1)


class Decoded(torch.utils.data.Dataset):
    """i -> size of the image, pixels uint8 (C, S, S); None, None of a broken one."""

    def __init__(self, config, split):
        self.config, self.split = config, split

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, i):
        S = self.config.image_size
        try:
            image = decode(self.split.read(i), self.config.channels)
        except Exception:  # what decoders raise has no common kind
            return None, None
        return image.size, pixels(to_square(image, S, S))


def data_loader(images, workers, **how):
    """A DataLoader of images that `workers` processes decode."""
    fork = "fork" if workers else None
    return torch.utils.data.DataLoader(
        images, num_workers=workers, worker_init_fn=leave_signals, multiprocessing_context=fork, **how
    )


class Streamed:
    """Images decoded as they are needed, in worker processes, ahead of the trainer.

    A training image that is broken gives its place to the next of its data set, a broken one of validation is left out.
    """

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's training images

    def __init__(self, config, splits, device):
        self.config, self.splits, self.device = config, splits, device
        self.n, self.broken, self.last_broken = len(splits["train"].labels), 0, ""
        self.order, self.next_step, self.pieces = Order(self.n, config.seed), None, None
        if config.channels == 1:
            self.mean, self.std = [0.449], [0.226]
        if config.gpu_decode and importlib.util.find_spec("torchvision") is None:
            raise ConfigError(
                "gpu_decode=True needs torchvision, which is missing: pip install torchvision, or leave it out"
            )
        self.workers = decoders(config)

    def loader(self, split, keys):
        """keys: lists of (position, image) -> iterator over them of uint8 (B, C, S, S), labels (B,), on the device."""
        loader = data_loader(
            Images(self.config, self.splits[split], split == "train"), self.workers, batch_sampler=keys,
            collate_fn=collate, prefetch_factor=4 if self.workers else None,
        )  # fmt: skip
        for images, labels, boxes, broken in loader:
            if broken:
                self.broken, self.last_broken = self.broken + len(broken), broken[-1]
            if split == "train" and (labels < 0).any():
                raise ConfigError(
                    f"dataset={self.config.dataset}: {TRIES} broken files one behind the other: {broken[-1]}"
                )
            if self.config.gpu_decode:
                images, torn = decode_on(self.device, images.split([box[-1] for box in boxes]), boxes, self.config)
                self.broken += len(torn)
                if split == "val":
                    labels[torn] = -1
            else:
                images = to_device(images, self.device)
            yield images, to_device(labels, self.device)

    def draw(self, step, rows, start, stop):
        """As Held.draw: pixels (B, C, S, S) uint8, labels (B,), and with `flip` (B,) int64, 1 where one is flipped."""
        if step != self.next_step:  # the first, or where a resumed run goes on
            self.pieces = self.loader("train", Stretches(self.order, step, rows, start, stop))
        self.next_step = step + 1
        pieces = [next(self.pieces) for _ in Stretches.pieces(start, stop)]
        drawn = [torch.cat(tensors) for tensors in zip(*pieces)]
        if self.config.flip:
            flips = torch.from_numpy(rng(self.config.seed, FLIP, step).integers(2, size=rows)[start:stop])
            drawn.append(to_device(flips, self.device))
        return tuple(drawn)

    def images(self, images, labels, flips=None):
        """As Held.images."""
        if flips is not None:
            images = torch.where(flips.view(-1, 1, 1, 1) == 1, images.flip(3), images)
        return images.float(), labels

    def val_batches(self, rank, world, size):
        n = len(self.splits["val"].labels)
        keys = []
        for first in range(0, -(-n // world), size):
            rows = range(rank + first * world, rank + (first + size) * world, world)
            keys.append([(row, row if row < n else -1) for row in rows])
        return ((images.float(), labels) for images, labels in self.loader("val", keys))


class Stretches:
    """Sampler of one process's share of each training batch, from `step` on, without an end, PIECE images at a time."""

    def __init__(self, order, step, rows, start, stop):
        self.order, self.step, self.rows, self.start, self.stop = order, step, rows, start, stop

    def __iter__(self):
        for step in itertools.count(self.step):
            for begin, end in self.pieces(self.start, self.stop):
                first, count = step * self.rows + begin, end - begin
                yield list(zip(range(first, first + count), self.order.stretch(first, count).tolist()))

    @staticmethod
    def pieces(start, stop):
        return [(begin, min(begin + PIECE, stop)) for begin in range(start, stop, PIECE)]


TRIES = 100  # broken files one behind the other, after which a run ends


class Images(torch.utils.data.Dataset):
    """(position in training, image) -> pixels uint8 (C, S, S), label, crop, names of broken files met.

    With gpu_decode the file's bytes, uint8 (bytes,), where the pixels are, and the crop as left, top, right, bottom, bytes.
    """

    def __init__(self, config, split, training):
        self.config, self.split, self.training = config, split, training

    def __getitem__(self, key):
        position, i = key
        config, n, broken = self.config, len(self.split.labels), []
        S = config.image_size
        blank = np.zeros((config.channels, S, S), dtype=np.uint8)
        while i >= 0 and len(broken) < TRIES:
            try:
                raw = self.split.read(i)
                if config.gpu_decode:
                    box = (*self.box(Image.open(io.BytesIO(raw)), position), len(raw))
                    return np.frombuffer(raw, np.uint8), int(self.split.labels[i]), box, broken
                image = Image.open(io.BytesIO(raw))
                box = self.box(image, position)
                if image.format == "JPEG":  # at an eighth, a quarter or a half, where that is enough
                    whole = image.size
                    need = S * whole[0] / (box[2] - box[0]), S * whole[1] / (box[3] - box[1])
                    image.draft(None, (math.ceil(need[0]), math.ceil(need[1])))
                    box = tuple(b * image.size[k % 2] / whole[k % 2] for k, b in enumerate(box))
                image = image.convert("L" if config.channels == 1 else "RGB")
                image = image.resize((S, S), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
                return pixels(image), int(self.split.labels[i]), box, broken
            except Exception as error:  # what decoders raise has no common kind
                broken.append(f"{self.split.name(i)} ({error})".partition("\n")[0])
                i = (i + 1) % n if self.training else -1
        return np.zeros(0, np.uint8) if config.gpu_decode else blank, -1, (0, 0, 0, 0, 0), broken

    def box(self, image, position):
        """The part of an image that is wanted: random in training, else the centre."""
        width, height = image.size
        if self.training:
            return random_box(rng(self.config.seed, CROP, position), width, height, self.config.min_crop)
        S = self.config.image_size
        side = min(width, height) * S / (self.config.eval_resize or round(S * 256 / 224))
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def collate(items):
    """Of a list of Images' items: one tensor of all pixels (B, C, S, S), or of all bytes, as workers send them best; the rest."""
    images, labels, boxes, broken = zip(*items)
    images = torch.from_numpy(np.stack(images) if images[0].ndim == 3 else np.concatenate(images))
    return images, torch.tensor(labels), boxes, [name for names in broken for name in names]


def decode_on(device, files, boxes, config):
    """Files' bytes -> uint8 (B, C, S, S): JPEGs decoded on the GPU by torchvision, what it cannot by PIL on the host.

    Also a list of those that are torn behind their headers, and black.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    S, mode = config.image_size, ImageReadMode.GRAY if config.channels == 1 else ImageReadMode.RGB
    jpeg = [k for k, file in enumerate(files) if bytes(file[:2].tolist()) == b"\xff\xd8"]
    decoded, torn = {}, []
    with suppress(RuntimeError):  # one that it cannot decode, such as a CMYK image: all by the host
        decoded = dict(zip(jpeg, decode_jpeg([files[k] for k in jpeg], mode=mode, device=device)))
    out = torch.zeros(len(files), config.channels, S, S, dtype=torch.uint8, device=device)
    for k, (file, box) in enumerate(zip(files, boxes)):
        if not len(file):
            continue
        image = decoded.get(k)
        if image is None:
            try:
                image = torch.from_numpy(pixels(decode(file.numpy().tobytes(), config.channels))).to(device)
            except Exception:  # what decoders raise has no common kind
                torn.append(k)
                continue
        left, top, right, bottom, _ = (round(b) for b in box)
        part = image[None, :, top:bottom, left:right].float()
        out[k] = F.interpolate(part, (S, S), mode="bilinear", antialias=True)[0].round().clamp(0, 255)
    return out, torn


@contextmanager
def workers_watched():
    """A worker that dies makes torch's handler of SIGCHLD raise wherever the main thread is: in this block, one line."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or it goes on, in the middle of the end
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"a process that decodes images ended ({reason}): fewer --workers take less memory") from None


def leave_signals(worker):
    """Ctrl-C is the trainer's, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------
# Next-pixel prediction: images as tokens


@dataclass
class PixelsConfig(DataConfig):
    dataset: str = "cifar10"  # as in vision/train.py; with data_dir also a folder of .npz files with X (CIFAR-5M's)
    image_size: int = 8  # pixels a side, to which images are shrunk
    out_dir: str | None = None  # None: data/DATASET_pixels

    def __post_init__(self):
        self.out_dir = self.out_dir or os.path.join("data", f"{os.path.basename(self.dataset)}_pixels")
        if self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size}: make it at least 1")


def write_pixels(config):
    """Write train.bin, val.bin and meta.json as data.TokenData reads them.

    An image is image_size² · 3 + 1 tokens: a zero, where it starts, then its pixels, row by row, red green blue.
    meta.json has the length as row_tokens, so that every sequence of the GPT is one image: block_size is one less.
    """
    from tqdm import tqdm

    os.makedirs(config.out_dir, exist_ok=True)
    S, counts, broken = config.image_size, {}, 0
    for split, (total, images) in image_streams(config).items():
        path, written = os.path.join(config.out_dir, f"{split}.bin"), 0
        with open(path + ".part", "wb") as file:
            for image in tqdm(images, total=total, desc=split, disable=not sys.stderr.isatty()):
                if image is None:
                    broken += 1
                    continue
                image = image if image.size == (S, S) else to_square(image, min(image.size), min(image.size))
                image = image.resize((S, S), Image.Resampling.BOX)
                file.write(b"\0" + np.asarray(image).tobytes())
                written += 1
        if not written:
            raise ConfigError(f"dataset={config.dataset}: no image in its {split} split")
        counts[split] = written
    row = 3 * S * S + 1
    meta = {
        "tokenizer": "pixels", "vocab_size": 256, "dtype": "uint8", "row_tokens": row, "image_size": S,
        "source": config.dataset, **{f"{split}_tokens": count * row for split, count in counts.items()},
    }  # fmt: skip
    with open(os.path.join(config.out_dir, "meta.json.part"), "w") as file:
        json.dump(meta, file, indent=1)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(*(os.path.join(config.out_dir, name + ending) for ending in (".part", "")))
    skipped = f", {broken} broken ones left out" if broken else ""
    print(f"{config.out_dir}: {counts['train']:,} and {counts['val']:,} images of {row - 1} tokens{skipped}")
    return meta


def image_streams(config):
    """{split: (number, iterator of PIL images, None for a broken one)}"""
    npz = (
        sorted(n for n in os.listdir(config.data_dir) if n.endswith(".npz"))
        if os.path.isdir(config.data_dir or "")
        else []
    )
    if npz:
        if len(npz) == 1:
            raise ConfigError(f"data_dir={config.data_dir} has one .npz: two are needed, the last is for validation")

        def of_parts(names):
            for name in names:
                with np.load(os.path.join(config.data_dir, name)) as part:
                    if "X" not in part:
                        raise ConfigError(f"{config.data_dir}/{name} has no X: uint8 (n, H, W, 3) is wanted")
                    yield from map(Image.fromarray, part["X"])

        return {"train": (None, of_parts(npz[:-1])), "val": (None, of_parts(npz[-1:]))}
    splits, _ = open_splits(config)

    def of_split(split):
        for i in range(len(split.labels)):
            try:
                yield decode(split.read(i), 3)
            except Exception:
                yield None

    return {name: (len(split.labels), of_split(split)) for name, split in splits.items()}


if __name__ == "__main__":
    as_script(lambda words: write_pixels(load_config(PixelsConfig, words)))
