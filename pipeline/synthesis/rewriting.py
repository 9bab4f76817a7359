"""New prompts from old ones: what a teacher is asked, and what is made of its reply.

Only train prompts of a single turn are rewritten. A template is a text file whose placeholders are
replaced; the new prompt stands in the reply between `<prompt>` and `</prompt>`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.config.filters import Judge
from pipeline.config.synthesis import Evolve, Paraphrase, SelfInstruct, Writing
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import Prompt

SHIPPED = Path(__file__).parent / "templates"
_TAGGED = re.compile(r"<prompt>(.*?)</prompt>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\W*(i('m| am) (very |so |really )?sorry|sorry\b|i apologi[sz]e|i can(no|')t "
    r"(help|assist|provide|create|fulfil|comply|do|write|rewrite)|i('m| am) (unable|not able)"
    r"|as an ai\b|unfortunately, i)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Request:
    """One question to a teacher that writes prompts.

    Attributes:
        asked: the filled template, in the source's form (chat or text).
        source: the prompt that is rewritten, or the first of the seeds.
        many: the reply may hold several prompts.
    """

    asked: Prompt
    source: Prompt
    many: bool = False


@dataclass(frozen=True)
class Reply:
    """What a reply is worth: new prompts, or the reason and detail why there are none."""

    texts: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def template_paths(recipe: Writing) -> dict[str, str]:
    """The template files of a recipe: those of the config, else the shipped ones."""
    if isinstance(recipe, Evolve):
        return {
            way: recipe.templates.get(way) or str(SHIPPED / f"evolve_{way}.txt")
            for way in recipe.ways
        }
    return {recipe.type: recipe.template or str(SHIPPED / f"{recipe.type}.txt")}


def read_template(path: str, *placeholders: str) -> str:
    """The text of a template.

    Raises:
        ConfigError: it is missing, is no text, or lacks a placeholder.
    """
    if not storage.exists(path):
        raise ConfigError(f"the template {path} does not exist")
    try:
        text = storage.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the template {path} is not UTF-8: {error}") from error
    for placeholder in placeholders:
        if f"{{{placeholder}}}" not in text:
            raise ConfigError(f"the template {path} must hold {{{placeholder}}}")
    return text


def fill(template: str, **values: str) -> str:
    """A template with its placeholders replaced, all at once, so that values stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template).strip()


def templates_of(recipe: Writing) -> dict[str, str]:
    """The texts of a recipe's templates.

    Raises:
        ConfigError: a template is missing or lacks its placeholder.
    """
    needed = "examples" if isinstance(recipe, SelfInstruct) else "prompt"
    return {name: read_template(path, needed) for name, path in template_paths(recipe).items()}


def rubric_of(rule: Judge) -> str:
    """The text of a judge's rubric.

    Raises:
        ConfigError: it is missing or lacks a placeholder.
    """
    return read_template(rule.rubric or str(SHIPPED / "judge.txt"), "prompt", "answer")


def make_requests(recipe: Writing, pool: Sequence[Prompt], seed: int) -> list[Request]:
    """What a teacher is asked; the same pool and seed give the same requests.

    Args:
        pool: prompts of all splits; those of the train split with one turn are used.

    Raises:
        ConfigError: a template is missing or lacks its placeholder, or a domain has too few prompts
            to draw seeds from.
    """
    templates = templates_of(recipe)
    sources = [prompt for prompt in pool if prompt.split == "train" and _is_single_turn(prompt)]
    if isinstance(recipe, SelfInstruct):
        return _seeded(recipe, sources, templates[recipe.type], seed)
    versions = recipe.versions if isinstance(recipe, Paraphrase) else 1
    return [
        Request(_asked(source, f"{name}-{k}", fill(template, prompt=source.words)), source)
        for source in sources
        for name, template in templates.items()
        for k in range(versions)
    ]


def read_reply(request: Request, text: str, finish_reason: str) -> Reply:
    """Takes the new prompts out of a reply.

    The reasons why there are none: `over_long` (the reply was cut), `empty`, `refusal`,
    `malformed` (no tags, several prompts instead of one, nothing between them), `unchanged`.
    """
    if finish_reason == "content_filter":
        return Reply(reason="refusal", detail="withheld by the endpoint's content filter")
    if finish_reason != "stop":
        return Reply(reason="over_long", detail=f"the reply ended by {finish_reason!r}")
    said = text.rpartition("</think>")[2].strip()
    if not said:
        return Reply(reason="empty", detail="nothing but thoughts" if text.strip() else "")
    found = [part.strip() for part in _TAGGED.findall(said)]
    if _REFUSAL.match((found[0] if found else said).replace("\u2019", "'")):
        return Reply(reason="refusal", detail=said)
    if not found:
        return Reply(reason="malformed", detail="no <prompt>…</prompt>")
    if not all(found) or (len(found) > 1 and not request.many):
        return Reply(reason="malformed", detail=f"{len(found)} prompts, {found.count('')} empty")
    old = _plain(request.source.words)
    new: dict[str, str] = {}
    for part in found:
        if _plain(part) != old:
            new.setdefault(_plain(part), part)
    if not new:
        return Reply(reason="unchanged", detail="the prompt as it was")
    return Reply(tuple(new.values()))


def new_prompt(source: Prompt, text: str) -> Prompt:
    """A written prompt: form, domain and system messages of its source; nobody knows its answer."""
    messages = None
    if source.messages is not None:
        kept = tuple(m for m in source.messages if m["role"] == "system")
        messages = (*kept, {"role": "user", "content": text})
    raw = text if messages is None else None
    return Prompt(digest_json([messages, raw]), source.domain, "train", messages, raw)


def _seeded(
    recipe: SelfInstruct, sources: Sequence[Prompt], template: str, seed: int
) -> list[Request]:
    by_domain: dict[str, list[Prompt]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, []).append(source)
    requests = []
    for domain, members in by_domain.items():
        if len(members) < recipe.seeds_per_request:
            raise ConfigError(
                f"self_instruct shows {recipe.seeds_per_request} seeds in each request, and domain "
                f"{domain!r} has {len(members)} train prompts of one turn: lower seeds_per_request"
            )
        for k in range(recipe.requests_per_domain):
            drawn = random.Random(f"{seed}/{domain}/{k}").sample(members, recipe.seeds_per_request)
            shown = "\n\n".join(f"<prompt>{source.words}</prompt>" for source in drawn)
            asked = _asked(drawn[0], f"{domain}-{k}", fill(template, examples=shown))
            requests.append(Request(asked, drawn[0], many=True))
    return requests


def _asked(source: Prompt, name: str, text: str) -> Prompt:
    """The request to a teacher, in chat form where the source has it."""
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
