"""The training curves of the report, as one SVG element."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType
from pipeline.report.colours import ROLE_COLOURS
from pipeline.report.models import Report

CURVE_POINTS = 300
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
"""Titles and series of the first panels. The objectives of student and twin differ; cross-entropy
compares them.
"""
LOSS_FORMS = ("o-", "s--", "^:", "D-.", "v-")
OWN_UNITS = ("holdout/hidden_state", "holdout/relation")
NO_LOSSES = re.compile(r"holdout/(loss|cross_entropy|union_error_bound|.*_floored)")


def _loss_panel(report: Report) -> dict[str, dict[str, str]]:
    """Title and series of the hold-out losses against the teachers."""
    lines = (line for curve in report.curves.values() for line in curve)
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("holdout/"))
    shown = [key for key in keys if not NO_LOSSES.fullmatch(key)]
    title = f"Hold-out {shown[0].partition('/')[2]}" if len(shown) == 1 else "Hold-out losses"
    in_nats = not any(key.startswith(OWN_UNITS) for key in shown)
    forms = (LOSS_FORMS[index % len(LOSS_FORMS)] for index in range(len(shown)))
    unit = "nats/token" if in_nats else "each in its unit"
    return {f"{title}, {unit}": dict(zip(shown, forms, strict=True))}


def curves_svg(report: Report) -> str:
    """The training curves as one SVG element without namespaces; long curves become means."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLOT_STYLE):
        figure, file = Figure(figsize=(11, 2.9), layout="constrained"), io.StringIO()
        panels = CURVES | _loss_panel(report)
        for panel, (title, series) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for role, lines in report.curves.items():
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
