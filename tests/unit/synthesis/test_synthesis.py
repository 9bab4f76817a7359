"""Synthesis with a scripted teacher: kept and dropped answers, counts, work of later runs."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.config.student import StudentConfig
from pipeline.layout import Layout
from pipeline.records import AnswerEnds, Prompt
from pipeline.sequences import read_sequences
from pipeline.synthesis.answered_shards import AnsweredShard, read_answered_shards
from pipeline.synthesis.index import answer_counts, build_dataset, sample_counts
from teachers.protocol import GeneratedAnswer
from teachers.tasks.answer import AnswerTask, plan_answers
from tests.support.tokenizers_for_tests import save_tokenizer


class ScriptedTeacher:
    """Teacher that answers from a table by prompt text; a final `…` means a cut answer."""

    def __init__(self, tokenizer: Any, answers: dict[str, list[str]]) -> None:
        self._tokenizer, self._answers = tokenizer, answers
        self.seeds: list[int] = []

    async def generate(
        self, ids: list[int], sampling: dict[str, Any], num_samples: int, prompt: Prompt
    ) -> list[GeneratedAnswer]:
        self.seeds.append(sampling["seed"])
        texts = self._answers["".join(self._tokenizer.convert_ids_to_tokens(ids))][:num_samples]
        return [self._answer(text) for text in texts]

    def _answer(self, text: str) -> GeneratedAnswer:
        cut = text.endswith("…")
        ids = self._tokenizer(text.rstrip("…"), add_special_tokens=False)["input_ids"]
        return GeneratedAnswer(ids if cut else [*ids, 1], "length" if cut else "stop", 0.0)


@pytest.fixture
def template(tmp_path: Path) -> AnswerTask:
    save_tokenizer(tmp_path / "student")
    return AnswerTask(
        layout=Layout(str(tmp_path / "root"), "run"),
        author="t",
        identity_digest="recipe",
        prompts=(),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 5},
        samples_per_prompt=3,
        max_sequence_tokens=None,
        seed=1,
        ends=AnswerEnds(chat=1, text=1),
    )


def prompts(*rows: tuple[str, str, str | None]) -> list[Prompt]:
    return [
        Prompt(f"id-{text}", domain, "train", text=text, reference=ref)
        for text, domain, ref in rows
    ]


def run(task: AnswerTask, answers: dict[str, list[str]]) -> AnsweredShard:
    tokenizer = save_tokenizer(Path(task.student.model))
    return asyncio.run(task.run(ScriptedTeacher(tokenizer, answers)))


def test_what_is_empty_cut_or_double_is_dropped_and_counted(template: AnswerTask) -> None:
    rows = prompts(("1+1=", "d", "2"), ("a?", "d", None))
    (task,) = plan_answers(template, rows, 10)
    record = run(task, {"1+1=": ["2", "3", "2"], "a?": ["", "abc…", "b"]})
    assert answer_counts(template.layout, "recipe", rows) == {
        "answers": 6,
        "kept": 3,
        "duplicate": 1,
        "empty": 1,
        "truncated": 1,
        "generated_tokens": 3 * 2 + 1 + 3 + 2,
    }
    first, wrong, third = read_sequences(storage.join(template.layout.root, record.shard))
    assert first.loss_spans == ((4, 6),) and first.gold_ids[-1] == 1
    assert third.authors == ("t",) and third.num_positions == 2
    assert sample_counts(template.layout, [("recipe", rows)]) == {
        ("id-1+1=", first.sequence_id): 2,
        ("id-1+1=", wrong.sequence_id): 1,
        ("id-a?", third.sequence_id): 1,
    }
    assert wrong.prompt_id == first.prompt_id, "whether it is right is for the filters to say"


def test_answers_that_become_no_sequence_lie_where_people_can_look(
    template: AnswerTask,
) -> None:
    short = replace(template, max_sequence_tokens=8)
    rows = prompts(("a?", "d", "x"), ("1+1+1+1=", "d", None))
    (task,) = plan_answers(short, rows, 10)
    run(task, {"a?": ["", "abc…", "b"]})
    assert answer_counts(template.layout, "recipe", rows)["too_long"] == 3
    (path,) = Path(template.layout.root).glob("rejected/recipe/*.parquet")
    found = pq.read_table(path).to_pylist()
    assert [(row["reason"], row["prompt"], row["answer"]) for row in found] == [
        ("too_long", "1+1+1+1=", None),
        ("empty", "a?", ""),
        ("truncated", "a?", "a b c"),
    ]
    assert "8 tokens leaves no room" in found[0]["detail"]


def test_only_new_prompts_are_planned_and_grouped_by_domain(template: AnswerTask) -> None:
    rows = prompts(("a", "x", "1"), ("b", "y", "1"), ("c", "x", "1"))
    tasks = plan_answers(template, rows, 1)
    assert [[p.text for p in task.prompts] for task in tasks] == [["a"], ["c"], ["b"]]
    run(tasks[0], {"a": ["1"] * 3})
    more = plan_answers(template, [*rows, *prompts(("d", "x", "1"))], 10)
    assert [[p.text for p in task.prompts] for task in more] == [["b"], ["c", "d"]]


def test_a_lost_sequence_shard_is_asked_again(template: AnswerTask) -> None:
    rows = prompts(("a", "x", "1"))
    record = run(plan_answers(template, rows, 9)[0], {"a": ["1"] * 3})
    Path(template.layout.root, record.shard).unlink()
    assert len(plan_answers(template, rows, 9)) == 1


def test_a_quarantined_prompt_is_recorded_and_not_asked_again(template: AnswerTask) -> None:
    rows = prompts(("a", "x", "1"))
    plan_answers(template, rows, 9)[0].quarantine("the engine died")
    assert plan_answers(template, rows, 9) == []
    assert read_answered_shards(template.layout, "recipe")[0].errors == {"id-a": "the engine died"}


def test_an_answered_shard_reads_back_from_its_file_with_its_keys(template: AnswerTask) -> None:
    chat = Prompt("new", "x", "train", messages=({"role": "user", "content": "é"},))
    answered = AnsweredShard(
        author="t",
        domain="x",
        prompts={"id-a": "digest"},
        shard=None,
        samples={"sequence": 2},
        written={"id-a": [chat]},
        counts={"id-a": {"answers": 1}},
        errors={"id-b": "the engine died"},
        needs={"id-c": 99},
    )
    path = storage.join(template.layout.synthesis_folder("recipe"), "shard.json")
    storage.write_json(path, answered.as_json())
    assert list(storage.read_json(path)) == [
        "generator",
        "domain",
        "prompts",
        "shard",
        "samples",
        "written",
        "counts",
        "errors",
        "needs",
    ]
    assert read_answered_shards(template.layout, "recipe") == [answered]


def test_halves_hold_the_same_prompts(template: AnswerTask) -> None:
    (task,) = plan_answers(template, prompts(*((c, "x", "1") for c in "abcde")), 9)
    left, right = task.halves()
    assert left.prompts + right.prompts == task.prompts and len(left) == 2


def test_the_dataset_follows_the_prompts_and_merges_equal_answers(template: AnswerTask) -> None:
    rows = prompts(("a", "x", "1"), ("b", "y", "2"), ("c", "x", None))
    run_all(template, rows, {"a": ["1"] * 3, "b": ["2"] * 3, "c": ["q", "r", "q"]})
    other = replace(template, author="u", identity_digest="other")
    run_all(other, rows, {"a": ["1"] * 3, "b": ["3"] * 3, "c": ["r", "s", "s"]})
    entries = build_dataset(template.layout, rows, [("recipe", rows), ("other", rows)])
    assert [(e.prompt_id, e.authors) for e in entries] == [
        ("id-a", ("t", "u")),
        ("id-b", ("t",)),
        ("id-b", ("u",)),
        ("id-c", ("t",)),
        ("id-c", ("t", "u")),
        ("id-c", ("u",)),
    ]
    assert (
        build_dataset(template.layout, rows[:1], [("recipe", rows[:1]), ("other", rows[:1])])
        == entries[:1]
    )


def run_all(template: AnswerTask, rows: list[Prompt], answers: dict[str, list[str]]) -> None:
    for task in plan_answers(template, rows, 10):
        run(task, answers)


def test_given_references_become_sequences(template: AnswerTask) -> None:
    rows = prompts(("q:", "x", "a1"), ("r:", "x", "b"))
    record = plan_answers(replace(template, author="dataset"), rows, 10)[0].from_references()
    first, _ = read_sequences(storage.join(template.layout.root, record.shard))
    assert (
        first.finish_reason == "dataset" and first.num_positions == 4
    )  # space, two characters, end of sequence


def test_every_prompt_has_its_own_seed(template: AnswerTask) -> None:
    tokenizer = save_tokenizer(Path(template.student.model))
    teacher = ScriptedTeacher(tokenizer, {c: ["1"] * 3 for c in "abc"})
    (task,) = plan_answers(template, prompts(*((c, "x", "1") for c in "abc")), 9)
    asyncio.run(task.run(teacher))
    assert len(set(teacher.seeds)) == 3


def test_a_prompt_whose_content_changed_is_asked_again_and_old_answers_are_left_out(
    template: AnswerTask,
) -> None:
    given = replace(template, author="dataset")
    rows = prompts(("q:", "x", "a"), ("r:", "x", "b"))
    plan_answers(given, rows, 10)[0].from_references()
    changed = [rows[0], replace(rows[1], reference="c")]
    (task,) = plan_answers(given, changed, 10)
    assert task.prompts == (changed[1],)
    task.from_references()
    old, new = (
        build_dataset(template.layout, each, [("recipe", each)]) for each in (rows, changed)
    )
    assert [e.prompt_id for e in old] == [e.prompt_id for e in new] == ["id-q:", "id-r:"]
    assert old[0] == new[0] and old[1].sequence_id != new[1].sequence_id


def test_another_split_of_a_prompt_needs_no_new_answer(template: AnswerTask) -> None:
    rows = prompts(("a", "x", "1"))
    run_all(template, rows, {"a": ["1"] * 3})
    moved = [replace(rows[0], split="holdout")]
    assert plan_answers(template, moved, 10) == []
    (entry,) = build_dataset(template.layout, moved, [("recipe", moved)])
    assert entry.split == "holdout"


def test_a_prompt_that_two_runs_answered_at_once_counts_once(template: AnswerTask) -> None:
    rows = prompts(("a", "x", None), ("b", "x", None))
    both = plan_answers(template, rows, 10)
    alone = plan_answers(template, rows[:1], 10)
    run(both[0], {"a": ["p", "q", "r"], "b": ["s", "t", "u"]})
    run(alone[0], {"a": ["v", "w", "y"]})
    entries = build_dataset(template.layout, rows, [("recipe", rows)])
    assert [e.prompt_id for e in entries] == ["id-a"] * 3 + ["id-b"] * 3


@pytest.mark.parametrize("together", [True, False], ids=["in one shard", "in two"])
def test_answers_to_other_runs_prompts_are_not_counted(
    template: AnswerTask, together: bool
) -> None:
    rows = prompts(("a", "x", "1"), ("b", "x", "2"))
    answers = {"a": ["1", "2", "3"], "b": ["2", "3", "2"]}
    if not together:
        run_all(template, rows[:1], answers)
    run_all(template, rows, answers)
    assert answer_counts(template.layout, "recipe", rows[1:]) == {
        "answers": 3,
        "kept": 2,
        "duplicate": 1,
        "generated_tokens": 6,
    }
    assert answer_counts(template.layout, "recipe", rows)["kept"] == 5
    samples = sample_counts(template.layout, [("recipe", rows[1:])])
    assert sorted(samples.values()) == [1, 2] and {name for name, _ in samples} == {"id-b"}


def test_every_sample_counts_whichever_recipe_it_is_of(template: AnswerTask) -> None:
    """One teacher in two recipes, another in a third, and one of the recipes in two steps."""
    rows = prompts(("a", "x", None))
    run_all(template, rows, {"a": ["1", "1", "1"]})
    run_all(replace(template, identity_digest="warmer"), rows, {"a": ["1", "2", "1"]})
    run_all(replace(template, author="u", identity_digest="other"), rows, {"a": ["2", "1", "3"]})
    asked = [("recipe", rows), ("recipe", rows), ("warmer", rows), ("other", rows)]
    counts = sample_counts(template.layout, asked)
    texts = [entry.sequence_id for entry in build_dataset(template.layout, rows, asked)]
    assert [counts["id-a", name] for name in texts] == [6, 2, 1]


def test_every_answer_ends_with_the_end_of_its_prompt(template: AnswerTask) -> None:
    """An author's own end token (3) gives way; a stop token that the recipe names (0) stays."""
    chat = Prompt("chat", "d", "train", messages=({"role": "user", "content": "a"},), reference="b")
    text = Prompt("text", "d", "train", text="a", reference="b")
    cut, stopped = (replace(text, prompt_id=name) for name in ("cut", "stopped"))
    task = replace(
        template,
        ends=AnswerEnds(chat=2, text=1),
        sampling={"max_tokens": 5, "stop_token_ids": [0]},
        samples_per_prompt=1,
        finish_reasons=("stop", "length"),
        prompts=(chat, text, cut, stopped),
    )

    class Author:
        async def generate(
            self, ids: list[int], sampling: dict[str, Any], num_samples: int, prompt: Prompt
        ) -> list[GeneratedAnswer]:
            reason = "length" if prompt is cut else "stop"
            return [GeneratedAnswer([4, 0 if prompt is stopped else 3], reason, 0.0)]

    def answers(record: AnsweredShard) -> dict[str, list[int]]:
        path = storage.join(template.layout.root, record.shard)
        return {s.prompt_id: s.gold_ids.tolist() for s in read_sequences(path)}

    written = asyncio.run(task.run(cast(Any, Author())))
    expected = {"chat": [4, 2], "text": [4, 1], "cut": [4, 3], "stopped": [4, 0]}
    assert answers(written) == expected
    given = replace(task, identity_digest="given", prompts=(chat, text)).from_references()
    assert {name: ids[-1] for name, ids in answers(given).items()} == {"chat": 2, "text": 1}


def test_an_answer_with_an_id_that_no_tokenizer_has_is_rejected(template: AnswerTask) -> None:
    class Author:
        async def generate(self, *_: Any) -> list[GeneratedAnswer]:
            return [GeneratedAnswer([4, 700, 5, 1], "stop", 0.0)]

    prompt = Prompt("p", "d", "train", text="a")
    task = replace(template, prompts=(prompt,), samples_per_prompt=1)
    asyncio.run(task.run(cast(Any, Author())))
    counts = answer_counts(template.layout, "recipe", [prompt])
    assert counts == {"answers": 1, "kept": 0, "malformed": 1, "generated_tokens": 4}
    (path,) = Path(template.layout.root).glob("rejected/recipe/*.parquet")
    (found,) = pq.read_table(path).to_pylist()
    assert found["detail"] == "1 ids that no tokenizer has, the first is 700"
