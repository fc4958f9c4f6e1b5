"""Attention heads in a canonical basis before a first step: weights, gradients, and what passes have shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metatele.network.heads import Head
from metatele.network.parts import Part
from metatele.network.totals import Total
from metatele.network.use import Moment
from metatele.network.watch import Watch
from metatele.optim.steppers import Situation
from metatele.symmetry.group import GroupElement
from metatele.symmetry.heads import balances, turn_, turned_

NOTE = "{} pairs of attention weights, of queries and keys or around values, were balanced before the first step."


@torch.no_grad()
def balanced_(watch: Watch, at: Situation, above: float) -> int:
    """Balance the heads of attention that a first pass showed, where their basis is worse than a bound.

    Weights, their gradients and the sums that the passes left are moved together, so that a step from there is one from
    a network that was in this basis all along. All ranks make the same.

    Args:
        watch: What the passes showed.
        at: Parameters, and which of them move.
        above: Imbalance of a head, from which they are balanced.

    Returns:
        Number of heads.
    """
    moving = {id(p) for p, rate in zip(at.parameters, at.rates, strict=True) if rate}
    weights = {id(p): p.detach() for p in at.parameters}
    gradients = {id(p): p.grad for p in at.parameters if p.grad is not None}
    heads = [head for head in watch.heads() if all(_is_usable(p, moving) for p in head.parameters)]
    done = [(h, g) for h, g in balances(heads, weights, above) if turned_(h, g, weights, gradients)]
    for head, g in done:
        turn_(head, g, gradients, dual=True)
    if done:
        _turn_sums(watch.parts, watch.totals, done)
    return len(done)


def _is_usable(p: torch.nn.Parameter, moving: set[int]) -> bool:
    fine = p.dtype in (torch.float32, torch.float64) and id(p) in moving
    return fine and p.is_contiguous() and p.grad is not None and p.grad.is_contiguous()


# --- what passes have left


def _turn_sums(parts: Sequence[Part], totals: Mapping[int, Total], done: Sequence[tuple[Head, GroupElement]]) -> None:
    touched = {id(p): p for head, _ in done for p in head.parameters}
    for name in ("half", "whole"):
        sums = {number: value for number, one in totals.items() if (value := getattr(one, name)) is not None}
        if not sums:
            continue
        like = next(iter(sums.values()))
        tensors = {key: torch.zeros(p.shape, dtype=like.dtype, device=p.device) for key, p in touched.items()}
        mine = {n: v for n, v in sums.items() if id(parts[n].weight) in tensors}
        for number, value in mine.items():
            part = parts[number]
            piece, column = part.split(value)
            part.of(tensors[id(part.weight)]).copy_(piece)
            if column is not None and part.bias is not None and id(part.bias) in tensors:
                part.of_bias(tensors[id(part.bias)]).copy_(column)
        for head, g in done:
            turn_(head, g, tensors, dual=True)
        for number, old in mine.items():
            part = parts[number]
            bias = None if part.bias is None else tensors.get(id(part.bias))
            new = part.matrix(tensors[id(part.weight)], bias)
            value = old.clone()
            value[..., : new.shape[-1]] = new
            setattr(totals[number], name, value)
    for number, one in totals.items():
        part, inputs = parts[number], one.inputs
        if isinstance(inputs, Moment) and part.groups == 1 and id(part.weight) in touched:
            T = _of_inputs(part, done, inputs.tensor)
            if T is not None:
                one.inputs = _turned_moment(inputs, T)


def _of_inputs(part: Part, done: Sequence[tuple[Head, GroupElement]], like: Tensor) -> Tensor | None:
    """What was done to a part's inputs ``[i(+1), i(+1)]``; ``None`` if nothing was."""
    T, found = torch.eye(like.shape[-2], dtype=torch.float64), False
    first = part.matrix(torch.arange(part.weight.numel()).view(part.weight.shape))[0, 0]  # numbers of its first row
    for head, g in done:
        if head.kind != "vo" or head.right[0].weights[0] is not part.weight:
            continue
        for side in head.right:
            hit = first == side.places[0][:, :1]  # [k, i]
            if bool((hit.sum(1) == 1).all()):
                order = hit.int().argmax(1)
                T[order[:, None], order] = g.matrix
                found = True
    return T.to(like) if found else None


def _turned_moment(inputs: Moment, T: Tensor) -> Moment:
    """``T A Tᵀ``; what a factor leaves out stays even, with its trace."""
    if inputs.rest is None:
        return Moment(T @ inputs.tensor @ T.mT)
    return Moment(T @ inputs.tensor, inputs.rest * (T.square().sum() / len(T)))
