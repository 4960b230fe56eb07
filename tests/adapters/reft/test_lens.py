"""The logit lens: a direction goes through the model's own final norm and output head, and nothing else."""

import pytest
import tiny
import torch

from reft_lightning.adapters.reft.lens import in_stream, logits_of
from reft_lightning.adapters.reft.sites import find_sites

NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gptj": "transformer.ln_f",
}  # gptj's head has a bias


@pytest.mark.parametrize("family", NORMS)
def test_a_direction_gets_the_logits_of_final_norm_and_head(family):
    model = tiny.model(family)
    directions = torch.randn(5, tiny.WIDTH)
    length = tiny.WIDTH**0.5 / directions.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        normed = model.get_submodule(NORMS[family])(directions * length)
        expected = model.get_output_embeddings()(normed)
    torch.testing.assert_close(logits_of(model, directions), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits_of(model, 7 * directions), expected, atol=1e-4, rtol=1e-4)


def site(model, component):
    return find_sites(model, {1: component})[1]


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_decoder_has_a_lens_for_what_is_in_its_stream_and_keeps_no_hook(family):
    """What blocks read and return is there, and what they add unless a norm comes before."""
    model, ids = tiny.model(family), torch.arange(3, 8).unsqueeze(0)
    before = model(input_ids=ids).logits
    assert logits_of(model, torch.eye(tiny.WIDTH)[:3]).shape == (3, tiny.VOCABULARY)
    assert in_stream(model, site(model, "block_output"))
    assert in_stream(model, site(model, "block_input"))
    for component in ("attention_output", "mlp_output"):
        assert in_stream(model, site(model, component)) == (family != "gemma3")
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mlp.down_proj", True),
        ("self_attn.o_proj", True),
        ("mlp.down_proj.input", False),  # of another width
        ("self_attn.o_proj.input", False),  # of the stream's width, in the coordinates of heads
        ("self_attn.q_proj", False),
        ("mlp.input", False),  # after the norm
        ("input_layernorm.input", False),  # a copy: the stream itself goes past it
    ],
)
def test_what_is_inside_a_block_is_decided_by_where_it_goes_and_not_by_its_width(path, expected):
    model = tiny.model("llama")
    assert in_stream(model, site(model, f"model.layers.{{layer}}.{path}")) == expected
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
