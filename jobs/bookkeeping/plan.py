"""What each stage of a run still has to do, from what lies in storage. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.bookkeeping.stage_records import dataset_of, read_record, scored_dataset, stage_key
from pipeline import storage
from pipeline.cache.index import missing_sequences
from pipeline.cache.logprobs import position_bytes
from pipeline.config.load import check_model_folders
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import Answering, Writing, is_asked
from pipeline.layout import Layout
from pipeline.records import DatasetEntry
from pipeline.run.preparation import Prepared, load_prepared
from pipeline.sequences import read_dataset
from pipeline.synthesis.index import new_prompts
from pipeline.synthesis.prompts import load_prompts, read_prompts
from pipeline.synthesis.steps import Step, walk

STAGE_NAMES = ("prepare", "synthesize", "score", "train", "export", "evaluate")


@dataclass(frozen=True)
class StagePlan:
    """What a stage has done and has to do, in words; `todo` is 0 when it is complete."""

    stage: str
    todo: int
    summary: str


def stages_of(config: Config, stages: Sequence[str] = STAGE_NAMES) -> list[str]:
    """Those of the stages that a run has in a round: only the last one is evaluated."""
    is_last = config.round == config.rounds
    return [stage for stage in stages if is_last or stage != "evaluate"]


def students_of(config: Config) -> list[str]:
    """The students that the train stage makes."""
    return ["student", "twin"] if config.evaluation.twin else ["student"]


def plan_rounds(config: Config, stages: Sequence[str] = STAGE_NAMES) -> list[list[StagePlan]]:
    """The plans of each round; nothing is known of a round before the one before it is complete.

    Raises:
        PromptError, StorageError: as in `make_plan`.
    """
    plans: list[list[StagePlan]] = []
    for each in rounds_of(config):
        wanted = stages_of(each, stages)
        if plans and any(plan.todo for plan in plans[-1]):
            after = f"after round {each.round - 1}"
            plans.append([StagePlan(stage, 1, after) for stage in wanted])
        else:
            plans.append([plan for plan in make_plan(each) if plan.stage in wanted])
    return plans


def make_plan(config: Config) -> list[StagePlan]:
    """The plan of every stage of the config's round, in order.

    Raises:
        PromptError: the prompts have to be read and are bad.
        StorageError: something in storage cannot be read.
    """
    layout = layout_of(config)
    prepared = load_prepared(config, layout)
    if prepared is None or not storage.exists(layout.prompts(prepared.prompts)):
        return _plan_of_a_new_run(config)
    plans = [StagePlan("prepare", 0, _counts(prepared.prompt_counts))]
    prompts = load_prompts(layout, prepared.prompts)
    unanswered = {
        work.step.label: len(
            new_prompts(layout, work.digest, work.prompts, _room(config, work.step))
        )
        for work in walk(config, layout, prepared.synthesis_digests, prompts)
    }
    digest = dataset_of(config, layout, prepared)
    todo = sum(unanswered.values()) or int(digest is None)
    plans.append(StagePlan("synthesize", todo, f"prompts to answer: {_counts(unanswered)}"))
    if todo or digest is None:
        return plans + [StagePlan(stage, 1, "after synthesize") for stage in STAGE_NAMES[2:]]
    plans.append(plan_score(config, layout, prepared, read_dataset(layout, digest)))
    if plans[-1].todo:
        return plans + [StagePlan(stage, 1, "after score") for stage in STAGE_NAMES[3:]]
    for stage in STAGE_NAMES[3:]:
        key = stage_key(config, layout, prepared, stage)
        done = not plans[-1].todo and read_record(layout, stage).get("key") == key
        done = done and all(storage.exists(path) for path in _outputs(config, layout, stage))
        plans.append(StagePlan(stage, 0 if done else 1, "complete" if done else "to do"))
    return plans


def _room(config: Config, step: Step) -> int | None:
    """Tokens that the engine of a step holds, where the step leaves out what is longer."""
    is_writing = isinstance(step.recipe, Writing)
    return config.teachers[step.generator].max_model_len if is_writing else None


def plan_score(
    config: Config, layout: Layout, prepared: Prepared, entries: Sequence[DatasetEntry]
) -> StagePlan:
    """The plan of the score stage: sequences that a cache lacks and that are not quarantined."""
    missing, most_bytes = {}, 0
    for name, cache in prepared.caches(layout).items():
        lacking = missing_sequences(entries, cache)
        missing[name] = len(lacking)
        num_positions = sum(entry.num_positions for entry in lacking)
        most_bytes += num_positions * prepared.position_bytes(name)
    summary = f"of {len(entries)} sequences to score: {_counts(missing)}"
    if most_bytes:
        summary += f"; caches grow by at most {_mebibytes(most_bytes)}"
    # Where another run has filled the caches, this one still has to say what it trains on.
    todo = sum(missing.values()) or int(scored_dataset(config, layout, prepared) is None)
    return StagePlan("score", todo, summary)


def length_cautions(config: Config, longest_prompt: int) -> list[str]:
    """What the longest sequence that may come would not fit, for people.

    Args:
        longest_prompt: tokens; 0 where it is not known yet.
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
        f"a sequence may have {longest} tokens, and {place} {most}: longer ones stop the run after "
        "synthesize, unless synthesis.max_sequence_tokens drops them"
        for place, most in limits.items()
        if longest > most
    ]


def _outputs(config: Config, layout: Layout, stage: str) -> list[str]:
    if stage == "evaluate":
        return [layout.report_json, layout.report_html]
    if stage == "export":
        made = read_record(layout, stage).get("figures", {})
        return [
            storage.join(layout.export_folder(student), name)
            for student in students_of(config)
            for name in made.get(student, {}).get("files", ["config.json"])
        ]
    return [
        path
        for student in students_of(config)
        for path in (layout.training_summary(student), layout.final_weights(student))
    ]


def _plan_of_a_new_run(config: Config) -> list[StagePlan]:
    check_model_folders(config)
    prompts, counts = read_prompts(config.prompts)
    num_answers, longest = 0, 0
    for recipe in config.synthesis.recipes:
        samples, most = 1, config.synthesis.max_sequence_tokens
        if isinstance(recipe, Answering):
            samples, most = recipe.samples_per_prompt, recipe.sampling.get("max_tokens")
            samples *= len(config.teachers) if recipe.by == "every_teacher" else 1
        if not isinstance(recipe, Writing):
            asked = sum(is_asked(recipe, prompt.split, config.round) for prompt in prompts)
            num_answers += asked * samples
            longest = max(longest, (most or 0) if asked else 0)
    steps = " -> ".join(recipe.type for recipe in config.synthesis.recipes)
    num_scoring = len(config.scoring_teachers)
    size = f"{num_answers} sequences for each of {num_scoring} teachers"
    if longest:
        of_one = num_answers * longest * position_bytes(config.scoring.selection.max_entries)
        size += f"; caches at most {_mebibytes(of_one * num_scoring)}"
    summaries = {
        "prepare": _counts(counts),
        "synthesize": f"{steps}: {num_answers} answers to the given prompts",
        "score": size,
        "train": f"{config.training.steps} steps of {', '.join(students_of(config))}",
    }
    return [StagePlan(stage, 1, summaries.get(stage, "to do")) for stage in STAGE_NAMES]


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB before compression"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
