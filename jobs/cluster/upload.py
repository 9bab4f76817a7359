"""The upload of a job: our packages and the config, in a folder that Ray unpacks for the job."""

import shutil
from pathlib import Path

from pipeline.errors import ConfigError

# Code, configs and templates; results that somebody keeps in a package's folder stay out.
UPLOADED_SUFFIXES = (".py", ".yaml", ".j2", ".txt")
PACKAGES = ("pipeline", "teachers", "students", "jobs")


def build_upload(packages_root: Path, config_text: str, folder: Path) -> Path:
    """Fills a folder with the files of a job: the four packages and `config.yaml`.

    Ray names the upload by a hash of relative names and contents, so equal inputs are uploaded
    once.

    Args:
        packages_root: folder that holds the four packages.
        config_text: content of `config.yaml`.
        folder: folder to fill; it is made here, or is empty.

    Returns:
        `folder`.

    Raises:
        ConfigError: a package is missing, or `folder` holds something.
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
    for name in PACKAGES:
        for source in sorted((packages_root / name).rglob("*")):
            relative = source.relative_to(packages_root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if hidden or source.suffix not in UPLOADED_SUFFIXES or not source.is_file():
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    config = folder / "config.yaml"
    config.touch(mode=0o600)
    config.write_text(config_text, encoding="utf-8")
    return folder
