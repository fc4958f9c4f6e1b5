"""Figure 5: AdaGrad, momentum, RMSprop and Adam on images, with and without one teleport.

MLP d-16-10-10, LeakyReLU 0.1, no biases, cross-entropy, batches of 20; teleport by ascent of the squared
gradient norm on 8 batches of 200, 10 steps each; the optimizer's state is forgotten at a teleport, and an arm
shows what that does alone where there is state to forget. --settings ref (default) has the rates of the reference
implementation, which drew the paper's figure; text has those the paper prints. MNIST with 5 seeds and 40
epochs takes 5 to 8 minutes on 2 cores, digits under one. Figure 13 is the same against time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele import figures
from metatele.errors import ConfigError
from metatele.experiments import images as common

if TYPE_CHECKING:
    from metatele.training.replicas import Arm

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ref": {
        "AdaGrad": {"lr": 1e-2, "teleport_epoch": 2, "teleport_lr": 1e-4},
        "Momentum": {"lr": 1e-3, "teleport_epoch": 0, "teleport_lr": 5e-2},
        "RMSprop": {"lr": 1e-4, "teleport_epoch": 0, "teleport_lr": 5e-2},
        "Adam": {"lr": 1e-4, "teleport_epoch": 0, "teleport_lr": 5e-2},
    },
    "text": {
        "AdaGrad": {"lr": 1e-4, "teleport_epoch": 0, "teleport_lr": 5e-2},
        "Momentum": {"lr": 5e-2, "teleport_epoch": 0, "teleport_lr": 5e-2},
        "RMSprop": {"lr": 5e-2, "teleport_epoch": 0, "teleport_lr": 5e-2},
        "Adam": {"lr": 5e-2, "teleport_epoch": 0, "teleport_lr": 5e-2},
    },
}


def arms(settings: str, train_samples: int) -> list[Arm]:
    """Each optimizer without and with the paper's teleport."""
    import torch

    from metatele.teleport import GradientNormAscent
    from metatele.training.replicas import Arm

    classes = {
        "AdaGrad": (torch.optim.Adagrad, {}),
        "Momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "RMSprop": (torch.optim.RMSprop, {}),
        "Adam": (torch.optim.Adam, {}),
    }
    batches = min(8, train_samples // 200)
    result = []
    for name, (optimizer, fixed) in classes.items():
        s = SETTINGS[settings][name]
        # The paper's move: T = 0 at each step, I + T, a least-squares fit, stop at a squared norm of 100.
        move = GradientNormAscent(
            s["teleport_lr"],
            10,
            cap=100.0,
            action="approximate",
            parametrisation="first-order",
            max_drift=math.inf,
        )
        plain = {"lr": s["lr"], **fixed}
        result.append(Arm(name, optimizer, plain))
        result.append(Arm(f"{name} teleport", optimizer, plain, move, (s["teleport_epoch"],), batches))
        if s["teleport_epoch"]:  # the reference forgets the optimizer's state at a teleport: what does that do alone?
            result.append(Arm(f"{name} reset only", optimizer, plain, resets=(s["teleport_epoch"],)))
    return result


def run(args: Any) -> dict[str, Any]:
    """All arms and seeds in one program; the content of ``results.json``."""
    from metatele.perceptron.activations import LeakyReLU
    from metatele.perceptron.mlp import MLP
    from metatele.training.replicas import Replicas

    data, device = common.prepare(args, common.folder(args.experiment, args))
    count = common.train_count(data)
    chosen = arms(args.settings, count)
    late = [
        arm.name
        for arm in chosen
        if max((*arm.resets, *arm.epochs) if arm.teleport else arm.resets, default=0) >= args.epochs
    ]
    if late:
        raise ConfigError(f"--epochs {args.epochs} ends before {' and '.join(late)} would act")
    mlp = MLP((data.features, 16, 10, data.classes), LeakyReLU(0.1))
    replicas = Replicas(data, mlp, chosen, range(args.seeds), count, 20, device)
    doc = common.document("fig5", args, data, chosen, common.run_arms(replicas, args.epochs), replicas)
    doc["rates"] = args.settings
    return doc


def main(arguments: Sequence[str], experiment: str = "fig5", description: str | None = __doc__) -> None:
    """Parse, run, print the table."""
    p = common.parser(experiment, description)
    if experiment == "fig13":
        p.add_argument(
            "--runs", metavar="FOLDER", help="draw the runs that fig5 left there, without running them again"
        )
    p.add_argument("--settings", choices=SETTINGS, default="ref", help="learning rates (default ref)")
    args = p.parse_args(arguments)
    args.experiment = experiment
    out = common.folder(experiment, args)
    earlier = out if args.redraw else getattr(args, "runs", None)
    doc = run(args) if earlier is None else common.stored(Path(earlier))
    if earlier is not None and not args.redraw:
        args.dataset = doc["dataset"]
        out = common.folder(experiment, args)
    common.finish(doc, out, common.final_table, figure if experiment == "fig5" else runtime_figure)
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in doc["seconds"].items()))


def _panels(doc: dict[str, Any], x_label: str, abscissa: Any) -> bytes:
    fig, grid = figures.subplots(2, 2, figsize=(figures.WIDTH, 6.4), layout="constrained")
    by_name = {arm["name"]: arm for arm in doc["arms"]}
    red, blue, *_, black = figures.COLOURS
    for axes, name in zip(grid.flat, SETTINGS["ref"], strict=True):
        # What nearly coincides lies in this order: the reset alone, which is wider, none, the teleport.
        looks = {f"{name} reset only": (blue, 4.0), name: (black, 1.6), f"{name} teleport": (red, 1.6)}
        for label, (colour, width) in looks.items():
            if label not in by_name:
                continue
            arm, short = by_name[label], label.removeprefix(name).strip() or "without"
            for key, split, dash in (("train_loss", "train", "-"), ("test_loss", "test", "--")):
                style: dict[str, Any] = {"color": colour, "linewidth": width, "linestyle": dash}
                style["alpha"] = 0.45 if width > 2 else 1.0
                common.draw_band(axes, abscissa(arm), arm[key], label=f"{short}, {split}", **style)
        figures.title(axes, name)
        axes.set_xlabel(x_label)
        axes.set_ylabel("loss")
        axes.margins(x=0)
        figures.loss_axes(axes, since=1)
    what = f"{doc['dataset']}, mean and one standard deviation over {len(doc['seeds'])} seeds, rates: {doc['rates']}"
    figures.title(fig, f"{what}; dashed: test")
    for axes in grid.flat:
        figures.label_lines(axes)
    return figures.png(fig, tones=128)


def figure(doc: dict[str, Any]) -> bytes:
    """Loss against epoch, both splits."""
    return _panels(doc, "epoch", lambda arm: range(doc["epochs"] + 1))


def runtime_figure(doc: dict[str, Any]) -> bytes:
    """Loss against the seconds one replica takes: its share of the program's time, and its own teleports.

    All replicas advance together, so a step is timed as its share of the program's; a teleport's time is that
    of its arm's replicas together, divided by their number, and stands where it was made.
    """
    replicas = len(doc["seeds"]) * len(doc["arms"])
    epoch_s = doc["seconds"]["steps"] / doc["epochs"] / replicas

    def seconds(arm: dict[str, Any]) -> list[float]:
        return [
            epoch * epoch_s + sum(t["seconds"] / len(doc["seeds"]) for t in arm["teleports"] if t["epoch"] < epoch)
            for epoch in range(doc["epochs"] + 1)
        ]

    return _panels(doc, "seconds of one replica", seconds)
