"""reft-convert: an adapter of one library becomes one of another, from the command line."""

import copy
import json
import logging
import re
import shutil
import sys

import golden_llama
import pytest
import tiny
import torch
import vision_models
from golden_llama import GOLDEN
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, Gemma3ForCausalLM

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.adapters import saving
from reft_lightning.adapters.adapt import adapt
from reft_lightning.exchange import command

FOLDERS = GOLDEN / "pyreft_folders"
OTHERS = ("pyreft", "easysteer", "gguf")
ROWS = tiny.padded(tiny.rows(5, 3), "left")


def logits(reft):
    with torch.no_grad():
        return reft.eval()(**ROWS).logits


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; returns (status, standard error)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["reft-convert", *map(str, arguments)])
        try:
            cli.convert()
        except SystemExit as left:
            return left.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return command


def save(folder, method="loreft", place="mine", adapt=rl.attach, **settings):
    """Save an adapter of the base model in ``base``; return it."""
    reft = adapt(tiny.model("llama"), method, **({"rank": 2} if method == "loreft" else {}) | settings)
    reft.config.base_model = str(folder / "base")
    reft.save_pretrained(folder / place)
    return reft


@pytest.fixture
def base(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path, base):
    """An adapter in ``mine``, of the base model in ``base``."""
    return save(tmp_path, positions="f1+l2")


def test_there_and_back_again(run, saved, tmp_path):
    assert run("mine", "to=pyreft", "out=theirs")[0] == 0
    assert run("theirs", "to=reft")[0] == 0
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "theirs-reft")
    torch.testing.assert_close(logits(again), logits(saved), atol=1e-5, rtol=0)
    assert run("mine", "to=easysteer", "out=served")[0] == 0
    assert len(json.loads((tmp_path / "served" / "steering.json").read_text())["vectors"]) == tiny.LAYERS


def test_a_constant_vector_becomes_a_control_vector_and_nothing_else_does(run, saved, tmp_path, caplog):
    save(tmp_path, "bias", "constant", layers=[1], positions="all")
    with caplog.at_level(logging.INFO):
        assert run("constant", "to=gguf")[0] == 0
    assert not [record.name for record in caplog.records if record.name.startswith("gguf")]
    assert "to gguf in constant-gguf" in caplog.text
    assert (tmp_path / "constant-gguf" / "control_vector.gguf").is_file()
    status, error = run("mine", "to=gguf")
    assert status == 2
    assert "layer 0: llama.cpp adds control vectors only to blocks after the first" in error
    assert not (tmp_path / "mine-gguf").exists()


@pytest.mark.parametrize("to", OTHERS)
def test_the_weights_of_the_base_model_are_not_needed(run, tmp_path, base, to):
    method, settings = ("bias", {"layers": [1]}) if to == "gguf" else ("loreft", {"rank": 2})
    reft = rl.attach(tiny.model("llama"), method, positions="all", **settings)
    reft.scale = 0.5 if to != "pyreft" else 1.0
    reft.config.base_model = str(base)
    reft.save_pretrained(tmp_path / "mine")
    command.WRITERS[to](reft, tmp_path / "expected")
    (base / "model.safetensors").unlink()
    assert run("mine", f"to={to}", "out=found")[0] == 0
    for path in (tmp_path / "expected").iterdir():
        there = tmp_path / "found" / path.name
        if path.suffix == ".bin":
            torch.testing.assert_close(torch.load(there), torch.load(path), rtol=0, atol=0)
        else:
            assert there.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("heads", [["lm_head"], ["lm_head", "model.embed_tokens"]])
def test_trained_heads_are_converted_without_the_other_weights(run, tmp_path, heads):
    model = tiny.model("llama", tie_word_embeddings=len(heads) > 1)
    model.save_pretrained(tmp_path / "base")
    reft = rl.attach(copy.deepcopy(model), "loreft", rank=2, positions="f1+l1", heads=heads)
    with torch.no_grad():
        reft.base_model.lm_head.weight.add_(1.0)
    reft.config.base_model = str(tmp_path / "base")
    reft.save_pretrained(tmp_path / "mine")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert run("mine", "to=pyreft")[0] == 0
    assert run("mine-pyreft", "to=reft", "out=again")[0] == 0
    again = rl.ReftModel.from_pretrained(model, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(reft), atol=1e-5, rtol=0)


def test_heads_keep_the_precision_of_their_file(run, tmp_path, caplog):
    model = tiny.model("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    reft = rl.attach(copy.deepcopy(model), "loreft", rank=2, positions="f1+l1", heads=["lm_head"])
    reft.config.base_model = str(tmp_path / "base")
    reft.save_pretrained(tmp_path / "mine")
    for place, to in (("mine", "reft"), ("mine", "pyreft"), ("mine-pyreft", "reft")):
        assert run(place, f"to={to}")[0] == 0
    for place in ("mine-reft", "mine-pyreft-reft"):
        again = rl.ReftModel.from_pretrained(copy.deepcopy(model), tmp_path / place)
        assert torch.equal(logits(again), logits(reft))
    assert "lower precision" not in caplog.text


@pytest.mark.parametrize("to", ["reft", "pyreft"])
def test_a_text_model_is_found_in_a_checkpoint_that_also_reads_images(run, tmp_path, to):
    images = vision_models.model("gemma3").config
    images.save_pretrained(tmp_path / "base")
    model = Gemma3ForCausalLM(images.text_config)
    reft = rl.attach(model, "loreft", rank=2, positions="f1+l1")
    reft.config.base_model = str(tmp_path / "base")
    reft.save_pretrained(tmp_path / "mine")
    status, error = run("mine", f"to={to}")
    assert status == 0, error


@pytest.mark.parametrize("library", ["pyreft", "adapters"])
def test_other_libraries_adapters_are_read_without_the_weights(run, tmp_path, library):
    place = GOLDEN / f"{library}_folders" / "loreft_tied"
    golden_llama.base_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    arguments = {"positions": "f5+l5"} if library == "pyreft" else {}
    given = [f"{name}={value}" for name, value in arguments.items()]
    assert run(place, "to=reft", "base=base", "out=mine", *given)[0] == 0
    read = {"pyreft": rl.from_pyreft, "adapters": rl.from_adapters}[library]
    expected = read(golden_llama.base_model(), place, **arguments)
    found = rl.ReftModel.from_pretrained(golden_llama.base_model(), tmp_path / "mine")
    torch.testing.assert_close(found.adapter_state_dict(), expected.adapter_state_dict(), rtol=0, atol=0)
    assert found.positions == expected.positions


@pytest.mark.parametrize("adapt", [rl.attach, adapt])
def test_the_base_that_is_named_is_written(run, tmp_path, base, adapt):
    beside = {} if adapt is rl.attach else {"beside": "peft/lora"}
    adapt(tiny.model("llama"), "loreft", rank=2, positions="f1+l1", **beside).save_pretrained(
        tmp_path / "mine"
    )
    assert run("mine", "to=reft", "base=base")[0] == 0
    assert json.loads((tmp_path / "mine-reft" / "reft_config.json").read_text())["base_model"] == "base"


def test_an_adapter_is_read_once(run, saved, monkeypatch):
    read = []
    monkeypatch.setattr(
        saving, "safe_open", lambda path, **how: read.append(path.name) or safe_open(path, **how)
    )
    assert run("mine", "to=reft")[0] == 0
    assert read == ["reft.safetensors"]


@pytest.mark.parametrize("to", ["pyreft", "easysteer"])
def test_an_adapter_with_partitions_is_refused(run, tmp_path, to):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f1+l1")
    reft.add_partition("sentiment", [0])
    reft.config.base_model = str(tmp_path / "base")
    reft.save_pretrained(tmp_path / "mine")
    status, error = run("mine", f"to={to}")
    assert status == 2
    assert "this model has the adapters default, sentiment" in " ".join(error.split())
    assert not (tmp_path / f"mine-{to}").exists()


def test_a_peft_adapter_that_is_not_converted_is_named(run, tmp_path, caplog):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f1+l1")
    reft.config.base_model = str(tmp_path / "base")
    reft.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "peft").mkdir()
    (tmp_path / "mine" / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert run("mine", "to=pyreft")[0] == 0
    assert "peft is not loaded, as reft_config.json does not name" in caplog.text


def test_a_run_is_its_adapter(run, saved, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "mine", tmp_path / "run" / "adapter")
    assert run("run", "to=easysteer", "out=served")[0] == 0
    assert (tmp_path / "served" / "steering.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=pyreft"], "FOLDER must be one folder, of an adapter or a run; got none"),
        (["mien", "to=pyreft"], "got mien; did you mean 'mine'?"),
        (["mine"], "to=... is missing: one of reft, pyreft, easysteer, gguf"),
        (["mine", "to=pyrfet"], "got 'pyrfet'; did you mean 'pyreft'?"),
        (["mine", "to=pyreft", "postions=f1"], "did you mean 'positions'?"),
        (["mine", "to=pyreft", "positions=f1"], "positions=f1 does not apply to mine, an adapter of reft"),
        (["mine", "to=pyreft", "out=base"], "out=base is not empty"),
        (
            ["base", "to=pyreft"],
            "base does not hold an adapter of reft_lightning (reft_config.json), adapters",
        ),
        (
            [FOLDERS / "loreft_tied", "to=reft", "base=base"],
            "add those used in training, such as positions=f7+l7",
        ),
        ([FOLDERS / "loreft_tied", "to=reft", "positions=f1"], "does not name its base model: add base=NAME"),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_loaded(run, saved, monkeypatch, arguments, said):
    monkeypatch.setattr("reft_lightning.exchange.command.AutoConfig", None)
    status, error = run(*arguments)
    assert status == 2
    assert said in error


@pytest.mark.parametrize(
    ("to", "method", "settings", "said"),
    [
        ("gguf", "bias", {"layers": [0, 1]}, "layer 0: llama.cpp adds control vectors only to blocks after the first"),
        ("gguf", "lofit", {"component": "head_output"}, "only to the output of blocks; got 'head_output'"),
        ("gguf", "bias", {"layers": {1: {}, 2: {"positions": "f1"}}}, "layer 2: .*must be all; got positions=f1"),
        ("gguf", "bias", {"heads": ["lm_head"]}, "a control vector cannot hold heads"),
        *[(to, "bias", {"beside": "peft/lora", "adapt": adapt}, "trained together with peft/lora") for to in OTHERS],
    ],
)  # fmt: skip
def test_what_the_configuration_tells_is_said_before_weights_are_loaded(
    run, tmp_path, to, method, settings, said
):
    save(tmp_path, method, **{"layers": [1], "positions": "all", **settings})  # whose base is not there
    status, error = run("mine", f"to={to}")
    assert status == 2
    assert re.search(said, " ".join(error.split()))


@pytest.mark.parametrize(
    ("to", "settings", "said"),
    [
        ("easysteer", {"component": "mlp_output"}, "edits only the output of blocks; got 'mlp_output'"),
        ("easysteer", {"tied": "position"}, "tied='position' has one intervention per position"),
        ("pyreft", {"tied": "position"}, "pyreft has one intervention for all positions"),
    ],
)
def test_what_a_library_does_not_have_is_said_before_weights_are_loaded(
    run, tmp_path, base, to, settings, said
):
    (base / "model.safetensors").unlink()
    save(tmp_path, positions="f1+l1", **settings)
    status, error = run("mine", f"to={to}")
    assert status == 2
    assert said in " ".join(error.split())


def test_a_base_model_that_is_not_there_is_asked_for_in_the_words_of_the_command(run, saved, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    shutil.copytree(FOLDERS / "loreft_tied", tmp_path / "theirs")
    for arguments in (["mine", "to=pyreft"], ["theirs", "to=reft", "positions=f1", "base=base"]):
        status, error = run(*arguments)
        assert status == 2
        assert "base' is not a folder, and could not be loaded from the hub" in error
        assert "name another with base=, a folder or a name on the hub" in error
        assert "from_pretrained" not in error
    assert run("mine", "to=pyreft", "base=moved")[0] == 0


def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(run, saved, tmp_path):
    status, error = run(FOLDERS / "loreft_tied", "to=reft", "base=base", "positions=f1", "out=out")
    assert status == 2
    assert "loreft_tied: the adapter does not fit" in error
    assert not (tmp_path / "out").exists()


def test_a_classifiers_adapter_of_a_plain_checkpoint_is_converted(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.config.pad_token_id = tiny.PAD
    rl.attach(base, rank=2, positions="l1", heads=["score"]).save_pretrained(tmp_path / "adapter")
    command.main(tmp_path / "adapter", "pyreft", tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()
