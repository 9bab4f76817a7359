"""The pages for readers: their text, their code blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

from tests.support.command_line import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *DOCS,
    *sorted((ROOT / "examples").glob("*/README.md")),
]
STAND_INS = {
    "CONFIG": str(ROOT / "examples/quickstart/config.yaml"),
    "DATA": str(ROOT / "tests/data/gsm8k"),
    "FOLDER": "/tmp/folder",
    "HEAD": "localhost",
    "PATH": str(ROOT / "examples/quickstart/student"),
    "SUBMISSION_ID": "run-score-abc-a1",
}
"""What stands for the words that a reader replaces."""


def text_of(page: Path) -> str:
    return page.read_text()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    lines = [
        line.split("  #")[0].split("\t#")[0].strip()
        for block in blocks(page, "bash")
        for line in block.splitlines()
    ]
    return [re.sub(r" # .*$", "", line).strip() for line in lines if line]


def commands() -> list[str]:
    """The commands of all pages, each once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def with_stand_ins(command: str) -> list[str]:
    for word, real in STAND_INS.items():
        command = re.sub(rf"\b{word}\b", real, command)
    return shlex.split(command)


def of_kind(start: str) -> list[str]:
    found = [command for command in commands() if command.startswith(start)]
    assert found, f"no page has a command that starts with {start!r}"
    return found
