"""Text files -> documents with their place.

Reads .jsonl and .parquet, and any other file as plain text; text and .jsonl also packed, as .gz or .zst. A text is the
same whatever container it comes in (`normalise`). Nulls are left out, and bytes that are not UTF-8 replaced; both are
counted. What cannot be read is a ConfigError that names file and line or row, or with skip_bad is left out and counted.
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

LONGEST_DOCUMENT = 16_000_000  # characters; a longer text file is cut at line ends, so that memory stays bounded
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
    line: int | None = None  # in plain text, the number of its first line
    split: str | None = None  # "train" or "val" where the source says so

    def where(self, position):
        """The place of a character of its text."""
        if self.line is None:
            return self.place
        return f"{self.place}:{self.line + self.text.count(chr(10), 0, position)}"


def normalise(text):
    r"""One form of text: lines end in \n, no byte order mark before it, and no halves of surrogate pairs."""
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

    text_field  name of the text in .jsonl objects and .parquet columns
    skip_bad    leave out what cannot be read, in place of a ConfigError; None: the script has no such option
    """

    def __init__(self, text_field="text", skip_bad=False):
        self.text_field, self.skip_bad = text_field, skip_bad
        self.reset()

    def reset(self):
        """Count anew."""
        self.nulls, self.bad, self.first_bad = 0, 0, None
        self.replaced = Counter()  # bytes that are not UTF-8, by file
        self.path = None  # the file being read

    def documents(self, path):
        """-> iterator of Documents"""
        self.path = path
        codecs.register_error("nanoeinsum_replace", self._replace)
        read = {".jsonl": self._jsonl, ".parquet": self._parquet}.get(ending_of(path), self._plain)
        try:
            yield from read(path)
        except (OSError, EOFError, zlib.error) as error:
            self.refuse(path, f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})")

    def refuse(self, place, why):
        if not self.skip_bad:
            raise ConfigError(
                f"{place} {why}" + "; or leave out what cannot be read: --skip_bad" * (self.skip_bad is False)
            )
        self.bad += 1
        self.first_bad = self.first_bad or f"{place} {why}"

    def notes(self):
        """Lines about what was left out or replaced."""
        if self.nulls:
            yield f"{self.nulls:,} nulls left out"
        if self.bad:
            yield f"{self.bad:,} left out that cannot be read; the first: {self.first_bad}"
        if self.replaced:
            yield (
                f"{self.replaced.total():,} bytes of {len(self.replaced):,} files are not UTF-8 and became U+FFFD; "
                f"the first file: {next(iter(self.replaced))}"
            )

    def _replace(self, error):
        """codecs' error handler."""
        self.replaced[self.path] += error.end - error.start
        return "\ufffd", error.end

    def checked(self, text, place, line=None, as_is=False):
        """-> iterator of one Document, or of none where the text is null or no text. as_is: not normalised."""
        if text is None:
            self.nulls += 1
        elif not isinstance(text, str):
            self.refuse(place, f"has a {self.text_field!r} that is {type(text).__name__}, not text: see --text_field")
        else:
            document = Document(text if as_is else normalise(text), place, line)
            if (at := document.text.find("\0")) >= 0 and not as_is:
                self.refuse(document.where(at), "holds a NUL: it is no text, or not in UTF-8")
            else:
                yield document

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
        """A file is one document; one over LONGEST_DOCUMENT is cut at line ends."""
        line = 1
        with self._open(path) as file:
            while text := file.read(LONGEST_DOCUMENT):
                if len(text) == LONGEST_DOCUMENT:
                    text += file.readline(LONGEST_DOCUMENT)
                for document in self.checked(text, path, line):
                    yield document
                    line += document.text.count("\n")

    def _jsonl(self, path):
        with self._open(path) as file:
            for number, line in enumerate(file, 1):
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

    def _parquet(self, path):
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
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
                try:
                    for batch in file.iter_batches(1000, row_groups=[group], columns=[self.text_field]):
                        for text in batch.column(0).to_pylist():
                            yield from self.checked(text, f"{path}, row {row}")
                            row += 1
                except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
                    self.refuse(f"{path}, rows {row} to {first + rows - 1}", f"cannot be read ({first_line(error)})")
                first += rows


def read_text(path):
    """The whole of a text file, read as TextReader does, as one string."""
    return "".join(document.text for document in TextReader(skip_bad=None).documents(path))


def local_files(source, extensions, say):
    """The files of a folder that end in one of `extensions`, packed or not, sorted; or the one file that source is.

    Says what the others are, but for hidden files and folders, whose names begin with a dot; and of which
    files it is not known by their ending that they are text.
    """
    if os.path.isfile(source):
        say_plain([source], say)
        return [source]
    if not os.path.isdir(source):
        raise ConfigError(f"source={source} is neither 'owt', 'stdlib' nor a local file or folder")
    endings = {"." + extension.lower().lstrip(".") for extension in extensions}
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
    endings = {ending_of(path) for path in files} - {".txt", ".jsonl", ".parquet"}
    if endings:
        say(f"read as plain text: {', '.join(sorted(ending or 'files without an ending' for ending in endings))}")


def ending_of(path):
    """ ".txt" of a.TXT and of a.txt.gz; "" where there is none"""
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path, flags=re.IGNORECASE))[1].lower()


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__
