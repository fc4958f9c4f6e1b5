"""Permutations of whole experts of a mixture, from the names and shapes of parameters: guesses, to be verified."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from metatele.network.spaces import Place, Space


def experts_of(model: nn.Module) -> list[Space]:
    """What may be the experts of a mixture, with the rows of the router that chooses among them.

    Experts are the entries of a ``ModuleList`` that are alike in all names and shapes, or lie along the first dimension
    of parameters ``[k, ., .]``; the router's ``[k, ...]`` are those of another module beside them, or of all.

    Args:
        model: Whose parameters are looked at; no pass is made.

    Example:
        >>> experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> layer = nn.ModuleDict({"router": nn.Linear(4, 3), "experts": experts})
        >>> [(space.k, space.parameters[:3]) for space in experts_of(layer)]
        [(3, ('router.weight', 'router.bias', 'experts.0.weight'))]
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ParameterList)):
            continue
        for k, blocks, inside in [*_listed(module), *_stacked(module)]:
            own = dict(module.named_parameters())
            routers: dict[str, list[str]] = {}
            for n, p in own.items():
                if n not in inside and p.shape[:1] == (k,):
                    routers.setdefault(n.rpartition(".")[0], []).append(n)
            every = [n for names in routers.values() for n in names]
            for router in [every, *(routers.values() if len(routers) > 1 else [])]:
                rows = [*router, *(n for n in own if n in inside and not blocks)]
                places = tuple(_rows(_joined(name, n), own[n]) for n in rows)
                whole = tuple(tuple(_joined(name, n) for n in block) for block in blocks)
                if router:
                    found.append(Space("perm", k, places, blocks=whole))
    return found


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _rows(name: str, p: torch.Tensor) -> Place:
    each = p.numel() // len(p)
    return Place(name, torch.arange(len(p))[:, None] * each, torch.arange(each), False)


def _listed(module: nn.Module) -> Iterator[tuple[int, list[tuple[str, ...]], set[str]]]:
    """Lists of modules that are alike: how many, names by what they have in common, and all names."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList) or len(child) < 2:
            continue
        shapes = [{n: p.shape for n, p in entry.named_parameters()} for entry in child]
        if shapes[0] and all(other == shapes[0] for other in shapes):
            blocks = [tuple(f"{name}.{i}.{n}" for i in range(len(child))) for n in shapes[0]]
            yield len(child), blocks, {n for block in blocks for n in block}


def _stacked(module: nn.Module) -> Iterator[tuple[int, list[tuple[str, ...]], set[str]]]:
    """Parameters of a module whose first dimension may be that of experts."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1}
    for k in sorted({len(p) for p in own.values() if p.ndim == 3}):
        if k > 1 and not isinstance(module, nn.modules.conv._ConvNd):
            yield k, [], {n for n, p in own.items() if len(p) == k}
