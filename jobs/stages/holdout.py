"""Hold-out likelihoods of all models: students by a forward pass, teachers from their caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jobs.cluster.node_task import run_on_node
from pipeline.cache.kinds import holdout_of
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.combine.product import product_of
from pipeline.combine.weights import combine_targets, required_teachers
from pipeline.config.combine import CombineConfig
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.report.fidelity import SumsOfModel, difference_figures, fidelity_figures
from pipeline.report.models import (
    DifferenceFigures,
    DomainFigures,
    FidelityFigures,
    ProductFigures,
)
from pipeline.report.rounding import NoisyLogprobs
from pipeline.run.prepared_run import Run
from pipeline.run.shared_storage import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from students.data.examples import Examples

Result = TypeVar("Result")
START = "start"
"""Label of the model that training started from."""


@dataclass(frozen=True)
class HoldoutFigures:
    """Likelihoods of all models on the hold-out split.

    Attributes:
        models: likelihoods of each model, by domain.
        gold_logprobs: log-probabilities that each exported student gives the gold tokens of the
            compared sequences, with their noise.
        former: likelihoods of each former round's student, by domain.
        weights: mean weight of each teacher, by domain.
        product: figures of each domain where teachers combine as a product; otherwise empty.
        fidelity: closeness of student, twin and start to the mixture and to each teacher.
        differences: differences of the student from the twin and from its start.
        kl: KL divergence from the mixture to the student in nats per token, by sequence id.
    """

    models: dict[str, dict[str, DomainFigures]]
    gold_logprobs: dict[str, NoisyLogprobs]
    former: list[dict[str, DomainFigures]]
    weights: dict[str, dict[str, float]]
    product: dict[str, ProductFigures]
    fidelity: list[FidelityFigures] = field(default_factory=list)
    differences: list[DifferenceFigures] = field(default_factory=list)
    kl: dict[str, float] = field(default_factory=dict)


def holdout_figures(
    run: Run,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    students: Sequence[str],
    former: Sequence[Layout] = (),
) -> HoldoutFigures:
    """Measures the likelihoods of all models, on the resources of the evaluation.

    Args:
        entries: sequences of the hold-out split.
        compared: sequences whose log-probabilities the serving engine must reproduce.
        students: `student`, and `twin` where there is one.
        former: rounds whose students are measured on the same sequences.
    """
    return run_on_evaluation_resources(
        run.config, _figures, run, entries, compared, students, former
    )


def run_on_evaluation_resources(
    config: Config, function: Callable[..., Result], *arguments: object
) -> Result:
    """Runs a function that holds a student in memory on the node type that serves the student,
    since the job's own process may be on a small head node.

    Raises:
        ClusterError: no node of the cluster has these resources.
        StorageError: the node does not see the storage of the run.
        DistillationError: the function has raised it.
    """
    return run_on_node(
        "the evaluation",
        config.evaluation.resources,
        config.cluster.autoscaling,
        marks_of(layout_of(config)),
        function,
        *arguments,
    )


def renormalised_sequences(run: Run, entries: Sequence[DatasetEntry]) -> int:
    """Number of sequences without a row of a teacher that has weight in their domain; there the
    weights of the other teachers are scaled up.
    """
    readers = {name: open_cache(cache) for name, cache in run.distribution_layouts().items()}
    combine = run.combine()
    return sum(
        any(
            entry.sequence_id not in readers[name]
            for name in required_teachers(combine, list(readers), entry.domain)
        )
        for entry in entries
    )


def measured_layouts(run: Run, entries: Sequence[DatasetEntry]) -> dict[str, CacheLayout]:
    """Folders of the caches that the hold-out split is measured with, by teacher: the wide cache
    where it has the sequences, otherwise the cache that is trained on.

    A run that scored before there were wide caches has none.

    Args:
        entries: sequences of the hold-out split.
    """
    caches, wide = run.distribution_layouts(), run.holdout_layouts()
    for name, cache in list(caches.items()):
        if holdout_of(name) in wide:
            trained, measured = open_cache(cache), open_cache(wide[holdout_of(name)])
            ids = [entry.sequence_id for entry in entries]
            if all(i in measured or i not in trained for i in ids):
                caches[name] = wide[holdout_of(name)]
    return caches


def _figures(
    run: Run,
    entries: Sequence[DatasetEntry],
    compared: Sequence[TokenSequence],
    students: Sequence[str],
    former: Sequence[Layout],
) -> HoldoutFigures:
    from students.architecture.build import load_model
    from students.data.examples import open_examples
    from students.evaluation import (
        domain_means,
        load_start,
        measured_targets,
        student_sums,
        teacher_holdout_numbers,
    )
    from students.reference import noisy_logprobs, vocabulary_size

    config, layout, caches = run.config, run.layout, measured_layouts(run, entries)
    trust = config.student.trust_remote_code
    vocabulary = vocabulary_size(layout.export_folder(students[0]), trust)
    teachers, combine = config.scoring_teachers, run.combine()
    examples = open_examples(layout, caches, teachers, combine, entries, vocabulary)
    readers = {name: open_cache(caches[name]) for name in teachers}
    models = {
        name: _domain_figures(numbers)
        for name, numbers in teacher_holdout_numbers(entries, examples, readers).items()
    }
    device = "cuda" if config.evaluation.resources.num_gpus else "cpu"
    budget, packing = config.training.tokens_per_micro_batch, config.training.packing
    targets = measured_targets(layout, examples, readers, vocabulary)
    sums: dict[str, SumsOfModel] = {}

    def measure(label: str, model: PreTrainedModel) -> dict[str, DomainFigures]:
        sums[label] = student_sums(model, entries, targets, budget, packing)
        return _domain_figures(domain_means(entries, sums[label][None]))

    golds = {}
    for label in students:
        folder = layout.export_folder(label)
        model = load_model(folder, trust, device)
        models[label] = measure(label, model)
        golds[label] = noisy_logprobs(model, compared, coarse=True)
        del model
    if (start := load_start(config.student, device)) is not None:
        measure(START, start)
        del start
    compared_models = dict(sums)
    earlier = [
        measure(layout.run, load_model(layout.export_folder(students[0]), trust, device))
        for layout in former
    ]
    weights, product = combination_figures(combine, entries, examples, readers, vocabulary)
    return HoldoutFigures(
        models=models,
        gold_logprobs=golds,
        former=earlier,
        weights=weights,
        product=product,
        fidelity=fidelity_figures(compared_models, entries),
        differences=difference_figures(compared_models, entries),
        kl={
            identifier: of_sequence.kl / of_sequence.tokens
            for identifier, of_sequence in sums[students[0]][None].items()
            if of_sequence.kl is not None
        },
    )


def combination_figures(
    combine: CombineConfig,
    entries: Sequence[DatasetEntry],
    examples: Examples,
    readers: dict[str, CacheReader],
    vocabulary: int,
) -> tuple[dict[str, dict[str, float]], dict[str, ProductFigures]]:
    """`weights` and `product` of `HoldoutFigures`: means over the positions of each domain."""
    sums: dict[str, np.ndarray] = {}
    num_positions: Counter[str] = Counter()
    for entry in entries:
        rows = tuple(reader.row(entry.sequence_id) for reader in readers.values())
        combined = combine_targets(examples.sequence(entry), rows, list(readers), combine)
        figures = [combined.teacher_weights.sum(axis=1)]
        if combine.method == "product":
            product = product_of(combined, vocabulary, combine.min_tail)
            figures.append([product.assumed_mass.sum(), product.is_floored.sum()])
        total = np.concatenate(figures)
        sums[entry.domain] = sums[entry.domain] + total if entry.domain in sums else total
        num_positions[entry.domain] += combined.teacher_weights.shape[1]
    means = {domain: (total / num_positions[domain]).tolist() for domain, total in sums.items()}
    weights = {domain: dict(zip(readers, mean, strict=False)) for domain, mean in means.items()}
    if combine.method != "product":
        return weights, {}
    product = {}
    for domain, mean in means.items():
        assumed_mass, floored = mean[len(readers) :]
        product[domain] = ProductFigures(assumed_mass=assumed_mass, floored=floored)
    return weights, product


def _domain_figures(
    numbers: Mapping[str, Mapping[str, float | None]],
) -> dict[str, DomainFigures]:
    """The likelihoods of one model; its answers are added once it has been served."""
    return {
        domain: DomainFigures.model_validate(
            {
                "holdout_tokens": means["tokens"],
                "holdout_loss": means["loss"],
                "kl_to_mixture": means["kl_to_mixture"],
                "kl_bounded_mass": means.get("bounded_mass", 0.0),
                "top1_agreement": means["agreement"],
            }
        )
        for domain, means in numbers.items()
    }
