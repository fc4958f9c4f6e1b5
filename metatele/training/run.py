"""A run folder: what meta-training writes, and how it goes on after a kill.

``checkpoint/`` is the published checkpoint with the least validation score so far,
``training_state.pt`` the resumable state, ``metrics.jsonl`` and TensorBoard events the log. The
state is the one source of truth: whatever was logged after it is dropped when a run resumes. The state before it is
kept too, and a run goes on from that one if the last one was damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from metatele import checkpoint
from metatele.config import RunConfig, stored_config, to_dict
from metatele.errors import CheckpointError, RunFolderError, SaveError
from metatele.files import existing_folder, write_atomically
from metatele.training.families import trainer_of
from metatele.training.processes import Processes
from metatele.training.trainer import MetaTrainer

_SEAL = b"\nmetatele sha256 "  # the file ends with its own checksum; torch.load does not check any
STATE_NAME, METRICS_NAME, CHECKPOINT_NAME = "training_state.pt", "metrics.jsonl", "checkpoint"
PREVIOUS_NAME = "training_state.previous.pt"


def train(
    config: RunConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    processes: Processes | None = None,
) -> MetaTrainer:
    """Meta-train into a folder; the whole of ``train_meta.py``.

    Args:
        config: What to train.
        out: Folder, new or empty; with ``resume`` the folder of the run to go on with.
        device: Where.
        resume: Go on from the last complete state.
        quiet: No progress on stderr or stdout.
        processes: Those that share the batch; the first one alone writes.

    Returns:
        The trainer at the end, whose ``best`` is the least validation score.

    Raises:
        RunFolderError: The folder holds another run, or none to resume.
        DivergedError: Too many non-finite updates in a row.
        SaveError: Nothing could be written; earlier files are intact.
        PeerLostError: Another process of the run is gone.

    Example:
        >>> import tempfile
        >>> from metatele.config import preset
        >>> config = preset("paper", trajectories=4, batch=2, horizon=4, unroll=2, hidden=8, widths=(3, 4, 2),
        ...     samples=3, validation_steps=4, validation_score_at=(4,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train(config, Path(folder) / "run", quiet=True).update
        4
    """
    folder, processes, c = Path(out), processes or Processes(), config.training
    trainer = (_resumed_trainer if resume else _new_trainer)(config, folder, device, processes)
    with closing(trainer), _Log(folder, trainer, quiet) if processes.first else nullcontext() as log:
        if not resume:
            _save(trainer, folder)
        while not trainer.finished:
            upcoming = trainer.update + 1
            noted = upcoming % c.log_every == 0 or upcoming == c.updates
            metrics = trainer.step(measure=noted)
            if log is not None:
                log.advance()
                if noted:
                    log.training(metrics)
                if trainer.update % c.validation_every == 0 or trainer.finished:
                    _validate(trainer, folder, log)
            if trainer.update % c.save_every == 0 or trainer.finished:
                if log is not None:
                    log.flush()
                _save(trainer, folder)
    return trainer


def train_once(config: RunConfig, folder: Path, device: torch.device | str = "cpu") -> None:
    """Meta-train into a folder, unless that was done before; an interrupted run is gone on with.

    ``seconds.json`` holds the time it took, or null for a run that was resumed.

    Args:
        config: What to train.
        folder: The run folder.
        device: Where.

    Raises:
        RunFolderError: The folder holds a run with other settings.
    """
    if (folder / "seconds.json").exists():
        stored = checkpoint.read_config(folder)["training"]
        if stored_config({name: stored[name] for name in to_dict(config) if name in stored}) != config:
            raise RunFolderError(f"{folder} holds a run with other settings; choose another --runs")
        return
    print(f"training into {folder}", flush=True)
    begin_s = time.perf_counter()
    resume = begun(folder)
    train(config, folder, device=device, resume=resume, quiet=True)
    # A resumed run's time is not known any more; it is left out rather than guessed.
    seconds = None if resume else time.perf_counter() - begin_s
    write_atomically(folder / "seconds.json", json.dumps(seconds).encode())


def _new_trainer(config: RunConfig, folder: Path, device: torch.device | str, processes: Processes) -> MetaTrainer:
    processes.checked(lambda: _check_new(folder))
    trainer = trainer_of(config, device, processes)  # first, so that settings it refuses leave no folder behind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"could not create {folder}: {error.strerror or error}") from error
    return trainer


def _check_new(folder: Path) -> None:
    if folder.is_file():
        raise RunFolderError(f"out must be a folder, and {folder} is a file")
    if begun(folder):
        raise RunFolderError(f"{folder} holds another run; go on with it by --resume, or choose another --out")
    # What is left of a run killed before its first state is not a run; anything else is not ours.
    leftovers = {f".{STATE_NAME}.tmp", f".{METRICS_NAME}.tmp"}
    metrics = folder / METRICS_NAME
    if metrics.is_file() and metrics.stat().st_size == 0:
        leftovers.add(METRICS_NAME)
    foreign = (
        [p.name for p in folder.iterdir() if p.name not in leftovers and "tfevents" not in p.name]
        if folder.is_dir()
        else []
    )
    if foreign:
        raise RunFolderError(f"{folder} is not empty (it holds {sorted(foreign)[0]}); choose another --out")


def _resumed_trainer(config: RunConfig, folder: Path, device: torch.device | str, processes: Processes) -> MetaTrainer:
    state = usable_state(folder)
    stored = stored_config(state["config"])
    if type(stored) is not type(config):
        raise RunFolderError(f"cannot resume {folder} with other settings: its preset is {stored.preset}")
    for part in ("seed", "task", "method", "training"):
        if getattr(config, part) != getattr(stored, part):
            ours, theirs = (_compared(getattr(c, part)) for c in (config, stored))
            names = [k for k in ours if ours[k] != theirs[k]] if isinstance(ours, dict) else [part]
            a, b = (ours[names[0]], theirs[names[0]]) if isinstance(ours, dict) else (ours, theirs)
            raise RunFolderError(f"cannot resume {folder} with other settings: {names[0]} is {a} here and {b} there")
    trainer = trainer_of(config, device, processes)
    trainer.load_state_dict(state)
    if not (existing_folder(folder / CHECKPOINT_NAME) / checkpoint.CONFIG_NAME).is_file():
        trainer.best = math.inf  # there is none to beat
    return trainer


def _compared(part: Any) -> Any:
    """Values of a part of a configuration, without those that change time alone."""
    if not dataclasses.is_dataclass(part):
        return part
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.compare}


def begun(folder: Path) -> bool:
    """Whether a folder holds a run to go on with."""
    return any((folder / name).exists() for name in (STATE_NAME, PREVIOUS_NAME))


def usable_state(folder: Path) -> dict[str, Any]:
    """The last resumable state of a run folder, or the one before it, with a warning, where that is damaged.

    Args:
        folder: A run folder.

    Returns:
        What the trainer's ``state_dict`` was.

    Raises:
        RunFolderError: There is none.
        CheckpointError: None can be read.
    """
    try:
        return read_state(folder)
    except (CheckpointError, RunFolderError) as error:
        if not (folder / PREVIOUS_NAME).is_file():
            raise
        try:
            state = read_state(folder, PREVIOUS_NAME)
        except CheckpointError as earlier:
            raise CheckpointError(f"{error}; and {earlier}") from error
        warnings.warn(f"{error}; going on from {PREVIOUS_NAME}, update {state['counters'][0]}", stacklevel=2)
        return state


def read_state(folder: Path, name: str = STATE_NAME) -> dict[str, Any]:
    """One resumable state of a run folder, read without executing anything.

    Args:
        folder: Of the run.
        name: Of the state's file: the last one, or ``PREVIOUS_NAME``.

    Raises:
        RunFolderError: There is none.
        CheckpointError: It is damaged or from a newer format.
    """
    path = folder / name
    if not path.is_file():
        raise RunFolderError(f"there is no run to resume in {folder}: {name} is missing")
    content, _, digest = path.read_bytes().rpartition(_SEAL)
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a file it cannot read
        raise CheckpointError(f"{path} cannot be read by this version of torch") from error
    if not isinstance(state, dict) or state.get("format") != 1:
        raise CheckpointError(f"{path} was not written by this version of metatele")
    return state


def _save(trainer: MetaTrainer, folder: Path) -> None:
    state = trainer.state_dict()  # to which all processes contribute
    if not trainer.processes.first:
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    seal = _SEAL + hashlib.sha256(content).hexdigest().encode()
    write_atomically(folder / STATE_NAME, content + seal, previous=folder / PREVIOUS_NAME)


def _validate(trainer: MetaTrainer, folder: Path, log: _Log) -> None:
    score, losses = trainer.validate()
    log.validation(score, losses)
    if score < trainer.best:
        trainer.best = score
        progress = {"update": trainer.update, "trajectories_started": trainer.started}
        scores = {"validation_loss_at": {str(k): v for k, v in losses.items()}, "validation_score": score}
        checkpoint.save(
            folder / CHECKPOINT_NAME, trainer.evaluated, run=trainer.config, progress=progress, scores=scores
        )
        for name, optimizer in trainer.beside.items():
            checkpoint.save(folder / name, optimizer, run=trainer.config, progress=progress)


class _Log:
    """metrics.jsonl, TensorBoard, and one line or a bar for whoever watches."""

    def __init__(self, folder: Path, trainer: MetaTrainer, quiet: bool) -> None:
        self.folder, self.trainer, self.quiet = folder, trainer, quiet
        self.last_losses: dict[Any, float] = {}

    def __enter__(self) -> _Log:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        update = self.trainer.update
        with self._saving():
            _keep_lines_up_to(self.folder / METRICS_NAME, update)
            self.metrics = (self.folder / METRICS_NAME).open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder), purge_step=update + 1 if update else None)
        on_terminal = not self.quiet and sys.stderr.isatty()
        self.lines = not self.quiet and not on_terminal
        self.bar = tqdm(
            total=self.trainer.config.training.updates,
            initial=self.trainer.update,
            desc=self.trainer.config.method.title,
            unit="update",
            disable=not on_terminal,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for log in (self.metrics, self.board):
            with suppress(OSError):  # what could not be written has been reported by then
                log.close()

    def advance(self) -> None:
        self.bar.update()

    def flush(self) -> None:
        with self._saving():
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
            self.board.flush()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"could not write the log in {self.folder}: {error.strerror or error}") from error

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(_finite_or_none({"update": self.trainer.update, **entry}), allow_nan=False)
        with self._saving():
            self.metrics.write(line + "\n")

    def _scalars(self, scalars: dict[str, float]) -> None:
        with self._saving():
            for name, value in scalars.items():
                self.board.add_scalar(name, value, self.trainer.update)

    def training(self, metrics: dict[str, float]) -> None:
        self._write(metrics)
        self._scalars({f"train/{name}": value for name, value in metrics.items()})
        shown = f"meta-loss {metrics['meta_loss']:.4g}"
        if self.last_losses:
            shown += self.trainer.shown(self.last_losses)
        self.bar.set_postfix_str(shown)
        if self.lines:
            total, speed = self.trainer.config.training.updates, metrics["ms_per_trajectory_step"]
            troubles = "".join(
                f"  {name} {metrics[key]:.0f}"
                for name, key in (("skipped", "skipped"), ("lost", "lost_trajectories"))
                if metrics[key]
            )
            print(f"update {self.trainer.update}/{total}  {shown}  {speed:.3f} ms/step{troubles}", flush=True)

    def validation(self, score: float, losses: dict[Any, float]) -> None:
        self.last_losses = losses
        self._write({"validation_score": score, "validation_loss_at": losses})
        self._scalars({"validation/score": score, **{f"validation/loss_at_{s}": loss for s, loss in losses.items()}})
        with self._saving():
            self._histograms()

    def _histograms(self) -> None:
        values = {n: p.detach() for n, p in self.trainer.evaluated.named_parameters() if "head" in n}
        values["inner/log10_gradient"] = self.trainer.gradients().abs().clamp_min(1e-12).log10()
        for name, value in values.items():
            drawable = value[value.abs() < 1e30]  # TensorBoard has no bins for what is not, or barely, finite
            if drawable.numel():
                self.board.add_histogram(name, drawable, self.trainer.update)


def _finite_or_none(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes ``null``."""
    if isinstance(value, dict):
        return {k: _finite_or_none(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_lines_up_to(path: Path, update: int) -> None:
    """Drop what was logged after the state that a run resumes from."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a line cut short by a kill
                continue
            if isinstance(entry, dict) and isinstance(entry.get("update"), int) and entry["update"] <= update:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())
