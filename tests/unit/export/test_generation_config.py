"""The export's end tokens and sampling defaults, as transformers and vLLM read them."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm.transformers_utils.config import try_get_generation_config

from pipeline.config.student import StudentConfig
from students.export import folder as export_folder
from tests.support.trainings import write_student

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student whose tokenizer ends with id 1."""
    write_student(tmp_path / "student", tied=False)
    return tmp_path / "student"


def exported(
    student: Path, monkeypatch: pytest.MonkeyPatch, end_of_answer: int | None, **options: Any
) -> Path:
    """The folder that is written for weights that were not trained."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
    weights = student.parent / "weights.safetensors"
    save_file({name: value.clone() for name, value in model.named_parameters()}, weights)
    spec: Any = SimpleNamespace(
        config=SimpleNamespace(
            student=StudentConfig(model=str(student), initialization="pretrained", **options)
        ),
        layout=SimpleNamespace(final_weights=lambda _: str(weights)),
        student="student",
        end_of_answer=end_of_answer,
    )
    monkeypatch.setattr(export_folder, "model_card", lambda _: "card")
    export_folder._write(spec, student.parent / "export")
    return student.parent / "export"


def end_tokens(folder: Path) -> list[Any]:
    """The end tokens as four readers find them."""
    from_vllm = try_get_generation_config(str(folder), trust_remote_code=False)
    assert from_vllm is not None
    return [
        AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id,
        from_vllm.to_diff_dict()["eos_token_id"],
        json.loads((folder / "config.json").read_text())["eos_token_id"],
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"],
    ]


def test_end_tokens_and_sampling_defaults_of_the_student_stay(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = GenerationConfig(bos_token_id=0, eos_token_id=[3, 1, 4], **SAMPLING)
    own.save_pretrained(student)
    folder = exported(student, monkeypatch, end_of_answer=1)
    assert end_tokens(folder) == [[3, 1, 4]] * 4
    read = try_get_generation_config(str(folder), trust_remote_code=False)
    assert read is not None
    assert read.to_diff_dict().items() >= SAMPLING.items()
    assert (read.bos_token_id, read.pad_token_id) == (0, 1)


def test_end_tokens_of_tokenizer_and_answers_join_those_of_the_file(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GenerationConfig(eos_token_id=3, pad_token_id=9).save_pretrained(student)
    folder = exported(student, monkeypatch, end_of_answer=7)
    assert end_tokens(folder) == [[3, 1, 7]] * 4
    assert GenerationConfig.from_pretrained(folder).pad_token_id == 9


def test_a_student_without_the_file_ends_as_its_tokenizer(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((student / "config.json").read_text())
    config |= {"eos_token_id": 2, "quantization_config": {"quant_method": "fp8"}}
    (student / "config.json").write_text(json.dumps(config))
    folder = exported(student, monkeypatch, end_of_answer=None)
    assert end_tokens(folder) == [1] * 4
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_file_that_transformers_would_not_write_is_passed_on(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`do_sample: false` beside a temperature, a key of another engine, and a file that was made
    from the model's config, which transformers would make anew.
    """
    odd = {"_from_model_config": True, "do_sample": False, "temperature": 0.6, "of_others": [1]}
    (student / "generation_config.json").write_text(json.dumps(odd | {"eos_token_id": [4, 3]}))
    folder = exported(student, monkeypatch, end_of_answer=1)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written.pop("transformers_version")
    assert written == {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": [4, 3, 1],
        "do_sample": False,
        "temperature": 0.6,
        "of_others": [1],
    }
    assert end_tokens(folder) == [[4, 3, 1]] * 4


def test_a_student_of_the_hub_brings_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        export_folder, "snapshot_download", lambda *_, **options: asked.append(options)
    )
    student = StudentConfig(model="org/student", initialization="pretrained")
    spec: Any = SimpleNamespace(config=SimpleNamespace(student=student))
    export_folder.model_folder(spec)
    assert "generation_config.json" in asked[0]["allow_patterns"]


def test_the_tokenizer_has_the_end_and_the_template_that_the_config_names(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = student.parent / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}#{% endfor %}")
    options = {"eos_token": "w5", "chat_template": str(template)}
    folder = exported(student, monkeypatch, end_of_answer=None, **options)
    source = AutoTokenizer.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = source.convert_tokens_to_ids("w5")
    assert tokenizer.eos_token_id == end != source.eos_token_id
    assert tokenizer.chat_template == template.read_text() != source.chat_template
    assert end in np.atleast_1d(end_tokens(folder)[0])


@pytest.mark.parametrize("is_named", [False, True])
def test_the_template_has_its_arguments_as_defaults(
    student: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    template = student.parent / "chat.jinja"
    template.write_text("\n{{ messages[0].content }}{{ kind }}{{ strftime_now('%Y') }}")
    if not is_named:
        shutil.copyfile(template, student / "chat_template.jinja")
    options = {"template_arguments": {"kind": "a"}, "template_date": "1999-01-01"}
    options |= {"chat_template": str(template)} if is_named else {}
    folder = exported(student, monkeypatch, end_of_answer=None, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    today = f"{datetime.now():%Y}"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"\nxa{today}"
    other = tokenizer.apply_chat_template(messages, tokenize=False, kind="b")
    assert other == f"\nxb{today}"
