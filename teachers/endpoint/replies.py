"""Replies of servers, checked when they are read, and their log-probabilities as arrays.

Axis names: P positions, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.cache.row_checks import MAX_LOGPROB
from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK

MASKED = -9999.0
"""Value that vLLM's server sends for -inf, which JSON does not know."""


class LogprobEntry(TypedDict):
    logprob: float


class TokenChoice(TypedDict, total=False):
    """Completion as token ids; `prompt_logprobs` is None at position 0, which no token precedes."""

    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    finish_reason: str | None
    prompt_logprobs: list[dict[int, LogprobEntry] | None] | None


class TokenReply(TypedDict):
    choices: Annotated[list[TokenChoice], Field(min_length=1)]


class ReplyMessage(TypedDict, total=False):
    """Message of an assistant; servers send reasoning apart under either name, or as parts."""

    content: str | list[str | dict[str, Any]] | None
    reasoning_content: str | None
    reasoning: str | None
    refusal: str | None


class TextChoice(TypedDict, total=False):
    message: ReplyMessage | None
    text: str | None
    finish_reason: str | None


class TextReply(TypedDict):
    choices: Annotated[list[TextChoice], Field(min_length=1)]


class ServedModel(TypedDict, total=False):
    id: str
    max_model_len: int | None


class ServedModels(TypedDict):
    data: list[ServedModel]


class ServerVersion(TypedDict):
    version: str


TOKEN_REPLY, TEXT_REPLY = TypeAdapter(TokenReply), TypeAdapter(TextReply)
MODELS_REPLY, VERSION_REPLY = TypeAdapter(ServedModels), TypeAdapter(ServerVersion)
ANY_REPLY: TypeAdapter[Any] = TypeAdapter(Any)


def sorted_rows(
    positions: Sequence[dict[int, LogprobEntry]], gold_ids: list[int], width: int, url: str
) -> PromptTopK:
    """Turns dictionaries of log-probabilities into arrays: the gold token, then the `width` most
    probable tokens in descending order.

    Args:
        positions: log-probabilities by token id, one dictionary per position. A dictionary has one
            entry more than `width` if the gold token is not among the most probable ones.
        gold_ids: the sequence's own token of each position.
        width: number of entries that the request asked for.
        url: address of the server, for messages.

    Raises:
        BrokenRowsError: a position has fewer entries, or more, or not the gold token, or its
            probabilities sum to more than 1.
    """
    counts_P = np.fromiter(map(len, positions), np.int64, len(positions))
    if not ((counts_P == width) | (counts_P == width + 1)).all():
        j = int(np.argmax((counts_P != width) & (counts_P != width + 1)))
        raise BrokenRowsError(
            f"{url} returned {counts_P[j]} log-probabilities at a position where {width} were "
            f"asked for: start the server with `--max-logprobs {width}` or more"
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
        raise BrokenRowsError(
            f"{url} returned a position without the sequence's own token: check that it is a vLLM "
            "server"
        )
    order_PK = np.argsort(-logprobs_PK, axis=1, kind="stable")[:, :width]
    top_PK = np.take_along_axis(logprobs_PK, order_PK, axis=1)
    if np.exp(top_PK.astype(np.float64)).sum(axis=1).max() > math.exp(MAX_LOGPROB):
        raise BrokenRowsError(
            f"{url} returned values that are no log-probabilities at temperature 1: start the "
            "server with `--logprobs-mode raw_logprobs`"
        )
    gold_P1 = logprobs_PK[is_gold_PK][:, None]
    return PromptTopK(
        np.concatenate([np.array(gold_ids)[:, None], np.take_along_axis(ids_PK, order_PK, 1)], 1),
        np.concatenate([gold_P1, top_PK], axis=1),
    )
