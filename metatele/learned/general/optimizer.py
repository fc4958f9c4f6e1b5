r"""A learned optimizer for any module.

Every matrix W of a network, its bias as last column, is stepped along a direction D (:mod:`.direction`) by

.. math::
    W ← W - η\, s\, ρ^p\, (‖W‖ D/‖D‖ + w W)

One η for the whole network follows the slope along the last step: with ``q = ⟨G_t, W_t - W_{t-1}⟩`` and
``z = avg(q)/√avg(q²)``, ``log η ← log η + k (τ - z)`` up to a longest step. ρ is the running gradient's norm over the
usual norm of gradients, so steps shrink where gradients do. Vectors are stepped as Adam does, by the same η.

What stands in these formulas beside the gradient (s, p, w, λ, r, τ, k, the longest step) is set by a small function,
the same for every matrix, of what is seen at looks (:mod:`.controller`): the agreement of the gradients of half
batches, the feedback, samples that come again, sizes, places. Its few hundred numbers are what meta-training changes.

Where the batch is the same again and again there is no noise, and the matrices are stepped as the equivariant family
does (:mod:`metatele.learned.equivariant`), whose controller is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metatele.config import EquivariantConfig, GeneralConfig
from metatele.learned.equivariant.observation import Observation
from metatele.learned.equivariant.opening import Opening
from metatele.learned.equivariant.optimizer import EquivariantOptimizer
from metatele.learned.equivariant.states import EquivariantStates
from metatele.learned.equivariant.step import EquivariantStep
from metatele.learned.general.controller import SEEN, SET, Controller
from metatele.perceptron.mlp import MLP, Pass


class GeneralOptimizer(nn.Module):
    """See the module; works on every ``nn.Module``.

    Args:
        config: Sizes, constants of the algorithm, and what the controller does not see.
        seed: For the initial meta-parameters.

    Attributes:
        controller: What meta-training changes.
        repeated: What steps on a batch that comes again and again; its weights are those of the equivariant family.

    Example:
        >>> optimizer = GeneralOptimizer(GeneralConfig(hidden=8))
        >>> optimizer.config.title
        'General'
    """

    def __init__(self, config: GeneralConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.controller = Controller(config.hidden, config.blind, seed)
        self.repeated = EquivariantOptimizer(EquivariantConfig(), seed)

    @property
    def opening(self) -> Opening:
        """The teleport before the first of :meth:`step`."""
        return self.repeated.opening

    def opens(self, mlp: MLP) -> bool:
        """Whether that is made on such a network."""
        return self.repeated.opens(mlp)

    def observed(self, done: Pass) -> Observation:
        """What :meth:`step` is given of a pass."""
        return self.repeated.observed(done)

    def step(
        self, seen: Observation, states: EquivariantStates | None, pauses: bool = True, spend: bool = False
    ) -> EquivariantStep:
        """A step of batched perceptrons on one batch, as :meth:`EquivariantOptimizer.step`: that of ``repeated``."""
        return self.repeated.step(seen, states, pauses, spend)

    def evolved(self) -> list[nn.Parameter]:
        """The parameters that meta-training changes: the controller's."""
        return list(self.controller.parameters())

    def explored(self) -> int:
        """Numbers that meta-training disturbs: one for each setting of the controller."""
        return len(SET)

    def lifted(self, asked: Tensor, seen: Tensor) -> Tensor:
        """A change of :meth:`evolved`, flat, that asks for more of each setting where such numbers are seen.

        Args:
            asked: Of the settings ``[..., settings]``.
            seen: Numbers ``[..., numbers]``; without any, ``[..., 0]``, the offsets alone change.

        Returns:
            ``[..., parameters]``; the outer product for what is linear, and zeros for a hidden layer.
        """
        c = self.controller
        if not seen.shape[-1]:
            seen = asked.new_zeros(*asked.shape[:-1], len(SEEN))
        known = {id(c.direct): asked[..., :, None] * seen[..., None, :], id(c.offset): asked}
        many = asked.shape[:-1]
        parts = [known.get(id(p), asked.new_zeros(*many, *p.shape)).reshape(*many, -1) for p in self.evolved()]
        return torch.cat(parts, -1)

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """Within, what the controller sees is noted."""
        found: list[Tensor] = []
        self.controller.noted = found
        try:
            yield found
        finally:
            self.controller.noted = None
