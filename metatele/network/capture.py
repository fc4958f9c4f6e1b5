"""What the passes of a module showed: inputs and output gradients of its layers, taken by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Kept:
    """A forward pass: of each watched layer its inputs, and the gradients at its output.

    Attributes:
        inputs: ``[..., d]`` for each watched layer.
        squares: Mean square of each watched layer's output; empty if it was not asked for.
        output: The last layer's.
        gradients: For each watched layer those of every backward pass that came through.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.output: Tensor | None = None
        self.gradients: list[list[Tensor]] = []


class Layers(NamedTuple):
    """What was captured of all layers, one column per sample.

    Attributes:
        inputs: ``[d, n]`` for each layer.
        gradients: ``∂L/∂z [o, n]``, as they came: a ``GradScaler``, say, may have made them larger.
        squares: Mean ``z²`` of each layer's outputs.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    squares: list[Tensor]


def _backward_number() -> int:
    """Number of the backward pass that is running, negative outside of one."""
    return int(torch._C._current_graph_task_id())


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor exists inside a torch.func transform only."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class PassCapture:
    """What a teleport needs of the passes whose gradients were taken: inputs and output gradients.

    Forward hooks on the first and on the last Linear, or on all; the owner's ``teleport_due`` decides at each pass
    whether it is kept, so a step without a teleport costs nothing. A pass counts when a gradient flows back
    through the last layer's output and is accumulated in the parameters, so evaluations, metrics, penalties on
    inputs and abandoned passes are never mixed in. The capture lives as long as its owner: a copy of the model
    carries one that does nothing.

    Args:
        linears: The layers.
        accumulated: Gradients come into ``p.grad``; without, those of ``autograd.grad`` count.
        every: Watch all layers, not the first and the last alone.

    Attributes:
        whole: Whether :meth:`layers` will be asked for; without, the last layer alone is watched.
        keeps: Whether the data will be asked for.
    """

    __name__ = "pass_capture"  # TorchScript asks every hook for its name

    def __init__(self, linears: list[nn.Linear], accumulated: bool = True, every: bool = False) -> None:
        self.linears, self.accumulated, self.every = linears, accumulated, every
        self.watched = linears if every else list(dict.fromkeys((linears[0], linears[-1])))
        self._pending: dict[int, list[tuple[_Kept, int, Tensor]]] = {}  # by backward pass
        self.passes: list[_Kept] = []
        self._current: _Kept | None = None
        self._owner: weakref.ref[Any] | None = None
        self.whole = self.keeps = every
        self._heard: set[int] = set()

    def attach(self, owner: Any) -> None:
        """Keep passes for as long as ``owner`` lives and its ``teleport_due`` is true.

        A copy of the owner finds its hooks in the copied layers; for another owner they are made here.
        """
        self._owner = weakref.ref(owner)
        for linear in self.watched:
            hooks = [number for number, hook in linear._forward_hooks.items() if hook is self]
            if not hooks:
                hooks = [linear.register_forward_hook(self).id]
            for number in hooks:
                weakref.finalize(owner, linear._forward_hooks.pop, number, None)
        self._heard = set()
        self._listen(owner)

    def _listen(self, owner: Any) -> None:
        """Hear when a gradient has come into a parameter, also of one that was frozen until now."""
        if not self.accumulated:
            return
        for linear in self.linears:
            for p in linear._parameters.values():
                if p is not None and p.requires_grad and id(p) not in self._heard:
                    self._heard.add(id(p))
                    weakref.finalize(owner, p.register_post_accumulate_grad_hook(self._count).remove)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook for ``register_forward_hook`` of every watched layer."""
        owner = None if self._owner is None else self._owner()
        if owner is None or not owner.teleport_due or not torch.is_grad_enabled() or _is_transformed(output):
            return
        layer = next(i for i, linear in enumerate(self.watched) if linear is module)
        # A forward pass inside a backward one recomputes what checkpointing had dropped.
        if layer == 0 and _backward_number() < 0:
            parameters = (p for linear in self.linears for p in linear._parameters.values())
            if not any(p is not None and p.is_leaf and p.grad is not None and bool(p.grad.any()) for p in parameters):
                self.passes = []  # gradients were cleared since: by the model's zero_grad, say
        if layer == 0:
            self._listen(owner)
            self._current = _Kept()
        kept = self._current
        if kept is None or len(kept.inputs) != layer:  # a layer called on its own
            return
        given = arguments[0].detach()
        copied = layer == 0 and (self.keeps or not self.every)
        kept.inputs.append(given.clone() if copied else given)  # a training loop may use its buffer again
        kept.gradients.append([])
        last = layer == len(self.watched) - 1
        if self.whole:  # at once: an activation may work in place
            kept.squares.append(output.detach().square().mean())
        if last:
            kept.output = output.detach()
        if (self.whole or last) and output.requires_grad:

            def keep(gradient: Tensor) -> None:
                self._pending.setdefault(_backward_number(), []).append((kept, layer, gradient.detach()))
                if not self.accumulated:
                    self._count()

            output.register_hook(keep)

    def _count(self, _: Tensor | None = None) -> None:
        """The running backward pass reaches the parameters: its passes count."""
        for kept, layer, gradient in self._pending.pop(_backward_number(), []):
            # The first of perhaps several backward passes through this forward pass.
            if layer == len(self.watched) - 1 and not kept.gradients[layer]:
                self.passes.append(kept)
            kept.gradients[layer].append(gradient)

    def clear(self) -> None:
        """Forget what was kept."""
        self.passes, self._current, self._pending = [], None, {}

    def inputs(self, dtype: torch.dtype) -> Tensor | None:
        """Inputs of all passes, one column per sample ``[d, n]``; ``None`` if there are none."""
        kept = [_rows(p.inputs[0]) for p in self.passes if p.inputs[0].numel()]
        return torch.cat(kept).to(dtype).T if kept else None

    def columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Inputs ``[d, n]`` and output gradients ``[o, n]`` of all passes, one column per sample.

        The gradients are scaled to what the optimizer sees, ``p.grad`` of the last layer: a ``GradScaler``
        has unscaled it, and clipping may have shortened it.
        """
        kept = [p for p in self.passes if p.inputs[0].numel()]
        if not kept:
            return None
        inputs, last = (self._joined(p.inputs[layer] for p in kept).to(dtype) for layer in (0, -1))
        gradient = self._joined(sum_of(p.gradients[-1]) for p in kept).to(dtype)
        return inputs.T, (gradient * self._scale(last, gradient)).T

    def layers(self, dtype: torch.dtype) -> Layers | None:
        """Inputs and output gradients of every layer; ``None`` if there are none.

        Gradients of a layer that none reached are zero.
        """
        kept = [p for p in self.passes if p.inputs[0].numel()]
        if not kept:
            return None
        numbers = range(len(self.watched))
        inputs = [self._joined(p.inputs[layer] for p in kept).to(dtype) for layer in numbers]
        gradients = [
            self._joined(
                sum_of(p.gradients[layer])
                if p.gradients[layer]
                else p.inputs[layer].new_zeros(*p.inputs[layer].shape[:-1], self.watched[layer].out_features)
                for p in kept
            ).to(dtype)
            for layer in numbers
        ]
        squares = [torch.stack([p.squares[layer] for p in kept]).mean().to(dtype) for layer in numbers]
        return Layers([h.T for h in inputs], [e.T for e in gradients], squares)

    @property
    def complete(self) -> bool:
        """Whether :meth:`layers` knows all of every pass."""
        return all(p.squares for p in self.passes)

    def ends(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """Inputs ``[d, n]``, output ``[o, n]`` of the last layer and the gradient there; ``None`` if there are none.

        The gradient is as recorded: one that was clipped since would tell of another loss.
        """
        kept = [p for p in self.passes if p.inputs[0].numel()]
        if not kept:
            return None
        outputs = self._joined(p.output for p in kept if p.output is not None).to(dtype)
        gradient = self._joined(sum_of(p.gradients[-1]) for p in kept).to(dtype)
        return self._joined(p.inputs[0] for p in kept).to(dtype).T, outputs.T, gradient.T

    def _scale(self, last: Tensor, gradient: Tensor) -> Tensor | float:
        """Factor from output gradients as recorded to those of ``p.grad``."""
        seen = self.linears[-1].weight.grad
        if seen is None:
            return 1.0
        recorded, seen = gradient.T @ last, seen.to(gradient.dtype)
        product = (recorded * seen).sum()
        # Only where the recorded passes explain the gradient: a penalty may have added its own.
        if float(product) > 0.99 * float(recorded.norm() * seen.norm()) > 0:
            return product / recorded.square().sum()
        return 1.0

    @staticmethod
    def _joined(tensors: Iterable[Tensor]) -> Tensor:
        rows = [_rows(t) for t in tensors]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def __getstate__(self) -> dict[str, Any]:
        """The layers travel with a copy, data and owner do not."""
        return {**self.__dict__, "passes": [], "_current": None, "_owner": None, "_pending": {}, "_heard": set()}


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(tensors).sum(0) if len(tensors) > 1 else tensors[0]
