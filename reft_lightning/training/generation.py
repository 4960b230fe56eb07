"""Evaluate a language model by its generated texts, the likelihoods of options, and the loss of targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapted import AdaptedModel
from ..base_models.reading import reading_of
from ..data.benchmark_data import BenchmarkData
from ..data.example import Example
from ..data.family import Family
from ..data.option_batches import option_batches
from ..data.prompts import tokenizer_of
from ..evaluation import (
    ColumnReader,
    Decoding,
    generate,
    log_likelihood,
    sources_in,
    with_draft,
)
from ..terminal.bars import Bar
from .module import TrainingPass
from .objectives import Objective
from .optimization import Optimization
from .scored_rows import ScoredRowsModule


class GenerationModule(ScoredRowsModule):
    """Train with an objective, score generated texts and rank options by likelihood.

    A family without a scorer (instruction tuning) is validated by its loss, and only for the first batch of each
    validation set are texts generated, for people to read; for test rows, all texts are generated.

    Args:
        model: an :class:`~reft_lightning.adapters.adapted.AdaptedModel`.
        data: rows of a benchmark family, which scores texts. ``majority_accuracy`` is the accuracy of always giving
            the most common answer of a task's train rows, a baseline that a model must beat to show that it reads the
            question.
        optimization: optimizer and schedule.
        decoding: how texts are generated.
        objective: the objective to minimise.
        ranks_options: whether to rank the options of rows by likelihood, too.
        training_pass: see :class:`FinetuningModule`.

    Raises:
        ValueError: if the base model is not causal.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: BenchmarkData,
        optimization: Optimization,
        decoding: Decoding,
        objective: Objective,
        ranks_options: bool = True,
        training_pass: TrainingPass | None = None,
    ) -> None:
        self.check_reads(model)
        family: Family = data.family
        measures = family.measures if family.score else ()
        super().__init__(model, data, optimization, objective, measures, training_pass)
        self.tokenizer, self.max_length = tokenizer_of(data.tokenizer), data.max_length
        self.family, self.decoding, self.ranks_options = family, decoding, ranks_options
        self.free = family.main_measure(data.test_tasks) == "loss"
        self.commonest = _commonest_answers(data.train_rows.examples) if family.score else {}
        self._add_measure("option_accuracy", (*data.val_tasks, *data.test_tasks))
        self._add_measure("majority_accuracy", self.commonest)

    def check_reads(self, model: AdaptedModel) -> None:
        """Reject a model that would read the answers that it should learn to predict."""
        if not reading_of(model.base_model).causal:
            raise ValueError(
                f"tokens of {type(model.base_model).__name__} attend to later tokens, so it would be trained to "
                "predict answers that it can read; choose a causal language model, or data=glue_... for an encoder"
            )

    # --- the layout prompt | target -------------------------------------------------------------------------

    def option_batches(self, examples: list[Example]) -> list[dict[str, Any]]:
        """Return one batch for each option index."""
        return option_batches(self.tokenizer, examples, self.max_length)

    def reader(self) -> Any:
        """Return the reader of columns that the passes of a batch share: loss, options and texts have one prompt."""
        return ColumnReader(self.model)

    def log_likelihood(self, batch: dict[str, Any], reader: Any) -> Tensor:  # -> (b,)
        """Return the log-likelihood of the targets."""
        return log_likelihood(reader, batch)

    def drafted(
        self, batch: dict[str, Any], batches: list[dict[str, Any]], choice: list[int]
    ) -> dict[str, Any]:
        """Return the batch with the likeliest options as drafts, which decoding checks."""
        return with_draft(batch, batches, choice)

    def texts(self, batch: dict[str, Any], decoding: Decoding, reader: Any) -> list[list[str]]:
        """Return the generated texts of each row."""
        return generate(self.model, batch, self.tokenizer, decoding, reader)

    # --- one batch ------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Add the loss of a batch of validation rows, and score it."""
        reader = self.reader()
        losses = self._losses(batch, reader)
        shown = self.family.score is not None or batch_index == 0
        self._score(batch, self.tasks["val"][dataloader_idx], reader, losses, generates=shown)

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the test rows."""
        reader = self.reader()
        losses = self._losses(batch, reader) if self.free else None
        self._score(batch, self.tasks["test"][dataloader_idx], reader, losses)

    def _losses(self, batch: dict[str, Any], reader: Any) -> list[tuple[float, int]]:
        """Add the loss of a batch; return each row's mean over its target tokens, and how many there are."""
        tokens = (batch["labels"] != -100).sum(-1)  # (b,)
        losses = -self.log_likelihood(batch, reader)  # (b,)
        self.loss.update(losses.sum() / tokens.sum(), int(tokens.sum()))
        return list(zip((losses / tokens).tolist(), tokens.tolist(), strict=True))

    def _score(
        self,
        batch: dict[str, Any],
        task: str,
        reader: Any,
        losses: Sequence[tuple[float, int]] | None = None,
        generates: bool = True,
    ) -> None:
        """Score a batch by the options of its rows and by generated texts, and record each row with its loss."""
        examples: list[Example] = batch["examples"]
        options, drafted = self._rank(batch, reader)
        right: list[float] = []
        if options:
            right = [float(option == e.target) for option, e in zip(options, examples, strict=True)]
            self._metric("option_accuracy", task).update(right, options.count(None))
        if task in self.commonest:
            constant = [float(example.answer == self.commonest[task]) for example in examples]
            self._metric("majority_accuracy", task).update(constant)
        texts: list[list[str]] = []
        if self.generates and generates:
            # the tasks of a mixture are not in the family
            stops = self.family.tasks[task].stop_strings if task in self.family.tasks else ()
            decoding = replace(self.decoding, stop_strings=stops)
            texts = self.texts(drafted, decoding, reader)
        judgements = self._judge(texts, examples)
        judged: list[dict[str, float]] = []
        missing = 0
        for i, (example, samples) in enumerate(zip_longest(examples, texts)):
            row: dict[str, Any] = {"task": task, "source": example.source, "prompt": example.prompt}
            own: dict[str, float] = {}
            if samples:
                row["generated"] = samples[0] if len(samples) == 1 else samples
            if judgements:
                answer, scores = judgements[i]
                judged.append(scores)
                missing += answer is None
                row |= {"answer": answer, "gold": example.answer}
                row |= {"correct": 1.0 in scores.values()} if len(scores) == 1 else dict(scores)
                own |= scores
            if options:
                row["option"] = self._answer_of(options[i], example)
                own["option_accuracy"] = right[i]
            if losses:
                own["loss"], row["target_tokens"] = losses[i]
            self.predictions.append({**row, **example.recorded, "scores": own})
        for measure in self.family.measures if judged else ():
            values = [scores[measure] for scores in judged if measure in scores]
            self._metric(measure, task).update(values, missing if values else 0)

    def _judge(self, texts: list[list[str]], examples: list[Example]) -> list[Any]:
        """Return the judgement of each row, or none if texts are not scored; programs are run row by row."""
        if self.family.score is None or not texts:
            return []
        with Bar("scoring texts", len(texts)) as bar:
            found = []
            for samples, example in zip(texts, examples, strict=True):
                found.append(self.family.score(samples, example))
                bar.advance()
        return found

    def _answer_of(self, option: str | None, example: Example) -> str | None:
        if option is None or self.family.score is None:
            return option
        return self.family.score([option], example).answer

    def _rank(self, batch: dict[str, Any], reader: Any) -> tuple[list[str | None], dict[str, Any]]:
        """Return the most likely option of each row (empty if there is nothing to rank), and the batch to decode.

        An option is None if its row's likelihoods are NaN. The likeliest option becomes the draft, because a model that
        knows the format generates it.
        """
        examples: list[Example] = batch["examples"]
        scored = self.family.score is not None  # pairs of free-form texts have options, too
        if not self.ranks_options or not scored or not all(example.options for example in examples):
            return [], batch
        batches = [{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in b.items()} | sources_in(batch)
                   for b in self.option_batches(examples)]  # fmt: skip
        likelihoods = torch.stack([self.log_likelihood(option, reader) for option in batches], dim=-1)
        for i, example in enumerate(examples):
            likelihoods[i, len(example.options) :] = -torch.inf  # rows with fewer options than others
        choice, broken = likelihoods.argmax(-1).tolist(), self.without_numbers(likelihoods).tolist()
        found = zip(examples, choice, broken, strict=True)
        options = [None if lost else example.options[k] for example, k, lost in found]
        return options, self.drafted(batch, batches, choice)

    # --- a whole split --------------------------------------------------------------------------------------

    def on_test_epoch_end(self) -> None:
        """Log the scores by task and on average, and the loss for free-form texts."""
        if self.free:
            self.log(f"{self.prefix}test/loss", self.loss.compute(), sync_dist=True)
        super().on_test_epoch_end()


def _commonest_answers(examples: Iterable[Example]) -> dict[str, str]:
    """Return the most common answer among each task's train rows with options."""
    answers: dict[str, Counter[str]] = {}
    for example in (example for example in examples if example.options):
        answers.setdefault(example.task, Counter())[example.answer] += 1
    return {task: counts.most_common(1)[0][0] for task, counts in answers.items()}
