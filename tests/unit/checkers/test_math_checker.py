"""The checker `math`: formulas that math-verify compares in a process of its own."""

import threading
import time

import pytest

from jobs.stages.preflight import check_filters
from pipeline.checkers import symbolic
from pipeline.checkers.answer_checkers import (
    SafeChecker,
    checker_identity,
    find_checker,
    references_unread,
)
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from pipeline.synthesis.prompts import read_prompts
from tests.support.command_line import QUICKSTART


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (r"\boxed{1 + x}", "x + 1", True),
        ("The answer is y + x.", "x + y", True),
        (r"\boxed{\frac{\pi}{2}}", r"\pi/2", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
        (r"\boxed{5!}", "120", True),
        (r"\boxed{3:4}", "3/4", True),
        (r"\boxed{East}", r"\text{East}", True),
        (r"\boxed{B}", "B", True),
        ("<think>2x?</think> $x$", "$x$", True),
        ("7 1/2 miles", "7.5", True),
        (r"\boxed{x^2}", "y^2", False),
        (r"\boxed{x^2}", "x^3", False),
        (r"\boxed{\sqrt{3}}", "3", False),
        (r"\boxed{(1,2)}", "(3,2)", False),
        (r"\boxed{[1,2)}", "(1,2)", False),
        (r"\boxed{1,2}", "(1,2)", False),
        (r"\boxed{West}", r"\text{East}", False),
        (r"\boxed{b}", "B", False),
        ("12 or 13", "13", False),
        ("2516_7", "2516_8", False),
        ("2516", "2516_8", False),
        ("1.570796", r"\frac{\pi}{2}", False),
        ("1.4142135623730951", r"\sqrt2", True),
        ("A+B", "a+b", False),
        (r"(2,1)", r"\{1,2\}", False),
        (r"\boxed{12 \text{ or } 13}", "13", False),
        (r"\boxed{0.333333}", "1/3", False),
        (r"\boxed{5\text{ cm}}", r"5\text{ km}", False),
        ("<think>x", "x", False),
        ("", "x", False),
        ("x" * 500, "y" * 500, False),
        ("x", "The sky is blue because of scattering", None),
        ("x", r"\boxed{}", None),
    ],
)
def test_math(answer: str, reference: str, expected: bool | None) -> None:
    assert find_checker("math")(answer, reference) is expected


def test_a_formula_without_an_end_is_wrong_and_the_next_is_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checker = SafeChecker("math")
    assert checker(r"\boxed{x + 1}", "1 + x")
    monkeypatch.setattr(symbolic, "SECONDS_TO_COMPARE", 0.5)
    started = time.monotonic()
    verdict, problem = checker.judge(r"\boxed{10^{10^{10}}}", "10^{10^{11}}")
    assert verdict is False and problem is not None and time.monotonic() - started < 5
    assert problem.startswith("TimeoutError: math-verify took more than 0.5 seconds for")
    assert "counts as wrong" in caplog.text
    monkeypatch.setattr(symbolic, "SECONDS_TO_COMPARE", 30)
    assert checker(r"\boxed{x + 2}", "2 + x")


def test_it_works_off_the_main_thread() -> None:
    verdicts: list[bool | None] = []
    checker = SafeChecker("math")
    thread = threading.Thread(target=lambda: verdicts.append(checker(r"\boxed{x + 3}", "3 + x")))
    thread.start()
    thread.join()
    assert verdicts == [True] and checker.num_errors == 0


def test_prepare_asks_no_process_what_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_WORKER", None)
    references = ["x + y", "7", r"\boxed{\pi}", "one answer in some words", "(1, 2)"]
    assert references_unread("math", references) == ["one answer in some words"]


def test_its_identity_names_the_version_of_the_package() -> None:
    assert checker_identity("math") == "math-1-0.9.0"


def test_a_missing_package_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(QUICKSTART / "config.yaml", ["prompts.checker=math"])
    monkeypatch.setattr("pipeline.checkers.answer_checkers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package math-verify.*polystill\[math\]"):
        check_filters(config, read_prompts(config.prompts)[0])
