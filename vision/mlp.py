"""A residual MLP on the flattened pixels of an image, or on any vector.

    input layer, GELU, LayerNorm; blocks x + down(GELU(up(LayerNorm(x)))) of width -> 4 width -> width; head

("Compute Better Spent", ICML 2024, section 5; the LayerNorms as in "Searching for Efficient Linear
Layers", NeurIPS 2024, section 5). What writes to the residual stream, and the head, start at zero.

Shapes: B batch, D = channels · image_size², C = d_model. Imports from the root's configurator, kernels and model.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from configurator import ConfigError
from kernels import gelu
from model import FFN, BlockConfig, as_autocast, linear, result, through

# Options of attention, as they are where there is none.
ATTENTION = {"n_head": 1, "d_head": None, "align_heads": False, "share_router": False}


def refuse(config, why, holds, **defaults):
    """ConfigError for an option that would do nothing: where `holds`, these must be left as they are."""
    for name, default in defaults.items():
        if holds and getattr(config, name) != default:
            raise ConfigError(f"{name}={getattr(config, name)}: {why}: leave it out")


@dataclass
class MLPConfig(BlockConfig):
    """Options of the MLP, whatever its input is."""

    n_layer: int = 3  # blocks
    n_head: int = 1  # attention heads of a ViT
    d_model: int = 512  # width of the residual stream
    bias: bool = True  # biases in linear layers and norms
    structured_layers: tuple = ("input", "attn", "ffn")  # or attn.q .k .v .proj, ffn.up .down, head

    roles = ("input", "attn.q", "attn.k", "attn.v", "attn.proj", "ffn.up", "ffn.down", "head")
    causal = False

    def __post_init__(self):
        super().__post_init__()
        if self.parametrization != "mup":
            raise ConfigError(f"parametrization={self.parametrization!r} is GPT-2's: vision models have 'mup'")


@dataclass
class ImageConfig(MLPConfig):
    """Options of the models of images."""

    model: Literal["mlp", "vit"] = "mlp"  # residual MLP on the pixels, or vision transformer
    image_size: int = 32  # pixels a side
    channels: int = 3  # 1: grey
    n_classes: int = 10  # at least the data's
    shuffle_pixels: bool = False  # MLP: pixels in another order, the same for all images
    patch_size: int = 8  # ViT: pixels a side of what is one token
    pool: Literal["token", "mean"] = "token"  # ViT: the head reads a class token, or the mean of all

    def __post_init__(self):
        refuse(self, "model='mlp' has none", self.model == "mlp", patch_size=8, pool="token", **ATTENTION)
        refuse(self, "model='vit' has patches", self.model == "vit", shuffle_pixels=False)
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

    @property
    def block_size(self):
        """Tokens of a ViT: patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + (self.pool == "token")

    @property
    def d_out(self):
        return self.n_classes


class MLPBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.ffn = FFN(config)
        self.dropout = nn.Dropout(config.dropout)
        self.branch_scale = (3 / config.n_layer) ** 0.5  # depth-muP, as in model.Block

    def forward(self, x):
        routings = [] if self.training else None
        return x + self.branch_scale * self.dropout(self.ffn(self.norm(x), routings)), routings


class MLP(nn.Module):
    """MLP(config)(x, targets=None) -> (y, loss)

    x        (B, …) float, D numbers each
    targets  (B,) int64 classes, (B, d_out) probabilities, or what another `loss` takes
    y        (B, d_out); loss, float32: mean cross-entropy in nats, or `loss`(y, targets)
    apart    as of model.GPT: in training mode of mixtures, the reports of all routers as a third
    """

    def __init__(self, config, loss=F.cross_entropy):
        super().__init__()
        self.config, self.loss = config, loss
        self.input = linear(config, "input", config.d_in, config.d_model)
        self.input_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.blocks = nn.ModuleList(MLPBlock(config) for _ in range(config.n_layer))
        self.head = linear(config, "head", config.d_model, config.d_out, zero_init=True)
        if getattr(config, "shuffle_pixels", False):
            order = torch.randperm(config.d_in, generator=torch.Generator().manual_seed(42), device="cpu")
            self.register_buffer("order", order.to(self.input_norm.weight.device))

    def forward(self, x, targets=None, apart=False):
        x = x.flatten(1)  # (B, D)
        if hasattr(self, "order"):
            x = x[:, self.order]
        x = as_autocast(self.input_norm(gelu(self.input(x))))  # (B, C)
        x, routings = through(self.blocks, x, self.config)
        y = self.head(x)
        return result(y, None if targets is None else self.loss(y.float(), targets), routings, apart)

    def passes(self, role):
        """How often an input makes the layer that plays `role` work."""
        return 1

    def flops(self):
        """FLOPs of a forward pass on one input, 2 a multiplication."""
        return sum(module.flops_per_token for module in self.modules() if hasattr(module, "cores"))
