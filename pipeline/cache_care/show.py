"""A sequence and its cached rows as a table for people, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pipeline.errors import ConfigError
from pipeline.messages import table
from pipeline.records import SparseLogprobs, TokenSequence

ENTRIES_SHOWN = 5


def find_sequence(identifiers: Iterable[str], wanted: str) -> str:
    """The one id that begins with `wanted`.

    Raises:
        ConfigError: no id begins with `wanted`, or several do.
    """
    known = list(identifiers)
    fitting = [identifier for identifier in known if identifier.startswith(wanted)]
    if wanted in fitting:
        return wanted
    if not fitting:
        raise ConfigError(
            f"no sequence of this run has an id that begins with {wanted!r}; the first of its "
            f"{len(known)} sequences is {known[0]}"
        )
    if len(fitting) > 1:
        shown = ", ".join(fitting[:3]) + (", …" if len(fitting) > 3 else "")
        raise ConfigError(
            f"{len(fitting)} sequences have ids that begin with {wanted!r}: {shown}; give more "
            "characters of the id"
        )
    return fitting[0]


def token_table(
    sequence: TokenSequence,
    rows: Mapping[str, SparseLogprobs | None],
    text_of: Callable[[int], str],
) -> str:
    """One line per position and teacher: the gold token, its probability, the most probable
    entries, the mass outside all kept entries, and the lower bound of the entropy in nats.

    Drawn entries are shown with the number of times that they were drawn; the mass outside is then
    the mass outside all captured entries.

    Args:
        rows: row of each teacher; None where the teacher has none.
        text_of: function that gives a token's text.
    """
    scored = {name: row for name, row in rows.items() if row is not None}
    entries = {name: _entries(row, text_of) for name, row in scored.items()}
    lines = []
    for j, (index, gold) in enumerate(
        zip(sequence.position_indices, sequence.gold_ids, strict=True)
    ):
        place = [str(j), str(index), quoted(text_of(int(gold)))]
        for name, row in scored.items():
            lines.append(
                [
                    *place,
                    name,
                    f"{np.exp(float(row.gold_logprobs[j])):.4f}",
                    f"{float(row.tail_mass[j]):.4f}",
                    f"{float(row.entropies[j]):.3f}",
                    entries[name][j],
                ]
            )
            place = ["", "", ""]
    first = sequence.position_indices[0]
    before = "".join(text_of(int(token)) for token in sequence.input_ids[:first])
    header = ["position", "index", "token", "teacher", "p(token)", "tail", "entropy", "entries"]
    heading = [
        f"sequence {sequence.sequence_id}, domain {sequence.domain}, written by "
        f"{', '.join(sequence.authors)}, ended by {sequence.finish_reason}",
        f"before it: {quoted(before)}",
    ]
    heading += [f"{name} has no row for this sequence" for name in rows if name not in scored]
    return "\n".join([*heading, table(header, lines)])


def quoted(text: str) -> str:
    """The text in quotes, with its tabs and line ends visible."""
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") + "'"


def _entries(row: SparseLogprobs, text_of: Callable[[int], str]) -> list[str]:
    """Text of the first entries of every position."""
    starts = np.cumsum(row.num_entries, dtype=np.int64) - row.num_entries
    exact_N, lines = row.is_exact_N, []
    figures = np.empty(len(exact_N), dtype=object)
    figures[exact_N] = [f"{p:.4f}" for p in np.exp(row.logprobs.astype(np.float64))]
    figures[~exact_N] = [f"drawn {count}x" for count in row.counts]
    for start, count in zip(starts.tolist(), row.num_entries.tolist(), strict=True):
        shown = range(start, start + min(count, ENTRIES_SHOWN))
        texts = [f"{quoted(text_of(int(row.token_ids[n])))} {figures[n]}" for n in shown]
        more = f"  … {count - ENTRIES_SHOWN} more" if count > ENTRIES_SHOWN else ""
        lines.append("  ".join(texts) + more)
    return lines
