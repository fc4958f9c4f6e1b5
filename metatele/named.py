"""The published checkpoints by name, wherever the package lies: installed from a wheel, or in its repository.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from metatele.errors import CheckpointError

# Name to what it is and its size, as a user decides by them.
NAMED = {
    "general": "the learned optimizer for any module, 45 KB",
    "transfer": "the learned optimizer for perceptrons of every shape, 43 KB",
    "lr-tele": "the paper's LSTM(lr,tele), 0.6 MB",
    "update": "the paper's LSTM(update), 9 MB",
    "update-tele": "the paper's LSTM(update,tele), 18 MB",
}

_PACKAGE = Path(__file__).resolve().parent


def named_checkpoint(name: str) -> Path:
    """Folder of a published checkpoint.

    A wheel brings the small ones (``general``, ``transfer``, ``lr-tele``); a copy of the repository has all.

    Args:
        name: One of ``general``, ``transfer``, ``lr-tele``, ``update``, ``update-tele``.

    Returns:
        A folder with ``config.json`` and ``model.safetensors``, for :func:`metatele.load`.

    Raises:
        CheckpointError: The name is unknown, or the checkpoint is too large for the wheel and so not here.

    Example:
        >>> named_checkpoint("transfer").name
        'transfer'
    """
    if name not in NAMED:
        raise CheckpointError(
            f"a published checkpoint is one of {', '.join(NAMED)}, got {name!r}",
            page="docs/learned-optimizer.md#use-it",
        )
    homes = [_PACKAGE / "checkpoints"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # else the folder beside the package is somebody else's
        homes.append(_PACKAGE.parent / "checkpoints")
    for home in homes:
        if (home / name / "config.json").is_file():
            return home / name
    raise CheckpointError(
        f"the checkpoint {name!r} ({NAMED[name]}) does not come with the installed package: "
        f"get the folder checkpoints/{name} from metatele's repository and give its path",
        page="docs/learned-optimizer.md#use-it",
    )
