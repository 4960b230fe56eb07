"""Untrusted folders: evaluating, chatting with and resuming their runs executes none of their code."""

import json
import os
import shutil
import sys

import pytest
import short_runs
import torch
import yaml

from reft_lightning import cli, suggest
from reft_lightning.config.identity import config_hash
from reft_lightning.runs.run_folder import load_run_config
from reft_lightning.suggest import import_object, names_of_a_stranger

MODULE = """
import os
os.mkdir("ran")
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger as Logger
from reft_lightning.interventions import LoReFT as Method
from torch.optim import AdamW as Optimizer
from reft_lightning.training.schedules import linear
from reft_lightning.data import get_family
FAMILY = get_family("commonsense")
"""


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A complete run, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    short_runs.run(data, folder / "complete")
    short_runs.interrupt(data, folder / "stopped", 7)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a folder with a module that leaves a trace when it is imported."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as python -m has it
    yield tmp_path
    sys.modules.pop("stranger", None)


def foreign(runs, here, status, **changes):
    """Copy a run to the current folder, and change its configuration."""
    folder = here / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs / status, folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    results = short_runs.results(folder) | {
        "config_hash": config_hash(load_run_config(folder))
    }  # as it began
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def call(monkeypatch, function, *argv):
    monkeypatch.setattr(sys, "argv", ["reft", *argv])
    function()


def refused(monkeypatch, capsys, function, *argv):
    """Call a command; return its message when it exits with status 2."""
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, function, *argv)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


NAMES = [{"intervention__method": "stranger.Method"}, {"data__family": "stranger.FAMILY"}]
TARGETS = [  # each of another place of the configuration
    {"callbacks": {"one": {"_target_": "stranger.Callback"}}},
    {"logger": {"one": {"_target_": "stranger.Logger"}}},
    {"trainer__profiler": {"_target_": "stranger.Profiler"}},
    {"optimizer___target_": "stranger.Optimizer"},
    {"scheduler___target_": "stranger.linear"},
]
CALLS = [  # from installed packages, which execute what their arguments say
    {"callbacks": {"one": {"_target_": "torch.utils.cpp_extension.load", "name": "x", "sources": []}}},
    {
        "callbacks": {
            "one": {"_target_": "lightning.Callback", "x": {"_target_": "torch.hub.load", "repo": "x"}}
        }
    },
    {"trainer__plugins": [{"_target_": "torch.load", "f": "x.pt"}]},
    {"optimizer___target_": "torch.utils.cpp_extension.load"},
    {"scheduler___target_": "torch.hub.load"},
    {
        "callbacks": {
            "one": {
                "_target_": "lightning.pytorch.callbacks.ModelSummary",
                "max_depth": r"\${oc.create:{_target_:torch.load,f:x.pt}}",
            }
        }
    },
    {"callbacks": {"one": {"_target_": "os.mkdir", "path": "ran"}}},
]


@pytest.mark.parametrize("function", [cli.evaluate, cli.chat])
@pytest.mark.parametrize("changes", NAMES, ids=lambda changes: next(iter(changes)))
def test_a_name_of_a_module_here_is_not_imported(runs, here, monkeypatch, capsys, function, changes):
    folder = foreign(runs, here, "complete", **changes)
    said = refused(monkeypatch, capsys, function, f"run={folder}")
    assert f"{next(iter(changes.values()))} is not part of an installed package" in said
    assert "trust_code=true" in said
    assert not (here / "ran").exists()


@pytest.mark.parametrize("targets", [TARGETS, CALLS], ids=["modules here", "installed packages"])
def test_what_trains_is_not_made_where_a_run_is_only_evaluated(runs, here, monkeypatch, targets):
    changes = {}
    for number, change in enumerate(targets):
        for place, value in change.items():
            if place == "callbacks":
                changes.setdefault(place, {})[f"n{number}"] = value["one"]
            else:
                changes[place] = value
    folder = foreign(runs, here, "complete", **changes)
    call(monkeypatch, cli.evaluate, f"run={folder}")
    assert not (here / "ran").exists()


@pytest.mark.parametrize("changes", [*NAMES, *TARGETS, *CALLS], ids=str)
def test_a_resumed_run_makes_only_what_is_known_to_train(runs, here, monkeypatch, capsys, changes):
    folder = foreign(runs, here, "stopped", **changes)
    said = refused(monkeypatch, capsys, cli.train, f"resume={folder}")
    assert "trust_code=true" in said
    assert not (here / "ran").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the run was copied
def test_a_resumed_run_makes_classes_of_installed_packages(runs, here, monkeypatch):
    timer = {"_target_": "lightning.pytorch.callbacks.Timer"}
    folder = foreign(runs, here, "stopped", callbacks={"one": timer}, trainer__profiler="simple")
    call(monkeypatch, cli.train, f"resume={folder}")
    assert short_runs.results(folder)["status"] == "complete"


class Touch:
    """What unpickles by creating a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_with_code_is_refused_whatever_its_configuration_says(runs, here, monkeypatch, capsys):
    folder = foreign(runs, here, "stopped", trust_code=True)
    path = folder / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"more": Touch()}, path)
    said = refused(monkeypatch, capsys, cli.train, f"resume={folder}")
    assert "trust_code=true" in said
    assert not (here / "ran").exists()


def test_a_damaged_checkpoint_is_named_before_weights_are_loaded(runs, here, monkeypatch, capsys):
    folder = foreign(runs, here, "stopped")
    os.truncate(folder / "checkpoints" / "last.ckpt", 1000)
    assert "last.ckpt is damaged" in refused(monkeypatch, capsys, cli.train, f"resume={folder}")


def test_ones_own_modules_are_imported_where_the_folder_is_trusted(runs, here, monkeypatch):
    folder = foreign(
        runs, here, "complete", data__family="stranger.FAMILY", intervention__method="stranger.Method"
    )
    call(monkeypatch, cli.evaluate, f"run={folder}", "trust_code=true")
    assert (here / "ran").is_dir()


def test_what_is_installed_is_told_by_where_it_lies(here):
    (here / "folder").mkdir()
    with names_of_a_stranger():
        assert import_object("torch.optim.AdamW")
        assert import_object("reft_lightning.suggest.did_you_mean") is suggest.did_you_mean
        for name in ("stranger.Method", "folder.Method", "no_such_package.Method", "os.system"):
            with pytest.raises(ValueError, match=r"not part of an installed package.*trust_code=true"):
                import_object(name)
    assert not (here / "ran").exists()
