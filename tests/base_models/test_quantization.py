"""Frozen bases in 8 and 4 bits: float32 adapters train on them; what cannot run is refused before weights are read."""

import importlib.util
from dataclasses import replace

import pytest
import short_runs
import torch
from transformers import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer, load_base_model
from reft_lightning.base_models.quantization import check_quantization
from reft_lightning.config import compose
from reft_lightning.config.schema import InterventionConfig
from reft_lightning.runs import experiment
from reft_lightning.storage.reading import read_yaml

LIBRARIES = {"nf4": "bitsandbytes", "llm_int8": "bitsandbytes", "int8": "torchao"}
HERE = [
    pytest.param(
        name, marks=pytest.mark.skipif(not importlib.util.find_spec(library), reason=f"{library} is not installed")
    )
    for name, library in LIBRARIES.items()
]  # fmt: skip


def settings(name):
    return read_yaml(compose.config_dir() / "quantization" / f"{name}.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 2 layers, whose maps are as wide as a block of NF4."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip
    load_base_model(source="random", tokenizer="bytes", config=config)[0].save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder, name=None):
    quantization = settings(name) if name else None
    return load_base_model(source="local", path=str(folder), quantization=quantization)[0]


@pytest.mark.parametrize("name", HERE)
def test_a_run_trains_float32_adapters_on_it(folder, tmp_path, name):
    data = short_runs.write_rows(tmp_path / "rows")
    arguments = ["model=local", f"model.path={folder}", f"quantization={name}", "trainer.max_epochs=4"]
    results = short_runs.run(data, tmp_path / "run", *arguments)
    plain = load(folder)
    assert results["base_parameters"] == plain.num_parameters()
    losses = list(short_runs.logged(tmp_path / "run", "train/loss").values())
    assert sum(losses[-6:]) < sum(losses[:6])
    base = load(folder, name)
    assert sum(type(p) is not torch.nn.Parameter for p in base.parameters()) == 2 * 7  # of two blocks
    reft = rl.ReftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert reft.parameter_count().base == plain.num_parameters()
    assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
    ids = torch.randint(3, 200, (2, 12))
    edited, unedited = reft(input_ids=ids).logits, plain(input_ids=ids).logits
    assert not torch.equal(edited, unedited)
    with reft.disabled():  # the rounded base is still near to the base
        near = reft(input_ids=ids).logits
    assert torch.corrcoef(torch.stack([near.flatten(), unedited.flatten()]))[0, 1] > 0.9
    torch.testing.assert_close(near, base(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_what_no_edit_changes_is_kept(folder, tmp_path, caplog, name):
    data = short_runs.write_rows(tmp_path / "rows")
    run = [
        "model=local",
        f"model.path={folder}",
        f"quantization={name}",
        "intervention.positions=l1",
        "test=false",
    ]
    kept = [*run, "kept.limit_gb=1", "trainer.max_epochs=1"]
    with caplog.at_level("INFO", "reft_lightning.speed.choose_part"):
        short_runs.run(data, tmp_path / "run", *kept)
    said = [record.getMessage() for record in caplog.records]
    assert any("keeping the keys and values of prefixes" in text for text in said)
    assert not any("falling back" in text for text in said)


@pytest.mark.parametrize("name", HERE)
def test_gradients_are_those_of_its_rounded_weights(folder, name):
    """The weights that it computes with, read off by multiplying the unit vectors, give the gradients in float32."""
    quantized, plain = load(folder, name), load(folder)
    for path, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded = quantized.get_submodule(path)
            with torch.no_grad():
                module.weight.copy_(rounded(torch.eye(module.in_features)).mT)
    found = []
    ids = torch.randint(3, 200, (2, 12))
    for base in (quantized, plain):
        torch.manual_seed(1)
        base(input_ids=ids)
        reft = rl.attach(base, "loreft", rank=2, positions="f2+l2").eval()
        with (
            torch.no_grad()
        ):  # as a validation does, after which bitsandbytes may keep weights in another form
            reft(input_ids=ids)
        labels = ids.masked_fill(torch.arange(12) < 8, -100)
        reft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in reft.interventions.parameters()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99  # products of 8 and 16 bits


@pytest.mark.parametrize("name", HERE)
def test_quantized_heads_and_merging_are_refused(folder, name):
    base = load(folder, name)
    with pytest.raises(ValueError, match="is quantized and would not be trained"):
        rl.attach(base, "loreft", rank=2, heads=["model.layers.1.mlp.down_proj"])
    with pytest.raises(ValueError, match="quantized weights cannot hold the sum"):
        rl.merge(rl.attach(base, "loreft", rank=2, positions="all", component="mlp_output"))


@pytest.mark.parametrize("name", HERE[:1])
def test_a_model_that_transformers_quantized_takes_adapters(folder, name):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(name))
    reft = rl.attach(base, "loreft", rank=2, positions="l2")
    ids = torch.randint(3, 200, (2, 12))
    text = reft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert text.shape == (2, 15)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quant_method": "nf5"}, "nf5"),
        ({"load_in_3bit": True}, "quant_method"),
        ({"quant_method": "aqlm"}, "requires AQLM|aqlm"),
        ({"quant_method": "quanto", "weights": "int3"}, "int3"),
        (
            {"quant_method": "bitnet", "linear_clas": "bitlinear"},
            "no setting linear_clas; did you mean 'linear_class'",
        ),
    ],
)
def test_what_this_machine_cannot_quantize_is_said(given, said):
    with pytest.raises(ValueError, match=rf"model\.quantization.*({said})"):
        check_quantization(given)


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Int8DynamicActivationInt8WeightConfig", "pass no gradient to their input"),
        pytest.param(
            "Int4WeightOnlyConfig",
            "conversion of the weights",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs"),
        ),
    ],
)
def test_what_passes_no_gradient_on_or_has_no_kernel_is_said(kind, said):
    quant_type = {"default": {"_type": kind, "_version": 2, "_data": {}}}
    with pytest.raises(ValueError, match=said):
        check_quantization({"quant_method": "torchao", "quant_type": quant_type})


def test_weights_that_are_drawn_are_not_quantized(tmp_path):
    data = short_runs.write_rows(tmp_path / "rows")
    for override in ("+model.quantization.quant_method=bitnet", "model.device_map=auto"):
        with pytest.raises(experiment.SetupError, match="source=random are drawn"):
            short_runs.run(data, tmp_path / "run", override)


def test_all_of_a_quantized_base_is_not_trained(folder, tmp_path):
    data = short_runs.write_rows(tmp_path / "rows")
    given = ("model=local", f"model.path={folder}", "+model.quantization.quant_method=bitnet")
    config = short_runs.config(data, *given)
    full = replace(config, intervention=InterventionConfig(method="full"))
    with pytest.raises(experiment.SetupError, match=r"full trains the weights that model\.quantization"):
        experiment.run(full, tmp_path / "run")
