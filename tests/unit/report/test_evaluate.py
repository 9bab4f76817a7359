"""What the evaluate stage makes of measurements, without any engine."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from jobs.cluster import node_task
from jobs.stages import evaluate, holdout, serving
from jobs.stages import export as export_stage
from jobs.stages.evaluate import run_provenance
from jobs.stages.holdout import HoldoutFigures
from jobs.stages.serving import model_figures
from pipeline.config.base import Resources
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ClusterError, StorageError, TrainingError
from pipeline.report.models import DomainFigures, ExportCheck, ModelFigures, Report
from pipeline.report.rounding import NoisyLogprobs
from pipeline.report.statistics import pooled
from pipeline.run import shared_storage
from pipeline.run.prepared_run import Run
from pipeline.run.shared_storage import Mark
from teachers.pool.pool import TeacherWork
from teachers.tasks.holdout import AnsweredPrompts
from tests.support.logs import logged
from tests.support.old_run import copy_old_run

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
    measured = DomainFigures(
        holdout_tokens=9,
        holdout_loss=0.5,
        kl_to_mixture=0.1,
        kl_bounded_mass=0.0,
        top1_agreement=0.9,
    )
    likelihoods = {"arithmetic": measured}
    model = model_figures(load_config(QUICKSTART), "student", answered, ENGINE, likelihoods)
    assert model.domains["words"] == DomainFigures(prompts=4, exact_match=0.0)
    assert model.domains["arithmetic"].prompts == 4
    overall = pooled(model.domains)
    assert overall.exact_match == 0.25 and overall.holdout_loss == 0.5


def test_every_engine_of_ours_is_started_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that an engine takes at its start is part of its peak memory."""
    started: list[TeacherWork] = []

    def run_pools(work: list[TeacherWork]) -> dict[str, Any]:
        started.extend(work)
        return {work[0].name: SimpleNamespace(results=[None], engines=[{}])}

    monkeypatch.setattr(serving, "run_pools", run_pools)
    monkeypatch.setattr(serving, "_longest_request", lambda *_: 40)
    config = load_config(QUICKSTART)
    prepared: Any = SimpleNamespace(stop_token_ids=lambda name: (1,))
    run = Run(config, layout_of(config), prepared)
    for name in ("arithmetic", "words", "student", "twin"):
        serving.serve_model(run, name, (), ())
    specs = [work.spec for work in started]
    assert [replace(spec, model="") for spec in specs] == [replace(specs[0], model="")] * 4
    assert specs[0].num_logprobs == 1


def test_the_report_says_which_checker_judged() -> None:
    for checker in ("exact", None):
        config = load_config(
            QUICKSTART, [f"prompts.checker={checker or 'null'}", "synthesis.filters=[]"]
        )
        prepared: Any = SimpleNamespace(
            cache_identities={}, identities={name: {} for name in config.teachers}
        )
        run = run_provenance(Run(config, layout_of(config), prepared), "d", "Xeon 6")
        assert run.checker == checker and run.hardware.startswith("Xeon 6 (")


def answers_of(model: ModelFigures) -> AnsweredPrompts:
    """Answers of a model as an earlier run measured them."""
    return AnsweredPrompts(
        correct={domain: figures.exact_match for domain, figures in model.domains.items()},
        num_checked={domain: figures.prompts for domain, figures in model.domains.items()},
        checker_errors=0,
        num_too_long=0,
        tokens_per_second=model.tokens_per_second,
        tokens_per_second_range=model.tokens_per_second_range,
        latency_seconds=model.latency_seconds,
        gold_logprobs={"s": [-1.25]},
    )


def test_the_same_measurements_make_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of an earlier version is written again, key by key, from what it measured."""
    old = copy_old_run(tmp_path / "old")
    run, layout = old.prepare(), old.layout
    expected = json.loads(Path(layout.report_json).read_text())
    written = Report.model_validate(expected)
    models = {model.name: model for model in written.models}
    noisy = NoisyLogprobs({"s": [-1.0]}, [{"s": [-1.5]}])

    def serve(run: Run, name: str, *_: Any) -> Any:
        return answers_of(models[name]), models[name].engine

    likelihoods = {
        name: {
            domain: figures.model_copy(update={"prompts": 0, "exact_match": None})
            for domain, figures in model.domains.items()
        }
        for name, model in models.items()
    }
    figures = HoldoutFigures(likelihoods, {"student": noisy}, [], written.weights, written.product)
    monkeypatch.setattr(serving, "serve_model", serve)
    monkeypatch.setattr(evaluate, "holdout_figures", lambda *_: figures)
    outcome = evaluate.evaluate(run, old.dataset())
    found = json.loads(Path(layout.report_json).read_text())
    assert outcome.engine_seconds == found["stages"][-1]["engine_seconds"]
    # Time and place of the evaluation are others.
    for key in ("finished_at", "versions", "hardware", "caches"):
        expected["run"][key] = found["run"][key]
    for key in ("seconds", "cost", "unended"):
        expected["stages"][-1][key] = found["stages"][-1][key]
    expected["stages"][-1]["engine_seconds"] = outcome.engine_seconds
    # The earlier version checked the export otherwise.
    del expected["export_check"]
    check = found.pop("export_check")
    assert (check["exports"], check["engines"]["student"]["mean_difference"]) == ({}, 0.25)
    assert [found.pop(key) for key in ("fidelity", "differences", "preferences")] == [[]] * 3
    shown = found.pop("shown_prompts")
    assert sorted(s["reference"] for s in shown) == ["513", "735", "dfhc", "gebd"]
    assert [a["author"] for a in shown[0]["answers"]] == ["first", "second", "student"]
    assert json.dumps(found) == json.dumps(expected)
    assert Path(layout.report_html).read_text().lstrip().startswith("<!DOCTYPE html>")
    assert outcome.summary.endswith(layout.report_html)


def test_an_engine_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    """With a way out; rounding as large on its own token is none."""
    layout = copy_old_run(tmp_path / "old").layout
    exported = NoisyLogprobs({"s": [-1.0, -2.0]}, [{"s": [-1.01, -2.01]}])

    def served(name: str, logprobs: list[float]) -> Any:
        figures = SimpleNamespace(name=name)
        return SimpleNamespace(figures=figures, agreement=exported.agreement({"s": logprobs}))

    teacher: Any = SimpleNamespace(figures=SimpleNamespace(name="first"), agreement=None)
    right = served("student", [-1.012, -1.995])
    check = evaluate._export_check(layout, [teacher, right])
    assert check == ExportCheck(exports={}, engines={"student": right.agreement})
    for wrong in ([-1.2, -2.0], [-1.0, math.nan]):
        with pytest.raises(TrainingError) as refusal:
            evaluate._export_check(layout, [right, served("twin", wrong)])
        assert f"with the exported twin in {layout.export_folder('twin')}" in str(refusal.value)
        assert "student.vllm.model_impl: transformers" in str(refusal.value)


class Cluster:
    """Stands for Ray: runs a task at once, and keeps what was asked for it."""

    asked: dict[str, Any]

    def __init__(self) -> None:
        self.looks: list[float] = []

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

    def run(self, *arguments: Any) -> Iterator[Any]:
        try:
            yield from self.function(*arguments)
        except Exception as error:
            yield RayTaskError("export_student", "a traceback", error, "t", 1, "::1")

    def wait(self, results: list[Any], *, timeout: float, fetch_local: bool) -> Any:
        """The task begins after the first look."""
        self.looks.append(timeout)
        return (results, []) if len(self.looks) > 1 else ([], results)

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 0.5}

    @property
    def util(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_ip_address=lambda: "10.77.0.12")

    def get(self, found: Any) -> Any:
        if isinstance(found, RayTaskError):
            raise found.as_instanceof_cause()
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(node_task, "ray", cluster)
    monkeypatch.setattr(shared_storage, "WAIT_SECONDS", 0.0)
    return cluster


def evaluated_on(resources: str, root: Path) -> Config:
    return load_config(QUICKSTART, [f"storage.root={root}", f"evaluation.resources={resources}"])


def test_a_student_is_exported_where_it_is_served(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not in the job's own process, on a head that may be too small for it."""
    exported = {"folder": "f", "agreement": {"mean_difference": 1e-3, "noise": 2e-3}}
    monkeypatch.setattr(export_stage, "dataset_to_train_on", lambda run: "d")
    monkeypatch.setattr(export_stage, "stage_key", lambda *_: "key")
    monkeypatch.setattr(
        export_stage, "training_specs", lambda *_: [SimpleNamespace(student="twin")]
    )
    monkeypatch.setattr("students.export.folder.export_student", lambda spec, folder: exported)
    config = evaluated_on("{num_cpus: 3, custom: {big: 0.5}}", tmp_path)
    prepared: Any = None
    with logged() as lines:
        record = export_stage.export(Run(config, layout_of(config), prepared))
    assert record.figures == {"twin": exported}
    found = "weights equal to the trained ones; log-probabilities 1.0e-03 nats from training"
    assert record.summary == f"f ({found}, noise 2.0e-03)"
    place = {"num_cpus": 3, "num_gpus": 0, "resources": {"big": 0.5}}
    assert cluster.asked == place | {"num_returns": "streaming"}
    assert lines == [
        "the evaluation has waited 10 s for a node: 3 CPU + 0.5 big needed; nodes have 4 CPU + 1 "
        "big; free in all: 0.5 CPU"
    ]


def test_a_worker_that_held_a_student_ends_with_its_task(cluster: Cluster, tmp_path: Path) -> None:
    """Or its cached device memory stays taken while the engine starts on the same GPU."""
    config = evaluated_on("{num_cpus: 1}", tmp_path)
    assert holdout.run_on_evaluation_resources(config, lambda: {"local": 1}) == {"local": 1}
    assert cluster.max_calls == 1


def test_what_a_task_refuses_is_told_without_its_traceback(
    cluster: Cluster, tmp_path: Path
) -> None:
    def refuse() -> dict[str, Any]:
        raise TrainingError("the exported model differs")

    with pytest.raises(TrainingError) as told:
        holdout.run_on_evaluation_resources(evaluated_on("{num_cpus: 1}", tmp_path), refuse)
    assert str(told.value) == "the exported model differs"
    with pytest.raises(ClusterError, match="cannot hold the evaluation"):
        holdout.run_on_evaluation_resources(evaluated_on("{num_cpus: 5}", tmp_path), refuse)


def test_a_node_without_the_storage_measures_nothing(cluster: Cluster, tmp_path: Path) -> None:
    done: list[bool] = []
    shared = tmp_path / "shared"
    of_another_node = [Mark(str(shared), "f" * 32)]
    resources = Resources(num_cpus=1)
    with pytest.raises(StorageError, match=rf"\(10\.77\.0\.12\) does not see {shared}.*mount it"):
        node_task.run_on_node(
            "the evaluation", resources, False, of_another_node, done.append, True
        )
    assert not done
