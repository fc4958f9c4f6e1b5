"""Random streams: every draw is named by a seed, a stream and an index, on every machine alike.

Because a trajectory's data depend on nothing else, a run can resume, be split over processes or
move to another device without changing what it trains on, and streams never overlap.
"""

from __future__ import annotations

import hashlib

import torch

STREAMS = ("train", "validation", "evaluation", "tuning", "initialisation", "exploration")


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator for draw ``index`` of a stream.

    Args:
        seed: The user's seed.
        stream: One of :data:`STREAMS`.
        index: Number of the draw, for instance of the trajectory.

    Returns:
        A new generator, at its beginning.

    Raises:
        ValueError: There is no such stream.

    Example:
        >>> a = torch.rand(3, generator=generator(0, "train", 5))
        >>> b = torch.rand(3, generator=generator(0, "train", 5))
        >>> c = torch.rand(3, generator=generator(0, "evaluation", 5))
        >>> bool((a == b).all()), bool((a == c).any())
        (True, False)
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    digest = hashlib.sha256(f"metatele/{stream}/{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
