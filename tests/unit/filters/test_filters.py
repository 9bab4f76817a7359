"""Filters on good and bad answers, their counts and files, and settings that are refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from jobs.stages.preflight import check_filters
from pipeline.checkers.answer_checkers import exact, number
from pipeline.config.filters import Filter
from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.errors import ConfigError, FilterError
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.run import FILTERS, filter_identity, filter_summary, run_filters
from pipeline.filters.similar_sets import Rarity, SimilarSets, jaccard, shingles_of
from pipeline.filters.text import script_of
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, Prompt

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
PARSER: TypeAdapter[Filter] = TypeAdapter(Filter)
LONG = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May"
)


def candidate(
    answer: str,
    prompt: str = "q",
    *,
    of: str = "p",
    number: int = 0,
    domain: str = "d",
    split: str = "train",
    reference: str | None = None,
    samples: int = 1,
) -> Candidate:
    name = f"{domain}-{of}-{number}"
    ids = np.frombuffer(answer.encode(), np.uint8).astype(np.int32)
    entry = DatasetEntry(name, of, domain, split, ("t",), "shard", len(ids) + 4, len(ids))
    return Candidate(entry, prompt, answer, ids, reference, samples)


def rule(**settings: Any) -> Filter:
    return PARSER.validate_python(settings)


def dropped(
    settings: dict[str, Any], candidates: Sequence[Candidate], evidence: Evidence | None = None
) -> list[int]:
    found = FILTERS[settings["type"]](rule(**settings), candidates, evidence or Evidence())
    assert all(found.values()), "every drop has a detail"
    return sorted(found)


def test_every_filter_has_a_function() -> None:
    kinds = get_args(get_args(Filter)[0])
    assert {get_args(kind.model_fields["type"].annotation)[0] for kind in kinds} == set(FILTERS)


def test_length_keeps_its_bounds() -> None:
    rows = [candidate("a" * n) for n in (1, 2, 5, 6)]
    assert dropped({"type": "length", "min_tokens": 2, "max_tokens": 5}, rows) == [0, 3]
    assert dropped({"type": "length", "max_tokens": 2}, rows) == [2, 3]


def test_alphabet_looks_at_letters_alone() -> None:
    answers = ["Straße 12 → 7!", "ответ: 12", "答えは 3 です", "12 + 3 = 15", "yes, ответ"]
    rows = [candidate(answer) for answer in answers]
    settings = {"type": "alphabet", "scripts": ["latin"], "min_share": 0.9}
    assert dropped(settings, rows) == [1, 2, 4]
    assert dropped(settings | {"min_share": 0.3}, rows) == [1, 2]
    assert dropped(settings | {"scripts": ["han", "hiragana"]}, rows) == [0, 1, 4]


@pytest.mark.parametrize(
    ("letter", "script"),
    [("ß", "latin"), ("\uff31", "latin"), ("ж", "cyrillic"), ("字", "han"), ("\uff71", "katakana")],
)
def test_a_letter_knows_its_alphabet(letter: str, script: str) -> None:
    assert script_of(letter) == script


def test_repetition_finds_loops_and_lets_prose_pass() -> None:
    rows = [candidate(LONG), candidate("I am sorry. " * 12), candidate("ab"), candidate("")]
    assert dropped({"type": "repetition", "ngram": 4, "max_share": 0.5}, rows) == [1]


def test_exact_duplicates_keep_the_first_and_leave_the_holdout() -> None:
    rows = [
        candidate("Yes  sir", "A b", of="1"),
        candidate("yes sir", "a B ", of="2"),
        candidate("yes sir", "other", of="3"),
        candidate("no", "a b", of="1", number=1),
        candidate("yes sir", "a b", of="4", split="holdout"),
    ]
    assert dropped({"type": "exact_duplicate", "of": "both"}, rows) == [1]
    assert dropped({"type": "exact_duplicate", "of": "answer"}, rows) == [1, 2]
    assert dropped({"type": "exact_duplicate", "of": "prompt"}, rows) == [1], "one prompt, two ways"


def test_near_duplicates_are_found_and_others_stay() -> None:
    rows = [
        candidate(LONG, of="1"),
        candidate(LONG.replace("48", "49"), of="2"),
        candidate(LONG.replace("Natalia", "The girl from the shop around the corner"), of="3"),
        candidate("Weng earns 12 an hour for babysitting", of="4"),
        candidate("hm", of="5"),
        candidate("hm", of="6", split="holdout"),
    ]
    settings = {"type": "near_duplicate", "of": "answer", "min_similarity": 0.8, "shingle": 5}
    assert dropped(settings, rows) == [1]
    assert dropped(settings | {"min_similarity": 0.99}, rows) == []


@given(
    st.lists(st.text("ab ", min_size=1, max_size=12), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.5, 2 / 3, 0.7, 0.75, 0.99]),
)
def test_exactly_the_sequences_that_are_like_an_earlier_kept_one_are_dropped(
    answers: list[str], least: float
) -> None:
    rows = [candidate(answer, of=str(i)) for i, answer in enumerate(answers)]
    settings = {"type": "near_duplicate", "of": "answer", "min_similarity": least, "shingle": 2}
    shingles = [
        {text[i : i + 2] for i in range(max(len(text) - 1, 1))}
        for text in (" ".join(answer.split()) for answer in answers)
    ]
    kept: list[int] = []
    for i, own in enumerate(shingles):
        if all(len(own & shingles[j]) / len(own | shingles[j]) < least for j in kept):
            kept.append(i)
    gone = dropped(settings, rows)
    assert gone == [i for i in range(len(answers)) if i not in kept]


def test_answers_that_share_their_instructions_are_compared_with_few_others() -> None:
    """Each shares five sixths of its text with all others, and little else."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnop"))
    shared = "".join(generator.choice(letters, 500))
    texts = [shared + "".join(generator.choice(letters, 100 + n % 40)) for n in range(300)]
    texts[200] = texts[20][:-5]
    rarity = Rarity(sum(map(len, texts)))
    sets = [shingles_of(text, 9) for text in texts]
    for elements in sets:
        rarity.add(elements)
    similar, pairs = SimilarSets(0.8, rarity), []
    for i, elements in enumerate(sets):
        pairs += [(i, j) for j in similar.candidates(elements)]
        similar.add(elements)
    assert pairs == [(200, 20)] and jaccard(sets[200], sets[20]) > 0.8 > jaccard(sets[0], sets[1])


def test_contamination_lists_what_was_hit(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.jsonl"
    path.write_text(json.dumps({"q": "How many CLIPS did Natalia sell altogether, in April?"}))
    rows = [
        candidate("so: how many clips did natalia sell altogether", "x", of="1"),
        candidate("fine", "Is the sum of two odd numbers even? Say why.", of="2"),
        candidate("fine", "odd numbers", of="3", split="validation"),
        candidate("fine", "odd numbers are odd", of="4"),
        candidate("fine", "Is the sum of two odd numbers even? Say why.", split="holdout"),
    ]
    settings = {
        "type": "contamination",
        "ngram": 6,
        "files": [{"path": str(path), "fields": ["q"]}],
    }
    evidence = Evidence(
        holdout_prompts={
            "hold-out a": "is the sum of two odd numbers even",
            "hold-out b": "Odd numbers!",
        }
    )
    found = FILTERS["contamination"](rule(**settings), rows, evidence)
    assert found == {
        0: f"{path}:1: 'how many clips did natalia sell'",
        1: "hold-out a: 'is the sum of two odd'",
        2: "hold-out b: 'odd numbers'",
    }


@pytest.mark.parametrize(
    ("question", "inside", "other"),
    [
        ("小明有三个苹果 他吃了一个", "请回答 小明有三个苹果 他吃了一个", "小红有五个梨"),
        ("りんごはいくつありますか", "問 りんごはいくつありますか。", "みかんを三つください"),
        ("มีแอปเปิ้ลเหลืออยู่กี่ลูก", "ตอบ มีแอปเปิ้ลเหลืออยู่กี่ลูก ครับ", "ส้มสีอะไร"),
        ("wie viele Äpfel hat Ann jetzt", "Wie VIELE äpfel hat ann jetzt?", "viele Birnen"),
    ],
    ids=["Chinese", "Japanese", "Thai", "with spaces"],
)  # fmt: skip
def test_contamination_sees_words_in_every_script(question: str, inside: str, other: str) -> None:
    rows = [candidate("fine", inside), candidate("fine", other, of="2")]
    evidence = Evidence(holdout_prompts={"hold-out": question})
    assert dropped({"type": "contamination", "ngram": 6}, rows, evidence) == [0]


def test_contamination_needs_the_columns_that_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.jsonl"
    path.write_text('{"question": "why?"}\n')
    settings = {
        "type": "contamination",
        "ngram": 6,
        "files": [{"path": str(path), "fields": ["q"]}],
    }
    with pytest.raises(ConfigError, match=r"needs the column 'q', and no row.*there are: question"):
        dropped(settings, [candidate("a")])


def test_the_checker_judges_what_has_a_reference() -> None:
    rows = [candidate("7", reference="7"), candidate("8", reference="7"), candidate("9")]
    assert dropped({"type": "checker"}, rows, Evidence(checker=exact)) == [1]


def test_answers_to_a_reference_that_the_checker_cannot_read_pass() -> None:
    references = [r"\text{East}", "x+y", r"\pi", "no solution", "Tuesday"]
    rows = [
        candidate(answer, of=reference, reference=reference, number=i)
        for reference in references
        for i, answer in enumerate((f"The answer is {reference}", "It is 5"))
    ]
    rows.append(candidate("It is 5", of="read", reference="4"))
    assert dropped({"type": "checker"}, rows, Evidence(checker=number)) == [len(rows) - 1]


def test_checkers_and_votes_look_behind_thoughts() -> None:
    rows = [
        candidate("<think>way 1</think>\nblue", of="q", reference="blue"),
        candidate("<think>way 2</think>\nblue", of="q", reference="blue", number=1),
        candidate("<think>blue", of="q", reference="blue", number=2),
        replace(candidate("blue", of="q", reference="blue", number=3), begins_in_thought=True),
    ]
    assert dropped({"type": "checker"}, rows, Evidence(checker=exact)) == [2, 3]
    settings = {"type": "agreement", "by": "exact", "min_share": 0.5}
    assert dropped(settings, rows) == [2, 3], "two of four samples vote for blue"
    assert dropped(settings, rows[1:]) == [0, 1, 2], "one of three is too few"


def test_the_best_answer_has_a_final_text() -> None:
    rows = [
        candidate("<think>1", of="q"),
        candidate("<think>12</think>red", of="q", number=1),
        candidate("<think>123</think>blue", of="q", number=2),
        candidate("<think>1234</think>blue", of="q", number=3),
        candidate("<think>all are cut", of="other"),
    ]
    assert dropped({"type": "best_of", "keep": 1, "by": "shortest"}, rows) == [0, 2, 3, 4]
    settings = {"type": "best_of", "keep": 1, "by": "samples"}
    assert dropped(settings, rows) == [0, 1, 3, 4], "two samples say blue"


def test_fractions_are_votes_of_their_own() -> None:
    texts = [r"\frac{1}{2}", r"\frac{3}{2}", r"\frac{5}{2}", "0.5", "50\\%", r"\sqrt{2}"]
    rows = [candidate(f"so \\boxed{{{text}}}", of="q", number=i) for i, text in enumerate(texts)]
    settings = {"type": "agreement", "by": "number", "min_share": 0.5}
    assert dropped(settings, rows) == [1, 2, 5], "three of six samples say a half"


def test_agreement_counts_every_sample() -> None:
    rows = [
        candidate("so #### 7", of="1", samples=2),
        candidate("or #### 8", of="1", number=1),
        candidate("hence #### 7.0", of="1", number=2),
        candidate("5", of="tie"),
        candidate("6", of="tie", number=1),
        candidate("no idea", of="none", samples=5),
        candidate("4", of="narrow", samples=2),
        candidate("who knows", of="narrow", number=1, samples=3),
    ]
    settings = {"type": "agreement", "by": "number", "min_share": 0.5}
    assert dropped(settings, rows) == [1, 3, 4, 5, 6, 7]
    assert dropped(settings | {"min_share": 0.76}, rows[:3]) == [0, 1, 2]
    assert dropped(settings | {"by": "exact"}, rows[:3]) == [1, 2], "half of four samples suffices"


def test_best_of_keeps_some_answers_of_each_prompt() -> None:
    rows = [
        candidate("abc", of="1", samples=1),
        candidate("a", of="1", number=1, samples=3),
        candidate("ab", of="1", number=2, samples=1),
        candidate("alone", of="2"),
    ]
    settings = {"type": "best_of", "keep": 1}
    assert dropped(settings | {"by": "shortest"}, rows) == [0, 2]
    assert dropped(settings | {"by": "longest"}, rows) == [1, 2]
    assert dropped(settings | {"by": "samples", "keep": 2}, rows) == [2]
    means = {"t": {"d-1-0": -0.1, "d-1-1": -2.0, "d-2-0": -9.0}}
    settings |= {"by": "likelihood", "teacher": "t"}
    assert dropped(settings, rows, Evidence(gold_logprobs=means)) == [1, 2]


def test_balance_gives_domains_their_shares_whatever_the_order() -> None:
    rows = [candidate("x", of=str(i), domain="big") for i in range(40)]
    rows += [candidate("x", of=str(i), domain="small") for i in range(9)]
    rows += [candidate("x", of="h", domain="big", split="holdout")]
    settings = {"type": "balance", "shares": {"big": 2.0, "small": 1.0}}
    gone = {rows[i].entry.sequence_id for i in dropped(settings, rows)}
    assert len(gone) == 22 and all(name.startswith("big") for name in gone)
    turned = rows[::-1]
    assert {turned[i].entry.sequence_id for i in dropped(settings, turned)} == gone


def test_balance_leaves_domains_of_the_holdout_alone_out() -> None:
    prompts = [
        Prompt(f"{split}-{domain}", domain, split, text="?")
        for split, domains in {"train": "ab", "holdout": "abc"}.items()
        for domain in domains
    ]
    rows = [candidate("x", of=p.prompt_id, domain=p.domain, split=p.split) for p in prompts]
    config = load_config(QUICKSTART, ["prompts.checker=null", "synthesis.filters=[]"])

    def with_shares(shares: dict[str, float]) -> Config:
        rules = [rule(type="balance", shares=shares)]
        synthesis = config.synthesis.model_copy(update={"filters": rules})
        return config.model_copy(update={"synthesis": synthesis})

    check_filters(with_shares({"a": 1.0, "b": 1.0}), prompts)
    assert dropped({"type": "balance", "shares": {"a": 1.0, "b": 1.0}}, rows) == []
    for shares in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(ConfigError, match=r"domains of train prompts are \['a', 'b'\]"):
            check_filters(with_shares(shares), prompts)


def test_balance_without_a_sequence_of_a_domain_says_what_was_dropped(tmp_path: Path) -> None:
    """The answers that it spares would be all that is trained on."""
    rows = [candidate("1"), candidate("far too long"), candidate("1", split="holdout")]
    spared = candidate("2", of="b", number=1, domain="e")
    entry = replace(spared.entry, authors=("student",))
    rows.append(replace(spared, entry=entry))
    shares = rule(type="balance", shares={"d": 1.0, "e": 1.0}, spares=["student"])
    rules = [rule(type="length", max_tokens=3), shares]
    with pytest.raises(
        FilterError, match=r"balance finds no sequence of \['e'\].*dropped so far: length 1 of 4;"
    ):
        run_filters(Layout(str(tmp_path), "run"), "digest", rules, rows, Evidence())


def test_perplexity_has_bounds_and_drops_what_was_not_scored() -> None:
    rows = [candidate("x", of=name) for name in ("sure", "fair", "odd", "none", "impossible")]
    means = {"d-sure-0": -0.001, "d-fair-0": -1.0, "d-odd-0": -6.0, "d-impossible-0": -np.inf}
    evidence = Evidence(gold_logprobs={"t": means})
    settings = {"type": "perplexity", "teacher": "t", "min": 1.1, "max": 100.0}
    assert dropped(settings, rows, evidence) == [0, 2, 3, 4]
    assert dropped(settings | {"min": None}, rows, evidence) == [2, 3, 4]


def test_filters_run_in_order_and_keep_what_they_drop(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), "run")
    rows = [
        candidate("1", "1+0", of="a", reference="1"),
        candidate("2", "1+0", of="a", number=1, reference="1"),
        candidate("far too long", of="b", domain="e"),
        candidate("short", of="c", domain="e"),
        candidate("1", of="h", split="holdout"),
    ]
    rules = [rule(type="length", max_tokens=5), rule(type="checker")]
    left, counts = run_filters(layout, "digest", rules, rows, Evidence(checker=exact))
    assert left == [rows[0], rows[3], rows[4]]
    assert counts == [
        {
            "filter": "length",
            "seen": 5,
            "dropped": 1,
            "dropped_by_domain": {"e": 1},
            "examples": ["12 tokens"],
        },
        {
            "filter": "checker",
            "seen": 4,
            "dropped": 1,
            "dropped_by_domain": {"d": 1},
            "examples": ["'2' against '1'"],
        },
    ]
    assert filter_summary(counts) == "length 1 of 5, checker 1 of 4"
    (wrong,) = pq.read_table(layout.rejected("digest", "1-checker")).to_pylist()
    assert (wrong["reason"], wrong["prompt"], wrong["answer"], wrong["sequence_id"]) == (
        "checker",
        "1+0",
        "2",
        "d-a-1",
    )


def test_a_filter_that_would_drop_everything_stops_with_the_counts_so_far(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), "run")
    rows = [candidate("abc", of="a"), candidate("abcd", of="b"), candidate("a", split="holdout")]
    rules = [rule(type="length", max_tokens=3), rule(type="length", max_tokens=2)]
    with pytest.raises(FilterError) as caught:
        run_filters(layout, "digest", rules, rows, Evidence())
    message = str(caught.value)
    assert "leaves no sequence of the train split" in message
    assert "dropped so far: length 1 of 3, length 1 of 2" in message and "3 tokens" in message
    for position in (0, 1):
        path = layout.rejected("digest", f"{position}-length")
        assert path in message or position == 0
        assert pq.read_table(path).num_rows == 1


def test_identity_follows_contents_and_not_paths(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        path.write_text('{"q": "why?"}\n')

    def identity(path: Path) -> dict[str, Any]:
        files = [{"path": str(path), "fields": ["q"]}]
        return filter_identity(rule(type="contamination", ngram=9, files=files), None)

    assert identity(one) == identity(two)
    before = identity(two)
    two.write_text('{"q": "how?"}\n')
    assert identity(two) != before
    assert filter_identity(rule(type="checker"), "exact") != filter_identity(
        rule(type="checker"), "number"
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("[{type: lenght, max_tokens: 3}]", "lenght"),
        ("[{type: length, max_token: 3}]", "did you mean 'max_tokens'"),
        ("[{type: length}]", "neither min_tokens nor max_tokens is given"),
        ("[{type: length, min_tokens: 9, max_tokens: 3}]", "no answer would be kept"),
        ("[{type: perplexity, teacher: words, min: 9, max: 3}]", "no answer would be kept"),
        ("[{type: perplexity, teacher: wrods, max: 3}]", "did you mean 'words'"),
        ("[{type: alphabet, scripts: [latn], min_share: 1}]", "latin"),
        ("[{type: checker}, {type: checker}]", "stands twice in the list"),
        ("[{type: agreement, by: number, min_share: 0.5}]", "every prompt has only one"),
        ("[{type: best_of, keep: 1, by: longest, teacher: words}]", "set by: likelihood"),
        ("[{type: best_of, keep: 1, by: likelihood}]", "by: likelihood needs `teacher`"),
        ("[{type: alphabet, scripts: [latin], min_share: 0}]", "greater than 0"),
        ("[{type: repetition, ngram: 2, max_share: 1}]", "less than 1"),
    ],
)
def test_a_filter_that_cannot_be_honoured_is_refused(filters: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [f"synthesis.filters={filters}"])


def test_a_choice_among_answers_needs_some() -> None:
    answer = "{type: answer, by: domain_teacher, samples_per_prompt: %d, sampling: {max_tokens: 9}}"
    vote = "synthesis.filters=[{type: agreement, by: exact, min_share: 0.5}]"
    load_config(QUICKSTART, [f"synthesis.recipes=[{{type: dataset}}, {answer % 1}]", vote])
    best = "synthesis.filters=[{type: best_of, keep: 2, by: longest}]"
    load_config(QUICKSTART, [f"synthesis.recipes=[{answer % 3}]", best])
    with pytest.raises(ConfigError, match="keeps 2 answers to a prompt, but there are at most 2"):
        load_config(QUICKSTART, [f"synthesis.recipes=[{answer % 2}]", best])


def test_a_checker_filter_needs_a_checker() -> None:
    with pytest.raises(ConfigError, match=r"\(checker\) needs prompts.checker"):
        load_config(QUICKSTART, ["prompts.checker=null"])


def test_filters_behind_one_that_needs_rows_run_after_scoring() -> None:
    filters = "[{type: length, max_tokens: 9}, {type: perplexity, teacher: words, max: 9},"
    filters += " {type: repetition, ngram: 2, max_share: 0.9}]"
    synthesis = load_config(QUICKSTART, [f"synthesis.filters={filters}"]).synthesis
    assert [each.type for each in synthesis.filters_before_scoring] == ["length"]
    assert [each.type for each in synthesis.filters_after_scoring] == ["perplexity", "repetition"]


def test_prompts_show_filters_their_words_without_what_all_share() -> None:
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})
    assert Prompt("p", "d", "train", messages=chat).words == "Hello"
    assert Prompt("p", "d", "train", text="1+1=").words == "1+1="
