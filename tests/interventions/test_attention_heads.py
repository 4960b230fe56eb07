"""LoFiT and JoLA: laws, formulas, gates, and the two stages of LoFiT."""

import math

import pytest
import tiny
import torch
from laws import D, InterventionLaws, shaken, tokens

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import longest_heads
from reft_lightning.interventions import JoLA, LoFiT


class TestLoFiTScale(InterventionLaws):
    stage = "scale"

    def make(self, **settings):
        return LoFiT(D, stage=self.stage, **settings)

    def num_parameters(self):
        return D

    def formula(self, phi, h):
        return torch.stack(
            [torch.stack([(1 + a) * z for a, z in zip(phi.vector, row, strict=True)]) for row in h]
        )

    def test_it_is_the_identity_at_its_identity_parameters(self):
        phi = self.make()
        torch.testing.assert_close(phi(tokens()), tokens(), atol=0.02, rtol=0.005)  # it starts near it
        torch.nn.init.zeros_(phi.vector)
        assert torch.equal(phi(tokens()), tokens())

    def test_the_penalty_is_the_sum_of_absolute_values(self):
        phi = shaken(self.make(l1=0.25))
        assert phi.penalty().item() == pytest.approx(0.25 * sum(abs(x) for x in phi.vector.tolist()))
        assert self.make().penalty() is None


class TestLoFiTBias(TestLoFiTScale):
    stage = "bias"

    def formula(self, phi, h):
        return h + phi.vector


class TestJoLA(InterventionLaws):
    def make(self, **settings):
        phi = JoLA(D, **settings)
        with torch.no_grad():
            phi.gates += torch.tensor([1.0, -0.5])
        return phi.eval()

    def num_parameters(self):
        return 2 * D + 2

    def formula(self, phi, h):
        g1, g2 = (min(max(1.2 / (1 + math.exp(-gate)) - 0.1, 0.0), 1.0) for gate in phi.gates.tolist())
        return (1 + g2 * phi.scaling) * h + g1 * phi.bias

    def test_it_is_the_identity_at_its_identity_parameters(self):
        torch.testing.assert_close(
            self.make()(tokens()), tokens(), atol=0.02, rtol=0.005
        )  # it starts near it
        phi = shaken(self.make())
        with torch.no_grad():
            phi.gates.fill_(-9.0)  # both closed
        assert torch.equal(phi(tokens()), tokens())

    def test_dropout_acts_on_the_edit(self):
        phi = shaken(self.make(dropout=0.5)).train()
        with torch.no_grad():
            phi.gates.fill_(99.0)  # open, whatever is drawn
        h = tokens(200)
        edit = phi.edit(h)
        torch.manual_seed(0)
        out = phi(h)
        kept = out != h
        assert 0.4 < kept.float().mean() < 0.6
        torch.testing.assert_close(out, torch.where(kept, h + 2 * edit, h), atol=1e-4, rtol=1e-4)

    def test_dropout_on_output_drops_hidden_states(self):
        phi = shaken(self.make(dropout=0.5, dropout_on="output")).train()
        with torch.no_grad():
            phi.gates.fill_(99.0)
        h = tokens(200)
        out = phi(h)
        assert 0.4 < (out == 0).float().mean() < 0.6
        torch.testing.assert_close(out[out != 0], 2 * phi.eval()(h)[out != 0])

    def test_gates_are_drawn_in_training_as_often_open_as_the_penalty_says(self):
        phi = JoLA(D, l0=2.0).train()
        with torch.no_grad():
            phi.gates.copy_(torch.tensor([0.5, -1.0]))
        torch.manual_seed(0)
        drawn = torch.stack([phi.open() for _ in range(4000)])
        opened = (drawn > 0).float().mean(0)
        expected = [1 / (1 + math.exp(-(gate - 0.33 * math.log(0.1 / 1.1)))) for gate in (0.5, -1.0)]
        torch.testing.assert_close(opened, torch.tensor(expected), atol=0.02, rtol=0)
        assert phi.penalty().item() == pytest.approx(2 * sum(expected), rel=1e-5)
        assert 0 < (drawn == 1).float().mean() < 1
        assert torch.equal(phi.eval().open(), phi.open())


def attached(method, component="head_output", **settings):
    return rl.attach(tiny.model("llama"), method, positions="all", component=component, **settings)


@pytest.mark.parametrize(("method", "count"), [("lofit", 8), ("jola", 2 * 8 + 2)])
def test_each_head_trains_its_own_numbers(method, count):
    reft = attached(method)
    assert reft.parameter_count().trainable == 3 * 2 * count  # layers, heads
    settings = {"positions": "all", "component": "head_output"}
    assert rl.count_parameters(reft.base_model.config, method, **settings) == reft.parameter_count()


def test_the_second_stage_of_lofit_moves_the_heads_that_the_first_scaled_most():
    first = attached("lofit", stage="scale")
    with torch.no_grad():
        for layer, head, size in (("0", 1, 3.0), ("2", 0, 2.0), ("2", 1, 1.0)):
            first.interventions[layer][head].vector.fill_(size)
    assert longest_heads(first, 2) == {0: {"component": "head_output:1"}, 2: {"component": "head_output:0"}}
    layers = longest_heads(first, 3)
    assert layers == {0: {"component": "head_output:1"}, 2: {"component": "head_output:0+1"}}
    second = attached("lofit", layers=layers, stage="bias")
    assert second.parameter_count().trainable == 3 * 8
    for count in (0, 7):
        with pytest.raises(ValueError, match=r"count must lie in 1\.\.6"):
            longest_heads(first, count)
    with pytest.raises(ValueError, match="attach with component='head_output'"):
        longest_heads(attached("bias", component="block_output"), 1)


def test_all_interventions_of_a_head_count():
    positions = {"positions": "f1+l2", "component": "head_output", "layers": [0]}
    for tied, number in (("group", 3), ("position", 5)):  # the last intervention of head 1
        reft = rl.attach(tiny.model("llama"), "lofit", tied=tied, stage="scale", **positions)
        with torch.no_grad():
            reft.interventions["0"][number].vector.fill_(3.0)
        assert longest_heads(reft, 1) == {0: {"component": "head_output:1"}}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lofit", {"stage": "scale", "l1": 1e-3}), ("jola", {}), ("reft_r1", {"component": "block_output"})],
)
def test_training_lowers_the_loss_and_files_hold_it(method, settings, tmp_path):
    torch.manual_seed(0)
    reft = attached(method, **settings).train()
    shaken(reft.interventions, 0.1)
    batch = tiny.prompt_target(tiny.rows(5, 3), tiny.rows(2, 3, seed=1))
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        out = reft(**batch)
        assert out.penalty.requires_grad
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.1
    reft.eval().save_pretrained(tmp_path)
    loaded = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    prompts, greedy = tiny.padded(tiny.rows(5, 3), "left"), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded(**batch).logits, reft(**batch).logits)
    cached = reft.generate(**prompts, **greedy)
    assert torch.equal(loaded.generate(**prompts, **greedy, use_cache=False), cached)
