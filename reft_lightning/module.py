"""The LightningModule: trains and evaluates any adapted model (ReFT, a PEFT baseline, the frozen model).

An adapted model has ``forward(**batch)``, ``generate(...)``, ``adapter_state_dict()``,
``load_adapter_state_dict(...)``, ``parameter_roles()`` and ``disabled()``. What it does inside, this file does not
know. Checkpoints hold the adapter, the optimizer and the loop, never the base model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning import LightningModule
from torch import Tensor, nn

from .data.base import Example, Family
from .data.encoding import target_only
from .evaluation import ExactMatch, generate_greedily, option_log_likelihoods
from .optimization import Optimization, parameter_groups, schedule_factor


class AdaptedModel(Protocol):
    """What the module needs of a model."""

    def forward(self, **batch: Any) -> Any: ...
    def generate(self, **inputs: Any) -> Tensor: ...
    def adapter_state_dict(self) -> dict[str, Tensor]: ...
    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None: ...
    def parameter_roles(self) -> dict[str, list[nn.Parameter]]: ...


class FinetuningModule(LightningModule):
    """Train the adapter by next-token loss on the target; evaluate by generated answers and option likelihood.

    Args:
        model: an :class:`AdaptedModel`.
        tokenizer: of its base model.
        family: the benchmark family, which extracts answers.
        val_tasks: names of the validation loaders, in their order.
        test_tasks: names of the test loaders, in their order.
        optimization: optimizer and schedule.
        option_batches: examples -> one target-only batch for each option index, or None not to rank options.
        max_new_tokens: overrides the family's.
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
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.tasks = {"val": tuple(val_tasks), "test": tuple(test_tasks)}
        self.optimization = optimization
        self.option_batches = option_batches
        self.max_new_tokens = max_new_tokens or family.max_new_tokens
        self.generated = nn.ModuleDict({_key(task): ExactMatch() for task in {*val_tasks, *test_tasks}})
        self.ranked = nn.ModuleDict({_key(task): ExactMatch() for task in {*val_tasks, *test_tasks}})
        self.predictions: list[dict[str, Any]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.tokens = 0
        self._window = (0, 0.0)
        self._random_state: dict[str, Any] | None = None

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Return the mean next-token loss over the target's tokens."""
        tokens = int(batch["attention_mask"].sum())
        loss = self.model(**_inputs(target_only(batch))).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step}: lower optimizer.lr, or try model.dtype=float32; "
                "the last checkpoint is from before this step"
            )
        self.tokens += tokens
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        """Start the clock of tokens per second."""
        self._window = (self.tokens, time.perf_counter())

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """After a resume, continue the random numbers where the checkpoint left them."""
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Log tokens per second of this process, over the steps since the last log."""
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:
            tokens, since = self._window
            now = time.perf_counter()
            self.log("train/tokens_per_second", (self.tokens - tokens) / (now - since))
            self._window = (self.tokens, now)

    def on_validation_end(self) -> None:
        """Leave the time of validation out of tokens per second."""
        self._window = (self.tokens, time.perf_counter())

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW over one group a role, and the schedule by optimizer step."""
        settings = self.optimization
        groups = parameter_groups(self.model.parameter_roles(), settings)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        factor = schedule_factor(settings, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the validation rows, and log its loss."""
        loss = self.model(**_inputs(target_only(batch))).loss
        self.log(
            "val/loss", loss, batch_size=len(batch["examples"]), add_dataloader_idx=False, sync_dist=True
        )
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
        """Forget the predictions of the last validation."""
        self.predictions = []

    def on_test_epoch_start(self) -> None:
        """Forget the predictions of the last evaluation."""
        self.predictions = []

    def on_validation_epoch_end(self) -> None:
        """Log accuracy by task and on average."""
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracy by task and on average."""
        self._log_accuracy("test")

    def _log_accuracy(self, stage: str) -> None:
        """Log ``<stage>/<task>/accuracy`` and, as the paper's tables do, the mean over tasks ``<stage>/accuracy``."""
        self.counts = {}
        for name, metrics in (("accuracy", self.generated), ("option_accuracy", self.ranked)):
            shares = []
            for task in self.tasks[stage]:
                metric = metrics[_key(task)]
                correct, total, missing = metric.compute().tolist()
                metric.reset()
                if total:
                    self.counts[f"{stage}/{task}/{name}"] = {
                        "correct": correct,
                        "total": total,
                        "missing": missing,
                    }
                    shares.append(correct / total)
                    self.log(f"{stage}/{task}/{name}", correct / total, sync_dist=True)
            if shares:
                self.log(
                    f"{stage}/{name}", sum(shares) / len(shares), prog_bar=name == "accuracy", sync_dist=True
                )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the adapter alone; the base model is never part of a checkpoint."""
        return {f"adapter.{name}": tensor for name, tensor in self.model.adapter_state_dict().items()}

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        """Load the adapter; every tensor must be there, whatever ``strict`` says."""
        self.model.load_adapter_state_dict({k.removeprefix("adapter."): v for k, v in state_dict.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counted tokens and the random state."""
        checkpoint["tokens"], checkpoint["random_state"] = self.tokens, _random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counted tokens, and the random state at the first step."""
        self.tokens, self._random_state = checkpoint["tokens"], checkpoint["random_state"]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("boundary", "examples")}


def _key(task: str) -> str:
    return task.replace(".", "_")  # module names may not contain dots


def _random_state() -> dict[str, Any]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
