"""Several processes that train copies of one model: what a step is made of has to be the same in all of them.

A group is the one of the ``DistributedDataParallel`` wrapper whose forward pass a layer's hook saw; ``None`` stands for
a model in one process, and then nothing here does anything. Sums and gathered columns have the same bits in every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metatele.errors import UnsupportedModelError
from metatele.network.use import Moment

Group = Any  # a torch.distributed.ProcessGroup, which torch without distributed support does not have


def active_group() -> Group | None:
    """The group of the ``DistributedDataParallel`` whose forward pass is running, if it has several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.nn.parallel import DistributedDataParallel

    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return None
    if wrapper._join_config.enable:
        raise UnsupportedModelError(
            "the optimizer's steps are those of all ranks together, which a rank that has joined makes none of: train "
            "without DistributedDataParallel.join, with as many batches on each rank",
            page="docs/learned-optimizer.md#what-works-with-it",
        )
    group = wrapper.process_group
    return group if group is not None and dist.get_world_size(group) > 1 else None


def size(group: Group | None) -> int:
    """Number of ranks."""
    return 1 if group is None else dist.get_world_size(group)


def sum_(tensors: Iterable[Tensor], group: Group | None) -> None:
    """Replace tensors by their sums over the ranks, with one message for each dtype."""
    _joint(tensors, group, lambda t: dist.all_reduce(t, group=group))


def mean_(tensors: Sequence[Tensor], group: Group | None) -> None:
    """Replace tensors by their means over the ranks, as gradients are under ``DistributedDataParallel``."""
    if group is not None:
        sum_(tensors, group)
        for t in tensors:
            t.detach().div_(size(group))


def told(number: float, group: Group | None, device: torch.device) -> list[float]:
    """A number of every rank, in their order; on a device on which the group sends."""
    if group is None:
        return [number]
    numbers = torch.zeros(size(group), dtype=torch.float64, device=device)
    numbers[dist.get_rank(group)] = number
    dist.all_reduce(numbers, group=group)
    return [float(n) for n in numbers.tolist()]


def broadcast_(tensors: Iterable[Tensor], group: Group | None) -> None:
    """Replace tensors by those of the first rank, with one message for each dtype."""
    if group is not None:
        first = dist.get_global_rank(group, 0)
        _joint(tensors, group, lambda t: dist.broadcast(t, first, group=group))


def _joint(tensors: Iterable[Tensor], group: Group | None, message: object) -> None:
    if group is None:
        return
    assert callable(message)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for members in kinds.values():
        buffer = torch.cat([t.detach().reshape(-1) for t in members])
        message(buffer)
        for t, part in zip(members, buffer.split([t.numel() for t in members]), strict=True):
            t.detach().copy_(part.view_as(t))


def gathered(columns: Tensor, group: Group | None) -> Tensor:
    """Columns ``[d, n]`` of all ranks in their order, ``[d, Σn]``; the ranks may have different n."""
    if group is None:
        return columns
    counts = torch.zeros(size(group), dtype=torch.int64, device=columns.device)
    counts[dist.get_rank(group)] = columns.shape[-1]
    dist.all_reduce(counts, group=group)
    numbers = counts.tolist()
    mine = columns.new_zeros(max(numbers), columns.shape[0])
    mine[: columns.shape[-1]] = columns.T
    parts = [torch.empty_like(mine) for _ in numbers]
    dist.all_gather(parts, mine, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, numbers, strict=True)]).T


def moments(moments: Sequence[Moment | None], rank: int, group: Group | None) -> list[Moment | None]:
    """Sums of second moments over the ranks: whole ones are added, factors of wide ones gathered and compressed."""
    if group is None:
        return list(moments)
    whole = [m.tensor.clone() for m in moments if m is not None and m.rest is None]
    sum_(whole, group)
    rest = iter(whole)
    found: list[Moment | None] = []
    for moment in moments:
        if moment is None:
            found.append(None)
        elif moment.rest is None:
            found.append(Moment(next(rest)))
        else:
            factors, rests = gathered(moment.tensor, group), gathered(moment.rest.view(1, 1), group)
            total = Moment(factors, rests.sum().view(1, 1))
            found.append(total.compressed(rank, total.trace))
    return found


def refuse_sharded(parameters: Iterable[Tensor], what: str) -> None:
    """Refuse parameters of which a process holds a part alone.

    Args:
        parameters: Of the model.
        what: Who refuses them.

    Raises:
        UnsupportedModelError: FSDP, FSDP2 (``fully_shard``) or tensor parallelism splits one.
    """
    for p in parameters:
        kind = next((c.__name__ for c in type(p).__mro__ if c.__name__ in ("DTensor", "FlatParameter")), None)
        kind = kind or next((c.__name__ for c in type(p.data).__mro__ if c.__name__ == "DTensor"), None)
        if kind is not None:
            raise UnsupportedModelError(
                f"{what} does not work with parameters that are split over processes (FSDP, fully_shard, tensor "
                f"parallelism), and found a {kind}: use DistributedDataParallel; or, for the learned optimizer's "
                "checkpoint 'general', fully_shard of the whole model over one dimension of processes",
                page="docs/learned-optimizer.md#what-works-with-it",
            )
