"""What servers reply, checked as it is read, and their log-probabilities as arrays.

Axis names: P positions, K entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK

MASKED = -9999.0
"""What vLLM's server says for -inf, which JSON does not know."""
MASS_TOLERANCE = 1e-2


class Entry(TypedDict):
    logprob: float


class TokenChoice(TypedDict, total=False):
    """Of `prompt_logprobs` the first position is empty, for nothing stands before it."""

    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    finish_reason: str | None
    prompt_logprobs: list[dict[int, Entry] | None] | None


class TokenReply(TypedDict):
    choices: Annotated[list[TokenChoice], Field(min_length=1)]


class Message(TypedDict, total=False):
    content: str | None
    refusal: str | None


class TextChoice(TypedDict, total=False):
    message: Message
    text: str
    finish_reason: str | None


class TextReply(TypedDict):
    choices: Annotated[list[TextChoice], Field(min_length=1)]


class Served(TypedDict, total=False):
    id: str
    max_model_len: int | None


class Models(TypedDict):
    data: list[Served]


class Version(TypedDict):
    version: str


TOKEN_REPLY, TEXT_REPLY = TypeAdapter(TokenReply), TypeAdapter(TextReply)
MODELS, VERSION = TypeAdapter(Models), TypeAdapter(Version)
ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def sorted_rows(
    positions: Sequence[dict[int, Entry]], gold_ids: list[int], width: int, url: str
) -> PromptTopK:
    """Dictionaries of log-probabilities by token id as arrays: the gold token, then the `width`
    most probable ones in descending order. Where the gold token is none of these, its dictionary
    has one entry more.

    Raises:
        BrokenRowsError: a position has fewer entries, or more, or not the gold token, or their
            probabilities sum to more than 1.
    """
    counts_P = np.fromiter(map(len, positions), np.int64, len(positions))
    if not ((counts_P == width) | (counts_P == width + 1)).all():
        j = int(np.argmax((counts_P != width) & (counts_P != width + 1)))
        raise BrokenRowsError(
            f"{url} returned {counts_P[j]} log-probabilities at a position where {width} were "
            "asked for; vLLM's `--max-logprobs` must allow as many"
        )
    total = int(counts_P.sum())
    entries = map(itemgetter("logprob"), chain.from_iterable(map(dict.values, positions)))
    place_PK = np.arange(width + 1) < counts_P[:, None]
    ids_PK = np.full(place_PK.shape, -1, np.int64)
    ids_PK[place_PK] = np.fromiter(chain.from_iterable(positions), np.int64, total)
    logprobs_PK = np.full(place_PK.shape, -np.inf, np.float32)
    logprobs_PK[place_PK] = np.fromiter(entries, np.float32, total)
    logprobs_PK[logprobs_PK <= MASKED] = -np.inf
    is_gold_PK = ids_PK == np.array(gold_ids)[:, None]
    if not is_gold_PK.any(axis=1).all():
        raise BrokenRowsError(f"{url} returned a position without the sequence's own token")
    order_PK = np.argsort(-logprobs_PK, axis=1, kind="stable")[:, :width]
    top_PK = np.take_along_axis(logprobs_PK, order_PK, axis=1)
    if np.exp(top_PK.astype(np.float64)).sum(axis=1).max() > 1 + MASS_TOLERANCE:
        raise BrokenRowsError(
            f"{url} returned values that are no log-probabilities at temperature 1: it must run "
            "with `--logprobs-mode raw_logprobs`"
        )
    gold_P1 = logprobs_PK[is_gold_PK][:, None]
    return PromptTopK(
        np.concatenate([np.array(gold_ids)[:, None], np.take_along_axis(ids_PK, order_PK, 1)], 1),
        np.concatenate([gold_P1, top_PK], axis=1),
    )
