r"""The matrix-shaped pieces of any module's parameters.

A **part** is a matrix, or several side by side, that maps inputs ``h [i, n]`` to outputs ``z [o, n]``; a bias of the
same layer is its last column (:mod:`metatele.network.bias`). A packed weight has a part for each of its matrices: the
projections of attention, the gates of a recurrent layer. What is no matrix is a **vector**: gains, biases on their own.
Types of layers say which is which at first; what passes show of a parameter says it better (:mod:`.graph`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from metatele.errors import UnsupportedModelError
from metatele.network import bias as biases

_GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h", "LSTMCell": "ifgo", "GRUCell": "rzn", "RNNCell": "h"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Vector = tuple[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class Part:
    """Matrices ``[groups, o, i]`` in a parameter; with a bias ``[groups, o, i + 1]``.

    The parameter is read as a table of rows of ``width`` numbers, in the order of its elements.

    Attributes:
        name: Of the parameter, and of the piece: ``"attention.in_proj_weight[q]"``.
        weight: The parameter.
        bias: Of the same use; ``None`` if there is none, or if it is a vector.
        rows: Of the table, first and one past the last.
        width: Numbers in a row.
        groups: Matrices; as many in the rows as there are groups of a convolution, or experts.
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, ``"attention"``, ``"recurrent"`` or ``"unseen"``.
        transposed: A matrix lies in the table as ``[i, o]``.
        bias_rows: Of the bias, as ``rows``.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> (part,), vectors = parts_of(layer)
        >>> part.kind, part.shape
        ('conv', (2, 3, 19))
        >>> matrix = part.matrix(layer.weight.detach(), layer.bias.detach())
        >>> weight, bias = part.split(matrix)
        >>> torch.equal(weight, layer.weight), torch.equal(bias, layer.bias)
        (True, True)
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: tuple[int, int]
    width: int
    groups: int = 1
    kind: str = "unseen"
    transposed: bool = False
    bias_rows: tuple[int, int] = (0, 0)

    @property
    def outputs(self) -> int:
        """Rows o of each matrix."""
        return self.width if self.transposed else (self.rows[1] - self.rows[0]) // self.groups

    @property
    def inputs(self) -> int:
        """Columns i of each matrix, without the one of a bias."""
        return (self.rows[1] - self.rows[0]) // self.groups if self.transposed else self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of :meth:`matrix`."""
        return self.groups, self.outputs, self.inputs + (self.bias is not None)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Distance in the parameter of neighbours in group, row and column of the matrix without bias."""
        step = (1, self.width) if self.transposed else (self.width, 1)
        return (self.rows[1] - self.rows[0]) // self.groups * self.width, *step

    @property
    def offset(self) -> int:
        """Number of the parameter's element that is the first of the matrix."""
        return self.rows[0] * self.width

    @property
    def whole(self) -> bool:
        """Whether it is all of its parameter."""
        return self.rows[0] == 0 and self.rows[1] * self.width == self.weight.numel()

    def of(self, tensor: Tensor) -> Tensor:
        """The piece, a view of a tensor that is shaped like the weight."""
        return tensor if self.whole else tensor[self.rows[0] : self.rows[1]]

    def of_bias(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that is shaped like the bias, a view."""
        return tensor[self.bias_rows[0] : self.bias_rows[1]]

    def matrix(self, tensor: Tensor, bias: Tensor | None = None) -> Tensor:
        """Tensors shaped like weight and bias as one ``[groups, o, i]`` or ``[groups, o, i + 1]``.

        Args:
            tensor: Like the weight.
            bias: Like the bias; ``None`` leaves its column out.
        """
        table = self.of(tensor).reshape(self.groups, -1, self.width)
        M = table.mT if self.transposed else table
        return M if bias is None else biases.joined(M, self.of_bias(bias).reshape(self.groups, -1))

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of :meth:`matrix`: shaped like :meth:`of` the weight, and :meth:`of_bias` the bias."""
        M, column = biases.parted(matrix, matrix.shape[-1] > self.inputs)
        table = M.mT if self.transposed else M
        return table.reshape(self.of(self.weight).shape), None if column is None else column.reshape(-1)

    def add_(self, matrix: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha`` times a matrix to weight and bias.

        Example:
            >>> (part,), _ = parts_of(layer := nn.Linear(2, 1))
            >>> before = layer.bias.item()
            >>> part.add_(torch.ones(1, 1, 3), 0.5)
            >>> round(layer.bias.item() - before, 4)
            0.5
        """
        with torch.no_grad():
            piece, column = self.split(matrix)
            self.of(self.weight).add_(piece, alpha=alpha)
            if column is not None and self.bias is not None:
                self.of_bias(self.bias).add_(column, alpha=alpha)

    @property
    def layout(self) -> tuple[str, bool, int, int, tuple[int, int], bool]:
        """Plain numbers by which a part that passes have shown can be made again; see :meth:`laid_out`."""
        return self.kind, self.transposed, self.groups, self.width, self.rows, self.bias is not None

    def laid_out(self, layout: tuple[str, bool, int, int, tuple[int, int], bool], bias: nn.Parameter | None) -> Part:
        """The same piece in the layout of another part, with that one's bias."""
        kind, transposed, groups, width, rows, biased = layout
        joined = bias if biased else None
        span = self.bias_rows if self.bias is not None else (0, 0 if joined is None else joined.numel())
        return replace(
            self,
            kind=kind,
            transposed=transposed,
            groups=groups,
            width=width,
            rows=(rows[0], rows[1]),
            bias=joined,
            bias_rows=span,
        )


def parts_of(model: nn.Module) -> tuple[list[Part], list[Vector]]:
    """Matrices and vectors among a module's parameters, by the types of its layers.

    Args:
        model: Any. Of parameters that are tied each is named once; of layers that are pruned or parametrised, those
            that are trained. A parameter without elements is left out.

    Returns:
        The parts, and name and parameter of each vector: what has one dimension longer than 1, or none; what is
        complex; a bias that several layers share or that no layer's weight goes with.

    Raises:
        UnsupportedModelError: A parameter waits for a first batch to have a size.

    Example:
        >>> parts, vectors = parts_of(nn.TransformerEncoderLayer(8, 2, 16))
        >>> [(part.name, part.shape) for part in parts][:3]
        [('self_attn.in_proj_weight[q]', (1, 8, 9)), ('self_attn.in_proj_weight[k]', (1, 8, 9)),
         ('self_attn.in_proj_weight[v]', (1, 8, 9))]
        >>> [name for name, _ in vectors]
        ['norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias']
    """
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, p in module._parameters.items():
            if p is not None:
                homes.setdefault(id(p), []).append((module, own))
    parts: list[Part] = []
    rest: list[Vector] = []
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise UnsupportedModelError(
                f"parameter {name!r} has no size yet, as those of lazy modules before their first batch: call the "
                "model on a batch, and then make the optimizer"
            )
        if not p.numel():
            continue
        found = [] if p.is_complex() else list(_pieces(name, p, homes))
        parts += found
        if not found:
            rest.append((name, p))
    joined = {id(part.bias) for part in parts if part.bias is not None}
    return parts, [(name, p) for name, p in rest if id(p) not in joined]


def _pieces(name: str, p: nn.Parameter, homes: dict[int, list[tuple[nn.Module, str]]]) -> Iterator[Part]:
    """The parts of a parameter; none if it is a vector."""
    mine = homes[id(p)]
    layers = [module for module, own in mine if own == "weight"]
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    convolutions = [m for m in layers if isinstance(m, _CONVOLUTIONS)]
    module, own = mine[0]
    if linears:  # also one that is tied to an embedding: what its inputs are says more than how often a token came
        inside = any(type(m).__name__ == "NonDynamicallyQuantizableLinear" for m in linears)  # the last of attention
        yield from _one(name, p, _bias(p, linears, homes), "attention" if inside else "linear")
    elif convolutions:
        groups = {m.groups for m in convolutions}
        if len(groups) == 1:
            yield from _one(name, p, _bias(p, convolutions, homes), "conv", groups.pop())
        else:
            yield from _one(name, p, None, "unseen")
    elif any(isinstance(m, _EMBEDDINGS) for m in layers):
        yield Part(name, p, None, (0, p.shape[0]), p.shape[1], kind="embedding", transposed=True)
    elif isinstance(module, nn.MultiheadAttention) and own.endswith("proj_weight"):
        yield from _projections(name, p, module, own, homes)
    elif isinstance(module, _RECURRENT) and own.startswith("weight_"):
        yield from _gates(name, p, module, own, homes)
    else:
        long = [size for size in p.shape if size > 1]
        if len(long) > 1:  # leading dimensions of size 1, as of learned positions, are none
            yield Part(name, p, None, (0, long[0]), p.numel() // long[0])


def _one(name: str, p: nn.Parameter, bias: nn.Parameter | None, kind: str, groups: int = 1) -> Iterator[Part]:
    span = (0, 0 if bias is None else bias.numel())
    yield Part(name, p, bias, (0, p.shape[0]), p.numel() // p.shape[0], groups, kind, bias_rows=span)


def _bias(
    weight: nn.Parameter, layers: Sequence[nn.Module], homes: dict[int, list[tuple[nn.Module, str]]]
) -> nn.Parameter | None:
    """That of the one layer of a weight, unless others have it too or it is trained where the weight is not."""
    found = [m._parameters.get("bias") for m in layers]
    biases = [b for b in found if b is not None]
    if len(biases) != 1 or len(homes[id(biases[0])]) != 1 or biases[0].requires_grad != weight.requires_grad:
        return None
    return biases[0]


def _beside(
    module: nn.Module, own: str, p: nn.Parameter, homes: dict[int, list[tuple[nn.Module, str]]]
) -> nn.Parameter | None:
    """The bias of a name in a module that packs several."""
    bias = module._parameters.get(own)
    if bias is None or len(homes[id(bias)]) != 1 or len(homes[id(p)]) != 1 or bias.requires_grad != p.requires_grad:
        return None
    return bias


def _projections(
    name: str,
    p: nn.Parameter,
    module: nn.MultiheadAttention,
    own: str,
    homes: dict[int, list[tuple[nn.Module, str]]],
) -> Iterator[Part]:
    """Queries, keys, values: in one weight, or with a weight each and one bias."""
    bias, width = _beside(module, "in_proj_bias", p, homes), module.embed_dim
    if own == "in_proj_weight":
        for number, letter in enumerate("qkv"):
            span = (number * width, (number + 1) * width)
            where = (0, 0) if bias is None else span
            yield Part(f"{name}[{letter}]", p, bias, span, p.shape[1], kind="attention", bias_rows=where)
    else:
        number = "qkv".index(own[0])
        where = (0, 0) if bias is None else (number * width, (number + 1) * width)
        yield Part(name, p, bias, (0, p.shape[0]), p.shape[1], kind="attention", bias_rows=where)


def _gates(
    name: str, p: nn.Parameter, module: nn.Module, own: str, homes: dict[int, list[tuple[nn.Module, str]]]
) -> Iterator[Part]:
    """The gates of a recurrent layer; its projection is one matrix."""
    kind = getattr(module, "mode", type(module).__name__).removesuffix("_TANH").removesuffix("_RELU")
    letters = _GATES.get(kind, "h")
    bias = _beside(module, own.replace("weight", "bias"), p, homes)
    if own.startswith("weight_hr") or p.shape[0] % len(letters):
        letters = "h"
    each = p.shape[0] // len(letters)
    for number, letter in enumerate(letters):
        span = (number * each, (number + 1) * each)
        named = name if len(letters) == 1 else f"{name}[{letter}]"
        where = (0, 0) if bias is None else span
        yield Part(named, p, bias, span, p.shape[1], kind="recurrent", bias_rows=where)


def refined(
    parts: list[Part],
    vectors: list[Vector],
    layouts: dict[int, list[tuple[tuple[int, int, int], tuple[int, int, int], int]]],
    loose: dict[int, nn.Parameter],
) -> tuple[list[Part], list[Vector]]:
    """Parts in the layout in which products use them; their numbers stay.

    Args:
        parts: As types of layers tell; those of layers that are known stay as they are.
        vectors: The rest.
        layouts: Sizes ``(groups, o, i)``, strides and offset of each use, by ``id`` of the parameter.
        loose: Biases that go with a parameter, by its ``id``.

    Returns:
        Both, with the biases that joined a part among the vectors no more.

    Example:
        >>> W = nn.Parameter(torch.ones(3, 2))  # used as x @ W
        >>> part = Part("W", W, None, (0, 3), 2)
        >>> refined([part], [], {id(W): [((1, 2, 3), (6, 1, 2), 0)]}, {})[0][0].shape
        (1, 2, 3)
    """
    found = []
    for part in parts:
        new, seen = part, layouts.get(id(part.weight), [])
        if part.kind == "unseen" and part.whole and seen and all(one[0] == seen[0][0] for one in seen):
            (g, o, i), (_, b, c), _ = seen[0]
            if g * o * i == part.weight.numel() and all(one[1][1:] == (b, c) and not one[2] for one in seen):
                straight = (c == 1 or i == 1) and (b == i or o == 1)
                turned = (b == 1 or o == 1) and (c == o or i == 1)
                if straight or turned:
                    rows, width = (g * o, i) if straight else (g * i, o)
                    new = replace(part, rows=(0, rows), width=width, groups=g, kind="linear", transposed=not straight)
                bias = loose.get(id(part.weight))
                if new.kind == "linear" and bias is not None and bias.numel() == g * o:
                    new = replace(new, bias=bias, bias_rows=(0, bias.numel()))
        found.append(new)
    joined = {id(part.bias) for part in found if part.bias is not None}
    return found, [(name, p) for name, p in vectors if id(p) not in joined]
