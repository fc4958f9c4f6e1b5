"""Writing files so that a reader never sees half of one, and a failure leaves the old one."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from metatele.errors import SaveError


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replace a file's content in one step.

    Args:
        path: The file.
        content: All of it.
        previous: Where the earlier file is kept, in place of the one before it. Killed between two renames this
            leaves that one alone.

    Raises:
        SaveError: Out of space, or not writable; the file keeps its earlier content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            if previous is not None and not path.exists():
                previous.replace(path)
        with suppress(OSError):
            temporary.unlink()
        raise SaveError(f"could not write {path}: {error.strerror or error}; what was there is unchanged") from error


def replace_folder(path: Path, contents: dict[str, bytes]) -> None:
    """Replace a folder by one with the given files; the earlier one stays until the new one is complete.

    Killed between its two renames, this leaves the earlier folder under ``NAME.previous``, where
    :func:`existing_folder` finds it.

    Raises:
        SaveError: Out of space, not writable, or the folder holds files of another kind; it keeps its
            earlier content.
    """
    path = path.absolute()
    if path.is_file() or (path.is_dir() and any(p.name not in contents for p in path.iterdir())):
        names = " and ".join(contents)
        raise SaveError(f"{path} is not replaced, as it holds something other than {names}: move that away")
    fresh, previous = path.with_name(f".{path.name}.tmp"), path.with_name(f"{path.name}.previous")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for name, content in contents.items():
            write_atomically(fresh / name, content)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        fresh.rename(path)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not path.exists() and previous.exists():
            previous.rename(path)
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"could not write {path}: {error.strerror or error}; what was there is unchanged") from error
    shutil.rmtree(previous, ignore_errors=True)


def existing_folder(path: Path) -> Path:
    """``path``, or the complete earlier version an interrupted replacement left beside it."""
    path = path.absolute()
    previous = path.with_name(f"{path.name}.previous")
    return previous if not path.exists() and previous.is_dir() else path
