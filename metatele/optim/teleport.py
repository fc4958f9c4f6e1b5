"""Teleportation around any ``torch.optim`` optimizer, and once by hand."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, MetateleError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import GradientNorm, Landscape
from metatele.network import ranks
from metatele.network.capture import Capture
from metatele.network.sequential import parameters_of, read_sequential
from metatele.network.use import is_same_batch
from metatele.network.wanted import NOTHING, Wanted
from metatele.optim.any_module import OF_MODELS
from metatele.optim.by_hand import LossFunction, batch_landscape, is_perceptron, teleport_
from metatele.optim.conjugate import Conjugation
from metatele.optim.state import ADAPTIVE, STRATEGIES, carried_tensors, carry_state, metric_of, reset_state_
from metatele.optim.wrapper import Wrapper, refuse, schedule
from metatele.perceptron.losses import FixedGradient
from metatele.symmetry import action
from metatele.teleport import (
    Ascent,
    Reason,
    Report,
    TeleportMove,
    TeleportReport,
    Whitening,
    default_move,
)

__all__ = ["TeleportOptimizer", "batch_landscape", "teleport_"]

COUNTERS = {"teleport_steps": 0, "teleports": 0, "teleports_rolled_back": 0}


class TeleportOptimizer(Wrapper):
    r"""Steps ``w ← g·(w + f)`` with f from any torch optimizer and g from a teleport move.

    At the chosen steps the wrapped optimizer makes its step, and then the weights are teleported on the
    data of the backward passes just made, which are taken by hooks; nothing is asked of the training
    loop. What a pass tells is its input and ``∂L/∂output``. A teleport keeps the outputs, so along it that
    gradient stays what it is and stands for the loss, whatever that is. It is the one from before the base
    optimizer's step, so objectives are those of the new weights up to the size of that step; the report
    knows no loss, and its drift is the change of the outputs relative to their spread over the samples.
    With ``batches`` and ``loss_fn`` the teleport is made on those instead, one after another, with the real loss.

    If no move is given, it is that of :func:`~metatele.teleport.default_move`: up to ten steps that raise ``‖∇L‖²``. In
    networks of ReLU, LeakyReLU and Identity they rescale hidden units: the function stays the same for every input, and
    the squared norm grew by a factor of 1.04 to 1.74. In others they are approximate: outputs change by up to 1 %, and
    the factor was 1.08 to 4.3 (``benchmarks/teleport_field.py``). A teleport costs about 30 passes through the batch in
    the first case; up to 160, with QR factorisations of each hidden layer, in the second. A larger gradient norm need
    not be faster training: made every 10 steps of Adam, this move raised the held-out loss in six of eight situations,
    up to twofold.

    Between teleports, and where none is due, it is the wrapped optimizer bit for bit. A step in which no
    parameter had a gradient, or with every ``lr`` 0, does not teleport. A layer with a frozen parameter, or
    one in no group, stays as it is, and so does the hidden layer before it and behind it.

    Under ``DistributedDataParallel`` the samples of all ranks are one batch and every rank makes the same move, to the
    bit; where ``batches`` or random numbers differ by rank, the first rank's move is made. Make the optimizer with the
    bare model or the wrapper, and train through the wrapper.

    ``param_groups[0]`` counts ``teleports`` and ``teleports_rolled_back`` (a move, or a step of an ascent,
    taken back because it drifted past the move's ``max_drift``). :attr:`report` is a
    :class:`~metatele.teleport.TeleportReport` of the last one, and says why if nothing moved (with mode ``conjugate``:
    ``‖∇L‖²`` at the weights and in the whitened coordinates; nothing drifts there).

    Args:
        base: The optimizer of the model's parameters.
        model: ``nn.Sequential`` of ``Linear`` and activations; ``Flatten`` may come first, and an activation or
            (log-)softmax last.
        teleport: The move; see above for what is done if none is given. Its action ``auto`` is the exact one only where
            the batch is known to be all the data, which is one that the step before has seen too; on mini-batches,
            at the first step and with ``batches`` it is the approximate one.
        at: Steps, counted from 0, after which to teleport. Steps with every ``lr`` 0 do not count: where a warm-up
            begins with 0, ``at=[0]`` is after its second step.
        every: Teleport after every so many steps, in place of ``at``.
        state: What happens to the wrapped optimizer's state at a teleport. ``keep``: nothing. ``reset``: it is
            as in a new optimizer. ``transport``: it is carried to the new point, see
            :func:`metatele.optim.state.carry_state`, of other modules :func:`metatele.carry_along_`; L-BFGS, whose
            pairs belong to the old point, is reset.
        metric: ``euclidean``, or ``adaptive``: an ascent of the gradient norm then uses ``‖∇L‖²_A`` with A from
            the wrapped optimizer's state (AdaGrad, RMSprop, Adam and their kin).
        batches: Called at each teleport; gives ``(inputs, targets)`` pairs.
        loss_fn: Of ``(outputs, targets)``, for ``batches``.

    Raises:
        UnsupportedModelError: The model holds a layer that is not covered; it is named. Or its parameters are split
            over processes. A module without a symmetry goes on: a warning says so once, :attr:`report` each time.
        ConfigError: Settings that do not go together.
        NotExactError: The move's action does not exist for an activation.
        MetateleError: At a step: no pass of the model was seen, or a parameter was replaced, pruned or parametrised.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
        >>> optimizer = TeleportOptimizer(torch.optim.Adam(model.parameters()), model, at=[0])
        >>> x, y = torch.randn(5, 8), torch.randn(5, 3)
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["teleports"], optimizer.report.drift < 1e-5
        (1, True)
    """

    def __new__(
        cls, base: Any = None, model: Any = None, teleport: Any = None, *_: Any, **__: Any
    ) -> TeleportOptimizer:
        """One for any module where the model is no perceptron, or the move none of theirs."""
        general = isinstance(model, nn.Module) and (isinstance(teleport, OF_MODELS) or not is_perceptron(model))
        if cls is TeleportOptimizer and general:
            from metatele.optim.teleport_module import ModuleTeleportOptimizer

            return super().__new__(ModuleTeleportOptimizer)
        return super().__new__(cls)

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
        refuse(base, model, teleport)
        linears, mlp = read_sequential(model, framed=True)
        if not mlp.hidden_widths:
            raise UnsupportedModelError("a teleport needs a hidden layer, and the model has a single Linear")
        move = default_move(mlp) if teleport is None else teleport
        if move.action != "auto":
            for activation in mlp.activations:
                action(move.action).check(activation)
        conjugate = isinstance(move, Whitening) and move.mode == "conjugate"
        if conjugate and at is None and every is None:
            every = 1
        steps, every = schedule(at, every)
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
        super().__init__(base)
        self.model, self.teleport = model, move
        self.at, self.every = steps, every
        self.strategy, self.metric = state, metric
        self.batches, self.loss_fn = batches, loss_fn
        self.report: TeleportReport | None = None
        self._linears, self._mlp = linears, mlp
        self._require_own(base.param_groups)
        for name, value in COUNTERS.items():
            base.param_groups[0].setdefault(name, value)
        self._conjugation = Conjugation(move, self._linears) if isinstance(move, Whitening) and conjugate else None
        self._capture = Capture(self._linears)
        self._watch()
        self._capture.attach(self)

    def _watch(self) -> None:
        """Say what the next passes are to be asked for: the batch, and whether it is the one before."""
        like = self._linears[0].weight.dtype
        dtype = like if like in (torch.float32, torch.float64) else torch.float32
        known = self.listening and self._knows_batches
        wanted = Wanted(data=self.teleport_due, product=self.teleport_due, fingerprint=known, dtype=dtype)
        self._capture.wanted = wanted if self.listening else NOTHING

    # --- the wrapped optimizer's own things

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
        for name, value in COUNTERS.items():
            self.base.param_groups[0].setdefault(name, value)
        self._watch()

    # --- steps

    @property
    def teleport_due(self) -> bool:
        """Whether the next step teleports."""
        return self._due(self.param_groups[0]["teleport_steps"])

    @property
    def listening(self) -> bool:
        """Whether the next step's passes are kept: it teleports, or its batch is to be known again in the one after."""
        done = self.param_groups[0]["teleport_steps"]
        return self._due(done) or (self._knows_batches and self._due(done + 1))

    def _due(self, done: int) -> bool:
        return done in self.at if self.at is not None else (done + 1) % (self.every or 1) == 0

    @property
    def _knows_batches(self) -> bool:
        """Whether batches are compared: to settle what action ``auto`` is."""
        return self.teleport.action == "auto" and self.batches is None and self._conjugation is None

    @torch._disable_dynamo  # type: ignore[attr-defined]  # of a step that is compiled this runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, then a teleport if one is due; returns the closure's loss."""
        due, listening = self.teleport_due, self.listening
        if self._conjugation is not None and due:
            return self._conjugated(closure)
        if closure is not None and listening:
            given = closure

            def closure() -> Any:  # an optimizer may call it several times: the last passes count
                self._capture.clear()
                return given()

        with self._plain():  # without a closure gradients and passes are there before the step
            seen = self._seen(due) if closure is None else None
        loss = self.base.step() if closure is None else self.base.step(closure)
        try:
            with self._plain():
                moving, batch = self._seen(due) if seen is None else seen
                if any(moving) and listening:
                    whole = self._is_all_the_data()
                    if due:
                        self._teleport(moving, batch, whole)
        finally:
            self.param_groups[0]["teleport_steps"] += any(self._moving())
            self._capture.clear()
            self._watch()
        return loss

    def _plain(self) -> torch.autocast:
        """Without the caller's autocast: a step may be made in one, and is not to be rounded by it."""
        return torch.autocast(self._linears[0].weight.device.type, enabled=False)

    def _conjugated(self, closure: Callable[[], Any] | None) -> Any:
        """A step at the whitened point, pulled back; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._plain():
            self._step_whitened()
        self._capture.clear()
        self._watch()
        return loss

    def _step_whitened(self) -> None:
        begin_s = time.perf_counter()
        moving, batch = self._seen(due=True)
        if any(moving) and self._conjugation is not None:
            flat = self._flat()
            landscapes = self._landscapes(batch)
            finite = bool(landscapes) and bool(torch.isfinite(flat).all() & torch.isfinite(landscapes[0].inputs).all())
            usable = finite
            if usable:
                hidden = self._mlp.layer_inputs(self._mlp.unflatten(flat), landscapes[0].inputs)
                usable = self._conjugation.observe(hidden, self._linears, self._capture.group)
            if usable:
                before = self._squared_gradient(flat)
                with self._conjugation.whitened(self._linears):
                    inside = self._squared_gradient(flat)
                    seconds = time.perf_counter() - begin_s
                    self.base.step()
                unknown, zero = torch.full_like(before, torch.nan), torch.zeros_like(before)
                # A change of coordinates alone: nothing drifts, and nothing can be rolled back.
                report = Report(unknown, unknown, before, inside, zero, zero.bool(), 1, seconds, zero.long())
            else:
                self.base.step()
                report = Report.refused(Reason.INPUTS if landscapes else Reason.EMPTY, flat[0])
            self.report = TeleportReport.of(report, self.teleport.measured.name, loss_known=False)
            self.param_groups[0]["teleport_steps"] += 1
            self.param_groups[0]["teleports"] += usable

    def _squared_gradient(self, like: Tensor) -> Tensor:
        """``‖∇L‖²`` of all parameters, as they and their gradients now are."""
        squares = [p.grad.square().sum().to(like) for p in self.model.parameters() if p.grad is not None]
        return torch.stack(squares).sum()

    def _seen(self, due: bool) -> tuple[list[bool], tuple[Tensor, Tensor] | None]:
        """Which parameters a step moves, and if a teleport is due the batch, of all ranks, scaled as gradients are."""
        moving = self._moving()
        if not due:
            return moving, None
        flat = self._flat()
        return moving, self._capture.columns(flat.dtype) if any(moving) else None

    def _moving(self) -> list[bool]:
        """Which parameters of the layers a step changes."""
        rates = {id(p): float(group.get("lr", 1.0)) for group in self.param_groups for p in group["params"]}
        return [
            p.grad is not None and rates.get(id(p), 0.0) != 0 for linear in self._linears for p in linear.parameters()
        ]

    def _is_all_the_data(self) -> bool:
        """Whether this step's batch is that of the step before, as a batch is that is all the data."""
        found = self._capture.fingerprint() if self._knows_batches else None
        if found is None:
            return False
        group, step = self.param_groups[0], self.param_groups[0]["teleport_steps"]
        now = [float(step), float(found.columns), *found.numbers().tolist()]
        then, group["last_batch"] = group.get("last_batch"), now
        if then is None or then[0] + 1 != step or then[1] != found.columns:
            return False
        return is_same_batch(then[2:], now[2:])

    def _teleport(self, moving: Sequence[bool], batch: tuple[Tensor, Tensor] | None, whole: bool) -> None:
        parameters, group = parameters_of(self._linears), self.param_groups[0]
        flat, movable = self._flat(), self._movable(moving)
        move = self._with_metric(parameters, flat.dtype).settled(whole)
        report = Report.refused(Reason.EMPTY if any(movable) else Reason.FROZEN, flat[0])
        teleports = rolled_back = 0
        for landscape in self._landscapes(batch) if any(movable) else []:
            if not all(bool(torch.isfinite(t).all()) for t in (landscape.inputs, flat)):
                report = Report.refused(Reason.INPUTS, flat[0])
                rolled_back += 1  # nothing to be made of such a batch
                continue
            result = move(landscape, flat, movable)
            report = result.report
            teleports += int(report.reasons == Reason.MOVED)
            rolled_back += int(report.rolled_back)
            if self._rule == "transport":
                carry_state(self.base, parameters, self._mlp, flat, result)
            flat = result.weights
        if self._capture.group is not None:
            # The first rank's word: random moves differ by rank, and so may batches.
            told = torch.cat([report.numbers(), report.numbers().new_tensor([teleports, rolled_back])])
            state = carried_tensors(self.base, parameters) if self._rule == "transport" else []
            ranks.broadcast_([flat, told, *state], self._capture.group)
            report, teleports, rolled_back = Report.of_numbers(told[:-2]), int(told[-2]), int(told[-1])
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
        if teleports and self._rule == "reset":
            reset_state_(self.base)
        group["teleports"] += teleports
        group["teleports_rolled_back"] += rolled_back
        self.report = TeleportReport.of(report, move.measured.name, self.batches is not None)

    @property
    def _rule(self) -> str:
        """L-BFGS's pairs belong to the old point: they cannot be carried."""
        lost = self.strategy == "transport" and isinstance(self.base, torch.optim.LBFGS)
        return "reset" if lost else self.strategy

    def _flat(self) -> Tensor:
        """The model's parameters as one vector, in float32 at least."""
        parameters = parameters_of(self._linears)
        known = {id(p) for group in self.param_groups for p in group["params"] if p.numel()}
        if len(known & {id(p) for p in parameters}) < len(known):
            raise MetateleError(
                "a parameter of the model was replaced after the optimizer was made: make base and TeleportOptimizer "
                "anew from model.parameters()"
            )
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

    def _landscapes(self, batch: tuple[Tensor, Tensor] | None) -> list[Landscape]:
        if self.batches is not None and self.loss_fn is not None:
            dtype = self._flat().dtype
            return [batch_landscape(self.model, x, y, self.loss_fn, dtype) for x, y in self.batches()]
        if batch is None and self._capture.seen:
            return []  # it was empty
        if batch is None:
            raise MetateleError(f"a teleport needs the layer inputs, and {self._capture.why_nothing()}")
        inputs, gradient = batch
        stored = next(self.model.parameters()).dtype
        kept = None if stored == inputs.dtype else stored
        return [Landscape(self._mlp, inputs, gradient, FixedGradient(), kept)]

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
