"""Work that rank 0 does for all workers: they all get its result, or all raise its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import DistillationError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def from_rank_0(work: Callable[[], T], device: torch.device) -> T:
    """Result of some work that rank 0 does, on every rank; no rank goes on before it is done. All
    ranks call it.

    Raises:
        DistillationError: rank 0 has raised it.
    """
    import torch.distributed as dist  # the dry run, which checks trainings too, needs no torch

    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except DistillationError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, device=device)
    if isinstance(outcome[0], DistillationError):
        raise outcome[0]
    return outcome[0]
