"""Datasets of logits from elsewhere: settings of any form, and files that do not fit them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cache_care.distillkit import CONFIG_FILE, pack_bits, read_distillkit
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

LOGPROBS = np.log([[0.5, 0.25], [0.75, 0.125]])
IDS = [[3, 9], [15, 0]]
GOOD = {"d": 16, "k": 2, "exact_k": 2, "exact_dtype": "float32", "delta_encoding": False}
TERMS = {"exact_k": 0, "polynomial_terms": [0, "sqrt"], "term_dtype": "float32"}
WORDS = ("holds no settings of a capture",)


def columns(logprobs: Any = LOGPROBS, ids: Any = IDS, dtype: str = "<f4", **others: Any) -> dict:
    packed = pack_bits(np.array(ids), 4)
    values = np.array(logprobs, dtype).view(np.uint8)
    row = {
        "input_ids": [1, 2, 3],
        "compressed_logprobs": values.tolist(),
        "bytepacked_indices": packed.tolist(),
    }
    return {name: [value] for name, value in (row | others).items()}


def settings(**changes: Any) -> str:
    return yaml.safe_dump(GOOD | changes)


def without(name: str) -> str:
    return yaml.safe_dump({key: value for key, value in GOOD.items() if key != name})


def read(folder: Path, text: str | bytes, table: Any) -> list[float]:
    """Probabilities of the first position of the only row."""
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    path = folder / "data_0.parquet"
    if callable(table):
        table(path)
    else:
        pq.write_table(pa.table(table), path)
    (foreign,) = read_distillkit(str(folder))
    assert foreign.token_ids.tolist() == IDS
    return [round(float(p), 3) for p in np.exp(foreign.logprobs[0])]


SETTINGS = [
    Case("empty", "", WORDS),
    Case("a comment alone", "# d: 16\n", WORDS),
    Case("a list", "- d\n- k\n", WORDS),
    Case("a text", "float16", WORDS),
    Case("a number", "16", WORDS),
    Case("null", "null", WORDS),
    Case("brackets left open", "{d: 16, k: [", (*WORDS, "line 1")),
    Case("tabs", "d:\t16\n\tk: 2\n", WORDS),
    Case("two documents", "d: 16\n---\nk: 2\n", WORDS),
    Case("an object of Python", "!!python/object/apply:os.getcwd []", WORDS),
    Case(
        "a billion laughs",
        "a: &a [x, x]\n"
        + "\n".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]"
            for i in range(12)
        ),
        WORDS,
    ),
    Case("latin-1", "d: 16 # é".encode("latin-1"), WORDS),
    Case("NULs", b"\0" * 100, WORDS),
    Case("binary", b"PAR1\x15\x04\x15", WORDS),
    Case("no d", without("d"), (*WORDS, "d: field required")),
    Case("no k", without("k"), (*WORDS, "k: field required")),
    Case("no exact_k", without("exact_k"), (*WORDS, "exact_k: field required")),
    Case("d twice", settings() + "d: 17\n", (*WORDS, "d")),
    Case("d of null", settings(d=None), ("d: input should be a valid integer, found None",)),
    Case("d of 0", settings(d=0), ("d: ", "found 0")),
    Case("d below 0", settings(d=-5), ("d: ", "found -5")),
    Case("d of 10^30", settings(d=10**30), (*WORDS, "d")),
    Case("d of 2^24 + 1", settings(d=2**24 + 1), ("d: ", "found 16777217")),
    Case("d as text", settings(d="16"), ("d: ", "found '16'")),
    Case("k as text", settings(k="2"), ("k: ", "found '2'")),
    Case("k as a number with a point", settings(k=2.0), ("k: ", "found 2.0")),
    Case("k true", settings(k=True), ("k: ", "found True")),
    Case("k of 0", settings(k=0, exact_k=0), ("k: ", "found 0")),
    Case("k of 10^9", settings(k=10**9), ("k: ", "found 1000000000")),
    Case("k as a list", settings(k=[2]), ("k: ", "found [2]")),
    Case("k larger than the file's", settings(k=8, exact_k=8), ("row 0 does not fit",)),
    Case("exact_k below 0", settings(exact_k=-1), ("exact_k: ", "found -1")),
    Case("exact_k above k", settings(exact_k=3), ("exact_k 3 and k 2",)),
    Case(
        "exact_k below k without terms",
        settings(exact_k=1),
        ("exact_k 1 and k 2", "polynomial_terms"),
    ),
    Case("exact_k NaN", settings(exact_k=float("nan")), ("exact_k: ", "found nan")),
    Case("exact_k null", settings(exact_k=None), ("exact_k: ", "found None")),
    Case("an unknown dtype", settings(exact_dtype="int8"), ("exact_dtype: ", "found 'int8'")),
    Case(
        "a dtype of torch",
        settings(exact_dtype="torch.float16"),
        ("exact_dtype: ", "'torch.float16'"),
    ),
    Case("a dtype that is a number", settings(exact_dtype=16), ("exact_dtype: ", "found 16")),
    Case(
        "a dtype that is wider",
        settings(exact_dtype="float64"),
        ("row 0 does not fit", "bytes, but needs"),
    ),
    Case(
        "an unknown term",
        settings(exact_k=0, polynomial_terms=["cos"]),
        ("polynomial_terms.0", "'cos'"),
    ),
    Case(
        "a power below 0",
        settings(exact_k=0, polynomial_terms=[-1]),
        ("polynomial_terms.0", "found -1"),
    ),
    Case("a power of 10^9", settings(exact_k=0, polynomial_terms=[10**9]), ("polynomial_terms.0",)),
    Case(
        "terms as one number",
        settings(exact_k=0, polynomial_terms=2),
        ("polynomial_terms", "found 2"),
    ),
    Case(
        "terms without end",
        settings(exact_k=0, polynomial_terms=[1] * 10_000),
        ("polynomial_terms",),
    ),
    Case("quantised residuals", settings(residual_bins=[{"num_bits": 4}]), ("residual_bins",)),
    Case("residuals that are no list", settings(residual_bins=4), ("residual_bins", "found 4")),
    Case(
        "delta_encoding as text", settings(delta_encoding="no"), ("delta_encoding: ", "found 'no'")
    ),
    Case("a text of 1 MB", settings(d="x" * 10**6), ("d: ", "found 'xxx")),
    Case("good", settings()),
    Case("other settings beside", settings(error_diffusion=True, residual_bins=[])),
    Case("terms of null", settings(polynomial_terms=None)),
]


def raw(path: Path) -> None:
    path.write_bytes(b"PAR1 garbage PAR1")


def cut(path: Path) -> None:
    pq.write_table(pa.table(columns()), path)
    path.write_bytes(path.read_bytes()[:-50])


FILES: list[Case] = [
    Case("no Parquet file", raw, ("not a complete Parquet file",)),
    Case("cut off", cut, ("not a complete Parquet file",)),
    Case("a folder", Path.mkdir, ("no Parquet file",)),
    Case("other columns", {"text": ["q"]}, ("has the columns text", "'input_ids'")),
    Case("one column is missing", {"input_ids": [[1]]}, ("'compressed_logprobs'",)),
    Case("a column that is null", columns(input_ids=None), ("row 0 does not fit",)),
    Case("null instead of bytes", columns(bytepacked_indices=None), ("row 0 does not fit",)),
    Case(
        "a null inside", columns(compressed_logprobs=[[1, None], [2, 3]]), ("row 0 does not fit",)
    ),
    Case("texts as ids", columns(input_ids=["a", "b"]), ("row 0 does not fit",)),
    Case("structs as ids", columns(input_ids=[{"a": 1}]), ("row 0 does not fit",)),
    Case(
        "ids beyond 63 bits",
        columns() | {"input_ids": pa.array([[2**64 - 1]], pa.list_(pa.uint64()))},
        ("row 0 does not fit",),
    ),
    Case(
        "numbers that are no bytes",
        columns(bytepacked_indices=[[300], [1]]),
        ("row 0 does not fit",),
    ),
    Case("bytes below 0", columns(bytepacked_indices=[[-1], [1]]), ("row 0 does not fit",)),
    Case("ragged positions", columns(bytepacked_indices=[[1], [1, 2]]), ("row 0 does not fit",)),
    Case(
        "too few bytes",
        columns(compressed_logprobs=[[1, 2], [3, 4]]),
        ("row 0 does not fit", "2 bytes"),
    ),
    Case(
        "no positions",
        columns(compressed_logprobs=[], bytepacked_indices=[]),
        ("row 0 does not fit",),
    ),
    Case(
        "log-probabilities of another length",
        columns(compressed_logprobs=[[0] * 8]),
        ("row 0 does not fit",),
    ),
    Case(
        "NaN before a number",
        columns([[np.nan, -1], [-1, -2]]),
        ("no number stands before one that is",),
    ),
    Case("infinity", columns([[np.inf, -1], [-1, -2]]), ("no number stands before one that is",)),
    Case(
        "a probability above 1",
        columns([[5.0, -1], [-1, -2]]),
        ("a log-probability is 5, above 0",),
    ),
    Case("good", columns()),
]


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_settings_are_answered(case: Case, tmp_path: Path) -> None:
    found = check_answer(case, lambda: read(tmp_path, case.given, columns()))
    assert case.refusal or found == [0.5, 0.25]


@pytest.mark.parametrize("case", FILES, ids=str)
def test_files_are_answered(case: Case, tmp_path: Path) -> None:
    found = check_answer(case, lambda: read(tmp_path, settings(), case.given))
    assert case.refusal or found == [0.5, 0.25]


ODD: list[Case] = [
    Case(
        "an id of d itself",
        (settings(d=10, k=2), columns(ids=[[10, 1], [1, 2]])),
        ("token id 10, but d is 10",),
    ),
    Case("nothing in a position", (settings(), columns([[np.nan] * 2, [-np.inf] * 2]))),
    Case(
        "an entry without a value behind", (settings(), columns([[-0.5, -np.inf], [-0.5, np.nan]]))
    ),
    Case("terms", (settings(**TERMS), columns([[-1.0, -1.0], [-2.0, 0.0]]))),
]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_values_are_answered(case: Case, tmp_path: Path) -> None:
    def no_nan() -> bool:
        (tmp_path / CONFIG_FILE).write_text(case.given[0])
        pq.write_table(pa.table(case.given[1]), tmp_path / "data_0.parquet")
        (foreign,) = read_distillkit(str(tmp_path))
        return not np.isnan(foreign.logprobs).any()

    is_sound = check_answer(case, no_nan)
    assert case.refusal or is_sound
