"""Decoding: checking a target gives the ids of plain greedy decoding; settings, stops, sampling and defaults."""

import functools
import gzip
import json
from types import SimpleNamespace

import architectures
import pytest
import tiny
import torch
from laws import shaken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer, load_base_model
from reft_lightning.config import compose
from reft_lightning.data.encoding import Collator, encode
from reft_lightning.data.example import Example
from reft_lightning.evaluation.decoding import Decoding, generate, generate_ids
from reft_lightning.storage.wheels import cache_folder

POSITIONS = ["f2+l2", "prompt+decode", "prompt", "all", "decode:2"]
NEW = 7
ENDLESS = SimpleNamespace(eos_token_id=999, pad_token_id=tiny.PAD)  # a token that no model here generates
PROMPTS = tiny.rows(6, 3, 9, 4, 5, 1, 7, 2)


def attached(family="llama", positions="f2+l2", dtype=torch.float64, **settings):
    torch.manual_seed(1)
    reft = rl.attach(tiny.model(family, dtype), "loreft", rank=2, positions=positions, **settings).eval()
    shaken(reft.interventions.to(dtype))
    return reft


def batch_of(prompts, targets):
    return {**tiny.prompt_target(prompts, targets), "boundary": max(map(len, prompts))}


def prompts_alone(prompts=PROMPTS):
    batch = tiny.padded(prompts, "left")
    return {**batch, "prompt_mask": batch["attention_mask"].bool(), "boundary": batch["input_ids"].shape[1]}


def plain_ids(model, tokenizer=ENDLESS, most=NEW, **settings):
    return generate_ids(model, prompts_alone(), tokenizer, Decoding(most, verify=False, **settings))


def wrong_at(ids, place):
    changed = ids.clone()
    changed[place] = 3 + (int(ids[place]) - 2) % 40  # another ordinary token
    return changed


def drafts(plain):
    """Targets that the model agrees with entirely, never, or up to some token, shorter and longer than its text."""
    strange = tiny.rows(4, 3, seed=9)
    return [
        plain[0],
        wrong_at(plain[1], 0),
        wrong_at(plain[2], 3),
        wrong_at(plain[3], NEW - 1),
        plain[4][:3],  # cut, without eos
        torch.cat([plain[5], strange[0], plain[5]]),  # longer than max_new_tokens
        plain[6][:1],
        strange[1],
    ]


def test_the_drafts_agree_as_far_as_they_are_meant_to():
    plain = plain_ids(attached())
    agreed = [
        int((d[:NEW] == p[: len(d)]).long().cumprod(0).sum())
        for d, p in zip(drafts(plain), plain, strict=True)
    ]
    assert agreed[:7] == [7, 0, 3, 6, 3, 7, 1]


def checked_ids(model, targets, tokenizer=ENDLESS, most=NEW, **settings):
    return generate_ids(model, batch_of(PROMPTS, targets), tokenizer, Decoding(most, **settings))


def argmax_by_hand(model, prompt, count, eos):
    """Append the likeliest token repeatedly, reading the whole text again each time."""
    ids = prompt.tolist()
    for _ in range(count):
        inputs = torch.tensor([ids])
        mask = torch.zeros_like(inputs, dtype=torch.bool)
        mask[:, : len(prompt)] = True
        with torch.no_grad():
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), prompt_mask=mask).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_ids_are_the_argmax_of_the_adapted_model_and_never_see_the_target(family, verify):
    model = attached(family)
    end = argmax_by_hand(model, PROMPTS[0], 3, None)[2]
    tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=tiny.PAD)
    new = checked_ids(model, tiny.rows(2, 4, 1, 3, 2, 9, 1, 5, seed=1), tokenizer, verify=verify)
    for row, prompt in zip(new.tolist(), PROMPTS, strict=True):
        expected = argmax_by_hand(model, prompt, NEW, end)
        assert row == expected + [tiny.PAD] * (NEW - len(expected))


@pytest.mark.parametrize(
    ("family", "positions"), tiny.each_with_some(tiny.DECODERS, ("llama", "gpt2", "mistral"), POSITIONS)
)
def test_checking_a_target_gives_the_ids_of_plain_decoding(family, positions):
    reft = attached(family, positions)
    plain = plain_ids(reft)
    assert torch.equal(checked_ids(reft, drafts(plain)), plain)
    with reft.disabled():
        base = plain_ids(reft)
        for own in (base, plain):  # a draft of the adapted model is of no use to the base
            assert torch.equal(checked_ids(reft, drafts(own)), base)
    assert not torch.equal(base, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_texts_end_at_the_end_of_text_wherever_the_draft_has_it(family):
    reft = attached(family, "all")
    free = plain_ids(reft)
    for place in (0, 1, 3, NEW - 1):
        special = SimpleNamespace(eos_token_id=int(free[2, place]), pad_token_id=tiny.PAD)
        plain = plain_ids(reft, special)
        assert (plain != free).any() or place == NEW - 1
        for targets in (drafts(free), drafts(plain)):  # an eos within the draft, or after it
            assert torch.equal(checked_ids(reft, targets, special), plain)


@pytest.mark.parametrize("most", [1, 2, 3, 6, 12])
def test_no_row_gets_more_tokens_than_allowed(most):
    reft = attached(positions="f1+l1+decode:2")
    targets = drafts(plain_ids(reft))
    plain = plain_ids(reft, most=most)
    assert plain.shape == (len(PROMPTS), most)
    assert torch.equal(checked_ids(reft, targets, most=most), plain)


@pytest.mark.parametrize("tied", ["group", "position"])
def test_tying_and_clips_continue_as_they_began(tied):
    reft = attached(positions="f2+l2+decode:3", tied=tied, clip="floor")
    plain = plain_ids(reft)
    assert torch.equal(checked_ids(reft, drafts(plain)), plain)


def reads(model, batch, **settings):
    """The number of rows and columns read by each call of the base model."""
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate_ids(model, batch, ENDLESS, Decoding(NEW, **settings))
    handle.remove()
    return seen


def test_a_target_that_the_model_agrees_with_costs_one_pass():
    reft = attached()
    plain = plain_ids(reft)
    assert reads(reft, batch_of(PROMPTS, list(plain))) == [(8, 9 + NEW - 1)]
    assert reads(reft, batch_of(PROMPTS, list(plain)), verify=False) == [(8, 9)] + [(8, 1)] * (NEW - 1)


def test_other_rows_go_on_from_the_keys_and_values_of_that_pass():
    reft = attached()
    plain = plain_ids(reft)
    targets = list(plain)
    targets[1], targets[5] = wrong_at(plain[1], 4), wrong_at(plain[5], 2)
    calls = reads(reft, batch_of(PROMPTS, targets))
    assert calls == [(8, 9 + NEW - 1)] + [(2, 1)] * (NEW - 3), "one row knows only 3 of its 7 tokens"


def test_a_sliding_window_is_read_again():
    reft = attached("mistral")
    plain = plain_ids(reft)
    targets = list(plain)
    targets[1] = wrong_at(plain[1], 4)  # prompt of 3 tokens, 4 accepted, 1 of its own
    assert reads(reft, batch_of(PROMPTS, targets)) == [(8, 9 + NEW - 1), (1, 8), (1, 1)]


def test_a_batch_without_targets_is_decoded_plainly():
    reft = attached()
    assert torch.equal(generate_ids(reft, prompts_alone(), ENDLESS, Decoding(NEW)), plain_ids(reft))


# --- stop strings ---------------------------------------------------------------------------------------------


@functools.cache
def byte_model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = tiny.SIZES | tiny.GROUPED | {"vocab_size": 259, "max_position_embeddings": 128}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings, initializer_range=0.4)).eval().double()
    reft = rl.attach(base, "loreft", rank=4, positions="f2+l2").eval()
    shaken(reft.interventions.to(torch.float64))
    return reft


def bytes_batch(targets):
    prompts = ["is it so?\n", "which?\n", "what is it, then?\n"]
    examples = [Example("x", p, t, t) for p, t in zip(prompts, targets, strict=True)]
    tokenizer = byte_tokenizer()
    return Collator(tokenizer.pad_token_id)([encode(tokenizer, example, 64) for example in examples])


def with_draft(draft):
    """The rows of ``bytes_batch`` with other target tokens, none of them padding."""
    batch = bytes_batch(["x"] * len(draft))
    prompt = {
        name: batch[name][:, : batch["boundary"]] for name in ("input_ids", "attention_mask", "prompt_mask")
    }
    target = {"input_ids": draft, "attention_mask": torch.ones_like(draft)}
    target["prompt_mask"] = torch.zeros_like(draft, dtype=torch.bool)
    return {name: torch.cat([prompt[name], target[name]], 1) for name in prompt} | {
        "boundary": batch["boundary"]
    }


def test_stop_strings_end_a_text_in_the_same_place():
    model, tokenizer = byte_model(), byte_tokenizer()
    batch = bytes_batch(["yes", "no", "so it is"])
    free = generate_ids(model, batch, tokenizer, Decoding(9, verify=False))
    row, place = next((i, j) for i in range(3) for j in range(2, 8) if 32 < int(free[i, j]) - 3 < 127)
    letter = chr(int(free[row, place]) - 3)
    for stops in ((letter,), ("never generated", letter)):
        plain = generate_ids(model, batch, tokenizer, Decoding(9, verify=False, stop_strings=stops))
        assert (plain[row, place + 1 :] == tokenizer.pad_token_id).all()
        assert not torch.equal(plain, free)
        for drafted in (batch, with_draft(free), with_draft(plain)):
            assert torch.equal(
                generate_ids(model, drafted, tokenizer, Decoding(9, stop_strings=stops)), plain
            )


def test_stop_strings_end_beams():
    model, tokenizer = byte_model(), byte_tokenizer()
    batch = bytes_batch(["yes", "no", "so it is"])
    free = generate_ids(model, batch, tokenizer, Decoding(9, verify=False, num_beams=3, samples=2))
    letter = next(chr(int(i) - 3) for i in free[:, 2:8].flatten() if 32 < int(i) - 3 < 127)
    stopped = Decoding(9, verify=False, num_beams=3, samples=2, stop_strings=(letter,))
    texts = tokenizer.batch_decode(generate_ids(model, batch, tokenizer, stopped), skip_special_tokens=True)
    assert len(texts) == 6
    assert all(text.find(letter) in (-1, len(text) - 1) for text in texts)


def test_a_stop_string_is_searched_only_after_the_prompt():
    """A completion that begins with "def" goes on after a prompt that ends in a newline; Hugging Face would stop."""
    model, tokenizer = byte_model(), byte_tokenizer()
    batch = bytes_batch(["yes", "no", "so it is"])
    free = generate_ids(model, batch, tokenizer, Decoding(6, verify=False))
    last = int(batch["input_ids"][0, batch["boundary"] - 1])
    across = tokenizer.decode([last, int(free[0, 0])])
    stops = Decoding(6, verify=False, stop_strings=(across,))
    found = generate_ids(model, batch, tokenizer, stops)
    text = tokenizer.decode(free[0], skip_special_tokens=True)
    assert across not in text, "the check below needs a stop string that only the prompt's end completes"
    assert torch.equal(found[0], free[0])
    assert torch.equal(
        generate_ids(model, with_draft(free), tokenizer, Decoding(6, stop_strings=(across,)))[0], free[0]
    )


# --- texts and settings ---------------------------------------------------------------------------------------


def test_texts_come_row_by_row_without_special_tokens():
    model, tokenizer = byte_model(), byte_tokenizer()
    batch = bytes_batch(["yes", "no", "maybe"])
    texts = generate(model, batch, tokenizer, Decoding(5))
    ids = generate_ids(model, batch, tokenizer, Decoding(5))
    assert texts == [[tokenizer.decode(row, skip_special_tokens=True)] for row in ids]
    several = generate(model, batch, tokenizer, Decoding(5, num_beams=3, samples=2))
    assert [len(row) for row in several] == [2, 2, 2]
    assert [row[0] for row in several] == [
        row[0] for row in generate(model, batch, tokenizer, Decoding(5, num_beams=3))
    ]


def test_draws_repeat_with_the_seed_and_leave_the_stream_of_training_alone():
    model, tokenizer, batch = byte_model(), byte_tokenizer(), bytes_batch(["yes", "no", "maybe"])
    drawing = Decoding(5, do_sample=True, samples=3, seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate_ids(model, batch, tokenizer, drawing)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(generate_ids(model, batch, tokenizer, drawing), first)
    assert first.shape == (9, 5)
    assert len({tuple(row) for row in first.tolist()}) > 6
    other = generate_ids(model, batch, tokenizer, Decoding(5, do_sample=True, samples=3, seed=2))
    assert not torch.equal(other, first)


def test_a_top_k_of_0_draws_from_every_token():  # transformers' own default is 50
    model, tokenizer, batch = byte_model(), byte_tokenizer(), bytes_batch(["yes", "no", "maybe"])
    for top_k, fits in ((0, lambda n: n > 50), (4, lambda n: n <= 3 * 4)):
        drawing = Decoding(1, do_sample=True, temperature=20.0, samples=60, top_k=top_k)
        assert fits(len(generate_ids(model, batch, tokenizer, drawing).unique()))


@pytest.mark.parametrize(
    "rule", [{"no_repeat_ngram_size": 1}, {"repetition_penalty": 5.0}, {"num_beams": 3}], ids=str
)
def test_what_a_draft_cannot_check_is_decoded_plainly(rule):
    reft = attached(positions="all")
    plain = plain_ids(reft, **rule)
    assert not torch.equal(plain, plain_ids(reft))
    assert torch.equal(checked_ids(reft, list(plain), **rule), plain)
    assert not Decoding(NEW, **rule).verifiable


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "shipped",
    [
        {"do_sample": True, "temperature": 5.0},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(20, 40))},
        {"num_beams": 3},
        {"min_new_tokens": 4},
        {"max_length": 2},
        {"eos_token_id": list(range(5, 40))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_model_ships_as_generation_defaults_plays_no_part(shipped, verify):
    model = attached()
    batch = batch_of(PROMPTS, drafts(plain_ids(model)))
    expected = generate_ids(model, batch, ENDLESS, Decoding(NEW, verify=verify))
    for name, value in shipped.items():
        setattr(model.base_model.generation_config, name, value)
    assert torch.equal(generate_ids(model, batch, ENDLESS, Decoding(NEW, verify=verify)), expected)
    for name, value in shipped.items():  # the model keeps them
        assert getattr(model.base_model.generation_config, name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0 .do_sample=false decodes greedily"),
        ({"top_p": 1.5}, "top_p must be positive and at most 1; got 1.5"),
        ({"top_k": -1}, "top_k must be at least 0; got -1"),
        ({"samples": 3}, r"samples=3: Greedy methods \(do_sample != True\) without beam search"),
        ({"samples": 3, "num_beams": 2}, r"samples \(3\) has to be smaller or equal to num_beams \(2\)"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**{"max_new_tokens": 4, **settings})


def test_a_temperature_without_sampling_is_warned_about(caplog):
    Decoding(4, temperature=0.3, top_k=40)
    assert "decoding.temperature, top_k: no effect without decoding.do_sample=true" in caplog.text
    caplog.clear()
    Decoding(4, temperature=0.3, top_k=40, do_sample=True)
    assert not caplog.text


# --- real rows ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.wheel
def test_real_rows_get_the_ids_of_plain_decoding(shared):
    if not (cache_folder() / "models").is_dir():
        pytest.skip("SmolLM2 is not in the cache: run `make quickstart` once")
    model = compose.compose(["model=smollm2_135m"]).model
    place = {name: getattr(model, name) for name in ("source", "name", "path", "package", "sha256")}
    base, tokenizer = load_base_model(**place, dtype="float32")
    reft = rl.attach(base, "loreft", rank=8, positions="f7+l7").eval()
    shaken(reft.interventions)
    path = next((shared / "data" / "commonsense" / "boolq").glob("test.json*"))
    rows = json.loads(gzip.decompress(path.read_bytes()))[:12]
    examples = [Example("boolq", r["instruction"] + "\n", r["output"], r["answer"]) for r in rows]
    encoded = [encode(tokenizer, example, 256) for example in examples]
    collate, most = Collator(tokenizer.pad_token_id), 6
    plain = generate_ids(reft, collate(encoded), tokenizer, Decoding(most, verify=False))
    assert torch.equal(generate_ids(reft, collate(encoded), tokenizer, Decoding(most)), plain)
    for i, row in enumerate(encoded):  # i % 6 tokens of the model's own, then the gold target
        row.target_ids[:] = plain[i, : i % most].tolist() + row.target_ids
    assert torch.equal(generate_ids(reft, collate(encoded), tokenizer, Decoding(most)), plain)
    with reft.disabled():
        plain = generate_ids(reft, collate(encoded), tokenizer, Decoding(most, verify=False))
        assert torch.equal(generate_ids(reft, collate(encoded), tokenizer, Decoding(most)), plain)


def test_a_blank_at_the_start_of_the_answer_survives_a_sentencepiece_tokenizer():
    """Llama's decoder drops the first blank of a text, so an indented line of code would lose its indentation."""
    backend = Tokenizer(models.BPE(vocab={"<pad>": 0, "</s>": 1, "▁": 2, "x": 3, ":": 4}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    new = torch.tensor([[2, 2, 3, 1]])
    assert tokenizer.decode(new[0], skip_special_tokens=True) == " x"

    class Answers(torch.nn.Module):
        def generate(self, input_ids, **_):
            return torch.cat([input_ids, new], 1)

    ids = torch.tensor([[3, 4]])
    ones = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": ones, "prompt_mask": ones.bool(), "boundary": 2}
    assert generate(Answers(), batch, tokenizer, Decoding(4)) == [["  x"]]


# --- models whose columns depend on what follows --------------------------------------------------------------------

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10}


def architecture(name, positions="f2+l2", **own):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name], **own)
    torch.manual_seed(1)
    reft = rl.attach(base, "loreft", rank=2, positions=positions).eval()
    shaken(reft.interventions)
    return reft


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("llama", {"rope_parameters": DYNAMIC}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("mamba", {}),
        ("qwen3_next", {}),
    ],
)
def test_texts_with_a_draft_are_those_of_plain_decoding(name, own):
    reft = architecture(name, **own)
    plain = plain_ids(reft)
    for draft in (plain, torch.stack([wrong_at(row, 3) for row in plain])):
        batch = batch_of(PROMPTS, list(draft))
        assert torch.equal(generate_ids(architecture(name, **own), batch, ENDLESS, Decoding(NEW)), plain)
