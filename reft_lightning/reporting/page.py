"""A report as one HTML page, as Markdown and as LaTeX, from the templates next to this file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from . import plots, tables
from .build import Report
from .comparisons import Comparison
from .plots import Drawn
from .runs import Run
from .studies import ENOUGH

LONG = 60  # characters; a longer cell wraps
WIDE = ("learning_curves", "parameter_importance")  # plots with several panels

CAPTIONS = {
    "intervals": "Scores: mean (marker), each seed (|), 95 % interval over rows and seeds (line).",
    "score_parameters": "Score against trained parameters, including those of heads; dotted: none, or not recorded.",
    "score_seconds": "Score against training time in seconds; dotted: none, or not recorded.",
    "learning_curves": "Learning curves as logged during training: mean over seeds; thin lines: single seeds.",
    "search_history": "Search history: each complete trial, and the best so far.",
    "parameter_importance": "Importance (PED-ANOVA) of each searched parameter for being among the best trials, for "
    f"methods with at least {ENOUGH} complete trials and two parameters. Shares always add up to 1, even for noise: "
    "they show which parameter deserves the next trials, not that it matters.",
}


def markdown(report: Report) -> str:
    """Return the report in GitHub's Markdown, without plots."""
    return _environment().get_template("report.md.j2").render(report=report, tables=tables).rstrip() + "\n"


def latex(comparisons: Sequence[Comparison]) -> str:
    """Return the tables of comparisons for booktabs, scores times 100."""
    return _environment().get_template("report.tex.j2").render(comparisons=comparisons, tables=tables)


def page(report: Report, figures: Mapping[str, Mapping[str, Drawn]]) -> str:
    """Return the HTML file; ``figures`` holds the plots by the title of a comparison or the folder of a study."""
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report, figures=figures, versions=_versions(report.runs), tables=tables, picture=plots.inline,
        CAPTIONS=CAPTIONS, LONG=LONG, WIDE=WIDE,
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), undefined=StrictUndefined,
        autoescape=select_autoescape([".html.j2"]), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"md": _md, "tex": _tex, "tex_cell": _tex_cell}
    return environment


def _md(text: str) -> str:
    for character in "\\|*`<":
        text = text.replace(character, f"\\{character}")
    return text.replace("](", "]\\(").replace("\n", " ")


def _tex(text: str) -> str:
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
             "−": "$-$", "†": r"$\dagger$", "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}"}  # fmt: skip
    return "".join(names.get(c, f"\\{c}" if c in "&%$#_{}" else " " if c == "\n" else c) for c in text)


def _tex_cell(cell: tables.Cell) -> str:
    text = _tex(cell.text)
    if cell.value is not None:
        text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)
    return rf"\textbf{{{text}}}" if cell.best else text


def _versions(runs: Iterable[Run]) -> list[tuple[dict[str, Any], int]]:
    """Return commit, device and package versions, with the number of runs that have them."""
    found: Counter[tuple[tuple[str, str], ...]] = Counter()
    for run in runs:
        facts = {"git commit": run.results.get("git_commit"), "device": run.results.get("device")}
        facts |= run.results.get("versions") or {}
        found[tuple((name, str(value)) for name, value in facts.items())] += 1
    return [(dict(facts), count) for facts, count in found.items()]
