"""Section 3 by computation: what is proved there is measured, and set beside what was proved.

Theorem 3.1: SGD with and without the optimal teleport before each step, with step 1/(β√(T-1)), on quadratics
with noisy gradients. Its assumptions hold exactly: every sample's loss is a quadratic of its own with no
eigenvalue above β; a sample's gradient is an unbiased one of L, in batches of one, drawn anew for each step; what
the group keeps, and what is teleported, is the expected loss L; every sample's least value is 0, so that the
noise at the optimum is σ² = L*; the group is compact, so that the maximum is attained, in closed form.
Prop. 3.2: the angle between gradient and Newton's direction, and one step after a teleport, on ellipsoids and on
a logistic regression whose μ, L and G are known. Prop. 3.4 to 3.6: [A, R]L along the gradient flow after one
teleport. ``--seeds`` are the runs of SGD, ``--steps`` the longest. Half a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from metatele.errors import ConfigError
from metatele.experiments import images as common
from metatele.experiments.theory.measurements import Extent, flows, newton, theorem
from metatele.experiments.theory.report import figure, note, table

__all__ = ["Extent", "main", "run"]

EXTENT = Extent()


def run(runs: int, longest: int, extent: Extent = EXTENT) -> dict[str, Any]:
    """The content of ``results.json``; an arm is one number's worth of circumstances.

    Args:
        runs: Of SGD, at least 20.
        longest: Most steps of a run.
        extent: How much else is measured.

    Raises:
        ConfigError: There are too few runs.
    """
    if runs < 20:
        raise ConfigError(f"--seeds must be at least 20 for an expectation to be measured, got {runs}")
    parts: tuple[tuple[str, Callable[[], list[dict[str, Any]]]], ...] = (
        ("theorem", lambda: theorem(runs, longest)),
        ("newton", lambda: newton(extent)),
        ("flow", lambda: flows(extent)),
    )
    arms, seconds = [], {}
    for part, made in parts:
        begin_s = time.perf_counter()
        arms += made()
        seconds[part] = time.perf_counter() - begin_s
    return {
        "format": common.FORMAT,
        "experiment": "theory",
        "runs": runs,
        "steps": longest,
        "seconds": seconds,
        "arms": arms,
    }


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    parser = common.small_parser("theory", __doc__, 2000, 1000)
    common.small_main(arguments, parser, lambda args: run(args.seeds, args.steps), table, figure, "theory.png", note)
