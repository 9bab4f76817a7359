"""Replies of servers, read and inflated piece by piece up to a bound.

A server may send without an end, or a few bytes that inflate to gigabytes. The bound is the largest
reply that can be right, by what was asked for, and an allowance for everything else.
"""

from __future__ import annotations

import zlib
from typing import Any

import aiohttp

from pipeline.errors import TeacherError
from pipeline.messages import foreign
from teachers.protocol import ItemRefusedError

ALLOWANCE_BYTES = 16 * 2**20
"""Bytes of a reply beside tokens and log-probabilities, such as a list of models."""
TOKEN_BYTES = 64
"""Bytes in JSON of a token of an answer, its id and its text, in the mean of an answer; a character
takes up to 6, and tokens have 3 to 5 in the mean."""
ENTRY_BYTES = 256
"""Bytes in JSON of a log-probability with id, rank and text of its token, in the mean of a reply;
vLLM's entries take about 80."""
ACCEPTED = "gzip, deflate"


def expected_bytes(request: dict[str, Any], max_tokens: int, num_prompt_tokens: int = 0) -> int:
    """Size of the largest right reply to a request for completions, without the allowance.

    Args:
        request: request as it is sent.
        max_tokens: largest number of tokens of an answer.
        num_prompt_tokens: tokens of the prompt that the server repeats.
    """
    answers = _count(request.get("n"), 1)
    entries = max(_count(request.get(key)) for key in ("logprobs", "top_logprobs"))
    rows = num_prompt_tokens * (_count(request.get("prompt_logprobs")) + 1)
    per_token = TOKEN_BYTES + ENTRY_BYTES * (entries + 1 if entries else 0)
    return answers * max_tokens * per_token + rows * ENTRY_BYTES + num_prompt_tokens * TOKEN_BYTES


def _count(value: Any, otherwise: int = 0) -> int:
    return int(value) if isinstance(value, int) and value > 0 else otherwise


async def read_content(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """Content of a response, inflated, of at most `most_bytes` bytes.

    Raises:
        ItemRefusedError: the content is larger, or compressed in a way that was not asked for.
        TeacherError: the content cannot be inflated, or ends too soon.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        response.close()
        raise ItemRefusedError(
            f"the reply is compressed by {foreign(encoding, 40)}, and {ACCEPTED} was asked for: "
            "check what stands between the server and this machine"
        )
    inflater = None if encoding in ("", "identity") else Inflater(encoding, most_bytes)
    content = bytearray()
    received = 0
    async for piece in response.content.iter_any():
        received += len(piece)
        content += piece if inflater is None else inflater.feed(piece)
        if max(received, len(content)) > most_bytes:
            response.close()
            raise too_large(most_bytes)
    if inflater is not None and received:
        inflater.finish()
    return bytes(content)


def too_large(most_bytes: int) -> ItemRefusedError:
    """Error of a reply that has no end, or more content than it can need."""
    return ItemRefusedError(
        f"the reply has more than {most_bytes:,} bytes, and a right one cannot need them: check "
        "that endpoint.url is the address of the API, and what stands before it"
    )


class Inflater:
    """Inflation of one reply that holds no more than a bound in memory."""

    def __init__(self, encoding: str, most_bytes: int) -> None:
        self._is_gzip, self._left = "gzip" in encoding, most_bytes
        self._most_bytes = most_bytes
        self._member: Any = None

    def feed(self, data: bytes) -> bytes:
        """Inflates the next piece.

        Raises:
            ItemRefusedError: everything inflated so far exceeds the bound.
            TeacherError: the data are not of the encoding.
        """
        inflated = bytearray()
        try:
            while data:
                if self._member is None:
                    self._member = zlib.decompressobj(self._window(data))
                part = self._member.decompress(data, self._left + 1)
                if len(part) > self._left:
                    raise too_large(self._most_bytes)
                self._left -= len(part)
                inflated += part
                data = self._member.unconsumed_tail
                if self._member.eof:
                    data = self._member.unused_data
                    self._member = None
        except zlib.error as error:
            raise TeacherError(f"the reply cannot be inflated: {error}") from None
        return bytes(inflated)

    def finish(self) -> None:
        """Checks that the data have ended where they should.

        Raises:
            TeacherError: the data are cut.
        """
        if self._member is not None:
            raise TeacherError("the reply cannot be inflated: it is cut")

    def _window(self, data: bytes) -> int:
        """Window of zlib; some servers send `deflate` without zlib's header."""
        if self._is_gzip:
            return 16 + zlib.MAX_WBITS
        return zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS
