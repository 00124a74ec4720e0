"""Text from a checkpoint.

    python sample.py --out_dir=out/quickstart --start="def " --num_samples=3
    python sample.py --out_dir=out/gpt2_btt --start=FILE:prompt.txt --top_p=0.9
    python sample.py --out_dir=out/gpt2_btt_moe --experts_top_k=4

Imports from configurator, device, data, checkpoint, moe and model.
"""

from dataclasses import dataclass, fields

import torch

import checkpoint
from configurator import ConfigError, as_script, load_config
from data import make_tokenizer
from device import choose_device
from model import GPT
from moe import set_top_k
from options import GPTConfig


@dataclass
class Config:
    out_dir: str = "out/run"  # folder of the run
    start: str = ""  # prompt; FILE:path reads it from a file; empty: the beginning of a document
    num_samples: int = 1  # texts, all continuing the same prompt
    max_new_tokens: int = 500  # tokens a text
    temperature: float = 0.8  # of the distribution; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens that together have probability p
    experts_top_k: int | None = None  # experts that a token of a mixture has; None: as many as in training
    seed: int = 1337  # of the draws
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU where there is one
    bpe_dir: str | None = None  # folder with GPT-2's vocab.bpe and encoder.json, for a machine without network

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least {least}")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed}: make it less than 2**63")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: make it at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: make it more than 0 and at most 1, or None")


def load_model(out_dir):
    """The model of a run's newest checkpoint, on the CPU, in float32, and the meta.json of its data."""
    saved = checkpoint.load(out_dir)
    if saved is None:
        raise ConfigError(f"out_dir={out_dir} holds no checkpoint: train one, or give another --out_dir")
    if "vocab_size" not in saved["config"]:
        raise ConfigError(f"out_dir={out_dir} holds a model of images: give the out_dir of a run of train.py")
    names = {field.name for field in fields(GPTConfig)}
    model = GPT(GPTConfig(**{key: value for key, value in saved["config"].items() if key in names}))
    checkpoint.check_shapes(saved["path"], saved["model"], model.state_dict())
    model.load_state_dict(saved["model"])
    return model.eval(), saved["meta"]


def read_prompt(config, tokenizer, block_size):
    """-> token ids of the prompt, never empty; ConfigError where it cannot be read, encoded or held."""
    text = config.start
    if text.startswith("FILE:"):
        path = text.removeprefix("FILE:")
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"start=FILE:{path} cannot be read: {error}") from None
    try:
        ids = tokenizer.encode(text)
    except ConfigError as error:
        raise ConfigError(f"start: {error}") from None
    if len(ids) > block_size:
        raise ConfigError(
            f"start has {len(ids)} tokens, the model's context holds {block_size}: shorten it to its last part"
        )
    return ids or tokenizer.document_start


def sample(model, tokenizer, ids, config, device):
    """num_samples texts that continue the prompt `ids`, generated together."""
    prompt = torch.tensor([ids] * config.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(config.seed)
    out = model.generate(prompt, config.max_new_tokens, config.temperature, config.top_k, config.top_p, generator)
    return [tokenizer.decode(row[len(ids) :]) for row in out.tolist()]


def main(argv):
    config = load_config(Config, argv)
    model, meta = load_model(config.out_dir)
    if config.experts_top_k is not None:
        set_top_k(model, config.experts_top_k, option="experts_top_k")
    tokenizer = make_tokenizer(meta["tokenizer"], config.bpe_dir)
    ids = read_prompt(config, tokenizer, model.config.block_size)
    device = choose_device(config.device)
    shown = "" if ids == tokenizer.document_start and not config.start else tokenizer.decode(ids)
    for text in sample(model.to(device), tokenizer, ids, config, device):
        print(shown + text)
        print("-" * 68)


if __name__ == "__main__":
    as_script(main)
