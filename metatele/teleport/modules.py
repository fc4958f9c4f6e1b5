r"""Ascent of an objective along the orbit of any module's weights (Zhao et al. 2024, Section 5.1)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metatele.geometry import GradientNorm, ModuleObjective, ModulePoint
from metatele.geometry.module_point import kept as buffers_kept
from metatele.network import ranks
from metatele.network.spaces import Space
from metatele.symmetry.double import steady
from metatele.symmetry.exact import Element
from metatele.symmetry.stacked import Stacked
from metatele.teleport.report import Reason, TeleportReport
from metatele.teleport.slopes import slope_of, told


@torch.no_grad()
def ascend_(
    model: nn.Module,
    spaces: Sequence[Space],
    loss: Callable[[], Tensor],
    *,
    objective: ModuleObjective | None = None,
    steps: int = 10,
    radius: float = 0.1,
    max_change: float = 0.15,
    max_drift: float = 0.01,
    cap: float = math.inf,
    descend: bool = False,
    group: ranks.Group | None = None,
    path: list[tuple[Space, Element]] | None = None,
) -> TeleportReport:
    r"""Raise ``F(g·w)`` in place by steps along the orbit; F is ``‖∇L‖²`` where nothing else is said.

    At a step the derivative is pulled back to the algebra of every space, ``A = pullback(∇F)``, and all spaces act by
    ``exp(T)`` with T along A and ``‖T‖ = radius`` over all together. The groups are not compact and the norm has no
    largest value: ``steps · radius`` bounds how far it goes. A step that did not raise it, that changed the weights by
    more than ``max_change`` of their norm or the loss by more than ``max_drift``, is taken back, and the radius halved.

    A step costs two gradients for ``‖∇L‖²``. For sharpness it costs as many passes as there are displacements of all
    directions, once forward and once backward; these stay the same along the ascent. Curvature costs one pass.

    Args:
        model: Whose parameters are moved.
        spaces: Where; permutations are left out.
        loss: Makes a pass of the model and gives a scalar. What it raises leaves the model as it was at the last step.
        objective: F.
        steps: Tried at most.
        radius: ``‖T‖``, as a Frobenius norm.
        max_change: Of the weights of all spaces by one step, relative.
        max_drift: Of the loss, relative.
        cap: Stop where F reaches it.
        descend: Lower it instead.
        group: Of ranks that hold the same weights: the loss is then the mean of theirs, and all make the same steps.
        path: Gets the spaces and elements of the steps that were kept, for :func:`metatele.carry_along_`.
    """
    begin_s = time.perf_counter()
    moving = [s for s in spaces if s.group != "perm"]
    tensors: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters()}
    orbit = Stacked(moving, tensors)
    # In double precision, and written rounded once: steps in half precision would be lost, or add up their rounding.
    w = orbit.flat(tensors)
    targets = [tensors[n] for n in orbit.names]
    kinds = list({t.dtype for t in targets})

    def write() -> None:
        rounded = w.to(kinds[0]) if len(kinds) == 1 else w
        if targets:
            torch._foreach_copy_(targets, list(orbit.parts(rounded).values()))

    sign = -1.0 if descend else 1.0
    goal = GradientNorm() if objective is None else objective
    with steady(model), buffers_kept(model):
        slope = slope_of(goal, ModulePoint(model, loss, moving, group))
        first_loss, first = slope.value()
        best, known_loss, done, taken_back = first, first_loss, 0, False
        kept, size = w.clone(), torch.linalg.vector_norm(w[: orbit.moved], dtype=torch.float64)
        reason = Reason.MOVED
        direction: Tensor | None = None
        norm = size
        for _ in range(steps):
            if math.isfinite(cap) and sign * best >= sign * cap:
                reason = reason if done else Reason.CAP
                break
            if direction is None:
                direction = sign * orbit.pullback(w, orbit.flat(slope.derivative()))
                norm = torch.linalg.vector_norm(direction)
            elements = orbit.elements(direction * (radius / norm), radius)
            orbit.act_(w, elements)
            change = torch.linalg.vector_norm((w - kept)[: orbit.moved], dtype=torch.float64) / size
            length, far = told(norm, change)
            if not (0 < length < math.inf):
                reason = Reason.NO_DIRECTION
                break
            write()
            try:
                now_loss, now = slope.value() if far <= max_change else (math.nan, math.nan)
            except BaseException:  # whatever the loss raises: the model is not left half moved
                w.copy_(kept)
                write()
                raise
            drift = abs(now_loss - first_loss) / max(abs(first_loss), 1e-30)
            if math.isfinite(now) and drift <= max_drift and sign * now > sign * best:
                best, known_loss, done, direction = now, now_loss, done + 1, None
                kept.copy_(w)
                if path is not None:
                    path += orbit.each(elements)
                continue
            taken_back = taken_back or not drift <= max_drift
            w.copy_(kept)
            write()
            radius, reason = radius / 2, Reason.NO_GAIN
    why = Reason.MOVED if done else reason
    return TeleportReport(
        *(goal.name, first_loss, known_loss, first, best),
        *(abs(known_loss - first_loss) / max(abs(first_loss), 1e-30), done > 0, taken_back, done),
        *(time.perf_counter() - begin_s, why.sentence),
    )
