"""Several sequences in one micro-batch: the plan of a rank's micro-batches, and their arrays.

The plan decides only which sequences are computed together, never what is summed: a micro-batch
holds whole sequences within a token budget, packed into one row or padded in rows of their own;
ranks get equal numbers of micro-batches, and an empty micro-batch weighs nothing. Loader processes
pack, so nothing here needs torch.

Legend: R rows of a micro-batch, T tokens of a row, P positions, K entries, M teachers (as many as
any of its sequences has with a positive weight).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import TrainingError
from students.data.examples import Example
from students.data.hidden_states import PackedHiddenStates

NOTHING = Example(
    input_ids=np.zeros(1, np.int32),
    logit_indices=np.zeros(0, np.int64),
    gold_ids=np.zeros(0, np.int64),
    token_ids=np.zeros((1, 0, 1), np.int32),
    logprobs=np.zeros((1, 0, 1), np.float16),
    tail_mass=np.zeros((1, 0), np.float16),
    teacher_weights=np.zeros((1, 0), np.float32),
)
"""One token and no positions: ranks are padded with micro-batches of it."""


@dataclass(frozen=True)
class PackedBatch:
    """The arrays of `MicroBatch` and its `Targets`, under the same names and of the same shapes."""

    input_ids: np.ndarray
    position_ids: np.ndarray | None
    logit_indices: np.ndarray
    gold_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    teacher_weights: np.ndarray
    hidden_states: PackedHiddenStates | None = None


def pack(examples: Sequence[Example], padded: bool = False) -> PackedBatch:
    """Packs sequences into one row, or pads each in a row of its own. Without any sequence it gives
    a row of one token and no positions, which weighs nothing.
    """
    examples = examples or [NOTHING]
    lengths = [len(example.input_ids) for example in examples]
    if padded:
        input_ids_RT = np.zeros((len(examples), max(lengths)), np.int64)
        for row, example in zip(input_ids_RT, examples, strict=True):
            row[: len(example.input_ids)] = example.input_ids
        starts, position_ids = np.arange(len(examples)) * max(lengths), None
    else:
        input_ids_RT = np.concatenate([e.input_ids for e in examples]).astype(np.int64)[None]
        starts = np.cumsum([0, *lengths[:-1]])
        position_ids = np.concatenate([np.arange(n) for n in lengths])[None]
    indices = [e.logit_indices + start for e, start in zip(examples, starts, strict=True)]
    return PackedBatch(
        input_ids=input_ids_RT,
        position_ids=position_ids,
        logit_indices=np.concatenate(indices),
        gold_ids=np.concatenate([example.gold_ids for example in examples]),
        **_targets(examples),
    )


def _targets(examples: Sequence[Example]) -> dict[str, Any]:
    """The targets at all positions, one sequence after another."""
    edges = np.cumsum([0] + [len(example.gold_ids) for example in examples])
    num_teachers = max(example.token_ids.shape[0] for example in examples)
    num_entries = max(example.token_ids.shape[2] for example in examples)
    shape = (num_teachers, int(edges[-1]), num_entries)
    precision = np.result_type(*(example.logprobs for example in examples))
    token_ids_MPK, logprobs_MPK = np.zeros(shape, np.int32), np.full(shape, -np.inf, precision)
    tail_MP = np.zeros(shape[:2], np.result_type(*(example.tail_mass for example in examples)))
    weights_MP = np.zeros(shape[:2], np.float32)
    for example, start, stop in zip(examples, edges[:-1], edges[1:], strict=True):
        m, _, k = example.token_ids.shape
        token_ids_MPK[:m, start:stop, :k] = example.token_ids
        logprobs_MPK[:m, start:stop, :k] = example.logprobs
        tail_MP[:m, start:stop] = example.tail_mass
        weights_MP[:m, start:stop] = example.teacher_weights
    return {
        "token_ids": token_ids_MPK,
        "logprobs": logprobs_MPK,
        "tail_mass": tail_MP,
        "teacher_weights": weights_MP,
    }


def plan_micro_batches(
    lengths: Sequence[int], tokens_per_micro_batch: int, world_size: int, padded: bool = False
) -> list[list[list[int]]]:
    """The sequences that each rank computes together: for every rank an equal number of lists of
    indices into `lengths`.

    Packed rows are as few as the budget allows, or as few as best-fit decreasing needs, rounded up
    to the world size. Where they leave room, sequences are spread over them evenly, longest first,
    so that ranks wait little for one another. If rows are padded, sequences of like length come
    together, and padding counts in the budget. A micro-batch may stay empty.

    Raises:
        TrainingError: a sequence is longer than the budget.
    """
    refuse_long_sequences(
        [(str(i), length) for i, length in enumerate(lengths)], tokens_per_micro_batch
    )
    if padded:
        return _padded_plan(lengths, [1] * len(lengths), tokens_per_micro_batch, world_size)
    rows = _packed_rows(lengths, tokens_per_micro_batch, world_size)
    rows.sort(key=lambda row: -sum(lengths[i] for i in row))
    return [rows[rank::world_size] for rank in range(world_size)]


def plan_groups(
    lengths: Sequence[int],
    tokens_per_micro_batch: int,
    world_size: int,
    padded: bool,
    together: int,
    bounds: Sequence[int] = (),
) -> list[list[list[int]]]:
    """`plan_micro_batches`, with every `together` successive sequences in one micro-batch, and the
    sequences on the two sides of a bound in different ones.

    Args:
        bounds: `length_bounds` of the student, in ascending order. A group stands on the side of
            its longest sequence.

    Raises:
        TrainingError: such a group is longer than the budget.
    """
    groups = [list(range(len(lengths)))[i : i + together] for i in range(0, len(lengths), together)]
    sides: list[list[list[int]]] = [[] for _ in range(len(bounds) + 1)]
    for group in groups:
        sides[side_of(max(lengths[i] for i in group), bounds)].append(group)
    plans = [
        _plan_of_groups(side, lengths, tokens_per_micro_batch, world_size, padded)
        for side in [side for side in sides if side] or [[]]
    ]
    return [[row for plan in plans for row in plan[rank]] for rank in range(world_size)]


def side_of(length: int, bounds: Sequence[int]) -> int:
    """Number of the bounds that a sequence exceeds."""
    return bisect_left(bounds, length)


def _plan_of_groups(
    groups: list[list[int]],
    lengths: Sequence[int],
    tokens_per_micro_batch: int,
    world_size: int,
    padded: bool,
) -> list[list[list[int]]]:
    sizes = [group_size([lengths[i] for i in group], padded) for group in groups]
    if padded:
        refuse_long_sequences([(str(i), n) for i, n in enumerate(sizes)], tokens_per_micro_batch)
        longest = [max(lengths[i] for i in group) for group in groups]
        plan = _padded_plan(longest, list(map(len, groups)), tokens_per_micro_batch, world_size)
    else:
        plan = plan_micro_batches(sizes, tokens_per_micro_batch, world_size)
    return [[[i for g in row for i in groups[g]] for row in rank] for rank in plan]


def group_size(lengths: Sequence[int], padded: bool) -> int:
    """Tokens of the budget that sequences in one micro-batch take."""
    return len(lengths) * max(lengths) if padded else sum(lengths)


def refuse_long_groups(
    lengths: Sequence[int] | np.ndarray, tokens_per_micro_batch: int, padded: bool, together: int
) -> None:
    """Refuses sequences of which some `together` do not fit into one micro-batch: the order of the
    data may put any of them together.

    Raises:
        TrainingError: the longest sequences do not fit.
    """
    longest = group_size(np.sort(lengths)[-together:].tolist(), padded)
    if longest > tokens_per_micro_batch:
        raise TrainingError(
            f"a relation loss keeps {together} sequences in one micro-batch, but the longest "
            f"{together} take {longest} tokens and training.tokens_per_micro_batch is "
            f"{tokens_per_micro_batch}: raise training.tokens_per_micro_batch, or lower the loss's "
            "`sequences`"
        )


def refuse_groups_across_bounds(
    lengths: Sequence[int] | np.ndarray, bounds: Sequence[int], together: int
) -> None:
    """Refuses groups of sequences whose positions the student computes in different ways.

    Args:
        bounds: `length_bounds` of the student.

    Raises:
        TrainingError: sequences of both sides of a bound may come together.
    """
    for bound in bounds:
        shortest, longest = np.min(lengths), np.max(lengths)
        if together > 1 and shortest <= bound < longest:
            raise TrainingError(
                f"a relation loss keeps {together} sequences in one micro-batch, but the student "
                f"has other rotary factors (LongRoPE) above {bound} tokens and the sequences have "
                f"{shortest} to {longest}: leave the relation loss out, or drop longer "
                "sequences by synthesis.max_sequence_tokens or by the filter `length`"
            )


def refuse_long_sequences(lengths: Sequence[tuple[str, int]], tokens_per_micro_batch: int) -> None:
    """Refuses sequences that are longer than the budget: sequences are never cut.

    Args:
        lengths: name and number of tokens of each sequence.

    Raises:
        TrainingError: a sequence is too long; the message names it.
    """
    too_long = [
        f"{name} ({length} tokens)" for name, length in lengths if length > tokens_per_micro_batch
    ]
    if too_long:
        rest = f" and {len(too_long) - 10} more" if len(too_long) > 10 else ""
        shown = ", ".join(too_long[:10]) + rest
        raise TrainingError(
            f"{len(too_long)} sequences are longer than training.tokens_per_micro_batch "
            f"({tokens_per_micro_batch}): {shown}: raise training.tokens_per_micro_batch, or drop "
            "such sequences by synthesis.max_sequence_tokens (their answers are then written anew) "
            "or by the filter `length` (their answers are not written anew)"
        )


def _padded_plan(
    lengths: Sequence[int], rows: Sequence[int], budget: int, world_size: int
) -> list[list[list[int]]]:
    """An equal number of groups for every rank; rows times longest row of a group fit the budget,
    and the most expensive group comes first.

    Args:
        rows: number of rows that each of the `lengths` stands for.
    """
    groups: list[list[int]] = []
    num_rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        num_rows += rows[i]
        if groups and lengths[groups[-1][0]] * num_rows <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
            num_rows = rows[i]
    while not groups or len(groups) % world_size:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
            continue
        group = groups.pop(largest)
        groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    groups.sort(key=lambda group: -sum(rows[i] * lengths[i] for i in group))
    return [groups[rank::world_size] for rank in range(world_size)]


def _packed_rows(lengths: Sequence[int], budget: int, world_size: int) -> list[list[int]]:
    """Rows of at most `budget` tokens, as many as a multiple of the world size, of even lengths if
    the budget leaves room for that.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    fewest = _whole_rounds(-(-sum(lengths) // budget), world_size)
    rows = _spread(order, lengths, budget, fewest)
    if rows is not None:
        return rows
    fitted = _best_fit(order, lengths, budget)
    num_rows = _whole_rounds(len(fitted), world_size)
    if num_rows > fewest:
        rows = _spread(order, lengths, budget, num_rows)
    return rows or fitted + [[] for _ in range(num_rows - len(fitted))]


def _whole_rounds(count: int, world_size: int) -> int:
    """Smallest multiple of the world size that is at least `count`, and at least one round."""
    return -(-max(count, 1) // world_size) * world_size


def _spread(
    order: Sequence[int], lengths: Sequence[int], budget: int, num_rows: int
) -> list[list[int]] | None:
    """Puts every sequence into the row that is shortest so far; None if a row exceeds the budget.

    Args:
        order: sequences, the longest first.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    # A row's length times `num_rows`, plus its number: plain integers compare fastest.
    heap = list(range(num_rows))
    for i in order:
        shortest = heap[0]
        longer = shortest + lengths[i] * num_rows
        if longer >= (budget + 1) * num_rows:
            return None
        rows[shortest % num_rows].append(i)
        heapq.heapreplace(heap, longer)
    return rows


def _best_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Puts every sequence into the fullest row that has room for it, or else into a new row.

    Args:
        order: sequences, the longest first.
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[list[int]]] = defaultdict(list)  # rows by tokens left
    rooms = 0  # bit n is set if a row has n tokens left
    for i in order:
        length = lengths[i]
        large_enough = rooms >> length
        if large_enough:
            room = length + (large_enough & -large_enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = budget, []
            rows.append(row)
        row.append(i)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
