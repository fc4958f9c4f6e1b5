"""The loss of a perceptron on one batch, as a function of its flat weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, NotExactError, ShapeMismatchError, SingularInputError
from metatele.network.bias import with_ones
from metatele.network.sequential import describe, read_sequential
from metatele.perceptron.losses import Loss, relative_change
from metatele.perceptron.mlp import MLP, Pass, Weights
from metatele.symmetry import (
    Action,
    Exact,
    GroupElement,
    Pair,
    Site,
    inverse_factor,
    truncated_inverse,
    walk,
)

RANK = 1e-6  # relative: layer inputs below it, in double precision, are rank deficient


@dataclass(frozen=True, init=False)
class Landscape:
    """``w ↦ L(w)`` on fixed data, for any number of networks at the same time.

    Attributes:
        mlp: Shape of the networks. An ``nn.Sequential`` of Linear and activations may be given in its place: its shape
            is taken, its weights are not, so give it to :meth:`at` as well.
        inputs: ``[..., d, n]``, one column per sample; a batch dimension of 1 is shared by the networks.
        targets: As the loss takes them.
        loss: Of the outputs.
        stored: The weights are kept in this dtype: those of a point are rounded to it.

    Raises:
        ShapeMismatchError: Inputs or targets are not of these shapes.
        ConfigError: They are not of one dtype, or the loss is none, or ``mlp`` is neither a shape nor a module.
        UnsupportedModelError: The module is no perceptron; the layer is named.

    Example:
        >>> import torch
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> line = Landscape(MLP((1, 1), Identity()), torch.ones(1, 1), torch.zeros(1, 1), SquaredError())
        >>> line.at(torch.tensor([[3.0], [5.0]])).value
        tensor([ 4.5000, 12.5000])
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> _ = nn.init.constant_(model[0].weight, 3.0)
        >>> Landscape(model, torch.ones(1, 1), torch.zeros(1, 1), SquaredError()).at(model).value
        tensor(4.5000)
    """

    mlp: MLP
    inputs: Tensor
    targets: Tensor
    loss: Loss
    stored: torch.dtype | None = None

    def __init__(
        self, mlp: MLP | nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, stored: torch.dtype | None = None
    ) -> None:
        shape = read_sequential(mlp)[1] if isinstance(mlp, nn.Module) else mlp
        if not isinstance(shape, MLP):
            raise ConfigError(f"mlp must be an MLP or an nn.Sequential, got {type(mlp).__name__}")
        parts = {"mlp": shape, "inputs": inputs, "targets": targets, "loss": loss, "stored": stored}
        for name, value in parts.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        """Whether the parts fit each other."""
        if not isinstance(self.loss, Loss):
            raise ConfigError(
                "loss must be one of metatele.perceptron.losses (a function goes into Differentiable), "
                f"got {self.loss!r}"
            )
        for name in ("inputs", "targets"):
            if not isinstance(getattr(self, name), Tensor):
                raise ConfigError(f"{name} must be a tensor, got {type(getattr(self, name)).__name__}")
        x, d = self.inputs, self.mlp.widths[0]
        if x.dim() < 2 or x.shape[-2] != d or x.shape[-1] < 1:
            hint = ", which is one row per sample: transpose them" if x.dim() == 2 and x.shape[-1] == d else ""
            raise ShapeMismatchError(f"inputs must be [..., {d}, n], one column per sample, got {list(x.shape)}{hint}")
        if not x.is_floating_point():
            raise ConfigError(f"inputs must be floating-point numbers, got {x.dtype}")
        self.loss.check(self.targets, self.mlp.widths[-1], x)

    def at(self, flat: Tensor | nn.Module) -> Point:
        """The loss and its derivatives at weights ``[..., P]``, or at those of a module of this shape.

        Raises:
            ShapeMismatchError: They are not the network's, or there are none.
            ConfigError: Their dtype is not that of the inputs.
            UnsupportedModelError: The module is no perceptron.
        """
        if isinstance(flat, nn.Module):
            linears, shape = read_sequential(flat)
            if shape != self.mlp:
                raise ShapeMismatchError(f"the module must be a {describe(self.mlp)}, got a {describe(shape)}")
            flat = torch.cat([p.detach().flatten() for linear in linears for p in linear.parameters()])
        if not isinstance(flat, Tensor) or flat.dim() < 1 or not flat.numel():
            what = list(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
            raise ShapeMismatchError(f"weights must be [..., {self.mlp.num_parameters}], got {what}")
        if flat.dtype != self.inputs.dtype:
            raise ConfigError(f"weights must be {self.inputs.dtype} as the inputs are, got {flat.dtype}")
        kept = flat.detach() if self.stored is None else flat.detach().to(self.stored).to(flat.dtype)
        point = Point(self, self.mlp.unflatten(kept))
        point.flat = kept
        return point

    def prepared(self, action: Action) -> Tensor | None:
        """What an action needs of the inputs alone, computed once."""
        if action not in self._prepared:
            self._prepared[action] = action.prepare(self.inputs, self.mlp.biases[0])
        return self._prepared[action]

    @cached_property
    def independent(self) -> bool:
        """Whether the samples (of every network) are linearly independent, as the exact action needs them."""
        try:
            self._prepared[Exact(strict=False)] = Exact().prepare(self.inputs, self.mlp.biases[0])
        except (NotExactError, SingularInputError):
            return False
        return True

    @cached_property
    def inverse_factor(self) -> Tensor:
        """``R⁻¹ [..., n, n]`` of the inputs' ``QR`` (with ones below them for a bias), for n ≤ d.

        ``S H⁺ = S R⁻¹ Qᵀ`` has the norm of ``S R⁻¹``.

        Raises:
            SingularInputError: The inputs are rank deficient, by :data:`RANK`.
        """
        return inverse_factor(self._seen, RANK)

    @cached_property
    def full_rank(self) -> bool:
        """Whether :attr:`inverse_factor` exists: the samples are no more than the inputs, and independent."""
        try:
            return self._seen.shape[-1] <= self._seen.shape[-2] and self.inverse_factor is not None
        except SingularInputError:
            return False

    @cached_property
    def truncated_inverse(self) -> Tensor:
        """``H⁺ [..., n, d]`` of the inputs (with ones below them for a bias), whatever their rank."""
        return truncated_inverse(self._seen, RANK)

    @property
    def _seen(self) -> Tensor:
        return with_ones(self.inputs) if self.mlp.biases[0] else self.inputs

    @cached_property
    def _prepared(self) -> dict[Action, Tensor | None]:
        return {}

    def value(self, flat: Tensor) -> Tensor:
        """``L(w)``, ``[...]``; differentiable."""
        return self.loss.value(self.outputs(flat), self.targets)

    def outputs(self, flat: Tensor) -> Tensor:
        """The networks' outputs ``[..., o, n]``; differentiable."""
        return self.mlp.forward(self.mlp.unflatten(flat), self.inputs)


def landscape_given(landscape: Landscape) -> None:
    """Refuse anything else in the place of a landscape.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(landscape, Landscape):
        raise ConfigError(
            "landscape must be a Landscape, such as Landscape(model, inputs.T, targets.T, loss), "
            f"got {type(landscape).__name__}"
        )


def point_given(point: Point) -> None:
    """Refuse anything else in the place of a point.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(point, Point):
        raise ConfigError(f"point must be a Point, such as Landscape(...).at(weights), got {type(point).__name__}")


class Point:
    """A landscape at given weights; passes are made when first needed, and once.

    Args:
        landscape: The landscape.
        weights: The weights, layer by layer.
        sites: Its hidden layers as an action left them, if one led here.

    Example:
        >>> from metatele.perceptron.losses import SquaredError
        >>> line = Landscape(MLP((1, 1), ()), torch.tensor([[2.0]]), torch.zeros(1, 1), SquaredError())
        >>> point = line.at(torch.tensor([3.0]))  # ½(2w)²
        >>> point.value, point.gradient, point.hessian_product(torch.ones(1))
        (tensor(18.), tensor([12.]), tensor([4.]))
    """

    def __init__(self, landscape: Landscape, weights: Weights, sites: Sequence[Site] | None = None) -> None:
        self.landscape, self.weights, self._sites = landscape, weights, sites
        self._like: Sequence[Site] = ()  # of a point of the same weights: what their hidden layers are factorised to

    @cached_property
    def flat(self) -> Tensor:
        """The weights as one vector ``[..., P]``."""
        return self.landscape.mlp.flatten(self.weights)

    @cached_property
    def forward(self) -> Pass:
        """The forward pass; the hidden layers of a point come to by a teleport are those the teleport saw."""
        known = [] if self._sites is None else [(site.pre, site.hidden) for site in self._sites]
        return Pass(self.landscape.mlp, self.weights, self.landscape.inputs, known)

    def sites(self, action: Action) -> list[Site]:
        """Each hidden layer as an action sees it."""
        matrices, done = self.weights.matrices, self.forward
        parts = zip(
            matrices,
            matrices[1:],
            self.weights.biases,
            done.hidden,
            done.hidden[1:],
            done.pre,
            done.slopes,
            strict=False,
        )
        sites = []
        for m, (V, U, bias, inputs, hidden, pre, slope) in enumerate(parts):
            if self._sites is None:
                prepared = self.landscape.prepared(action) if m == 0 else None
                activation = self.landscape.mlp.activations[m]
                site = Site(Pair(V, U, bias), inputs, activation, prepared, pre=pre, hidden=hidden, slope=slope)
                sites.append(site.fitted(self._like[m]) if self._like else site)
            else:
                sites.append(self._sites[m])
        return sites

    def again(self) -> Point:
        """The same weights, as they are stored, with passes of their own; factors of hidden layers serve both."""
        other = self.landscape.at(self.flat)
        if self._sites is not None and self.landscape.stored is None:
            other._like = self._sites
        return other

    def teleported(self, action: Action, elements: Sequence[GroupElement | None]) -> Point:
        """The point that group elements, one for each hidden layer, move this one to."""
        mlp = self.landscape.mlp
        weights, sites = walk(action, mlp, self.weights, self.sites(action)[0], elements)
        return Point(self.landscape, weights, sites)

    @cached_property
    def _backward(self) -> Pass:
        self.forward.backward(self.landscape.targets, self.landscape.loss)
        return self.forward

    @cached_property
    def value(self) -> Tensor:
        """``L(w)``, ``[...]``."""
        return self.landscape.loss.value(self.outputs, self.landscape.targets)

    def drift(self, start: Point) -> Tensor:
        """Of the loss from another point of the landscape, ``[...]``; see :meth:`Loss.drift`."""
        loss = self.landscape.loss
        if type(loss).drift is not Loss.drift:
            return loss.drift(start.outputs, self.outputs, self.landscape.targets)
        return relative_change(start.value, self.value)

    @property
    def outputs(self) -> Tensor:
        """The networks' outputs ``[..., o, n]``."""
        return self.forward.pre[-1]

    @cached_property
    def derivative(self) -> Weights:
        """``∇L(w)``, layer by layer."""
        return self._backward.gradient()

    @cached_property
    def gradient(self) -> Tensor:
        """``∇L(w)``, flat ``[..., P]``."""
        return self.landscape.mlp.flatten(self.derivative)

    def curvature(self, direction: Weights) -> Weights:
        """``∇²L(w) v``, layer by layer."""
        return self._backward.hessian_product(direction)

    def hessian_product(self, direction: Tensor) -> Tensor:
        """``∇²L(w) v``, flat ``[..., P]``."""
        mlp = self.landscape.mlp
        return mlp.flatten(self.curvature(mlp.unflatten(direction)))
