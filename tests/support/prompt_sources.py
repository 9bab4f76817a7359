"""Prompt files of tests: bytes or a maker of the file, with the prompts that stand in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.layout import Layout
from pipeline.synthesis.prompts import load_prompts, read_prompts, write_prompts
from tests.support.hostile import Case, check_answer


@dataclass(frozen=True)
class Source:
    """A source of prompts.

    Attributes:
        name: name of the file.
        content: bytes of the file, or a function that makes it at its path.
        prompts: texts that are read, or the first message's.
        settings: settings of the source.
    """

    name: str
    content: bytes | Callable[[Path], Any]
    prompts: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def read(self, folder: Path) -> tuple[str, ...]:
        """Reads the source, writes its prompts, and reads these again."""
        path = folder / self.name
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        settings = {"path": str(path), "domain": "d", "split": "train"} | self.settings
        config = PromptsConfig(sources=[PromptSource(**settings)])
        prompts, _ = read_prompts(config)
        layout = Layout(str(folder / "root"), "run")
        loaded = load_prompts(layout, write_prompts(layout, prompts))
        assert loaded == prompts
        return tuple(p.text if p.messages is None else p.messages[0]["content"] for p in loaded)


def check_prompts(case: Case, folder: Path) -> None:
    """Checks that a case's source is answered as the case says."""
    prompts = check_answer(case, lambda: case.given.read(folder))
    assert case.refusal or prompts == case.given.prompts


def lines(
    *rows: str, name: str = "p.jsonl", prompts: tuple[str, ...] = (), **settings: Any
) -> Source:
    """A file of lines behind a good one."""
    text = "\n".join(['{"text": "fine"}', *rows]) + "\n"
    return Source(name, text.encode("utf-8", "surrogatepass"), ("fine", *prompts), settings)


def row(**values: Any) -> str:
    """A row with a text, as a line."""
    return json.dumps({"text": "q"} | values)
