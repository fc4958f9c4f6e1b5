"""Teleports of modules that are no perceptrons: along their exact symmetries, found from a pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metatele.errors import ConfigError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import Curvature, GradientNorm, ModuleObjective, Objective
from metatele.geometry import objective as objective_by_name
from metatele.network import ranks
from metatele.network.graph import tensors_in
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.symmetry.double import ordinary
from metatele.symmetry.exact import Element
from metatele.symmetry.find import find_symmetries, warn_of_unused
from metatele.teleport import Ascent, Balance, ModuleMove, Random, Reason, Rescaling, TeleportMove, TeleportReport
from metatele.teleport.ascent import USUAL_CHANGE
from metatele.teleport.exact_moves import exact_, refuse_settings
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
            raise ConfigError(
                "on a module that is no perceptron a teleport is an ascent, Balance, Rescaling, Random or a "
                f"ModuleMove, got {type(move).__name__}"
            )
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


Plan = Mapping[str, Any] | Balance | Rescaling | Random | ModuleMove
_EXACT = (Balance, Rescaling, Random, ModuleMove)
OF_MODELS = (Balance, ModuleMove)  # those that perceptrons are moved by as any other module is


def plan_of(move: TeleportMove | None, wanted: str | Objective, settings: Mapping[str, Any]) -> Plan:
    """What to do with any module: settings of :func:`ascent_of`, or a move that needs no data.

    Raises:
        ConfigError: A move or a setting that has no meaning on any module.
    """
    if not isinstance(move, _EXACT):
        return ascent_of(move, wanted, settings)
    refuse_settings(move)
    return move


class NoSymmetryError(UnsupportedModelError):
    """A module has no continuous symmetry that could be found."""


def movable(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], parameters: Iterable[Tensor]
) -> list[Space]:
    """Spaces of a module all of whose parameters are among some.

    Raises:
        NoSymmetryError: It has no continuous symmetry that could be found.
        MetateleError: Those of :func:`~metatele.find_symmetries`.
    """
    found = find_symmetries(model, first_samples(inputs), **dict(first_samples(named, inputs)))
    warn_of_unused(found)
    free = {id(p) for p in parameters}
    names = {name for name, p in unwrapped(model).named_parameters() if id(p) in free}
    if not any(space.dimension for space in found.spaces):
        name = type(unwrapped(model)).__name__
        raise NoSymmetryError(
            f"no continuous symmetry was found in {name}; find_symmetries(model, inputs) prints why",
            page="docs/symmetries.md#where-there-is-little",
        )
    return [space for space in found.spaces if set(space.parameters) <= names]


def first_samples(tree: Any, beside: Any = ()) -> Any:
    """The first few samples of all tensors of a batch; of an empty one samples that are made up.

    A vector is cut where it has a number for each sample, as lengths of sequences have.

    Args:
        tree: The tensors.
        beside: Others of the same batch.
    """
    whole = (t for t in tree_leaves((beside, tree)) if isinstance(t, Tensor) and t.dim() > 1)
    samples = next((len(t) for t in whole), None)

    def few(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() < 2:
            each = isinstance(t, Tensor) and t.dim() == 1 and len(t) == samples and samples > 0
            return t[:_EXAMPLES] if each else t
        if len(t):
            return t[:_EXAMPLES]
        made_up = torch.zeros(_EXAMPLES, *t.shape[1:], dtype=t.dtype)
        if t.is_floating_point():
            made_up.normal_(generator=torch.Generator().manual_seed(0))
        return made_up.to(t.device)

    return tree_map(few, tree)


def teleport_module_(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[..., Tensor],
    plan: Plan,
    spaces: Sequence[Space] | None = None,
    path: list[tuple[Space, Element]] | None = None,
) -> TeleportReport:
    """See :func:`~metatele.teleport_`; along the exact symmetries of any module.

    Args:
        model: Any module.
        inputs: What it is called with: a tensor, or a tuple of all its arguments.
        targets: What ``loss_fn`` takes beside the outputs.
        loss_fn: Gives a scalar.
        plan: Of :func:`plan_of`.
        spaces: Where; all that :func:`movable` finds if not given.
        path: Gets the spaces and elements that acted.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (outputs, targets), got {loss_fn!r}")
    bare = unwrapped(model)
    if torch.is_inference_mode_enabled() and not any(p.is_inference() for p in bare.parameters()):
        with torch.inference_mode(False), torch.no_grad():  # gradients are taken of ordinary tensors alone
            return teleport_module_(model, ordinary(inputs), ordinary(targets), loss_fn, plan, spaces, path)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(inputs, Tensor) and not inputs.numel():
        raise ShapeMismatchError(f"a teleport needs a batch of at least one sample, got {tuple(inputs.shape)}")

    def loss() -> Tensor:
        result = loss_fn(bare(*given), targets)
        if not isinstance(result, Tensor) or result.dim():
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ShapeMismatchError(f"loss_fn must give a scalar tensor, got {got}")
        return result

    if spaces is None:
        spaces = movable(bare, given, {}, [p for p in bare.parameters() if p.requires_grad])
    if not spaces:
        return nothing(Reason.FROZEN, plan)
    if isinstance(plan, _EXACT):
        return exact_(bare, spaces, plan, loss, first_samples(given), {}, known=True, path=path)
    return ascend_(bare, spaces, loss, path=path, **plan)


def nothing(reason: Reason, plan: Plan) -> TeleportReport:
    """The report of a teleport that was not tried."""
    name = GradientNorm.name if isinstance(plan, _EXACT) else plan["objective"].name
    return TeleportReport(name, None, None, math.nan, math.nan, 0.0, False, False, 0, 0.0, reason.sentence)


class Passes:
    """Passes of a module as its training loop makes them: what it was called with, and ``∂L/∂outputs``.

    Along a teleport outputs stay, and so does that derivative: ``Σ ⟨outputs, ∂L/∂outputs⟩`` has the loss's gradient at
    every point of the orbit.

    Args:
        model: It is listened to while :attr:`wanted`.

    Attributes:
        group: Of ranks: that of the ``DistributedDataParallel`` that made the last pass.
        deaf: Whether passes are those of a teleport itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wanted = self.deaf = False
        self.group: ranks.Group | None = None
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self._size: Tensor | None = None
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if self.deaf or not torch.is_grad_enabled():
            return
        self.group = ranks.active_group()
        if not self.wanted:
            return
        found = [t for t in tensors_in(outputs) if t.requires_grad]
        errors: list[Tensor | None] = [None] * len(found)
        for n, t in enumerate(found):
            t.register_hook(lambda error, n=n: errors.__setitem__(n, error.detach()))
        self.seen.append((args, kwargs, errors))

    def clear(self) -> None:
        """Forget."""
        self.seen, self._size = [], None

    def zeroed(self) -> None:
        """Forget what has had its gradients: loops may zero them between a pass and its backward pass."""
        waiting = [one for one in self.seen if all(error is None for error in one[2])]
        self.clear()
        self.seen = waiting

    def settle(self) -> None:
        """Forget passes that no gradient came back through."""
        self.seen = [one for one in self.seen if any(error is not None for error in one[2])]

    def surrogate(self) -> Tensor:
        """``Σ ⟨outputs, ∂L/∂outputs⟩`` of all passes, at the weights as they are now, and a constant.

        The constant makes it ``Σ |outputs · ∂L/∂outputs|`` at first: a sum that cancels cannot tell how far it drifted.
        """
        terms, sizes = [], []
        for args, kwargs, errors in self.seen:
            outputs = [t for t in tensors_in(self.model(*args, **kwargs)) if t.requires_grad]
            pairs = [(t, e) for t, e in zip(outputs, errors, strict=True) if e is not None]
            # Sums of half precision would be known to a hundredth, which is how far a loss may drift.
            products = [t * e if t.element_size() > 3 else t.float() * e.float() for t, e in pairs]
            terms += [t.sum() for t in products]
            sizes += [t.detach().abs().sum() for t in products]
        if not terms:
            raise ConfigError("a teleport needs a backward pass of the model, and none was seen")
        total = torch.stack(terms).sum()
        if self._size is None:
            self._size = torch.stack(sizes).sum() - total.detach()
        return total + self._size

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the model copy its hooks: theirs hear nothing, and hold no batch."""
        return {**self.__dict__, "wanted": False, "deaf": True, "seen": [], "group": None, "_size": None}

    def close(self) -> None:
        """Listen no more."""
        self._handle.remove()
