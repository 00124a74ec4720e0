"""Augmentation of a whole batch on its device, in plain torch.

All random numbers are drawn on the host, for the whole batch of all processes, from (seed, step), so that a process's
share does not depend on how many there are. What follows is a function of tensors on the device, whose shapes never
change and which the host never reads, so that it can be part of an update's CUDA graph. Therefore every operation of
RandAugment is applied to all images, and each image takes the result of its own. Images are float (B, C, S, S).

    resized crop    Szegedy et al., arXiv 1409.4842: a part of the image, stretched to its size
    RandAugment     Cubuk et al., arXiv 1909.13719: operations drawn for each image, of 31 levels; moved images leave black
    random erasing  Zhong et al., arXiv 1708.04896: a rectangle becomes the mean colour
    mixup, cutmix   Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899: neighbours 2j and 2j + 1 of the batch,
                    which is in random order, are mixed, by a weight of their own or the whole batch's
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from engine.device import to_device
from vision.data import CROP, ERASE, MIX, OPERATIONS, rng


class Augment:
    """augment(x, y, numbers): images of 0 … 255 and labels -> normalised images and targets.

    x (B, C, S, S), y (B,), numbers from `draw`. Targets are the labels (B,), or if images are mixed or labels smoothed,
    probabilities (B, n_classes).
    """

    def __init__(self, config, mean, std, device):
        self.config, self.device = config, device
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.classes = torch.arange(config.n_classes, device=device)
        mixing = bool(config.mixup or config.cutmix)
        # Columns of `draw`: box to keep, operations, their levels, box to erase, box to mix, share of the other image in that box.
        boxes = [4 * config.resized_crop, config.rand_augment, config.rand_augment, 4 * bool(config.random_erasing)]
        self.columns = [*boxes, 4 * mixing, 1 * mixing]

    def normalise(self, x):
        """Images of 0 … 255 -> the same with mean 0 and standard deviation 1 in each channel."""
        return (x / 255 - self.mean) / self.std

    def draw(self, step, rows, start, stop):
        """Random numbers for rows start … stop of the batch of `step`, which has `rows` in all.

        -> float32 (stop - start, sum of columns) on the device, by one copy; float32 represents the integers exactly
        """
        config, S = self.config, self.config.image_size
        parts = [np.zeros((rows, 0))]  # (rows, columns) each
        if config.resized_crop:
            parts += [crop_boxes(rng(config.seed, CROP, step), rows, S, config.min_crop)]
        if config.rand_augment:
            draw = rng(config.seed, OPERATIONS, step)
            shape = (rows, config.rand_augment)
            operations, signs = draw.integers(len(OPERATION_NAMES), size=shape), 2 * draw.integers(2, size=shape) - 1
            parts += [operations, config.rand_level / 30 * signs]
        if config.random_erasing:
            parts += [erase_boxes(rng(config.seed, ERASE, step), rows, S, config.random_erasing)]
        if config.mixup or config.cutmix:
            boxes, amounts = mix_boxes(
                rng(config.seed, MIX, step), rows, S, config.mixup, config.cutmix, config.mixup_mode
            )
            parts += [boxes, amounts[:, None]]
        table = np.concatenate(parts, axis=1)[start:stop].astype(np.float32)
        return to_device(torch.from_numpy(table), self.device)

    def __call__(self, x, y, numbers):
        config, S = self.config, x.shape[-1]
        kept, operations, levels, erased, mixed, amounts = numbers.split(self.columns, dim=1)
        if config.resized_crop:
            x = stretched(x, kept)
        for k in range(config.rand_augment):
            x = rand_operation(x, operations[:, k], levels[:, k])
        x = self.normalise(x)
        if config.random_erasing:
            x = x * ~inside(erased, S)
        if not (config.mixup or config.cutmix or config.label_smoothing):
            return x, y
        y = (y[:, None] == self.classes) * (1 - config.label_smoothing) + config.label_smoothing / config.n_classes
        if config.mixup or config.cutmix:
            others = amounts[:, :, None, None] * inside(mixed, S)  # (B, 1, S, S): share of the other image
            x = x.lerp(neighbour(x), others)
            y = y.lerp(neighbour(y), others.mean((2, 3)))
        return x, y


def neighbour(x):
    """Swap rows 2j and 2j + 1."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def inside(boxes, S):
    """Boxes (B, 4): top, bottom, left, right, ends excluded -> (B, 1, S, S) bool, True inside."""
    along = torch.arange(S, device=boxes.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # (B, 1)
    tall, wide = (along >= top) & (along < bottom), (along >= left) & (along < right)  # (B, S)
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def crop_boxes(draw, rows, S, min_crop, tries=10):
    """Boxes (rows, 4) with min_crop to all of the area and aspect ratio 3/4 to 4/3, drawn like images.random_box.

    Of `tries` boxes for an image the first that fits is taken; if none fits, the whole image.
    """
    area = S * S * draw.uniform(min_crop, 1, (rows, tries))
    ratio = np.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3), (rows, tries)))
    w, h = (np.sqrt(area * r).round().astype(np.int64) for r in (ratio, 1 / ratio))
    fits = (w > 0) & (w <= S) & (h > 0) & (h <= S)
    first = fits.argmax(axis=1)[:, None]
    w, h = (np.where(fits.any(axis=1), np.take_along_axis(side, first, axis=1)[:, 0], S) for side in (w, h))
    top, left = (np.floor(draw.random(rows) * (S - side + 1)).astype(np.int64) for side in (h, w))
    return np.stack((top, top + h, left, left + w), axis=1)


def stretched(x, boxes):
    """The part of each image (B, C, S, S) inside its box (B, 4), resized to S x S by bilinear interpolation."""
    S = x.shape[-1]
    middles = (torch.arange(S, device=x.device) + 0.5) / S  # of the new pixels; 0 to 1 from edge to edge of the box

    def places(start, stop):  # (B, 1) each, in pixels -> (B, S): where to read, -1 to 1
        at = start + middles * (stop - start)
        return at.clamp(start + 0.5, stop - 0.5) * 2 / S - 1  # nothing from outside the box

    top, bottom, left, right = boxes.to(x.dtype)[:, :, None].unbind(1)
    rows, columns = places(top, bottom), places(left, right)
    grid = torch.stack((columns[:, None, :].expand(-1, S, S), rows[:, :, None].expand(-1, S, S)), dim=3)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def erase_boxes(draw, rows, S, probability):
    """Boxes (rows, 4) with 2 to 33 % of the area and aspect ratio 0.3 to 3.3; empty ones if nothing is to be erased."""
    area = S * S * draw.uniform(0.02, 0.33, rows) * (draw.random(rows) < probability)
    ratio = np.exp(draw.uniform(math.log(0.3), math.log(3.3), rows))
    h, w = (np.minimum(S, np.sqrt(area * r)).round().astype(np.int64) for r in (ratio, 1 / ratio))
    top, left = (np.floor(draw.random(rows) * (S - side + 1)).astype(np.int64) for side in (h, w))
    return np.stack((top, top + h, left, left + w), axis=1)


def mix_boxes(draw, rows, S, mixup, cutmix, mode="pair"):
    """-> boxes (rows, 4), share of the other image in each, (rows,) float32; the same for both images of a pair.

    cutmix: a part of the image, and share 1; mixup: the whole image, and a share below 1. mode="batch": the same for all rows.
    """
    pairs = 1 if mode == "batch" else rows // 2
    blended = 1 - draw.beta(mixup or 1, mixup or 1, pairs)
    cut = draw.random(pairs) < (0.5 if mixup and cutmix else float(cutmix > 0))
    side = S * np.sqrt(1 - draw.beta(cutmix or 1, cutmix or 1, pairs))
    centre = draw.uniform(0, S, (2, pairs))
    low, high = (np.clip(np.round(centre + sign * side / 2), 0, S).astype(np.int64) for sign in (-1, 1))
    boxes = np.where(cut[:, None], np.stack((low[0], high[0], low[1], high[1]), axis=1), [0, S, 0, S])
    return boxes.repeat(rows // pairs, axis=0), np.where(cut, 1, blended).astype(np.float32).repeat(rows // pairs)


# ---------------------------------------------------------------------------------------
# RandAugment: a level is an operation's strength from 0 to 1, with a sign if the operation has two directions

OPERATION_NAMES = (
    "identity",
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "colour", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
MOVES, BLENDS = slice(1, 6), slice(6, 10)  # of OPERATION_NAMES


def rand_operation(x, operations, levels):
    """Apply one operation to each image. operations (B,): indices into OPERATION_NAMES; levels (B,)."""
    numbers = torch.arange(len(OPERATION_NAMES), device=x.device)
    masks = (operations == numbers[:, None])[:, :, None, None, None]  # (operations, B, 1, 1, 1)
    wanted, level = dict(zip(OPERATION_NAMES, masks)), levels.view(-1, 1, 1, 1)
    strength = level.abs()
    x = torch.where(masks[MOVES].any(0), moved(x, masks[MOVES] * level), x)
    x = torch.where(masks[BLENDS].any(0), blended(x, level, wanted), x)
    x = torch.where(wanted["posterize"], posterize(x, strength), x)
    x = solarize(x, strength, wanted["solarize"])
    x = autocontrast(x, wanted["autocontrast"])
    return equalize(x, wanted["equalize"])


def moved(x, levels):
    """Apply each of the MOVES to each image, by levels (5, B, 1, 1, 1), which are 0 for all but an image's own operation."""
    shear, shift, rotation = levels.flatten(1).split((2, 2, 1))  # (2, B), (2, B), (1, B)
    (shear_x, shear_y), (shift_x, shift_y) = 0.3 * shear, 2 * 150 / 331 * shift
    angle = math.pi / 6 * rotation[0]  # 30 degrees at most
    cos, sin = angle.cos(), angle.sin()
    # New pixel (x, y) is the old image's (row 0 · (x, y, 1), row 1 · (x, y, 1)); coordinates are -1 to 1, edge to edge.
    matrix = torch.stack((cos, shear_x - sin, shift_x, shear_y + sin, cos, shift_y), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def blended(x, level, wanted):
    """Interpolate, or extrapolate, from another image at factor 0 to x at factor 1. The factor is 1 + 0.9 level.

    The other image is x without what the operation (BLENDS) strengthens: colour, contrast, brightness, sharpness.
    """
    luma = grey(x)  # what "colour" starts from
    other = torch.where(wanted["contrast"], luma.mean((2, 3), keepdim=True), luma)
    other.masked_fill_(wanted["brightness"], 0)
    other = torch.where(wanted["sharpness"], smooth(x), other)  # (B, C, S, S)
    return torch.addcmul(other, 1 + 0.9 * level, x - other).clamp_(0, 255)


def grey(x):
    """(B, C, S, S) -> (B, 1, S, S), by ITU-R 601-2 luma"""
    return x if x.shape[1] == 1 else 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def smooth(x):
    """The mean of 3 x 3 pixels, in which the central one counts 5 times; edges stay as they are."""
    y = x.clone()
    y[:, :, 1:-1, 1:-1].lerp_(F.avg_pool2d(x, 3, stride=1), 9 / 13)
    return y


def posterize(x, strength):
    """Keep the highest 8 to 4 bits of each value."""
    return x - x % 2 ** (4 * strength).round()


def solarize(x, strength, wanted):
    """Turn bright values into their negatives."""
    return torch.where(wanted & (x >= 256 * (1 - strength)), 255 - x, x)


def autocontrast(x, wanted):
    """Stretch each channel to 0 … 255, unless all its values are equal."""
    low, high = (value[..., None] for value in x.flatten(2).aminmax(dim=2, keepdim=True))  # (B, C, 1, 1)
    return torch.where(wanted & (high > low), (x - low) * 255 / (high - low).clamp(min=1e-3), x)


def equalize(x, wanted):
    """Spread each channel's values evenly over 0 … 255, by its cumulative histogram, in integers."""
    values = x.round().long().flatten(2)  # (B, C, S²)
    counts = torch.zeros(*values.shape[:2], 257, device=x.device)
    counts[:, :, 1:].scatter_add_(2, values, torch.ones((), device=x.device).expand_as(values))
    below = counts.cumsum(2)  # (B, C, 257): how many pixels are less than 0 … 256
    step = (below % values.shape[2]).amax(2, keepdim=True) // 255  # (B, C, 1): pixels below the largest value, / 255
    table = ((below + step // 2) // step).clamp_(max=255)  # meaningless if step is 0: few pixels, or one value
    return torch.where(wanted & (step[..., None] > 0), table.gather(2, values).view_as(x), x)
