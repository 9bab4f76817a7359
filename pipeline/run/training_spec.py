"""What a training is: everything that decides the trained weights, and where its outputs lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache.projection import hidden_states_of
from pipeline.combine.learned import learned_weights, with_learned
from pipeline.combine.weights import required_teachers
from pipeline.config.combine import ByDomainWeights, CombineConfig
from pipeline.config.losses import CrossEntropy, Loss, StateLoss, TeacherLoss, sequences_together
from pipeline.config.run import Config
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.run.preparation import Prepared

NEUTRAL_TRAINING_KEYS = {
    "workers",
    "resources",
    "loader_processes",
    "log_every_steps",
    "evaluate_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "max_failures",
    "cost_per_hour",
    "tokens_per_micro_batch",
    "packing",
    "losses",
    "allow_resume_with",
    "deepspeed",
}
"""Training keys that may change between two starts; `losses` enters as those of the job, and
`deepspeed` without its ZeRO stage.
"""
NEUTRAL_STUDENT_KEYS = {"cost_per_hour", "vllm", "replicas", "model", "revision", "initial_weights"}
COMPLETE = "COMPLETE"
"""The file that a checkpoint's folder gets last of all."""


@dataclass(frozen=True)
class TrainingSpec:
    """One training, as the launcher hands it to every worker.

    Attributes:
        student: `student` or `twin`: names the training folder.
        losses: of this training; a twin has cross-entropy alone.
        caches: by name, of distributions and of hidden states; those that no loss needs may be
            missing.
        cache_fingerprints: by name of the cache, of the recipe that filled it.
        start: identity of the model that the student starts from.
        tokenizer: hash of the tokenizer of all sequences.
        learned: by domain and teacher, where weights are learned.
    """

    config: Config
    layout: Layout
    dataset_digest: str
    student: str
    losses: tuple[Loss, ...]
    caches: dict[str, CacheLayout]
    cache_fingerprints: dict[str, str]
    start: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    learned: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of initialisation and data order; each round has its own."""
        return self.config.seed + self.config.round - 1

    @property
    def folder(self) -> str:
        return self.layout.training_folder(self.student)

    @property
    def metrics_path(self) -> str:
        return self.layout.metrics(self.student)

    @property
    def summary_path(self) -> str:
        """Written last of all: its existence means that the training is complete."""
        return self.layout.training_summary(self.student)

    @property
    def combine(self) -> CombineConfig:
        """How the teachers combine, with weights that can be looked up."""
        return with_learned(self.config.combine, self.learned)

    @property
    def uses_teachers(self) -> bool:
        """Whether a loss is against the teachers' distributions."""
        return any(isinstance(loss, TeacherLoss) for loss in self.losses)

    @property
    def hidden_states_teachers(self) -> list[str]:
        """The teachers whose hidden states a loss needs."""
        return sorted({loss.teacher for loss in self.losses if isinstance(loss, StateLoss)})

    @property
    def sequences_together(self) -> int:
        """How many sequences in a row of a step's batch stay in one micro-batch."""
        return sequences_together(self.losses)

    @property
    def zero_stage(self) -> int:
        return int(self.config.training.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights, as a JSON value."""
        config = self.config.model_dump(mode="json")
        used = used_teachers(self.config) if self.uses_teachers else []
        used += [hidden_states_of(teacher) for teacher in self.hidden_states_teachers]
        return {
            "seed": self.seed,
            "tokenizer": self.tokenizer,
            "dataset_digest": self.dataset_digest,
            "caches": {
                name: {
                    "fingerprint": self.cache_fingerprints[name],
                    "generation": self.caches[name].generation,
                }
                for name in used
                if name in self.caches
            },
            "combine": self._combine_identity() if self.uses_teachers else None,
            "start": self.start,
            "student": {
                k: v for k, v in config["student"].items() if k not in NEUTRAL_STUDENT_KEYS
            },
            "losses": [loss.model_dump(mode="json") for loss in self.losses],
            "training": {
                k: v for k, v in config["training"].items() if k not in NEUTRAL_TRAINING_KEYS
            }
            | {"deepspeed": _without_stage(config["training"]["deepspeed"])},
        }

    def _combine_identity(self) -> dict[str, Any]:
        combine = self.config.combine.model_dump(mode="json")
        return combine | ({"learned": self.learned} if self.learned else {})


def training_specs(
    config: Config, layout: Layout, prepared: Prepared, dataset_digest: str
) -> list[TrainingSpec]:
    """The student, and the twin that learns from the same sequences by cross-entropy alone.

    Raises:
        ConfigError: the weights are learned, and score has not finished.
    """
    losses = {"student": tuple(config.training.losses)}
    learned = learned_weights(config.combine, layout)
    if config.evaluation.twin:
        losses["twin"] = (CrossEntropy(type="cross_entropy", weight=1.0),)
    return [
        TrainingSpec(
            config=config,
            layout=layout,
            dataset_digest=dataset_digest,
            student=label,
            losses=terms,
            caches=prepared.caches(layout),
            cache_fingerprints={n: digest_json(r) for n, r in prepared.scoring_recipes.items()},
            start=prepared.student,
            tokenizer=prepared.tokenizer_hash,
            learned=learned,
        )
        for label, terms in losses.items()
    ]


def is_complete_checkpoint(folder: str) -> bool:
    """Whether a local folder is a training checkpoint that was written to its end."""
    return Path(folder, COMPLETE).is_file()


def _without_stage(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """The stages compute the same; whether a checkpoint loads at another is checked apart."""
    zero = {k: v for k, v in deepspeed.get("zero_optimization", {}).items() if k != "stage"}
    rest = {k: v for k, v in deepspeed.items() if k != "zero_optimization"}
    return rest | ({"zero_optimization": zero} if zero else {})


def used_teachers(config: Config) -> list[str]:
    """The teachers that can weigh anything in any domain, in the config's order."""
    weights = config.combine.weights
    domains = list(weights.domains) if isinstance(weights, ByDomainWeights) else [""]
    used = {
        name
        for domain in domains
        for name in required_teachers(config.combine, config.scoring_teachers, domain)
    }
    return [name for name in config.scoring_teachers if name in used]
