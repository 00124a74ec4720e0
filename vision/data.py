"""Batches of images: small images are held on the device (Held), large ones are streamed from their files (Streamed).

Held images are decoded once, to uint8; streamed ones are decoded in worker processes as they are needed. Which images a
step sees, and how each is cropped, is a function of (seed, step), whatever the number of processes: epochs are
permutations, one after the other, and a batch is a stretch of them, of which each process takes its share.

As a command, this file turns images into token files for next-pixel prediction, which the root's train.py learns:

    python -m vision.data --dataset=cifar10                          # 8x8x3 pixels -> data/cifar10_pixels
    python train.py vision/config/pixels.py

Shapes: n images in all, B in a batch, S = image_size, C channels.
"""

import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from configurator import ConfigError, as_script, load_config
from vision.options import DataConfig


@dataclass
class PixelsConfig(DataConfig):
    dataset: str = "cifar10"  # as in vision/train.py; data_dir may also hold .npz files with X (CIFAR-5M's)
    image_size: int = 8  # pixels a side, to which images are shrunk
    out_dir: str | None = None  # None: data/DATASET_pixels

    def __post_init__(self):
        self.out_dir = self.out_dir or os.path.join("data", f"{os.path.basename(self.dataset)}_pixels")
        if not 1 <= self.image_size <= 4096:
            raise ConfigError(f"image_size={self.image_size}: make it at least 1 and at most 4096")


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, PixelsConfig))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import fingerprint
from engine.device import to_device
from prepare_owt import publish, writing_folder
from text_files import first_line
from vision.images import (
    as_array,
    convert_mode,
    decode,
    decode_on,
    make_upright,
    open_image,
    orientation,
    random_box,
    to_square,
)
from vision.sources import fingerprint_of_images, open_splits, visible_files

# What random numbers are for: together with the seed and a number it determines their generator.
ORDER, CROP, FLIP, MIX, ERASE, OPERATIONS = range(6)


def rng(seed, purpose, number):
    """A numpy generator that depends on these three integers alone. purpose: ORDER, CROP, …"""
    return np.random.default_rng([seed, purpose, number])


# ---------------------------------------------------------------------------------------
# Batches


class Order:
    """The order in which n images are seen, epoch after epoch: position in training -> image."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epochs = n, seed, {}

    def stretch(self, first, count):
        """Images at positions first … first + count - 1, (count,) int64."""
        parts = []
        while count > 0:
            epoch, begin = divmod(first, self.n)
            parts.append(self.epoch(epoch)[begin : begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def epoch(self, number):
        """The permutation of epoch `number`, (n,) int64."""
        if number not in self.epochs:
            self.epochs = {
                key: value for key, value in self.epochs.items() if key == number - 1
            }  # at most two are kept
            self.epochs[number] = rng(self.seed, ORDER, number).permutation(self.n)
        return self.epochs[number]


SHARED_MEMORY = "/dev/shm"  # where torch's processes share tensors, on Linux
PREFETCH = 4  # pieces that a worker is ahead
PIECE = 64  # images that a worker decodes at a time: a whole share would delay the first batch, and take more memory
WORTH_A_WORKER = 2048  # held images: decoding fewer takes no longer than starting a worker


def count_workers(config):
    """How many processes decode images for this one: config.workers, or its share of the cores.

    They are forked, because a Split cannot be sent to a new process. Where forking is not safe (macOS) the default is none.
    """
    if config.workers is not None:
        return config.workers
    if sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def fingerprints(splits):
    """{"train_fingerprint": …, "val_fingerprint": …}, by which a resumed run notices other images."""
    return {f"{name}_fingerprint": fingerprint_of_images(split) for name, split in splits.items()}


class Held:
    """All images on the device, as uint8. Training images have a black frame, so that a random crop is one lookup.

    config   an ImageTrainConfig
    splits   of sources.open_splits
    say      called with lines about images that are broken or of other sizes
    ConfigError if none can be decoded.
    """

    def __init__(self, config, splits, device, say=lambda text: None):
        self.config, self.device, self.broken, self.last_broken = config, device, 0, ""
        self.fingerprints = fingerprints(splits)
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
        workers = min(count_workers(self.config), n // WORTH_A_WORKER)
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
        """Images start … stop of the batch of `step`, which has `rows` in all -> a tuple, the arguments of `images`

        Here it has one tensor (B, 4) int64 on the device: image, top and left of the crop, 1 if flipped.
        """
        seed, config = self.config.seed, self.config
        shifts = rng(seed, CROP, step).integers(2 * config.crop_padding + 1, size=(rows, 2))
        flips = rng(seed, FLIP, step).integers(2, size=(rows, 1)) * config.flip
        chosen = self.order.stretch(step * rows, rows)
        table = torch.from_numpy(np.concatenate((chosen[:, None], shifts, flips), axis=1)[start:stop])
        return (to_device(table, self.device),)

    def images(self, table):
        """What `draw` gave -> float (B, C, S, S) of 0 … 255, labels (B,), on the device, which the host never waits for."""
        i, top, left, flip = table.unbind(1)  # (B,) each
        y = top[:, None] + self.along  # (B, S)
        x = left[:, None] + torch.where(flip[:, None] == 1, self.along.flip(0), self.along)
        images = self.train[i[:, None, None, None], self.channel, y[:, None, :, None], x[:, None, None, :]]
        return images.float(), self.labels[i]

    def val_batches(self, rank, world, size):
        """This rank's share of the validation images, in batches of `size` -> iterator of (float (B, C, S, S), labels (B,))

        Every rank has equally many batches; they are filled up with images of label -1.
        """
        n = len(self.val)
        for first in range(0, -(-n // world), size):
            rows = torch.arange(rank + first * world, rank + (first + size) * world, world, device=self.device)
            inside = rows < n
            rows = rows.clamp(max=n - 1)
            yield self.val[rows].float(), torch.where(inside, self.val_labels[rows], -1)


def mean_and_std(images):
    """uint8 (n, C, …) -> mean and standard deviation of each channel / 255, two lists of C.

    They are computed from counts, so that they are the same on every machine.
    """
    C, values, counts = images.shape[1], np.arange(256), 0
    for piece in images.split(4096):
        by_channel = [torch.bincount(piece[:, c].flatten(), minlength=256) for c in range(C)]
        counts = counts + torch.stack(by_channel).numpy()  # (C, 256)
    n = counts.sum(axis=1)
    mean = counts @ values / n  # (C,)
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / np.maximum(n - 1, 1)
    return (mean / 255).tolist(), np.maximum(np.sqrt(variance) / 255, 1e-3).tolist()


class Decoded(torch.utils.data.Dataset):
    """i -> (size of the image, pixels uint8 (C, S, S)), or (None, reason) if it is broken."""

    def __init__(self, config, split):
        self.config, self.split = config, split

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, i):
        S = self.config.image_size
        try:
            image = decode(self.split.read(i), self.config.channels)
            return image.size, as_array(to_square(image, S))
        except Exception as error:  # what decoders raise has no common base class
            return None, first_line(error)


def data_loader(images, workers, **how):
    """A DataLoader of the data set `images`, which `workers` processes decode; how: its other options."""
    fork = "fork" if workers else None
    return torch.utils.data.DataLoader(
        images, num_workers=workers, worker_init_fn=start_worker, multiprocessing_context=fork, **how
    )


class Streamed:
    """Images that worker processes decode as they are needed, ahead of the trainer. Its interface is that of Held.

    A broken training image is replaced by the next one of its data set; a broken validation image is left out.
    """

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's training images

    def __init__(self, config, splits, device, say=lambda text: None):
        self.config, self.splits, self.device = config, splits, device
        self.n, self.broken, self.last_broken = len(splits["train"].labels), 0, ""
        self.fingerprints = fingerprints(splits)
        self.order, self.next_step, self.pieces = Order(self.n, config.seed), None, None
        if config.channels == 1:
            self.mean, self.std = [0.449], [0.226]
        if config.gpu_decode and importlib.util.find_spec("torchvision") is None:
            raise ConfigError(
                "gpu_decode=True needs torchvision, which is missing: pip install torchvision, or leave it out"
            )
        self.workers = count_workers(config)
        piece = config.channels * config.image_size**2 * (PIECE + config.micro_batch)  # bytes, of both splits
        self.shares_memory = shared_memory_holds(piece * PREFETCH * self.workers, say)

    def loader(self, split, keys):
        """Decode images of a split -> iterator of uint8 (B, C, S, S), labels (B,), on the device

        keys: iterable of lists of (position, image), one a batch, as Images takes them
        """
        loader = data_loader(
            Images(self.config, self.splits[split], split == "train"), self.workers, batch_sampler=keys,
            collate_fn=collate if self.shares_memory else collate_arrays, prefetch_factor=PREFETCH if self.workers else None,
        )  # fmt: skip
        for images, labels, boxes, broken in loader:
            images, labels = torch.as_tensor(images), torch.from_numpy(labels)
            if broken:
                self.broken, self.last_broken = self.broken + len(broken), broken[-1]
            if split == "train" and (labels < 0).any():
                raise ConfigError(
                    f"dataset={self.config.dataset}: {TRIES} broken files in a row, the last: {broken[-1]}"
                )
            if self.config.gpu_decode:
                files = images.split([box[-1] for box in boxes])
                images, black = decode_on(self.device, files, boxes, self.config)
                self.broken += len(black)
                if split == "val":
                    labels[black] = -1
            else:
                images = to_device(images, self.device)
            yield images, to_device(labels, self.device)

    def draw(self, step, rows, start, stop):
        """As Held.draw, with other tensors: pixels uint8 (B, C, S, S), labels (B,), and with `flip` int64 (B,), 1 if flipped."""
        if step != self.next_step:  # the first step of a run, new or resumed
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
        """As Held.val_batches."""
        n = len(self.splits["val"].labels)
        keys = []
        for first in range(0, -(-n // world), size):
            rows = range(rank + first * world, rank + (first + size) * world, world)
            keys.append([(row, row if row < n else -1) for row in rows])
        return ((images.float(), labels) for images, labels in self.loader("val", keys))


class Stretches:
    """Sampler of one process's share of each training batch, from `step` on, without end: lists of PIECE keys of Images."""

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


TRIES = 100  # a run ends after so many broken files in a row


class Images(torch.utils.data.Dataset):
    """(position in training, image) -> pixels uint8 (C, S, S), label, crop, names of the broken files met

    The crop is left, top, right, bottom. With gpu_decode the file's bytes, uint8 (bytes,), stand in for the pixels, and
    the crop also has the EXIF orientation and the number of bytes. Image -1 is blank, with label -1.
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
                image = open_image(raw)
                turned = orientation(image)
                whole = image.size[::-1] if turned >= 5 else image.size  # upright
                box = self.box(*whole, position)
                if config.gpu_decode:
                    return np.frombuffer(raw, np.uint8), int(self.split.labels[i]), (*box, turned, len(raw)), broken
                if image.format == "JPEG":  # decoded at an eighth, a quarter or a half of its size if that is enough
                    need = [math.ceil(S * whole[k] / (box[k + 2] - box[k])) for k in (0, 1)]
                    image.draft(None, tuple(need[::-1] if turned >= 5 else need))
                image = convert_mode(make_upright(image), config.channels)
                box = tuple(b * image.size[k % 2] / whole[k % 2] for k, b in enumerate(box))
                image = image.resize((S, S), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
                return as_array(image), int(self.split.labels[i]), box, broken
            except Exception as error:  # what decoders raise has no common base class
                broken.append(f"{self.split.name(i)} ({first_line(error)})")
                i = (i + 1) % n if self.training else -1
        return np.zeros(0, np.uint8) if config.gpu_decode else blank, -1, (0, 0, 0, 0, 1, 0), broken

    def box(self, width, height, position):
        """left, top, right, bottom of the crop of an upright image: random in training, else the centre."""
        if self.training:
            return random_box(rng(self.config.seed, CROP, position), width, height, self.config.min_crop)
        S = self.config.image_size
        side = min(width, height) * S / (self.config.eval_resize or round(S * 256 / 224))
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def collate_arrays(items):
    """Items of Images -> pixels uint8 (B, C, S, S) or bytes uint8 (bytes of all files,), labels (B,), boxes, broken names.

    Numpy arrays, which workers send through a pipe.
    """
    images, labels, boxes, broken = zip(*items)
    images = np.stack(images) if images[0].ndim == 3 else np.concatenate(images)
    return images, np.array(labels), boxes, [name for names in broken for name in names]


def collate(items):
    """As collate_arrays, with images as a tensor, which workers send through shared memory: faster."""
    images, *rest = collate_arrays(items)
    images = torch.from_numpy(images)
    if torch.utils.data.get_worker_info() is not None:
        # Here a full /dev/shm is an error. When a queue shares tensors in its own thread, it loses them, and all wait.
        images.share_memory_()
    return images, *rest


def shared_memory_holds(size, say):
    """Whether this machine's shared memory has room for `size` bytes from each process; otherwise a note says so."""
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


@contextmanager
def workers_watched():
    """In this block a worker that fails or dies is one line. torch's SIGCHLD handler raises wherever the main thread is."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or it raises again while the run ends
        if "shared memory" in str(error):
            raise ConfigError(
                "shared memory is full, through which processes send decoded images: enlarge /dev/shm (docker run "
                "--shm-size=8g), or take fewer --workers; --workers=0 needs none"
            ) from None
        raise ConfigError(
            f"a process that decodes images ended ({first_line(error)}): fewer --workers take less memory"
        ) from None


def start_worker(worker):
    """Set up a worker: Ctrl-C and a closed terminal are for the trainer, which ends its workers; one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------
# Next-pixel prediction: images as tokens


def write_pixels(config):
    """Write train.bin, val.bin and meta.json, as data.TokenData reads them -> the meta dict

    An image is image_size² · 3 + 1 tokens: a zero, where it starts, then its pixels, row by row, red green blue.
    meta.json has the length as row_tokens, so that every sequence of the GPT is one image: block_size is one less.
    ConfigError if there are no images, or they cannot be written.
    """
    streams, counts, broken = image_streams(config), {}, []
    with writing_folder(config.out_dir):
        os.makedirs(config.out_dir, exist_ok=True)
        # A folder of this process alone: several may prepare the same data at once.
        with tempfile.TemporaryDirectory(prefix=".part-", dir=config.out_dir) as folder:
            paths = {split: os.path.join(folder, f"{split}.bin") for split in streams}
            for split, (total, images) in streams.items():
                counts[split] = write_split(config, split, total, images, paths[split], broken)
            row = 3 * config.image_size**2 + 1
            meta = {
                "tokenizer": "pixels", "vocab_size": 256, "dtype": "uint8", "row_tokens": row,
                "image_size": config.image_size, "source": config.dataset,
                **{f"{split}_tokens": count * row for split, count in counts.items()},
                **{f"{split}_fingerprint": fingerprint(path) for split, path in paths.items()},
            }  # fmt: skip
            with open(os.path.join(folder, "meta.json"), "w") as file:
                json.dump(meta, file, indent=1)
            publish(folder, config.out_dir, replace=True)
    skipped = f", {len(broken)} broken ones left out, the last: {broken[-1]}" if broken else ""
    print(f"{config.out_dir}: {counts['train']:,} and {counts['val']:,} images of {row - 1} tokens{skipped}")
    return meta


def write_split(config, split, total, images, path, broken):
    """Write images, of image_streams, as tokens to a new file -> how many. Lines about broken ones are added to `broken`."""
    from tqdm import tqdm

    written = 0
    with open(path, "wb") as file:
        for image in tqdm(images, total=total, desc=split, disable=not sys.stderr.isatty()):
            if isinstance(image, str):
                broken.append(image)
                continue
            image = to_square(image, config.image_size, Image.Resampling.BOX)
            file.write(b"\0" + np.asarray(image).tobytes())
            written += 1
        file.flush()
        os.fsync(file.fileno())
    if not written:
        last = f", the last: {broken[-1]}" if broken else ""
        raise ConfigError(f"dataset={config.dataset}: no image in its {split} split{last}")
    return written


def image_streams(config):
    """-> {split: (number of images or None, iterator of RGB PIL images, and of a line in the place of a broken one)}"""
    npz = visible_files(config.data_dir, ".npz") if os.path.isdir(config.data_dir or "") else []
    if len(npz) == 1:
        raise ConfigError(f"data_dir={config.data_dir} has one .npz: two are needed, the last is for validation")
    if npz:
        train, val = map(npz_images, npz[:-1]), npz_images(npz[-1])
        return {"train": (None, itertools.chain.from_iterable(train)), "val": (None, val)}
    splits, _ = open_splits(config, print)

    def decode_split(split):
        for i in range(len(split.labels)):
            try:
                yield decode(split.read(i), 3)
            except Exception as error:  # what decoders raise has no common base class
                yield f"{split.name(i)} ({first_line(error)})"

    return {name: (len(split.labels), decode_split(split)) for name, split in splits.items()}


def npz_images(path):
    """The images X, uint8 (n, H, W, 3), of a .npz file, read one by one -> iterator of PIL images. ConfigError if it has none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("X.npy") as file:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_columns, dtype = readers[np.lib.format.read_magic(file)](file)
            if dtype != np.uint8 or by_columns or len(shape) != 4 or shape[3] != 3:
                raise ValueError("its X is not images, uint8 (n, H, W, 3)")
            if not 0 < shape[1] * shape[2] <= Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"its images have {shape[1]} x {shape[2]} pixels")
            for number in range(shape[0]):
                content = file.read(math.prod(shape[1:]))
                if len(content) < math.prod(shape[1:]):
                    raise EOFError(f"it ends in image {number} of {shape[0]}")
                yield Image.frombuffer("RGB", (shape[2], shape[1]), content, "raw", "RGB", 0, 1)
    except Exception as error:  # what zipfile and numpy raise has no common base class
        raise ConfigError(f"{path} cannot be read ({first_line(error)})") from None


if __name__ == "__main__":
    as_script(lambda words: write_pixels(load_config(PixelsConfig, words)))
