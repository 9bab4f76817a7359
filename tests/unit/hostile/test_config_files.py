"""Config files that are no YAML, no config or no files: one message with the fault's place."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from tests.support.command_line import QUICKSTART
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

SHIPPED = (QUICKSTART / "config.yaml").read_text()
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {k: 1, l: 2}\n" + "".join(
    f"a{i}: &a{i} {{b: [{', '.join([f'{{<<: *a{i - 1}}}'] * 9)}]}}\n" for i in range(1, 12)
)
DEEP_BY_ALIASES = "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}]\n" for i in range(1, 200))


def plus(lines: str) -> bytes:
    """The shipped config with further lines."""
    return (SHIPPED + lines).encode()


def swapped(old: str, new: str) -> bytes:
    """The shipped config with one part replaced."""
    assert SHIPPED.count(old) == 1, old
    return SHIPPED.replace(old, new).encode()


BAD_YAML = [
    Case("billion laughs", LAUGHS.encode(), ("line 5,", "more than 50000 values")),
    Case("laughs behind a config", plus(LAUGHS), ("more than 50000 values",)),
    Case("laughs by merges", MERGED_LAUGHS.encode(), ("line 5,", "more than 50000 values")),
    Case("deep by aliases", DEEP_BY_ALIASES.encode(), ("line 49,", "inside of each other")),
    Case("list that holds itself", b"a: &a [*a]", ("line 1, column 8", "*a stands inside")),
    Case("mapping that holds itself", b"a: &a {b: *a}", ("line 1,", "*a stands inside")),
    Case("merge of itself", b"a: &a\n  <<: *a\n", ("line 2, column 7", "*a stands inside")),
    Case("circle by way of a list", b"x: &x\n  - y: [1, *x]\n", ("line 2, column 12", "*x")),
    Case("alias to nothing", b"a: *missing", ("line 1, column 4", "alias 'missing'", "&name")),
    Case("alias before its anchor", b"a: *x\nb: &x 1", ("line 1, column 4", "alias 'x'")),
    Case("two anchors of a name", b"a: &x 1\nb: &x 2", ("line 2, column 4", "another name")),
    Case("5000 brackets", b"[" * 5000 + b"]" * 5000, ("column 52", "more than 50 lists")),
    Case("100000 brackets, open", b"[" * 100_000, ("column 52", "more than 50 lists")),
    Case("5000 braces", b"{a: " * 5000, ("more than 50 lists or mappings",)),
    Case("5000 dashes", b"- " * 5000 + b"x", ("line 1, column 103", "more than 50 lists")),
    Case("5000 levels of indents", b"".join(b" " * i + b"a:\n" for i in range(300)), ("line 51,",)),
    Case("deep vllm block", plus("x: " + "[" * 60 + "]" * 60), ("more than 50 lists",)),
    Case("date of the 99th", plus("x: 2001-99-99\n"), ("'2001-99-99' is no date", "quotes")),
    Case("30 February", swapped("seed: 17", "seed: 2025-02-30"), ("line 3, column 7", "no date")),
    Case("hour 25", plus("x: 2001-01-01 25:00:00\n"), ("is no date",)),
    Case("year 0", plus("x: 0000-01-01\n"), ("is no date",)),
    Case(
        "5000 digits", swapped("seed: 17", "seed: " + "9" * 5000), ("line 3, column 7", "no numb")
    ),
    Case("400 digits", swapped("seed: 17", "seed: " + "9" * 400), ("line 3, column 7", "no numb")),
    Case("minus 400 digits", swapped("seed: 17", f"seed: -{'9' * 400}"), ("no number",)),
    Case("2 to the 64th", swapped("seed: 17", f"seed: {2**64}"), ("no number",)),
    Case("4000 hexadecimal digits", swapped("seed: 17", f"seed: 0x{'f' * 4000}"), ("no number",)),
    Case("float beyond floats", swapped("0.003", "1.0e+400"), ("'1.0e+400' is no number",)),
    Case("octal by a zero", swapped("steps: 400", "steps: 0400"), ("'0400' is no number",)),
    Case("time of day", swapped("name: quickstart", "name: 12:30"), ("'12:30' is no number",)),
    Case("base 60 with a point", plus("x: 1:30.5\n"), ("'1:30.5' is no number",)),
    Case("key twice", plus("seed: 18\n"), ("line 72, column 1", "'seed'", "line 3", "keep one")),
    Case(
        "teacher twice",
        swapped("  words:\n    model", "  arithmetic:\n    model"),
        ("line 21, column 3", "line 15"),
    ),
    Case("nested key twice", swapped("max_num_seqs: 128", "dtype: half"), ("'dtype'", "line 18")),
    Case("key twice, once in quotes", b"a: 1\n'a': 2", ("line 2, column 1", "line 1")),
    Case("key twice, 1 and 0x1", b"b: {1: x, 0x1: y}", ("line 1, column 11", "the key 1")),
    Case("key twice, yes and true", b"yes: 1\ntrue: 2", ("line 2, column 1", "the key True")),
    Case("key three times", b"a: 1\nb: 2\na: 3\na: 4", ("line 3, column 1", "line 1")),
    Case("key twice in a list", b"- {a: 1}\n- {b: 1, c: 2, b: 3}", ("line 2, column 16", "'b'")),
    Case("two merges", b"a: &a {x: 1}\nb: {<<: *a, <<: *a}", ("line 2, column 13", "[*a, *b]")),
    Case("merge of a number", b"a: {<<: 5}", ("line 1, column 9", "name a mapping behind <<")),
    Case("merge of a list of numbers", b"a: {<<: [5]}", ("name a mapping behind <<",)),
    Case("key of a list", b"? [a, b]\n: c", ("line 1, column 3", "a key must be a name")),
    Case("key of a mapping", b"? {a: b}\n: c", ("line 1, column 3", "a key must be a name")),
    Case("tab", b"a:\n\tb: 1", ("line 2, column 1", "indent with spaces")),
    Case("key indented by one too many", b"a: 1\n b: 2", ("line 2, column 3", "indent keys alike")),
    Case("text with a colon", b"a: b: c", ("line 1, column 5", "in quotes")),
    Case("key without a colon", b"a: 1\nb\nc: 3", ("line 3, column 1", "a colon and a space")),
    Case("key without a space", b"a: 1\nb:2\nc: 3", ("line 3, column 1", "a colon and a space")),
    Case("bracket left open", b"a: [1, 2\nb: 3", ("line 2, column 2", "close the bracket")),
    Case("brace left open", b"a: {b: 1", ("close the bracket",)),
    Case("quote left open", b"a: 'b\nc: 1", ("line 2,", "close the bracket or the quote")),
    Case("no comma", b"a: {b: 1 c: 2}", ("line 1, column 11", "put a comma")),
    Case("text that begins with @", b"a: @b", ("line 1, column 4", "in quotes")),
    Case("text that begins with %", b"a: %b", ("line 1, column 4", "in quotes")),
    Case("backslash in quotes", b'a: "C:\\data"', ("line 1, column 8", "double the backslash")),
    Case("list at another indent", b"a:\n  - 1\n - 2", ("line 3, column 2", "indent all keys")),
    Case("object of Python", b"a: !!python/object:os.system x", ("line 1, column 4", "remove the")),
    Case("call of Python", b"a: !!python/object/apply:os.system [x]", ("remove the tag",)),
    Case("tag of somebody", b"a: !env HOME", ("line 1, column 4", "'!env'", "remove the tag")),
    Case("tag of a number on a text", b"a: !!int ten", ("'ten' is no number",)),
    Case("tag of a number on nothing", b"a: !!int ''", ("'' is no number",)),
    Case("tag of a truth on a text", b"a: !!bool perhaps", ("line 1, column 4", "'perhaps'")),
    Case("tag of a date on a text", b"a: !!timestamp today", ("'today' is no date",)),
    Case("two documents", b"a: 1\n---\nb: 2", ("line 2, column 1", "keep one document")),
    Case("YAML 3", b"%YAML 3.0\n---\na: 1", ("line 1, column 1", "version 1.*")),
    Case("NUL", b"a: 1\nb: x\0y", ("line 2, column 5", "0x0000", "remove it")),
    Case("NUL by its escape", b'a: "x\\0y"', ("line 1, column 4", "NUL")),
    Case("escape of terminals", b"a: \x1b[2J", ("line 1, column 4", "0x001b")),
    Case("escape beyond Unicode", b'a: "\\U00110000"', ("names no character",)),
    Case("delete", b"a: \x7f", ("0x007f",)),
    Case("half a character", b'a: "\\ud83d"', ("line 1, column 4", "half of a character")),
    Case("other half", b'a: "x\\ude00"', ("half of a character",)),
    Case("Latin 1", "a: 1\nb: 2\nname: Zoë".encode("latin-1"), ("line 3", "0xeb", "as UTF-8")),
    Case("UTF-16", "name: x".encode("utf-16"), ("line 1", "0xff", "save the text as UTF-8")),
    Case("bytes of a program", bytes(range(128, 256)) * 1000, ("line 1", "as UTF-8")),
    Case("lone brackets of a template", b"a: {{ value }}", ("line 1,", "must be a name or number")),
    Case("JSON with a comment", b'{"a": 1, // no\n "b": 2}', ("line 2,", "put a comma")),
    Case("long garbage", b"!" * 2**20, ("line 1, column 1",)),
    Case("longer than any config", b"a: " + b"x" * 2**23, ("longer than 4194304 bytes",)),
    Case("many lines", b"".join(b"k%d: 1\n" % i for i in range(100_000)), ("50000 values",)),
    Case("empty", b"", ("must hold a mapping of sections", "NoneType")),
    Case("comments alone", b"# nothing\n", ("must hold a mapping of sections",)),
    Case("list", b"- a\n- b", ("must hold a mapping of sections, found list",)),
    Case("text", b"quickstart", ("must hold a mapping of sections, found str",)),
    Case("date", b"2026-11-30", ("must hold a mapping of sections, found date",)),
    Case("set", b"!!set {a, b}", ("must hold a mapping of sections, found set",)),
    Case("web page", b"<!DOCTYPE html><html></html>", ("must hold a mapping of sections",)),
    Case("numbers as keys", b"1: a\n2: b", ("1: Keys should be strings",)),
    Case("null as key", b"~: a", ("should be strings",)),
    Case("section of a text", swapped("  root: ./output", "  ./output"), ("storage:",)),
]
GOOD_YAML = [
    Case("as shipped", SHIPPED.encode()),
    Case("mark of the byte order", b"\xef\xbb\xbf" + SHIPPED.encode()),
    Case("line ends of Windows", SHIPPED.replace("\n", "\r\n").encode()),
    Case("line ends of old Macs", SHIPPED.replace("\n", "\r").encode()),
    Case("marks of the document", f"---\n{SHIPPED}...\n".encode()),
    Case("version of YAML", f"%YAML 1.1\n---\n{SHIPPED}".encode()),
    Case(
        "merge with another key", swapped("vllm: *engine\n    res", "vllm: {<<: *engine}\n    res")
    ),
    Case(
        "merge of several",
        swapped("vllm: *engine\n    res", "vllm: {<<: [*engine, {max_num_seqs: 128}]}\n    res"),
    ),
    Case("key in quotes", swapped("name: quickstart", '"name": "quickstart"')),
    Case("name by its escapes", swapped("name: quickstart", 'name: "quick\\x73tart"')),
    Case("hexadecimal", swapped("seed: 17", "seed: 0x11")),
    Case("binary", swapped("seed: 17", "seed: 0b10001")),
    Case("underscore", swapped("seed: 17", "seed: 1_7")),
    Case("number as text", swapped("seed: 17", "seed: '17'")),
    Case("blanks at the ends", SHIPPED.replace("\n", "  \n").encode()),
]


@pytest.mark.parametrize("case", BAD_YAML, ids=str)
def test_a_file_is_refused_with_its_place(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(case.given)
    started = time.process_time()
    check_answer(replace(case, refusal=(str(path), *case.refusal)), lambda: load_config(path))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("case", GOOD_YAML, ids=str)
def test_a_file_in_another_form_says_the_same(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(case.given)
    config = check_answer(case, lambda: load_config(path))
    expected = tmp_path / "expected.yaml"
    expected.write_text(SHIPPED)
    assert config == load_config(expected)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = [
    Case("missing", lambda path: None, ("does not exist",)),
    Case("folder", Path.mkdir, ("is a folder", "name the YAML file in it")),
    Case("pipe that nobody writes", pipe, ("is a pipe or device",)),
    Case("device", lambda path: path.symlink_to("/dev/zero"), ("is a pipe or device",)),
    Case("link to nothing", lambda path: path.symlink_to("nowhere"), ("does not exist",)),
    Case("link to itself", loop, ("does not exist",)),
]


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_a_path_that_is_no_file_is_refused_at_once(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    case.given(path)
    check_answer(case, lambda: load_config(path))


NAMES = [
    Case("too long a name", "x" * 300, ("cannot be read", "name too long")),
    Case("too long a path", "x/" * 3000, ("cannot be read", "name too long")),
    Case("NUL", "a\0b", ("does not exist", r"a\x00b")),
    Case("escape of terminals", "a\x1b[2J", ("does not exist", r"a\x1b[2J")),
    Case("bytes that are no UTF-8", "a\udce9", ("does not exist", r"a\udce9")),
    Case("below a file", "/etc/passwd/config.yaml", ("does not exist",)),
    Case("empty", "", ("is a folder",)),
]


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_a_name_that_names_no_file_is_refused(case: Case) -> None:
    check_answer(case, lambda: load_config(case.given))
