"""results.json: written atomically, resumed, merged; the table at the end of a run."""

import importlib.metadata
import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from reft_lightning.config import compose
from reft_lightning.config.schema import Config, ModelConfig
from reft_lightning.runs import card, environment
from reft_lightning.runs.console import print_table
from reft_lightning.runs.results import Results, write_predictions
from reft_lightning.runs.run_folder import load_run_config, write_run_config
from reft_lightning.storage import atomic
from reft_lightning.storage.atomic import write_json


def test_values_are_merged_and_on_disk_at_once(tmp_path):
    results = Results(tmp_path, seed=3)
    results.update(seconds={"a": 1.0})
    results.update(seconds={"b": 2.0}, steps=4)
    assert json.loads((tmp_path / "results.json").read_text()) == results.values
    assert results.values["seconds"] == {"a": 1.0, "b": 2.0}
    assert results.values["status"] == "running"
    assert Results.read(tmp_path).values == results.values


def test_only_the_first_process_writes(tmp_path):
    results = Results(tmp_path)
    results.writes = False
    results.update(steps=4)
    assert not (tmp_path / "results.json").exists()


def test_a_prefix_tells_what_was_obtained(tmp_path):
    results = Results(tmp_path)
    results.update(metrics={"base/test/boolq/accuracy": 0.5})
    assert results.has("base/")
    assert not results.has("test/")


def test_a_resumed_run_keeps_its_scores_and_forgets_that_it_stopped(tmp_path):
    first = Results(tmp_path, versions={"torch": "1"})
    first.update(metrics={"base/x": 1.0}, test_reads=[{"rows": 2}], seconds={"base/test": 1.0})
    first.update(status="stopped", error="Stop: x", stopped="then")
    second = Results(tmp_path, versions={"torch": "2"})
    second.resume()
    assert second.values["metrics"] == {"base/x": 1.0}
    assert second.values["test_reads"] == [{"rows": 2}]
    assert second.values["seconds"] == {"base/test": 1.0}
    assert (second.values["status"], second.values["versions"]) == ("running", {"torch": "2"})
    assert not {"error", "stopped"} & set(second.values)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_predictions_keep_every_character(tmp_path):
    rows = [{"generated": 'é\u2028\n"quoted" 日本'}, {"generated": ""}]
    write_predictions(tmp_path / "deep" / "x.jsonl", rows)
    lines = (tmp_path / "deep" / "x.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == rows


def test_the_versions_are_those_of_what_decides_a_result():
    versions = environment.environment()["versions"]
    for package in ("lightning", "transformers", "peft", "tokenizers"):
        assert versions[package] == importlib.metadata.version(package)
    assert versions["torch"] == torch.__version__  # with the build


def test_configurations_are_read_as_they_were_written_whatever_was_read_before(tmp_path):
    first, second = Config(ModelConfig("tiny")), Config(ModelConfig("tiny"), name="é: #", seed=7)
    first.optimizer.options["betas"], first.name = [0.9, 1e-8], "1e-3"
    for config in (first, second, first):
        write_run_config(tmp_path, config)
        assert load_run_config(tmp_path) == config


def test_git_is_asked_once_as_runs_of_one_process_have_one_code(monkeypatch):
    asked, ask = [], environment.git_commit
    monkeypatch.setattr(environment, "git_commit", lambda: asked.append(1) or ask())
    first, second = environment.environment(), environment.environment()
    assert len(asked) <= 1  # an earlier test may have asked
    assert (first["versions"], first["git_commit"]) == (second["versions"], second["git_commit"])


def test_a_commit_is_named_with_what_was_changed_since(monkeypatch, tmp_path):
    def git(*words):
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code = tmp_path / "code" / "environment.py"
    code.parent.mkdir()
    code.touch()
    monkeypatch.setattr(environment, "__file__", str(code))
    git("init")
    assert environment.git_commit() is None  # nothing has been committed
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert environment.git_commit() == commit
    (tmp_path / "notes").touch()  # not of the code
    assert environment.git_commit() == commit
    code.write_text("changed")
    assert environment.git_commit() == f"{commit}+changes"
    git("checkout", ".")
    (code.parent / "new.py").touch()
    assert environment.git_commit() == f"{commit}+changes"


def test_outside_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.git_commit() is None


def table(width=200, **more):
    count = {"correct": 5, "total": 10, "missing": 2, "interval": [0.2366, 0.7634]}
    right = {"correct": 8, "interval": [0.4902, 0.9433]}
    constant = {"correct": 6, "missing": 0, "interval": [0.3127, 0.8318]}
    values = {
        "model": "m[b]odel", "method": "loreft", "run_dir": "outputs/0_data.tasks=[boolq]", "seed": 42,
        "counts": {"base/test/boolq/accuracy": count, "test/boolq/accuracy": count | right,
                   "val/boolq/accuracy": count, "test/boolq/option_accuracy": count,
                   "test/boolq/majority_accuracy": count | constant},
        "metrics": {"base/test/boolq/accuracy": 0.5, "test/boolq/accuracy": 0.8},
        "commonest_answers": {"boolq": "true"},
        "trainable_parameters": 1234, "percent": 0.5, "base_task": "causal_lm",
    }  # fmt: skip
    out = io.StringIO()
    print_table(values | more, Console(file=out, width=width))
    return out.getvalue()


def test_the_table_shows_base_and_adapter_with_intervals():
    text = table()
    assert "50.0 [23.7, 76.3]" in text
    assert "80.0 [49.0, 94.3]" in text
    assert "frozen base, boolq: no answer in 2 of 10 rows" in text
    assert "always 'true'" in text
    assert "60.0 [31.3, 83.2]" in text
    assert text.index("frozen base") < text.index("loreft")
    assert "1,234" in text
    assert "0.500" in text
    assert "m[b]odel" in text  # brackets are not rich's


def test_a_narrow_terminal_shows_every_score_and_tells_the_cost_below():
    text = table(width=80)
    lines = text.splitlines()
    assert max(map(len, lines[: lines.index("frozen base, boolq: no answer in 2 of 10 rows")])) <= 80
    assert "50.0 [23.7, 76.3]" in text
    assert "80.0 [49.0, 94.3]" in text
    assert "loreft: 1,234 trained, 0.500 % of base" in lines


def test_several_tasks_have_a_row_for_their_mean_and_one_constant_answer():
    def count(correct, low, high):
        return {"correct": correct, "total": 10, "missing": 0, "interval": [low, high]}

    names = {
        "test/a/accuracy": count(4, 0.2, 0.6),
        "test/b/accuracy": count(6, 0.4, 0.8),
        "test/a/majority_accuracy": count(1, 0.0, 0.2),
        "test/b/majority_accuracy": count(2, 0.1, 0.3),
    }
    text = table(counts=names, metrics={"test/accuracy": 0.5, "test/majority_accuracy": 0.15})
    # the half-width of two tasks is that of one, divided by the root of 2
    assert "50.0 [35.9, 64.1]" in text
    assert "15.0 [7.9, 22.1]" in text
    assert text.count("always the commonest") == 1
    assert text.count("mean of tasks") == 2


def test_a_task_with_further_test_sets_is_not_called_their_mean():
    """MNLI: test/accuracy is that of the matched rows, as GLUE names it."""
    own, further = (
        {"correct": n, "total": 10, "missing": 0, "interval": [n / 10 - 0.2, n / 10 + 0.2]} for n in (4, 8)
    )
    counts = {"test/mnli/accuracy": own, "test/mnli_mismatched/accuracy": further}
    metrics = {"test/mnli/accuracy": 0.4, "test/mnli_mismatched/accuracy": 0.8, "test/accuracy": 0.4}
    assert "60.0 [45.9, 74.1]" in table(counts=counts, metrics=metrics)
    shown = {name: ends for name, _, ends, _ in card._scores({"counts": counts, "metrics": metrics})}
    assert shown == {"test/mnli/accuracy": "20.0 to 60.0", "test/mnli_mismatched/accuracy": "60.0 to 100.0"}
    # a correlation is not a fraction of rows, and has no mean here
    counts = {name: {"total": 10, "interval": [0.2, 0.6]} for name in ("test/a/matthews", "test/b/matthews")}
    assert "mean of tasks" in table(
        counts=counts, metrics={**dict.fromkeys(counts, math.nan), "test/matthews": None}
    )


COMMAND = [
    "reft-train", "experiment=debug", "model=tiny_random", "data.path=my rows", "data.tasks=[boolq,piqa]",
    "seed=7", "data.system_prompt='it\\'s \"$5\"; *'", "overwrite=true", "logger=[csv,tensorboard]",
]  # fmt: skip


def printed(text):
    """Return name -> arguments of the commands at the end of a table, as parsed by a shell."""
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("run folder"))
    return {line[:16].strip(): shlex.split(line[17:]) for line in lines[end:]}


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("loreft", {"three seeds", "another method"}),
        ("direft", {"three seeds", "another method"}),
        ("peft/lora", {"three seeds"}),
    ],
)
def test_the_commands_that_are_printed_work_as_they_are_copied(method, names):
    text = table(method=method, command=shlex.join(COMMAND))
    found = printed(text)
    assert set(found) == {"run folder", "chat with both", "evaluate again", *names}
    assert found["chat with both"] == ["reft-chat", "run=outputs/0_data.tasks=[boolq]"]
    assert "'run=outputs/0_data.tasks=[boolq]'" in text  # brackets are a pattern of the shell
    runs = list(compose.preflight(found["three seeds"][1:]).runs.values())
    assert [config.seed for config in runs] == [42, 43, 44]
    (first,) = compose.preflight(COMMAND[1:]).runs.values()
    assert first.data.system_prompt == """it's "$5"; *"""
    for config in runs:
        assert not config.overwrite
        assert replace(config, seed=7, overwrite=True) == first
    if "another method" in names:
        (other,) = compose.preflight(found["another method"][1:]).runs.values()
        assert other.intervention.method == {"loreft": "direft", "direft": "loreft"}[method]
        assert other.data == first.data


def test_nobody_is_sent_to_chat_with_a_classifier():
    found = printed(table(base_task="sequence_classification"))
    assert set(found) == {"run folder", "evaluate again"}


@pytest.mark.parametrize("override", ["intervention.method=loreft", "intervention.init_from=first"])
def test_no_other_method_is_proposed_where_the_command_would_set_it_back_or_not_run(override):
    text = table(command=f"reft-train model=tiny_random {override}")
    assert set(printed(text)) == {"run folder", "chat with both", "evaluate again", "three seeds"}


@pytest.mark.parametrize(
    ("values", "proposed"),
    [
        ({"split": "validation"}, False),  # evaluated again: no such command
        ({"method": "frozen", "trainable_parameters": 0}, False),
        ({"method": "none", "trainable_parameters": 0, "head_parameters": 7}, True),
    ],
)
def test_another_run_is_proposed_of_what_trains(values, proposed):
    assert ("seed=42,43,44" in table(command="reft-train model=x", **values)) == proposed
    assert "seed=42,43,44" not in table(**values)  # nobody knows the command


def test_the_table_shows_losses_where_nothing_was_scored():
    text = table(counts={}, metrics={"base/val/loss": 2.5, "val/loss": 1.25, "train/loss": 1.0})
    assert "validation rows" in text
    assert "2.5000" in text
    assert "1.2500" in text


def test_the_table_shows_correlations_with_their_own_interval():
    counts = {"test/cola/matthews": {"total": 10, "interval": [0.1, 0.3]}}
    metrics = {"test/cola/matthews": 0.2, "test/loss": 3.25}
    text = table(counts=counts, metrics=metrics, head_parameters=77)
    assert "3.2500" not in text
    assert "20.0 [10.0, 30.0]" in text
    assert "1,234 + head 77" in text


def test_a_run_that_evaluated_nothing_says_so():
    text = table(counts={}, metrics={"train/loss": 1.0}, train_seconds=1.0, steps=2, tokens_per_second=3.0,
                 peak_memory_bytes=0)  # fmt: skip
    assert "nothing was evaluated" in text
    assert "training 1 s (2 steps" in text


def test_memory_that_cannot_be_told_is_unknown():
    arguments = {"train_seconds": 1.0, "steps": 2, "tokens_per_second": 3.0}
    assert "peak memory 2.0 GiB" in table(**arguments, peak_memory_bytes=2**31)
    assert "peak memory unknown, as the process ran other runs" in table(**arguments, peak_memory_bytes=None)


PEAKS = """
from pathlib import Path
from reft_lightning.runs import environment
resets = environment.CLEAR_REFS
for place, size in ((Path("/nowhere/clear_refs"), 400), (Path("/nowhere/clear_refs"), 1), (resets, 400), (resets, 1)):
    environment.CLEAR_REFS = place
    environment.begin_peak_memory()
    block = bytearray(size * 2**20)
    del block
    print(environment.peak_memory_bytes())
"""


def test_the_peak_of_a_run_is_its_own_or_where_peaks_cannot_be_reset_only_the_first_run_has_one():
    """Of four runs in one process, the first and the third take 400 MiB more; before two of them there is no reset."""
    said = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    first, second, third, fourth = (None if line == "None" else int(line) for line in said.split())
    assert first > 400 * 2**20
    assert second is None
    if sys.platform == "linux":  # other systems do not reset the peak
        assert fourth < third - 300 * 2**20


def strict(text):
    """Read JSON as other programs do, which reject NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_scores_that_are_not_numbers_leave_json_that_every_program_reads(tmp_path):
    nan = float("nan")
    results = Results(tmp_path)
    results.update(metrics={"val/loss": nan, "train/loss": float("inf")})
    assert strict((tmp_path / "results.json").read_text())["metrics"] == {
        "val/loss": None,
        "train/loss": None,
    }
    write_predictions(tmp_path / "reft_test.jsonl", [{"value": nan, "scores": {"pearson": nan}, "gold": 1.5}])
    row = strict((tmp_path / "reft_test.jsonl").read_text())
    assert row == {"value": None, "scores": {"pearson": None}, "gold": 1.5}


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_loss_that_is_not_a_number_is_shown(tmp_path, loss):
    values = {
        "metrics": {"val/loss": loss}, "counts": {}, "model": "m", "method": "loreft", "run_dir": tmp_path,
        "trainable_parameters": 1,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    print_table(values, console)
    assert "not a number" in console.file.getvalue()
