"""Text -> train.bin, val.bin and meta.json, as data.py reads them.

    python prepare_owt.py                                          # OpenWebText, GPT-2 BPE -> data/owt_gpt2
    python prepare_owt.py --tokenizer=char96                       # OpenWebText as 96 characters -> data/owt_char96
    python prepare_owt.py --source=my_texts --out_dir=data/mine    # local file or folder: .txt .jsonl .parquet
    python prepare_owt.py --source=stdlib --tokenizer=char96       # source text of Python's standard library

Documents stream through a pool of processes and are written in their order, so memory stays
bounded and the files do not depend on num_proc. "gpt2" ends each document with token 50256;
"char96" ends it with a newline and leaves out documents with a character that is not among the 96.
"""

import json
import multiprocessing
import os
import random
import sysconfig
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import ConfigError, as_script, load_config
from data import GPT2Tokenizer, make_tokenizer


@dataclass
class Config:
    source: str = "owt"  # "owt", "stdlib", or a local file or folder
    tokenizer: Literal["gpt2", "char96"] = "gpt2"  # GPT-2 BPE (uint16) or 96 characters (uint8)
    out_dir: str | None = None  # None: data/SOURCE_TOKENIZER
    dataset: str = "Skylion007/openwebtext"  # of source="owt": its name on the hub, or a folder in the hub's layout
    text_field: str = "text"  # name of the text in .jsonl objects, .parquet columns and hub data sets
    extensions: tuple = ("txt", "jsonl", "parquet")  # of the files taken from a folder; an unknown one is read as text
    val_fraction: float = 0.0005  # of the documents
    seed: int = 2357  # of the split
    num_proc: int = 0  # tokenizing processes; 0: one a core, but one for char96, which is faster than reading
    bpe_dir: str | None = None  # folder with GPT-2's vocab.bpe and encoder.json, for a machine without network

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction}: make it more than 0 and less than 1")
        if self.num_proc < 0:
            raise ConfigError(f"num_proc={self.num_proc}: make it at least 0")
        if self.out_dir is None:
            name = os.path.splitext(os.path.basename(os.path.normpath(self.source)))[0]
            self.out_dir = os.path.join("data", f"{name}_{self.tokenizer}")


# OpenWebText under this split and GPT-2 BPE has these many tokens (nanoGPT's data/openwebtext/readme.md).
OWT_GPT2_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
BATCH_CHARACTERS = 4_000_000  # text a process takes at a time
LONGEST_DOCUMENT = 16_000_000  # characters; a longer text file is cut at line ends, so that memory stays bounded


def main(argv):
    prepare(load_config(Config, argv))


def prepare_default(data_dir):
    """The quickstart's data, where it is missing: the standard library's source text as characters."""
    default = Config(source="stdlib", tokenizer="char96", val_fraction=0.05)
    if data_dir == default.out_dir and not os.path.exists(os.path.join(data_dir, "meta.json")):
        print(f"{data_dir} is missing: preparing the source text of Python's standard library")
        prepare(default)


def prepare(config):
    """Write config.out_dir. Files get their final names only when all are whole; returns the meta dict."""
    # Fail on a tokenizer that can't be had before reading any text.
    tokenizer = make_tokenizer(config.tokenizer, config.bpe_dir)
    documents, total = open_source(config)
    os.makedirs(config.out_dir, exist_ok=True)
    paths = {name: os.path.join(config.out_dir, name) for name in ("train.bin", "val.bin", "meta.json")}
    parts = {split: paths[f"{split}.bin"] + ".part" for split in ("train", "val")}
    itemsize = np.dtype(tokenizer.dtype).itemsize
    counts = write_tokens(config, itemsize, documents, total, parts)
    if counts["val_tokens"] == 0:
        move_tail(config, itemsize, parts, counts)
    check_counts(config, itemsize, parts, counts)
    meta = {
        "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype, **counts,
        "source": config.dataset if config.source == "owt" else config.source, "seed": config.seed, "val_fraction": config.val_fraction,
    }  # fmt: skip
    with open(paths["meta.json"] + ".part", "w") as file:
        json.dump(meta, file, indent=1)
    # meta.json vouches for the other two: it goes first and comes last.
    if os.path.exists(paths["meta.json"]):
        os.remove(paths["meta.json"])
    for path in paths.values():
        os.replace(path + ".part", path)
    print(
        f"{config.out_dir}: {counts['train_tokens']:,} training and {counts['val_tokens']:,} validation tokens of "
        f"{counts['documents']:,} documents; {counts['left_out']:,} left out ({counts['characters_left_out']:,} of "
        f"{counts['characters']:,} characters)"
    )
    return meta


# ---------------------------------------------------------------------------------------
# Where documents come from: iterators of (split or None, text). None: drawn by the seed.


def open_source(config):
    """-> iterator of (split, text), and how many documents there are, or None if that is not known."""
    if config.source == "owt":
        return hub_documents(config)
    if config.source == "stdlib":
        return ((None, text) for path in stdlib_files() for text in text_documents(path)), None
    files = local_files(config.source, config.extensions)
    return ((None, text) for path in files for text in file_documents(path, config.text_field)), None


def hub_documents(config):
    import datasets

    try:
        data = datasets.load_dataset(config.dataset, split="train", num_proc=config.num_proc or None)
    except Exception as error:
        raise ConfigError(
            f"dataset={config.dataset} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "give a hub name and a network, or a local folder in the hub's layout"
        ) from None
    if config.text_field not in data.column_names:
        raise ConfigError(
            f"text_field={config.text_field}: {config.dataset} has the columns {', '.join(data.column_names)}"
        )
    parts = data.train_test_split(test_size=config.val_fraction, seed=config.seed, shuffle=True)

    def documents():
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            for batch in part.select_columns(config.text_field).iter(batch_size=1000):
                for text in batch[config.text_field]:
                    yield split, text

    return documents(), len(data)


def local_files(source, extensions):
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise ConfigError(f"source={source} is neither 'owt', 'stdlib' nor a local file or folder")
    endings = tuple("." + extension.lstrip(".") for extension in extensions)
    files = [os.path.join(top, name) for top, _, names in os.walk(source) for name in names if name.endswith(endings)]
    if not files:
        raise ConfigError(f"source={source} holds no file that ends in {' '.join(endings)}: see --extensions")
    return sorted(files)


def stdlib_files():
    """The standard library's own .py files: no tests, no character tables, nothing installed."""
    skip = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for top, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in skip]
        files += [os.path.join(top, name) for name in names if name.endswith(".py")]
    return sorted(files)


def file_documents(path, text_field):
    if path.endswith(".jsonl"):
        return jsonl_documents(path, text_field)
    if path.endswith(".parquet"):
        return parquet_documents(path, text_field)
    return text_documents(path)


def text_documents(path):
    """A text file is one document; one over LONGEST_DOCUMENT is cut at line ends."""
    with open(path, encoding="utf-8", errors="replace") as file:
        while text := file.read(LONGEST_DOCUMENT):
            if len(text) == LONGEST_DOCUMENT:
                text += file.readline(LONGEST_DOCUMENT)
            yield text


def jsonl_documents(path, text_field):
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} is not a JSON object with a {text_field!r} ({error!r}): mend it, or see --text_field"
                ) from None
            yield text


def parquet_documents(path, text_field):
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:
        raise ConfigError(f"{path} is not a parquet file ({type(error).__name__}): leave it out") from None
    if text_field not in file.schema_arrow.names:
        raise ConfigError(
            f"{path} has no column {text_field!r} but {', '.join(file.schema_arrow.names)}: see --text_field"
        )
    for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
        yield from batch.column(0).to_pylist()


# ---------------------------------------------------------------------------------------
# Tokens to files


def batches(documents):
    """Group (split, text) into lists of BATCH_CHARACTERS or little more."""
    batch, size = [], 0
    for split, text in documents:
        if not isinstance(text, str):
            raise ConfigError(f"a document is {type(text).__name__}, not text: see --text_field")
        batch.append((split, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer = None  # of a pool's process


def start_process(name, bpe_dir):
    global _tokenizer
    _tokenizer = make_tokenizer(name, bpe_dir)


def encode_batch(first, batch, seed, val_fraction):
    """Encode documents number first, first + 1, … -> ({split: ids as bytes}, left out, characters left out)"""
    out, left_out, characters_left_out = {"train": [], "val": []}, 0, 0
    for number, (split, text) in enumerate(batch, first):
        # A document's draw depends on its number alone, whatever process it comes to.
        split = split or ("val" if random.Random(seed * 2**32 + number).random() < val_fraction else "train")
        if isinstance(_tokenizer, GPT2Tokenizer):
            out[split].append(np.array([*_tokenizer.encode(text), _tokenizer.eot], dtype=np.uint16).tobytes())
        elif (ids := _tokenizer.encode_document(text + "\n")) is not None:
            out[split].append(ids)
        else:
            left_out, characters_left_out = left_out + 1, characters_left_out + len(text)
    return {split: b"".join(parts) for split, parts in out.items()}, left_out, characters_left_out


class InProcess(Executor):
    """The executor of one process: it encodes at once, with no pool to start."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def make_pool(config, num_proc):
    if num_proc == 1:
        start_process(config.tokenizer, config.bpe_dir)
        return InProcess()
    # spawn, not fork: the parent may have threads (datasets, torch)
    return ProcessPoolExecutor(
        num_proc,
        multiprocessing.get_context("spawn"),
        initializer=start_process,
        initargs=(config.tokenizer, config.bpe_dir),
    )


def write_tokens(config, itemsize, documents, total, paths):
    """Encode all documents in parallel and write them in order; -> counts."""
    counts = dict.fromkeys(
        ("train_tokens", "val_tokens", "documents", "left_out", "characters", "characters_left_out"), 0
    )
    num_proc = config.num_proc or (1 if config.tokenizer == "char96" else os.cpu_count())
    pending = deque()  # at most 2 batches a process are in flight: memory stays bounded
    with (
        open(paths["train"], "wb") as train,
        open(paths["val"], "wb") as val,
        make_pool(config, num_proc) as pool,
        tqdm(total=total, unit=" documents", unit_scale=True, desc=f"tokenizing ({num_proc} processes)") as bar,
    ):

        def write_next():
            size, future = pending.popleft()
            encoded, left_out, characters_left_out = future.result()
            for split, file in (("train", train), ("val", val)):
                file.write(encoded[split])
                counts[f"{split}_tokens"] += len(encoded[split]) // itemsize
            counts["left_out"] += left_out
            counts["characters_left_out"] += characters_left_out
            bar.update(size)

        for batch in batches(documents):
            future = pool.submit(encode_batch, counts["documents"], batch, config.seed, config.val_fraction)
            pending.append((len(batch), future))
            counts["documents"] += len(batch)
            counts["characters"] += sum(len(text) for _, text in batch)
            if len(pending) >= 2 * num_proc:
                write_next()
        while pending:
            write_next()
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    return counts


def move_tail(config, itemsize, paths, counts):
    """Too few documents for one to fall to validation: the last tokens of train become val."""
    if counts["train_tokens"] == 0:
        return
    tail = max(round(counts["train_tokens"] * config.val_fraction), min(10_000, counts["train_tokens"] // 20), 1)
    print(f"no document of {counts['documents']} fell to validation: it gets the last {tail:,} tokens (--val_fraction)")
    with open(paths["train"], "r+b") as train, open(paths["val"], "wb") as val:
        start = train.seek(-tail * itemsize, os.SEEK_END)
        val.write(train.read())
        train.truncate(start)
    counts["train_tokens"] -= tail
    counts["val_tokens"] += tail


def check_counts(config, itemsize, paths, counts):
    """What was counted must be what lies on disk, and OpenWebText's counts are known."""
    if counts["train_tokens"] == 0:
        raise ConfigError(
            f"source={config.source}: no token came out of {counts['documents']:,} documents "
            f"({counts['left_out']:,} with characters outside the vocabulary): is this the right source and tokenizer?"
        )
    for split, path in paths.items():
        if os.path.getsize(path) != counts[f"{split}_tokens"] * itemsize:
            raise ConfigError(
                f"{path} has {os.path.getsize(path)} bytes, not {counts[f'{split}_tokens']} tokens: is the disk full?"
            )
    if config.source == "owt" and config.dataset == Config.dataset and config.tokenizer == "gpt2":
        for split, published in OWT_GPT2_TOKENS.items():
            if counts[f"{split}_tokens"] != published:
                print(f"warning: {counts[f'{split}_tokens']:,} {split} tokens, not the published {published:,}")


if __name__ == "__main__":
    as_script(main)
