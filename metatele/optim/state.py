"""What a teleport means for the state of a torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from metatele.perceptron.mlp import MLP
from metatele.teleport import Teleport, transport

STRATEGIES = ("keep", "reset", "transport")
# By what it is, whichever optimizer calls it so.
VELOCITIES = ("momentum_buffer", "exp_avg")
SQUARES = ("exp_avg_sq", "square_avg", "sum", "max_exp_avg_sq")
SIZES = ("exp_inf", "grad_avg")  # as large as the gradient; centered RMSprop subtracts the square of the second


def reset_state_(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that a new one has: for most none, for AdaGrad in torch < 2.13 what it begins with.

    Example:
        >>> p = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([p])
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> reset_state_(optimizer)
        >>> len(optimizer.state)
        0
    """
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.state = type(optimizer)(groups).state  # type: ignore[call-arg]
    except (TypeError, ValueError):  # one that is made otherwise: those keep no state from their construction
        optimizer.state = defaultdict(dict)


def carry_state(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    mlp: MLP,
    flat: Tensor,
    teleport: Teleport,
) -> None:
    r"""Carry an optimizer's momentum and second moments along a teleport, in place.

    - A momentum is a direction in weight space, and is carried by the differential of the action (Zhao et al. 2024,
      Figure 12): the same motion of the network, seen at the new point.
    - Second moments (Adam, RMSprop, AdaGrad) are averages of squared gradients. Where the teleport is a rescaling
      ``w ↦ s∘w``, gradients become ``∇/s``, so v becomes ``v/s²``, exactly. A map that mixes entries cannot carry what
      of it only the diagonal is known: v stays.
    - Adam and its kin step by ``m/√v``, which is bounded only while both are averages of the same gradients. So a
      carried m is cut, entry by entry, to where ``|m'|/√v'`` is no larger than its largest value in that tensor was.
      Without that, entries whose v is tiny (weights of dead units) would take steps without bound.

    What is neither is kept. Training mostly ends as with state that is kept, and may end worse where rescalings without
    a bound are repeated (``benchmarks/teleport_field.py``; its stored results are in ``docs/teleporting.md``).

    Args:
        optimizer: Whose state.
        parameters: Of the model, in its order.
        mlp: Shape of the network.
        flat: The weights before it ``[P]``.
        teleport: What was done.
    """
    if not teleport.path:
        return
    sizes = [p.numel() for p in parameters]
    entries = [optimizer.state.get(p, {}) for p in parameters]
    pairs = list(zip(entries, parameters, strict=True))
    bounds = [_largest_step(e, p) for e, p in pairs]
    for name in VELOCITIES:
        if any(_is_like(e.get(name), p) for e, p in pairs):
            joint = [
                (e[name] if _is_like(e.get(name), p) else torch.zeros_like(p)).detach().flatten() for e, p in pairs
            ]
            carried = transport(mlp, teleport.path, flat, torch.cat(joint).to(flat.dtype)).split(sizes)
            for (e, p), part in zip(pairs, carried, strict=True):
                if _is_like(e.get(name), p):
                    e[name].copy_(part.view_as(p))
    if all(leg.action.name == "rescaling" for leg in teleport.path):
        scales = transport(mlp, teleport.path, flat, torch.ones_like(flat)).split(sizes)
        for (e, p), scale in zip(pairs, scales, strict=True):
            for name in (n for n in (*SQUARES, *SIZES) if _is_like(e.get(n), p)):
                e[name].div_((scale.square() if name in SQUARES else scale).view_as(p))
    for (e, p), bound in zip(pairs, bounds, strict=True):
        size = _size(e, p)
        if bound is not None and size is not None:
            e["exp_avg"].clamp_(-bound * size, bound * size)


def _size(entry: dict[str, Any], p: Tensor) -> Tensor | None:
    """``√v`` by which Adam and its kin divide their first moment, up to corrections for its start."""
    square = next((entry[n] for n in SQUARES if _is_like(entry.get(n), p)), None)
    return square.sqrt() if square is not None else entry["exp_inf"] if _is_like(entry.get("exp_inf"), p) else None


def _largest_step(entry: dict[str, Any], p: Tensor) -> Tensor | None:
    """The largest ``|m|/√v`` of a tensor, ``[]``."""
    size = _size(entry, p)
    if size is None or not _is_like(entry.get("exp_avg"), p):
        return None
    return torch.where(size > 0, entry["exp_avg"].abs() / size, 0.0).max()


def carried_tensors(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """What :func:`carry_state` changes."""
    pairs = ((optimizer.state.get(p, {}), p) for p in parameters)
    return [e[name] for e, p in pairs for name in _carried(e, p)]


def _carried(entry: dict[str, Any], p: Tensor) -> list[str]:
    return [name for name in (*VELOCITIES, *SQUARES, *SIZES) if _is_like(entry.get(name), p)]


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
    and its kin ``1/(√(v/(1-β₂^t)) + ε)``, with amsgrad the largest v so far (Zhao et al. 2024, Section 5.1 and
    Figure 12). A parameter without state yet has 1.

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
