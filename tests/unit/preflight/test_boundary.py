"""Preflight: prompt and answer meet as the chat template of each family writes them."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.config.student import StudentConfig
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from teachers.preflight.boundary import check_bound_judges, check_boundaries
from teachers.preflight.template import check_template
from teachers.tokenizing import answer_ids, load_tokenizer, prompt_ids
from tests.support.chat_templates import (
    CHATML,
    DEEPSEEK_R1,
    FAMILIES,
    GPT_OSS,
    LLAMA_3,
    PHI_3,
    QWEN_3,
    ZEPHYR,
    Family,
)
from tests.support.command_line import QUICKSTART
from tests.support.tokenizers_for_tests import metaspace, save_subwords

USER = ("user", "What is the capital of France?")
ANSWERS = ["Paris is it", "42", "- one\n- two"]


def chat(*messages: tuple[str, str], name: str = "p") -> Prompt:
    written = tuple({"role": role, "content": content} for role, content in messages)
    return Prompt(name, "d", "train", messages=written)


def text(written: str, name: str = "p") -> Prompt:
    return Prompt(name, "d", "train", text=written)


def prompts_of(family: Family) -> list[Prompt]:
    asked = [
        chat(USER, name="one"),
        chat(USER, ("assistant", "<think>\nFrance.\n</think>\n\nParis"), USER, name="many"),
    ]
    return [*asked, chat(("system", "Be kind."), USER)] if family.takes_system else asked


def config_of(student: StudentConfig) -> Config:
    return load_config(QUICKSTART / "config.yaml").model_copy(update={"student": student})


def load(folder: Path, family: Family) -> PreTrainedTokenizerBase:
    """The family's tokenizer under the arguments with which given answers meet their prompts."""
    save_subwords(folder, family.template, **family.options)
    arguments = {"template_arguments": family.arguments}
    student = StudentConfig(model=str(folder), initialization="random", **arguments)
    assert check_template(config_of(student)) == (
        "2025-01-01" if "strftime" in family.template else None
    )
    return load_tokenizer(student.files)


def own_ids(tokenizer: Any, prompt: Prompt, answer: str) -> list[int]:
    """The template's own rendering of a chat with an answer, on the run's day."""
    messages = [*(prompt.messages or ()), {"role": "assistant", "content": answer}]
    dates = {"%d %b %Y": "01 Jan 2025", "%d %B %Y": "01 January 2025", "%Y-%m-%d": "2025-01-01"}
    dates["%B %d, %Y"] = "January 01, 2025"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=dates.get)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_engines_pass_under_every_family(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES[name]
    tokenizer = save_subwords(tmp_path, family.template, **family.options)
    check_boundaries(tokenizer, prompts_of(family), [])
    cautions = [record.getMessage() for record in caplog.records]
    assert len(cautions) == (name == "zephyr")  # its models are asked without the BOS, too


@pytest.mark.parametrize("name", FAMILIES)
def test_given_answers_pass_under_every_family_that_lets_them_follow(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES[name]
    tokenizer = save_subwords(tmp_path, family.template, **family.options)
    asked = prompts_of(family)
    if family.given:
        with pytest.raises(ConfigError, match=family.given) as caught:
            check_boundaries(tokenizer, asked, asked)
        assert "prompt one: " in str(caught.value) and "prompt many" not in str(caught.value)
        check_boundaries(tokenizer, asked, [text("1+1=")])
    else:
        check_boundaries(tokenizer, asked, asked)
        empty = "</think>" in caplog.text
        assert empty == (family.given is None)
        assert ("enable_thinking: false" in caplog.text) == empty


MEETING = [name for name, family in FAMILIES.items() if not family.given or family.arguments]


@pytest.mark.parametrize("name", MEETING)
def test_prompt_and_given_answer_are_what_the_template_writes(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = load(tmp_path, family)
    asked = prompts_of(family)
    check_boundaries(tokenizer, asked, asked)
    if name == "mistral":  # its system message moves with the last message of the user
        asked = asked[:-1]
    for prompt in asked:
        for answer in ANSWERS:
            ids = prompt_ids(tokenizer, prompt)
            ours = ids + answer_ids(tokenizer, prompt, ids, answer)
            if family.arguments == {"enable_thinking": False} and name == "glm-4.5":
                assert tokenizer.decode(ours).endswith(f"<think></think>\n{answer}")
            assert own_ids(tokenizer, prompt, answer)[: len(ours)] == ours


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (QWEN_3, [("developer", "Be brief."), USER], "developer message 'Be brief.'"),
        (PHI_3, [USER, ("assistant", "x"), ("tool", "It is 42.")], "tool message 'It is 42.'"),
        (ZEPHYR, [("tool", "It is 42."), USER], "tool message 'It is 42.'"),
        (DEEPSEEK_R1, [USER, ("tool", "It is 42.")], "tool message 'It is 42.'"),
        (GPT_OSS.replace("+ messages[0]['content']", ""), [("system", "Kind."), USER], "'Kind.'"),
        (
            CHATML.replace("messages %}", "messages[-2:] %}", 1),
            [("system", "Kind."), USER, ("assistant", "x"), USER],
            "system message 'Kind.'",
        ),
        (
            CHATML.replace("m['content']", "m['content'].split('.')[0]"),
            [("user", "A b. C d.")],
            "C",
        ),
    ],
)
def test_text_that_the_template_leaves_out_is_refused(
    tmp_path: Path, template: str, messages: list[tuple[str, str]], lost: str
) -> None:
    tokenizer = save_subwords(tmp_path, template)
    with pytest.raises(ConfigError, match="leaves out text of the") as caught:
        check_boundaries(tokenizer, [chat(USER), chat(*messages, name="odd")], [])
    assert lost in str(caught.value) and "prompt odd: " in str(caught.value)
    check_boundaries(tokenizer, [chat(USER)], [])


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "  spaces around  \n")],
        [("user", 'quotes "and" \\ and\nlines, é')],
        [USER, ("assistant", "<think>a b c</think>\n\nd"), ("user", "…")],
        [USER, ("assistant", "x"), ("tool", '{"a": "b\\nc"}')],
        [("system", "Be kind. /no_think"), USER],
    ],
)
def test_text_may_be_trimmed_escaped_or_a_thought(
    tmp_path: Path, messages: list[tuple[str, str]]
) -> None:
    family = FAMILIES["llama-3"]
    check_boundaries(load(tmp_path, family), [chat(*messages)], [])
    options: dict[str, Any] = {"plain": ("<think>", "</think>")}
    check_boundaries(save_subwords(tmp_path / "q", QWEN_3, **options), [chat(*messages)], [])
    switches = CHATML.replace("m['content']", "m['content'].replace('/no_think', '')")
    check_boundaries(save_subwords(tmp_path / "s", switches), [chat(*messages)], [])


def test_a_template_that_opens_no_answer_is_refused_for_all(tmp_path: Path) -> None:
    tokenizer = save_subwords(tmp_path, CHATML.partition("{% if")[0])
    with pytest.raises(ConfigError, match=r"opens no answer: .*<\|im_end\|>.*assistant"):
        check_boundaries(tokenizer, [chat(USER)], [])


def test_a_template_that_ends_a_prompt_is_refused_for_all(tmp_path: Path) -> None:
    ended = CHATML.replace("assistant\n' }}", "assistant\n<|im_end|>\n' }}")
    tokenizer = save_subwords(tmp_path, ended)
    with pytest.raises(ConfigError, match=r"ends a prompt by <\|im_end\|>.*template writes '<"):
        check_boundaries(tokenizer, [chat(USER)], [])
    blenderbot = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    check_boundaries(save_subwords(tmp_path / "b", blenderbot), [chat(USER)], [chat(USER)])


def test_an_answer_behind_open_thoughts_has_two_remedies(tmp_path: Path) -> None:
    family = FAMILIES["deepseek-v3.1 thinking"]
    tokenizer = save_subwords(tmp_path / "a", family.template, **family.options)
    asked = [chat(USER)]
    with pytest.raises(ConfigError, match=r"student.template_arguments: {thinking: false}"):
        check_boundaries(tokenizer, asked, asked)
    with pytest.raises(ConfigError, match=r"judge large may .* '<.Assistant.><think>'"):
        check_bound_judges(tokenizer, ["large"])
    check_bound_judges(load(tmp_path / "b", family), ["large"])
    r1 = FAMILIES["deepseek-r1"]
    tokenizer = save_subwords(tmp_path / "c", r1.template, **r1.options)
    with pytest.raises(
        ConfigError,
        match=r"would train on '<.Assistant.><think>\\nParis.*, and the template writes "
        r"'<.Assistant.>Paris.*name a template that opens none in student\.chat_template",
    ):
        check_boundaries(tokenizer, asked, asked)


def test_a_reference_may_end_thoughts_that_the_template_opens(tmp_path: Path) -> None:
    r1 = FAMILIES["deepseek-r1"]
    tokenizer = save_subwords(tmp_path, r1.template, **r1.options)
    fitting, begun = "Hm.\n</think>\n\n42", "<think>\nHm.\n</think>\n\n42"
    prompts = [replace(chat(USER, name=n), reference=n) for n in (fitting, begun, "42")]
    check_boundaries(tokenizer, prompts, prompts[:1])
    for number in (1, 2):
        with pytest.raises(ConfigError, match="opens thoughts"):
            check_boundaries(tokenizer, prompts, [prompts[0], prompts[number]])


def test_references_with_thoughts_need_no_caution(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = save_subwords(tmp_path, QWEN_3, **FAMILIES["qwen-3"].options)
    prompts = [replace(chat(USER), reference="<think>\nHm.\n</think>\n\n42")]
    check_boundaries(tokenizer, prompts, prompts)
    assert not caplog.records


def test_another_header_than_that_of_earlier_answers_is_a_caution(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = save_subwords(tmp_path, CHATML.replace("assistant\n'", "model\n'"))
    check_boundaries(tokenizer, [chat(USER), chat(USER, ("assistant", "x"), USER)], [])
    (record,) = caplog.records
    assert "model" in record.getMessage() and "assistant" in record.getMessage()


def test_the_middle_of_a_long_text_costs_nothing(tmp_path: Path) -> None:
    tokenizer = save_subwords(tmp_path, CHATML, adds=("<|im_end|>",))
    long = text("a " * 10**6 + "Answer:")
    with pytest.raises(ConfigError, match=r"a Answer:<\|im_end\|> Paris"):
        check_boundaries(tokenizer, [long] * 5, [])


def test_one_beginning_of_sequence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES["llama-3"]
    twice = save_subwords(tmp_path / "a", "{{ bos_token }}" + LLAMA_3, **family.options)
    with pytest.raises(ConfigError, match=r"begins with <\|begin_of_text\|> twice"):
        check_boundaries(twice, [chat(USER)], [])
    begin = "<|begin_of_text|>"
    with pytest.raises(ConfigError, match=r"begins with <\|begin_of_text\|> twice"):
        check_boundaries(twice, [text(f"{begin}{begin}Question:")], [])
    check_boundaries(twice, [text(f"{begin}Question:"), text("Question:")], [])
    assert not caplog.records
    none = save_subwords(tmp_path / "b", CHATML, **family.options)
    check_boundaries(none, [chat(USER)], [])
    shown = "begins plain text with '<|begin_of_text|><|im_st"
    assert shown in caplog.text
    with pytest.raises(
        ConfigError, match=r"begin the template with \{\{ bos_token \}\}"
    ) as refused:
        check_boundaries(none, [chat(USER)], [], needs_bos=True)
    assert shown in str(refused.value)
    check_boundaries(load(tmp_path / "c", family), [chat(USER)], [], needs_bos=True)


@pytest.mark.parametrize("written", ["Question: x Answer:", "Hello</s>"])
def test_an_end_that_the_tokenizer_puts_behind_a_prompt_is_refused(
    tmp_path: Path, written: str
) -> None:
    options = {"special": ("<s>", "</s>"), "bos": "<s>", "eos": "</s>", "kind": metaspace}
    ending = save_subwords(tmp_path / "a", CHATML, **options, adds=("<s>", "</s>"))
    with pytest.raises(ConfigError, match=r"would train on .*</s> Paris.*one text is .*42</s>'"):
        check_boundaries(ending, [text(written)], [])
    check_boundaries(ending, [chat(USER)], [])
    plain = save_subwords(tmp_path / "b", CHATML, **options, adds=("<s>",))
    check_boundaries(plain, [text(written)], [])


def test_a_space_at_the_end_is_a_caution(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = save_subwords(tmp_path, CHATML.replace("assistant\n'", "assistant: '"))
    fine = [text("Question: x Answer:"), text("Answer:\n")]
    check_boundaries(tokenizer, fine, fine)
    assert not caplog.records
    check_boundaries(tokenizer, [*fine, text("Question: Answer: ", name="odd"), text("x ")], [])
    assert "2 prompts end in tokens" in caplog.text and "(first: prompt odd)" in caplog.text
    assert "':', 'Ġ', 'Paris'" in caplog.text and "':', 'ĠParis'" in caplog.text
    caplog.clear()
    check_boundaries(tokenizer, [chat(USER)], [])
    assert "out of the template's generation prompt" in caplog.text


def test_special_tokens_in_raw_text_are_a_caution(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = save_subwords(tmp_path, CHATML)
    rendered = text("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", name="rendered")
    check_boundaries(tokenizer, [text("1+1="), rendered, chat(("user", "<|im_end|>"))], [])
    assert "1 text prompts hold special tokens (first: prompt rendered with" in caplog.text


def test_many_problems_are_counted(tmp_path: Path) -> None:
    tokenizer = save_subwords(tmp_path, CHATML.replace("m['content']", "m['content'].split()[0]"))
    asked = [chat(("user", f"{i} words"), name=f"p{i}") for i in range(11)]
    with pytest.raises(ConfigError, match=r"… 11 problems in all") as caught:
        check_boundaries(tokenizer, asked, [])
    assert str(caught.value).count("prompt p") == 8


def test_arguments_that_the_template_does_not_read_are_refused(tmp_path: Path) -> None:
    save_subwords(tmp_path, QWEN_3)
    student = StudentConfig(
        model=str(tmp_path), initialization="random", template_arguments={"enable_thinkin": False}
    )
    with pytest.raises(ConfigError, match="reads no variable enable_thinkin: correct the name"):
        check_template(config_of(student))
    day = {"template_arguments": {}, "template_date": "2026-11-30"}
    with pytest.raises(ConfigError, match=r"does not write the day of today \(strftime_now\)"):
        student = StudentConfig(model=str(tmp_path), initialization="random", **day)
        check_template(config_of(student))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("messages", 1, "is set for every prompt"),
        ("bos_token", "<s>", "is set for every prompt"),
        ("strftime_now", 1, "set template_date"),
        ("not a name", 1, "cannot be a variable"),
        ("if", 1, "cannot be a variable"),
        ("date_string", date(2026, 11, 30), "put 2026-11-30 between quotes"),
        ("top", float("nan"), "which JSON does not know"),
        ("of", {"a": {1, 2}}, "not a valid JSON value"),
    ],
)
def test_arguments_that_cannot_act_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentConfig(model="m", initialization="random", template_arguments={name: value})
