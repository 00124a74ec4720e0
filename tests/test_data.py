"""Tokenizers against independent ones, preparation against plain loops, batches as pure functions."""

import json
import os
import random
import string

import numpy as np
import pytest
import torch

import prepare_owt
from configurator import ConfigError
from conftest import run_forked
from data import CharTokenizer, GPT2Tokenizer, TokenData, read_meta
from prepare_owt import Config, prepare


def texts(count, seed=0):
    """Documents of printable ASCII, some with characters outside the vocabulary."""
    draw = random.Random(seed)
    alphabet = string.ascii_letters + string.digits + string.punctuation + " \n"
    documents = ["".join(draw.choices(alphabet, k=draw.randrange(1, 300))) for _ in range(count)]
    return [text + draw.choice(["", "", "", "\t", "é", "日本"]) for text in documents]


def allowed(text):
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
def test_other_characters_are_named(bad):
    with pytest.raises(ConfigError, match="position 2"):
        CharTokenizer().encode("ab" + bad)
    assert CharTokenizer().encode_document("ab" + bad) is None


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory):
    """A byte-level BPE in GPT-2's file formats, trained by Hugging Face's tokenizers, and that tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator([*texts(200), "Hello world, hello words"] * 3, vocab_size=400, min_frequency=2)
    folder = tmp_path_factory.mktemp("bpe")
    vocab, merges = reference.save_model(str(folder))
    # tiktoken wants the bytes first, in the order of OpenAI's file, then the merges in theirs
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
    for text in [*texts(50, seed=1), "Hello world", "it's  two   spaces\n\n", "日本 é"]:
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.skipif(
    "GPT2_BPE_DIR" not in os.environ, reason="GPT2_BPE_DIR names no folder with GPT-2's vocab.bpe and encoder.json"
)
def test_gpt2s_own_files_give_the_published_ids():
    tokenizer = GPT2Tokenizer(os.environ["GPT2_BPE_DIR"])
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]  # text, not the special token
    assert tokenizer.decode([15496, 995, 50256, 50303]) == "Hello world<|endoftext|>"


def test_bpe_mistakes_say_what_to_do(tmp_path, monkeypatch):
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


# -- preparation


def read_tokens(folder):
    meta = read_meta(folder)
    return meta, {
        split: np.fromfile(os.path.join(folder, f"{split}.bin"), dtype=meta["dtype"]) for split in ("train", "val")
    }


def documents_of(tokens, end):
    """Cut a token file at its document ends -> list of tuples."""
    return [tuple(part[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1) if len(part)]


def write_corpus(kind, folder, documents):
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
def test_characters_of_a_local_folder(tmp_path, monkeypatch, kind, num_proc):
    monkeypatch.setattr(prepare_owt, "BATCH_CHARACTERS", 2000)  # many batches
    documents = [text.replace("\n", " ") for text in texts(120)]  # so that newlines are document ends only
    (tmp_path / "in").mkdir()
    write_corpus(kind, tmp_path / "in", documents)
    out = str(tmp_path / "out")
    meta = prepare(
        Config(source=str(tmp_path / "in"), tokenizer="char96", out_dir=out, val_fraction=0.2, num_proc=num_proc)
    )
    stored, tokens = read_tokens(out)
    kept = [text for text in documents if allowed(text)]
    assert stored == meta and meta["documents"] == 120 and meta["left_out"] == 120 - len(kept) > 0
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(text) + 1 for text in kept)
    got = {split: documents_of(tokens[split], 0) for split in tokens}
    assert sorted(got["train"] + got["val"]) == sorted(tuple(char_ids(text)) for text in kept)
    in_order = [ids for text in kept if (ids := tuple(char_ids(text))) in set(got["train"])]
    assert got["train"] == in_order  # the order of the files, whatever the number of processes
    assert 0.05 < len(got["val"]) / len(kept) < 0.4
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]


def test_bpe_of_the_hubs_layout(tmp_path, small_bpe):
    """A local folder laid out as a data set on the hub; each document ends with 50256; the published split."""
    datasets = pytest.importorskip("datasets")
    folder, reference = small_bpe
    documents = [text for text in texts(200) if text]
    (tmp_path / "hub" / "plain_text").mkdir(parents=True)
    half = len(documents) // 2
    for i, part in enumerate((documents[:half], documents[half:])):
        datasets.Dataset.from_dict({"text": part}).to_parquet(
            tmp_path / "hub" / "plain_text" / f"train-{i:05}-of-00002.parquet"
        )
    out = str(tmp_path / "out")
    prepare(
        Config(source="owt", dataset=str(tmp_path / "hub"), bpe_dir=folder, out_dir=out, val_fraction=0.1, num_proc=2)
    )
    _, tokens = read_tokens(out)
    split = datasets.Dataset.from_dict({"text": documents}).train_test_split(test_size=0.1, seed=2357, shuffle=True)
    for ours, theirs in (("train", "train"), ("val", "test")):
        assert documents_of(tokens[ours], 50256) == [
            tuple(reference.encode(text).ids) for text in split[theirs]["text"]
        ]


def test_one_document_is_split_at_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 100)
    prepare(Config(source=str(path), tokenizer="char96", out_dir=str(tmp_path / "out"), val_fraction=0.1, num_proc=1))
    _, tokens = read_tokens(str(tmp_path / "out"))
    assert len(tokens["val"]) == 100 and len(tokens["train"]) == 901
    assert [*tokens["train"], *tokens["val"]] == char_ids("abcdefghij" * 100 + "\n")


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_owt, "LONGEST_DOCUMENT", 50)
    lines = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "long.txt").write_text(lines)
    pieces = list(prepare_owt.text_documents(str(tmp_path / "long.txt")))
    assert "".join(pieces) == lines and len(pieces) > 10 and all(piece.endswith("\n") for piece in pieces)


def test_the_same_again_gives_the_same_and_a_failure_leaves_the_old(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    config = Config(source=str(tmp_path / "a.txt"), tokenizer="char96", out_dir=str(tmp_path / "out"), num_proc=1)
    prepare(config)
    before = {name: open(tmp_path / "out" / name, "rb").read() for name in os.listdir(tmp_path / "out")}
    prepare(config)
    (tmp_path / "a.txt").write_text("\t")  # nothing is left of this one
    with pytest.raises(ConfigError, match="no token came out of 1 documents"):
        prepare(config)
    assert before == {name: open(tmp_path / "out" / name, "rb").read() for name in before}


def test_the_standard_library_is_there():
    files = prepare_owt.stdlib_files()
    assert sum(map(os.path.getsize, files)) > 3e6
    names = {os.path.basename(path) for path in files}
    assert {"argparse.py", "ast.py", "json"} - names == {"json"} and not any("test_" in name for name in names)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"text": "fine"}\n{"text": 3}\n', ["int", "text_field"]),
        ('{"text": "fine"}\n{"body": "x"}\n', [":2", "text"]),
        ('{"text": "fine"}\nnot json\n', [":2", "JSON"]),
    ],
)
def test_broken_jsonl_is_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError) as caught:
        prepare(Config(source=str(tmp_path), tokenizer="char96", out_dir=str(tmp_path / "out"), num_proc=1))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_prepare_as_a_command(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 500)
    done = run_forked(
        "prepare_owt.py", f"--source={tmp_path}", "--tokenizer=char96", f"--out_dir={tmp_path}/out", "--num_proc=2"
    )
    assert done.returncode == 0, done.stderr
    assert "training and" in done.stdout and "1 documents" in done.stdout
    done = run_forked("prepare_owt.py", f"--source={tmp_path}/nothing", "--tokenizer=char96")
    assert done.returncode == 1 and done.stderr.startswith("error: source=") and "Traceback" not in done.stderr


# -- batches


def test_batches_are_a_function_of_seed_and_step_and_ranks_share_them(char_data):
    data = TokenData(char_data, 32)
    whole_x, whole_y = data.train_batch(seed=1, step=5, rows=12, start=0, stop=12)
    x, y = TokenData(char_data, 32).train_batch(seed=1, step=5, rows=12, start=4, stop=8)
    assert torch.equal(x, whole_x[4:8]) and torch.equal(y, whole_y[4:8]) and x.dtype == torch.int64
    assert torch.equal(whole_x[:, 1:], whole_y[:, :-1])
    for seed, step in ((1, 6), (2, 5)):
        assert not torch.equal(data.train_batch(seed, step, 12, 0, 12)[0], whole_x)
    stream = data.tokens["train"].tobytes()
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
def test_broken_data_is_named(tmp_path, spoil, words):
    for split in ("train", "val"):
        np.arange(40, dtype=np.uint8).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.json").write_text(json.dumps(dict(vocab_size=96, dtype="uint8", train_tokens=40, val_tokens=40)))
    spoil(tmp_path)
    with pytest.raises(ConfigError) as caught:
        TokenData(str(tmp_path), 32)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_context_longer_than_the_data_is_refused(char_data):
    with pytest.raises(ConfigError, match="block_size"):
        TokenData(char_data, 4000)
