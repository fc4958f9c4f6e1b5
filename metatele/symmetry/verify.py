"""Whether spaces hold: random elements act on them, and no output may change."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metatele.network.spaces import Space
from metatele.symmetry.double import change_of, outputs_of
from metatele.symmetry.exact import Element, act_, random_element
from metatele.symmetry.stacked import Stacked

_TOLERANCE = 1e-9  # of a verified space: relative change of the outputs in float64
_TOGETHER = 1 << 24  # parameters; of larger models no second copy is made to move all spaces together
_CONDITION = 4.0  # of the elements by which spaces are verified
_PERIOD = 1048573  # a prime: no two rows of a matrix have the same numbers, whatever its width


class VerifiedPoint:
    """Where spaces are verified: parameters in float64 as they are, or near by.

    Near by none is 0 or 1, where symmetries may hold that go with training. The noise is one list of numbers again and
    again, from a place of each name's own: a second copy of all parameters would take as much memory as the first.

    Args:
        original: Parameters by name.
        nearby: Whether near by.
    """

    def __init__(self, original: Mapping[str, Tensor], nearby: bool) -> None:
        self.original = original
        g = torch.Generator().manual_seed(2)
        self.noise = torch.randn(_PERIOD, generator=g, dtype=torch.float64).repeat(2) if nearby else None
        self._sizes: dict[str, Tensor] = {}

    def put_(self, name: str, parameter: Tensor) -> None:
        """Write one into a contiguous tensor."""
        parameter.copy_(self.original[name])
        if self.noise is None:
            return
        if name not in self._sizes:
            self._sizes[name] = 0.1 * (parameter.norm() / max(1, parameter.numel()) ** 0.5 + 0.1)
        if self.noise.device != parameter.device:
            self.noise = self.noise.to(parameter.device)
        noise = self.noise[zlib.crc32(name.encode()) % _PERIOD :]
        for part in parameter.view(-1).split(_PERIOD):
            part.addcmul_(noise[: len(part)], self._sizes[name])


def _others(tree: Any, g: torch.Generator) -> Any:
    """Other inputs of the same shapes: floating-point numbers of the same mean and spread."""

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() < 2 or not bool(t.isfinite().all()):
            return t
        spread = t.std().clamp_min(0.1)
        return t.mean() + spread * torch.randn(t.shape, generator=g, dtype=t.dtype).to(t.device)

    return tree_map(other, tree)


class Check(NamedTuple):
    """A point at which spaces are verified.

    Attributes:
        model: In float64.
        tensors: Its parameters, which are moved and put back.
        point: What they are put back to.
        inputs: Of the pass.
        named: The same.
        before: Outputs at the point.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    point: VerifiedPoint
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    before: Tensor

    def holds(self, chosen: Sequence[Space], seed: int) -> bool:
        """Whether elements of spaces, one after another, keep the outputs."""
        permuted = any(space.group == "perm" for space in chosen)
        return all(self.change(chosen, seed, swap) <= _TOLERANCE for swap in ((False, True) if permuted else (False,)))

    def change(self, chosen: Sequence[Space], seed: int, swap: bool) -> float:
        """How much they change them, relatively."""
        g = torch.Generator().manual_seed(seed)
        moved = {**self.tensors, **{name: b.clone() for name, b in self.model.named_buffers()}}
        continuous = [space for space in chosen if space.dimension]
        together = len(continuous) > 1 and sum(t.numel() for t in self.tensors.values()) <= _TOGETHER
        if together:
            stacked = Stacked(continuous, self.tensors)
            w = stacked.flat(moved)
            stacked.act_(w, stacked.stack([_tried(space, g, swap) for space in stacked.spaces]))
            torch._foreach_copy_([moved[name] for name in stacked.names], list(stacked.parts(w).values()))
        for space in chosen:
            if not (together and space.dimension):
                act_(space, _tried(space, g, swap), moved)
        change = change_of(outputs_of(self.model, moved, self.inputs, self.named), self.before)
        for name in {name for space in chosen for name in space.parameters}:
            self.point.put_(name, self.tensors[name])
        return change


def elsewhere(
    twin: nn.Module,
    tensors: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Check | None:
    """A check of nearby weights on other inputs; ``None`` where the model does not work on them."""
    g, point = torch.Generator().manual_seed(1), VerifiedPoint(original, nearby=True)
    for other in (_others((inputs, dict(named)), g), (inputs, named)):
        try:
            for name, p in tensors.items():
                point.put_(name, p)
            before = outputs_of(twin, tensors, *other)
        except Exception:  # whatever the model says to inputs that were made up
            continue
        if before.isfinite().any() and not before.isnan().any():
            return Check(twin, tensors, point, other[0], other[1], before)
    return None


def _tried(space: Space, g: torch.Generator, swap: bool) -> Element:
    """An element by which a space is verified; of permutations a cycle and a swap, which make all others."""
    if space.group != "perm":
        return random_element(space, _CONDITION, g)
    order = torch.arange(space.k)
    order = torch.cat([order[:2].flip(0), order[2:]]) if swap else order.roll(1)
    return Element(order, order.argsort())


def verified(spaces: list[Space], holds: Any) -> tuple[list[Space], list[str]]:
    """Those that keep the outputs, by halves: one pass where all do."""
    kept: list[Space] = []
    dropped: list[str] = []
    stack = [spaces]
    while stack:
        part = stack.pop()
        if not part:
            continue
        if holds(part, len(kept)):
            kept += part
        elif len(part) == 1:
            dropped.append(f"{part[0].group} of {', '.join(part[0].parameters)}")
        else:
            half = len(part) // 2
            stack += [part[half:], part[:half]]
    return kept, dropped
