"""Several processes that share the trajectories of one meta-training run, as ``torchrun`` starts them.

Every process holds the same meta-parameters and a share of the batch. One sum over all processes for each
meta-update makes their gradients, and with them the next parameters, the same to the last bit.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from metatele.errors import MetateleError, PeerLostError

_LOST = "another process of this run has stopped; the last saved state is intact: go on with --resume"


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; alone by default, where nothing is sent.

    Attributes:
        rank: Number of this one.
        count: How many there are.

    Example:
        >>> Processes(1, 3).share(8)
        range(3, 6)
        >>> Processes().share(8)
        range(0, 8)
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Which of ``total`` things are this process's; the earlier processes have one more if they do not divide."""
        whole, rest = divmod(total, self.count)
        begin = self.rank * whole + min(self.rank, rest)
        return range(begin, begin + whole + (self.rank < rest))

    def add_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes.

        Raises:
            PeerLostError: One of them is gone.
        """
        if self.count > 1:
            self._sent(lambda: dist.all_reduce(tensor))

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in their order, in the first one; an empty list in the others.

        Raises:
            PeerLostError: One of them is gone.
        """
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.first else None
        self._sent(lambda: dist.gather_object(value, found))
        return found or []

    def checked(self, check: Callable[[], None]) -> None:
        """Let the first process check what all depend on; all raise what it raises.

        Raises:
            MetateleError: What the check raised, of its kind.
            PeerLostError: One of them is gone.
        """
        found: list[MetateleError | None] = [None]
        if self.first:
            try:
                check()
            except MetateleError as error:
                found = [error]
        if self.count > 1:
            self._sent(lambda: dist.broadcast_object_list(found))
        if found[0] is not None:
            raise found[0]

    @staticmethod
    def _sent(send: Callable[[], object]) -> None:
        try:
            send()
        except RuntimeError as error:  # gloo and nccl raise this and its subclasses
            raise PeerLostError(_LOST) from error


@contextmanager
def joined(device: torch.device | None = None) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, or this one alone.

    gloo carries what they send. Where each has a GPU of its own, nccl carries what lies there; it refuses two
    processes on one GPU.

    Args:
        device: Of this process, as :func:`local_device` gives it; without one, the CPU.

    Raises:
        PeerLostError: They did not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes()
        return
    # Its default arguments are the group there is when it is imported. torch.optim does that: then they would keep the
    # group's threads alive past the end, where one that drops a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, rank, count = next(rendezvous("env://"))
        # torchrun keeps its store when it starts processes again: addresses of dead ones must not be found there.
        store = PrefixStore(f"attempt {_attempt()}", store)
        store.set(f"own GPU {rank}", str(_has_own_gpu(device)))
        own = all(store.get(f"own GPU {one}") == b"True" for one in range(count))
        backend = "cpu:gloo,cuda:nccl" if own else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PeerLostError(f"the processes of this run did not find each other: {first}") from error
    try:
        yield Processes(rank, count)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """``cuda`` becomes the GPU of this process among those of its machine."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _has_own_gpu(device: torch.device | None) -> bool:
    """Whether no other process of this machine can be on the same GPU: they are numbered alike."""
    return device is not None and device.type == "cuda" and device.index == int(os.environ.get("LOCAL_RANK", "-1"))


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restarted() -> bool:
    """Whether ``torchrun`` started this process again after a failure."""
    return _attempt() > 0
