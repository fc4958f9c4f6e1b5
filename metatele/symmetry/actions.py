r"""Actions of GL(k) on a pair of layers ``(V, U)`` around ``k`` hidden units (Zhao et al. 2024, Eq. 46, 54, 56).

With layer inputs ``H``, ``Z = VH + b`` and activation f:

==================== ============================== ============================= =================
action               new V                          new U                         keeps ``U f(Z)``
==================== ============================== ============================= =================
:class:`Exact`       ``V + (f⁻¹(g f(Z)) - Z) H⁺``   ``U g⁻¹``                     to rounding, n ≤ d
:class:`Approximate` ``g V``                        ``U + U(f(Z) - f(Z'))f(Z')⁺`` as a fit
:class:`Rescaling`   ``g V``, g diagonal > 0        ``U g⁻¹``                     to rounding
==================== ============================== ============================= =================

The first two are Zhao et al. 2024, Eq. 54 and Zhao et al. 2024, Eq. 46 written as increments. Where the
paper's formulas keep the loss they agree with these; where they project (``V H H⁺`` or ``U f(Z')f(Z')⁺`` differs from
``V`` or ``U``) the increments leave the untouched part in place, so ``g = I`` is always the identity.
A bias travels with ``V``: it is one more column, whose input is constantly 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metatele.errors import ConfigError, NotExactError
from metatele.network.bias import with_ones
from metatele.perceptron.activations import Activation
from metatele.symmetry.group import GroupElement
from metatele.symmetry.least_squares import (
    default_damping,
    pseudo_inverse,
)
from metatele.symmetry.site import Acted, Pair, Site


class Action(ABC):
    """How a group element moves a pair of layers.

    Attributes:
        name: Key in :func:`action`.
        strict: Raise where the action is undefined for any network of the batch; otherwise that
            network's weights come out as non-finite numbers, and the others are not disturbed.
        exact: Whether the loss is kept to rounding on the given inputs.

    Example:
        >>> [(name, act.exact, act.algebra_size(3)) for name, act in ACTIONS.items()]
        [('exact', True, 9), ('approximate', False, 9), ('rescaling', True, 3)]
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    strict: bool

    def algebra_size(self, k: int) -> int:
        """Dimension of the Lie algebra for ``k`` hidden units."""
        return k * k

    def algebra(self, coordinates: Tensor, k: int) -> Tensor:
        """Algebra elements from coordinates, row by row.

        Args:
            coordinates: ``[..., algebra_size(k)]``.
            k: Number of hidden units.

        Returns:
            ``[..., k, k]``.
        """
        return coordinates.unflatten(-1, (k, k))

    def prepare(self, inputs: Tensor, bias: bool = False) -> Tensor | None:
        """Whatever depends on the inputs alone, to be reused while they stay the same.

        Args:
            inputs: ``H [..., d, n]``.
            bias: Whether the layer has a bias, which sees a row of ones.
        """
        return None

    @abstractmethod
    def check(self, activation: Activation) -> None:
        """Raise :class:`NotExactError` where the action does not exist for an activation."""

    @abstractmethod
    def move(self, site: Site, g: GroupElement) -> Site:
        """The site with the new pair; nothing is mutated.

        Args:
            site: Weights with any batch dimensions, and the batch.
            g: Group element ``[..., k, k]``.

        Raises:
            NotExactError: An exact action does not exist for this activation, size or element.
            SingularInputError: The exact action met rank-deficient inputs.
        """

    @abstractmethod
    def pullback(self, site: Site, covector: Pair) -> Tensor:
        r"""Adjoint of the action's differential at the identity: a covector on weights, seen by the algebra.

        .. math:: ⟨\text{pullback}(q), τ⟩ = \tfrac{d}{dt} ⟨q, \exp(t τ)·w⟩ \;\text{at}\; t = 0

        With q the gradient of an objective, this is the objective's gradient along the orbit.

        Args:
            site: Weights with any batch dimensions, and the batch.
            covector: Derivative of the objective by the pair, of the pair's shapes.

        Returns:
            Coordinates ``[..., algebra_size(k)]``.
        """

    def act(self, pair: Pair, inputs: Tensor, g: GroupElement, activation: Activation) -> Acted:
        """The new pair together with its drift on ``inputs`` (one more forward pass).

        Args:
            pair: Weights with any batch dimensions.
            inputs: ``H`` of shape ``[..., d, n]``, one column per sample.
            g: Group element ``[..., k, k]``.
            activation: Between the two layers.

        Raises:
            NotExactError: An exact action does not exist for this activation, size or element.
            SingularInputError: The exact action met rank-deficient inputs.

        Example:
            >>> from metatele.perceptron.activations import LeakyReLU
            >>> from metatele.symmetry.group import exponential
            >>> H = torch.eye(3, dtype=torch.float64)
            >>> pair = Pair(V=torch.ones(2, 3).double(), U=torch.ones(1, 2).double())
            >>> g = exponential(torch.tensor([[0.1, 0.2], [0.0, 0.3]]).double())
            >>> acted = Exact().act(pair, H, g, LeakyReLU(0.1))
            >>> bool(acted.drift < 1e-14)
            True
        """
        moved = self.move(Site(pair, inputs, activation), g).pair
        with torch.no_grad():
            before = pair.output(inputs, activation)
            change = (moved.output(inputs, activation) - before).norm(dim=(-2, -1))
            drift = change / before.norm(dim=(-2, -1)).clamp_min(torch.finfo(before.dtype).tiny)
        return Acted(moved, drift)


@dataclass(frozen=True)
class Exact(Action):
    """The exact action (Zhao et al. 2024, Eq. 54, 56); needs an invertible activation and n ≤ d (d + 1 with bias).

    Args:
        rank_tolerance: Inputs whose QR factor has a diagonal ratio at or below this are refused as
            rank deficient; ``None`` takes ``eps · max(d, n)`` of their dtype, and 0 refuses none.
        strict: See :class:`Action`.

    Raises:
        NotExactError: The activation has no inverse, a value leaves its range, or there are more samples than inputs.
        SingularInputError: The samples are linearly dependent.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.symmetry.group import direct
        >>> pair = Pair(V=torch.tensor([[3.0, -1.0]]), U=torch.tensor([[1.0]]))
        >>> double = direct(torch.tensor([[1.0]]))
        >>> Exact().act(pair, torch.eye(2), double, LeakyReLU(0.5)).pair
        Pair(V=tensor([[ 6., -2.]]), U=tensor([[0.5000]]), bias=None)
    """

    rank_tolerance: float | None = None
    strict: bool = True
    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    def check(self, activation: Activation) -> None:
        """Refuse activations without inverse.

        Raises:
            NotExactError: The activation has none; the message says why.
        """
        if not activation.invertible:
            raise NotExactError(
                f"the exact action needs an invertible activation; {activation.describe()} is not: "
                f"{activation.why_not_invertible()}"
            )

    def prepare(self, inputs: Tensor, bias: bool = False) -> Tensor:
        """``H⁺``, the right factor of every move on these inputs.

        Args:
            inputs: ``H [..., d, n]``; a row of ones is put below when the layer has a bias.
            bias: Whether it has.

        Returns:
            ``[..., n, d]``, or ``[..., n, d + 1]`` with a bias.

        Raises:
            NotExactError: There are more samples than rows.
            SingularInputError: The samples are linearly dependent.

        Example:
            >>> Exact().prepare(2 * torch.eye(3)[:, :2]).tolist()  # two samples with three features
            [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]
        """
        d, n = inputs.shape[-2] + bias, inputs.shape[-1]
        if n > d:
            raise NotExactError(
                f"the exact action needs at most as many samples as inputs (n <= {d}), got {n} samples; "
                "use a smaller batch (accumulated ones count together) or the approximate action"
            )
        tolerance = self.rank_tolerance if self.strict else 0.0
        return pseudo_inverse(with_ones(inputs) if bias else inputs, rank_tolerance=tolerance)

    def move(self, site: Site, g: GroupElement) -> Site:
        """See the module's table."""
        self.check(site.activation)
        V, U, bias = site.pair
        preimage = site.activation.inverse if self.strict else site.activation.unchecked_inverse
        prepared = self._prepared(site)
        step = (preimage(g.matrix @ site.hidden) - site.pre) @ prepared
        moved = (
            Pair(V + step, U @ g.inverse)
            if bias is None
            else Pair(V + step[..., :-1], U @ g.inverse, bias + step[..., -1])
        )
        return Site(moved, site.inputs, site.activation, prepared)

    def pullback(self, site: Site, covector: Pair) -> Tensor:
        """``[(q_V H⁺ᵀ)/f'(Z)] f(Z)ᵀ - Uᵀ q_U``, from ``δV = [(T f(Z))/f'(Z)] H⁺`` and ``δU = -U T``."""
        self.check(site.activation)
        incoming = covector.V if covector.bias is None else torch.cat([covector.V, covector.bias.unsqueeze(-1)], -1)
        through = (incoming @ self._prepared(site).mT) / site.slope
        return (through @ site.hidden.mT - site.pair.U.mT @ covector.U).flatten(-2)

    def _prepared(self, site: Site) -> Tensor:
        return self.prepare(site.inputs, site.pair.bias is not None) if site.prepared is None else site.prepared


@dataclass(frozen=True)
class Approximate(Action):
    """The approximate action (Zhao et al. 2024, Eq. 46): any activation, any batch; outputs kept by least squares.

    Exact when ``f(Z')`` has full column rank (no more samples than hidden units), up to the damping.

    Args:
        damping: Relative Tikhonov damping of the fit, ``λ/‖f(Z')‖²_F``; ``None`` takes
            ``eps^{3/4}`` of the dtype (6e-6 in float32, 2e-12 in float64).
        strict: See :class:`Action`; nothing is undefined here.

    Raises:
        ConfigError: The damping is not positive.

    Example:
        >>> from metatele.perceptron.activations import ReLU
        >>> from metatele.symmetry.group import from_matrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> pair = Pair(torch.randn(6, 3, generator=generator), torch.randn(2, 6, generator=generator))
        >>> g = from_matrix(torch.eye(6) + 0.1 * torch.randn(6, 6, generator=generator))
        >>> few, many = torch.randn(3, 4, generator=generator), torch.randn(3, 40, generator=generator)
        >>> bool(Approximate().act(pair, few, g, ReLU()).drift < 1e-3)  # no more samples than hidden units
        True
        >>> bool(Approximate().act(pair, many, g, ReLU()).drift > 1e-2)  # a fit
        True
    """

    damping: float | None = None
    strict: bool = True
    name: ClassVar[str] = "approximate"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the damping."""
        if self.damping is not None and not self.damping > 0:
            raise ConfigError(f"damping must be positive, got {self.damping}")

    def check(self, activation: Activation) -> None:
        """Every activation will do."""

    def move(self, site: Site, g: GroupElement) -> Site:
        """See the module's table."""
        V, U, bias = site.pair
        # g VH is what gV makes of the inputs: they are not needed.
        pre = g.matrix @ site.pre
        after = Site(site.pair, site.inputs, site.activation, pre=pre)
        change = after.fit(self._damping(pre.dtype)).after(U @ (site.hidden - after.hidden))
        moved_bias = None if bias is None else (g.matrix @ bias.unsqueeze(-1)).squeeze(-1)
        return after.between(Pair(g.matrix @ V, U + change, moved_bias))

    def pullback(self, site: Site, covector: Pair) -> Tensor:
        """``q_V Vᵀ + q_b bᵀ - [(Uᵀ q_U A⁺ᵀ)∘f'(Z)] Zᵀ``: ``δV = T V``, ``δU = -U [f'(Z)∘(T Z)] A⁺``, A = f(Z)."""
        V, U, bias = site.pair
        spread = site.fit(self._damping(U.dtype)).transposed_after(U.mT @ covector.U)
        result = covector.V @ V.mT - (spread * site.slope) @ site.pre.mT
        if bias is not None and covector.bias is not None:
            result = result + covector.bias.unsqueeze(-1) * bias.unsqueeze(-2)
        return result.flatten(-2)

    def _damping(self, dtype: torch.dtype) -> float:
        return default_damping(dtype) if self.damping is None else self.damping


@dataclass(frozen=True)
class Rescaling(Action):
    """Positive rescaling: ``g`` diagonal and positive, exact for every input, no data needed.

    Its algebra is the k logarithms of the scales. Only the diagonal of ``g`` is read, and the
    outgoing weights are divided by it, so every parametrisation is exact.

    Args:
        strict: See :class:`Action`.

    Raises:
        NotExactError: The activation is not positively homogeneous, or a scale is not positive.

    Example:
        >>> from metatele.perceptron.activations import ReLU
        >>> from metatele.symmetry.group import exponential
        >>> pair = Pair(V=torch.ones(2, 1), U=torch.ones(1, 2))
        >>> log_scales = Rescaling().algebra(torch.tensor([2.0, 4.0]).log(), 2)
        >>> Rescaling().act(pair, torch.ones(1, 1), exponential(log_scales), ReLU()).pair.U
        tensor([[0.5000, 0.2500]])
    """

    strict: bool = True
    name: ClassVar[str] = "rescaling"
    exact: ClassVar[bool] = True

    def algebra_size(self, k: int) -> int:
        """One logarithm per hidden unit."""
        return k

    def algebra(self, coordinates: Tensor, k: int) -> Tensor:
        """Diagonal matrices."""
        return torch.diag_embed(coordinates)

    def check(self, activation: Activation) -> None:
        """Refuse activations that are not positively homogeneous.

        Raises:
            NotExactError: The activation is not.
        """
        if not activation.positively_homogeneous:
            raise NotExactError(
                f"rescaling needs a positively homogeneous activation (identity, leaky_relu, relu), "
                f"got {activation.describe()}"
            )

    def move(self, site: Site, g: GroupElement) -> Site:
        """The site with ``g V``, ``g b`` and ``U g⁻¹``, for diagonal g; nothing is mutated.

        Args:
            site: Weights with any batch dimensions; the batch is not looked at.
            g: Group element ``[..., k, k]``, of which the diagonal is read.

        Raises:
            NotExactError: The activation is not positively homogeneous, or (if strict) a scale is not positive.
        """
        self.check(site.activation)
        scale = g.matrix.diagonal(dim1=-2, dim2=-1)
        if self.strict and not bool((scale > 0).all()):
            raise NotExactError("rescaling needs a positive diagonal; use exp of the logarithms of the scales")
        V, U, bias = site.pair
        column = scale.unsqueeze(-1)
        pair = Pair(column * V, U / scale.unsqueeze(-2), None if bias is None else scale * bias)
        return Site(pair, site.inputs, site.activation)

    def pullback(self, site: Site, covector: Pair) -> Tensor:
        """``⟨q_V, V⟩ + q_b b - ⟨q_U, U⟩`` for each hidden unit."""
        self.check(site.activation)
        pair = site.pair
        result = (covector.V * pair.V).sum(-1) - (covector.U * pair.U).sum(-2)
        return result if pair.bias is None or covector.bias is None else result + covector.bias * pair.bias


ACTIONS: dict[str, Action] = {a.name: a for a in (Exact(), Approximate(), Rescaling())}


def register_action(new: Action) -> None:
    """Make a further action known by its name, to every move that takes ``action=``.

    Args:
        new: A frozen dataclass with a field ``strict``; see :class:`Action`.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> register_action(Rescaling())
        Traceback (most recent call last):
        metatele.errors.ConfigError: there is an action 'rescaling' already
    """
    if new.name in ACTIONS or new.name == "auto":
        raise ConfigError(f"there is an action {new.name!r} already")
    ACTIONS[new.name] = new


def action(name: str) -> Action:
    """Action by name: ``exact``, ``approximate``, ``rescaling`` or a registered one, with its default settings.

    Raises:
        ConfigError: There is none of this name.

    Example:
        >>> action("rescaling").exact
        True
    """
    if name not in ACTIONS:
        raise ConfigError(f"action must be one of {', '.join(ACTIONS)}, got {name!r}")
    return ACTIONS[name]
