"""Losses of an MLP's output, with the first two derivatives that hand-written passes need.

Column convention: outputs are ``[..., o, n]``, one column per sample, with any leading batch
dimensions; a loss gives one value for each network of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metatele.errors import ConfigError, ShapeMismatchError


class Loss(ABC):
    """A loss ``L(y)`` of outputs ``y [..., o, n]``, one column per sample, given targets.

    A subclass gives the value ``[...]``, the gradient ``∂L/∂y`` and products with ``∂²L/∂y²``, both ``[..., o, n]``.

    Attributes:
        name: As in tables and messages.

    Example:
        >>> loss: Loss = SquaredError()
        >>> loss.drift(torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.zeros(1, 1))  # from 2 to 4.5
        tensor(1.2500)
    """

    name: ClassVar[str]

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``L(y)``, one number for each network; differentiable.

        Args:
            outputs: y ``[..., o, n]``.
            targets: As the loss takes them.

        Returns:
            ``[...]``.
        """

    @abstractmethod
    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``∂L/∂y``.

        Args:
            outputs: y ``[..., o, n]``.
            targets: As the loss takes them.

        Returns:
            ``[..., o, n]``.
        """

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """``(∂²L/∂y²) r``, ``[..., o, n]``.

        Args:
            outputs: y ``[..., o, n]``.
            targets: As the loss takes them.
            direction: r ``[..., o, n]``.
        """

    def check(self, targets: Tensor, outputs: int, inputs: Tensor) -> None:
        """Refuse targets that do not fit a network.

        Args:
            targets: As the loss takes them.
            outputs: Number of the network's outputs, o.
            inputs: ``[..., d, n]``.

        Raises:
            ShapeMismatchError: Their shape does not.
            ConfigError: Their dtype or values do not.
        """
        if targets.shape[-2:] != (outputs, inputs.shape[-1]):
            raise ShapeMismatchError(
                f"targets must be [..., {outputs}, {inputs.shape[-1]}], a column per sample, got {list(targets.shape)}"
            )
        if targets.dtype != inputs.dtype:
            raise ConfigError(f"targets must be {inputs.dtype} as the inputs are, got {targets.dtype}")

    def drift(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """Relative change ``|L(after) - L(before)| / |L(before)|`` between two outputs.

        Args:
            before: Outputs ``[..., o, n]``, whose loss is the reference.
            after: Outputs of the same shape.
            targets: As the loss takes them.

        Returns:
            ``[...]``; very large where the reference is zero.
        """
        return relative_change(self.value(before, targets), self.value(after, targets))


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """``|L' - L| / |L|``; very large where L is zero."""
    return (after - before).abs() / before.abs().clamp_min(torch.finfo(before.dtype).tiny)


@dataclass(frozen=True)
class SquaredError(Loss):
    """``½‖y - t‖²``, summed over outputs and samples, for targets ``[..., o, n]``.

    The inner loss of Zhao et al. 2024, Figure 6, whose text leaves the ½ out.

    Example:
        >>> SquaredError().value(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(2.5000)
    """

    name: ClassVar[str] = "squared-error"

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        return 0.5 * (outputs - targets).square().sum((-2, -1))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``y - t``."""
        return outputs - targets

    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """``r``."""
        return direction


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """``mean((y - t)²)`` over outputs and samples, as ``nn.MSELoss``, for targets ``[..., o, n]``.

    Example:
        >>> MeanSquaredError().value(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(2.5000)
    """

    name: ClassVar[str] = "mse"

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        return (outputs - targets).square().mean((-2, -1))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``2 (y - t)/(o n)``."""
        return (outputs - targets) * (2 / (outputs.shape[-1] * outputs.shape[-2]))

    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """``2 r/(o n)``."""
        return direction * (2 / (direction.shape[-1] * direction.shape[-2]))


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Mean over samples of ``-log softmax(y)_t`` for class indices t ``[..., n]`` of dtype int64, in nats.

    Example:
        >>> loss = CrossEntropy()
        >>> loss.value(torch.zeros(10, 3), torch.tensor([1, 5, 9]))
        tensor(2.3026)
    """

    name: ClassVar[str] = "cross-entropy"

    def check(self, targets: Tensor, outputs: int, inputs: Tensor) -> None:
        """Refuse what are no class indices ``[..., n]``.

        Args:
            targets: Class indices.
            outputs: Number of classes o.
            inputs: ``[..., d, n]``.

        Raises:
            ShapeMismatchError: There is not one for each sample.
            ConfigError: They are not of dtype int64, or no classes; values on a GPU are not looked at.
        """
        if targets.dim() < 1 or targets.shape[-1] != inputs.shape[-1]:
            raise ShapeMismatchError(
                f"targets must be class indices [..., {inputs.shape[-1]}], one per sample, got {list(targets.shape)}"
            )
        if targets.dtype != torch.int64:
            raise ConfigError(f"targets must be class indices of dtype torch.int64, got {targets.dtype}")
        # Not on a GPU, where looking at values would wait for it.
        if not targets.is_cuda and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
            raise ConfigError(
                f"class indices must lie from 0 to {outputs - 1}, got {int(targets.min())} to {int(targets.max())}"
            )

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        index = targets.unsqueeze(-2).expand(*outputs.shape[:-2], 1, outputs.shape[-1])
        return (outputs.logsumexp(-2) - outputs.gather(-2, index).squeeze(-2)).mean(-1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(softmax(y) - onehot(t))/n``."""
        index = targets.unsqueeze(-2).expand(*outputs.shape[:-2], 1, outputs.shape[-1])
        p = outputs.softmax(-2)
        return p.scatter_add(-2, index, p.new_full((), -1.0).expand(index.shape)).div_(outputs.shape[-1])

    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """``p∘(r - pᵀr)/n`` in each column, with p the softmax."""
        p = outputs.softmax(-2)
        return p * (direction - (p * direction).sum(-2, keepdim=True)) / outputs.shape[-1]


@dataclass(frozen=True)
class FixedGradient(Loss):
    """The linear loss ``⟨t, y⟩``: its gradient is its target.

    A teleport that keeps the outputs keeps ``∂L/∂y`` too, whatever the loss. So on an orbit the
    gradient recorded in a backward pass stands for the loss it came from.

    Example:
        >>> FixedGradient().gradient(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    name: ClassVar[str] = "fixed-gradient"

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        return (outputs * targets).sum((-2, -1))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The target."""
        return targets.expand_as(outputs)

    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(direction)

    def drift(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """Change of the outputs relative to how much they vary over the samples, as the loss is not known.

        A common offset of the outputs would hide changes that matter, so each output's mean is left out;
        for a single sample it is not.
        """
        varying = before - before.mean(-1, keepdim=True) if before.shape[-1] > 1 else before
        size = varying.norm(dim=(-2, -1)).clamp_min(torch.finfo(before.dtype).tiny)
        return (after - before).norm(dim=(-2, -1)) / size


@dataclass(frozen=True)
class Differentiable(Loss):
    """Any function ``f(outputs, targets)`` in PyTorch's own layout, by automatic differentiation.

    Args:
        function: Takes outputs ``[n, o]`` (one *row* per sample) and targets; returns a scalar. It sees
            one network at a time.

    Example:
        >>> loss = Differentiable(torch.nn.functional.mse_loss)
        >>> loss.gradient(torch.ones(1, 2), torch.zeros(2, 1))
        tensor([[1., 1.]])
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: ClassVar[str] = "differentiable"

    def check(self, targets: Tensor, outputs: int, inputs: Tensor) -> None:
        """Whatever the function takes."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        self._check(outputs)
        return self.function(outputs.mT, targets)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """By one backward pass.

        Args:
            outputs: y ``[o, n]``, of one network.
            targets: As the function takes them.

        Raises:
            ConfigError: There is more than one network, or the function cannot be differentiated in the outputs.
        """
        self._check(outputs)
        with torch.enable_grad():
            point = outputs.detach().requires_grad_()
            value = self.function(point.mT, targets)
            if not (isinstance(value, Tensor) and value.requires_grad):
                raise ConfigError("the loss function must be differentiable in the outputs")
            (gradient,) = torch.autograd.grad(value, point)
        return gradient

    def curvature(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """By two backward passes."""
        self._check(outputs)
        with torch.enable_grad():
            point = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(point.mT, targets), point, create_graph=True)
            if not gradient.requires_grad:  # a linear function
                return torch.zeros_like(direction)
            (product,) = torch.autograd.grad(gradient, point, direction, allow_unused=True)
        return torch.zeros_like(direction) if product is None else product

    def _check(self, outputs: Tensor) -> None:
        if outputs.ndim != 2:
            raise ConfigError(
                f"a loss given as a function sees one network at a time, got outputs of shape {tuple(outputs.shape)}"
            )


KINDS = ("squared", "logistic", "cross-entropy")


def kind(outputs: Tensor, gradient: Tensor) -> str | None:
    r"""What a loss is a sum of over outputs and samples, from its gradient ``∂L/∂y`` alone, for all of ``[..., o, n]``.

    - ``cross-entropy``, if ``∂L/∂y = s (softmax(y) - onehot)`` in every column, with any s;
    - ``logistic``, if ``∂L/∂y = s (sigmoid(y) - t)`` with t zero or one;
    - else a ``squared`` error, as near the minimum of every smooth loss.

    Args:
        outputs: y ``[..., o, n]``.
        gradient: ``∂L/∂y``, of the same shape.

    Returns:
        One of :data:`KINDS`; ``None`` if not all networks have the same.

    Example:
        >>> y, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> kind(y, CrossEntropy().gradient(y, labels))
        'cross-entropy'
    """
    if outputs.shape[-2:].numel() < 4:  # too few numbers to tell one loss from another
        return "squared"
    size = gradient.square().sum((-2, -1))
    found = [_is_multiple(gradient, outputs.sigmoid() - (gradient < 0).to(outputs.dtype), size)]
    if outputs.shape[-2] > 1:
        p = outputs.softmax(-2)
        index = gradient.argmin(-2, keepdim=True)
        guess = p.scatter_add(-2, index, -torch.ones_like(p[..., :1, :]))
        found.append(_is_multiple(gradient, guess, size))
    # Of each network the last one that holds.
    told = zip(*torch.stack(found).reshape(len(found), -1).tolist(), strict=True)
    values = {max((n + 1 for n, holds in enumerate(one) if holds), default=0) for one in told}
    return KINDS[values.pop()] if len(values) == 1 else None


def level(outputs: Tensor, gradient: Tensor, which: str | None = None) -> Tensor:
    r"""Log of a mean loss, up to a constant, from what its gradient alone tells: ``[...]``.

    The constant does not depend on the number of samples n, if the loss is a mean over them; of a squared error's sum
    it grows like ``2 log n``.

    Args:
        outputs: y ``[..., o, n]``.
        gradient: ``∂L/∂y``.
        which: Its :func:`kind`, if that is known; a squared error is taken as ``L ∝ ‖∂L/∂y‖²``.

    Example:
        >>> y, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> loss = CrossEntropy()
        >>> torch.allclose(level(y, loss.gradient(y, labels)), loss.value(y, labels).log())
        True
    """
    if which is None and outputs.ndim > 2:
        return torch.stack([level(y, g) for y, g in zip(outputs, gradient, strict=True)])
    which = which or kind(outputs, gradient)
    if which == "cross-entropy":
        # A column's one negative entry is its label's; none is left where the label's probability rounds to one.
        found = (outputs.mT.log_softmax(-1) * (gradient.mT < 0)).sum((-2, -1)) / -outputs.shape[-1]
    elif which == "logistic":
        found = torch.nn.functional.softplus(torch.where(gradient < 0, -outputs, outputs)).sum(-2).mean(-1)
    else:
        found = gradient.square().sum((-2, -1)) * outputs.shape[-1]
    return found.clamp_min(torch.finfo(outputs.dtype).tiny).log()


def _is_multiple(gradient: Tensor, guess: Tensor, size: Tensor) -> Tensor:
    """Whether the gradient is a positive multiple of a guess, to rounding."""
    product, square = (gradient * guess).sum((-2, -1)), guess.square().sum((-2, -1))
    return (product > 0) & (product.square() >= (1 - 1e-4) * square * size)
