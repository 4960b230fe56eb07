"""The contents of a dashboard, and that W&B's own library sends and reads it, with a local server."""

import json
import os
import subprocess
import sys

import pytest
from invented_runs import invented_trial, report, right, write_run
from wandb_server import serving

from reft_lightning import cli
from reft_lightning.reporting import dashboard
from reft_lightning.reporting.build import Report
from reft_lightning.reporting.studies import Study


def write_logged(folder, method="loreft", seed=42, score=0.5, **values):
    metrics = {"test/accuracy": score, **values.pop("metrics", {})}
    found = {"metrics": metrics, "wandb_run": folder.name, "scores": {"boolq": right(score)}} | values
    return write_run(folder, method, seed, **found)


def sections(spec):
    """Return title -> [(kind, arguments)] of a workspace."""
    found = {}
    for section in spec["workspace"]["Workspace"]["sections"]:
        title, panels = section["Section"]["name"], section["Section"]["panels"]
        found[title] = [item for panel in panels for item in panel.items()]
    return found


def kinds(spec, title):
    return [kind for kind, _ in sections(spec)[title]]


def filters(spec):
    return spec["workspace"]["Workspace"]["runset_settings"]["RunsetSettings"]["filters"]


@pytest.fixture
def two_methods(tmp_path):
    for method, score, trained in (("loreft", 0.75, 4000), ("red", 0.5, 900)):
        for seed in (42, 43):
            folder = tmp_path / "runs" / f"{method}{seed}"
            write_logged(folder, method, seed, score, trainable_parameters=trained)
    return tmp_path / "runs"


def test_methods_are_compared_by_score_parameters_and_learning_curves(two_methods):
    spec = dashboard.dashboard(report(two_methods))
    assert list(sections(spec)) == ["Scores", "Learning curves by method", "Predictions", "Time and memory"]
    bars, scatter = sections(spec)["Scores"]
    assert (bars[0], bars[1]["metrics"]) == ("BarPlot", ["test/accuracy"])
    assert scatter[0] == "ScatterPlot"
    assert scatter[1]["x"] == {"SummaryMetric": {"name": "trainable_parameters"}}
    assert scatter[1]["y"] == {"SummaryMetric": {"name": "test/accuracy"}}
    for _, curve in sections(spec)["Learning curves by method"]:
        assert (curve["x"], curve["groupby"]) == ("trainer/global_step", {"Config": {"name": "method"}})
    rates = [given for _, given in sections(spec)["Time and memory"] if given["title"] == "progress/lr"]
    # bias has no weights, none only a head
    assert [given["metric_regex"] for given in rates] == ["progress/lr/.*"]
    ((_, table),) = sections(spec)["Predictions"]
    assert table["table_name"] == "test/predictions"
    assert filters(spec) == "Metric('ID') in ['loreft42', 'loreft43', 'red42', 'red43']"


def test_the_report_page_has_the_tables_and_the_same_panels(two_methods):
    spec = dashboard.dashboard(report(two_methods))
    blocks = [item for block in spec["report"]["Report"]["blocks"] for item in block.items()]
    ((_, text),) = [item for item in blocks if item[0] == "MarkdownBlock"]
    assert "| loreft" in text["text"]
    grids = [given["panels"] for kind, given in blocks if kind == "PanelGrid"]
    assert grids == [[{kind: given} for kind, given in panels] for panels in sections(spec).values()]


def test_a_single_run_is_set_next_to_its_base(tmp_path):
    folder = write_logged(tmp_path / "one", metrics={"base/test/accuracy": 0.3})
    spec = dashboard.dashboard(report(folder))
    assert kinds(spec, "Scores") == ["BarPlot", "BarPlot"]
    assert sections(spec)["Scores"][1][1]["metrics"] == ["test/accuracy", "base/test/accuracy"]
    assert "What the sweep varied" not in sections(spec)


def test_a_sweep_has_parallel_coordinates_of_what_it_varied(tmp_path):
    for i, (lr, rank) in enumerate([(1e-4, 4), (1e-3, 8), (1e-2, 4)]):
        settings = {"optimizer.lr": lr, "intervention.rank": rank}
        write_logged(tmp_path / "sweep" / f"run{i}", seed=i, score=0.4 + i / 10, settings=settings)
    spec = dashboard.dashboard(report(tmp_path / "sweep"))
    plot = sections(spec)["What the sweep varied"][0][1]
    columns = [column["ParallelCoordinatesPlotColumn"] for column in plot["columns"]]
    assert [column["metric"] for column in columns] == [
        {"Config": {"name": "intervention.rank"}},
        {"Config": {"name": "optimizer.lr"}},
        {"SummaryMetric": {"name": "test/accuracy"}},
    ]
    assert [column.get("log") for column in columns] == [False, True, None]


def test_a_study_shows_its_trials_by_validation(tmp_path):
    (tmp_path / "study").mkdir()
    trials = [invented_trial(0.5, **{"optimizer.lr": rate}) for rate in (1e-4, 1e-2)]
    study = Study(tmp_path / "study", monitor="val/accuracy", trials={"loreft": trials})
    spec = dashboard.dashboard(Report([study.folder], [], [], studies=[study]), project="mine")
    assert filters(spec) == "Metric('Group') in ['study']"
    columns = sections(spec)["What the sweep varied"][0][1]["columns"]
    names = [column["ParallelCoordinatesPlotColumn"]["metric"] for column in columns]
    assert names == [{"Config": {"name": "optimizer.lr"}}, {"SummaryMetric": {"name": "val/accuracy.max"}}]
    assert spec["project"] == "mine"


def test_entity_and_project_are_those_that_the_runs_were_logged_to(tmp_path):
    settings = {"logger": {"wandb": {"project": "mine", "entity": "team"}}}
    spec = dashboard.dashboard(report(write_logged(tmp_path / "one", settings=settings)))
    assert (spec["entity"], spec["project"]) == ("team", "mine")


def test_runs_that_wandb_does_not_know_have_no_dashboard(tmp_path):
    with pytest.raises(ValueError, match="logger=wandb"):
        dashboard.dashboard(report(write_run(tmp_path / "one")))


def in_a_process(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_key_the_file_is_written_and_the_command_says_how_to_send_it(two_methods, tmp_path):
    nowhere = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
        "WANDB_API_KEY": "",
        "WANDB_MODE": "online",
    }
    code = "from reft_lightning.cli import dashboard; dashboard()"
    said = in_a_process(code, two_methods, f"out={tmp_path / 'out'}", **nowhere)
    assert f"reft-dashboard {tmp_path / 'out' / 'dashboard.json'}" in said
    spec = json.loads((tmp_path / "out" / "dashboard.json").read_text())
    assert next(iter(sections(spec))) == "Scores"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["projct=x"], "did you mean 'project'"), ([], "FOLDER"), (["none"], "none: no such folder\n")],
)
def test_a_wrong_argument_is_answered(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["reft-dashboard", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.dashboard()
    assert left.value.code == 2
    assert said in capsys.readouterr().err


READ_BACK = """
import json, sys
import wandb_workspaces.reports.v2 as pages, wandb_workspaces.workspaces as workspaces
from pathlib import Path
from reft_lightning.reporting import dashboard

def panels(found):
    return [[repr(type(panel).__name__), getattr(panel, "title", "")] for panel in found]

file = Path(sys.argv[1])
spec = json.loads(file.read_text())
owner = {"entity": "me", "project": spec["project"]}
own = [dashboard.build(spec[what], owner) for what in ("workspace", "report")]
addresses = dashboard.main([file], file.parent)
read = [kind.from_url(address) for kind, address in zip((workspaces.Workspace, pages.Report), addresses)]
shown = []
for workspace, report in (own, read):
    grids = [block for block in report.blocks if isinstance(block, pages.PanelGrid)]
    shown.append([
        [[section.name, panels(section.panels)] for section in workspace.sections],
        [[panels(grid.panels), grid.runsets[0].project] for grid in grids],
        [type(block).__name__ for block in report.blocks],
        [block.text for block in report.blocks if isinstance(block, pages.MarkdownBlock)],
        workspace.runset_settings.filters.replace('"', "'"), grids[0].runsets[0].filters.replace('"', "'"),
        workspace.settings.x_axis, report.title, workspace.name, workspace.entity,
    ])
print(json.dumps(shown))
"""


def test_what_is_sent_is_what_wandbs_library_reads_back(tmp_path):
    pytest.importorskip("wandb_workspaces", reason="takes the extra 'dashboard'")
    for i, method in enumerate(("loreft", "red", "loreft")):
        base = {"base/test/accuracy": 0.3}
        settings = {"optimizer.lr": 10.0**-i}
        write_logged(
            tmp_path / "runs" / f"r{i}", method, i, settings=settings, metrics=base, trainable_parameters=i
        )
    spec = dashboard.dashboard(report(tmp_path / "runs"))
    (tmp_path / "dashboard.json").write_text(json.dumps(spec))
    with serving() as (address, views):
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "x" * 40, "WANDB_MODE": "online"}
        said = in_a_process(READ_BACK, tmp_path / "dashboard.json", **environment)
    sent, read = json.loads(said.splitlines()[-1])
    assert read == sent
    assert {view["type"] for view in views.values()} == {"project-view", "runs"}
    assert f"workspace: {address}/me/reft_lightning?nw=" in said
