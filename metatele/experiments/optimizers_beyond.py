"""Does teleportation help an optimizer whose learning rate is tuned? Eight optimizers, six ways to teleport.

MLP d-16-10-10 as in Figure 5, without the paper's fixed rates: for every pair of optimizer and teleport the rate
is the best of a grid by validation loss (a fifth of the training samples, held out of training), on seeds of
their own, so an arm with teleport is tuned exactly as one without. Then fresh seeds, and the difference to
the same optimizer without teleport, paired by seed, with its 95 % interval. Digits take a few minutes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metatele import figures
from metatele.errors import ConfigError
from metatele.experiments import images as common

if TYPE_CHECKING:
    from metatele.data import ImageSet
    from metatele.teleport import TeleportMove
    from metatele.training.replicas import Arm

_TUNING_SEEDS = range(1000, 1002)
_RATES = [10 ** (e / 2) for e in range(-8, 2)]
NONE = "none"
_NOT_DRAWN = "rescaling up at the start"  # a panel holds six lines


def optimizers() -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Name to class, fixed settings, and whether replicas must be run apart; what this torch has."""
    import torch

    known: dict[str, tuple[str, dict[str, Any], bool]] = {
        "SGD": ("SGD", {}, False),
        "Momentum": ("SGD", {"momentum": 0.9}, False),
        "AdaGrad": ("Adagrad", {}, False),
        "RMSprop": ("RMSprop", {}, False),
        "Adam": ("Adam", {}, False),
        "AdamW": ("AdamW", {}, False),
        "NAdam": ("NAdam", {}, False),
        "Muon": ("Muon", {}, True),
    }
    return {n: (getattr(torch.optim, c), s, a) for n, (c, s, a) in known.items() if hasattr(torch.optim, c)}


def teleports(epochs: int) -> dict[str, tuple[TeleportMove | None, tuple[int, ...]]]:
    """Name to move and epochs at whose beginning it is made."""
    import torch

    from metatele.teleport import GradientNormAscent, Random, Rescaling, Whitening

    ascent = GradientNormAscent(action="approximate")
    return {
        NONE: (None, ()),
        "ascent at the start": (ascent, (0,)),
        "ascent every 5 epochs": (ascent, tuple(range(0, epochs, 5))),
        "whitening at the start": (Whitening(action="approximate", max_drift=0.1), (0,)),
        "rescaling up at the start": (Rescaling(goal="raise-gradients", radius=0.7), (0,)),
        "balanced at the start": (Rescaling(goal="balance-gradients"), (0,)),
        "random at the start": (Random(action="approximate", generator=torch.Generator().manual_seed(0)), (0,)),
    }


def arms(rates: dict[tuple[str, str], Sequence[float]], epochs: int, samples: int) -> list[Arm]:
    """An arm for each pair and each of its rates."""
    from metatele.training.replicas import Arm

    known, moves = optimizers(), teleports(epochs)
    result = []
    for (optimizer, teleport), values in rates.items():
        cls, fixed, apart = known[optimizer]
        move, when = moves[teleport]
        for lr in values:
            settings = {"lr": lr, **fixed}
            batches = max(1, min(2, samples // 200))
            result.append(Arm(f"{optimizer}, {teleport}", cls, settings, move, when, batches, apart=apart))
    return result


def _split(data: ImageSet) -> ImageSet:
    """The same set with a fifth of its training samples in the place of the test samples."""
    import torch

    held = torch.arange(len(data.train_labels)) % 5 == 0
    return dataclasses.replace(
        data,
        train_images=data.train_images[~held],
        train_labels=data.train_labels[~held],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


def run(args: Any) -> dict[str, Any]:
    """Tune, then measure; the content of ``results.json``."""
    from metatele.perceptron.activations import LeakyReLU
    from metatele.perceptron.mlp import MLP
    from metatele.training.replicas import Replicas

    data, device = common.prepare(args, common.folder("optimizers-beyond", args))
    mlp = MLP((data.features, 16, 10, data.classes), LeakyReLU(0.1))
    if missing := [name for name in args.optimizers or () if name not in optimizers()]:
        raise ConfigError(f"optimizers must be among {', '.join(optimizers())}, got {missing[0]}")
    pairs = [(o, t) for o in args.optimizers or optimizers() for t in teleports(args.epochs)]
    split = _split(data)
    candidates = arms(dict.fromkeys(pairs, _RATES), args.epochs, len(split.train_labels))
    print(f"tuning {len(candidates)} candidates", flush=True)
    tuning = Replicas(split, mlp, candidates, list(_TUNING_SEEDS), 0, args.batch, device)
    scores = common.run_arms(tuning, args.epochs).test_loss[-1].mean(1).nan_to_num(nan=math.inf)
    best = scores.view(len(pairs), len(_RATES)).argmin(1).tolist()
    chosen = arms({pair: [_RATES[b]] for pair, b in zip(pairs, best, strict=True)}, args.epochs, len(data.train_labels))
    print(f"measuring {len(chosen)} arms", flush=True)
    replicas = Replicas(data, mlp, chosen, range(args.seeds), 0, args.batch, device)
    doc = common.document("optimizers-beyond", args, data, chosen, common.run_arms(replicas, args.epochs), replicas)
    doc["grid"], doc["tuning_seeds"] = _RATES, list(_TUNING_SEEDS)
    return doc


def verdict(differences: Sequence[float | None]) -> str:
    """``better``, ``worse`` or nothing, by the 95 % interval of paired differences of losses."""
    mean, half = common.interval(differences)
    if not math.isfinite(mean):
        return "diverges"
    if mean + half < 0:
        return "better"
    return "worse" if mean - half > 0 else ""


def table(doc: dict[str, Any]) -> list[list[str]]:
    """A row for each pair."""
    rows = [
        ["optimizer", "teleport", "lr", "train loss", "against none", "", "test loss", "against none", "", "undone"]
    ]
    by_name = {arm["name"]: arm for arm in doc["arms"]}
    for arm in doc["arms"]:
        optimizer, teleport = arm["name"].split(", ")
        row = [optimizer, teleport, f"{arm['settings']['lr']:.2g}"]
        for key in ("train_loss", "test_loss"):
            ends = [run[-1] for run in arm[key]]
            row.append(common.cell(ends))
            if teleport == NONE:
                row += ["", ""]
                continue
            bare = [run[-1] for run in by_name[f"{optimizer}, {NONE}"][key]]
            gaps = [None if a is None or b is None else a - b for a, b in zip(ends, bare, strict=True)]
            row += [common.cell(gaps), verdict(gaps)]
        row.append(str(sum(t["rolled_back"] for t in arm["teleports"])) if arm["teleports"] else "")
        rows.append(row)
    return rows


def figure(doc: dict[str, Any]) -> bytes:
    """For each optimizer, training loss against epochs, one line for each teleport."""
    names = list(dict.fromkeys(arm["name"].split(", ")[0] for arm in doc["arms"]))
    rows = math.ceil(len(names) / 2)
    fig, grid = figures.subplots(rows, 2, figsize=(figures.WIDTH, 1 + 2.3 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        moves = {arm["name"].split(", ")[1]: arm for arm in doc["arms"] if arm["name"].startswith(f"{name}, ")}
        for place, (move, arm) in enumerate((m, a) for m, a in moves.items() if m not in (NONE, _NOT_DRAWN)):
            common.draw_band(
                axes, range(doc["epochs"] + 1), arm["train_loss"], band=False, label=move, **figures.line_style(place)
            )
        bare = {"label": "no teleport", **figures.line_style(figures.MOST_LINES - 1)}
        common.draw_band(axes, range(doc["epochs"] + 1), moves[NONE]["train_loss"], band=False, **bare)
        figures.title(axes, name)
        figures.loss_axes(axes, since=1)
        axes.margins(x=0)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=figures.SIZE)
    words = f"{doc['dataset']}, every rate tuned; mean over {len(doc['seeds'])} seeds"
    figures.title(fig, f"{words}; {_NOT_DRAWN}: in the table")
    return figures.png(fig)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    p = common.parser("optimizers-beyond", __doc__, epochs=20)
    p.add_argument("--optimizers", nargs="+", metavar="NAME", help="which (default: all that this torch has)")
    p.add_argument("--batch", type=int, choices=(10, 20, 50, 100), default=20, help="samples in a step (default 20)")
    args = p.parse_args(arguments)
    out = common.folder("optimizers-beyond", args)
    doc = common.stored(out) if args.redraw else run(args)
    common.finish(doc, out, table, figure)
