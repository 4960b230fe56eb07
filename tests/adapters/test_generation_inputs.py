"""generate() takes tokens in every form that transformers does, and moves their tensors with the padding."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from adapted_models import adapted
from torch import nn
from transformers import BatchEncoding, LlamaForCausalLM

from reft_lightning.adapters.arguments import left_padded_inputs
from reft_lightning.base_models.caches import CACHE

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
TEXTS = tiny.rows(5, 3, 4)
LEFT, RIGHT = tiny.padded(TEXTS, "left"), tiny.padded(TEXTS, "right")
METHODS = ["loreft", "peft/lora"]  # a ReftModel and a Baseline, of which the others inherit generate


class Typed(LlamaForCausalLM):
    """A decoder that reads types of tokens, as PaliGemma does."""

    def __init__(self, config):
        super().__init__(config)
        self.types = nn.Embedding(3, config.hidden_size)
        nn.init.normal_(self.types.weight, std=5)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            embeds = embeds + self.types(token_type_ids[:, -embeds.shape[1] :])
        return super().forward(attention_mask=attention_mask, inputs_embeds=embeds, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, token_type_ids=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if token_type_ids is not None and not kwargs.get(CACHE).get_seq_length():
            inputs["token_type_ids"] = token_type_ids
        return inputs


def typed():
    torch.manual_seed(2)
    model = Typed(tiny.DECODERS["llama"](initializer_range=0.4)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("method", METHODS)
def test_types_of_tokens_move_with_their_tokens(method):
    model = adapted("llama", method, base=typed())
    types = [torch.arange(len(text)) % 3 for text in TEXTS]
    left, right = (
        tiny.padded(TEXTS, side) | {"token_type_ids": tiny.padded(types, side)["input_ids"]}
        for side in ("left", "right")
    )
    expected = model.generate(**left, **GREEDY)[:, 5:]
    assert torch.equal(model.generate(**right, **GREEDY)[:, 5:], expected)
    apart = model.generate(**right | {"token_type_ids": left["token_type_ids"]}, **GREEDY)[:, 5:]
    assert not torch.equal(apart, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_generate_what_their_tokens_generate(method, side):
    model = adapted("llama", method)
    batch = tiny.padded(TEXTS, side)
    expected = model.generate(**LEFT, **GREEDY)[:, 5:]
    embeds = model.base_model.get_input_embeddings()(batch["input_ids"])
    got = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(got, expected), "only new tokens come back, as in transformers"
    both = model.generate(**batch, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(both[:, 5:], expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_end_of_text_of_none_is_none(method):
    model = adapted("llama", method).eval()
    every = list(range(tiny.VOCABULARY))
    model.base_model.generation_config.eos_token_id = every
    assert model.generate(**LEFT, **GREEDY).shape[1] == LEFT["input_ids"].shape[1] + 1
    assert model.generate(**LEFT, **GREEDY, eos_token_id=None).shape[1] == LEFT["input_ids"].shape[1] + 5


@pytest.mark.parametrize("method", METHODS)
def test_tokens_may_be_given_as_inputs(method):
    model = adapted("llama", method)
    expected = model.generate(**LEFT, **GREEDY)
    given = {"inputs": LEFT["input_ids"], "attention_mask": LEFT["attention_mask"]}
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    assert torch.equal(model.generate(inputs=RIGHT["input_ids"], **GREEDY)[:, 5:], expected[:, 5:])
    with pytest.raises(ValueError, match="given twice, as input_ids and as inputs"):
        model.generate(LEFT["input_ids"], inputs=LEFT["input_ids"])
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(**GREEDY)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_what_is_no_tensor_of_rows_is_refused(method, call):
    run = getattr(adapted("llama", method), call)
    for given, said in (
        (BatchEncoding(LEFT), r"got a BatchEncoding; write \*\* before it"),  # as pyreft takes it
        (LEFT, r"got a dict; write \*\* before it"),
        (LEFT["input_ids"].tolist(), "got a list$"),
        ("Hello", "got a str$"),
        (LEFT["input_ids"][0], r"got the shape \(5,\)$"),
    ):
        with pytest.raises(ValueError, match=rf"a tensor of rows and columns \(b, s\); {said}"):
            run(given)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_another_shape_is_refused(method):  # (5, 12) ids with a (2, 9) mask gave 2 rows
    model = adapted("llama", method)
    embeds = model.base_model.get_input_embeddings()(LEFT["input_ids"])
    for shape in ((2, 5), (3, 4), (3, 6), (5, 3), (3,), (3, 1, 5, 5)):
        for tokens in ({"input_ids": LEFT["input_ids"]}, {"inputs_embeds": embeds}):
            with pytest.raises(
                ValueError, match=r"attention_mask must have the shape of the tokens, \(3, 5\); got"
            ):
                model.generate(**tokens, attention_mask=torch.ones(shape).long(), **GREEDY)


def test_every_tensor_of_rows_and_columns_moves_and_nothing_else_does():
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 2, "position_ids": ids.expand(3, 2, 3),
        "inputs_embeds": ids[..., None] * torch.tensor([1, 10]), "prompt_mask": mask.bool(), "negative_prompt_ids": ids,
        "pixel_values": torch.arange(24).view(2, 3, 2, 2), "image_sizes": torch.tensor([[1, 2], [3, 4]]), "other": None,
    }  # fmt: skip
    moved = torch.tensor([[0, 5, 6], [7, 8, 9]])
    found = left_padded_inputs(given, tiny.model("llama"))
    expected = given | {
        "input_ids": moved, "attention_mask": (moved > 0).long(), "token_type_ids": moved * 2,
        "position_ids": moved.expand(3, 2, 3), "inputs_embeds": moved[..., None] * torch.tensor([1, 10]),
        "prompt_mask": moved > 0,
    }  # fmt: skip
    assert found.pop("other", "lost") is expected.pop("other") is None  # an argument of generate
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = left_padded_inputs(found, tiny.model("llama"))
    assert all(again[name] is found[name] for name in found), "nothing to move"


def two_turns(generate, batch, answered, name=CACHE):
    """Generate after a prompt, and from the cache of that after what is said next; rows may have ended before."""
    first = generate(**batch, **GREEDY, eos_token_id=answered, return_dict_in_generate=True)
    said = first.sequences[:, batch["input_ids"].shape[1] :]
    real = torch.cat([batch["attention_mask"], said.ne(tiny.PAD).long()], -1)
    ids = F.pad(first.sequences, (0, 3), value=9)
    mask = F.pad(real, (0, 3), value=1)
    again = {"input_ids": ids, "attention_mask": mask, name: first[CACHE]}
    return real, generate(**again, **GREEDY)[:, ids.shape[1] :]


@pytest.mark.parametrize("method", METHODS)
def test_columns_stay_where_a_cache_holds_them(method):
    model = adapted("llama", method)
    answered = int(model.generate(**LEFT, **GREEDY)[1, 6])
    real, texts = two_turns(model.generate, LEFT, answered)
    assert not real[:, -1].all()  # rows with a hole in their middle, then
    for i, text in enumerate(texts):
        alone = tiny.padded([TEXTS[i]])
        for name in {CACHE, "past_key_values"}:  # its name up to transformers 5.23, and today's
            assert torch.equal(two_turns(model.generate, alone, answered, name)[1][0], text)
    with model.disabled():
        found = two_turns(model.generate, LEFT, answered)
        expected = two_turns(model.base_model.generate, LEFT, answered)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("method", METHODS)
def test_padding_between_a_cache_and_new_tokens_is_refused(method):
    model = adapted("llama", method)
    cache = model.generate(**LEFT, **GREEDY, return_dict_in_generate=True)[CACHE]
    with pytest.raises(ValueError, match="pad the tokens after the cache on the left"):
        model.generate(**tiny.padded(tiny.rows(14, 12)), past_key_values=cache, **GREEDY)
