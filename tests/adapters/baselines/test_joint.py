"""Interventions and a peft method trained together: the laws of adapted models, files that stand alone, whole runs."""

import json
import shutil
from pathlib import Path

import pytest
import short_runs
import tiny
import torch
import torch._dynamo
from adapted_models import JOINT, adapted, batch_of, logits_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.baselines.joint import JointModel
from reft_lightning.adapters.saving import load_state
from reft_lightning.base_models.reading import position_ids_of
from reft_lightning.config import compose
from reft_lightning.exchange.command import main as convert
from reft_lightning.reporting.runs import read_runs
from reft_lightning.runs import chat, experiment
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.serving.command import load_adapters as serve_adapters

# peft 0.21, called directly here, reads a property that transformers 5.23 renames
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CASES = [("llama", method) for method in JOINT] + [("gpt2", "peft/lora"), ("bert", "peft/lora")]
RUN = [
    "intervention=loreft_lora", "intervention.rank=2", "intervention.beside_options.r=3",
    "intervention.positions=f2+l2",
]  # fmt: skip


def joint(family="llama", beside="peft/lora", **settings):
    """Return LoReFT with a peft method; both moved away from the base, as training does."""
    return adapted(family, f"loreft + {beside}", **settings)


TRAINING_BATCH = tiny.prompt_target(tiny.rows(5, 3), tiny.rows(2, 3, seed=1))


# --- the laws of adapted models -----------------------------------------------------------------------------------


def test_each_part_matters():
    model, batch = joint(), batch_of("llama")
    both = logits_of(model, batch)
    with model.peft.disabled():
        ours = logits_of(model, batch)
    with model.unedited():
        theirs = logits_of(model, batch)
    for one, other in ((both, ours), (both, theirs), (ours, theirs)):
        assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(logits_of(model, batch), both)


def test_interventions_edit_what_peft_has_made():
    """The last block's output: peft's model up to it, edited by Phi at the selected tokens alone."""
    model, (text,) = joint(layers=[tiny.LAYERS - 1]), tiny.rows(6)
    seen = {}
    norm = model.base_model.model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.setdefault("hidden", args[0]))
    logits_of(model, {"input_ids": text[None]})
    edited = seen.pop("hidden")[0]
    with model.unedited():
        logits_of(model, {"input_ids": text[None]})
    plain = seen.pop("hidden")[0]
    handle.remove()
    (phi,) = model.interventions[str(tiny.LAYERS - 1)]
    with torch.no_grad():
        torch.testing.assert_close(edited[[0, 5]], phi(plain[[0, 5]]), rtol=1e-5, atol=1e-5)
    assert torch.equal(edited[1:5], plain[1:5])


def test_a_map_that_peft_wraps_keeps_its_own_width():
    for component, width in (("model.layers.{layer}.mlp.down_proj.input", 24), ("mlp_output", tiny.WIDTH)):
        options = {"target_modules": ["down_proj"]}
        model = adapt(
            tiny.model("llama"), rank=2, component=component, beside="peft/lora", beside_options=options
        )
        assert {site.dim for site in model.sites.values()} == {width}
        assert torch.isfinite(logits_of(model, batch_of("llama"))).all()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own internals
def test_a_compiled_step_gives_the_same_gradients():
    gradients = []
    for compiled in (False, True):
        model = joint(base=tiny.model("llama", num_hidden_layers=2)).train()
        if compiled:
            model.compile(backend="eager")
        model(**TRAINING_BATCH).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch._dynamo.reset()
    plain, graph = gradients
    assert plain.keys() == graph.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(graph[name], gradient, rtol=1e-4, atol=1e-5)


# --- parameters and files -----------------------------------------------------------------------------------------


def test_the_count_is_the_sum_of_the_formulas():
    d, r = tiny.WIDTH, 2
    loreft = tiny.LAYERS * (2 * r * d + r)
    lora = tiny.LAYERS * 8 * ((d + d) + (d + 8))  # queries d -> d; one head of values, d -> 8
    base = sum(p.numel() for p in tiny.model("llama").parameters())
    whole = loreft + lora
    assert joint().parameter_count() == (whole, base, pytest.approx(100 * whole / base))
    config = tiny.model("llama").config
    assert rl.count_parameters(config, "loreft", rank=2, beside="peft/lora").trainable == whole


@pytest.mark.parametrize(("family", "beside"), CASES)
def test_one_call_loads_what_was_trained(family, beside, tmp_path, caplog):
    model, batch = joint(family, beside), batch_of(family)
    model.scale = 0.5
    model.save_pretrained(tmp_path / "saved")
    base = tiny.model(family)
    before, at_first = logits_of(base, batch | positions_of(family, batch)), set(base.state_dict())
    again = rl.ReftModel.from_pretrained(base, tmp_path / "saved")
    assert not caplog.records
    assert not any(module.training for module in again.modules())
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    with again.disabled():
        assert torch.equal(logits_of(again, batch), before)
    assert again.parameter_count() == model.parameter_count()
    learning, trained = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (again, model))
    assert learning == trained
    again.save_pretrained(tmp_path / "again")
    files = {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.*")}
    assert {str(file) for file in files} >= {"reft.safetensors", "peft/adapter_model.safetensors"}
    for file in files - {Path("peft/adapter_config.json"), Path("peft/README.md")}:  # sets, in any order
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert again.detach() is base
    assert set(base.state_dict()) == at_first
    assert torch.equal(logits_of(base, batch | positions_of(family, batch)), before)


def positions_of(family, batch):
    """What a plain decoder needs to count padding on the left as none."""
    return {} if family == "bert" else {"position_ids": position_ids_of(batch["attention_mask"])}


def test_a_loaded_one_generates_and_learns_on(tmp_path):
    model, batch = joint(dropout=0.5), batch_of("llama")
    model.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)
    texts = [m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*texts)
    before = {name: tensor.clone() for name, tensor in again.adapter_state_dict().items()}
    parameters = [p for p in again.parameters() if p.requires_grad]
    again.train()(**TRAINING_BATCH).loss.backward()
    torch.optim.SGD(parameters, 0.1).step()
    state = again.adapter_state_dict()
    moved = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"interventions", "peft"}


def test_it_comes_with_its_base_model_and_by_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # a hub would be asked
    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, batch = joint(base=base), batch_of("llama")
    model.save_pretrained(tmp_path / "saved")
    again = rl.ReftModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    place = tmp_path / "cache" / "models--me--adapter"
    model.save_pretrained(place / "snapshots" / "c0ffee" / "best")
    (place / "refs").mkdir()
    (place / "refs" / "v2").write_text("c0ffee")
    found = {"subfolder": "best", "revision": "v2", "cache_dir": tmp_path / "cache", "local_files_only": True}
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), "me/adapter", **found)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    (place / "snapshots" / "c0ffee" / "best" / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"v2/best/peft/adapter_model.safetensors could not be read"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), "me/adapter", **found)


def test_peft_reads_its_part_and_interventions_are_attached_to_it(tmp_path, caplog):
    model, batch = joint(), batch_of("llama")
    model.config.base_model = "some/model"
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["task_type"]) == ("some/model", "CAUSAL_LM")
    theirs = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "peft").eval()
    with model.unedited():
        expected = logits_of(model, batch)
    found = logits_of(theirs, batch | positions_of("llama", batch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    both = rl.ReftModel.from_pretrained(theirs.get_base_model(), tmp_path)
    assert type(both) is rl.ReftModel
    (record,) = caplog.records  # whether it is the one that they were trained with is not known
    assert "the base model already has a peft adapter" in record.message
    torch.testing.assert_close(logits_of(both, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)
    with both.disabled():  # peft's adapter is the caller's
        torch.testing.assert_close(logits_of(both, batch), expected, rtol=1e-5, atol=1e-5)
    both.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "peft").exists()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config\.json is missing"
    ):  # it is a half, and says so
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "ours")
    card = (tmp_path / "README.md").read_text()
    assert "in addition to those of peft/lora in the subfolder `peft`" in card


def test_what_reft_convert_writes_for_us_is_both(tmp_path):
    model, batch = joint(), batch_of("llama")
    model.save_pretrained(tmp_path / "a")
    tiny.model("llama").save_pretrained(tmp_path / "base")
    convert(tmp_path / "a", "reft", tmp_path / "b", base=str(tmp_path / "base"))
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "b")
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


def test_a_folder_that_does_not_say_so_is_warned_of(tmp_path, caplog):
    joint().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "reft_config.json").read_text())
    assert values.pop("beside") == "peft/lora"
    (tmp_path / "reft_config.json").write_text(json.dumps(values))
    assert type(rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)) is rl.ReftModel
    (warned,) = [record.getMessage() for record in caplog.records]
    assert 'add to that file: "beside": "peft/lora"' in warned
    assert load_state(tmp_path).keys() == joint().adapter_state_dict().keys()


def changed(folder, file, **values):
    read = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(read | values))


OURS, THEIRS = "reft_config.json", "peft/adapter_config.json"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / THEIRS).unlink(), FileNotFoundError, "adapter_config.json is missing"),
        (lambda f: shutil.rmtree(f / "peft"), FileNotFoundError, "adapter_config.json is missing; no such folder"),
        (lambda f: changed(f, OURS, beside="peft/lorra"), ValueError, "did you mean 'peft/lora'"),
        (lambda f: changed(f, OURS, beside="full"), ValueError, "the base model's own weights"),
        (lambda f: changed(f, OURS, beside=3), ValueError, "has beside=3; beside must be a string"),
        (lambda f: changed(f, THEIRS, r=4), ValueError, r"other shapes .*lora_A"),
        (lambda f: changed(f, THEIRS, init_lora_weights="pissa"), ValueError, "init_lora_weights must be one of"),
        (lambda f: changed(f, THEIRS, modules_to_save=["nowhere"]), ValueError, "nowhere"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named_and_the_base_model_stays_as_it_was(change, error, message, tmp_path):
    joint().save_pretrained(tmp_path)
    change(tmp_path)
    base, batch = tiny.model("llama"), batch_of("llama")
    before, names = logits_of(base, batch), [name for name, _ in base.named_modules()]
    with pytest.raises(error, match=message) as refused:
        rl.ReftModel.from_pretrained(base, tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert [name for name, _ in base.named_modules()] == names
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits_of(base, batch), before)


def test_another_architecture_is_refused_and_what_does_not_fit_there_is_named(tmp_path):
    joint().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on a different kind of model"):
        rl.ReftModel.from_pretrained(tiny.model("gpt2"), tmp_path)
    wide = tiny.model("llama", hidden_size=32)
    with pytest.raises(ValueError, match=r"does not fit loreft \+ peft/lora"):
        rl.ReftModel.from_pretrained(wide, tmp_path, strict=False)
    assert not hasattr(wide, "peft_config")
    other = tiny.model("mistral")
    again = rl.ReftModel.from_pretrained(other, tmp_path, strict=False)
    assert again.adapter_state_dict().keys() == joint().adapter_state_dict().keys()


def test_where_adapters_share_a_base_model_it_is_refused(tmp_path):
    model = joint()
    model.save_pretrained(tmp_path)
    rl.attach(tiny.model("llama"), "loreft", rank=2).save_pretrained(tmp_path / "alone")
    for other, saved in ((rl.attach(tiny.model("llama"), rank=1), ""), (model, ""), (model, "alone")):
        with pytest.raises(
            ValueError, match="trained together with peft/lora, which changes the base model for"
        ):
            other.load_adapter(tmp_path / saved, "second")
    with pytest.raises(ValueError, match="together with peft/lora, which would apply to all requests"):
        serve_adapters(tiny.model("llama"), {"one": tmp_path, "two": tmp_path / "alone"})
    for write in (rl.to_pyreft, rl.to_easysteer):
        with pytest.raises(ValueError, match="together with peft/lora, but a folder for"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_or_folder_that_does_not_fit_is_refused(tmp_path):
    model = joint()
    state = model.adapter_state_dict()
    ours = {name: tensor for name, tensor in state.items() if not name.startswith("peft.")}
    with pytest.raises(ValueError, match=r"does not fit loreft \+ peft/lora.*lora_A"):
        model.load_adapter_state_dict(ours)
    model.save_pretrained(tmp_path)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "peft" / file).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{file} is missing"):
            load_state(tmp_path)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["intervention.beside=peft/lorra"], r"got 'peft/lorra'; did you mean 'peft/lora'"),
        (["intervention.beside=lora"], r"must be one of .*peft/oft; got 'lora'; did you mean 'peft/lora'"),
        (["intervention.beside=peft/prompt_tuning"], r"got .*; its virtual tokens precede the text"),
        (["intervention.beside=peft/prefix_tuning"], r"got .*; its virtual tokens precede the text"),
        (["intervention.beside=bitfit"], r"trains the base model's own weights"),
        (["intervention=peft/lora", "intervention.beside=peft/oft"], r"peft/lora is a baseline: use method=lor"),
        (["intervention=none", "intervention.beside=peft/lora"], r"use intervention.method=peft/lora"),
        (["+intervention.beside_options.r=3"], r"beside_options r .*none is trained together with loreft: name one"),
        (["intervention=loreft_lora", "+intervention.beside_options.lora_alhpa=3"],
         r"peft/lora takes no option 'lora_alhpa'; did you mean 'lora_alpha'"),
        (["intervention=loreft_lora", "+intervention.beside_options.bias=all"], r"leave out the option 'bias'"),
        (["intervention.besides=peft/lora"], r"did you mean 'intervention.beside'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_combinations_name_what_is_allowed_before_weights(overrides, message):
    with pytest.raises(compose.CompositionError, match=message):
        compose.compose(["model=tiny_random", "data=boolq", *overrides])


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"))


def test_a_stopped_run_goes_on_exactly_is_evaluated_again_and_talked_to(data, tmp_path, monkeypatch):
    whole = short_runs.run(data, tmp_path / "whole", *RUN, "evaluate_base=true")
    with monkeypatch.context() as patch:
        short_runs.stop_at(patch, 8)
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path / "parts", *RUN, "evaluate_base=true")
    resume = f"resume={tmp_path / 'parts'}"
    parts = short_runs.run(data, tmp_path / "parts", *RUN, "evaluate_base=true", resume)
    a, b = (load_state(tmp_path / name / "adapter") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert {name.split(".")[0] for name in a} == {"interventions", "peft"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    # 2 layers of width 32, one head of values of width 16
    lora, loreft = 2 * 3 * (32 + 32 + 32 + 16), 2 * (2 * 2 * 32 + 2)
    for result in (whole, parts):
        assert (result["status"], result["method"]) == ("complete", "loreft + peft/lora")
        assert result["trainable_parameters"] == lora + loreft
        assert {"val/loss", "test/accuracy", "base/test/accuracy"} <= result["metrics"].keys()
    saved = short_runs.checkpoint(tmp_path / "whole")["state_dict"]
    assert {name.split(".")[1] for name in saved} == {"interventions", "peft"}
    again = evaluate(tmp_path / "whole", "validation")
    assert again["metrics"]["val/loss"] == pytest.approx(whole["metrics"]["val/loss"])
    assert again["method"] == "loreft + peft/lora"
    (read,), _, _ = read_runs([tmp_path / "whole"])
    files = (
        tmp_path / "whole/adapter/reft.safetensors",
        tmp_path / "whole/adapter/peft/adapter_model.safetensors",
    )
    assert read.adapter_bytes == sum(file.stat().st_size for file in files)
    talk = chat.Conversation(*chat.load(tmp_path / "whole"), max_new_tokens=6)
    assert isinstance(talk.model, JointModel)
    base, said = talk.ask("is zorb kept?")
    assert base != said


def test_a_classifier_is_trained_with_its_head(root, tmp_path):
    config = compose.compose(
        [
            "model=tiny_random", "model.config.model_type=bert", "data=glue_rte", "intervention=loreft_lora",
            "data.source=local", f"data.path='{root / 'tests/fixtures/glue'}'", "data.batch_size=4",
            "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    result = experiment.run(config, tmp_path)
    # BERT's pooler and classifier; LoReFT of rank 4, LoRA of rank 8 on queries and values, in 2 layers of width 32
    head, trained = 32 * 32 + 32 + 2 * 32 + 2, 2 * (2 * 4 * 32 + 4) + 2 * 2 * 8 * 64
    assert (result["status"], result["head_parameters"]) == ("complete", head)
    assert result["trainable_parameters"] == trained
    again = evaluate(tmp_path, "validation")
    assert again["metrics"]["val/loss"] == pytest.approx(result["metrics"]["val/loss"])
