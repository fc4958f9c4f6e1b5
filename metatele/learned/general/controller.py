"""The controller: what it sees of each matrix and what it sets, each declared once.

One function, the same for every matrix, reads the numbers of :data:`SEEN` and gives those of :data:`SET`. None
depends on the units of the loss, nor on the order of hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.random import generator

AGREEMENT = "agreement of half batches, of the whole network"
LOOKED_UP = "whether it is of kind embedding"
KNOWN = "share of samples seen before"
DEPTH = "log of the depth"
CLOCK = "log of steps so far"
KINDS = ("linear", "conv", "attention", "embedding", "recurrent", "unseen", "vectors")


class Sight(NamedTuple):
    """What the controller's numbers are made of; of each matrix ``[L]``, or one number for all.

    Attributes:
        slope: z, the mean slope along the last step over its root mean square.
        slope_long: The same over ten times as many steps.
        agreement: Of the gradients of a batch's halves, ``[L]``, from 0, noise, to 1.
        agreement_all: The same of the whole network.
        momentum: Norm of the running gradient over the usual one of gradients, ``[L]``.
        length: Log of the step length over the first.
        grown: Log of the size of a matrix over that at the beginning, ``[L]``.
        known: Share of the batch's samples that were seen before.
        epochs: Passes through the data so far, as far as can be told; 0 if no sample came again.
        age: Steps so far.
        progress: Share of the run that is done; negative where its length is not known.
        same: Whether the batch is the last one again.
        samples: Of a batch.
        parameters: Of the network.
        fallen: Log of the loss over the first one; 0 where it is not known.
        positions: For each sample, ``[L]``.
        aspect: Log of outputs over inputs, ``[L]``.
        depth: Layers of the network.
        first: Whether a matrix is the first, ``[L]``.
        last: Whether it is the last.
        kinds: Numbers in :data:`KINDS`, ``[L]``.
    """

    slope: Tensor | float
    slope_long: Tensor | float
    agreement: Tensor
    agreement_all: Tensor
    momentum: Tensor
    length: Tensor | float
    grown: Tensor
    known: float
    epochs: float
    age: int
    progress: float
    same: bool
    samples: int
    parameters: int
    fallen: Tensor
    positions: Tensor
    aspect: Tensor
    depth: int
    first: Tensor
    last: Tensor
    kinds: Tensor


class Measure(NamedTuple):
    """A number that the controller reads.

    Attributes:
        name: What it is.
        sense: Its kind, by which it may be hidden (``blind`` of the configuration).
        least: Of what is read.
        most: The same.
        formula: About as large as 1.
    """

    name: str
    sense: str
    least: float
    most: float
    formula: Callable[[Sight], Tensor | float]


def _logs(x: float) -> float:
    return math.log(max(x, 1.0))


def _is_of(kind: int) -> Callable[[Sight], Tensor]:
    return lambda s: (s.kinds == kind).to(s.kinds.dtype)


SEEN: tuple[Measure, ...] = (
    Measure("slope along the last step, over its noise", "feedback", -1, 1, lambda s: s.slope),
    Measure("the same over ten times as long", "feedback", -2, 2, lambda s: 3 * s.slope_long),
    Measure("agreement of half batches", "noise", 0, 1, lambda s: s.agreement),
    Measure(AGREEMENT, "noise", 0, 1, lambda s: s.agreement_all),
    Measure("log of momentum over usual gradients", "noise", -2, 0.5, lambda s: s.momentum.clamp_min(1e-8).log() / 2),
    Measure("log of the step length over the first", "sizes", -2, 1, lambda s: s.length / 3),
    Measure("log of the size over the first", "sizes", -2, 2, lambda s: s.grown),
    Measure(KNOWN, "repeats", 0, 1, lambda s: s.known),
    Measure("log of passes through the data", "repeats", 0, 2, lambda s: _logs(1 + s.epochs) / 2),
    Measure("whether the batch is the last one again", "repeats", 0, 1, lambda s: float(s.same)),
    Measure("log of samples seen, for each parameter", "data", -2, 2, lambda s: (_ratio(s)) / 4),
    Measure("log of the batch", "data", 0, 2, lambda s: _logs(s.samples) / 4),
    Measure(CLOCK, "clock", 0, 2, lambda s: _logs(1 + s.age) / 5),
    Measure("progress through the run", "clock", 0, 1, lambda s: max(s.progress, 0.0)),
    Measure("whether the run's length is known", "clock", 0, 1, lambda s: float(s.progress >= 0)),
    Measure("log of the loss over the first", "loss", -3, 1, lambda s: s.fallen / 3),
    Measure("log of positions for each sample", "place", 0, 2, lambda s: s.positions.clamp_min(1).log() / 4),
    Measure("log of outputs over inputs", "place", -2, 2, lambda s: s.aspect / 3),
    Measure(DEPTH, "place", 0, 1.5, lambda s: _logs(s.depth) / 3),
    Measure("whether it is the first", "place", 0, 1, lambda s: s.first),
    Measure("whether it is the last", "place", 0, 1, lambda s: s.last),
    *(Measure(f"whether it is of kind {kind}", "place", 0, 1, _is_of(k)) for k, kind in enumerate(KINDS[1:], 1)),
)


def _ratio(s: Sight) -> float:
    return math.log(max(s.samples, 1) * (s.age + 1) / max(s.parameters, 1))


class Controls(NamedTuple):
    """What is set; ``[L]`` of each matrix, ``[]`` of all.

    Attributes:
        stretch: Factor on the length of a matrix's step.
        decay: w, weight decay by a step, relative to its length.
        damping: λ.
        spectral: r, from 0 (whitened) to 1 (msign).
        anneal: p, how far the length follows the momentum's norm down.
        longest: η_max, longest step relative to a matrix, ``[]``.
        target: τ, the slope that is aimed at, ``[]``.
        gain: How fast the length follows it, ``[]``.
    """

    stretch: Tensor
    decay: Tensor
    damping: Tensor
    spectral: Tensor
    anneal: Tensor
    longest: Tensor
    target: Tensor
    gain: Tensor


class Setting(NamedTuple):
    """A number that the controller sets: ``bend(begin + unit · asked)``, what is asked for within bounds.

    Attributes:
        name: In :class:`Controls`.
        joint: Whether it is one for all, by the mean of what the matrices ask for.
        begin: Where it begins, before it is bent.
        unit: Of what is asked for, so that it is about as large for all.
        least: Of ``unit · asked``.
        most: The same.
        bend: To the control.
        first: What is asked for at first for each unit of what is seen, by its name.
    """

    name: str
    joint: bool
    begin: float
    unit: float
    least: float
    most: float
    bend: Callable[[Tensor], Tensor]
    first: Mapping[str, float] = MappingProxyType({})


SET: tuple[Setting, ...] = (
    Setting("stretch", False, 0.0, 0.5, -3.0, 2.0, torch.exp, {LOOKED_UP: -0.6}),
    Setting("decay", False, math.log(0.09), 1.5, -4.0, 4.0, torch.exp),
    Setting("damping", False, math.log(5.0), 1.5, -9.0, 3.0, torch.exp),
    Setting("spectral", False, 7.5, 2.0, -15.0, 3.0, torch.sigmoid, {AGREEMENT: -3.0, KNOWN: -2.25}),
    Setting("anneal", False, 0.2, 0.3, -0.5, 1.0, lambda x: x),
    Setting("longest", True, math.log(0.06), 0.5, -3.0, 2.0, torch.exp),
    Setting("target", True, -0.3, 0.2, -0.5, 0.8, lambda x: x, {DEPTH: 4.0}),
    Setting("gain", True, math.log(0.18), 0.5, -3.0, 2.0, torch.exp, {CLOCK: -3.7}),
)


class Controller(nn.Module):
    """What is asked for: linear in what is seen, and, with a hidden layer, more than that.

    Args:
        hidden: Size of a hidden layer; 0 for none.
        blind: Senses that are hidden from it.
        seed: Of its first weights. Its outputs begin at zero, where each setting is as :data:`SET` begins it.

    Example:
        >>> controller = Controller(4)
        >>> sum(p.numel() for p in controller.parameters()) < 1000
        True

    Attributes:
        noted: What was seen, a mean over matrices ``[numbers]`` for each call; ``None`` where nobody asks.
    """

    visible: Tensor
    lowest: Tensor
    highest: Tensor
    least: Tensor
    most: Tensor
    begin: Tensor
    unit: Tensor
    joint: Tensor

    def __init__(self, hidden: int, blind: tuple[str, ...] = (), seed: int = 0) -> None:
        super().__init__()
        random = generator(seed, "initialisation")
        n, k = len(SEEN), len(SET)
        self.inner = nn.Parameter(torch.randn(hidden, n, generator=random) / n**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(k, hidden))
        direct = torch.zeros(k, n)
        names = [m.name for m in SEEN]
        for row, setting in enumerate(SET):
            for name, value in setting.first.items():
                direct[row, names.index(name)] = value
        self.direct = nn.Parameter(direct)
        self.offset = nn.Parameter(torch.zeros(k))
        self.noted: list[Tensor] | None = None
        self.register_buffer("visible", torch.tensor([float(m.sense not in blind) for m in SEEN]), persistent=False)
        self.register_buffer("lowest", torch.tensor([float(m.least) for m in SEEN]), persistent=False)
        self.register_buffer("highest", torch.tensor([float(m.most) for m in SEEN]), persistent=False)
        self.register_buffer("unit", torch.tensor([s.unit for s in SET]), persistent=False)
        self.register_buffer("joint", torch.tensor([s.joint for s in SET]), persistent=False)
        self.register_buffer("least", torch.tensor([s.least for s in SET]), persistent=False)
        self.register_buffer("most", torch.tensor([s.most for s in SET]), persistent=False)
        self.register_buffer("begin", torch.tensor([s.begin for s in SET]), persistent=False)

    def seen(self, sight: Sight) -> Tensor:
        """The numbers that are read, ``[L, numbers]``."""
        like = sight.positions
        values = dict(enumerate(m.formula(sight) for m in SEEN))
        tensors = {n: value.to(like).expand_as(like) for n, value in values.items() if isinstance(value, Tensor)}
        # Numbers of the host go to the device together.
        seen = like.new_tensor([0.0 if n in tensors else float(value) for n, value in values.items()])
        seen = seen.repeat(len(like), 1)
        seen[:, list(tensors)] = torch.stack(list(tensors.values()), -1)
        seen = torch.maximum(torch.minimum(seen, self.highest), self.lowest)
        return seen.nan_to_num(0.0, 0.0, 0.0) * self.visible

    def forward(self, sight: Sight) -> Controls:
        """What it sets."""
        numbers = self.seen(sight)
        if self.noted is not None:
            self.noted.append(numbers.mean(0))
        asked = numbers @ self.direct.T + self.offset
        if self.outer.numel():
            asked = asked + torch.tanh(numbers @ self.inner.T + self.inner_bias) @ self.outer.T
        asked = torch.where(self.joint, asked.mean(0, keepdim=True), asked) * self.unit
        # Bounds are reached smoothly: near the beginning they hardly bend what is asked for.
        below, above = self.least * torch.tanh(asked / self.least), self.most * torch.tanh(asked / self.most)
        asked = torch.where(asked < 0, below, above)
        values = (self.begin + asked).unbind(-1)
        return Controls(*(s.bend(v[0] if s.joint else v) for s, v in zip(SET, values, strict=True)))
