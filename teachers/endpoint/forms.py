"""Forms of requests: the first of each goes alone, and one that the server never accepts ends the
work.

A form is a request without its prompt and seed: its parameters and their values. A server that
knows no `seed`, say, refuses every request of the form, and nothing but another config helps.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_json
from teachers.protocol import ItemRefusedError

VARYING = ("messages", "prompt", "seed")
REFUSALS_OF_A_NEW_FORM, REFUSALS_IN_A_ROW = 3, 16
"""Different prompts whose equal refusals show that the request is at fault, not the prompt: before
and after the server has answered a request of this form."""
ABOUT_THE_PROMPT = re.compile(
    r"content.?(filter|policy|management)|flagged|moderation|safety", re.I
)
"""Words of refusals that are about what a prompt says, however many prompts meet them."""

T = TypeVar("T")


@dataclass
class _Form:
    """One form: whether it was ever answered, the refusals since its last answer, and the error
    that ended the work.
    """

    works: bool = False
    error: ConfigError | None = None
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    words: str = ""
    refused: set[str] = field(default_factory=set)


class RequestForms:
    """Forms of the requests to one server.

    Args:
        server: address of the server and name of the model, for messages.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._forms: defaultdict[str, _Form] = defaultdict(_Form)

    async def ask(self, body: dict[str, Any], send: Callable[[bool], Awaitable[T]]) -> T:
        """Sends a request; until one of its form is answered, requests of the form go one by one.

        Args:
            body: the request.
            send: function that sends it, and is told whether it goes alone.

        Raises:
            ConfigError: several different prompts met the same refusal.
            ItemRefusedError: the server refuses this request.
        """
        fixed = {key: value for key, value in body.items() if key not in VARYING}
        form = self._forms[json.dumps(fixed, sort_keys=True)]
        prompt = digest_json([body.get("messages"), body.get("prompt")])
        if not form.works:
            async with form.alone:
                if not form.works:
                    return await self._send(form, prompt, send, alone=True)
        return await self._send(form, prompt, send, alone=False)

    async def _send(
        self, form: _Form, prompt: str, send: Callable[[bool], Awaitable[T]], alone: bool
    ) -> T:
        if form.error is not None:
            raise form.error
        try:
            reply = await send(alone)
        except ItemRefusedError as error:
            self._count(form, prompt, error)
            raise
        form.works = True
        form.refused.clear()
        return reply

    def _count(self, form: _Form, prompt: str, error: ItemRefusedError) -> None:
        words = re.sub(r"\d+", "0", str(error))
        if ABOUT_THE_PROMPT.search(words):
            return
        if words != form.words:
            form.words = words
            form.refused.clear()
        form.refused.add(prompt)
        most = REFUSALS_IN_A_ROW if form.works else REFUSALS_OF_A_NEW_FORM
        if len(form.refused) >= most:
            form.error = ConfigError(
                f"{self._server} refused {len(form.refused)} different prompts in the same words, "
                f"so the requests are at fault: {error}; change `sampling`, or name what this "
                "server takes otherwise in endpoint.request (rename, omit, extra)"
            )
            raise form.error from error
