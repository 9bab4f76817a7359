"""Forms of requests: the first of each goes alone, and one that the server never accepts ends the
work.

A form is a request without its prompt and seed: its parameters and their values. A server that
knows no `seed`, say, refuses every request of the form, and nothing but another config helps. Where
several prompts meet the same refusal, a control in the same form tells whether the prompts or the
parameters are at fault.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.errors import ConfigError, TeacherError
from pipeline.fingerprint import digest_json
from teachers.protocol import ItemRefusedError
from teachers.tasks.control import CONTROL_MESSAGE, CONTROL_TOKENS

VARYING = ("messages", "prompt", "seed")
REFUSALS_OF_A_NEW_FORM, REFUSALS_IN_A_ROW = 3, 16
"""Different prompts whose equal refusals call for a control: before and after the server has
answered a request of this form."""
_NUMBERED_WORD = re.compile(r"[\w-]*\d[\w-]*")

T = TypeVar("T")
Send = Callable[[dict[str, Any], bool], Awaitable[T]]
"""Function that sends a request, and is told whether it goes alone."""


@dataclass
class _Form:
    """One form of requests.

    Attributes:
        works: a request of the form was answered.
        goes_alone: requests of the form go one by one.
        error: error that ended the work.
        words: words of the latest refusal, without numbers and ids.
        refused: prompts refused in these words since the latest answer.
    """

    works: bool = False
    goes_alone: bool = True
    error: ConfigError | None = None
    words: str = ""
    refused: set[str] = field(default_factory=set)
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    asking_control: asyncio.Lock = field(default_factory=asyncio.Lock)

    def answered(self) -> None:
        """Notes an answer."""
        self.works, self.goes_alone = True, False
        self.refused.clear()

    def is_suspect(self, prompt: str, refusal: str) -> bool:
        """Notes a refusal; whether as many prompts have met it as call for a control."""
        words = _NUMBERED_WORD.sub("0", refusal)
        if words != self.words:
            self.words = words
            self.refused.clear()
        self.refused.add(prompt)
        most = REFUSALS_IN_A_ROW if self.works else REFUSALS_OF_A_NEW_FORM
        return len(self.refused) >= most


class RequestForms:
    """Forms of the requests to one server.

    Args:
        server: address of the server and name of the model, for messages.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._forms: defaultdict[str, _Form] = defaultdict(_Form)

    async def ask(self, body: dict[str, Any], send: Send[T]) -> T:
        """Sends a request; until one of its form is answered, requests of the form go one by one.

        Raises:
            ConfigError: several different prompts met the same refusal, and so does a control.
            ItemRefusedError: the server refuses this request.
            TeacherError: the server fails; the next requests need not wait for one another.
        """
        fixed = {key: value for key, value in body.items() if key not in VARYING}
        form = self._forms[json.dumps(fixed, sort_keys=True)]
        if form.goes_alone:
            async with form.alone:
                if form.goes_alone:
                    return await self._send(form, body, send, alone=True)
        return await self._send(form, body, send, alone=False)

    async def _send(self, form: _Form, body: dict[str, Any], send: Send[T], alone: bool) -> T:
        if form.error is not None:
            raise form.error
        try:
            reply = await send(body, alone)
        except ItemRefusedError as error:
            prompt = digest_json([body.get("messages"), body.get("prompt")])
            if form.is_suspect(prompt, str(error)):
                await self._ask_control(form, body, send, error)
            raise
        except TeacherError:
            form.goes_alone = False
            raise
        form.answered()
        return reply

    async def _ask_control(
        self, form: _Form, body: dict[str, Any], send: Send[T], error: ItemRefusedError
    ) -> None:
        async with form.asking_control:
            if form.error is None and form.refused:  # nobody else has asked it meanwhile
                try:
                    await send(_control(body), True)
                except ItemRefusedError:
                    form.error = ConfigError(
                        f"{self._server} refused {len(form.refused)} different prompts in the same "
                        f"words, and a short question as well, so the requests are at fault: "
                        f"{error}; change `sampling`, or name what this server takes otherwise in "
                        "endpoint.request (rename, omit, extra)"
                    )
                else:
                    form.answered()
        if form.error is not None:
            raise form.error from error


def _control(body: dict[str, Any]) -> dict[str, Any]:
    """A request of the same form that every sound server answers."""
    if "messages" in body:
        return body | {"messages": [CONTROL_MESSAGE]}
    prompt = body["prompt"]
    is_text = isinstance(prompt, str)
    return body | {"prompt": CONTROL_MESSAGE["content"] if is_text else prompt[:CONTROL_TOKENS]}
