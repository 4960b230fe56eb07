"""Law suites: what every intervention obeys. A new one gets all of them by a subclass of two methods."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from reft_lightning import Intervention
from reft_lightning.interventions import method_name, settings_of

D, R = 12, 3
"""Width and rank in the laws."""


def tokens(n: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:  # -> (n, D)
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shaken(phi: Intervention, size: float = 0.3, seed: int = 3) -> Intervention:
    """Move every parameter away from its start, where some could be zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return phi


class InterventionLaws:
    """Subclass with make() and num_parameters(); formula(phi, h) too where the paper gives one."""

    has_identity = True

    def make(self, **settings) -> Intervention:
        raise NotImplementedError

    def num_parameters(self) -> int:
        raise NotImplementedError

    def formula(self, phi: Intervention, h: Tensor) -> Tensor:
        """Return Phi(h) by the paper's formula, written without the class's own code."""
        pytest.skip("the class states no formula")

    @pytest.fixture
    def phi(self) -> Intervention:
        torch.manual_seed(0)
        return shaken(self.make())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_shape_and_dtype_are_those_of_the_tokens(self, phi, dtype):
        for n in (0, 1, 7):
            h = tokens(n, dtype)
            assert phi(h).shape == h.shape
            assert phi(h).dtype == dtype
        assert phi(tokens(dtype=dtype)).isfinite().all()

    def test_low_precision_tokens_are_edited_in_float32(self, phi):
        h = tokens(dtype=torch.bfloat16)
        assert torch.equal(phi(h), phi(h.float()).bfloat16())

    def test_autocast_changes_nothing(self, phi):
        h = tokens()
        with torch.autocast("cpu", torch.bfloat16):
            inside = phi(h)
        assert torch.equal(inside, phi(h))

    def test_casting_the_module_keeps_float32_parameters(self, phi):
        before = copy.deepcopy(phi.state_dict())
        phi.to(torch.bfloat16)
        assert all(torch.equal(before[name], tensor) for name, tensor in phi.state_dict().items())
        phi.half()
        assert {p.dtype for p in phi.parameters()} == {torch.float32}

    def test_tokens_are_independent(self, phi):
        h = tokens()
        together = phi(h)
        one_by_one = torch.cat([phi(row[None]) for row in h])
        torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=1e-5)
        other = h.clone()
        other[3] += 1
        changed = (phi(other) != together).any(-1)
        assert changed.nonzero().flatten().tolist() == [3]

    def test_the_input_is_not_written_to(self, phi):
        h = tokens()
        phi(h)
        assert torch.equal(h, tokens())

    def test_it_edits(self, phi):
        assert (phi(tokens()) - tokens()).abs().max() > 1e-2

    def test_it_is_the_identity_at_its_identity_parameters(self):
        if not self.has_identity:
            with pytest.raises(ValueError, match="init must be 'paper'"):
                self.make(init="identity")
            return
        phi = self.make(init="identity")
        torch.testing.assert_close(phi(tokens()), tokens(), atol=1e-6, rtol=0)

    def test_scale_multiplies_the_edit(self, phi):
        h = tokens()
        edit = phi(h) - h
        assert torch.equal(phi(h, 0.0), h)
        torch.testing.assert_close(phi(h, -2.0), h - 2 * edit, atol=1e-5, rtol=1e-5)

    def test_edits_lie_within_the_directions(self, phi):
        if phi.directions is None:
            pytest.skip("its edits may point anywhere")
        edit, rows = (phi(tokens()) - tokens()).double(), phi.directions.double()
        within = edit @ torch.linalg.pinv(rows) @ rows
        torch.testing.assert_close(within, edit, atol=1e-5, rtol=1e-4)

    def test_the_parameter_count_equals_the_formula(self, phi):
        assert sum(p.numel() for p in phi.parameters()) == self.num_parameters()
        assert not list(phi.buffers())

    def test_every_parameter_gets_a_gradient(self, phi):
        phi(tokens()).square().sum().backward()
        for name, parameter in phi.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-6, name

    def test_gradients_are_those_of_finite_differences(self):
        torch.manual_seed(0)
        phi = shaken(self.make().double())
        names = [name for name, _ in phi.named_parameters()]

        def outputs(h, *values):
            return torch.func.functional_call(phi, dict(zip(names, values, strict=True)), (h,))

        inputs = (tokens(2, torch.float64).requires_grad_(), *phi.parameters())
        assert torch.autograd.gradcheck(outputs, inputs)

    def test_a_state_dict_restores_outputs_bit_for_bit(self, phi):
        torch.manual_seed(99)
        fresh = self.make()
        assert not torch.equal(fresh(tokens()), phi(tokens()))
        held = dict(fresh.named_parameters())
        fresh.load_state_dict(phi.state_dict())
        assert torch.equal(fresh(tokens()), phi(tokens()))
        assert all(held[name] is parameter for name, parameter in fresh.named_parameters())

    def test_copies_and_pickles_are_equal_and_independent(self, phi):
        for other in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
            assert torch.equal(other(tokens()), phi(tokens()))
            before = phi(tokens())
            shaken(other, seed=8)
            assert torch.equal(phi(tokens()), before)
            assert not torch.equal(other(tokens()), before)

    def test_it_equals_the_papers_formula(self):
        torch.manual_seed(0)
        phi = shaken(self.make().double())
        h = tokens(dtype=torch.float64)
        torch.testing.assert_close(phi(h), self.formula(phi, h), atol=1e-12, rtol=1e-12)

    def test_dropout_acts_on_the_edit(self):
        phi = shaken(self.make(dropout=0.5)).train()
        h = tokens(200)
        edit = phi.edit(h)
        torch.manual_seed(0)
        kept = phi(h) != h
        assert 0.4 < kept.float().mean() < 0.6
        torch.manual_seed(0)
        torch.testing.assert_close(phi(h), torch.where(kept, h + 2 * edit, h), atol=1e-4, rtol=1e-4)

    def test_dropout_on_output_drops_hidden_states(self):
        phi = shaken(self.make(dropout=0.5, dropout_on="output")).train()
        h = tokens(200)
        out = phi(h)
        assert 0.4 < (out == 0).float().mean() < 0.6
        torch.testing.assert_close(out[out != 0], 2 * phi.eval()(h)[out != 0])

    @pytest.mark.parametrize("dropout_on", ["edit", "output"])
    def test_evaluation_has_no_dropout(self, dropout_on):
        phi = self.make(dropout=0.9, dropout_on=dropout_on)
        assert phi.eval() is phi
        h = tokens()
        torch.testing.assert_close(phi(h), h + phi.edit(h), atol=1e-6, rtol=1e-6)
        assert phi.train() is phi
        assert not torch.equal(phi(h), phi(h))

    def test_rotations_name_parameters(self, phi):
        assert set(phi.rotations) <= {name for name, _ in phi.named_parameters()}

    def test_steps_with_weight_decay_keep_it_editing(self, phi):
        train(phi, steps=20)
        assert (phi(tokens()) - tokens()).abs().max() > 1e-2

    def test_it_has_a_name_and_settings(self, phi):
        assert method_name(type(phi))
        assert {"dropout", "dropout_on"} <= settings_of(type(phi)).keys()


def train(phi: Intervention, steps: int, lr: float = 0.05) -> None:
    """Fit another random map with AdamW and decay 0.1 on every parameter, as a careless user would."""
    optimizer = torch.optim.AdamW(phi.parameters(), lr=lr, weight_decay=0.1)
    goal = tokens(32, seed=1) @ torch.randn(D, D, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        (phi(tokens(32)) - goal).square().mean().backward()
        optimizer.step()


class OrthonormalLaws(InterventionLaws):
    """What holds for interventions with orthonormal rows R."""

    def test_rows_stay_orthonormal_under_weight_decay(self):
        torch.manual_seed(0)
        phi = self.make()
        start = phi.R.detach().clone()
        train(phi, steps=20)
        torch.testing.assert_close(phi.R @ phi.R.mT, torch.eye(R), atol=1e-5, rtol=0)
        assert (phi.R - start).abs().max() > 1e-2

    def test_rows_stay_orthonormal_after_loading_and_training_on(self, phi):
        train(phi, steps=5)
        other = self.make()
        other.load_state_dict(phi.state_dict())
        assert torch.equal(other.R, phi.R)
        train(other, steps=20)
        torch.testing.assert_close(other.R @ other.R.mT, torch.eye(R), atol=1e-5, rtol=0)

    def test_the_edit_stays_in_the_row_space(self, phi):
        h = tokens()
        edit = phi(h) - h
        outside = edit - edit @ phi.R.mT @ phi.R
        assert outside.abs().max() < 1e-5

    def test_the_scale_of_the_free_parameter_is_free(self, phi):
        before = phi(tokens())
        with torch.no_grad():
            phi.basis.mul_(37.0)
        torch.testing.assert_close(phi(tokens()), before, atol=1e-5, rtol=1e-5)

    def test_rotations_are_marked_for_the_optimizer(self, phi):
        assert phi.rotations == ("basis",)
