"""Requests for new prompts, and the use of good, bad and useless replies."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from pipeline.config.synthesis import Recipe, Writing
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from pipeline.synthesis.rewriting import (
    REQUEST_MAKERS,
    PromptRequest,
    fill,
    make_requests,
    new_prompt,
    read_reply,
    templates_of,
)
from tests.support.replies import BAD_REPLIES, GOOD_REPLIES

PARSER: TypeAdapter[Any] = TypeAdapter(Recipe)
SAMPLING = {"max_tokens": 200}
OLD = "Ann has 3 apples and buys 4 more. How many has she?"


def recipe(**settings: Any) -> Any:
    return PARSER.validate_python({"teacher": "t", "sampling": SAMPLING} | settings)


def chat(text: str, **others: Any) -> Prompt:
    values = {"prompt_id": f"id-{text}", "domain": "d", "split": "train"} | others
    return Prompt(messages=({"role": "user", "content": text},), **values)


def request(many: bool = False) -> PromptRequest:
    return PromptRequest(chat("asked"), chat(OLD), many)


def test_requests_show_the_prompt_and_forbid_the_answer() -> None:
    pool = [chat(OLD), chat("hidden", split="holdout"), chat("unseen", split="validation")]
    (first, second) = make_requests(recipe(type="paraphrase", versions=2), pool, 1)
    assert first.source == second.source == pool[0]
    assert first.prompt.prompt_id != second.prompt.prompt_id, "two versions are two requests"
    assert first.prompt.messages == second.prompt.messages and first.prompt.split == "train"
    asked = first.prompt.words
    assert OLD in asked and "{prompt}" not in asked and "Do not answer it" in asked
    assert "<prompt>" in asked


def test_each_way_of_evolving_asks_for_something_else() -> None:
    evolve = recipe(type="evolve", ways=["deeper", "broader", "constraints"])
    texts = [each.prompt.words for each in make_requests(evolve, [chat(OLD)], 1)]
    assert "harder" in texts[0] and "rarer" in texts[1] and "demands" in texts[2]
    assert all(OLD in text for text in texts)


def test_self_instruct_draws_seeds_of_one_domain_by_the_seed() -> None:
    pool = [chat(f"question {i}", domain="de"[i % 2]) for i in range(20)]
    settings = recipe(type="self_instruct", requests_per_domain=3, seeds_per_request=4)
    requests = make_requests(settings, pool, 1)
    assert len(requests) == 6 and all(each.many for each in requests)
    for each in requests:
        shown = [p for p in pool if f"<prompt>{p.words}</prompt>" in each.prompt.words]
        assert len(shown) == 4 and {p.domain for p in shown} == {each.prompt.domain}
    assert make_requests(settings, pool, 1) == requests != make_requests(settings, pool, 2)
    with pytest.raises(ConfigError, match="domain 'd' has 3 train prompts"):
        make_requests(settings, pool[:6], 1)


def test_a_template_is_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Anders bitte: {prompt}\n")
    settings = recipe(type="paraphrase", template=str(path))
    (only,) = make_requests(settings, [chat("{prompt} and {examples}")], 1)
    assert only.prompt.words == "Anders bitte: {prompt} and {examples}"
    path.write_text("no place for it")
    with pytest.raises(ConfigError, match=rf"{path} must hold {{prompt}}"):
        make_requests(settings, [chat(OLD)], 1)
    with pytest.raises(ConfigError, match="does not exist"):
        make_requests(recipe(type="paraphrase", template=str(tmp_path / "no.txt")), [], 1)
    path.write_bytes(b"caf\xe9 {prompt}")  # as Latin-1
    with pytest.raises(ConfigError, match=rf"{path} is not UTF-8"):
        make_requests(recipe(type="paraphrase", template=str(path)), [chat(OLD)], 1)


def test_every_recipe_that_writes_has_a_function_and_shipped_templates() -> None:
    kinds = [kind for kind in get_args(get_args(Recipe)[0]) if issubclass(kind, Writing)]
    assert {get_args(kind.model_fields["type"].annotation)[0] for kind in kinds} == set(
        REQUEST_MAKERS
    )
    settings = {
        "paraphrase": {},
        "evolve": {"ways": ["deeper", "broader", "constraints"]},
        "self_instruct": {"requests_per_domain": 1, "seeds_per_request": 1},
    }
    for name in REQUEST_MAKERS:
        templates = templates_of(recipe(type=name, **settings[name]))
        assert templates and all("<prompt>" in text for text in templates.values())


def test_values_are_never_read_as_templates() -> None:
    assert fill("{a}/{b}", a="{b}", b="{a}") == "{b}/{a}"


def test_prompts_of_several_turns_are_left_alone() -> None:
    turns = ("user", "assistant", "user")
    messages = tuple({"role": role, "content": role} for role in turns)
    several = Prompt("p", "d", "train", messages=messages)
    assert make_requests(recipe(type="paraphrase"), [several], 1) == []


@pytest.mark.parametrize(("reply", "new"), GOOD_REPLIES.values(), ids=GOOD_REPLIES)
def test_good_replies_give_prompts(reply: str, new: tuple[str, ...]) -> None:
    assert read_reply(request(many=len(new) > 1), reply, "stop").texts == new


@pytest.mark.parametrize(("reply", "finish", "reason"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_bad_replies_give_a_reason(reply: str, finish: str, reason: str) -> None:
    found = read_reply(request(), reply, finish)
    assert (found.texts, found.reason) == ((), reason)


def test_several_prompts_are_only_welcome_where_they_were_asked_for() -> None:
    reply = f"<prompt>one</prompt>\n<prompt>two</prompt><prompt>One</prompt><prompt>{OLD}</prompt>"
    assert read_reply(request(), reply, "stop").reason == "malformed"
    assert read_reply(request(many=True), reply, "stop").texts == ("one", "two")


def test_a_new_prompt_keeps_form_domain_and_system_messages() -> None:
    system = {"role": "system", "content": "Be brief."}
    source = Prompt("p", "d", "train", messages=(system, {"role": "user", "content": "old"}))
    found = new_prompt(source, "new")
    assert found.messages == (system, {"role": "user", "content": "new"})
    assert (found.domain, found.split, found.reference) == ("d", "train", None)
    assert found.prompt_id == new_prompt(source, "new").prompt_id
    assert found.prompt_id != new_prompt(source, "newer").prompt_id
    raw = new_prompt(Prompt("q", "e", "train", text="1+1="), "2+2=")
    assert (raw.text, raw.messages, raw.domain) == ("2+2=", None, "e")
