"""One training: everything that decides the trained weights, and where its outputs lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache.kinds import hidden_states_of
from pipeline.combine.learned import learned_weights, with_learned
from pipeline.combine.weights import required_teachers
from pipeline.config.combine import ByDomainWeights, CombineConfig
from pipeline.config.losses import (
    CrossEntropy,
    HiddenStatesLoss,
    Loss,
    TeacherLoss,
    sequences_together,
)
from pipeline.config.run import Config
from pipeline.layout import CacheLayout, Layout
from pipeline.run.prepared_run import Run

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
"""Keys of `training` that may change between two starts of one training.

`losses` enters an identity as the losses of the student or of the twin, and `deepspeed` without its
ZeRO stage.
"""
NEUTRAL_STUDENT_KEYS = {
    *("cost_per_hour", "vllm", "replicas", "model", "revision", "initial_weights"),
    # the tokenizer's hash holds them
    *("eos_token", "chat_template", "template_arguments", "template_date"),
}
COMPLETE = "COMPLETE"
"""The file that is written last into a checkpoint's folder."""


@dataclass(frozen=True)
class TrainingSpec:
    """One training, as the launcher hands it to every worker.

    Attributes:
        config: config of the run.
        layout: paths of the run.
        dataset_digest: digest of the dataset that is trained on.
        student: `student` or `twin`; it names the training folder.
        losses: losses of this training; a twin has cross-entropy alone.
        caches: folders of the caches of distributions and of hidden states, by cache name; a cache
            that no loss needs may be missing.
        cache_fingerprints: digest of each cache's identity, by cache name.
        start: identity of the model that the student starts from.
        tokenizer: hash of the tokenizer of all sequences.
        learned: learned weights, by domain and teacher; empty if the weights are not learned.
        end_of_answer: token that ends an answer; it decides nothing but the export's end tokens.
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
    end_of_answer: int | None = None

    @property
    def seed(self) -> int:
        """Seed of initialisation and data order; each round has its own."""
        return self.config.seed + self.config.round - 1

    @property
    def folder(self) -> str:
        return self.layout.training_folder(self.student)

    @property
    def metrics_path(self) -> str:
        return self.layout.metrics(self.student)

    @property
    def summary_path(self) -> str:
        """Path of the file that is written last; if it exists, the training is complete."""
        return self.layout.training_summary(self.student)

    @property
    def combine(self) -> CombineConfig:
        """Settings of the combination, with learned weights replaced by the weights themselves."""
        return with_learned(self.config.combine, self.learned)

    @property
    def uses_teachers(self) -> bool:
        """Whether a loss compares with the teachers' distributions."""
        return any(isinstance(loss, TeacherLoss) for loss in self.losses)

    @property
    def hidden_states_teachers(self) -> list[str]:
        """The teachers whose hidden states a loss needs."""
        return sorted({loss.teacher for loss in self.losses if isinstance(loss, HiddenStatesLoss)})

    @property
    def sequences_together(self) -> int:
        """Number of consecutive sequences of a batch that must share one micro-batch."""
        return sequences_together(self.losses)

    @property
    def zero_stage(self) -> int:
        return int(self.config.training.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def identity(self) -> dict[str, Any]:
        """Everything that decides the trained weights, as a JSON value."""
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


def training_specs(run: Run, dataset_digest: str) -> list[TrainingSpec]:
    """Trainings of the student and of the twin, which learns from the same text alone.

    Raises:
        ConfigError: the weights are learned, and the score stage has not finished.
    """
    config, layout = run.config, run.layout
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
            caches=run.cache_layouts(),
            cache_fingerprints=run.prepared.cache_fingerprints,
            start=run.prepared.student_identity,
            tokenizer=run.prepared.tokenizer_hash,
            learned=learned,
            end_of_answer=run.prepared.answer_ends.chat,
        )
        for label, terms in losses.items()
    ]


def is_complete_checkpoint(folder: str) -> bool:
    """Whether a local folder is a training checkpoint that was written completely."""
    return Path(folder, COMPLETE).is_file()


def _without_stage(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed options without the ZeRO stage.

    All ZeRO stages compute the same. Resuming checks by itself whether a checkpoint can be loaded
    at another stage.
    """
    zero = {k: v for k, v in deepspeed.get("zero_optimization", {}).items() if k != "stage"}
    rest = {k: v for k, v in deepspeed.items() if k != "zero_optimization"}
    return rest | ({"zero_optimization": zero} if zero else {})


def used_teachers(config: Config) -> list[str]:
    """Teachers that can have a weight in some domain, in the config's order."""
    weights = config.combine.weights
    domains = list(weights.domains) if isinstance(weights, ByDomainWeights) else [""]
    used = {
        name
        for domain in domains
        for name in required_teachers(config.combine, config.scoring_teachers, domain)
    }
    return [name for name in config.scoring_teachers if name in used]
