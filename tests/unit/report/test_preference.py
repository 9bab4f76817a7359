"""A judge's preference: both orders, ties, what is asked once, and the words about it."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.caches.actions import retry
from jobs.stages.evaluate import holdout_prompts
from jobs.stages.preference import preference_digest, preference_line, preferences
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from pipeline.report.comparisons import preference_words
from pipeline.report.headlines import headlines
from pipeline.report.models import PreferenceFigures, Report
from pipeline.report.page import render_html
from pipeline.run.prepared_run import Run
from pipeline.synthesis.prompts import load_prompts
from teachers.tokenizing import load_tokenizer
from tests.support.old_run import OldRun, copy_old_run
from tests.unit.report.test_report import Page
from tests.unit.synthesis.test_recipes import Engines

JUDGED = ["evaluation.judge={teacher: second, against: [first]}"]


@pytest.fixture
def old(tmp_path: Path) -> OldRun:
    return copy_old_run(tmp_path / "old")


def judged(old: OldRun, monkeypatch: pytest.MonkeyPatch, reply: Callable[[str, str], str]):
    """Preferences where the judge replies by the two answers; and what it was asked."""
    config = old.config(*JUDGED)
    old.prepare()
    run = Run(config, old.layout, old.prepare().prepared)

    def by_answers(text: str, _: int) -> tuple[str, str]:
        # The tokenizer knows no capitals, and turns what it does not know into one special token.
        _, first, second = re.split("nswer [12]:", text)
        return reply(_letters(first), _letters(second.partition("hich answer")[0])), "stop"

    engines = Engines(load_tokenizer(config.student.files), by_answers)
    monkeypatch.setattr("jobs.stages.filter.run_pools", engines)
    prompts = holdout_prompts(config, load_prompts(run.layout, run.prepared.prompts_digest))
    seconds: Counter[str] = Counter()
    return preferences(run, prompts, seconds), engines.asked, run


def _letters(text: str) -> str:
    return text.replace("<|unk|>", "").strip()


def overall(figures: list[PreferenceFigures]) -> PreferenceFigures:
    (row,) = [row for row in figures if row.domain is None]
    return row


def write_answers(old: OldRun, model: str, answers: list[str]) -> None:
    path = Path(old.layout.answers(model))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    made = [line | {"answer": a} for line, a in zip(lines, answers, strict=True)]
    path.write_text("\n".join(map(json.dumps, made)) + "\n")


def test_both_orders_are_asked_once(old: OldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answers(old, "student", ["aa", "aaa", "same", "b"])
    write_answers(old, "first", ["a", "a", "same", "bb"])
    found, asked, run = judged(
        old, monkeypatch, lambda first, second: "1" if len(first) > len(second) else "2"
    )
    row = overall(found)
    assert (row.wins, row.losses, row.same, row.prompts) == (2, 1, 1, 4)
    assert len(asked) == 6 and {who for who, *_ in asked} == {"second"}
    assert all(sampling["temperature"] == 0 and sampling["max_tokens"] == 1
               for *_, sampling in asked)  # fmt: skip
    assert sorted(r.domain for r in found if r.domain) == ["arithmetic", "words"]
    again, asked, _ = judged(old, monkeypatch, lambda *_: "3")
    assert again == found and asked == [], "the replies of the judge are kept"
    assert preference_line(found) == "second prefers the student 2 times and first 1 times of 4"
    assert run.config.evaluation.judge is not None
    folder = run.layout.judgements(preference_digest(run, run.config.evaluation.judge))
    assert storage.list_files(folder, ".json")


def test_a_reply_that_follows_the_order_is_no_preference(
    old: OldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = overall(judged(old, monkeypatch, lambda *_: "1")[0])
    assert (row.inconsistent, row.decided) == (4, 0)


def test_equally_good_in_both_orders_is_a_tie(old: OldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert overall(judged(old, monkeypatch, lambda *_: "3")[0]).ties == 4


def test_what_could_not_be_judged_is_counted_and_asked_again(
    old: OldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, run = judged(old, monkeypatch, lambda *_: "3")
    assert run.config.evaluation.judge is not None
    folder = run.layout.judgements(preference_digest(run, run.config.evaluation.judge))
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        storage.write_json(path, dict.fromkeys(storage.read_json(path)))
    found, asked, _ = judged(old, monkeypatch, lambda *_: "3")
    assert overall(found).unjudged == 4 and asked == []
    assert "preferences" in retry(old.config(*JUDGED))
    assert overall(judged(old, monkeypatch, lambda *_: "3")[0]).ties == 4


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("{teacher: third}", "'third'"),
        ("{teacher: first}", "there is none: name teachers"),
        ("{teacher: first, against: [twin]}", "'twin', which the evaluation does not serve"),
        ("{teacher: first, against: [second], prompts: 0}", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(judge: str, said: str, old: OldRun) -> None:
    with pytest.raises((ValueError, ValidationError), match=said):
        load_config(old.path, [f"evaluation.judge={judge}", "evaluation.twin=false"])


@pytest.mark.parametrize(
    ("missing", "change"),
    [
        ("3", JUDGED[0]),
        ("5", "synthesis.filters=[{type: judge, teacher: second, min_grade: 2}]"),
    ],
)
def test_a_judge_whose_replies_are_no_tokens_is_refused_before_the_run(
    missing: str, change: str, old: OldRun
) -> None:
    for model in ("first", "second", "student"):
        path = old.folder / model / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["\N{MICRO SIGN}"] = vocabulary.pop(missing)
        path.write_text(json.dumps(tokenizer))
    unjudged = "synthesis.filters=[]"
    old.prepare(unjudged)
    with pytest.raises(ConfigError, match=f"'{missing}' is one token.*leave the judge out"):
        old.prepare(unjudged, change)


def test_the_report_tells_share_interval_and_the_rest(old: OldRun) -> None:
    row = PreferenceFigures(
        judge="owl", other="twin", domain=None, prompts=60, wins=30, losses=10, ties=8,
        inconsistent=7, same=4, unjudged=1,
    )  # fmt: skip
    # Wilson's interval of 30 of 40, from R: prop.test(30, 40, correct = FALSE)$conf.int
    words = (
        "the student's answer is preferred at 75.0 % of 40 decided prompts (95 % 59.8 to 85.8 %); "
        "of 60 prompts 4 the same answer, 8 equally good, 7 changed with the order of the "
        "answers, 1 not judged"
    )
    assert preference_words(row) == words
    level = row.model_copy(update={"wins": 11, "losses": 10})
    assert "within chance" in preference_words(level)
    none = row.model_copy(update={"wins": 0, "losses": 0})
    assert preference_words(none).startswith("no preference at any of 60 prompts; of 60")
    stored = Report.model_validate(json.loads(Path(old.layout.report_json).read_text()))
    report = stored.model_copy(update={"preferences": [row]})
    assert f"Against twin, judged by owl: {words}." in headlines(report)
    page = Page(render_html(report)).words
    assert "twin 60 30 10 75.0 % 59.8 to 85.8 % 8 7 4 1" in page
    assert "A judge's preference" not in Page(render_html(stored)).words
