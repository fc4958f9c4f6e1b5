r"""Moves of weights in the null space of what layers receive from one batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metatele.errors import ConfigError, NotExactError, UnsupportedModelError
from metatele.geometry import Curvature, ModuleObjective, ModulePoint, Objective
from metatele.geometry import objective as objective_by_name
from metatele.network import ranks
from metatele.network.layer_inputs import Held, held_layers, listening
from metatele.network.unwrap import unwrapped
from metatele.symmetry.double import change_of, doubled, outputs_of, steady, twin_of
from metatele.symmetry.find import find_symmetries, refuse_parameters
from metatele.teleport.balance import _given

_RANK = 1e-12  # singular value over the largest, in double precision, below which a direction has no input
_EXACT = 1e-9  # relative change of the outputs in double precision, up to which a move is written


class LayerRow(NamedTuple):
    """A layer, and how far its weights moved.

    Attributes:
        layer: Its name; of one weight in several layers all of them.
        inputs: d, with 1 for a bias that moves along; of each group of a grouped convolution.
        rank: Of its inputs on the batch; the least of the groups.
        samples: n, over all positions and uses.
        change: ``‖Δ‖ / ‖W‖``, bias included.
        reason: Why it stayed; empty if it moved.
    """

    layer: str
    inputs: int
    rank: int
    samples: int
    change: float
    reason: str


@dataclass(frozen=True, eq=False)
class NullSpaceReport:
    """What :func:`null_space_` did; prints as a table.

    Attributes:
        rows: Of all linear layers and convolutions.
        drift: Largest change of an output on the batch relative to the largest output, in the model's dtype.

    Example:
        >>> print(NullSpaceReport((LayerRow("0", 64, 32, 32, 0.1, ""), LayerRow("2", 17, 17, 32, 0.0, "full")), 1e-7))
        layer  inputs  rank  samples  change   why it stayed
        0      64      32    32       1.0e-01
        2      17      17    32       0.0e+00  full
        outputs on this batch changed by 1.0e-07
    """

    rows: tuple[LayerRow, ...]
    drift: float

    @property
    def moved(self) -> tuple[str, ...]:
        """Names of the layers that moved."""
        return tuple(row.layer for row in self.rows if not row.reason)

    @property
    def refused(self) -> dict[str, str]:
        """Why the others stayed, by name."""
        return {row.layer: row.reason for row in self.rows if row.reason}

    def __str__(self) -> str:
        cells = [("layer", "inputs", "rank", "samples", "change", "why it stayed")]
        cells += [(r.layer, str(r.inputs), str(r.rank), str(r.samples), f"{r.change:.1e}", r.reason) for r in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(6)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, f"outputs on this batch changed by {self.drift:.1e}"])

    __repr__ = __str__


@torch.no_grad()
def null_space_(
    model: nn.Module,
    inputs: Any,
    size: float = 0.1,
    seed: int = 0,
    *,
    loss: Callable[[], Tensor] | None = None,
    objective: str | Objective | None = None,
    descend: bool = False,
    layers: Sequence[str] | None = None,
    **named: Any,
) -> NullSpaceReport:
    r"""Move weights so that no output on a batch changes. On other inputs the module computes something else.

    A linear layer whose inputs ``H [d, n]`` on the batch have rank below d may take

    .. math::
        W ← W + Δ, \qquad Δ = G (I - H H^+), \qquad ΔH = 0

    for any G. Each layer's outputs stay, so that all layers can move at once. This is no symmetry: it is exact on that
    batch alone, in passes without dropout, and holds in training mode too, as batch statistics stay. A convolution's
    inputs are the patches that its kernel sees; a bias is the weight of a constant input; a layer that is used several
    times takes the inputs of all uses.

    Args:
        model: Any module; its buffers stay.
        inputs: Of a pass, the batch on which outputs are kept: a tensor, or a tuple of all positional arguments.
        size: ``‖Δ‖ / ‖W‖``: of each layer if G is random, of all layers that move together if it is a gradient.
        seed: Of a random G, Gaussian.
        loss: G is the gradient of this instead: a function that makes a pass of the model, on other data, and gives a
            scalar. To first order it then rises. The loss on the batch itself has no such gradient: its own lies in the
            span of H.
        objective: G is the gradient of ``"grad-norm"``, ``"sharpness"`` (both of ``loss``) or ``"curvature"``.
        descend: Lower ``loss`` or the objective instead.
        layers: Names of those that may move; all linear layers and convolutions if not given.
        **named: Further arguments of the pass.

    Returns:
        What moved, how far the outputs did, and for each layer that stayed the reason.

    Raises:
        ConfigError: No layer can move, ``loss`` has no gradient in the null space, or a setting has no meaning.
        UnsupportedModelError: Several processes run, whose batches differ; or the model cannot be copied.
        NotExactError: Outputs on the batch would change in double precision; nothing is written then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        >>> x, other = torch.randn(5, 8).double(), torch.randn(5, 8).double()
        >>> before, elsewhere = model(x), model(other)
        >>> report = null_space_(model, x)
        >>> report.moved, torch.allclose(model(x), before), torch.allclose(model(other), elsewhere)
        (('0', '2'), True, False)
    """
    bare = unwrapped(model)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    goal = _checked(size, loss, objective, descend)
    ranks.refuse_sharded(bare.parameters(), "a move in the null space")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedModelError("in several processes, whose batches differ, there is no move in the null space")
    refuse_parameters(bare)
    held, refused = held_layers(bare)
    held, refused = _chosen(held, refused, layers)
    own = dict(bare.named_parameters())
    twin = twin_of(bare).requires_grad_(False)
    data = {name: t.data for name, t in twin.named_parameters()}
    wide, its = doubled(given), doubled(dict(named))
    with steady(twin), warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def outputs() -> Tensor:
            return outputs_of(twin, data, wide, its)

        with listening(twin, held) as seen:
            before = outputs()
        rows = {h.weight: LayerRow(", ".join(h.layers), 0, 0, 0, 0.0, "the pass does not call it") for h in held}
        spans: dict[str, list[Tensor]] = {}
        for h in held:
            of = seen[h.weight]
            if not of.columns:
                continue
            bases = of.span(_RANK)
            rank = min(basis.shape[1] for basis in bases)
            why = "" if rank < of.inputs else f"its inputs have full rank {of.inputs} on these {of.columns} samples"
            rows[h.weight] = LayerRow(", ".join(h.layers), of.inputs, rank, of.columns, 0.0, why)
            if goal is None and loss is None and not _norm(_of(h, data)):
                why = why or "its weights are zero, and size is relative to them"
            rows[h.weight] = rows[h.weight]._replace(reason=why)
            if not why:
                spans[h.weight] = bases
        able = [h for h in held if h.weight in spans]
        if not able:
            first = next(((r.layer, r.reason) for r in rows.values()), next(iter(refused.items()), ("", "")))
            where = f", such as {first[0]}: {first[1]}" if first[1] else ": it has no linear layer and no convolution"
            raise ConfigError(f"no layer can move in the null space of its inputs{where}")
        steps = _steps(bare, able, spans, data, size, seed, goal, loss, descend, (given, named))
        start = {name: data[name].clone() for h in able for name in (h.weight, h.bias) if name is not None}
        for h in able:
            _add_(data, h, steps[h.weight])
        if not change_of(outputs(), before) <= _EXACT:  # a weight may have other uses than its layer
            able = _those_that_keep(able, data, start, steps, lambda: change_of(outputs(), before), rows)
    for h in able:
        sizes = [math.hypot(*(float(t.norm()) for t in parts)) for parts in (_parts(steps[h.weight]), _of(h, start))]
        rows[h.weight] = rows[h.weight]._replace(change=sizes[0] / sizes[1] if sizes[1] else math.inf)
    with steady(bare), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first_outputs = _given(bare, given, named)
        for h in able:
            for name in (h.weight, h.bias):
                if name is not None:
                    own[name].copy_(data[name])
        drift = change_of(_given(bare, given, named), first_outputs)
    left = [LayerRow(name, 0, 0, 0, 0.0, why) for name, why in refused.items()]
    return NullSpaceReport((*rows.values(), *left), drift)


def _checked(
    size: float, loss: Callable[[], Tensor] | None, objective: str | Objective | None, descend: bool
) -> ModuleObjective | None:
    if not 0 < size < math.inf:
        raise ConfigError(f"size must be a positive finite number, got {size}")
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss must be a function that makes a pass and gives a scalar, got {loss!r}")
    if objective is None:
        if descend and loss is None:
            raise ConfigError("descend needs a loss or an objective: a random move has no direction")
        return None
    goal = objective if isinstance(objective, Objective) else objective_by_name(objective)
    if not isinstance(goal, ModuleObjective):
        raise ConfigError(f"the objective of a module is grad-norm, sharpness or curvature, got {goal!r}")
    if loss is None and not isinstance(goal, Curvature):
        raise ConfigError(f"the objective {goal.name} is of a loss: give loss, a function that makes a pass")
    return goal


def _chosen(
    held: list[Held], refused: dict[str, str], layers: Sequence[str] | None
) -> tuple[list[Held], dict[str, str]]:
    """Those that were asked for; a weight in several layers moves if all of them were."""
    if layers is None:
        return held, refused
    wanted = {layers} if isinstance(layers, str) else set(layers)
    if unknown := wanted - {name for h in held for name in h.layers} - refused.keys():
        raise ConfigError(f"the model has no linear layer and no convolution {min(unknown)!r}")
    return [h for h in held if wanted >= set(h.layers)], {n: why for n, why in refused.items() if n in wanted}


class _Step(NamedTuple):
    weight: Tensor
    bias: Tensor | None

    def times(self, factor: float) -> _Step:
        return _Step(factor * self.weight, None if self.bias is None else factor * self.bias)


def _parts(step: _Step) -> list[Tensor]:
    return [t for t in step if t is not None]


def _of(held: Held, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in (held.weight, held.bias) if name is not None and name in tensors]


def _steps(
    bare: nn.Module,
    able: Sequence[Held],
    spans: Mapping[str, list[Tensor]],
    data: Mapping[str, Tensor],
    size: float,
    seed: int,
    goal: ModuleObjective | None,
    loss: Callable[[], Tensor] | None,
    descend: bool,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, _Step]:
    """Δ of each layer."""
    if loss is None and goal is None:
        g = torch.Generator().manual_seed(seed)
        steps = {}
        for h in able:
            drawn = {
                name: torch.randn(data[name].shape, generator=g, dtype=torch.float64).to(data[name])
                for name in (h.weight, h.bias)
                if name is not None
            }
            step = _projected(h, drawn, spans[h.weight])
            ratio = size * _norm(_of(h, data)) / _norm(_parts(step))
            steps[h.weight] = step.times(ratio)
        return steps
    gradients = _gradients(bare, goal, loss, example)
    whole = {name: gradients[name].to(t) if name in gradients else torch.zeros_like(t) for name, t in data.items()}
    steps = {h.weight: _projected(h, whole, spans[h.weight]) for h in able}
    length = _norm([t for step in steps.values() for t in _parts(step)])
    all_of_it = _norm([t for h in able for t in _of(h, whole)])
    if not math.isfinite(length):
        raise ConfigError("the gradient is not finite")
    unit = max(torch.finfo(p.dtype).eps for p in bare.parameters())
    # A gradient that has nothing there is not zero after it was rounded; one of a difference is known to its root.
    floor = math.sqrt(unit) if goal is not None and goal.name == "grad-norm" else 100 * unit
    if not length > floor * all_of_it:
        raise ConfigError("the gradient has no part in the null space, as that of the loss on the batch itself has not")
    ratio = (-1 if descend else 1) * size * _norm([t for h in able for t in _of(h, data)]) / length
    return {name: step.times(ratio) for name, step in steps.items()}


def _gradients(
    bare: nn.Module,
    goal: ModuleObjective | None,
    loss: Callable[[], Tensor] | None,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, Tensor]:
    if goal is None:
        return ModulePoint(bare, loss).gradients()[1]
    spaces = find_symmetries(bare, example[0], **example[1]).spaces if isinstance(goal, Curvature) else ()
    point = ModulePoint(bare, loss, spaces)
    return point.unflatten(goal.value_and_gradient(point)[1])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _projected(held: Held, G: Mapping[str, Tensor], bases: list[Tensor]) -> _Step:
    """``G (I - H H⁺)``, twice, so that what is left is rounding of the result."""
    weight = G[held.weight]
    rows = weight.reshape(held.groups, -1, weight[0].numel())
    if held.bias is not None:
        rows = torch.cat([rows, G[held.bias].reshape(held.groups, -1, 1)], -1)
    parts = []
    for part, basis in zip(rows, bases, strict=True):
        for _ in range(2):
            part = part - (part @ basis) @ basis.mT
        parts.append(part if basis.shape[1] < basis.shape[0] else torch.zeros_like(part))
    rows = torch.stack(parts)
    if held.bias is None:
        return _Step(rows.reshape(weight.shape), None)
    return _Step(rows[..., :-1].reshape(weight.shape), rows[..., -1].reshape(G[held.bias].shape))


def _add_(data: Mapping[str, Tensor], held: Held, step: _Step) -> None:
    data[held.weight].add_(step.weight)
    if held.bias is not None and step.bias is not None:
        data[held.bias].add_(step.bias)


def _those_that_keep(
    able: Sequence[Held],
    data: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    steps: Mapping[str, _Step],
    change: Callable[[], float],
    rows: dict[str, LayerRow],
) -> list[Held]:
    """Layers whose move keeps the outputs, one after another; the others are put back, and told of."""
    for name, was in start.items():
        data[name].copy_(was)
    good = []
    for h in able:
        _add_(data, h, steps[h.weight])
        if change() <= _EXACT:
            good.append(h)
            continue
        for own in (h.weight, h.bias):
            if own is not None:
                data[own].copy_(start[own])
        rows[h.weight] = rows[h.weight]._replace(reason="outputs would change: its weights have other uses")
    if not good:
        raise NotExactError("outputs on the batch would change, so nothing was moved: the weights have other uses")
    return good
