"""A GPT-2 in which every linear projection is a structured matrix.

Two parametrisations. "mup" (structure-aware µP; "Compute Better Spent", ICML 2024, section 3,
with depth-µP and QK-norm) keeps the best learning rate where it is when width or structure
changes. "standard" is GPT-2 as published: with structure="dense" it loads GPT-2's weights and
equals it. The learning rates that belong to each are in optim.py.

Shapes: B batch, T time, S positions in a cache, C = d_model, nh = n_head, hs = d_head.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError
from einsum_linear import Dense, apply_together, make_linear, multiplied_out
from kernels.attention import fits_attention, short_attention
from kernels.common import gelu
from kernels.cuda_graph import Graphed
from kernels.loss import linear_cross_entropy
from moe import (
    DenseMixture,
    MixtureOfFFNs,
    Mixtures,
    Router,
    checkpoint_routed,
    make_mixture,
    mix_together,
)
from options import GPTConfig

EMBEDDING_STD = 1.0  # muP: embeddings are of size 1 whatever the width

LOGITS_AT_ONCE = 2**29  # above this number the loss is made chunk by chunk: 1 GiB in 16 bits


def linear(config, role, **kwargs):
    """The layer that plays `role`, of the widths and the structure that the config gives it: one matrix, or a mixture."""
    d_in, d_out = config.layer_widths()[role]
    arguments = {"bias": config.bias, **kwargs, **config.layer_options(role)}
    try:
        if not config.is_mixture(role):
            return make_linear(d_in, d_out, **arguments)
        linear = config.moe == "linear"
        routed = linear and not (config.share_router and role in ("attn.q", "attn.k", "attn.v"))
        return make_mixture(d_in, d_out, config.num_experts, config.top_k, routed=routed, mixed=linear, **arguments)
    except ConfigError as error:
        config.check_layers()  # it knows what would work for all layers
        raise error.about(role) from None


class Attention(nn.Module):
    """Self-attention, causal in a GPT. Under muP queries and keys have a LayerNorm a head, and logits scale as 8/d_head."""

    def __init__(self, config):
        super().__init__()
        nh, hs = config.n_head, config.head_size
        mup = config.parametrization == "mup"
        self.n_head, self.head_size, self.dropout = nh, hs, config.dropout
        self.scale = 8 / hs if mup else 1 / math.sqrt(hs)
        self.causal = config.causal
        self.router = Router(config.d_model, config.num_experts, config.top_k) if config.share_router else None
        # With QK-norm the scale of q and k is undone at once: no gain on their cores.
        self.q = linear(config, "attn.q", gain=not mup)
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
        # One kernel with the norms inside. While you change attention, delete this branch: what follows is the definition.
        if cache is None and not dropout and fits_attention(q, self.q_norm, self.k_norm):
            weights = (getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm))
            y = short_attention(q, k, v, *weights, self.scale, self.causal)  # (B, T, nh, hs)
            return self.proj(y.flatten(2))  # (B, T, C)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast leaves LayerNorm's output in float32
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
    """An FFN, or with moe="ffn" a mixture of such FFNs."""
    if config.moe != "ffn":
        return FFN(config)
    router = Router(config.d_model, config.num_experts, config.top_k)
    return MixtureOfFFNs(router, linear(config, "ffn.up"), linear(config, "ffn.down", zero_init=True), gelu)


def as_autocast(x):
    """Cast x to bfloat16 under bfloat16 autocast: the residual stream then moves half the bytes."""
    to_bf16 = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return x.bfloat16() if to_bf16 else x


class Block(nn.Module):
    """x (B, T, C) -> x"""

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
    """block(x), in training with activation_checkpointing: its inside is computed again for the backward pass."""
    if not (config.activation_checkpointing and block.training):
        return block(x, *cache)
    rng = dict(preserve_rng_state=config.dropout > 0)
    if config.moe != "none":
        return checkpoint_routed(block, x, **rng)
    return checkpoint(block, x, use_reentrant=False, **rng)


class GPT(nn.Module):
    """GPT(config)(idx, targets=None) -> (logits, loss)

    idx      (B, T) int64 token ids, T <= block_size
    targets  (B, T) int64, -1 where no loss is wanted
    logits   (B, T, vocab_size) in the compute dtype; None where the loss was made without them (fused_loss)
    loss     mean cross-entropy in nats, float32, or None. Of mixtures in training mode, the auxiliary loss is added
    (`mixtures`, moe.Mixtures, then has the cross-entropy without it)
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
                nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        self.mixtures = Mixtures.of(self) if config.moe != "none" else None  # their routers

    def _init_as_gpt2(self):
        """std 0.02, less on the residual branches, head tied to the embedding (GPT-2 report, section 2.3).

        Structured cores keep the initialisation of their own sizes: 0.02 means nothing to a core. So do routers,
        to be even at first. A structured head cannot be tied.
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
        if self.mixtures is not None and self.training:
            loss = self.mixtures.add_loss(loss)
        return logits, loss

    def head(self, x, targets=None):
        """What is above the trunk: x (B, T, C) -> logits and cross-entropy, each or None, as forward says."""
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
        """Everything below the head: (B, T) ids -> (B, T, C). With a cache, idx continues what it holds."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit block_size={self.config.block_size}")
        position = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.next_positions(idx.size(1))
        x = self.embed(self.token_embedding(idx)) + self.position_embedding(position)  # (B, T, C)
        x = self.dropout(as_autocast(x))
        for block in self.blocks:
            x = run_block(block, x, self.config, cache)
        return self.final_norm(x).to(x.dtype)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, vocab_size=None):
        """Continue idx, (B, T) with T <= block_size, by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the likeliest
        whose probabilities add up to p. vocab_size: only ids below it are drawn, which a tokenizer knows
        of a rounded-up vocabulary. Keys and values are cached; when the context is full,
        its later half is read again and generation continues from there. On a GPU structured layers
        are multiplied out meanwhile, and the step of one token is a CUDA graph.
        """
        was_training = self.training
        self.eval()
        try:
            with multiplied_out(self) if idx.is_cuda else nullcontext():
                return self._generate(idx, max_new_tokens, temperature, top_k, top_p, generator, vocab_size)
        finally:
            self.train(was_training)

    def _generate(self, idx, max_new_tokens, temperature, top_k, top_p, generator, vocab_size):
        cache = KVCache(self.config, idx.device)

        def read(tokens):
            return self.lm_head(self.trunk(tokens, cache)[:, -1]).float()  # (B, vocab_size)

        read_one = Graphed(read) if idx.is_cuda else read
        B, T = idx.shape
        idx = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
        held = 0  # positions in the cache
        for end in range(T, T + max_new_tokens):
            if held == 0 or held == self.config.block_size:
                first = 0 if held == 0 else end - max(1, self.config.block_size // 2)
                cache.clear()
                logits, held = read(idx[:, first:end]), end - first
            else:
                logits, held = read_one(idx[:, end - 1 : end]), held + 1
            idx[:, end : end + 1] = sample_token(logits[:, :vocab_size], temperature, top_k, top_p, generator)
        return idx

    def flops_per_token(self):
        """FLOPs of a forward pass at full context, 2 a multiplication; training costs 3 times that.

        Layers as they say of themselves, of a mixture its top_k experts and its router, plus attention's two T × T
        products, counted in full (not halved for causality), the convention of torch's flop counter and of PaLM's MFU.
        """
        layers = sum(module.flops_per_token for module in self.modules() if hasattr(module, "cores"))
        attention = 2 * 2 * self.config.block_size * self.config.n_head * self.config.head_size
        return layers + self.config.n_layer * attention

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2's weights: a model on the Hugging Face hub ("gpt2", "gpt2-xl") or a local folder. ConfigError for any other."""
        from transformers import GPT2LMHeadModel, PretrainedConfig

        kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
        if kind != "gpt2":
            raise ConfigError(f"{name} has model_type={kind}, but this GPT-2 needs gpt2: take another model")
        # transformers makes random numbers of weights that are missing, and drops layers that config.json does not count.
        theirs, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        dropped = [key for key in report["unexpected_keys"] if ".h." in f".{key}"]
        for names, wrong in ((report["missing_keys"], "lacks"), (dropped, "has layers beyond its n_layer:")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ConfigError(f"{name} {wrong} {min(names)}{more}: take another copy")
        c = theirs.config
        wanted = dict(
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            tie_word_embeddings=True,
        )
        for key, value in {**wanted, "n_inner": c.n_inner and 4 * c.n_embd}.items():
            if getattr(c, key) != value:
                raise ConfigError(
                    f"{name} has {key}={getattr(c, key)}, but this GPT-2 needs {value}: take another model"
                )
        model = cls(
            GPTConfig(
                block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, d_model=c.n_embd,
                bias=True, parametrization="standard", structure="dense",
            )
        )  # fmt: skip
        model.load_state_dict(gpt2_state_dict(theirs.state_dict(), c.n_layer))
        return model


# A block's modules, by our name and by Hugging Face's GPT-2; q, k and v are one module there.
GPT2_BLOCK_NAMES = {
    "attn_norm": "ln_1",
    "attn.proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def gpt2_state_dict(theirs, n_layer):
    """Hugging Face's GPT-2 weights under this file's names. Their Conv1D keeps (d_in, d_out), and q k v in one."""
    ours = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
        "lm_head.weight": theirs["transformer.wte.weight"],
    }
    for layer in range(n_layer):
        for kind in ("weight", "bias"):
            here, there = f"blocks.{layer}", f"transformer.h.{layer}"
            for our_name, their_name in GPT2_BLOCK_NAMES.items():
                ours[f"{here}.{our_name}.{kind}"] = theirs[f"{there}.{their_name}.{kind}"].t()
            for our_name, part in zip("qkv", theirs[f"{there}.attn.c_attn.{kind}"].t().chunk(3)):
                ours[f"{here}.attn.{our_name}.{kind}"] = part
    return ours


class KVCache:
    """Keys and values of the positions read so far, kept a layer, in buffers of full context.

    Their number is kept on the device and all shapes are fixed, so that a step can be a CUDA graph.
    """

    def __init__(self, config, device):
        self.every = torch.arange(config.block_size, device=device)  # (S,)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers = {}

    def clear(self):
        self.length.zero_()

    def next_positions(self, T):
        """Positions of the T tokens that come next, (T,); the caller sees to it that they fit."""
        self.positions = self.length + self.every[:T]
        self.length += T
        return self.positions

    def extend(self, layer, k, v):
        """Put k and v (B, nh, T, hs) at the next positions -> all keys, all values (B, nh, S, hs), mask (T, S)."""
        if layer not in self.buffers:
            B, nh, _, hs = k.shape
            self.buffers[layer] = [k.new_zeros(B, nh, len(self.every), hs) for _ in range(2)]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer.index_copy_(2, self.positions, new)
        return *self.buffers[layer], self.every <= self.positions[:, None]


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, vocab_size) logits -> (B, 1) token ids."""
    if temperature < 1e-30:  # which a float32 cannot be divided by, and where the likeliest takes all
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: none overflows
    if top_k is not None and top_k < logits.size(-1):
        kept = logits.topk(top_k).indices  # that many, also of equal ones
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p  # the likelier ones already make up p
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
