"""Augmentation of a whole batch on its device, in plain torch.

All random numbers are drawn on the host, for the whole batch of all processes, from (seed, step): so the GPU is never
waited for, and a process's share does not depend on how many there are. Images are float (B, C, S, S).
Imports from vision's data and the root's device.

    RandAugment     Cubuk et al., arXiv 1909.13719: operations drawn for each image, of 31 levels; black where it moved from
    random erasing  Zhong et al., arXiv 1708.04896: a rectangle becomes the mean colour
    mixup, cutmix   Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899: neighbours 2j and 2j + 1 of the batch,
                    which is in random order, are mixed with each other, by a weight of their own
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from configurator import ConfigError
from device import to_device
from vision.data import ERASE, MIX, OPERATIONS, rng


@dataclass
class AugmentConfig:
    """Options of what is done to training images."""

    crop_padding: int = 0  # held images: pixels of black around them, before a random crop of image_size
    min_crop: float = 0.08  # streamed images: least part of the area that a random crop keeps
    flip: bool = False  # left and right, at random
    rand_augment: int = 0  # operations of RandAugment on each image, 2 say
    rand_level: int = 9  # their strength, 0 to 30
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of its Beta distribution; 0: none
    cutmix: float = 0.0  # alpha; with mixup each pair of images gets one of the two
    label_smoothing: float = 0.0  # probability given to all classes alike

    def __post_init__(self):
        for name in ("crop_padding", "rand_augment", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 0")
        for name in ("random_erasing", "label_smoothing", "min_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it 0 to 1")
        if self.rand_level != 9 and not self.rand_augment:
            raise ConfigError(f"rand_level={self.rand_level} with rand_augment=0: leave it out, or take rand_augment=2")
        if not 0 <= self.rand_level <= 30:
            raise ConfigError(f"rand_level={self.rand_level}: make it 0 to 30")


class Augment:
    """augment(step, x, y, rows, start, stop): images of 0 … 255 and labels -> normalised images and targets.

    x (B, C, S, S), y (B,): rows start … stop of the batch of `step`, which has `rows` in all. Targets are the labels,
    or, of mixed images or smoothed labels, probabilities (B, n_classes).
    """

    def __init__(self, config, mean, std, device):
        self.config, self.device = config, device
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def normalise(self, x):
        return (x / 255 - self.mean) / self.std

    def __call__(self, step, x, y, rows, start, stop):
        config, S = self.config, x.shape[-1]

        def put(array):
            return to_device(torch.from_numpy(np.ascontiguousarray(array[start:stop])), self.device)

        if config.rand_augment:
            draw = rng(config.seed, OPERATIONS, step)
            shape = (rows, config.rand_augment)
            operations, signs = draw.integers(len(OPERATION_NAMES), size=shape), 2 * draw.integers(2, size=shape) - 1
            for k in range(config.rand_augment):
                levels = put((config.rand_level / 30 * signs[:, k]).astype(np.float32))
                x = rand_operation(x, operations[start:stop, k], levels, self.device)
        x = self.normalise(x)
        if config.random_erasing:
            x = x * ~inside(put(erase_boxes(rng(config.seed, ERASE, step), rows, S, config.random_erasing)), S)
        if not (config.mixup or config.cutmix or config.label_smoothing):
            return x, y
        y = F.one_hot(y, config.n_classes).float()
        y = y * (1 - config.label_smoothing) + config.label_smoothing / config.n_classes
        if config.mixup or config.cutmix:
            boxes, amounts = map(put, mix_boxes(rng(config.seed, MIX, step), rows, S, config.mixup, config.cutmix))
            others = amounts.view(-1, 1, 1, 1) * inside(boxes, S)  # (B, 1, S, S): share of the other image
            share = others.mean((2, 3))  # (B, 1)
            x = x + others * (neighbour(x) - x)
            y = y + share * (neighbour(y) - y)
        return x, y


def neighbour(x):
    """Rows 2j and 2j + 1 exchanged."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def inside(boxes, S):
    """(B, 4) top, bottom, left, right, the ends not included -> (B, 1, S, S) bool"""
    along = torch.arange(S, device=boxes.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # (B, 1)
    tall, wide = (along >= top) & (along < bottom), (along >= left) & (along < right)  # (B, S)
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def erase_boxes(draw, rows, S, probability):
    """(rows, 4): of 2 to 33 % of the area and ratio 0.3 to 3.3; empty where nothing is erased."""
    area = S * S * draw.uniform(0.02, 0.33, rows) * (draw.random(rows) < probability)
    ratio = np.exp(draw.uniform(math.log(0.3), math.log(3.3), rows))
    h, w = (np.minimum(S, np.sqrt(area * r)).round().astype(np.int64) for r in (ratio, 1 / ratio))
    top, left = (np.floor(draw.random(rows) * (S - side + 1)).astype(np.int64) for side in (h, w))
    return np.stack((top, top + h, left, left + w), axis=1)


def mix_boxes(draw, rows, S, mixup, cutmix):
    """-> boxes (rows, 4), and how much of the other image is in them (rows,) float32; alike for both of a pair.

    cutmix: a part of the image, and 1; mixup: the whole image, and less than 1.
    """
    pairs = rows // 2
    blended = 1 - draw.beta(mixup or 1, mixup or 1, pairs)
    cut = draw.random(pairs) < (0.5 if mixup and cutmix else float(cutmix > 0))
    side = S * np.sqrt(1 - draw.beta(cutmix or 1, cutmix or 1, pairs))
    centre = draw.uniform(0, S, (2, pairs))
    low, high = (np.clip(np.round(centre + sign * side / 2), 0, S).astype(np.int64) for sign in (-1, 1))
    boxes = np.where(cut[:, None], np.stack((low[0], high[0], low[1], high[1]), axis=1), [0, S, 0, S])
    return boxes.repeat(2, axis=0), np.where(cut, 1, blended).astype(np.float32).repeat(2)


# ---------------------------------------------------------------------------------------
# RandAugment's operations: level (B,) is the strength from 0 to 1, with a sign where there are two directions


def rand_operation(x, operations, levels, device):
    """One operation on each image. operations (B,) on the host, so that nobody asks the device which images it has."""
    order = np.argsort(operations, kind="stable")
    ends = np.searchsorted(operations[order], np.arange(len(OPERATION_NAMES) + 1))
    rows = to_device(torch.from_numpy(order), device)
    x, levels = x[rows], levels[rows]
    parts = []
    for name, begin, end in zip(OPERATION_NAMES, ends, ends[1:]):
        if begin < end:
            parts.append(OPERATION_NAMES[name](x[begin:end], levels[begin:end].view(-1, 1, 1, 1)))
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows), device=device)
    return torch.cat(parts)[back]


def moved(x, xx=1.0, xy=0.0, x0=0.0, yx=0.0, yy=1.0, y0=0.0):
    """Image whose pixel (x, y) is the old one's (xx x + xy y + x0, yx x + yy y + y0), -1 to 1 from edge to edge."""
    flat = [
        torch.as_tensor(value, device=x.device).expand(len(x), 1, 1, 1).flatten() for value in (xx, xy, x0, yx, yy, y0)
    ]
    matrix = torch.stack(flat, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotate(x, level):
    angle = level * math.pi / 6  # 30 degrees at most
    return moved(x, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def grey(x):
    """(B, C, S, S) -> (B, 1, S, S), by ITU-R 601-2 luma"""
    return x if x.shape[1] == 1 else (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blend(x, other, level):
    """Between `other` at factor 0, x at 1, and beyond: the factor is 1 + 0.9 level."""
    return (other + (1 + 0.9 * level) * (x - other)).clamp(0, 255)


def sharpness(x, level):
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    C = x.shape[1]
    smooth = x.clone()  # its edge as it is
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel.expand(C, 1, 3, 3), groups=C)
    return blend(x, smooth, level)


def posterize(x, level):
    """The highest 8 to 4 bits of each value."""
    step = 2 ** (4 * level.abs()).round()
    return (x / step).floor() * step


def solarize(x, level):
    return torch.where(x >= 256 * (1 - level.abs()), 255 - x, x)


def autocontrast(x, level):
    """Each channel stretched to 0 … 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1e-3), x)


def equalize(x, level):
    """Each channel's values evenly over 0 … 255, by its cumulative histogram, in whole numbers."""
    values = x.round().long().flatten(2)  # (B, C, S²)
    counts = torch.zeros(*values.shape[:2], 256, device=x.device).scatter_add_(
        2, values, torch.ones_like(values).float()
    )
    last = counts.gather(2, values.amax(2, keepdim=True))  # how many have the largest value
    step = ((values.shape[2] - last) / 255).floor()
    below = counts.cumsum(2) - counts
    table = torch.where(step > 0, ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255), -1)
    new = table.gather(2, values).view_as(x)
    return torch.where(new < 0, x, new)


OPERATION_NAMES = {
    "identity": lambda x, level: x,
    "shear_x": lambda x, level: moved(x, xy=0.3 * level),
    "shear_y": lambda x, level: moved(x, yx=0.3 * level),
    "translate_x": lambda x, level: moved(x, x0=2 * 150 / 331 * level),
    "translate_y": lambda x, level: moved(x, y0=2 * 150 / 331 * level),
    "rotate": rotate,
    "brightness": lambda x, level: blend(x, torch.zeros_like(x), level),
    "colour": lambda x, level: blend(x, grey(x), level),
    "contrast": lambda x, level: blend(x, grey(x).mean((2, 3), keepdim=True), level),
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}
