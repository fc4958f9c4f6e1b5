"""Sums of what the uses of a part show, over uses, passes and processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network import ranks
from metatele.network.parts import Part
from metatele.network.reduced import Look, Sums
from metatele.network.stacks import all_narrowed
from metatele.network.use import Moment


class PartSeen(NamedTuple):
    """What a part received and got back in the passes of one step, on all ranks.

    Attributes:
        inputs: ``Σ hhᵀ / n``, ``[groups, i, i]``, with row and column for a bias; of an embedding its diagonal
            ``[1, i]``; ``None`` if it was not asked for, or all uses are flipped.
        errors: ``Σ δδᵀ``, ``[groups, o, o]``, in the scale of ``p.grad``; ``None`` if it was not asked for.
        half: What the first half of the samples adds to the gradient, ``[groups, o, i(+1)]``, in the scale of
            ``p.grad``; ``None`` if it was not asked for, or which columns are in it is not known.
        columns: n, samples times positions.
        positions: Columns for each sample.
    """

    inputs: Moment | Tensor | None
    errors: Moment | None
    half: Tensor | None
    columns: int
    positions: float

    def square(self, matrix: Tensor) -> Tensor | None:
        """Mean ``z² = tr(W A Wᵀ) / (o groups)`` of what the part puts out, ``[]``; ``None`` without ``inputs`` A.

        Args:
            matrix: W ``[groups, o, i(+1)]``, as it was in the pass.

        Example:
            >>> seen = PartSeen(Moment(torch.eye(2)[None]), None, None, 5, 1.0)
            >>> seen.square(torch.tensor([[[3.0, 4.0]]]))
            tensor(25.)
        """
        A = self.inputs
        if A is None:
            return None
        if isinstance(A, Tensor):
            return (matrix.square() * A[..., None, :]).sum() / matrix[..., 0].numel()
        through = (matrix @ A.tensor * matrix).sum() if A.rest is None else (matrix @ A.tensor).square().sum()
        if A.rest is not None:
            through = through + (A.rest * matrix.square()).sum()
        return through / matrix[..., 0].numel()


@dataclass(eq=False)
class Total:
    """Sums of a part.

    Attributes:
        inputs: ``Σ hhᵀ``, or its diagonal.
        errors: ``Σ δδᵀ``.
        half: ``Σ δhᵀ`` over the first halves of batches.
        whole: The same over all samples.
        columns: n.
        missing: A use did not know its half.
        samples: By pass.
    """

    inputs: Moment | Tensor | None = None
    errors: Moment | None = None
    half: Tensor | None = None
    whole: Tensor | None = None
    columns: int = 0
    missing: bool = False
    samples: dict[int, int] = field(default_factory=dict)

    def add(self, one: Sums, number: int, samples: int, again: bool, rank: int) -> None:
        """A use in a pass of a number; ``again`` if its inputs are in the sums."""
        if one.inputs is not None and not again:
            self.inputs = _plus(self.inputs, one.inputs, rank)
        if one.errors is not None:
            errors = one.errors if self.errors is None else _plus(self.errors, one.errors, rank)
            self.errors = errors if isinstance(errors, Moment) else None
        if one.half is not None:
            self.half = one.half if self.half is None else self.half + one.half
        if one.whole is not None:
            self.whole = one.whole if self.whole is None else self.whole + one.whole
        if not again:
            self.columns += one.columns
            self.samples[number] = samples
        self.missing = self.missing or one.missing

    def seen(self, inputs: Moment | Tensor | None, half: Tensor | None, share: float) -> PartSeen:
        """As means.

        Args:
            inputs: The mean of the inputs.
            half: Times ``share``.
            share: Factor on the errors.
        """
        samples = sum(self.samples.values())
        return PartSeen(
            inputs,
            None if self.errors is None else self.errors.scaled(share**2),
            None if self.missing else half,
            self.columns,
            self.columns / samples if samples else float(self.columns),
        )


def all_seen(totals: Mapping[int, Total], share: float) -> dict[int, PartSeen]:
    """As means, errors and halves times ``share``; those of all parts in few calls.

    Args:
        totals: By the parts' numbers.
        share: From gradients as recorded to those of ``p.grad``.
    """
    inputs: dict[int, Moment | Tensor | None] = {}
    factors: list[tuple[int, Moment]] = []
    for number, total in totals.items():
        n, A = max(1, total.columns), total.inputs
        if isinstance(A, Moment) and A.rest is not None:
            factors.append((number, A))
        else:
            inputs[number] = None if A is None else A.over(n) if isinstance(A, Moment) else A / n
    if factors:
        ns = [1 / max(1, totals[number].columns) for number, _ in factors]
        F = torch._foreach_mul([A.tensor for _, A in factors], [n**0.5 for n in ns])
        rests = torch._foreach_mul([A.rest for _, A in factors if A.rest is not None], ns)
        inputs |= {number: Moment(f, rest) for (number, _), f, rest in zip(factors, F, rests, strict=True)}
    halves = {number: total.half for number, total in totals.items() if total.half is not None}
    scaled = dict(zip(halves, torch._foreach_mul(list(halves.values()), share), strict=True)) if halves else {}
    return {number: total.seen(inputs[number], scaled.get(number), share) for number, total in sorted(totals.items())}


def _plus(old: Moment | Tensor | None, new: Moment | Tensor, rank: int) -> Moment | Tensor:
    if old is None:
        return new
    if isinstance(old, Moment) and isinstance(new, Moment):
        return old.narrowed(rank).plus(new.narrowed(rank), rank)
    assert isinstance(old, Tensor)
    assert isinstance(new, Tensor)
    return old + new


def narrow(totals: Collection[Total], rank: int) -> None:
    """Bring the factors of all moments to at most ``2 rank`` columns, in place; those of one size in one go.

    Args:
        totals: Of all parts; parts of a packed weight may share their inputs' moment.
        rank: Columns.
    """
    found: dict[int, Moment] = {}
    for total in totals:
        found |= {id(m): m for m in (total.inputs, total.errors) if isinstance(m, Moment)}
    done = dict(zip(found, all_narrowed(list(found.values()), rank), strict=True))
    for total in totals:
        if isinstance(total.inputs, Moment):
            total.inputs = done[id(total.inputs)]
        if total.errors is not None:
            total.errors = done[id(total.errors)]


def over_ranks(
    totals: Mapping[int, Total], parts: Sequence[Part], wanted: Look, group: ranks.Group
) -> dict[int, Total]:
    """The same sums over all ranks, of which some may not have used a part; the same bits on each."""
    table = torch.zeros(len(parts), 7, dtype=torch.float64, device=parts[0].weight.device if parts else None)
    for number, one in totals.items():
        there = [t is not None for t in (one.inputs, one.errors, one.half, one.whole)]
        table[number] = torch.tensor(
            [one.columns, sum(one.samples.values()), one.missing, *there], dtype=torch.float64, device=table.device
        )
    ranks.sum_([table], group)
    found: dict[int, Total] = {}
    sums: list[Tensor] = []
    moments: list[tuple[Total, str, list[Moment]]] = []  # of each group of a part
    for number, (columns, samples, missing, *there) in enumerate(table.tolist()):
        if not columns and not any(there):
            continue
        part, mine = parts[number], totals.get(number, Total())
        like = part.weight.new_zeros(0, dtype=wanted.dtype)
        groups, o, i = part.shape
        total = found[number] = Total(columns=int(columns), missing=bool(missing), samples={0: int(samples)})
        for name, rows, is_there in (("inputs", i, there[0]), ("errors", o, there[1])):
            old = getattr(mine, name)
            if not is_there:
                continue
            if name == "inputs" and part.kind == "embedding":
                total.inputs = like.new_zeros(1, i) if old is None else old.clone()
                sums.append(total.inputs)
            else:
                empty = Moment.zero(rows, like, wanted.widest)
                each = [empty if old is None else old.map(lambda t, g=g: t[g]) for g in range(groups)]
                moments.append((total, name, each))
        for name, is_there in (("half", there[2]), ("whole", there[3])):
            if is_there:
                old = getattr(mine, name)
                setattr(total, name, like.new_zeros(part.shape) if old is None else old.clone())
                sums.append(getattr(total, name))
    ranks.sum_(sums, group)
    added = iter(ranks.moments([m for *_, each in moments for m in each], wanted.rank, group))
    for total, name, each in moments:
        whole = [m for m in (next(added) for _ in each) if m is not None]
        rest = [m.rest for m in whole if m.rest is not None]
        setattr(total, name, Moment(torch.stack([m.tensor for m in whole]), torch.stack(rest) if rest else None))
    return found
