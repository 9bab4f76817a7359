"""Prompts: formats, stable ids, duplicates, splits, and bad rows named by file and line."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.layout import Layout
from pipeline.synthesis.prompts import load_prompts, read_prompts, write_prompts


def jsonl(path: Path, *rows: object) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return str(path)


def config(*sources: PromptSource, **options: float) -> PromptsConfig:
    return PromptsConfig(sources=list(sources), **options)


def test_jsonl_parquet_and_dataset_folder_give_the_same_prompts(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": f"prompt {i}", "domain": "d", "reference": str(i)} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    paths = [
        jsonl(tmp_path / "p.jsonl", *rows),
        str(tmp_path / "p.parquet"),
        str(tmp_path / "folder"),
    ]
    first, second, third = (read_prompts(config(PromptSource(path=path)))[0] for path in paths)
    assert first == second == third
    assert [prompt.reference for prompt in first] == ["0", "1", "2", "3", "4"]


def test_ids_depend_on_content_alone_and_duplicates_are_counted(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"}, {"text": "x"})
    b = jsonl(tmp_path / "b.jsonl", {"text": "y"})
    sources = [PromptSource(path=a, domain="d"), PromptSource(path=b, domain="d")]
    prompts, counts = read_prompts(config(*sources))
    assert [prompt.text for prompt in prompts] == ["x", "y"]
    assert counts == {"read": 4, "duplicates": 2, "train": 2}
    alone, _ = read_prompts(config(sources[1]))
    assert alone[0].prompt_id == prompts[1].prompt_id


def test_a_hold_out_prompt_stays_whatever_the_order_of_the_sources(tmp_path: Path) -> None:
    files = {
        "train": jsonl(tmp_path / "t.jsonl", *({"text": f"q{i}"} for i in range(6))),
        "validation": jsonl(tmp_path / "v.jsonl", *({"text": f"q{i}"} for i in (1, 2, 3, 8))),
        "holdout": jsonl(tmp_path / "h.jsonl", *({"text": f"q{i}"} for i in (0, 1, 2, 9))),
    }
    for splits in itertools.permutations(files):
        sources = [PromptSource(path=files[s], domain="d", split=s) for s in splits]
        prompts, counts = read_prompts(config(*sources))
        assert {prompt.text: prompt.split for prompt in prompts} == {
            "q0": "holdout", "q1": "holdout", "q2": "holdout", "q9": "holdout",
            "q3": "validation", "q8": "validation", "q4": "train", "q5": "train",
        }  # fmt: skip
        assert counts == {
            "read": 14, "duplicates": 6, "holdout": 4, "validation": 2, "train": 2,
        }  # fmt: skip


def test_an_id_is_free_again_once_its_prompt_was_left_out(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", {"id": 1, "text": "x"})
    held = jsonl(tmp_path / "h.jsonl", {"id": 2, "text": "x"}, {"id": 1, "text": "y"})
    sources = [
        PromptSource(path=train, domain="d", split="train"),
        PromptSource(path=held, domain="d", split="holdout"),
    ]
    for order in (sources, sources[::-1]):
        prompts, _ = read_prompts(config(*order))
        assert [(p.prompt_id, p.text) for p in prompts] == [("2", "x"), ("1", "y")]


def test_rows_that_disagree_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"text": "Capital?", "reference": "Bern"},
        {"text": "Capital?", "reference": "Oslo"},
        {"text": "Capital?"},
        {"text": "Capital?", "reference": "Bern", "domain": "e"},
    ]
    path = jsonl(tmp_path / "p.jsonl", *rows)
    (prompt,), counts = read_prompts(config(PromptSource(path=path, domain="d")))
    assert (prompt.reference, prompt.domain) == ("Bern", "d")
    assert counts == {"read": 4, "duplicates": 3, "disagreeing": 2, "train": 1}
    (said,) = caplog.messages
    assert f"{path}:2 beside {path}:1 (reference 'Oslo' against 'Bern')" in said
    assert f"{path}:4 beside {path}:1 (domain 'e' against 'd')" in said and ":3 beside" not in said
    caplog.clear()
    read_prompts(config(PromptSource(path=path, domain="d")), quiet=True)
    assert not caplog.messages


def test_many_rows_that_disagree_in_one_split_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "Add the numbers.", "reference": str(i)} for i in range(12)]
    path = jsonl(tmp_path / "p.jsonl", *rows)
    source = PromptSource(path=path, domain="d")
    with pytest.raises(PromptError, match=r"11 of 12 rows repeat .*p\.jsonl:2 beside .*`template`"):
        read_prompts(config(source))
    read_prompts(config(source.model_copy(update={"limit": 11})))
    others = jsonl(tmp_path / "o.jsonl", *({"text": f"other {i}"} for i in range(1_088)))
    more = PromptSource(path=others, domain="d")
    assert read_prompts(config(source, more))[1]["disagreeing"] == 11, "one in a hundred is few"


def test_other_references_in_another_split_are_no_reason_to_stop(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", *({"text": f"q{i}", "reference": "1"} for i in range(40)))
    held = jsonl(tmp_path / "h.jsonl", *({"text": f"q{i}", "reference": "2"} for i in range(20)))
    prompts, counts = read_prompts(
        config(
            PromptSource(path=train, domain="d", split="train"),
            PromptSource(path=held, domain="d", split="holdout"),
        )
    )
    assert counts["disagreeing"] == 20 and counts["holdout"] == 20
    assert {p.reference for p in prompts if p.split == "holdout"} == {"2"}


def test_a_column_split_that_is_not_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"text": "x", "split": "test"})
    read_prompts(config(PromptSource(path=path, domain="d", split="train")))
    assert not caplog.messages
    read_prompts(config(PromptSource(path=path, domain="d")))
    assert "p.jsonl has a column 'split', which is not read" in caplog.messages[0]


def test_the_split_follows_the_id_and_not_the_order(tmp_path: Path) -> None:
    rows = [{"text": f"prompt {i}"} for i in range(1000)]
    forward = PromptSource(path=jsonl(tmp_path / "f.jsonl", *rows), domain="d")
    backward = PromptSource(path=jsonl(tmp_path / "b.jsonl", *rows[::-1]), domain="d")
    fractions = {"holdout_fraction": 0.2, "validation_fraction": 0.1}
    prompts, counts = read_prompts(config(forward, **fractions))
    assert {p.prompt_id: p.split for p in prompts} == {
        p.prompt_id: p.split for p in read_prompts(config(backward, **fractions))[0]
    }
    assert 150 < counts["holdout"] < 250 and 60 < counts["validation"] < 140


def test_fields_template_limit_and_given_split(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "q.jsonl", *({"question": f"q{i}", "answer": f"a{i}"} for i in range(9))
    )
    source = PromptSource(
        path=path,
        domain="math",
        split="holdout",
        limit=3,
        fields={"text": "question", "reference": "answer"},
        template="Question: {text}\nAnswer:",
    )
    prompts, counts = read_prompts(config(source))
    assert counts["read"] == 3
    assert prompts[2].text == "Question: q2\nAnswer:" and prompts[2].reference == "a2"
    assert {prompt.split for prompt in prompts} == {"holdout"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not valid JSON"),
        ([1], "must be an object"),
        ({"domain": "d"}, "exactly one of `messages` and `text`"),
        (
            {"text": "x", "messages": [{"role": "user", "content": "x"}], "domain": "d"},
            "found both",
        ),
        ({"text": "  ", "domain": "d"}, "`text` must be a non-empty text"),
        ({"text": 7, "domain": "d"}, "`text` must be a non-empty text, found 7"),
        ({"text": "x"}, "no `domain`"),
        ({"text": "x", "domain": "a/b"}, "domain 'a/b'"),
        ({"messages": [], "domain": "d"}, "`messages` must be a non-empty list"),
        ({"messages": [{"role": "user"}], "domain": "d"}, "exactly `role` and `content`"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "domain": "d"},
            "the role `assistant`",
        ),
        ({"text": "x", "domain": "d", "reference": 42.0}, "such as '42', since it can be written"),
        ({"text": "x", "domain": "d", "reference": True}, "`reference` must be a non-empty text"),
        ({"text": "x", "domain": "d", "reference": ["5"]}, "`reference` must be a non-empty text"),
        ({"text": "x", "domain": "d", "reference": " "}, "leave it out, or give null"),
        ({"text": "x", "domain": "d", "refrence": "5"}, "no 'reference', but 'refrence'"),
        ({"text": "x", "domain": "d", "REFERENCE": "5"}, "no 'reference', but 'REFERENCE'"),
        (
            {"text": "x", "domain": "d", "reference": None, "refrence": "5"},
            "give the source `fields: {reference: refrence}`",
        ),
        ({"text": "x", "domian": "d"}, "no 'domain', but 'domian'"),
        ({"mesages": [{"role": "user", "content": "x"}], "domain": "d"}, "but 'mesages'"),
        ({"question": "x", "domain": "d"}, "give the source `fields: {text: question}`"),
        ({"text": None, "domain": "d"}, "`text` is empty here: remove the row"),
        ({"messages": [{"role": "usr", "content": "x"}], "domain": "d"}, "found 'usr'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row: object, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "bad.jsonl", {"text": "fine", "domain": "d"}, "", row)
    with pytest.raises(PromptError) as caught:
        read_prompts(config(PromptSource(path=path)))
    assert f"{path}:3: " in str(caught.value) and message in str(caught.value)


def test_columns_that_are_not_ours_are_no_mistake(tmp_path: Path) -> None:
    row = {"text": "x", "domain": "d", "reference": "5", "references": 7, "difficulty": "hard"}
    prompts, _ = read_prompts(config(PromptSource(path=jsonl(tmp_path / "p.jsonl", row))))
    assert prompts[0].reference == "5"


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"text": "x"}, {"text": "y", "label": "1"})
    source = PromptSource(path=path, domain="d", fields={"reference": "label"})
    assert [prompt.reference for prompt in read_prompts(config(source))[0]] == [None, "1"]
    source = PromptSource(path=path, domain="d", fields={"reference": "solution"})
    with pytest.raises(PromptError, match=r"p\.jsonl: `fields` names the column 'solution'"):
        read_prompts(config(source))


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"id": 1, "text": "x"}, {"id": 1, "text": "y"})
    with pytest.raises(
        PromptError, match=r"p\.jsonl:2: id '1' already names another prompt at .*p\.jsonl:1"
    ):
        read_prompts(config(PromptSource(path=path, domain="d")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "does not exist"),
        ("*.jsonl", "does not exist: patterns are not read, so name each file"),
        ("x.txt", "name ends in .jsonl, .ndjson, .json, .csv"),
        ("folder", "is a folder, but no dataset folder"),
    ],
)
def test_a_missing_or_unknown_source_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a,b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PromptError, match=message):
        read_prompts(config(PromptSource(path=str(tmp_path / name), domain="d")))


def test_the_table_round_trips(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl",
        {"messages": [{"role": "user", "content": "é"}]},
        {"text": "x", "reference": "r"},
    )
    prompts, _ = read_prompts(config(PromptSource(path=path, domain="d")))
    layout = Layout(str(tmp_path / "root"), "run")
    assert load_prompts(layout, write_prompts(layout, prompts)) == prompts
