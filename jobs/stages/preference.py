"""A judge's preference between answers of the student and of other models, in both orders."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from jobs.stages.filter import as_question, ask_judge
from pipeline import storage
from pipeline.config.run import JudgeConfig
from pipeline.config.synthesis import STUDENT
from pipeline.final_text import final_text
from pipeline.fingerprint import digest_json
from pipeline.records import Prompt
from pipeline.report.answers import AnswerLine
from pipeline.report.models import PreferenceFigures
from pipeline.run.identities import preference_identity
from pipeline.run.prepared_run import Run
from pipeline.synthesis.rewriting import fill, preference_template

FIRST, SECOND, EQUAL = 1, 2, 3
CHOICES = (FIRST, SECOND, EQUAL)
"""Replies of the judge to the shipped template."""


def preferences(
    run: Run, prompts: Sequence[Prompt], seconds: Counter[str]
) -> list[PreferenceFigures]:
    """Preferences between the student and the models that the config names, by model and domain,
    and over all domains if there are several; empty without a judge.

    Both orders of two answers are asked. Replies are kept under the judge's identity, so that
    nothing is asked twice, and equal answers are not asked at all.

    Args:
        prompts: hold-out prompts, which all models have answered.
        seconds: engine seconds by model, to which the time of the judge is added.

    Raises:
        TeacherError: the judge's engine cannot run.
    """
    judge = run.config.evaluation.judge
    if judge is None:
        return []
    others = judge.against or ["twin"]
    answers = {model: _answers(run, model) for model in (STUDENT, *others)}
    chosen = _chosen(prompts, answers, judge, run.config.seed)
    template = preference_template()
    pairs = {
        (prompt.prompt_id, other): (
            answers[STUDENT][prompt.prompt_id],
            answers[other][prompt.prompt_id],
        )
        for other in others
        for prompt in chosen
    }
    questions = {}
    for prompt in chosen:
        for other in others:
            ours, theirs = pairs[prompt.prompt_id, other]
            for first, second in ((ours, theirs), (theirs, ours)):
                text = fill(template, prompt=prompt.words, first=first, second=second)
                if ours != theirs:
                    questions[_key(prompt, first, second)] = as_question(prompt, text)
    digest = preference_digest(run, judge)
    replies = ask_judge(run, judge.teacher, digest, list(questions.items()), seconds, CHOICES)
    figures = []
    for other in others:
        outcomes = {
            prompt.prompt_id: _outcome(prompt, *pairs[prompt.prompt_id, other], replies)
            for prompt in chosen
        }
        domains = sorted({prompt.domain for prompt in chosen})
        for domain in [*domains, None] if len(domains) > 1 else domains:
            members = [p for p in chosen if domain in (None, p.domain)]
            counts = Counter(outcomes[prompt.prompt_id] for prompt in members)
            figures.append(
                PreferenceFigures(
                    judge=judge.teacher, other=other, domain=domain, prompts=len(members), **counts
                )
            )
    return figures


def preference_digest(run: Run, judge: JudgeConfig) -> str:
    """Digest that names the folder of the judge's replies."""
    identity = run.prepared.identities[judge.teacher]
    tokenizer = run.prepared.tokenizer_hash
    return digest_json(preference_identity(run.config, judge.teacher, identity, tokenizer))


def preference_line(figures: Sequence[PreferenceFigures]) -> str:
    """Counts over all domains for people; empty without a judge."""
    parts = []
    for other in dict.fromkeys(row.other for row in figures):
        row = [row for row in figures if row.other == other][-1]
        parts.append(
            f"{row.judge} prefers the student {row.wins} times and {other} {row.losses} times of "
            f"{row.prompts}"
        )
    return "; ".join(parts)


def _answers(run: Run, model: str) -> dict[str, str]:
    """Final texts of a model's answers by prompt id."""
    lines = storage.read_json_lines(run.layout.answers(model), AnswerLine)
    return {
        line["prompt_id"]: "" if line.get("thoughts_cut") else final_text(line["answer"])
        for line in lines
    }


def _chosen(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Mapping[str, str]],
    judge: JudgeConfig,
    seed: int,
) -> list[Prompt]:
    """Prompts of each domain that the seed chooses among those that all models have answered."""
    asked = [p for p in prompts if all(p.prompt_id in given for given in answers.values())]
    chosen = []
    for domain in sorted({prompt.domain for prompt in asked}):
        members = [prompt for prompt in asked if prompt.domain == domain]
        number = min(judge.prompts, len(members))
        chosen += random.Random(f"{seed} judge {domain}").sample(members, number)
    return chosen


def _key(prompt: Prompt, first: str, second: str) -> str:
    return digest_json([prompt.digest, first, second])


def _outcome(prompt: Prompt, ours: str, theirs: str, replies: Mapping[str, int | None]) -> str:
    """Field of `PreferenceFigures` that counts one pair of answers."""
    if ours == theirs:
        return "same"
    ahead, behind = (
        replies.get(_key(prompt, first, second))
        for first, second in ((ours, theirs), (theirs, ours))
    )
    if ahead is None or behind is None:
        return "unjudged"
    outcomes = {(FIRST, SECOND): "wins", (SECOND, FIRST): "losses", (EQUAL, EQUAL): "ties"}
    return outcomes.get((ahead, behind), "inconsistent")
