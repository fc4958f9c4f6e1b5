"""The published checkpoint: a folder with ``config.json`` and ``model.safetensors``.

Neither file can run code. ``config.json`` holds checksums of both, so a damaged or mixed-up folder
is one clear error instead of a strange optimizer.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import nn

from metatele._version import __version__
from metatele.config import RunConfig, from_dict, to_dict
from metatele.errors import CheckpointError, MetateleError
from metatele.files import existing_folder, replace_folder
from metatele.learned.families import family_of, learned_family
from metatele.named import NAMED, named_checkpoint

FORMAT = 1
_LOADING = "docs/meta-training.md#load-what-you-trained"
CONFIG_NAME, MODEL_NAME = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A trained meta-optimizer with the story of its training.

    Attributes:
        optimizer: Ready to use; its parameters do not require gradients.
        method: Its moves and sizes.
        task: What it was trained on.
        training: How: the run's preset, seed and settings, and how far it came.
        scores: What it reached, by name.

    Example:
        >>> from metatele.config import EquivariantConfig, MixtureConfig
        >>> from metatele.learned import EquivariantOptimizer
        >>> method = EquivariantConfig(hidden=8)
        >>> Checkpoint(EquivariantOptimizer(method), method, MixtureConfig()).method.title
        'Equivariant(update,tele)'
    """

    optimizer: nn.Module
    method: Any
    task: Any
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions that a result depends on.

    Example:
        >>> sorted(versions())
        ['metatele', 'python', 'torch']
    """
    return {"metatele": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _digest(config: dict[str, Any]) -> str:
    rest = {k: v for k, v in config.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save(
    path: str | Path,
    optimizer: nn.Module,
    *,
    run: RunConfig | None = None,
    progress: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, replacing an earlier one only when the new one is complete.

    Args:
        path: Folder, new or that of an earlier checkpoint.
        optimizer: What to save, of any family.
        run: How it was trained.
        progress: How far training came.
        scores: What it reached.

    Raises:
        SaveError: The folder cannot be written; an earlier one is intact.
        TypeError: The optimizer is of no family.

    Example:
        >>> import tempfile
        >>> from metatele.learned import ConstantOptimizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder) / "constant", ConstantOptimizer(0.1, 0.01), scores={"loss": 1.0})
        ...     load(Path(folder) / "constant").scores
        {'loss': 1.0}
    """
    if isinstance(optimizer, Checkpoint):
        raise TypeError("optimizer must be a meta-optimizer, got Checkpoint: give checkpoint.optimizer")
    family, method = family_of(optimizer), cast("Any", optimizer).config
    config: dict[str, Any] = {
        "format": FORMAT,
        "package": "metatele",
        "versions": versions(),
        "name": method.title,
        "family": family.name,
        "method": to_dict(method),
        "task": to_dict(family.task(optimizer, run)),
        "training": {**({} if run is None else to_dict(run)), **(progress or {})},
        "scores": scores or {},
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in optimizer.state_dict().items()}
    model = safetensors.torch.save(tensors, {"format": str(FORMAT)})
    config["model_sha256"] = hashlib.sha256(model).hexdigest()
    config["sha256"] = _digest(json.loads(json.dumps(config)))
    text = json.dumps(config, indent=1) + "\n"
    replace_folder(Path(path), {CONFIG_NAME: text.encode(), MODEL_NAME: model})


def find(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder, a checkpoint folder, or else the name of a published checkpoint.

    Args:
        path: A folder that holds a checkpoint's two files, or has them in its folder ``checkpoint``; or a name of
            :func:`metatele.named.named_checkpoint`, where no folder is called so.

    Raises:
        CheckpointError: There is none.
    """
    folder = Path(path)
    for candidate in (existing_folder(folder), existing_folder(folder / "checkpoint")):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    if not folder.exists():
        if str(path) in NAMED:
            return named_checkpoint(str(path))
        names = ", ".join(NAMED)
        raise CheckpointError(
            f"there is no checkpoint at {folder}: the path does not exist, nor is it one of {names}", page=_LOADING
        )
    raise CheckpointError(
        f"there is no checkpoint at {folder}: expected {CONFIG_NAME} and {MODEL_NAME} there or in a folder "
        "'checkpoint'",
        page=_LOADING,
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The checked content of a checkpoint's ``config.json``.

    Args:
        path: A checkpoint folder, or a run folder that holds one.

    Returns:
        ``name`` and ``family``, the settings of ``method`` and ``task``, ``training`` and ``scores``, versions and
        checksums.

    Raises:
        CheckpointError: Missing, damaged, foreign, or from a newer format.
    """
    file = find(path) / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("package") != "metatele" or "format" not in config:
        raise CheckpointError(f"{file} was not written by metatele", page=_LOADING)
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {config['format']!r}; this version reads format {FORMAT}: upgrade metatele",
            page=_LOADING,
        )
    if config.get("sha256") != _digest(config):
        raise CheckpointError(f"{file} is damaged or was edited: its checksum does not match")
    return config


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: A checkpoint folder, or a run folder that holds one.
        device: Where to put the parameters.

    Returns:
        The optimizer of the family that the checkpoint names, with frozen parameters, and its story.

    Raises:
        CheckpointError: Missing, truncated, altered, foreign or newer files, or non-finite weights.

    Example:
        >>> load("transfer").task.widest
        64
    """
    folder = find(path)
    config = read_config(folder)
    file = folder / MODEL_NAME
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if not content:
        raise CheckpointError(f"{file} is empty")
    if hashlib.sha256(content).hexdigest() != config.get("model_sha256"):
        raise CheckpointError(f"{file} is damaged or belongs to another {CONFIG_NAME}: its checksum does not match")
    try:
        tensors = safetensors.torch.load(content)
        family = learned_family(config.get("family", "flat"))
        method, task = (from_dict(family.settings.part(name), config[name]) for name in ("method", "task"))
        optimizer = family.build(method, task, 0)
        optimizer.load_state_dict(tensors)
    except (MetateleError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} does not hold a usable meta-optimizer: {first}") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file} holds values that are not finite, in {name}")
    optimizer.requires_grad_(False).to(device)
    return Checkpoint(optimizer, method, task, config["training"], config["scores"])
