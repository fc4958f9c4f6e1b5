"""The distribution of inner problems on modules: which data, which network, which way of training."""

from __future__ import annotations

import math

from torch import nn

from metatele.config import ModulesConfig
from metatele.errors import ConfigError
from metatele.random import generator
from metatele.tasks.modules.data import Source
from metatele.tasks.modules.draws import Draws
from metatele.tasks.modules.kinds import KIND_OF
from metatele.tasks.modules.networks import Network, built, drawn_network, patch_side
from metatele.tasks.modules.problem import Problem

# Time of a training step with Adam on one core, fitted to a few hundred problems: a fixed part, a part for each module
# and each parameter, a step of a recurrent layer, and floating-point operations per ms.
_FIXED_MS, _MODULE_MS, _PARAMETER_MS, _RECURRENT_MS, _PER_MS = 0.3, 0.09, 0.015, 0.1, 1.5e7


class Modules:
    """Problems as people have them, on modules of any kind.

    Each is named by a seed, a stream and an index, and is the same wherever it is drawn.

    Args:
        config: How they are distributed.

    Raises:
        ConfigError: There is no kind of a name among its kinds.

    Example:
        >>> modules = Modules(ModulesConfig())
        >>> modules.sample(0, "train", 3) == modules.sample(0, "train", 3)
        True
    """

    def __init__(self, config: ModulesConfig) -> None:
        if not set(config.kinds) <= set(KIND_OF):
            raise ConfigError(f"kinds must be among {', '.join(KIND_OF)}, got {config.kinds}")
        self.config = config

    def sample(self, seed: int, stream: str, index: int) -> Problem:
        """Problem number ``index`` of a stream; its data are made when asked for."""
        c, draws = self.config, Draws(generator(seed, stream, index))
        name = draws.choice(c.kinds)
        kind = KIND_OF[name]
        source = kind.draw(draws)
        network = drawn_network(draws, kind.networks, c.broadest, c.deepest)
        most = min(kind.most, c.most_samples)
        samples = draws.whole(min(max(kind.fewest, c.fewest_samples), most), most)
        batch = min(samples, draws.whole(4, 256))
        if whole := draws.chance(c.whole_share):
            samples = batch = min(samples, 512)
        elif draws.chance(min(1.0, 3.5 * c.fresh_share) if kind.networks == "language" else c.fresh_share):
            samples = 0
        passes = draws.choice((1,) * 24 + (2,))
        wanted, smaller = draws.whole(c.shortest, c.longest), draws.chance(0.5)
        step_ms = passes * estimated_step_ms(network, source, batch)
        # What takes too long has smaller batches: always if it had no time for the shortest run, else half of the time.
        least = c.fewest_samples if whole else 4
        while batch > least and step_ms * (wanted if smaller else c.shortest) > c.budget_ms:
            batch = max(least, batch // 2)
            samples = batch if whole else samples
            step_ms = passes * estimated_step_ms(network, source, batch)
        trained = draws.whole(30, 150) if draws.chance(c.trained_share) else 0
        trained = min(trained, int(c.budget_ms / step_ms) // 2)
        horizon = max(c.shortest, min(wanted, int(c.budget_ms / step_ms) - trained))
        change, change_at = self._change(draws, source, horizon, trained)
        if samples and batch < samples:  # what is never seen need not be made
            samples = max(batch + 1, min(samples, (horizon + trained) * batch * passes))
        return Problem(
            *(name, source, network, horizon, samples, batch, passes),
            known=draws.chance(0.5),
            change=change,
            change_at=change_at,
            trained=trained,
            clip=draws.choice((0.0,) * 9 + (1.0,)),
            # Passes of attention are dear, and of a language every position is judged.
            held_out_samples=c.held_out_samples // (2 if kind.networks in ("language", "patches") else 1),
            cost_ms=(horizon + trained) * step_ms,
            seed=draws.seed() // 2,
        )

    def _change(self, draws: Draws, source: Source, horizon: int, trained: int) -> tuple[str, int]:
        at = int(horizon * draws.uniform(0.2, 0.7))
        happens, which = draws.chance(self.config.event_share), draws.choice(("freed", "inputs", "targets", "classes"))
        if trained:  # to be trained on further, or on something else
            happens, at = draws.chance(0.6), 0
            which = draws.choice(("inputs", "targets"))
        if not happens:
            return "none", 0
        by_class = source.loss == "ce" and not source.positions and source.outputs >= 4
        if which == "classes" and not (by_class and not source.tokens):
            which = "targets"
        return which, at


def estimated_step_ms(network: Network, source: Source, batch: int) -> float:
    """About how long a training step with Adam takes on one core, in ms."""
    model = built(network, source)
    modules = sum(1 for m in model.modules() if not isinstance(m, nn.Sequential))
    positions = source.shape[0] if network.kind in ("attention", "convolution", "gru", "lstm", "rnn", "mean") else 1
    if len(source.shape) == 3:
        positions = source.shape[1] * source.shape[2] if network.kind == "convolution" else 1
        positions = (source.shape[1] // patch_side(source.shape[1])) ** 2 if network.kind == "patches" else positions
    operations = 6.0 * batch * positions * sum(math.prod(p.shape) for p in model.parameters())
    recurrent = network.kind in ("gru", "lstm", "rnn") and len(source.shape) < 3
    steps = source.shape[0] * network.depth if recurrent else 0
    parameters = sum(1 for _ in model.parameters())
    fixed = _FIXED_MS + _MODULE_MS * modules + _PARAMETER_MS * parameters + _RECURRENT_MS * steps
    return fixed + operations / _PER_MS
