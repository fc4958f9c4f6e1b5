"""Functional multi-layer perceptrons on batched weights.

Column convention of the paper: ``h_0 = X``, ``h_m = f(W_m h_{m-1} + b_m)``, last layer linear,
with one *column* per sample. Every tensor may carry leading batch dimensions, one entry for each
network that advances at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.activations import Activation
from metatele.errors import ConfigError, ShapeMismatchError


class Weights(NamedTuple):
    """Parameters of an MLP.

    Attributes:
        matrices: ``W_m`` of shape ``[..., out, in]``, the shape of ``nn.Linear.weight``.
        biases: ``b_m`` of shape ``[..., out]``, or ``None`` for a layer without bias.
    """

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


def affine(matrix: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """``W h + b`` for columns ``h``: ``[..., out, in], [..., in, n] -> [..., out, n]``."""
    product = matrix @ inputs
    return product if bias is None else product + bias.unsqueeze(-1)


@dataclass(frozen=True)
class MLP:
    """Shape of a perceptron; the weights are passed to each method.

    Args:
        widths: Sizes from input to output, at least two.
        activation: Applied after every layer but the last.
        bias: Whether layers have a bias.

    Example:
        >>> from metatele.activations import LeakyReLU
        >>> mlp = MLP((3, 4, 2), LeakyReLU(0.1))
        >>> flat = torch.zeros(5, mlp.num_parameters)  # five networks
        >>> mlp.forward(mlp.unflatten(flat), torch.ones(5, 3, 7)).shape
        torch.Size([5, 2, 7])
    """

    widths: tuple[int, ...]
    activation: Activation
    bias: bool = False

    def __post_init__(self) -> None:
        """Check sizes."""
        if len(self.widths) < 2 or any(w < 1 for w in self.widths):
            raise ConfigError(f"widths must be at least two positive sizes, got {self.widths}")

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Sizes of the hidden layers, the ones the symmetry acts on."""
        return self.widths[1:-1]

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Parameter shapes in the order of ``nn.Sequential(...).parameters()``."""
        shapes: list[tuple[int, ...]] = []
        for fan_in, fan_out in pairwise(self.widths):
            shapes.append((fan_out, fan_in))
            if self.bias:
                shapes.append((fan_out,))
        return tuple(shapes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        """Number of scalars in one network."""
        return sum(self._sizes)

    def unflatten(self, flat: Tensor) -> Weights:
        """Views of a flat vector ``[..., num_parameters]`` as weights.

        Raises:
            ShapeMismatchError: The last dimension is not ``num_parameters``.
        """
        if flat.shape[-1] != self.num_parameters:
            raise ShapeMismatchError(
                f"expected {self.num_parameters} parameters for widths {self.widths}, got {flat.shape[-1]}"
            )
        parts = [
            part.unflatten(-1, shape) if len(shape) == 2 else part
            for part, shape in zip(flat.split(self._sizes, -1), self.shapes, strict=True)
        ]
        if not self.bias:
            return Weights(tuple(parts), (None,) * len(parts))
        return Weights(tuple(parts[::2]), tuple(parts[1::2]))

    def flatten(self, weights: Weights) -> Tensor:
        """Inverse of :meth:`unflatten`."""
        parts: list[Tensor] = []
        for matrix, bias in zip(weights.matrices, weights.biases, strict=True):
            parts.append(matrix.flatten(-2))
            if bias is not None:
                parts.append(bias)
        return torch.cat(parts, -1)

    def forward(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Output for inputs of shape ``[..., in, n]``."""
        return affine(weights.matrices[-1], weights.biases[-1], self.layer_inputs(weights, inputs)[-1])

    def layer_inputs(self, weights: Weights, inputs: Tensor) -> list[Tensor]:
        """``h_0 … h_{L-1}``: what each layer receives."""
        hidden = [inputs]
        for matrix, bias in zip(weights.matrices[:-1], weights.biases[:-1], strict=True):
            hidden.append(self.activation(affine(matrix, bias, hidden[-1])))
        return hidden

    def squared_error(self, weights: Weights, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        r"""Loss :math:`½‖Y - W_L h_{L-1}‖²_F` and its gradient, by hand-written backpropagation.

        Writing the backward pass out costs one pass without a tape, which is what makes the
        inner loop of meta-training cheap. The result is not attached to an autograd graph.

        Args:
            weights: Weights with any batch dimensions.
            inputs: ``[..., in, n]``.
            targets: ``[..., out, n]``.

        Returns:
            Loss ``[...]`` and flat gradient ``[..., num_parameters]``.

        Example:
            >>> from metatele.activations import Identity
            >>> mlp = MLP((1, 1), Identity())
            >>> w = mlp.unflatten(torch.tensor([3.0]))
            >>> mlp.squared_error(w, torch.tensor([[2.0]]), torch.tensor([[1.0]]))
            (tensor(12.5000), tensor([10.]))
        """
        with torch.no_grad():
            pre: list[Tensor] = []
            hidden = [inputs]
            for matrix, bias in zip(weights.matrices[:-1], weights.biases[:-1], strict=True):
                pre.append(affine(matrix, bias, hidden[-1]))
                hidden.append(self.activation(pre[-1]))
            error = affine(weights.matrices[-1], weights.biases[-1], hidden[-1]) - targets
            loss = 0.5 * error.square().sum((-2, -1))
            gradients: list[Tensor] = []
            for layer in reversed(range(len(weights.matrices))):
                if self.bias:
                    gradients.append(error.sum(-1))
                gradients.append((error @ hidden[layer].mT).flatten(-2))
                if layer:
                    error = (weights.matrices[layer].mT @ error) * self.activation.derivative(pre[layer - 1])
            return loss, torch.cat(gradients[::-1], -1)


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, point, value, gradient):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return grad_output.unsqueeze(-1) * gradient, None, None


def attach_gradient(point: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a differentiable function of ``point`` whose gradient is already known.

    Lets an unroll use one forward and backward pass of the inner network both as the optimizer's
    input and as the derivative of the meta-loss.

    Args:
        point: ``[..., P]``, where value and gradient were computed.
        value: ``[...]``.
        gradient: ``[..., P]``, treated as a constant.
    """
    return _AttachGradient.apply(point, value, gradient)
