"""Tables of the pages on teleports and geometry: small networks, a CNN and a GPT, Table 1."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

from benchmarks.pages.geometry import correlation_of, left_of, r_shown
from benchmarks.pages.model import Interval, Table, differences, short, stored
from benchmarks.pages.training import arms_of, last_difference
from metatele.experiments.table1 import PAPER

_FULL = ("default", "transfer", "Adam", "Levenberg-Marquardt")
_NAMES = ("AdaGrad", "Momentum", "RMSprop", "Adam")


def full_batch() -> str:
    """Mean losses at the last step of the twelve kinds on one batch."""
    from metatele.tasks.held_out import REGRESSIONS

    doc = stored("benchmarks/full_batch.json")
    rows = {(row["kind"], row["method"]): row for row in doc["rows"]}

    def cell(kind: str, method: str) -> str:
        if (kind, method) not in rows:
            return ""
        ends = [losses[-1] for losses in rows[kind, method]["losses"]]
        return "lost" if None in ends else f"{statistics.fmean(ends):.2g}"

    kinds = dict.fromkeys(kind for kind, _ in rows)
    cells = [
        [
            f"{REGRESSIONS[kind].title}, {'-'.join(map(str, REGRESSIONS[kind].mlp.widths))}, "
            f"{REGRESSIONS[kind].samples} samples",
            *(cell(kind, method) for method in _FULL),
        ]
        for kind in kinds
    ]
    head = ["task", "default", "`transfer`", "Adam", "Levenberg-Marquardt"]
    return Table("", head, cells).shown()


# --- a CNN and a GPT

_MOVES = {
    "ascent, start": "ascent, at the start",
    "ascent, every 50": "ascent, every 50",
    "balance, start": "balance, at the start",
    "balance, every 50": "balance, every 50",
    "random, every 50": "random, every 50",
}
_NETWORKS = {"gpt": "GPT", "cnn": "CNN"}


def modules() -> str:
    """Held-out loss with moves less that without, on a CNN and a GPT; not where that without diverged."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in stored("benchmarks/modules.json")["rows"]:
        found.setdefault((row["network"], row["optimizer"]), {})[row["arm"]] = row["held_out"]
    rows = [
        [
            f"{_NETWORKS[network]}, {optimizer}",
            *(Interval.of(differences(arms[move], arms["none"])).shown(3) for move in _MOVES),
        ]
        for (network, optimizer), arms in found.items()
        if None not in arms["none"]
    ]
    return Table("", ["network, optimizer", *_MOVES.values()], rows).shown()


# --- Figure 5


def figure5_mnist() -> str:
    """Where each arm ends on MNIST, and what its teleport did."""
    rows = []
    for name, arm in arms_of("fig5-mnist").items():
        ends = [
            Interval.of([run[at] for run in arm[key]]).shown(4, "")
            for key, at in (("train_loss", -1), ("test_loss", -1), ("test_accuracy", -1), ("train_loss", 1))
        ]
        done = arm["teleports"]
        ratios = [r for t in done for r in t["objective_ratio"] if r is not None]
        drifts = [d for t in done for d in t["drift"]]
        did = [short(statistics.median(ratios), 3), short(max(drifts))] if done else ["", ""]
        rows.append([name, *ends, *did])
    head = ["arm", "train loss", "test loss", "test accuracy", "train loss after 1 epoch"]
    return Table("", [*head, "factor on grad norm²", "largest change of a batch's loss"], rows).shown()


def figure5_fashion() -> str:
    """The teleport's differences on Fashion-MNIST."""
    rows = [
        [words, *(last_difference("fig5-fashion-mnist", f"{n} teleport", n, key).shown(3) for n in _NAMES)]
        for words, key in (("training loss", "train_loss"), ("test loss", "test_loss"))
    ]
    head = ["Fashion-MNIST, after 40 epochs", *(n if n != "Momentum" else "momentum" for n in _NAMES)]
    return Table("", head, rows).shown()


def figure5_text() -> str:
    """Training losses at the rates that the paper prints."""
    arms = arms_of("fig5-mnist-text")
    rows = [
        [words, *(Interval.of([run[-1] for run in arms[n + ending]["train_loss"]]).shown(3, "") for n in _NAMES)]
        for words, ending in (("without teleport", ""), ("with teleport", " teleport"))
    ]
    head = ["training loss, printed rates", *(n if n != "Momentum" else "momentum" for n in _NAMES)]
    return Table("", head, rows).shown()


def beyond() -> str:
    """How many of the comparisons at tuned rates stand out."""
    arms = arms_of("optimizers-beyond-digits")
    rows = []
    for words, key in (("test loss", "test_loss"), ("training loss", "train_loss")):
        count: Counter[str] = Counter()
        for name, arm in arms.items():
            optimizer, teleport = name.split(", ", 1)
            if teleport == "none":
                continue
            ends = ([run[-1] for run in a[key]] for a in (arm, arms[f"{optimizer}, none"]))
            found = Interval.of(differences(*ends))
            lost = not math.isfinite(found.mean)
            count["diverged" if lost else "better" if found.below(0) else "worse" if found.above(0) else "alike"] += 1
        rows.append([words, *(f"{count[k]}" for k in ("better", "worse", "diverged"))])
        total = sum(count.values())
    return Table("", [f"of {total} comparisons", "better", "worse", "diverged"], rows).shown()


# --- Table 1


def table1() -> str:
    """Both correlations on the paper's sets, beside the paper's."""
    titles = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10, 3072-128-32-10"}
    rows = [
        [
            f"{titles[name]} ([table](../results/table1-{name}/table.md))",
            r_shown(correlation_of(name, "sharpness")),
            f"{phi:.3f}",
            f"{correlation_of(name, 'train_loss')[0]:+.2f}",
            f"{left_of(name, 'sharpness'):+.2f}",
            r_shown(correlation_of(name, "curvature")),
            f"{psi:.3f}",
        ]
        for name, (phi, psi) in PAPER.items()
    ]
    head = ["data set", "φ", "paper", "training loss alone", "φ given the training loss", "ψ", "paper"]
    return Table("", head, rows).shown()


TABLES = {
    "full-batch": full_batch,
    "modules": modules,
    "figure-5-mnist": figure5_mnist,
    "figure-5-fashion": figure5_fashion,
    "figure-5-text": figure5_text,
    "beyond": beyond,
    "table-1": table1,
}
