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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.cache.reader import CacheReader
from pipeline.records import DatasetEntry, SparseLogprobs
from students.architecture.body import body_hidden_states
from students.architecture.build import load_model
from students.architecture.head import lm_head_of, logit_softcap
from students.data.examples import Example, Examples
from students.data.packing import pack, plan_micro_batches, refuse_long_sequences
from students.losses.distillation import position_figures
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


@dataclass
class _Sums:
    """Sums over positions of one domain; `tokens` are positions."""

    tokens: int = 0
    loss: float = 0.0
    kl_to_mixture: float = 0.0
    agreement: float = 0.0
    bounded_mass: float = 0.0
    has_estimates: bool = False

    def add_estimated(self, loss: np.ndarray) -> None:
        """Adds positions whose mixture is known by draws alone."""
        self.tokens += len(loss)
        self.loss += float(loss.sum())
        self.has_estimates = True

    def add(
        self,
        loss: np.ndarray,
        kl: np.ndarray,
        agrees: np.ndarray,
        bounded: np.ndarray | None = None,
    ) -> None:
        self.tokens += len(loss)
        self.loss += float(loss.sum())
        self.kl_to_mixture += float(kl.sum())
        self.agreement += float(agrees.sum())
        self.bounded_mass += 0.0 if bounded is None else float(bounded.sum())

    def means(self, *, bounded: bool) -> Means:
        names = ["kl_to_mixture", "agreement"] + (["bounded_mass"] if bounded else [])
        means = {
            name: None if self.has_estimates else getattr(self, name) / self.tokens
            for name in names
        }
        # JSON knows no infinity
        loss = self.loss / self.tokens if math.isfinite(self.loss) else None
        return {"tokens": self.tokens, "loss": loss, **means}


@torch.no_grad()
def holdout_numbers(
    model_folder: str | Path,
    entries: Sequence[DatasetEntry],
    examples: Examples,
    tokens_per_micro_batch: int,
    device: str = "cpu",
    trust_remote_code: bool = False,
    packing: bool = True,
) -> dict[str, Means]:
    """A student's numbers on hold-out sequences, by domain.

    Returns:
        For each domain `tokens`, `loss` (cross-entropy with the text), `kl_to_mixture`, and
        `agreement` (share of positions where its most probable token is the mixture's, or one of
        the mixture's tokens that tie).

    Raises:
        CacheError: the caches do not cover a sequence.
        TrainingError: a sequence is longer than the budget.
    """
    model = load_model(model_folder, trust_remote_code, device)
    lm_head, softcap = lm_head_of(model), logit_softcap(model)
    sums: dict[str, _Sums] = {}
    refuse_long_sequences(
        [(entry.sequence_id, entry.num_tokens) for entry in entries], tokens_per_micro_batch
    )
    for domain, members in _by_domain(entries):
        for row in plan_micro_batches(
            [entry.num_tokens for entry in members], tokens_per_micro_batch, 1, not packing
        )[0]:
            together = [examples[members[i]] for i in row]
            batch = MicroBatch.of(pack(together, not packing), device)
            hidden_PH = body_hidden_states(model, batch.input_ids, batch.position_ids)[
                batch.logit_indices
            ]
            measured = position_figures(
                hidden_PH, lm_head.weight, lm_head.bias, batch.targets, KL_TO_MIXTURE, softcap
            )
            loss, kl = measured.figures.double().cpu().numpy()
            domain_sums = sums.setdefault(domain, _Sums())
            if any(example.is_estimate for example in together):
                domain_sums.add_estimated(loss)
                continue
            argmax_ids = measured.argmax_ids.cpu().numpy()
            domain_sums.add(loss, kl, _agreements(together, argmax_ids))
    return _means(sums, bounded=False)


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
        sums: dict[str, _Sums] = {}
        for domain, members in _by_domain(entries):
            for entry in members:
                row = reader.row(entry.sequence_id)
                if row is None:
                    continue
                gold_P = row.gold_logprobs.astype(np.float64)
                example, loss = examples[entry], np.where(gold_P > MASKED, -gold_P, np.inf)
                domain_sums = sums.setdefault(domain, _Sums())
                if row.is_drawn or example.is_estimate:
                    domain_sums.add_estimated(loss)
                    continue
                kl_P, bounded_P = bounded_divergence(example, row)
                first = np.concatenate([[0], np.cumsum(row.num_entries, dtype=np.int64)[:-1]])
                agrees_P = is_likeliest(example, row.token_ids[first].astype(np.int64))
                domain_sums.add(loss, kl_P, agrees_P, bounded_P)
        numbers[name] = _means(sums, bounded=True)
    return numbers


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


def _agreements(examples: Sequence[Example], ids_P: np.ndarray) -> np.ndarray:
    """bool[P]: `is_likeliest` at the positions of several examples, one after another."""
    ends = np.cumsum([len(example.gold_ids) for example in examples])
    parts = zip(examples, np.split(ids_P, ends[:-1]), strict=True)
    return np.concatenate([is_likeliest(example, ids) for example, ids in parts])


def _padded(row: SparseLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64[P, K] and log-probabilities float64[P, K] of a row, padded with -inf."""
    kept_PK = np.arange(int(row.num_entries.max())) < row.num_entries[:, None]
    ids_PK, logprobs_PK = np.zeros(kept_PK.shape, np.int64), np.full(kept_PK.shape, -np.inf)
    ids_PK[kept_PK], logprobs_PK[kept_PK] = row.token_ids, row.logprobs
    return ids_PK, logprobs_PK


def _by_domain(entries: Sequence[DatasetEntry]) -> Iterator[tuple[str, list[DatasetEntry]]]:
    for domain in sorted({entry.domain for entry in entries}):
        yield domain, [entry for entry in entries if entry.domain == domain]


def _means(sums: dict[str, _Sums], *, bounded: bool) -> dict[str, Means]:
    return {domain: part.means(bounded=bounded) for domain, part in sums.items()}
