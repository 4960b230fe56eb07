"""Runs of a model that reads images, on pictures that are drawn here: from a folder to a score and back."""

import json
import runpy
from pathlib import Path

import pytest
import short_runs
import torch

import reft_lightning as rl
from reft_lightning.config import compose
from reft_lightning.inspection.command import main as inspect
from reft_lightning.runs import evaluate, experiment
from reft_lightning.runs.build import build, outline, prepare

ROOT = Path(__file__).parents[2]
drawing = runpy.run_path(str(ROOT / "experiments" / "vision" / "drawing.py"))


@pytest.fixture
def folder(tmp_path):
    scenes = drawing["scenes"](14, 0)
    rows = [(scene, "How many?", str(scene.count)) for scene in scenes]
    return drawing["write"](
        tmp_path / "rows", {"train": rows[:10], "validation": rows[10:12], "test": rows[12:]}
    )


def config(folder, *overrides):
    return compose.compose([
        "model=tiny_vision", "data=vqa", f"data.path={folder}", "data.batch_size=5", "data.eval_batch_size=2",
        "decoding.max_new_tokens=3", "intervention=mores", "intervention.positions=image:0.5+l1",
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.enable_progress_bar=false", "optimizer.lr=5e-3",
        *overrides,
    ])  # fmt: skip


def test_a_run_trains_scores_and_is_evaluated_again(folder, tmp_path):
    run = tmp_path / "run"
    results = experiment.run(config(folder, "evaluate_base=true"), run)
    assert results["status"] == "complete"
    assert {"test/vqa_accuracy", "test/vision/exact_match", "base/test/vqa_accuracy"} <= results[
        "metrics"
    ].keys()
    assert results["monitor"] == "val/vqa_accuracy"
    assert results["trainable_parameters"] == 2 * (2 * 32 + 1)  # R, W and b of both layers, at rank 1
    assert results["data_versions"]["train"]["vision"]["rows"] == 10
    rows = short_runs.predictions(run, "reft_test")
    assert {row["picture"] for row in rows} == {"pictures/test_0.png", "pictures/test_1.png"}
    assert "test/loss" not in results["metrics"]
    again = evaluate.evaluate(run, "test")
    assert again["metrics"]["test/vqa_accuracy"] == results["metrics"]["test/vqa_accuracy"]
    found = inspect([run], rows=2, out=tmp_path / "inspected")
    assert found["scores"]["adapted"]["perplexity"] > 1
    assert found["not_inspected"] == []


def test_the_texts_of_an_evaluation_are_those_of_generate(folder):
    """The evaluation reads images in its batches; a generation by hand gives the same."""
    objects = build(config(folder))
    module, data = objects.module, objects.data
    module.eval()
    data.setup("test")
    (loader,) = data.test_dataloader()
    batch = next(iter(loader))
    module._score(batch, "vision", _reader(objects.model))
    boundary = batch["boundary"]
    ids = objects.model.generate(
        input_ids=batch["input_ids"][:, :boundary], attention_mask=batch["attention_mask"][:, :boundary],
        pixel_values=batch["pixel_values"], max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    tokenizer = objects.prepared.tokenizer
    texts = tokenizer.batch_decode(ids[:, boundary - 1 :], skip_special_tokens=True)
    last = tokenizer.batch_decode(ids[:, boundary - 1 : boundary], skip_special_tokens=True)
    expected = [text.removeprefix(start) for text, start in zip(texts, last, strict=True)]
    assert [row["generated"] for row in module.predictions] == expected
    other = dict(batch, pixel_values=-batch["pixel_values"])
    loss = [float(_loss(objects.model, each)) for each in (batch, other)]
    assert loss[0] != loss[1], "the loss of an evaluation does not see the pictures"


def _reader(model):
    from reft_lightning.evaluation import ColumnReader

    return ColumnReader(model)


def _loss(model, batch):
    from reft_lightning.evaluation import log_likelihood

    return log_likelihood(_reader(model), batch).sum()


LORA = (
    "intervention.options.target_modules='.*language_model.*(q_proj|v_proj)'"  # peft does not support LLaVA
)


@pytest.mark.parametrize(
    "own",
    [
        ["intervention=peft/lora", LORA],
        ["intervention=loreft", "intervention.positions=text", "trainer.precision=bf16-mixed"],
    ],
    ids=["lora", "bf16"],
)
def test_other_methods_run(folder, tmp_path, own):
    settings = compose.compose([
        "model=tiny_vision", "data=vqa", f"data.path={folder}", "decoding.max_new_tokens=2", *own,
        "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
    ])  # fmt: skip
    assert experiment.run(settings, tmp_path / "run")["status"] == "complete"


@pytest.mark.parametrize("component", ["vision_block_output", "connector_output"])
def test_the_tower_and_the_connector_learn_in_a_run(folder, tmp_path, component):
    settings = config(
        folder,
        "intervention.positions=image",
        f"intervention.component={component}",
        "intervention.layers=[0]",
    )
    results = experiment.run(settings, tmp_path / "run")
    assert results["trainable_parameters"] == 2 * 32 + 1
    assert results["steps"] == 4


def test_a_bad_picture_stops_a_run_before_a_weight_is_loaded(folder, monkeypatch, tmp_path):
    (folder / "pictures" / "train_3.png").write_bytes(b"no picture")
    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", None)
    with pytest.raises(
        experiment.SetupError, match=r"train.jsonl, line 4: .*'pictures/train_3.png' cannot be read"
    ):
        experiment.run(config(folder), tmp_path / "run")


def test_models_and_rows_that_do_not_fit_are_told(folder, tmp_path):
    with pytest.raises(
        ValueError, match="does not read images, but the rows of the family vision have pictures"
    ):
        outline(config(folder, "model=tiny_random", "intervention.positions=l1"))
    with pytest.raises(
        ValueError, match="reads images and text, but the rows of the family commonsense have no pict"
    ):
        outline(compose.compose(["model=tiny_vision", "data=boolq"]))
    with pytest.raises(ValueError, match="does not apply to the family"):
        prepare(config(folder, "data.context=x"))
    with pytest.raises(ValueError, match="must be a llava with tokenizer=bytes"):
        outline(config(folder, "model.tokenizer=null"))
    data = short_runs.write_rows(tmp_path / "text")
    with pytest.raises(ValueError, match=r"data.image=x does not apply to the family commonsense"):
        prepare(short_runs.config(data, "data.image=x"))


def test_a_saved_model_and_its_processor_are_read_from_a_folder(folder, tmp_path):
    objects = build(config(folder))
    place = tmp_path / "model"
    objects.model.base_model.save_pretrained(place)
    objects.prepared.processor.save_pretrained(place)
    again = build(config(folder, "model=local", f"model.path={place}", "model.tokenizer=null"))
    batch = next(iter(objects.data.train_dataloader()))
    other = next(iter(again.data.train_dataloader()))
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(batch[name], other[name]), name
    assert isinstance(again.model, rl.ReftModel)


def test_conversations_run(tmp_path):
    folder = drawing["write"](tmp_path / "rows", {"train": [(s, "?", "a") for s in drawing["scenes"](6, 1)]})
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    talks = [
        {"image": row["image"], "conversations": [{"from": "human", "value": "<image>\nSay it."},
                                                  {"from": "gpt", "value": "Shapes."}]}
        for row in rows
    ] + [{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}]  # fmt: skip
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    settings = compose.compose([
        "model=tiny_vision", "data=llava", f"data.path={tmp_path / 'talks.json'}", f"data.image_folder={folder}",
        "data.validation_size=1", "decoding.max_new_tokens=2", "intervention.positions=f1+l1", "trainer.max_epochs=1",
        "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "intervention.rank=2",
    ])  # fmt: skip
    results = experiment.run(settings, tmp_path / "run")
    assert results["monitor"] == "val/loss"
    assert results["status"] == "complete"
