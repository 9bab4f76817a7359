"""What was dropped, and why: Parquet files for people to look at; nothing else reads them."""

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
        reason: the filter; or `too_long`, `truncated`, `empty` before an answer becomes a sequence.
        answer: None where none was asked for.
        sequence_id: None where there is none.
    """

    reason: str
    detail: str
    prompt_id: str
    domain: str
    split: str
    generators: tuple[str, ...]
    prompt: str
    answer: str | None = None
    sequence_id: str | None = None


def write_rejected(path: str, rows: Sequence[Rejected]) -> None:
    """Writes one file of rejected answers."""
    values = [asdict(row) | {"generators": list(row.generators)} for row in rows]
    storage.write_table(path, pa.Table.from_pylist(values, schema=REJECTED_SCHEMA))
