"""New prompts from old ones: the requests to a teacher, and the prompts in its replies.

Only train prompts with a single turn are rewritten. A request is a template, a text file, with its
placeholders filled. The new prompt stands in the reply between `<prompt>` and `</prompt>`.

A new recipe needs its model in `pipeline/config/synthesis.py` and a function in `REQUEST_MAKERS`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.filters import Judge
from pipeline.config.synthesis import Evolve, Paraphrase, SelfInstruct, Writing
from pipeline.errors import ConfigError
from pipeline.final_text import final_text
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import Prompt

SHIPPED = Path(__file__).parent / "templates"
_TAGGED = re.compile(r"<prompt>(.*?)</prompt>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\W*(i('m| am) (very |so |really )?sorry|sorry\b|i apologi[sz]e|i can(no|')t "
    r"(help|assist|provide|create|fulfil|comply|do|write|rewrite)|i('m| am) (unable|not able)"
    r"|i('m| am) afraid i can('t|not)|i (won't|will not|must decline|have to decline)\b"
    r"|my apologies\b|as an ai\b|unfortunately, i)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PromptRequest:
    """One request to a teacher that writes prompts.

    Attributes:
        prompt: the filled template, as chat or raw text like `source`.
        source: the prompt that is rewritten, or the first of the examples.
        many: whether the reply may hold several new prompts.
    """

    prompt: Prompt
    source: Prompt
    many: bool = False


@dataclass(frozen=True)
class PromptReply:
    """Content of a reply: new prompts, or the reason why it holds none.

    Attributes:
        texts: texts of the new prompts.
        reason: name under which a useless reply is counted; None if there are new prompts.
        detail: explanation of the reason for people.
    """

    texts: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def read_template(path: str, *placeholders: str) -> str:
    """Text of a template.

    Raises:
        ConfigError: the file is missing, is no file, is not UTF-8 text, or lacks a placeholder.
    """
    if not storage.exists(path):
        raise ConfigError(f"the template {path} does not exist")
    if not storage.is_file(path):  # reading a pipe would wait for ever
        raise ConfigError(f"the template {path} is no file: name a text file")
    try:
        text = storage.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the template {path} is not UTF-8: {error}") from error
    for placeholder in placeholders:
        if f"{{{placeholder}}}" not in text:
            raise ConfigError(f"the template {path} must hold {{{placeholder}}}")
    return text


def fill(template: str, **values: str) -> str:
    """Replaces all placeholders of a template at once, so that braces in values are left alone."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template).strip()


def templates_of(recipe: Writing) -> dict[str, str]:
    """Texts of a recipe's templates by name.

    Raises:
        ConfigError: a template is missing or lacks its placeholder.
    """
    return {
        file.name: read_template(file.own or str(SHIPPED / file.shipped), recipe.placeholder)
        for file in recipe.template_files
    }


def rubric_of(rule: Judge) -> str:
    """Text of a judge's rubric.

    Raises:
        ConfigError: the rubric is missing or lacks a placeholder.
    """
    return read_template(rule.rubric or str(SHIPPED / "judge.txt"), "prompt", "answer")


def preference_template() -> str:
    """Text in which a judge compares two answers."""
    return read_template(str(SHIPPED / "prefer.txt"), "prompt", "first", "second")


def make_requests(recipe: Writing, pool: Sequence[Prompt], seed: int) -> list[PromptRequest]:
    """Requests of a recipe; the same pool and seed give the same requests.

    Args:
        pool: prompts of all splits; only train prompts with one turn are used.

    Raises:
        ConfigError: a template is missing or lacks its placeholder, or a domain has too few prompts
            to draw examples from.
    """
    templates = templates_of(recipe)
    sources = [prompt for prompt in pool if prompt.split == "train" and _is_single_turn(prompt)]
    return REQUEST_MAKERS[recipe.type](recipe, sources, templates, seed)


def _paraphrase(
    recipe: Paraphrase, sources: Sequence[Prompt], templates: Mapping[str, str], seed: int
) -> list[PromptRequest]:
    return [
        _rewrite(source, f"{name}-{version}", template)
        for source in sources
        for name, template in templates.items()
        for version in range(recipe.versions)
    ]


def _evolve(
    recipe: Evolve, sources: Sequence[Prompt], templates: Mapping[str, str], seed: int
) -> list[PromptRequest]:
    return [
        _rewrite(source, f"{way}-0", template)
        for source in sources
        for way, template in templates.items()
    ]


def _self_instruct(
    recipe: SelfInstruct, sources: Sequence[Prompt], templates: Mapping[str, str], seed: int
) -> list[PromptRequest]:
    (template,) = templates.values()
    by_domain: dict[str, list[Prompt]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, []).append(source)
    requests = []
    for domain, members in by_domain.items():
        if len(members) < recipe.seeds_per_request:
            raise ConfigError(
                f"self_instruct shows {recipe.seeds_per_request} train prompts in each request, "
                f"but domain {domain!r} has {len(members)} train prompts of one turn: lower "
                "seeds_per_request"
            )
        for k in range(recipe.requests_per_domain):
            drawn = random.Random(f"{seed}/{domain}/{k}").sample(members, recipe.seeds_per_request)
            examples = "\n\n".join(f"<prompt>{source.words}</prompt>" for source in drawn)
            prompt = _request_prompt(drawn[0], f"{domain}-{k}", fill(template, examples=examples))
            requests.append(PromptRequest(prompt, drawn[0], many=True))
    return requests


REQUEST_MAKERS: dict[
    str, Callable[[Any, Sequence[Prompt], Mapping[str, str], int], list[PromptRequest]]
] = {"paraphrase": _paraphrase, "evolve": _evolve, "self_instruct": _self_instruct}
"""Functions by the type of a recipe. Each takes the recipe, the train prompts with one turn, the
texts of its templates by name, and the config's seed."""


def read_reply(request: PromptRequest, text: str, finish_reason: str) -> PromptReply:
    """Takes the new prompts out of a reply.

    A reply without new prompts has one of these reasons: `over_long` (the reply was cut), `empty`,
    `refusal` (the words of one, and no tags: a prompt may begin with them too), `malformed` (no
    tags, several prompts in place of one, or an empty prompt) or `unchanged` (the source itself).
    """
    if finish_reason == "content_filter":
        return PromptReply(reason="refusal", detail="withheld by the endpoint's content filter")
    if finish_reason not in ("stop", "unknown"):
        return PromptReply(reason="over_long", detail=f"the reply ended by {finish_reason!r}")
    reply = final_text(text)
    if not reply:
        detail = "the reply holds only thoughts" if text.strip() else ""
        return PromptReply(reason="empty", detail=detail)
    prompts = [part.strip() for part in _TAGGED.findall(reply)]
    if not prompts and _REFUSAL.match(reply.replace("\u2019", "'")):
        return PromptReply(reason="refusal", detail=reply)
    if not prompts:
        return PromptReply(reason="malformed", detail="no <prompt>…</prompt>")
    if not all(prompts) or (len(prompts) > 1 and not request.many):
        detail = f"{len(prompts)} prompts, {prompts.count('')} empty"
        return PromptReply(reason="malformed", detail=detail)
    source = _plain(request.source.words)
    new: dict[str, str] = {}
    for prompt in prompts:
        if _plain(prompt) != source:
            new.setdefault(_plain(prompt), prompt)
    if not new:
        return PromptReply(reason="unchanged", detail="the prompt is the same as before")
    return PromptReply(tuple(new.values()))


def new_prompt(source: Prompt, text: str) -> Prompt:
    """Prompt with a new text, and the form, domain and system messages of its source.

    It has no reference, since nobody knows the answer.
    """
    messages = None
    if source.messages is not None:
        system = tuple(message for message in source.messages if message["role"] == "system")
        messages = (*system, {"role": "user", "content": text})
    raw = text if messages is None else None
    return Prompt(digest_json([messages, raw]), source.domain, "train", messages, raw)


def _rewrite(source: Prompt, name: str, template: str) -> PromptRequest:
    """Request to rewrite one prompt; `name` tells the requests about one source apart."""
    return PromptRequest(_request_prompt(source, name, fill(template, prompt=source.words)), source)


def _request_prompt(source: Prompt, name: str, text: str) -> Prompt:
    """Prompt that holds a request: a chat message if the source is a chat, else raw text."""
    is_chat = source.messages is not None
    identifier = digest_bytes(source.digest.encode(), name.encode())
    messages = ({"role": "user", "content": text},) if is_chat else None
    return Prompt(identifier, source.domain, "train", messages, None if is_chat else text)


def _is_single_turn(prompt: Prompt) -> bool:
    return prompt.messages is None or [
        message["role"] for message in prompt.messages if message["role"] != "system"
    ] == ["user"]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
