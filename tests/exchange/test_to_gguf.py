"""What to_gguf writes edits tokens as the adapter does, read by the rules of llama.cpp's loader.

That llama.cpp itself computes the same with it is recorded in ``experiments/exchange``.
"""

import architectures
import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.reft.sites import block_path

METHODS = {"bias": {}, "difference_in_means": {}, "lobireft": {"rank": 2}, "lofit": {}}
BATCH = tiny.padded(tiny.rows(5, 8), "left")


def attached(method="bias", family="llama", layers=(1, 2), positions="all", **settings):
    torch.manual_seed(3)
    settings = METHODS.get(method, {}) | settings
    reft = rl.attach(tiny.model(family), method, layers=layers, positions=positions, **settings).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(torch.randn_like(parameter))
    return reft


def buffer_of(folder):
    """The numbers that llama.cpp keeps of a file: a row for each block, from the second one on."""
    reader = gguf.GGUFReader(folder / "control_vector.gguf")
    directions = {}
    for tensor in reader.tensors:
        name, number = tensor.name.split(".")
        assert (name, len(tensor.shape)) == ("direction", 1)
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        directions[int(number)] = torch.from_numpy(np.array(tensor.data))
    assert 0 not in directions
    rows = torch.zeros(max(directions), len(next(iter(directions.values()))))
    for number, vector in directions.items():
        rows[number - 1] = vector
    return rows


def logits_with(model, rows):
    """Run a plain model with row N - 1 added to the output of block N, as llama.cpp does."""

    def add(row):
        def hook(module, args, output):
            return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

        return hook

    handles = [
        model.get_submodule(f"{block_path(model)}.{number}").register_forward_hook(add(row))
        for number, row in enumerate(rows, start=1)
    ]
    with torch.no_grad():
        positions = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**BATCH, position_ids=positions).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(
    ("method", "family", "layers"),
    [*((method, "llama", [1, 2]) for method in METHODS), ("bias", "gpt2", [2])],
)
def test_the_vector_edits_as_the_adapter_does(method, family, layers, tmp_path):
    reft = attached(method, family, layers)
    reft.scale = 0.5
    rl.to_gguf(reft, tmp_path)
    with torch.no_grad():
        expected = reft(**BATCH).logits
    plain = reft.detach()
    found = logits_with(plain, buffer_of(tmp_path))
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert (expected - logits_with(plain, [])).abs()[real].max() > 0.01


def test_the_file_says_what_it_is_and_has_the_same_bytes_each_time(tmp_path):
    reft = attached()
    for place in ("one", "two"):
        rl.to_gguf(reft, tmp_path / place)
    one, two = ((tmp_path / place / "control_vector.gguf").read_bytes() for place in ("one", "two"))
    assert one == two
    fields = gguf.GGUFReader(tmp_path / "one" / "control_vector.gguf").fields
    said = {name: fields[name].contents() for name in fields if not name.startswith("GGUF.")}
    assert said == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }


def test_the_blocks_are_those_of_the_language_model_of_one_that_reads_images(tmp_path):
    base = architectures.build(AutoModelForImageTextToText, CONFIG_MAPPING["qwen2_vl"])
    rl.to_gguf(rl.attach(base, "bias", layers=[1], positions="all"), tmp_path)
    assert buffer_of(tmp_path).shape == (1, base.config.get_text_config().hidden_size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": "all"}, "layer 0: llama.cpp adds control vectors only to blocks after the first"),
        ({"component": "mlp_output"}, "layer 1: .* only to the output of blocks; got 'mlp_output'"),
        ({"component": "block_input"}, "layer 1: .* only to the output of blocks; got 'block_input'"),
        ({"positions": "prompt"}, "layer 1: .* to every token.*must be all; got positions=prompt"),
        ({"positions": "decode"}, "got positions=decode"),
        ({"positions": lambda prompt, target: prompt}, "got a position function"),
        ({"method": "loreft", "rank": 2}, "layer 1: .* the edit of 'loreft' depends on the token"),
        ({"method": "red"}, "the edit of 'red' depends on the token"),
        ({"method": "lofit", "stage": "scale"}, "the edit of 'lofit' depends on the token"),
        ({"method": "cast"}, "layer 1: CAST depends on more than single tokens"),
        ({"layers": {1: {}, 2: {"method": "red"}}}, "layer 2: .* the edit of 'red' depends on the token"),
        ({"heads": ["lm_head"]}, r"cannot hold heads, but this adapter trained \['lm_head'\]"),
        ({"method": "none", "heads": ["lm_head"]}, "cannot hold heads"),
        ({"family": "bert"}, "only to decoders; BertForSequenceClassification is not a decoder"),
    ],
)
def test_what_is_no_control_vector_is_refused_before_anything_is_written(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        rl.to_gguf(attached(**({"heads": False} | settings)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_adapters_a_half_and_a_diverged_one_are_refused(tmp_path):
    several = attached()
    several.add_adapter("more", "bias", layers=[1], positions="all")
    half = adapt(tiny.model("llama"), "bias", layers=[1], positions="all", beside="peft/lora")
    diverged = attached()
    with torch.no_grad():
        diverged.interventions["2"][0].bias[0] = torch.nan
    for reft, said in (
        (several, "has the adapters default, more, but a folder for llama.cpp holds only one"),
        (half, "together with peft/lora, but a folder for llama.cpp"),
        (diverged, "layer 2: Bias has NaN or infinite values"),
    ):
        with pytest.raises(ValueError, match=said):
            rl.to_gguf(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()
