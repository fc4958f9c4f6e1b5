"""Section 3 by computation: what is proved there is measured, and set beside what was proved.

Theorem 3.1: SGD with and without the optimal teleport before each step, with step 1/(β√(T-1)), on quadratics
with noisy gradients. Its assumptions hold exactly: every sample's loss is a quadratic of its own with no
eigenvalue above β; a sample's gradient is an unbiased one of L, in batches of one, drawn anew for each step; what
the group keeps, and what is teleported, is the expected loss L; every sample's least value is 0, so that the
noise at the optimum is σ² = L*; the group is compact, so that the maximum is attained, in closed form.
Prop. 3.2: the angle between gradient and Newton's direction, and one step after a teleport, on ellipsoids and on
a logistic regression whose μ, L and G are known. Prop. 3.4 to 3.6: [A, R]L along the gradient flow after one
teleport. ``--seeds`` are the runs of SGD, ``--steps`` the longest. Half a minute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele.command_line import make_folder
from metatele.errors import ConfigError
from metatele.experiments import images as common
from metatele.intervals import half_width

if TYPE_CHECKING:
    from torch import Tensor

    from metatele.geometry.fields import Field, LossFunction
    from metatele.tasks.functions import CircularFunction
    from metatele.tasks.quadratics import Quadratic

_DIMENSION = 10
_SAMPLES = 200
_HORIZONS = (10, 30, 100, 300, 1000, 3000, 10000)
_ELLIPSES = ((2, 1.5), (2, 10.0), (2, 1000.0), (10, 1.5), (10, 10.0), (10, 1000.0), (50, 100.0))
_LEVELS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_STARTS = 5
_RIDGE = 0.1
_FLOW_POINTS = 40
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#555555", "#56B4E9")


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


def newton() -> list[dict[str, Any]]:
    """Angles and rates on ellipsoids, where the best teleport is known, and on a logistic regression."""
    import torch

    from metatele.tasks.quadratics import Shifted

    arms = []
    for index, (dimension, condition) in enumerate(_ELLIPSES):
        random = _random(10 + index)
        hessian = _hessian(dimension, condition, random)
        ellipse = Shifted(hessian, torch.zeros_like(hessian[0]), 0.0)
        constants = {"convexity": 1 / condition, "smoothness": 1.0, "hessian_lipschitz": 0.0}
        for _ in range(_STARTS):
            sphere = torch.randn(dimension, generator=random, dtype=torch.float64)
            w = torch.linalg.solve(torch.linalg.cholesky(hessian).mT, sphere)  # as likely as any on its level set
            step = _arm_of_step(ellipse.excess, w, ellipse.teleport(w), ellipse.optimum, constants)
            arms.append({"part": "newton", "name": f"ellipsoid, {dimension} weights, condition {condition:g}", **step})
    loss, constants, minimum = logistic()
    random = _random(3)
    for level in _LEVELS:
        for _ in range(_STARTS):
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


def flow(loss: LossFunction, start: Tensor) -> Tensor:
    """Gradient flow from a point, until the loss is a millionth or a unit of time is over, ``[n, P]``."""
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
            max_step=np.inf if positive else 1 / _FLOW_POINTS,
        )
    if not done.success:
        raise ConfigError(f"the gradient flow could not be followed: {done.message}")
    count = done.y.shape[1]
    chosen = sorted({round(i * (count - 1) / _FLOW_POINTS) for i in range(_FLOW_POINTS + 1)})
    return torch.from_numpy(done.y[:, chosen].T.copy())


def flows() -> list[dict[str, Any]]:
    """[A, R]L along the flows after one teleport, and what the checker says at their beginning."""
    import torch

    from metatele.geometry.optimality import one_teleport_is_enough

    arms = []
    for name, (loss, fields, start) in cases().items():
        w = torch.tensor(start, dtype=torch.float64)
        report = one_teleport_is_enough(loss, w, fields)
        points = flow(loss, report.points)
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


# What is left behind


def run(runs: int, longest: int) -> dict[str, Any]:
    """The content of ``results.json``; an arm is one number's worth of circumstances."""
    if runs < 20:
        raise ConfigError(f"--seeds must be at least 20 for an expectation to be measured, got {runs}")
    arms, seconds = [], {}
    for part, made in (("theorem", lambda: theorem(runs, longest)), ("newton", newton), ("flow", flows)):
        begin_s = time.perf_counter()
        arms += made()
        seconds[part] = time.perf_counter() - begin_s
    return {
        "format": common.FORMAT,
        "experiment": "theory",
        "runs": runs,
        "steps": longest,
        "seconds": seconds,
        "arms": arms,
    }


def _arms(doc: dict[str, Any], part: str) -> dict[str, list[dict[str, Any]]]:
    """Arms of a part by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in doc["arms"]:
        if arm["part"] == part:
            found.setdefault(arm["name"], []).append(arm)
    return found


def _holds(values: Sequence[bool]) -> str:
    return "yes" if all(values) else f"no, {len(values) - sum(values)} of {len(values)}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def table(doc: dict[str, Any]) -> list[list[str]]:
    """Statement by statement, what was measured beside what was claimed."""
    rows = [["statement", "case", "measured", "claimed", "holds"]]
    for name, arms in _arms(doc, "theorem").items():
        for arm in arms:
            left = arm["teleport"]
            high = left["mean"] + left["half_width"]
            rows.append(
                [
                    "Theorem 3.1: min E max ‖∇L‖²",
                    f"{name}, T = {arm['num_steps']}",
                    f"{left['mean']:.3g} ±{left['half_width']:.1g} (without teleport {arm['plain_orbit']['mean']:.3g})",
                    f"≤ {arm['bound']:.3g}",
                    _holds([high <= arm["bound"]]),
                ]
            )
    newton_arms = _arms(doc, "newton")
    for name, arms in newton_arms.items():
        after = [arm["angle_after"] for arm in arms]
        before = _range([math.degrees(arm["angle_before"]) for arm in arms])
        measured = f"{max(after):.1e} rad (before: {before}°)"
        rows.append(["Prop. 3.2: angle to Newton", name, measured, "0", _holds([a < 1e-6 for a in after])])
    for name, arms in newton_arms.items():
        for key, where in (("largest_eigenvalue_at_start", "w₀"), ("largest_eigenvalue_after", "w'")):
            ratios = [arm["eigenvalue"] / arm[key] for arm in arms]
            holds = _holds([r <= 1 + 1e-9 for r in ratios])
            if name.startswith("logistic"):
                rows.append([f"Prop. 3.2: λ₀ / λ_max(∇²L({where}))", name, _range(ratios), "≤ 1", holds])
    for key, title in (("printed_bound", "as printed, L/2μ"), ("bound", "with L/μ")):
        for name, arms in newton_arms.items():
            if "condition 1.5" in name or name.startswith("logistic"):
                ratios = [s["distance"] / s[key] for arm in arms for s in arm["steps"] if s[key] > 0]
                holds = _holds([r <= 1 for r in ratios])
                rows.append([f"Prop. 3.2: ‖w₁ - w*‖ / bound, {title}", name, _range(ratios), "≤ 1", holds])
    for name, (arm,) in _arms(doc, "flow").items():
        derivative = arm["derivatives"][0]
        stays = max(arm["along"]) < 1e-7
        verdict = ["enough" if arm[k] else "not enough" for k in ("enough_to_first_order", "enough")]
        rows.append(
            [
                "Prop. 3.5: [A, R]L along the flow",
                name,
                f"{max(arm['along']):.1e} (before {arm['before']:.1g}; R[A, R]L = {derivative:.1g})",
                f"checker, order 1 and 2: {', '.join(dict.fromkeys(verdict))}",
                "yes" if stays == arm["enough_to_first_order"] else "no",
            ]
        )
    return rows


def order_of_contraction(doc: dict[str, Any]) -> float:
    """Slope of log ‖w₁ - w*‖ over log ‖w' - w*‖ on the small level sets of the logistic regression, γ = 1/λ₀."""
    import numpy as np

    arms = [arm for arm in _arms(doc, "newton")["logistic regression"] if arm["level"] <= 1e-3]
    x, y = (np.log([f(arm) for arm in arms]) for f in (lambda a: a["distance"], lambda a: a["steps"][0]["distance"]))
    return float(np.polyfit(x, y, 1)[0])


def note(doc: dict[str, Any]) -> str:
    """Agreement with the paper, in words."""
    theorem_arms = [arm for arms in _arms(doc, "theorem").values() for arm in arms]
    factors = [arm["bound"] / arm["teleport"]["mean"] for arm in theorem_arms]
    seconds = sum(doc["seconds"].values())
    return (
        f"Theorem 3.1: the bound is {min(factors):.2g} to {max(factors):.2g} times what is measured.\n\n"
        "Proposition 3.2: after the optimal teleport the gradient has Newton's direction, and a step with γ = 1/λ₀ "
        f"contracts with order {order_of_contraction(doc):.2f}. Two things do not hold as printed: λ₀ is an eigenvalue "
        "of the Hessian at w', not bounded by those at w₀, and the linear term needs L/μ, not L/(2μ): Lemma B.1 "
        "integrates s where there is 1, which shows where the condition number is below 2.\n\n"
        "Propositions 3.4 to 3.6: on quadratics, and on a monotone function of one, one teleport is enough; on the "
        "others here it is not. The condition of 3.5 and 3.6 alone does not suffice: x/√(1 - 8x²y) meets it at each "
        "of its optimal points, x = 0, and its flow leaves them at once, because [A, R]L touches zero there.\n\n"
        f"{doc['runs']} runs of SGD, half of them to choose t; intervals of 95 %. Running time {seconds:.0f} s."
    )


def figure(doc: dict[str, Any]) -> bytes:
    """Theorem 3.1, Prop. 3.2 (angle, rate) and Prop. 3.5, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, grid = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    _draw_theorem(grid[0, 0], doc)
    _draw_angles(grid[0, 1], doc)
    _draw_rate(grid[1, 0], doc)
    _draw_flows(grid[1, 1], doc)
    places = ("lower left", "center", "upper left", "center right")
    for axes, place in zip(grid.flat, places, strict=True):
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    return common.png(fig)


def _draw_theorem(axes: Any, doc: dict[str, Any]) -> None:
    for (name, arms), colour in zip(_arms(doc, "theorem").items(), _COLOURS, strict=False):
        x = [arm["num_steps"] for arm in arms]
        left = [arm["teleport"] for arm in arms]
        means, errors = [a["mean"] for a in left], [a["half_width"] for a in left]
        axes.errorbar(x, means, errors, color=colour, marker="o", markersize=4, capsize=3, label=name)
        axes.plot(x, [arm["plain_orbit"]["mean"] for arm in arms], color=colour, linestyle=":")
        axes.plot(x, [arm["bound"] for arm in arms], color=colour, linestyle="--")
    axes.plot([], [], color="black", linestyle="--", label="bound")
    axes.plot([], [], color="black", linestyle=":", label="SGD without teleport (no bound claimed)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("T")
    axes.set_ylabel("min over t of E max over g ‖∇L(g w)‖²")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30)  # room for the legend
    axes.set_title("Theorem 3.1", fontsize=10)


def _draw_angles(axes: Any, doc: dict[str, Any]) -> None:
    names = _arms(doc, "newton")
    for key, colour, marker in (("angle_before", "#555555", "o"), ("angle_after", "#D55E00", "s")):
        points = [(i, max(math.degrees(arm[key]), 1e-16)) for i, arms in enumerate(names.values()) for arm in arms]
        label = "before the teleport" if key == "angle_before" else "after (below 1e-16 drawn there)"
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linestyle="", label=label)
    axes.set_yscale("log")
    short = [name.replace(" weights, condition ", ", ").replace(" ", "\n") for name in names]
    axes.set_xticks(range(len(names)), short, fontsize=7)
    axes.set_ylabel("angle of ∇L to Newton's direction, degrees")
    axes.set_title("Prop. 3.2; ellipsoid: weights, condition number", fontsize=10)


def _draw_rate(axes: Any, doc: dict[str, Any]) -> None:
    arms = _arms(doc, "newton")["logistic regression"]
    for i, (label, colour) in enumerate((("γ = 1/λ₀", "#D55E00"), ("γ = 1/(2λ₀)", "#0072B2"))):
        triples = sorted((a["distance"], a["steps"][i]["distance"], a["steps"][i]["bound"]) for a in arms)
        x, y, bound = zip(*triples, strict=True)
        axes.plot(x, y, color=colour, marker="o", markersize=4, label=f"teleport, {label}")
        axes.plot(x, bound, color=colour, linestyle="--", label=f"bound, {label}")
    pairs = [(a["distance_before"], a["plain_after_step"]) for a in arms]
    axes.plot(
        *zip(*pairs, strict=True), color="#555555", marker="x", linestyle="", markersize=4, label="no teleport, γ = 1/L"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("distance to the minimum before the step")
    axes.set_ylabel("after it")
    axes.set_title("Prop. 3.2 on logistic regression: one gradient step", fontsize=10)


def _draw_flows(axes: Any, doc: dict[str, Any]) -> None:
    for (name, (arm,)), colour in zip(_arms(doc, "flow").items(), _COLOURS, strict=False):
        values = [max(v, 1e-18) for v in arm["along"]]
        progress = [i / (len(values) - 1) for i in range(len(values))]
        style = "-" if arm["enough"] else "--"
        axes.plot(progress, values, color=colour, linestyle=style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("part of the steps along the gradient flow")
    axes.set_ylabel("|[A, R]L|, scale-free (below 1e-18 drawn there)")
    axes.set_title("Prop. 3.5: after one teleport; solid: the checker says enough", fontsize=10)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    args = common.small_parser("theory", __doc__, 2000, 1000).parse_args(arguments)
    out = Path(args.out)
    if not args.redraw:
        make_folder(out)
    doc = common.stored(out, "theory") if args.redraw else run(args.seeds, args.steps)
    common.finish(doc, out, table, figure, "theory.png", note(doc))
