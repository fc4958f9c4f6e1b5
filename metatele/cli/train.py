"""``metatele train`` and ``train_meta.py``: meta-train into a run folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatele.command_line import (
    OneLineParser,
    add_config_flags,
    add_threads_flag,
    chosen_threads,
    device_named,
    whole_number,
)
from metatele.config import RunConfig, families, family_with, preset
from metatele.errors import ConfigError
from metatele.extras import require_modules

_EXAMPLES = (
    "quick --out runs/quick",
    "best --method lr-tele --seed 3 --out runs/lr-tele",
    "quick --out runs/quick --resume",
)


# Up to this batch × hidden a second thread saves little time on an idle machine and costs some on a busy one:
# preset quick (32 × 300) takes 41 s of processor time with one thread and 57 s with two.
_ONE_THREAD_SUFFICES = 10_000


def parser() -> argparse.ArgumentParser:
    """Flags: where and how to run, then every field of the configuration."""
    p = OneLineParser(
        prog="train_meta.py",
        description="Meta-train an LSTM optimizer that may teleport; presets first, any setting as a flag. "
        "(paper: X) is the value of the preset paper; metatele/config/presets.py says what the others change.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [name for family in families() for name in family.presets]
    p.add_argument("preset", choices=names, help="settings to begin with; flags change them")
    p.add_argument(
        "--family",
        choices=[f.name for f in families()],
        help="; ".join(f"{f.name} (presets {', '.join(f.presets)}): {f.title}" for f in families()),
    )
    p.add_argument("--out", required=True, metavar="FOLDER", help="run folder, new or empty")
    p.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of everything random (default 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add_threads_flag(p)
    p.add_argument("--resume", action="store_true", help="go on from the last saved state of the folder")
    p.add_argument("--quiet", action="store_true", help="no progress")
    for family in families():
        add_config_flags(p, *(family.part(name) for name in ("method", "training", "task")), default=family.defaults)
    typed = f"python {p.prog}" if p.prog.endswith(".py") else p.prog
    p.epilog = "\n".join(["examples:", *(f"  {typed} {example}" for example in _EXAMPLES)])
    return p


def _configured(values: dict[str, Any]) -> RunConfig:
    name, family = values.pop("preset"), values.pop("family")
    if family not in (None, family_with(name).name):
        raise ConfigError(f"the preset {name} is for the family {family_with(name).name}")
    return preset(name, **values)


def _small(config: RunConfig) -> bool:
    batch = getattr(config.training, "batch", 1)  # inner runs of evolution have one thread each
    return bool(batch * getattr(config.method, "hidden", 1) <= _ONE_THREAD_SUFFICES)


def main(arguments: Sequence[str]) -> None:
    """Parse, train, say where the checkpoint lies."""
    values = vars(parser().parse_args(arguments))
    out, device, threads = values.pop("out"), values.pop("device"), values.pop("threads")
    resume, quiet = values.pop("resume"), values.pop("quiet")
    config = _configured(values)
    require_modules("meta-training", "tqdm", "tensorboard")

    import torch

    from metatele.training.processes import joined, local_device, restarted
    from metatele.training.run import CHECKPOINT_NAME, begun, train

    if threads := chosen_threads(threads, _small(config)):
        torch.set_num_threads(threads)
    where = local_device(device_named(device))
    # torchrun starts all processes with the same command line again when one has failed.
    resume = resume or (restarted() and begun(Path(out)))
    with joined(where) as processes:
        trainer = train(config, out, device=where, resume=resume, quiet=quiet, processes=processes)
    if not quiet and processes.first:
        skipped = f", {trainer.skipped} skipped" if trainer.skipped else ""
        found = math.isfinite(trainer.best) and (Path(out) / CHECKPOINT_NAME).is_dir()
        result = (
            f"best checkpoint in {out}/{CHECKPOINT_NAME}"
            if found
            else "no checkpoint: no validation was finite, or it was removed"
        )
        print(f"{trainer.update} updates{skipped}; {result}")
