"""Dialects of servers: names of ends, content in parts, thoughts apart, fields of requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig, RequestChanges
from pipeline.errors import ConfigError, TeacherError
from pipeline.layout import Layout
from pipeline.records import AnswerEnds, Prompt
from pipeline.sequences import read_sequences
from pipeline.synthesis.answered_shards import AnsweredShard
from pipeline.synthesis.outcomes import outcome_summary
from teachers.endpoint.answers import ENDS, end_named
from teachers.endpoint.teacher import EndpointTeacher
from teachers.engine.arguments import check_request_changes
from teachers.protocol import EndpointSpec, GeneratedAnswer
from teachers.tasks.answer import AnswerTask
from tests.support.endpoints import Json, Response, at_once, chat_reply, loopback
from tests.support.tokenizers_for_tests import save_byte_tokenizer

QUESTION = Prompt("p", "d", "train", messages=({"role": "user", "content": "6 times 7?"},))
SAMPLING = {"max_tokens": 90, "temperature": 0.5, "seed": 7}
LONE_SURROGATE = (
    rb'{"choices": [{"message": {"content": "cut \ud83d"}, "finish_reason": "length"}]}'
)


@pytest.fixture
def student(tmp_path: Path) -> StudentConfig:
    save_byte_tokenizer(tmp_path / "student")
    return StudentConfig(model=str(tmp_path / "student"), initialization="random")


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {"url": url, "model": "m", "api": "openai", "scores": False, "max_retries": 2}
    return EndpointConfig.model_validate(values | settings)


def answered(
    student: StudentConfig, reply: Response, prompt_ids: tuple[int, ...] = (3,), **settings: Any
) -> tuple[GeneratedAnswer, str, list[Json]]:
    """The answer to one request, its text without the end, and the bodies of all requests."""
    with loopback(lambda path, body: reply) as server:

        async def run() -> GeneratedAnswer:
            spec = EndpointSpec(endpoint(server.url, **settings), student, 64)
            teacher = await EndpointTeacher.start(spec, at_once)
            try:
                (answer,) = await teacher.generate([*prompt_ids], SAMPLING, 1, QUESTION)
                return answer
            finally:
                teacher.shutdown()
                await asyncio.sleep(0)

        answer = asyncio.run(run())
    tokenizer = save_byte_tokenizer(Path(student.model))
    has_end = answer.token_ids[-1:] == [tokenizer.eos_token_id]
    text = tokenizer.decode(answer.token_ids[: -1 if has_end else None])
    assert has_end == (answer.finish_reason == "stop")
    return answer, str(text), [body for _, body, _ in server.requests]


def message(content: Any, finish_reason: str | None = "stop", **others: Any) -> Response:
    inner = {"role": "assistant", "content": content} | others
    return Response.of({"choices": [{"message": inner, "finish_reason": finish_reason}]})


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        *((name, "stop") for name in ("stop", "eos", "eos_token", "end_turn", "STOP")),
        *((name, "stop") for name in ("stop_sequence", "FINISH_REASON_STOP", "COMPLETE")),
        *((name, "length") for name in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
        *((name, "content_filter") for name in ("content_filter", "SAFETY", "refusal")),
        ("content_filter: RECITATION", "content_filter"),
        *((name, "unknown") for name in ("tool_calls", "because", "", None)),
    ],
)
def test_ends_have_many_names(student: StudentConfig, reason: str | None, end: str) -> None:
    answer, text, bodies = answered(student, message("The answer", reason))
    assert (answer.finish_reason, text, len(bodies)) == (end, "The answer", 1)


def test_each_name_of_an_end_stands_for_one_end() -> None:
    names = [name for group in ENDS.values() for name in group.split()]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)
    assert {end_named(name) for name in names} == set(ENDS)


def test_an_answer_that_the_server_broke_off_is_asked_again(student: StudentConfig) -> None:
    with pytest.raises(TeacherError, match="ended by 'insufficient_system_resource'"):
        answered(student, message("The ans", "insufficient_system_resource"))


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "6*7"}]}
REASONING = {"type": "reasoning", "text": "6*7"}
SUMMARY = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "6*7"}]}
TEXT = {"type": "text", "text": "42"}


@pytest.mark.parametrize(
    ("reply", "text", "thoughts"),
    [
        (message([TEXT]), "42", ""),
        (message([{"type": "output_text", "text": "4"}, "2"]), "42", ""),
        (message([THINKING, TEXT]), "42", "6*7"),
        (message([REASONING, TEXT]), "42", "6*7"),
        (message([SUMMARY, {"text": "42"}]), "42", "6*7"),
        (message("\n\n42", reasoning_content="6*7"), "42", "6*7"),
        (message("42", reasoning="6*7\n"), "42", "6*7"),
        (message("\n42"), "\n42", ""),
        (message([{"type": "refusal", "refusal": "No."}]), "No.", ""),
        (message(None, refusal="No."), "No.", ""),
        (message(None, reasoning_content="6*"), "", "6*"),
    ],
)
def test_content_in_parts_is_joined_and_thoughts_are_dropped_or_kept(
    student: StudentConfig, reply: Response, text: str, thoughts: str
) -> None:
    answer, dropped, _ = answered(student, reply)
    assert dropped == text and answer.had_thoughts == bool(thoughts)
    _, kept, _ = answered(student, reply, reasoning="keep")
    # Thoughts without an answer are no answer.
    assert kept == (f"<think>\n{thoughts}\n</think>\n\n{text}" if thoughts and text else text)


def test_thoughts_inside_of_an_answer_are_not_put_there_twice(student: StudentConfig) -> None:
    tokenizer = save_byte_tokenizer(Path(student.model))
    opened = tuple(tokenizer("assistant\n<think>\n", add_special_tokens=False)["input_ids"])
    for content in ("<think>\neasy\n</think>\n\n4", "easy\n</think>\n\n4"):
        _, kept, _ = answered(student, message(content), opened, reasoning="keep")
        assert kept == "easy\n</think>\n\n4"
    _, cut, _ = answered(
        student, message(None, "length", reasoning="6 times"), opened, reasoning="keep"
    )
    assert cut == "6 times"


def test_escapes_in_code_are_not_half_characters(student: StudentConfig) -> None:
    code = "re.compile('[\\ud800-\\udfff]')"
    assert answered(student, message(code))[1] == code


def test_a_thought_that_the_template_opens_is_not_opened_twice(student: StudentConfig) -> None:
    tokenizer = save_byte_tokenizer(Path(student.model))
    opened = tuple(tokenizer("assistant\n<think>\n", add_special_tokens=False)["input_ids"])
    reply = message("42", reasoning_content="6*7")
    _, kept, _ = answered(student, reply, opened, reasoning="keep")
    assert kept == "6*7\n</think>\n\n42"


def test_half_a_character_at_the_end_costs_no_answer(student: StudentConfig) -> None:
    answer, text, bodies = answered(student, Response(LONE_SURROGATE))
    assert text == "cut \ufffd" and answer.finish_reason == "length" and len(bodies) == 1
    whole = Response(rb'{"choices": [{"message": {"content": "\ud83d\ude00"}}]}')
    assert answered(student, whole)[1] == "\U0001f600"


def test_fields_of_requests_are_renamed_left_out_and_added(student: StudentConfig) -> None:
    changes = {
        "rename": {"max_tokens": "max_completion_tokens"},
        "omit": ["seed", "temperature"],
        "extra": {"reasoning_effort": "low"},
    }
    _, _, (body,) = answered(student, chat_reply("42"), request=changes)
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "6 times 7?"}],
        "max_completion_tokens": 90,
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"omit": ["messages"]}, "belong to every request"),
        ({"rename": {"model": "deployment"}}, "belong to every request"),
        ({"rename": {"seed": "s"}, "omit": ["seed"]}, "both renamed and omitted"),
        ({"extra": {"n": 4}}, "extra may not hold"),
        ({"extra": {"max_tokens": 4}}, "sampling parameters stand in `sampling`"),
        ({"rename": {"max_tokens": "limit"}, "extra": {"limit": 4}}, "set twice"),
    ],
)
def test_changes_that_leave_no_request_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RequestChanges.model_validate(changes)


def test_a_field_that_no_request_has_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match=r"request\.omit.*'sead'; did you mean 'seed'\?"):
        check_request_changes(RequestChanges(omit=["sead"]), "openai")
    with pytest.raises(ConfigError, match=r"request\.rename.*'top_k'"):
        check_request_changes(RequestChanges(rename={"top_k": "k"}), "openai")
    check_request_changes(RequestChanges(rename={"top_k": "k"}), "vllm")


def test_answers_of_unknown_ends_are_kept_without_an_end_and_counted(
    student: StudentConfig, tmp_path: Path
) -> None:
    replies = {
        "odd": message("kept", "because"),
        "thought": message("42", reasoning="6*7"),
        "filtered": message("", "SAFETY"),
        "tool": message(None, "tool_calls"),
    }
    prompts = [replace(QUESTION, prompt_id=name, messages=chat(name)) for name in replies]
    task = AnswerTask(
        layout=Layout(str(tmp_path / "root"), "run"),
        author="writer",
        identity_digest="recipe",
        prompts=tuple(prompts),
        student=student,
        sampling={"max_tokens": 90},
        samples_per_prompt=1,
        max_sequence_tokens=None,
        seed=0,
        ends=AnswerEnds(1, 1),
    )

    def respond(path: str, body: Json) -> Response:
        return replies[body["messages"][-1]["content"]] if body else Response.of({}, 404)

    with loopback(respond) as server:

        async def run() -> AnsweredShard:
            spec = EndpointSpec(endpoint(server.url), student, 64)
            teacher = await EndpointTeacher.start(spec, at_once)
            try:
                return await task.run(teacher)
            finally:
                teacher.shutdown()
                await asyncio.sleep(0)

        shard = asyncio.run(run())
    kept = {s.prompt_id: s for s in read_sequences(f"{task.layout.root}/{shard.shard}")}
    assert kept.keys() == {"odd", "thought"} and kept["odd"].finish_reason == "unknown"
    eos = save_byte_tokenizer(Path(student.model)).eos_token_id
    assert [kept[name].input_ids[-1] == eos for name in ("odd", "thought")] == [False, True]
    total: dict[str, int] = {}
    for counts in shard.counts.values():
        for name, number in counts.items():
            total[name] = total.get(name, 0) + number
    assert total.pop("generated_tokens") > 0
    assert total == {
        "answers": 4, "kept": 2, "unknown_end": 1, "thoughts": 1, "withheld": 1, "empty": 1
    }  # fmt: skip
    assert outcome_summary({"answer by writer": total}) == (
        "answers kept: answer by writer 2 of 4; dropped: 1 withheld by the server's content "
        "filter, 1 empty; 1 answers ended for a reason that is not known, and kept without an end "
        "of sequence; 1 answers came with reasoning apart (endpoint.reasoning)"
    )


def chat(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)
