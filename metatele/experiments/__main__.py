"""Runs an experiment by name; each module here has a ``main`` that takes the command line's rest."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from metatele.command_line import OneLineParser, run_program
from metatele.errors import ConfigError
from metatele.extras import require_modules

_HERE = "python -m metatele.experiments"
EXPERIMENTS = {
    "fig4": "one teleport that raises or lowers sharpness or curvature: what it does to generalisation, SGD",
    "fig5": "four optimizers on images, with and without teleportation, against epochs",
    "fig6": "held-out loss of the three meta-optimizers beside tuned standard optimizers",
    "fig7": "expected displacement of a shifted minimum against its curvature",
    "fig11": "the same as fig4 with AdaGrad",
    "table1": "sharpness, curvature and validation loss of 100 networks, with figures 9 and 10",
    "fig12": "momentum over a teleport, and objectives for AdaGrad, on a small regression",
    "fig13": "the runs of fig5 against time",
    "functions": "gradient descent on three functions of the plane, with and without teleport",
    "transfer": "one learned optimizer on shapes and data mostly new to it, beside others tuned on each",
    "theory": "the theorem and propositions of section 3, by computation",
    "optimizers-beyond": "eight optimizers and six ways to teleport, every learning rate tuned alike",
}
# What an experiment imports besides matplotlib before it is done; digits ask for scikit-learn when they are read.
_NEEDS = {
    "fig4": ("tqdm",),
    "fig5": ("tqdm",),
    "fig6": ("tqdm", "tensorboard"),
    "fig7": ("scipy",),
    "fig11": ("tqdm",),
    "fig13": ("tqdm",),
    "transfer": ("tqdm", "tensorboard", "sklearn"),
    "theory": ("scipy",),
    "optimizers-beyond": ("tqdm",),
}


def main(arguments: Sequence[str]) -> None:
    """Dispatch on the first argument."""
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:18} {what}" for name, what in EXPERIMENTS.items())
        print(f"usage: {OneLineParser.called or _HERE} NAME [flags]; NAME --help for its flags\n\n{listed}")
        return
    name, flags = arguments[0], arguments[1:]
    if name not in EXPERIMENTS:
        raise ConfigError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if not {"-h", "--help"}.intersection(flags):
        require_modules(f"the experiment {name}", "matplotlib", *_NEEDS.get(name, ()))
    importlib.import_module(f"metatele.experiments.{name.replace('-', '_')}").main(flags)


if __name__ == "__main__":
    run_program(main, _HERE)
