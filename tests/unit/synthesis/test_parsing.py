"""Rows as people have them: keys without a value, parts, ShareGPT, answers, templates."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.synthesis.prompts import read_prompts, write_prompts

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
DOMAIN: Any = {"domain": "d"}


def prompts_of(folder: Path, *rows: Any, **settings: Any) -> list[Prompt]:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(source_of(str(path), **settings))[0]


def source_of(path: str, **settings: Any) -> PromptsConfig:
    return PromptsConfig(sources=[PromptSource(path=path, **DOMAIN | settings)])


def refusal(folder: Path, *rows: Any, **settings: Any) -> str:
    with pytest.raises(PromptError) as caught:
        prompts_of(folder, *rows, **settings)
    return str(caught.value)


MESSAGES: dict[str, tuple[Any, list[dict[str, str]]]] = {
    "keys without a value": (
        [USER | {"name": None, "tool_calls": None, "images": [], "refusal": ""}],
        [USER],
    ),
    "parts of text": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "image_url": None}, {"text": "b"}, "c"],
            }
        ],
        [{"role": "user", "content": "a\nb\nc"}],
    ),
    "an empty system message": ([{"role": "system", "content": ""}, USER], [USER]),
    "a system message of spaces": ([{"role": "system", "content": " \n"}, USER], [USER]),
    "a system message of null": ([{"role": "system", "content": None}, USER], [USER]),
    "a system message": (
        [{"role": "system", "content": "Be brief."}, USER],
        [{"role": "system", "content": "Be brief."}, USER],
    ),
    "ShareGPT": (
        [
            {"from": "system", "value": "s", "weight": None},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yo"},
            {"from": "human", "value": "and?"},
        ],
        [
            {"role": "system", "content": "s"},
            USER,
            ANSWER,
            {"role": "user", "content": "and?"},
        ],
    ),
    "JSON in a text": (json.dumps([USER]), [USER]),
}


@pytest.mark.parametrize(("given", "read"), MESSAGES.values(), ids=MESSAGES)
def test_messages_are_read_as_people_have_them(
    given: Any, read: list[dict[str, str]], tmp_path: Path
) -> None:
    (prompt,) = prompts_of(tmp_path, {"messages": given})
    assert list(prompt.messages or ()) == read
    assert prompts_of(tmp_path, {"messages": read}) == [prompt], "and have the id of the plain form"


def test_structs_of_parquet_are_read_like_lines(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER | {"name": "Ann"}, USER], "text": None, "reference": None},
        {"messages": [{"role": "user", "content": "x"}], "text": None, "reference": "r"},
        {"messages": None, "text": "raw", "reference": None},
    ]
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(PromptError, match=r"row 0: messages\[1\] .*: remove 'name', which is not"):
        read_prompts(source_of(path))
    rows[0]["messages"][1].pop("name")
    rows[1]["messages"][0]["name"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    plain = [{key: value for key, value in row.items() if value is not None} for row in rows]
    del plain[1]["messages"][0]["name"]
    assert read_prompts(source_of(path))[0] == prompts_of(tmp_path, *plain)


def test_the_keys_of_a_message_stay_in_their_order(tmp_path: Path) -> None:
    """The digest of the prompts, which finished runs know, depends on it."""
    turned = {"content": "hi", "role": "user"}
    (prompt,) = prompts_of(tmp_path, {"messages": [turned]})
    assert json.dumps(prompt.messages) == json.dumps([turned])


REFUSED: dict[str, tuple[Any, str]] = {
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "p.jsonl:1: messages[0].content[0] is of type 'image_url', and models are asked in text",
    ),
    "a call of a tool": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "remove 'tool_calls', which is not read",
    ),
    "an empty question": ([{"role": "user", "content": " "}], "messages[0].content must be a non-"),
    "no parts": ([{"role": "user", "content": []}], "messages[0].content must be a non-empty text"),
    "nothing but an empty system message": (
        [{"role": "system", "content": ""}],
        "a message beside an empty system message",
    ),
    "another role of ShareGPT": (
        [{"from": "observation", "value": "x"}],
        "messages[0].role must be one of system, developer",
    ),
    "a number for a role": ([{"role": 1, "content": "x"}], "messages[0].role must be one of"),
    "a text": (["hi"], "messages[0] must have exactly `role` and `content`, found 'hi'"),
    "Python in a text": ("[{'role': 'user'}]", "or such a list as JSON in a text"),
    "an answer at the end": ([USER, ANSWER], "or give the source `answered: true`"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_messages_that_cannot_be_asked_are_refused(
    given: Any, message: str, tmp_path: Path
) -> None:
    assert message in refusal(tmp_path, {"messages": given})


def test_another_column_of_messages_is_named_with_the_way(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "hi"}]}
    assert "give the source `fields: {messages: conversations}`" in refusal(tmp_path, row)
    fields = {"messages": "conversations"}
    assert prompts_of(tmp_path, row, fields=fields)[0].messages == (USER,)


def test_the_last_answer_becomes_the_reference(tmp_path: Path) -> None:
    more = {"role": "user", "content": "more"}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, more]}]
    found = prompts_of(tmp_path, *rows, answered=True)
    assert [(p.messages, p.reference) for p in found] == [
        ((USER,), "yo"),
        ((USER, ANSWER, more), None),
    ]
    plain = {"messages": [USER], "reference": "yo"}
    assert prompts_of(tmp_path, plain)[0] == found[0]
    assert "give one of the two" in refusal(tmp_path, rows[0] | {"reference": "r"}, answered=True)
    assert "add the question" in refusal(tmp_path, {"messages": [ANSWER]}, answered=True)
    assert "no row ends with one" in refusal(tmp_path, {"messages": [USER]}, answered=True)


def test_whole_numbers_are_references_and_cells(tmp_path: Path) -> None:
    (prompt,) = prompts_of(tmp_path, {"text": "6*7=", "reference": 42})
    assert prompt.reference == "42"
    template = "{a} + {b} ="
    (prompt,) = prompts_of(tmp_path, {"a": 1, "b": 2, "reference": None}, template=template)
    assert (prompt.text, prompt.reference) == ("1 + 2 =", None)
    assert "`b` must be a text or a whole number" in refusal(
        tmp_path, {"a": 1, "b": 2.5}, template=template
    )


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "cut \ud83d"}, "`text`"),
        ({"text": "fine", "reference": "\ude00 cut"}, "`reference`"),
        ({"text": "fine", "id": "\ud83d"}, "`id`"),
        ({"messages": [{"role": "user", "content": "cut \ud83d"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "\ud83d"}]}]}, "messages[0].content"),
    ],
)
def test_half_a_character_is_named_by_file_and_line(row: Any, name: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, {"text": "whole \U0001f600"}, row)
    assert f"p.jsonl:2: {name} holds \\u" in message and "lone surrogate" in message
    message.encode()


def test_whole_emojis_in_escapes_are_written(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    prompts, _ = read_prompts(source_of(str(tmp_path / "p.jsonl")))
    assert prompts[0].text == "\U0001f600"
    write_prompts(Layout(str(tmp_path / "root"), "run"), prompts)


ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
TEMPLATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "two columns": (
        "{instruction}\n\n{input}",
        {"instruction": "Add.", "input": "1 2"},
        "Add.\n\n1 2",
    ),
    "an empty column": ("{instruction}\n\n{input}", {"instruction": "Go.", "input": ""}, "Go."),
    "a column of null": ("{instruction}\n\n{input}", {"instruction": "Go.", "input": None}, "Go."),
    "a column that the row lacks": ("{instruction}\n\n{input}", {"instruction": "Go."}, "Go."),
    "an empty column first": (
        "{input}\n\n{instruction}",
        {"instruction": "Go.", "input": ""},
        "Go.",
    ),
    "in one line": ("{instruction} {input}", {"instruction": "Go.", "input": ""}, "Go."),
    "line by line": (
        "Q: {instruction}\nI: {input}\nA:",
        {"instruction": "Go.", "input": ""},
        "Q: Go.\nA:",
    ),
    "a headed paragraph": (
        ALPACA,
        {"instruction": "Add.", "input": "1 2"},
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
    ),
    "an empty headed paragraph": (
        ALPACA,
        {"instruction": "Go.", "input": ""},
        "### Instruction:\nGo.\n\n### Response:\n",
    ),
    "braces and a backslash in a value": (
        "{instruction}: {input}",
        {"instruction": "{input}", "input": "\\1 {{x}}"},
        "{input}: \\1 {{x}}",
    ),
    "blank lines in a value": (
        "{instruction}\n{input}",
        {"instruction": "a\n\nb", "input": "c"},
        "a\n\nb\nc",
    ),
    "doubled braces": (
        'Reply {{"a": {instruction}}} {input}',
        {"instruction": "x", "input": "y"},
        'Reply {"a": x} y',
    ),
    "LaTeX": (
        "{instruction} \\boxed{answer} \\frac{a}{b} {input}",
        {"instruction": "x", "input": "y", "answer": "7"},
        "x \\boxed{answer} \\frac{a}{b} y",
    ),
    "a name with spaces": ("{Full Question}", {"Full Question": "why?"}, "why?"),
    "the text itself": ("{text}\n{input}", {"text": "a", "input": "b"}, "a\nb"),
    "the text alone, and braces": (
        '{text} as {"a": 1}, {{x}}, \\boxed{answer}',
        {"text": "a", "answer": "7"},
        'a as {"a": 1}, {{x}}, \\boxed{answer}',
    ),
}


@pytest.mark.parametrize(("template", "row", "text"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_is_filled_with_columns(
    template: str, row: dict[str, Any], text: str, tmp_path: Path
) -> None:
    other = dict.fromkeys(("instruction", "input", "text", "Full Question"), "other")
    found = prompts_of(tmp_path, row, other, template=template)
    assert found[0].text == text


def test_the_text_of_a_template_has_a_name_of_its_own(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2"}
    settings: Any = {"template": "{text}\n\n{input}", "fields": {"text": "instruction"}}
    assert prompts_of(tmp_path, row, **settings)[0].text == "Add.\n\n1 2"


def test_rows_that_differ_in_a_column_of_the_template_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i} 2", "output": f"{i + 2}"} for i in range(3)]
    settings: Any = {"template": "{instruction}\n\n{input}", "fields": {"reference": "output"}}
    found = prompts_of(tmp_path, *rows, **settings)
    assert [prompt.reference for prompt in found] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"instrucion": "x", "input": "y"}, {}, "no 'instruction', but 'instrucion'"),
        ({"question": "x", "input": "y"}, {}, "{instruction} in the template names the column"),
        ({"instruction": "", "input": " "}, {}, "p.jsonl:1: all columns of the template are empty"),
        ({"instruction": ["x"], "input": "y"}, {}, "`instruction` must be a non-empty text"),
        ({"messages": [USER], "instruction": "x"}, {}, "remove the template"),
    ],
)
def test_a_row_that_cannot_fill_the_template_is_named(
    row: Any, settings: Any, message: str, tmp_path: Path
) -> None:
    assert message in refusal(tmp_path, row, template="{instruction}\n\n{input}", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no column"}, "the names of columns in braces"),
        ({"template": "{instruction} and {"}, "double braces that are meant as such"),
        ({"template": '{instruction} as {"a": 1}'}, "double braces that are meant as such"),
        ({"template": "{instruction} {reference}"}, "'reference', which is the reference"),
        (
            {"template": "{question} {output}", "fields": {"reference": "output"}},
            "'output', which is the reference",
        ),
        ({"template": "{question}", "fields": {"text": "prompt"}}, "fields.text has no effect"),
    ],
)
def test_a_template_that_cannot_be_honoured_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptSource(path="p.jsonl", **settings)


def test_texts_become_chats(tmp_path: Path) -> None:
    (raw,) = prompts_of(tmp_path, {"text": "hi"})
    (chat,) = prompts_of(tmp_path, {"text": "hi"}, chat=True)
    assert (chat.messages, chat.text) == ((USER,), None)
    assert chat.prompt_id == prompts_of(tmp_path, {"messages": [USER]})[0].prompt_id
    assert chat.prompt_id != raw.prompt_id


def test_settings_of_texts_are_refused_for_chats(tmp_path: Path) -> None:
    row = {"messages": [USER]}
    assert "remove the chat, or give rows with `text`" in refusal(tmp_path, row, chat=True)
    assert "remove the template" in refusal(tmp_path, row, template="Q: {text}")


def test_an_empty_other_form_is_none(tmp_path: Path) -> None:
    """Tools that write all columns of a table fill them with empty values."""
    rows = [{"messages": [], "text": "raw"}, {"messages": [USER], "text": ""}]
    found = prompts_of(tmp_path, *rows)
    assert [(p.messages, p.text) for p in found] == [(None, "raw"), ((USER,), None)]


def test_new_settings_at_their_defaults_leave_the_config_as_it_was() -> None:
    dumped = PromptSource(path="p.jsonl").model_dump(mode="json")
    assert dumped.keys() == {"path", "domain", "split", "fields", "template", "limit"}
    changed = PromptSource(path="p.jsonl", chat=True, answered=True).model_dump(mode="json")
    assert changed["chat"] and changed["answered"]
