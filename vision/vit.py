"""A vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021) of the root's blocks.

Attention is the GPT's without its mask: separate q, k and v, a LayerNorm per head on q and k, logits times 8/d_head,
residual branches that start at zero ("Compute Better Spent", ICML 2024, section 5). Only its ends differ: patches in, one
class out.

Shapes: B batch, P patches, T = P + 1 tokens with a class token (pool="token"), otherwise T = P; C = d_model.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, add_auxiliary_loss, as_autocast, linear, run_block
from moe import Routers


class ViT(nn.Module):
    """ViT(config)(x, targets=None) -> (logits, loss)

    x        (B, channels, image_size, image_size) float
    targets  (B,) int64 classes, or (B, n_classes) probabilities
    logits   (B, n_classes); loss: mean cross-entropy in nats, float32, or None
    """

    def __init__(self, config):
        super().__init__()
        self.config, p = config, config.patch_size
        self.n_patches, self.n_tokens = (config.image_size // p) ** 2, config.block_size
        d_patch = config.channels * p * p
        self.patch_norm = nn.LayerNorm(d_patch, bias=config.bias)
        self.input = linear(config, "input")
        self.input_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.position_embedding = nn.Parameter(torch.empty(self.n_tokens, config.d_model))
        nn.init.normal_(self.position_embedding)
        if config.pool == "token":
            self.class_embedding = nn.Parameter(torch.empty(config.d_model))
            nn.init.normal_(self.class_embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.head = linear(config, "head", zero_init=True)
        self.routers = Routers.of(self) if config.moe != "none" else None

    def forward(self, x, targets=None):
        x = self.input_norm(self.input(self.patch_norm(patches(x, self.config.patch_size))))  # (B, P, C)
        if self.config.pool == "token":
            x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)  # (B, T, C)
        x = self.dropout(as_autocast(x + self.position_embedding))
        for block in self.blocks:
            x = run_block(block, x, self.config)
        x = self.final_norm(x)
        logits = self.head(x[:, 0] if self.config.pool == "token" else x.mean(dim=1))
        loss = None if targets is None else F.cross_entropy(logits.float(), targets)
        return logits, add_auxiliary_loss(self, loss)

    def layer_uses(self, role):
        """How often the layer that plays `role` is applied to one image."""
        return {"input": self.n_patches, "head": 1}.get(role, self.n_tokens)

    def flops(self):
        """FLOPs of a forward pass on one image, 2 per multiplication and addition: layers, and attention's two T × T products."""
        layers = sum(
            module.flops_per_token * self.layer_uses(name)
            for name, module in self.named_modules()
            if hasattr(module, "cores")
        )
        attention = 2 * 2 * self.n_tokens**2 * self.config.n_head * self.config.head_size
        return layers + self.config.n_layer * attention


def patches(x, size):
    """(B, c, H, W) -> (B, P, size · size · c): patches row by row, in each the pixels row by row, channels last."""
    B, c, H, W = x.shape
    x = x.view(B, c, H // size, size, W // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, size * size * c)
