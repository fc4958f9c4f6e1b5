"""Functional multi-layer perceptrons on batched weights.

Column convention of the paper: ``h_0 = X``, ``h_m = f(W_m h_{m-1} + b_m)``, last layer linear,
with one *column* per sample. Every tensor may carry leading batch dimensions, one entry for each
network that advances at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.perceptron.activations import Activation
from metatele.perceptron.losses import Loss, SquaredError


class Weights(NamedTuple):
    """Parameters of an MLP.

    Attributes:
        matrices: ``W_m`` of shape ``[..., out, in]``, the shape of ``nn.Linear.weight``.
        biases: ``b_m`` of shape ``[..., out]``, or ``None`` for a layer without bias.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> W, b = MLP((2, 1), Identity(), biases=True).unflatten(torch.tensor([1.0, 2.0, 3.0]))
        >>> W[0], b[0]
        (tensor([[1., 2.]]), tensor([3.]))
    """

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; networks that share ``right`` (its dimension -3 is 1) share one larger product.

    Args:
        left: ``[..., m, a, b]``.
        right: ``[..., 1, b, c]`` to share it, or anything that ``@`` takes.

    Returns:
        ``[..., m, a, c]``.

    Example:
        >>> product(torch.ones(5, 2, 3), torch.ones(1, 3, 4)).shape
        torch.Size([5, 2, 4])
    """
    if left.ndim > 3 and left.ndim == right.ndim and right.shape[-3] == 1 < left.shape[-3]:
        return (left.flatten(-3, -2) @ right.squeeze(-3)).unflatten(-2, left.shape[-3:-1])
    return left @ right


def affine(matrix: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """``W h + b`` for columns ``h``: ``[..., out, in], [..., out], [..., in, n] -> [..., out, n]``.

    Example:
        >>> affine(torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([[3.0, 4.0]]))
        tensor([[7., 9.]])
    """
    result = product(matrix, inputs)
    return result if bias is None else result + bias.unsqueeze(-1)


@dataclass(frozen=True, init=False)
class MLP:
    """Shape of a perceptron; the weights are passed to each method.

    Args:
        widths: Sizes from input to output, at least two.
        activations: Applied after every layer but the last: one for all, or one for each hidden layer.
        biases: Whether layers have a bias: one answer for all, or one for each layer.

    Raises:
        ConfigError: Fewer than two widths, one that is not positive, or another number of activations or biases.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> mlp = MLP((3, 4, 2), LeakyReLU(0.1))
        >>> flat = torch.zeros(5, mlp.num_parameters)  # five networks
        >>> mlp.forward(mlp.unflatten(flat), torch.ones(5, 3, 7)).shape
        torch.Size([5, 2, 7])
    """

    widths: tuple[int, ...]
    activations: tuple[Activation, ...]
    biases: tuple[bool, ...]

    def __init__(
        self,
        widths: Sequence[int],
        activations: Activation | Sequence[Activation],
        biases: bool | Sequence[bool] = False,
    ) -> None:
        if len(widths) < 2 or any(w < 1 for w in widths):
            raise ConfigError(f"widths must be at least two positive sizes, got {tuple(widths)}")
        layers = len(widths) - 1
        between = (activations,) * (layers - 1) if isinstance(activations, Activation) else tuple(activations)
        biased = (biases,) * layers if isinstance(biases, bool) else tuple(biases)
        if len(between) != layers - 1 or len(biased) != layers:
            raise ConfigError(
                f"widths {tuple(widths)} need {layers - 1} activations and {layers} biases, "
                f"got {len(between)} and {len(biased)}"
            )
        object.__setattr__(self, "widths", tuple(widths))
        object.__setattr__(self, "activations", between)
        object.__setattr__(self, "biases", biased)

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Sizes of the hidden layers, the ones the symmetry acts on."""
        return self.widths[1:-1]

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Parameter shapes in the order of ``nn.Sequential(...).parameters()``."""
        shapes: list[tuple[int, ...]] = []
        for (fan_in, fan_out), bias in zip(pairwise(self.widths), self.biases, strict=True):
            shapes.append((fan_out, fan_in))
            if bias:
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
        parts = iter(zip(flat.split(self._sizes, -1), self.shapes, strict=True))
        matrices: list[Tensor] = []
        biases: list[Tensor | None] = []
        for has_bias in self.biases:
            part, shape = next(parts)
            matrices.append(part.unflatten(-1, shape))
            biases.append(next(parts)[0] if has_bias else None)
        return Weights(tuple(matrices), tuple(biases))

    def usual_weights(self, uniform: Tensor) -> Weights:
        """Initial weights as those of ``nn.Linear``, uniform on ``±1/√fan_in``, biases too.

        Args:
            uniform: Draws from [0, 1], ``[..., num_parameters]``.
        """
        drawn = self.unflatten(uniform)
        bounds = [1 / math.sqrt(fan_in) for fan_in in self.widths[:-1]]
        return Weights(
            tuple((2 * W - 1) * bound for W, bound in zip(drawn.matrices, bounds, strict=True)),
            tuple(None if b is None else (2 * b - 1) * bound for b, bound in zip(drawn.biases, bounds, strict=True)),
        )

    def flatten(self, weights: Weights) -> Tensor:
        """Inverse of :meth:`unflatten`: ``[..., num_parameters]``, a copy."""
        parts: list[Tensor] = []
        for matrix, bias in zip(weights.matrices, weights.biases, strict=True):
            parts.append(matrix.flatten(-2))
            if bias is not None:
                parts.append(bias)
        return torch.cat(parts, -1)

    def forward(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Outputs ``W_L h_{L-1} + b_L``; differentiable.

        Args:
            weights: Weights with any batch dimensions.
            inputs: ``[..., in, n]``, one column per sample.

        Returns:
            ``[..., out, n]``.
        """
        return affine(weights.matrices[-1], weights.biases[-1], self.layer_inputs(weights, inputs)[-1])

    def layer_inputs(self, weights: Weights, inputs: Tensor) -> list[Tensor]:
        """``h_0 … h_{L-1}``, each ``[..., width, n]``: what each layer receives; differentiable."""
        hidden = [inputs]
        for matrix, bias, activation in zip(weights.matrices[:-1], weights.biases[:-1], self.activations, strict=True):
            hidden.append(activation(affine(matrix, bias, hidden[-1])))
        return hidden

    def squared_error(self, weights: Weights, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        r"""Loss :math:`½‖Y - W_L h_{L-1}‖²_F` and its gradient; see :meth:`value_and_gradient`.

        Example:
            >>> from metatele.perceptron.activations import Identity
            >>> mlp = MLP((1, 1), Identity())
            >>> w = mlp.unflatten(torch.tensor([3.0]))
            >>> mlp.squared_error(w, torch.tensor([[2.0]]), torch.tensor([[1.0]]))
            (tensor(12.5000), tensor([10.]))
        """
        return self.value_and_gradient(weights, inputs, targets, SquaredError())

    @torch.no_grad()
    def value_and_gradient(
        self, weights: Weights, inputs: Tensor, targets: Tensor, loss: Loss
    ) -> tuple[Tensor, Tensor]:
        """A loss and its gradient, by hand-written backpropagation.

        Writing the backward pass out costs one pass without a tape, which is what makes the
        inner loop of meta-training cheap. The result is not attached to an autograd graph.

        Args:
            weights: Weights with any batch dimensions.
            inputs: ``[..., in, n]``.
            targets: As the loss takes them.
            loss: Of the output.

        Returns:
            Loss ``[...]`` and flat gradient ``[..., num_parameters]``.
        """
        done = Pass(self, weights, inputs)
        done.backward(targets, loss)
        return loss.value(done.pre[-1], targets), self.flatten(done.gradient())


class Pass:
    """A forward pass, and if asked a backward one, kept for what can be computed from them.

    Args:
        mlp: Shape of the networks.
        weights: With any batch dimensions.
        inputs: ``[..., in, n]``.
        known: ``z_m`` and ``h_m`` of the first hidden layers, if they are known.

    Attributes:
        pre: ``z_1 … z_L``.
        hidden: ``h_0 … h_{L-1}``.
        errors: ``∂L/∂z_1 … ∂L/∂z_L``, after :meth:`backward`.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> line = MLP((1, 1), Identity())
        >>> done = Pass(line, line.unflatten(torch.tensor([3.0])), torch.tensor([[2.0]]))
        >>> done.backward(torch.tensor([[1.0]]), SquaredError())
        >>> done.gradient().matrices[0]
        tensor([[10.]])
    """

    @torch.no_grad()
    def __init__(self, mlp: MLP, weights: Weights, inputs: Tensor, known: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.mlp, self.weights = mlp, weights
        self.pre = [pre for pre, _ in known]
        self.hidden = [inputs, *(hidden for _, hidden in known)]
        self.errors: list[Tensor] = []
        layers = list(zip(weights.matrices, weights.biases, strict=True))
        for layer, (matrix, bias) in enumerate(layers[len(known) :], len(known)):
            self.pre.append(affine(matrix, bias, self.hidden[-1]))
            if layer < len(mlp.activations):
                self.hidden.append(mlp.activations[layer](self.pre[-1]))

    @torch.no_grad()
    def backward(self, targets: Tensor, loss: Loss) -> None:
        """Propagate the loss's derivative back to every layer: fills :attr:`errors`.

        Args:
            targets: As the loss takes them.
            loss: Of the outputs.
        """
        self._targets, self._loss = targets, loss
        error = loss.gradient(self.pre[-1], targets)
        self.errors = [error]
        self._back: list[Tensor] = []  # the errors before the activation's derivative
        for layer in reversed(range(1, len(self.pre))):
            back = self.weights.matrices[layer].mT @ error
            error = back * self.slopes[layer - 1]
            self._back.insert(0, back)
            self.errors.insert(0, error)

    @cached_property
    def slopes(self) -> list[Tensor]:
        """``f'(z_m)`` of the hidden layers."""
        return [f.derivative(z) for f, z in zip(self.mlp.activations, self.pre, strict=False)]

    @torch.no_grad()
    def gradient(self) -> Weights:
        """``∂L/∂w`` in the shape of the weights: ``∂L/∂W_m = Σ δ_m h_{m-1}ᵀ`` over samples; after :meth:`backward`."""
        pairs = list(zip(self.errors, self.hidden, strict=True))
        return Weights(
            tuple(product(error, h.mT) for error, h in pairs),
            tuple(e.sum(-1) if biased else None for e, biased in zip(self.errors, self.mlp.biases, strict=True)),
        )

    @torch.no_grad()
    def hessian_product(self, direction: Weights) -> Weights:
        r"""``(∂²L/∂w²) v`` in the shape of the weights, by one forward and one backward sweep of tangents.

        With ``R`` the derivative along v (Pearlmutter 1994): ``Rz = V h + W Rh``, ``Rh = f'(z) Rz``, and
        backwards the derivative of every line of backpropagation.

        Args:
            direction: ``v`` in the shape of the weights.
        """
        moving: list[Tensor | None] = [None]  # R h of each layer's input; the data do not move
        r_pre: list[Tensor] = []
        for layer, v in enumerate(direction.matrices):
            r = affine(v, direction.biases[layer], self.hidden[layer])
            flowing = moving[layer]
            r_pre.append(r if flowing is None else r + self.weights.matrices[layer] @ flowing)
            if layer < len(self.slopes):
                moving.append(self.slopes[layer] * r_pre[-1])
        r_error = self._loss.curvature(self.pre[-1], self._targets, r_pre[-1])
        matrices: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer in reversed(range(len(self.pre))):
            biases.append(r_error.sum(-1) if self.mlp.biases[layer] else None)
            r_matrix = product(r_error, self.hidden[layer].mT)
            flowing = moving[layer]
            matrices.append(r_matrix if flowing is None else r_matrix + self.errors[layer] @ flowing.mT)
            if layer:
                r_back = direction.matrices[layer].mT @ self.errors[layer] + self.weights.matrices[layer].mT @ r_error
                r_error = r_back * self.slopes[layer - 1]
                activation = self.mlp.activations[layer - 1]
                if not activation.piecewise_linear:
                    bend = activation.derivatives(self.pre[layer - 1])[1]
                    r_error = r_error + self._back[layer - 1] * bend * r_pre[layer - 1]
        return Weights(tuple(matrices[::-1]), tuple(biases[::-1]))


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
