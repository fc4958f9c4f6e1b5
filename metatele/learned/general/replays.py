"""Steps between two looks that a GPU replays as single launches; everywhere else they are simply made."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatele.errors import with_page

LARGEST = 1 << 24  # numbers of a network up to which the memory of its graphs is not asked for
_ROOM = 3  # times the memory of its numbers that is to be free for those of a larger one
_MOST = 6  # graphs that are kept
_CAPTURES = 48  # of one network, after which more would take longer than they save

Body = Callable[[], Tensor]


class _Captured(NamedTuple):
    replay: Callable[[], None]
    output: Tensor
    held: list[Tensor]
    kept: object


class Replays:
    """Bodies that read and write the same memory each time, captured when they come a second time.

    What a body reads and others replace, as a look does with roots, is copied to where the captured one reads it.
    A capture that fails is said once, and bodies are called from then on.

    Args:
        capture: Of a body: what replays it, and what it returned, whose memory each replay writes anew. It may not
            run the body.
        has_room: Asked before each capture; where it once says no, no more are made.

    Example:
        >>> replays, x = Replays(lambda body: (body, x)), torch.zeros(1)
        >>> [float(replays.run("doubled", [], lambda: x.add_(1))) for _ in range(3)]
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self, capture: Callable[[Body], tuple[Callable[[], None], Tensor]], has_room: Callable[[], bool] | None = None
    ) -> None:
        self._capture, self._has_room = capture, has_room
        self.full = False
        self._known: dict[Hashable, _Captured] = {}
        self._seen: dict[Hashable, None] = {}  # once, without a graph; the last of them
        self.off = False
        self.captures = self.count = 0

    def run(self, key: Hashable, held: Sequence[Tensor], body: Body, kept: object = None) -> Tensor:
        """Do what the body does.

        Args:
            key: Two bodies with the same one differ by the values of ``held`` alone.
            held: What it reads that may lie elsewhere next time, of the same shapes for the same key.
            body: Asks for no value on the host.
            kept: Lives as long as its graph.
        """
        if self.off:
            return body()
        known = self._known.get(key)
        if known is None:
            if key not in self._seen or self.captures >= _CAPTURES or not self._fits():
                self._seen = dict.fromkeys([*list(self._seen)[1 - _MOST :], key])
                return body()
            known = self._captured(body, held, kept)
            if known is None:
                return body()
            while len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
        self._known[key] = self._known.pop(key, known)  # the last ones used are kept
        moved = [(old, new) for old, new in zip(known.held, held, strict=True) if old is not new]
        if moved:
            torch._foreach_copy_([old for old, _ in moved], [new for _, new in moved])
        known.replay()
        self.count += 1
        return known.output

    def _fits(self) -> bool:
        self.full = self.full or not (self._has_room is None or self._has_room())
        return not self.full

    def _captured(self, body: Body, held: Sequence[Tensor], kept: object) -> _Captured | None:
        self.captures += 1
        try:
            return _Captured(*self._capture(body), list(held), (body, kept))
        except Exception as error:
            self.off = True
            self.forget()
            reason = str(error).split("\n")[0]
            said = f"steps are made one call after another, as no CUDA graph could be captured: {reason}"
            warnings.warn(with_page(said, "docs/learned-optimizer.md#what-its-warnings-mean"), stacklevel=2)
            return None

    def forget(self) -> None:
        """Let go of all graphs."""
        self._known, self._seen = {}, {}


def cuda_graph(device: torch.device, stream: Any, body: Body, pool: Any = None) -> tuple[Callable[[], None], Tensor]:
    """A body as a CUDA graph.

    Args:
        device: Where it runs.
        stream: Of that device, to capture on. Torch's own is of the device of the first graph of all: on any other one
            nothing would be captured, and replays would do nothing. Graphs that share their memory share it too.
        body: Asks for no value on the host.
        pool: Memory that it shares with other graphs; what one of them returns is read before the next is replayed.
    """
    graph = torch.cuda.CUDAGraph()
    was = gc.isenabled()
    gc.collect()
    gc.disable()  # another graph that is freed meanwhile would spoil this one
    try:
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            output = body()
    except BaseException:
        with suppress(Exception):
            torch.cuda.synchronize()
        raise
    finally:
        if was:
            gc.enable()
    return graph.replay, output


def has_room(device: torch.device, needed: int) -> bool:
    """Whether so many bytes are free on a device beside what torch keeps: the passes need that again."""
    return bool(torch.cuda.mem_get_info(device)[0] >= needed)


def replays_for(like: Tensor, size: int) -> Replays | None:
    """What replays the steps of a network of so many numbers, on the device of a tensor; ``None`` for plain steps.

    Of a network above :data:`LARGEST` a graph is captured where at least three times the memory of its numbers is free
    on the device, and all its graphs share their memory.
    """
    if not like.is_cuda or torch.version.hip is not None:
        return None
    capture = partial(cuda_graph, like.device, torch.cuda.Stream(like.device))
    if size <= LARGEST:
        return Replays(capture)
    capture = partial(capture, pool=torch.cuda.graph_pool_handle())
    return Replays(capture, partial(has_room, like.device, _ROOM * size * like.element_size()))


def shapes(tensors: Iterable[Tensor]) -> Hashable:
    """Of all of them."""
    return tuple(tuple(t.shape) for t in tensors)
