"""An S3 server on loopback and a wire in front of it that can be cut."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

PIECE_BYTES = 4096
FOREIGN_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


@dataclass
class Wire:
    """A TCP proxy on a free port of loopback.

    The next connections can be cut: each of them is reset as soon as the given number of bytes
    has passed in the given direction.

    Attributes:
        num_cuts: since `cut` was last called.
        stalled: whether a connection is held up, since `stall` was last called.
    """

    target: tuple[str, int]
    num_cuts: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    _going: threading.Event = field(default_factory=threading.Event)
    _stall: tuple[str, int] | None = None
    _listener: socket.socket = field(default_factory=socket.socket)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _to_cut: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self, direction: str, after_bytes: int, times: int) -> None:
        """Cuts what passes `after_bytes` in a direction (`upload`, `download`), so many times.

        Connections on which less passes are left alone, so that of several requests the large one
        is hit.
        """
        with self._lock:
            self._to_cut = [(direction, after_bytes)] * times
            self.num_cuts = 0

    def stall(self, direction: str, after_bytes: int) -> None:
        """Holds up what passes `after_bytes` in a direction; what is held is lost when mended."""
        self.stalled.clear()
        self._going.clear()
        self._stall = (direction, after_bytes)

    def mend(self) -> None:
        """Cuts and holds up nothing more."""
        with self._lock:
            self._to_cut.clear()
            self._stall = None
        self._going.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            for direction, source, sink in (
                ("upload", client, server),
                ("download", server, client),
            ):
                threading.Thread(
                    target=self._pump, args=(direction, source, sink), daemon=True
                ).start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        try:
            while piece := source.recv(PIECE_BYTES):
                passed += len(piece)
                stall = self._stall
                if stall is not None and stall[0] == direction and passed > stall[1]:
                    self.stalled.set()
                    self._going.wait()
                    _reset(source)
                    _reset(sink)
                    return
                if self._is_cut(direction, passed):
                    _reset(source)
                    _reset(sink)
                    return
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(source)
            _reset(sink)

    def _is_cut(self, direction: str, passed: int) -> bool:
        with self._lock:
            if not self._to_cut or self._to_cut[0][0] != direction:
                return False
            if passed <= self._to_cut[0][1]:
                return False
            self._to_cut.pop()
            self.num_cuts += 1
            return True


def _reset(end: socket.socket) -> None:
    """Closes with RST, as a broken connection does, also under a reader in another thread."""
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.shutdown(socket.SHUT_RDWR)
        end.close()
    except OSError:
        pass


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class ObjectStore:
    """A running server with one bucket, behind a wire.

    Attributes:
        env: what a process needs to reach it through the wire.
        root: its bucket, which no other server has: a process keeps its connections to a bucket.
    """

    wire: Wire
    env: dict[str, str]
    root: str

    def settings(self, credentials: Path) -> dict[str, str]:
        """Variables that a config may hold: the keys lie in a file, which is written here."""
        keys = {name.lower(): self.env[name] for name in KEYS}
        lines = ["[default]", *(f"{name} = {value}" for name, value in keys.items())]
        credentials.write_text("\n".join(lines) + "\n")
        others = {name: value for name, value in self.env.items() if name not in KEYS}
        return others | {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An S3 server in this process, on loopback; meanwhile this process reaches it, too."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port())
    exceptions = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"]))
    env = {
        "AWS_ENDPOINT_URL": wire.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": exceptions,
        "NO_PROXY": exceptions,
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in FOREIGN_SETTINGS:
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            root = f"s3://bucket-{wire.port}"
            store, bucket = fs.FileSystem.from_uri(f"{root}?allow_bucket_creation=true")
            store.create_dir(bucket)
            yield ObjectStore(wire, env, root)
    finally:
        wire.close()
        server.stop()
