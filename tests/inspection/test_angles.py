"""Angles between subspaces, and what they are by chance."""

import pytest
import torch

from reft_lightning.inspection.angles import between, chance_angle, mean_angle, principal_angles


def rows(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))[0].mT


def test_a_subspace_and_itself_are_0_degrees_apart_whatever_its_basis():
    P = rows(4, 20)
    turned = rows(4, 4, seed=1) @ P
    for other in (P, turned):
        torch.testing.assert_close(principal_angles(P, other), torch.zeros(4).double(), atol=1e-5, rtol=0)
        assert mean_angle(P, other) == pytest.approx(0, abs=1e-5)


def test_orthogonal_subspaces_are_90_degrees_apart():
    P = rows(6, 20)
    torch.testing.assert_close(principal_angles(P[:3], P[3:]), torch.full((3,), 90.0).double())
    assert mean_angle(P[:3], P[3:]) == pytest.approx(90)


def test_a_plane_turned_about_one_of_its_lines_has_that_angle():
    turn = torch.tensor(30.0).deg2rad()
    P = torch.eye(3)[:2].double()
    Q = torch.stack([P[0], torch.tensor([0, turn.cos(), turn.sin()]).double()])
    torch.testing.assert_close(principal_angles(P, Q), torch.tensor([0.0, 30.0]).double(), atol=1e-5, rtol=0)


def test_random_subspaces_are_apart_as_chance_says():
    pairs = [(rows(3, 40, seed), rows(5, 40, 1000 + seed)) for seed in range(300)]
    squares = [torch.tensor(mean_angle(P, Q)).deg2rad().cos() ** 2 for P, Q in pairs]
    chance = torch.tensor(chance_angle(*pairs[0])).deg2rad().cos() ** 2
    assert float(torch.stack(squares).mean()) == pytest.approx(float(chance), rel=0.05)


def test_angles_of_several_are_symmetric_and_0_on_the_diagonal():
    grid = torch.tensor(between([rows(2, 12, seed) for seed in range(3)], mean_angle))
    torch.testing.assert_close(grid, grid.T)
    assert grid.diagonal().abs().max() < 1e-4


def test_adapters_of_different_widths_have_no_angle():
    with pytest.raises(ValueError, match="must have the same width; got 12 and 13"):
        principal_angles(rows(2, 12), rows(2, 13))


def test_subspaces_of_different_widths_have_no_angle_between_layers():
    grid = torch.tensor(between([rows(2, 12), rows(2, 13)], mean_angle))
    assert grid.isnan().tolist() == [[False, True], [True, False]]
