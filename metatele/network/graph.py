r"""How a module's parameters are used in a pass, read from the graph of its outputs, whatever its layers are.

Walking back from the outputs, each parameter is met where it is **used**: in a product, a convolution, a look-up, or
in something else. Views between (transposes, splits, copies to another dtype) are replayed on a stand-in of the
parameter, so that it is known which of its elements are which in the product. A parameter that is also used in any
other way is *unseen*, with a reason: its gradient is more than what its products show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.network.parts import Part
from metatele.network.views import Chain, Node, below, is_open, leaf_of, replayed, shape_out

_ADDS = ("AddBackward0", "SubBackward0")
_SPREAD = (*_ADDS, "MulBackward0", "DivBackward0", "WhereBackward0")  # an operand may be the same for all samples


class _Product(NamedTuple):
    """Where the operands of a product ``left @ right`` stand among a node's inputs, and are saved."""

    left: int
    right: int
    saved: tuple[str, str]
    bias: int | None = None
    turned: bool = False  # computes left @ rightᵀ


_PRODUCTS = {
    "AddmmBackward0": _Product(1, 2, ("mat1", "mat2"), 0),
    "MmBackward0": _Product(0, 1, ("self", "mat2")),
    "BmmBackward0": _Product(0, 1, ("self", "mat2")),
    "BaddbmmBackward0": _Product(1, 2, ("batch1", "batch2")),
    "MvBackward0": _Product(0, 1, ("self", "vec")),
    "LinearBackward0": _Product(0, 1, ("input", "weight"), 2, turned=True),
}
# A recurrent layer without cuDNN on a GPU: gates of the inputs and of the hidden state, the state, the biases of both.
_GATES = ("ThnnFusedGruCellBackward0", "ThnnFusedLstmCellBackward0")
_OTHERS = {
    "ConvolutionBackward0": "a transposed convolution",
    "MkldnnRnnLayerBackward0": "a fused recurrent layer",
    "CudnnRnnBackward0": "a fused recurrent layer",
    "MiopenRnnBackward0": "a fused recurrent layer",
    "CompiledFunctionBackward": "a compiled graph",
}


class Target(NamedTuple):
    """A part that a use shows.

    Attributes:
        part: Its number.
        of_use: Outputs of the use that belong to it, first and one past the last.
        of_part: Rows of its matrix that they are.
        flipped: The use maps the part's outputs to its inputs, as a tied decoder does.
    """

    part: int
    of_use: tuple[int, int]
    of_part: tuple[int, int]
    flipped: bool = False


@dataclass(eq=False)
class Use:
    """A node of the graph in which a parameter is used.

    Attributes:
        node: The node.
        kind: ``"left"`` or ``"right"``, the side of a product; ``"conv"``; ``"embedding"``.
        saved: Name under which the node saves the inputs.
        groups: Matrices that it uses side by side.
        lead: Dimensions of its outputs before the features, as its user sees them.
        spread: Its output is the same for all samples.
        biased: A bias is added in it.
        targets: What it shows.
    """

    node: Node
    kind: str
    saved: str
    groups: int
    lead: tuple[int, ...]
    spread: bool = False
    biased: bool = False
    targets: list[Target] = field(default_factory=list)


class Layout(NamedTuple):
    """Where a use's matrix ``[groups, o, i]`` lies in a parameter."""

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    offset: int


class Graph(NamedTuple):
    """What a walk has found.

    Attributes:
        uses: In which parts are seen.
        reasons: Why others are not, by number.
        layouts: How each parameter that products use lies in them, by its ``id``.
        biases: Parameters that are added to a product's outputs as its bias, by ``id`` of its weight.
    """

    uses: list[Use]
    reasons: dict[int, str]
    layouts: dict[int, list[Layout]]
    biases: dict[int, nn.Parameter]


def tensors_in(tree: Any, depth: int = 8) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses.

    Example:
        >>> len(list(tensors_in({"a": [torch.zeros(1), 3], "b": (torch.zeros(2),)})))
        2
    """
    if isinstance(tree, Tensor):
        yield tree
    elif depth and isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value, depth - 1)
    elif depth and isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value, depth - 1)
    elif depth and is_dataclass(tree) and not isinstance(tree, type):
        for one in fields(tree):
            yield from tensors_in(getattr(tree, one.name), depth - 1)


class User(NamedTuple):
    """A node that uses something, by which input, and the views between."""

    node: Node
    name: str
    slot: int
    chain: Chain


class _Walk:
    """One walk from outputs to parameters."""

    def __init__(self, outputs: Iterable[Tensor], wanted: Mapping[int, Tensor]) -> None:
        self.wanted = wanted
        self.users: dict[int, list[User]] = {}  # of each parameter
        self.above: dict[Any, User] = {}  # one user of each node
        stack: list[Any] = []
        for output in outputs:
            if output.grad_fn is not None:
                self._edge(None, "the output", 0, output.grad_fn, output.output_nr, stack)
        while stack:
            node = stack.pop()
            name = node.name()
            for slot, (under, number) in enumerate(node.next_functions):
                if under is not None:
                    self._edge(node, name, slot, under, number, stack)

    def _edge(self, user: Node, name: str, slot: int, node: Node, number: int, stack: list[Any]) -> None:
        node, _, chain = below(node, number)
        variable = leaf_of(node)
        if variable is not None:  # a leaf
            if id(variable) in self.wanted:
                self.users.setdefault(id(variable), []).append(User(user, name, slot, chain))
        elif node not in self.above:
            self.above[node] = User(user, name, slot, chain)
            stack.append(node)

    def lead(self, node: Node, features: int) -> tuple[tuple[int, ...], bool]:
        """Leading dimensions of a node's outputs ``[..., features]``, and whether its user spreads them."""
        user, shape = self.above[node], shape_out(node, 0)
        lead = shape[:-1]
        for view, number in reversed(user.chain):
            shape = shape_out(view, number)
            if view.name() not in ("ViewBackward0", "UnsafeViewBackward0"):
                break
            if shape[-1] == features:
                lead = shape[:-1]
        size = torch.Size(shape_out(node, 0)).numel()
        last = torch.Size(shape_out(*user.chain[0])).numel() if user.chain else size
        wider = any(view.name() == "ExpandBackward0" for view, _ in user.chain) and last > size
        if user.name in _SPREAD:
            wider = wider or torch.Size(shape_out(user.node, 0)).numel() > last
        return lead, wider


def walk(outputs: Iterable[Tensor], parts: Sequence[Part], loose: Iterable[nn.Parameter] = ()) -> Graph:
    """How a pass uses the parameters of some parts.

    Args:
        outputs: Of the pass.
        parts: What is looked for.
        loose: Vectors, of which some may be biases.

    Example:
        >>> from metatele.network.parts import parts_of
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> found = walk([model(torch.ones(5, 3))], parts_of(model)[0])
        >>> [(use.kind, use.lead, use.biased, use.targets[0].part) for use in found.uses]
        [('right', (5,), True, 0), ('right', (5,), True, 1)]
    """
    by_weight: dict[int, list[int]] = {}
    vectors = {id(p): p for p in loose}
    wanted: dict[int, Tensor] = dict(vectors)
    for number, part in enumerate(parts):
        by_weight.setdefault(id(part.weight), []).append(number)
        wanted[id(part.weight)] = part.weight
        if part.bias is not None:
            wanted[id(part.bias)] = part.bias
    found = _Walk(outputs, wanted)
    reasons: dict[int, str] = {}
    layouts: dict[int, list[Layout]] = {}
    nodes: dict[Any, Use] = {}
    for key, numbers in by_weight.items():
        users = found.users.get(key, [])
        reason = None if users else "it was not found on the way from the model's outputs"
        uses: list[Use] = []
        for user in users:
            read = _read(user, wanted[key], found)
            if isinstance(read, str):
                reason, users = read, []
                break
            use, layout = read
            layouts.setdefault(key, []).append(layout)
            use.targets = list(_targets(layout, [(n, parts[n]) for n in numbers]))
            uses.append(use)
            if not use.targets:
                reason = "the product it is used in sees it in another layout"
        if not users:  # what is used elsewhere too has no layout
            layouts.pop(key, None)
        if reason is None:
            nodes.update({use.node: use for use in uses})
        else:
            reasons.update(dict.fromkeys(numbers, reason))
    _mark_biases(found, nodes, parts, reasons)
    for use in nodes.values():
        use.targets = [t for t in use.targets if t.part not in reasons]
    biases = _loose_biases(found, layouts, vectors)
    return Graph([use for use in nodes.values() if use.targets], reasons, layouts, biases)


def _read(user: User, parameter: Tensor, found: _Walk) -> tuple[Use, Layout] | str:
    """A use and where its matrix lies; or why it is none."""
    node, name, slot, chain = user
    seen = replayed(parameter, chain)
    if seen is None:
        return "it is used through a copy in another order"
    if name in _PRODUCTS:
        return _read_product(node, name, slot, seen, found)
    whole = seen.shape == parameter.shape and seen.is_contiguous() and not seen.storage_offset()
    if name == "ConvolutionBackward0" and slot == 1 and not node._saved_transposed:
        if not whole or not is_open(node, "input"):
            return _GUARDED if whole else "a convolution uses a piece of it"
        groups, (o, *_) = node._saved_groups, parameter.shape
        i = parameter[0].numel()
        layout = Layout((groups, o // groups, i), (o // groups * i, i, 1), 0)
        return Use(node, "conv", "input", groups, shape_out(node, 0), found.lead(node, -1)[1]), layout
    if name == "EmbeddingBackward0" and slot == 0:
        if not whole or node._saved_scale_grad_by_freq or not is_open(node, "indices"):
            return "its look-ups are weighted, or made in a piece of it"
        V, d = parameter.shape
        lead, spread = found.lead(node, d)
        return Use(node, "embedding", "indices", 1, lead, spread), Layout((1, d, V), (V * d, 1, d), 0)
    return f"it is used in {_OTHERS.get(name, name.removesuffix('0').removesuffix('Backward') or name)}"


def _read_product(node: Node, name: str, slot: int, seen: Tensor, found: _Walk) -> tuple[Use, Layout] | str:
    product = _PRODUCTS[name]
    if slot not in (product.left, product.right):
        return "it is added to a product"
    if any(getattr(node, f"_saved_{factor}", 1) not in (1, None) for factor in ("alpha", "beta")):
        return "it is used in a scaled product"
    kind = "left" if slot == product.left else "right"
    saved = product.saved[1 if kind == "left" else 0]
    if not is_open(node, saved):
        return _GUARDED
    other = node.next_functions[product.right if kind == "left" else product.left][0]
    if other is not None:
        under, _, _ = below(other, 0)
        if id(leaf_of(under)) in found.wanted:
            return "it is multiplied by another parameter"
    if seen.dim() < 2:
        return "it is used as a vector"
    M = seen.mT if kind == "right" and not product.turned else seen  # [..., o, i]
    if M.dim() == 2:
        M = M[None]
    if M.dim() != 3:
        return "it is used in a product in more dimensions"
    if M.shape[0] > 1 and M.stride(0) == 0:
        M = M[:1]
    g, o, i = M.shape
    if kind == "left":  # its outputs are columns
        shape = shape_out(node, 0)
        lead, spread = (shape[:1] if g == 1 and len(shape) == 3 else ()) + shape[len(shape) - 1 :], False
        lead = () if name == "MvBackward0" else lead
    else:
        lead, spread = found.lead(node, o)
    a, b, c = M.stride()
    return Use(node, kind, saved, g, lead, spread), Layout((g, o, i), (a, b, c), int(M.storage_offset()))


_GUARDED = "what it was multiplied by is not kept, but computed again by checkpointing or fetched by a hook"


def _targets(layout: Layout, parts: Iterable[tuple[int, Part]]) -> Iterator[Target]:
    """Which parts of its parameter a matrix shows, and where in them it lies."""
    (g, o, i), (a, b, c), offset = layout
    for number, part in parts:
        (G, O, I), (A, B, C) = (part.groups, part.outputs, part.inputs), part.strides  # noqa: E741
        if g != G or (g > 1 and a != A):
            continue
        away = offset - part.offset
        if i == I and (c == C or i == 1) and (b == B or o == 1) and away % B == 0:
            first = away // B
            begin, end = max(0, first), min(O, first + o)
            if begin < end:
                yield Target(number, (begin - first, end - first), (begin, end))
        elif (o, i) == (I, O) and (b == C or o == 1) and (c == B or i == 1) and away == 0:
            yield Target(number, (0, o), (0, O), flipped=True)


def _mark_biases(found: _Walk, nodes: Mapping[Any, Use], parts: Sequence[Part], reasons: dict[int, str]) -> None:
    """Mark the uses in which a part's bias is added; a part whose bias is used elsewhere is not seen."""
    owners: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        if part.bias is not None:
            owners.setdefault(id(part.bias), set()).add(number)
    for key, mine in owners.items():
        for user in found.users.get(key, []):
            use = added_to(user, nodes)
            if use is not None and any(t.part in mine for t in use.targets):
                use.biased = True
            else:
                for number in mine:
                    reasons.setdefault(number, "its bias is used elsewhere too")


def _loose_biases(
    found: _Walk, layouts: Mapping[int, list[Layout]], loose: Mapping[int, nn.Parameter]
) -> dict[int, nn.Parameter]:
    """Vectors that one fused product alone adds, by ``id`` of its weight."""
    biases: dict[int, nn.Parameter] = {}
    for key in layouts:
        if len(found.users[key]) == 1:
            user = found.users[key][0]
            product = _PRODUCTS.get(user.name)
            if product is None or product.bias is None or user.node.next_functions[product.bias][0] is None:
                continue
            under, _, chain = below(*user.node.next_functions[product.bias])
            bias = loose.get(id(leaf_of(under)))
            if bias is not None and bias.dim() == 1 and not chain and len(found.users[id(bias)]) == 1:
                biases[key] = bias
    return biases


def added_to(user: User, nodes: Mapping[Any, Use]) -> Use | None:
    """The use to whose outputs a bias is added."""
    product = _PRODUCTS.get(user.name)
    if (product is not None and user.slot == product.bias) or (user.name == "ConvolutionBackward0" and user.slot == 2):
        return nodes.get(user.node)
    if user.name in _GATES and user.slot in (3, 4):
        gates = user.node.next_functions[user.slot - 3][0]
        return None if gates is None else nodes.get(below(gates, 0)[0])
    if user.name == "AddBackward0" and user.node._saved_alpha == 1:
        other = user.node.next_functions[1 - user.slot][0]
        return None if other is None else nodes.get(below(other, 0)[0])
    return None
