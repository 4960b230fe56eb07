"""No silent mistakes: unknown arguments, empty positions, adapters of other models, a lost scale."""

import copy
import json

import pytest
import tiny
import torch
from adapted_models import adapted
from laws import shaken
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.adapters.reft.config import CONFIG_FILE

BATCH = tiny.padded(tiny.rows(5, 3), "left")
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": tiny.PAD}


# --- arguments nobody reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family"),
    [*(("loreft", family) for family in tiny.FAMILIES), ("peft/lora", "llama"), ("full", "bert")],
)
def test_an_unknown_argument_of_forward_is_refused(method, family):
    model = adapted(family, method)
    for name, near in (("misspelt", ""), ("output_hidden_state", "output_hidden_states"), ("promt_mask", "prompt_mask"),
                       ("labels_", "labels")):  # fmt: skip
        said = f"takes no argument '{name}'" + (f".*did you mean '{near}'" if near else "")
        with pytest.raises(ValueError, match=said):
            model(**BATCH, **{name: True})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_transformers_passes_on_is_taken(family):
    reft = rl.attach(tiny.model(family), rank=2, heads=False)
    out = reft(**BATCH, output_hidden_states=True, output_attentions=False, return_dict=True)
    assert len(out.hidden_states) == tiny.LAYERS + 1
    if family in tiny.DECODERS:
        labels = BATCH["input_ids"].masked_fill(torch.arange(5) < 4, -100)
        whole = reft(**BATCH, labels=labels).loss
        halved = reft(**BATCH, labels=labels, num_items_in_batch=torch.tensor(4), use_cache=False).loss
        torch.testing.assert_close(halved, whole / 2)


def test_a_model_of_one_s_own_may_take_what_it_likes():
    class Mine(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            seen.append(kwargs.pop("flavour", None))
            return super().forward(*args, **kwargs)

    seen = []
    reft = rl.attach(Mine(tiny.DECODERS["llama"]()), rank=2)
    reft(**BATCH, flavour="mint")
    assert seen[-1] == "mint"  # before, it was tried how the model reads


# --- hooks that are not there ----------------------------------------------------------------------------------------


def replicated(module):  # as nn.DataParallel does on several GPUs
    copied = module._replicate_for_data_parallel()
    copied._parameters, copied._buffers = module._parameters, module._buffers
    copied._modules = {name: replicated(child) for name, child in module._modules.items()}
    return copied


def test_a_shallow_copy_does_not_answer_as_the_base_model():
    reft = rl.attach(tiny.model("llama"), rank=2).eval()
    for call in (lambda model: model(**BATCH), lambda model: model.generate(**BATCH, **GREEDY)):
        for copied in (copy.copy, replicated):
            with pytest.raises(ValueError, match=r"without the hooks of this ReftModel.*deepcopy"):
                call(copied(reft))
        call(copy.deepcopy(reft))
        call(reft)


# --- positions that select nothing -----------------------------------------------------------------------------------


def nothing(prompt, target):
    return torch.zeros_like(prompt)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "select no token" in r.getMessage()]


@pytest.mark.parametrize("positions", ["decode", "decode:2", nothing])
def test_training_that_edits_nothing_warns_once(positions, caplog):
    reft = rl.attach(tiny.model("bert"), rank=2, positions=positions)
    reft.train()
    for _ in range(3):
        reft(**BATCH)
    (said,) = warnings_of(caplog)
    assert said.startswith(f"the positions {'<callable' if callable(positions) else positions}")
    assert "nothing is edited" in said


def test_generations_that_edit_nothing_warn_once(caplog):
    reft = rl.attach(tiny.model("llama"), rank=2, positions=nothing).eval()
    for _ in range(2):
        reft.generate(**BATCH, **GREEDY)
    (said,) = warnings_of(caplog)
    assert "in this generation" in said


def test_a_generation_that_goes_on_from_a_cache_says_nothing(caplog):
    reft = rl.attach(tiny.model("llama"), rank=2, positions="f1+l1").eval()
    first = reft.generate(**BATCH, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, first.sequences[:, -1:]], 1)
    mask = torch.ones_like(longer)
    reft.generate(input_ids=longer, attention_mask=mask, prompt_mask=mask.bool(), past_key_values=first.past_key_values,
                  **GREEDY)  # fmt: skip
    assert warnings_of(caplog) == []


def test_scoring_that_edits_nothing_warns_once(caplog):
    reft = rl.attach(tiny.model("llama"), rank=2, positions="decode").eval()
    with torch.no_grad():
        for _ in range(20):
            reft(**BATCH)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("positions", ["f1", "l1", "prompt", "all", "decode"])
def test_a_model_that_edits_anything_says_nothing(positions, caplog):
    reft = rl.attach(tiny.model("llama"), rank=2, positions=positions)
    labels = BATCH["input_ids"].masked_fill(torch.arange(5) < 4, -100)
    reft.train()
    reft(**BATCH, labels=labels)
    reft.eval().generate(**BATCH, **GREEDY)
    with torch.no_grad():
        for _ in range(10):
            reft(**BATCH)
    rl.attach(tiny.model("bert"), "none").train()(**BATCH)  # has no positions
    with reft.disabled():
        reft.generate(**BATCH, **GREEDY)
    assert warnings_of(caplog) == []


# --- adapters of other models ----------------------------------------------------------------------------------------

SIZES = tiny.SIZES | tiny.GROUPED


@pytest.fixture
def saved(tmp_path):
    reft = rl.attach(tiny.model("llama"), rank=2, layers=[0, 1])
    shaken(reft.interventions)
    reft.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SIZES | {"num_hidden_layers": 5}), "LlamaForCausalLM has layers 5 instead of 3"),
        (LlamaConfig(**SIZES | {"num_hidden_layers": 2}), "has layers 2 instead of 3"),
        (MistralConfig(**SIZES), "MistralForCausalLM has type 'mistral' instead of 'llama'"),
        (GPT2Config(**tiny.GPT_SIZES | {"n_layer": 4}), "has type 'gpt2' instead of 'llama', layers 4 instead of 3"),
        (FalconConfig(**tiny.FALCON_SIZES), "has type 'falcon' instead of 'llama'"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused_unless_asked_for(config, said, saved):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=said + r".*strict=False"):
        rl.ReftModel.from_pretrained(model, saved)
    assert rl.ReftModel.from_pretrained(model, saved, strict=False)(**BATCH).logits.isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_of_another_width_never_loads(strict, saved):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="width 32 instead of 16" if strict else "does not fit"):
        rl.ReftModel.from_pretrained(model, saved, strict=strict)


# --- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 0, torch.tensor(0.25)])
def test_the_scale_is_saved(scale, saved, tmp_path):
    reft = rl.ReftModel.from_pretrained(tiny.model("llama"), saved).eval()
    assert reft.scale == 1
    full = reft(**BATCH).logits
    reft.scale = scale
    reft.save_pretrained(tmp_path / "scaled")
    assert json.loads((tmp_path / "scaled" / CONFIG_FILE).read_text())["scale"] == float(scale)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "scaled").eval()
    assert again.scale == float(scale)
    assert torch.equal(again(**BATCH).logits, reft(**BATCH).logits)
    assert not torch.equal(again(**BATCH).logits, full)


# --- the encoders of encoder-decoder models --------------------------------------------------------------------------

STACK = {"vocab_size": 48, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
         "forced_eos_token_id": None}  # fmt: skip


BART, T5 = (
    BartConfig(**STACK),
    T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
)


@pytest.mark.parametrize(
    ("build", "component"),
    [
        (lambda: BartForConditionalGeneration(BART), "block_output"),
        (lambda: MBartForConditionalGeneration(MBartConfig(**STACK)), "block_output"),
        (lambda: T5ForConditionalGeneration(T5), "block_output"),
        (lambda: T5ForConditionalGeneration(T5), "block_input"),
    ],
    ids=["BART", "mBART", "T5", "T5 input"],
)
def test_the_encoder_of_an_encoder_decoder_attaches_by_itself(build, component):
    model = build().eval()
    encoder = model.get_encoder().requires_grad_(False)  # attention of T5's trained biases rounds otherwise
    expected = encoder(**BATCH).last_hidden_state
    reft = rl.attach(encoder, rank=2, positions="f1+l1", component=component).eval()
    shaken(reft.interventions)
    edited = reft(**BATCH).last_hidden_state
    assert not torch.equal(edited, expected)
    edited.sum().backward()
    assert all(parameter.grad is not None for parameter in reft.interventions.parameters())
    with reft.disabled():
        assert torch.equal(reft(**BATCH).last_hidden_state, expected)
