"""The students of `benchmarks/quality.py`: what each learns from, how it is trained, and the file
that its losses come to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.common import ROOT
from benchmarks.quality_study.material import DOMAINS, SYNTHETIC, Material, MaterialSize, Shape
from benchmarks.quality_study.training import (
    CROSS_ENTROPY,
    FORWARD_KL,
    dense_kl,
    steps,
    text_alone,
    text_loss,
    train,
)
from examples.gsm8k import make_teachers as gsm8k
from pipeline import storage
from pipeline.combine.learned import DECIMALS, likeliest_mixture, with_learned
from pipeline.combine.weights import combine_targets, required_teachers
from pipeline.config.combine import (
    ByDomainWeights,
    CombineConfig,
    ConfidenceWeights,
    GoldLikelihoodWeights,
    LearnedWeights,
    StaticWeights,
)
from pipeline.config.scoring import HeadAndSampled, Sampled, Selection, TopK, TopP
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import TokenSequence
from students.data.examples import Example, example_of
from students.model import StudentModule

RATE = 3e-3
GROUP = 4
"""Sequences of each domain in a step."""
TOP_12 = TopK(type="top_k", max_entries=12)
TOP_P = TopP(type="top_p", mass=0.9, max_entries=64)
SAMPLED = Sampled(type="sampled", num_draws=25)
HEADED = HeadAndSampled(type="head_and_sampled", head_mass=0.5, max_head_entries=64, num_draws=16)
OWN = CombineConfig(
    method="mixture",
    weights=ByDomainWeights(type="by_domain", domains={d: {d: 1.0} for d in DOMAINS}),
)


def _static(*teachers: str) -> CombineConfig:
    weights = StaticWeights(type="static", teachers=dict.fromkeys(teachers, 1.0))
    return CombineConfig(method="mixture", weights=weights)


BY_GOLD = GoldLikelihoodWeights(type="gold_likelihood", temperature=1.0, per="token")
SURER = ConfidenceWeights(type="confidence", temperature=1.0, per="token")


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    Attributes:
        text: given, or the teachers' answers to the same prompts.
        selection: what is kept of the teachers' distributions; None for all or nothing.
        combine: None for the text alone.
        renormalised: kept entries are scaled to mass 1, and the tail is forgotten.
    """

    text: str
    selection: Selection | None = None
    combine: CombineConfig | None = None
    renormalised: bool = False


SINGLE = {f"{name} alone": Method("train", HEADED, _static(name)) for name in DOMAINS}
COMBINED = {
    "uniform mixture": Method("train", HEADED, _static(*DOMAINS)),
    "gold_likelihood": Method("train", HEADED, CombineConfig(method="mixture", weights=BY_GOLD)),
    "confidence": Method("train", HEADED, CombineConfig(method="mixture", weights=SURER)),
    "learned": Method(
        "train", HEADED, CombineConfig(method="mixture", weights=LearnedWeights(type="learned"))
    ),
    "route": Method(
        "train",
        HEADED,
        CombineConfig(method="route", weights=BY_GOLD.model_copy(update={"per": "sequence"})),
    ),
}
METHODS = {
    "text": Method("train"),
    "synthetic text": Method(SYNTHETIC),
    "top_k renormalised": Method("train", TOP_12, OWN, renormalised=True),
    "top_p": Method("train", TOP_P, OWN),
    "sampled": Method("train", SAMPLED, OWN),
    "head_and_sampled": Method("train", HEADED, OWN),
    "full": Method("train", None, OWN),
    **SINGLE,
    **COMBINED,
}
"""Those from `top_k renormalised` to `full` learn each text from the teacher of its domain."""
SOURCES = [
    "benchmarks/quality_study/students.py",
    *("pipeline/cache/selection.py", "pipeline/combine/weights.py", "pipeline/combine/learned.py"),
    *(
        "students/data/examples.py",
        "students/data/packing.py",
        "students/model.py",
        "students/architecture/build.py",
        "students/architecture/body.py",
        "students/architecture/head.py",
        "students/losses/distillation.py",
    ),
    *("students/losses/chunk.py", "students/losses/divergences.py"),
    *("students/losses/inputs.py", "students/losses/outcomes.py"),
]
"""The modules that decide a student's losses, beside those that decide the material."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        positions: that each student is trained on.
    """

    material: MaterialSize
    student: Shape
    positions: int
    seeds: int


@dataclass(frozen=True)
class Cell:
    """One student to train."""

    material: Material
    size: Size
    method: str
    seed: int

    @property
    def path(self) -> Path:
        method = METHODS[self.method]
        digest = digest_json(
            [
                asdict(self.size.student),
                [self.size.positions, self.seed, RATE, GROUP, method.text, method.renormalised],
                method.selection and method.selection.model_dump(mode="json"),
                method.combine and method.combine.model_dump(mode="json"),
                [digest_bytes((ROOT / name).read_bytes()) for name in SOURCES],
            ]
        )
        name = f"{self.method.replace(' ', '_')}-{self.seed}-{digest[:12]}.json"
        return self.material.folder / "students" / name


def train_student(cell: Cell) -> str:
    """Trains a student and writes its losses; returns a line for people."""
    started, method = time.perf_counter(), METHODS[cell.method]
    material, size = cell.material, cell.size
    is_full = method.combine is not None and method.selection is None
    teachers = {domain: material.teacher(domain) for domain in DOMAINS} if is_full else {}
    config = gsm8k.llama_config(material.tokenizer, **asdict(size.student))
    torch.manual_seed(1_000 + cell.seed)
    terms = CROSS_ENTROPY if method.combine is None else FORWARD_KL
    module = StudentModule(LlamaForCausalLM(config), terms)
    given = {domain: material.sequences(domain, method.text) for domain in DOMAINS}
    build = _texts_alone if method.selection is None else partial(_with_rows, material, method)
    last = train(
        module,
        steps({domain: list(build(each)) for domain, each in given.items()}, GROUP, cell.seed),
        lambda domain, batch: (
            dense_kl(module.model, teachers[domain], batch) if teachers else module(batch)[0]
        ),
        size.positions,
        RATE,
    )
    found = {
        split: {d: text_loss(module.model, material.sequences(d, split)) for d in DOMAINS}
        for split in ("validation", "holdout")
    }
    seconds, parameters = time.perf_counter() - started, module.model.num_parameters()
    written = found | {"parameters": parameters, "training_loss": last, "seconds": seconds}
    storage.write_json(str(cell.path), written)
    mean = statistics.mean(found["validation"].values())
    return f"{cell.method}, seed {cell.seed}: validation {mean:.4f}, {seconds:.0f} s"


def _texts_alone(sequences: Sequence[TokenSequence]) -> Iterator[Example]:
    return map(text_alone, sequences)


def _with_rows(
    material: Material, method: Method, sequences: Sequence[TokenSequence]
) -> Iterator[Example]:
    """As a training's loader makes them from caches."""
    combine, names = combination(material, method), list(DOMAINS)
    assert combine is not None and method.selection is not None
    needed = required_teachers(combine, names, sequences[0].domain)
    rows = {name: material.rows(name, method.selection, "train") for name in needed}
    for sequence in sequences:
        mine = tuple(rows[n][sequence.sequence_id] if n in rows else None for n in names)
        example = example_of(combine_targets(sequence, mine, names, combine))
        yield _renormalised(example) if method.renormalised else example


def _renormalised(example: Example) -> Example:
    logs_MPK = example.logprobs.astype(np.float32)
    logs_MPK -= np.log(np.exp(logs_MPK).sum(axis=2, keepdims=True))
    return replace(example, logprobs=logs_MPK, tail_mass=np.zeros_like(example.tail_mass))


def combination(material: Material, method: Method) -> CombineConfig | None:
    """How a method combines the teachers, with learned weights as what they came to."""
    if method.combine is None or not isinstance(method.combine.weights, LearnedWeights):
        return method.combine
    return with_learned(method.combine, learned(material))


def learned(material: Material) -> dict[str, dict[str, float]]:
    """By domain the weights under which the validation split is likeliest, as the score stage has
    them.
    """
    rows = [material.rows(name, HEADED, "validation") for name in DOMAINS]
    table = {}
    for domain in DOMAINS:
        names = [sequence.sequence_id for sequence in material.sequences(domain, "validation")]
        gold_MP = [np.concatenate([each[n].gold_logprobs for n in names]) for each in rows]
        weights_M, _ = likeliest_mixture(np.stack(gold_MP).astype(np.float64))
        rounded = [round(float(weight), DECIMALS) for weight in weights_M]
        table[domain] = dict(zip(DOMAINS, rounded, strict=True))
    return table
