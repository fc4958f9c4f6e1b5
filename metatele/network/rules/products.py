"""Products: of units by numbers and gains, with weights, and with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metatele.network.rules.sums import spread, summed, told_apart, varies
from metatele.network.trace import (
    FIXED,
    MIXES,
    NONE,
    SCALES,
    SHIFTS,
    SWAPS,
    ZERO,
    Args,
    Contraction,
    Gain,
    Named,
    RefusedError,
    Tracer,
    Use,
    along,
    pairs,
    places,
    rule,
)


@rule("mul", "div")
def _mul(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    a, b = args[0], args[1]
    if not (tracer.known(a) and tracer.known(b)):
        t, c = (a, b) if tracer.known(a) else (b, a)
        units = tracer.units(t)
        if func.overloadpacket.__name__.startswith("div") and t is b:
            tracer.forbid(units, MIXES | SCALES)
        tracer.forbid(units, SHIFTS)
        tracer.mark(units, 2 * tracer.step)  # perhaps it is done to some units alone
        if isinstance(c, Tensor) and c.numel() > 1:
            told_apart(tracer, t, c)
        tracer.put(out, spread(units, out))
        return
    for gain, x in ((a, b), (b, a)):
        one_for_each = isinstance(gain, Tensor) and tracer.parameter(gain) and gain.numel() > 1
        times = func.overloadpacket.__name__.startswith("mul") and tracer.parameter(x) is None
        if one_for_each and times and gained(tracer, x, gain, out):
            return
    left, right = spread(tracer.units(a), out), spread(tracer.units(b), out)
    tracer.forbid(left, SHIFTS)
    tracer.forbid(right, SHIFTS)
    if func.overloadpacket.__name__.startswith("div"):
        tracer.forbid(right, SCALES)
    for x, y, factor in ((left, right, a), (right, left, b)):  # by a number that no change of units reaches
        if bool((x == FIXED).all()):
            if any(varies(y, d) and torch.broadcast_to(factor, out.shape).stride(d) for d in range(out.dim())):
                tracer.forbid(y, MIXES | SWAPS)  # another for each of the units
            tracer.put(out, y)
            return
    for x, y, factor in ((left, right, a), (right, left, b)):  # one gate for many units of a position
        if is_one_for_many(torch.broadcast_to(factor, out.shape), x, y):
            tracer.forbid(x, SCALES | MIXES)
            tracer.link(x, y)
            tracer.record.averages.append((pairs(x, y), tracer.step))
            tracer.put(out, y)
            return
    paired(tracer, left, right, out)


def is_one_for_many(factor: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether a factor of units x is the same number along every dimension along which y differs."""
    dims = [d for d in range(y.dim()) if varies(y, d)]
    return bool(dims) and not any(varies(x, d) or factor.stride(d) for d in dims)


def gained(tracer: Tracer, x: Tensor, gain: Tensor, out: Tensor) -> bool:
    """Whether a product is one of units with a gain for each, which it then writes down."""
    dims = [d for d in range(gain.dim()) if gain.shape[d] > 1]
    if len(dims) != 1 or out.shape != x.shape:
        return False
    dim = dims[0] - gain.dim() + x.dim()
    units = tracer.channels(x, dim)
    if len(units.unique()) != len(units) or bool((units == FIXED).any()):
        return False
    name = tracer.parameter(gain)
    assert name is not None
    rows = places(gain).reshape(-1)
    key = ("gain", name, int(rows[0]), gain.stride(), tuple(units.tolist()))
    new = tracer.written.get(key)
    if new is None:
        new = tracer.written[key] = tracer.new(len(units))
    tracer.record.gains.append(Gain(tracer.step, units, new, name, rows))
    shape = [1] * x.dim()
    shape[dim] = -1
    tracer.put(out, new.view(shape))
    return True


def paired(tracer: Tracer, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Units of a product element by element: new ones, whose scale is that of both factors together."""
    both = torch.stack([left, right], -1)
    for d in range(out.dim()):
        if both.stride(d) == 0 and both.shape[d] > 1:
            both = both.narrow(d, 0, 1)
    kinds, inverse = torch.unique(both.reshape(-1, 2), dim=0, return_inverse=True)
    key = ("product", tuple(kinds.reshape(-1).tolist()) if kinds.numel() < 1 << 16 else tracer.step)
    new = tracer.written.get(key)
    if new is None:
        new = tracer.written[key] = tracer.new(len(kinds))
    tracer.record.sums.append(torch.stack([new, kinds[:, 0], kinds[:, 1]]))
    for n, side in enumerate((kinds[:, 0], kinds[:, 1])):
        tracer.link(new, side)
        tracer.forbid(side, MIXES)
        tracer.mark(side, 2 * tracer.step + n)
    tracer.forbid(new, MIXES)
    tracer.put(out, new[inverse].view(both.shape[:-1]).expand(out.shape))


def linear(tracer: Tracer, x: Tensor, w: Tensor, out: Tensor, bias: Any = None) -> None:
    """``out = x w (+ bias)`` with w ``[i, o]`` a view of a parameter."""
    name = tracer.parameter(w)
    assert name is not None
    units = tracer.channels(x, -1)
    rows, columns = int(w.storage_offset()) + along(w, 1), along(w, 0)
    key = (name, int(rows[0]), w.stride(), w.shape)
    new = written_by(tracer, key, w.shape[1], units)
    tracer.record.uses.append(Use(name, tracer.step, rows, columns, ZERO, new, units))
    tracer.put(out, new)
    biased(tracer, bias, new)


def written_by(tracer: Tracer, key: Any, count: int, units: Tensor) -> Tensor:
    """New units, or the same as when these weights were used before: then what is read changes together too."""
    if key not in tracer.written:
        tracer.written[key], tracer.read[key] = tracer.new(count), units
    tracer.tie(tracer.read[key], units)
    return tracer.written[key]


def biased(tracer: Tracer, bias: Any, units: Tensor) -> None:
    """A bias, if there is one, writes units ``[o]``."""
    if bias is None:
        return
    name = tracer.parameter(bias)
    if name is None:
        if tracer.known(bias):
            tracer.tie(tracer.channels(bias, -1).expand(units.shape), units)
        elif bool((bias != 0).any()):
            tracer.forbid(units, MIXES | SCALES | SWAPS)
        return
    if bias.dim() != 1:
        tracer.tie(tracer.channels(bias, -1).expand(units.shape), units)
        return
    tracer.record.uses.append(
        Use(name, tracer.step, int(bias.storage_offset()) + along(bias, 0).expand(len(units)), ZERO, ZERO, units, NONE)
    )
    tracer.record.shifts.append(("bias", units, tracer.step))


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "matmul", "linear")
def _product(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    name = func.overloadpacket.__name__
    bias = None
    if name in ("addmm", "baddbmm"):
        bias, a, b = args[:3]
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            if tracer.known(bias):
                raise RefusedError("factors of both terms")
            bias = None if kwargs.get("beta", 1) == 0 else bias
    elif name == "linear":
        a, b, bias = args[0], args[1].t(), args[2] if len(args) > 2 else None
    else:
        a, b = args[:2]
    if tracer.parameter(b) is not None and not tracer.known(a):
        zeros = not bool(a.any())  # a state before the first step: it allows everything
        labelled(tracer, a, tracer.new(a.shape[-1]) if zeros else torch.zeros((), dtype=torch.int64))
    if tracer.parameter(b) is not None and tracer.parameter(a) is None and b.dim() == 2 and tracer.known(a):
        linear(tracer, a, b, out, bias)
    elif tracer.parameter(a) is not None and tracer.parameter(b) is None and a.dim() == 2 and b.dim() == 2:
        turned = torch.empty(out.shape[::-1])
        if not tracer.known(b):
            tracer.put(b, torch.zeros((), dtype=torch.int64))
        linear(tracer, b.t() if b.t() in tracer.labels else labelled(tracer, b.t(), tracer.units(b).t()), a.t(), turned)
        tracer.put(out, tracer.units(turned).t())
        if bias is not None:
            raise RefusedError("a bias of a product from the left")
    elif tracer.parameter(b) is not None and tracer.parameter(a) is None and b.dim() == 3 and tracer.known(a):
        _stacked(tracer, a, b, out, bias)
    elif name == "mv":
        raise RefusedError("a matrix times a vector of units")
    else:
        _contracted(tracer, a, b, out)
        if tracer.known(bias):
            summed(tracer, [out, bias], out)


def labelled(tracer: Tracer, t: Tensor, units: Tensor) -> Tensor:
    """A tensor, after its units were told."""
    tracer.put(t, units)
    return t


def _stacked(tracer: Tracer, x: Tensor, w: Tensor, out: Tensor, bias: Any) -> None:
    """``[e, n, i] @ [e, i, o]`` with a parameter of stacked matrices, as of experts: each is a use of its own."""
    for e in range(len(w)):
        part = labelled(tracer, x[e], tracer.units(x).expand(x.shape)[e])
        result = torch.empty(out.shape[1:])
        linear(tracer, part, w[e], result)
        if e == 0:
            units = [tracer.units(result)]
        else:
            units.append(tracer.units(result))
    tracer.put(out, torch.stack([u.expand(out.shape[1:]) for u in units]))
    if bias is not None:
        raise RefusedError("a bias of stacked matrices")


def _contracted(tracer: Tracer, a: Tensor, b: Tensor, out: Tensor) -> None:
    """A product of two activations ``[..., n, k] @ [..., k, m]``: over positions, or over units."""
    left, right = tracer.units(a).expand(a.shape), tracer.units(b).expand(b.shape)
    if a.dim() == 2:
        left, right = left[None], right[None]
    left, right = left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])
    shape = (max(len(left), len(right)), left.shape[1], right.shape[2])
    one, other = (t.expand(shape[0], *t.shape[1:]) for t in (left, right))
    inner_a, inner_b = varies(one, 2), varies(other, 1)
    if not inner_a and not inner_b:  # over positions: of weights that are one unit, or of which one side is
        lead_a, lead_b = one[..., :1], other[:, :1]  # [b, n, 1], [b, 1, m]
        if bool((lead_a == FIXED).all()) or bool((lead_b == FIXED).all()):
            tracer.forbid(lead_a, SHIFTS)
            tracer.forbid(lead_b, SHIFTS)
        if bool((lead_a == FIXED).all()):
            units = lead_b.expand(shape)
        elif bool((lead_b == FIXED).all()):
            units = lead_a.expand(shape)
        elif not varies(lead_a, 1):  # attention weights times values: the values' units
            tracer.forbid(lead_a, SCALES | MIXES)
            tracer.link(lead_a.expand(shape), lead_b.expand(shape))
            tracer.mark(lead_a, 2 * tracer.step)
            tracer.mark(lead_b, 2 * tracer.step + 1)
            tracer.record.averages.append((pairs(lead_a.expand(shape), lead_b.expand(shape)), tracer.step))
            units = lead_b.expand(shape)
        else:
            raise RefusedError("a product of two sets of units")
        tracer.put(out, units.reshape(out.shape))
        return
    # Over units: each row's set of units with each column's.
    if inner_a and not varies(one, 1) and not varies(other, 2):
        q, k = one[:, 0], other[:, :, 0]
    else:
        for t, d in ((one, 1), (other, 2)):  # sets that differ between positions change together
            first = t.narrow(d, 0, 1).expand(t.shape)
            if inner_a and inner_b:
                tracer.tie(first, t)
            else:
                raise RefusedError("units against positions")
        q, k = one[:, 0], other[:, :, 0]
    if bool((q == FIXED).any()) or bool((k == FIXED).any()):
        tracer.tie(q, torch.zeros((), dtype=torch.int64).expand(q.shape))
        tracer.tie(k, torch.zeros((), dtype=torch.int64).expand(k.shape))
        tracer.put(out, torch.zeros((), dtype=torch.int64))
        return
    kinds, inverse = torch.unique(torch.cat([q, k], 1), dim=0, return_inverse=True)
    key = ("contraction", tuple(kinds.reshape(-1).tolist()) if kinds.numel() < 1 << 16 else tracer.step)
    new = tracer.written.get(key)
    if new is None:
        new = tracer.written[key] = tracer.new(len(kinds))
    size = q.shape[1]
    tracer.forbid(kinds, SHIFTS)
    tracer.forbid(new, MIXES | SHIFTS)
    tracer.record.contractions.append(Contraction(tracer.step, kinds[:, :size], kinds[:, size:], new))
    tracer.put(out, new[inverse][:, None, None].expand(shape).reshape(out.shape))
