r"""What linear layers and convolutions of any module receive in one pass, reduced to their span.

A layer that computes ``z = W h`` has inputs ``H [d, n]``, one column for each sample and position; those of a
convolution are the patches that its kernel sees. Kept are the triangular factor R of ``Hᵀ = QR``, which has H's
singular values and left singular vectors, and n: not H itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PART = 1 << 24  # numbers of patches that are looked at together
_FULL = 1e-6  # smallest singular value over the largest, above which more columns change nothing


class Held(NamedTuple):
    """A weight and the layers that compute with it.

    Attributes:
        layers: Their names.
        weight: Name of the parameter.
        bias: Of the bias that moves along: all these layers have it, and no others.
        groups: Of a grouped convolution; 1 otherwise.
    """

    layers: tuple[str, ...]
    weight: str
    bias: str | None
    groups: int


def held_layers(model: nn.Module) -> tuple[list[Held], dict[str, str]]:
    """Linear layers and convolutions by their weights, and why others are left out, by name.

    A weight that another module holds too is left out. A bias moves along if exactly these layers have it.

    Args:
        model: Any module.

    Example:
        >>> held, refused = held_layers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
        >>> [(h.layers, h.bias) for h in held], refused
        ([(('0',), '0.bias'), (('2',), None)], {})
    """
    names = {id(p): name for name, p in model.named_parameters()}
    holders: dict[int, list[str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), []).append(name)
    found: list[Held] = []
    refused: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, LAYERS):
            continue
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        kind = next(k for k in LAYERS if isinstance(module, k))
        if type(module).forward is not kind.forward or "forward" in vars(module):
            refused[name] = "its class computes something else"
        elif weight is None:
            refused[name] = "its weight is computed from other parameters"
        elif not weight.requires_grad:
            refused[name] = "its weight asks for no gradient"
        elif others := [o for o in holders[id(weight)] if not isinstance(modules[o], LAYERS)]:
            refused[name] = f"its weight is also that of {others[0] or type(model).__name__}"
        elif len({getattr(modules[o], "groups", 1) for o in holders[id(weight)]}) > 1:
            refused[name] = "its weight is used with several numbers of groups"
        elif holders[id(weight)][0] == name:  # once for all layers of this weight
            own = holders[id(weight)]
            moves = bias is not None and bias.requires_grad and holders[id(bias)] == own
            found.append(
                Held(
                    tuple(own),
                    names[id(weight)],
                    names[id(bias)] if moves and bias is not None else None,
                    int(getattr(module, "groups", 1)),
                )
            )
    return found, refused


class Seen:
    """The inputs of layers of one weight, as R and how many columns there were.

    Args:
        groups: Of a convolution.
        with_ones: A constant input stands for the bias.

    Attributes:
        columns: n.
        factor: R ``[groups, ≤ d, d]``; ``None`` before the first.
        full: All d directions were seen; columns are counted only, then.

    Example:
        >>> seen = Seen(1, with_ones=True)
        >>> seen.add(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
        >>> seen.columns, seen.span(1e-6)[0].shape  # of 3 inputs, 2 directions
        (3, torch.Size([3, 2]))
    """

    def __init__(self, groups: int, with_ones: bool) -> None:
        self.groups, self.with_ones = groups, with_ones
        self.columns = 0
        self.full = False
        self.factor: Tensor | None = None

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """What a layer is called with."""
        for rows in _rows(layer, x.detach()):
            self.columns += rows.shape[1]
            if self.full:
                continue
            if self.with_ones:
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], -1)
            every = rows if self.factor is None else torch.cat([self.factor, rows], 1)
            if every.shape[1] > every.shape[2]:
                every = torch.linalg.qr(every, mode="r").R
                values = torch.linalg.svdvals(every)
                self.full = bool((values[:, -1] > _FULL * values[:, 0]).all())
            self.factor = every

    @property
    def inputs(self) -> int:
        """d, the constant one included."""
        return 0 if self.factor is None else self.factor.shape[2]

    def span(self, tolerance: float) -> list[Tensor]:
        """An orthonormal basis ``[d, rank]`` of the span of the columns, for each group.

        Args:
            tolerance: Singular values below this multiple of the largest are none.
        """
        assert self.factor is not None
        bases = []
        for factor in self.factor:
            _, values, right = torch.linalg.svd(factor, full_matrices=False)
            bases.append(right[values > tolerance * values[0]].mT)
        return bases


def _rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """``Hᵀ [groups, n, d]``, a part of the samples after another."""
    if not isinstance(layer, _ConvNd):
        yield x.reshape(1, -1, x.shape[-1])
        return
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for n, (k, s, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + n, (k - 1) * gap + 1, s)[..., ::gap]
    x = x.unflatten(1, (layer.groups, -1))  # [N, groups, channels, positions..., kernel...]
    at = range(3, 3 + spatial)
    x = x.permute(1, 0, *at, 2, *range(3 + spatial, 3 + 2 * spatial))
    for part in x.split(max(1, _PART // max(1, x[:, :1].numel())), 1):
        yield part.reshape(layer.groups, part.shape[1 : 2 + spatial].numel(), -1)


@contextmanager
def listening(model: nn.Module, held: list[Held]) -> Iterator[dict[str, Seen]]:
    """Note what layers receive while a pass is made; gives it by the name of the weight."""
    seen = {h.weight: Seen(h.groups, h.bias is not None) for h in held}
    modules = dict(model.named_modules())

    def hook(of: Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda layer, args, kwargs: of.add(layer, args[0] if args else kwargs["input"])

    handles = [
        modules[name].register_forward_pre_hook(hook(seen[h.weight]), with_kwargs=True)
        for h in held
        for name in h.layers
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which calls no layers
    try:
        yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
