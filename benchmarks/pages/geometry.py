"""The claims of section 4: Table 1, Figures 4 and 11."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial as given

from benchmarks.pages.model import Check, Claim, Doc, Interval, Outcome, Table, said, span, stored
from metatele.experiments.fig4 import CONTROL, NONE, _changes, gaps
from metatele.experiments.table1 import PAPER, known, partial, pearson

_SETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
_TABLE1 = [f"table1-{name}/results.json" for name in _SETS]
_CNN = "benchmarks/table1_cnn.json"
_REBUILD_TABLE1 = """
metatele experiments table1 --dataset mnist --data-root DATA --out results/table1-mnist    # 3 to 11 minutes
metatele experiments table1 --dataset fashion-mnist --data-root DATA --out results/table1-fashion-mnist   # 5 minutes
metatele experiments table1 --dataset cifar10 --data-root DATA --out results/table1-cifar10   # 40 to 60 minutes
metatele experiments table1 --out results/table1-digits                                    # 10 seconds
python benchmarks/table1_cnn.py --data-root DATA --json results/benchmarks/table1_cnn.json
"""
_MORE_TABLE1 = "More: [the geometry of minima](../geometry-and-theory.md), with the functions that measure φ and ψ."
_NETWORKS = (
    "100 perceptrons were trained from different seeds on each image set, for 40 epochs. On their training batches φ "
    "was averaged over 200 directions, and ψ over 200 curves. r is Pearson's correlation with the validation loss, "
    "with "
    "its 95 % interval by Fisher's transformation."
)


def _r(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.2f} ({values[1]:+.2f} to {values[2]:+.2f})"


def _table1(name: str) -> Doc:
    found: Doc = stored(f"table1-{name}/results.json")
    return found


def _correlations(name: str, quantity: str) -> tuple[float, float, float]:
    doc = _table1(name)
    return pearson(*known(dict(doc), quantity))


def _left(name: str, quantity: str) -> float:
    """What is left of a correlation, given the training loss."""
    doc = dict(_table1(name))
    return partial(*known(doc, quantity), known(doc, "train_loss")[0])


def _partial_interval(r: float, count: int) -> tuple[float, float, float]:
    """Of a correlation with one variable taken out, by Fisher's transformation."""
    half = 1.959964 / math.sqrt(count - 4)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _sharpness() -> Outcome:
    checks, rows = [], []
    for name in PAPER:
        found = _correlations(name, "sharpness")
        checks.append(
            Check(f"{_SETS[name]}: φ correlates positively", f"r = {_r(found)}", "interval above 0", found[1] > 0)
        )
    measured = [name for name in PAPER if "even_rise" in _table1(name)["arms"][0]]
    for name in measured:
        found = _correlations(name, "even_rise")
        checks.append(
            Check(
                f"{_SETS[name]}: so does the change in loss, φ less the training loss",
                f"r = {_r(found)}",
                "interval above 0",
                found[1] > 0,
            )
        )
    for name, note in (("digits", "not in the paper"), *((n, f"paper {PAPER[n][0]:+.3f}") for n in PAPER)):
        found, loss = _correlations(name, "sharpness"), _correlations(name, "train_loss")
        left = _partial_interval(_left(name, "sharpness"), len(_table1(name)["arms"]))
        rows.append([_SETS[name], _r(found), note, f"{loss[0]:+.2f}", _r(left)])
    rows = [*rows[1:], rows[0], _cnn_row("sharpness")]
    digits = _correlations("digits", "even_rise")
    chance = [n for n in PAPER if _partial_interval(_left(n, "sharpness"), 100)[1] <= 0]
    loss_mean = known(dict(_table1("mnist")), "train_loss")[0]
    rise = abs(sum(known(dict(_table1("mnist")), "rise")[0])) / sum(loss_mean)
    return Outcome(
        f"φ correlates with the validation loss as printed, r = "
        f"{span([_correlations(n, 'sharpness')[0] for n in PAPER])}. "
        "But at these displacements φ is all but the training loss itself. The change in loss, which sharpness "
        f"means, correlates on {sum(_correlations(n, 'even_rise')[1] > 0 for n in measured)} of {len(measured)} sets.",
        f"r = {span([_correlations(n, 'sharpness')[0] for n in PAPER])}; no more than the training loss",
        checks,
        [
            Table(
                "Correlation of φ with the validation loss, that of the training loss alone, and what is left of φ's "
                "given the training loss.",
                ["data set", "r of φ", "paper", "r of the training loss", "left of φ's"],
                rows,
            )
        ],
        [
            f"On MNIST φ exceeds the training loss by {100 * rise:.2f} % of it. Given the training loss, what is left "
            f"of φ's correlation is within chance on {len(chance)} of {len(PAPER)} sets.",
            said(f"On digits the change in loss correlates by {_r(digits)}: the other way.", digits[2] < 0),
            "The change is measured with d and −d for each direction. Otherwise the linear term t∇L·d drowns it. "
            "On CIFAR-10 it was not measured so.",
            "The CIFAR-10 images had been stored as JPEG, so they are slightly lossy.",
        ],
    )


def _cnn_row(quantity: str) -> list[str]:
    found = stored(_CNN)["correlations"]
    own, loss = found[quantity], found["train_loss"]
    left = _partial_interval(own["given_train_loss"], stored(_CNN)["kept"])
    return [
        "small CNNs on Fashion-MNIST",
        _r((own["r"], own["low"], own["high"])),
        "not in the paper",
        f"{loss['r']:+.2f}",
        _r(left),
    ]


def _curvature() -> Outcome:
    checks, rows = [], []
    for name in PAPER:
        found = _correlations(name, "curvature")
        inside = found[1] <= PAPER[name][1] <= found[2]
        checks.append(
            Check(f"{_SETS[name]}: ψ correlates negatively", f"r = {_r(found)}", "interval below 0", found[2] < 0)
        )
        rows.append(
            [
                _SETS[name],
                _r(found),
                f"{PAPER[name][1]:+.3f}",
                "inside" if inside else "outside",
                f"{_left(name, 'curvature'):+.2f}",
            ]
        )
    digits = _correlations("digits", "curvature")
    rows.append(["digits", _r(digits), "", "", f"{_left('digits', 'curvature'):+.2f}"])
    cnn = stored(_CNN)["correlations"]["curvature"]
    rows.append(
        [
            "small CNNs on Fashion-MNIST",
            _r((cnn["r"], cnn["low"], cnn["high"])),
            "",
            "",
            f"{cnn['given_train_loss']:+.2f}",
        ]
    )
    least = math.tanh(1.959964 / math.sqrt(97))
    inside_all = sum(row[3] == "inside" for row in rows)
    return Outcome(
        said("No correlation of ψ differs from 0", not any(c.met for c in checks))
        + f": r = {span([_correlations(n, 'curvature')[0] for n in PAPER])} with "
        f"100 networks. The paper's values lie inside our intervals on {inside_all} of {len(PAPER)} sets, and so does "
        "0.",
        f"r = {span([_correlations(n, 'curvature')[0] for n in PAPER])}, intervals hold 0",
        checks,
        [
            Table(
                "Correlation of ψ with the validation loss, and what is left of it given the training loss.",
                ["data set", "r of ψ", "paper", "paper's value in our interval", "given the training loss"],
                rows,
            )
        ],
        [
            f"100 networks tell a correlation from 0 only if it is larger than {least:.2f}. "
            f"{sum(abs(psi) < least for _, psi in PAPER.values())} of the paper's {len(PAPER)} values are smaller.",
            "ψ averages the curvature of one random curve for each batch, as the reference implementation does.",
        ],
    )


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
        Check(f"{words}: below no teleport", none.shown(), "interval below 0", none.below(0), counted),
        Check(f"{words}: below a random teleport", control.shown(), "interval below 0", control.below(0), counted),
    ]


def _figure4_sharpness() -> Outcome:
    checks = []
    for folder in ("fig4-cifar10", "fig4-cifar10-search"):
        runs, words = _Runs(folder), _FIG4[folder]
        checks += _lower(f"{words}: φ lowered", runs, "sharpness down")
        up = runs.none("sharpness up")
        checks.append(
            Check(
                f"{words}: φ raised, no effect", up.shown(), "interval holds 0", not (up.below(0) or up.above(0)), False
            )
        )
    runs = _Runs("fig4-digits")
    checks += _lower("Digits, the reference's rates: φ lowered", runs, "sharpness down", False)
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
        checks += _lower(f"{words}: ψ raised", runs, "curvature up")
        down = runs.none("curvature down")
        checks.append(Check(f"{words}: ψ lowered, above no teleport", down.shown(), "interval above 0", down.above(0)))
    for folder in ("fig4-digits", "fig4-digits-text", "fig4-digits-search"):
        checks += _lower(f"{_FIG4[folder].capitalize()}: ψ raised", _Runs(folder), "curvature up", False)[1:]
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
    checks = _lower("CIFAR-10: ψ raised", runs, "curvature up")
    gap = _gap(runs, "curvature down")
    checks.append(
        Check(
            "CIFAR-10: ψ lowered, wider gap between training and validation loss",
            gap.shown(),
            "interval above 0",
            gap.above(0),
        )
    )
    for sense in ("down", "up"):
        found = runs.none(f"sharpness {sense}")
        holds = not (found.below(0) or found.above(0))
        words = "lowered" if sense == "down" else "raised"
        checks.append(Check(f"CIFAR-10: φ {words}, no effect", found.shown(), "interval holds 0", holds, False))
    checks += _lower("Digits: ψ raised", _Runs("fig11-digits"), "curvature up", False)
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
_table_1 = given(Claim, setting=_NETWORKS, sources=[*_TABLE1, _CNN], rebuild=_REBUILD_TABLE1, more=_MORE_TABLE1)
CLAIMS = [
    _table_1(
        "table-1-sharpness",
        "Table 1: does sharpness go with validation loss?",
        "Table 1 and Figure 9",
        says="sharpness φ has a strong positive correlation with validation loss, so the change in loss under "
        "perturbations indicates test performance.",
        figure=("table1-mnist/correlation.png", "MNIST: each point is a network, its validation loss upwards"),
        read=_sharpness,
    ),
    _table_1(
        "table-1-curvature",
        "Table 1: does curvature go against validation loss?",
        "Table 1 and Figure 10",
        says="the curvature ψ of minima is negatively correlated with validation loss.",
        figure=(
            "table1-fashion-mnist/correlation.png",
            "Fashion-MNIST, where the paper's correlation is strongest; ψ is among the panels",
        ),
        read=_curvature,
    ),
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
