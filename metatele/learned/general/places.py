"""What the controller is told of where matrices stand in their network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from metatele.learned.general.controller import KINDS
from metatele.learned.general.layout import Layout
from metatele.learned.general.scene import Piece

_FAN_IN = 3.0  # weights of variance 1/(3 i) are what layers begin with


class Places(NamedTuple):
    """Of each matrix and, but for ``natural``, of all vectors, ``[L + 1]``.

    Attributes:
        kinds: Numbers in :data:`~metatele.learned.general.controller.KINDS`.
        aspect: Log of outputs over inputs.
        first: Whether it is the first.
        last: Whether it is the last.
        natural: Size that its fan-in gives, ``[L]``.
    """

    kinds: Tensor
    aspect: Tensor
    first: Tensor
    last: Tensor
    natural: Tensor


def places_of(layout: Layout, pieces: Sequence[Piece], like: Tensor) -> Places:
    """Of all pieces.

    Example:
        >>> import torch
        >>> layout = Layout([(1, 2, 3)], ["dense"], [5])
        >>> places_of(layout, [Piece((1, 2, 3), "conv", False)], torch.zeros(0)).kinds
        tensor([1., 6.])
    """
    kinds, aspect, first, last, natural = (like.new_zeros(layout.matrices + 1) for _ in range(5))
    for number, piece in enumerate(pieces):
        rows, (_, o, i) = layout.rows(number), piece.shape
        kinds[rows] = KINDS.index(piece.kind)
        aspect[rows] = math.log(o / i)
        first[rows], last[rows] = float(number == 0), float(number == len(pieces) - 1)
        natural[rows] = math.sqrt(o / _FAN_IN)
    kinds[-1] = KINDS.index("vectors")
    return Places(kinds, aspect, first, last, natural[:-1])
