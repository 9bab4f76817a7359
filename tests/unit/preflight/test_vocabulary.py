"""Preflight: tokenizers that disagree are refused and the differing entries listed."""

from pathlib import Path

import pytest
from tokenizers import processors

from pipeline.config.base import ModelFiles
from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.errors import ConfigError, StorageError, VocabularyMismatchError
from pipeline.records import Prompt
from teachers.preflight.vocabulary import check_vocabularies, end_token_ids
from teachers.tokenizing import chat_end, load_tokenizer, prompt_ids, tokenizer_hash
from tests.support.tokenizers_for_tests import (
    CHARACTERS,
    CHAT_TEMPLATE,
    SPECIAL,
    save_byte_tokenizer,
    save_tokenizer,
)

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
PROMPTS = [
    Prompt("p", "d", "train", messages=({"role": "user", "content": "ab+1"},)),
    Prompt("q", "d", "train", text="x=1"),
]


def config(tmp_path: Path, *overrides: str) -> Config:
    folders = {
        "student.model": "student",
        "teachers.arithmetic.model": "a",
        "teachers.words.model": "b",
    }
    return load_config(
        QUICKSTART, [*(f"{key}={tmp_path / name}" for key, name in folders.items()), *overrides]
    )


def save(tmp_path: Path, **teacher_b) -> None:
    for name, options in {"student": {}, "a": {}, "b": teacher_b}.items():
        save_tokenizer(tmp_path / name, **options)


def test_equal_tokenizers_pass_and_their_hash_ignores_the_folder(tmp_path: Path) -> None:
    save(tmp_path)
    checked = check_vocabularies(config(tmp_path), PROMPTS)
    assert checked == tokenizer_hash(load_tokenizer(config(tmp_path).teachers["words"].files))


def test_swapped_entries_are_listed(tmp_path: Path) -> None:
    swapped = SPECIAL + CHARACTERS
    swapped[7], swapped[9] = swapped[9], swapped[7]
    save(tmp_path, tokens=swapped)
    with pytest.raises(VocabularyMismatchError) as caught:
        check_vocabularies(config(tmp_path), PROMPTS)
    message = str(caught.value)
    assert "teacher 'words': id 7 is 'f', the student's is 'd'" in message
    assert "id 9 is 'd', the student's is 'f'" in message and "arithmetic" not in message


def test_many_differences_are_counted(tmp_path: Path) -> None:
    save(tmp_path, tokens=SPECIAL + CHARACTERS[::-1])
    with pytest.raises(VocabularyMismatchError, match=r"… \d+ ids differ in all"):
        check_vocabularies(config(tmp_path), PROMPTS)


def test_another_end_of_answers_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save(tmp_path, eos="<pad>")
    with pytest.raises(
        VocabularyMismatchError,
        match=r"it ends answers by '<pad>' \(0\), the student by '<eos>' \(1\): set "
        r"student.eos_token: '<pad>'",
    ):
        check_vocabularies(config(tmp_path), PROMPTS)
    save_tokenizer(tmp_path / "a", eos="<pad>")
    changed = config(tmp_path, "student.eos_token=<pad>")
    student = load_tokenizer(changed.student.files)
    assert check_vocabularies(changed, PROMPTS) == tokenizer_hash(student)
    assert tokenizer_hash(student) != tokenizer_hash(load_tokenizer(config(tmp_path).student.files))
    with pytest.raises(ConfigError, match=r"student\.eos_token '<end>' is no token of"):
        check_vocabularies(config(tmp_path, "student.eos_token=<end>"), PROMPTS)


def test_a_base_student_learns_the_end_that_its_template_writes(tmp_path: Path) -> None:
    """Qwen's base models: their end of sequence is another one than that of their teachers."""
    template = CHAT_TEMPLATE.replace("m['content']", "m['content'] + '<pad>'")
    for name in ("a", "b"):
        save_tokenizer(tmp_path / name, eos="<pad>", template=template)
    student = save_tokenizer(tmp_path / "student", template=template)
    assert chat_end(student) == 0 and check_vocabularies(config(tmp_path), PROMPTS[:1])
    with pytest.raises(VocabularyMismatchError, match=r"set student\.eos_token: '<pad>'"):
        check_vocabularies(config(tmp_path), PROMPTS)  # one prompt is raw text
    (tmp_path / "student" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"name a file with one in student\.chat_template"):
        check_vocabularies(config(tmp_path), PROMPTS[:1])
    (tmp_path / "chat.jinja").write_text(template)
    given = config(tmp_path, f"student.chat_template={tmp_path}/chat.jinja")
    assert check_vocabularies(given, PROMPTS[:1]) == tokenizer_hash(student)


def test_a_teacher_whose_template_ends_messages_otherwise_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path)
    ends = CHAT_TEMPLATE.replace("m['content']", "m['content'] + '<user>'")
    save_tokenizer(tmp_path / "student", template=ends, eos="<pad>")
    allowed = [f"teachers.{n}.allow_chat_template_difference=true" for n in ("words", "arithmetic")]
    with pytest.raises(VocabularyMismatchError, match=r"'<user>' \(2\): name the teacher's temp"):
        check_vocabularies(config(tmp_path, *allowed), PROMPTS[:1])
    caplog.set_level("WARNING")
    same_eos = save_tokenizer(tmp_path / "student", template=ends)
    assert check_vocabularies(config(tmp_path, *allowed), PROMPTS[:1]) == tokenizer_hash(same_eos)
    assert "teacher 'words' ends answers by '<eos>' (1) and the student by '<user>'" in caplog.text
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert end_token_ids(ModelFiles(str(tmp_path / "a"))) == [1, 2]


def test_another_chat_template_is_refused_unless_allowed_by_name(tmp_path: Path) -> None:
    save(tmp_path, template=CHAT_TEMPLATE.replace("'<' + m", "' <' + m"))
    with pytest.raises(VocabularyMismatchError, match="prompt p renders as"):
        check_vocabularies(config(tmp_path), PROMPTS)
    allowed = config(tmp_path, "teachers.words.allow_chat_template_difference=true")
    assert check_vocabularies(allowed, PROMPTS)


def test_a_chat_prompt_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(tokenizer, PROMPTS[0])


def test_prompts_become_ids(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, PROMPTS[0])) == [
        "<user>",
        "a",
        "b",
        "+",
        "1",
        "<assistant>",
    ]
    assert tokenizer.decode(prompt_ids(tokenizer, PROMPTS[1])).replace(" ", "") == "x=1"


def test_a_text_has_one_beginning_of_sequence(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.bos_token = "<user>"
    ids = [prompt_ids(tokenizer, Prompt("p", "d", "train", text=t)) for t in ("ab", "<user>ab")]
    assert ids == [[4, 5], [2, 4, 5]]  # it adds none, and the text's own stays
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 2)]
    )
    texts = ("ab", "<user>ab", "<user><user>ab")
    ids = [prompt_ids(tokenizer, Prompt("p", "d", "train", text=text)) for text in texts]
    assert ids == [[2, 4, 5], [2, 4, 5], [2, 2, 4, 5]]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(StorageError, match="nothing-here is missing on node"):
        check_vocabularies(config(tmp_path, f"student.model={tmp_path}/nothing-here"), PROMPTS)


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="refuses prompt p: roles must alternate"):
        prompt_ids(tokenizer, PROMPTS[0])


def test_every_teacher_is_compared_whatever_the_others_lack(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "student")
    save_tokenizer(tmp_path / "a", eos="<pad>")
    save_tokenizer(tmp_path / "b", template=CHAT_TEMPLATE.replace("'<' + m", "' <' + m"))
    with pytest.raises(VocabularyMismatchError) as caught:
        check_vocabularies(config(tmp_path), PROMPTS)
    assert "teacher 'arithmetic': it ends answers by" in str(caught.value)
    assert "teacher 'words': prompt p renders as" in str(caught.value)


def turns(message: str) -> str:
    return "{% for m in messages %}<{{ m.role }}>" + message + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (turns("{{ m.content }}<eos>"), "<eos>"),
        (turns("{{ m.content }}<turn>\n"), "<turn>"),
        (turns("{{ m.content | trim }} <turn>\n<eos>"), "<turn>"),
        (turns("<eos>{{ m.content }}"), None),
        (turns("{{ m.content }}###"), None),
        (turns("{{ m.content.upper() }}<turn>"), None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_an_answer_is_what_the_template_writes_behind_it(
    tmp_path: Path, template: str | None, end: str | None
) -> None:
    tokenizer = save_byte_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert chat_end(tokenizer) == expected
