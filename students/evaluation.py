"""Hold-out numbers: a student's by a forward pass of its exported folder, the teachers' from their
caches alone.

All numbers are averages over the positions of a domain, in nats. KL is measured to the mixture of
the teachers as in training: sum_m w_m KL(p_m || q), each teacher's kept ids apart and the rest in
one bucket.

Where rows hold draws, KL and agreement are None: KL is not linear in p, so that the draws' own lack
of entropy would be added to it, and the likeliest token need not have been drawn.

Legend: M teachers of positive weight, P positions, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.cache.reader import CacheReader
from pipeline.config.combine import CombineConfig, StaticWeights
from pipeline.config.student import StudentConfig
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, SparseLogprobs
from pipeline.report.fidelity import SequenceSums, Target
from pipeline.rope import length_bounds
from students.architecture.body import body_hidden_states
from students.architecture.build import build_student
from students.architecture.head import lm_head_of, logit_step
from students.data.examples import Example, Examples
from students.data.packing import pack, plan_groups, refuse_long_sequences
from students.losses.distillation import PositionFigures, position_figures
from students.losses.divergences import ForwardKL
from students.micro_batch import MicroBatch

MASS_FLOOR = 1e-4
"""Least mass of an id or a bucket outside the kept ids: a stored tail of 0 may be a tail that
float16 rounded away.
"""
ID_RANGE = 2**24
"""Above any token id."""
POSITIONS_AT_ONCE = 512
"""Positions whose entries are compared pair by pair together: 256 entries on each side make 32 MiB
of truth values.
"""
MASKED = float(np.finfo(np.float16).min)
"""Stored log-probability of a gold token that the teacher gives no probability."""
SUM_ROUNDING = 1e-9
"""Relative rounding of a sum: far above that of a few float64 parts, below the step of float16."""
KL_TO_MIXTURE = (ForwardKL(name="forward_kl", weight=1.0),)
"""The KL of every student, whatever it was trained on."""
Means = dict[str, float | None]


@dataclass(frozen=True)
class Measured:
    """One target of a student's measurement.

    Attributes:
        examples: hold-out sequences combined to this target.
        scored: ids of the sequences that have it; None for all.
    """

    examples: Examples
    scored: Container[str] | None = None

    def has(self, entry: DatasetEntry) -> bool:
        """Whether a sequence has this target."""
        return self.scored is None or entry.sequence_id in self.scored


def measured_targets(
    layout: Layout, mixture: Examples, readers: Mapping[str, CacheReader], vocabulary: int
) -> dict[Target, Measured]:
    """The mixture, and each teacher alone.

    Args:
        mixture: hold-out sequences combined as in training.
        readers: open caches of the teachers.
        vocabulary: rows of the student's LM head.
    """
    targets: dict[Target, Measured] = {None: Measured(mixture)}
    for name, reader in readers.items():
        alone = CombineConfig(
            method="mixture", weights=StaticWeights(type="static", teachers={name: 1.0})
        )
        examples = Examples(layout, {name: reader}, [name], alone, vocabulary)
        targets[name] = Measured(examples, reader)
    return targets


def load_start(config: StudentConfig, device: str) -> PreTrainedModel | None:
    """The model that training started from; None if that was random.

    Raises:
        TrainingError: it cannot be loaded.
    """
    if config.initialization == "random" and config.initial_weights is None:
        return None
    model = build_student(config, seed=0)
    nn.Module.to(model, torch.device(device))
    return model.eval()


@torch.no_grad()
def student_sums(
    model: PreTrainedModel,
    entries: Sequence[DatasetEntry],
    targets: Mapping[Target, Measured],
    tokens_per_micro_batch: int,
    packing: bool = True,
) -> dict[Target, dict[str, SequenceSums]]:
    """A student's sums on hold-out sequences, by target and sequence id; the body of the model runs
    once for all targets.

    Args:
        model: the student, on the device where it is measured.
        targets: what it is compared with; None, the mixture, has all sequences.

    Raises:
        CacheError: the caches do not cover a sequence.
        TrainingError: a sequence is longer than the budget.
    """
    lm_head, step = lm_head_of(model), logit_step(model)
    sums: dict[Target, dict[str, SequenceSums]] = {target: {} for target in targets}
    refuse_long_sequences(
        [(entry.sequence_id, entry.num_tokens) for entry in entries], tokens_per_micro_batch
    )
    lengths = [entry.num_tokens for entry in entries]
    bounds = length_bounds(model.config)
    for row in plan_groups(lengths, tokens_per_micro_batch, 1, not packing, 1, bounds)[0]:
        members = [entries[i] for i in row]
        together = [targets[None].examples[entry] for entry in members]
        batch = MicroBatch.of(pack(together, not packing), model.device)
        hidden_PH = body_hidden_states(model, batch.input_ids, batch.position_ids)[
            batch.logit_indices
        ]
        parts = hidden_PH.split([len(example.gold_ids) for example in together])
        for target, measured in targets.items():
            chosen = [i for i, entry in enumerate(members) if measured.has(entry)]
            if not chosen:
                continue
            examples = [measured.examples[members[i]] for i in chosen]
            found = position_figures(
                torch.cat([parts[i] for i in chosen]),
                lm_head.weight,
                lm_head.bias,
                MicroBatch.of(pack(examples), model.device).targets,
                KL_TO_MIXTURE,
                step,
            )
            for i, of_sequence in zip(chosen, _split(found, examples), strict=True):
                sums[target][members[i].sequence_id] = of_sequence
    return sums


def _split(found: PositionFigures, examples: Sequence[Example]) -> Iterator[SequenceSums]:
    """Sums of several sequences whose positions stand one after another."""
    loss_P, kl_P = found.figures.double().cpu().numpy()
    ids_P = found.argmax_ids.cpu().numpy()
    start = 0
    for example in examples:
        own = slice(start, start := start + len(example.gold_ids))
        is_known = not example.is_estimate
        yield SequenceSums(
            tokens=len(example.gold_ids),
            loss=float(loss_P[own].sum()),
            kl=float(kl_P[own].sum()) if is_known else None,
            agreement=float(is_likeliest(example, ids_P[own]).sum()) if is_known else None,
        )


def teacher_holdout_numbers(
    entries: Sequence[DatasetEntry], examples: Examples, readers: dict[str, CacheReader]
) -> dict[str, dict[str, Means]]:
    """Each teacher's numbers on the sequences that it has scored, from cached numbers alone.

    The mass that a teacher gives to an id that it has not kept is unknown but bounded, see
    `bounded_divergence`, so `kl_to_mixture` is a lower bound; `bounded_mass` is the share of the
    mixture's mass on such ids.

    Returns:
        `tokens`, `loss`, `kl_to_mixture`, `agreement` and `bounded_mass`, by teacher and domain.
        The loss of a teacher that masks a token of the text is infinite, and None here.
    """
    numbers = {}
    for name, reader in readers.items():
        sums = {
            entry.sequence_id: _teacher_sums(examples[entry], row)
            for entry in entries
            if (row := reader.row(entry.sequence_id)) is not None
        }
        numbers[name] = domain_means(entries, sums, bounded=True)
    return numbers


def _teacher_sums(example: Example, row: SparseLogprobs) -> SequenceSums:
    gold_P = row.gold_logprobs.astype(np.float64)
    loss = float(np.where(gold_P > MASKED, -gold_P, np.inf).sum())
    if row.is_drawn or example.is_estimate:
        return SequenceSums(len(gold_P), loss, None, None)
    kl_P, bounded_P = bounded_divergence(example, row)
    first = np.concatenate([[0], np.cumsum(row.num_entries, dtype=np.int64)[:-1]])
    agrees_P = is_likeliest(example, row.token_ids[first].astype(np.int64))
    return SequenceSums(
        len(gold_P), loss, float(kl_P.sum()), float(agrees_P.sum()), float(bounded_P.sum())
    )


def domain_means(
    entries: Sequence[DatasetEntry], sums: Mapping[str, SequenceSums], *, bounded: bool = False
) -> dict[str, Means]:
    """Means over the positions of each domain.

    Args:
        sums: sums by sequence id; a sequence may be missing.
        bounded: whether `bounded_mass` is one of the means.

    Returns:
        For each domain `tokens`, `loss` (cross-entropy with the text), `kl_to_mixture`, and
        `agreement` (share of positions where the most probable token is the mixture's, or one of
        the mixture's tokens that tie).
    """
    by_domain: dict[str, list[SequenceSums]] = {}
    for entry in entries:
        if entry.sequence_id in sums:
            by_domain.setdefault(entry.domain, []).append(sums[entry.sequence_id])
    return {domain: _means(by_domain[domain], bounded) for domain in sorted(by_domain)}


def _means(sums: Sequence[SequenceSums], bounded: bool) -> Means:
    tokens = sum(of_sequence.tokens for of_sequence in sums)
    kl = [of_sequence.kl for of_sequence in sums if of_sequence.kl is not None]
    agreement = [of_sequence.agreement for of_sequence in sums if of_sequence.agreement is not None]
    is_known = len(kl) == len(sums)
    loss = sum(of_sequence.loss for of_sequence in sums) / tokens
    means: Means = {
        "tokens": tokens,
        # JSON knows no infinity
        "loss": loss if math.isfinite(loss) else None,
        "kl_to_mixture": sum(kl) / tokens if is_known else None,
        "agreement": sum(agreement) / tokens if is_known else None,
    }
    if bounded:
        mass = sum(of_sequence.bounded_mass for of_sequence in sums)
        means["bounded_mass"] = mass / tokens if is_known else None
    return means


def bounded_divergence(example: Example, row: SparseLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """A lower bound of sum_m w_m KL(p_m || p_t) for a teacher t known by its kept entries.

    An id of p_m that t has not kept has at most the smaller of t's least kept probability and t's
    tail; the bucket of p_m has at most t's tail and its kept ids that are not shared. Larger
    probabilities make a KL smaller.

    Returns:
        float64[P]: the bound, and the mass of the mixture on ids that were bounded.
    """
    ids_PK, logprobs_PK = _padded(row)
    kl_P, bounded_P = np.zeros(len(ids_PK)), np.zeros(len(ids_PK))
    for start in range(0, len(ids_PK), POSITIONS_AT_ONCE):
        some = slice(start, start + POSITIONS_AT_ONCE)
        kept, tail_P = (ids_PK[some], logprobs_PK[some]), row.tail_mass[some].astype(np.float64)
        for m, weights_P in enumerate(example.teacher_weights[:, some].astype(np.float64)):
            theirs = (example.token_ids[m, some], example.logprobs[m, some].astype(np.float64))
            their_tail_P = example.tail_mass[m, some].astype(np.float64)
            bound_P, outside_P = _bounded(theirs, their_tail_P, kept, tail_P)
            kl_P[some] += weights_P * bound_P
            bounded_P[some] += weights_P * outside_P
    return kl_P, bounded_P


def _bounded(
    theirs: tuple[np.ndarray, np.ndarray],
    their_tail_P: np.ndarray,
    kept: tuple[np.ndarray, np.ndarray],
    tail_P: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`bounded_divergence` from one p_m.

    Args:
        theirs, their_tail_P: ids and log-probabilities [P, K] of p_m, and its tail.
        kept, tail_P: ids and log-probabilities [P, K] of t, and its tail.
    """
    (their_ids_PK, p_logs_PK), (ids_PK, logprobs_PK) = theirs, kept
    kept_PK = np.exp(logprobs_PK)
    least_P = np.where(np.isfinite(logprobs_PK), kept_PK, np.inf).min(axis=1)
    ceiling_P = np.log(np.minimum(least_P, np.maximum(tail_P, MASS_FLOOR)))
    present_PK, p_PK = np.isfinite(p_logs_PK), np.exp(p_logs_PK)
    matches_PKK = their_ids_PK[:, :, None] == ids_PK[:, None, :]
    matches_PKK &= np.isfinite(logprobs_PK)[:, None, :]
    shared_PK = matches_PKK.any(axis=2) & present_PK
    q_logs_PK = np.take_along_axis(logprobs_PK, matches_PKK.argmax(axis=2), axis=1)
    q_logs_PK = np.where(shared_PK, q_logs_PK, ceiling_P[:, None])
    terms_PK = np.where(present_PK, p_PK * (np.where(present_PK, p_logs_PK, 0.0) - q_logs_PK), 0.0)
    shared_q_P = np.where(shared_PK, np.exp(q_logs_PK), 0.0).sum(axis=1)
    bucket_P = np.maximum(tail_P + kept_PK.sum(axis=1) - shared_q_P, MASS_FLOOR)
    tail_logs_P = np.log(np.where(their_tail_P > 0, their_tail_P, 1.0))
    tail_term_P = np.where(their_tail_P > 0, their_tail_P * (tail_logs_P - np.log(bucket_P)), 0.0)
    outside_PK = np.where(present_PK & ~shared_PK, p_PK, 0.0)
    return terms_PK.sum(axis=1) + tail_term_P, outside_PK.sum(axis=1)


def is_likeliest(example: Example, ids_P: np.ndarray) -> np.ndarray:
    """bool[P]: whether no id has a larger sum_m w_m p_m over kept ids.

    LM heads in bfloat16 tie often, and float16 stores close values as one: then each of the
    likeliest ids is the mixture's. Rounding keeps the order of a teacher, so values that are stored
    apart are apart; sums of the same parts may differ in their last bits.
    """
    mass_MPK = example.teacher_weights[:, :, None].astype(np.float64) * np.exp(
        example.logprobs.astype(np.float64)
    )
    places_P = np.arange(len(ids_P), dtype=np.int64) * ID_RANGE
    keys, inverse = np.unique((example.token_ids + places_P[:, None]).ravel(), return_inverse=True)
    masses = np.bincount(inverse, weights=mass_MPK.ravel())
    largest_P = np.maximum.reduceat(masses, np.searchsorted(keys, places_P))
    keys_P = ids_P + places_P
    where_P = np.minimum(np.searchsorted(keys, keys_P), len(keys) - 1)
    return (keys[where_P] == keys_P) & (masses[where_P] >= largest_P * (1 - SUM_ROUNDING))


def _padded(row: SparseLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64[P, K] and log-probabilities float64[P, K] of a row, padded with -inf."""
    kept_PK = np.arange(int(row.num_entries.max())) < row.num_entries[:, None]
    ids_PK, logprobs_PK = np.zeros(kept_PK.shape, np.int64), np.full(kept_PK.shape, -np.inf)
    ids_PK[kept_PK], logprobs_PK[kept_PK] = row.token_ids, row.logprobs
    return ids_PK, logprobs_PK
