"""What the experiments on image sets share: flags, raw results, tables of arms, curves."""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele.command_line import OneLineParser, chosen_threads, device_named, make_folder, whole_number
from metatele.errors import RunFolderError
from metatele.figures import png as png  # experiments/transfer takes it from here
from metatele.files import write_atomically
from metatele.intervals import half_width

if TYPE_CHECKING:
    from metatele.training.replicas import Arm, History, Replicas

FORMAT = 1
# The paper trains on so many of the first samples; of other sets all are taken.
TRAIN_SAMPLES = {"mnist": 50_000, "fashion-mnist": 50_000, "cifar10": 50_000}
# On digits, and on problems without images, a second thread costs more than it saves beside other programs.
SMALL_SETS = ("digits",)
IMAGE_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")


def parser(name: str, description: str | None, epochs: int = 40) -> argparse.ArgumentParser:
    """The flags every experiment on images has."""
    p = OneLineParser(prog=f"metatele.experiments {name}", description=description, allow_abbrev=False)
    p.add_argument("--dataset", choices=IMAGE_SETS, default="digits", help="image set (default digits)")
    p.add_argument("--data-root", metavar="FOLDER", help="folder with its files (default: METATELE_DATA)")
    p.add_argument("--download", action="store_true", help="fetch the set from OpenML if its files are not there")
    p.add_argument("--seeds", type=whole_number(1), default=5, metavar="N", help="replicas of each arm (default 5)")
    p.add_argument("--epochs", type=whole_number(1), default=epochs, metavar="N", help=f"(default {epochs})")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--out", metavar="FOLDER", help=f"results (default runs/{name}-DATASET)")
    p.add_argument("--redraw", action="store_true", help="table and figure again from the stored results.json")
    return p


def folder(name: str, args: argparse.Namespace) -> Path:
    """Where results go."""
    return Path(args.out or f"runs/{name}-{args.dataset}")


def stored(out: Path, *names: str, rows: str = "arms") -> dict[str, Any]:
    """Results of an earlier run of one of the experiments named; ``rows`` is what they are a list of.

    Raises:
        RunFolderError: There are none, none that can be read, or those of another experiment.
    """
    try:
        doc: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if doc["format"] != FORMAT:
            raise ValueError
        if not doc[rows] or not all(isinstance(row, dict) for row in doc[rows]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"there is no readable results.json in {out}") from error
    # Results of before 0.2 may not say whose they are.
    if names and doc.get("experiment", names[0]) not in names:
        raise RunFolderError(f"{out} holds results of {doc.get('experiment')}, not of {' or '.join(names)}")
    return doc


def _choose_threads(small: bool) -> None:
    import torch

    if threads := chosen_threads(None, small):
        torch.set_num_threads(threads)


def prepare(args: argparse.Namespace, out: Path) -> tuple[Any, Any]:
    """The image set and the device, with the folder made."""
    device = device_named(args.device)
    _choose_threads(small=args.dataset in SMALL_SETS)
    from metatele.data import load_images

    images = load_images(args.dataset, args.data_root, args.download)  # first: what is missing leaves no folder
    make_folder(out)
    return images, device


def train_count(images: Any) -> int:
    """How many of an image set's training samples are trained on."""
    return min(TRAIN_SAMPLES.get(images.name, len(images.train_labels)), len(images.train_labels))


def run_arms(replicas: Replicas, epochs: int) -> History:
    """Train all arms for some more epochs, with a progress bar on a terminal and a line now and then elsewhere."""
    import sys

    from tqdm import tqdm

    begun, end = replicas.epoch, replicas.epoch + epochs
    bar = tqdm(total=end, initial=begun, unit="epoch", disable=not sys.stderr.isatty())

    def progress(epoch: int, history: History) -> None:
        bar.update()
        if not sys.stderr.isatty() and (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1} of {end}: {history.step_seconds:.0f} s of training", flush=True)

    history = replicas.train(epochs, progress)
    bar.close()
    return history


def document(
    name: str, args: argparse.Namespace, images: Any, arms: Sequence[Arm], history: History, replicas: Replicas
) -> dict[str, Any]:
    """The content of ``results.json``: every number of every replica."""
    import torch

    from metatele.checkpoint import versions

    def curves(rows: list[Any], arm: int) -> list[list[float | None]]:
        """``[seeds][epochs + 1]``; a value that is not finite becomes null."""
        values = torch.stack(rows)[:, arm].T.double().tolist()
        return [[v if math.isfinite(v) else None for v in row] for row in values]

    return {
        "format": FORMAT,
        "experiment": name,
        "dataset": images.name,
        "dataset_sha256": images.sha256,
        "train_samples": len(replicas.train_labels),
        "test_samples": len(images.test_labels),
        "widths": list(replicas.mlp.widths),
        "batch_size": replicas.batch_size,
        "seeds": list(replicas.seeds),
        "epochs": args.epochs,
        "device": str(replicas.device),
        "versions": {**versions(), "machine": platform.machine(), "threads": str(torch.get_num_threads())},
        "seconds": {
            "steps": history.step_seconds,
            "teleports": history.teleport_seconds,
            "evaluation": history.evaluation_seconds,
        },
        "arms": [
            {
                "name": arm.name,
                "optimizer": arm.optimizer.__name__,
                "settings": arm.settings,
                "teleport": None if arm.teleport is None else type(arm.teleport).__name__,
                "teleports": [t for t in history.teleports if t["arm"] == arm.name],
                "train_loss": curves(history.train_loss, a),
                "test_loss": curves(history.test_loss, a),
                "test_accuracy": curves(history.test_accuracy, a),
            }
            for a, arm in enumerate(arms)
        ],
    }


def interval(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; infinite if a value is missing.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        (2.0, 2.48...)
    """
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return math.inf, math.inf
    if len(known) < 2:
        return known[0], math.nan
    return statistics.mean(known), half_width(known)


def cell(values: Sequence[float | None], digits: int = 4) -> str:
    """``mean ±half`` as in tables."""
    mean, half = interval(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if math.isfinite(half) else "")


def ends(arm: dict[str, Any], *keys: str) -> list[str]:
    """Cells with what an arm's stored curves end at."""
    return [cell([run[-1] for run in arm[key]]) for key in keys]


def final_table(doc: dict[str, Any]) -> list[list[str]]:
    """Final losses and accuracy of each arm, and what its teleports did."""
    table = [
        [
            "arm",
            "train loss",
            "test loss",
            "test accuracy",
            "train loss after 1 epoch",
            "grad norm² x",
            "drift",
            "undone",
        ]
    ]
    for arm in doc["arms"]:
        row = [arm["name"], *ends(arm, "train_loss", "test_loss", "test_accuracy")]
        row.append(cell([run[1] for run in arm["train_loss"]]))
        done = arm["teleports"]
        if done:
            ratios = [ratio for t in done for ratio in t["objective_ratio"] if ratio is not None]
            drifts = [d for t in done for d in t["drift"]]
            row += [
                f"{statistics.median(ratios):.3g}" if ratios else "",
                f"{max(drifts):.2g}",
                str(sum(t["rolled_back"] for t in done)),
            ]
        else:
            row += ["", "", ""]
        table.append(row)
    return table


def write(
    doc: dict[str, Any], out: Path, table: list[list[str]], figure: bytes, picture: str = "loss.png", note: str = ""
) -> str:
    """``results.json``, ``table.csv``, ``table.md`` with a note below, and the picture; returns the table."""
    import csv

    from metatele.training.report import markdown

    text = markdown(table) + (f"\n{note}\n" if note else "")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(table)
    write_atomically(out / "results.json", (json.dumps(doc, allow_nan=False) + "\n").encode())
    write_atomically(out / "table.csv", buffer.getvalue().encode())
    write_atomically(out / "table.md", text.encode())
    write_atomically(out / picture, figure)
    return text


def small_parser(name: str, description: str | None, seeds: int, steps: int) -> argparse.ArgumentParser:
    """The flags of an experiment on tiny problems, without images."""
    p = OneLineParser(prog=f"metatele.experiments {name}", description=description, allow_abbrev=False)
    p.add_argument("--seeds", type=whole_number(1), default=seeds, metavar="N", help=f"runs (default {seeds})")
    p.add_argument("--steps", type=whole_number(10), default=steps, metavar="N", help=f"(default {steps})")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto", help="the problems are tiny: cpu")
    p.add_argument("--out", metavar="FOLDER", default=f"runs/{name}", help=f"(default runs/{name})")
    p.add_argument("--redraw", action="store_true", help="table and figure again from the stored results.json")
    return p


def finish(
    doc: dict[str, Any],
    out: Path,
    table: Callable[[dict[str, Any]], list[list[str]]],
    figure: Callable[[dict[str, Any]], bytes],
    picture: str = "loss.png",
    note: str = "",
) -> None:
    """Write everything, print the table and where the figure lies."""
    print(write(doc, out, table(doc), figure(doc), picture, note), end="")
    print(f"figure: {out / picture}")


def small_main(
    arguments: Sequence[str],
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], list[list[str]]],
    figure: Callable[[dict[str, Any]], bytes],
    picture: str = "loss.png",
    note: Callable[[dict[str, Any]], str] = lambda _: "",
) -> None:
    """What an experiment on tiny problems does: parse, run or read what is stored, write, print the table."""
    args = parser.parse_args(arguments)
    out = Path(args.out)
    if not args.redraw:
        make_folder(out)
        _choose_threads(small=True)
    doc = stored(out, parser.prog.split()[-1]) if args.redraw else run(args)
    finish(doc, out, table, figure, picture, note(doc))


def draw_band(
    axes: Any, xs: Sequence[float], runs: list[list[float | None]], *, band: bool = True, **style: Any
) -> None:
    """Mean over replicas with a band of one standard deviation, which goes no lower than the lowest replica."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in run] for run in runs], float)
    mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values.mean(0)
    if band:
        low = np.maximum(mean - std, values.min(0))
        axes.fill_between(xs, low, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(xs, mean, **style)
