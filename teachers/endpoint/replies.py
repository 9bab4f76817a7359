"""Replies of servers, checked when they are read, and their log-probabilities as arrays.

Axis names: P positions, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.cache.row_checks import MAX_LOGPROB
from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK

MASKED = -9999.0
"""Value that vLLM's server sends for -inf, which JSON does not know."""


MOST_IDS = 2**24
"""Token ids that a cache can hold (`pipeline/cache/columns.py`)."""
TokenId = Annotated[int, Field(strict=True, ge=0, lt=MOST_IDS)]
EntryId = Annotated[int, Field(ge=0, lt=MOST_IDS)]
"""Token id as the key of an object, which is text in JSON."""
ProviderId = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][\w:=.-]*(/[A-Za-z0-9][\w:=.-]*)*$", max_length=200),
]
"""Id of a batch or file, which becomes part of paths; some providers put slashes into it."""


class LogprobEntry(TypedDict):
    logprob: Annotated[float, Field(strict=True)]


class TokenChoice(TypedDict, total=False):
    """Completion as token ids; `prompt_logprobs` is None at position 0, which no token precedes."""

    token_ids: list[TokenId] | None
    prompt_token_ids: list[int] | None
    finish_reason: str | None
    prompt_logprobs: list[dict[EntryId, LogprobEntry] | None] | None


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


class StoredFile(TypedDict):
    id: ProviderId


class Batch(TypedDict):
    """Batch as the provider tells of it."""

    id: ProviderId
    input_file_id: NotRequired[str | None]
    status: Annotated[str, AfterValidator(str.lower)]
    output_file_id: NotRequired[ProviderId | None]
    error_file_id: NotRequired[ProviderId | None]
    errors: NotRequired[Any]
    request_counts: NotRequired[dict[str, int] | None]
    metadata: NotRequired[dict[str, str] | None]


class BatchList(TypedDict):
    data: list[Batch]


class LineReply(TypedDict):
    status_code: int
    body: Any


class Line(TypedDict):
    """One line of a batch's output."""

    custom_id: str
    response: NotRequired[LineReply | None]
    error: NotRequired[Any]


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
FILE, BATCH, BATCHES = TypeAdapter(StoredFile), TypeAdapter(Batch), TypeAdapter(BatchList)
LINE = TypeAdapter(Line)


def refuse_duplicates(content: bytes, reply: TokenReply) -> None:
    """Refuses rows in which a key stands twice, of which a reader of JSON keeps one.

    Args:
        content: reply as it came. Inside of a text a quote is escaped, so that the name of a field
            cannot stand there.
        reply: the same, read.

    Raises:
        BrokenRowsError: more values came than were read.
    """
    positions = chain.from_iterable(c.get("prompt_logprobs") or () for c in reply["choices"])
    if content.count(b'"logprob"') > sum(len(position or ()) for position in positions):
        raise BrokenRowsError(
            "a reply names a token twice at one position: check that the server is a vLLM server"
        )


def sorted_rows(
    positions: Sequence[dict[int, LogprobEntry]],
    gold_ids: list[int],
    width: int,
    vocabulary: int,
    url: str,
) -> PromptTopK:
    """Turns dictionaries of log-probabilities into arrays: the gold token, then the `width` most
    probable tokens in descending order.

    Args:
        positions: log-probabilities by token id, one dictionary per position. A dictionary has one
            entry more than `width` if the gold token is not among the most probable ones.
        gold_ids: the sequence's own token of each position.
        width: number of entries that the request asked for.
        vocabulary: number of ids that the model can have.
        url: address of the server, for messages.

    Raises:
        BrokenRowsError: a position has fewer entries, or more, or not the gold token, an id that
            the model cannot have, a value that is no number, or probabilities that sum to more
            than 1.
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
    if ids_PK.max(initial=0) >= vocabulary:
        raise BrokenRowsError(
            f"{url} returned token {ids_PK.max()}, and the vocabulary has {vocabulary} tokens: "
            "check that it serves the model that endpoint.tokenizer belongs to"
        )
    if np.isnan(logprobs_PK).any():
        raise BrokenRowsError(
            f"{url} returned NaN as a log-probability: look at the server's log, and restart it"
        )
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
