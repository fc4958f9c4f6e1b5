"""The command ``metatele``, and ``python -m metatele``: one door to the programs. Imports no torch by itself."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from metatele._version import __version__
from metatele.command_line import USAGE_ERROR, run_program

# Name to the module whose `main` takes the rest of the command line, and what it does.
COMMANDS = {
    "demo": ("metatele.cli.demo", "a small network trained three times, side by side, in seconds: begin here"),
    "train": ("metatele.cli.train", "meta-train an optimizer into a run folder"),
    "evaluate": ("metatele.cli.evaluate", "held-out curves of checkpoints beside tuned standard optimizers"),
    "experiments": ("metatele.experiments.__main__", "the figures and tables, by name"),
}


def _help(program: str) -> str:
    listed = "\n".join(f"  {name:12} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: {program} COMMAND ...; COMMAND --help for its flags\n\n{listed}\n\n  --version    of metatele"


def command(program: str = "metatele") -> NoReturn:
    """Run what the first argument of the command line names.

    Args:
        program: What the user called; begins every message.
    """
    first, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if first in ("-h", "--help"):
        print(_help(program))
        raise SystemExit(0)
    if first == "--version":
        print(f"metatele {__version__}")
        raise SystemExit(0)
    if first not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"{program}: error: command must be one of {known}, got {first!r}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)
    run_program(importlib.import_module(COMMANDS[first][0]).main, f"{program} {first}", rest)


if __name__ == "__main__":
    command("python -m metatele")
