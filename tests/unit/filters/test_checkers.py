"""Checkers: shipped ones, and functions of the user."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.filters.answer_checkers import (
    CHECKERS,
    SafeChecker,
    checker_identity,
    exact,
    final_number,
    find_checker,
    number,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 12 apples and 3 left\n#### 1,234", 1234.0),
        ("#### -5.5", -5.5),
        ("the answer is 7.", 7.0),
        ("costs $1,000,000 in all", 1_000_000.0),
        ("no figures here", None),
        ("####", None),
        ("3 #### nothing", None),
        ("so .5", 0.5),
        ("-.5", -0.5),
        ("see No.5", 5.0),
        ("and so on...5", 5.0),
        ("1/2", 0.5),
        ("it is -3/4.", -0.75),
        ("on 5/17/2024", 2024.0),
        ("3/0", 0.0),
        ("in 3-5 days", 5.0),
        ("x-5", 5.0),
        ("x = 3,-4", -4.0),
        ("it is \u22125", -5.0),
        ("#### 4 or 5", 4.0),
    ],
)
def test_final_number(text: str, expected: float | None) -> None:
    assert final_number(text) == expected


def test_number_compares_values_and_never_two_absences() -> None:
    assert number("it is 72", "work\n#### 72.0")
    assert not number("it is 71", "#### 72")
    assert not number("none", "none")
    assert not number("so .5", "#### 5") and number(".5", "0.5")
    assert not number("1/2", "2") and number("2/4", "1/2")
    assert number("3-5", "5") and not number("-5", "5")


DIGITS = st.builds(
    "".join,
    st.lists(
        st.sampled_from(["1", "90", "7" * 400, "3" * 5000, "\u0663", "/", ".", ",", "-", "####"])
        | st.text(max_size=3)
    ),
)


@pytest.mark.parametrize("name", CHECKERS)
@given(DIGITS, DIGITS)
def test_shipped_checkers_judge_any_text(name: str, answer: str, reference: str) -> None:
    assert CHECKERS[name](answer, reference) in (True, False)


@pytest.mark.parametrize(
    "text", ["9" * 400 + "/7", "1/" + "3" * 5000, "9" * 5000 + "/" + "3" * 5000]
)
def test_numbers_with_too_many_digits_are_no_others(text: str) -> None:
    assert not number(text, "#### 7") and not number(text, "1/3")
    assert number("2" * 400 + "/" + "1" * 400, "2"), "as long as the quotient is a float"


def test_exact_ignores_white_space_around() -> None:
    assert exact(" abc\n", "abc") and not exact("ab c", "abc")


def test_a_function_of_the_user_judges_by_its_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "house_rules.py"
    module.write_text(
        "def same_length(answer, reference):\n    return len(answer) == len(reference)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check = find_checker("house_rules.same_length")
    assert check("abc", "xyz") and not check("ab", "xyz")
    before = checker_identity("house_rules.same_length")
    module.write_text(module.read_text() + "# another text\n")
    assert checker_identity("house_rules.same_length") != before
    assert checker_identity("exact") == "exact"


def test_an_answer_at_which_a_checker_raises_is_wrong_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "touchy_rules.py").write_text(
        "def same_number(answer, reference):\n    return int(int(answer) == int(reference))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checker = SafeChecker("touchy_rules.same_number")
    assert [checker(answer, "7") for answer in ("7", "8", "seven", "eight")] == [
        True,
        False,
        False,
        False,
    ]
    assert checker.judge("seven", "7")[1] == (
        "ValueError: invalid literal for int() with base 10: 'seven'"
    )
    checker.log_count()
    first, last = [record.message for record in caplog.records]
    assert (
        first.startswith("checker touchy_rules.same_number raised ValueError")
        and "'seven'" in first
    )
    assert "raised at 3 of 5 answers" in last
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_checker_that_raises_nowhere_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    checker = SafeChecker("exact")
    assert checker("a", "a") and not checker("a", "b")
    checker.log_count()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exat", "did you mean 'exact'"),
        ("no_such_package.check", "No module named 'no_such_package'"),
        ("pipeline.filters.answer_checkers.nothing", "has no function 'nothing'"),
        ("pipeline.filters.answer_checkers.final_number", "must take two arguments"),
    ],
)
def test_a_checker_that_cannot_judge_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_checker(name)
