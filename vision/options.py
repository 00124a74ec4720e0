"""Options of vision's models and data. The comment after a field says what it means, __post_init__ checks its value.

    MLPConfig      the residual MLP, for any input
    ImageConfig    the same, or a vision transformer, for images
    DataConfig     which images
    AugmentConfig  what is done to them in training

No torch here, as in the root's options.py.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import ConfigError, UnusedOption
from options import BlockConfig

# Options of attention, with their values in a model that has none.
ATTENTION = {
    "n_head": 1, "d_head": None, "align_heads": False, "share_router": False, "qkv_bias": True, "zero_init_q": False,
}  # fmt: skip


def refuse(config, why, holds, **defaults):
    """UnusedOption for an option that would do nothing: if `holds`, these must have their defaults. why: the reason."""
    for name, default in defaults.items():
        if holds and getattr(config, name) != default:
            raise UnusedOption(name, getattr(config, name), f": {why}")


@dataclass
class MLPConfig(BlockConfig):
    """Options of the residual MLP, for any input."""

    n_layer: int = 3  # blocks
    n_head: int = 1  # attention heads of a ViT
    d_model: int = 512  # width of the residual stream
    bias: bool = True  # biases in linear layers and norms
    input_norm: bool = True  # MLP: a LayerNorm behind the input layer; "Compute Better Spent" has none
    structured_layers: tuple = ("input", "attn", "ffn")  # or attn.q .k .v .proj, ffn.up .down, head

    roles = ("input", "attn.q", "attn.k", "attn.v", "attn.proj", "ffn.up", "ffn.down", "head")
    causal = False

    def layer_widths(self):
        C = self.d_model
        return {"input": (self.d_in, C), "ffn.up": (C, 4 * C), "ffn.down": (4 * C, C), "head": (C, self.d_out)}

    def __post_init__(self):
        super().__post_init__()
        if self.parametrization != "mup":
            raise ConfigError(f"parametrization={self.parametrization!r} is for GPT-2: vision models have 'mup'")


@dataclass
class ImageConfig(MLPConfig):
    """Options of models that read images."""

    model: Literal["mlp", "vit"] = "mlp"  # residual MLP on the pixels, or vision transformer
    image_size: int = 32  # pixels a side
    channels: int = 3  # 1: grey
    n_classes: int = 10  # at least the data's
    shuffle_pixels: bool | None = None  # MLP: pixels in a random order, the same for all images; None: yes
    patch_size: int = 8  # ViT: pixels a side of a patch, which is one token
    pool: Literal["token", "mean"] = "token"  # ViT: the head reads a class token, or the mean of all

    def __post_init__(self):
        refuse(self, "model='mlp' has none", self.model == "mlp", patch_size=8, pool="token", **ATTENTION)
        if self.shuffle_pixels is None:
            self.shuffle_pixels = self.model == "mlp"
        refuse(self, "model='vit' has patches", self.model == "vit", shuffle_pixels=False)
        refuse(self, "model='vit' always has one", self.model == "vit", input_norm=True)
        super().__post_init__()
        for name in ("image_size", "patch_size", "n_classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels={self.channels}: 3, or 1 for grey images")
        if self.model == "vit" and self.image_size % self.patch_size:
            fits = [k for k in range(1, self.image_size + 1) if self.image_size % k == 0]
            near = min(fits, key=lambda k: abs(k - self.patch_size))
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}: take patch_size={near}, "
                f"or image_size={max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )

    @property
    def d_in(self):
        return self.channels * self.image_size**2

    def layer_widths(self):
        if self.model == "mlp":
            return super().layer_widths()
        patch = self.channels * self.patch_size**2  # numbers in a patch
        inner = BlockConfig.layer_widths(self)
        return {"input": (patch, self.d_model), **inner, "head": (self.d_model, self.n_classes)}

    @property
    def block_size(self):
        """Number of tokens of a ViT: patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pool == "token")

    @property
    def d_out(self):
        return self.n_classes


@dataclass
class DataConfig:
    """Options that say which images."""

    dataset: str = "digits"  # digits (scikit-learn's), cifar10, cifar100, imagenet, or another name on the hub
    data_dir: str | None = None  # local: train/CLASS/*.jpg and val/CLASS/*.jpg, or *train*.parquet and *test*.parquet
    image_field: str | None = None  # column of the images; None: img or image
    label_field: str | None = None  # column of the labels; None: label or fine_label


@dataclass
class AugmentConfig:
    """Options that say how training images are augmented."""

    crop_padding: int = 0  # held images: black pixels around them, before a random crop of image_size
    resized_crop: bool = False  # held images: random crops resized to image_size, which streamed images always have
    min_crop: float = 0.08  # smallest part of the area that a resized crop keeps
    flip: bool = False  # flip images left to right, at random
    rand_augment: int = 0  # operations of RandAugment on each image, such as 2
    rand_level: int = 9  # their strength, 0 to 30
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of its Beta distribution; 0: none
    cutmix: float = 0.0  # alpha; with mixup too, each pair of images gets one of the two
    mixup_mode: Literal["pair", "batch"] = "pair"  # one weight for each pair of images, or for the whole batch
    label_smoothing: float = 0.0  # probability spread evenly over all classes

    def __post_init__(self):
        for name in ("crop_padding", "rand_augment", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 0")
        for name in ("random_erasing", "label_smoothing", "min_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it 0 to 1")
        if self.rand_level != 9 and not self.rand_augment:
            remedy = "leave it out, or take rand_augment=2"
            raise UnusedOption("rand_level", self.rand_level, " with rand_augment=0", remedy)
        refuse(self, "there is neither mixup nor cutmix", not (self.mixup or self.cutmix), mixup_mode="pair")
        refuse(self, "resized_crop has min_crop", self.resized_crop, crop_padding=0)
        if not 0 <= self.rand_level <= 30:
            raise ConfigError(f"rand_level={self.rand_level}: make it 0 to 30")
