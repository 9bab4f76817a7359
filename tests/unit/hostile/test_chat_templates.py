"""Chat templates that fail, refuse, never end or take all memory, and some that are odd and sound.

Whoever published a model wrote its template, which is a program.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.child import ChildProcess
from pipeline.records import Prompt
from pipeline.synthesis.rewriting import read_template
from teachers import rendering
from teachers.preflight.boundary import check_boundaries
from teachers.tokenizing import chat_end, prompt_text
from tests.support.hostile import Case, check_answer
from tests.support.tokenizers_for_tests import save_byte_tokenizer

pytestmark = pytest.mark.timeout(30)

CHAT = "{% for m in messages %}{{ '<user>' + m['content'] }}{% endfor %}{{ '<assistant>' }}"
REFUSES = "refuses prompt p"
LATE = "takes more than 0.5 seconds for a chat of 1 messages that begins with 'hello'"
FLOODS = "takes more than 512 MiB of memory for a chat of 1 messages"
LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


def refused(name: str, template: str, *reason: str) -> Case:
    return Case(name, template, (REFUSES, *reason))


FAILING = [
    refused("divides by zero", "{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    refused("adds a text to a number", "{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    refused("adds a number to the content", "{{ messages[0].content + 1 }}", "TypeError"),
    refused("compares a text with a number", "{{ 'a' < 1 }}", "TypeError"),
    refused("calls what is no function", "{{ messages() }}", "TypeError", "not callable"),
    refused("a range of 10^9", "{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    refused("an index behind the end", "{{ messages[99]['content'] }}", "no element 99"),
    refused("an attribute of nothing", "{{ x.y }}", "'x' is undefined"),
    refused("a key that messages lack", "{{ messages[0].tools.x }}", "has no attribute 'tools'"),
    refused("a number that is none", "{{ 'a' | round }}", "TypeError"),
    refused("an unknown filter", "{{ 'a' | nope }}", "No filter named 'nope'"),
    refused("an unknown test", "{{ 'a' is nope }}", "No test named 'nope'"),
    refused("an unknown tag", "{% nope %}", "unknown tag 'nope'"),
    refused("a block left open", "{% for m in messages %}", "Unexpected end of template"),
    refused("a brace left open", "{{ 'a'", "unexpected end of template"),
    refused("a text left open", "{{ 'a }}", "unexpected char"),
    refused("another file", "{% include '/etc/passwd' %}", "no loader for this environment"),
    refused("a module", "{% import 'os' as os %}", "no loader for this environment"),
    refused("a base", "{% extends 'x' %}", "no loader for this environment"),
    refused("a method of Python's own", "{{ ''.__class__.__mro__ }}", "'__class__'", "unsafe"),
    refused("the globals of a function", "{{ raise_exception.__globals__.x }}", "unsafe"),
    refused("a format that looks inside", "{{ '{0.__class__.x}'.format(1) }}", "unsafe"),
    refused("a change of the chat", "{{ messages.append(1) }}", "unsafe"),
    refused("its own refusal", "{{ raise_exception('no system role') }}", "no system role"),
    refused("a refusal with control characters", "{{ raise_exception('\x1b[2J') }}", r"\x1b[2J"),
    refused("a refusal of a million words", "{{ raise_exception('no ' * 10**6) }}", "no no", "..."),
    refused("a refusal in lines", "{{ raise_exception('a\nb') }}", "a b"),
    refused("itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    refused("a text in brackets", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
    refused("a list in lists", "{{ " + "[" * 3000 + "]" * 3000 + " }}", "RecursionError"),
    refused("texts that are joined wrongly", "{{ [1, none] | sum }}", "TypeError"),
    refused("a day of no form", "{{ strftime_now(5) }}", "TypeError"),
    refused("JSON of what has none", "{{ namespace(a=1) | tojson }}", "TypeError"),
]
ENDLESS = [
    Case("loops in loops", LOOPS, (LATE,)),
    Case("loops over the content", CHAT + LOOPS.replace("99999", "m | default(9) * 9999"), (LATE,)),
    Case("a power that never ends", "{{ (9 ** 9999999) % 7 }}", (LATE,)),
    Case(
        "macros that double",
        "".join(
            f"{{% macro f{i}() %}}{{{{ f{i - 1}() }}}}{{{{ f{i - 1}() }}}}{{% endmacro %}}"
            if i
            else "{% macro f0() %}{% endmacro %}"
            for i in range(60)
        )
        + "{{ f59() }}",
        (LATE,),
    ),
]
FLOODING = [
    Case("a text of 10^9", "{{ 'a' * 10**9 }}", (FLOODS,)),
    Case("a text that is not written", "{% set x = 'a' * 10**9 %}x", (FLOODS,)),
    Case("a list of 10^9", "{{ ([0] * 10**9) | length }}", (FLOODS,)),
    Case("a format of 10^9", "{{ '%1000000000d' % 1 }}", (FLOODS,)),
    Case("a text in the middle of 10^9", "{{ 'a' | center(10**9) }}", (FLOODS,)),
    Case("a replacement of all", "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}", (FLOODS,)),
    Case(
        "a text that doubles",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        (FLOODS,),
    ),
    Case("a text of 10^7", "{{ 'a' * 10**7 }}", ("takes a text of 10000000 characters",)),
    Case("many lines", "{% for i in range(10**5) %}" + "x" * 99 + "{% endfor %}", ("a text of",)),
]
SOUND = [
    Case("a usual template", (CHAT, "<user>hello<assistant>")),
    Case("an empty template", ("", "")),
    Case("a missing value that is tested", ("{{ x is defined }}{{ x }}", "False")),
    Case("10^5 rounds", ("{% for i in range(10**5) %}{% endfor %}x", "x")),
    Case("its own tags", ("{% generation %}x{% endgeneration %}", "x")),
    Case("a break", ("{% for i in range(9) %}{% break %}{% endfor %}x", "x")),
    Case("the pinned day", ("{{ strftime_now('%Y-%m-%d') }}", "2025-01-01")),
    Case(
        "a day of its own", ("{% set template_date = '2026-02-03' %}{{ strftime_now('%d') }}", "03")
    ),
    Case("special tokens", ("{{ eos_token }}{{ pad_token }}", "<eos><pad>")),
    Case("JSON as it is", ("{{ '<ä>' | tojson }}", '"<ä>"')),
    Case("an emoji and a NUL", ("{{ '\U0001f600\0' }}", "\U0001f600\0")),
    Case("lines of blocks", ("{% if true %}\n  x\n{% endif %}\n", "  x\n")),
    Case("no documents and no tools", ("{{ tools }}{{ documents }}", "NoneNone")),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS_TO_RENDER", 0.5)


def chat(content: str = "hello") -> Prompt:
    return Prompt("p", "d", "train", messages=({"role": "user", "content": content},))


def text(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    tokenizer.chat_template = template
    return prompt_text(tokenizer, chat())


@pytest.mark.parametrize("case", [*FAILING, *FLOODING], ids=str)
def test_a_template_that_fails_is_answered(case: Case, tokenizer: PreTrainedTokenizerBase) -> None:
    check_answer(case, lambda: text(tokenizer, case.given))


@pytest.mark.parametrize("case", ENDLESS, ids=str)
def test_a_template_that_never_ends_is_given_up(
    case: Case, tokenizer: PreTrainedTokenizerBase, impatient: None
) -> None:
    check_answer(case, lambda: text(tokenizer, case.given))


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_sound_template_is_rendered(case: Case, tokenizer: PreTrainedTokenizerBase) -> None:
    template, expected = case.given
    assert check_answer(case, lambda: text(tokenizer, template)) == expected


def test_a_template_that_loops_for_long_chats_alone_is_given_up_where_one_is_met(
    tokenizer: PreTrainedTokenizerBase, impatient: None
) -> None:
    tokenizer.chat_template = (
        CHAT + "{% if messages[0].content | length > 99 %}" + LOOPS + "{% endif %}"
    )
    assert prompt_text(tokenizer, chat()) == "<user>hello<assistant>"
    given = Case("long", chat("x" * 100), ("takes more than 0.5 seconds", "'xxxx"))
    check_answer(given, lambda: prompt_text(tokenizer, given.given))
    assert prompt_text(tokenizer, chat()) == "<user>hello<assistant>", "the next one is rendered"


def test_no_check_waits_for_each_of_its_trials(
    tokenizer: PreTrainedTokenizerBase, impatient: None
) -> None:
    """Where a refusal of the template means nothing, its never ending does."""
    tokenizer.chat_template = LOOPS
    for name, call in {
        "chat_end": lambda: chat_end(tokenizer),
        "boundaries": lambda: check_boundaries(tokenizer, [chat()], []),
    }.items():
        started = time.monotonic()
        check_answer(Case(name, None, ("takes more than 0.5 seconds",)), call)
        assert time.monotonic() - started < 5


def test_a_long_chat_may_be_written_several_times(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT * 3
    assert len(prompt_text(tokenizer, chat("x" * 3_000_000))) > 9_000_000


FILES = [
    Case("gone", lambda path: None, ("does not exist",)),
    Case("a folder", Path.mkdir, ("is no file",)),
    Case("a pipe", os.mkfifo, ("is no file",)),
    Case("a device", lambda path: path.symlink_to("/dev/zero"), ("is no file",)),
    Case("a link to nothing", lambda path: path.symlink_to("gone"), ("does not exist",)),
    Case("invalid UTF-8", lambda path: path.write_bytes(b"\xff"), ("is not UTF-8",)),
    Case("without its place", lambda path: path.write_text("{x}"), ("must hold {prompt}",)),
    Case("sound", lambda path: path.write_text("Write: {prompt}")),
]


@pytest.mark.parametrize("case", FILES, ids=str)
def test_the_file_of_a_template_is_answered(case: Case, tmp_path: Path) -> None:
    case.given(tmp_path / "template.txt")
    check_answer(case, lambda: read_template(str(tmp_path / "template.txt"), "prompt"))


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[ChildProcess]:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    question = json.loads(line)\n"
        "    if question == 'die': os._exit(1)\n"
        "    print(json.dumps([os.getpid(), question]), flush=True)\n"
    )
    child = ChildProcess("the program", program, "hello")
    yield child
    child.end()


def test_a_child_that_dies_is_started_anew(mortal: ChildProcess) -> None:
    first, answer = mortal.ask("ü", 20)
    assert answer == "ü" and mortal.ask(1, 20) == [first, 1]
    with pytest.raises(RuntimeError, match="the program ended while it worked on die"):
        mortal.ask("die", 20)
    second, answer = mortal.ask(json.loads('{"a": [null]}'), 20)
    assert second != first and answer == {"a": [None]}
