r"""The teleport before the first step: hidden layers whose units are all alike are made well conditioned.

Networks with positive weights on positive data have hidden units that all do the same, in one linear piece of their
activation; no preconditioner changes that, since it moves along the gradient. A teleport does: with g made of second
moments, ``g = m^{-1/4} ((M/m + λ)/(1 + λ))^{-p/2}``, m the mean eigenvalue of M,

* where the activation is onto and there are no more samples than inputs, the exact action (Zhao et al. 2024, Eq. 54)
  with M the moments of the hidden units: they become uncorrelated, and the outputs stay. Inputs that are nearly
  dependent would ask for weights so large that rounding drowns the loss later; along those the move is left out in
  part, and the next layer takes up what it can of that;
* else the approximate one (Zhao et al. 2024, Eq. 46) with M the moments of what the units receive: the outputs are
  kept in the least-squares sense, up to the damping exactly if there are no more samples than hidden units.

λ and p are constants: a teleport does not change the loss, so its derivative says nothing about them. Layers of more
units than ``dense`` of the configuration stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.errors import MetateleError
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.network.bias import with_ones
from metatele.perceptron.mlp import MLP, Pass
from metatele.symmetry import Action, Approximate, Exact, GroupElement, Pair, Site, drift, sweep


class Opened(NamedTuple):
    """A network after the teleport.

    Attributes:
        weights: Flat ``[B, P]``; those given where the teleport was refused.
        moved: Whether it was not, ``[B]``.
    """

    weights: Tensor
    moved: Tensor


class Opening:
    """See the module.

    Args:
        config: ``drift``, the largest relative change of the outputs on the batch, above which a teleport is refused;
            ``opening_damping`` λ, ``opening_power`` p and the other settings that begin so.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> _ = torch.manual_seed(0)
        >>> mlp, x = MLP((20, 20, 20), LeakyReLU(0.1)), torch.rand(20, 20)
        >>> w = torch.rand(1, mlp.num_parameters)
        >>> opened = Opening(EquivariantConfig())(mlp, w, x)
        >>> before, after = mlp.forward(mlp.unflatten(w), x), mlp.forward(mlp.unflatten(opened.weights), x)
        >>> bool(opened.moved.all()), bool((after - before).norm() < 1e-3 * before.norm())
        (True, True)
    """

    def __init__(self, config: EquivariantConfig) -> None:
        self.config = config

    def __call__(self, mlp: MLP, flat: Tensor, inputs: Tensor) -> Opened:
        """Teleport networks before their first step.

        Args:
            mlp: Their shape, with a hidden layer.
            flat: Weights ``[B, P]``.
            inputs: ``[B, d, n]`` or ``[d, n]``.
        """
        weights, x = mlp.unflatten(flat.detach().double()), inputs.detach().double()
        done = Pass(mlp, weights, x)
        c, layers = self.config, range(len(mlp.hidden_widths))
        elements: list[GroupElement | None] = [None] * len(layers)
        moves: list[tuple[Action, list[GroupElement | None]]] = []
        for layer in layers:
            if mlp.hidden_widths[layer] > c.dense:
                continue
            exact = self._exact(mlp, done, layer)
            M = _moment(done.hidden[layer + 1] if exact else done.pre[layer])
            action: Action = (
                _Floored(floor=c.opening_floor, refit=c.opening_refit) if exact else Approximate(damping=c.opening_fit)
            )
            element = _element(Spectrum.of(M), c.opening_damping, c.opening_power)
            moves.append((action, [*elements[:layer], element, *elements[layer + 1 :]]))
        moved = weights
        for action, chosen in moves:
            moved = sweep(action, mlp, moved, x, chosen)
        new = mlp.flatten(moved).to(flat.dtype)
        change = drift(mlp, weights, mlp.unflatten(new.double()), x)
        good = (change <= c.drift) & torch.isfinite(new).all(-1)
        return Opened(torch.where(good[:, None], new, flat), good)

    @staticmethod
    def _exact(mlp: MLP, done: Pass, layer: int) -> bool:
        """Whether the exact action can move a layer."""
        if not (mlp.activations[layer].invertible and mlp.activations[layer].range == (-math.inf, math.inf)):
            return False
        h = done.hidden[layer]
        if h.shape[-1] > h.shape[-2] + mlp.biases[layer]:
            return False
        try:
            Exact().prepare(h.float(), mlp.biases[layer])
        except MetateleError:
            return False
        return True


@dataclass(frozen=True)
class _Floored(Exact):
    """The exact action, up to inputs that are nearly dependent: ``H⁺ = V (σ/max(σ, σ₀)²) Uᵀ``.

    Args:
        floor: σ₀ relative to the norm of H.
        refit: Relative damping of the least squares that make up for it.
    """

    floor: float = 0.0
    refit: float = 0.0

    def prepare(self, inputs: Tensor, bias: bool = False) -> Tensor:
        """``H⁺`` of constant inputs."""
        H = with_ones(inputs) if bias else inputs
        U, s, Vh = torch.linalg.svd(H.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)  # which refuses a whole batch
        floor = (self.floor * s.norm(dim=-1, keepdim=True)).clamp_min(torch.finfo(s.dtype).tiny)
        return (Vh.mT * (s / torch.maximum(s, floor).square()).unsqueeze(-2)) @ U.mT

    def move(self, site: Site, g: GroupElement) -> Site:
        """Least squares in the outgoing weights make up for what the incoming ones leave out."""
        moved = super().move(site, g)
        V, U, bias = moved.pair
        after = Site(moved.pair, site.inputs, site.activation)
        change = after.fit(self.refit).after(site.pair.U @ site.hidden - U @ after.hidden)
        return after.between(Pair(V, U + change, bias))


def _moment(h: Tensor) -> Tensor:
    return h @ h.mT / h.shape[-1]


def _element(spectrum: Spectrum, damping: float, power: float) -> GroupElement:
    """The group element of a layer."""
    like = spectrum.scale
    m = spectrum.multipliers(like.new_full(like.shape, damping), like.new_full(like.shape, power / 2))[0]
    m = m * like.pow(-0.25)[:, None]
    V = spectrum.vectors
    return GroupElement((V * m.unsqueeze(-2)) @ V.mT, (V / m.unsqueeze(-2)) @ V.mT)
