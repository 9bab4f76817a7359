"""Prompts: formats, stable ids, duplicates, splits, and bad rows named by file and line."""

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
        ({"text": "x", "domain": "d", "reference": 5}, "`reference`"),
        ({"text": "x", "domain": "d", "refrence": "5"}, "no 'reference', but 'refrence'"),
        ({"text": "x", "domian": "d"}, "no 'domain', but 'domian'"),
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
    with pytest.raises(PromptError, match=r"p\.jsonl: `fields` names \['solution'\]"):
        read_prompts(config(source))


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"id": 1, "text": "x"}, {"id": 1, "text": "y"})
    with pytest.raises(
        PromptError, match=r"p\.jsonl:2: id '1' already names another prompt at .*p\.jsonl:1"
    ):
        read_prompts(config(PromptSource(path=path, domain="d")))


@pytest.mark.parametrize(
    ("name", "message"), [("none.jsonl", "does not exist"), ("x.csv", "is not a .jsonl")]
)
def test_a_missing_or_unknown_source_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
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
