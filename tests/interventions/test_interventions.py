import copy

import pytest
import torch
from laws import D, InterventionLaws, OrthonormalLaws, R, shaken, tokens
from torch import nn

from reft_lightning import (
    INTERVENTIONS,
    ConsReFT,
    DiReFT,
    Intervention,
    LobiReFT,
    LoReFT,
    NoReFT,
    OrthonormalDiReFT,
)
from reft_lightning.interventions import (
    check_settings,
    intervention_class,
    lend,
    method_name,
    orthonormal_rows,
    rotations,
    settings_of,
)
from reft_lightning.interventions.orthonormal import random_rows
from reft_lightning.interventions.subspace import ACTIVATIONS


def gram_schmidt(A):
    """Orthonormalise the rows of A one after the other: the definition, without a factorisation."""
    rows = []
    for a in A:
        for row in rows:
            a = a - (a @ row) * row
        rows.append(a / a.norm())
    return torch.stack(rows)


class LowRank(InterventionLaws):
    """Subclass with a class, its further settings, and its number of parameters where that is not that of two maps."""

    cls: type[Intervention]
    own = {}  # noqa: RUF012
    count = 2 * R * D + R

    def make(self, **settings):
        return self.cls(D, rank=R, **self.own, **settings)

    def num_parameters(self):
        return self.count


class TestLoReFT(LowRank, OrthonormalLaws):
    cls = LoReFT

    def formula(self, phi, h):  # eq. 2
        rows, W, b = gram_schmidt(phi.basis), phi.source.weight, phi.source.bias
        return torch.stack([x + rows.T @ (W @ x + b - rows @ x) for x in h])

    def test_in_the_subspace_the_result_is_what_w_and_b_say(self):
        torch.manual_seed(0)
        phi = shaken(self.make().double())
        h = tokens(dtype=torch.float64)
        torch.testing.assert_close(phi(h) @ phi.R.T, phi.source(h), atol=1e-12, rtol=1e-12)


class TestNoReFT(LowRank):
    cls = NoReFT

    def formula(self, phi, h):  # Table 17, row 4
        W1, b, W2 = phi.source.weight, phi.source.bias, phi.projection.weight
        return torch.stack([x + W2.T @ (W1 @ x + b - W2 @ x) for x in h])


class TestDiReFT(LowRank):
    cls = DiReFT

    def formula(self, phi, h):  # eq. 3
        W1, b, W2 = phi.source.weight, phi.source.bias, phi.projection.weight
        return torch.stack([x + W2.T @ (W1 @ x + b) for x in h])


class TestOrthonormalDiReFT(LowRank, OrthonormalLaws):
    cls = OrthonormalDiReFT

    def formula(self, phi, h):  # Table 17, row 3
        rows, W, b = gram_schmidt(phi.basis), phi.source.weight, phi.source.bias
        return torch.stack([x + rows.T @ (W @ x + b) for x in h])


class TestConsReFT(LowRank, OrthonormalLaws):
    cls, count, has_identity = ConsReFT, R * D + R, False

    def formula(self, phi, h):  # Table 17, row 2
        rows, b = gram_schmidt(phi.basis), phi.bias
        return torch.stack([x + rows.T @ (b - rows @ x) for x in h])

    def test_editing_twice_is_editing_once(self, phi):
        once = phi(tokens())
        torch.testing.assert_close(phi(once), once, atol=1e-5, rtol=1e-5)

    def test_in_the_subspace_the_result_is_the_constant(self, phi):
        torch.testing.assert_close(phi(tokens()) @ phi.R.T, phi.bias.expand(7, R), atol=1e-5, rtol=1e-5)


class TestLobiReFT(LowRank, OrthonormalLaws):
    cls, count = LobiReFT, R * D + R

    def formula(self, phi, h):  # Table 17, row 1
        return h + gram_schmidt(phi.basis).T @ phi.bias


class TestLoReFTWithAnActivation(LowRank, OrthonormalLaws):
    cls, own, has_identity = LoReFT, {"act_fn": "relu"}, False

    def formula(self, phi, h):  # the activation on W h + b, and nowhere else
        rows, W, b = gram_schmidt(phi.basis), phi.source.weight, phi.source.bias
        return torch.stack([x + rows.T @ ((W @ x + b).clamp(min=0) - rows @ x) for x in h])


class TestOrthonormalDiReFTWithAnActivation(LowRank, OrthonormalLaws):
    cls, own, has_identity = OrthonormalDiReFT, {"act_fn": "tanh"}, False

    def formula(self, phi, h):
        rows, W, b = gram_schmidt(phi.basis), phi.source.weight, phi.source.bias
        return torch.stack([x + rows.T @ (W @ x + b).tanh() for x in h])


class TestDiReFTWithAnActivation(LowRank):
    cls, own = DiReFT, {"act_fn": "silu"}

    def formula(self, phi, h):
        W1, b, W2 = phi.source.weight, phi.source.bias, phi.projection.weight
        return torch.stack([x + W2.T @ ((W1 @ x + b) * (W1 @ x + b).sigmoid()) for x in h])


class TestNoReFTWithBothBiases(LowRank):
    cls, own, count = NoReFT, {"add_bias": True}, 2 * R * D + 2 * R

    def formula(self, phi, h):
        W1, b1, W2, b2 = phi.source.weight, phi.source.bias, phi.projection.weight, phi.projection.bias
        return torch.stack([x + W2.T @ (W1 @ x + b1 - (W2 @ x + b2)) for x in h])


class TestNoReFTWithBothBiasesAndAnActivation(TestNoReFTWithBothBiases):
    own, has_identity = {"add_bias": True, "act_fn": "sigmoid"}, False

    def formula(self, phi, h):
        W1, b1, W2, b2 = phi.source.weight, phi.source.bias, phi.projection.weight, phi.projection.bias
        return torch.stack([x + W2.T @ ((W1 @ x + b1).sigmoid() - (W2 @ x + b2)) for x in h])


class ScaleAndShift(Intervention, name="tests.scale_and_shift"):
    """A class that a user would write: h * s + v on all coordinates."""

    def __init__(self, dim, *, init="paper", **kwargs):
        super().__init__(dim, **kwargs)
        start = torch.full((2, dim), 0.0 if init == "identity" else 0.1)
        self.gain, self.shift = nn.Parameter(start[0].clone()), nn.Parameter(start[1].clone())

    def edit(self, h):
        return h * self.gain + self.shift


class TestTenLinesOfAUser(InterventionLaws):
    def make(self, **settings):
        return ScaleAndShift(D, **settings)

    def num_parameters(self):
        return 2 * D

    def formula(self, phi, h):
        return h * (1 + phi.gain) + phi.shift

    def test_subclassing_registers_the_name(self, phi):
        assert INTERVENTIONS["tests.scale_and_shift"] is ScaleAndShift
        assert intervention_class("tests.scale_and_shift") is ScaleAndShift
        assert method_name(ScaleAndShift) == "tests.scale_and_shift"

    def test_a_name_is_not_taken_from_another_class(self):
        with pytest.raises(
            ValueError, match=r"'loreft' of .*Mine is taken by reft_lightning.*LoReFT; choose another"
        ):

            class Mine(Intervention, name="loreft"):
                pass

        assert INTERVENTIONS["loreft"] is LoReFT

    def test_a_forward_as_pyreft_has_it_is_refused(self):  # no scale and no dropout reached it
        with pytest.raises(ValueError, match=r"Mine defines forward.*define edit\(h\)"):

            class Mine(Intervention, name="tests.forward"):
                def forward(self, base, source=None, subspaces=None):
                    return base

        assert "tests.forward" not in INTERVENTIONS

    def test_a_cell_of_a_notebook_may_run_twice(self):
        def cell():
            class Mine(Intervention, name="tests.cell"):
                pass

            return Mine

        cell()
        assert cell() is INTERVENTIONS.pop("tests.cell")


class NoParameters(Intervention):
    def edit(self, h):
        return torch.ones_like(h)


def test_an_intervention_needs_no_parameters():
    assert torch.equal(NoParameters(D)(tokens()), tokens() + 1)


def test_a_class_without_a_name_is_known_by_its_path():
    path = method_name(NoParameters)
    assert path.endswith("test_interventions.NoParameters")
    assert intervention_class(path) is NoParameters


def test_starts_differ_with_the_seed_and_agree_with_the_same_seed():
    def basis(seed):
        torch.manual_seed(seed)
        return LoReFT(D, R).basis

    assert torch.equal(basis(0), basis(0))
    assert not torch.equal(basis(0), basis(1))


# --- orthonormal_rows ---------------------------------------------------------------------------------------


def random_rows_of(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (1, 9), (3, 12), (8, 64), (12, 12)])
def test_rows_are_orthonormal_and_span_those_of_a(rank, dim):
    A = random_rows_of(rank, dim)
    rows = orthonormal_rows(A)
    eye = torch.eye(rank, dtype=A.dtype)
    torch.testing.assert_close(rows @ rows.T, eye, atol=1e-13, rtol=0)
    torch.testing.assert_close(A @ rows.T @ rows, A, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(rows, gram_schmidt(A), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("rank", "dim"), [(1, 8), (4, 20), (8, 576)])
def test_a_start_is_the_one_that_torch_draws(rank, dim):
    torch.manual_seed(5)
    found, after = random_rows(rank, dim), torch.get_rng_state()
    torch.manual_seed(5)
    torch.testing.assert_close(found, 0.5 * nn.init.orthogonal_(torch.empty(rank, dim)), atol=1e-6, rtol=0)
    assert torch.equal(after, torch.get_rng_state())
    assert found.is_contiguous()


def test_a_start_has_orthogonal_rows_of_length_one_half_and_nothing_is_drawn_without_data():
    A = random_rows(6, 6)
    torch.testing.assert_close(A @ A.mT, 0.25 * torch.eye(6), atol=1e-6, rtol=0)
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert random_rows(4, 20).shape == (4, 20)
    assert torch.equal(before, torch.get_rng_state())


def test_the_map_has_right_gradients():
    A = random_rows_of(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(orthonormal_rows, A)
    assert torch.autograd.gradcheck(orthonormal_rows, random_rows_of(2, 3, 7).requires_grad_())


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_the_scale_of_a_does_not_matter(scale):
    A = random_rows_of(4, 16, dtype=torch.float32)
    torch.testing.assert_close(orthonormal_rows(scale * A), orthonormal_rows(A), atol=1e-5, rtol=1e-5)


def test_rows_of_very_different_norms_are_no_difficulty():
    A = random_rows_of(4, 64, dtype=torch.float32)
    uneven = A * torch.tensor([1e-6, 1.0, 1e3, 1e6])[:, None]
    torch.testing.assert_close(orthonormal_rows(uneven), orthonormal_rows(A), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_nearly_dependent_rows_come_out_orthonormal(apart):
    A = random_rows_of(4, 64, dtype=torch.float32)
    A[1] = A[0] + apart * A[1]
    rows = orthonormal_rows(A)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("broken", ["twice", "zero", "sum", "nan", "inf"])
def test_dependent_rows_raise(broken, dtype):
    for seed in range(20):
        A = random_rows_of(3, 8, 64, dtype=dtype, seed=seed)
        orthonormal_rows(A)
        sums = {"twice": A[1, 0], "sum": A[1, 0] - 3 * A[1, 2] + A[1, 7]}
        A[1, 3] = sums.get(broken, {"nan": torch.nan, "inf": torch.inf}.get(broken, 0))
        with pytest.raises(torch.linalg.LinAlgError, match="linearly dependent"):
            orthonormal_rows(A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    rows = orthonormal_rows(random_rows_of(4, 16).to(dtype))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)


def test_rows_for_all_layers_are_those_of_each_layer():
    phis = [LoReFT(D, 2), LobiReFT(D, R), NoReFT(D, R), ConsReFT(D, R)]
    phis += [LoReFT(D + 1, R), LoReFT(D, R).double()]  # another width, another dtype
    found = rotations(phis)
    assert set(found) == {phi for phi in phis if not isinstance(phi, NoReFT)}
    for phi, rows in found.items():
        torch.testing.assert_close(rows, phi.R, atol=1e-6, rtol=1e-6)


def test_lent_rows_are_used_and_given_back():
    phi, other = shaken(LoReFT(D, R)), LoReFT(D, R)
    with lend({phi: torch.zeros(R, D)}):
        assert torch.equal(phi(tokens()), tokens())
        with lend({phi: other.R}):
            assert torch.equal(phi.R, other.R)
        assert torch.equal(phi(tokens()), tokens())
        assert torch.equal(copy.deepcopy(phi).R, orthonormal_rows(phi.basis))
    torch.testing.assert_close(phi.R @ phi.R.T, torch.eye(R), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="inside"), lend({phi: torch.zeros(R, D)}):
        raise RuntimeError("inside")
    assert not torch.equal(phi(tokens()), tokens())


# --- starts and errors --------------------------------------------------------------------------------------


def test_linear_maps_start_as_nn_linear_does():
    torch.manual_seed(0)
    phi = DiReFT(400, 50)
    bound = 1 / 400**0.5
    for parameter in phi.parameters():
        assert 0.8 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("cls", [ConsReFT, LobiReFT])
def test_constants_start_uniform_in_the_unit_interval(cls):
    bias = cls(1000, 500).bias
    assert bias.min() >= 0
    assert bias.max() < 1
    assert 0.4 < bias.mean() < 0.6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        *(({"rank": rank}, f"rank must lie in 1..{D}, .*got {rank}") for rank in (0, -1, D + 1, 1024)),
        *(({"dropout": dropout}, "dropout must lie in") for dropout in (-0.1, 1.0, 2)),
        ({"init": "zero"}, "init must be one of paper, identity; got 'zero'"),
        ({"dropout_on": "edits"}, "dropout_on must be 'edit' or 'output'; got 'edits'"),
        ({"act_fn": "rleu"}, r"act_fn must be one of gelu, .*; got 'rleu'; did you mean 'relu'"),
    ],
)
def test_impossible_settings_raise(settings, said):
    with pytest.raises(ValueError, match=said):
        LoReFT(D, **{"rank": R, **settings})


def test_an_activation_needs_something_to_act_on():
    with pytest.raises(ValueError, match="ConsReFT has no W h \\+ b for an activation"):
        ConsReFT(D, R, act_fn="relu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    y = torch.linspace(-5, 8, 99)
    torch.testing.assert_close(ACTIVATIONS[name](y), ACT2FN[name](y), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(cls, {}) for cls in (LoReFT, NoReFT, DiReFT, OrthonormalDiReFT, ConsReFT, LobiReFT)]
    + [(NoReFT, {"add_bias": True})],
)
def test_an_edit_without_an_activation_is_affine(cls, settings):
    torch.manual_seed(0)
    phi, h = shaken(cls(D, R, **settings)).double(), tokens(dtype=torch.float64)
    U, V, c = phi.affine()
    torch.testing.assert_close(phi.edit(h), (h @ V.T + c) @ U, atol=1e-12, rtol=1e-10)
    if hasattr(phi, "source"):
        with pytest.raises(ValueError, match=r"act_fn='relu' is not an affine function"):
            cls(D, R, act_fn="relu", **settings).affine()


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown intervention 'lorefft'; .*did you mean 'loreft'"):
        intervention_class("lorefft")
    with pytest.raises(ValueError, match=r"cannot import the intervention 'no\.such\.Class'"):
        intervention_class("no.such.Class")


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"LoReFT takes no setting 'rnak'; .*did you mean 'rank'"):
        check_settings(LoReFT, {"rnak": 4})
    with pytest.raises(ValueError, match="LoReFT needs the setting rank"):
        check_settings(LoReFT, {})
    check_settings(LoReFT, {"rank": 4, "dropout": 0.1})
    expected = ["rank", "init", "weight_dtype", "act_fn", "dropout", "dropout_on"]
    assert list(settings_of(LoReFT)) == expected


def test_the_paper_s_names_are_registered():
    names = {"loreft", "direft", "noreft", "consreft", "lobireft", "direft_orthonormal", "red", "bias"}
    assert names <= set(INTERVENTIONS)
    # The paper's DiReFT has no orthonormal rows (pyreft gives that name to another class).
    assert not INTERVENTIONS["direft"].rotations
    assert INTERVENTIONS["direft_orthonormal"].rotations


def test_base_classes_say_what_to_define():
    class Nothing(Intervention):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must define edit"):
        Nothing(D)(tokens())


def test_a_step_of_adam_turns_R_as_far_as_under_torchs_orthogonal_map():
    # The paper's learning rates were found with torch's map, where a step reaches twice as far as on rows of length 1.
    d, r, turned = 64, 4, {}
    for seed in range(3):
        torch.manual_seed(seed)
        ours = LoReFT(d, rank=r)
        theirs = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(d, r, bias=False))
        start = ours.R.detach()
        theirs.weight = start
        h, towards = torch.randn(50, d), torch.randn(50, r)
        for name, module, rows in (("ours", ours, "R"), ("theirs", theirs, "weight")):
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0)
            (h @ getattr(module, rows).mT - towards).square().mean().backward()
            optimizer.step()
            turned[name] = (getattr(module, rows).detach() - start).norm().item()
        assert turned["ours"] == pytest.approx(turned["theirs"], rel=0.05), seed
