"""Laws of every adapted model: ReFT, each baseline, and both together. A new method is one more case."""

import copy
import inspect
import warnings

import pytest
import tiny
import torch
from adapted_models import EVERY, VIRTUAL, adapted, batch_of, logits_of

from reft_lightning.adapters.adapt import build_on_meta
from reft_lightning.adapters.adapted import AdaptedModel, Steerable
from reft_lightning.adapters.methods import METHODS
from reft_lightning.adapters.saving import load_state
from reft_lightning.base_models.reading import position_ids_of
from reft_lightning.data.encoding import target_only
from reft_lightning.training.optimization import Optimization, parameter_groups

GENERATING = [case for case in EVERY if case[0] not in tiny.ENCODERS]
TRAINING = [case for case in EVERY if case[1] != "frozen"]
# ReFT's parameters start away from the identity unless they are told; virtual tokens have no identity.
STARTING = [case for case in EVERY if case[1] not in VIRTUAL]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def every(cases):
    return pytest.mark.parametrize(("family", "method"), cases, ids=[" ".join(case) for case in cases])


def base_logits(family, batch):
    extra = {} if family in tiny.ENCODERS else {"position_ids": position_ids_of(batch["attention_mask"])}
    return logits_of(tiny.original(family), batch | extra)


def training_batch(family):
    if family in tiny.ENCODERS:
        return {**tiny.padded(tiny.rows(5, 3)), "labels": torch.tensor([0, 1])}
    return tiny.prompt_target(tiny.rows(5, 3), tiny.rows(2, 3, seed=1))


def train(model, family, steps=3):
    """Train for some steps as the Lightning module does."""
    optimizer = torch.optim.AdamW(parameter_groups(model.parameter_roles(), Optimization(lr=0.05)))
    for _ in range(steps):
        optimizer.zero_grad()
        model(**training_batch(family)).loss.backward()
        optimizer.step()


def learning(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- the base stays what it is ------------------------------------------------------------------------------------


@every(STARTING)
def test_a_fresh_adapter_is_the_base(family, method):
    identity = {"init": "identity"} if method.startswith(("loreft", "direft")) else {}
    fresh, batch = adapted(family, method, moved=False, **identity), batch_of(family)
    torch.testing.assert_close(logits_of(fresh, batch), base_logits(family, batch), rtol=1e-4, atol=1e-4)


@every(TRAINING)
def test_disabled_is_exactly_the_base_and_leaves_no_trace(family, method):
    model, batch = adapted(family, method), batch_of(family)
    before, trained, base = logits_of(model, batch), list(learning(model)), base_logits(family, batch)
    assert not torch.allclose(before, base, atol=1e-3)
    with model.disabled():
        assert torch.equal(logits_of(model, batch), base)
        with model.disabled():
            assert torch.equal(logits_of(model, batch), base)
        assert torch.equal(logits_of(model, batch), base)
    assert torch.equal(logits_of(model, batch), before)
    assert list(learning(model)) == trained


@every(TRAINING)
def test_training_moves_what_is_trained_and_nothing_else(family, method):
    model, batch = adapted(family, method, moved=False), batch_of(family)
    start = logits_of(model, batch)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = learning(model)
    train(model, family)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)
    assert not torch.allclose(logits_of(model, batch), start)
    with model.disabled():
        assert torch.equal(logits_of(model, batch), base_logits(family, batch))


# --- what it computes ---------------------------------------------------------------------------------------------


@every(EVERY)
def test_padding_changes_nothing(family, method):
    model, texts = adapted(family, method), tiny.rows(5, 2, 7)
    alone = [logits_of(model, {"input_ids": text[None]})[0] for text in texts]
    for side in ["right"] if family in tiny.ENCODERS else ["left", "right"]:
        for extra in (0, 4):
            batch = tiny.padded(texts, side, extra)
            found = logits_of(model, batch)
            for row, single in enumerate(alone):
                whole = family in tiny.ENCODERS
                here = found[row] if whole else found[row][batch["attention_mask"][row] == 1]
                torch.testing.assert_close(here, single, rtol=1e-4, atol=1e-4)


@every(GENERATING)
def test_generation_is_the_argmax_with_and_without_a_cache(family, method):
    model, texts = adapted(family, method), tiny.rows(5, 2, 7)
    batch = tiny.padded(texts, "left")
    new = model.generate(**batch, **GREEDY)[:, -5:]
    for text, added in zip(texts, new, strict=True):
        whole = torch.cat([text, added])[None]
        prompt = torch.arange(whole.shape[1])[None] < len(text)
        found = logits_of(model, {"input_ids": whole, "prompt_mask": prompt})
        assert torch.equal(found[0, len(text) - 1 : -1].argmax(-1), added)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False)[:, -5:], new)
    assert torch.equal(model.generate(**tiny.padded(texts, "right"), **GREEDY)[:, -5:], new)


@every(GENERATING)
def test_the_loss_of_only_the_target_columns_is_the_loss(family, method):
    model, batch = adapted(family, method), training_batch(family)
    cut = target_only({**batch, "boundary": 5})
    del cut["boundary"]
    with torch.no_grad():
        whole, part = model(**batch), model(**cut)
    assert whole.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(part.loss, whole.loss)
    torch.testing.assert_close(part.logits, whole.logits[:, -4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["peft/lora", "peft/prompt_tuning", "loreft + peft/lora"])
def test_gradient_checkpointing_gives_the_same_gradients(method):
    gradients = []
    for checkpointing in (False, True):
        base = tiny.model("llama")
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = adapted("llama", method, base=base).train()
        model(**training_batch("llama")).loss.backward()
        gradients.append([p.grad for p in learning(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@every([case for case in EVERY if case[1] not in ("full", "bitfit", "frozen", "none")])
def test_a_16_bit_base_is_adapted_in_float32(family, method):
    model = adapted(family, method, dtype=torch.bfloat16)
    assert torch.isfinite(logits_of(model, batch_of(family))).all()
    roles = model.parameter_roles()
    assert {p.dtype for role in ("rotation", "weight", "bias") for p in roles[role]} == {torch.float32}


@pytest.mark.parametrize("method", ["peft/prompt_tuning", "full", "loreft + peft/lora"])
def test_a_copy_runs_on_its_own(method):
    model, batch = adapted("llama", method), batch_of("llama")
    before = logits_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, batch), before)
    train(twin, "llama")
    assert not torch.equal(logits_of(twin, batch), before)
    assert torch.equal(logits_of(model, batch), before)


# --- parameters and files -----------------------------------------------------------------------------------------


def test_only_models_with_edits_are_steerable_on_every_version_of_python():
    """From Python 3.12 on, isinstance of a protocol looks members up as getattr_static does: only in classes."""
    reft, lora = adapted("llama", "loreft"), adapted("llama", "peft/lora")
    assert isinstance(reft, Steerable)
    assert not isinstance(lora, Steerable)
    for name in (n for n in dir(Steerable) if not n.startswith("_")):
        assert inspect.getattr_static(reft, name)


@every(EVERY)
def test_trained_parameters_have_one_role_each_and_are_counted_without_weights(family, method):
    model = adapted(family, method)
    assert [
        name for name in vars(AdaptedModel) if not name.startswith("_") and not hasattr(model, name)
    ] == []
    assert model.config.method == method.split(" + ")[0]
    assert type(model.base_model) is type(tiny.original(family))
    roles = model.parameter_roles()
    named = [id(p) for parameters in roles.values() for p in parameters]
    assert sorted(named) == sorted(id(p) for p in learning(model).values())
    heads = roles["head"]
    assert bool(heads) == bool(model.config.heads if not hasattr(model, "peft") else model.peft.config.heads)
    trained = sum(p.numel() for p in learning(model).values())
    assert model.parameter_count().trainable == trained - sum(p.numel() for p in heads)
    task = "sequence_classification" if family in tiny.ENCODERS else "causal_lm"
    bare = adapted(family, method, moved=False, base=build_on_meta(tiny.original(family).config, task))
    assert bare.parameter_count() == model.parameter_count()
    base = sum(p.numel() for p in tiny.original(family).parameters())
    assert model.parameter_count().base == base - sum(p.numel() for p in heads)


@every(EVERY)
def test_the_state_and_the_saved_files_restore_the_model_bit_for_bit(family, method, tmp_path):
    model, batch = adapted(family, method), batch_of(family)
    expected = logits_of(model, batch)
    state = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    model.save_pretrained(tmp_path)
    for seed, found in enumerate((state, load_state(tmp_path)), 1):
        other = adapted(family, method, seed=seed)
        other.load_adapter_state_dict(found)
        assert torch.equal(logits_of(other, batch), expected)
        for name, tensor in other.adapter_state_dict().items():
            assert torch.equal(tensor, state[name]), name
    if family not in tiny.ENCODERS:
        assert torch.equal(other.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@every(EVERY)
def test_a_detached_base_is_as_it_was_and_can_be_adapted_again(family, method):
    base, batch = tiny.model(family), batch_of(family)
    before, names = logits_of(base, batch), [name for name, _ in base.named_modules()]
    learned = list(learning(base))
    for _ in range(2):
        model = adapted(family, method, base=base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.detach() is base
        assert torch.equal(logits_of(base, batch), before)
        assert [name for name, _ in base.named_modules()] == names
        assert list(learning(base)) == learned


@pytest.mark.parametrize(
    "method", ["loreft", "peft/lora", "peft/prompt_tuning", "full", "loreft + peft/lora"]
)
def test_a_state_that_does_not_fit_is_refused(method):
    model = adapted("llama", method)
    state = model.adapter_state_dict()
    name = next(iter(state))
    for wrong, message in (
        ({**state, "more": state[name]}, r"does not fit.*unexpected more"),
        ({k: v for k, v in state.items() if k != name}, r"does not fit.*missing"),
        ({**state, name: state[name][:0]}, r"does not fit.*shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter_state_dict(wrong)


def test_every_method_is_a_case():
    assert {method for _, method in EVERY} >= METHODS.keys()
