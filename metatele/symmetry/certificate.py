r"""How many independent directions keep a module's outputs, counted from its Jacobian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.network.spaces import Space
from metatele.symmetry.double import doubled, outputs_of, steady, twin_of
from metatele.symmetry.exact import Element, act
from metatele.symmetry.find import Certificate, Symmetries

_LARGEST = 20_000  # parameters


def tangents(space: Space, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The directions in which a space's one-parameter subgroups move the weights, one for each dimension.

    Args:
        space: Of continuous group; permutations give none.
        tensors: Parameters by name, in float64.
    """
    eye = torch.eye(space.k, dtype=torch.float64)
    one = torch.ones(space.k, dtype=torch.float64)

    def element(t: Tensor, i: int, j: int) -> Element:
        match space.group:
            case "GL":
                small = t * eye[i][:, None] * eye[j]
                return Element(eye + small, eye - small)
            case "O":
                a, b = axes[i], axes[j]
                small = t * (a[:, None] * b - b[:, None] * a)
                return Element(eye + small, eye - small)
            case "scale":
                return Element(one + t * eye[i], one - t * eye[i])
            case "phase":
                both = torch.stack([one, 0 * one], -1)
                small = t * eye[i][:, None] * torch.eye(2, dtype=torch.float64)[j]
                sign = torch.tensor([1.0, 1.0], dtype=torch.float64)
                return Element(both + small, both - sign * small)
        return Element(t * eye[i], -t * eye[i])

    k = space.k - space.centred
    axes = torch.linalg.qr(torch.cat([one[:, None], eye[:, 1:]], 1)).Q.mT[1:] if space.centred else eye
    pairs = {
        "GL": [(i, j) for i in range(k) for j in range(k)],
        "O": [(i, j) for i in range(k) for j in range(i)],
        "phase": [(i, j) for i in range(k) for j in range(2)],
        "perm": [],
    }.get(space.group, [(i, 0) for i in range(k)])
    zero, unit = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for i, j in pairs:
        yield torch.func.jvp(lambda t, i=i, j=j: act(space, element(t, i, j), tensors), (zero,), (unit,))[1]


def certified(found: Symmetries) -> Certificate:
    """See :meth:`metatele.symmetry.find.Symmetries.certificate`."""
    assert found.of is not None
    twin = twin_of(found.of.model)
    tensors = {name: p.detach() for name, p in twin.named_parameters()}
    sizes = [t.numel() for t in tensors.values()]
    if sum(sizes) > _LARGEST:
        raise ConfigError(f"a certificate takes at most {_LARGEST} parameters, got {sum(sizes)}: take a smaller model")
    inputs, named = doubled(found.of.inputs), doubled(found.of.named)

    def flat_outputs(flat: Tensor) -> Tensor:
        parts = [p.view_as(t) for p, t in zip(flat.split(sizes), tensors.values(), strict=True)]
        return outputs_of(twin, dict(zip(tensors, parts, strict=True)), inputs, named)

    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    with steady(twin):
        jacobian = torch.autograd.functional.jacobian(flat_outputs, flat, vectorize=False)
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))
    directions = [
        torch.cat([moved.get(name, torch.zeros_like(t)).reshape(-1) for name, t in tensors.items()])
        for space in found.spaces
        for moved in tangents(space, tensors)
    ]
    own = int(torch.linalg.matrix_rank(torch.stack(directions), rtol=1e-9)) if directions else 0
    return Certificate(len(flat) - rank, own, len(flat))
