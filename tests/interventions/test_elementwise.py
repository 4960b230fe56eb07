"""RED and its bias alone: the laws of interventions, their formulas, and where they start."""

import pytest
import torch
from laws import D, InterventionLaws, shaken, tokens

import reft_lightning as rl
from reft_lightning.interventions import RED, ActivationScaling, Bias, Intervention


class ElementwiseLaws(InterventionLaws):
    cls: type[Intervention]

    def make(self, **settings):
        return shaken(self.cls(D, **settings))

    def test_it_is_the_identity_at_its_identity_parameters(self):
        assert torch.equal(self.cls(D)(tokens()), tokens())  # where it starts: there is no `init`
        with pytest.raises(TypeError, match="init"):
            self.cls(D, init="identity")


class TestRED(ElementwiseLaws):
    cls = RED

    def num_parameters(self):
        return 2 * D

    def formula(self, phi, h):
        return torch.stack([torch.stack([s * x + b for s, x, b in zip(phi.scaling, row, phi.bias, strict=True)])
                            for row in h])  # fmt: skip


class TestBias(ElementwiseLaws):
    cls = Bias

    def num_parameters(self):
        return D

    def formula(self, phi, h):
        return h + phi.bias


class TestActivationScaling(ElementwiseLaws):
    cls = ActivationScaling

    def num_parameters(self):
        return 1

    def formula(self, phi, h):
        return torch.stack([torch.stack([(1 + phi.scalar[0]) * x for x in row]) for row in h])

    def test_the_penalty_is_the_absolute_value(self):
        phi = self.make(l1=0.5)
        with torch.no_grad():
            phi.scalar.fill_(-0.4)
        assert phi.penalty().item() == pytest.approx(0.2)
        assert self.make().penalty() is None


def test_the_restraint_of_red_is_the_length_of_its_vector():
    phi = shaken(RED(D, restraint=0.5))
    assert phi.penalty().item() == pytest.approx(0.5 * sum(x * x for x in phi.bias.tolist()) ** 0.5)
    phi = RED(D, restraint=1.0)
    phi.penalty().backward()
    assert phi.bias.grad.abs().max() == 0  # where it starts
    assert RED(D).penalty() is None


@pytest.mark.parametrize(("method", "count"), [("red", 2 * 576 * 30), ("bias", 576 * 30)])
def test_a_model_trains_two_vectors_or_one_a_layer(method, count):
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, vocab_size=100)
    settings = {"component": "mlp_output", "positions": "all"}
    assert rl.count_parameters(config, method, **settings).trainable == count
