"""The loss of an optimizer step is the mean over its targets, however they are divided."""

import csv
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
import torch
from lightning import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from reft_lightning.config import compose
from reft_lightning.data.sampling import TrainBatches
from reft_lightning.runs import experiment
from reft_lightning.training.step_loss import part_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "glue"
COMMON = ("model=tiny_random", "data.group_by_length=false", "trainer.accelerator=cpu", "optimizer.lr=1e-9")
LENGTHS = (1, 2, 8, 40)  # of targets, in bytes


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """22 rows, so that with steps of 8 the last one is shorter."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rng = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "reply"])
        for i in range(22):
            question = "".join(rng.choices("abcdef", k=rng.randint(12, 30)))
            writer.writerow([question, "".join(rng.choices("uvwxyz", k=LENGTHS[i % 4]))])
    return path


def build(rows, *overrides, method=("intervention.rank=2", "intervention.positions=l2")):
    return build_double(
        "data=custom", f"data.path='{rows}'", "data.prompt=question", "data.target=reply", "data.validation_size=0",
        *method, *overrides,
    )  # fmt: skip


def build_double(*overrides):
    config = compose.compose([*COMMON, *overrides])
    torch.manual_seed(config.seed)
    objects = experiment.build(config)
    objects.model.double()
    return objects


class Gradients(Callback):
    """Record the rows and the gradient of each optimizer step, and the loss logged with it."""

    def __init__(self):
        self.steps, self._rows = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self._rows += batch["rows"].tolist()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradient = torch.cat([p.grad.flatten() for p in trained(module)]).clone()
        self.steps.append([self._rows, gradient])
        self._rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if not self._rows and len(self.steps[-1]) == 2:
            self.steps[-1].append(float(trainer.callback_metrics["train/loss"]))


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def fit(objects, *callbacks, **settings):
    found = Gradients()
    fitting = short_runs.trainer(callbacks=[found, *callbacks], limit_val_batches=0, **settings)
    fitting.fit(objects.module, objects.data)
    return found.steps


def of_one_batch(objects, rows):
    """Loss and gradient of rows as one batch, from the model's own forward pass."""
    objects.module.train()
    objects.module.training_pass = None
    objects.module.zero_grad()
    encoded = objects.data.train_rows
    batch = objects.data._collator(training=True)([encoded[row] for row in rows])
    loss = objects.module.loss_of(batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trained(objects.module)])


def assert_each_step_is_that_of_one_batch(objects, steps, sizes):
    assert [len(rows) for rows, *_ in steps] == sizes
    for rows, gradient, logged in steps:
        loss, expected = of_one_batch(objects, rows)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        assert logged == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "accumulated", "settings", "sizes"),
    [
        (8, 1, {}, [8, 8, 6]),
        (1, 4, {"limit_train_batches": 7}, [4, 3]),
        (1, 4, {"max_steps": 2, "max_epochs": -1}, [4, 4]),
        (2, 4, {"max_epochs": 2}, [8, 8, 6] * 2),
    ],
)
def test_the_gradient_of_a_step_and_its_logged_loss_are_those_of_one_batch(
    rows, batch, accumulated, settings, sizes
):
    objects = build(rows, f"data.batch_size={batch}")
    steps = fit(objects, accumulate_grad_batches=accumulated, **settings)
    assert_each_step_is_that_of_one_batch(objects, steps, sizes)


def test_accumulation_may_change_between_epochs(rows):
    objects = build(rows, "data.batch_size=2")
    steps = fit(objects, GradientAccumulationScheduler({0: 2, 1: 4}), max_epochs=2)
    assert_each_step_is_that_of_one_batch(objects, steps, [4, 4, 4, 4, 4, 2, 8, 8, 6])


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (["intervention.positions=l2"], "the keys and values of prefixes"),
        (["intervention.positions=l2", "kept.limit_gb=1"], "the keys and values of prefixes"),
        (
            ["intervention.positions=f2+l2", "intervention.layers=[1]", "kept.limit_gb=1"],
            "the output of block 1",
        ),
        (["intervention=direft", "intervention.positions=all"], None),
        (["intervention=peft/lora", "intervention.options.lora_dropout=0.0"], None),
    ],
    ids=["prefix", "kept prefix", "kept blocks", "all", "lora"],
)
def test_every_way_through_the_model_gives_the_gradient_of_one_batch(rows, method, part):
    objects = build(rows, "data.batch_size=1", method=method)
    steps = fit(objects, accumulate_grad_batches=4, max_steps=2)
    assert getattr(objects.module.training_pass.part, "name", None) == part
    assert_each_step_is_that_of_one_batch(objects, steps, [4, 4])


def test_each_row_of_a_classifier_counts_the_same():
    objects = build_double(
        "model.config.model_type=bert", "+model.config.initializer_range=0.4", "data=glue_rte", "data.source=local",
        f"data.path='{FIXTURES}'", "intervention.positions=f3", "intervention.rank=1", "data.batch_size=3",
    )  # fmt: skip
    steps = fit(objects, accumulate_grad_batches=2, limit_train_batches=5)
    assert_each_step_is_that_of_one_batch(objects, steps, [6, 6, 3])


def test_gradients_are_clipped_as_those_of_one_batch(rows):
    whole, divided = (
        fit(build(rows, f"data.batch_size={b}"), accumulate_grad_batches=8 // b, gradient_clip_val=1e-3)
        for b in (8, 2)
    )
    for (_, expected, _), (_, gradient, _) in zip(whole, divided, strict=True):
        assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_micro_batch_mean_is_the_mean_of_the_batches_means(rows):
    objects = build(rows, "data.batch_size=1", "loss_reduction=micro_batch_mean")
    for numbers, gradient, logged in fit(objects, accumulate_grad_batches=4, max_steps=2):
        each = [of_one_batch(objects, [row])[1] for row in numbers]
        expected = sum(each) / 4
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        loss, whole = of_one_batch(objects, numbers)
        assert torch.cosine_similarity(gradient, whole, 0) < 0.99
        assert logged == pytest.approx(loss, rel=1e-6)  # the same for both reductions


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_shares_of_all_ranks_are_the_steps_targets(world, accumulated):
    targets = [
        LENGTHS[i % 4] for i in range(25)
    ]  # with 4 ranks, the last batch is filled up with rows read before
    ranks = [TrainBatches(targets, 2, 0, False, rank, world, targets) for rank in range(world)]
    batches = len(ranks[0])
    for start in range(0, batches, accumulated):
        step = range(start, min(start + accumulated, batches))
        total = sum(ranks[0].targets_of(0)[i][1] for i in step)
        shares = 0.0
        for rank in ranks:
            trainer = SimpleNamespace(
                accumulate_grad_batches=accumulated, world_size=world, current_epoch=0, num_training_batches=batches,
                train_dataloader=SimpleNamespace(batch_sampler=rank),
            )  # fmt: skip
            for i in step:
                part = part_of(trainer, i, "token_mean")
                shares += part.share
                mine = sum(targets[row] for row in rank.batches(0)[i])
                assert part.share in (pytest.approx(mine / total), 0)
                assert part.weight == pytest.approx(part.share * accumulated * world)
                assert (part.first, part.last) == (i == step[0], i == step[-1])
        assert shares == pytest.approx(1)
    assert sum(total for _, total in ranks[0].targets_of(0)) == sum(targets)  # no row is counted twice


def test_an_unknown_reduction_is_answered_with_the_nearest():
    with pytest.raises(
        Exception, match=r"loss_reduction must be one of token_mean, micro_batch_mean.*token_means"
    ):
        compose.compose(["model=tiny_random", "loss_reduction=token_means"])


def test_a_loader_that_cannot_count_ahead_takes_the_mean_of_means_only():
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, world_size=1, current_epoch=0, num_training_batches=3,
        train_dataloader=SimpleNamespace(batch_sampler=[[0], [1], [2]]),
    )  # fmt: skip
    assert [part_of(trainer, i, "micro_batch_mean").share for i in range(3)] == [0.5, 0.5, 1.0]
    with pytest.raises(
        ValueError, match=r"targets_of, such as .*TrainBatches, or set loss_reduction=micro_batch_mean"
    ):
        part_of(trainer, 0, "token_mean")
