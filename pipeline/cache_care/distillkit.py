"""DistillKit's datasets of logits: exported from a cache, and imported into one.

The format is implemented from its documentation (arcee-ai/DistillKit, README.md, "Logit
Compression" and "Compression Deep-Dive", and the field descriptions of its configuration): a folder
of Parquet files and `compression_config.yaml`, with one row per sequence:

    input_ids            list<uint64>[T]
    compressed_logprobs  list<list<uint8>>[T - 1]   row r is over the token at index r + 1
    bytepacked_indices   list<list<uint8>>[T - 1]

A position holds `k` log-probabilities in descending order: `exact_k` numbers of `exact_dtype`, then
the coefficients (`term_dtype`) of a polynomial that gives the other log-probabilities by their
rank, counted from 0 after the exact numbers. It also holds `k` token ids of `ceil(log2 d)` bits
each, most significant bit first, padded to whole bytes. With `delta_encoding` each number is the
difference from the number before it.

The format has no place for loss spans, for the gold token's log-probability, tail mass and entropy.
An export gives log-probability -inf to positions outside the loss spans and to entries beyond a
position's own number. An import takes the gold token's log-probability from the entries, or the
largest possible value where the gold token is not among them; tail mass is the mass that the
entries leave, and the entropy bound is computed from the entries.

Legend: T tokens, P positions, K entries, B bytes of a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field

from pipeline import storage
from pipeline.cache.row_checks import ID_BITS, MAX_LOGPROB
from pipeline.cache.selection import select
from pipeline.cache_care.long_table import Scored, write_files
from pipeline.config.scoring import Selection
from pipeline.errors import CacheError
from pipeline.messages import listed, shorter
from pipeline.plain_json import NotJSONError, checked
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.yaml_text import YamlError, read_yaml

CONFIG_FILE = "compression_config.yaml"
DISTILLKIT_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
    ]
)
MOST_ENTRIES = 1 << 16
NumberType = Literal["float16", "bfloat16", "float32", "float64"]
Power = Annotated[int, Field(ge=0, le=64)]
DTYPES: dict[NumberType, str] = {
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
}
TERMS = {"sqrt": np.sqrt, "exp": np.exp}


@dataclass(frozen=True)
class ForeignSequence:
    """One sequence of a DistillKit dataset.

    Attributes:
        input_ids: int64[T].
        token_ids: int64[T - 1, K].
        logprobs: float32[T - 1, K]; -inf for an entry or a position without a value.
    """

    input_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


def most_entries(scored: Iterable[Scored]) -> int:
    """Largest number of entries of a position, at least 1, for `export_distillkit`.

    Raises:
        CacheError: a row holds draws, which have no log-probabilities.
    """
    most = 1
    for sequence, row in scored:
        if row.is_drawn:
            raise CacheError(
                f"the row of sequence {sequence.sequence_id} holds draws, and DistillKit's format "
                "has no place for counts; export it as parquet-long"
            )
        most = max(most, int(row.num_entries.max()))
    return most


def export_distillkit(
    scored: Iterable[Scored], folder: str, vocabulary: int, max_entries: int
) -> int:
    """Writes a DistillKit dataset with the log-probabilities of the cache (float16, all exact).

    Args:
        vocabulary: rows of the teacher's LM head; decides the bits of an id.
        max_entries: largest number of entries of a position (`most_entries`); positions with fewer
            entries are padded.

    Returns:
        The number of sequences.
    """
    config = {
        "d": vocabulary,
        "k": max_entries,
        "exact_k": max_entries,
        "exact_dtype": "float16",
        "polynomial_terms": None,
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }
    storage.write_bytes(storage.join(folder, CONFIG_FILE), yaml.safe_dump(config).encode())

    def table(batch: Sequence[Scored]) -> pa.Table:
        rows = [_distillkit_row(s, r, vocabulary, max_entries) for s, r in batch]
        return pa.Table.from_pylist(rows, schema=DISTILLKIT_SCHEMA)

    return write_files(scored, folder, table)


def read_distillkit(folder: str) -> Iterator[ForeignSequence]:
    """Reads a DistillKit dataset, file by file.

    Raises:
        CacheError: its configuration is missing or has quantised residuals, which are not
            supported; or a row does not fit the configuration.
        StorageError: a file cannot be read.
    """
    path = storage.join(folder, CONFIG_FILE)
    if not storage.exists(path):
        raise CacheError(
            f"{folder} has no {CONFIG_FILE}, and without the settings of its capture its numbers "
            "cannot be read; copy DistillKit's `logprob_compressor` settings into that file"
        )
    settings = _settings(path)
    files = storage.list_files(folder, ".parquet")
    if not files:
        raise CacheError(
            f"{folder} has no Parquet file; name the folder that holds the dataset's data_*.parquet"
        )
    for info in files:
        file = storage.join(folder, info.base_name)
        for i, row in enumerate(_rows_of(file)):
            try:
                yield _foreign_sequence(row, settings)
            except (ValueError, TypeError, OverflowError, ArithmeticError) as error:
                raise CacheError(
                    f"{file} row {i} does not fit {CONFIG_FILE}: {shorter(error)}; copy the "
                    "settings of this dataset's own capture into that file"
                ) from error


def _rows_of(file: str) -> list[dict[str, Any]]:
    """Rows of one file of a dataset."""
    table = storage.read_table(file)
    for field in DISTILLKIT_SCHEMA:
        if table.schema.names.count(field.name) != 1:
            raise CacheError(
                f"{file} has the columns {listed(table.schema.names)}, but a dataset of DistillKit "
                f"has one column {field.name!r}: name the folder of the capture"
            )
    return table.select(DISTILLKIT_SCHEMA.names).to_pylist()


class _Settings(BaseModel):
    """Settings of a capture, in DistillKit's words; others do not concern the reading.

    Attributes:
        d: number of token ids.
        k: entries of a position; the first `exact_k` of them are exact.
        polynomial_terms: powers of the rank, or names of `TERMS`.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    d: Annotated[int, Field(ge=1, le=1 << ID_BITS)]
    k: Annotated[int, Field(ge=1, le=MOST_ENTRIES)]
    exact_k: Annotated[int, Field(ge=0, le=MOST_ENTRIES)]
    exact_dtype: NumberType = "float32"
    term_dtype: NumberType = "float32"
    polynomial_terms: (
        Annotated[list[Power | Literal["sqrt", "exp"]], Field(max_length=64)] | None
    ) = None
    residual_bins: list[Any] | None = None
    normalize_t: bool = False
    delta_encoding: bool = True


def _settings(path: str) -> _Settings:
    try:
        settings = checked(read_yaml(storage.read_bytes(path)), _Settings)
    except (YamlError, NotJSONError) as error:
        raise CacheError(
            f"{path} holds no settings of a capture: {error}; copy DistillKit's "
            "`logprob_compressor` settings into that file"
        ) from error
    if settings.exact_k > settings.k or (
        settings.exact_k < settings.k and not settings.polynomial_terms
    ):
        raise CacheError(
            f"{path} has exact_k {settings.exact_k} and k {settings.k}, but the exact entries are "
            "the first of all k, and the others need polynomial_terms: copy the settings of this "
            "dataset's own capture"
        )
    if settings.residual_bins:
        raise CacheError(
            f"{path} has residual_bins, but quantised residuals cannot be read; capture the "
            "dataset without them"
        )
    return settings


def imported_row(
    sequence: TokenSequence,
    foreign: ForeignSequence,
    rule: Selection,
    teacher: str,
    num_rows: int = 1 << ID_BITS,
) -> SparseLogprobs | None:
    """The cache row made from a foreign sequence of the same tokens, by the run's own selection.

    Args:
        teacher: name of the teacher for the draws, see `select`.
        num_rows: number of ids that the teacher has.

    Returns:
        The row, or None if a position in the sequence's loss spans has no entries.

    Raises:
        CacheError: the sequence has an id that the teacher has not.
    """
    rows_P = sequence.position_indices - 1
    if len(foreign.logprobs) <= rows_P[-1]:
        return None
    order_PK = np.argsort(-foreign.logprobs[rows_P], axis=1, kind="stable")
    logprobs_PK = np.take_along_axis(foreign.logprobs[rows_P], order_PK, axis=1)
    token_ids_PK = np.take_along_axis(foreign.token_ids[rows_P], order_PK, axis=1)
    if not np.isfinite(logprobs_PK[:, 0]).all():
        return None
    finite_PK = np.isfinite(logprobs_PK)
    is_gold_PK = (token_ids_PK == sequence.gold_ids[:, None]) & finite_PK
    mass_P = np.exp(np.where(finite_PK, logprobs_PK, -np.inf).astype(np.float64)).sum(axis=1)
    last_P = np.where(finite_PK, logprobs_PK, np.inf).min(axis=1)
    with np.errstate(divide="ignore"):
        at_most_P = np.minimum(last_P, np.log(np.clip(1.0 - mass_P, 0.0, None)))
    gold_P = np.where(
        is_gold_PK.any(axis=1), np.where(is_gold_PK, logprobs_PK, -np.inf).max(axis=1), at_most_P
    )
    return select(
        sequence.sequence_id,
        token_ids_PK,
        logprobs_PK,
        gold_P,
        rule,
        teacher=teacher,
        num_rows=num_rows,
    )


def pack_bits(values_PK: np.ndarray, num_bits: int) -> np.ndarray:
    """uint8[P, B]: unsigned integers of `num_bits` each, most significant bit first, padded to
    whole bytes with 0.
    """
    shifts = np.arange(num_bits - 1, -1, -1)
    bits = (values_PK[..., None].astype(np.int64) >> shifts) & 1
    return np.packbits(bits.reshape(len(values_PK), -1).astype(np.uint8), axis=1)


def unpack_bits(packed_PB: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """int64[P, count]: the inverse of `pack_bits`.

    Raises:
        ValueError: the bytes hold fewer bits.
    """
    bits = np.unpackbits(packed_PB, axis=1)[:, : num_bits * count]
    weights = 1 << np.arange(num_bits - 1, -1, -1, dtype=np.int64)
    return bits.reshape(len(packed_PB), count, num_bits).astype(np.int64) @ weights


def _index_bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def _distillkit_row(
    sequence: TokenSequence, row: SparseLogprobs, vocabulary: int, max_entries: int
) -> dict[str, Any]:
    shape = (len(sequence.input_ids) - 1, max_entries)
    token_ids_TK, logprobs_TK = np.zeros(shape, np.int64), np.full(shape, -np.inf, "<f2")
    kept_PK = np.arange(max_entries) < row.num_entries[:, None]
    positions, columns = np.nonzero(kept_PK)
    rows = sequence.position_indices[positions] - 1
    token_ids_TK[rows, columns], logprobs_TK[rows, columns] = row.token_ids, row.logprobs
    return {
        "input_ids": sequence.input_ids.tolist(),
        "compressed_logprobs": logprobs_TK.view(np.uint8).tolist(),
        "bytepacked_indices": pack_bits(token_ids_TK, _index_bits(vocabulary)).tolist(),
    }


def _foreign_sequence(row: dict[str, Any], settings: _Settings) -> ForeignSequence:
    packed = np.array(row["bytepacked_indices"], np.uint8).reshape(
        len(row["bytepacked_indices"]), -1
    )
    values = np.array(row["compressed_logprobs"], np.uint8).reshape(len(packed), -1)
    logprobs_PK = _decompress(values, settings)
    is_finite_PK = np.isfinite(logprobs_PK)
    if (is_finite_PK[:, 1:] & ~is_finite_PK[:, :-1]).any():
        raise ValueError("a log-probability that is no number stands before one that is")
    if (highest_logprob := logprobs_PK[is_finite_PK].max(initial=0.0)) > MAX_LOGPROB:
        raise ValueError(f"a log-probability is {highest_logprob:g}, above 0")
    foreign = ForeignSequence(
        input_ids=np.array(row["input_ids"], np.int64),
        token_ids=unpack_bits(packed, _index_bits(settings.d), settings.k),
        logprobs=np.where(is_finite_PK, logprobs_PK, np.float32(-np.inf)),
    )
    if (highest := foreign.token_ids.max(initial=0)) >= settings.d:
        raise ValueError(f"it has the token id {highest}, but d is {settings.d}")
    return foreign


def _decompress(values_PB: np.ndarray, settings: _Settings) -> np.ndarray:
    """float32[P, k]: log-probabilities, from the bytes of each position."""
    terms = settings.polynomial_terms or []
    exact_PK, used = _numbers(values_PB, settings.exact_dtype, settings.exact_k)
    coefficients_PC, _ = _numbers(values_PB[:, used:], settings.term_dtype, len(terms))
    num_others = settings.k - settings.exact_k
    ranks = np.arange(num_others, dtype=np.float64)
    if settings.normalize_t:
        ranks = np.linspace(0, 1, num_others)
    powers_KC = (
        np.stack(
            [ranks**term if isinstance(term, int) else TERMS[term](ranks) for term in terms], axis=1
        )
        if terms
        else np.zeros((num_others, 0))
    )
    logprobs_PK = np.concatenate([exact_PK, coefficients_PC @ powers_KC.T], axis=1)
    if settings.delta_encoding:
        logprobs_PK = np.cumsum(logprobs_PK, axis=1)
    return logprobs_PK.astype(np.float32)


def _numbers(values_PB: np.ndarray, dtype: NumberType, count: int) -> tuple[np.ndarray, int]:
    """float64[P, count] from the first bytes of each position, and the number of these bytes."""
    num_bytes = count * np.dtype(DTYPES[dtype]).itemsize
    if values_PB.shape[1] < num_bytes:
        raise ValueError(f"a position has {values_PB.shape[1]} bytes, but needs {num_bytes}")
    raw = np.ascontiguousarray(values_PB[:, :num_bytes]).view(DTYPES[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64).reshape(len(values_PB), count), num_bytes
