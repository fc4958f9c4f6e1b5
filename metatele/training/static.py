"""Functions whose tensors stay where they are, so that a GPU can replay many kernels as a single launch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from metatele.errors import with_page
from metatele.learned.flat.trajectories import Trajectories

_BEFORE_CAPTURE = 3  # runs before a capture, in which libraries set themselves up

Body = Callable[[Trajectories], tuple[Trajectories, Tensor]]


def _tensors(at: Trajectories) -> list[Tensor]:
    found = [at.problems.inputs, at.problems.targets, at.problems.initial, at.weights, at.loss, at.gradient]
    return found + ([] if at.prepared is None else [at.prepared]) + at.states.tensors()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in here, but one before: a CUDA graph that is freed while another is captured spoils that.

    Trainers and their windows refer to each other, so graphs that are not needed any more are garbage until it is
    collected, at whatever line that happens.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def replayable(device: torch.device) -> bool:
    """Whether a device has graphs to capture.

    Example:
        >>> replayable(torch.device("cpu"))
        False
    """
    return device.type == "cuda"


def captured(
    run: Callable[[], object], changed: Sequence[Tensor] = (), before: int = _BEFORE_CAPTURE
) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of a function that reads and writes memory which stays where it is.

    Args:
        run: Takes and returns nothing, and asks for no value on the CPU.
        changed: What it changes; this is as before afterwards.
        before: Runs before the capture, in which libraries set themselves up.

    Returns:
        The graph, to be replayed; ``None``, with a warning, if none can be made.

    Example:
        >>> x = torch.zeros(3)
        >>> graph = captured(lambda: x.add_(1), [x]) if torch.cuda.is_available() else None
        >>> x
        tensor([0., 0., 0.])
    """
    kept = [t.clone() for t in changed]
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(before):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph):
            run()
    except Exception as error:  # torch and its libraries raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = f"no CUDA graph could be captured, and each kernel is launched by itself: {reason}"
        warnings.warn(with_page(said, "docs/meta-training.md#threads-memory-precision-graphs"), stacklevel=2)
        return None
    finally:
        for tensor, was in zip(changed, kept, strict=True):
            tensor.copy_(was)
    return graph


class StaticWindow:
    """A window from and to memory of its own; on a GPU a CUDA graph.

    A window of the flat family is some thousand small kernels, whose launches take longer than their work at the
    usual batches. Captured once, they are replayed by one launch. Norm, clipping and Adam stay outside: a few kernels
    each, and whether an update is healthy must be known on the CPU.

    Args:
        body: Unrolls from trajectories, differentiates, and returns where they are then and the objective, both
            detached; no value may be asked for on the CPU.
        parameters: Whose gradients it leaves.
        like: Trajectories of the shapes that it will be called with.
        capture: Whether to make a CUDA graph; if not, or if that fails, the body is called each time, with the same
            result.

    Example:
        >>> from metatele.config import preset
        >>> from metatele.training.flat import FlatTrainer
        >>> trainer = FlatTrainer(preset("quick", batch=2, widths=(3, 4, 2), samples=3, hidden=8))
        >>> window = StaticWindow(
        ...     lambda at: trainer.differentiated(at, 10), list(trainer.optimizer.parameters()), trainer.trajectories
        ... )
        >>> end, objective = window(trainer.trajectories)
    """

    def __init__(
        self, body: Body, parameters: Sequence[nn.Parameter], like: Trajectories, capture: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self._begin = replace(
            like,
            problems=replace(
                like.problems,
                inputs=like.problems.inputs.clone(),
                targets=like.problems.targets.clone(),
                initial=like.problems.initial.clone(),
            ),
            prepared=None if like.prepared is None else like.prepared.clone(),
            weights=like.weights.clone(),
            loss=like.loss.clone(),
            gradient=like.gradient.clone(),
            states=like.states.map(torch.Tensor.clone),
        )
        self._body = body
        self._graph = captured(self._run) if capture else None

    def _run(self) -> None:
        for p in self.parameters:
            p.grad = None
        self._end, self._objective = self._body(self._begin)
        self._gradients = [p.grad for p in self.parameters]

    def __call__(self, at: Trajectories) -> tuple[Trajectories, Tensor]:
        """Trajectories after the window and its objective, until the next call; the parameters have gradients then."""
        for ours, theirs in zip(_tensors(self._begin), _tensors(at), strict=True):
            ours.copy_(theirs)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
            for p, gradient in zip(self.parameters, self._gradients, strict=True):
                p.grad = gradient
        # The problems are the caller's: those in here change with the next call.
        return replace(self._end, problems=at.problems, prepared=at.prepared), self._objective
