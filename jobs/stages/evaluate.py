"""Stage 6: measures teachers, student and twin alike, and writes the report."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.bookkeeping.plan import students_of
from jobs.bookkeeping.stage_records import StageRecord, read_record, stage_key, unended_attempts
from jobs.bookkeeping.versions import installed_versions
from jobs.stages.holdout import holdout_figures, renormalised_sequences
from jobs.stages.preference import preference_line, preferences
from jobs.stages.rounds_report import round_rows, stage_rows
from jobs.stages.serving import (
    ServedModel,
    compared_sequences,
    holdout_prompts,
    measure_former_student,
    measure_model,
)
from pipeline import storage
from pipeline.cache.index import load_index
from pipeline.cache.manifest import totals
from pipeline.combine.learned import learned_provenance
from pipeline.config.rounds import round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.errors import TrainingError
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry, Prompt
from pipeline.report.answers import shown_prompts
from pipeline.report.models import (
    CacheFigures,
    EvaluateStageFigures,
    ExportCheck,
    FilterCounts,
    Report,
    RunProvenance,
    ShownAnswer,
    ShownPrompt,
)
from pipeline.report.page import render_html
from pipeline.report.rounding import Agreement
from pipeline.report.tables import rounds_summary, text_summary
from pipeline.run.costs import stage_cost
from pipeline.run.prepared_run import Run
from pipeline.sequences import SequenceReader, read_dataset
from pipeline.synthesis.prompts import load_prompts
from teachers.tokenizing import answer_text, student_tokenizer


def evaluate(run: Run, dataset: str) -> StageRecord:
    """Measures all models on the hold-out split and writes `report.json` and `report.html`.

    Raises:
        TeacherError: a model cannot be served.
        TrainingError: the engine's log-probabilities of an exported student differ from those of
            its weights by more than rounding.
    """
    started = time.time()
    config, layout = run.config, run.layout
    entries = read_dataset(layout, dataset)
    holdout = [entry for entry in entries if entry.split == "holdout"]
    prompts = holdout_prompts(config, load_prompts(layout, run.prepared.prompts_digest))
    compared = compared_sequences(layout, holdout)
    former = round_layouts(config)[:-1]
    figures = holdout_figures(run, holdout, compared, students_of(config), former)
    served = [
        measure_model(run, name, prompts, compared, figures)
        for name in [*config.scoring_teachers, *students_of(config)]
    ]
    models = [model.figures for model in served]
    took: Counter[str] = Counter()
    took.update({model.figures.name: model.seconds for model in served})
    begun = time.monotonic()
    students = [
        measure_former_student(replace(run, layout=former_layout), prompts, likelihoods)
        for former_layout, likelihoods in zip(former, figures.former, strict=True)
    ]
    took.update({STUDENT: time.monotonic() - begun})
    students += [model.domains for model in models if model.name == STUDENT]
    preferred = preferences(run, prompts, took)
    # Equal for all models: the student's tokenizer and the checker decide.
    beside = {"holdout_too_long_to_ask": served[-1].num_too_long}
    if served[-1].num_unread:
        beside["holdout_reference_unread"] = served[-1].num_unread
    synthesized, scored = (read_record(layout, stage) for stage in ("synthesize", "score"))
    report = Report(
        run=run_provenance(run, dataset, models[-1].engine["device"]),
        models=models,
        caches=_cache_figures(run, scored.quarantined),
        combine=config.combine.method,
        weights=figures.weights,
        product=figures.product,
        learned_weights=learned_provenance(config.combine, layout),
        synthesis=synthesized.counts,
        filters=[FilterCounts(**counts) for counts in synthesized.filters + scored.filters],
        curves={label: _curve(layout, label) for label in students_of(config)},
        renormalised_sequences=renormalised_sequences(run, entries),
        export_check=_export_check(layout, served),
        prompts=run.prepared.prompt_counts | beside,
        stages=[*stage_rows(config), _own_row(config, layout, time.time() - started, took)],
        rounds=round_rows(config, students) if former else [],
        fidelity=figures.fidelity,
        differences=figures.differences,
        shown_prompts=_shown_prompts(run, [m.name for m in models], prompts, holdout, figures.kl),
        preferences=preferred,
    )
    storage.write_json(layout.report_json, report.model_dump())
    storage.write_bytes(layout.report_html, render_html(report).encode())
    tables = f"{rounds_summary(report)}{text_summary(report)}"
    lines = [tables, preference_line(preferred), layout.report_html]
    return StageRecord(
        key=stage_key(run, "evaluate"),
        engine_seconds=dict(took),
        summary="\n".join(filter(None, lines)),
    )


def run_provenance(run: Run, dataset: str, device: str) -> RunProvenance:
    """Provenance of the run.

    Args:
        device: device of the student; a teacher may run elsewhere.
    """
    config = run.config
    return RunProvenance(
        name=config.name,
        seed=config.seed,
        checker=config.prompts.checker,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        versions=installed_versions(),
        hardware=f"{device} ({platform.machine()})",
        dataset=dataset,
        caches={name: cache.shards_folder for name, cache in _written(run).items()},
        identities={name: run.prepared.identities[name] for name in config.teachers},
    )


def _own_row(
    config: Config, layout: Layout, seconds: float, took: Mapping[str, float]
) -> EvaluateStageFigures:
    """Time and cost of this stage, which has no stage record yet."""
    return EvaluateStageFigures(
        stage="evaluate",
        cost=stage_cost(config, took),
        detail="",
        # This attempt is one of them.
        unended=max(0, unended_attempts(layout, "evaluate") - 1),
        seconds=seconds,
        engine_seconds=dict(took),
    )


def _cache_figures(run: Run, quarantined: Mapping[str, int]) -> dict[str, CacheFigures]:
    return {
        name: CacheFigures(
            **totals(load_index(cache)).model_dump(), quarantined=quarantined.get(name, 0)
        )
        for name, cache in _written(run).items()
    }


def _written(run: Run) -> dict[str, CacheLayout]:
    """Caches of the run; a run that scored before there were wide caches has none of these."""
    wide = run.holdout_layouts().items()
    begun = {name: cache for name, cache in wide if not run.began_without(cache)}
    return run.cache_layouts() | begun


def _export_check(layout: Layout, served: Sequence[ServedModel]) -> ExportCheck:
    """Exported students against the training and against their engines.

    Raises:
        TrainingError: the engine's log-probabilities of a student differ too much.
    """
    engines = {m.figures.name: m.agreement for m in served if m.agreement is not None}
    for label, agreement in engines.items():
        if not agreement.holds:
            raise TrainingError(
                f"vLLM does not compute what transformers computes with the exported {label} in "
                f"{layout.export_folder(label)}: {agreement}; the export itself equals the trained "
                "student, but its answers would be those of another model: let student.vllm.dtype "
                "be that of student.dtype, remove other options that change numbers (such as "
                "quantization or kv_cache_dtype) from student.vllm, or set "
                "student.vllm.model_impl: transformers, and run the same command again, which only "
                "evaluates"
            )
    records = read_record(layout, "export").figures
    exports = {
        label: Agreement(**figures["agreement"])
        for label, figures in records.items()
        if "agreement" in figures  # earlier versions measured a largest difference alone
    }
    return ExportCheck(exports=exports, engines=engines)


def _shown_prompts(
    run: Run,
    models: Sequence[str],
    prompts: Sequence[Prompt],
    entries: Sequence[DatasetEntry],
    kl: Mapping[str, float],
) -> list[ShownPrompt]:
    """Prompts to show, with the models' answers and the dataset's answers by other authors.

    Args:
        models: served models.
        entries: sequences of the hold-out split.
        kl: KL divergence from the mixture to the student, by sequence id.
    """
    furthest: dict[str, float] = {}
    stored: dict[str, list[ShownAnswer]] = {}
    tokenizer, _ = student_tokenizer(run.config.student.files)
    sequences = SequenceReader(run.layout, entries)
    for entry in entries:
        prompt = entry.prompt_id
        if entry.sequence_id in kl:
            furthest[prompt] = max(kl[entry.sequence_id], furthest.get(prompt, 0.0))
        for author in sorted({*entry.authors} - {*models}):
            sequence = sequences.get(entry.sequence_id)
            assert sequence is not None, "a dataset names the shard of each of its sequences"
            text = answer_text(tokenizer, sequence.gold_ids.tolist())
            answer = ShownAnswer(author=author, answer=text, correct=None, is_cut=False)
            stored.setdefault(prompt, []).append(answer)
    number, seed = run.config.evaluation.shown_prompts, run.config.seed
    return shown_prompts(run.layout, models, prompts, furthest, number, seed, stored)


def _curve(layout: Layout, label: str) -> list[dict[str, int | float]]:
    return storage.read_json_lines(layout.metrics(label), dict[str, Any])
