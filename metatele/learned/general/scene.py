"""What is known of a network beforehand, and what a look shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from metatele.network.use import Moment


class Piece(NamedTuple):
    """What is known of a matrix-shaped piece beforehand.

    Attributes:
        shape: ``(g, o, i)``.
        kind: One of the controller's kinds.
        diagonal: Its inputs are look-ups, whose second moments are a diagonal.
    """

    shape: tuple[int, int, int]
    kind: str
    diagonal: bool


class Glimpse(NamedTuple):
    """What a look shows of a piece.

    Attributes:
        inputs: ``Σ hhᵀ/n``, or its diagonal ``[1, i]``; ``None`` if that is not known.
        half: Gradient of the first half of the batch, ``[g, o, i]``.
        columns: n.
        positions: For each sample.
    """

    inputs: Moment | Tensor | None
    half: Tensor | None
    columns: int
    positions: float


class Scene(NamedTuple):
    """What a look shows of the network.

    Attributes:
        pieces: Of those that were seen, by number.
        sizes: ``‖W‖`` of all matrices, ``[L]``.
        vectors: Root mean square of each vector, ``[V]``.
        samples: Of the batch.
        known: How many of them, of those that could be compared, were seen before: ``(known, compared, remembered)``.
        loss: Log of the loss up to a constant, ``[]``; ``None`` if it is not known.
        progress: Share of the run that is done; negative if not known.
        same: Whether the batch is the last one again.
    """

    pieces: Mapping[int, Glimpse]
    sizes: Tensor
    vectors: Tensor
    samples: int
    known: tuple[int, int, int]
    loss: Tensor | None
    progress: float
    same: bool
