"""Convolutions and look-ups: uses of weights that are no plain products."""

from __future__ import annotations

from typing import Any

from metatele.network.rules.products import biased, written_by
from metatele.network.trace import (
    MIXES,
    NONE,
    ZERO,
    Args,
    Named,
    RefusedError,
    Tracer,
    Use,
    along,
    places,
    rule,
)


@rule("convolution", "_convolution")
def _convolution(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    x, w, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    name = tracer.parameter(w)
    if name is None:
        raise RefusedError("a kernel that is no parameter")
    units = tracer.channels(x, 1)
    count = out.shape[1]
    key = (name, int(w.storage_offset()), w.stride(), w.shape, transposed, groups)
    new = written_by(tracer, key, count, units)
    kernel = places(w[0, 0]).reshape(-1) - int(w.storage_offset()) if w.numel() else ZERO
    o, i = (1, 0) if transposed else (0, 1)
    rows, columns = int(w.storage_offset()) + along(w, o), along(w, i)
    if transposed and groups > 1:
        raise RefusedError("a transposed convolution in groups")
    tracer.record.uses.append(Use(name, tracer.step, rows, columns, kernel, new, units, groups))
    if groups == len(units) > 1:  # one input in each: it goes with its outputs
        tracer.link(units.repeat_interleave(count // groups), new)
        tracer.forbid(units, MIXES)
        tracer.forbid(new, MIXES)
    tracer.put(out, new.view(1, -1, *[1] * (out.dim() - 2)))
    biased(tracer, bias, new)


@rule("embedding")
def _embedding(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    w, name = args[0], tracer.parameter(args[0])
    if name is None or w.dim() != 2:
        raise RefusedError("a table that is no parameter")
    key = (name, int(w.storage_offset()), w.stride(), w.shape, "table")
    new = tracer.written.get(key)
    if new is None:
        new = tracer.written[key] = tracer.new(w.shape[1])
    tracer.record.uses.append(
        Use(name, tracer.step, int(w.storage_offset()) + along(w, 1), ZERO, along(w, 0), new, NONE)
    )
    tracer.put(out, new)
