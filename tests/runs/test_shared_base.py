"""Concurrent runs on one base model: each writes the same as it would alone."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import short_runs
import torch

from reft_lightning import cli
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.runs import experiment
from reft_lightning.runs.shared_base import Lane, base_of, why_alone
from reft_lightning.runs.turns import Turns
from reft_lightning.speed.joined_pass import JoinedPass

OF_THE_MACHINE = {
    "seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes", "peak_reserved_bytes", "started", "finished",
    "run_dir", "command", "shared_base", "versions", "git_commit", "test_reads",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Overrides of short runs on a model that all seeds read from one folder, and on invented rows."""
    folder = tmp_path_factory.mktemp("shared_base")
    rows = short_runs.write_rows(folder / "rows")
    settings = short_runs.config(rows).model
    model, tokenizer = load_base_model(
        source="random", name="tiny", tokenizer="bytes", config=dict(settings.config), seed=1
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    own = [text for text in short_runs.arguments(rows) if not text.startswith(("model=", "intervention."))]
    return [*own, "model=local", f"model.path={folder / 'model'}", "trainer.accelerator=cpu"]


@pytest.fixture
def sweep(monkeypatch, tmp_path, places):
    """Run the command; return the folders of the jobs by what differs in them."""
    monkeypatch.chdir(tmp_path)

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", ["reft-train", "-m", *places, f"hydra.sweep.dir={name}", *argv])
        with short_runs.log_kept():
            cli.train()
        return sorted(Path(name).glob("[0-9]*_*/"), key=lambda folder: int(folder.name.partition("_")[0]))

    return run


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder, alone):
    """Everything that a run writes, except costs and rounding."""
    assert files(folder) == files(alone)
    assert (folder / "config.yaml").read_text() == (alone / "config.yaml").read_text()
    for column in ("train/loss", "val/loss", "progress/lr/rotation"):
        found, expected = short_runs.logged(folder, column), short_runs.logged(alone, column)
        assert found.keys() == expected.keys()
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    found, expected = short_runs.results(folder), short_runs.results(alone)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        if name == "train/tokens_per_second":
            continue
        assert found["metrics"][name] == pytest.approx(value, rel=1e-4), name
    others = found.keys() - OF_THE_MACHINE - {"metrics", "chosen_by"}
    assert {name: found[name] for name in others} == {name: expected[name] for name in others}
    assert expected.keys() == found.keys() - {"shared_base"}
    for name in ("reft_validation", "reft_test"):
        texts, others = (short_runs.predictions(f, name) for f in (folder, alone))
        assert [row["generated"] for row in texts] == [row["generated"] for row in others]
    state, other = (short_runs.checkpoint(f)["state_dict"] for f in (folder, alone))
    torch.testing.assert_close(state, other, atol=1e-4, rtol=1e-3)


DIFFERENT = [
    "seed=1,2", "intervention.positions=f2+l2,l1", "intervention.rank=1", "intervention.dropout=0.3",
    "scheduler.warmup_ratio=0.5", "trainer.max_epochs=1",
]  # fmt: skip


def test_a_sweep_on_one_base_writes_what_its_jobs_write_apart(sweep, monkeypatch):
    passes, plain = [], JoinedPass.forward
    monkeypatch.setattr(
        JoinedPass, "forward", lambda self, asked: passes.append(len(asked)) or plain(self, asked)
    )
    together = sweep("together", *DIFFERENT, "launcher=shared_base")
    assert passes == [4] * 6  # an epoch of six batches
    apart = sweep("apart", *DIFFERENT)
    assert [folder.name for folder in together] == [folder.name for folder in apart]
    assert len(together) == 4
    for folder, alone in zip(together, apart, strict=True):
        assert_same_run(folder, alone)
        results = short_runs.results(folder)
        assert results["shared_base"] == 4
        assert "launcher" not in results["command"]
        for cost in ("train_seconds", "tokens_per_second", "peak_memory_bytes"):
            assert results[cost] is None  # unknown for a single run
        assert (folder / "reft-train.log").read_text().count("run folder:") == 1


@pytest.mark.slow
def test_runs_of_other_lengths_and_batches_share_too(sweep):
    different = ["trainer.max_epochs=1,2", "data.batch_size=2,5", "trainer.accumulate_grad_batches=2"]
    for folder, alone in zip(
        sweep("together", *different, "launcher=shared_base"), sweep("apart", *different), strict=True
    ):
        assert_same_run(folder, alone)
        assert short_runs.results(folder)["shared_base"] == 4


def test_a_job_that_fails_leaves_the_others_as_they_are(sweep):
    sgd = ("optimizer._target_=torch.optim.SGD", "trainer.max_epochs=1")
    with pytest.raises(SystemExit):
        sweep("together", "optimizer.lr=1e-3,1e30,2e-3", "launcher=shared_base", *sgd)
    first, failed, last = sorted(Path("together").glob("[0-9]*_*/"))
    assert short_runs.results(failed)["status"] == "stopped"
    assert "lower optimizer.lr" in short_runs.results(failed)["error"]
    assert [short_runs.results(folder)["status"] for folder in (first, last)] == ["complete", "complete"]
    (alone,) = sweep("apart", "optimizer.lr=2e-3", "trainer.devices=1", *sgd)
    found, expected = (short_runs.logged(folder, "train/loss") for folder in (last, alone))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_what_cannot_share_runs_apart_and_the_log_says_so(sweep, capsys):
    folders = sweep(
        "jobs", "intervention=loreft,direft,peft/lora", "trainer.max_steps=1", "test=false", "launcher=shared_base",
        "trainer.default_root_dir=${hydra:runtime.output_dir}/mine",
    )  # fmt: skip
    for folder in folders:  # each asks Hydra for its own
        assert f"default_root_dir: {folder.absolute()}/mine" in (folder / "config.yaml").read_text()
    assert [short_runs.results(folder).get("shared_base") for folder in folders] == [2, 2, None]
    assert "#2 runs separately: peft/lora changes the base model's own modules" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_are_told_to_stop_go_on_one_by_one(sweep, monkeypatch, places):
    stop_in = 8

    def count(self, inputs, rows, boundary, plain=Lane.__call__, seen=[]):  # noqa: B006
        seen.append(self.name)
        if len(seen) == 2 * stop_in:
            self.shared.turns.stopping = True
        return plain(self, inputs, rows, boundary)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "__call__", count)
        with pytest.raises(SystemExit):
            sweep("together", "optimizer.lr=1e-3,2e-3", "launcher=shared_base")
    together = sorted(Path("together").glob("[0-9]*_*/"))
    for folder, alone in zip(together, sweep("apart", "optimizer.lr=1e-3,2e-3"), strict=True):
        assert short_runs.results(folder)["status"] == "stopped"
        assert short_runs.results(folder)["signal"] == "SIGTERM"
        experiment.resume(folder)
        found, expected = (short_runs.logged(f, "train/loss") for f in (folder, alone))
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
        assert len(found) == 12


REASONS = {
    "intervention=bitfit": "bitfit changes the base model's own modules",
    "intervention=frozen": "frozen changes the base model's own modules or trains nothing",
    "intervention=peft/lora": "peft/lora changes",
    "intervention=loreft_lora": "peft/lora changes",
    "intervention.heads=[lm_head]": "a trained head",
    "model.base_dropout=true": "model.base_dropout",
    "model.gradient_checkpointing=true": "model.gradient_checkpointing",
    "model.compile=true": "model.compile",
    "kept.limit_gb=1": "kept.limit_gb",
    "trainer.max_time=00:01:00:00": "trainer.max_time",
    "trainer.devices=2": "several devices",
    "data=glue_rte": "a trained head",
    "intervention=jola": "adds to the loss, or reads more than single tokens",
    "objective=dpo": "runs its own passes",
    "callbacks=edit_norms": "watches a run's own pass",
    "resume=auto": "resume=auto continues a run",
}


@pytest.mark.parametrize("override", REASONS)
def test_a_reason_is_given_for_what_cannot_share(override):
    config = short_runs.compose.compose(["model=tiny_random", "data=boolq", override])
    assert REASONS[override] in (why_alone(config) or "")


def test_what_differs_in_its_adapter_and_data_shares_and_what_computes_otherwise_does_not():
    def base(*overrides):
        return base_of(
            short_runs.compose.compose(["model=local", "model.path=folder", "data=boolq", *overrides])
        )

    plain = short_runs.compose.compose(["model=local", "model.path=folder", "data=boolq"])
    assert why_alone(plain) is None
    same = (
        "seed=1",
        "optimizer.lr=1",
        "intervention=red",
        "data.batch_size=2",
        "data=commonsense",
        "trainer.max_epochs=1",
    )
    assert {base(text) for text in same} == {base()}
    others = (
        "model.dtype=bfloat16",
        "model.path=another",
        "trainer.precision=bf16-mixed",
        "matmul_precision=high",
    )
    assert len({base(text) for text in others} | {base()}) == 5
    random = short_runs.compose.compose(["model=tiny_random", "data=boolq"])
    assert base_of(random) != base_of(replace(random, seed=1))  # whose weights the seed draws


def test_each_thread_runs_as_if_the_process_were_its_own():
    order, drawn, turns = [], {}, None

    def answer(asked):
        return {name: sum(asked.values()) for name in asked}

    def work(name):
        turns.begin(name)
        np.random.seed(ord(name))  # noqa: NPY002
        torch.manual_seed(ord(name))
        found = []
        for number in range(3):
            order.append(name)
            found += [torch.rand(()).item(), np.random.rand(), turns.ask(name, number)]  # noqa: NPY002
            if name == "b" and number == 1:
                break
        drawn[name] = found
        turns.leave(name)

    def run(names):
        nonlocal turns
        turns = Turns(names, answer)
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return dict(drawn)

    together = run("abc")
    assert "".join(order) == "abcabcac"
    assert together["a"][2::3] == [0, 3, 4]
    for name in "abc":
        numbers = run(name)[name]
        assert [n for i, n in enumerate(together[name]) if i % 3 < 2] == [
            n for i, n in enumerate(numbers) if i % 3 < 2
        ]
