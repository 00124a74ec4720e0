"""Token files on disk -> batches, and the tokenizers.

A data folder holds `train.bin`, `val.bin` (uint8 or uint16 ids) and `meta.json`, as prepare_owt.py
writes them. A batch is a pure function of (seed, step): each rank derives the offsets of the whole
batch and takes its share, so that a resumed run, or one on another number of GPUs, sees the same data.
With `row_tokens` in meta.json sequences start at its multiples: images as tokens, by vision/data.py.
Torch is imported where a batch is made: preparing text does without.
"""

import json
import math
import os
import re

import numpy as np

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
        import torch

        rows = torch.from_numpy(rows.astype(np.int64))  # (rows, block_size + 1)
        return rows[:, :-1], rows[:, 1:]


def read_meta(data_dir):
    path = os.path.join(data_dir, "meta.json")
    if is_nanogpt_folder(data_dir):
        raise ConfigError(
            f"data_dir={data_dir}: meta.json is missing: where nanoGPT made train.bin and val.bin, write it with "
            f"prepare_owt.py --source={data_dir}, else make the data anew with prepare_owt.py"
        )
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


def is_nanogpt_folder(path):
    """Whether `path` holds tokens without our meta.json, as nanoGPT's data folders do."""
    have = {name: os.path.isfile(os.path.join(path, name)) for name in ("train.bin", "val.bin", "meta.json")}
    return have["train.bin"] and have["val.bin"] and not have["meta.json"]


LANGUAGE = ("tokenizer", "vocab_size", "vocabulary", "row_tokens", "classes")  # what ids and labels stand for


def check_same_data(meta, saved, say):
    """A resumed run reads data in the language of its checkpoint; what else differs is said.

    meta, saved  plain values about the data of the run and of the checkpoint; keys that one of them lacks do not count
    """
    changed = changed_values(meta, saved)
    for key in LANGUAGE:
        if key in changed:
            raise ConfigError(
                f"the data's {key} is {shorten(meta[key])}, but the checkpoint was trained on {shorten(saved[key])}: "
                "give the data it had, or another out_dir"
            )
    if changed:
        differences = [f"{key} is {shorten(meta[key])}, it was {shorten(saved[key])}" for key in changed]
        say(f"note: the data changed since the checkpoint: {'; '.join(differences)}")


def changed_values(meta, saved):
    """Keys that both have, with other values."""
    return [key for key in meta if key in saved and not _same(meta[key], saved[key])]


def _same(a, b):
    """Whether two plain values are the same, numbers up to the rounding of float32 sums."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4)
    return a == b


def shorten(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------
# Tokenizers. Of each: name, vocab_size and dtype, as in meta.json; encode(text) -> list of ids; decode(ids) -> text;
# encode_document(text) -> its ids as bytes of dtype, or None where a character has no id, of which first_missing(text)
# is the position; document_end, the ids as bytes that follow a document; document_start, a list of the same, which is
# what a new document has before it.


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text in any language. A newline ends a document."""

    name, vocab_size, dtype = "bytes", 256, "uint8"
    document_start, document_end = [10], b"\n"

    def encode(self, text):
        return list(self.encode_document(text))

    def encode_document(self, text):
        return text.encode("utf-8", "surrogatepass")

    def decode(self, ids):
        """Bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")


class CharTokenizer:
    """96 characters: id 0 is newline, id i is chr(i + 31). Other characters have no id. A newline ends a document."""

    name, vocab_size, dtype = "char96", 96, "uint8"
    document_start, document_end = [0], b"\0"
    _characters = bytes([10, *range(32, 127)])
    _ids = bytes.maketrans(_characters, bytes(range(96)))

    def encode(self, text):
        """str -> list of ids; ConfigError names the first character without one."""
        ids = self.encode_document(text)
        if ids is None:
            raise no_id(text, self)
        return list(ids)

    def encode_document(self, text):
        """str -> ids as bytes, or None where some character has no id. No Python loop: 2 passes in C."""
        raw = text.encode("utf-8", "surrogatepass")
        return None if raw.translate(None, self._characters) else raw.translate(self._ids)

    def first_missing(self, text):
        return next(at for at, char in enumerate(text) if char != "\n" and not " " <= char <= "~")

    def decode(self, ids):
        return bytes(self._characters[i] for i in ids).decode("ascii")


class VocabularyTokenizer:
    """The characters of the data: id i is vocabulary[i], which are sorted and distinct. A newline ends a document."""

    name = "chars"

    def __init__(self, vocabulary):
        if "\n" not in vocabulary or len(vocabulary) >= 2**16 - 1:
            raise ConfigError(
                f"tokenizer=chars: {len(vocabulary)} characters; it takes up to {2**16 - 2}, a newline among them: "
                "take --tokenizer=bytes"
            )
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.dtype = "uint8" if self.vocab_size <= 256 else "uint16"
        self._ids = np.full(0x110000, 2**16 - 1, dtype=np.uint16)  # by code point; 65535: has none
        self._ids[code_points(vocabulary)] = np.arange(self.vocab_size)
        self.document_start = self.encode("\n")
        self.document_end = self.encode_document("\n")

    def encode(self, text):
        """str -> list of ids; ConfigError names the first character without one."""
        ids = self.encode_document(text)
        if ids is None:
            raise no_id(text, self)
        return np.frombuffer(ids, dtype=self.dtype).tolist()

    def encode_document(self, text):
        ids = self._ids[code_points(text)]
        return None if (ids == 2**16 - 1).any() else ids.astype(self.dtype).tobytes()

    def first_missing(self, text):
        return int(np.argmax(self._ids[code_points(text)] == 2**16 - 1))

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


def code_points(text):
    """str -> (len(text),) uint32"""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def no_id(text, tokenizer):
    at = tokenizer.first_missing(text)
    return ConfigError(
        f"character {text[at]!r} at position {at} is not in the {tokenizer.vocab_size}-character vocabulary: leave it out"
    )


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken.

    bpe_dir  a folder with OpenAI's `vocab.bpe` and `encoder.json`, for a machine without network;
             None lets tiktoken fetch them (once: it keeps a copy).
    """

    name, vocab_size, dtype, eot = "gpt2", 50257, "uint16", 50256
    document_start, document_end = [eot], np.uint16(eot).tobytes()
    # tiktoken panics on a million spaces with text behind them. Its pattern takes all of them but the last as one
    # word, so that text cut there has the same ids. Python counts four characters as space that the pattern does not.
    _long_space = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{100000,}")

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
        ids, start = [], 0
        if any(text[i : i + 50_000].isspace() for i in range(0, len(text), 50_000)):  # hardly ever; the search is slow
            for space in self._long_space.finditer(text):
                if space.end() < len(text):
                    for end in (space.start(), space.end() - 1):
                        ids += self.bpe.encode_ordinary(text[start:end])
                        start = end
        return ids + self.bpe.encode_ordinary(text[start:])

    def encode_document(self, text):
        return np.array(self.encode(text), dtype=np.uint16).tobytes()

    def decode(self, ids):
        """Ids past 50256, which a model with a rounded-up vocabulary has, decode to nothing."""
        return self.bpe.decode([i for i in ids if i <= self.eot])


TOKENIZERS = ("gpt2", "char96", "chars", "bytes")


def make_tokenizer(name, bpe_dir=None, vocabulary=None):
    """One of TOKENIZERS; bpe_dir is for gpt2, vocabulary, a string of all characters, for chars."""
    if name == "gpt2":
        return GPT2Tokenizer(bpe_dir)
    if name == "char96":
        return CharTokenizer()
    if name == "chars":
        return VocabularyTokenizer(vocabulary)
    if name == "bytes":
        return ByteTokenizer()
    raise ConfigError(f"tokenizer {name!r} is unknown: one of {', '.join(TOKENIZERS)}")


def tokenizer_of(meta, bpe_dir=None):
    """The tokenizer of a meta.json, or of the copy of it that a checkpoint holds."""
    if "row_tokens" in meta:
        raise ConfigError("its tokens are pixels of images, which are no text")
    return make_tokenizer(meta.get("tokenizer"), bpe_dir, meta.get("vocabulary"))
