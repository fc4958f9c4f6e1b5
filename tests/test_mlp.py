"""The functional perceptron agrees with torch.nn and with autograd, for any batch shape."""

import pytest
import torch
from torch import nn

from metatele.activations import LeakyReLU, Tanh
from metatele.errors import ConfigError, ShapeMismatchError
from metatele.mlp import MLP, attach_gradient


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_that_of_torch(bias):
    model = nn.Sequential(nn.Linear(3, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 2, bias))
    mlp = MLP((3, 5, 4, 2), Tanh(), bias)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    x = torch.randn(7, 3)
    torch.testing.assert_close(mlp.forward(mlp.unflatten(flat), x.T).T, model(x).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("widths", [(3, 2), (3, 4, 2), (3, 4, 5, 2)])
def test_squared_error_gradient_is_that_of_autograd(widths, batch, bias):
    mlp = MLP(widths, LeakyReLU(0.1), bias)
    flat = torch.randn(*batch, mlp.num_parameters, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(*batch, widths[0], 6).double(), torch.randn(*batch, widths[-1], 6).double()
    loss, gradient = mlp.squared_error(mlp.unflatten(flat.detach()), x, y)
    expected = 0.5 * (y - mlp.forward(mlp.unflatten(flat), x)).square().sum((-2, -1))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), flat)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_flatten_undoes_unflatten(bias):
    mlp = MLP((3, 4, 2), Tanh(), bias)
    flat = torch.randn(5, mlp.num_parameters)
    assert torch.equal(mlp.flatten(mlp.unflatten(flat)), flat)


def test_attached_gradient_is_the_derivative():
    point = torch.randn(3, 2, requires_grad=True)
    gradient = torch.randn(3, 2)
    value = attach_gradient(point, torch.ones(3), gradient)
    (value * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(point.grad, gradient * torch.tensor([[1.0], [2.0], [3.0]]))


def test_wrong_sizes_are_named():
    with pytest.raises(ShapeMismatchError, match="expected 20 parameters"):
        MLP((3, 4, 2), Tanh()).unflatten(torch.zeros(19))
    with pytest.raises(ConfigError, match="widths"):
        MLP((3,), Tanh())
