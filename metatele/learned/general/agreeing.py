"""How far the gradients of the two halves of a batch agree: what is not noise in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metatele.learned.general.direction import Root
from metatele.learned.general.layout import Layout
from metatele.network.use import TINY


def half_products(
    layout: Layout, roots: Sequence[Root | None], gradients: Tensor, halves: Mapping[int, Tensor]
) -> Tensor:
    """Inner products of the two halves of each matrix's gradient in whitened coordinates, ``[L, 2, 2]``.

    Args:
        layout: Of the matrices.
        roots: Of each bucket.
        gradients: Flat.
        halves: Of the first half of the batch, ``[g, o, i]`` by the parts' numbers; zeros of the others.

    Example:
        >>> layout = Layout([(1, 1, 2)], ["dense"], [])
        >>> half_products(layout, [None], torch.tensor([3.0, 0.0]), {0: torch.tensor([[[1.0, 0.0]]])})
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    products = gradients.new_zeros(layout.matrices, 2, 2)
    for bucket, root in zip(layout.buckets, roots, strict=True):
        if not any(n in halves for n in bucket.parts):
            continue
        G = bucket.of(gradients)
        H = torch.cat([halves[n] if n in halves else torch.zeros_like(layout.part(gradients, n)) for n in bucket.parts])
        m, o, i = bucket.shape
        both = torch.stack([H, G - H], 1)
        if root is not None:
            both = root.right(both.view(m, 2 * o, i))
        both = both.view(m, 2, o * i)
        torch.bmm(both, both.mT, out=products[bucket.rows])
    return products.nan_to_num_(0.0, 0.0, 0.0)


def agreed(products: Tensor, old: Tensor, old_all: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running agreements of each matrix ``[L]`` and of the whole network ``[]``.

    Args:
        products: What :func:`half_products` gave.
        old: Of each matrix.
        old_all: Of the network.
        share: Of the new ones.

    Example:
        >>> one, all_ = agreed(torch.ones(1, 2, 2), torch.zeros(1), torch.zeros(()), 1.0)
        >>> one, all_
        (tensor([1.]), tensor(1.))
    """
    one, two, across = products[:, 0, 0], products[:, 1, 1], products[:, 0, 1]
    cosine = (across / (one * two).sqrt().clamp_min(TINY)).clamp(0, 1)
    known = (one > 0) & (two > 0)
    new = torch.where(known, old.lerp(2 * cosine / (1 + cosine), share), old)
    # Layers count alike.
    weight = torch.where(known, 1 / (one + two).clamp_min(TINY), 0.0).nan_to_num(0.0, 0.0, 0.0)
    sums = (products * weight[:, None, None]).sum(0)
    one, two, across = sums[0, 0], sums[1, 1], sums[0, 1]
    cosine = (across / (one * two).sqrt().clamp_min(TINY)).clamp(0, 1)
    return new, torch.where(known.any(), old_all.lerp(2 * cosine / (1 + cosine), share), old_all)
