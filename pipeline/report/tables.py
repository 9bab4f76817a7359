"""Tables of the report for a terminal."""

from __future__ import annotations

from typing import Any

from pipeline.messages import table
from pipeline.report.figures import number, percent, price, scaled, significant
from pipeline.report.statistics import pooled


def text_summary(report: dict[str, Any]) -> str:
    """A table for a terminal: a column per model, a row per figure, all lines equally wide."""
    models = report["models"]
    overall = [pooled(model) for model in models]
    rows = [["", *(m["name"] for m in models)], ["role", *(m["role"] for m in models)]]
    for domain in domains_of(report):
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


def domains_of(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for model in report["models"] for name in model["domains"]))
