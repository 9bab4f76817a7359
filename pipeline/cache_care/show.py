"""A sequence and its cached rows as a table that a person can read, token by token."""

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
        ConfigError: none does, or several do.
    """
    known = list(identifiers)
    found = [identifier for identifier in known if identifier.startswith(wanted)]
    if wanted in found:
        return wanted
    if not found:
        raise ConfigError(
            f"no sequence of this run begins with {wanted!r}; the first of {len(known)} is "
            f"{known[0]}"
        )
    if len(found) > 1:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise ConfigError(f"{len(found)} sequences begin with {wanted!r}: {shown}; give more of it")
    return found[0]


def token_table(
    sequence: TokenSequence,
    rows: Mapping[str, SparseLogprobs | None],
    text_of: Callable[[int], str],
) -> str:
    """One line per position and teacher: the gold token, its probability, the most probable
    entries, the mass outside all kept entries, and the lower bound of the entropy in nats.

    Drawn entries are shown by how often they were drawn, and the mass outside is that outside all
    captured ones.

    Args:
        rows: by teacher; None where it has none.
        text_of: a token's text.
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
        f"{', '.join(sequence.generators)}, ended by {sequence.finish_reason}",
        f"before it: {quoted(before)}",
    ]
    heading += [f"{name} has no row for it" for name in rows if name not in scored]
    return "\n".join([*heading, table(header, lines)])


def quoted(text: str) -> str:
    """A text with its blanks and line ends visible."""
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") + "'"


def _entries(row: SparseLogprobs, text_of: Callable[[int], str]) -> list[str]:
    """Per position the first entries."""
    starts = np.cumsum(row.num_entries, dtype=np.int64) - row.num_entries
    head_N, lines = row.head_N, []
    figures = np.empty(len(head_N), dtype=object)
    figures[head_N] = [f"{p:.4f}" for p in np.exp(row.logprobs.astype(np.float64))]
    figures[~head_N] = [f"drawn {count}x" for count in row.counts]
    for start, count in zip(starts.tolist(), row.num_entries.tolist(), strict=True):
        shown = range(start, start + min(count, ENTRIES_SHOWN))
        texts = [f"{quoted(text_of(int(row.token_ids[n])))} {figures[n]}" for n in shown]
        more = f"  … {count - ENTRIES_SHOWN} more" if count > ENTRIES_SHOWN else ""
        lines.append("  ".join(texts) + more)
    return lines
