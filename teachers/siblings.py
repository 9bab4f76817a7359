"""Answers to one prompt that begin alike: rows that one of them has are not computed for the next.

The engine's prefix cache covers whole blocks of tokens, also of an answer, and gives no rows for
them. A row depends on the tokens before it alone, so the answer that put these blocks into the
cache has the same rows; only the gold token of the last one may be another.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from teachers.engine import CapturedRows

if TYPE_CHECKING:
    from teachers.vllm_teacher import VllmTeacher


@dataclass(frozen=True, eq=False)
class _Answer:
    """A sequence that is being scored; `rows` is None when that failed."""

    input_ids: np.ndarray
    first_index: int
    rows: asyncio.Future[CapturedRows | None]


@dataclass(eq=False)
class Siblings:
    """The answers to one prompt, in the order in which they are scored."""

    _answers: list[_Answer] = field(default_factory=list)

    async def score(
        self,
        teacher: VllmTeacher,
        input_ids: np.ndarray,
        first_index: int,
        *,
        distributions: bool = True,
        states: bool = False,
    ) -> CapturedRows:
        """As `VllmTeacher.score`, with the rows of earlier answers at hand."""
        earlier = Earlier(tuple(self._answers), input_ids, first_index)
        answer = _Answer(input_ids, first_index, asyncio.get_running_loop().create_future())
        self._answers.append(answer)
        rows = None
        try:
            rows = await teacher.score(
                input_ids.tolist(),
                first_index,
                earlier,
                distributions=distributions,
                states=states,
            )
        finally:
            answer.rows.set_result(rows)
        return rows


@dataclass(frozen=True, eq=False)
class Earlier:
    """What stands before one answer: waits for no later one, so that none waits for itself."""

    answers: tuple[_Answer, ...]
    input_ids: np.ndarray
    first_index: int

    async def rows(self, num_cached: int) -> CapturedRows | None:
        """The rows over the tokens at `first_index` to `num_cached`; None where no answer has them.

        Args:
            num_cached: tokens that lie in the engine's cache; they decide these rows.
        """
        for answer in reversed(self.answers):
            is_alike = (
                len(answer.input_ids) > num_cached
                and answer.first_index <= self.first_index
                and np.array_equal(answer.input_ids[:num_cached], self.input_ids[:num_cached])
            )
            if is_alike and (theirs := await answer.rows):
                start = self.first_index - answer.first_index
                stop = num_cached + 1 - answer.first_index
                if found := _with_gold(theirs, start, stop, int(self.input_ids[num_cached])):
                    return found
        return None


def _with_gold(rows: CapturedRows, start: int, stop: int, gold: int) -> CapturedRows | None:
    """A copy of some rows, the last one's gold token another; None where its log-probability is not
    among those captured.
    """
    (place,) = np.nonzero(rows.token_ids[stop - 1] == gold)
    if len(place) == 0:
        return None
    gold_logprobs = rows.gold_logprobs[start:stop].copy()
    gold_logprobs[-1] = rows.logprobs[stop - 1, place[0]]
    return replace(
        rows,
        token_ids=rows.token_ids[start:stop],
        logprobs=rows.logprobs[start:stop],
        gold_logprobs=gold_logprobs,
    )
