"""Generation: teacher forcing, a cache, no cache, beams and batches select the same tokens and give the same ids."""

import pytest
import tiny
import torch
from laws import shaken
from transformers import GenerationConfig

import reft_lightning as rl

POSITIONS = ["f2+l2", "l1", "prompt", "all", "decode", "decode:2", "f1+l1+decode:2"]
# all of them on one model; on each other model one of which the others are parts
CASES = [("llama", positions) for positions in POSITIONS]
CASES += [(family, "f1+l1+decode:2") for family in tiny.DECODERS if family != "llama"]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tiny.PAD}


def attached(family="llama", positions="f2+l2", dtype=torch.float64, **settings):
    torch.manual_seed(1)
    reft = rl.attach(tiny.model(family, dtype), "loreft", rank=2, positions=positions, **settings).eval()
    shaken(reft.interventions.to(dtype))
    return reft


def new_ids(reft, batch, **settings):
    return reft.generate(**batch, **(GREEDY | settings))[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(("family", "positions"), CASES)
def test_cached_and_uncached_generation_and_teacher_forcing_agree(family, positions):
    # adapters edits every decoded token with a cache and crashes with suffix positions; pyreft differs without a cache
    reft = attached(family, positions)
    batch = tiny.padded(tiny.rows(5, 3, 7), "left")
    cached = new_ids(reft, batch)
    assert torch.equal(new_ids(reft, batch, use_cache=False), cached)
    prompts = [
        row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    forced = tiny.prompt_target(prompts, list(cached))
    with torch.no_grad():
        logits = reft(**{k: v for k, v in forced.items() if k != "labels"}).logits
    assert torch.equal(logits[:, -NEW - 1 : -1].argmax(-1), cached)
    with reft.disabled():
        assert not torch.equal(new_ids(reft, batch), cached), "the edit must show in the ids"


@pytest.mark.parametrize("positions", ["f2+l2", "decode:2"])
def test_scores_of_generation_are_the_logits_of_teacher_forcing(positions):
    reft = attached(positions=positions)
    batch = tiny.padded(tiny.rows(5, 3), "left")
    out = reft.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    width = batch["input_ids"].shape[1]
    whole = {
        "input_ids": out.sequences,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1),
        "prompt_mask": torch.nn.functional.pad(batch["attention_mask"].bool(), (0, NEW)),
    }
    with torch.no_grad():
        logits = reft(**whole).logits
    generated = torch.stack(out.logits, 1)  # generate() hands them out in float32
    torch.testing.assert_close(generated, logits[:, width - 1 : -1].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])  # rotary, numbered by us, numbered by itself
def test_a_batch_gives_what_its_rows_give_padded_on_either_side(family):  # pyreft searches for BOS (D12)
    reft = attached(family)
    texts = tiny.rows(6, 1, 3)  # shorter than the positions asked for, too
    alone = torch.cat([new_ids(reft, tiny.padded([text])) for text in texts])
    assert torch.equal(new_ids(reft, tiny.padded(texts, "left", extra=2)), alone)
    assert torch.equal(new_ids(reft, tiny.padded(texts, "right")), alone)


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_beams_give_each_row_what_it_gets_alone(positions):  # pyreft needs locations repeated by hand (D44)
    reft = attached(positions=positions)
    texts = tiny.rows(5, 3, 4)
    alone = torch.cat([new_ids(reft, tiny.padded([text]), num_beams=3) for text in texts])
    batch = tiny.padded(texts, "left")
    assert torch.equal(new_ids(reft, batch, num_beams=3), alone)
    assert torch.equal(new_ids(reft, batch, num_beams=3, use_cache=False), alone)


@pytest.mark.parametrize(
    ("component", "tied"), [("block_input", "position"), ("attention_output", "group"), ("mlp_output", "position")]
)  # fmt: skip
def test_every_component_and_tying_generates_as_it_is_forced(component, tied):
    reft = attached(component=component, tied=tied)
    batch = tiny.padded(tiny.rows(5, 3), "left")
    assert torch.equal(new_ids(reft, batch, use_cache=False), new_ids(reft, batch))


def test_decoded_tokens_cost_nothing_when_the_prompt_alone_is_edited():
    reft = attached(positions="f2+l2")
    calls = []
    for group in reft.interventions.values():
        for phi in group:
            phi.register_forward_hook(lambda *_: calls.append(1))
    new_ids(reft, tiny.padded(tiny.rows(5)))
    assert len(calls) == tiny.LAYERS, "one edit a layer, in the pass over the prompt"


def test_without_an_attention_mask_padding_is_the_pad_token():
    reft = attached()
    batch = tiny.padded(tiny.rows(5, 3), "left")
    assert torch.equal(reft.generate(batch["input_ids"], **GREEDY), reft.generate(**batch, **GREEDY))


def test_a_pad_token_that_is_the_eos_token_too_pads_nothing_by_itself():  # genuine eos tokens stay (D14)
    reft = attached()
    ids = torch.tensor([[5, tiny.EOS, 7, 8]])
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": tiny.EOS, "eos_token_id": tiny.EOS}
    expected = reft.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(reft.generate(ids, **settings), expected)


def test_a_generation_config_is_passed_on():
    reft = attached()
    batch = tiny.padded(tiny.rows(5, 3), "left")
    settings = GenerationConfig(**GREEDY)
    assert torch.equal(reft.generate(**batch, generation_config=settings), reft.generate(**batch, **GREEDY))


def test_rows_that_end_early_do_not_disturb_the_others():
    reft = attached(positions="all")
    batch = tiny.padded(tiny.rows(5, 3), "left")
    free = new_ids(reft, batch)
    ended = new_ids(reft, batch, eos_token_id=int(free[0, 1]))
    assert (ended[0, 2:] == tiny.PAD).all()
    stop = (free[1] == free[0, 1]).nonzero().flatten()
    length = int(stop[0]) + 1 if len(stop) else NEW
    assert torch.equal(ended[1, :length], free[1, :length])


@pytest.mark.parametrize("positions", ["f2+l2", "all", "decode:2", "f1+l1+decode:2"])
def test_the_beginning_of_an_answer_is_edited_as_if_it_had_been_generated(positions):
    reft = attached(positions=positions)
    batch = tiny.padded(tiny.rows(5, 3), "left")
    whole = reft.generate(**batch, **GREEDY)
    begun = {
        "input_ids": whole[:, :-3],
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, NEW - 3), value=1),
        "prompt_mask": torch.nn.functional.pad(batch["attention_mask"].bool(), (0, NEW - 3)),
    }
    assert torch.equal(reft.generate(**begun, **(GREEDY | {"max_new_tokens": 3})), whole)
    moved = {name: value.clone() for name, value in begun.items()}
    for value in moved.values():
        value[1] = value[1].roll(-2)  # the padding of the shorter row to its right
    assert torch.equal(reft.generate(**moved, **(GREEDY | {"max_new_tokens": 3}))[:, -3:], whole[:, -3:])
