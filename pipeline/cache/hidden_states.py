"""Content of a cache of hidden states: the columns of `HiddenStates` and their meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.columns import Column
from pipeline.errors import CacheError
from pipeline.records import HiddenStates

SCHEMA_VERSION = 1
ALIGNMENT = (
    "Position j of a row is the j-th token index i_j of the sequence's loss spans, in order. Its "
    "states are the teacher's hidden states at index i_j - 1, those that its distribution over the "
    "token at index i_j is computed from. A row's cell has the shape [positions, layers, width], "
    "the last axis fastest; shape names [layers, width], and the recipe in the cache's manifest "
    "the layers: layer l is the state after l blocks, transformers' hidden_states[l], the last one "
    "before the final norm. Values are bfloat16, the high half of a float32: "
    "(value.astype('<u4') << 16).view('<f4'). Where the recipe names a projection, states were "
    "multiplied with its matrix of shape [hidden size, width]."
)
DTYPES = {"states": "<u2"}
FACTS = ("shape",)
"""Metadata keys whose value holds for all rows of a shard."""


@dataclass(frozen=True)
class HiddenStatesFigures:
    """Quality of one shard of hidden states, as index and metadata keep it.

    Attributes:
        num_positions: positions of all rows.
        mean_norm: mean over positions and layers of the length of a hidden state.
    """

    num_positions: int
    mean_norm: float


def position_bytes(num_layers: int, width: int) -> int:
    """Bytes that the hidden states of a position take before compression."""
    return 2 * num_layers * width


def check(rows: Sequence[HiddenStates]) -> None:
    """Checks that rows may be written to one shard.

    Raises:
        CacheError: a row breaks an invariant, or the rows differ in layers or width.
    """
    for row in rows:
        check_states(row)
    if len({row.states.shape[1:] for row in rows}) > 1:
        shapes = sorted({row.states.shape[1:] for row in rows})
        raise CacheError(
            f"hidden states of several shapes cannot share a shard: layers and width are {shapes}"
        )


def check_states(row: HiddenStates) -> None:
    """Checks one row.

    Raises:
        CacheError: the hidden states are no bfloat16 of shape [P, L, D], or a value is not finite.
    """
    if problem := shape_problem(row):
        raise CacheError(f"sequence {row.sequence_id}: {problem}")


def shape_problem(row: HiddenStates) -> str | None:
    """Problem of a row that is no finite bfloat16 of shape [P, L, D]; None if there is none."""
    if row.states.dtype != np.uint16 or row.states.ndim != 3 or 0 in row.states.shape:
        return (
            f"hidden states are {row.states.dtype}{list(row.states.shape)}, not "
            "uint16[positions, layers, width]"
        )
    if ((row.states & 0x7F80) == 0x7F80).any():
        return "a hidden state is not finite"
    return None


def facts(rows: Sequence[HiddenStates]) -> dict[str, str]:
    """Metadata that holds for all rows."""
    return {"shape": json.dumps(rows[0].states.shape[1:])}


def encode(rows: Sequence[HiddenStates]) -> dict[str, Column]:
    """The columns of a shard with these rows."""
    return {"states": Column.of_arrays([row.states.astype("<u2") for row in rows])}


def decode(
    identifiers: Sequence[str], columns: Mapping[str, Column], metadata: Mapping[str, str]
) -> list[HiddenStates]:
    """Rows whose arrays are views of one decoded column.

    Args:
        metadata: values of the keys in `FACTS`.
    """
    shape = (-1, *json.loads(metadata["shape"]))
    cells = columns["states"].cells()
    return [
        HiddenStates(identifier, cell.reshape(shape))
        for identifier, cell in zip(identifiers, cells, strict=True)
    ]


def figures(rows: Sequence[HiddenStates]) -> HiddenStatesFigures:
    """Quality of a shard with these rows."""
    norms = [np.linalg.norm(row.values, axis=-1).ravel() for row in rows]
    return HiddenStatesFigures(
        num_positions=sum(row.num_positions for row in rows),
        mean_norm=float(np.concatenate(norms).mean(dtype=np.float64)),
    )
