"""Sums, means and pools: units of a sum change together."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

from metatele.network.trace import (
    ALONE,
    MIXES,
    SCALES,
    SHIFTS,
    Args,
    Named,
    Tracer,
    rule,
)


def summed(tracer: Tracer, sides: list[Any], out: Tensor) -> None:
    """Units of a sum: those of its terms change together; a constant other than 0 fixes their scale."""
    known = [s for s in sides if tracer.known(s)]
    constants = [s for s in sides if not tracer.known(s)]
    for c in constants:
        values = torch.as_tensor(c, dtype=torch.float64)
        values = values[values.isfinite()]  # a mask of -inf is kept by every scale, and by softmax
        if values.numel() and bool((values != 0).any()):
            for t in known:
                tracer.forbid(tracer.units(t), MIXES | SCALES)
                tracer.mark(tracer.units(t), 2 * tracer.step)  # perhaps to some units alone
                told_apart(tracer, t, c)
    units = [tracer.units(t) for t in known]
    parts = [t for t in known if tracer.parameter(t) is not None]
    first = units[0]
    if len(known) > len(parts) + 1:  # a shift of all terms is not one of their sum
        for u in units:
            tracer.forbid(u, ALONE)
    if len(parts) == 1 and len(known) == 2:  # a bias, or positions: it writes the units that it is added to
        first = next(u for t, u in zip(known, units, strict=True) if t is not parts[0])
        if parts[0].dim() == 1:
            tracer.record.shifts.append(("bias", tracer.units(parts[0]), tracer.step))
    for u in units:
        if u is not first:
            tracer.tie(spread(first, out), spread(u, out))
    tracer.put(out, spread(first, out))


def spread(units: Tensor, out: Tensor) -> Tensor:
    """Units as its operands' broadcasting makes them in a result."""
    return units.expand(out.shape)


def told_apart(tracer: Tracer, t: Tensor, constant: Any) -> None:
    """A constant that differs between units tells them apart."""
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        return
    units = tracer.units(t)
    shape = torch.broadcast_shapes(units.shape, constant.shape)
    for d in range(len(shape)):
        at = constant.dim() - len(shape) + d
        if at < 0 or constant.shape[at] == 1:
            continue
        labels = units.expand(shape)
        if varies(labels, d) and bool((constant.narrow(at, 0, 1) != constant).any()):
            tracer.forbid(units, MIXES)
            for own, part in zip(constant.unbind(at), labels.unbind(d), strict=True):  # those of equal numbers may swap
                number = zlib.crc32(own.detach().double().cpu().contiguous().numpy().tobytes())
                tracer.mark(part, (2 * tracer.step + 1 << 32) + number)


@rule("add", "sub", "rsub")
def _add(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    summed(tracer, [args[0], args[1]], out)
    if func.overloadpacket.__name__[0] != "a" or kwargs.get("alpha", 1) != 1:
        for side, t in enumerate(args[:2]):
            if tracer.known(t):
                tracer.mark(tracer.units(t), 2 * tracer.step + side)
                tracer.forbid(tracer.units(t), SHIFTS)


@rule(
    "mean",
    "sum",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "avg_pool1d",
    "avg_pool3d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_nearest1d",
    "cumsum",
)
def _reduced(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    t, name = args[0], func.overloadpacket.__name__
    units = tracer.units(t).expand(t.shape)
    if name not in ("mean", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d"):
        tracer.forbid(units, SHIFTS)
    if name in ("mean", "sum"):
        dims = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim") or list(range(t.dim()))
        dims = [dims] if isinstance(dims, int) else list(dims)
        keep = (args[2] if len(args) > 2 else kwargs.get("keepdim", False)) is True
        dims = [d % t.dim() for d in dims]
        if t in tracer.squares and all(d in dims or not varies(units, d) for d in range(t.dim())):
            normalised(tracer, tracer.squares[t], dims, False)
            tracer.put(out, torch.zeros((), dtype=torch.int64))
            return
        first = units
        for d in dims:
            first = first.narrow(d, 0, 1)
        tracer.tie(first.expand(t.shape), units)
        for d in sorted(dims, reverse=True):
            first = first if keep else first.squeeze(d)
        tracer.put(out, first)
        return
    if name == "cumsum":
        d = args[1] % t.dim()
        tracer.tie(units.narrow(d, 0, 1).expand(t.shape), units)
        tracer.put(out, units)
        return
    spatial = t.dim() - 2 if not name.startswith(("adaptive_avg_pool1d", "avg_pool1d", "upsample_nearest1d")) else 1
    lead = units[(...,) + (slice(0, 1),) * spatial]
    tracer.tie(lead.expand(t.shape), units)
    tracer.put(out, lead)


def varies(t: Tensor, dim: int) -> bool:
    """Whether entries differ along a dimension."""
    return t.shape[dim] > 1 and bool((t.narrow(dim, 0, 1) != t).any())


def normalised(tracer: Tracer, units: Tensor, dims: list[int], centred: bool) -> None:
    """Sets of units that are normalised together: rotations of a whole set keep its norm."""
    moved = units.movedim(dims, list(range(units.dim() - len(dims), units.dim())))
    sets = torch.unique(moved.reshape(-1, math.prod(moved.shape[units.dim() - len(dims) :])), dim=0)
    if any(len(one.unique()) != len(one) for one in sets[:64]):
        tracer.forbid(sets, MIXES)  # the same unit at several positions
    tracer.record.norms.append((sets, centred, tracer.step))
    tracer.forbid(sets, SCALES | (ALONE if centred else SHIFTS))
    if centred:
        tracer.record.common.append(sets)
    tracer.mark(sets, 2 * tracer.step)
