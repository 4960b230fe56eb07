"""`last.ckpt`, from which an interrupted run continues as if it had not been interrupted.

A run that stops between two batches is continued exactly by Lightning and the state of the loader. Three things
need more. Random numbers: those of training are taken up at each batch where the last one left them, so that
validations, and whether the base was evaluated first, leave no trace in training. A stop inside a batch (an
exception): what the batch began is taken back, so that it is read again. A stop inside a validation: it starts
again, as the scores that it had summed are gone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ..base_models.random_state import random_state, set_random_state

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` around validations, after epochs, every n steps, and when a run is interrupted.

    Under several processes the random numbers are those of the first, and only a signal to stop writes a
    checkpoint at once: after an error in one process the others cannot be waited for. Parameters that are no longer
    finite are never written: a run could not go on from them.

    Args:
        path: of the file; it is replaced as a whole.
        every_n_steps: optimizer steps between checkpoints, or None for none in between.
        random_state: where training's random numbers start.
    """

    def __init__(self, path: Path, every_n_steps: int | None, random_state: Tensor) -> None:
        super().__init__()
        self.path, self.every_n_steps = path, every_n_steps
        self._random: dict[str, Tensor] = {"cpu": random_state}
        self._loaders: list[Any] = []
        self._gradients: dict[str, Tensor] = {}
        self._step = 0  # optimizer steps after the last whole batch
        self._resumed = self._validating = self._due = False

    # --- when -----------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the state after a whole batch, which is saved every n steps."""
        stepped = trainer.global_step > self._step
        self._step = trainer.global_step
        self._random = random_state(pl_module.device)
        loader: Any = trainer.train_dataloader
        self._loaders = [loader.state_dict()]
        named = {} if stepped else dict(pl_module.named_parameters())
        self._gradients = {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}
        self._due = bool(stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation, which may take long."""
        self._validating = True
        self._save_in_fit(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation: the best score is known."""
        self._validating = False
        self._save_in_fit(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch."""
        self._save_in_fit(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was interrupted."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if together:
            self._save_in_fit(trainer)

    def _save_in_fit(self, trainer: Trainer) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step > 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self._due = False
        trained = (p for p in trainer.lightning_module.parameters() if p.requires_grad)
        finite = all(bool(t.isfinite().all()) for t in (*trained, *self._gradients.values()))
        if not trainer.strategy.reduce_boolean_decision(finite):
            log.warning("what is trained is no longer finite: it is not written to %s", self.path)
            return
        for logger in trainer.loggers:
            logger.save()  # rows of steps that a killed run will not take again
        # the file is the first rank's: each rank goes on from the mean of all gradients, which has the same mean
        self._gradients = {
            n: trainer.strategy.reduce(g, reduce_op="mean") for n, g in self._gradients.items()
        }
        trainer.save_checkpoint(self.path, weights_only=False)

    # --- what -----------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up the random numbers, and after a resume the gradients of a step in progress; save every n steps.

        Here, and not at the end of the last batch, what that batch logged has reached the loggers.
        """
        if self._due:
            self._save(trainer)
        set_random_state(self._random, pl_module.device)
        if self._resumed:
            # Lightning counts one step too many for its loggers when it resumes from some of the places above
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            for name, parameter in pl_module.named_parameters():
                if name in self._gradients:
                    parameter.grad = self._gradients[name].to(parameter.device)
            self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Return what the next batch depends on besides the loops."""
        return {
            "random": self._random,
            "loaders": self._loaders,
            "gradients": self._gradients,
            "step": self._step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up at the next batch."""
        self._random, self._loaders = state_dict["random"], state_dict["loaders"]
        self._gradients, self._step = state_dict["gradients"], state_dict["step"]
        self._resumed = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back a batch or a validation that is under way."""
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        if progress["current"]["ready"] > progress["current"]["processed"]:
            loops["state_dict"]["combined_loader"] = self._loaders
            progress["is_last_batch"] = False
            for count in (progress["total"], progress["current"]):
                count.update(dict.fromkeys(("ready", "started", "processed"), count["completed"]))
        if self._validating:
            validation = loops["epoch_loop.val_loop.batch_progress"]
            validation["is_last_batch"] = False
            for count in (validation["total"], validation["current"]):
                # what Lightning reads as a validation that stopped in its first batch
                count.update(ready=1, started=1, processed=0, completed=0)
