"""Messages have one voice: lower case at the start and no full stop."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("pipeline", "teachers", "students", "jobs")
    for path in (ROOT / package).rglob("*.py")
)
NAMES = ("DeepSpeed", "LM", "LogprobsProcessor", "RAY_", "Ray", "vLLM")
"""Proper names that may open a message with a capital."""


def text_of(node: ast.expr) -> str:
    """The text of a message with `{}` for every value; empty if it is no literal text."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def messages(source: str) -> list[str]:
    """The texts of all errors that a module raises."""
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    calls = [error for error in raised if isinstance(error, ast.Call) and error.args]
    return [text for call in calls if (text := text_of(call.args[0]))]


def is_in_voice(message: str) -> bool:
    """Whether a message opens in lower case, proper names aside, and has no full stop."""
    opens_with_capital = re.match(r"[A-Z]", message) and not message.startswith(NAMES)
    holds_full_stop = re.search(r"\.(\s+[A-Z]|\s*$)", message)
    return not opens_with_capital and not holds_full_stop


def test_the_voice_is_told_from_others() -> None:
    source = """
raise ConfigError(f"{path} does not exist: create it")
raise ClusterError("The folder is not empty")
raise ClusterError("the folder is " + "not empty.")
raise ClusterError("the folder is full. Remove it")
raise TrainingError("DeepSpeed refuses the block")
"""
    assert [is_in_voice(message) for message in messages(source)] == [
        True,
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_errors_have_one_voice(module: Path) -> None:
    found = messages((ROOT / module).read_text())
    assert [message for message in found if not is_in_voice(message)] == []
