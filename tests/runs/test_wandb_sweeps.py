"""The sweeps of ``conf/wandb_sweep``: what W&B's agent would run composes, and runs, under the agent's environment."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import short_runs
import yaml

from reft_lightning.config.compose import composing, config_dir

SWEEPS = sorted((config_dir() / "wandb_sweep").glob("*.yml"))
KNOWN = {"value", "values", "distribution", "min", "max"}


def overrides_of(sweep):
    """Yield the overrides of every point of a grid, and of both ends of what is drawn, as the agent writes them."""
    choices = []
    for name, given in sweep["parameters"].items():
        assert set(given) <= KNOWN
        values = [given["value"]] if "value" in given else given.get("values") or [given["min"], given["max"]]
        if "distribution" in given:
            assert all(isinstance(value, float) for value in values)  # YAML reads 1e-4 as a string
        choices.append([f"{name}={value}" for value in values])
    return [list(point) for point in itertools.product(*choices)]


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_that_a_sweep_can_ask_for_composes_and_reads_no_test_row(path):
    sweep = read(path)
    assert sweep["command"] == ["${env}", "reft-train", "${args_no_hyphens}"]
    assert sweep["method"] in ("grid", "random", "bayes")
    points = overrides_of(sweep)
    assert len(points) > 5
    with composing() as compose_one:
        for point in points:
            config = compose_one(point)
            assert config.sealed
            assert list(config.logger) == ["wandb"]


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_run_of_an_agent_is_logged_as_the_agents_and_has_what_the_sweep_maximises(path, tmp_path):
    sweep = read(path)
    point = overrides_of(sweep)[-1]
    keys = {text.partition("=")[0] for text in point}
    data = short_runs.write_rows(tmp_path / "rows")
    tiny = [text for text in short_runs.arguments(data) if text.partition("=")[0] not in keys]
    config = {
        name: {"value": yaml.safe_load(value)} for name, _, value in (text.partition("=") for text in point)
    }
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(config))
    agent = {
        "WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "run45678", "WANDB_MODE": "offline",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml"),
    }  # fmt: skip
    folder = tmp_path / "run"
    subprocess.run(
        [sys.executable, "-m", "reft_lightning.cli", *point, *tiny, f"hydra.run.dir={folder}"],
        env=os.environ | agent, check=True, cwd=tmp_path, timeout=170, capture_output=True,
    )  # fmt: skip
    (offline,) = (folder / "wandb").glob("offline-run-*-run45678")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    assert run["sweep_id"] == "sweep123"
    told = [text.partition(".")[2] for text in point if text.startswith(("optimizer.", "intervention.rank"))]
    assert all(text in run["display_name"] for text in told)
    shown = run["config"]["update"]
    assert shown["intervention"]["method"] in run["display_name"]  # no parameter hides the section
    summary = {}
    for record in found:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    assert sweep["metric"]["name"] in summary
    assert summary["status"] == "complete"
    assert short_runs.results(folder)["test_reads"] == []
