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
from metatele.learned import EquivariantOptimizer, MetaOptimizer
from metatele.network.sequential import read_sequential
from metatele.optim.families import Situation, family_of


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Steps ``w ← g_t·(w + lr·f_t)`` with f and g from a checkpoint.

    A checkpoint of the equivariant family takes a model of any shape and teleports by conjugation,
    ``w ← g⁻¹·(g·w + lr·f)``; one of the flat family, the paper's LSTMs, takes models of the shape it was trained on.

    The layer inputs a teleport needs are those of the forward passes whose gradients were taken
    since the last ``zero_grad`` or ``step``; nothing is asked of the training loop.

    The network's parameters form one flat vector, so the optimizer is joint over all of them: a
    parameter without gradient (or in no group, or with ``lr`` 0) enters as zero gradient and does
    not move, and a step with such a parameter does not teleport. With no gradient at all, or with
    every ``lr`` 0, a step changes nothing. The arithmetic is float32 whatever the parameters are, so
    parameters of another dtype are rounded through it.

    Flat family: a teleport that changes the network's output on its batch by more than ``max_drift``, or to
    something not finite, is not made: the local move alone is kept, and ``rolled_back`` in the first
    parameter group counts it. ``drift`` there is that of the last teleport. Equivariant family: pulled-back teleports
    do not drift, so ``max_drift`` and ``drift`` have no part; the first step alone may, by 30 % on its batch. A step
    after which the loss has grown several times is shortened, and ``rolled_back`` counts that, at the level of rounding
    too.

    Args:
        model: ``nn.Sequential`` of ``Linear`` and activations; for a flat checkpoint with its shapes.
        checkpoint: A checkpoint folder, a run folder, what :func:`metatele.load` returns, or a meta-optimizer
            (used as it is, and moved to the model's device).
        lr: Factor on the local update, a number or a 0-d tensor; 1 is what was trained.
        params: The parameters to optimize, as for any torch optimizer; all of the model's by default.
        max_drift: Largest accepted relative change of the output by a teleport of the flat family.

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
        checkpoint: str | Path | checkpoints.Checkpoint | MetaOptimizer | EquivariantOptimizer,
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
        self.model = model
        given = checkpoint.optimizer if isinstance(checkpoint, checkpoints.Checkpoint) else checkpoint
        linears, mlp = read_sequential(model, framed=isinstance(given, EquivariantOptimizer))
        self.family = family_of(given, linears, mlp)
        defaults = {"lr": lr, "max_drift": max_drift, "drift": 0.0, "rolled_back": 0}
        super().__init__(model.parameters() if params is None else params, defaults)
        self.family.capture.attach(self)

    @property
    def meta(self) -> nn.Module:
        """The meta-optimizer."""
        return self.family.meta

    @property
    def teleport_due(self) -> bool:
        """Whether a step teleports, and so needs the layer inputs: with a method that does, always."""
        return self.family.needs_passes

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
        self.family.capture.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local move and one teleport; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        self.family.capture.clear()
        return loss

    def _advance(self) -> None:
        found = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        parameters = [p for linear in self.family.capture.linears for p in linear._parameters.values() if p is not None]
        gradients = [p.grad for p in parameters]
        if any(g is not None and g.is_sparse for g in gradients):
            raise RuntimeError("LearnedOptimizer does not support sparse gradients")
        rates = [found.pop(id(p), None) for p in parameters]
        if all(g is None or rate is None for g, rate in zip(gradients, rates, strict=True)):
            return
        if found:
            raise MetateleError("a parameter of the model was replaced after the optimizer was made; make it anew")
        home = self.param_groups[0]["params"][0]
        used = [0.0 if g is None or rate is None else rate for g, rate in zip(gradients, rates, strict=True)]
        stored = {name: t for name, t in self.state.get(home, {}).items() if name != "step"}
        if not any(used):
            self._write(home, self.family.idle(stored), advance=0)
            return
        device, first = parameters[0].device, next(self.meta.parameters())
        if first.device != device:
            self.meta.to(device)  # the model was moved after the optimizer was made
        dtype = first.dtype
        kept = self.family.advance(Situation(parameters, used, stored, self.param_groups[0], dtype))
        self._write(home, kept, advance=1)

    def _write(self, home: Tensor, kept: dict[str, Tensor], advance: int) -> None:
        # Every parameter has an entry, which tools that save state parameter by parameter ask for; the
        # memories are joint and lie with the first one.
        entries = [self.state[p] for group in self.param_groups for p in group["params"]]
        for entry in entries:
            if "step" not in entry:
                entry["step"] = torch.zeros(())
        torch._foreach_add_([entry["step"] for entry in entries], float(advance))
        self.state[home].update(kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the memories keep their float32 whatever the parameters are.

        Raises:
            ShapeMismatchError: The state is another optimizer's.
        """
        for stored in state_dict["state"].values():
            self.family.check_stored({name: tuple(value.shape) for name, value in stored.items() if name != "step"})
        if any("max_drift" not in group for group in state_dict["param_groups"]):
            raise ShapeMismatchError("the state is of another kind of optimizer")
        super().load_state_dict(state_dict)
        self.family.forget()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    # Copies: steps are made in place, and what was loaded belongs to the caller.
                    where = value.device if name == "step" else p.device
                    self.state[p][name] = value.detach().to(where, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: the model too, so that both halves stay together."""
        return {**super().__getstate__(), "model": self.model, "family": self.family}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and listen to the copied model."""
        super().__setstate__(state)
        if "family" in state:
            self.family.capture.attach(self)
