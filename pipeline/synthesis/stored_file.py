"""A stored file as a stream, for formats of which only a part is read."""

from __future__ import annotations

import io
from typing import Any

from pipeline.filesystems import explained, retried
from pipeline.storage import opened


class StoredFile(io.RawIOBase):
    """A file as a stream that reads no further than it is asked to.

    Raises:
        StorageError: the file does not exist or cannot be read.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri, self._position, self._file = uri, 0, opened(uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size()}
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._piece(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    @retried
    def _piece(self, start: int, num_bytes: int) -> bytes:
        with explained("read", self._uri):
            return self._file.read_at(num_bytes, start)
