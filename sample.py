"""Sample text from a checkpoint.

python sample.py --out_dir=out/quickstart --start="def " --num_samples=3
python sample.py --out_dir=out/gpt2_btt --start=FILE:prompt.txt --top_p=0.9
python sample.py --out_dir=out/gpt2_btt_moe --experts_top_k=4
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial

from configurator import ConfigError, RunFailed, as_script, load_config
from data import tokenizer_of
from options import GPTConfig, check_seed
from text_files import first_line, normalise, read_text


@dataclass
class SampleConfig:
    out_dir: str = "out/run"  # folder of the run, or one checkpoint
    start: str = ""  # prompt; FILE:path reads it from a file; empty: the beginning of a document
    num_samples: int = 1  # texts, all continuing the same prompt
    max_new_tokens: int = 500  # tokens of each text
    temperature: float = 0.8  # of the distribution; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens that together have probability p
    experts_top_k: int | None = None  # experts of a mixture that each token uses; None: as many as in training
    seed: int = 1337  # of the draws
    device: str = "auto"  # cuda, cpu, mps; auto: a GPU where there is one
    bpe_dir: str | None = None  # folder with GPT-2's vocab.bpe and encoder.json, for a machine without network

    def __post_init__(self):
        limits = {"num_samples": (1, 2**31), "max_new_tokens": (1, 2**31), "temperature": (0, 1e30)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least {least} and at most {most}")
        check_seed("seed", self.seed)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: make it at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: make it more than 0 and at most 1, or None")


if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    as_script(partial(load_config, SampleConfig))

import torch

from engine import checkpoint
from engine.device import choose_device
from generate import generate
from model import GPT
from moe import set_top_k


def load_model(out_dir):
    """A run's newest checkpoint -> (the GPT on the CPU, in float32; the contents of its data's meta.json).

    out_dir  folder of a run or of nanoGPT, or one checkpoint. ConfigError if it holds no GPT.
    """
    saved = load_checkpoint(out_dir)
    if saved is None:
        raise ConfigError(f"out_dir={out_dir} holds no checkpoint: train one, or give another --out_dir")
    if "vocab_size" not in saved["config"]:
        raise ConfigError(f"out_dir={out_dir} holds a model of images: give the out_dir of a run of train.py")
    names = {field.name for field in fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{key: value for key, value in saved["config"].items() if key in names}))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{saved['path']}: its options are not a GPT's ({first_line(error)}): take another") from None
    checkpoint.check_shapes(saved["path"], saved["model"], model.state_dict())
    model.load_state_dict(saved["model"])
    return model.eval(), saved["meta"]


def load_checkpoint(out_dir):
    """As checkpoint.load; of a folder that holds nanoGPT's ckpt.pt, which a run would not take for its own, that one."""
    said = []
    try:
        return checkpoint.load(out_dir, say=said.append)
    except RunFailed as error:
        with suppress(RunFailed):
            return checkpoint.load(os.path.join(out_dir, "ckpt.pt"), say=lambda text: None)
        raise error
    finally:
        print(*said, sep="\n", end="\n" * bool(said), file=sys.stderr)


def read_prompt(config, tokenizer, block_size):
    """The prompt that `config.start` gives -> (its text, the ids of its last block_size tokens, at least one).

    ConfigError if it cannot be read or encoded.
    """
    text = config.start
    try:
        text = read_text(text.removeprefix("FILE:")) if text.startswith("FILE:") else normalise(text)
        ids = tokenizer.encode(text)
    except ConfigError as error:
        raise ConfigError(f"start: {error}") from None
    if len(ids) > block_size:
        print(f"note: start has {len(ids)} tokens, but the model reads only the last {block_size}", file=sys.stderr)
    return text, ids[-block_size:] or tokenizer.document_start


def sample(model, tokenizer, ids, config, device):
    """-> config.num_samples texts that continue the prompt `ids`, generated together. model on `device`."""
    prompt = torch.tensor([ids] * config.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(config.seed)
    draws = (config.temperature, config.top_k, config.top_p, generator)
    out = generate(model, prompt, config.max_new_tokens, *draws, vocab_size=tokenizer.vocab_size)
    return [tokenizer.decode(row[len(ids) :]) for row in out.tolist()]


def main(argv):
    config = load_config(SampleConfig, argv)
    model, meta = load_model(config.out_dir)
    if config.experts_top_k is not None:
        set_top_k(model, config.experts_top_k, option="experts_top_k")
    try:
        tokenizer = tokenizer_of(meta, config.bpe_dir)
    except ConfigError as error:
        raise ConfigError(f"out_dir={config.out_dir}: {error}") from None
    prompt, ids = read_prompt(config, tokenizer, model.config.block_size)
    device = choose_device(config.device)
    try:
        texts = sample(model.to(device), tokenizer, ids, config, device)
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # a GPU's torch.OutOfMemoryError is a RuntimeError; a CPU has no class for it
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ConfigError(
            f"num_samples={config.num_samples}, max_new_tokens={config.max_new_tokens}: out of memory: lower them"
        ) from None
    for text in texts:
        print(prompt + text)
        print("-" * 68)


if __name__ == "__main__":
    as_script(main)
