"""The controller: what it sees of each layer and what it sets, each declared once.

One LSTM, the same for every layer, reads the numbers of :data:`SEEN` and the mean of the layers' memories, and gives
the numbers of :data:`SET`. None depends on the units of the loss, nor on the order of hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.observation import inner
from metatele.learned.equivariant.states import Bend, EquivariantStates
from metatele.learned.lstm import LSTMState, StackedLSTM
from metatele.network.use import TINY, Use

# Two guards whose values do not matter: what is made of them lies beyond the bounds of what the controller reads.
GROWN = 40.0  # change of the log of a loss that is not finite
LEAST = 0.1  # of 1 less a quotient of slopes, so that its logarithm is finite where no minimum lies ahead


def log(x: Tensor) -> Tensor:
    """``log x``, elementwise; -87.5 at zero and below, so that no derivative is infinite.

    Example:
        >>> log(torch.tensor([0.0, 1.0])).round(decimals=1)
        tensor([-87.5000,   0.0000])
    """
    return x.clamp_min(TINY).log()


class Close(NamedTuple):
    """What is read of a point where the controller looks, or will at the next step; each number ``[B, layers]``.

    Attributes:
        gradients: ``∂L/∂W`` of each layer; those that are not finite count as zero.
        length: ``log ‖∇W‖²``.
        ahead: ``⟨∇W, V⟩``.
        along: ``⟨∇W, D⟩`` with D of the step before.
    """

    gradients: list[Tensor]
    length: Tensor
    ahead: Tensor
    along: Tensor

    @staticmethod
    @torch.no_grad()
    def of(gradients: list[Tensor], states: EquivariantStates) -> Close:
        """At the point that a step is made from.

        Args:
            gradients: ``∂L/∂W`` of each layer, ``[B, o, i]``.
            states: Memories before the step: V and D.
        """
        length = inner(gradients, gradients)
        if not bool(torch.isfinite(length).all()):
            gradients = sound(gradients)
            length = inner(gradients, gradients)
        velocity, direction = states.motion
        return Close(gradients, log(length), inner(gradients, velocity), inner(gradients, direction))


def sound(gradients: Sequence[Tensor]) -> list[Tensor]:
    """With zeros in place of what is not finite."""
    return [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in gradients]


class Sight(NamedTuple):
    """What the controller's numbers are made of.

    Attributes:
        states: Before the step.
        close: Gradients, and how they lie to the last step.
        ahead: ``⟨∇W, last change⟩``, ``[B, layers]``.
        size: Log of the last change's ``‖·‖²``.
        weights: ``‖W‖²``, ``[B, layers]``.
        now: Log of the loss, ``[B]``.
        same: Whether the batch is the last one.
        ratios: Columns of each layer's inputs, over rows.
    """

    states: EquivariantStates
    close: Close
    ahead: Tensor
    size: Tensor
    weights: Tensor
    now: Tensor
    same: bool
    ratios: list[float]

    @staticmethod
    def of(
        states: EquivariantStates, close: Close, uses: Sequence[Use], weights: Tensor, now: Tensor, same: bool
    ) -> Sight:
        """From what a step knows.

        Args:
            states: Memories before the step.
            close: Its gradients.
            uses: What every layer received and got back.
            weights: ``‖W‖²`` of each layer, ``[B, layers]``.
            now: Log of the loss, ``[B]``.
            same: Whether the batch is the last one.
        """
        a, b = states.last
        ratios = [use.columns / g.shape[-1] for use, g in zip(uses, close.gradients, strict=True)]
        ahead = a * close.ahead + b * close.along
        return Sight(states, close, ahead, log(states.measured.squares), weights, now, same, ratios)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.ratios)

    def of_all(self, number: Tensor) -> Tensor:
        """A number ``[B]`` about the network, for each of its layers."""
        return number[:, None].expand(-1, self.layers)

    def since(self, then: Tensor) -> Tensor:
        """Change of the log of the loss; one that is not finite has grown."""
        return self.of_all((self.now - then).nan_to_num(GROWN, GROWN, GROWN))

    def cosine(self) -> Tensor:
        """Of the gradient and the last change."""
        return self.ahead / ((self.close.length + self.size) / 2).exp().clamp_min(TINY)


def best(after: Tensor, before: Tensor) -> Tensor:
    """Log of where a parabola has its minimum, from its slopes at 1 and at 0; large if it has none ahead.

    Example:
        >>> best(torch.tensor(-0.5), torch.tensor(-1.0)).exp()
        tensor(2.)
    """
    return -(1 - after / torch.where(before == 0, TINY, before)).clamp_min(LEAST).log()


class Measure(NamedTuple):
    """A number that the controller reads, measured of each trajectory and layer.

    Attributes:
        name: What it is.
        sense: Its kind, by which it may be hidden (``blind`` of the configuration).
        factor: It is multiplied by this, and then kept between the next two, so that all are about as large as 1.
        least: Of what is read.
        largest: The same.
        formula: ``[B, layers]``.
    """

    name: str
    sense: str
    factor: float
    least: float
    largest: float
    formula: Callable[[Sight], Tensor]


class Fact(NamedTuple):
    """A number that the controller reads which is known without measuring.

    Attributes:
        name: What it is.
        sense: Its kind.
        formula: Of the sight and the layer's number.
    """

    name: str
    sense: str
    formula: Callable[[Sight, int], float]


SEEN: tuple[Measure | Fact, ...] = (
    Measure(
        "log of the best length of the last direction, in units of its own, as slopes tell",
        *("slopes", 1.0, -2.0, 2.0),
        lambda s: best(s.close.along, s.states.measured.slope),
    ),
    Measure(
        "the same of the whole last change",
        *("slopes", 1.0, -2.0, 2.0),
        lambda s: s.of_all(best(s.ahead.sum(-1), s.states.predicted)),
    ),
    Measure("cosine of gradient and last change", "cosine", 1.0, -1.0, 1.0, Sight.cosine),
    Measure("change of the log of the loss", "loss", 1.0, -3.0, 3.0, lambda s: s.since(s.states.level.kept)),
    Measure("the same since the beginning", "loss", 1 / 8, -5.0, 1.25, lambda s: s.since(s.states.level.start)),
    Measure("log of the inputs' participation", "spectra", 1 / 2, -5.0, 0.0, lambda s: s.states.spread.inputs),
    Measure("log of the errors' participation", "spectra", 1 / 2, -5.0, 0.0, lambda s: s.states.spread.errors),
    Measure(
        "log of the last change, relative to the weights",
        *("sizes", 1 / 4, -5.0, 0.75),
        lambda s: (s.size - log(s.weights)) / 2,
    ),
    Measure(
        "log of the relative change of pre-activations by it",
        *("sizes", 1 / 4, -5.0, 1.25),
        lambda s: s.states.measured.reach,
    ),
    Measure(
        "change of the log of the gradient's norm",
        *("sizes", 1 / 2, -2.5, 2.5),
        lambda s: (s.close.length - s.states.measured.length) / 2,
    ),
    Fact("log of the age", "clock", lambda s, layer: math.log(s.states.age + 1) / 3),
    Fact("whether the batch is the last one", "data", lambda s, layer: float(s.same)),
    Fact("log of samples over inputs", "data", lambda s, layer: math.log(s.ratios[layer]) / 2),
    Fact("whether it is the first layer", "place", lambda s, layer: float(layer == 0)),
    Fact("whether it is the last one", "place", lambda s, layer: float(layer == s.layers - 1)),
    Fact("number of layers", "place", lambda s, layer: s.layers - 3.0),
)
MEASURES = tuple(m for m in SEEN if isinstance(m, Measure))
FACTS = tuple(f for f in SEEN if isinstance(f, Fact))  # which follow the measures


class Output(NamedTuple):
    """A number that the controller sets: ``middle + half tanh((y + offset)/2)`` of what the LSTM gives.

    Attributes:
        name: What it is.
        offset: Where an untrained controller begins.
        half: Half of its range.
        middle: Of its range.
    """

    name: str
    offset: float
    half: float
    middle: float


SET = (
    Output("growth: change of the log of the step size", 0.0, 2.0, 0.0),
    Output("log of the inputs' damping", 0.7, 9.0, -5.3),
    Output("log of the errors' damping", 0.7, 9.0, -5.3),
    Output("power of the inputs", 2.0, 0.5, 0.5),  # it begins near 1
    Output("power of the errors", 0.0, 0.5, 0.5),
    Output("momentum β", 1.4, 0.5, 0.5),  # 0.8
    Output("share ν of Nesterov's correction", 0.0, 0.5, 0.5),
)


class Controls(NamedTuple):
    """What the controller sets for each trajectory and layer, ``[B, layers]``.

    Attributes:
        growth: Change of the log of the step size.
        bend: Dampings and powers.
        momentum: β.
        nesterov: ν.
    """

    growth: Tensor
    bend: Bend
    momentum: Tensor
    nesterov: Tensor


class Tables(NamedTuple):
    """The two tables as tensors.

    Attributes:
        measures: Factor, least and largest value of the measures, ``[3, measures]``.
        visible: 1, or 0 for what the controller is blind to, ``[seen]``.
        squash: Offset, half range and middle of the outputs, ``[3, set]``.
    """

    measures: Tensor
    visible: Tensor
    squash: Tensor

    @staticmethod
    def of(config: EquivariantConfig) -> Tables:
        """As a configuration has them."""
        measures = torch.tensor([(m.factor, m.least, m.largest) for m in MEASURES]).T.contiguous()
        visible = torch.tensor([float(number.sense not in config.blind) for number in SEEN])
        return Tables(measures, visible, torch.tensor([output[1:] for output in SET]).T.contiguous())


@torch.no_grad()
def seen_of(sight: Sight, tables: Tables, config: EquivariantConfig) -> Tensor:
    """The numbers of :data:`SEEN`, ``[B, layers, seen]``, in its order; of those it is blind to, zeros.

    Measures that are not finite count as zero; after their factor all lie within their bounds.
    """
    factor, low, high = tables.measures.unbind()
    measured = torch.stack([m.formula(sight) for m in MEASURES], -1)
    measured = (measured * factor).nan_to_num(0.0, 0.0, 0.0).clamp(low, high)
    facts = [[f.formula(sight, layer) for f in FACTS] for layer in range(sight.layers)]
    known = torch.tensor(facts, dtype=measured.dtype, device=measured.device)
    numbers = torch.cat([measured, known.expand(len(measured), -1, -1)], -1)
    return numbers * tables.visible if config.blind else numbers


def controls(
    numbers: Tensor, memory: LSTMState, lstm: StackedLSTM, direct: Tensor, tables: Tables, config: EquivariantConfig
) -> tuple[Controls, LSTMState]:
    """What the controller sets, and its next memory.

    Args:
        numbers: What it sees, ``[B, layers, seen]``.
        memory: For each trajectory and layer, ``[B · layers, hidden]``.
        lstm: Its cell and head.
        direct: What the outputs take from the numbers directly, ``[set, seen]``.
        tables: Its tables.
        config: Of the optimizer.
    """
    batch, layers, _ = numbers.shape
    hidden = memory.hidden[0].view(batch, layers, -1)
    others = hidden.mean(1, keepdim=True).expand_as(hidden)
    output, memory = lstm(torch.cat([numbers, others], -1).flatten(0, 1), memory)
    offset, factor, middle = tables.squash.unbind()
    y = output.view(batch, layers, len(SET)) + numbers @ direct.mT
    y = torch.addcmul(middle, factor, torch.tanh((y + offset) / 2))
    input_damping, error_damping = y[..., 1:3].exp().unbind(-1)
    growth, _, _, input_power, error_power, momentum, nesterov = y.unbind(-1)
    if not config.inputs:
        input_power = torch.zeros_like(input_power)
    if not config.errors:
        error_power = torch.zeros_like(error_power)
    return Controls(growth, Bend(input_damping, error_damping, input_power, error_power), momentum, nesterov), memory
