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
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DistillationError, PromptError
from pipeline.messages import listed, shorter, shown
from pipeline.plain_json import NotJSONError, value_at, value_in
from pipeline.synthesis.stored_file import StoredFile

PIECE_BYTES = 1 << 20
PARQUET_ROWS = 256  # rows of a Parquet file that become Python values at once
LONGEST_CELL = 1 << 24  # characters; a quote that is never closed would read the whole file
LONGEST_ROW = 1 << 26  # bytes of a line, or of a value of an array; a bomb has no line breaks
MOST_BLANK_LINES = 1 << 20  # in a row; more of them are a bomb or a damaged file
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_GZIP = b"\x1f\x8b"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A value that is cut off fails where the text ends, or at the beginning of its last string.
_LONGEST_CUT_TOKEN = 32
_BETWEEN = re.compile(r"[\s,]*")

Rows = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class UnreadableCell:
    """Cell of Arrow that is no value of Python, which matters only if somebody reads the column."""

    type: str


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
    if not storage.is_file(path) and not storage.is_folder(path):
        raise PromptError(
            f"{path} is a pipe, a socket or a device, which has no end: write its rows to a file, "
            "and name that"
        )
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
        with StoredFile(path) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True, **options)
            yield from _arrow_rows(path, file.schema_arrow, file.iter_batches(PARQUET_ROWS))
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise PromptError(
            f"{path} is not a complete Parquet file: {shorter(error)}; copy or write it again"
        ) from error


def _arrow_rows(path: str, schema: pa.Schema, batches: Iterable[Any]) -> Rows:
    """Rows of record batches or tables."""
    if twice := _twice(schema.names):
        raise PromptError(f"{path} has the columns {twice} twice: give each column its own name")
    number = 0
    for batch in batches:
        columns = [
            _python_values(path, number, name, batch.column(i))
            for i, name in enumerate(schema.names)
        ]
        for cells in zip(*columns, strict=True):
            yield f"{path} row {number}", dict(zip(schema.names, cells, strict=True))
            number += 1


def _python_values(path: str, start: int, name: str, column: Any) -> list[Any]:
    """Values of a column of a batch that begins at row `start`."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path}: the column {shown(name)} holds bytes that are not UTF-8 in rows {start} to "
            f"{start + len(column) - 1}: write it as text, or as binary if nothing reads it"
        ) from error
    except (ValueError, OverflowError):  # such as a time behind the year 9999
        cell = UnreadableCell(str(column.type))
        return [cell if is_valid else None for is_valid in column.is_valid().to_pylist()]


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
        yield from _arrow_rows(path, table.data.schema, table.iter(PARQUET_ROWS))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DistillationError):
            raise
        raise PromptError(
            f"{path} is not a complete dataset folder: {shorter(error)}; copy or write it again"
        ) from error


def _text_rows(path: str) -> Rows:
    name = path.lower().removesuffix(".gz")
    with StoredFile(path) as file:
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
                f"{path} is compressed, and damaged or cut off: {shorter(error)}; copy it again"
            ) from error


def _peek(stream: BinaryIO) -> bytes:
    """The next bytes of a stream, which stay in it."""
    return cast(io.BufferedReader, stream).peek(PIECE_BYTES)


def _begins(stream: BinaryIO, *marks: bytes) -> bool:
    return _peek(stream).startswith(marks)


def _decoded_lines(path: str, stream: BinaryIO) -> Iterator[str]:
    num_blank = 0
    for number in itertools.count(1):
        line = stream.readline(LONGEST_ROW + 1)
        if not line:
            return
        num_blank = 0 if line.strip() else num_blank + 1
        if len(line) > LONGEST_ROW or num_blank > MOST_BLANK_LINES:
            found = "a line longer than 64 MiB" if num_blank == 0 else "a million blank lines"
            raise PromptError(
                f"{path}:{number}: found {found}, which no table of prompts has: the file is "
                "damaged, or no text; write it again, one row a line"
            )
        if b"\0" in line:
            raise PromptError(
                f"{path}:{number}: found a NUL byte: the file is damaged, no text or in UTF-16; "
                "save it as UTF-8"
            )
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
            row = value_in(line)
        except NotJSONError as error:
            raise PromptError(_not_json(f"{path}:{number}", error, is_line=True)) from error
        yield f"{path}:{number}", row


def _not_json(place: str, error: NotJSONError, is_line: bool) -> str:
    if error.position is None:
        return f"{place}: cannot be read as JSON: {error.reason}"
    column = f" at column {error.position + 1}" if is_line else ""
    return (
        f"{place}: not valid JSON: {error.reason}{column}; a file holds one row a line, or all "
        "rows in one array"
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
                value, end = value_at(self._text, self._used)
            except NotJSONError as error:
                position = -1 if error.position is None else error.position
                near_end = position > len(self._text) - _LONGEST_CUT_TOKEN
                may_be_cut = near_end or error.reason.startswith("Unterminated string")
                if may_be_cut and len(self._text) - self._used > LONGEST_ROW:
                    raise PromptError(
                        f"{self._path}:{self.line} row {number}: the row is longer than 64 MiB, or "
                        "never ends: the file is damaged; write it again"
                    ) from error
                if not may_be_cut or not self._read():
                    self._use_until(max(position, self._used))
                    place = f"{self._path}:{self.line} row {number}"
                    raise PromptError(_not_json(place, error, is_line=False)) from error
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
                f"{path}:{start}: not a row of a table: {shorter(error)}; put a text that holds a "
                "quote, a comma or a line break in quotes, and double the quotes inside it"
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
            f"{place}: the header has one column, {shown(columns[0])}: separate the columns by "
            f"{delimiter!r} in place of {others[0]!r}"
        )
    if twice := _twice(column for column in columns if column):
        raise PromptError(f"{place}: the header names {twice} twice: give each column its own name")
    return columns


def _twice(columns: Iterable[str]) -> str:
    """Columns that have one name, for people; empty if there are none."""
    names = sorted(name for name, count in Counter(columns).items() if count > 1)
    return f"[{listed(map(shown, names))}]" if names else ""
