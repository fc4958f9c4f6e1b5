"""What a teleport optimizer does with a module that is no perceptron: where, when found anew, in several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, MetateleError, UnsupportedModelError
from metatele.network import ranks
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.optim.any_module import NoSymmetryError, Passes, Plan, first_samples, movable, nothing, teleport_module_
from metatele.symmetry.exact import Element
from metatele.teleport import Reason, TeleportReport
from metatele.teleport.exact_moves import exact_
from metatele.teleport.modules import ascend_


class Outcome(NamedTuple):
    """What was done at a step.

    Attributes:
        report: Of the last batch.
        teleports: That moved something.
        rolled_back: That were taken back, or a step of which was.
        path: Spaces and the elements that acted, in order.
    """

    report: TeleportReport
    teleports: int
    rolled_back: int
    path: tuple[tuple[Space, Element], ...]


class ModuleTeleports:
    """What a :class:`~metatele.TeleportOptimizer` does with a module that is no perceptron.

    Args:
        model: The module.
        plan: Of :func:`~metatele.optim.any_module.plan_of`.
        batches: Gives ``(inputs, targets)``, or ``None``: the passes of the training loop.
        loss_fn: For ``batches``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Callable[[], Iterable[tuple[Any, Any]]] | None,
        loss_fn: Callable[..., Tensor] | None,
    ) -> None:
        if isinstance(plan, Mapping) and plan["objective"].needs_loss and batches is None:
            raise ConfigError(f"an ascent of {plan['objective'].name} needs the loss: give batches and loss_fn")
        self.model, self.plan, self.batches, self.loss_fn = unwrapped(model), plan, batches, loss_fn
        self.passes = Passes(self.model)
        self.spaces: list[Space] = []
        self._of: tuple[list[object], list[object]] = ([], [])
        self._digest, self._failed, self._warned = 0, Reason.MOVED, False

    def teleport(self, parameters: Sequence[nn.Parameter]) -> Outcome:
        """Teleport in place.

        Args:
            parameters: Those that may move.

        Raises:
            UnsupportedModelError: Ranks found different symmetries. Where there are none, or the search fails, the
                outcome has the reason and a warning is given once: it comes in the middle of a training.
        """
        self.passes.deaf = True
        try:
            return self._teleport(parameters)
        finally:
            self.passes.deaf = False

    def _teleport(self, parameters: Sequence[nn.Parameter]) -> Outcome:
        group, path = self.passes.group, list[tuple[Space, Element]]()
        if self.batches is not None and self.loss_fn is not None:
            reports, given = [], list(self.batches())
            if not all(
                ranks.told(len(given), group, parameters[0].device)
            ):  # a rank without may not leave others alone
                return Outcome(nothing(Reason.EMPTY, self.plan), 0, 0, ())
            first = given[0][0]
            failed = self._find(first if isinstance(first, tuple) else (first,), {}, parameters, group)
            if failed is not Reason.MOVED:
                return Outcome(nothing(failed, self.plan), 0, 0, ())
            for inputs, targets in given:
                reports.append(
                    teleport_module_(self.model, inputs, targets, self.loss_fn, self.plan, self.spaces, path)
                )
            return Outcome(reports[-1], sum(r.moved for r in reports), sum(r.rolled_back for r in reports), tuple(path))
        self.passes.settle()
        if not self.passes.seen:
            return Outcome(nothing(Reason.EMPTY, self.plan), 0, 0, ())
        inputs, named, _ = self.passes.seen[0]
        failed = self._find(inputs, named, parameters, group)
        if failed is not Reason.MOVED or not self.spaces:
            return Outcome(nothing(failed or Reason.FROZEN, self.plan), 0, 0, ())
        surrogate, plan = self.passes.surrogate, self.plan
        if isinstance(plan, Mapping):
            report = ascend_(self.model, self.spaces, surrogate, group=group, path=path, **plan)
        else:
            example = first_samples(inputs), first_samples(named, inputs)
            report = exact_(self.model, self.spaces, plan, surrogate, *example, known=False, group=group, path=path)
        report = dataclasses.replace(report, loss_before=None, loss_after=None)
        return Outcome(report, int(report.moved), int(report.rolled_back), tuple(path))

    def _find(
        self,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        group: ranks.Group | None,
    ) -> Reason:
        """Know the spaces: those of the last time, unless the module has become another one since.

        Returns:
            ``MOVED``, or why there are none to know.
        """
        free = {id(p) for p in parameters}
        # What is held cannot give its place in memory to something new, so identity is enough.
        held: list[object] = [*self.model.modules(), *self.model.parameters()]
        traits: list[object] = [(type(m), m.training) for m in self.model.modules()]
        traits += [(name, p.shape, p.requires_grad, id(p) in free) for name, p in self.model.named_parameters()]
        before = self._of
        if traits != before[1] or any(a is not b for a, b in zip(held, before[0], strict=True)):
            self._of, self.spaces, self._digest, self._failed = (held, traits), [], -1, Reason.MOVED
            try:
                self.spaces = movable(self.model, inputs, named, parameters)
                self._digest = digest(self.spaces)
            except NoSymmetryError as error:
                self._failed = Reason.NO_SYMMETRY
                self._warn(error)
            except MetateleError as error:  # another pass may do, as where weights or branches differ
                self._of, self._failed = ([], []), Reason.SEARCH
                self._warn(error)
            except BaseException:
                self._of = [], []
                raise
        digests = ranks.told(self._digest, group, next(self.model.parameters()).device)
        if len(set(digests)) > 1:
            raise UnsupportedModelError(
                "the ranks found different symmetries of the model, as where its passes depend on the data or where "
                "different parameters may move: no teleport is one for all of them"
            )
        return self._failed

    def _warn(self, error: MetateleError) -> None:
        """Say once that nothing moves; training goes on."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"no teleport was made, and training goes on: {error}", stacklevel=2)

    @torch.no_grad()
    def shared(self, outcome: Outcome, memories: Callable[[], Iterable[Tensor]]) -> Outcome:
        """What the first rank did, on all ranks.

        Args:
            outcome: Of this rank.
            memories: Gives what was carried along.
        """
        group = self.passes.group
        if group is None:
            return outcome
        own, names = dict(self.model.named_parameters()), {name for space in self.spaces for name in space.parameters}
        report = outcome.report
        numbers = [report.loss_before, report.loss_after, report.objective_before, report.objective_after, report.drift]
        why = next(reason for reason in Reason if reason.sentence == report.reason)
        counts = [report.moved, report.rolled_back, report.steps, outcome.teleports, outcome.rolled_back, int(why)]
        told = torch.tensor([math.nan if n is None else n for n in (*numbers, *counts)], dtype=torch.float64)
        told = told.to(next(iter(own.values())).device)
        ranks.broadcast_([told, *(own[name] for name in sorted(names)), *memories()], group)
        values = told.tolist()
        before, after = (value if math.isfinite(value) else None for value in values[:2])
        reason = Reason(int(values[10])).sentence
        said = dataclasses.replace(
            report,
            loss_before=before,
            loss_after=after,
            objective_before=values[2],
            objective_after=values[3],
            drift=values[4],
            moved=bool(values[5]),
            rolled_back=bool(values[6]),
            steps=int(values[7]),
            reason=reason,
        )
        return Outcome(said, int(values[8]), int(values[9]), outcome.path)


def digest(spaces: Sequence[Space]) -> int:
    """A number that tells spaces from others: 52 bits, which survive a double.

    Example:
        >>> from metatele.symmetry.find import find_symmetries
        >>> wide, same, narrow = (nn.Sequential(nn.Linear(3, k), nn.ReLU(), nn.Linear(k, 2)) for k in (5, 5, 4))
        >>> numbers = [digest(find_symmetries(m, torch.ones(2, 3)).spaces) for m in (wide, same, narrow)]
        >>> numbers[0] == numbers[1], numbers[0] == numbers[2]
        (True, False)
    """
    found = hashlib.sha256()
    for space in spaces:
        found.update(repr((space.group, space.k, space.centred, space.parameters)).encode())
        for place in [*space.places, *(carry.weight for carry in space.carries)]:
            found.update(repr((place.name, place.reads, place.gain and place.gain[0])).encode())
            for t in (place.base, place.offsets):
                found.update(t.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "big") >> 12
