"""Gated parts that compute phi(g) again: the same bits, less remembered, and plain where that is not certain."""

import copy
import gc
import weakref
from functools import partial

import pytest
import short_runs
import tiny
import torch
from adapted_models import DECODERS, adapted
from torch import nn
from torch.utils._pytree import tree_map
from training_passes import attached, encoded, train
from transformers.models.llama.modeling_llama import LlamaMLP

from reft_lightning.runs import build
from reft_lightning.speed.last_block_mlp import last_columns
from reft_lightning.speed.recompute_activation import RecomputedActivations, _lean, recompute_activations

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

GATED = ["llama", "qwen3", "gemma3", "mistral"]


def both(family="llama", dtype=torch.float64, change=lambda model: None, **settings):
    plain, lean = (attached(family, dtype, **{"positions": "f2+l2", **settings}) for _ in range(2))
    for reft in (plain, lean):
        change(reft.base_model)
    run = recompute_activations(lean, short_runs.own_pass(lean))
    assert isinstance(run, RecomputedActivations)
    return plain, lean, run


def assert_same_bits(plain, lean, run, steps=3):
    expected, gradients = train(plain, encoded(), steps=steps)
    losses, found = train(lean, encoded(), run, steps=steps)
    assert losses.tolist() == expected.tolist()
    assert any(gradient.abs().max() > 0 for gradient in found)
    for gradient, other in zip(found, gradients, strict=True):
        assert torch.equal(gradient, other)


def counted(module):
    """Count the calls of a module's forward function."""
    plain, calls = module.forward, []
    module.forward = lambda hidden: (calls.append(hidden.shape), plain(hidden))[1]
    return calls


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fifty_steps_give_the_bits_of_the_plain_pass(dtype):
    assert_same_bits(*both(dtype=dtype), 50)


@pytest.mark.parametrize("family", GATED)
def test_other_architectures_give_the_same(family):
    assert_same_bits(*both(family))


@pytest.mark.parametrize("component", ["mlp_output", "model.layers.{layer}.mlp.down_proj.input"])
def test_so_do_sites_inside_the_part(component):
    assert_same_bits(*both(component=component))


def test_an_edit_of_what_phi_says_is_remembered():
    def change(model):
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda module, args, output: 1.5 * output)

    plain, lean, run = both(change=change)
    calls = [counted(layer.mlp.act_fn) for layer in lean.base_model.model.layers]
    assert_same_bits(plain, lean, run)
    assert [len(c) for c in calls] == [3, 3, 3]  # never again: the product reads another tensor


@pytest.mark.parametrize("method", ["peft/lora", "full"])
def test_baselines_get_the_same_gradients(method):
    options = {"target_modules": ["up_proj", "down_proj"], "lora_dropout": 0.0} if "lora" in method else {}
    models = [adapted("llama", method, dtype=torch.float64, **options).train() for _ in range(2)]
    batch = tiny.prompt_target(tiny.rows(5, 4, 7), tiny.rows(2, 3, 2, seed=1))
    gradients = []
    for model, lean in zip(models, (False, True), strict=True):
        run = recompute_activations(model, short_runs.own_pass(model))
        (run(batch, ()) if lean else model(**batch)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", [method for family, method in DECODERS if family == "llama"])
def test_every_baseline_has_a_pass(method):
    model = adapted("llama", method)
    run = recompute_activations(model, short_runs.own_pass(model))
    assert isinstance(run, RecomputedActivations)
    assert len(run.parts) == tiny.LAYERS


def test_it_goes_with_a_shorter_last_block():
    plain, lean, _ = both()
    run = recompute_activations(lean, last_columns(lean, short_runs.own_pass(lean)))
    expected, _ = train(plain, encoded(), last_columns(plain, short_runs.own_pass(plain)), steps=3)
    losses, _ = train(lean, encoded(), run, steps=3)
    assert losses.tolist() == expected.tolist()


# --- less is remembered --------------------------------------------------------------------------------------------


def test_phi_is_computed_again_in_the_backward_pass():
    _, lean, run = both()
    calls = [counted(layer.mlp.act_fn) for layer in lean.base_model.model.layers]
    train(lean, encoded(), run, steps=1)
    # no gradient passes the first block, whose output is edited
    assert [len(c) for c in calls] == [1, 2, 2]
    assert all(
        "forward" in vars(layer.mlp.act_fn) for layer in lean.base_model.model.layers
    )  # the counter is back
    assert not any("forward" in vars(layer.mlp) for layer in lean.base_model.model.layers)


def test_memory_of_a_step_is_smaller_by_one_tensor_a_block():
    def allocated(run):
        with torch.profiler.profile(profile_memory=True) as profile:
            output = run()
        return sum(e.self_cpu_memory_usage for e in profile.events()), output

    plain, _, run = both(dtype=torch.float32)
    batch = tiny.prompt_target(tiny.rows(9, 9, 9), tiny.rows(3, 3, 3, seed=1))
    less, _ = allocated(lambda: run(batch, ()))
    more, _ = allocated(lambda: plain(**batch))
    tensor = 3 * 12 * 24 * 4  # rows, columns, width of the part, bytes
    assert more - less == pytest.approx(2 * tensor, rel=0.01)


# --- plain, where it could change a number -------------------------------------------------------------------------


class Doubled(LlamaMLP):
    """One that changes what phi said in place."""

    def forward(self, hidden):
        gate = self.act_fn(self.gate_proj(hidden))
        gate.mul_(2)
        return self.down_proj(gate * self.up_proj(hidden))


class Broken(LlamaMLP):
    """One that changes in place what the backward pass reads."""

    def forward(self, hidden):
        up = self.up_proj(hidden)
        product = self.act_fn(self.gate_proj(hidden)) * up
        up.add_(1)
        return self.down_proj(product)


def feed_forward(cls):
    def change(model):
        for layer in model.model.layers:
            layer.mlp.__class__ = cls

    return change


def test_what_is_changed_in_place_is_remembered():
    assert_same_bits(*both(change=feed_forward(Doubled)))


def test_a_change_that_would_falsify_gradients_is_refused_as_torch_refuses_it():
    plain, lean, run = both(change=feed_forward(Broken))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(plain, encoded(), steps=1)
    with pytest.raises(RuntimeError, match=r"part was changed in place .* change a copy"):
        train(lean, encoded(), run, steps=1)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt"])
def test_a_part_without_a_gate_remembers_what_it_did(family):
    reft = attached(family, positions="l2")
    assert short_runs.leaves_alone(recompute_activations, reft)


class InPlace(nn.SiLU):
    """phi in the memory of its input; its name is SiLU's."""

    def forward(self, gate):
        return gate.mul_(torch.sigmoid(gate.detach()))


InPlace.__name__ = "SiLU"


def test_a_phi_that_works_in_place_is_remembered():
    def change(model):
        for layer in model.model.layers:
            layer.mlp.act_fn = InPlace()

    assert_same_bits(*both(change=change))


class Named(LlamaMLP):
    """One that calls its activation by keyword."""

    def forward(self, hidden):
        return self.down_proj(self.act_fn(input=self.gate_proj(hidden)) * self.up_proj(hidden))


def test_a_phi_called_in_another_way_is_remembered():
    assert_same_bits(*both(change=feed_forward(Named)))


class Wrapped(torch.Tensor):
    """A tensor around another, as those of tensor parallelism: its own memory is nowhere."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            return value.inner if isinstance(value, cls) else value

        found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        return tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, found)


def test_tensors_around_others_are_remembered():
    part, inner, gradients = tiny.model("llama").model.layers[0].mlp, torch.randn(2, 3, tiny.WIDTH), []
    for forward in (part, partial(_lean, part.forward, part.act_fn)):
        hidden = Wrapped(inner).requires_grad_()
        forward(hidden).square().sum().backward()
        gradients.append(hidden.grad.inner)
    assert torch.equal(*gradients)


def test_a_gate_without_gradient_is_not_computed_twice():
    model = adapted("llama", "peft/lora", target_modules=["up_proj"], lora_dropout=0.0)
    part = next(module for module in model.base_model.modules() if isinstance(module, LlamaMLP))
    calls, hidden = counted(part.act_fn), torch.randn(2, 3, tiny.WIDTH)
    _lean(part.forward, part.act_fn, hidden).sum().backward()
    assert len(calls) == 1


class Kept(LlamaMLP):
    """One with a function whose backward pass reads its own output."""

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * torch.exp(-self.up_proj(hidden)))


def test_a_graph_that_is_dropped_is_freed():
    part = tiny.model("llama").model.layers[0].mlp
    part.__class__ = Kept
    hidden = torch.randn(2, 3, tiny.WIDTH, requires_grad=True)
    alive = weakref.ref(hidden)
    output = _lean(part.forward, part.act_fn, hidden)
    assert alive() is not None
    del hidden, output
    gc.collect()
    assert alive() is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_checkpointed_blocks_are_left_alone(family):
    plain, lean, run = both(family)
    for reft in (plain, lean):  # after the pass was made
        reft.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        reft.base_model.train()
    calls = [counted(layer.mlp.act_fn) for layer in lean.base_model.model.layers]
    assert_same_bits(plain, lean, run, steps=1)
    assert all(len(c) <= 2 for c in calls)


def test_what_others_move_elsewhere_is_theirs():
    part = tiny.model("llama").model.layers[0].mlp
    hidden, seen = torch.randn(2, 3, tiny.WIDTH, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        part(hidden)
        plainly, seen[:] = list(seen), []
        _lean(part.forward, part.act_fn, hidden)
    assert seen == plainly
    assert len(seen) >= 3


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own internals
def test_a_compiled_part_is_one_graph():
    _, lean, run = both(dtype=torch.float32)
    batch = tiny.prompt_target(tiny.rows(9, 9, 9), tiny.rows(3, 3, 3, seed=1))
    expected = run(batch, ()).loss
    lean.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(batch, ()).loss, expected)


def test_copies_run_the_copy():
    _, lean, run = both()
    batch = tiny.prompt_target(tiny.rows(9, 9, 9), tiny.rows(3, 3, 3, seed=1))
    copied, twin = copy.deepcopy((run, lean))
    with torch.no_grad():
        for parameter in twin.interventions.parameters():
            parameter.add_(1)
    assert torch.equal(run(batch, ()).logits, lean(**batch).logits)
    assert torch.equal(copied(batch, ()).logits, twin(**batch).logits)
    assert not torch.equal(copied(batch, ()).logits, run(batch, ()).logits)


def test_runs_have_it_unless_they_are_compiled():
    reft = attached("llama", positions="l2")
    for causal in (True, False):
        assert RecomputedActivations in short_runs.passes(build._short_pass(reft, encoded(), causal, False))
        assert RecomputedActivations not in short_runs.passes(
            build._short_pass(reft, encoded(), causal, True)
        )
