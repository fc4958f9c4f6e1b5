"""How the matrices and vectors of a network lie in one flat tensor, those of one shape side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

WAYS = ("dense", "factor", "diagonal")  # how the second moments of a matrix's inputs are kept


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape, one behind the other.

    Attributes:
        shape: ``(m, o, i)``.
        begin: Of its numbers in the flat tensor.
        first: Number of its first matrix among all.
        parts: Numbers of the parts that the matrices are of.
        way: How second moments of their inputs are kept: one of :data:`WAYS`.
    """

    shape: tuple[int, int, int]
    begin: int
    first: int
    parts: tuple[int, ...]
    way: str

    @property
    def rows(self) -> slice:
        """Its matrices among all."""
        return slice(self.first, self.first + self.shape[0])

    def of(self, flat: Tensor) -> Tensor:
        """Its matrices ``[m, o, i]``, a view."""
        m, o, i = self.shape
        return flat[self.begin : self.begin + m * o * i].view(m, o, i)


class Layout:
    """Parts ``[g, o, i]`` and vectors in one flat tensor.

    Args:
        shapes: Of the parts.
        ways: Of each, how the second moments of its inputs are kept.
        sizes: Of the vectors.

    Attributes:
        buckets: Parts of one shape and way, which are stepped together.
        matrices: Number of matrices.
        vectors: Where the vectors begin.
        size: Of the flat tensor.

    Example:
        >>> import torch
        >>> layout = Layout([(1, 2, 3), (1, 4, 4), (2, 2, 3)], ["dense"] * 3, [5])
        >>> [(bucket.shape, bucket.parts) for bucket in layout.buckets], layout.size
        ([((3, 2, 3), (0, 2)), ((1, 4, 4), (1,))], 39)
        >>> layout.part(torch.arange(39.0), 2).shape
        torch.Size([2, 2, 3])
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], ways: Sequence[str], sizes: Sequence[int]) -> None:
        self.shapes, self.ways, self.sizes = list(shapes), list(ways), list(sizes)
        kinds: dict[tuple[int, int, str], list[int]] = {}
        for number, ((_, o, i), way) in enumerate(zip(shapes, ways, strict=True)):
            kinds.setdefault((o, i, way), []).append(number)
        self.buckets: list[Bucket] = []
        self._begin: dict[int, int] = {}
        self._rows: dict[int, slice] = {}
        begin = first = 0
        for (o, i, way), parts in kinds.items():
            m = sum(shapes[number][0] for number in parts)
            self.buckets.append(Bucket((m, o, i), begin, first, tuple(parts), way))
            for number in parts:
                g = shapes[number][0]
                self._begin[number], self._rows[number] = begin, slice(first, first + g)
                begin, first = begin + g * o * i, first + g
        self.matrices, self.vectors, self.size = first, begin, begin + sum(sizes)

    def part(self, flat: Tensor, number: int) -> Tensor:
        """The matrices ``[g, o, i]`` of a part, a view."""
        g, o, i = self.shapes[number]
        begin = self._begin[number]
        return flat[begin : begin + g * o * i].view(g, o, i)

    def rows(self, number: int) -> slice:
        """The matrices of a part among all."""
        return self._rows[number]

    def vector_parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The vectors, views."""
        return flat[self.vectors :].split(self.sizes)
