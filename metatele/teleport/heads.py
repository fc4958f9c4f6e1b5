"""Attention heads of a user's network in a balanced basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import SingularInputError
from metatele.network.graph import tensors_in
from metatele.network.heads import Head, heads_of
from metatele.network.unwrap import unwrapped
from metatele.symmetry.heads import balances, imbalance, products, turned_

_WORDS = {"qk": "queries and keys", "vo": "values"}


class HeadRow(NamedTuple):
    """A head, or one half of it.

    Attributes:
        parameters: Names of those that it is made of.
        units: k, its size.
        kind: ``"qk"``, queries and keys, or ``"vo"``, values and what reads them.
        imbalance: As it was: 1 in a balanced basis.
        drift: Relative change of ``W_qᵀW_k``, or ``WₒW_v``; ``None`` if it was left as it was.
    """

    parameters: tuple[str, ...]
    units: int
    kind: str
    imbalance: float
    drift: float | None


@dataclass(frozen=True)
class HeadsReport:
    """What :func:`balance_heads_` did; prints as a table.

    Attributes:
        rows: Of the heads that were found.

    Example:
        >>> print(HeadsReport((HeadRow(("in_proj_weight",), 4, "qk", 14.2, 1e-8),)))
        head              units  imbalance  drift    parameters
        queries and keys  4      14.20      1.0e-08  in_proj_weight
        >>> print(HeadsReport(()))
        no head of attention was found whose basis may be changed
    """

    rows: tuple[HeadRow, ...]

    @property
    def moved(self) -> int:
        """Number of heads that were."""
        return sum(row.drift is not None for row in self.rows)

    @property
    def drift(self) -> float:
        """The largest relative change of a product of weights; 0 if none moved."""
        return max((row.drift for row in self.rows if row.drift is not None), default=0.0)

    def __str__(self) -> str:
        if not self.rows:
            return "no head of attention was found whose basis may be changed"
        cells = [("head", "units", "imbalance", "drift", "parameters")]
        for row in self.rows:
            drift = "left" if row.drift is None else f"{row.drift:.1e}"
            cells.append((_WORDS[row.kind], str(row.units), f"{row.imbalance:.2f}", drift, ", ".join(row.parameters)))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)

    __repr__ = __str__


def balance_heads_(model: nn.Module, *inputs: Any, above: float = 1.0, **named: Any) -> HeadsReport:
    r"""Bring attention heads to a canonical basis; what the network computes stays the same.

    Scores ``qᵀk`` do not depend on M in ``W_q → M W_q``, ``W_k → M^{-T} W_k``, nor outputs on N in ``W_v → N W_v``,
    ``Wₒ → Wₒ N⁻¹``. Optimizers do. With ``W_q W_qᵀ = LLᵀ`` and ``Lᵀ W_k W_kᵀ L = U Λ Uᵀ``, biases as a last column,

    .. math::
        M = Λ^{1/4} U^T L^{-1}

    makes ``W_q W_qᵀ`` and ``W_k W_kᵀ`` the same diagonal ``Λ^{1/2}``, where ``‖W_q‖² + ‖W_k‖²`` is least; N the same of
    ``W_v`` and ``Wₒᵀ``, which then share their size so that values have that of queries. All starts that differ by the
    basis of their heads alone come to the same weights.

    One forward pass is made, and heads are found in its graph: in ``nn.MultiheadAttention``, fused and written by hand.
    A head is left as it is where anything but views, factors and biases lies between weights and product, such as
    rotary positions or norms of queries; where weights are frozen, used twice or in half precision; and where a
    gradient through the outputs shows that they depend on the basis all the same. Make the optimizer afterwards: its
    memories, and averages of the weights, are of the basis they were made in.

    Args:
        model: Any; it is called once as it is, so in ``eval()`` mode its statistics stay.
        *inputs: What it is called with.
        above: Imbalance ``‖W_q‖‖W_k‖ / tr Λ^{1/2}`` of one head, from which all are changed; random weights have up to
            1.4, a change of basis of condition 100 makes it 14.
        **named: Named arguments of the model.

    Returns:
        What was found and moved.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(4, 5, 8)
        >>> before = model(x)
        >>> report = balance_heads_(model, x)
        >>> report.moved, report.drift < 1e-6, torch.allclose(model(x), before, atol=1e-5)
        (4, True, True)
        >>> W_q, W_k, _ = model.self_attn.in_proj_weight.detach().split(8)
        >>> torch.allclose(W_q[:4] @ W_q[:4].T, W_k[:4] @ W_k[:4].T, atol=1e-5)
        True
    """
    root = unwrapped(model)
    parameters = {id(p): (name, p) for name, p in root.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        outputs = [t for t in tensors_in(model(*inputs, **named)) if t.grad_fn is not None]
        heads = [h for h in heads_of(outputs, list(root.parameters())) if _is_usable(h, parameters)]
        gradients = _gradients(outputs, heads)
    weights = {key: p.detach() for key, (_, p) in parameters.items()}
    changes = {id(head): g for head, g in balances(heads, weights, above)}
    rows = []
    for head in heads:
        names = tuple(parameters[id(p)][0] for p in head.parameters)
        try:
            was = imbalance(head, weights)
        except SingularInputError:
            was = float("inf")
        before, drift, g = products(head, weights), None, changes.get(id(head))
        if g is not None and turned_(head, g, weights, gradients):
            drift = float((products(head, weights) - before).norm() / before.norm())
        rows.append(HeadRow(names, head.units, head.kind, was, drift))
    return HeadsReport(tuple(rows))


def _is_usable(head: Head, parameters: Mapping[int, tuple[str, nn.Parameter]]) -> bool:
    return all(id(p) in parameters and p.dtype in (torch.float32, torch.float64) for p in head.parameters)


def _gradients(outputs: list[Tensor], heads: list[Head]) -> dict[int, Tensor]:
    """Of a random combination of the outputs: it depends on no basis if they do not."""
    own = list({id(p): p for head in heads for p in head.parameters}.values())
    if not own:
        return {}
    random = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=random).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, own, along)
    return {id(p): g.contiguous() for p, g in zip(own, found, strict=True)}
