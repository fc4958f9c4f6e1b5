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
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.config import EquivariantConfig
from metatele.losses import level
from metatele.metaopt.lstm import LSTMState, StackedLSTM
from metatele.metaopt.spectrum import Spectrum
from metatele.mlp import Pass, Weights
from metatele.random import generator
from metatele.symmetry import with_ones

FEATURES = 16
OUTPUTS = 7
_TINY = 1e-38
_FLOOR = 0.01  # of a mean squared pre-activation
_START = -2.5  # log of the first step size, in units of the change that makes pre-activations as large as they are
_LARGEST = 1.5  # change of the log of a step size in one step
_FOLLOW = 0.7  # how much of the room that a step left goes into the next one, before training
_SLOW = 4  # steps between two spectra of running averages, at least
_STRIDE = 5  # batches between two that a running average takes in, at most
_SHORTEN = 0.25  # what is left of a step after which the loss had grown too much


class Observation(NamedTuple):
    """What a forward and a backward pass of ``[B]`` networks tell about each layer.

    Attributes:
        inputs: h ``[B, i, n]``, with a row of ones below where the layer has a bias; ``[1, i, n]`` if it is shared.
        errors: δ ``[B, o, n]``.
        squares: Mean ``z²``, ``[B]``.
        outputs: z of the last layer, ``[B, o, n]``.
        weights: W ``[B, o, i]``, a bias as last column.
        gradients: ``∂L/∂W``, the same.
    """

    inputs: list[Tensor]
    errors: list[Tensor]
    squares: list[Tensor]
    outputs: Tensor
    weights: list[Tensor]
    gradients: list[Tensor]

    @staticmethod
    @torch.no_grad()
    def of(done: Pass) -> Observation:
        """Of a pass that has been made backwards too."""
        mlp = done.mlp
        hidden = [h if h.dim() == 3 else h[None] for h in done.hidden]  # data that all share are there once
        return Observation(
            [with_ones(h) if b else h for h, b in zip(hidden, mlp.biases, strict=True)],
            done.errors,
            [z.square().mean((-2, -1)) for z in done.pre],
            done.pre[-1],
            joined(done.weights),
            joined(done.gradient()),
        )


def joined(weights: Weights) -> list[Tensor]:
    """Each layer's matrix with its bias as last column."""
    pairs = zip(weights.matrices, weights.biases, strict=True)
    return [W if b is None else torch.cat([W, b.unsqueeze(-1)], -1) for W, b in pairs]


def parted(layers: Sequence[Tensor], biases: Sequence[bool]) -> Weights:
    """The inverse of :func:`joined`."""
    pairs = list(zip(layers, biases, strict=True))
    return Weights(tuple(w[..., :-1] if b else w for w, b in pairs), tuple(w[..., -1] if b else None for w, b in pairs))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def _norm(a: Tensor) -> Tensor:
    return a.square().sum((-2, -1)).sqrt()


def _stacked(values: Iterable[Tensor]) -> Tensor:
    """A value for each layer, ``[B, layers]``."""
    return torch.stack(list(values), -1)


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(_TINY).log()


@dataclass(frozen=True)
class EquivariantStates:
    """What ``[B]`` trajectories remember of their steps.

    Attributes:
        age: Steps done.
        lstm: Memory of the controller, ``[B · layers, hidden]``.
        log_rate: Log of the step size of each layer, ``[B, layers]``.
        unit: What it is measured in, ``[B, layers]``.
        velocity: V of each layer, as large as its weights.
        direction: D of the last step, the same.
        last: The last change of the weights as ``a V + b D``: a and b, ``[B, layers, 2]``.
        slope: ``⟨∇W, D⟩`` where D was made, ``[B, layers]``.
        predicted: ``⟨∇L, change⟩`` of the last step, ``[B]``.
        level: Log of the loss, up to a constant, at the beginning and at the last point that was kept, ``[B, 2]``.
        reach: Log of the relative change of each layer's pre-activations by the last step, ``[B, layers]``.
        length: Log of ``‖∇W‖`` where D was made, ``[B, layers]``.
        input_moments: Running average of ``hhᵀ/n``, for each layer.
        error_moments: The same of ``δδᵀ``, each divided by its trace.
        averaged: Batches in the averages.
        inputs: Spectra of the moments in use.
        errors: The same of the errors.
        renew: Age at which each layer's spectra are computed anew.
        fingerprint: Of the last batch, ``[3]``.
    """

    age: int
    lstm: LSTMState
    log_rate: Tensor
    unit: Tensor
    velocity: list[Tensor]
    direction: list[Tensor]
    last: Tensor
    slope: Tensor
    predicted: Tensor
    level: Tensor
    reach: Tensor
    length: Tensor
    input_moments: list[Tensor]
    error_moments: list[Tensor]
    averaged: int
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
        found = {"counters": torch.tensor([self.age, self.averaged, *self.renew], dtype=torch.float64)}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("age", "averaged", "renew"):
                continue
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                name = f"{f.name}_{number}" if isinstance(value, list) else f.name
                if isinstance(part, Spectrum):
                    found |= {f"{name}_{key}": t for key, t in part._asdict().items()}
                elif isinstance(part, LSTMState):
                    found |= {f"{name}_hidden": part.hidden[0], f"{name}_cell": part.cell[0]}
                else:
                    found[name] = part
        return found

    @staticmethod
    def from_tensors(found: dict[str, Tensor]) -> EquivariantStates:
        """The inverse of :meth:`tensors`.

        Raises:
            KeyError: Something is missing.
        """
        layers = range(found["log_rate"].shape[-1])

        def spectra(name: str) -> list[Spectrum]:
            return [Spectrum(*(found[f"{name}_{i}_{key}"] for key in Spectrum._fields)) for i in layers]

        age, averaged, *renew = map(int, found["counters"].tolist())
        return EquivariantStates(
            age=age,
            averaged=averaged,
            lstm=LSTMState((found["lstm_hidden"],), (found["lstm_cell"],)),
            inputs=spectra("inputs"),
            errors=spectra("errors"),
            renew=renew,
            **{name: [found[f"{name}_{i}"] for i in layers] for name in _PER_LAYER},  # type: ignore[arg-type]
            **{name: found[name] for name in _JOINT},  # type: ignore[arg-type]
        )


_PER_LAYER = ("velocity", "direction", "input_moments", "error_moments")
_JOINT = ("log_rate", "unit", "last", "slope", "predicted", "level", "reach", "length", "fingerprint")


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


class EquivariantOptimizer(nn.Module):
    """See the module; works on every :class:`~metatele.mlp.MLP`.

    Args:
        config: Sizes, and what is learned.
        seed: For the initial meta-parameters.

    Example:
        >>> from metatele.activations import Tanh
        >>> from metatele.losses import MeanSquaredError
        >>> from metatele.mlp import MLP
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

    def __init__(self, config: EquivariantConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.lstm = StackedLSTM(FEATURES + hidden, hidden, OUTPUTS, 1, generator(seed, "initialisation"))
        with torch.no_grad():
            self.lstm.head_weight.mul_(0.3)
            self.lstm.head_bias.zero_()
        # What the outputs take from the numbers directly: at first, a step that could have been longer
        # (the gradient still points its way) makes the next one longer.
        direct = torch.zeros(OUTPUTS, FEATURES)
        direct[0, 1] = _FOLLOW
        self.direct = nn.Parameter(direct)

    # --- a step

    def step(self, seen: Observation, states: EquivariantStates | None) -> EquivariantStep:
        """The change of the weights after a pass at them; ``None`` in place of states at the beginning.

        Differentiable in the meta-parameters, and through the states in those of earlier steps; what was seen is
        a constant.
        """
        states, same = self._observed(seen, states)
        now = level(seen.outputs, seen.errors[-1])
        finite = torch.isfinite(now)
        length = _stacked(_norm(g) for g in seen.gradients)
        if not bool(torch.isfinite(length).all()):
            gradients = [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in seen.gradients]
            seen = seen._replace(gradients=gradients)
            length = _stacked(_norm(g) for g in gradients)
        length = _log(length)
        if states.age == 0:
            states = dataclasses.replace(states, level=torch.stack([now, now], -1), length=length)
        rise = now - states.level[:, 1]
        controls, lstm = self._control(self._features(seen, states, now, length, same), states)
        D, reaches = [], []
        for layer, gradient in enumerate(seen.gradients):
            damping, power = controls.damping[..., layer], controls.power[..., layer]
            left = states.errors[layer].from_left(gradient, damping[1], power[1])
            spectrum = states.inputs[layer]
            d, size = spectrum.from_right(left / spectrum.scale[:, None, None], damping[0], power[0])
            D.append(d)
            # D changes the layer's pre-activations by so much, in units of how large they are.
            reaches.append((size / gradient.shape[-2] / (seen.squares[layer] + _FLOOR)).clamp_min(_TINY).sqrt())
        reach = torch.stack(reaches, -1)
        reach = torch.where(torch.isfinite(reach) & (reach > 2 * _TINY**0.5), reach, 0.0)
        if states.age == 0:
            states = dataclasses.replace(
                states, unit=torch.where(reach > 0, 1 / torch.where(reach > 0, reach, 1.0), 0.0)
            )
        reach = reach.detach()
        furthest = _log(self.config.reach / (states.unit.detach() * reach).clamp_min(_TINY))
        log_rate = torch.minimum(states.log_rate + controls.growth, furthest)
        rate = (log_rate.exp() * states.unit).unsqueeze(-1).unsqueeze(-1)
        beta, nu = controls.momentum, controls.nesterov
        V, changes = [], []
        # The change is V + ν(βV - ηD - V) = a V + b D, V the new velocity.
        a, b = 1 - nu + nu * beta, -nu * rate[..., 0, 0]
        for layer, d in enumerate(D):
            V.append(beta[:, layer, None, None] * states.velocity[layer] - rate[:, layer] * d)
            changes.append(a[:, layer, None, None] * V[-1] + b[:, layer, None, None] * d)
        last = torch.stack([a, b], -1)
        slope = torch.stack([_inner(g, d) for g, d in zip(seen.gradients, D, strict=True)], -1)
        predicted = sum((_inner(g, c) for g, c in zip(seen.gradients, changes, strict=True)), torch.zeros_like(now))
        # Two mini-batches differ anyway.
        shorten = (rise > math.log(self.config.growth) * (1 if same else 2)) | ~finite
        kept = now
        reach = _log(reach * states.unit.detach()) + log_rate.detach()
        if states.age and bool(shorten.any()):
            at = shorten[:, None, None]
            old = [self._last_change(states, layer) for layer in range(len(D))]
            changes = [torch.where(at, (_SHORTEN - 1) * o, c) for o, c in zip(old, changes, strict=True)]
            # What is left of the step becomes the velocity, and is the last change.
            V = [torch.where(at, _SHORTEN * o, v) for o, v in zip(old, V, strict=True)]
            D = [torch.where(at, o, d) for o, d in zip(states.direction, D, strict=True)]
            left = torch.stack([torch.ones_like(a), torch.zeros_like(b)], -1)
            last = torch.where(at, left, last)
            log_rate = torch.where(shorten[:, None], states.log_rate + math.log(_SHORTEN), log_rate)
            slope = torch.where(shorten[:, None], states.slope, slope)
            predicted = torch.where(shorten, _SHORTEN * states.predicted, predicted)
            # Another batch does not tell how good the old point was: an easy one must not stop all later steps.
            kept = torch.where(shorten if same else ~finite, states.level[:, 1], now)
            length = torch.where(shorten[:, None], states.length, length)
            reach = torch.where(shorten[:, None], states.reach + math.log(_SHORTEN), reach)
        new = dataclasses.replace(
            states,
            age=states.age + 1,
            lstm=lstm,
            log_rate=log_rate,
            velocity=V,
            direction=[d.detach() for d in D],
            last=last.detach(),
            slope=slope.detach(),
            predicted=predicted.detach(),
            level=torch.stack([states.level[:, 0], kept], -1),
            reach=reach,
            length=length,
        )
        return EquivariantStep(changes, new, shorten)

    @staticmethod
    def _last_change(states: EquivariantStates, layer: int) -> Tensor:
        a, b = states.last[:, layer, :, None, None].unbind(1)
        return (a * states.velocity[layer] + b * states.direction[layer]).detach()

    # --- moments

    @torch.no_grad()
    def _observed(self, seen: Observation, states: EquivariantStates | None) -> tuple[EquivariantStates, bool]:
        """States with the moments of a batch taken in, and whether it is the batch of the step before."""
        x = torch.nan_to_num(seen.inputs[0], nan=0.0, posinf=0.0, neginf=0.0)
        ramp = torch.linspace(-1, 1, x.shape[-2], dtype=x.dtype, device=x.device).unsqueeze(-1)
        fingerprint = torch.stack([x.sum(), x.square().sum(), (ramp * x).sum()])
        if states is None:
            states = self._initial(seen, fingerprint)
        tolerance = 1e-5 * fingerprint[1].abs()
        same = states.age > 0 and bool(((fingerprint - states.fingerprint).abs() <= tolerance).all())
        decay = 0.0 if same or states.age == 0 else self.config.averaging
        averaged = 1 if decay == 0 else states.averaged + 1
        # A running average that begins with equal weights.
        share = max(1 - decay, 1 / averaged)
        renewed: dict[str, Any] = {name: [] for name in ("input_moments", "error_moments", "inputs", "errors", "renew")}
        for layer, (h, e) in enumerate(zip(seen.inputs, seen.errors, strict=True)):
            # The work for a spectrum grows with the cube of the width, that for a step with its square.
            period = max(1, math.ceil((max(h.shape[-2], e.shape[-2]) / self.config.small) ** 2))
            if states.age and not same:
                period = max(period, _SLOW)
            due = states.age >= states.renew[layer]
            # Running averages need not take in every batch between two spectra.
            if due or same or states.age % max(1, min(period // _SLOW, _STRIDE, states.age // 4)) == 0:
                S, G = h @ h.mT / h.shape[-1], e @ e.mT
                G = G / G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(_TINY)
                if states.age and share < 1:
                    S = states.input_moments[layer].lerp(S, share)
                    G = states.error_moments[layer].lerp(G, share)
            else:
                S, G = states.input_moments[layer], states.error_moments[layer]
            renewed["input_moments"].append(S)
            renewed["error_moments"].append(G)
            renewed["inputs"].append(Spectrum.of(S, self.config.keep) if due else states.inputs[layer])
            renewed["errors"].append(Spectrum.of(G, self.config.keep) if due else states.errors[layer])
            wait = min(period, states.age // 2 + 1) if due else 0
            renewed["renew"].append(states.age + wait if due else states.renew[layer])
        return dataclasses.replace(states, averaged=averaged, fingerprint=fingerprint, **renewed), same

    def _initial(self, seen: Observation, fingerprint: Tensor) -> EquivariantStates:
        batch, layers = seen.gradients[0].shape[0], len(seen.gradients)
        like = seen.gradients[0]
        zeros = [torch.zeros_like(g) for g in seen.gradients]
        return EquivariantStates(
            age=0,
            lstm=self.lstm.initial_state(batch * layers),
            log_rate=like.new_full((batch, layers), _START),
            unit=like.new_ones(batch, layers),
            velocity=zeros,
            direction=zeros,
            last=like.new_zeros(batch, layers, 2),
            slope=like.new_zeros(batch, layers),
            predicted=like.new_zeros(batch),
            level=like.new_zeros(batch, 2),
            reach=like.new_zeros(batch, layers),
            length=like.new_zeros(batch, layers),
            input_moments=[],
            error_moments=[],
            averaged=0,
            inputs=[],
            errors=[],
            renew=[0] * layers,
            fingerprint=fingerprint,
        )

    # --- control

    @torch.no_grad()
    def _features(
        self, seen: Observation, states: EquivariantStates, now: Tensor, length: Tensor, same: bool
    ) -> Tensor:
        """Numbers about each layer, ``[B, layers, FEATURES]``, free of units and of the order of units."""
        layers, n = len(seen.gradients), seen.inputs[0].shape[-1]
        changes = [self._last_change(states, layer) for layer in range(layers)]
        ahead = _stacked(_inner(g, c) for g, c in zip(seen.gradients, changes, strict=True))
        along = _stacked(_inner(g, d) for g, d in zip(seen.gradients, states.direction, strict=True))
        size = _log(_stacked(map(_norm, changes)))
        weight = _log(_stacked(map(_norm, seen.weights)))
        one = torch.ones_like(length)
        overall = -ahead.sum(-1) / (states.predicted.abs() + _TINY)
        trend = (now - states.level[:, 1]).nan_to_num(3.0).clamp(-3, 3)
        since = (now - states.level[:, 0]).nan_to_num(10.0).clamp(-40, 10)
        rooms = [math.log(n / h.shape[-2]) / 2 for h in seen.inputs]
        place = [[float(layer == 0), float(layer == layers - 1), layers - 3.0] for layer in range(layers)]
        fixed = torch.tensor(
            [
                [math.log(states.age + 1) / 3, float(same), room, *where]
                for room, where in zip(rooms, place, strict=True)
            ],
            dtype=length.dtype,
        ).to(length.device)
        columns = torch.stack(
            [
                (along / (states.slope + _TINY)).nan_to_num(0.0, 0.0, 0.0).clamp(-3, 1.5),
                overall.nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3).unsqueeze(-1) * one,
                (ahead / (length + size).exp().clamp_min(_TINY)).nan_to_num(0.0).clamp(-1, 1),
                trend.unsqueeze(-1) * one,
                since.unsqueeze(-1) / 8 * one,
                _stacked(s.participation.expand_as(now) for s in states.inputs).log() / 2,
                _stacked(s.participation for s in states.errors).log() / 2,
                (size - weight).nan_to_num(0.0).clamp(-20, 3) / 4,
                states.reach.clamp(-20, 5) / 4,
                (length - states.length).nan_to_num(0.0).clamp(-5, 5) / 2,
            ],
            -1,
        )
        return torch.cat([columns, fixed.expand(len(now), -1, -1)], -1)

    def _control(self, features: Tensor, states: EquivariantStates) -> tuple[_Controls, LSTMState]:
        """The outputs of the controller for each layer."""
        batch, layers, _ = features.shape
        hidden = states.lstm.hidden[0].view(batch, layers, -1)
        others = hidden.mean(1, keepdim=True).expand_as(hidden)
        output, lstm = self.lstm(torch.cat([features, others], -1).flatten(0, 1), states.lstm)
        y = (output.view(batch, layers, OUTPUTS) + features @ self.direct.mT).unbind(-1)
        return (
            _Controls(
                growth=_LARGEST * torch.tanh(y[0] / 2),
                damping=torch.stack([(6 * torch.tanh(y[1] / 2) - 2.3).exp(), (6 * torch.tanh(y[2] / 2) - 2.3).exp()]),
                power=torch.stack([torch.sigmoid(y[3] + 2), torch.sigmoid(y[4])]),
                momentum=torch.sigmoid(y[5] + 1.4),
                nesterov=torch.sigmoid(y[6]),
            ),
            lstm,
        )


class _Controls(NamedTuple):
    """For each trajectory and layer, ``[B, layers]``; damping and power for inputs and for errors, ``[2, ...]``."""

    growth: Tensor
    damping: Tensor
    power: Tensor
    momentum: Tensor
    nesterov: Tensor
