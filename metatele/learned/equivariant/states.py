"""What an equivariant optimizer remembers of ``[B]`` trajectories, grouped by when it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.moments import LayerMoments, counted, due
from metatele.learned.equivariant.observation import Wants
from metatele.learned.equivariant.spectrum import Spectrum, Turn
from metatele.learned.lstm import LSTMState
from metatele.network.use import Moment
from metatele.perceptron.losses import KINDS


class Pace(NamedTuple):
    """How a velocity becomes the next one, ``V ← βV - ηD``, and weights change, by ``aV + bD``; each ``[B, layers]``.

    Attributes:
        momentum: β.
        rate: η.
        of_velocity: a.
        of_direction: b.
    """

    momentum: Tensor
    rate: Tensor
    of_velocity: Tensor
    of_direction: Tensor


class Bend(NamedTuple):
    """How far moments are followed: dampings λ and powers p in use, each ``[B, layers]``."""

    input_damping: Tensor
    error_damping: Tensor
    input_power: Tensor
    error_power: Tensor


class Change(NamedTuple):
    """A change ``aV + bD`` of the weights: a and b, each ``[B, layers]``."""

    of_velocity: Tensor
    of_direction: Tensor


class Motion(NamedTuple):
    """What every step changes: V and D of each layer, as large as its weights ``[B, o, i]``."""

    velocity: list[Tensor]
    direction: list[Tensor]


class Control(NamedTuple):
    """What changes where the controller looks.

    Attributes:
        memory: Of the controller, ``[B · layers, hidden]``.
        log_rate: Log of the step size of each layer, ``[B, layers]``.
        unit: What it is measured in, ``[B, layers]``; zero until a gradient has reached the layer.
        pace: Step sizes and momentum in use.
        bend: Dampings and powers in use.
        stretch: Log of the relative change of each layer's pre-activations by a step D of length 1.
        limit: ``‖D‖²`` above which D is shortened until the next look.
    """

    memory: LSTMState
    log_rate: Tensor
    unit: Tensor
    pace: Pace
    bend: Bend
    stretch: Tensor
    limit: Tensor


class Measured(NamedTuple):
    """What was measured of a step that the controller will ask about: at its looks, and at the step before each.

    Attributes:
        squares: ``‖aV + bD‖²`` of the last change, ``[B, layers]``.
        slope: ``⟨∇W, D⟩`` where D was made.
        length: Log of ``‖∇W‖²`` there.
        reach: Log of the relative change of each layer's pre-activations.
    """

    squares: Tensor
    slope: Tensor
    length: Tensor
    reach: Tensor


class Level(NamedTuple):
    """Logs of the loss, up to one constant, each ``[B]``.

    Attributes:
        start: At the beginning.
        kept: When the controller looked last, at a point that was kept.
        lowest: The lowest one, which is slowly forgotten.
    """

    start: Tensor
    kept: Tensor
    lowest: Tensor


class Spread(NamedTuple):
    """Logs of the participations of the moments in use, each ``[B, layers]``."""

    inputs: Tensor
    errors: Tensor


class Prepared(NamedTuple):
    """What steps between two looks are made of, computed once from the rest; never saved.

    Attributes:
        paces: β, η, a, b of each layer, each ``[B, 1, 1]``.
        error_turns: ``g_δᵀ g_δ`` of each layer.
        input_turns: ``g_hᵀ g_h``.
    """

    paces: list[tuple[Tensor, ...]] | None = None
    error_turns: list[Turn] | None = None
    input_turns: list[Turn] | None = None


@dataclass(frozen=True)
class EquivariantStates:
    """Memories of ``[B]`` trajectories of one shape.

    The schedule is made of plain numbers and the same for all of them.

    Attributes:
        age: Steps done.
        until: Age at which the controller looks again.
        kind: Of the loss.
        averaged: Batches in the running averages.
        same: Whether the last batch that was looked at was the one before it.
        renew: Age at which each layer's spectra are computed anew.
        fingerprint: Of the last batch that was compared, ``[4]``.
        motion: Velocities and directions.
        last: The last change of the weights.
        level: Of the loss.
        control: What the controller set.
        measured: What it will ask about.
        predicted: ``⟨∇L, change⟩`` of the last step, ``[B]``.
        moments: Of each layer.
        spread: How spread their eigenvalues are.
        prepared: What needs not be computed again.
    """

    # the schedule
    age: int
    until: int
    kind: str | None
    averaged: int
    same: bool
    renew: list[int]
    fingerprint: Tensor
    # every step
    motion: Motion
    # steps that are looked at closely, and those after which the loss had grown
    last: Change
    level: Level
    measured: Measured
    predicted: Tensor
    # looks of the controller
    control: Control
    # looks where moments or spectra are due
    moments: list[LayerMoments]
    spread: Spread
    # made of the rest
    prepared: Prepared = field(default_factory=Prepared)

    @staticmethod
    def initial(gradients: list[Tensor], memory: LSTMState, fingerprint: Tensor, start: float) -> EquivariantStates:
        """Before the first step.

        Args:
            gradients: Of each layer, for shapes.
            memory: The controller's.
            fingerprint: Of the first batch.
            start: Log of the first step size.
        """
        like, layers = gradients[0], len(gradients)
        zeros = [torch.zeros_like(g) for g in gradients]
        each, one = like.new_zeros(len(like), layers), like.new_zeros(len(like))
        return EquivariantStates(
            age=0,
            until=0,
            kind=None,
            averaged=0,
            same=False,
            renew=[0] * layers,
            fingerprint=fingerprint,
            motion=Motion(zeros, zeros),
            last=Change(each, each),
            level=Level(one, one, one),
            measured=Measured(each, each, each, each),
            predicted=one,
            control=Control(
                memory, torch.full_like(each, start), each, Pace(*(each,) * 4), Bend(*(each,) * 4), each, each
            ),
            moments=[],
            spread=Spread(each, each),
        )

    def but(self, **changes: Any) -> EquivariantStates:
        """The same with some fields changed; unlike ``dataclasses.replace`` it does not go through all of them."""
        new = object.__new__(EquivariantStates)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def map(self, function: Callable[[Tensor], Tensor]) -> EquivariantStates:
        """The same with a function applied to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*map(apply, value))
            return type(value)(map(apply, value)) if isinstance(value, list | tuple) else value

        return EquivariantStates(**{f.name: apply(getattr(self, f.name)) for f in dataclasses.fields(self)})

    # --- when

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

        Moments are taken in where spectra are due, and by running averages now and then. Of a batch that is the last
        one again the averages know all: so it is expected of the next one if it was so of the last one.

        Args:
            config: Of the optimizer.
            pauses: Whether it may skip looks.
        """
        if not self.looks:
            return Wants(frozenset(), self.looks_next, False)
        averaged = counted(self.age, self.averaged, self.same, config)
        taken = frozenset(
            layer
            for layer, v in enumerate(self.motion.velocity)
            if self.age >= self.renew[layer]
            or (not self.same and due(self.age, averaged, v.shape[-2:], config, pauses))
        )
        return Wants(taken, True, True)

    # --- as plain tensors

    def tensors(self, since: EquivariantStates | None = None) -> dict[str, Tensor]:
        """Plain tensors by name, for files; only those not the same as in earlier states, if these are given.

        ``counters`` and ``fingerprint`` belong to all trajectories, and so do, where all see the same data, the
        tensors of ``moments.0.inputs`` and ``moments.0.input_spectrum``. All others have a row, or as many as there
        are layers, for each.
        """
        kind = -1 if self.kind is None else KINDS.index(self.kind)
        numbers = [self.age, self.until, self.averaged, kind, int(self.same), *self.renew]
        found = {"counters": torch.tensor(numbers, dtype=torch.float64)}
        for group in _TENSORS:
            value = getattr(self, group)
            if since is None:
                found.update(_named(group, value))
            elif value is not getattr(since, group):
                before = dict(_named(group, getattr(since, group)))
                found.update((name, t) for name, t in _named(group, value) if t is not before.get(name))
        return found

    @staticmethod
    def from_tensors(found: dict[str, Tensor]) -> EquivariantStates:
        """The inverse of :meth:`tensors`.

        Raises:
            KeyError: Something is missing.
        """
        age, until, averaged, kind, same, *renew = map(int, found["counters"].tolist())
        layers = range(len(renew))

        def record(cls: Any, name: str) -> Any:
            return cls(*(found[f"{name}.{field}"] for field in cls._fields))

        def moment(name: str) -> Moment:
            return Moment(found[f"{name}.tensor"], found.get(f"{name}.rest"))

        memory = LSTMState((found["control.memory.hidden.0"],), (found["control.memory.cell.0"],))
        pace, bend = record(Pace, "control.pace"), record(Bend, "control.bend")
        log_rate, unit, stretch, limit = (found[f"control.{n}"] for n in ("log_rate", "unit", "stretch", "limit"))
        return EquivariantStates(
            age=age,
            until=until,
            averaged=averaged,
            kind=None if kind < 0 else KINDS[kind],
            same=bool(same),
            renew=renew,
            fingerprint=found["fingerprint"],
            motion=Motion(*([found[f"motion.{name}.{i}"] for i in layers] for name in Motion._fields)),
            last=record(Change, "last"),
            level=record(Level, "level"),
            measured=record(Measured, "measured"),
            predicted=found["predicted"],
            control=Control(memory, log_rate, unit, pace, bend, stretch, limit),
            moments=[
                LayerMoments(
                    moment(f"moments.{i}.inputs"),
                    moment(f"moments.{i}.errors"),
                    record(Spectrum, f"moments.{i}.input_spectrum"),
                    record(Spectrum, f"moments.{i}.error_spectrum"),
                )
                for i in layers
            ],
            spread=record(Spread, "spread"),
        )

    def parts(self) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """What belongs to the network, as plain numbers, and what belongs to each layer, of one trajectory.

        Tensors of a layer are views without the dimension of trajectories, so a step that spends the memories it is
        given writes over them.

        Example:
            >>> from metatele.learned import EquivariantOptimizer
            >>> optimizer = EquivariantOptimizer(EquivariantConfig())
            >>> memory, gradients = optimizer.lstm.initial_state(2), [torch.ones(1, 4, 3), torch.ones(1, 2, 4)]
            >>> states = EquivariantStates.initial(gradients, memory, torch.ones(4), -2.0)
            >>> joint, layers = states.parts()
            >>> joint["age"], joint["renew"], layers[1]["motion.velocity"].shape, layers[1]["control.log_rate"]
            (0, [0, 0], torch.Size([2, 4]), tensor(-2.))
        """
        joint: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        joint["renew"] = list(self.renew)
        layers: list[dict[str, Tensor]] = [{} for _ in self.renew]
        for group in _TENSORS:
            for name, t in _named(group, getattr(self, group)):
                head, *rest = name.split(".")
                if group in _OF_NETWORK:
                    joint[name] = t.tolist() if name == "fingerprint" else float(t)
                elif group == "moments":
                    layers[int(rest[0])][".".join([head, *rest[1:]])] = t[0]
                elif group == "motion":
                    layers[int(rest[1])][f"{head}.{rest[0]}"] = t[0]
                else:  # [1, layers], or [layers, hidden]
                    rows = t if "memory" in rest else t[0]
                    for layer, row in zip(layers, rows, strict=True):
                        layer[name] = row
        return joint, layers

    @staticmethod
    def from_parts(joint: dict[str, Any], layers: list[dict[str, Tensor]], like: Tensor) -> EquivariantStates:
        """The inverse of :meth:`parts`, to the bit.

        Args:
            joint: What belongs to the network.
            layers: What belongs to each layer.
            like: Of the dtype and on the device of what belongs to the network.

        Raises:
            KeyError: Something is missing.
        """
        kind = -1 if joint["kind"] is None else KINDS.index(joint["kind"])
        numbers = [joint["age"], joint["until"], joint["averaged"], kind, int(joint["same"]), *joint["renew"]]
        found = {"counters": torch.tensor(numbers, dtype=torch.float64)}
        for name, value in joint.items():
            if name.split(".")[0] in _OF_NETWORK:
                found[name] = like.new_tensor(value if name == "fingerprint" else [value])
        for number, layer in enumerate(layers):
            for name, t in layer.items():
                head, *rest = name.split(".")
                if head == "moments":
                    found[".".join([head, str(number), *rest])] = t[None]
                elif head == "motion":
                    found[f"{name}.{number}"] = t[None]
        for name in layers[0]:
            if not name.startswith(("moments", "motion")):
                rows = torch.stack([layer[name] for layer in layers])
                found[name] = rows if "memory" in name else rows[None]
        return EquivariantStates.from_tensors(found)


_PLAIN = ("age", "until", "kind", "averaged", "same")
_TENSORS = ("fingerprint", "motion", "last", "level", "measured", "predicted", "control", "moments", "spread")
_OF_NETWORK = ("fingerprint", "level", "predicted")


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested records and lists, by the names and numbers that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        keys = value._fields if hasattr(value, "_fields") else range(len(value))
        for key, part in zip(keys, value, strict=True):
            yield from _named(f"{name}.{key}", part)
