"""A run that an earlier version wrote to its end is read by this one, and not done again.

`tests/data/written_by_ead47cf/README.md` says how the run was made. Its preparation knows prompts
and models by path, size and time, so these are told as they were; every other test reads a copy
that is prepared anew, as after a user has moved the folder.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.__main__ import main
from jobs.bookkeeping.plan import STAGE_NAMES, StagePlan, make_plan, plan_rounds
from jobs.bookkeeping.stage_records import read_record, write_record
from jobs.caches.run_caches import open_caches
from jobs.stages.synthesize import synthesize
from pipeline import storage
from pipeline.cache.generations import named_generations
from pipeline.cache.index import load_index
from pipeline.cache.manifest import is_published
from pipeline.cache.reader import open_cache, open_hidden_states
from pipeline.cache_care.gc import find_garbage
from pipeline.checkers.answer_checkers import VERSIONS
from pipeline.errors import TeacherError, TrainingError
from pipeline.fingerprint import digest_bytes
from pipeline.layout import CacheLayout
from pipeline.records import HiddenStates, SparseLogprobs
from pipeline.run.preparation import load_prepared
from pipeline.sequences import SequenceReader, read_dataset
from students.architecture.initial_weights import checkpoint_weights
from students.checkpoints.resume import check_resume, prepare_resume
from students.launching.launch import train_student
from teachers.canary import CANARY_TOKENS, check_cache_canaries
from teachers.preflight.identity import student_identity
from teachers.protocol import CANARY_ENTRIES, Canary
from teachers.tokenizing import load_tokenizer
from tests.support.old_run import WRITTEN, OldRun, copy_old_run, old_file_states
from tests.unit.synthesis.test_recipes import Engines

EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
CACHES = ("first", "second", "first+features")
CHECKPOINT = "step-00000004"
NAMED_BY = f"run old, training student of run old, checkpoint student/{CHECKPOINT} of run old"


@pytest.fixture
def old(tmp_path: Path) -> OldRun:
    return copy_old_run(tmp_path / "old")


@pytest.fixture
def old_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the run's checker have the version that it had then."""
    monkeypatch.setitem(VERSIONS, "exact", 1)


@pytest.fixture
def in_place(old: OldRun, old_checker: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides under which the run is where it was made, and its files as old as then."""
    monkeypatch.setattr("pipeline.storage.file_states", old_file_states)
    return old.in_its_old_place()


def todo(plans: list[StagePlan]) -> dict[str, int]:
    return {plan.stage: plan.todo for plan in plans}


def summary_of(old: OldRun, stage: str) -> tuple[int, str]:
    (plan,) = [plan for plan in make_plan(old.config()) if plan.stage == stage]
    return plan.todo, plan.summary


def files_and_times(old: OldRun) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in old.root.rglob("*") if path.is_file()}


def test_every_stage_is_up_to_date_where_the_run_was_made(old: OldRun, in_place: list[str]) -> None:
    config = old.config(*in_place)
    assert load_prepared(config, old.layout) == old.prepared()
    assert todo(make_plan(config)) == dict.fromkeys(STAGE_NAMES, 0)
    assert [todo(plans) for plans in plan_rounds(config)] == [dict.fromkeys(STAGE_NAMES, 0)]


def test_run_and_stages_start_nothing(
    old: OldRun,
    in_place: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jobs.distill.cluster", None)
    monkeypatch.setattr("jobs.stages.entry.join_cluster", None)
    before = files_and_times(old)
    assert main(["run", old.path, *in_place]) == 0
    assert "nothing to do: every stage is complete" in capsys.readouterr().out
    assert main(["train", old.path, *in_place]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["run", "--dry-run", old.path, *in_place]) == 0
    assert " to do" not in capsys.readouterr().out.partition("# plan")[2]
    for stage in STAGE_NAMES:
        assert main(["stage", stage, old.path, *in_place]) == 0
        assert capsys.readouterr().out.startswith("up to date (")
    assert files_and_times(old) == before


def test_moved_elsewhere_only_the_key_of_the_preparation_is_another(
    old: OldRun, old_checker: None
) -> None:
    written = old.prepared()
    assert todo(make_plan(old.config()))["prepare"] == 1
    again = old.prepare().prepared
    assert again.key != written.key
    assert written.change_times is None and again.change_times is not None
    of_files = {"key": written.key, "change_times": None}  # what the place of the files decides
    assert again.model_copy(update=of_files) == written
    assert todo(make_plan(old.config())) == dict.fromkeys(STAGE_NAMES, 0)


def test_a_checker_that_judges_differently_asks_for_another_report_alone(old: OldRun) -> None:
    old.prepare()
    assert todo(make_plan(old.config())) == dict.fromkeys(STAGE_NAMES, 0) | {"evaluate": 1}


def test_cache_commands_find_nothing_wrong(old: OldRun, capsys: pytest.CaptureFixture[str]) -> None:
    old.prepare()
    capsys.readouterr()
    assert main(["cache", "status", old.path]) == 0
    status = capsys.readouterr().out
    first, _, *lines = status.splitlines()
    assert first.startswith(f"run old: {len(EXPECTED['sequences'])} sequences, ")
    assert len(lines) == 2 * len(CACHES), "no line about anything stale, corrupt or refused"
    for name, row, named in zip(CACHES, lines, lines[len(CACHES) :], strict=False):
        assert row.split()[:5] == [name, f"{EXPECTED['caches'][name]['folder']}/g1", "2", "0", "0"]
        assert named == f"{name}: generation 1 current (used by this run), named by {NAMED_BY}"
    assert main(["cache", "verify", old.path]) == 0
    found = capsys.readouterr().out
    assert found.count("no problems") == len(CACHES) and "2 shards" in found
    identifier = open_caches(old.config()).entries[0].sequence_id
    assert main(["cache", "show", old.path, "--sequence", identifier[:12]]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"sequence {identifier}, domain ") and "has no row" not in shown
    assert main(["cache", "retry", old.path]) == 0
    assert capsys.readouterr().out == "nothing is quarantined\n"
    assert find_garbage(old.layout, 0.0).garbage == []


def test_index_manifest_and_names_are_believed(old: OldRun) -> None:
    caches = old.opened().cache_layouts()
    assert tuple(caches) == CACHES
    for name, cache in caches.items():
        assert is_published(cache)
        assert cache.name == EXPECTED["caches"][name]["folder"]
        assert [e.digest for e in load_index(cache)] == EXPECTED["caches"][name]["shards"]
        assert named_generations(old.layout)[cache.name] == {1: NAMED_BY.split(", ")}


def hash_of(*arrays: np.ndarray) -> str:
    little = (array.astype(array.dtype.newbyteorder("<")) for array in arrays)
    return digest_bytes(*(part for a in little for part in (a.dtype.str.encode(), a.tobytes())))


def in_numbers(row: SparseLogprobs | HiddenStates | None) -> list[Any]:
    """Positions of a row, the sum of its log-probabilities or states, and a hash of all arrays."""
    assert row is not None
    arrays = [value for value in vars(row).values() if isinstance(value, np.ndarray)]
    values = row.values if isinstance(row, HiddenStates) else row.gold_logprobs
    return [row.num_positions, round(float(values.astype(np.float64).sum()), 6), hash_of(*arrays)]


def contents_of(old: OldRun) -> dict[str, Any]:
    """Numbers of the dataset, of all its sequences and of every cache row."""
    layout = old.layout
    entries = read_dataset(layout, old.dataset())
    reader, sequences = SequenceReader(layout, entries), {}
    for entry in entries:
        sequence = reader.get(entry.sequence_id)
        assert sequence is not None
        told = [entry.prompt_id, entry.domain, entry.split, list(entry.authors), entry.shard]
        ids = [sequence.input_ids.tolist(), [list(span) for span in sequence.loss_spans]]
        sequences[entry.sequence_id] = [*told, *ids, sequence.finish_reason]
    rows = {}
    for name, cache in old.opened().cache_layouts().items():
        opened = open_hidden_states(cache) if name.endswith("+features") else open_cache(cache)
        rows[name] = {e.sequence_id: in_numbers(opened.row(e.sequence_id)) for e in entries}
    return {"dataset": old.dataset(), "sequences": sequences, "rows": rows}


def test_sequences_and_rows_are_those_that_were_written(old: OldRun) -> None:
    found = contents_of(old)
    for key, value in found.items():
        assert value == EXPECTED[key], key


def canary_of(cache: CacheLayout) -> tuple[dict[str, Any], np.ndarray]:
    stored = storage.read_json(cache.canary)
    return stored["engine"], np.array(stored["gold_and_head_logprobs"], np.float32)


def test_engines_are_held_to_the_old_canary(old: OldRun) -> None:
    cache = old.opened().cache_layouts()["first"]
    engine, values = canary_of(cache)
    assert values.shape == (CANARY_TOKENS - 1, 1 + CANARY_ENTRIES)
    same = Canary(engine, values[:, 0], values[:, 1:])
    check_cache_canaries([cache.canary], "first", same)
    other = Canary(engine, values[:, 0] - 1, values[:, 1:])
    with pytest.raises(TeacherError, match=r"disagrees with .* mean difference 0\.1111 nats"):
        check_cache_canaries([cache.canary], "first", other)


def test_the_training_resumes_from_the_old_checkpoint(old: OldRun) -> None:
    old.prepare()
    old.interrupt_training()
    assert todo(make_plan(old.config())) == dict.fromkeys(STAGE_NAMES[:3], 0) | dict.fromkeys(
        STAGE_NAMES[3:], 1
    )
    resume = check_resume(old.training())
    assert resume is not None and resume.path.name == CHECKPOINT
    assert (resume.state.step, resume.changes, resume.universal) == (4, [], False)
    assert resume.state.sequences == 32 and resume.shapes == EXPECTED["shapes"]
    assert prepare_resume(old.training()) == resume


def test_more_steps_resume_where_they_are_allowed(old: OldRun) -> None:
    old.prepare()
    old.interrupt_training()
    more = "training.steps=9"
    summary = "9 steps of 8 sequences, for student"
    assert make_plan(old.config(more))[3] == StagePlan("train", 1, summary)
    with pytest.raises(TrainingError, match=r"training\.steps: 6 -> 9"):
        check_resume(old.training(more))
    resume = check_resume(old.training(more, "training.allow_resume_with=[training.steps]"))
    assert resume is not None and resume.changes == ["training.steps: 6 -> 9"]


def test_the_finished_training_is_the_one_that_is_asked_for(old: OldRun) -> None:
    summary = train_student(old.training())
    assert summary == read_record(old.layout, "train").figures["student"]
    assert summary["identity"] == old.training().identity()
    with pytest.raises(TrainingError, match=r"weight_decay: 0.0 -> 0.5"):
        train_student(old.training("training.weight_decay=0.5"))


def test_another_training_can_start_from_the_old_weights(old: OldRun) -> None:
    folder = Path(old.training().folder, "checkpoints", CHECKPOINT)
    weights = checkpoint_weights(folder)
    found = {name: hash_of(value.detach().numpy()) for name, value in sorted(weights.items())}
    assert found == EXPECTED["weights"]
    config = old.config(f"student.initial_weights={folder}", "name=again")
    assert student_identity(config.student, old.layout) == EXPECTED["start"]


def add_prompt(old: OldRun) -> None:
    added = {"messages": [{"role": "user", "content": "reverse old"}], "domain": "words"}
    with (old.folder / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(added | {"reference": "dlo"}) + "\n")


def test_one_more_prompt_is_all_that_is_asked_and_scored(
    old: OldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_prompt(old)
    run = old.prepare()
    assert summary_of(old, "synthesize") == (1, "prompts to answer: first 0, second 1")
    assert summary_of(old, "score") == (1, "after synthesize")
    tokenizer = load_tokenizer(old.config().student.files)
    engines = Engines(tokenizer, lambda text, _: ("4" if len(text) > 60 else "dlo", "stop"))
    monkeypatch.setattr("jobs.stages.synthesize.run_pools", engines)
    monkeypatch.setattr("jobs.stages.filter.run_pools", engines)
    record = synthesize(run)
    assert [who for who, *_ in engines.asked] == ["second", "first"], "an answer and its grade"
    assert engines.asked[0][1].endswith("reverse old")
    write_record(old.layout, "synthesize", record)
    entries = read_dataset(old.layout, str(record.dataset))
    assert {e.sequence_id for e in entries} > EXPECTED["sequences"].keys()
    count, summary = summary_of(old, "score")
    assert count == len(CACHES)
    assert summary.startswith(
        f"of {len(entries)} sequences to score: first 1, second 1, first+features 1; "
    )


@pytest.mark.parametrize("name", CACHES)
def test_a_lost_shard_is_scored_again_and_nothing_else(name: str, old: OldRun) -> None:
    old.prepare()
    cache = old.opened().cache_layouts()[name]
    lost, _ = load_index(cache)
    Path(cache.shard(lost.digest)).unlink()
    counts = dict.fromkeys(CACHES, 0) | {name: len(lost.sequence_ids)}
    told = ", ".join(f"{cache} {count}" for cache, count in counts.items())
    total, summary = summary_of(old, "score")
    assert total == len(lost.sequence_ids)
    assert summary.startswith(f"of {len(EXPECTED['sequences'])} sequences to score: {told}; ")
    assert todo(make_plan(old.config())) == dict.fromkeys(STAGE_NAMES[:2], 0) | {
        "score": total
    } | dict.fromkeys(STAGE_NAMES[3:], 1)
