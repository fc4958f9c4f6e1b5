"""What several processes hold of one batch of trajectories, put together for a file and taken apart again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Common = Callable[[str], bool]


def joined_shares(shares: list[Any], is_common: Common, name: str = "") -> Any:
    """The processes' shares as one: rows one below the other.

    Args:
        shares: The same nesting of dictionaries, lists, tensors and plain values for each process.
        is_common: Whether the tensor of a name is one for all trajectories; the first share's stands for it then.
        name: Of what is joined.

    Returns:
        As nested; an empty dictionary if there are no shares, as in all processes but the first.

    Example:
        >>> joined_shares([{"w": torch.ones(2)}, {"w": torch.zeros(1)}], lambda name: False)
        {'w': tensor([1., 1., 0.])}
    """
    if len(shares) < 2:
        return shares[0] if shares else {}
    first = shares[0]
    if isinstance(first, dict):
        return {key: joined_shares([share[key] for share in shares], is_common, key) for key in first}
    if isinstance(first, list):
        return [joined_shares(list(parts), is_common, name) for parts in zip(*shares, strict=True)]
    if not isinstance(first, Tensor) or is_common(name):
        return first
    return torch.cat([share.cpu() for share in shares])


def own_share(
    saved: Any, share: range, batch: int, is_common: Common, device: torch.device | str = "cpu", name: str = ""
) -> Any:
    """One process's share of what :func:`joined_shares` made, on a device.

    Args:
        saved: As nested.
        share: Which trajectories are this process's.
        batch: How many there are.
        is_common: As above.
        device: Where tensors go.
        name: Of what is taken apart.

    Example:
        >>> own_share({"w": torch.tensor([1.0, 1.0, 0.0])}, range(2, 3), 3, lambda name: False)
        {'w': tensor([0.])}
    """
    if isinstance(saved, dict):
        return {key: own_share(value, share, batch, is_common, device, key) for key, value in saved.items()}
    if isinstance(saved, list):
        return [own_share(value, share, batch, is_common, device, name) for value in saved]
    if not isinstance(saved, Tensor):
        return saved
    if is_common(name):
        return saved.to(device)
    rows = saved.shape[0] // batch
    return saved[share.start * rows : share.stop * rows].to(device)
