"""The shipped quickstart: small, disjoint, right, and teachers that know one domain each."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/quickstart"
DOMAINS = ("arithmetic", "words")
MOST_BYTES = 3 * 2**20
PROMPTS_ASKED = 60
# What make_material.py was called with.
SEED, NUM_TRAINING, NUM_HOLDOUT = 17, 200, 180


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def content(row: dict) -> str:
    return row["messages"][0]["content"]


def right_answer(row: dict) -> str:
    question = content(row)
    if row["domain"] == "words":
        verb, word = question.split()
        assert verb == "reverse"
        return word[::-1]
    first, second = question.split("+")
    return str(int(first) + int(second))


def exact_match(teacher: str, domain: str) -> float:
    folder = QUICKSTART / "teachers" / teacher
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [row for row in rows("holdout.jsonl") if row["domain"] == domain][:PROMPTS_ASKED]
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in asked],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    batch.pop("token_type_ids", None)
    written = model.generate(**batch, max_new_tokens=16, do_sample=False)
    answers = tokenizer.batch_decode(
        written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(a.strip() == r["reference"] for a, r in zip(answers, asked, strict=True)) / len(
        asked
    )


def test_references_are_right_and_no_prompt_is_in_both_files() -> None:
    """Nobody tells the student the right answers: only hold-out prompts have a reference."""
    train, holdout = rows("prompts.jsonl"), rows("holdout.jsonl")
    assert all(row["reference"] == right_answer(row) for row in holdout)
    assert [row for row in train if "reference" in row] == []
    assert len(train) == NUM_TRAINING * len(DOMAINS) and len(holdout) == NUM_HOLDOUT * len(DOMAINS)
    prompts = [content(row) for row in train + holdout]
    assert len(set(prompts)) == len(prompts)
    assert {row["domain"] for row in holdout} == {row["domain"] for row in train} == set(DOMAINS)


def test_the_hold_out_is_in_no_teachers_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    import tasks

    for domain in DOMAINS:
        shipped = {content(row) for row in rows("holdout.jsonl") if row["domain"] == domain}
        split = tasks.split_domain(domain, SEED, NUM_TRAINING, NUM_HOLDOUT)
        assert shipped == {task.prompt for task in split.holdout}
        assert shipped.isdisjoint(task.prompt for task in split.pool)


def test_the_folders_are_small_and_the_student_is_a_third() -> None:
    for domain in DOMAINS:
        folder = QUICKSTART / "teachers" / domain
        assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    sizes = [
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(QUICKSTART / name)
        ).num_parameters()
        for name in ("student", "teachers/arithmetic", "teachers/words")
    ]
    assert 3 * sizes[0] <= min(sizes[1:])


@pytest.mark.parametrize("teacher", DOMAINS)
def test_a_teacher_knows_its_domain_and_not_the_other(teacher: str) -> None:
    (other,) = set(DOMAINS) - {teacher}
    assert exact_match(teacher, teacher) >= 0.95
    assert exact_match(teacher, other) <= 0.05
