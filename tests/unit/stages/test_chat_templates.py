"""Prepare: the chat template is judged by the answers that the run really asks for."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from jobs.stages.prepare import prepare
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from pipeline.run.preparation import Prepared, read_prepared
from pipeline.run.training_spec import training_specs
from tests.support.command_line import QUICKSTART

THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>' }}{% endif %}"
    "{% endif %}"
)
DATED = "{{ strftime_now('%d') }}" + THINKING.replace("<think>", "")
GIVEN = "synthesis.recipes=[{type: dataset}]"
JUDGED = "synthesis.filters=[{type: judge, teacher: words, min_grade: 4}]"
COMPARED = "evaluation.judge={teacher: arithmetic, against: [words]}"
SILENT = "student.template_arguments={enable_thinking: false}"


def overrides(tmp_path: Path, template: str, *changes: str) -> list[str]:
    """The quickstart with another chat template, and prompts that have references."""
    (tmp_path / "chat.jinja").write_text(template)
    for split in ("train", "holdout"):
        rows = [
            {"messages": [{"role": "user", "content": f"{i}+{split[0]}"}], "domain": domain}
            | {"reference": f"{i}"}
            for i, domain in enumerate(("arithmetic", "words"))
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [
        f"{{path: {tmp_path}/{split}.jsonl, split: {split}}}" for split in ("train", "holdout")
    ]
    return [
        f"storage.root={tmp_path}/root",
        f"student.chat_template={tmp_path}/chat.jinja",
        f"prompts.sources=[{', '.join(sources)}]",
        *(f"teachers.{n}.allow_chat_template_difference=true" for n in ("words", "arithmetic")),
        *changes,
    ]


def prepared(tmp_path: Path, template: str, *changes: str) -> Prepared:
    config = load_config(QUICKSTART / "config.yaml", overrides(tmp_path, template, *changes))
    run = prepare(config)
    assert read_prepared(run.layout) == run.prepared
    return run.prepared


def test_open_thoughts_are_refused_where_answers_are_given_alone(tmp_path: Path) -> None:
    assert prepared(tmp_path, THINKING).template_date is None
    with pytest.raises(ConfigError, match=r"opens thoughts.*template_arguments: {enable_thinking:"):
        prepared(tmp_path, THINKING, GIVEN)
    thoughtless = prepared(tmp_path, THINKING, GIVEN, SILENT)
    assert "chat_end" not in thoughtless.synthesis_identities["dataset"]


@pytest.mark.parametrize("judging", [JUDGED, COMPARED])
def test_a_judge_of_one_digit_is_refused_behind_open_thoughts(tmp_path: Path, judging: str) -> None:
    with pytest.raises(ConfigError, match=r"may write one digit and nothing else.*'<\|assistant"):
        prepared(tmp_path, THINKING, judging)
    prepared(tmp_path, THINKING, judging, SILENT)


def test_replies_of_a_text_api_are_given_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = "{url: 'http://h/v1', model: m, api: openai, scores: false%s}"
    by_words = "synthesis.recipes=[{type: answer, by: writer, sampling: {max_tokens: 9}}]"
    plain = [by_words, f"teachers.writer.endpoint={server % ''}"]
    with pytest.raises(ConfigError, match="opens thoughts"):
        prepared(tmp_path, THINKING, *plain)
    keeping = server % ", reasoning: keep"  # the thoughts of a reply end those of the template
    prepared(tmp_path, THINKING, by_words, f"teachers.writer.endpoint={keeping}")
    asked = prepared(tmp_path, THINKING, *plain, SILENT)
    assert "writer: the server renders chats itself and is not told" in caplog.text
    caplog.clear()
    told = f"teachers.writer.endpoint={server % ', template_arguments: {enable_thinking: false}'}"
    other = prepared(tmp_path, THINKING, by_words, told, SILENT)
    assert "renders chats itself" not in caplog.text
    assert asked.synthesis_identities["writer"]["vllm"] == {}
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert other.synthesis_identities["writer"]["vllm"] == kwargs


def test_arguments_and_the_day_are_part_of_every_identity(tmp_path: Path) -> None:
    first = prepared(tmp_path, DATED)
    assert first.template_date == "2025-01-01"
    day = "student.template_date=2026-11-30"
    for changes in ([day], [SILENT], [day, SILENT]):
        other = prepared(tmp_path, DATED, *changes)
        assert other.template_date == ("2026-11-30" if day in changes else "2025-01-01")
        assert other.key != first.key and other.tokenizer_hash != first.tokenizer_hash
        assert not {*other.cache_fingerprints.values()} & {*first.cache_fingerprints.values()}
        assert not {*other.synthesis_digests.values()} & {*first.synthesis_digests.values()}


def test_a_template_of_no_model_writes_the_bos_of_its_tokenizer(tmp_path: Path) -> None:
    student, bos = tmp_path / "student", "<|system|>"
    shutil.copytree(QUICKSTART / "student", student)
    core = Tokenizer.from_file(str(student / "tokenizer.json"))
    core.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
    )
    core.save(str(student / "tokenizer.json"))
    settings = student / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": bos}))
    own = f"student.model={student}"
    plain = THINKING.replace("<think>", "")
    with pytest.raises(ConfigError, match=r"writes no <\|system\|>.*begin the template with"):
        prepared(tmp_path, plain, own)
    prepared(tmp_path, "{{ bos_token }}" + plain, own)
    prepared(tmp_path, (QUICKSTART / "teachers/words/chat_template.jinja").read_text(), own)


def test_a_training_knows_the_arguments_by_its_tokenizer(tmp_path: Path) -> None:
    config = load_config(QUICKSTART / "config.yaml", overrides(tmp_path, THINKING, SILENT))
    run = prepare(config)
    (spec, *_) = training_specs(run, "dataset")
    assert spec.identity()["tokenizer"] == run.prepared.tokenizer_hash
    assert "template_arguments" not in spec.identity()["student"]
    assert "template_date" not in storage.read_json(run.layout.prepared)
