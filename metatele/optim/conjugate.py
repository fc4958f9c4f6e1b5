"""Whitening by conjugation: every step of a base optimizer is made at the whitened point and pulled back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.bias import joined, parted, with_ones
from metatele.symmetry import GroupElement
from metatele.teleport import Whitening
from metatele.teleport.closed_form import whitening


class Conjugation:
    r"""``W ← (W g⁻¹ + f)·g`` for the weights of each layer, g whitening what the layer receives.

    ``W`` includes the bias as a column, whose input is constantly 1. ``g = (S + λ‖S‖I)^{-1/2}`` with S a running
    average of the second moments ``hhᵀ`` of the layer's inputs, corrected for its start. In the coordinates
    ``W' = W g⁻¹`` the gradient is ``∇W g`` (g is symmetric) and f is what the base optimizer makes of it, so its
    state lives there. For plain gradient descent the step is ``-η ∇W (S + λ‖S‖I)⁻¹``: half of K-FAC.

    Args:
        move: Settings.
        linears: The layers of the network, in order.
    """

    def __init__(self, move: Whitening, linears: list[nn.Linear]) -> None:
        self.move = move
        self.layers = list(range(0 if move.inputs else 1, len(linears)))
        self.moments: list[Tensor | None] = [None] * len(linears)
        self.elements: list[GroupElement | None] = [None] * len(linears)
        self.updates = 0

    def observe(self, hidden: list[Tensor], linears: list[nn.Linear], group: ranks.Group | None = None) -> bool:
        """Take in the inputs ``[d, n]`` of each layer, and renew g where it is time.

        Args:
            hidden: For each layer.
            linears: The layers.
            group: Of processes that train copies of the network: g is the first one's in all of them.

        Returns:
            Whether it did: a batch whose second moments are not finite would spoil the averages for good.
        """
        keep = self.move.averaging
        moments: dict[int, Tensor] = {}
        for layer in self.layers:
            h = hidden[layer]
            if linears[layer].bias is not None:
                h = with_ones(h)
            moments[layer] = h @ h.mT / h.shape[1]
        if not all(bool(torch.isfinite(second).all()) for second in moments.values()):
            return False
        for layer, second in moments.items():
            old = self.moments[layer]
            self.moments[layer] = (1 - keep) * second if old is None else keep * old + (1 - keep) * second
        if self.updates % self.move.refresh == 0:
            corrected = 1 - keep ** (self.updates + 1)
            for layer in self.layers:
                moment = self.moments[layer]
                assert moment is not None
                self.elements[layer] = whitening(moment / corrected, self.move.damping)
            ranks.broadcast_((t for g in self.elements if g is not None for t in g), group)
        self.updates += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """The running averages and the elements in use."""
        elements = [None if g is None else list(g) for g in self.elements]
        return {"moments": list(self.moments), "elements": elements, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.moments = [None if m is None else m.clone() for m in state["moments"]]
        self.elements = [None if g is None else GroupElement(*(t.clone() for t in g)) for g in state["elements"]]
        self.updates = state["updates"]

    @contextmanager
    def whitened(self, linears: list[nn.Linear]) -> Iterator[None]:
        """Inside, weights and gradients are those of the whitened coordinates; after, they are pulled back."""
        kept = []
        for layer in self.layers:
            g, parameters = self.elements[layer], list(linears[layer].parameters())
            if g is None or any(p.grad is None for p in parameters):
                continue
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            weights = _matrix([p.detach().clone() for p in parameters])
            inside = weights @ g.inverse.to(weights.dtype)
            _split(inside, parameters)
            _split(_matrix(gradients) @ g.matrix.to(weights.dtype), [p.grad for p in parameters if p.grad is not None])
            kept.append((parameters, gradients, weights, inside, g))
        try:
            yield
        finally:
            for parameters, gradients, weights, inside, g in kept:
                # The change alone is pulled back, so rounding does not add up in what did not change.
                change = _matrix([p.detach() for p in parameters]) - inside
                _split(weights + change @ g.matrix.to(weights.dtype), parameters)
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient


def _matrix(parts: Sequence[Tensor]) -> Tensor:
    """A weight, with its bias as last column if there is one."""
    return joined(parts[0], parts[1] if len(parts) == 2 else None)


def _split(matrix: Tensor, targets: Sequence[Tensor]) -> None:
    for target, part in zip(targets, parted(matrix, len(targets) == 2), strict=False):
        if part is not None:
            target.copy_(part)
