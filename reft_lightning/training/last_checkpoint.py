"""`last.ckpt`, from which an interrupted run continues as if it had not been interrupted.

Lightning and the loader's state are enough to continue a run exactly if it stops between two batches. Three things need
more. Random numbers: each training batch starts from the random state left by the previous one, so that evaluating the
base first, or validating more often, does not change training. A stop within a batch (an exception): the batch's
progress is rolled back, so that it is read again. A stop within a validation, or just before it: the validation starts
again, because the scores accumulated so far are lost.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ..base_models.random_state import random_state, set_random_state

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` before and after validations, after epochs, every n steps, and when a run is interrupted.

    With several processes, the random state is that of the first, and only a signal to stop writes a checkpoint
    immediately: after an error in one process, the others cannot be waited for. Parameters that are no longer finite
    are never written, because a run could not continue from them.

    Args:
        path: path of the file, which is replaced atomically.
        every_n_steps: number of optimizer steps between checkpoints; None to write none within epochs.
        random_state: the random state at the start of training.
    """

    def __init__(self, path: Path, every_n_steps: int | None, random_state: Tensor) -> None:
        super().__init__()
        self.path, self.every_n_steps = path, every_n_steps
        self._random: dict[str, Tensor] = {"cpu": random_state}
        self._loaders: list[Any] = []
        self._gradients: dict[str, Tensor] = {}
        self._step = 0  # number of optimizer steps after the last complete batch
        self._resumed = self._validating = self._due = self._stopped = False
        self._validated = True  # unless a validation has to follow the last complete batch

    # --- when -----------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the state after a complete batch, which is saved every n steps."""
        stepped = trainer.global_step > self._step
        self._step = trainer.global_step
        self._random = random_state(pl_module.device)
        loader: Any = trainer.train_dataloader
        self._loaders = [loader.state_dict()]
        named = {} if stepped else dict(pl_module.named_parameters())
        self._gradients = {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}
        self._validated = False
        self._due = bool(stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation, which may take a long time."""
        self._validating = self._validated = True
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have a checkpoint written after a validation, when the best score is known."""
        self._validating, self._due = False, True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have a checkpoint written after an epoch."""
        self._due = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the last epoch, and whether a callback ended training."""
        self._stopped = trainer.should_stop
        if self._due:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the run is interrupted."""
        if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            self._validating = self._validating or self._validation_is_next(trainer)
            self._save(trainer)

    def _validation_is_next(self, trainer: Trainer) -> bool:
        """Whether the last batch is complete and a validation follows it, which has not begun."""
        loop: Any = trainer.fit_loop.epoch_loop
        batches = loop.batch_progress.current
        complete = not self._validated and batches.ready == batches.processed
        return complete and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def _save(self, trainer: Trainer) -> None:
        self._due = False
        trains = trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step > 0
        if not trains or getattr(trainer, "fast_dev_run", False):
            return
        trained = (p for p in trainer.lightning_module.parameters() if p.requires_grad)
        finite = all(bool(t.isfinite().all()) for t in (*trained, *self._gradients.values()))
        if not trainer.strategy.reduce_boolean_decision(finite):
            log.warning(
                "trained parameters or gradients are no longer finite, so %s is not updated", self.path
            )
            return
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not repeat these steps, so their rows must not be lost
        # only the first rank writes: all ranks continue from the mean of their gradients, which has the same mean
        self._gradients = {
            n: trainer.strategy.reduce(g, reduce_op="mean") for n, g in self._gradients.items()
        }
        trainer.save_checkpoint(self.path, weights_only=False)

    # --- what -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what Lightning does not restore: accumulation that depends on the epoch, and that training is over."""
        if self._stopped:
            trainer.should_stop = True
        for callback in trainer.callbacks if self._resumed else ():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save if due; restore the random state, and after a resume the gradients of a step in progress.

        Saving happens here, not at the end of the last batch, validation or epoch, because only now its logged values
        have reached the loggers; and one checkpoint serves all three.
        """
        if self._due:
            self._save(trainer)
        set_random_state(self._random, pl_module.device)
        if self._resumed:
            # when resuming from some of the checkpoints above, Lightning counts one step too many for its loggers
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            for name, parameter in pl_module.named_parameters():
                if name in self._gradients:
                    parameter.grad = self._gradients[name].to(parameter.device)
            self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Return what the next batch depends on in addition to the loops."""
        return {
            "random": self._random,
            "loaders": self._loaders,
            "gradients": self._gradients,
            "step": self._step,
            "stopped": self._stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, to be used from the next batch on."""
        self._random, self._loaders = state_dict["random"], state_dict["loaders"]
        self._gradients, self._step = state_dict["gradients"], state_dict["step"]
        self._stopped = state_dict.get("stopped", False)  # missing in checkpoints of earlier versions
        self._resumed = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Roll back the progress of a batch or a validation that is under way."""
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        if progress["current"]["ready"] > progress["current"]["processed"]:
            loops["state_dict"]["combined_loader"] = self._loaders
            progress["is_last_batch"] = False
            for count in (progress["total"], progress["current"]):
                count.update(dict.fromkeys(("ready", "started", "processed"), count["completed"]))
            if not progress["current"]["completed"]:  # the epoch starts again, with its hooks
                for count in loops["epoch_progress"].values():
                    count.update(dict.fromkeys(("ready", "started"), count["completed"]))
        if self._validating:
            for count in (progress["total"], progress["current"]):
                count["completed"] = count["processed"]
            validation = loops["epoch_loop.val_loop.batch_progress"]
            validation["is_last_batch"] = False
            for count in (validation["total"], validation["current"]):
                # for Lightning, a validation that stopped in its first batch
                count.update(ready=1, started=1, processed=0, completed=0)
