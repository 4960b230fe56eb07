"""An adapter evaluated on the user's own rows: all of them, in the training format, compared with the train rows."""

import json
import subprocess
import sys

import pytest
import short_runs

from reft_lightning.runs import build, experiment
from reft_lightning.runs.evaluate import evaluate

COLUMNS = ("data.prompt=q", "data.target=a", "decoding.max_new_tokens=2")


def write(path, *questions):
    path.write_text("".join(json.dumps({"q": f"{question}?", "a": "yes"}) + "\n" for question in questions))
    return path


def rows(path, *more):
    return ["data=custom", f"data.path={path}", *COLUMNS, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on ten custom questions in Alpaca's format, one of them for validation."""
    folder = tmp_path_factory.mktemp("runs")
    mine = write(folder / "mine.jsonl", *range(10))
    config = short_runs.compose.compose(
        ["model=tiny_random", *rows(mine), "data.template=alpaca", "data.max_length=48", "data.eval_batch_size=3",
         f"data.test_path={write(folder / 'test.jsonl', 20, 21)}", "intervention.rank=2", "trainer=cpu",
         "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    )  # fmt: skip
    experiment.run(config, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_all_rows_of_a_single_file_are_evaluated(run, tmp_path, split):
    found = evaluate(run, split, rows=rows(write(tmp_path / "other.jsonl", *range(30, 37))))
    prefix = {"validation": "val", "test": "test"}[split]
    assert found["counts"][f"{prefix}/custom/accuracy"]["total"] == 7
    folder = max((run / "evaluations").iterdir())
    lines = (folder / "predictions" / f"reft_{split}.jsonl").read_text().splitlines()
    assert len(lines) == 7
    assert all("### Instruction" in json.loads(line)["prompt"] for line in lines)  # as in training
    assert found["evaluation_dir"] == str(folder)
    with pytest.raises(experiment.SetupError, match=f"is an evaluation of {run}, not a run"):
        experiment.resume(folder)


def test_the_layout_of_training_is_kept_unless_the_rows_say_otherwise(run, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "reft_lightning.runs.evaluate.prepare", lambda config, **_: made.append(config) or 1 / 0
    )
    other = write(tmp_path / "other.jsonl", 1, 2)
    for more in ((), ("data.template=plain", "data.max_length=64")):
        with pytest.raises(ZeroDivisionError):
            evaluate(run, rows=rows(other, *more))
    assert [(c.data.template, c.data.max_length, c.data.eval_batch_size) for c in made] == [
        ("alpaca", 48, 3),
        ("plain", 64, 3),
    ]


def test_rows_are_compared_with_those_that_the_run_was_trained_on(run, tmp_path):
    def overlap(*more):
        return evaluate(run, "test", rows=rows(*more))["data_versions"]["test"]["custom"]["overlap"]

    other = write(tmp_path / "other.jsonl", 30, 31, 32)
    assert overlap(other) == 0  # though all of its rows are in the file that data.path names
    assert overlap(other, f"data.test_path={write(tmp_path / 'seen.jsonl', 3, 4, 33)}") == 2


def test_rows_can_be_evaluated_where_the_train_rows_are_gone(run, tmp_path, monkeypatch, caplog):
    def gone(*_):
        raise FileNotFoundError("mine.jsonl")

    monkeypatch.setattr("reft_lightning.runs.other_rows.data_module", gone)
    evaluate(run, rows=rows(write(tmp_path / "other.jsonl", 30)))
    assert "cannot read the run's train rows" in caplog.text


def test_reads_of_two_test_files_are_told_apart(run, tmp_path):
    mine = run.parent / "mine.jsonl"
    before = short_runs.results(run)["test_reads"]
    evaluate(run, "test", rows=rows(mine, f"data.test_path={run.parent / 'test.jsonl'}"))
    second = write(tmp_path / "second.jsonl", 40)
    evaluate(run, "test", rows=rows(mine, f"data.test_path={second}"))
    reads = short_runs.results(run)["test_reads"][len(before) :]
    assert [read["task"] for read in reads] == ["custom", f"custom of {second}"]


@pytest.mark.parametrize(
    ("split", "files", "reason"),
    [
        ("test", ("train",), r"data=custom has no test rows \(data\.test_path\)"),
        ("validation", ("train", "test"), r"data=custom has no validation rows \(data\.validation_path\)"),
    ],
)
def test_a_folder_without_the_split_is_refused_before_weights_are_loaded(
    run, tmp_path, monkeypatch, split, files, reason
):
    for name in files:
        write(tmp_path / f"{name}.jsonl", 1, 2, 3)
    monkeypatch.setattr(build, "load_base_model", None)
    with pytest.raises(ValueError, match=reason):
        evaluate(run, split, rows=rows(tmp_path, "data.validation_size=0"))
    asked = "import sys; from reft_lightning.storage.atomic import hold_folder; sys.exit(not hold_folder(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", asked, str(run)]).returncode == 0, "the run is still held"
