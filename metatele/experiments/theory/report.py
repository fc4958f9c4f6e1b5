"""The table, the note and the figure that are made of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from metatele import figures


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
    fig, grid = figures.subplots(2, 2, figsize=(figures.WIDTH, 6.6), layout="constrained")
    _draw_theorem(grid[0, 0], doc)
    _draw_angles(grid[0, 1], doc)
    _draw_rate(grid[1, 0], doc)
    _draw_flows(grid[1, 1], doc)
    for axes in (grid[0, 0], grid[1, 0], grid[1, 1]):
        figures.label_lines(axes)
    return figures.png(fig)


def _draw_theorem(axes: Any, doc: dict[str, Any]) -> None:
    for place, (name, arms) in enumerate(_arms(doc, "theorem").items()):
        x, left = [arm["num_steps"] for arm in arms], [arm["teleport"] for arm in arms]
        bounds = [arm["bound"] for arm in arms]
        share = [a["mean"] / b for a, b in zip(left, bounds, strict=True)]
        halves = [a["half_width"] / b for a, b in zip(left, bounds, strict=True)]
        style = figures.line_style(place)
        axes.plot(x, share, marker="o", markersize=4, label=name.replace(", ", ",\n"), **style)
        axes.errorbar(x, share, halves, color=style["color"], capsize=3, linestyle="")
    axes.axhline(1, color=figures.COLOURS[-1], linewidth=1.2, label="the bound")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("T")
    axes.set_ylabel("min E max ‖∇L(g w)‖² over its bound")
    figures.title(axes, "Theorem 3.1")


def _draw_angles(axes: Any, doc: dict[str, Any]) -> None:
    names = _arms(doc, "newton")
    for key, colour, marker in (("angle_before", figures.COLOURS[-1], "o"), ("angle_after", figures.COLOURS[0], "s")):
        points = [(i, max(math.degrees(arm[key]), 1e-16)) for i, arms in enumerate(names.values()) for arm in arms]
        label = "before the teleport" if key == "angle_before" else "after (below 1e-16 drawn there)"
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linestyle="", label=label)
    axes.set_yscale("log")
    short = [name.removeprefix("ellipsoid, ").replace(" weights, condition ", "\n") for name in names]
    axes.set_xticks(
        range(len(names)), [s.replace("logistic regression", "log.\nreg.").replace("1000", "1e3") for s in short]
    )
    axes.text(0.02, 0.5, "before: above\nafter the teleport: below", transform=axes.transAxes, fontsize=figures.SIZE)
    axes.set_xlabel("weights and condition of the ellipsoid")
    axes.set_ylabel("angle to Newton's, degrees")
    figures.title(axes, "Proposition 3.2: direction")


def _draw_rate(axes: Any, doc: dict[str, Any]) -> None:
    arms = _arms(doc, "newton")["logistic regression"]
    for i, (label, colour) in enumerate((("γ = 1/λ₀", figures.COLOURS[0]), ("γ = 1/(2λ₀)", figures.COLOURS[1]))):
        triples = sorted((a["distance"], a["steps"][i]["distance"], a["steps"][i]["bound"]) for a in arms)
        x, y, bound = zip(*triples, strict=True)
        axes.plot(x, y, color=colour, marker="o", markersize=4, label=f"teleport,\n{label}")
        axes.plot(x, bound, color=colour, linestyle="--", label=f"bound,\n{label}")
    pairs = [(a["distance_before"], a["plain_after_step"]) for a in arms]
    black = {"color": figures.COLOURS[-1], "marker": "x", "linestyle": "", "markersize": 4}
    axes.plot(*zip(*sorted(pairs), strict=True), label="no teleport,\nγ = 1/L", **black)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("distance to the minimum before the step")
    axes.set_ylabel("after it")
    figures.title(axes, "Proposition 3.2: a step, log. regression")


def _draw_flows(axes: Any, doc: dict[str, Any]) -> None:
    for (name, (arm,)), colour in zip(_arms(doc, "flow").items(), figures.COLOURS, strict=False):
        values = [max(v, 1e-18) for v in arm["along"]]
        progress = [i / (len(values) - 1) for i in range(len(values))]
        style = "-" if arm["enough"] else "--"
        axes.plot(progress, values, color=colour, linestyle=style, label=name.replace(" (", "\n("))
    axes.set_yscale("log")
    axes.set_xlabel("part of the gradient flow's steps")
    axes.set_ylabel("|[A, R]L|, scale-free, at least 1e-18")
    figures.title(axes, "Proposition 3.5; solid: one is enough")
