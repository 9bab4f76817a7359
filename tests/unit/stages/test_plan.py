"""Plans of a run: what each stage still has to do, and what a dry run refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import distill
from jobs.bookkeeping.plan import StagePlan, make_plan, plan_score
from jobs.bookkeeping.stage_records import StageRecord, score_key, stage_key, write_record
from jobs.dry_run import dry_run_text
from jobs.stages.entry import STAGE_FUNCTIONS, run_stage
from jobs.stages.prepare import prepare
from jobs.stages.rounds_report import stage_rows
from jobs.stages.score import score
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.errors import ConfigError, StorageError, TrainingError
from pipeline.layout import Layout
from pipeline.records import DatasetEntry
from pipeline.run.costs import stage_cost
from pipeline.run.preparation import Prepared, preparation_key
from pipeline.run.prepared_run import Run
from pipeline.sequences import write_dataset
from pipeline.synthesis.prompts import read_prompts
from pipeline.synthesis.rewriting import SHIPPED

PREPARED = Prepared(
    key="key",
    prompts_digest="prompts",
    prompt_counts={},
    longest_prompt=1,
    tokenizer_hash="hash",
    eos_token_id=1,
    cache_identities={"t": {"selection": {"type": "top_k", "max_entries": 8}}},
    synthesis_identities={},
    student_identity={},
)
QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
CONFIG = load_config(QUICKSTART)


def evaluate_key(config: Config, root: Path, prepared: Prepared = PREPARED) -> str:
    """Key of the evaluation of a run whose scoring has finished."""
    run = Run(config, Layout(str(root), "run"), prepared)
    dataset = write_dataset(run.layout, [])
    write_record(run.layout, "score", StageRecord(key=score_key(run), dataset=dataset))
    return stage_key(run, "evaluate")


def test_a_run_scores_though_nothing_is_missing_until_its_own_record_stands(tmp_path: Path) -> None:
    run = Run(CONFIG, Layout(str(tmp_path), "run"), PREPARED)
    assert plan_score(run, []).todo == 1
    record = StageRecord(key=score_key(run), dataset=write_dataset(run.layout, []))
    write_record(run.layout, "score", record)
    assert plan_score(run, []).todo == 0


def test_the_plan_of_scoring_bounds_the_bytes(tmp_path: Path) -> None:
    entry = DatasetEntry("s", "p", "d", "train", ("t",), "sequences/d/x.parquet", 2**20, 2**20)
    plan = plan_score(Run(CONFIG, Layout(str(tmp_path), "run"), PREPARED), [entry])
    # A position takes 7 bytes, and 5 for each of at most 8 entries.
    assert plan.todo == 1 and "at most 47.0 MiB" in plan.summary


@pytest.mark.parametrize(("dimensions", "bytes_each"), [(None, 2 * 2 * 1024), (16, 2 * 2 * 16)])
def test_the_plan_of_scoring_counts_hidden_states(
    dimensions: int | None, bytes_each: int, tmp_path: Path
) -> None:
    """A position takes 2 bytes for each dimension of two layers, and 47 bytes of distributions."""
    projection = None if dimensions is None else {"dimensions": dimensions, "seed": 0}
    identities = PREPARED.cache_identities | {
        "t+features": {"layers": [1, 2], "projection": projection}
    }
    changes = {"cache_identities": identities, "hidden_sizes": {"t": 1024}}
    prepared = PREPARED.model_copy(update=changes)
    entry = DatasetEntry("s", "p", "d", "train", ("t",), "sequences/d/x.parquet", 2**20, 2**20)
    plan = plan_score(Run(CONFIG, Layout(str(tmp_path), "run"), prepared), [entry])
    assert f"at most {47 + bytes_each:,}.0 MiB" in plan.summary


def test_a_missing_model_folder_is_found_without_a_cluster(tmp_path: Path) -> None:
    changes = [f"storage.root={tmp_path}", f"teachers.words.model={tmp_path}/nope"]
    with pytest.raises(ConfigError, match=r"teachers.words.model: the model folder .*/nope does"):
        make_plan(load_config(QUICKSTART, changes))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_attention_that_is_not_installed_is_refused_before_anything_runs(
    name: str, tmp_path: Path
) -> None:
    options = [f"student.attn_implementation={name}", "student.dtype=bfloat16"]
    changes = [f"storage.root={tmp_path}", *options]
    with pytest.raises(ConfigError, match="none is installed here: choose sdpa"):
        dry_run_text(load_config(QUICKSTART, changes))


def test_prices_and_placement_ask_for_no_new_preparation() -> None:
    changes = [
        "teachers.words.cost_per_hour=3",
        "student.cost_per_hour=2",
        "teachers.words.replicas=2",
    ]
    changed = load_config(QUICKSTART, changes)
    assert preparation_key(changed) == preparation_key(CONFIG)
    assert preparation_key(load_config(QUICKSTART, ["seed=3"])) != preparation_key(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        "teachers.words.vllm.max_num_seqs=7",
        "student.vllm.max_num_seqs=7",
        "synthesis.max_sequence_tokens=60",
        "evaluation.sampling.max_tokens=20",
        "training.cost_per_hour=7",
    ],
)
def test_what_the_report_says_of_speed_and_price_is_measured_anew(
    tmp_path: Path, change: str
) -> None:
    changes = [f"storage.root={tmp_path}", "name=run"]
    assert evaluate_key(load_config(QUICKSTART, changes), tmp_path) != evaluate_key(
        load_config(QUICKSTART, [*changes, change]), tmp_path
    )


def test_weights_that_only_the_report_uses_make_another_one(tmp_path: Path) -> None:
    """A student of the text alone is trained without them, and compared with their mixture."""
    changes = [f"storage.root={tmp_path}", "name=run", "evaluation.twin=false"]
    changes.append("training.losses=[{type: cross_entropy, weight: 1.0}]")
    weigh = "combine.weights={{type: static, teachers: {{arithmetic: {}, words: 1.0}}}}"
    first, second = (load_config(QUICKSTART, [*changes, weigh.format(w)]) for w in (1.0, 0.0))
    assert evaluate_key(first, tmp_path) != evaluate_key(second, tmp_path)


@pytest.mark.parametrize(("stage", "needed"), [("export", "train"), ("evaluate", "export")])
def test_a_stage_does_not_take_what_another_config_has_left(
    stage: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}"])
    todo = [StagePlan(name, int(name in (stage, needed)), "to do") for name in STAGE_FUNCTIONS]
    monkeypatch.setattr("jobs.stages.entry.make_plan", lambda config: todo)
    with pytest.raises(ConfigError, match=f"^{needed} is not complete for this config"):
        run_stage(stage, config)
    assert not list(tmp_path.rglob("*.json"))


def test_another_checker_is_another_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no filter asks it, and where the function has the same name and another body."""
    rules = tmp_path / "rules_of_the_house.py"
    rules.write_text("def same(answer, reference):\n    return answer == reference\n")
    monkeypatch.syspath_prepend(tmp_path)

    def keys(checker: str) -> tuple[str, str]:
        changes = [f"storage.root={tmp_path / 'out'}", "name=run", "synthesis.filters=[]"]
        config = load_config(QUICKSTART, [*changes, f"prompts.checker={checker}"])
        return preparation_key(config), evaluate_key(config, tmp_path, prepare(config).prepared)

    exact, mine = keys("exact"), keys("rules_of_the_house.same")
    rules.write_text(rules.read_text() + "    # mended\n")
    mended = keys("rules_of_the_house.same")
    for of_stage in zip(exact, mine, mended, strict=True):
        assert len(set(of_stage)) == 3


def test_weights_that_changed_with_equal_size_and_time_are_prepared_anew(tmp_path: Path) -> None:
    """As `rsync -a` and `cp -p` leave them."""
    words = shutil.copytree(QUICKSTART.parent / "teachers/words", tmp_path / "words")
    changes = [f"storage.root={tmp_path / 'out'}", f"teachers.words.model={words}"]
    config = load_config(QUICKSTART, changes)
    first = prepare(config)
    assert Run.find(config) is not None
    weights = words / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert preparation_key(config) == first.prepared.key, "size and time are equal"
    assert Run.find(config) is None
    again = prepare(config)
    assert again.prepared.identities["words"] != first.prepared.identities["words"]
    assert Run.find(config) is not None


def test_a_checker_that_is_installed_on_the_cluster_alone_can_be_planned_from_here() -> None:
    preparation_key(load_config(QUICKSTART, ["prompts.checker=installed.elsewhere.check"]))


@pytest.mark.parametrize("template", ["evolve_deeper", "judge"])
def test_a_changed_template_is_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    shipped = tmp_path / "templates"
    shutil.copytree(SHIPPED, shipped)
    monkeypatch.setattr("pipeline.synthesis.rewriting.SHIPPED", shipped)
    evolve = "{type: evolve, teacher: words, ways: [deeper], sampling: {max_tokens: 9}}"
    answer = "{type: answer, by: domain_teacher, sampling: {max_tokens: 9}}"
    changes = [f"synthesis.recipes=[{evolve}, {answer}]"]
    changes.append("synthesis.filters=[{type: judge, teacher: words, min_grade: 3}]")
    before = preparation_key(load_config(QUICKSTART, changes))
    for path in shipped.iterdir():
        path.touch()
    assert preparation_key(load_config(QUICKSTART, changes)) == before, "jobs have copies"
    path = shipped / f"{template}.txt"
    path.write_text(path.read_text() + "\nThink first.")
    assert preparation_key(load_config(QUICKSTART, changes)) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers.words.vllm.max_model_len=30", r"recipes \(words\): words holds .* = 30 tokens"),
        ("student.vllm.max_model_len=30", r"evaluation: student holds"),
        ("evaluation.sampling.max_tokens=60", r"evaluation: arithmetic holds.*\(60\) need"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_refused_before_an_engine_starts(
    tmp_path: Path, change: str, message: str
) -> None:
    changes = [f"storage.root={tmp_path}", change]
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(QUICKSTART, changes))
    if "sampling" not in change:
        changes += ["synthesis.max_sequence_tokens=28", "evaluation.sampling.max_tokens=9"]
        prepare(load_config(QUICKSTART, [*changes, "synthesis.recipes.0.sampling.max_tokens=9"]))


def test_a_dry_run_says_what_may_be_too_long(tmp_path: Path) -> None:
    changes = [f"storage.root={tmp_path}", "training.tokens_per_micro_batch=23"]
    caution = "caution     a sequence may have 24 tokens, and training.tokens_per_micro_batch is 23"
    assert caution in dry_run_text(load_config(QUICKSTART, changes))
    prepare(load_config(QUICKSTART, [changes[0], "training.tokens_per_micro_batch=30"]))
    known = dry_run_text(
        load_config(QUICKSTART, [changes[0], "training.tokens_per_micro_batch=30"])
    )
    assert re.search(r"may have [34]\d tokens, and training.tokens_per_micro_batch is 30", known)
    bound = [*changes, "synthesis.max_sequence_tokens=23", "evaluation.sampling.max_tokens=9"]
    text = dry_run_text(
        load_config(QUICKSTART, [*bound, "synthesis.recipes.0.sampling.max_tokens=9"])
    )
    assert "caution" not in text


def test_a_dry_run_for_a_cluster_says_what_only_the_cluster_sees(tmp_path: Path) -> None:
    shared = tmp_path / "shared"  # a file system of the cluster, which is not mounted here
    changes = [
        f"storage.root={shared}/output",
        "storage.shared_roots=[/]",
        f"student.model={shared}/student",
        f"teachers.words.model={shared}/words",
        f"prompts.sources.0.path={shared}/prompts.jsonl",
    ]
    config, address = load_config(QUICKSTART, changes), "http://head:8265"
    text = dry_run_text(config, address)
    for key in ("student.model", "teachers.words.model", "prompts.sources.0.path"):
        assert re.search(rf"^ +{key} {shared}/\S+$", text, re.MULTILINE), key
    assert f"teachers.arithmetic.model {shared}" not in text and "storage.root" not in text
    assert "# resources\nteacher arithmetic: 1 x " in text and not shared.exists()
    with pytest.raises(ConfigError, match="does not exist"):
        dry_run_text(config)
    with pytest.raises(ConfigError, match="add a folder above the path"):
        dry_run_text(load_config(QUICKSTART, [*changes, "storage.shared_roots=[/other]"]), address)
    seen = [f"storage.root={tmp_path}", "storage.shared_roots=[/]"]
    plan = dry_run_text(load_config(QUICKSTART, seen), address)
    assert "prepare     to do" in plan and "unknown" not in plan


def test_references_that_the_checker_cannot_read_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = [f"storage.root={tmp_path}", "prompts.checker=number", "synthesis.filters=[]"]
    config = load_config(QUICKSTART, changes)
    prompts, _ = read_prompts(config.prompts)
    words = [p.reference for p in prompts if p.domain == "words" and p.reference is not None]
    said = (
        f"prompts.checker number cannot read {len(words)} of {len(words)} references of the domain "
        f"words, such as {words[0]!r}: answers to them are not checked"
    )
    assert f"caution     {said}\n" in dry_run_text(config)
    STAGE_FUNCTIONS["prepare"](config)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [said]
    assert f"caution     {said}\n" in dry_run_text(config)
    exact = load_config(QUICKSTART, [*changes, "prompts.checker=exact"])
    assert "cannot read" not in dry_run_text(exact)
    assert prepare(exact).prepared.unread_references == []


def test_what_training_would_refuse_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), "run")
    entry = DatasetEntry("long", "p", "d", "train", ("t",), "sequences/d/x.parquet", 257, 9)
    digest = write_dataset(layout, [entry])
    with pytest.raises(TrainingError, match=r"long \(257 tokens\).*max_sequence_tokens"):
        score(Run(CONFIG, layout, PREPARED), digest)
    assert not storage.exists(layout.pins)


def test_a_template_without_a_system_role_is_found_before_an_engine_starts(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(QUICKSTART.parent / "student", student)
    template = student / "chat_template.jinja"
    refusal = "{{ raise_exception('System role not supported') }}"
    beginning = f"{{% if messages[0]['role'] == 'system' %}}{refusal}{{% endif %}}"
    template.write_text(beginning + template.read_text())
    changes = [f"storage.root={tmp_path}", f"student.model={student}"]
    longest = prepare(load_config(QUICKSTART, changes)).prepared.longest_prompt
    system = "evaluation.system_prompt=0123456789"
    with pytest.raises(ConfigError, match=r"System role not supported.*system_prompt"):
        prepare(load_config(QUICKSTART, [*changes, system]))
    under_system = prepare(load_config(QUICKSTART, [changes[0], system])).prepared
    assert under_system.longest_prompt > longest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers.words.vllm.max_num_seq=3", "max_num_seq"),
        ("synthesis.recipes.0.sampling.temprature=1", "temprature"),
        ("teachers.words.domains=[poems]", r"no teacher names \['words'\]"),
        (
            "synthesis.recipes=[{type: paraphrase, teacher: words, versions: 3, sampling: {"
            "max_tokens: 9, temperature: 0}}, {type: dataset}]",
            "temperature is 0, so the 3 answers to a prompt would be the same",
        ),
    ],
)
def test_a_dry_run_refuses_what_prepare_would(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dry_run_text(load_config(QUICKSTART, [f"storage.root={tmp_path}", change]))


def test_prepare_lets_vllm_judge_the_values(tmp_path: Path) -> None:
    changes = [f"storage.root={tmp_path}", "synthesis.recipes.0.sampling.temperature=-1"]
    config = load_config(QUICKSTART, changes)
    with pytest.raises(ConfigError, match=r"synthesis.recipes \(.*\): vLLM refuses .*negative"):
        prepare(config)


def test_a_run_refuses_an_unknown_option_before_a_head_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.distill.cluster", None)
    changes = [f"storage.root={tmp_path}", "evaluation.sampling.temprature=1"]
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        distill.run(load_config(QUICKSTART, changes), None)


def test_a_dry_run_imports_no_heavy_library(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from jobs.__main__ import main\n"
        "assert main(['run', *sys.argv[1:], '--dry-run']) == 0\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'deepspeed')\n"
        "print('heavy:', *[name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, str(QUICKSTART), f"storage.root={tmp_path}"],
        cwd=QUICKSTART.parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[0] == "# plan" and shown[-1] == "heavy:"


def test_attempts_that_did_not_end_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}"])

    def fails(config: Config) -> StageRecord:
        raise StorageError("the disk is full")

    monkeypatch.setitem(STAGE_FUNCTIONS, "prepare", fails)
    for _ in range(2):
        with pytest.raises(StorageError):
            run_stage("prepare", config)
    monkeypatch.setitem(
        STAGE_FUNCTIONS, "prepare", lambda _: StageRecord(key="key", summary="done")
    )
    run_stage("prepare", config)
    assert stage_rows(config)[0].unended == 2
    run_stage("prepare", config)
    assert stage_rows(config)[0].unended == 2, "the record adds up its attempts"


@pytest.mark.parametrize(
    ("name", "address"), [("single_node", None), ("multi_node", "http://127.0.0.1:8265")]
)
def test_the_examples_for_open_weights_can_be_planned(
    name: str, address: str | None, tmp_path: Path
) -> None:
    """Prompts and tokenizer come from this machine; no hub and no bucket is asked."""
    seen = [str(tmp_path), str(QUICKSTART.parent), "/shared"]
    changes = [f"storage.shared_roots={json.dumps(seen)}"]
    changes += [f"storage.root={tmp_path}", f"storage.models_root={tmp_path}"]
    changes.append(f"student.model={QUICKSTART.parent / 'student'}")
    changes += ["prompts.validation_fraction=0.2", "prompts.holdout_fraction=0.2"]
    for i, domain in enumerate(("code", "chat")):
        path = tmp_path / f"{domain}.jsonl"
        rows = ({"messages": [{"role": "user", "content": f"{domain} {k}"}]} for k in range(40))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes.append(f"prompts.sources.{i}.path={path}")
    config = load_config(QUICKSTART.parents[2] / f"examples/open_weights/{name}.yaml", changes)
    text = dry_run_text(config, address)
    plan = [line.split()[0] for line in text.partition("# resources")[0].splitlines()[1:]]
    assert plan == list(STAGE_FUNCTIONS), "no stage is in doubt, and nothing may be too long"
    assert "read 80, holdout 16" in text
    assert f"\nstudent: {config.training.workers} x " in text and "1 GPU" in text


def test_engines_and_workers_are_priced_by_the_config_of_the_report() -> None:
    changes = ["teachers.words.cost_per_hour=3", "student.cost_per_hour=1"]
    changes += ["training.cost_per_hour=2", "teachers.arithmetic.cost_per_hour=0"]
    config = load_config(QUICKSTART, changes)
    engines = {"words": 1200.0, "student": 1800.0, "arithmetic": 9.0}
    assert stage_cost(config, engines) == pytest.approx(1.0 + 0.5)
    assert stage_cost(config, {}, worker_seconds=7200.0) == pytest.approx(4.0)
    assert stage_cost(config, {}) == 0
