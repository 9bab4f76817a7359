"""Hold-out numbers where the caches hold draws: what is not linear in p is not reported."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.cache.selection import select
from pipeline.config.scoring import Sampled, Selection, TopP
from pipeline.records import CombinedTargets, DatasetEntry, SparseLogprobs, TokenSequence
from students.architecture.build import load_model
from students.data.examples import example_of
from students.evaluation import Measured, domain_means, student_sums, teacher_holdout_numbers
from tests.support.tiny_models import save_tiny_llama

VOCABULARY, POSITIONS = 12, 5
SEQUENCE = TokenSequence("s", np.arange(6, dtype=np.int32), ((1, 6),), "p", "words", ("t",), "stop")
ENTRY = DatasetEntry("s", "p", "words", "holdout", ("t",), "shard", 6, POSITIONS)
KEPT = TopP(type="top_p", mass=0.9, max_entries=6)
DRAWN = Sampled(type="sampled", num_draws=8)


def row_of(rule: Selection, teacher: str) -> SparseLogprobs:
    logits = np.random.default_rng(len(teacher)).normal(0, 2, (POSITIONS, VOCABULARY))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1)
    captured = np.take_along_axis(logs, ids, 1).astype(np.float32)
    return select("s", ids, captured, captured[:, 2], rule, teacher=teacher)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("student"), VOCABULARY)


@pytest.mark.parametrize(
    ("rules", "measured"), [((KEPT, KEPT), True), ((DRAWN, KEPT), False), ((DRAWN, DRAWN), False)]
)
def test_kl_and_agreement_are_numbers_only_without_draws(
    rules: tuple[Selection, Selection], measured: bool, student: Path
) -> None:
    rows = {name: row_of(rule, name) for name, rule in zip(("t", "uu"), rules, strict=True)}
    weights = np.full((2, POSITIONS), 0.5, np.float32)
    examples = {ENTRY: example_of(CombinedTargets(SEQUENCE, tuple(rows.values()), weights))}
    readers = {name: SimpleNamespace(row={"s": row}.get) for name, row in rows.items()}
    sums = student_sums(load_model(student), [ENTRY], {None: Measured(examples)}, 64, True)
    ours = {"student": domain_means([ENTRY], sums[None])}
    theirs = teacher_holdout_numbers([ENTRY], examples, readers)
    for name, numbers in (ours | theirs).items():
        found = numbers["words"]
        assert found["tokens"] == POSITIONS and found["loss"] > 0
        assert (found["kl_to_mixture"] is not None) == measured
        assert (found["agreement"] is not None) == measured
        if name in rows:
            gold = rows[name].gold_logprobs.astype(np.float64)
            assert found["loss"] == pytest.approx(-gold.mean())
