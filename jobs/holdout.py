"""Hold-out numbers of all models: students by a forward pass, teachers from their caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from pipeline.cache_index import CacheReader, open_cache
from pipeline.config import Config
from pipeline.datasets import DatasetEntry
from pipeline.layout import CacheLayout, Layout
from pipeline.records import TokenSequence
from pipeline.targets import combine_targets, required_teachers

if TYPE_CHECKING:
    from students.dataset import Examples

Json = dict[str, Any]


def holdout_figures(
    config: Config,
    layout: Layout,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    caches: dict[str, CacheLayout],
    students: Sequence[str],
) -> Json:
    """Runs on the resources of the evaluation.

    Args:
        compared: sequences whose log-probabilities the serving engine must reproduce.

    Returns:
        `weights`, the mean weight of each teacher by domain; and for each model `domains`, by
        domain `holdout_tokens`, `holdout_loss`, `kl_to_mixture`, `kl_bounded_mass` and
        `top1_agreement`; for each student also `gold_logprobs`.
    """
    resources = config.evaluation.resources
    task = ray.remote(_figures).options(
        num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, resources=resources.custom
    )
    return ray.get(task.remote(config, layout, entries, compared, caches, students))


def renormalised_sequences(
    config: Config, entries: Sequence[DatasetEntry], caches: dict[str, CacheLayout]
) -> int:
    """Sequences that a teacher of positive weight lacks: the others' weights are scaled up."""
    readers = {name: open_cache(cache) for name, cache in caches.items()}
    return sum(
        any(
            entry.sequence_id not in readers[name]
            for name in required_teachers(config.combine, list(readers), entry.domain)
        )
        for entry in entries
    )


def _figures(
    config: Config,
    layout: Layout,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    caches: dict[str, CacheLayout],
    students: Sequence[str],
) -> Json:
    from students.dataset import open_examples
    from students.evaluation import holdout_numbers, teacher_holdout_numbers
    from students.reference import gold_logprobs, vocabulary_size

    trust = config.student.trust_remote_code
    vocabulary = vocabulary_size(layout.export_folder(students[0]), trust)
    teachers = list(config.teachers)
    examples = open_examples(layout, caches, teachers, config.combine, entries, vocabulary)
    readers = {name: open_cache(cache) for name, cache in caches.items()}
    found: Json = {
        name: {"domains": _renamed(numbers)}
        for name, numbers in teacher_holdout_numbers(entries, examples, readers).items()
    }
    device = "cuda" if config.evaluation.resources.num_gpus else "cpu"
    for label in students:
        folder = layout.export_folder(label)
        training = config.training
        numbers = holdout_numbers(
            folder,
            entries,
            examples,
            training.tokens_per_micro_batch,
            device,
            trust,
            training.packing,
        )
        found[label] = {
            "domains": _renamed(numbers),
            "gold_logprobs": gold_logprobs(folder, compared, trust, device),
        }
    found["weights"] = _weights_by_domain(config, entries, examples, readers)
    return found


def _weights_by_domain(
    config: Config,
    entries: Sequence[DatasetEntry],
    examples: Examples,
    readers: dict[str, CacheReader],
) -> Json:
    """Mean weight of each teacher over the hold-out positions of each domain."""
    teachers = list(config.teachers)
    sums: dict[str, Any] = {}
    for entry in entries:
        rows = tuple(readers[name].row(entry.sequence_id) for name in teachers)
        combined = combine_targets(examples.sequence(entry), rows, teachers, config.combine)
        total_M, count = sums.get(entry.domain, (0.0, 0))
        weights_MP = combined.teacher_weights
        sums[entry.domain] = (total_M + weights_MP.sum(axis=1), count + weights_MP.shape[1])
    return {
        domain: dict(zip(teachers, (total_M / count).tolist(), strict=True))
        for domain, (total_M, count) in sums.items()
    }


def _renamed(numbers: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    return {
        domain: {
            "holdout_tokens": values["tokens"],
            "holdout_loss": values["loss"],
            "kl_to_mixture": values["kl_to_mixture"],
            "kl_bounded_mass": values.get("bounded_mass", 0.0),
            "top1_agreement": values["agreement"],
        }
        for domain, values in numbers.items()
        if domain != "all"
    }
