"""Figure 11: the experiment of Figure 4 with AdaGrad, whose state is kept over the teleport.

Rate 1e-2: the paper gives none. Everything else as in Figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from metatele.experiments import fig4


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    fig4.main(arguments, "fig11", __doc__)
