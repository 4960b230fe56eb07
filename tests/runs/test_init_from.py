"""Training that starts from a saved adapter: its parameters, matching settings, and the identity of the run."""

import shutil

import pytest
import short_runs
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.reft.attach import attach
from reft_lightning.adapters.saving import load_state
from reft_lightning.adapters.starting import first_state
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.identity import config_hash, differences
from reft_lightning.runs import build, experiment
from reft_lightning.runs.arguments import model_source
from reft_lightning.runs.evaluate import evaluate

METHODS = {
    "loreft": (),
    "layers": ("intervention.layers={0: {}, 1: {rank: 3}}",),
    "red": ("intervention=red", "intervention.rank=null"),
    "joint": ("intervention=loreft_lora", "intervention.rank=2"),
    "lora": ("intervention=peft/lora",),
    "full": ("intervention=full",),
}


def settings(data, *overrides):
    """Compose a run without the arguments of a short one that a baseline does not take."""
    given = short_runs.without_interventions(data)
    own = [] if any(text.startswith("intervention=") for text in overrides) else ["intervention.rank=2"]
    return short_runs.compose.compose([*given, *own, *overrides])


def saved(data, folder, *overrides):
    """Save an adapter whose parameters all differ from the method's own initialisation."""
    model = experiment.build(settings(data, *overrides)).model
    state = {
        name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.adapter_state_dict().items()
    }
    model.load_adapter_state_dict(state)
    model.save_pretrained(folder)
    return load_state(folder)


@pytest.mark.parametrize("method", METHODS)
def test_training_begins_with_the_numbers_of_the_saved_adapter(data, tmp_path, method):
    first = saved(data, tmp_path / "a", *METHODS[method])
    begun = experiment.build(settings(data, *METHODS[method], f"intervention.init_from={tmp_path / 'a'}"))
    found = begun.model.adapter_state_dict()
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, first[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("own", "other", "reason"),
    [
        ("loreft", ("intervention.rank=3",), "rank 2 instead of 3"),
        ("loreft", ("intervention.positions=l1",), "positions 'f7\\+l7' instead of 'l1'"),
        ("loreft", ("intervention=noreft", "intervention.rank=2"), "method 'loreft' instead of 'noreft'"),
        ("loreft", ("intervention=peft/lora",), "the folder holds interventions, but peft/lora is another"),
        ("loreft", ("intervention.init=identity",), "init_from=.* both set the initial parameters"),
        ("loreft", METHODS["joint"], "beside None instead of 'peft/lora'"),
        ("joint", (), "beside 'peft/lora' instead of None"),
        ("lora", ("intervention=peft/lora", "intervention.options.lora_alpha=3"), "lora_alpha 16 instead of 3"),
        ("lora", ("intervention=peft/ia3",), "peft_type 'LORA' instead of"),
        ("lora", (), "the folder holds a peft adapter, but loreft is another method"),
        ("lora", ("intervention=peft/lora", "intervention.options.target_modules=[q_proj]"),
         r"target_modules \['q_proj', 'v_proj'\] instead of \['q_proj'\]"),
        ("joint", (*METHODS["joint"], "intervention.beside_options.r=3"), "r 8 instead of 3"),
        ("full", ("intervention=frozen",), "frozen trains nothing"),
        ("red", ("intervention=difference_in_means", "objective=difference_in_means", "optimizer=closed_form",
                 "optimizer.lr=1.0", "scheduler=constant", "trainer=closed_form", "trainer.max_epochs=1"),
         "needs intervention.init_from=null"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_kind_is_refused_before_weights_are_loaded(
    data, tmp_path, monkeypatch, own, other, reason
):
    saved(data, tmp_path / "a", *METHODS[own])
    monkeypatch.setattr(build, "load_base_model", None)
    with pytest.raises(ValueError, match=reason):
        build.outline(settings(data, *other, f"intervention.init_from={tmp_path / 'a'}"))


@pytest.mark.parametrize(
    ("method", "given", "overrides"),
    [
        ("loreft", {"rank": 4}, ("intervention.rank=4",)),
        (
            "lofit",
            {"layers": [1], "positions": "all", "stage": "scale"},
            ("intervention=lofit", "intervention.layers=[1]"),
        ),
        ("bias", {"positions": "all"}, ("intervention=bias", "intervention.positions=all")),
    ],
)
def test_an_adapter_that_was_saved_in_python_has_the_defaults_of_its_class(
    data, tmp_path, method, given, overrides
):
    config = settings(data, *overrides)
    base = load_base_model(**model_source(config))[0]
    component = config.intervention.component
    attach(base, method, component=component, **given).save_pretrained(tmp_path / "mine")
    found = build.outline(settings(data, *overrides, f"intervention.init_from={tmp_path / 'mine'}"))
    assert found.first_state.keys() == load_state(tmp_path / "mine").keys()


def test_dropout_may_differ_and_a_folder_that_is_not_there_is_named(data, tmp_path):
    saved(data, tmp_path / "a")
    build.outline(settings(data, "intervention.dropout=0.1", f"intervention.init_from={tmp_path / 'a'}"))
    with pytest.raises(ValueError, match=f"intervention.init_from={tmp_path / 'b'}: no such folder"):
        build.outline(settings(data, f"intervention.init_from={tmp_path / 'b'}"))


THREE, TWO, NONE = {"num_labels": 3}, {"num_labels": 2}, None  # classes
NAMED = {"loreft": ("loreft", {"rank": 2}), "lora": ("peft/lora", {"r": 2}), "full": ("full", {})}


@pytest.mark.parametrize(
    ("method", "classes"),
    [("loreft", THREE), ("loreft", TWO), ("loreft", NONE), ("lora", THREE), ("lora", TWO), ("lora", NONE),
     ("full", THREE), ("full", TWO)],
)  # fmt: skip
def test_a_head_begins_as_a_new_one_unless_the_adapter_has_one_of_as_many_classes(tmp_path, method, classes):
    def model(classes):
        config = LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
            pad_token_id=0, **(classes or {}),
        )  # fmt: skip
        name, options = NAMED[method]
        if classes is None:
            return adapt(LlamaForCausalLM(config), name, **options)
        return adapt(LlamaForSequenceClassification(config), name, heads="auto", **options)

    first, second = model(classes), model(TWO)
    first.save_pretrained(tmp_path)
    found, own = first_state(second, tmp_path), second.adapter_state_dict()
    heads = {name for name in own if "score" in name}
    assert heads
    assert found.keys() == own.keys() - (set() if classes is TWO else heads)
    assert all(torch.equal(tensor, first.adapter_state_dict()[name]) for name, tensor in found.items())


def test_a_sweep_names_a_folder_that_is_not_there_once(data, tmp_path):
    given = f"intervention.init_from={tmp_path / 'b'}"
    with pytest.raises(ValueError, match=f"1 of 1 choices cannot run\n{given}: no such folder$"):
        build.check_jobs({given: settings(data, given)})


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Return a run, and another that started from its adapter."""
    folder = tmp_path_factory.mktemp("runs")
    short_runs.run(data, folder / "first", "trainer.max_epochs=1")
    short_runs.run(data, folder / "second", f"intervention.init_from={folder / 'first'}")
    return folder


def test_a_run_goes_on_from_another_and_is_another_one(data, runs):
    first, second = (
        OmegaConf.to_container(OmegaConf.load(runs / name / "config.yaml")) for name in ("first", "second")
    )
    assert second["intervention"]["init_from"] == str(runs / "first")
    longer = first | {"trainer": first["trainer"] | {"max_epochs": 2}}
    assert differences(longer, second) == {"intervention.init_from": (None, str(runs / "first"))}
    assert config_hash(longer) != config_hash(second)
    # the first loss is that of the trained adapter; both draw the same batches
    alone = short_runs.run(data, runs / "alone")
    assert alone["status"] == "complete"
    losses = [short_runs.logged(runs / name, "train/loss") for name in ("alone", "second")]
    assert min(losses[0]) == min(losses[1])
    assert losses[1][min(losses[1])] < losses[0][min(losses[0])]


def test_neither_evaluating_nor_resuming_needs_the_folder_that_a_run_began_with(data, tmp_path, monkeypatch):
    saved(data, tmp_path / "a")
    start = f"intervention.init_from={tmp_path / 'a'}"
    whole = experiment.run(settings(data, start), tmp_path / "whole")
    with monkeypatch.context() as patched:
        short_runs.stop_at(patched, 8)
        with pytest.raises(short_runs.Stop):
            experiment.run(settings(data, start), tmp_path / "stopped")
    shutil.rmtree(tmp_path / "a")
    resumed = experiment.resume(tmp_path / "stopped")
    for name, tensor in load_state(tmp_path / "stopped" / "adapter").items():
        assert torch.equal(tensor, load_state(tmp_path / "whole" / "adapter")[name])
    assert resumed["metrics"]["val/loss"] == whole["metrics"]["val/loss"]
    assert evaluate(tmp_path / "whole")["metrics"]["val/loss"] == pytest.approx(
        whole["metrics"]["val/loss"], rel=1e-6
    )


def test_a_relative_folder_is_kept_as_an_absolute_one(data, tmp_path, monkeypatch):
    saved(data, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert settings(data, "intervention.init_from=a").intervention.init_from == str(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")  # of a run that is complete, it is the same one
    assert settings(data, "intervention.init_from=a").intervention.init_from == str(tmp_path / "a")
