"""Files on a local disk, NFS or an object store behind one small interface (`pyarrow.fs`).

Existence means complete: a local file is written under a temporary name, synced and renamed. An
object is one put request, or above 10 MB an upload in parts that stays invisible until it is
completed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.errors import CorruptFileError, StorageError
from pipeline.filesystems import explained, filesystem_of, retried
from pipeline.messages import shorter, shown_path
from pipeline.plain_json import RESTORE, value_of_file

# Errors of file systems that support no hard link, or no further one to the file.
NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@retried
def write_bytes(uri: str, data: bytes | memoryview | pa.Buffer, *, private: bool = False) -> None:
    """Writes a whole file so that it either exists completely or not at all.

    Args:
        uri: path or URI of the file.
        data: its content.
        private: nobody but its owner may read the file; in an object store the store decides.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    filesystem, path = filesystem_of(uri)
    with explained("write", uri):
        if isinstance(filesystem, fs.LocalFileSystem):
            _write_local(path, data, private)
        else:
            # A context manager would complete the object even after a failed write.
            stream = filesystem.open_output_stream(path)
            stream.write(data)
            stream.close()


def _write_local(path: str, data: bytes | memoryview | pa.Buffer, private: bool) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        mode = 0o600 if private else 0o666  # less what the process's umask takes away
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, mode), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _sync(folder)


@retried
def link_or_copy(source: str, target: str) -> None:
    """Gives an immutable file a second name: a hard link on a disk, a copy in an object store.

    Raises:
        StorageError: the source is missing or the target cannot be written.
    """
    filesystem, path = filesystem_of(target)
    with explained("write", target):
        if not isinstance(filesystem, fs.LocalFileSystem):
            filesystem.copy_file(filesystem_of(source)[1], path)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.link(source, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            write_bytes(target, read_bytes(source))
        _sync(os.path.dirname(path))


def move(source: str, target: str) -> None:
    """Moves a file to another folder of the same storage and replaces a file of that name there.

    Raises:
        StorageError: the source is missing or the target cannot be written.
    """
    filesystem, path = filesystem_of(target)
    with explained("move", source):
        if isinstance(filesystem, fs.LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        filesystem.move(filesystem_of(source)[1], path)


@retried
def remove(uri: str) -> None:
    """Removes a file; a missing file is no error."""
    filesystem, path = filesystem_of(uri)
    with explained("remove", uri), contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def remove_empty_folders(uri: str) -> None:
    """Removes a folder and all folders below it, unless one of them still holds a file."""
    filesystem, path = filesystem_of(uri)
    if exists(uri) and not files_below(uri):
        with explained("remove", uri):
            filesystem.delete_dir(path)


def read_bytes(uri: str) -> bytes:
    """Content of a file.

    Raises:
        StorageError: the file does not exist or cannot be read.
    """
    return _read(uri).to_pybytes()


@retried
def _read(uri: str) -> pa.Buffer:
    """Content of a file, in one request besides the request for its size."""
    with explained("read", uri), _input_file(uri) as file:
        return file.read_buffer()


@retried
def opened(uri: str) -> pa.NativeFile:
    """A file open for reading at any place.

    Raises:
        StorageError: the file does not exist or cannot be read.
    """
    with explained("read", uri):
        return _input_file(uri)


def _input_file(uri: str) -> pa.NativeFile:
    filesystem, path = filesystem_of(uri)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    if is_local and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is a folder, pipe or device, and no file")  # a pipe might never open
    return filesystem.open_input_file(path)


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    return _info(uri).type != fs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Whether a path is a file that exists: no folder, pipe, socket or device."""
    return _info(uri).type == fs.FileType.File


def is_folder(uri: str) -> bool:
    """Whether a path is a folder that exists."""
    return _info(uri).type == fs.FileType.Directory


@retried
def _info(uri: str) -> fs.FileInfo:
    filesystem, path = filesystem_of(uri)
    with explained("look for", uri):
        return filesystem.get_file_info(path)


def list_files(uri: str, suffix: str = "") -> list[fs.FileInfo]:
    """Files directly inside a folder in the order of their names; none if the folder is missing.

    Names that begin with a dot, such as names of unfinished writes, are left out.
    """
    return sorted(
        (
            info
            for info in _entries(uri)
            if info.type == fs.FileType.File
            and info.base_name.endswith(suffix)
            and not info.base_name.startswith(".")
        ),
        key=lambda info: info.base_name,
    )


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly inside a folder; none if that folder is missing."""
    return sorted(info.base_name for info in _entries(uri) if info.type == fs.FileType.Directory)


@retried
def _entries(uri: str, recursive: bool = False) -> list[fs.FileInfo]:
    filesystem, path = filesystem_of(uri)
    with explained("list", uri):
        selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        infos = filesystem.get_file_info(selector)
    try:
        return [info for info in infos if info.path]  # a name is decoded when it is read
    except UnicodeDecodeError as error:
        raise StorageError(
            f"cannot list {uri}: the name {error.object!r} in it is not UTF-8: rename it"
        ) from error


def file_states(uri: str) -> list[tuple[str, int, int]]:
    """Sorted `(path, bytes, modification time in ns)` of a file, or of all files below a folder.

    A path that does not exist has no states.
    """
    info = _info(uri)
    infos = [info] if info.type == fs.FileType.File else _entries(uri, recursive=True)
    return sorted((i.path, i.size, i.mtime_ns) for i in infos if i.type == fs.FileType.File)


def files_below(uri: str) -> dict[str, fs.FileInfo]:
    """All files below a folder by their relative paths, unfinished writes included."""
    _, path = filesystem_of(uri)
    prefix = path.rstrip("/") + "/"
    files = (info for info in _entries(uri, recursive=True) if info.type == fs.FileType.File)
    return {info.path.removeprefix(prefix): info for info in sorted(files, key=lambda i: i.path)}


def write_json(uri: str, value: Any) -> None:
    """Writes a JSON value, indented, with its keys in the given order."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def read_json(uri: str, shape: Any = Any, remedy: str = RESTORE) -> Any:
    """Reads a JSON file.

    Args:
        shape: type of the value, as `plain_json.checked` takes it.
        remedy: advice for people, if the file holds something else.

    Raises:
        CorruptFileError: the file is no JSON, or its value has another shape.
        StorageError: the file is missing or cannot be read.
    """
    return value_of_file(uri, read_bytes(uri), shape, remedy)


def read_json_lines(uri: str, shape: Any, remedy: str = RESTORE) -> list[Any]:
    """Reads a file with one JSON value a line, each as `read_json` reads a whole file."""
    lines = enumerate(read_bytes(uri).split(b"\n"), start=1)
    return [value_of_file(f"{uri}:{n}", line, shape, remedy) for n, line in lines if line.strip()]


def write_table(uri: str, table: pa.Table, **options: Any) -> int:
    """Encodes a table as Parquet in memory and writes it in one call; returns its size in bytes."""
    return write_tables(uri, table.schema, [table], **options)


def write_tables(uri: str, schema: pa.Schema, tables: Iterable[pa.Table], **options: Any) -> int:
    """Writes the rows of several tables as one file; each table begins a row group."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, schema, compression="zstd", write_page_checksum=True, **options
    ) as writer:
        for table in tables:
            writer.write_table(table)
    buffer = sink.getvalue()
    write_bytes(uri, buffer)
    return buffer.size


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a Parquet file, or some of its columns, and checks the page checksums.

    Raises:
        CorruptFileError: the file is truncated or fails its checksums.
        StorageError: the file is missing or cannot be read.
    """
    with _checked_parquet(uri) as file:
        table = file.read(columns)
        table.validate(full=True)  # texts are UTF-8
        return table


def read_batches(uri: str, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Reads a Parquet file as batches of some rows each; checks and errors as in `read_table`."""
    with _checked_parquet(uri) as file:
        for batch in file.iter_batches(num_rows):
            batch.validate(full=True)
            yield batch


@contextmanager
def _checked_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    source = pa.BufferReader(_read(uri))
    try:
        yield pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise CorruptFileError(
            f"cannot read {shown_path(uri)}: it is not a complete Parquet file: {shorter(error)}"
        ) from error


def join(root: str, *parts: str) -> str:
    """Joins a path or URI and the parts below it."""
    return "/".join([root.rstrip("/"), *parts])


def sync_folder(folder: Path) -> None:
    """Flushes a local folder and everything below it to disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
