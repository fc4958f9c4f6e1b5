r"""Views of a tensor in the graph of a pass: what they did is read from their nodes and done again to a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node
Chain = list[tuple[Any, int]]  # views between a node and its user, the nearest to the user first; with output numbers
_LARGEST = 2**63  # negative numbers come back from a graph without their sign


def _signed(number: int) -> int:
    return number - 2 * _LARGEST if number >= _LARGEST else number


def shape_out(node: Node, number: int) -> tuple[int, ...]:
    """Shape of a node's output."""
    return tuple(node._input_metadata[number].shape)


def _slice(node: Node, t: Tensor) -> Tensor:
    dim, end = _signed(node._saved_dim), _signed(node._saved_end)
    index = [slice(None)] * t.dim()
    index[dim] = slice(_signed(node._saved_start), end, node._saved_step)
    return t[tuple(index)]


# What each view did, replayed on a tensor; the third argument says which of several outputs.
VIEWS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "TBackward0": lambda node, t, _: t.t(),
    "TransposeBackward0": lambda node, t, _: t.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "PermuteBackward0": lambda node, t, _: t.permute([_signed(d) for d in node._saved_dims]),
    "SliceBackward0": lambda node, t, _: _slice(node, t),
    "SelectBackward0": lambda node, t, _: t.select(_signed(node._saved_dim), _signed(node._saved_index)),
    "UnbindBackward0": lambda node, t, number: t.unbind(_signed(node._saved_dim))[number],
    "ExpandBackward0": lambda node, t, number: t.expand(shape_out(node, number)),
    **{
        name: lambda node, t, number: t.split(node._saved_split_size, _signed(node._saved_dim))[number]
        for name in ("SplitBackward0", "UnsafeSplitBackward0")
    },
    **{
        name: lambda node, t, number: t.split(list(node._saved_split_sizes), _signed(node._saved_dim))[number]
        for name in ("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0")
    },
    **{
        name: lambda node, t, number: t.view(shape_out(node, number))
        for name in (
            "ViewBackward0",
            "UnsafeViewBackward0",
            "ReshapeAliasBackward0",
            "UnsqueezeBackward0",
            "SqueezeBackward0",
            "SqueezeBackward1",
            "SqueezeBackward2",
        )
    },
    **{name: lambda node, t, _: t for name in ("CloneBackward0", "ToCopyBackward0", "AliasBackward0")},
}


def below(node: Node, number: int) -> tuple[Node, int, Chain]:
    """What a node is a view of, through any number of views."""
    chain: Chain = []
    while node.name() in VIEWS:
        below, other = node.next_functions[0]
        if below is None:
            break
        chain.append((node, number))
        node, number = below, other
    return node, number, chain


WHOLE = "_metatele_whole"  # of what fully_shard gathered for a pass: what stands for it in steps


def leaf_of(node: Node) -> Any:
    """The parameter whose gradient ends in a node; ``None`` for any other node."""
    variable = getattr(node, "variable", None)
    return getattr(variable, WHOLE, variable)


def replayed(parameter: Tensor, chain: Chain) -> Tensor | None:
    """A stand-in of a parameter without elements, seen through views; ``None`` if it would take a copy."""
    stand_in = torch.empty(parameter.shape, device="meta")
    try:
        for node, number in reversed(chain):
            stand_in = VIEWS[node.name()](node, stand_in, number)
    except (RuntimeError, AttributeError, IndexError):
        return None
    return stand_in


def is_open(node: Node, saved: str) -> bool:
    """Whether a saved tensor can be read without running somebody's hook, as those of checkpointing.

    Example:
        >>> x, W = torch.ones(3, 2), torch.ones(2, 2, requires_grad=True)
        >>> with torch.autograd.graph.save_on_cpu():
        ...     guarded = x @ W
        >>> is_open((x @ W).grad_fn, "self"), is_open(guarded.grad_fn, "self")
        (True, False)
    """
    raw = getattr(node, f"_raw_saved_{saved}", None)
    if raw is None:
        return False
    if hasattr(raw, "unpack_hook"):
        return raw.unpack_hook is None
    known = f"metatele {saved}"
    if known not in node.metadata:  # earlier versions of torch say so only by refusing another hook
        try:
            raw.register_hooks(_same, _same)
        except RuntimeError:
            return False
        node.metadata[known] = True
    return True


def _same(tensor: Any) -> Any:
    return tensor
