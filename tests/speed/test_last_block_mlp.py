"""The last block without what nobody reads: the same losses and gradients, and plain wherever that is not certain."""

import pytest
import short_runs
import tiny
import torch
from adapted_models import DECODERS, adapted
from lightning import Callback
from model_laws import exact_loss
from torch import nn
from training_passes import assert_same_training, attached, batches, encoded, train

import reft_lightning as rl
from reft_lightning.data.encoding import target_only
from reft_lightning.runs import build, experiment
from reft_lightning.speed import lean_pass
from reft_lightning.speed.choose_part import TrainingPass, training_pass
from reft_lightning.speed.frozen_part import ConstantInput
from reft_lightning.speed.last_block_mlp import LastColumns, _last_columns, last_columns

# peft 0.21, called directly here, reads a property that transformers 5.23 renames
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SHORTENED = ["llama", "qwen3", "gemma3", "mistral", "gpt2", "gptj", "gpt_neox", "falcon"]


def compare(plain, short, run, steps, tolerance, refused=False):
    assert_same_training(plain, short, run, encoded(), steps, tolerance)
    assert (
        run.first_batch.refused is refused
    )  # a pass that fell back to the plain one would be the same trivially


def both(family="llama", dtype=torch.float64, **settings):
    plain, short = (attached(family, dtype, **{"positions": "f2+l2", **settings}) for _ in range(2))
    return plain, short, last_columns(short, short_runs.own_pass(short))


@pytest.mark.parametrize("component", ["block_output", "block_input", "attention_output", "mlp_output"])
def test_fifty_steps_give_the_losses_and_gradients_of_the_plain_pass(component):
    plain, short, run = both(component=component)
    assert isinstance(run, LastColumns)
    compare(plain, short, run, 50, 1e-10)


def test_the_same_in_float32():
    compare(*both(dtype=torch.float32), 50, 1e-5)


@pytest.mark.parametrize("family", SHORTENED)
def test_other_architectures_give_the_same(family):
    plain, short, run = both(family)
    assert isinstance(run, LastColumns)
    compare(plain, short, run, 6, 2e-6)  # Falcon computes some of its norms in float32


def test_it_goes_with_a_constant_prefix():
    plain, short, _ = both(positions="l2")
    part = training_pass(short, encoded(), causal=True)
    assert part is not None
    run = last_columns(short, part)
    assert run.run is part
    compare(plain, short, run, 6, 1e-10)
    assert part.first_batch.refused is False


def gradients(model, run):
    (batch,) = batches(encoded(), 1)
    inputs = target_only(batch)
    boundary, numbers = inputs.pop("boundary"), inputs.pop("rows")
    output = model(**inputs) if run is None else run(inputs, numbers.tolist(), boundary)
    exact_loss(output.logits, inputs["labels"]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "method"), [(f, m) for f, m in DECODERS if m != "frozen"])
def test_baselines_get_the_same_gradients(family, method):
    options = {"lora_dropout": 0.0} if method in ("peft/lora", "peft/rslora", "peft/dora") else {}
    plain, short = (adapted(family, method, dtype=torch.float64, **options).train() for _ in range(2))
    run = last_columns(short, short_runs.own_pass(short))
    assert isinstance(run, LastColumns)
    expected, found = gradients(plain, None), gradients(short, run)
    assert run.first_batch.refused is False
    assert any(float(gradient.abs().max()) > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10 * float(gradient.abs().max()), rtol=1e-9)


def test_the_columns_that_nobody_reads_are_not_computed():
    _, short, run = both()
    rows = encoded()
    train(short, rows, run, steps=1)  # the first batch is computed both ways, too
    layers, seen = short.base_model.model.layers, []
    for layer in layers[-2:]:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    train(short, rows, run, steps=1)
    whole, part = seen
    assert part < 7 < 12 < whole
    assert "forward" not in vars(layers[-1].mlp)  # put back
    train(short, rows, steps=1)
    assert seen[2:] == [whole, whole]


# --- plain, where it could change a number -------------------------------------------------------------------------


class Shift(nn.Module):
    """A feed-forward part that reads the column before, as RWKV's does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden + nn.functional.pad(hidden, (0, 0, 1, -1)))


class Two(Shift):
    """One that takes the residual stream too, as Bloom's does."""

    def forward(self, hidden, residual=0.0):
        return residual + self.inner(hidden)


class Mixing(type(tiny.model("llama").model.layers[0])):
    """A block that mixes columns behind its feed-forward part."""

    def forward(self, *args, **kwargs):
        hidden = super().forward(*args, **kwargs)
        return hidden + nn.functional.pad(hidden, (0, 0, 1, -1))


def test_a_feed_forward_part_that_takes_more_is_left_whole():
    reft = attached("llama", positions="l2")
    block = reft.base_model.model.layers[-1]
    block.mlp = Two(block.mlp)
    assert short_runs.leaves_alone(last_columns, reft)


@pytest.mark.parametrize("where", ["in the part", "behind it"])
def test_a_block_that_mixes_columns_is_found_out_on_the_first_batch(where, caplog):
    plain, short = (attached("llama", positions="f2+l2") for _ in range(2))
    for reft in (plain, short):
        block = reft.base_model.model.layers[-1]
        if where == "in the part":
            block.mlp = Shift(block.mlp)
        else:
            block.__class__ = Mixing
    run = last_columns(short, short_runs.own_pass(short))
    compare(plain, short, run, 3, 1e-10, refused=True)
    assert "LlamaForCausalLM gives other logits when its last block reads fewer columns" in caplog.text


def test_a_part_that_says_more_than_its_output_is_run_whole():
    def forward(hidden):
        return hidden, hidden.shape[1]

    _, columns = _last_columns(forward, 2, torch.zeros(1, 5, 4))
    assert columns == 5
    assert _last_columns(lambda hidden: hidden + 1, 2, torch.zeros(1, 5, 4)).sum((0, 2)).tolist() == [
        0,
        0,
        0,
        4,
        4,
    ]


def test_the_loss_of_a_router_reads_all_columns():
    reft = attached("llama", positions="l2")
    reft.base_model.config.output_router_logits = True
    assert short_runs.leaves_alone(last_columns, reft)


def test_what_is_kept_of_the_last_block_is_whole():
    reft = attached("llama", positions="f2+l2", layers=[2])
    kept = training_pass(reft, encoded(), causal=True, limit=10**8)
    assert (type(kept.part), kept.part.last) == (ConstantInput, 2)
    assert last_columns(reft, kept) is kept
    reft = attached("llama", positions="f2+l2", layers=[1])
    kept = training_pass(reft, encoded(), causal=True, limit=10**8)
    assert isinstance(last_columns(reft, kept), LastColumns)


def test_a_site_inside_it_sees_all_columns():
    component = "model.layers.{layer}.mlp.down_proj.input"
    reft = attached("llama", positions="l2", component=component)
    assert short_runs.leaves_alone(last_columns, reft)
    reft = attached("llama", positions="l2", component=component, layers=[0])
    assert not short_runs.leaves_alone(last_columns, reft)


def test_one_that_several_blocks_share_is_left_whole():
    reft = attached("llama", positions="l2")
    layers = reft.base_model.model.layers
    layers[0].mlp = layers[-1].mlp
    assert short_runs.leaves_alone(last_columns, reft)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_that_drops_entries_is_left_whole(dropout):
    lora = adapted("llama", "peft/lora", target_modules=["down_proj"], lora_dropout=dropout)
    assert short_runs.leaves_alone(last_columns, lora) is (dropout > 0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_block_that_is_run_again_in_the_backward_pass_is_left_whole():
    reft = attached("llama", positions="l2")
    reft.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert short_runs.leaves_alone(last_columns, reft)


def test_a_model_without_such_a_part_trains_as_it_did():
    reft = rl.attach(tiny.model("opt"), "loreft", rank=2)

    def run(*args):
        raise AssertionError("not called")

    assert last_columns(reft, run) is run


@pytest.mark.parametrize(("causal", "compiled"), [(True, True), (False, False)])
def test_compiled_steps_and_classifiers_have_no_such_pass(causal, compiled):
    reft, rows = attached("llama", positions="l2"), encoded()
    assert LastColumns in short_runs.passes(build._short_pass(reft, rows, True, False))
    assert LastColumns not in short_runs.passes(build._short_pass(reft, rows, causal, compiled))


# --- whole runs ----------------------------------------------------------------------------------------------------


class Seen(Callback):
    def on_train_end(self, trainer, pl_module):
        self.passes = short_runs.passes(pl_module.training_pass)


@pytest.mark.parametrize("overrides", [["intervention.positions=f2+l2"], ["intervention.positions=l2"]])
def test_a_run_leaves_it_out_and_ends_with_the_same_numbers(overrides, tmp_path, monkeypatch):
    data = short_runs.write_rows(tmp_path / "rows")
    seen = Seen()
    config = short_runs.config(data, *overrides)
    short = experiment.run(config, tmp_path / "short", callbacks=[seen])
    assert seen.passes[LastColumns].first_batch.refused is False
    assert (TrainingPass in seen.passes) is (overrides == ["intervention.positions=l2"])
    monkeypatch.setattr(lean_pass, "last_columns", lambda model, run: run)
    plain = experiment.run(config, tmp_path / "plain", callbacks=[seen])
    assert LastColumns not in seen.passes
    assert short["metrics"]["val/loss"] == pytest.approx(plain["metrics"]["val/loss"], rel=1e-5)
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("short", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
