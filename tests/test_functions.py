"""Test functions: rotations keep them, and the best teleport is where the theory says."""

import pytest
import torch

from metatele.errors import ConfigError
from metatele.tasks.functions import FUNCTIONS, function


def points(count=50):
    return 3 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=lambda f: f.name)
def test_formulas_are_those_of_the_literature(f):
    w = points()
    x, y = w.unbind(-1)
    expected = {
        "ellipse": 0.5 * (x**2 + 9 * y**2),
        "booth": (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2,
        "rosenbrock": (1 - x) ** 2 + 100 * (y - x**2) ** 2,
    }[f.name]
    torch.testing.assert_close(f.value(w), expected)
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(f.value(w).sum(), w)
    torch.testing.assert_close(f.gradient(w.detach()), gradient)
    assert float(f.value(torch.tensor(f.optimum).double())) < 1e-28
    torch.testing.assert_close(f.point(f.coordinates(w.detach())), w.detach())


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=lambda f: f.name)
def test_rotations_are_a_group_that_keeps_the_value(f):
    w = points()
    a, b = 2 * torch.randn(2, len(w), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(f.value(f.rotate(w, a)), f.value(w))
    torch.testing.assert_close(f.rotate(f.rotate(w, a), b), f.rotate(w, a + b))
    torch.testing.assert_close(f.rotate(w, 0 * a), w)


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=lambda f: f.name)
def test_teleport_ends_at_a_stationary_point_with_the_value_it_began_with(f):
    w = points()
    best = f.teleport(w, steps=200)
    torch.testing.assert_close(f.value(best), f.value(w))
    assert bool((f.gradient_norm(best) >= f.gradient_norm(w) * (1 - 1e-12)).all())
    assert float((f.slope(best).abs() / f.gradient_norm(best)).max()) < 1e-6


@pytest.mark.parametrize("name", ["ellipse", "booth"])
def test_on_quadratics_the_best_gradient_is_the_top_eigenvector_of_the_hessian(name):
    f = function(name)
    best = f.teleport(points(), steps=200)
    J = f.jacobian(best[0])
    hessian = 2 * J.mT @ J
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    direction = f.gradient(best) / f.gradient(best).norm(dim=-1, keepdim=True)
    torch.testing.assert_close((direction @ vectors[:, -1]).abs(), torch.ones(len(best)).double(), rtol=1e-8, atol=0)
    # ‖∇L‖² = 2 λ L there: no point of the level set has more.
    torch.testing.assert_close(f.gradient_norm(best), 2 * eigenvalues[-1] * f.value(best), rtol=1e-8, atol=0)


def test_unknown_functions_are_named():
    with pytest.raises(ConfigError, match="ellipse, booth, rosenbrock"):
        function("sphere")
