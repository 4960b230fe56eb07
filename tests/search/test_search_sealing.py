"""A search sees no test rows, whatever it searches, even if both halves are in one file."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import short_runs
import yaml
from real_searches import contents, make_study, opened, start, work

from reft_lightning.data.classification_data import divide
from reft_lightning.data.example import placed
from reft_lightning.data.families.glue import FAMILY
from reft_lightning.data.rows import DataSource, read_rows
from reft_lightning.search import command

FIXTURES = Path(__file__).parents[1] / "fixtures" / "glue"
HALVING = {"pruner": "successive_halving"}
LABELS = {"entailment": "not_entailment", "not_entailment": "entailment"}


@pytest.fixture
def data(tmp_path):
    return short_runs.write_rows(tmp_path / "rows")


def outcomes(study):
    """Everything about a study's trials that does not depend on times and paths."""
    found = []
    for method in study.plan.methods:
        for trial in study.trials(method):
            folder = study.folder / trial.user_attrs["folder"]
            results = short_runs.results(folder)
            files = sorted((folder / "predictions").glob("*"))
            predictions = [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
            facts = (trial.number, trial.params, trial.state.name, trial.value, trial.intermediate_values)
            found.append((*facts, results["metrics"], results["counts"], results["test_reads"], predictions))
    return found


def test_the_look_at_the_rows_before_a_study_opens_no_test_rows(tmp_path):
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        rows = [json.dumps({"q": f"{split} {i}?", "a": "yes"}) + "\n" for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    values = contents(tmp_path)
    values["base"] = [
        "model=tiny_random", "data=custom", f"data.path={tmp_path}", "data.prompt=q", "data.target=a",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with opened() as files:
        command.prepare_study({"search": str(tmp_path / "mine.yaml"), "folder": str(tmp_path / "study")}, [])
    assert str(tmp_path / "train.jsonl") in files
    assert str(tmp_path / "validation.jsonl") in files
    assert str(tmp_path / "test.jsonl") not in files


# --- GLUE: rows for selection and test rows are in one file


def halves(folder):
    """Rows for selection and test rows, as a run splits them."""
    task = FAMILY.task("rte")
    rows, _ = read_rows(task, "validation", DataSource("local", path=str(folder)))
    return divide([placed(task.example, *row) for row in rows], 42)


def poison(folder):
    """Give every row of the test the other label."""
    selection, test = halves(folder)
    file = folder / "RTE" / "dev.tsv"
    lines = file.read_text().splitlines()
    for example in test:
        number = int(example.source.rpartition("line ")[2]) - 1
        *cells, label = lines[number].split("\t")
        lines[number] = "\t".join([*cells, LABELS[label]])
    file.write_text("\n".join(lines) + "\n")
    after = halves(folder)
    assert after[0] == selection
    assert [e.answer for e in after[1]] == [LABELS[e.answer] for e in test]


def search_glue(folder, rows):
    base = [
        "model=tiny_random", "model.config.model_type=bert", "+model.config.initializer_range=0.4", "data=glue_rte",
        "data.source=local", f"data.path={rows}", "data.batch_size=4", "data.eval_batch_size=4",
        "intervention.positions=f3", "intervention.rank=1", "trainer.accelerator=cpu", "trainer.max_epochs=2",
        "trainer.enable_progress_bar=false", "evaluate_base=true",
    ]  # fmt: skip
    methods = {
        "loreft": {"overrides": ["intervention=loreft"], "space": {"optimizer.lr": {"log": [1e-3, 1e-1]}}}
    }
    study = make_study(folder, {
        "base": base, "methods": methods, "sampler": "tpe", "startup_trials": 1, **HALVING, "seeds": [1],
        "budget": {"unit": "trials", "amount": 2},
    })  # fmt: skip
    work(study)
    return study


def test_labels_of_the_tests_half_of_a_file_change_nothing_in_a_search(tmp_path):
    rows = shutil.copytree(FIXTURES, tmp_path / "glue")
    before = search_glue(tmp_path / "before", rows)
    poison(rows)
    after = search_glue(tmp_path / "after", rows)
    pairs = zip(outcomes(before), outcomes(after), strict=True)
    differ = [(one, other) for both in pairs for one, other in zip(*both, strict=True) if one != other]
    assert not differ, str(differ)[:1000]
    assert "COMPLETE" in {outcome[2] for outcome in outcomes(after)}
    assert before.best("loreft").number == after.best("loreft").number
    # the winners' runs, which may read them, do
    first, second = (short_runs.results(s.folder / "winners" / "loreft" / "seed_1") for s in (before, after))
    reads = [results["data_versions"]["test"]["rte"]["test_fingerprint"] for results in (first, second)]
    assert reads[0] != reads[1]
    assert first["metrics"]["val/accuracy"] == second["metrics"]["val/accuracy"]
    assert first["metrics"]["test/accuracy"] == pytest.approx(1 - second["metrics"]["test/accuracy"])


# --- by the command

WATCHER = """
import os, sys

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith((".json", ".jsonl")):
        os.write(LOG, (arguments[0] + "\\n").encode())

LOG = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_process_of_the_command_opens_test_rows(data, tmp_path):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WATCHER)  # every Python process imports it
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(contents(data, budget={"unit": "trials", "amount": 1}, seeds=[]))
    )
    log = tmp_path / "opened.txt"
    arguments = ["search=mine.yaml", "folder=study"]
    path = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    running = start(arguments, tmp_path, PYTHONPATH=path, OPENED=str(log))
    said, _ = running.communicate()
    assert running.returncode == 0, said
    files = set(log.read_text().splitlines())
    assert str(data / "boolq" / "train.json") in files
    # also of the trial's process
    assert str(tmp_path / "study" / "trials" / "loreft" / "0" / "job.json") in files
    assert str(data / "boolq" / "test.json") not in files
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert (summary["status"], summary["test_reads"]) == ("complete", [])
