"""Fidelity to the teachers: sums, intervals, differences and their words."""

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.cache.selection import select
from pipeline.config.scoring import Sampled, Selection, TopK
from pipeline.records import CombinedTargets, DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.report.comparisons import difference_words, fidelity_groups, fidelity_words
from pipeline.report.fidelity import SequenceSums, difference_figures, fidelity_figures
from pipeline.report.headlines import headlines
from pipeline.report.models import Report
from pipeline.report.statistics import mean_interval, t_95
from students.architecture.build import load_model
from students.data.examples import example_of
from students.evaluation import Measured, student_sums
from tests.support.old_run import WRITTEN
from tests.support.tiny_models import save_tiny_llama

VOCABULARY = 12
WHOLE = TopK(type="top_k", max_entries=VOCABULARY)


def sequence_of(name: str, length: int) -> TokenSequence:
    ids = (np.arange(length) * 5 % VOCABULARY).astype(np.int32)
    return TokenSequence(name, ids, ((1, length),), f"p-{name}", "words", ("t",), "stop")


def entry_of(name: str, prompt: str, domain: str, positions: int) -> DatasetEntry:
    return DatasetEntry(name, prompt, domain, "holdout", ("t",), "s", positions + 1, positions)


def row_of(
    sequence: TokenSequence, rule: Selection, seed: int
) -> tuple[SparseLogprobs, np.ndarray]:
    """A teacher's row, and the dense float64 distribution that it is made of."""
    logits = np.random.default_rng(seed).normal(0, 2, (sequence.num_positions, VOCABULARY))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1)
    captured = np.take_along_axis(logs, ids, 1).astype(np.float32)
    gold = logs[np.arange(len(logs)), sequence.gold_ids].astype(np.float32)
    return select(sequence.sequence_id, ids, captured, gold, rule, teacher=str(seed)), logs


@pytest.mark.parametrize("packing", [True, False])
def test_each_teacher_is_measured_as_dense_distributions_say(packing: bool, tmp_path) -> None:
    """One forward pass of the body for all targets; a sequence that a teacher lacks is left out."""
    model = load_model(save_tiny_llama(tmp_path, VOCABULARY))
    sequences = [sequence_of("a", 6), sequence_of("b", 4), sequence_of("c", 9)]
    entries = [
        DatasetEntry(s.sequence_id, s.prompt_id, "words", "holdout", ("t",), "s", len(s.input_ids),
                     s.num_positions)
        for s in sequences
    ]  # fmt: skip
    dense, made = {}, {}
    for seed, teacher in enumerate(("first", "second")):
        rows = [row_of(s, WHOLE, 7 * seed + i) for i, s in enumerate(sequences)]
        dense[teacher] = [logs for _, logs in rows]
        made[teacher] = [row for row, _ in rows]
    weights = [np.full((2, s.num_positions), 0.5, np.float32) for s in sequences]
    mixture = {
        e: example_of(CombinedTargets(s, (made["first"][i], made["second"][i]), weights[i]))
        for i, (e, s) in enumerate(zip(entries, sequences, strict=True))
    }
    alone = {
        teacher: {
            e: example_of(CombinedTargets(s, (made[teacher][i],), np.ones((1, s.num_positions))))
            for i, (e, s) in enumerate(zip(entries, sequences, strict=True))
        }
        for teacher in made
    }
    targets = {
        None: Measured(mixture),
        "first": Measured(alone["first"]),
        "second": Measured(alone["second"], {"a", "c"}),
    }
    found = student_sums(model, entries, targets, 12, packing)
    assert set(found["second"]) == {"a", "c"} and set(found["first"]) == {"a", "b", "c"}
    for i, s in enumerate(sequences):
        with torch.no_grad():
            logits = model(torch.tensor(s.input_ids[None].astype(np.int64))).logits[0].double()
        q_logs = torch.log_softmax(logits, -1).numpy()[s.position_indices - 1]
        for teacher in ("first", "second"):
            if s.sequence_id not in found[teacher]:
                continue
            p_logs = dense[teacher][i]
            expected = (np.exp(p_logs) * (p_logs - q_logs)).sum()
            sums = found[teacher][s.sequence_id]
            assert sums.kl == pytest.approx(expected, rel=0.01)
            assert sums.agreement == (p_logs.argmax(1) == q_logs.argmax(1)).sum()
            gold = q_logs[np.arange(len(q_logs)), s.gold_ids]
            assert sums.loss == pytest.approx(-gold.sum(), rel=1e-5)
        both = [found[teacher].get(s.sequence_id) for teacher in ("first", "second")]
        if None not in both:
            mean = sum(sums.kl for sums in both) / 2
            assert found[None][s.sequence_id].kl == pytest.approx(mean, rel=1e-5)


def test_draws_measure_no_fidelity(tmp_path) -> None:
    model = load_model(save_tiny_llama(tmp_path, VOCABULARY))
    sequence = sequence_of("a", 5)
    row, _ = row_of(sequence, Sampled(type="sampled", num_draws=8), 1)
    entry = entry_of("a", "p", "words", 4)
    example = {entry: example_of(CombinedTargets(sequence, (row,), np.ones((1, 4), np.float32)))}
    sums = student_sums(model, [entry], {None: Measured(example)}, 64)
    assert sums[None]["a"].kl is None and sums[None]["a"].loss > 0
    measured = {"student": sums, "twin": sums}
    assert fidelity_figures(measured, [entry]) == []
    (figures,) = difference_figures(measured, [entry])
    assert figures.kl is None and figures.agreement is None
    assert figures.loss is not None and figures.loss.mean == 0


def test_quantiles_are_those_of_students_t() -> None:
    for freedom in (1, 2, 3, 5, 9, 40, 1000):
        assert t_95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.004)


def test_the_interval_of_equal_groups_is_the_textbook_one() -> None:
    values = [0.2, 0.5, 0.3, 0.9, 0.4]
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert mean_interval([3 * v for v in values], [3] * 5) == pytest.approx(expected, abs=1e-3)
    assert mean_interval([1.0], [3]) is None


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Groups of unequal size, whose items depend on each other."""
    rng, held, trials = np.random.default_rng(3), 0, 600
    for _ in range(trials):
        sizes = rng.integers(5, 60, 25)
        totals = sizes * (0.4 + rng.normal(0, 0.2, 25)) + rng.normal(0, 0.5, 25)
        low, high = mean_interval(totals.tolist(), sizes.tolist()) or (0, 0)
        held += low <= 0.4 <= high
    assert 0.92 < held / trials < 0.98


ENTRIES = [
    entry_of("a", "p", "words", 10),
    entry_of("b", "p", "words", 10),
    entry_of("c", "q", "words", 20),
    entry_of("d", "r", "logic", 10),
    entry_of("e", "s", "logic", 30),
]


def sums_of(kl: list[float], agreement: list[float], loss: float = 1.0) -> dict:
    one = {
        e.sequence_id: SequenceSums(e.num_positions, loss * e.num_positions, k * e.num_positions,
                                    a * e.num_positions)
        for e, k, a in zip(ENTRIES, kl, agreement, strict=True)
    }  # fmt: skip
    return {None: one, "owl": {i: s for i, s in one.items() if i != "b"}}


SUMS = {
    "student": sums_of([0.1, 0.3, 0.1, 0.2, 0.1], [0.9, 0.9, 0.8, 0.9, 1.0]),
    "twin": sums_of([0.3, 0.5, 0.3, 0.4, 0.31], [0.8, 0.8, 0.8, 0.7, 0.9]),
    "start": sums_of([0.1, 0.3, 0.1, 0.1, 0.12], [0.9, 0.9, 0.8, 0.8, 0.99], 1.5),
}


@pytest.fixture
def report() -> Report:
    stored = Report.model_validate_json((WRITTEN / "output/runs/old/report.json").read_text())
    return stored.model_copy(
        update={
            "fidelity": fidelity_figures(SUMS, ENTRIES),
            "differences": difference_figures(SUMS, ENTRIES),
        }
    )


def test_prompts_are_the_observations(report: Report) -> None:
    row = next(
        f for f in report.fidelity if (f.model, f.teacher, f.domain) == ("student", None, "words")
    )
    assert (row.prompts, row.tokens) == (2, 40)
    assert row.kl.mean == pytest.approx((1 + 3 + 2) / 40)
    # Prompt p has 4 nats in 20 tokens, prompt q has 2 in 20: +-1 around the mean.
    half = stats.t.ppf(0.975, 1) * np.sqrt(2 / 1 * 2) / 40
    assert 0.15 - half < 0, "no KL is below zero"
    assert (row.kl.low, row.kl.high) == pytest.approx((0, 0.15 + half))


def test_differences_are_taken_prompt_by_prompt(report: Report) -> None:
    """The models' own intervals overlap widely; that of their difference excludes zero."""
    rows = {f.model: f for f in report.fidelity if (f.teacher, f.domain) == (None, "words")}
    assert rows["student"].kl.high > rows["twin"].kl.low
    difference = next(
        d for d in report.differences if (d.other, d.teacher, d.domain) == ("twin", None, "words")
    )
    assert difference.kl is not None and difference.kl.high is not None
    assert difference.kl.mean == pytest.approx(-0.2)
    assert difference.kl.high == pytest.approx(-0.2)
    row = next(f for f in report.fidelity if f.domain == "logic")
    assert row.agreement.high == 1, "a share ends at 100 %"


def test_words_say_what_is_better_and_what_is_chance(report: Report) -> None:
    assert fidelity_words(report) == (
        "The student's next-token distributions are 0.138 nats/token from those of owl (KL, 95 % "
        "0.048 to 0.227), and its likeliest token is theirs at 91.2 % of 80 hold-out tokens; the "
        "twin is at 0.341 and 82.5 %; the model that it started from is at 0.133 and 89.6 %."
    )
    assert headlines(report)[1].startswith("Fidelity to the teachers: the student's next-token")
    words = difference_words(report, "twin")
    assert words.startswith("KL to those of owl 0.204 nats/token lower, 95 % 0.19")
    assert "(better); top-1 agreement 8.8 points higher, 95 % " in words
    assert words.endswith("hold-out loss 0 nats/token higher, 95 % 0 to 0 (within chance)")
    assert "hold-out loss 0.500 nats/token lower, 95 % 0.500 to 0.500 (better)" in (
        difference_words(report, "start")
    )
    assert "KL to those of owl 0.00500 nats/token higher" in difference_words(report, "start")


def test_the_table_has_a_group_for_each_domain_and_teacher(report: Report) -> None:
    groups = list(fidelity_groups(report))
    assert [(g.domain, g.target, g.tokens) for g in groups] == [
        ("logic", "owl", 40), ("words", "owl", 30), ("All domains", "owl", 70),
    ]  # fmt: skip
    assert [row.label for row in groups[0].rows] == [
        "student", "twin", "start", "student minus twin", "student minus start",
    ]  # fmt: skip
    kl = {row.label: row.kl for row in groups[0].rows}
    assert kl["student"] == "0.125" and kl["student minus twin"] == "\u22120.208"


def test_nothing_is_said_over_all_where_a_domain_is_not_known(report: Report) -> None:
    apart = [f for f in report.fidelity if f.domain is not None]
    assert fidelity_words(report.model_copy(update={"fidelity": apart})) == ""
    alone = [f for f in report.fidelity if f.teacher == "owl"]
    assert fidelity_words(report.model_copy(update={"fidelity": alone})) == ""
    assert list(fidelity_groups(report.model_copy(update={"fidelity": alone})))
