r"""A learned optimizer for perceptrons of any shape: teleport, step, pull back.

Layer l computes ``z = W h`` (a bias is a column of W, for an input that is always 1) and receives the error
``δ = ∂L/∂z``. Two teleports turn its coordinates, ``g_h`` made of the second moments of h and ``g_δ`` of those of δ
(:class:`~metatele.learned.equivariant.spectrum.Spectrum`), a step is made there and pulled back:

.. math::
    D = (g_δ^T g_δ)\, ∇W\, (g_h^T g_h), \qquad
    V ← β V - η D, \qquad W ← W + V + ν β (V - V_{\text{before}}) \;\text{(Nesterov)}

How far the moments are followed (their damping λ and exponent p), the step size η, the momentum β and the share
ν of Nesterov's correction come from a small LSTM, one and the same for every layer, that reads numbers about
the layer: none of them depends on the units of the loss, and none changes when hidden units change places. So
a step commutes with permutations of hidden units, and the loss may be multiplied by any constant.

On mini-batches the LSTM pauses: its outputs, and the matrices ``gᵀg`` made with them, serve several steps.

Before the first step the network itself is moved once along its symmetry
(:class:`~metatele.learned.equivariant.opening.Opening`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.config import SENSES, EquivariantConfig
from metatele.learned.equivariant.observation import Observation, Wants, inner
from metatele.learned.equivariant.opening import Opening
from metatele.learned.equivariant.spectrum import Spectrum, Turn
from metatele.learned.lstm import LSTMState, StackedLSTM
from metatele.network.use import Moment, Use
from metatele.perceptron.losses import KINDS, kind, level
from metatele.perceptron.mlp import MLP
from metatele.random import generator

FEATURES = sum(SENSES.values())
OUTPUTS = 7
_TINY = 1e-38
_FLOOR = 0.01  # of a mean squared pre-activation
_START = -2.5  # log of the first step size, in units of the change that makes pre-activations as large as they are
_LARGEST = 2.0  # change of the log of a step size in one step
_FOLLOW = 0.4  # how much of what the slopes tell about the best length goes into the next step, before training
_SLOW = 4  # steps between two spectra
_WARM = 16  # batches that differ from the one before, after which not every step has controls of its own
_LOOK = 32  # steps between two looks at what kind of loss it is
_STRIDE = 32  # steps between two batches that a running average takes in, at most
_WHOLE, _WHOLE_AVERAGED = 128, 96  # rows up to which moments of one batch, or averages, keep all eigenvalues
_CREPT = math.log(10)  # rise of the log of the loss above its lowest at which a step is shortened too
_LEAK = 0.02  # by which that lowest rises with every step
_FAR = 4.0  # times ‖D‖² of the last look, up to which D is not shortened
_FASTEST = 10.0  # log of the largest step size
_FEWEST = 32  # samples of the smallest mini-batches of meta-training
_YIELD = math.log(4)  # rise of what the loss is compared with, whenever a step is shortened right after another
_SHORTEN = 0.1  # what is left of a step after which the loss had grown too much

# An output is a·tanh((y + o)/2) + b of a number y: o, a and b for the change of the log of the step size, the logs
# of the two dampings, the two exponents, the momentum and Nesterov's share. The last four lie between 0 and 1.
_SQUASH = (
    (0.0, _LARGEST, 0.0),
    (0.7, 9.0, -5.3),
    (0.7, 9.0, -5.3),
    (2.0, 0.5, 0.5),
    (0.0, 0.5, 0.5),
    (1.4, 0.5, 0.5),
    (0.0, 0.5, 0.5),
)
# Of the first ten numbers: factor, least and largest value.
_MEASURES = (
    (1.0, -2.0, 2.0),  # log of the best length of the last direction, in units of its length, as its slopes tell
    (1.0, -2.0, 2.0),  # the same of the whole last change
    (1.0, -1.0, 1.0),  # cosine of the gradient and the last change
    (1.0, -3.0, 3.0),  # change of the log of the loss
    (1 / 8, -5.0, 1.25),  # the same since the beginning
    (1 / 2, -5.0, 0.0),  # log of the participation of the inputs
    (1 / 2, -5.0, 0.0),  # log of that of the errors
    (1 / 4, -5.0, 0.75),  # log of the last change relative to the weights
    (1 / 4, -5.0, 1.25),  # log of the change of the pre-activations by it
    (1 / 2, -2.5, 2.5),  # change of the log of the gradient's norm
)


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(_TINY).log()


def _best(after: Tensor, before: Tensor) -> Tensor:
    """Log of where a parabola has its minimum, from its slopes at 1 and at 0; large if it has none ahead."""
    return -(1 - after / torch.where(before == 0, _TINY, before)).clamp_min(0.1).log()


@dataclass(frozen=True)
class EquivariantStates:
    """What ``[B]`` trajectories remember of their steps.

    Attributes:
        age: Steps done.
        until: Age at which the controller looks again.
        kind: Of the loss.
        lstm: Memory of the controller, ``[B · layers, hidden]``.
        log_rate: Log of the step size of each layer, ``[B, layers]``.
        unit: What it is measured in, ``[B, layers]``.
        velocity: V of each layer, as large as its weights.
        direction: D of the last step, the same.
        pace: ``β, -η, a, b``: V becomes ``βV - ηD`` and the weights change by ``a V + b D``, ``[B, layers, 4]``.
        bent: Dampings and powers in use: inputs' and errors' dampings, inputs' and errors' powers, the same shape.
        last: a and b of the last change of the weights, ``[B, layers, 2]``.
        squares: ``‖a V + b D‖²`` of it, ``[B, layers]``; in a pause that of the last one before it.
        slope: ``⟨∇W, D⟩`` where D was made, ``[B, layers]``.
        predicted: ``⟨∇L, change⟩`` of the last step, ``[B]``.
        level: Log of the loss, up to a constant, at the beginning, when the controller looked last at a point that was
            kept, and the lowest one, which is slowly forgotten, ``[B, 3]``.
        reach: Log of the relative change of each layer's pre-activations by the last step, ``[B, layers]``.
        stretch: The same of a step D of length 1, when the controller looked last.
        limit: ``‖D‖²`` above which D is shortened until it looks again.
        length: Log of ``‖∇W‖²`` where D was made, ``[B, layers]``.
        input_moments: Running average of ``hhᵀ/n``, for each layer.
        error_moments: The same of ``δδᵀ``, each divided by its trace.
        averaged: Batches in the averages.
        spread: Logs of their participations, inputs' and errors', ``[B, layers, 2]``.
        inputs: Spectra of the moments in use.
        errors: The same of the errors.
        renew: Age at which each layer's spectra are computed anew.
        fingerprint: Of the last batch that was compared, ``[4]``.
        same: Whether the last batch that was looked at was the one before it.
        factors: The numbers of ``pace`` for each layer, each ``[B, 1, 1]``; ``None`` until they are needed.
        error_turns: As they are in use, for each layer; ``None`` until they are needed.
        input_turns: The same.
    """

    age: int
    until: int
    kind: str | None
    lstm: LSTMState
    log_rate: Tensor
    unit: Tensor
    velocity: list[Tensor]
    direction: list[Tensor]
    pace: Tensor
    bent: Tensor
    last: Tensor
    squares: Tensor
    slope: Tensor
    predicted: Tensor
    level: Tensor
    reach: Tensor
    stretch: Tensor
    limit: Tensor
    length: Tensor
    input_moments: list[Tensor]
    error_moments: list[Tensor]
    averaged: int
    spread: Tensor
    inputs: list[Spectrum]
    errors: list[Spectrum]
    renew: list[int]
    fingerprint: Tensor
    same: bool = False
    factors: list[tuple[Tensor, ...]] | None = None
    error_turns: list[Turn] | None = None
    input_turns: list[Turn] | None = None

    def but(self, **changes: Any) -> EquivariantStates:
        """The same with some fields changed; unlike ``dataclasses.replace`` it does not go through all of them."""
        new = object.__new__(EquivariantStates)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def map(self, function: Callable[[Tensor], Tensor]) -> EquivariantStates:
        """The same with a function applied to every tensor."""

        def apply(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, LSTMState):
                return LSTMState(tuple(map(function, value.hidden)), tuple(map(function, value.cell)))
            if isinstance(value, Spectrum):
                return Spectrum(*map(function, value))
            if isinstance(value, Turn):
                return Turn(
                    function(value.left), None if value.right is None else function(value.right), function(value.rest)
                )
            return type(value)(map(apply, value)) if isinstance(value, list | tuple) else value

        return EquivariantStates(**{f.name: apply(getattr(self, f.name)) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    @property
    def looks(self) -> bool:
        """Whether the controller looks at the next step, which then asks what was seen of all layers."""
        return self.age >= self.until

    @property
    def looks_next(self) -> bool:
        """Whether it looks at the step after the next one, and will ask what the next one did."""
        return self.age + 1 == self.until

    def wants(self, config: EquivariantConfig, pauses: bool = True) -> Wants:
        """What the next step will read of the passes before it.

        Moments are taken in where spectra are due, and by running averages now and then; of a batch that is the last
        one again the averages know all, and one expects the next to be like the last in that.

        Args:
            config: Of the optimizer.
            pauses: Whether it may skip looks.
        """
        if not self.looks:
            return Wants(frozenset(), self.looks_next, False)
        taken = set()
        averaged = _counted(self, self.same, config)
        wait, rest = _wait(averaged, config, pauses), _wait(averaged, config)
        for layer, v in enumerate(self.velocity):
            period = _period(v.shape[-2:], rest, config)
            # Moments of the one batch are asked for with the spectra; running averages need not take in every batch.
            stride = max(1, min(period // 4, _STRIDE, self.age // 4) // rest) * rest
            if self.age >= self.renew[layer] or (
                not self.same and (self.age - (_WARM if rest > 1 else 0)) % stride < wait
            ):
                taken.add(layer)
        return Wants(frozenset(taken), True, True)

    def tensors(self, since: EquivariantStates | None = None) -> dict[str, Tensor]:
        """Plain tensors by name, for files; only those not the same as in earlier states, if these are given."""
        look = -1 if self.kind is None else KINDS.index(self.kind)
        found = {
            "counters": torch.tensor(
                [self.age, self.until, self.averaged, look, *self.renew, self.same], dtype=torch.float64
            )
        }
        for name in (*_JOINT, *_PER_LAYER, *_SPECTRA):
            value = getattr(self, name)
            if since is not None and value is getattr(since, name):
                continue
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                key = f"{name}_{number}" if isinstance(value, list) else name
                if isinstance(part, Spectrum):
                    found |= {f"{key}_{field}": t for field, t in part._asdict().items()}
                else:
                    found[key] = part
        return found | {"lstm_hidden": self.lstm.hidden[0], "lstm_cell": self.lstm.cell[0]}

    @staticmethod
    def from_tensors(found: dict[str, Tensor]) -> EquivariantStates:
        """The inverse of :meth:`tensors`.

        Raises:
            KeyError: Something is missing.
        """
        layers = range(found["log_rate"].shape[-1])

        def spectra(name: str) -> list[Spectrum]:
            return [Spectrum(*(found[f"{name}_{i}_{key}"] for key in Spectrum._fields)) for i in layers]

        age, until, averaged, look, *rest = map(int, found["counters"].tolist())
        renew, same = rest[: len(layers)], any(rest[len(layers) :])  # which earlier versions did not keep
        return EquivariantStates(
            age=age,
            until=until,
            averaged=averaged,
            kind=None if look < 0 else KINDS[look],
            lstm=LSTMState((found["lstm_hidden"],), (found["lstm_cell"],)),
            renew=renew,
            same=same,
            **{name: spectra(name) for name in _SPECTRA},  # type: ignore[arg-type]
            **{name: [found[f"{name}_{i}"] for i in layers] for name in _PER_LAYER},  # type: ignore[arg-type]
            **{name: found[name] for name in _JOINT},  # type: ignore[arg-type]
        )


_SPECTRA = ("inputs", "errors")
_PER_LAYER = ("velocity", "direction", "input_moments", "error_moments")
_JOINT = (
    *("log_rate", "unit", "pace", "bent", "last", "squares", "slope", "predicted", "level", "reach"),
    *("stretch", "limit", "length", "fingerprint", "spread"),
)


class EquivariantStep(NamedTuple):
    """One step.

    Attributes:
        changes: To be added to each layer, ``[B, o, i]``, a bias as last column.
        states: Next memories.
        shortened: Whether the last step was shortened in place of a new one, ``[B]``.
    """

    changes: list[Tensor]
    states: EquivariantStates
    shortened: Tensor


class _Controls(NamedTuple):
    """For each trajectory and layer, ``[B, layers]``; damping and power for inputs and for errors."""

    growth: Tensor
    damping: tuple[Tensor, Tensor]
    power: tuple[Tensor, Tensor]
    momentum: Tensor
    nesterov: Tensor


class _Close(NamedTuple):
    """What a step reads where the controller looks, or will at the next one.

    Attributes:
        gradients: ``∂L/∂W`` of each layer.
        uses: What was seen of them, where the controller looks.
        length: ``log ‖∇W‖²``, ``[B, layers]``.
        ahead: ``⟨∇W, V⟩``.
        along: ``⟨∇W, D⟩`` with D of the step before.
    """

    gradients: list[Tensor]
    uses: list[Use]
    length: Tensor
    ahead: Tensor
    along: Tensor

    @staticmethod
    @torch.no_grad()
    def of(gradients: list[Tensor], states: EquivariantStates, uses: Sequence[Use] = ()) -> _Close:
        """At the point that a step is made from; gradients that are not finite count as zero."""
        length = inner(gradients, gradients)
        if not bool(torch.isfinite(length).all()):
            gradients = _sound(gradients)
            length = inner(gradients, gradients)
        ahead, along = inner(gradients, states.velocity), inner(gradients, states.direction)
        return _Close(gradients, list(uses), _log(length), ahead, along)


def _sound(gradients: list[Tensor]) -> list[Tensor]:
    return [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in gradients]


def _averaged(old: Moment, new: Moment, share: float) -> Moment:
    """Running average of moments; one that is not finite does not count."""
    mixed = old.mixed(new, share)
    if bool(torch.isfinite(mixed.trace.sum())):
        return mixed
    for candidate in (new, old):  # in place of those that are not finite either
        sound = torch.isfinite(mixed.tensor).all(-1, keepdim=True).all(-2, keepdim=True)
        mixed = Moment(torch.where(sound, mixed.tensor, candidate.tensor))
    return mixed


def _counted(states: EquivariantStates, same: bool, config: EquivariantConfig) -> int:
    """Batches in the averages after the next one."""
    return 1 if same or states.age == 0 or config.averaging == 0 else states.averaged + 1


def _wait(averaged: int, config: EquivariantConfig, pauses: bool = True) -> int:
    """Steps to the controller's next look."""
    return config.hold if pauses and averaged > _WARM else 1


def _period(sides: Sequence[int], rest: int, config: EquivariantConfig) -> int:
    """Steps between two spectra of a layer with so many outputs and inputs.

    The work for a spectrum grows with the cube of the width, that for a step with its square.
    """
    return max(_SLOW, 3 * rest, math.ceil((max(sides) / config.small) ** 2))


def _weight(samples: int) -> float:
    """Of a mini-batch in running averages and steps: less than 1 where no batch of meta-training is."""
    return min(1.0, samples / _FEWEST)


def _normed(moment: Moment) -> Moment:
    """Divided by its trace."""
    return Moment(moment.tensor / moment.trace[..., None, None].clamp_min(_TINY))


def _squares(uses: Sequence[Use]) -> Tensor:
    """Mean squares of the layers' outputs, ``[B, layers]``."""
    return torch.stack([use.square for use in uses if use.square is not None], -1)


def _left(gradients: list[Tensor], states: EquivariantStates) -> tuple[EquivariantStates, list[Tensor]]:
    """``(g_δᵀ g_δ) ∇W`` of each layer."""
    turns = states.error_turns
    if turns is None:
        columns = zip(states.errors, states.bent[..., 1].unbind(1), states.bent[..., 3].unbind(1), strict=True)
        turns = [spectrum.turn(damping, power) for spectrum, damping, power in columns]
        states = states.but(error_turns=turns)
    return states, [turn.from_left(g) for turn, g in zip(turns, gradients, strict=True)]


def _again(gradients: list[Tensor], states: EquivariantStates) -> tuple[EquivariantStates, list[Tensor]]:
    """D of each layer with the controls there are."""
    states, half = _left(gradients, states)
    turns = states.input_turns
    if turns is None:
        columns = zip(states.inputs, states.bent[..., 0].unbind(1), states.bent[..., 2].unbind(1), strict=True)
        turns = [spectrum.turn(damping, power, scaled=True) for spectrum, damping, power in columns]
        states = states.but(input_turns=turns)
    return states, [turn.from_right(d) for turn, d in zip(turns, half, strict=True)]


def _limited(D: list[Tensor], squares: Tensor, limit: Tensor) -> list[Tensor]:
    """D of each layer with ``‖D‖²`` no larger than a limit, both ``[B, layers]``."""
    over = squares > limit
    if not bool(over.any()):
        return D
    factors = torch.where(over, (limit / squares).sqrt(), 1.0)[..., None, None].unbind(1)
    return [f * d for f, d in zip(factors, D, strict=True)]


def _shortened(
    before: EquivariantStates,
    after: EquivariantStates,
    changes: list[Tensor],
    shorten: Tensor,
    leapt: Tensor,
    now: Tensor,
    same: bool,
) -> tuple[EquivariantStates, list[Tensor]]:
    """States and changes with the last step shortened, in place of a new one, in the trajectories ``shorten [B]``."""
    at, each = shorten[:, None, None], shorten[:, None]
    old = [
        (a * v + b * d).detach()
        for a, b, v, d in zip(
            *(t[..., None, None].unbind(1) for t in before.last.unbind(-1)),
            before.velocity,
            before.direction,
            strict=True,
        )
    ]
    shrunk = before.pace * before.pace.new_tensor([1.0, _SHORTEN, 1.0, _SHORTEN])
    level = after.level
    # Another batch does not tell how good the old point was: an easy one must not stop all later steps.
    # A rise that goes on when steps are shortened again and again is not theirs: targets or weights were changed.
    again = (before.last[..., 1] == 0).all(-1)
    reference = before.level[:, 1] + torch.where(again, _YIELD, 0.0)
    kept = torch.where(leapt if same else ~torch.isfinite(now), reference, now)
    kept = torch.where(shorten, kept, level[:, 1])
    lowest = torch.where(leapt, before.level[:, 2], level[:, 2])
    states = after.but(  # What is left of the step becomes the velocity, and is the last change.
        velocity=[torch.where(at, _SHORTEN * o, v) for o, v in zip(old, after.velocity, strict=True)],
        direction=[torch.where(at, o, d) for o, d in zip(before.direction, after.direction, strict=True)],
        last=torch.where(at, after.last.new_tensor([1.0, 0.0]), after.last),
        squares=torch.where(each, _SHORTEN**2 * inner(old, old), after.squares),
        log_rate=torch.where(each, before.log_rate + math.log(_SHORTEN), after.log_rate),
        pace=torch.where(at, shrunk, after.pace),
        factors=None,
        slope=torch.where(each, before.slope, after.slope),
        predicted=torch.where(shorten, _SHORTEN * before.predicted, after.predicted),
        level=torch.stack([level[:, 0], kept, lowest], -1),
        length=torch.where(each, before.length, after.length),
        reach=torch.where(each, before.reach + math.log(_SHORTEN), after.reach),
    )
    return states, [torch.where(at, (_SHORTEN - 1) * o, c) for o, c in zip(old, changes, strict=True)]


class EquivariantOptimizer(nn.Module):
    """See the module; works on every :class:`~metatele.perceptron.mlp.MLP`.

    Args:
        config: Sizes, and what is learned.
        seed: For the initial meta-parameters.

    Attributes:
        opening: The teleport before the first step.

    Example:
        >>> from metatele.perceptron.activations import Tanh
        >>> from metatele.perceptron.losses import MeanSquaredError
        >>> from metatele.learned.equivariant.observation import parted
        >>> from metatele.perceptron.mlp import MLP, Pass
        >>> _ = torch.manual_seed(0)
        >>> optimizer, mlp = EquivariantOptimizer(EquivariantConfig()), MLP((3, 8, 2), Tanh(), True)
        >>> w, x, y, states = torch.randn(5, mlp.num_parameters), torch.randn(3, 9), torch.randn(2, 9), None
        >>> for _ in range(2):
        ...     done = Pass(mlp, mlp.unflatten(w), x)
        ...     done.backward(y, MeanSquaredError())
        ...     changes, states, _ = optimizer.step(Observation.of(done), states)
        ...     w = w + mlp.flatten(parted(changes, mlp.biases))
        >>> w.shape, states.age
        (torch.Size([5, 50]), 2)
    """

    _squash: Tensor
    _sight: Tensor
    _measures: Tensor

    def __init__(self, config: EquivariantConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.lstm = StackedLSTM(FEATURES + hidden, hidden, OUTPUTS, 1, generator(seed, "initialisation"))
        with torch.no_grad():
            self.lstm.head_weight.mul_(0.3)
            self.lstm.head_bias.zero_()
        # What the outputs take from the numbers directly: at first, a step that could have been longer makes the
        # next one longer.
        direct = torch.zeros(OUTPUTS, FEATURES)
        direct[0, :2] = _FOLLOW
        self.direct = nn.Parameter(direct)
        self.opening = Opening(config.drift)
        self.register_buffer("_squash", torch.tensor(_SQUASH).T.contiguous(), persistent=False)
        sight = [0.0 if sense in config.blind else 1.0 for sense, count in SENSES.items() for _ in range(count)]
        self.register_buffer("_sight", torch.tensor(sight), persistent=False)
        self.register_buffer("_measures", torch.tensor(_MEASURES).T.contiguous(), persistent=False)

    def opens(self, mlp: MLP) -> bool:
        """Whether the first step on such a network is a teleport."""
        return self.config.opening and bool(mlp.hidden_widths)

    @staticmethod
    def state_bytes(mlp: MLP) -> int:
        """Memory of one trajectory's states in float32, at most.

        Velocity and direction are as large as the weights; for the inputs and the errors of each layer there are a
        matrix of second moments, its eigenvectors, of which wide layers as a rule keep less than half, and between
        looks on mini-batches a matrix made of them.

        Example:
            >>> from metatele.perceptron.activations import ReLU
            >>> mlp = MLP((100, 100, 100), ReLU())
            >>> EquivariantOptimizer.state_bytes(mlp) / mlp.num_parameters
            32.0
        """
        rows = [d + b for d, b in zip(mlp.widths, mlp.biases, strict=False)]
        layers = zip(rows, mlp.widths[1:], strict=True)
        return 4 * sum(2 * i * o + 3 * (i * i + o * o) for i, o in layers)

    # --- a step

    def step(
        self, seen: Observation, states: EquivariantStates | None, pauses: bool = True, spend: bool = False
    ) -> EquivariantStep:
        """The change of the weights after a pass at them; ``None`` in place of states at the beginning.

        On mini-batches, after the first 16, the controller looks at every 16th step alone (``hold`` of the
        configuration); those between cost a few products of matrices. Differentiable in the meta-parameters, and
        through the states in those of earlier steps; what was seen is a constant.

        Args:
            seen: In the pass.
            states: Memories.
            pauses: Whether it may skip looks. Without, as in meta-training, more is learned from each step.
            spend: Whether the memories given may be written over, which saves the time to find new memory. Without
                derivatives only.
        """
        close, same = None, False
        if states is None or states.looks:
            layers = len(seen.gradients)
            wanted = (Wants.everything(layers) if states is None else states.wants(self.config, pauses)).layers
            uses = seen.uses(wanted)
            states, same = self._observed(seen, uses, wanted, states, pauses)
            close = _Close.of(seen.gradients, states, uses)
        elif states.looks_next:
            states = states.but(fingerprint=seen.fingerprint().numbers())
            close = _Close.of(seen.gradients, states)
        now = level(seen.outputs, seen.error, states.kind)
        if states.age == 0:
            states = states.but(level=torch.stack([now, now, now], -1))
        before, looks = states, states.looks
        # Two mini-batches differ anyway, small ones more. What is not finite is not smaller than anything either.
        most = math.log(self.config.growth)
        if not same:
            most = 4 * most - math.log(_weight(seen.samples))
        well = now - states.level[:, 1] <= most
        if looks:
            assert close is not None
            states, D = self._controlled(close, seen, states, now, same)
            well = well & torch.isfinite(states.limit.sum(-1))
            calm = not same and bool(well.all())
        else:
            gradients = seen.gradients if close is None else close.gradients
            if torch.is_grad_enabled() and not bool(torch.isfinite(inner(gradients, gradients)).all()):
                # A step from there is shortened, but what is left out must not make derivatives of the others NaN.
                gradients = _sound(gradients)
            states, D = _again(gradients, states)
            with torch.no_grad():
                sizes = inner(D, D)
                calm = bool((well & (sizes <= states.limit).all(-1)).all())  # as nearly all are
                if not calm:
                    well = well & torch.isfinite(sizes.sum(-1))
            if not calm:
                D = _limited(D, sizes, states.limit)
        factors = states.factors
        if factors is None:
            columns = (t.unsqueeze(-1).unsqueeze(-1).unbind(1) for t in states.pace.unbind(-1))
            factors = list(zip(*columns, strict=True))
            states = states.but(factors=factors, last=states.pace[..., 2:].detach())
        with torch.no_grad():
            leapt = shorten = ~well
            lowest = now
            if same:
                # Many small rises are a large one: without this, steps at the level of rounding may grow for long.
                crept = now - states.level[:, 2] > _CREPT
                shorten = leapt | crept
                lowest = torch.where(crept, now - _CREPT / 2, torch.minimum(now, states.level[:, 2] + _LEAK))
            back = not calm and states.age > 0 and bool(shorten.any())
        spend = spend and not back and states.age > 0  # a step that is shortened is made of the old memories
        V, changes = [], []
        rooms = zip(states.velocity, states.direction, strict=True) if spend else repeat((None, None))
        for d, old, (beta, less, a, b), (room, other) in zip(D, states.velocity, factors, rooms, strict=False):
            V.append(torch.mul(beta, old, out=room).addcmul_(less, d))
            changes.append(torch.mul(a, V[-1], out=other).addcmul_(b, d))
        with torch.no_grad():
            D = [d.detach() for d in D]
            new = states.but(age=states.age + 1, velocity=V, direction=D)
            if looks:
                new = new.but(until=states.age + _wait(states.averaged, self.config, pauses))
            if close is not None:
                kept = now if looks else states.level[:, 1]
                new = new.but(level=torch.stack([states.level[:, 0], kept, lowest], -1))
                slope = inner(close.gradients, D)
                beta, less, a, b = states.pace.unbind(-1)
                predicted = (a * (beta * close.ahead + less * slope) + b * slope).sum(-1)
                new = new.but(slope=slope, predicted=predicted, length=close.length, squares=inner(changes, changes))
                if not looks:
                    new = new.but(reach=states.stretch + _log(inner(D, D)) / 2 + states.log_rate)
        if back:
            new, changes = _shortened(before, new, changes, shorten, leapt, now, same)
        return EquivariantStep(changes, new, shorten)

    def _controlled(
        self, close: _Close, seen: Observation, states: EquivariantStates, now: Tensor, same: bool
    ) -> tuple[EquivariantStates, list[Tensor]]:
        """States with new controls, and D of each layer with them."""
        if states.age == 0:
            states = states.but(length=close.length)
        controls, lstm = self._control(self._features(close, seen, states, now, same), states)
        bent = torch.stack([*controls.damping, *controls.power], -1)
        states, half = _left(close.gradients, states.but(lstm=lstm, bent=bent, error_turns=None, input_turns=None))
        D, sizes = [], []
        columns = zip(half, states.inputs, controls.damping[0].unbind(1), controls.power[0].unbind(1), strict=True)
        for d, inputs, damping, power in columns:
            turned, size = inputs.from_right(d, damping, power)
            D.append(turned)
            sizes.append(size / d.shape[-2])
        squares = _squares(close.uses).nan_to_num(1.0, 1.0, 1.0) + _FLOOR
        found = (torch.stack(sizes, -1) / squares).clamp_min(_TINY).sqrt()
        sound = torch.isfinite(found) & (found > 2 * _TINY**0.5)
        fresh = states.unit <= 0  # no gradient has reached the layer yet
        unit = torch.where(sound, 1 / torch.where(sound, found, 1.0), 0.0)
        states = states.but(unit=torch.where(fresh, unit, states.unit))
        reach = _log(states.unit * torch.where(sound, found, 0.0)).detach()
        log_rate = torch.where(fresh, _START, states.log_rate) + controls.growth
        log_rate = torch.minimum(log_rate, math.log(self.config.reach) - reach).clamp(max=_FASTEST)
        rate = log_rate.exp() * states.unit
        if states.age and not same:
            rate = rate * _weight(seen.samples)
        beta, nu = controls.momentum, controls.nesterov
        # The change is V + ν(βV - ηD - V) = a V + b D, V the new velocity.
        pace = torch.stack([beta, -rate, 1 - nu + nu * beta, -nu * rate], -1)
        states = states.but(log_rate=log_rate, pace=pace, factors=None, reach=reach + log_rate.detach())
        with torch.no_grad():
            squares = inner(D, D)
            states = states.but(stretch=reach - _log(squares) / 2, limit=_FAR * squares)
        return states, D

    # --- moments

    @torch.no_grad()
    def _observed(
        self,
        seen: Observation,
        uses: list[Use],
        wanted: frozenset[int],
        states: EquivariantStates | None,
        pauses: bool,
    ) -> tuple[EquivariantStates, bool]:
        """States with the moments of a batch taken in, and whether it is the batch of the step before."""
        fingerprint = seen.fingerprint().numbers()
        if states is None:
            states = self._initial(seen, fingerprint)
        pairs = zip(fingerprint.tolist(), states.fingerprint.tolist(), strict=True)
        same = states.age > 0 and all(abs(a - b) < 1e-5 for a, b in pairs)
        first = same or states.age == 0
        decay = 0.0 if first else 1 - (1 - self.config.averaging) * _weight(seen.samples)
        averaged = _counted(states, same, self.config)
        # A running average that begins with equal weights.
        share = max(1 - decay, 1 / averaged)
        # Averages and spectra are the same with pauses or without.
        wait, rest = _wait(averaged, self.config, pauses), _wait(averaged, self.config)
        renewed: dict[str, Any] = {name: [] for name in ("input_moments", "error_moments", "inputs", "errors", "renew")}
        for layer, (use, gradient) in enumerate(zip(uses, seen.gradients, strict=True)):
            period = _period(gradient.shape[-2:], rest, self.config)
            due = states.age >= states.renew[layer]
            if layer in wanted and (due or not same) and use.inputs is not None and use.errors is not None:
                S, G = Moment(use.inputs.dense), _normed(Moment(use.errors.dense))
                if states.age and share < 1:
                    S = _averaged(Moment(states.input_moments[layer]), S, share)
                    G = _averaged(Moment(states.error_moments[layer]), G, share)
            else:
                S, G = Moment(states.input_moments[layer]), Moment(states.error_moments[layer])
            renewed["input_moments"].append(S.tensor)
            renewed["error_moments"].append(G.tensor)
            for name, moment in (("inputs", S), ("errors", G)):
                last = getattr(states, name)[layer] if states.age else None
                if due or last is None:
                    # Moments of the whole data are worth more digits than averages over batches.
                    whole = _WHOLE if same or last is None else _WHOLE_AVERAGED
                    renewed[name].append(Spectrum.of(moment.tensor, self.config.keep, last, whole))
                else:
                    renewed[name].append(last)
            renewed["renew"].append(states.age + min(period, states.age // 4 + 1) if due else states.renew[layer])
        spread = states.spread
        if any(old <= states.age for old in states.renew):
            batch = len(states.predicted)
            spread = torch.stack(
                [
                    torch.stack([s.participation.expand(batch) for s in renewed[name]], -1).log()
                    for name in ("inputs", "errors")
                ],
                -1,
            )
        states = states.but(averaged=averaged, fingerprint=fingerprint, same=same, spread=spread, **renewed)
        if states.age % _LOOK < wait:
            states = states.but(kind=kind(seen.outputs, seen.error))
        return states, same

    def _initial(self, seen: Observation, fingerprint: Tensor) -> EquivariantStates:
        batch, layers = seen.gradients[0].shape[0], len(seen.gradients)
        like = seen.gradients[0]
        zeros = [torch.zeros_like(g) for g in seen.gradients]
        each, few = like.new_zeros(batch, layers), like.new_zeros(batch, layers, 4)
        return EquivariantStates(
            age=0,
            until=0,
            kind=None,
            lstm=self.lstm.initial_state(batch * layers),
            log_rate=torch.full_like(each, _START),
            unit=each,
            velocity=zeros,
            direction=zeros,
            pace=few,
            bent=few,
            last=few[..., :2],
            squares=each,
            slope=each,
            predicted=like.new_zeros(batch),
            level=like.new_zeros(batch, 3),
            reach=each,
            stretch=each,
            limit=each,
            length=each,
            input_moments=[],
            error_moments=[],
            averaged=0,
            spread=few[..., :2],
            inputs=[],
            errors=[],
            renew=[0] * layers,
            fingerprint=fingerprint,
        )

    # --- control

    @torch.no_grad()
    def _features(self, close: _Close, seen: Observation, states: EquivariantStates, now: Tensor, same: bool) -> Tensor:
        """Numbers about each layer, ``[B, layers, FEATURES]``, free of units and of the order of units."""
        layers = len(close.uses)
        a, b = states.last.unbind(-1)
        ahead = a * close.ahead + b * close.along  # ⟨∇W, last change⟩
        size = _log(states.squares)
        overall = _best(ahead.sum(-1), states.predicted)
        since = (now[:, None] - states.level[:, :2].flip(-1)).nan_to_num(40.0, 40.0, 40.0)
        shared = torch.cat([overall[:, None], since], -1)[:, None].expand(-1, layers, -1).unbind(-1)
        moved = torch.stack(
            [
                _best(close.along, states.slope),
                shared[0],
                ahead / ((close.length + size) / 2).exp().clamp_min(_TINY),
                shared[1],
                shared[2],
                *states.spread.unbind(-1),
                (size - _log(seen.sizes())) / 2,
                states.reach,
                (close.length - states.length) / 2,
            ],
            -1,
        )
        factor, low, high = self._measures.unbind()
        moved = (moved * factor).nan_to_num(0.0, 0.0, 0.0).clamp(low, high)
        fixed = torch.tensor(
            [
                [
                    math.log(states.age + 1) / 3,
                    float(same),
                    math.log(use.columns / gradient.shape[-1]) / 2,
                    float(layer == 0),
                    float(layer == layers - 1),
                    layers - 3.0,
                ]
                for layer, (use, gradient) in enumerate(zip(close.uses, seen.gradients, strict=True))
            ],
            dtype=now.dtype,
            device=now.device,
        )
        seen_of = torch.cat([moved, fixed.expand(len(now), -1, -1)], -1)
        return seen_of * self._sight if self.config.blind else seen_of

    def _control(self, features: Tensor, states: EquivariantStates) -> tuple[_Controls, LSTMState]:
        """The outputs of the controller for each layer."""
        batch, layers, _ = features.shape
        hidden = states.lstm.hidden[0].view(batch, layers, -1)
        others = hidden.mean(1, keepdim=True).expand_as(hidden)
        output, lstm = self.lstm(torch.cat([features, others], -1).flatten(0, 1), states.lstm)
        offset, factor, middle = self._squash.unbind()
        y = output.view(batch, layers, OUTPUTS) + features @ self.direct.mT
        y = torch.addcmul(middle, factor, torch.tanh((y + offset) / 2))
        input_damping, error_damping = y[..., 1:3].exp().unbind(-1)
        growth, _, _, input_power, error_power, momentum, nesterov = y.unbind(-1)
        if not self.config.inputs:
            input_power = torch.zeros_like(input_power)
        if not self.config.errors:
            error_power = torch.zeros_like(error_power)
        damping, power = (input_damping, error_damping), (input_power, error_power)
        return _Controls(growth, damping, power, momentum, nesterov), lstm


class ConstantOptimizer(EquivariantOptimizer):
    """The same step with settings that nothing learned: whitening by conjugation, and gradient descent.

    Args:
        rate: η, in units of the first step's change that would make pre-activations as large as they are.
        damping: λ of the inputs' moments, whose exponent is 1; errors and velocities play no part.
    """

    def __init__(self, rate: float, damping: float) -> None:
        super().__init__(EquivariantConfig(opening=False, errors=False))
        self.rate, self.damping = rate, damping

    def _control(self, features: Tensor, states: EquivariantStates) -> tuple[_Controls, LSTMState]:
        """The same for every layer and step."""
        one = torch.ones_like(features[..., 0])
        growth = math.log(self.rate) - states.log_rate
        return _Controls(growth, (self.damping * one, one), (one, 0 * one), 0 * one, 0 * one), states.lstm
