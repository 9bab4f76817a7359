"""Canaries: their token ids, and the conclusions from their rows."""

import asyncio
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TeacherError
from teachers.canary import (
    check_cache_canaries,
    check_replicas_agree,
    full_step,
    reason_not_to_share_prefixes,
)
from teachers.noise import ROUNDOFF, mean_tolerance, state_tolerance
from teachers.protocol import CANARY_ENTRIES, Canary, CapturedRows, Comparison
from teachers.tasks.control import ControlTask

ENGINE = {
    "engine_version": "0.32.0",
    "dtype": "float32",
    "num_layers": 2,
    "quantization": None,
    "device": "here",
}


def canary(shift: float = 0.0, **engine: str) -> Canary:
    """32 positions of 16 entries; the shift moves one gold value."""
    logprobs = -np.sort(np.random.default_rng(0).random((32, 16)).astype(np.float32)) - 1
    gold = np.full(32, -3.0, np.float32)
    gold[7] += shift
    rows = CapturedRows(np.zeros((32, 16), np.int32), logprobs, gold)
    return Canary.of(rows, ENGINE | engine)


def test_only_the_most_probable_entries_travel() -> None:
    assert canary().top_logprobs.shape == (32, CANARY_ENTRIES)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_the_mean_difference_decides(dtype: str, sign: int) -> None:
    ours = canary(dtype=dtype)
    values = np.concatenate([ours.gold_logprobs[:, None], ours.top_logprobs], axis=1)
    tolerance = mean_tolerance(ours.engine, values)
    whole = tolerance * values.size  # on one of the values alone
    check_replicas_agree("teacher", ours, canary(sign * 0.99 * whole, dtype=dtype))
    with pytest.raises(TeacherError, match=r"position 7, gold token: -3\.00000 on here"):
        check_replicas_agree("teacher", ours, canary(sign * 1.01 * whole, dtype=dtype))


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(TeacherError, match="nan"):
        check_replicas_agree("teacher", canary(), canary(math.nan))


def test_masked_tokens_agree_with_each_other_and_with_nothing_else() -> None:
    check_replicas_agree("teacher", canary(-math.inf), canary(-math.inf))
    with pytest.raises(TeacherError, match=r"-3\.00000 on here and -60\.00000 on here"):
        check_replicas_agree("teacher", canary(), canary(-math.inf))


@pytest.mark.parametrize("key", ["engine_version", "dtype", "quantization"])
def test_other_kinds_of_engine_are_refused_with_both_names(key: str) -> None:
    with pytest.raises(TeacherError, match=f"differ in {key}: {ENGINE[key]} and other"):
        check_replicas_agree("teacher", canary(), canary(0.0, **{key: "other"}))


def test_a_teacher_may_run_on_several_kinds_of_device() -> None:
    check_replicas_agree("teacher", canary(), canary(device="there"))


def test_later_engines_are_held_to_the_one_that_began_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    check_cache_canaries(paths[:1], "teacher", canary())
    first = (tmp_path / "a.json").read_bytes()
    check_cache_canaries(paths, "teacher", canary(0.1, device="there", load_seconds="2"))
    assert (tmp_path / "a.json").read_bytes() == first and (tmp_path / "b.json").exists()
    assert not caplog.records
    check_cache_canaries(paths[:1], "teacher", canary(engine_version="0.33.0"))
    assert "started with engine_version 0.32.0, now 0.33.0" in caplog.text
    for other, message in (
        (canary(dtype="bfloat16"), r"tolerance 0\.024 \(bfloat16\); dtype float32, now bfloat16"),
        (canary(quantization="fp8"), "quantization None, now fp8"),
        (canary(-6.0), r"mean difference 0\.02083 nats.*tolerance 0\.0\d+ \(float32\).*--force"),
        (canary(math.nan), "mean difference nan nats"),
    ):
        with pytest.raises(TeacherError, match=message):
            check_cache_canaries(paths[:1], "teacher", other)


def test_an_engine_that_computes_another_model_begins_no_cache(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    wrong = Comparison(None, num_tokens=128, mean=0.3, signed_mean=-0.1, largest=3.7, tolerance=0.2)
    with pytest.raises(
        TeacherError,
        match=r"differ by 0\.3 nats in the mean of 128 tokens \(signed -0\.1, at most 3\.7\).*"
        r"explains 0\.2.*model_impl.*teachers\.granite\.compare_with_transformers: false",
    ):
        check_cache_canaries([path], "granite", replace(canary(), comparison=wrong))
    assert not Path(path).exists()
    with pytest.raises(TeacherError, match="nan nats in the mean"):
        broken = replace(wrong, mean=math.nan)
        check_cache_canaries([path], "granite", replace(canary(), comparison=broken))


def test_the_comparison_lies_beside_the_canary_and_its_noise_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    right = Comparison(None, num_tokens=128, mean=0.01, noise=0.05, tolerance=0.15)
    check_cache_canaries([path], "teacher", replace(canary(), comparison=right))
    stored = json.loads(Path(path).read_text())
    assert stored["transformers"] == asdict(right)
    check_cache_canaries([path], "teacher", canary(-30.0))  # 0.1 nats in the mean
    unknown = str(tmp_path / "b.json")
    check_cache_canaries([unknown], "teacher", replace(canary(), comparison=Comparison("no room")))
    assert json.loads(Path(unknown).read_text())["transformers"]["reason"] == "no room"
    with pytest.raises(TeacherError, match="mean difference 0\\.1"):
        check_cache_canaries([unknown], "teacher", canary(-30.0))


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_states_are_shared_where_some_were_read_and_all_agree(dtype: str) -> None:
    states = np.random.default_rng(0).normal(size=(32, 2, 8)).astype(np.float32)
    engine = {"dtype": dtype, "num_layers": 2}
    most = state_tolerance(engine) * np.abs(states).max()

    def reason(shift: float, num_cached: int) -> str | None:
        other = states.copy()
        other[5, 1, 3] += shift
        nothing = CapturedRows.without_distributions(32)
        anew, again = (replace(nothing, hidden_states=each) for each in (states, other))
        return reason_not_to_share_prefixes(
            anew, replace(again, num_cached_tokens=num_cached), engine
        )

    assert reason(0.99 * most, 16) is None
    assert f"tolerance {state_tolerance(engine):.2g}" in str(reason(1.01 * most, 16))
    assert "nan of the largest value" in str(reason(math.nan, 16))
    assert "shows nothing" in str(reason(0, 0))


@pytest.mark.parametrize(
    ("length", "max_step_tokens", "max_seqs", "count"),
    [(100, 1000, 64, 11), (100, 950, 64, 11), (100, 1000, 4, 4), (5000, 1000, 64, 2)],
)
def test_the_full_step_overflows_one_step_and_no_more(
    length: int, max_step_tokens: int, max_seqs: int, count: int
) -> None:
    sequences = full_step(length, 512, max_step_tokens, max_seqs)
    assert [len(sequence) for sequence in sequences] == [length] * count
    assert len({sequence[0] for sequence in sequences}) == count
    assert all(0 <= token < 512 for sequence in sequences for token in sequence)


@pytest.mark.parametrize("scores", [True, False])
def test_a_control_asks_for_what_every_teacher_of_its_kind_can_do(scores: bool) -> None:
    asked: list[tuple] = []

    class Asked:
        can_score = scores

        def canary(self) -> Canary | None:
            return canary()  # an endpoint that scores elsewhere in the run is held to its first

        async def score(self, *arguments: object) -> None:
            asked.append(("score", *arguments))

        async def generate(self, *arguments: object) -> None:
            asked.append(("generate", *arguments))

    asyncio.run(ControlTask().run(Asked()))  # pyright: ignore[reportArgumentType]
    (found,) = asked
    kind, first, *_ = found
    assert kind == ("score" if scores else "generate")
    assert max(first.input_ids if scores else first) < 20
