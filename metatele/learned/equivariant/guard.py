"""What is done about a step after which the loss has grown: most of it is taken back.

The change of such a step is multiplied by ``shorten``, and so are later steps until the controller makes them longer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.moments import weight
from metatele.learned.equivariant.observation import inner
from metatele.learned.equivariant.states import Change, EquivariantStates, Level, Measured, Motion


class Verdict(NamedTuple):
    """Of the last step, each ``[B]``.

    Attributes:
        shorten: Whether to shorten it.
        leapt: Whether by itself it made the loss grow too much.
        lowest: Log of the lowest loss, with this one.
    """

    shorten: Tensor
    leapt: Tensor
    lowest: Tensor


def allowed(same: bool, samples: int, config: EquivariantConfig) -> float:
    """Largest growth of the log of the loss in a step.

    Two mini-batches differ anyway, small ones more.

    Example:
        >>> config = EquivariantConfig()
        >>> [round(math.exp(allowed(*case, config)), 3) for case in ((True, 100), (False, 100), (False, 16))]
        [2.0, 16.0, 32.0]
    """
    most = math.log(config.growth)
    return most if same else 4 * most - math.log(weight(samples, config))


def verdict(well: Tensor, now: Tensor, lowest: Tensor, same: bool, config: EquivariantConfig) -> Verdict:
    """What to do with the last step.

    Args:
        well: Whether the loss has not grown too much, and the next direction is finite, ``[B]``.
        now: Log of the loss.
        lowest: Log of the lowest one before.
        same: Whether the batch is the last one.
        config: Of the optimizer.
    """
    if not same:
        return Verdict(~well, ~well, now)
    # Many small rises are a large one: without this, steps at the level of rounding may grow for long.
    most = math.log(config.crept)
    crept = now - lowest > most
    lowest = torch.where(crept, now - most / 2, torch.minimum(now, lowest + config.leak))
    return Verdict(~well | crept, ~well, lowest)


def shortened(
    before: EquivariantStates,
    after: EquivariantStates,
    changes: list[Tensor],
    judged: Verdict,
    now: Tensor,
    same: bool,
    config: EquivariantConfig,
) -> tuple[EquivariantStates, list[Tensor]]:
    """States and changes with the last step shortened, in place of a new one, in the trajectories that are to be.

    Args:
        before: Before the new step.
        after: After it.
        changes: Of the weights by it.
        judged: Which trajectories.
        now: Log of the loss.
        same: Whether the batch is the last one.
        config: Of the optimizer.
    """
    shorten, leapt = judged.shorten, judged.leapt
    at, each = shorten[:, None, None], shorten[:, None]
    log_left = math.log(config.shorten)
    old = [
        (a * v + b * d).detach()
        for a, b, v, d in zip(
            *(t[..., None, None].unbind(1) for t in before.last),
            before.motion.velocity,
            before.motion.direction,
            strict=True,
        )
    ]
    pace, less = before.control.pace, config.shorten
    shrunk = pace._replace(rate=less * pace.rate, of_direction=less * pace.of_direction)
    level = after.level
    # Another batch does not tell how good the old point was: an easy one must not stop all later steps.
    # A rise that goes on when steps are shortened again and again is not theirs: targets or weights were changed.
    twice = (before.last.of_direction == 0).all(-1)
    reference = before.level.kept + torch.where(twice, math.log(config.forgive), 0.0)
    kept = torch.where(leapt if same else ~torch.isfinite(now), reference, now)
    was, new = before.measured, after.measured
    states = after.but(
        motion=Motion(  # What is left of the step becomes the velocity, and is the last change.
            [torch.where(at, less * o, v) for o, v in zip(old, after.motion.velocity, strict=True)],
            [torch.where(at, o, d) for o, d in zip(before.motion.direction, after.motion.direction, strict=True)],
        ),
        last=Change(torch.where(each, 1.0, after.last.of_velocity), torch.where(each, 0.0, after.last.of_direction)),
        level=Level(
            level.start, torch.where(shorten, kept, level.kept), torch.where(leapt, before.level.lowest, level.lowest)
        ),
        measured=Measured(
            torch.where(each, less**2 * inner(old, old), new.squares),
            torch.where(each, was.slope, new.slope),
            torch.where(each, was.length, new.length),
            torch.where(each, was.reach + log_left, new.reach),
        ),
        predicted=torch.where(shorten, less * before.predicted, after.predicted),
        control=after.control._replace(
            log_rate=torch.where(each, before.control.log_rate + log_left, after.control.log_rate),
            pace=type(pace)(*(torch.where(each, s, n) for s, n in zip(shrunk, after.control.pace, strict=True))),
        ),
        prepared=after.prepared._replace(paces=None),
    )
    return states, [torch.where(at, (less - 1) * o, c) for o, c in zip(old, changes, strict=True)]
