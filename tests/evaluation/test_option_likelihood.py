"""Ranking options: likelihoods, the prompt read once, drafts, and an evaluation that reads each prompt once."""

from types import SimpleNamespace

import architectures
import pytest
import short_runs
import tiny
import torch
from laws import shaken
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import target_only
from reft_lightning.data.example import Example
from reft_lightning.data.option_batches import option_batches
from reft_lightning.evaluation import (
    ColumnReader,
    Decoding,
    log_likelihood,
    option_log_likelihoods,
    with_draft,
)
from reft_lightning.evaluation.decoding import generate_ids

POSITIONS = ["f2+l2", "prompt+decode:3", "f7+l7", "l1", "all", "decode", "decode:2"]
PROMPTS = tiny.rows(6, 3, 9, 1)
ENDLESS = SimpleNamespace(eos_token_id=999, pad_token_id=tiny.PAD)  # a token that no model here generates
# Options of several lengths; the first three of a row begin alike. Row 1 has one option fewer; its last is repeated.
COMMON = tiny.rows(3, 3, 3, 3, seed=5)
ENDS = [
    tiny.rows(*lengths, seed=6 + k) for k, lengths in enumerate([(1, 2, 1, 4), (3, 1, 1, 1), (2, 2, 5, 1)])
]
OTHER = tiny.rows(4, 1, 2, 6, seed=9)
OPTIONS = [[torch.cat([c, e]) for c, e in zip(COMMON, ends, strict=True)] for ends in ENDS] + [OTHER]
OPTIONS[3][1] = OPTIONS[2][1]


def attached(family="llama", positions="f2+l2", dtype=torch.float64, **settings):
    torch.manual_seed(1)
    reft = rl.attach(tiny.model(family, dtype), "loreft", rank=2, positions=positions, **settings).eval()
    shaken(reft.interventions.to(torch.float32 if dtype == torch.bfloat16 else dtype))
    return reft


def baseline(method, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = adapt(tiny.model("llama", dtype), method, **options).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch_of(targets, prompts=PROMPTS):
    return {**tiny.prompt_target(prompts, targets), "boundary": max(map(len, prompts))}


def batches():
    return [target_only(batch_of(targets)) for targets in OPTIONS]


def one_by_one(model, options=None):
    """Return the likelihoods from one full read for each option."""
    return torch.cat([option_log_likelihoods(model, [batch]) for batch in options or batches()], 1)


def by_hand(model, prompt, target):
    """Return the likelihood of one target from all logits of one unpadded row."""
    ids = torch.cat([prompt, target])[None]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, : len(prompt)] = True
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=mask).logits
    log_p = logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) + j - 1, token] for j, token in enumerate(target))


def reads(model, work):
    """Return the number of rows and columns read by each call of the base model in ``work()``."""
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    work()
    handle.remove()
    return seen


def widths():
    return [batch["input_ids"].shape[1] - 1 for batch in batches()]  # the last column's logits are not needed


# --- the same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "positions"), tiny.each_with_some(tiny.DECODERS, ("llama", "gpt2", "mistral"), POSITIONS)
)
def test_a_shared_prompt_gives_the_likelihoods_of_whole_reads(family, positions):
    reft = attached(family, positions)
    shared = option_log_likelihoods(reft, batches())
    assert shared.dtype == torch.float64
    atol = 1e-6 if family == "gptj" else 1e-10  # GPT-J attends in float32 whatever its dtype
    torch.testing.assert_close(shared, one_by_one(reft), rtol=0, atol=atol)
    with reft.disabled():
        base = option_log_likelihoods(reft, batches())
        torch.testing.assert_close(base, one_by_one(reft), rtol=0, atol=atol)
    assert not torch.allclose(base, shared, atol=1e-3), "the edit must show"


@pytest.mark.parametrize(
    ("family", "positions"), tiny.each_with_some(("llama", "gpt2"), ("llama",), POSITIONS)
)
def test_likelihoods_are_those_of_all_logits_of_rows_alone(family, positions):
    reft = attached(family, positions)
    found = option_log_likelihoods(reft, batches())
    for i, prompt in enumerate(PROMPTS):
        for k, options in enumerate(OPTIONS):
            assert found[i, k].item() == pytest.approx(by_hand(reft, prompt, options[i]).item(), abs=1e-10)


@pytest.mark.parametrize("tied", ["group", "position"])
def test_tying_and_clips_see_the_options_as_the_targets_they_are(tied):
    reft = attached(positions="f2+l2+decode:3", tied=tied, clip="floor")
    torch.testing.assert_close(option_log_likelihoods(reft, batches()), one_by_one(reft), rtol=0, atol=1e-10)


def test_a_bfloat16_base_differs_by_its_rounding():
    reft = attached(positions="f2+l2+decode", dtype=torch.bfloat16)
    shared, alone = option_log_likelihoods(reft, batches()), one_by_one(reft)
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, alone, rtol=2e-2, atol=0.2)


METHODS = {
    "peft/lora": {},
    "peft/prompt_tuning": {"num_virtual_tokens": 3},
    "peft/prefix_tuning": {"num_virtual_tokens": 3},
    "frozen": {},
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_baselines_rank_as_by_whole_reads(method):
    model = baseline(method, **METHODS[method])
    whole = one_by_one(model)
    torch.testing.assert_close(option_log_likelihoods(model, batches()), whole, rtol=0, atol=1e-10)
    calls = reads(model, lambda: option_log_likelihoods(model, batches()))
    others = [(4, width) for width in widths()[1:]]
    # virtual tokens are in the cache, too, so every option is read in full
    if "tuning" in method:
        assert calls[1:] == others
    else:
        assert all(new < whole - 8 for (_, new), (_, whole) in zip(calls[1:], others, strict=True))


# --- what is read ---------------------------------------------------------------------------------------------


def test_the_prompts_and_what_all_options_begin_with_are_read_once():
    reft = attached()
    first, *others = widths()
    calls = reads(reft, lambda: option_log_likelihoods(reft, batches()))
    # the second and third option share three columns with the first, the fourth only the prompt
    assert calls == [(4, first), *[(4, width - 9 - 3) for width in others[:2]], (4, others[2] - 9)]
    assert reads(reft, lambda: one_by_one(reft)) == [(4, width) for width in widths()]


def test_a_sliding_window_is_read_whole_each_time():
    reft = attached("mistral")
    calls = reads(reft, lambda: option_log_likelihoods(reft, batches()))
    assert calls == [(4, width) for width in widths()]


def test_options_whose_prompts_differ_are_read_whole():
    reft = attached()
    cut = [prompt[-4:] for prompt in PROMPTS]  # as with an option that is too long for the limit
    for others in (cut, [*PROMPTS[:3], (PROMPTS[3] + 1) % tiny.VOCABULARY]):
        options = [batch_of(OPTIONS[0]), batch_of(OPTIONS[1], others)]
        calls = reads(reft, lambda options=options: option_log_likelihoods(reft, options))
        assert calls == [(4, batch["input_ids"].shape[1] - 1) for batch in options]
        found = option_log_likelihoods(reft, options)
        torch.testing.assert_close(found, one_by_one(reft, options), rtol=0, atol=1e-10)


def test_tokens_that_are_padding_in_one_option_and_real_in_the_other_are_read():
    """Comparing only ids would not be enough, because padding has the id of a token."""
    reft = attached("llama", "all")
    short = [torch.tensor([7, 8])] * 2
    long = [torch.tensor([7, 8, tiny.PAD, 9])] * 2
    options = [batch_of(texts, PROMPTS[:2]) for texts in (long, short, long)]
    found = option_log_likelihoods(reft, options)
    torch.testing.assert_close(found, one_by_one(reft, options), rtol=0, atol=1e-10)


def test_the_same_batch_is_not_read_twice():
    reft = attached()
    reader, batch = ColumnReader(reft), batch_of(OPTIONS[0])
    first = reader.logits(batch)
    assert reads(reft, lambda: reader.logits(batch)) == []
    assert torch.equal(reader.logits(batch), first)
    reader.forget()
    assert len(reads(reft, lambda: reader.logits(batch))) == 1


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_beginning_of_what_was_read_is_not_read_again(family):
    reft = attached(family)
    reader, batch = ColumnReader(reft), batch_of(OPTIONS[0])
    whole = reader.logits(batch)
    begin = {name: value[:, :11] if torch.is_tensor(value) else value for name, value in batch.items()}
    assert reads(reft, lambda: reader.logits(begin)) == []
    assert torch.equal(reader.logits(begin), whole[:, :3])
    cache = reader.take_cache()
    assert (cache is None) == (family == "mistral")
    assert cache is None or cache.get_seq_length() == 11
    assert reader.take_cache() is None


def test_rows_that_are_others_are_read_whole():
    reft = attached()
    reader = ColumnReader(reft)
    reader.logits(batch_of(OPTIONS[0]))
    fewer = batch_of(OPTIONS[1][:3], PROMPTS[:3])
    torch.testing.assert_close(reader.logits(fewer), ColumnReader(reft).logits(fewer), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["attention_mask", "prompt_mask"])
def test_rows_whose_masks_differ_are_read_again(name):
    reft = attached()
    reader, batch = ColumnReader(reft), batch_of(OPTIONS[0])
    reader.logits(batch)
    mask = batch[name].clone()
    mask[0, 8] = 0  # the last column of the prompts
    other = {**batch, name: mask}
    assert torch.equal(reader.logits(other), ColumnReader(reft).logits(other))


def test_a_read_that_fails_leaves_nothing_half_done():
    reft = attached()
    reader = ColumnReader(reft)
    reader.logits(batch_of(OPTIONS[0]))

    def fail(module, args, output):
        raise MemoryError("in the middle")

    handle = reft.base_model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        reader.logits(batch_of(OPTIONS[1]))
    handle.remove()
    expected = ColumnReader(reft).logits(batch_of(OPTIONS[2]))
    assert torch.equal(reader.logits(batch_of(OPTIONS[2])), expected)


def test_a_batch_that_ends_before_its_boundary_is_refused():
    batch = {**batch_of(OPTIONS[0]), "boundary": 40}
    with pytest.raises(ValueError, match="prompts end at column 40, but the batch has only 16 columns"):
        ColumnReader(attached()).logits(batch)


# --- the loss, and drafts -------------------------------------------------------------------------------------


def test_the_likelihood_of_the_targets_is_their_loss():
    reft, batch = attached(), batch_of(OPTIONS[0])
    tokens = (batch["labels"] != -100).sum()
    reader = ColumnReader(reft)
    option_log_likelihoods(reft, batches()[1:], reader)
    with torch.no_grad():
        expected = reft(**{k: v for k, v in batch.items() if k != "boundary"}).loss
    found = -log_likelihood(reader, batch).sum() / tokens
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # Hugging Face uses float32


def plain_ids(model, most=6, tokenizer=ENDLESS):
    return generate_ids(model, batch_of(OPTIONS[0]), tokenizer, Decoding(most, verify=False))


@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", "f2+l2"), ("llama", "decode:2"), ("gpt2", "all"), ("mistral", "all"), ("gemma3", "all")],
)
def test_texts_after_reading_options_are_those_of_plain_decoding(family, positions):
    reft = attached(family, positions)
    plain = plain_ids(reft)
    own = [batch_of([row[:n] for row, n in zip(plain, (6, 2, 4, 1), strict=True)]), *batches()]
    for gold in (batch_of(OPTIONS[2]), batch_of(list(plain))):
        for choice in ([0] * 4, [0, 3, 1, 0]):
            reader = ColumnReader(reft)
            option_log_likelihoods(reft, own, reader)
            drafted = with_draft(gold, own, choice)
            assert torch.equal(generate_ids(reft, drafted, ENDLESS, Decoding(6), reader), plain)
        reader = ColumnReader(reft)
        log_likelihood(reader, gold)
        assert torch.equal(generate_ids(reft, gold, ENDLESS, Decoding(6), reader), plain)
        log_likelihood(reader, gold)  # a reader that has handed over its cache reads everything again
        assert torch.equal(generate_ids(reft, gold, ENDLESS, Decoding(6, verify=False), reader), plain)


def test_the_likeliest_option_is_the_draft_row_by_row():
    gold, options, choice = batch_of(OPTIONS[1]), batches(), [2, 0, 3, 1]
    drafted = with_draft(gold, options, torch.tensor(choice))
    real = drafted["attention_mask"].bool() & ~drafted["prompt_mask"]
    for i, k in enumerate(choice):
        assert torch.equal(drafted["input_ids"][i][real[i]], OPTIONS[k][i])
    assert torch.equal(drafted["input_ids"][:, :9], gold["input_ids"][:, :9])
    assert drafted["boundary"] == gold["boundary"]
    assert "labels" not in drafted, "the labels are those of the gold target"
    assert "labels" in gold


def test_a_batch_with_another_prompt_keeps_its_own_target():
    gold = batch_of(OPTIONS[1], [prompt[-4:] for prompt in PROMPTS])
    assert with_draft(gold, batches(), [0, 0, 0, 0]) is gold


def test_an_option_that_the_model_generates_costs_nothing_beyond_the_ranking():
    reft = attached()
    plain = list(plain_ids(reft))
    generated = batch_of(plain)
    reader = ColumnReader(reft)
    option_log_likelihoods(reft, [*batches(), generated], reader)
    drafted = with_draft(batch_of(OPTIONS[1]), [*batches(), generated], [4] * 4)
    assert reads(reft, lambda: generate_ids(reft, drafted, ENDLESS, Decoding(6), reader)) == []


# --- rows of a benchmark --------------------------------------------------------------------------------------

EXAMPLES = [
    Example("x", "is it so?\n", "yes", "yes", ("yes", "no")),
    Example("x", "which of these?\n", "b", "b", ("a", "b", "the third")),
]


def test_option_likelihoods_are_those_of_full_logits_row_by_row():
    settings = tiny.SIZES | tiny.GROUPED | {"vocab_size": 259, "max_position_embeddings": 128}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings, initializer_range=0.4)).eval()
    model, tokenizer = rl.attach(base, "loreft", rank=4, positions="f2+l2").eval(), byte_tokenizer()
    scores = option_log_likelihoods(model, option_batches(tokenizer, EXAMPLES, max_length=64))
    assert scores.shape == (2, 3)
    for i, example in enumerate(EXAMPLES):
        for k, option in enumerate(example.options):
            prompt = tokenizer(example.prompt)["input_ids"]
            target = [*tokenizer(option, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            expected = by_hand(model, torch.tensor(prompt), torch.tensor(target)).item()
            assert scores[i, k].item() == pytest.approx(expected, abs=1e-4)


def test_a_truncated_prompt_depends_on_its_option_and_is_read_with_it():
    tokenizer = byte_tokenizer()
    options = option_batches(tokenizer, EXAMPLES, max_length=20)
    prompts = [batch["prompt_mask"].sum(-1).tolist() for batch in options]
    assert prompts[0] != prompts[2], "the third option must cut the prompt"
    settings = tiny.SIZES | tiny.GROUPED | {"vocab_size": 259}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings, initializer_range=0.4)).eval().double()
    model = rl.attach(base, "loreft", rank=4, positions="f2+l2").eval()
    torch.testing.assert_close(
        option_log_likelihoods(model, options), one_by_one(model, options), rtol=0, atol=1e-10
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"), tasks=("boolq", "piqa"))


def validated(data, *overrides):
    """Validate a short run's model: its module, the scores, and the columns each call reads."""
    objects = short_runs.build(data, "data.tasks=[boolq,piqa]", "decoding.max_new_tokens=40", *overrides)
    shaken(objects.model.interventions)
    trainer, scores = short_runs.trainer(), {}
    calls = reads(
        objects.model,
        lambda: scores.update(trainer.validate(objects.module, objects.data, verbose=False)[0]),
    )
    return objects, scores, calls


def test_an_evaluation_reads_its_prompts_once_and_generates_what_plain_decoding_does(data):
    objects, scores, calls = validated(data)
    plain, plain_scores, _ = validated(data, "decoding.verify=false")
    assert objects.module.predictions == plain.module.predictions
    assert scores == pytest.approx(plain_scores)
    boundaries = [batch["boundary"] for loader in objects.data.val_dataloader() for batch in loader]
    whole = [call for call in calls if call[1] >= min(boundaries)]
    assert len(whole) == len(boundaries), "loss, two options and the text: one read of the prompts for all"


def test_texts_that_are_drawn_do_not_depend_on_what_was_read_before(data):
    objects, _, _ = validated(data, "decoding.do_sample=true", "decoding.max_new_tokens=5")
    again, _, _ = validated(
        data, "decoding.do_sample=true", "decoding.max_new_tokens=5", "option_likelihood=false"
    )
    texts = [[row["generated"] for row in o.module.predictions] for o in (objects, again)]
    assert texts[0] == texts[1]


# --- models that read both ways, or by the length of the batch -------------------------------------------------------


def architecture(name, **own):
    return rl.attach(architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name], **own), rank=2).eval()


def test_a_model_that_reads_the_answer_has_no_likelihood_of_it():
    reft = architecture("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="tokens of Gemma3ForCausalLM attend to later tokens"):
        option_log_likelihoods(reft, batches())


def test_options_are_read_whole_where_a_longer_batch_has_other_angles():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10}
    reft = architecture("llama", rope_parameters=rope)
    read = reads(reft, lambda: option_log_likelihoods(reft, batches()))
    assert read == [(4, width) for width in widths()]
