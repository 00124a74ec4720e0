"""Tests text files of every kind against the text written to them, and the errors for what is no text."""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest

import sample
import text_files
from configurator import ConfigError
from data import ByteTokenizer
from text_files import TextReader, local_files, read_text

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RAW = "\ufeffnaïve\r\nold\rnew\n\r\nend 🙂"
CLEAN = "naïve\nold\nnew\n\nend 🙂"


def write(path, text):
    """Write `text` as the only document of a file, in the format of the path's ending."""
    name, raw = os.path.basename(path), text.encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text]}), path)
        return
    if ".jsonl" in name:
        raw = b"\xef\xbb\xbf" + json.dumps({"text": text}).encode() + b"\r\n"
    if name.endswith(".gz"):
        raw = gzip.compress(raw, mtime=0)
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as packed:
            packed.write(raw)
        raw = sink.getvalue().to_pybytes()
    with open(path, "wb") as file:
        file.write(raw)


def read(path, **options):
    """-> the texts of the documents in a file, and the reader's notes."""
    reader = TextReader(**options)
    return [document.text for document in reader.documents(str(path))], list(reader.notes())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.gz", "a.txt.zst"])
def test_a_text_is_the_same_in_every_container(tmp_path, name):
    write(str(tmp_path / name), RAW)
    assert read(tmp_path / name) == ([CLEAN], [])


@pytest.mark.parametrize("name", [None, "a.txt", "a.txt.gz"])
def test_a_prompt_is_read_like_the_data(tmp_path, name):
    start = RAW
    if name:
        write(str(tmp_path / name), RAW)
        start = f"FILE:{tmp_path / name}"
    prompt, ids = sample.read_prompt(sample.SampleConfig(start=start), ByteTokenizer(), 100)
    assert prompt == CLEAN and ids == list(CLEAN.encode())


def test_a_long_file_is_read_in_pieces(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(1, 101))
    (tmp_path / "long.txt").write_text(lines, newline="\r\n")
    pieces = list(TextReader(max_document=50).documents(str(tmp_path / "long.txt")))
    assert "".join(piece.text for piece in pieces) == lines and len(pieces) > 10
    for piece in pieces:  # each begins at the line it states
        assert piece.text.startswith(f"line {piece.line}\n") and piece.text.endswith("\n")


LONG = "a word " * 1_000_000  # 7 MB


def long_file(folder, kind):
    """A file with one or many documents of 7 MB between two short ones -> path, how the error begins, texts left."""
    path, texts = str(folder / f"long.{kind.split()[-1]}"), ["one", LONG, "three"]
    if kind == "bomb.parquet":
        pq.write_table(pa.table({"text": texts}), path, compression="zstd")
        return path, f"{path}, rows 1 to 3 would unpack from", []
    if "dictionary" in kind:  # the long cell is stored once for 50 rows: unpacked they would take 350 MB
        table = pa.table({"text": pa.array(["one", *[LONG] * 50, "three"]).dictionary_encode()})
        pq.write_table(table, path, store_schema="stored" in kind)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    else:
        with (gzip.open if kind.endswith("gz") else open)(path, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return path, f"{path}:2 is too long a line", ["one", "three"]
    return path, f"{path}, row 2 has 7,000,000 bytes of text", ["one", "three"]


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "parquet", "bomb.parquet", "dictionary parquet", "stored dictionary parquet"]
)
def test_a_document_that_is_too_long_is_named_and_takes_no_memory(tmp_path, kind):
    path, place, left = long_file(tmp_path, kind)
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            read(path, max_document=10_000)
        texts, notes = read(path, max_document=10_000, skip_bad=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert str(caught.value).startswith(place) and "max_document=10000" in str(caught.value)
    assert texts == left and "because unreadable: " in notes[0] and place in notes[0]
    assert peak < 4e6 and pool.max_memory() < 4e7, (peak, pool.max_memory())


def test_a_prompt_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 10_000)
    (tmp_path / "a.txt").write_text(LONG)
    with pytest.raises(ConfigError, match="a.txt has more than 10,000 characters"):
        read_text(str(tmp_path / "a.txt"))


def test_one_long_line_of_plain_text_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text(LONG)
    tracemalloc.start()
    documents = TextReader(max_document=10_000).documents(str(tmp_path / "a.txt"))
    lengths = [len(document.text) for document in documents]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(lengths) == len(LONG) and len(lengths) >= 7 and max(lengths) <= 1_010_000 and peak < 6e6, (lengths, peak)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is not a regular file"):
        read(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is not a regular file"):
        sample.read_prompt(sample.SampleConfig(start=f"FILE:{tmp_path / name}"), ByteTokenizer(), 100)


@pytest.mark.parametrize("kind", ["gz", "zst", "jsonl", "parquet"])
def test_damaged_files_of_every_kind_are_one_line(tmp_path, kind):
    """Random bytes are changed in one copy after another: each copy is read or gives a ConfigError."""
    random, path = np.random.default_rng(0), tmp_path / f"a.{kind}"
    texts = [f"document {i} {random.bytes(20).hex()}" for i in range(200)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
    elif kind == "zst":
        path = tmp_path / "a.txt.zst"
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write("\n".join(texts).encode())
    else:
        with (gzip.open if kind == "gz" else open)(path, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    whole, failures = path.read_bytes(), 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for at in random.integers(len(whole), size=random.integers(1, 5)):
            spoilt[at] = random.integers(256)
        path.write_bytes(spoilt[: random.integers(len(whole))] if random.random() < 0.3 else spoilt)
        try:
            read(path)
        except ConfigError as error:
            failures += 1
            assert "\n" not in str(error)
        read(path, skip_bad=True)
    assert failures >= 10


def test_bytes_that_are_not_utf8_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("café, été, même".encode("latin-1"))
    (tmp_path / "b.txt").write_text("\ufffd is a character too", encoding="utf-8")
    reader = TextReader()
    texts = [document.text for name in ("a.txt", "b.txt") for document in reader.documents(str(tmp_path / name))]
    assert texts == ["caf\ufffd, \ufffdt\ufffd, m\ufffdme", "\ufffd is a character too"]
    (note,) = reader.notes()
    assert note.startswith("4 bytes of 1 files are not UTF-8") and note.endswith("a.txt")


def test_halves_of_surrogate_pairs_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude42"}')
    assert read(tmp_path / "a.jsonl")[0] == ["a\ufffdb 🙂"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "text".encode("utf-16"), ["a.txt is UTF-16"]),
        ("a.txt", b"one\ntwo\nth\0ree\n", ["a.txt:3 holds a NUL"]),
        ("a.txt.gz", gzip.compress(b"one\nt\0wo", mtime=0), ["a.txt.gz:2 holds a NUL"]),
        ("a.txt", b"PK\x03\x04....", ["a.txt is a zip archive"]),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], ["a.txt.gz cannot be read"]),
        ("a.txt.gz", gzip.compress(os.urandom(3000), mtime=0)[:1000] + b"x" * 2000, ["a.txt.gz cannot be read"]),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd" + b"x" * 100, ["a.txt.zst cannot be read"]),
        ("a.jsonl", b'{"text": "a\\u0000b"}', ["a.jsonl:1 holds a NUL"]),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, ["a.jsonl:2 is not a JSON object"]),
        ("a.parquet", b"no parquet at all", ["a.parquet is not a parquet file"]),
        ("b.txt", None, ["b.txt cannot be read (No such file"]),
    ],
)
def test_files_that_are_no_text_are_named_or_left_out(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("--skip_bad") and all(word in message for word in words), message
    texts, notes = read(tmp_path / name, skip_bad=True)
    assert texts in ([], ["a"]) and "left out because unreadable: 1;" in notes[0] and words[0] in notes[0]


def test_null_cells_are_left_out_and_numbers_are_named_by_row(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "three", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["one", "three"], ["2 nulls left out"])
    pq.write_table(pa.table({"text": [None, 7]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="b.parquet, row 2 has a 'text' that is int"):
        read(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="no column 'body' but text: see --text_field"):
        read(tmp_path / "a.parquet", text_field="body")


def test_a_damaged_parquet_page_is_named_by_its_rows_and_left_out(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"document {i} {os.urandom(20).hex()}" for i in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="snappy", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        file.write(b"\xff" * 500)
    with pytest.raises(ConfigError, match="a.parquet, rows 101 to 200 cannot be read"):
        read(path)
    got, notes = read(path, skip_bad=True)
    assert got == texts[:100] + texts[200:] and "rows 101 to 200" in notes[0]


def test_files_with_other_endings_are_skipped_with_a_note_and_hidden_ones_silently(tmp_path):
    for name in ("b.TXT", "a.txt.gz", "sub/c.jsonl", "d.md", "e.md", "Makefile", ".f.txt", ".g/h.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    said = []
    files = local_files(str(tmp_path), ("txt", "jsonl"), said.append)
    assert [os.path.relpath(path, tmp_path) for path in files] == ["a.txt.gz", "b.TXT", "sub/c.jsonl"]
    assert len(said) == 1 and "passed over: 2 .md, 1 without an ending (see --extensions)" in said[0]
    with pytest.raises(ConfigError, match="no file that ends in .csv but .*2 .md"):
        local_files(str(tmp_path), ("csv",), said.append)
    assert local_files(str(tmp_path / "d.md"), ("txt",), said.append) == [str(tmp_path / "d.md")]
    assert said[1:] == ["read as plain text: .md"]


def test_the_error_for_an_unreadable_prompt_offers_no_option_of_another_script(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(ConfigError) as caught:
        read_text(str(tmp_path / "a.txt"))
    assert "skip_bad" not in str(caught.value) and "a.txt:1 holds a NUL" in str(caught.value)
