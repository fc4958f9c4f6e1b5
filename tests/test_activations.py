"""Activations: inverses invert, derivatives differentiate, homogeneity is what it says."""

import pytest
import torch

from metatele.errors import ConfigError, NotExactError
from metatele.perceptron.activations import Identity, LeakyReLU, ReLU, Sigmoid, SiLU, Softplus, Tanh, activation

ALL = [Identity(), LeakyReLU(0.1), LeakyReLU(2.0), ReLU(), Tanh(), Sigmoid(), Softplus(), SiLU()]
POINTS = torch.tensor([-3.1, -1.3, -0.2, 0.3, 1.7, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.describe())
def test_derivatives_are_those_of_autograd(f):
    z = POINTS.clone().requires_grad_()
    value = f(z)
    for claimed in f.derivatives(z):
        if value.requires_grad:
            (value,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        else:
            value = torch.zeros_like(z)
        torch.testing.assert_close(claimed, value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(f.derivative(z), f.derivatives(z)[0])


@pytest.mark.parametrize("f", [f for f in ALL if f.invertible], ids=lambda f: f.describe())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_inverts(f, dtype):
    z = POINTS.to(dtype)
    torch.testing.assert_close(f.inverse(f(z)), z, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_softplus_inverse_is_accurate_at_both_ends():
    z = torch.tensor([-30.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(Softplus().inverse(Softplus()(z)), z, rtol=1e-12, atol=0)


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.describe())
def test_homogeneity_is_what_it_says(f):
    same = torch.allclose(f(2.5 * POINTS), 2.5 * f(POINTS), rtol=1e-12)
    assert same == f.positively_homogeneous


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.describe())
def test_specification_round_trips(f):
    assert activation(f.describe()) == f


@pytest.mark.parametrize("f", [ReLU(), SiLU()])
def test_functions_without_inverse_say_why(f):
    with pytest.raises(NotExactError, match="has no inverse"):
        f.inverse(torch.ones(2))


def test_inverse_refuses_values_outside_the_range():
    with pytest.raises(NotExactError, match="range"):
        Tanh().inverse(torch.tensor([1.5]))


@pytest.mark.parametrize("spec", ["gelu", "tanh:2", "leaky_relu:x", "leaky_relu:0", "leaky_relu:-1"])
def test_bad_specifications_are_one_sentence(spec):
    with pytest.raises(ConfigError):
        activation(spec)
