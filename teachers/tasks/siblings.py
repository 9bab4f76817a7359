"""Siblings: answers to one prompt that begin alike, so that the next answer takes over the rows of
an earlier one.

The engine's prefix cache covers whole blocks of tokens, also of an answer, and gives no rows for
them. A row depends only on the tokens before it, so the answer that put these blocks into the cache
has the same rows; only the gold token of the last row may differ.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np

from teachers.protocol import CapturedRows, ScoringRequest, Teacher


@dataclass(frozen=True, eq=False)
class _Answer:
    """A sequence that is being scored; the result of `rows` is None if the scoring fails."""

    input_ids: np.ndarray
    first_index: int
    rows: asyncio.Future[CapturedRows | None]


@dataclass(eq=False)
class Siblings:
    """Answers to one prompt, in the order in which they are scored."""

    _answers: list[_Answer] = field(default_factory=list)

    async def score(self, teacher: Teacher, request: ScoringRequest) -> CapturedRows:
        """Scores one more answer, with the rows of earlier answers at hand."""
        input_ids = np.array(request.input_ids)
        earlier = EarlierAnswers(tuple(self._answers), input_ids, request.first_index)
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
class EarlierAnswers:
    """Earlier answers of one answer. An answer waits only for earlier ones, so no cycle arises."""

    answers: tuple[_Answer, ...]
    input_ids: np.ndarray
    first_index: int

    async def rows(self, num_cached: int) -> CapturedRows | None:
        """Rows over the tokens at `first_index` to `num_cached`; None if no answer has them.

        The gold token of the last row may be among no answer's entries; its log-probability is then
        NaN.

        Args:
            num_cached: number of tokens in the engine's prefix cache; they determine these rows.
        """
        gold, known = int(self.input_ids[num_cached]), None
        for answer in reversed(self.answers):
            is_alike = (
                len(answer.input_ids) > num_cached
                and answer.first_index <= self.first_index
                and np.array_equal(answer.input_ids[:num_cached], self.input_ids[:num_cached])
            )
            if is_alike and (theirs := await answer.rows):
                start = self.first_index - answer.first_index
                known = _slice(theirs, start, num_cached + 1 - answer.first_index)
                if answer.input_ids[num_cached] == gold:
                    return known
        return known and known.with_last_gold(_captured_logprob(known, gold))


def _slice(rows: CapturedRows, start: int, stop: int) -> CapturedRows:
    return replace(
        rows,
        token_ids=rows.token_ids[start:stop],
        logprobs=rows.logprobs[start:stop],
        gold_logprobs=rows.gold_logprobs[start:stop],
    )


def _captured_logprob(rows: CapturedRows, token: int) -> float:
    """Log-probability of a token in the last row; NaN if the token is not among the entries."""
    (place,) = np.nonzero(rows.token_ids[-1] == token)
    return float(rows.logprobs[-1, place[0]]) if len(place) else np.nan
