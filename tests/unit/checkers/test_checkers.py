"""Checkers: shipped ones, and functions of the user."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkers.answer_checkers import (
    CHECKERS,
    SafeChecker,
    checker_identity,
    exact,
    final_value,
    find_checker,
    number,
)
from pipeline.checkers.readings import reading_key
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 12 apples and 3 left\n#### 1,234", "1234"),
        ("#### -5.5", "-11/2"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        ("45%", "9/20"),
        ("3 or 4", "3 or 4"),
        ("(1, 0.5)", "(1, 1/2)"),
        (r"\boxed{2 \pi}", r"2\pi"),
        ("no figures here", None),
        ("3 #### ", None),
        (r"3 \boxed{}", None),
        ("<think>3", None),
    ],
)
def test_final_value(text: str, expected: str | None) -> None:
    reading = final_value(text)
    assert (None if reading is None else reading_key(reading)) == expected


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
    assert CHECKERS[name](answer, reference) in (True, False, None)
    assert CHECKERS[name](reference, reference) in (True, None)


@pytest.mark.parametrize(
    "text", ["9" * 400 + "/7", "1/" + "3" * 5000, "9" * 5000 + "/" + "3" * 5000]
)
def test_numbers_with_too_many_digits_are_no_others(text: str) -> None:
    assert not number(text, "#### 7") and not number(text, "1/3")


def test_exact_ignores_white_space_around() -> None:
    assert exact(" abc\n", "abc") and not exact("ab c", "abc")


def test_exact_looks_behind_the_thoughts() -> None:
    assert exact("<think>\nBlue. Or grey?\n</think>\n\nblue", "blue")
    assert not exact("<think>\nblue", "<think>\nblue\n</think>blue")
    assert exact("blue", "<think>blue") is None, "the reference says nothing"


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
    assert checker_identity("exact") == "exact-2"


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


def test_a_function_of_the_user_says_that_it_cannot_read_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shy_rules.py").write_text(
        "def same(answer, reference):\n"
        "    return answer == reference if reference.isdigit() else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checker = SafeChecker("shy_rules.same")
    assert [checker("7", reference) for reference in ("7", "8", "seven")] == [True, False, None]
    checker.log_count()
    (said,) = [record.message for record in caplog.records]
    assert said == (
        "checker shy_rules.same cannot read the reference of 1 of 3 answers, which are unchecked"
    )


def test_a_function_of_the_user_sees_the_final_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kind_rules.py").write_text(
        "def nearly(answer, reference):\n    return reference.startswith(answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checker = SafeChecker("kind_rules.nearly")
    assert checker("<think>no</think> bl", "blue") is True
    assert checker("<think>no", "blue") is False, "the function finds nothing right"


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
        ("pipeline.checkers.answer_checkers.nothing", "has no function 'nothing'"),
        ("pipeline.checkers.answer_checkers.final_value", "must take two arguments"),
    ],
)
def test_a_checker_that_cannot_judge_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_checker(name)
