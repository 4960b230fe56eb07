"""Whole runs: what they write, what they refuse before weights are loaded, what remains after a crash."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import short_runs
import torch
from lightning import Callback
from omegaconf import OmegaConf

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.adapters.saving import load_adapter
from reft_lightning.base_models import loading
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.compose import CompositionError
from reft_lightning.config.identity import config_hash
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.evaluation import Decoding, generate
from reft_lightning.reporting.build import build_report
from reft_lightning.runs import arguments, build, experiment, trainer
from reft_lightning.runs.devices import check_accelerator
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.runs.other_rows import on_other_rows

# a learning rate that stays high spoils the model after a good start: the best checkpoint is not the last
SETTINGS = ("evaluate_base=true", "checkpoint.monitor=val/loss", "checkpoint.mode=min")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, short_runs.run(data, folder, *SETTINGS)


def test_the_results_hold_what_is_needed_to_run_again(data, finished):
    folder, results = finished
    assert results == short_runs.results(folder)
    assert results["status"] == "complete"
    reft = rl.attach(base(data), "loreft", rank=2, positions="f2+l2")
    count = reft.parameter_count()
    assert (results["trainable_parameters"], results["percent"]) == (count.trainable, count.percent)
    assert results["steps"] == 12
    assert results["train_seconds"] > 0
    assert {"base/test", "validation", "test"} == set(results["seconds"])
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["train_seconds"])
    assert results["peak_memory_bytes"] > 100 * 2**20
    assert results["seed"] == 42
    assert {"python", "torch", "lightning", "transformers", "reft_lightning"} <= set(results["versions"])
    assert results["versions"]["torch"] == torch.__version__
    assert results["git_commit"] is None or len(results["git_commit"].removesuffix("+changes")) == 40
    assert results["data_versions"]["family"] == "commonsense"
    assert results["data_versions"]["train"]["boolq"]["rows"] == 24
    assert [(read["model"], read["rows"]) for read in results["test_reads"]] == [("base", 6), ("adapted", 6)]
    assert results["method"] == "loreft"
    decoding = results["decoding"]
    assert (decoding["max_new_tokens"], decoding["do_sample"], decoding["verify"]) == (3, False, True)


def test_every_score_comes_with_its_counts(finished):
    folder, results = finished
    metrics, counts = results["metrics"], results["counts"]
    assert {"val/accuracy", "val/loss", "val/boolq/accuracy", "val/boolq/option_accuracy", "test/accuracy",
            "test/boolq/accuracy", "base/test/boolq/accuracy", "train/loss"} <= set(metrics)  # fmt: skip
    for name, count in counts.items():
        assert count["total"] == 6
        assert metrics[name] == pytest.approx(count["correct"] / 6)
        low, high = count["interval"]
        assert low <= metrics[name] <= high
    for name, prefix in (("reft_test", ""), ("base_test", "base/")):
        rows = short_runs.predictions(folder, name)
        assert len(rows) == 6
        by_rows = sum(row["option"] == row["gold"] for row in rows)
        assert counts[f"{prefix}test/boolq/option_accuracy"]["correct"] == by_rows


def base(data):
    return load_base_model(**build.model_source(short_runs.config(data)))[0]


def test_the_adapter_folder_reproduces_the_predictions_on_a_fresh_base(data, finished):
    folder, _ = finished
    settings = short_runs.config(data)
    objects = experiment.build(settings)
    reft = rl.ReftModel.from_pretrained(base(data), folder / "adapter").eval()
    texts = {}
    objects.data.setup("test")
    for loader in objects.data.test_dataloader():
        for batch in loader:
            said = generate(reft, batch, objects.data.tokenizer, Decoding(3, verify=False))
            texts |= {e.source: text for e, (text,) in zip(batch["examples"], said, strict=True)}
    rows = short_runs.predictions(folder, "reft_test")
    assert {row["source"]: row["generated"] for row in rows} == texts
    # the adapter's outputs differ from the base's, so the check above is meaningful
    assert [row["generated"] for row in short_runs.predictions(folder, "base_test")] != [
        row["generated"] for row in rows
    ]


def rows_of(folder, *more):
    """Return the arguments of `reft-eval` that name invented rows in a folder."""
    return ["data=boolq", "data.source=local", f"data.path={folder}", "data.validation_size=6", *more]


def test_an_adapter_is_evaluated_on_other_rows(data, finished, tmp_path):
    folder, results = finished
    same = evaluate(folder, rows=rows_of(data, "decoding.max_new_tokens=3"))
    measured = {k: v for k, v in results["metrics"].items() if k.startswith("val/")}
    assert same["metrics"] == pytest.approx(measured)
    both = evaluate(folder, "test", rows=rows_of(data, "decoding.max_new_tokens=3"), evaluate_base=True)
    measured = {k: v for k, v in results["metrics"].items() if "test/" in k}
    assert {k: both["metrics"][k] for k in measured} == pytest.approx(measured)
    assert [read["model"] for read in both["test_reads"]] == ["base", "adapted"]
    other = short_runs.write_rows(tmp_path / "other", train=12, test=4, tasks=("boolq", "piqa"))
    before = len(short_runs.results(folder)["test_reads"])
    tasks = ("data.tasks=[boolq,piqa]", "decoding.max_new_tokens=2")
    found = evaluate(folder, "test", rows=rows_of(other, *tasks))
    assert {"test/boolq/accuracy", "test/piqa/accuracy", "test/accuracy"} <= found["metrics"].keys()
    assert found["counts"]["test/piqa/accuracy"]["total"] == 4
    assert found["decoding"]["max_new_tokens"] == 2
    reads = short_runs.results(folder)["test_reads"][before:]
    assert [(read["task"], read["rows"]) for read in reads] == [
        (f"boolq of {other}", 4),
        (f"piqa of {other}", 4),
    ]
    lines = max(folder.glob("evaluations/*/predictions/reft_test.jsonl")).read_text().splitlines()
    assert {json.loads(line)["task"] for line in lines} == {"boolq", "piqa"}


def test_evaluations_are_reported_as_runs_are_and_their_reads_counted_once(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rate in (0.005, 0.01):
        folder = Path(f"run_{rate}")
        short_runs.run(data, folder.absolute(), "trainer.max_steps=2", "test=false", f"optimizer.lr={rate}")
        evaluate(folder, "test", rows=rows_of(data, "decoding.max_new_tokens=2"))
    made = build_report(
        [Path(f"run_{rate}", part) for rate in (0.005, 0.01) for part in (".", "evaluations")]
    )
    (comparison,) = (c for c in made.comparisons if c.split == "test")
    assert {method.label for method in comparison.methods} == {"loreft lr=0.005", "loreft lr=0.01"}
    assert len(made.reads) == 2


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            ["data=glue_rte"],
            "data=glue_rte: a model for commonsense .* cannot be evaluated on rows of kind classification",
        ),
        (["data=bolq"], "did you mean 'data=boolq'"),
        (["data=boolq", "data.tasks=[bolq]"], "did you mean 'boolq'"),
    ],
)
def test_other_rows_that_the_model_does_not_answer_are_refused_before_weights_are_loaded(
    finished, monkeypatch, rows, reason
):
    monkeypatch.setattr(build, "load_base_model", None)
    with pytest.raises(ValueError, match=reason):
        evaluate(finished[0], rows=rows)


def test_a_classifier_is_not_evaluated_on_rows_of_other_classes():
    config = short_runs.compose.compose(["model=tiny_random", "data=glue_rte"])
    assert on_other_rows(config, ["data=glue_rte", "data.limit_validation=3"]).data.limit_validation == 3
    with pytest.raises(
        ValueError, match="the run's model predicts entailment, not_entailment, but these rows have"
    ):
        on_other_rows(config, ["data=glue_mnli"])


def test_a_run_is_resumed_and_evaluated_from_another_folder_than_it_was_started_from(
    data, monkeypatch, tmp_path
):
    monkeypatch.chdir(data.parent)
    settings = short_runs.config(data.name, "trainer.max_epochs=1")
    as_given = dataclasses.asdict(settings)
    with monkeypatch.context() as patch:
        short_runs.stop_at(patch, 3)
        with pytest.raises(short_runs.Stop):
            experiment.run(settings, tmp_path / "run")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").data.path == str(data)
    assert dataclasses.asdict(settings) == as_given  # a configuration is read and never written
    monkeypatch.chdir(tmp_path)
    results = experiment.resume(tmp_path / "run")
    assert results["status"] == "complete"
    again = evaluate(tmp_path / "run")
    assert again["config_hash"] == results["config_hash"] == config_hash(settings)
    measured = {k: v for k, v in results["metrics"].items() if k.startswith("val/")}
    assert again["metrics"] == pytest.approx(measured)


def test_evaluating_again_gives_the_runs_own_scores(finished, monkeypatch):
    folder, results = finished
    monkeypatch.setenv("SLURM_NTASKS", "2")  # in the batch script of a job with two tasks
    again = evaluate(folder)
    assert again["test_reads"] == []
    assert all(again[name] == results[name] for name in ("seed", "method", "percent", "decoding"))
    measured = {k: v for k, v in results["metrics"].items() if k.startswith("val/")}
    assert again["metrics"] == pytest.approx(measured)
    assert again["counts"] == {k: v for k, v in results["counts"].items() if k.startswith("val/")}


def test_a_run_without_validation_rows_can_be_evaluated_on_its_test_rows_only(data, tmp_path, monkeypatch):
    results = short_runs.run(data, tmp_path, "data.validation_size=0", "test=false")
    assert (results["status"], results["steps"], results["test_reads"]) == ("complete", 16, [])
    assert not [name for name in results["metrics"] if name.startswith(("val/", "test/"))]
    assert short_runs.checkpoint(tmp_path)["global_step"] == 16
    with pytest.raises(ValueError, match=r"has no validation rows .*split=test"):
        evaluate(tmp_path)

    def stop(*_, **__):
        raise short_runs.Stop

    monkeypatch.setattr("reft_lightning.runs.evaluate.evaluate_split", stop)
    with pytest.raises(short_runs.Stop):
        evaluate(tmp_path, "test")
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert short_runs.results(folder)["status"] == "stopped"


def test_each_read_of_the_test_split_is_recorded_in_the_run(data, tmp_path):
    short_runs.run(data, tmp_path, "trainer.max_epochs=1")
    evaluate(tmp_path, "test")
    again = evaluate(tmp_path, "test", limit=3)
    results = short_runs.results(tmp_path)
    assert [read["rows"] for read in results["test_reads"]] == [6, 6, 3]
    assert again["counts"]["test/boolq/accuracy"]["total"] == 3
    assert len(list((tmp_path / "evaluations").iterdir())) == 2
    assert results["status"] == "complete"


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_gpu_that_is_not_here_is_refused_before_rows_are_read(data, monkeypatch, tmp_path, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(experiment, "build", lambda _: pytest.fail("rows were read"))
    with pytest.raises(
        experiment.SetupError, match=rf"trainer\.accelerator={name}: .* finds no GPU .* trainer=cpu"
    ):
        short_runs.run(data, tmp_path / "run", f"trainer.accelerator={name}")
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_into_memory_is_refused_in_one_line(data, monkeypatch, tmp_path, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(experiment, "build", too_large)
    argv = [*short_runs.arguments(data), f"hydra.run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["reft-train", *argv])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with short_runs.log_kept(), pytest.raises(SystemExit) as left:
        cli.train()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "out of memory (CUDA out of memory. Tried to allocate 2 GiB): model.dtype=bfloat16 or "
    )


def test_the_kind_of_gpu_that_is_here_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("gpu", "cuda", "auto", "cpu"):
        check_accelerator(name)
    with pytest.raises(ValueError, match="finds only cuda"):
        check_accelerator("mps")


def test_a_run_of_a_gpu_says_how_to_evaluate_it_without_one(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    text = (finished[0] / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("accelerator: cpu", "accelerator: gpu"))
    with pytest.raises(ValueError, match=r"set trainer\.accelerator to cpu in .*config\.yaml"):
        evaluate(tmp_path)


class Worsen(Callback):
    """Spoil the adapter after the first validation."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 9:
            with torch.no_grad():
                for parameter in module.model.interventions.parameters():
                    parameter.add_(torch.randn_like(parameter) * 5)


@pytest.fixture
def worsen(monkeypatch):
    original = trainer.build_callbacks
    monkeypatch.setattr(trainer, "build_callbacks", lambda *args: [Worsen(), *original(*args)])


def test_the_best_checkpoint_is_tested_and_saved_and_not_the_last(data, worsen, tmp_path):
    results = short_runs.run(data, tmp_path, *SETTINGS)
    best, last = short_runs.checkpoint(tmp_path, "best"), short_runs.checkpoint(tmp_path, "last")
    assert (best["global_step"], last["global_step"]) == (6, 12)
    assert results["best_step"] == 6
    losses = short_runs.logged(tmp_path, "val/loss")
    first, second = [losses[step] for step in sorted(losses)][:2]
    assert second > first + 0.01
    assert results["metrics"]["val/loss"] == pytest.approx(first)
    saved = load_adapter(tmp_path / "adapter")[1]
    for name, tensor in best["state_dict"].items():
        assert torch.equal(saved[name.removeprefix("adapter.")], tensor)


def test_the_last_checkpoint_is_kept_where_the_best_is_not_wanted(data, worsen, tmp_path):
    results = short_runs.run(data, tmp_path, *SETTINGS, "checkpoint.restore_best=false")
    assert "best_step" not in results
    saved = load_adapter(tmp_path / "adapter")[1]
    for name, tensor in short_runs.checkpoint(tmp_path)["state_dict"].items():
        assert torch.equal(saved[name.removeprefix("adapter.")], tensor)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(data, finished, tmp_path):
    _, results = finished
    again = short_runs.run(data, tmp_path / "again", *SETTINGS)
    other = short_runs.run(data, tmp_path / "other", *SETTINGS, "seed=43")
    timeless = [k for k in results["metrics"] if "per_second" not in k]
    assert {k: again["metrics"][k] for k in timeless} == {k: results["metrics"][k] for k in timeless}
    assert again["config_hash"] == results["config_hash"] != other["config_hash"]
    assert other["metrics"]["train/loss"] != results["metrics"]["train/loss"]
    # the split is its own seed's: all runs validate on the same rows
    assert other["data_versions"]["split"] == results["data_versions"]["split"]


def test_a_sealed_run_never_reads_the_test_split(data, tmp_path):
    (tmp_path / "rows" / "boolq").mkdir(parents=True)
    rows = json.loads((data / "boolq" / "train.json").read_text())
    (tmp_path / "rows" / "boolq" / "train.json").write_text(json.dumps(rows))
    results = short_runs.run(tmp_path / "rows", tmp_path / "run", "sealed=true", "evaluate_base=true")
    assert results["test_reads"] == []
    assert "val/accuracy" in results["metrics"]
    assert "base/val/accuracy" in results["metrics"]
    assert not [name for name in results["metrics"] if "test/" in name]
    with pytest.raises(ValueError, match="sealed"):
        evaluate(tmp_path / "run", "test")
    with pytest.raises(ValueError, match="got 'tset'; did you mean 'test'"):
        evaluate(tmp_path / "run", "tset")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_of_a_split_without_batches_nothing_is_written(data, tmp_path, split):
    limit = f"trainer.limit_{split.removesuffix('idation')}_batches=0"
    results = short_runs.run(data, tmp_path / "run", limit, "evaluate_base=true", "trainer.max_steps=1")
    others = {"validation": {"base_test", "reft_test"}, "test": {"base_validation", "reft_validation"}}[split]
    assert {path.stem for path in (tmp_path / "run/predictions").iterdir()} == others
    assert bool(results["test_reads"]) == (split == "validation")


def test_early_stopping_stops_early(data, worsen, tmp_path):
    overrides = ("checkpoint.early_stopping_patience=1", "trainer.max_epochs=6")
    results = short_runs.run(data, tmp_path, *SETTINGS, *overrides)
    assert results["steps"] == 12
    assert results["best_step"] == 6


# --- refused before weights are loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("intervention.layers=[0,7]", "7"),
        ("intervention.rank=33", r"rank must lie in 1\.\.32, the width of the representation; got 33"),
        ("intervention.positions=g3", "g3"),
        ("intervention.method=lorefd", "did you mean 'loreft'"),
        ("+intervention.options.rnak=2", "did you mean 'rank'"),
        ("intervention.tied=allof", "did you mean 'all'"),
        ("intervention.dropout=1.5", r"dropout must lie in \[0, 1\); got 1.5"),
        ("intervention.component=block_ouput", "did you mean 'block_output'"),
        ("data.tasks=[bolq]", "did you mean 'boolq'"),
        ("data.family=commonsens", "did you mean 'commonsense'"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
        (
            "data.validation_size=24",
            r"data\.validation_size must be smaller than the 24 distinct train prompts",
        ),
        ("optimizer.lr=0", "lr must be above 0; got 0"),
        ("scheduler.warmup_ratio=2", r"must be in 0\.\.1; got 2"),
        ("+optimizer.options.betas=[0.9]", r"optimizer: AdamW\(.*betas=\[0.9\]\) failed"),
        ("+optimizer.options.eps=-1", r"optimizer: AdamW\(.*eps=-1\) failed: Invalid epsilon"),
        ("trainer.val_check_interval=7", "val_check_interval=7 is more than the 6 batches of an epoch"),
        ("model.config.hidden_size=33", r"hidden size \(33\) is not a multiple"),
        ("model.config.num_attention_heads=0", "is not a valid model: .*division"),
        ("model.config.hidden_size=big", "expected int, got str"),
        ("model.config.model_type=lama", "no such architecture; did you mean 'llama'"),
        ("+model.config.num_hiden_layers=3", "no such setting; did you mean 'num_hidden_layers'"),
        ("model.attn_implementation=nope", "nope.. is not supported"),
        ("checkpoint.monitor=val/acuracy", "did you mean 'val/accuracy'"),
        ("checkpoint.monitor=val/piqa/accuracy", "got 'val/piqa/accuracy'"),
        (
            "intervention=none",
            r"intervention\.heads=auto\) for a classifier.*intervention\.heads=\[lm_head\]",
        ),
        ("intervention.heads=auto", r"LlamaForCausalLM is not a sequence classifier"),
        ("trainer.accelerator=abacus", "abacus"),
        ("trainer.precision=31", "31"),
        ("trainer.devices=nope", r"trainer: .*should be an int > 0"),
        ("trainer.max_time={hour: 3}", r"trainer: .*'hour'"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(data, no_weights, tmp_path, override, message):
    with pytest.raises((experiment.SetupError, CompositionError), match=message):
        short_runs.run(data, tmp_path / "run", override)
    assert not (tmp_path / "run" / "results.json").exists()


def test_what_is_advised_where_no_head_is_named_can_be_followed(data, tmp_path):
    head = ("intervention=none", "intervention.heads=[lm_head]", "trainer.max_epochs=1", "test=false")
    results = short_runs.run(data, tmp_path, *head)
    assert results["head_parameters"] > 0
    assert results["trainable_parameters"] == 0


def test_a_broken_line_of_the_rows_is_named(data, no_weights, tmp_path):
    (tmp_path / "boolq").mkdir()
    text = (data / "boolq" / "train.json").read_text().replace("}, {", "},\n{")
    lines = text.splitlines()
    lines[4] = lines[4].replace('"answer"', 'answer"')
    (tmp_path / "boolq" / "train.json").write_text("\n".join(lines))
    with pytest.raises(experiment.SetupError, match=r"train\.json, line 5: not JSON"):
        short_runs.run(tmp_path, tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        evaluate(tmp_path)


STOPPING = "checkpoint.early_stopping_patience=1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.validation_size=0", STOPPING], "early stopping needs validation rows"),
        (["trainer.enable_checkpointing=false", STOPPING], "enable_checkpointing=false writes none"),
    ],
)
def test_early_stopping_needs_validation_rows_and_checkpoints(data, no_weights, tmp_path, overrides, message):
    with pytest.raises(experiment.SetupError, match=message):
        short_runs.run(data, tmp_path, *overrides)


@pytest.mark.parametrize("random", [False, True])
def test_the_tokenizer_and_the_configuration_are_loaded_once(data, monkeypatch, tmp_path, random):
    settings = short_runs.config(data)
    if not random:
        model, tokenizer = load_base_model(**build.model_source(settings))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        settings.model.source, settings.model.path = "local", str(tmp_path)
        settings.model.config, settings.model.tokenizer = {}, None
    calls = []

    def count(name):
        original = getattr(loading, name)
        for owner in (o for o in (loading, arguments, build) if hasattr(o, name)):
            monkeypatch.setattr(
                owner, name, lambda *args, **kw: (calls.append(name), original(*args, **kw))[1]
            )

    count("load_config")
    count("load_tokenizer")
    build.build(settings)
    assert sorted(calls) == ["load_config", "load_tokenizer"]


def test_a_stopped_run_is_replaced_on_demand_only_and_resumed_as_it_began_only(data, tmp_path):
    short_runs.interrupt(data, tmp_path, 3)
    kept = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(experiment.SetupError, match=r"unfinished run: continue it with reft-train resume="):
        short_runs.run(data, tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == kept
    with pytest.raises(experiment.SetupError, match=r"optimizer.lr: 0.005 then, 0.1 now"):
        short_runs.run(data, tmp_path, "optimizer.lr=0.1", f"resume={tmp_path}")
    file = tmp_path / "config.yaml"
    began = file.read_text()
    file.write_text(began.replace("lr: 0.005", "lr: 0.5"))
    with pytest.raises(experiment.SetupError, match=r"config\.yaml was changed after it started"):
        experiment.resume(tmp_path)
    stopped = shutil.copytree(tmp_path, tmp_path.parent / "replaced")
    file.write_text(began.replace("log_every_n_steps: 1", "log_every_n_steps: 2"))  # changes no result
    assert began != file.read_text()
    assert experiment.resume(tmp_path)["status"] == "complete"
    assert short_runs.run(data, stopped, "overwrite=true", "test=false")["status"] == "complete"


def test_a_run_in_a_folder_of_other_things_leaves_them_alone(data, tmp_path):
    mine = [
        tmp_path / name
        for name in ("outputs/old/results.json", "checkpoints/mine.ckpt", "adapters/x", "notes.txt")
    ]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    for _ in range(2):
        short_runs.run(data, tmp_path, "trainer.max_epochs=1", "overwrite=true")
        assert all(file.read_text() == "mine" for file in mine)


def test_a_callback_may_write_to_the_logger_in_the_validation_after_training(data, tmp_path):
    class Writes(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.logger.log_metrics({"mine": 1.0}, step=trainer.global_step)

    results = experiment.run(short_runs.config(data, "trainer.max_epochs=1"), tmp_path, callbacks=[Writes()])
    assert results["status"] == "complete"


def test_a_run_that_stopped_early_does_not_train_on_when_it_is_resumed(data, monkeypatch, tmp_path):
    early = ("checkpoint.early_stopping_patience=1", "trainer.max_epochs=9", "optimizer.lr=1e-9")
    whole = short_runs.run(data, tmp_path / "whole", *early)
    assert whole["steps"] < 54
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate_split", lambda *_, **__: (_ for _ in ()).throw(short_runs.Stop()))
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path / "parts", *early)
    parts = short_runs.run(data, tmp_path / "parts", *early, f"resume={tmp_path / 'parts'}")
    assert (parts["steps"], parts["tokens"]) == (whole["steps"], whole["tokens"])


def test_a_complete_run_is_replaced_only_as_a_whole_and_on_demand(data, tmp_path):
    settings = ("trainer.max_epochs=1", "test=false")
    first = short_runs.run(data, tmp_path, "trainer.max_epochs=1")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(experiment.SetupError, match=r"holds a complete run: .*overwrite=true"):
        short_runs.run(data, tmp_path, *settings)
    with pytest.raises(experiment.SetupError, match="rank"):
        short_runs.run(data, tmp_path, *settings, "overwrite=true", "intervention.rank=99")
    assert short_runs.results(tmp_path) == first
    again = short_runs.run(data, tmp_path, *settings, "overwrite=true", "data.validation_size=0")
    assert again["config_hash"] != first["config_hash"]
    # neither predictions nor a best checkpoint of the first are left
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not list(tmp_path.rglob("best.ckpt"))
    assert len(short_runs.logged(tmp_path, "train/loss")) == again["steps"]
    assert (tmp_path / "notes.txt").is_file()


# --- crashes -------------------------------------------------------------------------------------------------------


def test_a_crash_in_training_keeps_what_was_computed_and_the_base_is_not_evaluated_again(
    data, monkeypatch, tmp_path, caplog
):
    short_runs.interrupt(data, tmp_path, 3, "evaluate_base=true")
    results = short_runs.results(tmp_path)
    assert results["status"] == "stopped"
    assert results["error"] == "Stop: stopped in call 3 of training_step"
    base = {k: v for k, v in results["metrics"].items() if k.startswith("base/")}
    assert "base/test/accuracy" in base
    assert [read["rows"] for read in results["test_reads"]] == [6]
    assert len(short_runs.predictions(tmp_path, "base_test")) == 6
    assert short_runs.checkpoint(tmp_path)["global_step"] == 3
    assert f"resume={tmp_path}" in caplog.text
    seen = []
    original = experiment.evaluate_split
    monkeypatch.setattr(
        experiment, "evaluate_split", lambda *args, **kw: (seen.append(kw), original(*args, **kw))[1]
    )
    results = short_runs.run(data, tmp_path, "evaluate_base=true", f"resume={tmp_path}")
    assert seen == [{}, {}]
    assert base.items() <= results["metrics"].items()
    assert [read["rows"] for read in results["test_reads"]] == [6, 6]


def test_a_crash_in_the_last_evaluation_can_be_continued_and_its_read_of_test_rows_is_recorded(
    data, finished, tmp_path
):
    short_runs.interrupt(data, tmp_path, 1, *SETTINGS[1:], where="test_step")
    results = short_runs.results(tmp_path)
    assert results["status"] == "stopped"
    assert results["metrics"]["val/loss"] == finished[1]["metrics"]["val/loss"]
    assert [read["rows"] for read in results["test_reads"]] == [6]
    trained = short_runs.checkpoint(tmp_path)["train_seconds"]
    again = short_runs.run(data, tmp_path, *SETTINGS[1:], f"resume={tmp_path}")
    assert 0 < trained == again["train_seconds"] <= results["train_seconds"]
    assert again["metrics"]["test/accuracy"] == finished[1]["metrics"]["test/accuracy"]
    assert again["best_step"] == finished[1]["best_step"]
    assert [read["rows"] for read in again["test_reads"]] == [6, 6]


def test_test_rows_are_not_read_again_by_a_run_that_was_killed_after_its_test(
    data, finished, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "peak_memory_bytes", lambda: (_ for _ in ()).throw(short_runs.Stop()))
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path, *SETTINGS[1:])
    killed = short_runs.results(tmp_path)
    assert killed["status"] == "stopped"

    def read(self):
        raise AssertionError("test rows were read again")

    monkeypatch.setattr(GenerationData, "_read_test", read)
    again = short_runs.run(data, tmp_path, *SETTINGS[1:], f"resume={tmp_path}")
    assert again["status"] == "complete"
    assert again["test_reads"] == killed["test_reads"]
    assert [read["rows"] for read in again["test_reads"]] == [6]
    for key in ("counts", "data_versions"):
        assert again[key] == killed[key]
    assert again["metrics"]["test/accuracy"] == finished[1]["metrics"]["test/accuracy"]


def test_a_head_in_float32_does_not_count_as_more_of_the_base(data, tmp_path):
    tied = ["+model.config.tie_word_embeddings=true", "trainer.max_steps=1", "test=false"]
    plain = short_runs.run(data, tmp_path / "float32", *tied)
    widened = short_runs.run(data, tmp_path / "bfloat16", *tied, "model.dtype=bfloat16")
    assert widened["base_parameters"] == plain["base_parameters"]
    assert widened["percent"] == plain["percent"]
