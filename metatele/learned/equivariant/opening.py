r"""The teleport before the first step: hidden layers whose units are all alike are made well conditioned.

Networks with positive weights on positive data have hidden units that all do the same, in one linear piece of their
activation; no preconditioner changes that, since it moves along the gradient. A teleport does: with g made of second
moments, ``g = m^{-1/4} ((M/m + λ)/(1 + λ))^{-p/2}``, m the mean eigenvalue of M,

* where the activation is onto and there are no more samples than inputs, the exact action (Eq. 54 of the paper) with M
  the moments of the hidden units: they become uncorrelated, and the outputs stay. Inputs that are nearly dependent
  would ask for weights so large that rounding drowns the loss later; along those the move is left out in part, and
  the next layer takes up what it can of that;
* else the approximate one (Eq. 46) with M the moments of what the units receive: the outputs are kept in the
  least-squares sense, up to the damping exactly if there are no more samples than hidden units.

λ and p are constants: a teleport does not change the loss, so its derivative says nothing about them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import MetateleError
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.network.bias import with_ones
from metatele.perceptron.mlp import MLP, Pass
from metatele.symmetry import Approximate, Exact, GroupElement, Pair, Site, drift, sweep

_DAMPING, _POWER = 0.01, 0.88  # λ and p
_FIT = 1e-6  # relative damping of the least squares: nearly collinear units would get huge weights without
_FLOOR = 1e-3  # singular values of the inputs, in units of their Frobenius norm, below which they are not inverted
_REFIT = 1e-2  # relative damping with which the next layer makes up for that


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
        max_drift: Largest relative change of the outputs on the batch; a teleport with a larger one is refused.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> _ = torch.manual_seed(0)
        >>> mlp, x = MLP((20, 20, 20), LeakyReLU(0.1)), torch.rand(20, 20)
        >>> w = torch.rand(1, mlp.num_parameters)
        >>> opened = Opening(0.3)(mlp, w, x)
        >>> before, after = mlp.forward(mlp.unflatten(w), x), mlp.forward(mlp.unflatten(opened.weights), x)
        >>> bool(opened.moved.all()), bool((after - before).norm() < 1e-3 * before.norm())
        (True, True)
    """

    def __init__(self, max_drift: float) -> None:
        self.max_drift = max_drift

    def __call__(self, mlp: MLP, flat: Tensor, inputs: Tensor) -> Opened:
        """Teleport networks before their first step.

        Args:
            mlp: Their shape, with a hidden layer.
            flat: Weights ``[B, P]``.
            inputs: ``[B, d, n]`` or ``[d, n]``.
        """
        weights, x = mlp.unflatten(flat.detach().double()), inputs.detach().double()
        done = Pass(mlp, weights, x)
        layers = range(len(mlp.hidden_widths))
        exact = [self._exact(mlp, done, layer) for layer in layers]
        moments = [_moment(done.hidden[layer + 1] if exact[layer] else done.pre[layer]) for layer in layers]
        spectra = [Spectrum.of(M) for M in moments]
        moved = weights
        for layer in layers:
            elements: list[GroupElement | None] = [None] * len(layers)
            elements[layer] = _element(spectra[layer])
            action = _Floored() if exact[layer] else Approximate(damping=_FIT)
            moved = sweep(action, mlp, moved, x, elements)
        new = mlp.flatten(moved).to(flat.dtype)
        change = drift(mlp, weights, mlp.unflatten(new.double()), x)
        good = (change <= self.max_drift) & torch.isfinite(new).all(-1)
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


class _Floored(Exact):
    """The exact action, up to inputs that are nearly dependent: ``H⁺ = V (σ/max(σ, σ₀)²) Uᵀ``."""

    def prepare(self, inputs: Tensor, bias: bool = False) -> Tensor:
        """``H⁺`` of constant inputs."""
        H = with_ones(inputs) if bias else inputs
        U, s, Vh = torch.linalg.svd(H.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)  # which refuses a whole batch
        floor = (_FLOOR * s.norm(dim=-1, keepdim=True)).clamp_min(torch.finfo(s.dtype).tiny)
        return (Vh.mT * (s / torch.maximum(s, floor).square()).unsqueeze(-2)) @ U.mT

    def move(self, site: Site, g: GroupElement) -> Site:
        """Least squares in the outgoing weights make up for what the incoming ones leave out."""
        moved = super().move(site, g)
        V, U, bias = moved.pair
        after = Site(moved.pair, site.inputs, site.activation)
        change = after.fit(_REFIT).after(site.pair.U @ site.hidden - U @ after.hidden)
        return after.between(Pair(V, U + change, bias))


def _moment(h: Tensor) -> Tensor:
    return h @ h.mT / h.shape[-1]


def _element(spectrum: Spectrum) -> GroupElement:
    """The group element of a layer."""
    like = spectrum.scale
    m = spectrum.multipliers(like.new_full(like.shape, _DAMPING), like.new_full(like.shape, _POWER / 2))[0]
    m = m * like.pow(-0.25)[:, None]
    V = spectrum.vectors
    return GroupElement((V * m.unsqueeze(-2)) @ V.mT, (V / m.unsqueeze(-2)) @ V.mT)
