"""The part of an answer that checkers, votes and the choice of best answers look at."""

import pytest

from pipeline.final_text import final_text, last_code_block, opens_thought


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" blue\n", "blue"),
        ("<think>\nThe sky. Or grey?\n</think>\n\nblue", "blue"),
        ("Or grey?\n</think>\n\nblue", "blue"),
        ("<think></think>blue", "blue"),
        ("<think>a</think>red<think>b</think>blue", "blue"),
        ("<think>a <think> b </think> blue", "blue"),
        ("<THINK>a</THINK>blue", "blue"),
        ("<thinking>a</thinking>blue", "blue"),
        ("<thought>a</thought>blue", "blue"),
        ("<reasoning>a</reasoning>blue", "blue"),
        ("<seed:think>a</seed:think>blue", "blue"),
        ("[THINK]a[/THINK]blue", "blue"),
        ("<|START_THINKING|>a<|END_THINKING|>blue", "blue"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7blue", "blue"),
        ("[thought] and [reasoning] are blanks",) * 2,
        ("<think>Perhaps 41? No: 42", ""),
        ("<think>a</think>red <think> or blue", ""),
        ("red <think> or blue", ""),
        ("<think>a</think>\n", ""),
        ("Write `<think>` first, then `</think>` and the answer.",) * 2,
        ("a < b, think > 3",) * 2,
        ("", ""),
    ],
)
def test_final_text(answer: str, expected: str) -> None:
    assert final_text(answer) == expected
    assert final_text(expected) == expected


def test_a_prompt_may_open_the_thought() -> None:
    assert final_text("Perhaps 41? No: 42", begins_in_thought=True) == ""
    assert final_text("Perhaps</think>42", begins_in_thought=True) == "42"
    assert opens_thought("<|assistant|><think>\n")
    assert not opens_thought("<|assistant|><think>\n\n</think>\n\n")
    assert not opens_thought("What does <think> mean?<|assistant|>")
    assert not opens_thought("")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Here:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```\na\n```\n~~~\nb\n~~~", "b\n"),
        ("````\n```\na\n```\n````", "```\na\n```\n"),
        ("```\na\n```\n```python\ncut", "a\n"),
        ("```python\ncut", None),
        ("print(1)", None),
    ],
)
def test_last_code_block(answer: str, expected: str | None) -> None:
    assert last_code_block(answer) == expected


@pytest.mark.parametrize("text", ["List<Reasoning> a = 5", "a[think] = 7; ", "x<thought>y"])
def test_a_tag_behind_a_letter_is_code(text: str) -> None:
    assert final_text(text) == text.strip()
