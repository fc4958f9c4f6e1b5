"""Table 1 and Figures 9 and 10: do sharpness φ and curvature ψ of a minimum go with its validation loss?

100 networks from different seeds, SGD with batches of 20 for 40 epochs, in one program that all share their
mini-batches with; then φ over 200 directions and ψ over 200 curves, each on its own batch of 200 training samples.
MLP d-16-10-10, on CIFAR-10 3072-128-32-10, LeakyReLU 0.1, no biases. Beside φ and ψ stands the training loss itself,
and φ - L, the rise of the loss under the displacements; with one direction for each batch that is mostly t ∇L·d, which
vanishes only on average, so the mean over d and -d is there too. MNIST takes 3 to 11 minutes on 2 cores, digits 10
seconds, CIFAR-10 about an hour; a run that was stopped goes on from its last epoch when it is started again.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metatele import figures
from metatele.command_line import whole_number
from metatele.errors import ConfigError
from metatele.experiments import images as common

if TYPE_CHECKING:
    from torch import Tensor

# Training samples, hidden widths, learning rate, displacements (first, step) of the reference.
_SETTINGS: dict[str, tuple[int, tuple[int, ...], float, tuple[float, float]]] = {
    "digits": (0, (16, 10), 1e-2, (1e-3, 1e-2)),
    "mnist": (50_000, (16, 10), 1e-2, (1e-3, 1e-2)),
    "fashion-mnist": (50_000, (16, 10), 1e-2, (1e-4, 1e-3)),
    "cifar10": (50_000, (128, 32), 2e-2, (1e-4, 1e-3)),
}
PAPER = {"mnist": (0.704, -0.050), "fashion-mnist": (0.790, -0.232), "cifar10": (0.899, -0.167)}
_BATCHES = 200
_NAMES = {
    "sharpness": "sharpness φ",
    "orthant": "φ, orthant d > 0",
    "rise": "φ - L",
    "even_rise": "φ - L, mean over ±d",
    "orthant_rise": "φ - L, orthant d > 0",
    "curvature": "curvature ψ",
    "train_loss": "training loss L",
}


def pearson(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Correlation and its 95 % interval by Fisher's transformation; not a number where one does not vary.

    Example:
        >>> [round(v, 3) for v in pearson([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0])]
        [0.8, -0.28, 0.986]
    """
    from statistics import fmean

    a, b = [v - fmean(x) for v in x], [v - fmean(y) for v in y]
    size = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    if not size > 0 or len(x) < 4:
        return math.nan, math.nan, math.nan
    r = max(-1.0, min(1.0, sum(v * w for v, w in zip(a, b, strict=True)) / size))
    if abs(r) == 1:
        return r, r, r
    half = 1.959964 / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def partial(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Correlation of x and y with what both share with a third variable taken out."""
    xy, xz, yz = pearson(x, y)[0], pearson(x, given)[0], pearson(y, given)[0]
    rest = (1 - xz * xz) * (1 - yz * yz)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-12 else math.nan


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure all networks; the content of ``results.json``."""
    import torch

    from metatele.checkpoint import versions
    from metatele.perceptron.activations import LeakyReLU
    from metatele.perceptron.mlp import MLP
    from metatele.training.population import Population

    out = common.folder("table1", args)
    data, device = common.prepare(args, out)
    samples, hidden, lr, (first, step) = _SETTINGS[args.dataset]
    mlp = MLP((data.features, *hidden, data.classes), LeakyReLU(0.1))
    population = Population(data, mlp, range(args.networks), lr, min(samples, len(data.train_labels)), 20, device)
    state = out / "state.pt"
    if state.exists():
        print(f"going on from {state}", flush=True)
    begin_s = time.perf_counter()
    population.train(args.epochs, lambda done: _say(done, args.epochs, population.seconds), state)
    train_loss, train_accuracy = population.measured("train")
    test_loss, test_accuracy = population.measured("test")
    measured_s = time.perf_counter()
    values = geometry(population, tuple(first + step * i for i in range(20)))
    seconds = {"training": population.seconds, "geometry": time.perf_counter() - measured_s}
    doc = {
        "format": common.FORMAT,
        "experiment": "table1",
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "train_samples": len(population.train_labels),
        "test_samples": len(data.test_labels),
        "widths": list(mlp.widths),
        "lr": lr,
        "batch_size": 20,
        "epochs": args.epochs,
        "displacements": [first + step * i for i in range(20)],
        "device": str(device),
        "versions": {**versions(), "machine": platform.machine(), "threads": str(torch.get_num_threads())},
        "seconds": {**seconds, "in all, this call": time.perf_counter() - begin_s},
        "arms": [
            {
                "seed": seed,
                "train_loss": _number(train_loss[i]),
                "train_accuracy": _number(train_accuracy[i]),
                "test_loss": _number(test_loss[i]),
                "test_accuracy": _number(test_accuracy[i]),
                **{name: _number(value[i]) for name, value in values.items()},
            }
            for i, seed in enumerate(population.seeds)
        ],
    }
    state.unlink(missing_ok=True)
    return doc


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _say(done: int, epochs: int, seconds: float) -> None:
    if done % max(1, epochs // 10) == 0 or done == epochs or seconds / done > 60:
        print(f"epoch {done} of {epochs}: {seconds:.0f} s of training", flush=True)


def geometry(population: Any, displacements: tuple[float, ...]) -> dict[str, Tensor]:
    """φ, its rise over the loss on the same batches, and ψ ``[networks]``, batch by batch."""
    import torch

    from metatele.geometry import Curvature, Sharpness
    from metatele.random import generator

    count = len(population.train_labels)
    # Not more samples than inputs, so that the exact action exists at the first layer.
    size = min(200, count, population.mlp.widths[0] // 2)
    whole = count // size * size  # no sample twice in a batch
    orders = [
        torch.randperm(count, generator=generator(i, "tuning"))[:whole] for i in range(-(-_BATCHES * size // whole))
    ]
    flat = population.flat
    totals = {name: torch.zeros(len(flat), dtype=torch.float64, device=flat.device) for name in _NAMES}
    for number, samples in enumerate(torch.cat(orders)[: _BATCHES * size].split(size)):
        point = population.landscape(samples).at(flat)
        loss = point.value.double()
        for name, orthant in (("sharpness", False), ("orthant", True)):
            phi = Sharpness(displacements, 1, orthant, seed=number).value(point).double()
            totals[name] += phi
            totals["rise" if name == "sharpness" else "orthant_rise"] += phi - loss
            if name == "sharpness":
                back = Sharpness(tuple(-t for t in displacements), 1, seed=number).value(point).double()
                totals["even_rise"] += (phi + back) / 2 - loss
        totals["curvature"] += Curvature(1, seed=number).value(point).double()
    del totals["train_loss"]
    return {name: total / _BATCHES for name, total in totals.items()}


def known(doc: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """A quantity and the validation loss of each network that did not diverge."""
    kept = _kept(doc)
    return [a[name] for a in kept], [a["test_loss"] for a in kept]


def _kept(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The networks of which every number is finite."""
    return [a for a in doc["arms"] if all(a[name] is not None for name in (*_names(doc), "test_loss"))]


def _names(doc: dict[str, Any]) -> dict[str, str]:
    """The quantities there are: earlier runs did not measure all."""
    return {name: words for name, words in _NAMES.items() if name in doc["arms"][0]}


def table(doc: dict[str, Any]) -> list[list[str]]:
    """Correlations with the validation loss, the paper's beside them."""
    paper = PAPER.get(doc["dataset"], (math.nan, math.nan))
    rows = [["quantity", "mean", "Pearson with validation loss", "95 % interval", "given the training loss", "paper"]]
    for name, words in _names(doc).items():
        x, y = known(doc, name)
        r, low, high = pearson(x, y)
        given = "" if name == "train_loss" else _shown(partial(x, y, known(doc, "train_loss")[0]))
        beside = {"sharpness": paper[0], "orthant": paper[0], "curvature": paper[1]}.get(name, math.nan)
        mean = f"{sum(x) / len(x):.5g}" if x else "none"
        rows.append([words, mean, _shown(r), f"{_shown(low)} to {_shown(high)}", given, _shown(beside, "")])
    return rows


def _shown(value: float, missing: str = "none") -> str:
    return f"{value:+.3f}" if math.isfinite(value) else missing


def note(doc: dict[str, Any]) -> str:
    """What was run, and agreement with the paper, in words."""
    r = {name: pearson(*known(doc, name)) for name in _names(doc)}
    lost = len(doc["arms"]) - len(_kept(doc))
    losses = known(doc, "train_loss")
    spread = f"{min(losses[1]):.4g} to {max(losses[1]):.4g}" if losses[1] else "none finite"
    agree = []
    phi, psi = r["sharpness"], r["curvature"]
    if doc["dataset"] in PAPER:
        paper_phi, paper_psi = PAPER[doc["dataset"]]
        sign = "the same sign as" if phi[0] * paper_phi > 0 else "the other sign than"
        inside = "inside" if phi[1] <= paper_phi <= phi[2] else "outside"
        agree.append(f"φ: {sign} the paper's {paper_phi:+.3f}, which lies {inside} our interval.")
        inside = "inside" if psi[1] <= paper_psi <= psi[2] else "outside"
        agree.append(f"ψ: the paper's {paper_psi:+.3f} lies {inside} our interval.")
    if losses[1]:
        rise, loss = _mean(doc, "rise"), _mean(doc, "train_loss")
        agree.append(
            f"The training loss alone correlates {_shown(r['train_loss'][0])}; φ is the loss, {loss:.3g} on average, "
            f"plus a rise of {rise:.2g}, whose correlation of {_shown(r['rise'][0])} is mostly that of chance: it "
            "changes sign with the direction."
        )
        if "even_rise" in r:
            value, low, high = r["even_rise"]
            agree.append(
                f"Over d and -d the rise is {_mean(doc, 'even_rise'):.2g}, and correlates {_shown(value)} "
                f"({_shown(low)} to {_shown(high)})."
            )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in doc["seconds"].items())
    return (
        f"{len(doc['arms'])} networks {'-'.join(map(str, doc['widths']))} on {doc['dataset']}, {doc['epochs']} epochs, "
        f"validation losses {spread}"
        + (f", {lost} not finite and left out" if lost else "")
        + f". {' '.join(agree)} φ over {_BATCHES} directions and ψ over {_BATCHES} curves, each on "
        f"its own training batch; seconds: {times}."
    )


def _mean(doc: dict[str, Any], name: str) -> float:
    x, _ = known(doc, name)
    return sum(x) / len(x) if x else math.nan


def figure(doc: dict[str, Any]) -> bytes:
    """Scatter plots: each point is a network."""
    fig, panels = figures.subplots(2, 3, figsize=(figures.WIDTH, 5.4), layout="constrained", sharey=True)
    names = _names(doc)
    if "even_rise" in names:
        del names["rise"]
    for axes, (name, words) in zip(panels.flat, names.items(), strict=True):
        x, y = known(doc, name)
        axes.scatter(x, y, s=12, color=figures.COLOURS[1], alpha=0.7, linewidth=0)
        r, low, high = pearson(x, y)
        figures.title(axes, f"r = {_shown(r)} ({_shown(low)} to {_shown(high)})")
        axes.set_xlabel(words)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(axis="x", nbins=4)
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss")
    figures.title(
        fig,
        f"{doc['dataset']}, {len(doc['arms'])} networks after {doc['epochs']} epochs: correlation r with the "
        "validation loss, 95 % interval",
    )
    return figures.png(fig)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    p = common.parser("table1", __doc__)
    p.add_argument("--networks", type=whole_number(4), default=100, metavar="N", help="(default 100)")
    args = p.parse_args(arguments)
    if args.seeds != 5:
        raise ConfigError("table1 has one network for each seed: give --networks in place of --seeds")
    out = common.folder("table1", args)
    doc = common.stored(out, "table1") if args.redraw else run(args)
    common.finish(doc, out, table, figure, "correlation.png", note(doc))
