"""Second moments of each layer: when a batch is taken in, running averages, and when spectra are made anew.

With S a batch's ``Σ hhᵀ/n`` and ``G = Σ δδᵀ / tr``, the averages are ``A ← (1 - s) A + s S``, where
``s = max((1 - averaging) w, 1/m)``: w is the batch's weight and m the number of batches so far, so an average begins
with equal weights. Of a batch that is the last one again, S itself is taken (s = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.network.use import RANK, TINY, Moment, Use


class LayerMoments(NamedTuple):
    """What is known of the inputs and errors of a layer.

    Attributes:
        inputs: Running average of ``hhᵀ/n``.
        errors: The same of ``δδᵀ``, each divided by its trace.
        input_spectrum: Eigenpairs of the inputs' average as it was when they were due.
        error_spectrum: The same of the errors'.
    """

    inputs: Moment
    errors: Moment
    input_spectrum: Spectrum
    error_spectrum: Spectrum


class Batch(NamedTuple):
    """How a batch counts.

    Attributes:
        share: s, of it in a running average.
        same: Whether it is the last one again.
        averaged: m, batches in the averages with it.
    """

    share: float
    same: bool
    averaged: int


def weight(samples: int, config: EquivariantConfig) -> float:
    """Of a mini-batch in running averages and steps: less than 1 where no batch of meta-training is.

    Example:
        >>> weight(16, EquivariantConfig()), weight(200, EquivariantConfig())
        (0.5, 1.0)
    """
    return min(1.0, samples / config.fewest)


def counted(age: int, averaged: int, same: bool, config: EquivariantConfig) -> int:
    """Batches in the averages after the next one, which begin anew with a batch that comes again.

    Example:
        >>> counted(5, 3, False, EquivariantConfig()), counted(5, 3, True, EquivariantConfig())
        (4, 1)
    """
    return 1 if same or age == 0 or config.averaging == 0 else averaged + 1


def wait(averaged: int, config: EquivariantConfig, pauses: bool = True) -> int:
    """Steps to the controller's next look: one, and ``hold`` after more than ``warm`` batches that differ.

    Example:
        >>> wait(16, EquivariantConfig()), wait(17, EquivariantConfig()), wait(17, EquivariantConfig(), pauses=False)
        (1, 16, 1)
    """
    return config.hold if pauses and averaged > config.warm else 1


def period(sides: Sequence[int], averaged: int, config: EquivariantConfig) -> int:
    """Steps between two spectra of a layer with so many outputs and inputs.

    The work for a spectrum grows with the cube of the width, that for a step with its square; of a width beyond
    ``dense`` it does not grow any more.

    Example:
        >>> config = EquivariantConfig()
        >>> period((64, 64), 1, config), period((64, 64), 100, config), period((256, 64), 1, config)
        (4, 48, 16)
    """
    widest = min(max(sides), config.dense)
    return max(config.slow, config.slow_looks * wait(averaged, config), math.ceil((widest / config.small) ** 2))


def due(age: int, averaged: int, sides: Sequence[int], config: EquivariantConfig, pauses: bool) -> bool:
    """Whether a running average takes in the batch of a step.

    It need not take in every one, fewer of wide layers, whose moments take longest to join. Averages are the same with
    pauses or without.
    """
    young = config.young if max(sides) <= config.dense else config.young_wide
    stay, rest = wait(averaged, config, pauses), wait(averaged, config)
    stride = max(1, min(period(sides, averaged, config) // config.between, config.stride, age // young) // rest) * rest
    return (age - (config.warm if rest > 1 else 0)) % stride < stay


def counts(age: int, averaged: int, same: bool, samples: int, config: EquivariantConfig) -> Batch:
    """How the batch of a step counts: its share of the averages, at least that of equal weights.

    Example:
        >>> config = EquivariantConfig()
        >>> [round(counts(9, m, False, 100, config).share, 3) for m in (1, 9, 40)]
        [0.5, 0.1, 0.05]
        >>> counts(9, 9, True, 100, config).share
        1.0
    """
    number = counted(age, averaged, same, config)
    decay = 0.0 if same or age == 0 else 1 - (1 - config.averaging) * weight(samples, config)
    return Batch(max(1 - decay, 1 / number), same, number)


@torch.no_grad()
def taken_in(
    old: LayerMoments | None, use: Use, batch: Batch, renewed: bool, config: EquivariantConfig
) -> LayerMoments:
    """A layer's moments with those of a batch, where there are any, and spectra of them, where these are due.

    Args:
        old: As they were; ``None`` at the beginning.
        use: What the layer received and got back.
        batch: How it counts.
        renewed: Whether spectra are due.
        config: Of the optimizer.

    Raises:
        ValueError: The first step of a layer without moments.
    """
    if use.inputs is not None and use.errors is not None:
        inputs, errors = use.inputs, normed(use.errors)
        if old is not None and batch.share < 1:
            inputs = averaged(old.inputs, inputs, batch.share, config.rank)
            errors = averaged(old.errors, errors, batch.share, config.rank)
    elif old is None:
        raise ValueError("the first step of a layer needs its moments")
    else:
        inputs, errors = old.inputs, old.errors
    if old is not None and not renewed:
        return LayerMoments(inputs, errors, old.input_spectrum, old.error_spectrum)
    # Moments of the whole data are worth more digits than averages over batches.
    whole = config.whole if batch.same or old is None else config.whole_averaged
    before = (None, None) if old is None else (old.input_spectrum, old.error_spectrum)
    spectra = [
        Spectrum.of(moment, config.keep, last, whole, config.margin)
        for moment, last in zip((inputs, errors), before, strict=True)
    ]
    return LayerMoments(inputs, errors, *spectra)


def normed(moment: Moment) -> Moment:
    """Divided by its trace, as errors are known up to a factor alone.

    Example:
        >>> normed(Moment(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))).tensor
        tensor([[0.7500, 0.0000],
                [0.0000, 0.2500]])
    """
    trace = moment.trace.clamp_min(TINY)
    return Moment(moment.tensor / trace[..., None, None]) if moment.rest is None else moment.scaled(1 / trace)


def averaged(old: Moment, new: Moment, share: float, rank: int = RANK) -> Moment:
    """``(1 - s) A + s S``; of a trajectory where that is not finite, the first of S, A that is.

    Example:
        >>> old, new = Moment(torch.eye(2)), Moment(torch.full((2, 2), math.nan))
        >>> averaged(old, new, 0.1).tensor
        tensor([[1., 0.],
                [0., 1.]])
    """
    mixed = old.mixed(new, share, rank)
    if bool(torch.isfinite(mixed.trace.sum())):
        return mixed
    for candidate in (new, old):  # in place of those that are not finite either
        sound = torch.isfinite(mixed.trace)
        mixed = mixed.where(sound, candidate)
    return mixed


def participation(moments: Sequence[LayerMoments], batch: int) -> tuple[Tensor, Tensor]:
    """Logs of the participations of inputs and errors, each ``[B, layers]``."""
    inputs, errors = (
        torch.stack([s.participation.expand(batch) for s in spectra], -1).log()
        for spectra in ([m.input_spectrum for m in moments], [m.error_spectrum for m in moments])
    )
    return inputs, errors
