"""How each family of meta-optimizers makes a step of one model."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metatele.errors import MetateleError, ShapeMismatchError
from metatele.learned import EquivariantOptimizer, EquivariantStates, LSTMState, MetaOptimizer, MoveStates, Observation
from metatele.learned.equivariant.observation import inner
from metatele.learned.equivariant.old_states import read_old
from metatele.network.bias import with_ones
from metatele.network.capture import PassCapture
from metatele.network.sequential import describe
from metatele.network.use import Fingerprint, Moment, Use
from metatele.perceptron.mlp import MLP
from metatele.symmetry import drift

_T = TypeVar("_T")
_FEW = 16  # samples of a mini-batch, below which the equivariant family is no good
_LARGE = 2**30  # bytes of state that are worth a warning


@dataclass(frozen=True)
class Situation:
    """Where a model is.

    Attributes:
        parameters: Those of the layers, in their order.
        rates: Factor on the update of each; zero where it does not move.
        stored: The memories, as tensors by name; empty at the beginning.
        group: The first parameter group, for ``max_drift``, ``drift`` and ``rolled_back``.
        dtype: What steps are computed in.
    """

    parameters: Sequence[Tensor]
    rates: Sequence[float]
    stored: dict[str, Tensor]
    group: dict[str, Any]
    dtype: torch.dtype

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Of each parameter; zero where there is none or it does not move."""
        return [
            p.grad.to(self.dtype) if rate and p.grad is not None else torch.zeros_like(p, dtype=self.dtype)
            for p, rate in zip(self.parameters, self.rates, strict=True)
        ]

    @property
    def whole(self) -> bool:
        """Whether every parameter moves."""
        return all(self.rates)

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector ``[P]`` of what there is for each parameter."""
        return torch.cat([part.flatten() for part in parts]).to(self.dtype)

    @property
    def weights(self) -> Tensor:
        """All parameters as one vector."""
        return self.flat(self.parameters)

    @property
    def scale(self) -> Tensor:
        """The factor on each entry of that vector."""
        return self.flat(
            [torch.full_like(p, r, dtype=self.dtype) for p, r in zip(self.parameters, self.rates, strict=True)]
        )

    def write(self, flat: Tensor) -> None:
        """Put the parameters that move where a vector says."""
        parts = flat.split([p.numel() for p in self.parameters])
        for p, part, rate in zip(self.parameters, parts, self.rates, strict=True):
            if rate:
                p.copy_(part.view_as(p))


class Family(ABC):
    """A meta-optimizer as it steps a model.

    Args:
        meta: The meta-optimizer.
        linears: The model's layers.
        mlp: Its shape.
    """

    meta: nn.Module

    @property
    @abstractmethod
    def needs_passes(self) -> bool:
        """Whether a step needs what the passes saw."""

    @abstractmethod
    def advance(self, at: Situation) -> dict[str, Tensor]:
        """Move the parameters; returns the memories to keep."""

    def forget(self) -> None:  # noqa: B027 (nothing is kept by default)
        """What a family keeps beside the stored memories is out of date: they were loaded."""

    @abstractmethod
    def idle(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Memories of a model that has not moved, so that there are some to save."""

    @abstractmethod
    def check_stored(self, found: dict[str, tuple[int, ...]]) -> None:
        """Refuse memories, given by their shapes, of another optimizer or model.

        Raises:
            ShapeMismatchError: They are.
        """

    def __init__(self, linears: list[nn.Linear], mlp: MLP, every: bool) -> None:
        self.mlp = mlp
        self.capture = PassCapture(linears, every=every)

    def _missing(self, what: str) -> MetateleError:
        if self.capture.passes:
            return MetateleError(f"{what} needs the layer inputs, and the batch was empty")
        return MetateleError(
            f"{what} needs the layer inputs, and no gradient was taken through a forward pass "
            "of the model since the last step or zero_grad"
        )


def family_of(meta: Any, linears: list[nn.Linear], mlp: MLP) -> Family:
    """The family a meta-optimizer belongs to.

    Raises:
        ShapeMismatchError: It is for networks of another shape.
        TypeError: It is none.
    """
    if isinstance(meta, MetaOptimizer):
        return Flat(meta, linears, mlp)
    if isinstance(meta, EquivariantOptimizer):
        return Equivariant(meta, linears, mlp)
    raise TypeError(f"checkpoint must be a path, a Checkpoint or a meta-optimizer, got {type(meta).__name__}")


class Flat(Family):
    """The paper's LSTMs, which read the gradient as one vector and are for one shape."""

    meta: MetaOptimizer

    def __init__(self, meta: MetaOptimizer, linears: list[nn.Linear], mlp: MLP) -> None:
        if mlp != meta.mlp:
            raise ShapeMismatchError(f"the model is {describe(mlp)}, the checkpoint is for {describe(meta.mlp)}")
        super().__init__(linears, mlp, every=False)
        self.meta = meta

    @property
    def needs_passes(self) -> bool:
        """With a method that teleports, always."""
        return self.meta.teleport is not None

    def advance(self, at: Situation) -> dict[str, Tensor]:
        """One local move and one teleport."""
        weights, inputs = at.weights, None
        if self.meta.teleport is not None and at.whole:
            inputs = self.capture.inputs(at.dtype)
            if inputs is None:
                raise self._missing("a teleport")
            inputs = inputs.unsqueeze(0)
            if not bool(torch.isfinite(inputs).all()):
                at.group["rolled_back"] += 1
                inputs = None
        states = read_states(at.stored, self.meta).map(lambda t: t.to(weights.device))
        gradient = at.flat(at.gradients)
        done = self.meta.step(weights[None], gradient[None], states, inputs, local_scale=at.scale)
        kept = write_states(done.states)
        if inputs is None:
            at.write(done.weights[0])
            return kept
        before, after = self.mlp.unflatten(done.local), self.mlp.unflatten(done.weights)
        at.group["drift"] = float(drift(self.mlp, before, after, inputs))
        if bool(torch.isfinite(done.weights).all()) and at.group["drift"] <= at.group["max_drift"]:
            at.write(done.weights[0])
            return kept
        at.group["rolled_back"] += 1
        at.write(done.local[0])
        return kept

    def idle(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the base class."""
        return write_states(read_states(stored, self.meta))

    def check_stored(self, found: dict[str, tuple[int, ...]]) -> None:
        """See the base class."""
        expected = {name: tuple(t.shape) for name, t in write_states(self.meta.initial_states(1)).items()}
        if found and found != expected:
            raise ShapeMismatchError(f"the state does not belong to this checkpoint: expected {expected}, got {found}")


class Equivariant(Family):
    """The family that takes networks of any shape."""

    meta: EquivariantOptimizer

    def __init__(self, meta: EquivariantOptimizer, linears: list[nn.Linear], mlp: MLP) -> None:
        super().__init__(linears, mlp, every=True)
        self.meta = meta
        self._last: tuple[Tensor, int, EquivariantStates] | None = None
        self._warned = False
        needed = meta.state_bytes(mlp)
        if needed > _LARGE:
            warnings.warn(
                f"the optimizer's state will take {needed / 2**30:.1f} GiB, for second moments of the layers' "
                f"{max(mlp.widths)} inputs or outputs",
                stacklevel=4,
            )

    @property
    def needs_passes(self) -> bool:
        """Always."""
        return True

    def advance(self, at: Situation) -> dict[str, Tensor]:
        """Teleport, step, pull back: nothing drifts."""
        states = self._states(at)
        # Part of the way, or part of the layers, would not keep the outputs.
        if not at.stored and self.meta.opens(self.mlp) and all(rate == 1 for rate in at.rates):
            return self._opened(at)
        seen = self._seen(at)
        done = self.meta.step(seen, states, spend=True)
        samples = seen.samples
        if done.states.averaged == 2 and samples < _FEW and not self._warned:  # the second that differs
            self._warned = True
            warnings.warn(
                f"batches of {samples} samples are too noisy for a learned optimizer of this family, which may come to "
                f"stand still: take at least {_FEW} samples, or step after several backward passes",
                stacklevel=6,
            )
        at.group["rolled_back"] += int(done.shortened)
        pairs = zip(self._by_layer(at.parameters), self._by_layer(at.rates), done.changes, strict=True)
        for parameters, rates, change in pairs:
            d = parameters[0].shape[1]
            for p, rate, part in zip(parameters, rates, (change[0, :, :d], change[0, :, -1]), strict=False):
                if rate:
                    p.add_(part, alpha=rate)
        kept = done.states.tensors(since=states)
        self._last = kept["counters"], kept["counters"]._version, done.states
        self._watch(done.states)
        return kept

    def _states(self, at: Situation) -> EquivariantStates | None:
        """The memories: those that were made of the stored tensors, or made now."""
        if "counters" not in at.stored:
            return None
        counters = at.stored["counters"]
        device = at.parameters[0].device
        if self._last is not None:
            last, version, states = self._last
            if last is counters and version == counters._version and states.predicted.device == device:
                return states
        found = {name: t.to(device) for name, t in at.stored.items()}
        states = read_old(found) if "pace" in found else EquivariantStates.from_tensors(found)
        # What is loaded between a pass and its step may ask for what was not kept of it.
        return states if self.capture.complete else states.but(until=max(states.until, states.age + 1))

    def _watch(self, states: EquivariantStates | None) -> None:
        """Keep of the next passes what the step will read."""
        self.capture.whole = states is None or states.looks
        self.capture.keeps = states is None or states.looks or states.looks_next

    def forget(self) -> None:
        """The memories were replaced from outside."""
        self._last = None
        self._watch(None)

    def _seen(self, at: Situation) -> Observation:
        """What the passes saw."""
        gradients = [
            (g[0] if len(g) == 1 else torch.cat([g[0], g[1].unsqueeze(-1)], -1))[None]
            for g in self._by_layer(at.gradients)
        ]
        ends = self.capture.ends(at.dtype)
        if ends is None:
            raise self._missing("a step")
        data, outputs, error = (t[None] for t in ends)
        return Observation(
            gradients,
            data.shape[-1],
            lambda: Fingerprint.of(data),
            outputs,
            error,
            lambda wanted: self._uses(at, wanted),
            lambda: self._sizes(at),
        )

    def _uses(self, at: Situation, wanted: Collection[int]) -> list[Use]:
        """What the passes saw of all layers."""
        found = self.capture.layers(at.dtype)
        assert found is not None
        uses = []
        columns = zip(found.inputs, found.gradients, found.squares, self.mlp.biases, strict=True)
        for layer, (h, e, square, biased) in enumerate(columns):
            n, inputs, errors = h.shape[-1], None, None
            if layer in wanted:
                dense, rank = self.meta.config.dense, self.meta.config.rank
                inputs = Moment.of((with_ones(h) if biased else h)[None], dense, rank).over(n)
                errors = Moment.of(e[None], dense, rank)
            uses.append(Use(inputs, errors, square[None], n))
        return uses

    def _sizes(self, at: Situation) -> Tensor:
        """``‖W‖²`` of each layer with its bias."""
        squares = inner(*([[p.to(at.dtype)[None] for p in at.parameters]] * 2))[0]
        return torch.stack([torch.stack(s).sum() for s in self._by_layer(squares.unbind())])[None]

    def __getstate__(self) -> dict[str, Any]:
        """The memories travel as the optimizer's state."""
        return {**self.__dict__, "_last": None}

    def _by_layer(self, parts: Sequence[_T]) -> Iterator[tuple[_T, ...]]:
        """What there is for each parameter, for each layer."""
        rest = iter(parts)
        for biased in self.mlp.biases:
            yield tuple(islice(rest, 1 + biased))

    def _opened(self, at: Situation) -> dict[str, Tensor]:
        """The teleport before the first step."""
        inputs = self.capture.inputs(at.dtype)
        if inputs is None:
            raise self._missing("a step")
        opened = self.meta.opening(self.mlp, at.weights[None], inputs)
        at.group["rolled_back"] += int(not opened.moved)
        at.write(opened.weights[0])
        return {"opened": torch.ones(1)}

    def idle(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the base class."""
        return stored

    def check_stored(self, found: dict[str, tuple[int, ...]]) -> None:
        """See the base class."""
        velocity = {
            name.removeprefix("motion.").replace(".", "_"): shape
            for name, shape in found.items()
            if name.startswith(("velocity_", "motion.velocity."))
        }
        sizes = zip(self.mlp.widths[1:], self.mlp.widths, self.mlp.biases, strict=False)
        expected = {f"velocity_{i}": (1, o, d + b) for i, (o, d, b) in enumerate(sizes)}
        if found and set(found) != {"opened"} and velocity != expected:
            raise ShapeMismatchError(
                f"the state does not belong to this model: expected {expected}, got {velocity or sorted(found)[:3]}"
            )


def read_states(stored: dict[str, Any], meta: MetaOptimizer) -> MoveStates:
    """Memories of one trajectory from the tensors an optimizer stores, or empty ones."""
    states = meta.initial_states(1)
    if "local_hidden_0" not in stored:
        return states

    def read(name: str, like: LSTMState | None) -> LSTMState | None:
        if like is None:
            return None
        layers = range(len(like.hidden))
        return LSTMState(
            tuple(stored[f"{name}_hidden_{i}"] for i in layers), tuple(stored[f"{name}_cell_{i}"] for i in layers)
        )

    local = read("local", states.local)
    assert local is not None
    return MoveStates(local, read("teleport", states.teleport), stored["age"], stored["smallest"])


def write_states(states: MoveStates) -> dict[str, Tensor]:
    """The inverse of :func:`read_states`: plain floating tensors by name."""
    stored = {"age": states.age.clone(), "smallest": states.smallest.clone()}
    for name, state in (("local", states.local), ("teleport", states.teleport)):
        if state is not None:
            # Clones: zero memories are one tensor, and some tools load state in place.
            stored |= {f"{name}_hidden_{i}": t.clone() for i, t in enumerate(state.hidden)}
            stored |= {f"{name}_cell_{i}": t.clone() for i, t in enumerate(state.cell)}
    return stored
