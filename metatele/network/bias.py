"""A bias is one more column of its weight, for an input that is always 1. The one home of that convention."""

from __future__ import annotations

import torch
from torch import Tensor


def with_ones(inputs: Tensor) -> Tensor:
    """A row of ones below the inputs ``[..., d, n]``: what a bias sees."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1, :])], -2)


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weight ``[..., o, i]`` with its bias ``[..., o]`` as last column.

    Example:
        >>> joined(torch.zeros(2, 3), torch.ones(2))
        tensor([[0., 0., 0., 1.],
                [0., 0., 0., 1.]])
    """
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def parted(matrix: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`joined`."""
    return (matrix[..., :-1], matrix[..., -1]) if biased else (matrix, None)
