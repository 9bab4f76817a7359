"""The stage's last line says how many answers were dropped and why, and which setting cut them."""

from pipeline.synthesis.outcomes import often_cut, outcome_summary

CUT = {"answers": 240, "kept": 121, "truncated": 119, "generated_tokens": 30000}
FEW = {"answers": 100, "kept": 87, "empty": 3, "truncated": 9, "duplicate": 1}
WRITING = {"answers": 10, "kept": 5, "over_long": 3, "malformed": 2, "prompts_written": 9}


def test_every_reason_is_counted_over_all_steps() -> None:
    assert outcome_summary({"large": CUT, "small": FEW}) == (
        "answers kept: large 121 of 240, small 87 of 100; "
        "dropped: 128 cut at max_tokens, 3 empty, 1 duplicates"
    )
    assert outcome_summary({"evolve by large": WRITING}) == (
        "answers kept: evolve by large 5 of 10; dropped: 3 replies cut at max_tokens, 2 malformed"
    )
    assert outcome_summary({"t": {"answers": 4, "kept": 4}}) == "answers kept: t 4 of 4"


def test_the_setting_that_cut_many_is_named_once_for_its_steps() -> None:
    shared, own = ("synthesis.recipes.0.sampling.max_tokens", 160), ("other.max_tokens", 24)
    counts = {"large": CUT, "small": FEW, "evolve by large": WRITING, "dataset": {"answers": 3}}
    assert often_cut(counts, {"large": shared, "small": shared, "evolve by large": own}) == [
        "128 of 340 answers were cut at synthesis.recipes.0.sampling.max_tokens (160): raise it, "
        "or ask for shorter answers",
        "3 of 10 answers were cut at other.max_tokens (24): raise it, or ask for shorter answers",
    ]
    assert often_cut({"small": FEW}, {"small": shared}) == [], "a few cut ones are no news"
