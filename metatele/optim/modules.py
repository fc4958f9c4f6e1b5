"""Reading an ordinary ``nn.Sequential`` as the perceptron the mathematics knows."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from metatele.activations import (
    Activation,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from metatele.errors import UnsupportedModelError
from metatele.mlp import MLP


def activation_of(module: nn.Module) -> Activation | None:
    """The activation a module computes, or ``None`` if it is none of ours."""
    if type(module) is nn.LeakyReLU:
        return LeakyReLU(float(module.negative_slope))
    if type(module) is nn.Softplus:
        return Softplus() if module.beta == 1 and module.threshold >= 20 else None
    for kind, ours in (
        (nn.Identity, Identity),
        (nn.ReLU, ReLU),
        (nn.Tanh, Tanh),
        (nn.Sigmoid, Sigmoid),
        (nn.SiLU, SiLU),
    ):
        if type(module) is kind:  # a subclass may compute anything
            return ours()
    return None


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    modules: list[tuple[str, nn.Module]] = []
    for name, module in model._modules.items():  # named_children would skip a module used twice
        assert module is not None
        path = f"{prefix}{name}"
        modules += _flat_modules(module, path + ".") if _is_plain_sequential(module) else [(path, module)]
    return modules


def read_sequential(model: nn.Module) -> tuple[list[nn.Linear], MLP]:
    """The linear layers of an ``nn.Sequential`` (nested or not) and its shape.

    Args:
        model: ``Linear`` layers with one activation, the same everywhere, between each two.

    Raises:
        UnsupportedModelError: Anything else; the layer is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> read_sequential(model)[1].widths
        (3, 4, 2)
    """
    if not _is_plain_sequential(model):
        raise UnsupportedModelError(
            f"model must be an nn.Sequential of Linear and activations, got {type(model).__name__}"
        )
    linears: list[nn.Linear] = []
    between: list[Activation] = []
    for path, module in _flat_modules(model):
        found = activation_of(module)
        if type(module) is nn.Linear:  # not a subclass, which parametrised layers are
            if linears and len(between) < len(linears):
                raise UnsupportedModelError(f"layer {path!r} follows another Linear without an activation")
            linears.append(module)
        elif found is None:
            raise UnsupportedModelError(
                f"layer {path!r} ({type(module).__name__}) is not supported: Linear and activations are"
            )
        elif len(between) != len(linears) - 1:
            raise UnsupportedModelError(f"activation {path!r} must stand between two Linear layers, one at a time")
        else:
            between.append(found)
    if not linears:
        raise UnsupportedModelError("model holds no Linear layer")
    if len(between) == len(linears):
        raise UnsupportedModelError("the last layer must be Linear, without an activation after it")
    if len({id(linear.weight) for linear in linears}) < len(linears):
        raise UnsupportedModelError("model shares a weight between layers")
    if len(set(between)) > 1:
        raise UnsupportedModelError(f"activations must all be the same, got {[a.describe() for a in between]}")
    biased = [linear.bias is not None for linear in linears]
    if any(biased) != all(biased):
        raise UnsupportedModelError("either every Linear has a bias or none")
    widths = (linears[0].in_features, *(linear.out_features for linear in linears))
    return linears, MLP(widths, between[0] if between else Identity(), all(biased))


def describe(mlp: MLP) -> str:
    """Shape in words, for messages."""
    widths = "-".join(map(str, mlp.widths))
    return f"{widths} {mlp.activation.describe()} {'with' if mlp.bias else 'without'} bias"


class InputCapture:
    """A forward hook that keeps the inputs of the passes whose gradients were taken.

    A pass counts when a gradient flows back through the layer's output, so evaluations, metrics and
    abandoned passes are never mixed in. The capture lives as long as its owner: a copy of the model
    carries one that does nothing.
    """

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self._owner: weakref.ref[Any] | None = None

    def attach(self, owner: object) -> None:
        """Keep inputs for as long as ``owner`` lives."""
        self._owner = weakref.ref(owner)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook for ``register_forward_hook``."""
        if self._owner is None or self._owner() is None:
            self.batches = []
        elif output.requires_grad:
            if not any(p.is_leaf and p.grad is not None for p in module.parameters()):
                self.batches = []  # gradients were cleared since: by the model's zero_grad, say
            batch = arguments[0].detach()

            def count(_: Tensor) -> None:
                if all(kept is not batch for kept in self.batches):  # one pass, several backward passes
                    self.batches.append(batch)

            output.register_hook(count)

    def clear(self) -> None:
        """Forget what was kept."""
        self.batches = []

    def columns(self, dtype: torch.dtype) -> Tensor | None:
        """All inputs kept, one column per sample ``[d, n]``; ``None`` if there are none."""
        if not sum(batch.numel() for batch in self.batches):
            return None
        return (
            torch.cat([batch.flatten(0, -2) if batch.ndim > 1 else batch[None] for batch in self.batches]).to(dtype).T
        )

    def __getstate__(self) -> dict[str, Any]:
        """Neither data nor owner travel with a copy."""
        return {"batches": [], "_owner": None}
