"""One image: from the bytes of its file to pixels, upright, of 8 bits, RGB or grey; crops and squares."""

import io
import math
import warnings
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


def open_image(raw):
    """A file's bytes, or a uint8 array -> PIL image, not yet decoded. Too many pixels (PIL's limit) are an error."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(raw))
        except UnidentifiedImageError:
            raise ValueError("not an image of a known format") from None


def orientation(image):
    """EXIF's orientation, 1 to 8; from 5 on, width and height are swapped.

    1 for broken EXIF, and for a TIFF, which PIL turns upright itself.
    """
    if image.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what it raises has no common base class
        return 1


def make_upright(image):
    """PIL image -> the same turned as its EXIF says."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def convert_mode(image, channels):
    """PIL image of any mode -> one of 8 bits, RGB, or grey if channels is 1."""
    if image.mode.startswith(("I", "F")):
        image = scale_to_8_bits(image)
    return image.convert("L" if channels == 1 else "RGB")


def scale_to_8_bits(image):
    """Grey image of 16 bits or more, or of floats -> 8 bits, scaled; PIL's `convert` would clip.

    16 bits have the range 0 … 65535. For longer numbers the range is unknown: it is the smallest usual one that holds
    them, or that up to the image's own maximum.
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
    """A file's bytes, or a uint8 array -> PIL image, upright, RGB or grey (channels=1). Raises exceptions of many kinds."""
    return convert_mode(make_upright(open_image(raw)), channels)


def to_square(image, size, how=Image.Resampling.BICUBIC):
    """The central square of a PIL image, resized to size x size pixels."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    if image.size == (size, size):
        return image
    return image.resize((size, size), how, box=(left, top, left + side, top + side))


def random_box(draw, width, height, min_crop):
    """left, top, right, bottom of a random crop: min_crop to all of the area, aspect ratio 3/4 to 4/3 (Szegedy et al., 2015)."""
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


def as_array(image):
    """PIL image -> uint8 (C, H, W)"""
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def decode_on(device, files, boxes, config):
    """Bytes of B image files -> uint8 (B, C, S, S) on the device, and a list of the broken ones, which are black.

    files  uint8 (bytes,) each, on the host; an empty one stays black
    boxes  (left, top, right, bottom, EXIF orientation, bytes) each: the crop
    Upright JPEGs are decoded on the GPU by torchvision, the rest on the host by PIL.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    S, mode = config.image_size, ImageReadMode.GRAY if config.channels == 1 else ImageReadMode.RGB
    jpeg = [k for k, file in enumerate(files) if bytes(file[:2].tolist()) == b"\xff\xd8" and boxes[k][-2] == 1]
    decoded, broken = {}, []
    with suppress(RuntimeError):  # one that it cannot decode, such as a CMYK image: then the host decodes all
        decoded = dict(zip(jpeg, decode_jpeg([files[k] for k in jpeg], mode=mode, device=device)))
    out = torch.zeros(len(files), config.channels, S, S, dtype=torch.uint8, device=device)
    for k, (file, box) in enumerate(zip(files, boxes)):
        if not len(file):
            continue
        image = decoded.get(k)
        if image is None:
            try:
                image = torch.from_numpy(as_array(decode(file.numpy().tobytes(), config.channels))).to(device)
            except Exception:  # what decoders raise has no common base class
                broken.append(k)
                continue
        left, top, right, bottom = (round(b) for b in box[:4])
        part = image[None, :, top:bottom, left:right].float()
        out[k] = F.interpolate(part, (S, S), mode="bilinear", antialias=True)[0].round().clamp(0, 255)
    return out, broken
