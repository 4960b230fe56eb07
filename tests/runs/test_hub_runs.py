"""Models and rows from a hub: the same scores after its branches have moved, and errors that say what failed."""

import json
import re
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import short_runs
from local_hub import LocalHub

OVERRIDES = [
    "model.name=me/model", "data=custom", "data.source=hub", "data.path=me/rows", "data.prompt=question",
    "data.target=answer", "data.validation_size=4", "data.limit_test=4", "decoding.max_new_tokens=2",
    "intervention.rank=1", "trainer.max_steps=1", "trainer.accelerator=cpu",
]  # fmt: skip
ASK = """
import json, sys, time
from reft_lightning.base_models.loading import load_base_model, load_config
from reft_lightning.data.rows import HubRows, hub_rows
time.sleep = lambda seconds: None  # between the hub's own retries
def rows(name):
    return len(hub_rows(HubRows(name), ["local"]))
readers = {"config": load_config, "model": load_base_model, "rows": rows}
said = {}
for name, what in json.loads(sys.argv[1]).items():
    try:
        said[name] = repr(readers[what](name=name))
    except OSError as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def save_rows(folder):
    rows = [{"question": f"what is {i}?", "answer": "even" if i % 2 == 0 else "odd"} for i in range(24)]
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "data" / f"{split}-00000.parquet"
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for number in (1, 2):
        short_runs.save_model(folder / f"model{number}", 1 / number)
    save_rows(folder / "rows")
    hub = LocalHub(folder / "store")
    hub.folder = folder
    hub.publish("me/model", folder / "model1")
    hub.publish("me/rows", folder / "rows", kind="datasets")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def trained(hub):
    """A run of the hub's first commit, after which another one was published."""
    done = command(hub, "train", *OVERRIDES, f"hydra.run.dir={hub.folder / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    first = hub.commits["models", "me/model", "main"]
    assert hub.publish("me/model", hub.folder / "model2") != first
    return done, first, hub.folder / "run"


def command(hub, name, *arguments):
    line = [sys.executable, "-c", f"from reft_lightning.cli import {name}; {name}()", *arguments]
    environment = hub.environment(hub.folder / "home")
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, cwd=hub.folder)


def test_a_run_records_the_commit_of_its_base_model(trained):
    _, first, run = trained
    assert short_runs.results(run)["model_commit"] == first
    assert f"the hub's me/model, commit {first}" in (run / "adapter" / "README.md").read_text()


def test_a_run_is_evaluated_on_the_commit_it_was_trained_on(hub, trained):
    _, first, run = trained
    hub.requests.clear()
    done = command(hub, "evaluate", f"run={run}")
    assert done.returncode == 0, done.stderr
    again = next((run / "evaluations").iterdir())
    assert short_runs.results(again)["model_commit"] == first
    scores = short_runs.results(again)["metrics"]
    assert scores == {name: short_runs.results(run)["metrics"][name] for name in scores}
    assert not [asked for asked, _ in hub.requests if "/me/model/resolve/main/" in asked]


def test_a_run_is_resumed_on_the_commit_it_began_with(hub, trained):
    _, first, run = trained
    stopped = shutil.copytree(run, hub.folder / "stopped")
    results = short_runs.results(stopped)
    (stopped / "results.json").write_text(json.dumps(results | {"status": "stopped"}))
    hub.requests.clear()
    done = command(hub, "train", f"resume={stopped}")
    assert done.returncode == 0, done.stderr
    again = short_runs.results(stopped)
    assert (again["status"], again["model_commit"], again["metrics"]) == (
        "complete",
        first,
        results["metrics"],
    )
    assert not [asked for asked, _ in hub.requests if "/me/model/resolve/main/" in asked]


def test_requests_to_the_hub_are_not_logged(trained):
    done, _, run = trained
    log = (run / "reft-train.log").read_text()
    assert "run folder" in log
    assert "HTTP Request" not in done.stdout + done.stderr + log


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    """What is said of models and datasets that cannot be read, all of them asked in one process."""
    models = {"nothing": "config", "limited": "config", "cut": "model", "silent": "model"}
    names = models | dict.fromkeys(("norows", "cutrows", "silentrows", "busyrows"), "rows")
    for name in names.keys() - {"nothing", "norows"}:
        folder, kind = ("model1", "models") if name in models else ("rows", "datasets")
        hub.publish(f"me/{name}", hub.folder / folder, kind=kind)
    hub.faults = [
        ("/me/limited/", "429"),
        ("GET /me/cut/.*safetensors", "cut"),
        ("/me/silent/.*safetensors", "close"),
        ("GET .*/me/cutrows/.*parquet", "cut"),
        ("/me/silentrows", "close"),
        ("/me/busyrows", "503"),
    ]
    asked = json.dumps({f"me/{name}": what for name, what in names.items()})
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    done = subprocess.run(
        [sys.executable, "-c", ASK, asked], env=environment, capture_output=True, text=True, timeout=300
    )
    hub.faults = []
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "reason", "advice"),
    [
        (
            "nothing",
            "OSError: the model 'me/nothing' .*not a valid model identifier",
            "Check the name .*hf auth login",
        ),
        (
            "limited",
            "OSError: the model 'me/limited' .*/config.json answered 429",
            "Run the same command again later",
        ),
        (
            "cut",
            "OSError: the model 'me/cut' .*peer closed connection",
            "a download continues where it stopped",
        ),
        (
            "silent",
            "OSError: the model 'me/silent' .*Server disconnected",
            "source=local with a folder as path",
        ),
        (
            "norows",
            "ConnectionError: the hub dataset me/norows:default:train@main .*doesn't exist",
            "Check the name",
        ),
        (
            "cutrows",
            "ConnectionError: .*peer closed connection",
            "again later: .*; or use data.source=local",
        ),
        ("silentrows", "ConnectionError: .*Server disconnected", "Run the same command again later"),
        ("busyrows", "ConnectionError: .*/me/busyrows/.* answered 503", "Run the same command again later"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_cause(answers, name, reason, advice):
    first, second = answers[f"me/{name}"].splitlines()
    assert re.search(reason, first), first
    assert re.search(advice, second), second
