"""The report's words, table and page, from a made-up run with numbers checked by hand."""

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from pydantic import ValidationError

from pipeline.report import headlines as headlines_module
from pipeline.report import page, tables
from pipeline.report.models import DomainFigures, Report
from pipeline.report.numbers import scaled, significant
from pipeline.report.statistics import pooled, wilson_interval, within_chance
from tests.support.old_run import WRITTEN

VOID_ELEMENTS = {"meta", "br", "link", "img", "hr", "input"}
DOMAINS = ("algebra", "logic", "words")
ADDED = ("fidelity", "differences", "shown_prompts", "preferences")
"""Keys that the oldest reports lack."""
HOSTILE = '<script>alert("x")</script> & $\\frac{1}{0}$ _b'


def make_model(name, role, parameters, speed, price, *, exact_match, loss, kl):
    figures = zip(DOMAINS, exact_match, loss, kl, strict=True)
    return {
        "name": name,
        "role": role,
        "domains": {
            domain: {
                "prompts": 200,
                "exact_match": rate,
                "holdout_loss": nats,
                "kl_to_mixture": divergence,
                "kl_bounded_mass": 0.0021 if role == "teacher" else 0.0,
                "top1_agreement": 0.9 - divergence / 2,
                "holdout_tokens": 4321,
            }
            for domain, rate, nats, divergence in figures
        },
        "parameters": parameters,
        "weight_bytes": 4 * parameters,
        "peak_memory_bytes": None if role == "teacher" else 11 * parameters,
        "tokens_per_second": speed,
        "tokens_per_second_range": (0.9 * speed, 1.1 * speed),
        "latency_seconds": 40 / speed,
        "cost_per_hour": 0.35 if price else 0.0,
        "price_per_million_tokens": price,
        "engine": {"engine": "vllm", "device": "Xeon 6", "num_devices": 1},
    }


def make_curve(start, floor, key, kl):
    lines = [
        {"step": step, "train/loss": floor + start * math.exp(-step / 60), "train/lr": 1e-3}
        for step in range(1, 401)
    ]
    for step in range(0, 401, 50):
        decay = math.exp(-step / 70)
        lines.append(
            {
                "step": step,
                "holdout/loss": floor + 0.03 + start * decay,
                "holdout/cross_entropy": key + 4 * decay,
                "holdout/forward_kl": kl + 3 * decay,
            }
        )
    return lines


def make_cache(num_bytes, kept_mass):
    return {
        "num_shards": 6,
        "num_sequences": 5_204,
        "num_positions": 112_340,
        "num_bytes": num_bytes,
        "bytes_per_token": num_bytes / 112_340,
        "entries_per_position": 7.42,
        "kept_mass": kept_mass,
        "kept_mass_p01": kept_mass - 0.011,
        "tail_nats": -math.log(kept_mass),
        "gold_logprob": -0.4127,
        "quarantined": 1,
    }


def make_counts(answers, wrong):
    return {
        "answers": answers,
        "kept": answers - wrong - 61,
        "too_long": wrong,
        "truncated": 17,
        "empty": 2,
        "duplicate": 42,
        "generated_tokens": answers * 23,
    }


def headlines(report):
    return headlines_module.headlines(Report.model_validate(report))


def render_html(report):
    return page.render_html(Report.model_validate(report))


def text_summary(report):
    return tables.text_summary(Report.model_validate(report))


def rounds_summary(report):
    return tables.rounds_summary(Report.model_validate(report))


@pytest.fixture
def report():
    """A report as its JSON file holds it."""
    return {
        "run": {
            "name": "three-teachers",
            "seed": 7,
            "checker": "exact",
            "finished_at": "2024-05-17T14:03:22+00:00",
            "versions": {"vllm": "0.32.0", "deepspeed": "0.19.8", "ray": "2.50.0", "torch": "2.9"},
            "hardware": "2 CPU cores, 8 GiB",
            "dataset": "5f0c6a1e9b7d",
            "caches": {"algebraist": "caches/algebraist-9f3a", "logician": "caches/logician-1c"},
            "identities": {
                "algebraist": {"model": "models/algebraist", "weights_sha256": "ab" * 32},
                "student": {"model": "runs/three-teachers/export", "weights_sha256": "cd" * 32},
            },
        },
        "models": [
            make_model(
                "algebraist", "teacher", 8_123_456, 410.0, 0.24,
                exact_match=(0.95, 0.40, 0.30), loss=(0.21, 1.9, 2.2), kl=(0.02, 0.8, 0.9),
            ),
            make_model(
                "logician", "teacher", 8_123_456, 400.0, 0.24,
                exact_match=(0.35, 0.92, 0.41), loss=(1.8, 0.25, 1.7), kl=(0.7, 0.03, 0.6),
            ),
            make_model(
                "student", "student", 2_030_864, 1_640.0, 0.06,
                exact_match=(0.93, 0.91, 0.78), loss=(0.25, 0.28, 0.61), kl=(0.05, 0.06, 0.12),
            ),
            make_model(
                "twin", "twin", 2_030_864, 1_640.0, 0.06,
                exact_match=(0.84, 0.86, 0.79), loss=(0.31, 0.33, 0.7), kl=(0.15, 0.16, 0.22),
            ),
        ],
        "stages": [
            {"stage": "synthesize", "seconds": 250.4, "cost": 0.024, "detail": "5,600 answers"}
            | {"unended": 0},
            {"stage": "score", "seconds": 61.0, "cost": None, "detail": "112,340 positions"}
            | {"unended": 0},
        ],
        "caches": {
            "algebraist": make_cache(3_456_789, 0.9987),
            "logician": make_cache(2_345_678, 0.9979),
        },
        "weights": {
            "algebra": {"algebraist": 0.94, "logician": 0.06},
            "logic": {"algebraist": 0.11, "logician": 0.89},
            "words": {"algebraist": 0.45, "logician": 0.55},
        },
        "combine": "mixture",
        "rounds": [],
        "product": {},
        "learned_weights": None,
        "renormalised_sequences": 3,
        "synthesis": {"algebraist": make_counts(2_800, 744), "logician": make_counts(2_801, 655)},
        "filters": [
            {
                "filter": "near_duplicate", "seen": 4_202, "dropped": 311,
                "dropped_by_domain": {"logic": 311}, "examples": [f"like {HOSTILE}"],
            },
            {"filter": "checker", "seen": 3_891, "dropped": 0,
             "dropped_by_domain": {}, "examples": []},
        ],
        "prompts": {"read": 2_000, "duplicates": 31, "train": 1_369, "holdout": 600},
        "curves": {
            "student": make_curve(3.0, 0.07, 0.38, 0.08),
            "twin": make_curve(4.0, 0.41, 0.45, 0.18),
        },
        "export_check": {
            "exports": {"student": agreement(1.7e-3)},
            "engines": {"student": agreement(2.3e-3)},
        },
    }  # fmt: skip


def agreement(mean_difference):
    """Log-probabilities within their noise."""
    figures = {"sequences": 8, "tokens": 1_234, "mean_difference": mean_difference}
    noise = {"noise": 2e-3, "bound": 5e-3, "signed_bound": 4e-3}
    return figures | {"signed_difference": 1e-4} | noise


class Page(HTMLParser):
    """Checks that elements nest and collects text and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.attributes, self.elements = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def model_of(report, name):
    return next(model for model in report["models"] if model["name"] == name)


def without_references(report):
    for model in report["models"]:
        for figures in model["domains"].values():
            figures["exact_match"] = None
    return report


def line_about(report, start):
    (line,) = [line for line in headlines(report) if line.startswith(start)]
    return line


# Wilson bounds from R: prop.test(x, n, correct = FALSE)$conf.int, and the closed form at 0 and 1.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (50, 100, 0.4038315, 0.5961685),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
    ],
)
def test_wilson_interval_has_known_values(successes, trials, low, high):
    assert wilson_interval(successes / trials, trials) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_without_trials_knows_nothing():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_chance_follows_the_published_interval():
    """Newcombe (1998), method 10: 56/70 - 48/80 has the 95 % interval 0.0524 to 0.3339."""
    first, second = (56 / 70, 70), (48 / 80, 80)
    assert not within_chance(first, second)
    assert not within_chance(second, first)
    # His other examples: 6/7 - 2/7 is 0.0582 to 0.8062, 5/56 - 0/29 is -0.0381 to 0.1926.
    assert not within_chance((6 / 7, 7), (2 / 7, 7))
    assert within_chance((5 / 56, 56), (0.0, 29))


def test_student_gains_and_losses_against_each_teacher(report):
    assert headlines(report)[0] == (
        "The student answers 87.3 % of 600 hold-out prompts exactly; "
        "algebraist 55.0 %, logician 56.0 %, twin 83.0 %."
    )
    line = line_about(report, "Against algebraist, in quality")
    assert "loses 2.0 points in algebra (93.0 % against 95.0 %, within chance)" in line
    assert "gains 51.0 points in logic (91.0 % against 40.0 %)" in line
    line = line_about(report, "Against logician, in quality")
    assert "gains 58.0 points in algebra" in line
    assert "loses 1.0 points in logic (91.0 % against 92.0 %, within chance)" in line
    line = line_about(report, "Against algebraist, in resources")
    assert "smaller, 0.250 times the parameters (2.03 M against 8.12 M)" in line
    assert "faster, 4.00 times the tokens/s" in line
    assert "cheaper, 0.250 times the price per million tokens" in line


def test_speeds_whose_rounds_overlap_are_not_ranked(report):
    model_of(report, "student")["tokens_per_second_range"] = (300.0, 1_800.0)
    line = line_about(report, "Against algebraist, in resources")
    assert "level within the spread of the rounds, 4.00 times the tokens/s" in line
    assert "level within the spread of the rounds, 0.250 times the price" in line
    assert "faster" not in line and "cheaper" not in line and "smaller" in line


@pytest.mark.parametrize(
    ("cost", "verdict"), [(0.7, "dearer, 2.00"), (0.35, "level"), (0.1, "cheaper")]
)
def test_a_price_is_ranked_by_the_range_of_prices(report, cost, verdict):
    """Equal speeds at another cost per hour make another price."""
    for name, per_hour in (("student", cost), ("algebraist", 0.35)):
        model_of(report, name).update(
            tokens_per_second=1_000.0,
            tokens_per_second_range=(900.0, 1_100.0),
            cost_per_hour=per_hour,
            price_per_million_tokens=per_hour / 3.6,
        )
    line = line_about(report, "Against algebraist, in resources")
    speed, price = line.split("; ")[1:]
    assert speed.startswith("level within the spread of the rounds, 1.00 times the tokens/s")
    assert price.startswith(verdict)


def test_a_price_is_level_where_its_ranges_meet(report):
    """Twice the speed at almost twice the cost, with rounds that differ."""
    for name, speed, per_hour in (("student", 2_000.0, 0.65), ("algebraist", 1_000.0, 0.35)):
        model_of(report, name).update(
            tokens_per_second=speed,
            tokens_per_second_range=(0.9 * speed, 1.1 * speed),
            cost_per_hour=per_hour,
            price_per_million_tokens=per_hour / (speed * 3600) * 1e6,
        )
    line = line_about(report, "Against algebraist, in resources")
    assert "faster, 2.00 times the tokens/s" in line
    assert "level within the spread of the rounds, 0.929 times the price" in line


def test_every_model_names_what_it_was_measured_on(report):
    assert "measured on different hardware" not in " ".join(headlines(report))
    model_of(report, "algebraist")["engine"] |= {"device": "NVIDIA H100", "num_devices": 2}
    model_of(report, "logician")["engine"] = {"engine": "endpoint", "device": "endpoint a.b:8000"}
    line = line_about(report, "Against algebraist, in resources")
    apart = "; measured on different hardware: student on Xeon 6, "
    assert line.endswith(f"{apart}algebraist on 2 x NVIDIA H100.")
    line = line_about(report, "Against logician, in resources")
    assert line.endswith(f"{apart}logician over the network.")
    words = Page(render_html(report)).words
    assert "Measured on" not in words
    assert "algebraist 2 x NVIDIA H100 8.12 M" in words
    assert "logician over the network 8.12 M" in words
    assert "student Xeon 6 2.03 M" in words


def test_a_student_that_loses_is_said_to_lose(report):
    student = model_of(report, "student")
    student |= {
        "parameters": 16_246_912,
        "tokens_per_second": 205.0,
        "tokens_per_second_range": (200.0, 210.0),
        "price_per_million_tokens": 0.48,
    }
    for figures in student["domains"].values():
        figures |= {"exact_match": 0.1, "holdout_loss": 3.0, "kl_to_mixture": 2.0}
    text = "\n".join(headlines(report))
    assert " gains " not in text
    assert "better" not in text
    line = line_about(report, "Against algebraist, in resources")
    assert "larger, 2.00 times the parameters" in line
    assert "slower, 0.500 times the tokens/s" in line
    assert "dearer, 2.00 times the price" in line
    line = line_about(report, "Against the twin")
    assert "loses 74.0 points in algebra (10.0 % against 84.0 %)" in line
    assert "hold-out loss 3.000 against 0.447 nats/token (worse)" in line


def test_the_twin_is_compared_where_it_wins_too(report):
    line = line_about(report, "Against the twin")
    assert "gains 9.0 points in algebra (93.0 % against 84.0 %)" in line
    assert "loses 1.0 points in words (78.0 % against 79.0 %, within chance)" in line
    assert "hold-out loss 0.380 against 0.447 nats/token (better)" in line
    assert "KL to the mixture 0.077 against 0.177 nats/token (better)" in line


def test_equal_figures_are_level(report):
    model_of(report, "student")["domains"]["words"]["exact_match"] = 0.79
    assert "is level in words (79.0 % against 79.0 %)" in line_about(report, "Against the twin")


@pytest.mark.parametrize("right", [1_999, 2_001])
def test_a_gain_that_rounds_to_nothing_is_level(report, right):
    model_of(report, "student")["domains"]["words"] |= {
        "exact_match": right / 3000,
        "prompts": 3000,
    }
    model_of(report, "twin")["domains"]["words"] |= {"exact_match": 2 / 3, "prompts": 3000}
    line = line_about(report, "Against the twin")
    assert f"is level in words ({right / 30:.1f} % against 66.7 %)" in line


@pytest.mark.parametrize("change", [{"cost_per_hour": 0.0}, {"price_per_million_tokens": None}])
@pytest.mark.parametrize("name", ["student", "algebraist"])
def test_nothing_is_claimed_where_no_cost_is_given(report, change, name):
    model_of(report, name).update(change)
    line = line_about(report, "Against algebraist, in resources")
    assert "tokens/s" in line
    assert not any(word in line for word in ("price", "cheaper", "dearer"))


def test_without_references_likelihood_speaks(report):
    lines = headlines(without_references(report))
    assert lines[0].startswith("No hold-out prompt has a reference answer")
    line = line_about(report, "Against algebraist, in quality")
    assert "hold-out loss 0.380 against 1.437 nats/token (better)" in line
    assert "points" not in "\n".join(lines)
    assert "no exact match is given" in Page(render_html(report)).words


def test_without_a_checker_nothing_is_said_of_references(report):
    without_references(report)["run"]["checker"] = None
    said = "prompts.checker is not set, so no answer is checked"
    assert headlines(report)[0] == f"{said}: likelihood compares the models."
    words = Page(render_html(report)).words
    assert f"{said}: no exact match is given" in words
    assert "reference answer" not in words


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (0.1, "KL to the mixture 0.100 against at least 0.573 nats/token (better)."),
        (0.8, "KL to the mixture 0.800 against at least 0.573 nats/token."),
        (0.5733, "KL to the mixture 0.573 against at least 0.573 nats/token."),
    ],
)
def test_a_lower_bound_is_not_ranked_as_if_measured(report, ours, said):
    for figures in model_of(without_references(report), "student")["domains"].values():
        figures["kl_to_mixture"] = ours
    assert line_about(report, "Against algebraist, in quality").endswith(said)


def test_likelihoods_are_compared_over_the_same_tokens(report):
    """The teacher has no row in one domain, and not all in another."""
    teacher = model_of(without_references(report), "algebraist")["domains"]
    del teacher["words"]
    line = line_about(report, "Against algebraist, in quality")
    assert "hold-out loss 0.265 against 1.055 nats/token in algebra, logic (better)" in line
    assert "KL to the mixture 0.055 against at least 0.410 nats/token in algebra, logic" in line
    teacher["logic"]["holdout_tokens"] -= 1
    line = line_about(report, "Against algebraist, in quality")
    assert "hold-out loss 0.250 against 0.210 nats/token in algebra (worse)" in line
    teacher["algebra"]["holdout_tokens"] -= 1
    line = line_about(report, "Against algebraist, in quality")
    assert line.endswith("nothing measured on the same tokens.")


def test_a_loss_that_is_infinite_is_not_given_and_not_beaten(report):
    model_of(without_references(report), "algebraist")["domains"]["words"]["holdout_loss"] = None
    line = line_about(report, "Against algebraist, in quality")
    assert "hold-out loss 0.265 against 1.055 nats/token in algebra, logic (better)" in line
    assert "—" not in line
    (row,) = [line for line in text_summary(report).splitlines() if line.startswith("hold-out")]
    assert row.split()[-4:] == ["—", "1.250", "0.380", "0.447"]
    words = Page(render_html(report)).words
    assert "algebraist masks a token of the hold-out answers in words" in words
    assert words.count("masks a token") == 1


def test_a_report_without_twin_and_with_mixed_references(report):
    report["models"] = [model for model in report["models"] if model["role"] != "twin"]
    del report["curves"]["twin"]
    for model in report["models"]:
        model["domains"]["words"]["exact_match"] = None
    assert "of 400 hold-out prompts" in headlines(report)[0]
    assert not any("twin" in line or "words" in line for line in headlines(report))
    assert "twin" not in Page(render_html(report)).words
    assert "twin" not in text_summary(report)


def test_prompts_that_were_too_long_to_ask_are_named_beside_the_rate(report):
    report["prompts"]["holdout_too_long_to_ask"] = 12
    assert "hold-out prompts exactly (12 more were too long to ask);" in headlines(report)[0]
    assert "12 holdout too long to ask" in Page(render_html(report)).words


def test_references_that_the_checker_cannot_read_are_named_beside_the_rate(report):
    report["prompts"] |= {"holdout_too_long_to_ask": 12, "holdout_reference_unread": 3}
    said = "(12 more were too long to ask, 3 more have a reference that exact cannot read);"
    assert said in headlines(report)[0]
    lines = headlines(without_references(report))
    assert lines[0].startswith("The checker exact cannot read the reference of any hold-out prompt")


def test_the_page_says_how_the_exports_were_proven(report):
    words = Page(render_html(report)).words
    proof = "log-probabilities of 1,234 tokens 0.00170 nats from the training's on average"
    assert f"Export of the student weights equal to the trained ones; {proof}" in words
    engine = "Serving engine of the student log-probabilities of 1,234 tokens 0.00230 nats"
    assert f"{engine} from those of the export on average" in words
    assert "where rounding alone makes 0.00200" in words


def test_pooled_weighs_by_prompts_and_tokens():
    figures = {"kl_to_mixture": 0.0, "kl_bounded_mass": 0.0, "top1_agreement": 1.0}
    one = figures | {"prompts": 100, "exact_match": 0.5, "holdout_loss": 1.0, "holdout_tokens": 10}
    two = figures | {"prompts": 300, "exact_match": 0.9, "holdout_loss": 2.0, "holdout_tokens": 30}
    three = two | {"exact_match": None, "holdout_tokens": 0}
    parts = {"a": one, "b": two, "c": three}
    found = pooled({name: DomainFigures(**part) for name, part in parts.items()})
    assert (found.exact_match, found.holdout_loss) == pytest.approx((0.8, 1.75))
    assert (found.prompts, found.holdout_tokens) == (400, 40)


def test_page_holds_every_model_and_number(report):
    words = Page(render_html(report)).words
    for expected in (
        *(model["name"] for model in report["models"]), *DOMAINS, report["run"]["dataset"],
        *report["run"]["versions"].values(), *report["run"]["caches"].values(), "ab" * 32,
        report["run"]["hardware"], "93.0 %", "88.6 to 95.8 %", "0.250", "4,321", "12,963",
        "8.12 M", "31.0 MiB", "21.3 MiB", "1,640", "0.0244", "0.350", "0.0600", "250.4",
        "0.0240", "311.4", "112,340", "3.30 MiB", "30.8",
        "7.42", "0.9987", "0.9877", "-0.413", "2,800", "744", "1,995", "71.2 %", "64,400",
        "1,369 train", "3 sequences lacked", "94 %", "0.00170", "0.00230",
    ):  # fmt: skip
        assert expected in words, expected
    for line in headlines(report):
        assert line.partition(": ")[2] in words


def test_peak_memory_says_what_it_is_on_a_gpu(report):
    assert "mostly memory that vLLM reserves" in Page(render_html(report)).words


def test_bounds_are_marked_and_explained(report):
    words = Page(render_html(report)).words
    assert "≥ 0.020 a" in words
    assert "A lower bound" in words
    assert "≥ 0.050" not in words
    for model in report["models"]:
        for figures in model["domains"].values():
            figures["kl_bounded_mass"] = 0.0
    words = Page(render_html(report)).words
    assert "≥" not in words
    assert "A lower bound" not in words


def test_page_escapes_hostile_names(report):
    report = rename(report, "student", HOSTILE)
    report["run"]["name"] = report["stages"][0]["detail"] = HOSTILE
    html = render_html(report)
    page = Page(html)
    assert "script" not in page.elements
    assert "<script" not in html
    assert HOSTILE in page.words


def rename(report, old, new):
    """The report with a name changed wherever it is a key or a value; roles and curves stay."""
    changed = copy.deepcopy(report)
    model_of(changed, old)["name"] = new
    for place in (changed["run"]["identities"], changed["synthesis"], changed["caches"]):
        if old in place:
            place[new] = place.pop(old)
    for figures in (shares for shares in changed["weights"].values() if old in shares):
        figures[new] = figures.pop(old)
    return changed


def test_page_stands_alone_and_is_reproducible(report):
    html = render_html(report)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.elements)
    assert page.elements.count("svg") > len(DOMAINS)
    assert "://" not in html
    assert "@import" not in html
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert render_html(report) == html


def test_a_model_has_one_colour(report):
    html = render_html(report)
    found = {model["name"]: set() for model in report["models"]}
    for colour, name in re.findall(r'background: (#\w+)"></span><span class="name">([^<]+)<', html):
        found[name].add(colour)
    label, bar = r'bar-label"[^>]*>([^<]+)</span>', r'<svg class="bar".*?fill="(#\w+)"/>'
    bars = rf"{label}\s*{bar}\s*(?:<path|</svg>)"
    for name, colour in re.findall(bars, html, re.DOTALL):
        found[name].add(colour)
    assert all(len(colours) == 1 for colours in found.values())
    assert len(set.union(*found.values())) == len(report["models"])
    for name in ("student", "twin"):
        assert f"stroke: {found[name].copy().pop().lower()}" in html


def test_an_empty_cache_has_a_page(report):
    report["caches"]["logician"] = {
        "num_shards": 0, "num_sequences": 0, "num_positions": 0, "num_bytes": 0, "quarantined": 9
    }  # fmt: skip
    assert "logician" in Page(render_html(report)).words


def test_hidden_states_stand_beside_their_teachers_distributions(report):
    sizes = {"num_shards": 2, "num_sequences": 8, "num_positions": 90, "num_bytes": 9_000}
    report["caches"]["logician+features"] = sizes | {"bytes_per_token": 100.0, "quarantined": 0}
    for line in report["curves"]["student"]:
        if "holdout/loss" in line:
            line["holdout/relation_angle_logician_4_2"] = 0.25
    html = render_html(report)
    page = Page(html)
    assert "logician+features" in page.words and "8.79 KiB" in html
    chips = set(re.findall(r'(#\w+)"></span><span class="name">(logician.*?)<', html))
    assert {name for _, name in chips} == {"logician", "logician+features"}
    assert len({colour for colour, _ in chips}) == 1
    assert "Hold-out losses, each in its unit" in html
    assert "Hold-out losses, nats/token" not in html


def test_text_summary_is_aligned(report):
    summary = text_summary(rename(report, "logician", "a-logician-with-a-long-name"))
    lines = summary.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["algebraist", "a-logician-with-a-long-name", "student", "twin"]
    ends = [lines[0].index(name) + len(name) for name in lines[0].split()]
    for line in lines[2:]:
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for end in ends)
    assert "93.0 %" in next(line for line in lines if "exact match, algebra" in line)
    (line,) = [line for line in lines if "KL to mixture" in line]
    assert ">= 0.573" in line and ">= 0.077" not in line and " 0.077" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "—"),
        (math.nan, "—"),
        (1234.5, "1,234"),
        (0.0001234, "0.000123"),
        (-2.5, "-2.50"),
    ],
)
def test_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [
        (None, 1000, "—"), (512, 1000, "512"), (1000, 1000, "1.00 k"), (1.54e9, 1000, "1.54 B"),
        (7e12, 1000, "7,000 B"), (0, 1024, "0 B"), (1024, 1024, "1.00 KiB"),
        (5 * 1024**3, 1024, "5.00 GiB"),
    ],
)  # fmt: skip
def test_scaled_numbers(value, base, text):
    assert scaled(value, base) == text


def test_importing_the_report_loads_neither_plots_nor_templates():
    code = "import sys, pipeline.report.page; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_rounds_to_zero_has_no_sign(report):
    for divergence in (-0.0003, -0.0):
        report["models"][2]["domains"] = {
            name: {**figures, "kl_to_mixture": divergence}
            for name, figures in report["models"][2]["domains"].items()
        }
        (line,) = (x for x in text_summary(report).splitlines() if x.startswith("KL to mixture"))
        assert " 0.000" in line
        assert not re.search(r"[-\u2212]0\.0+(?!\d)", text_summary(report) + render_html(report))


def test_likelihoods_that_print_alike_are_level(report):
    for model, nats in zip(report["models"][2:], (0.12341, 0.12339), strict=True):
        for figures in model["domains"].values():
            figures |= {"holdout_loss": nats, "exact_match": None}
    text = " ".join(headlines(report))
    assert "hold-out loss 0.123 against 0.123 nats/token (level)" in text


def test_a_domain_without_holdout_sequences_has_a_page(report):
    empty = dict.fromkeys(("holdout_loss", "kl_to_mixture", "kl_bounded_mass", "top1_agreement"))
    for model in report["models"]:
        model["domains"]["words"] |= {**empty, "holdout_tokens": 0}
    assert Page(render_html(report)).words.count("words") and text_summary(report)
    assert pooled(Report.model_validate(report).models[0].domains).holdout_tokens == 2 * 4321


def test_what_draws_cannot_tell_is_said_and_not_shown(report):
    kept = Page(render_html(report)).words
    assert "Variance of draws" not in kept and "hold draws" not in kept
    for cache in report["caches"].values():
        del cache["tail_nats"]
        cache |= {"lost_mass": 0.0123, "draw_variance": 0.0456}
    for model in report["models"]:
        for figures in model["domains"].values():
            figures |= {"kl_to_mixture": None, "kl_bounded_mass": None, "top1_agreement": None}
    words = Page(render_html(report)).words
    assert "Variance of draws" in words and "0.0456" in words
    assert "KL to the mixture and agreement with it are not measured" in words
    (line,) = [line for line in text_summary(report).splitlines() if line.startswith("KL to")]
    assert line.split()[-4:] == ["—"] * 4


def test_the_page_says_how_teachers_combine(report):
    assert "Teachers combine by" not in render_html(report)
    report |= {
        "combine": "product",
        "product": {"words": {"assumed_mass": 0.0123, "floored": 0.5}},
        "learned_weights": {"split": "validation", "domains": {"words": {"positions": 1234}}},
    }
    html = " ".join(render_html(report).split())
    assert "Teachers combine by product." in html
    assert "In words, 1.2 % of the product's mass" in html and "in 50.0 % of positions" in html
    assert "learned on the validation split: 1,234 positions of words." in html


def test_every_filter_is_shown_with_its_counts(report):
    words = Page(render_html(report)).words
    assert "Near duplicate 4,202 311 7.4 % logic 311; like <script>" in words
    assert "Checker 3,891 0 0.0 %" in words
    report["filters"] = []
    assert "Share dropped" not in Page(render_html(report)).words


def test_attempts_that_are_not_counted_are_named(report):
    assert "lower bounds" not in render_html(report)
    report["stages"][0]["unended"] = 2
    words = Page(render_html(report)).words
    assert "5,600 answers (and 2 attempts that did not end)" in words
    assert (
        "112,340 positions Total" in words and "of the other stages are lower bounds. Cost" in words
    )
    report["stages"][0]["unended"] = 1
    assert "(and 1 attempt that did not end)" in Page(render_html(report)).words


def round_of(number, exact, loss, kl):
    return {
        "round": number,
        "sequences": 1_369,
        "by_student": 1_200 * (number - 1),
        "steps": 500,
        "tokens": 90_000 + number,
        "seconds": 61.5,
        "domains": {
            "algebra": {
                "prompts": 60,
                "exact_match": exact,
                "holdout_tokens": 100,
                "holdout_loss": loss,
                "kl_to_mixture": kl,
                "kl_bounded_mass": 0.0,
                "top1_agreement": 0.5,
            }
        },
    }


def test_every_round_is_shown_where_there_are_several(report):
    assert "Rounds" not in Page(render_html(report)).words and rounds_summary(report) == ""
    report["rounds"] = [
        round_of(number, exact, loss, kl)
        for number, exact, loss, kl in ((1, None, 0.7112, 0.2), (2, 0.25, 0.6334, None))
    ]
    words = Page(render_html(report)).words
    assert "1 1,369 0 500 90,001 — 0.711 0.200 50.0 % 61.5" in words
    assert "2 1,369 1,200 500 90,002 25.0 % 0.633 — 50.0 % 61.5" in words
    header, first, second = rounds_summary(report).splitlines()
    assert header.split()[:2] == ["round", "sequences"]
    assert first.split()[-4:] == ["—", "0.711", "0.200", "62"]
    assert second.split()[-5:] == ["25.0", "%", "0.633", "—", "62"]


def test_a_report_that_was_written_is_read_and_written_alike(report):
    """Key by key and byte by byte: other programs read the file."""
    path = WRITTEN / "output/runs/old/report.json"
    written = path.read_text()
    read = Report.model_validate(json.loads(written))
    again = read.model_dump()
    assert [again.pop(key) for key in ADDED] == [[]] * len(ADDED)
    assert json.dumps(again, indent=2) + "\n" == written
    assert "second" in Page(page.render_html(read)).words
    for change in ({}, {"rounds": [round_of(1, None, 0.7112, 0.2)]}):
        made_up = json.loads(json.dumps(report | change))
        known = {key: [] for key in ADDED} | made_up
        assert json.loads(json.dumps(Report.model_validate(made_up).model_dump())) == known


def test_a_report_with_an_unknown_key_is_refused(report):
    with pytest.raises(ValidationError, match=r"weigths"):
        Report.model_validate(report | {"weigths": {}})
