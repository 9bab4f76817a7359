"""Recipes and a judge with a text API on loopback that replays replies of instruction-tuned models.

The tests check the prompts that are sent, the use of good, bad and withheld replies, and that the
key is written nowhere.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.stages.preflight import check_filters
from jobs.stages.prepare import filter_identities, synthesis_identities
from jobs.stages.synthesize import synthesize
from pipeline.config.load import dump_config, load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.records import Prompt
from pipeline.run import prepared_run
from pipeline.run.identities import cache_identities
from pipeline.run.preparation import Prepared, save_prepared
from pipeline.sequences import SequenceReader, read_dataset
from pipeline.synthesis.prompts import write_prompts
from teachers.preflight.identity import model_identity
from teachers.tasks.judge import read_grade
from tests.support.command_line import QUICKSTART
from tests.support.endpoints import (
    Loopback,
    Response,
    by_text,
    chat_reply,
    loopback,
    run_in_process,
)
from tests.support.replies import BAD_REPLIES, GOOD_REPLIES, OLD
from tests.support.tokenizers_for_tests import save_byte_tokenizer

Block = dict[str, Any]
KEY = "sk-SECRET-0123456789"
ANSWER: Block = {"type": "answer", "by": "helper", "sampling": {"max_tokens": 200}}
WRITING: Block = {"teacher": "helper", "sampling": {"max_tokens": 300, "temperature": 0.5}}
EVOLVE = WRITING | {"type": "evolve", "ways": ["deeper"]}


@dataclass
class Run:
    """A run whose teacher `helper` is a text API."""

    root: Path
    prompts: list[Prompt]
    server: Loopback
    tokenizer: Any

    def config(self, recipes: list[Block], filters: list[Block], most: int | None = None) -> Config:
        values = yaml.safe_load((QUICKSTART / "config.yaml").read_text())
        values["synthesis"] = {"recipes": recipes, "filters": filters, "max_sequence_tokens": most}
        values["training"]["tokens_per_micro_batch"] = 512
        values["prompts"]["checker"] = None
        values["storage"]["root"] = str(self.root / "out")
        values["student"]["model"] = str(self.root / "student")
        for teacher in values["teachers"].values():
            teacher["model"] = str(self.root / "student")
        endpoint = {"url": self.server.url, "model": "big", "api": "openai", "scores": False}
        endpoint |= {"api_key_env": "TEST_API_KEY", "max_retries": 2}
        values["teachers"]["helper"] = {"endpoint": endpoint}
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(path)

    def synthesize(
        self, recipes: list[Block], filters: list[Block] | None = None, most: int | None = None
    ) -> Block:
        config = self.config(recipes, filters or [], most)
        check_filters(config, self.prompts)
        layout = layout_of(config)
        names = config.teachers
        identities = {n: {"weights": n} for n in names if n != "helper"}
        identities["helper"] = model_identity(config.teachers["helper"], layout)
        rules = config.synthesis.filters_before_scoring
        prepared = Prepared(
            key="key",
            prompts_digest=write_prompts(layout, self.prompts),
            prompt_counts={},
            longest_prompt=90,
            tokenizer_hash="hash",
            eos_token_id=1,
            cache_identities=cache_identities(config, identities, "hash"),
            synthesis_identities=synthesis_identities(config, identities, "hash"),
            student_identity={},
            filters_before_scoring=filter_identities(config, rules, identities, "hash"),
            identities=identities,
        )
        save_prepared(layout, prepared)
        outcome = synthesize(prepared_run.Run(config, layout, prepared)).model_dump()
        (self.root / "out/record.json").write_text(json.dumps(outcome))
        (self.root / "out/config.yaml").write_text(dump_config(config))
        return outcome

    def texts(self, outcome: Block) -> list[str]:
        """Prompt and answer of every sequence that was kept."""
        layout = layout_of(self.config([ANSWER], []))
        entries = read_dataset(layout, outcome["dataset"])
        reader, found = SequenceReader(layout, entries), []
        for entry in entries:
            sequence = reader.get(entry.sequence_id)
            assert sequence is not None
            found.append(self.tokenizer.decode(sequence.input_ids, skip_special_tokens=True))
        return sorted(found)

    def asked(self) -> list[str]:
        """Text of the user message in every request."""
        return [body["messages"][-1]["content"] for _, body, _ in self.server.requests]

    def rejected(self) -> list[Block]:
        paths = sorted((self.root / "out/rejected").rglob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]


def chat(text: str, **others: Any) -> Prompt:
    values = {"prompt_id": text, "domain": "words", "split": "train"} | others
    return Prompt(messages=({"role": "user", "content": text},), **values)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("TEST_API_KEY", KEY)
    for module in ("synthesize", "filter"):
        monkeypatch.setattr(f"jobs.stages.{module}.run_pools", run_in_process)
    tokenizer = save_byte_tokenizer(tmp_path / "student")
    prompts = [chat(OLD), chat("kept apart", split="holdout")]
    with loopback(by_text(lambda text: chat_reply("an answer"))) as server:
        yield Run(tmp_path, prompts, server, tokenizer)


def counts_of(outcome: Block, label: str) -> Block:
    counts = outcome["counts"][label]
    return {k: v for k, v in counts.items() if v and k != "generated_tokens"}


SEEDS = WRITING | {"type": "self_instruct", "requests_per_domain": 1, "seeds_per_request": 1}
RECIPES: dict[str, tuple[Block, str, list[str]]] = {
    "paraphrase": (WRITING | {"type": "paraphrase"}, "Say the request", [OLD, "Do not answer it"]),
    "deeper": (EVOLVE, "Make the request", [OLD, "harder"]),
    "broader": (EVOLVE | {"ways": ["broader"]}, "Write", [OLD, "rarer"]),
    "constraints": (EVOLVE | {"ways": ["constraints"]}, "Add", [OLD, "demands"]),
    "self_instruct": (SEEDS, "Here are", [f"<prompt>{OLD}</prompt>"]),
}


@pytest.mark.parametrize(("recipe", "beginning", "shown"), RECIPES.values(), ids=RECIPES)
def test_each_recipe_sends_its_prompt_and_takes_the_new_one(
    run: Run, recipe: Block, beginning: str, shown: list[str]
) -> None:
    good, (new,) = GOOD_REPLIES["with chatter"]
    run.server.respond = by_text(
        lambda text: chat_reply(good if "<prompt>" in text else f"answer to {text}")
    )
    outcome = run.synthesize([recipe, ANSWER])
    (request,) = [text for text in run.asked() if "<prompt>" in text]
    assert request.startswith(beginning) and all(words in request for words in shown)
    assert request.count(OLD) == 1 and "{" not in request
    bodies = run.server.bodies("/v1/chat/completions")
    (sent,) = [body for body in bodies if body["messages"][-1]["content"] == request]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("big", 300, 0.5)
    assert [message["role"] for message in sent["messages"]] == ["user"]
    assert run.texts(outcome) == sorted(
        f"{prompt}answer to {prompt}" for prompt in (OLD, "kept apart", new)
    )


@pytest.mark.parametrize(("reply", "new"), GOOD_REPLIES.values(), ids=GOOD_REPLIES)
def test_good_replies_become_prompts_that_are_answered(
    run: Run, reply: str, new: tuple[str, ...]
) -> None:
    run.server.respond = by_text(
        lambda text: chat_reply(reply if "<prompt>" in text else f"answer to {text}")
    )
    outcome = run.synthesize([SEEDS, ANSWER])
    counts = counts_of(outcome, "self_instruct by helper")
    assert counts == {"answers": 1, "kept": 1, "prompts_written": len(new)}
    answered = {text for text in run.asked() if "<prompt>" not in text}
    assert answered == {OLD, "kept apart", *new}


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        pytest.param(*each, id=name)
        for name, each in BAD_REPLIES.items()
        if each[1] != "repetition"  # vLLM's own word
    ],
)
def test_bad_replies_are_counted_and_kept_for_people(
    run: Run, reply: str, finish: str, reason: str
) -> None:
    run.server.respond = by_text(
        lambda text: chat_reply(reply, finish) if "<prompt>" in text else chat_reply("an answer")
    )
    outcome = run.synthesize([EVOLVE, ANSWER])
    assert counts_of(outcome, "evolve by helper") == {"answers": 1, reason: 1}
    (row,) = run.rejected()
    assert (row["reason"], row["prompt"], row["answer"]) == (reason, OLD, reply)
    assert len(run.texts(outcome)) == 2, "the given prompts are answered all the same"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (chat_reply(None, refusal="I'm sorry, but I can't assist with that."), "refusal"),
        (chat_reply(None, "content_filter"), "refusal"),
        (chat_reply(None), "empty"),
    ],
    ids=["in a field of its own", "withheld", "no content"],
)
def test_replies_that_only_apis_give_have_a_reason(run: Run, reply: Response, reason: str) -> None:
    run.server.respond = by_text(
        lambda text: reply if "<prompt>" in text else chat_reply("an answer")
    )
    outcome = run.synthesize([EVOLVE, ANSWER])
    assert counts_of(outcome, "evolve by helper") == {"answers": 1, reason: 1}


def test_answers_that_are_cut_empty_or_too_long_are_dropped(run: Run) -> None:
    """A server counts `max_tokens` in tokens of its own, so an answer may be too long for us."""
    replies = {
        "cut": chat_reply("half an", "length"),
        "empty": chat_reply(" \n"),
        "long": chat_reply("x" * 300),
    }
    run.prompts += [chat(name) for name in replies]
    run.server.respond = by_text(lambda text: replies.get(text, chat_reply("an answer")))
    outcome = run.synthesize([ANSWER], most=260)
    assert counts_of(outcome, "helper") == {
        "answers": 5,
        "kept": 2,
        "truncated": 1,
        "empty": 1,
        "too_long": 1,
    }
    assert (
        "; answers kept: helper 2 of 5; dropped: 1 cut at max_tokens, 1 empty, 1 too long; "
        "1 of 5 answers were cut at synthesis.recipes.0.sampling.max_tokens ("
    ) in outcome["summary"]
    assert {(row["prompt"], row["reason"]) for row in run.rejected()} == {
        ("cut", "truncated"),
        ("empty", "empty"),
        ("long", "too_long"),
    }


GRADES: dict[str, tuple[str, int | None]] = {
    "a digit": ("4", 4),
    "with a full stop": (" 5.\n", 5),
    "bold": ("**3**", 3),
    "with a word": ("Grade: 4", 4),
    "bold with a word": ("**Score:** 2", 2),
    "of five": ("4/5", 4),
    "with reasons behind it": ("4\n\nThe answer is right, with a small flaw in", 4),
    "after thoughts": ("<think>Is it 2? No.</think>\n5", 5),
    "nothing": ("", None),
    "thoughts that were cut": ("<think>The answer says 4 and", None),
    "a refusal": ("I'm sorry, but I can't grade this.", None),
    "a sentence": ("I would give it a 4 out of 5.", 4),
    "a short sentence": ("I'd say 4", 4),
    "a curly quote": ("I\u2019d rate this answer 4.", 4),
    "a sentence that names it": ("The grade is 4.", 4),
    "brackets": ("[[4]]", 4),
    "out of five": ("4 out of 5", 4),
    "bold of five": ("**4**/5", 4),
    "with a reason": ("Grade: 4 - mostly right", 4),
    "with a reason that counts": ("Grade: 4 - 2 small errors", None),
    "with a word behind it": ("4 (good)", 4),
    "with a dash behind it": ("4 \u2014 right, with small flaws", 4),
    "behind a reason": ("Reason: it adds up.\nGrade: 4", 4),
    "behind a reason with numbers": ("The sum of 2 and 3 is 5, as asked.\n\n**Grade:** 4", 4),
    "in a block": ("```\n4\n```", 4),
    "in a block of JSON": ('```json\n{"grade": 4, "reason": "2 errors"}\n```', 4),
    "JSON": ('{"grade": 4}', 4),
    "with a zero behind the point": ("4.0", 4),
    "four of five with zeros": ("Score: 4.0/5.0", 4),
    "of a named scale": ("On a scale of 1 to 5, I'd give it a 4.", 4),
    "of a scale in brackets": ("Grade (1-5): 4", 4),
    "full-width": ("\uff14", 4),
    "several that differ": ("Clarity score: 5\nTruth score: 3", None),
    "said twice": ("Grade: 4\nSo the grade is 4.", 4),
    "of ten": ("Score: 4/10", None),
    "out of ten": ("I'd say 4 out of 10", None),
    "with a half": ("Score: 4.5", None),
    "with a half of five": ("4.5/5", None),
    "a range": ("Grade: 3-4", None),
    "another choice": ("Grade: 3 or 4", None),
    "ten": ("10", None),
    "percent": ("Score: 5%", None),
    "the scale alone": ("1-5", None),
    "what it is not": ("The grade is not 5.", None),
    "what it would not get": ("I would not give it a 5.", None),
    "a condition": ("If it were shorter, the grade would be 5.", None),
    "a number in the answer": ("The answer says 4, which is", None),
    "a list": ("1. The sum is right.\n2. The unit is missing.", None),
    "a count": ("4 of the steps are right", None),
    "a choice": ("4 or 5", None),
    "another scale": ("9/10", None),
    "out of range": ("6", None),
    "two digits": ("45", None),
    "a fraction": ("3.5", None),
}


@pytest.mark.parametrize(("reply", "grade"), GRADES.values(), ids=GRADES)
def test_grades_are_read_where_they_are_one(reply: str, grade: int | None) -> None:
    assert read_grade(reply) == grade


def test_a_judge_that_exchanges_text_is_read_and_asked_once(run: Run) -> None:
    replies = {"first": "Grade: 5", "second": "2", "third": "I cannot grade this.", "fourth": ""}
    run.prompts += [chat(name) for name in replies]

    def reply(text: str) -> Response:
        if not text.startswith("Grade the answer"):
            return chat_reply(f"answer to {text}")
        known = [grade for name, grade in replies.items() if f"Request:\n{name}\n" in text]
        return chat_reply(known[0] if known else "4")

    run.server.respond = by_text(reply)
    judge = {"type": "judge", "teacher": "helper", "min_grade": 4}
    outcome = run.synthesize([ANSWER], [judge])
    questions = [text for text in run.asked() if text.startswith("Grade the answer")]
    assert len(questions) == 6 and all("Answer:\nanswer to" in text for text in questions)
    graded = [b for _, b, _ in run.server.requests if "Grade the" in b["messages"][-1]["content"]]
    assert all(body["max_tokens"] == 32 and body["temperature"] == 0 for body in graded)
    assert not any("allowed_token_ids" in body for body in graded)
    (counts,) = outcome["filters"]
    assert (counts["seen"], counts["dropped"]) == (6, 3)
    details = {row["detail"] for row in run.rejected()}
    assert details == {"grade 2 by helper", "helper could not grade it"}
    assert len(run.texts(outcome)) == 3
    run.server.requests.clear()
    run.synthesize([ANSWER], [judge | {"min_grade": 2}])
    assert run.server.requests == [], "another bound asks nobody, nor does a lost grade"


def test_what_passes_is_outlasted_and_nothing_is_asked_twice(run: Run) -> None:
    number = 0

    def shaky(path: str, body: Block) -> Response:
        nonlocal number
        if not body:
            return Response.of({"data": []})
        number += 1
        if number % 3 == 1:
            return Response.of({"error": "busy"}, 429, **{"Retry-After": "1"})
        return chat_reply(f"answer to {body['messages'][-1]['content']}")

    run.server.respond = shaky
    outcome = run.synthesize([ANSWER])
    assert len(run.texts(outcome)) == 2
    run.server.requests.clear()
    assert run.synthesize([ANSWER])["dataset"] == outcome["dataset"]
    assert run.server.requests == []


def _everything_written(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()
            if path.suffix == ".parquet":
                yield str(pq.read_table(path).to_pylist()).encode()


@pytest.mark.parametrize("repeats", [False, True], ids=["silent", "repeats the key"])
def test_the_key_is_sent_and_written_nowhere(
    run: Run,
    repeats: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(0)
    refusal = Response.of({"error": f"the key {KEY} is not accepted"}, 500)
    run.server.respond = by_text(lambda text: refusal if repeats else chat_reply("an answer"))
    message = ""
    try:
        run.synthesize([ANSWER])
    except ValueError as error:
        message = repr(error)
    assert ("the key *** is not accepted" in message) is repeats
    assert {headers["Authorization"] for *_, headers in run.server.requests} == {f"Bearer {KEY}"}
    printed = capfd.readouterr()
    told = [message, caplog.text, printed.out, printed.err]
    assert not any("SECRET" in text for text in told)
    written = list(_everything_written(run.root))
    assert len(written) > 3 and not any(b"SECRET" in content for content in written)
