"""Norms: of sets of units, and their gains."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from metatele.network.rules.products import biased, gained, paired
from metatele.network.rules.sums import normalised, told_apart
from metatele.network.trace import (
    MIXES,
    NONE,
    SCALES,
    SHIFTS,
    SWAPS,
    ZERO,
    Args,
    Named,
    Tracer,
    Use,
    along,
    rule,
)


def with_gain(tracer: Tracer, units: Tensor, gain: Any, bias: Any, out: Tensor, shape: tuple[int, ...]) -> None:
    """``gain · units + bias``, each with one entry for each unit."""
    if gain is not None:
        g = gain.view(shape)
        if not tracer.known(gain):
            told_apart(tracer, out, g)
        elif not gained(tracer, out, g, out):
            own = tracer.units(gain).view(shape).expand(out.shape)
            paired(tracer, units.expand(out.shape), own, out)
        units = tracer.units(out)
    if bias is not None and tracer.known(bias):
        biased(tracer, bias.reshape(-1), tracer.channels(out, [d for d, n in enumerate(shape) if n != 1][-1]))


@rule("native_layer_norm", "layer_norm")
def _layer_norm(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    x, shape_of, gain, bias = args[:4]
    result = tree_leaves(out)[0]
    units = tracer.units(x).expand(x.shape)
    dims = list(range(x.dim() - len(shape_of), x.dim()))
    normalised(tracer, units, dims, True)
    tracer.put(result, units)
    shape = (1,) * (x.dim() - len(shape_of)) + tuple(shape_of)
    with_gain(tracer, units, gain, bias, result, shape)


@rule("_fused_rms_norm", "rms_norm")
def _rms_norm(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    x, shape_of, gain = args[:3]
    result = tree_leaves(out)[0]
    units = tracer.units(x).expand(x.shape)
    normalised(tracer, units, list(range(x.dim() - len(shape_of), x.dim())), False)
    tracer.put(result, units)
    with_gain(tracer, units, gain, None, result, (1,) * (x.dim() - len(shape_of)) + tuple(shape_of))


@rule("native_group_norm", "group_norm")
def _group_norm(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    x, gain, bias = args[:3]
    groups = args[6] if func.overloadpacket.__name__ == "native_group_norm" else args[1]
    if func.overloadpacket.__name__ == "group_norm":
        gain, bias = args[2], args[3]
    result = tree_leaves(out)[0]
    units = tracer.units(x).expand(x.shape)
    channels = tracer.channels(x, 1)
    for group in channels.view(groups, -1):
        own = tracer.new(1)
        tracer.forbid(own, SCALES | MIXES)
        tracer.link(own.expand(len(group)), group)
    tracer.forbid(units, MIXES | SCALES | SHIFTS)
    tracer.mark(units, 2 * tracer.step)
    tracer.put(result, units)
    with_gain(tracer, units, gain, bias, result, (1, -1) + (1,) * (x.dim() - 2))


@rule(
    *("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"),
    *("_native_batch_norm_legit_no_training", "batch_norm", "_batch_norm_with_update"),
)
def _batch_norm(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    x, gain, bias = args[:3]
    result = tree_leaves(out)[0]
    channels = tracer.channels(x, 1)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    units = channels.view(shape).expand(x.shape)
    tracer.forbid(channels, MIXES | SCALES | SHIFTS)  # exact only up to its eps
    tracer.mark(channels, 2 * tracer.step)
    for statistic in args[3:5]:
        if not isinstance(statistic, Tensor):
            continue
        name = tracer.buffers.get(statistic.untyped_storage()._cdata)
        if name is None or len(statistic) != len(channels):  # a copy, as of norms of single samples
            tracer.forbid(channels, SWAPS)
            continue
        rows = int(statistic.storage_offset()) + along(statistic, 0)
        tracer.record.statistics.append(Use(name, tracer.step, rows, ZERO, ZERO, channels, NONE))
    tracer.put(result, units)
    with_gain(tracer, units, gain, bias, result, shape)
