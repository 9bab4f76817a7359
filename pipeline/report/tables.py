"""Tables of the report for a terminal."""

from __future__ import annotations

from pipeline.messages import table
from pipeline.report.models import DomainFigures, Report
from pipeline.report.numbers import number, percent, scaled, significant
from pipeline.report.statistics import pooled


def text_summary(report: Report) -> str:
    """A table for a terminal: a column per model, a row per figure, all lines equally wide."""
    models = report.models
    overall = [pooled(model.domains) for model in models]
    rows = [["", *(m.name for m in models)], ["role", *(m.role for m in models)]]
    for domain in report.domains:
        rates = [model.domains.get(domain, DomainFigures()).exact_match for model in models]
        rows.append([f"exact match, {domain}", *map(percent, rates)])
    bounds = [">= " if figures.kl_bounded_mass else "" for figures in overall]
    kl = [b + number(f.kl_to_mixture) for b, f in zip(bounds, overall, strict=True)]
    rows += [
        ["hold-out loss, nats/token", *(number(f.holdout_loss) for f in overall)],
        ["KL to mixture, nats/token", *kl],
        ["top-1 agreement", *(percent(f.top1_agreement) for f in overall)],
        ["parameters", *(scaled(m.parameters) for m in models)],
        ["tokens/s", *(significant(m.tokens_per_second) for m in models)],
        ["latency, s", *(significant(m.latency_seconds) for m in models)],
        ["price per million tokens", *(significant(m.price) for m in models)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rounds_summary(report: Report) -> str:
    """A table for a terminal with a row per round; empty where there was only one."""
    if not report.rounds:
        return ""
    header = ["round", "sequences", "by the student", "steps", "tokens", "exact match"]
    rows = []
    for row in report.rounds:
        counts = (row.round, row.sequences, row.by_student, row.steps, row.tokens)
        quality = pooled(row.domains)
        rows.append(
            [
                *(f"{count:,}" for count in counts),
                percent(quality.exact_match),
                number(quality.holdout_loss),
                number(quality.kl_to_mixture),
                number(row.seconds, 0),
            ]
        )
    return table([*header, "hold-out loss", "KL to mixture", "seconds"], rows) + "\n"
