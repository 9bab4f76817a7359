"""What the evaluate stage makes of measurements, without any engine."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.remote_function import RemoteFunction

from jobs.bookkeeping.stage_records import StageRecord
from jobs.stages import evaluate, holdout
from jobs.stages import export as export_stage
from jobs.stages.evaluate import _difference, _model
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ClusterError, TrainingError
from pipeline.report.statistics import pooled
from pipeline.run.prepared_run import Run
from teachers.pool.pool import TeacherWork
from teachers.tasks.holdout import AnsweredPrompts

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
ENGINE = {"num_parameters": 1, "weight_bytes": 4, "peak_memory_bytes": None}


def test_a_domain_without_kept_holdout_answers_is_still_reported() -> None:
    answered = AnsweredPrompts(
        checker_errors=0,
        correct={"arithmetic": 0.5, "words": 0.0},
        num_checked={"arithmetic": 4, "words": 4},
        num_too_long=0,
        tokens_per_second=10.0,
        tokens_per_second_range=(9.0, 11.0),
        latency_seconds=0.1,
        gold_logprobs={},
    )
    measured = {
        "holdout_tokens": 9,
        "holdout_loss": 0.5,
        "kl_to_mixture": 0.1,
        "kl_bounded_mass": 0.0,
        "top1_agreement": 0.9,
    }
    numbers = {"arithmetic": measured}
    model = _model(load_config(QUICKSTART), "student", answered, ENGINE, numbers)
    assert model["domains"]["words"]["exact_match"] == 0.0
    overall = pooled(model)
    assert overall["exact_match"] == 0.25 and overall["holdout_loss"] == 0.5


def test_every_engine_of_ours_is_started_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine does at its start is part of its peak memory."""
    jobs: list[TeacherWork] = []

    def run_pools(asked: list[TeacherWork]) -> dict[str, Any]:
        jobs.extend(asked)
        return {asked[0].name: SimpleNamespace(results=[None], engines=[{}])}

    monkeypatch.setattr(evaluate, "run_pools", run_pools)
    monkeypatch.setattr(evaluate, "_longest_request", lambda *_: 40)
    config = load_config(QUICKSTART)
    prepared: Any = SimpleNamespace(eos_token_id=1)
    run = Run(config, layout_of(config), prepared)
    for name in ("arithmetic", "words", "student", "twin"):
        evaluate._serve(run, name, (), ())
    specs = [job.spec for job in jobs]
    assert [replace(spec, model="") for spec in specs] == [replace(specs[0], model="")] * 4
    assert specs[0].num_logprobs == 1


def test_the_report_says_which_checker_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "read_record", lambda *_: StageRecord())
    monkeypatch.setattr(evaluate, "_curve", lambda *_: [])
    for checker in ("exact", None):
        config = load_config(
            QUICKSTART, [f"prompts.checker={checker or 'null'}", "synthesis.filters=[]"]
        )
        prepared: Any = SimpleNamespace(
            cache_identities={}, identities={name: {} for name in config.teachers}
        )
        models, figures = [{"engine": {"device": "Xeon 6"}}], {"weights": {}, "product": {}}
        found = evaluate._report(Run(config, layout_of(config), prepared), "d", models, figures)
        assert found["run"]["checker"] == checker


def test_the_largest_difference_is_over_all_tokens() -> None:
    trained, served = {"a": [-1.0, -2.0], "b": [-3.0]}, {"a": [-1.0, -2.5], "b": [-2.0]}
    assert _difference(trained, served) == pytest.approx(1.0)


def test_a_difference_that_is_no_number_is_not_overlooked() -> None:
    trained, served = {"a": [-1.0, -2.0]}, {"a": [-1.5, math.nan]}
    assert math.isnan(_difference(trained, served))


class Cluster:
    """Stands for Ray: runs a task at once, and keeps what was asked for it."""

    asked: dict[str, Any]

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0, "big": 1.0}}]

    def remote(self, *, max_calls: int) -> Callable[[Callable[..., Any]], "Cluster"]:
        self.max_calls = max_calls
        return self.of

    def of(self, function: Callable[..., Any]) -> "Cluster":
        self.function = function
        return self

    def options(self, **asked: Any) -> SimpleNamespace:
        self.asked = asked
        return SimpleNamespace(remote=self.run)

    def run(self, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:
            return RayTaskError("export_student", "a traceback", error, "t", 1, "::1")

    def get(self, found: Any) -> Any:
        if isinstance(found, RayTaskError):
            raise found.as_instanceof_cause()
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(holdout, "ray", cluster)
    return cluster


def evaluated_on(resources: str) -> Config:
    return load_config(QUICKSTART, [f"evaluation.resources={resources}"])


def test_a_student_is_exported_where_it_is_served(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in the job's own process, on a head that may be too small for it."""
    exported = {"folder": "f", "largest_difference_nats": 0.0}
    monkeypatch.setattr(export_stage, "dataset_to_train_on", lambda run: "d")
    monkeypatch.setattr(export_stage, "stage_key", lambda *_: "key")
    monkeypatch.setattr(
        export_stage, "training_specs", lambda *_: [SimpleNamespace(student="twin")]
    )
    monkeypatch.setattr("students.export.export_student", lambda job, folder: exported)
    config = evaluated_on("{num_cpus: 3, custom: {big: 0.5}}")
    prepared: Any = None
    record = export_stage.export(Run(config, layout_of(config), prepared))
    assert record.figures == {"twin": exported}
    assert cluster.asked == {"num_cpus": 3, "num_gpus": 0, "resources": {"big": 0.5}}


def test_a_worker_that_held_a_student_ends_with_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its cached device memory stays taken while the engine starts on the same GPU."""
    made: list[RemoteFunction] = []

    def options(self: RemoteFunction, **asked: Any) -> SimpleNamespace:
        made.append(self)
        return SimpleNamespace(remote=lambda: asked)

    monkeypatch.setattr(RemoteFunction, "options", options)
    monkeypatch.setattr("ray.nodes", lambda: Cluster().nodes())
    monkeypatch.setattr("ray.get", lambda found: found)
    config = evaluated_on("{num_cpus: 1}")
    found = holdout.run_on_evaluation_resources(config, lambda: {"local": 1})
    assert found == {"num_cpus": 1, "num_gpus": 0, "resources": {}}
    assert [function._max_calls for function in made] == [1]


def test_what_a_task_refuses_is_told_without_its_traceback(cluster: Cluster) -> None:
    def refuse() -> dict[str, Any]:
        raise TrainingError("the exported model differs")

    with pytest.raises(TrainingError) as told:
        holdout.run_on_evaluation_resources(evaluated_on("{num_cpus: 1}"), refuse)
    assert str(told.value) == "the exported model differs"
    with pytest.raises(ClusterError, match="cannot hold the evaluation"):
        holdout.run_on_evaluation_resources(evaluated_on("{num_cpus: 5}"), refuse)
