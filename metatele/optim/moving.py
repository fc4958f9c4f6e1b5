"""Gradients of any module's parameters in one flat tensor, and changes from there back into the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.learned.general.layout import Layout
from metatele.network.parts import Part, Vector
from metatele.optim.steppers import Situation


class Moves(NamedTuple):
    """What moves in a step.

    Attributes:
        weights: Of each part.
        biases: The same of their last columns.
        vectors: Each.
    """

    weights: list[bool]
    biases: list[bool]
    vectors: list[bool]


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of its real and imaginary parts; any other as it is.

    Example:
        >>> real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def gather(
    flat: Tensor, old: Tensor, layout: Layout, parts: Sequence[Part], vectors: Sequence[Vector], at: Situation
) -> Moves:
    """Copy gradients into a flat tensor; what does not move gets its running gradient, which so stays as it is.

    Args:
        flat: Where to.
        old: Running gradient.
        layout: Of both.
        parts: The matrices.
        vectors: The rest.
        at: Rates, and the sign of what is minimized.
    """
    moving = {id(p) for p, rate in zip(at.parameters, at.rates, strict=True) if rate and p.grad is not None}
    targets, sources, still = [], [], []
    moves = Moves([], [], [])
    for number, part in enumerate(parts):
        mine, before = layout.part(flat, number), layout.part(old, number)
        grad = part.weight.grad
        moves.weights.append(id(part.weight) in moving)
        if moves.weights[-1] and grad is not None:
            piece = part.of(grad).reshape(part.groups, -1, part.width)
            targets.append(mine[..., : part.inputs])
            sources.append(piece.mT if part.transposed else piece)
        else:
            still.append((mine[..., : part.inputs], before[..., : part.inputs]))
        moves.biases.append(id(part.bias) in moving)
        if part.bias is not None and moves.biases[-1] and part.bias.grad is not None:
            targets.append(mine[..., -1])
            sources.append(part.of_bias(part.bias.grad).reshape(part.groups, -1))
        elif part.bias is not None:
            still.append((mine[..., -1], before[..., -1]))
    for (_, p), mine, before in zip(vectors, layout.vector_parts(flat), layout.vector_parts(old), strict=True):
        moves.vectors.append(id(p) in moving)
        if moves.vectors[-1] and p.grad is not None:
            targets.append(mine)
            sources.append(real(p.grad).reshape(-1))
        else:
            still.append((mine, before))
    if targets:
        torch._foreach_copy_(targets, sources)
    if at.sign < 0:
        flat.neg_()
    for mine, before in still:
        mine.copy_(before)
    return moves


@torch.no_grad()
def apply(
    change: Tensor,
    shares: Tensor,
    layout: Layout,
    parts: Sequence[Part],
    vectors: Sequence[Vector],
    moves: Moves,
    at: Situation,
) -> None:
    """Move the parameters; the flat change is then what was made of it.

    Args:
        change: Flat.
        shares: Of the weights of each matrix that are lost first.
        layout: Of the change.
        parts: The matrices.
        vectors: The rest.
        moves: What moves.
        at: Rates.
    """
    rates = {id(p): rate for p, rate in zip(at.parameters, at.rates, strict=True)}
    one = at.rates[0] if len(set(at.rates)) == 1 else None
    kept = (1 - shares * (1.0 if one is None else one)).unbind()
    pieces, changes, keeps = [], [], []

    def put(p: nn.Parameter, piece: Tensor, mine: Tensor, matrices: slice) -> None:
        rate = rates[id(p)]
        if rate != 1:
            mine.mul_(rate)
        pieces.append(piece)
        changes.append(mine)
        keeps.append(kept[matrices.start] if one is not None else 1 - rate * shares[matrices.start])

    for number, part in enumerate(parts):
        mine, matrices = layout.part(change, number), layout.rows(number)
        D = mine[..., : part.inputs]
        if not moves.weights[number]:
            D.zero_()
        elif part.weight.is_contiguous():
            weight = part.of(part.weight).view(part.groups, -1, part.width)
            put(part.weight, weight.mT if part.transposed else weight, D, matrices)
        else:  # channels last, say
            piece = part.of(part.weight)
            put(part.weight, piece, D, matrices)
            changes[-1] = (D.mT if part.transposed else D).reshape(piece.shape)
        if part.bias is not None and not moves.biases[number]:
            mine[..., -1].zero_()
        elif part.bias is not None:
            put(part.bias, part.of_bias(part.bias).view(part.groups, -1), mine[..., -1], matrices)
    torch._foreach_mul_(pieces, keeps)
    torch._foreach_add_(pieces, changes)
    homes, moved = [], []
    for (_, p), mine, goes in zip(vectors, layout.vector_parts(change), moves.vectors, strict=True):
        if not goes:
            mine.zero_()
            continue
        if rates[id(p)] != 1:
            mine.mul_(rates[id(p)])
        homes.append(real(p))
        moved.append(mine.view_as(homes[-1]))
    if homes:
        torch._foreach_add_(homes, moved)
