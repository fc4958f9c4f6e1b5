"""What a look shows of a network, the same on all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metatele.learned.general.course import Course
from metatele.learned.general.scene import Glimpse, Scene
from metatele.network import ranks
from metatele.network.use import Moment
from metatele.network.watch import Watch
from metatele.optim.moving import Moves, real
from metatele.optim.steppers import Situation
from metatele.perceptron.losses import level


@torch.no_grad()
def scene_of(course: Course, watch: Watch, at: Situation, moves: Moves, by_gradient: set[int], same: bool) -> Scene:
    """What the passes showed.

    Args:
        course: The network's memories.
        watch: What its passes showed.
        at: Where it is.
        moves: What moves.
        by_gradient: Numbers of the parts whose moments are of their gradients, as their inputs were never seen; those
            seen now leave it.
        same: Whether the batch is the last one again.
    """
    parts, layout, like = watch.parts, course.layout, course.usual
    pieces: dict[int, Glimpse] = {}
    for number, seen in watch.seen().items():
        if seen.columns:
            half = None if seen.half is None else at.signed(seen.half)
            pieces[number] = Glimpse(seen.inputs, half, seen.columns, seen.positions)
    for number in range(len(parts)):
        known = pieces.get(number)
        if known is not None and known.inputs is not None:
            if number in by_gradient:  # those were of something else
                by_gradient.discard(number)
                course.moments[number], course.taken[number] = None, 0
        elif moves.weights[number] and (number in by_gradient or course.moments[number] is None):
            by_gradient.add(number)
            pieces[number] = _by_gradient(course, number, known)
    norms = list(torch._foreach_norm([part.of(part.weight) for part in parts])) if parts else []
    for number, part in enumerate(parts):
        if part.groups > 1:
            table = part.of(part.weight).reshape(part.groups, -1)
            norms[number] = torch.linalg.vector_norm(table, dim=1)
    order = sorted(range(len(parts)), key=lambda number: layout.rows(number).start)
    sizes = torch.cat([norms[number].reshape(-1).to(like) for number in order]) if parts else like.new_zeros(0)
    vectors = _root_mean_squares([real(p.detach()) for _, p in watch.vectors], like)
    samples, loss = _joint(watch, at, like)
    hashes = watch.samples()
    if watch.group is not None:
        hashes = like.new_zeros(0, dtype=torch.float64) if hashes is None else hashes
        hashes = ranks.gathered(hashes[None], watch.group)[0]
    known_samples = course.remember([] if hashes is None else hashes.tolist())
    total = at.group.get("total_steps")
    return Scene(
        pieces,
        sizes,
        vectors,
        samples,
        known_samples,
        None if loss is None else loss.cpu(),
        course.age / total if total else -1.0,
        same,
    )


def _root_mean_squares(vectors: list[Tensor], like: Tensor) -> Tensor:
    if not vectors:
        return like.new_zeros(0)
    norms = torch._foreach_norm([v if v.dtype in (torch.float32, torch.float64) else v.float() for v in vectors])
    counts = like.new_tensor([max(v.numel(), 1) for v in vectors])
    return torch.stack([norm.to(like) for norm in norms]) / counts.sqrt()


def _by_gradient(course: Course, number: int, known: Glimpse | None) -> Glimpse:
    """A piece whose inputs are not known: by the moments of its gradient, of trace 1."""
    G = course.layout.part(course.gradient, number)
    inputs: Moment | Tensor | None
    if course.layout.ways[number] == "diagonal":
        found = G.square().sum((0, 1))[None]
        inputs = found / found.sum() if float(found.sum()) > 0 else None
    else:
        moment = Moment.of(G.mT, course.config.dense, course.config.rank)
        inputs = moment.scaled(1 / moment.trace.sum()) if float(moment.trace.sum()) > 0 else None
    if known is None:
        return Glimpse(inputs, None, G.shape[1], 1.0)
    return Glimpse(inputs, known.half, known.columns, known.positions)


def ends_of(watch: Watch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor] | None:
    """Outputs ``[o, n]`` of all passes and ranks and the gradient there; all ranks have to ask.

    A rank with another kind of output than most, or none, leaves all without.
    """
    ends = _columns(watch, dtype)
    if watch.group is None:
        return ends
    width = 0 if ends is None else ends[0].shape[0]
    like = next((part.weight for part in watch.parts), None)
    counts = torch.tensor([width, width * width, 1], dtype=torch.float64, device=None if like is None else like.device)
    ranks.sum_([counts], watch.group)
    total, squares, size = counts.tolist()
    if not total or squares * size != total * total or ends is None:  # they differ
        return None
    both = ranks.gathered(torch.cat(ends), watch.group)
    return both[:width].contiguous(), both[width:].contiguous() / ranks.size(watch.group)


def _columns(watch: Watch, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    found = watch.outputs()
    if found is None or found[0].is_complex():
        return None
    outputs, gradient = (t.detach().to(dtype) for t in found)
    if outputs.dim() == 0:
        return outputs.reshape(1, 1), gradient.reshape(1, 1)
    return outputs.reshape(-1, outputs.shape[-1]).mT, gradient.reshape(-1, outputs.shape[-1]).mT


def _joint(watch: Watch, at: Situation, like: Tensor) -> tuple[int, Tensor | None]:
    """Samples on all ranks, and the log of their mean loss; ``None`` if that is not known."""
    samples, loss = watch.samples_seen, _loss(watch, at, like)
    if watch.group is None:
        return samples, loss
    there = loss is not None and bool(samples)
    value = float(loss.exp()) if there and loss is not None else 0.0
    sums = torch.tensor([samples, samples * value, there, bool(samples)], dtype=torch.float64, device=like.device)
    ranks.sum_([sums], watch.group)
    samples, weighted, known, shares = sums.tolist()
    if not samples or known != shares or not math.isfinite(weighted):
        return int(samples), None
    return int(samples), like.new_tensor(max(weighted / samples, 1e-30)).log()


def _loss(watch: Watch, at: Situation, like: Tensor) -> Tensor | None:
    """Log of the loss on this rank: of the closure, else as the outputs and their gradient tell."""
    if at.loss is not None:
        return like.new_tensor(max(at.loss, 1e-30)).log() if at.loss >= 0 else None
    found = watch.outputs()
    if found is not None and found[0].dim() == 0:  # the model gives its loss
        value = at.sign * float(found[0].detach())
        return like.new_tensor(max(value, 1e-30)).log() if value >= 0 else None
    ends = _columns(watch, torch.float32)
    if ends is None or not ends[0].numel():
        return None
    return level(ends[0], at.signed(ends[1])).reshape(()).to(like)
