"""A step, made of its parts: moments, controls, direction, guard, change of the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant import guard, moments
from metatele.learned.equivariant.controller import Close, Controls, Sight, log, sound
from metatele.learned.equivariant.direction import again, controlled, limited
from metatele.learned.equivariant.observation import Observation, Wants, inner
from metatele.learned.equivariant.states import Change, EquivariantStates, Level, Motion, Spread
from metatele.learned.lstm import LSTMState
from metatele.network.use import Use, is_same_batch
from metatele.perceptron.losses import kind, level


class EquivariantStep(NamedTuple):
    """One step.

    Attributes:
        changes: Of each layer's weights ``[B, o, i]``, a bias as last column.
        states: Memories after it.
        shortened: Whether the change takes back most of the last step instead, ``[B]``.
    """

    changes: list[Tensor]
    states: EquivariantStates
    shortened: Tensor


Controller = Callable[[Sight], tuple[Controls, LSTMState]]


def advance(
    seen: Observation,
    states: EquivariantStates | None,
    controller: Controller,
    memory: Callable[[], LSTMState],
    config: EquivariantConfig,
    pauses: bool = True,
    spend: bool = False,
) -> EquivariantStep:
    """One step; see :meth:`~metatele.learned.equivariant.optimizer.EquivariantOptimizer.step`.

    Args:
        seen: In the pass.
        states: Memories; ``None`` at the beginning.
        controller: What sets the controls.
        memory: Makes its first memory.
        config: Settings.
        pauses: Whether it may skip looks.
        spend: Whether the memories given may be written over.
    """
    close, same, uses = None, False, list[Use]()
    if states is None:
        states = EquivariantStates.initial(seen.gradients, memory(), seen.fingerprint().numbers(), config.start)
        wanted = Wants.everything(len(seen.gradients)).layers
        uses = seen.uses(wanted)
        states = _observed(seen, uses, wanted, states, states.fingerprint, config, pauses)
        close = Close.of(seen.gradients, states)
    elif states.looks:
        wanted = states.wants(config, pauses).layers
        uses = seen.uses(wanted)
        states = _observed(seen, uses, wanted, states, seen.fingerprint().numbers(), config, pauses)
        same = states.same
        close = Close.of(seen.gradients, states)
    elif states.looks_next:
        states = states.but(fingerprint=seen.fingerprint().numbers())
        close = Close.of(seen.gradients, states)
    now = level(seen.outputs, seen.error, states.kind)
    if states.age == 0:
        states = states.but(level=Level(now, now, now))
    before, looks = states, states.looks
    # What is not finite is not smaller than anything either.
    well = now - states.level.kept <= guard.allowed(same, seen.samples, config)
    if looks:
        assert close is not None
        if states.age == 0:
            states = states.but(measured=states.measured._replace(length=close.length))
        set_to, kept = controller(Sight.of(states, close, uses, seen.sizes(), now, same))
        states = states.but(control=states.control._replace(memory=kept))
        squares = torch.stack([use.square for use in uses if use.square is not None], -1)
        states, D = controlled(close.gradients, squares, seen.samples, states, set_to, same, config)
        well = well & torch.isfinite(states.control.limit.sum(-1))
        calm = not same and bool(well.all())
    else:
        gradients = seen.gradients if close is None else close.gradients
        if torch.is_grad_enabled():
            finite = torch.isfinite(inner(gradients, gradients)).all(-1)
            if not bool(finite.all()):
                # A step from there is shortened, but what is left out must not make derivatives of the others NaN.
                well, gradients = well & finite, sound(gradients)
        states, D = again(gradients, states)
        with torch.no_grad():
            sizes, limit = inner(D, D), states.control.limit
            calm = bool((well & (sizes <= limit).all(-1)).all())  # as nearly all are
            if not calm:
                well = well & torch.isfinite(sizes.sum(-1))
        if not calm:
            D = limited(D, sizes, limit)
    states = _paced(states)
    with torch.no_grad():
        judged = guard.verdict(well, now, states.level.lowest, same, config)
        back = not calm and states.age > 0 and bool(judged.shorten.any())
    # A step that is shortened is made of the old memories.
    changes, velocity = _moved(D, states, spend and not back and states.age > 0)
    with torch.no_grad():
        D = [d.detach() for d in D]
        new = states.but(age=states.age + 1, motion=Motion(velocity, D))
        if looks:
            new = new.but(until=states.age + moments.wait(states.averaged, config, pauses))
        if close is not None:
            new = _measured(
                new,
                states,
                close,
                changes,
                Level(states.level.start, now if looks else states.level.kept, judged.lowest),
                looks,
            )
    if back:
        new, changes = guard.shortened(before, new, changes, judged, now, same, config)
    return EquivariantStep(changes, new, judged.shorten)


@torch.no_grad()
def _observed(
    seen: Observation,
    uses: list[Use],
    wanted: frozenset[int],
    states: EquivariantStates,
    fingerprint: Tensor,
    config: EquivariantConfig,
    pauses: bool,
) -> EquivariantStates:
    """States with the moments of a batch taken in."""
    age = states.age
    same = age > 0 and is_same_batch(fingerprint, states.fingerprint)
    batch = moments.counts(age, states.averaged, same, seen.samples, config)
    renewed, renew = [], []
    for layer, (use, gradient) in enumerate(zip(uses, seen.gradients, strict=True)):
        due = age >= states.renew[layer]
        # Moments of the one batch are asked for with the spectra.
        taken = use if layer in wanted and (due or not same) else use._replace(inputs=None)
        renewed.append(moments.taken_in(states.moments[layer] if age else None, taken, batch, due, config))
        period = moments.period(gradient.shape[-2:], batch.averaged, config)
        renew.append(age + min(period, age // config.young + 1) if due else states.renew[layer])
    spread = states.spread
    if any(at <= age for at in states.renew):
        spread = Spread(*moments.participation(renewed, len(states.predicted)))
    new = states.but(
        averaged=batch.averaged, fingerprint=fingerprint, same=same, spread=spread, moments=renewed, renew=renew
    )
    if age % config.recognise < moments.wait(batch.averaged, config, pauses):
        new = new.but(kind=kind(seen.outputs, seen.error))
    return new


def _paced(states: EquivariantStates) -> EquivariantStates:
    """With β, η, a, b of each layer at hand."""
    if states.prepared.paces is not None:
        return states
    pace = states.control.pace
    paces = list(zip(*(t[..., None, None].unbind(1) for t in pace), strict=True))
    last = Change(pace.of_velocity.detach(), pace.of_direction.detach())
    return states.but(prepared=states.prepared._replace(paces=paces), last=last)


def _moved(D: list[Tensor], states: EquivariantStates, spend: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Changes ``aV + bD`` of the weights, and new velocities ``V = βV - ηD``."""
    paces = states.prepared.paces
    assert paces is not None
    velocity, changes = [], []
    rooms = zip(*states.motion, strict=True) if spend else repeat((None, None))
    for d, old, (beta, rate, a, b), (room, other) in zip(D, states.motion.velocity, paces, rooms, strict=False):
        velocity.append(torch.mul(beta, old, out=room).addcmul_(rate, d, value=-1))
        changes.append(torch.mul(a, velocity[-1], out=other).addcmul_(b, d))
    return changes, velocity


def _measured(
    new: EquivariantStates, states: EquivariantStates, close: Close, changes: list[Tensor], now: Level, looks: bool
) -> EquivariantStates:
    """With what the controller will ask about the step."""
    D, measured = new.motion.direction, states.measured
    slope = inner(close.gradients, D)
    beta, rate, a, b = states.control.pace
    predicted = (a * (beta * close.ahead - rate * slope) + b * slope).sum(-1)
    reach = measured.reach
    if not looks:
        reach = states.control.stretch + log(inner(D, D)) / 2 + states.control.log_rate
    measured = measured._replace(squares=inner(changes, changes), slope=slope, length=close.length, reach=reach)
    return new.but(level=now, measured=measured, predicted=predicted)
