"""Answers in text, in the dialects of servers: content in parts, thoughts apart, names of ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from teachers.endpoint.replies import TextChoice
from teachers.rendering import THOUGHT_MARK

ENDS = {
    "stop": (
        "complete completed done end_of_text end_of_turn end_turn endoftext eos eos_token finished "
        "stop stop_sequence stop_str stop_token word"
    ),
    "length": (
        "error_limit length limit max_length max_new_tokens max_output_tokens max_tokens "
        "model_context_window_exceeded model_length token_limit"
    ),
    "content_filter": (
        "blocklist content_filter content_filtered error_toxic guardrail_intervened "
        "prohibited_content recitation refusal safety sensitive spii"
    ),
    "failed": (
        "abort aborted cancelled error insufficient_system_resource network_error not_finished "
        "server_error time_limit"
    ),
}
"""Names that servers give to the end of an answer, in lower case, by what they stand for. They are
those of OpenAI, vLLM, TGI, llama.cpp, Anthropic, Gemini, Mistral, Cohere, Together, Bedrock,
watsonx, DeepSeek and Zhipu. `failed` answers were broken off by the server."""
PREFIX = "finish_reason_"
_END_OF = {name: end for end, names in ENDS.items() for name in names.split()}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class TextAnswer:
    """Answer of a server in text.

    Attributes:
        text: answer without the thoughts that stand apart from it.
        thoughts: reasoning that the server sends apart; empty if it sends none.
        end: key of `ENDS`, or `unknown`.
    """

    text: str
    thoughts: str
    end: str


def read_answer(choice: TextChoice) -> TextAnswer:
    """Reads a choice of `/completions` or `/chat/completions`.

    A refusal in a field of its own is withheld as an answer, whatever its end is called.
    """
    message = choice.get("message") or {}
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or []
    text = choice.get("text") or "".join(map(_text_of, parts)) or message.get("refusal") or ""
    apart = message.get("reasoning_content") or message.get("reasoning") or ""
    thoughts = apart or "".join(map(_thoughts_of, parts))
    end = end_named(choice.get("finish_reason"))
    refuses = message.get("refusal") or any(map(_is_refusal, parts))
    return TextAnswer(text, thoughts, "content_filter" if refuses and end != "failed" else end)


def end_named(reason: str | None) -> str:
    """Key of `ENDS` for a server's `finish_reason`; `unknown` if the table has no such name."""
    name = (reason or "").partition(":")[0].strip().lower()
    return _END_OF.get(name.removeprefix(PREFIX), UNKNOWN)


def with_thoughts(answer: TextAnswer, is_opened: bool) -> str:
    """Answer behind its thoughts, in the tags that most chat templates know.

    Thoughts inside of an answer stay as they are. An answer that was cut in its thoughts has no
    closing tag, and thoughts without an answer are none.

    Args:
        is_opened: whether the prompt ends with `<think>` already.
    """
    if not answer.thoughts and THOUGHT_MARK.search(answer.text):
        text = answer.text.lstrip()
        return text.removeprefix("<think>").lstrip("\n") if is_opened else answer.text
    opening = "" if is_opened else "<think>\n"
    if not answer.text.strip():
        return f"{opening}{answer.thoughts.strip()}" if answer.end == "length" else ""
    return f"{opening}{answer.thoughts.strip()}\n</think>\n\n{answer.text.strip()}"


def _text_of(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if part.get("type", "text") in ("text", "output_text", "summary_text"):
        return _joined(part.get("text"))
    return _joined(part.get("refusal")) if part.get("type") == "refusal" else ""


def _is_refusal(part: str | dict[str, Any]) -> bool:
    return isinstance(part, dict) and part.get("type") == "refusal"


def _thoughts_of(part: str | dict[str, Any]) -> str:
    if isinstance(part, str) or part.get("type") not in ("thinking", "reasoning"):
        return ""
    keys = ("thinking", "reasoning", "text", "summary")
    return next((_joined(part[key]) for key in keys if key in part), "")


def _joined(value: Any) -> str:
    """Text of a part, which may consist of parts itself."""
    if isinstance(value, list):
        return "".join(map(_text_of, value))
    return value if isinstance(value, str) else ""
