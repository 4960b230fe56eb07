"""Progress bars for training and each evaluation, drawn with :mod:`reft_lightning.terminal.bars`."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from ..terminal.bars import Bar


class RunProgress(ProgressBar):
    """One bar over all steps of training, and one for each validation and test, labelled with what is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = True
        self._training: Bar | None = None
        self._evaluation: Bar | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks except the first."""
        self.shown = False

    def enable(self) -> None:
        """Show bars."""
        self.shown = True

    def _open(self, what: str, total: float, begun: float = 0.0) -> Bar | None:
        return Bar(what, total if math.isfinite(total) else None, begun) if self.shown else None

    # --- training -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the bar; a resumed run starts at the steps already done."""
        self._training = self._open("training", pl_module.total_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Show the step, the loss and the last validation's main score."""
        if self._training is not None:
            values = (f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
            self._training.show(trainer.global_step, " ".join(values))

    def _close(self, *arguments: Any, **more: Any) -> None:
        for bar in (self._evaluation, self._training):
            if bar is not None:
                bar.close()
        self._evaluation = self._training = None

    on_train_end = on_exception = _close

    # --- evaluation -----------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Open a bar over the batches of all tasks."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluate(pl_module, "validation", batches)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Open a bar over the batches of all tasks."""
        self._evaluate(pl_module, "test", trainer.num_test_batches)

    def _evaluate(self, module: Any, what: str, batches: list[int | float]) -> None:
        whose = "frozen base, " if module.prefix else ""
        self._evaluation = self._open(f"{whose}{what}", sum(batches))

    def _count(self, *arguments: Any, **more: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.advance()

    on_validation_batch_end = on_test_batch_end = _count

    def _end(self, *arguments: Any, **more: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    on_validation_end = on_test_end = _end
