"""What a teleport means for the state of a torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from metatele.geometry import Landscape
from metatele.perceptron.mlp import MLP
from metatele.teleport import Teleport, transport

STRATEGIES = ("keep", "reset", "transport")
# By what it is, whichever optimizer calls it so.
VELOCITIES = ("momentum_buffer", "exp_avg")
SQUARES = ("exp_avg_sq", "square_avg", "sum", "max_exp_avg_sq")
SIZES = ("exp_inf", "grad_avg")  # as large as the gradient; centered RMSprop subtracts the square of the second


def carry_state(
    optimizer: torch.optim.Optimizer,
    strategy: str,
    parameters: list[nn.Parameter],
    mlp: MLP,
    landscape: Landscape,
    flat: Tensor,
    teleport: Teleport,
) -> None:
    """Keep, reset or transport an optimizer's state over a teleport from ``flat``."""
    if strategy == "keep" or not teleport.path:
        return
    if strategy == "reset" or isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state = defaultdict(dict)
        return
    sizes = [p.numel() for p in parameters]
    entries = [optimizer.state.get(p, {}) for p in parameters]
    for name in VELOCITIES:
        if any(_is_like(e.get(name), p) for e, p in zip(entries, parameters, strict=True)):
            joint = torch.cat(
                [
                    (e[name] if _is_like(e.get(name), p) else torch.zeros_like(p)).detach().flatten()
                    for e, p in zip(entries, parameters, strict=True)
                ]
            ).to(flat.dtype)
            carried = transport(mlp, teleport.path, flat, joint)
            for e, p, part in zip(entries, parameters, carried.split(sizes), strict=True):
                if _is_like(e.get(name), p):
                    e[name].copy_(part.view_as(p))
    before, after = (
        [g.square().mean() for g in landscape.at(w).gradient.split(sizes)] for w in (flat, teleport.weights)
    )
    for e, p, old, new in zip(entries, parameters, before, after, strict=True):
        if not float(old) > 0:
            continue
        for names, factor in ((SQUARES, float(new / old)), (SIZES, float((new / old).sqrt()))):
            for name in names:
                if _is_like(e.get(name), p):
                    e[name].mul_(factor)


def _is_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point()


ADAPTIVE = (
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
)


def metric_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
    r"""Diagonal of A in an adaptive optimizer's step ``-η A ∇L``, from its real state, flat.

    AdaGrad ``1/(√sum + ε)``, RMSprop ``1/(√square_avg + ε)``, centered ``1/(√(square_avg - grad_avg²) + ε)``, Adam
    and its kin ``1/(√(v/(1-β₂^t)) + ε)``, with amsgrad the largest v so far (PAPER §5). A parameter without state
    yet has 1.

    Args:
        optimizer: One of :data:`ADAPTIVE`.
        parameters: Of the model, in its order.
    """
    parts = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        entry, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        moment = next((entry[n] for n in ("exp_avg_sq", "square_avg", "sum") if _is_like(entry.get(n), p)), None)
        if moment is None:
            parts.append(torch.ones_like(p).detach().flatten())
            continue
        if _is_like(entry.get("grad_avg"), p):
            moment = (moment - entry["grad_avg"].square()).clamp_min(0)
        if "exp_avg_sq" in entry:
            moment = entry.get("max_exp_avg_sq", moment) / (1 - group["betas"][1] ** float(entry["step"]))
        parts.append(1 / (moment.sqrt() + group.get("eps", 1e-8)).flatten())
    return torch.cat(parts)
