"""Learned weights: for each domain, the mixture under which the validation split is likeliest.

    caches, validation split -> gold log-probabilities -> weights -> <run>/learned_weights.json

Only cached numbers are read, and nothing of the hold-out split. The score stage fits the weights
once every row is there; later stages take the result as weights by domain.

Legend: M teachers, P positions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from pipeline import storage
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.config.combine import ByDomainWeights, CombineConfig, LearnedWeights
from pipeline.errors import ConfigError
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry

logger = logging.getLogger(__name__)

SPLIT = "validation"
POSITIONS_OF_A_DOMAIN = 2**17
"""Number of positions up to which whole sequences are taken: enough to know a weight to a few
thousandths."""
GAP_NATS = 1e-5
"""Distance from the best mean log-likelihood at which the fit stops."""
MOST_STEPS = 10_000
DECIMALS = 6
"""Decimals of the stored weights; another order of summation changes only later decimals."""
WeightsByDomain = dict[str, dict[str, float]]
"""Weight of each teacher, by domain and teacher."""


def learn_weights(
    layout: Layout,
    caches: Mapping[str, CacheLayout],
    fingerprints: Mapping[str, str],
    dataset: str,
    entries: Sequence[DatasetEntry],
) -> WeightsByDomain:
    """Fits the weights of every domain of a dataset, and stores them in the run with their origin.

    Args:
        caches: caches of distributions by teacher.
        fingerprints: fingerprint of each cache by teacher.
        dataset: digest of the dataset of `entries`.

    Raises:
        ConfigError: a domain has no validation sequence that every teacher has scored.
    """
    readers = {name: open_cache(cache) for name, cache in sorted(caches.items())}
    weights, fits = {}, {}
    for domain in sorted({entry.domain for entry in entries}):
        members = [e for e in entries if e.domain == domain and e.split == SPLIT]
        chosen, fits[domain] = _chosen(members, readers)
        if not chosen:
            raise ConfigError(
                f"combine.weights of type learned: domain {domain!r} has {len(members)} sequences "
                f"in the {SPLIT} split, and none that {sorted(readers)} have all scored: raise "
                "prompts.validation_fraction, or choose other weights"
            )
        gold_MP = np.stack([_gold_logprobs(chosen, reader) for reader in readers.values()])
        possible_P = np.isfinite(gold_MP.max(axis=0))
        fits[domain]["impossible_positions"] = int((~possible_P).sum())
        gold_MP = gold_MP[:, possible_P]
        weights_M, gap = likeliest_mixture(gold_MP)
        stored = [round(float(weight), DECIMALS) for weight in weights_M]
        weights[domain] = dict(zip(readers, stored, strict=True))
        fits[domain] |= _likelihoods(gold_MP, np.array(stored), list(readers)) | {"gap_nats": gap}
        logger.info("learned weights of domain %s: %s", domain, weights[domain])
    provenance = {
        "dataset": dataset,
        "split": SPLIT,
        "caches": {
            name: {"fingerprint": fingerprints[name], "generation": caches[name].generation}
            for name in readers
        },
        "domains": fits,
    }
    storage.write_json(layout.learned_weights, {"weights": weights, "provenance": provenance})
    return weights


def learned_weights(config: CombineConfig, layout: Layout) -> WeightsByDomain:
    """Learned weights of a run; empty if its weights are not learned.

    Raises:
        ConfigError: the weights have not been learned yet.
    """
    if not isinstance(config.weights, LearnedWeights):
        return {}
    if not storage.exists(layout.learned_weights):
        raise ConfigError(
            f"{layout.learned_weights} is missing: the score stage learns combine.weights, so run "
            "that stage first"
        )
    return storage.read_json(layout.learned_weights, _Stored)["weights"]


class _Stored(TypedDict):
    """Learned weights as they lie on disk."""

    weights: dict[str, dict[str, float]]
    provenance: dict[str, Any]


def learned_provenance(config: CombineConfig, layout: Layout) -> dict[str, Any] | None:
    """Origin of a run's learned weights; None if its weights are not learned."""
    if not isinstance(config.weights, LearnedWeights):
        return None
    return storage.read_json(layout.learned_weights, _Stored)["provenance"]


def with_learned(config: CombineConfig, weights: WeightsByDomain) -> CombineConfig:
    """Combination in which learned weights have become weights by domain."""
    if not isinstance(config.weights, LearnedWeights):
        return config
    by_domain = ByDomainWeights(type="by_domain", domains=weights)
    # A copy is not validated: a route between equal learned weights is decided by name, like all
    # fitted figures, and not refused.
    return config.model_copy(update={"weights": by_domain})


def likeliest_mixture(gold_logprobs_MP: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights w that maximise the mean of log sum_m w_m p_m(gold), by expectation maximisation.

    The problem is concave. At any w the best mean is at most `max_m mean(p_m / mixture) - 1` nats
    higher (the bound that the gradient gives on the simplex); the fit stops when that is small.

    Args:
        gold_logprobs_MP: gold log-probabilities, at each position finite for at least one teacher.

    Returns:
        Weights that sum to 1, float64[M], and the bound in nats.
    """
    likelihoods_MP = np.exp(gold_logprobs_MP - gold_logprobs_MP.max(axis=0))
    weights_M = np.full(len(likelihoods_MP), 1 / len(likelihoods_MP))
    for _ in range(MOST_STEPS):
        ratios_M = (likelihoods_MP / (weights_M @ likelihoods_MP)).mean(axis=1)
        if ratios_M.max() - 1 <= GAP_NATS:
            break
        weights_M = weights_M * ratios_M
    return weights_M / weights_M.sum(), float(ratios_M.max() - 1)


def _chosen(
    members: Sequence[DatasetEntry], readers: Mapping[str, CacheReader]
) -> tuple[list[DatasetEntry], dict[str, Any]]:
    """Chooses the sequences to fit to: those that every teacher has scored, up to the bound.

    The order of the ids decides which sequences are chosen.

    Returns:
        The chosen sequences, and counts of sequences and positions.
    """
    scored = [e for e in members if all(e.sequence_id in reader for reader in readers.values())]
    by_id = sorted({entry.sequence_id: entry for entry in scored}.items())
    before_P = np.cumsum([0] + [entry.num_positions for _, entry in by_id])[:-1]
    kept = {i for (i, _), n in zip(by_id, before_P, strict=True) if n < POSITIONS_OF_A_DOMAIN}
    chosen = [entry for entry in scored if entry.sequence_id in kept]
    return chosen, {
        "sequences": len(chosen),
        "positions": sum(entry.num_positions for entry in chosen),
        "sequences_without_a_row": len(members) - len(scored),
    }


def _gold_logprobs(entries: Sequence[DatasetEntry], reader: CacheReader) -> np.ndarray:
    """Gold log-probabilities of all positions of the sequences, one after another: float64[P]."""
    rows = [reader.row(entry.sequence_id) for entry in entries]
    return np.concatenate([row.gold_logprobs for row in rows if row is not None]).astype(np.float64)


def _likelihoods(gold_MP: np.ndarray, weights_M: np.ndarray, teachers: list[str]) -> dict[str, Any]:
    """Mean log-likelihood of the gold tokens in nats, under the mixture and each teacher alone."""
    highest_P = gold_MP.max(axis=0)
    mixture_P = highest_P + np.log(weights_M @ np.exp(gold_MP - highest_P))
    return {
        "gold_logprob_mixture": float(mixture_P.mean()),
        "gold_logprob": dict(zip(teachers, gold_MP.mean(axis=1).tolist(), strict=True)),
    }
