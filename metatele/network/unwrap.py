"""Modules around modules: wrappers of several kinds, and a user's own."""

from __future__ import annotations

from torch import nn

_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of wrappers for several processes, devices, compilation or precision.

    Raises:
        TypeError: What is given is no module.

    Example:
        >>> inside = nn.Linear(3, 2)
        >>> unwrapped(nn.DataParallel(inside)) is inside
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while (inside := _WRAPPERS.get(type(model).__name__)) is not None and isinstance(
        getattr(model, inside, None), nn.Module
    ):
        model = getattr(model, inside)
    return model


def inside_of(model: nn.Module) -> nn.Module | None:
    """The innermost module that holds all parameters of another one, which loops may call instead; or ``None``.

    Example:
        >>> outer = nn.Module()
        >>> outer.net = nn.Sequential(nn.Linear(3, 2))
        >>> type(inside_of(outer)).__name__, inside_of(nn.Linear(3, 2))
        ('Linear', None)
    """
    own, found = {id(p) for p in model.parameters()}, None
    while own:
        here = found or model
        found_in = [m for m in here.children() if {id(p) for p in m.parameters()} == own]
        if len(found_in) != 1 or any(id(p) in own for p in here._parameters.values() if p is not None):
            break
        found = found_in[0]
    return found
