"""Token files on disk -> batches, and the tokenizers.

A data folder holds `train.bin` and `val.bin` (uint8 or uint16 token ids) and `meta.json`, which prepare_owt.py writes.
A batch is a pure function of (seed, step): every rank draws the offsets of the whole batch and reads its share, so
that a resumed run, or one on another number of GPUs, sees the same data. If meta.json has `row_tokens`, sequences start
at multiples of it only: vision/data.py stores images as tokens in this form.
Torch is imported only where a batch is made, because preparing text needs none.
"""

import hashlib
import json
import math
import os
import re

import numpy as np

from configurator import ConfigError, RunFailed


class TokenData:
    """The tokens of one data folder.

    data_dir    folder with train.bin, val.bin and meta.json
    block_size  context length: a sequence is block_size inputs, and as many targets one token ahead
    meta        contents of meta.json, with a fingerprint of each file
    ConfigError if a file is missing, or is not what meta.json describes, or is shorter than one sequence.
    """

    def __init__(self, data_dir, block_size):
        self.data_dir, self.block_size = data_dir, block_size
        self.meta = read_meta(data_dir)
        self.row_tokens = self.meta.get("row_tokens", 0)
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
                "make it again with prepare_owt.py"
            )
        if count <= self.block_size:
            more = ", or prepare the data with a larger --val_fraction" * (split == "val")
            raise ConfigError(
                f"{path} has {count} tokens: take a block_size below that (it is {self.block_size}){more}"
            )
        try:
            found = fingerprint(path)
            tokens = TokenFile(path, dtype)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
        if self.meta.setdefault(f"{split}_fingerprint", found) != found:
            raise ConfigError(
                f"{path} is not the file that meta.json describes: one of the two comes from other data; "
                "make both again with prepare_owt.py"
            )
        return tokens

    def train_batch(self, seed, step, rows, start, stop):
        """Rows start..stop of the training batch of `step`, which has `rows` rows in all.

        -> inputs and targets, int64 (stop - start, block_size); targets are one token ahead.
        """
        return self._rows("train", self.train_offsets(seed, step, rows)[start:stop])

    def train_offsets(self, seed, step, rows):
        """Where the sequences of the training batch of `step` start in train.bin, (rows,) int64."""
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        stride = self.row_tokens or 1
        starts = -(-(len(self.tokens["train"]) - self.block_size) // stride)
        return generator.integers(0, starts, size=rows) * stride

    def val_rows(self, eval_tokens):
        """Offsets of the fixed validation set: whole contexts that do not overlap, spread evenly over the file."""
        stride = self.row_tokens or self.block_size
        available = (len(self.tokens["val"]) - 1 - self.block_size) // stride + 1
        count = max(1, min(available, eval_tokens // self.block_size))
        return np.arange(count) * available // count * stride

    def val_batch(self, offsets):
        """Inputs and targets, int64 (len(offsets), block_size), of the validation sequences that start at `offsets`."""
        return self._rows("val", offsets)

    def _rows(self, split, offsets):
        rows = self.tokens[split].read(offsets, self.block_size + 1)  # (rows, block_size + 1)
        if rows.max() >= self.meta["vocab_size"]:
            raise ConfigError(
                f"{self.data_dir}/{split}.bin holds token {rows.max()}, but meta.json counts {self.meta['vocab_size']} "
                "of them: one of the two comes from other data; make both again with prepare_owt.py"
            )
        import torch

        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


class TokenFile:
    """The token ids of a file, read from the disk as they are needed.

    It is not memory-mapped: if a mapped file is truncated, or its disk fails, SIGBUS kills the process without a message.
    """

    def __init__(self, path, dtype):
        self.path, self.dtype = path, np.dtype(dtype)
        self.file = open(path, "rb", buffering=0)
        self.size = os.path.getsize(path)

    def __len__(self):
        return self.size // self.dtype.itemsize

    def read(self, offsets, count):
        """`count` tokens from each of the offsets on -> (len(offsets), count), read-only. RunFailed if they are gone."""
        length, itemsize = count * self.dtype.itemsize, self.dtype.itemsize
        try:
            content = b"".join(os.pread(self.file.fileno(), length, int(at) * itemsize) for at in offsets)
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be read ({error.strerror}): see to its disk, then --resume") from None
        if len(content) != len(offsets) * length:
            raise RunFailed(
                f"{self.path} has {os.fstat(self.file.fileno()).st_size} bytes; it had {self.size} when the run started: "
                "put the data back, then --resume"
            )
        return np.frombuffer(content, self.dtype).reshape(len(offsets), count)


def fingerprint(path, blocks=64, block_bytes=4096):
    """16 hexadecimal digits that tell files apart, from their size and from blocks spread evenly over the file."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(blocks):
            file.seek(max(0, size - block_bytes) * number // (blocks - 1))
            digest.update(file.read(block_bytes))
    return digest.hexdigest()[:16]


def read_meta(data_dir):
    """The contents of a data folder's meta.json, as a dict. ConfigError if it is missing, or holds what it should not."""
    path = os.path.join(data_dir, "meta.json")
    if is_nanogpt_folder(data_dir):
        raise ConfigError(
            f"data_dir={data_dir}: meta.json is missing: if nanoGPT made train.bin and val.bin, write it with "
            f"prepare_owt.py --source={data_dir}; otherwise make the data again with prepare_owt.py"
        )
    if not os.path.isfile(path):
        raise ConfigError(
            f"data_dir={data_dir}: {path} is missing: prepare text with prepare_owt.py, images with vision/data.py"
        )
    try:
        with open(path) as file:
            meta = json.load(file)
        check_meta(meta)
        return meta
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is broken ({error}): make the data again with prepare_owt.py") from None


def check_meta(meta):
    """ValueError unless `meta` is what a meta.json should hold: the names below, each of its kind."""
    if not isinstance(meta, dict):
        raise ValueError(f"it holds a {type(meta).__name__}")
    for name in ("dtype", "vocab_size", "train_tokens", "val_tokens"):
        if name not in meta:
            raise ValueError(f"{name} is missing")
    kinds = {"vocab_size": int, "train_tokens": int, "val_tokens": int, "row_tokens": int}
    kinds |= {"tokenizer": str, "vocabulary": str, "train_fingerprint": str, "val_fingerprint": str}
    for name, kind in kinds.items():
        value = meta.get(name, kind())
        if type(value) is not kind or (kind is int and not 0 <= value < 2**63):
            raise ValueError(f"{name} is {shorten(value)}, not {'a whole number' if kind is int else 'a string'}")
    if meta["dtype"] not in ("uint8", "uint16"):
        raise ValueError(f"dtype is {shorten(meta['dtype'])}, not 'uint8' or 'uint16'")


def is_nanogpt_folder(path):
    """Whether `path` is a folder of tokens without a meta.json, as nanoGPT's data folders are."""
    have = {name: os.path.isfile(os.path.join(path, name)) for name in ("train.bin", "val.bin", "meta.json")}
    return have["train.bin"] and have["val.bin"] and not have["meta.json"]


LANGUAGE = ("tokenizer", "vocab_size", "vocabulary", "row_tokens", "classes")  # what ids and labels mean


def check_same_data(meta, saved, say):
    """ConfigError if ids or labels mean something else than when the checkpoint was trained; other changes are reported.

    meta, saved  plain values about the data of the run and of the checkpoint; only keys that both have are compared
    say          called with a line about the changes
    """
    changed = changed_values(meta, saved)
    for key in LANGUAGE:
        if key in changed:
            raise ConfigError(
                f"the data's {key} is {shorten(meta[key])}, but the checkpoint was trained on {shorten(saved[key])}: "
                "give it that data, or take another out_dir"
            )
    if changed:
        differences = [f"{key} is {shorten(meta[key])}, it was {shorten(saved[key])}" for key in changed]
        say(f"note: the data changed since the checkpoint: {'; '.join(differences)}")


def changed_values(meta, saved):
    """Keys that both dicts have, with different values."""
    return [key for key in meta if key in saved and not _same(meta[key], saved[key])]


def _same(a, b):
    """Whether two plain values are equal, floats up to the rounding of float32 sums."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4)
    return a == b


def shorten(value):
    """repr(value), cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------
# Tokenizers. Each has
#
#   name, vocab_size, dtype   as in meta.json
#   encode(text)              -> list of ids
#   decode(ids)               -> text
#   encode_document(text)     -> its ids as bytes of dtype; None if a character has no id
#   first_missing(text)       -> position of the first character without an id, if there can be one
#   document_end              what follows a document, ids as bytes of dtype
#   document_start            the same as a list of ids: what a model reads before a new document


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text in any language. A newline ends a document."""

    name, vocab_size, dtype = "bytes", 256, "uint8"
    document_start, document_end = [10], b"\n"

    def encode(self, text):
        return list(self.encode_document(text))

    def encode_document(self, text):
        return text.encode("utf-8", "surrogatepass")

    def decode(self, ids):
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
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
        """str -> ids as bytes, or None if a character has no id. No Python loop: two passes in C."""
        raw = text.encode("utf-8", "surrogatepass")
        return None if raw.translate(None, self._characters) else raw.translate(self._ids)

    def first_missing(self, text):
        return next(at for at, char in enumerate(text) if char != "\n" and not " " <= char <= "~")

    def decode(self, ids):
        return bytes(self._characters[i] for i in ids).decode("ascii")


class VocabularyTokenizer:
    """The characters of the data: id i is vocabulary[i]. They are sorted and distinct. A newline ends a document."""

    name = "chars"

    def __init__(self, vocabulary):
        if not isinstance(vocabulary, str) or "\n" not in vocabulary:
            raise ConfigError(
                f"tokenizer=chars: its vocabulary is {shorten(vocabulary)}, not characters with a newline"
            )
        if len(vocabulary) >= 2**16 - 1:
            raise ConfigError(
                f"tokenizer=chars: {len(vocabulary)} characters, of which it takes up to {2**16 - 2}: take --tokenizer=bytes"
            )
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.dtype = "uint8" if self.vocab_size <= 256 else "uint16"
        self._ids = np.full(0x110000, 2**16 - 1, dtype=np.uint16)  # by code point; 65535: no id
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
    """The ConfigError about the first character of `text` without an id."""
    at = tokenizer.first_missing(text)
    return ConfigError(
        f"character {text[at]!r} at position {at} is not in the {tokenizer.vocab_size}-character vocabulary: leave it out"
    )


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken.

    bpe_dir  a folder with OpenAI's `vocab.bpe` and `encoder.json`, for a machine without network;
             None: tiktoken fetches them once and keeps a copy.
    """

    name, vocab_size, dtype, eot = "gpt2", 50257, "uint16", 50256
    document_start, document_end = [eot], np.uint16(eot).tobytes()
    # tiktoken panics on a million spaces followed by text. Its pattern takes all of them but the last as one word, so
    # cutting the text there leaves its ids the same. Four characters are space in Python, but not in the pattern.
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
        if any(text[i : i + 50_000].isspace() for i in range(0, len(text), 50_000)):  # rarely: the search is slow
            for space in self._long_space.finditer(text):
                if space.end() < len(text):
                    for end in (space.start(), space.end() - 1):
                        ids += self.bpe.encode_ordinary(text[start:end])
                        start = end
        return ids + self.bpe.encode_ordinary(text[start:])

    def encode_document(self, text):
        return np.array(self.encode(text), dtype=np.uint16).tobytes()

    def decode(self, ids):
        """Ids above 50256, which a model with a rounded-up vocabulary may produce, decode to nothing."""
        return self.bpe.decode([i for i in ids if i <= self.eot])


TOKENIZERS = ("gpt2", "char96", "chars", "bytes")


def make_tokenizer(name, bpe_dir=None, vocabulary=None):
    """The tokenizer of that name, one of TOKENIZERS; ConfigError for any other.

    bpe_dir     for gpt2: see GPT2Tokenizer
    vocabulary  for chars: a string of all characters
    """
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
    """The tokenizer that a meta.json names, or the copy of it in a checkpoint. ConfigError if its ids are not text."""
    if "row_tokens" in meta:
        raise ConfigError("its tokens are pixels of images, not text")
    return make_tokenizer(meta.get("tokenizer"), bpe_dir, meta.get("vocabulary"))
