"""Answers to one prompt that begin alike: rows that one of them has are not computed for the next.

The engine's prefix cache covers whole blocks of tokens, also of an answer, and gives no rows for
them. A row depends on the tokens before it alone, so the answer that put these blocks into the
cache has the same rows; only the gold token of the last one may be another.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np

from teachers.protocol import CapturedRows, ScoringRequest, Teacher


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

    async def score(self, teacher: Teacher, request: ScoringRequest) -> CapturedRows:
        """Scores one more answer, with the rows of earlier answers at hand."""
        input_ids = np.array(request.input_ids)
        earlier = Earlier(tuple(self._answers), input_ids, request.first_index)
        rows_later = asyncio.get_running_loop().create_future()
        answer = _Answer(input_ids, request.first_index, rows_later)
        self._answers.append(answer)
        rows = None
        try:
            rows = await teacher.score(request, earlier)
            return rows
        finally:
            answer.rows.set_result(rows)


@dataclass(frozen=True, eq=False)
class Earlier:
    """What stands before one answer: waits for no later one, so that none waits for itself."""

    answers: tuple[_Answer, ...]
    input_ids: np.ndarray
    first_index: int

    async def rows(self, num_cached: int) -> CapturedRows | None:
        """The rows over the tokens at `first_index` to `num_cached`; None where no answer has them.

        The gold token of the last one may be unknown to all answers; its log-probability is NaN.

        Args:
            num_cached: tokens that lie in the engine's cache; they decide these rows.
        """
        gold, found = int(self.input_ids[num_cached]), None
        for answer in reversed(self.answers):
            is_alike = (
                len(answer.input_ids) > num_cached
                and answer.first_index <= self.first_index
                and np.array_equal(answer.input_ids[:num_cached], self.input_ids[:num_cached])
            )
            if is_alike and (theirs := await answer.rows):
                start = self.first_index - answer.first_index
                found = _slice(theirs, start, num_cached + 1 - answer.first_index)
                if answer.input_ids[num_cached] == gold:
                    return found
        return found and found.with_last_gold(_captured_logprob(found, gold))


def _slice(rows: CapturedRows, start: int, stop: int) -> CapturedRows:
    return replace(
        rows,
        token_ids=rows.token_ids[start:stop],
        logprobs=rows.logprobs[start:stop],
        gold_logprobs=rows.gold_logprobs[start:stop],
    )


def _captured_logprob(rows: CapturedRows, token: int) -> float:
    """Of a token in the last row; NaN where it is not among the entries."""
    (place,) = np.nonzero(rows.token_ids[-1] == token)
    return float(rows.logprobs[-1, place[0]]) if len(place) else np.nan
