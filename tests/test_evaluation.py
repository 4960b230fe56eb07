"""Answers and scores: the interval, the counts, greedy ids by hand, likelihoods from full logits."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reft_lightning import attach
from reft_lightning.base_models import byte_tokenizer
from reft_lightning.data.base import Example
from reft_lightning.data.options import option_batches
from reft_lightning.evaluation import (
    ExactMatch,
    MeanLoss,
    generate_greedily,
    option_log_likelihoods,
    wilson_interval,
)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipys(counts):
    correct, total = counts
    expected = binomtest(correct, total).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(correct, total)
    assert low == pytest.approx(expected.low, abs=1e-7)
    assert high == pytest.approx(expected.high, abs=1e-7)
    assert 0 <= low <= correct / total <= high <= 1


def test_the_interval_of_no_rows_is_no_number():
    assert all(math.isnan(end) for end in wilson_interval(0, 0))


def test_exact_match_sums_over_batches_and_counts_missing_answers_as_wrong():
    metric = ExactMatch()
    metric.update(["true", None, "false"], ["true", "true", "true"])
    metric.update(["a"], ["a"])
    assert metric.compute().tolist() == [2, 4, 1]
    metric.reset()
    metric.update([], [])
    assert metric.compute().tolist() == [0, 0, 0]


def test_exact_match_takes_batches_inside_and_outside_inference_mode():
    metric = ExactMatch()
    with torch.inference_mode():
        metric.update(["a"], ["a"])
    metric.update(["a"], ["b"])
    assert metric.compute().tolist() == [1, 2, 0]


def test_the_mean_loss_weighs_tokens_and_not_batches():
    metric = MeanLoss()
    metric.update(torch.tensor(1.0), 3)
    metric.update(torch.tensor(5.0), 1)
    assert metric.compute().item() == 2.0


def adapted(family="llama"):
    return attach(tiny.model(family), "loreft", rank=4, positions="f2+l2").eval()


def evaluation_batch():
    prompts, targets = tiny.rows(6, 3, 9), tiny.rows(2, 4, 1, seed=1)
    batch = tiny.prompt_target(prompts, targets)
    return {**batch, "boundary": 9}, prompts


def argmax_by_hand(model, prompt, count, eos=None):
    """Append the likeliest token again and again, the whole text read anew each time."""
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_ids_are_the_argmax_of_the_adapted_model_and_never_see_the_target(family):
    model = adapted(family)
    batch, prompts = evaluation_batch()
    new = generate_greedily(model, batch, max_new_tokens=5, eos=tiny.EOS, pad=tiny.PAD)
    for row, prompt in zip(new.tolist(), prompts, strict=True):
        expected = argmax_by_hand(model, prompt, 5, tiny.EOS)
        assert row[: len(expected)] == expected
        assert all(token == tiny.PAD for token in row[len(expected) :])


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
def test_what_a_model_ships_as_generation_defaults_plays_no_part(shipped):
    model, (batch, _) = adapted(), evaluation_batch()
    arguments = {"max_new_tokens": 5, "eos": tiny.EOS, "pad": tiny.PAD}
    expected = generate_greedily(model, batch, **arguments)
    for name, value in shipped.items():
        setattr(model.base_model.generation_config, name, value)
    assert torch.equal(generate_greedily(model, batch, **arguments), expected)
    for name, value in shipped.items():  # the model keeps them
        assert getattr(model.base_model.generation_config, name) == value


def test_generation_stops_at_the_end_of_text():
    model, (batch, prompts) = adapted(), evaluation_batch()
    eos = argmax_by_hand(model, prompts[0], 3)[2]
    new = generate_greedily(model, batch, max_new_tokens=6, eos=eos, pad=tiny.PAD)
    expected = argmax_by_hand(model, prompts[0], 6, eos)
    assert new[0].tolist()[: len(expected)] == expected
    assert all(token == tiny.PAD for token in new[0].tolist()[len(expected) :])


def byte_model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = tiny.SIZES | tiny.GROUPED | {"vocab_size": 259, "max_position_embeddings": 128}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings, initializer_range=0.4)).eval()
    return attach(base, "loreft", rank=4, positions="f2+l2").eval()


EXAMPLES = [
    Example("x", "is it so?\n", "yes", "yes", ("yes", "no")),
    Example("x", "which of these?\n", "b", "b", ("a", "b", "the third")),
]


def test_option_likelihoods_are_those_of_full_logits_row_by_row():
    model, tokenizer = byte_model(), byte_tokenizer()
    scores = option_log_likelihoods(model, option_batches(tokenizer, EXAMPLES, max_length=64))
    assert scores.shape == (2, 3)
    for i, example in enumerate(EXAMPLES):
        for k, option in enumerate(example.options):
            prompt = tokenizer(example.prompt)["input_ids"]
            target = [*tokenizer(option, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + target])
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, : len(prompt)] = True
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=mask).logits
            log_p = logits[0].log_softmax(-1)
            by_hand = sum(log_p[len(prompt) + j - 1, token].item() for j, token in enumerate(target))
            assert scores[i, k].item() == pytest.approx(by_hand, abs=1e-4)
