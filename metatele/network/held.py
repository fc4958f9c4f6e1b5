"""How a model holds its parameters: as they are, or split over processes by ``fully_shard`` (FSDP2).

Of split parameters each process has a **whole** twin: a step gathers weights and gradients into the twins, moves these
in every process alike, and writes each process's share back. Graphs of passes know the parameters that ``fully_shard``
gathers for them; those point to their twins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.parts import Part, Vector
from metatele.network.views import WHOLE

Memory = MutableMapping[Any, dict[str, Any]]


class Plain:
    """Parameters that are held as they are."""

    split = False

    def group(self) -> ranks.Group | None:
        """Of the processes whose passes are one batch."""
        return ranks.active_group()

    def whole(self, p: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter of the model in steps."""
        return p

    def leaf(self, p: nn.Parameter) -> nn.Parameter | None:
        """What a pass uses of that; ``None`` where there was no pass yet."""
        return p

    def graded(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether a gradient came and was not cleared since."""
        return any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What stands for each parameter, by name."""
        return dict(model.named_parameters())

    def pieces(self, parts: Sequence[Part], vectors: Sequence[Vector]) -> tuple[list[Part], list[Vector]]:
        """The same of what stands for their parameters."""
        return list(parts), list(vectors)

    def memory(self, memory: Memory) -> Memory:
        """An optimizer's memory by what stands for its parameters."""
        return memory

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        """In here, what stands for parameters has their values and gradients; what is changed counts afterwards."""
        return contextlib.nullcontext()


class Sharded(Plain):
    """Parameters that ``fully_shard`` has split.

    Args:
        model: All of whose parameters it has, over one dimension of processes.
        owners: What holds each, by the ``id`` of the parameter.
    """

    split = True

    def __init__(self, model: nn.Module, owners: Mapping[int, Any]) -> None:
        self._names = dict(model.named_parameters())
        self._owners: dict[int, Any] = {}
        self._twins: dict[int, nn.Parameter] = {}
        self._own: dict[int, nn.Parameter] = {}  # the other way
        for p in self._names.values():
            twin = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device), requires_grad=p.requires_grad)
            self._twins[id(p)], self._own[id(twin)], self._owners[id(twin)] = twin, p, owners[id(p)]

    def group(self) -> ranks.Group | None:
        """See the base class."""
        mesh: Any = next(iter(self._names.values())).device_mesh  # type: ignore[attr-defined]
        return mesh.get_group() if mesh.size() > 1 else None

    def whole(self, p: nn.Parameter) -> nn.Parameter:
        """See the base class."""
        return self._twins.get(id(p), p)

    def leaf(self, p: nn.Parameter) -> nn.Parameter | None:
        """See the base class."""
        found: nn.Parameter | None = getattr(self._owners[id(p)], "_unsharded_param", None)
        if found is not None:
            setattr(found, WHOLE, p)
        return found

    def graded(self, parameters: Iterable[nn.Parameter]) -> bool:
        """See the base class; the same in all processes, so it does not matter whether one is zero."""
        return any(
            self._own[id(p)].grad is not None
            or getattr(self._owners[id(p)], "unsharded_accumulated_grad", None) is not None
            or ((u := self.leaf(p)) is not None and u.grad is not None)
            for p in parameters
        )

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See the base class."""
        return {name: self.whole(p) for name, p in self._names.items()}

    def pieces(self, parts: Sequence[Part], vectors: Sequence[Vector]) -> tuple[list[Part], list[Vector]]:
        """See the base class."""
        found = [
            replace(part, weight=self.whole(part.weight), bias=None if part.bias is None else self.whole(part.bias))
            for part in parts
        ]
        return found, [(name, self.whole(p)) for name, p in vectors]

    def memory(self, memory: Memory) -> Memory:
        """See the base class."""
        return _ByWhole(memory, self._own)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """See the base class. All processes have to come here."""
        for p in self._names.values():
            twin, grad = self.whole(p), p.grad
            twin.detach().copy_(p.full_tensor())  # type: ignore[attr-defined]
            twin.grad = None if grad is None else grad.full_tensor().to(twin.dtype)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for p in self._names.values():
                twin = self.whole(p)
                twin.grad = None
                _share(p).copy_(_cut(twin.detach(), p))


def _share(p: Any) -> Tensor:
    local: Tensor = p.to_local().detach()
    return local


def _cut(whole: Tensor, p: Any) -> Tensor:
    """This process's share of a tensor like a parameter."""
    mesh, dim = p.device_mesh, p.placements[0].dim
    shares = whole.chunk(mesh.size(), dim)
    number = mesh.get_local_rank()
    return shares[number] if number < len(shares) else whole.narrow(dim, 0, 0)


class _ByWhole(MutableMapping[Any, dict[str, Any]]):
    """A memory by twins, of one by parameters."""

    def __init__(self, memory: Memory, own: Mapping[int, nn.Parameter]) -> None:
        self._memory, self._own = memory, own

    def _key(self, key: Any) -> Any:
        return self._own.get(id(key), key)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self._memory[self._key(key)]

    def __setitem__(self, key: Any, value: dict[str, Any]) -> None:
        self._memory[self._key(key)] = value

    def __delitem__(self, key: Any) -> None:
        del self._memory[self._key(key)]

    def __contains__(self, key: object) -> bool:
        return self._key(key) in self._memory

    def __iter__(self) -> Iterator[Any]:
        return iter(self._memory)

    def __len__(self) -> int:
        return len(self._memory)


def held_by(model: nn.Module, what: str) -> Plain:
    """How a model holds its parameters.

    Args:
        model: Without wrappers.
        what: Who asks.

    Raises:
        UnsupportedModelError: They are split in another way than by ``fully_shard`` over one dimension of processes,
            or only some are.

    Example:
        >>> held_by(nn.Linear(3, 2), "it").split
        False
    """
    modules: list[Any] = list(model.modules())
    groups = [
        group
        for module in modules
        if hasattr(module, "_get_fsdp_state")
        for state in [module._get_fsdp_state()]
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    ]
    owners = {id(one.sharded_param): one for group in groups for one in getattr(group, "fsdp_params", ())}
    parameters = list(model.parameters())
    if not owners or any(
        id(p) not in owners or p.device_mesh.ndim != 1  # type: ignore[attr-defined]
        for p in parameters
    ):
        ranks.refuse_sharded(parameters, what)
        return Plain()
    return Sharded(model, owners)
