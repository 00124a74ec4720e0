"""Token files on disk -> batches, and the two tokenizers.

A data folder holds `train.bin`, `val.bin` (uint8 or uint16 ids) and `meta.json`, as prepare_owt.py
writes them. A batch is a pure function of (seed, step): each rank derives the offsets of the whole
batch and takes its share, so that a resumed run, or one on another number of GPUs, sees the same data.
With `row_tokens` in meta.json sequences start at its multiples: images as tokens, by vision/data.py.
Imports from configurator.
"""

import json
import os

import numpy as np
import torch

from configurator import ConfigError


class TokenData:
    """The memory-mapped tokens of one data folder."""

    def __init__(self, data_dir, block_size):
        self.data_dir, self.block_size = data_dir, block_size
        self.meta = read_meta(data_dir)
        self.row_tokens = int(self.meta.get("row_tokens", 0))
        if 0 < self.row_tokens <= block_size:
            raise ConfigError(
                f"block_size={block_size}, but a row of {data_dir} has {self.row_tokens} tokens: take {self.row_tokens - 1}"
            )
        self.tokens = {split: self._open(split) for split in ("train", "val")}

    def _open(self, split):
        path = os.path.join(self.data_dir, f"{split}.bin")
        if not os.path.isfile(path):
            raise ConfigError(f"data_dir={self.data_dir}: {split}.bin is missing: make it with prepare_owt.py")
        dtype, count = np.dtype(self.meta["dtype"]), self.meta[f"{split}_tokens"]
        if os.path.getsize(path) != count * dtype.itemsize:
            raise ConfigError(
                f"{path} has {os.path.getsize(path)} bytes, but meta.json counts {count} {dtype} tokens: "
                "make it anew with prepare_owt.py"
            )
        if count <= self.block_size:
            more = ", or prepare the data with a larger --val_fraction" * (split == "val")
            raise ConfigError(
                f"{path} has {count} tokens: take a block_size below that (it is {self.block_size}){more}"
            )
        return np.memmap(path, dtype=dtype, mode="r")

    def train_batch(self, seed, step, rows, start, stop):
        """Rows start..stop of the training batch of `step`, which has `rows` rows in all.

        -> inputs and targets, int64 (stop - start, block_size); targets are one token ahead.
        """
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        stride = self.row_tokens or 1
        starts = -(-(len(self.tokens["train"]) - self.block_size) // stride)
        return self._rows("train", generator.integers(0, starts, size=rows)[start:stop] * stride)

    def val_rows(self, eval_tokens):
        """Offsets of the fixed validation set: whole contexts that do not overlap, spread evenly over the file."""
        stride = self.row_tokens or self.block_size
        available = (len(self.tokens["val"]) - 1 - self.block_size) // stride + 1
        count = max(1, min(available, eval_tokens // self.block_size))
        return np.arange(count) * available // count * stride

    def val_batch(self, offsets):
        return self._rows("val", offsets)

    def _rows(self, split, offsets):
        rows = self.tokens[split][np.asarray(offsets)[:, None] + np.arange(self.block_size + 1)]
        if rows.max() >= self.meta["vocab_size"]:
            raise ConfigError(
                f"{self.data_dir}/{split}.bin holds token {rows.max()}, but meta.json counts {self.meta['vocab_size']} "
                "of them: one of the two is of other data; make both anew with prepare_owt.py"
            )
        rows = torch.from_numpy(rows.astype(np.int64))  # (rows, block_size + 1)
        return rows[:, :-1], rows[:, 1:]


def read_meta(data_dir):
    path = os.path.join(data_dir, "meta.json")
    if not os.path.isfile(path):
        raise ConfigError(
            f"data_dir={data_dir}: {path} is missing: make the data with prepare_owt.py, of images with vision/data.py"
        )
    try:
        with open(path) as file:
            meta = json.load(file)
        if np.dtype(meta["dtype"]) not in (np.uint8, np.uint16):
            raise ValueError(f"dtype {meta['dtype']}")
        for key in ("vocab_size", "train_tokens", "val_tokens"):
            int(meta[key])
        return meta
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is broken ({error!r}): make the data anew with prepare_owt.py") from None


class CharTokenizer:
    """96 characters: id 0 is newline, id i is chr(i + 31). Other characters have no id."""

    name, vocab_size, dtype = "char96", 96, "uint8"
    document_start = [0]  # what stands before a document: the newline that ends the one before
    _characters = bytes([10, *range(32, 127)])
    _ids = bytes.maketrans(_characters, bytes(range(96)))

    def encode(self, text):
        """str -> list of ids; ConfigError names the first character without one."""
        ids = self.encode_document(text)
        if ids is None:
            at, bad = next((at, char) for at, char in enumerate(text) if char != "\n" and not " " <= char <= "~")
            raise ConfigError(f"character {bad!r} at position {at} is not in the 96-character vocabulary: leave it out")
        return list(ids)

    def encode_document(self, text):
        """str -> ids as bytes, or None where some character has no id. No Python loop: 2 passes in C."""
        raw = text.encode("utf-8", "surrogatepass")
        return None if raw.translate(None, self._characters) else raw.translate(self._ids)

    def decode(self, ids):
        return bytes(self._characters[i] for i in ids).decode("ascii")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken.

    bpe_dir  a folder with OpenAI's `vocab.bpe` and `encoder.json`, for a machine without network;
             None lets tiktoken fetch them (once: it keeps a copy).
    """

    name, vocab_size, dtype, eot = "gpt2", 50257, "uint16", 50256
    document_start = [eot]

    def __init__(self, bpe_dir=None):
        import tiktoken

        if bpe_dir is None:
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever the network layer raises
                raise ConfigError(
                    f"tiktoken could not fetch GPT-2's merges ({type(error).__name__}): "
                    "give --bpe_dir=FOLDER with vocab.bpe and encoder.json in it"
                ) from None
        else:
            from tiktoken_ext.openai_public import r50k_pat_str

            files = [os.path.join(bpe_dir, name) for name in ("vocab.bpe", "encoder.json")]
            for path in files:
                if not os.path.isfile(path):
                    raise ConfigError(f"bpe_dir={bpe_dir}: {path} is missing")
            try:
                ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files)
            except Exception as error:
                raise ConfigError(f"bpe_dir={bpe_dir}: these are not GPT-2's files ({error!r})") from None
            self.bpe = tiktoken.Encoding(
                "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.eot}
            )

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        """Ids past 50256, which a model with a rounded-up vocabulary has, decode to nothing."""
        return self.bpe.decode([i for i in ids if i <= self.eot])


def make_tokenizer(name, bpe_dir=None):
    """The tokenizer a meta.json names: "char96" or "gpt2"."""
    if name == "char96":
        return CharTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(bpe_dir)
    raise ConfigError(f"tokenizer {name!r} is unknown: char96 or gpt2")
