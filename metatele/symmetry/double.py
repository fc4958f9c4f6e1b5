"""Passes of a module in double precision, without what is random in them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metatele.errors import UnsupportedModelError
from metatele.network.graph import tensors_in


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Without what is random in a pass."""
    rates: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
        if isinstance(getattr(module, name, None), float):
            rates.append((module, name, getattr(module, name)))
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy in float64, made parameter by parameter: the float32 copy would only be made to be thrown away."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(
            p.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format), requires_grad=False
        )
    for module in model.modules():
        for value in vars(module).values():  # weights that are computed before each pass, as of pruned layers
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().double()
    return copy.deepcopy(model, memo).double()


def doubled(tree: Any) -> Any:
    """All floating-point tensors of a tree in double precision."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, ordinary(tree))


def ordinary(tree: Any) -> Any:
    """A tree whose tensors from inference mode are copies, which autograd and tracers take outside of it."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, tree)


_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Wide(TorchDispatchMode):
    """Casts to float32, as of norms and softmax, are to float64: else no change is seen below 1e-7."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def wide() -> Iterator[None]:
    """What a pass makes of its own is in float64 too: casts, and tensors of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def outputs_of(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor:
    """All outputs of a pass, flat; buffers are those of the model, and stay."""
    buffers = {name: tensors.get(name, b).clone() for name, b in model.named_buffers()}
    double = wide() if any(t.dtype == torch.float64 for t in tensors.values()) else nullcontext()
    with torch.random.fork_rng(devices=[]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), double:
        torch.manual_seed(0)
        out = torch.func.functional_call(model, {**tensors, **buffers}, inputs, dict(named))
    found = [t.reshape(-1).double() for t in tensors_in(out) if t.is_floating_point()]
    if not found:
        raise UnsupportedModelError("the model gives no tensor of floating-point numbers")
    return torch.cat(found)


def change_of(a: Tensor, b: Tensor) -> float:
    """Relative to the largest of what is compared with; infinite numbers, as of masks, have to stay."""
    gap = torch.where(a == b, 0.0, (a - b).abs())
    value = float(gap.max() / b[b.isfinite()].abs().max().clamp_min(1e-30)) if b.isfinite().any() else float("inf")
    return value if value == value else float("inf")
