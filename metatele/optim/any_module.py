"""Teleports of modules that are no perceptrons: along their exact symmetries, found from a pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metatele.errors import ConfigError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import Curvature, GradientNorm, ModuleObjective, Objective
from metatele.geometry import objective as objective_by_name
from metatele.network.graph import tensors_in
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.symmetry.find import find_symmetries
from metatele.teleport import Ascent, Reason, TeleportMove, TeleportReport
from metatele.teleport.ascent import USUAL_CHANGE
from metatele.teleport.modules import ascend_

_EXAMPLES = 4  # samples of the pass that symmetries are found from: they don't depend on how many there are
_OWN = ("steps", "radius", "cap", "descend", "max_drift")  # settings of an ascent that mean the same on any module


def ascent_of(move: TeleportMove | None, wanted: str | Objective, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of :func:`~metatele.teleport.modules.ascend_` from those of a perceptron's move.

    Raises:
        ConfigError: A move or a setting that has no meaning on any module.
    """
    if move is not None:
        if not isinstance(move, Ascent):
            raise ConfigError(f"on a module that is no perceptron a teleport is an ascent, got {type(move).__name__}")
        wanted, change = move.objective, move.max_change
        usual = {f.name: f.default for f in dataclasses.fields(move) if f.default is not dataclasses.MISSING}
        settings = {name: getattr(move, name) for name in (*_OWN, "rate", "action", "parametrisation", "lr")}
        settings = {name: value for name, value in settings.items() if name in _OWN or value != usual[name]}
    else:
        change = USUAL_CHANGE
    goal = wanted if isinstance(wanted, Objective) else objective_by_name(wanted)
    if not isinstance(goal, ModuleObjective):
        raise ConfigError(
            f"on a module that is no perceptron the objective is grad-norm, sharpness or curvature, got {goal!r}"
        )
    if isinstance(goal, GradientNorm) and goal.metric is not None:
        raise ConfigError("on a module that is no perceptron grad-norm has no metric")
    if isinstance(goal, Curvature) and goal.truncate:
        raise ConfigError("truncate is of curves that depend on data: those of this module's symmetries do not")
    for name in settings:
        if name not in _OWN:
            raise ConfigError(f"{name} is a setting of teleports of perceptrons: this module moves by exact symmetries")
    return {"objective": goal, "max_change": min(change, 1.0), **settings}


def movable(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], parameters: Iterable[Tensor]
) -> list[Space]:
    """Spaces of a module all of whose parameters are among some.

    Raises:
        UnsupportedModelError: It has no symmetry that could be found, or none that may move.
    """
    found = find_symmetries(model, first_samples(inputs), **dict(first_samples(named)))
    free = {id(p) for p in parameters}
    names = {name for name, p in unwrapped(model).named_parameters() if id(p) in free}
    if not any(space.dimension for space in found.spaces):
        raise UnsupportedModelError(f"no continuous symmetry was found in {type(unwrapped(model)).__name__}:\n{found}")
    return [space for space in found.spaces if set(space.parameters) <= names]


def first_samples(tree: Any) -> Any:
    """The first few samples of all tensors of a batch."""
    return tree_map(lambda t: t[:_EXAMPLES] if isinstance(t, Tensor) and t.dim() > 1 else t, tree)


def teleport_module_(
    model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[..., Tensor], settings: Mapping[str, Any]
) -> TeleportReport:
    """See :func:`~metatele.teleport_`; along the exact symmetries of any module.

    Args:
        model: Any module.
        inputs: What it is called with: a tensor, or a tuple of all its arguments.
        targets: What ``loss_fn`` takes beside the outputs.
        loss_fn: Gives a scalar.
        settings: Of :func:`ascent_of`.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (outputs, targets), got {loss_fn!r}")
    bare = unwrapped(model)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(inputs, Tensor) and not inputs.numel():
        raise ShapeMismatchError(f"a teleport needs a batch of at least one sample, got {tuple(inputs.shape)}")

    def loss() -> Tensor:
        result = loss_fn(bare(*given), targets)
        if not isinstance(result, Tensor) or result.dim():
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ShapeMismatchError(f"loss_fn must give a scalar tensor, got {got}")
        return result

    spaces = movable(bare, given, {}, [p for p in bare.parameters() if p.requires_grad])
    return ascend_(bare, spaces, loss, **settings) if spaces else nothing(Reason.FROZEN, settings)


def nothing(reason: Reason, settings: Mapping[str, Any]) -> TeleportReport:
    """The report of a teleport that was not tried."""
    return TeleportReport(
        settings["objective"].name, None, None, math.nan, math.nan, 0.0, False, False, 0, 0.0, reason.sentence
    )


class Passes:
    """Passes of a module as its training loop makes them: what it was called with, and ``∂L/∂outputs``.

    Along a teleport outputs stay, and so does that derivative: ``Σ ⟨outputs, ∂L/∂outputs⟩`` has the loss's gradient at
    every point of the orbit.

    Args:
        model: It is listened to while :attr:`wanted`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wanted = False
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if not (self.wanted and torch.is_grad_enabled()):
            return
        found = [t for t in tensors_in(outputs) if t.requires_grad]
        errors: list[Tensor | None] = [None] * len(found)
        for n, t in enumerate(found):
            t.register_hook(lambda error, n=n: errors.__setitem__(n, error.detach()))
        self.seen.append((args, kwargs, errors))

    def clear(self) -> None:
        """Forget."""
        self.seen = []

    def surrogate(self) -> Tensor:
        """``Σ ⟨outputs, ∂L/∂outputs⟩`` of all passes, at the weights as they are now."""
        terms = []
        for args, kwargs, errors in self.seen:
            outputs = [t for t in tensors_in(self.model(*args, **kwargs)) if t.requires_grad]
            terms += [(t * e).sum() for t, e in zip(outputs, errors, strict=True) if e is not None]
        if not terms:
            raise ConfigError("a teleport needs a backward pass of the model, and none was seen")
        return torch.stack(terms).sum()

    def close(self) -> None:
        """Listen no more."""
        self._handle.remove()


class ModuleTeleports:
    """What a :class:`~metatele.TeleportOptimizer` does with a module that is no perceptron.

    Args:
        model: The module.
        settings: Of :func:`ascent_of`.
        batches: Gives ``(inputs, targets)``, or ``None``: the passes of the training loop.
        loss_fn: For ``batches``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        batches: Callable[[], Iterable[tuple[Any, Any]]] | None,
        loss_fn: Callable[..., Tensor] | None,
    ) -> None:
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise UnsupportedModelError(
                "in several processes teleports are of perceptrons alone: their batches are summed, others' can't be"
            )
        if settings["objective"].needs_loss and batches is None:
            raise ConfigError(f"an ascent of {settings['objective'].name} needs the loss: give batches and loss_fn")
        self.model, self.settings, self.batches, self.loss_fn = unwrapped(model), dict(settings), batches, loss_fn
        self.passes = Passes(self.model)
        self.spaces: list[Space] | None = None
        self.of: frozenset[int] = frozenset()

    def teleport(self, parameters: Sequence[nn.Parameter]) -> list[TeleportReport]:
        """Teleport in place.

        Args:
            parameters: Those that may move.
        """
        free = frozenset(id(p) for p in parameters)
        reports = []
        if self.batches is not None and self.loss_fn is not None:
            for inputs, targets in self.batches():
                reports.append(teleport_module_(self.model, inputs, targets, self.loss_fn, self.settings))
            return reports
        if not self.passes.seen:
            return [nothing(Reason.EMPTY, self.settings)]
        seen, self.passes.wanted = self.passes.seen, False
        if self.spaces is None or free != self.of:
            self.spaces, self.of = movable(self.model, seen[0][0], seen[0][1], parameters), free
        if not self.spaces:
            return [nothing(Reason.FROZEN, self.settings)]
        report = ascend_(self.model, self.spaces, self.passes.surrogate, **self.settings)
        return [dataclasses.replace(report, loss_before=None, loss_after=None)]
