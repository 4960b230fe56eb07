"""The LightningModule: trains and evaluates any adapted model (ReFT, a PEFT baseline, the frozen model).

An adapted model has ``forward(**batch)``, ``generate(...)``, ``adapter_state_dict()``,
``load_adapter_state_dict(...)``, ``parameter_roles()`` and ``disabled()``. What it does inside, this file does
not know. Checkpoints hold the adapter, the optimizer and the loop, never the base model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning import LightningModule
from torch import Tensor, nn

from .data.base import Example, Family
from .data.encoding import target_only
from .evaluation import ExactMatch, MeanLoss, generate_greedily, option_log_likelihoods
from .optimization import Optimization, parameter_groups, schedule_factor


class AdaptedModel(Protocol):
    """What the module needs of a model."""

    def forward(self, **batch: Any) -> Any:
        """Return loss and logits."""
        ...

    def generate(self, **inputs: Any) -> Tensor:
        """Return prompts and new tokens."""
        ...

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every trained tensor."""
        ...

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load them; all must be there."""
        ...

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by role."""
        ...


class FinetuningModule(LightningModule):
    """Train the adapter by next-token loss on the target; evaluate generated answers and option likelihoods.

    Args:
        model: an :class:`AdaptedModel`.
        tokenizer: of its base model.
        family: the benchmark family, which extracts answers.
        val_tasks: names of the validation loaders, in their order.
        test_tasks: names of the test loaders, in their order.
        optimization: optimizer and schedule.
        option_batches: examples -> one target-only batch for each option index, or None not to rank options.
        max_new_tokens: overrides the family's.
        commonest: task -> the commonest answer of its training rows; how often it is right is what a score must
            beat before the model can be said to read the question (``majority_accuracy``).
    """

    strict_loading = False

    def __init__(
        self,
        model: AdaptedModel,
        tokenizer: Any,
        family: Family,
        val_tasks: Sequence[str],
        test_tasks: Sequence[str],
        optimization: Optimization,
        option_batches: Callable[[list[Example]], list[dict[str, Any]]] | None = None,
        max_new_tokens: int | None = None,
        commonest: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.tasks = {"val": tuple(val_tasks), "test": tuple(test_tasks)}
        self.optimization = optimization
        self.option_batches = option_batches
        self.max_new_tokens = max_new_tokens or family.max_new_tokens
        self.generated = nn.ModuleDict({_key(task): ExactMatch() for task in {*val_tasks, *test_tasks}})
        self.ranked = nn.ModuleDict({_key(task): ExactMatch() for task in {*val_tasks, *test_tasks}})
        self.commonest = dict(commonest or {})
        self.constant = nn.ModuleDict({_key(task): ExactMatch() for task in self.commonest})
        self.prefix = ""  # of logged names: "base/" while the frozen base is evaluated
        self.loss = MeanLoss()
        self.predictions: list[dict[str, Any]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.tokens = 0
        self.train_seconds = 0.0  # before the last on_train_start
        self._started: float | None = None
        self._window = (0, 0.0)
        self._batch_tokens = 0

    # --- training -------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Return the mean next-token loss over the target's tokens."""
        self._batch_tokens = int(batch["attention_mask"].sum())
        try:
            loss = self.model(**_inputs(target_only(batch))).loss
        except torch.linalg.LinAlgError as error:
            raise FloatingPointError(
                f"R cannot be computed at step {self.global_step}, its parameters are no longer finite or its rows "
                f"no longer independent: lower optimizer.lr ({error})"
            ) from error
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step}: lower optimizer.lr, or try "
                "model.dtype=float32; the last checkpoint is from before this step"
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_after_backward(self) -> None:
        """Count the batch's tokens: before a checkpoint can be written, and not if the batch failed."""
        self.tokens += self._batch_tokens

    def on_train_start(self) -> None:
        """Start the clocks."""
        self._started = time.perf_counter()
        self._window = (self.tokens, self._started)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Log tokens per second of this process, over the steps since the last log."""
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            tokens, since = self._window
            now = time.perf_counter()
            self.log("train/tokens_per_second", (self.tokens - tokens) / (now - since))
            self._window = (self.tokens, now)

    def on_train_end(self) -> None:
        """Stop the clock of training."""
        self.train_seconds, self._started = self._seconds_so_far(), None

    def _seconds_so_far(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.train_seconds + running

    def on_validation_end(self) -> None:
        """Leave the time of validation out of tokens per second."""
        self._window = (self.tokens, time.perf_counter())

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW over one group a role, and the schedule by optimizer step."""
        settings = self.optimization
        groups = parameter_groups(self.model.parameter_roles(), settings)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        factor = schedule_factor(settings, self._total_steps())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> float:
        # trainer.estimated_stepping_batches would build the loaders before a checkpoint is read, and Lightning
        # restores the state of those that it builds afterwards alone: a resumed run would read its epoch again.
        trainer = self.trainer
        if trainer.datamodule is None:
            return trainer.estimated_stepping_batches
        most = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if trainer.max_epochs == -1:
            return most
        batches = len(trainer.datamodule.train_dataloader())
        return min(most, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))

    # --- evaluation -----------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the validation rows, and add its loss."""
        loss = self.model(**_inputs(target_only(batch))).loss
        self.loss.update(loss, int((batch["labels"] != -100).sum()))
        self._score(batch, self.tasks["val"][dataloader_idx])

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the test rows."""
        self._score(batch, self.tasks["test"][dataloader_idx])

    def _score(self, batch: dict[str, Any], task: str) -> None:
        examples: list[Example] = batch["examples"]
        ids = generate_greedily(
            self.model, batch, max_new_tokens=self.max_new_tokens,
            eos=self.tokenizer.eos_token_id, pad=self.tokenizer.pad_token_id,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [self.family.extract(text) for text in texts]
        gold = [example.answer for example in examples]
        self.generated[_key(task)].update(answers, gold)
        if task in self.commonest:
            self.constant[_key(task)].update([self.commonest[task]] * len(gold), gold)
        choices = self._rank(examples)
        if choices:
            self.ranked[_key(task)].update(choices, gold)
        for i, (example, text, answer) in enumerate(zip(examples, texts, answers, strict=True)):
            row = {"task": task, "source": example.source, "prompt": example.prompt, "generated": text,
                   "answer": answer, "gold": example.answer, "correct": answer == example.answer}  # fmt: skip
            self.predictions.append(row | ({"option": choices[i]} if choices else {}))

    def _rank(self, examples: list[Example]) -> list[str | None]:
        if self.option_batches is None or not all(example.options for example in examples):
            return []
        batches = [{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in _inputs(b).items()}
                   for b in self.option_batches(examples)]  # fmt: skip
        scores = option_log_likelihoods(self.model, batches)
        for i, example in enumerate(examples):
            scores[i, len(example.options) :] = -torch.inf  # rows with fewer options than others
        return [
            self.family.extract(e.options[k])
            for e, k in zip(examples, scores.argmax(-1).tolist(), strict=True)
        ]

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation, also one that was interrupted."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation, also one that was interrupted."""
        self._forget()

    def _forget(self) -> None:
        self.predictions = []
        self.loss.reset()
        for metric in (*self.generated.values(), *self.ranked.values(), *self.constant.values()):
            metric.reset()
            metric.update([], [])  # torchmetrics warns of a process, or a way to score, without rows

    def on_validation_epoch_end(self) -> None:
        """Log the loss, a mean over all target tokens, and accuracy by task and on average."""
        self.loss.update(torch.zeros((), device=self.device), 0)
        self.log(f"{self.prefix}val/loss", self.loss.compute(), sync_dist=True)
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracy by task and on average."""
        self._log_accuracy("test")

    def _log_accuracy(self, stage: str) -> None:
        """Log ``<stage>/<task>/accuracy``, and ``<stage>/accuracy``: the mean over tasks, as the paper has it."""
        self.counts = {}
        families = {
            "accuracy": self.generated,
            "option_accuracy": self.ranked,
            "majority_accuracy": self.constant,
        }
        for name, metrics in families.items():
            shares = []
            for task in (task for task in self.tasks[stage] if _key(task) in metrics):
                metric = metrics[_key(task)]
                correct, total, missing = metric.compute().tolist()
                if total:
                    self.counts[f"{self.prefix}{stage}/{task}/{name}"] = {
                        "correct": correct,
                        "total": total,
                        "missing": missing,
                    }
                    shares.append(correct / total)
                    self.log(f"{self.prefix}{stage}/{task}/{name}", correct / total, sync_dist=True)
            if shares:
                self.log(
                    f"{self.prefix}{stage}/{name}",
                    sum(shares) / len(shares),
                    prog_bar=name == "accuracy",
                    sync_dist=True,
                )

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the adapter alone; the base model is never part of a checkpoint."""
        return {f"adapter.{name}": tensor for name, tensor in self.model.adapter_state_dict().items()}

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        """Load the adapter; every tensor must be there, whatever ``strict`` says."""
        self.model.load_adapter_state_dict({k.removeprefix("adapter."): v for k, v in state_dict.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what training has taken so far."""
        checkpoint["tokens"], checkpoint["train_seconds"] = self.tokens, self._seconds_so_far()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens, self.train_seconds = checkpoint["tokens"], checkpoint["train_seconds"]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("boundary", "examples")}


def _key(task: str) -> str:
    return task.replace(".", "_")  # module names may not contain dots
