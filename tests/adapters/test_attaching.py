"""Attaching is all or nothing, detaching restores the base model, and settings of any number type are saved."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from adapted_models import state_of
from laws import shaken
from safetensors.torch import load_file, save_file

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.saving import CONFIG_FILE, TENSOR_FILE

BATCH = tiny.padded(tiny.rows(5, 3), "left")


def half_frozen():
    model = tiny.model("bert").requires_grad_(False).train()
    model.classifier.requires_grad_(True)
    return model


@pytest.fixture(params=["fresh", "frozen", "half frozen, in training"])
def base(request):
    fresh = tiny.model("bert").requires_grad_(request.param == "fresh")
    return half_frozen() if request.param.startswith("half") else fresh


REFUSED_SETTINGS = [
    ({"rank": "2"}, "rank must be a whole number; got '2'"),
    ({"rank": 1.5}, r"rank must be a whole number; got 1\.5"),
    ({"rank": True}, "rank must be a whole number; got True"),
    ({"rank": np.int64(99)}, "rank must lie in 1..16"),
    ({"rank": 1j}, r"settings\.rank cannot be saved with the adapter: give numbers"),
    ({"dropout": "0.1"}, r"dropout must lie in \[0, 1\); got '0.1'"),
    ({"component": "{foo}{layer}"}, r"no module '\{foo\}0'"),
    ({"component": "bert.encoder.layer.{layer}.attention.{0}"}, "no module"),
    ({"component": None}, "unknown component None"),
    ({"layers": None}, "layers must be 'all' or a list of ids in 0..2; got None"),
    ({"layers": 1.5}, "layers must be 'all' or a list of ids"),
    ({"rnak": 4}, "takes no setting 'rnak'.*did you mean 'rank'"),
    ({"layers": {1: {"rnk": 2}}}, "takes no setting 'rnk'.*did you mean 'rank'"),
    ({"layers": {}, "heads": False}, "layers is empty"),
    ({"tied": "groups"}, "tied must be one of all, group, position; got 'groups'.*did you mean 'group'"),
    ({"tied": "position", "positions": "all"}, "tied='position' needs a fixed number of positions"),
    ({"component": "mlp_ouput"}, "unknown component 'mlp_ouput'.*did you mean 'mlp_output'"),
    ({"layers": {"a": {}}}, "layer must lie in 0..2.*got 'a'"),
    ({"layers": {0: None}}, r"layers\[0\] must be a dict of the settings that differ there"),
    ({"layers": {0: {}, 1: {"rank": "3"}}}, "rank must be a whole number; got '3'"),
    ({"layers": {1: {"method": "lorefd"}}}, "did you mean 'loreft'"),
    ({"positions": None}, "positions must be a string or a callable"),
    ({"tied": None}, "tied must be one of"),
    ({"clip": None}, "clip must be one of"),
    ({"method": None}, "is not a subclass of Intervention"),
    ({"heads": ["nope"]}, "no module 'nope' to train as a head"),
    ({"heads": ["classifier", "dropout"]}, "'dropout' has no parameters to train"),
    ({"heads": [""]}, "no module '' to train as a head"),
    ({"heads": 5}, "heads must be 'auto' or a list of module paths"),
    ({"beside": "peft/lorra"}, "did you mean 'peft/lora'"),
    ({"beside_options": {"r": 2}}, "none is trained together with loreft"),
    ({"beside": "peft/lora", "rank": 99}, "rank must lie in 1..16"),
    ({"beside": "peft/lora", "beside_options": {"r": 0}}, "should be a positive integer"),
]  # fmt: skip
REFUSED_BASELINES = [
    ("peft/lora", {"target_modules": ["nope"]}, "No modules were targeted"),
    ("peft/lora", {"r": "2"}, "peft cannot use the options {'r': '2'}"),
    ("peft/lora", {"rank_pattern": {r"encoder.layer.2.attention.self.query": -1}}, "should be a positive"),
    ("peft/lora", {"heads": ["nope"]}, "no module 'nope'"),
    ("peft/lora", {"r": 1j}, r"options\.r cannot be saved"),
    ("peft/oft", {"r": 3}, "specify either r"),
    ("peft/road", {"group_size": 7}, "divisible by 2"),
    ("peft/vera", {"r": 0}, "peft cannot use the options"),
    ("peft/ia3", {"target_modules": ["query"], "feedforward_modules": ["key"]}, "subset"),
    ("peft/prompt_tuning", {"num_virtual_tokens": None}, "peft cannot use the options"),
    ("peft/prefix_tuning", {"num_virtual_tokens": 2}, "needs a key/value cache"),
    ("bitfit", {"heads": ["nope"]}, "no module 'nope'"),
    ("full", {"rank": 2}, "full takes no option 'rank'"),
    ("frozen", {"heads": "auto"}, "trains nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [*(({"method": "loreft", "rank": 2, "positions": "f1", **settings}, said) for settings, said in REFUSED_SETTINGS),
     *(({"method": method, **options}, said) for method, options, said in REFUSED_BASELINES)],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_refused_attachment_leaves_the_model_as_it_was(settings, said):
    base = half_frozen()
    before = state_of(base)
    with pytest.raises(ValueError, match=said):
        adapt(base, **settings)
    assert state_of(base) == before


def test_an_interrupted_attachment_leaves_the_model_as_it_was(base, monkeypatch):
    from reft_lightning.adapters.first_values import FirstValues

    def interrupted(self, parameters):
        raise KeyboardInterrupt

    before = state_of(base)
    monkeypatch.setattr(FirstValues, "__init__", interrupted)
    for method, settings in (("loreft", {"rank": 2}), ("bitfit", {}), ("peft/lora", {})):
        with pytest.raises(KeyboardInterrupt):
            adapt(base, method, **settings)
        assert state_of(base) == before, method


def test_a_configuration_with_an_unknown_head_leaves_the_model_as_it_was():
    base = half_frozen()
    before = state_of(base)
    with pytest.raises(ValueError, match="no module 'nope' to train as a head"):
        rl.ReftModel(base, rl.ReftConfig("loreft", layers=[0], settings={"rank": 2}, heads=["nope"]))
    assert state_of(base) == before


def test_an_adapter_that_does_not_load_leaves_the_model_as_it_was(tmp_path):
    base = half_frozen()
    rl.attach(tiny.model("bert"), rank=2).save_pretrained(tmp_path)
    right = load_file(tmp_path / TENSOR_FILE)
    name = "interventions.0.0.basis"
    before = state_of(base)
    for wrong in ({k: v for k, v in right.items() if k != name}, right | {"stray": torch.ones(1)},
                  right | {name: right[name][:1].clone()}):  # fmt: skip
        save_file(wrong, tmp_path / TENSOR_FILE)
        with pytest.raises(ValueError, match="does not fit"):
            rl.ReftModel.from_pretrained(base, tmp_path)
        assert state_of(base) == before
    save_file(right, tmp_path / TENSOR_FILE)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for key, value, said in (
        ("settings", {"rank": "2"}, "rank"), ("layers", [0, 9], "layer"), ("heads", ["nope"], "nope"),
        ("tied", 1, "tied"), ("component", "x.{layer}.{y}", "no module"), ("positions", "f1+f1", "twice"),
        ("method", "nope", "unknown intervention"),
    ):  # fmt: skip
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=said):
            rl.ReftModel.from_pretrained(base, tmp_path)
        assert state_of(base) == before, key


# --- what can be attached to -----------------------------------------------------------------------------------------


def test_what_is_attached_already_is_refused_with_what_to_do():
    reft = rl.attach(tiny.model("llama"), rank=2)
    lora = adapt(tiny.model("llama"), "peft/lora")
    for adapted in (reft, lora):
        with pytest.raises(
            ValueError, match=r"got a .*already has an adapter: detach\(\) it, or give its base"
        ):
            rl.attach(adapted, rank=2)
    with pytest.raises(ValueError, match="got a ReftModel"):
        adapt(reft, "peft/lora")
    with pytest.raises(ValueError, match="got a ReftModel"):
        rl.ReftModel.from_pretrained(reft, "anywhere")


def test_what_is_no_model_of_transformers_is_refused():
    lora = adapt(tiny.model("llama"), "peft/lora").peft_model
    with pytest.raises(ValueError, match=r"got a PeftModel; give peft_model\.get_base_model\(\)"):
        rl.attach(lora, rank=2)
    with pytest.raises(ValueError, match="got 'gpt2'; load it first"):
        rl.attach("gpt2", rank=2)
    with pytest.raises(ValueError, match="got a Linear"):
        rl.attach(torch.nn.Linear(2, 2), rank=2)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": "loreft", "rank": 2}, {"method": "loreft", "rank": 2}),
        ({"method": "loreft", "rank": 2}, {"method": "loreft", "rank": 2, "heads": False}),
        ({"method": "loreft", "rank": 2, "heads": False}, {"method": "loreft", "rank": 2}),
        ({"method": "loreft", "rank": 2, "heads": False}, {"method": "bitfit"}),
        ({"method": "loreft", "rank": 2, "heads": False}, {"method": "peft/lora", "heads": False}),
        ({"method": "peft/lora"}, {"method": "loreft", "rank": 2, "heads": False}),
        ({"method": "peft/lora"}, {"method": "peft/lora"}),
        ({"method": "full"}, {"method": "full"}),
    ],
)
def test_a_second_adapter_is_refused_where_it_would_meet_the_first(first, second, copied):
    model = adapt(tiny.model("bert"), **first)
    model = copy.deepcopy(model) if copied else model
    before, learning = state_of(model.base_model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"BertForSequenceClassification already has .*detach\(\)"):
        adapt(model.base_model, **second)
    assert state_of(model.base_model) == before
    assert [p.requires_grad for p in model.parameters()] == learning


# --- detaching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [None, "deepcopy", "pickle"])
def test_detaching_gives_the_base_model_as_it_was(base, copied):
    before = state_of(base)
    expected = copy.deepcopy(base).eval()(**BATCH).logits
    reft = rl.attach(base, rank=2, positions="all")
    if copied:
        reft = copy.deepcopy(reft) if copied == "deepcopy" else pickle.loads(pickle.dumps(reft))
    with torch.no_grad():
        for parameter in (p for p in reft.parameters() if p.requires_grad):
            parameter.add_(0.5)
    assert not torch.equal(reft.eval()(**BATCH).logits, expected)
    found = reft.detach()
    assert torch.equal(found(**BATCH).logits, expected)
    assert [p.requires_grad for p in found.parameters()] == list(before[1].values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.modules())
    if not copied:
        assert found is base
        base.train(before[0][""]["training"])
        assert state_of(base) == before
    again = rl.attach(found, rank=2)
    assert again(**BATCH).logits.isfinite().all()


def test_detaching_takes_nothing_else_off():
    base = tiny.model("llama")
    seen = []
    base.register_forward_hook(lambda *_: seen.append(1))
    reft = rl.attach(base, rank=2)
    base.model.layers[0].register_forward_hook(lambda *_: seen.append(2))
    reft.detach()
    base(**BATCH)
    assert seen == [2, 1]


def test_a_detached_adapter_says_so_and_edits_nothing_in_silence(tmp_path):
    reft = rl.attach(tiny.model("bert"), rank=2)
    reft.detach()
    save = lambda: reft.save_pretrained(tmp_path)  # noqa: E731
    for call in (lambda: reft(**BATCH), reft.detach, save, reft.adapter_state_dict):
        with pytest.raises(ValueError, match="this adapter was detached"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_several_adapters_to_go_lets_the_base_learn_again():
    base = tiny.model("llama")
    first, second = (rl.attach(base, rank=2, positions="all") for _ in range(2))
    shaken(second.interventions)
    expected = second(**BATCH).logits
    first.detach()
    assert torch.equal(second(**BATCH).logits, expected)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    second.detach()
    assert all(parameter.requires_grad for parameter in base.parameters())


# --- what can be saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": np.int64(2)},
        {"rank": torch.tensor(2)},
        {"dropout": np.float32(0.25)},
        {"layers": np.array([0, 2])},
        {"layers": torch.tensor([0, 2])},
        {"layers": range(2)},
        {"layers": {np.int64(1): {"rank": np.int32(3)}}},
        {"positions": np.str_("f1")},
        {"component": np.str_("mlp_output")},
        {"weight_dtype": torch.bfloat16},
        {"heads": ("lm_head",)},
    ],
    ids=str,
)
def test_numbers_and_texts_of_numpy_and_torch_are_saved_as_what_they_stand_for(settings, tmp_path):
    reft = rl.attach(tiny.model("llama"), **{"rank": 2, "positions": "f1", **settings}).eval()
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert again.config == reft.config
    assert torch.equal(again(**BATCH).logits, reft(**BATCH).logits)


@pytest.mark.parametrize("method", ["loreft", "bitfit", "peft/lora"])
def test_a_model_of_a_path_is_saved_by_its_name(method, tmp_path):
    base = tiny.model("bert")
    base.config.name_or_path = Path("models/mine")
    options = {"loreft": {"rank": np.int64(2)}, "peft/lora": {"r": np.int64(2)}}.get(method, {})
    adapt(base, method, **options).save_pretrained(tmp_path)
    saved = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert '"models/mine"' in saved
