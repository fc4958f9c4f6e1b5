"""Figure 4: does one teleport to sharper, flatter or more curved points change how a network generalises?

MLP d-32-10-10, LeakyReLU 0.1, no biases, cross-entropy, SGD at 2e-2, batches of 20, 40 epochs; halfway one teleport by
fixed-rate steps ``w <- (I + eta T)·w`` (the approximate action) that raises or lowers sharpness (10 steps on each
batch) or curvature (1 step), on batches of 2000, or as many as the set has for disjoint ones. The action keeps the
loss only roughly, which by itself acts like a warm restart, so each teleport has a control: a random T on the same
batches, of the norm that changes the loss on each of them by as much (up where it cannot go down). --settings ref
(default) has what the reference implementation sets, text what the paper prints; neither makes sure that a step goes
the asked way (curvature jumps where a hidden unit changes sign), search does, by a line search within a drift of 1 %.
The epochs before the teleport are common to all arms and trained once. Digits take a quarter of a minute on one core;
CIFAR-10, the paper's set, 20 to 30 minutes.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele import figures
from metatele.command_line import whole_number
from metatele.errors import ConfigError, DivergedError
from metatele.experiments import images as common
from metatele.files import write_atomically

if TYPE_CHECKING:
    from metatele.training.replicas import Arm, Replicas

_BATCH = 2000
_SEARCH_DRIFT = 0.01  # on one batch; the paper's fixed rates have no bound
_STEPS_FOR = {"sharpness": 10, "curvature": 1}
_DISPLACEMENTS = tuple(round(0.0001 + 0.001 * i, 4) for i in range(3, 20, 4))  # every fourth of the reference's
# Teleport -> (batches, rate); without a rate, a line search.
SETTINGS: dict[str, dict[str, tuple[int, float | None]]] = {
    "ref": {
        "sharpness down": (10, 5e-2),
        "sharpness up": (2, 5e-2),
        "curvature down": (5, 5e-2),
        "curvature up": (10, 2e-1),
    },
    "text": {
        "sharpness down": (5, 5e-2),
        "sharpness up": (5, 5e-2),
        "curvature down": (5, 5e-2),
        "curvature up": (5, 5e-2),
    },
    "search": dict.fromkeys(("sharpness down", "sharpness up", "curvature down", "curvature up"), (5, None)),
}
OPTIMIZERS = {"fig4": ("SGD", 2e-2), "fig11": ("Adagrad", 1e-2)}
NONE = "none"
CONTROL = "random like "
STATE = "halfway.pt"


def arms(args: Any, samples: int, at: int) -> list[Arm]:
    """No teleport, the four teleports, and the control of each."""
    import torch

    from metatele.geometry import Curvature, Objective, Sharpness
    from metatele.random import generator
    from metatele.teleport import Ascent, MatchedRandom
    from metatele.training.replicas import Arm

    name, lr = OPTIMIZERS[args.experiment]
    optimizer, plain = getattr(torch.optim, name), {"lr": args.lr or lr}
    settings = SETTINGS[args.settings]
    size = min(_BATCH, samples // max(batches for batches, _ in settings.values()))
    objectives: dict[str, Objective] = {
        # The reference implementation displaces in the positive orthant, the text on the whole sphere.
        "sharpness": Sharpness(_DISPLACEMENTS, args.directions, orthant=args.settings == "ref"),
        "curvature": Curvature(args.curves, truncate=True),  # some pixels are always zero
    }
    result = [Arm(NONE, optimizer, plain)]
    controls = []
    for number, (teleport, (batches, rate)) in enumerate(settings.items()):
        kind, sense = teleport.split()
        move = Ascent(
            objective=objectives[kind],
            rate="line-search" if rate is None else "fixed",
            lr=rate or 0.0,
            steps=_STEPS_FOR[kind],
            descend=sense == "down",
            action="approximate",
            parametrisation="first-order",
            max_drift=_SEARCH_DRIFT if rate is None else math.inf,
        )
        control = MatchedRandom(
            objective=objectives[kind],
            generator=generator(0, "tuning", number),
            action="approximate",
            parametrisation="first-order",
        )
        when: dict[str, Any] = {"epochs": (at,), "batches": batches, "batch_size": size, "state": "keep"}
        result.append(Arm(teleport, optimizer, plain, move, **when))
        controls.append(Arm(CONTROL + teleport, optimizer, plain, control, follows=teleport, **when))
    return result + controls


def halfway(make: Callable[[], Replicas], at: int, file: Path, key: dict[str, Any]) -> Replicas:
    """Train to the teleport, or go on from where an interrupted run of the same settings had come."""
    import torch

    replicas = make()
    if file.is_file():
        try:
            kept = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
            if kept["key"] == key:
                replicas.restore(kept["state"])
                if len(replicas.history.train_loss) != at + 1:
                    raise ValueError
                print(f"going on from {file}", flush=True)
                return replicas
        except Exception:  # whatever a damaged file raises: it is trained anew and replaced
            print(f"{file} cannot be read, training anew", flush=True)
            replicas = make()  # some of it may have been restored
    common.run_arms(replicas, at)
    buffer = io.BytesIO()
    torch.save({"key": key, "state": replicas.state()}, buffer)
    write_atomically(file, buffer.getvalue())
    return replicas


def run(args: Any) -> dict[str, Any]:
    """All arms and seeds in one program; the content of ``results.json``."""
    import torch

    from metatele.perceptron.activations import LeakyReLU
    from metatele.perceptron.mlp import MLP
    from metatele.training.replicas import Replicas

    at = args.epochs // 2 if args.at is None else args.at
    if not 0 <= at < args.epochs:
        raise ConfigError(f"--at must be below --epochs {args.epochs}, got {at}")
    out = common.folder(args.experiment, args)
    data, device = common.prepare(args, out)
    count = common.train_count(data)
    mlp = MLP((data.features, 32, 10, data.classes), LeakyReLU(0.1))
    chosen = arms(args, count, at)

    def alone() -> Replicas:
        return Replicas(data, mlp, chosen[:1], range(args.seeds), count, 20, device)

    key = {
        "dataset": data.sha256,
        "seeds": args.seeds,
        "at": at,
        "optimizer": [chosen[0].optimizer.__name__, chosen[0].settings["lr"]],
        "device": str(device),
    }
    first = halfway(alone, at, out / STATE, key)
    if not all(bool(torch.isfinite(W).all()) for W in first.weights.matrices):
        (out / STATE).unlink(missing_ok=True)
        raise DivergedError(f"training diverged before the teleport at epoch {at}: lower --lr")
    replicas = first.branched(chosen)
    print(f"{len(chosen) - 1} teleports at epoch {at}", flush=True)
    history = common.run_arms(replicas, args.epochs - at)
    doc = common.document(args.experiment, args, data, chosen, history, replicas)
    doc.update(at=at, rates=args.settings, teleport_batch=chosen[1].batch_size, directions=args.directions)
    doc["curves"] = args.curves
    return doc


def _changes(arm: dict[str, Any], key: str = "loss") -> list[float]:
    """For each seed the factor of the loss (or the objective), all batches together."""
    (done,) = arm["teleports"]
    factors = []
    for pairs in zip(*done[key], strict=True):
        known = [b / a if a and b is not None else math.nan for a, b in pairs]
        factors.append(math.prod(known))
    return factors


def mismatch(arm: dict[str, Any], control: dict[str, Any]) -> float:
    """Largest relative error, over batches and seeds, of the drift a control was to have.

    Relative to a drift of at least 1e-5: below it the rounding of the loss counts.
    """
    worst = 0.0
    for theirs, mine in zip(arm["teleports"][0]["loss"], control["teleports"][0]["loss"], strict=True):
        for (a, b), (c, d) in zip(theirs, mine, strict=True):
            if None in (a, b, c, d):
                return math.inf
            wanted = abs(b / a - 1)
            worst = max(worst, abs(abs(d / c - 1) - wanted) / max(wanted, 1e-5))
    return worst


def gaps(arm: dict[str, Any], other: dict[str, Any], key: str) -> list[float | None]:
    """Final losses less those of another arm, paired by seed."""
    pairs = zip((run[-1] for run in arm[key]), (run[-1] for run in other[key]), strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def table(doc: dict[str, Any]) -> list[list[str]]:
    """A row for each arm: where it ends, against no teleport and against its control, and what its teleport did."""
    rows = [
        [
            "teleport",
            "train loss",
            "validation loss",
            "train, against none",
            "validation, against none",
            "validation, against its control",
            "objective x",
            "loss x",
            "largest drift",
            "control's mismatch",
            "undone",
        ]
    ]
    by_name = {arm["name"]: arm for arm in doc["arms"]}
    for arm in doc["arms"]:
        row = [arm["name"], *common.ends(arm, "train_loss", "test_loss")]
        if not arm["teleports"]:
            rows.append(row + [""] * (len(rows[0]) - len(row)))
            continue
        row += [common.cell(gaps(arm, by_name[NONE], key)) for key in ("train_loss", "test_loss")]
        control = by_name.get(CONTROL + arm["name"])
        row.append("" if control is None else common.cell(gaps(arm, control, "test_loss")))
        row += [f"{statistics.median(_changes(arm, key)):.4g}" for key in ("objective", "loss")]
        (done,) = arm["teleports"]
        row.append(f"{max(done['drift']):.2g}")
        row.append("" if control is None else f"{100 * mismatch(arm, control):.2g} %")
        rows.append([*row, str(done["rolled_back"])])
    return rows


def note(doc: dict[str, Any]) -> str:
    """What the table's words mean, and how long it took."""
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in doc["seconds"].items())
    return (
        f"\n{doc['dataset']}, {doc['arms'][0]['optimizer']} at {doc['arms'][0]['settings']['lr']:g}, "
        f"{len(doc['seeds'])} seeds, {doc['epochs']} epochs, teleports at epoch {doc['at']} on batches of "
        f"{doc['teleport_batch']}, settings: {doc['rates']}. Mean and half-width of the 95 % interval (Student's t) of "
        "final losses and of their differences paired by seed. Objective x, loss x: the factors by which the teleport "
        "changed them on its batches, all together, median over seeds; drift: the largest relative change of the loss "
        "on one batch. A control (random like ...) has a random T on the same batches, of the norm that changes the "
        "loss on each by as much (up, where a random T cannot lower it so far); its mismatch is the largest relative "
        "error in that. "
        f"The optimizer's state is kept. Running time: {seconds}."
    )


COLOURS = {"down": figures.COLOURS[1], "up": figures.COLOURS[0]}


def _differences(arm: dict[str, Any], none: dict[str, Any], key: str) -> list[tuple[float, float]]:
    """Of losses from those without teleport, paired by seed, epoch by epoch: mean and half-width."""
    found = [
        [None if a is None or b is None else a - b for a, b in zip(x, y, strict=True)]
        for x, y in zip(arm[key], none[key], strict=True)
    ]
    return [common.interval(column) for column in zip(*found, strict=True)]


def figure(doc: dict[str, Any]) -> bytes:
    """Validation loss against epochs, as in the paper; below, both losses less those without teleport."""
    fig, grid = figures.subplots(3, 2, figsize=(figures.WIDTH, 7.6), layout="constrained", sharey="row")
    by_name = {arm["name"]: arm for arm in doc["arms"]}
    epochs, at = doc["epochs"], doc["at"]
    first = max(0, at - max(2, (epochs - at) // 4))  # what came long before the teleport is the same for all
    size = [0.0, 0.0]
    for column, kind in enumerate(("sharpness", "curvature")):
        looks = {NONE: (figures.COLOURS[-1], "-")}
        for sense, colour in COLOURS.items():
            looks |= {f"{CONTROL}{kind} {sense}": (colour, ":"), f"{kind} {sense}": (colour, "-")}
        for name, (colour, dash) in looks.items():
            style = {"color": colour, "linestyle": dash, "linewidth": 1.4}
            mean = [math.nan if v is None else v for v in _means(by_name[name]["test_loss"])]
            grid[0, column].plot(range(first, epochs + 1), mean[first:], **style)
            for row, key in () if name == NONE else ((1, "train_loss"), (2, "test_loss")):
                spread = _differences(by_name[name], by_name[NONE], key)
                xs = [e for e in range(at, epochs + 1) if math.isfinite(spread[e][0])]
                size[row - 1] = max([size[row - 1], *(abs(spread[e][0]) for e in xs)])
                grid[row, column].plot(xs, [spread[e][0] for e in xs], **style)
                if not name.startswith(CONTROL):
                    halves = [spread[e][1] if math.isfinite(spread[e][1]) else 0.0 for e in xs]
                    low, high = ([spread[e][0] + sign * h for e, h in zip(xs, halves, strict=True)] for sign in (-1, 1))
                    grid[row, column].fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        figures.title(grid[0, column], f"teleports that change {kind}")
        for axes in grid[:, column]:
            axes.margins(x=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        grid[0, column].axvline(at, color=figures.GREY, linewidth=0.8)
        for axes in grid[1:, column]:
            axes.axhline(0, color=figures.COLOURS[-1], linewidth=1.4)
        grid[2, column].set_xlabel("epoch")
    for row, most in enumerate(size, 1):
        grid[row, 0].set_ylim(-1.5 * most - 1e-6, 1.5 * most + 1e-6)  # a wide interval leaves the frame
    said = ("validation loss", "training loss less\nthat without", "validation loss less\nthat without")
    for axes, label in zip(grid[:, 0], said, strict=True):
        axes.set_ylabel(label)
    names = {"without teleport": (figures.COLOURS[-1], "-")}
    for sense, colour in COLOURS.items():
        words = {"down": "it is lowered", "up": "it is raised"}[sense]
        names |= {words: (colour, "-"), f"random, of the drift where {words}": (colour, ":")}
    lines = [grid[0, 0].plot([], [], color=colour, linestyle=dash)[0] for colour, dash in names.values()]
    fig.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=figures.SIZE, columnspacing=1)
    figures.title(
        fig,
        f"{doc['dataset']}, {doc['arms'][0]['optimizer']}, {len(doc['seeds'])} seeds, teleport at epoch {at} "
        f"(settings: {doc['rates']}); means, below with 95 % intervals",
    )
    return figures.png(fig)


def _means(runs: list[list[float | None]]) -> list[float | None]:
    return [None if None in values else statistics.mean(values) for values in zip(*runs, strict=True)]


def main(arguments: Sequence[str], experiment: str = "fig4", description: str | None = __doc__) -> None:
    """Parse, run, print the table."""
    p = common.parser(experiment, description)
    p.add_argument("--settings", choices=SETTINGS, default="ref", help="batches and rates of the teleports")
    p.add_argument("--at", type=int, metavar="EPOCH", help="of the teleport (default: half of --epochs)")
    p.add_argument("--lr", type=float, metavar="X", help=f"of the optimizer (default {OPTIMIZERS[experiment][1]:g})")
    p.add_argument(
        "--directions",
        type=whole_number(1),
        default=10,
        metavar="N",
        help=f"of sharpness, each with {len(_DISPLACEMENTS)} displacements; its time grows in proportion (default 10)",
    )
    p.add_argument("--curves", type=whole_number(1), default=1, metavar="N", help="of curvature (default 1)")
    args = p.parse_args(arguments)
    args.experiment = experiment
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ConfigError(f"--lr must be positive, got {args.lr}")
    out = common.folder(experiment, args)
    doc = common.stored(out, args.experiment) if args.redraw else run(args)
    common.finish(doc, out, table, figure, note=note(doc))
    (out / STATE).unlink(missing_ok=True)
