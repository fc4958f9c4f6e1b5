"""A course's memories as an optimizer's state: what belongs to a parameter in its entry, the rest as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metatele.learned.general.controller import SET, Controls
from metatele.learned.general.course import Course
from metatele.network.parts import Part, Vector
from metatele.network.use import Moment

Memory = MutableMapping[Any, dict[str, Any]]
_FLAT = {"momentum": "velocity", "change": "change"}  # as large as the parameters
_ROWS = ("usual", "agreement", "positions", "sizes", "start_sizes")  # a number of each matrix
_PLAIN = ("agreement_all", "calm")
_APART = [s.name for s in SET if not s.joint]
_JOINT = [s.name for s in SET if s.joint]


def laid_out(
    course: Course, memory: Memory, parts: Sequence[Part], vectors: Sequence[Vector], named: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """Put what belongs to parameters into their entries.

    Args:
        course: What is remembered.
        memory: Entries by parameter.
        parts: Those of the course.
        vectors: The same.
        named: The model's parameters by name.

    Returns:
        What belongs to the network.
    """
    layout, controls = course.layout, course.controls
    names = {id(p): name for name, p in named.items()}
    elsewhere: dict[str, dict[str, Any]] = {}  # of what is in no group
    memory = {
        p: memory[p] if p in memory else elsewhere.setdefault(names[id(p)], {}) for p in _parameters(parts, vectors)
    }
    for key, name in _FLAT.items():
        flat = getattr(course, name)
        for p in {id(p): p for p in _parameters(parts, vectors)}.values():
            like = torch.view_as_real(p.detach()) if p.is_complex() else p
            memory[p].setdefault(key, torch.zeros_like(like, dtype=flat.dtype, memory_format=torch.contiguous_format))
        for number, part in enumerate(parts):
            piece, column = part.split(layout.part(flat, number))
            part.of(memory[part.weight][key]).copy_(piece)
            if column is not None and part.bias is not None:
                part.of_bias(memory[part.bias][key]).copy_(column)
        for (_, p), mine in zip(vectors, layout.vector_parts(flat), strict=True):
            memory[p][key].copy_(mine.view_as(memory[p][key]))
    for (_, p), second in zip(vectors, course.seconds.split(layout.sizes), strict=True):
        memory[p]["second"] = second.view_as(memory[p]["momentum"]).clone()
    for number, prefix, part in places(parts):
        entry, rows, moment = memory[part.weight], layout.rows(number), course.moments[number]
        for name in _ROWS:
            value = getattr(course, name)
            if value is not None:
                entry[prefix + name] = value[rows].clone()
        if controls is not None:
            entry[prefix + "controls"] = torch.stack([getattr(controls, name)[rows] for name in _APART])
        if isinstance(moment, Moment):
            entry[prefix + "inputs"] = moment.tensor.clone()
            if moment.rest is not None:
                entry[prefix + "rest"] = moment.rest.clone()
        elif moment is not None:
            entry[prefix + "inputs"] = moment.clone()
        bucket, kept = next((b, k) for b, k in zip(layout.buckets, course.kept, strict=True) if number in b.parts)
        if kept.factor is not None:
            entry[prefix + "factor"] = kept.factor[rows.start - bucket.first : rows.stop - bucket.first].clone()
    joint = {name: getattr(course, name).tolist() for name in _PLAIN}
    joint |= {"log_rate": course.log_rate, "slopes": list(course.slopes), "slopes_long": list(course.slopes_long)}
    return {
        **joint,
        "elsewhere": elsewhere,
        "age": course.age,
        "start_loss": None if course.start_loss is None else float(course.start_loss),
        "epochs": course.epochs,
        "hashes": sorted(course.hashes),
        "columns": list(course.columns),
        "taken": list(course.taken),
        "plans": [[k.exact, k.every, k.renew, k.due] for k in course.kept],
        "vectors": None if controls is None else [float(getattr(controls, name)[-1]) for name in _APART],
        "joint": None if controls is None else [float(getattr(controls, name)) for name in _JOINT],
        "vector_scale": [float(part[0]) for part in course.spread.split(layout.sizes)] if layout.sizes else [],
        "layouts": [[_plain(part.layout), None if part.bias is None else names[id(part.bias)]] for part in parts],
        "loose": [name for name, _ in vectors],
    }


def read(
    course: Course,
    stored: Mapping[str, Any],
    memory: Memory,
    parts: Sequence[Part],
    vectors: Sequence[Vector],
    named: Mapping[str, nn.Parameter],
) -> None:
    """The inverse of :func:`laid_out`, into a course at its beginning."""
    layout, like, elsewhere = course.layout, course.usual, stored["elsewhere"]
    names = {id(p): name for name, p in named.items()}
    memory = {p: elsewhere.get(names[id(p)]) or memory[p] for p in _parameters(parts, vectors)}
    for name in _PLAIN:
        setattr(course, name, like.new_tensor(stored[name]))
    course.log_rate, course.slopes, course.slopes_long = (
        stored["log_rate"],
        tuple(stored["slopes"]),
        tuple(stored["slopes_long"]),
    )
    course.age, course.epochs, course.hashes = stored["age"], stored["epochs"], set(stored["hashes"])
    course.columns, course.taken = list(stored["columns"]), list(stored["taken"])
    course.start_loss = None if stored["start_loss"] is None else torch.tensor(stored["start_loss"], dtype=like.dtype)
    for kept, plan in zip(course.kept, stored["plans"], strict=True):
        kept.exact, kept.every, kept.renew, kept.due = plan
    for key, name in _FLAT.items():
        flat = getattr(course, name)
        for number, part in enumerate(parts):
            bias = None if part.bias is None else memory[part.bias][key].to(like)
            layout.part(flat, number).copy_(part.matrix(memory[part.weight][key].to(like), bias))
        for (_, p), mine in zip(vectors, layout.vector_parts(flat), strict=True):
            mine.copy_(memory[p][key].reshape(-1))
    for (_, p), second in zip(vectors, course.seconds.split(layout.sizes), strict=True):
        second.copy_(memory[p]["second"].reshape(-1))
    apart = like.new_zeros(len(_APART), layout.matrices + 1)
    factors: dict[int, Tensor] = {}
    for number, prefix, part in places(parts):
        entry, rows = memory[part.weight], layout.rows(number)
        for name in _ROWS:
            if prefix + name in entry:
                if getattr(course, name) is None:
                    setattr(course, name, torch.zeros_like(like))
                getattr(course, name)[rows] = entry[prefix + name].to(like)
        if prefix + "controls" in entry:
            apart[:, rows] = entry[prefix + "controls"].to(like)
        if prefix + "inputs" in entry:
            inputs, rest = entry[prefix + "inputs"].to(like), entry.get(prefix + "rest")
            diagonal = layout.ways[number] == "diagonal"
            course.moments[number] = inputs if diagonal else Moment(inputs, None if rest is None else rest.to(like))
        if prefix + "factor" in entry:
            factors[number] = entry[prefix + "factor"].to(like)
    if stored["vectors"] is not None:
        apart[:, -1] = like.new_tensor(stored["vectors"])
        joint = dict(zip(_JOINT, like.new_tensor(stored["joint"]), strict=True))
        course.controls = Controls(**dict(zip(_APART, apart, strict=True)), **joint)
        course.resume(like.new_tensor(stored["vector_scale"]))
        course.set_roots()
        course.group()
    for bucket, kept in zip(layout.buckets, course.kept, strict=True):
        if all(number in factors for number in bucket.parts):
            kept.factor = torch.cat([factors[number] for number in bucket.parts])


def laid_back(
    stored: Mapping[str, Any], parts: Sequence[Part], named: Mapping[str, nn.Parameter]
) -> tuple[list[Part], list[Vector]]:
    """Parts and vectors as passes had shown them when a state was stored.

    Args:
        stored: What :func:`laid_out` returned.
        parts: As types of layers tell.
        named: The model's parameters by name.
    """
    found = []
    for part, (layout, bias) in zip(parts, stored["layouts"], strict=True):
        kind, transposed, groups, width, rows, biased = layout
        home = None if bias is None else named[bias]
        found.append(part.laid_out((kind, transposed, groups, width, tuple(rows), biased), home))
    return found, [(name, named[name]) for name in stored["loose"]]


def _plain(layout: tuple[Any, ...]) -> list[Any]:
    return [list(value) if isinstance(value, tuple) else value for value in layout]


def places(parts: Sequence[Part]) -> Iterator[tuple[int, str, Part]]:
    """Number of each part, what its names begin with in its parameter's entry, and the part."""
    counts: dict[int, int] = {}
    for number, part in enumerate(parts):
        place = counts[id(part.weight)] = counts.get(id(part.weight), -1) + 1
        yield number, f"{place}.", part


def _parameters(parts: Sequence[Part], vectors: Sequence[Vector]) -> Iterator[nn.Parameter]:
    for part in parts:
        yield part.weight
        if part.bias is not None:
            yield part.bias
    for _, p in vectors:
        yield p
