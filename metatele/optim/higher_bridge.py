"""Checkpoints inside ``higher.innerloop_ctx``: import this module, and ``higher`` knows them.

Example:
    >>> import higher  # doctest: +SKIP
    >>> import metatele.optim.higher_bridge  # doctest: +SKIP
    >>> optimizer = metatele.LearnedOptimizer(model, "checkpoints/update-tele")  # doctest: +SKIP
    >>> with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):  # doctest: +SKIP
    ...     diffopt.step(loss(fmodel))
"""

from __future__ import annotations

from typing import Any

import torch

from metatele.errors import MetateleError
from metatele.extras import require_modules
from metatele.learned import MetaOptimizer
from metatele.network.capture import Capture
from metatele.network.sequential import read_sequential
from metatele.network.wanted import NOTHING, Wanted
from metatele.optim.flat import states_of
from metatele.optim.learned import LearnedOptimizer

require_modules("the bridge to higher", "higher")
import higher  # noqa: E402
from higher.optim import DifferentiableOptimizer  # noqa: E402


class DifferentiableLearnedOptimizer(DifferentiableOptimizer):
    """``LearnedOptimizer`` with a history: the new parameters depend on the meta-parameters.

    As in the package's own unroll, the gradient is a constant input and no teleport is rolled back.
    Every parameter of the model must receive a gradient.
    """

    def __init__(self, other: LearnedOptimizer, reference_params: Any, fmodel: Any = None, **settings: Any) -> None:
        if fmodel is None:
            raise MetateleError("LearnedOptimizer needs the patched model: use higher.innerloop_ctx")
        if not isinstance(other.meta, MetaOptimizer):
            raise MetateleError("higher is supported for checkpoints of the flat family")
        super().__init__(other, reference_params, fmodel=fmodel, **settings)
        self._meta = other.meta
        self._states = states_of(other.state, other.param_groups[0], other.meta)
        linears, mlp = read_sequential(other.model)
        self._size = mlp.num_parameters
        paths = {module: path for path, module in other.model.named_modules()}
        patched = dict(fmodel.named_modules())
        self._capture = Capture([patched[paths[linear]] for linear in linears], accumulated=False)
        self._capture.wanted = NOTHING if self._meta.teleport is None else Wanted(data=True)
        self._capture.attach(self)

    def step(self, loss: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        """As higher's; only the passes that this loss came from are teleported on."""
        self._capture.clear()  # a backward pass of the meta-loss went through earlier steps
        return super().step(loss, *arguments, **settings)

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        slots = sorted(
            (index, g, i) for g, indices in enumerate(self._group_to_param_list) for i, index in enumerate(indices)
        )
        parameters = [self.param_groups[g]["params"][i] for _, g, i in slots]
        gradients = [grouped_grads[g][i] for _, g, i in slots]
        if any(gradient is None for gradient in gradients) or sum(p.numel() for p in parameters) != self._size:
            raise MetateleError("every parameter of the model must be the optimizer's and receive a gradient")
        dtype = next(self._meta.parameters()).dtype
        inputs = None
        if self._meta.teleport is not None and all(float(group["lr"]) != 0 for group in self.param_groups):
            inputs = self._capture.inputs(dtype)
            if inputs is None:
                raise MetateleError("a teleport needs the layer inputs, and the loss did not come from the model")
        scale = torch.cat(
            [
                torch.as_tensor(self.param_groups[g]["lr"], dtype=dtype).expand(p.numel())
                for p, (_, g, _) in zip(parameters, slots, strict=True)
            ]
        )
        done = self._meta.step(
            torch.cat([p.flatten() for p in parameters])[None].to(dtype),
            torch.cat([gradient.detach().flatten() for gradient in gradients])[None].to(dtype),
            self._states,
            None if inputs is None else inputs[None],
            local_scale=scale.to(parameters[0].device),
        )
        self._states = done.states
        for (_, g, i), part, p in zip(
            slots, done.weights[0].split([p.numel() for p in parameters]), parameters, strict=True
        ):
            self.param_groups[g]["params"][i] = part.view_as(p).to(p.dtype)


higher.register_optim(LearnedOptimizer, DifferentiableLearnedOptimizer)
