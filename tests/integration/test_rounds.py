"""The documents' on-policy run of two rounds with one teacher, made small: every stage for real."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.cache.index import load_index
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry
from pipeline.sequences import read_dataset
from tests.support.caches import cache_folder
from tests.support.command_line import QUICKSTART, polystill
from tests.support.documents import of_kind, with_stand_ins
from tests.support.quickstart import read_lines

pytestmark = pytest.mark.timeout(900)
STEPS = 6
WORDS = (
    "{words: {model: ./teachers/words, domains: [words], resources: {num_cpus: 1}, vllm: "
    "{dtype: float32, max_model_len: 64, max_num_seqs: 128, enforce_eager: true}}}"
)


def words_prompts(name: str, count: int, folder: Path) -> Path:
    lines = [line for line in (QUICKSTART / name).read_text().splitlines() if '"words"' in line]
    (folder / name).write_text("\n".join(lines[:count]) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command of docs/synthesis.md, with one teacher, fewer prompts and steps."""
    (written,) = [c for c in of_kind("polystill run") if "rounds=2" in c]
    root, prompts = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("prompts")
    settings = {
        "storage.root": root,
        "prompts.sources.0.path": words_prompts("prompts.jsonl", 24, prompts),
        "prompts.sources.1.path": words_prompts("holdout.jsonl", 4, prompts),
        "teachers": WORDS,
        "combine.weights": "{type: static, teachers: {words: 1.0}}",
        "training.steps": STEPS,
        "training.warmup_steps": 1,
        "training.sequences_per_step": 16,
        "training.log_every_steps": 1,
        "training.evaluate_every_steps": STEPS,
        "training.checkpoint_every_steps": STEPS,
    }
    small = [f"{key}={value}" for key, value in settings.items()]
    return [*with_stand_ins(written)[1:], *small], root


def entries_of(layout: Layout) -> list[DatasetEntry]:
    record = storage.read_json(layout.stage_record("score"))
    return list(read_dataset(layout, record["dataset"]))


def test_a_student_trains_on_what_it_writes(command: tuple[list[str], Path]) -> None:
    arguments, root = command
    finished = polystill(*arguments, seconds=850)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    assert "[round 1/2, 5/5 export] done" in finished.stdout
    assert "[round 2/2, 6/6 evaluate] done" in finished.stdout
    layout = Layout(str(root), "on_policy")
    rounds = [layout, layout.of_round(2)]

    first, second = map(entries_of, rounds)
    written = [{e.authors for e in each if e.split == "train"} for each in (first, second)]
    assert written == [{("words",)}, {("student",)}]
    held = [[e for e in each if e.split == "holdout"] for each in (first, second)]
    assert held[0] == held[1] and held[0]
    cache = CacheLayout(str(cache_folder(root, "words")), 1)
    scored = [identifier for shard in load_index(cache) for identifier in shard.sequence_ids]
    everything = {e.sequence_id for e in first + second}
    assert len(scored) == len(set(scored)) and everything <= set(scored)

    folders = [Path(each.training_folder("student")) for each in rounds]
    trained = [storage.read_json(str(folder / "training.json")) for folder in folders]
    assert [summary["identity"]["seed"] for summary in trained] == [17, 18]
    assert "initial_weights" not in trained[0]["identity"]["start"]
    assert "initial_weights" in trained[1]["identity"]["start"]
    steps = [[line["step"] for line in read_lines(folder / "metrics.jsonl")] for folder in folders]
    assert steps == [list(range(1, STEPS + 1))] * 2

    report = storage.read_json(rounds[1].report_json)
    assert [row["round"] for row in report["rounds"]] == [1, 2]
    assert [row["by_student"] > 0 for row in report["rounds"]] == [False, True]
    assert all(np.isfinite(r["domains"]["words"]["holdout_loss"]) for r in report["rounds"])
    for each, row in zip(rounds, report["rounds"], strict=True):
        answers = read_lines(Path(each.run_folder) / "answers" / "student.jsonl")
        right = [answer["correct"] for answer in answers]
        assert row["domains"]["words"]["exact_match"] == np.mean(right) and len(right) == 4
    student = next(model for model in report["models"] if model["name"] == "student")
    own = report["rounds"][1]["domains"]["words"]["holdout_loss"]
    assert own == student["domains"]["words"]["holdout_loss"]
    assert not storage.exists(layout.report_json), "the last round alone is evaluated"


def test_a_finished_run_and_its_caches_have_nothing_to_do(
    command: tuple[list[str], Path],
) -> None:
    arguments, root = command
    again = polystill(*arguments)
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout
    assert f"{root}/runs/on_policy/rounds/2/report.html" in again.stdout
    checked = polystill("cache", "verify", *arguments[1:])
    assert checked.returncode == 0, checked.stdout
    # An interrupted run goes on in its round: one that lacks its last training, say.
    summary = root / "runs/on_policy/rounds/2/student/training.json"
    summary.rename(summary.with_suffix(".away"))
    plan = polystill(*arguments, "--dry-run").stdout
    summary.with_suffix(".away").rename(summary)
    states = [line.split()[1] for line in plan[plan.index("# plan") :].splitlines()[1:14]]
    assert states == ["1", *["cached"] * 5, "2", *["cached"] * 3, *["to"] * 3]
    garbage = polystill("cache", "gc", *arguments[1:], "--dry-run")
    assert "nothing to remove" in garbage.stdout, garbage.stdout
