"""Checkers and the reasons why an answer is dropped."""

import pytest

from pipeline.filters import exact, final_number, number, reason_to_drop


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
    ],
)
def test_final_number(text: str, expected: float | None) -> None:
    assert final_number(text) == expected


def test_number_compares_values_and_never_two_absences() -> None:
    assert number("it is 72", "work\n#### 72.0")
    assert not number("it is 71", "#### 72")
    assert not number("none", "none")


def test_exact_ignores_white_space_around() -> None:
    assert exact(" abc\n", "abc") and not exact("ab c", "abc")


@pytest.mark.parametrize(
    ("answer", "finish", "reference", "checker", "reason"),
    [
        ("12", "length", "12", "exact", "truncated"),
        (" \n", "stop", None, None, "empty"),
        ("13", "stop", "12", "exact", "wrong"),
        ("13", "stop", "12", None, None),
        ("13", "stop", None, "exact", None),
        ("12", "stop", "12", "exact", None),
    ],
)
def test_reason_to_drop(
    answer: str, finish: str, reference: str | None, checker: str | None, reason: str | None
) -> None:
    assert reason_to_drop(answer, finish, reference, checker) == reason
