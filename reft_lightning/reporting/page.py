"""A report as one HTML file: styles, plots and the few lines of script are inside; nothing is fetched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import plots, tables
from .build import Report
from .comparisons import Comparison
from .plots import Drawn
from .runs import Run
from .studies import ENOUGH, Study
from .tables import Cell, Table

# The browser itself is told to fetch nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

LONG = 60  # characters, beyond which a cell has several lines
WIDE = ("learning_curves", "parameter_importance")  # plots of several panels

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff;
  --panel: #f6f8fa; --accent: #0072b2; --warn: #8a4600; --warn-paper: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4b0; --line: #3a424c; --paper: #12161b;
  --panel: #1b2128; --accent: #6cb8ee; --warn: #ffb77c; --warn-paper: #33230f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 72ch; } p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .92rem; }
a { color: var(--accent); }
nav { margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .92rem; }
.scroll { overflow-x: auto; margin: .4rem 0 .8rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 22rem; }
thead th { border-bottom: 2px solid var(--line); cursor: pointer; user-select: none; font-weight: 600; }
thead th[aria-sort=ascending]::after { content: " \\2191"; }
thead th[aria-sort=descending]::after { content: " \\2193"; }
tbody tr:hover { background: var(--panel); } td.best { font-weight: 700; }
.warn { background: var(--warn-paper); color: var(--warn); border-left: 4px solid var(--warn); padding: .5rem .9rem;
  margin: .7rem 0; max-width: 76ch; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: .5rem 1.5rem; }
figure { margin: .6rem 0; } .wide { grid-column: 1 / -1; } figcaption { color: var(--soft); font-size: .9rem; }
figure svg { max-width: 100%; height: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { nav { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("thead th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], i = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[i].dataset.value ?? row.cells[i].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)], [n, m] = [parseFloat(x), parseFloat(y)];
      if (a.cells[i].dataset.value !== undefined && b.cells[i].dataset.value !== undefined) return n - m;
      return String(x).localeCompare(String(y), undefined, {numeric: true});
    };
    [...body.rows].sort((a, b) => (up ? 1 : -1) * order(a, b)).forEach((row) => body.append(row));
  });
}
"""

CAPTIONS = {
    "intervals": "Scores: mean (marker), each seed (|), 95 % interval over rows and seeds (line).",
    "score_parameters": "Score against trained parameters, those of heads included; dotted: none, or not recorded.",
    "score_seconds": "Score against seconds of training; dotted: none, or not recorded.",
    "learning_curves": "Learning curves, of what was logged while training: mean over seeds, each seed thin.",
    "search_history": "Search history: each complete trial, and the best so far.",
    "parameter_importance": "Importance (PED-ANOVA) of each searched parameter for being among the best trials, of "
    f"methods with {ENOUGH} complete trials and two parameters or more. Shares always add up to 1, those of noise too: "
    "they say which parameter deserves the next trials, not that it matters.",
}


def page(report: Report, figures: Mapping[str, Mapping[str, Drawn]]) -> str:
    """Return the HTML file.

    Args:
        report: what is said.
        figures: title of a comparison, or folder of a study -> name -> plot.
    """
    sections: list[tuple[str, str, str]] = [("summary", "Summary", _summary(report))]
    for i, comparison in enumerate(report.comparisons, 1):
        body = _comparison(comparison, figures.get(comparison.title, {}), f"c{i}-")
        sections.append((f"comparison-{i}", comparison.title, body))
    for i, study in enumerate(report.studies, 1):
        body = _study(study, figures.get(str(study.folder), {}), f"s{i}-")
        sections.append((f"study-{i}", f"Study {study.folder.name}", body))
    reads = tables.read_table(report.reads, report.folders)
    sections.append(("reads", "Test reads", _reads(reads)))
    if report.left:
        sections.append(("left-out", "Left out", _table(tables.left_table(report.left), text=True)))
    sections.append(("configurations", "Configurations", _configurations(report.comparisons, report.folders)))
    sections.append(("versions", "Versions", _versions(report.runs)))
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{text}</section>\n' for key, name, text in sections
    )
    folders = ", ".join(map(str, report.folders))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>reft-report</title><style>{STYLE}</style></head><body>\n"
        f'<h1>Report of {len(report.runs)} runs</h1><p class="soft">{escape(folders)}</p><nav>{links}</nav>\n'
        f"{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _summary(report: Report) -> str:
    parts = []
    if len(report.comparisons) > 1:
        parts.append(
            f"<p>The runs make {len(report.comparisons)} comparisons: runs of other models, data, rows or splits never "
            "share a table.</p>"
        )
    items = []
    for i, comparison in enumerate(report.comparisons, 1):
        link = f'<a href="#comparison-{i}">{escape(comparison.title)}</a>'
        items.append(f"<li>{link}<br>{escape(tables.verdict(comparison))}{_warn(comparison.unequal)}</li>")
    parts.append(f"<ul>{''.join(items)}</ul>" if items else "<p>No run was scored.</p>")
    again = len(tables.repeated(report.reads))
    parts.append(_warn([f"reads of a test split that repeat an earlier one: {again}"] if again else []))
    parts.append(
        _warn([f"study {s.folder.name}: {s.budget}" for s in report.studies if s.running or not s.equal])
    )
    if report.left:
        parts.append(f'<p><a href="#left-out">Folders that are left out: {len(report.left)}</a></p>')
    parts.append(
        f'<p class="soft">Intervals: 95 %, bootstrap of rows and seeds, {report.resamples:,} resamples (seed '
        f"{report.seed}): of several seeds Student's t by its error, never narrower than over the seeds "
        "alone, of one seed its percentiles. p-values are two-sided, over rows and seeds, adjusted by Holm over all "
        "pairs of methods.</p>"
    )
    return "".join(parts)


def _comparison(comparison: Comparison, figures: Mapping[str, Drawn], prefix: str) -> str:
    parts = [
        f"<p>{escape(tables.verdict(comparison))}</p>",
        _warn(comparison.unequal),
        _facts(comparison.facts),
    ]
    parts += [_notes(comparison.notes), "<h3>Tables</h3>"]
    parts += [_table(tables.score_table(comparison)), _table(tables.cost_table(comparison), notes=False)]
    parts.append(
        f"<details><summary>All measures, by seed</summary>{_table(tables.measure_table(comparison))}</details>"
    )
    if figures:
        parts += ["<h3>Plots</h3>", _figures(figures, prefix)]
    if comparison.pairs:
        parts += ["<h3>Significance</h3>", _table(tables.pair_table(comparison, [comparison.head]))]
        others = [column for column in comparison.columns if column != comparison.head]
        if others:
            pairs = _table(tables.pair_table(comparison, others), notes=False)
            parts.append(f"<details><summary>Pairs on every task</summary>{pairs}</details>")
    return "".join(parts)


def _study(study: Study, figures: Mapping[str, Drawn], prefix: str) -> str:
    parts = [f'<p class="soft">{escape(str(study.folder))}</p>']
    if study.budget:
        well = study.equal and not study.running
        parts.append(f"<p>{escape(study.budget)}</p>" if well else _warn([study.budget]))
    parts.append(_table(tables.study_table(study), text=True))
    return "".join([*parts, _figures(figures, prefix)])


def _reads(table: Table) -> str:
    if not table.rows:
        return "<p>No run read a test split.</p>"
    return f"{_warn(table.notes)}{_table(table, text=True, notes=False)}"


def _table(table: Table, text: bool = False, notes: bool = True) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    said = "".join(f'<p class="soft">{escape(note)}</p>' for note in table.notes) if notes else ""
    kind = ' class="text"' if text else ""
    return (
        f'<p class="soft">{escape(table.title)}</p><div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{said}"
    )


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.10g}"'
    kinds = " ".join(name for name, holds in (("best", cell.best), ("long", len(cell.text) > LONG)) if holds)
    kind = f' class="{kinds}"' if kinds else ""
    return f"<td{value}{kind}>{escape(cell.text)}</td>"


def _figures(figures: Mapping[str, Drawn], prefix: str) -> str:
    return (
        f'<div class="plots">{"".join(_figure(name, drawn, prefix) for name, drawn in figures.items())}</div>'
    )


def _figure(name: str, drawn: Drawn, prefix: str) -> str:
    caption = escape(CAPTIONS[name])
    picture = plots.inline(drawn.svg, f"{prefix}{name}-", caption)
    kind = ' class="wide"' if name in WIDE else ""
    return f"<figure{kind}>{picture}<figcaption>{caption}</figcaption></figure>"


def _warn(lines: Iterable[str]) -> str:
    return "".join(f'<p class="warn" role="note">⚠ {escape(line)}</p>' for line in lines)


def _notes(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="soft">{items}</ul>' if items else ""


def _facts(facts: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in facts.items())}</dl>"


def _configurations(comparisons: Iterable[Comparison], roots: Sequence[Path]) -> str:
    parts = []
    for comparison in comparisons:
        parts.append(f"<h3>{escape(comparison.title)}</h3>")
        for method in comparison.methods:
            if method.base:
                continue
            settings = "\n".join(
                f"{key}: {value}" for key, value in sorted(method.runs[0].used_settings.items())
            )
            named = zip(method.runs, tables.places([run.folder for run in method.runs], roots), strict=True)
            folders = "".join(f"<li>seed {run.seed}: {escape(place)}</li>" for run, place in named)
            parts.append(
                f"<details><summary>{escape(method.label)}</summary><ul>{folders}</ul>"
                f"<pre>{escape(settings)}</pre></details>"
            )
    return "".join(parts) or "<p>None.</p>"


def _versions(runs: Iterable[Run]) -> str:
    by_versions: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for run in runs:
        facts = {"git commit": run.results.get("git_commit"), "device": run.results.get("device")}
        facts |= run.results.get("versions") or {}
        by_versions[tuple((name, str(value)) for name, value in facts.items())].append(run)
    return "".join(
        f"<p>{len(group)} runs</p>{_facts(dict(versions))}" for versions, group in by_versions.items()
    )
