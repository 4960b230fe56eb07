"""``reft-report FOLDER [FOLDER ...]``: write tables, plots and the page, and print a summary."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from ..runs.wandb_key import check_home
from ..storage.atomic import write_text, write_whole
from ..suggest import needs_extra
from ..terminal.bars import Bar
from ..terminal.lines import plain_console, say
from . import plots, records, tables
from .build import Report, build_report
from .evidence import RESAMPLES
from .page import latex, markdown, page

FEWEST = 1000  # resamples, of which 25 are beyond each end of an interval
PLOT = re.compile(r"\d{2,}_[A-Za-z0-9_-]+\.(svg|png)")
FILES = {
    "report.html": "everything, one file that opens without a network",
    "report.md": "tables for GitHub",
    "report.tex": "tables for LaTeX, with booktabs",
    "scores.csv": "one line per method, task and measure, in fractions",
    "pairs.csv": "one line per pair of methods",
}


def main(
    folders: Sequence[Path],
    out: Path = Path("report"),
    split: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    wandb: bool = False,
    project: str = "reft_lightning",
    console: Console | None = None,
) -> Report:
    """Build a report (:func:`.build_report`), write it to a folder and print it; with ``wandb``, also log it to W&B.

    Raises:
        ValueError: if there is nothing to report, or a package is missing.
    """
    if resamples < FEWEST:
        raise ValueError(
            f"resamples must be at least {FEWEST}, as fewer give unstable intervals; got {resamples}"
        )
    with needs_extra("report", "a report needs matplotlib and scipy"):
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder; {out} is a file")
    if wandb:
        check_home()
    report = build_report(folders, split, resamples, seed)
    html = write(report, out)
    console = console or plain_console(140)
    print_report(report, console)
    if wandb:
        log_to_wandb(report, html, out, project)
    for name, what in FILES.items():
        console.print(f"{escape(str(out / name))}  [dim]{what}[/dim]", soft_wrap=True, highlight=False)
    where = (out / "report.html").resolve().as_uri()
    say(console, f"open in a browser: {where}")
    return report


def write(report: Report, out: Path) -> str:
    """Write all files of a report, replacing those of an earlier one; return the page."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for path in (out / "plots").iterdir():
        if PLOT.fullmatch(path.name):  # an earlier report may have used other names
            path.unlink()
    figures = {}
    with Bar("drawing plots", len(report.comparisons) + len(report.studies)) as bar:
        for comparison in report.comparisons:
            figures[comparison.title] = plots.comparison_plots(comparison)
            bar.advance()
        for study in report.studies:
            figures[str(study.folder)] = plots.study_plots(study)
            bar.advance()
    names = _file_names(figures)
    for title, some in figures.items():
        for name, drawn in some.items():
            path = out / "plots" / f"{names[title]}_{name}"
            write_text(path.with_suffix(".svg"), drawn.svg)
            write_whole(path.with_suffix(".png"), partial(Path.write_bytes, data=drawn.png))
    html = page(report, figures)
    write_text(out / "report.html", html)
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.tex", latex(report.comparisons))
    records.write_csv(out / "scores.csv", records.records(report.comparisons), records.CSV_COLUMNS)
    records.write_csv(out / "pairs.csv", records.pair_records(report.comparisons), records.PAIR_COLUMNS)
    return html


def _file_names(titles: Iterable[str]) -> dict[str, str]:
    """Return a safe file name for each title; they are numbered, as two titles may give the same name."""
    plain = {title: re.sub(r"[^A-Za-z0-9]+", "-", title.rpartition("/")[2]).strip("-") for title in titles}
    return {title: f"{i:02d}_{name[:60].strip('-')}" for i, (title, name) in enumerate(plain.items(), 1)}


def print_report(report: Report, console: Console) -> None:
    """Print scores, budgets, notes and the folders left out."""
    tell = partial(say, console)
    for comparison in report.comparisons:
        table = tables.score_table(comparison)
        shown = RichTable()
        tell(comparison.title, "bold")
        for i, name in enumerate(table.columns):
            shown.add_column(escape(name), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in row))
        console.print(shown)
        for note in table.notes:
            tell(note)
        for line in comparison.unequal:
            tell(line, "bold yellow")
        for line in (tables.verdict(comparison), *comparison.notes):
            tell(line)
        console.print()
    for study in report.studies:
        said = ", ".join(
            f"{method} {tables.number(best.value, study.measure)} (trial {best.number})"
            for method in study.trials if (best := study.best(method))
        )  # fmt: skip
        tell(f"study {study.folder}: best {tables.monitored(study)}: {said}; {study.budget}")
        for note in tables.study_table(study).notes:
            tell(note)
    for note in tables.read_table(report.reads).notes:
        tell(note, "bold yellow")
    for item in report.left:
        tell(f"left out: {item.folder}: {item.reason}")


def log_to_wandb(report: Report, html: str, out: Path, project: str) -> None:
    """Log scores and pairs as W&B tables, and the page, in a separate W&B run."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or "offline"
    run = wandb.init(project=project, job_type="report", dir=str(out), mode=mode, name=out.name)
    for name, lines, columns in (
        ("scores", records.records(report.comparisons), records.CSV_COLUMNS),
        ("pairs", records.pair_records(report.comparisons), records.PAIR_COLUMNS),
    ):
        rows: Any = [[line[column] for column in columns] for line in lines]
        run.log({name: wandb.Table(columns=list(columns), data=rows)})
    run.log({"report": wandb.Html(html, inject=False)})
    run.finish()
