"""Interventions in models with an encoder and a decoder: which stack, which tokens, training, generation, files."""

import copy

import pytest
import torch
from laws import shaken
from model_laws import Recorder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    PegasusConfig,
    T5Config,
    T5GemmaModuleConfig,
)

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt, build_on_meta
from reft_lightning.adapters.reft.sites import find_sites
from reft_lightning.base_models.decoders import is_decoder
from reft_lightning.integrations.transformers import as_pretrained

SIZES = {"vocab_size": 48, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1}
BOTH = {
    "t5": T5Config(
        **SIZES, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "bart": BartConfig(
        **SIZES, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, max_position_embeddings=32, init_std=0.4,
        bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    ),
}  # fmt: skip
OF_BART = BOTH["bart"].to_diff_dict() | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
OF_T5 = BOTH["t5"].to_diff_dict()
GEMMA = T5GemmaModuleConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
MORE = {  # by their names in transformers, with the sizes of the two above
    **dict.fromkeys(("mbart", "m2m_100", "marian", "pegasus", "blenderbot", "blenderbot-small", "plbart"), OF_BART),
    "nllb-moe": OF_BART | {"num_experts": 2, "expert_capacity": 64},
    **dict.fromkeys(("mt5", "umt5"), OF_T5),
    "t5gemma": {
        "encoder": GEMMA, "decoder": GEMMA, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "decoder_start_token_id": 2, "dropout_rate": 0.0, "attention_dropout": 0.0,
    },
}  # fmt: skip
STACKS = {"encoder": "f2+l1", "decoder": "f1+decode:2"}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
PROMPTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
LABELS = torch.tensor([[20, 21, 22, 23], [24, 25, -100, -100]])


def config_of(kind):
    if kind in BOTH:
        return copy.deepcopy(BOTH[kind])
    theirs = ("model_type", "transformers_version")
    return AutoConfig.for_model(
        kind, **{name: size for name, size in MORE[kind].items() if name not in theirs}
    )


# of more models, by `make test-slow`
everywhere = pytest.mark.parametrize(
    "base", [*BOTH, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)], indirect=True
)


@pytest.fixture(params=list(BOTH))
def base(request):
    torch.manual_seed(1)
    model = AutoModelForSeq2SeqLM.from_config(config_of(request.param)).eval().double()
    return model.requires_grad_(False)  # attention of T5's trained biases rounds otherwise


def attached(base, stack="encoder", component="block_output", **settings):
    settings = {"rank": 2, "positions": STACKS[stack], **settings}
    reft = rl.attach(base, component=f"{stack}.{component}", **settings).double()
    shaken(reft.interventions)
    return reft.eval()


def logits(model, **more):
    with torch.no_grad():
        return model(**PROMPTS, **more).logits


@everywhere
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "component", ["block_output", "block_input", "attention_output", "mlp_output", "head_output:1"]
)
def test_edits_train_in_either_stack_and_leave_no_trace_in_the_base(base, stack, component):
    expected = base(**PROMPTS, labels=LABELS)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reft = attached(base, stack, component)
    first = reft(**PROMPTS, labels=LABELS)
    assert (first.logits - expected.logits).abs().max() > 1e-3
    optimizer = torch.optim.Adam(reft.interventions.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        reft(**PROMPTS, labels=LABELS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in reft.interventions.parameters())
    assert reft(**PROMPTS, labels=LABELS).loss < first.loss
    with reft.disabled():
        assert torch.equal(reft(**PROMPTS, labels=LABELS).logits, expected.logits)
    now = reft.detach().state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def changed(base, stack, positions, **inputs):
    """Return which columns of each row differ at a block of a stack."""
    plain = copy.deepcopy(base)
    untouched = Recorder(plain.get_submodule(where(base, stack)))
    plain(**inputs)
    reft = attached(base, stack, positions=positions, layers=[0])
    edited = Recorder(base.get_submodule(where(base, stack)))
    reft(**inputs)
    return (edited.last != untouched.last).any(-1).int().tolist()


def where(base, stack):
    return find_sites(base, {0: f"{stack}.block_output"})[0].path


@everywhere
def test_positions_of_the_encoder_count_the_prompt_and_not_its_padding(base):
    found = changed(base, "encoder", "f2+l1", **PROMPTS, labels=LABELS)
    assert found == [[1, 1, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("f1", [[1, 0, 0, 0], [1, 0, 0, 0]]),
        ("prompt+decode:2", [[1, 1, 1, 0], [1, 1, 0, 0]]),
        ("decode", [[0, 1, 1, 1], [0, 1, 0, 0]]),
        ("all", [[1, 1, 1, 1], [1, 1, 0, 0]]),
    ],
)
def test_positions_of_the_decoder_count_from_the_token_that_answers_start_with(base, positions, expected):
    assert changed(base, "decoder", positions, **PROMPTS, labels=LABELS) == expected


def test_what_a_decoder_reads_before_its_first_label_is_its_prompt(base):
    labels = torch.tensor([[-100, -100, 22, 23], [-100, 25, 26, 27]])
    given = torch.tensor([[2, 20, 21, 22], [2, 24, 25, 26]])
    inputs = {**PROMPTS, "labels": labels, "decoder_input_ids": given}
    assert changed(base, "decoder", "prompt", **inputs) == [[1, 1, 1, 0], [1, 1, 0, 0]]


@everywhere
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("positions", [None, "all"])
def test_generation_is_teacher_forcing_with_and_without_a_cache(base, stack, positions):
    reft = attached(base, stack, positions=positions or STACKS[stack])
    text = reft.generate(**PROMPTS, **GREEDY)
    assert torch.equal(logits(reft, decoder_input_ids=text[:, :-1]).argmax(-1), text[:, 1:])
    assert torch.equal(reft.generate(**PROMPTS, **GREEDY, use_cache=False), text)
    alone = {name: tensor[1:, :4] for name, tensor in PROMPTS.items()}
    assert torch.equal(reft.generate(**alone, **GREEDY), text[1:])  # padding on the right stays there
    assert not torch.equal(logits(base, decoder_input_ids=text), logits(reft, decoder_input_ids=text))
    with reft.disabled():
        assert torch.equal(reft.generate(**PROMPTS, **GREEDY), base.generate(**PROMPTS, **GREEDY))


@everywhere
@pytest.mark.parametrize("stack", STACKS)
def test_the_score_of_a_beam_is_its_probability_under_teacher_forcing(base, stack):
    reft = attached(base, stack, positions="all")
    out = reft.generate(
        **PROMPTS, **GREEDY, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    told = logits(reft, decoder_input_ids=out.sequences[:, :-1]).log_softmax(-1)
    scores = told.gather(-1, out.sequences[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), scores, atol=1e-5, rtol=1e-5)


def test_a_longer_prompt_of_the_decoder_is_one_in_generation_too(base):
    reft = attached(base, "decoder", positions="prompt")
    given = torch.tensor([[20, 21], [24, 25]])
    given = torch.nn.functional.pad(given, (1, 0), value=base.config.decoder_start_token_id)
    text = reft.generate(**PROMPTS, **GREEDY, decoder_input_ids=given)
    labels = text[:, 1:].masked_fill(torch.arange(text.shape[1] - 1) < 2, -100)
    told = logits(reft, decoder_input_ids=text[:, :-1], labels=labels).argmax(-1)
    assert torch.equal(told[:, 2:], text[:, 3:])
    only_first = logits(reft, decoder_input_ids=text[:, :-1])
    assert not torch.equal(only_first, logits(reft, decoder_input_ids=text[:, :-1], labels=labels))


def test_a_cache_is_read_on_from_the_column_where_it_ends(base):
    reft = attached(base, "decoder", positions="decode:2")
    ids = torch.tensor([[2, 20, 21, 22], [2, 24, 25, 26]])
    whole = logits(reft, decoder_input_ids=ids)
    with torch.no_grad():
        first = reft(**PROMPTS, decoder_input_ids=ids[:, :2], use_cache=True)
        rest = reft(**PROMPTS, decoder_input_ids=ids[:, 2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-6, rtol=1e-6)


@everywhere
def test_each_row_has_its_own_adapter_and_both_stacks_can_be_edited(base):
    reft = attached(base, "encoder")
    reft.add_adapter("answer", "direft", rank=2, component="decoder.block_output", positions="f1+decode")
    reft.double()
    shaken(reft.adapters["answer"].interventions)
    reft.eval()
    mixed = logits(reft, labels=LABELS, adapter_names=["default", "answer"])
    one = logits(reft, labels=LABELS)
    reft.set_adapter("answer")
    other = logits(reft, labels=LABELS)
    torch.testing.assert_close(mixed[0], one[0])
    torch.testing.assert_close(mixed[1], other[1])
    reft.set_adapter(["default", "answer"])
    assert not torch.equal(logits(reft, labels=LABELS), other)
    text = reft.generate(**PROMPTS, **GREEDY)
    assert torch.equal(logits(reft, decoder_input_ids=text[:, :-1]).argmax(-1), text[:, 1:])


@everywhere
@pytest.mark.parametrize("stack", STACKS)
def test_what_is_saved_says_its_stack_and_loads_onto_the_same_model(base, stack, tmp_path):
    reft = attached(base.float(), stack).float()
    reft.save_pretrained(tmp_path)
    other = AutoModelForSeq2SeqLM.from_config(base.config)
    other.load_state_dict(base.state_dict())
    again = rl.ReftModel.from_pretrained(other.eval(), tmp_path).eval()
    assert again.config.component == f"{stack}.block_output"
    assert torch.equal(logits(again, labels=LABELS), logits(reft, labels=LABELS))
    with pytest.raises(ValueError, match=r"has an encoder and a decoder.*number the layers of only one"):
        rl.to_pyreft(reft, tmp_path / "theirs")


def test_without_a_stack_a_component_is_the_encoder_s_and_layers_are_counted_in_their_stack(base):
    encoder = rl.attach(copy.deepcopy(base), rank=1)
    assert {site.stack for site in encoder.sites.values()} == {"encoder"}
    number = {"t5": (3, 2), "bart": (2, 3)}[base.config.model_type]
    assert (len(encoder.sites), len(attached(copy.deepcopy(base), "decoder").sites)) == number
    with pytest.raises(
        ValueError,
        match=rf"layer must lie in 0\.\.{number[0] - 1}, as the model has {number[0]} layers; got 3",
    ):
        rl.attach(base, rank=1, layers=[3])
    with pytest.raises(
        ValueError, match=r"unknown component 'block_outptu'; .*decoder\.block_output.*did you mean"
    ):
        rl.attach(base, rank=1, component="decoder.block_outptu")
    path = f"{where(base, 'decoder').rpartition('.')[0]}.{{layer}}"
    assert {site.stack for site in rl.attach(base, rank=1, component=path).sites.values()} == {"decoder"}


def test_what_is_not_there_is_refused_with_a_reason(base):
    with pytest.raises(
        ValueError, match=r"reads only prompts, in which positions=decode:2 selects no token: use comp"
    ):
        rl.attach(base, rank=1, positions="decode:2")
    reft = attached(base)
    with pytest.raises(ValueError, match=r"has an encoder and a decoder.*leave out compile"):
        reft.compile()
    for method in ("peft/prompt_tuning", "peft/prefix_tuning"):
        with pytest.raises(ValueError, match=r"virtual tokens before one text.*reads two"):
            adapt(copy.deepcopy(reft.detach()), method, num_virtual_tokens=2)
        reft = attached(base)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", list(BOTH))
def test_a_classifier_reads_the_text_in_both_stacks_and_trains_its_head(kind, stack):
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_config(config_of(kind)).eval().requires_grad_(False)
    texts = {**PROMPTS, "input_ids": IDS.clone()}
    texts["input_ids"][0, 5] = texts["input_ids"][1, 3] = base.config.eos_token_id  # a classifier reads there
    expected = base(**texts).logits
    reft = rl.attach(base, rank=2, component=f"{stack}.block_output", positions="all").eval()
    assert reft.config.heads == ["classification_head"]
    out = reft(**texts, labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in reft.interventions.parameters())
    assert not torch.equal(out.logits, expected)
    with reft.disabled():
        assert torch.equal(reft(**texts).logits, expected)


def test_a_trainer_s_batch_needs_no_prompt_mask(base):
    reft = attached(base, "decoder")
    wrapped = as_pretrained(reft).train()
    assert torch.equal(wrapped(**PROMPTS, labels=LABELS).loss, reft(**PROMPTS, labels=LABELS).loss)


def test_a_configuration_alone_tells_what_would_be_trained(base):
    count = rl.count_parameters(base.config, rank=2, component="decoder.block_output")
    layers = {"t5": 2, "bart": 3}[base.config.model_type]
    assert count.trainable == layers * (2 * 2 * 16 + 2)


def test_a_model_with_an_encoder_is_no_decoder_though_its_decoder_has_a_class_of_its_own():
    config = PegasusConfig(**SIZES, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    assert not is_decoder(config)
    assert build_on_meta(config).config.is_encoder_decoder
    assert is_decoder(AutoModelForCausalLM.from_config(copy.deepcopy(config)).config)


def test_drafts_of_another_model_are_taken_with_edits_of_the_encoder_only(base):
    prompt = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    draft = copy.deepcopy(base)
    reft = attached(base)
    text = reft.generate(**prompt, **GREEDY)
    assert torch.equal(reft.generate(**prompt, **GREEDY, assistant_model=draft), text)
    reft.add_adapter("answers", component="decoder.block_output", positions="f1", rank=2)
    reft.set_adapter("answers")
    with pytest.raises(
        ValueError, match="assistant_model puts a draft right after the decoder's first token"
    ):
        reft.generate(**prompt, **GREEDY, assistant_model=draft)
    with reft.disabled():
        reft.generate(**prompt, **GREEDY, assistant_model=draft)
