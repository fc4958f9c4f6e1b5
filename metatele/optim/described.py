"""How each parameter of a model is stepped, as a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from metatele.network.watch import Watch


class Row(NamedTuple):
    """A parameter, or a piece of one.

    Attributes:
        name: Of it.
        shape: As it is stepped: of a matrix ``(groups, o, i)``, a bias with it as last column.
        how: It is stepped.
        why: That is so, or why not otherwise.
        parameters: In it.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    why: str
    parameters: tuple[nn.Parameter, ...] = ()


def rows_of(
    watch: Watch, moments: Sequence[bool] | None, by_gradient: Collection[int], once: Sequence[bool]
) -> list[Row]:
    """How the general family steps a module.

    Args:
        watch: What its passes showed.
        moments: Whether there are moments for each part; ``None`` before the first step.
        by_gradient: Numbers of the parts whose moments are of their gradients.
        once: Whether each is stepped as on one batch that comes again.
    """
    found = []
    for number, (part, (name, shape, kind, why)) in enumerate(zip(watch.parts, watch.table(), strict=False)):
        if moments is None and kind == "unseen":
            how, why = "by moments of its gradient, unless passes show more", "its layer is of no known type"
        elif moments is None:
            how, why = f"{kind}, by its inputs", "by the type of its layer: no step was made"
        elif number in by_gradient:
            how = "by moments of its gradient"
        else:
            how = f"{kind}: {'inputs seen' if moments[number] else 'nothing was seen yet'}"
        owners = (part.weight,) if part.bias is None else (part.weight, part.bias)
        found.append(Row(name, shape, how + ", on one batch" * once[number], why, owners))
    for name, p in watch.vectors:
        found.append(Row(name, tuple(p.shape), "vector", "no matrix: by squares of its gradient", (p,)))
    return found


@dataclass(frozen=True)
class Description:
    """Prints as a table.

    Attributes:
        rows: One for each parameter, or piece of one.
        note: What is to be said of all.

    Example:
        >>> print(Description((Row("weight", (1, 2, 3), "linear: inputs seen", ""),)))
        parameter  shape      stepped as           why
        weight     (1, 2, 3)  linear: inputs seen
    """

    rows: tuple[Row, ...]
    note: str = ""

    def __str__(self) -> str:
        cells = [("parameter", "shape", "stepped as", "why")]
        cells += [(row.name, str(row.shape), row.how, row.why) for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    __repr__ = __str__


def described(rows: Sequence[Row], rates: dict[int, float], begun: bool, note: str = "") -> Description:
    """Rows of a family, with what does not move.

    Args:
        rows: As if all did.
        rates: Of each parameter that is in a group, by its ``id``.
        begun: Whether a step was made.
        note: What is to be said of all.
    """
    found = []
    for row in rows:
        how, why = _still(row, rates)
        found.append(row._replace(how=how, why=why))
    note = note if begun else "No step was made yet: after the first one the table says what the passes showed."
    return Description(tuple(found), note)


def _still(row: Row, rates: dict[int, float]) -> tuple[str, str]:
    """How and why, where nothing or a part of it moves."""
    reasons = [_reason(p, rates) for p in row.parameters]
    if reasons and all(reasons):
        return reasons[0], "it does not move"
    if any(reasons):
        kept = next((reason, number) for number, reason in enumerate(reasons) if reason)
        return f"{row.how} ({'bias' if kept[1] else 'weight'} {kept[0]})", row.why
    return row.how, row.why


def _reason(p: nn.Parameter, rates: dict[int, float]) -> str:
    if id(p) not in rates:
        return "in no group"
    if not p.requires_grad:
        return "frozen"
    return "" if rates[id(p)] else "lr is 0"
