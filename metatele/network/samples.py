"""Batches and samples of any module's arguments, known again by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from metatele.network.use import Fingerprint


def fingerprint_of(data: Sequence[Tensor], dtype: torch.dtype) -> Fingerprint | None:
    """Of some tensors ``[B, ...]`` together; ``None`` if there is nothing in them.

    Example:
        >>> fingerprint_of([torch.ones(4, 3), torch.tensor([[0], [1], [2], [3]])], torch.float32).columns
        8
    """
    total = None
    for t in data:
        if not t.numel() or t.dtype is torch.bool:
            continue
        # Numbers of tokens say nothing by their size: spread evenly, one batch differs more from another.
        x = t.to(dtype) if t.is_floating_point() else (t.to(torch.float64) * 2.399963).sin().to(dtype)
        one = Fingerprint.of(x.reshape(1, len(t), -1).mT)
        total = one if total is None else total.plus(one)
    return total


@torch.no_grad()
def sample_hashes(batch: Tensor) -> Tensor:
    """A whole number below 2⁵³ for each sample of ``[B, ...]``, as float64: the same for the same bits, wherever.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> one, other, again = sample_hashes(x).tolist()
        >>> one == again, one == other
        (True, False)
    """
    x = batch.detach().reshape(len(batch), prod(batch.shape[1:]))
    if x.is_floating_point():
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x = (x + 0.0).contiguous().view(bits)
    mixed = (x.to(torch.int64) * _odd_numbers(x.shape[1], x.device)).sum(1)  # wraps around
    mixed = (mixed ^ (mixed >> 29)) * 0x1F85EBCA6B2A4D  # low bits alone see low bits alone
    return ((mixed >> 11) & (2**53 - 1)).to(torch.float64)


@lru_cache(maxsize=8)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(count)
    return (torch.randint(2**62, (count,), generator=random) * 2 + 1).to(device)
