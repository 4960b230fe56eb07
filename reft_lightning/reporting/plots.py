"""The plots of a report: matplotlib figures, with the same bytes for the same numbers.

Colours are distinguishable with any colour vision; markers and line styles repeat the distinction. All ink has one
colour, so that a page can replace it with its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from .comparisons import CORRELATIONS, LOSS, Comparison, Method
from .runs import ALL
from .studies import Study
from .tables import monitored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
# Okabe and Ito 2008, Color Universal Design; without black, which is the ink, and yellow, which is too pale on white.
# The last four are as far from these as possible for deuteranopes, protanopes and tritanopes (Machado et al. 2009): at
# least 19 CIELAB units from every other colour, while the first six are 16 apart.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8020E0", "#804060", "#E02040", "#406020",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BESIDE = 8  # points between markers with the same cost
LINES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "reft-report", "svg.fonttype": "path", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
    "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A plot as files: SVG without a date, PNG on white."""

    svg: str
    png: bytes


def comparison_plots(comparison: Comparison) -> dict[str, Drawn]:
    """Return name -> plot; plots without data are left out."""
    # if runs shared a machine, their seconds are not a property of the method
    seconds = "training seconds, mean over seeds" + " (runs at the same time)" * comparison.overlapped
    return _drawn(
        intervals=lambda: _intervals(comparison),
        score_parameters=lambda: _against(comparison, lambda m: m.trained, "trained parameters", log=True),
        score_seconds=lambda: _against(comparison, lambda m: m.cost("train_seconds"), seconds),
        learning_curves=lambda: _curves(comparison),
    )


def study_plots(study: Study) -> dict[str, Drawn]:
    """Return the search history and the importance of parameters, if there are trials."""
    return _drawn(search_history=lambda: _history(study), parameter_importance=lambda: _importance(study))


def _drawn(**plots: Callable[[], Figure | None]) -> dict[str, Drawn]:
    from matplotlib import rc_context

    drawn: dict[str, Drawn] = {}
    with rc_context(STYLE):
        for name, plot in plots.items():
            if figure := plot():
                svg, png = io.StringIO(), io.BytesIO()
                figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
                figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
                drawn[name] = Drawn(svg.getvalue(), png.getvalue())
    return drawn


def inline(drawn: Drawn, prefix: str, label: str) -> Markup:
    """Return a plot as an element for a page with several plots: with prefixed ids, and a label."""
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", drawn.svg[drawn.svg.index("<svg") :])
    element = element.replace(INK, "currentColor")
    return Markup(element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _figure(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]  # seven markers, ten colours: no two of 70 methods look the same


def _line_style(i: int) -> str:
    return LINES[(i + i // len(COLOURS)) % len(LINES)]  # neighbours differ, and 40 methods look different


def _text(label: str) -> str:
    """Return a label with dollar signs escaped, which matplotlib would read as mathematics."""
    return label.replace("$", r"\$")


def _scale(measure: str) -> float:
    return 1 if measure == LOSS else 100


def _name(column: tuple[str, str]) -> str:
    task, measure = column
    words = measure.replace("_", " ") if task == ALL else f"{task} {measure.replace('_', ' ')}"
    return _text(f"{words}{_unit(measure)}")


def _unit(measure: str) -> str:
    """Return the unit after the name of a measure; a correlation is not a percentage."""
    return "" if measure == LOSS else " × 100" if measure in CORRELATIONS else ", %"


def _scored(comparison: Comparison) -> list[tuple[int, Method]]:
    """Return the methods with a value in the head column, each with the index of its colour."""
    ordered = sorted((m for m in comparison.methods if not m.base), key=lambda m: m.label)
    numbers = {m.label: i for i, m in enumerate(ordered)}
    scored = [
        m for m in comparison.methods if (score := m.scores.get(comparison.head)) and not score.diverged
    ]
    return [(numbers.get(m.label, -1), m) for m in scored]


def _intervals(comparison: Comparison) -> Figure | None:
    """Draw mean, 95 % interval and every seed, one line per method, the best on top."""
    methods = _scored(comparison)
    if not methods:
        return None
    figure, (ax,) = _figure(height=1.1 + 0.38 * len(methods))
    scale = _scale(comparison.head[1])
    for y, (i, method) in enumerate(methods):
        score = method.scores[comparison.head]
        colour = INK if method.base else _colour(i)
        if score.interval:
            ax.plot([scale * x for x in score.interval], [y, y], color=colour, lw=2, solid_capstyle="butt")
        seeds = [scale * v for v in score.values.values()]
        ax.plot(seeds, [y] * len(seeds), "|", ms=9, color=colour, alpha=0.6)
        ax.plot([scale * score.mean], [y], marker="o" if method.base else _marker(i), ms=7, color=colour)
    ax.set_yticks(range(len(methods)), [_text(method.label) for _, method in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel(f"{_name(comparison.head)}: mean, seeds (|), 95 % interval")
    ax.grid(axis="y", visible=False)
    return figure


def _against(
    comparison: Comparison, cost: Callable[[Method], float | None], label: str, log: bool = False
) -> Figure | None:
    """Draw the score against a cost; methods without a cost, or with an unrecorded one, are horizontal lines.

    With ``log`` the axis of costs is logarithmic if they span a decade or more.
    """
    from matplotlib.ticker import EngFormatter, LogLocator
    from matplotlib.transforms import ScaledTranslation

    methods = _scored(comparison)
    if not any(cost(method) for _, method in methods):
        return None
    figure, (ax,) = _figure()
    scale = _scale(comparison.head[1])
    costs = [x for _, method in methods if (x := cost(method))]
    drawn: list[float] = []
    for i, method in methods:
        score, x = method.scores[comparison.head], cost(method)
        y, colour = scale * score.mean, INK if method.base else _colour(i)
        if not x:
            # the frozen base has no cost, whatever is recorded
            known = "0" if x == 0 or method.base else "not recorded"
            ax.axhline(y, color=colour, ls=":", lw=1.5, label=_text(f"{method.label} ({known})"))
            continue
        ends = None
        if score.interval:
            # a percentile interval need not contain the mean
            ends = [[max(y - scale * score.interval[0], 0)], [max(scale * score.interval[1] - y, 0)]]
        bar = ax.errorbar(
            [x], [y], yerr=ends, fmt=_marker(i), ms=7, capsize=3, color=colour, label=_text(method.label)
        )
        # equal costs are drawn side by side, shifted after drawing so that the axis limits do not change
        aside = BESIDE * (drawn.count(x) - (costs.count(x) - 1) / 2)
        drawn.append(x)
        for artist in bar.get_children() if aside else ():
            artist.set_transform(ax.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans))
    # labels would overlap on less than a decade of a logarithmic axis, or with labels at all of its ticks
    if log and max(costs) >= 10 * min(costs):
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.xaxis.set_minor_formatter(EngFormatter(sep=""))
    if log:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(label)
    ax.set_ylabel(_name(comparison.head))
    _legend(figure, ax)
    return figure


def _legend(figure: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside right center", fontsize=9)


def _curves(comparison: Comparison) -> Figure | None:
    """Draw training loss and validation score against steps: the mean over seeds, and each seed as a thin line."""
    measure = comparison.head[1]
    methods = [(i, method) for i, method in _scored(comparison) if not method.base]
    columns = [
        ("train/loss", "training loss", 1.0),
        (f"val/{measure}", _text(f"validation {measure.replace('_', ' ')}{_unit(measure)}"), _scale(measure)),
    ]
    curves = {
        (column, i): [[(x, by * y) for x, y in points] for run in method.runs if (points := run.learning_curve(column))]
        for column, _, by in columns for i, method in methods
    }  # fmt: skip
    shown = [(column, name) for column, name, _ in columns if any(curves[column, i] for i, _ in methods)]
    if not shown:
        return None
    figure, axes = _figure(width=8.5, height=3.4, columns=len(shown))
    for ax, (column, name) in zip(axes, shown, strict=True):
        for i, method in methods:
            _curve(ax, curves[column, i], _text(method.label), i)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(name)
    _legend(figure, axes[0])
    return figure


def _curve(ax: Axes, curves: Sequence[Sequence[tuple[int, float]]], label: str, i: int) -> None:
    if not curves:
        return
    for points in curves if len(curves) > 1 else ():
        dot = "." if len(points) == 1 else None  # a line through one point is invisible
        ax.plot(*zip(*points, strict=True), color=_colour(i), lw=0.8, marker=dot, alpha=0.35)
    steps = sorted(set.intersection(*({step for step, _ in points} for points in curves)))
    if not steps:
        return
    mean = [float(np.mean([dict(points)[step] for points in curves])) for step in steps]
    marker = _marker(i) if len(steps) < 12 else None
    size = 4 if len(steps) > 1 else 7
    ax.plot(steps, mean, color=_colour(i), ls=_line_style(i), lw=2, marker=marker, ms=size, label=label)


def _history(study: Study) -> Figure | None:
    """Draw each trial's score by its number, and the best so far."""
    if not any(map(study.complete, study.trials)):
        return None
    figure, (ax,) = _figure()
    pick: Any = np.maximum if study.maximize else np.minimum
    scale = _scale(study.measure)
    for i, method in enumerate(study.trials):
        complete = study.complete(method)
        if not complete:
            continue
        numbers, values = [t.number for t in complete], [scale * t.value for t in complete]
        ax.plot(numbers, values, _marker(i), color=_colour(i), ms=5, alpha=0.6)
        ax.step(
            numbers, pick.accumulate(values), where="post", color=_colour(i), ls=_line_style(i), label=_text(method)
        )  # fmt: skip
    ax.set_xlabel("trial (line: the best so far)")
    ax.set_ylabel(_text(monitored(study)))
    locator: Any = ax.xaxis.get_major_locator()
    locator.set_params(integer=True)
    _legend(figure, ax)
    return figure


def _importance(study: Study) -> Figure | None:
    """Draw the importance of each parameter, one panel per method."""
    known = {method: shares for method, shares in study.importance.items() if shares}
    if not known:
        return None
    most = max(len(shares) for shares in known.values())
    figure, axes = _figure(width=min(4.2 * len(known), 12), height=1.2 + 0.35 * most, columns=len(known))
    for i, (ax, (method, shares)) in enumerate(zip(axes, known.items(), strict=True)):
        names = sorted(shares, key=lambda name: shares[name])
        ax.barh(range(len(names)), [shares[name] for name in names], color=_colour(i), height=0.6)
        ax.set_yticks(range(len(names)), [_text(name) for name in names])
        ax.set_xlim(0, 1)
        ax.set_title(f"{_text(method)}, {study.states(method)}", fontsize=10)
        ax.set_xlabel("importance (PED-ANOVA)")
        ax.grid(axis="y", visible=False)
    return figure
