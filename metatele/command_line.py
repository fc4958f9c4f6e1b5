"""Shared by the command-line programs: one clear line for every user error. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from metatele.errors import ConfigError, MetateleError, MissingExtraError, NotExactError, RunFolderError
from metatele.extras import EXTRAS, missing_message

USAGE_ERROR = 2  # exit code for a wrong flag or value
FAILURE = 1  # exit code for what went wrong later


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which has the name that its program was called by.

    Args:
        prog: Name of the program if nobody called it otherwise; :func:`run_program` puts another first word.
        settings: As of :class:`argparse.ArgumentParser`.
    """

    called: str | None = None

    def __init__(self, prog: str, **settings: Any) -> None:
        if self.called:
            prog = " ".join([self.called, *prog.split()[1:]])
        super().__init__(prog, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the message alone and leave with code 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def flag(name: str) -> str:
    """Command-line spelling of a configuration field."""
    return "--" + name.replace("_", "-")


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


def _boolean_or_auto(text: str) -> bool | None:
    if text.lower() == "auto":
        return None
    try:
        return _boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected true, false or auto, got {text!r}") from None


def _integers(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, or none, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


# Type of a field to what converts its text, and what the help calls it.
_CONVERTERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (_boolean, "BOOL"),
    bool | None: (_boolean_or_auto, "BOOL"),
    int: (int, "N"),
    float: (float, "X"),
    str: (str, "TEXT"),
    tuple[str, ...]: (_words, "TEXT,TEXT,..."),
    tuple[int, ...]: (_integers, "N,N,..."),
}


def add_config_flags(parser: argparse.ArgumentParser, *classes: type[Any], default: str = "paper") -> None:
    """One flag for every field of the given configuration classes; unset flags stay absent.

    That of a boolean may stand alone, for true.

    Args:
        parser: Gets the flags.
        classes: The earlier one has the help of a field that two have.
        default: What a field's default is called.
    """
    for cls in classes:
        group = parser.add_argument_group(cls.__name__, (cls.__doc__ or "").strip().splitlines()[0])
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if flag(f.name) in parser._option_string_actions:  # another family's setting of this name
                continue
            convert, called = _CONVERTERS[hints[f.name]]
            choices = f.metadata.get("choices") or None
            value = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            value = "none" if value == "" else "auto" if value is None else value
            either = convert in (_boolean, _boolean_or_auto)
            alone: dict[str, Any] = {"nargs": "?", "const": True} if either else {}
            group.add_argument(
                flag(f.name),
                dest=f.name,
                **alone,
                type=convert,
                choices=choices,
                default=argparse.SUPPRESS,
                metavar=None if choices else called,
                help=f"{f.metadata['help']} ({default}: {value})",
            )


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Argument type: an integer of at least ``minimum`` and at most ``maximum``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"expected at most {maximum}, got {value}")
        return value

    return convert


def device_named(name: str) -> Any:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a torch device that is really there.

    Raises:
        ConfigError: It is not there, or not known.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", name):  # before torch is loaded
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def make_folder(path: Path) -> bool:
    """Make a folder for results before hours are spent on them; whether it is new.

    Raises:
        RunFolderError: It cannot be made, or written to.
    """
    if path.is_dir() and os.access(path, os.W_OK):
        return False
    try:
        path.mkdir(parents=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise RunFolderError(f"the folder {path} cannot be written: {reason}") from error
    return True


def _warning_line(others: Callable[..., None], program: str, message: Warning | str, *args: Any, **more: Any) -> None:
    """Ours in one line; those of other packages as ever."""
    if args and args[0] is UserWarning and "metatele" in str(args[1]):
        print(f"{program}: warning: {message}", file=sys.stderr)
    else:
        others(message, *args, **more)


def _without_failed_writes(others: Callable[..., object], failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer has a thread, whose errors reach the program too, with its next line or its close."""
    if not isinstance(failure.exc_value, OSError):
        others(failure)


def wait_passively() -> None:
    """Let threads that have nothing to do sleep, unless the environment says what they shall do.

    A thread that waits actively for its fellows burns the processor which they need: beside two busy processes
    training took twelve times as long as alone. The variables are read when torch is loaded, so call this before.
    """
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    if not any(name in os.environ for name in (*passive, "GOMP_SPINCOUNT")):
        os.environ.update(passive)


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """The flag ``--threads``, whose value :func:`chosen_threads` takes."""
    parser.add_argument(
        "--threads", type=whole_number(1, 1024), metavar="N", help="CPU threads (default: 1 if small, else torch's)"
    )


def chosen_threads(asked: int | None, small: bool) -> int | None:
    """How many threads torch shall be told to use.

    A second thread saves small work little time on an idle machine, and costs it some on a busy one.

    Args:
        asked: The user's ``--threads``.
        small: Whether the work is so small.

    Returns:
        The number; ``None`` leaves what torch would take by itself, or what the environment says.

    Example:
        >>> chosen_threads(3, small=True)
        3
    """
    if asked or any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return asked
    return 1 if small else None


def run_program(
    main: Callable[[Sequence[str]], None], program: str, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Call ``main`` with the command line; user errors and warnings become one line, errors an exit code.

    Args:
        main: Gets the arguments.
        program: What the user called; begins every message.
        arguments: Without them, those of the command line.
    """
    warnings.showwarning = partial(_warning_line, warnings.showwarning, program)
    threading.excepthook = partial(_without_failed_writes, threading.excepthook)
    OneLineParser.called = program
    wait_passively()

    def leave(code: int, message: object) -> NoReturn:
        print(f"{program}: {message}", file=sys.stderr)
        raise SystemExit(code) from None

    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except (ConfigError, NotExactError, MissingExtraError) as error:
        leave(USAGE_ERROR, f"error: {error}")
    except MetateleError as error:
        leave(FAILURE, f"error: {error}")
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        leave(USAGE_ERROR, f"error: {missing_message('this', module)}")
    except KeyboardInterrupt:
        leave(130, "interrupted; what was saved can be resumed")
    raise SystemExit(0)
