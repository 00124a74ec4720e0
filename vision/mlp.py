"""A residual MLP on the flattened pixels of an image, or on any vector.

    pixels in random order; input layer, GELU, LayerNorm (input_norm);
    blocks x + down(GELU(up(LayerNorm(x)))) of width -> 4 width -> width; head

("Compute Better Spent", ICML 2024, section 5; the LayerNorms as in "Searching for Efficient Linear
Layers", NeurIPS 2024, section 5). What writes to the residual stream, and the head, start at zero.

Shapes: B batch, D = channels · image_size², C = d_model.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels.common import gelu
from model import add_auxiliary_loss, as_autocast, linear, make_ffn, run_block
from moe import Routers


class MLPBlock(nn.Module):
    """x (B, C) -> x + branch_scale · FFN(LayerNorm(x))"""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.ffn = make_ffn(config)
        self.dropout = nn.Dropout(config.dropout)
        self.branch_scale = config.branch_scale

    def forward(self, x):
        return x + self.branch_scale * self.dropout(self.ffn(self.norm(x)))


class MLP(nn.Module):
    """MLP(config)(x, targets=None) -> (y, loss)

    x        (B, …) float, D numbers per row
    targets  (B,) int64 classes, (B, d_out) probabilities, or whatever another `loss` takes
    y        (B, d_out); loss, float32: mean cross-entropy in nats, or `loss`(y, targets)
    """

    def __init__(self, config, loss=F.cross_entropy):
        super().__init__()
        self.config, self.loss = config, loss
        self.input = linear(config, "input")
        self.input_norm = nn.LayerNorm(config.d_model, bias=config.bias) if config.input_norm else nn.Identity()
        self.blocks = nn.ModuleList(MLPBlock(config) for _ in range(config.n_layer))
        self.head = linear(config, "head", zero_init=True)
        self.routers = Routers.of(self) if config.moe != "none" else None
        if getattr(config, "shuffle_pixels", False):
            # Otherwise cores would read neighbouring pixels, an advantage over dense layers (results/vision.md).
            order = torch.from_numpy(np.random.default_rng(42).permutation(config.d_in))
            self.register_buffer("order", order.to(next(self.parameters()).device))

    def forward(self, x, targets=None):
        x = x.flatten(1)  # (B, D)
        if hasattr(self, "order"):
            x = x[:, self.order]
        x = as_autocast(self.input_norm(gelu(self.input(x))))  # (B, C)
        for block in self.blocks:
            x = run_block(block, x, self.config)
        y = self.head(x)
        loss = None if targets is None else self.loss(y.float(), targets)
        return y, add_auxiliary_loss(self, loss)

    def layer_uses(self, role):
        """How often the layer that plays `role` is applied to one input."""
        return 1

    def flops(self):
        """FLOPs of a forward pass on one input; a multiplication and addition count 2."""
        return sum(module.flops_per_token for module in self.modules() if hasattr(module, "cores"))
