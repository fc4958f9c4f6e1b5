"""Levenberg-Marquardt for least squares on small networks: what a numerical analyst would use on one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

# Numbers in a Jacobian, up to which a step takes well below a second.
LARGEST = 8_000_000


class LevenbergMarquardt:
    r"""Damped Gauss-Newton, with the damping by how well the model of the loss foretells its fall.

    .. math::
        δ = -(JᵀJ + λI)^{-1} Jᵀr, \qquad
        ϱ = \frac{‖r‖² - ‖r(w + δ)‖²}{-(2 Jᵀr + JᵀJ δ)·δ}

    for residuals r with Jacobian J. With ϱ > 0 the step is made and λ falls by up to a third,
    ``λ ← λ max(1/3, 1 - (2ϱ - 1)³)``; else it is not made, and λ grows by 2, 4, 8, … (Nielsen 1999). A step that is not
    made counts as one. JᵀJ or JJᵀ is factored, whichever is smaller, in the parameters' precision.

    Args:
        model: Its parameters are changed in place.
        inputs: ``[n, d]``.
        targets: ``[n, o]``.
        damping: First λ, as a share of the largest diagonal entry of JᵀJ.

    Raises:
        ValueError: The Jacobian would have more than ``LARGEST`` numbers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> line, x = nn.Linear(2, 1).double(), torch.randn(9, 2, dtype=torch.float64)
        >>> solver = LevenbergMarquardt(line, x, x.sum(1, keepdim=True))
        >>> [solver.step() for _ in range(20)][-1] < 1e-12
        True
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, damping: float = 1e-3) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        numbers = targets.numel() * sum(p.numel() for p in self.parameters.values())
        if numbers > LARGEST:
            raise ValueError(f"the Jacobian would have {numbers} numbers, more than {LARGEST}")
        self.residuals = self._residuals(self.parameters)
        self.damping, self.share, self.growth = -1.0, damping, 2.0
        self._jacobian: Tensor | None = None

    def _outputs(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(self.model, parameters, (x[None],))[0]
        return found

    def _residuals(self, parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(self.model, parameters, (self.inputs,)) - self.targets
        return found.flatten()

    def _differentiated(self) -> Tensor:
        each: Callable[..., dict[str, Tensor]] = vmap(jacrev(self._outputs), in_dims=(None, 0))
        parts = each(self.parameters, self.inputs)
        return torch.cat([part.flatten(0, 1).flatten(1) for part in parts.values()], 1)

    @torch.no_grad()
    def step(self) -> float:
        """Try a step; the sum of squared residuals after it."""
        if self._jacobian is None:
            self._jacobian = self._differentiated()
        J, r = self._jacobian, self.residuals
        if self.damping < 0:
            self.damping = self.share * float(J.square().sum(0).max())
        change, before = self._change(J, r), r.square().sum()
        parts = change.split([p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        tried = {name: p + part.view_as(p) for (name, p), part in pairs}
        there = self._residuals(tried)
        foretold = before - (r + J @ change).square().sum()
        ratio = float((before - there.square().sum()) / foretold) if float(foretold) > 0 else -1.0
        if ratio > 0:
            for name, p in self.parameters.items():
                p.copy_(tried[name])
            self.residuals, self._jacobian = there, None
            self.damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
            self.growth = 2.0
        else:
            self.damping, self.growth = self.damping * self.growth, 2 * self.growth
        return float(self.residuals.square().sum())

    def _change(self, J: Tensor, r: Tensor) -> Tensor:
        rows, columns = J.shape
        tall = rows >= columns
        gram = J.T @ J if tall else J @ J.T
        gram.diagonal().add_(self.damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):  # by rounding, where the damping is too small for this precision
            return torch.full((columns,), float("nan"), dtype=J.dtype, device=J.device)
        if tall:
            return -torch.cholesky_solve((J.T @ r)[:, None], factor)[:, 0]
        return -J.T @ torch.cholesky_solve(r[:, None], factor)[:, 0]
