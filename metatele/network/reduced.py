r"""A use of a part, reduced in the backward pass to sums: of ``hhᵀ``, of ``δδᵀ``, of ``δhᵀ`` over half a batch.

Rows are columns here: inputs ``h [groups, n, i]`` and errors ``δ [groups, n, o]``, as graphs save them. Second moments
of more columns than are asked for are of evenly spaced ones; what is half a gradient is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network.bias import joined
from metatele.network.graph import Target, Use
from metatele.network.parts import Part
from metatele.network.use import RANK, WIDEST, Moment


@dataclass(frozen=True)
class Look:
    """What of the next passes will be asked for.

    Attributes:
        moments: Numbers of the parts whose inputs' second moments are.
        errors: Of those whose errors' are.
        halves: Of those whose gradients of half the batch are.
        ends: The first output and the gradient there.
        fingerprint: Sums by which the data are known again.
        samples: A number for each sample, by which it is.
        dtype: What moments and sums are computed in.
        widest: Rows up to which a moment is kept whole.
        rank: Columns of the factor of a wider one.
        columns: At most, that moments are of, evenly spaced over samples and positions.
        heads: Of attention, where parts are looked at.
    """

    moments: frozenset[int] = frozenset()
    errors: frozenset[int] = frozenset()
    halves: frozenset[int] = frozenset()
    ends: bool = False
    fingerprint: bool = False
    samples: bool = False
    dtype: torch.dtype = torch.float32
    widest: int = WIDEST
    rank: int = RANK
    columns: int = 512
    heads: bool = False

    @property
    def walks(self) -> bool:
        """Whether the graph of a pass is walked."""
        return bool(self.moments or self.errors or self.halves)

    @property
    def anything(self) -> bool:
        """Whether a pass is looked at."""
        return self.walks or self.ends or self.fingerprint or self.samples


class Sums(NamedTuple):
    """What a use adds to a part's sums.

    Attributes:
        part: Its number.
        inputs: ``Σ hhᵀ`` with row and column for a bias; of a look-up how often each row was, ``[1, i]``.
        errors: ``Σ δδᵀ``.
        half: ``Σ δhᵀ`` over the first half of the samples, ``[groups, o, i(+1)]``.
        whole: The same over all of them, of a part that is asked for it.
        columns: n, for which ``inputs`` stands.
        missing: The half was asked for, and which columns are in it isn't known.
    """

    part: int
    inputs: Moment | Tensor | None
    errors: Moment | None
    half: Tensor | None
    whole: Tensor | None
    columns: int
    missing: bool


def halved(lead: Sequence[int], samples: int, sequence_first: bool = False) -> tuple[int, int, int] | None:
    """Where the first half of the samples is among columns with leading dimensions.

    A batch is the first dimension of its size, or lies flattened in the first one together with positions.

    Args:
        lead: Leading dimensions.
        samples: Size of the batch B.
        sequence_first: Of two dimensions of that size the second one is the batch.

    Returns:
        Sizes ``before``, ``B``, ``after`` into which the columns part, the samples in the middle; ``None`` if no
        dimension is a batch.

    Example:
        >>> halved((8, 5), 8), halved((5, 8), 8), halved((40,), 8), halved((5,), 8)
        ((1, 8, 5), (5, 8, 1), (1, 8, 5), None)
    """
    sizes = [size for size in lead if size != 1] or [1]
    if samples < 2:
        return None
    second = len(sizes) > 1 and sizes[1] == samples
    if sizes[0] == samples and not (second and sequence_first):
        return 1, samples, prod(sizes[1:])
    if second:
        return sizes[0], samples, prod(sizes[2:])
    if sizes[0] % samples == 0 and sizes[0]:
        return 1, samples, prod(sizes) // samples
    return None


@torch.no_grad()
def reduced(
    use: Use, gradient: Tensor, parts: Sequence[Part], samples: int, wanted: Look, whole: int | None = None
) -> list[Sums]:
    """What a use adds to the sums of its parts.

    Args:
        use: Its node still has what it saved.
        gradient: Came back to its output.
        parts: All.
        samples: In the batch; 0 if that is not known.
        wanted: What is asked for.
        whole: Number of a part whose whole gradient is, too.
    """
    targets = [
        t
        for t in use.targets
        if t.part in wanted.moments or t.part in wanted.errors or t.part in wanted.halves or t.part == whole
    ]
    if not targets or not gradient.numel():
        return []
    asked = _Asked(parts, samples, wanted, whole)
    device = gradient.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if use.kind == "conv":
            return _convolved(use, gradient.to(wanted.dtype), targets, asked)
        if use.kind == "embedding":
            return _looked_up(use, gradient.to(wanted.dtype), targets, asked)
        return _multiplied(use, gradient, targets, asked)


class _Asked(NamedTuple):
    """The arguments of :func:`reduced` that say what is asked for."""

    parts: Sequence[Part]
    samples: int
    wanted: Look
    whole: int | None


def _multiplied(
    use: Use,
    gradient: Tensor,
    targets: list[Target],
    asked: _Asked,
) -> list[Sums]:
    parts, samples, wanted, whole = asked
    h, delta = _rows(use, gradient)
    h, delta = h.to(wanted.dtype), delta.to(wanted.dtype)
    n = h.shape[1]
    lead = use.lead[1:] if use.groups > 1 and prod(use.lead) != n else use.lead
    # Inside of torch's own attention and recurrent layers positions come first, whatever the model's order.
    inside = any(parts[t.part].kind in ("attention", "recurrent") for t in targets)
    split = None if use.spread or prod(lead) != n else halved(lead, samples, inside)
    few, times = _spaced(n, wanted.columns, h.device)
    moment = None
    if any(t.part in wanted.moments and not t.flipped for t in targets):
        # Once for all parts of a packed weight, with the ones of a bias if any has one.
        biased = any(parts[t.part].bias is not None for t in targets)
        moment = _moment(h if few is None else h[:, few], use.biased if biased else None, times, wanted)
    found = []
    for t in targets:
        part, (a, b) = parts[t.part], t.of_use
        d = delta[..., a:b]
        errors = None
        if t.part in wanted.errors and not t.flipped and b - a == part.outputs:
            errors = _of(d if few is None else d[:, few], times, wanted)
        half = _product(_half(d, split), _half(h, split), use, t, part) if t.part in wanted.halves and split else None
        total = _product(d, h, use, t, part) if t.part == whole else None
        inputs = moment if t.part in wanted.moments and not t.flipped else None
        missing = t.part in wanted.halves and half is None
        found.append(Sums(t.part, inputs, errors, half, total, 0 if t.flipped else n, missing))
    return found


def _rows(use: Use, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and errors of a product ``[groups, n, ...]``."""
    saved = getattr(use.node, f"_saved_{use.saved}").detach()
    if use.kind == "left":
        if saved.dim() == 1:
            return saved[None, None], gradient.detach()[None, None]
        saved, gradient = saved.mT, gradient.mT
    groups = use.groups
    return (t.detach().reshape(groups, -1, t.shape[-1]) for t in (saved, gradient))  # type: ignore[return-value]


def _moment(h: Tensor, biased: bool | None, times: float, wanted: Look) -> Moment:
    if biased is not None:  # zeros where its part has a bias that is not added here
        h = torch.nn.functional.pad(h, (0, 1), value=float(biased))
    return _of(h, times, wanted)


def _of(rows: Tensor, times: float, wanted: Look) -> Moment:
    moment = Moment.sketched(rows.mT, wanted.widest, wanted.rank)  # narrowed at the look, all parts together
    return moment if times == 1 else moment.scaled(times)


def _spaced(n: int, most: int, device: torch.device) -> tuple[Tensor | None, float]:
    """Numbers of evenly spaced columns, and what one stands for; their distance shares no factor with n."""
    if n <= most:
        return None, 1.0
    step = -(-n // most)
    while gcd(step, n) > 1:
        step += 1
    few = torch.arange(0, n, step, device=device)
    return few, n / len(few)


def _half(rows: Tensor, split: tuple[int, int, int] | None) -> Tensor:
    assert split is not None
    g, _, k = rows.shape
    before, samples, after = split
    if before == 1:
        return rows[:, : samples // 2 * after]
    return rows.view(g, before, samples, after, k)[:, :, : samples // 2].reshape(g, -1, k)


def _product(d: Tensor, h: Tensor, use: Use, target: Target, part: Part) -> Tensor:
    """``Σ δhᵀ`` as a matrix of the part."""
    M = d.mT @ h
    if target.flipped:
        M = M.mT
        return M if part.bias is None else joined(M, M.new_zeros(M.shape[:-1]))
    if part.bias is not None:
        M = joined(M, d.sum(1) if use.biased else M.new_zeros(M.shape[:-1]))
    return _placed(M, target, part)


def _placed(M: Tensor, target: Target, part: Part) -> Tensor:
    """Some rows of a part's matrix, with zeros around them."""
    a, b = target.of_part
    return M if b - a == part.outputs else torch.nn.functional.pad(M, (0, 0, a, part.outputs - b))


def _looked_up(
    use: Use,
    gradient: Tensor,
    targets: list[Target],
    asked: _Asked,
) -> list[Sums]:
    """Inputs are one-hot: their second moment is diagonal, and what a product would be is a sum by index."""
    parts, samples, wanted, whole = asked
    indices, padding = use.node._saved_indices.reshape(-1), int(use.node._saved_padding_idx)
    delta = gradient.reshape(1, len(indices), -1)
    if 0 <= padding < 2**63:
        delta = delta * (indices != padding)[:, None]
    n = len(indices)
    split = None if use.spread or prod(use.lead) != n else halved(use.lead, samples)
    found = []
    for t in targets:
        part = parts[t.part]
        V = part.weight.shape[0]

        def summed(where: Tensor, rows: Tensor, t: Target = t, part: Part = part) -> Tensor:
            table = rows.new_zeros(part.weight.shape).index_add_(0, where, rows)[None]
            if not t.flipped:
                return table.mT
            return table if part.bias is None else joined(table, table.new_zeros(table.shape[:-1]))

        inputs = errors = half = None
        if t.part in wanted.moments and not t.flipped:
            inputs = torch.bincount(indices, minlength=V).to(wanted.dtype)[None]
        if t.part in wanted.errors and not t.flipped:
            few, times = _spaced(n, wanted.columns, delta.device)
            errors = _of(delta if few is None else delta[:, few], times, wanted)
        if t.part in wanted.halves and split is not None:
            half = summed(_half(indices[None, :, None], split).reshape(-1), _half(delta, split)[0])
        total = summed(indices, delta[0]) if t.part == whole else None
        missing = t.part in wanted.halves and half is None
        found.append(Sums(t.part, inputs, errors, half, total, 0 if t.flipped else n, missing))
    return found


def _convolved(
    use: Use,
    gradient: Tensor,
    targets: list[Target],
    asked: _Asked,
) -> list[Sums]:
    parts, samples, wanted, whole = asked
    node, (t, *_) = use.node, targets
    part = parts[t.part]
    x = node._saved_input.detach().to(wanted.dtype)
    n = gradient.numel() // gradient.shape[1]
    inputs = errors = half = total = None
    if t.part in wanted.moments or t.part in wanted.errors:
        patches, delta, times = _patches(node, x, gradient, part, wanted)
        if t.part in wanted.moments:
            inputs = _moment(patches, use.biased if part.bias is not None else None, times, wanted)
        if t.part in wanted.errors:
            errors = _of(delta, times, wanted)

    def backward(x: Tensor, gradient: Tensor) -> Tensor:
        weight, many = part.weight.detach().to(x.dtype), len(node._saved_stride)
        _, W, b = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [part.weight.shape[0]],
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            False,
            [0] * many,
            node._saved_groups,
            [False, True, part.bias is not None],
        )
        M = W.reshape(part.groups, -1, part.width)
        if part.bias is None:
            return M
        column = b.reshape(part.groups, -1)
        return joined(M, column if use.biased else torch.zeros_like(column))

    # Frames of videos and windows of images lie in the first dimension with the samples.
    if t.part in wanted.halves and samples > 1 and len(x) % samples == 0 and not use.spread:
        first = len(x) // samples * (samples // 2)
        half = backward(x[:first], gradient[:first])
    if t.part == whole:
        total = backward(x, gradient)
    return [Sums(t.part, inputs, errors, half, total, n, t.part in wanted.halves and half is None)]


def _patches(node: object, x: Tensor, gradient: Tensor, part: Part, wanted: Look) -> tuple[Tensor, Tensor, float]:
    """Patches ``[groups, n, i]`` and errors ``[groups, n, o]`` at evenly spaced samples and positions."""
    stride, padding, dilation = ([*getattr(node, f"_saved_{name}")] for name in ("stride", "padding", "dilation"))
    kernel, places = part.weight.shape[2:], gradient.shape[2:]
    around = [size for p in reversed(padding) for size in (p, p)]
    x = torch.nn.functional.pad(x, around) if any(padding) else x
    each = prod(places)
    few, times = _spaced(len(x) * each, wanted.columns, x.device)
    few = torch.arange(len(x) * each, device=x.device) if few is None else few
    sample, place = few // each, few % each
    steps = [prod(x.shape[2 + axis + 1 :]) for axis in range(len(places))]  # in the flattened padded input
    corner = torch.zeros_like(place)
    rest = place
    for axis in reversed(range(len(places))):
        corner = corner + rest % places[axis] * (stride[axis] * steps[axis])
        rest = rest // places[axis]
    offsets = [
        sum(k * d * s for k, d, s in zip(where, dilation, steps, strict=True))
        for where in product(*(range(size) for size in kernel))
    ]
    at = corner[:, None] + torch.tensor(offsets, device=x.device)
    seen = x.flatten(2)[sample[:, None], :, at]  # [n, positions, channels]
    n, channels = len(few), x.shape[1]
    patches = seen.mT.reshape(n, part.groups, channels // part.groups * len(offsets)).transpose(0, 1)
    delta = gradient.flatten(2)[sample, :, place].reshape(n, part.groups, -1).transpose(0, 1)
    return patches, delta, times
