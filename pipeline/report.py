"""The report of a run, last in the flow: headlines, a terminal table, a page that loads nothing.

The evaluate stage measures. jinja2 and matplotlib are imported where used: importing this is fast.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.features import teacher_of
from pipeline.text import table

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Z_95 = 1.959963984540054
MISSING = "—"
# Okabe and Ito's palette, which survives the common colour blindnesses, and two teachers more.
ROLE_COLOURS = {"student": "#0072B2", "twin": "#E69F00"}
TEACHER_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A79AD8", "#B5A642")
REASONS = ("answers", "kept", "truncated", "empty", "duplicate")
CURVE_POINTS = 300
SMALL_NATS = 0.01
PLOT_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "polystill", "text.parse_math": False,
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9AA0A6",
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.axisbelow": True,
    "grid.color": "#E6E8EB", "text.color": "#22262B", "axes.labelcolor": "#5F666E",
    "xtick.color": "#5F666E", "ytick.color": "#5F666E",
}  # fmt: skip
CURVES = {
    "Own objective: training (line), hold-out (dots)": {"train/loss": "-", "holdout/loss": "o"},
    "Hold-out cross-entropy, nats/token": {"holdout/cross_entropy": "o-"},
}
"""Titles of the first panels; each model's own objective differs, cross-entropy compares."""
LOSS_FORMS = ("o-", "s--", "^:", "D-.", "v-")
OWN_UNITS = ("holdout/hidden_state", "holdout/relation")
NO_LOSSES = re.compile(r"holdout/(loss|cross_entropy|union_error_bound|.*_floored)")


def wilson_interval(rate: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    shrink = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 / shrink * math.sqrt(rate * (1 - rate) / trials + (Z_95 / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def within_chance(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the 95 % interval of a difference in exact match holds zero (Newcombe, 1998).

    Takes the two models' answers as independent; the same prompts make that cautious.
    """
    low, high = sorted((ours, theirs), key=lambda figures: figures["exact_match"])
    down = high["exact_match"] - wilson_interval(high["exact_match"], high["prompts"])[0]
    up = wilson_interval(low["exact_match"], low["prompts"])[1] - low["exact_match"]
    return high["exact_match"] - low["exact_match"] <= math.hypot(down, up)


def pooled(model: dict[str, Any]) -> dict[str, Any]:
    """Figures over all domains: exact match by prompts with a reference, others by tokens.

    A figure that lacks some of the tokens is None: it would stand for others than its neighbours.
    """
    parts = list(model["domains"].values())

    def mean(key: str, weight: str) -> float | None:
        known = [(part[key], part[weight]) for part in parts if part[key] is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    def over_all_tokens(key: str) -> float | None:
        is_whole = all(part[key] is not None for part in parts if part["holdout_tokens"])
        return mean(key, "holdout_tokens") if is_whole else None

    by_tokens = ("holdout_loss", "kl_to_mixture", "kl_bounded_mass", "top1_agreement")
    return {key: over_all_tokens(key) for key in by_tokens} | {
        "exact_match": mean("exact_match", "prompts"),
        "prompts": sum(part["prompts"] for part in parts if part["exact_match"] is not None),
        "holdout_tokens": sum(part["holdout_tokens"] for part in parts),
    }


def headlines(report: dict[str, Any]) -> list[str]:
    """What the student gained and lost against each teacher and the twin, whoever wins."""
    student = next(model for model in report["models"] if model["role"] == "student")
    others = [model for model in report["models"] if model is not student]
    ours = pooled(student)
    exact = f"{percent(ours['exact_match'])} of {ours['prompts']:,}"
    rates = ", ".join(f"{m['name']} {percent(pooled(m)['exact_match'])}" for m in others)
    unasked = report["prompts"].get("holdout_too_long_to_ask", 0)
    beside = f" ({unasked:,} more were too long to ask)" if unasked else ""
    lines = [f"The student answers {exact} hold-out prompts exactly{beside}; {rates}."]
    if ours["exact_match"] is None:
        lines = [f"{_unchecked(report)}: likelihood compares the models."]
    for model in others:
        name, quality = model["name"], _quality(student, model)
        if model["role"] == "teacher":
            lines.append(f"Against {name}, in quality: {quality}.")
            lines.append(f"Against {name}, in resources: {_resources(student, model)}.")
        else:
            figures = dict.fromkeys((quality, _likelihood(student, model)))
            lines.append(f"Against the twin (cross-entropy alone): {'; '.join(figures)}.")
    check = report["export_check"]
    worst = max(check["max_logit_difference"], check["max_engine_logprob_difference"])
    if not worst <= check["tolerance"]:
        allowed = significant(check["tolerance"])
        lines.append(f"Caution: the export is off by {significant(worst)}, tolerance {allowed}.")
    return lines


def text_summary(report: dict[str, Any]) -> str:
    """A table for a terminal: a column per model, a row per figure, all lines equally wide."""
    models = report["models"]
    overall = [pooled(model) for model in models]
    rows = [["", *(m["name"] for m in models)], ["role", *(m["role"] for m in models)]]
    for domain in _domains(report):
        rates = [model["domains"].get(domain, {}).get("exact_match") for model in models]
        rows.append([f"exact match, {domain}", *map(percent, rates)])
    bounds = [">= " if figures["kl_bounded_mass"] else "" for figures in overall]
    kl = [b + number(f["kl_to_mixture"]) for b, f in zip(bounds, overall, strict=True)]
    rows += [
        ["hold-out loss, nats/token", *(number(f["holdout_loss"]) for f in overall)],
        ["KL to mixture, nats/token", *kl],
        ["top-1 agreement", *(percent(f["top1_agreement"]) for f in overall)],
        ["parameters", *(scaled(m["parameters"]) for m in models)],
        ["tokens/s", *(significant(m["tokens_per_second"]) for m in models)],
        ["latency, s", *(significant(m["latency_seconds"]) for m in models)],
        ["price per million tokens", *(significant(price(m)) for m in models)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rounds_summary(report: dict[str, Any]) -> str:
    """A table for a terminal with a row per round; empty where there was only one."""
    if not report["rounds"]:
        return ""
    header = ["round", "sequences", "of the student", "steps", "tokens", "exact match"]
    rows = [
        [
            *(f"{row[key]:,}" for key in ("round", "sequences", "by_student", "steps", "tokens")),
            percent(pooled(row)["exact_match"]),
            number(pooled(row)["holdout_loss"]),
            number(pooled(row)["kl_to_mixture"]),
            number(row["seconds"], 0),
        ]
        for row in report["rounds"]
    ]
    return table([*header, "hold-out loss", "KL to mixture", "seconds"], rows) + "\n"


def render_html(report: dict[str, Any]) -> str:
    """The page of a run, complete in itself; equal reports give equal pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    for function in (number, significant, percent, scaled, price, pooled, device):
        environment.filters[function.__name__] = function
    counted = {name for counts in report["synthesis"].values() for name in counts}
    environment.globals |= {
        "headlines": headlines(report),
        "domains": _domains(report),
        "colours": _colours(report),
        "curves_svg": _curves(report),
        "drawn": any("draw_variance" in cache for cache in report["caches"].values()),
        "reasons": [*REASONS, *sorted(counted - {*REASONS, "generated_tokens"})],
        "wilson": wilson_interval,
        "unchecked": _unchecked(report),
    }
    return environment.get_template("report.html.j2").render(report)


def number(value: float | None, digits: int = 3) -> str:
    """With a fixed number of decimals; what rounds to zero has no sign."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}"


def significant(value: float | None) -> str:
    """At least three significant digits, never as a power of ten."""
    if value is None or value == 0 or not math.isfinite(value):
        return number(value, 0)
    return number(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def percent(value: float | None) -> str:
    return f"{number(100 * value, 1)} %" if value is not None else MISSING


def scaled(value: float | None, base: int = 1000) -> str:
    """A large number with its unit, as 1.54 B parameters, or 3.09 GiB with base 1024."""
    if value is None:
        return MISSING
    units = ("", " k", " M", " B") if base == 1000 else (" B", " KiB", " MiB", " GiB")
    power = min(int(math.log(max(value, 1), base) + 1e-9), 3)
    return significant(value / base**power) + units[power]


def price(model: dict[str, Any]) -> float | None:
    """Per million tokens; None where no cost is given, since free is not a measurement."""
    return (model["price_per_million_tokens"] or None) if model["cost_per_hour"] else None


def device(model: dict[str, Any]) -> str:
    """What a model was measured on."""
    engine = model["engine"]
    if engine["engine"] == "endpoint":
        return "over the network"
    count = engine["num_devices"]
    return engine["device"] if count == 1 else f"{count} x {engine['device']}"


def _domains(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for model in report["models"] for name in model["domains"]))


def _colours(report: dict[str, Any]) -> dict[str, str]:
    """One colour per model, in every plot and table."""
    teachers = [model["name"] for model in report["models"] if model["role"] == "teacher"]
    named = enumerate(dict.fromkeys([*teachers, *map(teacher_of, report["caches"])]))
    colours = {name: TEACHER_COLOURS[index % len(TEACHER_COLOURS)] for index, name in named}
    colours |= {cache: colours[teacher_of(cache)] for cache in report["caches"]}
    pair = [model for model in report["models"] if model["role"] in ROLE_COLOURS]
    return colours | {model["name"]: ROLE_COLOURS[model["role"]] for model in pair}


def _unchecked(report: dict[str, Any]) -> str:
    """Why there is no exact match, where there is none."""
    if report["run"]["checker"] is None:
        return "prompts.checker is not set, so no answer is checked"
    return "No hold-out prompt has a reference answer"


def _quality(student: dict[str, Any], other: dict[str, Any]) -> str:
    """Gains and losses in exact match by domain; likelihood where nothing has a reference."""
    parts = []
    for domain, ours in student["domains"].items():
        theirs = other["domains"].get(domain, {"exact_match": None})
        if ours["exact_match"] is None or theirs["exact_match"] is None:
            continue
        points = round(100 * (ours["exact_match"] - theirs["exact_match"]), 1)
        change = f"{'gains' if points > 0 else 'loses'} {abs(points):.1f} points"
        chance = ", within chance" if points and within_chance(ours, theirs) else ""
        figures = f"{percent(ours['exact_match'])} against {percent(theirs['exact_match'])}"
        parts.append(f"{change if points else 'is level'} in {domain} ({figures}{chance})")
    return f"the student {', '.join(parts)}" if parts else _likelihood(student, other)


def _likelihood(student: dict[str, Any], other: dict[str, Any]) -> str:
    """Loss and KL over the same tokens; what is known as a lower bound has no verdict of its own.

    A KL that is above a bound may be above or below the divergence that it bounds.
    """
    parts = []
    for label, key in (("hold-out loss", "holdout_loss"), ("KL to the mixture", "kl_to_mixture")):
        shared = _shared_domains(student, other, key)
        if not shared:
            continue
        both = [_over(model, shared) for model in (student, other)]
        ours, theirs = (figures[key] for figures in both)
        bounds = [key == "kl_to_mixture" and figures["kl_bounded_mass"] > 0 for figures in both]
        show = number if max(ours, theirs) >= SMALL_NATS else significant
        words = " against ".join(
            f"{'at least ' if is_bound else ''}{show(figure)}"
            for is_bound, figure in zip(bounds, (ours, theirs), strict=True)
        )
        places = "" if len(shared) == len(student["domains"]) else f" in {', '.join(shared)}"
        verdict = _verdict((ours, bounds[0]), (theirs, bounds[1]))
        parts.append(f"{label} {words} nats/token{places}{verdict}")
    return ", ".join(parts) or "nothing measured on the same tokens"


def _verdict(ours: tuple[float, bool], theirs: tuple[float, bool]) -> str:
    """Of two figures of which less is better, each with whether it is a lower bound."""
    (our_figure, ours_is_bound), (their_figure, theirs_is_bound) = ours, theirs
    if number(our_figure) == number(their_figure):
        return "" if ours_is_bound or theirs_is_bound else " (level)"
    if our_figure < their_figure:
        return "" if ours_is_bound else " (better)"
    return "" if theirs_is_bound else " (worse)"


def _shared_domains(one: dict[str, Any], two: dict[str, Any], key: str) -> list[str]:
    """Domains in which both models have a figure over as many hold-out tokens."""
    pairs = ((name, part, two["domains"].get(name)) for name, part in one["domains"].items())
    return [
        name
        for name, ours, theirs in pairs
        if theirs is not None
        and None not in (ours[key], theirs[key])
        and ours["holdout_tokens"] == theirs["holdout_tokens"]
    ]


def _over(model: dict[str, Any], domains: list[str]) -> dict[str, Any]:
    """Pooled figures over some domains."""
    return pooled(model | {"domains": {name: model["domains"][name] for name in domains}})


def _resources(student: dict[str, Any], other: dict[str, Any]) -> str:
    parts = []
    for label, figure, spread, less, more in (
        ("parameters", lambda model: model["parameters"], None, "smaller", "larger"),
        ("tokens/s", lambda model: model["tokens_per_second"], _speeds, "slower", "faster"),
        ("price per million tokens", price, _prices, "cheaper", "dearer"),
    ):
        if (ours := figure(student)) and (theirs := figure(other)):
            word = less if ours < theirs else more if ours > theirs else "equal"
            if spread and _overlap(spread(student), spread(other)):
                word = "level within the spread of the rounds"
            figures = f"{scaled(ours)} against {scaled(theirs)}"
            parts.append(f"{word}, {significant(ours / theirs)} times the {label} ({figures})")
    if device(student) != device(other):
        places = (f"{model['name']} {_place(model)}" for model in (student, other))
        parts.append(f"measured apart: {', '.join(places)}")
    return "; ".join(parts)


def _place(model: dict[str, Any]) -> str:
    found = device(model)
    return found if model["engine"]["engine"] == "endpoint" else f"on {found}"


def _speeds(model: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second of the slowest and the fastest round."""
    low, high = model["tokens_per_second_range"]
    return low, high


def _prices(model: dict[str, Any]) -> tuple[float, float]:
    """Per million tokens at the speeds of the fastest and the slowest round."""
    low, high = (model["cost_per_hour"] / (speed * 3600) * 1e6 for speed in _speeds(model)[::-1])
    return low, high


def _overlap(one: tuple[float, float], two: tuple[float, float]) -> bool:
    """Whether two ranges have a value in common."""
    return one[0] <= two[1] and two[0] <= one[1]


def _loss_panel(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Title and series of the hold-out losses against the teachers."""
    lines = (line for curve in report["curves"].values() for line in curve)
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("holdout/"))
    shown = [key for key in keys if not NO_LOSSES.fullmatch(key)]
    title = f"Hold-out {shown[0].partition('/')[2]}" if len(shown) == 1 else "Hold-out losses"
    in_nats = not any(key.startswith(OWN_UNITS) for key in shown)
    forms = (LOSS_FORMS[index % len(LOSS_FORMS)] for index in range(len(shown)))
    unit = "nats/token" if in_nats else "each in its unit"
    return {f"{title}, {unit}": dict(zip(shown, forms, strict=True))}


def _curves(report: dict[str, Any]) -> str:
    """The training curves as one SVG element without namespaces; long ones are thinned to means."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLOT_STYLE):
        figure, file = Figure(figsize=(11, 2.9), layout="constrained"), io.StringIO()
        panels = CURVES | _loss_panel(report)
        for panel, (title, series) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for role, lines in report["curves"].items():
                for key, form in series.items():
                    points = np.array([(line["step"], line[key]) for line in lines if key in line])
                    if len(points):
                        thin = np.array_split(points, min(len(points), CURVE_POINTS))
                        steps, values = np.transpose([part.mean(axis=0) for part in thin])
                        style = {"color": ROLE_COLOURS[role], "markersize": 3.5}
                        panel.plot(steps, values, form, label=key.partition("/")[2], **style)
            if title not in CURVES and len(series) > 1:
                panel.legend(fontsize=7, frameon=False)
            panel.set(title=title, xlabel="step")
            panel.grid()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return re.sub(r'(?s)\A.*?(?=<svg)|\sxmlns(:xlink)?="[^"]*"', "", file.getvalue())
