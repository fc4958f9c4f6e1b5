r"""The teleport before the first step: hidden layers whose units are all alike are made well conditioned.

Networks with positive weights on positive data have hidden units that all do the same, in one linear piece of their
activation; no preconditioner changes that, since it moves along the gradient. A teleport does: with g made of second
moments, ``g = s ((M/m + λ)/(1 + λ))^{-p/2}``, m the mean eigenvalue of M,

* where the activation is onto and there are no more samples than inputs, the exact action (Eq. 54 of the paper) with M
  the moments of the hidden units: they become uncorrelated, and the outputs stay;
* else the approximate one (Eq. 46) with M the moments of what the units receive: the outputs are kept in the
  least-squares sense, up to the damping exactly if there are no more samples than hidden units.

How far, (λ, p, s), is learned: a linear function of a few numbers about the layer. A teleport does not change the loss,
so its derivative says nothing about it; it is learned from what comes after, by policy gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import MetateleError
from metatele.metaopt.spectrum import Spectrum
from metatele.mlp import MLP, Pass
from metatele.symmetry import Approximate, Exact, GroupElement, drift, sweep

NUMBERS = 9
SPREAD = 0.3  # standard deviation of what is tried in training, in units of the policy's outputs
CHOICES = 3
_FIT = 1e-6  # relative damping of the least squares: nearly collinear units would get huge weights without


class Opened(NamedTuple):
    """A network after the teleport.

    Attributes:
        weights: Flat ``[B, P]``; those given where the teleport was refused.
        moved: Whether it was not, ``[B]``.
        numbers: What the policy read, ``[B, hidden layers, NUMBERS]``.
        chosen: What was done, in units of the policy's outputs, ``[B, hidden layers, 3]``.
    """

    weights: Tensor
    moved: Tensor
    numbers: Tensor
    chosen: Tensor


class Opening(nn.Module):
    """See the module.

    Args:
        max_drift: Largest relative change of the outputs on the batch; a teleport with a larger one is refused.

    Example:
        >>> from metatele.activations import LeakyReLU
        >>> _ = torch.manual_seed(0)
        >>> mlp, x = MLP((20, 20, 20), LeakyReLU(0.1)), torch.rand(20, 20)
        >>> w = torch.rand(1, mlp.num_parameters)
        >>> opened = Opening(0.3)(mlp, w, x)
        >>> before, after = mlp.forward(mlp.unflatten(w), x), mlp.forward(mlp.unflatten(opened.weights), x)
        >>> bool(opened.moved.all()), bool((after - before).norm() < 1e-3 * before.norm())
        (True, True)
    """

    def __init__(self, max_drift: float) -> None:
        super().__init__()
        self.max_drift = max_drift
        self.weight = nn.Parameter(torch.zeros(CHOICES, NUMBERS))

    def forward(self, mlp: MLP, flat: Tensor, inputs: Tensor, noise: Tensor | None = None) -> Opened:
        """Teleport networks before their first step.

        Args:
            mlp: Their shape, with a hidden layer.
            flat: Weights ``[B, P]``.
            inputs: ``[B, d, n]`` or ``[d, n]``.
            noise: To be added to what the policy says, ``[B, hidden layers, 3]``, in units of :data:`SPREAD`.
        """
        weights, x = mlp.unflatten(flat.detach().double()), inputs.detach().double()
        done = Pass(mlp, weights, x)
        layers = range(len(mlp.hidden_widths))
        exact = [self._exact(mlp, done, layer) for layer in layers]
        moments = [_moment(done.hidden[layer + 1] if exact[layer] else done.pre[layer]) for layer in layers]
        spectra = [Spectrum.of(M) for M in moments]
        bent = [_bent(z, h) for z, h in zip(done.pre, done.hidden[1:], strict=False)]
        numbers = self._numbers(mlp, spectra, bent, exact, x.shape[-1]).to(flat)
        chosen = (numbers @ self.weight.mT).detach()
        if noise is not None:
            chosen = chosen + SPREAD * noise
        moved = weights
        for layer in layers:
            elements: list[GroupElement | None] = [None] * len(layers)
            elements[layer] = _element(spectra[layer], chosen[:, layer].double())
            action = Exact(rank_tolerance=0.0) if exact[layer] else Approximate(damping=_FIT)
            moved = sweep(action, mlp, moved, x, elements)
        new = mlp.flatten(moved).to(flat.dtype)
        change = drift(mlp, weights, mlp.unflatten(new.double()), x)
        good = (change <= self.max_drift) & torch.isfinite(new).all(-1)
        return Opened(torch.where(good[:, None], new, flat), good, numbers, chosen)

    def log_likelihood(self, opened: Opened) -> Tensor:
        """Of what was done, up to a constant, ``[B]``; differentiable in the policy."""
        return -((opened.chosen - opened.numbers @ self.weight.mT) / SPREAD).square().sum((-2, -1)) / 2

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

    @staticmethod
    def _numbers(mlp: MLP, spectra: list[Spectrum], bent: list[Tensor], exact: list[bool], n: int) -> Tensor:
        last = len(spectra) - 1
        rows = [
            torch.stack(
                [
                    s.participation.log() / 2,
                    bent[layer].log() / 6,
                    *(
                        torch.full_like(s.participation, value)
                        for value in (
                            1.0,
                            float(exact[layer]),
                            math.log(n / mlp.hidden_widths[layer]) / 2,
                            math.log(n) / 5,
                            math.log(mlp.hidden_widths[layer]) / 5,
                            float(layer == 0),
                            float(layer == last),
                        )
                    ),
                ],
                -1,
            )
            for layer, s in enumerate(spectra)
        ]
        return torch.stack(rows, 1)


def _moment(h: Tensor) -> Tensor:
    return h @ h.mT / h.shape[-1]


def _bent(pre: Tensor, hidden: Tensor) -> Tensor:
    """How far the units are from linear on the batch: mean of 1 - R², ``[B]``, no less than 1e-6."""
    z, h = pre - pre.mean(-1, keepdim=True), hidden - hidden.mean(-1, keepdim=True)
    explained = (z * h).sum(-1).square() / (z.square().sum(-1) * h.square().sum(-1)).clamp_min(1e-300)
    return (1 - explained).mean(-1).clamp(1e-6, 1.0)


def _element(spectrum: Spectrum, chosen: Tensor) -> GroupElement:
    """``s ((M/m + λ)/(1 + λ))^{-p/2}`` and its inverse; s between 1 and ``m^{-1/2}``, which makes units of size 1."""
    damping = (3 * chosen[:, 0] - 4.6).exp()
    power = torch.sigmoid(4 * chosen[:, 1] + 2)
    scale = spectrum.scale.pow(-torch.sigmoid(2 * chosen[:, 2]) / 2)
    m = spectrum.multipliers(damping, power / 2)[0] * scale[:, None]
    V = spectrum.vectors
    return GroupElement((V * m.unsqueeze(-2)) @ V.mT, (V / m.unsqueeze(-2)) @ V.mT)
