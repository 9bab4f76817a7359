"""Hidden states as a cache keeps them: some layers, rounded to bfloat16, projected or whole.

The losses that use hidden states decide the layers. Projected hidden states are multiplied with one
fixed matrix of signs: distances, angles and similarities survive the projection up to a relative
error of about sqrt(2 / dimensions) (Johnson-Lindenstrauss, in the form of Achlioptas, J. Comput.
Syst. Sci. 66, 2003).

Legend: P positions, L layers, H hidden size, D stored dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.records import HiddenStates


@dataclass(frozen=True)
class HiddenStatesRule:
    """Rule of storage for a teacher's hidden states.

    Attributes:
        layers: layers in ascending order; layer `l` is the hidden state after `l` blocks.
        dimensions: dimensions of the projection; None stores hidden states whole.
        seed: seed of the projection.
    """

    layers: tuple[int, ...]
    dimensions: int | None
    seed: int

    @classmethod
    def of_identity(cls, identity: dict[str, Any]) -> HiddenStatesRule:
        """The rule in the identity of a cache of hidden states."""
        projection = identity["projection"] or {"dimensions": None, "seed": 0}
        return cls(tuple(identity["layers"]), projection["dimensions"], projection["seed"])

    def row(self, sequence_id: str, states_PLH: np.ndarray) -> HiddenStates:
        """The cache row of a sequence.

        Args:
            states_PLH: float32, the hidden states of the rule's layers.
        """
        if self.dimensions is not None:
            states_PLH = states_PLH @ projection_matrix(
                states_PLH.shape[-1], self.dimensions, self.seed
            )
        return HiddenStates(sequence_id, to_bfloat16(states_PLH))


@lru_cache(maxsize=4)
def projection_matrix(hidden_size: int, dimensions: int, seed: int) -> np.ndarray:
    """float32[H, D]: signs divided by sqrt(D), so that squared lengths stay the same on average.

    The signs are raw bits of PCG64, which are the same in every version of numpy.
    """
    count = hidden_size * dimensions
    words = np.random.PCG64(seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    signs = bits.astype(np.float32) * 2 - 1
    return signs.reshape(hidden_size, dimensions) / np.sqrt(np.float32(dimensions))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, ties to even; not for NaN."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
