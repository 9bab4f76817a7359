"""Mistakes of users: one clear message, exit code 1, and what was finished stays."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.local_head import LocalHead
from tests.support.command_line import (
    POLYSTILL,
    QUICKSTART,
    ROOT,
    file_times,
    polystill,
    token_environment,
)
from tests.support.disks import small_disk

pytestmark = pytest.mark.timeout(180)
CONFIG = QUICKSTART / "config.yaml"
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens
Finished = subprocess.CompletedProcess[str]


def assert_refused(finished: Finished, *parts: str, code: int = 1) -> str:
    """Checks that a command ended with one message for people, which holds all `parts`."""
    printed = finished.stdout + finished.stderr
    assert finished.returncode == code, printed
    assert "Traceback" not in printed, printed
    before, said, message = finished.stderr.rpartition("polystill: ")
    assert said and "polystill: " not in before, finished.stderr
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def stage(name: str, root: Path, *overrides: str) -> Finished:
    """Runs what the Ray job of a stage runs."""
    return polystill("stage", name, CONFIG, f"storage.root={root}", *overrides)


def one_source(path: Path) -> str:
    """Takes all prompts from one file."""
    return f"prompts.sources=[{{path: {path}}}]"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(content: str, reference: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "domain": "arithmetic", "reference": reference}


def test_a_command_that_does_not_exist_shows_the_usage() -> None:
    finished = polystill("submit", "distil", CONFIG, "--address", NOBODY)
    assert finished.returncode == 2
    assert "invalid choice: 'distil'" in finished.stderr and "synthesize" in finished.stderr


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainig.steps=5", ["unknown key 'trainig'", "did you mean 'training'"]),
        ("training.stepz=5", ["unknown key 'training.stepz'", "did you mean 'steps'"]),
        ("training.steps=many", ["training.steps", "integer"]),
        ("teachers.words.resources.gpus=1", ["teachers.words.resources.gpus", "'num_gpus'"]),
    ],
)
def test_a_bad_key_or_value_is_named(tmp_path: Path, override: str, parts: list[str]) -> None:
    assert_refused(polystill("run", CONFIG, f"storage.root={tmp_path / 'out'}", override), *parts)
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert_refused(polystill("run", missing), f"{missing} does not exist")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("teachers.words.model=/none/model", ["model folder /none/model does not exist"]),
        (
            "teachers.words.vllm.max_modle_len=64",
            ["teachers.words", "did you mean 'max_model_len'"],
        ),
        (
            "synthesis.recipes.0.sampling.temprature=0.5",
            ["synthesis.recipes (arithmetic)", "did you mean 'temperature'"],
        ),
        ("evaluation.sampling.top_kk=3", ["evaluation", "top_kk", "did you mean 'top_k'"]),
    ],
)
def test_models_and_engine_settings_are_checked_first(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    assert_refused(stage("prepare", tmp_path / "out", override), *parts)
    assert not (tmp_path / "out/runs/quickstart/prepared.json").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    teacher = shutil.copytree(QUICKSTART / "teachers/words", tmp_path / "words")
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    message = assert_refused(
        stage("prepare", tmp_path / "out", f"teachers.words.model={teacher}"),
        "teacher 'words'",
        f"id {vocabulary['a']} is 'a', the student's is 'b'",
        f"id {vocabulary['b']} is 'b', the student's is 'a'",
    )
    assert "'arithmetic'" not in message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"messages": [', "not valid JSON"),
        ('{"question": "1+1", "domain": "arithmetic"}', "exactly one of `messages` and `text`"),
        ('{"text": "1+1"}', "no `domain`"),
    ],
)
def test_a_bad_prompt_line_is_named(tmp_path: Path, line: str, part: str) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [question(f"{i}+1", "1") for i in range(4)])
    path.write_text(path.read_text() + line + "\n")
    assert_refused(stage("prepare", tmp_path / "out", one_source(path)), f"{path}:5:", part)


def test_no_answer_left_is_explained_and_the_prepared_run_stays(tmp_path: Path) -> None:
    long = write_rows(
        tmp_path / "prompts.jsonl", [question("+".join(["11"] * n), "1") for n in range(20, 40)]
    )
    overrides = [
        one_source(long),
        "prompts.holdout_fraction=0.5",
        "synthesis.recipes=[{type: dataset}]",
        "synthesis.max_sequence_tokens=30",
    ]
    prepared = stage("prepare", tmp_path / "out", *overrides)
    assert prepared.returncode == 0, prepared.stderr
    before = (tmp_path / "out/runs/quickstart/prepared.json").read_bytes()
    assert_refused(
        stage("synthesize", tmp_path / "out", *overrides),
        "no answer of the train split was kept",
        "answers kept: dataset 0 of 20; dropped: 20 too long",
    )
    assert (tmp_path / "out/runs/quickstart/prepared.json").read_bytes() == before
    assert "up to date" in stage("prepare", tmp_path / "out", *overrides).stdout


@pytest.mark.parametrize("command", [["status"], ["logs", "some-job"], ["stop", "some-job"]])
def test_an_unreachable_cluster_is_named(command: list[str]) -> None:
    finished = polystill(*command, "--address", NOBODY)
    assert_refused(finished, f"no Ray job server can be reached at {NOBODY}", "8265")


def test_a_run_for_an_unreachable_cluster_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "out"
    settings = [f"storage.root={root}", "storage.shared_roots=[/]"]
    finished = polystill("run", CONFIG, *settings, "--address", NOBODY)
    assert_refused(finished, f"no Ray job server can be reached at {NOBODY}")
    assert not root.exists()


def test_a_missing_or_wrong_token_is_told(ray_head: LocalHead, tmp_path: Path) -> None:
    status = ["status", "--address", ray_head.address]
    assert_refused(polystill(*status), "asks for a token and none was sent", "RAY_AUTH_MODE=token")
    finished = polystill(*status, env=token_environment("0" * 64))
    message = assert_refused(finished, "does not accept this token", "RAY_AUTH_TOKEN")
    assert "0" * 64 not in message
    nowhere = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert_refused(polystill(*status, env=nowhere), f"{tmp_path / 'token'} is missing")
    accepted = polystill(*status, env=token_environment(ray_head.token))
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.parametrize("roots", ["[]", "[/somewhere/else]"])
def test_a_local_path_is_refused_for_a_remote_cluster(tmp_path: Path, roots: str) -> None:
    settings = [f"storage.root={tmp_path}", f"storage.shared_roots={roots}"]
    finished = polystill("run", CONFIG, *settings, "--address", NOBODY)
    assert_refused(finished, f"the local path {tmp_path}", "storage.root", "storage.shared_roots")


def test_detaching_without_a_cluster_is_refused(tmp_path: Path) -> None:
    finished = polystill("run", CONFIG, f"storage.root={tmp_path / 'out'}", "--detach")
    assert_refused(finished, "--detach", "--address")


def test_a_full_disk_is_told_and_what_is_finished_stays(tmp_path: Path) -> None:
    """First a few prompts are prepared, then the disk has no room left for the table of all."""
    few = ["prompts.sources.0.limit=8", "prompts.sources.1.limit=8"]
    with small_disk(tmp_path / "disk", mebibytes=1) as disk:
        root = disk.folder / "out"
        prepared = stage("prepare", root, *few)
        assert prepared.returncode == 0, prepared.stderr
        finished = file_times(root)
        disk.fill()
        assert_refused(stage("prepare", root), *disk.message_parts, str(root))
        assert file_times(root) == finished
        assert "up to date" in stage("prepare", root, *few).stdout
        disk.free()
        again = stage("prepare", root)
        assert again.returncode == 0, again.stderr


def test_a_reader_that_leaves_ends_the_command_in_silence(tmp_path: Path) -> None:
    """As in `polystill run CONFIG --dry-run | head -1`."""
    words = [*POLYSTILL, "run", CONFIG, "--dry-run", "--show-config", f"storage.root={tmp_path}"]
    with subprocess.Popen(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_the_password_of_an_address_is_not_repeated() -> None:
    finished = polystill("status", "--address", NOBODY.replace("://", "://user:S3CRET@"))
    assert "S3CRET" not in assert_refused(finished, "http://***@127.0.0.1:9")
