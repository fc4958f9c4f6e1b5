r"""Labels of the elements of a node's output, carried towards a module's outputs through views, factors and biases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.network.views import VIEWS, Node, is_open, shape_out

Bias = tuple[nn.Parameter, Tensor]  # and the numbers of its elements, one for each unit


class End(NamedTuple):
    """Where labels are used in something that is no view.

    Attributes:
        node: Where; ``None`` for the model's outputs, and where it is not known.
        slot: Of its inputs.
        labels: As they lie there.
        factored: What they stand for was multiplied by a number on the way.
    """

    node: Node | None
    slot: int
    labels: Tensor
    factored: bool


class Users:
    """Who uses the outputs of each node on the way to the model's outputs."""

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.of: dict[Node, dict[int, list[tuple[Node | None, int]]]] = {}
        stack: list[Node] = []
        for output in outputs:
            if output.grad_fn is not None:
                self._edge(None, 0, output.grad_fn, output.output_nr, stack)
        while stack:
            node = stack.pop()
            for slot, (under, number) in enumerate(node.next_functions):
                if under is not None:
                    self._edge(node, slot, under, number, stack)

    def _edge(self, user: Node | None, slot: int, node: Node, number: int, stack: list[Node]) -> None:
        if node not in self.of:
            self.of[node] = {}
            stack.append(node)
        self.of[node].setdefault(number, []).append((user, slot))

    def ends(
        self, node: Node, number: int, labels: Tensor, biases: Mapping[Node, Bias] | None = None
    ) -> tuple[list[End], list[Bias]]:
        """Where labels of a node's output are used, through views and factors; and what is added on the way.

        Args:
            node: The node.
            number: Of its output.
            labels: Of its elements.
            biases: Parameters whose sum with something a node is; without them every sum is an end.
        """
        found: list[End] = []
        added: list[Bias] = []
        stack = [(node, number, labels, False)]
        while stack:
            node, number, labels, factored = stack.pop()
            for user, slot in self.of.get(node, {}).get(number, ()):
                name = "" if user is None else user.name()
                if user is not None and name in VIEWS:
                    for out in self.of[user]:
                        seen = _seen(user, labels, out)
                        if seen is None:
                            found.append(End(None, slot, labels, factored))
                        else:
                            stack.append((user, out, seen, factored))
                    continue
                if user is not None and _is_factor(user, name, slot) and _keeps(user, labels):
                    stack.append((user, 0, labels, True))
                elif user is not None and biases is not None and user in biases and _keeps(user, labels):
                    p, places = biases[user]
                    row = None if factored else constant(labels, (-1,))
                    if row is None or not torch.equal(row.sort().values, torch.arange(len(places)).to(row)):
                        found.append(End(None, slot, labels, factored))
                        continue
                    added.append((p, places[row.argsort()]))
                    stack.append((user, 0, labels, factored))
                else:
                    found.append(End(user, slot, labels, factored))
        return found, added


def _keeps(node: Node, labels: Tensor) -> bool:
    return tuple(shape_out(node, 0)) == tuple(labels.shape)


def _seen(node: Node, labels: Tensor, number: int) -> Tensor | None:
    """Labels through a view."""
    try:
        if node.name().startswith(("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")):
            return labels.reshape(shape_out(node, number))
        seen = VIEWS[node.name()](node, labels, number)
    except (RuntimeError, AttributeError, IndexError):
        return None
    return seen if tuple(seen.shape) == tuple(shape_out(node, number)) else None


def _is_factor(node: Node, name: str, slot: int) -> bool:
    """Whether a node multiplies by one number."""
    if name not in ("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1") or (name[0] == "D" and slot):
        return False
    if name.endswith("0") and node.next_functions[1 - slot][0] is not None:
        return False
    saved = "other" if slot == 0 else "self"
    if name.endswith("0") and not is_open(node, saved):  # reading it would run somebody's hook
        return False
    other = getattr(node, f"_saved_{saved}", None)
    if not isinstance(other, int | float) and not (isinstance(other, Tensor) and other.numel() == 1):
        return False
    value = float(other)
    return bool(value) and math.isfinite(value)


def constant(labels: Tensor, along: tuple[int, ...]) -> Tensor | None:
    """Labels if they depend on some dimensions alone: with one entry of each other one."""
    keep = {d % labels.dim() for d in along}
    first = labels[tuple(slice(None) if d in keep else slice(0, 1) for d in range(labels.dim()))]
    if not labels.numel() or not bool((labels == first).all()):
        return None
    return first.reshape([size for d, size in enumerate(labels.shape) if d in keep])
