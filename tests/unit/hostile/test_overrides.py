"""Overrides of the command line that cannot be what their writer meant."""

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from tests.support.command_line import QUICKSTART
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

NESTED = ".".join("a" * 5000)
FORMS = [
    Case("no key", "=x", ("'=x' is not of the form key=value", "training.steps=100")),
    Case("no equals sign", "seed", ("'seed' is not of the form key=value",)),
    Case("empty", "", ("'' is not of the form key=value",)),
    Case("misspelt", "sed=1", ("unknown key 'sed'", "did you mean 'seed'")),
    Case("in capitals", "SEED=1", ("unknown key 'SEED'",)),
    Case("a space before the key", "training. steps=1", ("unknown key 'training. steps'",)),
    Case("a dash before the key", "--seed=1", ("unknown key '--seed'",)),
    Case("two dots", "training..steps=1", ("training", "unknown key")),
    Case("dots alone", "..=1", ("unknown key ''",)),
    Case("one dot", ".=1", ("unknown key ''",)),
    Case("a dot before the key", ".seed=1", ("unknown key ''",)),
    Case("a dot behind the key", "training.=1", ("unknown key 'training.'",)),
    Case("below a value", "seed.x=1", ("seed", "plain value", "override the value itself")),
    Case("far below a value", "seed.x.y=1", ("seed.x", "plain value")),
    Case("below null", "student.revision.x=1", ("student.revision",)),
    Case("attribute of Python", "teachers.__class__=x", ("teachers.__class__",)),
    Case("no such place of a list", "prompts.sources.9.path=x", ("prompts.sources.9", "2 entries")),
    Case("last place", "prompts.sources.-1.path=x", ("'-1' is not an index",)),
    Case("hexadecimal place", "prompts.sources.0x0.path=x", ("'0x0' is not an index",)),
    Case("superscript place", "prompts.sources.².path=x", ("'²' is not an index", "2 entries")),
    Case("Arabic place", "prompts.sources.\u0661.path=x", ("'\u0661' is not an index",)),
    Case("place of 5000 digits", f"prompts.sources.{'9' * 5000}.path=x", ("is not an index",)),
    Case("place with a sign", "prompts.sources.+1.path=x", ("'+1' is not an index",)),
    Case("place with a line", "prompts.sources.1_0.path=x", ("'1_0' is not an index",)),
    Case("place of half", "training.losses.0.5=x", ("unknown key", "forward_kl.5")),
    Case("place as the last", "training.losses.²=x", ("'²' is not an index",)),
    Case("5000 keys inside of each other", f"{NESTED}=1", ("names 5000 keys", "at most 50")),
    Case("brackets left open", "seed={a: [", ("seed={a: [", "line 1, column 6", "close")),
    Case("quote left open", "name='x", ("the value is not valid YAML", "close the bracket or")),
    Case("second line", "name=a\nseed: 3", ("the value is not valid YAML",)),
    Case("second document", "seed=1\n---\n2", ("the value is not valid YAML", "document")),
    Case("object of Python", "name=!!python/name:os.system", ("remove the tag",)),
    Case("alias", "name=*x", ("undefined alias 'x'",)),
    Case("list that holds itself", "name=&a [*a]", ("stands inside of what it names",)),
    Case("deep", f"student.vllm={'[' * 5000}", ("more than 50 lists",)),
    Case("laughs", "name=[&a [x,x,x,x,x,x,x,x], " + ", ".join(
        f"&{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 8)}]" for i in range(12)
    ) + "]", ("more than 50000 values",)),
    Case("impossible date", "student.template_date=2001-99-99", ("'2001-99-99' is no date",)),
    Case("5000 digits", f"seed={'9' * 5000}", ("is no number",)),
    Case("time of day", "training.steps=12:30", ("'12:30' is no number",)),
    Case("key twice", "student.vllm={dtype: half, dtype: float}", ("the key 'dtype'", "line 1")),
    Case("two equals signs", "training.steps==5", ("training.steps", "'=5'")),
    Case("NUL", "name=a\0b", ("a text cannot hold the character 0x0000",)),
    Case("escape of terminals", "name=\x1b[2J", ("0x001b",)),
    Case("escape of terminals as key", "a\x1b[2J=1", (r"a\x1b[2J",)),
    Case("bytes that are no UTF-8", "name=\udce9", ("0xdce9",)),
    Case("half a character", 'name="\\ud800"', ("half of a character",)),
    Case("a list for a mapping", "training=[1]", ("training",)),
    Case("a text for a mapping", "student.vllm=notadict", ("student.vllm", "'notadict'")),
    Case("a mapping for a text", "name={a: b}", ("name", "{'a': 'b'}")),
    Case("nothing for what is needed", "seed=", ("seed", "found None")),
    Case("a section that is emptied", "training=", ("training",)),
    Case("a value of 5 MB", f"name={'x' * 5_000_000}", ("longer than 4194304 bytes",)),
    Case("a wrong value of 1 MB", f"seed={'x' * 1_000_000}", ("seed", "xxx...")),
    Case("a wrong key of 1 MB", f"{'x' * 1_000_000}=1", ("unknown key", "...")),
    Case("many wrong keys", "training={" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}",
         ("unknown key 'training.k0'", "further mistakes")),
]  # fmt: skip
GOOD = [
    Case("place with two digits", ("prompts.sources.00.limit=5", "prompts.sources.0.limit", 5)),
    Case("place as the last", ("prompts.sources.1={path: p}", "prompts.sources.1.split", None)),
    Case("text with an equals sign", ("student.revision=a=b", "student.revision", "a=b")),
    Case("text in quotes", ("teachers.words.revision='1'", "teachers.words.revision", "1")),
    Case("value of several lines", ("student.vllm={\n dtype: half}", "student.vllm.dtype", "half")),
    Case("a character of two halves", ('teachers.words.revision="\\ud83d\\ude00"',
                                       "teachers.words.revision", "😀")),
    Case("a key that is not there yet", ("student.vllm.a.b.c=1", "student.vllm.a.b.c", 1)),
    Case("a number as key", ("evaluation.sampling.logit_bias={5: -1}",
                             "evaluation.sampling.logit_bias", {5: -1})),
    Case("spaces around the value", ("training.steps= 77 ", "training.steps", 77)),
    Case("a comment behind the value", ("training.steps=77 # few", "training.steps", 77)),
]  # fmt: skip


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_an_override_is_answered(case: Case, tmp_path: Path) -> None:
    root = f"storage.root={tmp_path}"
    check_answer(case, lambda: load_config(QUICKSTART / "config.yaml", [root, case.given]))


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_an_odd_override_is_taken(case: Case, tmp_path: Path) -> None:
    override, place, expected = case.given
    root = f"storage.root={tmp_path}"
    config = check_answer(case, lambda: load_config(QUICKSTART / "config.yaml", [root, override]))
    value = config.model_dump()
    for key in place.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    assert value == expected


def test_an_override_reaches_a_key_that_is_a_number(tmp_path: Path) -> None:
    sampling = "evaluation.sampling={max_tokens: 8, logit_bias: {5: -1.0, 6: -2.0}}"
    config = load_config(
        QUICKSTART / "config.yaml", [sampling, "evaluation.sampling.logit_bias.5=9"]
    )
    assert config.evaluation.sampling["logit_bias"] == {5: 9, 6: -2.0}
