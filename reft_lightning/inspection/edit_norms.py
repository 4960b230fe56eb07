"""A callback that logs during training how far interventions move representations."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from ..adapters.adapt import interventions_of
from ..adapters.reft.measuring import EditNorms as Norms
from ..adapters.reft.measuring import watching

log = logging.getLogger(__name__)


class EditNorms(Callback):
    r"""Log the mean :math:`\lVert\Phi(h) - h\rVert / \lVert h\rVert` of each layer as ``edit/layer_00`` and so on.

    It is measured in the training pass of the steps that Lightning logs (``trainer.log_every_n_steps``), in rank 0;
    ``edit/mean`` is the mean over layers. No pass is added, and other steps are not affected.
    """

    def __init__(self) -> None:
        self._watching = ExitStack()
        self._norms: Norms | None = None
        self._told = False

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the pass of a step that is logged."""
        model: Any = module.model
        reft = interventions_of(model)
        if reft is None:
            self._tell(f"as {model.config.method} has no interventions")
            return
        every: Any = trainer
        if (trainer.global_step + 1) % max(1, every.log_every_n_steps):
            return
        self._norms = Norms(reft)
        self._watching.enter_context(watching(reft, self._norms))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the measured norms."""
        self._watching.close()
        norms, self._norms = self._norms, None
        if norms is None:
            return
        by_layer = norms.by_layer()
        if not by_layer:
            self._tell("as no edit was observed; edits of a compiled step cannot be observed")
            return
        values = {f"edit/layer_{layer:02d}": value for layer, value in by_layer.items()}
        module.log_dict({**values, "edit/mean": torch.stack(list(by_layer.values())).mean()})

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Stop watching a pass that failed."""
        self._watching.close()

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            log.warning("callbacks: edit norms are not logged, %s", why)
