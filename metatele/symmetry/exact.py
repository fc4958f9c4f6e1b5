r"""Exact actions of group elements on the spaces of a module.

Where units are written, ``W ← M W``; where they are read, ``W ← W M⁻¹``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.network.spaces import Place, Space

_CHUNK = 1 << 20  # elements that are moved at a time


class Element(NamedTuple):
    """An element of a space's group.

    Attributes:
        value: M ``[k, k]`` of GL and O; factors ``[k]`` of scales; the order ``[k]`` of permutations.
        inverse: Its inverse, the same.
    """

    value: Tensor
    inverse: Tensor


def act(space: Space, element: Element, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a space, moved; differentiable in them and in the element.

    Args:
        space: Where.
        element: By what.
        tensors: Parameters by name; they are not changed. Of buffers among them, statistics of norms go along.

    Returns:
        The parameters that changed.
    """
    moved = dict(tensors)
    for name, where, new in _changes(space, element, moved, gathered):
        old = moved[name]
        at = where.indices().to(old.device) if isinstance(where, Place) else where
        moved[name] = old.reshape(-1).index_put((at,), new.to(old.dtype)).view(old.shape)
    return {name: moved[name] for name in space.parameters}


@torch.no_grad()
def act_(space: Space, element: Element, tensors: Mapping[str, Tensor]) -> None:
    """The same in place, rounded once to each tensor's dtype."""
    for name, where, new in _changes(space, element, tensors, taken):
        old = tensors[name]
        view = where.view(old) if isinstance(where, Place) else None
        if view is not None:
            view.copy_(new.view(view.shape))
            continue
        at = where.indices().to(old.device) if isinstance(where, Place) else where
        if old.is_contiguous():
            old.view(-1)[at] = new.to(old.dtype)
        else:
            flat = old.reshape(-1)
            flat[at] = new.to(old.dtype)
            old.copy_(flat.view(old.shape))


def gathered(place: Place, tensor: Tensor) -> Tensor:
    """The elements of a place ``[k, m]``, copied; differentiable, also by transforms of functions."""
    return tensor.reshape(-1)[place.indices().to(tensor.device)]


def taken(place: Place, tensor: Tensor) -> Tensor:
    """The elements of a place ``[k, m]``, to be read: where they lie on a grid it is a view of the tensor."""
    view = place.view(tensor)
    if view is None:
        return gathered(place, tensor)
    return view.flatten(1) if view.ndim > 1 else view[:, None]


def _changes(
    space: Space, element: Element, tensors: Mapping[str, Tensor], take: Callable[[Place, Tensor], Tensor]
) -> Iterator[tuple[str, Place | Tensor, Tensor]]:
    """Names, elements of the parameter (or their numbers), and what they become; one after another."""
    for carry in space.carries:
        bias = tensors[carry.name]
        columns = take(carry.weight, tensors[carry.weight.name])
        change = element.value.to(columns.device) @ columns.to(element.value.dtype)
        at = carry.at.to(bias.device)
        yield carry.name, at, bias.reshape(-1)[at].to(change.dtype) - change
    for block in space.blocks:
        old = [tensors[name].clone() for name in block]
        for name, n in zip(block, element.value.tolist(), strict=True):
            every = Place(name, torch.zeros(1, 1, dtype=torch.int64), torch.arange(old[n].numel()), False)
            yield name, every, old[n].reshape(1, -1)
    for whole in (*space.places, *(p for p in space.statistics if p.name in tensors)):
        each = max(1, _CHUNK // whole.base.numel())
        for offsets in whole.offsets.split(each):  # a vocabulary's indices alone would be as large as its weights
            place, held = whole._replace(offsets=offsets), tensors[whole.name]
            x, gain = take(place, held), None
            if place.gain is not None:
                name, rows = place.gain
                gain = tensors[name].reshape(-1)[rows.to(held.device)].to(element.value.dtype)[:, None]
                x = x * gain if place.reads else x / gain
            x = _on(space, element, place, x)
            if gain is not None:
                x = x / gain if place.reads else x * gain
            yield place.name, place, x


def _on(space: Space, element: Element, place: Place, x: Tensor) -> Tensor:
    """A change of elements ``[k, m]``, in the precision of the group element."""
    value, inverse = element.value.to(x.device), element.inverse.to(x.device)
    if space.group == "perm":
        return x[value]
    x = x.to(value.dtype)
    match space.group:
        case "scale":
            return x * (inverse if place.reads else value)[:, None]
        case "shift":
            return x + value[:, None]
        case "phase":
            # Of M = s R, M^{-T} is R / s; both are turned by one angle.
            a, b = inverse.unbind(-1) if place.reads else value.unbind(-1)
            b = -b if place.reads else b
            first, second = x.view(space.k, -1, 2, len(place.offsets)).unbind(2)
            a, b = a[:, None, None], b[:, None, None]
            return torch.stack([a * first - b * second, b * first + a * second], 2).view_as(x)
    parts = x.view(space.k, -1)
    return ((inverse.mT if place.reads else value) @ parts).view_as(x)


def random_element(
    space: Space, condition: float, seed: int | torch.Generator, tensors: Mapping[str, Tensor] | None = None
) -> Element:
    """A random element: matrices of a condition number, scales up to its square root, any order.

    Args:
        space: Whose.
        condition: Of the matrices; scales are log-uniform from ``condition^-½`` to ``condition^½``.
        seed: Or a generator.
        tensors: Parameters by name: shifts are as large as they are, root mean square, else of size 1.
    """
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    k = space.k
    if space.group == "perm":
        order = torch.randperm(k, generator=g)
        return Element(order, order.argsort())
    if space.group == "shift":
        c = torch.randn(k, generator=g, dtype=torch.float64)
        if tensors is not None:
            own = torch.cat([tensors[name].detach().double().reshape(-1) for name in space.parameters])
            c = c * (own.square().mean().sqrt().cpu() or 1.0)
        return Element(c, -c)
    if space.group == "phase":
        angle = 2 * torch.pi * torch.rand(k, generator=g, dtype=torch.float64)
        s = condition ** (torch.rand(k, generator=g, dtype=torch.float64) - 0.5)
        value = torch.stack([s * angle.cos(), s * angle.sin()], -1)
        return Element(value, torch.stack([angle.cos() / s, -angle.sin() / s], -1))
    if space.group == "scale":
        s = condition ** (torch.rand(k, generator=g, dtype=torch.float64) - 0.5)
        return Element(s, 1 / s)
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64)).Q for _ in range(2))
    if space.group == "O":
        if space.centred:  # rotations of what is orthogonal to the vector of ones
            basis = torch.linalg.qr(torch.cat([torch.ones(k, 1, dtype=torch.float64), left[:, 1:]], 1)).Q
            inner = torch.linalg.qr(torch.randn(k - 1, k - 1, generator=g, dtype=torch.float64)).Q
            left = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.mT
        return Element(left, left.mT)
    s = condition ** torch.linspace(-0.5, 0.5, k, dtype=torch.float64)
    return Element(left @ (s[:, None] * right), right.mT @ (left / s).mT)


def element_of(space: Space, tangent: Tensor) -> Element:
    r"""``exp(T)`` of the group's algebra: what lies a small step from the identity.

    Args:
        space: Whose.
        tangent: T: ``[k, k]`` of GL; the same, antisymmetric, of O; ``[k]`` of scales (their logarithms) and shifts;
            ``[k, 2]`` of phases: logarithm of the scale, and angle.

    Raises:
        ConfigError: Permutations have no small steps.
    """
    match space.group:
        case "GL" | "O":
            return Element(torch.linalg.matrix_exp(tangent), torch.linalg.matrix_exp(-tangent))
        case "scale":
            return Element(tangent.exp(), (-tangent).exp())
        case "shift":
            return Element(tangent, -tangent)
        case "phase":
            log, angle = tangent.unbind(-1)
            turn = torch.stack([angle.cos(), angle.sin()], -1)
            back = torch.stack([angle.cos(), -angle.sin()], -1)
            return Element(log.exp()[:, None] * turn, (-log).exp()[:, None] * back)
    raise ConfigError("permutations are no continuous group: they have no tangents")


def pullback(space: Space, tensors: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> Tensor:
    r"""The derivative along the group at the identity: A with ``⟨A, T⟩ = ⟨V, d/dt exp(tT)·w⟩`` for all T.

    Where units are written it is ``V Xᵀ``, where they are read ``-X Vᵀ``, summed; its antisymmetric part for O, its
    diagonal for scales. No graph through the action is made.

    Args:
        space: Of continuous group.
        tensors: Parameters by name.
        cotangents: V by name, shaped like them; a name may be missing, which is zero.

    Returns:
        Shaped like the tangents of :func:`element_of`.

    Raises:
        ConfigError: Permutations have no tangents.
    """
    if space.group == "perm":
        raise ConfigError("permutations are no continuous group: they have no tangents")
    total: Tensor | None = None
    for place in space.places:
        if place.name not in cotangents:
            continue
        X, V = (taken(place, t[place.name]).double() for t in (tensors, cotangents))
        if place.gain is not None:
            name, rows = place.gain
            gain = tensors[name].reshape(-1)[rows.to(X.device)].double()[:, None]
            X, V = (X * gain, V / gain) if place.reads else (X / gain, V * gain)
        part = _paired(space, place, X, V)
        total = part if total is None else total + part
    for carry in space.carries:
        if carry.name in cotangents:
            W = taken(carry.weight, tensors[carry.weight.name])
            part = -(W.double() @ cotangents[carry.name].reshape(-1)[carry.at.to(W.device)].double())
            total = part if total is None else total + part
    if total is None:
        shapes = {"GL": (space.k, space.k), "O": (space.k, space.k), "phase": (space.k, 2)}
        return torch.zeros(shapes.get(space.group, (space.k,)), dtype=torch.float64)
    if space.group == "O":
        total = (total - total.mT) / 2
        if space.centred:
            centre = torch.eye(space.k, dtype=total.dtype, device=total.device) - 1 / space.k
            total = centre @ total @ centre
    return total


def _paired(space: Space, place: Place, X: Tensor, V: Tensor) -> Tensor:
    """Of one place: the derivative of ``⟨V, g X⟩`` at the identity."""
    sign = -1.0 if place.reads else 1.0
    match space.group:
        case "scale":
            return sign * (X * V).sum(1)
        case "shift":
            return V.sum(1)
        case "phase":
            x, v = (t.view(space.k, -1, 2, len(place.offsets)) for t in (X, V))
            turned = x[:, :, 0] * v[:, :, 1] - x[:, :, 1] * v[:, :, 0]
            return torch.stack([sign * (X * V).sum(1), turned.flatten(1).sum(1)], -1)
    X, V = X.reshape(space.k, -1), V.reshape(space.k, -1)
    if space.group == "O":
        return V @ X.mT
    return -X @ V.mT if place.reads else V @ X.mT
