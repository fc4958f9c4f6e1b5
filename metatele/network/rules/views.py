"""Views: what is done to activations is done to their units."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from metatele.network.rules.sums import summed
from metatele.network.trace import (
    MIXES,
    SCALES,
    SHIFTS,
    Args,
    Named,
    RefusedError,
    Tracer,
    rule,
)


@rule(
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "squeeze"),
    *("unsqueeze", "select", "slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"),
    *("unsafe_chunk", "chunk", "unbind", "alias", "detach", "roll", "flip", "repeat", "index_select", "narrow"),
    *("diagonal", "unfold", "movedim", "swapaxes", "tile"),
)
def _view(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    if tracer.parameter(args[0]) is not None and all(
        t.untyped_storage()._cdata == args[0].untyped_storage()._cdata for t in tree_leaves(out)
    ):
        return  # still a view of the parameter
    name = func.overloadpacket.__name__
    if name.endswith("_"):  # in place: the units still have the old shape
        packet = getattr(torch.ops.aten, name[:-1])
        tracer.put(out, packet(tracer.units(args[0]), *args[1:], **kwargs))
        return
    units = tracer.units(args[0]).expand(args[0].shape)
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        moved: Any = units.reshape(out.shape)  # of expanded units a view may not exist
    else:
        moved = func(units, *args[1:], **kwargs)
    if name in ("select", "slice", "narrow", "index_select", "diagonal"):
        tracer.keep(units, moved)
    for t, units in zip(tree_leaves(out), tree_leaves(moved), strict=True):
        tracer.put(t, units)


@rule("index")
def _index(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    if tracer.parameter(args[0]) is not None:
        raise RefusedError("of a parameter")
    if any(tracer.known(t) for t in args[1] if t is not None):
        raise RefusedError("by numbers that depend on units")
    units = tracer.units(args[0]).expand(args[0].shape)
    moved = func(units, args[1])
    tracer.keep(units, moved)
    tracer.put(out, moved)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _constant(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    """What has the shape of something, and nothing else of it."""


@rule("index_add", "scatter_add")
def _index_add(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    target, dim, index, source = args[:4]
    if tracer.known(index) or tracer.parameter(source) is not None or tracer.known(target):
        raise RefusedError("of other units")
    add = getattr(torch.ops.aten, func.overloadpacket.__name__.removesuffix("_"))
    labels = tracer.units(source).expand(source.shape)
    first = labels.narrow(dim, 0, 1)
    even = bool((labels == first).all()) and out.shape[:dim] + out.shape[dim + 1 :] == first.squeeze(dim).shape
    if not even or kwargs or len(args) > 4 or not torch.equal(out, add(torch.zeros_like(out), dim, index, source)):
        raise RefusedError("that adds unlike things")
    tracer.forbid(first, SHIFTS)  # of what is added up, the number may differ
    tracer.put(out, first.expand(out.shape))


@rule("clone", "_to_copy", "contiguous", "to", "lift_fresh", "dropout", "copy")
def _copy(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    source = args[1] if func.overloadpacket.__name__.startswith("copy") else args[0]
    tracer.put(out, tracer.units(source))


@rule("cat", "stack")
def _cat(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    tracer.put(out, func([tracer.units(t).expand(t.shape) for t in args[0]], *args[1:], **kwargs))


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    # Zeros stay zeros whatever is done to units, so a border is of its neighbour's unit.
    value = args[2] if len(args) > 2 and func.__name__.startswith("constant") else 0
    units = tracer.units(args[0])
    if value:
        tracer.forbid(units, MIXES | SCALES)
    tracer.forbid(units, SHIFTS)
    pad, grown = args[1], units.expand(args[0].shape)
    for n, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        size = grown.shape[-1 - n]
        at = torch.arange(-before, size + after).clamp(0, size - 1)
        grown = grown.index_select(grown.dim() - 1 - n, at)
    tracer.put(out, grown)


@rule("where", "masked_fill", "_softmax_backward_data")
def _where(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    if func.overloadpacket.__name__.startswith("masked_fill"):
        sides = [args[0], args[2]]
    else:
        sides = list(args[1:3])
        if tracer.known(args[0]):
            raise RefusedError("a condition that depends on units")
    for t in sides:
        if tracer.known(t):
            tracer.forbid(tracer.units(t), SHIFTS)
    summed(tracer, sides, out)
