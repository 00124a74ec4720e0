"""Text -> train.bin, val.bin and meta.json, as data.py reads them.

    python prepare_owt.py                                          # OpenWebText, GPT-2 BPE -> data/owt_gpt2
    python prepare_owt.py --tokenizer=char96                       # OpenWebText as 96 characters -> data/owt_char96
    python prepare_owt.py --source=my_texts --tokenizer=bytes      # local file or folder: .txt .jsonl .parquet, .gz .zst
    python prepare_owt.py --source=stdlib --tokenizer=char96       # source text of Python's standard library
    python prepare_owt.py --source=nanoGPT/data/openwebtext        # nanoGPT's train.bin and val.bin: writes their meta.json

Documents stream through a pool of processes and are written in order, so memory stays bounded and the files do not
depend on num_proc. "gpt2" ends each document with token 50256, the other tokenizers with a newline. "bytes" takes any
text, as 256 ids; "chars" numbers the characters it finds; "char96" leaves out documents with a character that is not
one of its 96.
"""

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sysconfig
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import ConfigError, as_script, load_config
from data import GPT2Tokenizer, code_points, fingerprint, is_nanogpt_folder, make_tokenizer
from text_files import MAX_DOCUMENT, TextReader, first_line, local_files
from theta import BTT, factor_sizes


@dataclass
class PrepareConfig:
    source: str = "owt"  # "owt", "stdlib", or a local file or folder
    tokenizer: Literal["gpt2", "char96", "chars", "bytes"] = "gpt2"  # chars: those of the text; bytes: any text
    out_dir: str | None = None  # None: data/SOURCE_TOKENIZER
    dataset: str = "Skylion007/openwebtext"  # of source="owt": its name on the hub, or a folder in the hub's layout
    text_field: str = "text"  # name of the text in .jsonl objects, .parquet columns and hub data sets
    extensions: tuple = ("txt", "jsonl", "parquet")  # of the files to take from a folder; any other is plain text
    skip_bad: bool = False  # leave out, and count, files, lines and rows that cannot be read
    max_document: int = MAX_DOCUMENT  # characters; longer plain text is cut, a longer line or cell cannot be read
    val_fraction: float | None = None  # of the documents; None: by size, a tenth of small texts, 0.0005 of OpenWebText
    seed: int = 2357  # of the split
    num_proc: int = 0  # tokenizing processes; 0: one a core for gpt2, one for the others, which are faster than reading
    bpe_dir: str | None = None  # folder with GPT-2's vocab.bpe and encoder.json, for a machine without network

    def __post_init__(self):
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction}: make it more than 0 and less than 1")
        for name, least in (("num_proc", 0), ("seed", 0), ("max_document", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least {least}")
        if is_nanogpt_folder(self.source):
            if self.out_dir not in (None, self.source):
                raise ConfigError(f"out_dir={self.out_dir}: nanoGPT's tokens stay in {self.source}: leave out_dir out")
            self.out_dir = self.source
        if self.out_dir is None:
            name = os.path.splitext(os.path.basename(os.path.normpath(self.source)))[0]
            self.out_dir = os.path.join("data", f"{name}_{self.tokenizer}")


# Tokens of OpenWebText with this split and GPT-2's BPE (nanoGPT's data/openwebtext/readme.md).
OWT_GPT2_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
BATCH_CHARACTERS = 4_000_000  # text that a process takes at a time
VAL_BYTES = 500_000  # of text for validation, if its share is chosen by size


def main(argv):
    prepare(load_config(PrepareConfig, argv))


def prepare_default(data_dir):
    """Prepare the quickstart's data, the standard library's source text as characters, if data_dir is theirs and lacks them."""
    default = PrepareConfig(source="stdlib", tokenizer="char96")
    if data_dir == default.out_dir and not os.path.exists(os.path.join(data_dir, "meta.json")):
        print(f"{data_dir} is missing: preparing the source text of Python's standard library")
        prepare(default, replace=False)


def prepare(config, replace=True):
    """Write the data folder config.out_dir -> the contents of its meta.json. ConfigError if that cannot be done.

    config   PrepareConfig
    replace  False: if another process has written the folder meanwhile, its files stay
    Files get their final names only when all are whole.
    """
    if is_nanogpt_folder(config.source):
        return import_nanogpt(config.source)
    # A tokenizer that cannot be made is an error before any text is read.
    tokenizer = None if config.tokenizer == "chars" else make_tokenizer(config.tokenizer, config.bpe_dir)
    source = open_source(config)
    tokenizer = tokenizer or make_tokenizer("chars", vocabulary=find_characters(source))
    with writing_folder(config.out_dir):
        os.makedirs(config.out_dir, exist_ok=True)
        # A folder of this process alone: several may prepare the same data at once.
        with tempfile.TemporaryDirectory(prefix=".part-", dir=config.out_dir) as folder:
            meta, left_out = write_folder(config, tokenizer, source, folder)
            publish(folder, config.out_dir, replace)
    print(
        f"{config.out_dir}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens of "
        f"{meta['documents']:,} documents, {for_vocabulary(meta)}; {meta['left_out']:,} left out "
        f"({meta['characters_left_out']:,} of {meta['characters']:,} characters)"
    )
    for note in ([left_out] if left_out else []) + list(source.reader.notes()):
        print(f"note: {note}")
    return meta


@contextmanager
def writing_folder(out_dir):
    """In this block a folder that cannot be written, and a full disk, are one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or first_line(error)
        raise ConfigError(f"out_dir={out_dir} cannot be written ({why}): take another, or make room") from None


def for_vocabulary(meta):
    """In words: the vocab_size to train with, the data's or the next number that has factors for a BTT head."""
    size = meta["vocab_size"]
    if meta["tokenizer"] != "chars":
        return f"vocab_size={size}"
    while True:
        try:
            factor_sizes(size, size, BTT)
            break
        except ConfigError:
            size += 1
    return f"{meta['vocab_size']} characters: take --vocab_size={size}"


def write_folder(config, tokenizer, source, folder):
    """Write train.bin, val.bin and meta.json into `folder` -> the meta dict, a line about the first document left out."""
    itemsize = np.dtype(tokenizer.dtype).itemsize
    paths = {split: os.path.join(folder, f"{split}.bin") for split in ("train", "val")}
    counts, left_out = write_tokens(config, tokenizer, source, paths, source.val_fraction)
    if source.draws and not validation_has_its_share(counts, source.val_fraction):
        if counts["val_tokens"]:
            counts, left_out = write_tokens(config, tokenizer, source, paths, 0.0)
        move_tail(source.val_fraction, itemsize, paths, counts)
    check_counts(config, source, itemsize, paths, counts, left_out)
    meta = {
        "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype, **counts,
        "source": config.dataset if config.source == "owt" else config.source, "seed": config.seed,
        "val_fraction": source.val_fraction,
        **{f"{split}_fingerprint": fingerprint(path) for split, path in paths.items()},
    }  # fmt: skip
    if tokenizer.name == "chars":
        meta["vocabulary"] = tokenizer.vocabulary
    with open(os.path.join(folder, "meta.json"), "w") as file:
        json.dump(meta, file, indent=1)
    return meta, left_out


def publish(folder, out_dir, replace):
    """Move the files of `folder` to out_dir. meta.json vouches for the others: the old one goes first, the new one comes last."""
    meta = os.path.join(out_dir, "meta.json")
    if os.path.exists(meta):
        if not replace:
            return
        os.remove(meta)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(os.path.join(folder, name), os.path.join(out_dir, name))


# ---------------------------------------------------------------------------------------
# Where documents come from


class Source(NamedTuple):
    documents: Callable  # () -> iterator of Documents, from the first one
    reader: TextReader  # counts what is left out
    val_fraction: float
    total: int | None = None  # documents, if their number is known
    draws: bool = True  # whether documents are drawn for validation here; False: each has its split


def open_source(config):
    """The Source that a PrepareConfig names. ConfigError if there is none."""
    if config.source == "owt":
        return hub_source(config)
    if config.source == "stdlib":
        return files_source(config, stdlib_files(), config.val_fraction or 0.05)
    files = local_files(config.source, config.extensions, print)
    size = sum(os.path.getsize(path) for path in files if os.path.exists(path))
    by_size = min(0.1, max(0.0005, VAL_BYTES / max(1, size)))
    return files_source(config, files, config.val_fraction or by_size)


def files_source(config, files, val_fraction):
    reader = TextReader(config.text_field, config.skip_bad or config.source == "stdlib", config.max_document)

    def documents():
        reader.reset()
        for path in files:
            yield from reader.documents(path)

    return Source(documents, reader, val_fraction)


def hub_source(config):
    import datasets
    import pyarrow

    try:
        data = datasets.load_dataset(config.dataset, split="train", num_proc=config.num_proc or None)
    except Exception as error:
        raise ConfigError(
            f"dataset={config.dataset} could not be loaded ({type(error).__name__}: {first_line(error)}): "
            "give a hub name and a network, or a local folder in the hub's layout"
        ) from None
    if config.text_field not in data.column_names:
        raise ConfigError(
            f"text_field={config.text_field}: {config.dataset} has the columns {', '.join(data.column_names)}"
        )
    val_fraction = config.val_fraction or 0.0005
    try:
        parts = data.train_test_split(test_size=val_fraction, seed=config.seed, shuffle=True)
    except ValueError as error:
        raise ConfigError(
            f"val_fraction={val_fraction}: {config.dataset} cannot be split like that: {first_line(error)}"
        ) from None
    reader = TextReader(config.text_field, config.skip_bad, config.max_document)
    # The published token counts are those of OpenWebText's texts as they are.
    as_is = config.dataset == PrepareConfig.dataset

    def documents():
        reader.reset()
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            row = 0
            try:
                for table in part.select_columns(config.text_field).with_format("arrow").iter(batch_size=100):
                    for cell in table.column(0):
                        row += 1
                        place = f"{config.dataset}, row {row} of {split}"
                        for document in reader.checked_cell(cell, place, as_is=as_is):
                            yield document._replace(split=split)
            except (OSError, pyarrow.ArrowException) as error:
                raise ConfigError(
                    f"dataset={config.dataset} cannot be read after row {row} of {split} ({first_line(error)}): "
                    "delete its copy in the cache of datasets, or give another"
                ) from None

    return Source(documents, reader, val_fraction, len(data), draws=False)


def stdlib_files():
    """Paths of the standard library's own .py files: no tests, no character tables, no installed packages."""
    skip = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for top, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in skip]
        files += [os.path.join(top, name) for name in names if name.endswith(".py")]
    return sorted(files)


def find_characters(source):
    """All characters of the documents, and the newline that ends them, sorted. The first of two passes over the source."""
    seen = np.zeros(0x110000, dtype=bool)
    seen[ord("\n")] = True
    for document in tqdm(source.documents(), total=source.total, unit=" documents", unit_scale=True, desc="characters"):
        seen[code_points(document.text)] = True
    return "".join(map(chr, np.flatnonzero(seen)))


# ---------------------------------------------------------------------------------------
# Tokens to files


def batches(documents):
    """Documents -> lists of them with about BATCH_CHARACTERS each."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer = None  # of this process of the pool


def start_process(name, bpe_dir, vocabulary):
    global _tokenizer
    _tokenizer = make_tokenizer(name, bpe_dir, vocabulary)


def start_pool_process(*start):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one handles Ctrl-C
    start_process(*start)


def encode_batch(first, batch, seed, val_fraction):
    """Encode the documents with numbers first, first + 1, … in the source.

    -> {split: ids as bytes}, number of documents left out, their characters, a line about the first of them,
    [(place, why)] of those on which the tokenizer failed
    """
    ids, bad = {"train": [], "val": []}, []
    left_out, characters_left_out, first_left_out = 0, 0, None
    for number, document in enumerate(batch, first):
        # A document's split depends on its number alone, whichever process encodes it.
        split = document.split or ("val" if random.Random(seed * 2**32 + number).random() < val_fraction else "train")
        try:
            encoded = _tokenizer.encode_document(document.text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tiktoken's panic is no Exception, and cannot be pickled
            bad.append((document.place, f"cannot be encoded ({type(error).__name__}: {first_line(error)})"))
            continue
        if encoded is not None:
            ids[split] += [encoded, _tokenizer.document_end]
            continue
        left_out, characters_left_out = left_out + 1, characters_left_out + len(document.text)
        if first_left_out is None:
            at = _tokenizer.first_missing(document.text)
            first_left_out = f"{document.where(at)} has {document.text[at]!r}"
    ids = {split: b"".join(parts) for split, parts in ids.items()}
    return ids, left_out, characters_left_out, first_left_out, bad


class InProcess(Executor):
    """The executor when there is one process: it encodes immediately, without a pool."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def make_pool(config, tokenizer, num_proc):
    """An executor of num_proc processes, in each of which encode_batch has the tokenizer."""
    start = (config.tokenizer, config.bpe_dir, getattr(tokenizer, "vocabulary", None))
    if num_proc == 1:
        start_process(*start)
        return InProcess()
    # spawn, not fork: the parent may have threads (datasets, torch)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_proc, context, initializer=start_pool_process, initargs=start)


def write_tokens(config, tokenizer, source, paths, val_fraction):
    """Encode all documents in parallel and write them in order -> counts, a line about the first document left out."""
    counts = dict.fromkeys(
        ("train_tokens", "val_tokens", "documents", "left_out", "characters", "characters_left_out"), 0
    )
    itemsize, first_left_out = np.dtype(tokenizer.dtype).itemsize, None
    num_proc = config.num_proc or (os.cpu_count() if isinstance(tokenizer, GPT2Tokenizer) else 1)
    pending = deque()  # at most 2 batches a process are under way, so memory stays bounded
    with (
        open(paths["train"], "wb") as train,
        open(paths["val"], "wb") as val,
        make_pool(config, tokenizer, num_proc) as pool,
        tqdm(total=source.total, unit=" documents", unit_scale=True, desc=f"tokenizing ({num_proc} processes)") as bar,
    ):

        def write_next():
            nonlocal first_left_out
            size, future = pending.popleft()
            try:
                ids, left_out, characters_left_out, first, bad = future.result()
            except BrokenProcessPool:
                raise ConfigError(
                    f"num_proc={num_proc}: a tokenizing process was killed, perhaps for lack of memory: take fewer"
                ) from None
            for split, file in (("train", train), ("val", val)):
                file.write(ids[split])
                counts[f"{split}_tokens"] += len(ids[split]) // itemsize
            counts["left_out"] += left_out
            counts["characters_left_out"] += characters_left_out
            first_left_out = first_left_out or first
            for place, why in bad:
                source.reader.refuse(place, why)
            bar.update(size)

        for batch in batches(source.documents()):
            future = pool.submit(encode_batch, counts["documents"], batch, config.seed, val_fraction)
            pending.append((len(batch), future))
            counts["documents"] += len(batch)
            counts["characters"] += sum(len(document.text) for document in batch)
            if len(pending) >= 2 * num_proc:
                write_next()
        while pending:
            write_next()
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    if first_left_out:
        size = tokenizer.vocab_size
        first_left_out += f", which is not one of the {size} characters: --tokenizer=chars or bytes takes any text"
    return counts, first_left_out


def validation_has_its_share(counts, val_fraction):
    """Whether the documents drawn for validation hold about that share of the tokens; a few, or unequal ones, may not."""
    share = counts["val_tokens"] / max(1, counts["train_tokens"] + counts["val_tokens"])
    return val_fraction / 2 <= share <= max(2 * val_fraction, 0.2)


def move_tail(val_fraction, itemsize, paths, counts):
    """Move the last tokens of train.bin to val.bin, and correct the counts."""
    if counts["train_tokens"] == 0:
        return
    tail = max(round(counts["train_tokens"] * val_fraction), min(10_000, counts["train_tokens"] // 20), 1)
    print(
        f"{counts['documents']:,} documents are too few, or too unequal, to draw some for validation, "
        f"which gets the last {tail:,} tokens (--val_fraction)"
    )
    with open(paths["train"], "r+b") as train, open(paths["val"], "wb") as val:
        start = train.seek(-tail * itemsize, os.SEEK_END)
        shutil.copyfileobj(train, val, 2**20)
        train.truncate(start)
    counts["train_tokens"] -= tail
    counts["val_tokens"] += tail


def check_counts(config, source, itemsize, paths, counts, left_out):
    """ConfigError unless tokens came out and all are on the disk; a warning if OpenWebText has not its published counts."""
    if counts["train_tokens"] == 0:
        notes = ([left_out] if left_out else []) + list(source.reader.notes())
        why = f"; {'; '.join(notes)}" if notes else ": is this the right source?"
        raise ConfigError(f"source={config.source}: no token came out of {counts['documents']:,} documents{why}")
    for split, path in paths.items():
        if os.path.getsize(path) != counts[f"{split}_tokens"] * itemsize:
            raise ConfigError(
                f"{path} has {os.path.getsize(path)} bytes, not {counts[f'{split}_tokens']} tokens: is the disk full?"
            )
    if config.source == "owt" and config.dataset == PrepareConfig.dataset and config.tokenizer == "gpt2":
        for split, published in OWT_GPT2_TOKENS.items():
            if counts[f"{split}_tokens"] != published:
                print(f"warning: {counts[f'{split}_tokens']:,} {split} tokens, not the published {published:,}")


# ---------------------------------------------------------------------------------------
# nanoGPT's data folders: train.bin and val.bin of uint16, and of characters a meta.pkl


def import_nanogpt(folder):
    """Write the meta.json of a folder that nanoGPT prepared -> the meta dict. Its tokens stay as they are."""
    meta = {"tokenizer": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size, "dtype": "uint16", "source": folder}
    pickled = os.path.join(folder, "meta.pkl")
    if os.path.isfile(pickled):
        characters = nanogpt_characters(pickled)
        meta.update(tokenizer="chars", vocab_size=len(characters), vocabulary=characters)
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        size = os.path.getsize(path)
        if size % 2 or not size:
            raise ConfigError(f"{path} has {size} bytes, which cannot be nanoGPT's uint16 tokens")
        try:
            largest = largest_token(path)
            meta[f"{split}_tokens"], meta[f"{split}_fingerprint"] = size // 2, fingerprint(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
        if largest >= meta["vocab_size"]:
            raise ConfigError(f"{path} holds token {largest}, but {meta['tokenizer']} has {meta['vocab_size']}")
    path = os.path.join(folder, "meta.json")
    with writing_folder(folder), tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
        with open(os.path.join(part, "meta.json"), "w") as file:
            json.dump(meta, file, indent=1)
        os.replace(os.path.join(part, "meta.json"), path)
    print(
        f"{path}: nanoGPT's tokens, encoded by {meta['tokenizer']}: {meta['train_tokens']:,} for training, "
        f"{meta['val_tokens']:,} for validation, {for_vocabulary(meta)}; use them with --data_dir={folder}"
    )
    return meta


def largest_token(path):
    """The largest of the uint16 tokens in a file."""
    with open(path, "rb") as file:
        return max(int(np.frombuffer(block, np.uint16).max()) for block in iter(lambda: file.read(2**24), b""))


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers only: a pickle that names a class or a function could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def nanogpt_characters(path):
    """The characters in nanoGPT's meta.pkl, {"vocab_size": n, "itos": {id: character}, "stoi": …}, in the order of their ids."""
    try:
        with open(path, "rb") as file:
            pickled = file.read(10_000_001)
        if len(pickled) > 10_000_000:
            raise ValueError("it is too large")
        itos = PlainUnpickler(io.BytesIO(pickled)).load()["itos"]
        characters = "".join(itos[i] for i in range(len(itos)))
        if len(characters) != len(itos) or len(set(characters)) != len(itos):
            raise ValueError("its ids do not have one character each")
        make_tokenizer("chars", vocabulary=characters)
        return characters
    except Exception as error:  # a damaged pickle may raise anything
        raise ConfigError(
            f"{path} is not the vocabulary of nanoGPT's characters ({first_line(error)}): prepare the text itself, "
            "with --source=TEXT_FILE --tokenizer=chars"
        ) from None


if __name__ == "__main__":
    as_script(main)
