"""A trained meta-optimizer as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metatele import checkpoint as checkpoints
from metatele.errors import ConfigError, MetateleError, ShapeMismatchError
from metatele.learned import EquivariantOptimizer, MetaOptimizer, family_of
from metatele.named import named_checkpoint
from metatele.network.ranks import refuse_sharded
from metatele.network.unwrap import unwrapped
from metatele.optim.described import Description, described
from metatele.optim.equivariant import EquivariantStepper
from metatele.optim.flat import FlatStepper
from metatele.optim.general import GeneralStepper
from metatele.optim.messages import REPLACED, SPARSE
from metatele.optim.recording import Recording
from metatele.optim.steppers import Situation, Stepper

_STEPPERS: dict[str, type[Stepper]] = {}
_SMALL = 0.01  # rates up to here are more often meant as another optimizer's than as a factor on our step
# What schedulers and checkpoints of others write into groups, beside our own settings.
_OF_OTHERS = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def register_stepper(family: str, stepper: type[Stepper]) -> None:
    """Make known what steps a model by the optimizers of a family.

    Args:
        family: Its name in :mod:`metatele.config.families`.
        stepper: Made as ``stepper(meta, model)``.

    Raises:
        ConfigError: The family has one already.

    Example:
        >>> register_stepper("flat", FlatStepper)
        Traceback (most recent call last):
        metatele.errors.ConfigError: the family 'flat' has a stepper already
    """
    if family in _STEPPERS:
        raise ConfigError(f"the family {family!r} has a stepper already")
    _STEPPERS[family] = stepper


register_stepper("flat", FlatStepper)
register_stepper("equivariant", EquivariantStepper)
register_stepper("general", GeneralStepper)


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Trains any module without a learning rate to choose; an ordinary torch optimizer otherwise.

    The default checkpoint, ``general``, steps each weight matrix W along D. That is momentum, whitened by the second
    moments of the layer's inputs, with singular values made more alike:

    .. math::
        W ← W - lr\, η\, s\, ρ^p (‖W‖\, D/‖D‖ + w\, W)

    η follows the slope along the last step, ρ is the share of the momentum that is no noise, and a controller sets s,
    p, w and the direction. Vectors are stepped as Adam does. What a step needs of the layers' inputs is taken by hooks,
    in the passes whose gradients were taken since the last ``zero_grad`` or ``step``; nothing is asked of the training
    loop. Compiled models and wrappers (``DistributedDataParallel``, Fabric) are looked through, and all ranks make the
    same step.

    Checkpoints of the equivariant family (``transfer``) take perceptrons and teleport by conjugation,
    ``w ← g⁻¹·(g·w + lr·f)``. Those of the flat family, the paper's LSTMs (Zhao et al. 2024, Algorithm 1), take
    perceptrons of the shape they were trained on, and step ``w ← g·(w + lr·f)``.

    A parameter without gradient, in no group, or with ``lr`` 0 does not move. A gradient that is not finite makes no
    step, and ``skipped`` in the first group counts it. The arithmetic is float32 whatever the parameters are, so
    parameters of another dtype are rounded through it.

    Args:
        model: Any ``nn.Module``; of other families ``nn.Sequential`` of ``Linear`` and activations.
        checkpoint: The name of a published checkpoint (``general``, the default, or ``transfer``, ``update-tele``,
            ``update``, ``lr-tele``), a checkpoint or run folder, what :func:`metatele.load` returns, or a
            meta-optimizer (used as it is, and moved to the model's device).
        lr: Factor on the learned step, a number or a 0-d tensor; 1 is what it was made for. A setting of each group, so
            that schedulers work.
        params: The parameters to optimize, as for any torch optimizer; all of the model's by default.
        max_drift: Of the flat family: a teleport that changes the output on its batch by more, relative, is not made,
            and ``rolled_back`` in the first group counts it. Pulled-back teleports do not drift.
        weight_decay: Decoupled: each step first multiplies the weights by ``1 - lr · weight_decay``. As ``lr`` is 1
            here, 1e-5 is what AdamW calls 0.01 at its rate of 1e-3. A setting of each group.
        maximize: Go up instead of down; the same for all groups. What is maximized should have an upper bound, as minus
            a loss has.
        total_steps: Of the run, if it is known: steps then shorten over its last part. Of the general family.

    Groups have ``momentum``, a factor on the momentum, which schedulers that cycle it need.

    Raises:
        ShapeMismatchError: The model does not have the checkpoint's shape.
        UnsupportedModelError: The model holds a layer that is not covered, or its parameters are split over processes.
        CheckpointError: The checkpoint cannot be used.
        ConfigError: A group has a setting that there is not.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = LearnedOptimizer(model)
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
    """

    _recording: Recording | None = None  # of this optimizer alone: copies and pickles are not recorded

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | Path | checkpoints.Checkpoint | MetaOptimizer | EquivariantOptimizer | None = None,
        lr: float | Tensor = 1.0,
        params: Iterable[Any] | None = None,
        max_drift: float = 0.01,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise TypeError(f"model must be an nn.Module, got {got}: give the model itself, not its parameters")
        if isinstance(checkpoint, int | float):
            got = type(checkpoint).__name__
            raise TypeError(
                f"checkpoint must be a name, a path, a Checkpoint or a meta-optimizer, got {got}: there is no learning "
                "rate to give"
            )
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a 0-d tensor, got shape {tuple(lr.shape)}")
        if not 0 <= float(lr) < math.inf:
            raise ValueError(f"lr must be zero or positive, got {lr}")
        if 0 < float(lr) <= _SMALL:
            warnings.warn(
                f"lr is a factor on the learned step, 1 by default: {float(lr)} makes steps short", stacklevel=2
            )
        if not max_drift > 0:
            raise ValueError(f"max_drift must be positive, got {max_drift}")
        if checkpoint is None:
            checkpoint = checkpoints.load(named_checkpoint("general"))  # also where a folder has this name
        elif isinstance(checkpoint, str | Path):
            checkpoint = checkpoints.load(checkpoint)
        self.model = model
        given = checkpoint.optimizer if isinstance(checkpoint, checkpoints.Checkpoint) else checkpoint
        family = family_of(given).name
        if family not in _STEPPERS:
            raise ConfigError(f"the family {family!r} cannot step a model: it has no stepper (register_stepper)")
        kind = _STEPPERS[family]
        if not kind.splits:
            refuse_sharded(unwrapped(model).parameters(), "LearnedOptimizer")
        self.stepper = kind(given, model)
        if total_steps is not None:
            if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
                raise ValueError(f"total_steps must be a whole number above zero, got {total_steps!r}")
            if "total_steps" not in self.stepper.defaults:
                raise ConfigError(f"total_steps is of the general family, and the checkpoint is of the {family} one")
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, **self.stepper.defaults}
        if total_steps is not None:
            defaults["total_steps"] = total_steps
        defaults |= {"max_drift": max_drift, "drift": 0.0, "rolled_back": 0}
        super().__init__(model.parameters() if params is None else params, defaults)
        self.stepper.attach(self)

    @property
    def meta(self) -> nn.Module:
        """The meta-optimizer."""
        return self.stepper.meta

    @property
    def capture(self) -> Any:
        """What the passes since the last step showed."""
        return self.stepper.capture

    @property
    def state(self) -> defaultdict[Any, dict[str, Any]]:
        """What is remembered for each parameter; up to date whenever it is looked at."""
        self._settle()
        self.stepper.store(self._held(), self.param_groups[0] if self.param_groups else {})
        return self._memory

    @state.setter
    def state(self, value: defaultdict[Any, dict[str, Any]]) -> None:
        self._memory, self._uncounted = value, 0

    def _held(self) -> MutableMapping[Any, dict[str, Any]]:
        """The memory as the stepper knows the parameters."""
        return self.stepper.held.memory(self._memory)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model that were left out so far.

        Raises:
            ConfigError: A setting that there is not, or one with a value that cannot be.
            ValueError: A parameter that is not the model's.
        """
        self._settle()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        known = {id(p) for p in self.model.parameters()}
        try:
            for name in group:
                if name not in self.defaults and name not in _OF_OTHERS:
                    settings = ", ".join(n for n in self.defaults if n not in ("drift", "rolled_back", "skipped"))
                    raise ConfigError(
                        f"a parameter group has no setting {name!r}; it has {settings}",
                        page="docs/learned-optimizer.md#use-it",
                    )
            if not 0 <= float(group["weight_decay"]) < math.inf:
                raise ConfigError(f"weight_decay must be zero or positive, got {group['weight_decay']}")
            if float(group["lr"]) * float(group["weight_decay"]) >= 1:
                raise ConfigError(
                    f"lr times weight_decay must be below 1, what is left of the weights after a step, got "
                    f"{float(group['lr']) * float(group['weight_decay'])}"
                )
            if bool(group["maximize"]) != bool(self.param_groups[0]["maximize"]):
                raise ConfigError("maximize must be the same for all parameter groups: a step is of the whole network")
            for p in group["params"]:
                if id(p) not in known:
                    raise ValueError(f"a parameter of shape {tuple(p.shape)} does not belong to the model")
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and forget the layer inputs they came from."""
        self.stepper.zeroed()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local move and one teleport; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            device = self.stepper.parameters[0].device.type
            casts = torch.is_autocast_enabled(device)
            plain = torch.autocast(device, enabled=False) if casts else contextlib.nullcontext()
            with plain, self.stepper.held.gathered():
                self._advance(loss)
        finally:
            self.stepper.clear()
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]  # of a step that is compiled this runs as it is
    def _advance(self, loss: Any = None) -> None:
        found: dict[int, tuple[float, float]] = {}  # rate and decay of each parameter
        whole = self.stepper.held.whole
        for group in self.param_groups:
            found |= dict.fromkeys(
                (id(whole(p)) for p in group["params"] if p.numel()), (float(group["lr"]), float(group["weight_decay"]))
            )
        self.stepper.ready()
        parameters = self.stepper.parameters
        gradients = [p.grad for p in parameters]
        if any(g is not None and g.is_sparse for g in gradients):
            raise RuntimeError(SPARSE)
        settings = [found.pop(id(p), None) for p in parameters]
        if found and any(g is not None for g in gradients):
            raise MetateleError(REPLACED)
        pairs = list(zip(gradients, settings, strict=True))
        if all(g is None or one is None for g, one in pairs):
            self.stepper.refuse_replaced()
            return
        rates = [0.0 if g is None or one is None else one[0] for g, one in pairs]
        first = self.param_groups[0]
        device, weight = parameters[0].device, self.stepper.like
        if weight.device != device:
            self.meta.to(device)  # the model was moved after the optimizer was made
        sign = -1.0 if first["maximize"] else 1.0
        decays = [0.0 if one is None else one[1] for one in settings]
        momentum = first.get("momentum", 1.0)
        value = loss.detach() if isinstance(loss, Tensor) else loss
        known = isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1)
        value = sign * float(value) if known else None
        at = Situation(parameters, rates, decays, sign, momentum, self._held(), first, weight.dtype, value)
        if not any(rates):
            self._count()
            self.stepper.idle(at)
            return
        if self.stepper.advance(at) if self._recording is None else self._recording.around(at):
            self._uncounted += 1
            if not self._memory:
                self._settle()

    def _settle(self) -> None:
        """Count the steps since somebody looked last; counting at each takes as long as a layer's pass."""
        if self._uncounted:
            self._count(self._uncounted)
            self._uncounted = 0

    def _count(self, steps: int = 0) -> None:
        """Every parameter has an entry, which tools that save state parameter by parameter ask for."""
        entries = [self._memory[p] for group in self.param_groups for p in group["params"]]
        for entry in entries:
            if "step" not in entry:
                entry["step"] = torch.zeros(())
        torch._foreach_add_([entry["step"] for entry in entries], float(steps))

    def describe(self) -> Description:
        """A table of every parameter, or piece of one: how it is stepped, and why.

        What passes show is known after a step; the table says so where none was made yet.

        Example:
            >>> from metatele.config import EquivariantConfig
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> meta = EquivariantOptimizer(EquivariantConfig())
            >>> optimizer = LearnedOptimizer(model, meta, params=model[0].parameters())
            >>> [(row.name, row.shape, row.how) for row in optimizer.describe().rows]
            [('0.weight', (1, 4, 4), 'linear: inputs seen'), ('2.weight', (1, 2, 5), 'in no group')]
        """
        whole = self.stepper.held.whole
        rates = {id(whole(p)): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        self._settle()
        begun = any(float(entry.get("step", 0)) for entry in self._memory.values())
        return described(self.stepper.rows(), rates, begun, self.stepper.note)

    def record(self, writer: Any = None, every: int = 1) -> Recording:
        """Keep what the optimizer does from now on: step lengths, and at looks what its controller saw and set.

        Steps stay the same, to the bit. What is kept, and how it is drawn, tells
        :class:`~metatele.optim.recording.Recording`.

        Args:
            writer: TensorBoard's ``SummaryWriter``, to write scalars to as they come; or nothing.
            every: Steps between two looks are kept every so many.

        Raises:
            ConfigError: The checkpoint is not of the general family, the optimizer is recorded already, or an argument
                cannot be used.

        Example:
            >>> optimizer = LearnedOptimizer(nn.Linear(3, 1))
            >>> with optimizer.record() as recording:
            ...     pass  # train
            >>> recording.rows()
            []
        """
        if not isinstance(self.stepper, GeneralStepper):
            family = family_of(self.meta).name
            raise ConfigError(f"record() is of the general family, and the checkpoint is of the {family} one")
        if self._recording is not None:
            raise ConfigError("the optimizer is recorded already: stop() that recording first")
        self._recording = Recording(self, writer, every)
        return self._recording

    # --- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; what belongs to the whole network lies in the first group."""
        self._settle()
        self.stepper.store(self._held(), self.param_groups[0])
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the memories keep their float32 whatever the parameters are.

        What version 0.1 has saved is read too.

        Raises:
            ShapeMismatchError: The state is another optimizer's.
        """
        numbers = {
            number: p
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for number, p in zip(saved["params"], group["params"], strict=False)
        }
        state_dict = self.stepper.checked(state_dict, numbers)
        if any("max_drift" not in group for group in state_dict["param_groups"]):
            raise ShapeMismatchError("the state is of another kind of optimizer")
        super().load_state_dict(state_dict)
        for number, p in numbers.items():
            for name, value in state_dict["state"].get(number, {}).items():
                # Copies: steps are made in place, and what was loaded belongs to the caller.
                where = value.device if name == "step" else p.device
                self._memory[p][name] = value.detach().to(where, copy=True)
        self.stepper.loaded(self._held(), self.param_groups[0] if self.param_groups else {})

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: the model too, so that both halves stay together."""
        return {**super().__getstate__(), "model": self.model, "stepper": self.stepper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and listen to the copied model."""
        state = dict(state)
        self._memory, self._uncounted = state.pop("state", defaultdict(dict)), 0
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.stepper.defaults.items() if hasattr(self, "stepper") else ():
                group.setdefault(name, value)
            for name in ("weight_decay", "maximize"):  # not in what version 0.1 has saved
                group.setdefault(name, self.defaults[name])
        if "stepper" in state:
            self.stepper.attach(self)
            self.stepper.loaded(self._held(), self.param_groups[0])
