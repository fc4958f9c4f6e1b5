"""Any module's matrices on a batch that comes again and again: the equivariant family steps them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatele.learned import EquivariantOptimizer, EquivariantStates, Observation
from metatele.learned.general.memory import places
from metatele.network.reduced import Look
from metatele.network.totals import PartSeen
from metatele.network.use import Fingerprint, Moment, Use
from metatele.network.watch import Watch
from metatele.optim.scenes import ends_of
from metatele.optim.steppers import Memory

PREFIX = "one."  # names of what is remembered of a parameter here begin so, behind the place of a part
_COLUMNS = 8192  # of a part, up to which its moments are exact


class Stepped(NamedTuple):
    """A step on one batch.

    Attributes:
        changes: Of the parts by number, ``[1, o, i]``.
        vectors: Of the vectors.
        same: Whether the batch was the last one again.
        shortened: Whether most of the last step was taken back instead.
    """

    changes: dict[int, Tensor]
    vectors: list[Tensor]
    same: bool
    shortened: bool


class OneBatch:
    """Teleport, step and pull back matrices of any module; see :mod:`metatele.learned.equivariant`.

    Parts whose inputs and errors were not seen, and those of several groups, are not its own.

    Args:
        meta: The equivariant family's optimizer.
        watch: What the passes show.

    Attributes:
        states: Memories; ``None`` before the first step.
        layers: Numbers of the parts that it steps.
    """

    def __init__(self, meta: EquivariantOptimizer, watch: Watch) -> None:
        self.meta, self.watch = meta, watch
        self.states: EquivariantStates | None = None
        self.layers: list[int] = []

    def look(self) -> Look:
        """What the next pass is to be asked for."""
        config = self.meta.config
        layers = frozenset(self.layers) if self.layers else frozenset(range(len(self.watch.parts)))
        dtype = next(self.meta.parameters()).dtype
        return Look(
            moments=layers,
            errors=layers,
            ends=True,
            fingerprint=True,
            dtype=dtype,
            widest=config.dense,
            rank=config.rank,
            columns=_COLUMNS,
        )

    def step(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        vectors: Sequence[tuple[Tensor, Tensor]],
        sign: float,
    ) -> Stepped | None:
        """The next change; ``None`` if the passes did not show enough for one.

        Args:
            gradients: Of all parts, ``[g, o, i]``.
            weights: The same.
            vectors: Gradient and value of each vector, which is a matrix with one input that is always 1.
            sign: -1 where the objective is maximized.
        """
        dtype = next(self.meta.parameters()).dtype
        seen, ends, fingerprint = self.watch.seen(), ends_of(self.watch, dtype), self.watch.fingerprint()
        if ends is None or fingerprint is None:
            return None
        if self.states is None:
            self.layers = [
                number
                for number, one in seen.items()
                if isinstance(one.inputs, Moment)
                and one.errors is not None
                and one.columns
                and len(gradients[number]) == 1
            ]
        if not self.layers or any(number not in seen for number in self.layers):
            return None
        observed = self._observation(seen, ends, fingerprint, gradients, weights, vectors, sign)
        done = self.meta.step(observed, self.states, spend=False)
        first = self.states is None
        self.states = done.states
        changes = dict(zip(self.layers, done.changes, strict=False))
        moved = [change.flatten() for change in done.changes[len(self.layers) :]]
        return Stepped(changes, moved, first or done.states.age < 3 or done.states.same, bool(done.shortened.any()))

    # --- memories

    def laid_out(self, memory: Memory) -> dict[str, Any]:
        """Put what belongs to parameters into their entries; returns the rest, all of it to the bit.

        Args:
            memory: Entries by parameter.
        """
        if self.states is None:
            return {"layers": list(self.layers)}
        joint, layers = self.states.parts()
        elsewhere: dict[str, dict[str, Tensor]] = {}
        for number, ((p, prefix), layer) in enumerate(zip(self._homes(), layers, strict=True)):
            if p in memory:
                memory[p].update({prefix + name: t for name, t in layer.items()})
            else:  # it is in no group
                elsewhere[str(number)] = dict(layer)
        return {"layers": list(self.layers), "joint": joint, "elsewhere": elsewhere}

    def read(self, stored: Mapping[str, Any], memory: Memory) -> None:
        """The inverse of :meth:`laid_out`."""
        self.layers = list(stored["layers"])
        if "joint" not in stored:
            return
        layers = []
        like = torch.empty(0, dtype=next(self.meta.parameters()).dtype, device=self.watch.parts[0].weight.device)
        for number, (p, prefix) in enumerate(self._homes()):
            entry = memory.get(p, {})
            mine = {name.removeprefix(prefix): t for name, t in entry.items() if name.startswith(prefix)}
            mine = stored["elsewhere"].get(str(number)) or mine
            layers.append({name: t.detach().to(like.device) for name, t in mine.items()})
        self.states = EquivariantStates.from_parts(dict(stored["joint"]), layers, like)

    def _homes(self) -> list[tuple[Tensor, str]]:
        """Whose entry each layer's memories lie in, and what their names begin with there."""
        every: list[tuple[Tensor, str]] = [
            (part.weight, f"{prefix}{PREFIX}") for _, prefix, part in places(self.watch.parts)
        ]
        return [every[n] for n in self.layers] + [(p, PREFIX) for _, p in self.watch.vectors]

    def _observation(
        self,
        seen: dict[int, PartSeen],
        ends: tuple[Tensor, Tensor],
        fingerprint: Fingerprint,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        vectors: Sequence[tuple[Tensor, Tensor]],
        sign: float,
    ) -> Observation:
        dtype = next(self.meta.parameters()).dtype
        outputs, error = ends
        samples = outputs.shape[-1]
        mine = [gradients[number] for number in self.layers]
        uses = []
        for number in self.layers:
            one = seen[number]
            square = one.square(weights[number])
            square = gradients[number].new_zeros(1) if square is None else square.mean().reshape(1)
            uses.append(Use(_first(one.inputs), one.errors, square, one.columns))

        for gradient, value in vectors:
            n = value.numel()
            always = value.new_ones(1, 1, 1)
            mine.append(gradient.reshape(1, n, 1))
            even = (
                Moment(torch.eye(n, dtype=dtype, device=value.device)[None])
                if n <= self.meta.config.dense
                else Moment(value.new_zeros(1, n, 1), always)
            )
            uses.append(Use(Moment(always), even, value.square().mean().reshape(1), samples))

        def used(wanted: Collection[int]) -> list[Use]:
            return uses

        def sizes() -> Tensor:
            squares = [weights[number].square().sum() for number in self.layers]
            return torch.stack([*squares, *(value.square().sum() for _, value in vectors)])[None]

        return Observation(mine, samples, lambda: fingerprint, outputs[None], sign * error[None], used, sizes)


def _first(moment: Moment | Tensor | None) -> Moment | None:
    return moment if isinstance(moment, Moment) else None


def under(memory: Memory) -> dict[Any, dict[str, Any]]:
    """What the mode for one batch remembers."""
    return {
        p: {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
        for p, entry in memory.items()
    }
