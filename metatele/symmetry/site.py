"""A pair of layers around hidden units, on data: what an action of the group takes, and what it gives."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from metatele.perceptron.activations import Activation
from metatele.perceptron.mlp import affine
from metatele.symmetry.least_squares import (
    DampedInverse,
)


class Pair(NamedTuple):
    """Incoming weights ``V [..., k, d]``, outgoing ``U [..., o, k]``, bias ``[..., k]`` of V.

    Example:
        >>> import torch
        >>> from metatele.perceptron.activations import ReLU
        >>> pair = Pair(V=torch.tensor([[2.0], [-1.0]]), U=torch.tensor([[10.0, 100.0]]))
        >>> pair.output(torch.tensor([[1.0, -1.0]]), ReLU())
        tensor([[ 20., 100.]])
    """

    V: Tensor
    U: Tensor
    bias: Tensor | None = None

    def output(self, inputs: Tensor, activation: Activation) -> Tensor:
        """``U f(V H + b)`` for inputs ``[..., d, n]``."""
        return self.U @ activation(affine(self.V, self.bias, inputs))


class Acted(NamedTuple):
    """A moved pair and its drift.

    Attributes:
        pair: The new weights.
        drift: ``‖U'f(Z') - U f(Z)‖_F / ‖U f(Z)‖_F`` on the given inputs, shape ``[...]``.

    Example:
        >>> import torch
        >>> from metatele.symmetry import Rescaling
        >>> from metatele.perceptron.activations import ReLU
        >>> from metatele.symmetry.group import direct
        >>> pair = Pair(V=torch.ones(1, 1), U=torch.ones(1, 1))
        >>> acted = Rescaling().act(pair, torch.ones(1, 2), direct(torch.ones(1, 1)), ReLU())
        >>> acted.pair.V, acted.pair.U, acted.drift
        (tensor([[2.]]), tensor([[0.5000]]), tensor(0.))
    """

    pair: Pair
    drift: Tensor


class Site:
    """A pair of layers on a batch, as an action sees it; what is asked for is computed once.

    Args:
        pair: The weights around the hidden layer.
        inputs: ``H``, ``[..., d, n]``, one column per sample.
        activation: Between the two layers.
        prepared: :meth:`Action.prepare` of the inputs, if it is known.
        known: ``pre``, ``hidden`` and ``slope``, if they are known.

    Example:
        >>> import torch
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> site = Site(Pair(torch.tensor([[2.0]]), torch.ones(1, 1)), torch.tensor([[1.0, -1.0]]), LeakyReLU(0.1))
        >>> site.pre, site.hidden, site.slope
        (tensor([[ 2., -2.]]), tensor([[ 2.0000, -0.2000]]), tensor([[1.0000, 0.1000]]))
    """

    def __init__(
        self, pair: Pair, inputs: Tensor, activation: Activation, prepared: Tensor | None = None, **known: Tensor
    ) -> None:
        self.pair, self.inputs, self.activation, self.prepared = pair, inputs, activation, prepared
        self.__dict__.update(known)
        self._fits: dict[float, DampedInverse] = {}

    @cached_property
    def pre(self) -> Tensor:
        """``Z = VH + b``, ``[..., k, n]``."""
        return affine(self.pair.V, self.pair.bias, self.inputs)

    @cached_property
    def hidden(self) -> Tensor:
        """``f(Z)``, ``[..., k, n]``."""
        return self.activation(self.pre)

    @cached_property
    def slope(self) -> Tensor:
        """``f'(Z)``, ``[..., k, n]``."""
        return self.activation.derivative(self.pre)

    def fit(self, damping: float) -> DampedInverse:
        """The damped inverse of ``f(Z)``."""
        if damping not in self._fits:
            self._fits[damping] = DampedInverse.of(self.hidden, damping)
        return self._fits[damping]

    def fitted(self, other: Site) -> Site:
        """This hidden layer, with the inverses that are known of one that is the same to rounding."""
        self._fits = other._fits
        return self

    def between(self, pair: Pair) -> Site:
        """The same hidden layer with other weights behind it."""
        other = copy.copy(self)
        other.pair = pair
        return other
