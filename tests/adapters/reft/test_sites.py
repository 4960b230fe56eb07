"""Sites are found in the model itself, without a table of architectures."""

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, LlavaConfig, SiglipVisionConfig

import reft_lightning as rl
from reft_lightning.adapters.reft.sites import COMPONENTS, block_path, check_layers, find_sites

PATHS = {
    "llama": "model.layers", "qwen3": "model.layers", "gemma3": "model.layers", "mistral": "model.layers",
    "gpt2": "transformer.h", "gptj": "transformer.h", "falcon": "transformer.h", "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers", "bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer",
}  # fmt: skip


@pytest.mark.parametrize("family", PATHS)
def test_every_component_is_a_module_of_its_block_with_the_width_of_the_stream(family):
    model = tiny.model(family)
    assert block_path(model) == PATHS[family]
    for component in COMPONENTS:
        site = find_sites(model, {1: component})[1]
        assert site.path.startswith(f"{PATHS[family]}.1")
        assert isinstance(model.get_submodule(site.path), nn.Module)
        assert site.width == tiny.WIDTH
        assert site.dim == (tiny.WIDTH // tiny.HEADS if component == "head_output" else tiny.WIDTH)
        assert site.end == ("input" if component in ("block_input", "head_output") else "output")


def test_a_module_path_gives_the_width_of_the_linear_map_at_either_end():
    model = tiny.model("llama")
    down = find_sites(model, {2: "model.layers.{layer}.mlp.down_proj.input"})[2]
    assert (down.path, down.end, down.dim) == ("model.layers.2.mlp.down_proj", "input", 24)
    query = find_sites(model, {0: "model.layers.{layer}.self_attn.q_proj"})[0]
    assert (query.end, query.dim) == ("output", model.model.layers[0].self_attn.q_proj.out_features)
    gpt2 = find_sites(tiny.model("gpt2"), {0: "transformer.h.{layer}.attn.c_attn"})[0]
    assert gpt2.dim == 3 * tiny.WIDTH


def test_an_edit_at_a_linear_maps_input_moves_the_output_of_the_model():
    reft = rl.attach(
        tiny.model("llama"), "loreft", rank=2, component="model.layers.{layer}.mlp.down_proj.input"
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    edited = reft(input_ids=ids).logits
    with reft.disabled():
        assert (reft(input_ids=ids).logits - edited).abs().max() > 1e-4
    assert next(iter(reft.interventions["0"])).dim == 24


def test_an_unknown_component_lists_what_there_is_and_the_nearest():  # pyreft: "object has no attribute ''" (D39)
    with pytest.raises(ValueError, match=r"block_output, block_input.*did you mean 'block_output'"):
        rl.attach(tiny.model("llama"), "loreft", rank=2, component="block_outptu")


def test_an_unknown_path_lists_the_nearest_modules():  # D39
    nearest = r"no module 'model.layers.0.mlp.down'.*model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=nearest):
        rl.attach(tiny.model("llama"), "loreft", rank=2, component="model.layers.{layer}.mlp.down")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([3], r"0\.\.2, as the model has 3 layers; got 3"),
        ([-1], r"got -1"),
        ([0, 0], "layers must be distinct"),
        ([], "empty"),
        ("first", "must be 'all' or a list"),
        ([1.0], r"got 1\.0"),
        ([True], "got True"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers, said):
    with pytest.raises(ValueError, match=said):
        check_layers(layers, 3)


def test_one_layer_may_be_written_as_a_number():
    assert check_layers(1, 3) == [1]
    with pytest.raises(ValueError, match="layers=all selects no layer"):
        check_layers("all", 0)
    assert check_layers("all", 3) == [0, 1, 2]


def test_a_vision_tower_of_as_many_blocks_is_not_taken_for_the_language_model():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=40, **sizes)
    vision = SiglipVisionConfig(image_size=8, patch_size=4, **sizes)
    with torch.device("meta"):
        model = AutoModel.from_config(LlavaConfig(text_config=text, vision_config=vision))
    assert "language_model" in block_path(model)
