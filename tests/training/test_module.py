"""The LightningModule: losses, scores, roles, modes and what its checkpoints hold."""

import math
from types import SimpleNamespace

import pytest
import short_runs
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler
from short_runs import trainer

from reft_lightning.data.encoding import target_only
from reft_lightning.data.option_batches import option_batches
from reft_lightning.evaluation import wilson_interval
from reft_lightning.training import generation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"), tasks=("boolq", "piqa"))


TWO = "data.tasks=[boolq,piqa]"


class Steps(Callback):
    """Record something after each optimizer step."""

    def __init__(self, note):
        self.note, self.noted = note, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.noted.append(self.note(module, outputs))


def test_the_loss_is_that_of_full_logits(data):
    objects = short_runs.build(data)
    batch = next(iter(objects.data.train_dataloader()))
    loss = objects.module.loss_of(batch)
    ordinary = {k: v for k, v in batch.items() if k not in ("boundary", "rows")}
    logits = objects.model(**ordinary).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(objects.model(**ordinary).loss, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight", r"the loss is nan at step 2: lower optimizer\.lr"),
        ("basis", "R cannot be computed at step 2"),
    ],
)
def test_numbers_that_are_lost_stop_the_run_and_name_the_step(data, name, message):
    objects = short_runs.build(data)

    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                for full_name, parameter in module.model.interventions.named_parameters():
                    if full_name.endswith(name):
                        parameter.data.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match=message):
        trainer(callbacks=[Poison()]).fit(objects.module, objects.data)


def test_only_rotations_turn_and_only_the_adapter_moves(data):
    objects = short_runs.build(data, "optimizer.weight_decay=0.5", "optimizer.lr=0.05")
    before = {k: v.clone() for k, v in objects.model.base_model.state_dict().items()}
    start = {k: v.clone() for k, v in objects.model.adapter_state_dict().items()}
    trainer(max_epochs=2).fit(objects.module, objects.data)
    for name, tensor in objects.model.base_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in objects.model.adapter_state_dict().items():
        assert not torch.equal(tensor, start[name]), name
    for group in objects.model.interventions.values():
        for phi in group:
            torch.testing.assert_close(phi.R @ phi.R.mT, torch.eye(2), atol=1e-5, rtol=0)


def test_a_step_starts_without_the_gradients_of_the_last(data):
    objects = short_runs.build(data, "optimizer.lr=1e-8", "trainer.gradient_clip_val=null")
    gradients = Steps(lambda m, _: [p.grad.clone() for p in m.model.interventions.parameters()])
    batches = list(objects.data.train_dataloader())
    trainer(callbacks=[gradients], max_steps=3).fit(objects.module, objects.data)
    for batch, found in zip(batches, gradients.noted, strict=False):
        objects.module.zero_grad()
        objects.model(
            **{k: v for k, v in target_only(batch).items() if k not in ("boundary", "rows")}
        ).loss.backward()
        for parameter, gradient in zip(objects.model.interventions.parameters(), found, strict=True):
            # the learning rate of 1e-8 hardly moves parameters; accumulated gradients would be twice as large
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_training_trains_everything_and_validation_evaluates_everything(data):
    objects = short_runs.build(data, "intervention.dropout=0.5", TWO)
    modes = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            modes.append(("train", {m.training for m in module.model.modules()}))

        def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
            modes.append(("eval", {m.training for m in module.model.modules()}))

    fitting = trainer(callbacks=[Modes()], val_check_interval=3)
    fitting.validate(objects.module, objects.data, verbose=False)  # the base, before training
    fitting.fit(objects.module, objects.data)
    assert {mode for stage, mode in ((s, frozenset(m)) for s, m in modes) if stage == "train"} == {
        frozenset({True})
    }
    assert {frozenset(m) for stage, m in modes if stage == "eval"} == {frozenset({False})}
    assert "train" in [stage for stage, _ in modes[-10:]]  # steps came after a validation


@pytest.mark.parametrize(("asked", "rate"), [("false", 0.0), ("true", 0.4)])
def test_the_dropout_of_the_base_acts_in_training_only_when_asked_for(data, asked, rate):
    objects = short_runs.build(data, f"model.base_dropout={asked}", "+model.config.attention_dropout=0.4")
    attention = objects.model.base_model.model.layers[0].self_attn
    assert attention.attention_dropout == rate
    batch = {
        k: v for k, v in next(iter(objects.data.train_dataloader())).items() if k not in ("boundary", "rows")
    }
    losses = {objects.model(**batch).loss.item() for _ in range(3)}
    assert len(losses) == (1 if rate == 0 else 3)
    objects.module.eval()
    assert len({objects.model(**batch).loss.item() for _ in range(3)}) == 1


def test_gradient_checkpointing_trains_the_same(data):
    losses = []
    for setting in ("false", "true"):
        objects = short_runs.build(data, f"model.gradient_checkpointing={setting}")
        note = Steps(lambda _, outputs: outputs["loss"].item())
        trainer(callbacks=[note]).fit(objects.module, objects.data)
        losses.append(note.noted)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(set(losses[0])) > 1


def test_scores_counts_and_predictions_agree(data, monkeypatch):
    objects = short_runs.build(data, TWO, "decoding.max_new_tokens=30", "data.validation_size=8")
    module = objects.module
    generated = iter(["the correct answer is true", "the correct answer is solution1", "nothing"] * 20)
    monkeypatch.setattr(
        generation, "generate", lambda _, batch, *__: [[next(generated)] for _ in batch["examples"]]
    )
    measured = trainer().validate(module, objects.data, verbose=False)
    measured = {k: v for part in measured for k, v in part.items()}
    rows = module.predictions
    assert len(rows) == 8
    accuracies = []
    for task in ("boolq", "piqa"):
        own = [row for row in rows if row["task"] == task]
        assert {row["source"].split("/")[0] for row in own} == {task}
        correct = sum(row["answer"] == row["gold"] for row in own)
        assert correct == sum(row["correct"] for row in own)
        missing = sum(row["answer"] is None for row in own)
        assert module.counts[f"val/{task}/accuracy"] == {
            "correct": correct,
            "total": len(own),
            "missing": missing,
            "interval": list(wilson_interval(correct, len(own))),
        }
        assert measured[f"val/{task}/accuracy"] == pytest.approx(correct / len(own))
        accuracies.append(correct / len(own))
    assert any(row["answer"] is None for row in rows)
    assert sum(accuracies) > 0
    # the mean over tasks as in the paper's tables, not over rows
    assert measured["val/accuracy"] == pytest.approx(sum(accuracies) / 2)
    options = {row["option"] for row in rows}
    assert options <= {"true", "false", "solution1", "solution2"}


def test_the_option_that_is_chosen_is_the_likeliest(data):
    objects = short_runs.build(data, TWO)
    trainer().validate(objects.module, objects.data, verbose=False)
    examples = {e.source: e for rows in objects.data._validation.values() for e in rows.examples}
    with torch.no_grad():
        for row in objects.module.predictions:
            example = examples[row["source"]]
            scores = []
            for batch in option_batches(objects.data.tokenizer, [example], 512):
                inputs = {k: v for k, v in batch.items() if k not in ("boundary", "rows")}
                tokens = (batch["labels"] != -100).sum()
                scores.append(-(objects.model(**inputs).loss * tokens).item())
            best = example.options[scores.index(max(scores))]
            assert row["option"] == best.removeprefix("the correct answer is ")


def test_an_option_that_has_no_likelihood_is_not_chosen(data, caplog):
    """NaN would count as the largest value and select the first option, which is correct in some rows."""
    objects = short_runs.build(data, TWO)
    with torch.no_grad():
        next(p for n, p in objects.model.base_model.named_parameters() if "norm" in n).fill_(math.nan)
    measured = trainer().validate(objects.module, objects.data, verbose=False)[0]
    assert measured["val/option_accuracy"] == 0
    assert all(row["option"] is None for row in objects.module.predictions)
    counts = [count for name, count in objects.module.counts.items() if "option" in name]
    assert all(count["missing"] == count["total"] > 0 for count in counts)
    assert caplog.text.count("outputs are NaN") == 1


def test_options_are_not_ranked_unless_asked_for(data):
    objects = short_runs.build(data, "option_likelihood=false")
    measured = trainer().validate(objects.module, objects.data, verbose=False)[0]
    assert "val/option_accuracy" not in measured
    assert "option" not in objects.module.predictions[0]


def test_the_validation_loss_is_a_mean_over_tokens_and_not_over_batches(data):
    objects = short_runs.build(data, TWO, "data.eval_batch_size=2")  # batches of 2 and 1 for each task
    measured = trainer().validate(objects.module, objects.data, verbose=False)[0]["val/loss"]
    total = tokens = 0
    with torch.no_grad():
        for loader in objects.data.val_dataloader():
            for batch in loader:
                inputs = {k: v for k, v in batch.items() if k not in ("boundary", "examples", "rows")}
                log_p = objects.model(**inputs).logits[:, :-1].log_softmax(-1)
                labels = inputs["labels"][:, 1:]
                chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                total -= chosen[labels != -100].sum().item()
                tokens += int((labels != -100).sum())
    assert measured == pytest.approx(total / tokens, rel=1e-5)


def test_tokens_are_those_of_prompts_and_targets(data):
    objects = short_runs.build(data)
    trainer(max_epochs=2).fit(objects.module, objects.data)
    assert objects.module.tokens == 2 * sum(objects.data.train_rows.lengths)


def test_a_checkpoint_holds_the_adapter_and_no_tensor_of_the_base(data, tmp_path):
    objects = short_runs.build(data)
    fitting = trainer()
    fitting.fit(objects.module, objects.data)
    fitting.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert set(saved["state_dict"]) == {f"adapter.{name}" for name in objects.model.adapter_state_dict()}
    base = sum(p.numel() * p.element_size() for p in objects.model.base_model.parameters())
    adapter = sum(p.numel() * p.element_size() for p in objects.model.interventions.parameters())
    size = (tmp_path / "x.ckpt").stat().st_size
    # the adapter, AdamW's two moments, and some kB of loop state and file format
    assert size < 3 * adapter + 30_000 < base


def test_a_checkpoint_that_lacks_a_tensor_is_refused(data):
    objects = short_runs.build(data)
    state = objects.module.state_dict()
    state.pop("adapter.interventions.1.0.basis")
    with pytest.raises(ValueError, match=r"missing interventions\.1\.0\.basis"):
        objects.module.load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ({"limit_train_batches": 2}, 4),
        ({"limit_train_batches": 0.5}, 6),
        ({"overfit_batches": 3}, 6),
        ({"limit_train_batches": 99}, 12),
    ],
)
def test_the_schedule_ends_with_the_batches_that_are_trained(data, setting, steps):
    # 18 rows in batches of 3 are 6 batches per epoch without limits
    objects = short_runs.build(data, "optimizer.lr=1e-2")
    rates = Steps(lambda module, outputs: module.trainer.optimizers[0].param_groups[0]["lr"])
    trainer(**setting, max_epochs=2, callbacks=[rates], limit_val_batches=0).fit(objects.module, objects.data)
    assert len(rates.noted) == objects.module.total_steps == steps
    assert rates.noted[-1] < 1e-9  # linear decay to 0


@pytest.mark.parametrize(("scheduling", "steps"), [({0: 1, 1: 3}, 6 + 2 + 2), ({0: 4, 2: 1}, 2 + 2 + 6)])
def test_the_schedule_ends_with_steps_of_changing_length(data, scheduling, steps):
    objects = short_runs.build(data)
    rates = Steps(lambda module, outputs: module.trainer.optimizers[0].param_groups[0]["lr"])
    own = [rates, GradientAccumulationScheduler(scheduling)]
    trained = trainer(max_epochs=3, callbacks=own, limit_val_batches=0)
    trained.fit(objects.module, objects.data)
    assert trained.global_step == objects.module.total_steps == steps
    assert rates.noted[-1] < 1e-9


def test_overfitting_reads_the_same_batches_in_every_epoch(data):
    objects = short_runs.build(data)
    read = []
    rows = Steps(lambda module, outputs: None)
    rows.on_train_batch_start = lambda trainer, module, batch, index: read.append(batch["rows"].tolist())
    trainer(overfit_batches=2, max_epochs=3, callbacks=[rows], limit_val_batches=0).fit(
        objects.module, objects.data
    )
    assert read == read[:2] * 3


def test_overfitting_validates_the_first_batches_in_their_own_order(data):
    """Lightning would replace our sampler, which splits rows across ranks, with its own."""
    objects = short_runs.build(data)
    found = {}
    for limit in ("overfit_batches", "limit_val_batches"):
        trainer(**{limit: 1}).fit(objects.module, objects.data)
        found[limit] = [row["source"] for row in objects.module.predictions]
    assert found["overfit_batches"] == found["limit_val_batches"]


def test_ranks_of_a_resumed_run_share_out_the_tokens_of_all(data):
    module = short_runs.build(data).module
    found = []
    for rank in range(3):
        module.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        module.on_load_checkpoint(
            {"tokens": 100, "train_seconds": 1.0, "train_metrics": {}, "step_loss": torch.zeros(())}
        )
        module.on_fit_start()
        found.append(module.tokens)
    assert found == [34, 33, 33]


# What Lightning users do with their own Trainer.


def test_loaders_alone_train_and_evaluate_as_their_data_module_does(data):
    found = []
    for alone in (False, True):
        objects = short_runs.build(data)
        given = [objects.data.train_dataloader(), objects.data.val_dataloader()] if alone else [objects.data]
        fitting = trainer(accumulate_grad_batches=2)
        fitting.fit(objects.module, *given)
        tests = objects.data.test_dataloader() if alone else objects.data
        tested = fitting.test(objects.module, tests, verbose=False)
        metrics = {k: v.item() for k, v in fitting.callback_metrics.items() if "second" not in k}
        found.append((metrics, tested, objects.module.predictions))
    assert found[0] == found[1]


def test_a_module_is_loaded_from_a_checkpoint(data, tmp_path):
    trained, other = short_runs.build(data), short_runs.build(data, "seed=7")
    fitting = trainer(max_steps=2)
    fitting.fit(trained.module, trained.data)
    fitting.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    asked = {name: getattr(other.module, name) for name in ("optimization", "decoding", "objective")}
    loaded = generation.GenerationModule.load_from_checkpoint(
        tmp_path / "x.ckpt", model=other.model, data=other.data, **asked
    )
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_precision_that_turns_parameters_to_another_type_is_refused(data):
    objects = short_runs.build(data)
    with pytest.raises(ValueError, match=r"precision=bf16-true.* load the base in another dtype"):
        trainer(precision="bf16-true").fit(objects.module, objects.data)
    assert {p.dtype for p in objects.module.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_a_bare_trainer_trains(data):
    objects = short_runs.build(data)
    bare = Trainer(barebones=True, max_steps=3, accelerator="cpu", devices=1, use_distributed_sampler=False)
    bare.fit(objects.module, objects.data)
    assert bare.global_step == 3


def test_the_checkpoint_of_an_average_holds_the_averaged_adapter(data, tmp_path):
    objects = short_runs.build(data)
    average = EMAWeightAveraging(decay=0.5)
    fitting = trainer(max_steps=4, callbacks=[average])
    saved = Steps(lambda module, _: fitting.save_checkpoint(tmp_path / "x.ckpt", weights_only=False))
    fitting.callbacks.append(saved)
    fitting.fit(objects.module, objects.data)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=False)
    averaged = objects.module.state_dict()  # the average replaces the last step
    assert checkpoint["state_dict"].keys() == averaged.keys()
    for name, tensor in checkpoint["state_dict"].items():
        assert torch.equal(tensor, averaged[name]), name
        assert not torch.equal(tensor, checkpoint["current_model_state"][name]), name
