"""Rounds: the prompts that each one asks, the folder of each, and a run of several rounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import distill
from jobs.bookkeeping.plan import STAGE_NAMES, plan_rounds
from jobs.caches.run_caches import open_caches
from jobs.cluster import stage_jobs
from jobs.dry_run import dry_run_text
from jobs.stages.prepare import prepare
from jobs.stages.rounds_report import round_rows, stage_rows
from jobs.stages.synthesize import synthesize
from pipeline import storage
from pipeline.cache.generations import named_generations
from pipeline.cache_care.gc import find_garbage
from pipeline.config.load import dump_config, load_config
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.errors import CacheError, ConfigError
from pipeline.records import DatasetEntry
from pipeline.report.models import DomainFigures
from pipeline.run.preparation import preparation_key
from pipeline.run.prepared_run import Run as PreparedRun
from pipeline.run.training_spec import training_specs
from pipeline.sequences import read_dataset, write_dataset
from tests.support.command_line import QUICKSTART
from tests.support.fabricated import FabricatedRun, FakePools
from tests.support.logs import logged
from tests.support.tokenizers_for_tests import save_byte_tokenizer
from tests.unit.stages.test_plan import PREPARED
from tests.unit.synthesis.test_recipes import ANSWER, Engines, Run, chat, scripted

TEACHERS = ANSWER | {"train_rounds": "first"}
STUDENT = ANSWER | {"by": "student", "train_rounds": "later"}
RECIPES = (
    "synthesis.recipes=["
    "{type: answer, by: domain_teacher, train_rounds: first, sampling: {max_tokens: 24}}, "
    "{type: answer, by: student, train_rounds: later, sampling: {max_tokens: 24}}]"
)
TWO_ROUNDS = ["rounds=2", "evaluation.twin=false", RECIPES]


def quickstart(*changes: str) -> Config:
    return load_config(QUICKSTART / "config.yaml", list(changes))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    engines = Engines(save_byte_tokenizer(tmp_path / "student"), scripted({}))
    monkeypatch.setattr("jobs.stages.synthesize.run_pools", engines)
    prompts = [chat("first"), chat("second"), chat("kept apart", split="holdout")]
    return Run(tmp_path, prompts, engines)


def in_round(run: Run, number: int, *recipes: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The record of synthesize in one of two rounds, with the prompts that it `asked`."""
    run.engines.asked.clear()
    evaluation = {"sampling": {"max_tokens": 9}, "twin": False}
    values = {"rounds": 2, "round": number, "evaluation": evaluation}
    config = run.config(list(recipes), others.get("filters", ()), values)
    outcome = synthesize(run.prepared(config)).model_dump()
    asked = sorted((who, text) for who, text, _ in run.engines.asked)
    return outcome | {"asked": asked, "entries": entries_of(config, outcome)}


def entries_of(config: Config, outcome: dict[str, Any]) -> list[DatasetEntry]:
    return list(read_dataset(layout_of(config), outcome["dataset"]))


def test_teachers_answer_first_and_the_student_later(run: Run) -> None:
    first = in_round(run, 1, TEACHERS, STUDENT)
    assert first["asked"] == [("words", t) for t in ("first", "kept apart", "second")]
    assert {entry.authors for entry in first["entries"]} == {("words",)}
    second = in_round(run, 2, TEACHERS, STUDENT)
    assert second["asked"] == [("student", "first"), ("student", "second")]
    written = {(entry.prompt_id, entry.split): entry.authors for entry in second["entries"]}
    assert written == {
        ("first", "train"): ("student",),
        ("second", "train"): ("student",),
        ("kept apart", "holdout"): ("words",),
    }
    held = [[e for e in each["entries"] if e.split == "holdout"] for each in (first, second)]
    assert held[0] == held[1], "losses of all rounds are those of the same sequences"
    assert in_round(run, 2, TEACHERS, STUDENT)["asked"] == []


def test_teachers_and_student_may_both_be_trained_on(run: Run) -> None:
    both = ANSWER, STUDENT | {"samples_per_prompt": 3}
    in_round(run, 1, *both)
    run.engines.reply = lambda text, sample: (f"another {sample}", "stop")
    second = in_round(run, 2, *both)
    assert {who for who, _ in second["asked"]} == {"student"}
    trained = [entry.authors for entry in second["entries"] if entry.split == "train"]
    assert trained.count(("words",)) == 2 and trained.count(("student",)) == 6


def test_other_weights_are_asked_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    in_round(run, 2, TEACHERS, STUDENT)
    prepared = run.prepared

    def changed(config: Config) -> Any:
        found = prepared(config)
        found.prepared.synthesis_identities["student"]["model"] = {"weights": "trained again"}
        return found

    monkeypatch.setattr(run, "prepared", changed)
    again = in_round(run, 2, TEACHERS, STUDENT)
    assert again["asked"] == [("student", "first"), ("student", "second")]


def test_a_recipe_that_changes_rounds_makes_another_dataset_and_asks_nobody(run: Run) -> None:
    config = run.config([ANSWER])
    record = synthesize(run.prepared(config))
    apart = run.config([TEACHERS | {"train_rounds": "none"}, {"type": "dataset"}])
    assert synthesize_key(run, apart) != record.key
    assert synthesize_key(run, run.config([ANSWER])) == record.key


def synthesize_key(run: Run, config: Config) -> str:
    from jobs.bookkeeping.stage_records import synthesis_key

    return synthesis_key(run.prepared(config))


def test_answers_that_were_cut_are_kept_where_the_recipe_says_so(run: Run) -> None:
    run.engines.reply = scripted({"first": ("on and on", "length")})
    dropped = in_round(run, 2, TEACHERS, STUDENT)
    assert dropped["counts"]["student"]["truncated"] == 1
    kept = in_round(run, 2, TEACHERS, STUDENT | {"keep_truncated": True})
    assert ("student", "first") in kept["asked"], "what is kept is part of the recipe"
    assert kept["counts"]["student"]["kept"] == 2
    lengths = {e.prompt_id: e.num_positions for e in kept["entries"]}
    assert lengths["first"] == len("on and on"), "no end of sequence is made up"


def test_filters_spare_whom_they_are_told_to(run: Run) -> None:
    both = ANSWER, STUDENT | {"sampling": {"max_tokens": 60}}
    run.engines.reply = scripted({"kept apart": ("so", "stop"), "first": ("yes", "stop")})
    length = {"type": "length", "max_tokens": 5}
    outcome = in_round(run, 2, *both, filters=[length | {"spares": ["student"]}])
    assert outcome["filters"][0]["seen"] == 1, "an equal answer of the student is the student's"
    assert outcome["filters"][0]["dropped"] == 0
    (both_wrote,) = [e for e in outcome["entries"] if e.prompt_id == "second"]
    assert both_wrote.authors == ("words", "student")
    strict = in_round(run, 2, *both, filters=[length])
    assert strict["filters"][0]["dropped"] == 1 and strict["asked"] == []


def test_a_round_is_a_run_below_the_run_that_starts_from_the_one_before(tmp_path: Path) -> None:
    config = quickstart(*TWO_ROUNDS, f"storage.root={tmp_path}", "rounds=3")
    first, second, third = rounds_of(config)
    assert first == config and first.student.initial_weights is None
    assert layout_of(first).run_folder == f"{tmp_path}/runs/quickstart"
    assert layout_of(third).run_folder == f"{tmp_path}/runs/quickstart/rounds/3"
    assert second.student.initial_weights == f"{tmp_path}/runs/quickstart/export/student"
    assert third.student.initial_weights == layout_of(second).export_folder("student")
    assert third.author("student").model == third.student.initial_weights
    assert third.author("words") == third.teachers["words"]
    path = tmp_path / "third.yaml"
    path.write_text(dump_config(third))
    assert load_config(path) == third, "what a job gets is the same round"
    assert rounds_of(second) == [second, third]


def test_rounds_change_nothing_of_the_first_one(tmp_path: Path) -> None:
    one, several = (
        quickstart(RECIPES.replace("later", "all"), "student.initialization=pretrained", *changes)
        for changes in (["evaluation.twin=false"], ["rounds=2", "evaluation.twin=false"])
    )
    assert layout_of(one) == layout_of(several)
    assert preparation_key(one) == preparation_key(several)
    runs = [PreparedRun(c, layout_of(c), PREPARED) for c in [one, *rounds_of(several)]]
    specs = [training_specs(prepared, "d")[0] for prepared in runs]
    assert specs[0].identity() == specs[1].identity()
    assert [spec.seed for spec in specs] == [17, 17, 18], "a round has an order of its own"
    assert specs[2].identity()["seed"] == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["round=2"], r"round \(2\) is above rounds \(1\)"),
        ([*TWO_ROUNDS, "evaluation.twin=true"], "set evaluation.twin: false"),
        (["rounds=2", "evaluation.twin=false"], "every round would train on the same"),
        ([RECIPES], "rounds is 1, so the student is never asked"),
        ([*TWO_ROUNDS, "synthesis.recipes.1.train_rounds=none"], "in round 2 of 2"),
        ([*TWO_ROUNDS, "synthesis.recipes.1.train_rounds=all"], "random weights"),
        ([*TWO_ROUNDS, "synthesis.recipes.0.train_rounds=later"], "in round 1 of 2"),
        ([*TWO_ROUNDS, "synthesis.recipes.0.by=student"], "nobody answers the hold-out prompts"),
        ([*TWO_ROUNDS, "synthesis.recipes.1.by=studnt"], "did you mean 'student'"),
        ([*TWO_ROUNDS, "synthesis.filters.0.spares=[studnt]"], "did you mean 'student'"),
        ([*TWO_ROUNDS, "synthesis.recipes.1.train_rounds=second"], "'all', 'first', 'later'"),
        ([*TWO_ROUNDS, "synthesis.recipes.1.sampling_of={student: {}}"], "names the teacher"),
        (["teachers.student={model: ./student}"], "cannot be named 'student'"),
    ],
)
def test_rounds_that_cannot_be_honoured_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quickstart(*changes)


def test_a_pretrained_student_may_write_from_the_first_round() -> None:
    pretrained = "student.initialization=pretrained"
    always = "synthesis.recipes.1.train_rounds=all"
    teachers_never = "synthesis.recipes.0.train_rounds=none"
    config = quickstart(RECIPES, "student.replicas=3", pretrained, always, teachers_never)
    served = config.author("student")
    assert served.model == str(QUICKSTART / "student") and served.replicas == 3
    assert preparation_key(config) == preparation_key(
        quickstart(RECIPES, pretrained, always, teachers_never)
    )


def test_a_dry_run_shows_every_round_and_checks_what_later_ones_ask(tmp_path: Path) -> None:
    config = quickstart(*TWO_ROUNDS, f"storage.root={tmp_path}")
    lines = dry_run_text(config).splitlines()
    first, second = lines.index("round 1 of 2"), lines.index("round 2 of 2")
    assert [line.split()[0] for line in lines[first + 1 : second]] == list(STAGE_NAMES[:-1])
    assert lines[second + len(STAGE_NAMES)].startswith("evaluate")
    assert all(line.endswith("after round 1") for line in lines[second + 1 :][: len(STAGE_NAMES)])
    assert "student, writing: 1 x 1 CPU at 1 an hour" in lines
    wrong = "synthesis.recipes.1.sampling.temprature=1"
    with pytest.raises(ConfigError, match=r"recipes \(student\).*temprature"):
        dry_run_text(quickstart(*TWO_ROUNDS, f"storage.root={tmp_path}", wrong))


def test_a_round_is_not_prepared_before_the_student_is_exported(tmp_path: Path) -> None:
    config = quickstart(*TWO_ROUNDS, f"storage.root={tmp_path}", "round=2")
    with pytest.raises(ConfigError, match=r"student of round 1, which is not exported.*round=1"):
        prepare(config)
    assert [plan.summary for plan in plan_rounds(config)[0][3:]] == [
        "400 steps of 64 sequences, for student",
        "student",
        "arithmetic, words, student on 360 hold-out prompts",
    ]


def test_stages_run_round_by_round_and_one_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = f"storage.shared_roots=[{tmp_path}, {QUICKSTART}]"
    config = quickstart(*TWO_ROUNDS, f"storage.root={tmp_path}", shared)
    submitted = []

    @contextmanager
    def cluster(*_: Any) -> Iterator[str]:
        yield "http://head"

    def submit_stage(client: Any, **asked: Any) -> str:
        submitted.append((asked["run"], asked["stage"], asked["entrypoint"]))
        uploaded = load_config(asked["working_dir"] / "config.yaml")
        assert uploaded in rounds_of(config)
        return "id"

    monkeypatch.setattr(distill, "cluster", cluster)
    monkeypatch.setattr(distill, "connect", lambda url: SimpleNamespace())
    monkeypatch.setattr(stage_jobs, "submit_stage", submit_stage)
    monkeypatch.setattr(stage_jobs, "follow", lambda *_, **__: stage_jobs.JobStatus.SUCCEEDED)
    monkeypatch.setattr(distill, "is_visible", lambda *_: False)
    with logged() as said:
        distill.run(config, "http://head")
    assert {run for run, _, _ in submitted} == {"quickstart"}
    assert [stage for _, stage, _ in submitted] == [
        *STAGE_NAMES[:-1], *(f"round2-{stage}" for stage in STAGE_NAMES)
    ]  # fmt: skip
    assert all(f" stage {stage.split('-')[-1]} " in command for _, stage, command in submitted)
    assert "[round 1/2, 1/5 prepare] job id" in said and "[round 2/2, 6/6 evaluate] job id" in said
    assert f"{tmp_path}/runs/quickstart/rounds/2/report.html" in said[-1]


@pytest.fixture
def fabricated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[FabricatedRun]:
    """Two rounds, each with sequences of its own that are scored."""
    monkeypatch.setattr("jobs.stages.score.run_pools", FakePools())
    rounds = [
        FabricatedRun(tmp_path, overrides=[*TWO_ROUNDS, f"round={number}"]) for number in (1, 2)
    ]
    for number, each in enumerate(rounds):
        each.prepare()
        each.write_answers(4 * number, 4 * number + 4)
        each.score()
    return rounds


def test_cache_commands_look_after_every_round(fabricated: list[FabricatedRun]) -> None:
    first, second = fabricated
    caches = open_caches(first.config)
    assert [e.sequence_id for e in caches.entries] == [
        e.sequence_id for each in fabricated for e in each.entries()
    ]
    assert caches.run.config.round == 2 and caches.is_current
    assert len(open_caches(second.config).entries) == len(caches.entries) // 2


def test_what_any_round_names_is_no_garbage(fabricated: list[FabricatedRun]) -> None:
    first, second = fabricated
    names = [who for found in named_generations(first.layout).values() for who in found.values()]
    assert {name for who in names for name in who} == {"run quickstart", "run quickstart/rounds/2"}
    for layout in (first.layout, second.layout):
        assert find_garbage(layout, 0.0).garbage == []
        for path in (layout.pins, layout.prepared):
            storage.remove(path)
    with pytest.raises(CacheError, match="every cache would be garbage"):
        find_garbage(first.layout, 0.0)


def test_the_report_has_a_row_for_each_round(fabricated: list[FabricatedRun]) -> None:
    first, second = fabricated
    by_student = 3
    for number, each in enumerate(fabricated, start=1):
        entries = each.entries()
        for i in range(by_student * (number - 1)):
            entries[i] = replace(entries[i], authors=("words", "student"))
        dataset = write_dataset(each.layout, entries)
        storage.write_json(each.layout.stage_record("score"), {"dataset": dataset, "seconds": 2.5})
        trained = {"steps": 10 * number, "tokens": 100, "seconds": 1.0, "final": {}}
        record = {"figures": {"student": trained}, "seconds": 4.0, "summary": "trained"}
        storage.write_json(each.layout.stage_record("train"), record)
    students = [
        {"words": DomainFigures(holdout_tokens=7, holdout_loss=loss)} for loss in (1.0, 0.5)
    ]
    one, two = round_rows(second.config, students)
    assert (one.round, one.sequences, one.by_student, one.steps) == (1, 8, 0, 10)
    assert (two.round, two.sequences, two.by_student, two.steps) == (2, 8, 3, 20)
    assert (one.seconds, two.seconds) == (6.5, 6.5)
    assert one.domains["words"].holdout_loss == 1.0
    assert two.domains["words"].holdout_loss == 0.5
    stages = {row.stage: row for row in stage_rows(second.config)}
    assert stages["round 1, train"].seconds == stages["round 2, train"].seconds == 4.0
    assert stages["round 2, export"].detail == "no record" and len(stages) == 10
    assert [row.stage for row in stage_rows(first.config)] == [
        "prepare", "synthesize", "score", "train", "export"
    ]  # fmt: skip
