"""A damaged file of a run folder ends in one line that names it, before weights are loaded."""

import re
import shutil

import pytest
import short_runs

from reft_lightning.runs import experiment
from reft_lightning.runs.evaluate import evaluate

CONTENTS = {"empty": b"", "cut off": b'{"a": [1,', "a list": b"[1, 2]\n", "binary": bytes(range(256))}


@pytest.fixture(scope="module")
def good(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "good"
    short_runs.run(data, folder, "trainer.max_epochs=1")
    return folder


def damaged(good, tmp_path, file, content):
    folder = shutil.copytree(good, tmp_path / "run")
    (folder / file).write_bytes(CONTENTS[content])
    return folder


def refused(path, call, *arguments):
    with pytest.raises((experiment.SetupError, ValueError), match=re.escape(f"{path} is damaged")) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "file", ["config.yaml", "adapter/reft_config.json", "adapter/reft.safetensors", "results.json"]
)
def test_an_evaluation_on_test_rows_names_it(good, tmp_path, no_weights, file, content):
    """It notes its read in results.json."""
    folder = damaged(good, tmp_path, file, content)
    refused(folder / file, evaluate, folder, "test")


@pytest.mark.parametrize("file", ["config.yaml", "results.json"])
def test_resuming_names_it(good, tmp_path, no_weights, file):
    folder = damaged(good, tmp_path, file, "cut off")
    refused(folder / file, experiment.resume, folder)
