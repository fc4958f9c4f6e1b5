"""Steps between two looks that a GPU replays as single launches; everywhere else they are simply made."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import with_page

LARGEST = 1 << 24  # numbers of a network up to which calls take longer than the work, and its memory costs little
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

    Example:
        >>> replays, x = Replays(lambda body: (body, x)), torch.zeros(1)
        >>> [float(replays.run("doubled", [], lambda: x.add_(1))) for _ in range(3)]
        [1.0, 2.0, 3.0]
    """

    def __init__(self, capture: Callable[[Body], tuple[Callable[[], None], Tensor]]) -> None:
        self._capture = capture
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
            if key not in self._seen or self.captures >= _CAPTURES:
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


def cuda_graph(device: torch.device, body: Body) -> tuple[Callable[[], None], Tensor]:
    """A body as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    was = gc.isenabled()
    gc.collect()
    gc.disable()  # another graph that is freed meanwhile would spoil this one
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = body()
    except BaseException:
        with suppress(Exception):
            torch.cuda.synchronize()
        raise
    finally:
        if was:
            gc.enable()
    return graph.replay, output


def replays_for(like: Tensor, size: int) -> Replays | None:
    """What replays the steps of a network of so many numbers, on the device of a tensor; ``None`` for plain steps."""
    plain = not like.is_cuda or size > LARGEST or torch.version.hip is not None
    return None if plain else Replays(partial(cuda_graph, like.device))


def shapes(tensors: Iterable[Tensor]) -> Hashable:
    """Of all of them."""
    return tuple(tuple(t.shape) for t in tensors)
