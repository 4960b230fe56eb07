"""torch.compile of the training step: one graph with the edits in it, and the same numbers.

``aot_eager`` traces both passes and writes no C++: what breaks a graph breaks it there, and its numbers are exact.
"""

import copy
import pickle

import pytest
import short_runs
import tiny
import torch
import torch._dynamo
from laws import shaken
from torch._dynamo.utils import counters

import reft_lightning as rl
from reft_lightning.data.encoding import target_only
from reft_lightning.runs.experiment import SetupError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own internals


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(n, seed=0):
    """Rows of n, n - 2 and n - 1 prompt tokens: n alone changes the width."""
    return tiny.prompt_target(tiny.rows(n, n - 2, n - 1, seed=seed), tiny.rows(2, 3, 2, seed=1))


def attached(family="llama", **settings):
    torch.manual_seed(0)
    base = tiny.model(family, num_hidden_layers=2)  # tracing takes seconds a block
    reft = rl.attach(base, **{"rank": 2, "positions": "f2+l2", **settings})
    shaken(reft.interventions)
    return reft.train()


def train(reft, batches):
    """Return the losses of some steps and the gradients of the last."""
    optimizer = torch.optim.SGD([p for p in reft.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for inputs in batches:
        optimizer.zero_grad()
        loss = reft(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in reft.interventions.parameters()]


def same_training(reft, batches, backend="aot_eager"):
    compiled = copy.deepcopy(reft)
    compiled.compile(backend=backend, fullgraph=True)
    losses, gradients = train(reft, batches)
    again, compiled_gradients = train(compiled, batches)
    torch.testing.assert_close(again, losses, **CLOSE)
    torch.testing.assert_close(compiled_gradients, gradients, **CLOSE)
    return compiled


def test_the_step_is_one_graph_for_all_lengths_and_its_numbers_are_the_same():
    same_training(attached(), [batch(n, seed=n) for n in (6, 9, 7, 12)])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the first length, then any length, as for the bare model


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"tied": "group"},
        {"tied": "position"},
        {"component": "mlp_output", "method": "direft"},
        {"component": "block_input", "positions": "all"},
        {"method": "consreft", "positions": "decode"},
        {"weight_dtype": "bfloat16", "dropout_on": "output"},
    ],
    ids=str,
)
def test_every_way_to_attach_is_one_graph(settings):
    same_training(attached(**settings), [batch(6), batch(9), batch(7)])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt", "gpt_neox", "mistral"])
def test_every_family_whose_own_code_allows_it_is_one_graph(family):
    same_training(attached(family), [batch(6), batch(9), batch(7)])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_logits_of_targets_alone_are_compiled():
    batches = [target_only(batch(n) | {"boundary": n}) for n in (6, 9, 7)]
    for inputs in batches:
        inputs.pop("boundary", None)
    same_training(attached(), batches)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_gradient_checkpointing_is_compiled(component):
    reft = attached(component=component)
    reft.base_model.config.use_cache = False
    reft.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    reft.base_model.disable_input_require_grads()
    same_training(reft, [batch(6), batch(9)])


@pytest.mark.slow
@pytest.mark.timeout(600)  # compiles C++
def test_inductor_gives_the_same_numbers():
    same_training(attached(), [batch(n) for n in (6, 9, 7)], backend="inductor")


@pytest.mark.slow
def test_a_cache_may_be_given_to_a_compiled_step():
    reft = attached(positions="l2")
    whole, cut = batch(8), 5
    shared = {"prompt_mask": whole["prompt_mask"]}
    compiled = copy.deepcopy(reft)
    compiled.compile(backend="aot_eager", fullgraph=True)
    losses = []
    for model in (reft, compiled):
        with torch.no_grad():
            first = model(
                whole["input_ids"][:, :cut], whole["attention_mask"][:, :cut],
                prompt_mask=torch.zeros(3, cut, dtype=torch.bool), use_cache=True,
            )  # fmt: skip
        rest = model(
            whole["input_ids"][:, cut:], whole["attention_mask"], whole["labels"][:, cut:],
            past_key_values=first.past_key_values, **shared,
        )  # fmt: skip
        rest.loss.backward()
        losses.append(rest.loss.detach())
    torch.testing.assert_close(*losses, **CLOSE)
    assert counters["stats"]["unique_graphs"] == 1


def test_only_the_training_step_is_compiled():
    reft, calls = attached(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    inputs = batch(6)
    prompts = tiny.padded(tiny.rows(5, 4), "left")
    with torch.no_grad():
        logits, ids = reft(**inputs).logits, reft.generate(**prompts, max_new_tokens=3, do_sample=False)
        with reft.disabled():
            base = reft(**inputs).logits
    reft.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(reft(**inputs).logits, logits, **CLOSE)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(reft(**inputs).logits, logits)
        assert torch.equal(reft.generate(**prompts, max_new_tokens=3, do_sample=False), ids)
    with reft.disabled():
        assert torch.equal(reft(**inputs).logits, base)
    for copied in (copy.deepcopy(reft), pickle.loads(pickle.dumps(reft))):
        assert torch.equal(copied(**inputs).logits, logits)
    assert len(calls) == 1
    assert "forward" not in vars(reft.base_model)


def test_a_failed_step_leaves_the_base_model_as_it_was():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    reft = attached()
    expected = reft.base_model(batch(6)["input_ids"]).logits
    reft.compile(backend=backend)
    with pytest.raises(RuntimeError, match="no compiler here"):
        reft(**batch(6))
    assert "forward" not in vars(reft.base_model)
    assert torch.equal(reft.base_model(batch(6)["input_ids"]).logits, expected)
    assert all(phi.lent is None for group in reft.interventions.values() for phi in group)


@pytest.mark.slow
@pytest.mark.timeout(600)  # compiles C++
def test_blocks_compiled_one_by_one_keep_their_edits():
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f1+l2").eval()
    inputs = tiny.padded(tiny.rows(5, 3))
    with torch.no_grad():
        plain = reft(**inputs).logits
        for block in reft.base_model.model.layers:
            block.compile()
        compiled = reft(**inputs).logits
        with reft.disabled():
            base = reft(**inputs).logits
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    assert (compiled - base).abs().max() > 1e-2


def test_a_run_compiles_its_training_step(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(rl.ReftModel, "compile", lambda self, **options: called.append(options))
    data = short_runs.write_rows(tmp_path / "data")
    short = ["trainer.max_steps=1", "test=false", "data.validation_size=0", "model.compile=true"]
    assert short_runs.run(data, tmp_path / "run", *short)["status"] == "complete"
    assert called == [{}]


def test_a_baseline_is_not_compiled(tmp_path):
    data = short_runs.write_rows(tmp_path / "data")
    baseline = ["intervention=peft/lora", "intervention.rank=8", "intervention.positions=f7+l7"]
    with pytest.raises(SetupError, match=r"model.compile compiles interventions, not peft/lora"):
        short_runs.run(data, tmp_path / "run", "model.compile=true", *baseline)


@pytest.mark.slow
def test_a_compiled_run_reports_what_a_plain_one_does(tmp_path):
    data = short_runs.write_rows(tmp_path / "data")
    short = ["trainer.max_steps=3", "test=false", "data.validation_size=0", "intervention.positions=l2"]
    for name, more in (("plain", []), ("compiled", ["model.compile=true"])):
        short_runs.run(data, tmp_path / name, *short, *more)
    plain, compiled = (short_runs.logged(tmp_path / name, "train/loss") for name in ("plain", "compiled"))
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, rel=1e-5)
