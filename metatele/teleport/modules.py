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
from metatele.symmetry.exact import Element, act_, element_of, pullback
from metatele.teleport.report import Reason, TeleportReport
from metatele.teleport.slopes import slope_of


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
    names = list(dict.fromkeys(name for s in moving for name in s.parameters))
    tensors: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters()}
    # Steps in half precision would be lost, or add up their rounding: what is written is rounded once.
    exact = {n: tensors[n].double() if tensors[n].element_size() < 4 else tensors[n] for n in names}

    def write(to: dict[str, Tensor]) -> None:
        for n, t in to.items():
            if t is not exact[n]:
                exact[n].copy_(t)
            if exact[n] is not tensors[n]:
                tensors[n].copy_(exact[n])

    sign = -1.0 if descend else 1.0
    goal = GradientNorm() if objective is None else objective
    with steady(model), buffers_kept(model):
        slope = slope_of(goal, ModulePoint(model, loss, moving, group))
        first_loss, first = slope.value()
        best, known_loss, done, taken_back = first, first_loss, 0, False
        kept = {n: t.clone() for n, t in exact.items()}
        size = math.sqrt(sum(float(t.double().square().sum()) for t in kept.values()))
        reason = Reason.MOVED
        fresh = True
        slopes: dict[str, Tensor] = {}
        for _ in range(steps):
            if math.isfinite(cap) and sign * best >= sign * cap:
                reason = reason if done else Reason.CAP
                break
            slopes = slope.derivative() if fresh else slopes
            tangents = [sign * pullback(s, tensors, slopes) for s in moving]
            norm = math.sqrt(sum(float(t.square().sum()) for t in tangents))
            if not (0 < norm < math.inf):
                reason = Reason.NO_DIRECTION
                break
            elements = [element_of(s, t * (radius / norm)) for s, t in zip(moving, tangents, strict=True)]
            for s, element in zip(moving, elements, strict=True):
                act_(s, element, {**tensors, **exact})
            change = math.sqrt(sum(float((t - kept[n]).double().square().sum()) for n, t in exact.items())) / size
            write(exact)
            try:
                now_loss, now = slope.value() if change <= max_change else (math.nan, math.nan)
            except BaseException:  # whatever the loss raises: the model is not left half moved
                write(kept)
                raise
            drift = abs(now_loss - first_loss) / max(abs(first_loss), 1e-30)
            if math.isfinite(now) and drift <= max_drift and sign * now > sign * best:
                best, known_loss, done, fresh = now, now_loss, done + 1, True
                kept = {n: t.clone() for n, t in exact.items()}
                if path is not None:
                    path += zip(moving, elements, strict=True)
                continue
            taken_back = taken_back or not drift <= max_drift
            write(kept)
            radius, fresh, reason = radius / 2, False, Reason.NO_GAIN
    why = Reason.MOVED if done else reason
    return TeleportReport(
        *(goal.name, first_loss, known_loss, first, best),
        *(abs(known_loss - first_loss) / max(abs(first_loss), 1e-30), done > 0, taken_back, done),
        *(time.perf_counter() - begin_s, why.sentence),
    )
