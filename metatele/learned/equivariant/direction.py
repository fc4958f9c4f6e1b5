r"""The direction of a step, and its length.

.. math::
    D = (g_δ^T g_δ)\, ∇W\, (g_h^T g_h), \qquad V ← β V - η D

η is the step size times a unit: 1 over the relative change of the layer's pre-activations by the first D,
``√(tr(D M Dᵀ) / (o (mean z² + floor)))`` with M the inputs' moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.controller import Controls, log
from metatele.learned.equivariant.moments import weight
from metatele.learned.equivariant.observation import inner
from metatele.learned.equivariant.states import Bend, EquivariantStates, Pace, Prepared

_TINY = 1e-38


def _left(gradients: Sequence[Tensor], states: EquivariantStates) -> tuple[EquivariantStates, list[Tensor]]:
    """``(g_δᵀ g_δ) ∇W`` of each layer."""
    turns = states.prepared.error_turns
    if turns is None:
        bend = states.control.bend
        columns = zip(states.moments, bend.error_damping.unbind(1), bend.error_power.unbind(1), strict=True)
        turns = [m.error_spectrum.turn(damping, power) for m, damping, power in columns]
        states = states.but(prepared=states.prepared._replace(error_turns=turns))
    return states, [turn.from_left(g) for turn, g in zip(turns, gradients, strict=True)]


def again(gradients: Sequence[Tensor], states: EquivariantStates) -> tuple[EquivariantStates, list[Tensor]]:
    """D of each layer with the controls there are."""
    states, half = _left(gradients, states)
    turns = states.prepared.input_turns
    if turns is None:
        bend = states.control.bend
        columns = zip(states.moments, bend.input_damping.unbind(1), bend.input_power.unbind(1), strict=True)
        turns = [m.input_spectrum.turn(damping, power, scaled=True) for m, damping, power in columns]
        states = states.but(prepared=states.prepared._replace(input_turns=turns))
    return states, [turn.from_right(d) for turn, d in zip(turns, half, strict=True)]


def limited(D: list[Tensor], squares: Tensor, limit: Tensor) -> list[Tensor]:
    """D of each layer with ``‖D‖²`` no larger than a limit, both ``[B, layers]``.

    Example:
        >>> limited([torch.full((1, 1, 4), 2.0)], torch.tensor([[16.0]]), torch.tensor([[4.0]]))
        [tensor([[[1., 1., 1., 1.]]])]
    """
    over = squares > limit
    if not bool(over.any()):
        return D
    factors = torch.where(over, (limit / squares).sqrt(), 1.0)[..., None, None].unbind(1)
    return [f * d for f, d in zip(factors, D, strict=True)]


def controlled(
    gradients: Sequence[Tensor],
    squares: Tensor,
    samples: int,
    states: EquivariantStates,
    controls: Controls,
    same: bool,
    config: EquivariantConfig,
) -> tuple[EquivariantStates, list[Tensor]]:
    """States with new controls, and D of each layer with them.

    Args:
        gradients: Of each layer.
        squares: Mean ``z²`` of each layer's outputs, ``[B, layers]``.
        samples: Of the batch.
        states: With the controller's new memory.
        controls: What it set.
        same: Whether the batch is the last one.
        config: Of the optimizer.
    """
    control, bend = states.control, controls.bend
    states, half = _left(gradients, states.but(control=control._replace(bend=bend), prepared=Prepared()))
    D, sizes = [], []
    columns = zip(half, states.moments, bend.input_damping.unbind(1), bend.input_power.unbind(1), strict=True)
    for d, moments, damping, power in columns:
        turned, size = moments.input_spectrum.from_right(d, damping, power)
        D.append(turned)
        sizes.append(size / d.shape[-2])
    floored = squares.nan_to_num(1.0, 1.0, 1.0) + config.floor
    found = (torch.stack(sizes, -1) / floored).clamp_min(_TINY).sqrt()
    sound = torch.isfinite(found) & (found > 2 * _TINY**0.5)
    fresh = control.unit <= 0  # no gradient has reached the layer yet
    unit = torch.where(sound, 1 / torch.where(sound, found, 1.0), 0.0)
    unit = torch.where(fresh, unit, control.unit)
    reach = log(unit * torch.where(sound, found, 0.0)).detach()
    log_rate = torch.where(fresh, config.start, control.log_rate) + controls.growth
    log_rate = torch.minimum(log_rate, math.log(config.reach) - reach).clamp(max=config.fastest)
    rate = log_rate.exp() * unit
    if states.age and not same:
        rate = rate * weight(samples, config)
    beta, nu = controls.momentum, controls.nesterov
    # The change is V + ν(βV - ηD - V) = a V + b D, V the new velocity.
    pace = Pace(beta, rate, 1 - nu + nu * beta, -nu * rate)
    with torch.no_grad():
        lengths = inner(D, D)
        stretch, limit = reach - log(lengths) / 2, config.far * lengths
    control = control._replace(unit=unit, log_rate=log_rate, pace=pace, bend=Bend(*bend), stretch=stretch, limit=limit)
    measured = states.measured._replace(reach=reach + log_rate.detach())
    return states.but(control=control, measured=measured), D
