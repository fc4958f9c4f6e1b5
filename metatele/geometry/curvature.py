r"""Curvature of the curves ``γ(t) = exp(tM)·w`` on a level set (Zhao et al. 2024, Eq. 5, 47, 51-60).

Their derivatives at t = 0 come from carrying the first few derivatives of every quantity through the action,
layer by layer: products by Leibniz's rule, the activation by Faà di Bruno's. With ``Z = VH``, ``A = f(Z)`` and
one hidden layer this is

.. math::
    γ_U' = -UM, \quad γ_U'' = UM^2, \quad γ_U''' = -UM^3, \qquad γ_V^{(j)} = Y_j H^+,
    Y_1 = \frac{MA}{f'}, \quad Y_2 = \frac{M^2A - f''\,Y_1^2}{f'}, \quad
    Y_3 = \frac{M^3A - 3 f''\,Y_1 Y_2 - f'''\,Y_1^3}{f'}

(elementwise). Zhao et al. 2024, Eq. 58, 60 print other coefficients: they lack the 1/j! of a Taylor series. With
several hidden layers each layer's inputs move as the layers before it are acted on, and so does their
pseudo-inverse; the curve is that of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metatele.errors import ConfigError, NotExactError, SingularInputError
from metatele.geometry.along_spaces import module_curvatures, random_tangents
from metatele.geometry.jets import (
    Jet,
    acted,
    acted_from_the_right,
    add,
    back,
    difference,
    padded,
    pseudo_inverse_jet,
    through,
    times,
    with_ones_jet,
)
from metatele.geometry.kappa import Curvatures, from_derivatives
from metatele.geometry.landscape import RANK, Landscape, Point, landscape_given, point_given
from metatele.geometry.module_point import ModulePoint
from metatele.geometry.objectives import Objective
from metatele.network.bias import with_ones
from metatele.perceptron.mlp import MLP, Weights, affine
from metatele.symmetry import has_full_rank, pseudo_inverse


def derivatives(
    landscape: Landscape,
    weights: Weights,
    M: Sequence[Tensor],
    order: int = 3,
    coordinates: bool = False,
    truncate: bool = False,
    pre: Tensor | None = None,
) -> list[list[Tensor]]:
    """``γ', γ'', γ'''`` at t = 0 of ``γ(t) = exp(tM)·w``, the exact action on every hidden layer.

    Args:
        landscape: Data; the loss plays no part.
        weights: With any batch dimensions.
        M: For each hidden layer ``[curves, k, k]``.
        order: How many derivatives, 1 to 3.
        coordinates: Give the first layer's part in an orthonormal basis of the span of the inputs, if they are
            fewer than the features: inner products are the same, and nothing is as large as the layer.
        truncate: The data may be rank deficient (pixels that are always zero, equal samples): the curve is then that
            of the data in the coordinates of their own span, in which the network computes the same. Independent
            samples cost no more for it; others an SVD of the data.
        pre: What the first layer makes of the data ``[..., k, n]``, if it is known.

    Returns:
        For each order the layers' parts ``[..., curves, o, i]``, a bias as last column. With more samples than a
        layer has inputs the exact action does not exist; its formula is then a least-squares fit, as in the paper.

    Raises:
        NotExactError: No hidden layer, or an activation that has no inverse.
        SingularInputError: Layer inputs are rank deficient, and not data that may be.
        ConfigError: Landscape, weights, order or M are not as named.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), Identity())  # γ = (v exp(t), u exp(-t))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> first, second = derivatives(scene, mlp.unflatten(torch.tensor([2.0, 3.0])), [torch.ones(1, 1, 1)], order=2)
        >>> [part.item() for part in first], [part.item() for part in second]
        ([2.0, -3.0], [2.0, 3.0])
    """
    landscape_given(landscape)
    if not isinstance(weights, Weights):
        raise ConfigError(f"weights must be Weights, such as landscape.at(model).weights, got {type(weights).__name__}")
    mlp = landscape.mlp
    if not mlp.hidden_widths:
        raise NotExactError("curves on a level set need a hidden layer")
    for f in mlp.activations:
        if not f.invertible:
            raise NotExactError(f"curves of the exact action need an invertible activation, got {f.describe()}")
    if not 1 <= order <= 3:
        raise ConfigError(f"order must be 1, 2 or 3, got {order}")
    if len(M) != len(mlp.hidden_widths):
        raise ConfigError(f"expected one M for each of {len(mlp.hidden_widths)} hidden layers, got {len(M)}")
    still: Jet = [None] * order
    H: Jet = [landscape.inputs.unsqueeze(-3), *still]
    if pre is None:
        pre = affine(weights.matrices[0], weights.biases[0], landscape.inputs)
    Z: Jet = [pre.unsqueeze(-3), *still]
    W: Jet = [weights.matrices[0].unsqueeze(-3), *still]
    parts: list[list[Tensor]] = [[] for _ in range(order)]
    before: list[Tensor] | None = None  # powers of the M that the inputs are moved by, H = exp(tM) A with A fixed
    for layer, m in enumerate(M):
        f, bias = mlp.activations[layer], weights.biases[layer]
        start = Z[0]
        assert start is not None
        powers = [m]
        while len(powers) < order:
            powers.append(powers[-1] @ m)
        A = through(f, Z)
        B = acted(powers, A)
        Y = back(f, start, B)
        S: Jet = [None, *(difference(y, z) for y, z in zip(Y[1:], Z[1:], strict=True))]
        seen = H if bias is None else with_ones_jet(H)
        given = seen[0]
        assert given is not None
        truncated = truncate and layer == 0 and not landscape.full_rank
        # Truncated inputs need not be independent even where they are few.
        tall = given.shape[-1] <= given.shape[-2] and not truncated
        if truncated:
            moved: Jet = times(S, [landscape.truncated_inverse.unsqueeze(-3), *still])
        elif layer == 0 and tall and coordinates:
            try:
                turn = landscape.inverse_factor.unsqueeze(-3)
            except SingularInputError as error:
                raise SingularInputError(f"{error}; truncate=True takes data of any rank") from None
            moved = [None, *(None if s is None else _shared(s, turn) for s in S[1:])]
        elif before is not None and given.shape[-1] >= given.shape[-2]:
            # (gA)⁺ = A⁺g⁻¹ where A has full row rank; the bias's ones are not moved.
            fixed = pseudo_inverse(given, rank_tolerance=RANK)
            moved = acted_from_the_right([None, *(None if s is None else s @ fixed for s in S[1:])], before)
        else:
            try:
                moved = times(S, pseudo_inverse_jet(seen))
            except SingularInputError as error:
                hint = "; truncate=True takes data of any rank" if layer == 0 and not truncate else ""
                raise SingularInputError(f"{error}{hint}") from None
        for j in range(order):
            # Behind the first layer the weights already move: they are U g⁻¹ of the layer before.
            part = add(moved[j + 1], padded(W[j + 1], bias))
            assert part is not None
            parts[j].append(part)
        U, next_bias = weights.matrices[layer + 1].unsqueeze(-3), weights.biases[layer + 1]
        W = [U, *((-1) ** (j + 1) * (U @ p) for j, p in enumerate(powers))]
        if layer + 1 == len(M):
            break
        before = powers if tall and all(a is None for a in A[1:]) else None
        if tall:  # f(Z) is met exactly, so the hidden units become g f(Z) and U g⁻¹ makes of them what U made
            H, Z = B, [None if a is None else U @ a for a in A]
        else:
            change = times(moved, seen)
            H = through(f, [start, *(add(z, c) for z, c in zip(Z[1:], change[1:], strict=True))])
            Z = times(W, H)
        if next_bias is not None and Z[0] is not None:
            Z[0] = Z[0] + next_bias.unsqueeze(-2).unsqueeze(-1)
    for j in range(order):
        last = padded(W[j + 1], weights.biases[-1])
        assert last is not None
        parts[j].append(last)
    return parts


def _shared(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, as one product where all networks and curves have the same right side."""
    return left @ (right.flatten(0, -3)[0] if right.shape[:-2].numel() == 1 else right)


def curvatures(
    landscape: Landscape,
    weights: Weights,
    M: Sequence[Tensor],
    slope: bool = False,
    truncate: bool = False,
    pre: Tensor | None = None,
) -> Curvatures:
    r"""Curvature at t = 0 of ``exp(tM)·w`` (Zhao et al. 2024, Eq. 47), and its derivative (Zhao et al. 2024, Eq. 51).

    .. math::
        κ = \frac{‖γ''_⊥‖}{‖γ'‖^2}, \qquad
        κ' = \frac{γ''_⊥·γ'''}{‖γ''_⊥‖\,‖γ'‖^2} - 3κ\frac{γ'·γ''}{‖γ'‖^2}

    with ``γ''_⊥`` the part of γ'' orthogonal to γ'. This is the paper's N/‖γ'‖³ without the cancellation in N
    (and with ‖γ'‖³ under the first term of κ', where the paper prints ‖γ'‖²). The limits are taken: a curve that
    does not move (γ' = 0) is a point and has κ = κ' = 0; where κ = 0, κ' is that for t → 0 from above.

    Args:
        landscape: Data; the loss plays no part.
        weights: With any batch dimensions.
        M: For each hidden layer ``[curves, k, k]``.
        slope: Also κ'.
        truncate: The data may be rank deficient; see :func:`derivatives`.
        pre: See :func:`derivatives`.

    Raises:
        NotExactError: As for :func:`derivatives`.
        SingularInputError: As for :func:`derivatives`.
        ConfigError: As for :func:`derivatives`.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), Identity())  # γ = (v exp(t), u exp(-t)): the hyperbola through (v, u)
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> curvatures(scene, mlp.unflatten(torch.tensor([1.0, 1.0])), [torch.ones(1, 1, 1)]).kappa  # 1/√2
        tensor([0.7071])
    """
    order = 3 if slope else 2
    rows = derivatives(landscape, weights, M, order, coordinates=True, truncate=truncate, pre=pre)
    return from_derivatives(rows)


@dataclass(frozen=True)
class Curvature(Objective):
    """``ψ(w, k)``: mean over k random M of the curvature of ``exp(tM)·w`` at t = 0 (Zhao et al. 2024, Eq. 5).

    The M are the same for every network and every call. Entries are uniform on [0, 1] and the Frobenius norm is 1,
    as in the reference implementation, one M for each hidden layer, all layers in one curve. Memory is
    bounded by chunks. A network whose weights are not finite gets not a number. Of several networks, one whose
    hidden units are rank deficient does too and leaves the others alone; a single one is an error.

    Of a :class:`~metatele.geometry.ModulePoint` the curves are those of its spaces, one M for each, which need neither
    data nor chunks; see :func:`~metatele.geometry.random_tangents`.

    Args:
        curves: k.
        seed: Of the M.
        truncate: The data may be rank deficient; see :func:`derivatives`.
        chunk_bytes: Memory of the hidden units and their derivatives that are looked at together.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> _ = torch.manual_seed(0)
        >>> mlp = MLP((5, 4, 3), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.randn(5, 4), torch.randn(3, 4), SquaredError())
        >>> point = scene.at(torch.randn(2, mlp.num_parameters))
        >>> Curvature(curves=3).value(point).shape
        torch.Size([2])
    """

    curves: int = 1
    seed: int = 0
    truncate: bool = False
    chunk_bytes: int = 64 << 20
    name: ClassVar[str] = "curvature"

    def __post_init__(self) -> None:
        """Check settings."""
        if not isinstance(self.curves, int) or not isinstance(self.seed, int):
            raise ConfigError(f"curves and seed must be whole numbers, got {self.curves!r} and {self.seed!r}")
        for name in ("curves", "chunk_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def draw(self, mlp: MLP, like: Tensor) -> list[Tensor]:
        """The M of each hidden layer ``[curves, k, k]``."""
        random = torch.Generator().manual_seed(self.seed)
        drawn = [torch.rand(self.curves, k, k, generator=random) for k in mlp.hidden_widths]
        return [(M / M.norm(dim=(-2, -1), keepdim=True)).to(like) for M in drawn]

    @torch.no_grad()
    def value(self, point: Point | ModulePoint) -> Tensor:
        """See the class."""
        if isinstance(point, ModulePoint):
            return self._of_module(point)[0]
        point_given(point)

        def mean(at: Point) -> tuple[Tensor, ...]:
            total = torch.zeros(at.flat.shape[:-1]).to(at.flat)
            for M in self._chunks(at):
                done = curvatures(at.landscape, at.weights, M, truncate=self.truncate, pre=at.forward.pre[0])
                total += done.kappa.sum(-1)
            return (total / self.curves,)

        return _where_defined(point, mean)[0]

    def value_and_gradient(self, point: Point | ModulePoint) -> tuple[Tensor, Tensor]:
        """See the class."""
        if isinstance(point, ModulePoint):
            with torch.enable_grad():
                value, parts = self._of_module(point)
                found = torch.autograd.grad(value, list(parts.values()), allow_unused=True)
            return value.detach(), point.flatten(
                {n: g for n, g in zip(parts, found, strict=True) if g is not None and n in point.own}
            )
        point_given(point)
        mlp = point.landscape.mlp

        def mean(at: Point) -> tuple[Tensor, ...]:
            total, gradient = torch.zeros(at.flat.shape[:-1]).to(at.flat), torch.zeros_like(at.flat)
            for M in self._chunks(at):
                with torch.enable_grad():
                    flat = at.flat.detach().requires_grad_()
                    kappa = curvatures(at.landscape, mlp.unflatten(flat), M, truncate=self.truncate).kappa.sum(-1)
                    (part,) = torch.autograd.grad(kappa.sum(), flat)
                total += kappa.detach()
                gradient += part
            return total / self.curves, gradient / self.curves

        value, gradient = _where_defined(point, mean)
        return value, gradient

    def _of_module(self, point: ModulePoint) -> tuple[Tensor, dict[str, Tensor]]:
        """Of any module, with the weights that it was computed from; curve after curve."""
        if self.truncate:
            raise ConfigError("truncate is of curves that depend on data: those of exact symmetries do not")
        if not point.spaces:
            raise ConfigError("curvature needs spaces of continuous groups: ModulePoint(model, loss, found.spaces)")
        own = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32)).requires_grad_(p.requires_grad)
            for name, p in point.model.named_parameters()
        }
        drawn = random_tangents(point.spaces, self.curves, self.seed, point.like)
        total = torch.zeros_like(point.like)
        for n in range(self.curves):
            total = total + module_curvatures(own, point.spaces, [M[n : n + 1] for M in drawn]).kappa[0]
        return total / self.curves, {name: t for name, t in own.items() if t.requires_grad}

    def _chunks(self, point: Point) -> Iterator[list[Tensor]]:
        mlp, networks = point.landscape.mlp, point.flat.shape[:-1].numel()
        size = 12 * networks * point.landscape.inputs.shape[-1] * max(mlp.widths[1:]) * point.flat.element_size()
        group = max(1, self.chunk_bytes // size)
        drawn = self.draw(mlp, point.flat)
        for begin in range(0, self.curves, group):
            yield [M[begin : begin + group] for M in drawn]


def _where_defined(point: Point, compute: Callable[[Point], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``compute`` makes of a point, each network for itself: one without curves is not a number in all results."""
    try:
        return compute(point)
    except SingularInputError:
        sound = torch.isfinite(point.flat).all(-1)
        for hidden, bias in zip(point.forward.hidden[1:-1], point.weights.biases[1:-1], strict=True):
            sound = sound & has_full_rank(hidden if bias is None else with_ones(hidden), RANK)
        if bool(sound.all()) or not bool(sound.any()):
            raise  # the data are to blame, or there is no other network
        safe = torch.where(sound.unsqueeze(-1), point.flat, point.flat[sound][0])
        return tuple(
            result.masked_fill(~sound.view(sound.shape + (1,) * (result.dim() - sound.dim())), math.nan)
            for result in compute(point.landscape.at(safe))
        )
