"""A teacher behind an endpoint, against servers on loopback: rows, answers, canaries, refusals."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pipeline import storage
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, DistillationError, TeacherError
from pipeline.records import Prompt
from teachers.endpoint.teacher import EndpointTeacher
from teachers.protocol import EndpointSpec, GeneratedAnswer, ScoringRequest
from teachers.tasks.control import ControlTask
from teachers.tokenizing import answer_text
from tests.support.endpoints import (
    DROPPED,
    MAX_MODEL_LEN,
    SERVED,
    FakeVllm,
    Json,
    Response,
    at_once,
    by_text,
    chat_reply,
    loopback,
)
from tests.support.fabricated import VOCABULARY, FakeTeacher
from tests.support.tokenizers_for_tests import SPECIAL, save_byte_tokenizer, save_tokenizer

T = TypeVar("T")
WIDTH = 6
IDS = [4, 9, 3, 17, 5, 5, 11, 2]
CHAT = Prompt("p", "d", "train", messages=({"role": "user", "content": "hello"},))
SAMPLING = {"max_tokens": 9, "temperature": 0.5, "seed": 7}


@pytest.fixture
def spec(tmp_path: Path) -> EndpointSpec:
    """Without a url; its student has as many tokens as the fake model."""
    save_tokenizer(tmp_path / "student", tokens=SPECIAL + list("abcdefghijklmnop"))
    return EndpointSpec(
        endpoint=endpoint("http://nowhere/v1"),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        min_model_len=64,
        num_logprobs=WIDTH,
        eos_token_ids=(1,),
        canary_path=str(tmp_path / "canary.json"),
    )


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {"url": url, "model": SERVED, "api": "vllm", "tokenizer": "t", "max_retries": 1}
    return EndpointConfig.model_validate(values | {"dtype": "float32"} | settings)


def text_spec(spec: EndpointSpec, url: str) -> EndpointSpec:
    save_byte_tokenizer(Path(spec.student.model))
    text = endpoint(url, api="openai", scores=False, tokenizer=None)
    return replace(spec, endpoint=text, num_logprobs=0, canary_path=None)


def asked(
    spec: EndpointSpec, request: Callable[[EndpointTeacher], Coroutine[Any, Any, T]]
) -> tuple[T, EndpointTeacher]:
    """Result of one request to a teacher that is started for it, and the teacher."""

    async def run() -> tuple[T, EndpointTeacher]:
        teacher = await EndpointTeacher.start(spec, at_once)
        try:
            return await request(teacher), teacher
        finally:
            teacher.shutdown()
            await asyncio.sleep(0)

    return asyncio.run(run())


def at(spec: EndpointSpec, url: str, **settings: Any) -> EndpointSpec:
    return replace(spec, endpoint=endpoint(url, **settings))


async def nothing(teacher: EndpointTeacher) -> None:
    """Only starts."""


def test_rows_are_those_of_the_model(spec: EndpointSpec) -> None:
    with loopback(FakeVllm()) as server:
        rows, teacher = asked(at(spec, server.url), lambda t: t.score(ScoringRequest(IDS, 3)))
    expected = asyncio.run(FakeTeacher("model").score(ScoringRequest(IDS, 3)))
    np.testing.assert_array_equal(rows.token_ids, expected.token_ids[:, :WIDTH])
    np.testing.assert_array_equal(rows.logprobs, expected.logprobs[:, :WIDTH])
    np.testing.assert_array_equal(rows.gold_logprobs, expected.gold_logprobs)
    assert (rows.token_ids.dtype, rows.logprobs.dtype) == (np.int32, np.float32)
    body = server.bodies("/v1/completions")[-1]
    assert (body["prompt"], body["prompt_logprobs"], body["model"]) == (IDS, WIDTH, SERVED)
    metadata = teacher.metadata()
    assert metadata["engine"] == "endpoint" and metadata["engine_version"] == "0.32.0"
    assert metadata["max_logprobs"] == 20 and metadata["max_model_len"] == MAX_MODEL_LEN
    assert "at most 20 log-probabilities" in metadata["capture_reason"]


def test_what_the_model_masks_has_no_probability(spec: EndpointSpec) -> None:
    class Masking(FakeVllm):
        def prompt_logprobs(self, prompt: list[int], width: int) -> list[Any]:
            positions = super().prompt_logprobs(prompt, width)
            for position in positions[1:]:
                last = min(position.values(), key=lambda entry: entry["logprob"])
                last["logprob"] = -9999.0
            return positions

    with loopback(Masking()) as server:
        rows, _ = asked(at(spec, server.url), lambda t: t.score(ScoringRequest(IDS, 1)))
    is_gold_masked = np.isneginf(rows.gold_logprobs)
    assert (np.isneginf(rows.logprobs[:, -1]) | is_gold_masked).all() and is_gold_masked.any()
    assert np.isfinite(rows.logprobs[:, :-1]).all()


def altered(change: Callable[[Json], object]) -> Callable[[str, Json], Response]:
    """A fake server whose choices are changed, except those of the canary."""
    fake = FakeVllm()

    def respond(path: str, body: Json) -> Response:
        response = fake(path, body)
        if body.get("prompt") != IDS:
            return response
        value = json.loads(response.content or b"")
        change(value["choices"][0])
        return Response.of(value)

    return respond


def _one_less(choice: Json) -> None:
    for _ in range(2):
        choice["prompt_logprobs"][4].popitem()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_less, "log-probabilities at a position where 6 were asked for.*--max-logprobs 6"),
        (lambda c: c["prompt_logprobs"].pop(), "of 7 positions for 8 tokens"),
        (lambda c: c.pop("prompt_logprobs"), "of 0 positions for 8 tokens"),
        (
            lambda c: c["prompt_logprobs"][4].__setitem__(
                "19", c["prompt_logprobs"][4].pop(str(IDS[4]))
            ),
            "without the sequence's own token",
        ),
        (
            lambda c: [entry.update(logprob=0.0) for entry in c["prompt_logprobs"][4].values()],
            "--logprobs-mode raw_logprobs",
        ),
        (lambda c: c["prompt_token_ids"].pop(0), "read 7 tokens where 8 were sent"),
        (
            lambda c: c["prompt_logprobs"][2].update(x={"logprob": 0}),
            "reply is not as expected",
        ),
    ],
    ids=["fewer", "short", "none", "another token", "logits", "cut prompt", "no token id"],
)
def test_rows_that_are_not_what_was_asked_for_are_refused(
    spec: EndpointSpec, change: Callable[[Json], object], message: str
) -> None:
    with loopback(altered(change)) as server, pytest.raises(TeacherError, match=message):
        asked(at(spec, server.url), lambda t: t.score(ScoringRequest(IDS, 1)))


def test_answers_are_token_ids_and_each_sample_has_its_seed(spec: EndpointSpec) -> None:
    with loopback(FakeVllm(answer=lambda ids: ([len(ids), 1], "stop"))) as server:
        answers, _ = asked(
            at(spec, server.url), lambda t: t.generate(IDS, SAMPLING | {"stop": None}, 3)
        )
    assert [(each.token_ids, each.finish_reason) for each in answers] == [([8, 1], "stop")] * 3
    bodies = server.bodies("/v1/completions")[-3:]
    assert sorted(body["seed"] for body in bodies) == [7, 8, 9]
    for body in bodies:
        assert body["prompt"] == IDS and body["return_token_ids"] is True
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (9, 0.5, 1.0)
        assert body["stop_token_ids"] == [1] and "stop" not in body


def test_what_the_server_would_cut_is_refused(spec: EndpointSpec) -> None:
    """It lowers `max_tokens` without a word, and the answer would count as cut."""
    with loopback(FakeVllm()) as server:
        short = at(spec, server.url, max_model_len=64)
        asked(short, lambda t: t.generate(IDS, {"max_tokens": 56}, 1))
        with pytest.raises(TeacherError, match="8 tokens and room for 57 exceed"):
            asked(short, lambda t: t.generate(IDS, {"max_tokens": 57}, 1))
        with pytest.raises(TeacherError, match="64 tokens and room for 1 exceed"):
            asked(short, lambda t: t.score(ScoringRequest([4] * 64, 1)))


def test_a_server_without_token_ids_is_refused_with_what_to_do(spec: EndpointSpec) -> None:
    with loopback(altered(lambda c: c.pop("token_ids"))) as server:
        refused = pytest.raises(ConfigError, match="`api: openai` and `scores: false`")
        with refused:
            asked(at(spec, server.url), lambda t: t.generate(IDS, SAMPLING, 1))


@pytest.mark.parametrize("reason", [None, "abort", "error"])
def test_an_answer_that_does_not_end_properly_is_refused(
    spec: EndpointSpec, reason: str | None
) -> None:
    changed = altered(lambda c: c.update(finish_reason=reason))
    with loopback(changed) as server, pytest.raises(TeacherError, match=f"ended by {reason!r}"):
        asked(at(spec, server.url), lambda t: t.generate(IDS, SAMPLING, 1))


def test_the_first_canary_is_kept_and_every_start_is_held_to_it(spec: EndpointSpec) -> None:
    with loopback(FakeVllm()) as server:
        _, teacher = asked(at(spec, server.url), nothing)
        canary = teacher.canary()
        assert canary is not None and canary.gold_logprobs.shape == (32,)
        assert storage.exists(spec.canary_path or "")
        # A narrower capture and a shorter context say the same; so does another address.
        asked(replace(at(spec, server.url), num_logprobs=2), nothing)
        asked(replace(at(spec, server.url, max_model_len=20), min_model_len=20), nothing)
    with loopback(FakeVllm()) as server:
        asked(at(spec, server.url), nothing)
    with loopback(FakeVllm(salt="other weights")) as server:
        with pytest.raises(
            TeacherError, match=r"mean difference .* nats.*tolerance 0\.0\d+.*model_identity"
        ):
            asked(at(spec, server.url), nothing)
        (_, body, _) = server.requests[-1]
        assert len(body["prompt"]) == 33 and max(body["prompt"]) < VOCABULARY


@pytest.mark.parametrize(("num_logprobs", "asked_for"), [(0, "top_p"), (WIDTH, "prompt_logprobs")])
def test_a_control_asks_it_for_what_it_was_started_for(
    spec: EndpointSpec, num_logprobs: int, asked_for: str
) -> None:
    """One that scores in another stage has a canary here too, and may only write."""
    with loopback(FakeVllm()) as server:
        writing = replace(at(spec, server.url), num_logprobs=num_logprobs)
        _, teacher = asked(writing, ControlTask().run)
        assert teacher.canary() is not None
        assert asked_for in server.bodies("/v1/completions")[-1]


def test_a_server_that_gives_too_few_log_probabilities_is_refused_at_start(
    spec: EndpointSpec,
) -> None:
    fake = FakeVllm()

    def at_most_five(path: str, body: Json) -> Response:
        if body.get("prompt_logprobs", 0) > 5:
            return Response.of({"error": {"message": "greater than max allowed: 5"}}, 400)
        return fake(path, body)

    with loopback(at_most_five) as server, pytest.raises(TeacherError, match="max allowed: 5"):
        asked(at(spec, server.url), nothing)


@pytest.mark.parametrize(
    ("change", "settings", "kind", "message"),
    [
        ({}, {"model": "another"}, ConfigError, r"does not serve 'another', but \['served'\]"),
        ({"min_model_len": 513}, {}, TeacherError, "holds 512 tokens.*has 513"),
        ({"min_model_len": 99}, {"max_model_len": 98}, TeacherError, "holds 98 tokens"),
    ],
)
def test_a_server_that_cannot_do_it_is_refused_at_start(
    spec: EndpointSpec,
    change: dict[str, Any],
    settings: dict[str, Any],
    kind: type[DistillationError],
    message: str,
) -> None:
    with loopback(FakeVllm()) as server, pytest.raises(kind, match=message):
        asked(replace(at(spec, server.url, **settings), **change), nothing)


def test_a_server_that_is_not_there_ends_the_run_and_not_one_actor_after_another(
    spec: EndpointSpec,
) -> None:
    with loopback(lambda path, body: DROPPED) as server, pytest.raises(TeacherError) as refused:
        asked(at(spec, server.url), nothing)
    assert type(refused.value) is TeacherError and "run it again" in str(refused.value)


def test_so_does_a_text_api_that_is_not_there(spec: EndpointSpec) -> None:
    with loopback(lambda path, body: DROPPED) as server:
        refused = pytest.raises(TeacherError, match=r"/v1/models.*given up after 2 tries.*again")
        with refused as error:
            asked(text_spec(spec, server.url), nothing)
    assert type(error.value) is TeacherError


def test_a_proxy_that_hides_the_version_is_fine(spec: EndpointSpec) -> None:
    fake = FakeVllm()
    missing = Response.of({"detail": "Not Found"}, 404)
    with loopback(lambda p, b: missing if p == "/version" else fake(p, b)) as server:
        _, teacher = asked(at(spec, server.url), nothing)
    assert teacher.metadata()["engine_version"] is None


def said(
    spec: EndpointSpec, reply: Response, prompt: Prompt = CHAT
) -> tuple[GeneratedAnswer, list[tuple[str, Json, dict[str, str]]]]:
    with loopback(lambda path, body: reply) as server:
        (answer,), _ = asked(
            text_spec(spec, server.url), lambda t: t.generate([3], SAMPLING, 1, prompt)
        )
    return answer, server.requests


def test_text_is_exchanged_in_chat_form_and_tokenized_by_the_student(spec: EndpointSpec) -> None:
    answer, requests = said(spec, chat_reply("héllo"))
    ((path, body, _),) = requests
    assert path == "/v1/chat/completions" and body == SAMPLING | {
        "model": SERVED,
        "messages": [{"role": "user", "content": "hello"}],
    }
    tokenizer = save_byte_tokenizer(Path(spec.student.model))
    assert tokenizer.decode(answer.token_ids[:-1]) == "héllo"
    assert answer.token_ids[-1] == tokenizer.eos_token_id and answer.finish_reason == "stop"


def test_template_arguments_are_sent_where_the_config_names_them(spec: EndpointSpec) -> None:
    with loopback(lambda path, body: chat_reply("y")) as server:
        text = text_spec(spec, server.url)
        for arguments in ({}, {"enable_thinking": False}):
            named = text.endpoint.model_copy(update={"template_arguments": arguments})
            asked(replace(text, endpoint=named), lambda t: t.generate([3], SAMPLING, 1, CHAT))
    bodies = server.bodies("/v1/chat/completions")
    assert "chat_template_kwargs" not in bodies[0]
    assert bodies[1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_special_tokens_in_a_reply_are_text(spec: EndpointSpec) -> None:
    answer, _ = said(spec, chat_reply("the <eos> of <user>"))
    tokenizer = save_byte_tokenizer(Path(spec.student.model))
    assert answer.token_ids.count(tokenizer.eos_token_id) == 1
    assert answer_text(tokenizer, answer.token_ids) == "the <eos> of <user>"


def test_raw_text_is_continued_as_text(spec: EndpointSpec) -> None:
    reply = Response.of({"choices": [{"text": " a time", "finish_reason": "length"}]})
    answer, ((path, body, _),) = said(spec, reply, Prompt("p", "d", "train", text="Once upon"))
    assert (path, body["prompt"]) == ("/v1/completions", "Once upon")
    tokenizer = save_byte_tokenizer(Path(spec.student.model))
    assert tokenizer.decode(answer.token_ids) == " a time", "cut: no end of sequence"


@pytest.mark.parametrize(
    ("reply", "text", "finish"),
    [
        (chat_reply(None, refusal="I can't help."), "I can't help.", "content_filter"),
        (chat_reply(None, "content_filter"), "", "content_filter"),
        (chat_reply("", "length"), "", "length"),
        (chat_reply("a<eos>b<user>c"), "a<eos>b<user>c", "stop"),
    ],
    ids=["refusal", "filtered", "nothing", "special tokens in the text"],
)
def test_odd_replies_are_text_with_a_reason(
    spec: EndpointSpec, reply: Response, text: str, finish: str
) -> None:
    answer, _ = said(spec, reply)
    tokenizer = save_byte_tokenizer(Path(spec.student.model))
    body = answer.token_ids[: -1 if finish == "stop" else None]
    assert tokenizer.decode(body) == text and answer.finish_reason == finish
    assert not set(body) & set(tokenizer.all_special_ids)


def test_text_answers_are_asked_one_by_one_with_their_seeds(spec: EndpointSpec) -> None:
    with loopback(by_text(lambda text: chat_reply("yes"))) as server:
        answers, teacher = asked(
            text_spec(spec, server.url), lambda t: t.generate([3], SAMPLING, 4, CHAT)
        )
    assert len(answers) == 4 and teacher.canary() is None
    assert sorted(body["seed"] for _, body, _ in server.requests) == [7, 8, 9, 10]
