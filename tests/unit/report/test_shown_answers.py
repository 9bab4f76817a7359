"""Answers side by side: which prompts are shown, whose answers, and how the page shows them."""

import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.report.answers import prompt_text, shown_prompts
from pipeline.report.models import Report, ShownAnswer, ShownPrompt
from pipeline.report.page import render_html
from tests.support.old_run import WRITTEN
from tests.unit.report.test_report import HOSTILE, Page

PROMPTS = [
    Prompt(f"{domain}{i}", domain, "holdout", text=f"ask {i}", reference=f"r{i}")
    for domain in ("logic", "words")
    for i in range(8)
]
KL = {prompt.prompt_id: float(int(prompt.prompt_id[-1])) for prompt in PROMPTS}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(str(tmp_path), "run")
    for model in ("owl", "student"):
        asked = PROMPTS if model == "owl" else PROMPTS[:-1]
        lines = [
            {"prompt_id": p.prompt_id, "domain": p.domain, "answer": f"{model} on {p.prompt_id}",
             "reference": p.reference, "correct": model == "owl"}
            | ({"cut": True} if p.prompt_id == "words6" else {})
            for p in asked
        ]  # fmt: skip
        text = "\n".join(map(json.dumps, lines))
        storage.write_bytes(made.answers(model), text.encode())
    return made


def chosen(layout: Layout, number: int = 2, seed: int = 1, kl=KL, stored=None) -> list[ShownPrompt]:
    return shown_prompts(layout, ["owl", "student"], PROMPTS, kl, number, seed, stored or {})


def test_the_seed_chooses_and_the_furthest_stand_beside(layout: Layout) -> None:
    found = chosen(layout)
    assert [s.domain for s in found] == ["logic"] * 4 + ["words"] * 4
    assert [s.is_furthest for s in found] == [False, False, True, True] * 2
    assert found == chosen(layout)
    picked = {tuple(s.prompt_id for s in chosen(layout, seed=seed)[:2]) for seed in range(9)}
    assert len(picked) > 3
    for domain in ("logic", "words"):
        own = [s for s in found if s.domain == domain]
        seeded = {s.prompt_id for s in own if not s.is_furthest}
        # words7 was too long for the student, so that nobody's answer to it is shown
        rest = [i for i in (7, 6, 5, 4) if f"{domain}{i}" not in {*seeded, "words7"}]
        assert [s.prompt_id for s in own[2:]] == [f"{domain}{i}" for i in rest[:2]]


def test_every_model_and_every_other_author_answers(layout: Layout) -> None:
    written = ShownAnswer(author="dataset", answer="by hand", correct=None, is_cut=False)
    found = chosen(layout, 8, stored={"words6": [written]})
    assert len(found) == 15, "no prompt stands twice"
    (shown,) = [s for s in found if s.prompt_id == "words6"]
    assert [a.author for a in shown.answers] == ["owl", "student", "dataset"]
    assert [a.is_cut for a in shown.answers] == [True, True, False]
    assert shown.answers[0].correct and shown.answers[1].answer == "student on words6"
    assert (shown.reference, shown.kl) == ("r6", 6.0)


def test_nothing_is_shown_where_nothing_is_asked_for(layout: Layout) -> None:
    assert chosen(layout, 0) == []
    assert all(not s.is_furthest and s.kl is None for s in chosen(layout, kl={}))


def test_turns_of_a_dialogue_are_told_apart() -> None:
    turns = [("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    assert prompt_text(Prompt("p", "d", "holdout", messages=messages[:2])) == "one?"
    assert prompt_text(Prompt("p", "d", "holdout", messages=messages)) == (
        "user: one?\n\nassistant: 1\n\nuser: two?"
    )


def test_the_page_escapes_folds_and_keeps_lines(layout: Layout) -> None:
    long = "word " * 200 + HOSTILE
    answers = [
        ShownAnswer(author="first", answer=long, correct=True, is_cut=False),
        ShownAnswer(author="student", answer="  \n", correct=False, is_cut=False),
        ShownAnswer(author="dataset", answer=f"a\nb {HOSTILE}", correct=None, is_cut=True),
    ]
    shown = ShownPrompt(
        prompt_id="p", domain="logic", prompt=HOSTILE, reference="ref", kl=0.25,
        is_furthest=True, answers=answers,
    )  # fmt: skip
    stored = json.loads((WRITTEN / "output/runs/old/report.json").read_text())
    report = Report.model_validate(stored).model_copy(update={"shown_prompts": [shown]})
    html = render_html(report)
    page = Page(html)
    assert "<script" not in html
    assert page.elements.count("details") == 1, "short answers are not folded"
    assert f"first right {long[:360]}… {long}".replace("  ", " ") in page.words
    assert "student wrong An empty answer." in page.words
    assert f"dataset cut at max_tokens a b {HOSTILE}" in page.words
    assert f"Furthest from the teachers, KL 0.250 nats/token {HOSTILE} Reference ref" in page.words
    assert "Answers side by side" not in Page(render_html(Report.model_validate(stored))).words
