"""Convert a trained dense GPT to a structured one to fine-tune, or any standard GPT to a Hugging Face GPT-2.

    python -m lab.convert --source=gpt2 --out_dir=out/gpt2_btt_converted --structure=btt --rank=4 --vocab_size=50304
    python -m lab.convert --source=out/gpt2_dense --out_dir=out/low_rank --structure=low_rank --rank=64 --structured_layers=ffn
    python -m lab.convert --source=out/run --export=my_gpt2

With --out_dir each matrix becomes the nearest one of its structure (`load_dense`), everything else is copied, and a
checkpoint of step 0 is written, with its options beside it in config.py. With --export the weights of a checkpoint are
written as transformers' GPT2LMHeadModel reads them.
"""

import math
import os
import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from typing import ClassVar

from configurator import ConfigError, RunFailed, as_script, load_config
from options import GPTConfig


@dataclass
class ConvertConfig(GPTConfig):
    """GPTConfig's options that say how a matrix is structured, and those of the conversion."""

    # These come from the source, because they fix the function to approximate. A ClassVar is not an option.
    block_size: ClassVar
    n_layer: ClassVar
    n_head: ClassVar
    d_model: ClassVar
    d_head: ClassVar
    d_embed: ClassVar
    dropout: ClassVar
    bias: ClassVar
    parametrization: ClassVar
    depth_exponent: ClassVar

    vocab_size: int | None = None  # larger than the source's: pad embedding and head; None: the source's
    source: str = ""  # folder of a run, or GPT-2 of Hugging Face: a name on the hub or a folder
    out_dir: str = ""  # folder of the converted checkpoint
    export: str = ""  # new folder for a Hugging Face GPT-2, instead of out_dir

    def __post_init__(self):
        super().__post_init__()
        if self.moe != "none":
            raise ConfigError(f"moe={self.moe!r}: a matrix cannot be converted to experts, leave it out")
        if not self.source:
            raise ConfigError("source is missing: give --source=FOLDER of a run, or --source=gpt2")
        if bool(self.out_dir) == bool(self.export):
            raise ConfigError(
                f"out_dir={self.out_dir!r} and export={self.export!r}: give exactly one, "
                "--out_dir=FOLDER to convert or --export=FOLDER for Hugging Face"
            )
        if self.out_dir and os.path.realpath(self.out_dir) == os.path.realpath(self.source):
            raise ConfigError(f"out_dir={self.out_dir} is the source: give another")
        if os.path.isfile(self.out_dir):
            raise ConfigError(f"out_dir={self.out_dir} is a file: give a folder")
        for field in fields(self):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(self, field.name)
            if self.export and field.name not in ("source", "export") and value != default:
                raise ConfigError(f"{field.name}={value!r} with export: a model is exported as it is, leave it out")


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, ConvertConfig))

import torch

from data import GPT2Tokenizer
from einsum_linear import Dense
from engine import checkpoint
from engine.huggingface import GPT2_BLOCK_NAMES, load_gpt2
from engine.ownership import owning
from engine.runlog import writing
from model import GPT
from moe import Router
from sample import load_model
from text_files import first_line

# ---------------------------------------------------------------------------------------
# The source


def load_source(source):
    """A run's folder, or GPT-2 of Hugging Face -> (GPT on the CPU in float32, meta of its data). ConfigError for any other."""
    model, meta = load_run(source) if checkpoint.exists(source) else load_hugging_face(source)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ConfigError(f"source={source}: its {name} is not finite, take another")
    return model, meta


def load_run(source):
    model, meta = load_model(source)
    if model.config.moe != "none":
        raise ConfigError(f"source={source} has moe={model.config.moe!r}: mixtures cannot be converted, take another")
    return model, meta


def load_hugging_face(source):
    remedy = "give the out_dir of a run, or a GPT-2 of Hugging Face (gpt2, gpt2-medium, a folder)"
    parent = os.path.dirname(source)
    if not os.path.exists(source) and (source.count("/") > 1 or (parent and os.path.isdir(parent))):
        raise ConfigError(f"source={source} does not exist: {remedy}")  # a path; owner/name is on the hub
    try:
        model = load_gpt2(source)
    except ImportError:
        raise ConfigError(f"source={source} needs the package transformers: pip install transformers") from None
    except Exception as error:  # transformers raises many kinds: no file, no network, no such model
        reason = first_line(error).rstrip(".: ")
        raise ConfigError(f"source={source} holds no checkpoint and no GPT-2 ({reason}): {remedy}") from None
    meta = {name: getattr(GPT2Tokenizer, name) for name in ("vocab_size", "dtype")}
    return model.eval(), {"tokenizer": GPT2Tokenizer.name, **meta}


def linear_layers(model, needs):
    """{name: layer} for every layer that make_linear made; ConfigError if one, of a user's own class, lacks the method `needs`."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "cores") and not isinstance(layer, Router)
    }
    for name, layer in layers.items():
        if not hasattr(layer, needs):
            raise ConfigError(f"{name} is a {type(layer).__name__}, which has no {needs}: add that method to the class")
    return layers


# ---------------------------------------------------------------------------------------
# Dense -> structured


@torch.no_grad()
def convert(model, config):
    """A dense GPT -> (the structured GPT that `config` asks for, {layer: relative error}).

    config  ConvertConfig; its fields replace those of the same name in the model's GPTConfig
    error   ||W - W'||_F / ||W||_F, 0 for a layer that stays dense. Queries and keys under muP are compared up to a
            scale: the RMS cap takes their scale away, and the LayerNorm after them makes it irrelevant.
    """
    for name, layer in linear_layers(model, needs="cores").items():
        if not isinstance(layer, Dense):
            raise ConfigError(
                f"source={config.source}: its {name} is {type(layer).__name__}, not dense: convert from a dense model"
            )
    target = make_target(model.config, config)
    theirs = model.state_dict()
    for name, layer in linear_layers(model, needs="cores").items():
        if layer.normalize:  # the matrix that the layer multiplies by
            theirs[f"{name}.weight"] = layer.materialize()
            theirs.pop(f"{name}.gains", None)
    theirs = pad_vocabulary(theirs, target.config.vocab_size)
    layers = linear_layers(target, needs="load_dense")
    structured = [name for name, layer in layers.items() if not isinstance(layer, Dense)]
    # Embeddings, norms, biases and matrices that stay dense have the same names in both models.
    copied = {name: tensor for name, tensor in theirs.items() if name.removesuffix(".weight") not in structured}
    ours = target.state_dict()
    for name in copied.keys() - ours.keys():
        raise ConfigError(f"the source has a {name}, but the structured model has none: leave that layer dense")
    target.load_state_dict({**ours, **copied})
    errors = {}
    for name, layer in layers.items():
        W = theirs[f"{name}.weight"].double()  # (d_out, d_in); a tied head's is the embedding's
        if not isinstance(layer, Dense) or layer.normalize:
            layer.load_dense(W)
        approximation = layer.materialize().double()
        if getattr(layer, "normalize", False) and layer.gains is None:
            scale = (W * approximation).sum() / approximation.square().sum()
            if scale > 0:  # not so if a matrix is zero
                approximation = scale * approximation
                if layer.bias is not None:
                    layer.bias /= scale  # LayerNorm then reads (W x + b) / scale
        errors[name] = ((W - approximation).norm() / W.norm().clamp(min=1e-30)).item()
    return target.eval(), errors


def make_target(shape, config):
    """A new GPT of the source's GPTConfig `shape`, with the options that `config` gives in place of its own."""
    options = asdict(shape)
    options.update({name: value for name, value in vars(config).items() if name in options})
    if config.vocab_size is None:
        options["vocab_size"] = shape.vocab_size
    elif config.vocab_size < shape.vocab_size:
        enough = next(
            (size for size in wider_vocabularies(shape.vocab_size) if makes_a_model({**options, "vocab_size": size})),
            None,
        )
        remedy = f"rows are only added, take --vocab_size={enough}" if enough else "leave it out"
        raise ConfigError(f"vocab_size={config.vocab_size} is less than the source's {shape.vocab_size}: {remedy}")
    try:
        return GPT(GPTConfig(**options))
    except ConfigError as error:
        padded = next(
            (
                size
                for size in wider_vocabularies(options["vocab_size"])
                if makes_a_model({**options, "vocab_size": size})
            ),
            None,
        )
        if padded is None:
            raise
        raise ConfigError(f"{error}; or pad the vocabulary to a width that factors, --vocab_size={padded}") from None


def wider_vocabularies(vocab_size):
    """Sizes to pad a vocabulary to: multiples of 64, which make matrix products fast, then any just above."""
    first = -(-vocab_size // 64) * 64
    return (*range(first, first + 8 * 64, 64), *range(vocab_size, vocab_size + 64))


def makes_a_model(options):
    """Whether a GPT can have these options: its structures have sizes for all widths."""
    try:
        with torch.device("meta"):
            GPT(GPTConfig(**options))
    except ConfigError:
        return False
    return True


def pad_vocabulary(state, vocab_size):
    """The state dict of a GPT with rows added to embedding and head, each the mean of the existing rows.

    A row of zeros would have the logit 0, but GPT-2's logits are far below it: the new tokens would take all the
    probability. The mean row has the mean logit, so by Jensen's inequality the loss rises by at most
    log(new size / old size), 0.001 nats for 50257 -> 50304 (Hewitt, "Initializing New Word Embeddings for Pretrained
    Language Models", 2021).
    """
    state = dict(state)
    for name in ("token_embedding.weight", "lm_head.weight"):
        W = state[name]  # (vocab_size, d_model)
        state[name] = torch.cat((W, W.mean(dim=0, keepdim=True).expand(vocab_size - len(W), -1)))
    return state


def save_converted(model, meta, config):
    """Write a checkpoint of step 0 to config.out_dir, and config.py with the model's options beside it."""
    options, path = asdict(model.config), os.path.join(config.out_dir, "config.py")
    # A twentieth of the usual rate of pretraining, as nanoGPT fine-tunes GPT-2: 6e-4 there, 2e-3 of muP's width 768.
    lr = {"standard": 3e-5, "mup": 1e-4}[model.config.parametrization]
    with writing(config.out_dir, "make room, or give another out_dir"):
        checkpoint.set_aside(config.out_dir, also=("config.py",))
        os.makedirs(config.out_dir, exist_ok=True)
    checkpoint.save(
        config.out_dir,
        {
            "step": 0, "seconds": 0.0, "best_val_loss": math.inf, "wandb_id": None, "config": options, "meta": meta,
            "model": model.state_dict(), "optimizer": {}, "scaler": {},
        },
    )  # fmt: skip
    with writing(config.out_dir, "make room, or give another out_dir"), open(path, "w") as file:
        file.write(f"# The model that lab.convert made of {config.source}. To train it further:\n")
        file.write(f"#   python train.py {path} --data_dir=...\n")
        file.write(f"out_dir = {config.out_dir!r}\nresume = True  # from the converted weights\n")
        file.write(f"lr = {lr}  # a twentieth of the rate of pretraining, which would undo much of what was learned\n")
        file.writelines(f"{name} = {value!r}\n" for name, value in options.items())


# ---------------------------------------------------------------------------------------
# Ours -> Hugging Face


def export(model, folder, source, meta):
    """Write a GPT of parametrization="standard" to a new folder, as config.json and model.safetensors.

    source  what a ConfigError calls the model: Hugging Face's GPT-2 cannot hold every model
    meta    of its data; if they are GPT-2's tokens, the end of a text is one of them
    """
    c = model.config
    if c.parametrization != "standard":
        raise ConfigError(
            f"source={source} has parametrization={c.parametrization!r}, whose LayerNorm on queries and keys Hugging Face's "
            "GPT-2 does not have: export a model trained with --parametrization=standard"
        )
    if c.head_size * c.n_head != c.d_model:
        raise ConfigError(
            f"source={source} has d_head={c.head_size}, Hugging Face's GPT-2 always d_model / n_head = "
            f"{c.d_model / c.n_head:g}: export a model trained without --d_head"
        )
    linear_layers(model, needs="materialize")
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ConfigError(f"export={folder} exists and is not empty: give a new folder")
    try:
        from safetensors import SafetensorError
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ConfigError("export needs the package transformers: pip install transformers") from None
    is_gpt2s = meta.get("tokenizer") == GPT2Tokenizer.name and c.vocab_size > GPT2Tokenizer.eot
    end = GPT2Tokenizer.eot if is_gpt2s else None
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
            activation_function="gelu_new", layer_norm_epsilon=model.final_norm.eps,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=is_tied(model),
            bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip
    theirs.load_state_dict(hugging_face_state_dict(model))
    # Under another name first: a folder of the asked name is whole.
    partial = os.path.normpath(folder) + ".part"
    try:
        with writing(folder, "make room, or give another export"):
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
            theirs.save_pretrained(partial)
            os.replace(partial, folder)
    except SafetensorError as error:  # its own class, of a full disk too
        raise RunFailed(
            f"export={folder} cannot be written ({first_line(error)}): make room, or give another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_tied(model):
    """Whether the head of a GPT is its embedding."""
    return getattr(model.lm_head, "weight", None) is model.token_embedding.weight


@torch.no_grad()
def hugging_face_state_dict(model):
    """Our weights under transformers' names, structured ones as matrices: the inverse of engine.huggingface.gpt2_state_dict.

    There a linear layer stores its matrix as (d_in, d_out), q, k and v are one layer, and every bias exists.
    """

    def tensors(module):
        """-> weight and bias of a norm or linear layer, in transformers' layout."""
        weight = module.materialize().t() if hasattr(module, "materialize") else module.weight
        bias = weight.new_zeros(weight.size(-1)) if module.bias is None else module.bias
        return weight, bias

    theirs = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "lm_head.weight": model.lm_head.materialize(),
    }
    theirs["transformer.ln_f.weight"], theirs["transformer.ln_f.bias"] = tensors(model.final_norm)
    for layer, block in enumerate(model.blocks):
        there = f"transformer.h.{layer}"
        for our_name, their_name in GPT2_BLOCK_NAMES.items():
            weight, bias = tensors(block.get_submodule(our_name))
            theirs[f"{there}.{their_name}.weight"], theirs[f"{there}.{their_name}.bias"] = weight, bias
        qkv = zip(*(tensors(projection) for projection in (block.attn.q, block.attn.k, block.attn.v)))
        for kind, parts in zip(("weight", "bias"), qkv):
            theirs[f"{there}.attn.c_attn.{kind}"] = torch.cat(parts, dim=-1)  # (C, 3 C) and (3 C)
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


# ---------------------------------------------------------------------------------------


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv):
    config = load_config(ConvertConfig, argv)
    source, meta = load_source(config.source)
    if config.export:
        export(source, config.export, config.source, meta)
        print(f"{config.source} as a Hugging Face GPT-2: GPT2LMHeadModel.from_pretrained({config.export!r})")
        return
    model, errors = convert(source, config)
    added = model.config.vocab_size - source.config.vocab_size
    if added:
        print(f"embedding and head padded by {added} rows, each the mean of the {source.config.vocab_size} old ones")
    print("relative error ||W - W'|| / ||W||, parameters of each layer:")
    before, after = (linear_layers(each, needs="cores") for each in (source, model))
    for name, error in errors.items():
        kept = " (dense, kept)" if isinstance(after[name], Dense) else ""
        print(
            f"  {name:<20} {error:9.3e}   {count_parameters(before[name]):>12,} -> {count_parameters(after[name]):,}{kept}"
        )
    print(f"{count_parameters(source):,} parameters -> {count_parameters(model):,}")
    with owning(config.out_dir, "give another out_dir"):
        save_converted(model, meta, config)
    print(
        f"saved in {config.out_dir}: python train.py {os.path.join(config.out_dir, 'config.py')} --data_dir=… | "
        f"python sample.py --out_dir={config.out_dir}"
    )


if __name__ == "__main__":
    as_script(main)
