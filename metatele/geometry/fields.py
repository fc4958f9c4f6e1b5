r"""Vector fields that keep a loss, and ascent along them (Zhao et al. 2024, Eq. 29-32).

``R = -∇L·∂`` is the gradient flow as a vector field, ``A = a·∂`` one with ``AL = ∇L·a = 0``: the velocity of a
symmetry. A field is given as a matrix M, for ``a(w) = Mw``, or as a function from w to a tangent vector. Points
are treated one after the other, so that a loss need not know about batches. All derivatives are autodiff's, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metatele.errors import ConfigError, ShapeMismatchError

LossFunction = Callable[[Tensor], Tensor]
VelocityFunction = Callable[[Tensor], Tensor]
Field = Tensor | VelocityFunction

_ASCENT_STEPS = 200  # at most; then the point is judged as it is
_STEP_HALVINGS = 30  # to 1e-9 of the step; then the search gives up
_LONGEST = 1.0  # a step of the ascent, in units of what changes the gradient by its own length
_DRIFT = 1e-5  # largest change of the loss in a step, relative to what the gradient would make of its length
_SUBSTEPS = 8
_ZERO_SLOPE = 1e-13  # slopes are taken as zero below
_ENOUGH = 1e-9  # an ascent that ends above has found no critical point
_SMALL_GAIN = 1e-6  # what Newton's model may still promise log ‖∇L‖² there; it is large on the way to infinity
_FLAT = 1e-8  # second derivatives are taken as zero below, relative to their size


class LocalLoss:
    """A loss at one point, with its gradient in the graph.

    Attributes:
        w: The point ``[P]``, a leaf.
        value: ``L(w)``, a number.
        gradient: ``∇L(w) [P]``.

    Raises:
        ShapeMismatchError: The loss gives no single number.
        ConfigError: It cannot be differentiated, or it or its gradient is not finite.

    Example:
        >>> here = LocalLoss(lambda w: w[0] ** 2 * w[1], torch.tensor([1.0, 2.0]).double())
        >>> here.value, here.gradient.tolist(), here.hessian_product(torch.ones(2).double()).tolist()
        (2.0, [4.0, 1.0], [6.0, 2.0])
    """

    def __init__(self, loss: LossFunction, point: Tensor) -> None:
        self.w = point.detach().clone().requires_grad_()
        value = loss(self.w)
        if not isinstance(value, Tensor) or value.shape != ():
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeMismatchError(f"loss must return a tensor without dimensions, got {what}")
        if not value.requires_grad:
            raise ConfigError("loss must be a differentiable function of the weights it is given")
        self.gradient = derivative(value, self.w)
        if not (bool(value.isfinite()) and bool(self.gradient.isfinite().all())):
            raise ConfigError("the loss and its gradient must be finite at every point")
        self.value = float(value.detach())

    def hessian_product(self, direction: Tensor) -> Tensor:
        """``∇²L v [P]``, in the graph."""
        return derivative(self.gradient, self.w, direction)

    def third(self) -> Tensor:
        """``∂³L(∇L, ∇L, ·) [P]``, without graph."""
        fixed = self.gradient.detach()
        inner = (self.hessian_product(fixed) * fixed).sum()
        return derivative(inner, self.w).detach()

    def rate(self) -> Tensor:
        """Relative rate of change of ∇L along its own direction, by its first two derivatives.

        Per unit of the flow's time; 0 only where both vanish.
        """
        length = self.gradient.detach().norm()
        if float(length) == 0:
            return length
        bend = self.hessian_product(self.gradient).detach().norm() / length
        return bend + (self.third().norm() / length).sqrt()

    def bend(self, field: VelocityFunction) -> Tensor:
        """``‖∇²L v‖/‖v‖`` of a field v."""
        v = self.velocity(field).detach()
        return ratio(self.hessian_product(v).detach().norm(), v.norm())

    def velocity(self, field: VelocityFunction) -> Tensor:
        """The field at the point, ``[P]``, in the graph.

        Raises:
            ShapeMismatchError: It is not of the point's shape.
            ConfigError: It is not finite.
        """
        a = field(self.w)
        if not isinstance(a, Tensor) or a.shape != self.w.shape or a.dtype != self.w.dtype:
            what = f"{list(a.shape)} of {a.dtype}" if isinstance(a, Tensor) else type(a).__name__
            raise ShapeMismatchError(f"a field must return a vector {list(self.w.shape)} of {self.w.dtype}, got {what}")
        if not bool(a.isfinite().all()):
            raise ConfigError("a field must be finite at every point")
        return a

    def bracket(self, field: VelocityFunction) -> Tensor:
        """``[A, R]L = ∇Lᵀ(Da ∇L - ∇²L a)``, a number in the graph."""
        a = self.velocity(field)
        return self.gradient @ (derivative(a, self.w, self.gradient) - self.hessian_product(a))

    def along_flow(self, quantity: Tensor) -> Tensor:
        """``R q = -∇L·∇q`` of a number in the graph."""
        return -(derivative(quantity, self.w) @ self.gradient)

    def slope(self, field: VelocityFunction) -> Tensor:
        """See :func:`slope`."""
        a = self.velocity(field)
        g = self.gradient
        first = ratio((g @ a).abs(), g.norm() * a.norm())
        curved, turned = self.hessian_product(a), derivative(a, self.w, g)
        size = curved.norm() + turned.norm() + self.rate() * a.norm()
        return torch.maximum(first, ratio((curved + turned).norm(), size)).detach()


def derivative(output: Tensor, w: Tensor, direction: Tensor | None = None) -> Tensor:
    """``Jᵀ direction`` of an output in the graph of w; zero if it does not depend on w."""
    if not output.requires_grad:
        return torch.zeros_like(w)
    return torch.autograd.grad(output, w, direction, create_graph=True, materialize_grads=True)[0]


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``; 0 where there is nothing to compare with."""
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), torch.zeros_like(part))


def rows_of(w: Tensor) -> Tensor:
    """Points ``[..., P]`` as rows ``[n, P]``.

    Raises:
        ShapeMismatchError: There is no point, or no dimension.
        ConfigError: They are not float64, or not finite.
    """
    if not isinstance(w, Tensor) or w.dim() == 0 or w.numel() == 0:
        what = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ShapeMismatchError(f"w must be one or more points [..., P], got {what}")
    if w.dtype != torch.float64:
        raise ConfigError(f"w must be of torch.float64, got {w.dtype}")
    if not bool(w.isfinite().all()):
        raise ConfigError("w must be finite")
    return w.detach().reshape(-1, w.shape[-1])


def velocity_of(field: Field, size: int, name: str = "field") -> VelocityFunction:
    """A field as a function ``[P] → [P]``.

    Raises:
        ShapeMismatchError: It is a tensor, but no matrix ``[P, P]``; or neither a tensor nor a function.
        ConfigError: The matrix is not of float64, or not finite.
    """
    if isinstance(field, Tensor):
        matrix = field.detach()
        if matrix.shape != (size, size):
            raise ShapeMismatchError(f"{name} must be a matrix [{size}, {size}], got {list(matrix.shape)}")
        if matrix.dtype != torch.float64 or not bool(matrix.isfinite().all()):
            raise ConfigError(f"{name} must be a finite matrix of torch.float64, got {matrix.dtype}")
        return lambda w: matrix @ w
    if not callable(field):
        raise ShapeMismatchError(f"{name} must be a matrix [P, P] or a function, got {type(field).__name__}")
    return field


def velocities_of(fields: Sequence[Field] | Tensor, size: int) -> list[VelocityFunction]:
    """All fields as functions; errors as :func:`velocity_of`, or ``ConfigError`` if there is none."""
    if isinstance(fields, Tensor) and fields.dim() != 3:
        raise ShapeMismatchError(f"fields must be matrices [m, {size}, {size}], got {list(fields.shape)}")
    if not isinstance(fields, Tensor | Sequence):
        raise ShapeMismatchError(f"fields must be matrices [m, P, P] or a list, got {type(fields).__name__}")
    if len(fields) == 0:
        raise ConfigError("fields must hold at least one field, got none")
    return [velocity_of(field, size, f"fields[{i}]") for i, field in enumerate(fields)]


@torch.enable_grad()
def commutator(loss: LossFunction, w: Tensor, field: Field) -> Tensor:
    r"""``([A, R]L)(w) = ∇Lᵀ(Da ∇L - ∇²L a)``, with ``a`` the field and ``Da`` its Jacobian.

    By the definition of the Lie bracket, for any field. If it keeps the loss around w, this is ``-A‖∇L‖²``
    (Zhao et al. 2024, Eq. 32); otherwise it is ``-A‖∇L‖² - R(AL)``, and :func:`slope` is not 0.

    Args:
        loss: Differentiable function ``[P] → []``.
        w: Points ``[..., P]``, float64.
        field: Matrix ``[P, P]``, or function ``[P] → [P]``.

    Returns:
        ``[...]``, in units of loss² per weight², per unit of the field's time.

    Raises:
        ShapeMismatchError: A shape is not the one named.
        ConfigError: ``w`` is not float64, something is not finite, or the loss cannot be differentiated.

    Example:
        >>> rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
        >>> w = torch.tensor([3.0, 4.0]).double()
        >>> float(commutator(lambda w: w.square().sum(), w, rotation))  # as long a gradient all around
        0.0
    """
    points = rows_of(w)
    velocity = velocity_of(field, points.shape[-1])
    values = [LocalLoss(loss, point).bracket(velocity).detach() for point in points]
    return torch.stack(values).reshape(w.shape[:-1])


@torch.enable_grad()
def slope(loss: LossFunction, w: Tensor, field: Field) -> Tensor:
    r"""How far a field is from keeping the loss at w: 0 for a symmetry, at most 1, ``[...]``.

    The larger of ``|∇L·a| / (‖∇L‖‖a‖)`` and ``‖∇(∇L·a)‖`` over the sizes of its two terms ``∇²L a`` and
    ``Daᵀ∇L`` and of a. The second finds a field that is tangent to the level set at this one point only.

    Args and errors are those of :func:`commutator`.

    Example:
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
        >>> w = torch.tensor([1.0, 0.0]).double()
        >>> bool(slope(lambda w: w[0] ** 2 + 9 * w[1] ** 2, w, turn) > 0.5)  # tangent here, but no symmetry
        True
    """
    points = rows_of(w)
    velocity = velocity_of(field, points.shape[-1])
    return torch.stack([LocalLoss(loss, point).slope(velocity) for point in points]).reshape(w.shape[:-1])


@torch.enable_grad()
def teleport_along(loss: LossFunction, w: Tensor, fields: Sequence[Field] | Tensor) -> Tensor:
    r"""A critical point of ``‖∇L‖²`` on the orbit of each w, found by ascent along the fields.

    A step follows ``Σ θᵢAᵢ`` for a unit of time. With c the slopes of ``f = log ‖∇L‖²`` along the fields and K its
    second derivatives, ``θ = |K|⁻¹c``, halved until f rises; near the end these are Newton's steps, which bring
    c to rounding. Matrices are followed by the exponential; functions by Runge and Kutta's method of order 4.
    Each step ends with one of Newton back to the level set. A point that is critical already stays.

    Args:
        loss: Differentiable function ``[P] → []``.
        w: Points ``[..., P]``, float64.
        fields: A tensor ``[m, P, P]``, or a sequence of matrices ``[P, P]`` and functions ``[P] → [P]``.

    Returns:
        ``[..., P]``.

    Raises:
        ShapeMismatchError: As for :func:`commutator`.
        ConfigError: As for :func:`commutator`; or there is no field, or no critical point was found, as on orbits on
            which the gradient has no largest length.

    Example:
        >>> turn = torch.tensor([[[0.0, -3.0], [1 / 3, 0.0]]]).double()
        >>> w = teleport_along(lambda w: w[0] ** 2 + 9 * w[1] ** 2, torch.tensor([3.0, 0.1]).double(), turn)
        >>> bool(w[0].abs() < 1e-8)  # the short axis
        True
    """
    points = rows_of(w)
    velocities = velocities_of(fields, points.shape[-1])
    matrices = [f.detach() for f in fields if isinstance(f, Tensor)]
    stack = torch.stack(matrices) if len(matrices) == len(velocities) else None
    moved = [_ascend(loss, point, velocities, stack, number) for number, point in enumerate(points)]
    return torch.stack(moved).reshape(w.shape)


def _ascend(
    loss: LossFunction, w: Tensor, fields: list[VelocityFunction], matrices: Tensor | None, number: int
) -> Tensor:
    here = LocalLoss(loss, w)
    level = here.value
    size, gain, step = _newton_step(here, fields)
    for _ in range(_ASCENT_STEPS):
        if size <= _ZERO_SLOPE and gain <= _SMALL_GAIN:
            break
        for _ in range(_STEP_HALVINGS):
            there = _moved(loss, here, step, fields, matrices, level)
            if there is not None:
                size_there, gain_there, step_there = _newton_step(there, fields)
                if _log_norm(there) > _log_norm(here) or size_there < size / 2:
                    break
            step = step / 2
        else:
            break
        here, size, gain, step = there, size_there, gain_there, step_there
    if size > _ENOUGH or gain > _SMALL_GAIN:
        raise ConfigError(
            f"ascent of the gradient norm along the orbit of point {number} found no critical point; "
            "there may be no largest gradient, or the fields may be no symmetries"
        )
    return here.w.detach()


def _moved(
    loss: LossFunction,
    here: LocalLoss,
    step: Tensor,
    fields: list[VelocityFunction],
    matrices: Tensor | None,
    level: float,
) -> LocalLoss | None:
    """The loss at the end of a step, or nothing where it is not defined or the integrator went astray."""
    w = _follow(here.w.detach(), step, fields, matrices)
    try:
        there = LocalLoss(loss, w)
        g = there.gradient.detach()  # back to the level set, along the gradient
        there = LocalLoss(loss, w - ratio((there.value - level) * g, g.square().sum()))
    except ConfigError:
        return None
    length = (there.w - here.w).detach().norm() * here.gradient.detach().norm()
    return there if abs(there.value - level) <= _DRIFT * float(length) + 1e-12 * abs(level) else None


def _log_norm(here: LocalLoss) -> float:
    return float(here.gradient.detach().square().sum().log())


def _newton_step(here: LocalLoss, fields: list[VelocityFunction]) -> tuple[float, float, Tensor]:
    """Largest slope ``Aᵢ log ‖∇L‖²`` relative to what it could be, ``cᵀ|K|⁻¹c``, and the step ``|K|⁻¹c``.

    The step is no longer than what changes the gradient by its own length.
    """
    g = here.gradient.detach()
    f = here.gradient.square().sum().log()
    toward = derivative(f, here.w)
    graphs = [here.velocity(field) for field in fields]
    velocities = torch.stack([a.detach() for a in graphs])
    c = toward.detach() @ velocities.T
    rate = max(here.rate(), *(here.bend(field) for field in fields))
    longest = toward.detach().norm() + ratio(rate, g.norm())
    size = float(ratio(c.abs(), velocities.norm(dim=-1) * longest).max())

    K = torch.stack([velocities @ derivative(toward @ a, here.w).detach() for a in graphs])
    eigenvalues, vectors = torch.linalg.eigh((K + K.T) / 2)
    # Per unit of a field's time, how fast it turns the gradient.
    turn = torch.stack([ratio(derivative(a, here.w, g).detach().norm(), g.norm()) for a in graphs]).max()
    floor = _FLAT * (eigenvalues.abs().max() + turn.square()) + torch.finfo(c.dtype).tiny
    step = vectors @ ((vectors.T @ c) / torch.maximum(eigenvalues.abs(), floor))
    gain = float(c @ step)
    changed = here.hessian_product(step @ velocities).detach().norm()
    return size, gain, step * min(1.0, float(_LONGEST * g.norm() / changed.clamp_min(1e-300)))


def _follow(w: Tensor, step: Tensor, fields: list[VelocityFunction], matrices: Tensor | None) -> Tensor:
    """The flow of ``Σ θᵢAᵢ`` for a unit of time."""
    if matrices is not None:
        return torch.linalg.matrix_exp(torch.einsum("m,mij->ij", step, matrices)) @ w

    def velocity(point: Tensor) -> Tensor:
        return torch.stack([t * field(point).detach() for t, field in zip(step, fields, strict=True)]).sum(0)

    h = 1 / _SUBSTEPS
    for _ in range(_SUBSTEPS):
        k1 = velocity(w)
        k2 = velocity(w + h / 2 * k1)
        k3 = velocity(w + h / 2 * k2)
        k4 = velocity(w + h * k3)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return w
