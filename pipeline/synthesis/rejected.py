"""Rejected answers with the reason of each: Parquet files that only people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipeline import storage

REJECTED_SCHEMA = pa.schema(
    [
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("generators", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("sequence_id", pa.string()),
    ],
    metadata={"polystill.schema_version": "1"},
)


@dataclass(frozen=True)
class Rejected:
    """One answer that is not trained on.

    Attributes:
        reason: name of the filter that dropped the answer, or `too_long`, `truncated`, `empty` and
            so on for a reply that never became a sequence.
        detail: explanation for people.
        authors: authors of the answer; the file calls them `generators`.
        answer: text of the answer; None if no answer was asked for.
        sequence_id: id of the sequence; None if the answer never became a sequence.
    """

    reason: str
    detail: str
    prompt_id: str
    domain: str
    split: str
    authors: tuple[str, ...]
    prompt: str
    answer: str | None = None
    sequence_id: str | None = None


def write_rejected(path: str, rows: Sequence[Rejected]) -> None:
    """Writes one file of rejected answers."""
    values = [asdict(row) | {"generators": list(row.authors)} for row in rows]
    storage.write_table(path, pa.Table.from_pylist(values, schema=REJECTED_SCHEMA))
