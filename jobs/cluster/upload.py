"""The upload of a job: our packages and the config, in a folder that Ray unpacks for the job.

It holds what an installation holds, and nothing else that somebody keeps beside it: everybody who
can reach the job server can read it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.filesystems import explained

PACKAGES = ("pipeline", "teachers", "students", "jobs")
DATA_FILES = ("pipeline/report/*.j2", "pipeline/synthesis/templates/*.txt")
"""Files besides modules, as `package-data` in pyproject.toml lists them."""
MAX_BYTES = 16 * 2**20
"""Size of an upload; our packages take a tenth of it. Ray keeps uploads in the head's memory."""

NOT_TAKEN = (
    "and an upload takes nothing from outside the packages: put a file in its place, or move it "
    "elsewhere"
)


def build_upload(packages_root: Path, config_text: str, folder: Path) -> Path:
    """Fills a folder with the files of a job: the four packages and `config.yaml`.

    Ray names the upload by a hash of relative names and contents, so equal inputs are uploaded
    once. The config keeps its mode 0600 when Ray unpacks it.

    Args:
        packages_root: folder that holds the four packages.
        config_text: content of `config.yaml`.
        folder: folder to fill; it is made here, or is empty.

    Returns:
        `folder`.

    Raises:
        ConfigError: a package is missing, a module is a link or no file, the files are too large,
            or `folder` holds something.
        StorageError: a file cannot be read or written.
    """
    missing = [name for name in PACKAGES if not (packages_root / name / "__init__.py").is_file()]
    if missing:
        raise ConfigError(
            f"{packages_root} has no package {', '.join(missing)}: an upload needs all of "
            f"{', '.join(PACKAGES)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"the folder for the upload, {folder}, is not empty")
    config = config_text.encode()
    sizes = {"the config": len(config)}
    _check_size(sizes)
    for source in _files(packages_root):
        relative = source.relative_to(packages_root)
        with explained("read", str(source)):
            content = _content(packages_root, relative)
        sizes[str(relative)] = len(content)
        _check_size(sizes)
        _write(folder / relative, content, 0o644)
    _write(folder / "config.yaml", config, 0o600)
    return folder


def _files(root: Path) -> Iterator[Path]:
    """Modules and data files of our packages, as an installation has them."""
    for name in PACKAGES:
        yield from _modules(root / name)
    for pattern in DATA_FILES:
        yield from (path for path in sorted(root.glob(pattern)) if path.name[0] != ".")


def _modules(package: Path) -> Iterator[Path]:
    """Modules of a package and of the packages inside it.

    A folder without `__init__.py` is no package, and a name that cannot be imported is no module.
    """
    for path in sorted(package.iterdir()):
        if path.suffix == ".py" and path.stem.isidentifier():
            yield path
        elif path.name.isidentifier() and (path / "__init__.py").is_file():
            yield from _modules(path)


def _content(root: Path, relative: Path) -> bytes:
    """Content of a file; of a file that is too large for an upload, only its beginning.

    Raises:
        ConfigError: the file, or a folder above it, is a link, or it is no file at all.
    """
    path = root / relative
    for part in [path, *path.parents[: len(relative.parts) - 1]]:
        if part.is_symlink():
            raise ConfigError(f"{part} is a link to {os.readlink(part)}, {NOT_TAKEN}")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ConfigError(f"{path} is no file, {NOT_TAKEN}")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read(MAX_BYTES + 1)


def _check_size(sizes: dict[str, int]) -> None:
    """Refuses files that together are too large.

    Args:
        sizes: bytes by the name of the file.
    """
    if sum(sizes.values()) > MAX_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"the upload of a job has more than {MAX_BYTES // 2**20} MiB, most of it in {largest}: "
            "keep data outside the packages and the config"
        )


def _write(path: Path, content: bytes, mode: int) -> None:
    with explained("write", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            file.write(content)
