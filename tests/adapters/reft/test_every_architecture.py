"""``disabled()`` is the base, and a generation is edited where its text is: for every architecture of transformers.

Each is built as small as its configuration allows (``architectures.py``); what cannot be built is skipped, with the
reason. A handful runs in the fast suite.
"""

import copy
from functools import partial

import architectures
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import reft_lightning as rl
from reft_lightning.adapters.masks import Spans
from reft_lightning.base_models.reading import reading_of

COLUMNS, NEW = 8, 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

MAPPINGS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "classifier": (AutoModelForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "vision": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "seq2seq": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}  # fmt: skip
FAST = {
    "causal": ["llama", "gpt2", "opt", "mamba", "qwen3_next", "mixtral", "gemma4_text"],
    "classifier": ["roberta", "ibert"],
    "vision": ["qwen2_vl"],
    "seq2seq": ["t5", "bart"],
}
ALL = [
    pytest.param(kind, name, marks=() if name in FAST.get(kind, ()) else pytest.mark.slow)
    for kind, (_, names) in MAPPINGS.items()
    for name in names
]


def built(kind, name):
    try:
        return architectures.build(MAPPINGS[kind][0], CONFIG_MAPPING[name])
    except Exception as error:
        pytest.skip(f"cannot be built small: {error}")


def tokens():
    return torch.randint(5, 60, (2, COLUMNS), generator=torch.Generator().manual_seed(0))


def masks():
    right = torch.ones(2, COLUMNS, dtype=torch.long)
    right[1, 5:] = 0
    return {"none": None, "no padding": torch.ones_like(right), "right": right, "left": right.flip(1)}


def first(model, **inputs):
    """Return logits, or the hidden states of a model without a head; a decoder that has an encoder reads it, too."""
    if model_of(model).config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if value is not None})[0]


def model_of(model):
    return model.base_model if isinstance(model, rl.ReftModel) else model


def same(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def attached(base, positions="f2"):
    reft = rl.attach(base, "loreft", rank=2, positions=positions).eval()
    for phi in reft.interventions.parameters():
        phi.data.normal_(generator=torch.Generator().manual_seed(0))
    return reft


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_disabled_is_the_base_and_generations_are_edited_where_their_text_is(kind, name):
    base = built(kind, name)
    try:
        reft = attached(base)
    except ValueError as error:
        pytest.skip(f"is refused: {error}")
    ids, where = tokens(), masks()
    for padding in ("none", "no padding", "right"):
        inputs = {"input_ids": ids, "attention_mask": where[padding]}
        try:
            expected = first(base, **inputs)
        except Exception as error:
            pytest.skip(f"does not read {padding} text: {error}")
        with reft.disabled():
            assert same(first(reft, **inputs), expected), padding
        if name == "encoder-decoder":
            pytest.skip("has a decoder without attention to its encoder")
        assert not same(first(reft, **inputs), expected)
    if not isinstance(base, GenerationMixin):
        return
    inputs = {"input_ids": ids, "attention_mask": where["left"], **GREEDY}
    try:
        expected = base.generate(**inputs)
    except Exception as error:
        pytest.skip(f"does not generate: {error}")
    with reft.disabled():
        assert torch.equal(reft.generate(**inputs), expected)
    if base.config.is_encoder_decoder:
        check_two_stacks(reft, base, ids)
    else:
        check_generation(reft, base, ids)


def check_two_stacks(reft, base, ids):
    """Logits of a generation are those of teacher forcing, and the prompt is edited once."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apart(model):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        told = first(model, **inputs, decoder_input_ids=out.sequences[:, :-1])
        return (torch.stack(out.logits, 1) - told).abs().max() / told.abs().max()

    unedited, edits = apart(base), []
    reft.interventions["0"][0].register_forward_pre_hook(lambda module, args: edits.append(len(args[0])))
    edited = apart(reft)
    assert [count for count in edits if count] == [
        2 * 2,
        2 * 2,
    ]  # of the generation, and of the pass after it
    if unedited < 1e-4:  # of the base itself, generation is teacher forcing
        assert edited < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "least"), [("causal", 170), ("classifier", 115), ("vision", 70), ("seq2seq", 30)]
)
def test_most_architectures_can_be_built_small(kind, least):
    auto, names = MAPPINGS[kind]
    failed = {}
    for name in names:
        try:
            architectures.build(auto, CONFIG_MAPPING[name])
        except Exception as error:
            failed[name] = str(error)
    assert len(names) - len(failed) >= least, failed


def check_generation(reft, base, ids):
    """Positions count columns of the whole text in every step, with and without a cache."""
    calls = []
    base.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(width(args, kwargs)), with_kwargs=True
    )
    edits = []
    reft.interventions["0"][0].register_forward_pre_hook(lambda module, args: edits.append(len(args[0])))
    text = reft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    # a step that reads one column reads a new one; one that reads all of them edits the first two again
    assert sum(edits) == sum(2 * 2 for columns in calls if columns > 1), (edits, calls)
    prompt = torch.arange(text.shape[1])[None] < COLUMNS
    whole = {"input_ids": text, "attention_mask": torch.ones_like(text)}

    def told(model, **more):
        return first(model, **whole, **more)[:, COLUMNS - 1 : -1].argmax(-1)

    unedited = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    alone = first(base, input_ids=unedited, attention_mask=torch.ones_like(text))[:, COLUMNS - 1 : -1]
    # of the base itself, generation is teacher forcing
    if reading_of(base).causal and torch.equal(alone.argmax(-1), unedited[:, COLUMNS:]):
        assert torch.equal(told(reft, prompt_mask=prompt.expand_as(text)), text[:, COLUMNS:])


def width(args, kwargs):
    return (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]


# --- models that know more of positions than a mask tells ---------------------------------------------------------


def test_positions_that_start_after_a_padding_row_stay_where_they_are():
    base = architectures.build(AutoModelForSequenceClassification, CONFIG_MAPPING["ibert"])
    reft, where = attached(base), masks()
    for padding in where:
        ids = (
            tokens()
            if where[padding] is None
            else tokens().where(where[padding].bool(), base.config.pad_token_id)
        )
        inputs = {"input_ids": ids, "attention_mask": where[padding]}
        with reft.disabled():
            assert torch.equal(first(reft, **inputs), first(base, **inputs)), padding


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_next"])
def test_a_forward_pass_over_rows_padded_on_the_left_is_the_first_of_the_base_s_generation(name):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name])
    inputs = {"input_ids": tokens(), "attention_mask": masks()["left"]}
    settings = {**GREEDY, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    stack, places = base.get_submodule(base.base_model_prefix), []
    stack.register_forward_pre_hook(
        lambda module, args, kwargs: places.append(kwargs["position_ids"]), with_kwargs=True
    )
    expected = base.generate(**inputs, **settings).logits[0]
    reft = attached(base)
    with reft.disabled():
        # products of one column and of all are rounded otherwise on some processors
        torch.testing.assert_close(first(reft, **inputs)[:, -1], expected)
    real = inputs["attention_mask"].bool()
    assert torch.equal(places[0][real], places[1][real])  # rotary logits hardly tell where a text begins


# --- columns ------------------------------------------------------------------------------------------------------

STATE_SPACE = ["mamba", "mamba2", "falcon_mamba", "jamba", "qwen3_next", "recurrent_gemma"]


def test_a_cache_that_says_it_is_empty_after_a_pass_keeps_its_columns_elsewhere():
    """As RecurrentGemma's, which keeps them in its layers: its own test below fails up to transformers 5.22."""
    prompt = torch.ones(2, 8, dtype=torch.bool)
    spans = Spans(prompt, ~prompt, generating=True)
    read = [spans.next_columns(count, None, cached=0) for count in (8, 1, 1)]
    assert read == [slice(0, 8), slice(8, 9), slice(9, 10)]


@pytest.mark.parametrize(
    "read", [[(0, 8), (8, 9), (9, 10)], [(0, 3), (3, 8), (8, 9)], [(0, 8), (0, 9), (0, 10)]]
)
def test_without_a_cache_columns_follow_those_read_before_unless_all_are_read_again(read):
    prompt = torch.ones(2, 8, dtype=torch.bool)
    spans = Spans(prompt, ~prompt, generating=True)
    assert [spans.next_columns(stop - start, None) for start, stop in read] == [slice(*ends) for ends in read]


@pytest.mark.parametrize("name", STATE_SPACE)
def test_a_state_instead_of_a_cache_is_read_on_from_its_column(name):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name])
    for positions, expected in (("f2", [4]), ("decode", [2, 2, 2]), ("l1+decode:1", [2, 2])):
        reft, edits = attached(copy.deepcopy(base), positions), []
        note = partial(lambda edits, module, args: edits.append(len(args[0])), edits)
        reft.interventions["0"][0].register_forward_pre_hook(note)
        reft.generate(input_ids=tokens(), attention_mask=masks()["no padding"], **GREEDY)
        assert [count for count in edits if count] == expected, positions


CACHES = [
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prefill_chunk_size": 3},
    {"num_beams": 2},
]


# BLOOM's mask covers a whole static cache
@pytest.mark.parametrize(
    ("name", "settings"), [*(("llama", settings) for settings in CACHES), ("bloom", CACHES[0])], ids=str
)
def test_columns_are_counted_whatever_the_cache(name, settings):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name])
    reft = attached(base, "f2+l1+decode:1")
    inputs = {"input_ids": tokens(), "attention_mask": masks()["left"], **GREEDY}
    text = reft.generate(**inputs, **settings)
    if "num_beams" not in settings:
        assert torch.equal(text, reft.generate(**inputs))
    edits = []
    reft.interventions["0"][0].register_forward_pre_hook(lambda module, args: edits.append(len(args[0])))
    reft.generate(**inputs, **settings)
    rows = 2 * settings.get("num_beams", 1)
    again = 3 if "use_cache" in settings else 1  # times that the first new token is read
    assert sum(edits) == 3 * rows * (4 if "use_cache" in settings else 1) + rows * again


# the frozen base drafts, and tokens that the edited model would not have written are taken out of the cache again
@pytest.mark.parametrize(
    ("model_type", "positions"),
    [("llama", "f2+l2"), ("llama", "all"), ("llama", "decode:3"), ("gpt2", "f2+decode:1"), ("gemma2", "f2+decode:1")],
)  # fmt: skip
def test_speculative_decoding_writes_what_plain_decoding_does(model_type, positions):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[model_type])
    draft = copy.deepcopy(base)
    reft = attached(base, positions)
    inputs = {"input_ids": tokens()[:1], "attention_mask": torch.ones_like(tokens()[:1]), **GREEDY}
    inputs |= {"max_new_tokens": 12}
    text = reft.generate(**inputs)
    with reft.disabled():
        assert not torch.equal(text, reft.generate(**inputs))
    assert torch.equal(reft.generate(**inputs, assistant_model=draft), text)
    assert torch.equal(reft.generate(**inputs, prompt_lookup_num_tokens=2), text)


def test_a_model_that_reads_more_than_its_text_is_refused():
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING["llama"])
    reft = attached(base)
    with pytest.raises(
        ValueError, match="the model reads 8 columns, but the masks cover 5: pass masks of all"
    ):
        reft(input_ids=tokens(), prompt_mask=torch.ones(2, 5, dtype=torch.bool))


# --- sites --------------------------------------------------------------------------------------------------------

SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
STREAMS = r"has the shape \(.*\) when the model reads 2 rows .*edited at 'model\.layers\.\{layer\}\.mlp'"
UNFIT = [
    ("gemma3n_text", {}, "block_output", STREAMS),
    ("gemma3n_text", {}, "block_input", STREAMS),
    ("deepseek_v4", {}, "block_output", STREAMS),
    ("xlnet", {}, "block_output", "has the shape"),  # (s, b, d)
    ("cpmant", {}, "block_output", "has the shape"),  # a prompt of its own
    ("gemma4_text", SHARED, "model.layers.{layer}.self_attn.k_proj", "has no module 'model.layers.2.self_attn.k_proj'"),
    ("gemma4_text", SHARED, "block_output", r"layers\.2 in .* has the shape .* It can be edited at layers=\[0, 1\]"),
    ("llama", {}, "model.layers.{layer}.mlp.act_fn", "has width 48, expected 32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "component", "message"), UNFIT)
def test_sites_that_are_not_one_hidden_state_a_token_are_refused_when_attached(name, own, component, message):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    if (
        own is SHARED
        and component == "block_output"
        and not hasattr(PreTrainedModel, "activation_checkpointing_enable")
    ):
        pytest.skip("the shared layers of an older transformers hand on hidden states of the usual shape")
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name], **own)
    with pytest.raises(ValueError, match=message):
        rl.attach(base, rank=2, component=component)


@pytest.mark.parametrize(
    ("name", "own"), [("gemma3n_text", {}), ("deepseek_v4", {}), ("gemma4_text", SHARED)]
)
def test_what_is_named_instead_can_be_edited(name, own):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name], **own)
    before = first(base, input_ids=tokens())
    for component in ("attention_output", "mlp_output"):
        reft = rl.attach(base, rank=2, component=component, layers=[0, 1])
        assert not same(first(reft, input_ids=tokens()), before), component
        assert same(first(reft.detach(), input_ids=tokens()), before)


def test_blocks_that_are_not_called_as_modules_are_refused():
    base = architectures.build(AutoModelForSequenceClassification, CONFIG_MAPPING["squeezebert"])
    with pytest.raises(ValueError, match=r"reads text without calling transformer\.encoder\.layers\.0"):
        rl.attach(base, rank=2)


def test_looking_at_sites_leaves_the_model_and_its_hooks_alone():
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING["llama"]).train()
    seen = []
    for module in base.modules():
        module.register_forward_hook(lambda *call: seen.append(call))
    reft = attached(base).train()
    assert seen == []
    assert all(module.training for module in base.modules())
    reft(input_ids=tokens(), attention_mask=masks()["left"])
    assert sum(call[0] is base for call in seen) == 1  # not the passes that tried how the model reads
