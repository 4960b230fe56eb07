"""An adapter is loaded with its base model or onto one; errors name the file and say what does not fit."""

import json
import re

import architectures
import pytest
import tiny
import torch
from adapted_models import adapted
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, BertModel

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import saved_interventions
from reft_lightning.adapters.saving import CONFIG_FILE, TENSOR_FILE

BATCH = tiny.padded(tiny.rows(5, 8))


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def saved(folder, base, **settings):
    """Save a base model and an adapter of it, trained a little."""
    base.save_pretrained(folder / "base")
    model = type(base).from_pretrained(folder / "base").eval()
    reft = rl.attach(model, "loreft", rank=2, positions="f1+l1", **settings).eval()
    with torch.no_grad():
        for parameter in (p for p in reft.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    reft.save_pretrained(folder / "adapter")
    return reft


def test_the_base_model_comes_with_the_adapter(tmp_path):
    reft = saved(tmp_path, tiny.model("llama"))
    again = rl.ReftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(again.base_model) is type(reft.base_model)
    assert torch.equal(logits(again), logits(reft))
    half = rl.ReftModel.from_pretrained(str(tmp_path / "adapter"), dtype=torch.bfloat16)
    assert half.base_model.dtype == torch.bfloat16


def test_a_loaded_adapter_is_in_evaluation_mode_and_learns_on(tmp_path):
    reft = saved(tmp_path, tiny.model("llama"), dropout=0.5)
    for again in (
        rl.ReftModel.from_pretrained(tmp_path / "adapter"),
        rl.ReftModel.from_pretrained(tiny.model("llama").train(), tmp_path / "adapter"),
    ):
        assert not any(module.training for module in again.modules())
        assert torch.equal(logits(again), logits(reft))
        before = again.adapter_state_dict()["interventions.0.0.basis"].clone()
        optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], 0.1)
        labels = {"labels": BATCH["input_ids"], "prompt_mask": BATCH["attention_mask"].bool()}
        again.train()(**BATCH, **labels).loss.backward()
        optimizer.step()
        assert not torch.equal(again.adapter_state_dict()["interventions.0.0.basis"], before)


def test_loading_takes_no_random_numbers(tmp_path):
    saved(tmp_path, tiny.model("llama"))
    base, fresh, bert = tiny.model("llama"), tiny.model("llama"), tiny.model("bert")
    rl.attach(tiny.model("bert"), rank=1).save_pretrained(tmp_path / "with its head")
    adapted("llama", "loreft + peft/lora").save_pretrained(tmp_path / "with lora")
    state = torch.get_rng_state()
    reft = rl.ReftModel.from_pretrained(base, tmp_path / "adapter")
    reft.load_adapter(tmp_path / "adapter", "second")
    rl.ReftModel.from_pretrained(tmp_path / "adapter")
    rl.ReftModel.from_pretrained(bert, tmp_path / "with its head")
    rl.ReftModel.from_pretrained(fresh, tmp_path / "with lora")
    saved_interventions(tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_is_loaded_at_other_positions(tmp_path):
    reft = saved(tmp_path, tiny.model("llama"))
    moved = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter", positions="l2")
    expected = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="l2").eval()
    expected.load_adapter_state_dict(reft.adapter_state_dict())
    assert torch.equal(logits(moved), logits(expected))
    assert (logits(moved) - logits(reft)).abs().max() > 1e-3
    moved.save_pretrained(tmp_path / "moved")
    assert rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "moved").config.positions == "l2"
    with pytest.raises(ValueError, match="malformed positions 'last'"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter", positions="last")


def test_a_classifier_comes_with_its_head_and_number_of_labels(tmp_path):
    base = tiny.model("bert")
    BertModel(base.config).save_pretrained(tmp_path / "encoder")  # a checkpoint without a head
    model = type(base).from_pretrained(tmp_path / "encoder", num_labels=5).eval()
    reft = rl.attach(model, "loreft", rank=2, positions="f1").eval()
    reft.save_pretrained(tmp_path / "adapter")
    again = rl.ReftModel.from_pretrained(tmp_path / "adapter").eval()
    assert again.base_model.config.num_labels == 5
    assert torch.equal(logits(again), logits(reft))
    assert "BertForSequenceClassification.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()
    assert "num_labels=5" in (tmp_path / "adapter" / "README.md").read_text()


def renamed(folder, **values):
    reft = saved(folder, tiny.model("llama"))
    reft.config.base_model = values.pop("base_model", reft.config.base_model)
    reft.config.architecture |= values
    reft.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_a_base_model_that_is_nowhere_is_named(
    tmp_path,
):  # a run's name of a random model, of a folder elsewhere
    nowhere = r"base model 'tiny_random' is not a folder.*from_pretrained\(model, name"
    with pytest.raises(FileNotFoundError, match=nowhere):
        rl.ReftModel.from_pretrained(renamed(tmp_path, base_model="tiny_random"))


def test_only_a_model_class_of_transformers_is_loaded(tmp_path):
    renamed(tmp_path, **{"class": "Trainer"})
    file = tmp_path / "adapter" / CONFIG_FILE
    for name in ("Trainer", "os", "AutoModelForCausalLM", "subprocess.Popen", None):
        values = json.loads(file.read_text())
        values["architecture"]["class"] = name
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"cannot be loaded by name: load it, and call"):
            rl.ReftModel.from_pretrained(tmp_path / "adapter")


def test_another_head_on_the_same_backbone_is_no_other_architecture(tmp_path):
    rl.attach(tiny.model("bert"), "loreft", rank=1, heads=False).save_pretrained(tmp_path)
    rl.ReftModel.from_pretrained(tiny.model("bert").bert, tmp_path)


def test_arguments_of_the_base_model_need_one_to_load(tmp_path):
    saved(tmp_path, tiny.model("llama"))
    adapter = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"takes no dtype: the base model is already loaded"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), adapter, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes no revison: .*; did you mean 'revision'"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), adapter, revison="v2")
    with pytest.raises(ValueError, match=r"from_pretrained\(base_model, name\)"):
        rl.ReftModel.from_pretrained(tiny.model("llama"))


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_an_adapter_of_a_multimodal_model_holds_the_tensors_of_its_language_model(name, tmp_path):
    base = architectures.build(AutoModelForImageTextToText, CONFIG_MAPPING[name])
    layers = base.config.get_text_config().num_hidden_layers
    reft = saved(tmp_path, base)
    tensors = load_file(tmp_path / "adapter" / TENSOR_FILE)
    assert len(tensors) == 3 * layers  # basis, W, b of each block; the vision tower has blocks, too
    again = rl.ReftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(again.base_model) is type(base)
    ids = torch.randint(5, 50, (2, 6))
    assert torch.equal(again(input_ids=ids).logits, reft(input_ids=ids).logits)


def test_an_adapter_trained_with_resized_embeddings_says_what_differs(tmp_path):
    base = tiny.model("llama")
    base.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    reft = saved(tmp_path, base, heads=["lm_head"])
    assert torch.equal(logits(rl.ReftModel.from_pretrained(tmp_path / "adapter").eval()), logits(reft))
    model = tiny.model("llama")
    before = logits(model)
    said = r"adapter: the adapter does not fit.*lm_head.weight: \(51, 16\) instead of \(48,"
    with pytest.raises(ValueError, match=said):
        rl.ReftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(logits(model), before)


def test_interventions_do_not_depend_on_the_size_of_the_vocabulary(tmp_path):
    base = tiny.model("llama")
    base.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    reft = saved(tmp_path, base)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(reft)[..., : tiny.VOCABULARY])


@pytest.mark.parametrize("kind", ["no tensors", "of peft", "a base model's"])
def test_a_foreign_file_is_refused_with_its_name(kind, tmp_path):
    saved(tmp_path, tiny.model("llama"))
    file = tmp_path / "adapter" / TENSOR_FILE
    if kind == "no tensors":
        save_file({}, file)
    elif kind == "of peft":
        adapted("llama", "peft/lora").save_pretrained(tmp_path / "lora")
        file.write_bytes((tmp_path / "lora" / "adapter_model.safetensors").read_bytes())
    else:
        file.write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"{tmp_path / 'adapter'}.*does not fit") as refused:
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter")
    assert len(str(refused.value)) < 700


def test_a_configuration_of_other_values_is_refused_with_its_folder(tmp_path):
    rl.attach(base := tiny.model("llama"), "loreft", rank=1, positions="f1").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG_FILE).read_text())
    keys = ("method", "layers", "positions", "settings", "per_layer", "heads", "architecture", "partitions")
    for key in keys:
        for value in (None, 7, True, "x", ["a", 1], {"a": 1}):
            (tmp_path / CONFIG_FILE).write_text(json.dumps(saved | {key: value}))
            with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
                rl.ReftModel.from_pretrained(base, tmp_path)
