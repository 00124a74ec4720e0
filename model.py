"""A GPT-2 in which every linear projection is a structured matrix.

There are two parametrisations. "mup" (structure-aware µP; "Compute Better Spent", ICML 2024, section 3,
with depth-µP and QK-norm) keeps the best learning rate the same when width or structure changes.
"standard" is GPT-2 as published: with structure="dense" it can load GPT-2's weights (engine/huggingface.py).
The learning rates of both are in optim.py.

Shapes: B batch, T time, S positions in a cache, C = d_model, nh = n_head, hs = d_head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError
from einsum_linear import Dense, apply_together, make_linear
from kernels.attention import fits_attention, short_attention
from kernels.common import gelu
from kernels.loss import linear_cross_entropy
from moe import (
    DenseMixture,
    MixtureOfFFNs,
    Router,
    Routers,
    checkpoint_routed,
    make_mixture,
    mix_together,
)

LOGITS_AT_ONCE = 2**29  # with more logits the loss is computed in chunks: 1 GiB in 16 bits


def linear(config, role, **kwargs):
    """The layer that plays `role`, with the widths and the structure that the config gives it: one matrix, or a mixture."""
    d_in, d_out = config.layer_widths()[role]
    arguments = {"bias": config.has_bias(role), **kwargs, **config.layer_options(role)}
    arguments["gain"] = config.gains and kwargs.get("gain", True)
    try:
        if not config.is_mixture(role):
            return make_linear(d_in, d_out, **arguments)
        linear = config.moe == "linear"
        routed = linear and not (config.share_router and role in ("attn.q", "attn.k", "attn.v"))
        arguments |= {"routed": routed, "mixed": linear and config.expert_init == "mixed"}
        arguments["zero_router"] = config.router_init == "zero"
        return make_mixture(d_in, d_out, config.num_experts, config.top_k, **arguments)
    except ConfigError as error:
        config.check_layers()  # raises an error whose remedy works for all layers
        raise error.about(role) from None


def make_router(config):
    """A router of inputs of the model's width."""
    return Router(config.d_model, config.num_experts, config.top_k, zero_init=config.router_init == "zero")


class Attention(nn.Module):
    """Self-attention, causal in a GPT. Under muP each head normalises queries and keys, and logits are scaled by 8/d_head."""

    def __init__(self, config):
        super().__init__()
        nh, hs = config.n_head, config.head_size
        mup = config.parametrization == "mup"
        self.n_head, self.head_size, self.dropout = nh, hs, config.dropout
        self.scale = 8 / hs if mup else 1 / math.sqrt(hs)
        self.causal = config.causal
        self.router = make_router(config) if config.share_router else None
        # QK-norm undoes the scale of q and k at once, so their cores have no gains.
        # If q starts at zero, its LayerNorm passes on that zero, and gradients times 1 / sqrt(eps), which Adam divides out.
        self.q = linear(config, "attn.q", gain=not mup, zero_init=config.zero_init_q)
        self.k = linear(config, "attn.k", gain=not mup)
        self.v = linear(config, "attn.v")
        self.q_norm = nn.LayerNorm(hs, bias=config.bias) if mup else nn.Identity()
        self.k_norm = nn.LayerNorm(hs, bias=config.bias) if mup else nn.Identity()
        self.proj = linear(config, "attn.proj", zero_init=True)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        layers = (self.q, self.k, self.v)
        qkv = apply_together(layers, x) if self.router is None else mix_together(self.router, layers, x)
        q, k, v = (y.view(B, T, self.n_head, self.head_size) for y in qkv)
        dropout = self.dropout if self.training else 0.0
        # One kernel that includes the norms. To change attention, delete this branch: the code below is the definition.
        if cache is None and not dropout and fits_attention(q, self.q_norm, self.k_norm):
            weights = (getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm))
            y = short_attention(q, k, v, *weights, self.scale, self.causal)  # (B, T, nh, hs)
            return self.proj(y.flatten(2))  # (B, T, C)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast LayerNorm returns float32
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, nh, T, hs)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self, k, v)  # (B, nh, S, hs), (T, S)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, scale=self.scale, dropout_p=dropout
        )  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FFN(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.up = linear(config, "ffn.up")  # C -> 4C
        self.down = linear(config, "ffn.down", zero_init=True)  # 4C -> C

    def forward(self, x):
        return self.down(self.up(x), input_fn=gelu)  # down(gelu(up(x))): some kernels apply a GELU to what they read


def make_ffn(config):
    """An FFN, or with moe="ffn" a mixture of FFNs."""
    if config.moe != "ffn":
        return FFN(config)
    router, up = make_router(config), linear(config, "ffn.up")
    return MixtureOfFFNs(router, up, linear(config, "ffn.down", zero_init=True), gelu)


def as_autocast(x):
    """x, cast to bfloat16 under bfloat16 autocast, so that the residual stream moves half the bytes."""
    to_bf16 = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return x.bfloat16() if to_bf16 else x


class Block(nn.Module):
    """A transformer block, x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.ffn = make_ffn(config)
        self.dropout = nn.Dropout(config.dropout)
        self.branch_scale = config.branch_scale

    def forward(self, x, cache=None):
        x = self.add(x, self.attn(self.attn_norm(x), cache))
        return self.add(x, self.ffn(self.ffn_norm(x)))

    def add(self, x, branch):
        branch = self.dropout(branch)
        return x + (branch if self.branch_scale == 1 else self.branch_scale * branch)


def run_block(block, x, config, *cache):
    """block(x). In training with activation_checkpointing, the backward pass recomputes the block from x."""
    if not (config.activation_checkpointing and block.training):
        return block(x, *cache)
    rng = dict(preserve_rng_state=config.dropout > 0)
    if config.moe != "none":
        return checkpoint_routed(block, x, **rng)
    return checkpoint(block, x, use_reentrant=False, **rng)


def add_auxiliary_loss(model, loss):
    """The loss of a batch plus, when a model with mixtures trains, the auxiliary loss of its routers (moe.Routers)."""
    return model.routers.add_loss(loss) if model.routers is not None and model.training else loss


class GPT(nn.Module):
    """GPT(config)(idx, targets=None) -> (logits, loss)

    idx      (B, T) int64 token ids, T <= block_size
    targets  (B, T) int64, -1 where no loss is wanted
    logits   (B, T, vocab_size) in the compute dtype; None if the loss was computed in chunks (fused_loss)
    loss     mean cross-entropy in nats, float32, or None without targets. In training, mixtures add their auxiliary
             loss; `routers.cross_entropy` is the loss without it
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_embed or config.d_model)
        self.embed = linear(config, "embed") if config.d_embed else nn.Identity()
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.lm_head = linear(config, "lm_head", bias=False, zero_init=True)
        if config.parametrization == "standard":
            self._init_as_gpt2()
        else:
            for embedding in (self.token_embedding, self.position_embedding):
                nn.init.normal_(embedding.weight, std=config.embedding_std)
        self.routers = Routers.of(self) if config.moe != "none" else None  # reads the routers

    def _init_as_gpt2(self):
        """std 0.02, smaller at the end of residual branches, and the head tied to the embedding (GPT-2 report, section 2.3).

        Structured cores keep the initialisation for their sizes, for which 0.02 would be arbitrary, and routers theirs,
        which treats all experts alike. A structured head cannot be tied.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (Dense, DenseMixture)):
                nn.init.normal_(module.cores[0], std=0.02)
        for block in self.blocks:
            for layer in (block.attn.proj, block.ffn.down):
                if isinstance(layer, (Dense, DenseMixture)):
                    nn.init.normal_(layer.cores[0], std=0.02 / math.sqrt(2 * self.config.n_layer))
        if isinstance(self.lm_head, Dense):
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx, targets=None):
        logits, loss = self.head(self.trunk(idx), targets)
        return logits, add_auxiliary_loss(self, loss)

    def head(self, x, targets=None):
        """LM head and loss: x (B, T, C) -> logits and cross-entropy, either of them None as in `forward`."""
        vocab_size = self.config.vocab_size
        if targets is not None and self.config.fused_loss and x.shape[:-1].numel() * vocab_size > LOGITS_AT_ONCE:
            chunk = max(1, LOGITS_AT_ONCE // vocab_size // 1024) * 1024
            return None, linear_cross_entropy(self.lm_head, x.flatten(0, 1), targets.flatten(), chunk)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def trunk(self, idx, cache=None):
        """Everything below the head: (B, T) ids -> (B, T, C). With a generate.KVCache, idx continues the cached positions."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit block_size={self.config.block_size}")
        position = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.next_positions(idx.size(1))
        x = self.embed(self.token_embedding(idx)) + self.position_embedding(position)  # (B, T, C)
        x = self.dropout(as_autocast(x))
        for block in self.blocks:
            x = run_block(block, x, self.config, cache)
        return self.final_norm(x).to(x.dtype)

    def flops_per_token(self):
        """FLOPs per token of a forward pass at full context, 2 for each multiplication; training costs 3 times as many.

        The sum over layers (of a mixture, top_k experts and the router), plus attention's two T × T products, which are
        counted in full (not halved for causality) as in torch's flop counter and in PaLM's MFU.
        """
        layers = sum(module.flops_per_token for module in self.modules() if hasattr(module, "cores"))
        attention = 2 * 2 * self.config.block_size * self.config.n_head * self.config.head_size
        return layers + self.config.n_layer * attention
