"""How each family of meta-optimizers makes a step of one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import MetateleError, ShapeMismatchError
from metatele.metaopt import EquivariantOptimizer, EquivariantStates, LSTMState, MetaOptimizer, MoveStates, Observation
from metatele.metaopt.equivariant import joined, parted
from metatele.mlp import MLP
from metatele.optim.modules import PassCapture, describe
from metatele.symmetry import drift, with_ones


class Situation(NamedTuple):
    """Where a model is.

    Attributes:
        weights: All parameters as one vector ``[P]``.
        gradient: Theirs; zero where there is none.
        scale: Factor on the update of each entry; zero where a parameter does not move.
        whole: Whether every parameter moves.
        stored: The memories, as tensors by name; empty at the beginning.
        group: The first parameter group, for ``max_drift``, ``drift`` and ``rolled_back``.
    """

    weights: Tensor
    gradient: Tensor
    scale: Tensor
    whole: bool
    stored: dict[str, Tensor]
    group: dict[str, Any]


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
    def advance(self, at: Situation) -> tuple[Tensor, dict[str, Tensor]]:
        """The next weights, and the memories to keep."""

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

    def advance(self, at: Situation) -> tuple[Tensor, dict[str, Tensor]]:
        """One local move and one teleport."""
        inputs = None
        if self.meta.teleport is not None and at.whole:
            inputs = self.capture.inputs(at.weights.dtype)
            if inputs is None:
                raise self._missing("a teleport")
            inputs = inputs.unsqueeze(0)
            if not bool(torch.isfinite(inputs).all()):
                at.group["rolled_back"] += 1
                inputs = None
        states = read_states(at.stored, self.meta).map(lambda t: t.to(at.weights.device))
        done = self.meta.step(at.weights[None], at.gradient[None], states, inputs, local_scale=at.scale)
        kept = write_states(done.states)
        if inputs is None:
            return done.weights[0], kept
        before, after = self.mlp.unflatten(done.local), self.mlp.unflatten(done.weights)
        at.group["drift"] = float(drift(self.mlp, before, after, inputs))
        if bool(torch.isfinite(done.weights).all()) and at.group["drift"] <= at.group["max_drift"]:
            return done.weights[0], kept
        at.group["rolled_back"] += 1
        return done.local[0], kept

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

    @property
    def needs_passes(self) -> bool:
        """Always."""
        return True

    def advance(self, at: Situation) -> tuple[Tensor, dict[str, Tensor]]:
        """Teleport, step, pull back: nothing drifts."""
        layers = self.capture.layers(at.weights.dtype)
        if layers is None:
            raise self._missing("a step")
        biases = self.mlp.biases
        one = at.weights[None]
        seen = Observation(
            [(with_ones(h) if b else h)[None] for h, b in zip(layers.inputs, biases, strict=True)],
            [e[None] for e in layers.gradients],
            [s[None] for s in layers.squares],
            layers.outputs[None],
            joined(self.mlp.unflatten(one)),
            joined(self.mlp.unflatten(at.gradient[None])),
        )
        states = EquivariantStates.from_tensors(at.stored) if at.stored else None
        done = self.meta.step(seen, states)
        at.group["rolled_back"] += int(done.shortened)
        change = self.mlp.flatten(parted(done.changes, biases))[0]
        return at.weights + at.scale * change, done.states.tensors()

    def idle(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the base class."""
        return stored

    def check_stored(self, found: dict[str, tuple[int, ...]]) -> None:
        """See the base class."""
        velocity = {name: shape for name, shape in found.items() if name.startswith("velocity_")}
        sizes = zip(self.mlp.widths[1:], self.mlp.widths, self.mlp.biases, strict=False)
        expected = {f"velocity_{i}": (1, o, d + b) for i, (o, d, b) in enumerate(sizes)}
        if found and velocity != expected:
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
