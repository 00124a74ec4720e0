"""Images and labels: scikit-learn's digits, the Hugging Face hub, parquet files, or a folder of class folders.

Small images are decoded once and held on the device as uint8; large ones are decoded in worker processes as they are
needed. Which images a step sees, and how each is cropped, is a function of (seed, step), whatever the number of processes:
epochs are permutations, one behind the other, and a batch is a stretch of them, of which each process takes its share.

As a command it makes images into token files for next-pixel prediction, which the GPT of the root's train.py learns:

    python -m vision.data --dataset=cifar10                          # 8x8x3 pixels -> data/cifar10_pixels
    python train.py vision/config/pixels.py

Shapes: n images, B of a batch, S = image_size, C channels.
"""

import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from configurator import ConfigError, as_script, load_config
from vision.options import DataConfig


@dataclass
class PixelsConfig(DataConfig):
    dataset: str = "cifar10"  # as in vision/train.py; with data_dir also a folder of .npz files with X (CIFAR-5M's)
    image_size: int = 8  # pixels a side, to which images are shrunk
    out_dir: str | None = None  # None: data/DATASET_pixels

    def __post_init__(self):
        self.out_dir = self.out_dir or os.path.join("data", f"{os.path.basename(self.dataset)}_pixels")
        if self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size}: make it at least 1")


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, PixelsConfig))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from engine.device import to_device

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
IMAGE_FIELDS, LABEL_FIELDS = ("img", "image"), ("label", "fine_label")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that exists, and has labels, is for validation
SPLIT_WORDS = {name: name for name in ("train", *VAL_NAMES)} | {"training": "train", "testing": "test"}
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

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


def open_splits(config, say=lambda text: None):
    """-> {"train": Split, "val": Split}, names of the classes or None. `say` is told what each split is made of."""
    if config.dataset == "digits" and config.data_dir is None:
        return digits()
    if config.data_dir is None:
        return hub(config, say)
    if not os.path.isdir(config.data_dir):
        raise ConfigError(f"data_dir={config.data_dir} is no folder: give one, or leave it out to use the hub")
    if os.path.isdir(os.path.join(config.data_dir, "train")) and "train" not in parquet_files(config):
        try:
            return class_folders(config.data_dir, say)
        except OSError as error:
            raise ConfigError(f"data_dir={config.data_dir}: {error.filename}: {error.strerror}") from None
    return parquet(config, say)


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


def class_folders(root, say):
    """root/train/CLASS/… and root/val/CLASS/…: a class is a folder of train or val, with all folders inside it.

    Its label is that of its name in alphabetical order. Names that start with a dot are ignored.
    """
    val = next((name for name in VAL_NAMES if os.path.isdir(os.path.join(root, name))), None)
    if val is None:
        raise ConfigError(f"data_dir={root} has train/ but no val/: put the validation images in val/CLASS/")
    folders = {"train": os.path.join(root, "train"), "val": os.path.join(root, val)}
    names, splits = {}, {}
    for split, folder in folders.items():
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        names[split] = {entry.name for entry in entries if entry.is_dir()}
        loose = sum(is_image(entry.name) for entry in entries)
        if not names[split]:
            raise ConfigError(f"{folder} has {loose} images and no folder a class: put them in {folder}/CLASS/")
        if loose:
            say(f"note: images of {folder} that are in no class folder, and so not read: {loose}")
    classes = sorted(names["train"] | names["val"])
    for split, folder in folders.items():
        files, labels = [], []
        for label, name in enumerate(classes):
            found = image_files(os.path.join(folder, name))
            files += found
            labels += [label] * len(found)
        if not files:
            raise ConfigError(f"{folder}/CLASS/ holds no image ({' '.join(ENDINGS)})")
        say(f"{split}: {len(files):,} images in {len(set(labels))} class folders of {folder}")
        splits[split] = Split(np.array(labels), Files(files), files.__getitem__)
    return splits, classes


def is_image(name):
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def image_files(folder):
    """Paths of the images in a folder and those inside it, in alphabetical order."""
    found = []
    for top, inside, names in os.walk(folder, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [os.path.join(top, name) for name in names if is_image(name)]
    return sorted(found)


class Files(list):
    def __call__(self, i):
        with open(self[i], "rb", opener=open_without_waiting) as file:
            return file.read()


def open_without_waiting(path, flags):
    """A FIFO with the name of an image is then empty, and counts as broken."""
    return os.open(path, flags | os.O_NONBLOCK)


def hub(config, say):
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
    return columns(config, list(found), found.__getitem__, name, say)


def parquet_files(config):
    """{split: paths} of the .parquet files under data_dir; split: train, or one of VAL_NAMES.

    A split's name is a word between separators in a file's name, else in that of the nearest folder. What stands
    before it, folders too, says which data set a file belongs to: those of `dataset` are taken, if there are any, and
    of each split those with the fewest such names. ConfigError where these are of several data sets.
    """
    wanted = "-".join(name_words(os.path.basename(config.dataset)))
    paths = visible_files(config.data_dir, ".parquet")
    found = [(path, *parsed(os.path.relpath(path, config.data_dir))) for path in paths]
    found = [row for row in found if wanted in row[3]] or found
    chosen = {}
    for split in ("train", *VAL_NAMES):
        owners = {path: owner for path, of, owner, _ in found if of == split}
        fewest = min(map(len, owners.values()), default=0)
        owners = {path: owner for path, owner in owners.items() if len(owner) == fewest}
        several = sorted(set(owners.values()))
        if len(several) > 1:
            if split != "train" and len(chosen) > 1:
                continue  # another is for validation
            whole = {owner for _, of, owner, _ in found if of in VAL_NAMES}  # those with files for validation
            one = next((owner for owner in several if owner in whole), several[0])
            raise ConfigError(
                f"data_dir={config.data_dir} has {split} files of several data sets "
                f"({', '.join(map('/'.join, several))}): give --dataset={one[-1]}, or a folder of one"
            )
        if owners:
            chosen[split] = list(owners)
    return chosen


def visible_files(folder, ending):
    """Paths below a folder, in alphabetical order, without names that start with a dot."""
    paths = []
    for top, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        paths += [os.path.join(top, name) for name in names if name.endswith(ending) and not name.startswith(".")]
    return sorted(paths)


def name_words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def parsed(path):
    """'fashion_mnist/train-00000-of-00002.parquet' -> 'train', ('fashion-mnist',), all names that may be a data set's.

    None, (), set() of a path that names no split.
    """
    parts = [name_words(part) for part in path.removesuffix(".parquet").split(os.sep)]
    for depth in reversed(range(len(parts))):
        for at, word in enumerate(parts[depth]):
            split = SPLIT_WORDS.get(word.strip("0123456789"))
            if split is None:
                continue
            before = [word for word in parts[depth][:at] if not word.isdigit()]
            owner = tuple("-".join(part) for part in (*parts[:depth], before) if part)
            rest = [word for word in parts[-1] if word not in (*SPLIT_WORDS, "of") and not word.isdigit()]
            return split, owner, {*owner, "-".join(rest)}
    return None, (), set()


def parquet(config, say):
    files = parquet_files(config)
    for wanted, names in (("*train*.parquet", ("train",)), ("*test*.parquet", VAL_NAMES)):
        if not any(name in files for name in names):
            raise ConfigError(
                f"data_dir={config.data_dir} holds neither train/ and val/ with a folder a class, nor {wanted}: see docs/vision.md"
            )

    def load(split):
        import datasets

        try:
            return datasets.load_dataset("parquet", data_files={split: files[split]}, split=split)
        except Exception as error:
            reason = damage(files[split]) or reason_of(error.__cause__ or error)
            raise ConfigError(f"data_dir={config.data_dir}: its parquet files cannot be read ({reason})") from None

    return columns(config, list(files), load, config.data_dir, say, files)


def damage(paths):
    """Which of the parquet files cannot be read, and where: 'FILE, rows 0 to 99: reason'. None if all can."""
    from pyarrow import parquet

    for path in paths:
        place = path
        try:
            file, first = parquet.ParquetFile(path), 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                place = f"{path}, rows {first} to {first + count - 1}"
                file.read_row_group(group)
                first += count
        except Exception as error:  # what pyarrow raises has no common kind
            return f"{place}: {reason_of(error)}"


def reason_of(error):
    """An exception in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def columns(config, names, load, where, say, files=None):
    """Splits of a data set in columns: load(name) -> datasets.Dataset; files: {name: paths} of those on this disk."""
    candidates = [name for name in VAL_NAMES if name in names]
    if "train" not in names or not candidates:
        raise ConfigError(
            f"{where} has the splits {', '.join(names)}: train, and one of {', '.join(VAL_NAMES)}, are needed"
        )

    def opened(name):
        return read_columns(config, load(name), where, name, say, (files or {}).get(name))

    train, classes = opened("train")
    for name, after in zip(candidates, [*candidates[1:], None]):
        val, others = opened(name)
        if after is None or (val.labels >= 0).any():
            break
        say(f"note: {name} of {where} has no labels: {after} is for validation")
    for split, chosen in (("train", "train"), ("val", name)):
        paths = (files or {}).get(chosen, [])
        inside = [os.path.relpath(path, where) for path in paths]
        listed = ", ".join(inside if len(inside) < 4 else (inside[0], "…", inside[-1]))
        say(f"{split}: {chosen} of {where}" + (f", files: {listed}" if inside else ""))
    return {"train": train, "val": val}, classes or others


def read_columns(config, data, where, split, say, paths):
    """-> Split of a datasets.Dataset, names of its classes or None. Rows that have no label are left out, with a count."""
    import datasets

    name = row_names(paths) if paths else lambda i: f"image {i} of {where}, {split}"
    image = field("image_field", config.image_field, IMAGE_FIELDS, data.column_names, where)
    label = field("label_field", config.label_field, LABEL_FIELDS, data.column_names, where)
    classes = getattr(data.features[label], "names", None)
    try:
        labels, known = whole_numbers(data.select_columns(label).with_format("arrow")[:][label])
    except TypeError:
        raise ConfigError(f"label_field={label}: {where} has no whole numbers there: give another column") from None
    rows = np.flatnonzero(known)
    if len(rows) < len(known):
        say(
            f"note: {split}: {len(known) - len(rows)} of {len(known)} rows left out, with no whole number as {label}, the first: "
            f"{name(int(np.argmin(known)))}"
        )
    images = data.select_columns(image)
    try:
        images = images.cast_column(image, datasets.Image(decode=False))
    except Exception:
        raise ConfigError(f"image_field={image}: {where} has no images there: give another column") from None

    def read(i):
        cell = images[int(rows[i])][image]
        if not cell or not (cell["bytes"] or cell["path"]):
            raise ValueError("an empty cell")
        if cell["bytes"]:
            return cell["bytes"]
        with open(cell["path"], "rb") as file:
            return file.read()

    return Split(labels[rows], read, lambda i: name(int(rows[i]))), classes


def row_names(paths):
    """Row i of all these parquet files, one behind the other -> 'FILE, row 5', from 0."""
    from pyarrow import parquet

    ends = np.cumsum([parquet.read_metadata(path).num_rows for path in paths])

    def name(i):
        k = int(np.searchsorted(ends, i, side="right"))
        return f"{paths[k]}, row {i - (ends[k - 1] if k else 0)}"

    return name


def whole_numbers(column):
    """pyarrow column (n,) -> int64 (n,), and whether a cell holds a whole number (n,). TypeError where none can."""
    import pyarrow

    if pyarrow.types.is_floating(column.type):
        values = column.to_numpy()  # null is nan
        known = np.abs(values) < 2**53
        known[known] = values[known] == np.floor(values[known])
        if len(known) and not known.any():
            raise TypeError
        return np.where(known, values, 0).astype(np.int64), known
    if not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_boolean(column.type)):
        raise TypeError
    return column.cast("int64").fill_null(0).to_numpy(), column.is_valid().to_numpy()


def field(option, given, known, names, where):
    found = given or next((name for name in known if name in names), None)
    if found not in names:
        raise ConfigError(f"{option}={given}: {where} has the columns {', '.join(names)}: give one of these")
    return found


def check_labels(config, splits, classes, say=lambda text: None):
    """ConfigError where labels do not fit n_classes; a note where a split lacks classes that the other has."""
    for split, data in splits.items():
        if not len(data.labels):
            raise ConfigError(f"dataset={config.dataset}: no images in its {split} split")
        if data.labels.max() < 0:
            raise ConfigError(
                f"dataset={config.dataset}: its {split} split has no labels, all are {data.labels.max()}: give one that has"
            )
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
    present = {split: set(np.unique(data.labels).tolist()) for split, data in splits.items()}
    for split, other in (("train", "val"), ("val", "train")):
        missing = sorted(present[other] - present[split])
        if missing:
            names = ", ".join(str(classes[label] if classes else label) for label in missing[:5])
            more = ", …" if len(missing) > 5 else ""
            say(f"note: classes of {other} without an image in {split}: {len(missing)}, {names}{more}")


# ---------------------------------------------------------------------------------------
# One image


def opened(raw):
    """A file's bytes, or a uint8 array -> PIL image, not yet decoded. One of too many pixels (PIL's limit) is an error."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF that is broken
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(raw))
        except UnidentifiedImageError:
            raise ValueError("no image of a known format") from None


def orientation(image):
    """EXIF's, 1 to 8; from 5 on width and height change places. 1 of a TIFF, which PIL turns itself, and of broken EXIF."""
    if image.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what it raises has no common kind
        return 1


def upright(image):
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def converted(image, channels):
    """PIL image of any mode -> RGB or grey, 8 bits."""
    if image.mode.startswith(("I", "F")):
        image = in_8_bits(image)
    return image.convert("L" if channels == 1 else "RGB")


def in_8_bits(image):
    """Grey of 16 bits or more, or of floats -> 0 … 255, where `convert` would clip.

    16 bits are of 0 … 65535. Longer numbers do not say of which range they are: the smallest usual one that holds them,
    or that up to the image's own maximum.
    """
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    top = float(values.max())
    if image.mode.startswith("I;16"):
        limits = (2**16 - 1,)
    elif image.mode == "F":
        limits = (1, 255, 2**16 - 1, top)
    else:
        limits = (255, 2**16 - 1, top)
    scale = 255 / next(limit for limit in limits if top <= limit)
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def decode(raw, channels):
    """A file's bytes, or a uint8 array -> PIL image, RGB or grey whatever it was, upright. Exceptions of many kinds."""
    return converted(upright(opened(raw)), channels)


def to_square(image, size, how=Image.Resampling.BICUBIC):
    """The central square of the image, size x size pixels."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    if image.size == (size, size):
        return image
    return image.resize((size, size), how, box=(left, top, left + side, top + side))


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

PREFETCH = 4  # pieces that a worker is ahead
SHARED_MEMORY = "/dev/shm"  # where torch's processes share tensors, on Linux

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
        self.mean, self.std = mean_and_std(train)
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
            if size is None:
                self.broken, self.last_broken = self.broken + 1, f"{split.name(i)} ({image})"
                continue
            sizes[size] = sizes.get(size, 0) + 1
            images.append(image)
            kept.append(i)
        if not kept:
            raise ConfigError(
                f"dataset={self.config.dataset}: no image of {n} can be decoded, the last: {self.last_broken}"
            )
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


def mean_and_std(images):
    """uint8 (n, C, …) -> those of each channel / 255: two lists of C. From counts, so the same on every machine."""
    C, values, counts = images.shape[1], np.arange(256), 0
    for piece in images.split(4096):
        by_channel = [torch.bincount(piece[:, c].flatten(), minlength=256) for c in range(C)]
        counts = counts + torch.stack(by_channel).numpy()  # (C, 256)
    n = counts.sum(axis=1)
    mean = counts @ values / n  # (C,)
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / np.maximum(n - 1, 1)
    return (mean / 255).tolist(), np.maximum(np.sqrt(variance) / 255, 1e-3).tolist()


class Decoded(torch.utils.data.Dataset):
    """i -> size of the image, pixels uint8 (C, S, S); None, the reason of a broken one."""

    def __init__(self, config, split):
        self.config, self.split = config, split

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, i):
        S = self.config.image_size
        try:
            image = decode(self.split.read(i), self.config.channels)
            return image.size, pixels(to_square(image, S))
        except Exception as error:  # what decoders raise has no common kind
            return None, reason_of(error)


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

    def __init__(self, config, splits, device, say=lambda text: None):
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
        piece = config.channels * config.image_size**2 * (PIECE + config.micro_batch)  # bytes, of both splits
        self.shares_memory = shared_memory_holds(piece * PREFETCH * self.workers, say)

    def loader(self, split, keys):
        """keys: lists of (position, image) -> iterator over them of uint8 (B, C, S, S), labels (B,), on the device."""
        loader = data_loader(
            Images(self.config, self.splits[split], split == "train"), self.workers, batch_sampler=keys,
            collate_fn=collate if self.shares_memory else collate_arrays, prefetch_factor=PREFETCH if self.workers else None,
        )  # fmt: skip
        for images, labels, boxes, broken in loader:
            images, labels = torch.as_tensor(images), torch.as_tensor(labels)
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

    With gpu_decode the file's bytes, uint8 (bytes,), where the pixels are, and behind the crop's left, top, right and
    bottom the EXIF orientation and the number of bytes.
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
                image = opened(raw)
                turned = orientation(image)
                whole = image.size[::-1] if turned >= 5 else image.size  # upright
                box = self.box(*whole, position)
                if config.gpu_decode:
                    return np.frombuffer(raw, np.uint8), int(self.split.labels[i]), (*box, turned, len(raw)), broken
                if image.format == "JPEG":  # at an eighth, a quarter or a half, where that is enough
                    need = [math.ceil(S * whole[k] / (box[k + 2] - box[k])) for k in (0, 1)]
                    image.draft(None, tuple(need[::-1] if turned >= 5 else need))
                image = converted(upright(image), config.channels)
                box = tuple(b * image.size[k % 2] / whole[k % 2] for k, b in enumerate(box))
                image = image.resize((S, S), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
                return pixels(image), int(self.split.labels[i]), box, broken
            except Exception as error:  # what decoders raise has no common kind
                broken.append(f"{self.split.name(i)} ({reason_of(error)})")
                i = (i + 1) % n if self.training else -1
        return np.zeros(0, np.uint8) if config.gpu_decode else blank, -1, (0, 0, 0, 0, 1, 0), broken

    def box(self, width, height, position):
        """The part of an upright image that is wanted: random in training, else the centre."""
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


def collate_arrays(items):
    """As collate, in numpy arrays: workers send them through a pipe, and tensors in shared memory."""
    images, labels, boxes, broken = collate(items)
    return images.numpy(), labels.numpy(), boxes, broken


def shared_memory_holds(size, say):
    """Whether this machine's shared memory has room for `size` bytes of each process; a note where it has not.

    A worker that finds it full loses its batch, and the trainer would wait for that for ever.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # no such folder: a system that keeps shared memory elsewhere
        return True
    free, needed = status.f_bavail * status.f_frsize, size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if free < needed:
        say(
            f"note: {SHARED_MEMORY} has {free / 2**20:,.1f} MiB free, decoded images need up to {needed / 2**20:,.1f} MiB: they "
            "come through pipes, which is slower (docker run --shm-size enlarges it)"
        )
    return free >= needed


def decode_on(device, files, boxes, config):
    """Files' bytes -> uint8 (B, C, S, S): upright JPEGs decoded on the GPU by torchvision, the rest by PIL on the host.

    Also a list of those that are torn behind their headers, and black.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    S, mode = config.image_size, ImageReadMode.GRAY if config.channels == 1 else ImageReadMode.RGB
    jpeg = [k for k, file in enumerate(files) if bytes(file[:2].tolist()) == b"\xff\xd8" and boxes[k][-2] == 1]
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
        left, top, right, bottom = (round(b) for b in box[:4])
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
    """Ctrl-C and a closed terminal are the trainer's to answer, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------
# Next-pixel prediction: images as tokens


def write_pixels(config):
    """Write train.bin, val.bin and meta.json as data.TokenData reads them.

    An image is image_size² · 3 + 1 tokens: a zero, where it starts, then its pixels, row by row, red green blue.
    meta.json has the length as row_tokens, so that every sequence of the GPT is one image: block_size is one less.
    """
    from tqdm import tqdm

    os.makedirs(config.out_dir, exist_ok=True)
    S, counts, broken = config.image_size, {}, []
    parts = tempfile.mkdtemp(prefix=".parts-", dir=config.out_dir)  # of this process alone
    try:
        for split, (total, images) in image_streams(config).items():
            written = 0
            with open(os.path.join(parts, f"{split}.bin"), "wb") as file:
                for image in tqdm(images, total=total, desc=split, disable=not sys.stderr.isatty()):
                    if isinstance(image, str):
                        broken.append(image)
                        continue
                    image = to_square(image, S, Image.Resampling.BOX)
                    file.write(b"\0" + np.asarray(image).tobytes())
                    written += 1
            if not written:
                last = f", the last: {broken[-1]}" if broken else ""
                raise ConfigError(f"dataset={config.dataset}: no image in its {split} split{last}")
            counts[split] = written
        row = 3 * S * S + 1
        meta = {
            "tokenizer": "pixels", "vocab_size": 256, "dtype": "uint8", "row_tokens": row, "image_size": S,
            "source": config.dataset, **{f"{split}_tokens": count * row for split, count in counts.items()},
        }  # fmt: skip
        with open(os.path.join(parts, "meta.json"), "w") as file:
            json.dump(meta, file, indent=1)
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(os.path.join(parts, name), os.path.join(config.out_dir, name))
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    skipped = f", {len(broken)} broken ones left out, the last: {broken[-1]}" if broken else ""
    print(f"{config.out_dir}: {counts['train']:,} and {counts['val']:,} images of {row - 1} tokens{skipped}")
    return meta


def image_streams(config):
    """{split: (number, iterator of RGB PIL images, and for a broken one of a line that says which and why)}"""
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
                path = os.path.join(config.data_dir, name)
                try:
                    with np.load(path) as part:
                        images = part["X"] if "X" in part else np.zeros(0)
                except (OSError, ValueError, zipfile.BadZipFile) as error:
                    raise ConfigError(f"{path} cannot be read ({reason_of(error)})") from None
                if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                    raise ConfigError(f"{path} has no X of images: uint8 (n, H, W, 3) is wanted")
                yield from map(Image.fromarray, images)

        return {"train": (None, of_parts(npz[:-1])), "val": (None, of_parts(npz[-1:]))}
    splits, _ = open_splits(config, print)

    def of_split(split):
        for i in range(len(split.labels)):
            try:
                yield decode(split.read(i), 3)
            except Exception as error:  # what decoders raise has no common kind
                yield f"{split.name(i)} ({reason_of(error)})"

    return {name: (len(split.labels), of_split(split)) for name, split in splits.items()}


if __name__ == "__main__":
    as_script(lambda words: write_pixels(load_config(PixelsConfig, words)))
