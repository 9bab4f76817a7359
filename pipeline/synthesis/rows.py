"""Rows of the files that people have: JSON Lines, a JSON array, CSV, Parquet, dataset folders.

Text files may be compressed with gzip, whatever their name, and may begin with a byte order mark.
Files are read piece by piece: whoever takes few rows reads little of a large file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import PromptError

PIECE_BYTES = 1 << 20
PARQUET_ROWS = 256  # rows of a Parquet file that become Python values at once
LONGEST_CELL = 1 << 24  # characters; a quote that is never closed would read the whole file
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_GZIP = b"\x1f\x8b"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A value that is cut off fails where the text ends, or at the beginning of its last string.
_LONGEST_CUT_TOKEN = 32
_BETWEEN = re.compile(r"[\s,]*")

Rows = Iterator[tuple[str, Any]]


def numbered_rows(path: str, limit: int | None = None) -> Rows:
    """Reads the rows of a file or a dataset folder.

    Args:
        limit: largest number of rows to read.

    Yields:
        Place of the row, `file:line` or `file row N`, and the row itself.

    Raises:
        PromptError: the source is missing, empty or malformed.
    """
    if not storage.exists(path):
        hint = ": patterns are not read, so name each file" if re.search(r"[*?]", path) else ""
        raise PromptError(f"{path} does not exist{hint}")
    num_rows = 0
    for place, row in itertools.islice(_rows(path), limit):
        num_rows += 1
        yield place, row
    if num_rows == 0:
        raise PromptError(f"{path} has no rows")


def _rows(path: str) -> Rows:
    if storage.is_folder(path):
        return _dataset_rows(path)
    if path.lower().endswith(".parquet"):
        return _parquet_rows(path)
    if path.lower().removesuffix(".gz").endswith(TEXT_FORMATS):
        return _text_rows(path)
    raise PromptError(
        f"{path} is not a file that can be read: give one whose name ends in "
        f"{', '.join(TEXT_FORMATS)} or .parquet (text may be compressed, as in .jsonl.gz), or a "
        "dataset folder written by save_to_disk"
    )


def _parquet_rows(path: str) -> Rows:
    # Without this, a whole row group is read for its first row.
    options = {"buffer_size": PIECE_BYTES, "pre_buffer": False}
    try:
        with storage.StoredFile(path) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True, **options)
            batches = file.iter_batches(PARQUET_ROWS)
            for i, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield f"{path} row {i}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"{path} is not a complete Parquet file: {error}; copy or write it again"
        ) from error


def _dataset_rows(path: str) -> Rows:
    if not storage.exists(storage.join(path, "dataset_info.json")):
        raise PromptError(
            f"{path} is a folder, but no dataset folder written by save_to_disk: name each file as "
            "a source of its own; if the dataset has several splits, name the folder of one split"
        )
    import datasets  # slow to import, and only this kind of source needs it

    try:
        # Arrow's values are plain; the library's own would decode images that nobody reads.
        table: Any = datasets.load_from_disk(path).with_format("arrow")
        batches = table.iter(PARQUET_ROWS)
        for i, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path} row {i}", row
    except (pa.ArrowException, OSError) as error:
        raise PromptError(
            f"{path} is not a complete dataset folder: {error}; copy or write it again"
        ) from error


def _text_rows(path: str) -> Rows:
    name = path.lower().removesuffix(".gz")
    with storage.StoredFile(path) as file:
        stream: BinaryIO = io.BufferedReader(file, PIECE_BYTES)
        if _begins(stream, _GZIP):
            stream = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=stream), PIECE_BYTES))
        try:
            if _begins(stream, *_UTF_16):
                raise PromptError(f"{path} is in UTF-16: save it as UTF-8")
            if _begins(stream, codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            if name.endswith((".csv", ".tsv")):
                yield from _csv_rows(path, stream, "\t" if name.endswith(".tsv") else ",")
            elif _peek(stream).lstrip().startswith(b"["):
                yield from _array_rows(path, stream)
            else:
                yield from _line_rows(path, stream)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise PromptError(
                f"{path} is compressed, and damaged or cut off: {error}; copy it again"
            ) from error


def _peek(stream: BinaryIO) -> bytes:
    """The next bytes of a stream, which stay in it."""
    return cast(io.BufferedReader, stream).peek(PIECE_BYTES)


def _begins(stream: BinaryIO, *marks: bytes) -> bool:
    return _peek(stream).startswith(marks)


def _decoded_lines(path: str, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise PromptError(_not_utf8(path, number, error)) from error


def _not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{path}:{line}: not UTF-8, found the byte 0x{byte:02x}: save the file as UTF-8"


def _line_rows(path: str, stream: BinaryIO) -> Rows:
    for number, line in enumerate(_decoded_lines(path, stream), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise PromptError(_not_json(f"{path}:{number}", reason)) from error
        except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
            raise PromptError(_not_json(f"{path}:{number}", str(error))) from error


def _not_json(place: str, reason: str) -> str:
    return (
        f"{place}: not valid JSON: {reason}; a file holds one row a line, or all rows in one array"
    )


def _array_rows(path: str, stream: BinaryIO) -> Rows:
    """Rows of a JSON array, of which no more than a piece and a row are held at a time."""
    text = _TextAhead(path, stream)
    text.take("[")
    for number in itertools.count():
        if text.take("]"):
            break
        yield f"{path}:{text.line} row {number}", text.value(number)
    if text.next_character():
        raise PromptError(
            f"{path}:{text.line}: the file goes on behind its array: give one row a line, or all "
            "rows in one array"
        )


class _TextAhead:
    """JSON text of a stream, read ahead piece by piece.

    Attributes:
        line: line of the file in which the next character stands.
    """

    def __init__(self, path: str, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._used = "", 0
        self.line = 1

    def next_character(self) -> str:
        """The first character behind spaces and commas; empty at the end of the file."""
        while True:
            spaces = _BETWEEN.match(self._text, self._used)
            assert spaces is not None, "the pattern matches the empty text"
            self._use_until(spaces.end())
            if self._used < len(self._text) or not self._read():
                return self._text[self._used : self._used + 1]

    def take(self, character: str) -> bool:
        """Uses the next character if it is the given one; returns whether it is."""
        is_next = self.next_character() == character
        self._use_until(self._used + is_next)
        return is_next

    def value(self, number: int) -> Any:
        """Uses the next value, which is row `number`."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._used)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - _LONGEST_CUT_TOKEN
                may_be_cut = near_end or error.msg.startswith("Unterminated string")
                if not may_be_cut or not self._read():
                    self._use_until(error.pos)
                    place = f"{self._path}:{self.line} row {number}"
                    raise PromptError(_not_json(place, error.msg)) from error
            except (ValueError, RecursionError) as error:  # as in `_line_rows`
                place = f"{self._path}:{self.line} row {number}"
                raise PromptError(_not_json(place, str(error))) from error
            else:
                self._use_until(end)
                return value

    def _use_until(self, end: int) -> None:
        self.line += self._text.count("\n", self._used, end)
        self._used = end

    def _read(self) -> bool:
        """Reads as much again as is not used, at least a piece; returns whether there was more."""
        self._text, self._used = self._text[self._used :], 0
        data = self._stream.read(max(PIECE_BYTES, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise PromptError(_not_utf8(self._path, line, error)) from error
        return bool(data)


def _csv_rows(path: str, stream: BinaryIO, delimiter: str) -> Rows:
    """Rows of a table with a header; an empty cell is no value."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_decoded_lines(path, stream), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PromptError(
                f"{path}:{start}: not a row of a table: {error}; put a text that holds a quote, a "
                "comma or a line break in quotes, and double the quotes inside it"
            ) from error
        place, start = f"{path}:{start}", reader.line_num + 1
        if not any(cells):
            continue
        if columns is None:
            columns = _header(place, cells, delimiter)
        elif len(cells) != len(columns):
            raise PromptError(
                f"{place}: the row has {len(cells)} cells, and the header names {len(columns)} "
                "columns: put a text that holds a comma or a line break in quotes"
            )
        else:
            yield place, {c: cell or None for c, cell in zip(columns, cells, strict=True) if c}


def _header(place: str, cells: list[str], delimiter: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    others = [mark for mark in ",;\t|" if mark != delimiter and mark in columns[0]]
    if len(columns) == 1 and others:
        raise PromptError(
            f"{place}: the header has one column, {columns[0]!r}: separate the columns by "
            f"{delimiter!r} in place of {others[0]!r}"
        )
    named = [column for column in columns if column]
    if twice := sorted({column for column in named if named.count(column) > 1}):
        raise PromptError(f"{place}: the header names {twice} twice: give each column its own name")
    return columns
