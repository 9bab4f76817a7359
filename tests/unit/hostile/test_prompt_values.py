"""Rows of prompts whose values are broken, huge or foreign."""

import json
from pathlib import Path

import pytest

from tests.support.hostile import Case
from tests.support.prompt_sources import check_prompts, lines, row

pytestmark = pytest.mark.timeout(30)

HALF = "\\ud83d"
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "7" * 5000
VALUES = [
    Case(
        "a text cut in an emoji", lines(f'{{"text": "x{HALF}"}}'), ("p.jsonl:2: `text`", "\\ud83d")
    ),
    Case("the other half", lines('{"text": "\\ude00x"}'), ("p.jsonl:2: `text`", "\\ude00")),
    Case("halves in the wrong order", lines('{"text": "\\ude00\\ud83d"}'), ("lone surrogate",)),
    Case("half an id", lines(f'{{"text": "q", "id": "{HALF}"}}'), ("p.jsonl:2: `id`", "\\ud83d")),
    Case(
        "half a reference",
        lines(f'{{"text": "q", "reference": "{HALF}"}}'),
        ("`reference`", "\\ud83d"),
    ),
    Case(
        "half a domain",
        lines(f'{{"text": "q", "domain": "{HALF}"}}'),
        ("p.jsonl:2: domain", "\\ud83d"),
    ),
    Case(
        "half a character in a message",
        lines(f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'),
        ("messages[0].content", "\\ud83d"),
    ),
    Case(
        "half a character in a part of a message",
        lines('{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}'),
        ("messages[0].content", "\\ud83d"),
    ),
    Case(
        "half a character in the answer",
        lines(
            '{"messages": [{"role": "user", "content": "a"}, '
            f'{{"role": "assistant", "content": "{HALF}"}}]}}',
            answered=True,
        ),
        ("messages[1].content", "\\ud83d"),
    ),
    Case(
        "half a role",
        lines(f'{{"messages": [{{"role": "{HALF}", "content": "a"}}]}}'),
        ("messages[0].role", "\\ud83d"),
    ),
    Case(
        "half a character in messages in a text",
        lines(json.dumps({"messages": f'[{{"role": "user", "content": "{HALF}"}}]'})),
        ("messages[0].content", "\\ud83d"),
    ),
    Case(
        "half a character in a column of a template",
        lines(f'{{"a": "{HALF}"}}', template="{text}{a}"),
        ("`a`", "\\ud83d"),
    ),
    Case("half a key", lines(f'{{"{HALF}": "q"}}'), ("p.jsonl:2", "neither", "\\ud83d")),
    Case(
        "half a character in an unused column",
        lines(f'{{"text": "q", "x": "{HALF}"}}', prompts=("q",)),
    ),
    Case(
        "a row that is a list", lines("[1]"), ("p.jsonl:2", "a row must be an object, found list")
    ),
    Case("a row that is null", lines("null"), ("p.jsonl:2", "found NoneType")),
    Case("a row that is a text", lines('"q"'), ("p.jsonl:2", "found str")),
    Case("an empty row", lines("{}"), ("p.jsonl:2", "fields: none")),
    Case("a number as text", lines(row(text=5)), ("`text` must be a non-empty text, found 5",)),
    Case("a true text", lines(row(text=True)), ("found True",)),
    Case("an empty text", lines(row(text="")), ("found ''",)),
    Case("spaces as text", lines(row(text=" \u3000\n")), ("non-empty text",)),
    Case(
        "a list of 5 MB as text",
        lines(row(text=["x" * 100] * 50_000)),
        ("p.jsonl:2", "found ['xxx"),
    ),
    Case(
        "a deep dictionary as text",
        lines('{"text": ' + '{"a":' * 900 + "1" + "}" * 901),
        ("p.jsonl:2",),
    ),
    Case(
        "an object of 10^5 keys as text",
        lines(row(text={str(i): i for i in range(10**5)})),
        ("found {",),
    ),
    Case("a number of 4000 digits as text", lines(f'{{"text": {DIGITS[:4000]}}}'), ("found 7777",)),
    Case(
        "messages of 5 MB in one text",
        lines(row(text=None, messages="x" * 5_000_000)),
        ("p.jsonl:2",),
    ),
    Case(
        "deep messages in a text",
        lines(row(text=None, messages=DEEP)),
        ("`messages`", "nested too deeply"),
    ),
    Case(
        "messages in a text with 5000 digits",
        lines(row(text=None, messages=f"[{DIGITS}]")),
        ("4300 digits",),
    ),
    Case(
        "a key twice in messages in a text",
        lines(row(text=None, messages='[{"role": "user", "role": "system", "content": "a"}]')),
        ("key 'role'", "twice"),
    ),
    Case(
        "messages with an unread key of 5 MB",
        lines(row(text=None, messages=[{"role": "user", "content": "a", "k" * 5_000_000: 1}])),
        ("messages[0]", "which is not read"),
    ),
    Case(
        "messages with 10^4 unread keys",
        lines(
            row(
                text=None,
                messages=[{"role": "user", "content": "a"} | {f"k{i}": 1 for i in range(10**4)}],
            )
        ),
        ("and 9980 more",),
    ),
    Case(
        "a role of 5 MB",
        lines(row(text=None, messages=[{"role": "r" * 5_000_000, "content": "a"}])),
        ("role",),
    ),
    Case(
        "a role that is a list",
        lines(row(text=None, messages=[{"role": ["user"], "content": "a"}])),
        ("found ['user']",),
    ),
    Case(
        "a role that is a dictionary",
        lines(row(text=None, messages=[{"role": {}, "content": "a"}])),
        ("found {}",),
    ),
    Case(
        "content that is 5 MB of numbers",
        lines(row(text=None, messages=[{"role": "user", "content": {"a": [1] * 10**6}}])),
        ("messages[0].content",),
    ),
    Case(
        "a part of an odd kind of 1 MB",
        lines(row(text=None, messages=[{"role": "user", "content": [{"type": "t" * 10**6}]}])),
        ("is of type 'ttt",),
    ),
    Case(
        "a part whose kind is a list",
        lines(row(text=None, messages=[{"role": "user", "content": [{"type": ["text"]}]}])),
        ("is of type ['text']",),
    ),
    Case(
        "10^4 columns and no prompt",
        lines(json.dumps({f"c{i}": 1 for i in range(10**4)})),
        ("p.jsonl:2", "and 9980 more"),
    ),
    Case(
        "a column of 1 MB and no prompt",
        lines(json.dumps({"c" * 10**6: 1})),
        ("p.jsonl:2", "neither"),
    ),
    Case(
        "escape sequences in a column", lines(json.dumps({"\x1b[2J": 1})), ("p.jsonl:2", "\\x1b[2J")
    ),
    Case(
        "a reference of 5 MB that is a list",
        lines(row(reference=["r" * 5_000_000])),
        ("`reference`",),
    ),
    Case(
        "a reference that is a float",
        lines(row(reference=0.5)),
        ("`reference`", "found 0.5", "'0.5'"),
    ),
    Case(
        "a reference that is NaN",
        lines('{"text": "q", "reference": NaN}'),
        ("`reference`", "found nan"),
    ),
    Case("a reference that is true", lines(row(reference=True)), ("`reference`", "found True")),
    Case(
        "a reference of 4000 digits",
        lines(f'{{"text": "q", "reference": {DIGITS[:4000]}}}', prompts=("q",)),
    ),
    Case(
        "a domain of 300 characters",
        lines(row(domain="d" * 300)),
        ("300 characters", "shorten it to 100"),
    ),
    Case("a domain of 100 characters", lines(row(domain="d" * 100), prompts=("q",))),
    Case(
        "a domain of 5 MB that is none",
        lines(row(domain="ü" * 5_000_000)),
        ("p.jsonl:2: domain 'üü",),
    ),
    Case("a domain above its folder", lines(row(domain="../x")), ("domain '../x'",)),
    Case("a domain of dots", lines(row(domain="..")), ("domain '..'",)),
    Case("a domain with a line break", lines(row(domain="a\n")), ("domain 'a\\n'",)),
    Case("an empty domain", lines(row(domain="")), ("domain ''",)),
    Case("a domain that is a list", lines(row(domain=["a"])), ("domain ['a']",)),
    Case("a domain that is a number", lines(row(domain=5)), ("domain 5",)),
    Case("a domain that ends in a dot", lines(row(domain="a."), prompts=("q",))),
    Case(
        "domains in large and small letters",
        lines(row(domain="Math"), row(text="r", domain="math")),
        ("p.jsonl:3", "'math' differs from 'Math' at", "p.jsonl:2", "letters alone"),
    ),
    Case(
        "domains that differ in a letter",
        lines(row(domain="maths"), row(text="r", domain="math"), prompts=("q", "r")),
    ),
]

IDS = [
    Case("true", lines(row(id=True)), ("p.jsonl:2: `id`", "found True")),
    Case("empty", lines(row(id="")), ("p.jsonl:2: `id`", "found ''")),
    Case("spaces", lines(row(id=" ")), ("`id`", "found ' '")),
    Case("a dictionary", lines(row(id={"$oid": "5f"})), ("`id`", "found {'$oid': '5f'}")),
    Case("a list", lines(row(id=[1])), ("`id`", "found [1]")),
    Case("a list of 5 MB", lines(row(id=["x" * 5_000_000])), ("`id`", "found ['xxx")),
    Case("NaN", lines('{"text": "q", "id": NaN}'), ("`id`", "found nan")),
    Case("infinity", lines('{"text": "q", "id": -Infinity}'), ("`id`", "found -inf")),
    Case(
        "1 beside '1'", lines(row(id=1), row(text="r", id="1")), ("p.jsonl:3: id '1'", "p.jsonl:2")
    ),
    Case(
        "one id for two prompts",
        lines(row(id="a"), row(text="r", id="a")),
        ("p.jsonl:3: id 'a'", "p.jsonl:2"),
    ),
    Case(
        "one id of 1 MB for two prompts",
        lines(row(id="a" * 10**6), row(text="r", id="a" * 10**6)),
        ("p.jsonl:3: id 'aaa",),
    ),
    Case("1 beside 1.0", lines(row(id=1), row(text="r", id=1.0), prompts=("q", "r"))),
    Case("1e20", lines(row(id=1e20), prompts=("q",))),
    Case(
        "a number of 4000 digits", lines(f'{{"text": "q", "id": {DIGITS[:4000]}}}', prompts=("q",))
    ),
    Case("null", lines(row(id=None), prompts=("q",))),
    Case("0", lines(row(id=0), prompts=("q",))),
    Case("a path", lines(row(id="../../x"), prompts=("q",))),
    Case("one prompt with two ids", lines(row(id=1), row(id=2), prompts=("q",))),
    Case(
        "one prompt with two references",
        lines(row(reference="1"), row(reference="2"), prompts=("q",)),
    ),
    Case("one prompt with two domains", lines(row(domain="a"), row(domain="b"), prompts=("q",))),
    Case(
        "many prompts with two references",
        lines(*(row(text=f"q{i}", reference=str(k)) for i in range(11) for k in (1, 2))),
        ("11 of 23 rows repeat", "another reference"),
    ),
    Case(
        "many prompts with a reference of 1 MB",
        lines(*(row(text=f"q{i}", reference=str(k) * 10**6) for i in range(11) for k in (1, 2))),
        ("11 of 23 rows repeat", "1..."),
    ),
]


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_values_are_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)


@pytest.mark.parametrize("case", IDS, ids=str)
def test_ids_are_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)
