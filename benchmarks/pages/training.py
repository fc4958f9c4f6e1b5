"""The claims about standard optimizers: Figures 5, 12 and 13."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.pages.model import (
    BELOW_0,
    BELOW_1,
    Check,
    Claim,
    Doc,
    Interval,
    Outcome,
    Table,
    differences,
    factor,
    said,
    short,
    span,
    stored,
)

_NAMES = ("AdaGrad", "Momentum", "RMSprop", "Adam")
_FIG5 = {
    "fig5-mnist": "MNIST, the reference's rates",
    "fig5-mnist-text": "MNIST, the text's rates",
    "fig5-fashion-mnist": "Fashion-MNIST, the reference's rates",
    "fig5-digits": "digits, the reference's rates",
}
_REBUILD_FIG5 = """
metatele experiments fig5 --dataset mnist --data-root DATA --out results/fig5-mnist              # 5 to 8 minutes
metatele experiments fig5 --dataset mnist --data-root DATA --settings text --out results/fig5-mnist-text
metatele experiments fig5 --dataset fashion-mnist --data-root DATA --out results/fig5-fashion-mnist
metatele experiments fig5 --out results/fig5-digits                                              # under a minute
"""


def arms_of(folder: str) -> dict[str, Doc]:
    """The arms of a stored run by name."""
    return {arm["name"]: arm for arm in stored(f"{folder}/results.json")["arms"]}


def _average(run: Sequence[float | None]) -> float | None:
    """Of the curve, without its beginning."""
    known = [v for v in run[1:] if v is not None]
    return statistics.fmean(known) if len(known) == len(run) - 1 else None


def _last(run: Sequence[float | None]) -> float | None:
    return run[-1]


def _difference(folder: str, arm: str, other: str, key: str, last: bool = False) -> Interval:
    arms, read = arms_of(folder), _last if last else _average
    return Interval.of(differences([read(r) for r in arms[arm][key]], [read(r) for r in arms[other][key]]))


def last_difference(folder: str, arm: str, other: str, key: str) -> Interval:
    """Of two arms at the last epoch, paired by seed."""
    return _difference(folder, arm, other, key, last=True)


def _control(folder: str, name: str) -> tuple[str, str]:
    """The arm to compare with, and its name in words."""
    reset = f"{name} reset only"
    return (reset, "below the reset alone") if reset in arms_of(folder) else (name, "below no teleport")


def _figure5() -> Outcome:
    checks, rows = [], []
    for folder in ("fig5-mnist", "fig5-fashion-mnist"):
        for name in _NAMES:
            control, words = _control(folder, name)
            found = _difference(folder, f"{name} teleport", control, "train_loss")
            where = "MNIST" if folder == "fig5-mnist" else "Fashion-MNIST"
            checks.append(
                Check(
                    f"{where}, {name}: {words}",
                    found.shown(),
                    BELOW_0,
                    found.below(0),
                    folder == "fig5-mnist",
                )
            )
    for folder, words in _FIG5.items():
        for name in _NAMES:
            teleport = f"{name} teleport"
            curve = _difference(folder, teleport, name, "train_loss")
            rows.append(
                [
                    words,
                    name,
                    curve.shown(),
                    last_difference(folder, teleport, name, "train_loss").shown(),
                    last_difference(folder, teleport, name, "test_loss").shown(),
                ]
            )
    resets = [
        [
            _FIG5[folder],
            _difference(folder, "AdaGrad reset only", "AdaGrad", "train_loss").shown(),
            _difference(folder, "AdaGrad teleport", "AdaGrad reset only", "train_loss").shown(),
            last_difference(folder, "AdaGrad teleport", "AdaGrad reset only", "test_loss").shown(),
        ]
        for folder in _FIG5
        if "AdaGrad reset only" in arms_of(folder)
    ]
    met = [c for c in checks if c.counted and c.met]
    rises = {folder: _growth(folder) for folder in ("fig5-mnist", "fig5-fashion-mnist")}
    momentum = _difference("fig5-mnist", "Momentum teleport", "Momentum", "train_loss")
    return Outcome(
        f"On MNIST the teleport speeds up {len(met) or 'none'} of the four optimizers beyond the interval. "
        f"Momentum's training loss, averaged over the epochs, changes by {momentum.shown()}.",
        f"{len(met)} of 4 faster on MNIST",
        checks,
        [
            Table(
                "Loss with the teleport less that without, paired over 5 seeds.",
                ["run", "optimizer", "mean training loss", "last training loss", "last test loss"],
                rows,
            ),
            Table(
                "AdaGrad gains from the reset of its state that the reference makes at a teleport.",
                ["run", "the reset alone, against none", "teleport, against the reset", "last test loss, the same"],
                resets,
            ),
        ],
        [
            f"The teleport multiplies the squared gradient norm by {rises['fig5-mnist']:.2g} on MNIST and "
            f"{rises['fig5-fashion-mnist']:.2g} on Fashion-MNIST (momentum, median).",
            said(
                "AdaGrad is better with a teleport, but not because of it: the reset alone is as good. ",
                _difference("fig5-mnist", "AdaGrad teleport", "AdaGrad", "train_loss").below(0) and not checks[0].met,
            )
            + "With the text's rates the reset alone was not run.",
            f"Of the {len(rows)} rows of the first table, one in twenty would stand out by chance in each column.",
            "With each rate tuned, eight optimizers and six ways to teleport gain nothing either "
            "([every learning rate tuned](../does-it-help.md#every-learning-rate-tuned)).",
        ],
    )


def _growth(folder: str) -> float:
    (done,) = arms_of(folder)["Momentum teleport"]["teleports"]
    return statistics.median(r for r in done["objective_ratio"] if r is not None)


# --- Figure 13


def _shares(folder: str) -> dict[str, float]:
    """Time of a teleport over that of an epoch of one replica, by optimizer."""
    doc = stored(f"{folder}/results.json")
    replicas = len(doc["seeds"]) * len(doc["arms"])
    epoch_s = doc["seconds"]["steps"] / doc["epochs"] / replicas
    return {
        arm["name"].removesuffix(" teleport"): sum(t["seconds"] for t in arm["teleports"]) / len(doc["seeds"]) / epoch_s
        for arm in doc["arms"]
        if arm["teleports"]
    }


def _cost() -> Outcome:
    alone = stored("benchmarks/teleport.json")
    checks = [
        Check(
            "MNIST, an ordinary loop of one network, timed once",
            f"{alone['teleport_in_epochs']:.2f} of an epoch",
            "below 1",
            alone["teleport_in_epochs"] < 1,
            counted=False,
        )
    ]
    rows = []
    for folder, words in _FIG5.items():
        shares = _shares(folder)
        found = Interval.of(list(shares.values()))
        if folder.startswith("fig5-mnist"):
            checks.append(
                Check(
                    f"{words}, replicas in one program",
                    f"{found.shown(2, '')} of an epoch, over the four optimizers",
                    "whole interval below\u00a01",
                    found.below(1),
                )
            )
        rows.append([words, *(f"{shares[name]:.2f}" for name in _NAMES)])
    mnist = [v for folder in ("fig5-mnist", "fig5-mnist-text") for v in _shares(folder).values()]
    samples = stored("fig5-digits/results.json")["train_samples"]
    small = Interval.of(list(_shares("fig5-digits").values()))
    wide = {
        r["width"]: r["over_adam_least"]
        for r in stored("benchmarks/optimizer_step.json")["rows"]
        if r["method"] == "Teleport(Adam), every 100"
    }
    return Outcome(
        f"The paper's teleport takes {alone['teleport_in_epochs']:.2f} of an epoch of one network on MNIST. "
        f"In our batched runs, where epochs are cheap, it takes {span(mnist)}.",
        f"{span([alone['teleport_in_epochs'], *mnist])} of an epoch",
        checks,
        [
            Table(
                "Time of one teleport over that of one epoch; a replica's share of a program that trains all together.",
                ["run", *_NAMES],
                rows,
            )
        ],
        [
            f"On digits, where an epoch has {samples} samples, a teleport takes {short(small.mean)} epochs.",
            f"A teleport every 100 steps makes a step of Adam {wide[256]:.1f} times as long at width 256, and "
            f"{wide[1024]:.1f} times at 1024 ([speed](../speed.md#one-step-of-an-optimizer)).",
            "A cheap teleport is not yet a useful one: see [Figure 5](figure-5.md).",
        ],
    )


# --- Figure 12


def _after(losses: Sequence[float | None], begin: int, end: int) -> float | None:
    """Mean logarithm of a stretch of a curve."""
    part = losses[begin : end + 1]
    return None if None in part else statistics.fmean(math.log(max(v or 0.0, 1e-30)) for v in part)


def _ratio(arm: str, other: str, begin: int, end: int) -> Interval:
    arms = arms_of("fig12")
    return Interval.of(differences(*([_after(run, begin, end) for run in arms[name]["loss"]] for name in (arm, other))))


def _figure12() -> Outcome:
    last = stored("fig12/results.json")["steps"]
    counted = {
        "Momentum, carried": ("Momentum", "Momentum, its buffer carried along: below no teleport"),
        "Momentum, kept": ("Momentum", "Momentum, its buffer kept: below no teleport"),
        "Momentum, reset": ("Momentum", "Momentum, its buffer reset: below no teleport"),
        "AdaGrad, ‖∇L‖²": ("AdaGrad", "AdaGrad, ascent of ‖∇L‖²: below no teleport"),
        "AdaGrad, ‖∇L‖²_A": ("AdaGrad", "AdaGrad, ascent of ‖∇L‖²_A: below no teleport"),
    }
    checks = []
    for arm, (other, words) in counted.items():
        found = _ratio(arm, other, 6, last)
        checks.append(Check(words, factor(found), BELOW_1, found.below(0)))
    found = _ratio("AdaGrad, ‖∇L‖²_A", "AdaGrad, ‖∇L‖²", 6, last)
    checks.append(Check("AdaGrad: ‖∇L‖²_A better than ‖∇L‖²", factor(found), BELOW_1, found.below(0)))
    for arm, other in (("Momentum, carried, line search", "Momentum"), ("AdaGrad, ‖∇L‖²_A, line search", "AdaGrad")):
        found = _ratio(arm, other, 6, last)
        checks.append(Check(f"{arm}: below no teleport", factor(found), BELOW_1, found.below(0), False))
    rows = [
        [arm, *(factor(_ratio(arm, arm.split(",")[0], step, step)) for step in (10, 30, 100, last))]
        for arm in arms_of("fig12")
        if "," in arm
    ]
    carried = _ratio("Momentum, carried", "Momentum", 6, last)
    early = _ratio("AdaGrad, ‖∇L‖²_A, line search", "AdaGrad", 30, 30)
    late = _ratio("AdaGrad, ‖∇L‖²_A, line search", "AdaGrad", last, last)
    reset = _ratio("Momentum, reset", "Momentum", last, last)
    return Outcome(
        said(
            "At the paper's rates no way to teleport lowers the loss beyond its interval.",
            not any(check.met for check in checks if check.counted),
        )
        + f" Momentum, carried along, has {factor(carried)} times the loss without.",
        f"momentum: loss × {factor(carried)}",
        checks,
        [
            Table(
                "Loss over that of the same optimizer without a teleport, after so many steps; geometric mean, 95 % "
                "interval.",
                ["arm", "10", "30", "100", str(last)],
                rows,
            )
        ],
        [
            said(f"Resetting momentum does harm: {factor(reset)} times the loss after {last} steps.", reset.above(0)),
            said(
                f"What helps is a line search on ‖∇L‖²_A under AdaGrad, early: {factor(early)} times the loss after 30 "
                "steps. It does not last.",
                early.below(0) and not late.below(0),
            ),
            "The paper prints no learning rates for the optimizers here. Ours were tuned on other problems, one for "
            "all "
            "arms of an optimizer.",
            "Five runs: the intervals are wide.",
        ],
    )


CLAIMS = [
    Claim(
        "figure-5",
        "Figure 5: does a teleport speed up standard optimizers?",
        "Figure 5, section 5.1",
        "one teleport at the start improves the convergence rate of AdaGrad, momentum, RMSprop and Adam on MNIST.",
        "A perceptron 784-16-10-10, 40 epochs, 5 seeds, one teleport by ascent of the squared gradient norm on 8 "
        "batches. Compared is the training loss averaged over the epochs, paired by seed. AdaGrad's teleport also "
        "resets "
        "its state, so it is compared with the reset alone.",
        [f"{folder}/results.json" for folder in _FIG5],
        ("fig5-mnist/loss.png", "MNIST, with and without the teleport; means and one standard deviation over 5 seeds"),
        _REBUILD_FIG5,
        _figure5,
        "More: [teleports by hand](../does-it-help.md#teleports-by-hand), on a CNN and a GPT too.",
    ),
    Claim(
        "figure-13",
        "Figure 13: does a teleport cost less than an epoch?",
        "Figure 13, section 5.1",
        "a teleport takes less time than one epoch of training.",
        "The teleport of Figure 5, 8 batches with 10 ascent steps each, was timed beside an epoch of the same network.",
        ["benchmarks/teleport.json", *(f"{folder}/results.json" for folder in _FIG5)],
        ("fig13-mnist/loss.png", "The runs of Figure 5 against seconds of one network"),
        "python benchmarks/teleport.py --json results/benchmarks/teleport.json\n"
        "metatele experiments fig13 --dataset mnist --runs results/fig5-mnist --out results/fig13-mnist",
        _cost,
        "More: [what a teleport costs](../speed.md).",
    ),
    Claim(
        "figure-12",
        "Figure 12: do momentum and AdaGrad gain from a teleport?",
        "Figure 12, appendix F.1",
        "every way of teleporting momentum improves convergence, and for AdaGrad the norm ‖∇L‖_A is slightly the "
        "better "
        "objective.",
        "The paper's regression with three layers, 300 steps, one teleport after step 5, 5 runs. Compared is the mean "
        "log loss of steps 6 to 300, as a factor.",
        ["fig12/results.json"],
        ("fig12/loss.png", "Loss of momentum, left, and AdaGrad, right"),
        "metatele experiments fig12 --out results/fig12   # 1 minute",
        _figure12,
        "More: [small problems](../does-it-help.md#small-problems).",
    ),
]
