"""An optimizer's memories after a move along the symmetries of a module."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.optim.state import (
    SIZES,
    SQUARES,
    STRATEGIES,
    VELOCITIES,
    _is_like,
    _largest_step,
    _size,
    reset_state_,
)
from metatele.symmetry.canonical import inverse_of
from metatele.symmetry.exact import Element, act, act_
from metatele.teleport.balance import MoveReport

_AVERAGES = (*VELOCITIES, "grad_avg")
# Which optimizers a report was carried into: the weights are the same after it, and cannot tell.
_CARRIED: weakref.WeakKeyDictionary[MoveReport, weakref.WeakSet[torch.optim.Optimizer]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def carry_along_(
    optimizer: torch.optim.Optimizer, model: nn.Module, report: MoveReport, state: str = "transport"
) -> None:
    r"""Carry an optimizer's memories along what :func:`balance_`, :func:`randomize_` or :func:`fold_norms_` did.

    Of a move φ of the weights, with the loss the same, gradients become ``(∂φ)^{-T} ∇L``: of ``W ← M W`` they are
    ``M^{-T} ∇L``, of scales ``∇L / s``. So do averages of them, exactly (``exp_avg``, ``momentum_buffer``,
    ``grad_avg``), wherever the average was taken along the way. It is the memory of an optimizer whose gradients had
    been seen at the new point. A velocity, by contrast, would go with ``M``, as :class:`TeleportOptimizer` has it.

    Averages of squared gradients (``exp_avg_sq``, ``square_avg``, ``sum``, ``max_exp_avg_sq``) become ``v / s²`` under
    scales and are reordered by permutations, both exactly. Where entries mix, only the diagonal of their second moment
    is known: it becomes ``(M^{-T})² v``, squared entry by entry, which is the diagonal if the gradients of entries that
    mix are uncorrelated. ``exp_inf`` goes with its square. Adam's first moments are then cut to where ``|m|/√v`` is no
    larger than its largest in that tensor was.

    Where rotations of a stream hold only because a last norm's gains are all equal, as with embeddings that are read
    again, they are no symmetry of those gains: their own gradient is another one at the new point, and their memory is
    kept as it was.

    Args:
        optimizer: Whose state; those of its tensors shaped like their parameter are carried, all else is kept.
        model: That moved. Its weights have to be those that the move led to.
        report: Of the move.
        state: ``"transport"``, or ``"keep"``, or ``"reset"`` to what a new optimizer has.

    Raises:
        ConfigError: An unknown strategy, a report of another model, or one that was carried into this optimizer before.

    Example:
        >>> import metatele
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> x = torch.randn(5, 3).double()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        >>> model(x).square().sum().backward()
        >>> optimizer.step()
        >>> carry_along_(optimizer, model, metatele.randomize_(model, x))
        >>> optimizer.zero_grad()
        >>> model(x).square().sum().backward()
        >>> weight = model[0].weight
        >>> torch.allclose(optimizer.state[weight]["momentum_buffer"], weight.grad)
        True
    """
    if state not in STRATEGIES:
        raise ConfigError(f"state must be one of {', '.join(STRATEGIES)}, not {state!r}")
    if state == "keep":
        return
    if state == "reset":
        reset_state_(optimizer)
        return
    if optimizer in _CARRIED.get(report, ()):
        raise ConfigError("this report was carried into this optimizer's memories already: carry each move once")
    own = dict(unwrapped(model).named_parameters())
    touched = {name for space, _ in report.path for name in (*space.parameters, *_asked(space))}
    if missing := touched - own.keys():
        raise ConfigError(f"the report is that of another model: this one has no parameter {min(missing)!r}")
    if isinstance(optimizer, torch.optim.Optimizer):
        _CARRIED.setdefault(report, weakref.WeakSet()).add(optimizer)
    entries: dict[str, dict[str, Any]] = {name: optimizer.state.get(own[name], {}) for name in sorted(touched)}
    bounds = {name: _largest_step(e, own[name]) for name, e in entries.items()}

    def memories(kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        found = {}
        for kind in kinds:
            if any(_is_like(e.get(kind), own[name]) for name, e in entries.items()):
                found[kind] = {
                    name: e[kind].detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
                    if _is_like(e.get(kind), own[name])
                    else torch.zeros(own[name].shape, dtype=torch.float64, device=own[name].device)
                    for name, e in entries.items()
                }
        return found

    averages, squares = memories(_AVERAGES), memories((*SQUARES, *(s for s in SIZES if s not in _AVERAGES)))
    if not averages and not squares:
        return
    for kind in squares.keys() & set(SIZES):
        squares[kind] = {name: t.square() for name, t in squares[kind].items()}
    weights = {
        name: own[name].detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format) for name in entries
    }
    for space, element in reversed(report.path):
        act_(space, inverse_of(space, element), weights)
    for space, element in report.path:
        act_(space, element, weights)
        _pull(space, element, weights, list(averages.values()))
        for each in squares.values():
            _spread(space, element, weights, each)
    for kind, each in (*averages.items(), *squares.items()):
        for name, e in entries.items():
            if _is_like(e.get(kind), own[name]):
                e[kind].copy_(each[name].sqrt() if kind in squares and kind in SIZES else each[name])
    for name, e in entries.items():
        size, bound = _size(e, own[name]), bounds[name]
        if bound is not None and size is not None:
            e["exp_avg"].clamp_(-bound * size, bound * size)


def _asked(space: Space) -> list[str]:
    """Names of parameters that a space does not change, and that what it does to others depends on."""
    return [p.gain[0] for p in space.places if p.gain is not None] + [c.weight.name for c in space.carries]


def _pull(space: Space, element: Element, after: Mapping[str, Tensor], gradients: list[dict[str, Tensor]]) -> None:
    """Gradients at the point that an element leads to, from those before: the way back, differentiated."""
    if not gradients:
        return
    own = space.parameters
    leaves = {name: after[name].detach().requires_grad_() for name in dict.fromkeys([*own, *_asked(space)])}
    with torch.enable_grad():
        back = act(space, inverse_of(space, element), leaves)
        ends = [back[name] for name in own]
    for each in gradients:
        given = [each[name] for name in own]
        found = torch.autograd.grad(ends, list(leaves.values()), given, retain_graph=True)
        for name, new in zip(leaves, found, strict=True):
            each[name] = new if name in own else each[name] + new


def _spread(space: Space, element: Element, weights: Mapping[str, Tensor], squares: dict[str, Tensor]) -> None:
    """Squares of gradients under the dual of an element, squared entry by entry."""
    value, inverse = element.value, element.inverse
    match space.group:
        case "perm":
            act_(space, element, squares)
        case "shift":
            for carry in space.carries:
                at = carry.weight.indices()
                v = squares[carry.weight.name].view(-1)
                bias = squares[carry.name].reshape(-1)[carry.at.to(v.device)]
                v[at.to(v.device)] += value.to(v.device).square()[:, None] * bias
        case "phase":
            a, b = value.square().unbind(-1)
            for place in space.places:
                s = torch.ones_like(a) if place.reads else (a + b).square()
                v = squares[place.name].view(-1)
                at = place.indices().to(v.device)
                first, second = v[at].view(space.k, -1, 2, len(place.offsets)).unbind(2)
                p, q = ((t / s).to(v.device)[:, None, None] for t in (a, b))
                v[at] = torch.stack([p * first + q * second, q * first + p * second], 2).view(at.shape)
        case _:
            gains = {p.gain[0]: 1 / weights[p.gain[0]].square() for p in space.places if p.gain is not None}
            dual = Element(inverse.mT.square(), value.square().mT) if value.ndim == 2 else Element(inverse**2, value**2)
            act_(space, dual, {**squares, **gains})
