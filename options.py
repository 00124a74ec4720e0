"""Options of a model and of a run. The comment after a field is its help; __post_init__ checks values and combinations.

    BlockConfig   a stack of blocks and the structures in it, of any model
    GPTConfig     a GPT (model.py)
    RunConfig     a training run of any model
    TrainConfig   the training of a GPT (train.py)

This file does not import torch, so that a mistake on the command line is reported before that slow import.
"""

import copy
import difflib
import itertools
import os
from dataclasses import dataclass, fields
from typing import Literal

from configurator import ConfigError, UnusedOption
from theta import ALIGNMENT, STRUCTURES, SizeError, all_options, check_mixture, find_structure, layer_sizes

# Layers that `structured_layers` and `overrides` may name, singly or as a group ("attn" means the four attn.* roles).
ROLES = ("embed", "attn.q", "attn.k", "attn.v", "attn.proj", "ffn.up", "ffn.down", "lm_head")
BASE_WIDTH = 768  # `lr` is the rate of a dense layer of this width


@dataclass
class BlockConfig:
    """Options of a stack of blocks and of the structures in it, for any model: the GPT, and the models of vision/."""

    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    d_model: int = 768  # width of the residual stream
    d_head: int | None = None  # width of a head; None: d_model / n_head
    dropout: float = 0.0  # probability, on embeddings, attention and residual branches
    bias: bool = False  # biases in linear layers and norms (True in GPT-2)
    qkv_bias: bool = True  # with bias: biases in q, k and v, too
    zero_init_q: bool = False  # mup: q starts at zero, and attention uniform, as in "Compute Better Spent"'s ViTs
    parametrization: Literal["mup", "standard"] = "mup"  # structure-aware muP, or GPT-2's init and tied head, one rate
    structure: str = "btt"  # of structured layers: dense, low_rank, kronecker, tt, monarch, btt, einsum or your own
    theta: tuple | None = None  # with structure="einsum": seven exponents (alpha beta gamma delta epsilon phi rho)
    rank: int = 1  # of low_rank, tt and btt; of one expert in a mixture
    num_blocks: int | None = None  # of monarch; None: about the square root of the width
    num_cores: int = 2  # number of cores of tt and btt
    structure_options: dict | None = None  # options of a structure of your own: {"bands": 4} (theta.Structure)
    align_heads: bool = False  # of btt and monarch: the blocks of q, k, v and of proj's input are heads
    structured_layers: tuple = ("attn", "ffn", "lm_head")  # also embed, attn.q .k .v .proj, ffn.up .down
    overrides: dict | None = None  # by layer: {"attn.q": "dense", "ffn": {"structure": "btt", "rank": 4}}
    moe: Literal["none", "linear", "ffn"] = "none"  # mixtures of each structured layer of attn and ffn, or of FFNs
    num_experts: int = 8  # experts of a mixture
    top_k: int = 2  # experts picked for each token; with 1, routers learn from the auxiliary loss alone
    share_router: bool = False  # with moe="linear": q, k and v pick the same experts
    router_init: Literal["even", "zero"] = "even"  # even: near-even loads; zero: all tokens first pick the same experts
    expert_init: Literal["mixed", "single"] = "mixed"  # moe="linear": cores sized for top_k experts, or for one alone
    normalize: bool = True  # cap the RMS of each core of structured layers at its initial value
    normalize_dense: bool = False  # the same cap for dense matrices: they then tolerate high learning rates, too
    gains: bool = True  # a learnable scale beside each cap, except those of q and k, which have norms
    depth_exponent: float = 0.5  # mup: branches are scaled by (3 / n_layer) to this power; 1: as in CompleteP, 0: not
    activation_checkpointing: bool = False  # keep only the inputs of blocks for backward: less memory, 1/3 more FLOPs

    roles = ROLES  # of the model's layers
    causal = True  # a position does not attend to later ones
    width_options = ("d_model", "d_head")  # options that set widths of layers, in the order of remedies

    @property
    def branch_scale(self):
        """The factor of residual branches, 1 at 3 layers. With 1 / sqrt(n_layer) the sum of all branches has the same size
        at initialisation at any depth; with CompleteP's 1 / n_layer (Dey et al., 2025, arXiv 2505.01618) its change has."""
        return (3 / self.n_layer) ** self.depth_exponent if self.parametrization == "mup" else 1.0

    def __post_init__(self):
        for name in ("n_layer", "n_head", "d_model", "d_head"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: make it at least 1")
        if not 0 <= self.depth_exponent <= 1:
            raise ConfigError(f"depth_exponent={self.depth_exponent}: make it 0 to 1")
        if self.parametrization == "standard" and self.depth_exponent != 0.5:
            why = " with parametrization='standard', whose branches have no scale"
            raise UnusedOption("depth_exponent", self.depth_exponent, why)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: make it at least 0 and less than 1")
        for option, names in (("structured_layers", self.structured_layers), ("overrides", self.overrides or {})):
            for name in names:
                if not any(_covers(name, role) for role in self.roles):
                    near = difflib.get_close_matches(str(name), ("attn", "ffn", *self.roles), n=1)
                    remedy = f"did you mean {near[0]!r}?" if near else f"choose from attn, ffn, {', '.join(self.roles)}"
                    raise ConfigError(f"{option}: unknown layer {name!r}, {remedy}")
        for name, override in (self.overrides or {}).items():
            options = {"structure": override} if isinstance(override, str) else override
            of_structures = [name for name in all_options() if name not in ALIGNMENT]
            overridable = ("structure", *of_structures, "bias", "normalize")
            if not isinstance(options, dict) or not options.keys() <= set(overridable):
                if isinstance(options, dict):
                    find_structure(options.get("structure", self.structure))  # an unknown one is the likelier mistake
                raise ConfigError(
                    f"overrides: {name}={override!r}: give a structure, or a dict with keys among {', '.join(overridable)}"
                )
        self._check_structure_options()
        if self.d_head is None and self.d_model % self.n_head:
            raise ConfigError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}: take {self._heads_that_fit()}"
            )
        attention = [role for role in self.roles if role.startswith("attn.")]
        if self.align_heads and all(self.layer_options(role)["structure"] == "dense" for role in attention):
            remedy = "leave it out, or make one of them btt or monarch"
            raise UnusedOption("align_heads", True, " with dense q, k, v and proj", remedy)
        self._check_cap_of_dense_layers()
        self._check_mixtures()
        self._check_switches()

    def _check_switches(self):
        """UnusedOption for a switch that has no effect given the other options."""
        if not self.qkv_bias and not self.bias:
            raise UnusedOption("qkv_bias", False, " with bias=False", "leave it out, or take bias=True")
        if self.zero_init_q and self.parametrization == "standard":
            raise UnusedOption("zero_init_q", True, " with parametrization='standard', which starts q at GPT-2's std")
        if not self.gains and not any(self.layer_options(role)["normalize"] for role in self.layer_widths()):
            raise UnusedOption("gains", False, ", but no layer has an RMS cap")

    def _check_cap_of_dense_layers(self):
        if not self.normalize_dense and self.parametrization == "mup":
            return
        of_roles = [self.layer_options(role) for role in self.layer_widths()]
        dense = [options for options in of_roles if options["structure"] == "dense"]
        if self.normalize_dense and not dense:
            remedy = "leave it out, or make a layer dense"
            raise UnusedOption("normalize_dense", True, ", but no layer is dense", remedy)
        if self.parametrization == "standard" and any(options["normalize"] for options in dense):
            raise ConfigError(
                "the RMS cap of dense layers assumes their initial size under muP, not GPT-2's std of 0.02: "
                f"leave out normalize_dense={self.normalize_dense} and overrides of it, or take parametrization='mup'"
            )

    def _check_structure_options(self):
        if not self.structure_options:
            return
        for name in self.structure_options:
            if name in STRUCTURE_FIELDS or name in ALIGNMENT:
                remedy = f"--{name}" if name in STRUCTURE_FIELDS else "--align_heads"
                raise ConfigError(f"structure_options: {name} is a command-line option: give {remedy}")
            if name not in find_structure(self.structure).options:
                why = f" with structure={self.structure!r}, which has no {name}"
                raise UnusedOption("structure_options", self.structure_options, why)

    def layer_widths(self):
        """{role: (d_in, d_out)} of the model's layers."""
        C, heads = self.d_model, self.n_head * self.head_size
        attention = {"attn.q": (C, heads), "attn.k": (C, heads), "attn.v": (C, heads), "attn.proj": (heads, C)}
        return {**attention, "ffn.up": (C, 4 * C), "ffn.down": (4 * C, C)}

    def check_layers(self):
        """ConfigError if the sizes of a layer do not factor, or if an option does not fit its structure.

        The message offers values with which all layers of the model have sizes.
        """
        for role in self.layer_widths():
            try:
                self._check_layer(role)
            except SizeError as error:
                raise ConfigError(f"{role}: {error.problem}: take {self._remedy(role, error)}") from None
            except ConfigError as error:
                raise error.about(role) from None

    def _check_layer(self, role):
        options = self.layer_options(role)
        sizes_of = {key: value for key, value in options.items() if key not in ("bias", "normalize")}
        sizes = layer_sizes(*self.layer_widths()[role], **sizes_of)
        if self.is_mixture(role):
            check_mixture(options["structure"], sizes)

    def has_bias(self, role):
        """Whether the layer that plays `role` has a bias, if no override decides."""
        return self.bias and (self.qkv_bias or role not in ("attn.q", "attn.k", "attn.v"))

    # Remedies: each is tried before it is offered.

    def _remedy(self, role, error):
        """Options, as text, with which all layers have sizes, the one that plays `role` included."""
        if error.option in ("d_in", "d_out"):
            found = {option: self.nearest(option) for option in self.width_options if getattr(self, option)}
            texts = [f"{option}={' or '.join(map(str, values))}" for option, values in found.items() if values]
            if texts or (texts := self._two_widths()):
                return ", or ".join(texts)
        covering = self._override_of(role)
        for value in error.values:
            if covering is not None and ("structure" in covering[1] or error.option in covering[1]):
                name, override = covering
                changes = {"overrides": {**self.overrides, name: {**override, error.option: value}}}
            elif error.option in STRUCTURE_FIELDS or error.option not in all_options():
                changes = {error.option: value}
            else:
                changes = {"structure_options": {**(self.structure_options or {}), error.option: value}}
            if self._fits(**changes):
                return f"rank <= {value}" if "rank" in changes else ", ".join(f"{k}={v}" for k, v in changes.items())
        dense = {name: "dense" for name in self.layer_widths() if not self._fits_layer(name)}
        return f"overrides={ {**(self.overrides or {}), **dense} }"

    def nearest(self, option, at_least=None):
        """[the next lower value, the next higher value] of a width option with which all layers have sizes.

        at_least: search from this value upwards only. A value is left out if none is found within 200 steps.
        """
        own = getattr(self, option) if at_least is None else at_least
        step = self.n_head if option == "d_model" and self.d_head is None else 1
        below, above = range(own // step * step, 0, -step), range(-(-own // step) * step, own + 200 * step, step)
        only_above = at_least is not None or option == "vocab_size"  # which must hold all tokens of the data
        found = []
        for values in (above,) if only_above else (below[:200], above):
            found += list(itertools.islice((value for value in values if self._fits(**{option: value})), 1))
        return sorted(set(found))

    def _two_widths(self):
        """[d_model and vocab_size that work together, as text], for a model in which no change of one alone works."""
        if "vocab_size" not in self.width_options:
            return []
        trial = copy.copy(self)
        for far in range(1, self.d_model):
            for trial.d_model in (self.d_model - far, self.d_model + far):
                body = [role for role in trial.layer_widths() if role != "lm_head"]
                whole = self.d_head or trial.d_model % self.n_head == 0
                if whole and all(map(trial._fits_layer, body)) and (values := trial.nearest("vocab_size")):
                    return [f"d_model={trial.d_model} and vocab_size={values[0]}"]
        return []

    def _heads_that_fit(self):
        """A value of n_head, of d_model and of d_head, as text, each of which alone makes all heads equally wide."""
        heads = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
        heads.sort(key=lambda h: abs(h - self.n_head))
        share = max(1, round(self.d_model / self.n_head))
        widths = sorted(range(max(1, share // 2), 2 * share + 1), key=lambda width: abs(width - share))
        texts = [f"n_head={h}" for h in heads if self._fits(n_head=h)][:1]
        texts += [f"d_model={value}" for value in self.nearest("d_model")]
        texts += [f"d_head={width}" for width in widths if self._fits(d_head=width)][:1]
        return ", or ".join(texts or self._two_widths()) or f"n_head={heads[0]}"

    def _fits(self, **changes):
        """Whether all layers have sizes after these changes of options."""
        trial = copy.copy(self)
        vars(trial).update(changes)
        if trial.d_head is None and trial.d_model % trial.n_head:
            return False
        return all(map(trial._fits_layer, trial.layer_widths()))

    def _fits_layer(self, role):
        try:
            self._check_layer(role)
        except ConfigError:
            return False
        return True

    def _check_mixtures(self):
        defaults = {"num_experts": 8, "top_k": 2, "share_router": False, "router_init": "even", "expert_init": "mixed"}
        for name, default in defaults.items():
            if self.moe == "none" and getattr(self, name) != default:
                kinds = "'linear'" if name in ("share_router", "expert_init") else "'linear' or 'ffn'"
                remedy = f"leave it out, or take moe={kinds}"
                raise UnusedOption(name, getattr(self, name), " with moe='none', which has none", remedy)
        if self.expert_init == "single" and (self.moe == "ffn" or self.top_k == 1):
            why = " with moe='ffn', whose layers start so" if self.moe == "ffn" else " with top_k=1, which mixes none"
            raise UnusedOption("expert_init", "single", why)
        if self.num_experts < 2:
            raise ConfigError(f"num_experts={self.num_experts}: make it at least 2, or take moe='none'")
        check_top_k("top_k", self.top_k, self.num_experts)
        if self.moe == "linear" and not any(map(self.is_mixture, ROLES)):
            raise ConfigError(
                f"moe='linear' with structured_layers={self.structured_layers}: name attn or ffn there, or single layers of these"
            )
        if self.share_router and not all(map(self.is_mixture, ("attn.q", "attn.k", "attn.v"))):
            raise ConfigError(
                "share_router=True: needs mixtures in q, k and v: take moe='linear' and attn in structured_layers"
            )

    def is_mixture(self, role):
        """Whether the layer that plays `role` is a mixture, or, with moe="ffn", part of one.

        moe="linear": a layer of attn or ffn is a mixture if it is structured. An override that names a structure decides:
        "dense" means no mixture, any other a mixture. Otherwise a layer is a mixture if structured_layers has it, even
        with structure="dense" (a mixture of dense matrices), or if an override changes its other options and `structure`
        is not dense. moe="ffn": experts are whole FFNs, whatever the structures of their layers.
        """
        if self.moe == "ffn":
            return _covers("ffn", role)
        if self.moe == "none" or not (_covers("attn", role) or _covers("ffn", role)):
            return False
        _, override = self._override_of(role) or (None, None)
        if override is not None and "structure" in override:
            return override["structure"] != "dense"
        structured = any(_covers(name, role) for name in self.structured_layers)
        return structured or (override is not None and self.structure != "dense")

    @property
    def head_size(self):
        return self.d_head or self.d_model // self.n_head

    def _override_of(self, role):
        """The override that applies to a layer: (its name in `overrides`, dict of options), or None."""
        covering = [name for name in self.overrides or {} if _covers(name, role)]
        if not covering:
            return None
        name = max(covering, key=len)  # the most specific: attn.q rather than attn
        override = self.overrides[name]
        return name, {"structure": override} if isinstance(override, str) else override

    def layer_options(self, role):
        """make_linear's options for the layer that plays `role`: from an override, or `structure` and its options, or dense."""
        ours = {name: getattr(self, name) for name in STRUCTURE_FIELDS if name != "structure_options"}
        ours.update(self.structure_options or {})
        if covering := self._override_of(role):
            options = dict(covering[1])
            if "structure" not in options:
                options = {**ours, **options}
        elif any(_covers(name, role) for name in self.structured_layers):
            options = ours
        else:
            options = {"structure": "dense"}
        if options["structure"] == "dense":
            options.setdefault("normalize", self.normalize_dense)
        else:
            options.setdefault("normalize", self.normalize)
            if self.align_heads and role.startswith("attn."):
                if not ALIGNMENT.keys() <= find_structure(options["structure"]).options.keys():
                    others = " and ".join(
                        key for key, each in STRUCTURES.items() if ALIGNMENT.keys() <= each.options.keys()
                    )
                    why = f" with structure={options['structure']!r}: only {others} have blocks to align"
                    raise UnusedOption("align_heads", True, why)
                options["heads_in" if role == "attn.proj" else "heads_out"] = self.n_head
        return options


# {field: default} of the fields that define a structure: lab.search chooses them, lab.scaling_laws groups runs by them.
STRUCTURE_FIELDS = {
    field.name: field.default
    for field in fields(BlockConfig)
    if field.name in ("structure", *all_options(), "structure_options")
}


def as_fields(options):
    """A structure and its options, such as {"structure": "banded", "bands": 4}, as fields of BlockConfig."""
    own = {name: value for name, value in options.items() if name not in STRUCTURE_FIELDS}
    mine = {name: value for name, value in options.items() if name in STRUCTURE_FIELDS}
    return {**mine, "structure_options": own} if own else mine


@dataclass
class GPTConfig(BlockConfig):
    """Options of a GPT (model.py)."""

    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # at least that of the data; 50304: GPT-2's 50257, rounded up to a width that factors
    d_embed: int | None = None  # width of the token embedding, which the layer "embed" maps to d_model; None: d_model
    embedding_std: float = 1.0  # mup: initial standard deviation of the embeddings, at any width; published: 0.02
    fused_loss: bool = True  # compute large logits and their loss in chunks of tokens; False: all logits at once

    width_options = ("vocab_size", "d_embed", "d_model", "d_head")

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_size", "vocab_size", "d_embed"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: make it at least 1")
        if self.embedding_std <= 0:
            raise ConfigError(f"embedding_std={self.embedding_std}: make it more than 0")
        if self.embedding_std != 1 and self.parametrization == "standard":
            why = " with parametrization='standard', whose std is 0.02"
            raise UnusedOption("embedding_std", self.embedding_std, why)
        if self.d_embed and self.parametrization == "standard":
            raise ConfigError(
                f"d_embed={self.d_embed} with parametrization='standard', which ties embedding and head: take 'mup'"
            )

    def layer_widths(self):
        C = self.d_model
        embed = {"embed": (self.d_embed, C)} if self.d_embed else {}
        return {**embed, **super().layer_widths(), "lm_head": (C, self.vocab_size)}


def check_top_k(name, top_k, num_experts):
    """ConfigError unless 1 <= top_k <= num_experts. name: the option in the message."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"{name}={top_k} of num_experts={num_experts}: make it at least 1 and at most {num_experts}")


def _covers(name, role):
    return role == name or role.startswith(f"{name}.")


@dataclass
class RunConfig:
    """Options of a training run of any model. A training config inherits from this class and from a BlockConfig."""

    out_dir: str = "out/run"  # folder of the log, the picture and the checkpoints
    seed: int = 1337  # random seed of weights, batches and dropout
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: 16 bits on GPUs
    compile: bool | Literal["blocks"] | None = None  # torch.compile; None: on a GPU; blocks: compile block by block
    cuda_graphs: bool | None = None  # record an update as CUDA graphs; None: whenever possible
    shard: Literal["none", "fsdp"] = "none"  # fsdp: split parameters, gradients and optimizer state over all processes
    bucket_mb: int = 0  # MiB of gradients that DDP exchanges at a time, during backward; 0: all at once after backward
    timeout: float = 600.0  # seconds without progress after which a run that hangs ends
    max_steps: int = 10_000  # number of updates
    micro_batch: int = 16  # sequences or images that a process takes at a time; gradients accumulate over its batch
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_top_k: int | None = None  # experts picked for each token in evaluation; None: top_k
    save: bool = True  # write checkpoints; False: write log and picture only
    save_minutes: float = 0.0  # minutes between further checkpoints; 0: only after evaluations and at SIGUSR1
    keep_every: int = 0  # steps between checkpoints that are kept, ckpt_step500.pt; 0: keep the newest two only
    keep_best: bool = False  # keep the checkpoint of the lowest validation loss, ckpt_best.pt
    log_interval: int = 10  # steps between log lines, on the screen and in log.jsonl
    lr: float = 2e-3  # peak learning rate; mup: of dense layers of width base_width and of biases, norms and embeddings
    base_width: int = BASE_WIDTH  # mup: `lr` is the rate of a dense layer with this many inputs
    base_ffn_expansion: int = 1  # mup: `lr` is the rate of ffn.down with this times base_width inputs; published: 1, 4
    warmup_steps: int = 200  # steps of linear warm-up
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # after warm-up; wsd: constant, then linear decay
    min_lr_ratio: float = 0.1  # final rate / peak rate, of cosine and wsd
    decay_fraction: float = 0.2  # share of max_steps in which wsd decays
    weight_decay: float = 0.1  # of matrices; a step shrinks them by the factor 1 - lr * weight_decay
    scale_decay: bool = False  # mup: the factor is 1 - lr * lr multiplier * weight_decay, as published
    router_balance: float = 0.1  # largest step of routers' biases, in stds of their logits; 0: no balancing by bias
    beta2: float = 0.95  # beta2 of Adam
    grad_clip: float = 1.0  # largest norm of the gradient, above which it is scaled down; 0: no limit
    init_from: str = ""  # initial weights: another run's out_dir, a checkpoint, or nanoGPT's ckpt.pt
    resume: bool = False  # resume from out_dir's newest checkpoint, if there is one; restarts by torchrun always do
    wandb: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "nanoeinsum"  # project in Weights & Biases

    # Names of options in nanoGPT, and what takes their place here.
    elsewhere = {
        "learning_rate": "lr", "max_iters": "max_steps", "lr_decay_iters": "max_steps", "warmup_iters": "warmup_steps",
        "min_lr": "min_lr_ratio, a share of lr", "decay_lr": "schedule", "eval_iters": "eval_tokens",
        "n_embd": "d_model", "dataset": "data_dir", "wandb_log": "wandb",
        "batch_size": "micro_batch, sequences that a process takes at a time",
        "gradient_accumulation_steps": "batch_tokens, tokens of all processes in an update",
        "always_save_checkpoint": "save", "backend": "device, which chooses it", "beta1": "0.9, in optim.py",
        "eval_only": "max_steps with resume: a run evaluates at its last step", "wandb_run_name": "out_dir", "out": "out_dir",
    }  # fmt: skip

    def __post_init__(self):
        at_least(1, self, "max_steps", "micro_batch", "eval_interval", "log_interval")
        check_seed("seed", self.seed)
        at_least(0, self, "save_minutes", "keep_every", "bucket_mb", "lr", "warmup_steps", "min_lr_ratio")
        at_least(0, self, "weight_decay", "grad_clip", "router_balance")
        at_least(1, self, "base_width", "base_ffn_expansion")
        standard = getattr(self, "parametrization", "mup") == "standard"  # RunConfig itself has no parametrization
        for name, default in (("base_width", BASE_WIDTH), ("base_ffn_expansion", 1)):
            if standard and getattr(self, name) != default:
                why = " with parametrization='standard', where all parameters learn at lr"
                raise UnusedOption(name, getattr(self, name), why)
        if self.scale_decay and (not self.weight_decay or standard):
            why = " with parametrization='standard', which has no multipliers" if standard else " with weight_decay=0"
            raise UnusedOption("scale_decay", True, why)
        if self.router_balance != 0.1 and getattr(self, "moe", "none") == "none":
            raise UnusedOption("router_balance", self.router_balance, " with moe='none', which has no routers")
        if self.eval_top_k is not None:
            if self.moe == "none":
                raise UnusedOption("eval_top_k", self.eval_top_k, " with moe='none', which has no experts")
            check_top_k("eval_top_k", self.eval_top_k, self.num_experts)
        for name in ("save_minutes", "keep_every", "keep_best"):
            if getattr(self, name) and not self.save:
                raise UnusedOption(name, getattr(self, name), " with save=False, which makes no checkpoints")
        self._check_init_from()
        if not 0 < self.timeout <= 1e6:
            raise ConfigError(f"timeout={self.timeout}: make it more than 0 and at most 1e6 seconds")
        for name in ("decay_fraction", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it more than 0 and less than 1")

    def _check_init_from(self):
        """ConfigError for the values of nanoGPT, and for this run's own folder."""
        path = self.init_from
        if not path:
            return
        remedies = {"scratch": "leave it out, it is the default", "resume": "take --resume", "auto": "take --resume"}
        if path in remedies or (path.startswith("gpt2") and not os.path.exists(path)):
            convert = (
                f"make a checkpoint of it: python -m lab.convert --source={path} --structure=dense --out_dir=out/{path}"
            )
            raise ConfigError(f"init_from={path}: {remedies.get(path, convert)}")
        if os.path.realpath(self.out_dir) in (os.path.realpath(path), os.path.dirname(os.path.realpath(path))):
            raise ConfigError(
                f"init_from={path} is in out_dir={self.out_dir}, where this run saves: give another out_dir"
            )


def check_seed(name, value):
    """ConfigError if torch or numpy does not accept the seed. name: the option in the message."""
    if not 0 <= value < 2**63:
        raise ConfigError(f"{name}={value}: make it at least 0 and less than 2^63")


def at_least(least, config, *names):
    """ConfigError if one of the named options of config is less than `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name)}: make it at least {least}")


@dataclass
class TrainConfig(RunConfig, GPTConfig):
    data_dir: str = "data/owt_gpt2"  # folder that prepare_owt.py wrote; data/stdlib_char96 is made when it is missing
    batch_tokens: int = 524_288  # tokens per update, of all processes together
    eval_tokens: int = 2_097_152  # validation tokens per evaluation, the same ones every time
    sample_tokens: int = 0  # tokens of sampled text to print at the end; 0: none

    def __post_init__(self):
        GPTConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        at_least(1, self, "batch_tokens", "eval_tokens")
        at_least(0, self, "sample_tokens")
        if self.sample_tokens and not self.save:
            raise ConfigError(
                f"sample_tokens={self.sample_tokens} with save=False: the text is sampled from the checkpoint, leave one of them out"
            )
        self.check_layers()
