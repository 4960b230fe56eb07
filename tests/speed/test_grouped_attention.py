"""Attention in training on a CPU: the same losses and gradients, no copies for a group, nothing left behind."""

import pytest
import short_runs
import tiny
import torch
from adapted_models import DECODERS, adapted
from training_passes import assert_same_training, attached, encoded, train
from transformers.integrations import sdpa_attention as integration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reft_lightning.runs import build
from reft_lightning.speed.choose_part import training_pass
from reft_lightning.speed.grouped_attention import READS_GROUPS, GroupedAttention, attend_in_groups
from reft_lightning.speed.lean_pass import lean_pass
from reft_lightning.speed.recompute_activation import RecomputedActivations

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

GROUPED = ["llama", "qwen3", "gemma3", "mistral"]
TRAINED = [method for family, method in DECODERS if family == "llama" and method != "frozen"]
reads_groups = pytest.mark.skipif(not READS_GROUPS, reason="torch reads groups on a CPU since 2.9")
attend = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """Heads of the queries, heads of the keys and type of each call of torch's attention."""
    seen = []

    def recorded(query, key, value, **kwargs):
        seen.append((query.shape[1], key.shape[1], query.dtype))
        assert value.dtype == key.dtype == query.dtype
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return seen


def both(family="llama", dtype=torch.float64, **settings):
    plain, grouped = (attached(family, dtype, **{"positions": "f2+l2", **settings}) for _ in range(2))
    run = attend_in_groups(grouped, short_runs.own_pass(grouped))
    assert isinstance(run, GroupedAttention)
    return plain, grouped, run


# --- the same numbers ----------------------------------------------------------------------------------------------


@reads_groups
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fifty_steps_give_the_losses_and_gradients_of_the_plain_pass(dtype, tolerance, calls):
    assert_same_training(*both(dtype=dtype), encoded(), 50, tolerance)
    copied, grouped = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert set(copied) == {(2, 2, dtype)}
    assert set(grouped) == {(2, 1, dtype)}


@pytest.mark.parametrize("family", list(tiny.DECODERS))
def test_other_architectures_give_the_same(family):
    assert_same_training(*both(family), encoded(), 6, 2e-6)  # Falcon computes some of its norms in float32


@reads_groups
@pytest.mark.parametrize("family", GROUPED)
def test_their_groups_are_not_copied(family, calls):
    _, grouped, run = both(family)
    train(grouped, encoded(), run, steps=1)
    assert {(queries, keys) for queries, keys, _ in calls} == {(2, 1)}


def test_it_goes_with_a_constant_prefix():
    plain, short, _ = both(positions="l2")
    run = attend_in_groups(short, training_pass(short, encoded(), causal=True))
    assert_same_training(plain, short, run, encoded(), 6, 1e-10)
    assert run.run.first_batch.refused is False


@pytest.mark.parametrize("method", TRAINED)
def test_baselines_train_with_it(method):
    batch = tiny.prompt_target(tiny.rows(5, 4, 7), tiny.rows(2, 3, 2, seed=1))
    gradients = []
    for lean in (False, True):
        model = adapted("llama", method, dtype=torch.float64)  # no dropout: both draw nothing
        run = attend_in_groups(model, short_runs.own_pass(model))
        assert isinstance(run, GroupedAttention)
        torch.manual_seed(0)
        (run(batch, ()) if lean else model(**batch)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert gradients[0]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


# --- 16 bits -------------------------------------------------------------------------------------------------------


@reads_groups
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_attended_to_in_float32(dtype, calls):
    reft = attached("llama", dtype, positions="f2+l2")
    losses, gradients = train(reft, encoded(), attend_in_groups(reft, short_runs.own_pass(reft)), steps=1)
    assert losses.isfinite().all()
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert set(calls) == {(2, 1, torch.float32)}


def attention(query, key, value, mask, **kwargs):
    """Run Hugging Face's function for sdpa, as a pass of ours finds it."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)[0]


def inputs(dtype, requires_grad=False):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 10, 8), (2, 2, 10, 8), (2, 2, 10, 8))
    tensors = [torch.randn(shape, generator=draw).bfloat16().to(dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def inside(function):
    """Return what a function returns inside a pass."""
    return GroupedAttention(lambda inputs, rows, boundary: function())({}, ())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_less(autocast):
    def gradients(dtype):
        tensors = inputs(dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            output = attention(*tensors, None)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        return [tensor.grad.double() for tensor in tensors]

    exact = gradients(torch.float64)
    plain, ours = gradients(torch.bfloat16), inside(lambda: gradients(torch.bfloat16))
    for expected, coarse, fine in zip(exact, plain, ours, strict=True):
        assert (fine - expected).norm() < (coarse - expected).norm()


@pytest.mark.parametrize("name", ["attention_mask", "position_bias"])
def test_what_is_added_to_bfloat16_scores_is_widened_too(name):
    added = torch.linspace(-4, 4, 100).roll(37).view(1, 1, 10, 10).bfloat16()
    masks = {"attention_mask": None, name: added}

    def attended(dtype):
        others = {"position_bias": masks["position_bias"].to(dtype)} if "position_bias" in masks else {}
        mask = masks["attention_mask"]
        return attention(*inputs(dtype), mask if mask is None else mask.to(dtype), **others)

    expected, ours = attended(torch.float64), inside(lambda: attended(torch.bfloat16))
    torch.testing.assert_close(ours.double(), expected, atol=1e-2, rtol=1e-2)
    bare = attention(*inputs(torch.float64), None)
    assert (expected - bare).abs().max() > 0.1  # what is added matters


# --- where it stands back ------------------------------------------------------------------------------------------


def test_what_follows_a_pass_has_hugging_faces_own_again(calls):
    _, grouped, run = both()
    train(grouped, encoded(), run, steps=1)
    calls.clear()
    grouped(**tiny.prompt_target(tiny.rows(5, 4, 7), tiny.rows(2, 3, 2, seed=1)))
    assert set(calls) == {(2, 2, torch.float64)}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], integration.use_gqa_in_sdpa
    _, _, run = both()

    def call(inputs, rows, boundary):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before[0]
        assert integration.use_gqa_in_sdpa is not before[1]
        if fails:
            raise RuntimeError("out of memory")

    run.run = call
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            run({}, ())
    else:
        run({}, ())
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], integration.use_gqa_in_sdpa) == before


def test_a_function_that_somebody_put_there_sees_what_it_saw():
    seen = set()

    def theirs(module, query, key, *args, **kwargs):
        seen.add(query.dtype)
        return integration.sdpa_attention_forward(module, query, key, *args, **kwargs)

    plain, grouped, run = both(dtype=torch.bfloat16)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        assert_same_training(plain, grouped, run, encoded(), 2, 0)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert seen == {torch.bfloat16}


def test_an_older_torch_copies_as_before(monkeypatch, calls):
    _, grouped, run = both(dtype=torch.bfloat16)
    monkeypatch.setattr("reft_lightning.speed.grouped_attention.READS_GROUPS", False)
    train(grouped, encoded(), run, steps=1)
    assert set(calls) == {(2, 2, torch.float32)}


def test_a_transformers_without_this_choice_decides_itself(monkeypatch, calls):
    def forward(module, query, key, value, mask, **kwargs):
        return attend(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2), None

    _, grouped, run = both()
    monkeypatch.delattr(integration, "use_gqa_in_sdpa")
    monkeypatch.setattr(integration, "sdpa_attention_forward", forward)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", forward)
    train(grouped, encoded(), run, steps=1)
    assert not hasattr(integration, "use_gqa_in_sdpa")


def test_checkpointed_and_eager_models_stay_as_they_are(calls):
    reft = attached("llama", positions="f2+l2")
    reft.base_model.activation_checkpointing_enable()
    assert short_runs.leaves_alone(attend_in_groups, reft)
    plain, eager, run = both(dtype=torch.float32)  # eager computes softmax in float32
    for model in (plain, eager):
        model.base_model.set_attn_implementation("eager")
    assert_same_training(plain, eager, run, encoded(), 2, 1e-12)
    assert not calls


def test_other_devices_stay_as_they_are(calls):
    reft = attached("llama", positions="f2+l2").to("meta")
    assert short_runs.leaves_alone(attend_in_groups, reft)
    query, key, value = (tensor.to("meta") for tensor in inputs(torch.bfloat16))
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool, device="meta")
    inside(lambda: attention(query, key, value, mask))
    assert calls == [(6, 6, torch.bfloat16)]  # Hugging Face copies where there is a mask


def test_runs_have_it_unless_they_are_compiled():
    reft = attached("llama", positions="l2")
    for causal in (True, False):
        assert GroupedAttention in short_runs.passes(build._short_pass(reft, encoded(), causal, False))
        assert GroupedAttention not in short_runs.passes(build._short_pass(reft, encoded(), causal, True))


@pytest.mark.parametrize("last_logits", [True, False])
def test_all_cheaper_passes_together_give_the_same(last_logits):
    plain, lean, _ = both(positions="l2")
    part = training_pass(lean, encoded(), causal=True)
    assert_same_training(plain, lean, lean_pass(lean, part, last_logits=last_logits), encoded(), 6, 1e-10)


def test_a_model_with_nothing_to_gain_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(
        "reft_lightning.speed.lean_pass.attend_in_groups", lambda model, run: run
    )  # as on a GPU
    reft = attached("gpt2", positions="l2")
    batch = tiny.prompt_target(tiny.rows(5, 4, 7), tiny.rows(2, 3, 2, seed=1))
    run = lean_pass(reft, last_logits=False)
    assert not short_runs.passes(run).keys() & {GroupedAttention, RecomputedActivations}
    assert torch.equal(run(batch, ()).logits, reft(**batch).logits)
