"""Asyncio helpers that pools and tasks share: cancel tasks, ask a teacher for all items at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pipeline.errors import TeacherError
from teachers.protocol import EngineDiedError, ItemRefusedError

Item = TypeVar("Item")
ItemReply = TypeVar("ItemReply")


async def ask_each(
    items: Sequence[Item], ask: Callable[[Item], Awaitable[ItemReply]]
) -> tuple[list[tuple[Item, ItemReply]], list[tuple[Item, str]]]:
    """Asks a teacher for all items of a task at once.

    Returns:
        The items that succeeded with their replies, and the items that failed with their errors,
        each in the order given.

    Raises:
        TeacherError: the only item failed; or all items failed, and not all by refusals of the
            items themselves, so nothing shows that any one of them is at fault.
        DistillationError: the teacher is gone or refuses this kind of request; the other requests
            are cancelled.
    """

    async def reply_or_error(item: Item) -> ItemReply | TeacherError:
        try:
            return await ask(item)
        except EngineDiedError:
            raise
        except TeacherError as error:
            return error

    asking = [asyncio.create_task(reply_or_error(item)) for item in items]
    try:
        replies = list(zip(items, await asyncio.gather(*asking), strict=True))
    finally:
        await cancel(asking)
    errors = [reply for _, reply in replies if isinstance(reply, TeacherError)]
    unexplained = [error for error in errors if not isinstance(error, ItemRefusedError)]
    if len(errors) == len(items) and (unexplained or len(items) == 1):
        raise (unexplained or errors)[0]
    done = [(item, reply) for item, reply in replies if not isinstance(reply, TeacherError)]
    failed = [(item, str(reply)) for item, reply in replies if isinstance(reply, TeacherError)]
    return done, failed


async def cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels asyncio tasks and waits until their clean-up is done."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
