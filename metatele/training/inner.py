"""One inner run, on the code path of users, and its score beside Adam's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from metatele.config import EvolutionTrainingConfig
from metatele.tasks.modules import Problem

# What a practitioner tries who tunes little.
REFERENCE_RATES = (1e-3, 1e-2)
# Points of a run at which held-out loss is measured, as shares of its length.
_LOOKED_AT = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)

MakeOptimizer = Callable[[nn.Module, nn.Module, "int | None"], torch.optim.Optimizer]


class Outcome(NamedTuple):
    """What came of a run; infinite where it was not finite.

    Attributes:
        first: Held-out loss before the first step.
        best: Least held-out loss, after the last change of the data.
        end: Held-out loss at the end.
        train: Training loss at the end.
        seconds: Processor time of the run.
        seen: Mean of what the controller saw, where it was noted.
    """

    first: float
    best: float
    end: float
    train: float
    seconds: float = 0.0
    seen: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the run stayed so."""
        return all(math.isfinite(value) for value in (self.best, self.end, self.train))


def run(problem: Problem, make: Callable[[nn.Module, int | None], torch.optim.Optimizer]) -> Outcome:
    """Train a problem's network as its user would, and measure.

    Random numbers are the problem's own, so that two optimizers meet the same dropout; the caller's are left alone.

    Args:
        problem: What to train.
        make: ``make(model, total_steps)`` gives the optimizer.

    Raises:
        Exception: Whatever the optimizer raises.

    Example:
        >>> from metatele.config import ModulesConfig
        >>> from metatele.tasks.modules import Modules
        >>> problem = Modules(ModulesConfig(kinds=("regression",), longest=30)).sample(0, "train", 0)
        >>> run(problem, adam(1e-2)).finite
        True
    """
    begin_s = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        model = problem.model()
        frozen = problem.frozen(model)
        for p in frozen:
            p.requires_grad_(False)
        last = problem.phase(problem.horizon)
        held_out, trained_on = problem.held_out(last), problem.trained_on(last)
        first = problem.judged(model, held_out)
        optimizer, batches, best, end = make(model, problem.total_steps), problem.batches(), math.inf, first
        looks = {max(1, math.ceil(share * problem.horizon)) for share in _LOOKED_AT}
        for step in range(problem.horizon):
            if step == problem.change_at:
                for p in frozen:
                    p.requires_grad_(True)
            optimizer.zero_grad()
            for _ in range(problem.passes):
                batch = next(batches)
                loss = problem.loss(model(batch.inputs), batch.targets) / problem.passes
                loss.backward()
            if problem.clip:
                nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
            optimizer.step()
            if not math.isfinite(loss.item()):
                return Outcome(first, math.inf, math.inf, math.inf, time.process_time() - begin_s)
            if step + 1 in looks and problem.phase(step) == last:
                end = problem.judged(model, held_out)
                best = min(best, end)
        train = problem.judged(model, trained_on)
    best, end, train = (value if math.isfinite(value) else math.inf for value in (best, end, train))
    return Outcome(first, best, end, train, time.process_time() - begin_s)


def adam(rate: float) -> Callable[[nn.Module, int | None], torch.optim.Optimizer]:
    """Adam at a rate, as :func:`run` takes it."""
    return lambda model, _: torch.optim.Adam(model.parameters(), rate)


def better(outcomes: list[Outcome]) -> Outcome:
    """The run with the least held-out loss: what somebody would keep who tried all.

    Example:
        >>> better([Outcome(1, 0.5, 0.7, 0.1), Outcome(1, 0.4, 0.9, 0.1)]).best
        0.4
    """
    return min(outcomes, key=lambda outcome: outcome.best)


def score(ours: Outcome, reference: Outcome, c: EvolutionTrainingConfig) -> float:
    r"""How we did beside Adam; lower is better, 0 is the same.

    .. math::

        s = w_b \log r_b + w_h \log_+ (r_b / 1.05) + w_t \log r_t + w_e \log r_e

    with ratios r of ours to Adam's in the least held-out loss, training loss at the end and held-out loss at the end,
    their logarithms cut to what counts. A share of the first held-out loss is added to held-out losses.

    Args:
        ours: Our run.
        reference: Adam's, the better one.
        c: Weights and limits.

    Example:
        >>> adam_run = Outcome(1.0, 0.5, 0.5, 0.5)
        >>> score(adam_run, adam_run, EvolutionTrainingConfig())
        0.0
        >>> score(Outcome(1.0, float("inf"), 0.5, 0.5), adam_run, EvolutionTrainingConfig())
        6.0
    """
    if not ours.finite:
        return c.lost_score
    if not reference.finite:
        return 0.0  # nothing to compare with

    def held(a: float, b: float) -> float:
        least = c.least_held * min(abs(ours.first), 1e30)
        return math.log(max(a + least, 1e-30) / max(b + least, 1e-30))

    def cut(value: float, low: float) -> float:
        return max(-low, min(c.limit, value))

    best = held(ours.best, reference.best)
    train = math.log(max(ours.train, 1e-30) / max(reference.train, c.least_train))
    ends = c.end_weight * cut(train, c.gain) + c.held_end_weight * cut(held(ours.end, reference.end), c.gain)
    harm = max(0.0, cut(best, c.limit) - math.log(c.harm))
    return c.held_best_weight * cut(best, c.limit) + c.harm_weight * harm + ends


def fine(ours: Outcome, reference: Outcome, c: EvolutionTrainingConfig) -> bool:
    """Whether a user would be no worse off than with Adam.

    Its least held-out loss is at most 1.05 times Adam's; and its training loss is at most 1.1 times Adam's or next to
    nothing, or its held-out loss at the end is no higher.
    """
    if not ours.finite:
        return not reference.finite
    end = ours.train <= 1.1 * reference.train or ours.train < c.least_train or ours.end <= reference.end
    return end and ours.best <= c.harm * reference.best + c.least_held * abs(ours.first)


def plain(outcome: Outcome) -> list[float | None]:
    """As JSON and training states hold it."""
    return [value if math.isfinite(value) else None for value in (*outcome[:-1], *outcome.seen)]


def from_plain(values: list[Any]) -> Outcome:
    """Inverse of :func:`plain`.

    Example:
        >>> from_plain(plain(Outcome(1.0, float("inf"), 0.5, 0.5))).best
        inf
    """
    found: list[Any] = [math.inf if value is None else value for value in values]
    count = len(Outcome._fields) - 1
    return Outcome(*found[:count])._replace(seen=tuple(found[count:]))
