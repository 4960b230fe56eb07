"""Which checkpoint is selected: the best by the monitored score, and among ties the one with the lowest loss."""

from types import SimpleNamespace

import pytest

from reft_lightning.training.best_checkpoint import BestCheckpoint


class Training:
    """A trainer that only records the steps after which a checkpoint is written."""

    def __init__(self):
        self.state, self.sanity_checking, self.should_stop = SimpleNamespace(fn="fit"), False, False
        self.callback_metrics, self.global_step, self.saved = {}, 0, []

    def save_checkpoint(self, path, weights_only):
        self.saved.append(self.global_step)


def train(validations, mode="max", patience=None):
    """Validate after each step, until training is told to stop."""
    trainer, callback = Training(), BestCheckpoint("best.ckpt", "val/accuracy", mode, patience)
    for score, loss in validations:
        trainer.global_step += 1
        trainer.callback_metrics = {"val/accuracy": score, "val/loss": loss}
        callback.on_validation_end(trainer, None)
        if trainer.should_stop:
            break
    return trainer, callback


NAN = float("nan")


@pytest.mark.parametrize(
    ("validations", "mode", "saved"),
    [
        ([(0.0, 5.9), (0.0, 4.3), (0.0, 4.2), (0.0, 3.7), (0.0, 4.3), (0.0, 4.4)], "max", [1, 2, 3, 4]),
        ([(0.2, 3.0), (0.4, 5.0), (0.4, 4.0), (0.3, 1.0)], "max", [1, 2, 3]),
        ([(0.5, 2.0), (0.5, 2.0)], "max", [1]),
        ([(2.0, 2.0), (1.0, 1.0), (1.0, 1.0), (3.0, 3.0)], "min", [1, 2]),
        ([(NAN, 1.0), (0.0, 3.0), (NAN, 1.0), (0.0, NAN)], "max", [2]),
        ([(0.0, NAN), (0.0, 3.0)], "max", [1, 2]),
    ],
)
def test_a_score_counts_first_then_the_loss_then_which_came_first(validations, mode, saved):
    trainer, callback = train(validations, mode)
    assert trainer.saved == saved
    assert callback.best.step == saved[-1]


def test_training_goes_on_while_the_loss_falls_between_equal_scores():
    falling = [(0.0, 5.0 - step) for step in range(4)]
    trainer, _ = train([*falling, (0.0, 9.0), (0.0, 8.0), (0.0, 7.0)], patience=2)
    assert trainer.should_stop
    assert trainer.global_step == 6


def test_a_resumed_training_goes_on_waiting():
    _, callback = train([(0.5, 1.0), (0.4, 1.0)])
    resumed = BestCheckpoint("best.ckpt", "val/accuracy", "max", 2)
    resumed.load_state_dict(callback.state_dict())
    trainer = Training()
    trainer.callback_metrics = {"val/accuracy": 0.5, "val/loss": 1.5}
    resumed.on_validation_end(trainer, None)
    assert trainer.should_stop
    assert not trainer.saved
    assert resumed.best == callback.best


@pytest.mark.parametrize(
    ("validations", "said"),
    [
        ([(0.0, 5.0), (0.0, 4.0)], "tie in val/accuracy at 0.0000 (2 of 2 validations), broken by val/loss, 4.0000"),
        ([(0.1, 5.0), (0.2, 6.0)], "highest val/accuracy of 2 validations, 0.2000"),
        ([(0.1, 5.0)], "the only validation, val/accuracy 0.1000"),
    ],
)  # fmt: skip
def test_the_reason_names_the_measure_and_what_broke_a_tie(validations, said):
    assert train(validations)[1].reason() == said


def test_validations_outside_of_training_choose_nothing():
    trainer, callback = Training(), BestCheckpoint("best.ckpt", "val/accuracy", "max")
    trainer.state.fn, trainer.callback_metrics = "validate", {"val/accuracy": 1.0, "val/loss": 0.0}
    callback.on_validation_end(trainer, None)
    assert callback.best is None
    assert not trainer.saved
