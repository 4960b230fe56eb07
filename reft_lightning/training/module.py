"""The LightningModule, which trains any adapted model (ReFT, a PEFT baseline, the frozen model).

Its subclasses add evaluation: :class:`~reft_lightning.training.generation.GenerationModule` by generated texts,
:class:`~reft_lightning.training.classification.ClassificationModule` by a classifier's outputs.

An adapted model has ``forward(**batch)``, ``generate(...)``, ``adapter_state_dict()``,
``load_adapter_state_dict(...)``, ``parameter_roles()`` and ``disabled()``. This file does not depend on what it does
internally. Checkpoints contain the trained parameters and the states of the optimizer and the loop, not the frozen
base.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import (
    BitsandbytesPrecision,
    DoublePrecision,
    HalfPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch import Tensor, nn

from ..adapters.adapted import AdaptedModel
from ..data.benchmark_data import BenchmarkData
from ..evaluation import MeanLoss
from .optimization import Optimization
from .step_loss import Part, part_of

log = logging.getLogger(__name__)


def limited(batches: int, limit: int | float | None) -> int:
    """Return how many batches per epoch Lightning uses under a limit, which is a number or a fraction of batches."""
    if limit is None:
        return batches
    return min(batches, limit) if type(limit) is int else int(batches * limit)


def optimizer_steps(trainer: Any, batches: int) -> float:
    """Return how many steps a Trainer takes with ``batches`` per epoch; infinity if only time or a callback ends it."""
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs == -1:
        return most
    batches = limited(batches, trainer.limit_train_batches)
    scheduled = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    if scheduled is None:
        return min(most, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    accumulated = map(scheduled.get_accumulate_grad_batches, range(trainer.max_epochs))
    return min(most, sum(math.ceil(batches / each) for each in accumulated))


# These convert all parameters to another dtype, or replace layers of the base.
UNFIT_PRECISIONS = (HalfPrecision, DoublePrecision, TransformerEnginePrecision, BitsandbytesPrecision)


def check_precision(plugin: Precision) -> None:
    """Reject a precision, however it was given to the Trainer, that changes the frozen base and the interventions."""
    if isinstance(plugin, UNFIT_PRECISIONS):
        raise ValueError(
            f"precision={plugin.precision} ({type(plugin).__name__}) changes the parameters of the frozen base and of "
            "interventions, which must stay in float32: load the base in another dtype (model.dtype=bfloat16) or "
            "quantized (quantization=nf4), or compute with precision=bf16-mixed"
        )


TrainingPass = Callable[[dict[str, Any], list[int], int | None], Any]


class FinetuningModule(LightningModule):
    """Train an adapter; a subclass defines the loss and the evaluation.

    Args:
        model: an :class:`AdaptedModel`.
        data: the loaders and their tasks.
        optimization: optimizer and schedule.
        training_pass: runs the model in training, given its inputs, the indices of the train rows and the column where
            targets start (None for a classifier). None uses the model's own forward pass.

    Attributes:
        prefix: prefix of logged names, ``base/`` while the frozen base is evaluated.
        predictions: one dictionary per row of the last evaluation in this process, with the row's ``scores`` by
            measure.
        kind: the kind of predictions: ``generation``, ``classification`` (with the ``labels``), ``regression`` or
            ``preference``.
        generates: whether an evaluation generates texts; if False, only losses and likelihoods are computed.
        commonest: task -> the most common answer of its train rows.
        counts: score -> the counts it is based on: ``total`` rows, ``correct`` rows, ``missing`` answers, ``interval``.
    """

    commonest: dict[str, str]
    generates = True
    strict_loading = False  # pyright: ignore[reportAssignmentType]  # Lightning reads it as a plain attribute

    def __init__(
        self,
        model: AdaptedModel,
        data: BenchmarkData,
        optimization: Optimization,
        training_pass: TrainingPass | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = {"val": data.val_tasks, "test": data.test_tasks}
        self.optimization = optimization
        self.prefix = ""
        self.training_pass = training_pass
        self.loss = MeanLoss()
        self.predictions: list[dict[str, Any]] = []
        self.kind: dict[str, Any] = {"kind": "generation"}
        self.counts: dict[str, dict[str, Any]] = {}
        self.tokens = 0
        self.train_seconds = 0.0  # before the last on_train_start
        self.train_metrics: dict[str, float] = {}  # last logged values, updated by note_metrics
        self.total_steps = math.inf  # set when training begins
        self._tokens_before: int | None = None  # on all ranks, from the checkpoint that training resumes from
        self._started: float | None = None
        self._window = (0, 0.0)
        self._batch_tokens = 0
        self._step_loss: Tensor | float = 0.0  # of the step's batches so far, weighted by their shares
        self._batch_loss: Tensor | float = 0.0
        self._warned = False

    def loss_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch over its targets, a scalar with a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_of(batch), the training loss")

    def output_of(self, inputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        """Return the model's output for the inputs of a batch."""
        if self.training_pass is None or not torch.is_grad_enabled():
            return self.model(**inputs)
        return self.training_pass(inputs, batch["rows"].tolist(), batch.get("boundary"))

    def tokens_in(self, batch: dict[str, Any]) -> int:
        """Return the number of tokens in a batch, without padding."""
        return int(batch["attention_mask"].sum())

    @contextmanager
    def named(self, prefix: str) -> Iterator[None]:
        """Prefix all names logged inside the block."""
        before, self.prefix = self.prefix, prefix
        try:
            yield
        finally:
            self.prefix = before

    def setup(self, stage: str) -> None:
        """Reject a precision that would change the model."""
        check_precision(self.trainer.precision_plugin)

    # --- training -------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Return the loss of a batch, weighted by its part in the step, and log the loss of the whole step."""
        part = part_of(self.trainer, batch_index, self.optimization.loss_reduction)
        self._batch_tokens = self.tokens_in(batch)
        try:
            loss = self.loss_of(batch)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise FloatingPointError(
                f"R cannot be computed at step {self.global_step}, because its parameters are no longer finite or its "
                f"rows are no longer independent: lower optimizer.lr ({error})"
            ) from error
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step}: lower optimizer.lr, or try "
                "model.dtype=float32; the last checkpoint is from before this step"
            )
        self._log_loss(loss.detach(), part)
        return loss if self.optimization.loss_reduction == "micro_batch_mean" else loss * part.weight

    def _log_loss(self, loss: Tensor, part: Part) -> None:
        """Log the mean loss over all targets of a step on all ranks, at its last batch."""
        if part.first:
            self._step_loss = 0.0
        self._batch_loss = loss * part.share
        if part.last:
            step_loss = self._step_loss + self._batch_loss
            self.log("train/loss", step_loss, prog_bar=True, sync_dist=True, reduce_fx="sum")

    def on_after_backward(self) -> None:
        """Count the batch's tokens and loss: before a checkpoint can be written, and not if the batch failed."""
        self.tokens += self._batch_tokens
        self._step_loss = self._step_loss + self._batch_loss

    def on_fit_start(self) -> None:
        """Split the tokens counted before a resume across ranks, so that their sum is kept, even if no step is left."""
        if self._tokens_before is not None:
            each, rest = divmod(self._tokens_before, self.trainer.world_size)
            self.tokens, self._tokens_before = each + (self.trainer.global_rank < rest), None

    def on_train_start(self) -> None:
        """Start the clocks."""
        self._started = time.perf_counter()
        self._window = (self.tokens, self._started)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Log this process's tokens per second over the steps since the last log, and the progress of training."""
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps  # 0 means never, as in a bare Trainer
        if every and trainer.global_step % every == 0:
            tokens, since = self._window
            now = time.perf_counter()
            self.log("train/tokens_per_second", (self.tokens - tokens) / (now - since))
            self._window = (self.tokens, now)
            # over all processes
            self.log("progress/tokens", float(self.tokens), sync_dist=True, reduce_fx="sum")
            self.log("progress/seconds", self._seconds_so_far())  # including validations
            if self.device.type == "cuda":
                self.log("progress/memory_allocated", float(torch.cuda.memory_allocated(self.device)))
                self.log("progress/memory_reserved", float(torch.cuda.memory_reserved(self.device)))

    def on_train_end(self) -> None:
        """Stop the clock of training."""
        self.train_seconds, self._started = self._seconds_so_far(), None

    def _seconds_so_far(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.train_seconds + running

    def on_validation_end(self) -> None:
        """Exclude the time of validations from tokens per second."""
        self._window = (self.tokens, time.perf_counter())

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer, with one group per role, and the scheduler, which advances with each optimizer step."""
        self.total_steps = self._total_steps()
        optimizer, scheduler = self.optimization.build(self.model.parameter_roles(), self.total_steps)
        schedule = {"scheduler": scheduler, "interval": "step", "name": "progress/lr"}  # the name in the logs
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _total_steps(self) -> float:
        # trainer.estimated_stepping_batches would build the loaders before the checkpoint is read, but Lightning
        # restores only the state of loaders built afterwards, so a resumed run would repeat its epoch.
        trainer: Any = self.trainer
        if trainer.datamodule is None:
            return trainer.estimated_stepping_batches
        return optimizer_steps(trainer, len(trainer.datamodule.train_dataloader()))

    # --- evaluation -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation, even if it was interrupted."""
        self._forget()

    on_test_epoch_start = on_validation_epoch_start

    def _forget(self) -> None:
        self.predictions = []
        self.loss.reset()
        self.loss.update(torch.zeros((), device=self.device), 0)  # torchmetrics warns if there is no update
        self._warned = False

    def without_numbers(self, scores: Tensor) -> Tensor:  # (b, k) -> (b,)
        """Return which rows have NaN among their scores, and warn once that they count as wrong."""
        found = scores.isnan().any(-1)
        if found.any() and not self._warned:
            self._warned = True
            log.warning("the model's outputs are NaN for some rows, which count as wrong: "
                        "try model.dtype=float32, or check the trained parameters")  # fmt: skip
        return found

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all targets, and the scores."""
        self.log(f"{self.prefix}val/loss", self.loss.compute(), sync_dist=True)
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        """Log the scores of an evaluation; this base class has none."""

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return only the adapter's tensors; the base model is never part of a checkpoint.

        ``destination`` and ``prefix`` come from a module that contains this one, such as Lightning's weight averages.
        """
        found = {} if destination is None else destination
        found.update(
            {f"{prefix}adapter.{k}": tensor for k, tensor in self.model.adapter_state_dict().items()}
        )
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the adapter; every tensor must be present, whatever the value of ``strict``."""
        self.model.load_adapter_state_dict({k.removeprefix("adapter."): v for k, v in state_dict.items()})
        return nn.Module().load_state_dict({})  # torch's result if nothing is missing

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokens, time and metrics of training so far, and the loss of a step in progress, over all ranks."""
        tokens = torch.tensor(self.tokens, device=self.device)
        checkpoint["tokens"] = int(self.trainer.strategy.reduce(tokens, reduce_op="sum"))
        checkpoint["train_seconds"] = self._seconds_so_far()
        checkpoint["train_metrics"] = self.note_metrics()
        step_loss = torch.as_tensor(self._step_loss, device=self.device)
        checkpoint["step_loss"] = self.trainer.strategy.reduce(step_loss, reduce_op="mean")

    def note_metrics(self) -> dict[str, float]:
        """Record the last logged training metrics and return them; after a resume, earlier ones are included."""
        logged = self.trainer.callback_metrics.items()
        self.train_metrics |= {name: float(value) for name, value in logged if name.startswith("train/")}
        return self.train_metrics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts; tokens are split across ranks in :meth:`on_fit_start`."""
        self._tokens_before = checkpoint["tokens"]
        self.train_seconds, self.train_metrics = checkpoint["train_seconds"], checkpoint["train_metrics"]
        self._step_loss = checkpoint["step_loss"].to(self.device)
