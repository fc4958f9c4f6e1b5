r"""A learned optimizer for perceptrons of any shape: teleport, step, pull back.

Layer l computes ``z = W h`` (a bias is a column of W, for an input that is always 1) and receives the error
``δ = ∂L/∂z``. Two teleports turn its coordinates, ``g_h`` made of the second moments of h and ``g_δ`` of those of δ
(:class:`~metatele.metaopt.spectrum.Spectrum`), a step is made there and pulled back:

.. math::
    D = (g_δ^T g_δ)\, ∇W\, (g_h^T g_h), \qquad
    V ← β V - η D, \qquad W ← W + V + ν β (V - V_{\text{before}}) \;\text{(Nesterov)}

How far the moments are followed (their damping λ and exponent p), the step size η, the momentum β and the share
ν of Nesterov's correction come from a small LSTM, one and the same for every layer, that reads numbers about
the layer: none of them depends on the units of the loss, and none changes when hidden units change places. So
a step commutes with permutations of hidden units, and the loss may be multiplied by any constant.

Before the first step the network itself is moved once along its symmetry
(:class:`~metatele.metaopt.opening.Opening`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.config import SENSES, EquivariantConfig
from metatele.losses import KINDS, kind, level
from metatele.metaopt.lstm import LSTMState, StackedLSTM
from metatele.metaopt.observation import Observation, inner
from metatele.metaopt.opening import Opening
from metatele.metaopt.spectrum import Spectrum
from metatele.mlp import MLP
from metatele.random import generator

FEATURES = sum(SENSES.values())
OUTPUTS = 7
_TINY = 1e-38
_FLOOR = 0.01  # of a mean squared pre-activation
_START = -2.5  # log of the first step size, in units of the change that makes pre-activations as large as they are
_LARGEST = 2.0  # change of the log of a step size in one step
_FOLLOW = 0.4  # how much of what the slopes tell about the best length goes into the next step, before training
_SLOW = 4  # steps between two spectra
_STRIDE = 5  # batches between two that a running average takes in, at most
_LOOK = 16  # steps between two looks at what kind of loss it is
_CREPT = math.log(10)  # rise of the log of the loss above its lowest at which a step is shortened too
_LEAK = 0.02  # by which that lowest rises with every step
_SHORTEN = 0.25  # what is left of a step after which the loss had grown too much

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


@lru_cache(maxsize=32)
def _ramps(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones, and a line from -1 to 1, ``[2, rows]``."""
    ramp = torch.linspace(-1, 1, rows, dtype=dtype, device=device)
    return torch.stack([torch.ones_like(ramp), ramp])


def _best(after: Tensor, before: Tensor) -> Tensor:
    """Log of where a parabola has its minimum, from its slopes at 1 and at 0; large if it has none ahead."""
    return -(1 - after / torch.where(before == 0, _TINY, before)).clamp_min(0.1).log()


@dataclass(frozen=True)
class EquivariantStates:
    """What ``[B]`` trajectories remember of their steps.

    Attributes:
        age: Steps done.
        kind: Of the loss.
        lstm: Memory of the controller, ``[B · layers, hidden]``.
        log_rate: Log of the step size of each layer, ``[B, layers]``.
        unit: What it is measured in, ``[B, layers]``.
        velocity: V of each layer, as large as its weights.
        direction: D of the last step, the same.
        last: The last change of the weights as ``a V + b D``: a and b, ``[B, layers, 2]``.
        squares: ``‖a V + b D‖²`` of it, ``[B, layers]``.
        slope: ``⟨∇W, D⟩`` where D was made, ``[B, layers]``.
        predicted: ``⟨∇L, change⟩`` of the last step, ``[B]``.
        level: Log of the loss, up to a constant, at the beginning, at the last point that was kept, and the lowest
            one, which is slowly forgotten, ``[B, 3]``.
        reach: Log of the relative change of each layer's pre-activations by the last step, ``[B, layers]``.
        length: Log of ``‖∇W‖²`` where D was made, ``[B, layers]``.
        input_moments: Running average of ``hhᵀ/n``, for each layer.
        error_moments: The same of ``δδᵀ``, each divided by its trace.
        averaged: Batches in the averages.
        spread: Logs of their participations, inputs' and errors', ``[B, layers, 2]``.
        inputs: Spectra of the moments in use.
        errors: The same of the errors.
        renew: Age at which each layer's spectra are computed anew.
        fingerprint: Of the last batch, ``[4]``.
    """

    age: int
    kind: str | None
    lstm: LSTMState
    log_rate: Tensor
    unit: Tensor
    velocity: list[Tensor]
    direction: list[Tensor]
    last: Tensor
    squares: Tensor
    slope: Tensor
    predicted: Tensor
    level: Tensor
    reach: Tensor
    length: Tensor
    input_moments: list[Tensor]
    error_moments: list[Tensor]
    averaged: int
    spread: Tensor
    inputs: list[Spectrum]
    errors: list[Spectrum]
    renew: list[int]
    fingerprint: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> EquivariantStates:
        """The same with a function applied to every tensor."""

        def apply(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, LSTMState):
                return LSTMState(tuple(map(function, value.hidden)), tuple(map(function, value.cell)))
            if isinstance(value, Spectrum):
                return Spectrum(*map(function, value))
            return [apply(v) for v in value] if isinstance(value, list) else value

        return EquivariantStates(**{f.name: apply(getattr(self, f.name)) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors by name, for files."""
        look = -1 if self.kind is None else KINDS.index(self.kind)
        found = {"counters": torch.tensor([self.age, self.averaged, look, *self.renew], dtype=torch.float64)}
        for name in (*_JOINT, *_PER_LAYER, *_SPECTRA):
            value = getattr(self, name)
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

        age, averaged, look, *renew = map(int, found["counters"].tolist())
        return EquivariantStates(
            age=age,
            averaged=averaged,
            kind=None if look < 0 else KINDS[look],
            lstm=LSTMState((found["lstm_hidden"],), (found["lstm_cell"],)),
            renew=renew,
            **{name: spectra(name) for name in _SPECTRA},  # type: ignore[arg-type]
            **{name: [found[f"{name}_{i}"] for i in layers] for name in _PER_LAYER},  # type: ignore[arg-type]
            **{name: found[name] for name in _JOINT},  # type: ignore[arg-type]
        )


_SPECTRA = ("inputs", "errors")
_PER_LAYER = ("velocity", "direction", "input_moments", "error_moments")
_JOINT = (
    *("log_rate", "unit", "last", "squares", "slope", "predicted", "level", "reach", "length"),
    *("fingerprint", "spread"),
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


class EquivariantOptimizer(nn.Module):
    """See the module; works on every :class:`~metatele.mlp.MLP`.

    Args:
        config: Sizes, and what is learned.
        seed: For the initial meta-parameters.

    Attributes:
        opening: The teleport before the first step.

    Example:
        >>> from metatele.activations import Tanh
        >>> from metatele.losses import MeanSquaredError
        >>> from metatele.metaopt.observation import parted
        >>> from metatele.mlp import MLP, Pass
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
        matrix of second moments and its eigenvectors, of which wide layers as a rule keep less than half.

        Example:
            >>> from metatele.activations import ReLU
            >>> mlp = MLP((100, 100, 100), ReLU())
            >>> EquivariantOptimizer.state_bytes(mlp) / mlp.num_parameters
            24.0
        """
        rows = [d + b for d, b in zip(mlp.widths, mlp.biases, strict=False)]
        layers = zip(rows, mlp.widths[1:], strict=True)
        return 8 * sum(i * o + i * i + o * o for i, o in layers)

    # --- a step

    def step(self, seen: Observation, states: EquivariantStates | None) -> EquivariantStep:
        """The change of the weights after a pass at them; ``None`` in place of states at the beginning.

        Differentiable in the meta-parameters, and through the states in those of earlier steps; what was seen is
        a constant.
        """
        states, same = self._observed(seen, states)
        if states.age % _LOOK == 0:
            states = dataclasses.replace(states, kind=kind(seen.outputs, seen.errors[-1]))
        now = level(seen.outputs, seen.errors[-1], states.kind)
        finite = torch.isfinite(now)
        with torch.no_grad():
            length = inner(seen.gradients, seen.gradients)
            if not bool(torch.isfinite(length).all()):
                gradients = [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in seen.gradients]
                seen = seen._replace(gradients=gradients)
                length = inner(gradients, gradients)
            length = _log(length)
            ahead, along = inner(seen.gradients, states.velocity), inner(seen.gradients, states.direction)
        if states.age == 0:
            states = dataclasses.replace(states, level=torch.stack([now, now, now], -1), length=length)
        controls, lstm = self._control(self._features(seen, states, now, length, ahead, along, same), states)
        D, reach = self._directions(seen, states, controls)
        if states.age == 0:
            unit = torch.where(reach > 0, 1 / torch.where(reach > 0, reach, 1.0), 0.0)
            states = dataclasses.replace(states, unit=unit)
        unit = states.unit.detach()
        reach = _log(unit * reach.detach())
        log_rate = torch.minimum(states.log_rate + controls.growth, math.log(self.config.reach) - reach)
        rate = log_rate.exp() * states.unit
        beta, nu = controls.momentum, controls.nesterov
        # The change is V + ν(βV - ηD - V) = a V + b D, V the new velocity.
        a, b = 1 - nu + nu * beta, -nu * rate
        V, changes = [], []
        factors = (t.unsqueeze(-1).unsqueeze(-1).unbind(1) for t in (beta, -rate, a, b))
        for d, old, beta_, eta, a_, b_ in zip(D, states.velocity, *factors, strict=True):
            V.append(torch.addcmul(beta_ * old, eta, d))
            changes.append(torch.addcmul(a_ * V[-1], b_, d))
        with torch.no_grad():
            slope = inner(seen.gradients, D)
            predicted = (a * (beta * ahead - rate * slope) + b * slope).sum(-1)
            last, reach = torch.stack([a, b], -1), reach + log_rate
            # Two mini-batches differ anyway.
            leapt = (now - states.level[:, 1] > math.log(self.config.growth) * (1 if same else 2)) | ~finite
            # Many small rises are a large one: without this, steps at the level of rounding may grow for long.
            crept = same & (now - states.level[:, 2] > _CREPT)
            shorten = leapt | crept
            lowest = (
                torch.where(crept, now - _CREPT / 2, torch.minimum(now, states.level[:, 2] + _LEAK)) if same else now
            )
            kept, squares = now, inner(changes, changes)
        if states.age and bool(shorten.any()):
            at = shorten[:, None, None]
            a_, b_ = states.last[..., None, None].unbind(2)
            old = [
                (x * v + y * d).detach()
                for x, v, y, d in zip(a_.unbind(1), states.velocity, b_.unbind(1), states.direction, strict=True)
            ]
            changes = [torch.where(at, (_SHORTEN - 1) * o, c) for o, c in zip(old, changes, strict=True)]
            squares = torch.where(shorten[:, None], _SHORTEN**2 * states.squares, squares)
            # What is left of the step becomes the velocity, and is the last change.
            V = [torch.where(at, _SHORTEN * o, v) for o, v in zip(old, V, strict=True)]
            D = [torch.where(at, o, d) for o, d in zip(states.direction, D, strict=True)]
            last = torch.where(at, last.new_tensor([1.0, 0.0]), last)
            log_rate = torch.where(shorten[:, None], states.log_rate + math.log(_SHORTEN), log_rate)
            slope = torch.where(shorten[:, None], states.slope, slope)
            predicted = torch.where(shorten, _SHORTEN * states.predicted, predicted)
            # Another batch does not tell how good the old point was: an easy one must not stop all later steps.
            kept = torch.where(leapt if same else ~finite, states.level[:, 1], now)
            lowest = torch.where(leapt, states.level[:, 2], lowest)
            length = torch.where(shorten[:, None], states.length, length)
            reach = torch.where(shorten[:, None], states.reach + math.log(_SHORTEN), reach)
        new = dataclasses.replace(
            states,
            age=states.age + 1,
            lstm=lstm,
            log_rate=log_rate,
            velocity=V,
            direction=[d.detach() for d in D],
            last=last,
            squares=squares,
            slope=slope,
            predicted=predicted,
            level=torch.stack([states.level[:, 0], kept, lowest], -1),
            reach=reach,
            length=length,
        )
        return EquivariantStep(changes, new, shorten)

    def _directions(
        self, seen: Observation, states: EquivariantStates, controls: _Controls
    ) -> tuple[list[Tensor], Tensor]:
        """D of each layer, and the relative change of its pre-activations by a step of size 1, ``[B, layers]``."""
        D, sizes = [], []
        columns = (t.unbind(1) for t in (*controls.damping, *controls.power))
        layers = zip(seen.gradients, states.inputs, states.errors, *columns, strict=True)
        for gradient, inputs, errors, input_damping, error_damping, input_power, error_power in layers:
            d = gradient
            if self.config.errors:
                d = errors.from_left(d, error_damping, error_power)
            power = input_power if self.config.inputs else torch.zeros_like(input_power)
            d, size = inputs.from_right(d, input_damping, power)
            D.append(d)
            sizes.append(size / gradient.shape[-2])
        squares = seen.squares.nan_to_num(1.0, 1.0, 1.0) + _FLOOR
        reach = (torch.stack(sizes, -1) / squares).clamp_min(_TINY).sqrt()
        return D, torch.where(torch.isfinite(reach) & (reach > 2 * _TINY**0.5), reach, 0.0)

    # --- moments

    @torch.no_grad()
    def _observed(self, seen: Observation, states: EquivariantStates | None) -> tuple[EquivariantStates, bool]:
        """States with the moments of a batch taken in, and whether it is the batch of the step before."""
        x = seen.inputs[0]
        rows = _ramps(x.shape[-2], x.dtype, x.device) @ x
        fingerprint = torch.cat([rows.sum((0, 2)), rows.square().sum((0, 2))]).nan_to_num(0.0, 0.0, 0.0)
        if states is None:
            states = self._initial(seen, fingerprint)
        pairs = zip(fingerprint.tolist(), states.fingerprint.tolist(), strict=True)
        same = states.age > 0 and all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
        decay = 0.0 if same or states.age == 0 else self.config.averaging
        averaged = 1 if decay == 0 else states.averaged + 1
        # A running average that begins with equal weights.
        share = max(1 - decay, 1 / averaged)
        renewed: dict[str, Any] = {name: [] for name in ("input_moments", "error_moments", "inputs", "errors", "renew")}
        for layer, (h, e) in enumerate(zip(seen.inputs, seen.errors, strict=True)):
            # The work for a spectrum grows with the cube of the width, that for a step with its square.
            period = max(_SLOW, math.ceil((max(h.shape[-2], e.shape[-2]) / self.config.small) ** 2))
            due = states.age >= states.renew[layer]
            # Moments of the one batch are asked for with the spectra; running averages need not take in every batch.
            if due or (not same and states.age % max(1, min(period // 2, _STRIDE, states.age // 4)) == 0):
                S, G = h @ h.mT / h.shape[-1], e @ e.mT
                G = G / G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(_TINY)
                if states.age and share < 1:
                    S = states.input_moments[layer].lerp(S, share)
                    G = states.error_moments[layer].lerp(G, share)
            else:
                S, G = states.input_moments[layer], states.error_moments[layer]
            renewed["input_moments"].append(S)
            renewed["error_moments"].append(G)
            for name, moment in (("inputs", S), ("errors", G)):
                last = getattr(states, name)[layer] if states.age else None
                renewed[name].append(Spectrum.of(moment, self.config.keep, last) if due or last is None else last)
            wait = min(period, states.age // 4 + 1)
            renewed["renew"].append(states.age + wait if due else states.renew[layer])
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
        states = dataclasses.replace(states, averaged=averaged, fingerprint=fingerprint, spread=spread, **renewed)
        return states, same

    def _initial(self, seen: Observation, fingerprint: Tensor) -> EquivariantStates:
        batch, layers = seen.gradients[0].shape[0], len(seen.gradients)
        like = seen.gradients[0]
        zeros = [torch.zeros_like(g) for g in seen.gradients]
        each = like.new_zeros(batch, layers)
        return EquivariantStates(
            age=0,
            kind=None,
            lstm=self.lstm.initial_state(batch * layers),
            log_rate=torch.full_like(each, _START),
            unit=torch.ones_like(each),
            velocity=zeros,
            direction=zeros,
            last=like.new_zeros(batch, layers, 2),
            squares=each,
            slope=each,
            predicted=like.new_zeros(batch),
            level=like.new_zeros(batch, 3),
            reach=each,
            length=each,
            input_moments=[],
            error_moments=[],
            averaged=0,
            spread=like.new_zeros(batch, layers, 2),
            inputs=[],
            errors=[],
            renew=[0] * layers,
            fingerprint=fingerprint,
        )

    # --- control

    @torch.no_grad()
    def _features(
        self,
        seen: Observation,
        states: EquivariantStates,
        now: Tensor,
        length: Tensor,
        ahead: Tensor,
        along: Tensor,
        same: bool,
    ) -> Tensor:
        """Numbers about each layer, ``[B, layers, FEATURES]``, free of units and of the order of units."""
        layers, n = len(seen.gradients), seen.inputs[0].shape[-1]
        a, b = states.last.unbind(-1)
        ahead = a * ahead + b * along  # ⟨∇W, last change⟩
        size = _log(states.squares)
        overall = _best(ahead.sum(-1), states.predicted)
        since = (now[:, None] - states.level[:, :2].flip(-1)).nan_to_num(40.0, 40.0, 40.0)
        shared = torch.cat([overall[:, None], since], -1)[:, None].expand(-1, layers, -1).unbind(-1)
        moved = torch.stack(
            [
                _best(along, states.slope),
                shared[0],
                ahead / ((length + size) / 2).exp().clamp_min(_TINY),
                shared[1],
                shared[2],
                *states.spread.unbind(-1),
                (size - _log(seen.sizes)) / 2,
                states.reach,
                (length - states.length) / 2,
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
                    math.log(n / h.shape[-2]) / 2,
                    float(layer == 0),
                    float(layer == layers - 1),
                    layers - 3.0,
                ]
                for layer, h in enumerate(seen.inputs)
            ],
            dtype=length.dtype,
            device=length.device,
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
