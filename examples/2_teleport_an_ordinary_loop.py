"""Teleport an ordinary loop
============================

Move eight networks along their loss level sets and see what changes: the gradient, not the loss.
"""

import torch

from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.mlp import MLP
from metatele.symmetry import Exact, exponential, random_algebra, sweep

generator = torch.Generator().manual_seed(0)
mlp = MLP((20, 20, 20), LeakyReLU(0.1))
X, Y = torch.rand(8, 20, 20, generator=generator).double(), torch.rand(8, 20, 20, generator=generator).double()
weights = mlp.unflatten(torch.rand(8, mlp.num_parameters, generator=generator).double())

print("norm of T   relative change of the loss   relative change of the gradient")
before, gradient = mlp.squared_error(weights, X, Y)
for norm in (0.01, 0.1, 0.5):
    T = random_algebra((8, 20, 20), norm, generator, torch.float64)
    moved = sweep(Exact(), mlp, weights, X, [exponential(T)])
    after, new_gradient = mlp.squared_error(moved, X, Y)
    loss_change = ((after - before).abs() / before).max()
    gradient_change = ((new_gradient - gradient).norm(dim=-1) / gradient.norm(dim=-1)).mean()
    print(f"{norm:9.2f}   {float(loss_change):27.1e}   {float(gradient_change):31.2f}")
