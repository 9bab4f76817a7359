"""The figures of a report: everything that `report.json` holds, as frozen models.

The evaluate stage builds a `Report` and writes `Report.model_dump()`; headlines, tables, curves and
page read its attributes. `Report.model_validate` reads the `report.json` of an earlier run. The
fields stand in the order of the JSON keys.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.cache.manifest import CacheTotals
from pipeline.report.rounding import Agreement


class FrozenModel(BaseModel):
    """Base of all models of the report: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunProvenance(FrozenModel):
    """The run that a report is about, and the software, hardware and data behind it."""

    name: str
    seed: int
    checker: str | None
    """Checker of the answers; None where no answer is checked."""
    finished_at: str
    """End of the evaluation in UTC, ISO 8601."""
    versions: dict[str, str]
    """Versions of the packages that compute figures."""
    hardware: str
    """Device of the student and machine type of the job; a teacher may run elsewhere."""
    dataset: str
    """Digest of the dataset."""
    caches: dict[str, str]
    """Folder of the shards of each cache."""
    identities: dict[str, dict[str, Any]]
    """Identity of each teacher, as the preparation found it."""


class DomainFigures(FrozenModel):
    """Quality of one model in one domain of the hold-out split; None is not measured.

    Without arguments: nothing measured.
    """

    prompts: int = 0
    """Answers that were checked against a reference."""
    exact_match: float | None = None
    """Share of the checked answers that are right."""
    holdout_tokens: int = 0
    """Tokens of the hold-out answers, over which the figures below are means."""
    holdout_loss: float | None = None
    """Cross-entropy of the hold-out answers, in nats per token."""
    kl_to_mixture: float | None = None
    """KL divergence to the mixture of the teachers, in nats per token."""
    kl_bounded_mass: float | None = None
    """Share of the mixture's mass that makes the KL divergence a lower bound; 0 if it is exact."""
    top1_agreement: float | None = None
    """Share of positions at which the model's likeliest token is the mixture's."""


class Estimate(FrozenModel):
    """A mean over tokens with its 95 % interval, which counts a prompt as one observation."""

    mean: float
    low: float | None
    """Lower end of the interval; None where a single prompt was measured."""
    high: float | None


class FidelityFigures(FrozenModel):
    """Closeness of one model to one target on the hold-out split."""

    model: str
    """`student`, `twin`, or `start` for the model that training started from."""
    teacher: str | None
    """Teacher that is the target; None for the mixture of the teachers."""
    domain: str | None
    """None for all domains together."""
    prompts: int
    tokens: int
    kl: Estimate
    """KL divergence from the target to the model, in nats per token."""
    agreement: Estimate
    """Share of positions at which the model's likeliest token is the target's."""


class DifferenceFigures(FrozenModel):
    """The student minus another model, token by token of the same hold-out sequences."""

    other: str
    """`twin` or `start`."""
    teacher: str | None
    """Teacher that is the target; None for the mixture of the teachers."""
    domain: str | None
    """None for all domains together."""
    prompts: int
    loss: Estimate | None
    """Cross-entropy with the text, in nats per token; below 0 the student is better."""
    kl: Estimate | None
    """KL divergence from the target, in nats per token; below 0 the student is better. None where
    the target is known by draws alone."""
    agreement: Estimate | None
    """Share of positions of agreement; above 0 the student is better. None as for `kl`."""


class ShownAnswer(FrozenModel):
    """One answer to a prompt that the report shows."""

    author: str
    """Served model, or the author of an answer in the dataset."""
    answer: str
    correct: bool | None
    """Verdict of the checker; None where the answer was not checked."""
    is_cut: bool
    """Whether the answer ended at `max_tokens`."""


class ShownPrompt(FrozenModel):
    """One hold-out prompt with the answers of all models."""

    prompt_id: str
    domain: str
    prompt: str
    reference: str | None
    kl: float | None
    """KL divergence from the mixture to the student over the prompt's hold-out answers, in nats per
    token."""
    is_furthest: bool
    """Whether it is shown because the student is far from the teachers there; otherwise the seed
    chose it."""
    answers: list[ShownAnswer]


class PreferenceFigures(FrozenModel):
    """A judge's preference between the student's answers and another model's, each pair asked in
    both orders.
    """

    judge: str
    other: str
    domain: str | None
    """None for all domains together."""
    prompts: int
    wins: int = 0
    """Prompts at which the judge prefers the student in both orders."""
    losses: int = 0
    """Prompts at which the judge prefers the other model in both orders."""
    ties: int = 0
    """Prompts at which the judge finds both answers equally good in both orders."""
    inconsistent: int = 0
    """Prompts at which the order of the answers changes the reply."""
    same: int = 0
    """Prompts at which both answers are the same text, and the judge is not asked."""
    unjudged: int = 0
    """Prompts at which a reply cannot be read, or the answers do not fit into the judge."""

    @property
    def decided(self) -> int:
        """Prompts at which the judge prefers one of the two."""
        return self.wins + self.losses


class ModelFigures(FrozenModel):
    """Quality, size, speed and price of one served model."""

    name: str
    role: str
    """`teacher`, `student` or `twin`."""
    domains: dict[str, DomainFigures]
    parameters: int | None
    """Number of parameters; None for an endpoint."""
    weight_bytes: int | None
    """Bytes of the weight files; None for an endpoint."""
    peak_memory_bytes: int | None
    """Peak memory of the engine; None where it cannot be measured."""
    tokens_per_second: float
    """Generated tokens with all prompts in flight: median of the rounds of measurement."""
    tokens_per_second_range: tuple[float, float]
    """Speed of the slowest and of the fastest round."""
    latency_seconds: float
    """Median time of one answer asked alone."""
    cost_per_hour: float
    """Price of the engine's hardware per hour; 0 where the config gives none."""
    price_per_million_tokens: float | None
    """Price of a million generated tokens at the measured speed."""
    engine: dict[str, Any]
    """Description of the engine, in its own words."""

    @property
    def price(self) -> float | None:
        """Price per million tokens; None without a cost, since free is not a measurement."""
        return (self.price_per_million_tokens or None) if self.cost_per_hour else None

    @property
    def is_remote(self) -> bool:
        """Whether the model is served by an endpoint."""
        return self.engine["engine"] == "endpoint"

    @property
    def device(self) -> str:
        """Hardware that the model was measured on, in words."""
        if self.is_remote:
            return "over the network"
        count = self.engine["num_devices"]
        return self.engine["device"] if count == 1 else f"{count} x {self.engine['device']}"


class CacheFigures(CacheTotals):
    """Size and quality of one cache, and the sequences that it refuses."""

    quarantined: int
    """Sequences that could not be scored."""


class ProductFigures(FrozenModel):
    """Means over the positions of a domain where teachers combine as a product."""

    assumed_mass: float
    """Share of the product's mass that rests on tails spread evenly."""
    floored: float
    """Share of positions at which a tail was raised to `combine.min_tail`."""


class FilterCounts(FrozenModel):
    """Answers that one filter has seen and dropped."""

    filter: str
    """Type of the filter."""
    seen: int
    dropped: int
    dropped_by_domain: dict[str, int]
    examples: list[str]
    """Reasons of some of the dropped answers."""


class ExportCheck(FrozenModel):
    """Log-probabilities of the exported students, by student."""

    exports: dict[str, Agreement]
    """transformers with the exported folder against the training; without students whose export an
    earlier version has checked.
    """
    engines: dict[str, Agreement]
    """The serving engine against transformers."""


class FormerExportCheck(FrozenModel):
    """The largest differences that earlier versions wrote, in nats."""

    max_logit_difference: float
    """Largest difference of the exported weights, loaded without an engine."""
    max_engine_logprob_difference: float
    """Largest difference of the log-probabilities of the serving engine."""
    tolerance: float
    """Largest difference that was allowed."""


class StageFigures(FrozenModel):
    """Time and cost of one stage."""

    stage: str
    """Name of the stage, after its round where there are several."""
    seconds: float
    cost: float | None
    """Price of its engines and training workers, at the config's prices."""
    detail: str
    """Summary of the stage."""
    unended: int
    """Attempts that did not end, whose time and cost are not counted."""


class EvaluateStageFigures(FrozenModel):
    """Time and cost of the evaluation, which writes the report before its own stage record.

    The fields are those of `StageFigures` in another order, that of the JSON keys.
    """

    stage: str
    cost: float | None
    detail: str
    unended: int
    seconds: float
    engine_seconds: dict[str, float]
    """Seconds of each model's engine."""


class RoundFigures(FrozenModel):
    """One round of training, and its student on the hold-out split of the last round."""

    round: int
    sequences: int
    """Sequences that the round trained on."""
    by_student: int
    """Sequences among them that the student has written."""
    steps: int
    tokens: int
    """Tokens of all steps."""
    seconds: float
    """Seconds of the round's stages up to the export."""
    domains: dict[str, DomainFigures]


class Report(FrozenModel):
    """The report of a run, the content of `report.json`."""

    run: RunProvenance
    models: list[ModelFigures]
    """All served models: teachers in the config's order, then the student, then the twin."""
    caches: dict[str, CacheFigures]
    combine: str
    """Method that combines the teachers."""
    weights: dict[str, dict[str, float]]
    """Mean weight of each teacher, by domain."""
    product: dict[str, ProductFigures]
    """Figures of each domain where teachers combine as a product; otherwise empty."""
    learned_weights: dict[str, Any] | None
    """Provenance of learned weights as the run keeps it; None where weights are not learned."""
    synthesis: dict[str, dict[str, int]]
    """Counts of answers by author and reason."""
    filters: list[FilterCounts]
    curves: dict[str, list[dict[str, int | float]]]
    """Lines of the training metrics of each student."""
    renormalised_sequences: int
    """Sequences without a teacher's row, where the weights of the other teachers are scaled up."""
    export_check: ExportCheck | FormerExportCheck
    prompts: dict[str, int]
    """Counts of prompts."""
    stages: list[EvaluateStageFigures | StageFigures]
    rounds: list[RoundFigures]
    """One entry per round; empty where there is only one round."""
    fidelity: list[FidelityFigures] = []
    """Closeness of student, twin and start to the mixture and to each teacher; empty where they
    cannot be measured."""
    differences: list[DifferenceFigures] = []
    """Differences of the student from the twin and from its start."""
    shown_prompts: list[ShownPrompt] = []
    """Some hold-out prompts with the answers of all models."""
    preferences: list[PreferenceFigures] = []
    """A judge's preferences; empty where `evaluation.judge` is not set."""

    @property
    def student(self) -> ModelFigures:
        """The distilled student."""
        return next(model for model in self.models if model.role == "student")

    @property
    def domains(self) -> list[str]:
        """All domains in which a model was measured."""
        return list(dict.fromkeys(name for model in self.models for name in model.domains))
