"""Tests tokenizers against independent ones, prepared data against plain loops, and batches as pure functions."""

import concurrent.futures
import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import string
from contextlib import suppress

import numpy as np
import pytest
import torch

import prepare_owt
import train
from configurator import ConfigError, RunFailed
from conftest import ROOT, run_forked, small_disk
from data import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    TokenData,
    VocabularyTokenizer,
    check_same_data,
    fingerprint,
    read_meta,
    tokenizer_of,
)  # fmt: skip
from prepare_owt import PrepareConfig, prepare
from theta import BTT, factor_sizes


def random_texts(count, seed=0):
    """Documents of printable ASCII, some with characters outside the vocabulary."""
    draw = random.Random(seed)
    alphabet = string.ascii_letters + string.digits + string.punctuation + " \n"
    documents = ["".join(draw.choices(alphabet, k=draw.randrange(1, 300))) for _ in range(count)]
    return [text + draw.choice(["", "", "", "\t", "é", "日本"]) for text in documents]


def in_char96(text):
    return all(char == "\n" or 32 <= ord(char) < 127 for char in text)


def char_ids(text):
    return [0 if char == "\n" else ord(char) - 31 for char in text]


# -- tokenizers


def test_characters_are_numbered_as_stated():
    tokenizer = CharTokenizer()
    text = "\n" + "".join(map(chr, range(32, 127)))
    assert tokenizer.encode(text) == list(range(96)) == char_ids(text)
    assert tokenizer.decode(range(96)) == text


@pytest.mark.parametrize("bad", ["\t", "\r", "\x7f", "é", "日", "\ud800"])
def test_characters_outside_the_vocabulary_are_named(bad):
    with pytest.raises(ConfigError, match="position 2"):
        CharTokenizer().encode("ab" + bad)
    assert CharTokenizer().encode_document("ab" + bad) is None


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory):
    """A byte-level BPE in GPT-2's file formats, trained by Hugging Face's tokenizers, and that tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator([*random_texts(200), "Hello world, hello words"] * 3, vocab_size=400, min_frequency=2)
    folder = tmp_path_factory.mktemp("bpe")
    vocab, merges = reference.save_model(str(folder))
    # tiktoken expects the bytes first, in the order of OpenAI's file, then the merges in their order
    lines = open(merges, encoding="utf-8").read().split("\n")
    merges_in_order = [line for line in lines[1:] if line]
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    names = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    order = printable + [b for b in range(256) if b not in printable]
    encoder = {names[b]: i for i, b in enumerate(order)}
    for merge in merges_in_order:
        encoder.setdefault("".join(merge.split()), len(encoder))
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges_in_order) + "\n", encoding="utf-8")
    return str(folder), ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def test_bpe_from_local_files_equals_hugging_face(small_bpe):
    folder, reference = small_bpe
    ours = GPT2Tokenizer(folder)
    for text in [*random_texts(50, seed=1), "Hello world", "it's  two   spaces\n\n", "日本 é"]:
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.skipif(
    "GPT2_BPE_DIR" not in os.environ, reason="GPT2_BPE_DIR names no folder with GPT-2's vocab.bpe and encoder.json"
)
def test_gpt2s_own_files_give_the_published_ids():
    tokenizer = GPT2Tokenizer(os.environ["GPT2_BPE_DIR"])
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [
        27,
        91,
        437,
        1659,
        5239,
        91,
        29,
    ]  # it is encoded as text, not as the special token
    assert tokenizer.decode([15496, 995, 50256, 50303]) == "Hello world<|endoftext|>"


def test_mistakes_with_bpe_files_offer_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="vocab.bpe is missing"):
        GPT2Tokenizer(str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="not GPT-2's files"):
        GPT2Tokenizer(str(tmp_path))

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(ConfigError, match="--bpe_dir"):
        GPT2Tokenizer()


ANY_TEXT = "naïve café\t日本 🙂\n\x7f" + "".join(map(chr, range(1, 400)))


def test_the_byte_tokenizer_takes_any_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode(tokenizer.encode(ANY_TEXT)) == ANY_TEXT
    assert tokenizer.decode([0xC3, 104]) == "\ufffdh"  # half a character


@pytest.mark.parametrize("text, dtype", [("hello\nworld é", "uint8"), (ANY_TEXT, "uint16")])
def test_characters_of_the_data_are_numbered_like_nanogpts(text, dtype):
    characters = sorted(set(text))
    number = {char: i for i, char in enumerate(characters)}
    tokenizer = VocabularyTokenizer("".join(characters))
    assert tokenizer.dtype == dtype and tokenizer.vocab_size == len(characters)
    assert tokenizer.encode(text) == [number[char] for char in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ConfigError, match=f"'ж' at position {len(text)} "):
        tokenizer.encode(text + "ж")


@pytest.mark.parametrize(
    "text",
    [
        "a" + " " * 150_000 + "b", "a" + " " * 150_000, " " * 150_000 + "b\n", "a" + "\n" * 120_000 + "b" + " " * 99_999 + "c",
        "a " + "\u00a0\t\n" * 50_000 + "\x1c" + " " * 100_001 + "'s", "\x1c" * 150_000 + "b", " " * 150_000, "",
    ],
)  # fmt: skip
def test_long_runs_of_spaces_are_encoded_as_if_in_one_piece(small_bpe, text):
    tokenizer = GPT2Tokenizer(small_bpe[0])
    assert tokenizer.encode(text) == tokenizer.bpe.encode_ordinary(text)


def test_a_million_spaces_are_encoded(small_bpe):
    """tiktoken cannot encode them in one piece. Its pattern takes all spaces but the last as one word."""
    tokenizer = GPT2Tokenizer(small_bpe[0])
    want = [ids for part in ("a", " " * 1_099_999, " b") for ids in tokenizer.bpe.encode_ordinary(part)]
    assert tokenizer.encode("a" + " " * 1_100_000 + "b") == want


# -- preparation


def read_tokens(folder):
    """-> meta, {split: tokens} of a data folder."""
    meta = read_meta(folder)
    return meta, {
        split: np.fromfile(os.path.join(folder, f"{split}.bin"), dtype=meta["dtype"]) for split in ("train", "val")
    }


def documents_of(tokens, end):
    """Cut tokens at the ends of documents -> list of tuples."""
    return [tuple(part[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1) if len(part)]


def write_corpus(kind, folder, documents):
    """Write documents to a folder as .txt files, or as one file of another kind."""
    if kind == "txt":
        for i, text in enumerate(documents):
            (folder / f"{i:04}.txt").write_text(text, newline="")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": documents}), folder / "a.parquet")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_documents_of_a_local_folder_are_split_and_stored_in_order(tmp_path, monkeypatch, kind, num_proc):
    monkeypatch.setattr(prepare_owt, "BATCH_CHARACTERS", 2000)  # so that there are many batches
    documents = [text.replace("\n", " ") for text in random_texts(120)]  # so that newlines only end documents
    (tmp_path / "in").mkdir()
    write_corpus(kind, tmp_path / "in", documents)
    out = str(tmp_path / "out")
    meta = prepare(
        PrepareConfig(source=str(tmp_path / "in"), tokenizer="char96", out_dir=out, val_fraction=0.2, num_proc=num_proc)
    )
    stored, tokens = read_tokens(out)
    kept = [text for text in documents if in_char96(text)]
    assert stored == meta and meta["documents"] == 120 and meta["left_out"] == 120 - len(kept) > 0
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(text) + 1 for text in kept)
    got = {split: documents_of(tokens[split], 0) for split in tokens}
    assert sorted(got["train"] + got["val"]) == sorted(tuple(char_ids(text)) for text in kept)
    in_order = [ids for text in kept if (ids := tuple(char_ids(text))) in set(got["train"])]
    assert got["train"] == in_order  # in the order of the files, for any number of processes
    assert 0.05 < len(got["val"]) / len(kept) < 0.4
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]


def test_a_data_set_in_the_hubs_layout_is_split_as_published(tmp_path, small_bpe):
    """A local folder is laid out like a data set on the hub; each document ends with token 50256."""
    datasets = pytest.importorskip("datasets")
    folder, reference = small_bpe
    documents = [text for text in random_texts(200) if text]
    (tmp_path / "hub" / "plain_text").mkdir(parents=True)
    half = len(documents) // 2
    for i, part in enumerate((documents[:half], documents[half:])):
        datasets.Dataset.from_dict({"text": part}).to_parquet(
            tmp_path / "hub" / "plain_text" / f"train-{i:05}-of-00002.parquet"
        )
    out = str(tmp_path / "out")
    prepare(
        PrepareConfig(
            source="owt", dataset=str(tmp_path / "hub"), bpe_dir=folder, out_dir=out, val_fraction=0.1, num_proc=2
        )
    )
    _, tokens = read_tokens(out)
    split = datasets.Dataset.from_dict({"text": documents}).train_test_split(test_size=0.1, seed=2357, shuffle=True)
    for ours, theirs in (("train", "train"), ("val", "test")):
        assert documents_of(tokens[ours], 50256) == [
            tuple(reference.encode(text).ids) for text in split[theirs]["text"]
        ]


def test_a_data_set_of_one_document_is_refused_in_one_line(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"text": ["all there is"]}).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="val_fraction=0.0005: .*hub cannot be split like that"):
        prepare(PrepareConfig(dataset=str(tmp_path / "hub"), tokenizer="bytes", out_dir=str(tmp_path / "out")))


def test_one_document_is_split_at_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 100)
    prepare(
        PrepareConfig(source=str(path), tokenizer="char96", out_dir=str(tmp_path / "out"), val_fraction=0.1, num_proc=1)
    )
    _, tokens = read_tokens(str(tmp_path / "out"))
    assert len(tokens["val"]) == 100 and len(tokens["train"]) == 901
    assert [*tokens["train"], *tokens["val"]] == char_ids("abcdefghij" * 100 + "\n")


def test_preparing_again_gives_the_same_data_and_a_failure_keeps_the_old(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    config = PrepareConfig(
        source=str(tmp_path / "a.txt"), tokenizer="char96", out_dir=str(tmp_path / "out"), num_proc=1
    )
    prepare(config)
    before = {name: open(tmp_path / "out" / name, "rb").read() for name in os.listdir(tmp_path / "out")}
    prepare(config)
    (tmp_path / "a.txt").write_text("\t")  # no character of it is in the vocabulary
    with pytest.raises(ConfigError, match="no token came out of 1 documents"):
        prepare(config)
    assert before == {name: open(tmp_path / "out" / name, "rb").read() for name in before}


def prepare_folder(tmp_path, documents, **options):
    """Prepare documents from .txt files -> meta, {split: tokens}."""
    folder, out = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:04}.txt").write_text(text, encoding="utf-8", newline="")
    prepare(PrepareConfig(**{"source": str(folder), "tokenizer": "bytes", "out_dir": out, "num_proc": 1, **options}))
    return read_tokens(out)


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_bytes_and_chars_store_any_text(tmp_path, tokenizer):
    documents = [text.replace("\n", " ").replace("\r", " ") for text in [*random_texts(60), ANY_TEXT * 3]]
    meta, tokens = prepare_folder(tmp_path, documents, tokenizer=tokenizer, val_fraction=0.2)
    assert meta["left_out"] == 0 and meta["tokenizer"] == tokenizer
    if tokenizer == "chars":
        characters = "".join(sorted({*"".join(documents), "\n"}))
        assert meta["vocabulary"] == characters and meta["vocab_size"] == len(characters)
    ours = tokenizer_of(meta)
    got = [text for split in tokens.values() for text in ours.decode(split.tolist()).split("\n")[:-1]]
    assert sorted(got) == sorted(documents)


def test_a_single_document_is_stored_byte_for_byte(tmp_path):
    readme = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    meta, tokens = prepare_folder(tmp_path, [readme])
    assert bytes([*tokens["train"], *tokens["val"]]).decode() == readme + "\n"
    assert len(tokens["val"]) == round(0.1 * meta["documents"] * len((readme + "\n").encode()))


def test_documents_that_are_left_out_are_named(tmp_path, capsys):
    prepare_folder(tmp_path, ["fine\n" * 50, "one\ntwo\nthe café\n", "日本"], tokenizer="char96")
    out = capsys.readouterr().out
    assert "0001.txt:3 has 'é'" in out and "--tokenizer=chars or bytes" in out and "2 left out" in out
    assert "日" not in out  # only the first is named
    (tmp_path / "book.txt").write_text("a\nb\né")
    with pytest.raises(ConfigError, match=r"book.txt:3 has 'é', which.* --tokenizer=chars or bytes"):
        prepare(PrepareConfig(source=str(tmp_path / "book.txt"), tokenizer="char96", out_dir=str(tmp_path / "out2")))


@pytest.mark.parametrize("size, share", [(1000, 0.1), (4_000_000, 0.1), (10_000_000, 0.05), (2_000_000_000, 0.0005)])
def test_val_fraction_is_a_tenth_for_small_texts_and_falls_with_size(tmp_path, size, share):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(size)
    config = PrepareConfig(source=str(tmp_path / "a.txt"), tokenizer="bytes")
    assert prepare_owt.open_source(config).val_fraction == pytest.approx(share)


@pytest.mark.parametrize("sizes", [[1000], [1000, 1000], [20_000, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [1, 50_000]])
@pytest.mark.parametrize("seed", range(4))
def test_validation_gets_its_share_of_few_or_unequal_documents(tmp_path, sizes, seed):
    meta, tokens = prepare_folder(tmp_path, ["x" * size for size in sizes], seed=seed)
    total = sum(sizes) + len(sizes)
    assert len(tokens["train"]) + len(tokens["val"]) == total
    assert 0.05 * total <= len(tokens["val"]) <= 0.2 * total


def test_stdlib_files_finds_the_standard_library_without_its_tests():
    files = prepare_owt.stdlib_files()
    assert sum(map(os.path.getsize, files)) > 3e6
    names = {os.path.basename(path) for path in files}
    assert {"argparse.py", "ast.py", "json"} - names == {"json"} and not any("test_" in name for name in names)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"text": "fine"}\n{"text": 3}\n', ["a.jsonl:2", "int", "text_field", "--skip_bad"]),
        ('{"text": "fine"}\n{"body": "x"}\n', ["a.jsonl:2", "text", "--skip_bad"]),
        ('{"text": "fine"}\nnot json\n', ["a.jsonl:2", "JSON", "--skip_bad"]),
    ],
)
def test_broken_jsonl_is_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError) as caught:
        prepare(PrepareConfig(source=str(tmp_path), tokenizer="char96", out_dir=str(tmp_path / "out"), num_proc=1))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nulls_and_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    lines = ['{"text": "one"}', '{"text": null}', "not json", '{"text": 3}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "out")
    prepare(PrepareConfig(source=str(tmp_path / "a.jsonl"), tokenizer="bytes", out_dir=out, skip_bad=True))
    said = capsys.readouterr().out
    assert "1 nulls left out" in said and "left out because unreadable: 2; the first:" in said and "a.jsonl:3" in said
    _, tokens = read_tokens(out)
    assert bytes([*tokens["train"], *tokens["val"]]) == b"one\ntwo\n"


class Panic(BaseException):
    """Like tiktoken's, it is not derived from Exception."""


def test_a_document_that_the_tokenizer_fails_on_is_named(tmp_path, monkeypatch, capsys):
    def encode(self, text):
        if "bad" in text:
            raise Panic("StackOverflow")
        return text.encode()

    monkeypatch.setattr(ByteTokenizer, "encode_document", encode)
    documents = ["good " * 9, "bad", "good"]
    with pytest.raises(ConfigError, match="0001.txt cannot be encoded .Panic: StackOverflow.*--skip_bad"):
        prepare_folder(tmp_path, documents)
    (tmp_path / "again").mkdir()
    _, tokens = prepare_folder(tmp_path / "again", documents, skip_bad=True)
    assert len(tokens["train"]) + len(tokens["val"]) == 46 + 5 and "0001.txt cannot be" in capsys.readouterr().out


def test_a_dead_process_is_one_line(tmp_path, monkeypatch):
    def pool(config, tokenizer, num_proc):
        context = multiprocessing.get_context("fork")
        return concurrent.futures.ProcessPoolExecutor(1, context, initializer=os._exit, initargs=(9,))

    monkeypatch.setattr(prepare_owt, "make_pool", pool)
    with pytest.raises(ConfigError, match="num_proc=1: a tokenizing process was killed"):
        prepare_folder(tmp_path, ["some text"])
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ConfigError, match="out_dir=.*a.txt/out cannot be written"):
        prepare(
            PrepareConfig(source=str(tmp_path / "a.txt"), tokenizer="bytes", out_dir=str(tmp_path / "a.txt" / "out"))
        )


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_a_full_disk_is_one_line_and_leaves_the_old_data(tmp_path, tokenizer):
    prepare_folder(tmp_path, ["a\n" * 10])
    before = {name: (tmp_path / "out" / name).read_bytes() for name in sorted(os.listdir(tmp_path / "out"))}
    (tmp_path / "in" / "large.txt").write_text("text\n" * 40_000)
    config = PrepareConfig(source=str(tmp_path / "in"), tokenizer=tokenizer, out_dir=str(tmp_path / "out"))
    with small_disk(50_000), pytest.raises(ConfigError, match="out cannot be written .File too large.: take another"):
        prepare(config)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in sorted(os.listdir(tmp_path / "out"))} == before


def test_a_nanogpt_folder_that_cannot_be_written_is_one_line(tmp_path):
    folder = nanogpt_folder(tmp_path / "nanogpt", [1, 2, 3] * 50)
    with small_disk(10), pytest.raises(ConfigError, match="nanogpt cannot be written .File too large."):
        prepare(PrepareConfig(source=folder))
    assert sorted(os.listdir(folder)) == ["train.bin", "val.bin"]


@pytest.mark.parametrize(
    "value", ["1", "-1", "0", "nan", "None", "", "x", "1e400", "(1,)", "{}", "True", "\x7f", "a/b"]
)
def test_any_value_of_any_option_is_accepted_or_refused_in_one_line(tmp_path, value, monkeypatch, capsys):
    """Except tokenizer=gpt2 and source=owt, which need a network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    for field in dataclasses.fields(PrepareConfig):
        words = {"source": "a.txt", "tokenizer": "bytes", "num_proc": "1", "out_dir": "out", field.name: value}
        with suppress(ConfigError, SystemExit):
            prepare_owt.main([f"--{name}={text}" for name, text in words.items()])
    assert "Traceback" not in capsys.readouterr().err


def test_a_data_set_of_the_hub_is_read_like_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = ["short", None, "long " * 100, *["end"] * 20]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    options = dict(dataset=str(tmp_path / "hub"), tokenizer="bytes", val_fraction=0.5, max_document=100)
    with pytest.raises(
        ConfigError, match="hub, row [0-9]+ of (train|val) has 500 (characters|bytes of text): max_document=100"
    ):
        prepare(PrepareConfig(**options, out_dir=str(tmp_path / "out")))
    prepare(PrepareConfig(**options, out_dir=str(tmp_path / "out"), skip_bad=True))
    _, tokens = read_tokens(str(tmp_path / "out"))
    assert sorted(bytes([*tokens["train"], *tokens["val"]]).splitlines()) == [b"end"] * 20 + [b"short"]


def test_several_quickstarts_can_prepare_the_data_at_once(tmp_path, monkeypatch):
    """All find the data missing, all write before one of them is done, and all can read the data afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("print('some text')\n" * 1000)
    monkeypatch.setattr(prepare_owt, "stdlib_files", lambda: [str(tmp_path / "a.py")])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    publish = prepare_owt.publish

    def together(*args):
        barrier.wait(30)
        publish(*args)

    monkeypatch.setattr(prepare_owt, "publish", together)

    def quickstart():
        prepare_owt.prepare_default("data/stdlib_char96")
        TokenData("data/stdlib_char96", 64)

    processes = [context.Process(target=quickstart) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(os.listdir("data/stdlib_char96")) == ["meta.json", "train.bin", "val.bin"]


def test_prepare_owt_works_as_a_command(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 500)
    done = run_forked(
        "prepare_owt.py", f"--source={tmp_path}", "--tokenizer=char96", f"--out_dir={tmp_path}/out", "--num_proc=2"
    )
    assert done.returncode == 0, done.stderr
    assert "training and" in done.stdout and "1 documents" in done.stdout
    done = run_forked("prepare_owt.py", f"--source={tmp_path}/nothing", "--tokenizer=char96")
    assert done.returncode == 1 and done.stderr.startswith("error: source=") and "Traceback" not in done.stderr


# -- nanoGPT's folders


def nanogpt_folder(path, ids, meta=None):
    """A folder as nanoGPT's data/*/prepare.py write it: uint16 tokens and, for characters, a pickled vocabulary."""
    path.mkdir()
    np.array(ids[:-40], dtype=np.uint16).tofile(path / "train.bin")
    np.array(ids[-40:], dtype=np.uint16).tofile(path / "val.bin")
    if meta is not None:
        (path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return str(path)


def test_a_nanogpt_folder_of_characters_is_converted(tmp_path):
    text = "First Citizen: Before we proceed any further, hear me speak!\n" * 5
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    folder = nanogpt_folder(tmp_path / "shakespeare_char", [stoi[char] for char in text], meta)
    with pytest.raises(ConfigError, match=f"--source={folder}"):
        TokenData(folder, 16)
    prepare(PrepareConfig(source=folder))
    data = TokenData(folder, 16)
    assert tokenizer_of(data.meta).decode(data.tokens["val"].read([0], 40)[0]) == text[-40:]
    x, _ = data.train_batch(seed=0, step=0, rows=2, start=0, stop=2)
    assert tokenizer_of(data.meta).decode(x[0].tolist()) in text


def test_a_nanogpt_folder_of_bpe_tokens_is_converted_and_one_of_other_tokens_is_refused(tmp_path):
    folder = nanogpt_folder(tmp_path / "openwebtext", [15496, 995, 50256] * 50)
    prepare(PrepareConfig(source=folder))
    meta = TokenData(folder, 16).meta
    assert (meta["tokenizer"], meta["vocab_size"], meta["train_tokens"]) == ("gpt2", 50257, 110)
    with pytest.raises(ConfigError, match="nanoGPT's tokens stay in"):
        PrepareConfig(source=nanogpt_folder(tmp_path / "moved", [1] * 50), out_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="train.bin holds token 60000"):
        prepare(PrepareConfig(source=nanogpt_folder(tmp_path / "other", [60000] * 50)))


class Opens:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    trap = str(tmp_path / "trap")
    folder = nanogpt_folder(tmp_path / "data", [1] * 50, {"itos": Opens(trap)})
    with pytest.raises(ConfigError, match="meta.pkl is not the vocabulary.*--tokenizer=chars"):
        prepare(PrepareConfig(source=folder))
    assert not os.path.exists(trap) and not os.path.exists(os.path.join(folder, "meta.json"))


# -- batches


def test_batches_depend_on_seed_and_step_only_and_ranks_share_them(char_data):
    data = TokenData(char_data, 32)
    whole_x, whole_y = data.train_batch(seed=1, step=5, rows=12, start=0, stop=12)
    x, y = TokenData(char_data, 32).train_batch(seed=1, step=5, rows=12, start=4, stop=8)
    assert torch.equal(x, whole_x[4:8]) and torch.equal(y, whole_y[4:8]) and x.dtype == torch.int64
    assert torch.equal(whole_x[:, 1:], whole_y[:, :-1])
    for seed, step in ((1, 6), (2, 5)):
        assert not torch.equal(data.train_batch(seed, step, 12, 0, 12)[0], whole_x)
    stream = np.fromfile(os.path.join(char_data, "train.bin"), np.uint8).tobytes()
    assert all(bytes(row.to(torch.uint8).numpy()) in stream for row in whole_x)


def test_offsets_reach_both_ends_of_the_file(tmp_path):
    np.arange(40, dtype=np.uint8).tofile(tmp_path / "train.bin")
    np.arange(40, dtype=np.uint8).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.json").write_text(json.dumps(dict(vocab_size=96, dtype="uint8", train_tokens=40, val_tokens=40)))
    data = TokenData(str(tmp_path), 32)
    x, y = data.train_batch(seed=0, step=0, rows=500, start=0, stop=500)
    assert x.min() == 0 and y.max() == 39


def test_validation_rows_do_not_overlap_and_never_leave_the_file(char_data):
    data = TokenData(char_data, 32)
    for eval_tokens in (1, 32, 1000, 4000, 10**9):
        rows = data.val_rows(eval_tokens)
        assert len(rows) == max(1, min(eval_tokens // 32, 3999 // 32))
        assert (np.diff(rows) >= 32).all() and rows[0] >= 0 and rows[-1] + 33 <= 4000
        assert np.array_equal(rows, data.val_rows(eval_tokens))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda d: os.remove(d / "meta.json"), ["meta.json", "missing"]),
        (lambda d: (d / "meta.json").write_text("{"), ["meta.json", "broken"]),
        (lambda d: (d / "meta.json").write_text('{"dtype": "float32"}'), ["meta.json", "broken"]),
        (lambda d: os.remove(d / "val.bin"), ["val.bin", "missing"]),
        (lambda d: os.truncate(d / "train.bin", 39), ["train.bin", "39 bytes", "40"]),
    ],
)
def test_broken_data_files_are_named(tmp_path, spoil, words):
    for split in ("train", "val"):
        np.arange(40, dtype=np.uint8).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.json").write_text(json.dumps(dict(vocab_size=96, dtype="uint8", train_tokens=40, val_tokens=40)))
    spoil(tmp_path)
    with pytest.raises(ConfigError) as caught:
        TokenData(str(tmp_path), 32)
    assert all(word in str(caught.value) for word in words), str(caught.value)


WRONG = [None, True, -1, 1.5, "96", [], {}, [96], {"a": 1}, 10**400, "\ud800", float("nan")]


@pytest.mark.parametrize(
    "name", ["dtype", "vocab_size", "train_tokens", "row_tokens", "tokenizer", "vocabulary", "train_fingerprint"]
)
def test_wrong_types_in_meta_json_are_one_line(tmp_path, char_data, name):
    """Whatever a field of meta.json holds, the data are read or a ConfigError is raised."""
    folder = shutil.copytree(char_data, tmp_path / "data")
    meta, named = json.loads((folder / "meta.json").read_text()), 0
    for value in WRONG:
        (folder / "meta.json").write_text(json.dumps({**meta, name: value}))
        with suppress(ConfigError):
            data = TokenData(str(folder), 32)
            tokenizer_of(data.meta).decode(data.train_batch(0, 0, 4, 0, 4)[0][0].tolist())
            continue
        named += 1
    assert named >= len(WRONG) - 2


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"dtype": "uint8"', b"1" * 5000]
)
def test_an_invalid_meta_json_is_one_line(tmp_path, char_data, content):
    folder = shutil.copytree(char_data, tmp_path / "data")
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(ConfigError, match="meta.json is broken") as caught:
        TokenData(str(folder), 32)
    assert "\n" not in str(caught.value)


def raise_stale_handle(*_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_data_truncated_or_unreachable_during_a_run_is_one_line(tmp_path, char_data, monkeypatch):
    """With a memory map, SIGBUS would end the process."""
    folder = shutil.copytree(char_data, tmp_path / "data")
    data = TokenData(str(folder), 32)
    before = data.train_batch(0, 0, 8, 0, 8)[0]
    os.truncate(folder / "train.bin", 20)
    with pytest.raises(RunFailed, match="train.bin has 20 bytes; it had 15945 when the run started: put"):
        data.train_batch(0, 0, 8, 0, 8)
    shutil.copy(os.path.join(char_data, "train.bin"), folder / "train.bin")
    assert torch.equal(data.train_batch(0, 0, 8, 0, 8)[0], before)  # the file is restored
    monkeypatch.setattr(os, "pread", raise_stale_handle)
    with pytest.raises(RunFailed, match="train.bin cannot be read .Stale file handle.: see to its disk, then --resume"):
        data.train_batch(0, 0, 8, 0, 8)


def test_other_tokens_in_a_file_of_the_same_size_are_noted(tmp_path, char_data):
    folder, said = shutil.copytree(char_data, tmp_path / "data"), []
    meta = TokenData(char_data, 32).meta
    check_same_data(TokenData(str(folder), 32).meta, meta, said.append)
    assert said == []
    tokens = np.fromfile(folder / "train.bin", np.uint8)
    tokens[::-1].tofile(folder / "train.bin")
    check_same_data(TokenData(str(folder), 32).meta, meta, said.append)
    assert len(said) == 1 and "note: the data changed since the checkpoint: train_fingerprint is" in said[0]
    (folder / "meta.json").write_text(json.dumps(meta))  # now with the fingerprint, like prepare_owt.py
    with pytest.raises(ConfigError, match="train.bin is not the file that meta.json describes"):
        TokenData(str(folder), 32)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 300_000, 3_000_000])
def test_a_fingerprint_covers_both_ends_of_a_large_file_and_all_of_a_small_one(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(content)
    found = {fingerprint(tmp_path / "a")}
    for at in {0, size // 3 if size < 250_000 else 1, size - 1} if size else ():
        (tmp_path / "a").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found.add(fingerprint(tmp_path / "a"))
    (tmp_path / "a").write_bytes(content + b"x")
    found.add(fingerprint(tmp_path / "a"))
    assert len(found) == {0: 2, 1: 3}.get(size, 5) and all(len(digest) == 16 for digest in found)


def test_a_context_longer_than_the_data_is_refused(char_data):
    with pytest.raises(ConfigError, match="block_size"):
        TokenData(char_data, 4000)


# -- the data of a resumed run


def test_data_with_another_vocabulary_are_refused_and_other_changes_are_noted():
    said = []
    meta = dict(tokenizer="gpt2", vocab_size=50257, train_tokens=100, val_tokens=10)
    check_same_data(meta, dict(meta), said.append)
    check_same_data(
        dict(meta, source="a"), dict(meta, classes=["x"]), said.append
    )  # a field that one of them lacks does not count
    assert said == []
    check_same_data(dict(meta, train_tokens=90), meta, said.append)
    assert len(said) == 1 and "train_tokens is 90, it was 100" in said[0]
    for other in (dict(tokenizer="char96"), dict(vocab_size=96)):
        with pytest.raises(ConfigError, match=f"{next(iter(other))} is "):
            check_same_data({**meta, **other}, meta, said.append)
    images = dict(dataset="cifar10", classes=["cat", "dog"], mean=[0.5], std=[0.2])
    with pytest.raises(ConfigError, match="classes is"):
        check_same_data(dict(images, classes=["dog", "cat"]), images, said.append)
    check_same_data(dict(images, mean=[0.4]), images, said.append)
    assert "mean is [0.4], it was [0.5]" in said[-1]


def test_a_run_does_not_resume_with_another_tokenizer(tiny, char_data, tmp_path):
    train.main([*tiny, "--max_steps=2"])
    other = shutil.copytree(char_data, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": "bytes"}))
    with pytest.raises(ConfigError, match="tokenizer is 'bytes', but the checkpoint was trained on 'char96'"):
        train.main([*tiny, "--max_steps=4", "--resume", f"--data_dir={other}"])


def test_the_vocab_size_that_is_offered_can_be_factored(tmp_path, capsys):
    """22 has no factors near its square root, as a BTT head needs, so the next number that has some is offered."""
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstu\n" * 200)
    prepare_owt.main([f"--source={tmp_path}/text.txt", "--tokenizer=chars", f"--out_dir={tmp_path}/data"])
    out = capsys.readouterr().out
    offered = int(re.search(r"22 characters: take --vocab_size=(\d+)", out)[1])
    factor_sizes(offered, offered, BTT)
    assert 22 < offered <= 30
    with pytest.raises(ConfigError, match="no factorisation"):
        factor_sizes(22, 22, BTT)
