"""The report of a run, last in the flow: headlines, a terminal table, a page that loads nothing.

The evaluate stage measures. jinja2 and matplotlib are imported where used: importing this is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report.colours import colours_of
from pipeline.report.curves import curves_svg
from pipeline.report.figures import device, number, percent, price, scaled, significant
from pipeline.report.headlines import headlines, why_unchecked
from pipeline.report.statistics import pooled, wilson_interval
from pipeline.report.tables import domains_of

REASONS = ("answers", "kept", "truncated", "empty", "duplicate")


def render_html(report: dict[str, Any]) -> str:
    """The page of a run, complete in itself; equal reports give equal pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    for function in (number, significant, percent, scaled, price, pooled, device):
        environment.filters[function.__name__] = function
    counted = {name for counts in report["synthesis"].values() for name in counts}
    environment.globals |= {
        "headlines": headlines(report),
        "domains": domains_of(report),
        "colours": colours_of(report),
        "curves_svg": curves_svg(report),
        "drawn": any("draw_variance" in cache for cache in report["caches"].values()),
        "reasons": [*REASONS, *sorted(counted - {*REASONS, "generated_tokens"})],
        "wilson": wilson_interval,
        "unchecked": why_unchecked(report),
    }
    return environment.get_template("report.html.j2").render(report)
