"""Content of a cache of distributions: the columns of `SparseLogprobs` and their meaning.

Token ids are split into two planes, so that the high plane, nearly always zero, costs nothing after
compression.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.columns import Column
from pipeline.cache.row_checks import check_row
from pipeline.cache.row_checks import shape_problem as shape_problem
from pipeline.cache.selection import draw_variance
from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs

SCHEMA_VERSION = 2
ALIGNMENT = (
    "Position j of a row is the j-th token index i_j of the sequence's loss spans, in order. Its "
    "entries are the teacher's distribution over the token at index i_j given all tokens before "
    "it; input_ids[i_j] is the gold token. Student logits at index i_j - 1 are trained against "
    "position j. Log-probabilities are normalised over the full vocabulary at temperature 1. "
    "token_id = token_ids_low + 65536 * token_ids_high; position j owns num_entries[j] "
    "consecutive entries, descending. Where num_head is empty, all are head entries, of the given "
    "logprobs, and tail_mass is the probability outside them. Otherwise the first num_head[j] are; "
    "the others were drawn, counts[i] times each, and stand for their share of "
    "the position's draws in 1 - tail_mass - sum(exp(head logprobs)); tail_mass lies outside what "
    "draws could reach. With renormalised, everything is divided by 1 - tail_mass."
)
DTYPES = {
    "num_entries": "<u1",
    "num_head": "<u1",
    "token_ids_low": "<u2",
    "token_ids_high": "<u1",
    "logprobs": "<f2",
    "counts": "<u1",
    "gold_logprobs": "<f2",
    "tail_mass": "<f2",
    "entropies": "<f2",
}
FACTS = ("renormalised",)
"""Metadata keys whose value holds for all rows of a shard."""
ID_PLANES = ("token_ids_low", "token_ids_high")


@dataclass(frozen=True)
class DistributionFigures:
    """Quality of one shard of distributions, as index and metadata keep it.

    Attributes:
        num_positions: positions of all rows.
        num_entries: kept entries of all positions.
        kept_mass: mean over positions of the probability inside the kept entries; with draws,
            inside the captured ones.
        kept_mass_p01: 1st percentile over positions of the kept mass.
        gold_logprob: mean log-probability of the gold tokens in nats, masked ones left out.
        num_masked_gold: gold tokens that the model gives no probability.
        draw_variance: mean over positions of the variance that draws give the estimate, summed over
            the vocabulary; None where nothing is drawn.
    """

    num_positions: int
    num_entries: int
    kept_mass: float
    kept_mass_p01: float
    gold_logprob: float
    num_masked_gold: int = 0
    draw_variance: float | None = None


def position_bytes(max_entries: int) -> int:
    """Most bytes that a position takes before compression: 7 for its own numbers, and 5 for the id
    planes and the log-probability of each entry. A drawn entry takes a byte less, and its position
    one more.
    """
    return 7 + 5 * max_entries


def check(rows: Sequence[SparseLogprobs]) -> None:
    """Checks that rows may be written to one shard.

    Raises:
        CacheError: a row breaks an invariant, or the rows come from several selections.
    """
    for row in rows:
        check_row(row)
    if len({(row.is_drawn, row.renormalised) for row in rows}) > 1:
        raise CacheError("rows of several selections cannot share a shard")


def facts(rows: Sequence[SparseLogprobs]) -> dict[str, str]:
    """Metadata that holds for all rows."""
    return {"renormalised": json.dumps(any(row.renormalised for row in rows))}


def encode(rows: Sequence[SparseLogprobs]) -> dict[str, Column]:
    """The columns of a shard with these rows."""
    columns = {}
    for name, dtype in DTYPES.items():
        attribute = "token_ids" if name in ID_PLANES else name
        column = Column.of_arrays([getattr(row, attribute) for row in rows])
        values = column.values
        if name in ID_PLANES:
            values = values >> 16 if name == "token_ids_high" else values & 0xFFFF
        columns[name] = Column(values.astype(dtype), column.starts)
    return columns


def decode(
    identifiers: Sequence[str], columns: Mapping[str, Column], metadata: Mapping[str, str]
) -> list[SparseLogprobs]:
    """Rows whose arrays are slices of whole decoded columns.

    Args:
        metadata: values of the keys in `FACTS`.
    """
    low, high = columns["token_ids_low"], columns["token_ids_high"]
    token_ids = low.values.astype(np.uint32)
    if high.values.any():
        token_ids |= high.values.astype(np.uint32) << 16
    whole = {name: column for name, column in columns.items() if name not in ID_PLANES}
    whole["token_ids"] = Column(token_ids, low.starts)
    cells = {name: column.cells() for name, column in whole.items()}
    return [
        SparseLogprobs(
            sequence_id=identifier,
            renormalised=metadata["renormalised"] == "true",
            **{name: parts[i] for name, parts in cells.items()},
        )
        for i, identifier in enumerate(identifiers)
    ]


def figures(rows: Sequence[SparseLogprobs]) -> DistributionFigures:
    """Quality of a shard with these rows."""
    kept = 1 - np.concatenate([row.tail_mass for row in rows]).astype(np.float64)
    gold = np.concatenate([row.gold_logprobs for row in rows]).astype(np.float64)
    masked = gold <= np.finfo(np.float16).min
    return DistributionFigures(
        num_positions=len(kept),
        num_entries=sum(len(row.token_ids) for row in rows),
        kept_mass=float(kept.mean()),
        kept_mass_p01=float(np.quantile(kept, 0.01)),
        gold_logprob=float(gold[~masked].mean()) if not masked.all() else 0.0,
        num_masked_gold=int(masked.sum()),
        draw_variance=(
            float(np.concatenate([draw_variance(row) for row in rows]).mean())
            if any(row.is_drawn for row in rows)
            else None
        ),
    )
