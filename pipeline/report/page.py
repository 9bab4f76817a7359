"""The HTML page of a report, complete in itself: it loads nothing.

jinja2 and matplotlib are imported inside functions, so that importing this module is fast.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.report.colours import colours_of
from pipeline.report.comparisons import fidelity_groups
from pipeline.report.curves import curves_svg
from pipeline.report.headlines import headlines, why_unchecked
from pipeline.report.models import Report
from pipeline.report.numbers import number, percent, scaled, significant
from pipeline.report.statistics import pooled, wilson_interval
from pipeline.synthesis.outcomes import DROPPED

REASONS = ("answers", "kept", "truncated", "empty", "duplicate")
"""Counts of answers that stand first in the page, in this order."""


def render_html(report: Report) -> str:
    """The page of a report; equal reports give equal pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    for function in (number, significant, percent, scaled, pooled):
        environment.filters[function.__name__] = function
    counted = {name for counts in report.synthesis.values() for name in counts}
    environment.globals |= {
        "headlines": headlines(report),
        "domains": report.domains,
        "colours": colours_of(report),
        "curves_svg": curves_svg(report),
        "drawn": any(cache.draw_variance is not None for cache in report.caches.values()),
        "fidelity_groups": list(fidelity_groups(report)),
        "outcomes": DROPPED,
        "reasons": [*REASONS, *sorted(counted - {*REASONS, "generated_tokens"})],
        "wilson": wilson_interval,
        "unchecked": why_unchecked(report),
    }
    return environment.get_template("report.html.j2").render(dict(report))
