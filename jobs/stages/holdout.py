"""Hold-out numbers of all models: students by a forward pass, teachers from their caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from pipeline.cache.reader import CacheReader, open_cache
from pipeline.combine.product import product_of
from pipeline.combine.weights import combine_targets, required_teachers
from pipeline.config.combine import CombineConfig
from pipeline.config.run import Config
from pipeline.errors import DistillationError
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.run.prepared_run import Run
from teachers.pool.placement import check_placement

if TYPE_CHECKING:
    from students.data.examples import Examples

Json = dict[str, Any]


def holdout_figures(
    run: Run,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    students: Sequence[str],
    former: Sequence[Layout] = (),
) -> Json:
    """Runs on the resources of the evaluation.

    Args:
        compared: sequences whose log-probabilities the serving engine must reproduce.
        former: rounds whose students are measured on the same sequences.

    Returns:
        `models`, of each `domains`: by domain `holdout_tokens`, `holdout_loss`, `kl_to_mixture`,
        `kl_bounded_mass` and `top1_agreement`, and of each student also `gold_logprobs`; `former`,
        the `domains` of each former round's student; `weights`, the mean weight of each teacher by
        domain; `product`, of a product of teachers by domain the mean `assumed_mass` and the share
        of positions `floored`.
    """
    return run_on_evaluation_resources(
        run.config, _figures, run, entries, compared, students, former
    )


def run_on_evaluation_resources(
    config: Config, function: Callable[..., Json], *arguments: object
) -> Json:
    """Runs a function that holds a student in memory where the student is served, for the job's own
    process may be on a small head. The worker ends with the function: an idle one would keep the
    device memory that the next engine needs.

    Raises:
        ClusterError: the cluster has no node for it.
        DistillationError: what the function raises.
    """
    resources = config.evaluation.resources
    if not config.cluster.autoscaling:
        check_placement("the evaluation", resources, ray.nodes())
    # Ray ends the workers of GPU tasks by itself only where num_gpus stands in ray.remote().
    task = ray.remote(max_calls=1)(function).options(
        num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, resources=resources.custom
    )
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        if isinstance(error.cause, DistillationError):
            raise error.cause from error
        raise


def renormalised_sequences(run: Run, entries: Sequence[DatasetEntry]) -> int:
    """Sequences that a teacher of positive weight lacks: the others' weights are scaled up."""
    readers = {name: open_cache(cache) for name, cache in run.distribution_layouts().items()}
    combine = run.combine()
    return sum(
        any(
            entry.sequence_id not in readers[name]
            for name in required_teachers(combine, list(readers), entry.domain)
        )
        for entry in entries
    )


def _figures(
    run: Run,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    students: Sequence[str],
    former: Sequence[Layout],
) -> Json:
    from students.data.examples import open_examples
    from students.evaluation import holdout_numbers, teacher_holdout_numbers
    from students.reference import gold_logprobs, vocabulary_size

    config, layout, caches = run.config, run.layout, run.distribution_layouts()
    trust = config.student.trust_remote_code
    vocabulary = vocabulary_size(layout.export_folder(students[0]), trust)
    teachers, combine = config.scoring_teachers, run.combine()
    examples = open_examples(layout, caches, teachers, combine, entries, vocabulary)
    readers = {name: open_cache(cache) for name, cache in caches.items()}
    models: Json = {
        name: {"domains": _renamed(numbers)}
        for name, numbers in teacher_holdout_numbers(entries, examples, readers).items()
    }
    device = "cuda" if config.evaluation.resources.num_gpus else "cpu"
    budget, packing = config.training.tokens_per_micro_batch, config.training.packing

    def domains(folder: str) -> Json:
        return _renamed(holdout_numbers(folder, entries, examples, budget, device, trust, packing))

    for label in students:
        folder = layout.export_folder(label)
        models[label] = {
            "domains": domains(folder),
            "gold_logprobs": gold_logprobs(folder, compared, trust, device),
        }
    ordered = {name: readers[name] for name in teachers}
    return {
        "models": models,
        "former": [domains(each.export_folder(students[0])) for each in former],
        **combination_figures(combine, entries, examples, ordered, vocabulary),
    }


def combination_figures(
    combine: CombineConfig,
    entries: Sequence[DatasetEntry],
    examples: Examples,
    readers: dict[str, CacheReader],
    vocabulary: int,
) -> Json:
    """`weights` and `product` of `holdout_figures`: means over the positions of each domain."""
    sums: dict[str, Any] = {}
    for entry in entries:
        rows = tuple(reader.row(entry.sequence_id) for reader in readers.values())
        combined = combine_targets(examples.sequence(entry), rows, list(readers), combine)
        figures = [combined.teacher_weights.sum(axis=1)]
        if combine.method == "product":
            product = product_of(combined, vocabulary, combine.min_tail)
            figures.append([product.assumed_mass.sum(), product.is_floored.sum()])
        total, count = sums.get(entry.domain, (0.0, 0))
        total = total + np.concatenate(figures)
        sums[entry.domain] = (total, count + combined.teacher_weights.shape[1])
    means = {domain: (total / count).tolist() for domain, (total, count) in sums.items()}
    return {
        "weights": {
            domain: dict(zip(readers, found, strict=False)) for domain, found in means.items()
        },
        "product": {
            domain: dict(zip(("assumed_mass", "floored"), found[len(readers) :], strict=True))
            for domain, found in means.items()
            if combine.method == "product"
        },
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
    }
