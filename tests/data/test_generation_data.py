"""Splits, order, ranks, resume and the sealed test split. Defects are numbered as in test_defects_of_peers.py."""

import itertools
import json
import logging
import multiprocessing
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import short_runs
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DistributedSampler

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data import FAMILIES
from reft_lightning.data.example import Example
from reft_lightning.data.family import Family, Task
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.rows import DataSource, LocalRows
from reft_lightning.data.sampling import TrainBatches, evaluation_share
from reft_lightning.data.splits import carve_validation, fingerprint, subset

FIXTURES = Path(__file__).parents[1] / "fixtures" / "commonsense"
FAMILY = FAMILIES["commonsense"]
RENDERED = DataSource("local", str(FIXTURES / "rendered"))
ORIGINAL = DataSource("local", str(FIXTURES / "original"))


def make(tasks=("boolq", "piqa", "winogrande"), source=RENDERED, **changes):
    arguments = {"batch_size": 4, "eval_batch_size": 3, "max_length": 1024, "validation_size": 6}
    return GenerationData(FAMILY, byte_tokenizer(), source, tasks=tasks, **{**arguments, **changes})


def toy(count, task="t"):
    return [Example(task, f"{task} {i}\n", "x", "x") for i in range(count)]


def prompts(rows):
    return [example.prompt for example in rows.examples]


def brings_validation(folder, *names):
    """A family of tasks a and b, where the given tasks have validation rows of their own."""

    def example(row):
        return Example(row["task"], row["q"], "x", "x")

    tasks = {}
    for name in ("a", "b"):
        splits = ("train", *(("validation",) if name in names else ()))
        for split in splits:
            rows = [{"task": name, "q": f"{name} {split} {i}"} for i in range(4)]
            (folder / f"{name}.{split}.json").write_text(json.dumps(rows))
        local = {split: (LocalRows((f"{name}.{split}.json",)),) for split in splits}
        tasks[name] = Task(name, example, local=local)
    return Family("toy", 1, tasks, 4, score=None)


class TestSplits:
    def test_the_split_depends_on_its_own_seed_alone(self):
        one, two, other = make(seed=1), make(seed=2), make(split_seed=7)
        for data in (one, two, other):
            data.setup("fit")
        assert one.data_versions["split"] == two.data_versions["split"]
        assert one.data_versions["split"] != other.data_versions["split"]

    def test_split_first_subset_after_D13(self):
        full, small = make(), make(limit_train=5)
        assert small.val_tasks == full.val_tasks
        for task in full.val_tasks:
            assert prompts(small._validation[task]) == prompts(full._validation[task])
        assert len(small.train_rows) == 5
        assert set(prompts(small.train_rows)) <= set(prompts(full.train_rows))

    def test_train_and_validation_share_no_prompt_D13(self):
        data = make()
        validation = {p for task in data.val_tasks for p in prompts(data._validation[task])}
        assert len(validation) == 6
        assert not validation & set(prompts(data.train_rows))

    def test_winogrande_sizes_repeat_rows_and_none_of_them_leaks(self):
        data = make(tasks=["winogrande"], source=ORIGINAL, validation_size=4)
        validation = set(prompts(data._validation[data.val_tasks[0]]))
        counts = Counter(prompts(data.train_rows))
        assert max(counts.values()) > 1  # repeated train rows are kept, as in the authors' mixture
        assert not validation & set(counts)

    def test_each_task_gives_its_share(self):
        data = make()
        assert {task: len(data._validation[task]) for task in data.val_tasks} == {
            "boolq": 2,
            "piqa": 2,
            "winogrande": 2,
        }

    def test_carving_is_stratified_by_largest_remainder(self):
        rows = toy(70, "a") + toy(20, "b") + toy(10, "c")
        train, validation = carve_validation(rows, 17, seed=0)
        assert Counter(e.task for e in validation) == {"a": 12, "b": 3, "c": 2}
        assert len(train) == 83
        assert sorted(train + validation, key=rows.index) == rows

    def test_no_validation_rows_are_possible(self):
        assert carve_validation(toy(3), 0, seed=0) == (toy(3), [])
        assert make(validation_size=0).val_dataloader() == []

    @pytest.mark.parametrize("size", [-1, 3, 99])
    def test_an_impossible_validation_size_is_refused(self, size):
        with pytest.raises(ValueError, match=rf"validation_size must be .* got {size}"):
            carve_validation(toy(3), size, seed=0)

    def test_a_larger_subset_contains_the_smaller(self):
        small, large = subset(toy(50), 5, 3), subset(toy(50), 20, 3)
        assert set(small) < set(large)
        assert small == sorted(small, key=toy(50).index)
        assert subset(toy(5), None, 3) == toy(5)
        with pytest.raises(ValueError, match="at least 1"):
            subset(toy(5), 0, 3)

    def test_limit_validation_stays_stratified(self):
        data = make(limit_validation=3)
        assert {task: len(data._validation[task]) for task in data.val_tasks} == dict.fromkeys(
            ("boolq", "piqa", "winogrande"), 1
        )

    def test_validation_rows_that_a_family_brings_are_used(self, tmp_path):
        family = brings_validation(tmp_path, "a", "b")
        data = GenerationData(
            family, byte_tokenizer(), DataSource("local", str(tmp_path)), tasks=("a", "b"), batch_size=2,
            eval_batch_size=2, validation_size=3,
        )  # fmt: skip
        assert data.val_tasks == ("a", "b")
        held_out = [prompt for task in data.val_tasks for prompt in prompts(data._validation[task])]
        assert len(held_out) == 3
        assert all(" validation " in prompt for prompt in held_out)
        assert len(data.train_rows) == 8

    def test_tasks_with_and_without_validation_rows_are_not_trained_together(self, tmp_path):
        family = brings_validation(tmp_path, "a")
        data = GenerationData(
            family, byte_tokenizer(), DataSource("local", str(tmp_path)), tasks=("a", "b"), batch_size=2,
            eval_batch_size=2, validation_size=3,
        )  # fmt: skip
        with pytest.raises(
            ValueError, match=r"tasks with and without validation rows in source local; these have none: b"
        ):
            data.setup("fit")

    def test_other_tasks_can_be_trained_on_than_tested(self):
        data = make(tasks=["openbookqa"], train_tasks=["ARC-Easy", "ARC-Challenge"])
        assert data.val_tasks == ("ARC-Easy", "ARC-Challenge")
        assert data.test_tasks == ("openbookqa",)

    def test_a_mixture_file_replaces_the_train_splits(self):
        source = DataSource("local", str(FIXTURES / "rendered"), mixture=str(FIXTURES / "mixture.json"))
        data = make(source=source, validation_size=8)
        assert data.val_tasks == ("mixture",)
        assert len(data.train_rows) == 32 - 8
        options = Counter(e.options for e in data._validation["mixture"].examples)
        assert len(options) == 6  # true/false, solution, answer1-3, ending, option and answer1-4 all occur

    # everything that training or scoring reads: the rejected answer of a pair, the ranked options, the gold answers
    @pytest.mark.parametrize(
        "changed",
        [
            {"options": ("a", "c")},
            {"options": ("a",), "references": ("b",)},
            {"answer": "b"},
            {"context": "c"},
            {"source_prompt": "c"},
            {"turns": (("user", "c"),)},
            {"references": ("c",)},
        ],
    )
    def test_a_row_that_differs_in_anything_has_another_fingerprint(self, changed):
        row = Example("t", "q", "a", "a", options=("a", "b"))
        assert fingerprint([row]) != fingerprint([replace(row, **changed)])
        assert fingerprint([row]) == fingerprint([replace(row, source="elsewhere", recorded={"id": "7"})])
        assert fingerprint(toy(3)) != fingerprint(toy(3)[::-1])


class TestTestSplit:
    def test_a_sealed_module_refuses_to_build_it(self):
        data = make(sealed=True)
        data.setup("fit")
        for build in (lambda: data.setup("test"), data.test_dataloader):
            with pytest.raises(PermissionError, match="sealed"):
                build()
        assert data.test_rows == {}

    def test_fitting_and_validating_read_no_test_rows(self):
        data = make()
        data.setup("fit")
        data.val_dataloader()
        assert data.test_rows == {}
        assert data.data_versions["test"] == {}

    def test_the_rows_that_were_read_are_known(self):
        data = make(limit_test=4)
        data.test_dataloader()
        assert data.test_rows == {"boolq": 4, "piqa": 4, "winogrande": 4}

    def test_test_prompts_seen_in_training_are_counted_when_the_test_is_built(self, caplog, tmp_path):
        for split in ("train", "test"):
            (tmp_path / "boolq").mkdir(exist_ok=True)
            (tmp_path / "boolq" / f"{split}.json.gz").write_bytes(
                (FIXTURES / "rendered" / "boolq" / "train.json.gz").read_bytes()
            )
        data = make(tasks=["boolq"], source=DataSource("local", str(tmp_path)), validation_size=2)
        with caplog.at_level(logging.WARNING):
            data.setup("fit")
            assert "test questions" not in caplog.text
            data.setup("test")
        assert "12 of 12 boolq test rows occur in the train rows" in caplog.text
        assert data.data_versions["test"]["boolq"]["overlap"] == 12


class TestTrainBatches:
    lengths = tuple(random.Random(0).choices(range(5, 200), k=1003))

    def make(self, **changes):
        return TrainBatches(self.lengths, **{"batch_size": 8, "seed": 3, **changes})

    @pytest.mark.parametrize("grouped", [True, False])
    def test_an_epoch_reads_every_row_once(self, grouped):
        batches = list(self.make(group_by_length=grouped))
        assert sorted(i for batch in batches for i in batch) == list(range(1003))
        assert len(batches) == len(self.make()) == 126

    def test_a_row_meets_other_rows_in_each_epoch_however_small_the_data(self):
        small = TrainBatches(self.lengths[:64], 4, seed=0)
        first, second = ({frozenset(batch) for batch in small.batches(epoch)} for epoch in (0, 1))
        assert len(first & second) < 4

    @pytest.mark.parametrize("grouped", [True, False])
    def test_epochs_differ_D69(self, grouped):
        loader = self.make(group_by_length=grouped)
        assert loader.batches(0) != loader.batches(1)
        assert loader.batches(0) == self.make(group_by_length=grouped).batches(0)
        assert loader.batches(0) != self.make(group_by_length=grouped, seed=4).batches(0)

    def test_iterating_again_gives_the_next_epoch_even_without_lightning(self):
        loader = self.make()
        assert [list(loader), list(loader)] == [loader.batches(0), loader.batches(1)]

    def test_groups_pad_little_and_their_order_is_random(self):
        def padded(batches):
            return sum(max(self.lengths[i] for i in b) * len(b) for b in batches) / sum(self.lengths)

        grouped, plain = list(self.make()), list(self.make(group_by_length=False))
        assert padded(grouped) < 1.1 < 1.5 < padded(plain)
        means = [sum(self.lengths[i] for i in b) / len(b) for b in grouped[:-1]]
        assert means not in (sorted(means), sorted(means, reverse=True))
        ups = sum(a < b for a, b in itertools.pairwise(means))
        assert 0.3 < ups / len(means) < 0.7

    @pytest.mark.parametrize(("size", "random_order"), [(8, 1.8), (32, 2.2)])
    def test_groups_of_a_mixture_of_short_and_long_tasks_waste_little(self, size, random_order):
        rng = random.Random(0)
        tasks = rng.choices([(36, 40), (60, 95), (130, 293)], weights=(20, 58, 22), k=5000)
        lengths = [rng.randint(*task) for task in tasks]

        def padded(grouped):
            batches = TrainBatches(lengths, size, seed=1, group_by_length=grouped).batches(0)
            return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths)

        assert padded(True) < 1.1 < random_order < padded(False)

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_ranks_get_equally_many_batches_and_share_the_rows_D69(self, world):
        ranks = [list(self.make(rank=rank, world_size=world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch for batches in ranks for batch in batches)
        seen = Counter(i for batches in ranks for batch in batches for i in batch)
        assert set(seen) == set(range(1003))
        assert sum(seen.values()) - 1003 < world  # only rows that fill up the last batch are read twice

    def test_two_ranks_see_the_steps_of_one(self):
        one = self.make(batch_size=16).batches(5)
        left, right = (self.make(batch_size=8, rank=r, world_size=2).batches(5) for r in range(2))
        assert [sorted(a + b) for a, b in zip(left, right, strict=True)] == [sorted(batch) for batch in one]

    def test_fewer_rows_than_ranks_still_give_each_rank_one(self):
        ranks = [TrainBatches([1, 2], 4, 0, rank=r, world_size=5).batches(0) for r in range(5)]
        assert all(len(batches) == 1 and len(batches[0]) == 1 for batches in ranks)

    @pytest.mark.parametrize(
        ("arguments", "words"), [(([], 4, 0), "no train rows"), (([1], 0, 0), "batch_size")]
    )
    def test_impossible_arguments_are_refused(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            TrainBatches(*arguments)


class TestEvaluationShare:
    @pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 4), (0, 2)])
    def test_every_row_is_read_by_exactly_one_rank(self, count, world):
        shares = [evaluation_share([7] * count, rank, world) for rank in range(world)]
        assert sorted(i for share in shares for i in share) == list(range(count))

    def test_the_longest_rows_come_first(self):
        assert evaluation_share([3, 9, 5]) == [1, 2, 0]


class TestLoaders:
    def test_training_batches_hold_no_python_objects_but_the_boundary(self):
        batch = next(iter(make().train_dataloader()))
        others = {name for name, value in batch.items() if not isinstance(value, torch.Tensor)}
        assert others == {"boundary"}

    def test_an_epoch_names_every_train_row_once_and_means_it(self):
        data = make()
        batches = list(data.train_dataloader())
        assert sorted(torch.cat([batch["rows"] for batch in batches]).tolist()) == list(
            range(len(data.train_rows))
        )
        for batch in batches:
            for ids, mask, i in zip(
                batch["input_ids"], batch["attention_mask"].bool(), batch["rows"], strict=True
            ):
                row = data.train_rows[int(i)]
                assert ids[mask].tolist() == row.prompt_ids + row.target_ids

    def test_an_evaluation_batch_has_the_examples_of_its_rows(self):
        data = make()
        for batch in data.val_dataloader()[0]:
            for labels, example in zip(batch["labels"], batch["examples"], strict=True):
                assert data.tokenizer.decode(labels[labels != -100][:-1]) == example.target

    def test_ranks_come_from_torch_distributed(self, monkeypatch):
        whole = [e.prompt for loader in make().test_dataloader() for b in loader for e in b["examples"]]
        parts, lengths = [], []
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
            data = make()
            parts += [e.prompt for loader in data.test_dataloader() for b in loader for e in b["examples"]]
            lengths.append(len(data.train_dataloader()))
        assert sorted(parts) == sorted(whole)
        assert lengths[0] == lengths[1]

    @pytest.mark.parametrize("given", [2, 8])  # in the middle of an epoch, and at its end
    def test_without_lightning_too_a_loader_goes_on_where_its_state_was_saved(self, given):
        loader, again = (make(limit_train=30).train_dataloader() for _ in range(2))
        batches = iter(loader)
        for _ in range(given):
            next(batches)
        again.load_state_dict(loader.state_dict())
        rest = list(batches) or list(loader)
        assert [batch["rows"].tolist() for batch in again] == [batch["rows"].tolist() for batch in rest]

    def test_lightning_cannot_divide_the_rows_of_a_rank_once_more(self):
        """It does so unless the Trainer has `use_distributed_sampler=False`, as its error says."""
        data = make()
        for loader in (data.train_dataloader(), data.val_dataloader()[0], data.test_dataloader()[0]):
            with pytest.raises(TypeError, match="use_distributed_sampler=False"):
                _update_dataloader(loader, DistributedSampler(loader.dataset, num_replicas=2, rank=0))

    def test_moving_a_batch_leaves_the_examples_alone(self):
        data = make()
        batch = next(iter(data.val_dataloader()[0]))
        moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        assert moved["examples"] is batch["examples"]
        assert torch.equal(moved["input_ids"], batch["input_ids"])

    def test_data_versions_say_what_was_read(self):
        data = make(tasks=["boolq"])
        data.setup("fit")
        facts = data.data_versions["train"]["boolq"]
        assert (facts["source"], facts["rows"], len(facts["fingerprint"])) == ("local", 12, 16)
        assert data.data_versions["version"] == FAMILY.version
        assert data.data_versions["split"]["validation_rows"] == 6

    def test_unknown_tasks_and_sources_are_refused_before_anything_is_read(self):
        with pytest.raises(ValueError, match=r"did you mean 'piqa'\?"):
            make(tasks=["piqua"])
        with pytest.raises(ValueError, match="one of hub, local, wheel; got 'disk'"):
            make(source="disk")
        with pytest.raises(ValueError, match="needs path"):
            make(source="local")
        with pytest.raises(ValueError, match="tasks is empty"):
            make(tasks=[])


def read_as_rank(rank, store, folder):
    """Read an epoch and a test split as one of two ranks, in a separate process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = make(batch_size=2, limit_train=23)
    steps = [b["input_ids"][b["prompt_mask"]].tolist() for b in data.train_dataloader()]
    tested = [e.prompt for loader in data.test_dataloader() for b in loader for e in b["examples"]]
    torch.save((steps, tested), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_an_epoch_and_a_test_split_D69(tmp_path):
    torch.multiprocessing.spawn(read_as_rank, (tmp_path / "store", tmp_path), nprocs=2)
    (left, left_test), (right, right_test) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = make(batch_size=4, limit_train=23)
    batches = alone.train_dataloader()
    tokens = [sorted(b["input_ids"][b["prompt_mask"]].tolist()) for b in batches]
    assert [sorted(a + b) for a, b in zip(left, right, strict=True)] == tokens
    whole = [e.prompt for loader in alone.test_dataloader() for b in loader for e in b["examples"]]
    assert sorted(left_test + right_test) == sorted(whole)


class Recorder(pl.LightningModule):
    """Learns one number from each batch and records what it saw."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.stop_at, self.names = [], stop_at, []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop_at:
            raise InterruptedError("power cut")
        self.seen.append((self.current_epoch, tuple(batch["input_ids"].flatten().tolist())))
        return (self.weight - batch["input_ids"].float().mean()).pow(2)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        data = self.trainer.datamodule
        tasks = data.test_tasks if self.trainer.testing else data.val_tasks
        self.names.append((tasks[dataloader_idx], batch["examples"][0].task))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.5)


def trainer(folder, **changes):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    saves = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
    return short_runs.trainer(**saves | changes)


def resumed(folder, step, before, after, **settings):
    """Train an interrupted run and its continuation; return what both saw, and the last model."""
    first, second = Recorder(stop_at=step), Recorder()
    with pytest.raises(InterruptedError):
        trainer(folder, **settings).fit(first, datamodule=make(**before))
    checkpoint = folder / f"step={step}.ckpt"
    trainer(folder, **settings).fit(
        second, datamodule=make(**after), ckpt_path=checkpoint, weights_only=False
    )
    return first.seen + second.seen, second


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    model = Recorder()
    trainer(tmp_path_factory.mktemp("whole")).fit(model, datamodule=make(**TestResume.rows))
    assert len(model.seen) == 24
    assert len({batch for _, batch in model.seen}) > 16  # epochs differ
    return model


class TestResume:
    """8 batches per epoch; other frameworks replay them (D69)."""

    rows: ClassVar = {"limit_train": 30}

    @pytest.mark.parametrize(
        ("step", "before", "after"),
        [  # within an epoch, at its end, within the next; the number of workers before and after
            (3, 0, 0), (8, 0, 0), (11, 0, 0), (3, 2, 0), (11, 1, 2), pytest.param(8, 2, 2, marks=pytest.mark.slow),
            pytest.param(21, 2, 2, marks=pytest.mark.slow),
        ],
    )  # fmt: skip
    def test_a_run_resumed_inside_or_at_the_end_of_an_epoch_sees_the_same_batches(
        self, tmp_path, whole, step, before, after
    ):
        data = (self.rows | {"num_workers": workers} for workers in (before, after))
        seen, model = resumed(tmp_path, step, *data)
        assert seen == whole.seen
        assert torch.equal(model.weight, whole.weight)

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_are_forked_on_every_version_of_python(self, workers):
        """A fork takes milliseconds; Python 3.14's default starts another Python for each worker of each loader."""
        data = make(**self.rows, num_workers=workers)
        loaders = [data.train_dataloader(), *data.val_dataloader()]
        found = {(loader.num_workers, loader.multiprocessing_context) for loader in loaders}
        assert found == {(workers, multiprocessing.get_context("fork") if workers else None)}

    @pytest.mark.parametrize("step", [5, 6])
    def test_after_an_epoch_that_was_cut_short_comes_the_next(self, tmp_path, step):
        """Uses 5 of 8 batches per epoch."""
        cut, whole = {"max_epochs": 2, "limit_train_batches": 5}, Recorder()
        trainer(tmp_path / "whole", **cut).fit(whole, datamodule=make(**self.rows))
        assert resumed(tmp_path, step, self.rows, self.rows, **cut)[0] == whole.seen

    def test_a_checkpoint_of_the_epochs_end_resumes_with_the_next_epoch(self, tmp_path, whole):
        def ends(**changes):
            saving = ModelCheckpoint(tmp_path / "e", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            return trainer(tmp_path, callbacks=[saving], **changes)

        first, second, path = Recorder(), Recorder(), tmp_path / "e" / "epoch=0.ckpt"
        ends(max_epochs=1).fit(first, datamodule=make(**self.rows))
        ends().fit(second, datamodule=make(**self.rows), ckpt_path=path, weights_only=False)
        assert first.seen + second.seen == whole.seen

    def test_other_data_or_batches_cannot_resume_inside_an_epoch(self, tmp_path):
        words = r"cannot resume within an epoch: rows was 30 in the checkpoint and is 20 now"
        with pytest.raises(ValueError, match=words):
            resumed(tmp_path, 3, self.rows, {"limit_train": 20})

    def test_tasks_name_the_loaders_that_lightning_runs(self, tmp_path):
        data = make(tasks=["boolq", "openbookqa"], train_tasks=["piqa", "boolq"])
        model, runner = Recorder(), trainer(tmp_path, max_epochs=1)
        runner.fit(model, datamodule=data)
        runner.test(model, datamodule=data, weights_only=False)
        assert all(expected == found for expected, found in model.names)
        assert {name for name, _ in model.names} == {"boolq", "piqa", "openbookqa"}
