"""Text files -> documents, each with its place.

Reads .jsonl and .parquet, and any other file as plain text; plain text and .jsonl may be packed as .gz or .zst. A text
is the same whatever container it comes in (`normalise`). Nulls are left out, bytes that are not UTF-8 are replaced, and
both are counted. What cannot be read is a ConfigError that names file and line or row; with skip_bad it is left out and
counted. Memory does not grow with files, lines or cells: what is longer than max_document is cut or refused.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from typing import NamedTuple

from configurator import ConfigError

MAX_DOCUMENT = 16_000_000  # characters
MAX_RATIO = 1000  # of a parquet column's size in memory to that in its file; text is packed 2 to 20 times
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes
NOT_TEXT = {
    b"\xff\xfe\0\0": "is UTF-32: convert it to UTF-8",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"BZh": "is packed by bzip2: unpack it",
    b"\xfd7zXZ": "is packed by xz: unpack it",
    b"%PDF-": "is a PDF: convert it to text",
    b"PAR1": "is a parquet file: name it .parquet",
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    text: str
    place: str  # its file, with row or line
    line: int | None = None  # of plain text: the number of its first line
    split: str | None = None  # "train" or "val" if the source decides it

    def where(self, position):
        """The place of the character at `position` of the text."""
        if self.line is None:
            return self.place
        return f"{self.place}:{self.line + self.text.count(chr(10), 0, position)}"


def normalise(text):
    r"""The text in one form: lines end in \n, no byte order mark in front, no halves of surrogate pairs."""
    text = text.lstrip("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON
        text = LONE_SURROGATE.sub("\ufffd", text)
    return text


class TextReader:
    """Reads files one by one, and counts what it leaves out.

    text_field    name of the text in .jsonl objects and .parquet columns
    skip_bad      leave out what cannot be read, instead of raising ConfigError; None: the script has no such option
    max_document  characters: plain text is cut near that, and a longer line of .jsonl or cell of .parquet cannot be read
    """

    def __init__(self, text_field="text", skip_bad=False, max_document=MAX_DOCUMENT):
        self.text_field, self.skip_bad, self.max_document = text_field, skip_bad, max_document
        self.reset()

    def reset(self):
        """Set all counts to zero."""
        self.nulls, self.bad, self.first_bad = 0, 0, None
        self.replaced = Counter()  # bytes that are not UTF-8, by file
        self.path = None  # the file being read

    def documents(self, path):
        """The documents of one file -> iterator of Documents. ConfigError, or a count, for what cannot be read."""
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait for ever
            self.refuse(path, "is not a regular file")
            return
        codecs.register_error("nanoeinsum_replace", self._replace)
        read = {".jsonl": self._jsonl, ".parquet": self._parquet}.get(ending_of(path), self._plain)
        try:
            yield from read(path)
        except (OSError, EOFError, zlib.error) as error:
            self.refuse(path, f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})")

    def refuse(self, place, why):
        """ConfigError, or with skip_bad a count: `place` cannot be read, and why not, as a verb phrase."""
        if not self.skip_bad:
            raise ConfigError(
                f"{place} {why}" + "; or leave out what cannot be read: --skip_bad" * (self.skip_bad is False)
            )
        self.bad += 1
        self.first_bad = self.first_bad or f"{place} {why}"

    def notes(self):
        """-> iterator of lines about what was left out or replaced"""
        if self.nulls:
            yield f"{self.nulls:,} nulls left out"
        if self.bad:
            yield f"left out because unreadable: {self.bad:,}; the first: {self.first_bad}"
        if self.replaced:
            yield (
                f"{self.replaced.total():,} bytes of {len(self.replaced):,} files are not UTF-8 and became U+FFFD; "
                f"the first file: {next(iter(self.replaced))}"
            )

    def _replace(self, error):
        """An error handler as codecs calls it: one U+FFFD in the place of what is not UTF-8."""
        self.replaced[self.path] += error.end - error.start
        return "\ufffd", error.end

    def checked(self, text, place, line=None, as_is=False):
        """-> iterator of one Document; of none if `text` is null, not text, or too long

        line   of plain text, which was cut before: the number of its first line
        as_is  keep the text as it is, without `normalise`
        """
        if text is None:
            self.nulls += 1
        elif not isinstance(text, str):
            self.refuse(place, f"has a {self.text_field!r} that is {type(text).__name__}, not text: see --text_field")
        elif line is None and len(text) > self.max_document:
            self.refuse(place, f"has {len(text):,} characters{self._too_long()}")
        else:
            document = Document(text if as_is else normalise(text), place, line)
            if (at := document.text.find("\0")) >= 0 and not as_is:
                self.refuse(document.where(at), "holds a NUL: it is not text, or not in UTF-8")
            else:
                yield document

    def checked_cell(self, cell, place, as_is=False):
        """As `checked`, of a pyarrow scalar; one that is far too long is never copied."""
        cell = getattr(cell, "value", cell)  # of a dictionary's
        size = cell.as_buffer().size if cell.is_valid and hasattr(cell, "as_buffer") else 0
        if size > 4 * self.max_document:  # bytes of UTF-8, up to 4 a character
            self.refuse(place, f"has {size:,} bytes of text{self._too_long()}")
        else:
            yield from self.checked(cell.as_py(), place, as_is=as_is)

    def _too_long(self):
        return f": max_document={self.max_document} characters, see --max_document"

    def _open(self, path):
        with open(path, "rb") as file:
            start = file.read(8)
        packing = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
        if packing == "gzip":
            file = gzip.open(path)
        elif packing == "zstd":
            import pyarrow

            file = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
        else:
            file = open(path, "rb")
        start = file.peek(8) if packing else start
        for magic, what in NOT_TEXT.items():
            if start.startswith(magic):
                file.close()
                self.refuse(path, what)
                return io.StringIO()
        # Line ends stay as they are for now, so that normalise is the one place that changes them.
        return io.TextIOWrapper(file, encoding="utf-8-sig", errors="nanoeinsum_replace", newline="")

    def _plain(self, path):
        """A file is one document; one over max_document is cut at the end of a line, or inside a very long line."""
        line = 1
        with self._open(path) as file:
            while text := file.read(self.max_document):
                if len(text) == self.max_document:
                    text += file.readline(1_000_000)
                for document in self.checked(text, path, line):
                    yield document
                    line += document.text.count("\n")

    def _jsonl(self, path):
        with self._open(path) as file:
            for number, line in enumerate(self._lines(file), 1):
                if line is None:
                    self.refuse(f"{path}:{number}", f"is too long a line{self._too_long()}")
                    continue
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    self.refuse(
                        f"{path}:{number}",
                        f"is not a JSON object with a {self.text_field!r} ({first_line(error)!r}): mend it, or see --text_field",
                    )
                    continue
                yield from self.checked(text, f"{path}:{number}")

    def _lines(self, file):
        """-> iterator of the lines of a file; None for one of more than max_document characters"""
        while line := file.readline(self.max_document + 1):
            if len(line) <= self.max_document or line.endswith(("\n", "\r")):
                yield line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = file.readline(1_000_000)
            yield None

    def _parquet(self, path):
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20)
        except pyarrow.ArrowInvalid as error:
            self.refuse(path, f"is not a parquet file ({first_line(error)})")
            return
        with file:
            if self.text_field not in file.schema_arrow.names:
                have = ", ".join(file.schema_arrow.names)
                self.refuse(path, f"has no column {self.text_field!r} but {have}: see --text_field")
                return
            first = 1  # row of the group
            for group in range(file.num_row_groups):
                rows, row = file.metadata.row_group(group).num_rows, first
                size, packed = column_bytes(file.metadata.row_group(group), self.text_field)
                first += rows
                if size > 4 * self.max_document and size > MAX_RATIO * packed:
                    place = f"{path}, rows {row} to {first - 1}"
                    self.refuse(place, f"would unpack from {packed:,} to {size:,} bytes of text{self._too_long()}")
                    continue
                # A dictionary may hold a long cell once for many rows: each row has its copy in a batch.
                batch_rows = min(16, max(1, 16 * self.max_document // max(1, size)))
                try:
                    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[self.text_field]):
                        for cell in batch.column(0):
                            yield from self.checked_cell(cell, f"{path}, row {row}")
                            row += 1
                except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
                    self.refuse(f"{path}, rows {row} to {first - 1}", f"cannot be read ({first_line(error)})")


def column_bytes(group, name):
    """Of the columns with that name, or inside it, in a row group of pyarrow's metadata: bytes in memory, bytes in the file."""
    columns = [group.column(number) for number in range(group.num_columns)]
    columns = [column for column in columns if f"{column.path_in_schema}.".startswith(f"{name}.")]
    return sum(c.total_uncompressed_size for c in columns), sum(c.total_compressed_size for c in columns)


def read_text(path):
    """The whole of a text file, read as TextReader does, as one string. ConfigError if it is longer than MAX_DOCUMENT."""
    text = ""
    for document in TextReader(skip_bad=None).documents(path):
        text += document.text
        if len(text) > MAX_DOCUMENT:
            raise ConfigError(f"{path} has more than {MAX_DOCUMENT:,} characters: give a shorter file")
    return text


def local_files(source, extensions, say):
    """The files of a folder that end in one of `extensions`, packed or not, sorted; or `source` itself if it is a file.

    say  called with a line about the files passed over, except hidden ones, whose names begin with a dot, and with one
         about the endings that are read as plain text though they do not promise it
    ConfigError if there is no such file.
    """
    if os.path.isfile(source):
        say_plain([source], say)
        return [source]
    if not os.path.isdir(source):
        raise ConfigError(f"source={source} is neither 'owt', 'stdlib' nor a local file or folder")
    endings = {"." + str(extension).lower().lstrip(".") for extension in extensions}
    files, others = [], Counter()
    for top, folders, names in os.walk(source, onerror=lambda error: say(f"passed over: {error}")):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if ending_of(name) in endings:
                files.append(os.path.join(top, name))
            else:
                others[ending_of(name) or "without an ending"] += 1
    passed_over = ", ".join(f"{count} {ending}" for ending, count in others.most_common(10))
    if not files:
        have = f" but {passed_over}" if others else ""
        raise ConfigError(
            f"source={source} holds no file that ends in {' '.join(sorted(endings))}{have}: see --extensions"
        )
    if others:
        say(f"{source}: {len(files):,} files taken; passed over: {passed_over} (see --extensions)")
    say_plain(files, say)
    return sorted(files)


def say_plain(files, say):
    """Report the endings that do not promise text."""
    endings = {ending_of(path) for path in files} - {".txt", ".jsonl", ".parquet"}
    if endings:
        say(f"read as plain text: {', '.join(sorted(ending or 'files without an ending' for ending in endings))}")


def ending_of(path):
    """ ".txt" for a.TXT and a.txt.gz; "" if there is none"""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path, flags=re.IGNORECASE))[1].lower()


def first_line(error):
    """The first line of an exception's message; its type's name if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
