"""Prompt log-probabilities of vLLM, kept as arrays.

The engine's process sends them to the front end as two dense tensors. There vLLM's own
`LogprobsProcessor._update_prompt_logprobs` turns every entry into Python objects, which costs far
more than the forward pass. The override below keeps the tensors as numpy views. It runs only in the
front end and touches neither the engine's process nor a worker, so it is the same for every model
runner and parallel layout.

This module never imports vLLM: `teachers/engine/row_capture.py` hands the class in, proves at the
start that both ways give the same numbers, and uses vLLM's public `flat_logprobs` if they differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.row_checks import MAX_LOGPROB
from pipeline.errors import TeacherError
from teachers.protocol import CapturedRows

METHOD = "_update_prompt_logprobs"
PARAMETERS = ["self", "prompt_logprobs_tensors"]


class BrokenRowsError(TeacherError):
    """The engine returned rows that are not the distributions asked for."""


@dataclass(frozen=True, eq=False)
class PromptTopK:
    """Prompt log-probabilities of one request, in place of vLLM's list of dictionaries.

    The last row is the distribution over the last prompt token, the row before it over the token
    before, and so on. There are T - 1 rows, or fewer if a prefix came from the engine's cache; some
    engines return T - 1 rows all the same and leave the rows of the prefix uninitialised. Rows are
    therefore counted from the end. Column 0 is the prompt's own token, columns 1 to K are the most
    probable tokens in descending order; the own token may occur among them again.

    Attributes:
        token_ids: integer[R, K + 1].
        logprobs: float32[R, K + 1].
    """

    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def from_flat(cls, flat: Any) -> PromptTopK:
        """Takes the rows from vLLM's public `FlatLogprobs`, whose first position is empty."""
        num_rows = len(flat.start_indices) - 1
        shape = (num_rows, len(flat.token_ids) // max(num_rows, 1))
        return cls(
            token_ids=np.array(flat.token_ids, dtype=np.int32).reshape(shape),
            logprobs=np.array(flat.logprobs, dtype=np.float32).reshape(shape),
        )

    def rows(self, input_ids: list[int], first_index: int, width: int) -> CapturedRows:
        """Checks and returns the rows over the tokens at indices `first_index` to T - 1.

        A log-probability that rounding has lifted above 0 becomes 0.

        Args:
            input_ids: the T tokens of the sequence.
            first_index: index of the first token with a row.
            width: K, the number of entries per row.

        Raises:
            BrokenRowsError: there are too few rows, column 0 is not the sequence, a value is no
                log-probability, or entries are not in descending order.
        """
        num_rows = len(input_ids) - first_index
        token_ids, logprobs = self.token_ids[-num_rows:], self.logprobs[-num_rows:]
        problem = None
        if not token_ids.shape == logprobs.shape == (num_rows, width + 1):
            problem = (
                f"the rows have shape {self.logprobs.shape}, needed is {(num_rows, width + 1)}"
            )
        elif not np.array_equal(token_ids[:, 0], input_ids[first_index:]):
            problem = "column 0 does not hold the tokens of the sequence"
        elif np.isnan(logprobs).any() or logprobs.max() > MAX_LOGPROB:
            problem = "a value is NaN or above 0, which is no log-probability"
        elif (logprobs[:, 2:] > logprobs[:, 1:-1]).any():
            problem = "entries are not in descending order"
        if problem:
            raise BrokenRowsError(f"captured rows of {len(input_ids)} tokens are broken: {problem}")
        # Copies, so that the received message which the arrays view can be freed.
        return CapturedRows(
            token_ids=token_ids[:, 1:].astype(np.int32),
            logprobs=np.minimum(logprobs[:, 1:], 0, dtype=np.float32),
            gold_logprobs=np.minimum(logprobs[:, 0], 0, dtype=np.float32),
        )

    def equals(self, other: PromptTopK) -> bool:
        """Whether all elements are equal."""
        return np.array_equal(self.token_ids, other.token_ids) and np.array_equal(
            self.logprobs, other.logprobs
        )


def install(processor_class: Any, mirror: list[PromptTopK] | None = None) -> Callable[[], None]:
    """Overrides the method of vLLM's class and returns the function that restores it.

    Requests that detokenise or ask for `flat_logprobs` keep vLLM's own code.

    Args:
        processor_class: vLLM's `LogprobsProcessor`.
        mirror: list to which the arrays are appended, while vLLM's own code runs for every request
            as well; both ways can then be compared on one forward pass.

    Raises:
        TeacherError: the class does not have the method that this override was written for.
    """
    stock = vars(processor_class).get(METHOD)
    parameters = list(inspect.signature(stock).parameters) if stock else []
    if stock is None or parameters != PARAMETERS:
        raise TeacherError(
            f"LogprobsProcessor.{METHOD} of the installed vLLM takes {parameters}, not {PARAMETERS}"
        )

    def keep_arrays(self: Any, prompt_logprobs_tensors: Any) -> None:
        token_ids, logprobs, *_ = prompt_logprobs_tensors
        arrays = PromptTopK(token_ids.numpy(), logprobs.numpy())
        if mirror is not None:
            mirror.append(arrays)
        elif self.tokenizer is None and isinstance(self.prompt_logprobs, list):
            self.prompt_logprobs = arrays
            return
        stock(self, prompt_logprobs_tensors)

    setattr(processor_class, METHOD, keep_arrays)
    return lambda: setattr(processor_class, METHOD, stock)


async def install_if_equal(
    processor_class: Any, request_flat: Callable[[], Awaitable[Any]]
) -> tuple[Callable[[], None] | None, str]:
    """Overrides the method for good if arrays and `FlatLogprobs` of one request are equal.

    Args:
        processor_class: vLLM's `LogprobsProcessor`.
        request_flat: scores a canary with `flat_logprobs` and returns its `FlatLogprobs`.

    Returns:
        The function that restores vLLM's method, or None if vLLM's method stays; and the reason.
    """
    mirror: list[PromptTopK] = []
    try:
        restore = install(processor_class, mirror)
    except TeacherError as error:
        return None, str(error)
    try:
        flat = await request_flat()
    finally:
        restore()
    if len(mirror) == 1 and mirror[0].equals(PromptTopK.from_flat(flat)):
        return install(processor_class), "equal to flat_logprobs on a canary"
    return None, "arrays differ from flat_logprobs on a canary"
