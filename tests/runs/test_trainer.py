"""What Lightning and Hydra users expect: every Trainer argument; callbacks, loggers, optimizers by import path."""

import dataclasses
import inspect
import logging
import math

import lightning
import pytest
import short_runs
import torch
import yaml
from safetensors.torch import load_file

from reft_lightning.config.compose import CompositionError
from reft_lightning.config.schema import TrainerConfig
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.runs.experiment import SetupError

# Where our default is not Lightning's.
OURS = {
    "devices": 1, "precision": "32-true", "max_epochs": 6, "num_sanity_val_steps": 0, "log_every_n_steps": 10,
    "enable_progress_bar": True, "enable_model_summary": False, "gradient_clip_val": 1.0, "deterministic": False,
    "use_distributed_sampler": False,
}  # fmt: skip


def test_every_argument_of_the_trainer_is_a_key():
    theirs = inspect.signature(lightning.Trainer.__init__).parameters
    defaults = {n: p.default for n, p in theirs.items() if n not in ("self", "callbacks", "logger")}
    assert dataclasses.asdict(TrainerConfig()) == defaults | OURS


def test_a_fast_dev_run_goes_through_all_stages_and_leaves_no_checkpoint(data, tmp_path):
    results = short_runs.run(data, tmp_path, "trainer.fast_dev_run=true")
    assert (results["status"], results["steps"]) == ("complete", 1)
    assert {"val/loss", "test/accuracy"} <= set(results["metrics"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_callbacks_are_added_by_their_import_path(data, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from lightning import Callback\n"
        "class Count(Callback):\n"
        "    def __init__(self, path, name='steps'):\n"
        "        self.path, self.name = path, name\n"
        "    def on_train_end(self, trainer, module):\n"
        "        with open(self.path, 'w') as file:\n"
        "            file.write(f'{self.name} {trainer.global_step}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    written = tmp_path / "count.txt"
    entry = ["+callbacks.count._target_=mine.Count", f"+callbacks.count.path={written}"]
    short_runs.run(data, tmp_path / "run", *entry, "callbacks=device_stats", "trainer.max_steps=2")
    assert written.read_text() == "steps 2"
    assert (
        "DeviceStatsMonitor.on_train_batch_start/cpu_percent"
        in (tmp_path / "run/csv/metrics.csv").read_text()
    )


def test_several_loggers_are_chosen_by_a_list_and_given_what_identifies_a_run(data, tmp_path):
    pytest.importorskip("tensorboard", reason="logger=tensorboard needs pip install tensorboard")
    short_runs.run(data, tmp_path, "logger=[csv,tensorboard]", "trainer.max_steps=2")
    assert (tmp_path / "csv" / "metrics.csv").is_file()
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    settings = yaml.safe_load((tmp_path / "tensorboard" / "hparams.yaml").read_text())
    assert settings["method"] == "loreft"
    assert settings["optimizer"]["lr"] == 5e-3
    assert settings["config_hash"] == short_runs.results(tmp_path)["config_hash"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+callbacks.x._target_=lightning.pytorch.callbacks.DeviceStatMonitor"],
            "did you mean 'DeviceStatsMonitor'",
        ),
        (["+callbacks.x._target_=lightnin.Callback"], "callbacks.x: cannot import lightnin"),
        (["+callbacks.x._target_=torch.nn.Identity"], "callbacks.x must be a Callback of lightning"),
        (["+callbacks.x.monitor=val/loss"], r"callbacks.x needs a _target_"),
        (
            ["+callbacks.x._target_=lightning.pytorch.callbacks.DeviceStatsMonitor", "+callbacks.x.cpu=1"],
            "'cpu'",
        ),
        (
            ["logger=wandb", "logger.wandb.mode=onlin"],
            "mode must be one of online, offline, disabled; got 'onlin'",
        ),
        (["logger=tensorbord"], "did you mean 'logger=tensorboard'"),
        (["logger=wandb", "logger.wandb.projct=a"], r"did you mean 'logger\.wandb\.project'"),
        (["optimizer._target_=torch.optim.AdmW"], r"optimizer\._target_.*did you mean 'AdamW'"),
        (["+optimizer.options.beta=1"], "AdamW does not take 'beta'; did you mean 'betas'"),
        (["scheduler._target_=reft_lightning.training.schedules.cosin"], "did you mean 'cosine'"),
        (["trainer.fast_dev_rn=true"], r"did you mean 'trainer\.fast_dev_run'"),
        (["trainer.profiler=simpel"], "simple"),
    ],
)
def test_a_typo_is_answered_before_a_weight_is_loaded(data, tmp_path, no_weights, overrides, message):
    with pytest.raises((SetupError, CompositionError), match=message):
        short_runs.run(data, tmp_path, *overrides)


CALLBACK = "+callbacks.x._target_=lightning.pytorch.callbacks"
PLUGIN = "+trainer.plugins._target_=lightning.pytorch.plugins"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer._target_=torch.optim.LBFGS"], "LBFGS.* failed: .*parameter groups"),
        (["optimizer._target_=torch.optim.Muon"], "Muon.* failed: .*2D"),
        (["scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau", "scheduler.warmup_ratio=0"],
         "needs a score"),
        (["trainer.max_epochs=-1"], "needs the total number of steps"),
        (["trainer.max_epochs=null", "+trainer.max_time.hours=1"], "needs the total number of steps"),
        ([f"{CALLBACK}.EMAWeightAveraging"], "EMAWeightAveraging also averages the frozen base"),
        ([f"{CALLBACK}.StochasticWeightAveraging", "+callbacks.x.swa_lrs=1e-3"], "add checkpoint.restore_best=false"),
        ([f"{CALLBACK}.ModelPruning", "+callbacks.x.pruning_fn=l1_unstructured"], "of the frozen base to 0"),
        ([f"{CALLBACK}.BackboneFinetuning"], "intervention=full trains all of it"),
        ([f"{CALLBACK}.LearningRateFinder"], "try several with -m optimizer.lr"),
        ([f"{CALLBACK}.BatchSizeFinder"], "set data.batch_size"),
        ([f"{CALLBACK}.OnExceptionCheckpoint", "+callbacks.x.dirpath=."], "reft-train resume=FOLDER"),
        ([f"{CALLBACK}.EarlyStopping", "+callbacks.x.monitor=val_loss"], "did you mean 'val/loss'"),
        ([f"{CALLBACK}.ModelCheckpoint", "+callbacks.x.monitor=val/acc"], "did you mean 'val/accuracy'"),
        ([f"{CALLBACK}.EarlyStopping", "+callbacks.x.monitor=val/loss", "data.validation_size=0"],
         "needs validation rows"),
        ([f"{CALLBACK}.EarlyStopping", "+callbacks.x.monitor=val/loss", "trainer.limit_val_batches=0"],
         "leave out trainer.limit_val_batches=0"),
        (["checkpoint.early_stopping_patience=1", "trainer.limit_val_batches=0"],
         "leave out trainer.limit_val_batches=0"),
        ([f"{CALLBACK}.GradientAccumulationScheduler", "+callbacks.x.scheduling={0:2}",
          "trainer.accumulate_grad_batches=2"], "leave out trainer.accumulate_grad_batches"),
        (["trainer.precision=null", f"{PLUGIN}.HalfPrecision", "+trainer.plugins.precision=bf16-true"],
         "load the base in another dtype"),
        (["trainer.precision=null", f"{PLUGIN}.DoublePrecision"], "load the base in another dtype"),
        (["trainer.limit_train_batches=0.1"], "limit_train_batches=0.1 of 6 batches is less than one"),
        (["trainer.limit_val_batches=0.1"], "limit_val_batches=0.1 of 2 batches is less than one"),
        (["trainer.limit_test_batches=0.1"], "limit_test_batches=0.1 of 2 batches is less than one"),
        (["trainer.overfit_batches=0.2"], "overfit_batches=0.2 of 2 batches is less than one"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval=0 is not allowed"),
        (["+optimizer.options.weight_decay=0.1"], "set optimizer.weight_decay=0.1"),
        (["logger=wandb", "logger.wandb.mode=disabled", "+logger.wandb.projct=x"], "did you mean 'project'"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused_before_a_weight_is_loaded(
    data, tmp_path, no_weights, overrides, message
):
    with pytest.raises(SetupError, match=message):
        short_runs.run(data, tmp_path, *overrides)


def test_what_profilers_and_callbacks_report_is_logged(data, tmp_path, caplog):
    lightning_log = logging.getLogger("lightning.pytorch")
    lightning_log.addHandler(caplog.handler)
    stops = [f"{CALLBACK}.EarlyStopping", "+callbacks.x.monitor=val/loss", "+callbacks.x.verbose=true"]
    summary = "+callbacks.s._target_=lightning.pytorch.callbacks.ModelSummary"
    try:
        short_runs.run(data, tmp_path, "trainer.profiler=simple", *stops, summary)
    finally:
        lightning_log.removeHandler(caplog.handler)
    for words in ("Profiler Report", "Metric val/loss improved", "Trainable params"):
        assert words in caplog.text
    assert "GPU available" not in caplog.text


def test_callbacks_may_watch_what_others_log(data, tmp_path, monkeypatch):
    (tmp_path / "logs.py").write_text(
        "from lightning import Callback\n"
        "class Logs(Callback):\n"
        "    def on_validation_epoch_end(self, trainer, module):\n"
        "        module.log('val/mine', 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stops = [f"{CALLBACK}.EarlyStopping", "+callbacks.x.patience=1"]
    own = ["+callbacks.own._target_=logs.Logs", "+callbacks.x.monitor=val/mine", "trainer.max_epochs=4"]
    assert short_runs.run(data, tmp_path / "own", *stops, *own)["steps"] == 12
    edits = ["callbacks=edit_norms", "+callbacks.x.monitor=edit/mean", "trainer.max_epochs=1"]
    assert short_runs.run(data, tmp_path / "edits", *stops, *edits)["status"] == "complete"


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
def test_averages_count_where_no_checkpoint_is_restored(data, tmp_path, monkeypatch):
    averaged = []

    class Averaged(lightning.pytorch.callbacks.StochasticWeightAveraging):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            averaged.append({name: t.clone() for name, t in pl_module.model.adapter_state_dict().items()})

    monkeypatch.setattr(lightning.pytorch.callbacks, "StochasticWeightAveraging", Averaged)
    average = [f"{CALLBACK}.StochasticWeightAveraging", "+callbacks.x.swa_lrs=1e-2", "scheduler=constant"]
    short_runs.run(data, tmp_path, *average, "trainer.max_epochs=3", "checkpoint.restore_best=false")
    saved = load_file(tmp_path / "adapter" / "reft.safetensors")
    assert averaged[0].keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged[0].items())


def test_another_optimizer_is_one_override(data, tmp_path):
    results = short_runs.run(
        data, tmp_path, "optimizer=adafactor", "scheduler=cosine", "trainer.limit_train_batches=1"
    )
    assert results["steps"] == 2  # one batch in each of two epochs
    state = short_runs.checkpoint(tmp_path)["optimizer_states"][0]
    assert [group["name"] for group in state["param_groups"]] == ["rotation", "weight", "bias"]
    assert results["status"] == "complete"


def test_an_optimizer_of_ones_own_is_found_by_its_import_path(data, tmp_path, monkeypatch):
    (tmp_path / "steps.py").write_text(
        "import torch\n"
        "class Doubled(torch.optim.SGD):\n"
        "    def __init__(self, groups, lr, factor=2.0):\n"
        "        super().__init__([g | {'lr': factor * g['lr']} for g in groups], lr=lr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    short = ["scheduler=constant", "scheduler.warmup_ratio=0", "trainer.max_epochs=1", "test=false"]
    own = ["optimizer._target_=steps.Doubled", "+optimizer.options.factor=4.0", *short]
    found = short_runs.run(data, tmp_path / "own", *own)
    plain = short_runs.run(data, tmp_path / "sgd", "optimizer._target_=torch.optim.SGD", *short)
    assert found["status"] == "complete"
    assert found["metrics"]["train/loss"] != plain["metrics"]["train/loss"]
    assert math.isfinite(found["metrics"]["val/loss"])


def test_an_evaluation_imports_nothing_that_the_folder_names_for_training(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    results = short_runs.run(data, run, "trainer.max_steps=2")
    (tmp_path / "stranger.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = run / "config.yaml"
    text = config.read_text().replace("torch.optim.AdamW", "stranger.Optimizer")
    text = text.replace("callbacks: {}", "callbacks: {one: {_target_: stranger.Callback}}")
    config.write_text(text.replace("logger: {}", "logger: {one: {_target_: stranger.Logger}}"))
    assert config.read_text().count("stranger.") == 3
    again = evaluate(run)["metrics"]
    assert again == {name: value for name, value in results["metrics"].items() if name.startswith("val/")}
