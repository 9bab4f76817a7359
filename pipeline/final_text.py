"""Part of an answer that says the result: the text behind its thoughts.

Checkers, votes, the choice of best answers and the readers of replies look at it. Files keep the
whole answer.
"""

from __future__ import annotations

import re
from collections import deque

# A tag that is quoted, such as `<think>` in back-quotes, is spoken of and opens nothing.
_TAG = re.compile(
    r"(?<![`\"'])(?P<open><(?:seed:)?(?:think|thinking|thought|reasoning)>|\[THINK\]"
    r"|<\|START_THINKING\|>|\u25c1think\u25b7)"
    r"|(?<![`\"'])(?P<close></(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]"
    r"|<\|END_THINKING\|>|\u25c1/think\u25b7)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)


def final_text(text: str, begins_in_thought: bool = False) -> str:
    """Text behind the last thought, without white space around it.

    Thoughts stand between `<think>` and `</think>`, the tags `thinking`, `thought`, `reasoning` or
    `seed:think`, or what other models write, such as `[THINK]` and `[/THINK]`. A chat template may
    open the thought in the prompt, so an answer may hold the closing tag alone.

    Args:
        text: answer of a model.
        begins_in_thought: whether the prompt ends with an opened thought, see `opens_thought`.

    Returns:
        The final text; nothing if the last thought is not closed, since the answer was cut in it.
    """
    is_open, start = begins_in_thought, 0
    for tag in _TAG.finditer(text):
        is_code = text[max(0, tag.start() - 1) : tag.start()].isalnum()  # such as `List<Reasoning>`
        if tag["open"] is None or not is_code:
            is_open, start = tag["open"] is not None, tag.end()
    return "" if is_open else text[start:].strip()


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt, or its end, leaves a thought open that the answer continues."""
    tags = deque(_TAG.finditer(prompt), maxlen=1)
    return bool(tags) and tags[0]["open"] is not None and not prompt[tags[0].end() :].strip()


def is_thought_tag(text: str) -> bool:
    """Whether a text is a tag that opens or closes a thought."""
    return _TAG.fullmatch(text) is not None


def last_code_block(text: str) -> str | None:
    """Content of the last closed code fence, for checkers that look at code alone.

    Returns:
        The lines between the fences; None if the text has no closed fence.
    """
    opened: re.Match[str] | None = None
    content = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2].strip():
            content = text[opened.end() + 1 : fence.start()]
            opened = None
    return content
