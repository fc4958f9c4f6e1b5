"""Teleportation around any ``torch.optim`` optimizer, and once by hand."""

from __future__ import annotations

import copy
import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, MetateleError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import GradientNorm, Landscape, Objective, objective
from metatele.network.capture import NOTHING, Capture, Wanted
from metatele.network.ranks import refuse_sharded
from metatele.network.sequential import flat_modules, read_sequential
from metatele.optim.conjugate import Conjugation
from metatele.optim.state import ADAPTIVE, STRATEGIES, carry_state, metric_of
from metatele.perceptron.losses import Differentiable, FixedGradient
from metatele.symmetry import action
from metatele.teleport import Ascent, GradientNormAscent, Report, Teleport, TeleportMove, Whitening

LossFunction = Callable[[Tensor, Tensor], Tensor]
_COUNTERS = {"teleport_steps": 0, "teleports": 0, "teleports_rolled_back": 0}


class TeleportOptimizer(torch.optim.Optimizer):
    r"""Steps ``w ← g·(w + f)`` with f from any torch optimizer and g from a teleport move.

    At the chosen steps the wrapped optimizer makes its step, and then the weights are teleported on the
    data of the backward passes just made, which are taken by hooks; nothing is asked of the training
    loop. What a pass tells is its input and ``∂L/∂output``. A teleport keeps the outputs, so along it that
    gradient stays what it is and stands for the loss, whatever that is. It is the one from before the base
    optimizer's step, so objectives are those of the new weights up to the size of that step; the report
    knows no loss (``nan``), and its drift is the change of the outputs relative to their spread over the samples.
    With ``batches`` and ``loss_fn`` the teleport is made on those instead, one after another, with the real loss.

    Between teleports, and where none is due, it is the wrapped optimizer bit for bit. A step in which no
    parameter had a gradient, or with every ``lr`` 0, does not teleport. A layer with a frozen parameter, or
    one in no group, stays as it is, and so does the hidden layer before it and behind it.

    ``param_groups[0]`` counts ``teleports`` and ``teleports_rolled_back`` (a move, or a step of an ascent,
    taken back because it drifted past the move's ``max_drift``); :attr:`report` is that of the last one (with
    mode ``conjugate``: ``‖∇L‖²`` at the weights and in the whitened coordinates; nothing drifts there).

    Args:
        base: The optimizer of the model's parameters.
        model: ``nn.Sequential`` of ``Linear`` and activations; ``Flatten`` may come first, and an activation or
            (log-)softmax last.
        teleport: The move; :func:`GradientNormAscent` with line search if not given.
        at: Steps, counted from 0, after which to teleport.
        every: Teleport after every so many steps, in place of ``at``.
        state: What happens to the wrapped optimizer's state at a teleport. ``keep``: nothing. ``reset``: it is
            forgotten. ``transport``: momentum, a direction in weight space, is carried by the differential
            of the action; second moments, of which only the diagonal is known, cannot be carried by a map that
            mixes entries, and are scaled for each tensor by the change of its squared gradient norm; what is
            neither is kept, and L-BFGS, whose pairs belong to the old point, is reset.
        metric: ``euclidean``, or ``adaptive``: an ascent of the gradient norm then uses ``‖∇L‖²_A`` with A from
            the wrapped optimizer's state (AdaGrad, RMSprop, Adam and their kin).
        batches: Called at each teleport; gives ``(inputs, targets)`` pairs.
        loss_fn: Of ``(outputs, targets)``, for ``batches``.

    Raises:
        UnsupportedModelError: The model holds a layer that is not covered; it is named.
        ConfigError: Settings that do not go together.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
        >>> optimizer = TeleportOptimizer(torch.optim.Adam(model.parameters()), model, at=[0])
        >>> x, y = torch.randn(5, 8), torch.randn(5, 3)
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["teleports"], bool(optimizer.report.drift < 0.01)
        (1, True)
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: nn.Module,
        teleport: TeleportMove | None = None,
        *,
        at: Iterable[int] | None = None,
        every: int | None = None,
        state: str = "keep",
        metric: str = "euclidean",
        batches: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if isinstance(base, TeleportOptimizer):
            raise ConfigError("base teleports already: give one TeleportOptimizer all the steps in at or every")
        move = GradientNormAscent() if teleport is None else teleport
        if not isinstance(move, TeleportMove):
            raise TypeError(f"teleport must be a teleport move, got {type(move).__name__}")
        refuse_sharded(model.parameters(), "TeleportOptimizer")
        linears, mlp = read_sequential(model, framed=True)
        if not mlp.hidden_widths:
            raise UnsupportedModelError("a teleport needs a hidden layer, and the model has a single Linear")
        if move.action != "auto":
            for activation in mlp.activations:
                action(move.action).check(activation)
        conjugate = isinstance(move, Whitening) and move.mode == "conjugate"
        if conjugate and at is None and every is None:
            every = 1
        if (at is None) == (every is None):
            raise ConfigError("give either at or every: the steps after which to teleport")
        try:
            every = None if every is None else operator.index(every)
        except TypeError:
            every = 0
        if every is not None and every < 1:
            raise ConfigError(f"every must be a whole number of at least 1, got {every!r}")
        try:
            steps = None if at is None else frozenset(at)
        except TypeError:
            raise ConfigError(f"at must be a collection of steps, got {at!r}") from None
        if steps is not None and not all(hasattr(s, "__index__") and operator.index(s) >= 0 for s in steps):
            raise ConfigError(f"at must hold whole numbers, zero or more, got {at!r}")
        if state not in STRATEGIES:
            raise ConfigError(f"state must be one of {', '.join(STRATEGIES)}, got {state!r}")
        if metric not in ("euclidean", "adaptive"):
            raise ConfigError(f"metric must be euclidean or adaptive, got {metric!r}")
        if metric == "adaptive" and not (isinstance(move, Ascent) and isinstance(move.objective, GradientNorm)):
            raise ConfigError("metric adaptive needs an ascent of the gradient norm as teleport")
        if metric == "adaptive" and not isinstance(base, ADAPTIVE):
            known = ", ".join(kind.__name__ for kind in ADAPTIVE)
            raise ConfigError(f"metric adaptive is known for {known}, not for {type(base).__name__}")
        if isinstance(move, Ascent) and move.objective.needs_loss and batches is None:
            raise ConfigError(f"an ascent of {move.objective.name} needs the loss: give batches and loss_fn")
        if conjugate and isinstance(base, torch.optim.LBFGS):
            raise ConfigError("mode conjugate takes one gradient for a step, and LBFGS evaluates several")
        if (batches is None) != (loss_fn is None):
            raise ConfigError("batches and loss_fn belong together")
        if not (batches is None or callable(batches)):
            raise ConfigError(f"batches must be a function that gives (inputs, targets) pairs, got {batches!r}")
        if conjugate and batches is not None:
            raise ConfigError("mode conjugate whitens the batch whose gradient is taken: it takes no batches")
        self.base = base
        super().__setstate__({})  # hooks and profiling, without a second copy of groups and state
        self.model, self.teleport = model, move
        self.at, self.every = steps, every
        self.strategy, self.metric = state, metric
        self.batches, self.loss_fn = batches, loss_fn
        self.report: Report | None = None
        self._linears, self._mlp = linears, mlp
        self._require_own(base.param_groups)
        for name, value in _COUNTERS.items():
            base.param_groups[0].setdefault(name, value)
        self._conjugation = Conjugation(move, self._linears) if isinstance(move, Whitening) and conjugate else None
        self._capture = Capture(self._linears)
        self._watch()
        self._capture.attach(self)

    def _watch(self) -> None:
        """Say what the next passes are to be asked for."""
        self._capture.wanted = Wanted(data=True, product=True) if self.teleport_due else NOTHING

    # --- the wrapped optimizer's own things

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model that were left out so far."""
        self.base.add_param_group(param_group)
        try:
            self._require_own(self.param_groups[-1:])
        except ValueError:
            self.param_groups.pop()
            raise

    def _require_own(self, groups: Sequence[dict[str, Any]]) -> None:
        own = {id(p) for p in self.model.parameters()}
        for p in (p for group in groups for p in group["params"]):
            if id(p) not in own:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} does not belong to the model")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and forget the passes they came from."""
        self._capture.clear()
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; counters, and the averages of a conjugation, lie in its first group."""
        state = self.base.state_dict()
        if self._conjugation is not None:
            state["param_groups"][0]["conjugation"] = self._conjugation.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The wrapped optimizer's, also one saved without teleportation."""
        state = copy.deepcopy(state_dict)  # torch would share the caller's tensors
        averages = state["param_groups"][0].pop("conjugation", None)
        self.base.load_state_dict(state)
        if self._conjugation is not None and averages is not None:
            self._conjugation.load_state_dict(averages)
        for name, value in _COUNTERS.items():
            self.base.param_groups[0].setdefault(name, value)
        self._watch()

    # --- steps

    @property
    def teleport_due(self) -> bool:
        """Whether the next step teleports."""
        done = self.param_groups[0]["teleport_steps"]
        return done in self.at if self.at is not None else (done + 1) % (self.every or 1) == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, then a teleport if one is due; returns the closure's loss."""
        due = self.teleport_due
        if self._conjugation is not None and due:
            return self._conjugated(closure)
        if closure is not None and due:
            given = closure

            def closure() -> Any:  # an optimizer may call it several times: the last passes count
                self._capture.clear()
                return given()

        # Without a closure gradients and passes are there before the step, with one they come in it.
        seen = self._seen(due) if closure is None else None
        loss = self.base.step() if closure is None else self.base.step(closure)
        moving, captured = self._seen(due) if seen is None else seen
        try:
            if any(moving) and due:
                self._teleport(moving, captured)
        finally:
            self.param_groups[0]["teleport_steps"] += any(moving)
            self._capture.clear()
            self._watch()
        return loss

    def _conjugated(self, closure: Callable[[], Any] | None) -> Any:
        """A step at the whitened point, pulled back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begin_s = time.perf_counter()
        moving, captured = self._seen(due=True)
        if any(moving) and self._conjugation is not None:
            flat = self._flat()
            landscapes = self._landscapes(captured)
            usable = bool(landscapes) and bool(torch.isfinite(flat).all() & torch.isfinite(landscapes[0].inputs).all())
            if usable:
                hidden = self._mlp.layer_inputs(self._mlp.unflatten(flat), landscapes[0].inputs)
                usable = self._conjugation.observe([h.mT for h in hidden], self._linears)
            if usable:
                before = self._squared_gradient(flat)
                with self._conjugation.whitened(self._linears):
                    inside = self._squared_gradient(flat)
                    seconds = time.perf_counter() - begin_s
                    self.base.step()
                unknown, zero = torch.full_like(before, torch.nan), torch.zeros_like(before)
                # A change of coordinates alone: nothing drifts, and nothing can be rolled back.
                self.report = Report(unknown, unknown, before, inside, zero, zero.bool(), 1, seconds)
            else:
                self.base.step()
            self.param_groups[0]["teleport_steps"] += 1
            self.param_groups[0]["teleports"] += usable
        self._capture.clear()
        self._watch()
        return loss

    def _squared_gradient(self, like: Tensor) -> Tensor:
        """``‖∇L‖²`` of all parameters, as they and their gradients now are."""
        squares = [p.grad.square().sum().to(like) for p in self.model.parameters() if p.grad is not None]
        return torch.stack(squares).sum()

    def _seen(self, due: bool) -> tuple[list[bool], tuple[Tensor, Tensor] | None]:
        """Which parameters a step moves, and if a teleport is due the passes, scaled as their gradients now are."""
        return self._moving(), self._capture.columns(self._flat().dtype) if due else None

    def _moving(self) -> list[bool]:
        """Which parameters of the model a step changes."""
        rates = {id(p): float(group.get("lr", 1.0)) for group in self.param_groups for p in group["params"]}
        return [p.grad is not None and rates.get(id(p), 0.0) != 0 for p in self.model.parameters()]

    def _teleport(self, moving: Sequence[bool], captured: tuple[Tensor, Tensor] | None) -> None:
        movable = self._movable(moving)
        if not any(movable):
            return
        parameters = list(self.model.parameters())
        flat = self._flat()
        move = self._with_metric(parameters, flat.dtype)
        for landscape in self._landscapes(captured):
            group = self.param_groups[0]
            if not all(bool(torch.isfinite(t).all()) for t in (landscape.inputs, flat)):
                group["teleports_rolled_back"] += 1  # nothing to be made of such a batch
                continue
            result = move(landscape, flat, movable)
            self.report = result.report
            if self.batches is None:
                unknown = torch.full_like(result.report.drift, torch.nan)
                self.report = result.report._replace(loss_before=unknown, loss_after=unknown)
            group["teleports"] += int(bool(result.path) and not torch.equal(result.weights, flat))
            group["teleports_rolled_back"] += int(bool(result.report.rolled_back))
            carry_state(self.base, self.strategy, parameters, self._mlp, landscape, flat, result)
            flat = result.weights
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))

    def _flat(self) -> Tensor:
        """The model's parameters as one vector, in float32 at least."""
        parameters = list(self.model.parameters())
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if len(known & {id(p) for p in parameters}) < len(known):
            raise MetateleError("a parameter of the model was replaced after the optimizer was made; make it anew")
        if [p.shape for p in parameters] != [torch.Size(s) for s in self._mlp.shapes]:
            raise ShapeMismatchError("the model's parameters are not those of its Linear layers alone")
        joined = torch.cat([p.detach().flatten() for p in parameters])
        return joined if joined.dtype in (torch.float32, torch.float64) else joined.float()

    def _movable(self, moving: Sequence[bool]) -> list[bool]:
        flags = iter(moving)
        layers = [all(next(flags) for _ in linear.parameters()) for linear in self._linears]
        return [layers[m] and layers[m + 1] for m in range(len(layers) - 1)]

    def _with_metric(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> TeleportMove:
        if self.metric != "adaptive":
            return self.teleport
        metric = metric_of(self.base, parameters).to(dtype)
        return dataclasses.replace(self.teleport, objective=GradientNorm(metric))  # type: ignore[call-arg]

    def _landscapes(self, captured: tuple[Tensor, Tensor] | None) -> list[Landscape]:
        if self.batches is not None and self.loss_fn is not None:
            dtype = self._flat().dtype
            return [batch_landscape(self.model, x, y, self.loss_fn, dtype) for x, y in self.batches()]
        if captured is None and self._capture.seen:
            return []  # the batch was empty
        if captured is None:
            raise MetateleError(f"a teleport needs the layer inputs, and {self._capture.why_nothing()}")
        inputs, gradient = captured
        stored = next(self.model.parameters()).dtype
        return [Landscape(self._mlp, inputs, gradient, FixedGradient(), None if stored == inputs.dtype else stored)]

    # --- copies

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: wrapped optimizer and model together."""
        kept = ("base", "model", "teleport", "at", "every", "strategy", "metric", "batches", "loss_fn", "report")
        return {name: self.__dict__[name] for name in (*kept, "_conjugation", "_capture")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and listen to the copied model."""
        self.__dict__.update(state)
        super().__setstate__({})
        self._linears, self._mlp = read_sequential(self.model, framed=True)
        self._watch()
        self._capture.attach(self)

    def __repr__(self) -> str:
        return f"TeleportOptimizer({self.base!r}, teleport={type(self.teleport).__name__})"


def batch_landscape(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFunction, dtype: torch.dtype | None = None
) -> Landscape:
    """The loss of a model on a batch, as a function of its flat parameters.

    Args:
        model: As :class:`TeleportOptimizer` takes it.
        inputs: What the model is called with.
        targets: What ``loss_fn`` takes beside the model's output.
        loss_fn: Gives a scalar.
        dtype: Of the computation; the parameters' own if not given.
    """
    linears, mlp = read_sequential(model, framed=True)
    if not inputs.numel() or inputs.ndim < 2:
        raise ShapeMismatchError(f"a teleport needs a batch [n, ...] of at least one sample, got {tuple(inputs.shape)}")
    modules = [module for _, module in flat_modules(model)]
    begin, end = (next(i for i, m in enumerate(modules) if m is linear) for linear in (linears[0], linears[-1]))
    with torch.no_grad():
        first = inputs
        for module in modules[:begin]:
            first = module(first)
    if first.shape[-1] != mlp.widths[0]:
        raise ShapeMismatchError(f"expected inputs with {mlp.widths[0]} features, got shape {tuple(inputs.shape)}")
    tail = modules[end + 1 :]

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        outputs = outputs.reshape(*first.shape[:-1], outputs.shape[-1])
        for module in tail:
            outputs = module(outputs)
        result = loss_fn(outputs, wanted)
        if result.ndim:
            raise ShapeMismatchError(f"loss_fn must give a scalar, got shape {tuple(result.shape)}")
        return result

    own = linears[0].weight.dtype
    dtype = dtype or (own if own in (torch.float32, torch.float64) else torch.float32)
    stored = None if own == dtype else own
    return Landscape(mlp, first.flatten(0, -2).to(dtype).T, targets, Differentiable(loss), stored)


@torch.no_grad()
def teleport_(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction,
    objective: str | Objective | TeleportMove = "grad-norm",
    **settings: Any,
) -> Report:
    """Teleport a model's weights in place, once, on one batch.

    Args:
        model: As :class:`TeleportOptimizer` takes it. Layers with a frozen parameter stay.
        inputs: What the model is called with.
        targets: What ``loss_fn`` takes beside the model's output.
        loss_fn: Gives a scalar, like ``torch.nn.functional.cross_entropy``.
        objective: What to raise, by name (``grad-norm``, ``sharpness``, ``curvature``) or as an
            :class:`~metatele.geometry.Objective`; or a teleport move to make.
        **settings: Of :class:`~metatele.teleport.Ascent`, for an objective.

    Returns:
        Loss and objective before and after, drift, whether it was rolled back, seconds.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
        >>> report = teleport_(model, torch.randn(5, 8), torch.randn(5, 3), nn.functional.mse_loss)
        >>> bool(report.objective_after > 2 * report.objective_before), bool(report.drift < 0.01)
        (True, True)
    """
    landscape = batch_landscape(model, inputs, targets, loss_fn)
    linears, _ = read_sequential(model, framed=True)
    move = _move(objective, settings)
    parameters = [p for linear in linears for p in linear.parameters()]
    flat = torch.cat([p.detach().flatten() for p in parameters]).to(landscape.inputs.dtype)
    free = [all(p.requires_grad for p in linear.parameters()) for linear in linears]
    movable = [free[m] and free[m + 1] for m in range(len(free) - 1)]
    result: Teleport = move(landscape, flat, movable)
    for p, part in zip(parameters, result.weights.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))
    return result.report


def _move(wanted: str | Objective | TeleportMove, settings: dict[str, Any]) -> TeleportMove:
    if isinstance(wanted, TeleportMove):
        if settings:
            raise ConfigError(f"{sorted(settings)[0]} belongs to the move that was given")
        return wanted
    if isinstance(wanted, Objective):
        settings = {"objective": wanted, **settings}
    if "lr" in settings:
        settings = {"rate": "fixed", **settings}
    known = {f.name for f in dataclasses.fields(Ascent)} - ({"objective"} if isinstance(wanted, str) else set())
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"an ascent has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return Ascent(**settings) if isinstance(wanted, Objective) else Ascent(objective=objective(wanted), **settings)
