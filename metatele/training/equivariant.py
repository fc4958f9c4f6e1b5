"""Meta-training of the equivariant family, over a distribution of problems of every shape."""

from __future__ import annotations

import torch

from metatele.config import EquivariantRunConfig
from metatele.learned import EquivariantOptimizer
from metatele.tasks import Mixture
from metatele.training.groups import GroupTrainer
from metatele.training.processes import Processes


class EquivariantTrainer(GroupTrainer):
    """Meta-training of the equivariant family: its controller looks at every step, so that each one is learned from.

    Args:
        config: What to train and how.
        device: Where.
        processes: Those that share the batch; this one alone if not given.

    Example:
        >>> from metatele.config import transfer
        >>> trainer = EquivariantTrainer(transfer(trajectories=4, batch=2, groups=2, horizon=4, shorter=(), unroll=2))
        >>> metrics = trainer.step()
        >>> trainer.update, trainer.config.training.updates
        (1, 4)
    """

    def __init__(
        self, config: EquivariantRunConfig, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        optimizer = EquivariantOptimizer(config.method, config.seed)
        super().__init__(config, optimizer, Mixture(config.task), device, processes, pauses=False)
