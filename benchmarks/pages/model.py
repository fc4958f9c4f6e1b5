"""What a page about a claim is made of, and the rule that decides whether the claim holds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from metatele.intervals import half_width

ROOT = Path(__file__).resolve().parent.parent.parent
Doc = Mapping[str, Any]

PM = "\u00a0±\u00a0"  # never broken over lines
# When a check is met.
ABOVE_0, BELOW_0, BELOW_1 = (f"interval\u00a0{side}" for side in ("above\u00a00", "below\u00a00", "below\u00a01"))
HOLDS, PARTLY, FAILS, OPEN = "holds", "holds partly", "does not hold here", "undecided"


@cache
def stored(name: str) -> Any:
    """A raw result by its place in ``results/``; lines of JSON give a list."""
    path = ROOT / "results" / name
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval.

    Example:
        >>> Interval.of([1.0, 2.0, 3.0]).above(-0.5)
        True
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Interval:
        """By Student's t; a run that diverged makes the mean infinite, so that nothing follows from it."""
        known = [v for v in values if v is not None]
        if len(known) < max(len(values), 2):
            return cls(math.inf, math.inf)
        return cls(statistics.mean(known), half_width(known))

    def below(self, value: float) -> bool:
        """Whether all of it is."""
        return self.mean + self.half < value

    def above(self, value: float) -> bool:
        """Whether all of it is."""
        return self.mean - self.half > value

    def shown(self, digits: int = 4, sign: str = "+") -> str:
        """``+0.1234 ± 0.0012`` in one line; ``sign`` is empty for what is no difference."""
        if not math.isfinite(self.mean):
            return "diverged"
        mean = round(self.mean, digits) or 0.0  # no minus before zero
        return f"{mean:{sign}.{digits}f}{PM}{self.half:.{digits}f}"


def differences(these: Sequence[float | None], those: Sequence[float | None]) -> list[float | None]:
    """Run by run, in the order of the seeds."""
    return [None if a is None or b is None else a - b for a, b in zip(these, those, strict=True)]


def factor(difference: Interval) -> str:
    """A difference of logarithms as a factor with its interval.

    Example:
        >>> factor(Interval(0.0, 0.6931472))
        '1.00 (0.50 to 2.00)'
    """
    if not math.isfinite(difference.mean):
        return "diverged"
    middle, low, high = (math.exp(difference.mean + s * difference.half) for s in (0, -1, 1))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def span(values: Sequence[float], digits: int = 2) -> str:
    """``least to most``, or one number where they are shown alike."""
    low, high = (short(v, digits) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def short(value: float, digits: int = 2) -> str:
    """A number to so many digits, without an exponent where it can be.

    Example:
        >>> short(113.7), short(0.0234), short(2e-13)
        ('110', '0.023', '2e-13')
    """
    return f"{float(f'{value:.{digits}g}'):g}"


def said(text: str, true: bool) -> str:
    """A sentence of which the results must be true; an error if they no longer are."""
    if not true:
        raise ValueError(f"the results no longer say: {text}")
    return text


@dataclass(frozen=True)
class Check:
    """One thing the claim implies, beside what was measured.

    Attributes:
        statement: What should be.
        measured: What is, with its interval.
        needed: When it is met.
        met: Whether it is.
        counted: Whether the verdict depends on it: it tests the claim itself, on the paper's data, with an interval
            where chance plays a part.
        blind: Not met, but the interval has the paper's own value in it: these runs could not have told.
    """

    statement: str
    measured: str
    needed: str
    met: bool
    counted: bool = True
    blind: bool = False


def verdict(checks: Sequence[Check]) -> str:
    """All counted checks met: it holds. Some: partly. None: it does not, or nobody can tell where all are blind."""
    counted = [check for check in checks if check.counted]
    met = [check.met for check in counted]
    if not met:
        raise ValueError("a claim needs a check that counts")
    none = OPEN if all(check.blind for check in counted) else FAILS
    return HOLDS if all(met) else PARTLY if any(met) else none


@dataclass(frozen=True)
class Table:
    """A table with a line above it.

    Attributes:
        title: The line.
        head: Names of the columns.
        rows: Their cells.
        numbers: Whether all columns but the first are numbers, and set to the right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True

    def shown(self) -> str:
        """As Markdown."""
        side = "--:|" if self.numbers else ":--|"
        lines = ["| " + " | ".join(self.head) + " |", "|:--|" + side * (len(self.head) - 1)]
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"{self.title}: {len(row)} cells in a row of {len(self.head)}")
            lines.append("| " + " | ".join(row) + " |")
        lines = [line.replace("|  |", "| |").replace("|  |", "| |") for line in lines]
        return "\n".join(([self.title, ""] if self.title else []) + lines)


@dataclass(frozen=True)
class Outcome:
    """What the raw results say about a claim.

    Attributes:
        answer: The verdict in a sentence or two, with the number that matters.
        number: The same in a few words, for the overview.
        checks: What the verdict is made of.
        tables: More numbers.
        limits: Where it loses, and what the numbers do not show.
    """

    answer: str
    number: str
    checks: Sequence[Check]
    tables: Sequence[Table] = ()
    limits: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        slug: Of its page.
        title: Of its page, and its name in the overview.
        place: Where the paper makes it.
        says: The claim in one sentence.
        setting: What was run to test it.
        sources: Raw results, in ``results/``.
        figure: The picture in ``results/``, and what it shows.
        rebuild: Commands that make the raw results again.
        read: From raw results to what they say.
        more: Where to read on, as Markdown.
    """

    slug: str
    title: str
    place: str
    says: str
    setting: str
    sources: Sequence[str]
    figure: tuple[str, str]
    rebuild: str
    read: Callable[[], Outcome]
    more: str = ""
    extra: Sequence[Callable[[], str]] = field(default=())
