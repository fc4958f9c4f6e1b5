"""Synthetic images: gratings, shapes, blobs and prototypes, in noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from metatele.tasks.modules.data import Data, flipped
from metatele.tasks.modules.draws import Draws, seeded

MOTIFS = ("gratings", "shapes", "blobs")
_SHAPES = 8
_STYLES = 3  # prototypes of a class


@dataclass(frozen=True)
class Images:
    """Images of one motif, with a class for each or a number; or with themselves as target.

    Attributes:
        motif: ``"gratings"`` (the class is their orientation), ``"shapes"`` (which of eight), ``"blobs"`` (how
            many), or ``"prototypes"`` (which of a few smooth images of its class, moved and mixed, as of digits).
        size: Pixels of a side.
        channels: Of colour.
        outputs: Classes; or pixels, for ``target`` ``"itself"``; or 2, for ``"place"``.
        target: ``"class"``, ``"place"`` (of what is shown) or ``"itself"`` (for autoencoders, whose inputs are flat).
        loss: By which an output is judged.
        noise: Standard deviation of a pixel's noise, where motifs have about 0.5.
        flips: Share of classes that are drawn anew.
        honest: Whether held-out classes are not.
        brightest: 1, or 255 for inputs as files have them.
        seed: Of the prototypes.

    Example:
        >>> images = Images("shapes", 8, 1, 4, "class", "ce", 0.1, 0.0, True, 1.0)
        >>> images.draw(3, torch.Generator().manual_seed(0)).inputs.shape
        torch.Size([3, 1, 8, 8])
    """

    motif: str
    size: int
    channels: int
    outputs: int
    target: str
    loss: str
    noise: float
    flips: float
    honest: bool
    brightest: float
    seed: int = 0

    tokens = 0
    positions = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        image = (self.channels, self.size, self.size)
        return (math.prod(image),) if self.target == "itself" else image

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """New samples."""
        kinds = _SHAPES if self.target != "class" else self.outputs
        labels = torch.randint(kinds, (count,), generator=generator)
        place = 0.6 * (2 * torch.rand(count, 2, generator=generator) - 1)
        drawn = self._drawn(labels, place, generator)
        colour = 0.3 + 0.7 * torch.rand(count, self.channels, 1, 1, generator=generator)
        images = colour * drawn[:, None]
        seen = images + self.noise * torch.randn(images.shape, generator=generator)
        seen = self.brightest * (seen.clamp(0, 1) if self.brightest > 1 else seen)
        if self.target == "itself":
            whole = images.clamp(0, 1).flatten(1) if self.loss == "bce" else (seen / self.brightest).flatten(1)
            return Data(seen.flatten(1), whole)
        if self.target == "place":
            return Data(seen, place)
        return Data(seen, labels if clean and self.honest else flipped(labels, self.outputs, self.flips, generator))

    @cached_property
    def _prototypes(self) -> Tensor:
        """``[classes, styles, size, size]``, from 0 to 1; those of one class are alike."""
        g = seeded(self.seed)
        coarse = torch.randn(self.outputs, 1, 5, 5, generator=g) + 0.6 * torch.randn(
            self.outputs, _STYLES, 5, 5, generator=g
        )
        smooth = F.interpolate(coarse, size=(self.size, self.size), mode="bicubic", align_corners=True)
        return (2.5 * smooth - 1).sigmoid()

    def _moved(self, labels: Tensor, place: Tensor, u: Tensor) -> Tensor:
        """Prototypes of classes, each between two styles, moved by up to a tenth of their size."""
        styles = self._prototypes[labels]
        share = u[:, 0, 0] * (_STYLES - 1)
        low = share.long().clamp(max=_STYLES - 2)
        rows, between = torch.arange(len(labels)), (share - low)[:, None, None]
        mixed = (1 - between) * styles[rows, low] + between * styles[rows, low + 1]
        move = torch.cat([torch.eye(2).expand(len(labels), 2, 2), place[:, :, None] / 3], -1)
        grid = F.affine_grid(move, [len(labels), 1, self.size, self.size], align_corners=False)
        return F.grid_sample(mixed[:, None], grid, padding_mode="border", align_corners=False)[:, 0]

    def _drawn(self, labels: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness from 0 to 1, ``[n, size, size]``."""
        count, axis = len(labels), torch.linspace(-1, 1, self.size)
        row, column = axis[None, :, None], axis[None, None, :]
        y, x = row - place[:, :1, None], column - place[:, 1:, None]
        u = torch.rand(count, 1, 1, generator=generator)
        if self.motif == "gratings":
            angle = math.pi * (labels[:, None, None] + 0.5 * u) / max(self.outputs, 2)
            wave = 2 * math.pi * (angle.cos() * x + angle.sin() * y) * (1 + u)
            return 0.5 + 0.5 * wave.sin()
        if self.motif == "prototypes":
            return self._moved(labels, place, u)
        if self.motif == "blobs":
            most = int(labels.max()) + 1
            centres = 1.6 * torch.rand(count, most, 2, generator=generator) - 0.8
            shown = (torch.arange(most) <= labels[:, None]).float()
            squares = (row[:, None] - centres[..., :1, None]) ** 2 + (column[:, None] - centres[..., 1:, None]) ** 2
            return ((-squares / 0.04).exp() * shown[..., None, None]).sum(1).clamp(max=1)
        r, side = 0.3 + 0.25 * u, (x.abs(), y.abs())
        square, disc = torch.maximum(*side), (x * x + y * y).sqrt()
        thin = r / 3
        shapes = torch.stack(
            [
                square < r,
                disc < r,
                (torch.minimum(*side) < thin) & (square < r),
                (disc < r) & (disc > r - 0.2),
                side[0] + side[1] < r,
                (side[1] < thin) & (side[0] < r),
                (side[0] < thin) & (side[1] < r),
                ((x - y).abs() < thin) & (square < r),
            ],
            1,
        )
        return shapes[torch.arange(count), labels % _SHAPES].float()


def drawn_prototypes(draws: Draws) -> Images:
    """A small set of images whose classes have a structure of their own, as digits or clothes have."""
    size, channels, classes = draws.choice((8, 8, 12, 16)), draws.choice((1, 1, 3)), draws.choice((5, 10, 10))
    noise, flips = draws.choice((0.05, 0.1, 0.2, 0.4)), draws.choice((0.0, 0.0, 0.0, draws.uniform(0, 0.3)))
    loss, brightest = draws.choice(("ce", "ce", "ce", "smoothed")), draws.choice((1.0, 1.0, 1.0, 1.0, 255.0))
    honest = draws.chance(0.5)
    return Images("prototypes", size, channels, classes, "class", loss, noise, flips, honest, brightest, draws.seed())


def drawn_images(draws: Draws, kind: str) -> Images:
    """Images for ``"images"`` (a class or a place) or for an ``"autoencoder"``."""
    size, channels = draws.choice((8, 8, 10, 12, 16)), draws.choice((1, 1, 3))
    motif = draws.choice(MOTIFS)
    noise, brightest = draws.choice((0.05, 0.2, 0.5, 1.0)), draws.choice((1.0, 1.0, 1.0, 1.0, 255.0))
    if kind == "autoencoder":
        loss = draws.choice(("mse", "bce"))
        return Images(motif, size, 1, size * size, "itself", loss, min(noise, 0.2), 0.0, True, 1.0)
    if motif == "shapes" and draws.chance(0.2):
        return Images(motif, size, channels, 2, "place", "mse", noise, 0.0, True, brightest)
    classes = draws.choice({"gratings": (2, 4, 8, 10), "shapes": (2, 4, 8, 8), "blobs": (2, 3, 4)}[motif])
    flips = draws.choice((0.0, 0.0, 0.1, draws.uniform(0, 0.6)))
    loss = draws.choice(("ce", "ce", "ce", "smoothed"))
    return Images(motif, size, channels, classes, "class", loss, noise, flips, draws.chance(0.3), brightest)
