r"""Sharpness of a minimum from the eigenvalues ``λ₁ ≥ … ≥ λ_P`` of the Hessian (Zhao et al. 2024, Eq. 61, 62).

.. math::
    φ_1(w, ε) = |\{i : λ_i(∇^2L(w)) > ε\}|, \qquad φ_2(w, k) = \sum_{i=1}^k \log λ_i(∇^2L(w))

Neither is differentiable at a bearable price, so they are measures and not objectives of a teleport.

Only the span of the samples is seen by the first layer: with fewer samples than features, ``X = QR``, the loss
depends on ``W₁`` through ``W₁Q`` alone, and all eigenvalues but zeros are those of the network with inputs R.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError
from metatele.extras import require_modules
from metatele.geometry.landscape import Landscape, Point, landscape_given
from metatele.perceptron.losses import Differentiable
from metatele.perceptron.mlp import MLP

if TYPE_CHECKING:
    import numpy as np

_FIRST_COUNT = 16  # eigenvalues that counting begins with


@dataclass(frozen=True)
class EigenSolver:
    """When eigenvalues are those of the dense Hessian, and when they come from Lanczos' method.

    The defaults are where one becomes faster than the other on a CPU; the answer is the same to the accuracy named in
    :func:`largest_eigenvalues`.

    Attributes:
        dense_size: Up to so many weights the Hessian is made and all its eigenvalues are computed.
        dense_share: So it is where more than one eigenvalue in so many is asked for.
        restarts: Of Lanczos' method, at most; ``None`` leaves the number to ARPACK.
        chunk_bytes: Memory of the Hessian-vector products that are made at a time.

    Example:
        >>> EigenSolver(dense_size=0).restarts is None  # Lanczos for small networks too
        True
    """

    dense_size: int = 600
    dense_share: int = 10
    restarts: int | None = None
    chunk_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Check that the numbers can be used."""
        if self.dense_size < 0 or self.dense_share < 1 or self.chunk_bytes < 1:
            raise ConfigError(f"dense_size must be at least 0, dense_share and chunk_bytes at least 1, got {self}")
        if self.restarts is not None and self.restarts < 1:
            raise ConfigError(f"restarts must be at least 1, got {self.restarts}")


_SOLVER = EigenSolver()


@torch.no_grad()
def hessian(landscape: Landscape, flat: Tensor | nn.Module, *, chunk_bytes: int = _SOLVER.chunk_bytes) -> Tensor:
    """``∇²L(w)``, dense: exact Hessian-vector products with the unit vectors, many at a time.

    At the kinks of a piecewise linear activation, where it does not exist, it is that of one side.

    Args:
        landscape: Data and loss.
        flat: Weights ``[..., P]``, or a module of the landscape's shape; the result takes P² numbers for each network.
        chunk_bytes: Memory of the products that are made at a time.

    Returns:
        ``[..., P, P]``, symmetric.

    Raises:
        ConfigError: Weights, data or loss of a network are not finite.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> line = Landscape(MLP((2, 1), Identity()), torch.tensor([[1.0], [2.0]]), torch.zeros(1, 1), SquaredError())
        >>> hessian(line, torch.zeros(2))  # x xᵀ
        tensor([[1., 2.],
                [2., 4.]])
    """
    flat = _weights(landscape, flat)
    matrices = [_dense(point, chunk_bytes) for point in _networks(landscape, flat)]
    return torch.stack(matrices).view(*flat.shape, flat.shape[-1])


@torch.no_grad()
def largest_eigenvalues(
    landscape: Landscape,
    flat: Tensor | nn.Module,
    count: int,
    *,
    tolerance: float = 1e-6,
    seed: int = 0,
    solver: EigenSolver = _SOLVER,
) -> Tensor:
    """The ``count`` largest eigenvalues of ``∇²L(w)``, algebraically, in falling order.

    Small networks, and questions for many eigenvalues, are answered by all eigenvalues of the dense Hessian, to
    rounding. Otherwise it is Lanczos' method (ARPACK, needs scipy) on Hessian-vector products in the weights'
    dtype. Then each value is right to about ``tolerance`` of itself, and to rounding of the products, in
    single precision some 1e-6 of the largest; an eigenvalue that occurs several times may be found too few times.
    Values within rounding of zero, relative to the largest found, are given as 0.

    Args:
        landscape: Data and loss.
        flat: Weights ``[..., P]``, or a module of the landscape's shape; networks are looked at one after another.
        count: How many, from 1 to P.
        tolerance: Relative accuracy of Lanczos' method; 0 asks for machine precision.
        seed: Of its start vector.
        solver: When the Hessian is made, and when not.

    Returns:
        ``[..., count]``.

    Raises:
        ConfigError: ``count`` or ``tolerance`` cannot be used, weights, data or loss of a network are not finite, or
            Lanczos' method did not reach the tolerance.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> line = Landscape(MLP((3, 1), Identity()), x, torch.zeros(1, 3), SquaredError())
        >>> largest_eigenvalues(line, torch.zeros(3), 2)  # of XXᵀ
        tensor([9., 4.])
    """
    flat = _weights(landscape, flat)
    count = _whole("count", count, flat.shape[-1])
    _check_tolerance(tolerance)
    found = [_largest(point, count, tolerance, seed, solver) for point in _networks(landscape, flat)]
    return torch.stack(found).view(*flat.shape[:-1], count)


@torch.no_grad()
def count_above(
    landscape: Landscape,
    flat: Tensor | nn.Module,
    epsilon: float,
    *,
    tolerance: float = 1e-6,
    seed: int = 0,
    solver: EigenSolver = _SOLVER,
) -> Tensor:
    """``φ₁(w, ε)``: how many eigenvalues of ``∇²L(w)`` are larger than ε (Zhao et al. 2024, Eq. 61).

    The number of eigenvalues that are looked for is doubled until one is not larger. How far they can be trusted
    says :func:`largest_eigenvalues`: one as near to ε as its accuracy may fall on either side.

    Args:
        landscape: Data and loss.
        flat: Weights ``[..., P]``, or a module of the landscape's shape; networks are looked at one after another.
        epsilon: ε; with 0, the number of positive eigenvalues.
        tolerance: Relative accuracy of Lanczos' method.
        seed: Of its start vector.
        solver: When the Hessian is made, and when not.

    Returns:
        Whole numbers ``[...]``.

    Raises:
        ConfigError: As of :func:`largest_eigenvalues`, or ``epsilon`` is not finite.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> line = Landscape(MLP((3, 1), Identity()), x, torch.zeros(1, 3), SquaredError())
        >>> count_above(line, torch.zeros(3), 2.0)  # 9 and 4, not 1
        tensor(2)
    """
    flat = _weights(landscape, flat)
    if not math.isfinite(epsilon):
        raise ConfigError(f"epsilon must be a finite number, got {epsilon}")
    _check_tolerance(tolerance)
    counts = []
    for point in _networks(landscape, flat):
        count, size = min(_FIRST_COUNT, flat.shape[-1]), flat.shape[-1]
        above = _above(_largest(point, count, tolerance, seed, solver), epsilon)
        while above == count < size:
            count = min(2 * count, size)
            above = _above(_largest(point, count, tolerance, seed, solver), epsilon)
        counts.append(above)
    return torch.tensor(counts, device=flat.device).view(flat.shape[:-1])


@torch.no_grad()
def log_volume(
    landscape: Landscape,
    flat: Tensor | nn.Module,
    k: int,
    *,
    tolerance: float = 1e-6,
    seed: int = 0,
    solver: EigenSolver = _SOLVER,
) -> Tensor:
    """``φ₂(w, k)``: sum of the logarithms of the k largest eigenvalues of ``∇²L(w)`` (Zhao et al. 2024, Eq. 62).

    Where one of them is not positive it is ``-inf``, the limit as an eigenvalue falls to zero.

    Args:
        landscape: Data and loss.
        flat: Weights ``[..., P]``, or a module of the landscape's shape; networks are looked at one after another.
        k: How many, from 1 to P.
        tolerance: Relative accuracy of Lanczos' method; see :func:`largest_eigenvalues`.
        seed: Of its start vector.
        solver: When the Hessian is made, and when not.

    Returns:
        ``[...]``.

    Raises:
        ConfigError: As of :func:`largest_eigenvalues`.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> x = torch.diag(torch.tensor([0.0, 2.0, 3.0]))
        >>> line = Landscape(MLP((3, 1), Identity()), x, torch.zeros(1, 3), SquaredError())
        >>> log_volume(line, torch.zeros(3), 2), log_volume(line, torch.zeros(3), 3)  # log 9·4, log 0
        (tensor(3.5835), tensor(-inf))
    """
    flat = _weights(landscape, flat)
    k = _whole("k", k, flat.shape[-1])
    _check_tolerance(tolerance)
    values = largest_eigenvalues(landscape, flat, k, tolerance=tolerance, seed=seed, solver=solver)
    positive = values > 0
    logs = torch.where(positive, values, 1.0).log().sum(-1)
    return torch.where(positive.all(-1), logs, -math.inf)


def _weights(landscape: Landscape, flat: Tensor | nn.Module) -> Tensor:
    """The weights, if they are some of the landscape's."""
    landscape_given(landscape)
    return landscape.at(flat).flat


def _whole(name: str, value: int, size: int) -> int:
    if not hasattr(value, "__index__") or not 1 <= value <= size:
        raise ConfigError(f"{name} must be a whole number from 1 to the number of weights, {size}, got {value!r}")
    return value.__index__()


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance must be at least 0 and below 1, got {tolerance}")


def _above(values: Tensor, epsilon: float) -> int:
    return int((values > epsilon).sum())


def _networks(landscape: Landscape, flat: Tensor) -> Iterator[Point]:
    """One network after another, each with its own data."""
    mlp, shape, loss = landscape.mlp, flat.shape[:-1], landscape.loss
    mlp.unflatten(flat)  # refuses another number of weights
    if isinstance(loss, Differentiable) and shape:
        raise ConfigError("a loss given as a function sees one network at a time")
    inputs, targets = _per_network(landscape.inputs, 2, shape), landscape.targets
    if not isinstance(loss, Differentiable):  # whose targets may have any shape
        targets = _per_network(targets, 2 if targets.is_floating_point() else 1, shape)
    for index in itertools.product(*map(range, shape)):
        scene = Landscape(mlp, inputs[index], targets[index], loss, landscape.stored)
        point = scene.at(flat[index])
        for what, tensor in (("weights", point.flat), ("inputs", scene.inputs), ("losses", point.value)):
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"a spectrum needs finite numbers: {what} of network {list(index)} are not finite")
        yield point


def _per_network(data: Tensor, own: int, shape: torch.Size) -> Tensor:
    """Data of every network, of which ``own`` dimensions are one network's."""
    if data.shape[:-own].numel() == 1:
        data = data.reshape(data.shape[-own:])
    return data.expand(*shape, *data.shape[-own:])


def _reduced(point: Point) -> Point:
    """The same network in an orthonormal basis of its samples, if they are fewer than the features."""
    scene, mlp = point.landscape, point.landscape.mlp
    features, samples = scene.inputs.shape
    if samples >= features:
        return point
    Q, R = torch.linalg.qr(scene.inputs.double())
    small = MLP((samples, *mlp.widths[1:]), mlp.activations, mlp.biases)
    seen = (point.weights.matrices[0].double() @ Q).to(point.flat)
    weights = point.weights._replace(matrices=(seen, *point.weights.matrices[1:]))
    return Landscape(small, R.to(scene.inputs), scene.targets, scene.loss).at(small.flatten(weights))


def _products(point: Point, directions: Tensor) -> Tensor:
    """``∇²L v`` for each of ``[m, P]``."""
    if isinstance(point.landscape.loss, Differentiable):  # differentiates one network's outputs at a time
        return torch.stack([point.hessian_product(v) for v in directions])
    return point.hessian_product(directions)


def _dense(point: Point, chunk_bytes: int) -> Tensor:
    mlp, size = point.landscape.mlp, point.flat.shape[-1]
    each = 2 * size + 4 * point.landscape.inputs.shape[-1] * sum(mlp.widths[1:])
    group = max(1, chunk_bytes // (each * point.flat.element_size()))
    rows = torch.empty(size, size).to(point.flat)
    for begin in range(0, size, group):
        units = torch.zeros(min(group, size - begin), size).to(point.flat)
        units.diagonal(begin).fill_(1)
        rows[begin : begin + group] = _products(point, units)
    _require_finite(rows)
    return (rows + rows.mT) / 2


def _require_finite(products: Tensor) -> None:
    if not bool(torch.isfinite(products).all()):
        raise ConfigError("a spectrum needs finite numbers: a Hessian-vector product overflows")


def _largest(point: Point, count: int, tolerance: float, seed: int, solver: EigenSolver) -> Tensor:
    small = _reduced(point)
    size = small.flat.shape[-1]
    if size <= solver.dense_size or solver.dense_share * count >= size:
        values = torch.linalg.eigvalsh(_dense(small, solver.chunk_bytes).double())
    else:
        values = _lanczos(small, count, tolerance, seed, solver.restarts)
    rounding = 4 * math.sqrt(size) * torch.finfo(point.flat.dtype).eps * values.abs().max()
    values = torch.where(values.abs() > rounding, values, 0.0)
    values = torch.cat([values, values.new_zeros(min(count, point.flat.shape[-1] - size))])
    return values.sort(descending=True).values[:count].to(point.flat)


def _lanczos(point: Point, count: int, tolerance: float, seed: int, restarts: int | None) -> Tensor:
    require_modules("the spectrum of a large Hessian", "scipy")
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    flat = point.flat
    size = flat.shape[-1]

    def product(v: np.ndarray) -> np.ndarray:
        return point.hessian_product(torch.from_numpy(v.reshape(-1)).to(flat)).double().cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(size)
    first = torch.from_numpy(product(start))
    _require_finite(first)
    if not bool(first.any()):  # the zero matrix, of which a Krylov space tells nothing
        return torch.zeros(count, dtype=torch.float64, device=flat.device)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values = eigsh(
            operator, k=count, which="LA", v0=start, maxiter=restarts, tol=tolerance, return_eigenvectors=False
        )
    except ArpackNoConvergence as error:
        raise ConfigError(
            f"tolerance {tolerance} was not reached: {len(error.eigenvalues)} of {count} eigenvalues were found"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(values)).to(flat.device)
