"""The flat family steps a model: the paper's LSTMs, which read its gradient as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ShapeMismatchError
from metatele.learned import LSTMState, MetaOptimizer, MoveStates
from metatele.network.sequential import describe
from metatele.network.wanted import Wanted
from metatele.optim.steppers import Memory, SequentialStepper, Situation
from metatele.symmetry import drift


class FlatStepper(SequentialStepper):
    """``w ← g·(w + f)`` for a model of the shape that a checkpoint was trained on (Zhao et al. 2024, Algorithm 1).

    Its memories are the network's, one vector for all parameters; they lie with the first one.
    """

    meta: MetaOptimizer
    framed = False

    def __init__(self, meta: MetaOptimizer, model: nn.Module) -> None:
        super().__init__(meta, model)
        if self.mlp != meta.mlp:
            raise ShapeMismatchError(f"the model is {describe(self.mlp)}, the checkpoint is for {describe(meta.mlp)}")
        self.capture.wanted = Wanted(data=meta.teleport is not None)

    def advance(self, at: Situation) -> bool:
        """One local move and one teleport."""
        inputs = None
        if self.meta.teleport is not None and at.whole:
            inputs = self.capture.inputs(at.dtype)
            if inputs is None and self.capture.seen:
                return False
            if inputs is None:
                raise self.missing("a teleport")
            inputs = inputs.unsqueeze(0)
            if not bool(torch.isfinite(inputs).all()):
                at.group["rolled_back"] += 1
                inputs = None
        at.decay_()
        weights, home = at.weights, self._home(at.group)
        states = read_states(at.memory.get(home, {}), self.meta).map(lambda t: t.to(weights.device))
        gradient = at.flat(at.gradients)
        done = self.meta.step(weights[None], gradient[None], states, inputs, local_scale=at.scale)
        at.memory[home].update(write_states(done.states))
        if inputs is None:
            at.write(done.weights[0])
            return True
        before, after = self.mlp.unflatten(done.local), self.mlp.unflatten(done.weights)
        at.group["drift"] = float(drift(self.mlp, before, after, inputs))
        if bool(torch.isfinite(done.weights).all()) and at.group["drift"] <= at.group["max_drift"]:
            at.write(done.weights[0])
            return True
        at.group["rolled_back"] += 1
        at.write(done.local[0])
        return True

    @staticmethod
    def _home(group: dict[str, Any]) -> nn.Parameter:
        first: nn.Parameter = group["params"][0]
        return first

    def idle(self, at: Situation) -> None:
        """See the base class."""
        home = self._home(at.group)
        at.memory[home].update(write_states(read_states(at.memory.get(home, {}), self.meta)))

    def checked(self, state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter]) -> dict[str, Any]:
        """See the base class."""
        expected = {name: tuple(t.shape) for name, t in write_states(self.meta.initial_states(1)).items()}
        for stored in state_dict["state"].values():
            found = {name: tuple(value.shape) for name, value in stored.items() if name != "step"}
            if found and found != expected:
                raise ShapeMismatchError(
                    f"the state does not belong to this checkpoint: expected {expected}, got {found}"
                )
        return state_dict


def states_of(memory: Memory, group: dict[str, Any], meta: MetaOptimizer) -> MoveStates:
    """Memories of a model in an optimizer's state."""
    return read_states(memory.get(FlatStepper._home(group), {}), meta)


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
