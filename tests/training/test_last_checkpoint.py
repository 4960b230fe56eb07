"""An interrupted run, resumed, is the uninterrupted run: bit for bit."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import short_runs
import torch
from lightning.pytorch.loggers import CSVLogger

from reft_lightning import ReftModel, cli
from reft_lightning.runs import experiment

# dropout needs the random numbers, the clipped gradients and the warm-up need the step
SETTINGS = ("intervention.dropout=0.3", "trainer.val_check_interval=4", "optimizer.weight_decay=0.1")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The uninterrupted run: 2 epochs of 6 steps, validated after step 4 of each."""
    folder = tmp_path_factory.mktemp("whole")
    short_runs.run(data, folder, *SETTINGS)
    return folder


def assert_same_run(folder, whole):
    left, right = short_runs.checkpoint(folder), short_runs.checkpoint(whole)
    assert left["global_step"] == right["global_step"]
    assert left["epoch"] == right["epoch"]
    assert left["tokens"] == right["tokens"]
    for name, tensor in right["state_dict"].items():
        assert torch.equal(left["state_dict"][name], tensor), name
    for key, state in right["optimizer_states"][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(left["optimizer_states"][0]["state"][key][name], tensor), (key, name)
    obtained, expected = short_runs.results(folder), short_runs.results(whole)
    assert obtained["status"] == expected["status"] == "complete"
    for name, value in expected["metrics"].items():
        if "seconds" not in name and "per_second" not in name:
            assert obtained["metrics"][name] == value, name
    assert obtained["best_step"] == expected["best_step"]
    assert obtained["tokens"] == expected["tokens"]
    assert "error" not in obtained
    assert "stopped" not in obtained


def interrupt(data, folder, batch, *settings, where="training_step"):
    short_runs.interrupt(data, folder, batch, *settings, where=where)
    assert short_runs.results(folder)["status"] == "stopped"


def resume(data, folder, *settings):
    return short_runs.run(data, folder, *settings, f"resume={folder}")


# 12 batches; 4 comes right after a validation, 6 is the first of an epoch, 11 its last
@pytest.mark.parametrize("batch", [4, 6, 11])
def test_after_an_exception_the_batch_is_read_again(data, whole, tmp_path, batch):
    interrupt(data, tmp_path, batch, *SETTINGS)
    resume(data, tmp_path, *SETTINGS)
    assert_same_run(tmp_path, whole)
    assert short_runs.logged(tmp_path, "train/loss") == short_runs.logged(whole, "train/loss")


def test_after_an_exception_in_the_last_batch_of_an_epoch_right_after_a_validation_it_is_read_again(
    data, tmp_path
):
    settings = (*SETTINGS, "trainer.val_check_interval=5", "test=false")
    short_runs.run(data, tmp_path / "whole", *settings)
    interrupt(data, tmp_path / "run", 5, *settings)
    resume(data, tmp_path / "run", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# the log's advice if one of them died
def test_a_run_goes_on_without_processes_that_read_rows(data, whole, tmp_path):
    interrupt(data, tmp_path, 3, *SETTINGS, "data.num_workers=2")
    resume(data, tmp_path, *SETTINGS, "data.num_workers=0")
    assert_same_run(tmp_path, whole)


# batches 4 and 5 of the first epoch are never read; 4 is now the first of the second
def test_after_epochs_that_are_cut_short_the_next_begins_with_its_own_rows(data, tmp_path):
    cut = (*SETTINGS, "trainer.limit_train_batches=4")
    short_runs.run(data, tmp_path / "whole", *cut)
    interrupt(data, tmp_path / "cut", 4, *cut)
    resume(data, tmp_path / "cut", *cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_after_an_exception_in_a_validation_it_starts_again(data, whole, tmp_path):
    # 2 validations of 2 batches
    interrupt(data, tmp_path, 3, *SETTINGS, where="validation_step")
    resume(data, tmp_path, *SETTINGS)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("interval", "step"), [(4, 3), (4, 9), (6, 5), (6, 11)]
)  # within an epoch, and at its end
def test_after_an_exception_between_a_batch_and_its_validation_it_is_validated(
    data, tmp_path, monkeypatch, interval, step
):
    settings = (*SETTINGS, f"trainer.val_check_interval={interval}")
    original = CSVLogger.log_metrics

    def stops(self, metrics, step):  # the batch's metrics are logged before the validation
        if "train/loss" in metrics and step == last:
            raise KeyboardInterrupt
        original(self, metrics, step)

    last = step
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "log_metrics", stops)
        with pytest.raises(SystemExit):
            short_runs.run(data, tmp_path / "run", *settings)
    resume(data, tmp_path / "run", *settings)
    short_runs.run(data, tmp_path / "whole", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_was_stopped_while_it_wrote_its_best_checkpoint_has_it_at_the_end(
    data, tmp_path, monkeypatch
):
    from reft_lightning.training.checkpoint_files import WholeCheckpoints

    settings = (*SETTINGS, "trainer.max_epochs=1")  # one validation
    original = WholeCheckpoints.save_checkpoint

    def stops(self, checkpoint, path, **options):
        if path.name == "best.ckpt":
            raise short_runs.Stop
        original(self, checkpoint, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(WholeCheckpoints, "save_checkpoint", stops)
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path / "run", *settings)
    resume(data, tmp_path / "run", *settings)
    short_runs.run(data, tmp_path / "whole", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (
        short_runs.results(tmp_path / "run")["chosen_by"]
        == short_runs.results(tmp_path / "whole")["chosen_by"]
    )


def test_a_run_stopped_twice_is_the_same_run(data, whole, tmp_path):
    interrupt(data, tmp_path, 2, *SETTINGS)
    interrupt(data, tmp_path, 3, *SETTINGS, f"resume={tmp_path}")
    resume(data, tmp_path, *SETTINGS)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("kept", [4, 6])
def test_a_killed_run_goes_on_from_its_last_checkpoint(data, whole, tmp_path, monkeypatch, kept):
    # copies of the checkpoint at every even step as it is written; the one at the step "kept" survives the kill
    from reft_lightning.training.last_checkpoint import LastCheckpoint

    settings = (*SETTINGS, "checkpoint.every_n_steps=2")
    save = LastCheckpoint._save

    def save_until(self, trainer):
        if trainer.global_step <= kept and not self._validating:
            save(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_until)
        short_runs.run(data, tmp_path, *settings)
    assert short_runs.checkpoint(tmp_path)["global_step"] == kept
    (tmp_path / "results.json").unlink()
    resume(data, tmp_path, *settings)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ((), [6, 6, 12, 12]),  # before and after the validation at the end of each epoch
        (("trainer.val_check_interval=4",), [4, 4, 6, 10, 10, 12]),  # and after each epoch
        (("data.validation_size=0", "data.limit_train=18"), [6, 12]),
        (("data.validation_size=0", "data.limit_train=18", "checkpoint.every_n_steps=4"), [4, 6, 8, 12]),
    ],
)
def test_each_reason_to_write_the_checkpoint_writes_it_once(data, tmp_path, monkeypatch, settings, steps):
    from reft_lightning.training.checkpoint_files import WholeCheckpoints

    written, save = [], WholeCheckpoints.save_checkpoint

    def noting(self, checkpoint, path, **options):
        if path.name == "last.ckpt":
            written.append(checkpoint["global_step"])
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", noting)
    short_runs.run(data, tmp_path, *settings)
    assert written == steps
    assert short_runs.checkpoint(tmp_path)["global_step"] == 12


SCHEDULER = "lightning.pytorch.callbacks.GradientAccumulationScheduler"


def test_accumulation_that_changes_between_epochs_is_that_of_the_epoch(data, tmp_path):
    scheduled = (f"+callbacks.x._target_={SCHEDULER}", "+callbacks.x.scheduling={0:1,1:2}")
    settings = ("intervention.dropout=0.3", *scheduled, "test=false")
    short_runs.run(data, tmp_path / "whole", *settings)
    interrupt(data, tmp_path / "run", 8, *settings)
    assert short_runs.checkpoint(tmp_path / "run")["global_step"] == 7  # in the second epoch
    resume(data, tmp_path / "run", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_a_callback_ended_early_takes_no_further_step_if_resumed(data, tmp_path):
    stopping = (
        "+callbacks.x._target_=lightning.pytorch.callbacks.EarlyStopping",
        "+callbacks.x.monitor=val/loss",
    )
    settings = (*stopping, "+callbacks.x.patience=1", "+callbacks.x.min_delta=1", "trainer.max_epochs=4")
    interrupt(data, tmp_path, 0, *settings, where="test_step")
    assert short_runs.checkpoint(tmp_path)["global_step"] == 12
    assert resume(data, tmp_path, *settings)["steps"] == 12


def test_a_run_that_was_killed_after_an_epoch_tells_callbacks_that_the_next_one_starts(
    data, whole, tmp_path, monkeypatch
):
    from lightning import Callback

    from reft_lightning.training.last_checkpoint import LastCheckpoint

    class Notes(Callback):
        def on_train_epoch_start(self, trainer, module):
            starts.append((trainer.current_epoch, trainer.global_step))

    starts = []
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_exception", lambda *_: None)
        interrupt(data, tmp_path, 8, *SETTINGS)
    experiment.run(short_runs.config(data, *SETTINGS, f"resume={tmp_path}"), tmp_path, callbacks=[Notes()])
    assert starts == [(1, 6)]
    assert_same_run(tmp_path, whole)


def test_gradients_of_a_step_in_progress_are_kept(data, tmp_path):
    settings = ("trainer.accumulate_grad_batches=4", "intervention.dropout=0.3", "trainer.max_epochs=2")
    short_runs.run(data, tmp_path / "whole", *settings)
    # 6 batches per epoch are 2 steps, of 4 and 2 batches; batch 9 is within the third step
    interrupt(data, tmp_path / "run", 9, *settings)
    resume(data, tmp_path / "run", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("run", "whole")]
    assert losses[0] == losses[1]


def test_evaluating_the_base_or_validating_more_often_changes_no_training_step(data, whole, tmp_path):
    short_runs.run(data, tmp_path, *SETTINGS, "evaluate_base=true", "trainer.val_check_interval=2")
    left, right = short_runs.checkpoint(tmp_path), short_runs.checkpoint(whole)
    for name, tensor in right["state_dict"].items():
        assert torch.equal(left["state_dict"][name], tensor), name


def test_a_folder_without_a_run_cannot_go_on(data, tmp_path):
    with pytest.raises(experiment.SetupError, match=r"there is no run to continue"):
        resume(data, tmp_path)


LONG = ("intervention.dropout=0.3", "trainer.max_epochs=60")


def stop_process(signal_number, ready, cwd, root, *arguments):
    """Start reft-train, send it a signal when a file is ready; return its exit status."""
    command = [sys.executable, "-m", "reft_lightning.cli", *arguments]
    before = ready.stat().st_mtime_ns if ready.is_file() else 0
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (ready.is_file() and ready.stat().st_mtime_ns > before) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_a_run_told_to_stop_says_so_and_goes_on(data, tmp_path, root):
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    began = [*short_runs.arguments(data), *LONG, f"hydra.run.dir={run}"]
    steps = []
    for number, status, arguments in (
        (signal.SIGTERM, 143, began), (signal.SIGTERM, 143, [f"resume={run}"]), (signal.SIGINT, 130, [f"resume={run}"])
    ):  # fmt: skip
        assert stop_process(number, last, tmp_path, root, *arguments) == status
        stopped = short_runs.results(run)
        assert (stopped["status"], stopped["signal"]) == ("stopped", signal.Signals(number).name)
        assert stopped["error"].startswith(stopped["signal"])
        steps.append(short_runs.checkpoint(run)["global_step"])
    assert 0 < steps[0] <= steps[1] <= steps[2] < 360
    assert "signal" not in resume(data, run, *LONG)
    short_runs.run(data, tmp_path / "whole", *LONG)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("where", ["training_step", "validation_step", "test_step", "on_test_end"])
def test_a_signal_ends_a_run_with_its_status_wherever_it_comes(data, tmp_path, monkeypatch, where):
    from reft_lightning.training.generation import GenerationModule

    original = getattr(GenerationModule, where)

    def told(self, *args, **kwargs):
        if not (where == "training_step" and self.trainer.global_step < 5):  # the last batch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(GenerationModule, where, told)
        with pytest.raises(SystemExit) as left:
            short_runs.run(data, tmp_path, "trainer.max_epochs=1")
    assert left.value.code == 143
    assert short_runs.results(tmp_path)["signal"] == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == handler
    assert resume(data, tmp_path, "trainer.max_epochs=1")["status"] == "complete"


def test_a_signal_to_all_processes_ends_a_run_with_its_status(data, tmp_path, monkeypatch):
    """Data-loading processes die of it, too, and torch raises so before Lightning's loop ends after its batch."""
    from reft_lightning.training.generation import GenerationModule

    def told(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    with monkeypatch.context() as patch:
        patch.setattr(GenerationModule, "training_step", told)
        with pytest.raises(SystemExit) as left:
            short_runs.run(data, tmp_path)
    assert left.value.code == 143
    assert short_runs.results(tmp_path)["signal"] == "SIGTERM"
    assert resume(data, tmp_path)["status"] == "complete"


def test_a_signal_between_two_stages_ends_a_run_with_its_status(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ReftModel, "save_pretrained", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        short_runs.run(data, tmp_path)
    assert left.value.code == 143
    assert short_runs.results(tmp_path)["signal"] == "SIGTERM"


def test_resume_alone_goes_on_under_the_configuration_of_the_folder(data, whole, tmp_path, monkeypatch):
    interrupt(data, tmp_path, 3, *SETTINGS)
    monkeypatch.setattr(sys, "argv", ["reft-train", f"resume={tmp_path}"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with short_runs.log_kept():
        cli.train()
    assert_same_run(tmp_path, whole)


def test_a_complete_run_is_not_resumed(whole, monkeypatch, capsys):
    before, parts = short_runs.results(whole), sorted(whole.iterdir())
    monkeypatch.setattr(sys, "argv", ["reft-train", f"resume={whole}"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        cli.train()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"resume={whole}: the run is already complete" in said
    assert f"reft-eval run={whole}" in said
    assert (short_runs.results(whole), sorted(whole.iterdir())) == (before, parts)


@pytest.mark.parametrize("what", ["parameters", "gradients"])
def test_what_is_no_longer_finite_is_not_written_over_the_last_good_checkpoint(
    data, tmp_path, monkeypatch, what
):
    from reft_lightning.training.generation import GenerationModule

    accumulated = ("trainer.accumulate_grad_batches=2",) if what == "gradients" else ()
    original = GenerationModule.on_after_backward

    def broken(self):
        original(self)
        if self.trainer.global_step == (1 if accumulated else 4):  # of gradients: in the middle of a step
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("nan"))

    often = ("trainer.max_epochs=1", "trainer.val_check_interval=1", "checkpoint.every_n_steps=1")
    settings = (*SETTINGS[:1], *accumulated, *often)
    with monkeypatch.context() as patch:
        patch.setattr(GenerationModule, "on_after_backward", broken)
        with pytest.raises((FloatingPointError, torch.linalg.LinAlgError)):
            short_runs.run(data, tmp_path / "run", *settings)
    kept = short_runs.checkpoint(tmp_path / "run")
    for tensors in (kept["state_dict"], kept["callbacks"]["LastCheckpoint"]["gradients"]):
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    resume(data, tmp_path / "run", *settings)
    short_runs.run(data, tmp_path / "whole", *settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_has_logged_every_step_that_it_does_not_take_again(data, tmp_path):
    from lightning import Callback

    class Looks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step > 1:
                saved = short_runs.checkpoint(tmp_path)["global_step"]
                assert sorted(short_runs.logged(tmp_path, "train/loss"))[-1] >= saved - 1
                seen.append(saved)

    seen = []
    experiment.run(
        short_runs.config(data, "checkpoint.every_n_steps=1", "test=false"), tmp_path, callbacks=[Looks()]
    )
    assert len(set(seen)) > 8


def test_a_run_that_was_killed_after_its_last_step_keeps_the_loss_and_tokens_of_training(
    data, tmp_path, monkeypatch
):
    from reft_lightning.runs.results import Results

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "check_told_to_stop", lambda *_: (_ for _ in ()).throw(short_runs.Stop()))
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path, "test=false")
    assert "train/loss" not in Results.read(tmp_path).values["metrics"]
    resumed = resume(data, tmp_path, "test=false")
    assert resumed["metrics"]["train/loss"] > 0
    assert resumed["tokens"] == short_runs.checkpoint(tmp_path)["tokens"] > 0
    assert resumed["tokens_per_second"] > 0
