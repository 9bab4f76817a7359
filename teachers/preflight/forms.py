"""Forms of chat prompts, and the text that a chat template writes for each.

A form is an order of roles. It is rendered with marks in place of the messages, alone and with an
answer behind it, so that every difference comes from the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.records import Prompt
from pipeline.templating import reads
from teachers.rendering import THOUGHT_MARK, has_open_thought, render, template_of

PROBE = "Paris is it, 42"
"""Answer that is tried behind every form of prompt."""
SHOWN_CHARACTERS = 70
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told to open no thoughts."""
_SWITCH_IN_TEXT = re.compile(r"(?<!\S)/[a-z_]+(?!\S)")

Roles = tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """Text that a chat template writes behind the last message of one form of prompt.

    Attributes:
        lost: indices of the messages that the template does not write.
        opened: text behind the last message, up to the start of an answer.
        closed: the same where no answer is asked for; None if the template refuses that.
        written: text between the last message and an answer in the chat with that answer; None if
            the template refuses such a chat.
    """

    lost: tuple[int, ...]
    opened: str
    closed: str | None
    written: str | None

    @property
    def between(self) -> str | None:
        """Text that the template writes between the prompt and the answer; None if it writes the
        answer behind something else than the prompt.
        """
        if self.written is None or not self.written.startswith(self.opened):
            return None
        return self.written.removeprefix(self.opened)

    @property
    def has_another_header(self) -> bool:
        """Whether the template writes other words before an answer than a prompt ends with,
        thoughts and white space aside.
        """
        return self.written is not None and not _bare(self.written).startswith(_bare(self.opened))

    def ends_with(self, token: str) -> bool:
        """Whether a prompt ends with a token, white space aside."""
        return self.opened.rstrip().endswith(token)

    @property
    def opens_thoughts(self) -> bool:
        """Whether an answer begins inside the model's thoughts."""
        return has_open_thought(self.opened)


def render_form(tokenizer: PreTrainedTokenizerBase, roles: Roles) -> Form | None:
    """Renders a form; None if the template refuses it."""
    marks = [f"message{i}end" for i in range(len(roles))]
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    opened = _rendered(tokenizer, chat)
    if opened is None:
        return None
    closed = _rendered(tokenizer, chat, opens_answer=False)
    answered = [*chat, {"role": "assistant", "content": PROBE}]
    whole = _rendered(tokenizer, answered, opens_answer=False) or ""
    before, found, _ = whole.rpartition(PROBE)
    last = marks[-1]
    return Form(
        lost=tuple(i for i, mark in enumerate(marks) if mark not in opened),
        opened=opened.rpartition(last)[2],
        closed=None if closed is None else closed.rpartition(last)[2],
        written=before.rpartition(last)[2] if found and last in before else None,
    )


def closes_thoughts(prompt: Prompt) -> bool:
    """Whether the reference of a prompt ends thoughts that it does not begin, as it may behind a
    template that opens them.
    """
    first = THOUGHT_MARK.search(prompt.reference or "")
    return first is not None and first["close"] is not None


def first_of_forms(prompts: Iterable[Prompt]) -> dict[Roles, Prompt]:
    """The first chat prompt of every form."""
    first: dict[Roles, Prompt] = {}
    for prompt in prompts:
        if prompt.messages is not None:
            first.setdefault(tuple(message["role"] for message in prompt.messages), prompt)
    return first


def form_problems(
    tokenizer: PreTrainedTokenizerBase, form: Form, prompt: Prompt, given: Prompt | None
) -> list[str]:
    """Problems of the place between prompt and answer, as sentences.

    Args:
        prompt: first prompt of the form.
        given: first prompt of the form whose answer is given as text; None if there is none.
    """
    between, written = form.between, form.written
    opens_nothing = form.opened == form.closed and written is not None
    if opens_nothing and (between is None or between.strip()):
        return [
            f"prompt {prompt.prompt_id}: the chat template opens no answer: the prompt ends with "
            f"{end_of(form.opened)}, and an answer stands behind {end_of(written or '')}: name a "
            "template that writes a generation prompt in student.chat_template"
        ]
    trained = f"the run would train on {end_of(form.opened + PROBE)}"
    trained += "" if written is None else f", and the template writes {end_of(written + PROBE)}"
    if written is not None and between is None and form.ends_with(str(tokenizer.eos_token)):
        return [
            f"prompt {prompt.prompt_id}: the chat template ends a prompt by {tokenizer.eos_token}, "
            f"and an answer would stand behind it: {trained}: name a template that writes a "
            "generation prompt without it in student.chat_template"
        ]
    if given is None:
        return []
    if form.opens_thoughts:
        return [
            f"prompt {given.prompt_id}: the chat template opens thoughts, and an answer that is "
            f"given as text would stand in them: {trained}: {thoughts_remedy(tokenizer)}, or give "
            "references that end the thoughts without beginning them"
        ]
    if between and THOUGHT_MARK.sub("", between).strip():
        return [
            f"prompt {given.prompt_id}: the chat template writes {between!r} before an answer, "
            f"which an answer that is given as text lacks: {trained}: name a template whose "
            "generation prompt holds it in student.chat_template, or let engines answer"
        ]
    return []


def lost_message(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int) -> str:
    """Sentence about a message that the template does not write."""
    message = (prompt.messages or ())[index]
    content, written = message["content"], _rendered(tokenizer, prompt.messages or ()) or ""
    shown = content if len(content) <= SHOWN_CHARACTERS else f"{content[:SHOWN_CHARACTERS]}…"
    return (
        f"prompt {prompt.prompt_id}: the chat template leaves out text of the {message['role']} "
        f"message {shown!r}: it writes {end_of(written)}: give the message another role, name a "
        "template that writes it in student.chat_template, or leave the prompt out"
    )


def lost_contents(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Indices of the messages with words that the template does not write.

    White space, JSON's escapes, switches such as `/no_think`, and thoughts of earlier answers may
    go.
    """
    messages = prompt.messages or ()
    written = _words(_rendered(tokenizer, messages) or "")
    return [i for i, message in enumerate(messages) if not _is_in(written, message)]


def thoughts_remedy(tokenizer: PreTrainedTokenizerBase) -> str:
    """Remedy for a template that opens thoughts."""
    template = template_of(tokenizer) or ""
    known = next((name for name in _SWITCHES if reads(template, name)), None)
    if known is not None:
        return f"set student.template_arguments: {{{known}: false}}, or let engines answer"
    return "name a template that opens none in student.chat_template, or let engines answer"


def end_of(text: str) -> str:
    """The end of a text, quoted."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"…{text[-SHOWN_CHARACTERS:]}")


def _is_in(written: str, message: Mapping[str, str]) -> bool:
    content = message["content"]
    if message["role"] == "assistant":
        content = THOUGHT_MARK.sub("\0", content).rpartition("\0")[2]
    escaped = [json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    ways = (content, *escaped, _SWITCH_IN_TEXT.sub("", content))
    return any(_words(text) in written for text in ways)


def _bare(text: str) -> str:
    return "".join(THOUGHT_MARK.sub("", text).split())


def _words(text: str) -> str:
    return "".join(re.findall(r"\w+", text))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    opens_answer: bool = True,
) -> str | None:
    try:
        return render(tokenizer, messages, opens_answer=opens_answer)
    except TemplateError:
        return None
