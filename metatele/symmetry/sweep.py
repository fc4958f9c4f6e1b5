"""Actions on all hidden layers of a network, one after another, and how far its outputs drift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.errors import ShapeMismatchError
from metatele.perceptron.mlp import MLP, Weights
from metatele.symmetry.actions import Action
from metatele.symmetry.group import GroupElement
from metatele.symmetry.site import Pair, Site


def sweep(
    action: Action,
    mlp: MLP,
    weights: Weights,
    inputs: Tensor,
    elements: Sequence[GroupElement | None],
    prepared: Tensor | None = None,
) -> Weights:
    """Act on all hidden layers, input to output, each with the inputs left by the one before.

    Args:
        action: How each pair is moved.
        mlp: Shape of the network.
        weights: Weights with any batch dimensions.
        inputs: Data ``[..., in, n]``.
        elements: One group element per hidden layer; ``None`` leaves that layer alone.
        prepared: ``action.prepare(inputs)`` of the first layer, if the data stay the same.

    Returns:
        New weights; drift is reported by :func:`drift`.

    Raises:
        ShapeMismatchError: There is another number of elements than of hidden layers.
        NotExactError: The action does not exist here; see :class:`Exact` and :class:`Rescaling`.
        SingularInputError: See :class:`Exact`.

    Example:
        >>> from metatele.symmetry import Exact
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.symmetry.group import exponential
        >>> mlp = MLP((4, 3, 3, 2), LeakyReLU(0.1))
        >>> generator = torch.Generator().manual_seed(0)
        >>> w = mlp.unflatten(torch.randn(mlp.num_parameters, generator=generator).double())
        >>> X = torch.randn(4, 3, generator=generator).double()
        >>> g = [exponential(0.1 * torch.ones(3, 3).double())] * 2
        >>> torch.allclose(mlp.forward(sweep(Exact(), mlp, w, X, g), X), mlp.forward(w, X))
        True
    """
    first = Site(
        Pair(weights.matrices[0], weights.matrices[1], weights.biases[0]), inputs, mlp.activations[0], prepared
    )
    return walk(action, mlp, weights, first, elements)[0]


def walk(
    action: Action, mlp: MLP, weights: Weights, first: Site, elements: Sequence[GroupElement | None]
) -> tuple[Weights, list[Site]]:
    """:func:`sweep` from what is known of the first hidden layer, with what becomes known of all.

    Args:
        action: How each pair is moved.
        mlp: Shape of the network.
        weights: Weights with any batch dimensions.
        first: The first hidden layer on the data.
        elements: One group element per hidden layer; ``None`` leaves that layer alone.

    Returns:
        New weights, and each hidden layer with them.

    Raises:
        ShapeMismatchError: There is another number of elements than of hidden layers.

    Example:
        >>> from metatele.symmetry import Rescaling
        >>> from metatele.perceptron.activations import ReLU
        >>> mlp = MLP((1, 1, 1), ReLU())
        >>> w = mlp.unflatten(torch.tensor([3.0, 5.0]))
        >>> first = Site(Pair(*w.matrices), torch.ones(1, 1), ReLU())
        >>> walk(Rescaling(), mlp, w, first, [None])[1][0].hidden
        tensor([[3.]])
    """
    if len(elements) != len(mlp.hidden_widths):
        raise ShapeMismatchError(
            f"expected one group element for each of {len(mlp.hidden_widths)} hidden layers, got {len(elements)}"
        )
    matrices, biases = list(weights.matrices), list(weights.biases)
    sites: list[Site] = []
    for layer, g in enumerate(elements):
        if layer:
            pair = Pair(matrices[layer], matrices[layer + 1], biases[layer])
            site = Site(pair, sites[-1].hidden, mlp.activations[layer])
        else:
            site = first
        if g is not None:
            site = action.move(site, g)
            matrices[layer], matrices[layer + 1], biases[layer] = site.pair
        sites.append(site)
    pairs = zip(matrices, matrices[1:], biases, strict=False)
    return Weights(tuple(matrices), tuple(biases)), [
        site.between(Pair(*pair)) for site, pair in zip(sites, pairs, strict=True)
    ]


def drift(mlp: MLP, before: Weights, after: Weights, inputs: Tensor) -> Tensor:
    """Relative change of the network's output on ``inputs``: ``‖f(X; after) - f(X; before)‖_F / ‖f(X; before)‖_F``.

    Args:
        mlp: Shape of the network.
        before: Weights with any batch dimensions.
        after: Weights of the same shapes.
        inputs: ``[..., in, n]``.

    Returns:
        ``[...]``, without unit; not attached to a graph.

    Example:
        >>> line = MLP((1, 1), ())
        >>> one, other = (line.unflatten(torch.tensor([v])) for v in (2.0, 3.0))
        >>> drift(line, one, other, torch.ones(1, 4))
        tensor(0.5000)
    """
    with torch.no_grad():
        reference = mlp.forward(before, inputs)
        change = (mlp.forward(after, inputs) - reference).norm(dim=(-2, -1))
        return change / reference.norm(dim=(-2, -1)).clamp_min(torch.finfo(reference.dtype).tiny)
