"""Carrying velocities along a teleport."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.perceptron.mlp import MLP
from metatele.teleport.move import Leg


def transport(mlp: MLP, path: Sequence[Leg], flat: Tensor, velocity: Tensor) -> Tensor:
    r"""Differential of a teleport at w applied to a tangent vector: ``d/dε g·(w + εv)`` at ε = 0.

    The group elements stay fixed, as chosen at w. A momentum buffer is such a vector: it is the direction
    in which the weights move, and after the teleport the same motion of the network has this velocity
    (Zhao et al. 2024, Figure 12).

    Args:
        mlp: Shape of the network.
        path: Of the teleport.
        flat: Weights before it ``[..., P]``.
        velocity: ``v``, ``[..., P]``.

    Returns:
        The velocity at the new point, ``[..., P]``.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.teleport import Rescaling
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> w = torch.tensor([8.0, 2.0])
        >>> moved = Rescaling()(Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError()), w)
        >>> transport(mlp, moved.path, w, torch.tensor([1.0, 1.0]))  # s = 1/2: v ↦ (s, 1/s)
        tensor([0.5000, 2.0000])
    """

    def replayed(point: Tensor) -> Tensor:
        for leg in path:
            point = leg.apply(mlp, point)
        return point

    if not path:
        return velocity
    with torch.enable_grad():
        result: Tensor = torch.autograd.functional.jvp(replayed, flat.detach(), velocity.detach())[1]
    return result
