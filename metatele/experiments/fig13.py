"""Figure 13: the runs of Figure 5 against wall-clock time, both splits: is a teleport worth its time?"""

from __future__ import annotations

from collections.abc import Sequence

from metatele.experiments import fig5


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    fig5.main(arguments, "fig13", __doc__)
