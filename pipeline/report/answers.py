"""Hold-out prompts whose answers the report shows side by side: some chosen by the seed, and those
where the student is furthest from the teachers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from pipeline import storage
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.report.models import ShownAnswer, ShownPrompt


def shown_prompts(
    layout: Layout,
    models: Sequence[str],
    prompts: Sequence[Prompt],
    kl: Mapping[str, float],
    number: int,
    seed: int,
    stored: Mapping[str, Sequence[ShownAnswer]],
) -> list[ShownPrompt]:
    """The prompts to show, by domain, with the answers that the models have given.

    Args:
        models: served models, whose answers lie in the run's folder.
        prompts: hold-out prompts; those that were not asked are left out.
        kl: KL divergence from the mixture to the student, by prompt id.
        number: number of prompts of a domain that the seed chooses, and of those with the largest
            KL beside them.
        seed: seed of the run.
        stored: answers by other authors, by prompt id.
    """
    answers = {model: _answers(layout.answers(model)) for model in models}
    asked = [prompt for prompt in prompts if all(prompt.prompt_id in of for of in answers.values())]
    shown = []
    for domain in sorted({prompt.domain for prompt in asked}):
        members = [prompt for prompt in asked if prompt.domain == domain]
        chosen = random.Random(f"{seed} {domain}").sample(members, min(number, len(members)))
        ids = {prompt.prompt_id for prompt in chosen}
        rest = [p for p in members if p.prompt_id in kl and p.prompt_id not in ids]
        furthest = sorted(rest, key=lambda prompt: -kl[prompt.prompt_id])[:number]
        for prompt in [*chosen, *furthest]:
            identifier = prompt.prompt_id
            given = [_shown(model, answers[model][identifier]) for model in models]
            shown.append(
                ShownPrompt(
                    prompt_id=identifier,
                    domain=domain,
                    prompt=prompt_text(prompt),
                    reference=prompt.reference,
                    kl=kl.get(identifier),
                    is_furthest=identifier not in ids,
                    answers=[*given, *stored.get(identifier, ())],
                )
            )
    return shown


def prompt_text(prompt: Prompt) -> str:
    """Text of a prompt for people; the roles stand before the turns where there are several."""
    turns = [m for m in prompt.messages or () if m["role"] != "system"]
    if len(turns) < 2:
        return prompt.words
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


class AnswerLine(TypedDict):
    """Line of a file of answers, as far as the report shows it."""

    prompt_id: str
    answer: str
    correct: bool | None


def _answers(path: str) -> dict[str, dict[str, Any]]:
    """Lines of a file of answers, by prompt id."""
    lines = storage.read_json_lines(path, AnswerLine) if storage.exists(path) else []
    return {line["prompt_id"]: line for line in lines}


def _shown(model: str, line: dict[str, Any]) -> ShownAnswer:
    return ShownAnswer(
        author=model,
        answer=line["answer"],
        correct=line["correct"],
        is_cut=line.get("cut", False),
    )
