"""Kinds of inner problems: what data each draws, and which networks read them. A new kind is one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metatele.config import KINDS
from metatele.errors import ConfigError
from metatele.tasks.modules.data import Source
from metatele.tasks.modules.draws import Draws
from metatele.tasks.modules.images import drawn_images, drawn_prototypes
from metatele.tasks.modules.sequences import drawn_language, drawn_signals, drawn_tokens
from metatele.tasks.modules.tables import drawn_table


@dataclass(frozen=True)
class Kind:
    """A kind of inner problem.

    Attributes:
        draw: Gives data for a problem; all that is random comes from what it is given.
        networks: Kind whose networks read them, one of :data:`~metatele.config.KINDS`: ``"regression"`` and
            ``"classification"`` are read by perceptrons, ``"images"`` by convolutions mostly, ``"tokens"`` and
            ``"signals"`` by readers of sequences, ``"language"`` by small GPTs and ``"patches"`` by small ViTs.
        fewest: Training samples, at least.
        most: Training samples, at most.

    Example:
        >>> import torch
        >>> table = KIND_OF["regression"].draw(Draws(torch.Generator().manual_seed(0)))
        >>> type(table).__name__, len(table.shape)
        ('Table', 1)
    """

    draw: Callable[[Draws], Source]
    networks: str
    fewest: int = 0
    most: int = 10**9


def _patches(draws: Draws) -> Source:
    return (
        drawn_prototypes(draws) if draws.chance(0.7) else drawn_images(draws, "patches")
    )  # what a short run can learn


KIND_OF: dict[str, Kind] = {
    "regression": Kind(lambda draws: drawn_table(draws, "regression"), "regression"),
    "classification": Kind(lambda draws: drawn_table(draws, "classification"), "classification"),
    "images": Kind(lambda draws: drawn_images(draws, "images"), "images", most=4000),
    "tokens": Kind(drawn_tokens, "tokens"),
    "signals": Kind(drawn_signals, "signals"),
    "autoencoder": Kind(lambda draws: drawn_images(draws, "autoencoder"), "autoencoder"),
    "prototypes": Kind(drawn_prototypes, "prototypes", 1000, 2000),
    "language": Kind(drawn_language, "language"),
    "patches": Kind(_patches, "patches", most=4000),
}


def register_kind(name: str, draw: Callable[[Draws], Source], networks: str = "regression", **samples: int) -> None:
    """Make a further kind of inner problem known; ``ModulesConfig(kinds=(name,))`` draws it from then on.

    Workers of a meta-training are new processes that import the program's main file again. Call this where that file,
    or what it imports, is read, not under ``if __name__ == "__main__"``.

    Args:
        name: Not taken yet.
        draw: See :class:`Kind`.
        networks: See :class:`Kind`.
        **samples: ``fewest`` and ``most`` training samples.

    Raises:
        ConfigError: The name is taken, or there are no such networks.

    Example:
        >>> register_kind("images", drawn_tokens)
        Traceback (most recent call last):
        metatele.errors.ConfigError: there is a kind 'images' already
    """
    if networks not in KINDS:
        raise ConfigError(f"networks must be one of {', '.join(KINDS)}, got {networks!r}")
    if name in KIND_OF:
        raise ConfigError(f"there is a kind {name!r} already")
    KIND_OF[name] = Kind(draw, networks, **samples)
