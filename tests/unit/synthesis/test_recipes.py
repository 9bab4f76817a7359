"""Recipes through the synthesize stage, with a teacher that replays replies.

The tests check what is asked, what becomes of the replies, and what a second run still asks.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.bookkeeping.stage_records import synthesized_dataset, write_record
from jobs.caches.actions import retry
from jobs.stages.preflight import check_recipes
from jobs.stages.prepare import filter_identities, synthesis_identities
from jobs.stages.serving import holdout_prompts
from jobs.stages.synthesize import synthesize
from pipeline import storage
from pipeline.cache.index import quarantined
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from pipeline.run import prepared_run
from pipeline.run.identities import scoring_identity
from pipeline.run.preparation import Prepared, preparation_key, save_prepared
from pipeline.sequences import SequenceReader, read_dataset
from pipeline.synthesis.index import new_prompts
from pipeline.synthesis.prompts import write_prompts
from pipeline.synthesis.steps import steps_of, walk, with_system_prompts
from teachers.pool.contracts import PoolReport
from teachers.protocol import GeneratedAnswer
from teachers.tasks.answer import AnswerTask
from tests.support.command_line import QUICKSTART
from tests.support.replies import BAD_REPLIES
from tests.support.tokenizers_for_tests import save_byte_tokenizer

Reply = tuple[str, str]
Block = dict[str, Any]
ANSWER = {"type": "answer", "by": "words", "sampling": {"max_tokens": 50}}
EVOLVE = {
    "type": "evolve",
    "teacher": "words",
    "ways": ["deeper"],
    "sampling": {"max_tokens": 300, "temperature": 0.5},
}


@dataclass
class Engines:
    """Stand-in for `run_pools` that passes every request to a function of its text and keeps it.

    Attributes:
        reply: of the request's text and the sample's number: text and finish reason.
        asked: teacher, text and sampling parameters of every request.
    """

    tokenizer: Any
    reply: Callable[[str, int], Reply]
    asked: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, works: Sequence[Any]) -> dict[str, PoolReport]:
        reports = {}
        for work in works:
            report, engine = PoolReport(), _Engine(self, work.name)
            report.results = [asyncio.run(task.run(engine)) for task in work.tasks]
            report.engines = [{}] if work.tasks else []
            reports[work.name] = report
        return reports


@dataclass
class _Engine:
    engines: Engines
    name: str

    async def generate(
        self, ids: list[int], sampling: dict[str, Any], num_samples: int, prompt: Prompt
    ) -> list[GeneratedAnswer]:
        tokenizer = self.engines.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True)
        self.engines.asked.append((self.name, text, sampling))
        answers = []
        for i in range(num_samples):
            reply, finish = self.engines.reply(text, i)
            reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
            end = [tokenizer.eos_token_id] if finish == "stop" else []
            answers.append(GeneratedAnswer([*reply_ids, *end], finish, 0))
        return answers


@dataclass
class Run:
    """Storage root with prompts of its own, whose engines are replayed."""

    root: Path
    prompts: list[Prompt]
    engines: Engines

    def config(
        self, recipes: list[Block], filters: Sequence[Block] = (), others: Block | None = None
    ) -> Config:
        values = yaml.safe_load((QUICKSTART / "config.yaml").read_text())
        for section, changes in (others or {}).items():
            known = values.get(section)
            values[section] = known | changes if isinstance(known, dict) else changes
        values["synthesis"] = {"recipes": recipes, "filters": list(filters)}
        values["storage"]["root"] = str(self.root / "out")
        values["student"]["model"] = str(self.root / "student")
        for teacher in values["teachers"].values():
            teacher["model"] = str(self.root / "student")
            teacher["vllm"] = {}
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(path)

    def prepared(self, config: Config) -> prepared_run.Run:
        identities = {name: {"weights": name} for name in config.teachers}
        writers = identities | {"student": {"weights": f"before round {config.round}"}}
        synthesis = config.synthesis
        before = filter_identities(config, synthesis.filters_before_scoring, identities, "hash")
        scoring = {t: scoring_identity(config, t, identities[t], "hash") for t in identities}
        prepared = Prepared(
            key="key",
            prompts_digest=write_prompts(layout_of(config), self.prompts),
            prompt_counts={},
            longest_prompt=90,
            tokenizer_hash="hash",
            eos_token_id=1,
            cache_identities=scoring,
            synthesis_identities=synthesis_identities(config, writers, "hash"),
            student_identity={},
            filters_before_scoring=before,
            identities=identities,
        )
        return prepared_run.Run(config, layout_of(config), prepared)

    def synthesize(
        self, recipes: list[Block], filters: Sequence[Block] = (), **others: Block
    ) -> dict[str, Any]:
        self.engines.asked.clear()
        config = self.config(recipes, filters, others)
        return synthesize(self.prepared(config)).model_dump()

    def texts(self, outcome: dict[str, Any]) -> dict[str, list[str]]:
        """Texts of the kept sequences of each prompt."""
        layout = layout_of(self.config([ANSWER]))
        entries = read_dataset(layout, outcome["dataset"])
        reader, found = SequenceReader(layout, entries), {}
        for entry in entries:
            sequence = reader.get(entry.sequence_id)
            assert sequence is not None
            text = self.engines.tokenizer.decode(sequence.input_ids, skip_special_tokens=True)
            found.setdefault(entry.prompt_id, []).append(text)
        return found

    def rejected(self) -> list[dict[str, Any]]:
        paths = sorted((self.root / "out/rejected").rglob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]


def chat(text: str, **others: Any) -> Prompt:
    values = {"prompt_id": text, "domain": "words", "split": "train"} | others
    return Prompt(messages=({"role": "user", "content": text},), **values)


def scripted(table: dict[str, Reply]) -> Callable[[str, int], Reply]:
    """Replies with the entry of the longest key that stands in the request, else with an answer."""

    def reply(text: str, sample: int) -> Reply:
        found = [key for key in table if key in text]
        return table[max(found, key=len)] if found else (f"answer {sample}", "stop")

    return reply


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    tokenizer = save_byte_tokenizer(tmp_path / "student")
    engines = Engines(tokenizer, scripted({}))
    monkeypatch.setattr("jobs.stages.synthesize.run_pools", engines)
    monkeypatch.setattr("jobs.stages.filter.run_pools", engines)
    prompts = [chat("first"), chat("second"), chat("third"), chat("kept apart", split="holdout")]
    return Run(tmp_path, prompts, engines)


def test_written_prompts_are_answered_and_trained_on(run: Run) -> None:
    run.engines.reply = scripted(
        {
            "harder: it should need more steps, more knowledge or more careful thought, and still "
            "have a clear answer that one person can write down. Keep its topic and its language. "
            "Do not answer it.\n\nRequest:\nfirst": ("<prompt>a harder first</prompt>", "stop"),
            "Request:\nsecond": BAD_REPLIES["a refusal"][:2],
            "Request:\nthird": BAD_REPLIES["cut in the middle"][:2],
        }
    )
    outcome = run.synthesize([EVOLVE, ANSWER])
    counts = outcome["counts"]["evolve by words"]
    assert {k: v for k, v in counts.items() if k != "generated_tokens"} == {
        "answers": 3,
        "kept": 1,
        "prompts_written": 1,
        "refusal": 1,
        "over_long": 1,
    }
    writing = [text for _, text, s in run.engines.asked if s["max_tokens"] == 300]
    answering = [text for _, text, s in run.engines.asked if s["max_tokens"] == 50]
    assert len(writing) == 3 and all("kept apart" not in text for text in writing)
    assert sorted(answering) == ["a harder first", "first", "kept apart", "second", "third"]
    texts = [text for found in run.texts(outcome).values() for text in found]
    assert "a harder firstanswer 0" in texts and len(texts) == 5
    assert {(row["reason"], row["prompt"]) for row in run.rejected()} == {
        ("refusal", "second"),
        ("over_long", "third"),
    }
    entries = read_dataset(layout_of(run.config([ANSWER])), outcome["dataset"])
    assert [e.split for e in entries].count("train") == 4


def test_a_second_run_asks_nothing_and_a_new_prompt_alone(run: Run) -> None:
    run.engines.reply = scripted({"Request:\n": ("<prompt>harder</prompt>", "stop")})
    first = run.synthesize([EVOLVE, ANSWER])
    assert run.synthesize([EVOLVE, ANSWER])["dataset"] == first["dataset"]
    assert run.engines.asked == []
    run.prompts.insert(0, chat("fourth"))
    run.synthesize([EVOLVE, ANSWER])
    assert ["fourth" in text for _, text, _ in run.engines.asked] == [True, True]


def test_the_output_of_one_recipe_is_the_input_of_the_next(run: Run) -> None:
    paraphrase = {"type": "paraphrase", "teacher": "arithmetic", "sampling": {"max_tokens": 99}}
    run.engines.reply = scripted(
        {
            "Make the request": ("<prompt>harder</prompt>", "stop"),
            "Say the request": ("<prompt>otherwise</prompt>", "stop"),
        }
    )
    run.synthesize([EVOLVE | {"keep_input": False}, paraphrase, ANSWER])
    paraphrased = [text for who, text, _ in run.engines.asked if who == "arithmetic"]
    assert len(paraphrased) == 1 and "harder" in paraphrased[0], "equal new prompts are one"
    answered = [text for _, text, s in run.engines.asked if s["max_tokens"] == 50]
    assert sorted(answered) == ["harder", "kept apart", "otherwise"]


def test_recipes_in_another_order_reuse_what_is_written(run: Run) -> None:
    """An answer belongs to its prompt and its recipe; the place in the list does not matter."""
    run.engines.reply = scripted({"Request:\n": ("<prompt>harder</prompt>", "stop")})
    run.synthesize([ANSWER])
    run.synthesize([EVOLVE, ANSWER])
    assert len(run.engines.asked) == 3 + 1, "three requests and the one new prompt"


def test_a_changed_template_writes_anew(run: Run, tmp_path: Path) -> None:
    run.engines.reply = scripted({"Bitte": ("<prompt>neu</prompt>", "stop")})
    mine = tmp_path / "mine.txt"
    evolve = EVOLVE | {"templates": {"deeper": str(mine)}}
    for text in ("Bitte: {prompt}", "Bitte sehr: {prompt}"):
        mine.write_text(text)
        run.synthesize([evolve, ANSWER])
        assert len([1 for _, asked, _ in run.engines.asked if asked.startswith("Bitte")]) == 3


def test_system_prompts_and_sampling_of_single_teachers_are_sent(run: Run) -> None:
    answer = ANSWER | {
        "by": "every_teacher",
        "system_prompt": "Be brief. ",
        "sampling_of": {"arithmetic": {"temperature": 0.25}},
    }
    run.prompts[0] = replace(
        run.prompts[0],
        messages=(
            {"role": "system", "content": "Mine. "},
            {"role": "user", "content": "first"},
        ),
    )
    evaluation = {"sampling": {"max_tokens": 9}, "system_prompt": None}
    outcome = run.synthesize([answer], evaluation=evaluation)
    sent = {(who, text): s.get("temperature") for who, text, s in run.engines.asked}
    assert sent["words", "Be brief. second"] is None
    assert sent["arithmetic", "Be brief. second"] == 0.25
    assert ("words", "Mine. first") in sent and len(sent) == 8
    assert run.texts(outcome)["second"] == ["Be brief. secondanswer 0"]


def test_completions_may_be_cut_and_answers_may_not(run: Run) -> None:
    run.prompts = [
        Prompt("a", "words", "train", text="Once upon"),
        Prompt("b", "words", "holdout", text="There was"),
    ]
    run.engines.reply = lambda text, sample: (" a time", "length")
    outcome = run.synthesize([ANSWER | {"type": "complete"}])
    assert run.texts(outcome) == {"a": ["Once upon a time"], "b": ["There was a time"]}
    assert outcome["counts"]["complete by words"]["kept"] == 2


def test_a_judge_can_only_write_grades_and_is_asked_once(run: Run) -> None:
    grades = {"first": "5", "second": "2", "third": "4", "kept apart": "4"}
    run.engines.reply = lambda text, sample: (
        (next(g for name, g in grades.items() if f"Request:\n{name}" in text), "length")
        if "Grade the answer" in text
        else ("an answer", "stop")
    )
    judge = {"type": "judge", "teacher": "arithmetic", "min_grade": 4}
    outcome = run.synthesize([ANSWER], [judge])
    assert sorted(run.texts(outcome)) == ["first", "kept apart", "third"]
    assert outcome["filters"][0]["examples"] == ["grade 2 by arithmetic"]
    judged = [(text, sampling) for who, text, sampling in run.engines.asked if who == "arithmetic"]
    digits = {run.engines.tokenizer.decode(i) for i in judged[0][1]["allowed_token_ids"]}
    assert digits == set("12345") and judged[0][1]["max_tokens"] == 1
    assert all("Answer:\nan answer" in text for text, _ in judged) and len(judged) == 4
    assert outcome["engine_seconds"].keys() == {"words", "arithmetic"}
    run.synthesize([ANSWER], [judge | {"min_grade": 2}])
    assert run.engines.asked == [], "another bound asks nobody"


def test_a_request_that_is_too_long_is_counted_and_asked_once_it_fits(run: Run) -> None:
    run.prompts[1] = chat("x" * 300)
    run.engines.reply = scripted({"Request:\n": ("<prompt>harder</prompt>", "stop")})

    def counts(max_model_len: int) -> dict[str, int]:
        run.engines.asked.clear()
        config = with_engine(run.config([EVOLVE, ANSWER]), max_model_len)
        prepared, layout = run.prepared(config), layout_of(config)
        evolve = next(walk(config, layout, prepared.prepared.synthesis_digests, run.prompts))
        new = new_prompts(layout, evolve.digest, evolve.prompts, max_model_len)
        found = synthesize(prepared).counts["evolve by words"]
        requests = [text for _, text, s in run.engines.asked if s["max_tokens"] == 300]
        assert len(requests) == len(new) - found.get("too_long", 0) or not new
        return {"requests": len(requests), "new": len(new)} | found

    first = counts(700)
    assert (first["new"], first["requests"], first["too_long"], first["kept"]) == (3, 2, 1, 2)
    assert counts(700) == first | {"new": 0, "requests": 0}
    assert counts(699)["new"] == 0, "less room asks nobody again"
    more = counts(1000)
    assert (more["new"], more["requests"], more["kept"]) == (1, 1, 3) and "too_long" not in more
    assert counts(700)["new"] == 0


def test_an_answer_that_is_too_long_for_the_judge_is_graded_once_it_fits(run: Run) -> None:
    run.prompts[1] = chat("x" * 300)
    run.engines.reply = lambda text, sample: (
        ("5", "length") if "Grade the answer" in text else ("an answer", "stop")
    )
    judge = {"type": "judge", "teacher": "words", "min_grade": 4}

    def dropped(max_model_len: int) -> tuple[int, int]:
        run.engines.asked.clear()
        config = with_engine(run.config([ANSWER], [judge]), max_model_len)
        record = synthesize(run.prepared(config))
        keys.append(record.key)
        return record.filters[0]["dropped"], len(run.engines.asked)

    keys: list[str] = []
    assert dropped(700) == (1, 4 + 3)
    assert dropped(700) == (1, 0)
    assert dropped(1200) == (0, 1)
    assert keys[0] == keys[1] != keys[2], "another room is another dataset"


def with_engine(config: Config, max_model_len: int) -> Config:
    """Config in which the engine of the teacher `words` holds that many tokens."""
    engine = {"max_model_len": max_model_len}
    words = config.teachers["words"].model_copy(update={"vllm": engine})
    return config.model_copy(update={"teachers": {**config.teachers, "words": words}})


def test_what_was_quarantined_is_asked_again_when_that_is_wanted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"type": "judge", "teacher": "arithmetic", "min_grade": 4}

    def failing(works: Sequence[Any]) -> dict[str, PoolReport]:
        """Quarantines everything that is asked about the second prompt, except its answer."""
        for work in works:
            for task in work.tasks:
                if "second" in str(task) and not isinstance(task, AnswerTask):
                    task.quarantine("the engine died")
                else:
                    asyncio.run(task.run(_Engine(run.engines, work.name)))
        return {work.name: PoolReport() for work in works}

    run.engines.reply = lambda text, sample: (
        ("5", "length")
        if "Grade the answer" in text
        else ("<prompt>harder</prompt>" if "Request" in text else "an answer", "stop")
    )
    with monkeypatch.context() as patch:
        patch.setattr("jobs.stages.synthesize.run_pools", failing)
        patch.setattr("jobs.stages.filter.run_pools", failing)
        config = run.config([EVOLVE, ANSWER], [judge])
        synthesis = config.synthesis.model_copy(update={"prompts_per_shard": 1})
        config = config.model_copy(update={"synthesis": synthesis})
        layout, prepared = layout_of(config), run.prepared(config)
        save_prepared(layout, prepared.prepared)
        record = synthesize(prepared)
    write_record(layout, "synthesize", record)
    assert record.counts["evolve by words"]["quarantined"] == 1
    assert record.filters[0]["examples"] == ["arithmetic could not grade it"]
    cache = prepared.cache_layouts()["words"]
    name = read_dataset(layout, str(record.dataset))[0].sequence_id
    for identifier in (name, "another run's"):
        path = storage.join(cache.quarantine, f"{identifier}.json")
        storage.write_json(path, {"sequence_id": identifier, "error": "died"})
    run.engines.asked.clear()
    assert synthesize(prepared).dataset == record.dataset
    assert run.engines.asked == []
    assert retry(config) == "to be asked again by the next run: 1 prompts, 1 grades, 1 rows"
    assert synthesized_dataset(prepared) is None, "there is something to do"
    assert list(quarantined(cache)) == ["another run's"]
    again = synthesize(prepared)
    assert len(run.engines.asked) == 2 and again.counts["evolve by words"]["kept"] == 3
    assert again.filters[0]["dropped"] == 0
    assert retry(config) == "nothing is quarantined"


def test_a_vote_counts_the_samples_of_one_teacher_in_two_recipes(run: Run) -> None:
    """Four of the seven samples say 7; in the warmer recipe alone 8 would win."""
    said = {0.1: ["7", "7"], 1.0: ["7", "8", "8", "8", "7"]}
    cold = ANSWER | {"samples_per_prompt": 2, "sampling": {"max_tokens": 50, "temperature": 0.1}}
    warm = cold | {"samples_per_prompt": 5, "sampling": {"max_tokens": 50, "temperature": 1.0}}

    def reply(text: str, sample: int) -> Reply:
        return said[run.engines.asked[-1][2]["temperature"]][sample], "stop"

    run.engines.reply = reply
    vote = {"type": "agreement", "by": "number", "min_share": 0.5}
    outcome = run.synthesize([cold, warm], [vote])
    assert run.texts(outcome) == {p.prompt_id: [f"{p.words}7"] for p in run.prompts}
    most = {"type": "best_of", "keep": 1, "by": "samples"}
    assert run.texts(run.synthesize([warm, cold], [most])) == run.texts(outcome)


def test_steps_have_names_of_their_own(run: Run) -> None:
    recipes = [EVOLVE, ANSWER, ANSWER | {"samples_per_prompt": 2}, {"type": "dataset"}]
    labels = [step.label for step in steps_of(run.config(recipes))]
    assert labels == ["evolve by words", "words", "words (2)", "dataset"]


def test_what_was_written_is_asked_in_the_same_words_after_a_restart(run: Run) -> None:
    """The pool is read back from the answered shards, and only the order of prompts may decide."""
    run.engines.reply = scripted({"Request:\n": ("<prompt>häßlich \n zwei</prompt>", "stop")})
    run.synthesize([EVOLVE, ANSWER])
    config = run.config([EVOLVE, ANSWER])
    *_, last = walk(
        config, layout_of(config), run.prepared(config).prepared.synthesis_digests, run.prompts
    )
    assert last.prompts[-1].words == "häßlich \n zwei"
    assert isinstance(last.prompts[-1].messages, tuple)


def test_answered_shards_name_what_they_need(run: Run) -> None:
    """Every named sequence shard exists, and every rejected reply has an answered shard."""
    run.engines.reply = scripted({"Request:\n": ("no tags", "stop")})
    run.synthesize([EVOLVE, ANSWER])
    root = run.root / "out"
    records = [storage.read_json(str(p)) for p in root.glob("synthesis/*/*.json")]
    assert all(r["shard"] is None or (root / r["shard"]).exists() for r in records)
    assert {p.parent.name for p in root.glob("rejected/*/*.parquet")} <= {
        p.parent.name for p in root.glob("synthesis/*/*.json")
    }


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([EVOLVE], "the last recipe, evolve, writes prompts that nobody answers"),
        ([ANSWER, ANSWER], "stands twice in the list"),
        ([ANSWER | {"by": "wrods"}], "did you mean 'words'"),
        ([EVOLVE | {"teacher": "wrods"}, ANSWER], "did you mean 'words'"),
        ([ANSWER | {"sampling_of": {"wrods": {}}}], "did you mean 'words'"),
        (
            [ANSWER | {"sampling_of": {"arithmetic": {}}}],
            r"does not write there, since the recipe is by words",
        ),
        ([EVOLVE | {"templates": {"broader": "/none.txt"}}, ANSWER], "not among its ways"),
        ([{"type": "anwser"}], "anwser"),
        ([ANSWER | {"sample": 3}], "unknown key 'synthesis.recipes.0.answer.sample'"),
        ([EVOLVE | {"ways": ["depper"]}, ANSWER], "deeper"),
        ([], "at least 1 item"),
    ],
)
def test_a_recipe_that_cannot_be_honoured_is_refused(
    run: Run, recipes: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run.config(recipes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (ANSWER | {"type": "complete"}, "all prompts are chat"),
        ({"type": "dataset"}, "4 of 4 prompts have none"),
        (ANSWER | {"by": "domain_teacher"}, "no teacher names"),
    ],
)
def test_a_recipe_without_prompts_to_work_on_is_refused(
    run: Run, recipe: dict[str, Any], message: str
) -> None:
    prompts = [replace(p, domain="nobody's") for p in run.prompts]
    with pytest.raises(ConfigError, match=message):
        check_recipes(run.config([recipe]), prompts)


def test_where_answers_have_a_system_prompt_the_evaluation_says_whether_it_has_one(
    run: Run,
) -> None:
    answer = ANSWER | {"system_prompt": "Be brief. "}
    sampling = {"sampling": {"max_tokens": 9}}
    with pytest.raises(ConfigError, match=r"under a system_prompt \('Be brief. '\).*or `null`"):
        run.config([answer], others={"evaluation": sampling})
    plain = run.config([answer], others={"evaluation": sampling | {"system_prompt": None}})
    alike = run.config([answer], others={"evaluation": sampling | {"system_prompt": "Be brief. "}})
    assert preparation_key(plain) != preparation_key(alike)
    assert [p.words for p in holdout_prompts(plain, run.prompts)] == ["kept apart"]
    (asked,) = holdout_prompts(alike, run.prompts)
    assert asked.messages == (
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "kept apart"},
    )
    forms = with_system_prompts(plain, run.prompts)
    assert len(forms) == 8 and forms[3] == asked, "each is looked at before an engine sees it"
    assert with_system_prompts(alike, run.prompts) == forms[:4]
    raw = [*run.prompts, Prompt("raw", "words", "train", text="Once")]
    only_evaluated = {"evaluation": sampling | {"system_prompt": "Be brief."}}
    with pytest.raises(ConfigError, match=r"evaluation.system_prompt .* 1 prompts are raw"):
        check_recipes(run.config([ANSWER], others=only_evaluated), raw)
