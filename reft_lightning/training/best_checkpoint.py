"""`best.ckpt`, the checkpoint that validation selects, and early stopping.

The monitored score decides, and the loss breaks ties: if answers are generated, many runs score 0 in every validation,
and their first checkpoint would win. If both are equal, the first checkpoint is kept. Early stopping uses the same
criterion.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

LOSS = "val/loss"


class Validation(NamedTuple):
    """The result of one validation during training, after a number of optimizer steps."""

    step: int
    score: float
    loss: float


class BestCheckpoint(Checkpoint):
    """Write ``best.ckpt`` after each validation that is better than all before, and stop when there is no improvement.

    Args:
        path: path of the file.
        monitor: name of the score that decides, such as ``val/accuracy``.
        mode: ``max`` or ``min``.
        patience: stop training after this many validations in a row without improvement; None for no early stopping.

    Attributes:
        validations: the validations so far.
    """

    def __init__(self, path: Path, monitor: str, mode: str, patience: int | None = None) -> None:
        super().__init__()
        self.path, self.monitor, self.mode, self.patience = path, monitor, mode, patience
        self.validations: list[Validation] = []

    @property
    def best(self) -> Validation | None:
        """Return the best validation, the first one if tied; None before the first whose score is not NaN."""
        numbers = [v for v in self.validations if not math.isnan(v.score)]
        sign = -1 if self.mode == "max" else 1
        return min(numbers, key=lambda v: (sign * v.score, math.isnan(v.loss), v.loss), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that had run out of patience before it was interrupted."""
        self._stop_if_out_of_patience(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this is the best validation so far; stop training if the best is too long ago."""
        fast = getattr(trainer, "fast_dev_run", False)
        if trainer.state.fn != "fit" or trainer.sanity_checking or fast:
            return
        found = trainer.callback_metrics
        if self.monitor not in found:
            raise ValueError(f"checkpoint.monitor={self.monitor}: no validation row has this score")
        score, loss = (float(found[name]) for name in (self.monitor, LOSS))
        if self.validations and self.validations[-1].step == trainer.global_step:
            self.validations.pop()  # from a run interrupted during it, perhaps before the file was written
        self.validations.append(Validation(trainer.global_step, score, loss))
        if self.best is self.validations[-1]:
            trainer.save_checkpoint(self.path, weights_only=False)
        self._stop_if_out_of_patience(trainer)

    def _stop_if_out_of_patience(self, trainer: Trainer) -> None:
        up_to_best = self.validations.index(self.best) + 1 if self.best else 0
        if self.patience is not None and len(self.validations) - up_to_best >= self.patience:
            trainer.should_stop = True

    def reason(self) -> str:
        """Return why the best validation was selected."""
        best, count = self.best, len(self.validations)
        assert best is not None
        if count == 1:
            return f"the only validation, {self.monitor} {best.score:.4f}"
        ties = sum(validation.score == best.score for validation in self.validations)
        if ties == 1 or self.monitor == LOSS:
            which = "highest" if self.mode == "max" else "lowest"
            return f"{which} {self.monitor} of {count} validations, {best.score:.4f}"
        return (
            f"tie in {self.monitor} at {best.score:.4f} ({ties} of {count} validations), broken by {LOSS}, "
            f"{best.loss:.4f}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far."""
        return {"validations": [tuple(validation) for validation in self.validations]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the validations."""
        self.validations = [Validation(*validation) for validation in state_dict["validations"]]
