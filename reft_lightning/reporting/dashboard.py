"""``reft-dashboard FOLDER...``: a saved workspace and a report page in W&B, for runs that were logged there.

A dashboard is first described by plain values: ``{"LinePlot": {...}}`` stands for the class of ``wandb_workspaces``
with these arguments. The description is written to a file, and sent if there is a key.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.identity import used_settings
from ..runs.wandb_key import has_key
from ..storage.atomic import write_text
from ..storage.reading import read_json
from ..suggest import needs_extra
from ..terminal.lines import say
from .build import Report, build_report
from .comparisons import lower_is_better
from .page import markdown
from .runs import Run

STEP = "trainer/global_step"
OWNED = ("Workspace", "Report", "Runset")  # classes that take entity and project
FILE, SENT = "dashboard.json", ("workspace", "report")
Panel = dict[str, Any]


def main(
    folders: Sequence[Path],
    out: Path = Path("dashboard"),
    entity: str | None = None,
    project: str | None = None,
) -> list[str]:
    """Write the description of a dashboard of some runs to a folder, and send it if there is a key.

    ``folders`` may be a single file that an earlier call wrote. Entity and project default to those of the runs. Return
    the addresses of the workspace and the report, if they were sent.

    Raises:
        ValueError: if there is nothing to show.
    """
    if len(folders) == 1 and folders[0].suffix == ".json":
        path = folders[0]
        spec = read_json(path) | {k: v for k, v in (("entity", entity), ("project", project)) if v}
    else:
        path = out / FILE
        spec = dashboard(build_report(folders), entity, project)
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(spec, indent=1) + "\n")
    console = Console()
    if os.environ.get("WANDB_MODE", "online") != "online" or not has_key():
        command = shlex.join(["reft-dashboard", str(path)])
        say(console, f"{path}: a workspace and a report, not sent, as W&B is offline or has no key here")
        say(
            console,
            f"upload the runs with wandb sync FOLDER/**/wandb/offline-run-*, then send both with: {command}",
        )
        return []
    sent = send(spec)
    for what, address in zip(SENT, sent, strict=True):
        say(console, f"{what}: {address}")
    return sent


def dashboard(report: Report, entity: str | None = None, project: str | None = None) -> dict[str, Any]:
    """Return the description of a dashboard: entity, project, workspace, report."""
    entries = [run.config for run in report.runs]
    entity = entity or _commonest(config.get("logger.wandb.entity") for config in entries)
    project = project or _commonest(config.get("logger.wandb.project") for config in entries)
    ids = sorted(str(run.results["wandb_run"]) for run in report.runs if run.results.get("wandb_run"))
    groups = sorted(study.folder.resolve().name for study in report.studies)
    if not ids and not groups:
        raise ValueError("none of these runs was logged to W&B: train with logger=wandb")
    filters = " or ".join(
        f"Metric({what!r}) in {values!r}" for what, values in (("ID", ids), ("Group", groups)) if values
    )
    sections, score = _sections(report)
    name = ", ".join(folder.resolve().name for folder in report.folders)[:100]
    columns = [f"summary:{column}" for column in (score, "trainable_parameters", "best_step", "status")]
    workspace = {
        "name": name,
        "sections": [
            {"Section": {"name": title, "panels": panels, "is_open": True}} for title, panels in sections.items()
        ],
        "settings": {"WorkspaceSettings": {"x_axis": STEP, "group_by_prefix": "first", "max_runs": 100}},
        "runset_settings": {"RunsetSettings": {"filters": filters, "pinned_columns": columns}},
    }  # fmt: skip
    runs = {"Runset": {"name": name, "filters": filters}}
    blocks: list[Any] = [{"TableOfContents": {}}, {"MarkdownBlock": {"text": markdown(report)}}]
    for title, panels in sections.items():
        blocks += [{"H2": {"text": title}}, {"PanelGrid": {"runsets": [runs], "panels": panels}}]
    page = {"title": name, "blocks": blocks, "width": "fluid"}
    sent = {"workspace": {"Workspace": workspace}, "report": {"Report": page}}
    return {"entity": entity, "project": project or "reft_lightning", **sent}


def _commonest(values: Iterable[Any]) -> Any:
    return next((value for value, _ in Counter(v for v in values if v).most_common(1)), None)


# --- panels -----------------------------------------------------------------------------------------------------


def _sections(report: Report) -> tuple[dict[str, list[Panel]], str]:
    """Return title -> panels, and the name of the deciding score as a W&B column."""
    metrics = {name for run in report.runs for name in run.results["metrics"]}
    monitor = _commonest(
        [*(run.results.get("monitor") for run in report.runs), *(s.monitor for s in report.studies)]
    )
    measure = str(monitor).rpartition("/")[2]
    tested, fewer = f"test/{measure}", lower_is_better(measure)
    validated = f"{monitor}.{'min' if fewer else 'max'}"  # of the summary: the best of all validations
    score = tested if tested in metrics else validated
    split = "test" if tested in metrics else "val"
    of_tasks = sorted(name for name in metrics if name.startswith("test/") and name.count("/") > 1)
    of_tasks = [name for name in of_tasks if name.endswith(f"/{measure}")]
    title = f"{score}, mean and deviation over runs"
    scores = [_panel("BarPlot", title=title, metrics=[score], **_by_method("stddev"))]
    if f"base/{tested}" in metrics:
        scores.append(_panel("BarPlot", title="adapter and frozen base", metrics=[tested, f"base/{tested}"]))
    if len(of_tasks) > 1:
        scores.append(_panel("BarPlot", title="by task", metrics=of_tasks, **_by_method("stddev")))
    if len({run.results.get("trainable_parameters") for run in report.runs}) > 1 or report.studies:
        x, y = _summary("trainable_parameters"), _summary(score)
        scores.append(_panel("ScatterPlot", title=f"{score} and parameters", x=x, y=y, log_x=True))
    found = {
        "Scores": scores,
        "Learning curves by method": [
            _panel("LinePlot", title=name, x=STEP, y=[name], **_by_method("stderr"))
            for name in dict.fromkeys((str(monitor), "val/loss", "train/loss"))
        ],
        "Predictions": [_panel("WeavePanelSummaryTable", table_name=f"{split}/predictions", width=24, height=12)],
        "Time and memory": [
            *(_panel("LinePlot", title=name, x=STEP, y=[name])
              for name in ("train/tokens_per_second", "progress/tokens")),
            _panel("LinePlot", title="progress/lr", x=STEP, metric_regex="progress/lr/.*"),  # of each role there is
            _panel("BarPlot", title="seconds of training", metrics=["train_seconds"], **_by_method("stddev")),
        ],
    }  # fmt: skip
    # trials are compared by validation, as they have no test rows
    if sweep := _sweep(report, validated if report.studies else score, fewer):
        found = {"Scores": found.pop("Scores"), "What the sweep varied": sweep, **found}
    return found, score


def _sweep(report: Report, score: str, fewer: bool) -> list[Panel]:
    """Return the panels of the settings that differ between runs, or that studies searched."""
    varied = varied_settings(report.runs)
    trials = (trial for study in report.studies for of_method in study.trials.values() for trial in of_method)
    for name, value in (item for trial in trials for item in trial.params.items()):
        varied.setdefault(name, []).append(value)
    if set(varied) <= {"method"}:
        return []

    def column(**arguments: Any) -> Panel:
        return {"ParallelCoordinatesPlotColumn": arguments}

    columns = [
        *(column(metric=_config(name), log=_spans_decades(values)) for name, values in varied.items()),
        column(metric=_summary(score), inverted=fewer),
    ]
    return [
        _panel("ParallelCoordinatesPlot", title="runs", columns=columns, width=24, height=10),
        _panel("ParameterImportancePlot", with_respect_to=score, width=12),
        _panel("RunComparer", diff_only="split", width=12),
    ]


def varied_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return key of W&B's configuration -> values, for the settings that differ between runs, except seeds."""
    settings = [used_settings(run.settings) for run in runs]
    keys = sorted({key for one in settings for key in one})
    found = {key: [one.get(key) for one in settings] for key in keys}
    return {
        "method" if key == "intervention.method" else key: values for key, values in found.items()
        if len({json.dumps(value, default=str) for value in values}) > 1
    }  # fmt: skip


def _spans_decades(values: Sequence[Any]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return bool(numbers) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def _panel(kind: str, width: int = 8, height: int = 6, **arguments: Any) -> Panel:
    return {kind: {**arguments, "layout": {"Layout": {"w": width, "h": height}}}}


def _summary(name: str) -> dict[str, Any]:
    return {"SummaryMetric": {"name": name}}


def _config(name: str) -> dict[str, Any]:
    return {"Config": {"name": name}}


def _by_method(range_: str) -> dict[str, Any]:
    return {"groupby": _config("method"), "groupby_aggfunc": "mean", "groupby_rangefunc": range_}


# --- sending ----------------------------------------------------------------------------------------------------


def send(spec: Mapping[str, Any]) -> list[str]:
    """Save a new workspace and a new report in W&B; return their addresses."""
    import wandb

    entity = spec["entity"] or wandb.Api().default_entity
    owner = {"entity": entity, "project": spec["project"]}
    return [one.save().url for one in [build(spec[what], owner) for what in SENT]]


def build(value: Any, owner: Mapping[str, Any]) -> Any:
    """Return the ``wandb_workspaces`` objects described by a value, owned by an entity's project."""
    classes = _classes()
    if isinstance(value, list):
        return [build(item, owner) for item in value]
    if isinstance(value, Mapping):
        arguments = {key: build(item, owner) for key, item in value.items()}
        name = next(iter(arguments), None)
        if len(arguments) != 1 or name not in classes:
            return arguments
        return classes[name](**(owner if name in OWNED else {}), **arguments[name])
    return value


def _classes() -> dict[str, Any]:
    with needs_extra("dashboard", "sending a dashboard needs wandb-workspaces"):
        import wandb_workspaces.reports.v2 as pages
        import wandb_workspaces.workspaces as workspaces
    own = ("Workspace", "Section", "WorkspaceSettings", "RunsetSettings")
    named = {name: getattr(workspaces, name) for name in own}
    others = (
        "BarPlot", "Config", "H2", "Layout", "LinePlot", "MarkdownBlock", "PanelGrid", "ParallelCoordinatesPlot",
        "ParallelCoordinatesPlotColumn", "ParameterImportancePlot", "Report", "RunComparer", "Runset", "ScatterPlot",
        "SummaryMetric", "TableOfContents", "WeavePanelSummaryTable",
    )  # fmt: skip
    return named | {name: getattr(pages, name) for name in others}
