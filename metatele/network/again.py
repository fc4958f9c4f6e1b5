"""A pass of a compiled model made once more, call by call: what its graph hides is seen then.

It is made after the backward pass, when what that kept is gone, from the same arguments and the same weights, and is
sent back from the gradients that came to the outputs. No ``grad`` is changed by it, no buffer, and no attribute that a
forward sets. If other outputs come, as of random numbers that no module tells of or of arguments that were overwritten
meanwhile, nothing of it counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metatele.network.graph import tensors_in
from metatele.network.hook import is_ordinary

COMPILED = "it is used in a compiled graph"  # as a walk says it
_ALIKE = 0.05  # relative change of the outputs up to which it is the same pass: half precision rounds another way


def is_random(model: nn.Module) -> bool:
    """Whether two passes of one batch differ, as Dropout draws other masks: none is then made again."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in model.modules())


def first_of(outputs: Sequence[Tensor]) -> Tensor:
    """The one that is kept of them."""
    return next((t for t in outputs if t.dim()), outputs[0])


def ends_in(output: Any) -> list[Tensor]:
    """The outputs of a pass that gradients may come back to."""
    return [t for t in tensors_in(output) if is_ordinary(t) and t.grad_fn is not None]


@dataclass(eq=False)
class Again:
    """What it takes to make a pass once more.

    Attributes:
        module: What was called.
        given: Its arguments, positional and named.
        ends: For each output the number of its node, and which of that node's outputs it is.
        casts: Device, dtype of autocast, and whether it was on.
        gradients: At the outputs of each node, by number.
    """

    module: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    ends: list[tuple[int, int]]
    casts: tuple[str, torch.dtype, bool]
    gradients: dict[int, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, given: Any, outputs: Sequence[Tensor]) -> Again:
        """A pass that was just made."""
        numbers = numbered(outputs)
        device = outputs[0].device.type
        casts = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return cls(module, given, [(numbers[t.grad_fn], t.output_nr) for t in outputs], casts)

    def came(self, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Gradients came back to a node."""
        old = self.gradients.get(number, [None] * len(gradients))
        self.gradients[number] = [
            g if o is None else o if g is None else o + g for o, g in zip(old, gradients, strict=True)
        ]

    def make(self, parameters: Sequence[Tensor], known: Tensor | None, walk: Callable[[list[Tensor]], None]) -> bool:
        """Make it; whether that went well, as a forward that cannot be called twice may raise anything.

        Args:
            parameters: To which gradients are taken; they are thrown away.
            known: The first output as it was; ``None`` if that was not kept.
            walk: Told of the outputs, before gradients are taken.
        """
        device, dtype, on = self.casts
        try:
            with torch.enable_grad(), _eager(), _untouched(self.module):
                with torch.autocast(device, dtype, enabled=on):
                    outputs = ends_in(self.module.forward(*self.given[0], **self.given[1]))
                if known is not None and not _is_like(first_of(outputs).detach(), known):
                    return False
                pairs = [
                    (t, g.to(t.dtype).view_as(t))
                    for t, (node, number) in zip(outputs, self.ends, strict=True)
                    if (g := self.gradients.get(node, [None] * (number + 1))[number]) is not None
                ]
                walk(outputs)
                if pairs:
                    outputs, gradients = map(list, zip(*pairs, strict=True))
                    moving = [p for p in parameters if p.requires_grad]
                    torch.autograd.grad(outputs, moving, gradients, allow_unused=True)
        except Exception:
            return False
        return True


def numbered(outputs: Sequence[Tensor]) -> dict[Any, int]:
    """A number for each node whose outputs they are."""
    numbers: dict[Any, int] = {}
    for t in outputs:
        numbers.setdefault(t.grad_fn, len(numbers))
    return numbers


def _is_like(made: Tensor, known: Tensor) -> bool:
    """Whether an output came again."""
    apart, size = torch.linalg.vector_norm(made - known), torch.linalg.vector_norm(known)
    return bool(apart <= _ALIKE * size)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Nothing is compiled in here; before torch 2.6, what is compiled inside of the module stays so."""
    stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if stance is None else stance("force_eager")


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Running statistics, what a forward sets anew of its modules, and random numbers as they were."""
    held = [(vars(m), dict(vars(m)), m._buffers, dict(m._buffers)) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for attributes, mine, own, before in held:
            for now, was in ((attributes, mine), (own, before)):
                if any(now.get(name, now) is not value for name, value in was.items()) or len(now) > len(was):
                    now.clear()
                    now.update(was)
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
