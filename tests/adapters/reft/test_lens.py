"""The logit lens: a direction goes through the model's own final norm and output head, and nothing else."""

import pytest
import tiny
import torch

from reft_lightning.adapters.reft.lens import logits_of

NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gptj": "transformer.ln_f",
    "falcon": "transformer.ln_f",
}


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


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_decoder_has_a_lens_and_keeps_no_hook(family):
    model = tiny.model(family)
    before = model(input_ids=torch.arange(3, 8).unsqueeze(0)).logits
    assert logits_of(model, torch.eye(tiny.WIDTH)[:3]).shape == (3, tiny.VOCABULARY)
    assert torch.equal(model(input_ids=torch.arange(3, 8).unsqueeze(0)).logits, before)
