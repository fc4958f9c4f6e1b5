"""What every family of meta-optimizers needs to step one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metatele.errors import MetateleError
from metatele.network.capture import Capture
from metatele.network.held import Plain
from metatele.network.sequential import parameters_of, read_sequential
from metatele.optim.described import Row
from metatele.optim.messages import REPLACED

_T = TypeVar("_T")
Memory = MutableMapping[Any, dict[str, Any]]  # a torch optimizer's state


@dataclass(frozen=True)
class Situation:
    """Where a model is.

    Attributes:
        parameters: Those of the layers, in their order.
        rates: Factor on the update of each; zero where it does not move.
        decays: Decoupled weight decay of each.
        sign: -1 where the objective is to be maximized.
        momentum: Factor on the momentum.
        memory: What the optimizer keeps for each parameter.
        group: The first parameter group, for what belongs to the whole network.
        dtype: What steps are computed in.
        loss: That of the closure, if there was one that gave it.
    """

    parameters: Sequence[nn.Parameter]
    rates: Sequence[float]
    decays: Sequence[float]
    sign: float
    momentum: float
    memory: Memory
    group: dict[str, Any]
    dtype: torch.dtype
    loss: float | None = None

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Of each parameter; zero where there is none or it does not move."""
        return [
            self.signed(p.grad.to(self.dtype)) if rate and p.grad is not None else torch.zeros_like(p, dtype=self.dtype)
            for p, rate in zip(self.parameters, self.rates, strict=True)
        ]

    def signed(self, gradient: Tensor) -> Tensor:
        """A gradient of what is minimized."""
        return gradient if self.sign > 0 else -gradient

    @property
    def whole(self) -> bool:
        """Whether every parameter moves."""
        return all(self.rates)

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector ``[P]`` of what there is for each parameter."""
        return torch.cat([part.flatten() for part in parts]).to(self.dtype)

    @property
    def weights(self) -> Tensor:
        """All parameters as one vector."""
        return self.flat(self.parameters)

    @property
    def scale(self) -> Tensor:
        """The factor on each entry of that vector."""
        return self.flat(
            [torch.full_like(p, r, dtype=self.dtype) for p, r in zip(self.parameters, self.rates, strict=True)]
        )

    def decay_(self) -> None:
        """Shrink the parameters that move, as AdamW does before its step: once it is sure that there is one."""
        for p, rate, decay in zip(self.parameters, self.rates, self.decays, strict=True):
            if rate and decay:
                p.mul_(1 - rate * decay)

    def write(self, flat: Tensor) -> None:
        """Put the parameters that move where a vector says."""
        parts = flat.split([p.numel() for p in self.parameters])
        for p, part, rate in zip(self.parameters, parts, self.rates, strict=True):
            if rate:
                p.copy_(part.view_as(p))


class Stepper(ABC):
    """One meta-optimizer as it steps one model.

    Attributes:
        meta: The meta-optimizer.
        model: The model.
        capture: What the model's passes show. A stepper sets beforehand what the next ones are to be asked for.
        defaults: Settings of parameter groups that this family has beside those of all.
        held: How the model holds its parameters.
        splits: Whether it may hold them split over processes.

    Args:
        meta: The meta-optimizer.
        model: The model.
    """

    meta: nn.Module
    model: nn.Module
    capture: Any
    defaults: Mapping[str, Any] = {}
    held = Plain()
    splits = False

    @abstractmethod
    def __init__(self, meta: Any, model: nn.Module) -> None: ...

    def attach(self, owner: Any) -> None:
        """Listen to the model for as long as ``owner`` lives."""
        self.capture.attach(owner)

    def clear(self) -> None:
        """Forget what the passes showed."""
        self.capture.clear()

    def zeroed(self) -> None:
        """Forget what came; passes made before gradients are zeroed may still get theirs."""
        self.clear()

    def ready(self) -> None:  # noqa: B027 (all was seen by default)
        """A step is due: look once more at what the passes did not show."""

    def refuse_replaced(self) -> None:
        """No gradient came to the parameters that are known.

        Raises:
            MetateleError: One came to another parameter of the model, which was put in the place of one since.
        """
        known = {id(p) for p in self.parameters}
        others = (p for p in self.held.named(self.model).values() if id(p) not in known)
        if any(p.grad is not None and p.numel() for p in others):
            raise MetateleError(REPLACED)

    @property
    def like(self) -> Tensor:
        """Of the dtype of all memories, where the meta-optimizer is."""
        return next(self.meta.parameters())

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Those that it steps."""

    @abstractmethod
    def advance(self, at: Situation) -> bool:
        """Move the parameters, and remember; whether there was a step, which an empty batch makes none of."""

    def idle(self, at: Situation) -> None:  # noqa: B027 (there is nothing to save by default)
        """Memories of a model that has not moved, so that there are some to save."""

    def store(self, memory: Memory, group: dict[str, Any]) -> None:  # noqa: B027 (all may lie there already)
        """Write what is remembered where tools that save an optimizer look for it."""

    def forget(self) -> None:  # noqa: B027 (nothing is kept by default)
        """What is kept beside the optimizer's memory is out of date: that was replaced."""

    def loaded(self, memory: Memory, group: Mapping[str, Any]) -> None:
        """What :meth:`store` wrote was put back, from a file or into a copy."""
        self.forget()

    def rows(self) -> list[Row]:
        """How each parameter is stepped, as if all moved."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [Row(names.get(id(p), "?"), tuple(p.shape), "as its family does", "", (p,)) for p in self.parameters]

    @property
    def note(self) -> str:
        """What is to be said of the whole network."""
        return ""

    @abstractmethod
    def checked(self, state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter]) -> dict[str, Any]:
        """A state to load, in today's form.

        Args:
            state_dict: Of an optimizer, of this version or an earlier one.
            parameters: By their numbers there.

        Raises:
            ShapeMismatchError: It is of another optimizer or model.
        """


class SequentialStepper(Stepper):
    """One that steps an ``nn.Sequential`` of Linear and activations.

    Attributes:
        mlp: The model's shape.
        framed: Whether modules before the first and behind the last layer may be no part of its network.

    Raises:
        UnsupportedModelError: The model is something else.
    """

    capture: Capture
    framed = True

    def __init__(self, meta: Any, model: nn.Module) -> None:
        linears, self.mlp = read_sequential(model, framed=self.framed)
        self.meta, self.model, self.capture = meta, model, Capture(linears)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """See the base class."""
        return parameters_of(self.capture.linears)

    def rows(self) -> list[Row]:
        """See the base class."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = []
        for linear in self.capture.linears:
            owners = tuple(p for p in linear._parameters.values() if p is not None)
            shape = (1, linear.out_features, linear.in_features + len(owners) - 1)
            found.append(Row(names.get(id(linear.weight), "?"), shape, "linear: inputs seen", "a perceptron", owners))
        return found

    def missing(self, what: str) -> MetateleError:
        """The error of a step without what the passes would have shown."""
        return MetateleError(f"{what} needs the layer inputs, and {self.capture.why_nothing()}")

    def by_layer(self, parts: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
        """What there is for each parameter, for each layer."""
        rest = iter(parts)
        for biased in self.mlp.biases:
            yield tuple(islice(rest, 1 + biased))
