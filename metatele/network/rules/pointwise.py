"""Functions of one unit at a time, and softmax."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves

from metatele.network.rules.sums import varies
from metatele.network.trace import (
    ALONE,
    MIXES,
    SCALES,
    SHIFTS,
    Args,
    Named,
    RefusedError,
    Tracer,
    distinct,
    rule,
)


@rule(
    "relu",
    "leaky_relu",
    "threshold",
    "max_pool2d_with_indices",
    "max_pool2d",
    "max_pool1d",
    "max_pool3d",
    "abs",
    "rrelu_with_noise",
    "adaptive_max_pool2d",
    "max_pool3d_with_indices",
    "clamp_min",
    "amax",
    "amin",
)
def _homogeneous(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    t, name = args[0], func.overloadpacket.__name__
    units = tracer.units(t).expand(t.shape)
    if (name == "threshold" and args[1:3] != (0, 0)) or (name == "clamp_min" and args[1] != 0):
        return _elementwise(tracer, func, args, kwargs, out)
    tracer.forbid(units, MIXES | SHIFTS)
    tracer.mark(units, 2 * tracer.step)
    first = tree_leaves(out)[0]
    if "pool" in name:
        dims = int(name.split("pool")[1][0])
        lead = units[(...,) + (slice(0, 1),) * dims]
        tracer.tie(lead.expand(t.shape), units)
        units = lead.expand(first.shape)
    elif name in ("amax", "amin"):
        raise RefusedError("a maximum")
    tracer.put(first, units)
    return None


@rule("prelu", "_prelu_kernel")
def _prelu(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    units = tracer.units(args[0])
    tracer.forbid(units, MIXES | SHIFTS)
    tracer.mark(units, 2 * tracer.step)
    slope, name = args[1], tracer.parameter(args[1])
    if name is not None and slope.numel() > 1:
        own = tracer.units(slope).expand(out.shape)
        tracer.forbid(own, SCALES | MIXES)
        tracer.link(own, units.expand(out.shape))
    elif name is not None:
        tracer.freeze(name, slope)
    tracer.put(out, units)


@rule(
    *("tanh", "sin", "atan", "asinh", "erf", "sign", "hardtanh"),
    *("gelu", "silu", "sigmoid", "elu", "selu", "celu", "mish", "softplus", "hardswish", "hardsigmoid", "exp", "log"),
    *("log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "cos", "erfc", "log_sigmoid_forward", "relu6", "clamp"),
    *("softshrink", "hardshrink", "clamp_max"),
)
def _elementwise(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    if any(tracer.known(t) for t in args[1:]):
        raise RefusedError("bounds that depend on units")
    units = tracer.units(args[0])
    tracer.forbid(units, MIXES | SCALES | SHIFTS)
    tracer.mark(units, 2 * tracer.step)
    tracer.put(tree_leaves(out)[0], units)


@rule("neg")
def _neg(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    tracer.forbid(tracer.units(args[0]), SHIFTS)
    tracer.mark(tracer.units(args[0]), 2 * tracer.step)
    tracer.put(out, tracer.units(args[0]))


@rule("pow", "square")
def _power(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    if not tracer.known(args[0]) or (len(args) > 1 and tracer.known(args[1])):
        raise RefusedError("a power of units")
    units = tracer.units(args[0]).expand(args[0].shape)
    tracer.forbid(units, SHIFTS)
    if len(args) == 1 or args[1] == 2:
        tracer.squares[out] = units  # as long as all that comes of it is a sum over all units
        tracer.put(out, units)
        return
    tracer.forbid(units, MIXES | SCALES)
    tracer.mark(units, 2 * tracer.step)
    tracer.put(out, units)


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax", "logsumexp")
def _softmax(tracer: Tracer, func: Any, args: Args, kwargs: Named, out: Any) -> None:
    t = args[0]
    units = tracer.units(t).expand(t.shape)
    if func.overloadpacket.__name__ == "logsumexp":
        raise RefusedError("a sum of exponentials")
    tracer.forbid(units, MIXES | SCALES | ALONE)
    tracer.mark(units, 2 * tracer.step)
    tracer.record.shifts.append(("softmax", distinct(units), tracer.step))
    dim = args[1] % t.dim()
    if not varies(units, dim):
        tracer.put(out, units)
        return
    old = tracer.channels(t, dim)
    distinct_units, inverse = old.unique(return_inverse=True)
    new = tracer.new(len(distinct_units))
    tracer.forbid(new, MIXES | SCALES)
    tracer.link(distinct_units, new)
    tracer.mark(new, 2 * tracer.step + 1)
    if len(distinct_units) == len(old):
        tracer.record.common.append(old[None])
    shape = [1] * t.dim()
    shape[dim] = -1
    tracer.put(out, new[inverse].view(shape))
