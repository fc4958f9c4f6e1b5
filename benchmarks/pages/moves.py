"""The claims of section 4.4: Figures 4 and 11."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial as given

from benchmarks.pages.model import ABOVE_0, BELOW_0, Check, Claim, Interval, Outcome, Table, said, stored
from metatele.experiments.fig4 import CONTROL, NONE, _changes, gaps

# --- Figures 4 and 11

_FIG4 = {
    "fig4-cifar10": "CIFAR-10, the reference's rates",
    "fig4-cifar10-search": "CIFAR-10, line search",
    "fig4-digits": "digits, the reference's rates",
    "fig4-digits-text": "digits, the text's rates",
    "fig4-digits-search": "digits, line search",
}
_FIG11 = {"fig11-cifar10": "CIFAR-10", "fig11-digits": "digits"}
_REBUILD_FIG4 = """
metatele experiments fig4 --dataset cifar10 --data-root DATA --out results/fig4-cifar10    # 25 minutes
metatele experiments fig4 --settings search --dataset cifar10 --data-root DATA --out results/fig4-cifar10-search
metatele experiments fig4 --out results/fig4-digits                                        # 15 seconds
metatele experiments fig4 --settings text --out results/fig4-digits-text
metatele experiments fig4 --settings search --out results/fig4-digits-search
"""
_REBUILD_FIG11 = """
metatele experiments fig11 --dataset cifar10 --data-root DATA --out results/fig11-cifar10   # 25 minutes
metatele experiments fig11 --out results/fig11-digits                                      # 15 seconds
"""
_MORE_FIG4 = "More: [Figures 4 and 11](../geometry-and-theory.md#figures-4-and-11-of-the-paper)."
_HALFWAY = (
    "A perceptron trained for 40 epochs, with one teleport at epoch 20, over 5 seeds. The last losses are compared, "
    "paired by seed. A control is a random teleport that changes the loss on the same batches by as much."
)


class _Runs:
    """One stored run of fig4 or fig11: differences of last losses, paired by seed."""

    def __init__(self, folder: str) -> None:
        self.arms = {arm["name"]: arm for arm in stored(f"{folder}/results.json")["arms"]}

    def against(self, name: str, other: str, key: str = "test_loss") -> Interval:
        return Interval.of(gaps(self.arms[name], self.arms[other], key))

    def none(self, name: str) -> Interval:
        return self.against(name, NONE)

    def control(self, name: str) -> Interval:
        return self.against(name, CONTROL + name)

    def changed(self, name: str) -> str:
        values = _changes(self.arms[name], "objective")
        return f"{sorted(values)[len(values) // 2]:.3f}"


def _rows(folders: dict[str, str], kind: str) -> list[list[str]]:
    rows = []
    for folder, words in folders.items():
        runs = _Runs(folder)
        for sense in ("up", "down"):
            name = f"{kind} {sense}"
            rows.append([words, sense, runs.changed(name), runs.none(name).shown(), runs.control(name).shown()])
    return rows


def _moves_table(folders: dict[str, str], kind: str, symbol: str) -> Table:
    return Table(
        f"Last validation loss, less that without a teleport and less that of the control; {symbol} is multiplied by "
        "the factor shown, the median over seeds.",
        ["run", symbol, "factor", "against none", "against its control"],
        _rows(folders, kind),
    )


def _lower(words: str, runs: _Runs, name: str, counted: bool = True) -> list[Check]:
    """That a teleport lowers the validation loss: against none, and against a random one."""
    none, control = runs.none(name), runs.control(name)
    return [
        Check(f"{words}: below no teleport", none.shown(), BELOW_0, none.below(0), counted),
        Check(f"{words}: below a random teleport", control.shown(), BELOW_0, control.below(0), counted),
    ]


def _figure4_sharpness() -> Outcome:
    checks = []
    for folder in ("fig4-cifar10", "fig4-cifar10-search"):
        runs, words = _Runs(folder), _FIG4[folder]
        checks += _lower(f"{words}, φ lowered", runs, "sharpness down")
        up = runs.none("sharpness up")
        checks.append(
            Check(
                f"{words}, φ raised: no effect", up.shown(), "interval holds 0", not (up.below(0) or up.above(0)), False
            )
        )
    runs = _Runs("fig4-digits")
    checks += _lower("Digits, the reference's rates, φ lowered", runs, "sharpness down", False)
    first = _Runs("fig4-cifar10").none("sharpness down")
    search = _Runs("fig4-cifar10-search").none("sharpness up")
    return Outcome(
        f"On CIFAR-10 lowering φ changes the validation loss by {first.shown()}. "
        + said("That is within chance.", not first.below(0)),
        f"φ down: loss {first.shown()}",
        checks,
        [_moves_table(_FIG4, "sharpness", "φ")],
        [
            said(
                "On digits lowering φ ends below no teleport, but not below a random teleport.",
                checks[-2].met and not checks[-1].met,
            )
            + " The teleport's error lowers the loss on its batches, which may be all of the gain.",
            f"With the line search, raising φ on CIFAR-10 changes the loss by {search.shown()}.",
            "φ is nearly the training loss at these displacements: see [Table 1](table-1-sharpness.md).",
        ],
    )


def _figure4_curvature() -> Outcome:
    checks = []
    for folder in ("fig4-cifar10", "fig4-cifar10-search"):
        runs, words = _Runs(folder), _FIG4[folder]
        checks += _lower(f"{words}, ψ raised", runs, "curvature up")
        down = runs.none("curvature down")
        checks.append(Check(f"{words}, ψ lowered: above no teleport", down.shown(), ABOVE_0, down.above(0)))
    for folder in ("fig4-digits", "fig4-digits-text", "fig4-digits-search"):
        checks += _lower(f"{_FIG4[folder].capitalize()}, ψ raised", _Runs(folder), "curvature up", False)[1:]
    up = _Runs("fig4-cifar10-search").none("curvature up")
    ref = _Runs("fig4-cifar10")
    digits = _Runs("fig4-digits").changed("curvature up")
    return Outcome(
        f"On CIFAR-10, raising ψ {_Runs('fig4-cifar10-search').changed('curvature up')}-fold by a line search changes "
        f"the validation loss by {up.shown()}. "
        + said("It is within chance, and so is lowering ψ.", not any(check.met for check in checks)),
        f"ψ up: loss {up.shown()}",
        checks,
        [_moves_table(_FIG4, "curvature", "ψ")],
        [
            f"At the reference's rates the teleport multiplies ψ on CIFAR-10 by {ref.changed('curvature up')}. "
            "So those runs test little. The line search does.",
            f"On digits, at the reference's rates, the step that should raise ψ overshoots: {digits} times.",
            f"An effect smaller than {up.half:.3f}, the half-width of 5 seeds, would not show with the line search.",
        ],
    )


def _gap(runs: _Runs, name: str) -> Interval:
    """Change of validation less training loss, against no teleport."""
    gap = [
        (v, t)
        for v, t in zip(
            gaps(runs.arms[name], runs.arms[NONE], "test_loss"),
            gaps(runs.arms[name], runs.arms[NONE], "train_loss"),
            strict=True,
        )
    ]
    return Interval.of([None if v is None or t is None else v - t for v, t in gap])


def _figure11() -> Outcome:
    runs = _Runs("fig11-cifar10")
    checks = _lower("CIFAR-10, ψ raised", runs, "curvature up")
    gap = _gap(runs, "curvature down")
    checks.append(
        Check(
            "CIFAR-10, ψ lowered: wider gap between training and validation loss",
            gap.shown(),
            ABOVE_0,
            gap.above(0),
        )
    )
    for sense in ("down", "up"):
        found = runs.none(f"sharpness {sense}")
        holds = not (found.below(0) or found.above(0))
        words = "lowered" if sense == "down" else "raised"
        checks.append(Check(f"CIFAR-10, φ {words}: no effect", found.shown(), "interval holds 0", holds, False))
    checks += _lower("Digits, ψ raised", _Runs("fig11-digits"), "curvature up", False)
    up = runs.none("curvature up")
    down = runs.control("sharpness down")
    said = (
        f"φ lowered on CIFAR-10 ends below its control, by {down.shown()}. There the teleport's error lowers the loss, "
        "and the control's raises it."
    )
    return Outcome(
        f"Under AdaGrad on CIFAR-10 the teleport that should raise ψ multiplies it by {runs.changed('curvature up')}, "
        "and "
        f"the validation loss changes by {up.shown()}. So at the reference's rates this is hardly a test of ψ.",
        f"ψ up: loss {up.shown()}, ψ hardly moved",
        checks,
        [_moves_table(_FIG11, "curvature", "ψ"), _moves_table(_FIG11, "sharpness", "φ")],
        [
            "A line search, which would move ψ, was not run under AdaGrad on CIFAR-10.",
            f"On digits the teleport multiplies ψ by {_Runs('fig11-digits').changed('curvature up')}, without an "
            "effect "
            "beyond its interval.",
            *([said] if down.below(0) else []),
        ],
    )


def _sources(folders: Sequence[str]) -> list[str]:
    return [f"{folder}/results.json" for folder in folders]


_figure4 = given(
    Claim,
    setting=_HALFWAY,
    sources=_sources(list(_FIG4)),
    rebuild=_REBUILD_FIG4,
    more=_MORE_FIG4,
)
CLAIMS = [
    _figure4(
        "figure-4-sharpness",
        "Figure 4: do flatter points generalise better?",
        "Figure 4, left",
        says="teleporting to flatter points improves the validation loss slightly, to sharper points it has no effect.",
        figure=("fig4-cifar10/loss.png", "CIFAR-10, SGD; left φ, right ψ; below, the difference to no teleport"),
        read=_figure4_sharpness,
    ),
    _figure4(
        "figure-4-curvature",
        "Figure 4: do more curved points generalise better?",
        "Figure 4, right",
        says="teleporting to larger curvature lowers the validation loss, to smaller curvature it does the opposite.",
        figure=(
            "fig4-cifar10-search/loss.png",
            "CIFAR-10, SGD, teleports by line search; left φ, right ψ; below, the difference to no teleport",
        ),
        read=_figure4_curvature,
    ),
    Claim(
        "figure-11",
        "Figure 11: is it so under AdaGrad?",
        "Figure 11, appendix E.4",
        says="under AdaGrad larger curvature lowers the validation loss slightly, and smaller curvature widens the gap "
        "between training and validation loss.",
        setting=_HALFWAY,
        sources=_sources(list(_FIG11)),
        figure=("fig11-cifar10/loss.png", "CIFAR-10, AdaGrad; left φ, right ψ; below, the difference to no teleport"),
        rebuild=_REBUILD_FIG11,
        read=_figure11,
        more=_MORE_FIG4,
    ),
]
