"""Rows and answers of a server of token ids: what cannot be right is refused at the border."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from teachers.endpoint.completions import Completions
from teachers.endpoint.transport import Requester
from teachers.protocol import CapturedRows, EndpointSpec, GeneratedAnswer
from teachers.tokenizing import student_tokenizer, vocabulary_size
from tests.support.endpoints import Response, at_once, loopback
from tests.support.hostile import Case, check_answer
from tests.support.tokenizers_for_tests import SPECIAL, save_tokenizer

pytestmark = pytest.mark.timeout(30)

IDS, WIDTH, EOS, MOST = [4, 9, 3], 3, 1, 4
LAST = '{"3": {"logprob": -1}, "6": {"logprob": -1.5}, "7": {"logprob": -2}}'


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> StudentConfig:
    folder = tmp_path_factory.mktemp("student")
    save_tokenizer(folder, tokens=SPECIAL + list("abcdefghijklmnop"))
    return StudentConfig(model=str(folder), initialization="random")


def asked(
    student: StudentConfig, content: str, call: Callable[[Completions], Any], padded: bool = False
) -> Any:
    """What the completions of a server make of a reply."""

    async def run(url: str) -> Any:
        values = {"url": url, "model": "m", "api": "vllm", "tokenizer": "t", "max_retries": 0}
        endpoint = EndpointConfig.model_validate(values)
        spec = EndpointSpec(endpoint, student, 64, WIDTH, (EOS,), is_padded=padded)
        requester = Requester(endpoint, at_once)
        tokenizer, _ = student_tokenizer(student.files)
        assert vocabulary_size(tokenizer) == 20
        try:
            return await call(Completions(spec, requester, None, tokenizer))
        finally:
            await requester.close()

    with loopback(lambda path, body: Response(content.encode())) as server:
        return asyncio.run(run(server.url))


def rows(*entries: tuple[Any, Any]) -> str:
    """A reply whose first row has these tokens and log-probabilities, as they stand in JSON."""
    return row(", ".join(f'"{token}": {{"logprob": {value}}}' for token, value in entries))


def row(members: str) -> str:
    return positions(f"[null, {{{members}}}, {LAST}]")


def positions(text: str, prompt: str = "[4, 9, 3]") -> str:
    return (
        f'{{"choices": [{{"token_ids": [5], "finish_reason": "length",'
        f' "prompt_token_ids": {prompt}, "prompt_logprobs": {text}}}]}}'
    )


SECOND, THIRD = (4, -1.5), (5, -2)
SORTED = [9, 4, 5]


def with_first(value: Any, token: Any = 9) -> str:
    return rows((token, value), SECOND, THIRD)


NO_NUMBER = ("not as expected", "logprob")
ROWS = [
    Case("plain", (with_first(-1), SORTED)),
    Case("whole numbers", (rows((9, 0), (4, -50), (5, -60)), SORTED)),
    Case("a token that the model masks", (rows((9, -1), (4, -2), (5, "-9999.0")), SORTED)),
    Case("minus infinity in words", (rows((9, -1), (4, -2), (5, "-Infinity")), SORTED)),
    Case("minus infinity by size", (rows((9, -1), (4, -2), (5, "-1e400")), SORTED)),
    Case("many digits", (with_first("-1." + "0" * 3000), SORTED)),
    Case("a little above zero", (rows((9, 0.0005), (4, -50), (5, -60)), SORTED)),
    Case("minus zero", (rows((9, "-0.0"), (4, -50), (5, -60)), SORTED)),
    Case("a leading zero", (with_first(-1, "09"), SORTED)),
    Case("not sorted", (rows(THIRD, (9, -1), SECOND), SORTED)),
    Case("the own token last", (rows((9, -8), (4, -1), (5, -2), (6, -3)), [4, 5, 6])),
    Case(
        "fields of newer servers",
        (
            row(
                '"9": {"logprob": -1, "rank": 1, "x": [{}]},'
                ' "4": {"logprob": -1.5}, "5": {"logprob": -2}'
            ),
            SORTED,
        ),
    ),
    Case(
        "quotes in a token",
        (
            row(
                r'"9": {"logprob": -1, "decoded_token": "\"logprob\": \u001b"},'
                r' "4": {"logprob": -1.5}, "5": {"logprob": -2}'
            ),
            SORTED,
        ),
    ),
    Case("no prompt ids", (with_first(-1).replace("prompt_token_ids", "x"), SORTED)),
    Case("NaN on top", (with_first("NaN"), None), ("NaN", "restart")),
    Case("NaN below", (rows((9, -1), SECOND, (5, "NaN")), None), ("NaN",)),
    Case("NaN beside the own token", (rows((7, "NaN"), (4, -1), (5, -2), (9, -8)), None), ("NaN",)),
    Case("infinity", (with_first("Infinity"), None), ("raw_logprobs",)),
    Case("infinity by size", (with_first("1e400"), None), ("raw_logprobs",)),
    Case("above zero", (with_first(0.5), None), ("raw_logprobs",)),
    Case("logits", (rows((9, 12.5), (4, 11), (5, 10)), None), ("raw_logprobs",)),
    Case("probabilities", (rows((9, 0.7), (4, 0.2), (5, 0.1)), None), ("raw_logprobs",)),
    Case("mass above one", (rows((9, -0.1), (4, -0.1), (5, -0.1)), None), ("raw_logprobs",)),
    Case("a number as text", (with_first('"-1"'), None), NO_NUMBER),
    Case("true", (with_first("true"), None), NO_NUMBER),
    Case("false", (with_first("false"), None), NO_NUMBER),
    Case("null", (with_first("null"), None), NO_NUMBER),
    Case("a list", (with_first("[-1]"), None), NO_NUMBER),
    Case("an object", (with_first("{}"), None), NO_NUMBER),
    Case("no value", (row('"9": {}, "4": {"logprob": -1}, "5": {"logprob": -2}'), None), NO_NUMBER),
    Case("a value alone", (row('"9": -1, "4": -1.5, "5": -2'), None), ("not as expected",)),
    Case("a negative id", (with_first(-1, -1), None), ("not as expected",)),
    Case(
        "an id above the vocabulary", (rows((9, -1), SECOND, (999999, -2)), None), ("999999", "20")
    ),
    Case("the first id above it", (rows((9, -1), SECOND, (20, -2)), None), ("token 20",)),
    *(
        Case(
            f"an id that wraps, {name}", (rows((9, -1), SECOND, (token, -2)), None), ("not as exp",)
        )
        for name, token in (
            ("24 bits", 2**24),
            ("24 bits and more", 2**24 + 7),
            ("32 bits", 2**32 + 5),
            ("40 bits", 2**40 + 5),
            ("64 bits", 2**64 + 5),
            ("70 bits", 2**70),
            ("400 digits", 10**400),
            ("5000 digits", "1" + "0" * 5000),
        )
    ),
    *(
        Case(
            f"an id that is {token!r}", (rows((9, -1), SECOND, (token, -2)), None), ("not as exp",)
        )
        for token in ("abc", "", "1.5", "1e1", "true", "null", "0x5", r"\u001b[2J", "the")
    ),
    Case("a token twice", (rows((9, -1), SECOND, (5, -2), (5, -2.5)), None), ("twice",)),
    Case(
        "a token twice and one too few", (rows((9, -1), SECOND, SECOND, (5, -2)), None), ("twice",)
    ),
    Case(
        "a token twice in two forms", (rows((9, -1), SECOND, (5, -2), ("05", -3)), None), ("twice",)
    ),
    Case("the own token twice", (rows((9, -1), (9, -1), SECOND, THIRD), None), ("twice",)),
    Case(
        "a value twice",
        (
            row(
                '"9": {"logprob": -1, "logprob": -3}, "4": {"logprob": -1.5}, "5": {"logprob": -2}'
            ),
            None,
        ),
        ("twice",),
    ),
    Case("too few", (rows((9, -1), SECOND), None), ("2 log-probabilities", "--max-logprobs 3")),
    Case("none", (row(""), None), ("0 log-probabilities",)),
    Case("too many", (rows((9, -1), SECOND, THIRD, (6, -3), (7, -4)), None), ("5 log-prob",)),
    Case("not the own token", (rows((8, -1), SECOND, THIRD), None), ("own token",)),
    Case("a row is null", (positions(f"[null, null, {LAST}]"), None), ("0 log-prob",)),
    Case("a row is a list", (positions(f"[null, [], {LAST}]"), None), ("not as expected",)),
    Case("a row is text", (positions(f'[null, "x", {LAST}]'), None), ("not as expected",)),
    Case("a row too few", (positions(f"[null, {LAST}]"), None), ("2 positions for 3 tokens",)),
    Case("a row too many", (positions(f"[null, {LAST}, {LAST}, {LAST}]"), None), ("4 positions",)),
    Case("rows of the tokens before", (positions(f"[null, {LAST}, {LAST}]"), None), ("own token",)),
    Case("no rows", (positions("null"), None), ("0 positions",)),
    Case("an object of rows", (positions("{}"), None), ("not as expected",)),
    Case(
        "another prompt", (positions(f"[null, {LAST}, {LAST}]", "[4, 9, 2]"), None), ("unchanged",)
    ),
    Case("a cut prompt", (positions(f"[null, {LAST}, {LAST}]", "[9, 3]"), None), ("2 tokens",)),
    Case("a prompt of true", (positions("null", "[true]"), None), ("1 tokens where 3",)),
    Case("rows in rows", (positions("[" * 5000 + "]" * 5000), None), ("recursion",)),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_are_right_or_refused(case: Case, student: StudentConfig) -> None:
    content, expected = case.given
    taken = check_answer(
        case, lambda: asked(student, content, lambda server: server.rows(IDS, 1, WIDTH))
    )
    if taken is None:
        return
    assert isinstance(taken, CapturedRows) and taken.token_ids[0].tolist() == expected
    assert (np.diff(taken.logprobs) <= 0).all() and (taken.logprobs <= 0).all()
    assert taken.token_ids[1].tolist() == [3, 6, 7] and taken.gold_logprobs[1] == -1


def test_padded_ids_are_taken_where_a_teacher_has_them(student: StudentConfig) -> None:
    """The selection counts them as tail."""
    content = rows((9, -1), SECOND, (25, -2))
    taken = asked(student, content, lambda server: server.rows(IDS, 1, WIDTH), padded=True)
    assert taken.token_ids[0].tolist() == [9, 4, 25]


def answer(token_ids: Any, reason: str = '"stop"', more: str = "") -> str:
    return f'{{"choices": [{{"token_ids": {token_ids}, "finish_reason": {reason}{more}}}]}}'


SHAPE = ("not as expected", "token_ids")
ENDED = ("broke it off",)
ANSWERS = [
    Case("plain", (answer([5, 6, 1]), [5, 6, 1])),
    Case("all that was asked", (answer([5, 6, 7, 1]), [5, 6, 7, 1])),
    Case("cut", (answer([5, 6, 7, 8], '"length"'), [5, 6, 7, 8])),
    Case("nothing", (answer([]), [])),
    Case("the end alone", (answer([1]), [1])),
    Case("an end that the server alone knows", (answer([5, 6]), [5, 6])),
    Case("broken off for its repetition", (answer([5, 5, 5], '"repetition"'), [5, 5, 5])),
    Case("several choices", (answer([5, 1])[:-2] + ', {"token_ids": [6]}]}', [5, 1])),
    Case("a name twice", (answer([5, 1], more=', "token_ids": [6, 1]'), [6, 1])),
    Case("text beside it", (answer([5, 1], more=r', "text": "\ud800 \u001b[2J"'), [5, 1])),
    Case("a negative id", (answer([-5, 1]), None), SHAPE),
    Case("an id above the vocabulary", (answer([999999, 1]), None), ("token 999999",)),
    Case("the first id above it", (answer([20, 1]), None), ("token 20", "20 tokens")),
    Case("40 bits", (answer([2**40, 1]), None), SHAPE),
    Case("70 bits", (answer([2**70, 1]), None), SHAPE),
    Case("400 digits", (answer([10**400, 1]), None), SHAPE),
    Case("5000 digits", (answer("[1" + "0" * 5000 + "]"), None), ("not as expected",)),
    Case("true", (answer("[true, 1]"), None), SHAPE),
    Case("a broken number", (answer("[5.5, 1]"), None), SHAPE),
    Case("a whole broken number", (answer("[5.0, 1]"), None), SHAPE),
    Case("text", (answer('["5", 1]'), None), SHAPE),
    Case("null among them", (answer("[null, 1]"), None), SHAPE),
    Case("NaN", (answer("[NaN, 1]"), None), SHAPE),
    Case("lists", (answer("[[5], [1]]"), None), SHAPE),
    Case("an object", (answer('{"0": 5}'), None), SHAPE),
    Case("no ids", (answer("null"), None), ("no token ids", "api: openai")),
    Case("more than was asked", (answer([5] * 4 + [1]), None), ("5 tokens", "at most 4")),
    Case("many more", (answer([5] * 100, '"length"'), None), ("100 tokens", "at most 4")),
    Case("goes on behind its end", (answer([5, 1, 6, 1]), None), ("token 1", "in the middle")),
    Case("begins with its end", (answer([1, 5], '"length"'), None), ("in the middle",)),
    Case("two ends", (answer([5, 1, 1]), None), ("in the middle",)),
    Case("aborted", (answer([5], '"abort"'), None), (*ENDED, "'abort'")),
    Case("no reason", (answer([5], "null"), None), (*ENDED, "None")),
    Case("a reason that clears the screen", (answer([5], r'"\u001b[2J"'), None), (r"'\x1b[2J'",)),
    Case("a long reason", (answer([5], f'"{"x" * 10**6}"'), None), ENDED),
    Case("a reason that is a number", (answer([5], "7"), None), ("not as expected",)),
    Case("no choices", ('{"choices": []}', None), ("not as expected", "choices")),
    Case("choices in an object", ('{"choices": {"0": {}}}', None), ("not as expected", "choices")),
    Case("a choice is null", ('{"choices": [null]}', None), ("not as expected",)),
]


@pytest.mark.parametrize("case", ANSWERS, ids=str)
def test_token_answers_are_right_or_refused(case: Case, student: StudentConfig) -> None:
    content, expected = case.given
    sampling = {"max_tokens": MOST, "temperature": 1.0}
    taken = check_answer(
        case, lambda: asked(student, content, lambda server: server.token_answer(IDS, sampling))
    )
    assert taken is None or (isinstance(taken, GeneratedAnswer) and taken.token_ids == expected)


def test_an_end_is_none_where_the_recipe_ignores_it(student: StudentConfig) -> None:
    sampling = {"max_tokens": MOST, "ignore_eos": True}
    content = answer([5, 1, 6, 1], '"length"')
    taken = asked(student, content, lambda server: server.token_answer(IDS, sampling))
    assert taken.token_ids == [5, 1, 6, 1]


def test_a_stop_token_of_the_recipe_ends_an_answer(student: StudentConfig, tmp_path: Path) -> None:
    sampling = {"max_tokens": MOST, "stop_token_ids": [7]}
    case = Case("stop token inside", None, ("token 7", "in the middle"))
    content = answer([5, 7, 6, 1])
    check_answer(
        case, lambda: asked(student, content, lambda server: server.token_answer(IDS, sampling))
    )
