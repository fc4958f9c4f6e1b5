"""A trained meta-optimizer as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metatele import checkpoint as checkpoints
from metatele.errors import MetateleError, ShapeMismatchError
from metatele.metaopt import LSTMState, MetaOptimizer, MoveStates, Stepped
from metatele.optim.modules import PassCapture, describe, read_sequential
from metatele.symmetry import drift


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Steps ``w ← g_t·(w + lr·f_t)`` with f and g from a checkpoint.

    The layer inputs a teleport needs are those of the forward passes whose gradients were taken
    since the last ``zero_grad`` or ``step``; nothing is asked of the training loop.

    The network's parameters form one flat vector, so the optimizer is joint over all of them: a
    parameter without gradient (or in no group, or with ``lr`` 0) enters as zero gradient and does
    not move, and a step with such a parameter does not teleport. With no gradient at all, or with
    every ``lr`` 0, a step changes nothing. The arithmetic is float32 whatever the parameters are, so
    parameters of another dtype are rounded through it.

    A teleport that changes the network's output on its batch by more than ``max_drift``, or to
    something not finite, is not made: the local move alone is kept, and ``rolled_back`` in the first
    parameter group counts it. ``drift`` there is that of the last teleport.

    Args:
        model: ``nn.Sequential`` of ``Linear`` and activations with the checkpoint's shapes.
        checkpoint: A checkpoint folder, a run folder, what :func:`metatele.load` returns, or a
            :class:`MetaOptimizer` (used as it is, and moved to the model's device).
        lr: Factor on the local update, a number or a 0-d tensor; 1 is what was trained.
        params: The parameters to optimize, as for any torch optimizer; all of the model's by default.
        max_drift: Largest accepted relative change of the output by a teleport.

    Raises:
        ShapeMismatchError: The model does not have the checkpoint's shape.
        UnsupportedModelError: The model holds a layer that is not covered.
        CheckpointError: The checkpoint cannot be used.

    Example:
        >>> from metatele.config import MethodConfig, TaskConfig
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LeakyReLU(0.1), nn.Linear(4, 2, bias=False))
        >>> meta = MetaOptimizer(MethodConfig(hidden=8), TaskConfig(widths=(3, 4, 2), samples=3))
        >>> optimizer = LearnedOptimizer(model, meta)
        >>> x, y = torch.randn(3, 3), torch.randn(3, 2)
        >>> loss = 0.5 * (model(x) - y).square().sum()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | Path | checkpoints.Checkpoint | MetaOptimizer,
        lr: float | Tensor = 1.0,
        params: Iterable[Any] | None = None,
        max_drift: float = 0.01,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a 0-d tensor, got shape {tuple(lr.shape)}")
        if not 0 <= float(lr) < math.inf:
            raise ValueError(f"lr must be zero or positive, got {lr}")
        if not max_drift > 0:
            raise ValueError(f"max_drift must be positive, got {max_drift}")
        if isinstance(checkpoint, str | Path):
            checkpoint = checkpoints.load(checkpoint)
        meta = checkpoint.optimizer if isinstance(checkpoint, checkpoints.Checkpoint) else checkpoint
        if not isinstance(meta, MetaOptimizer):
            raise TypeError(f"checkpoint must be a path, a Checkpoint or a MetaOptimizer, got {type(meta).__name__}")
        self.meta = meta
        self.model = model
        linears, mlp = read_sequential(model)
        if mlp != self.meta.mlp:
            raise ShapeMismatchError(f"the model is {describe(mlp)}, the checkpoint is for {describe(self.meta.mlp)}")
        self._capture = PassCapture(linears)
        defaults = {"lr": lr, "max_drift": max_drift, "drift": 0.0, "rolled_back": 0}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._capture.attach(self)

    @property
    def teleport_due(self) -> bool:
        """Whether a step teleports, and so needs the layer inputs: with a method that does, always."""
        return self.meta.teleport is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model that were left out so far."""
        super().add_param_group(param_group)
        known = {id(p) for p in self.model.parameters()}
        for p in self.param_groups[-1]["params"]:
            if id(p) not in known:
                self.param_groups.pop()
                raise ValueError(f"a parameter of shape {tuple(p.shape)} does not belong to the model")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and forget the layer inputs they came from."""
        self._capture.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local move and one teleport; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        self._capture.clear()
        return loss

    def _advance(self) -> None:
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        parameters = list(self.model.parameters())
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("LearnedOptimizer does not support sparse gradients")
        if all(p.grad is None or id(p) not in rates for p in parameters):
            return
        if len({id(p) for p in parameters} & self._known) < len(self._known):
            raise MetateleError("a parameter of the model was replaced after the optimizer was made; make it anew")
        home = self.param_groups[0]["params"][0]
        states = self._read_states(home)
        moving = [p.grad is not None and id(p) in rates and float(rates[id(p)]) != 0 for p in parameters]
        if not any(moving):
            self._write_states(home, states, advance=0)
            return
        if next(self.meta.parameters()).device != parameters[0].device:
            self.meta.to(parameters[0].device)  # the model was moved after the optimizer was made
        states = states.map(lambda t: t.to(parameters[0].device))
        dtype = next(self.meta.parameters()).dtype
        weights = torch.cat([p.flatten() for p in parameters]).to(dtype)
        gradient = torch.cat(
            [
                p.grad.flatten() if m and p.grad is not None else torch.zeros_like(p).flatten()
                for p, m in zip(parameters, moving, strict=True)
            ]
        ).to(dtype)
        scale = torch.cat(
            [
                torch.as_tensor(float(rates[id(p)]) if m else 0.0, dtype=dtype, device=weights.device).expand(p.numel())
                for p, m in zip(parameters, moving, strict=True)
            ]
        )
        inputs = None
        if self.meta.teleport is not None and all(moving):
            inputs = self._capture.inputs(dtype)
            if inputs is None and self._capture.passes:
                raise MetateleError("a teleport needs the layer inputs, and the batch was empty")
            if inputs is None:
                raise MetateleError(
                    "a teleport needs the layer inputs, and no gradient was taken through a forward pass "
                    "of the model since the last step or zero_grad"
                )
            inputs = inputs.unsqueeze(0)
            if not bool(torch.isfinite(inputs).all()):
                self.param_groups[0]["rolled_back"] += 1
                inputs = None
        done = self.meta.step(weights[None], gradient[None], states, inputs, local_scale=scale)
        new = done.weights[0] if inputs is None else self._accepted(done, inputs)
        for p, part, m in zip(parameters, new.split([p.numel() for p in parameters]), moving, strict=True):
            if m:
                p.copy_(part.view_as(p))
        self._write_states(home, done.states, advance=1)

    def _accepted(self, done: Stepped, inputs: Tensor) -> Tensor:
        """The teleported weights, or those before the teleport if it drifted too far."""
        mlp, group = self.meta.mlp, self.param_groups[0]
        group["drift"] = float(drift(mlp, mlp.unflatten(done.local), mlp.unflatten(done.weights), inputs))
        finite = bool(torch.isfinite(done.weights).all())
        if finite and group["drift"] <= group["max_drift"]:
            return done.weights[0]
        group["rolled_back"] += 1
        return done.local[0]

    @property
    def _known(self) -> set[int]:
        """Identities of the parameters in all groups."""
        return {id(p) for group in self.param_groups for p in group["params"]}

    def _read_states(self, home: Tensor) -> MoveStates:
        return read_states(self.state.get(home, {}), self.meta)

    def _write_states(self, home: Tensor, states: MoveStates, advance: int) -> None:
        # Every parameter has an entry, which tools that save state parameter by parameter ask for; the
        # memories are joint and lie with the first one.
        for group in self.param_groups:
            for p in group["params"]:
                step = self.state[p].get("step", torch.zeros((), dtype=torch.float32))
                self.state[p]["step"] = step + advance
        self.state[home].update(write_states(states))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the memories keep their float32 whatever the parameters are.

        Raises:
            ShapeMismatchError: The state is another optimizer's.
        """
        expected = {name: tuple(t.shape) for name, t in write_states(self.meta.initial_states(1)).items()}
        for stored in state_dict["state"].values():
            found = {name: tuple(value.shape) for name, value in stored.items() if name != "step"}
            if found and found != expected:
                raise ShapeMismatchError(
                    f"the state does not belong to this checkpoint: expected {expected}, got {found}"
                )
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if name != "step":
                        self.state[p][name] = value.detach().to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: the model too, so that both halves stay together."""
        return {**super().__getstate__(), "meta": self.meta, "model": self.model, "_capture": self._capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and listen to the copied model."""
        super().__setstate__(state)
        if "_capture" in state:
            self._capture.attach(self)


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
