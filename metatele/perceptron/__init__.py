"""Batched functional perceptrons: shapes, activations with inverse and derivatives, losses, passes by hand."""

from metatele.perceptron.activations import (
    Activation,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    activation,
)
from metatele.perceptron.losses import (
    CrossEntropy,
    Differentiable,
    FixedGradient,
    Loss,
    MeanSquaredError,
    SquaredError,
)
from metatele.perceptron.mlp import MLP, Pass, Weights

__all__ = [
    "MLP",
    "Activation",
    "CrossEntropy",
    "Differentiable",
    "FixedGradient",
    "Identity",
    "LeakyReLU",
    "Loss",
    "MeanSquaredError",
    "Pass",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "SquaredError",
    "Tanh",
    "Weights",
    "activation",
]
