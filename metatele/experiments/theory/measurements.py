"""What is measured of each statement: SGD's runs, single steps and flows; see the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metatele.errors import ConfigError
from metatele.intervals import half_width

if TYPE_CHECKING:
    from torch import Tensor

    from metatele.geometry.fields import Field, LossFunction
    from metatele.tasks.functions import CircularFunction
    from metatele.tasks.quadratics import Quadratic

_DIMENSION = 10
_SAMPLES = 200
_HORIZONS = (10, 30, 100, 300, 1000, 3000, 10000)
_RIDGE = 0.1


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        ellipsoids: Dimension and condition number of each.
        levels: Level sets of the logistic regression, as losses above the least.
        starts: Points on each ellipsoid and level set.
        flow_points: Points along a flow, without its beginning.
    """

    ellipsoids: tuple[tuple[int, float], ...] = (
        (2, 1.5),
        (2, 10.0),
        (2, 1000.0),
        (10, 1.5),
        (10, 10.0),
        (10, 1000.0),
        (50, 100.0),
    )
    levels: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    starts: int = 5
    flow_points: int = 40


def _random(index: int) -> Any:
    from metatele.random import generator

    return generator(0, "evaluation", index)


# Theorem 3.1


def problems() -> dict[str, Quadratic]:
    """The quadratics SGD runs on, and a name for each."""
    import torch

    from metatele.tasks.quadratics import Shifted, least_squares

    random = _random(0)
    found: dict[str, Quadratic] = {}
    for condition in (10.0, 100.0):
        hessian = _hessian(_DIMENSION, condition, random)
        found[f"shifted, condition {condition:g}"] = Shifted(hessian, torch.zeros_like(hessian[0]), 0.5)
    scales = _spectrum(_DIMENSION, 100.0).sqrt()
    inputs = torch.randn(_SAMPLES, _DIMENSION, generator=random, dtype=torch.float64) * scales
    exact = inputs @ torch.randn(_DIMENSION, generator=random, dtype=torch.float64)
    noise = torch.randn(_SAMPLES, generator=random, dtype=torch.float64)
    found["least squares"] = least_squares(inputs, exact + noise)
    found["least squares, σ = 0"] = least_squares(inputs, exact)
    return found


def _spectrum(dimension: int, condition: float) -> Tensor:
    """Eigenvalues from 1/condition to 1, evenly on the log scale."""
    import torch

    return torch.logspace(-math.log10(condition), 0, dimension, dtype=torch.float64)


def _hessian(dimension: int, condition: float, random: Any) -> Tensor:
    """With this spectrum and random axes."""
    import torch

    axes = torch.linalg.qr(torch.randn(dimension, dimension, generator=random, dtype=torch.float64)).Q
    hessian = axes @ torch.diag(_spectrum(dimension, condition)) @ axes.mT
    return (hessian + hessian.mT) / 2


def descend(problem: Quadratic, start: Tensor, num_steps: int, runs: int, teleport: bool) -> dict[str, Tensor]:
    """``‖∇L‖²`` where the gradient is taken, and the largest on the orbit, ``[num_steps, runs]``."""
    import torch

    random = _random(num_steps)
    step = 1 / (problem.smoothness * (num_steps - 1) ** 0.5)
    largest = problem.top()[0]
    w = start.expand(runs, -1)
    here, orbit = [], []
    for _ in range(num_steps):
        w = problem.teleport(w) if teleport else w
        here.append(problem.gradient_norm(w))
        orbit.append(2 * largest * problem.excess(w))  # ‖∇L‖² = 2λ(L - L*) at the top eigenvector
        w = w - step * problem.sampled_gradient(w, random)
    return {"here": torch.stack(here), "orbit": torch.stack(orbit), "excess": problem.excess(w)}


def _least_mean(values: Tensor) -> dict[str, float]:
    """``min_t E`` over runs: t is chosen on one half of them, mean and interval are the other half's."""
    half = values.shape[1] // 2
    best = int(values[:, :half].mean(1).argmin())
    rest = values[best, half:].tolist()
    return {"step": best, "mean": sum(rest) / len(rest), "half_width": half_width(rest)}


def theorem(runs: int, longest: int) -> list[dict[str, Any]]:
    """Both sides of Theorem 3.1."""
    import torch

    from metatele.geometry.optimality import sgd_bound

    arms = []
    for name, problem in problems().items():
        start = problem.optimum + torch.randn(_DIMENSION, generator=_random(1), dtype=torch.float64)
        gap = float(problem.excess(start))
        for num_steps in (t for t in _HORIZONS if t <= longest):
            runs_of = {tele: descend(problem, start, num_steps, runs, tele) for tele in (True, False)}
            arms.append(
                {
                    "part": "theorem",
                    "name": name,
                    "num_steps": num_steps,
                    "smoothness": problem.smoothness,
                    "noise": problem.noise,
                    "gap": gap,
                    "bound": sgd_bound(problem.smoothness, gap, problem.noise, num_steps),
                    "teleport": _least_mean(runs_of[True]["orbit"]),
                    "plain": _least_mean(runs_of[False]["here"]),
                    "plain_orbit": _least_mean(runs_of[False]["orbit"]),
                    "final_excess": {
                        key: {"mean": float(v.mean()), "half_width": half_width(v.tolist())}
                        for key, v in (("teleport", runs_of[True]["excess"]), ("plain", runs_of[False]["excess"]))
                    },
                }
            )
    return arms


# Proposition 3.2


def logistic() -> tuple[LossFunction, dict[str, float], Tensor]:
    """Ridge logistic regression in 3 weights, with μ, L and G of Prop. 3.2, and its minimiser."""
    import torch

    from metatele.geometry.optimality import gradient_and_hessian

    random = _random(2)
    inputs = torch.randn(60, 3, generator=random, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0])
    labels = torch.where(torch.rand(60, generator=random) < torch.sigmoid(inputs[:, 0] / 2 - inputs[:, 2]), 1.0, -1.0)

    def loss(w: Tensor) -> Tensor:
        fit = torch.nn.functional.softplus(-labels * (inputs @ w)).mean()
        return fit + _RIDGE / 2 * w.square().sum()

    def top(weights: Tensor) -> float:
        return float(torch.linalg.eigvalsh((inputs * weights.unsqueeze(1)).mT @ inputs / len(inputs))[-1])

    # Of the logistic function, σ' is at most 1/4 and |σ''| at most 1/(6√3).
    constants = {
        "convexity": _RIDGE,
        "smoothness": _RIDGE + top(torch.ones_like(inputs[:, 0])) / 4,
        "hessian_lipschitz": top(inputs.norm(dim=1)) / (6 * 3**0.5),
    }
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(50):
        gradient, hessian = gradient_and_hessian(loss, w)
        w = w - torch.linalg.solve(hessian, gradient)
    return loss, constants, w


def on_level(loss: LossFunction, minimum: Tensor, direction: Tensor, level: float) -> Tensor:
    """The point of the level set ``L = L* + level`` of a convex loss in a direction from its minimiser."""
    from scipy.optimize import brentq

    target = float(loss(minimum)) + level
    end = 1.0
    while float(loss(minimum + end * direction)) < target:
        end *= 2
    length = brentq(lambda t: float(loss(minimum + t * direction)) - target, 0, end, xtol=1e-15, rtol=1e-14)
    return minimum + length * direction


def steepest(loss: LossFunction, w: Tensor, minimum: Tensor, level: float) -> Tensor:
    """The longest gradient on w's level set: the best of ascents from w and both ends of the steep axis."""
    import torch

    from metatele.geometry.optimality import gradient_and_hessian, level_set_fields, teleport_along

    axis = torch.linalg.eigh(gradient_and_hessian(loss, minimum)[1]).eigenvectors[:, -1]
    starts = [w, *(on_level(loss, minimum, sign * axis, level) for sign in (1, -1))]
    ends = teleport_along(loss, torch.stack(starts), level_set_fields(loss, len(w)))
    return ends[gradient_and_hessian(loss, ends)[0].norm(dim=-1).argmax()]


def _arm_of_step(
    loss: LossFunction, w: Tensor, best: Tensor, minimum: Tensor, constants: dict[str, float]
) -> dict[str, Any]:
    """What Prop. 3.2 speaks of, at one start: angles, λ₀, and steps with γ = 1/λ₀ and 1/(2λ₀)."""
    import torch

    from metatele.geometry.optimality import gradient_and_hessian, newton_angle

    gradient, hessian = gradient_and_hessian(loss, best)
    rate = float(gradient @ hessian @ gradient / gradient.square().sum())
    away = float((best - minimum).norm())
    mu, smooth, lipschitz = (constants[k] for k in ("convexity", "smoothness", "hessian_lipschitz"))
    quadratic = lipschitz / (2 * mu) * away**2
    plain = w - gradient_and_hessian(loss, w)[0] / smooth
    return {
        "angle_before": float(newton_angle(loss, w)),
        "angle_after": float(newton_angle(loss, best)),
        "eigenvalue": rate,
        "largest_eigenvalue_at_start": float(torch.linalg.eigvalsh(gradient_and_hessian(loss, w)[1])[-1]),
        "largest_eigenvalue_after": float(torch.linalg.eigvalsh(hessian)[-1]),
        "distance_before": float((w - minimum).norm()),
        "distance": away,
        "plain_after_step": float((plain - minimum).norm()),
        "steps": [
            {
                "damping": damping,
                "distance": float((best - damping / rate * gradient - minimum).norm()),
                "printed_bound": quadratic + (1 - damping) * smooth / (2 * mu) * away,
                "bound": quadratic + (1 - damping) * smooth / mu * away,
            }
            for damping in (1.0, 0.5)
        ],
    }


def newton(extent: Extent) -> list[dict[str, Any]]:
    """Angles and rates on ellipsoids, where the best teleport is known, and on a logistic regression."""
    import torch

    from metatele.tasks.quadratics import Shifted

    arms = []
    for index, (dimension, condition) in enumerate(extent.ellipsoids):
        random = _random(10 + index)
        hessian = _hessian(dimension, condition, random)
        ellipse = Shifted(hessian, torch.zeros_like(hessian[0]), 0.0)
        constants = {"convexity": 1 / condition, "smoothness": 1.0, "hessian_lipschitz": 0.0}
        for _ in range(extent.starts):
            sphere = torch.randn(dimension, generator=random, dtype=torch.float64)
            w = torch.linalg.solve(torch.linalg.cholesky(hessian).mT, sphere)  # as likely as any on its level set
            step = _arm_of_step(ellipse.excess, w, ellipse.teleport(w), ellipse.optimum, constants)
            arms.append({"part": "newton", "name": f"ellipsoid, {dimension} weights, condition {condition:g}", **step})
    loss, constants, minimum = logistic()
    random = _random(3)
    for level in extent.levels:
        for _ in range(extent.starts):
            direction = torch.randn(3, generator=random, dtype=torch.float64)
            w = on_level(loss, minimum, direction / direction.norm(), level)
            step = _arm_of_step(loss, w, steepest(loss, w, minimum, level), minimum, constants)
            arms.append({"part": "newton", "name": "logistic regression", "level": level, **step})
    return arms


# Propositions 3.4 to 3.6


def rotation(function: CircularFunction) -> Callable[[Tensor], Tensor]:
    """Velocity of the rotations of u(w) that keep a function of the plane."""
    import torch

    def field(w: Tensor) -> Tensor:
        u = function.coordinates(w)
        return torch.linalg.solve(function.jacobian(w), torch.stack([-u[1], u[0]]))

    return field


def cases() -> dict[str, tuple[LossFunction, list[Field], tuple[float, float]]]:
    """Losses, their symmetries and where to begin."""
    import torch

    from metatele.geometry.optimality import level_set_fields
    from metatele.tasks.functions import FUNCTIONS, function

    found: dict[str, tuple[LossFunction, list[Field], tuple[float, float]]] = {
        name: (f.value, [rotation(f)], f.start) for name, f in FUNCTIONS.items()
    }
    ellipse = function("ellipse")
    found["log(1 + ellipse)"] = (lambda w: ellipse.value(w).log1p(), [rotation(ellipse)], (2.0, 0.2))

    def cosh(w: Tensor) -> Tensor:
        return torch.cosh(w[0]) + torch.cosh(2 * w[1]) + 0.3 * torch.cosh(w[0] + w[1]) - 2.3

    found["cosh (strictly convex)"] = (cosh, [*level_set_fields(cosh, 2)], (1.0, 0.5))

    def lines(w: Tensor) -> Tensor:
        return w[0] / (1 - 8 * w[0] ** 2 * w[1]).sqrt()

    found["x/√(1 - 8x²y)"] = (lines, [*level_set_fields(lines, 2)], (0.0, -1.0))
    return found


def flow(loss: LossFunction, start: Tensor, points: int = 40) -> Tensor:
    """Gradient flow from a point, until the loss is a millionth or a unit of time is over, ``[points + 1, P]``."""
    import numpy as np
    import torch
    from scipy.integrate import solve_ivp

    first = float(loss(start))
    positive = first > 0  # then its least value is 0

    def velocity(_: float, w: Any) -> Any:
        at = torch.from_numpy(w).requires_grad_()
        return -torch.autograd.grad(loss(at), at)[0].numpy()

    def low(_: float, w: Any) -> float:
        return float(loss(torch.from_numpy(w))) - 1e-6 * first

    setattr(low, "terminal", True)  # noqa: B010
    with np.errstate(all="ignore"):  # a step that overflows is taken back by the solver
        done = solve_ivp(
            velocity,
            (0, 1000.0 if positive else 1.0),
            start.numpy(),
            "LSODA",  # steep valleys are stiff
            rtol=1e-12,
            atol=1e-15,
            events=low if positive else None,
            max_step=np.inf if positive else 1 / points,
        )
    if not done.success:
        raise ConfigError(f"the gradient flow could not be followed: {done.message}")
    count = done.y.shape[1]
    chosen = sorted({round(i * (count - 1) / points) for i in range(points + 1)})
    return torch.from_numpy(done.y[:, chosen].T.copy())


def flows(extent: Extent) -> list[dict[str, Any]]:
    """[A, R]L along the flows after one teleport, and what the checker says at their beginning."""
    import torch

    from metatele.geometry.optimality import one_teleport_is_enough

    arms = []
    for name, (loss, fields, start) in cases().items():
        w = torch.tensor(start, dtype=torch.float64)
        report = one_teleport_is_enough(loss, w, fields)
        points = flow(loss, report.points, extent.flow_points)
        along = one_teleport_is_enough(loss, points, fields, move=False, orders=1)
        arms.append(
            {
                "part": "flow",
                "name": name,
                "before": float(report.commutator.abs().max()),
                "after": float(report.commutator_after.abs().max()),
                "derivatives": report.derivatives.abs().amax(0).tolist(),
                "third_order": float(report.third_order),
                "start": report.points.tolist(),
                "along": along.commutator.abs().amax(-1).tolist(),
                "loss": [float(loss(p)) for p in points],
                "enough": report.enough,
                "enough_to_first_order": one_teleport_is_enough(
                    loss, report.points, fields, move=False, orders=1
                ).enough,
            }
        )
    return arms
