"""The functional perceptron agrees with torch.nn and with autograd, for any batch shape."""

import pytest
import torch
from torch import nn

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.perceptron.activations import LeakyReLU, Softplus, Tanh
from metatele.perceptron.losses import CrossEntropy, Differentiable, MeanSquaredError, SquaredError
from metatele.perceptron.mlp import MLP, Pass, attach_gradient


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


LOSSES = (SquaredError(), MeanSquaredError(), CrossEntropy(), Differentiable(torch.nn.functional.cross_entropy))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("biases", [False, True, (True, False, True)])
def test_gradient_and_hessian_product_are_those_of_autograd(loss, batch, biases):
    if loss.name == "differentiable" and batch:
        pytest.skip("a loss given as a function sees one network at a time")
    mlp = MLP((3, 5, 4, 6), (Tanh(), Softplus()), biases)
    random = torch.Generator().manual_seed(0)
    flat, v = torch.randn(2, *batch, mlp.num_parameters, dtype=torch.float64, generator=random)
    x = torch.randn(*batch, 3, 7, dtype=torch.float64, generator=random)
    y = torch.randn(*batch, 6, 7, dtype=torch.float64, generator=random)
    targets = y if "squared" in loss.name or loss.name == "mse" else y.argmax(-2)
    flat.requires_grad_()
    outputs = mlp.forward(mlp.unflatten(flat), x)
    reference = {
        "squared-error": lambda: 0.5 * (outputs - targets).square().sum((-2, -1)),
        "mse": lambda: (outputs - targets).square().mean((-2, -1)),
    }.get(loss.name, lambda: -outputs.log_softmax(-2).gather(-2, targets.unsqueeze(-2)).squeeze(-2).mean(-1))()
    (expected,) = torch.autograd.grad(reference.sum(), flat, create_graph=True)
    (product,) = torch.autograd.grad((expected * v).sum(), flat)
    weights = mlp.unflatten(flat.detach())
    value, gradient = mlp.value_and_gradient(weights, x, targets, loss)
    torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-12)
    done = Pass(mlp, weights, x)
    done.backward(targets, loss)
    ours = mlp.flatten(done.hessian_product(mlp.unflatten(v)))
    torch.testing.assert_close(ours, product, rtol=1e-10, atol=1e-12)


def test_networks_that_share_their_data_agree_with_copies_of_it():
    mlp = MLP((6, 5, 3), LeakyReLU(0.1), True)
    flat, v = torch.randn(2, 4, 3, mlp.num_parameters, dtype=torch.float64)
    x, y = torch.randn(4, 1, 6, 7).double(), torch.randint(3, (4, 1, 7))
    weights, directions = mlp.unflatten(flat), mlp.unflatten(v)
    both = ((x, y), (x.expand(4, 3, 6, 7), y.expand(4, 3, 7)))
    shared, copied = (mlp.value_and_gradient(weights, *data, CrossEntropy()) for data in both)
    torch.testing.assert_close(shared, copied, rtol=1e-12, atol=1e-13)
    passes = [Pass(mlp, weights, data[0]) for data in both]
    for done, data in zip(passes, both, strict=True):
        done.backward(data[1], CrossEntropy())
    shared, copied = (mlp.flatten(done.hessian_product(directions)) for done in passes)
    torch.testing.assert_close(shared, copied, rtol=1e-12, atol=1e-13)


def test_one_activation_and_bias_for_each_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, False), nn.LeakyReLU(0.1), nn.Linear(4, 2))
    mlp = MLP((3, 5, 4, 2), (Tanh(), LeakyReLU(0.1)), (True, False, True))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    x = torch.randn(7, 3)
    torch.testing.assert_close(mlp.forward(mlp.unflatten(flat), x.T).T, model(x).detach())
    assert torch.equal(mlp.flatten(mlp.unflatten(flat)), flat)
    assert MLP((3, 5, 2), Tanh(), True) == MLP([3, 5, 2], [Tanh()], [True, True])
    with pytest.raises(ConfigError, match="need 2 activations and 3 biases, got 1 and 3"):
        MLP((3, 5, 4, 2), (Tanh(),))
