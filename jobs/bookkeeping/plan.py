"""Plan of a run: what each stage still has to do, read from storage. Nothing is started here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from jobs.bookkeeping.stage_records import (
    read_record,
    scored_dataset,
    stage_key,
    synthesized_dataset,
)
from pipeline import storage
from pipeline.cache.index import missing_sequences
from pipeline.cache.kinds import entries_of, holds_holdout, widest
from pipeline.cache.logprobs import position_bytes
from pipeline.config.load import check_model_folders, local_paths
from pipeline.config.rounds import rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import Answering, Writing, is_asked
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.records import DatasetEntry
from pipeline.run.prepared_run import Run
from pipeline.sequences import read_dataset
from pipeline.synthesis.index import new_prompts
from pipeline.synthesis.prompts import load_prompts, read_prompts
from pipeline.synthesis.steps import Step, walk

STORAGE_KEYS = ("storage.root", "storage.models_root")
STAGE_NAMES = ("prepare", "synthesize", "score", "train", "export", "evaluate")


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        stage: name of the stage.
        todo: amount of work that is left, in units of the stage; 0 if it is complete.
        summary: what is done and what is left, for people.
    """

    stage: str
    todo: int
    summary: str


def stages_of(config: Config, stages: Sequence[str] = STAGE_NAMES) -> list[str]:
    """Stages of the config's round: only the last round is evaluated."""
    is_last = config.round == config.rounds
    return [stage for stage in stages if is_last or stage != "evaluate"]


def students_of(config: Config) -> list[str]:
    """Students that the train stage makes."""
    return ["student", "twin"] if config.evaluation.twin else ["student"]


def unseen_inputs(config: Config) -> dict[str, str]:
    """Local models, prompts and other inputs that this machine lacks, by the key that holds each.

    On a cluster they may lie in a folder that only its nodes mount.
    """
    inputs = {key: path for key, path in local_paths(config).items() if key not in STORAGE_KEYS}
    return {key: path for key, path in inputs.items() if not storage.exists(path)}


def plan_rounds(config: Config, stages: Sequence[str] = STAGE_NAMES) -> list[list[StagePlan]]:
    """Plans of all rounds. The work of a round is unknown until the round before it is complete.

    Raises:
        PromptError, StorageError: as in `make_plan`.
    """
    plans: list[list[StagePlan]] = []
    for round_config in rounds_of(config):
        wanted = stages_of(round_config, stages)
        if plans and any(plan.todo for plan in plans[-1]):
            after = f"after round {round_config.round - 1}"
            plans.append([StagePlan(stage, 1, after) for stage in wanted])
        else:
            plans.append([plan for plan in make_plan(round_config) if plan.stage in wanted])
    return plans


def make_plan(config: Config) -> list[StagePlan]:
    """Plans of all stages of the config's round, in order.

    Raises:
        PromptError: the prompts have to be read and are bad.
        StorageError: something in storage cannot be read.
    """
    run = Run.find(config)
    if run is None or not storage.exists(run.layout.prompts(run.prepared.prompts_digest)):
        return _plan_of_a_new_run(config)
    plans = [StagePlan("prepare", 0, _counts(run.prepared.prompt_counts))]
    unanswered = _unanswered(run)
    dataset = synthesized_dataset(run)
    todo = sum(unanswered.values()) or int(dataset is None)
    plans.append(StagePlan("synthesize", todo, f"prompts to answer: {_counts(unanswered)}"))
    if todo or dataset is None:
        return plans + [StagePlan(stage, 1, "after synthesize") for stage in STAGE_NAMES[2:]]
    plans.append(plan_score(run, read_dataset(run.layout, dataset)))
    if plans[-1].todo:
        return plans + [StagePlan(stage, 1, "after score") for stage in STAGE_NAMES[3:]]
    work = _work_after_scoring(config, run.prepared.prompt_counts.get("holdout", 0))
    for stage in STAGE_NAMES[3:]:
        is_valid = read_record(run.layout, stage).key == stage_key(run, stage)
        done = not plans[-1].todo and is_valid
        done = done and all(storage.exists(path) for path in _outputs(run, stage))
        plans.append(StagePlan(stage, 0 if done else 1, "complete" if done else work[stage]))
    return plans


def _unanswered(run: Run) -> dict[str, int]:
    """Number of prompts that each step has not answered or rewritten yet, by its label."""
    prompts = load_prompts(run.layout, run.prepared.prompts_digest)
    return {
        work.step.label: len(
            new_prompts(run.layout, work.digest, work.prompts, _room(run.config, work.step))
        )
        for work in walk(run.config, run.layout, run.prepared.synthesis_digests, prompts)
    }


def _room(config: Config, step: Step) -> int | None:
    """Tokens that a step's engine holds, if the step leaves out longer prompts; otherwise None."""
    is_writing = isinstance(step.recipe, Writing)
    return config.teachers[step.author].max_model_len if is_writing else None


def plan_score(run: Run, entries: Sequence[DatasetEntry]) -> StagePlan:
    """Plan of the score stage: sequences that a cache lacks and that are not quarantined."""
    missing, most_bytes, is_scored = {}, 0, scored_dataset(run) is not None
    for name, cache in run.all_layouts().items():
        if is_scored and holds_holdout(name) and run.began_without(cache):
            continue  # a finished run of an earlier version stays finished
        unscored = missing_sequences(entries_of(name, entries), cache)
        missing[name] = len(unscored)
        num_positions = sum(entry.num_positions for entry in unscored)
        most_bytes += num_positions * run.prepared.position_bytes(name)
    summary = f"of {len(entries)} sequences to score: {_counts(missing)}"
    if most_bytes:
        summary += f"; caches grow by at most {_mebibytes(most_bytes)}"
    # If another run has filled the caches, this one still has to write the dataset to train on.
    todo = sum(missing.values()) or int(not is_scored)
    return StagePlan("score", todo, summary)


def length_cautions(config: Config, longest_prompt: int) -> list[str]:
    """Limits that the longest possible sequence would exceed, one line each, for people.

    Args:
        longest_prompt: tokens of the longest prompt; 0 if they are not known yet.
    """
    answering = [recipe for recipe in config.synthesis.recipes if isinstance(recipe, Answering)]
    samplings = [r.sampling | own for r in answering for own in ({}, *r.sampling_of.values())]
    longest = longest_prompt + max((sampling["max_tokens"] for sampling in samplings), default=0)
    longest = min(longest, config.synthesis.max_sequence_tokens or longest)
    limits = {"training.tokens_per_micro_batch is": config.training.tokens_per_micro_batch}
    for name in config.scoring_teachers:
        if most := config.teachers[name].max_model_len:
            limits[f"teacher {name} scores at most"] = most - 1
    return [
        f"a sequence may have {longest} tokens, and {place} {most}: a longer sequence stops the "
        "run after synthesize, unless synthesis.max_sequence_tokens drops it"
        for place, most in limits.items()
        if longest > most
    ]


def key_cautions(config: Config) -> list[str]:
    """Endpoints whose key others can read on its way, one line each, for people."""
    return [
        f"teacher {name} sends its key over http:// to {urlsplit(teacher.endpoint.url).netloc}, so "
        "everybody on the way can read it: use https://, or a tunnel that ends on this machine"
        for name, teacher in config.teachers.items()
        if isinstance(teacher, EndpointTeacherConfig) and teacher.endpoint.shows_key
    ]


def _outputs(run: Run, stage: str) -> list[str]:
    """Files that train, export or evaluate must have left."""
    layout, students = run.layout, students_of(run.config)
    if stage == "evaluate":
        return [layout.report_json, layout.report_html]
    if stage == "export":
        figures = read_record(layout, stage).figures
        return [
            storage.join(layout.export_folder(student), name)
            for student in students
            for name in figures.get(student, {}).get("files", ["config.json"])
        ]
    return [
        path
        for student in students
        for path in (layout.training_summary(student), layout.final_weights(student))
    ]


def _plan_of_a_new_run(config: Config) -> list[StagePlan]:
    """Plans of a run that is not prepared, from its config and its prompts alone."""
    check_model_folders(config)
    prompts, counts = read_prompts(config.prompts, quiet=True)  # the checks read them again
    held_out = [prompt for prompt in prompts if prompt.split == "holdout"]
    num_answers, num_holdout, longest = 0, 0, 0
    for recipe in config.synthesis.recipes:
        samples, most = 1, config.synthesis.max_sequence_tokens
        if isinstance(recipe, Answering):
            samples, most = recipe.samples_per_prompt, recipe.sampling.get("max_tokens")
            samples *= len(config.teachers) if recipe.by == "every_teacher" else 1
        if not isinstance(recipe, Writing):
            num_asked = sum(is_asked(recipe, prompt.split, config.round) for prompt in prompts)
            num_answers += num_asked * samples
            num_holdout += len(held_out) * is_asked(recipe, "holdout", config.round) * samples
            longest = max(longest, (most or 0) if num_asked else 0)
    steps = " -> ".join(recipe.type for recipe in config.synthesis.recipes)
    num_scoring = len(config.scoring_teachers)
    size, length = f"{num_answers} sequences for each of {num_scoring} teachers", ""
    if longest:
        length = f" of at most {longest} tokens"
        scoring = config.scoring
        cache_bytes = num_answers * longest * position_bytes(scoring.selection.max_entries)
        if scoring.selection.is_drawn:
            wide = widest(scoring.num_logprobs)
            cache_bytes += num_holdout * longest * position_bytes(wide.max_entries)
        size += f"; caches at most {_mebibytes(cache_bytes * num_scoring)}"
    summaries = {
        "prepare": _counts(counts),
        "synthesize": f"{steps}: {num_answers} answers to the given prompts{length}",
        "score": size,
    } | _work_after_scoring(config, counts.get("holdout", 0))
    return [StagePlan(stage, 1, summaries[stage]) for stage in STAGE_NAMES]


def _work_after_scoring(config: Config, num_holdout: int) -> dict[str, str]:
    """All that train, export and evaluate do, for people."""
    training, students, models = config.training, students_of(config), config.scoring_teachers
    most = config.evaluation.max_prompts_per_domain
    bound = "" if most is None else f", at most {most} of a domain"
    return {
        "train": f"{training.steps} steps of {training.sequences_per_step} sequences, for "
        + " and for ".join(students),
        "export": " and ".join(students),
        "evaluate": f"{', '.join([*models, *students])} on {num_holdout} hold-out prompts{bound}",
    }


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB before compression"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
