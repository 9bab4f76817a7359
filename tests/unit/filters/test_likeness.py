# ruff: noqa: RUF001
"""Likeness as people see it: forms of Unicode, shared instructions, evaluation files."""

import json
import logging
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.stages.preflight import check_filters
from pipeline.config.load import load_config
from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import ConfigError, FilterError, PromptError
from pipeline.filters import words as table
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.evaluated import FEWEST_SHARING
from pipeline.filters.run import filter_identity, run_filters
from pipeline.filters.words import plain, words_of
from pipeline.layout import Layout
from pipeline.records import Prompt
from tests.support.command_line import QUICKSTART
from tests.unit.filters.test_filters import candidate, dropped, rule

ENGLISH = "In 2024 a shop sold 15 red pens and 30 blue pens today"
FRENCH = "Le café près de l'hôtel vend combien de crêpes à la crème chaque été ?"
HINDI = "एक दुकान में पंद्रह लाल पेन और तीस नीले पेन बिक गए आज सुबह"
TURKISH = "Isparta ilinde kaç kişi yaşıyor ve İzmir ile arası kaç kilometre"


def wide(text: str) -> str:
    """The text in full-width letters and digits."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


COPIES: dict[str, tuple[str, str]] = {
    "decomposed accents": (FRENCH, unicodedata.normalize("NFD", FRENCH)),
    "capitals": (FRENCH, FRENCH.upper()),
    "soft hyphens": (ENGLISH, "\u00ad".join(ENGLISH)),
    "zero-width spaces": (ENGLISH, ENGLISH.replace("o", "o\u200b").replace("e", "\ufeffe")),
    "between a letter and its accent": ("café au lait", "cafe\u200b\u0301 au lait"),
    "full width": (ENGLISH, wide(ENGLISH)),
    "full-width spaces": (ENGLISH, ENGLISH.replace(" ", "\u3000")),
    "no-break spaces": (ENGLISH, ENGLISH.replace(" ", "\u00a0")),
    "ligatures": ("the first official office file", "the \ufb01rst o\ufb03cial o\ufb03ce \ufb01le"),
    "circled digits": ("step 1 and step 2", "step \u2460 and step \u2461"),
    "a sharp s": ("die große Straße", "DIE GROSSE STRASSE"),
    "a Greek final sigma": ("ο δρόμος", "Ο ΔΡΌΜΟΣ"),
    "Turkish capitals": (TURKISH, TURKISH.replace("i", "İ").replace("ı", "I").upper()),
    "Arabic vowel points and a long stroke": ("محمد رسول", "مُحَمَّد رســـول"),
    "Arabic presentation forms": ("سلام", "\ufeb3\ufefc\ufee1"),
    "Hebrew points": ("שלום", "שָׁלוֹם"),
    "Persian joiners": ("می‌خواهم بروم", "میخواهم بروم"),
    "Hindi joiners": ("क्ष और त्र", "क्\u200dष और त्\u200cर"),
    "Hangul letters": ("한국어 질문", unicodedata.normalize("NFD", "한국어 질문")),
    "half-width katakana": ("ガギグ", "ｶﾞｷﾞｸﾞ"),
    "marks of direction": ("שלום abc", "\u202bשלום\u202c \u200eabc"),
    "an emoji with a selector": ("I \u2764 you", "I \u2764\ufe0f you"),
}
DIFFERENT: dict[str, tuple[str, str]] = {
    "an accent": ("pêche", "péché"),
    "a raised digit": ("5² is what?", "52 is what?"),
    "a half": ("7½ is what?", "71⁄2 is what?"),
    "a lowered digit": ("x₁ + 2", "x1 + 2"),
    "a vowel of Hindi": ("कि", "की"),
    "a tone of Thai": ("ไก่", "ไก้"),
    "a family and its members": (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f468\U0001f469\U0001f467",
    ),
    "two flags": (
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    ),
    "a voiced kana": ("か", "が"),
}


def is_dropped(kind: str, one: str, two: str, **settings: Any) -> bool:
    rows = [candidate("x", one, of="1"), candidate("x", two, of="2")]
    return dropped({"type": kind, "of": "prompt"} | settings, rows) == [1]


@pytest.mark.parametrize(("text", "copy"), COPIES.values(), ids=COPIES)
def test_texts_that_look_alike_are_alike(text: str, copy: str) -> None:
    assert text != copy
    assert plain(text).split() == plain(copy).split() and words_of(text) == words_of(copy)
    assert is_dropped("exact_duplicate", text, copy)
    assert is_dropped("near_duplicate", text, copy, min_similarity=0.99, shingle=3)
    evidence = Evidence(holdout_prompts={"h": text})
    width = max(2, len(words_of(text)))
    assert dropped({"type": "contamination", "ngram": width}, [candidate("", copy)], evidence) == [
        0
    ]


@pytest.mark.parametrize(("one", "two"), DIFFERENT.values(), ids=DIFFERENT)
def test_texts_that_look_different_differ(one: str, two: str) -> None:
    assert plain(one) != plain(two)
    assert not is_dropped("exact_duplicate", one, two)
    evidence = Evidence(holdout_prompts={"h": one})
    assert not dropped({"type": "contamination", "ngram": 9}, [candidate("", two)], evidence)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HINDI, HINDI.split()),
        ("हिन्दी, में।", ["हिन्दी", "में"]),
        ("กี่ลูก a", ["กี่", "ลู", "ก", "a"]),
        ("ごはん ABC字", ["ご", "は", "ん", "abc", "字"]),
        ("don't stop_it", ["don", "t", "stop_it"]),
        ("3.14 - x\u0304", ["3", "14", "x\u0304"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("\U0001f468\u200d\U0001f469 ok", ["ok"]),
    ],
)
def test_marks_belong_to_their_letters(text: str, words: list[str]) -> None:
    assert words_of(text) == [unicodedata.normalize("NFKC", word) for word in words]


def test_simple_characters_are_those_that_need_no_look() -> None:
    for code in range(sys.maxunicode + 1):
        if table._SIMPLE.fullmatch(chr(code)):
            assert table._VISIBLE[code] == code, hex(code)
            assert not unicodedata.category(chr(code)).startswith("M"), hex(code)


TASK = (
    "Solve the following problem step by step and put only the final number in a box at the end. "
)
QUESTIONS = [
    "How many legs do 3 cats have?",
    "How many wheels have 5 cars?",
    "A train runs 60 km in one hour; how far in 4?",
    "What is 12 times 12?",
    "Ann has 7 apples and eats 2 of them before lunch. How many are left for the evening?",
    "Name the sum of all numbers from 1 to 10.",
    "A book costs 12 and a pen 3; what do four books and two pens cost together?",
]
CONTAMINATION = {"type": "contamination", "ngram": 13}


def held_out(texts: list[str], domain: str = "math", **settings: Any) -> Evidence:
    names = {f"hold-out {domain} {i}": text for i, text in enumerate(texts)}
    return Evidence(holdout_prompts=names, holdout_domains=dict.fromkeys(names, domain), **settings)


def test_an_instruction_that_most_hold_out_prompts_share_is_no_evidence() -> None:
    evidence = held_out([TASK + question for question in QUESTIONS])
    rows = [
        candidate("", TASK + "How many legs do 8 dogs have?"),  # begins like a hold-out prompt
        candidate("", TASK + "Name a prime number."),
        candidate("", TASK),
        candidate("", TASK + QUESTIONS[1]),  # a copy whose own words are fewer than an n-gram
        candidate("", QUESTIONS[1]),  # the same without the instruction
        candidate("", "First think. " + QUESTIONS[4]),  # enough words of its own
        candidate(f"The task was: {TASK}{QUESTIONS[0]}", "What was the task?"),
        candidate("", f"{TASK}Once more: {QUESTIONS[6]}"),
    ]
    assert dropped(CONTAMINATION, rows, evidence) == [3, 4, 5, 6, 7]


def test_shared_words_are_those_of_one_domain() -> None:
    math = held_out([TASK + question for question in QUESTIONS])
    others = held_out(
        [f"Say {i} words about a colour that nobody has seen" for i in range(99)], "w"
    )
    evidence = Evidence(
        holdout_prompts={**math.holdout_prompts, **others.holdout_prompts},
        holdout_domains={**math.holdout_domains, **others.holdout_domains},
    )
    rows = [candidate("", TASK + "Name a prime number."), candidate("", TASK + QUESTIONS[1])]
    assert dropped(CONTAMINATION, rows, evidence) == [1]


@pytest.mark.parametrize("number", [1, 2, FEWEST_SHARING - 1])
def test_few_hold_out_prompts_share_nothing(number: int) -> None:
    evidence = held_out([TASK + question for question in QUESTIONS[:number]])
    assert dropped(CONTAMINATION, [candidate("", TASK + "Name a prime.")], evidence) == [0]


def test_half_of_the_hold_out_prompts_are_not_most() -> None:
    half = [TASK + question for question in QUESTIONS[:3]] + QUESTIONS[3:6]
    assert dropped(CONTAMINATION, [candidate("", TASK + "Name a prime.")], held_out(half)) == [0]
    most = [TASK + question for question in QUESTIONS[:4]] + QUESTIONS[4:6]
    assert dropped(CONTAMINATION, [candidate("", TASK + "Name a prime.")], held_out(most)) == []


def test_the_wording_of_a_template_is_no_evidence() -> None:
    source = PromptSource(path="p.jsonl", template=TASK + "{question}\n\n{{Answer}}: {hint}")
    config = PromptsConfig(sources=[source, PromptSource(path="q.jsonl", template="Q: {text}\nA:")])
    assert config.wording == [TASK, "\n\n{Answer}: ", "Q: ", "\nA:"]
    rows = [candidate("", TASK + "Name a prime number."), candidate("", TASK + QUESTIONS[1])]
    evidence = held_out([TASK + QUESTIONS[1]], wording=config.wording)
    assert dropped(CONTAMINATION, rows, evidence) == [1]
    plain_rule, wording = rule(**CONTAMINATION), config.wording
    assert filter_identity(plain_rule, None) != filter_identity(plain_rule, None, wording=wording)
    length = rule(type="length", max_tokens=3)
    assert filter_identity(length, None) == filter_identity(length, None, wording=wording)


def run(tmp_path: Path, rules: list[Any], rows: list[Candidate], evidence: Evidence) -> list[str]:
    left, _ = run_filters(Layout(str(tmp_path), "run"), "digest", rules, rows, evidence)
    return [each.entry.sequence_id for each in left]


def test_an_emptied_domain_stops_the_run(tmp_path: Path) -> None:
    rows = [
        *(candidate("x", TASK + q, of=str(i), domain="math") for i, q in enumerate(QUESTIONS[:3])),
        candidate("blue", "Name a colour of the sky.", of="w", domain="words"),
        candidate("20", TASK + QUESTIONS[3], of="h", domain="math", split="holdout"),
    ]
    with pytest.raises(FilterError) as caught:
        run(tmp_path, [rule(**CONTAMINATION)], rows, held_out([TASK + QUESTIONS[3]]))
    message = str(caught.value)
    assert "contamination leaves no sequence of the train split in domain 'math' (3 drop" in message
    assert "solve the following problem" in message and "the source's `template`" in message
    assert "dropped so far: contamination 3 of 5" in message and "0-contamination" in message


@pytest.mark.parametrize("split", ["train", "validation", "holdout"])
def test_every_split_of_a_domain_keeps_a_sequence(split: str, tmp_path: Path) -> None:
    rows = [
        candidate("far too long", of="a", split=split),
        *(candidate("1", of=f"b{each}", split=each) for each in ("train", "validation", "holdout")),
        candidate("far too long", of="c", domain="e", split=split),
    ]
    rules = [rule(type="length", max_tokens=3)]
    with pytest.raises(FilterError, match=rf"the {split} split in domain 'e' \(1 dropped"):
        run(tmp_path, rules, rows, Evidence())
    kept = candidate("2", of="d", domain="e", split=split)
    assert len(run(tmp_path, rules, [*rows, kept], Evidence())) == 4


def test_a_domain_that_had_no_sequence_in_a_split_stops_nothing(tmp_path: Path) -> None:
    rows = [
        candidate("1", domain="d"),
        candidate("far too long", of="long", domain="d"),
        candidate("1", of="h", domain="e", split="holdout"),
    ]
    assert len(run(tmp_path, [rule(type="length", max_tokens=3)], rows, Evidence())) == 2


def test_many_emptied_domains_are_counted(tmp_path: Path) -> None:
    rows = [candidate("far too long", domain=f"d{i}") for i in range(9)] + [candidate("1")]
    with pytest.raises(FilterError, match=r"domain 'd2' .*, and none of 6 other domains or splits"):
        run(tmp_path, [rule(type="length", max_tokens=3)], rows, Evidence())


def evaluation(path: Path, fields: list[str]) -> dict[str, Any]:
    return CONTAMINATION | {"ngram": 6, "files": [{"path": str(path), "fields": fields}]}


def checked(settings: dict[str, Any]) -> None:
    """The checks that prepare and the dry run begin with."""
    filters = json.dumps([settings])
    config = load_config(QUICKSTART / "config.yaml", [f"synthesis.filters={filters}"])
    check_filters(config, [Prompt("p", "d", "train", text="?", reference="1")])


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = "How many clips did Natalia sell altogether?"


def test_evaluation_files_of_every_form_are_compared(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f'id,q\n1,"{LONG}"\n')
    pq.write_table(pa.table({"q": [None, LONG]}), tmp_path / "q.parquet")
    (tmp_path / "q.json").write_text(json.dumps([{"q": [LONG, "other"]}]))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]
    files = [tmp_path / "q.csv", tmp_path / "q.parquet", tmp_path / "q.json"]
    files.append(lines(tmp_path / "q.jsonl", {"q": chat}, {"q": LONG + " So?"}))
    rows = [candidate("", LONG), candidate("", "Be brief."), candidate("", "fine")]
    for path in files:
        settings = evaluation(path, ["q"])
        checked(settings)
        assert dropped(settings, rows) == [0], path
        filter_identity(rule(**settings), None)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"question": LONG}], ["qestion"], "column 'qestion', .* did you mean 'question'"),
        ([{"question": None}] * 2, ["question"], "'question', which is empty in all 2 rows"),
        ([{"question": " "}], ["question"], "which is empty in all 1 rows"),
        ([{"q": LONG}, {"q": 7}], ["q"], r"b\.jsonl:2: .* chat messages in 'q', found int"),
        ([{"q": {"text": LONG}}], ["q"], r"b\.jsonl:1: .* found dict"),
        (["x"], ["q"], r"b\.jsonl:1: a row must be an object, found str"),
    ],
)
def test_evaluation_files_are_read_before_anything_is_paid(
    rows: list[Any], fields: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(evaluation(lines(tmp_path / "b.jsonl", *rows), fields))


def test_a_damaged_evaluation_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{oops")
    with pytest.raises(PromptError, match=r"b\.jsonl:1: not valid JSON"):
        checked(evaluation(tmp_path / "b.jsonl", ["q"]))


def test_cells_without_a_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = [{"q": LONG, "a": "1"}, {"q": None, "a": "2"}, {"a": "3"}, {"q": "", "a": "4"}]
    checked(evaluation(lines(tmp_path / "b.jsonl", *rows), ["q", "a"]))
    (said,) = caplog.messages
    assert "b.jsonl has no text in the column 'q' of 3 rows, which are skipped" in said
